"""Whole runs, tiny: they reach everything, repeat, resume, survive failures and refuse mistakes."""

import ast
import ctypes.util
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import ampl

ROOT = Path(ampl.__file__).parent
SOURCE = Path(ampl.__file__).read_text()
TREE = ast.parse(SOURCE)
ENV = "maze2d-umaze-v1"
# Every phase twice or more: two fits of two epochs, three MIW windows, five rollouts, evaluations.
TINY = dict(
    env_id=ENV, total_iterations=24, warmup_iterations=8, eval_every=8, eval_episodes=2,
    final_episodes=3, log_every=4, checkpoint_every=100, model_retrain_every=12, model_max_epochs=2,
    model_epoch_steps=4, model_patience=5, holdout_size=20, model_batch_size=8, model_hidden=16,
    ensemble_size=3, num_elites=2, rollout_every=5, rollout_rows=60, buffer_size=200, horizon=3,
    real_decay_every=2, batch_size=16, hidden=(16, 16), noise_dim=2, miw_steps=6, miw_refresh=2,
    miw_lr=1e-3, miw_batch_size=8, miw_initial_batch_size=8, num_initial_states=20,
    eval_candidates=3, threads=1, cuda=False, cpu_fast_matmul=False,
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


@pytest.fixture
def short(monkeypatch):
    """Episodes of 15 steps."""
    monkeypatch.setitem(ampl.MAZE_LIMITS, "umaze", 15)
    ampl.env_slots.cache_clear()
    yield
    ampl.env_slots.cache_clear()


@pytest.fixture
def tiny(tmp_path, dataset, short, monkeypatch):
    """tiny(**changes) trains and returns the run folder. No pictures: they take most of the time"""
    count = iter(range(1000))
    monkeypatch.setattr(ampl, "plot_curves", lambda run: None)
    monkeypatch.setattr(ampl, "save_weight", lambda run, weight: None)

    def train(**changes):
        place = tmp_path / f"runs{next(count)}"
        args = ampl.Args(**(TINY | dict(dataset_path=dataset, run_dir=str(place)) | changes))
        ampl.train(args)
        return folder_in(args.run_dir)

    return train


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset):
    """The folder of a run that came to its end, with two learners."""
    limits, ampl.MAZE_LIMITS["umaze"] = ampl.MAZE_LIMITS["umaze"], 15
    ampl.env_slots.cache_clear()
    place = str(tmp_path_factory.mktemp("finished"))
    ampl.train(ampl.Args(**TINY | dict(dataset_path=dataset, run_dir=place, num_seeds=2)))
    ampl.MAZE_LIMITS["umaze"] = limits
    ampl.env_slots.cache_clear()
    return folder_in(place)


def folder_in(place):
    (folder,) = Path(place).iterdir()
    return folder


