"""ampl.py's method: its equations with numbers worked out by hand, and its steps.

A step with many parts (an iteration, a step of the model or of omega) is compared with a second
statement of it, which is as long as it wants to be and takes no short cut.
"""

import copy
import math

import numpy as np
import pytest
import torch
from small import build_ampl, random_dataset
from torch import Tensor, nn
from torch.testing import assert_close

import ampl


@pytest.fixture
def double():
    """All tensors of the test in double precision, so that two ways to compute agree to 1e-9."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def copies(module: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a module's state_dict holds."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """The names of the parts of a module in which something has changed since `copies`."""
    names = set()
    for name, tensor in module.state_dict().items():
        if not torch.equal(tensor, before[name]):
            names.add(name.split(".")[0])
    return names


def ignore_progress(phase: str, done: int, total: int | None, logs: dict) -> None:
    """Stands for a run's `progress`."""


# ===== Equations ==================================================================================
def test_conservative_target():
    """Eq. (12) with gamma = 0.9 and c = 0.75, all rewards 1."""
    batch = ampl.Batch(
        obs=None,
        action=None,
        reward=torch.ones(4),
        next_obs=None,
        terminated=torch.tensor([0.0, 1.0, 0.0, 0.0]),
    )
    q_next = torch.tensor([[2.0, 2.0, 40.0, -40.0], [4.0, 4.0, 10.0, -10.0]])
    # 0: 1 + 0.9 (0.75 * 2 + 0.25 * 4) = 3.25
    # 1: terminated, so the reward alone
    # 2: 1 + 0.9 (0.75 * 10 + 0.25 * 40) = 1 + 0.9 * 17.5 = 16.75; the smaller Q is of the second
    # 3: 1 + 0.9 (0.75 * -40 + 0.25 * -10) = 1 + 0.9 * -32.5 = -28.25
    target = ampl.conservative_target(batch, q_next, ampl.Args(gamma=0.9))
    assert_close(target, torch.tensor([3.25, 1.0, 16.75, -28.25]))
    # Values as large as the bound count as 0, on either side of zero.
    target = ampl.conservative_target(batch, q_next, ampl.Args(gamma=0.9, q_bound=17.5))
    assert_close(target, torch.tensor([3.25, 1.0, 1.0, 1.0]))


def test_critic_loss():
    """Eq. (13): a mean over rows, a sum over the two critics."""
    q = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    target = torch.tensor([0.0, 4.0])
    # Errors 1 and 2, and 0 and 4. Half their squares: (0.5 + 2) / 2 + (0 + 8) / 2 = 5.25.
    assert_close(ampl.critic_loss(q, target, 500.0), torch.tensor(5.25))
    # With the threshold 1 an error e > 1 costs e - 0.5: (0.5 + 1.5) / 2 + (0 + 3.5) / 2 = 2.75.
    assert_close(ampl.critic_loss(q, target, 1.0), torch.tensor(2.75))


def test_masked_mean():
    """The middle row is dropped; without any row the mean is 0 and not NaN."""
    values = torch.tensor([1.0, 9.0, 3.0])
    assert ampl.masked_mean(values, torch.tensor([1.0, 0.0, 1.0])) == 2
    assert ampl.masked_mean(values, torch.zeros(3)) == 0


def test_generator_loss():
    """Eq. (15) as -log D; the logit log 3 means D = 3/4, the logit 0 means D = 1/2."""
    logit = torch.tensor([math.log(3), 0.0, -50.0])
    keep = torch.tensor([1.0, 1.0, 0.0])
    # -log 3/4 = 0.287682 and -log 1/2 = 0.693147; the third row is dropped.
    assert_close(ampl.generator_loss(logit, keep), torch.tensor((0.287682 + 0.693147) / 2))


def test_generator_loss_keeps_its_gradient():
    """D = exp(-100) is 0 in fp32 and lets no gradient through; the logit's slope is still -1."""
    logit = torch.tensor([-100.0], requires_grad=True)
    ampl.generator_loss(logit, torch.ones(1)).backward()
    assert logit.grad.item() == pytest.approx(-1)


def test_discriminator_loss():
    """Half of Eq. (16): the true pair has D = 3/4 and the label 0.8, the fake one D = 1/4."""
    true_logit = torch.tensor([math.log(3), math.log(3)])
    fake_logit = torch.tensor([-math.log(3), 9.0])
    keep = torch.tensor([1.0, 0.0])
    true_label = torch.tensor([0.8, 0.8])
    # True: -0.8 log 3/4 - 0.2 log 1/4 = 0.507405. Fake: -log(1 - 1/4) = 0.287682; 9 is dropped.
    loss = ampl.discriminator_loss(true_logit, fake_logit, keep, true_label)
    assert_close(loss, torch.tensor((0.507405 + 0.287682) / 2))


def test_model_loss():
    """Eq. (4) and (6) for two members, two rows and two outputs; all targets are 0."""
    mean = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 0.0]]])  # [M, B, 1 + S]
    log_std = torch.tensor([[[0.0, math.log(2)], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    target = torch.zeros(2, 2, 2)
    # Member 0: row 0 has (1 / 1 + 4 / 4 + 2 log 2) / 2 = 1.693147, row 1 has 0.
    # Member 1: row 0 has 0, row 1 has 4 / 2 = 2.
    unweighted = ampl.model_loss(mean, log_std, target, torch.ones(2, 2))
    assert_close(unweighted, torch.tensor([1.693147 / 2, 2.0 / 2]))
    omega = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    weighted = ampl.model_loss(mean, log_std, target, omega)
    assert_close(weighted, torch.tensor([3 * 1.693147 / 2, 1 * 2.0 / 2]))


def test_model_error():
    """The same rows judged by the squared error: (1 + 4) / 2 = 2.5 and 0, or 0 and 4 / 2 = 2."""
    mean = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 0.0]]])
    error = ampl.model_error(mean, torch.zeros(2, 2), torch.tensor([3.0, 1.0]))
    assert_close(error, torch.tensor([3 * 2.5 / 2, 1 * 2.0 / 2]))


def test_omega_loss():
    """Eq. (11): the sides of Eq. (10) with gamma = 0.9, and Huber's threshold at 1."""
    omega = torch.tensor([2.0, 1.0])
    omega_target = torch.tensor([1.0, 4.0])
    q_next = torch.tensor([2.0, 2.0])
    q_initial = torch.tensor([2.0, 4.0, 3.0])
    # Left: (2 * 3 + 1 * 5) / 2 = 5.5. Right: 0.9 (1 * 2 + 4 * 2) / 2 + 0.1 * 3 = 4.8.
    # They are 0.7 apart: 0.7^2 / 2 = 0.245.
    loss = ampl.omega_loss(omega, omega_target, torch.tensor([3.0, 5.0]), q_next, q_initial, 0.9)
    assert_close(loss, torch.tensor(0.245))
    # Left: (2 * 6 + 1 * 8) / 2 = 10, which is 5.2 from the right: 5.2 - 0.5 = 4.7.
    loss = ampl.omega_loss(omega, omega_target, torch.tensor([6.0, 8.0]), q_next, q_initial, 0.9)
    assert_close(loss, torch.tensor(4.7))


CONSTRAINED = [
    # mean, loss_grad g, mean_grad c; <g, c> must be at least min(mean - 10, |c|^2).
    (4.0, [1.0, 2.0], [1.0, 0.0], [1.0, 2.0]),  # 1 where -6 is enough: no change
    (13.0, [1.0, 2.0], [1.0, 0.0], [1.0, 2.0]),  # 1 where min(3, 1) = 1 is enough: no change
    (9.0, [-3.0, 0.0], [2.0, 0.0], [-0.5, 0.0]),  # -6 where it must be -1: g + 5 / 4 c
    (99.0, [-3.0, 7.0], [2.0, 0.0], [2.0, 7.0]),  # -6 where it must be |c|^2 = 4: g + 10 / 4 c
]


@pytest.mark.parametrize("mean, loss_grad, mean_grad, expected", CONSTRAINED)
def test_constrain_mean(mean, loss_grad, mean_grad, expected):
    """The smallest correction that keeps the mean of omega below 10."""
    corrected = ampl.constrain_mean(
        torch.tensor(loss_grad), torch.tensor(mean_grad), torch.tensor(mean), 10.0
    )
    assert_close(corrected, torch.tensor(expected))


