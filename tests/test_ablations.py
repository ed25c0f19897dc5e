"""Every ablation is a small diff, does what it says from the step it says, trains and resumes."""

import ast
import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sync
import test_runs
import torch
from PIL import Image
from test_runs import TINY, assert_same, checkpoint, folder_in, log_rows

dataset = test_runs.dataset
FOLDER = sync.ROOT / "ablations"
# The number of iterations whose end still finds base and ablation the same, bit for bit. TINY
# estimates omega and re-trains the model after 12 iterations, and ends the warm start after 8.
SAME_ITERATIONS = {
    "ampl_nw.py": 12, "ampl_uniform.py": 12, "ampl_reward_test.py": 12, "ampl_value_model.py": 12,
    "ampl_vpm.py": 12, "ampl_gendice.py": 12, "ampl_dualdice.py": 12,
    "ampl_no_reg.py": 8, "ampl_no_rollouts.py": 0, "ampl_gaussian.py": 0,
    "ampl_wpr.py": 0, "ampl_kl_wpr.py": 0, "ampl_kl.py": 0,
}  # fmt: skip
FILES = sorted(SAME_ITERATIONS)
# What an idea replaces from the start: it is not compared.
OWN = {"ampl_gaussian.py": {"actor", "actor_target", "buffer"}}
LARGE = {"ampl_vpm.py", "ampl_gendice.py", "ampl_dualdice.py"}  # 90 new lines, others 50


def read(file):
    path = sync.ROOT / file
    return (path if path.exists() else FOLDER / file).read_text()


@functools.cache
def load(file):
    """A script as a module of its own, with short episodes and no pictures."""
    path = sync.ROOT / file
    name = f"copy_of_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, path if path.exists() else FOLDER / file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MAZE_LIMITS["umaze"] = 15
    module.plot_curves = module.save_weight = lambda *args: None
    return module


def tiny_args(module, dataset, place, **changes):
    known = {field.name for field in dataclasses.fields(module.Args)}
    tiny = {k: v for k, v in (TINY | {"miw_power_every": 2}).items() if k in known}
    return module.Args(**tiny | dict(dataset_path=dataset, run_dir=str(place)) | changes)


class Watched(NamedTuple):
    """A tiny run: the agent, its state before iteration 0 and after each, the run's folder."""

    agent: object
    history: list
    folder: Path


@pytest.fixture(scope="module")
def watched(dataset, tmp_path_factory):
    """watched(file) runs it, once for all tests."""

    @functools.cache
    def run(file):
        module, history, agents = load(file), [], []
        iterate = module.iterate

        def state(agent):
            return {k: v.clone() for k, v in agent.state_dict().items()}

        def recording(agent, *args):
            agents.append(agent)
            if not history:
                history.append(state(agent))
            logs = iterate(agent, *args)
            history.append(state(agent))
            return logs

        place = tmp_path_factory.mktemp("watched")
        module.iterate = recording
        try:
            module.train(tiny_args(module, dataset, place))
        finally:
            module.iterate = iterate
        return Watched(agents[0], history, folder_in(place))

    return run


def test_all_ablations_are_tested():
    assert [path.name for path in sorted(FOLDER.glob("*.py"))] == FILES


# --- small diffs ---