def resume(folder):
    ampl.train(dataclasses.replace(ampl.load_args(folder), resume=str(folder), eval_workers=0))
    return folder


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(a, b, path="checkpoint"):
    """Bit for bit, all but the times."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a.keys() - {"seconds", "log_bytes"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def log_rows(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows]


def final_scores(folder):
    return json.loads((folder / "result.json").read_text())["final_scores"]


def assert_same_run(a, b):
    assert_same(checkpoint(a), checkpoint(b))
    assert log_rows(a) == log_rows(b)
    assert final_scores(a) == final_scores(b)
    policies = [torch.load(f / "policy.pt", weights_only=True) for f in (a, b)]
    assert_same(*policies, "policy")


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


# --- a run reaches everything ---

KEYS = {
    "training": {
        "losses/critic_loss", "losses/q_values", "losses/actor_loss", "losses/generator_loss",
        "losses/discriminator_loss", "rollout/terminated_frac", "charts/SPS",
    },
    "model fit": {"model/train_nll", "model/holdout_loss"},
    "omega": {"losses/weight_loss", "weights/batch_mean"},
    "weights": {"weights/max", "weights/effective_sample_share"},
    "evaluation": {
        "eval/iteration", "eval/episodic_return", "eval/normalized_score_mean",
        "eval/normalized_score_std",
    },
}  # fmt: skip


def test_every_parameter_moved(finished):
    """Two fits, MIW training, rollouts, all updates and all targets act on every tensor."""
    args = ampl.load_args(finished)
    assert args.total_iterations > args.model_retrain_every and args.num_seeds == 2
    before = ampl.AMPL(args, 4, 2, torch.device("cpu")).state_dict()
    after = checkpoint(finished)["agent"]
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        if name == "buffer":
            assert new.shape == (2, 200, 12) and (new.std((1, 2)) > 0).all()
        elif old.shape[:1] == (2,):
            assert not torch.isclose(old[0], new[0], rtol=0, atol=0).all(), name
            assert not torch.isclose(old[1], new[1], rtol=0, atol=0).all(), name
        else:
            assert not torch.equal(old, new), name
    for name, optimizer in checkpoint(finished)["optimizers"].items():
        for state in optimizer["state"].values():
            assert state["step"] > 0 and state["exp_avg_sq"].abs().sum() > 0, name


def test_run_folder_is_complete(finished):
    """design.md section 7: script, arguments, events, log, checkpoint, picture, result, no rest."""
    names = {p.name for p in finished.iterdir()}
    events = {n for n in names if n.startswith("events.out.tfevents")}
    files = {"ampl.py", "args.json", "log.jsonl", "checkpoint.pt", "policy.pt", "model.pt"}
    files |= {"curves.png", "result.json", "miw.npz", "miw.png"}
    assert names == events | files and len(events) == 1
    assert (finished / "ampl.py").read_text() == SOURCE
    args = json.loads((finished / "args.json").read_text())
    assert args.keys() == {f.name for f in dataclasses.fields(ampl.Args)}
    assert re.fullmatch(rf"{ENV}__ampl__0__\d{{8}}-\d{{6}}", finished.name)
    png = (finished / "curves.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    import matplotlib.image

    image = matplotlib.image.imread(finished / "curves.png")[..., :3]
    assert image.shape[0] > 300 and len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_result(finished, dataset):
    result = json.loads((finished / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["algo"] == "ampl" and result["env_id"] == ENV and result["normalized"] is True
    assert result["dataset"] == dataset and re.fullmatch("[0-9a-f]{64}", result["dataset_sha256"])
    assert result["seeds"] == [0, 1] and result["total_steps"] == 24
    assert [len(s) for s in result["final_scores"]] == [3, 3]
    assert np.allclose(result["final_mean"], np.mean(result["final_scores"], 1))
    evaluations = np.array(result["evaluations"])  # iteration, then a score per learner
    assert evaluations[:, 0].tolist() == [8, 16, 24] and evaluations.shape == (3, 3)
    assert result["last"] == evaluations[-1, 1:].tolist()
    assert np.allclose(result["mean_last_ten"], evaluations[:, 1:].mean(0))
    assert set(result["seconds"]) == {"model", "miw", "rollout", "iterations", "evaluation"}
    assert all(s > 0 for s in result["seconds"].values()) and result["steps_per_second"] > 0
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["versions"]) == {"python", "torch", "numpy", "gymnasium", "mujoco"}
    assert result["device"] == "cpu" and result["threads"] == 1 and "git" in result
    assert result["cpu_matmul"] == "default" and result["args"]["initial_states"] == "simulator"


def test_log(finished):
    """The keys of every phase, a finite value per learner, and TensorBoard has the same."""
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    seen = {}
    for row in rows:
        phase = re.sub(r" \d+$", "", row["phase"])
        values = {k: v for k, v in row.items() if k not in ("iteration", "phase")}
        seen.setdefault(phase, []).append(row["iteration"])
        assert values.keys() == KEYS[phase]
        for key, value in values.items():
            per_learner = 1 if key in ("charts/SPS", "eval/iteration") else 2
            assert len(value) == per_learner and np.isfinite(value).all()
    assert seen == {
        "training": [4, 8, 12, 16, 20, 24], "model fit": [0, 0, 12, 12],
        "omega": [12, 12, 12], "weights": [12], "evaluation": [8, 16, 24],
    }  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    tags = {re.sub(r"/seed_\d+$", "", tag) for tag in events.Tags()["scalars"]}
    assert tags == set().union(*KEYS.values())
    second = [e.value for e in events.Scalars("losses/critic_loss/seed_1")]
    logged = [r["losses/critic_loss"][1] for r in rows if r["phase"] == "training"]
    assert np.allclose(second, logged)


# --- seeds ---


def test_seeds(tiny, monkeypatch):
    """The same seed gives the same run, at any number of evaluations; another seed another one."""
    first, again = tiny(), tiny()
    assert_same_run(first, again)
    other, base = checkpoint(tiny(seed=1))["agent"], checkpoint(first)["agent"]
    same = [k for k, v in base.items() if torch.equal(v, other[k])]
    assert {k for k in same if base[k].dim() > 1} == {"real_rows"}  # not drawn
    rarely = checkpoint(tiny(eval_every=24, log_every=7))
    assert_same(rarely["agent"], base)
    before = torch.get_num_threads()
    try:
        threaded = tiny(threads=2)
    finally:
        torch.set_num_threads(before)
    assert checkpoint(threaded)["threads"] == 2
    for name, value in checkpoint(threaded)["agent"].items():
        assert torch.allclose(value.double(), base[name].double(), atol=1e-4), name


def test_weights_are_saved(finished):
    """miw.npz holds the log of weights of mean one; miw.png is a picture of them."""
    with np.load(finished / "miw.npz") as saved:
        assert saved.files == ["12"] and saved["12"].shape == (2, 285)
        assert np.exp(saved["12"]).mean(1) == pytest.approx(1, abs=1e-5)
    image = Image.open(finished / "miw.png")
    assert image.size == (720, 480) and len(np.unique(np.array(image))) > 10


# --- learners do not touch each other ---


class Disturbed(ampl.AMPL):
    """Learner 1 starts from other weights, everywhere."""

    epochs = 4

    def __init__(self, *args):
        super().__init__(*args)
        with torch.no_grad():
            for p in self.parameters():
                p[1] += 0.3 * torch.randn(p[1].shape, generator=torch.Generator().manual_seed(5))


class Plain(ampl.AMPL):
    epochs = 1


def fake_holdout(agent, inputs, targets, weight, rows):
    """Learner 0 gains in two epochs, learner 1 in `agent.epochs`; at the end the true loss."""
    step = next(iter(agent.optimizers["model"].state.values()))["step"].item() % 1e6
    if step == 0:  # restored: the elites are chosen now
        return ampl_holdout(agent, inputs, targets, weight, rows)
    epoch = step / TINY["model_epoch_steps"]
    gains = torch.tensor([[min(epoch, 2)], [min(epoch, agent.epochs)]])
    return 1 / gains * (1 + torch.arange(1.0, 4.0) / 10)


ampl_holdout = ampl.holdout_loss


def test_learners_are_isolated_through_a_whole_run(tiny, monkeypatch):
    """Learner 0 is the same whatever learner 1 weighs and whenever its model fits stop."""
    monkeypatch.setattr(ampl, "holdout_loss", fake_holdout)
    runs = []
    for kind in (Plain, Disturbed):
        monkeypatch.setattr(ampl, "AMPL", kind)
        runs.append(tiny(num_seeds=2, model_patience=1, model_max_epochs=6))
    fits = [sum(r["phase"] == "model fit 0" for r in log_rows(f)) for f in runs]
    assert fits == [3, 5]  # epochs until both learners had stopped
    one, two = (checkpoint(f) for f in runs)
    differ = 0
    for name, a in one["agent"].items():
        b = two["agent"][name]
        if a.shape[:1] == (2,):
            assert torch.equal(a[0], b[0]), name
            differ += not torch.equal(a[1], b[1])
        else:
            assert torch.equal(a, b), name
    assert differ > 40
    for name, optimizer in one["optimizers"].items():
        for i, state in optimizer["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                other = two["optimizers"][name]["state"][i][key]
                assert torch.equal(state[key][0], other[0]), (name, i)
    assert final_scores(runs[0])[0] == final_scores(runs[1])[0]


# --- resume ---


class Killed(BaseException):
    """What SIGKILL would do at this point of the program, in this process."""


def killed_at(tiny, monkeypatch, row, **changes):
    """A run that dies before it writes log row `row`. -> its folder and checkpoint (or None)."""
    log, count = ampl.Run.log, iter(range(10_000))

    def dying(self, *args):
        if next(count) == row:
            raise Killed
        log(self, *args)

    place = changes["run_dir"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ampl.Run, "log", dying)
        tiny(**changes)
    folder = folder_in(place)
    return folder, checkpoint(folder) if (folder / "checkpoint.pt").exists() else None


def test_resume_is_exact_wherever_the_run_was_cut(tiny, tmp_path, monkeypatch):
    """k + k = 2k, in the main loop, the first fit, MIW training and the weighted re-fit."""
    changes = dict(num_seeds=2, model_patience=1, model_max_epochs=6, checkpoint_every=2)
    changes |= dict(log_every=1)  # so that no iteration lies between a fit and the cut after it
    monkeypatch.setattr(ampl, "holdout_loss", fake_holdout)
    monkeypatch.setattr(ampl, "AMPL", Disturbed)
    whole = tiny(**changes)
    rows, seen = log_rows(whole), set()
    first, last = {}, {}
    for i, row in enumerate(rows):
        first.setdefault(row["phase"], i)
        last[row["phase"]] = i
    cuts = {first[phase] + 1 for phase in first}
    cuts |= {last[phase] + 1 for phase in ("model fit 0", "omega 1", "model fit 1")}
    cuts |= {len(rows) - 1}
    for row in sorted(cuts):
        place = str(tmp_path / f"cut{row}")
        folder, saved = killed_at(tiny, monkeypatch, row, run_dir=place, **changes)
        assert len(log_rows(folder)) == row and 0 < saved["iteration"] + len(saved["progress"])
        fit = saved["progress"].get("fit")
        if fit:
            seen.add(f"fit {int(saved['iteration'] > 0)}{' frozen' * bool(fit['frozen'])}")
        elif saved["progress"].get("miw_step"):
            seen.add("miw")
        else:
            seen.add(("main", "end")[saved["iteration"] == 24])
        assert_same_run(resume(folder), whole)
    assert seen >= {"fit 0", "fit 1", "fit 1 frozen", "miw", "main"}


def test_resume_after_the_end_and_after_a_second_cut(tiny, tmp_path, monkeypatch):
    """A complete run scores its policy again, with the same result; two cuts are as good as one."""
    whole = tiny(checkpoint_every=3)
    (whole / "result.json").rename(tmp_path / "result.json")
    before = checkpoint(whole)
    resume(whole)
    assert_same(checkpoint(whole), before)
    old, new = (json.loads((p / "result.json").read_text()) for p in (tmp_path, whole))
    times = {"seconds", "steps_per_second"}
    assert {k: old[k] for k in old.keys() - times} == {k: new[k] for k in new.keys() - times}

    place = str(tmp_path / "twice")
    folder, _ = killed_at(tiny, monkeypatch, 5, run_dir=place, checkpoint_every=3)
    log, count = ampl.Run.log, iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            ampl.Run,
            "log",
            lambda *a: next(count) == 4 and (_ for _ in ()).throw(Killed) or log(*a),
        )
        resume(folder)
    assert_same_run(resume(folder), whole)


def test_a_finished_run_goes_on(tiny, monkeypatch):
    """--resume with a larger --total-iterations: the same as if it had been asked for at once."""
    whole, folder = tiny(), tiny(total_iterations=16)
    argv = ["--resume", str(folder), "--total-iterations"]
    with pytest.raises(ampl.UserError, match="takes all flags from the run"):
        ampl.resumed_args([*argv, "15"])
    assert ampl.resumed_args([*argv, "1000000"]).total_iterations == 1_000_000  # the default, too
    ampl.train(ampl.resumed_args([*argv, "24"]))
    assert_same_run(folder, whole)
    assert ampl.load_args(folder).total_iterations == 24


def test_plain_miw_steps_resume(tiny, tmp_path, monkeypatch):
    """The same without cached Q, where the slow critic moves in every step."""
    changes = dict(miw_refresh=1, miw_steps=1100, hidden=(4, 4), checkpoint_every=500)
    whole = tiny(**changes)
    row = [r["phase"] for r in log_rows(whole)].index("omega 1") + 1
    place = str(tmp_path / "cut")
    folder, saved = killed_at(tiny, monkeypatch, row, run_dir=place, **changes)
    assert saved["progress"]["miw_step"] == 1000
    assert_same_run(resume(folder), whole)


def test_a_longer_log_than_at_the_checkpoint_is_cut_a_shorter_one_not_filled(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = (folder / "log.jsonl").read_bytes()
    for log in (whole + b'{"half": ', whole[:100], b""):
        (folder / "log.jsonl").write_bytes(log)
        resume(folder)
        assert (folder / "log.jsonl").read_bytes() == whole[: len(log)]


def in_child(job):
    """Run job() in a fork of this process. -> its wait status"""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            job()
            os._exit(0)
        except ampl.UserError as error:
            os.write(1, str(error).encode())
            os._exit(2)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("victim", ["fsync", "replace", "half a file", "timer"])
def test_sigkill_at_any_moment(victim, tiny, tmp_path, monkeypatch):
    """Killed while a checkpoint is written, before or after the renaming, or at some other time."""
    changes = dict(checkpoint_every=3)
    whole = tiny(**changes)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def nth(function, n, before):
        count = iter(range(10_000))

        def wrapped(*args, **kwargs):
            last = next(count) == n
            if last and before:
                before(*args)
            result = function(*args, **kwargs)
            if last:
                die()
            return result

        return wrapped

    def half(content, file):
        file.write(b"PK half of a checkpoint")
        file.flush()
        die()

    for n in range(4):
        place = tmp_path / f"{victim}{n}"

        def job(n=n, place=place):
            if victim == "fsync":
                os.fsync = nth(os.fsync, 2 + 2 * n, lambda *_: die())
            elif victim == "replace":  # odd: dies between checkpoint.pt and policy.pt
                os.replace = nth(os.replace, 3 + n, None)
            elif victim == "half a file":
                torch.save = nth(torch.save, 1 + 2 * n, half)
            else:
                signal.signal(signal.SIGALRM, lambda *_: die())
                signal.setitimer(signal.ITIMER_REAL, 0.05 + 0.1 * n)
            tiny(run_dir=str(place), **changes)

        status = in_child(job)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or n > 0
        if not place.exists():
            continue
        folder = folder_in(place)
        if (folder / "checkpoint.pt").exists():
            assert_same_run(resume(folder), whole)
        else:
            with pytest.raises(ampl.UserError, match="no checkpoint yet|not a run folder"):
                resume(folder)


def flags(**changes):
    """Args fields as a command line."""
    argv = []
    for key, value in changes.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return argv


def start(*argv):
    command = [sys.executable, "-W", "error", str(ROOT / "ampl.py"), *argv]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **pipes, cwd="/")


def children(pid):
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def test_ctrl_c_and_sigkill_from_outside(tmp_path, dataset, monkeypatch, request):
    """As a user sees it, with -W error: Ctrl-C saves and says how to go on; after it, and after a
    SIGKILL, the run ends as one that nobody stopped, whoever evaluates; no worker is left behind.
    """
    changes = TINY | dict(total_iterations=200, dataset_path=dataset, checkpoint_every=40)
    changes |= dict(eval_every=20, eval_episodes=1, final_episodes=1)
    monkeypatch.setattr(ampl, "plot_curves", lambda run: None)
    # One after the other: on one core a run could end before its first lines are read.
    ampl.train(ampl.Args(**changes | dict(run_dir=str(tmp_path / "whole"))))
    whole = folder_in(tmp_path / "whole")
    interrupted = start(*flags(**changes, run_dir=tmp_path / "int"))
    request.addfinalizer(interrupted.kill)
    lines = iter(interrupted.stdout.readline, "")
    assert any("score" in line for line in lines if line.startswith("iteration"))
    interrupted.send_signal(signal.SIGINT)
    out, err = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, err
    folder = folder_in(tmp_path / "int")
    assert f"saved; to continue: python ampl.py --resume {folder}" in out
    assert "Ctrl-C: saving" in err and "Traceback" not in err and "Warning" not in err
    assert checkpoint(folder)["iteration"] < 200
    assert_same_run(resume(folder), whole)

    killed = start(*flags(**changes, eval_workers=1, run_dir=tmp_path / "kill"))
    request.addfinalizer(killed.kill)
    lines = iter(killed.stdout.readline, "")
    assert any("score" in line for line in lines if line.startswith("iteration"))
    workers = [c for c in children(killed.pid) if Path(f"/proc/{c}").exists()]
    killed.kill()
    killed.wait()
    for _ in range(100):
        left = [c for c in workers if is_running(c)]
        if not left:
            break
        time.sleep(0.1)
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert workers and not left
    err = killed.stderr.read()
    assert "Traceback" not in err and "Warning" not in err
    folder = folder_in(tmp_path / "kill")
    assert checkpoint(folder)["iteration"] < 200
    resume(folder)
    assert_same(checkpoint(folder), checkpoint(whole))
    assert final_scores(folder) == final_scores(whole)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_evaluation_in_a_worker_scores_the_same(tmp_path, dataset):
    """All evaluations of two learners, though the training goes on meanwhile."""
    changes = TINY | dict(dataset_path=dataset, num_seeds=2, eval_every=5)
    runs = []
    for workers in (0, 1):
        place = str(tmp_path / str(workers))
        ampl.train(ampl.Args(**changes | dict(run_dir=place, eval_workers=workers)))
        runs.append(folder_in(place))
    one, two = map(checkpoint, runs)
    assert len(one["curves"]) == 5 and len(one["curves"][0]["returns"]) == 2
    assert_same(one, two)
    assert final_scores(runs[0]) == final_scores(runs[1])


def test_a_second_ctrl_c_stops_without_saving(tiny, monkeypatch, capfd):
    """And the first one saves at the next safe point of a model fit, not at the end of it."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ampl, "judge_epoch", interrupting(ampl.judge_epoch, times=1))
        tiny(model_max_epochs=50)
    assert stop.value.code == 130
    out, err = capfd.readouterr()
    folder = Path(re.search(r"--resume (.*)\n", out)[1])
    assert checkpoint(folder)["progress"]["fit"]["epoch"] == 1 and "again: stop" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ampl, "judge_epoch", interrupting(ampl.judge_epoch, times=2))
        tiny()