def test_scale_rewards():
    """(r - min + 0.001) / (max - min), here with min = 1 and max - min = 4."""
    scaled = ampl.scale_rewards(torch.tensor([1.0, 3.0, 5.0]))
    assert_close(scaled, torch.tensor([0.001 / 4, 2.001 / 4, 4.001 / 4]))


REAL_ROWS = [
    # f is 1 for 40,000 iterations of warm-up and 5000 more; then it falls by 0.1 every 5000.
    (0, 512), (39_999, 512), (40_000, 512), (44_999, 512),
    (45_000, 460),  # 0.9 * 512 = 460.8
    (49_999, 460), (50_000, 409), (54_999, 409), (55_000, 358), (60_000, 307), (64_999, 307),
    (65_000, 256), (999_999, 256),
]  # fmt: skip


@pytest.mark.parametrize("iteration, expected", REAL_ROWS)
def test_real_rows(iteration, expected):
    """The share of data in a batch at the edges of its schedule."""
    assert ampl.real_rows(iteration, ampl.Args()) == expected


def test_real_rows_follows_the_settings():
    """Warm-up 10, a fall every 2 iterations, down to 0.75 of 100 rows."""
    args = ampl.Args(warmup_iterations=10, real_decay_every=2, real_fraction=0.75, batch_size=100)
    counts = [ampl.real_rows(i, args) for i in (0, 11, 12, 14, 16, 99)]
    assert counts == [100, 100, 90, 80, 75, 75]


def test_polyak():
    """The target goes a quarter of the way from 1 to 5; the network stays."""
    target = nn.Linear(2, 2)
    network = nn.Linear(2, 2)
    for parameter in target.parameters():
        parameter.data.fill_(1.0)
    for parameter in network.parameters():
        parameter.data.fill_(5.0)
    ampl.polyak(target, network, 0.25)
    assert all((parameter == 2).all() for parameter in target.parameters())
    assert all((parameter == 5).all() for parameter in network.parameters())


ENDS = [
    # Heights in m, angles in rad.
    ("hopper-medium-v2", [0.71, 0.19, 99], False),
    ("hopper-medium-v2", [150, 0, 0], False),  # its height has no upper bound
    ("hopper-medium-v2", [0.7, 0, 0], True),  # a height of 0.7 is too low already
    ("hopper-medium-v2", [1, 0.2, 0], True),
    ("hopper-medium-v2", [1, -0.21, 0], True),
    ("hopper-medium-v2", [1, 0, 100], True),
    ("hopper-medium-v2", [1, 0, -100.5], True),
    ("hopper-medium-v2", [1, 0, math.nan], True),
    ("hopper-medium-v2", [math.inf, 0, 0], True),
    ("walker2d-medium-v2", [0.81, 0.99, 500], False),
    ("walker2d-medium-v2", [1.99, -0.99, 0], False),
    ("walker2d-medium-v2", [0.79, 0, 0], True),
    ("walker2d-medium-v2", [2, 0, 0], True),
    ("walker2d-medium-v2", [1, -1.01, 0], True),
    ("walker2d-medium-v2", [1, 1, 0], True),
    ("walker2d-medium-v2", [math.nan, 0, 0], True),
    ("ant-angle-v0", [0.21, 9, -500], False),
    ("ant-angle-v0", [1, 0, 0], False),
    ("ant-angle-v0", [0.19, 0, 0], True),
    ("ant-angle-v0", [1.01, 0, 0], True),
    ("ant-angle-v0", [0.5, math.nan, 0], True),
    ("pen-human-v1", 26 * [0] + [0.0751], False),
    ("pen-human-v1", 26 * [0] + [0.0749], True),
    ("halfcheetah-medium-v2", [-1e6, 1e6, math.nan], False),  # no rule: never
    ("maze2d-umaze-v1", [-1e6, 1e6, 0, 0], False),
    ("door-expert-v1", [1e6, 0, 0], False),
]


@pytest.mark.parametrize("env_id, next_obs, ended", ENDS)
def test_known_termination(env_id, next_obs, ended):
    """The tasks' own rules at their edges, for one state and for a batch."""
    state = torch.tensor(next_obs, dtype=torch.float32)
    result = ampl.known_termination(env_id, state)
    assert result.dtype == torch.bool
    assert result.item() == ended
    assert ampl.known_termination(env_id, state.expand(2, -1)).tolist() == [ended, ended]


# ===== Networks ===================================================================================
def test_policy_noise():
    """z has the deviation noise_std, is clamped to [-3, 3] after that, and is new for each row."""
    policy = build_ampl(noise_std=2.0).actor
    policy.net = nn.Identity()  # so that the raw action is s and z side by side
    obs = torch.randn(20_000, 3)
    raw = policy.raw_action(obs)
    noise = raw[:, 3:]
    assert torch.equal(raw[:, :3], obs)
    assert noise.shape == (20_000, 2)
    assert noise.abs().max() == 3
    # |z| > 3 is beyond 1.5 deviations, where 13.4 % of a Gaussian lie.
    assert (noise.abs() == 3).float().mean() == pytest.approx(0.134, abs=0.01)
    inside = noise[noise.abs() < 1]  # 1 is half a deviation, where 38.3 % lie
    assert inside.numel() / noise.numel() == pytest.approx(0.383, abs=0.01)
    assert len(noise.unique(dim=0)) > 15_000


def test_policy_is_the_tanh_of_its_raw_action():
    """Without noise both calls give the same sample, one before and one after the tanh."""
    policy = build_ampl(noise_std=0.0).actor
    obs = torch.randn(5, 3)
    raw = policy.raw_action(obs)
    assert_close(raw, policy.net(torch.cat([obs, torch.zeros(5, 2)], 1)))
    assert_close(policy(obs), torch.tanh(raw))


def test_critics_are_two():
    """Q_1 and Q_2 have weights of their own, and q1_only is the first."""
    critic = build_ampl().critic
    obs = torch.randn(6, 3)
    action = torch.randn(6, 2)
    q = critic(obs, action)
    assert q.shape == (2, 6)
    pair = torch.cat([obs, action], 1)
    assert_close(q[0], critic.q1(pair)[:, 0])
    assert_close(q[1], critic.q2(pair)[:, 0])
    assert_close(critic.q1_only(obs, action), q[0])
    assert not torch.equal(q[0], q[1])


@pytest.mark.parametrize("power, start", [(0.2, 0.9293), (0.5, 0.8326)])
def test_omega_starts_almost_constant(power, start):
    """softplus(0) = log 2 = 0.6931, to the power 0.2 or 0.5; the last layer's weights are small."""
    omega = build_ampl(omega_power=power, hidden=(400, 300)).omega
    values = omega(torch.randn(50, 3), torch.randn(50, 2)).detach()
    assert_close(values, torch.full((50,), start), atol=5e-3, rtol=0)
    assert 0.002 < omega.net[-1].weight.abs().max() <= 0.003
    # Far below zero softplus(x) is exp(x), and the power makes of it exp(power * x).
    omega.net[-1].bias.data.fill_(-10.0)
    values = omega(torch.randn(50, 3), torch.randn(50, 2)).detach()
    assert_close(values, torch.full((50,), math.exp(-10 * power)), atol=0, rtol=2e-2)


def test_ensemble_linear():
    """Member m is a linear layer of its own on its own rows."""
    layer = ampl.EnsembleLinear(3, 4, 2)
    layer.bias.data.normal_()
    x = torch.randn(3, 5, 4)
    y = layer(x)
    for member in range(3):
        expected = x[member] @ layer.weight[member] + layer.bias[member]
        assert_close(y[member], expected)


def test_first_weights_of_the_model():
    """The deviation is 1 / (2 sqrt(100)) = 0.05; nothing lies beyond two deviations."""
    weight = ampl.EnsembleLinear(7, 100, 100).weight
    assert weight.abs().max() < 0.1
    # fmod brings the 4.6 % beyond two deviations to around 0, which leaves 0.88 of a deviation.
    assert weight.std().item() == pytest.approx(0.05 * 0.88, rel=0.02)


