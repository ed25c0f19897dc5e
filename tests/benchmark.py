"""What a step costs: one JSON line per phase, with the ratio to what this processor could do.

    python tests/benchmark.py --script ampl.py --threads 1
    python tests/benchmark.py --script ampl.py --against <folder with another version> --threads 1

Data are synthetic, of walker2d's shape. `floor_ms`: FLOPs (torch's counter) over the rate of fp32
products in the same run; elementwise work is not in it, so a ratio of 1 cannot be reached. With
--against, blocks of the two versions take turns; `ratio` is the median over pairs of blocks.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import steps
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    script: str = "ampl.py"  # the script to measure: ampl.py, mopo.py, combo.py
    against: str | None = None  # a folder with another version of it, of the same interface
    device: str = "cpu"  # cpu or cuda
    threads: int = 1  # CPU threads
    num_seeds: int = 1  # learners
    rows: int = 100_000  # rows of the synthetic dataset
    blocks: int = 5  # timed blocks per phase; the median is reported
    cuda_graphs: bool = True  # record the steps (no effect on a CPU)
    tf32: bool = False  # let the GPU round inputs of products


def load_script(folder: Path, script: str):
    """The script of a folder as a module of its own."""
    name = f"{Path(script).stem}_{abs(hash(folder))}"
    spec = importlib.util.spec_from_file_location(name, folder / script)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def phases(module, options: Options) -> dict[str, tuple[Callable[[], object], int]]:
    """Name of a phase -> a block of steps, and how many steps it takes."""
    kind = Path(options.script).stem.upper()
    settings = dict(num_seeds=options.num_seeds, cuda_graphs=options.cuda_graphs)
    settings |= dict(cuda=options.device == "cuda", tf32=options.tf32, threads=options.threads)
    module.choose_device(module.Args(**settings))
    sys.modules["under_test"] = module
    method = steps.build("under_test", kind, options.device, options.rows, **settings)
    args = method.args

    def repeat(count: int, *functions: Callable) -> tuple[Callable, int]:
        recorded = [module.capture(function, args) for function in functions]
        return lambda: [recorded[i % len(recorded)]() for i in range(count)], count

    if kind != "AMPL":
        found = {"iteration": repeat(50 if kind == "MOPO" else 10, method.iterate)}
        found["model step"] = repeat(20, steps.sac_model_step(method))
        return found | {"rollout": repeat(1, method.rollout)}
    kinds = {"iteration": False, "iteration, warm start": True}
    found = {
        name: repeat(20, *(lambda w=w, a=a: method.iterate(w, a) for a in (True, False)))
        for name, w in kinds.items()
    }
    found["rollout"] = repeat(1, method.rollout)
    found["model step"] = repeat(20, steps.model_step(method))
    found["hold-out"] = steps.validation(method), 1
    return found | {"omega step": repeat(20, steps.miw_step(method))}


def now(device: str) -> float:
    """Seconds, all work done. On a CPU those of this process: others may use the core, too."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(block: Callable, device: str) -> float:
    start = now(device)
    block()
    return now(device) - start


def gflops(device: str) -> float:
    """Rate of a typical batched product of the methods, best of 30."""
    a, b = torch.randn(2, 512, 400, device=device), torch.randn(2, 400, 300, device=device)
    return 2 * a.numel() * 300 / min(seconds_of(lambda: a @ b, device) for _ in range(30)) / 1e9


def measure(name: str, versions: list[tuple[Callable, int]], options: Options, rate: float) -> dict:
    """Time the blocks of one or two versions in turns. -> a line of the report"""
    (block, count), *_ = versions
    for other, _ in versions:
        other()  # allocations, and on a GPU the recording
    with FlopCounterMode(display=False) as counter:
        block()
    times = [
        [seconds_of(block, options.device) / count * 1e3 for block, count in versions]
        for _ in range(options.blocks)
    ]
    medians = [statistics.median(column) for column in zip(*times)]
    line = {"script": options.script, "phase": name, "ms": round(medians[0], 3)}
    if options.device == "cpu":
        floor = counter.get_total_flops() / count / rate / 1e6
        line |= {"floor_ms": round(floor, 3), "of_floor": round(medians[0] / floor, 2)}
    if len(versions) > 1:
        ratio = statistics.median(mine / other for mine, other in times)
        line |= {"other_ms": round(medians[1], 3), "ratio": round(ratio, 3)}
    return line


def run(options: Options) -> list[dict]:
    """Measure every phase; prints each line as it comes."""
    torch.set_num_threads(options.threads)
    folders = [ROOT, *([Path(options.against).resolve()] if options.against else [])]
    modules = [load_script(folder, options.script) for folder in folders]
    versions = [phases(module, options) for module in modules]
    rate, lines = gflops(options.device), []
    print(json.dumps({"gflops": round(rate), "device": options.device, "seeds": options.num_seeds}))
    for name in versions[0]:
        lines.append(measure(name, [version[name] for version in versions], options, rate))
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    run(tyro.cli(Options))
