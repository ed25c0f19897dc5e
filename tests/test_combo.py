"""COMBO: what it does otherwise than MOPO, by hand; --select, the probe, and whole runs.

What combo.py does as mopo.py does stands in test_mopo.py, for both.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from small import build_combo
from test_equations import changed, copies
from test_extensions import lines_of_code, tensors_of
from test_mopo import RUN, NaiveIteration, method_for_iterations, steps_shown, train_on_pendulum
from test_runs import contents, points, result, saved, write_dataset
from torch import Tensor, nn
from torch.testing import assert_close

import combo
import mopo


@pytest.fixture
def double():
    """All tensors of the test in double precision, so that two ways to compute agree to 1e-9."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ===== Equations ==================================================================================
def test_bellman_target():
    """gamma = 0.9, all rewards 1; there is no entropy in it."""
    batch = combo.Batch(
        obs=None,
        action=None,
        reward=torch.ones(3),
        next_obs=None,
        terminated=torch.tensor([0.0, 1.0, 0.0]),
    )
    q_next = torch.tensor([[2.0, 2.0, -4.0], [4.0, 4.0, -10.0]])
    # 0: 1 + 0.9 * 2 = 2.8; 1: terminated, so the reward alone; 2: 1 + 0.9 * -10 = -8.
    target = combo.bellman_target(batch, q_next, 0.9)
    assert_close(target, torch.tensor([2.8, 1.0, -8.0]))


def test_log_sum_exp_is_over_all_thirty_weighted_actions():
    """Each action counts exp(Q) / p: 30 uniform ones, with p = 1/4 in the square, count 120."""
    q = torch.zeros(2, 1, 30)  # [2, B, n]
    uniform = torch.full((1, 30), -math.log(4))
    value = combo.log_sum_exp(q, uniform)
    assert_close(value, torch.full((2, 1), math.log(120)))
    # Q_2 is 10 at one of them; with p = 1 the sums are 30 and 29 + e^10 = 22055.47.
    q[1, 0, 4] = 10.0
    value = combo.log_sum_exp(q, torch.zeros(1, 30))
    assert_close(value, torch.tensor([[math.log(30)], [math.log(22055.4658)]]))


def test_gradient_of_log_sum_exp():
    """A softmax with weights 1 / p: an action that was drawn seldom counts more."""
    q = torch.tensor([0.0, 1.0]).repeat(2, 2, 1).requires_grad_()  # two critics, two states
    density = torch.tensor([[0.5, 0.25], [1.0, 1.0]])
    value = combo.log_sum_exp(q, density.log())
    # State 0: 1 / 0.5 + e / 0.25 = 2 + 10.8731 = 12.8731. State 1: 1 + e = 3.7183.
    assert_close(value, torch.tensor([[2.5551420, 1.3132617]]).expand(2, 2))
    value.sum().backward()
    # State 0: 2 / 12.8731 and 10.8731 / 12.8731. State 1: 1 / 3.7183 and e / 3.7183.
    for critic in range(2):
        assert_close(q.grad[critic, 0], torch.tensor([0.1553624, 0.8446376]))
        assert_close(q.grad[critic, 1], torch.tensor([0.2689414, 0.7310586]))


def test_expectation():
    """The mean over rows of each critic; no rows give 0 and not NaN, which would end a run."""
    q = torch.tensor([[1.0, 2.0, 6.0], [10.0, 20.0, 60.0]])
    assert combo.expectation(q).tolist() == [3, 30]
    assert combo.expectation(q[:, :0]).tolist() == [0, 0]


@pytest.mark.parametrize("fraction, rows", [(0.0, 0), (0.05, 12), (0.5, 128), (0.8, 204), (1, 256)])
def test_real_rows(fraction, rows):
    """f B, rounded down: 0.05 * 256 = 12.8 and 0.8 * 256 = 204.8."""
    assert combo.real_rows(combo.Args(real_fraction=fraction)) == rows


