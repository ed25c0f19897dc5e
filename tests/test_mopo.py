"""MOPO: its equations by hand, its theory on tabular MDPs, and tiny whole runs."""

import dataclasses
import json
import math
import os
import signal
import sys
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
from test_runs import assert_same, assert_same_run, checkpoint, flags, folder_in, log_rows
from torch import distributions as dist
from torch import nn

import ampl
import mopo

CPU = torch.device("cpu")
LN2 = 0.6931472


def small(**changes) -> mopo.Args:
    """Arguments small enough for a test."""
    sizes = dict(
        hidden=(8, 8), batch_size=16, real_fraction=0.25, rollout_starts=20, rollout_retain=2,
        horizon=3, ensemble_size=3, num_elites=2, model_hidden=8, model_batch_size=16,
        holdout_size=10, cuda=False,
    )  # fmt: skip
    return mopo.Args(**(sizes | changes))


def random_data(rows: int, obs_dim: int = 3, action_dim: int = 2) -> torch.Tensor:
    """Rows of Batch's fields [rows, C], rewards in [0, 1]; no terminals."""
    g = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, rows, obs_dim, generator=g)
    action = torch.rand(rows, action_dim, generator=g) * 1.8 - 0.9
    reward = torch.rand(rows, 1, generator=g)
    return torch.cat([obs, action, reward, next_obs, torch.zeros(rows, 1)], -1)


def dataset_of(data: torch.Tensor) -> SimpleNamespace:
    """What fit_model reads of a Dataset."""
    return SimpleNamespace(has_next=torch.ones(len(data), dtype=torch.bool))


class StubRun:
    """Takes the place of the run folder."""

    def __init__(self):
        self.progress, self.logs = {}, []

    def after_steps(self, *logged):
        self.logs.append(logged)


def parameters_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def constant_heads(model: mopo.DynamicsEnsemble, mean: list, log_var: list) -> None:
    """Member m predicts mean[m] and (before its soft bounds) log_var[m] in all entries."""
    nn.init.zeros_(model.heads.weight)
    for m, values in enumerate(zip(mean, log_var, strict=True)):
        for half, value in zip(model.heads.bias.data[:, m].chunk(2, -1), values, strict=True):
            half.copy_(torch.as_tensor(value, dtype=torch.float).expand_as(half))


# --- the equations ---

STD = [[[[12.0, 3.0, 4.0], [0.0, 0.0, 1.0]], [[0.0, 8.0, 6.0], [2.0, 3.0, 6.0]]]]  # [1, 2, 2, 3]
# Next states (0, 0), (6, 0), (0, 3) around (2, 1), and rewards that must not matter.
MEAN = [[[[0.0, 0.0, 0.0]], [[700.0, 6.0, 0.0]], [[-50.0, 0.0, 3.0]]]]  # [1, 3, 1, 3]
Q = [[[1.0, 5.0], [3.0, 2.0]]]  # [1, 2, 2]
EQUATIONS = [
    # sqrt(144 + 9 + 16) = 13 over 10; sqrt(4 + 9 + 36) = 7 over 1.
    (mopo.largest_std, (STD,), [[13.0, 7.0]]),
    (mopo.largest_std, (STD + [[[[0.5] * 3] * 2] * 2],), [[13.0, 7.0], [0.8660254] * 2]),
    (mopo.largest_disagreement, (MEAN,), [[4.1231056]]),  # sqrt(4^2 + 1)
    (mopo.penalised_reward, ([[1.0, -1.0]], [[2.0, 0.5]], 1.5), [[-2.0, -1.75]]),
    # 1 + 0.9 (min(1, 3) + 0.5); at the terminal neither Q nor the entropy.
    (mopo.soft_target, ([[1.0, 1.0]], [[0.0, 1.0]], Q, [[0.5, 9.0]], 0.9), [[2.35, 1.0]]),
    # Half of (1 + 1) / 2 + (1 + 4) / 2.
    (mopo.squared_td_error, (Q, [[2.0, 4.0]]), [1.75]),
    # ((0.2 * 0.5 - 1) + (0.2 * -1 - 2)) / 2
    (mopo.soft_policy_loss, (Q, [[0.5, -1.0]], [0.2]), [-1.55]),
    # -0.5 ((1 + 3) / 2 - 3)
    (mopo.temperature_loss, ([0.5], [[1.0, 3.0]], -3.0), [0.5]),
    # Row 0: (1 + (4 / 4 + 2 ln 2)) / 2 = 1.6931472. Row 1: 0.
    (
        mopo.gaussian_nll,
        ([[[[1.0, 2.0], [0.0, 0.0]]]], [[[[0.0, LN2], [0.0, 0.0]]]], torch.zeros(1, 1, 2, 2)),
        [[0.8465736]],
    ),
]


@pytest.mark.parametrize("function, inputs, expected", EQUATIONS)
def test_equation(function, inputs, expected):
    """Each equation of section 3 gives the number worked out by hand."""
    inputs = [x if isinstance(x, float) else torch.as_tensor(x) for x in inputs]
    torch.testing.assert_close(function(*inputs), torch.tensor(expected))


def test_penalty_is_in_the_units_of_the_targets():
    """Rewards and steps in units ten times finer make the penalty ten times larger."""
    torch.manual_seed(0)
    model = mopo.DynamicsEnsemble(1, 3, 3, 2, 8)
    model.input_mean.fill_(0.3), model.input_std.fill_(4.0)
    obs, action = torch.randn(1, 50, 3), torch.rand(1, 50, 2)
    mean, std = model.predict(obs, action)
    with torch.no_grad():  # the Gaussians of 10 y
        for p in (model.heads.weight, model.heads.bias):
            p[..., :4] *= 10
        for p in (model.heads.bias[..., 4:], *model.bounds()):
            p += 2 * math.log(10)
    scaled = model.predict(obs, action)
    for u, by in ((mopo.largest_std, std), (mopo.largest_disagreement, mean)):
        now = u(scaled[by is std])
        assert u(by).std() > 0
        torch.testing.assert_close(now, 10 * u(by), rtol=1e-4, atol=0)


