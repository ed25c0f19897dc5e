"""Tries odd values of flags and damaged files, and reports what no user should meet.

    python tests/fuzz.py                  # 300 values and 100 files, about 10 minutes on a core
    python tests/fuzz.py --cases 40 --files 0 --seed 1

A finding is an exception other than SystemExit, a refusal that is no single sentence, a senseless
value or a damaged file that is taken, or a sound value or file that is refused. What is taken is
trained with for up to 20 s. All of it happens in this process, on the CPU, with 6 GiB of memory.
Exit status 1 if anything is found. It writes into a temporary folder only.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA needs more addresses than the limit below allows
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
import collect
import combo
import h5py
import mopo
import numpy as np
import sweep
import torch

ROOT = Path(ampl.__file__).parent
TASK = "maze2d-umaze-dense-v1"
# Flags of a run of about a second.
TINY_MODEL_RUN = """--total-iterations 12 --eval-every 12 --eval-episodes 1 --final-episodes 1
    --log-every 4 --checkpoint-every 6 --model-max-epochs 1 --model-batch-size 8 --model-hidden 8
    --ensemble-size 3 --num-elites 2 --holdout-size 20 --batch-size 16 --threads 1 --no-cuda
    --no-cpu-fast-matmul"""
TINY = {
    ampl: f"""{TINY_MODEL_RUN} --warmup-iterations 2 --eval-candidates 2 --model-retrain-every 6
        --model-epoch-steps 2 --rollout-every 4 --rollout-rows 60 --buffer-size 200 --hidden 8 8
        --noise-dim 2 --omega-steps 2 --omega-batch-size 8 --omega-initial-batch-size 8
        --num-initial-states 20""",
    mopo: f"""{TINY_MODEL_RUN} --rollout-every 4 --rollout-starts 20 --hidden 8 8
        --real-fraction 0.25""",
    combo: f"{TINY_MODEL_RUN} --rollout-every 4 --rollout-starts 20 --hidden 8 8 --num-actions 2",
    collect: """--steps 150 --sac-steps 160 --random-steps 40 --eval-every 40 --eval-episodes 1
        --medium-return -1000 --hidden 8 8 --batch-size 16 --no-cuda""",
    sweep: "--gpus 0",
}
TINY = {script: words.split() for script, words in TINY.items()}

# What a value of each kind may be mistaken for.
WHOLE = [
    "",
    "-1",
    "0",
    "1",
    "1.5",
    "1 2",
    "nan",
    "inf",
    "1000000000",
    "99999999999",
    "1e400",
    "many",
]
FRACTION = ["", "-1", "-0.1", "0", "1e-30", "2", "0.5 0.5", "nan", "inf", "-inf", "1e300", "many"]
TEXT = [""]
SWITCH = ["maybe", "2"]
CHOICE = ["", "other", "Policy", "1"]
SEVERAL = ["", "-1 -1", "nan nan", "many many", "1.5 inf"]

# Numbers that may be zero, negative, above 1. All others may not.
ZERO = [
    "seed",
    "warmup_iterations",
    "threads",
    "gamma",
    "real_fraction",
    "noise_std",
    "q_coef",
    "q_min_weight",
    "gan_beta1",
    "true_label_min",
    "penalty_coef",
    "beta",
    "target_entropy",
    "medium_return",
    "action_noise",
    "random_steps",
    "parallel",
    "gpus",
]
NEGATIVE = ["target_entropy", "medium_return"]
AT_MOST_ONE = [
    "gamma",
    "tau",
    "real_fraction",
    "q_min_weight",
    "gan_beta1",
    "true_label_min",
    "omega_tau",
]
# Numbers of which one, or a thousand million, contradicts the tiny run's others or any machine.
NOT_ONE = ["ensemble_size", "buffer_size", "sac_steps", "gpus"]
NOT_BILLION = [
    "threads",
    "gpus",
    "parallel",
    "jobs_per_gpu",
    "slurm_cpus",
    "num_elites",
    "rollout_rows",
    "warmup_iterations",
    "random_steps",
]
CONTRADICTIONS = [
    (ampl, "total_iterations", "1"),  # less than the warm-up
    (combo, "batch_size", "1"),  # of which the data's share is less than a row
    (combo, "real_fraction", "0"),
    (combo, "real_fraction", "1e-30"),
    (ampl, "batch_size", "1"),
    (ampl, "real_fraction", "1e-30"),
    (mopo, "batch_size", "1"),
    (mopo, "real_fraction", "1e-30"),
]
# Flags that contradict each other or make no sense together.
PAIRS = {
    ampl: [
        "--num-elites 4",
        "--rollout-rows 201",
        "--warmup-iterations 13",
        "--model-weight-decay 0 0 0 0",
        "--hidden 8",
        "--hidden 8 8 8",
        "--resume nowhere",
        "--resume nowhere --evaluate nowhere",
        "--evaluate nowhere --gamma 0.5",
        "--dynamics-from nowhere",
        "--dataset-path nowhere",
        "--dataset-path /dev/null",
        "--run-dir /dev/null",
        "--run-dir /proc/none",
        "--env-id CartPole-v1",
        "--env-id kitchen-mixed-v0",
        "--env-id ../../x",
        "--track --wandb-entity=",
    ],
    mopo: [
        "--num-elites 4",
        "--model-weight-decay 0 0 0 0 0 0",
        "--model-weight-decay 0 0 0 0 -1",
        "--resume nowhere",
        "--evaluate nowhere",
        "--rollout-actions data",
        "--penalty none",
    ],
    combo: [
        "--num-elites 4",
        "--real-fraction 0",
        "--real-fraction 0.01",
        "--real-fraction 1 --rho-states model",
        "--select nowhere",
        "--select",
        "--probe-uncertainty nowhere",
        "--evaluate nowhere --select nowhere",
    ],
    collect: [
        "--env-id maze2d-umaze-v1 --resume",
        "--env-id kitchen-mixed-v0",
        "--resume",
        "--random-steps 160",
        "--output /dev/null/x",
        "--output /",
        "--hidden",
    ],
    sweep: [
        "--seeds 0 0",
        "--seeds",
        "--env-ids nowhere-v0",
        "--env-ids",
        "--scripts nowhere.py",
        "--scripts tests/fuzz.py",
        "--dir /dev/null",
        "--hours 0",
        "--gpus 99",
        "--jobs-per-gpu 3",
        "--slurm-partition x",
        "--grid gamma=2",
        "--grid gamma=nan,0.5",
        "--grid gamma=0.5,0.50",
        "--grid hidden=8",
        "--grid hidden=",
        "--grid seed=1",
        "--grid =",
        "--grid gamma",
        "-- --gamma 2",
        "-- --seed 1",
        "-- --threads 1000000",
        "-- --resume nowhere",
    ],
}


class Case(NamedTuple):
    """A command line that is to be tried."""

    script: object  # the module
    words: list[str]  # what is added to the words of a tiny run
    senseless: bool  # must it be refused?


class Tried(NamedTuple):
    """What came of a command."""

    kind: str  # "refused", "taken", "slow" or "traceback"
    text: str  # the sentence, or the traceback


# ===== 1. Values ==================================================================================
def base_of(kind) -> object:
    """int of Annotated[int, ...] | None; tuple, Literal, bool, str and float likewise."""
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return get_origin(kind) or kind


def words_for(base) -> list[str]:
    """The odd values of a kind."""
    odd = {int: WHOLE, float: FRACTION, str: TEXT, bool: SWITCH, Literal: CHOICE, tuple: SEVERAL}
    return odd[base]


def is_senseless(script, name: str, base, text: str) -> bool:
    """Must the flag refuse this text? This is known without a look at the script's own ranges."""
    if (script, name, text) in CONTRADICTIONS:
        return True
    if base in (int, float):
        if text == "0":
            return name not in ZERO
        if text in ("-1", "-0.1"):
            return name not in NEGATIVE or (base is int and text == "-0.1")
        if text == "2":
            return name in AT_MOST_ONE
        if text == "1":
            return name in NOT_ONE
        if text == "1000000000":
            return name in NOT_BILLION
        return text != "1e-30"
    return True


