"""sweep.py: real tiny sets that are killed, fail and go on; reports worked out by hand."""

import fcntl
import itertools
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
import tyro

import sweep

ROOT = Path(sweep.__file__).parent
DATA = ROOT / "tests/data/maze2d-medium-v1-sample.hdf5"
TASK = "maze2d-medium-v1"
# A run of a few seconds. One thread, because runs are compared bit for bit.
TINY = shlex.split(
    f"""--dataset-path {DATA} --total-iterations 300 --warmup-iterations 8 --eval-every 100
    --eval-episodes 2 --final-episodes 2 --checkpoint-every 20 --model-max-epochs 2
    --model-epoch-steps 4 --holdout-size 20 --model-batch-size 8 --model-hidden 16
    --ensemble-size 3 --num-elites 2 --rollout-every 4 --rollout-rows 60 --buffer-size 200
    --real-decay-every 2 --batch-size 16 --hidden 16 16 --noise-dim 2 --eval-candidates 3
    --threads 1"""
)
SET = ["--scripts", f"{ROOT}/ampl.py", "--env-ids", TASK, "--gpus", "0", "--dir"]


def sweep_command(*words):
    return [sys.executable, str(ROOT / "sweep.py"), *map(str, words)]


def run_set(folder, *words, flags=TINY):
    command = sweep_command("run", *SET, folder, *words, "--", *flags)
    return subprocess.run(command, capture_output=True, text=True)


def states(folder):
    """The state of each job of a set, by the job's name."""
    sweep.slurm_queue.cache_clear()
    return {path.name: sweep.state(path)["state"] for path in sorted(folder.glob("*__*__*"))}


def wait_for(condition, process=None):
    """Wait for what must happen; fail where `process` ended without it. A day is a hang."""
    hang = time.monotonic() + 24 * 3600
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended or condition(), "the process ended before"
        assert time.monotonic() < hang, "it hangs"
        time.sleep(0.05)


def has_checkpoint(job):
    return any(job.glob("*/checkpoint.pt"))


def policy(job):
    """What a job of a set has learned: tensors by name."""
    (path,) = job.glob("*/policy.pt")
    networks = torch.load(path, weights_only=True)["policy"]
    tensors = {}
    for name, network in networks.items():
        for key, tensor in network.items():
            tensors[name, key] = tensor
    return tensors


def assert_equal(one, two):
    """Two jobs have learned the same, bit for bit."""
    first = policy(one)
    second = policy(two)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


# ----- real sets -----
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished set of two seeds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_set(folder, "--seeds", 0, 1).returncode == 0
    return folder


def test_a_killed_set_goes_on_to_the_same_result(undisturbed, tmp_path):
    """Ctrl-C stops all jobs; kill -9 spares them, and the next `run` waits; nothing is lost."""
    job = f"{TASK}__ampl__0"
    folder = tmp_path / job
    command = sweep_command("run", *SET, tmp_path, "--seeds", 0, "--", *TINY)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: has_checkpoint(folder), process)
        assert states(tmp_path) == {job: "running"}
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert "goes on from the last checkpoints" in errors
    assert process.returncode == 1
    wait_for(lambda: states(tmp_path) == {job: "stopped"})

    with subprocess.Popen(command) as process:
        wait_for(lambda: states(tmp_path) == {job: "running"}, process)
        process.kill()
    one_seed_more = run_set(tmp_path, "--seeds", 0, 1)
    assert one_seed_more.returncode == 0
    assert one_seed_more.stdout.count("done") == 2
    assert len(list(tmp_path.glob("*__0/*/args.json"))) == 1  # one run, resumed
    for job in undisturbed.glob("*__*__*"):
        assert_equal(job, tmp_path / job.name)
    assert "everything is done" in run_set(tmp_path, "--seeds", 0, 1).stdout


