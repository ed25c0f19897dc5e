"""MOPO: its equations by hand, its steps, its model fit, the two generalisation tasks."""

import math
import sys

import numpy as np
import pytest
import torch
from steps import dataset
from torch import distributions as dist

import combo
import mopo

LN2 = 0.6931472
SMALL = dict(
    env_id="halfcheetah-medium-v2", hidden=(8, 8), batch_size=16, real_fraction=0.25, horizon=3,
    rollout_starts=20, rollout_retain=2, ensemble_size=3, num_elites=2, model_hidden=8,
    model_batch_size=16, holdout_size=10, cuda=False,
)  # fmt: skip


def build(method=mopo.MOPO, sizes=(3, 2), data=None, **changes):
    """MOPO or COMBO on `data`, else on 40 random rows."""
    args = sys.modules[method.__module__].Args(**SMALL | changes)
    agent = method(args, *sizes, torch.device("cpu"))
    agent.set_data(data or dataset(40, *sizes))
    return agent


STD = [[[[12.0, 3.0, 4.0], [0.0, 0.0, 1.0]], [[0.0, 8.0, 6.0], [2.0, 3.0, 6.0]]]]  # [1, 2, 2, 3]
# Next states (0, 0), (6, 0), (0, 3) around (2, 1); rewards do not matter.
MEAN = [[[[0.0, 0.0, 0.0]], [[700.0, 6.0, 0.0]], [[-50.0, 0.0, 3.0]]]]  # [1, 3, 1, 3]
Q = [[[1.0, 5.0], [3.0, 2.0]]]  # [1, 2, 2]
NLL = [[[[1.0, 2.0], [0.0, 0.0]]]], [[[[0.0, LN2], [0.0, 0.0]]]], [[[[0.0, 0.0], [0.0, 0.0]]]]
EQUATIONS = [
    (mopo.largest_std, (STD,), [[13.0, 7.0]]),  # sqrt(144 + 9 + 16) over 10, sqrt(4 + 9 + 36)
    (mopo.largest_disagreement, (MEAN,), [[4.1231056]]),  # sqrt(4^2 + 1)
    (mopo.penalised_reward, ([[1.0, -1.0]], [[2.0, 0.5]], 1.5), [[-2.0, -1.75]]),
    # 1 + 0.9 (min(1, 3) + 0.5); at the terminal neither Q nor the entropy.
    (mopo.soft_target, ([[1.0, 1.0]], [[0.0, 1.0]], Q, [[-0.5, 9.0]], 0.9), [[2.35, 1.0]]),
    (mopo.critic_loss, (Q, [[2.0, 4.0]]), [1.75]),  # half of (1 + 1) / 2 + (1 + 4) / 2
    (mopo.policy_loss, (Q, [[0.5, -1.0]], [0.2]), [-1.55]),  # ((0.1 - 1) + (-0.2 - 2)) / 2
    (mopo.temperature_loss, ([0.5], [-2.0], -3.0), [0.5]),  # 0.5 (-2 + 3)
    (mopo.model_loss, NLL, [[0.8465736]]),  # row 0: (1 + (4 / 4 + 2 ln 2)) / 2, row 1: 0
]


@pytest.mark.parametrize("function, inputs, expected", EQUATIONS)
def test_equation(function, inputs, expected):
    """Each gives the number worked out by hand."""
    inputs = [x if isinstance(x, float) else torch.as_tensor(x) for x in inputs]
    torch.testing.assert_close(function(*inputs), torch.tensor(expected))


