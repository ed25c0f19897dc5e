"""COMBO: the conservative critic, its tabular theory, --select, the probe, and whole tiny runs."""

import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_theory import occupancy, random_mdp, simplex, transitions
from torch import nn

import combo
import mopo

CPU = torch.device("cpu")
ENV = "maze2d-umaze-v1"
SMALL = dict(
    hidden=(16, 16), batch_size=16, rollout_starts=20, rollout_retain=2, horizon=3, model_hidden=16,
    ensemble_size=3, num_elites=2, model_batch_size=64, holdout_size=40, cuda=False,
)  # fmt: skip
# The model fit has two epochs of four steps; there are three rollouts and two evaluations.
MODEL_RUN = SMALL | dict(
    env_id=ENV, total_iterations=12, model_max_epochs=2, model_patience=5, rollout_every=5,
    eval_every=6, eval_episodes=1, final_episodes=2, log_every=3, checkpoint_every=100, threads=1,
    cpu_fast_matmul=False,
)  # fmt: skip
TINY = MODEL_RUN | dict(num_actions=3)


def agent_of(**changes):
    """A COMBO agent on 3 observations and 2 actions, and its arguments."""
    args = combo.Args(**SMALL | changes)
    args = dataclasses.replace(args, num_seeds=len(combo.settings(args)))
    return combo.COMBO(args, 3, 2, CPU), args


def batch_of(agent, rows=16, seed=0):
    """A random batch [L, rows, ...] with a terminal in every fifth row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(agent.learners, rows, sum(agent.columns), generator=g)
    batch = agent.split(x)
    ends = (torch.arange(rows) % 5 == 4).float().expand(agent.learners, -1)
    return batch._replace(action=batch.action.tanh(), terminated=ends)


def update(agent, batch, args, seed=7):
    torch.manual_seed(seed)
    return combo.update_conservative_critic(agent, batch, args)


def gradients(agent, batch, args, monkeypatch, seed=7):
    """What update_conservative_critic hands to the critics' optimizer."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(combo, "apply_gradients", lambda optimizer, ps, grads: seen.append(grads))
        logs = update(agent, batch, args, seed)
    (grads,) = seen
    return list(grads), logs


# --- proposals ---


def test_proposals(monkeypatch):
    """Ten each of uniform, pi(.|s), pi(.|s') with the density of the state they were drawn at."""
    agent, args = agent_of(num_seeds=2)
    assert combo.Args().num_actions == args.num_actions == 10
    log_std = math.log(0.3)
    agent.actor.forward = lambda s: (0.4 * s[..., :2], torch.full_like(s[..., :2], log_std))
    obs = torch.rand(2, 50, 3) * 2 - 1
    next_obs = -obs + 0.5
    actions, log_density = combo.proposals(agent, obs, next_obs, args)
    assert actions.shape == (2, 50, 30, 2) and log_density.shape == (2, 50, 30)
    assert len(actions.view(-1, 2).unique(dim=0)) == 2 * 50 * 30
    uniform = actions[:, :, :10]
    assert -1 <= uniform.min() < -0.95 and 0.95 < uniform.max() <= 1 and abs(uniform.mean()) < 0.05
    assert torch.allclose(log_density[:, :, :10], torch.tensor(-2 * math.log(2)))
    for first, states in ((10, obs), (20, next_obs)):
        a = actions[:, :, first : first + 10].double()
        u, mean = torch.atanh(a), (0.4 * states[..., :2]).double().unsqueeze(2)
        assert (u - mean).mean().abs() < 0.03 and abs((u - mean).std() - 0.3) < 0.02
        normal = torch.distributions.Normal(mean, 0.3).log_prob(u) - torch.log(1 - a.square())
        own = log_density[:, :, first : first + 10].double()
        torch.testing.assert_close(own, normal.sum(-1), atol=1e-3, rtol=1e-3)


def test_q_of_actions_is_the_loop():
    """Row b and action i hold both critics' Q(s_b, a_bi), of the right learner."""
    agent, _ = agent_of(num_seeds=2)
    obs, actions = torch.randn(2, 4, 3), torch.rand(2, 4, 5, 2)
    q = combo.q_of_actions(agent, obs, actions)
    assert q.shape == (2, 2, 4, 5)
    for b in range(4):
        for i in range(5):
            one = agent.critic(obs[:, b : b + 1], actions[:, b : b + 1, i])[..., 0]
            torch.testing.assert_close(q[:, :, b, i], one)


# --- log-sum-exp and expectation ---


def test_log_sum_exp_takes_all_thirty():
    """log(120) and log(29 + e^10); three entries for each of 10 B rows would give 2.48 and 2.0."""
    q = torch.zeros(1, 2, 1, 30)
    density = torch.full((1, 1, 30), -2 * math.log(2))
    assert combo.log_sum_exp(q, density)[0, 0].tolist() == pytest.approx([4.7874917])
    q[0, 1, 0, 4] = 10.0
    value = combo.log_sum_exp(q, torch.zeros(1, 1, 30))
    assert value.shape == (1, 2, 1)
    assert value.flatten().tolist() == pytest.approx([3.4011974, 10.0013157])


def test_log_sum_exp_divides_by_the_density():
    """Densities 1/2 and 1/4: log(2 + 4 e), per learner; the gradient is the softmax."""
    q = torch.tensor([0.0, 1.0]).repeat(2, 2, 1, 1).requires_grad_()
    log_density = torch.tensor([[[0.5, 0.25]], [[1.0, 1.0]]]).log()
    value = combo.log_sum_exp(q, log_density)
    assert value[0, :, 0].tolist() == pytest.approx([2.5551420, 2.5551420])
    assert value[1, :, 0].tolist() == pytest.approx([1.3132617, 1.3132617])
    (grad,) = torch.autograd.grad(value.sum(), q)
    assert grad[0, 1, 0].tolist() == pytest.approx([0.1553624, 0.8446376])
    assert grad[1, 0, 0].tolist() == pytest.approx([0.2689414, 0.7310586])


