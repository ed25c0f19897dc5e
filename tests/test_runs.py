"""Whole runs, tiny: they reach everything, repeat, resume, survive failures and refuse mistakes."""

import dataclasses
import importlib
import errno
import fcntl
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from small import build_ampl, build_combo, build_mopo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import keystr, tree_leaves_with_path

import ampl

pytestmark = pytest.mark.usefixtures("short_episodes")
ROOT = Path(ampl.__file__).parent
ENV = "maze2d-umaze-dense-v1"
# All phases: a first fit, rollouts, warm-up and main iterations, evaluations; omega and a weighted
# refit at iteration 12. Checkpoints at 5, 10, 12, 15, 20 and 24, mostly between two rollouts, which
# reseed.
TINY = {
    "env_id": ENV,
    "total_iterations": 24,
    "warmup_iterations": 8,
    "real_decay_every": 2,
    "eval_every": 8,
    "eval_episodes": 2,
    "final_episodes": 3,
    "eval_candidates": 3,
    "log_every": 1,
    "checkpoint_every": 5,
    "model_retrain_every": 12,
    "model_max_epochs": 2,
    "model_epoch_steps": 4,
    "model_batch_size": 8,
    "model_hidden": 16,
    "ensemble_size": 3,
    "num_elites": 2,
    "holdout_size": 20,
    "rollout_every": 4,
    "rollout_rows": 60,
    "buffer_size": 200,
    "batch_size": 16,
    "hidden": (16, 16),
    "noise_dim": 2,
    "omega_steps": 6,
    "omega_lr": 1e-3,
    "omega_batch_size": 8,
    "omega_initial_batch_size": 8,
    "num_initial_states": 20,
    "threads": 1,
    "cuda": False,
    "cpu_fast_matmul": False,
}