def test_policy_density():
    """The log-density of a squashed sample is that of torch's TanhTransform; it never overflows."""
    torch.manual_seed(0)
    policy = mopo.GaussianPolicy(3, 4, mopo.Args(**SMALL, num_seeds=2)).double()
    policy.net.layers[-1].weight.data *= 0.3
    obs = torch.randn(2, 100, 3, dtype=torch.double)
    mean, log_std = (x.repeat_interleave(5, 1) for x in policy(obs))
    action, log_prob = (x.flatten(1, 2) for x in policy.samples(obs, 5))
    truth = dist.TransformedDistribution(dist.Normal(mean, log_std.exp()), dist.TanhTransform())
    torch.testing.assert_close(log_prob, truth.log_prob(action).sum(-1))
    assert ((action.atanh() - mean) / log_std.exp()).std().item() == pytest.approx(1, abs=0.05)
    policy.float().net.layers[-1].bias.data[..., :4] = 200.0  # tanh rounds to 1
    action, log_prob = policy.sample(obs.float())
    assert (action == 1).all() and log_prob.isfinite().all() and (log_prob > 500).all()


def test_penalty_and_elites():
    """The least trusted of seven, no elite, decides u; log-variance is in [-10, 0.5]."""
    agent = build(ensemble_size=7, num_elites=5)
    agent.model.heads.weight.data.zero_()
    agent.model.heads.bias.data[0, :, 0, 1] = torch.arange(7.0)  # the mean of an entry of s'
    agent.model.heads.bias.data[0, :, 0, 4:] = torch.tensor([-100.0] * 6 + [100.0])[:, None]
    agent.choose_elites(torch.arange(7.0)[None])
    assert agent.elites.heads.bias[0, :, 0, 1].tolist() == [0, 1, 2, 3, 4]
    obs, action = torch.randn(1, 5, 3), torch.rand(1, 5, 2)
    std = agent.model.predict(obs, action)[1][0, :, 0, 0].log().tolist()
    assert std == pytest.approx([-5.0] * 6 + [0.25], abs=1e-4)
    # Four entries of deviation exp(0.25); next states 0 ... 6 around 3.
    for agent.args.penalty, expected in (("std", 2 * math.exp(0.25)), ("disagreement", 3.0)):
        assert agent.uncertainty(obs, action)[0].tolist() == pytest.approx([expected] * 5, abs=1e-3)


@pytest.mark.parametrize("method, cost", [(mopo.MOPO, 0.5), (combo.COMBO, 0.0)])
def test_iterate(method, cost):
    """12 of 256 rows are data; min Q' - alpha log pi, in COMBO min Q'; all but the model moves."""
    agent = build(method, batch_size=256, real_fraction=0.05, tau=0.1, num_seeds=2)
    agent.rollout()
    agent.data[:, 5], agent.buffer[..., 5] = -7.0, torch.tensor([[1.0], [2.0]])
    agent.log_alpha.data.fill_(-LN2)  # alpha is 0.5
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    with torch.random.fork_rng():
        batch = agent.sample()
        both = agent.actor.sample(torch.cat([batch.obs, batch.next_obs], 1))
        action, log_prob = (x[:, 256:] for x in both)
        q_next = agent.critic_target(batch.next_obs, action).amin(1) - cost * log_prob
        target = batch.reward + 0.99 * (1 - batch.terminated) * q_next
        loss = mopo.critic_loss(agent.critic(batch.obs, batch.action), target)
    torch.testing.assert_close(agent.iterate()["losses/critic_loss"], loss)
    assert batch.reward.tolist() == [[-7] * 12 + [learner] * 244 for learner in (1, 2)]
    after = agent.state_dict()
    for name, old in before.items():
        trained = name.startswith(("actor", "critic", "log_alpha"))
        assert torch.equal(old, after[name]) != trained, name
        if name.startswith("critic_target"):
            fast = after[name.replace("_target", "")]
            torch.testing.assert_close(after[name], old + 0.1 * (fast - old))


