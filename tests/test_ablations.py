"""Each ablation runs and resumes, equals ampl.py until its idea acts, and computes what it says.

The files ablations/ampl_*.py are found by themselves: a new one is run, resumed and looked at by
the first half of this file without any change here. The second half knows the ideas.
"""

import ast
import copy
import dataclasses
import functools
import importlib
import math
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import ampl

FOLDER = Path(ampl.__file__).parent / "ablations"
sys.path.append(str(FOLDER))  # as it is when a file of this folder runs: they import each other
FILES = {file.stem: file for file in sorted(FOLDER.glob("ampl_*.py"))}
MODULES = {name: importlib.import_module(name) for name in FILES}
ENV_ID = "maze2d-umaze-dense-v1"  # observations of 4 numbers, actions of 2

# What a file may import of ours, beside ampl.
IMPORTS = {
    "ampl_kl": {"ampl_wpr"},
    "ampl_kl_wpr": {"ampl_wpr"},
    "ampl_gendice": {"ampl_vpm"},
    "ampl_dualdice": {"ampl_vpm"},
}

# A run with all phases: the warm-up is over after 6 iterations, D_model is sampled after 7, and
# the model is refitted after 8 and 16. A run that is cut at 12 stands between two rollouts, each of
# which reseeds.
TINY = {
    "env_id": ENV_ID,
    "total_iterations": 20,
    "warmup_iterations": 6,
    "real_decay_every": 1,
    "rollout_every": 5,
    "model_retrain_every": 8,
    "rollout_rows": 60,
    "buffer_size": 200,
    "horizon": 3,
    "noise_dim": 2,
    "batch_size": 16,
    "hidden": (16, 16),
    "model_hidden": 16,
    "ensemble_size": 3,
    "num_elites": 2,
    "model_batch_size": 8,
    "model_epoch_steps": 4,
    "model_max_epochs": 2,
    "holdout_size": 20,
    "omega_steps": 6,
    "omega_lr": 1e-3,
    "omega_batch_size": 8,
    "omega_initial_batch_size": 8,
    "num_initial_states": 20,
    "eval_every": 20,
    "eval_episodes": 1,
    "final_episodes": 1,
    "checkpoint_every": 20,
    "threads": 1,
}

# The first iteration, counted from 0, after which a run is no longer one of ampl.py.
ACTS_IN = {
    "ampl_gaussian": 0,
    "ampl_wpr": 0,
    "ampl_kl_wpr": 0,
    "ampl_kl": 0,
    "ampl_no_reg": 6,
    "ampl_no_rollouts": 7,
    "ampl_shared_action": 7,
    "ampl_nw": 8,
    "ampl_uniform": 8,
    "ampl_vpm": 8,
    "ampl_gendice": 8,
    "ampl_dualdice": 8,
    "ampl_reward_test": 8,
    "ampl_value_model": 8,
}
# How the names of tensors begin that differ from ampl.py's before that.
OF_ITS_OWN = {
    "ampl_no_rollouts": ("model_data", "write_row", "num_model_rows"),
    "ampl_shared_action": ("model_data",),
}
# Flags of the run of ampl.py that a run is compared with, where the variant does not take TINY's.
COMPARED_WITH = {
    "ampl_no_rollouts": {"rollout_every": 250},
}
# Optimizers that never step.
IDLE = {
    "ampl_nw": {"omega_optimizer"},
    "ampl_uniform": {"omega_optimizer"},
}


# ===== Helpers ====================================================================================
def method_of(name: str) -> type:
    """The class derived from AMPL that a file of ablations/ defines; AMPL itself for ampl."""
    module = MODULES.get(name, ampl)
    for value in vars(module).values():
        is_method = isinstance(value, type) and issubclass(value, ampl.AMPL)
        if is_method and value.__module__ == module.__name__:
            return value
    raise LookupError(f"{name} defines no class derived from AMPL")


def settings_of(name: str) -> type:
    """The class of settings of a file of ablations/, or of ampl.py."""
    return MODULES.get(name, ampl).Args


def unused_flags(settings: type) -> list[str]:
    """The names of the settings that a variant hides."""
    without = getattr(settings, "without", ())
    return [f.name for f in dataclasses.fields(settings) if f.name.startswith(without)]


def tiny_args(name: str, **changes) -> ampl.Args:
    """TINY as settings of a variant, on the CPU."""
    values = {**TINY, "cuda": False, "cpu_fast_matmul": False, **changes}
    return settings_of(name)(**values)


def command_line(settings: type, flags: dict) -> list[str]:
    """Flags as a user types them, without those that the variant does not have."""
    words = ["--no-cuda", "--no-cpu-fast-matmul"]
    for name, value in flags.items():
        if name in unused_flags(settings):
            continue
        values = value if isinstance(value, tuple) else (value,)
        words.append("--" + name.replace("_", "-"))
        words.extend(str(each) for each in values)
    return words


