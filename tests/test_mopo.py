"""MOPO: its equations by hand, its steps, its runs, and a class of one's own.

What combo.py does as mopo.py does is tested here for both. An iteration and a step of the model are
compared with a second statement of them, which takes no short cut.
"""

import copy
import dataclasses
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from small import build_combo, build_mopo, random_dataset
from test_equations import changed, copies, ignore_progress
from test_extensions import arrays_of, lines_of_code, tensors_of
from test_runs import (
    Killed,
    assert_same_run,
    before_call,
    counted,
    die,
    flat,
    folder_in,
    points,
    result,
    saved,
    write_dataset,
)
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.testing import assert_close

import combo
import mopo

both_scripts = pytest.mark.parametrize("script", [mopo, combo])
both_methods = pytest.mark.parametrize("build", [build_mopo, build_combo])


def script_of(method: nn.Module) -> ModuleType:
    """mopo or combo."""
    return sys.modules[type(method).__module__]


@pytest.fixture
def double():
    """All tensors of the test in double precision, so that two ways to compute agree to 1e-9."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ===== Equations ==================================================================================
@both_scripts
def test_largest_std(script):
    """Over members, of the norm over the reward and all entries of the state."""
    member_0 = [[12.0, 3.0, 4.0], [0.0, 0.0, 1.0]]  # norms sqrt(144 + 9 + 16) = 13, and 1
    member_1 = [[0.0, 8.0, 6.0], [2.0, 3.0, 6.0]]  # 10, and sqrt(4 + 9 + 36) = 7
    std = torch.tensor([member_0, member_1])  # [M, B, 1 + S]
    assert script.largest_std(std).tolist() == [13, 7]


def test_largest_disagreement():
    """Next states (0, 0), (6, 0), (0, 3) around (2, 1); the rewards 0, 700, -50 do not matter."""
    mean = torch.tensor([[[0.0, 0.0, 0.0]], [[700.0, 6.0, 0.0]], [[-50.0, 0.0, 3.0]]])
    # Distances: sqrt(4 + 1), sqrt(16 + 1) = 4.1231056, sqrt(4 + 4).
    assert_close(mopo.largest_disagreement(mean), torch.tensor([4.1231056]))


def test_penalised_reward():
    """Eq. (7) with lambda = 1.5: 1 - 1.5 * 2 = -2 and -1 - 1.5 * 0.5 = -1.75."""
    reward = mopo.penalised_reward(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5]), 1.5)
    assert reward.tolist() == [-2, -1.75]


def test_soft_target():
    """gamma = 0.9 and alpha = 0.2, all rewards 1."""
    batch = mopo.Batch(
        obs=None,
        action=None,
        reward=torch.ones(3),
        next_obs=None,
        terminated=torch.tensor([0.0, 1.0, 0.0]),
    )
    q_next = torch.tensor([[1.0, 5.0, 4.0], [3.0, 2.0, -4.0]])
    next_log_prob = torch.tensor([-2.5, 9.0, 10.0])
    target = mopo.soft_target(batch, q_next, next_log_prob, torch.tensor(0.2), 0.9)
    # 0: 1 + 0.9 (1 + 0.2 * 2.5) = 2.35, with the smaller Q and the bonus of an improbable action
    # 1: terminated, so the reward alone, without Q and entropy
    # 2: 1 + 0.9 (-4 - 0.2 * 10) = -4.4
    assert_close(target, torch.tensor([2.35, 1.0, -4.4]))


@both_scripts
def test_critic_loss(script):
    """Half the squared error: a mean over rows, a sum over the two critics."""
    q = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    target = torch.tensor([2.0, 4.0])
    # Errors -1 and 1, and 1 and -2: (0.5 + 0.5) / 2 + (0.5 + 2) / 2 = 1.75.
    assert_close(script.critic_loss(q, target), torch.tensor(1.75))


@both_scripts
def test_policy_loss(script):
    """alpha log pi - min Q with alpha = 0.2: ((0.1 - 1) + (-0.2 - 2)) / 2 = -1.55."""
    q = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    loss = script.policy_loss(q, torch.tensor([0.5, -1.0]), torch.tensor(0.2))
    assert_close(loss, torch.tensor(-1.55))


@both_scripts
def test_temperature_loss(script):
    """The entropy is -2, the target -3: 0.5 (-2 + 3) = 0.5, and descent lowers alpha."""
    log_alpha = torch.tensor(0.5, requires_grad=True)
    loss = script.temperature_loss(log_alpha, torch.tensor([1.0, 3.0]), -3.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert log_alpha.grad.item() == pytest.approx(1)


@both_scripts
def test_model_loss(script):
    """Two members, two rows and two outputs; all targets are 0."""
    mean = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 0.0]]])  # [M, B, 1 + S]
    log_std = torch.tensor([[[0.0, math.log(2)], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    # Member 0: row 0 has (1 / 1 + 4 / 4 + 2 log 2) / 2 = 1.693147, row 1 has 0.
    # Member 1: row 0 has 0, row 1 has 4 / 2 = 2.
    loss = script.model_loss(mean, log_std, torch.zeros(2, 2, 2))
    assert_close(loss, torch.tensor([1.693147 / 2, 2.0 / 2]))


@both_scripts
def test_polyak(script):
    """The target goes a quarter of the way from 1 to 5; the network stays."""
    target = nn.Linear(2, 2)
    network = nn.Linear(2, 2)
    for parameter in target.parameters():
        parameter.data.fill_(1.0)
    for parameter in network.parameters():
        parameter.data.fill_(5.0)
    script.polyak(target, network, 0.25)
    assert all((parameter == 2).all() for parameter in target.parameters())
    assert all((parameter == 5).all() for parameter in network.parameters())


# ===== Networks ===================================================================================
@both_scripts
def test_squashed_density_by_hand(script):
    """At u = 0 the tanh has the slope 1, at u = 1 the slope 1 - tanh(1)^2 = 0.4199743."""
    zero = torch.zeros(2, 1)
    action, log_density = script.squashed_sample(zero, zero, torch.tensor([[0.0], [1.0]]))
    assert_close(action, torch.tensor([[0.0], [0.7615942]]))
    # log N(0) = -0.9189385; log N(1) = -1.4189385, and log 0.4199743 = -0.8675617.
    assert_close(log_density, torch.tensor([-0.9189385, -1.4189385 + 0.8675617]))


@both_scripts
def test_squashed_density_of_torch(script, double):
    """The same as Normal and TanhTransform give, summed over the entries of an action."""
    mean = torch.randn(100, 4)
    log_std = 0.5 * torch.randn(100, 4) - 1
    noise = torch.randn(100, 4)
    action, log_density = script.squashed_sample(mean, log_std, noise)
    assert_close(action, torch.tanh(mean + log_std.exp() * noise))
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    assert_close(log_density, squashed.log_prob(action).sum(-1))


@both_methods
def test_policy(build):
    """An action of its own for each row, its density, and bounds of log_std at -20 and 2."""
    policy = build().actor
    obs = torch.randn(1, 3).expand(9000, 3)
    mean, log_std = policy(obs)
    assert_close(torch.cat([mean, log_std], 1), policy.net(obs))
    action, log_prob = policy.sample(obs)
    u = torch.atanh(action.double())
    assert_close(u.mean(0), mean[0].double(), atol=0.05, rtol=0)
    assert_close(u.std(0), log_std[0].exp().double(), atol=0, rtol=0.05)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    assert_close(log_prob, squashed.log_prob(action).sum(-1), atol=0.01, rtol=0.01)

    policy.net[-1].bias.data = torch.tensor([0.0, 0.0, 100.0, -100.0])
    assert policy(obs)[1][0].tolist() == [2, -20]
    policy.net[-1].bias.data = torch.tensor([200.0, 200.0, 0.0, 0.0])  # tanh rounds to 1
    action, log_prob = policy.sample(obs)
    assert (action == 1).all()
    # The slope of the tanh is 4 exp(-2 u) there, so each entry adds about 2 * 200 - log 4.
    assert log_prob.mean().item() == pytest.approx(2 * (400 - 1.4), abs=20)


@both_methods
def test_critics_are_two(build):
    """Q_1 and Q_2 have weights of their own, which start Glorot-uniform, with biases of 0."""
    critic = build(hidden=(100, 200)).critic
    obs = torch.randn(6, 3)
    action = torch.randn(6, 2)
    q = critic(obs, action)
    assert q.shape == (2, 6)
    pair = torch.cat([obs, action], 1)
    assert_close(q[0], critic.q1(pair)[:, 0])
    assert_close(q[1], critic.q2(pair)[:, 0])
    assert not torch.equal(q[0], q[1])
    limit = math.sqrt(6 / (100 + 200))
    assert 0.99 * limit < critic.q1[2].weight.abs().max() <= limit
    assert not critic.q1[2].bias.any()


@both_scripts
def test_ensemble_linear(script):
    """Member m is a linear layer of its own on its own rows; weights begin as in PETS."""
    layer = script.EnsembleLinear(3, 4, 2)
    layer.bias.data.normal_()
    x = torch.randn(3, 5, 4)
    y = layer(x)
    for member in range(3):
        assert_close(y[member], x[member] @ layer.weight[member] + layer.bias[member])
    # The deviation is 1 / (2 sqrt(100)) = 0.05, cut at two deviations, which leaves 0.88 of it.
    weight = script.EnsembleLinear(7, 100, 100).weight
    assert weight.abs().max() < 0.1
    assert weight.std().item() == pytest.approx(0.05 * 0.88, rel=0.02)


@both_methods
def test_forward_of_the_model(build, double):
    """Four layers with SiLU, then mean and log-variance, squeezed between -10 and 0.5."""
    model = build().model
    model.layers[4].weight.data *= 30
    x = torch.randn(3, 6, 5)
    mean, log_std = model(x)
    for member in range(3):
        hidden = x[member]
        for layer in model.layers[:4]:
            hidden = hidden @ layer.weight[member] + layer.bias[member]
            hidden = hidden * torch.sigmoid(hidden)
        output = hidden @ model.layers[4].weight[member] + model.layers[4].bias[member]
        assert_close(mean[member], output[:, :4])
        upper = 0.5 - torch.log(1 + torch.exp(0.5 - output[:, 4:]))
        log_var = -10 + torch.log(1 + torch.exp(upper + 10))
        assert_close(log_std[member], log_var / 2)


@both_methods
def test_units_of_the_data(build, double):
    """Inputs are standardised by the rows given; targets (r, s' - s) stay in their own units."""
    method = build()
    batch = method.sample_data(30)
    inputs, targets = method.model.inputs_and_targets(batch)
    assert torch.equal(inputs, torch.cat([batch.obs, batch.action], 1))
    assert torch.equal(targets[:, 0], batch.reward)
    assert torch.equal(targets[:, 1:], batch.next_obs - batch.obs)
    inputs[:, 4] = 7.0  # a constant, whose deviation of 0 counts as 1
    method.model.set_statistics(inputs)
    x = method.model.standardise(inputs)
    assert_close(x.mean(0), torch.zeros(5))
    assert_close((x**2).mean(0), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))