def test_policy_density():
    """The log-density of a squashed sample is that of torch's TanhTransform; it never overflows."""
    torch.manual_seed(0)
    policy = mopo.GaussianPolicy(2, 3, 4, small()).double()
    policy.net.layers[-1].weight.data *= 0.3
    obs = torch.randn(2, 500, 3, dtype=torch.double)
    mean, log_std = policy(obs)
    action, log_prob = policy.sample(obs)
    base = dist.Normal(mean, log_std.exp())
    truth = dist.TransformedDistribution(base, dist.TanhTransform()).log_prob(action).sum(-1)
    torch.testing.assert_close(log_prob, truth)
    z = (action.atanh() - mean) / log_std.exp()
    assert z.mean().abs() < 0.06 and z.std().item() == pytest.approx(1, abs=0.05)
    policy.float().net.layers[-1].bias.data[..., :4] = 200.0  # tanh rounds to 1
    action, log_prob = policy.sample(obs.float())
    assert (action == 1).all() and log_prob.isfinite().all() and (log_prob > 500).all()


@pytest.mark.parametrize("raw, expected", [(-100.0, -20.0), (100.0, 2.0), (-7.0, -7.0)])
def test_log_std_is_clipped(raw, expected):
    """The policy's log_std stays within [-20, 2], the mean is free."""
    policy = mopo.GaussianPolicy(1, 3, 2, small())
    nn.init.zeros_(policy.net.layers[-1].weight)
    policy.net.layers[-1].bias.data.fill_(raw)
    mean, log_std = policy(torch.randn(1, 4, 3))
    assert (mean == raw).all() and (log_std == expected).all()


def test_initial_weights():
    """Policy and critics: Glorot-uniform; model: normal of 1 / (2 sqrt(fan_in)) cut at two std."""
    torch.manual_seed(0)
    for layer in mopo.ReluNet((2, 2), 40, (60, 80), 20).layers:
        n_in, n_out = layer.weight.shape[-2:]
        bound = math.sqrt(6 / (n_in + n_out))
        assert 0.99 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert not torch.equal(layer.weight[0, 0], layer.weight[0, 1])
    model = mopo.DynamicsEnsemble(1, 7, 11, 3, 100)
    assert [tuple(x.weight.shape[-2:]) for x in [*model.trunk, model.heads]] == [
        (14, 100), (100, 100), (100, 100), (100, 100), (100, 24)
    ]  # fmt: skip
    for layer in [*model.trunk, model.heads]:
        std = 1 / (2 * math.sqrt(layer.weight.shape[-2]))
        assert 1.9 * std < layer.weight.abs().max() <= 2 * std and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(0.8796 * std, rel=0.03)
        assert not torch.equal(layer.weight[0, 0], layer.weight[0, 1])


def test_log_variance_bounds():
    """The soft bounds start at 0.5 and -10 of the log-variance, so 0.25 and -5 of log_std."""
    model = mopo.DynamicsEnsemble(1, 3, 3, 2, 8)
    # -3: 0.5 - softplus(3.5) = -3.0297505, then -10 + softplus(6.9702495) = -3.0288118.
    constant_heads(model, [1.0, 2.0, 3.0], [-100.0, 100.0, -3.0])
    mean, log_std = model(torch.randn(1, 3, 5, 5))
    for m, expected in enumerate([-5.0, 0.25, -1.5144059]):
        torch.testing.assert_close(log_std[0, m], torch.full((5, 4), expected), atol=2e-5, rtol=0)
        assert (mean[0, m] == m + 1).all()


def test_weight_decay():
    """Coupled L2 with the authors' constants on the weights; none on the biases and bounds."""
    agent = mopo.MOPO(small(), 3, 2, CPU)
    decay = {
        id(p): group["weight_decay"]
        for group in agent.optimizers["model"].param_groups
        for p in group["params"]
    }
    layers = [*agent.model.trunk, agent.model.heads]
    assert [decay[id(x.weight)] for x in layers] == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    assert [decay[id(p)] for p in agent.model.bounds()] == [0, 0]
    assert type(agent.optimizers["model"]) is torch.optim.Adam  # not AdamW
    assert [decay[id(x.bias)] for x in layers] == [0] * 5  # facts 3.2: on weights only


# --- one iteration ---


def mixed_agent(args: mopo.Args, data: torch.Tensor) -> mopo.MOPO:
    """An agent whose buffer is filled with rollouts."""
    agent = mopo.MOPO(args, 3, 2, CPU)
    torch.manual_seed(1)
    mopo.imagine(agent, data, never_ends(3), args)
    return agent


def never_ends(obs_dim: int) -> mopo.RolloutEnd:
    known, _ = mopo.known_termination("halfcheetah-medium-v2")
    return mopo.RolloutEnd(known, torch.full((obs_dim,), 1e9))


def test_critic_update():
    """Regression on r + gamma (min Q' - alpha log pi) of the target critic and the fresh action."""
    args, data = small(), random_data(40)
    data[:20, -1] = 1.0
    agent, seen = mixed_agent(args, data), []
    batch = agent.split(data[None])
    agent.actor.sample = lambda obs: (obs[..., :2] / 9, torch.full((1, 40), 2.0))
    agent.temperature[0].data.fill_(-LN2)  # alpha 0.5, so the entropy term is -1

    def q_next(obs, action):
        seen.extend((obs, action))
        return torch.tensor([50.0, 60.0]).view(1, 2, 1).expand(1, 2, 40)

    agent.critic_target.forward = q_next
    for p in agent.critic.parameters():
        nn.init.zeros_(p)
    logs = mopo.update_soft_critic(agent, batch, args)
    assert torch.equal(seen[0], batch.next_obs) and torch.equal(
        seen[1], batch.next_obs[..., :2] / 9
    )
    target = batch.reward + 0.99 * 49 * (1 - batch.terminated)  # Q = 0: two critics, half each
    torch.testing.assert_close(logs["losses/critic_loss"], target.square().mean(-1))


def test_policy_update():
    """The policy climbs min Q; alpha rises while the entropy is below its target, else falls."""
    data = random_data(40)
    for target_entropy, rises in ((50.0, True), (-50.0, False)):
        args = small(actor_lr=1e-2, alpha_lr=1e-2, target_entropy=target_entropy)
        agent = mopo.MOPO(args, 3, 2, CPU)
        agent.temperature[0].data.fill_(-5.0)
        agent.critic.forward = lambda obs, a: 50 * torch.stack([a.sum(-1), a.sum(-1) + 9], 1)
        critic = parameters_of(agent.critic)
        for _ in range(30):
            mopo.update_policy(agent, agent.split(data[None]), args)
        assert (agent.temperature[0] > -5.0).all() == rises
        assert torch.tanh(agent.actor(data[None, :, :3])[0]).mean() > 0.8
        assert all(map(torch.equal, critic, agent.critic.parameters()))
    assert mopo.MOPO(args, 3, 2, CPU).temperature[0].exp() == 1


