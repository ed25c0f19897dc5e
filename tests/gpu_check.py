"""Everything that needs a graphics card, in one command and under nine minutes.

    python tests/gpu_check.py [--output gpu_check]

Runs the tests that need CUDA; compares recorded steps with plain ones; times the steps of the three
scripts with one and five learners, with graphs and TF32 on and off; trains AMPL on the bundled
sample. Writes gpu_check.json and gpu_check.md, for tests/README.md. A part has a process and a
time limit of its own: its failure loses nothing of the others. Exit codes: 2 no CUDA, 1 a failure.
"""

import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import benchmark
import pandas as pd
import steps
import torch
import tyro

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
    """What this is measured on."""
    card = torch.cuda.get_device_properties(0)
    memory = round(card.total_memory / 2**30, 1)
    found = dict(card=card.name, memory_gib=memory, torch=torch.__version__, cores=os.cpu_count())
    return found | dict(cuda=torch.version.cuda, python=sys.version.split()[0])


def tests() -> dict:
    """The tests that are skipped without CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_graphs.py", "-k", "on_cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return {"summary": done.stdout.strip().splitlines()[-1]}


def learner(script: str, quick: bool):
    """A method with data, or collect.py's SAC with a full buffer, on the GPU."""
    if script != "collect":
        settings = steps.TINY if quick else dict(num_seeds=2)
        return steps.build(script, SCRIPTS[script], DEVICE, 1000, **settings)
    import collect

    hidden = (8, 8) if quick else (256, 256)
    args = collect.Args("hopper-medium-v2", hidden=hidden, target_entropy=-6.0)
    sac = collect.SAC(args, *steps.WALKER2D, 1000, torch.device(DEVICE))
    sac.buffer.normal_()
    sac.buffer[..., -1] = 0
    sac.buffer_rows.fill_(1000)
    return sac


def replay(script: str, quick: bool = False) -> dict:
    """Largest relative difference of the states with and without graphs, after 20 and 200 calls."""
    plain, last = learner(script, quick), 40 if quick else 200
    twin, found = copy.deepcopy(plain), {}
    module = sys.modules["mopo" if script == "collect" else script]
    iterates = [m.iterate for m in (plain, twin)]
    if script == "ampl":
        iterates = [lambda m=m: m.iterate(False, True) for m in (plain, twin)]
    iterates[1] = module.capture(iterates[1], twin.args)
    for call in range(last):
        for iterate in iterates:
            module.reseed(0, "call", call)
            iterate()
        if call + 1 in (20, last):
            found[f"after {call + 1}"] = steps.difference(steps.state(plain), steps.state(twin))
    assert found["after 20"] <= 1e-5 and found[f"after {last}"] <= 1e-3, found
    return found


def speed(script: str) -> list[dict]:
    """Milliseconds per step: graphs on and off, TF32 on and off, one and five learners."""
    lines = []
    for seeds, graphs, tf32 in ((1, True, False), (1, False, False), (1, True, True),
                                (5, True, False), (5, True, True)):  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        options = benchmark.Options(script=f"{script}.py", device="cuda", num_seeds=seeds,
                                    cuda_graphs=graphs, tf32=tf32)  # fmt: skip
        peak = torch.cuda.max_memory_allocated
        for line in benchmark.run(options):
            memory = {"seeds": seeds, "peak_gib": round(peak() / 2**30, 2)}
            lines.append(line | memory | {"graphs": graphs, "tf32": tf32})
    return lines


def training() -> dict:
    """A shortened AMPL run on the bundled sample with five learners: its scores and seconds."""
    import ampl

    sizes = dict(total_iterations=8000, warmup_iterations=5000, real_decay_every=1000,
                 model_retrain_every=6000, model_max_epochs=6, miw_steps=1000)  # fmt: skip
    phases, clock = {}, time.monotonic()

    def timed(name: str):
        """The seconds of each call of a function, by its name."""
        function = getattr(ampl, name) if hasattr(ampl, name) else getattr(ampl.AMPL, name)

        def call(*args, **kwargs):
            torch.cuda.synchronize()
            start = time.monotonic()
            result = function(*args, **kwargs)
            torch.cuda.synchronize()
            phases[name] = [*phases.get(name, []), round(time.monotonic() - start, 2)]
            return result

        setattr(ampl if hasattr(ampl, name) else ampl.AMPL, name, call)

    for name in ("fit_model", "fit_weight", "evaluate"):
        timed(name)
    with tempfile.TemporaryDirectory() as folder:
        sizes |= dict(dataset_path=str(SAMPLE), run_dir=folder, num_seeds=5, eval_every=2000)
        result = ampl.train(ampl.Args(env_id="maze2d-medium-v1", **sizes))
    keys = "last", "mean_last_ten", "final_mean", "device"
    total = round(time.monotonic() - clock, 1)
    return {key: result[key] for key in keys} | {"seconds": phases | {"total": total}}


PARTS = {  # name: function, seconds that it may take; nine minutes in all
    "machine": (machine, 20),
    "tests": (tests, 80),
    **{f"replay {s}": (functools.partial(replay, s), 30) for s in (*SCRIPTS, "collect")},
    **{f"speed {s}": (functools.partial(speed, s), 60) for s in SCRIPTS},
    "training": (training, 140),
}


# ----- running them -----


def run_part(name: str) -> dict:
    """A part in a process of its own. -> ok, seconds, and its result or the end of its output"""
    command, start, limit = (
        [sys.executable, __file__, "--part", name],
        time.monotonic(),
        PARTS[name][1],
    )
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        ok, output = done.returncode == 0, done.stdout
        error = (done.stderr or done.stdout).strip()[-1500:]
    except subprocess.TimeoutExpired:
        ok, output, error = False, "", f"more than {limit} seconds"
    report = {"ok": ok, "seconds": round(time.monotonic() - start, 1)}
    return report | ({"result": json.loads(output.splitlines()[-1])} if ok else {"error": error})


def table(report: dict) -> str:
    """The report as Markdown: a table of the parts, and one of what was timed."""
    parts, timed = [], []
    for name, part in report.items():
        result = part.get("result", part.get("error", ""))
        if part["ok"] and name.startswith("speed"):
            timed, result = timed + result, "below"
        text = str(result).replace("\n", " ").replace("|", "/")[-300:]
        parts.append(dict(part=name, ok=part["ok"], seconds=part["seconds"], result=text))
    return "\n\n".join(pd.DataFrame(lines).to_markdown(index=False) for lines in (parts, timed))


def main(options: Options) -> int:
    """All parts, or one. -> the exit status"""
    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    if options.part:
        print(json.dumps(PARTS[options.part][0]()))
        return 0
    report = {}
    for name in PARTS:
        report[name] = run_part(name)
        print(f"{name}: {json.dumps(report[name])[:400]}", flush=True)
        Path(f"{options.output}.json").write_text(json.dumps(report, indent=1))
        Path(f"{options.output}.md").write_text(table(report))
    return 0 if all(part["ok"] for part in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