@pytest.mark.parametrize("method, penalty_coef, actions", [
    (mopo.MOPO, 0.0, "policy"), (mopo.MOPO, 2.0, "uniform"), (combo.COMBO, 0.0, "uniform"),
])  # fmt: skip
def test_rollout(method, penalty_coef, actions):
    """Rewards lose lambda u of their own row, lambda 0 does not ask for u; ended slots restart."""
    more = dict(sizes=(1, 2), horizon=5, rollout_starts=600, rollout_actions=actions)
    starts = 100.0 * torch.arange(1, 51).unsqueeze(-1)  # the model adds 1, x02 is terminal
    agent, asked = build(method, data=dataset(50, 1, 2) | dict(obs=starts), **more), []
    agent.args.penalty_coef = penalty_coef  # which COMBO has not
    agent.actor.forward = lambda obs: (torch.full((*obs.shape[:-1], 2), 0.5),) * 2
    agent.elites.sample = lambda obs, action: (obs[..., 0] / 1000, obs + 1)
    agent.terminate = lambda next_obs: (next_obs[..., 0] % 100 == 2).float()
    u = lambda obs, action: obs[..., 0] / 1000 + action[..., 0].square()
    agent.uncertainty = lambda *pair: asked.append(pair) or u(*pair)
    logs = agent.rollout()
    assert agent.buffer_rows == 5 * 600 and agent.buffer.shape[1] == 2 * 5 * 600
    rows = agent.split(agent.buffer[0, :2500].view(5, 500, 6))  # steps of the first chunk
    torch.testing.assert_close(rows.reward, rows.obs[..., 0] / 1000 - penalty_coef * u(*rows[:2]))
    assert len(asked) == 10 * (penalty_coef > 0) and logs["rollout/terminated_frac"] == 0.4
    assert (rows.obs[..., 0] % 100).unique(dim=1).flatten().tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(rows.terminated, (rows.next_obs[..., 0] % 100 == 2).float())
    assert not torch.equal(rows.obs[2], rows.obs[0]), "restarts must be drawn anew"
    assert len(rows.action.view(-1, 2).unique(dim=0)) == 2500 and rows.action.abs().max() <= 1
    assert (rows.action.mean().abs() < 0.05) == (actions == "uniform")


@pytest.mark.parametrize("method", [mopo.MOPO, combo.COMBO])
def test_termination(method):
    """Hopper's rule, or NaN, infinity, a state outside twice the data's range, which is bounded."""
    obs = torch.tensor([-60.0, 0.0]).repeat(30, 1)
    data = dataset(30, 2, 1) | dict(obs=obs, next_obs=torch.zeros(30, 2))
    agent = build(method, sizes=(2, 1), data=data, horizon=2, rollout_starts=5)
    assert agent.obs_limit.tolist() == [120.0, 100.0]  # twice 60; at least 100
    states = torch.tensor([[0, 99.0], [1, math.nan], [2, math.inf], [3, -1e30], [4, 101.0]])
    reward = torch.tensor([[3.0, math.nan, 3.0, 3.0, 3.0]])
    agent.args.penalty_coef, agent.elites.sample = 0.0, lambda *_: (reward, states[None])
    agent.rollout()
    rows = agent.split(agent.buffer[0, :10])
    assert rows.terminated.tolist() == [0, 1, 1, 1, 1] * 2 and agent.buffer.isfinite().all()
    assert rows.next_obs[:5, 1].tolist() == [99, 0, 100, -100, 100]
    assert rows.reward.tolist() == [3, 0, 3, 3, 3] * 2
    assert rows.obs[5:].tolist() == [[0, 99]] + [[-60, 0]] * 4
    agent.args.env_id = "hopper-medium-v2"
    upright = torch.tensor([[[0.71, 0.1], [0.69, 0.1], [1.0, 0.21]]])
    assert agent.terminate(upright).tolist() == [[0, 1, 1]]