def test_sac_step(monkeypatch):
    """Critics, policy, alpha move, the model does not; the target critic follows at rate tau."""
    args, data = small(tau=0.1, num_seeds=2), random_data(40)
    agent = mixed_agent(args, data)
    names = ("actor", "critic", "temperature", "critic_target", "model", "elites")
    before = {n: parameters_of(getattr(agent, n)) for n in names}
    logs = mopo.sac_step(agent, data, args)
    for name in names:
        pairs = zip(before[name], getattr(agent, name).parameters(), strict=True)
        moved = [not torch.equal(a[i], b[i]) for a, b in pairs for i in range(2)]
        assert all(moved) if name not in ("model", "elites") else not any(moved), name
    parts = before["critic_target"], agent.critic.parameters(), agent.critic_target.parameters()
    for old, critic, slow in zip(*parts, strict=True):
        torch.testing.assert_close(slow, old + 0.1 * (critic - old))
    assert all(v.shape == (2,) for v in logs.values())


def test_twelve_real_rows_of_256(monkeypatch):
    """A batch holds int(0.05 * 256) = 12 rows of the data, and 244 of the learner's own buffer."""
    args, seen = small(batch_size=256, real_fraction=mopo.Args().real_fraction, num_seeds=2), []
    data = random_data(40)
    agent = mixed_agent(args, data)
    data[:, 5] = -7.0
    agent.buffer[0, ..., 5], agent.buffer[1, ..., 5] = 1.0, 2.0
    update = mopo.update_soft_critic
    monkeypatch.setattr(
        mopo, "update_soft_critic", lambda a, b, c: seen.append(b) or update(a, b, c)
    )
    mopo.sac_step(agent, data, args)
    reward = seen[0].reward
    assert (reward[:, :12] == -7).all()
    assert (reward[0, 12:] == 1).all() and (reward[1, 12:] == 2).all() and reward.shape == (2, 256)


# --- rollouts ---


def test_uncertainty_asks_all_members():
    """The least trusted of the seven, no elite, decides u."""
    agent = mopo.MOPO(
        mopo.Args(hidden=(8,), model_hidden=8, rollout_starts=2, cuda=False), 3, 2, CPU
    )
    constant_heads(agent.model, [[0, m, 0, 0] for m in range(7)], [-40.0] * 6 + [40.0])
    mopo.choose_elites(agent, torch.arange(7.0)[None], mopo.Args())
    assert agent.elites.heads.bias[0, :, 0, 1].tolist() == [0, 1, 2, 3, 4]
    obs, action = torch.randn(1, 5, 3), torch.rand(1, 5, 2)
    # Four entries of deviation exp(0.25); next states 0 ... 6 around 3.
    for penalty, expected in (("std", 2 * math.exp(0.25)), ("disagreement", 3.0)):
        u = mopo.uncertainty(agent, obs, action, mopo.Args(penalty=penalty))
        torch.testing.assert_close(u, torch.full((1, 5), expected), atol=1e-3, rtol=0)


def counting_agent(args: mopo.Args) -> tuple[mopo.MOPO, torch.Tensor, mopo.RolloutEnd]:
    """Stored states are 100, 200, ...; the model adds 1 per step; x02 is terminal."""
    agent = mopo.MOPO(args, 1, 2, CPU)
    agent.actor.forward = lambda obs: (torch.zeros(*obs.shape[:-1], 2),) * 2
    agent.elites.sample = lambda obs, action: (obs[..., 0] / 1000, obs + 1)

    def predict(obs, action):  # largest norm: member 2, 5 * 3 * (obs / 1000 + action_0 ** 2)
        members = torch.arange(1.0, 4.0).view(1, 3, 1, 1)
        scale = obs / 1000 + action[..., :1].square()
        return None, members * (scale * torch.tensor([3.0, 4.0])).unsqueeze(1)

    agent.model.predict = predict
    data = torch.zeros(50, 6)
    data[:, 0] = 100.0 * torch.arange(1, 51)
    known = lambda s: s[..., 0] % 100 == 2  # noqa: E731
    return agent, data, mopo.RolloutEnd(known, torch.tensor([1e9]))


@pytest.mark.parametrize("penalty_coef", [0.0, 2.0])
def test_imagined_rewards_are_penalised(penalty_coef):
    """The buffer holds r - lambda u(s, a) of its own row; the logs hold the means of r and u."""
    args = small(penalty_coef=penalty_coef)
    agent, data, end = counting_agent(args)
    logs = mopo.imagine(agent, data, end, args)
    rows = agent.split(agent.buffer[:, :60])
    u = 15 * (rows.obs[..., 0] / 1000 + rows.action[..., 0].square())
    torch.testing.assert_close(rows.reward, rows.obs[..., 0] / 1000 - penalty_coef * u)
    assert u.std() > 1
    torch.testing.assert_close(logs["rollout/reward"], (rows.obs[..., 0] / 1000).mean(-1))
    expected = u.mean(-1) if penalty_coef else torch.zeros(1)
    torch.testing.assert_close(logs["rollout/penalty"], expected)
    torch.testing.assert_close(logs["rollout/terminated_frac"], rows.terminated.mean(-1))


def test_rollouts_end_and_restart():
    """The terminal row is kept, its slot goes on from a stored state; starts x horizon rows."""
    args = small(horizon=5, rollout_starts=7)
    agent, data, end = counting_agent(args)
    mopo.imagine(agent, data, end, args)
    assert agent.buffer_rows == 35 and agent.buffer.shape[1] == 2 * 35  # rollout_retain refreshes
    rows = agent.split(agent.buffer[:, :35].view(1, 5, 7, 6))  # [1, step, slot]
    obs, next_obs = rows.obs[0, ..., 0], rows.next_obs[0, ..., 0]
    assert torch.equal(next_obs, obs + 1)
    assert torch.equal(rows.terminated[0], (next_obs % 100 == 2).float())
    assert (obs % 100).tolist() == [[0.0] * 7, [1.0] * 7, [0.0] * 7, [1.0] * 7, [0.0] * 7]
    assert torch.equal(obs[1], obs[0] + 1) and torch.equal(obs[3], obs[2] + 1)
    assert set(obs[2].tolist()) <= set(data[:, 0].tolist())
    assert not torch.equal(obs[2], obs[0]), "restarts must be drawn anew"