@both_methods
def test_predict_by_all(build):
    """Every member at every row, from standardised inputs."""
    model = build().model
    model.input_mean.fill_(1.0)
    model.input_std.fill_(2.0)
    obs = torch.randn(6, 3)
    action = torch.randn(6, 2)
    mean, std = model.predict_by_all(obs, action)
    x = (torch.cat([obs, action], 1) - 1) / 2
    expected_mean, expected_log_std = model(torch.stack([x, x, x]))
    assert_close(mean, expected_mean)
    assert_close(std, expected_log_std.exp())


def members_that_say_their_number(build, log_std: float) -> nn.Module:
    """Member m of five predicts the reward m and, as the change, the standardised state."""
    model = build(ensemble_size=5, num_elites=5).elites

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        number = torch.arange(5.0)[:, None, None].expand(5, x.shape[1], 1)
        mean = torch.cat([number, x[..., :3]], -1)
        return mean, torch.full_like(mean, log_std)

    model.forward = forward
    model.input_mean.fill_(1.0)
    model.input_std.fill_(2.0)
    return model


@both_methods
@pytest.mark.parametrize("rows", [20, 23, 3])
def test_every_row_has_one_member(build, rows):
    """Rows come back in order and in units; members get equal shares; a row meets all of them."""
    model = members_that_say_their_number(build, log_std=-math.inf)  # no noise
    obs = torch.randn(rows, 3)
    share = math.ceil(rows / 5)
    missing = 5 * share - rows
    members = []
    for _ in range(60):
        member, next_obs = model.sample(obs, torch.zeros(rows, 2))
        assert_close(next_obs, obs + (obs - 1) / 2)
        members.append(member)
        counts = torch.stack([(member == number).sum() for number in range(5)])
        assert counts.sum() == rows
        assert counts.max() <= share
        assert counts.min() >= share - missing
    for row in range(rows):
        assert len(torch.stack(members)[:, row].unique()) == 5


@both_methods
def test_noise_of_the_model(build):
    """A deviation of 1/10 in every row: of the state, and of the reward, too."""
    model = members_that_say_their_number(build, log_std=-math.log(10))
    obs = torch.ones(9999, 3)  # where the mean change is 0
    reward, next_obs = model.sample(obs, torch.zeros(9999, 2))
    assert next_obs.mean().item() == pytest.approx(1, abs=0.01)
    assert next_obs.std().item() == pytest.approx(0.1, rel=0.05)
    assert (reward - reward.round()).std().item() == pytest.approx(0.1, rel=0.05)
    assert len(next_obs.unique()) > 9000


@both_methods
def test_first_weights_depend_on_seed_and_name(build):
    """The same seed gives the same networks, and no two networks start alike but the target."""
    one = copies(build(seed=3))
    assert changed(one, build(seed=3)) == set()
    other = build(seed=4)
    assert {"model", "elites", "actor", "critic"} <= changed(one, other)
    assert not torch.equal(other.critic.q1[0].weight, other.critic.q2[0].weight)
    assert not torch.equal(other.model.layers[0].weight[:2], other.elites.layers[0].weight)
    assert changed(copies(other.critic), other.critic_target) == set()
    assert not any(parameter.requires_grad for parameter in other.critic_target.parameters())


@both_methods
def test_act(build):
    """The mean of the Gaussian, through the tanh, without noise."""
    method = build()
    obs = np.random.default_rng(0).normal(size=(4, 3))
    mean, _ = method.actor(torch.tensor(obs, dtype=torch.float32))
    action = method.act(obs)
    assert action.dtype == np.float32
    assert_close(torch.from_numpy(action), torch.tanh(mean).detach())


# ===== Data, batches, D_model =====================================================================
@both_methods
def test_set_data(build, capsys):
    """D_env keeps all rows, with rewards as they are; the model has those with a known s'."""
    method = build()
    dataset = random_dataset(40, 3, 2)
    batch = method.split(method.data)
    assert torch.equal(batch.obs, dataset["obs"])
    assert torch.equal(batch.action, dataset["action"])
    assert torch.equal(batch.reward, dataset["reward"])
    assert torch.equal(batch.next_obs, dataset["next_obs"])
    assert batch.terminated.tolist() == 4 * (9 * [0.0] + [1.0])
    assert method.rows_with_next.tolist() == [row for row in range(40) if row % 10 != 9]
    assert "note: s' of 4 terminals is not stored" in capsys.readouterr().out


def numbered_batch(script: ModuleType, first: int, last: int):
    """Transitions whose rewards number them."""
    reward = torch.arange(first, last + 1).float()
    rows = len(reward)
    return script.Batch(
        obs=torch.full((rows, 3), 1.0),
        action=torch.full((rows, 2), 2.0),
        reward=reward,
        next_obs=torch.full((rows, 3), 3.0),
        terminated=torch.ones(rows),
    )


def empty_model_data(method: nn.Module, room: int) -> None:
    """Let D_model have room for so many rows, and none in it."""
    method.model_data = torch.zeros(room, 10)
    method.write_row.zero_()
    method.num_model_rows.zero_()


