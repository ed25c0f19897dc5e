"""What a step costs: one JSON line per phase, with the ratio to what this processor could do.

    python tests/benchmark.py --script ampl.py
    python tests/benchmark.py --script ampl.py --against <folder with another version of it>
    python tests/benchmark.py --script ampl.py --busy 4

Data are synthetic, of walker2d's shape. `floor_ms` is the FLOPs of a step, as torch counts them,
over the rate of one product of matrices of the methods' size; `of_floor` is `ms` over that. Times
on a CPU are those of this process alone, so others may use the core as well. Another version is
timed in turns with this one; `ratio` is this one's time over the other's, the median of the pairs.

With --busy the iterations run beside so many other processes that never rest. Then times are those
on the wall, and the threads are as many as torch takes by itself. --busy 0 is the same on a machine
left alone, to compare with.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import steps
import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    script: str = "ampl.py"  # the script to measure: ampl.py, mopo.py, combo.py
    against: str | None = None  # a folder with another version of it, of the same interface
    device: str = "cpu"  # cpu or cuda
    threads: int = 1  # CPU threads (with --busy: torch's default)
    busy: int | None = None  # number of busy processes beside the iterations
    rows: int = 100_000  # rows of the synthetic dataset
    rollout_starts: int = 50_000  # rollouts per phase in MOPO and COMBO, whose time grows with them
    blocks: int = 5  # timed blocks per phase; the median is reported
    cuda_graphs: bool = True  # recording of the steps (no effect on a CPU)
    tf32: bool = False  # rounding of the inputs of products (GPU)


# ----- what is timed -----
class Block(NamedTuple):
    """Some steps of a phase that are timed together."""

    run: Callable[[], object]
    num_steps: int


def repeat(step: Callable[[], object], count: int) -> Block:
    """A block of `count` equal steps."""

    def run() -> None:
        for _ in range(count):
            step()

    return Block(run, count)


def ampl_iterations(iterate: Callable[[bool, bool], dict], warmup: bool) -> Block:
    """A block of 20 iterations of AMPL, in which the policy steps every second time."""

    def run() -> None:
        for i in range(20):
            iterate(warmup, i % 2 == 0)

    return Block(run, 20)


def holdout(method: nn.Module) -> Callable[[], Tensor]:
    """The evaluation of AMPL's model on held-out rows after an epoch of a fit."""
    known = method.split(method.data[method.rows_with_next])
    inputs, targets = method.model.standardise(known)
    held_out, _ = method.split_rows(len(inputs))
    omega = torch.ones(len(inputs), device=method.device)
    return lambda: method.holdout_error(inputs, targets, omega, held_out)


def load_script(folder: Path, script: str) -> str:
    """Import the script of a folder under a name of its own, which is returned."""
    name = f"{Path(script).stem} of {folder}"
    spec = importlib.util.spec_from_file_location(name, folder / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def phases(name: str, options: Options) -> dict[str, Block]:
    """The blocks of a script, by the name of their phase; `name` is from load_script."""
    module = sys.modules[name]
    kind = Path(options.script).stem.upper()
    settings = {
        "cuda": options.device == "cuda",
        "cuda_graphs": options.cuda_graphs,
        "tf32": options.tf32,
        "threads": torch.get_num_threads(),
        "rollout_starts": options.rollout_starts,
    }
    method = steps.build(name, kind, options.device, options.rows, **settings)
    args = method.args
    module.choose_device(args)
    iterate = module.capture(method.iterate, args)
    found = {}
    if kind == "AMPL":
        found["iteration"] = ampl_iterations(iterate, warmup=False)
        found["iteration, warm-up"] = ampl_iterations(iterate, warmup=True)
    else:
        found["iteration"] = repeat(iterate, 50 if kind == "MOPO" else 10)
    if options.busy is not None:
        return found
    found["rollout"] = repeat(module.capture(method.rollout, args), 1)
    if kind == "AMPL":
        found["model step"] = repeat(module.capture(steps.refit_step(method), args), 20)
        found["hold-out"] = repeat(holdout(method), 1)
        found["omega step"] = repeat(module.capture(steps.omega_step(method), args), 20)
    else:
        found["model step"] = repeat(module.capture(steps.fit_step(method), args), 20)
    return found


# ----- busy processes -----
def burn() -> None:
    """Use a core until the benchmark ends, also where it is killed."""
    while multiprocessing.parent_process().is_alive():
        for _ in range(1_000_000):
            pass


@contextlib.contextmanager
def busy_processes(count: int):
    """`count` processes that never rest, ended with the block."""
    processes = [multiprocessing.Process(target=burn, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


# ----- time -----
def now(options: Options) -> float:
    """Seconds at which all work so far is done: on a CPU those that this process has used."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    if options.busy is not None:
        return time.perf_counter()
    return time.process_time()


def seconds_of(function: Callable[[], object], options: Options) -> float:
    """How long a call takes."""
    start = now(options)
    function()
    return now(options) - start


def flops_per_second(options: Options) -> float:
    """The rate of a product of matrices as in a layer of AMPL's networks, the best of 30."""
    rows = torch.randn(512, 400, device=options.device)
    weight = torch.randn(400, 300, device=options.device)
    seconds = [seconds_of(lambda: rows @ weight, options) for _ in range(30)]
    return 2 * rows.numel() * weight.shape[1] / min(seconds)


def measure(phase: str, versions: list[Block], options: Options, rate: float) -> dict:
    """Time the blocks of one or two versions in turns. -> a line of the report"""
    for block in versions:
        block.run()  # allocations, and on a GPU the recording
    block = versions[0]
    with FlopCounterMode(display=False) as counter:
        block.run()
    times = []  # milliseconds per step, by version
    for _ in range(options.blocks):
        for version in versions:
            times.append(seconds_of(version.run, options) / version.num_steps * 1e3)
    own = times[:: len(versions)]
    ms = statistics.median(own)
    line = {"script": options.script, "phase": phase, "ms": round(ms, 3)}
    if options.device == "cpu":
        floor = counter.get_total_flops() / block.num_steps / rate * 1e3
        line["floor_ms"] = round(floor, 3)
        line["of_floor"] = round(ms / floor, 2)
    if len(versions) > 1:
        others = times[1::2]
        ratios = [mine / other for mine, other in zip(own, others)]
        line["other_ms"] = round(statistics.median(others), 3)
        line["ratio"] = round(statistics.median(ratios), 3)
    return line


def run(options: Options) -> list[dict]:
    """Measure every phase. Prints each line as it comes."""
    if options.busy is None:
        torch.set_num_threads(options.threads)
    folders = [ROOT]
    if options.against is not None:
        folders.append(Path(options.against).resolve())
    versions = [phases(load_script(folder, options.script), options) for folder in folders]
    rate = flops_per_second(options)
    machine = {
        "gflops": round(rate / 1e9),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "busy": options.busy,
    }
    print(json.dumps(machine), flush=True)
    lines = []
    with busy_processes(options.busy or 0):
        for phase in versions[0]:
            blocks = [version[phase] for version in versions]
            lines.append(measure(phase, blocks, options, rate))
            print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