def test_bounds_of_log_std():
    """Squeezed between 0.25 and -5, first from above and then from below."""
    model = build_ampl().model
    mean, log_std = model.gaussian(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0, -100.0, -2.0, 0.0]))
    assert mean.tolist() == [1, 2, 3, 4]
    # 100: the upper bound gives 0.25, and the lower -5 + softplus(5.25) = 0.2552.
    # -100: stays -100, and then is -5.
    # -2: 0.25 - softplus(2.25) = -2.1002, then -5 + softplus(2.8998) = -2.0466.
    # 0: 0.25 - softplus(0.25) = -0.5759, then -5 + softplus(4.4241) = -0.5640.
    assert_close(log_std, torch.tensor([0.2552, -5.0, -2.0466, -0.5640]), atol=1e-4, rtol=0)


def test_forward_of_the_model(double):
    """Four layers with SiLU, then mean and log_std, member by member."""
    model = build_ampl().model
    x = torch.randn(5, 6, 5)
    mean, log_std = model(x)
    for member in range(5):
        hidden = x[member]
        for layer in model.layers[:4]:
            hidden = hidden @ layer.weight[member] + layer.bias[member]
            hidden = hidden * torch.sigmoid(hidden)
        output = hidden @ model.layers[4].weight[member] + model.layers[4].bias[member]
        assert_close(mean[member], output[:, :4])
        upper = 0.25 - torch.log(1 + torch.exp(0.25 - output[:, 4:]))
        assert_close(log_std[member], -5 + torch.log(1 + torch.exp(upper + 5)))


def test_units_of_the_data():
    """Statistics are of exactly the rows that are given; targets are (r, s' - s)."""
    method = build_ampl()
    batch = method.sample_data(30)
    method.model.set_statistics(batch)
    inputs, targets = method.model.standardise(batch)
    both = torch.cat([inputs, targets], 1)
    assert_close(both.mean(0), torch.zeros(9), atol=1e-5, rtol=0)
    assert_close(both.std(0), torch.ones(9))
    raw_targets = targets * method.model.target_std + method.model.target_mean
    expected = torch.cat([batch.reward[:, None], batch.next_obs - batch.obs], 1)
    assert_close(raw_targets, expected, atol=1e-5, rtol=1e-5)


def members_that_say_their_number(log_std: float) -> ampl.ModelEnsemble:
    """Member m of five predicts m as the reward and, as the change, the standardised state.

    The units of inputs and targets are not 0 and 1.
    """
    model = build_ampl(num_elites=5).elites

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        number = torch.arange(5.0)[:, None, None].expand(5, x.shape[1], 1)
        mean = torch.cat([number, x[..., :3]], -1)
        return mean, torch.full_like(mean, log_std)

    model.forward = forward
    model.input_mean.fill_(1.0)
    model.input_std.fill_(2.0)
    model.target_mean.copy_(torch.tensor([10.0, 0.5, 0.5, 0.5]))
    model.target_std.copy_(torch.tensor([4.0, 8.0, 8.0, 8.0]))
    return model


@pytest.mark.parametrize("rows", [20, 23, 3])
def test_every_row_has_one_member(rows):
    """Rows come back in order and in units; members get equal shares; a row meets all of them."""
    model = members_that_say_their_number(log_std=-math.inf)  # no noise
    obs = torch.randn(rows, 3)
    share = math.ceil(rows / 5)
    missing = 5 * share - rows
    members = []
    for _ in range(60):
        reward, next_obs = model.sample(obs, torch.zeros(rows, 2))
        assert_close(next_obs, obs + 8 * (obs - 1) / 2 + 0.5)
        members.append((reward - 10) / 4)
        counts = torch.stack([(members[-1] == member).sum() for member in range(5)])
        assert counts.sum() == rows
        assert counts.max() <= share
        assert counts.min() >= share - missing
    for row in range(rows):
        assert len(torch.stack(members)[:, row].unique()) == 5


def test_noise_of_the_model():
    """log_std = -log 4 in units of 4 (reward) and 8 (state): deviations 1 and 2, in every row."""
    model = members_that_say_their_number(log_std=-math.log(4))
    obs = torch.ones(9999, 3)  # where the mean change is 0.5
    reward, next_obs = model.sample(obs, torch.zeros(9999, 2))
    assert next_obs.std().item() == pytest.approx(2, rel=0.05)
    assert next_obs.mean().item() == pytest.approx(1.5, abs=0.1)
    member = ((reward - 10) / 4).round()
    assert (reward - 10 - 4 * member).std().item() == pytest.approx(1, rel=0.1)
    # Every number of every row has noise of its own.
    assert len(next_obs.unique()) > 9000
    assert abs(torch.corrcoef(next_obs.T)[0, 1]) < 0.05


def test_absurd_predictions():
    """NaN becomes no reward and no change; what would overflow is cut."""
    model = build_ampl().elites
    model.target_mean.zero_()
    model.target_std.fill_(1.0)
    obs = torch.ones(1, 3)
    mean = torch.tensor([[math.nan, math.nan, 1e30, -math.inf]])
    reward, next_obs = model.draw(obs, mean, torch.full((1, 4), -math.inf))
    assert reward.tolist() == [0]
    assert next_obs.tolist() == [[1, 1e6 + 1, -1e6 + 1]]


def test_first_weights_depend_on_seed_and_name():
    """The same seed gives the same networks, and no two networks start alike but the targets."""
    one = copies(build_ampl(seed=3))
    assert changed(one, build_ampl(seed=3)) == set()
    other = build_ampl(seed=4)
    networks = {"model", "elites", "actor", "critic", "discriminator", "omega"}
    assert networks <= changed(one, other)
    assert not torch.equal(other.critic.q1[0].weight, other.critic.q2[0].weight)
    assert not torch.equal(other.critic.q1[0].weight, other.discriminator.net[0].weight)
    assert not torch.equal(other.omega.net[0].weight, other.discriminator.net[0].weight)
    for name in ("actor", "critic", "omega"):
        target = getattr(other, f"{name}_target")
        assert changed(copies(getattr(other, name)), target) == set()
        assert not any(parameter.requires_grad for parameter in target.parameters())


# ===== Data, batches, D_model =====================================================================
def test_set_data():
    """D_env keeps all rows, with scaled rewards; the model has those with a known s'."""
    method = build_ampl()
    dataset = random_dataset(40, 3, 2)
    batch = method.split(method.data)
    assert torch.equal(batch.obs, dataset["obs"])
    assert torch.equal(batch.action, dataset["action"])
    assert torch.equal(batch.next_obs, dataset["next_obs"])
    assert torch.equal(batch.reward, ampl.scale_rewards(dataset["reward"]))
    assert batch.terminated.tolist() == 4 * (9 * [0.0] + [1.0])
    assert method.rows_with_next.tolist() == [row for row in range(40) if row % 10 != 9]


def test_end_outside_data():
    """Limits from s and s' and from the scaled rewards; a value on its limit is inside."""
    method = build_ampl()
    dataset = random_dataset(2, 3, 2)
    dataset["obs"] = torch.tensor([[1.0, -2.0, 4.0], [0.0, 1.0, 0.0]])
    dataset["next_obs"] = torch.tensor([[3.0, 1.0, 0.0], [0.0, -4.0, 0.0]])
    dataset["reward"] = torch.tensor([5.0, 6.0])
    method.set_data(dataset)
    assert method.obs_limit.tolist() == [6, 8, 8]  # twice the largest of each dimension
    # The rewards become 0.001 and 1.001, with the deviation 0.707107: 1.001 + 7.071068.
    assert method.reward_limit.item() == pytest.approx(8.072068)

    method.reward_limit = torch.tensor(5.0)
    steps = [
        # reward, next_obs, ended by the task's rule -> reward, terminated
        (5.0, [6.0, -8.0, 0.0], False, 5.0, 0.0),  # on the limits
        (1.0, [6.01, 0.0, 0.0], False, -5.0, 1.0),
        (1.0, [0.0, -8.01, 0.0], False, -5.0, 1.0),
        (5.01, [0.0, 0.0, 0.0], False, -5.0, 1.0),
        (-5.01, [0.0, 0.0, 0.0], False, -5.0, 1.0),
        (1.0, [0.0, 0.0, 0.0], True, 1.0, 1.0),  # a real end keeps its reward
    ]
    for reward, next_obs, ended, expected_reward, expected_terminated in steps:
        result = method.end_outside_data(
            torch.tensor([reward]), torch.tensor([next_obs]), torch.tensor([ended])
        )
        assert [tensor.tolist() for tensor in result] == [[expected_reward], [expected_terminated]]


