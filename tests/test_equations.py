"""The equations of ampl.py against numbers from paper, and its steps that can hide a mistake."""

import itertools
import math

import pytest
import torch
from steps import TINY, dataset
from steps import build as build_script
from torch import Tensor, nn
from torch import tensor as T
from torch.testing import assert_close

import ampl


def build(rows: int = 40, **changes) -> ampl.AMPL:
    """AMPL on random data (S = 3, A = 2); half of a batch is from its filled buffer."""
    settings = TINY | dict(num_seeds=1, env_id="door-expert-v1") | changes
    method = build_script("ampl", "AMPL", "cpu", rows, (3, 2), **settings)
    method.real_rows.fill_(method.args.batch_size // 2)
    torch.manual_seed(1)
    return method


def weights(module: nn.Module, learner: int | slice = slice(None)) -> list[Tensor]:
    return [p.detach()[learner].clone() for p in module.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(map(torch.equal, one, two))


def part(batch: ampl.Batch, *index: int | slice) -> ampl.Batch:
    return ampl.Batch(*(field[index] for field in batch))


LOGIT, NAN = math.log(3), math.nan  # the logit of 3/4
ROWS = ampl.Batch(None, None, torch.ones(1, 4), None, T([[0.0, 1.0, 0.0, 0.0]]))
Q_NEXT = T([[[2.0, 2.0, 40.0, -40.0], [4.0, 4.0, 10.0, -10.0]]])
Q, TARGET = T([[[1.0, 2.0], [0.0, 0.0]]]), T([[0.0, 4.0]])
MEAN, LOG_STD = T([[[[1.0, 2.0], [0.0, 0.0]]]]), T([[[[0.0, math.log(2)], [0.0, 0.0]]]])
OMEGAS, Q_ENDS = (T([[2.0, 1]]), T([[1.0, 4]])), (T([[2.0, 2]]), T([[2.0, 4, 3]]), 0.9)
EQUATIONS = [
    # Eq. (12): 1 + 0.9 (0.75 * 2 + 0.25 * 4); a terminal; 0.75 * 10 + 0.25 * 40 = 17.5;
    # 0.75 * -40 + 0.25 * -10 = -32.5. Then with the bound at 17.5.
    ("conservative_target", (ROWS, Q_NEXT, ampl.Args(gamma=0.9)), [[3.25, 1, 16.75, -28.25]]),
    ("conservative_target", (ROWS, Q_NEXT, ampl.Args(gamma=0.9, q_bound=17.5)), [[3.25, 1, 1, 1]]),
    # Eq. (13): half squares (0.5 + 2) / 2 + (0 + 8) / 2; threshold 1: (0.5 + 1.5 + 0 + 3.5) / 2.
    ("critic_loss", (Q, TARGET, 500.0), [5.25]),
    ("critic_loss", (Q, TARGET, 1.0), [2.75]),
    # The middle row is dropped; without any row it is 0 and not NaN.
    ("masked_mean", (T([[1.0, 9, 3], [5, 6, 7]]), T([[1.0, 0, 1], [0, 0, 0]])), [2, 0]),
    # Eq. (15): mean of -log 3/4 = 0.287682 and -log 1/2 = 0.693147; the third is dropped.
    ("generator_loss", (T([[LOGIT, 0, -50]]), T([[1.0, 1, 0]])), [0.490415]),
    # Eq. (16): half of -0.8 log 3/4 - 0.2 log 1/4 = 0.507405 and -log 3/4 = 0.287682.
    ("discriminator_loss", (T([[LOGIT]]), T([[-LOGIT, 9]]), T([[1.0, 0]]), T([[0.8]])), [0.397543]),
    # Eq. (4): rows (1 + 2^2 / 2^2 + 2 log 2) / 2 = 1.693147 and 0. Eq. (6): weights 3 and 1.
    ("model_loss", (MEAN, LOG_STD, torch.zeros(2), torch.ones(1, 1, 2)), [[0.846574]]),
    ("model_loss", (MEAN, LOG_STD, torch.zeros(2), T([[[3.0, 1]]])), [[2.539721]]),
    ("model_error", (MEAN, torch.zeros(2), T([[[3.0, 1]]])), [[3.75]]),  # 3 (1 + 4) / 2 / 2
    # Eq. (10): (2 * 3 + 1 * 5) / 2 = 5.5 and 0.9 (1 * 2 + 4 * 2) / 2 + 0.1 * 3 = 4.8. Eq. (11):
    # 0.7^2 / 2; with Q = 6, 8 the left side is 10, so 5.2 - 1 / 2.
    ("miw_loss", (*OMEGAS, T([[3.0, 5]]), *Q_ENDS), [0.245]),
    ("miw_loss", (*OMEGAS, T([[6.0, 8]]), *Q_ENDS), [4.7]),
    # At least min(mean - 10, |c|^2) of <g, c>: -6 and 1 where it is 1, so no change; -1 where it
    # is -6, so g + 5 / 4 c; 4 where it is -6, so g + 10 / 4 c.
    ("keep_mean_below", (10.0, T([4.0, 13, 9, 99]), [T([[1.0, 0], [1, 0], [2, 0], [2, 0]])],
     [T([[1.0, 2], [1, 2], [-3, 0], [-3, 7]])]), [[[1, 2], [1, 2], [-0.5, 0], [2, 7]]]),
    ("scale_rewards", (T([1.0, 3, 5]),), [0.00025, 0.50025, 1.00025]),
    # The tasks' own rules at their edges, 1 is an end: heights, angles, speeds, what is not finite.
    ("known_termination", ("hopper-medium-v2", T([
        [0.71, 0.19, 99], [150, 0, 0], [0.69, 0, 0], [1, -0.21, 0], [1, 0, -100.5], [1, 0, NAN],
        [math.inf, 0, 0]])), [0, 0, 1, 1, 1, 1, 1]),
    ("known_termination", ("walker2d-medium-v2", T([
        [0.81, 0.99, 500], [1.99, -0.99, 0], [0.79, 0, 0], [2.01, 0, 0], [1, -1.01, 0],
        [1, 1.01, 0], [NAN, 0, 0]])), [0, 0, 1, 1, 1, 1, 1]),
    ("known_termination", ("ant-angle-v0", T([
        [0.21, 9, -500], [0.99, 0, 0], [0.19, 0, 0], [1.01, 0, 0], [0.5, NAN, 0]])),
     [0, 0, 1, 1, 1]),
    ("known_termination", ("pen-human-v1", T([26 * [0] + [0.0751], 26 * [0] + [0.0749]])), [0, 1]),
    ("known_termination", ("halfcheetah-medium-v2", T([[-1e6, 1e6]])), [0]),
]  # fmt: skip


@pytest.mark.parametrize("name, inputs, expected", EQUATIONS)
def test_equation(name, inputs, expected):
    """Numbers from paper: wrong sign, factor, reduction, weight, or side of a mask."""
    result = getattr(ampl, name)(*inputs)
    result = torch.stack(result) if isinstance(result, list) else result
    result = result.float() if result.dtype == torch.bool else result
    assert_close(result, T(expected, dtype=torch.float), atol=2e-6, rtol=1e-6)


def test_real_count():
    """f is 1 for 45,000 iterations and falls by 0.1 per 5000 to 0.5: off by one at an edge."""
    rows = {0: 512, 39_999: 512, 40_000: 512, 44_999: 512, 45_000: 460, 49_999: 460, 50_000: 409}
    rows |= {54_999: 409, 55_000: 358, 60_000: 307, 64_999: 307, 65_000: 256, 999_999: 256}
    assert {i: ampl.real_count(i, ampl.Args()) for i in rows} == rows


def test_clipping_and_polyak():
    """Norm 5 of two tensors becomes 1, the other learner's 0.5 stays; a quarter of the way."""
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.Adam([one.weight, two.weight])
    one.weight.data, two.weight.data = T([[3.0, 0.0], [0.3, 0.0]]), T([[0.0, 4.0], [0.4, 0.0]])
    loss = (one.weight.square() + two.weight.square()).sum(-1) / 2
    ampl.move(optimizer, ampl.gradients(loss, optimizer), 1.0)
    assert_close(one.weight.grad, T([[0.6, 0.0], [0.3, 0.0]]))
    assert_close(two.weight.grad, T([[0.0, 0.8], [0.4, 0.0]]))
    one.weight.data, two.weight.data = torch.full((2, 2), 5.0), torch.ones(2, 2)
    ampl.polyak(two, one, 0.25)
    assert two.weight.unique().tolist() == [2.0] and one.weight.unique().tolist() == [5.0]


def five_members(log_std: float = -math.inf) -> ampl.DynamicsEnsemble:
    """Whatever the action member m predicts m and the normalised obs; units are not 0 and 1."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        member = torch.arange(5.0).view(1, -1, 1, 1).expand(*x.shape[:-1], 1)
        return torch.cat([member, x[..., :3]], -1), T(log_std)

    model = build(num_elites=5).elites
    model.forward = forward
    model.input_mean.fill_(1), model.input_std.fill_(2)
    model.target_mean.copy_(T([10, 0.5, 0.5, 0.5])), model.target_std.copy_(T([4, 8, 8, 8]))
    return model


def test_the_deal_of_the_docstring(monkeypatch):
    """7 rows, cut 3: member 0 gets row 3, 1 row 4, 2 rows 5 and 0: a wrong way back, or units."""
    obs, members = torch.arange(21.0).view(1, 7, 3), T([[2, 3, 4, 0, 1, 2, 3]])
    model, unsure = five_members(), five_members(NAN)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: T(3))
    reward, next_obs = model.sample(obs, torch.zeros(1, 7, 2))
    assert torch.equal(reward, 4.0 * members + 10)
    assert torch.equal(next_obs, obs + 8 * (obs - 1) / 2 + 0.5)
    assert (unsure.sample(obs, obs[..., :2])[0] == 0).all()  # as the authors have it


@pytest.mark.parametrize("rows", [20, 23, 3])
def test_members_get_equal_shares(rows):
    """Numbers of rows differ by at most one, a row meets every member; noise of another width."""
    model, zeros = five_members(), torch.zeros(1, rows, 3)
    deals = torch.cat([model.sample(zeros, zeros[..., :2])[0] for _ in range(60)])
    shares = torch.stack([(deals == 4 * m + 10).sum(-1) for m in range(5)])
    assert (shares.amax(0) - shares.amin(0)).max() <= 1 and len(deals[:, 0].unique()) == 5
    noisy, zeros = five_members(-math.log(4)), torch.zeros(1, 9999, 3)
    assert noisy.sample(zeros, zeros[..., :2])[1].std() == pytest.approx(2, rel=0.05)  # 8 / 4


def test_ranges(monkeypatch):
    """Limits from s and s', scaled r; on a limit is inside; only the ranges overwrite r."""
    method, data = build(), dataset(2, 3, 2)
    data |= dict(obs=T([[1.0, -2, 4], [0, 1, 0]]), next_obs=T([[3.0, 1, 0], [0, -4, 0]]))
    method.set_data(data | dict(reward=T([5.0, 6.0])))
    assert method.obs_limit.tolist() == [6, 8, 8]
    # Rewards 0.001 and 1.001, deviation 0.707107: |1.001 + 7.071068| is the larger limit.
    assert method.reward_limit.item() == pytest.approx(8.072068)
    method.reward_limit = T(5.0)
    monkeypatch.setattr(ampl, "known_termination", lambda _, s: s[..., 1] > 1.5)
    next_obs = T([[[6.0, -8, 0], [6.01, 0, 0], [0, -8.01, 0], [0, 0, 0], [0, 0, 0], [0, 2, 0]]])
    reward, terminated = method.terminate(T([[5.0, 1, 1, 5.01, -5.01, 1]]), next_obs)
    assert reward.tolist() == [[5, -5, -5, -5, -5, 1]]
    assert terminated.tolist() == [[0, 1, 1, 1, 1, 1]]


def test_buffer_and_mixed_batch():
    """After 8 + 5 rows in a room of 10 the oldest three are gone; a batch begins with data."""
    method = build(num_seeds=2, batch_size=500)
    method.buffer = torch.zeros(2, 10, 10)
    method.buffer_end.zero_(), method.buffer_rows.zero_(), method.real_rows.fill_(5)
    method.data[:, 5] = -torch.arange(1.0, 41.0)
    number, obs = torch.arange(1.0, 14.0) + T([[0.0], [1000.0]]), torch.zeros(2, 13, 3)
    rows = ampl.Batch(obs, obs[..., :2], number, obs + 5, torch.ones(2, 13))
    method.remember(part(rows, slice(None), slice(8)))
    reward = method.sample().reward  # [L, 2, B]
    assert (reward[..., :5] < 0).all() and not torch.equal(reward[:, 0], reward[:, 1])
    for learner in range(2):
        number, shares = reward[learner, :, 5:].unique(return_counts=True)
        assert number.tolist() == [1000 * learner + n for n in range(1, 9)] and max(shares) < 200
    method.remember(part(rows, slice(None), slice(8, 13)))
    stored = method.split(method.buffer)
    assert stored.reward[0].tolist() == [11, 12, 13, 4, 5, 6, 7, 8, 9, 10]
    assert method.buffer_end == 3 and method.buffer_rows == 10
    assert (stored.next_obs == 5).all() and (stored.terminated == 1).all()


def test_rollout(monkeypatch):
    """7 slots x 5 steps; the ending step is kept, then the slot restarts at a new stored state."""
    method = build(horizon=5, rollout_rows=33)
    method.elites.sample = lambda obs, action: (obs[..., 0], obs + 1)  # one more per step
    method.data[:, 0] = 100 * torch.arange(1, 41)
    method.buffer_end.zero_(), method.buffer_rows.zero_()
    method.obs_limit.fill_(1e9), method.reward_limit.fill_(1e9)
    monkeypatch.setattr(ampl, "known_termination", lambda _, s: s[..., 0] % 100 == 2)
    assert method.rollout()["rollout/terminated_frac"].item() == pytest.approx(2 / 5)
    assert method.buffer_rows == 35
    rows = method.split(method.buffer[0, :35].view(5, 7, -1))  # [step, slot]
    obs = rows.obs[..., 0]
    assert torch.equal(rows.next_obs[..., 0], obs + 1) and torch.equal(rows.reward, obs)
    assert (obs % 100)[:, 0].tolist() == [0, 1, 0, 1, 0] == (obs % 100)[:, 6].tolist()
    assert torch.equal(obs[1], obs[0] + 1) and not torch.equal(obs[2], obs[0])
    assert rows.terminated[:, 3].tolist() == [0, 1, 0, 1, 0]


def test_rollout_actions():
    """One action per row; under --shared-rollout-action one per chunk of 2048 and step."""
    method = build()
    assert len(method.split(method.buffer[0, :24]).action.unique(dim=0)) == 24
    method = build(rollout_rows=9000, buffer_size=9000, shared_rollout_action=True)
    action = method.split(method.buffer[0]).action
    assert len(action.unique_consecutive(dim=0)) == 6 == len(action.unique(dim=0))
    assert torch.equal(action[0], action[2047]) and not torch.equal(action[0], action[2048])


def test_units_of_the_data():
    """Mean and deviation are of the rows with a known s', targets are (r, s' - s)."""
    method = build()
    method.data[39] = 1e6  # its s' is unknown
    inputs, targets = method.model_pairs()
    pairs = torch.cat([inputs, targets], -1)
    assert_close(pairs.mean(0), torch.zeros(9), atol=1e-5, rtol=0)
    assert_close(pairs.std(0), torch.ones(9))
    row, first = targets[0] * method.model.target_std, method.split(method.data[0])
    expected = torch.cat([first.reward[None], first.next_obs - first.obs])
    assert_close(row + method.model.target_mean, expected)


def test_model_step_weighs_its_rows():
    """Targets +1 (weight 1.5) and -1 (0.5) settle at 0.5 in all members; held-out 9s are unseen."""
    method, target = build(model_lr=1e-2, model_batch_size=64), torch.ones(50, 4)
    target[20:40], target[40:] = -1.0, 9.0
    weight = torch.where(target[:, 0] == -1, 0.5, 1.5)[None]
    for _ in range(150):
        method.model_step(torch.zeros(50, 5), target, weight, torch.arange(40)[None])
    mean = method.model(torch.zeros(1, 5, 1, 5))[0]
    assert_close(mean, torch.full_like(mean, 0.5), atol=0.2, rtol=0)


def test_fit_model_stops_restores_and_ranks():
    """Patience 3: a gain is more than 1 % of the best, of each member and learner by itself.

    Learner 0 stops after epoch 6, so that its 0.1s do not count; learner 1 goes on to epoch 7.
    """
    one = [[1, 1, 0.5], [0.995, 0.98, 0.6], [0.989, 0.975, NAN], [0.985, 0.972, 0.5],
           [2, 2, 2], [2, 2, 2], [0.1, 0.1, 0.1]]  # fmt: skip
    two = [[3, 2, 1]] * 3 + [[1.5, 2, 1]] * 4
    changes = dict(model_epoch_steps=1, model_patience=3, ensemble_size=3, num_elites=2)
    method, epoch = build(num_seeds=2, **changes), itertools.count()

    def validate(inputs: Tensor, targets: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        now = next(epoch)
        assert weight.equal(given[:, method.has_next]) and rows.shape == (2, 36 // 5)
        for p in method.model.parameters():
            p.data.fill_(now + 1)
        return T([one[now], two[now]])

    method.model_step, method.validate = lambda *_: {}, validate
    given = torch.rand(2, 40)
    error = method.fit_model(0, given, print)
    assert_close(error, T([[0.989, 0.98, 0.5], [1.5, 2, 1]]))
    for member in method.model.members():  # the weights of the epoch with the best error
        assert member.flatten(2)[..., 0].tolist() == [[3, 2, 1], [4, 1, 1]]
    for member in method.elites.members():  # the two with the lowest errors
        assert member.flatten(2)[..., 0].tolist() == [[1, 2], [1, 4]]
    assert method.model.max_log_std.unique() == 7 == method.elites.max_log_std.unique()


def test_the_squared_error_ranks_members():
    """Member 0 errs by 0.1 and is absurdly sure of it (likelihood: the worst), 1 by 1, 2 by 2."""
    method = build(600, model_max_epochs=1, ensemble_size=3, num_elites=1)
    method.has_next = torch.arange(600)
    method.data[:, 5], method.data[:, 6:9] = method.data[:, 0], 3 * method.data[:, :3]
    offset, log_std = T([0.1, 1.0, 2.0]).view(1, 3, 1, 1), T([-4.0, 0.0, 0.0]).view(1, 3, 1, 1)
    method.model.forward = lambda x: (x[..., [0, 0, 1, 2]] + offset, log_std)
    method.model_step = lambda *_: {}
    error = method.fit_model(0, torch.ones(1, 600), print)
    assert_close(error, T([[0.01, 1.0, 4.0]]), atol=1e-4, rtol=1e-4)
    assert same(*([p[0, 0] for p in m.members()] for m in (method.elites, method.model)))
    # In parts of 512: 300 rows of weight 0.5 and 300 of 1.
    weight, rows = torch.where(torch.arange(600) < 300, 0.5, 1.0)[None], torch.arange(600)[None]
    assert_close(method.validate(*method.model_pairs(), weight, rows)[0, 1:], T([0.75, 3.0]))


def test_fit_weight():
    """Q_1's table equals Q_1 at the stored pairs, Q' starts at the target critic, mean is one."""
    method, seen = build(5000, num_seeds=2, miw_steps=1, miw_lr=0.1), []  # parts of 4096 rows
    batch, step = method.split(method.data.expand(2, -1, -1)), method.miw_step
    method.critic_target.net.out.bias.data += 4.0
    method.miw_step = lambda q: seen.extend([q, *weights(method.critic_slow)]) or step(q)
    weight = method.fit_weight(1, print)
    assert_close(seen[0], method.critic(batch.obs, batch.action)[:, 0].detach())
    assert same(seen[1:], weights(method.critic_target))
    omega = method.omega(batch.obs, batch.action).detach()
    assert_close(weight, omega / omega.mean(-1, keepdim=True))
    assert_close(weight.mean(-1), torch.ones(2))


@pytest.mark.parametrize("ended, expected", [(1.0, 0.4223), (0.0, 0.0)])
def test_miw_step(ended, expected):
    """Q = 1, omega 0.929: sides 0.929 and 0.01, plus 0.99 * 0.929 unless ended; mean kept below."""
    method = build(miw_mean_bound=0.5, miw_lr=3e-3)
    method.data[:, -1] = ended
    method.critic_slow.first = lambda obs, action: torch.ones(obs.shape[:2])
    logs = [method.miw_step(torch.ones(1, 40)) for _ in range(300)]
    assert logs[0]["losses/weight_loss"].item() == pytest.approx(expected, abs=0.005)
    # Not ended, Eq. (10) asks for a mean of 1: it must come down from 0.93 all the same.
    assert logs[0]["weights/batch_mean"] > 0.9 and logs[-1]["weights/batch_mean"] < 0.55


def test_fake_pairs(monkeypatch):
    """Eq. (14): gradient through both raw actions, none through s'; a terminal s' has no pair."""
    method, obs = build(), torch.arange(12.0).view(1, 4, 3)
    method.elites.sample = lambda obs, action: (torch.zeros(obs.shape[:2]), obs + 100)
    method.obs_limit.fill_(1e9)
    monkeypatch.setattr(ampl, "known_termination", lambda _, s: s[..., 0] == 106)  # the third row
    pairs, raw, keep = method.fake_pairs(obs, method.actor(obs))
    assert torch.equal(pairs, torch.cat([obs, obs + 100], 1)) and not pairs.requires_grad
    assert keep.tolist() == [[1, 1, 1, 1, 1, 1, 0, 1]]
    for half in raw.split(4, 1):
        assert all(g.any() for g in ampl.gradients(half.sum(), method.optimizers["actor"], True))
    method.data[:, 3:5] = T([1.0, -1.0])  # where atanh is infinite
    start = method.sample().obs[:, 1]
    assert all(loss.isfinite() for loss in method.gan_losses(start, method.actor(start)))


@pytest.mark.parametrize("warmup, step_actor", [*itertools.product([True, False], repeat=2)])
def test_what_an_iteration_moves(warmup, step_actor):
    """The policy if asked, by L_g alone in the warm start; never model and omega."""
    method = build()
    method.actor_target.net.out.bias.data += 1.0
    before = {name: weights(module) for name, module in method.named_children()}
    logs = method.iterate(warmup, step_actor)
    moved = {name for name in before if not same(before[name], weights(getattr(method, name)))}
    always = {"critic", "discriminator", "actor_target", "critic_target"}
    assert moved == always | ({"actor"} if step_actor else set())
    assert (logs["losses/actor_loss"] == logs["losses/generator_loss"]).item() == warmup


def test_critic_bootstraps_from_the_targets():
    """Q = 0 and Q' = 50: the loss is (r + 49.5)^2, at s' and the target policy's action there."""
    method, seen = build(num_seeds=2), []
    batch = part(method.sample(), slice(None), 0)._replace(terminated=torch.zeros(2, 16))
    method.actor_target.forward = lambda obs: obs[..., :2] / 2
    method.critic_target.forward = lambda *x: seen.extend(x) or torch.full((2, 2, 16), 50.0)
    for p in method.critic.parameters():
        p.data.zero_()
    loss = method.update_critic(batch)["losses/critic_loss"]
    assert_close(seen, [batch.next_obs, torch.tanh(batch.next_obs[..., :2] / 2)])
    assert_close(loss, (batch.reward + 49.5).square().mean(-1))
    norm = sum(p.grad.square().flatten(1).sum(1) for p in method.critic.parameters()).sqrt()
    assert_close(norm, T([0.1, 0.1]))  # clipped, each learner by itself


def test_q_avg_and_policy_loss():
    """First the mean |min Q| (3), then 0.5 % of the way to the next (5); lambda = 10 / 3.01."""
    method = build()
    for low, expected in ((-3.0, 3.0), (-5.0, 3.01)):
        method.critic.forward = lambda *_, q=low: T([[[q] * 16, [1.0] * 16]])
        method.update_policy_and_discriminator(method.sample().obs, False, False)
        assert method.q_avg.item() == pytest.approx(expected)
    loss = method.policy_loss(T([[1.0, 2.01]]), T([0.5]))  # Eq. (17): -10 / 3.01 * 3.01 / 2 + 0.5
    assert loss.item() == pytest.approx(-4.5)


def test_learners_are_isolated():
    """Learner 0 after all steps is bit for bit the same whatever learner 1 holds."""
    results = []
    for factor in (1.0, 3.0):
        method = build(num_seeds=2, miw_mean_bound=0.9, model_max_epochs=1, model_epoch_steps=5)
        method.buffer[1] *= factor
        for p in method.parameters():
            p.data[1] *= factor
        for i in range(4):
            method.iterate(i < 2, i % 2 == 0)
            method.miw_step(torch.randn(2, 40) * T([[1.0], [factor]]))
        method.fit_model(1, torch.rand(2, 40), print)
        method.rollout()
        results.append([[*weights(method, k), method.buffer[k]] for k in (0, 1)])
    assert same(results[0][0], results[1][0]) and not same(results[0][1], results[1][1])


def test_act():
    """Per state the candidate with the largest min Q: states mixed up, max Q, the wrong learner."""
    method, seen = build(num_seeds=2, eval_candidates=5), []
    q, obs = torch.randn(2, 2, 15), torch.randn(2, 3, 3)
    method.critic.forward = lambda states, action: seen.extend((states, action)) or q
    acted, (states, action) = method.act(obs.numpy()), seen
    for learner, n in itertools.product(range(2), range(3)):
        rows = (states[learner] == obs[learner, n]).all(-1).nonzero().flatten().tolist()
        best = max(rows, key=lambda row: q[learner, :, row].min())
        assert len(rows) == 5 and T(acted[learner, n]).equal(action[learner, best])
