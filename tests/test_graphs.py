"""The steps that are recorded as CUDA graphs, checked without a GPU.

On a CPU with CUDA graphs emulated: a replayed step equals the plain step bit for bit. On meta
tensors, which have shapes and no values: how many kernels a step launches. Small kernels cost a
GPU about the same whatever they compute, so their number is the time of a step.
"""

import contextlib
import importlib
import itertools
from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from steps import STEPS, TINY, build, difference, state
from test_ablations import METHODS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ampl

# --- CUDA graphs on a CPU ---

# What a GPU refuses while it records: the host would have to wait for a value or a shape, or a
# tensor is made of a Python number and would have to be copied over.
REFUSED = "_local_scalar_dense nonzero masked_select _unique2 equal lift_fresh".split()


def op_name(op: torch._ops.OpOverload) -> str:
    return op._schema.name.removeprefix("aten::")


def launches(op: torch._ops.OpOverload) -> bool:
    """Whether a GPU has to do something: neither a view nor an allocation."""
    if op.namespace == "profiler":
        return False
    is_view = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
    return not is_view and not op_name(op).startswith(("empty", "new_empty", "_unsafe_view"))


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that the operation changes in place."""
    named = {a.name: value for a, value in zip(op._schema.arguments, args)} | kwargs
    changed = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    return tensors([named.get(name) for name in changed])


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph.

    Recording lists the operations with the very tensors they read and write, and leaves no trace
    in memory; `replay` runs the list again, without the Python around it. So what Python decided
    stays as it was when recorded, as on a GPU: numbers, branches, which tensor is meant.
    """

    def __init__(self):
        super().__init__()
        self.ops, self.replays, self.before = [], 0, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op_name(op) in REFUSED:
            raise RuntimeError(f"{op_name(op)} cannot be recorded")
        changed = written(op, args, kwargs)
        for storage in (t.untyped_storage() for t in changed):
            if storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()
        result = op(*args, **kwargs)
        if launches(op):
            self.ops.append((op, args, kwargs, [] if changed else tensors(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for op, args, kwargs, results in self.ops:
            for old, new in zip(results, tensors(op(*args, **kwargs))):
                old.detach().copy_(new)


@contextlib.contextmanager
def record(graph: Graph):
    """Stands in for torch.cuda.graph."""
    refuse = mock.Mock(side_effect=RuntimeError("values cannot be read while recording"))
    with torch.random.fork_rng([]), mock.patch.multiple(torch.Tensor, tolist=refuse, numpy=refuse):
        with graph:
            yield
        for storage, content in graph.before.values():
            storage.copy_(content)


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """Puts the emulation in the place of CUDA; the list receives all graphs."""
    made, stream = [], mock.Mock()
    emulation = dict(
        is_available=lambda: True, is_current_stream_capturing=lambda: False, graph=record,
        Stream=lambda: stream, current_stream=lambda: stream, stream=contextlib.nullcontext,
        CUDAGraph=lambda: made.append(Graph()) or made[-1],
    )  # fmt: skip
    for name, stand_in in emulation.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    # A CUDA build of torch would ask the driver, which need not be there, whether Adam is recorded.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    return made


# --- recorded and plain steps ---


def compare(script: str, method: str, get_steps: list[Callable], schedule: list[int]) -> None:
    """Take steps number schedule[0], [1], ... plain and recorded, with equal random numbers."""
    pair, steps = [build(script, method, **TINY) for _ in range(2)], []
    capture = getattr(importlib.import_module(script), "capture", ampl.capture)
    for built in pair:
        torch.manual_seed(0)
        steps.append([get_step(built) for get_step in get_steps])
    steps[1] = [capture(step, pair[1].args) for step in steps[1]]
    for call, number in enumerate(schedule):
        logs = []
        for built, its_steps in zip(pair, steps):
            built.real_rows.fill_(16 - call % 9)  # it changes in a run
            ampl.reseed(0, "call", call)
            logs.append(its_steps[number]())
        for key in logs[0] | logs[1]:
            assert torch.equal(logs[0][key], logs[1][key]), f"{key} differs in call {call}"
    for one, two in zip(*map(state, pair), strict=True):
        assert torch.equal(one, two), "the state differs"


@pytest.mark.parametrize("name", STEPS)
def test_a_recorded_step_is_the_plain_step(name, graphs):
    """Catches a Python value, branch or re-bound tensor that a replay would miss; 20 calls."""
    script, method, get_step, _ = STEPS[name]
    compare(script, method, [get_step], [0] * 20)
    assert [graph.replays for graph in graphs] == [17] and len(graphs[0].ops) > 20


@pytest.mark.parametrize("name", METHODS)
def test_an_ablation_can_be_recorded(name, graphs, monkeypatch):
    """Whatever its idea, in turns: catches a graph that works on a tensor of its own."""
    monkeypatch.setattr(METHODS["value_model"], "value_aware", True, raising=False)
    get_steps = [get_step for script, _, get_step, _ in STEPS.values() if script == "ampl"]
    compare(METHODS[name].__module__, METHODS[name].__name__, get_steps, 6 * [*range(7)])
    assert len(graphs) == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_on_cuda_a_recorded_step_is_the_plain_step(name):
    """The real thing: what the emulation cannot show, such as memory that a graph shares."""
    script, method, get_step, _ = STEPS[name]
    plain, twin = (build(script, method, "cuda", **TINY) for _ in range(2))
    torch.manual_seed(0)
    step = get_step(plain)
    torch.manual_seed(0)
    recorded = ampl.capture(get_step(twin), twin.args)
    for call in range(20):
        for one in (step, recorded):
            ampl.reseed(0, "call", call)
            one()
    assert difference(state(plain), state(twin)) < 1e-5


FAULTS = {
    "attribute re-bound": (lambda m: setattr(m, "q_avg", 1.01 * m.q_avg), "differs"),
    "number frozen": (lambda m: m.q_avg.add_(torch.full((2,), float(next(m.count)))), "differs"),
    "number copied": (lambda m: m.q_avg.add_(torch.tensor(next(m.count))), "lift_fresh cannot be"),
    "host read": (lambda m: m.q_avg.mul_(m.q_avg.mean().item()), "_local_scalar_dense cannot be"),
    "list read": (lambda m: m.q_avg.mul_(m.q_avg.tolist()[0]), "values cannot be read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, graphs):
    """The emulation itself must tell a step that cannot be recorded from one that can."""
    fault, words = FAULTS[name]

    def faulty_step(method: ampl.AMPL) -> Callable[[], dict]:
        method.count = itertools.count()
        return lambda: (method.iterate(False, True), fault(method))[0]

    with pytest.raises((AssertionError, RuntimeError), match=words):
        compare("ampl", "AMPL", [faulty_step], [0] * 6)


# --- kernels ---


def count_kernels(name: str, learners: int) -> Counter[str]:
    """The operations of a step that launch at least one kernel on a GPU."""
    script, method, get_step, _ = STEPS[name]
    step = get_step(build(script, method, "meta", num_seeds=learners))
    step()  # optimizers make their moments in the first step
    with Graph() as graph:
        step()
    return Counter(op_name(op) for op, *_ in graph.ops)


@pytest.mark.parametrize("name", STEPS)
def test_number_of_kernels(name, monkeypatch):
    """Catches a loop over learners, members or tensors where one operation would do."""
    # torch knows the shapes of its fused Adam, but does not expect it on a device without values.
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda _: None)
    one, three, ceiling = count_kernels(name, 1), count_kernels(name, 3), STEPS[name][3]
    print(f"{name}: {one.total()} kernels, at most {ceiling}; {one.most_common(4)}")
    assert 0 < one.total() <= ceiling
    assert three.total() <= 1.03 * one.total(), "one learner does without a few copies"
