"""The steps that are recorded as CUDA graphs, checked without a GPU.

On a CPU with CUDA graphs emulated: a replayed step equals the plain step bit for bit. On meta
tensors, which have shapes and no values: how many kernels a step launches. Small kernels cost a
GPU about the same whatever they compute, so their number is the time of a step.
"""

import contextlib
import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from steps import STEPS, TINY, Step, build, difference, script_of, state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ampl

ABLATIONS = Path(ampl.__file__).parent / "ablations"
sys.path.append(str(ABLATIONS))


# ----- CUDA graphs on a CPU -----
# What a GPU refuses while it records, because the host would have to wait for a value or a shape,
# or because a tensor is made of a Python number and would have to be copied over.
REFUSED = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "equal",
    "lift_fresh",
)


def op_name(op: torch._ops.OpOverload) -> str:
    """The name of an operation of torch, such as `addmm`."""
    return op._schema.name.removeprefix("aten::")


def launches(op: torch._ops.OpOverload) -> bool:
    """Whether a GPU has to do something: neither a view nor an allocation."""
    if op.namespace == "profiler":
        return False
    for returned in op._schema.returns:
        if returned.alias_info and not returned.alias_info.is_write:
            return False  # a view
    return not op_name(op).startswith(("empty", "new_empty", "_unsafe_view"))


def tensors(tree) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that the operation changes in place."""
    changed = []
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            changed.append(value)
    return tensors(changed)


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph.

    Recording lists the operations with the very tensors they read and write, and leaves no trace
    in memory. `replay` runs the list again, without the Python around it. So what Python decided
    stays as it was when recorded, as on a GPU: numbers, branches, which tensor is meant.
    """

    def __init__(self):
        super().__init__()
        self.ops = []  # operation, its arguments, and the tensors that it returned
        self.replays = 0
        self.before = {}  # the memory that recording overwrites, with its content before that

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op_name(op) in REFUSED:
            raise RuntimeError(f"{op_name(op)} cannot be recorded")
        changed = written(op, args, kwargs)
        for tensor in changed:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.before:
                self.before[storage._cdata] = (storage, storage.clone())
        result = op(*args, **kwargs)
        if launches(op):
            # What is changed in place is changed again by a replay, and has not to be copied.
            returned = [] if changed else tensors(result)
            self.ops.append((op, args, kwargs, returned))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for op, args, kwargs, returned in self.ops:
            for old, new in zip(returned, tensors(op(*args, **kwargs))):
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
    """Puts the emulation in the place of CUDA. The list receives all graphs."""
    made = []
    stream = mock.Mock()

    def new_graph() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    # A CUDA build of torch would ask the driver, which need not be there, whether Adam is recorded.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    return made


# ----- recorded and plain steps -----
def built_with_steps(script: str, method: str, ways: list[Callable]) -> tuple[nn.Module, list]:
    """A method, and its step for each of the ways to get one. The weights are always the same."""
    built = build(script, method, **TINY)
    torch.manual_seed(0)
    return built, [way(built) for way in ways]


def change_share_of_data(method: nn.Module, call: int) -> None:
    """Do what a run does between iterations, in methods whose share of data rows may change."""
    if hasattr(method, "num_real"):
        method.num_real.fill_(16 - call % 9)


def assert_equal(plain: dict[str, Tensor], recorded: dict[str, Tensor], call: int) -> None:
    """That two dicts of scalars are equal bit for bit."""
    assert plain.keys() == recorded.keys()
    for key in plain:
        assert torch.equal(plain[key], recorded[key]), f"{key} differs in call {call}"


def compare(script: str, method: str, ways: list[Callable], rounds: int) -> None:
    """Take the steps in turns, plain and recorded, with equal random numbers: they are equal."""
    plain, plain_steps = built_with_steps(script, method, ways)
    twin, twin_steps = built_with_steps(script, method, ways)
    pairs = []
    for plain_step, twin_step in zip(plain_steps, twin_steps):
        if plain_step is not None:  # an ablation may not train omega, or never refit
            recorded_step = script_of(twin).capture(twin_step, twin.args)
            pairs.append((plain_step, recorded_step))
    for call in range(rounds):
        for plain_step, recorded_step in pairs:
            change_share_of_data(plain, call)
            change_share_of_data(twin, call)
            ampl.reseed(0, "call", call)
            expected = plain_step()
            ampl.reseed(0, "call", call)
            assert_equal(expected, recorded_step(), call)
    for one, other in zip(state(plain), state(twin), strict=True):
        assert torch.equal(one, other), "the state differs"


@pytest.mark.parametrize("name", STEPS)
def test_a_recorded_step_is_the_plain_step(name, graphs):
    """Catches a Python value, branch or re-bound tensor that a replay would miss."""
    step = STEPS[name]
    compare(step.script, step.method, [step.of], rounds=20)
    assert [graph.replays for graph in graphs] == [17]  # the first three calls are plain
    assert len(graphs[0].ops) > 20


