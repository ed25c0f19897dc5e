"""Run sets of scripts, tasks and seeds, here or on a SLURM cluster; make the papers' tables.

    python sweep.py run --scripts ampl.py mopo.py --env-ids pen-human-v1 --seeds 0 1 --dir sweeps/a
    python sweep.py {status,report} sweeps/a     # report: any folder with runs in it

What stands after `--` goes to every script. A set's state is what its jobs' folders hold (log.txt,
run), so the same `run` goes on after a kill, a time limit or a failure, or adds one more seed.
"""

import atexit
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

try:
    import numpy as np
    import pandas as pd
    import seaborn as sns
    import submitit
    import torch
    import tyro
    from scipy import stats
except ImportError as error:
    sys.exit(f"sweep.py needs {error.name}: pip install -r requirements.txt")


@dataclass
class Run:
    """Start what is missing of a set: a job for each script, task and seed."""

    scripts: tuple[str, ...]  # ampl.py, ablations/ampl_nw.py, a copy of your own
    env_ids: tuple[str, ...]
    dir: str  # the set's folder
    seeds: tuple[int, ...] = (0,)
    num_seeds: int = 1  # learners of one job, labelled seed, seed + 1, ...
    parallel: int = 0  # jobs at a time; 0: here one a GPU or one a core, on SLURM 256
    gpus: int = min(1, torch.cuda.device_count())  # of a job; on SLURM name it
    hours: float = 24.0  # on SLURM; longer jobs are requeued and go on (a model's fit must fit in)
    dry_run: bool = False  # print the commands, start nothing
    cluster: Literal["local", "slurm"] = "local"
    slurm_partition: str | None = None
    slurm_cpus: int = 4  # of a job; other wishes: sbatch's variables, such as SBATCH_ACCOUNT


