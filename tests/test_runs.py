"""Whole runs, tiny: they reach everything, repeat, resume, survive failures and refuse mistakes."""

import dataclasses
import inspect
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import keystr, tree_leaves_with_path

import ampl

pytestmark = pytest.mark.usefixtures("short_episodes")
ROOT = Path(ampl.__file__).parent
ENV = "maze2d-umaze-dense-v1"
# All phases: a first fit, rollouts, warm-up and main iterations, evaluations; omega and a weighted
# re-fit at 12. Two learners. Checkpoints at 5, 10, 12, 17, 22, 24, mostly between two
# rollouts, which reseed.
TINY = dict(
    env_id=ENV, total_iterations=24, warmup_iterations=8, eval_every=8, eval_episodes=2,
    final_episodes=3, log_every=1, checkpoint_every=5, model_retrain_every=12, model_max_epochs=2,
    model_epoch_steps=4, holdout_size=20, model_batch_size=8, model_hidden=16, ensemble_size=3,
    num_elites=2, rollout_every=4, rollout_rows=60, buffer_size=200, real_decay_every=2,
    batch_size=16, hidden=(16, 16), noise_dim=2, miw_steps=6, miw_lr=1e-3, miw_batch_size=8,
    miw_initial_batch_size=8, num_initial_states=20, eval_candidates=3, threads=1, cuda=False,
    cpu_fast_matmul=False, num_seeds=2,
)  # fmt: skip