@both_methods
def test_remember(build):
    """In a room of ten rows, eight and then five: the last five wrap around over the oldest."""
    method = build()
    assert len(method.model_data) == 2 * 20 * 3  # phases, rollouts, steps
    empty_model_data(method, 10)
    method.remember(numbered_batch(script_of(method), 1, 8))
    assert method.split(method.model_data).reward.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    assert (method.write_row, method.num_model_rows) == (8, 8)
    method.remember(numbered_batch(script_of(method), 9, 13))
    stored = method.split(method.model_data)
    assert stored.reward.tolist() == [11, 12, 13, 4, 5, 6, 7, 8, 9, 10]
    assert (method.write_row, method.num_model_rows) == (3, 10)
    assert (stored.obs == 1).all()
    assert (stored.action == 2).all()
    assert (stored.next_obs == 3).all()
    assert (stored.terminated == 1).all()


@both_methods
@pytest.mark.parametrize("fraction, num_real", [(0.05, 102), (0.5, 1024), (1.0, 2048)])
def test_sample_mixed(build, fraction, num_real):
    """The first rows are of the data, the rest of the filled part of D_model, evenly."""
    method = build(batch_size=2048, real_fraction=fraction)
    method.data[:, 5] = -torch.arange(1.0, 41.0)  # the column of rewards
    empty_model_data(method, 10)
    method.remember(numbered_batch(script_of(method), 1, 8))
    reward = method.sample_mixed().reward
    assert len(reward) == 2048
    assert (reward[:num_real] < 0).all()
    assert (reward[num_real:] > 0).all()  # no row that is not filled yet
    assert not torch.equal(reward, method.sample_mixed().reward)
    if fraction == 0.05:
        numbers, counts = reward[num_real:].unique(return_counts=True)
        assert numbers.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        assert counts.min() > 180  # 243 of each, with a deviation of 15
    if fraction == 1.0:
        numbers, counts = reward.unique(return_counts=True)
        assert len(numbers) == 40
        assert counts.min() > 20  # 51 of each, with a deviation of 7