@pytest.mark.parametrize("kind", ["policy", "uniform"])
def test_rollout_actions(kind):
    """Every row has its own action: of the policy, or uniform in [-1, 1] whatever the policy is."""
    args = small(horizon=2, rollout_starts=600, rollout_actions=kind)  # more than one chunk
    agent, data, end = counting_agent(args)
    agent.actor.forward = lambda obs: (torch.full((*obs.shape[:-1], 2), 0.5),) * 2
    mopo.imagine(agent, data, end, args)
    assert agent.buffer_rows == 1200
    action = agent.split(agent.buffer[:, :1200]).action[0]
    assert len(action.unique(dim=0)) == 1200 and action.abs().max() <= 1
    assert (action.mean().abs() < 0.05) == (kind == "uniform")
    if kind == "uniform":
        assert action.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.02)


def test_a_diverged_rollout_ends():
    """NaN, infinity or a state outside twice the data's range ends a rollout, and is bounded."""
    args = small(horizon=2, rollout_starts=5, penalty_coef=0.0)
    agent = mopo.MOPO(args, 2, 1, CPU)
    data = torch.zeros(30, 2 + 1 + 1 + 2 + 1)
    data[:, 0] = 60.0
    states = torch.tensor([0, 1, 2, 3, 4], dtype=torch.float)
    states = torch.stack([states, torch.tensor([99.0, math.nan, math.inf, -1e30, 101.0])], -1)
    reward = torch.tensor([[3.0, math.nan, 3.0, 3.0, 3.0]])
    agent.elites.sample = lambda obs, action: (reward, states[None])
    stored = data[:, :2], data[:, 4:6]
    dataset = SimpleNamespace(obs=stored[0] * torch.tensor([-1.0, 1.0]), next_obs=stored[1])
    end = mopo.rollout_end(dataset, mopo.Args(env_id="halfcheetah-medium-v2"), CPU)
    assert end.obs_limit.tolist() == [120.0, 100.0]  # twice 60; at least 100
    mopo.imagine(agent, data, end, args)
    rows = agent.split(agent.buffer[0, :10])
    assert rows.terminated.tolist() == [0, 1, 1, 1, 1] * 2 and agent.buffer.isfinite().all()
    assert rows.next_obs[:5, 1].tolist() == [99, 0, 100, -100, 100]
    assert rows.reward.tolist() == [3, 0, 3, 3, 3] * 2
    assert rows.obs[5:].tolist() == [[0, 99]] + [[60, 0]] * 4


# --- the model fit ---


def test_epochs_over_bootstrap_samples(monkeypatch):
    """Each member has a bootstrap of the train rows, seen once per epoch in a new order."""
    args, rows, held = small(model_max_epochs=3, num_seeds=2), 90, 10
    data = random_data(rows)
    data[:, 5] = torch.arange(rows)  # the reward names the row, in raw units
    agent, seen, nll = mopo.MOPO(args, 3, 2, CPU), [], mopo.gaussian_nll

    def noted(mean, log_std, target):
        seen.append(target[..., 0].long())
        return nll(mean, log_std, target)

    monkeypatch.setattr(mopo, "gaussian_nll", noted)
    mopo.fit_model(agent, dataset_of(data), data, args, StubRun())
    held_rows, train_rows = mopo.split_rows(rows, args.seed, args.holdout_size, CPU)
    assert len(held_rows) == held and len(seen) == 3 * 5
    x = data[train_rows, :5]
    torch.testing.assert_close(agent.model.input_mean, x.mean(0))
    torch.testing.assert_close(agent.model.input_std, x.std(0, correction=0))
    epochs = torch.cat(seen, -1).view(2, 3, 3, 80)  # learner, member, epoch
    counts = nn.functional.one_hot(epochs, rows).sum(-2)
    assert (counts == counts[:, :, :1]).all(), "the same bootstrap in all epochs"
    assert not counts[..., held_rows].any()
    assert 0.5 < (counts[..., train_rows] > 0).float().mean() < 0.75  # 1 - 1 / e, not a permutation
    assert len(counts[:, :, 0].flatten(0, 1).unique(dim=0)) == 6
    assert len(epochs.flatten(0, 2).unique(dim=0)) == 18
    seen.clear()
    args = small(model_max_epochs=2, model_batch_size=32)  # 80 rows: the third batch is half new
    mopo.fit_model(mopo.MOPO(args, 3, 2, CPU), dataset_of(data), data, args, StubRun())
    order = torch.cat(seen, -1).view(3, 2, 96)
    assert torch.equal(order[..., 80:], order[..., :16])
    assert torch.equal(*order[..., :80].sort(-1)[0].unbind(1)), "both epochs see every row once"


@pytest.mark.parametrize("gain, epochs", [(0.02, 10), (0.005, 7)])
def test_early_stop_and_elites(gain, epochs, monkeypatch):
    """Six idle epochs end a fit, a gain counts from 1 %; elites have the lowest last MSE."""
    args, data, judge = small(), random_data(60), mopo.judge_epoch
    assert args.model_patience == 6
    agent, run = mopo.MOPO(args, 3, 2, CPU), StubRun()

    def error(agent, inputs, targets):
        fit = run.progress["fit"]
        if fit["stopped"].all():
            return torch.tensor([[0.3, 0.1, 0.2]])
        return torch.tensor([[1.0, 1.0, 1.0 - gain * (fit["epoch"] >= 3)]])

    def marked(agent, fit, loss, args):
        agent.model.heads.bias.data.fill_(float(fit["epoch"]))
        judge(agent, fit, loss, args)

    monkeypatch.setattr(mopo, "holdout_error", error)
    monkeypatch.setattr(mopo, "judge_epoch", marked)
    mopo.fit_model(agent, dataset_of(data), data, args, run)
    assert run.progress["fit"]["epoch"] == len(run.logs) == epochs
    best = [0.0, 0.0, 3.0 if gain > 0.01 else 0.0]  # members return to their best epoch
    assert agent.model.heads.bias[0, :, 0, 0].tolist() == best
    for elite, member in zip(
        agent.elites.member_parameters(), agent.model.member_parameters(), strict=True
    ):
        assert torch.equal(elite, member[:, [1, 2]])
    assert torch.equal(agent.elites.input_std, agent.model.input_std)


def test_holdout_error_is_the_mean_squared_error():
    """Not the likelihood: predicted deviations do not enter."""
    agent = mopo.MOPO(small(), 3, 2, CPU)
    constant_heads(agent.model, [0.0, 1.0, 2.0], [-40.0, 0.0, 40.0])
    error = mopo.holdout_error(agent, torch.randn(5, 5), torch.full((5, 4), 3.0))
    torch.testing.assert_close(error, torch.tensor([[9.0, 4.0, 1.0]]))


