"""What to run first where there is a graphics card: one command, under nine minutes.

    python tests/gpu_check.py [--output gpu_check]

It runs the tests that need CUDA, compares recorded steps with plain ones, times the phases of the
three scripts with graphs and TF32 on and off, and trains and evaluates AMPL on the bundled sample.
It writes gpu_check.json and gpu_check.md, for tests/README.md. Each part has a process and a time
limit of its own, so that its failure loses nothing of the others. Exit codes: 2 no CUDA, 1 a
failure.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import benchmark
import pandas as pd
import steps
import torch
import tyro
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "tests" / "data" / "maze2d-medium-v1-sample.hdf5"
SCRIPTS = {"ampl": "AMPL", "mopo": "MOPO", "combo": "COMBO"}
DEVICE = "cuda"


@dataclass
class Options:
    output: str = "gpu_check"  # the report, without its endings .json and .md
    part: str | None = None  # run this part alone, in this process, and print its result


# ----- the parts: each returns what goes into the report; a failed assertion is a failure -----
def machine() -> dict:
    """What all this is measured on."""
    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def tests() -> dict:
    """The tests that are skipped without CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_graphs.py", "-k", "on_cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return {"summary": done.stdout.strip().splitlines()[-1]}


def build_learner(script: str, quick: bool) -> nn.Module:
    """A method with data, or collect.py's SAC with 1000 rows, on the GPU."""
    if script != "collect":
        settings = steps.TINY if quick else {}
        return steps.build(script, SCRIPTS[script], DEVICE, 1000, **settings)
    import collect

    hidden = (8, 8) if quick else (256, 256)
    args = collect.Args("hopper-medium-v2", hidden=hidden, target_entropy=-6.0)
    sac = collect.SAC(args, *steps.WALKER2D, 1000, torch.device(DEVICE))
    sac.rows.normal_()
    sac.rows[:, -1] = 0  # nothing is terminated
    sac.num_rows.fill_(1000)
    return sac


def replay(script: str, quick: bool = False) -> dict:
    """Largest relative difference of the states with and without graphs, early and late.

    Sums on a GPU may be taken in another order at each call, so that the two drift apart slowly.
    """
    plain = build_learner(script, quick)
    twin = copy.deepcopy(plain)
    module = sys.modules["mopo" if script == "collect" else script]
    recorded = module.capture(twin.iterate, twin.args)
    last = 40 if quick else 200
    differences = {}
    for call in range(last):
        flags = ()
        if script == "ampl":
            flags = (False, call % 2 == 0)  # after the warm-up; the policy steps every second time
        module.reseed(0, "call", call)
        plain.iterate(*flags)
        module.reseed(0, "call", call)
        recorded(*flags)
        if call + 1 in (20, last):
            gap = steps.difference(steps.state(plain), steps.state(twin))
            differences[f"after {call + 1}"] = gap
    assert differences["after 20"] <= 1e-5, differences
    assert differences[f"after {last}"] <= 1e-3, differences
    return differences


def speed(script: str) -> list[dict]:
    """Milliseconds of each phase: with graphs, without them, and with graphs and TF32."""
    lines = []
    for graphs, tf32 in ((True, False), (False, False), (True, True)):
        torch.cuda.reset_peak_memory_stats()
        options = benchmark.Options(f"{script}.py", device="cuda", cuda_graphs=graphs, tf32=tf32)
        for line in benchmark.run(options):
            line["graphs"] = graphs
            line["tf32"] = tf32
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            lines.append(line)
    return lines


def timed(function: Callable, seconds: list[float]) -> Callable:
    """The function, which appends to `seconds` how long each of its calls took."""

    def call(*args, **kwargs):
        torch.cuda.synchronize()
        start = time.monotonic()
        result = function(*args, **kwargs)
        torch.cuda.synchronize()
        seconds.append(round(time.monotonic() - start, 2))
        return result

    return call