@both_methods
def test_sample_mixed_where_rand_rounds_up(build, monkeypatch):
    """A draw of (almost) 1 takes the last row of D_model and not the one after it."""
    method = build()
    empty_model_data(method, 10)
    method.remember(numbered_batch(script_of(method), 1, 8))

    def ones(count: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        return torch.ones(count, device=device, dtype=dtype)

    monkeypatch.setattr(torch, "rand", ones)
    assert method.sample_mixed().reward[4:].tolist() == 12 * [8]


# ===== Steps and rollouts in the model ============================================================
def test_the_least_trusted_of_seven_members_sets_the_penalty():
    """Five of seven are elites; u asks all seven, and has the units of the data."""
    method = build_mopo(ensemble_size=7, num_elites=5)
    output_layer = method.model.layers[4]
    output_layer.weight.data.zero_()
    output_layer.bias.data[:, 0, 0] = 1000 * torch.arange(7.0)  # the mean of the reward
    output_layer.bias.data[:, 0, 1] = torch.arange(7.0)  # the mean of an entry of s' - s
    output_layer.bias.data[:6, 0, 4:] = -100.0  # log-variances: the bounds make of them -10
    output_layer.bias.data[6, 0, 4:] = 100.0  # and 0.5
    method.choose_elites(torch.arange(7.0))
    assert method.elites.layers[4].bias[:, 0, 1].tolist() == [0, 1, 2, 3, 4]
    obs = torch.randn(5, 3)
    action = torch.rand(5, 2)
    # Member 6 has the deviation exp(0.25) in reward and three entries: sqrt(4) exp(0.25).
    u = method.uncertainty(obs, action)
    assert_close(u, torch.full((5,), 2 * math.exp(0.25)), atol=1e-3, rtol=0)
    # Next states say 0 to 6, around 3. The reward does not count.
    method.args.penalty = "disagreement"
    u = method.uncertainty(obs, action)
    assert_close(u, torch.full((5,), 3.0), atol=1e-3, rtol=0)


def method_that_counts(build, monkeypatch, **settings) -> nn.Module:
    """Rollouts begin at 100, 200, ...; the model adds 1, and 102, 202, ... are terminal.

    The reward of a step from s is s / 1000. D_model is empty.
    """
    method = build(horizon=5, rollout_starts=600, **settings)

    def sample(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return obs[:, 0] / 1000, obs + 1

    def ends(env_id: str, next_obs: Tensor) -> Tensor:
        assert env_id == "halfcheetah-medium-v2"
        return next_obs[:, 0] % 100 == 2

    method.elites.sample = sample
    monkeypatch.setattr(script_of(method), "known_termination", ends)
    method.data[:, 0] = 100 * torch.arange(1, 41)
    method.obs_limit.fill_(1e9)
    method.write_row.zero_()
    method.num_model_rows.zero_()
    return method


@both_methods
def test_rollout(build, monkeypatch):
    """600 rollouts of five steps; the ending step is kept, then a new one starts in its place."""
    method = method_that_counts(build, monkeypatch)
    method.args.penalty_coef = 0.0
    logs = method.rollout()
    # Each rollout ends at its second step: at steps 2 and 4 of the five.
    assert logs["rollout/terminated_frac"].item() == pytest.approx(2 / 5)
    assert method.num_model_rows == 5 * 600
    assert len(method.model_data) == 2 * 5 * 600
    all_rows = method.split(method.model_data[:3000])
    assert logs["rollout/reward"].item() == pytest.approx(all_rows.reward.mean().item())

    # On a CPU 500 go through all their steps before the other 100 begin.
    for first, count in ((0, 500), (2500, 100)):
        rows = method.split(method.model_data[first : first + 5 * count])
        obs = rows.obs[:, 0].view(5, count)  # [step, rollout]
        assert torch.equal(rows.next_obs[:, 0].view(5, count), obs + 1)
        assert_close(rows.reward.view(5, count), obs / 1000)
        for rollout in range(0, count, 50):
            assert (obs[:, rollout] % 100).tolist() == [0, 1, 0, 1, 0]
            assert rows.terminated.view(5, count)[:, rollout].tolist() == [0, 1, 0, 1, 0]
        assert torch.equal(obs[1], obs[0] + 1)
        assert not torch.equal(obs[2], obs[0])  # other states of the data than at first
        for step in (0, 2, 4):  # all over the data
            assert len(obs[step].unique()) > 30
            assert obs[step].min() >= 100


@pytest.mark.parametrize("penalty_coef", [0.0, 2.0])
def test_rollout_with_penalty(penalty_coef, monkeypatch):
    """A reward loses lambda u of its own state and action; a lambda of 0 does not ask for u."""
    method = method_that_counts(build_mopo, monkeypatch, penalty_coef=penalty_coef)
    asked = []

    def uncertainty(obs: Tensor, action: Tensor) -> Tensor:
        asked.append(len(obs))
        return obs[:, 0] / 1000 + action[:, 0].square()

    method.uncertainty = uncertainty
    logs = method.rollout()
    rows = method.split(method.model_data[:3000])
    u = rows.obs[:, 0] / 1000 + rows.action[:, 0].square()
    assert_close(rows.reward, rows.obs[:, 0] / 1000 - penalty_coef * u)
    # The log has the reward as the model says it, and u.
    assert logs["rollout/reward"].item() == pytest.approx(rows.obs[:, 0].mean().item() / 1000)
    if penalty_coef > 0:
        assert asked == 5 * [500] + 5 * [100]
        assert logs["rollout/penalty"].item() == pytest.approx(u.mean().item())
    else:
        assert asked == []
        assert "rollout/penalty" not in logs


@both_methods
def test_rollout_actions(build):
    """Every row has an action of its own: one of the policy, or one from all over the box."""
    method = build(rollout_starts=500)
    for parameter in method.actor.parameters():
        parameter.data.zero_()
    method.actor.net[-1].bias.data = torch.tensor([1.0, -1.0, -20.0, -20.0])  # hardly any noise
    method.rollout()
    action = method.split(method.model_data[1500:3000]).action
    assert_close(action, torch.tensor([[1.0, -1.0]]).tanh().expand(1500, 2), atol=1e-5, rtol=0)

    method.args.rollout_actions = "uniform"
    method.rollout()
    action = method.split(method.model_data[:1500]).action
    assert len(action.unique(dim=0)) == 1500
    assert -1 <= action.min() < -0.99
    assert 0.99 < action.max() < 1
    # A uniform variable on [-1, 1] has the mean 0 and the variance 1 / 3.
    assert action.mean().item() == pytest.approx(0, abs=0.05)
    assert action.var().item() == pytest.approx(1 / 3, abs=0.02)


@both_methods
def test_imagined_steps_that_end(build):
    """NaN, infinity, more than twice the data's largest |s| (at least 100), or the task's rule."""
    method = build()
    dataset = random_dataset(2, 3, 2)
    dataset["obs"] = torch.tensor([[1.0, -60.0, 4.0], [0.0, 1.0, 0.0]])
    dataset["next_obs"] = torch.tensor([[3.0, 1.0, 70.0], [0.0, -4.0, 0.0]])
    method.set_data(dataset)
    assert method.obs_limit.tolist() == [100, 120, 140]
    steps = [
        # reward, next_obs, ended by the task's rule -> reward, next_obs, terminated
        (3.0, [100.0, -120.0, 0.0], False, 3.0, [100, -120, 0], 0),  # on the limits
        (3.0, [0.0, 121.0, 0.0], False, 3.0, [0, 120, 0], 1),
        (3.0, [0.0, 0.0, -1e30], False, 3.0, [0, 0, -140], 1),
        (3.0, [math.nan, 0.0, 0.0], False, 3.0, [0, 0, 0], 1),
        (3.0, [math.inf, 0.0, 0.0], False, 3.0, [100, 0, 0], 1),
        (math.nan, [1.0, 2.0, 3.0], False, 0.0, [1, 2, 3], 0),
        (math.inf, [1.0, 2.0, 3.0], False, 0.0, [1, 2, 3], 0),
        (3.0, [1.0, 2.0, 3.0], True, 3.0, [1, 2, 3], 1),  # a real end
    ]
    for reward, next_obs, ended, expected_reward, expected_next_obs, terminated in steps:
        step = method.end_outside_data(
            torch.tensor([reward]), torch.tensor([next_obs]), torch.tensor([ended])
        )
        answer = [tensor.tolist() for tensor in step]
        assert answer == [[expected_reward], [expected_next_obs], [terminated]]


@both_methods
def test_imagine(build):
    """A step of the elites, not of all members; hopper's rule looks at s', also beyond the limit.

    Hopper stands while its height is above 0.7, its angle within 0.2 and the rest within 100.
    """
    method = build(env_id="hopper-medium-v2")
    states = torch.tensor([[0.71, 0.1, 0.0], [0.69, 0.1, 0.0], [1.0, 0.21, 0.0], [1.0, 0.1, 150.0]])
    method.obs_limit.fill_(120.0)

    def sample(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return action[:, 0], obs

    method.elites.sample = sample
    action = torch.rand(4, 2)
    reward, next_obs, terminated = method.imagine(states, action)
    assert torch.equal(reward, action[:, 0])
    assert torch.equal(next_obs, states.clamp(max=120.0))
    assert terminated.tolist() == [0, 1, 1, 1]


# ===== One iteration ==============================================================================
class NaiveIteration:
    """An iteration of SAC once more, row by row where that is plainer, with copies of the networks.

    The random numbers are drawn in the order of the method, so that both draw the same.
    """

    def __init__(self, method: nn.Module):
        self.method = method
        self.actor = copy.deepcopy(method.actor)
        self.critic = copy.deepcopy(method.critic)
        self.critic_target = copy.deepcopy(method.critic_target)
        self.log_alpha = nn.Parameter(method.log_alpha.detach().clone())
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), 0.01)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), 0.02)
        self.temperature_adam = torch.optim.Adam([self.log_alpha], 0.03)

    def __call__(self) -> None:
        """Four of sixteen rows are data."""
        rows = self.method.data[torch.randint(40, (4,))]
        filled = int(self.method.num_model_rows)
        imagined = self.method.model_data[(torch.rand(12) * filled).long()]
        batch = self.method.split(torch.cat([rows, imagined]))
        assert 0 < batch.terminated.sum() < 16
        alpha = self.log_alpha.exp().item()

        self.critic_adam.zero_grad()
        self.critic_loss(batch, alpha).backward()
        self.critic_adam.step()

        # The policy's loss is that of the critics after their step.
        action, log_prob = self.sample(batch.obs)
        q1, q2 = self.q_values(self.critic, batch.obs, action)
        self.actor_loss = (alpha * log_prob - torch.minimum(q1, q2)).mean()
        self.actor_adam.zero_grad()
        self.actor_loss.backward()
        self.actor_adam.step()

        # alpha rises where the entropy is below its target of 0.5.
        self.entropy = -log_prob.mean().item()
        self.log_alpha.grad = torch.tensor(self.entropy - 0.5)
        self.temperature_adam.step()

        for slow, fast in zip(self.critic_target.parameters(), self.critic.parameters()):
            slow.data = 0.75 * slow.data + 0.25 * fast.data

    def critic_loss(self, batch, alpha: float) -> Tensor:
        """SAC's, with the entropy of the next action."""
        with torch.no_grad():
            next_action, next_log_prob = self.sample(batch.next_obs)
            q1, q2 = self.q_values(self.critic_target, batch.next_obs, next_action)
        targets = []
        for row in range(16):
            target = batch.reward[row]
            if batch.terminated[row] == 0:
                value = min(q1[row], q2[row]) - alpha * next_log_prob[row]
                target = target + 0.9 * value
            targets.append(target)
        target = torch.stack(targets)
        q1, q2 = self.q_values(self.critic, batch.obs, batch.action)
        self.mean_q = torch.stack([q1, q2]).mean().detach()
        self.bellman_error = ((q1 - target) ** 2).mean() / 2 + ((q2 - target) ** 2).mean() / 2
        return self.bellman_error

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(obs)
        u = mean + log_std.exp() * torch.randn(len(obs), 2)
        action = torch.tanh(u)
        log_slope = -2 * torch.log(torch.cosh(u))  # of the tanh, whose slope is 1 / cosh^2
        log_density = Normal(mean, log_std.exp()).log_prob(u) - log_slope
        return action, log_density.sum(1)

    def q_values(self, critic: nn.Module, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.cat([obs, action], 1)
        return critic.q1(pair)[:, 0], critic.q2(pair)[:, 0]


# Rates so large that a few iterations show.
FAST = {
    "gamma": 0.9,
    "tau": 0.25,
    "actor_lr": 0.01,
    "critic_lr": 0.02,
    "alpha_lr": 0.03,
    "target_entropy": 0.5,
}


def method_for_iterations(build, **settings) -> nn.Module:
    """Some steps in the model end, alpha is 0.5, and the target is unlike the critic."""
    method = build(**(FAST | settings))
    method.obs_limit.fill_(1.5)
    method.rollout()
    method.log_alpha.data.fill_(-math.log(2))
    method.critic_target.q1[-1].bias.data += 0.5
    method.critic_target.q2[0].weight.data *= 1.5
    return method


def test_iterate_against_a_naive_one(double):
    """Networks, temperature, target and logs are the same for several iterations."""
    method = method_for_iterations(build_mopo)
    naive = NaiveIteration(method)
    for number in range(4):
        alpha = naive.log_alpha.exp().item()
        torch.manual_seed(number)
        naive()
        torch.manual_seed(number)
        before = copies(method)
        logs = method.iterate()
        assert changed(before, method) == {"actor", "critic", "critic_target", "log_alpha"}
        for name in ("actor", "critic", "critic_target"):
            assert_close(copies(getattr(method, name)), copies(getattr(naive, name)))
        assert_close(method.log_alpha, naive.log_alpha)
        assert logs.keys() == {
            "losses/critic_loss",
            "losses/q_values",
            "losses/actor_loss",
            "losses/entropy",
            "losses/alpha",
        }
        assert_close(logs["losses/critic_loss"], naive.bellman_error.detach())
        assert_close(logs["losses/q_values"], naive.mean_q)
        assert_close(logs["losses/actor_loss"], naive.actor_loss.detach())
        assert logs["losses/entropy"].item() == pytest.approx(naive.entropy)
        assert logs["losses/alpha"].item() == pytest.approx(alpha)


# ===== Fitting the model ==========================================================================
@both_methods
def test_model_step_against_a_naive_one(build, double):
    """Member by member: rows of its own, its loss, the bounds' gap, the decay of each layer."""
    decay = (0.1, 0.2, 0.3, 0.4, 0.5)
    method = build(model_lr=0.01, model_weight_decay=decay)
    naive = copy.deepcopy(method.model)
    others = [naive.max_log_var, naive.min_log_var]
    groups = []
    for layer, rate in zip(naive.layers, decay):
        groups.append({"params": [layer.weight], "weight_decay": rate})
        others.append(layer.bias)
    groups.append({"params": others, "weight_decay": 0.0})
    adam = torch.optim.Adam(groups, 0.01)
    inputs = torch.randn(50, 5)
    targets = torch.randn(50, 4)
    order = torch.stack([torch.randperm(50)[:40] for _ in range(3)])  # of each member
    position = torch.zeros((), dtype=torch.long)
    for number in range(3):
        logs = method.model_step(inputs, targets, order, position)
        # The third batch has columns 32 to 39 and, since the rows are at their end, 0 to 7.
        columns = [column % 40 for column in range(16 * number, 16 * number + 16)]
        total = 0.0
        for member in range(3):
            rows = order[member, columns]
            x = inputs[rows].expand(3, 16, 5)
            mean, log_std = naive(x)
            for row in range(16):
                error = (mean[member, row] - targets[rows[row]]) ** 2
                nll = error / log_std[member, row].exp() ** 2 + 2 * log_std[member, row]
                total = total + nll.mean() / 16
        assert logs["model/train_nll"].item() == pytest.approx(total.item() / 3)
        bounds = 0.01 * naive.max_log_var.sum() - 0.01 * naive.min_log_var.sum()
        adam.zero_grad()
        (total + bounds).backward()
        adam.step()
        assert_close(copies(method.model), copies(naive))


@both_methods
def test_epochs_over_bootstrap_samples(build):
    """Each member draws 80 of 80 rows with replacement, and sees them once an epoch, reordered."""
    method = build(model_max_epochs=3)
    dataset = random_dataset(90, 3, 2)
    dataset["reward"] = torch.arange(90.0)  # numbers the rows
    dataset["has_next"] = torch.ones(90, dtype=torch.bool)
    method.set_data(dataset)
    seen = []
    plain = method.fit_loss

    def fit_loss(x: Tensor, y: Tensor) -> Tensor:
        rows = y[..., 0].long()
        seen.append(rows)
        inputs = method.data[rows, :5]
        assert_close(x, (inputs - method.model.input_mean) / method.model.input_std)
        return plain(x, y)

    method.fit_loss = fit_loss
    method.fit_model(ignore_progress)
    held_out, train_rows = method.split_rows(90)
    assert sorted([*held_out.tolist(), *train_rows.tolist()]) == list(range(90))
    assert len(held_out) == 10

    epochs = torch.cat(seen, 1).view(3, 3, 80)  # [member, epoch, rows]
    orders = epochs.flatten(0, 1)
    assert len(orders.unique(dim=0)) == 9  # no two the same
    counts = torch.zeros(3, 3, 90)
    counts.scatter_add_(2, epochs, torch.ones(3, 3, 80))
    assert torch.equal(counts, counts[:, :1].expand(3, 3, 90))  # the same rows in all epochs
    assert not torch.equal(counts[0], counts[1])  # but others for each member
    assert not counts[..., held_out].any()
    # With replacement a row is there with 1 - 1 / e = 0.63; without, all were.
    assert (counts[..., train_rows] > 0).float().mean().item() == pytest.approx(0.63, abs=0.1)


@both_methods
def test_the_last_batch_of_an_epoch_is_filled_up(build):
    """80 rows in batches of 32: the third has 16 rows, and the first 16 once more."""
    method = build(model_max_epochs=2, model_batch_size=32)
    dataset = random_dataset(90, 3, 2)
    dataset["reward"] = torch.arange(90.0)
    dataset["has_next"] = torch.ones(90, dtype=torch.bool)
    method.set_data(dataset)
    seen = []
    plain = method.fit_loss

    def fit_loss(x: Tensor, y: Tensor) -> Tensor:
        seen.append(y[..., 0])
        return plain(x, y)

    method.fit_loss = fit_loss
    method.fit_model(ignore_progress)
    assert len(seen) == 2 * 3
    for epoch in (seen[:3], seen[3:]):
        rows = torch.cat(epoch, 1)
        assert torch.equal(rows[:, 80:], rows[:, :16])


@both_methods
def test_held_out_rows(build):
    """1000 rows by default, but no more than a fifth; drawn by the seed alone."""
    assert script_of(build()).Args().holdout_size == 1000
    method = build(holdout_size=1000)
    assert [len(rows) for rows in method.split_rows(100_000)] == [1000, 99_000]
    assert [len(rows) for rows in method.split_rows(42)] == [8, 34]
    first, _ = method.split_rows(100)
    assert torch.equal(first, method.split_rows(100)[0])
    assert not torch.equal(first, build(seed=1, holdout_size=1000).split_rows(100)[0])


@both_methods
def test_statistics_are_of_the_rows_to_train_on(build):
    """Neither the held-out rows nor those without a known s' touch the units of the inputs."""
    method = build(model_max_epochs=1)
    method.data[9::10] = 1e6  # the last rows of episodes
    held_out, train_rows = method.split_rows(36)
    method.data[method.rows_with_next[held_out]] += 1000
    method.fit_model(ignore_progress)
    inputs = method.data[method.rows_with_next[train_rows], :5]
    for model in (method.model, method.elites):
        assert_close(model.input_mean, inputs.mean(0))
        assert_close(model.input_std, inputs.std(0, correction=0))


@both_methods
def test_the_squared_error_ranks_members(build):
    """Member 0 errs by 0.1 and is absurdly sure of it (likelihood: the worst), 1 by 1, 2 by 2."""
    method = build(num_elites=1)
    offset = torch.tensor([0.1, 1.0, 2.0])[:, None, None]
    sure = torch.tensor([-4.0, 0.0, 0.0])[:, None, None]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., :4] + offset, sure

    method.model.forward = forward
    inputs = torch.randn(50, 5)
    error = method.holdout_error(inputs, inputs[:, :4])
    assert_close(error, torch.tensor([0.01, 1.0, 4.0]), atol=1e-5, rtol=1e-5)
    method.choose_elites(error)
    assert torch.equal(method.elites.layers[2].weight[0], method.model.layers[2].weight[0])