def test_ensemble_recovers_a_linear_gaussian_system():
    """A short fit finds, in raw units, delta = 0.6 a + noise of deviation 0.2 exp(a), and so u.

    Tolerances: 0.1 on the mean (its range is 1.2), 30 % on the deviation and on u. Targets scaled
    to deviation one, as they would be in other code, are off by a factor of 2.4.
    """
    torch.manual_seed(0)
    args = small(model_hidden=16, model_batch_size=64, model_max_epochs=4, model_lr=3e-3,
                 holdout_size=500)  # fmt: skip
    obs, action = torch.randn(16_000, 1) * 5 + 9, torch.rand(16_000, 1) * 2 - 1
    delta = 0.6 * action + torch.randn(16_000, 1) * 0.2 * action.exp()
    reward = torch.randn(16_000, 1) * 0.1
    data = torch.cat([obs, action, reward, obs + delta, torch.zeros(16_000, 1)], -1)
    agent = mopo.MOPO(args, 1, 1, CPU)
    mopo.fit_model(agent, dataset_of(data), data, args, StubRun())
    at = torch.tensor([-0.8, -0.5, 0.5, 0.8])
    obs, action = torch.full((1, 4, 1), 9.0), at.view(1, 4, 1)
    mean, std = (x[0, ..., 1] for x in agent.elites.predict(obs, action))
    torch.testing.assert_close(mean, (0.6 * at).expand(2, 4), atol=0.1, rtol=0)
    truth = 0.2 * at.exp()
    torch.testing.assert_close(std, truth.expand(2, 4), atol=0, rtol=0.3)
    u = mopo.uncertainty(agent, obs, action, args)[0]
    torch.testing.assert_close(u, (truth.square() + 0.01).sqrt(), atol=0, rtol=0.3)


# --- theory ---
# Returns are not normalised, eta = E[r_0 + gamma r_1 + ...]; rho sums to 1 / (1 - gamma).

COUNT, S, A = 200, 4, 2


class Tables(NamedTuple):
    """COUNT random MDPs, each with a wrong model of its dynamics; |r| <= 1."""

    P: torch.Tensor  # [n, S, A, S]
    wrong: torch.Tensor  # [n, S, A, S]
    r: torch.Tensor  # [n, S, A]
    mu0: torch.Tensor  # [n, S]
    gamma: torch.Tensor  # [n]


def simplex(*shape: int) -> torch.Tensor:
    return dist.Dirichlet(torch.full(shape, 0.7, dtype=torch.double)).sample()


@pytest.fixture(scope="module")
def tables() -> Tables:
    torch.manual_seed(0)
    P, near = simplex(COUNT, S, A, S), torch.rand(COUNT, 1, 1, 1).double() ** 2
    r = torch.rand(COUNT, S, A).double() * 2 - 1
    wrong = (1 - near) * P + near * simplex(COUNT, S, A, S)
    return Tables(P, wrong, r, simplex(COUNT, S), torch.rand(COUNT).double() * 0.9 + 0.05)


