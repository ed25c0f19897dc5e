"""What a step costs: one JSON line per phase, with the ratio to what this machine could do.

    python tests/benchmark.py --script ampl.py --env-id walker2d-medium-v2 --threads 1

and the same with mopo.py, combo.py and collect.py.

Data are synthetic, of the task's shape. `floor_ms` is the FLOPs of the code as written (torch's own
counter) over the machine's rate for fp32 matrix products, measured in the same run; elementwise
work and memory are not in it, so a ratio of 1 cannot be reached. Numbers from a busy machine say
little: look at `gflops`, which is the same on every calm run.
"""

import dataclasses
import functools
import importlib.util
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {  # observation and action entries per family
    "halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "maze2d": (4, 2),
    "pen": (45, 24), "door": (39, 28),
}  # fmt: skip


@dataclass
class Options:
    script: str = "ampl.py"
    """the script to measure"""
    env_id: str = "walker2d-medium-v2"
    """the task whose shapes and settings are used"""
    threads: int = 1
    """CPU threads"""
    num_seeds: int = 1
    """learners"""
    device: str = "cpu"
    """cpu or cuda"""
    batch_size: int = 0
    """rows per iteration; 0 is the script's own number"""
    rows: int = 300_000
    """rows of the synthetic dataset"""
    blocks: int = 5
    """runs per phase; the median is reported"""