ERRORS = [  # of three members after each epoch
    [1.0, 1.0, 0.5],
    [0.995, 0.98, 0.6],  # member 0 gains 0.5 %, too little; member 1 gains 2 %
    [0.989, 0.975, math.nan],  # member 0 gains 1.1 % of 1; member 1 0.5 % of 0.98
    [0.985, 0.972, 0.5],  # 0.4 % of 0.989 and 0.8 % of 0.98: nobody
    [2.0, 2.0, 2.0],
    [2.0, 2.0, 2.0],  # the third idle epoch
    [0.1, 0.1, 0.1],  # never reached
]


@both_methods
def test_when_a_fit_stops_and_what_it_keeps(build):
    """Patience 3: a gain is more than 1 % of the member's best; each keeps its best epoch.

    The errors are given, and after epoch n all parameters are n.
    """
    method = build(model_patience=3)
    epochs = []
    steps = []
    reports = []
    _, train_rows = method.split_rows(36)

    def model_step(inputs, targets, order, position):
        assert set(order.flatten().tolist()) <= set(train_rows.tolist())
        steps.append(int(position))
        return {}

    def holdout_error(inputs, targets):
        assert len(inputs) == len(targets) == 36 // 5
        epochs.append(inputs)
        for parameter in method.model.parameters():
            parameter.data.fill_(len(epochs))
        return torch.tensor(ERRORS[len(epochs) - 1])

    def progress(phase, done, total, logs):
        reports.append((done, logs["model/idle_epochs"]))

    method.model_step = model_step
    method.holdout_error = holdout_error
    error = method.fit_model(progress)
    assert_close(error, torch.tensor([0.989, 0.98, 0.5]))
    assert steps == 12 * [0]  # 29 rows are two batches of 16; each epoch begins at the front
    assert reports == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 3)]
    # The weights of the epoch with the best error; of the elites the lowest error comes first.
    assert_constant_members(method.model, [3, 2, 1])
    assert_constant_members(method.elites, [1, 2])
    for model in (method.model, method.elites):  # the bounds are not restored
        assert (model.max_log_var == 6).all()
        assert (model.min_log_var == 6).all()