def interrupting(function, times):
    def wrapped(*args):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return function(*args)

    return wrapped


# --- failures while saving; losses that are not finite ---


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def broken_save(content, file):
    file.write(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.parametrize("where, failure", [("fsync", full_disk), ("save", broken_save)])
def test_a_full_disk_leaves_the_old_checkpoint(where, failure, tiny, tmp_path, monkeypatch):
    module, count = (os if where == "fsync" else torch), iter(range(1000))
    function = getattr(module, where)

    def failing(*args):
        return (failure if next(count) >= 5 else function)(*args)

    place, kept = tmp_path / "run", []
    save = ampl.Run.save_checkpoint

    def noted(self):
        save(self)
        kept.append(checkpoint(self.dir))

    with monkeypatch.context() as patch:
        patch.setattr(module, where, failing)
        patch.setattr(ampl.Run, "save_checkpoint", noted)
        with pytest.raises(ampl.UserError, match="cannot write .*unharmed") as caught:
            tiny(run_dir=str(place), checkpoint_every=3)
    assert "\n" not in " ".join(str(caught.value).split())
    folder = folder_in(place)
    assert kept and not list(folder.glob("*.part"))
    assert_same(checkpoint(folder), kept[-1])
    assert_same_run(resume(folder), tiny(checkpoint_every=3))


def test_a_disk_that_is_really_full(tiny, tmp_path, capfd):
    """The kernel refuses to let a file grow beyond the script's size, in the midst of torch.save"""

    def job():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(SOURCE) + 999, resource.RLIM_INFINITY))
        tiny(run_dir=str(tmp_path / "run"), checkpoint_every=3, model_hidden=150)

    assert os.WEXITSTATUS(in_child(job)) == 2
    assert re.search(r"cannot write .*/checkpoint.pt .*unharmed", capfd.readouterr().out)
    assert not list((tmp_path / "run").glob("*/*.part"))