class Trained(NamedTuple):
    """A run."""

    folder: Path
    states: list[dict[str, Tensor]]  # of the method, after each of its iterations


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """A file with 15 episodes of 20 rows, of which every third ends in a terminal.

    The first number of an observation is 1 % of the row's number, that of an action is 1/400 of it.
    """
    random = np.random.default_rng(0)
    row = np.arange(300)
    is_last = row % 20 == 19
    in_third_episode = row // 20 % 3 == 0
    observations = random.normal(1, 1, (300, 4))
    observations[:, 0] = row / 100
    actions = random.uniform(-1, 1, (300, 2))
    actions[:, 0] = row / 400
    path = tmp_path_factory.mktemp("data") / "data.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = observations
        file["actions"] = actions
        file["rewards"] = random.random(300)
        file["terminals"] = is_last & in_third_episode
        file["timeouts"] = is_last & ~in_third_episode
    return str(path)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """run(name, **flags) runs a file as a command line does, once for all tests. -> Trained"""
    patch = pytest.MonkeyPatch()
    patch.setitem(ampl.MAZE_LIMITS, "umaze", 15)  # steps of an episode
    patch.setattr(ampl.Run, "plot_curves", lambda run: None)  # it takes half of the time
    advance = ampl.Run.advance
    states = []

    def advance_and_note(self):
        advance(self)
        states.append({key: x.clone() for key, x in self.method.state_dict().items()})

    patch.setattr(ampl.Run, "advance", advance_and_note)
    ampl.vector_env.cache_clear()

    @functools.cache
    def start(name: str, **flags) -> Trained:
        states.clear()
        file = FILES.get(name, Path(ampl.__file__))
        if "resume" in flags:
            folder = Path(flags["resume"])
            words = command_line(ampl.Args, flags)[2:]
        else:
            place = tmp_path_factory.mktemp(name)
            more = {"dataset_path": dataset, "run_dir": str(place)}
            words = command_line(settings_of(name), {**TINY, **more, **flags})
        patch.setattr(sys, "argv", [str(file), *words])
        if name == "ampl":  # a second copy of the module would not be the one patched above
            ampl.main()
        else:
            runpy.run_path(str(file), run_name="__main__")
        if "resume" not in flags:
            folder = next(place.iterdir())
        return Trained(folder, list(states))

    yield start
    patch.undo()
    ampl.vector_env.cache_clear()


# ===== Every file =================================================================================
def test_the_tables_above_name_files_that_exist():
    assert {*IMPORTS, *ACTS_IN, *OF_ITS_OWN, *COMPARED_WITH, *IDLE} <= FILES.keys()
    assert len(FILES) >= 14


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_little_and_says_how_it_runs(name):
    tree = ast.parse(FILES[name].read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    of_ours = {module for module in imported if re.match("ampl|mopo|combo", module)}
    assert of_ours == {"ampl"} | IMPORTS.get(name, set())
    assert f"\nRun: `python ablations/{name}.py --env-id" in ast.get_docstring(tree)
    assert f"]({name}.py)" in (FOLDER / "README.md").read_text()


def help_of(settings: type, capsys) -> str:
    """What --help prints, as one line without frames."""
    with pytest.raises(SystemExit):
        ampl.parse_args(settings, ["--help"])
    printed = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)
    return " ".join(printed.split())


@pytest.mark.parametrize("name", FILES)
def test_help_shows_the_flags_that_have_a_meaning(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # so that no comment is broken at a hyphen
    settings = settings_of(name)
    shown = help_of(settings, capsys)
    shown_of_ampl = help_of(ampl.Args, capsys)
    assert MODULES[name].__doc__.split("\n")[0] in shown
    for field in dataclasses.fields(settings):
        flag = "--" + field.name.replace("_", "-")
        is_shown = re.search(f"{flag}[ ,]", shown) is not None
        assert is_shown == (field.name not in unused_flags(settings)), flag
        if hasattr(ampl.Args, field.name):  # to hide a flag in a variant leaves ampl.py's alone
            assert re.search(f"{flag}[ ,]", shown_of_ampl), flag


@pytest.mark.parametrize("name", FILES)
def test_flags_without_a_meaning_are_refused(name, capsys):
    for unused in unused_flags(settings_of(name)):
        flag = "--" + unused.replace("_", "-")
        with pytest.raises(SystemExit) as stop:
            ampl.parse_args(settings_of(name), [flag, "1"])
        assert stop.value.code == 2
        assert flag in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_a_run_resumes_bit_for_bit(name, run):
    whole = run(name).folder
    cut = run(name, total_iterations=12).folder
    resumed = run(name, resume=str(cut), total_iterations=20)
    assert len(resumed.states) == 8
    one = torch.load(whole / "checkpoint.pt")
    two = torch.load(cut / "checkpoint.pt")
    for part in ("method", "optimizers"):
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)