def test_imagine(monkeypatch):
    """A step is the elites', not the whole model's; the task's rule looks at s'."""
    method = build_ampl()
    method.obs_limit.fill_(1e9)
    method.reward_limit.fill_(1e9)

    def sample(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return action[:, 0], obs + 1

    def ends(env_id: str, next_obs: Tensor) -> Tensor:
        assert env_id == "door-expert-v1"
        return next_obs[:, 0] == 3

    method.elites.sample = sample
    monkeypatch.setattr(ampl, "known_termination", ends)
    obs = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [3.0, 0, 0]])
    action = torch.tensor([[0.1, 0], [0.2, 0], [0.3, 0]])
    reward, next_obs, terminated = method.imagine(obs, action)
    assert torch.equal(reward, action[:, 0])
    assert torch.equal(next_obs, obs + 1)
    assert terminated.tolist() == [0, 1, 0]


def numbered_batch(first: int, last: int) -> ampl.Batch:
    """Transitions whose rewards number them."""
    reward = torch.arange(first, last + 1).float()
    rows = len(reward)
    return ampl.Batch(
        obs=torch.full((rows, 3), 1.0),
        action=torch.full((rows, 2), 2.0),
        reward=reward,
        next_obs=torch.full((rows, 3), 3.0),
        terminated=torch.ones(rows),
    )


def test_remember():
    """In a room of ten rows, eight and then five: the last five wrap around over the oldest."""
    method = build_ampl()
    method.model_data = torch.zeros(10, 10)
    method.write_row.zero_()
    method.num_model_rows.zero_()
    method.remember(numbered_batch(1, 8))
    assert method.split(method.model_data).reward.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    assert (method.write_row, method.num_model_rows) == (8, 8)
    method.remember(numbered_batch(9, 13))
    stored = method.split(method.model_data)
    assert stored.reward.tolist() == [11, 12, 13, 4, 5, 6, 7, 8, 9, 10]
    assert (method.write_row, method.num_model_rows) == (3, 10)
    assert (stored.obs == 1).all()
    assert (stored.action == 2).all()
    assert (stored.next_obs == 3).all()
    assert (stored.terminated == 1).all()


@pytest.mark.parametrize("num_real", [0, 100, 2000])
def test_sample_mixed(num_real):
    """The first num_real rows are of the data, the rest of the filled part of D_model, evenly."""
    method = build_ampl(batch_size=2000)
    method.data[:, 5] = -torch.arange(1.0, 41.0)  # the column of rewards
    method.model_data = torch.zeros(10, 10)
    method.write_row.zero_()
    method.num_model_rows.zero_()
    method.remember(numbered_batch(1, 8))
    method.num_real.fill_(num_real)
    reward = method.sample_mixed().reward
    assert (reward[:num_real] < 0).all()
    assert (reward[num_real:] > 0).all()  # no row that is not filled yet
    assert not torch.equal(reward, method.sample_mixed().reward)
    numbers, counts = reward[num_real:].unique(return_counts=True)
    if num_real == 0:
        assert numbers.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        assert counts.min() > 180  # 250 of each, with a deviation of 15
    if num_real == 2000:
        numbers, counts = reward.unique(return_counts=True)
        assert len(numbers) == 40
        assert counts.min() > 20  # 50 of each, with a deviation of 7