def test_epochs_over_bootstrap_samples(monkeypatch):
    """Each member has a bootstrap of the train rows, seen once per epoch in a new order."""
    data = dataset(90, 3, 2) | dict(has_next=torch.ones(90))
    data["reward"] = torch.arange(90.0)  # names the row, in raw units
    agent, seen, loss = build(data=data, model_max_epochs=3, num_seeds=2), [], mopo.model_loss
    noted = lambda *given: seen.append(given[2][..., 0].long()) or loss(*given)
    monkeypatch.setattr(mopo, "model_loss", noted)
    agent.fit_model(lambda *_: None)
    held, train = agent.split_rows(90, 0, 10)
    assert sorted([*held.tolist(), *train.tolist()]) == list(range(90)) and len(held) == 10
    torch.testing.assert_close(agent.model.input_std, agent.data[train, :5].std(0, correction=0))
    epochs = torch.cat(seen, -1).view(2, 3, 3, 80)  # learner, member, epoch
    counts = torch.nn.functional.one_hot(epochs, 90).sum(-2)
    assert (counts == counts[:, :, :1]).all(), "the same bootstrap in all epochs"
    assert not counts[..., held].any()
    assert 0.5 < (counts[..., train] > 0).float().mean() < 0.75  # 1 - 1 / e, not a permutation
    assert len(epochs.flatten(0, 2).unique(dim=0)) == 18
    seen.clear()
    build(data=data, model_max_epochs=1, model_batch_size=32).fit_model(lambda *_: None)
    order = torch.cat(seen, -1)[0]  # 80 rows: the third batch is half new
    assert torch.equal(order[:, 80:], order[:, :16])


@pytest.mark.parametrize("gain, epochs", [(0.02, 10), (0.005, 7)])
def test_early_stop_and_elites(gain, epochs):
    """Six idle epochs end a fit, a gain counts from 1 %; members return to their best epoch."""
    agent, logs = build(num_seeds=2, model_patience=mopo.Args().model_patience), []

    def validate(inputs, targets):
        epoch = len(logs)
        agent.model.heads.bias.data.fill_(epoch)
        late = [1.0, 1.0, 1 - gain * (epoch >= 3)]
        return torch.tensor([late, [1.0, 0.9, 0.8 - 0.1 * (epoch >= 7)]])  # learner 1: too late

    agent.validate = validate
    error = agent.fit_model(lambda *log: logs.append(log))
    best = [0, 0, 3 if gain > 0.01 else 0]
    assert agent.model.heads.bias[:, :, 0, 0].tolist() == [best, [0, 0, 0]] and len(logs) == epochs
    assert error[1].tolist() == pytest.approx([1.0, 0.9, 0.8])
    assert torch.equal(agent.elites.trunk[0].weight[1], agent.model.trunk[0].weight[1, [2, 1]])
    assert torch.equal(agent.elites.input_std, agent.model.input_std)


@pytest.mark.parametrize("task", ["halfcheetah-jump-v0", "ant-angle-v0"])
def test_generalisation_task(task):
    """Observations, rewards and ends against the simulator's state and the papers' formulas."""
    assert mopo.make_env(task).spec.max_episode_steps == 1000
    jump, rng, contacts = "jump" in task, np.random.default_rng(0), []
    env = mopo.HalfCheetahJumpEnv() if jump else mopo.AntAngleEnv()
    data, _ = env.unwrapped.data, env.reset(seed=0)
    torso, first = data.body("torso"), data.body("torso").xpos[2]
    for t in range(60):
        data.qvel[0] += (10.0, -10.0)[t % 2] * jump  # beyond the cap, and on its other side
        action, x = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32), data.qpos[0]
        before = torso.xpos[:2].copy()
        obs, reward, terminated, _, info = env.step(action)
        vx, vy = (torso.xpos[:2] - before) / 0.05
        contacts.append((np.clip(data.cfrc_ext, -1, 1) ** 2).sum())
        behaviour = vx + 1 - 0.5 * (action**2).sum() - 0.5e-3 * contacts[-1]
        wanted = behaviour - vx + vx * np.sqrt(0.75) + vy * 0.5  # 30 degrees
        if jump:
            behaviour = min((data.qpos[0] - x) / 0.05, 3.0) - 0.1 * (action**2).sum()
            wanted = behaviour + 15 * (torso.xpos[2] - first)
        assert info["behaviour_reward"] == pytest.approx(behaviour, abs=1e-6)
        assert reward == pytest.approx(wanted, abs=1e-6)
        assert terminated == combo.known_termination(task, torch.tensor(obs)).item()
    position = [data.qpos[1:], [torso.xpos[2]]] if jump else [data.qpos[2:]]
    assert np.array_equal(obs, np.concatenate([*position, data.qvel])) and max(contacts) > jump