@pytest.mark.parametrize("name", FILES)
def test_every_parameter_of_every_optimizer_moves(name, run):
    method = method_of(name)(tiny_args(name), 4, 2, torch.device("cpu"))  # as at a run's start
    names = {parameter: key for key, parameter in method.named_parameters()}
    final = run(name).states[-1]
    for optimizer_name, optimizer in ampl.optimizers_of(method):
        should_move = optimizer_name not in IDLE.get(name, set())
        for parameter in ampl.parameters_of(optimizer):
            moved = not torch.equal(parameter, final[names[parameter]])
            assert moved == should_move, names[parameter]


@pytest.mark.parametrize("name", ACTS_IN)
def test_a_run_is_one_of_ampl_until_the_idea_acts(name, run):
    states = run(name).states
    states_of_ampl = run("ampl", **COMPARED_WITH.get(name, {})).states
    own = OF_ITS_OWN.get(name, ())
    common = [key for key in states_of_ampl[0] if key in states[0] and not key.startswith(own)]
    for i in range(ACTS_IN[name] + 1):
        different = [k for k in common if not torch.equal(states[i][k], states_of_ampl[i][k])]
        if i < ACTS_IN[name]:
            assert different == [], f"iteration {i}"
        else:
            assert different != [], f"iteration {i}"
    # The first fit is ampl.py's in any case.
    for key in common:
        if key.startswith(("model.", "elites.")):
            assert torch.equal(states[0][key], states_of_ampl[0][key]), key


@pytest.mark.parametrize("name", FILES)
def test_a_run_keeps_omega_over_its_mean(name, run):
    folder = run(name).folder
    if name == "ampl_nw":  # it takes no --model-retrain-every, and 20 iterations have no refit
        return
    for iteration in (8, 16):
        omega = np.load(folder / f"omega{iteration}.npy")
        assert omega.shape == (290,)  # rows of the data, without ten at a time limit
        assert (omega > 0).all()
        assert omega.mean() == pytest.approx(1, abs=1e-5)
        assert (omega.std() > 0) == (name != "ampl_uniform")


# ===== Small changes ==============================================================================
def test_nw_fits_the_model_only_once():
    method = ring("ampl_nw")
    before_any_fit = copy.deepcopy(method.state_dict())
    method.fit_model(0, torch.ones(6), lambda *report: None)
    after_the_first = copy.deepcopy(method.state_dict())
    omega = method.fit_omega(1, lambda *report: None)
    method.fit_model(1, omega, lambda *report: None)
    assert omega.tolist() == [1] * 6
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, after_the_first[key]), key
    key = "model.layers.0.weight"
    assert not torch.equal(before_any_fit[key], after_the_first[key])


def test_uniform_refits_the_model_without_omega(run):
    states = run("ampl_uniform").states
    for network, stays in (("omega.", True), ("model.layers", False), ("elites.layers", False)):
        for key in states[0]:
            if key.startswith(network):
                assert torch.equal(states[7][key], states[8][key]) == stays, key


def test_no_rollouts_keeps_d_model_empty(run):
    for state in run("ampl_no_rollouts").states:
        assert state["num_model_rows"] == 0
        assert state["num_real"] == TINY["batch_size"]


def test_no_reg_leaves_the_mean_of_q_alone():
    args = tiny_args("ampl_no_reg")
    method = method_of("ampl_no_reg")(args, 4, 2, torch.device("cpu"))
    q_policy = torch.tensor([1.0, 5.0])
    assert method.policy_loss(q_policy, torch.tensor(100.0)) == -3


def test_shared_action_serves_2048_states():
    args = tiny_args("ampl_shared_action")
    method = method_of("ampl_shared_action")(args, 4, 2, torch.device("cpu"))
    obs = torch.randn(5000, 4)
    action = method.rollout_action(obs)
    assert action.shape == (5000, 2)
    first, second, third = action.split(2048)
    for part in (first, second, third):
        assert (part == part[0]).all()
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(second[0], third[0])


def test_gaussian_policy_samples_what_its_net_says():
    """Mean 0.5 and deviation e; the gradient reaches both through the sample."""
    policy = MODULES["ampl_gaussian"].GaussianPolicy(4, 2, tiny_args("ampl_gaussian"))
    outputs = torch.tensor([0.5, 0.5, 1.0, 1.0], requires_grad=True)  # means, logs of deviations
    policy.net.forward = lambda obs: outputs.expand(100_000, 4)
    raw = policy.raw_action(torch.zeros(100_000, 4))
    assert raw.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert raw.std(0).tolist() == pytest.approx([math.e, math.e], rel=0.02)
    raw.square().sum(1).mean().backward()  # E[x^2] is mean^2 + std^2
    assert outputs.grad[:2].tolist() == pytest.approx([1, 1], abs=0.1)
    assert outputs.grad[2:].tolist() == pytest.approx([2 * math.e**2] * 2, rel=0.05)
    assert policy(torch.zeros(100_000, 4)).abs().max() <= 1