# ===== Rollouts ===================================================================================
def test_rollout(monkeypatch):
    """Seven rollouts of five steps; the ending step is kept, then a new one starts in its place."""
    method = build_ampl(horizon=5, rollout_rows=33)  # 33 / 5 is rounded up to 7

    def sample(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return obs[:, 0], obs + 1

    def ends(env_id: str, next_obs: Tensor) -> Tensor:
        return next_obs[:, 0] % 100 == 2

    method.elites.sample = sample
    monkeypatch.setattr(ampl, "known_termination", ends)
    method.data[:, 0] = 100 * torch.arange(1, 41)  # where rollouts start: 100, 200, ...
    method.write_row.zero_()
    method.num_model_rows.zero_()
    method.obs_limit.fill_(1e9)
    method.reward_limit.fill_(1e9)
    logs = method.rollout()

    # Each rollout ends at its second step: at steps 2 and 4 of the five.
    assert logs["rollout/terminated_frac"].item() == pytest.approx(2 / 5)
    assert method.num_model_rows == 35
    rows = method.split(method.model_data[:35])
    obs = rows.obs[:, 0].view(5, 7)  # [step, rollout]
    assert torch.equal(rows.next_obs[:, 0].view(5, 7), obs + 1)
    assert torch.equal(rows.reward.view(5, 7), obs)
    for rollout in range(7):
        assert (obs[:, rollout] % 100).tolist() == [0, 1, 0, 1, 0]
        assert rows.terminated.view(5, 7)[:, rollout].tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(obs[1], obs[0] + 1)
    assert not torch.equal(obs[2], obs[0])  # other states of the data than at first
    assert len(obs[0].unique()) > 2


def test_rollouts_of_several_parts():
    """3000 rollouts come in two parts on a CPU, and fill 9000 rows."""
    method = build_ampl(horizon=3, rollout_rows=9000, buffer_size=10_000)
    assert method.num_model_rows == 9000
    stored = method.split(method.model_data[:9000])
    starts = stored.obs[:2048]  # the first step of the first part
    known = {tuple(row) for row in method.split(method.data).obs.tolist()}
    assert {tuple(row) for row in starts.tolist()} == known  # all 40 states of the data
    second = stored.obs[3 * 2048 : 3 * 2048 + 952]  # the first step of the second
    assert {tuple(row) for row in second.tolist()} == known


def test_rollout_actions():
    """Every row has an action of its own, and it is the policy's, not its target's."""
    method = build_ampl()
    action = method.split(method.model_data[:24]).action
    assert len(action.unique(dim=0)) == 24

    method = build_ampl(noise_std=0.0)  # so that the policy is deterministic
    method.actor_target.net[-1].bias.data += 1.0
    method.rollout()
    stored = method.split(method.model_data[24:48])
    assert_close(stored.action, method.actor(stored.obs).detach())
    assert_close(method.rollout_action(stored.obs), method.actor(stored.obs))


# ===== One iteration ==============================================================================
class NaiveIteration:
    """An iteration of ampl.py once more, with every loss written out and a graph of its own.

    It has copies of the networks. Batches, samples of the policy and the model's steps are drawn by
    the method itself, in the same order, so that both draw the same numbers.
    """

    def __init__(self, method: ampl.AMPL):
        self.method = method
        self.actor = copy.deepcopy(method.actor)
        self.critic = copy.deepcopy(method.critic)
        self.discriminator = copy.deepcopy(method.discriminator)
        self.actor_target = copy.deepcopy(method.actor_target)
        self.critic_target = copy.deepcopy(method.critic_target)
        self.q_avg = None
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), 0.01, (0.4, 0.999))
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), 0.02, (0.9, 0.999))
        self.discriminator_adam = torch.optim.Adam(
            self.discriminator.parameters(), 0.03, (0.4, 0.999)
        )

    def __call__(self, warmup: bool, step_actor: bool) -> dict[str, Tensor]:
        """-> the losses, by what the logs of ampl.py call them."""
        batch = self.method.sample_mixed()
        q_loss, q_mean = self.step_critics(batch)

        # The policy's value, by the critics that have just stepped.
        q1, q2 = self.q_values(self.critic, batch.obs, self.actor(batch.obs))
        q_policy = torch.minimum(q1, q2)
        q_size = q_policy.abs().mean().item()
        if self.q_avg is None:
            self.q_avg = q_size

        regularizer, disc_loss = self.gan_losses()
        actor_loss = regularizer
        if not warmup:
            actor_loss = regularizer - 10 / self.q_avg * q_policy.mean()

        # Both gradients are taken before either network moves.
        actor_parameters = list(self.actor.parameters())
        disc_parameters = list(self.discriminator.parameters())
        actor_grads = torch.autograd.grad(actor_loss, actor_parameters, retain_graph=True)
        disc_grads = torch.autograd.grad(disc_loss, disc_parameters)
        if step_actor:
            for parameter, grad in zip(actor_parameters, actor_grads):
                parameter.grad = grad
            self.actor_adam.step()
        for parameter, grad in zip(disc_parameters, disc_grads):
            parameter.grad = grad
        self.discriminator_adam.step()

        # The targets go a quarter of the way.
        self.follow(self.critic_target, self.critic)
        self.follow(self.actor_target, self.actor)
        self.q_avg = 0.75 * self.q_avg + 0.25 * q_size
        return {
            "losses/critic_loss": q_loss.detach(),
            "losses/q_values": q_mean,
            "losses/actor_loss": actor_loss.detach(),
            "losses/generator_loss": regularizer.detach(),
            "losses/discriminator_loss": disc_loss.detach(),
        }

    def step_critics(self, batch: ampl.Batch) -> tuple[Tensor, Tensor]:
        """Eq. (12) and (13). -> the loss, and the mean Q from before the step"""
        with torch.no_grad():
            next_action = self.actor_target(batch.next_obs)
            next_q1, next_q2 = self.q_values(self.critic_target, batch.next_obs, next_action)
            low = torch.minimum(next_q1, next_q2)
            high = torch.maximum(next_q1, next_q2)
            next_value = (1 - batch.terminated) * (0.75 * low + 0.25 * high)
            target = batch.reward + 0.9 * next_value
        q1, q2 = self.q_values(self.critic, batch.obs, batch.action)
        loss = ((q1 - target) ** 2).mean() / 2 + ((q2 - target) ** 2).mean() / 2
        parameters = list(self.critic.parameters())
        grads = torch.autograd.grad(loss, parameters)
        norm = sum((grad**2).sum() for grad in grads).sqrt()
        assert norm > 0.1  # so that the clipping acts
        for parameter, grad in zip(parameters, grads):
            parameter.grad = grad * 0.1 / (norm + 1e-6)
        self.critic_adam.step()
        return loss, torch.stack([q1, q2]).mean().detach()

    def gan_losses(self) -> tuple[Tensor, Tensor]:
        """Eq. (14) to (16). Pairs at a terminal s' are dropped, not masked."""
        obs = self.method.sample_mixed().obs
        raw = self.actor.raw_action(obs)
        with torch.no_grad():
            _, next_obs, terminated = self.method.imagine(obs, torch.tanh(raw))
        alive = terminated == 0
        assert 0 < alive.sum() < 16
        next_raw = self.actor.raw_action(next_obs)[alive]
        fake_obs = torch.cat([obs, next_obs[alive]])
        fake_raw = torch.cat([raw, next_raw])
        data = self.method.sample_data(32)
        true_raw = torch.atanh(data.action)
        true_d = torch.sigmoid(self.discriminator(data.obs, true_raw))
        fake_d = torch.sigmoid(self.discriminator(fake_obs, fake_raw))
        detached_d = torch.sigmoid(self.discriminator(fake_obs, fake_raw.detach()))
        label = 0.8 + 0.2 * torch.rand(32)
        true_part = -(label * torch.log(true_d) + (1 - label) * torch.log(1 - true_d)).mean()
        fake_part = -torch.log(1 - detached_d).mean()
        return -torch.log(fake_d).mean(), (true_part + fake_part) / 2

    def q_values(self, critic: nn.Module, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.cat([obs, action], 1)
        return critic.q1(pair)[:, 0], critic.q2(pair)[:, 0]

    def follow(self, target: nn.Module, network: nn.Module) -> None:
        for slow, fast in zip(target.parameters(), network.parameters()):
            slow.data = 0.75 * slow.data + 0.25 * fast.data


def method_for_iterations() -> ampl.AMPL:
    """Rates so large that a few iterations show, and limits that end some steps in the model."""
    method = build_ampl(
        gamma=0.9,
        tau=0.25,
        actor_lr=0.01,
        critic_lr=0.02,
        discriminator_lr=0.03,
        critic_grad_norm=0.1,
    )
    method.obs_limit.fill_(3.0)
    for parameter in method.critic_target.parameters():  # targets unlike their networks
        parameter.data += 0.1
    for parameter in method.actor_target.parameters():
        parameter.data -= 0.1
    method.critic.q1[-1].bias.data += 2.0  # so that the gradient is beyond its largest norm
    return method


def test_iterate_against_a_naive_one(double):
    """Warm-up or not, the policy steps or not: networks, targets and logs are the same."""
    method = method_for_iterations()
    naive = NaiveIteration(method)
    flags = [(True, True), (True, False), (False, True), (False, False), (False, True)]
    for number, (warmup, step_actor) in enumerate(flags):
        torch.manual_seed(number)
        expected = naive(warmup, step_actor)
        torch.manual_seed(number)
        logs = method.iterate(warmup, step_actor)
        assert logs.keys() == expected.keys()
        for name in logs:
            assert_close(logs[name], expected[name])
        for name in ("actor", "critic", "discriminator", "actor_target", "critic_target"):
            assert_close(copies(getattr(method, name)), copies(getattr(naive, name)))
        assert method.q_avg.item() == pytest.approx(naive.q_avg)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("step_actor", [True, False])
def test_what_an_iteration_moves(warmup, step_actor):
    """Not the model, omega, its targets or D_model; the policy only if it is asked to step."""
    method = method_for_iterations()
    before = copies(method)
    logs = method.iterate(warmup, step_actor)
    moved = {"critic", "discriminator", "critic_target", "actor_target", "q_avg"}
    if step_actor:
        moved.add("actor")
    assert changed(before, method) == moved
    only_imitates = (logs["losses/actor_loss"] == logs["losses/generator_loss"]).item()
    assert only_imitates == warmup


def test_policy_loss():
    """Eq. (17) with lambda = 10 / 2: L_g - 5 * the mean of Q, 0.5 - 5 * 1.6 = -7.5."""
    method = build_ampl(q_coef=10.0)
    method.q_avg.fill_(2.0)
    loss = method.policy_loss(torch.tensor([1.0, 2.2]), torch.tensor(0.5))
    assert_close(loss, torch.tensor(-7.5))


def test_q_avg():
    """The first batch sets it to its mean |min Q|; then it goes 0.5 % of the way to each next."""
    method = build_ampl()

    def set_values(q1: float, q2: float) -> None:
        """Make both critics constant."""
        for net, value in ((method.critic.q1, q1), (method.critic.q2, q2)):
            net[-1].weight.data.zero_()
            net[-1].bias.data.fill_(value)

    method.critic_optimizer = torch.optim.SGD(method.critic.parameters(), 0.0)  # they stand still
    set_values(-3.0, 1.0)
    logs = method.iterate(warmup=False, step_actor=False)
    assert method.q_avg.item() == pytest.approx(3)
    # Eq. (17): L_g - 10 / 3 * -3.
    difference = logs["losses/actor_loss"] - logs["losses/generator_loss"]
    assert difference.item() == pytest.approx(10)
    set_values(1.0, -5.0)
    method.iterate(warmup=False, step_actor=False)
    assert method.q_avg.item() == pytest.approx(3 + 0.005 * 2)


def test_fake_pairs(monkeypatch):
    """Eq. (14): gradient through both raw actions, none through s'; keep is 0 at a terminal s'."""
    method = build_ampl(noise_std=0.0)
    method.obs_limit.fill_(1e9)
    taken = []

    def sample(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        taken.append(action)
        return torch.zeros(len(obs)), obs + 100 + action.sum(1, keepdim=True)

    def ends(env_id: str, next_obs: Tensor) -> Tensor:
        return torch.arange(len(next_obs)) == 2

    method.elites.sample = sample
    monkeypatch.setattr(ampl, "known_termination", ends)
    obs = torch.arange(12.0).view(4, 3)
    fake_obs, fake_raw, keep = method.fake_pairs(obs)
    assert_close(taken[0], method.actor(obs))  # the model sees the action after the tanh
    next_obs = obs + 100 + taken[0].sum(1, keepdim=True)
    assert_close(fake_obs, torch.cat([obs, next_obs]))
    assert not fake_obs.requires_grad
    assert_close(fake_raw, method.actor.raw_action(fake_obs))
    assert keep.tolist() == [1, 1, 1, 1, 1, 1, 0, 1]

    parameters = list(method.actor.parameters())
    for half in (fake_raw[:4], fake_raw[4:]):
        grads = torch.autograd.grad(half.sum(), parameters, retain_graph=True)
        assert all(grad.any() for grad in grads)


def test_true_pairs():
    """Pairs of the data with atanh(a), which is finite where a is -1 or 1."""
    method = build_ampl()
    obs, raw = method.true_pairs(500)
    assert obs.shape == (500, 3)
    found = torch.cat([obs, torch.tanh(raw)], 1)
    gaps = (found[:, None] - method.data[:, :5]).abs().amax(-1)  # [pairs, rows of the data]
    assert gaps.amin(1).max() < 1e-5
    assert len(gaps.argmin(1).unique()) == 40  # all rows are drawn
    method.data[:, 3:5] = torch.tensor([1.0, -1.0])
    _, raw = method.true_pairs(5)
    assert_close(raw, torch.tensor([[8.3, -8.3]]).expand(5, 2), atol=0.05, rtol=0)


# ===== Fitting the model ==========================================================================
def test_model_step_against_a_naive_one(double):
    """Member by member: rows of its own, its loss, the bounds' gap, the decay of each layer."""
    decay = (0.1, 0.2, 0.3, 0.4, 0.5)
    method = build_ampl(model_lr=0.01, model_weight_decay=decay)
    naive = copy.deepcopy(method.model)
    groups = [{"params": [naive.max_log_std, naive.min_log_std], "weight_decay": 0.0}]
    for layer, rate in zip(naive.layers, decay):
        groups.append({"params": [layer.weight, layer.bias], "weight_decay": rate})
    adam = torch.optim.Adam(groups, 0.01)
    inputs = torch.randn(50, 5)
    targets = torch.randn(50, 4)
    omega = torch.rand(50)
    train_rows = torch.arange(10, 50)
    for number in range(3):
        torch.manual_seed(number)
        logs = method.model_step(inputs, targets, omega, train_rows)
        torch.manual_seed(number)
        rows = train_rows[torch.randint(40, (5, 4))]
        total = 0.0
        mean, log_std = naive(inputs[rows])
        for member in range(5):
            for row in range(4):
                error = (mean[member, row] - targets[rows[member, row]]) ** 2
                nll = error / log_std[member, row].exp() ** 2 + 2 * log_std[member, row]
                total = total + omega[rows[member, row]] * nll.mean() / 4
        assert logs["model/train_nll"].item() == pytest.approx(total.item() / 5)
        # The log variance is 2 log_std.
        bounds = 0.01 * (2 * naive.max_log_std).sum() - 0.01 * (2 * naive.min_log_std).sum()
        adam.zero_grad()
        (total + bounds).backward()
        adam.step()
        assert_close(copies(method.model), copies(naive))


def test_fit_follows_omega_and_not_the_held_out_rows():
    """Targets +1 (omega 1.5) and -1 (0.5) settle at 0.5 in all members; 9s are held out."""
    method = build_ampl(model_lr=1e-2, model_batch_size=64)
    targets = torch.ones(50, 4)
    targets[20:40] = -1.0
    targets[40:] = 9.0
    omega = torch.full((50,), 1.5)
    omega[20:40] = 0.5
    for _ in range(150):
        method.model_step(torch.zeros(50, 5), targets, omega, torch.arange(40))
    mean, _ = method.model(torch.zeros(5, 1, 5))
    assert_close(mean, torch.full_like(mean, 0.5), atol=0.2, rtol=0)


ERRORS = [  # of three members after each epoch
    [1.0, 1.0, 0.5],
    [0.995, 0.98, 0.6],  # member 0 gains 0.5 %, too little; member 1 gains 2 %
    [0.989, 0.975, math.nan],  # member 0 gains 1.1 % of 1; member 1 0.5 % of 0.98
    [0.985, 0.972, 0.5],  # 0.4 % of 0.989 and 0.8 % of 0.98: nobody
    [2.0, 2.0, 2.0],
    [2.0, 2.0, 2.0],  # the third idle epoch
    [0.1, 0.1, 0.1],  # never reached
]


def test_when_a_fit_stops_and_what_it_keeps():
    """Patience 3: a gain is more than 1 % of the member's best; each keeps its best epoch.

    The errors are given, and after epoch n all parameters are n.
    """
    method = build_ampl(model_epoch_steps=2, model_patience=3, ensemble_size=3, num_elites=2)
    given = torch.rand(40)
    epochs = []
    steps = []
    reports = []

    def model_step(inputs, targets, omega, train_rows):
        steps.append(train_rows)
        assert omega.equal(given[method.rows_with_next])
        return {}

    def holdout_error(inputs, targets, omega, rows):
        assert omega.equal(given[method.rows_with_next])
        assert len(rows) == 36 // 5
        assert sorted([*rows.tolist(), *steps[-1].tolist()]) == list(range(36))
        epochs.append(rows)
        for parameter in method.model.parameters():
            parameter.data.fill_(len(epochs))
        return torch.tensor(ERRORS[len(epochs) - 1])

    def progress(phase, done, total, logs):
        reports.append((done, logs["model/idle_epochs"]))

    method.model_step = model_step
    method.holdout_error = holdout_error
    error = method.fit_model(0, given, progress)
    assert_close(error, torch.tensor([0.989, 0.98, 0.5]))
    assert len(steps) == 2 * 6
    assert reports == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 3)]
    # The weights of the epoch with the best error; of the elites the lowest error comes first.
    assert_constant_members(method.model, [3, 2, 1])
    assert_constant_members(method.elites, [1, 2])
    for model in (method.model, method.elites):  # the bounds are not restored
        assert (model.max_log_std == 6).all()
        assert (model.min_log_std == 6).all()