def write_dataset(path: Path, changes: dict) -> str:
    """Three hundred rows of a random ball in 15 episodes, in D4RL's format. -> the path"""
    rng = np.random.default_rng(0)
    row = np.arange(300)
    arrays = {
        "observations": rng.normal(1, 1, (300, 4)),
        "actions": rng.uniform(-1, 1, (300, 2)),
        "rewards": rng.random(300),
        "terminals": np.zeros(300, bool),
        "timeouts": row % 20 == 19,
    }
    arrays.update(changes)
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return str(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "data.hdf5", {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset, short_episodes):
    """The folder of a run that nothing disturbed, pictures and all."""
    place = str(tmp_path_factory.mktemp("whole"))
    args = ampl.Args(**TINY, dataset_path=dataset, run_dir=place)
    return Path(ampl.train(args)["folder"])


@pytest.fixture
def tiny(tmp_path, dataset, monkeypatch):
    """tiny(**changes) trains and returns the run folder. No pictures: they take most of the time"""
    monkeypatch.setattr(ampl.Run, "plot_curves", lambda run: None)

    def train(**changes) -> Path:
        settings = TINY | {"dataset_path": dataset, "run_dir": str(tmp_path / "runs")} | changes
        return Path(ampl.train(ampl.Args(**settings))["folder"])

    return train


def folder_in(place) -> Path:
    """The only folder in a place."""
    (folder,) = Path(place).iterdir()
    return folder


def command(*argv) -> None:
    """What `python ampl.py argv` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ampl.py", *[str(word) for word in argv]])
        ampl.main()


def resume(folder: Path, *argv) -> Path:
    command("--resume", folder, *argv)
    return folder


def saved(folder: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def result(folder: Path) -> dict:
    """result.json, in which NaN and infinity are mistakes."""
    return json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)


def contents(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def flat(content) -> dict:
    """{place: value or all of a tensor} of nested dicts and lists.

    Times, TensorBoard's files and settings are left out.
    """
    found = {}
    for path, value in tree_leaves_with_path(content):
        if isinstance(value, torch.Tensor):
            value = (value.contiguous().numpy().tobytes(), value.shape, value.dtype)
        if not re.match(r"\['(seconds|events|events_of_longer_run|args)'\]", keystr(path)):
            found[keystr(path)] = value
    return found


def points(folder: Path) -> dict[str, list]:
    """What TensorBoard shows: {tag: [(step, value), ...]} in the order of the steps."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown = {}
    for tag in events.Tags()["scalars"]:
        shown[tag] = sorted((event.step, event.value) for event in events.Scalars(tag))
    return shown


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: all tensors, all scores."""
    for file in ("checkpoint.pt", "policy.pt", "model.pt"):
        a = flat(saved(one, file))
        b = flat(saved(two, file))
        assert [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)] == []
    for key in ("final_scores", "curve", "mean_last_ten"):
        assert result(one)[key] == result(two)[key]


# ----- what a run leaves -----
def test_run_folder(whole, dataset):
    """The script, the arguments, TensorBoard, checkpoint, policy, model, omega, picture, result."""
    names = {path.name for path in whole.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    started = {"__main__.py"}  # the script that was started, here pytest
    assert names - events - started == {
        "ampl.py",
        "args.json",
        "checkpoint.pt",
        "curves.png",
        "lock",
        "model.pt",
        "omega12.npy",
        "policy.pt",
        "result.json",
    }
    assert re.fullmatch(rf"{ENV}__ampl__0__\d{{8}}-\d{{6}}", whole.name)
    assert (whole / "ampl.py").read_text() == (ROOT / "ampl.py").read_text()
    settings = TINY | {"dataset_path": dataset, "run_dir": str(whole.parent)}
    assert ampl.load_args(whole) == ampl.Args(**settings)
    curves = Image.open(whole / "curves.png").convert("RGB")
    assert min(curves.size) > 300
    assert len(curves.getcolors(1 << 20)) > 20
    omega = np.load(whole / "omega12.npy")
    assert omega.shape == (285,)
    assert omega.mean() == pytest.approx(1, abs=1e-5)


def test_result(whole, dataset):
    """All that a table of results needs, from the file alone."""
    r = result(whole)
    assert r["algo"] == "ampl"
    assert r["env_id"] == ENV
    assert r["dataset"] == dataset
    assert r["rows"] == 300
    assert re.fullmatch("[0-9a-f]{64}", r["sha256"])
    assert math.isfinite(r["data_score"])
    assert r["seed"] == 0
    assert len(set(r["final_scores"])) == 3  # no two episodes are the same
    assert r["final_mean"] == pytest.approx(np.mean(r["final_scores"]))
    assert [iteration for iteration, _ in r["curve"]] == [8, 16, 24]
    assert r["last"] == r["curve"][-1][1]
    assert r["mean_last_ten"] == pytest.approx(np.mean([score for _, score in r["curve"]]))
    assert r["total_iterations"] == 24
    assert r["device"] == "cpu"
    assert r["folder"] == str(whole)
    assert r["steps_per_second"] == pytest.approx(24 / r["seconds"])
    assert r["args"] == json.loads((whole / "args.json").read_text())
    assert r["versions"].keys() == {"torch", "numpy", "gymnasium", "mujoco"}
    assert r["git"] is None or re.fullmatch("[0-9a-f]{40}", r["git"])


def test_log(whole):
    """Every quantity of every phase at its steps: a phase's points follow the iteration's."""
    every = list(range(1, 25))
    expected = {
        "losses/critic_loss": every,
        "losses/q_values": every,
        "losses/actor_loss": every,
        "losses/generator_loss": every,
        "losses/discriminator_loss": every,
        "rollout/terminated_frac": every,
        "eval/normalized_score": [8, 16, 24],
        "model/train_nll": [1, 2, 13, 14],
        "model/holdout_error": [1, 2, 13, 14],
        "model/idle_epochs": [1, 2, 13, 14],
        "losses/omega_loss": [13],
        "omega/batch_mean": [13],
    }
    shown = points(whole)
    assert {tag: [step for step, _ in values] for tag, values in shown.items()} == expected
    for values in shown.values():
        assert all(math.isfinite(value) for _, value in values)


def test_a_run_shorter_than_an_evaluation(tiny):
    """It ends with a score, a checkpoint, and points in TensorBoard, nevertheless."""
    folder = tiny(total_iterations=9, eval_every=1000, checkpoint_every=1000, log_every=1000)
    assert [iteration for iteration, _ in result(folder)["curve"]] == [9]
    assert saved(folder)["iteration"] == 9
    assert [step for step, _ in points(folder)["losses/critic_loss"]] == [9]


def test_seeds(tiny, whole, tmp_path):
    """The same seed gives the same run, however often it is evaluated, logged and saved."""
    base = saved(whole)
    again = saved(tiny(eval_every=5, log_every=7, checkpoint_every=3))
    for part in ("method", "optimizers", "rng"):
        assert flat(again[part]) == flat(base[part])
    other = saved(tiny(seed=1))
    drawn = [name for name, value in base["method"].items() if value.dim() > 1]
    assert [n for n in drawn if torch.equal(base["method"][n], other["method"][n])] == []


def test_progress_off_a_terminal(tiny, capfd, monkeypatch):
    """A line a minute of the main bar, with the last score, and a last line of every phase."""
    clock = itertools.count(step=1)
    monkeypatch.setattr(ampl.time, "monotonic", lambda: 10.0 * next(clock))
    tiny()
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if "\r" in line]
    main = [line for line in lines if line.startswith("ampl: ")]
    assert 3 < len(main) < 24
    assert "/24" in main[0]
    assert "score" in main[-1]
    fits = [line for line in lines if line.startswith("model fit")]
    assert len(fits) >= 2
    assert all("holdout_error" in line and "patience 10" in line for line in fits)
    assert [line for line in lines if line.startswith("omega, training 1: 100% 6/6")]


# ----- interruptions -----
class Killed(BaseException):
    """What SIGKILL would do at this point of the program, in this process."""


def before_call(n: int, function, act):
    """`function`, but act(*arguments) comes before its call number n."""
    count = itertools.count()

    def call(*args):
        if next(count) == n:
            act(*args)
        return function(*args)

    return call


def die(*_):
    raise Killed


# The calls of Run.log: 0 and 1 are the first fit, then there is one per iteration and evaluation;
# 15 is omega, 16 and 17 the refit, 18 the iteration after it, 31 the last evaluation.
@pytest.mark.parametrize(
    "call, iteration", [(8, 5), (13, 10), (15, 12), (17, 12), (18, 12), (31, 20)]
)
def test_resume_is_exact_wherever_the_run_was_cut(call, iteration, tiny, whole, tmp_path):
    """In warm-up, omega, refit, main loop and end: nothing tells the runs apart."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ampl.Run, "log", before_call(call, ampl.Run.log, die))
        tiny()
    folder = folder_in(tmp_path / "runs")
    assert saved(folder)["iteration"] == iteration
    assert_same_run(resume(folder), whole)
    shown = points(folder)
    expected = points(whole)
    del shown["rollout/terminated_frac"]  # it is known again at the next rollout
    del expected["rollout/terminated_frac"]
    assert shown == expected


# With a checkpoint after every report of a phase: after each of the 2 epochs (4 steps) of fit 0 and
# of the refit, and after the last of omega's 6 steps.
@pytest.mark.parametrize(
    "call, iteration, steps, omega_steps",
    [
        (1, 0, 4 + 8, 6),  # the first of fit 0's epochs was saved, so one more and the refit follow
        (2, 0, 0 + 8, 6),
        (15, 12, 8, 6),
        (16, 12, 8, 0),
        (17, 12, 4, 0),
        (18, 12, 0, 0),
    ],
)
def test_a_phase_goes_on_where_it_was_cut(
    call, iteration, steps, omega_steps, tiny, whole, tmp_path, monkeypatch
):
    """A fit and the training of omega lose nothing saved, and nothing tells the runs apart."""
    monkeypatch.setattr(ampl, "PHASE_SAVED_EVERY", -1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ampl.Run, "log", before_call(call, ampl.Run.log, die))
        tiny()
    folder = folder_in(tmp_path / "runs")
    assert saved(folder)["iteration"] == iteration
    counts = {"model_step": 0, "omega_step": 0}
    for name in counts:
        monkeypatch.setattr(ampl.AMPL, name, counted(getattr(ampl.AMPL, name), name, counts))
    assert_same_run(resume(folder), whole)
    assert counts == {"model_step": steps, "omega_step": omega_steps}
    shown = points(folder)
    expected = points(whole)
    del shown["rollout/terminated_frac"]
    del expected["rollout/terminated_frac"]
    assert shown == expected


def test_omega_goes_on_where_it_was_cut(tiny, tmp_path, monkeypatch):
    """It reports, and is saved, at steps 1000 and 1200."""
    settings = {"omega_steps": 1200, "total_iterations": 13}
    whole = tiny(run_dir=str(tmp_path / "whole"), **settings)
    monkeypatch.setattr(ampl, "PHASE_SAVED_EVERY", -1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ampl.Run, "log", before_call(16, ampl.Run.log, die))
        tiny(**settings)
    counts = {"omega_step": 0}
    call = counted(ampl.AMPL.omega_step, "omega_step", counts)
    monkeypatch.setattr(ampl.AMPL, "omega_step", call)
    assert_same_run(resume(folder_in(tmp_path / "runs")), whole)
    assert counts == {"omega_step": 200}


def counted(function, name: str, counts: dict):
    """`function`, whose calls are counted."""

    @functools.wraps(function)
    def call(*args):
        counts[name] += 1
        return function(*args)

    return call


def test_a_finished_run_goes_on(tiny, whole, capsys):
    """To a larger --total-iterations as if it had been so long; on another device with a note."""
    folder = tiny(total_iterations=16)
    assert_same_run(resume(folder, "--total-iterations", 24), whole)
    assert ampl.load_args(folder).total_iterations == 24
    assert_same_run(resume(folder), whole)
    assert points(folder) == points(whole)
    assert "note: " not in capsys.readouterr().out

    other_device = saved(folder) | {"device": "cuda", "rng": torch.zeros(16)}
    ampl.save(other_device, folder / "checkpoint.pt")
    assert saved(resume(folder, "--total-iterations", 26))["device"] == "cpu"
    assert "note: resumed on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {},  # iteration 18 ends a run, and has an evaluation and a checkpoint only for that
        {"log_every": 4},  # and a point of the losses
    ],
)
def test_an_extended_run_has_no_point_of_its_old_end(changes, tiny, tmp_path):
    whole = tiny(**changes)
    folder = tiny(total_iterations=18, run_dir=str(tmp_path / "short"), **changes)
    assert [iteration for iteration, _ in result(folder)["curve"]] == [8, 16, 18]
    shown = points(folder)
    resume(folder)  # a finished run that is not extended keeps them
    assert points(folder) == shown
    foreign = folder / "events.out.tfevents.1.another.program"
    foreign.touch()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ampl.Run, "cut_events", die)
        resume(folder, "--total-iterations", 24)
    assert points(folder) == shown
    assert_same_run(resume(folder), whole)
    assert foreign.exists()
    shown = points(folder)
    expected = points(whole)
    del shown["rollout/terminated_frac"]
    del expected["rollout/terminated_frac"]
    assert shown == expected