def cases_of(script) -> list[Case]:
    """All odd values of all flags of a script, and what contradicts each other."""
    settings = sweep.Run if script is sweep else script.Args
    kinds = get_type_hints(settings, include_extras=True)
    cases = []
    for field in dataclasses.fields(settings):
        base = base_of(kinds[field.name])
        flag = "--" + field.name.replace("_", "-")
        for text in words_for(base):
            words = [flag, *text.split()]
            if text == "" and base is not tuple:
                words = [f"{flag}="]
            cases.append(Case(script, words, is_senseless(script, field.name, base, text)))
    for pair in PAIRS[script]:
        cases.append(Case(script, pair.split(), True))
    return cases


def choose(count: int, seed: int) -> list[Case]:
    """`count` cases of all scripts: as many of each as it has flags, and all pairs if they fit."""
    cases = []
    for script in TINY:
        cases += cases_of(script)
    rng = random.Random(seed)
    rng.shuffle(cases)
    return cases[:count]


# ===== 2. Trying ==================================================================================
class TooSlow(BaseException):
    """Twenty seconds are over. No `except Exception` catches this."""


def raise_too_slow(*_) -> None:
    raise TooSlow


def attempt(action, seconds: int = 20) -> Tried:
    """Call a function that a command line would, silently."""
    output = io.StringIO()
    signal.signal(signal.SIGALRM, raise_too_slow)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            action()
        tried = Tried("taken", "")
    except TooSlow:
        tried = Tried("slow", "")
    except SystemExit as stop:
        if stop.code in (0, None):
            tried = Tried("taken", "")
        elif isinstance(stop.code, str):
            tried = Tried("refused", stop.code)
        else:  # the parser has printed what it has to say
            tried = Tried("refused", "the parser: " + " ".join(output.getvalue().split())[:200])
    except BaseException:
        tried = Tried("traceback", traceback.format_exc())
    finally:
        signal.alarm(0)
    return tried