# ===== The actions of rho =========================================================================
def test_proposals_estimate_an_integral():
    """n uniform, n of pi(.|s), n of pi(.|s'), with the densities that they were drawn from.

    With the right densities the mean of exp(Q) / p over any kind is the integral of exp(Q).
    """
    n = 20_000
    method = build_combo(num_actions=n)

    def forward(obs: Tensor) -> tuple[Tensor, Tensor]:
        return 0.3 * obs[:, :2], torch.full((len(obs), 2), math.log(0.8))

    method.actor.forward = forward
    obs = torch.tensor([[1.0, -1.0, 0.0], [2.0, 0.0, 0.0]])
    actions, log_density = method.proposals(obs, -obs)  # s' is -s
    assert actions.shape == (2, 3 * n, 2)
    assert log_density.shape == (2, 3 * n)
    assert actions.abs().max() <= 1
    assert len(actions.flatten(0, 1).unique(dim=0)) > 6 * n - 10  # no two alike, but for rounding

    raw_means = torch.atanh(actions[..., 0].double()).unflatten(1, (3, n)).mean(-1)
    assert_close(
        raw_means, torch.tensor([[0.0, 0.3, -0.3], [0.0, 0.6, -0.6]]).double(), atol=0.03, rtol=0
    )
    assert_close(log_density[:, :n], torch.full((2, n), -math.log(4)))
    for kind in range(3):
        part = slice(kind * n, (kind + 1) * n)
        q = actions[:, part].sum(-1).expand(2, 2, n)  # Q = a_1 + a_2
        value = combo.log_sum_exp(q, log_density[:, part]) - math.log(n)
        # The integral of exp(a_1 + a_2) over the square is (e - 1/e)^2 = 5.5244.
        assert_close(value, torch.full((2, 2), math.log(5.5244)), atol=0.05, rtol=0)


def test_number_of_proposals():
    """Ten of each kind by default; no gradient passes to the policy."""
    assert combo.Args().num_actions == 10
    method = build_combo(num_actions=10)
    actions, log_density = method.proposals(torch.randn(4, 3), torch.randn(4, 3))
    assert actions.shape == (4, 30, 2)
    assert not actions.requires_grad
    assert not log_density.requires_grad


def test_q_of_actions():
    """Each action at its own state."""
    method = build_combo()
    obs = torch.randn(4, 3)
    actions = torch.randn(4, 5, 2)
    q = method.q_of_actions(obs, actions)
    assert q.shape == (2, 4, 5)
    for row in range(4):
        for number in range(5):
            pair = torch.cat([obs[row], actions[row, number]])
            assert_close(q[0, row, number], method.critic.q1(pair)[0])
            assert_close(q[1, row, number], method.critic.q2(pair)[0])