def die_soon(rng: random.Random) -> None:
    """Let this process be killed at a random moment after some more logs."""
    call = rng.randrange(2, 12)
    seconds = rng.uniform(1e-4, 0.03)
    log = before_call(call, ampl.Run.log, lambda *_: signal.setitimer(signal.ITIMER_REAL, seconds))
    ampl.Run.log = log
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: as sudden as SIGKILL
    ampl.tqdm.set_lock(threading.RLock())  # the dead would hold the one of all processes


def test_sudden_death_at_random_moments(tiny, whole, tmp_path):
    """Killed again and again, at times that nobody chose: it ends as if it had not been."""
    rng = random.Random(0)
    place = tmp_path / "runs"
    status = None
    kills = 0
    while status != 0:
        found = list(place.glob("*/checkpoint.pt"))
        seed = rng.random()
        if not found:
            shutil.rmtree(place, ignore_errors=True)
        child = os.fork()
        if child == 0:
            try:
                die_soon(random.Random(seed))
                if found:
                    resume(found[0].parent)
                else:
                    tiny()
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGALRM)
        if status != 0:
            kills += 1
    assert_same_run(folder_in(place), whole)
    assert kills > 1


# Checkpoints are saved at 5, 10, 12, 15, 20 and 24, each as policy.pt and then checkpoint.pt.
@pytest.mark.parametrize(
    "error, where, file, number, iteration",
    [
        (Killed, "save", "checkpoint.pt", 4, 12),
        (Killed, "replace", "policy.pt", 4, 12),
        (Killed, "replace", "checkpoint.pt", 5, 15),
        (RuntimeError, "save", "checkpoint.pt", 4, 12),
        (OSError, "fsync", "checkpoint.pt", 4, 12),
    ],
)
def test_a_failure_while_saving(error, where, file, number, iteration, tiny, whole, tmp_path):
    """Killed or a full disk: checkpoint.pt is the old or the new one, whole, and the run goes on"""
    module = torch if where == "save" else os
    save = ampl.save
    count = itertools.count(1)

    def fail(*args):
        if where == "save":
            args[1].write(b"PK half of a checkpoint")
        raise error("no space left")

    def failing_save(content, path):
        with pytest.MonkeyPatch.context() as patch:
            if path.name == file and next(count) == number:
                patch.setattr(module, where, fail)
            save(content, path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, Killed)) as stop:
        patch.setattr(ampl, "save", failing_save)
        tiny()
    folder = folder_in(tmp_path / "runs")
    if error is not Killed:
        sentence = f"cannot write {folder}/checkpoint.pt (no space left)"
        assert stop.value.code == f"{sentence}; what was there is unharmed"
    assert saved(folder)["iteration"] == iteration
    assert_same_run(resume(folder), whole)
    assert list(folder.glob("*.part")) == []


LAST_FILES = ["args.json", "ampl.py", "model.pt", "policy.pt", "checkpoint.pt", "omega12.npy"]


@pytest.mark.parametrize("file", [*LAST_FILES, "result.json", "curves.png"])
def test_a_full_disk_is_one_sentence(file, tiny, whole, tmp_path, monkeypatch, capsys):
    """It names the file, whichever it is; nothing half-written stays."""
    monkeypatch.undo()  # with pictures
    monkeypatch.setattr(ampl.os, "fsync", before_call_with(file))
    args = ampl.load_args(whole)
    with pytest.raises(SystemExit) as stop:
        ampl.train(dataclasses.replace(args, run_dir=str(tmp_path / "runs")))
    folder = folder_in(tmp_path / "runs")
    sentence = f"cannot write {folder}/{file} (No space left on device)"
    assert stop.value.code == f"{sentence}; what was there is unharmed"
    assert list(folder.glob("*.part")) == []