def assert_constant_members(model: ampl.ModelEnsemble, values: list[float]) -> None:
    """All weights and biases of a member are its value."""
    for layer in model.layers:
        for parameter in layer.parameters():
            for member, value in zip(parameter, values, strict=True):
                assert (member == value).all()


@pytest.mark.parametrize("holdout_size, expected", [(8092, 7), (3, 3)])
def test_held_out_rows(holdout_size, expected):
    """At most a fifth of 39 rows, which is 7; all others are trained on, in a random split."""
    method = build_ampl(holdout_size=holdout_size)
    held_out, train_rows = method.split_rows(39)
    assert len(held_out) == expected
    assert sorted([*held_out.tolist(), *train_rows.tolist()]) == list(range(39))
    assert not torch.equal(held_out, method.split_rows(39)[0])


def test_a_fit_ends_at_its_last_epoch():
    """--model-max-epochs, also where every epoch is better than the one before."""
    method = build_ampl(model_epoch_steps=1, model_max_epochs=4)
    errors = [5.0, 4.0, 3.0, 2.0, 1.0]

    def holdout_error(inputs, targets, omega, rows):
        return torch.full((5,), errors.pop(0))

    method.holdout_error = holdout_error
    error = method.fit_model(0, torch.ones(40), ignore_progress)
    assert error.tolist() == 5 * [2.0]


def test_statistics_are_of_rows_with_a_known_next_state():
    """The last row of an episode has no s', and must not touch the model's units."""
    method = build_ampl(model_epoch_steps=1, model_max_epochs=1)
    method.data[9::10] = 1e6
    method.fit_model(0, torch.ones(40), ignore_progress)
    known = method.split(method.data[method.rows_with_next])
    inputs = torch.cat([known.obs, known.action], 1)
    targets = torch.cat([known.reward[:, None], known.next_obs - known.obs], 1)
    for model in (method.model, method.elites):
        assert_close(model.input_mean, inputs.mean(0), atol=1e-5, rtol=1e-5)
        assert_close(model.input_std, inputs.std(0))
        assert_close(model.target_mean, targets.mean(0), atol=1e-5, rtol=1e-5)
        assert_close(model.target_std, targets.std(0))