class Job:
    """A run in a folder of its own. submitit calls it, in a process here or on a node."""

    def __init__(self, folder: Path, fresh: list[str]):
        self.folder, self.fresh = folder, fresh

    def command(self) -> list[str]:
        """A script and its flags: goes on from the newest checkpoint, else starts."""
        saved = sorted(self.folder.glob("*/checkpoint.pt"), key=os.path.getmtime)
        return [self.fresh[0], "--resume", str(saved[-1].parent)] if saved else self.fresh

    def __call__(self) -> None:
        with open(self.folder / "lock", "w") as lock, open(self.folder / "log.txt", "ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)  # where two `run` started this job, one waits here
            if any(self.folder.glob("*/result.json")):
                return
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            for n in (signal.SIGTERM, signal.SIGUSR2):  # submitit's handlers, not AsyncVectorEnv's
                os.register_at_fork(after_in_child=lambda n=n: signal.signal(n, signal.SIG_DFL))
            sys.argv = self.command()
            sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as `python script.py` does
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except (Exception, SystemExit) as error:
                if getattr(error, "code", 1) not in (0, -1):  # -1: submitit requeues it
                    atexit.register(print, "failed:", " ".join(str(error).split()) or repr(error))
                raise

    def checkpoint(self):  # called by submitit shortly before the time limit: what to requeue
        return submitit.helpers.DelayedSubmission(self)


def make_jobs(args: Run, flags: list[str], threads: int) -> list[Job]:
    """The whole set, judged by the scripts' own parser and simulators. Raises SystemExit."""
    taken = {"--env-id", "--seed", "--num-seeds", "--run-dir", "--resume", "--evaluate"}
    if taken & {flag.split("=")[0].replace("_", "-") for flag in flags}:
        sys.exit(f"sweep.py itself gives the scripts {', '.join(sorted(taken))}: not after --")
    jobs, home, scripts = [], Path(args.dir).resolve(), [Path(x).resolve() for x in args.scripts]
    for script in scripts:
        if not script.is_file() or [other.stem for other in scripts].count(script.stem) > 1:
            sys.exit(f"there is no script {script}, or two that are named {script.stem}")
        sys.path.insert(0, str(script.parent))
        module = importlib.import_module(script.stem)
        base = getattr(module, "ampl", module)  # an ablation has its parser and simulators there
        if not (hasattr(base, "find_dataset") and hasattr(module, "Args")):
            sys.exit(f"{script} does not train on a dataset: name ampl.py or one made like it")
        for env_id in args.env_ids:
            given = base.parse_args(module.Args, ["--env-id", env_id, *flags])
            base.make_env(env_id).close()
            if not args.dry_run and not base.find_dataset(given).exists():  # downloads it once
                sys.exit(f"there is no file {given.dataset_path}")
            for seed in args.seeds:
                folder = home / f"{env_id}__{script.stem}__{seed}".replace("/", "-")
                own = f"--env-id {env_id} --seed {seed} --num-seeds {args.num_seeds}".split()
                own += ["--threads", str(threads), "--run-dir", str(folder)]
                jobs.append(Job(folder, [str(script), *own, *flags]))
    return jobs or sys.exit("nothing to run: name --scripts and --env-ids")


def run(args: Run, flags: list[str]) -> None:
    """Starts what is neither done nor in SLURM's hands."""
    here, devices = args.cluster == "local", torch.cuda.device_count()
    cores, gap = len(os.sched_getaffinity(0)), np.diff(sorted(args.seeds), append=np.inf).min()
    if min(args.parallel, args.gpus, args.hours, args.num_seeds - 1, gap - args.num_seeds) < 0:
        sys.exit("negative numbers, --num-seeds 0, or --seeds less than --num-seeds apart")
    if here and (args.slurm_partition or args.gpus > devices):
        sys.exit(f"this machine has {devices} GPUs; --slurm-partition needs --cluster slurm")
    about, mine = Path(args.dir, "flags"), shlex.join([f"--num-seeds={args.num_seeds}", *flags])
    if about.exists() and (first := about.read_text()) != mine:
        sys.exit(f"{args.dir} is a set of other flags ({first}): name another --dir")
    parallel = args.parallel or (256 if not here else devices // args.gpus if args.gpus else cores)
    jobs = make_jobs(args, flags, max(1, cores // parallel) if here else args.slurm_cpus)
    settled = ("done", "queued") if here else ("done", "queued", "running")
    jobs = [job for job in jobs if state(job.folder)["state"] not in settled]
    if args.dry_run or not jobs:
        commands = [shlex.join(["python", *job.command()]) for job in jobs]
        return print("\n".join(commands) or "everything is done or in SLURM's hands")
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
    about.write_text(mine)
    folder = Path(args.dir).resolve() / "submitit" / time.strftime("%Y%m%d-%H%M%S")
    os.environ |= dict(PYTHONSAFEPATH="1", TQDM_MININTERVAL="5")  # no copy.py of here; short logs
    if here:
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=60 * 24 * 365)
        return run_here(jobs, executor, parallel, args.gpus)
    wish = dict(time=max(1, round(60 * args.hours)), signal_delay_s=30, array_parallelism=parallel)
    wish |= dict(cpus_per_task=args.slurm_cpus, gpus_per_node=args.gpus or None)
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=20)
        executor.update_parameters(job_name="sweep", partition=args.slurm_partition, **wish)
        with executor.batch():
            handles = [executor.submit(job) for job in jobs]
    except Exception as error:  # there is no srun, or sbatch's own words
        sys.exit(f"SLURM did not take the jobs: {' '.join(str(error).split())[-300:]}")
    for job, handle in zip(jobs, handles):
        (job.folder / "slurm_id").write_text(handle.job_id)
    print(f"SLURM has {len(jobs)} jobs; see `python sweep.py status {args.dir}`")


def run_here(waiting: list[Job], executor, parallel: int, gpus: int) -> None:
    """`parallel` jobs at a time; a process that is stopped or loses a job exits with 1."""
    running, failed, cards = {}, 0, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    cards = [int(x) for x in cards if x.isdigit()] or range(torch.cuda.device_count())
    sys.stderr = os.fdopen(os.dup(2), "w")  # submitit's own goes to a file: tracebacks at Ctrl-C
    os.dup2(os.open(executor.folder / "stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job, slot = waiting.pop(0), min(set(range(parallel)) - running.keys())
                visible = [cards[(slot * gpus + i) % len(cards)] for i in range(gpus)]
                executor.update_parameters(gpus_per_node=gpus, visible_gpus=visible)
                running[slot] = job, executor.submit(job)
            for slot in [slot for slot in running if running[slot][1].done()]:
                end = state(running.pop(slot)[0].folder)
                failed += end["state"] != "done"
                print(*end.values(), flush=True)
            time.sleep(0.2)
    except KeyboardInterrupt:
        for _, handle in running.values():
            handle.cancel()
        sys.exit("stopped; the same command goes on from the last checkpoints")
    if failed:
        sys.exit(f"{failed} jobs did not end well; the same command tries them again")


def state(folder: Path) -> dict[str, str]:
    """What a job's files say of it."""
    log, slurm = folder / "log.txt", folder / "slurm_id"
    text = log.read_text(errors="replace")[-100_000:].replace("\r", "\n") if log.is_file() else ""
    bars = re.findall(r"(\d+/\d+) \[[^<\]]*<([^,\]]*),[^,\]]*,? ?([^\]]*)\]", text)
    iteration, left, phase = bars[-1] if bars else ("", "", "")
    score = (re.findall(r"score (\[[^\]]*\])", text) or [""])[-1]  # of the last evaluation
    last = text.rstrip().split("\n")[-1]
    row = dict(state="", job=folder.name, iteration=iteration, score=score, note=last[-200:])
    if any(folder.glob("*/result.json")):
        return row | dict(state="done", note="")
    try:
        with open(folder / "lock") as lock:  # held by a job of whichever `run`, on whichever node
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            return row | dict(state="running", note=f"{left or '?'} left, {phase or 'starting'}")
    if slurm.exists() and slurm.read_text() in subprocess.getoutput("squeue --me -hro %i").split():
        return row | dict(state="queued", note="")
    return row | dict(state="failed" if last.startswith("failed: ") else "stopped")


def status(dir: tyro.conf.Positional[str]) -> None:
    """What is done, running (iteration, score, time left), queued, failed or stopped."""
    rows = [state(folder) for folder in sorted(Path(dir).glob("*__*__*"))]
    rows = pd.DataFrame(rows or sys.exit(f"{dir} holds no jobs of sweep.py"))
    print(rows.to_string(index=False))
    sys.exit(int((rows["state"] == "failed").any()))


METRICS = {"mean_last_ten": "Mean of the last ten", "last": "Last", "final_mean": "Final episodes"}
# What the runs of one method may differ in; a dataset counts by its content.
SKIP = "seed num_seeds env_id dataset_path run_dir resume threads track capture_video".split()


def read_learners(folder: str, notes: list[str]) -> pd.DataFrame:
    """Each learner of each result.json; `method` is the script and what its runs differ in."""
    rows = []
    for path in sorted(Path(folder).rglob("result.json"), key=os.path.getmtime, reverse=True):
        try:
            result = json.loads(path.read_text(), parse_constant=int)  # an error at NaN
            code = b"".join(map(Path.read_bytes, sorted(path.parent.glob("*.py"))))
            used = dict(data=result["sha256"][:7], code=hashlib.sha256(code).hexdigest()[:7])
            used |= {k: v for k, v in result["args"].items() if k not in SKIP} | result["versions"]
            run = dict(task=result["env_id"], script=result["algo"], run=path.parent, settings=used)
            curves, mine = np.array(result["curves"], float), []
            for i, seed in enumerate(result["seeds"]):
                run |= dict(seed=seed, curve=curves[:, [0, 1 + i]].tolist())
                mine.append(run | {metric: float(result[metric][i]) for metric in METRICS})
            rows += mine
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            notes.append(f"left out: {path} is damaged or of another version ({error!r})")
    learners = pd.DataFrame(rows or sys.exit(f"{folder} holds no result.json to read"))
    for script, its in learners.groupby("script"):
        settings = pd.DataFrame([*its["settings"]], its.index).astype(str)
        mixed = settings.columns[settings.groupby(its["task"]).nunique(dropna=False).max() > 1]
        other = settings.columns[settings.nunique(dropna=False) > 1].difference([*mixed, "data"])
        if len(other):  # such as the paper's own flags of a task; or versions
            notes.append(f"the averages of {script} mix tasks of other {', '.join(other)}")
        for row, values in settings[mixed].iterrows():
            learners.loc[row, "method"] = " ".join([script, *(f"{k}={values[k]}" for k in mixed)])
    again = learners.duplicated(["task", "method", "seed"])  # the newest stands first
    for row in learners[again].itertuples():
        notes.append(f"left out: seed {row.seed} of {row.run}, which a newer run repeats")
    return learners[~again].sort_values(["method", "task", "seed"])


def summary(learners: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Tasks x methods; then averages over the tasks that every method has, as AMPL's Table 1."""
    groups = learners.groupby(["task", "method"])[metric]
    mean, show = groups.mean().unstack().dropna(), "{:.1f} +- {:.1f} ({})".format
    iqm = lambda *tasks: stats.trim_mean(np.concatenate(tasks), 0.25)  # Agarwal et al., 2021
    cells = groups.agg(lambda x: show(x.mean(), x.std(), len(x))).unstack(fill_value="-")
    infos = Path(importlib.util.find_spec("d4rl").submodule_search_locations[0], "infos.py")
    scored = mean.index.intersection(runpy.run_path(str(infos))["REF_MIN_SCORE"])
    cells.loc["mean rank"] = mean.rank(axis=1, ascending=False).mean().map("{:.2f}".format)
    cells.loc["average"] = mean.loc[scored].mean().map("{:.1f}".format)
    for method in mean if len(scored) else ():
        tasks = [groups.get_group((task, method)).to_numpy() for task in scored]
        text = f"{iqm(*tasks):.1f}"
        if min(map(len, tasks)) > 1:  # the bootstrap draws the seeds of each task anew
            draws = stats.bootstrap(tasks, iqm, vectorized=False, method="percentile", rng=0)
            text += " [{:.1f}, {:.1f}]".format(*draws.confidence_interval)
        cells.loc["IQM [95 %]", method] = text
    return cells.map(lambda text: text.replace(" +- nan", ""))


def report(dir: tyro.conf.Positional[str]) -> None:
    """Tables (report.md), every learner's scores (scores.csv), curves.png and bars.png."""
    learners = read_learners(dir, notes := [])
    text = "Mean +- standard deviation over seeds (how many); averages: D4RL's tasks only.\n\n"
    text += "".join(f"- {note}\n" for note in notes)
    for metric, title in METRICS.items():
        text += f"\n## {title}\n\n{summary(learners, metric).to_markdown()}\n"
    Path(dir, "report.md").write_text(text)
    learners.drop(columns=["curve", "settings"]).to_csv(Path(dir, "scores.csv"), index=False)
    points = learners.explode("curve")
    points[["iteration", "score"]] = points["curve"].tolist()
    wrap = min(4, learners["task"].nunique())
    look = dict(hue="method", col="task", col_wrap=wrap, errorbar="sd")
    lines = dict(x="iteration", y="score", facet_kws=dict(sharey=False), kind="line", **look)
    sns.relplot(points, **lines).savefig(Path(dir, "curves.png"))
    bars = dict(x="method", y="mean_last_ten", sharey=False, kind="bar", **look)
    sns.catplot(learners, **bars).savefig(Path(dir, "bars.png"))
    print(text)


def main() -> None:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    commands = dict(run=Run, status=status, report=report)
    args = tyro.extras.subcommand_cli_from_dict(commands, args=sys.argv[1:cut])
    if isinstance(args, Run):
        run(args, sys.argv[cut + 1 :])


if __name__ == "__main__":
    main()