def test_a_grid_runs_goes_on_and_is_reported_by_cell(tmp_path):
    """Two jobs side by side; then one of them is taken back to its last checkpoint."""
    words = ["--grid", "noise-std=0.5,2", "--parallel", 2]
    first = run_set(tmp_path, *words)
    assert first.returncode == 0, first.stderr
    names = [f"{TASK}__ampl__noise_std=0.5__0", f"{TASK}__ampl__noise_std=2.0__0"]
    assert states(tmp_path) == {names[0]: "done", names[1]: "done"}
    (result,) = (tmp_path / names[1]).glob("*/result.json")
    assert json.loads(result.read_text())["args"]["noise_std"] == 2.0

    result.unlink()
    second = run_set(tmp_path, *words)
    assert second.stdout.count("done") == 1
    assert "noise_std=2.0" in second.stdout
    assert result.exists()  # the same run, resumed

    table = subprocess.run(sweep_command("report", tmp_path), capture_output=True, text=True)
    heads = table_rows(table.stdout, "Cells")[0]
    assert heads[:3] == ["task", "script", "noise_std"]
    assert "conservative_gap" not in heads
    cells = table_rows(table.stdout, "Cells")[1:]
    assert [cell[2] for cell in cells] == ["0.5", "2.0"]


def test_a_job_that_fails_is_named_and_the_others_go_on(tmp_path):
    """The bundled sample is no data of hopper's."""
    end = run_set(tmp_path, "--env-ids", "hopper-medium-v2", TASK)
    assert end.returncode == 1
    assert "jobs that did not end well: 1" in end.stderr
    assert list(states(tmp_path).values()) == ["failed", "done"]
    note = sweep.state(tmp_path / "hopper-medium-v2__ampl__0")["note"]
    assert "of another task?" in note
    assert note in end.stdout
    status = subprocess.run(sweep_command("status", tmp_path), capture_output=True, text=True)
    assert status.returncode == 1
    assert note in status.stdout
    assert "score" in status.stdout  # of the last evaluation of the job that is done


def test_dry_run_prints_commands_and_starts_nothing(undisturbed, tmp_path):
    lines = run_set(tmp_path / "new", "--seeds", 3, 4, "--dry-run").stdout.splitlines()
    assert ["--seed 3" in line for line in lines] == [True, False]
    assert not (tmp_path / "new").exists()
    job = shutil.copytree(undisturbed, tmp_path / "old") / f"{TASK}__ampl__0"
    next(job.glob("*/result.json")).unlink()
    (line,) = run_set(tmp_path / "old", "--dry-run").stdout.splitlines()
    assert line.split()[2:] == ["--resume", str(next(job.glob("*/")))]


def test_dry_run_on_slurm_says_what_it_would_ask_for(tmp_path):
    """As a comment before the commands. Nothing asks for SLURM itself."""
    wishes = ["--cluster", "slurm", "--slurm-partition", "fast", "--hours", 2, "--dry-run"]
    first, *commands = run_set(tmp_path / "new", *wishes).stdout.splitlines()
    assert first.startswith("# an array of ")
    for wish in ("job_name=sweep", "partition=fast", "time=120", "cpus_per_task=4"):
        assert wish in first
    assert all(line.startswith("python ") for line in commands)