def assert_constant_members(model: nn.Module, values: list[float]) -> None:
    """All weights and biases of a member are its value."""
    for layer in model.layers:
        for parameter in layer.parameters():
            for member, value in zip(parameter, values, strict=True):
                assert (member == value).all()


@both_methods
def test_a_fit_ends_at_its_last_epoch(build):
    """--model-max-epochs, also where every epoch is better than the one before."""
    method = build(model_max_epochs=4)
    errors = [5.0, 4.0, 3.0, 2.0, 1.0]

    def holdout_error(inputs, targets):
        return torch.full((3,), errors.pop(0))

    method.holdout_error = holdout_error
    assert method.fit_model(ignore_progress).tolist() == 3 * [2.0]


@both_methods
def test_elites_predict_as_their_members(build):
    """The elites are copies of members 2 and 0, in this order, and of the model's units."""
    method = build()
    method.model.input_mean += 1.0
    method.model.max_log_var.data += 0.5
    method.choose_elites(torch.tensor([2.0, 9.0, 1.0]))
    x = torch.randn(1, 6, 5)
    mean, log_std = method.model(x.expand(3, 6, 5))
    elite_mean, elite_log_std = method.elites(x.expand(2, 6, 5))
    assert_close(elite_mean, mean[[2, 0]])
    assert_close(elite_log_std, log_std[[2, 0]])
    assert torch.equal(method.elites.input_mean, method.model.input_mean)


# ===== The generalisation tasks ===================================================================
@both_scripts
def test_halfcheetah_jump(script):
    """min(velocity, 3) - 0.1 |a|^2 + 15 (height - first height), from the simulator's own state."""
    assert script.make_env("halfcheetah-jump-v0").spec.max_episode_steps == 1000
    env = script.HalfCheetahJumpEnv()
    env.reset(seed=0)
    data = env.unwrapped.data
    torso = data.body("torso")
    first_height = torso.xpos[2]
    rng = np.random.default_rng(0)
    velocities = []
    for step in range(40):
        data.qvel[0] += 10 * (-1) ** step  # beyond the cap, and far on its other side
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        x = data.qpos[0]
        obs, reward, terminated, truncated, info = env.step(action)
        velocity = (data.qpos[0] - x) / 0.05
        velocities.append(velocity)
        behaviour = min(velocity, 3.0) - 0.1 * (action**2).sum()
        assert info["behaviour_reward"] == pytest.approx(behaviour, abs=1e-6)
        assert reward == pytest.approx(behaviour + 15 * (torso.xpos[2] - first_height), abs=1e-6)
        assert not terminated
        assert np.array_equal(obs, np.concatenate([data.qpos[1:], [torso.xpos[2]], data.qvel]))
    assert min(velocities) < -3
    assert max(velocities) > 3


@both_scripts
def test_ant_angle(script):
    """The velocity at 30 degrees to the x axis, less the costs of Ant, plus 1."""
    assert script.make_env("ant-angle-v0").spec.max_episode_steps == 1000
    env = script.AntAngleEnv()
    env.reset(seed=0)
    data = env.unwrapped.data
    torso = data.body("torso")
    rng = np.random.default_rng(0)
    all_contacts = []
    for _ in range(60):
        action = rng.uniform(-1, 1, 8).astype(np.float32)
        place = torso.xpos[:2].copy()
        obs, reward, terminated, truncated, info = env.step(action)
        vx, vy = (torso.xpos[:2] - place) / 0.05
        contacts = (np.clip(data.cfrc_ext, -1, 1) ** 2).sum()
        all_contacts.append(contacts)
        rest = 1 - 0.5 * (action**2).sum() - 0.0005 * contacts
        along = vx * np.sqrt(0.75) + vy * 0.5  # cosine and sine of 30 degrees
        assert info["behaviour_reward"] == pytest.approx(vx + rest, abs=1e-6)
        assert reward == pytest.approx(along + rest, abs=1e-6)
        ended = script.known_termination("ant-angle-v0", torch.tensor(obs))
        assert terminated == ended.item()
        assert np.array_equal(obs, np.concatenate([data.qpos[2:], data.qvel]))
    assert max(all_contacts) > 1


# ===== Settings ===================================================================================
@both_scripts
def test_settings_of_the_paper(script):
    """A value for each flag in each row; the generalisation tasks have 3000 epochs."""
    assert len(script.PAPER) == 26
    fields = {field.name for field in dataclasses.fields(script.Args)}
    assert set(script.PAPER_FLAGS) <= fields
    for env_id, row in script.PAPER.items():
        assert len(row) == len(script.PAPER_FLAGS), env_id
        args = script.task_args(env_id)
        script.check_args(args)
        for name, value in zip(script.PAPER_FLAGS, row):
            assert getattr(args, name) == value
        generalises = env_id in ("halfcheetah-jump-v0", "ant-angle-v0")
        assert args.total_iterations == (3_000_000 if generalises else 1_000_000)


def test_settings_that_contradict_each_other():
    with pytest.raises(SystemExit, match="--num-elites is larger than --ensemble-size"):
        mopo.check_args(mopo.Args(num_elites=8))
    with pytest.raises(SystemExit, match="--penalty-coef is -1.0, but must be at least 0"):
        mopo.check_args(mopo.Args(penalty_coef=-1.0))
    alone = {"penalty": "disagreement", "ensemble_size": 1, "num_elites": 1}
    with pytest.raises(SystemExit, match="--penalty disagreement needs two members"):
        mopo.check_args(mopo.Args(**alone))
    mopo.check_args(mopo.Args(**alone, penalty_coef=0.0))


# ===== Runs =======================================================================================
# Everything small: a run takes a second and learns nothing. Checkpoints are at 4, 8 and 12,
# rollouts come before iterations 1, 6 and 11.
RUN = {
    "env_id": "maze2d-umaze-dense-v1",
    "total_iterations": 12,
    "eval_every": 6,
    "eval_episodes": 1,
    "final_episodes": 2,
    "log_every": 1,
    "checkpoint_every": 4,
    "rollout_every": 5,
    "rollout_starts": 20,
    "rollout_retain": 2,
    "horizon": 3,
    "batch_size": 16,
    "real_fraction": 0.25,
    "hidden": (8, 8),
    "ensemble_size": 3,
    "num_elites": 2,
    "model_hidden": 8,
    "model_max_epochs": 2,
    "holdout_size": 30,
    "threads": 1,
    "cuda": False,
    "cpu_fast_matmul": False,
}


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    """300 rows, of which 285 are not at a time limit."""
    return write_dataset(tmp_path_factory.mktemp("data") / "data.hdf5", {})