def write_dataset(path, changes):
    """Three hundred rows of a random ball in 15 episodes, in D4RL's format."""
    rng, rows = np.random.default_rng(0), np.arange(300)
    data = dict(observations=rng.normal(1, 1, (300, 4)), actions=rng.uniform(-1, 1, (300, 2)))
    data |= dict(rewards=rng.random(300), terminals=rows < 0, timeouts=rows % 20 == 19) | changes
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
    return str(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "data.hdf5", {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset, short_episodes):
    """The folder of a run that nothing disturbed, pictures and all."""
    place = str(tmp_path_factory.mktemp("whole"))
    ampl.train(ampl.Args(**TINY | dict(dataset_path=dataset, run_dir=place)))
    return folder_in(place)


@pytest.fixture
def tiny(tmp_path, dataset, monkeypatch):
    """tiny(**changes) trains and returns the run folder. No pictures: they take most of the time"""
    monkeypatch.setattr(ampl.Run, "plot_curves", lambda run: None)

    def train(**changes):
        place = dict(dataset_path=dataset, run_dir=str(tmp_path / "runs"))
        ampl.train(ampl.Args(**TINY | place | changes))
        return folder_in(tmp_path / "runs")

    return train


def folder_in(place):
    (folder,) = Path(place).iterdir()
    return folder


def command(*argv):
    """What `python ampl.py argv` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ampl.py", *map(str, argv)])
        ampl.main()


def resume(folder, *argv):
    command("--resume", folder, *argv)
    return folder


def saved(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def result(folder):
    return json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def flat(content):
    """{place: value or all of a tensor} of nested dicts and lists, without the times."""
    found = {keystr(path): value for path, value in tree_leaves_with_path(content)}
    for key, x in found.items():
        if isinstance(x, torch.Tensor):
            found[key] = x.contiguous().numpy().tobytes(), x.shape, x.dtype
    return {key: value for key, value in found.items() if "seconds" not in key}


def points(folder):
    """What TensorBoard shows: {tag: {(iteration, value)}}"""
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: {(e.step, e.value) for e in events.Scalars(tag)} for tag in tags}


def assert_same_run(a, b):
    """Bit for bit: all tensors, all scores."""
    for file in ("checkpoint.pt", "policy.pt", "model.pt"):
        one, two = flat(saved(a, file)), flat(saved(b, file))
        assert [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)] == []
    for key in ("final_scores", "curves", "mean_last_ten"):
        assert result(a)[key] == result(b)[key]


def test_run_folder(whole, dataset):
    """The script, the arguments, TensorBoard, checkpoint, policy, model, pictures, result."""
    names = {p.name for p in whole.iterdir() if not p.name.startswith("events.out.tfevents")}
    files = {"ampl.py", "args.json", "checkpoint.pt", "policy.pt", "model.pt", "result.json"}
    assert names == files | {"curves.png", "weight12.npy"}
    assert len(list(whole.iterdir())) == len(names) + 1
    assert re.fullmatch(rf"{ENV}__ampl__0__\d{{8}}-\d{{6}}", whole.name)
    assert (whole / "ampl.py").read_text() == (ROOT / "ampl.py").read_text()
    settings = TINY | dict(dataset_path=dataset, run_dir=str(whole.parent))
    assert ampl.load_args(whole) == ampl.Args(**settings)
    curves = Image.open(whole / "curves.png").convert("RGB")
    assert min(curves.size) > 300 and len(curves.getcolors(1 << 20)) > 20
    weight = np.load(whole / "weight12.npy")
    assert weight.shape == (2, 285) and weight.mean(1) == pytest.approx(1, abs=1e-5)


def test_result(whole, dataset):
    """All that a table of results needs, from the file alone."""
    r = result(whole)
    assert (r["algo"], r["env_id"], r["dataset"], r["rows"]) == ("ampl", ENV, dataset, 300)
    assert re.fullmatch("[0-9a-f]{64}", r["sha256"]) and np.isfinite(r["data_score"])
    assert r["seeds"] == [0, 1] and np.shape(r["final_scores"]) == (2, 3)
    assert len(np.unique(r["final_scores"])) == 6  # no two episodes are the same
    assert r["final_mean"] == pytest.approx(np.mean(r["final_scores"], 1))
    curves = np.array(r["curves"])  # iteration, then a score per learner
    assert curves[:, 0].tolist() == [8, 16, 24] and r["last"] == curves[-1, 1:].tolist()
    assert r["mean_last_ten"] == pytest.approx(curves[:, 1:].mean(0)) and len(r["last"]) == 2
    assert r["total_iterations"] == 24 and r["device"] == "cpu" and "git" in r
    assert r["steps_per_second"] == pytest.approx(24 / r["seconds"]) and r["seconds"] > 0
    assert r["args"] == json.loads((whole / "args.json").read_text())
    assert r["versions"].keys() == {"torch", "numpy", "gymnasium", "mujoco"}


STEPS = "critic_loss q_values actor_loss generator_loss discriminator_loss".split()
LOGGED = dict.fromkeys([f"losses/{name}" for name in STEPS], range(1, 25))
LOGGED |= {"rollout/terminated_frac": range(1, 25), "eval/normalized_score": (8, 16, 24)}
LOGGED |= {"model/train_nll": (0, 0, 12, 12), "model/holdout_error": (0, 0, 12, 12)}
LOGGED |= {"losses/weight_loss": (12,), "weights/batch_mean": (12,)}


def test_log(whole):
    """Every quantity of every phase, a finite value per learner."""
    logged = points(whole)
    assert logged.keys() == {f"{key}/seed_{seed}" for key in LOGGED for seed in (0, 1)}
    for tag, values in logged.items():
        assert sorted(i for i, _ in values) == [*LOGGED[tag.rsplit("/", 1)[0]]], tag
        assert np.isfinite([value for _, value in values]).all()


def test_seeds(tiny, whole, tmp_path):
    """The same seed gives the same run, however often it is evaluated, logged and saved."""
    base = saved(whole)
    for changes in (dict(eval_every=5, log_every=7, checkpoint_every=3), dict(seed=1)):
        again = saved(tiny(**changes))
        for part in ("method", "optimizers", "rng"):
            assert (flat(again[part]) == flat(base[part])) == ("seed" not in changes)
        shutil.rmtree(tmp_path / "runs")
    drawn = [name for name, value in base["method"].items() if value.dim() > 1]
    assert not [name for name in drawn if torch.equal(base["method"][name], again["method"][name])]


class Killed(BaseException):
    """What SIGKILL would do at this point of the program, in this process."""


def before_call(n, function, act):
    """`function`, but act(*arguments) comes before its call number n."""
    count = itertools.count()

    def call(*args):
        if next(count) == n:
            act(*args)
        return function(*args)

    return call


def die(*_):
    raise Killed


# The calls: 0-1 the first fit, then one per iteration and evaluation; 15 is omega, 16-17 the
# re-fit, 18 the iteration after it, 31 the last evaluation.
@pytest.mark.parametrize("n, at", [(8, 5), (13, 10), (15, 12), (17, 12), (18, 12), (31, 22)])
def test_resume_is_exact_wherever_the_run_was_cut(n, at, tiny, whole, tmp_path):
    """Two learners, in warm-up, omega, re-fit, main loop and end: nothing tells the runs apart."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ampl.Run, "log", before_call(n, ampl.Run.log, die))
        tiny()
    folder = folder_in(tmp_path / "runs")
    assert saved(folder)["iteration"] == at
    assert_same_run(resume(folder), whole)
    shown, expected = points(folder), points(whole)
    for tag in expected.keys() - {f"rollout/terminated_frac/seed_{seed}" for seed in (0, 1)}:
        assert shown[tag] == expected[tag], tag  # that one is known again at the next rollout


def test_a_finished_run_goes_on(tiny, whole, capsys):
    """To a larger --total-iterations as if it had been so long; on another device with a note."""
    folder = tiny(total_iterations=16)
    assert_same_run(resume(folder, "--total-iterations", 24), whole)
    assert ampl.load_args(folder).total_iterations == 24
    assert_same_run(resume(folder), whole)
    assert points(folder) == points(whole)
    assert "note: resumed on" not in capsys.readouterr().out
    torch.save(saved(folder) | {"device": "cuda", "rng": torch.zeros(16)}, folder / "checkpoint.pt")
    assert saved(resume(folder, "--total-iterations", 26))["device"] == "cpu"
    assert "note: resumed on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("device, at", [("cpu", [10, 20, 30, 36]), ("cuda", [15, 30, 36])])
def test_when_checkpoints_are_saved(device, at, monkeypatch):
    """Every 10 iterations, here of 4 s; on a GPU also a minute after the last; and at the end."""
    run, saves = ampl.Run.__new__(ampl.Run), []
    run.args = ampl.Args(total_iterations=36, checkpoint_every=10)
    run.method, run.bar = torch.nn.Module(), ampl.tqdm(disable=True)
    run.method.device, run.logs, run.curves = torch.device(device), {}, []
    run.iteration = run.saved = run.saved_at = 0

    def save():
        saves.append(run.iteration)
        run.saved, run.saved_at = run.iteration, 4 * run.iteration

    run.log, run.save_checkpoint = lambda *_: None, save
    monkeypatch.setattr(ampl.time, "monotonic", lambda: 4 * run.iteration)
    monkeypatch.setattr(ampl, "evaluate", lambda *_: np.zeros((1, 1)))
    assert list(run.iterations()) == list(range(36)) and saves == at


def die_soon(rng):
    """Let this process be killed at a random moment after some more logs."""
    n, seconds, log = rng.randrange(2, 12), rng.uniform(1e-4, 0.03), ampl.Run.log
    ampl.Run.log = before_call(n, log, lambda *_: signal.setitimer(signal.ITIMER_REAL, seconds))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: as sudden as SIGKILL
    ampl.tqdm.set_lock(threading.RLock())  # the dead would hold the one of all processes


def test_sudden_death_at_random_moments(tiny, whole, tmp_path):
    """Killed again and again, at times that nobody chose: it ends as if it had not been."""
    rng, place, status, kills = random.Random(0), tmp_path / "runs", None, 0
    while status != 0:
        found, seed = list(place.glob("*/checkpoint.pt")), rng.random()
        if not found:
            shutil.rmtree(place, ignore_errors=True)
        child = os.fork()
        if child == 0:
            try:
                die_soon(random.Random(seed))
                resume(found[0].parent) if found else tiny()
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGALRM)
        kills += status != 0
    assert_same_run(folder_in(place), whole)
    assert kills > 1