def test_proposals_estimate_the_integral():
    """Whatever the policy, the sum over 3 n importance-weighted actions is 3 n int exp(Q) da."""
    agent, args = agent_of(num_actions=20_000)
    log_std = math.log(0.8)
    agent.actor.forward = lambda s: (0.3 * s[..., :2], torch.full_like(s[..., :2], log_std))
    obs = torch.tensor([[[1.0, -1.0, 0.0]]])
    torch.manual_seed(0)
    actions, log_density = combo.proposals(agent, obs, -obs, args)
    for part in (slice(0, 20_000), slice(20_000, 40_000), slice(40_000, 60_000)):
        q = actions[:, :, part].sum(-1).unsqueeze(1).expand(-1, 2, -1, -1)
        value = combo.log_sum_exp(q, log_density[:, :, part]) - math.log(20_000)
        # int exp(a_1 + a_2) over the square: (e - 1/e)^2 = 5.5244
        assert value[0, 0, 0].item() == pytest.approx(1.7091770, abs=0.03)


def test_expectation():
    """Per critic, (1 + 3) / 2 and (10 + 30) / 2 without the middle row; no rows give 0, not NaN."""
    q = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]).repeat(2, 1, 1)
    among = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert combo.expectation(q, among).tolist() == [[2.0, 20.0], [0.0, 0.0]]


@pytest.mark.parametrize("states, rho", [("mixed", [16, 16]), ("model", [12, 4])])
def test_rows_of_rho(states, rho):
    """The first f B rows are data, per learner; rho has all rows or the others."""
    agent, args = agent_of(select=True, select_beta=(1.0,), select_real_fraction=(0.25, 0.75),
                           rho_states=states)  # fmt: skip
    in_data, in_rho = combo.rows_of_rho(agent, args)
    expected = torch.arange(16) < torch.tensor([[4], [12]])
    assert torch.equal(in_data, expected.float())
    assert in_rho.expand(2, 16).sum(-1).tolist() == rho
    if states == "model":
        assert torch.equal(in_rho, 1 - in_data)


# --- the critics' step, Eq. (2) ---