@pytest.fixture(scope="module")
def train(tmp_path_factory, dataset_path, short_episodes):
    """train(script, **changes) -> the run's folder. No pictures: they take most of the time."""

    def run(script: ModuleType, **changes) -> Path:
        place = tmp_path_factory.mktemp("runs")
        settings = RUN | {"dataset_path": dataset_path, "run_dir": str(place)} | changes
        return Path(script.train(script.Args(**settings))["folder"])

    with pytest.MonkeyPatch.context() as patch:
        for script in (mopo, combo):
            patch.setattr(script.Run, "plot_curves", lambda run: None)
        yield run


@pytest.fixture(scope="module")
def whole(train):
    """The folders of runs that nothing disturbed."""
    return {mopo: train(mopo), combo: train(combo)}


def resume(script: ModuleType, folder: Path, **changes) -> Path:
    """Go on with the run in a folder."""
    args = script.load_args(folder)
    script.train(dataclasses.replace(args, resume=str(folder), **changes))
    return folder


# The calls of Run.log: 0 and 1 are the fit, 2 to 7 iterations 1 to 6, 8 the evaluation, 9 to 14
# iterations 7 to 12, 15 the last evaluation.
@both_scripts
@pytest.mark.parametrize("call, iteration", [(6, 4), (8, 4), (11, 8), (15, 8)])
def test_resume_is_exact_wherever_the_run_was_cut(script, call, iteration, train, whole, tmp_path):
    """Between two rollouts and before one, at an evaluation and at the end."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script.Run, "log", before_call(call, script.Run.log, die))
        train(script, run_dir=str(tmp_path))
    folder = folder_in(tmp_path)
    assert saved(folder)["iteration"] == iteration
    assert_same_run(resume(script, folder), whole[script])


@both_scripts
def test_a_finished_run_goes_on(script, train, whole):
    """To a larger --total-iterations as if it had been so long."""
    folder = train(script, total_iterations=6)
    assert_same_run(resume(script, folder, total_iterations=12), whole[script])


@both_scripts
def test_dynamics_from(script, train, whole):
    """A run with another run's model goes on as that one did, bit for bit, without a fit."""
    second = train(script, dynamics_from=str(whole[script]))
    assert flat(saved(second)) == flat(saved(whole[script]))
    assert result(second)["final_scores"] == result(whole[script])["final_scores"]
    assert "model/train_nll" not in points(second)


def test_combo_takes_mopos_model(train, whole, capsys):
    """In silence, since their models are alike."""
    train(combo, dynamics_from=str(whole[mopo]))
    assert "was fitted" not in capsys.readouterr().out


@both_scripts
def test_seeds(script, train, whole):
    """The same seed gives the same run, however often it is evaluated, logged and saved."""
    base = saved(whole[script])
    again = saved(train(script, eval_every=5, log_every=7, checkpoint_every=3))
    for part in ("method", "optimizers", "rng"):
        assert flat(again[part]) == flat(base[part])
    other = saved(train(script, seed=1))["method"]
    drawn = [name for name, value in base["method"].items() if value.dim() > 1]
    assert [name for name in drawn if torch.equal(base["method"][name], other[name])] == []


@both_scripts
def test_evaluate(script, whole, capsys, monkeypatch):
    """--evaluate: the saved policy gets the scores that the run gave it."""
    argv = [f"{script.__name__}.py", "--evaluate", str(whole[script])]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    scores = np.array(result(whole[script])["final_scores"])
    assert f"normalized score over 2 episodes: {scores.mean():.1f}" in capsys.readouterr().out


def steps_shown(folder: Path) -> dict[str, list[int]]:
    """The steps of each of TensorBoard's tags."""
    shown = {}
    for tag, values in points(folder).items():
        shown[tag] = [step for step, _ in values]
    return shown


def test_log(whole):
    """What TensorBoard shows: a phase's points follow the iteration's."""
    every = list(range(1, 13))
    assert steps_shown(whole[mopo]) == {
        "losses/critic_loss": every,
        "losses/q_values": every,
        "losses/actor_loss": every,
        "losses/entropy": every,
        "losses/alpha": every,
        "rollout/terminated_frac": every,
        "rollout/reward": every,
        "rollout/penalty": every,
        "eval/normalized_score": [6, 12],
        "model/train_nll": [1, 2],
        "model/holdout_error": [1, 2],
        "model/idle_epochs": [1, 2],
    }
    assert points(whole[mopo])["losses/alpha"][0][1] == 1  # alpha starts at 1


SCHEDULE = [
    "fit",
    ("rollout", 2, 0),
    "rollout",
    ("iterations", 2, 0),
    "iterate",
    "iterate",
    "iterate",
    ("rollout", 2, 3),
    "rollout",
    ("iterations", 2, 3),
    "iterate",
    ("evaluate", 1, 4),  # episodes, iterations done
    "iterate",
    "iterate",
    ("evaluate", 1, 6),
    ("evaluate", 2, 0),  # the last evaluation
]


@pytest.mark.parametrize("kind", [mopo.MOPO, combo.COMBO])
def test_what_happens_at_which_iteration(kind, dataset_path, tmp_path, monkeypatch):
    """The schedule of Algorithm 1, of the seeds and of the evaluations, in six iterations."""
    script = sys.modules[kind.__module__]
    events = []
    plain_reseed = script.reseed

    class Spy(kind):
        def fit_model(self, progress):
            events.append("fit")
            return torch.arange(3.0)

        def rollout(self):
            events.append("rollout")
            return super().rollout()

        def iterate(self):
            events.append("iterate")
            return super().iterate()

    def reseed(seed, phase, k=0):
        plain_reseed(seed, phase, k)
        if phase in ("rollout", "iterations"):
            events.append((phase, seed, k))

    def evaluate(method, args, episodes, k):
        events.append(("evaluate", episodes, k))
        return np.zeros(episodes)

    monkeypatch.setattr(script, "reseed", reseed)
    monkeypatch.setattr(script, "evaluate", evaluate)
    changes = {"seed": 2, "total_iterations": 6, "rollout_every": 3, "eval_every": 4}
    settings = RUN | {"dataset_path": dataset_path, "run_dir": str(tmp_path)} | changes
    script.train(script.Args(**settings), Spy)
    assert events == SCHEDULE


# ===== A class of one's own =======================================================================
# The settings of RUN but for the task.
SMALL_RUN = {name: value for name, value in RUN.items() if name != "env_id"}


@dataclasses.dataclass
class REDQArgs(mopo.Args):
    num_critics: mopo.Count = 4  # critics, of which a target takes two
    log_std: float = -1.0  # with which the policy's deviation starts


class ManyCritics(nn.Module):
    """[B, S], [B, A] -> [K, B]."""

    def __init__(self, obs_dim: int, action_dim: int, args: REDQArgs):
        super().__init__()
        critics = [mopo.mlp(obs_dim + action_dim, args.hidden, 1) for _ in range(args.num_critics)]
        self.critics = nn.ModuleList(critics)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        return torch.cat([critic(x) for critic in self.critics], -1).T


class SharedStdPolicy(mopo.GaussianPolicy):
    """The deviation is a parameter, the same at all states."""

    def __init__(self, obs_dim: int, action_dim: int, args: REDQArgs):
        super().__init__(obs_dim, action_dim, args)
        self.net = mopo.mlp(obs_dim, args.hidden, action_dim)
        self.log_std = nn.Parameter(torch.full((action_dim,), args.log_std))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.net(obs)
        return mean, self.log_std.expand_as(mean)


class REDQ(mopo.MOPO):
    """A target takes the minimum over a random pair of critics."""

    Critic = ManyCritics
    Policy = SharedStdPolicy

    @torch.no_grad()
    def q_target(self, batch: mopo.Batch, alpha: Tensor) -> Tensor:
        next_action, next_log_prob = self.actor.sample(batch.next_obs)
        q_next = self.critic_target(batch.next_obs, next_action)
        pair = torch.rand(len(q_next), device=self.device).argsort()[:2]
        return mopo.soft_target(batch, q_next[pair], next_log_prob, alpha, self.args.gamma)


