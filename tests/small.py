"""Small methods on random data (S = 3, A = 2), for tests that look at a single step."""

import torch
from torch import Tensor

import ampl
import combo
import mopo


def random_dataset(rows: int, obs_dim: int, action_dim: int) -> dict[str, Tensor]:
    """Random transitions in episodes of ten, as load_dataset gives them.

    Every episode ends in a terminal whose next state is not stored.
    """
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(rows)
    is_last = row % 10 == 9
    obs = torch.randn(rows, obs_dim, generator=generator)
    return {
        "obs": obs,
        "action": 2 * torch.rand(rows, action_dim, generator=generator) - 1,
        "reward": torch.randn(rows, generator=generator),
        "next_obs": torch.randn(rows, obs_dim, generator=generator),
        "terminated": is_last,
        "has_next": ~is_last,
        "next_row": torch.where(is_last, -1, row + 1),
        "starts": obs[::10],
    }


def build_ampl(**changes) -> ampl.AMPL:
    """AMPL on 40 random rows with a filled buffer; half of a batch of 16 is from the data.

    `changes` are settings. The task's own rule never ends an episode.
    """
    settings = {
        "env_id": "door-expert-v1",
        "initial_states": "dataset",
        "cuda": False,
        "hidden": (8, 8),
        "noise_dim": 2,
        "batch_size": 16,
        "buffer_size": 50,
        "rollout_rows": 24,
        "ensemble_size": 5,
        "num_elites": 3,
        "model_hidden": 8,
        "model_batch_size": 4,
        "omega_batch_size": 8,
        "omega_initial_batch_size": 8,
    }
    args = ampl.Args(**(settings | changes))
    method = ampl.AMPL(args, 3, 2, torch.device("cpu"))
    method.set_data(random_dataset(40, 3, 2))
    method.rollout()
    method.num_real.fill_(args.batch_size // 2)
    torch.manual_seed(1)
    return method


# Settings of MOPO and COMBO. The task's own rule never ends an episode. A quarter of a batch of 16
# is from the data.
SMALL = {
    "env_id": "halfcheetah-medium-v2",
    "cuda": False,
    "hidden": (8, 8),
    "batch_size": 16,
    "real_fraction": 0.25,
    "horizon": 3,
    "rollout_starts": 20,
    "rollout_retain": 2,
    "ensemble_size": 3,
    "num_elites": 2,
    "model_hidden": 8,
    "model_batch_size": 16,
    "holdout_size": 10,
}


def build_mopo(**changes) -> mopo.MOPO:
    """MOPO on 40 random rows with a filled buffer. `changes` are settings beside those of SMALL."""
    args = mopo.Args(**(SMALL | changes))
    method = mopo.MOPO(args, 3, 2, torch.device("cpu"))
    method.set_data(random_dataset(40, 3, 2))
    method.rollout()
    torch.manual_seed(1)
    return method


def build_combo(**changes) -> combo.COMBO:
    """COMBO on 40 random rows with a filled buffer. `changes` are settings beside those of SMALL.

    It has 2 actions of each of the three kinds.
    """
    args = combo.Args(**(SMALL | {"num_actions": 2} | changes))
    method = combo.COMBO(args, 3, 2, torch.device("cpu"))
    method.set_data(random_dataset(40, 3, 2))
    method.rollout()
    torch.manual_seed(1)
    return method