@pytest.mark.parametrize("file", FILES)
def test_size_and_place(file):
    """Few new lines; all of them, and all that is gone, where the docstring says."""
    source = read(file)
    docstring = ast.get_docstring(sync.parse(source))
    assert re.search(r"^New here: \S", docstring, re.MULTILINE)
    assert f"python ablations/{file} --env-id" in docstring
    origin = sync.lineage(source)
    assert origin.base == ("ampl_wpr.py" if "_kl" in file else "ampl.py")
    base = read(origin.base)
    new, missing = sync.new_lines(source, base), sync.new_lines(base, source)
    assert 0 < len(new) <= (90 if file in LARGE else 50)
    for section, line in new + missing:
        imports = section == 0 and line.startswith(("import ", "from "))
        assert imports or section in origin.sections, (section, line)
    assert f'Run(args, "{Path(file).stem}")' in source
    own, old = sync.definitions(source), sync.definitions(base)
    changed = {name for name, text in own.items() if old.get(name) != text}
    assert changed <= origin.changes <= changed | (old.keys() - own.keys())
    kept = [name for name in old if name in own]
    assert kept == [name for name in own if name in old]  # in the base's order
    for node in ast.walk(sync.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name in origin.changes - {"train"}:
            assert node.end_lineno - node.lineno < 45, node.name


def test_new_lines_of_a_made_up_ablation():
    """Docstring, empty lines and PAPER's rows do not count; a line moved or indented is not new."""
    base = '"""Base."""\n# 1. One\nPAPER = {\n    "a-v1": dict(b=1),\n}\nx = 1\n# 2. Two\ny = 2\n'
    source = (
        base.replace("Base", "Other").replace("b=1", "b=2").replace("y = 2", "z = 3\n\n  x = 1")
    )
    assert sync.new_lines(source.replace("  x", "x"), base) == [(2, "z = 3")]
    assert sync.ledger(source.replace("  x", "x"), base) == "+ z = 3\n- y = 2\n"


def test_ledgers_are_current():
    """tests/lineage lists what each file adds to and lacks of its base: review it with the diff."""
    written = {path.name: path.read_text() for path in sync.LINEAGE.iterdir()}
    assert written == sync.ledgers(), "run python tests/sync.py"
    assert len(written) == len(FILES)


@pytest.mark.parametrize("file", FILES)
def test_no_flag_does_nothing(file):
    """Every flag is read; PAPER is the base's table without the flags that are gone."""
    module, base = load(file), load("ampl.py")
    flags = {field.name for field in dataclasses.fields(module.Args)}
    assert set(re.findall(r"\bargs\.(\w+)", read(file))) - {"json"} == flags
    for task, row in base.PAPER.items():
        assert module.PAPER[task] == {k: v for k, v in row.items() if k in flags}
    args = module.parse_args(["--env-id", "pen-human-v1"])
    module.check_args(args)
    assert args.seed == 0 and args.wandb_project_name == "ampl"


# --- behaviour ---


def network(name):
    return name.split(".")[0]


@pytest.mark.parametrize("file", FILES)
def test_same_as_the_base_until_the_idea_acts(file, watched):
    base, own = watched(sync.lineage(read(file)).base).history, watched(file).history
    count, skip = SAME_ITERATIONS[file], OWN.get(file, set())
    common = [k for k in base[0] if k in own[0] and network(k) not in skip]
    assert {"model", "elites", "critic", "critic_target"} <= {network(k) for k in common}
    for i in range(count + 1):  # before iteration 0, and after each of the first `count`
        for k in common:
            assert torch.equal(base[i][k], own[i][k]), (i, k)
    after = [k for k in common if not torch.equal(base[count + 1][k], own[count + 1][k])]
    assert after, "the idea does nothing"
    if file == "ampl_no_reg.py":
        assert {network(k) for k in after} == {"actor", "actor_target"}


@pytest.mark.parametrize("file", FILES)
def test_every_phase_takes_gradient_steps(file, watched, dataset):
    """All parameters move, all optimizers step, all phases that the idea keeps are in the log."""
    module, run = load(file), watched(file)
    start = module.AMPL(tiny_args(module, dataset, ""), 4, 2, torch.device("cpu"))
    end = dict(run.agent.named_parameters())
    for name, parameter in start.named_parameters():
        assert not torch.equal(parameter, end[name]), name
    trained = {network(k) for k, p in end.items() if p.requires_grad}
    assert set(run.agent.optimizers) <= trained and len(run.agent.optimizers) >= 4
    for name, optimizer in run.agent.optimizers.items():
        for state in optimizer.state.values():
            assert state["step"] > 0 and state["exp_avg_sq"].abs().sum() > 0, name
    phases = {"model fit 0", "training", "evaluation"}
    if file != "ampl_nw.py":
        phases |= {"model fit 1"}
        if file != "ampl_uniform.py":
            phases |= {"omega 1", "weights 1"}
    assert {row["phase"] for row in log_rows(run.folder)} == phases
    assert re.search(rf"__{Path(file).stem}__0__", run.folder.name)


class Killed(BaseException):
    """What SIGKILL would do at this point of the program, in this process."""


@pytest.mark.parametrize("file", FILES)
def test_resume_is_exact(file, watched, dataset, tmp_path, monkeypatch):
    """A run that dies in its own phase (omega, the re-fit or the main loop) goes on bit for bit."""
    module, whole = load(file), watched(file).folder
    phases = [row["phase"] for row in log_rows(whole)]
    phase = next(p for p in ("omega 1", "model fit 1", "training") if p in phases)
    row = phases.index(phase) + 1
    log, count = module.Run.log, iter(range(10_000))

    def dying(self, *args):
        if next(count) == row:
            raise Killed
        log(self, *args)

    args = tiny_args(module, dataset, tmp_path, checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module.Run, "log", dying)
        module.train(args)
    folder = folder_in(tmp_path)
    module.train(dataclasses.replace(module.load_args(folder), resume=str(folder)))
    a, b = checkpoint(folder), checkpoint(whole)
    assert_same(a["agent"], b["agent"])
    assert_same(a["optimizers"], b["optimizers"])
    assert [r["phase"] for r in log_rows(folder)] == phases


# --- what some ideas compute ---


def test_value_aware_loss(dataset):
    """By hand for a model that is a constant: the reward's NLL and |Q_1 - Q_1| times the weight."""
    module = load("ampl_value_model.py")
    agent = module.AMPL(tiny_args(module, dataset, ""), 4, 2, torch.device("cpu"))
    agent.model.input_mean.fill_(0.3)
    agent.model.target_std.fill_(2.0)
    x, y, weight = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 5, 5), torch.rand(1, 3, 5)
    noisy = agent.model(x)
    agent.actor.forward = lambda obs: obs[..., :2]
    agent.critic.first = lambda obs, action: obs.sum(-1) + 10 * action.sum(-1)
    torch.manual_seed(3)
    loss = module.fit_loss(agent, x, y, weight, 1)
    torch.manual_seed(3)
    mean, log_std = noisy
    y_hat = mean + log_std.exp() * torch.randn_like(mean)
    values = []
    for target in (y, y_hat):
        s = x[..., :4] + 0.3 + 2 * target[..., 1:]
        values.append(s.sum(-1) + 10 * torch.tanh(s[..., :2]).sum(-1))
    nll = ((mean - y) ** 2 * torch.exp(-2 * log_std) + 2 * log_std)[..., 0]
    expected = (weight * (nll + (values[0] - values[1]).abs())).mean(-1)
    assert torch.allclose(loss, expected, rtol=1e-5, atol=1e-5)
    # The actions are constants: without them the slope of the gap in s'_hat is +-1 per entry of s.
    y_hat = y_hat.detach().requires_grad_()
    (slope,) = torch.autograd.grad(module.value_gap(agent, x, y, y_hat).sum(), y_hat)
    assert torch.equal(slope.abs(), 2 * torch.ones_like(slope) * (torch.arange(5) > 0))
    first = module.fit_loss(agent, x, y, weight, 0)
    assert torch.equal(first, module.model_loss(mean, log_std, y, weight))


