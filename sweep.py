# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "d4rl==1.1", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "h5py==3.16.0",
#   "matplotlib==3.11.2", "mujoco==4.0.0", "numpy==2.4.6", "pandas==3.1.1", "pillow==13.0.0",
#   "scipy==1.17.1", "seaborn==0.13.2", "submitit==1.5.4", "tabulate==0.10.0",
#   "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# [tool.uv]  # d4rl is only a table of URLs here: what it asks for is never installed
# override-dependencies = [
#   "click; python_version < '0'", "dm-control; python_version < '0'",
#   "gym; python_version < '0'", "mjrl; python_version < '0'",
#   "mujoco-py; python_version < '0'", "pybullet; python_version < '0'",
#   "termcolor; python_version < '0'",
# ]
# ///
"""Start many runs of the scripts, here or on a SLURM cluster, and make tables of their results.

    python sweep.py run --scripts ampl.py mopo.py --env-ids pen-human-v1 --seeds 0 1 --dir sweeps/a
    python sweep.py run --scripts combo.py --env-ids hopper-medium-v2 --dir sweeps/b \\
        --grid beta=0.5,1,5 real_fraction=0.5,0.8 -- --total-iterations 300000
    python sweep.py status sweeps/a
    python sweep.py report sweeps/a

A set of runs is a folder. It has one job for each script, task, cell of the grid and seed, and each
job has a folder in it: its log.txt, and the folder of its run. What stands after `--` goes to every
script. All that is known of a job is read from its folder, so that the same `run` goes on after a
kill, a time limit or a failure, and the same `run` with one more seed starts only what is missing.
`report` takes any folder that has runs somewhere in it, also runs that were started by hand.
"""

import atexit
import contextlib
import difflib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import types
import typing
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

try:
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    import seaborn as sns
    import submitit
    import torch
    import tyro
    from scipy import stats
except ImportError as error:
    sys.exit(f"sweep.py needs {error.name}: pip install -r requirements.txt")


# ===== 1. Arguments ===============================================================================
# The types of numbers, with the range that a value must lie in, as in the scripts.
class Range(NamedTuple):
    """From `low` to `high`, both included."""

    low: float
    high: float


Count = Annotated[int, Range(1, 10**6), tyro.conf.arg(metavar="INT>=1")]
CountOrZero = Annotated[int, Range(0, 10**6), tyro.conf.arg(metavar="INT>=0")]
Seed = Annotated[int, Range(0, 2**32 - 1), tyro.conf.arg(metavar="0..2^32-1")]
Hours = Annotated[float, Range(1 / 60, 10**6), tyro.conf.arg(metavar="HOURS>0")]


@dataclass
class Run:
    """Start what is missing of a set: a job for each script, task, cell of the grid and seed."""

    scripts: tuple[str, ...]  # ampl.py, ablations/ampl_nw.py, a copy of your own
    env_ids: tuple[str, ...]  # tasks
    dir: str  # the set's folder
    seeds: tuple[Seed, ...] = (0,)  # a run each
    grid: tuple[str, ...] = ()  # flags and their values, as beta=0.5,1 "hidden=64 64,400 300"
    parallel: CountOrZero = 0  # jobs at a time (0: as many as GPUs or cores allow, on SLURM 256)
    gpus: CountOrZero = min(1, torch.cuda.device_count())  # GPUs of a job (on SLURM name it)
    jobs_per_gpu: Count = 1  # jobs that share a GPU (here; on SLURM the cluster decides it)
    hours: Hours = 24.0  # time limit on SLURM (a longer job is requeued and goes on)
    dry_run: bool = False  # print the commands and start nothing
    cluster: Literal["local", "slurm"] = "local"  # where the jobs run
    slurm_partition: str | None = None  # SLURM's partition (default: the cluster's)
    slurm_cpus: Count = 4  # cores of a job on SLURM (more wishes: sbatch's variables)


# Flags of the scripts that sweep.py sets itself, or with which a script would not train.
TAKEN = ("env_id", "seed", "run_dir", "resume", "evaluate", "select", "probe_uncertainty")
# Flags that only concern how a run is run. Runs that differ in nothing else are of one cell.
ONLY_RUNNING = (
    "track",
    "wandb_project_name",
    "wandb_entity",
    "capture_video",
    "log_every",
    "model_log_every",
    "pictures_every",
    "checkpoint_every",
    "async_envs",
    "cuda_graphs",
    "cpu_fast_matmul",
    "threads",
)
# Flags that act through something which result.json has beside them: the checksum of the dataset,
# and the device.
SEEN_OTHERWISE = ("dataset_path", "cuda")


def check_lists(args: Run) -> None:
    """Refuse lists that name nothing or something twice. Raises SystemExit."""
    for name in ("scripts", "env_ids", "seeds"):
        values = getattr(args, name)
        flag = "--" + name.replace("_", "-")
        if not values:
            sys.exit(f"{flag} names nothing: give it at least one value")
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            sys.exit(f"{flag} names {value} twice: name it once")


