"""The papers' theorems on small random MDPs, exactly, and the training of omega against them.

A policy's occupancy is (1 - gamma) * sum over t of gamma^t Pr(s_t, a_t). AMPL's omega is the
policy's occupancy divided by the data's. MOPO's rho is an occupancy divided by 1 - gamma.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy import ndarray as Array
from numpy.random import Generator

import ampl
import combo
import mopo

STATES = 4
ACTIONS = 2


class Mdp(NamedTuple):
    P: Array  # [S, A, S]; rows sum to at most one, the rest is the chance to terminate
    reward: Array  # [S, A], in [0, 1]
    start: Array  # [S], the distribution of the first state
    gamma: float


def random_distributions(random: Generator, *shape: int) -> Array:
    """Of the last axis."""
    return random.dirichlet(np.ones(shape[-1]), shape[:-1])


def random_mdp(random: Generator, gamma: float) -> Mdp:
    return Mdp(
        P=random_distributions(random, STATES, ACTIONS, STATES),
        reward=random.uniform(size=(STATES, ACTIONS)),
        start=random_distributions(random, STATES),
        gamma=gamma,
    )


def pair_chain(P: Array, policy: Array) -> Array:
    """How likely the pair (s', a') comes after the pair (s, a): [S A, S A]."""
    chain = np.einsum("sat,tb->satb", P, policy)
    return chain.reshape(policy.size, policy.size)


def q_values(mdp: Mdp, policy: Array) -> Array:
    """Q of the policy [S, A], the sum of discounted rewards."""
    system = np.eye(policy.size) - mdp.gamma * pair_chain(mdp.P, policy)
    return np.linalg.solve(system, mdp.reward.ravel()).reshape(policy.shape)


def occupancy(mdp: Mdp, policy: Array) -> Array:
    """The policy's share of discounted visits [S, A]."""
    system = np.eye(policy.size) - mdp.gamma * pair_chain(mdp.P, policy).T
    first = (1 - mdp.gamma) * (mdp.start[:, None] * policy)
    return np.linalg.solve(system, first.ravel()).reshape(policy.shape)


# --- AMPL ---


def moment_distance(mdp: Mdp, data: Array, policy: Array, omega: Array, q: Array) -> float:
    """ampl.omega_loss between the sides of Eq. (10), of exact expectations.

    `data` [S, A] is the distribution of the data. omega_loss takes means over rows; here each pair
    is a row, weighted by how often the data have it.
    """
    weighted = torch.tensor(omega * data * data.size).ravel()
    value = (policy * q).sum(-1)  # [S]
    q_next = mdp.P @ value  # [S, A]; where an episode may end, with the share that goes on
    q_initial = mdp.start @ value
    loss = ampl.omega_loss(
        omega=weighted,
        omega_target=weighted,
        q=torch.tensor(q).ravel(),
        q_next=torch.tensor(q_next).ravel(),
        q_initial=torch.tensor([q_initial]),
        gamma=mdp.gamma,
    )
    return loss.item()


def test_equation_10_holds_for_the_true_omega():
    """For any Q, with chances to terminate; and not for omega = 1."""
    random = np.random.default_rng(4)
    for _ in range(50):
        mdp = random_mdp(random, gamma=0.9)
        going_on = random.uniform(0.3, 1, (STATES, ACTIONS, 1))
        mdp = mdp._replace(P=mdp.P * going_on)
        behaviour = random_distributions(random, STATES, ACTIONS)
        policy = random_distributions(random, STATES, ACTIONS)
        data = occupancy(mdp, behaviour)
        omega = occupancy(mdp, policy) / data
        q = 10 * random.normal(size=(STATES, ACTIONS))
        assert moment_distance(mdp, data, policy, omega, q) < 1e-18
        assert moment_distance(mdp, data, policy, np.ones_like(omega), q) > 1e-7


# Three states in a ring. Action 1 goes to the next state, action 0 back to state 0, where episodes
# begin. The data have each of the six pairs once; the policy takes action 1 with 80 %.
RING_NEXT = [[0, 1], [0, 2], [0, 0]]
RING_POLICY = np.array([[0.2, 0.8], [0.2, 0.8], [0.2, 0.8]])
RING_DATA = np.full((3, 2), 1 / 6)


def ring_mdp(random: Generator) -> Mdp:
    return Mdp(
        P=np.eye(3)[RING_NEXT],
        reward=random.uniform(size=(3, 2)),
        start=np.eye(3)[0],
        gamma=0.8,
    )


def ring_ampl(**changes) -> ampl.AMPL:
    """AMPL whose data are the ring's six pairs, with states and actions as one-hot vectors."""
    args = ampl.Args(
        initial_states="dataset",
        cuda=False,
        gamma=0.8,
        hidden=(24, 24),
        buffer_size=50,
        rollout_rows=24,
        omega_batch_size=256,
        omega_initial_batch_size=256,
        **changes,
    )
    method = ampl.AMPL(args, 3, 2, torch.device("cpu"))
    state = torch.arange(6) // 2
    action = torch.arange(6) % 2
    next_state = torch.tensor(RING_NEXT)[state, action]
    dataset = {
        "obs": torch.eye(3)[state],
        "action": torch.eye(2)[action],
        "reward": torch.arange(6.0),
        "next_obs": torch.eye(3)[next_state],
        "terminated": torch.zeros(6, dtype=torch.bool),
        "has_next": torch.ones(6, dtype=torch.bool),
        "starts": torch.eye(3)[:1],
    }
    method.set_data(dataset)
    method.initial_obs = method.episode_starts

    def act(obs):
        takes_1 = torch.rand(len(obs)) < 0.8
        return torch.eye(2)[takes_1.long()]

    method.actor.forward = act
    return method


