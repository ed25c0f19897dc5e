# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "d4rl==1.1", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "h5py==3.16.0",
#   "matplotlib==3.11.2", "mujoco==4.0.0", "numpy==2.4.6", "pillow==13.0.0", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# [tool.uv]  # d4rl is only a table of URLs here: what it asks for is never installed
# override-dependencies = [
#   "click; python_version < '0'", "dm-control; python_version < '0'",
#   "gym; python_version < '0'", "mjrl; python_version < '0'",
#   "mujoco-py; python_version < '0'", "pybullet; python_version < '0'",
#   "termcolor; python_version < '0'",
# ]
# ///
"""AMPL with a Gaussian policy in place of the implicit one, under the same GAN regularizer.

The action before the tanh is a sample of a Gaussian whose dimensions are independent, so that the
policy can no longer have several modes:

    a = tanh(mean(s) + std(s) * z),  z from N(0, 1)

Paper, Appendix A.

Run: `python ablations/ampl_gaussian.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
import torch
from torch import Tensor, nn


@dataclass
class Args(ampl.Args):
    without = ("noise_",)


class GaussianPolicy(nn.Module):
    """a = tanh of a sample of N(mean(s), std(s)^2), through which the gradient flows."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = ampl.mlp(obs_dim, args.hidden, 2 * action_dim)  # mean and log_std side by side

    def raw_action(self, obs: Tensor) -> Tensor:
        """A sample before the tanh: [B, S] -> [B, A]."""
        mean, log_std = self.net(obs).chunk(2, -1)
        # Paper: does not say. Code: these bounds, and no bonus for entropy.
        std = log_std.clamp(-20, 2).exp()
        return mean + std * torch.randn_like(mean)

    def forward(self, obs: Tensor) -> Tensor:
        """A sample in (-1, 1): [B, S] -> [B, A]."""
        return torch.tanh(self.raw_action(obs))


class Gaussian(ampl.AMPL):
    Policy = GaussianPolicy


if __name__ == "__main__":
    ampl.main(Args, Gaussian)