def training() -> dict:
    """A shortened AMPL run on the bundled sample: its scores, and the seconds of its long phases.

    The warm-up ends, model data are mixed in, omega is trained and the model refitted once.
    """
    import ampl

    settings = {
        "env_id": "maze2d-medium-v1",
        "dataset_path": str(SAMPLE),
        "total_iterations": 8000,
        "warmup_iterations": 5000,
        "real_decay_every": 1000,
        "model_retrain_every": 6000,
        "model_max_epochs": 6,
        "omega_steps": 1000,
        "num_initial_states": 1000,
        "eval_every": 2000,
    }
    seconds = {"fit_model": [], "fit_omega": [], "evaluate": []}
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(
            ampl.AMPL,
            fit_model=timed(ampl.AMPL.fit_model, seconds["fit_model"]),
            fit_omega=timed(ampl.AMPL.fit_omega, seconds["fit_omega"]),
        ),
        mock.patch.object(ampl, "evaluate", timed(ampl.evaluate, seconds["evaluate"])),
    ):
        result = ampl.train(ampl.Args(**settings, run_dir=folder))
    report = {name: result[name] for name in ("last", "final_mean", "device")}
    report["seconds"] = seconds
    report["total_seconds"] = round(time.monotonic() - start, 1)
    return report


# ----- running them -----
class Part(NamedTuple):
    """A part of the check, with the seconds that it may take; None is no limit."""

    function: Callable[..., object]
    arguments: tuple
    limit: float | None


PARTS = {  # nine minutes in all
    "machine": Part(machine, (), 60),
    "tests": Part(tests, (), 80),
    "replay ampl": Part(replay, ("ampl",), 30),
    "replay mopo": Part(replay, ("mopo",), 30),
    "replay combo": Part(replay, ("combo",), 30),
    "replay collect": Part(replay, ("collect",), 30),
    "speed ampl": Part(speed, ("ampl",), 50),
    "speed mopo": Part(speed, ("mopo",), 50),
    "speed combo": Part(speed, ("combo",), 50),
    "training": Part(training, (), 130),
}


def run_part(name: str) -> dict:
    """A part in a process of its own. -> ok, seconds, and its result or the end of its output"""
    command = [sys.executable, __file__, "--part", name]
    limit = PARTS[name].limit
    start = time.monotonic()
    report = {"ok": False, "seconds": 0.0}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        if done.returncode == 0:
            report["ok"] = True
            report["result"] = json.loads(done.stdout.splitlines()[-1])
        else:
            report["error"] = (done.stderr or done.stdout).strip()[-1500:]
    except subprocess.TimeoutExpired:
        report["error"] = f"more than {limit} seconds"
    report["seconds"] = round(time.monotonic() - start, 1)
    return report


def table(report: dict) -> str:
    """The report as Markdown: a table of the parts, and one of what was timed."""
    parts = []
    timed_phases = []
    for name, part in report.items():
        result = part["result"] if part["ok"] else part["error"]
        if part["ok"] and name.startswith("speed"):
            timed_phases.extend(result)
            result = "below"
        text = str(result).replace("\n", " ").replace("|", "/")[-300:]
        parts.append({"part": name, "ok": part["ok"], "seconds": part["seconds"], "result": text})
    tables = [pd.DataFrame(lines).to_markdown(index=False) for lines in (parts, timed_phases)]
    return "\n\n".join(tables)


def main(options: Options) -> int:
    """All parts, or one. -> the exit status"""
    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    if options.part:
        part = PARTS[options.part]
        print(json.dumps(part.function(*part.arguments)))
        return 0
    report = {}
    for name in PARTS:
        report[name] = run_part(name)
        print(f"{name}: {json.dumps(report[name])[:400]}", flush=True)
        Path(f"{options.output}.json").write_text(json.dumps(report, indent=1))
        Path(f"{options.output}.md").write_text(table(report))
    return 0 if all(part["ok"] for part in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