def values(t: Tables, P: torch.Tensor, r: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """V of pi [n, S, A] in dynamics P with reward r, [n, S]."""
    chain = torch.einsum("nsat,nsa->nst", P, pi)
    matrix = torch.eye(S) - t.gamma.view(-1, 1, 1) * chain
    return torch.linalg.solve(matrix, (r * pi).sum(-1))


def eta(t: Tables, P: torch.Tensor, r: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """Return from the initial states, [n]."""
    return (t.mu0 * values(t, P, r, pi)).sum(-1)


def occupancy(t: Tables, P: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """rho = sum over t of gamma^t Pr(s_t, a_t), [n, S, A]."""
    chain = torch.einsum("nsat,nsa->nts", P, pi)
    visits = torch.linalg.solve(torch.eye(S) - t.gamma.view(-1, 1, 1) * chain, t.mu0)
    return visits.unsqueeze(-1) * pi


def gap(t: Tables, pi: torch.Tensor) -> torch.Tensor:
    """G(s, a): what the model's next state is worth more than the true one, [n, S, A]."""
    return torch.einsum("nsat,nt->nsa", t.wrong - t.P, values(t, t.P, t.r, pi))


def distance(t: Tables) -> torch.Tensor:
    """sup over |f| <= 1 of the difference of E f: the L1 distance, [n, S, A]."""
    return (t.wrong - t.P).abs().sum(-1)


def lam(t: Tables) -> torch.Tensor:
    """lambda = gamma c with c = r_max / (1 - gamma)."""
    return (t.gamma / (1 - t.gamma)).view(-1, 1, 1)


def test_telescoping_lemma(tables):
    """Lemma 4.1, Eq. (1): eta^ - eta* = gamma E_rho^[G] to 1e-8, for 200 (model, policy) pairs."""
    t, pi = tables, simplex(COUNT, S, A)
    left = eta(t, t.wrong, t.r, pi) - eta(t, t.P, t.r, pi)
    right = t.gamma * (occupancy(t, t.wrong, pi) * gap(t, pi)).sum((1, 2))
    torch.testing.assert_close(left, right, atol=1e-8, rtol=0)
    assert left.abs().max() > 0.1
    rho = occupancy(t, t.wrong, pi)
    torch.testing.assert_close(rho.sum((1, 2)), 1 / (1 - t.gamma))
    torch.testing.assert_close((rho * t.r).sum((1, 2)), eta(t, t.wrong, t.r, pi))


def test_lower_bound_with_the_true_gap(tables):
    """Eq. (2): eta* >= E_rho^[r - gamma |G|], while E_rho^[r] alone is no lower bound."""
    t, pi = tables, simplex(COUNT, S, A)
    gamma = t.gamma.view(-1, 1, 1)
    true, rho = eta(t, t.P, t.r, pi), occupancy(t, t.wrong, pi)
    assert (true >= (rho * (t.r - gamma * gap(t, pi).abs())).sum((1, 2)) - 1e-9).all()
    assert (true < (rho * t.r).sum((1, 2)) - 1e-3).sum() > 20


def test_total_variation_bound(tables):
    """Eq. (4): |G| <= r_max / (1 - gamma) D, reached where the model goes to the other extreme."""
    t, pi = tables, simplex(COUNT, S, A)
    bound = distance(t) / (1 - t.gamma).view(-1, 1, 1)
    assert (gap(t, pi).abs() <= bound + 1e-9).all()
    # States 0 and 1 absorb and pay -1 and 1; in state 0 the model goes to state 1.
    P = torch.eye(S).double().view(1, S, 1, S).repeat(1, 1, A, 1)
    wrong, gamma = P.clone(), torch.tensor([0.9], dtype=torch.double)
    wrong[:, 0] = P[:, 1]
    r = torch.tensor([-1.0, 1, 0, 0]).double().view(1, S, 1).expand(1, S, A)
    one = Tables(P, wrong, r, simplex(1, S), gamma)
    for side in (gap(one, simplex(1, S, A)), distance(one) / (1 - gamma)):
        torch.testing.assert_close(side[0, 0], torch.full((A,), 20.0).double())


def test_penalised_return_is_a_lower_bound(tables):
    """Eq. (7): with an admissible u no policy is overrated; with u = 0 some are."""
    t = tables
    for slack in (0.0, 0.3):
        u = distance(t) + slack * torch.rand(COUNT, S, A)
        for _ in range(10):
            pi = simplex(COUNT, S, A)
            true = eta(t, t.P, t.r, pi)
            rewards = [mopo.penalised_reward(t.r, x, lam(t)) for x in (u, 0 * u)]
            safe, naive = (eta(t, t.wrong, r, pi) for r in rewards)
            assert (safe <= true + 1e-9).all()
            assert (naive > true + 1e-3).sum() > 20


def best_policy(t: Tables, r: torch.Tensor, policies: torch.Tensor) -> torch.Tensor:
    """Of all deterministic policies [k, S, A] the best in the model with reward r, [n, S, A]."""
    n = len(t.r)
    returns = torch.stack([eta(t, t.wrong, r, pi.expand(n, S, A)) for pi in policies])
    return policies[returns.argmax(0)]


def test_theorem_4_4(tables):
    """The penalised maximiser is as good as any policy less 2 lambda eps_u; the naive one is not.

    The models err at one random state and action; u is the exact error. Policies that avoid the
    error have eps_u = 0, so the bound is sharp.
    """
    t = tables
    there = torch.zeros(COUNT, S * A).double()
    there[torch.arange(COUNT), torch.randint(S * A, (COUNT,))] = 1
    wrong = torch.lerp(t.P, simplex(COUNT, S, A, S), there.view(COUNT, S, A, 1))
    t = t._replace(wrong=wrong, gamma=t.gamma * 0.5 + 0.45)
    u = distance(t)
    choices = torch.cartesian_prod(*[torch.arange(A)] * S)
    policies = nn.functional.one_hot(choices, A).double()
    assert policies.shape == (A**S, S, A)
    rivals = [*policies, *simplex(30, S, A)]
    bound = torch.full((COUNT,), -math.inf).double()
    for pi in (x.expand(COUNT, S, A) for x in rivals):
        eps = (occupancy(t, t.wrong, pi) * u).sum((1, 2))
        bound = bound.maximum(eta(t, t.P, t.r, pi) - 2 * lam(t).flatten() * eps)
    achieved = {}
    for name, scale in (("penalised", lam(t)), ("naive", 0 * lam(t))):
        pi = best_policy(t, mopo.penalised_reward(t.r, u, scale), policies)
        achieved[name] = eta(t, t.P, t.r, pi)
    assert (achieved["penalised"] >= bound - 1e-9).all()
    assert (achieved["penalised"] < bound + 1e-6).sum() > 20, "the bound should be sharp"
    assert (achieved["naive"] < bound - 1e-3).sum() > 5


# --- whole runs ---

ENV = "maze2d-umaze-v1"
# Two epochs of five steps, five rollouts, three evaluations, four real rows per batch.
TINY = dict(
    env_id=ENV, total_iterations=24, eval_every=8, eval_episodes=2, final_episodes=2, log_every=4,
    checkpoint_every=1000, model_max_epochs=2, model_patience=5, holdout_size=20,
    model_batch_size=64, model_hidden=16, ensemble_size=3, num_elites=2, rollout_every=5,
    rollout_starts=20, rollout_retain=2, horizon=3, batch_size=16, real_fraction=0.25,
    hidden=(16, 16), threads=1, cuda=False, cpu_fast_matmul=False,
)  # fmt: skip


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


@pytest.fixture(scope="module")
def short():
    """Episodes of 15 steps, and no pictures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mopo.MAZE_LIMITS, "umaze", 15)
        patch.setattr(mopo, "plot_curves", lambda run: None)
        mopo.env_slots.cache_clear()
        yield
    mopo.env_slots.cache_clear()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, dataset, short):
    """tiny(**changes) trains and returns the run folder."""

    def train(**changes):
        place = str(tmp_path_factory.mktemp("runs"))
        args = mopo.Args(**(TINY | dict(dataset_path=dataset, run_dir=place) | changes))
        mopo.train(args)
        return folder_in(args.run_dir)

    return train


@pytest.fixture(scope="module")
def first(tiny):
    """The plain run."""
    return tiny()


@pytest.fixture(scope="module")
def two(tiny):
    """The plain run of two learners."""
    return tiny(num_seeds=2)


def resume(folder):
    mopo.train(dataclasses.replace(mopo.load_args(folder), resume=str(folder)))
    return folder


def test_every_parameter_moves(two):
    """The fit, the rollouts and SAC act on every tensor of both learners."""
    before = mopo.MOPO(mopo.load_args(two), 4, 2, CPU).state_dict()
    after = checkpoint(two)["agent"]
    assert before.keys() == after.keys() and after["real_rows"].tolist() == [[4], [4]]
    for name, old in before.items():
        new = after[name]
        if name == "buffer":
            assert new.shape == (2, 120, 12) and (new[..., :11].std(1) > 0).all()
        elif old.shape[:1] == (2,) and name != "real_rows":
            assert (old != new).view(2, -1).any(1).all(), name
        else:
            assert name == "real_rows" or not torch.equal(old, new), name
    for name, optimizer in checkpoint(two)["optimizers"].items():
        for state in optimizer["state"].values():
            assert state["step"] > 0 and (state["exp_avg_sq"].view(2, -1).sum(1) > 0).all(), name
    phases = [r["phase"] for r in log_rows(two)]
    assert phases == ["model fit"] * 2 + (["training"] * 2 + ["evaluation"]) * 3


def test_seeds(tiny, first):
    """The same seed gives the same run, however often it is logged; another seed another one."""
    assert_same_run(first, tiny())
    base = checkpoint(first)["agent"]
    assert_same(checkpoint(tiny(eval_every=24, log_every=7))["agent"], base)
    other = checkpoint(tiny(seed=1))["agent"]
    same = [k for k, v in base.items() if v.dim() and torch.equal(v, other[k])]
    assert same == ["real_rows"]


class Killed(BaseException):
    """What SIGKILL would do at this point of the program, in this process."""


CUTS = [  # rows of the log written before each death; iteration and epoch of the last checkpoint
    (5, [1], 0, 1),
    (5, [2], 0, 2),  # after the last epoch of the fit
    (3, [2], 3, None),
    (5, [3], 5, None),  # just before a refresh
    (2, [3, 2], 10, None),
]


@pytest.mark.parametrize("every, cuts, iteration, epoch", CUTS)
def test_resume_is_exact(every, cuts, iteration, epoch, tiny, first, tmp_path, monkeypatch):
    """k + k = 2k bit for bit: cut inside the model fit, after it, in the main loop, twice."""
    log, folder = mopo.Run.log, None
    for cut in cuts:
        count = iter(range(100))

        def dying(self, *args, count=count, cut=cut):
            if next(count) == cut:
                raise Killed
            log(self, *args)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(mopo.Run, "log", dying)
            resume(folder) if folder else tiny(run_dir=str(tmp_path), checkpoint_every=every)
        folder = folder_in(tmp_path)
    saved = checkpoint(folder)
    assert (
        saved["iteration"] == iteration and saved["progress"].get("fit", {}).get("epoch") == epoch
    )
    assert_same_run(resume(folder), first)


def test_sigkill_and_resume(tiny, first, tmp_path):
    """A process killed in the midst of a checkpoint leaves one that leads to the same end."""
    child = os.fork()
    if child == 0:
        save, count = torch.save, iter(range(100))

        def dying(content, file):
            if next(count) == 7:  # that of iteration 6
                file.write(b"PK half of a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(content, file)

        torch.save = dying
        try:
            tiny(run_dir=str(tmp_path), checkpoint_every=3)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    folder = folder_in(tmp_path)
    assert checkpoint(folder)["iteration"] == 3
    assert_same_run(resume(folder), first)


class Disturbed(mopo.MOPO):
    """Learner 1 starts from other weights, everywhere."""

    def __init__(self, *args):
        super().__init__(*args)
        with torch.no_grad():
            for p in self.parameters():
                p[1] += 0.3 * torch.randn(p[1].shape, generator=torch.Generator().manual_seed(5))


def test_learners_are_isolated(tiny, monkeypatch):
    """Learner 0 is the same whatever learner 1 weighs and whenever its model fit stops."""
    error, runs = mopo.holdout_error, []
    for kind, last in ((mopo.MOPO, 1), (Disturbed, 3)):  # epochs in which learner 1 gains

        def fake(agent, inputs, targets, last=last):
            step = next(iter(agent.optimizers["model"].state.values()))["step"].item()
            if step == 1e6:  # restored: the elites are chosen now
                return error(agent, inputs, targets)
            return 1 / torch.tensor([[min(step, 10)], [min(step, 5 * last)]]).expand(2, 3)

        monkeypatch.setattr(mopo, "holdout_error", fake)
        monkeypatch.setattr(mopo, "MOPO", kind)
        runs.append(tiny(num_seeds=2, model_patience=1, model_max_epochs=9))
    assert [sum(r["phase"] == "model fit" for r in log_rows(f)) for f in runs] == [3, 4]
    one, other = map(checkpoint, runs)
    differ = set()
    for name, a in one["agent"].items():
        if a.shape[:1] == (2,):
            assert torch.equal(a[0], other["agent"][name][0]), name
            if not torch.equal(a[1], other["agent"][name][1]):
                differ.add(name)
    assert {"buffer", "temperature.0"} < differ and len(differ) > 30
    for name, optimizer in one["optimizers"].items():
        for i, state in optimizer["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                b = other["optimizers"][name]["state"][i][key]
                assert torch.equal(state[key][0], b[0]), (name, i)
    assert [c["returns"][0] for c in one["curves"]] == [c["returns"][0] for c in other["curves"]]


def test_dynamics_from(tiny, first, two, monkeypatch):
    """The model of a run leads to that run's end; one learner takes the first of two."""
    monkeypatch.delattr(mopo, "fit_model")
    again, base = checkpoint(tiny(dynamics_from=str(first))), checkpoint(first)
    base["agent"]["epoch_place"].zero_()  # only a fit uses it
    assert_same(again, base)
    alone, both = checkpoint(tiny(dynamics_from=str(two))), checkpoint(two)
    for name, tensor in alone["agent"].items():
        if name.startswith(("model.", "elites.")):
            shared = both["agent"][name]
            assert torch.equal(tensor, shared if "input" in name else shared[:1]), name
    moments = [c["optimizers"]["model"]["state"].values() for c in (alone, both)]
    for mine, theirs in zip(*moments, strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"][:1]) and mine["exp_avg"].any()
    same = checkpoint(tiny(dynamics_from=str(first), num_seeds=2))["agent"]
    for name in (n for n in same if n.startswith(("model.trunk", "model.heads"))):
        assert torch.equal(same[name], base["agent"][name].expand_as(same[name])), name
    assert not torch.equal(*same["actor.net.layers.0.weight"])
    with pytest.raises(mopo.UserError, match="holds 2 models, and 3 are asked for"):
        tiny(dynamics_from=str(two), num_seeds=3)


def test_mbpo(tiny, first, monkeypatch):
    """Lambda 0 never asks for u and is a run of its own; the first rollouts differ by lambda u."""
    plain = tiny(penalty_coef=0.0)
    penalised = tiny(total_iterations=1, penalty_coef=2.0)

    def refuse(*_):
        raise AssertionError("asked for the uncertainty")

    monkeypatch.setattr(mopo, "uncertainty", refuse)
    assert_same_run(plain, tiny(penalty_coef=0.0))
    one = tiny(total_iterations=1, penalty_coef=0.0)
    with pytest.raises(AssertionError, match="asked for"):
        tiny(total_iterations=1)
    assert not torch.equal(*(checkpoint(f)["agent"]["buffer"] for f in (plain, first)))
    assert not torch.equal(*(checkpoint(f)["agent"]["temperature.0"] for f in (plain, first)))
    free, less = (checkpoint(f)["agent"]["buffer"] for f in (one, penalised))
    assert torch.equal(free[..., :6], less[..., :6]) and torch.equal(free[..., 7:], less[..., 7:])
    penalty = (free - less)[..., 6]
    logged = checkpoint(penalised)["rollout_logs"]["rollout/penalty"]
    assert (penalty > 0).all() and penalty.mean() / 2 == pytest.approx(logged.item(), rel=1e-4)


def test_saved_policy(two, short, capsys):
    """policy.pt gives tanh(mean) of its learner, the same action for the same observation."""
    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    saved = checkpoint(two)["agent"]
    agent = mopo.MOPO(mopo.load_args(two), 4, 2, CPU)
    saved["buffer"] = agent.buffer
    agent.load_state_dict(saved)
    truth = torch.tanh(agent.actor(torch.tensor(obs).expand(2, -1, -1))[0]).detach()
    for learner in (0, 1):
        policy = mopo.load_policy(two, learner)
        np.testing.assert_allclose(policy.act(obs), truth[learner], atol=1e-6)
        assert np.array_equal(policy.act(obs), policy.act(obs))
    assert not torch.equal(truth[0], truth[1])
    mopo.evaluate_run(mopo.Args(evaluate=str(two), final_episodes=2))
    assert "over 2 episodes" in capsys.readouterr().out
    result = json.loads((two / "result.json").read_text())
    assert result["algo"] == "mopo" and result["seeds"] == [0, 1]


# --- settings and mistakes ---

# facts.md 3.4: (lambda, h) of v0, then of v2. No v2 column for random: its v0 row.
TABLE = {
    "halfcheetah-random": ((0.5, 5), (0.5, 5)),
    "hopper-random": ((1, 5), (1, 5)),
    "walker2d-random": ((1, 1), (1, 1)),
    "halfcheetah-medium": ((1, 1), (0.5, 5)),
    "hopper-medium": ((5, 5), (5, 5)),
    "walker2d-medium": ((5, 5), (0.5, 5)),
    "halfcheetah-medium-replay": ((1, 5), (0.5, 5)),
    "hopper-medium-replay": ((1, 5), (2.5, 5)),
    "walker2d-medium-replay": ((1, 1), (2.5, 1)),
    "halfcheetah-medium-expert": ((5, 5), (2.5, 5)),
    "hopper-medium-expert": ((1, 5), (5, 5)),
    "walker2d-medium-expert": ((2, 1), (2.5, 1)),
}


def test_settings_of_the_paper():
    """--env-id alone sets lambda and h of all 24 D4RL tasks and nothing else; a flag beats it."""
    rows = {f"{k}-v{2 * i}": v[i] for k, v in TABLE.items() for i in (0, 1)}
    ood = {"halfcheetah-jump-v0": (1, 5), "ant-angle-v0": (1, 25)}  # facts.md 3.6
    assert mopo.PAPER.keys() - ood.keys() == rows.keys() and len(rows) == 24
    default = dataclasses.asdict(mopo.Args())
    for env_id, expected in (rows | {k: v for k, v in ood.items() if k in mopo.PAPER}).items():
        args = mopo.parse_args(["--env-id", env_id])
        assert (args.penalty_coef, args.horizon) == expected, env_id
        assert args.rollout_actions == ("uniform" if env_id in ood else "policy")
        changed = {k for k, v in vars(args).items() if v != default[k]}
        assert changed <= {"env_id", "penalty_coef", "horizon", "rollout_actions"}
    args = mopo.parse_args(["--env-id", "walker2d-medium-v0", "--penalty-coef", "0.25"])
    assert (args.penalty_coef, args.horizon) == (0.25, 5)


def test_default_settings():
    """The constants of facts.md 3.2 and 3.3, which no table row changes."""
    expected = dict(
        ensemble_size=7, num_elites=5, model_hidden=200, model_lr=1e-3, model_batch_size=256,
        model_weight_decay=(2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), model_patience=6,
        holdout_size=1000, rollout_every=1000, rollout_starts=50_000, rollout_retain=5,
        real_fraction=0.05, gamma=0.99, tau=5e-3, batch_size=256, critic_lr=3e-4, actor_lr=3e-4,
        alpha_lr=3e-4, hidden=(256, 256), target_entropy=-3.0, total_iterations=1_000_000,
        eval_every=1000, eval_episodes=10, rollout_actions="policy", penalty="std",
    )  # fmt: skip
    args = vars(mopo.Args())
    assert {k: args[k] for k in expected} == expected


def test_flags_shared_with_ampl():
    """A flag that both scripts have means the same kind of value."""
    mine, theirs = ({f.name: f.type for f in dataclasses.fields(m.Args)} for m in (mopo, ampl))
    common = mine.keys() & theirs.keys()
    assert len(common) > 35 and {k for k in common if mine[k] != theirs[k]} == {"hidden"}
    assert mine["hidden"] == tuple[int, ...] and theirs["hidden"] == tuple[int, int]  # any depth


BAD = [
    ("--penalty-coef -1", "--penalty-coef is -1.0; it must be at least 0"),
    ("--penalty-coef nan", "--penalty-coef is nan; it must be finite"),
    ("--horizon 0", "--horizon is 0; it must be at least 1"),
    ("--rollout-starts 0", "--rollout-starts is 0"),
    ("--rollout-retain 0", "--rollout-retain is 0"),
    ("--batch-size 301", "--batch-size 301 exceeds the 285 data rows"),
    ("--gamma 1", "--gamma must be below 1"),
    ("--tau 1.5", "--tau is 1.5; it must be at most 1"),
    ("--real-fraction 1.5", "--real-fraction is 1.5; it must be at most 1"),
    ("--target-entropy inf", "--target-entropy is inf; it must be finite"),
    ("--alpha-lr 0", "--alpha-lr is 0.0; it must be positive"),
    ("--num-elites 4", "--num-elites is larger than --ensemble-size"),
    ("--dynamics-from nowhere", "nowhere/model.pt does not exist"),
    ("--resume nowhere", "nowhere is not a run folder"),
]


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_bad_flags(line, words, dataset, short, tmp_path, monkeypatch, capsys):
    """One sentence on stderr, status 2, and nothing is left behind."""
    argv = line.split()
    given = argv[0].removeprefix("--").replace("-", "_")
    changes = TINY | dict(dataset_path=dataset, run_dir=tmp_path / "runs")
    if given != "resume":
        argv = flags(**{k: v for k, v in changes.items() if k != given}) + argv
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mopo.py", *argv])
    with pytest.raises(SystemExit) as stop:
        mopo.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("mopo.py: ") and err.count("\n") == 1
    assert words in err and not list(tmp_path.iterdir())
