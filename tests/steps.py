"""The steps that are recorded as CUDA graphs, ready to be called: for tests and measurements.

`build` makes a method (AMPL, MOPO, COMBO, COMBOPixels) on random data of a task's shape. STEPS says
how to get each of its steps as a function without arguments.
"""

import functools
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl

WALKER2D = (17, 6)  # numbers in an observation and in an action
# Settings that make every method small. `build` leaves out those that a method does not have.
TINY = {
    "hidden": (8, 8),
    "noise_dim": 2,
    "batch_size": 16,
    "real_fraction": 0.25,
    "buffer_size": 50,
    "rollout_rows": 24,
    "rollout_starts": 8,
    "ensemble_size": 5,
    "num_elites": 3,
    "model_hidden": 8,
    "model_batch_size": 4,
    "omega_batch_size": 8,
    "omega_initial_batch_size": 8,
    "actor_lr": 1e-2,
    "critic_lr": 1e-2,
    "omega_lr": 1e-2,
    "sequences": 2,
    "sequence_length": 4,
    "memory_size": 8,
    "stoch_size": 3,
    "num_heads": 3,
    "conv_depth": 2,
    "model_rows": 50,
    "model_lr": 1e-2,
    "actor_hidden": (8, 8),
}


# ----- a method with data -----
def dataset(rows: int, obs_dim: int, action_dim: int) -> dict[str, Tensor]:
    """Random rows in episodes of ten, as load_dataset gives them; the last of each is terminal."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(rows, obs_dim, generator=generator)
    next_obs = torch.randn(rows, obs_dim, generator=generator)
    row = torch.arange(rows)
    ended = row % 10 == 9
    return {
        "obs": obs,
        "action": 2 * torch.rand(rows, action_dim, generator=generator) - 1,
        "reward": obs.sum(-1),
        "next_obs": next_obs,
        "terminated": ended,
        "has_next": ~ended,
        "next_row": torch.where(ended, -1, row + 1),
        "starts": obs[::10],
    }


def episodes(action_dim: int) -> dict[str, Tensor]:
    """Two episodes of 51 random images, as combo_pixels.load_dataset gives them."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 51)
    images = torch.randint(256, (*shape, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return {
        "image": images,
        "action": 2 * torch.rand(*shape, action_dim, generator=generator) - 1,
        "reward": torch.rand(shape, generator=generator),
    }


def build(script: str, method: str, device="cpu", rows=60, sizes=WALKER2D, **settings) -> nn.Module:
    """A method with data and a filled D_model; it takes those of the settings that it has.

    `script` is the name of a module that Python can import, `method` that of a class in it.
    """
    module = importlib.import_module(script)
    Args = getattr(module, "Args", ampl.Args)  # an ablation may have no settings of its own
    wanted = {"env_id": "walker2d-medium-v2", "initial_states": "dataset"} | settings
    args = Args(**{name: value for name, value in wanted.items() if hasattr(Args, name)})
    if script == "combo_pixels":
        obs_dim = args.stoch_size + args.memory_size  # of a latent state
        built = module.COMBOPixels(args, obs_dim, sizes[1], torch.device(device))
        built.set_data(episodes(sizes[1]))
        built.encode_data(ignore_progress)
    else:
        built = getattr(module, method)(args, *sizes, torch.device(device))
        built.set_data(dataset(rows, *sizes))
    built.rollout()
    return built


def script_of(method: nn.Module):
    """The module with the functions that a method calls, such as `capture`: its base class's."""
    classes = type(method).mro()  # for example VPM, AMPL, nn.Module, object
    base = classes[classes.index(nn.Module) - 1]
    return sys.modules[base.__module__]


# ----- its steps -----
class Captured(Exception):
    """Ends a phase as soon as it has a step to record, which is `args[0]`."""


def stop_with(step: Callable[[], dict], args) -> None:
    """Stands in for `capture`."""
    raise Captured(step)


def captured_step(method: nn.Module, phase: Callable, *arguments) -> Callable[[], dict] | None:
    """The step that a long phase, such as a fit, gives to `capture`; None if it gives none."""
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    step = None
    with mock.patch.object(script_of(method), "capture", stop_with):
        try:
            phase(*arguments)
        except Captured as captured:
            step = captured.args[0]
    # A phase may freeze networks up to its end, which it has not reached.
    for parameter in trained:
        parameter.requires_grad_(True)
    return step


def ignore_progress(phase: str, done: int, total: int | None, scalars: dict) -> None:
    """What a long phase reports to, here."""


def warmup_with_policy(method: nn.Module) -> Callable[[], dict]:
    """An iteration of AMPL's warm-up in which the policy steps."""
    return functools.partial(method.iterate, True, True)


def warmup_without_policy(method: nn.Module) -> Callable[[], dict]:
    """An iteration of AMPL's warm-up in which the policy stands still."""
    return functools.partial(method.iterate, True, False)


def main_with_policy(method: nn.Module) -> Callable[[], dict]:
    """An iteration of AMPL after the warm-up in which the policy steps."""
    return functools.partial(method.iterate, False, True)


def main_without_policy(method: nn.Module) -> Callable[[], dict]:
    """An iteration of AMPL after the warm-up in which the policy stands still."""
    return functools.partial(method.iterate, False, False)


def iteration(method: nn.Module) -> Callable[[], dict]:
    """An iteration of MOPO or COMBO."""
    return method.iterate


def rollout(method: nn.Module) -> Callable[[], dict]:
    """A rollout phase of any method."""
    return method.rollout


def refit_step(method: nn.Module) -> Callable[[], dict]:
    """A step of AMPL's model in a refit, with random weights of the rows."""
    omega = torch.rand(len(method.data), device=method.device)
    return captured_step(method, method.fit_model, 1, omega, ignore_progress)


def fit_step(method: nn.Module) -> Callable[[], dict]:
    """A step of MOPO's or COMBO's model."""
    return captured_step(method, method.fit_model, ignore_progress)


def latent_model_step(method: nn.Module) -> Callable[[], dict]:
    """A step of COMBOPixels' model."""
    return method.model_step


def omega_step(method: nn.Module) -> Callable[[], dict] | None:
    """A step of AMPL's omega; some ablations have none."""
    return captured_step(method, method.fit_omega, 1, ignore_progress)


class Step(NamedTuple):
    """A step: where it is, how to get it, and how many kernels it may launch on a GPU."""

    script: str
    method: str
    of: Callable[[nn.Module], Callable[[], dict] | None]
    most_kernels: int


STEPS = {
    "ampl warm-up, policy steps": Step("ampl", "AMPL", warmup_with_policy, 350),
    "ampl warm-up, policy stands": Step("ampl", "AMPL", warmup_without_policy, 310),
    "ampl, policy steps": Step("ampl", "AMPL", main_with_policy, 390),
    "ampl, policy stands": Step("ampl", "AMPL", main_without_policy, 320),
    "ampl rollout": Step("ampl", "AMPL", rollout, 235),
    "ampl model step": Step("ampl", "AMPL", refit_step, 100),
    "ampl omega step": Step("ampl", "AMPL", omega_step, 205),
    "mopo": Step("mopo", "MOPO", iteration, 187),
    "mopo rollout": Step("mopo", "MOPO", rollout, 615),
    "mopo model step": Step("mopo", "MOPO", fit_step, 100),
    "combo": Step("combo", "COMBO", iteration, 360),
    "combo rollout": Step("combo", "COMBO", rollout, 485),
    "combo model step": Step("combo", "COMBO", fit_step, 100),
    "combo_pixels": Step("combo_pixels", "COMBOPixels", iteration, 345),
    "combo_pixels rollout": Step("combo_pixels", "COMBOPixels", rollout, 315),
    "combo_pixels model step": Step("combo_pixels", "COMBOPixels", latent_model_step, 4200),
}


# ----- what a step changes -----
def state(method: nn.Module) -> list[Tensor]:
    """Everything that training changes: weights, D_model, moments of the optimizers."""
    tensors = list(method.state_dict().values())
    for value in vars(method).values():
        if isinstance(value, torch.optim.Optimizer):
            for moments in value.state_dict()["state"].values():
                tensors.extend(moments.values())
    return tensors


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two states, relative to the size of each tensor; NaN is infinite"""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        gap = (a.double() - b.double()).abs().max()
        size = a.double().abs().max().clamp(min=1e-3)
        relative = (gap / size).item()
        if not math.isfinite(relative):
            return math.inf
        largest = max(largest, relative)
    return largest