# ===== Losses, by hand ============================================================================
def numbers(*values: float) -> Tensor:
    """A row of numbers in float64 that takes a gradient."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def slope(loss: Tensor, x: Tensor) -> list[float]:
    """The gradient of a loss with respect to x."""
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    return gradient.flatten().tolist()


def test_vpm_loss():
    omega = numbers(1, 3)
    loss = MODULES["ampl_vpm"].vpm_loss(
        omega,
        omega_target=numbers(2, 1),
        omega_next=numbers(0.5, 2),
        omega_initial=numbers(4, 2, 3),
        flow_rate=torch.tensor(0.25),
        gamma=0.8,
    )
    flow = 0.2 * 3 + 0.8 * (0.5 * 2 + 2 * 1) / 2
    half_square = (1 + 9) / 2 / 2
    inertia = 0.75 * (1 * 2 + 3 * 1) / 2
    assert loss.item() == pytest.approx(half_square - inertia - 0.25 * flow)
    # (omega - 0.75 omega') / 2: omega is drawn to a share of omega'; the flow has its own slope.
    assert slope(loss, omega) == pytest.approx([(1 - 1.5) / 2, (3 - 0.75) / 2])


def test_vpm_norm():
    multiplier = numbers(0.5)[0]
    norm = MODULES["ampl_vpm"].vpm_norm(torch.tensor(2.0), multiplier)
    assert norm.item() == pytest.approx(2 * 0.5 * (2 - 1) - 0.25)
    assert slope(norm, multiplier) == pytest.approx([2 * (2 - 1) - 2 * 0.5])


def test_gendice_objective():
    omega = numbers(1, 3)
    test = numbers(2, -1)
    multiplier = numbers(0.5)
    objective = MODULES["ampl_gendice"].gendice_objective(
        omega,
        test,
        test_next=numbers(1, 0.5),
        test_initial=numbers(3, 1),
        multiplier=multiplier[0],
        gamma=0.8,
    )
    flow = 0.2 * 2 + 0.8 * (1 * 1 + 3 * 0.5) / 2
    visits = (1 * (2 + 1) + 3 * (-1 + 0.25)) / 2
    norm = 0.5 * (2 - 1) - 0.25 / 2
    assert objective.item() == pytest.approx(flow - visits + norm)
    # Per row (0.8 nu' - nu - nu^2 / 4 + v) / 2.
    assert slope(objective, omega) == pytest.approx([(0.8 - 3 + 0.5) / 2, (0.4 + 0.75 + 0.5) / 2])
    # Per row -omega (1 + nu / 2) / 2.
    assert slope(objective, test) == pytest.approx([-1 * 2 / 2, -3 * 0.5 / 2])
    assert slope(objective, multiplier) == pytest.approx([(2 - 1) - 0.5])


def test_dualdice_objective():
    omega = numbers(1, 3)
    test = numbers(2, -1)
    test_initial = numbers(3, 1)
    objective = MODULES["ampl_dualdice"].dualdice_objective(
        omega, test, test_next=numbers(1, 0.5), test_initial=test_initial, gamma=0.8
    )
    gain = ((2 - 0.8) * 1 + (-1 - 0.4) * 3) / 2
    cubes = (1 / 3 + 27 / 3) / 2
    assert objective.item() == pytest.approx(gain - cubes - 0.2 * 2)
    assert slope(objective, omega) == pytest.approx([(1.2 - 1) / 2, (-1.4 - 9) / 2])
    assert slope(objective, test) == pytest.approx([1 / 2, 3 / 2])
    assert slope(objective, test_initial) == pytest.approx([-0.1, -0.1])


def test_clipped_omega_stays_between_its_bounds():
    network = MODULES["ampl_vpm"].ClippedOmega(1, 1, tiny_args("ampl_vpm"))
    network.net.forward = lambda pairs: pairs[:, :1]
    x = torch.tensor([[-1000.0], [0.0], [20.0], [480.0], [1000.0]])
    omega = network(x, torch.zeros_like(x)).tolist()
    assert omega == pytest.approx([1e-8, math.log(2), 20, 480, 500], rel=1e-4)


def test_wpr_losses():
    """The third row does not count; sigmoid(log 3) is 3/4."""
    module = MODULES["ampl_wpr"]
    omega = torch.tensor([2, 0.5, 1], dtype=torch.float64)
    keep = torch.tensor([1, 1, 0], dtype=torch.float64)
    fake_logit = numbers(0, math.log(3), 5)
    true_logit = numbers(math.log(3), 0, 1)
    true_label = numbers(1, 0.9, 0.8).detach()

    loss = module.weighted_generator_loss(fake_logit, omega, keep)
    assert loss.item() == pytest.approx((2 * math.log(2) + 0.5 * math.log(4 / 3)) / 2)
    assert slope(loss, fake_logit) == pytest.approx([-2 * 0.5 / 2, -0.5 * 0.25 / 2, 0])

    loss = module.weighted_discriminator_loss(true_logit, fake_logit, omega, keep, true_label)
    first = -math.log(3 / 4) - math.log(1 / 2)
    second = -math.log(1 / 2) - math.log(1 / 4)
    assert loss.item() == pytest.approx((2 * first + 0.5 * second) / 2 / 2)
    # Per row omega (D - label) / 2 / 2.
    assert slope(loss, true_logit) == pytest.approx([-2 * 0.25 / 4, -0.5 * 0.4 / 4, 0])
    assert slope(loss, fake_logit) == pytest.approx([2 * 0.5 / 4, 0.5 * 0.75 / 4, 0])


def test_kl_losses():
    """The third row does not count."""
    module = MODULES["ampl_kl"]
    keep = torch.tensor([1, 1, 0], dtype=torch.float64)
    fake = numbers(math.log(2), 0, 7)
    true = numbers(1, 3, 9)

    fake_part = math.log((2 + 1) / 2)
    loss = module.kl_generator_loss(fake, keep, mean_gap=False)
    assert loss.item() == pytest.approx(-fake_part)
    loss = module.kl_discriminator_loss(true, fake, keep, mean_gap=False)
    assert loss.item() == pytest.approx(fake_part - 2)
    assert slope(loss, true) == pytest.approx([-0.5, -0.5, 0])
    assert slope(loss, fake) == pytest.approx([2 / 3, 1 / 3, 0])

    fake_mean = math.log(2) / 2
    loss = module.kl_generator_loss(fake, keep, mean_gap=True)
    assert loss.item() == pytest.approx(-fake_mean)
    loss = module.kl_discriminator_loss(true, fake, keep, mean_gap=True)
    assert loss.item() == pytest.approx(fake_mean - 2)


def test_weighted_kl_losses():
    """The third row does not count."""
    module = MODULES["ampl_kl_wpr"]
    omega = torch.tensor([2, 0.5, 1], dtype=torch.float64)
    keep = torch.tensor([1, 1, 0], dtype=torch.float64)
    fake = numbers(math.log(2), 0, 7)
    true = numbers(1, 3, 9)

    fake_part = math.log((2 * 2 + 0.5 * 1) / 2.5)
    loss = module.weighted_kl_generator_loss(fake, omega, keep, mean_gap=False)
    assert loss.item() == pytest.approx(-fake_part)
    loss = module.weighted_kl_discriminator_loss(true, fake, omega, keep, mean_gap=False)
    assert loss.item() == pytest.approx(fake_part - (2 * 1 + 0.5 * 3) / 2.5)

    fake_mean = 2 * math.log(2) / 2
    loss = module.weighted_kl_generator_loss(fake, omega, keep, mean_gap=True)
    assert loss.item() == pytest.approx(-fake_mean)
    loss = module.weighted_kl_discriminator_loss(true, fake, omega, keep, mean_gap=True)
    assert loss.item() == pytest.approx(fake_mean - (2 * 1 + 0.5 * 3) / 2)


def test_a_constant_added_to_t_changes_no_kl():
    omega = torch.tensor([2, 0.5, 1], dtype=torch.float64)
    keep = torch.tensor([1, 1, 0], dtype=torch.float64)
    fake = numbers(math.log(2), 0, 7)
    true = numbers(1, 3, 9)
    plain = MODULES["ampl_kl"].kl_discriminator_loss
    assert plain(true + 5, fake + 5, keep, False).item() == pytest.approx(
        plain(true, fake, keep, False).item()
    )
    weighted = MODULES["ampl_kl_wpr"].weighted_kl_discriminator_loss
    assert weighted(true + 5, fake + 5, omega, keep, False).item() == pytest.approx(
        weighted(true, fake, omega, keep, False).item()
    )


def test_the_supremum_is_the_kl_divergence():
    """p = (3/4, 1/4) and q = (1/2, 1/2), as four pairs each; the best T is log(p / q)."""
    t = (math.log(1.5), math.log(0.5))  # at the first and at the second of the two outcomes
    true = numbers(t[0], t[0], t[0], t[1])
    fake = numbers(t[0], t[0], t[1], t[1])
    keep = torch.ones(4, dtype=torch.float64)
    loss = MODULES["ampl_kl"].kl_discriminator_loss(true, fake, keep, mean_gap=False)
    assert loss.item() == pytest.approx(-(0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert slope(loss, fake) == pytest.approx([3 / 8, 3 / 8, 1 / 8, 1 / 8])  # q times p / q


@pytest.mark.parametrize("last", [0, 1])
def test_kl_losses_are_finite_without_rows_and_at_huge_t(last):
    keep = torch.tensor([last, last, 0], dtype=torch.float64)
    omega = torch.tensor([2, 0.5, 1], dtype=torch.float64)
    true = numbers(1e5, 3e5, 9e5)
    fake = numbers(7e4, 0, 7e5)
    plain = MODULES["ampl_kl"].kl_discriminator_loss(true, fake, keep, False)
    weighted = MODULES["ampl_kl_wpr"].weighted_kl_discriminator_loss(true, fake, omega, keep, False)
    for loss in (plain, weighted):
        assert math.isfinite(loss.item())
        assert np.isfinite(slope(loss, true) + slope(loss, fake)).all()


def test_kl_is_weighted_kl_while_omega_is_one(run):
    weighted = run("ampl_kl_wpr").states
    plain = run("ampl_kl").states
    for i in range(8):  # the first refit comes before iteration 8
        for key in plain[i]:
            assert torch.equal(plain[i][key], weighted[i][key]), f"{key} in iteration {i}"
    assert not torch.equal(plain[8]["actor.net.0.weight"], weighted[8]["actor.net.0.weight"])


# ===== Which pairs the weighted regularizers compare ==============================================
@pytest.mark.parametrize("name", ["ampl_wpr", "ampl_kl_wpr", "ampl_kl"])
def test_the_regularizer_weighs_by_the_last_omega(name, run):
    trained = run(name)
    assert (trained.states[7]["data_omega"] == 1).all()
    for iteration in (8, 16):
        omega = torch.from_numpy(np.load(trained.folder / f"omega{iteration}.npy"))
        assert torch.equal(trained.states[iteration]["data_omega"], omega)


def test_pairs_stay_within_an_episode(dataset):
    """A true pair is that of the next row, weighted by the omega of its own row.

    Omega is set to the row's number in the file, which observations and actions tell as well.
    """
    args = tiny_args("ampl_wpr", dataset_path=dataset, batch_size=2000)
    method = method_of("ampl_wpr")(args, 4, 2, torch.device("cpu"))
    method.set_data(ampl.load_dataset(args))
    method.data_omega.copy_(method.data[:, 0] * 100)

    seen = []

    def look(obs: Tensor, raw_action: Tensor) -> Tensor:
        seen.append((100 * obs[:, 0], 400 * torch.tanh(raw_action[:, 0])))
        return obs[:, 0]

    method.discriminator.forward = look
    _, _, omega, keep = method.next_pairs(step_actor=True)
    row_of_obs, row_of_action = seen[1]  # of the true pairs; the fake ones come first
    torch.testing.assert_close(row_of_obs, omega + 1)
    torch.testing.assert_close(row_of_action, omega + 1, atol=1e-3, rtol=0)

    # Every row but an episode's last has a next one, and so has the row before a terminal. The row
    # before a time limit has none, since the row at the limit was dropped.
    row = omega.round().long()
    place = row % 20
    ends_in_terminal = row // 20 % 3 == 0
    assert set(place.tolist()) == set(range(19))
    assert ((place < 18) | ends_in_terminal).all()
    assert keep.shape == (2000,)


def test_fake_pairs_follow_stored_pairs(dataset):
    """The model is asked at the stored (s, a), and the policy at the model's s'."""
    args = tiny_args("ampl_wpr", dataset_path=dataset)
    method = method_of("ampl_wpr")(args, 4, 2, torch.device("cpu"))
    method.set_data(ampl.load_dataset(args))
    method.data_omega.copy_(method.data[:, 0] * 100)

    def sample(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        next_obs = torch.stack([obs[:, 0], action[:, 0], obs[:, 0], obs[:, 0]], 1)
        return torch.zeros(len(obs)), next_obs

    method.elites.sample = sample
    method.actor.raw_action = lambda obs: 10 * obs[:, :2]
    method.discriminator.forward = lambda obs, raw: torch.cat([obs, raw], 1)
    _, fake, omega, keep = method.next_pairs(step_actor=False)
    row = omega
    expected = [row / 100, row / 400, row / 100, row / 100, row / 10, row / 40]
    torch.testing.assert_close(fake, torch.stack(expected, 1))
    assert keep.all()


def test_data_without_rows_that_follow_one_another_are_refused(dataset):
    args = tiny_args("ampl_wpr", dataset_path=dataset)
    method = method_of("ampl_wpr")(args, 4, 2, torch.device("cpu"))
    data = ampl.load_dataset(args)
    data["next_row"] = torch.full_like(data["next_row"], -1)
    with pytest.raises(SystemExit, match="follow one another"):
        method.set_data(data)


# ===== Omega on a Markov decision process of three states =========================================
# State s is the s-th unit vector, and so is action a. Action 1 leads from s to s + 1, and from the
# last state to the first; action 0 leads to state 0. The policy takes action 1 with probability
# 0.8, episodes start in state 0, and gamma is 0.8. The data have each of the six pairs once: row
# 2 s + a. So omega is 6 times the share of the policy's discounted visits that go to a pair.
STATE = torch.tensor([0, 0, 1, 1, 2, 2])
ACTION = torch.tensor([0, 1, 0, 1, 0, 1])
NEXT_STATE = torch.tensor([0, 1, 0, 2, 0, 0])


def ring(name: str, **changes) -> ampl.AMPL:
    """The method of a variant on this process."""
    changes = {
        "gamma": 0.8,
        "omega_batch_size": 256,
        "omega_initial_batch_size": 256,
        "initial_states": "dataset",
        **changes,
    }
    method = method_of(name)(tiny_args(name, **changes), 3, 2, torch.device("cpu"))
    states = torch.eye(3)
    actions = torch.eye(2)
    method.set_data(
        {
            "obs": states[STATE],
            "action": actions[ACTION],
            "reward": torch.arange(6.0),
            "next_obs": states[NEXT_STATE],
            "terminated": torch.zeros(6, dtype=torch.bool),
            "has_next": torch.ones(6, dtype=torch.bool),
            "next_row": torch.full((6,), -1),
            "starts": states[:1],
        }
    )

    def act(obs: Tensor) -> Tensor:
        chosen = (torch.rand(len(obs)) < 0.8).long()
        return actions[chosen]

    method.actor.forward = act
    return method


def true_omega() -> Tensor:
    """The solution of the flow equation, Eq. (9), at the six pairs."""
    policy = torch.where(ACTION == 1, 0.8, 0.2)  # probability of each pair's action
    arrives = NEXT_STATE[:, None] == STATE[None, :]  # [from pair, at the state of the pair]
    leads_to = torch.where(arrives, policy, 0)
    starts = torch.where(STATE == 0, policy, 0)
    visits = torch.linalg.solve(torch.eye(6) - 0.8 * leads_to.T, 0.2 * starts)
    return 6 * visits


def test_true_omega_by_hand():
    """State 0 is visited in a share v of all steps, state 1 in 0.64 v, state 2 in 0.64^2 v."""
    share = 1 / (1 + 0.64 + 0.64**2)
    omega = true_omega()
    assert omega.mean().item() == pytest.approx(1)
    assert omega[:2].tolist() == pytest.approx([6 * share * 0.2, 6 * share * 0.8])
    assert omega[4:].tolist() == pytest.approx([6 * share * 0.4096 * 0.2, 6 * share * 0.4096 * 0.8])


@pytest.mark.parametrize(
    "name, at_least, changes",
    [
        ("ampl_vpm", 2, {"omega_steps": 1000, "omega_lr": 5e-3, "multiplier_lr": 0.2}),
        (
            "ampl_gendice",
            5,
            {
                "omega_steps": 1000,
                "omega_lr": 5e-4,
                "test_function_lr": 5e-3,
                "multiplier_lr": 5e-3,
            },
        ),
        (
            "ampl_dualdice",
            2,
            {"omega_steps": 1500, "omega_lr": 5e-3, "test_function_lr": 5e-4},
        ),
    ],
)
def test_a_known_omega_is_recovered(name, at_least, changes):
    """At raised learning rates omega comes so many times nearer to the truth than omega = 1."""
    method = ring(name, **changes)
    omega = method.fit_omega(1, lambda *report: None)
    truth = true_omega()
    error = (truth - omega).abs().mean()
    error_of_ones = (truth - 1).abs().mean()
    assert error_of_ones > at_least * error


def test_vpm_copies_omega_after_steps_1_and_11():
    """In each of two trainings a_t starts at 1. v steps by the mean of omega after its step."""
    method = ring("ampl_vpm", omega_lr=1e-2, omega_steps=12)
    omega_after = [parameters_to_vector(method.omega.parameters())]
    target_after = [parameters_to_vector(method.omega_target.parameters())]
    steps = []
    plain_step = method.omega_step

    def step(q_data: Tensor) -> dict[str, Tensor]:
        multiplier = method.multiplier.item()
        scalars = plain_step(q_data)
        mean_omega = scalars["omega/batch_mean"].item()
        # The optimizer goes down the gradient of -norm, which is 2 v - 2 (E[omega] - 1).
        expected = 2 * multiplier - 2 * (mean_omega - 1)
        assert method.multiplier.grad.item() == pytest.approx(expected, abs=1e-5)
        omega_after.append(parameters_to_vector(method.omega.parameters()))
        target_after.append(parameters_to_vector(method.omega_target.parameters()))
        steps.append(method.step.item())
        return scalars

    method.omega_step = step
    method.fit_omega(1, lambda *report: None)
    method.fit_omega(2, lambda *report: None)
    assert steps == [*range(1, 13), *range(1, 13)]
    copied = 0
    for done in range(1, 25):
        if done in (1, 11, 13, 23):  # steps 1 and 11 of either training
            copied = done
        assert torch.equal(target_after[done], omega_after[copied]), done


@pytest.mark.parametrize("name", ["ampl_gendice", "ampl_dualdice"])
def test_all_players_step_by_the_same_objective(name, monkeypatch):
    """The gradients, clipped entry by entry, are those from before any of them has stepped."""
    bound = 0.05
    method = ring(name, omega_grad_value=bound)
    module = MODULES[name]
    objective_name = name.removeprefix("ampl_") + "_objective"
    objective = getattr(module, objective_name)
    expected = {}

    def note_gradients(*arguments) -> Tensor:
        value = objective(*arguments)
        for optimizer_name, sign in signs.items():
            parameters = ampl.parameters_of(getattr(method, optimizer_name))
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            expected[optimizer_name] = [(sign * g).clamp(-bound, bound) for g in gradients]
        return value

    if name == "ampl_gendice":
        signs = {"omega_optimizer": 1, "test_optimizer": -1, "multiplier_optimizer": -1}
    else:
        signs = {"omega_optimizer": -1, "test_optimizer": 1}
    method.initial_obs = method.episode_starts
    monkeypatch.setattr(module, objective_name, note_gradients)
    method.omega_step(torch.zeros(6))
    clipped = 0
    for optimizer_name, gradients in expected.items():
        for parameter, gradient in zip(
            ampl.parameters_of(getattr(method, optimizer_name)), gradients
        ):
            torch.testing.assert_close(parameter.grad, gradient)
            clipped += (gradient.abs() == bound).sum().item()
    assert clipped > 0


# ===== The two variants that ask the model or the critic something else ===========================
def test_the_reward_is_the_test_function(monkeypatch):
    """All three terms are the model's rewards, at the right pairs; the critic is not asked."""
    method = ring("ampl_reward_test")
    state_number = torch.arange(3.0)

    def sample(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return obs @ state_number + 10 * action[:, 1], obs  # the reward is s + 10 a

    def omega_loss(omega, omega_target, reward, reward_next, reward_initial, gamma) -> Tensor:
        rewards.extend([reward, reward_next, reward_initial])
        return plain_loss(omega, omega_target, reward, reward_next, reward_initial, gamma)

    rewards = []
    plain_loss = ampl.omega_loss
    method.elites.sample = sample
    method.actor.forward = lambda obs: obs[:, :2]  # in state 1 action 1, else action 0 or none
    method.critic = None
    method.sample_data = lambda count: method.split(method.data)
    method.initial_obs = method.episode_starts
    monkeypatch.setattr(ampl, "omega_loss", omega_loss)
    method.omega_step(torch.zeros(6))
    assert rewards[0].tolist() == [0, 10, 1, 11, 2, 12]  # of (s, a)
    assert rewards[1].tolist() == [0, 11, 0, 2, 0, 0]  # at s' = 0, 1, 0, 2, 0, 0
    assert not rewards[2].any()  # of state 0


def test_the_loss_of_refits_is_value_aware():
    """It is omega times (the reward's likelihood + the difference of values); actions are fixed."""
    method = ring("ampl_value_model")
    method.value_aware = True
    method.model.input_mean.fill_(0.3)
    method.model.target_std.fill_(2.0)
    method.actor.forward = lambda obs: obs[:, :2]
    x = torch.randn(3, 5, 5)  # three members, five rows, S + A
    y = torch.randn(3, 5, 4)
    omega = torch.rand(3, 5)

    def q1_only(obs: Tensor, action: Tensor) -> Tensor:
        return obs.sum(-1) + 10 * action.sum(-1)

    def value(target: Tensor) -> Tensor:
        next_obs = (x[..., :3] + 0.3) + 2 * target[..., 1:]
        return next_obs.sum(-1) + 10 * next_obs[..., :2].sum(-1)

    method.critic.q1_only = q1_only
    torch.manual_seed(3)
    mean, log_std = method.model(x)
    drawn = mean + log_std.exp() * torch.randn(3, 5, 4)
    likelihood = ((mean - y) ** 2 * torch.exp(-2 * log_std) + 2 * log_std)[..., 0]
    difference = (value(y) - value(drawn)).abs()
    expected = (omega * (likelihood + difference)).mean(-1)
    torch.manual_seed(3)
    torch.testing.assert_close(method.fit_loss(x, y, omega), expected)

    # The gradient goes through s' alone: 2 (the target's deviation) times 1, and not 11.
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(method.next_value(x, y).sum(), y)
    assert torch.equal(gradient, torch.tensor([0.0, 2.0, 2.0, 2.0]).expand(3, 5, 4))


def test_the_first_fit_is_not_value_aware():
    method = ring("ampl_value_model")
    used = []

    def fit_loss(x: Tensor, y: Tensor, omega: Tensor) -> Tensor:
        used.append(method.value_aware)
        assert not any(parameter.requires_grad for parameter in method.critic.parameters())
        return plain_loss(x, y, omega)

    plain_loss = method.fit_loss
    method.fit_loss = fit_loss
    for k in (0, 1):
        method.fit_model(k, torch.ones(6), lambda *report: None)
    steps = TINY["model_epoch_steps"] * TINY["model_max_epochs"]
    assert used == [False] * steps + [True] * steps
    assert all(parameter.requires_grad for parameter in method.critic.parameters())


# ===== Figure 2 ===================================================================================
def test_figure2_draws_every_refit(run, tmp_path, capsys):
    figure2 = importlib.import_module("figure2")
    folders = [str(run(name).folder) for name in ("ampl", "ampl_vpm")]
    figure2.main(str(tmp_path / "out.png"), folders)
    printed = capsys.readouterr().out
    for name in ("ampl", "ampl_vpm"):
        for iteration in (8, 16):
            assert f"{name}, iteration {iteration}: quartiles" in printed
    assert (tmp_path / "out.png").stat().st_size > 0


def test_figure2_refuses_a_run_without_omega(tmp_path):
    figure2 = importlib.import_module("figure2")
    with pytest.raises(SystemExit, match="holds no omega"):
        figure2.main(str(tmp_path / "out.png"), [str(tmp_path)])
