"""The papers' theorems on small random MDPs, exactly, and the training of omega against them.

rho = (1 - gamma) sum_t gamma^t Pr(s_t, a_t) is a policy's occupancy, d that of the data. MOPO's
rho is ours divided by 1 - gamma.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy import ndarray as Array
from test_ablations import ring

import ampl
import combo
from mopo import penalised_reward as penalised

S, A = 4, 2


class Mdp(NamedTuple):
    P: Array  # [S, A, S]; rows sum to at most one, the rest is the chance to terminate
    r: Array  # [S, A] in [0, 1]
    mu0: Array  # [S]
    gamma: float


def simplex(rng: np.random.Generator, *shape: int) -> Array:
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def random_mdp(rng: np.random.Generator, gamma: float | None = None) -> Mdp:
    gamma = gamma or rng.uniform(0.1, 0.95)
    return Mdp(simplex(rng, S, A, S), rng.uniform(size=(S, A)), simplex(rng, S), gamma)


def mix(rng: np.random.Generator, x: Array, far: float) -> Array:
    return (1 - far) * x + far * simplex(rng, *x.shape)


def q_values(m: Mdp, pi: Array) -> Array:
    """Q of pi, not normalised. -> [S, A]"""
    chain = np.einsum("sat,tb->satb", m.P, pi).reshape(pi.size, pi.size)
    return np.linalg.solve(np.eye(pi.size) - m.gamma * chain, m.r.ravel()).reshape(pi.shape)


def occupancy(m: Mdp, pi: Array, P: Array | None = None) -> Array:
    """rho of pi in dynamics P, [S, A]."""
    chain = np.einsum("sat,tb->satb", m.P if P is None else P, pi).reshape(pi.size, pi.size)
    start = (1 - m.gamma) * (m.mu0[:, None] * pi).ravel()
    return np.linalg.solve(np.eye(pi.size) - m.gamma * chain.T, start).reshape(pi.shape)


# --- AMPL ---


def moment_distance(m: Mdp, d: Array, pi: Array, omega: Array, Q: Array) -> float:
    """ampl.miw_loss between the sides of Eq. (10), fed with exact expectations."""
    weight = omega * d * d.size  # its means over rows are uniform
    V = (pi * Q).sum(-1)
    rows = (weight, weight, Q, m.P @ V, m.mu0 @ V)
    return ampl.miw_loss(*(torch.tensor(x).reshape(1, -1) for x in rows), m.gamma).item()


def test_ampl_equation_10():
    """At the true omega both sides agree for any Q, terminals or not: lost gamma, wrong pair."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        m, mu, pi = random_mdp(rng, 0.9), simplex(rng, S, A), simplex(rng, S, A)
        m = m._replace(P=m.P * rng.uniform(0.3, 1, (S, A, 1)))
        d, Q = occupancy(m, mu), 10 * rng.normal(size=(S, A))
        assert moment_distance(m, d, pi, occupancy(m, pi) / d, Q) < 1e-18
        assert moment_distance(m, d, pi, np.ones((S, A)), Q) > 1e-7


@pytest.mark.parametrize("spanning", [False, True])
def test_ampl_training_of_omega(spanning):
    """One Q: Eq. (10) comes to hold for it, the true omega stays far. Many: omega comes near."""
    rates = dict(hidden=(24, 24), miw_lr=2e-3, miw_alpha=1.0, miw_tau=0.1)
    (method, _), rng = ring("ampl", **rates), np.random.default_rng(5)
    P, pi = np.eye(3)[[[0, 1], [0, 2], [0, 0]]], np.tile([0.2, 0.8], (3, 1))
    m = Mdp(P, rng.uniform(size=(3, 2)), np.eye(3)[0], 0.8)
    d, Q = np.full((3, 2), 1 / 6), q_values(m, pi)
    torch.manual_seed(0)
    for _ in range(500):
        table = torch.tensor(2 * rng.normal(size=(3, 2)) if spanning else Q).float()
        method.critic_slow.first = lambda s, a, Q=table: Q[s.argmax(-1), a.argmax(-1)]
        for _ in range(3 if spanning else 1):
            method.miw_step(table.view(1, -1))
    omega = method.over_data(lambda batch: method.omega(batch.obs, batch.action))
    tables = omega.numpy().reshape(3, 2), np.ones((3, 2))
    residual = [moment_distance(m, d, pi, x, Q) ** 0.5 for x in tables]
    distance = [abs(x - occupancy(m, pi) / d).mean() for x in tables]
    if spanning:
        assert distance[0] < distance[1] / 3
    else:
        assert residual[0] < residual[1] / 5 and distance[0] > 0.8 * distance[1]


# --- MOPO ---


def test_mopo_lemma_and_bounds():
    """Lemma 4.1 and Eq. (2), (4), (7): telescoping, and three lower bounds that are not idle."""
    rng, overrated = np.random.default_rng(0), 0
    for _ in range(200):
        m, pi = random_mdp(rng), simplex(rng, S, A)
        m = m._replace(r=2 * m.r - 1)
        model, lam = mix(rng, m.P, rng.uniform() ** 2), m.gamma / (1 - m.gamma)
        V = (pi * q_values(m, pi)).sum(-1)
        G, u = (model - m.P) @ V, abs(model - m.P).sum(-1)
        rho, true = occupancy(m, pi, model) / (1 - m.gamma), m.mu0 @ V
        naive = (rho * m.r).sum()
        assert naive - true == pytest.approx(m.gamma * (rho * G).sum(), abs=1e-8)
        assert true >= (rho * (m.r - m.gamma * abs(G))).sum() - 1e-9
        assert (abs(G) <= u / (1 - m.gamma) + 1e-9).all()
        for admissible in (u, u + 0.3 * rng.uniform(size=u.shape)):
            assert true >= (rho * penalised(m.r, admissible, lam)).sum() - 1e-9
        overrated += naive > true + 1e-3
    assert overrated > 20


# --- COMBO ---


@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
def test_combo_equation_4(beta):
    """With table Q the gradient of Eq. (2), in the terms of the code, is zero at Eq. (4)."""
    rng = np.random.default_rng(0)
    pairs = np.concatenate([np.arange(8), rng.integers(8, size=44), np.arange(8)])
    pairs = torch.tensor(np.append(pairs, rng.integers(8, size=40)))  # of 52 data and 48 model rows
    d, rho = (rows.bincount(minlength=8).double() / len(rows) for rows in pairs.split([52, 48]))
    backup = torch.tensor(rng.normal(size=8))  # of Q_k
    table = (backup - beta * (rho - d) / (0.52 * d + 0.48 * rho)).requires_grad_()  # Eq. (4)
    q, in_data = table[pairs].expand(1, 2, -1), (torch.arange(100) < 52)[None].double()
    gap = combo.expectation(q, 1 - in_data) - combo.expectation(q, in_data)
    loss = beta * gap.sum(-1) + combo.critic_loss(q, backup[pairs][None])
    (grad,) = torch.autograd.grad(loss.sum(), table)
    assert grad.abs().max() < 1e-12