# torch.save writes model.pt, then two files per save; os.replace and os.fsync have args.json first.
@pytest.mark.parametrize("error, where, n, at", [
    (Killed, "save", 8, 12), (Killed, "replace", 9, 12), (Killed, "replace", 13, 22),
    (RuntimeError, "save", 8, 12), (OSError, "fsync", 9, 12),
])  # fmt: skip
def test_a_failure_while_saving(error, where, n, at, tiny, whole, tmp_path):
    """Killed or a full disk: checkpoint.pt is the old or the new one, whole, and the run goes on"""
    module = torch if where == "save" else os

    def fail(*args):
        if where == "save":
            args[1].write(b"PK half of a checkpoint")
        raise error("no space left")

    with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, Killed)) as stop:
        patch.setattr(module, where, before_call(n, getattr(module, where), fail))
        tiny()
    folder = folder_in(tmp_path / "runs")
    sentence = f"cannot write {folder}/checkpoint.pt (no space left); what was there is unharmed"
    assert error is Killed or stop.value.code == sentence
    assert saved(folder)["iteration"] == at
    assert_same_run(resume(folder), whole)
    assert not list(folder.glob("*.part"))


def poisoned(function, n, value):
    """`function`, whose result turns to `value` from its call number n on."""
    count = iter(range(100_000))
    return lambda *args: function(*args) * (value if next(count) >= n else 1)