def test_each_combination_of_flags_has_a_graph_of_its_own(graphs):
    """As in a run: the warm-up ends, and the policy steps every second time."""
    plain = build("ampl", "AMPL", **TINY)
    twin = build("ampl", "AMPL", **TINY)
    iterate = ampl.capture(twin.iterate, twin.args)
    for call in range(24):
        warmup = call < 12
        step_actor = call % 2 == 0
        ampl.reseed(0, "call", call)
        expected = plain.iterate(warmup, step_actor)
        ampl.reseed(0, "call", call)
        assert_equal(expected, iterate(warmup, step_actor), call)
    # Each of the four has had six calls, of which three were replays.
    assert [graph.replays for graph in graphs] == [3, 3, 3, 3]


def class_in(name: str) -> str:
    """The class of an ablation, by the name of its file."""
    found = []
    for value in vars(importlib.import_module(name)).values():
        if isinstance(value, type) and issubclass(value, ampl.AMPL) and value.__module__ == name:
            found.append(value.__name__)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("name", sorted(path.stem for path in ABLATIONS.glob("ampl_*.py")))
def test_an_ablation_can_be_recorded(name, graphs):
    """All steps of AMPL in turns: catches a graph that works on a tensor of its own."""
    ways = [step.of for step in STEPS.values() if step.script == "ampl"]
    compare(name, class_in(name), ways, rounds=6)
    assert len(graphs) >= 5  # four kinds of iteration and the rollout, which every ablation has
    assert all(graph.replays == 3 for graph in graphs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_on_cuda_a_recorded_step_is_the_plain_step(name):
    """The real thing: what the emulation cannot show, such as memory that a graph shares."""
    step = STEPS[name]
    plain = build(step.script, step.method, "cuda", **TINY)
    twin = build(step.script, step.method, "cuda", **TINY)
    torch.manual_seed(0)
    plain_step = step.of(plain)
    torch.manual_seed(0)
    recorded_step = script_of(twin).capture(step.of(twin), twin.args)
    for call in range(20):
        ampl.reseed(0, "call", call)
        plain_step()
        ampl.reseed(0, "call", call)
        recorded_step()
    assert difference(state(plain), state(twin)) < 1e-5


# ----- planted faults -----
def rebind_attribute(method: ampl.AMPL) -> None:
    method.q_avg = 1.01 * method.q_avg


def freeze_number(method: ampl.AMPL) -> None:
    method.q_avg.add_(torch.full((), float(method.calls)))


def freeze_branch(method: ampl.AMPL) -> None:
    if method.calls % 2 == 0:
        method.q_avg.add_(1)


def copy_number(method: ampl.AMPL) -> None:
    method.q_avg.add_(torch.tensor(method.calls))


def read_number(method: ampl.AMPL) -> None:
    method.q_avg.mul_(method.q_avg.item())


def read_list(method: ampl.AMPL) -> None:
    method.q_avg.mul_(method.q_avg.tolist())


FAULTS = [
    (rebind_attribute, "differs"),
    (freeze_number, "differs"),
    (freeze_branch, "differs"),
    (copy_number, "lift_fresh cannot be"),
    (read_number, "_local_scalar_dense cannot be"),
    (read_list, "values cannot be read"),
]


@pytest.mark.parametrize("fault, message", FAULTS)
def test_planted_faults_are_caught(fault, message, graphs):
    """The emulation itself must tell a step that cannot be recorded from one that can."""

    def faulty_step(method: ampl.AMPL) -> dict:
        logs = method.iterate(False, True)
        method.calls += 1
        fault(method)
        return logs

    def way(method: ampl.AMPL) -> Callable[[], dict]:
        method.calls = 0
        return functools.partial(faulty_step, method)

    with pytest.raises((AssertionError, RuntimeError), match=message):
        compare("ampl", "AMPL", [way], rounds=6)


# ----- kernels -----
class KernelCounter(TorchDispatchMode):
    """Counts the operations that launch at least one kernel on a GPU, by name.

    It holds no tensor, because autograd copies a gradient that somebody else holds, too.
    """

    def __init__(self):
        super().__init__()
        self.kernels = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if launches(op):
            self.kernels[op_name(op)] += 1
        return op(*args, **(kwargs or {}))


def count_kernels(step: Step, **settings) -> Counter[str]:
    """The kernels of a step at the sizes of the paper, but for the settings that are given."""
    run = step.of(build(step.script, step.method, "meta", **settings))
    run()  # optimizers make their moments in the first step
    with KernelCounter() as counter:
        run()
    return counter.kernels


@pytest.mark.parametrize("name", STEPS)
def test_number_of_kernels(name, monkeypatch):
    """Catches a loop over members, tensors or rows where one operation would do.

    On a GPU it is up to 22 less: on meta tensors clip_grad_norm_ takes the tensors one by one.
    """
    # torch knows the shapes of its fused Adam, but does not expect it on a device without values.
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda _: None)
    step = STEPS[name]
    kernels = count_kernels(step)
    more_members = count_kernels(step, ensemble_size=14, num_elites=10, num_heads=14)
    print(f"{name}: {kernels.total()} of {step.most_kernels}; {kernels.most_common(4)}")
    assert 0 < kernels.total() <= step.most_kernels
    assert more_members == kernels
