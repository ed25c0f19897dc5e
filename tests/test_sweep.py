"""sweep.py: real tiny sets that are killed, fail and go on; reports worked out by hand."""

import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import sweep

ROOT = Path(sweep.__file__).parent
DATA = ROOT / "tests/data/maze2d-medium-v1-sample.hdf5"
TINY = f"""--dataset-path {DATA} --total-iterations 300 --warmup-iterations 8 --eval-every 100
    --eval-episodes 2 --final-episodes 2 --checkpoint-every 20 --model-max-epochs 2
    --model-epoch-steps 4 --holdout-size 20 --model-batch-size 8 --model-hidden 16
    --ensemble-size 3 --num-elites 2 --rollout-every 4 --rollout-rows 60 --buffer-size 200
    --real-decay-every 2 --batch-size 16 --hidden 16 16 --noise-dim 2 --eval-candidates 3""".split()
SET = ["--scripts", f"{ROOT}/ampl.py", "--env-ids", "maze2d-medium-v1", "--gpus", "0", "--dir"]


def sweep_command(*words):
    return [sys.executable, str(ROOT / "sweep.py"), *map(str, words)]


def run_set(folder, *words, flags=TINY):
    command = sweep_command("run", *SET, folder, *words, "--", *flags)
    return subprocess.run(command, capture_output=True, text=True)


def states(folder):
    return {path.name: sweep.state(path) for path in sorted(Path(folder).glob("*__*__*"))}


def policy(folder):
    """What a job of the set has learned: tensors by name."""
    (path,) = folder.glob("*/policy.pt")
    return torch.load(path, weights_only=True)["policy"]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_equal(one, two):
    """Two jobs have learned the same, bit for bit."""
    one, two = policy(one), policy(two)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_set(folder, "--seeds", 0, 1).returncode == 0
    return folder


def test_a_killed_set_goes_on_to_the_same_result(undisturbed, tmp_path):
    """Ctrl-C stops all jobs; kill -9 spares them, and the next `run` waits; nothing is lost."""
    command = sweep_command("run", *SET, tmp_path, "--parallel", 2, "--seeds", 0, "--", *TINY)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(tmp_path.glob("*/*/checkpoint.pt")))
        assert [row["state"] for row in states(tmp_path).values()] == ["running"]
        process.send_signal(signal.SIGINT)
        assert "goes on from the last checkpoints" in process.communicate()[1]
    assert process.returncode == 1
    wait_for(lambda: [row["state"] for row in states(tmp_path).values()] == ["stopped"])
    with subprocess.Popen(command) as process:
        wait_for(lambda: [row["state"] for row in states(tmp_path).values()] == ["running"])
        process.kill()
    end = run_set(tmp_path, "--seeds", 0, 1)  # one seed more
    assert end.returncode == 0 and end.stdout.count("done") == 2
    assert len(list(tmp_path.glob("*__0/*/args.json"))) == 1  # one run, resumed
    for job in undisturbed.glob("*__*__*"):
        assert_equal(job, tmp_path / job.name)
    assert "everything is done" in run_set(tmp_path, "--seeds", 0, 1).stdout


def test_a_job_that_fails_is_named_and_the_others_go_on(tmp_path):
    """The bundled sample is no data of hopper's."""
    end = run_set(tmp_path, "--env-ids", "hopper-medium-v2", "maze2d-medium-v1")
    assert end.returncode == 1 and "1 jobs did not end well" in end.stderr
    failed, done = states(tmp_path).values()
    assert (failed["state"], done["state"]) == ("failed", "done")
    assert "of another task?" in failed["note"] and failed["note"] in end.stdout
    status = subprocess.run(sweep_command("status", tmp_path), capture_output=True, text=True)
    assert status.returncode == 1 and failed["note"] in status.stdout and "300/300" in status.stdout