@pytest.mark.parametrize("many", [False, True])
def test_training_of_omega(many):
    """One Q: Eq. (10) comes to hold for it, but omega stays far from the true one.

    With many Qs, which together span all functions, omega comes near the true one.
    """
    method = ring_ampl(omega_lr=2e-3, omega_power=1.0, omega_tau=0.1)
    random = np.random.default_rng(5)
    mdp = ring_mdp(random)
    q = q_values(mdp, RING_POLICY)
    torch.manual_seed(0)
    for _ in range(500):
        table = 2 * random.normal(size=(3, 2)) if many else q
        table = torch.tensor(table).float()

        def q_of_pair(obs, action, table=table):
            return table[obs.argmax(-1), action.argmax(-1)]

        method.omega_critic_target.q1_only = q_of_pair
        for _ in range(3 if many else 1):
            method.omega_step(table.ravel())
    omega = method.over_data(lambda batch: method.omega(batch.obs, batch.action))
    omega = omega.numpy().reshape(3, 2)
    ones = np.ones((3, 2))
    true_omega = occupancy(mdp, RING_POLICY) / RING_DATA
    error = abs(omega - true_omega).mean()
    error_of_ones = abs(ones - true_omega).mean()
    if many:
        assert error < error_of_ones / 3
    else:
        gap = moment_distance(mdp, RING_DATA, RING_POLICY, omega, q) ** 0.5
        gap_of_ones = moment_distance(mdp, RING_DATA, RING_POLICY, ones, q) ** 0.5
        assert gap < gap_of_ones / 5
        assert error > 0.8 * error_of_ones


# --- MOPO ---


def test_mopo_lemma_and_bounds():
    """Lemma 4.1 and Eq. (2), (4), (7): telescoping, and three lower bounds that are not idle.

    Rewards are in [-1, 1], so that r_max is 1.
    """
    random = np.random.default_rng(0)
    overrated = 0
    for _ in range(200):
        mdp = random_mdp(random, gamma=random.uniform(0.1, 0.95))
        mdp = mdp._replace(reward=2 * mdp.reward - 1)
        policy = random_distributions(random, STATES, ACTIONS)
        # A model that is wrong by more or less.
        share = random.uniform() ** 2
        wrong = random_distributions(random, STATES, ACTIONS, STATES)
        model = mdp._replace(P=(1 - share) * mdp.P + share * wrong)

        value = (policy * q_values(mdp, policy)).sum(-1)
        true_return = mdp.start @ value
        rho = occupancy(model, policy) / (1 - mdp.gamma)
        naive_return = (rho * mdp.reward).sum()
        gap = (model.P - mdp.P) @ value  # G(s, a)
        assert naive_return - true_return == pytest.approx(mdp.gamma * (rho * gap).sum(), abs=1e-8)
        assert true_return >= (rho * (mdp.reward - mdp.gamma * abs(gap))).sum() - 1e-9

        # The sum over s' of |P^ - P*| is the largest mean difference of functions up to 1.
        distance = abs(model.P - mdp.P).sum(-1)
        assert (abs(gap) <= distance / (1 - mdp.gamma) + 1e-9).all()
        penalty_coef = mdp.gamma / (1 - mdp.gamma)
        for uncertainty in (distance, distance + 0.3 * random.uniform(size=distance.shape)):
            penalised = mopo.penalised_reward(mdp.reward, uncertainty, penalty_coef)
            assert true_return >= (rho * penalised).sum() - 1e-9
        if naive_return > true_return + 1e-3:
            overrated += 1
    assert overrated > 20


# --- COMBO ---


@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
def test_combo_equation_4(beta):
    """With a table for Q the gradient of Eq. (2), in the script's terms, is zero at Eq. (4)."""
    random = np.random.default_rng(0)
    # 100 rows of the eight pairs of a table: 52 of the data, then 48 of the model, each with all.
    pairs = np.concatenate(
        [
            np.arange(8),
            random.integers(8, size=44),
            np.arange(8),
            random.integers(8, size=40),
        ]
    )
    pairs = torch.tensor(pairs)
    data = pairs[:52].bincount(minlength=8).double() / 52
    rho = pairs[52:].bincount(minlength=8).double() / 48
    mixed = 0.52 * data + 0.48 * rho  # d_f
    backup = torch.tensor(random.normal(size=8))  # what Q_k backs up to
    table = backup - beta * (rho - data) / mixed  # Eq. (4)
    table.requires_grad_()
    q = table[pairs].expand(2, -1)  # both critics are this table
    gap = combo.expectation(q[:, 52:]) - combo.expectation(q[:, :52])  # [2]
    loss = beta * gap.sum() + combo.critic_loss(q, backup[pairs])
    (gradient,) = torch.autograd.grad(loss, table)
    assert gradient.abs().max() < 1e-12