def test_dry_run_says_that_data_are_missing(tmp_path, monkeypatch):
    """And fetches none; a --dataset-path that leads nowhere is refused as ever."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    done = run_set(tmp_path / "set", "--dry-run", flags=[])
    assert done.stderr.startswith(f"note: there is no {tmp_path}/maze2d-medium-sparse-v1.hdf5 yet")
    assert done.stdout.startswith("python ")
    refused = run_set(tmp_path / "set", "--dry-run", flags=["--dataset-path", "nowhere"])
    assert "there is no dataset nowhere" in refused.stderr


# ----- what a command starts -----
@pytest.fixture
def plan(monkeypatch, tmp_path):
    """A function that gives sweep.py a command line. -> jobs and workers, none of which starts"""
    started = []
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # sweep.py sets it, and pytest restores it
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no sbatch
    monkeypatch.setattr(sweep, "run_here", lambda _, jobs, workers: started.append((jobs, workers)))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sweep.py", "run", *map(str, words)])
        sweep.main()
        (jobs_and_workers,) = started
        return jobs_and_workers

    call.started = started
    return call


def test_a_job_for_each_script_task_cell_and_seed(plan, tmp_path):
    scripts = ["--scripts", ROOT / "ampl.py", ROOT / "mopo.py"]
    tasks = ["--env-ids", TASK, "maze2d-umaze-v1"]
    grid = ["--grid", "real_fraction=0.5,1", "hidden=8 8,4 4", "tf32=True,False"]
    where = ["--gpus", 0, "--dir", tmp_path]
    flags = ["--", "--dataset-path", DATA, "--total-iterations", 50_000]
    jobs, _ = plan(*scripts, *tasks, *grid, *where, "--seeds", 0, 3, *flags)
    expected = set()
    for script, task, fraction, hidden, tf32, seed in itertools.product(
        ("ampl", "mopo"),
        (TASK, "maze2d-umaze-v1"),
        ("0.5", "1.0"),
        ("8-8", "4-4"),
        ("True", "False"),
        (0, 3),
    ):
        cell = f"hidden={hidden},real_fraction={fraction},tf32={tf32}"
        expected.add(f"{task}__{script}__{cell}__{seed}")
    assert len(jobs) == 64
    assert {job.folder.name for job in jobs} == expected
    words = shlex.join(jobs[0].flags)
    assert f"--env-id {TASK} --seed 0 --run-dir {jobs[0].folder}" in words
    assert "--real-fraction 0.5 --hidden 8 8 --tf32" in words
    assert "--no-tf32" in shlex.join(jobs[-1].flags)


@pytest.mark.parametrize("parallel, workers, threads", [(2, 2, 8), (3, 3, 5), (0, 4, 4)])
def test_jobs_share_the_cores(plan, parallel, workers, threads, tmp_path, monkeypatch, capsys):
    """Four seeds on a machine of 16 cores."""
    monkeypatch.setattr(sweep, "core_count", lambda: 16)
    words = [*SET, tmp_path, "--seeds", 0, 1, 2, 3, "--parallel", parallel]
    jobs, now = plan(*words, "--", *TINY[:-2])
    assert now == workers
    assert all(job.flags[-2:] == ["--threads", str(threads)] for job in jobs)
    assert f"so each new run gets --threads {threads}" in capsys.readouterr().out


def test_threads_that_the_user_names_stay(plan, tmp_path, capsys):
    jobs, _ = plan(*SET, tmp_path, "--", *TINY[:-2], "--threads", 2)
    assert jobs[0].flags.count("--threads") == 1
    assert jobs[0].flags[-2:] == ["--threads", "2"]
    assert "--threads" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "named, count, cards",
    [
        (None, 2, ["0", "1"]),
        ("3, 1", 2, ["3", "1"]),
        ("GPU-8f2a,GPU-77c1", 2, ["GPU-8f2a", "GPU-77c1"]),
        ("2,-1,3", 1, ["2"]),  # CUDA stops at the first that is no card
        ("MIG-1a, MIG-2b", 1, ["MIG-1a", "MIG-2b"]),  # CUDA shows a process one of them
        ("", 0, []),
    ],
)
def test_cards_keep_their_names(named, count, cards, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert sweep.visible_cards() == cards


@pytest.fixture
def two_cards(monkeypatch):
    """A machine of two GPUs, where a job is done as soon as the number of jobs that it waits for
    has been started: none, unless `jobs_before_end` names another number."""

    class Executor:
        def __init__(self, folder):
            self.folder = folder

        def update_parameters(self, **_):
            pass

        def submit(self, job):
            started.append(job)
            return Handle(job)

    class Handle:
        def __init__(self, job):
            self.job = job

        def done(self):
            return len(started) >= getattr(self.job, "jobs_before_end", 0)

    started = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sweep, "core_count", lambda: 3)
    monkeypatch.setattr(sweep.submitit, "LocalExecutor", Executor)
    monkeypatch.setattr(sweep, "quiet_submitit", lambda folder: None)
    monkeypatch.setattr(sweep, "state", lambda folder: {"state": "done"})


@pytest.mark.parametrize(
    "gpus, jobs_per_gpu, workers, cards",
    [
        (1, 1, 2, ["GPU-a", "GPU-b", "GPU-a", "GPU-b", "GPU-a"]),
        (1, 2, 4, ["GPU-a", "GPU-b", "GPU-a", "GPU-b", "GPU-a"]),
        (2, 1, 1, ["GPU-a,GPU-b"] * 5),
        (0, 1, 3, [""] * 5),
    ],
)
def test_jobs_share_cards_evenly(gpus, jobs_per_gpu, workers, cards, two_cards, tmp_path):
    """Five jobs; how many of them run at a time follows from --jobs-per-gpu."""
    args = sweep.Run(("ampl.py",), (TASK,), str(tmp_path), gpus=gpus, jobs_per_gpu=jobs_per_gpu)
    assert sweep.count_workers(args, 5) == workers
    jobs = [sweep.Job(tmp_path, ROOT / "ampl.py", []) for _ in range(5)]
    sweep.run_here(args, jobs, workers)
    assert [job.cards for job in jobs] == cards


def test_the_last_job_goes_to_the_card_that_is_free(two_cards, tmp_path):
    """Of four jobs on two cards only the third, on the first card, still runs."""
    args = sweep.Run(("ampl.py",), (TASK,), str(tmp_path), gpus=1, jobs_per_gpu=2)
    jobs = [sweep.Job(tmp_path, ROOT / "ampl.py", []) for _ in range(5)]
    jobs[2].jobs_before_end = 5
    sweep.run_here(args, jobs, 4)
    assert jobs[2].cards == "GPU-a"
    assert jobs[4].cards == "GPU-b"


# ----- mistakes -----
@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--scripts", "nothing.py"], "there is no script"),
        (["--scripts", ROOT / "collect.py"], "does not train on a dataset"),
        (["--scripts", "{folder}/v1.2.py"], "rename it to a name with one dot"),
        (["--scripts", "{folder}/json.py"], "hides Python's own module json"),
        (["--scripts", "{folder}/numpy.py"], "has the name of"),
        (["--scripts", "{folder}/broken.py"], "cannot be imported"),
        (["--env-ids", "maze2d-medum-v1"], "did you mean maze2d-medium-v1"),
        (["--seeds"], "--seeds names nothing"),
        (["--seeds", "1", "1"], "--seeds names 1 twice"),
        (["--seeds", "-1"], "--seeds is -1, but must be at least 0"),
        (["--seeds", "4294967296"], "and at most 4294967295"),
        (["--hours", "nan"], "--hours is nan, but must be at least"),
        (["--hours", "inf"], "--hours is inf, but must be at least"),
        (["--parallel", "-1"], "--parallel is -1, but must be at least 0"),
        (["--jobs-per-gpu", "0"], "--jobs-per-gpu is 0, but must be at least 1"),
        (["--slurm-cpus", "0"], "--slurm-cpus is 0, but must be at least 1"),
        (["--dir", "{folder}/json.py"], "is no folder"),
        (["--dir", "{folder}/json.py/a"], "cannot make the folder"),
        (["--slurm-partition", "gpu"], "--slurm-partition needs --cluster slurm"),
        (["--gpus", "99"], "this machine has"),
        (["--jobs-per-gpu", "2"], "needs jobs that have a GPU"),
        (["--jobs-per-gpu", "2", "--cluster", "slurm"], "is for this machine"),
        (["--cluster", "slurm"], "SLURM did not take the jobs"),
        (["--grid", "noise_std"], "write name=value,value"),
        (["--grid", "noise_std=1,,2"], "write name=value,value"),
        (["--grid", "noise_sdt=1"], "ampl.py has no flag of that name; did you mean noise_std?"),
        (["--grid", "beta=1"], "ampl.py has no flag of that name"),
        (["--grid", "noise_std=much"], "--noise-std"),
        (["--grid", "tf32=maybe"], "its values are True and False"),
        (["--grid", "horizon=3,0"], "ampl.py refuses --env-id maze2d-medium-v1 --horizon 0"),
        (["--grid", "gamma=1,1.0"], "name each value of --grid once"),
        (["--grid", "gamma=1", "gamma=0.9"], "the flag is named twice"),
        (["--grid", "noise-dim=3"], "the flag is named twice"),
        (["--grid", "seed=1,2"], "sweep.py sets that flag itself"),
        (["--grid", "log-every=1,2"], "does not change what is learned"),
        (["--grid", "dynamics_from=" + 300 * "x"], "is too long for a folder"),
        (["--", "--gamma", "2"], "--gamma 2: --gamma is 2.0, but must be at least 0"),
        (["--", "--threads", "1000000"], "--threads is 1000000, but must be at least 0"),
        (["--", "--seed", "3"], "leave out --seed: sweep.py sets it itself"),
        (["--", "--no-such-flag", "3"], "--no-such-flag"),
    ],
)
def test_a_mistake_ends_in_one_sentence(words, sentence, plan, tmp_path, capsys):
    """Nothing is started, and nothing is written but folders for the jobs."""
    (tmp_path / "v1.2.py").touch()
    (tmp_path / "json.py").touch()
    (tmp_path / "numpy.py").touch()
    (tmp_path / "broken.py").write_text("1 / 0")
    words = [str(word).replace("{folder}", str(tmp_path)) for word in words]
    if "--" not in words:
        words += ["--", *TINY]
    with pytest.raises(SystemExit) as stop:
        plan(*SET, tmp_path / "set", *words)
    said = stop.value.code
    assert said not in (0, None)
    if isinstance(said, str):  # else the scripts' own parser has said it
        assert "\n" not in said
    assert sentence in str(said) + capsys.readouterr().err
    assert not plan.started
    assert not list(tmp_path.glob("set/*__*/*"))


@pytest.mark.parametrize("content", ["", '{"after --": ["--hor', "--hidden=1", "[]", "{}"])
def test_a_damaged_flags_file_is_named_and_kept(content, plan, tmp_path):
    """Where a job has begun, whose flags it would have. Else it is written anew."""
    path = tmp_path / "flags"
    path.write_text(content)
    begun = tmp_path / f"{TASK}__ampl__0" / "run" / "args.json"
    begun.parent.mkdir(parents=True)
    begun.touch()
    with pytest.raises(SystemExit, match="flags is empty, cut or of an older sweep.py"):
        plan(*SET, tmp_path, "--", *TINY)
    assert path.read_text() == content
    assert not plan.started

    begun.unlink()
    plan(*SET, tmp_path, "--", *TINY)
    assert json.loads(path.read_text()) == {"after --": TINY}


def test_a_set_keeps_its_flags(plan, tmp_path):
    """A set is started, then the same folder is named with other flags."""
    plan(*SET, tmp_path, "--", *TINY)
    plan.started.clear()
    with pytest.raises(SystemExit, match="is a set of other flags .*--noise-dim 2"):
        plan(*SET, tmp_path, "--", *TINY, "--horizon", 5)
    assert not plan.started
    plan(*SET, tmp_path, "--seeds", 0, 1, "--", *TINY)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("content", ["", '{"algo": "am', "[]"])
def test_a_damaged_result_is_named_and_kept(content, plan, tmp_path, capsys):
    path = tmp_path / f"{TASK}__ampl__0" / "run" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(SystemExit, match="is empty or cut: delete it"):
        plan(*SET, tmp_path, "--", *TINY)
    with pytest.raises(SystemExit) as stop:
        sweep.status(str(tmp_path))
    assert stop.value.code == 1
    assert "damaged" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no result.json to read: left out: .*result.json"):
        sweep.report(str(tmp_path))
    assert path.read_text() == content
    assert not plan.started


@pytest.mark.parametrize(
    "line, progress, note",
    [
        ("", "", "starting"),
        ("ampl:  33% 100/300 [00:10<00:20, 10.00it/s, score 5.0]", "ampl 100/300", "00:20 left"),
        ("model fit: 12it [00:05, 2.40it/s, error 0.1]", "model fit 12it", ""),
    ],
)
def test_status_of_a_running_job(line, progress, note, tmp_path):
    (tmp_path / "log.txt").write_text(f"iteration 90: score 5.0\n{line}\n")
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep.state(tmp_path) == {
            "state": "running",
            "job": tmp_path.name,
            "progress": progress,
            "evaluation": "score 5.0",
            "note": note,
        }


def test_nothing_to_show(tmp_path):
    for command in (sweep.status, sweep.report):
        with pytest.raises(SystemExit, match="holds no"):
            command(str(tmp_path))


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match="needs submitit: pip install"):
        runpy.run_path(str(ROOT / "sweep.py"))


# ----- reports -----
def write_result(folder, task, script, seed, score, **changes):
    """A result.json as the scripts write it, with the same score everywhere."""
    folder.mkdir(parents=True)
    args = {"seed": seed, "env_id": task, "run_dir": str(folder), "horizon": 1, "threads": seed}
    result = {
        "algo": script,
        "env_id": task,
        "sha256": 64 * "a",
        "seed": seed,
        "args": args | changes.pop("args", {}),
        "curve": [[10, score], [20, score]],
        "last": score,
        "mean_last_ten": score,
        "final_mean": score,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
    }
    (folder / "result.json").write_text(json.dumps(result | changes))


def table_rows(text, title):
    """The cells of the table below a title of a report, row by row, the heads first."""
    table = text.split(f"## {title}\n\n")[1].split("\n\n")[0]
    rows = []
    for line in table.strip().split("\n"):
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    del rows[1]  # the line below the heads
    return rows


def report_text(folder):
    """What `report` says of a folder. The pictures, which take a second, are left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "draw_curves", lambda runs, path: None)
        patch.setattr(sweep, "draw_bars", lambda runs, path: None)
        sweep.report(str(folder))
    return (folder / "report.md").read_text()