def train_on_pendulum(tmp_path, method: type, **flags) -> dict:
    """Train a class of mopo.py or combo.py with its own settings. -> result.json"""
    script = sys.modules[method.mro()[-3].__module__]  # before nn.Module and object
    settings = flags.pop("settings", script.Args)
    flags = SMALL_RUN | {"run_dir": str(tmp_path)} | flags
    args = script.task_args("Pendulum-v1", settings, **flags)
    return script.train(args, method, arrays_of("Pendulum-v1", 200))


def test_a_class_of_ones_own(tmp_path):
    """It trains, goes on bit for bit, scores the same from policy.pt, and takes few lines."""
    own = {"settings": REDQArgs}
    whole = train_on_pendulum(tmp_path / "a", REDQ, **own)
    first = train_on_pendulum(tmp_path / "b", REDQ, total_iterations=8, **own)
    resumed = train_on_pendulum(tmp_path / "b", REDQ, resume=first["folder"], **own)
    one = tensors_of(whole["folder"])
    two = tensors_of(resumed["folder"])
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert resumed["final_scores"] == whole["final_scores"]
    assert "critic.critics.3.0.weight" in one
    assert (one["actor.log_std"] != -1).all()  # it has moved

    policy = mopo.load_policy(whole["folder"], REDQArgs, REDQ)
    args = mopo.load_args(whole["folder"], REDQArgs)
    assert mopo.evaluate(policy, args, 2, 0).tolist() == whole["final_scores"]
    assert lines_of_code(REDQArgs, ManyCritics, SharedStdPolicy, REDQ) <= 45


class TrainsOtherwise(mopo.GaussianPolicy):
    """With dropout and batch norm."""

    def __init__(self, obs_dim: int, action_dim: int, args: mopo.Args):
        super().__init__(obs_dim, action_dim, args)
        norm = nn.BatchNorm1d(8)
        self.net = nn.Sequential(
            nn.Linear(obs_dim, 8), norm, nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2 * action_dim)
        )


class SeesStandardised(mopo.MOPO):
    """The policy acts on states less the data's mean, which is a buffer."""

    Policy = TrainsOtherwise

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mean", torch.zeros(self.obs_dim, device=self.device))

    def set_data(self, dataset):
        super().set_data(dataset)
        self.mean.copy_(dataset["obs"].mean(0) + 3)

    def act(self, obs):
        return super().act(obs - self.mean.numpy())


def test_how_a_policy_acts_is_how_it_was_saved(tmp_path):
    """Dropout and batch norm rest, their training does not notice; the buffer is in policy.pt."""
    whole = train_on_pendulum(tmp_path / "a", SeesStandardised)
    other = train_on_pendulum(tmp_path / "b", SeesStandardised, eval_every=2)
    one = tensors_of(whole["folder"])
    two = tensors_of(other["folder"])
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert one["actor.net.1.num_batches_tracked"] > 0

    policy = mopo.load_policy(whole["folder"], method=SeesStandardised)
    args = mopo.load_args(whole["folder"])
    assert mopo.evaluate(policy, args, 2, 0).tolist() == whole["final_scores"]
    obs = np.random.default_rng(0).normal(size=(5, 3))
    assert np.array_equal(policy.act(obs)[:2], policy.act(obs[:2]))
    policy_file = saved(Path(whole["folder"]), "policy.pt")
    assert list(policy_file["buffers"]) == ["mean"]


class MopoWithMore(mopo.MOPO):
    """A network that no optimizer knows."""

    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Linear(3, 1)


class ComboWithMore(combo.COMBO):
    """A network that no optimizer knows."""

    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Linear(3, 1)


@pytest.mark.parametrize("method", [MopoWithMore, ComboWithMore])
def test_a_network_without_an_optimizer(method, tmp_path):
    """It would keep its first weights for good."""
    with pytest.raises(SystemExit, match="no optimizer moves extra.weight"):
        train_on_pendulum(tmp_path, method)


class CriticWithAThird(mopo.TwinCritic):
    """The third has an optimizer, but `forward` gives the first two."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.q3 = mopo.mlp(obs_dim + action_dim, args.hidden, 1)


class CriticWithAList(mopo.TwinCritic):
    """torch neither moves nor saves what stands in a list."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.more = [mopo.mlp(obs_dim + action_dim, args.hidden, 1)]


@pytest.mark.parametrize("kind", [mopo.MOPO, combo.COMBO])
def test_a_critic_that_no_loss_reaches(kind, tmp_path, capsys):
    """It is said once, and nothing is said of critics that move."""

    class Unreached(kind):
        Critic = CriticWithAThird

    train_on_pendulum(tmp_path / "a", Unreached)
    sentence = "note: no loss has reached critic.q3.0.weight so far, which critic_optimizer"
    assert sentence in capsys.readouterr().out
    train_on_pendulum(tmp_path / "b", kind)
    assert "no loss has reached" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [mopo.MOPO, combo.COMBO])
def test_critics_in_a_list(kind, tmp_path):
    class Hidden(kind):
        Critic = CriticWithAList

    with pytest.raises(SystemExit, match="critic.more hides networks from torch"):
        train_on_pendulum(tmp_path, Hidden)


@pytest.mark.parametrize("kind", [mopo.MOPO, combo.COMBO])
def test_another_class_is_refused(kind, tmp_path):
    """Neither --resume nor load_policy takes the run of another class."""

    class Mine(kind):
        pass

    script = sys.modules[kind.__module__]
    folder = train_on_pendulum(tmp_path, Mine, total_iterations=2)["folder"]
    sentence = f"is a run of Mine, not of {kind.__name__}"
    with pytest.raises(SystemExit, match=sentence):
        script.load_policy(folder)
    with pytest.raises(SystemExit, match=sentence):
        train_on_pendulum(tmp_path, kind, resume=folder)


@both_scripts
def test_settings_that_lack_the_papers_row(script, capsys):
    """`Args(env_id=...)` has the defaults, and says so; `task_args` has the paper's row."""
    script.note_changes(script.Args(env_id="walker2d-medium-replay-v2"))
    assert "horizon is 5 and not 1" in capsys.readouterr().out
    script.note_changes(script.task_args("walker2d-medium-replay-v2"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [mopo.MOPO, combo.COMBO])
def test_resume_takes_the_runs_settings(kind, tmp_path):
    """Also where `train` is called with others, not only on the command line."""
    folder = train_on_pendulum(tmp_path, kind, total_iterations=2)["folder"]
    with pytest.raises(SystemExit, match="--resume takes --gamma from the run"):
        train_on_pendulum(tmp_path, kind, resume=folder, gamma=0.5)


@pytest.mark.parametrize("call, epochs_left", [(1, 1), (2, 0)])
@pytest.mark.parametrize(
    "kind, settings", [(mopo.MOPO, mopo.Args), (combo.COMBO, combo.Args), (REDQ, REDQArgs)]
)
def test_a_fit_goes_on_where_it_was_cut(
    kind, settings, call, epochs_left, dataset_path, tmp_path, monkeypatch
):
    """After each of its two epochs: nothing saved is done again, and nothing tells the runs apart.

    That is, with the checkpoint that is due every ten minutes after each epoch.
    """
    script = sys.modules[kind.mro()[-3].__module__]
    monkeypatch.setattr(script.Run, "plot_curves", lambda run: None)
    monkeypatch.setattr(script, "PHASE_SAVED_EVERY", -1)
    counts = {"model_step": 0}
    monkeypatch.setattr(kind, "model_step", counted(kind.model_step, "model_step", counts))
    own = {"dataset_path": dataset_path, "run_dir": str(tmp_path / "cut"), "total_iterations": 4}
    args = settings(**RUN | own)
    whole = script.train(dataclasses.replace(args, run_dir=str(tmp_path / "whole")), kind)
    steps_per_epoch = counts["model_step"] // 2
    assert steps_per_epoch > 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script.Run, "log", before_call(call, script.Run.log, die))
        script.train(args, kind)
    folder = folder_in(tmp_path / "cut")
    assert saved(folder)["iteration"] == 0
    counts["model_step"] = 0
    script.train(dataclasses.replace(args, resume=str(folder)), kind)
    assert counts["model_step"] == epochs_left * steps_per_epoch
    assert_same_run(folder, Path(whole["folder"]))