def test_a_refit_goes_on():
    """From the present weights and Adam's state, with other held-out rows; by the seed."""

    def fit(seed: int, k: int, first_fit: bool) -> tuple[list, int, dict]:
        """-> the training rows of fit k, Adam's count of steps, the weights"""
        method = build_ampl(seed=0, model_epoch_steps=2, model_max_epochs=1)
        method.args.seed = seed
        if first_fit:
            method.fit_model(0, torch.ones(40), ignore_progress)
        seen = []
        plain = method.model_step

        def model_step(inputs, targets, omega, train_rows):
            seen.append(train_rows.tolist())
            return plain(inputs, targets, omega, train_rows)

        method.model_step = model_step
        torch.manual_seed(5)  # what was drawn before does not matter
        method.fit_model(k, torch.ones(40), ignore_progress)
        state = method.model_optimizer.state[method.model.layers[0].weight]
        return seen[0], int(state["step"]), copies(method.model)

    rows, steps, weights = fit(0, 0, first_fit=False)
    refit_rows, refit_steps, refit_weights = fit(0, 1, first_fit=True)
    assert (steps, refit_steps) == (2, 4)
    assert refit_rows != rows
    same_rows, _, same_weights = fit(0, 0, first_fit=False)
    assert same_rows == rows
    assert_close(same_weights, weights, atol=0, rtol=0)
    assert fit(1, 0, first_fit=False)[0] != rows
    # Two small steps after the first fit's: not back at the first weights.
    gap = (refit_weights["layers.0.weight"] - weights["layers.0.weight"]).abs().max()
    assert 0 < gap < 0.01


def test_the_squared_error_ranks_members():
    """Member 0 errs by 0.1 and is absurdly sure of it (likelihood: the worst), 1 by 1, 2 by 2."""
    method = build_ampl(model_max_epochs=1, model_epoch_steps=1, ensemble_size=3, num_elites=1)
    offset = torch.tensor([0.1, 1.0, 2.0])[:, None, None]
    sure = torch.tensor([-4.0, 0.0, 0.0])[:, None, None]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., :4] + offset, sure

    method.model.forward = forward
    inputs = torch.randn(600, 5)
    # 600 held-out rows come in two parts of 512 and 88; omega is 0.5 in 300 of them and 1 in 300.
    omega = torch.ones(600)
    omega[:300] = 0.5
    targets = inputs[:, :4]
    error = method.holdout_error(inputs, targets, omega, torch.arange(600))
    assert_close(error, torch.tensor([0.0075, 0.75, 3.0]), atol=1e-5, rtol=1e-5)
    # Only the rows that are named count.
    error = method.holdout_error(inputs, targets, omega, torch.arange(300, 310))
    assert_close(error, torch.tensor([0.01, 1.0, 4.0]), atol=1e-5, rtol=1e-5)
    method.choose_elites(error)
    assert torch.equal(method.elites.layers[2].weight[0], method.model.layers[2].weight[0])


def test_elites_predict_as_their_members():
    """The elites are copies of members 4, 0 and 2, in this order, and of the model's units."""
    method = build_ampl()
    method.model.input_mean += 1.0
    method.model.max_log_std.data += 0.5
    method.choose_elites(torch.tensor([2.0, 9.0, 3.0, 8.0, 1.0]))
    x = torch.randn(1, 6, 5)
    mean, log_std = method.model(x.expand(5, 6, 5))
    elite_mean, elite_log_std = method.elites(x.expand(3, 6, 5))
    assert_close(elite_mean, mean[[4, 0, 2]])
    assert_close(elite_log_std, log_std[[4, 0, 2]])
    assert torch.equal(method.elites.input_mean, method.model.input_mean)
    method.model.layers[0].weight.data += 1.0  # a copy, which the next fit does not move
    assert_close(method.elites(x.expand(3, 6, 5))[0], elite_mean)


# ===== Omega ======================================================================================
def naive_omega_step(
    method: ampl.AMPL, omega: nn.Module, adam: torch.optim.Adam, q_data: Tensor, bound: float
) -> Tensor:
    """A step by Eq. (11) of `omega`, a copy of the method's, tensor by tensor. -> loss

    It must come before the method's own step, which moves the targets.
    """
    rows = torch.randint(40, (8,))
    start = method.initial_obs[torch.randint(len(method.initial_obs), (8,))]
    batch = method.split(method.data[rows])
    next_action = method.actor(batch.next_obs).detach()
    start_action = method.actor(start).detach()
    q1 = method.omega_critic_target.q1
    with torch.no_grad():
        q_next = q1(torch.cat([batch.next_obs, next_action], 1))[:, 0]
        q_next[batch.terminated == 1] = 0.0
        q_start = q1(torch.cat([start, start_action], 1))[:, 0]
        slow_omega = method.omega_target(batch.obs, batch.action)
    values = omega(batch.obs, batch.action)
    left = sum(values[row] * q_data[rows[row]] for row in range(8)) / 8
    right = 0.9 * sum(slow_omega * q_next) / 8 + 0.1 * sum(q_start) / 8
    gap = left - right
    loss = gap**2 / 2 if abs(gap) <= 1 else abs(gap) - 0.5
    mean = values.mean()

    parameters = list(omega.parameters())
    corrected = []
    for parameter in parameters:
        (g,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        (c,) = torch.autograd.grad(mean, parameter, retain_graph=True)
        wanted = min(mean.item() - bound, (c**2).sum().item())
        missing = wanted - (g * c).sum().item()
        if missing > 0:
            g = g + missing / ((c**2).sum() + 1e-8) * c
        corrected.append(g)
    norm = sum((g**2).sum() for g in corrected).sqrt()
    for parameter, g in zip(parameters, corrected):
        parameter.grad = g * min(1.0, 0.05 / (norm.item() + 1e-6))
    adam.step()
    return loss.detach()


@pytest.mark.parametrize("bound", [10.0, 0.5])
def test_omega_step_against_a_naive_one(double, bound):
    """Omega, its two targets and the loss; with the bound far above and below the mean."""
    method = build_ampl(
        gamma=0.9, omega_lr=0.02, omega_tau=0.25, omega_mean_bound=bound, omega_grad_norm=0.05
    )
    method.initial_obs = torch.randn(12, 3)
    method.omega_critic_target.q1[-1].bias.data += 3.0  # unlike the critic
    method.omega.net[-1].weight.data *= 100  # else omega hardly depends on its inputs
    omega = copy.deepcopy(method.omega)
    adam = torch.optim.Adam(omega.parameters(), 0.02)
    q_data = torch.randn(40) + 2.0
    for number in range(4):
        critic_target = copies(method.omega_critic_target)
        omega_target = copies(method.omega_target)
        torch.manual_seed(number)
        loss = naive_omega_step(method, omega, adam, q_data, bound)
        before = copies(method)
        torch.manual_seed(number)
        logs = method.omega_step(q_data)
        assert_close(logs["losses/omega_loss"], loss)
        assert changed(before, method) == {"omega", "omega_target", "omega_critic_target"}
        assert_close(copies(method.omega), copies(omega))
        for name, tensor in method.omega_target.state_dict().items():
            assert_close(tensor, 0.75 * omega_target[name] + 0.25 * copies(omega)[name])
        for name, tensor in method.omega_critic_target.state_dict().items():
            assert_close(tensor, 0.75 * critic_target[name] + 0.25 * copies(method.critic)[name])


def test_the_bound_lowers_the_mean_of_omega():
    """Eq. (10) asks for a mean of 1 where all Q are 1; with a bound of 0.5 it comes down."""
    method = build_ampl(omega_mean_bound=0.5, omega_lr=3e-3)
    method.initial_obs = torch.randn(12, 3)
    method.data[:, -1] = 0.0  # nothing ends

    def q1_only(obs: Tensor, action: Tensor) -> Tensor:
        return torch.ones(len(obs))

    method.omega_critic_target.q1_only = q1_only
    logs = [method.omega_step(torch.ones(40)) for _ in range(300)]
    assert logs[0]["omega/batch_mean"] > 0.9
    assert logs[-1]["omega/batch_mean"] < 0.55


def test_fit_omega():
    """Q_1 of the data is a table; omega's Q target starts at the target critic; the mean is 1."""
    method = build_ampl(omega_steps=3, omega_lr=0.1)
    method.set_data(random_dataset(5000, 3, 2))  # two parts of 4096 and 904 rows
    method.critic_target.q1[-1].bias.data += 4.0
    seen = []
    reports = []
    plain = method.omega_step

    def omega_step(q_data: Tensor) -> dict:
        seen.append((q_data.clone(), copies(method.omega_critic_target), torch.initial_seed()))
        return plain(q_data)

    def progress(phase, done, total, logs):
        reports.append((phase, done, total))

    method.omega_step = omega_step
    before = copies(method)
    weights = method.fit_omega(2, progress)
    assert changed(before, method) == {"omega", "omega_target", "omega_critic_target"}
    assert len(seen) == 3
    assert reports == [("omega, training 2", 3, 3)]
    batch = method.split(method.data)
    q_data, critic_target, seed = seen[0]
    assert_close(q_data, method.critic(batch.obs, batch.action)[0].detach())
    assert_close(critic_target, copies(method.critic_target), atol=0, rtol=0)
    ampl.reseed(0, "omega", 2)
    assert seed == torch.initial_seed()
    omega = method.omega(batch.obs, batch.action).detach()
    assert_close(weights, omega / omega.mean())
    assert weights.mean().item() == pytest.approx(1)
    assert weights.std() > 1e-4


def test_initial_states_of_the_dataset():
    """The first states of all episodes, taken once."""
    method = build_ampl(omega_steps=1)
    method.fit_omega(1, ignore_progress)
    assert torch.equal(method.initial_obs, random_dataset(40, 3, 2)["starts"])
    first = method.initial_obs
    method.fit_omega(2, ignore_progress)
    assert method.initial_obs is first


def test_initial_states_of_the_simulator():
    """As many resets as asked for, all different, the same again by the seed."""
    settings = {
        "env_id": "maze2d-umaze-v1",
        "initial_states": "simulator",
        "num_initial_states": 1500,
    }
    method = build_ampl(**settings)
    reports = []

    def progress(phase, done, total, logs):
        reports.append((phase, done, total))

    states = method.collect_initial_obs(progress)
    assert states.shape == (1500, 4)
    assert states.dtype == torch.float32
    assert len(states.unique(dim=0)) == 1500
    assert reports == [("initial states", 1000, 1500)]
    assert torch.equal(states, method.collect_initial_obs(progress))
    other = build_ampl(seed=1, **settings).collect_initial_obs(progress)
    assert not torch.equal(states, other)


# ===== Acting =====================================================================================
def test_act():
    """Of five candidates at each of three states the one with the largest smaller Q."""
    method = build_ampl(eval_candidates=5)
    obs = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    q = torch.randn(2, 15)
    seen = []

    def forward(states: Tensor, actions: Tensor) -> Tensor:
        seen.append((states, actions))
        return q

    method.critic.forward = forward
    acted = method.act(obs)
    assert acted.shape == (3, 2)
    assert acted.dtype == np.float32
    states, actions = seen[0]
    assert len(actions.unique(dim=0)) == 15
    smaller = q.amin(0)
    for number in range(3):
        candidates = (states == torch.from_numpy(obs[number])).all(1).nonzero().flatten()
        assert len(candidates) == 5
        best = candidates[smaller[candidates].argmax()]
        assert acted[number].tolist() == actions[best].tolist()


def test_act_uses_policy_and_critics_and_not_their_targets():
    """Without noise the action is tanh(net(s, 0)) of the policy."""
    method = build_ampl(noise_std=0.0)
    method.actor_target.net[-1].bias.data += 1.0
    obs = torch.randn(4, 3)
    assert_close(torch.from_numpy(method.act(obs.numpy())), method.actor(obs).detach())


# ===== Training ===================================================================================
def maze_arrays(rows: int) -> dict[str, np.ndarray]:
    """Random arrays of maze2d's shape, in episodes of ten that end at a time limit."""
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(rows, 4)),
        "actions": random.uniform(-1, 1, (rows, 2)),
        "rewards": random.uniform(size=rows),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 10 == 9,
    }