def test_gaussian_actor():
    """Raw actions with the mean and deviation that the network says; the sample has a gradient."""
    module = load("ampl_gaussian.py")
    actor = module.GaussianActor(1, 3, 2, module.Args(hidden=(8, 8)))
    obs = torch.randn(1, 1, 3).expand(-1, 200_000, -1)
    mean, log_std = actor.net(obs[:, :1]).chunk(2, -1)
    raw = actor(obs)
    assert torch.allclose(raw.mean(1), mean[:, 0], atol=0.02)
    assert torch.allclose(raw.std(1), log_std[:, 0].exp(), atol=0.02)
    grads = torch.autograd.grad(raw.sum(), actor.parameters())
    assert all(g.abs().sum() > 0 for g in grads)


def test_reward_is_the_test_function(dataset):
    """Both sides of the flow equation draw r_hat from the elites; no critic is asked."""
    module = load("ampl_reward_test.py")
    agent = module.AMPL(tiny_args(module, dataset, ""), 4, 2, torch.device("cpu"))
    agent.elites.sample = lambda obs, action: (obs.sum(-1) + 100 * action.sum(-1), obs)
    agent.actor.forward = lambda obs: obs[..., :2]
    agent.critic = agent.critic_target = None
    obs = torch.randn(1, 7, 4)
    fresh = module.model_reward(agent, obs)
    assert torch.allclose(fresh, obs.sum(-1) + 100 * torch.tanh(obs[..., :2]).sum(-1))
    data = torch.randn(7, 12)
    data[:, 11] = 0
    tables = module.QTables(torch.zeros(1, 7), torch.zeros(1, 7), torch.zeros(1, 3))
    module.fill_tables(agent, tables, data, data[:3, :4])
    batch = agent.split(data[None])
    assert torch.allclose(tables.q, module.model_reward(agent, batch.obs, batch.action))
    assert torch.allclose(tables.q_next, module.model_reward(agent, batch.next_obs))
    assert torch.allclose(tables.q_initial, module.model_reward(agent, data[None, :3, :4]))
    args = tiny_args(module, dataset, "")
    for source in (None, tables):
        logs = module.miw_step(agent, data, data[:3, :4], source, args)
        assert logs["losses/weight_loss"].isfinite().all()


# --- copies and sync ---


def planted(source, file=None):
    """The source with a drift in a function that no ablation changes."""
    drifted = source.replace("return reward + gamma * q", "return reward + 0.9 * gamma * q")
    assert drifted != source, file
    return drifted