@pytest.mark.parametrize("states", ["mixed", "model"])
def test_critic_gradient_is_that_of_equation_2(states, monkeypatch):
    """Learner by learner and row by row: 0.5 TD^2 + beta (log-sum-exp on rho - Q on the data)."""
    agent, args = agent_of(select=True, select_beta=(0.5, 5.0), select_real_fraction=(0.25, 0.75),
                           rho_states=states, num_actions=2, gamma=0.9)  # fmt: skip
    with torch.no_grad():
        for p in agent.critic_target.parameters():
            p.mul_(1.3)
    batch, seen, drawn = batch_of(agent), [], []
    sample, propose = agent.actor.sample, combo.proposals
    agent.actor.sample = lambda s: drawn.append((s, sample(s))) or drawn[-1][1]
    monkeypatch.setattr(combo, "proposals", lambda *a: seen.append((a, propose(*a))) or seen[-1][1])
    grads, logs = gradients(agent, batch, args, monkeypatch)
    ((_, obs, next_obs, _), (actions, density)) = seen[0]
    count = obs.shape[1]
    assert torch.equal(obs, batch.obs[:, -count:])
    assert torch.equal(next_obs, batch.next_obs[:, -count:])
    next_action = next(a for s, (a, _) in drawn if torch.equal(s, batch.next_obs))
    loss, gaps = 0.0, torch.zeros(4)
    for n, (beta, f) in enumerate(combo.settings(args)):
        real = int(16 * f)
        q = agent.critic(batch.obs, batch.action)[n]
        with torch.no_grad():
            q_next = agent.critic_target(batch.next_obs, next_action)[n].amin(0)
        target = batch.reward[n] + 0.9 * (1 - batch.terminated[n]) * q_next
        rho_rows = range(0 if states == "mixed" else real, 16)
        assert count >= len(rho_rows)
        for j in range(2):
            pushed = 0.0
            for b in rho_rows:
                a, p = actions[n, b - 16 + count], density[n, b - 16 + count]
                own = torch.stack([  # evaluated at s, not at s'
                    agent.critic(batch.obs[:, b : b + 1], x.expand(4, 1, 2))[n, j, 0] for x in a
                ])  # fmt: skip
                pushed = pushed + (own - p).exp().sum().log() / len(rho_rows)
            gap = pushed - q[j, :real].mean()
            gaps[n] += gap.detach() / 2
            loss = loss + beta * gap + 0.5 * (q[j] - target).square().mean()
    expected = torch.autograd.grad(loss, list(agent.critic.parameters()))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert got.abs().sum() > 0
    torch.testing.assert_close(logs["losses/conservative_gap"], gaps, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("states", ["mixed", "model"])
def test_which_rows_are_pushed(states):
    """Stored actions of data rows, and only they, are pushed up; rho's states as the flag says."""
    agent, args = agent_of(rho_states=states)  # f = 0.5: rows 0 to 7 are data
    base = batch_of(agent)

    def changes(field, row):
        x = getattr(base, field).clone()
        x[:, row] = -x[:, row]
        gaps = [update(copy_of(agent, args), b, args)["losses/conservative_gap"]
                for b in (base, base._replace(**{field: x}))]  # fmt: skip
        return not torch.equal(*gaps)

    assert [changes("action", row) for row in (0, 7, 8, 15)] == [True, True, False, False]
    # A state's own and its successor's policy draw actions; a data row of "model" has no part.
    in_rho = [states == "mixed", states == "mixed", True, True]
    assert [changes("next_obs", row) for row in (0, 7, 8, 15)] == in_rho
    assert [changes("obs", row) for row in (0, 7, 8, 15)] == [True] * 4


def copy_of(agent, args):
    twin = combo.COMBO(args, 3, 2, CPU)
    twin.load_state_dict(agent.state_dict())
    return twin


def test_large_beta_lowers_q_outside_the_data_and_raises_it_inside():
    """Data around s = +2 with a > 0, model rows around s = -2: both move the right way."""
    agent, args = agent_of(beta=100.0, rho_states="model", critic_lr=3e-3)
    batch = batch_of(agent)
    side = torch.where(torch.arange(16) < 8, 2.0, -2.0)[:, None]
    batch = batch._replace(obs=0.1 * batch.obs + side, action=batch.action.abs() * side.sign())
    elsewhere = torch.rand(1, 16, 2) * 2 - 1
    before = agent.critic(batch.obs, batch.action), agent.critic(batch.obs, elsewhere)
    gaps = [update(agent, batch, args, seed)["losses/conservative_gap"] for seed in range(40)]
    after = agent.critic(batch.obs, batch.action), agent.critic(batch.obs, elsewhere)
    assert (after[0] > before[0])[..., :8].all() and (after[1] < before[1])[..., 8:].all()
    assert gaps[-1] < gaps[0] - 1
    # At the data's states alone (mixed), actions that are not stored fall beside those that are.
    agent, args = agent_of(beta=100.0, critic_lr=3e-3, real_fraction=0.95)
    batch = batch._replace(obs=batch.obs.abs(), action=batch.action.abs())
    margin = [agent.critic(batch.obs, batch.action) - agent.critic(batch.obs, -batch.action)]
    for seed in range(40):
        update(agent, batch, args, seed)
    margin += [agent.critic(batch.obs, batch.action) - agent.critic(batch.obs, -batch.action)]
    assert margin[1].mean() > margin[0].mean() + 1


def test_backup_without_entropy_and_nothing_else_moves(monkeypatch):
    """The temperature has no say in the target; a step changes the critics and their Adam only."""
    agent, args = agent_of()
    batch = batch_of(agent)
    hot = copy_of(agent, args)
    with torch.no_grad():
        hot.temperature[0] += 5.0
    pairs = zip(*(gradients(a, batch, args, monkeypatch)[0] for a in (agent, hot)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with monkeypatch.context() as patch:
        seen, target = [], combo.soft_target
        patch.setattr(combo, "soft_target", lambda *a: seen.append(a) or target(*a))
        before = {k: v.clone() for k, v in agent.state_dict().items()}
        update(agent, batch, args)
    assert (seen[0][3] == 0).all()
    moved = {k for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith("critic.")}
    for name in ("actor", "temperature", "model"):
        assert all(s["step"] == 0 for s in agent.optimizers[name].state.values())
    assert all(p.grad is None for n in ("actor", "model") for p in getattr(agent, n).parameters())


def test_beta_zero_is_plain_td(monkeypatch):
    """Bit for bit, with the same generator state; and beta = 1 is not."""
    agent, args = agent_of(beta=0.0, num_seeds=2)
    batch = batch_of(agent)
    grads, logs = gradients(agent, batch, args, monkeypatch)
    torch.manual_seed(7)
    with torch.no_grad():
        q_next = agent.critic_target(batch.next_obs, agent.actor.sample(batch.next_obs)[0])
        target = batch.reward + args.gamma * (1 - batch.terminated) * q_next.amin(1)
    loss = combo.squared_td_error(agent.critic(batch.obs, batch.action), target)
    plain = torch.autograd.grad(loss.sum(), list(agent.critic.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
    assert torch.equal(logs["losses/critic_loss"], loss.detach())
    agent.beta.fill_(1.0)
    other, _ = gradients(agent, batch, args, monkeypatch)
    assert not any(torch.equal(a, b) for a, b in zip(other, plain, strict=True))


# --- Eq. (4), (5) and Proposition 4.1 on random MDPs ---


def tabular(rng, bias=0.0, gamma=None, sharpness=1.0):
    """(m, pi, model, f, d, rho, d_f), [S, A] each; rollouts by pi, so d_f = f d + (1 - f) rho."""
    m = random_mdp(rng, gamma or rng.uniform(0.5, 0.95))
    mu, pi = simplex(rng, 4, 2, sharpness=sharpness), simplex(rng, 4, 2, sharpness=sharpness)
    model = (1 - bias) * m.P + bias * simplex(rng, 4, 2, 4)
    f, d, rho = rng.uniform(0.1, 0.9), occupancy(m, mu), occupancy(m, pi, model)
    return m, pi, model, f, d, rho, f * d + (1 - f) * rho


def fixed_point(m, pi, P, penalty):
    """Q = r - penalty + gamma P^pi Q, [S, A]."""
    matrix = np.eye(pi.size) - m.gamma * transitions(P, pi)
    return np.linalg.solve(matrix, (m.r - penalty).ravel()).reshape(pi.shape)


def at_start(m, pi, Q):
    """E_{mu0, pi}[Q]."""
    return (m.mu0[:, None] * pi * Q).sum()


def test_equation_4_minimises_equation_2():
    """The gradient of Eq. (2) is zero at (4) and it is the minimum, with table Q, exactly."""
    rng = np.random.default_rng(0)
    for beta in (0.0, 0.5, 5.0):
        m, pi, model, f, d, rho, d_f = tabular(rng, bias=0.5)
        old = rng.normal(size=(4, 2))
        backup = m.r + m.gamma * np.einsum("sat,tb,tb->sa", m.P, pi, old)

        def objective(Q, beta=beta, d=d, rho=rho, d_f=d_f, backup=backup):
            return beta * ((rho - d) * Q).sum() + 0.5 * (d_f * (Q - backup) ** 2).sum()

        new = backup - beta * (rho - d) / d_f
        assert abs(beta * (rho - d) + d_f * (new - backup)).max() < 1e-12
        steps = 1e-2 * rng.normal(size=(100, 4, 2))
        assert all(objective(new + step) > objective(new) for step in steps)


def test_equation_4_minimises_the_terms_of_the_code():
    """combo.expectation, combo.squared_td_error and beta have the paper's scales to each other."""
    rng = np.random.default_rng(1)
    pairs = torch.arange(8).repeat(2)  # every (s, a) is among the data and the rollouts
    rows = torch.cat([pairs, torch.tensor(rng.integers(0, 8, 84))])
    rows = rows[torch.tensor([*range(8), *range(16, 60), *range(8, 16), *range(60, 100)])]
    in_data = (torch.arange(100) < 52).double()[None]
    table = torch.tensor(rng.normal(size=8))
    target = torch.tensor(rng.normal(size=8))
    count = [torch.bincount(rows[mask[0] > 0], minlength=8) for mask in (in_data, 1 - in_data)]
    d, rho = (c / c.sum() for c in map(torch.Tensor.double, count))
    d_f = 0.52 * d + 0.48 * rho
    for beta in (0.0, 0.5, 5.0):
        table = (target - beta * (rho - d) / d_f).requires_grad_()
        q = table[rows].expand(1, 2, -1)
        gap = combo.expectation(q, 1 - in_data) - combo.expectation(q, in_data)
        loss = beta * gap.sum(-1) + combo.squared_td_error(q, target[rows][None])
        (grad,) = torch.autograd.grad(loss.sum(), table)
        assert grad.abs().max() < 1e-12


def test_iterating_equation_4_converges():
    """The penalty depends on no Q: (4) contracts by gamma to one fixed point."""
    rng = np.random.default_rng(2)
    m, pi, model, f, d, rho, d_f = tabular(rng, bias=0.5, gamma=0.9)
    penalty = 2.0 * (rho - d) / d_f
    limit, Q = fixed_point(m, pi, model, penalty), rng.normal(size=(4, 2)) * 100
    for _ in range(300):
        after = m.r + m.gamma * np.einsum("sat,tb,tb->sa", model, pi, Q) - penalty
        assert abs(after - limit).max() <= m.gamma * abs(Q - limit).max() + 1e-9
        Q = after
    np.testing.assert_allclose(Q, limit, atol=1e-9)


def test_equation_5():
    """nu(rho, f) = f sum (rho - d)^2 / d_f >= 0; it is zero where rho = d, and grows with f."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        *_, f, d, rho, d_f = tabular(rng, bias=rng.uniform(), sharpness=0.3)
        nu = (rho * (rho - d) / d_f).sum()
        assert nu > 0 and nu == pytest.approx(f * ((rho - d) ** 2 / d_f).sum())
        wider = (f + 0.05) * d + (0.95 - f) * rho
        assert (rho * (rho - d) / wider).sum() > nu
        assert (d * (d - d)).sum() == 0


def test_proposition_4_1_with_the_exact_model():
    """E[Q^] <= E[Q_pi] for every beta >= 0, less by beta nu / (1 - gamma); pointwise it may fail"""
    rng, above = np.random.default_rng(4), 0
    for _ in range(100):
        m, pi, model, f, d, rho, d_f = tabular(rng)
        penalty, truth = (rho - d) / d_f, fixed_point(m, pi, m.P, 0.0)
        nu = (rho * penalty).sum()
        for beta in (0.0, 0.1, 0.5, 1.0, 5.0, 100.0):
            Q = fixed_point(m, pi, model, beta * penalty)
            gap = at_start(m, pi, truth) - at_start(m, pi, Q)
            assert gap >= -1e-9 and gap == pytest.approx(beta * nu / (1 - m.gamma), abs=1e-9)
            above += (Q > truth + 1e-9).any()
    assert above > 0


def test_proposition_4_1_with_a_biased_model():
    """Optimistic models break the bound at beta = 0; from (J^ - J) / nu on it holds."""
    rng, broken = np.random.default_rng(5), 0
    for _ in range(100):
        m, pi, model, f, d, rho, d_f = tabular(rng, bias=0.8)
        penalty = (rho - d) / d_f
        nu, truth = (rho * penalty).sum(), at_start(m, pi, fixed_point(m, pi, m.P, 0.0))
        assert nu > 0
        # The backup of the model alone, and of both kinds of rows of d_f, each with its dynamics.
        mixture = f * d[..., None] * m.P + (1 - f) * rho[..., None] * model
        for P in (model, mixture / d_f[..., None]):
            visits = occupancy(m, pi, P)
            slope = (visits * penalty).sum()
            if P is model:
                assert slope == pytest.approx(nu)
            elif slope < 1e-3:  # one in hundreds: rho is not what the mixture visits
                continue
            bias = ((visits - occupancy(m, pi)) * m.r).sum()
            enough = max(bias / slope, 0.0)
            values = [at_start(m, pi, fixed_point(m, pi, P, beta * penalty)) - truth
                      for beta in (0.0, 0.9 * enough, enough, 2 * enough + 1)]  # fmt: skip
            assert values[2] <= 1e-9 and values[3] < 0
            if bias > 1e-6:
                broken += 1
                assert values[0] > 0 and values[1] > 0
    assert broken > 50


# --- runs: fixtures and helpers ---


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three hundred rows of a random ball in 15 episodes, in D4RL's format."""
    path, rng = tmp_path_factory.mktemp("data") / "data.hdf5", np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(1, 1, (300, 4)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (300, 2)).astype(np.float32)
        file["rewards"] = (rng.random(300) < 0.3).astype(np.float32)
        file["terminals"] = np.zeros(300, bool)
        file["timeouts"] = np.arange(300) % 20 == 19
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def short():
    """Episodes of 15 steps, and no curves: they take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (combo, mopo):
            patch.setitem(module.MAZE_LIMITS, "umaze", 15)
            patch.setattr(module, "plot_curves", lambda run: None)
            module.env_slots.cache_clear()
        yield
    for module in (combo, mopo):
        module.env_slots.cache_clear()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, dataset):
    """tiny(**changes) trains and returns the run folder."""

    def train(**changes):
        place = str(tmp_path_factory.mktemp("runs"))
        args = combo.Args(**(TINY | dict(dataset_path=dataset, run_dir=place) | changes))
        combo.train(args)
        return folder_in(args.run_dir)

    return train


@pytest.fixture(scope="module")
def finished(tiny):
    """A run of two learners that came to its end."""
    return tiny(num_seeds=2)


SELECT = dict(select=True, select_beta=(0.0, 1.0), select_real_fraction=(0.5, 0.8))


@pytest.fixture(scope="module")
def selected(tiny):
    """A run that tried four settings."""
    return tiny(**SELECT)


@pytest.fixture(scope="module")
def mopo_run(tmp_path_factory, dataset):
    """A run of mopo.py, with another split of the data than TINY's."""
    place = str(tmp_path_factory.mktemp("mopo"))
    args = mopo.Args(**MODEL_RUN | dict(dataset_path=dataset, run_dir=place, seed=3))
    mopo.train(dataclasses.replace(args, holdout_size=30, total_iterations=2))
    return folder_in(place)


def folder_in(place):
    (folder,) = Path(place).iterdir()
    return folder


def resume(folder):
    combo.train(dataclasses.replace(combo.load_args(folder), resume=str(folder)))
    return folder


def checkpoint(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def log_rows(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows]


def assert_same(a, b, path="checkpoint"):
    """Bit for bit, all but the times."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a.keys() - {"seconds", "log_bytes"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def assert_same_run(a, b):
    assert_same(checkpoint(a), checkpoint(b))
    assert log_rows(a) == log_rows(b)
    one, two = result(a), result(b)
    for key in one.keys() - {"seconds", "steps_per_second", "args"}:
        assert one[key] == two[key], key
    assert_same(checkpoint(a, "policy.pt"), checkpoint(b, "policy.pt"), "policy")


def assert_learner(one, two, learner, same):
    """Every tensor [L, ...] of a learner that COMBO trains is the same in two runs, or none is."""
    for name, a in checkpoint(one)["agent"].items():
        b = checkpoint(two)["agent"][name]
        if name.split(".")[0] in ("actor", "critic", "critic_target", "temperature", "buffer"):
            assert torch.equal(a[learner], b[learner]) == same, name


# --- --select ---


def test_select_has_one_learner_per_setting_and_one_model():
    """The grid in order, beta and rows per learner, a model of ONE learner that all elites copy."""
    agent, args = agent_of(
        select=True, select_beta=(0.0, 2.0, 5.0), select_real_fraction=(0.25, 0.5)
    )
    grid = [(0.0, 0.25), (0.0, 0.5), (2.0, 0.25), (2.0, 0.5), (5.0, 0.25), (5.0, 0.5)]
    assert combo.settings(args) == grid and agent.learners == args.num_seeds == 6
    assert agent.beta.tolist() == [0.0, 0.0, 2.0, 2.0, 5.0, 5.0]
    assert agent.real_rows.flatten().tolist() == [4, 8] * 3
    assert agent.model.lead == (1, 3) and agent.elites.lead == (6, 2)
    combo.choose_elites(agent, torch.tensor([[3.0, 1.0, 2.0]]), args)
    for elite, member in zip(
        agent.elites.member_parameters(), agent.model.member_parameters(), strict=True
    ):
        assert all(torch.equal(e, member[0, [1, 2]]) for e in elite)
    plain, _ = agent_of(num_seeds=2, beta=3.0)
    assert plain.beta.tolist() == [3.0, 3.0] and plain.model.lead == (2, 3)
    defaults = combo.settings(combo.Args(select=True))
    assert defaults == [(b, f) for b in (0.5, 1.0, 5.0) for f in (0.5, 0.8)]


def test_a_select_run(selected):
    """One model serves all four, each has a buffer of its own, and result.json names the choice."""
    agent, out = checkpoint(selected)["agent"], result(selected)
    assert agent["model.heads.weight"].shape[:2] == (1, 3)
    assert checkpoint(selected, "model.pt")["holdout_loss"].shape == (1, 3)
    for name, value in agent.items():
        if name.startswith("elites.") and "input" not in name:
            assert value.shape[0] == 4 and all(torch.equal(value[0], v) for v in value), name
    assert len(agent["buffer"].flatten(1).unique(dim=0)) == 4
    table = out["selection"]
    assert [(r["beta"], r["real_fraction"]) for r in table] == [
        (0.0, 0.5), (0.0, 0.8), (1.0, 0.5), (1.0, 0.8)
    ]  # fmt: skip
    values = [r["regularizer"] for r in table]
    assert np.isfinite(values).all() and len(set(values)) == 4
    assert out["chosen"] == int(np.argmin(values)) and len(out["final_scores"]) == 4
    assert out["seeds"] == [0, 1, 2, 3] and combo.load_args(selected).num_seeds == 4


@pytest.mark.parametrize("flag, other", [("select_beta", (0.0, 7.0)),
                                         ("select_real_fraction", (0.5, 0.7))])  # fmt: skip
def test_a_setting_reaches_its_own_learners_only(flag, other, tiny, selected):
    """Another second beta (or f) changes the learners that have it, and no bit of the others."""
    changed = tiny(**SELECT | {flag: other})
    having = {"select_beta": (2, 3), "select_real_fraction": (1, 3)}[flag]
    for learner in range(4):
        if learner not in having:
            assert_learner(selected, changed, learner, same=True)
        else:
            for name in ("critic.net.layers.0.weight", "actor.net.layers.0.weight"):
                pair = [checkpoint(f)["agent"][name][learner] for f in (selected, changed)]
                assert not torch.equal(*pair)


def test_choose_setting_takes_the_lowest_without_the_environment(monkeypatch, capsys):
    """The lowest regularizer wins, its neighbours lose, and no environment is made or stepped."""

    def forbidden(*_):
        raise AssertionError("the environment was asked")

    for name in ("run_episodes", "make_env", "env_slots", "evaluate"):
        monkeypatch.setattr(combo, name, forbidden)
    agent, args = agent_of(**SELECT)
    agent.buffer.normal_()
    agent.buffer_rows.fill_(agent.buffer.shape[1])
    data = torch.randn(50, 10)
    real = combo.choose_setting(agent, data, args, None)
    values = [r["regularizer"] for r in real["selection"]]
    assert values[real["chosen"]] == min(values)
    assert combo.choose_setting(agent, data, args, None) == real  # its own seed
    monkeypatch.setattr(combo, "regularizer", lambda *_: torch.tensor([3.0, -1.0, -1.5, 9.0]))
    choice = combo.choose_setting(agent, data, args, None)
    assert choice["chosen"] == 2
    assert choice["selection"][2] == {"beta": 1.0, "real_fraction": 0.5, "regularizer": -1.5}
    lines = [line for line in capsys.readouterr().out.splitlines() if "chosen" in line]
    assert re.search(r"^\s+2\s+1\s+0\.5\s+-1\.500", lines[-1])


class HandCritic(nn.Module):
    """Q_1 = s_0 + a_0 and Q_2 = 2 Q_1."""

    def forward(self, obs, action):
        q = obs[..., 0] + action[..., 0]
        return torch.stack([q, 2 * q], 1)


class HandPolicy(nn.Module):
    """Always 0.5."""

    def sample(self, obs):
        return torch.full((*obs.shape[:2], 2), 0.5), torch.zeros(obs.shape[:2])


def hand_made(**changes):
    """Data with s_0 = 1 and a_0 = 0.25, model rows with s_0 = 5 and a_0 = 0.9."""
    agent, args = agent_of(**changes)
    agent.critic, agent.actor = HandCritic(), HandPolicy()
    agent.buffer[:] = torch.tensor([5.0, 0, 0, 0.9, 0, 0, 0, 0, 0, 0])
    agent.buffer_rows.fill_(agent.buffer.shape[1])
    return agent, torch.tensor([1.0, 0, 0, 0.25, 0, 0, 0, 0, 0, 0]).repeat(20, 1), args


@pytest.mark.parametrize("states, expected", [("mixed", [4.875, 1.875]), ("model", [6.375, 6.375])])
def test_regularizer_by_hand(states, expected):
    """f = 1/4: rho's mean s is 4, so 1.5 (4.5 - 1.25); f = 3/4: 1.5 (2.5 - 1.25); model: s = 5."""
    agent, data, args = hand_made(select=True, select_beta=(1.0,), rho_states=states,
                                  select_real_fraction=(0.25, 0.75))  # fmt: skip
    assert combo.regularizer(agent, data, args).tolist() == pytest.approx(expected)


def test_regularizer_of_large_batches():
    """Batches of more rows than the estimate asks for still give a number."""
    agent, data, args = hand_made(batch_size=10_002, real_fraction=0.5)
    assert combo.regularizer(agent, data, args).tolist() == pytest.approx([3.375])


# --- --probe-uncertainty ---


def probe(folder, **changes):
    """The written numbers, after combo.probe."""
    out = combo.probe(combo.Args(probe_uncertainty=str(folder), **changes))
    written = json.loads((folder / "uncertainty.json").read_text())
    assert written == out
    return {k: np.array(v) for k, v in written.items()}


def test_probe_of_a_linear_gaussian_task(tiny, tmp_path, monkeypatch):
    """The fit's own hold-out rows, the true error, raw units, the least-squares line, a picture."""
    from PIL import Image

    rng = np.random.default_rng(0)
    obs, action = rng.normal(5, 2, (1500, 4)), rng.uniform(-1, 1, (1500, 2))
    scale = 0.4 * np.exp(0.3 * (obs[:, :1] - 5))  # noise that the model can see
    next_obs = obs + np.tile(action, 2) + scale * rng.normal(size=(1500, 4))
    path, splits, split_rows = tmp_path / "linear.hdf5", [], combo.split_rows
    with h5py.File(path, "w") as file:
        for key, x in (("observations", obs), ("actions", action), ("next_observations", next_obs),
                       ("rewards", np.zeros(1500))):  # fmt: skip
            file[key] = x.astype(np.float32)
        file["timeouts"] = np.arange(1500) % 20 == 19
    monkeypatch.setattr(combo, "split_rows", lambda *a: splits.append(split_rows(*a)) or splits[-1])
    changes = dict(model_max_epochs=25, model_patience=20, model_hidden=32)
    folder = tiny(dataset_path=str(path), total_iterations=1, holdout_size=200, **changes)
    plot = probe(folder)
    fit, probed = (held.tolist() for held, _ in splits)
    assert probed == fit and len(set(fit)) == plot["rows"] == 200
    assert not set(fit) & set(splits[0][1].tolist())
    # Rows at time limits are not in the dataset: what is left keeps its order.
    left = np.flatnonzero(np.arange(1500) % 20 != 19)[fit]
    agent = combo.COMBO(combo.load_args(folder), 4, 2, CPU)
    agent.load_state_dict(checkpoint(folder)["agent"] | {"buffer": agent.buffer})
    s, a = (torch.tensor(x[left], dtype=torch.float)[None] for x in (obs, action))
    truth = np.concatenate([np.zeros((200, 1)), (next_obs - obs)[left]], -1)
    error = np.linalg.norm(agent.elites.predict(s, a)[0][0].mean(0).numpy() - truth, axis=-1)
    std = np.linalg.norm(agent.model.predict(s, a)[1][0].numpy(), axis=-1).max(0)
    np.testing.assert_allclose(plot["error"], error, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(plot["uncertainty"], std, rtol=1e-3)
    ratio = std / (2 * scale[left, 0])  # in raw units the norm of the four deviations is 2 scale
    assert 0.8 < np.median(ratio) < 1.5 and np.corrcoef(np.log(std), obs[left, 0])[0, 1] > 0.8
    x, y = plot["uncertainty"], plot["error"]
    slope, intercept = np.polyfit(x, y, 1)
    r2 = np.corrcoef(x, y)[0, 1] ** 2
    assert (plot["slope"], plot["intercept"]) == pytest.approx((slope, intercept), rel=1e-4)
    assert plot["r2"] == pytest.approx(r2, abs=1e-4) and r2 > 0.4 and 0.7 < slope < 2.2
    image = np.asarray(Image.open(folder / "uncertainty.png").convert("RGB"))
    assert image.shape == (480, 720, 3)  # 6 x 4 inches at 120 dpi
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_probe_of_other_runs(selected, finished, tmp_path):
    """A --select run has its one model; a folder without model.pt, or none at all, is refused."""
    assert probe(selected)["rows"] == 40
    bare = tmp_path / "bare"
    shutil.copytree(finished, bare, ignore=shutil.ignore_patterns("model.pt", "uncertainty*"))
    for folder in (bare, tmp_path / "nowhere"):
        with pytest.raises(combo.UserError, match=re.escape(str(folder))):
            combo.probe(combo.Args(probe_uncertainty=str(folder)))
    assert not (bare / "uncertainty.json").exists() and not (tmp_path / "nowhere").exists()


# --- whole runs ---


def test_every_parameter_moved(finished):
    """Fit, rollouts, all updates and the target act on every tensor of both learners."""
    before = combo.COMBO(combo.load_args(finished), 4, 2, CPU).state_dict()
    after = checkpoint(finished)["agent"]
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        if name in ("beta", "real_rows"):
            assert torch.equal(old, new)
        elif name == "buffer":
            assert new.shape == (2, 120, 12) and (new[..., :-1].std((1, 2)) > 0).all()
        elif old.shape[:1] == (2,):
            assert (old[0] != new[0]).any() and (old[1] != new[1]).any(), name
        else:
            assert not torch.equal(old, new), name
    for name, optimizer in checkpoint(finished)["optimizers"].items():
        for state in optimizer["state"].values():
            assert state["step"] > 0 and state["exp_avg_sq"].abs().sum() > 0, name
    rows = log_rows(finished)
    training = [r for r in rows if r["phase"] == "training"]
    assert [r["iteration"] for r in training] == [3, 6, 9, 12]
    assert {"losses/critic_loss", "losses/conservative_gap", "losses/q_values", "losses/entropy",
            "losses/actor_loss", "losses/alpha"} < training[0].keys()  # fmt: skip
    assert "selection" not in result(finished)


def test_seeds(tiny, finished):
    """The same seed gives the same run, another seed another one."""
    assert_same_run(tiny(num_seeds=2), finished)
    assert_learner(tiny(num_seeds=2, seed=1), finished, 0, same=False)


@pytest.mark.parametrize("flag", [dict(rho_states="model"), dict(rollout_actions="uniform"),
                                  dict(beta=2.0), dict(real_fraction=0.8)])  # fmt: skip
def test_flags_of_the_method_matter(flag, tiny, finished):
    """A run with another rho, mu, beta or f ends with other critics."""
    name = "critic.net.layers.0.weight"
    one, two = (checkpoint(f)["agent"][name] for f in (tiny(num_seeds=2, **flag), finished))
    assert not torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])


class Disturbed(combo.COMBO):
    """Learner 1 starts from other weights, everywhere."""

    epochs = 4

    def __init__(self, *args):
        super().__init__(*args)
        with torch.no_grad():
            for p in self.parameters():
                if len(p) == 2:
                    p[1] += 0.3 * torch.randn(
                        p[1].shape, generator=torch.Generator().manual_seed(5)
                    )


class Plain(combo.COMBO):
    epochs = 1


def fake_holdout(agent, inputs, targets):
    """Learner 0 gains in two epochs, learner 1 in `agent.epochs`; at the end the true error."""
    step = next(iter(agent.optimizers["model"].state.values()))["step"].item() % 1e6
    if step == 0:  # restored: the elites are chosen now
        return combo_holdout(agent, inputs, targets)
    epoch = step / 4  # 245 rows in batches of 64
    gains = torch.tensor([[min(epoch, 2)], [min(epoch, agent.epochs)]])
    return 1 / gains * (1 + torch.arange(1.0, 4.0) / 10)


combo_holdout = combo.holdout_error
TWO_STOPS = dict(num_seeds=2, model_patience=1, model_max_epochs=6)


def test_learners_are_isolated_through_a_whole_run(tiny, monkeypatch):
    """Learner 0 is the same whatever learner 1 weighs and whenever its model fit stops."""
    monkeypatch.setattr(combo, "holdout_error", fake_holdout)
    runs = []
    for kind in (Plain, Disturbed):
        monkeypatch.setattr(combo, "COMBO", kind)
        runs.append(tiny(**TWO_STOPS))
    fits = [sum(r["phase"] == "model fit" for r in log_rows(f)) for f in runs]
    assert fits == [3, 5]  # epochs until both learners had stopped
    one, two = (checkpoint(f) for f in runs)
    differ = 0
    for name, a in one["agent"].items():
        b = two["agent"][name]
        if a.shape[:1] == (2,) and name not in ("beta", "real_rows"):
            assert torch.equal(a[0], b[0]), name
            differ += not torch.equal(a[1], b[1])
    assert differ > 30
    for name, optimizer in one["optimizers"].items():
        for i, state in optimizer["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                other = two["optimizers"][name]["state"][i][key]
                assert torch.equal(state[key][0], other[0]), (name, i)
    assert result(runs[0])["final_scores"][0] == result(runs[1])["final_scores"][0]


class Killed(BaseException):
    """What SIGKILL would do at this point of the program, in this process."""


def killed_at(tiny, monkeypatch, row, **changes):
    """A run that dies before it writes log row `row`. -> its folder"""
    log, count = combo.Run.log, iter(range(10_000))

    def dying(self, *args):
        if next(count) == row:
            raise Killed
        log(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(combo.Run, "log", dying)
        tiny(**changes)
    return folder_in(changes["run_dir"])


@pytest.mark.parametrize("mode", ["seeds", "select"])
def test_resume_is_exact(mode, tiny, tmp_path, monkeypatch):
    """k + k = 2k after cuts inside the model fit, right after it, in the loop and at the end."""
    changes = dict(checkpoint_every=2) | (SELECT if mode == "select" else TWO_STOPS)
    if mode == "seeds":  # a learner is set aside when the fit is cut
        monkeypatch.setattr(combo, "holdout_error", fake_holdout)
        monkeypatch.setattr(combo, "COMBO", Disturbed)
    whole, seen = tiny(**changes), set()
    phases = [r["phase"] for r in log_rows(whole)]
    fits = phases.count("model fit")
    for row in (fits - 1, fits, fits + 2, len(phases) - 1):
        place = str(tmp_path / f"cut{row}")
        folder = killed_at(tiny, monkeypatch, row, run_dir=place, **changes)
        saved = checkpoint(folder)
        fit = saved["progress"].get("fit")
        if fit:
            seen |= {"fit", "frozen"} if fit["frozen"] else {"fit"}
        elif 0 < saved["iteration"] < 12:
            seen.add("loop")
        assert_same_run(resume(folder), whole)
    assert seen >= {"fit", "loop"} and ("frozen" in seen) == (mode == "seeds")


def test_dynamics_from_a_run_of_mopo(tiny, mopo_run, monkeypatch):
    """The model and its elites are taken over, nothing is fitted; the probe uses mopo's split."""
    folder = tiny(dynamics_from=str(mopo_run))
    agent, saved = checkpoint(folder)["agent"], checkpoint(mopo_run, "model.pt")
    for name, value in saved["model"].items():
        assert torch.equal(agent[f"model.{name}"], value), name
    best = saved["holdout_loss"].argsort(-1)[0, :2]
    weight = saved["model"]["heads.weight"][:, best]
    assert torch.equal(agent["elites.heads.weight"], weight)
    assert {r["phase"] for r in log_rows(folder)} == {"training", "evaluation"}
    assert not (folder / "model.pt").exists()
    splits, split_rows = [], combo.split_rows
    monkeypatch.setattr(combo, "split_rows", lambda *a: splits.append(split_rows(*a)) or splits[-1])
    assert probe(folder)["rows"] == 30 and (folder / "uncertainty.png").exists()
    assert torch.equal(splits[0][0], mopo.split_rows(285, 3, 30, CPU)[0])
    assert not (mopo_run / "uncertainty.json").exists()
    everyone = tiny(dynamics_from=str(mopo_run), **SELECT)
    assert torch.equal(
        checkpoint(everyone)["agent"]["elites.heads.weight"], weight.repeat(4, 1, 1, 1)
    )


def test_dynamics_from_runs_of_other_sizes(tiny, finished, selected, tmp_path):
    """One model serves several learners, of two the first is taken, two do not serve three."""
    theirs = checkpoint(selected, "model.pt")["model"]["heads.weight"]
    agent = checkpoint(tiny(dynamics_from=str(selected), num_seeds=2))["agent"]
    assert torch.equal(agent["model.heads.weight"], theirs.repeat(2, 1, 1, 1))
    assert torch.equal(*agent["elites.heads.weight"])
    theirs = checkpoint(finished, "model.pt")["model"]["heads.weight"]
    agent = checkpoint(tiny(dynamics_from=str(finished), **SELECT))["agent"]
    assert torch.equal(agent["model.heads.weight"], theirs[:1])
    with pytest.raises(combo.UserError, match="holds 2 models, and 3 are asked for"):
        tiny(dynamics_from=str(finished), num_seeds=3, run_dir=str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []


def test_all_rows_may_be_data(tiny):
    """f = 1 with mixed rho: no model row counts, and the run ends with finite numbers."""
    folder = tiny(real_fraction=1.0, num_seeds=1)
    assert checkpoint(folder)["agent"]["real_rows"].tolist() == [[16]]
    assert np.isfinite(result(folder)["final_mean"]).all()


# --- settings and mistakes ---

#                        beta, h, f, critic lr, actor lr, states of rho, rollout actions
FACTS = {
    "halfcheetah-random": (0.5, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "halfcheetah-medium": (0.5, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "halfcheetah-medium-replay": (0.5, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "halfcheetah-medium-expert": (0.5, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "hopper-random": (1.0, 5, 0.5, 3e-4, 1e-4, "model", "uniform"),
    "hopper-medium": (5.0, 5, 0.5, 3e-4, 1e-4, "model", "uniform"),
    "hopper-medium-replay": (1.0, 5, 0.5, 3e-4, 1e-4, "model", "uniform"),
    "hopper-medium-expert": (5.0, 5, 0.5, 3e-4, 1e-4, "model", "uniform"),
    "walker2d-random": (0.5, 1, 0.5, 1e-4, 1e-5, "mixed", "policy"),
    "walker2d-medium": (5.0, 1, 0.8, 1e-4, 1e-5, "mixed", "policy"),
    "walker2d-medium-replay": (0.5, 1, 0.5, 1e-4, 1e-5, "mixed", "policy"),
    "walker2d-medium-expert": (5.0, 1, 0.8, 1e-4, 1e-5, "mixed", "policy"),
}
OOD = {
    "halfcheetah-jump-v0": (1.0, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "ant-angle-v0": (1.0, 25, 0.5, 3e-4, 1e-4, "mixed", "uniform"),
}


def test_settings_of_the_paper():
    """24 rows and two of other tasks with the numbers of facts.md 4.2, as runs have them."""
    assert combo.PAPER.keys() == {f"{k}-{v}" for k in FACTS for v in ("v0", "v2")} | OOD.keys()
    for env_id, row in combo.PAPER.items():
        a = combo.Args(env_id=env_id, **row)
        got = (a.beta, a.horizon, a.real_fraction, a.critic_lr, a.actor_lr, a.rho_states,
               a.rollout_actions)  # fmt: skip
        assert got == (OOD.get(env_id) or FACTS[env_id.rsplit("-", 1)[0]]), env_id
    a = combo.parse_args(["--env-id", "walker2d-medium-v0", "--beta", "2"])
    assert (a.beta, a.horizon, a.real_fraction, a.critic_lr) == (2.0, 1, 0.8, 1e-4)
    assert (a.hidden, a.batch_size, a.num_actions) == ((256, 256, 256), 256, 10)
    assert (a.select_beta, a.select_real_fraction) == ((0.5, 1.0, 5.0), (0.5, 0.8))


BAD = [
    ("--beta -1", "--beta is -1.0"),
    ("--beta nan", "--beta is nan"),
    ("--num-actions 0", "--num-actions is 0"),
    ("--real-fraction 1 --rho-states model", "needs model rows"),
    ("--real-fraction 1.5", "--real-fraction is 1.5"),
    ("--real-fraction 0.05", "a batch needs a real row"),
    ("--select --select-real-fraction 0.5 0.05", "a batch needs a real row"),
    ("--select --select-real-fraction 0.5 1 --rho-states model", "needs model rows"),
    ("--select --num-seeds 2", "leave --num-seeds at 1"),
    ("--select --select-beta", "--select needs a value in --select-beta"),
    ("--select --select-real-fraction", "--select needs a value"),
    ("--select --select-beta 1 -1", "--select-beta is -1.0"),
    ("--dynamics-from nowhere", "nowhere/model.pt does not exist"),
    ("--resume x --evaluate x", "give one of"),
    ("--resume x --probe-uncertainty x", "give one of"),
    ("--evaluate x --probe-uncertainty x", "give one of"),
    ("--probe-uncertainty x", "x is not a run folder"),
]


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_bad_command_lines(line, words, dataset, tmp_path, monkeypatch, capsys):
    """One sentence on stderr, status 2, and nothing is made."""
    small = f"--env-id {ENV} --dataset-path {dataset} --batch-size 16 --run-dir {tmp_path}/runs"
    small += " --total-iterations 1 --model-max-epochs 1 --rollout-starts 9 --final-episodes 1"
    argv = line.split() if " x" in line else small.split() + line.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["combo.py", *argv])
    with pytest.raises(SystemExit) as stop:
        combo.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("combo.py: ") and error.count("\n") == 1
    assert words in error and list(tmp_path.iterdir()) == []
