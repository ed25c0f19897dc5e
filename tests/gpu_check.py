"""Everything that needs a graphics card, in one command and under nine minutes.

    python tests/gpu_check.py [--output gpu_check]

Runs the tests that need CUDA; compares recorded steps with plain ones; times the steps of the three
scripts with one and five learners, with graphs and TF32 on and off; trains AMPL on the bundled
sample. Writes gpu_check.json and gpu_check.md (a table for tests/README.md). Every part runs in a
process of its own with a limit of its own: one that fails or hangs loses nothing of the others.
Needs no network. Without CUDA: one sentence and exit code 2; with a failed part: 1.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import benchmark
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
    quick: bool = False  # tiny networks and few steps, to test this file itself


# ----- the parts: each returns what goes into the report; an assertion that fails is a failure -----


def machine(quick: bool) -> dict:
    """What this is measured on."""
    card = torch.cuda.get_device_properties(0)
    memory = round(card.total_memory / 2**30, 1)
    found = dict(card=card.name, memory_gib=memory, torch=torch.__version__, cores=os.cpu_count())
    return found | dict(cuda=torch.version.cuda, python=sys.version.split()[0])


def tests(quick: bool) -> dict:
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


def replay(script: str, quick: bool) -> dict:
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


def speed(script: str, quick: bool) -> list[dict]:
    """Milliseconds per step: graphs on and off, TF32 on and off, one and five learners."""
    lines = []
    for seeds, graphs, tf32 in ((1, True, False), (1, False, False), (1, True, True),
                                (5, True, False), (5, True, True)):  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        options = benchmark.Options(script=f"{script}.py", device="cuda", num_seeds=seeds,
                                    cuda_graphs=graphs, tf32=tf32, rows=1000 if quick else 100_000,
                                    blocks=1 if quick else 5)  # fmt: skip
        peak = torch.cuda.max_memory_allocated
        for line in benchmark.run(options):
            memory = {"seeds": seeds, "peak_gib": round(peak() / 2**30, 2)}
            lines.append(line | memory | {"graphs": graphs, "tf32": tf32})
    return lines


def training(quick: bool) -> dict:
    """A shortened AMPL run on the bundled sample with five learners: its scores and seconds."""
    import ampl

    sizes = dict(total_iterations=8000, warmup_iterations=5000, real_decay_every=1000,
                 model_retrain_every=6000, model_max_epochs=6, miw_steps=1000, eval_every=2000)  # fmt: skip
    if quick:
        sizes = dict(total_iterations=6, warmup_iterations=2, model_retrain_every=4, eval_every=6,
                     model_max_epochs=1, model_epoch_steps=2, miw_steps=2, num_initial_states=5,
                     eval_episodes=1, final_episodes=1, rollout_rows=64, rollout_every=2)  # fmt: skip
    phases, clock = {}, time.monotonic()

    def timed(name: str):
        """The seconds of all calls of a function, by its name."""
        function = getattr(ampl, name) if hasattr(ampl, name) else getattr(ampl.AMPL, name)

        def call(*args, **kwargs):
            torch.cuda.synchronize()
            start = time.monotonic()
            result = function(*args, **kwargs)
            torch.cuda.synchronize()
            phases[name] = phases.get(name, 0.0) + time.monotonic() - start
            return result

        setattr(ampl if hasattr(ampl, name) else ampl.AMPL, name, call)

    for name in ("fit_model", "fit_weight", "evaluate"):
        timed(name)
    with tempfile.TemporaryDirectory() as folder:
        args = ampl.Args(env_id="maze2d-medium-v1", dataset_path=str(SAMPLE), run_dir=folder,
                         num_seeds=2 if quick else 5, **sizes)  # fmt: skip
        result = ampl.train(args)
    phases = {name: round(seconds, 1) for name, seconds in phases.items()}
    keys = "last", "mean_last_ten", "final_mean", "device"
    total = round(time.monotonic() - clock, 1)
    return {key: result[key] for key in keys} | {"seconds": phases | {"total": total}}


PARTS = {  # name: function, seconds that it may take; nine minutes in all
    "machine": (machine, 20),
    "tests": (tests, 80),
    **{f"replay {s}": (lambda q, s=s: replay(s, q), 30) for s in (*SCRIPTS, "collect")},
    **{f"speed {s}": (lambda q, s=s: speed(s, q), 60) for s in SCRIPTS},
    "training": (training, 140),
}


# ----- running them -----


def run_part(name: str, options: Options) -> dict:
    """A part in a process of its own. -> ok, seconds, and its result or the end of its output"""
    command = [sys.executable, __file__, "--part", name, *(["--quick"] if options.quick else [])]
    start = time.monotonic()
    try:
        limit = PARTS[name][1]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        ok, output = done.returncode == 0, done.stdout
        error = (done.stderr or done.stdout).strip()[-1500:]
    except subprocess.TimeoutExpired:
        ok, output, error = False, "", f"more than {limit} seconds"
    report = {"ok": ok, "seconds": round(time.monotonic() - start, 1)}
    return report | ({"result": json.loads(output.splitlines()[-1])} if ok else {"error": error})


def table(report: dict) -> str:
    """The report as Markdown."""
    lines = ["| part | ok | seconds | result |", "|---|---|---|---|"]
    rows = ["", "| script | phase | learners | graphs | TF32 | ms | peak GiB |", "|---|" * 7]
    for name, part in report.items():
        result = part.get("result", part.get("error", ""))
        if part["ok"] and name.startswith("speed"):
            for r in result:
                cells = r["script"], r["phase"], r["seeds"], r["graphs"], r["tf32"], r["ms"]
                rows.append("| " + " | ".join(map(str, [*cells, r["peak_gib"]])) + " |")
            result = "below"
        text = str(result).replace("\n", " ").replace("|", "/")[-300:]
        lines.append(
            f"| {name} | {'yes' if part['ok'] else '**no**'} | {part['seconds']} | {text} |"
        )
    return "\n".join([*lines, *rows]).replace("||", "|") + "\n"


def main(options: Options) -> int:
    """All parts, or one. -> the exit status"""
    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    if options.part:
        print(json.dumps(PARTS[options.part][0](options.quick)))
        return 0
    report = {}
    for name in PARTS:
        report[name] = run_part(name, options)
        print(f"{name}: {json.dumps(report[name])[:400]}", flush=True)
        Path(f"{options.output}.json").write_text(json.dumps(report, indent=1))
        Path(f"{options.output}.md").write_text(table(report))
    return 0 if all(part["ok"] for part in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