@pytest.mark.parametrize("function, n, value, log_every, sentence", [
    ("critic_loss", 9, np.nan, 1, "training: losses/critic_loss is nan"),
    ("critic_loss", 9, np.nan, 100, "training: losses/critic_loss is nan"),  # seen at the save
    ("discriminator_loss", 9, np.inf, 1, "training: losses/discriminator_loss is inf"),
    ("generator_loss", 9, np.nan, 1, "training: losses/(actor|generator)_loss is nan"),
    ("model_loss", 10, np.nan, 1, "model fit 1, epoch .: model/train_nll is nan"),
    ("miw_loss", 3, np.nan, 1, "omega 1, step 6: losses/weight_loss is nan"),
])  # fmt: skip
def test_what_is_not_finite_stops_the_run_by_name(
    function, n, value, log_every, sentence, tiny, tmp_path, monkeypatch
):
    """The checkpoint before it stays, and holds nothing of the kind."""
    monkeypatch.setattr(ampl, function, poisoned(getattr(ampl, function), n, value))
    with pytest.raises(SystemExit) as stop:
        tiny(log_every=log_every)
    folder = folder_in(tmp_path / "runs")
    assert re.fullmatch(f"{sentence}; {folder} keeps its last checkpoint", stop.value.code)
    last = saved(folder)
    assert last["iteration"] == (5 if n == 9 else 12)
    assert all(value.isfinite().all() for value in last["method"].values())


def test_dynamics_from(tiny, whole):
    """A run with the first run's model goes on as that one did, bit for bit, without a fit 0."""
    second = tiny(dynamics_from=str(whole))
    assert flat(saved(second)) == flat(saved(whole))
    assert result(second)["final_scores"] == result(whole)["final_scores"]
    assert {i for i, _ in points(second)["model/train_nll/seed_0"]} == {12}


def test_evaluate(whole, capsys):
    """--evaluate: the saved policy gets the scores that the run gave it, and nothing is written."""
    before, scores = contents(whole), np.array(result(whole)["final_scores"])
    for episodes, argv in ((3, []), (2, ["--final-episodes", "2"])):
        command("--evaluate", whole, *argv)
        lines = capsys.readouterr().out.splitlines()
        for seed, (line, score) in enumerate(zip(lines, scores[:, :episodes], strict=True)):
            error = score.std() / episodes**0.5
            assert line == f"seed {seed}: normalized score {score.mean():.1f} +- {error:.1f}"
    assert contents(whole) == before


def test_capture_video(whole, tiny, tmp_path, monkeypatch):
    """A moving picture of one episode, also without a screen."""
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    try:
        plain = gymnasium.make("Hopper-v5", render_mode="rgb_array")
        plain.reset(), plain.render()
    except Exception as error:
        pytest.skip(f"no OpenGL here: {error}")
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    argv = ["--evaluate", folder, "--capture-video", "--final-episodes", "1"]
    command(*argv)
    with Image.open(folder / "episode.gif") as film:
        assert film.n_frames == 5 and min(film.size) > 100  # every third of 15 steps
        assert len(film.convert("RGB").getcolors(1 << 20)) > 20
    monkeypatch.setattr(ampl.Maze2d, "render", lambda self: 1 / 0)
    for call in (lambda: command(*argv), lambda: tiny(capture_video=True)):
        with pytest.raises(SystemExit, match="cannot render .*MUJOCO_GL=egl or osmesa"):
            call()
    assert result(folder_in(tmp_path / "runs"))["final_scores"] == result(whole)["final_scores"]