@pytest.mark.parametrize("rho_states, first", [("mixed", 0), ("model", 4)])
def test_rows_of_rho(rho_states, first):
    """All rows of a batch, or those of D_model; s' is of the same rows."""
    method = build_combo(rho_states=rho_states)
    batch = method.sample_mixed()
    rho = method.rows_of_rho(batch)
    for field, whole_field in zip(rho, batch):
        assert torch.equal(field, whole_field[first:])
    asked = []

    def proposals(obs: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        asked.append((obs, next_obs))
        return torch.zeros(len(obs), 6, 2), torch.zeros(len(obs), 6)

    method.proposals = proposals
    method.conservative_gap(batch, torch.zeros(2, 16))
    assert torch.equal(asked[0][0], batch.obs[first:])
    assert torch.equal(asked[0][1], batch.next_obs[first:])


# ===== One iteration ==============================================================================
@pytest.mark.parametrize("rho_states", ["mixed", "model"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
def test_gradient_of_equation_2(rho_states, beta):
    """What the loss asks of Q at each row, with tables in place of the critics.

    d/dQ(s, a) is (Q - target) / B, less beta / rows of data at a row of data. At an action of rho
    it is beta / rows of rho times the action's weight in the softmax.
    """
    method = build_combo(rho_states=rho_states, beta=beta)
    rho_rows = 16 if rho_states == "mixed" else 12
    q_batch = torch.randn(2, 16, requires_grad=True)
    q_rho = torch.randn(2, rho_rows * 6, requires_grad=True)
    target = torch.randn(16)
    log_density = torch.randn(rho_rows, 6)
    tables = [q_batch, q_rho]

    def forward(obs: Tensor, action: Tensor) -> Tensor:
        if tables:
            return tables.pop(0)
        return action.sum(1).expand(2, 16)  # for the policy's loss

    method.critic.forward = forward
    method.q_target = lambda batch: target
    method.proposals = lambda obs, next_obs: (torch.zeros(rho_rows, 6, 2), log_density)
    logs = method.iterate()

    expected = (q_batch.detach() - target) / 16
    expected[:, :4] -= beta / 4  # the batch begins with four rows of data
    assert_close(q_batch.grad, expected)
    weighted = q_rho.detach().view(2, rho_rows, 6) - log_density
    expected = beta / rho_rows * torch.softmax(weighted, -1)
    assert_close(q_rho.grad.view(2, rho_rows, 6), expected)

    gap = weighted.exp().sum(-1).log().mean(1) - q_batch.detach()[:, :4].mean(1)
    assert_close(logs["losses/conservative_gap"], gap.mean())
    # The logged loss is the Bellman error alone.
    error = 0.5 * (q_batch.detach() - target).square().mean(1).sum()
    assert_close(logs["losses/critic_loss"], error)
    assert_close(logs["q_values/data"], q_batch.detach()[:, :4].mean())
    assert_close(logs["q_values/model"], q_batch.detach()[:, 4:].mean())


class NaiveCombo(NaiveIteration):
    """An iteration once more; the critics' loss is Eq. (2), action by action."""

    def critic_loss(self, batch, alpha: float) -> Tensor:
        """Without the entropy in the target, and with beta times the conservative gap."""
        with torch.no_grad():
            next_action, _ = self.sample(batch.next_obs)
            q1, q2 = self.q_values(self.critic_target, batch.next_obs, next_action)
        value = torch.minimum(q1, q2)
        value[batch.terminated == 1] = 0.0
        target = batch.reward + 0.9 * value
        q1, q2 = self.q_values(self.critic, batch.obs, batch.action)
        self.bellman_error = ((q1 - target) ** 2).mean() / 2 + ((q2 - target) ** 2).mean() / 2

        first = 0 if self.method.args.rho_states == "mixed" else 4
        obs = batch.obs[first:]
        with torch.no_grad():
            uniform = 2 * torch.rand(len(obs), 2, 2) - 1
            here, here_density = self.two_actions(obs)
            there, there_density = self.two_actions(batch.next_obs[first:])
        soft = torch.zeros(2)
        for row in range(len(obs)):
            total = torch.zeros(2)
            for number in range(2):
                total = total + self.exp_q(obs[row], uniform[row, number]) / (1 / 4)
                total = total + self.exp_q(obs[row], here[row, number]) / here_density[row, number]
                total = (
                    total + self.exp_q(obs[row], there[row, number]) / there_density[row, number]
                )
            soft = soft + total.log() / len(obs)
        gap = soft - torch.stack([q1[:4].mean(), q2[:4].mean()])
        self.gap = gap.mean().detach()
        return self.bellman_error + 5.0 * gap.sum()

    def two_actions(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Two actions per state and their densities: [B, 2, A] and [B, 2]."""
        mean, log_std = self.actor(obs)
        std = log_std.exp()
        noise = torch.randn(len(obs), 2, 2)
        u = mean[:, None] + std[:, None] * noise
        density = torch.exp(-(noise**2) / 2) / (math.sqrt(2 * math.pi) * std[:, None])
        return torch.tanh(u), (density * torch.cosh(u) ** 2).prod(-1)

    def exp_q(self, obs: Tensor, action: Tensor) -> Tensor:
        pair = torch.cat([obs, action])
        return torch.cat([self.critic.q1(pair), self.critic.q2(pair)]).exp()


@pytest.mark.parametrize("rho_states", ["mixed", "model"])
def test_iterate_against_a_naive_one(rho_states, double):
    """Networks, temperature, target and logs are the same for several iterations.

    The policy's states are all of the batch, whatever those of rho are.
    """
    method = method_for_iterations(build_combo, beta=5.0, rho_states=rho_states)
    naive = NaiveCombo(method)
    for number in range(3):
        torch.manual_seed(number)
        naive()
        torch.manual_seed(number)
        before = copies(method)
        logs = method.iterate()
        assert changed(before, method) == {"actor", "critic", "critic_target", "log_alpha"}
        for name in ("actor", "critic", "critic_target"):
            assert_close(copies(getattr(method, name)), copies(getattr(naive, name)))
        assert_close(method.log_alpha, naive.log_alpha)
        assert_close(logs["losses/critic_loss"], naive.bellman_error.detach())
        assert_close(logs["losses/conservative_gap"], naive.gap)
        assert_close(logs["losses/actor_loss"], naive.actor_loss.detach())
        assert logs["losses/entropy"].item() == pytest.approx(naive.entropy)


# ===== What the critics believe ===================================================================
def method_with_simple_values(rho_states: str, fraction: float) -> combo.COMBO:
    """Q_1 = s_1 + a_1 and Q_2 = 2 Q_1; the policy's action is 0.5, with a mean of atanh 0.75.

    In the data s_1 is 1 and a_1 is 0.25, in D_model 5 and 0.9.
    """
    method = build_combo(rho_states=rho_states, real_fraction=fraction)

    def q_values(obs: Tensor, action: Tensor) -> Tensor:
        q1 = obs[:, 0] + action[:, 0]
        return torch.stack([q1, 2 * q1])

    def sample(obs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(obs), 2), 0.5), torch.zeros(len(obs))

    def gaussian(obs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(obs), 2), math.atanh(0.75)), torch.zeros(len(obs), 2)

    method.critic.forward = q_values
    method.actor.sample = sample
    method.actor.forward = gaussian
    method.data[:, :4] = torch.tensor([1.0, 0.0, 0.0, 0.25])
    method.model_data[:, :4] = torch.tensor([5.0, 0.0, 0.0, 0.9])
    return method


FINAL_GAPS = [
    # E_rho[Q_1] - E_D[Q_1], times the mean of 1 and 2.
    ("mixed", 0.25, 4.875),  # rho's s_1 is 1/4 * 1 + 3/4 * 5 = 4: 1.5 (4 + 0.5 - 1.25)
    ("mixed", 0.75, 1.875),  # rho's s_1 is 2: 1.5 (2.5 - 1.25)
    ("model", 0.25, 6.375),  # rho's s_1 is 5: 1.5 (5.5 - 1.25)
    ("model", 0.75, 6.375),
]


@pytest.mark.parametrize("rho_states, fraction, expected", FINAL_GAPS)
def test_final_numbers(rho_states, fraction, expected):
    """E_rho[Q] - E_D[Q] with one action of the policy, over 625 batches of 16."""
    method = method_with_simple_values(rho_states, fraction)
    batches = []
    plain = method.sample_mixed

    def sample_mixed() -> combo.Batch:
        batches.append(torch.initial_seed())
        return plain()

    method.sample_mixed = sample_mixed
    assert method.final_numbers() == {"conservative_gap": pytest.approx(expected)}
    assert len(batches) == 625  # 10,000 rows


def test_final_numbers_depend_on_the_seed_alone():
    """And not on what was drawn before."""
    method = build_combo()
    numbers = method.final_numbers()
    torch.rand(7)
    assert method.final_numbers() == numbers


def test_start_values():
    """First states with s_1 = 0, 2, 4, and a_1 = tanh(mean) = 0.75: Q_1 is 2.75 on average."""
    method = method_with_simple_values("mixed", 0.25)
    method.episode_starts = torch.zeros(3, 3)
    method.episode_starts[:, 0] = torch.tensor([0.0, 2.0, 4.0])
    assert method.start_values()["q_values/starts"].item() == pytest.approx(1.5 * 2.75)


# ===== Settings ===================================================================================
def test_settings_that_contradict_each_other():
    mistakes = [
        ({"real_fraction": 0.003}, "a batch needs a row of data"),  # 0.768 rows
        ({"real_fraction": 1.0, "rho_states": "model"}, "--rho-states model needs rows of D_model"),
        ({"select": ()}, "--select needs at least one value"),
        ({"num_elites": 8}, "--num-elites is larger than --ensemble-size"),
        ({"beta": -1.0}, "--beta is -1.0, but must be at least 0"),
    ]
    for changes, words in mistakes:
        with pytest.raises(SystemExit, match=words):
            combo.check_args(combo.Args(**changes))
    combo.check_args(combo.Args(real_fraction=1.0))  # no row of D_model at all: CQL


# ===== --select ===================================================================================
def write_result(folder: Path, changes: dict, **flags) -> str:
    """A result.json as a finished run leaves it, as far as --select looks. -> the folder"""
    content = {
        "kind": "COMBO",
        "env_id": "hopper-medium-v2",
        "sha256": "of the data",
        "conservative_gap": 1.0,
        "args": dataclasses.asdict(combo.Args(**flags)),
    }
    content.update(changes)
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(content))
    return str(folder)


def test_select_takes_the_lowest_gap(tmp_path, capsys):
    """Also where it is negative, and where the score is the worst."""
    a = write_result(tmp_path / "a", {"conservative_gap": 2.5, "final_mean": 99.0}, beta=0.5)
    b = write_result(tmp_path / "b", {"conservative_gap": -3.25, "final_mean": -9.0}, beta=5.0)
    c = write_result(tmp_path / "c", {"conservative_gap": 1.0}, beta=5.0, real_fraction=0.8)
    before = contents(tmp_path)
    assert combo.select((a, b, c)) == b
    assert contents(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["beta", "real_fraction", "conservative_gap", "run"],
        ["0.5", "0.5", "2.500", a],
        ["5", "0.5", "-3.250", b],
        ["5", "0.8", "1.000", c],
    ]
    assert lines[4:] == [f"chosen, with the lowest conservative_gap: {b}"]


@pytest.mark.parametrize("name", combo.MAY_DIFFER)
def test_flags_that_may_differ(name, tmp_path):
    """All of them are flags, and none stops a comparison."""
    a = write_result(tmp_path / "a", {})
    b = write_result(tmp_path / "b", {"conservative_gap": 0.0}, **{name: 7})
    assert combo.select((a, b)) == b


REFUSED = [
    ({"conservative_gap": math.nan}, {}, "b has no conservative_gap: is it a run of combo.py?"),
    ({"kind": "Mine"}, {}, "b is a run of Mine, .*a of COMBO"),
    ({"env_id": "hopper-random-v2"}, {}, "b is on hopper-random-v2, .*a on hopper-medium-v2"),
    ({"sha256": "of other data"}, {}, "b and .*a are on other data: the files' sha256 differ"),
    ({}, {"horizon": 1}, "b has horizon 1, .*a has 5: --select needs one"),
    ({}, {"rho_states": "model"}, "b has rho_states model, .*a has mixed: --select needs one"),
    ({}, {"gamma": 0.9}, "b has gamma 0.9, .*a has 0.99"),
    ({}, {"total_iterations": 7}, "b has total_iterations 7, .*a has 1000000"),
    ({}, {"num_actions": 4}, "b has num_actions 4, .*a has 10"),
]


@pytest.mark.parametrize("changes, flags, words", REFUSED)
def test_runs_that_cannot_be_compared(changes, flags, words, tmp_path):
    a = write_result(tmp_path / "a", {})
    b = write_result(tmp_path / "b", changes, **flags)
    with pytest.raises(SystemExit, match=words):
        combo.select((a, b))


def test_select_needs_finished_runs_of_combo(tmp_path):
    """A folder without result.json, and a run of mopo.py, which has no conservative_gap."""
    a = write_result(tmp_path / "a", {})
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(SystemExit, match="there is no .*unfinished/result.json"):
        combo.select((a, str(tmp_path / "unfinished")))
    content = json.loads((tmp_path / "a" / "result.json").read_text())
    del content["conservative_gap"]
    (tmp_path / "unfinished" / "result.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="unfinished has no conservative_gap"):
        combo.select((a, str(tmp_path / "unfinished")))


# ===== Runs =======================================================================================
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
    """The folder of a run that nothing disturbed."""
    return train(combo)


def test_log(whole):
    """What TensorBoard shows: a phase's points follow the iteration's."""
    every = list(range(1, 13))
    assert steps_shown(whole) == {
        "losses/critic_loss": every,
        "losses/conservative_gap": every,
        "losses/actor_loss": every,
        "losses/entropy": every,
        "losses/alpha": every,
        "q_values/data": every,
        "q_values/model": every,
        "q_values/starts": every,
        "rollout/terminated_frac": every,
        "rollout/reward": every,
        "eval/normalized_score": [6, 12],
        "model/train_nll": [1, 2],
        "model/holdout_error": [1, 2],
        "model/idle_epochs": [1, 2],
    }


def method_of(folder: Path) -> combo.COMBO:
    """The method as a run left it, with its data."""
    args = combo.load_args(folder)
    method = combo.COMBO(args, 4, 2, torch.device("cpu"))
    method.set_data(combo.load_dataset(args))
    method.load_state_dict(saved(folder)["method"])
    return method


def test_conservative_gap_in_the_result(whole):
    """What the networks and D_model of the last checkpoint give."""
    gap = result(whole)["conservative_gap"]
    assert math.isfinite(gap)
    assert method_of(whole).final_numbers() == {"conservative_gap": gap}


def test_select_between_runs(train, whole, capsys, monkeypatch):
    """On the command line it trains nothing and evaluates nothing."""
    other = train(combo, beta=5.0, seed=1, dynamics_from=str(whole))
    gaps = {str(folder): result(folder)["conservative_gap"] for folder in (whole, other)}
    before = contents(whole) | contents(other)

    def never(*args):
        pytest.fail("--select has called this")

    for name in ("train", "evaluate", "load_dataset", "make_env"):
        monkeypatch.setattr(combo, name, never)
    monkeypatch.setattr(sys, "argv", ["combo.py", "--select", str(whole), str(other)])
    combo.main()
    lowest = min(gaps, key=gaps.get)
    assert capsys.readouterr().out.endswith(f"chosen, with the lowest conservative_gap: {lowest}\n")
    assert contents(whole) | contents(other) == before


def test_dynamics_from_a_run_of_mopo(train):
    """The model is MOPO's; its best two members become the elites; nothing is fitted."""
    source = train(mopo, seed=3, total_iterations=1)
    folder = train(combo, dynamics_from=str(source))
    model = saved(source, "model.pt")
    state = saved(folder)["method"]
    for name, tensor in model["model"].items():
        assert torch.equal(state[f"model.{name}"], tensor)
    best = model["error"].argsort()[:2]
    for layer in range(5):
        name = f"layers.{layer}.weight"
        assert torch.equal(state[f"elites.{name}"], model["model"][name][best])
    assert "model/train_nll" not in points(folder)

    # The probe holds out the rows that MOPO's fit with seed 3 held out: 30 of 285.
    probed = combo.probe(combo.Args(probe_uncertainty=str(folder)))
    assert probed["rows"] == 30
    method = method_of(folder)
    method.args.seed = 3
    held_out, _ = method.split_rows(285)
    batch = method.split(method.data[held_out])
    truth = torch.cat([batch.reward[:, None], batch.next_obs - batch.obs], 1)
    mean, _ = method.elites.predict_by_all(batch.obs, batch.action)
    error = ((mean[0] + mean[1]) / 2 - truth).square().sum(1).sqrt()
    assert_close(torch.tensor(probed["error"]), error)
    _, std = method.model.predict_by_all(batch.obs, batch.action)
    uncertainty = std.square().sum(-1).sqrt().amax(0)  # of all three members
    assert_close(torch.tensor(probed["uncertainty"]), uncertainty)


def test_probe(whole, tmp_path, monkeypatch):
    """The line of least squares, in uncertainty.json as it is returned, and a picture."""
    monkeypatch.setattr(sys, "argv", ["combo.py", "--probe-uncertainty", str(whole)])
    combo.main()
    probed = json.loads((whole / "uncertainty.json").read_text())
    x = np.array(probed["uncertainty"])
    y = np.array(probed["error"])
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert probed["slope"] == pytest.approx(slope)
    assert probed["intercept"] == pytest.approx(y.mean() - slope * x.mean())
    residuals = y - probed["slope"] * x - probed["intercept"]
    assert probed["r2"] == pytest.approx(1 - residuals.var() / y.var())
    assert probed["rows"] == len(x) == len(y) == 30
    assert (whole / "uncertainty.png").stat().st_size > 1000


# ===== A class of one's own =======================================================================
@dataclasses.dataclass
class NormedArgs(combo.Args):
    num_critics: combo.Count = 3  # critics, whose mean is the value
    log_std: float = -1.0  # with which the policy's deviation starts


class NormedCritics(nn.Module):
    """Critics with a normalised input: [B, S], [B, A] -> [K, B]."""

    def __init__(self, obs_dim: int, action_dim: int, args: NormedArgs):
        super().__init__()
        self.norm = nn.LayerNorm(obs_dim + action_dim)
        critics = [combo.mlp(obs_dim + action_dim, args.hidden, 1) for _ in range(args.num_critics)]
        self.critics = nn.ModuleList(critics)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = self.norm(torch.cat([obs, action], -1))
        return torch.cat([critic(x) for critic in self.critics], -1).T


class SharedStdPolicy(combo.GaussianPolicy):
    """The deviation is a parameter, the same at all states."""

    def __init__(self, obs_dim: int, action_dim: int, args: NormedArgs):
        super().__init__(obs_dim, action_dim, args)
        self.net = combo.mlp(obs_dim, args.hidden, action_dim)
        self.log_std = nn.Parameter(torch.full((action_dim,), args.log_std))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.net(obs)
        return mean, self.log_std.expand_as(mean)


class Normed(combo.COMBO):
    """A target takes the mean of the critics."""

    Critic = NormedCritics
    Policy = SharedStdPolicy

    @torch.no_grad()
    def q_target(self, batch: combo.Batch) -> Tensor:
        next_action, _ = self.actor.sample(batch.next_obs)
        q_next = self.critic_target(batch.next_obs, next_action).mean(0, keepdim=True)
        return combo.bellman_target(batch, q_next, self.args.gamma)


def test_a_class_of_ones_own(tmp_path):
    """It trains, goes on bit for bit, scores the same from policy.pt, and takes few lines."""
    own = {"settings": NormedArgs}
    whole = train_on_pendulum(tmp_path / "a", Normed, **own)
    first = train_on_pendulum(tmp_path / "b", Normed, total_iterations=8, **own)
    resumed = train_on_pendulum(tmp_path / "b", Normed, resume=first["folder"], **own)
    one = tensors_of(whole["folder"])
    two = tensors_of(resumed["folder"])
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert resumed["final_scores"] == whole["final_scores"]
    assert resumed["conservative_gap"] == whole["conservative_gap"]
    assert "critic.critics.2.0.weight" in one
    assert (one["actor.log_std"] != -1).all()  # it has moved

    policy = combo.load_policy(whole["folder"], NormedArgs, Normed)
    args = combo.load_args(whole["folder"], NormedArgs)
    assert combo.evaluate(policy, args, 2, 0).tolist() == whole["final_scores"]
    assert lines_of_code(NormedArgs, NormedCritics, SharedStdPolicy, Normed) <= 45