def before_call_with(name: str):
    """os.fsync on a disk that is full when a file of this name is written."""
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        if f"/{name}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    return fsync


@pytest.mark.parametrize("call", [3, 14, 20])
def test_a_folder_that_vanished(call, tiny, tmp_path, monkeypatch, capfd):
    """One sentence that names a file in it. It does not come back, half empty."""
    folder = tmp_path / "runs"
    log = before_call(call, ampl.Run.log, lambda *_: shutil.rmtree(folder))
    monkeypatch.setattr(ampl.Run, "log", log)
    with pytest.raises(SystemExit, match="cannot write .* [(]No such file or directory[)]"):
        tiny()
    assert not folder.exists()
    assert "Traceback" not in capfd.readouterr().err


def poisoned(function, n: int, value: float):
    """`function`, whose result turns to `value` from its call number n on."""
    count = itertools.count()

    def call(*args):
        answer = function(*args)
        return answer * value if next(count) >= n else answer

    return call


@pytest.mark.parametrize(
    "function, n, value, log_every, sentence",
    [
        ("critic_loss", 9, np.nan, 1, "training: losses/critic_loss is nan"),
        ("critic_loss", 9, np.nan, 100, "training: losses/critic_loss is nan"),  # at the save
        ("discriminator_loss", 9, np.inf, 1, "training: losses/discriminator_loss is inf"),
        ("generator_loss", 9, np.nan, 1, "training: losses/(actor|generator)_loss is nan"),
        ("model_loss", 10, np.nan, 1, "model fit 1, patience 10 epochs: model/train_nll is nan"),
        ("omega_loss", 3, np.nan, 1, "omega, training 1: losses/omega_loss is nan"),
    ],
)
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


def test_a_nan_in_the_last_evaluation(tiny, tmp_path, monkeypatch):
    """Names the environment; there is no result.json, which has no word for NaN."""
    step = ampl.Maze2d.step
    finish = ampl.Run.finish

    def step_to_nan(env, action):
        obs, _, *ends = step(env, action)
        return obs, math.nan, *ends

    def finish_in_nan(run):
        monkeypatch.setattr(ampl.Maze2d, "step", step_to_nan)
        return finish(run)

    monkeypatch.setattr(ampl.Run, "finish", finish_in_nan)
    with pytest.raises(SystemExit, match=f"--env-id {ENV}: .* returns .nan nan.") as stop:
        tiny()
    assert "checkpoint" not in stop.value.code
    assert not (folder_in(tmp_path / "runs") / "result.json").exists()


# ----- one process at a time -----
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_belongs_to_one_process(whole, tmp_path):
    """A second one is refused until the first has ended, however. Then left-over parts go."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "checkpoint.pt.123.part").write_bytes(b"half")
    before = contents(folder)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", HOLD, folder / "lock"], **pipes)
    other.stdout.readline()
    with pytest.raises(SystemExit, match=f"another process works in {folder}"):
        resume(folder)
    assert contents(folder) == before
    other.kill()
    other.communicate()
    assert_same_run(resume(folder), whole)
    assert list(folder.glob("*.part")) == []


def is_locked(folder: Path) -> bool:
    """Whether somebody, this process perhaps, has locked the folder."""
    with open(folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("what", ["copied", "removed", "taken"])
def test_a_lock_lasts_as_long_as_training(what, tiny, tmp_path, monkeypatch):
    """Also if this process copies the folder. A lock that was removed is made again, or refused.

    When training ends with an error, also a process that it has forked keeps nothing.
    """
    others = []

    def disturb(run, *_):
        if what == "copied":
            shutil.copytree(run.folder, tmp_path / "copy")
            return
        (run.folder / "lock").unlink()
        if what == "taken":
            others.append(open(run.folder / "lock", "w"))
            fcntl.flock(others[0], fcntl.LOCK_EX)

    def look(run, *_):
        assert is_locked(run.folder)
        others.append(os.fork())
        if others[0] == 0:
            signal.pause()
        raise Killed

    # Between the two is a checkpoint, that of iteration 10.
    log = before_call(14, before_call(8, ampl.Run.log, disturb), look)
    monkeypatch.setattr(ampl.Run, "log", log)
    if what == "taken":
        with pytest.raises(SystemExit, match="another process works in"):
            tiny()
        assert saved(folder_in(tmp_path / "runs"))["iteration"] == 5
        others[0].close()
    else:
        with pytest.raises(Killed):
            tiny()
        assert not is_locked(folder_in(tmp_path / "runs"))
        os.kill(others[0], signal.SIGKILL)
        os.waitpid(others[0], 0)


def test_two_runs_of_the_same_second(tiny, tmp_path, monkeypatch):
    """The second does not write into the first one's folder."""
    monkeypatch.setattr(ampl.time, "strftime", lambda form: "20260101-000000")
    before = contents(tiny(total_iterations=9))
    with pytest.raises(SystemExit, match="is there already: start again in a second"):
        tiny(total_iterations=9)
    assert contents(folder_in(tmp_path / "runs")) == before


def test_without_locks(tiny, monkeypatch, capsys):
    """Where there are none, that is said."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    tiny(total_iterations=9)
    assert "note: no locks here" in capsys.readouterr().out


# ----- what resumes is not what ran -----
def test_an_edited_script_is_kept_beside(whole, tmp_path, capsys):
    """The run's own copy stays as it is; the same edited script is kept once."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "ampl.py").write_text("what it began with")
    for _ in range(2):
        resume(folder)
        assert "is not what this run began with; it is kept as ampl.2.py" in capsys.readouterr().out
    assert (folder / "ampl.py").read_text() == "what it began with"
    assert (folder / "ampl.2.py").read_text() == (ROOT / "ampl.py").read_text()
    assert not (folder / "ampl.3.py").exists()
    (folder / "ampl.2.py").unlink()
    (folder / "ampl.2.py").mkdir()
    assert (resume(folder) / "ampl.3.py").is_file()


def edit(folder: Path, file: str, **changes) -> None:
    """Change entries of a file of a run."""
    if file.endswith(".json"):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))
    else:
        ampl.save(saved(folder, file) | changes, folder / file)