# --- mistakes ---


def flags(**changes):
    """Args fields as a command line."""
    for key, value in changes.items():
        words = str(value).strip("()").replace(",", "").split()
        yield from [f"--no-{key}"] if value is False else [f"--{key}", *words]


# Datasets with one thing wrong, and what is said about them.
ROW = np.arange(300)[:, None]
DATASETS = {
    "wide": ({"observations": np.zeros((300, 5))}, r"observations are \(300, 5\) .* \(300, 4\)"),
    "narrow": ({"actions": np.zeros((300, 1))}, r"actions are \(300, 1\) and not \(300, 2\)"),
    "short": ({"rewards": np.zeros(299)}, r"are \(300, .*\) and not \(299, .*\)"),
    "short_flags": ({"terminals": np.zeros(299)}, "short_flags.hdf5"),
    "text": ({"rewards": np.array([b"a"] * 300)}, "text.hdf5"),
    "no_rows": (dict(observations=np.zeros((0, 4)), actions=np.zeros((0, 2)), rewards=[],
                     terminals=[], timeouts=[]), "at least two episodes"),
    "nan": ({"observations": np.where(ROW == 7, np.nan, [0] * 4)},
            "observations .*NaN.* first in row 7"),
    "outside": ({"actions": np.where(ROW == 6, 1.5, [0, 0])}, "action in row 6"),
    "endless": ({"timeouts": np.zeros(300)}, "at least two episodes"),
    "limits": ({"timeouts": np.ones(300)}, "four rows not at a limit"),
    "scalar": ({"rewards": 1.0}, "scalar.hdf5"),
    "constant": ({"rewards": np.ones(300)}, "all rewards .* equal"),
}  # fmt: skip


def broken(**_):
    raise RuntimeError("for two\nreasons")


