"""The steps that are recorded as CUDA graphs, ready to be called: for tests and measurements.

`build` makes a method (AMPL, MOPO, COMBO) on random data of a task's shape; STEPS tells how to get
each of its steps as a function without arguments.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl

WALKER2D = 17, 6  # entries of an observation and of an action
TINY = dict(
    num_seeds=2, hidden=(8, 8), noise_dim=2, batch_size=16, buffer_size=50, rollout_rows=24,
    ensemble_size=5, num_elites=3, model_hidden=8, model_batch_size=4, miw_batch_size=8,
    miw_initial_batch_size=8, actor_lr=1e-2, critic_lr=1e-2, miw_lr=1e-2, rollout_starts=8,
)  # fmt: skip


def dataset(rows: int, obs_dim: int, action_dim: int) -> dict[str, Tensor]:
    """Random rows in episodes of ten, as load_dataset gives them."""
    g = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, rows, obs_dim, generator=g)
    action, row = 2 * torch.rand(rows, action_dim, generator=g) - 1, torch.arange(rows)
    ended = row % 10 == 9
    columns = dict(obs=obs, action=action, reward=obs.sum(-1), next_obs=next_obs, terminated=ended)
    next_row = torch.where(ended, -1, row + 1)
    return columns | dict(has_next=~ended, next_row=next_row, starts=obs[::10])


def build(script: str, method: str, device="cpu", rows=60, sizes=WALKER2D, **settings):
    """A method with data and a filled buffer; it takes those of the settings that it has."""
    module = importlib.import_module(script)
    Args = getattr(module, "Args", ampl.Args)
    settings = dict(env_id="walker2d-medium-v2", initial_states="dataset") | settings
    args = Args(**{name: value for name, value in settings.items() if hasattr(Args, name)})
    built = getattr(module, method)(args, *sizes, torch.device(device))
    built.set_data(dataset(rows, *sizes))
    built.rollout()
    return built


def model_step(method) -> Callable[[], dict]:
    """A step of AMPL's model on the rows whose next state is known."""
    inputs, targets = method.model_pairs()
    rows = torch.arange(len(inputs), device=method.device).expand(method.learners, -1).contiguous()
    weight = torch.rand(rows.shape, device=method.device)
    return lambda: method.model_step(inputs, targets, weight, rows)


def sac_model_step(method) -> Callable[[], dict]:
    """The same of MOPO's and COMBO's."""
    inputs, targets = method.model_pairs()
    order = torch.arange(len(inputs), device=method.device).repeat(*method.model.lead, 1)
    place = torch.zeros((), dtype=torch.long, device=method.device)
    return lambda: method.model_step(inputs, targets, order, place)


def miw_step(method) -> Callable[[], dict]:
    """A step of omega, with noise for the table of Q_1."""
    q_data = torch.randn(method.weight.shape, device=method.device)
    own = "q_data" not in inspect.signature(method.miw_step).parameters  # an ablation's
    return method.miw_step if own else lambda: method.miw_step(q_data)


def validation(method) -> Callable[[], Tensor]:
    """A look at AMPL's hold-out rows."""
    inputs, targets = method.model_pairs()
    rows = torch.arange(min(method.args.holdout_size, len(inputs)), device=method.device)
    rows = rows.expand(method.learners, -1).contiguous()
    weight = torch.ones(method.learners, len(inputs), device=method.device)
    return lambda: method.validate(inputs, targets, weight, rows)


# Name: script, class, how to get the step, how many kernels it may launch (see test_graphs.py).
STEPS = {
    "ampl warm-up, policy moves": ("ampl", "AMPL", lambda m: lambda: m.iterate(True, True), 275),
    "ampl warm-up, policy stands": ("ampl", "AMPL", lambda m: lambda: m.iterate(True, False), 235),
    "ampl policy moves": ("ampl", "AMPL", lambda m: lambda: m.iterate(False, True), 290),
    "ampl policy stands": ("ampl", "AMPL", lambda m: lambda: m.iterate(False, False), 240),
    "ampl rollout": ("ampl", "AMPL", lambda m: m.rollout, 235),
    "ampl model step": ("ampl", "AMPL", model_step, 100),
    "ampl omega step": ("ampl", "AMPL", miw_step, 170),
    "mopo": ("mopo", "MOPO", lambda m: m.iterate, 140),
    "mopo rollout": ("mopo", "MOPO", lambda m: m.rollout, 615),
    "mopo model step": ("mopo", "MOPO", sac_model_step, 100),
    "combo": ("combo", "COMBO", lambda m: m.iterate, 335),
    "combo rollout": ("combo", "COMBO", lambda m: m.rollout, 485),
    "combo model step": ("combo", "COMBO", sac_model_step, 100),
}


def state(method) -> list[Tensor]:
    """Everything that training changes: weights, buffer, moments of the optimizers."""
    moments = [optimizer.state_dict()["state"] for optimizer in method.optimizers.values()]
    leaves = torch.utils._pytree.tree_leaves(moments)
    return [*method.state_dict().values(), *(x for x in leaves if isinstance(x, Tensor))]


def difference(one: list[Tensor], two: list[Tensor]) -> float:
    """The largest difference of two states, relative to the size of each tensor; NaN is infinite"""
    found = []
    for a, b in zip(one, two, strict=True):
        gap, size = (a.double() - b.double()).abs().max(), a.double().abs().max().clamp(min=1e-3)
        found.append((gap / size).item())
    return max(found) if all(map(math.isfinite, found)) else math.inf