def run_command(script, words: list[str], place: Path) -> None:
    """What `python script.py words` does, beside the words of a tiny run. sweep.py only plans."""
    words = [*TINY[script], *words]
    if script is sweep:
        before = ["run", *words]
        after = [*TINY[ampl], "--dataset-path", str(place / "data.hdf5")]
        if "--" in words:
            before = before[: before.index("--")]
            after += words[words.index("--") + 1 :]
        usual = {"--scripts": f"{ROOT}/ampl.py", "--env-ids": TASK, "--dir": str(place / "set")}
        for flag, value in usual.items():
            if not any(word.split("=")[0] == flag for word in before):
                before += [flag, value]
        argv = [*before, "--", *after]
    elif script is collect:
        usual = ["--env-id", "hopper-medium-replay-v2", "--output", str(place / "collected.hdf5")]
        argv = [*usual, *words]
    else:
        usual = ["--env-id", TASK, "--dataset-path", str(place / "data.hdf5")]
        argv = [*usual, "--run-dir", str(place / "runs"), *words]
    if script in (ampl, mopo, combo) and {"--resume", "--evaluate"} & set(words):
        argv = words[len(TINY[script]) :]  # a saved run brings its own
    with contextlib.chdir(place):
        saved_argv = sys.argv
        sys.argv = [script.__file__, *argv]
        try:
            script.main()
        finally:
            sys.argv = saved_argv
            (place / "collected.hdf5").unlink(missing_ok=True)
            (place / "collected.hdf5.partial.pt").unlink(missing_ok=True)
            shutil.rmtree(place / "runs", ignore_errors=True)
            shutil.rmtree(place / "set", ignore_errors=True)


def finding(case: Case, tried: Tried) -> str | None:
    """What is wrong with how a command ended, or None."""
    command = f"{Path(case.script.__file__).name} {' '.join(case.words)}"
    if tried.kind == "traceback":
        return f"TRACEBACK {command}\n{tried.text}"
    if tried.kind == "refused" and "\n" in tried.text:
        return f"NO SENTENCE {command}: {tried.text}"
    if tried.kind in ("taken", "slow") and case.senseless:
        return f"TAKEN {command}"
    if tried.kind == "refused" and not case.senseless and "memory" not in tried.text:
        return f"REFUSED {command}: {tried.text}"
    return None


def try_values(cases: list[Case], place: Path) -> list[str]:
    """The findings among some cases."""
    findings = []
    for case in cases:
        tried = attempt(lambda: run_command(case.script, case.words, place))
        found = finding(case, tried)
        if found is not None:
            findings.append(found)
    return findings