gymnasium.register("Broken-v0", broken)
# Command lines with a mistake, and what the one sentence says; {places} are made below.
BAD = [(f"--dataset-path {{{name}}}.hdf5", words) for name, (_, words) in DATASETS.items()] + [
    ("--dataset-path nowhere.hdf5", "nowhere.hdf5 is missing"),
    ("--dataset-path {folder}", "no D4RL file"),
    ("--dataset-path {page}", "no D4RL file"),
    ("--dataset-path {foreign_file}", "rewards|actions|observations"),
    ("--dataset-path {half}", "cut"),
    ("--env-id pen-humam-v1", "did you mean .*pen-human-v1"),
    ("--env-id Broken-v0", r"cannot make Broken-v0 \(for two reasons\)"),
    ("--env-id kitchen-mixed-v0", "no simulator here"),
    ("--env-id CartPole-v1", "continuous actions"),
    ("--warmup-iterations 25", "--warmup-iterations"),
    ("--num-elites 4", "--num-elites must fit --ensemble-size"),
    ("--final-episodes 0", "--final-episodes must be at least 1"),
    ("--seed -1", "--seed must be at least 0"),
    ("--run-dir {page}/runs", "cannot write .*{page}/runs"),
    ("--track", "pip install wandb"),
    ("--dynamics-from {good} --model-hidden 17", "model.pt is damaged or of another setting"),
    ("--resume {fresh}", "there is no {fresh}/checkpoint.pt"),
    ("--resume {damaged}", "checkpoint.pt is damaged"),
    ("--resume {pickled}", "checkpoint.pt is damaged .*Weights only load failed"),
    ("--resume {mopos}", "a run of mopo.py on .* as it was"),
    ("--resume {foreign}", "args.json is damaged or of another setting"),
    ("--resume {resized}", "checkpoint.pt is damaged or of another setting"),
    ("--resume {good} --gamma 0.9", "--resume takes --gamma from the run"),
    ("--resume {changed}", "a run of ampl.py on .* as it was"),
    ("--resume {good} --total-iterations 12", "it is at 24: raise --total-iterations"),
    ("--resume=", "there is no args.json"),
    ("--evaluate {good} --hidden 5 5", "--evaluate takes --hidden from the run"),
    ("--resume {good} --evaluate {good}", "--resume takes --evaluate from the run"),
    ("--evaluate {fresh}", "there is no {fresh}/policy.pt"),
    ("--evaluate {damaged}", "policy.pt is damaged"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, whole, dataset):
    """Dataset files and run folders with something wrong."""
    root = tmp_path_factory.mktemp("places")
    for name, (changes, _) in DATASETS.items():
        write_dataset(root / f"{name}.hdf5", changes)
    (root / "folder").mkdir()
    (root / "page").write_text("<html>log in</html>")
    (root / "half").write_bytes(Path(dataset).read_bytes()[:9000])
    with h5py.File(root / "foreign_file", "w") as file:
        file["pixels"] = np.zeros(300)
    for name in ("good", "fresh", "damaged", "pickled", "mopos", "changed", "foreign", "resized"):
        shutil.copytree(whole, root / name)
    for file in ("checkpoint.pt", "policy.pt", "model.pt"):
        (root / "fresh" / file).unlink()
        (root / "damaged" / file).write_bytes((whole / file).read_bytes()[:999])
    torch.save({"algo": Path("an object")}, root / "pickled/checkpoint.pt")
    torch.save(saved(whole) | {"algo": "mopo"}, root / "mopos/checkpoint.pt")
    torch.save(saved(whole) | {"sha256": "of other data"}, root / "changed/checkpoint.pt")
    args = json.loads((whole / "args.json").read_text())
    (root / "foreign/args.json").write_text('{"learning_rate": 1}')
    (root / "resized/args.json").write_text(json.dumps(args | {"hidden": [16, 17]}))
    return root


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_a_mistake_costs_one_sentence(line, words, places, dataset, tmp_path, monkeypatch):
    """And nothing is lost."""
    names = {p.stem: str(p.with_suffix("")) for p in places.iterdir()}
    argv = line.format_map(names).split()
    if "--resume" not in argv and "--evaluate" not in argv:
        argv = [*flags(**TINY, dataset_path=dataset, run_dir=tmp_path / "runs"), *argv]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    before = contents(places)
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    message = stop.value.code  # a string goes to stderr, with exit status 1
    assert isinstance(message, str) and "\n" not in message, message
    assert re.search(words.format_map(names), message), message
    assert contents(places) == before


def test_the_script_as_a_user_starts_it(dataset, tmp_path):
    """From another folder, with every warning an error: a mistake, and a run to its end."""
    script = [sys.executable, "-W", "error", str(ROOT / "ampl.py")]
    how = dict(capture_output=True, text=True, cwd="/")
    done = subprocess.run([*script, "--env-id", "pen-humam-v1"], **how)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    settings = TINY | dict(eval_episodes=1, eval_every=24, final_episodes=1, num_seeds=1)
    argv = flags(**settings, dataset_path=dataset, run_dir=tmp_path)
    done = subprocess.run([*script, *argv], **how)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|traceback", done.stderr, re.IGNORECASE)
    assert "whole episodes" in done.stdout and f"see {folder_in(tmp_path)}" in done.stdout


def shown(capsys, settings, *argv):
    """The text of --help on one line."""
    with pytest.raises(SystemExit) as stop:
        ampl.parse_args(settings, [*argv, "--help"])
    assert stop.value.code == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("env_id", ["maze2d-umaze-v1", "pen-cloned-v1", "hopper-medium-v2"])
def test_help_shows_the_tasks_own_numbers(env_id, capsys):
    text = shown(capsys, ampl.Args, "--env-id", env_id)
    for name, value in zip(("env_id", *ampl.PAPER_FLAGS), (env_id, *ampl.PAPER[env_id])):
        own = text.split(f" --{name.replace('_', '-')} ", 1)[1]
        assert re.search(r"\(default: (.*?)\)", own)[1] == str(value), name


def test_every_flag_has_a_help_text(capsys, monkeypatch):
    """The comment on its line in the script; without a docstring as well."""
    monkeypatch.setattr(ampl, "__doc__", None)
    text = shown(capsys, ampl.Args)
    lines = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(ampl.Args), re.MULTILINE)
    assert [name for name, _ in lines] == [f.name for f in dataclasses.fields(ampl.Args)]
    assert [name for name, comment in lines if len(comment) < 12 or comment not in text] == []