def synchronised(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def gemm_rate(device: str) -> float:
    """GFLOP/s of a typical batched product of the method, best of 30."""
    a, b = torch.randn(2, 512, 400, device=device), torch.randn(2, 400, 300, device=device)
    seconds = []
    for _ in range(30):
        start = synchronised(device)
        torch.bmm(a, b)
        seconds.append(synchronised(device) - start)
    return 2 * 2 * 512 * 400 * 300 / min(seconds) / 1e9


def measure(
    name: str, block: Callable[[], None], steps: int, options: Options, rate: float
) -> None:
    """Print the median over calls of `block`, in ms per step, of which it takes `steps`."""
    block()  # warm-up, and on CUDA the recording of the graphs
    with FlopCounterMode(display=False) as counter:
        block()
    times = []
    for _ in range(options.blocks):
        start = synchronised(options.device)
        block()
        times.append((synchronised(options.device) - start) / steps * 1e3)
    # On CUDA a replay hides the operations from the counter.
    floor = counter.get_total_flops() / steps / rate / 1e6 if options.device == "cpu" else None
    report(name, times, floor, rate)


def report(name: str, times: list[float], floor_ms: float | None, rate: float) -> None:
    median = statistics.median(times)
    line = {"phase": name, "ms": round(median, 3), "runs": len(times), "gflops": round(rate)}
    if floor_ms:
        line |= {"floor_ms": round(floor_ms, 3), "ratio": round(median / floor_ms, 2)}
    print(json.dumps(line), flush=True)


def write_dataset(path: Path, rows: int, obs_dim: int, action_dim: int) -> None:
    """A gzipped HDF5 file in D4RL's layout, with noise in it."""
    rng = np.random.default_rng(0)
    ends = np.zeros(rows, bool)
    ends[999::1000] = True
    obs = rng.standard_normal((rows, obs_dim)).astype(np.float32)
    columns = {
        "observations": obs, "next_observations": np.roll(obs, -1, 0),
        "actions": rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        "rewards": rng.standard_normal(rows).astype(np.float32),
        "terminals": np.zeros(rows, bool), "timeouts": ends,
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values, compression="gzip")


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_loading(script, options: Options, rate: float, folder: Path) -> None:
    obs_dim, action_dim = WIDTHS[options.env_id.split("-")[0]]
    path = folder / "synthetic.hdf5"
    write_dataset(path, 1_000_000, obs_dim, action_dim)
    env = script.make_env(options.env_id)
    times = []
    for _ in range(options.blocks):
        start = time.perf_counter()
        script.load_dataset(options.env_id, str(path), env)
        times.append((time.perf_counter() - start) * 1e3)
    report("load_dataset_per_1m_rows", times, None, rate)


def set_up(script, method: str, options: Options, **changes):
    """-> args with the task's settings, the learners, synthetic rows [N, C]."""
    if options.batch_size:
        changes["batch_size"] = options.batch_size
    settings = script.PAPER[options.env_id] | changes
    args = script.Args(env_id=options.env_id, num_seeds=options.num_seeds, **settings)
    device = torch.device(options.device)
    obs_dim, action_dim = WIDTHS[options.env_id.split("-")[0]]
    agent = getattr(script, method)(args, obs_dim, action_dim, device)
    data = torch.randn(options.rows, sum(agent.columns), device=device)
    data[:, obs_dim : obs_dim + action_dim].tanh_()
    data[:, -1] = 0
    return args, agent, data


def measure_sac(script, method: str, options: Options, rate: float) -> None:
    """mopo.py and combo.py. A tenth of a refresh stands for the rollouts of 100 iterations."""
    args, agent, data = set_up(script, method, options, rollout_starts=5000)
    device, obs_dim = agent.device, agent.columns[0]
    never = script.known_termination("halfcheetah")[0]
    end = script.RolloutEnd(never, torch.full((obs_dim,), 100.0, device=device))
    one_step = script.sac_step if method == "MOPO" else script.combo_step
    capture = lambda step: script.capture(step, agent, args)  # noqa: E731
    refresh = capture(lambda: script.imagine(agent, data, end, args))
    refresh()
    step = capture(lambda: one_step(agent, data, args))
    count = 100 if method == "MOPO" else 20
    measure("iteration", lambda: [step() for _ in range(count)], count, options, rate)
    measure("rollout_per_iteration", refresh, 100, options, rate)

    inputs, targets = data[:, : sum(agent.columns[:2])].clone(), data[:, : 1 + obs_dim].clone()
    shape = (*agent.model.lead, options.rows)
    order = torch.arange(options.rows, device=device).expand(shape).contiguous()
    model_step = capture(lambda: script.ensemble_step(agent, inputs, targets, order, args))
    measure("model_step", lambda: [model_step() for _ in range(50)], 50, options, rate)
    held = inputs[: args.holdout_size], targets[: args.holdout_size]
    measure("model_holdout", lambda: script.holdout_error(agent, *held), 1, options, rate)


def measure_collect(collect, options: Options, rate: float) -> None:
    """Gradient steps of collect.py's SAC."""
    obs_dim, action_dim = WIDTHS[options.env_id.split("-")[0]]
    args = collect.Args(env_id=options.env_id, target_entropy=-action_dim)
    args.batch_size = options.batch_size or args.batch_size
    device = torch.device(options.device)
    agent = collect.SAC(args, obs_dim, action_dim, options.rows, device)
    agent.buffer.normal_()
    agent.buffer[..., -1] = 0
    agent.buffer_rows.fill_(options.rows)
    step = collect.capture(lambda: collect.learn(agent, args), agent, args)
    measure("sac_step", lambda: [step() for _ in range(100)], 100, options, rate)


def measure_ampl(ampl, options: Options, rate: float) -> None:
    args, agent, data = set_up(ampl, "AMPL", options)
    device, (obs_dim, action_dim) = agent.device, agent.columns[:2]
    never = ampl.known_termination("halfcheetah")[0]
    rule = ampl.TerminationRule(
        never, torch.full((obs_dim,), 100.0, device=device), torch.tensor(100.0, device=device)
    )
    capture = lambda step: ampl.capture(step, agent, args)  # noqa: E731
    refresh = capture(lambda: ampl.imagine(agent, data, rule, args))
    refresh()

    def iterations(warmup: bool) -> Callable[[], None]:
        moving, still = (
            capture(lambda: ampl.iterate(agent, data, rule, args, warmup, True)),
            capture(lambda: ampl.iterate(agent, data, rule, args, warmup, False)),
        )

        def block() -> None:  # 250 iterations and their rollout
            refresh()
            for i in range(args.rollout_every):
                (moving if i % args.policy_frequency == 0 else still)()

        return block

    agent.real_rows.fill_(args.batch_size // 2)
    measure("iteration", iterations(warmup=False), args.rollout_every, options, rate)
    agent.real_rows.fill_(args.batch_size)
    measure("iteration_warmup", iterations(warmup=True), args.rollout_every, options, rate)
    measure("rollout", refresh, 1, options, rate)

    learners, rows = args.num_seeds, options.rows
    inputs = torch.randn(rows, obs_dim + action_dim, device=device)
    targets = torch.randn(rows, 1 + obs_dim, device=device)
    weight = torch.ones(learners, rows, device=device)
    order = torch.arange(rows, device=device).expand(learners, -1).contiguous()
    model_step = capture(lambda: ampl.model_step(agent, inputs, targets, weight, order, args))
    measure("model_step", lambda: [model_step() for _ in range(50)], 50, options, rate)
    held = order[:, : args.holdout_size].contiguous()
    holdout = functools.partial(ampl.holdout_loss, agent, inputs, targets, weight, held)
    measure("model_holdout", holdout, 1, options, rate)

    # A tenth of the data, evaluated once per tenth of a refresh window: the same work per step.
    data = data[: rows // 10]
    initial_obs = torch.randn(args.num_initial_states // 10, obs_dim, device=device)
    sizes = (len(data), len(data), len(initial_obs))
    tables = ampl.QTables(*(torch.zeros(learners, n, device=device) for n in sizes))
    miw_step = capture(lambda: ampl.miw_step(agent, data, initial_obs, tables, args))

    def window() -> None:
        ampl.fill_tables(agent, tables, data, initial_obs)
        for _ in range(args.miw_refresh // 10):
            miw_step()

    measure("miw_step", window, args.miw_refresh // 10, options, rate)


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    script = load_script(options.script)
    print(
        json.dumps(
            {"cpu_matmul": script.choose_cpu_matmul(script.Args()), **dataclasses.asdict(options)}
        )
    )
    rate = gemm_rate(options.device)
    method = Path(options.script).stem.upper()
    if method == "COLLECT":
        measure_collect(script, options, rate)
        return
    if method == "AMPL":
        measure_ampl(script, options, rate)
    else:
        measure_sac(script, method, options, rate)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"phase": "peak_memory", "gib": round(peak, 2)}))
    with tempfile.TemporaryDirectory() as folder:
        measure_loading(script, options, rate, Path(folder))


if __name__ == "__main__":
    main()