def test_dry_run_prints_commands_and_starts_nothing(undisturbed, tmp_path):
    lines = run_set(tmp_path / "new", "--seeds", 3, 4, "--dry-run").stdout.splitlines()
    assert [line.split()[5] for line in lines] == ["3", "4"] and not (tmp_path / "new").exists()
    job = shutil.copytree(undisturbed, tmp_path / "old") / "maze2d-medium-v1__ampl__0"
    next(job.glob("*/result.json")).unlink()
    (line,) = run_set(tmp_path / "old", "--dry-run").stdout.splitlines()
    assert line.split()[2:] == ["--resume", str(next(job.glob("*/")))]


@pytest.mark.parametrize("words, sentence", [
    (["--scripts", "nothing.py"], "there is no script"),
    (["--scripts", ROOT / "collect.py"], "does not train on a dataset"),
    (["--env-ids", "maze2d-medum-v1"], "did you mean maze2d-medium-v1"),
    (["--slurm-partition", "gpu"], "--slurm-partition needs --cluster slurm"),
    (["--gpus", "99"], "this machine has"),
    (["--cluster", "slurm"], "SLURM did not take the jobs"),
    (["--", "--seed", "3"], "itself gives the scripts"),
    (["--", "--no-such-flag", "3"], "--no-such-flag"),
    (["--", *TINY, "--horizon", "5"], "is a set of other flags"),
])  # fmt: skip
def test_bad_input_of_run(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    if "other flags" in sentence:
        (tmp_path / "flags").write_text(shlex.join(["--num-seeds=1", *TINY]))
    words = words if "--" in words else [*words, "--", *TINY]
    argv = ["sweep.py", "run", *SET, tmp_path, *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    assert stop.value.code not in (0, None)
    assert sentence in str(stop.value) + capsys.readouterr().err
    assert not list(tmp_path.glob("*/*/args.json"))


def write_result(folder, task, script, seeds, scores, **changes):
    folder.mkdir(parents=True)
    args = dict(seed=seeds[0], env_id=task, dataset_path=str(folder), horizon=1)
    args |= changes.pop("args", {})
    result = dict(algo=script, env_id=task, sha256="a" * 64, seeds=seeds, args=args, last=scores)
    result |= dict(curves=[[10, *scores], [20, *scores]], mean_last_ten=scores, final_mean=scores)
    result["versions"] = dict(torch="2.13.0")
    (folder / "result.json").write_text(json.dumps(result | changes))


def test_report_is_right_by_hand(tmp_path):
    """Each of the 16 draws of seeds has more than 2.5 %: the interval is from least to greatest."""
    scores = {"ampl": [[0, 10], [30, 70]], "mopo": [[20, 40], [5, 15]]}
    for script, (pen, door) in scores.items():
        write_result(tmp_path / script / "pen", "pen-human-v1", script, [0, 1], pen)
        write_result(tmp_path / script / "d0", "door-human-v1", script, [0], door[:1])
        write_result(tmp_path / script / "d1", "door-human-v1", script, [1], door[1:])
    write_result(tmp_path / "raw", "halfcheetah-jump-v0", "mopo", [0], [2800.0])
    sweep.report(str(tmp_path))
    text = (tmp_path / "report.md").read_text().split("## Last")[0].replace(" ", "")
    cells = [line.strip("|").split("|") for line in text.split("\n")]
    assert ["pen-human-v1", "5.0+-7.1(2)", "30.0+-14.1(2)"] in cells
    assert ["door-human-v1", "50.0+-28.3(2)", "10.0+-7.1(2)"] in cells
    assert ["halfcheetah-jump-v0", "-", "2800.0(1)"] in cells  # not averaged: it is a raw return
    assert ["meanrank", "1.50", "1.50"] in cells
    assert ["average", "27.5", "20.0"] in cells
    # 0 10 30 70 -> (10 + 30) / 2, from 0 0 30 30 to 10 10 70 70; 5 15 20 40 likewise
    assert ["IQM[95%]", "20.0[15.0,40.0]", "17.5[12.5,27.5]"] in cells
    table = pd.read_csv(tmp_path / "scores.csv")
    assert len(table) == 9 and table["last"].sum() == 2800 + 110 + 80
    for name in ("curves.png", "bars.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_report_keeps_apart_what_differs(tmp_path):
    different = dict(args=dict(horizon=5)), dict(sha256="b" * 64), dict(versions=dict(torch="3"))
    for i, changes in enumerate([{}, *different]):
        write_result(tmp_path / str(i), "pen-human-v1", "ampl", [0], [float(i)], **changes)
    write_result(tmp_path / "code", "pen-human-v1", "ampl", [0], [9.0])
    (tmp_path / "code" / "ampl.py").write_text("changed")
    write_result(tmp_path / "again", "pen-human-v1", "ampl", [0], [8.0])  # of the first
    os.utime(tmp_path / "0" / "result.json", (0, 0))
    write_result(tmp_path / "nan", "pen-human-v1", "ampl", [0], [float("nan")])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text('{"algo": "am')
    learners = sweep.read_learners(str(tmp_path), told := [])
    assert sorted(learners["last"]) == [1, 2, 3, 8, 9] and learners["method"].nunique() == 5
    names = "".join(learners["method"])
    assert "horizon=5" in names and "data=bbbbbbb" in names and "torch=3" in names
    assert f"{tmp_path}/bad/result.json is damaged" in "".join(told)
    assert f"seed 0 of {tmp_path}/0, which a newer run repeats" in "".join(told)


def test_readme_commands_and_a_missing_package(monkeypatch):
    """The first is a whole set: scripts x tasks x seeds."""
    line = next(x for x in (ROOT / "README.md").read_text().split("\n") if "sweep.py run" in x)
    command = [sys.executable, *shlex.split(line)[1:]]
    command.insert(command.index("--"), "--dry-run")
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 0 and end.stdout.count("\n") == 12
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match="needs submitit: pip install"):
        runpy.run_path(str(ROOT / "sweep.py"))


def test_nothing_to_show(tmp_path):
    for command in (sweep.status, sweep.report):
        with pytest.raises(SystemExit, match="holds no"):
            command(str(tmp_path))


@pytest.mark.skipif(subprocess.getstatusoutput("sinfo")[0] != 0, reason="needs a SLURM that runs")
def test_slurm_requeues_and_the_result_is_the_same(tmp_path):
    """Eight jobs; one is requeued in mid-run, one reaches its time limit. Takes minutes."""
    flags = [*TINY, "--total-iterations", "2000", "--eval-every", "500"]
    slurm = ["--cluster", "slurm", "--slurm-cpus", 1, "--hours", 0.5]
    assert run_set(tmp_path / "slurm", *slurm, "--seeds", *range(8), flags=flags).returncode == 0
    jobs = [tmp_path / "slurm" / f"maze2d-medium-v1__ampl__{seed}" for seed in range(8)]
    tickets = [(job / "slurm_id").read_text() for job in jobs]
    assert all(row["state"] in ("queued", "running") for row in states(jobs[0].parent).values())
    wait_for(lambda: all(list(job.glob("*/checkpoint.pt")) for job in jobs[:2]))
    subprocess.run(["scontrol", "requeue", tickets[0]], check=True)
    subprocess.run(["scontrol", "update", f"JobId={tickets[1]}", "TimeLimit=1"], check=True)
    wait_for(lambda: {row["state"] for row in states(jobs[0].parent).values()} == {"done"}, 1800)
    assert "Caught signal SIGUSR2" in (jobs[1] / "log.txt").read_text()
    assert len(list(jobs[0].glob("*/events*"))) > 1 and len(list(jobs[1].glob("*/events*"))) > 1
    assert run_set(tmp_path / "here", "--seeds", 0, 1, flags=flags).returncode == 0
    for job in jobs[:2]:
        assert_equal(job, tmp_path / "here" / job.name)