@pytest.mark.parametrize(
    "file, changes, flag, said",
    [
        (
            "checkpoint.pt",
            {"threads": 3},
            "resume",
            "1 CPU threads, and not 3: numbers may differ",
        ),
        (
            "checkpoint.pt",
            {"versions": {n: "0.1" for n in ("torch", "numpy", "gymnasium", "mujoco")}},
            "resume",
            "torch is .* and was 0.1: numbers may differ",
        ),
        ("checkpoint.pt", {"algo": "mine"}, "resume", "was made by mine, and this is ampl"),
        ("policy.pt", {"algo": "mine"}, "evaluate", "was made by mine, and this is ampl"),
        ("model.pt", {"sha256": "0"}, "dynamics-from", "model.pt was fitted to other data than"),
        ("model.pt", {"kind": "Mine"}, "dynamics-from", "model.pt was fitted by Mine, this"),
    ],
)
def test_what_differs_is_said(file, changes, flag, said, whole, dataset, tmp_path, capsys):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    edit(folder, file, **changes)
    argv = [f"--{flag}", folder]
    if flag == "dynamics-from":
        argv += flags(**TINY | {"dataset_path": dataset, "run_dir": tmp_path / "runs"})
    command(*argv)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [line for line in notes if re.search(said, line)], notes