@pytest.mark.parametrize("file", FILES)
def test_a_drift_planted_in_an_ablation_is_found(file):
    sources = {name: read(name) for name in ["ampl.py", *FILES]}
    assert sync.differing_copies(sources) == []
    sources[file] = planted(sources[file])
    found = sync.differing_copies(sources)
    base = sync.lineage(sources[file]).base
    assert f"conservative_target: {file} | {base}" in found
    if file != "ampl_wpr.py":  # its two variants differ from it now
        assert len(found) == 1


def test_a_definition_that_is_not_listed_is_found():
    sources = {"ampl.py": read("ampl.py"), "ampl_nw.py": read("ampl_nw.py")}
    sources["ampl_nw.py"] += "\n\ndef surprise():\n    pass\n"
    assert sync.differing_copies(sources) == ["surprise: ampl_nw.py | ampl.py"]


@pytest.fixture(scope="module")
def tree():
    """A repository with ampl.py, the ablations, README and sync.py, all committed."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        shutil.copytree(FOLDER, place / "ablations", ignore=shutil.ignore_patterns("__pycache__"))
        (place / "tests").mkdir()
        for name in ("ampl.py", "README.md", "tests/sync.py"):
            shutil.copy(sync.ROOT / name, place / name)
        git = ["git", "-C", str(place), "-c", "user.name=t", "-c", "user.email=t@t"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run(git + command, check=True)
        yield place


def run_sync(tree, old, new, clean=True):
    """Replace old by new in the tree's ampl.py and run its sync.py."""
    if clean:
        subprocess.run(["git", "-C", str(tree), "checkout", "-q", "."], check=True)
    source = (tree / "ampl.py").read_text()
    assert source.count(old) == 1
    (tree / "ampl.py").write_text(source.replace(old, new))
    command = [sys.executable, str(tree / "tests" / "sync.py")]
    return subprocess.run(command, capture_output=True, text=True)


def test_sync_carries_a_change_into_all_ablations(tree):
    """A mended line of ampl.py arrives in all thirteen, and nothing else changes there."""
    old, new = "return reward + gamma * q  #", "return 1.0 * reward + gamma * q  #"
    done = run_sync(tree, old, new)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in FILES:
        before = read(file)
        assert (tree / "ablations" / file).read_text() == before.replace(old, new) != before
        assert f"ablations/{file}: merged" in done.stdout
    written = {path.name: path.read_text() for path in (tree / "tests/lineage").iterdir()}
    assert written == sync.ledgers()  # what is new in an ablation is as before
    # The same line once more, before the first change is committed.
    newer = "return 2.0 * reward + gamma * q  #"
    done = run_sync(tree, new, newer, clean=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in FILES:
        assert (tree / "ablations" / file).read_text() == read(file).replace(old, newer)


def test_sync_reports_a_clash(tree):
    """The run's name is every file's own: a change of that line of ampl.py must not be lost."""
    done = run_sync(tree, 'run = Run(args, "ampl")', 'run = Run(args, "AMPL")')
    assert done.returncode == 1
    for file in FILES:
        assert f"ablations/{file}: CONFLICT" in done.stdout
        assert "<<<<<<<" in (tree / "ablations" / file).read_text()


def test_figure2_draws_the_quartiles_of_each_run(tmp_path):
    """Known weights give known quartiles, learner 0's, per re-training; one panel per run."""
    runs = [tmp_path / "env__ampl__0__a", tmp_path / "env__ampl_vpm__0__b"]
    for scale, run in enumerate(runs, 1):
        run.mkdir()
        logs = scale * np.stack([np.arange(-2.0, 3.0), np.zeros(5)])  # learner 1 is not shown
        np.savez(run / "miw.npz", **{"100": logs, "200": logs + 1})
    command = [sys.executable, str(sync.ROOT / "tests" / "figure2.py"), str(tmp_path / "out.png")]
    done = subprocess.run([*command, *map(str, runs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == [
        "ampl, iteration 100: quartiles -1.000, 0.000, 1.000; from -2.00 to 2.00",
        "ampl, iteration 200: quartiles 0.000, 1.000, 2.000; from -1.00 to 3.00",
        "ampl_vpm, iteration 100: quartiles -2.000, 0.000, 2.000; from -4.00 to 4.00",
        "ampl_vpm, iteration 200: quartiles -1.000, 1.000, 3.000; from -3.00 to 5.00",
    ]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (700, 350)  # two panels of 3.5 inches at 100 dots
        assert len(picture.convert("RGB").getcolors(100_000)) > 10  # not a blank page

    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "holds no miw.npz" in done.stderr