# ===== 3. Damaged files ===========================================================================
def write_dataset(path: Path) -> None:
    """Three hundred rows of a random ball in 15 episodes, in D4RL's format."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(1, 1, (300, 4)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (300, 2)).astype(np.float32)
        file["rewards"] = rng.random(300).astype(np.float32)
        file["terminals"] = np.zeros(300, bool)
        file["timeouts"] = np.arange(300) % 20 == 19


def prepare(place: Path) -> None:
    """A dataset, a finished run of AMPL (`good`), and episodes of 15 steps."""
    for script in (ampl, mopo, combo):
        script.MAZE_LIMITS["umaze"] = 15
    sweep.run_here = do_nothing
    write_dataset(place / "data.hdf5")
    where = ["--env-id", TASK, "--dataset-path", str(place / "data.hdf5")]
    words = [*where, "--run-dir", str(place / "made"), *TINY[ampl]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = ampl.train(ampl.parse_args(ampl.Args, words))
    Path(result["folder"]).rename(place / "good")


def do_nothing(*_) -> None:
    """Stands for the start of jobs."""


# How each file is read again: the words for ampl.py; None is sweep.py's report.
READERS = {
    "args.json": ["--evaluate", "{run}"],
    "policy.pt": ["--evaluate", "{run}"],
    "checkpoint.pt": ["--resume", "{run}", "--total-iterations", "14"],
    "model.pt": ["--dynamics-from", "{run}"],
    "data.hdf5": ["--dataset-path", "{run}/data.hdf5"],
    "result.json": None,
}


def damage(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The content cut somewhere, or with one bit of it flipped, and what was done."""
    at = rng.randrange(len(content))
    if rng.random() < 0.25:
        return content[:at], f"cut at {at}"
    flipped = bytearray(content)
    flipped[at] ^= 1 << rng.randrange(8)
    return bytes(flipped), f"a bit flipped in byte {at} of {len(content)}"


def read_again(name: str, run: Path, place: Path) -> None:
    """What a user does with a run's folder."""
    if READERS[name] is None:
        sweep.report(str(run))
    else:
        words = [word.format(run=run) for word in READERS[name]]
        run_command(ampl, words, place)


def try_files(count: int, place: Path, seed: int) -> list[str]:
    """The findings among `count` damaged files: tracebacks, and what is taken in silence.

    JSON and HDF5 have no checksum of their own, so that a flipped bit may give another number,
    which nobody can tell from the right one. torch's files have one, but not of what pads them.
    """
    rng = random.Random(seed)
    findings = []
    shutil.copy(place / "data.hdf5", place / "good")
    for name in READERS:
        shutil.copytree(place / "good", place / "sound")
        tried = attempt(lambda: read_again(name, place / "sound", place))
        shutil.rmtree(place / "sound")
        if tried.kind != "taken":
            findings.append(f"REFUSED {name}, which is sound: {tried.text}")
    for number in range(count):
        name = list(READERS)[number % len(READERS)]
        run = place / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(place / "good", run)
        content, what = damage((run / name).read_bytes(), rng)
        (run / name).write_bytes(content)
        tried = attempt(lambda: read_again(name, run, place))
        if tried.kind == "traceback":
            findings.append(f"TRACEBACK {name}, {what}\n{tried.text}")
        elif tried.kind == "refused" and "\n" in tried.text:
            findings.append(f"NO SENTENCE {name}, {what}: {tried.text}")
        elif tried.kind in ("taken", "slow") and what.startswith("cut"):
            findings.append(f"TAKEN {name}, {what}")
        elif tried.kind in ("taken", "slow") and name.endswith(".pt"):
            (run / name).write_bytes(content)  # the run may have gone on
            if content_of(run / name) != content_of(place / "good" / name):
                findings.append(f"TAKEN {name}, {what}")
    return findings


def content_of(path: Path) -> bytes:
    """What torch reads in a file, written anew: equal bytes for equal content."""
    anew = io.BytesIO()
    torch.save(torch.load(path, weights_only=True), anew)
    return anew.getvalue()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=300, help="odd values of flags")
    parser.add_argument("--files", type=int, default=100, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="which values and files")
    wishes = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        findings = try_values(choose(wishes.cases, wishes.seed), place)
        findings += try_files(wishes.files, place, wishes.seed)
    for text in findings:
        print(text)
    print(f"{wishes.cases} values, {wishes.files} files, findings: {len(findings)}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