def test_no_flipped_bit_is_loaded(whole, tmp_path):
    """Each of a hundred in the tensors' files is refused, also in a header."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    rng = random.Random(0)
    for file in ("checkpoint.pt", "policy.pt", "model.pt"):
        content = (whole / file).read_bytes()
        for _ in range(33):
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (folder / file).write_bytes(damaged)
            with pytest.raises(SystemExit, match=f"{file} is damaged"):
                with ampl.loading(folder / file):
                    pass


# ----- a large buffer -----
class LargeTable:
    """Stands for D_model of 2**25 rows, and notes which of them are drawn."""

    def __init__(self, width: int):
        self.width = width
        self.drawn = []

    def __len__(self) -> int:
        return 2**25

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        self.drawn.append(rows)
        return torch.zeros(len(rows), self.width)


@pytest.mark.parametrize("build", [build_ampl, build_mopo, build_combo])
def test_all_rows_of_a_large_buffer_are_drawn(build):
    """float32 has 2**24 numbers between 0 and 1: half of the rows were never drawn."""
    method = build()
    table = LargeTable(method.model_data.shape[1])
    del method.model_data
    method.model_data = table
    method.num_model_rows.fill_(len(table))
    for _ in range(20):
        method.sample_mixed()
    rows = torch.cat(table.drawn)
    assert 0.3 < (rows % 2).double().mean() < 0.7
    assert 0.4 < (rows / len(table)).mean() < 0.6


# ----- saved models and policies -----
def test_dynamics_from(tiny, whole, monkeypatch):
    """A run with the first run's model goes on as that one did, bit for bit, without a fit 0.

    Its args.json holds the whole path, and a third run can take the model from it.
    """
    monkeypatch.chdir(whole.parent)
    second = tiny(dynamics_from=whole.name)
    assert ampl.load_args(second).dynamics_from == str(whole)
    monkeypatch.setenv("HOME", str(second.parent))
    third = tiny(dynamics_from=f"~/{second.name}", seed=1, total_iterations=9)
    for folder in (second, third):
        assert flat(saved(folder, "model.pt")) == flat(saved(whole, "model.pt"))
    ampl.train(dataclasses.replace(ampl.load_args(third), resume=f"~/{third.name}"))
    assert flat(saved(second)) == flat(saved(whole))
    assert result(second)["final_scores"] == result(whole)["final_scores"]
    assert [step for step, _ in points(second)["model/train_nll"]] == [13, 14]


def test_policy_file(whole):
    """It holds the networks that `act` uses, script, class, task, settings and sizes."""
    policy = saved(whole, "policy.pt")
    assert (policy["algo"], policy["kind"], policy["env_id"]) == ("ampl", "AMPL", ENV)
    assert policy["sizes"] == (4, 2)
    assert policy["policy"].keys() == {"actor", "critic"}
    assert policy["args"] == dataclasses.asdict(ampl.load_args(whole))
    assert policy["buffers"] == {}
    assert len(policy) == 7


def test_evaluate(whole, capsys):
    """--evaluate: the saved policy gets the scores that the run gave it, and nothing is written."""
    before = contents(whole)
    scores = np.array(result(whole)["final_scores"])
    for episodes in (3, 2):
        command("--evaluate", whole, "--final-episodes", episodes)
        first = scores[:episodes]
        error = first.std() / episodes**0.5
        sentence = f"normalized score over {episodes} episodes: {first.mean():.1f} +- {error:.1f}"
        assert capsys.readouterr().out.splitlines() == [sentence]
    assert contents(whole) == before


def test_capture_video(whole, tiny, tmp_path, monkeypatch):
    """A moving picture of one episode, also without a screen."""
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    try:
        plain = gymnasium.make("Hopper-v5", render_mode="rgb_array")
        plain.reset()
        plain.render()
    except Exception as error:
        pytest.skip(f"no OpenGL here: {error}")
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    argv = ["--evaluate", folder, "--capture-video", "--final-episodes", "1"]
    command(*argv)
    with Image.open(folder / "episode.gif") as film:
        assert film.n_frames == 4  # after 0, 5, 10 and 15 steps of 0.01 s: 20 frames a second
        assert min(film.size) > 100
        assert len(film.convert("RGB").getcolors(1 << 20)) > 20

    monkeypatch.setattr(ampl.Maze2d, "render", lambda self: 1 / 0)
    with pytest.raises(SystemExit, match="cannot render .*MUJOCO_GL=egl or MUJOCO_GL=osmesa"):
        command(*argv)
    with pytest.raises(SystemExit, match="cannot render .*MUJOCO_GL=egl or MUJOCO_GL=osmesa"):
        tiny(capture_video=True)
    assert result(folder_in(tmp_path / "runs"))["final_scores"] == result(whole)["final_scores"]


# ----- mistakes -----
def flags(**settings) -> list[str]:
    """Fields of Args as words of a command line."""
    words = []
    for key, value in settings.items():
        if value is False:
            words.append(f"--no-{key}")
        elif isinstance(value, tuple):
            words.extend([f"--{key}", *[str(entry) for entry in value]])
        else:
            words.extend([f"--{key}", str(value)])
    return words


# Datasets with one thing wrong, and what is said about them.
ROW = np.arange(300)[:, None]
NO_ROWS = {
    "observations": np.zeros((0, 4)),
    "actions": np.zeros((0, 2)),
    "rewards": [],
    "terminals": [],
    "timeouts": [],
}
DATASETS = {
    "wide": ({"observations": np.zeros((300, 5))}, r"observations are \(300, 5\) .* \(300, 4\)"),
    "narrow": ({"actions": np.zeros((300, 1))}, r"actions are \(300, 1\) and not \(300, 2\)"),
    "short": ({"rewards": np.zeros(299)}, r"are \(300, .*\) and not \(299, .*\)"),
    "short_flags": ({"terminals": np.zeros(299)}, "short_flags.hdf5"),
    "text": ({"rewards": np.array([b"a"] * 300)}, "text.hdf5"),
    "no_rows": (NO_ROWS, "at least two episodes"),
    "nan": (
        {"observations": np.where(ROW == 7, np.nan, [0] * 4)},
        "observations .*NaN.* first in row 7",
    ),
    "outside": ({"actions": np.where(ROW == 6, 1.5, [0, 0])}, "action in row 6"),
    "endless": ({"timeouts": np.zeros(300)}, "at least two episodes"),
    "limits": ({"timeouts": np.ones(300)}, "four rows not at a limit"),
    "scalar": ({"rewards": 1.0}, "scalar.hdf5"),
    "constant": ({"rewards": np.ones(300)}, "all rewards .* are equal"),
}


def broken(**_):
    raise RuntimeError("for two\nreasons")


gymnasium.register("Broken-v0", broken)
# Command lines with a mistake, and what the one sentence says; {places} are made below.
MISTAKES = [
    ("--dataset-path nowhere.hdf5", "there is no nowhere.hdf5: name .* with --dataset-path"),
    ("--dataset-path {folder}", "a folder or a device"),
    ("--dataset-path {page}", "no HDF5 file"),
    ("--dataset-path {foreign_file}", "rewards|actions|observations"),
    ("--dataset-path {half}", "cut"),
    ("--env-id pen-humam-v1", "did you mean .*pen-human-v1"),
    ("--env-id Broken-v0", r"cannot make Broken-v0 \(for two reasons\)"),
    ("--env-id kitchen-mixed-v0", "no simulator here"),
    ("--env-id CartPole-v1", "continuous actions"),
    ("--warmup-iterations 25", "--warmup-iterations"),
    ("--num-elites 4", "--num-elites is larger than --ensemble-size"),
    ("--rollout-rows 201", "has 201 rows, more than D_model holds"),
    ("--horizon 1000", "has 1000 rows, more than D_model holds"),
    ("--final-episodes 0", "--final-episodes is 0, but must be at least 1"),
    ("--seed -1", "--seed is -1, but must be at least 0"),
    ("--gamma 2", "--gamma is 2.0, but must be at least 0 and at most 1"),
    ("--actor-lr nan", "--actor-lr is nan, but must be a number"),
    ("--actor-lr inf", "--actor-lr is inf, but must be above 0 and at most 1000000000"),
    ("--actor-lr 0", "--actor-lr is 0.0, but must be above 0"),
    ("--hidden 4 0", "--hidden is 0, but must be at least 1"),
    ("--gamma 0.5 --tau 0", "--tau is 0.0, but must be above 0 and at most 1"),
    ("--q-coef 1e300", "--q-coef is 1e.300, but must be at least 0 and at most 1000000000"),
    ("--total-iterations 10000000000", "--total-iterations is 10000000000, but must be"),
    ("--seed 4294967296", "--seed is 4294967296, but must be at least 0 and at most 4294967295"),
    ("--threads 1000000", "--threads is 1000000, but must be at least 0 and at most [0-9]"),
    ("--ensemble-size 1000000000", "more memory than there is: lower them"),
    ("--dynamics-from=", "--dynamics-from is '', but must be a text that is not empty"),
    ("--run-dir=", "--run-dir is '', but must be a text that is not empty"),
    ("--run-dir {page}", "cannot write .*{page}"),
    ("--run-dir {page}/runs", "cannot write .*{page}/runs"),
    ("--track", "pip install wandb"),
    (
        "--dynamics-from {good} --model-hidden 17",
        "model.pt: layers.0.weight is .3, 6, 16. there and .3, 6, 17. here: give the flags",
    ),
    ("--dynamics-from {good}/model.pt", "model.pt is a file: name the folder, {good}"),
    ("--dynamics-from {scaled}", "was fitted to rewards scaled by .* leave out --dynamics-from"),
    ("--resume {good}/checkpoint.pt", "checkpoint.pt is a file: name the folder, {good}"),
    ("--evaluate {good}/policy.pt", "policy.pt is a file: name the folder, {good}"),
    ("--resume {fresh}", "there is no {fresh}/checkpoint.pt"),
    ("--resume {damaged}", "checkpoint.pt is damaged"),
    ("--resume {pickled}", "checkpoint.pt is damaged .*Weights only load failed"),
    ("--resume {mopos}", "is a run of MOPO, not of AMPL"),
    ("--resume {foreign}", "args.json has learning_rate, which is no setting here"),
    ("--resume {resized}", "args.json was edited, put it back: hidden is"),
    ("--resume {good} --gamma 0.9", "--resume takes --gamma from the run"),
    ("--resume {changed}", "is a run on other data, .* as it was"),
    (
        "--resume {good} --total-iterations 12",
        "has done 24 iterations already: raise --total-iterations above 24, or leave it",
    ),
    ("--resume=", "--resume is .., but must be a text that is not empty"),
    ("--dataset-path=", "--dataset-path is .., but must be a text that is not empty"),
    ("--run-dir {page}", "cannot write {page}/.* .Not a directory"),
    ("--dynamics-from {elsewhere}", "model.pt is a model of pen-human-v1, not of " + ENV),
    ("--evaluate {elsewhere}", "elsewhere holds what was learned on pen-human-v1, not on " + ENV),
    ("--resume {elsewhere}", "elsewhere holds what was learned on pen-human-v1, not on " + ENV),
    ("--evaluate {mopos}", "is a run of MOPO, not of AMPL"),
    ("--evaluate {empty}", r"policy.pt holds \[\], but needs \['actor', 'critic'\]"),
    ("--evaluate {nothing}", "policy.pt is damaged or of another setting"),
    ("--resume {texts}", "args.json was edited or is damaged: --gamma is .*0.99.*, but must"),
    (
        "--evaluate {texts}",
        "args.json was edited or is damaged: --gamma is .*0.99.*, but must",
    ),
    ("--resume {high}", "args.json was edited or is damaged: --gamma is 2, but must be at least 0"),
    ("--resume {edited}", "args.json was edited, put it back: gamma is 0.5 and was 0.99"),
    ("--evaluate {edited}", "args.json was edited, put it back: gamma is 0.5 and was 0.99"),
    ("--resume {list}", "args.json is damaged or of another setting"),
    ("--resume {cut}", "args.json is damaged or of another setting"),
    ("--evaluate {good} --hidden 5 5", "--evaluate takes --hidden from the run"),
    ("--resume {good} --evaluate {good}", "--resume takes --evaluate from the run"),
    ("--evaluate {fresh}", "there is no {fresh}/policy.pt"),
    ("--evaluate {damaged}", "policy.pt is damaged"),
]
for name, (_, words) in DATASETS.items():
    MISTAKES.append((f"--dataset-path {{{name}}}.hdf5", words))


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
    names = ("good", "fresh", "damaged", "pickled", "mopos", "changed", "foreign", "resized")
    edited = ("elsewhere", "scaled", "empty", "nothing", "texts", "high", "edited", "list", "cut")
    for name in names + edited:
        shutil.copytree(whole, root / name)
    for file in ("checkpoint.pt", "policy.pt", "model.pt"):
        (root / "fresh" / file).unlink()
        (root / "damaged" / file).write_bytes((whole / file).read_bytes()[:999])
    checkpoint = saved(whole)
    ampl.save({"algo": Path("an object")}, root / "pickled/checkpoint.pt")
    ampl.save(checkpoint | {"kind": "MOPO"}, root / "mopos/checkpoint.pt")
    ampl.save(checkpoint | {"sha256": "of other data"}, root / "changed/checkpoint.pt")
    args = json.loads((whole / "args.json").read_text())
    (root / "foreign/args.json").write_text('{"learning_rate": 1}')
    (root / "resized/args.json").write_text(json.dumps(args | {"hidden": [16, 17]}))
    ampl.save(saved(whole, "policy.pt") | {"kind": "MOPO"}, root / "mopos/policy.pt")
    for file in ("checkpoint.pt", "policy.pt", "model.pt"):
        edit(root / "elsewhere", file, env_id="pen-human-v1")
    edit(root / "scaled", "model.pt", reward_range=(0.0, 50.0))
    edit(root / "empty", "policy.pt", policy={})
    ampl.save({}, root / "nothing/policy.pt")
    edit(root / "texts", "args.json", gamma="0.99")
    edit(root / "high", "args.json", gamma=2)
    edit(root / "edited", "args.json", gamma=0.5)
    (root / "list/args.json").write_text("[1, 2]")
    (root / "cut/args.json").write_bytes((whole / "args.json").read_bytes()[:-9])
    return root


@pytest.mark.parametrize("line, words", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_costs_one_sentence(line, words, places, dataset, tmp_path, monkeypatch):
    """And nothing is lost."""
    names = {path.stem: str(path.with_suffix("")) for path in places.iterdir()}
    argv = line.format_map(names).split()
    if "--resume" not in line and "--evaluate" not in line:
        settings = TINY | {"dataset_path": dataset, "run_dir": tmp_path / "runs"}
        argv = flags(**settings) + argv
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    before = contents(places)
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    message = stop.value.code  # a string goes to stderr, with exit status 1
    assert isinstance(message, str) and "\n" not in message, message
    assert re.search(words.format_map(names), message), message
    assert contents(places) == before
    if "--dynamics-from" in line:
        assert not (tmp_path / "runs").exists()


# Settings of a wrong kind, as a notebook may have them, and what the one sentence says.
WRONG_KINDS = [
    ({"gamma": "0.9"}, "--gamma is '0.9', but must be a number"),
    ({"gamma": True}, "--gamma is True, but must be a number"),
    ({"gamma": None}, "--gamma is None, but must be a number"),
    ({"gamma": np.ones(2)}, "--gamma is array.* but must be a number"),
    ({"batch_size": 2.0}, "--batch-size is 2.0, but must be a whole number"),
    ({"batch_size": True}, "--batch-size is True, but must be a whole number"),
    ({"batch_size": 10**400}, "--batch-size is 10*, but must be at least 1"),
    ({"critic_lr": 10**400}, "--critic-lr is 10*, but must be above 0"),
    ({"hidden": 16}, "--hidden is 16, but must be a tuple"),
    ({"hidden": [16, 16]}, "--hidden is .16, 16., but must be a tuple"),
    ({"hidden": (16,)}, "--hidden is .16,., but must have 2 numbers"),
    ({"hidden": (16, "16")}, "--hidden is '16', but must be a whole number"),
    ({"model_weight_decay": ()}, "--model-weight-decay needs at least one value"),
    ({"cuda": "no"}, "--cuda is 'no', but must be True or False"),
    ({"async_envs": 1}, "--async-envs is 1, but must be True or False"),
    ({"env_id": 3}, "--env-id is 3, but must be a text"),
    ({"run_dir": "runs\udcff"}, "--run-dir is 'runs.*', which args.json cannot hold: it holds .*"),
    ({"dataset_path": Path("x")}, "--dataset-path is .*Path.* but must be a text"),
    ({"initial_states": "data"}, "--initial-states is 'data', but must be one of"),
    ({"initial_states": ["data"]}, "--initial-states is .'data'., but must be one of"),
]


@pytest.mark.parametrize("settings, words", WRONG_KINDS)
def test_a_setting_of_a_wrong_kind_costs_one_sentence(settings, words):
    with pytest.raises(SystemExit) as stop:
        ampl.train(ampl.Args(**settings))
    assert re.fullmatch(words + "[^\n]*", stop.value.code), stop.value.code


@pytest.mark.parametrize(
    "value, fits",
    [
        (Path("x"), False),
        ((1, Path("x")), False),
        ([1, 2], False),  # it would come back as a tuple
        ({1: 2}, False),
        (math.nan, False),
        (np.float32(1), False),
        (((1, 2.5), ("a", None)), True),
        ({"a": True}, True),
    ],
)
def test_a_setting_of_ones_own_fits_into_args_json(value, fits, tmp_path):
    settings = dataclasses.make_dataclass("Own", [("mine", object, None)], bases=(ampl.Args,))
    args = settings(mine=value)
    if fits:
        ampl.check_ranges(args)
        ampl.save(ampl.lasting_settings(args), tmp_path / "args.json")
        assert ampl.load_args(tmp_path, settings) == args
    else:
        with pytest.raises(SystemExit, match="--mine is .*, which args.json cannot hold"):
            ampl.check_ranges(args)


def test_a_folder_called_wandb_is_not_wandb(tmp_path, monkeypatch):
    """Weights and Biases itself leaves such a folder where it was used."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    if importlib.util.find_spec("wandb").origin is not None:
        pytest.skip("Weights and Biases is installed")
    with pytest.raises(SystemExit, match="pip install wandb"):
        command("--track")