def check_ranges(args: Run) -> None:
    """Refuse numbers outside the range that their type names. Raises SystemExit."""
    for name, kind in typing.get_type_hints(Run, include_extras=True).items():
        value = getattr(args, name)
        values = [value]
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            values = value
        for limit in getattr(kind, "__metadata__", ()):
            for number in values:
                if isinstance(limit, Range) and not limit.low <= number <= limit.high:
                    flag = "--" + name.replace("_", "-")
                    bounds = f"at least {limit.low:.2g} and at most {limit.high:.10g}"
                    sys.exit(f"{flag} is {number}, but must be {bounds}")


def check_place(args: Run) -> None:
    """Refuse wishes that this machine or SLURM cannot meet. Raises SystemExit."""
    if args.cluster == "slurm":
        if args.jobs_per_gpu > 1:
            sys.exit("--jobs-per-gpu is for this machine: on SLURM ask for a part of a GPU instead")
        return
    if args.slurm_partition:
        sys.exit("--slurm-partition needs --cluster slurm")
    cards = visible_cards()
    if args.gpus > len(cards):
        sys.exit(f"this machine has {len(cards)} GPUs: lower --gpus")
    if args.gpus == 0 and args.jobs_per_gpu > 1:
        sys.exit("--jobs-per-gpu needs jobs that have a GPU: raise --gpus, or leave it out")
    if args.gpus > 0:
        places = len(cards) // args.gpus * args.jobs_per_gpu
        if args.parallel > places:
            sys.exit(f"{places} jobs fit the GPUs: lower --parallel or raise --jobs-per-gpu")


def check_folder(args: Run, flags: list[str]) -> None:
    """Refuse a folder that is none, or that is a set of other flags. Raises SystemExit."""
    folder = Path(args.dir)
    if not args.dir or (folder.exists() and not folder.is_dir()):
        sys.exit(f"--dir {args.dir or '(empty)'} is no folder: name another one")
    path = folder / "flags"
    if not path.exists():
        return
    try:
        first = read_json(path)["after --"]
        first_words = shlex.join(first)
    except (OSError, ValueError, LookupError, TypeError):
        begun = [*folder.glob("*__*__*/*/args.json"), *folder.glob("*__*__*/slurm_id")]
        if not begun:
            print(f"note: {path} is damaged and written anew, since no job has begun")
            return
        sys.exit(
            f"{path} is empty, cut or of an older sweep.py: name another --dir,"
            " or delete that file if all jobs of the set have the flags that you give now"
        )
    if first != flags:
        sys.exit(f"{args.dir} is a set of other flags ({first_words}): name another --dir")


def flag_names(flags: list[str]) -> set[str]:
    """The names in a command line, as the fields of Args are called: {"tf32"} of ["--no-tf32"]."""
    names = set()
    for word in flags:
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            names.add(name.removeprefix("no_"))
    return names


def parse_grid(words: tuple[str, ...], flags: list[str]) -> list[dict[str, str]]:
    """The cells of a grid: value by flag, for each combination of the values.

    Args:
        words: what stands after --grid, such as ("beta=0.5,1", "real-fraction=0.5,0.8").
        flags: what stands after `--`, which may not name a flag of the grid again.

    Raises SystemExit. Without a grid there is one cell, which sets nothing.
    """
    grid = {}
    for word in words:
        name, _, text = word.partition("=")
        name = name.strip("-").replace("-", "_")
        values = [value.strip() for value in text.split(",")]
        if not name or not all(values):
            sys.exit(f"--grid {word}: write name=value,value")
        if any(part.startswith("--") for value in values for part in value.split()):
            sys.exit(f"--grid {word}: a value may hold no flag: write that as name=value, too")
        if name in TAKEN:
            sys.exit(f"--grid {word}: sweep.py sets that flag itself, or nothing would be trained")
        if name in ONLY_RUNNING:
            sys.exit(f"--grid {word}: it does not change what is learned; give it after --")
        if name in grid or name in flag_names(flags):
            sys.exit(f"--grid {word}: the flag is named twice; name it once, there or after --")
        grid[name] = values
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