def test_a_full_disk_under_the_log(tiny, monkeypatch):
    """A log line that cannot be written is a sentence, too."""
    opened = ampl.Run.open

    def to_full_device(self, *args):
        opened(self, *args)
        self.log_file.close()
        self.log_file = open("/dev/full", "wb")

    monkeypatch.setattr(ampl.Run, "open", to_full_device)
    with pytest.raises(ampl.UserError, match="cannot write .*No space left"):
        tiny()


def poisoned(function, call, value):
    """`function`, whose result turns to `value` from its call number `call` on."""
    count = iter(range(100_000))

    def wrapped(*args):
        result = function(*args)
        return result * value if next(count) >= call else result

    return wrapped


@pytest.mark.parametrize(
    "function, call, value, name",
    [
        ("critic_loss", 10, np.nan, "losses/critic_loss"),
        ("discriminator_loss", 10, np.inf, "losses/discriminator_loss"),
        ("generator_loss", 10, np.nan, "losses/(actor|generator)_loss"),
        ("policy_loss", 6, np.nan, "losses/actor_loss"),
        ("model_loss", 6, np.nan, "model/(train_nll|holdout_loss)"),
        ("miw_loss", 3, np.nan, "losses/weight_loss"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    function, call, value, name, tmp_path, dataset, short, monkeypatch, capsys
):
    """By name, with status 2; the last checkpoint is still there, loads and is finite."""
    monkeypatch.setattr(ampl, "plot_curves", lambda run: None)
    changes = TINY | dict(dataset_path=dataset, run_dir=tmp_path / "run", checkpoint_every=1)
    monkeypatch.setattr(ampl, function, poisoned(getattr(ampl, function), call, value))
    monkeypatch.setattr(sys, "argv", ["ampl.py", *flags(**changes)])
    with pytest.raises(SystemExit) as stop:
        ampl.main()
    assert stop.value.code == 2
    last = capsys.readouterr().err.rstrip("\n").rsplit("\n", 1)[-1]
    assert re.match(rf"ampl.py: {name} is not finite .* last good checkpoint is kept in", last)
    folder = folder_in(tmp_path / "run")
    saved = checkpoint(folder)
    assert all(v.isfinite().all() for v in saved["agent"].values())
    assert "NaN" not in (folder / "log.jsonl").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(ampl, "plot_curves", lambda run: None)
    resume(folder)
    assert checkpoint(folder)["iteration"] == 24


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch):
    """Even if all losses of the last iteration were finite."""
    apply, count = ampl.apply_gradients, iter(range(1000))

    def spoil(optimizer, parameters, grads):
        apply(optimizer, parameters, grads)
        if next(count) == 30:
            parameters[0].data[0, 0] = np.inf

    monkeypatch.setattr(ampl, "apply_gradients", spoil)
    place = tmp_path / "run"
    with pytest.raises(ampl.UserError, match="is not finite at iteration"):
        tiny(run_dir=str(place), checkpoint_every=1, log_every=1000, eval_every=1000)
    saved = checkpoint(folder_in(place))
    assert saved["iteration"] > 3 and all(v.isfinite().all() for v in saved["agent"].values())


# --- the model of another run ---


def test_dynamics_from(tiny, tmp_path, monkeypatch):
    """A run with the first run's model goes on as that one did, bit for bit."""
    first = tiny()
    monkeypatch.setattr(ampl, "capture", only_refits(ampl.capture))
    second = tiny(dynamics_from=str(first))
    assert_same({**checkpoint(second)}, {**checkpoint(first)})
    assert log_rows(second) == [r for r in log_rows(first) if r["phase"] != "model fit 0"]
    assert final_scores(second) == final_scores(first)


def test_dynamics_from_a_run_of_more_learners(tiny):
    """One learner takes the first of two, weights and moments."""
    two = tiny(num_seeds=2, total_iterations=1, warmup_iterations=1)
    one = tiny(total_iterations=1, warmup_iterations=1, dynamics_from=str(two))
    first, alone = checkpoint(two), checkpoint(one)
    for name, tensor in alone["agent"].items():
        if name.startswith(("model.trunk", "model.heads", "elites.trunk", "elites.heads")):
            assert torch.equal(tensor, first["agent"][name][:1]), name
    moments = [c["optimizers"]["model"]["state"].values() for c in (alone, first)]
    for mine, theirs in zip(*moments, strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"][:1]) and mine["exp_avg"].any()


def only_refits(capture):
    """There must be no model step before the first iteration."""

    def wrapped(step, agent, args):
        if "fit_model" in getattr(step, "__qualname__", ""):
            assert agent.buffer_rows > 0
        return capture(step, agent, args)

    return wrapped


def test_dynamics_from_a_wrong_place(tiny, finished, tmp_path, dataset):
    """Another dataset, another size, no folder, a damaged file: a sentence, and no new folder."""
    other, damaged = tmp_path / "other.hdf5", tmp_path / "damaged"
    shutil.copy(dataset, other)
    with h5py.File(other, "a") as file:
        file["rewards"][3] = 0.5
    damaged.mkdir()
    (damaged / "model.pt").write_bytes((finished / "model.pt").read_bytes()[:999])
    base = dict(dynamics_from=str(finished), num_seeds=2, run_dir=str(tmp_path / "run"))
    for changes, words in [
        (dict(dataset_path=str(other)), "another dataset"),
        (dict(model_hidden=17), "does not fit"),
        (dict(num_seeds=3), "holds 2 models"),
        (dict(ensemble_size=4), "does not fit"),
        (dict(dynamics_from=str(tmp_path)), "does not exist"),
        (dict(dynamics_from=str(damaged)), "damaged"),
    ]:
        with pytest.raises(ampl.UserError, match=words):
            tiny(**base | changes)
        assert not (tmp_path / "run").exists()


# --- policies and pictures ---


def test_a_saved_policy_acts_as_in_the_run(finished, short, monkeypatch, capsys):
    """--evaluate and README's snippet: the saved learner gets the scores that the run gave it."""
    args = ampl.load_args(finished)
    policy = ampl.load_policy(finished, learner=1)
    returns = ampl.evaluate(policy, args, 1, -1, args.final_episodes)
    assert ampl.d4rl_score(ENV, returns).tolist() == final_scores(finished)[1]
    assert policy.act(np.zeros((5, 4))).shape == (5, 2)
    before = contents(finished)
    argv = ["ampl.py", "--evaluate", str(finished), "--final-episodes", "4"]
    monkeypatch.setattr(sys, "argv", argv)
    ampl.main()
    out = capsys.readouterr().out
    assert re.search(r"seed 0: normalized score .* over 4 episodes", out)
    assert re.search(r"seed 1: normalized score .* over 4 episodes", out)
    assert contents(finished) == before


needs_opengl = pytest.mark.skipif(
    sys.platform == "linux" and ctypes.util.find_library("EGL") is None, reason="no OpenGL"
)


@needs_opengl
def test_capture_video(finished, short, tmp_path, monkeypatch):
    """A moving picture of an episode, without a screen; a failure leaves the old one alone."""
    from PIL import Image

    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.setitem(ampl.MAZE_LIMITS, "umaze", 6)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    argv = ["--evaluate", str(folder), "--capture-video", "--final-episodes", "1"]
    monkeypatch.setattr(sys, "argv", ["ampl.py", *argv])
    ampl.main()
    with Image.open(folder / "episode.gif") as film:
        assert film.n_frames >= 3 and film.size == (240, 240)
        assert len(np.unique(np.asarray(film.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    before = contents(folder)
    monkeypatch.setattr(ampl.Maze2dEnv, "render", lambda self: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        ampl.main()
    assert stop.value.code == 2 and contents(folder) == before


@pytest.mark.skipif(ctypes.util.find_library("OSMesa") is not None, reason="OSMesa is installed")
def test_a_missing_opengl_is_a_sentence():
    """mujoco itself dies at import with an AttributeError of PyOpenGL."""
    command = [sys.executable, str(ROOT / "ampl.py"), "--capture-video"]
    environment = os.environ | {"MUJOCO_GL": "osmesa"}
    environment.pop("PYOPENGL_PLATFORM", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("MUJOCO_GL=osmesa cannot be loaded here")


# --- mistakes on the command line ---

BAD = [
    ("--env-id pen-humam-v1", ["did you mean", "pen-human-v1"]),
    ("--env-id Hoper-v4", ["did you mean", "Hopper-v4"]),
    ("--env-id Hopper-v4", ["--dataset-path"]),
    ("--env-id kitchen-complete-v0", ["no simulator here"]),
    ("--dataset-path nowhere.hdf5", ["nowhere.hdf5", "no such file"]),
    ("--dataset-path {text}", ["truncated or not D4RL's HDF5"]),
    ("--num-seeds 0", ["--num-seeds is 0", "at least 1"]),
    ("--total-iterations -5", ["--total-iterations is -5"]),
    ("--batch-size 0", ["--batch-size is 0"]),
    ("--batch-size 301", ["--batch-size 301 exceeds the", "data rows"]),
    ("--warmup-iterations 25", ["warm start (25", "longer than the run (24"]),
    ("--warmup-iterations -1", ["--warmup-iterations is -1", "at least 0"]),
    ("--threads -1", ["--threads is -1"]),
    ("--eval-workers -1", ["--eval-workers is -1"]),
    ("--horizon 0", ["--horizon is 0"]),
    ("--rollout-rows -7", ["--rollout-rows is -7"]),
    ("--hidden 0 0", ["--hidden is 0", "positive"]),
    ("--hidden 16 -1", ["--hidden is -1"]),
    ("--model-hidden 0", ["--model-hidden is 0"]),
    ("--miw-refresh 0", ["--miw-refresh is 0"]),
    ("--checkpoint-every 0", ["--checkpoint-every is 0"]),
    ("--eval-episodes 0", ["--eval-episodes is 0"]),
    ("--final-episodes 0", ["--final-episodes is 0"]),
    ("--noise-dim 0", ["--noise-dim is 0"]),
    ("--actor-lr 0", ["--actor-lr is 0.0", "positive"]),
    ("--model-lr -1e-3", ["--model-lr is -0.001"]),
    ("--critic-lr nan", ["--critic-lr is nan", "finite"]),
    ("--miw-lr inf", ["--miw-lr is inf", "finite"]),
    ("--model-weight-decay 0 0 0 0 -1", ["--model-weight-decay is -1.0"]),
    ("--gamma 1", ["--gamma", "below 1"]),
    ("--gamma nan", ["--gamma is nan"]),
    ("--gamma -0.1", ["--gamma is -0.1"]),
    ("--gan-beta1 1", ["--gan-beta1", "below 1"]),
    ("--tau 0", ["--tau is 0.0"]),
    ("--tau 1.5", ["--tau is 1.5", "at most 1"]),
    ("--miw-tau 2", ["--miw-tau is 2.0", "at most 1"]),
    ("--real-fraction 0", ["--real-fraction is 0.0"]),
    ("--real-fraction 1.2", ["--real-fraction is 1.2"]),
    ("--label-smoothing 1.1", ["--label-smoothing is 1.1"]),
    ("--q-min-weight 1.1", ["--q-min-weight is 1.1"]),
    ("--noise-std -1", ["--noise-std is -1.0"]),
    ("--critic-grad-norm 0", ["--critic-grad-norm is 0.0"]),
    ("--num-elites 4", ["--num-elites is larger than --ensemble-size"]),
    ("--buffer-size 59", ["--buffer-size", "--rollout-rows"]),
    ("--run-dir {text}/runs", ["cannot make the run folder", "{text}"]),
    ("--dynamics-from nowhere", ["nowhere", "does not exist"]),
    ("--track", ["pip install wandb"]),
    ("--resume nowhere", ["nowhere is not a run folder"]),
    ("--resume {empty}", ["is not a run folder"]),
    ("--resume {fresh}", ["holds no checkpoint yet"]),
    ("--resume {cut}", ["checkpoint.pt is damaged"]),
    ("--resume {none}", ["checkpoint.pt is damaged"]),
    ("--resume {zeros}", ["checkpoint.pt is damaged"]),
    ("--resume {pickled}", ["checkpoint.pt is damaged"]),
    ("--resume {swapped}", ["checkpoint.pt is damaged or does not fit"]),
    ("--resume {resized}", ["does not fit"]),
    ("--resume {moved}", ["another dataset"]),
    ("--resume {foreign}", ["is not a run folder of this script"]),
    ("--resume {listed}", ["is not a run folder of this script"]),
    ("--resume {run} --evaluate {run}", ["--resume", "--evaluate", "one"]),
    ("--resume {run} --gamma 0.9", ["all flags from the run", "--gamma is not 0.9"]),
    ("--resume {run} --env-id pen-human-v1", ["all flags from the run", "--env-id"]),
    ("--evaluate nowhere", ["nowhere is not a run folder"]),
    ("--evaluate {fresh}", ["policy.pt does not exist"]),
    ("--evaluate {cut}", ["policy.pt is damaged"]),
    ("--evaluate {pickled}", ["policy.pt is damaged"]),
    ("--evaluate {swapped}", ["policy.pt is damaged or does not fit"]),
    ("--evaluate {resized}", ["policy.pt is damaged or does not fit"]),
    ("--evaluate {run} --final-episodes 0", ["--final-episodes is 0"]),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, finished, dataset):
    """Run folders with something wrong, and a file that is none."""
    root = tmp_path_factory.mktemp("places")
    names = "run fresh cut none zeros pickled swapped resized moved foreign listed".split()
    for name in names:
        shutil.copytree(finished, root / name)
    for file in ("checkpoint.pt", "policy.pt"):
        whole = (finished / file).read_bytes()
        (root / "fresh" / file).unlink()
        (root / "cut" / file).write_bytes(whole[: len(whole) // 2])
        (root / "none" / file).write_bytes(b"")
        (root / "zeros" / file).write_bytes(bytes(len(whole)))
        torch.save({"agent": Path("an object")}, root / "pickled" / file)
        shutil.copy(finished / "model.pt", root / "swapped" / file)
    args = json.loads((finished / "args.json").read_text())
    (root / "resized" / "args.json").write_text(json.dumps(args | {"hidden": [16, 17]}))
    other = root / "other.hdf5"
    shutil.copy(dataset, other)
    with h5py.File(other, "a") as file:
        file["rewards"][3] = 0.5
    (root / "moved" / "args.json").write_text(json.dumps(args | {"dataset_path": str(other)}))
    (root / "foreign" / "args.json").write_text('{"learning_rate": 1}')
    (root / "listed" / "args.json").write_text("[1, 2]")
    (root / "empty").mkdir()
    (root / "text").write_text("just a file")
    return root


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_bad_command_lines(line, words, places, dataset, tmp_path, monkeypatch, capsys):
    """One sentence on stderr, status 2, and nothing is made, changed or lost."""
    names = {p.name: str(p) for p in places.iterdir()}
    argv = line.format_map(names).split()
    if "--resume" not in argv and "--evaluate" not in argv:
        changes = TINY | dict(dataset_path=dataset, run_dir=tmp_path / "runs")
        given = {a.removeprefix("--").replace("-", "_") for a in argv if a.startswith("--")}
        if "--env-id" in argv and "Hopper-v4" in argv:
            given.add("dataset_path")
        argv = flags(**{k: v for k, v in changes.items() if k not in given}) + argv
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ampl.py", *argv])
    before, seen = contents(places), contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ampl.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("ampl.py: ") and error.count("\n") == 1 and error.endswith("\n")
    for word in words:
        assert word.format_map(names) in error
    assert contents(places) == before and contents(tmp_path) == seen


def test_the_flags_of_the_run_may_be_repeated_with_resume(finished, dataset, monkeypatch):
    """Arrow up, `--resume <run>`, return."""
    changes = TINY | dict(dataset_path=dataset, run_dir=finished.parent, num_seeds=2)
    argv = [*flags(**changes), "--resume", str(finished)]
    expected = dataclasses.replace(ampl.load_args(finished), resume=str(finished))
    assert ampl.resumed_args(argv) == expected
    assert ampl.resumed_args(["--resume", str(finished)]) == expected


def test_a_typo_keeps_tyros_message(capsys):
    with pytest.raises(SystemExit) as stop:
        ampl.parse_args(["--horizen", "3"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--horizen" in error and "--horizon" in error


def test_two_runs_do_not_share_a_folder(tiny, tmp_path, monkeypatch):
    """Even in the same second: the second one refuses."""
    monkeypatch.setattr(ampl.time, "strftime", lambda form: "now")
    folder = tiny(run_dir=str(tmp_path / "run"))
    before = contents(folder)
    with pytest.raises(ampl.UserError, match="cannot make the run folder"):
        tiny(run_dir=str(tmp_path / "run"))
    assert contents(folder) == before


# --- the settings ---


@pytest.mark.parametrize("env_id", ampl.PAPER)
def test_help_shows_the_papers_settings(env_id, capsys):
    with pytest.raises(SystemExit) as stop:
        ampl.parse_args(["--env-id", env_id, "--help"])
    assert stop.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    row = ampl.PAPER[env_id]
    assert row.keys() == {"horizon", "noise_dim", "miw_alpha", "noise_std"}
    for key, value in ({"env_id": env_id} | row).items():
        own = text.split(f" --{key.replace('_', '-')} ", 1)[1].split(" --no-", 1)[0]
        assert re.search(r"\(default: ([^)]*)\)", own)[1].replace("- ", "-") == str(value), key


def test_flags_beat_the_table():
    """Also where the flag repeats the class's own default, and before or after --env-id."""
    default = ampl.Args()
    row = ampl.PAPER["pen-cloned-v1"]
    assert row["noise_dim"] != default.noise_dim and row["horizon"] != default.horizon
    given = ["--noise-dim", str(default.noise_dim), "--horizon", str(default.horizon)]
    for argv in ([*given, "--env-id", "pen-cloned-v1"], ["--env-id", "pen-cloned-v1", *given]):
        args = ampl.parse_args(argv)
        assert (args.noise_dim, args.horizon) == (default.noise_dim, default.horizon)
        assert (args.miw_alpha, args.noise_std) == (row["miw_alpha"], row["noise_std"])
    assert ampl.parse_args(["--env-id", "antmaze-umaze-v0"]).horizon == default.horizon
    args = vars(ampl.parse_args(["--env-id", "walker2d-medium-v2"]))
    assert args == vars(default) | ampl.PAPER["walker2d-medium-v2"] | {
        "env_id": "walker2d-medium-v2"
    }


def test_help_without_a_warning():
    command = [sys.executable, "-W", "error", str(ROOT / "ampl.py"), "--env-id", "door-expert-v1"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"--noise-dim INT.*?\(default:[\s│]*10\)", done.stdout, re.DOTALL)


# --- the file itself ---


def functions():
    return [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_sizes():
    """Functions of 45 lines at most, train of 120, width 100."""
    sizes = {f.name: f.end_lineno - f.lineno + 1 for f in functions()}
    assert sizes.pop("train") <= 120
    assert {name: size for name, size in sizes.items() if size > 45} == {}
    lines = SOURCE.splitlines()
    assert [i + 1 for i, line in enumerate(lines) if len(line) > 100] == []


def test_every_setting_says_what_it_is_and_whence():
    """Help text on every field of Args; where a number was chosen, its source in brackets."""
    (body,) = (n.body for n in TREE.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    helped, plain = {}, set()
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{field.target.id} has no help"
            helped[field.target.id] = text.value.value
    assert set(helped) == {f.name for f in dataclasses.fields(ampl.Args)}
    source = re.compile(r"\(.*(paper|authors' code|authors' launch script|ours).*\)")
    plain = {k for k, text in helped.items() if not source.search(text)}
    evident = {
        "env_id", "seed", "run_dir", "resume", "evaluate", "dynamics_from", "track",
        "wandb_project_name", "wandb_entity", "log_every", "checkpoint_every", "capture_video",
        "dataset_path", "cuda", "cuda_graphs", "cpu_fast_matmul", "threads",
    }  # fmt: skip
    assert plain == evident
    assert all(len(text) > 12 for text in helped.values())


def test_equation_tags():
    """facts.md 9.1 has the equations 1 to 17; those of the method have a line."""
    tags = set()
    for tag in re.findall(r"# Eqs?\. (\(\d+\)(?:(?:,| to| and) \(\d+\))*)", SOURCE):
        numbers = [int(n) for n in re.findall(r"\d+", tag)]
        assert all(1 <= n <= 17 for n in numbers), tag
        tags |= set(numbers)
    assert tags >= {4, 6, *range(10, 18)}


def test_no_pickle():
    """torch.load says weights_only=True, np.load allow_pickle=False; pickle does not occur."""
    loads = [
        n for n in ast.walk(TREE)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "load"
    ]  # fmt: skip
    assert len(loads) >= 3
    for call in loads:
        flag = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
        given = {(k.arg, k.value.value) for k in call.keywords if isinstance(k.value, ast.Constant)}
        assert flag[ast.unparse(call.func)] in given
    assert imports() & {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"} == set()


def test_saved_files_hold_no_pickled_objects(finished):
    for name in ("checkpoint.pt", "policy.pt", "model.pt"):
        torch.load(finished / name, weights_only=True)


def imports():
    found = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_requirements():
    """The script's header, requirements.txt and the imports name the same packages."""
    header = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.MULTILINE | re.DOTALL)[1]
    header = tomllib.loads("".join(line[2:] for line in header.splitlines(True)))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    assert set(header["dependencies"]) == {r for r in required if not r.startswith("pytest")}
    assert any(r.startswith("pytest==") for r in required)
    names = {"PIL": "pillow", "wandb": None, "gymnasium_robotics": "gymnasium-robotics"}
    third = {names.get(m, m) for m in imports() - set(sys.stdlib_module_names)} - {None}
    listed = {re.split("[=<>~]", d)[0] for d in header["dependencies"]}
    # d4rl is read as a file; torch.utils.tensorboard imports tensorboard
    assert third | {"d4rl", "tensorboard"} == listed


# --- CUDA graphs ---


def stepped(device, graphs, steps):
    """State and logs of an agent after `steps` of every kind of step."""
    args = ampl.Args(**TINY | dict(cuda=True, cuda_graphs=graphs, num_seeds=2, noise_dim=2))
    device = torch.device(device)
    agent = ampl.AMPL(args, 4, 2, device)
    data = torch.rand(300, 12, generator=torch.Generator().manual_seed(0)).to(device)
    rule = ampl.TerminationRule(
        ampl.known_termination(ENV)[0], torch.full((4,), 2.0, device=device), data.new_tensor(9.0)
    )
    inputs, targets = data[:, :6].contiguous(), data[:, 6:11].contiguous()
    rows = torch.arange(300, device=device).expand(2, -1).contiguous()
    ones = torch.ones(2, 300, device=device)
    tables = ampl.QTables(*(torch.zeros(2, n, device=device) for n in (300, 300, 50)))
    ampl.fill_tables(agent, tables, data, data[:50, :4])
    jobs = {
        "imagine": lambda: ampl.imagine(agent, data, rule, args),
        "warmup": lambda: ampl.iterate(agent, data, rule, args, True, True),
        "actor": lambda: ampl.iterate(agent, data, rule, args, False, True),
        "critic": lambda: ampl.iterate(agent, data, rule, args, False, False),
        "model": lambda: ampl.model_step(agent, inputs, targets, ones, rows, args),
        "miw": lambda: ampl.miw_step(agent, data, data[:50, :4], None, args),
        "cached miw": lambda: ampl.miw_step(agent, data, data[:50, :4], tables, args),
    }
    jobs = {name: ampl.capture(job, agent, args) for name, job in jobs.items()}
    logs = {}
    for i in range(steps):
        if i % 10 == 0:
            ampl.seed_phase(0, "block", i)
            logs |= jobs["imagine"]()
        agent.real_rows.fill_(args.batch_size - i % 5)
        logs |= jobs["warmup" if i < 6 else ("actor", "critic")[i % 2]]()
        for name in ("model", "miw", "cached miw"):
            logs |= jobs[name]()
    return agent.state_dict() | {f"logs.{k}": v.clone() for k, v in logs.items()}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "device, steps, tolerance",
    [
        ("cpu", 20, 0),  # no graphs there; shows that this test itself is sound
        pytest.param("cuda", 20, 1e-5, marks=needs_gpu),
        pytest.param("cuda", 200, 1e-3, marks=needs_gpu),
    ],
)
def test_graphs_replay_what_plain_steps_compute(device, steps, tolerance):
    """Parameters, buffer and logs after iterations, model steps, MIW steps and rollouts."""
    first = ampl.AMPL(ampl.Args(**TINY | dict(num_seeds=2)), 4, 2, torch.device("cpu"))
    eager, replayed = stepped(device, False, steps), stepped(device, True, steps)
    assert eager.keys() == replayed.keys()
    for name, value in eager.items():
        difference = (value.double() - replayed[name].double()).abs().max().item()
        assert difference <= tolerance, (name, difference)
    moved = ("actor.", "critic.", "discriminator.", "omega.", "model.trunk", "critic_slow")
    for name, value in first.state_dict().items():
        if name.startswith(moved):
            assert not torch.equal(value, eager[name].cpu()), name


@needs_gpu
def test_a_whole_run_on_cuda_resumes(tiny, tmp_path, monkeypatch):
    """With graphs, cut inside the first fit, MIW training, the re-fit and the main loop."""
    changes = dict(cuda=True, checkpoint_every=2, num_seeds=2)
    whole = tiny(**changes)
    rows = [r["phase"] for r in log_rows(whole)]
    for phase in ("model fit 0", "omega 1", "model fit 1", "training"):
        place = str(tmp_path / phase)
        row = rows.index(phase) + 1
        folder, _ = killed_at(tiny, monkeypatch, row, run_dir=place, **changes)
        resume(folder)
        a, b = checkpoint(folder)["agent"], checkpoint(whole)["agent"]
        for name, value in a.items():
            assert torch.allclose(value.double(), b[name].double(), atol=1e-4), (phase, name)


def test_the_cpu_product_is_the_chosen_one_whatever_ran_before():
    """A run that refuses oneDNN gets the default, also after one in this process that used it."""
    ampl.set_cpu_matmul("oneDNN")
    assert ampl.choose_cpu_matmul(ampl.Args(cpu_fast_matmul=False)) == "default"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    chosen = ampl.choose_cpu_matmul(ampl.Args())
    on = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert on == (chosen == "oneDNN")
    ampl.set_cpu_matmul("default")