def test_no_home(monkeypatch):
    """The user has neither HOME nor an entry in the list of users."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    for argv in (["--env-id", ENV], ["--dataset-path", "~/x.hdf5"]):
        with pytest.raises(SystemExit, match="there is no home folder for .*: set the variable"):
            command(*argv)


@pytest.mark.parametrize(
    "answer, commit",
    [
        ("echo " + 40 * "a", 40 * "a"),
        ("echo hint: update git; echo " + 40 * "a", None),
        ("echo fatal: dubious ownership >&2; exit 128", None),
        (None, None),
    ],
)
def test_git_is_a_commit_or_nothing(answer, commit, tmp_path, monkeypatch):
    if answer is not None:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ampl.git_commit() == commit


@pytest.mark.parametrize("there", [True, False])
def test_ctrl_c_ends_in_one_line(there, tmp_path, monkeypatch, capsys):
    """It says how to go on, or that there is nothing to go on from. Other errors are as ever."""
    folder = tmp_path / "a run"
    folder.mkdir()
    if there:
        (folder / "checkpoint.pt").touch()
    monkeypatch.setattr(sys, "argv", ["ampl.py", "--seed", "1"])
    ampl.say_how_to_go_on(folder, KeyboardInterrupt, KeyboardInterrupt(), None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    command = f"python ampl.py --resume '{folder}'"
    assert (command in said) == there and ("start it again" in said) != there
    ampl.say_how_to_go_on(folder, KeyError, KeyError("of mine"), None)
    assert "KeyError: 'of mine'" in capsys.readouterr().err


def test_ctrl_c_while_a_run_is_loaded(whole, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ampl, "load_args", stop)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for flag, advice in (("--resume", f"ampl.py --resume {whole}"), ("--evaluate", "start it")):
        with pytest.raises(KeyboardInterrupt):
            command(flag, whole)
        monkeypatch.setattr(sys, "argv", ["ampl.py"])
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        ("--help | true", "stopped, since nothing more can be printed (Broken pipe), with"),
        ("--help >/dev/full", "stopped, since nothing more can be printed (No space left on"),
        ("--help 2>&-", "standard error is closed: send it somewhere, as with 2>/dev/null"),
    ],
)
def test_who_cannot_print_says_so(words, said):
    line = f"set -o pipefail; {sys.executable} {ROOT / 'ampl.py'} {words}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_ctrl_c_in_a_run(dataset, tmp_path):
    """As a terminal sends it, in the middle of training."""
    settings = TINY | {"dataset_path": dataset, "run_dir": tmp_path, "total_iterations": 10**6}
    words = [sys.executable, str(ROOT / "ampl.py"), *flags(**settings)]
    run = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    said = run.communicate()[1].splitlines()
    assert run.returncode != 0
    assert said[-1].endswith(f"python {ROOT / 'ampl.py'} --resume {folder_in(tmp_path)}")
    assert "Traceback" not in "".join(said)


def test_the_script_as_a_user_starts_it(dataset, tmp_path):
    """From another folder, with every warning an error: a mistake, and a run to its end."""
    script = [sys.executable, "-W", "error", str(ROOT / "ampl.py")]
    how = {"capture_output": True, "text": True, "cwd": "/"}
    done = subprocess.run([*script, "--env-id", "pen-humam-v1"], **how)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    settings = TINY | {"eval_episodes": 1, "eval_every": 24, "final_episodes": 1}
    place = tmp_path / "it's \u00e9"  # which this stdout cannot print
    settings.update({"dataset_path": dataset, "run_dir": place})
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "HOME": "/nowhere"}
    done = subprocess.run([*script, *flags(**settings)], **how, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|traceback", done.stderr, re.IGNORECASE)
    assert "whole episodes" in done.stdout
    folder = str(folder_in(place)).replace("\u00e9", "\\xe9")
    assert f"see {folder}" in done.stdout


# ----- help -----
def help_text(capsys, settings: type, *argv: str) -> str:
    """The text of --help on one line."""
    with pytest.raises(SystemExit) as stop:
        ampl.parse_args(settings, [*argv, "--help"])
    assert stop.value.code == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("env_id", ["maze2d-umaze-v1", "pen-cloned-v1", "hopper-medium-v2"])
def test_help_shows_the_tasks_own_numbers(env_id, capsys):
    text = help_text(capsys, ampl.Args, "--env-id", env_id)
    names = ("env_id", *ampl.PAPER_FLAGS)
    for name, value in zip(names, (env_id, *ampl.PAPER[env_id])):
        own = text.split(f" --{name.replace('_', '-')} ", 1)[1]
        assert re.search(r"\(default: (.*?)\)", own)[1] == str(value), name


def test_every_flag_has_a_help_text(capsys, monkeypatch):
    """The comment on its line in the script; without a docstring as well."""
    monkeypatch.setattr(ampl, "__doc__", None)
    text = help_text(capsys, ampl.Args)
    lines = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(ampl.Args), re.MULTILINE)
    assert [name for name, _ in lines] == [field.name for field in dataclasses.fields(ampl.Args)]
    for name, comment in lines:
        if name != "model_weight_decay":
            assert len(comment) >= 12, name
        assert comment in text, name


def test_help_shows_ranges(capsys):
    text = help_text(capsys, ampl.Args)
    assert "--gamma 0..1 " in text
    assert "--batch-size INT>=1 " in text
    assert "--actor-lr FLOAT>0 " in text