# ===== 2. The set of jobs =========================================================================
class Job:
    """A run in a folder of its own. submitit calls it, in a process here or on a node.

    Args:
        folder: the job's folder, into which its run's folder goes.
        script: the script to run.
        flags: the script's flags, for a run that starts anew.
    """

    def __init__(self, folder: Path, script: Path, flags: list[str]):
        self.folder = folder
        self.script = script
        self.flags = flags
        self.cards: str | None = None  # CUDA_VISIBLE_DEVICES of the job (None: as SLURM has it)

    def command(self) -> list[str]:
        """The script and its flags: it goes on from the newest checkpoint, if there is one."""
        saved = sorted(self.folder.glob("*/checkpoint.pt"), key=os.path.getmtime)
        if saved:
            return [str(self.script), "--resume", str(saved[-1].parent)]
        return [str(self.script), *self.flags]

    def __call__(self) -> None:
        """Run the script in this process, where submitit's signals reach it."""
        with open(self.folder / "lock", "w") as lock, open(self.folder / "log.txt", "ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)  # where two `run` started this job, one waits here
            if job_result(self.folder) is not None:
                return
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.register_at_fork(after_in_child=reset_signals)
            if self.cards is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = self.cards
            sys.argv = self.command()
            sys.path.insert(0, str(self.script.parent))  # as `python script.py` does
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except (Exception, SystemExit) as error:
                requeued = -1  # submitit leaves with this code when SLURM is to run the job again
                if getattr(error, "code", 1) not in (None, 0, requeued):
                    reason = " ".join(str(error).split()) or repr(error)
                    atexit.register(print, "failed:", reason)  # the log's last line, see `state`
                raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What SLURM is to run again. submitit calls this shortly before the time limit."""
        return submitit.helpers.DelayedSubmission(self)


def reset_signals() -> None:
    """Give a process that the job forks, such as an environment, the usual meaning of signals.

    submitit's handlers, which it would inherit, are for the job's own process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def make_jobs(args: Run, flags: list[str]) -> list[Job]:
    """All jobs of the set, whose flags, tasks and data the scripts themselves have found right.

    Args:
        args: the command line before `--`.
        flags: the command line after `--`.

    Raises SystemExit at the first thing that a script would refuse.
    """
    taken = flag_names(flags) & set(TAKEN)
    if taken:
        flag = "--" + sorted(taken)[0].replace("_", "-")
        sys.exit(f"leave out {flag}: sweep.py sets it itself, or the scripts would not train")
    cells = parse_grid(args.grid, flags)
    scripts = [Path(name).resolve() for name in args.scripts]
    check_scripts(scripts)
    jobs = []
    for script in scripts:
        settings, module = load_script(script)
        for env_id in args.env_ids:
            module.try_env(env_id).close()  # which suggests the right name of a mistyped task
            for cell in cells:
                words = cell_flags(cell, settings, script)
                given = judge(settings, module, ["--env-id", env_id, *words, *flags], script)
                data = module.find_dataset(given, may_fetch=not args.dry_run)
                if given.dataset_path and not data.exists():
                    sys.exit(f"there is no dataset {given.dataset_path}: see --dataset-path")
                if not data.exists():
                    print(f"note: there is no {data} yet: `run` fetches it", file=sys.stderr)
                parts = [env_id, script.stem]
                if cell:
                    parts.append(cell_label(cell, given))
                jobs += jobs_of_cell(args, parts, script, [*words, *flags])
    check_names(jobs)
    return jobs


def jobs_of_cell(args: Run, parts: list[str], script: Path, flags: list[str]) -> list[Job]:
    """A job for each seed. `parts` are the words of the folders' names, the first is the task."""
    jobs = []
    for seed in args.seeds:
        name = "__".join([*parts, str(seed)]).replace("/", "-").replace(" ", "-")
        folder = Path(args.dir).resolve() / name
        own = ["--env-id", parts[0], "--seed", str(seed), "--run-dir", str(folder)]
        jobs.append(Job(folder, script, own + flags))
    return jobs


def check_scripts(scripts: list[Path]) -> None:
    """Refuse scripts that are missing or cannot be told apart by name. Raises SystemExit."""
    names = [script.stem for script in scripts]
    for script in scripts:
        if not script.is_file():
            sys.exit(f"there is no script {script}: check the path after --scripts")
        if names.count(script.stem) > 1:
            sys.exit(f"two scripts are named {script.stem}: rename one of them")
        if "." in script.stem or script.suffix != ".py":
            sys.exit(f"{script} cannot be imported: rename it to a name with one dot, as mine.py")
        if script.stem in sys.stdlib_module_names:
            sys.exit(f"{script} hides Python's own module {script.stem}: rename it")


def load_script(script: Path) -> tuple[type, types.ModuleType]:
    """A script's class of settings, and the module whose functions read them and find the data.

    These are two modules where the script derives its method from another script's. Raises
    SystemExit.
    """
    sys.path.insert(0, str(script.parent))
    try:
        module = importlib.import_module(script.stem)
    except Exception as error:  # whatever the script's own lines raise
        sys.exit(f"{script} cannot be imported: mend {error!r}, which it raises")
    found = Path(getattr(module, "__file__", None) or "").resolve()
    if found != script:
        sys.exit(f"{script} has the name of {found}: rename it")
    settings = getattr(module, "Args", object)
    for kind in settings.__mro__:
        base = sys.modules[kind.__module__]
        if hasattr(base, "parse_args") and hasattr(base, "find_dataset"):
            return settings, base
    sys.exit(f"{script} does not train on a dataset: name ampl.py or one made like it")


def cell_flags(cell: dict[str, str], settings: type, script: Path) -> list[str]:
    """The words of a command line that set the flags of a cell. Raises SystemExit."""
    types_of = typing.get_type_hints(settings)
    unused = getattr(settings, "without", ())  # beginnings of flags that a variant does not have
    names = [field.name for field in fields(settings) if not field.name.startswith(unused)]
    words = []
    for name, text in cell.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see `python {script.name} --help`"
            sys.exit(f"--grid {name}: {script.name} has no flag of that name; {hint}")
        flag = "--" + name.replace("_", "-")
        if types_of[name] is not bool:
            words += [flag, *text.split()]
        elif text.lower() in ("true", "false"):
            words.append(flag if text.lower() == "true" else flag.replace("--", "--no-", 1))
        else:
            sys.exit(f"--grid {name}={text}: its values are True and False")
    return words


def cell_label(cell: dict[str, str], given) -> str:
    """A cell as part of a folder's name, with values as the script reads them: 1 and 1.0 are one.

    `given` is the script's settings with the cell's values.
    """
    parts = []
    for name in sorted(cell):
        value = getattr(given, name)
        if isinstance(value, tuple):
            value = "-".join(map(str, value))
        parts.append(f"{name}={value}")
    return ",".join(parts)


def judge(settings: type, module: types.ModuleType, words: list[str], script: Path):
    """The settings that a script makes of a command line. Raises SystemExit where it refuses it."""
    try:
        return module.parse_args(settings, words)
    except SystemExit as error:
        if not isinstance(error.code, str):  # the parser has printed what it has to say
            raise
        sys.exit(f"{script.name} refuses {shlex.join(words)}: {error.code}")


def check_names(jobs: list[Job]) -> None:
    """Refuse jobs that would share a folder, and names no folder can have. Raises SystemExit."""
    seen = set()
    for job in jobs:
        name = job.folder.name
        if name in seen:
            sys.exit(f"two jobs would be called {name}: name each value of --grid once")
        if len(os.fsencode(name)) > 255:
            sys.exit(f"{name} is too long for a folder: give --grid fewer flags or shorter values")
        seen.add(name)


# ===== 3. Running them ============================================================================
def run(args: Run, flags: list[str]) -> None:
    """Start the jobs that are neither done nor in SLURM's hands.

    Args:
        args: the command line before `--`.
        flags: the command line after `--`, which goes to every script.

    Raises SystemExit. Whatever is wrong with the command is said before any job starts.
    """
    check_lists(args)
    check_ranges(args)
    check_place(args)
    check_folder(args, flags)
    settled = ("done", "queued") if args.cluster == "local" else ("done", "queued", "running")
    waiting = []
    for job in make_jobs(args, flags):
        now = state(job.folder)
        if now["state"] == "damaged":
            sys.exit(f"{job.folder}: {now['note']}")
        if now["state"] not in settled:
            waiting.append(job)
    if not waiting:
        print("everything is done or in SLURM's hands")
        return
    workers = count_workers(args, len(waiting))
    if "threads" not in flag_names(flags):
        share_cores(args, waiting, workers)
    if args.dry_run:
        if args.cluster == "slurm":
            wishes = [f"{name}={value}" for name, value in slurm_wishes(args, workers).items()]
            print(f"# an array of {len(waiting)} jobs on SLURM, with {', '.join(wishes)}")
        for job in waiting:
            print(shlex.join(["python", *job.command()]))
        return
    write_file(Path(args.dir, "flags"), json.dumps({"after --": flags}).encode())
    for job in waiting:
        make_folder(job.folder)
    os.environ["PYTHONSAFEPATH"] = "1"  # a module in the present folder must not hide another one
    if args.cluster == "local":
        run_here(args, waiting, workers)
    else:
        run_on_slurm(args, waiting, workers)


def count_workers(args: Run, waiting: int) -> int:
    """How many of the waiting jobs run at the same time."""
    if args.parallel:
        most = args.parallel
    elif args.cluster == "slurm":
        most = 256
    elif args.gpus:
        most = len(visible_cards()) // args.gpus * args.jobs_per_gpu
    else:
        most = core_count()
    return min(most, waiting)


def core_count() -> int:
    """The CPU cores that this process may use, which taskset and containers limit."""
    return len(os.sched_getaffinity(0))


def share_cores(args: Run, jobs: list[Job], workers: int) -> None:
    """Give each job --threads. By default torch would take all cores for each of them."""
    if args.cluster == "local":
        threads = max(1, core_count() // workers)
        if not args.dry_run:
            have = f"jobs at a time: {workers}, CPU cores: {core_count()}"
            print(f"{have}, so each new run gets --threads {threads}", flush=True)
    else:
        threads = args.slurm_cpus
    for job in jobs:
        job.flags = [*job.flags, "--threads", str(threads)]


def submitit_folder(args: Run) -> Path:
    """Where submitit keeps its own files of this `run`."""
    return Path(args.dir).resolve() / "submitit" / time.strftime("%Y%m%d-%H%M%S")


# ----- here -----
def visible_cards() -> list[str]:
    """This machine's GPUs, each by the name that CUDA_VISIBLE_DEVICES has for it.

    A name is a number, a UUID or that of a part of a GPU (MIG). It goes on to the jobs as it is:
    numbers of our own would be other cards. CUDA uses the names up to the first that is none, and
    only the first MIG name, but here each job is another process.
    """
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [str(number) for number in range(count)]
    cards = [name.strip() for name in names.split(",")]
    if count > 0 and all(card.startswith("MIG-") for card in cards):
        return cards
    return cards[:count]


def card_groups(args: Run) -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES that jobs may have: --gpus cards each, or none."""
    if args.gpus == 0:
        return [""]
    cards = visible_cards()
    groups = []
    for first in range(0, len(cards) - args.gpus + 1, args.gpus):
        groups.append(",".join(cards[first : first + args.gpus]))
    return groups


def run_here(args: Run, waiting: list[Job], workers: int) -> None:
    """Run the jobs in processes of this machine, `workers` at a time, until all have ended.

    Raises SystemExit with code 1 where a job did not end well, and at Ctrl-C, which stops the jobs.
    """
    executor = submitit.LocalExecutor(submitit_folder(args))
    executor.update_parameters(timeout_min=60 * 24 * 365)  # it needs a limit; here there is none
    quiet_submitit(executor.folder)
    waiting = list(waiting)
    running = []  # pairs of a job and submitit's handle of its process
    groups = card_groups(args)
    failed = 0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                load = Counter(other.cards for other, _ in running)
                job.cards = min(groups, key=lambda cards: load[cards])
                running.append((job, executor.submit(job)))
            for job, handle in list(running):
                if handle.done():
                    running.remove((job, handle))
                    end = state(job.folder)
                    print(*end.values(), flush=True)
                    if end["state"] != "done":
                        failed += 1
            time.sleep(0.2)
    except KeyboardInterrupt:
        for _, handle in running:
            handle.cancel()
        sys.exit("stopped; the same command goes on from the last checkpoints")
    if failed:
        sys.exit(f"jobs that did not end well: {failed}; the same command tries them again")


def quiet_submitit(folder: Path) -> None:
    """Send what submitit's processes say at Ctrl-C, which is tracebacks, to a file.

    They inherit file descriptor 2. This process goes on to write its errors to the terminal.
    """
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(folder / "stderr.txt", os.O_WRONLY | os.O_CREAT), 2)


# ----- on SLURM -----
def slurm_wishes(args: Run, workers: int) -> dict[str, str | int | None]:
    """What submitit asks SLURM for, by sbatch's names."""
    return {
        "job_name": "sweep",
        "partition": args.slurm_partition,
        "time": max(1, round(60 * args.hours)),  # minutes
        "signal_delay_s": 30,
        "array_parallelism": workers,
        "cpus_per_task": args.slurm_cpus,
        "gpus_per_node": args.gpus or None,
    }


def run_on_slurm(args: Run, waiting: list[Job], workers: int) -> None:
    """Hand the jobs over to SLURM as an array, of which `workers` run at a time.

    Raises SystemExit with sbatch's own words where SLURM does not take them.
    """
    try:
        executor = submitit.SlurmExecutor(submitit_folder(args), max_num_timeout=20)
        executor.update_parameters(**slurm_wishes(args, workers))
        with executor.batch():
            handles = [executor.submit(job) for job in waiting]
    except Exception as error:  # submitit has several kinds for a missing or unwilling sbatch
        reason = " ".join(str(error).split())[-300:]
        sys.exit(f"SLURM did not take the jobs, mend this and try again: {reason}")
    for job, handle in zip(waiting, handles):
        write_file(job.folder / "slurm_id", handle.job_id.encode())
    print(f"SLURM has {len(waiting)} jobs; see `python sweep.py status {args.dir}`")


# ----- files -----
def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is always the old one or the new one as a whole.

    Raises SystemExit where the disk refuses it.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write it, too
    make_folder(path.parent)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the new name might be on the disk before the content
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        sys.exit(f"cannot write {path} ({error}): make room or change its rights, then try again")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises SystemExit where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"cannot make the folder {folder} ({error}): name another --dir")


def read_json(path: Path):
    """What a JSON file holds. Raises OSError, or ValueError where it is empty or cut."""
    return json.loads(path.read_text())


# ===== 4. Status ==================================================================================
# The scripts print their progress as tqdm does, a line a minute: the name of the loop, what is
# done, and the time that it took and will take, as in "ampl:  33% 100/300 [00:10<00:20, 10.0it/s]".
# A loop whose end is not known has no total and no time left: "model: 12it [00:05, 2.4it/s]".
PROGRESS = re.compile(r"^([^:\n]+): .*?(\d+/\d+|\d+it) \[([^,\]]*)", re.MULTILINE)
# A line that the scripts print after an evaluation, such as "iteration 1000: score 12.3".
EVALUATION = re.compile(r"iteration \d+: (.*)")


def status(dir: tyro.conf.Positional[str]) -> None:
    """What is done, running (progress, score, time left), queued, failed or stopped.

    Args:
        dir: the set's folder.

    Raises SystemExit with code 1 where a job has failed, or where there is none.
    """
    folders = sorted(Path(dir).glob("*__*__*"))
    if not folders:
        sys.exit(f"{dir} holds no jobs of sweep.py: name the --dir of a `run`")
    table = pd.DataFrame([state(folder) for folder in folders])
    print(table.to_string(index=False))
    if table["state"].isin(["failed", "damaged"]).any():
        sys.exit(1)


def state(folder: Path) -> dict[str, str]:
    """A job's row in the table of `status`, from the files in its folder."""
    row = {"state": "", "job": folder.name, "progress": "", "evaluation": "", "note": ""}
    text = read_log(folder)
    last_line = text.split("\n")[-1]
    note = "starting"
    progress = PROGRESS.findall(text)
    if progress:
        name, done, times = progress[-1]
        row["progress"] = f"{name} {done}"
        left = times.partition("<")[2]
        note = f"{left} left" if left else ""
    evaluations = EVALUATION.findall(text)
    if evaluations:
        row["evaluation"] = evaluations[-1].strip()
    try:
        result = job_result(folder)
    except ValueError as error:
        row["state"] = "damaged"
        row["note"] = str(error)
        return row
    if result is not None:
        row["state"] = "done"
        row["progress"] = str(result.get("total_iterations", ""))
    elif is_running(folder):
        row["state"] = "running"
        row["note"] = note
    elif is_queued(folder):
        row["state"] = "queued"
    else:
        row["state"] = "failed" if last_line.startswith("failed: ") else "stopped"
        row["note"] = last_line[-200:]
    return row


def read_log(folder: Path) -> str:
    """The last part of a job's log. A progress bar's states stand on lines of their own."""
    path = folder / "log.txt"
    if not path.is_file():
        return ""
    text = path.read_text(errors="replace")[-100_000:]
    return text.replace("\r", "\n").rstrip()


def job_result(folder: Path) -> dict | None:
    """What the job's result.json holds, or None. Raises ValueError where it is damaged."""
    damaged = ""
    for path in sorted(folder.glob("*/result.json")):
        try:
            result = read_json(path)
            if is_extended(path):
                continue
            if isinstance(result, dict):
                return result
            damaged = path
        except (OSError, ValueError):
            damaged = path
    if damaged:
        raise ValueError(f"{damaged} is empty or cut: delete it, and `run` makes it anew")
    return None


def is_extended(path: Path) -> bool:
    """Has the run of this result.json been resumed for more iterations, and not yet done them?"""
    try:
        wanted = read_json(path.with_name("args.json"))["total_iterations"]
        return read_json(path)["total_iterations"] < wanted
    except (OSError, ValueError, LookupError, TypeError):  # `report` may have a result.json alone
        return False


def is_running(folder: Path) -> bool:
    """Does a process hold the job's lock? It may be of another `run`, and on another node."""
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock yet
        return False
    return False


def is_queued(folder: Path) -> bool:
    """Is the job waiting in SLURM's queue?"""
    path = folder / "slurm_id"
    return path.exists() and path.read_text() in slurm_queue()


@functools.cache
def slurm_queue() -> list[str]:
    """The ids of the user's jobs that SLURM has. A command asks once: a set may have hundreds."""
    return subprocess.getoutput("squeue --me -hro %i").split()


# ===== 5. Report ==================================================================================
# Numbers of result.json, each with the title of its table.
METRICS = {
    "mean_last_ten": "Mean of the last ten",
    "last": "Last",
    "final_mean": "Final episodes",
}


def report(dir: tyro.conf.Positional[str]) -> None:
    """Tables (report.md), every run's numbers (scores.csv), curves.png and bars.png.

    Args:
        dir: a folder with runs somewhere in it. The four files are written there.

    Raises SystemExit where no run can be read.
    """
    notes = []
    runs = read_runs(dir, notes)
    shown = name_methods(runs, notes)
    runs = newest_of_each_seed(runs, shown, notes)

    text = (
        "Mean +- standard deviation over seeds (how many). Ranks and averages are over the tasks"
        " that every method has;\naverage and IQM (the mean of the middle half, with a bootstrap"
        " interval) only over those with D4RL's scores.\n\n"
    )
    for note in notes:
        text += f"- {note}\n"
    cells = cell_table(runs, shown).to_markdown(index=False, disable_numparse=True)
    text += f"\n## Cells\n\n{cells}\n"
    for metric, title in METRICS.items():
        text += f"\n## {title}\n\n{method_table(runs, metric).to_markdown()}\n"

    folder = Path(dir)
    numbers = runs.drop(columns=["curve", "settings"])
    write_file(folder / "scores.csv", numbers.to_csv(index=False).encode())
    write_file(folder / "report.md", text.encode())
    draw_curves(runs, folder / "curves.png")
    draw_bars(runs, folder / "bars.png")
    print(text)  # comes last, so that a reader who closes the pipe loses no file


# ----- read -----
def read_runs(folder: str, notes: list[str]) -> pd.DataFrame:
    """All runs below a folder, a row each, the newest first. What is left out goes to `notes`.

    Raises SystemExit where nothing remains.
    """
    rows = []
    for path in sorted(Path(folder).rglob("result.json"), key=os.path.getmtime, reverse=True):
        if is_extended(path):
            notes.append(f"left out: {path} is that of fewer iterations than its run goes on to")
            continue
        try:
            rows.append(read_result(path))
        except KeyError as error:
            notes.append(f"left out: {path} lacks {error.args[0]}")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            notes.append(f"left out: {path} is damaged or of another version ({error})")
    if not rows:
        why = "; ".join(notes) or "name a folder with finished runs in it"
        sys.exit(f"{folder} holds no result.json to read: {why}")
    return pd.DataFrame(rows)


def read_result(path: Path) -> dict:
    """A run as a row. Raises KeyError with what is missing, or ValueError, TypeError and so on."""
    result = read_json(path)
    row = {
        "task": result["env_id"],
        "script": result["algo"],
        "seed": result["seed"],
        "measure": result.get("measure", "score"),
        "run": str(path.parent),
        "settings": read_settings(result, path.parent),
    }
    for metric in METRICS:
        row[metric] = number(result[metric], metric)
    # COMBO's measure for choosing among settings without a simulator; other methods have none.
    row["conservative_gap"] = math.nan
    if "conservative_gap" in result:
        row["conservative_gap"] = number(result["conservative_gap"], "conservative_gap")
    row["curve"] = []
    for iteration, score in result["curve"]:
        row["curve"].append((number(iteration, "curve"), number(score, "curve")))
    if not row["curve"]:
        raise ValueError("its curve is empty")
    return row


def number(value, name: str) -> float:
    """A number of result.json as a float. Raises ValueError where it is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r} and no number")
    return float(value)


def read_settings(result: dict, folder: Path) -> dict[str, str]:
    """All in which runs of one cell must agree, as texts by name.

    These are the flags, but for the seed, the run's own paths and what only concerns running; and
    beside them the data, the device, the code and the packages.
    """
    settings = {}
    for name, value in result["args"].items():
        if name not in (*TAKEN, *ONLY_RUNNING, *SEEN_OTHERWISE):
            settings[name] = str(value)
    code = hashlib.sha256()
    for script in sorted(folder.glob("*.py")):
        code.update(script.read_bytes())
    settings["data"] = result["sha256"][:7]
    settings["device"] = result["device"].split(":")[0]  # which of a machine's cards is all one
    settings["measure"] = str(result.get("measure", "score"))
    settings["code"] = code.hexdigest()[:7]
    for package, version in result["versions"].items():
        settings[package] = str(version)
    return settings


# ----- cells -----
def name_methods(runs: pd.DataFrame, notes: list[str]) -> list[str]:
    """Tell apart what must not be averaged. -> the settings that the tables show

    A method is a script and the settings in which its runs on one task differ. The column `method`
    is added in place, and a column for each of these settings. Settings that differ only from task
    to task, such as a paper's own for each task, are named in `notes` instead.
    """
    settings = pd.DataFrame(list(runs["settings"]), index=runs.index).fillna("-")
    runs["method"] = runs["script"]
    shown = []
    for script, own in runs.groupby("script"):
        values = settings.loc[own.index]
        most_per_task = values.groupby(own["task"]).nunique().max()
        differs = list(values.columns[most_per_task > 1])
        for name in differs:
            runs.loc[own.index, "method"] += " " + name + "=" + values[name]
        shown += differs
        by_task = []
        for name in values.columns[values.nunique() > 1]:
            if name not in [*differs, "data", "measure"]:
                by_task.append(name)
        if by_task:
            notes.append(f"the averages of {script} mix tasks of other {', '.join(by_task)}")
    shown = list(dict.fromkeys(shown))
    for name in shown:
        if name not in runs:
            runs[name] = settings[name]
    return shown


def newest_of_each_seed(runs: pd.DataFrame, shown: list[str], notes: list[str]) -> pd.DataFrame:
    """The runs in the tables' order, without those that a newer run of the same cell repeats."""
    repeated = runs.duplicated(["task", "method", "seed"])  # the newest stands first
    for row in runs[repeated].itertuples():
        notes.append(f"left out: seed {row.seed} of {row.run}, which a newer run repeats")
    order = ["script", *shown, "task", "seed"]
    return runs[~repeated].sort_values(order, key=sort_keys, ignore_index=True)


def sort_keys(column: pd.Series) -> pd.Series:
    """Numbers by their size and before words, also where they are texts: 0.5, 5.0, 10.0, mixed."""
    numbers = pd.to_numeric(column, errors="coerce")
    ranks = numbers.rank(method="dense")
    words = column.astype(str).where(numbers.isna()).rank(method="dense")
    return ranks.fillna(len(column) + words)


def cell_table(runs: pd.DataFrame, shown: list[str]) -> pd.DataFrame:
    """A row for each cell: what it is, the number of its runs, and its numbers."""
    rows = []
    for _, cell in runs.groupby(["task", "method"], sort=False):
        first = cell.iloc[0]
        row = {"task": first["task"], "script": first["script"]}
        for name in shown:
            row[name] = first[name]
        row["measure"] = first["measure"]
        row["seeds"] = len(cell)
        for metric, title in METRICS.items():
            row[title.lower()] = mean_and_deviation(cell[metric], 1)
        if runs["conservative_gap"].notna().any():
            row["conservative_gap"] = mean_and_deviation(cell["conservative_gap"], 2)
        rows.append(row)
    return pd.DataFrame(rows).sort_values("task", kind="stable")


def mean_and_deviation(values: pd.Series, digits: int) -> str:
    """A cell's number, such as "12.3 +- 4.5"; "12.3" of a single run; "-" where there is none."""
    mean = values.mean()
    deviation = values.std()
    if math.isnan(mean):
        return "-"
    if math.isnan(deviation):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} +- {deviation:.{digits}f}"