def test_report_is_right_by_hand(tmp_path):
    """Each of the 16 draws of seeds has more than 2.5 %: the interval is from least to greatest."""
    scores = {
        "ampl": {"pen-human-v1": [0, 10], "door-human-v1": [30, 70]},
        "mopo": {"pen-human-v1": [20, 40], "door-human-v1": [5, 15]},
    }
    for script, tasks in scores.items():
        for task, values in tasks.items():
            for seed, score in enumerate(values):
                write_result(tmp_path / script / task / str(seed), task, script, seed, score)
    write_result(tmp_path / "raw", "halfcheetah-jump-v0", "mopo", 0, 2800.0)
    sweep.report(str(tmp_path))
    text = (tmp_path / "report.md").read_text()
    rows = table_rows(text, "Mean of the last ten")
    assert rows == table_rows(text, "Last")[:1] + [
        ["door-human-v1", "50.0 +- 28.3 (2)", "10.0 +- 7.1 (2)"],
        ["halfcheetah-jump-v0", "-", "2800.0 (1)"],  # not averaged: it is a return
        ["pen-human-v1", "5.0 +- 7.1 (2)", "30.0 +- 14.1 (2)"],
        ["mean rank", "1.50", "1.50"],
        ["average", "27.5", "20.0"],
        # 0 10 30 70 -> (10 + 30) / 2, from 0 0 30 30 to 10 10 70 70; 5 15 20 40 likewise
        ["IQM [95 %]", "20.0 [15.0, 40.0]", "17.5 [12.5, 27.5]"],
    ]
    table = pd.read_csv(tmp_path / "scores.csv")
    assert len(table) == 9
    assert table["last"].sum() == 2800 + 110 + 80
    for name in ("curves.png", "bars.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.rglob("*.part"))


def test_report_has_a_row_for_each_cell_of_a_grid(tmp_path):
    """Two cells of COMBO with two seeds each, beside a run of MOPO, which has no beta."""
    runs = [
        # beta, seed, score, gap
        (10.0, 0, 1, -2),
        (10.0, 1, 3, -4),
        (5.0, 0, 7, 1),
        (5.0, 1, 7, 1),
    ]
    for beta, seed, score, gap in runs:
        cell = {"args": {"beta": beta}, "conservative_gap": gap, "measure": "normalized score"}
        write_result(tmp_path / f"{beta}{seed}", "pen-human-v1", "combo", seed, score, **cell)
    write_result(tmp_path / "mopo", "pen-human-v1", "mopo", 0, 4)
    heads, *cells = table_rows(report_text(tmp_path), "Cells")
    assert heads == [
        *["task", "script", "beta", "measure", "seeds"],
        *["mean of the last ten", "last", "final episodes", "conservative_gap"],
    ]
    assert [cell[:6] for cell in cells] == [
        ["pen-human-v1", "combo", "5.0", "normalized score", "2", "7.0 +- 0.0"],
        ["pen-human-v1", "combo", "10.0", "normalized score", "2", "2.0 +- 1.4"],
        ["pen-human-v1", "mopo", "-", "score", "1", "4.0"],
    ]
    assert [cell[-1] for cell in cells] == ["1.00 +- 0.00", "-3.00 +- 1.41", "-"]


def test_a_run_that_is_extended_has_no_result_yet(tmp_path):
    """Its result.json is still that of the iterations before: the job is not done, nor reported."""
    for seed, wanted in ((0, 20), (1, 30)):
        folder = tmp_path / str(seed) / "run"
        write_result(folder, "pen-human-v1", "ampl", seed, 1.0, total_iterations=20)
        (folder / "args.json").write_text(json.dumps({"total_iterations": wanted}))
    assert sweep.state(tmp_path / "0")["state"] == "done"
    assert sweep.state(tmp_path / "1")["state"] == "stopped"
    text = report_text(tmp_path)
    assert f"left out: {folder}/result.json is that of fewer iterations than its run" in text
    assert table_rows(text, "Cells")[1][:4] == ["pen-human-v1", "ampl", "score", "1"]


def test_a_return_of_a_d4rl_task_is_not_averaged_with_scores(tmp_path):
    write_result(tmp_path / "1", "pen-human-v1", "ampl", 0, 20, measure="normalized score")
    write_result(tmp_path / "2", "door-human-v1", "ampl", 0, 3000, measure="return")
    rows = table_rows(report_text(tmp_path), "Last")
    assert ["average", "20.0"] in rows


@pytest.mark.parametrize(
    "change, column",
    [
        ({"args": {"horizon": 5}}, "horizon=5"),
        ({"args": {"dynamics_from": "runs/a"}}, "dynamics_from=runs/a"),
        ({"sha256": 64 * "b"}, "data=bbbbbbb"),
        ({"device": "cuda:0"}, "device=cuda"),
        ({"versions": {"torch": "3"}}, "torch=3"),
        ({"measure": "return"}, "measure=return"),
    ],
)
def test_report_keeps_apart_what_differs(change, column, tmp_path):
    write_result(tmp_path / "0", "pen-human-v1", "ampl", 0, 1.0)
    write_result(tmp_path / "1", "pen-human-v1", "ampl", 1, 2.0, **change)
    text = report_text(tmp_path)
    heads, *cells = table_rows(text, "Cells")
    name, value = column.split("=")
    assert value in [cell[heads.index(name)] for cell in cells]
    assert [cell[heads.index("seeds")] for cell in cells] == ["1", "1"]
    assert any(column in head for head in table_rows(text, "Last")[0])


def test_report_keeps_apart_runs_of_other_code(tmp_path):
    for seed in (0, 1):
        write_result(tmp_path / str(seed), "pen-human-v1", "ampl", seed, 1.0)
    (tmp_path / "1" / "ampl.py").write_text("changed")
    assert "code" in table_rows(report_text(tmp_path), "Cells")[0]


def test_report_averages_what_only_runs_in_another_way(tmp_path):
    """Also the runs' own paths, and a dataset that lies elsewhere, make no other cell."""
    for seed in (0, 1):
        args = {"track": seed == 0, "checkpoint_every": seed, "dataset_path": f"{seed}.hdf5"}
        write_result(tmp_path / str(seed), "pen-human-v1", "ampl", seed, seed, args=args)
    assert ["pen-human-v1", "ampl", "score", "2"] in [
        row[:4] for row in table_rows(report_text(tmp_path), "Cells")
    ]


def test_a_newer_run_takes_the_place_of_an_older_one(tmp_path):
    write_result(tmp_path / "old", "pen-human-v1", "ampl", 0, 1.0)
    write_result(tmp_path / "new", "pen-human-v1", "ampl", 0, 2.0)
    os.utime(tmp_path / "old" / "result.json", (0, 0))
    text = report_text(tmp_path)
    assert f"left out: seed 0 of {tmp_path}/old, which a newer run repeats" in text
    assert ["pen-human-v1", "2.0 (1)"] in table_rows(text, "Last")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"last": float("nan")}, "last is nan and no number"),
        ({"final_mean": None}, "final_mean is None and no number"),
        ({"mean_last_ten": "12"}, "mean_last_ten is '12' and no number"),
        ({"conservative_gap": float("inf")}, "conservative_gap is inf and no number"),
        ({"curve": [[10, None]]}, "curve is None and no number"),
        ({"curve": []}, "its curve is empty"),
        ({"args": {}, "versions": None}, "damaged or of another version"),
    ],
)
def test_a_result_without_its_numbers_is_named_and_left_out(change, reason, tmp_path):
    write_result(tmp_path / "good", "pen-human-v1", "ampl", 0, 1.0)
    write_result(tmp_path / "bad", "pen-human-v1", "ampl", 1, 2.0, **change)
    text = report_text(tmp_path)
    assert f"left out: {tmp_path}/bad/result.json" in text
    assert reason in text
    assert ["pen-human-v1", "1.0 (1)"] in table_rows(text, "Last")