def score_zero(method: nn.Module, args: ampl.Args, episodes: int, k: int) -> np.ndarray:
    """Stands for `evaluate`, which takes long."""
    return np.zeros(episodes)


SMALL_RUN = {
    "env_id": "maze2d-umaze-v1",
    "cuda": False,
    "hidden": (8, 8),
    "model_hidden": 8,
    "batch_size": 10,
    "buffer_size": 50,
    "rollout_rows": 24,
    "eval_episodes": 2,
    "final_episodes": 3,
}


class Spy(ampl.AMPL):
    """AMPL that notes what is asked of it, and skips the long phases."""

    events = []

    def fit_model(self, k, omega, progress):
        self.events.append(("fit_model", k, omega.unique().tolist(), len(omega)))
        return torch.arange(7.0)

    def fit_omega(self, k, progress):
        self.events.append(("fit_omega", k))
        return torch.full((len(self.data),), 0.5)

    def rollout(self):
        self.events.append(("rollout",))
        return super().rollout()

    def iterate(self, warmup, step_actor):
        self.events.append(("iterate", warmup, step_actor, int(self.num_real)))
        return super().iterate(warmup, step_actor)


SCHEDULE = [
    ("fit_model", 0, [1.0], 54),  # 60 rows less 6 at a time limit
    ("reseed", 2, "rollout", 0),
    ("rollout",),
    ("reseed", 2, "iterations", 0),
    # warm-up, does the policy step, rows of data
    ("iterate", True, True, 10),
    ("iterate", True, False, 10),
    ("iterate", True, True, 10),
    ("reseed", 2, "rollout", 3),
    ("rollout",),
    ("reseed", 2, "iterations", 3),
    ("iterate", False, False, 10),
    ("evaluate", 2, 4),  # episodes, iterations done
    ("fit_omega", 1),
    ("fit_model", 1, [0.5], 54),
    ("iterate", False, True, 9),
    ("iterate", False, False, 8),
    ("reseed", 2, "rollout", 6),
    ("rollout",),
    ("reseed", 2, "iterations", 6),
    ("iterate", False, True, 7),
    ("iterate", False, False, 6),
    ("evaluate", 2, 8),
    ("evaluate", 3, 0),  # the last evaluation
]


def test_what_happens_at_which_iteration(tmp_path, monkeypatch):
    """The schedule of Algorithm 1, of the seeds and of the evaluations, in eight iterations."""
    events = []
    plain_reseed = ampl.reseed

    def reseed(seed, phase, k=0):
        plain_reseed(seed, phase, k)
        if phase in ("rollout", "iterations"):
            events.append(("reseed", seed, phase, k))

    def evaluate(method, args, episodes, k):
        events.append(("evaluate", episodes, k))
        return np.zeros(episodes)

    monkeypatch.setattr(Spy, "events", events)
    monkeypatch.setattr(ampl, "reseed", reseed)
    monkeypatch.setattr(ampl, "evaluate", evaluate)
    args = ampl.Args(
        **SMALL_RUN,
        run_dir=str(tmp_path),
        seed=2,
        total_iterations=8,
        warmup_iterations=3,
        real_decay_every=1,
        model_retrain_every=4,
        rollout_every=3,
        policy_frequency=2,
        eval_every=4,
    )
    ampl.train(args, Spy, maze_arrays(60))
    assert events == SCHEDULE


def test_runs_depend_on_the_seed_alone(tmp_path, monkeypatch):
    """Two runs of a seed end with the same networks, and another seed's with others."""
    monkeypatch.setattr(ampl, "evaluate", score_zero)
    trained = []

    class Kept(ampl.AMPL):
        def set_data(self, dataset):
            super().set_data(dataset)
            trained.append(self)

    for number, seed in enumerate((0, 0, 1)):
        args = ampl.Args(
            **SMALL_RUN,
            run_dir=str(tmp_path / str(number)),
            seed=seed,
            initial_states="dataset",
            total_iterations=6,
            warmup_iterations=2,
            real_decay_every=1,
            model_retrain_every=4,
            model_epoch_steps=2,
            model_max_epochs=2,
            omega_steps=2,
            rollout_every=3,
        )
        torch.manual_seed(number)
        ampl.train(args, Kept, maze_arrays(60))
    one = copies(trained[0])
    assert changed(one, trained[1]) == set()
    assert {"model", "actor", "critic", "omega", "model_data"} <= changed(one, trained[2])