# ----- methods -----
def method_table(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Tasks x methods, then averages over the tasks that every method has, as AMPL's Table 1.

    Only D4RL's tasks enter "average" and "IQM": the score of another task may be a return, which
    has no common scale. The interquartile mean and its interval are those of Agarwal et al., 2021.
    """
    groups = runs.groupby(["task", "method"])[metric]
    methods = list(dict.fromkeys(runs["method"]))
    mean = groups.mean().unstack()[methods].dropna()
    table = groups.agg(mean_and_count).unstack(fill_value="-")[methods]
    with_return = runs.loc[runs["measure"] == "return", "task"]
    scored = mean.index.intersection(d4rl_tasks()).difference(with_return)
    if len(mean):
        ranks = mean.rank(axis=1, ascending=False).mean()
        table.loc["mean rank"] = ranks.map("{:.2f}".format)
    if len(scored):
        table.loc["average"] = mean.loc[scored].mean().map("{:.1f}".format)
        for method in methods:
            samples = [groups.get_group((task, method)).to_numpy() for task in scored]
            table.loc["IQM [95 %]", method] = iqm_and_interval(samples)
    return table


def mean_and_count(values: pd.Series) -> str:
    """A cell of a table of tasks x methods, such as "12.3 +- 4.5 (3)"."""
    return f"{mean_and_deviation(values, 1)} ({len(values)})"


def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half of all numbers of all samples, along an axis of theirs."""
    together = np.concatenate(samples, axis=axis)
    return stats.trim_mean(together, 0.25, axis=axis)


def iqm_and_interval(samples: list[np.ndarray]) -> str:
    """IQM of the tasks' samples, with an interval if there are two runs of each task.

    The bootstrap draws the runs of each task anew.
    """
    text = f"{iqm(*samples):.1f}"
    if min(len(sample) for sample in samples) < 2:
        return text
    draws = stats.bootstrap(samples, iqm, method="percentile", rng=0)
    low, high = draws.confidence_interval
    return f"{text} [{low:.1f}, {high:.1f}]"


@functools.cache
def d4rl_tasks() -> list[str]:
    """The tasks that D4RL has reference scores of. Raises SystemExit where d4rl is missing.

    `import d4rl` would need mujoco_py, so the one file that holds the tables is run by itself.
    """
    package = importlib.util.find_spec("d4rl")
    if package is None:
        sys.exit("d4rl's tables are missing: pip install --no-deps d4rl==1.1")
    infos = os.path.join(package.submodule_search_locations[0], "infos.py")
    return list(runpy.run_path(infos)["REF_MIN_SCORE"])


# ----- pictures -----
def draw_curves(runs: pd.DataFrame, path: Path) -> None:
    """The mean of the evaluations against the iterations, with its standard deviation."""
    points = runs.explode("curve", ignore_index=True)
    points[["iteration", "score"]] = points["curve"].tolist()
    grid = sns.relplot(
        points,
        x="iteration",
        y="score",
        hue="method",
        col="task",
        col_wrap=min(4, points["task"].nunique()),
        errorbar="sd",
        kind="line",
        facet_kws={"sharey": False},
    )
    save_figure(grid, runs, path)


def draw_bars(runs: pd.DataFrame, path: Path) -> None:
    """The mean of the last ten evaluations of each method, with its standard deviation."""
    grid = sns.catplot(
        runs,
        x="method",
        y="mean_last_ten",
        hue="method",
        col="task",
        col_wrap=min(4, runs["task"].nunique()),
        errorbar="sd",
        kind="bar",
        sharey=False,
    )
    grid.tick_params(axis="x", labelrotation=20)
    save_figure(grid, runs, path)


def save_figure(grid: sns.FacetGrid, runs: pd.DataFrame, path: Path) -> None:
    """Label each task's axis with what is measured there, and save the picture."""
    for task, axes in grid.axes_dict.items():
        measures = runs.loc[runs["task"] == task, "measure"].unique()
        axes.set_ylabel(" or ".join(measures))
    picture = io.BytesIO()
    grid.savefig(picture, format="png")
    plt.close(grid.figure)
    write_file(path, picture.getvalue())


def main() -> None:
    """The command line. tyro reads what stands before `--`, the scripts read what follows."""
    words = sys.argv[1:]
    flags = []
    if "--" in words:
        cut = words.index("--")
        flags = words[cut + 1 :]
        words = words[:cut]
    commands = {"run": Run, "status": status, "report": report}
    args = tyro.extras.subcommand_cli_from_dict(commands, args=words)
    if isinstance(args, Run):
        run(args, flags)


if __name__ == "__main__":
    main()