def test_a_result_that_lacks_a_number_is_named_and_left_out(tmp_path):
    write_result(tmp_path / "good", "pen-human-v1", "ampl", 0, 1.0)
    write_result(tmp_path / "bad", "pen-human-v1", "ampl", 1, 2.0)
    path = tmp_path / "bad" / "result.json"
    result = json.loads(path.read_text())
    del result["last"]
    path.write_text(json.dumps(result))
    assert f"left out: {path} lacks last" in report_text(tmp_path)


# ----- commands of README -----
def test_readme_commands():
    """Every `run` of README starts as many jobs as it names scripts, tasks, cells and seeds."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.split("\n") if line.startswith("python sweep.py run")]
    assert lines
    for line in lines:
        words = shlex.split(line)[3:]
        if "--jobs-per-gpu" in words and not torch.cuda.is_available():
            continue
        own = words[: words.index("--")] if "--" in words else words
        args = tyro.cli(sweep.Run, args=own)
        cells = sweep.parse_grid(args.grid, [])
        jobs = len(args.scripts) * len(args.env_ids) * len(cells) * len(args.seeds)
        command = [sys.executable, "sweep.py", "run", "--dry-run", *words]
        end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert end.returncode == 0, end.stderr
        commands = [line for line in end.stdout.splitlines() if not line.startswith("#")]
        assert len(commands) == jobs


# ----- SLURM -----
def test_slurm_gets_each_job_once(tmp_path, monkeypatch):
    """With programs in place of SLURM's, whose job 7 is an array of two cells.

    Then the first of them is run as SLURM would run it.
    """
    programs = tmp_path / "programs"
    programs.mkdir()
    answers = {"sbatch": "Submitted batch job 7", "squeue": "7_0\n7_1", "srun": ""}
    for name, answer in answers.items():
        (programs / name).write_text(f"#!/bin/sh\nprintf '{answer}\\n'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    folder = tmp_path / "set"
    words = ["--grid", "noise_std=0.5,2", "--cluster", "slurm", "--slurm-cpus", 1]
    first = run_set(folder, *words, flags=TINY[:-2])
    assert "SLURM has 2 jobs" in first.stdout, first.stderr
    names = [f"{TASK}__ampl__noise_std=0.5__0", f"{TASK}__ampl__noise_std=2.0__0"]
    assert states(folder) == {names[0]: "queued", names[1]: "queued"}
    assert "in SLURM's hands" in run_set(folder, *words, flags=TINY[:-2]).stdout

    (script,) = folder.glob("submitit/*/*_submission.sh")
    assert "#SBATCH --array=0-1%2" in script.read_text()
    assert "#SBATCH --cpus-per-task=1" in script.read_text()
    task = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "8",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "0",
    }
    command = [sys.executable, "-m", "submitit.core._submit", str(script.parent)]
    assert subprocess.run(command, env=os.environ | task).returncode == 0
    assert states(folder) == {names[0]: "done", names[1]: "queued"}
    (result,) = (folder / names[0]).glob("*/result.json")
    assert json.loads(result.read_text())["args"]["threads"] == 1


@pytest.mark.skipif(subprocess.getstatusoutput("sinfo")[0] != 0, reason="needs a SLURM that runs")
def test_slurm_requeues_and_the_result_is_the_same(tmp_path):
    """Eight jobs; one is requeued in mid-run, one reaches its time limit. Takes minutes."""
    flags = [*TINY, "--total-iterations", "2000", "--eval-every", "500"]
    slurm = ["--cluster", "slurm", "--slurm-cpus", 1, "--hours", 0.5]
    assert run_set(tmp_path / "slurm", *slurm, "--seeds", *range(8), flags=flags).returncode == 0
    jobs = [tmp_path / "slurm" / f"{TASK}__ampl__{seed}" for seed in range(8)]
    tickets = [(job / "slurm_id").read_text() for job in jobs]
    assert set(states(tmp_path / "slurm").values()) <= {"queued", "running"}
    wait_for(lambda: has_checkpoint(jobs[0]))
    wait_for(lambda: has_checkpoint(jobs[1]))
    subprocess.run(["scontrol", "requeue", tickets[0]], check=True)
    subprocess.run(["scontrol", "update", f"JobId={tickets[1]}", "TimeLimit=1"], check=True)

    def ended():
        now = set(states(tmp_path / "slurm").values())
        return now == {"done"} or "failed" in now

    wait_for(ended)
    assert set(states(tmp_path / "slurm").values()) == {"done"}
    assert "Caught signal SIGUSR2" in (jobs[1] / "log.txt").read_text()
    for job in jobs[:2]:
        assert len(list(job.glob("*/events*"))) > 1  # it was started more than once
    assert run_set(tmp_path / "here", "--seeds", 0, 1, flags=flags).returncode == 0
    for job in jobs[:2]:
        assert_equal(job, tmp_path / "here" / job.name)
