"""AMPL with a Gaussian policy in place of the implicit one, under the same GAN regularizer.

The raw action is a reparameterised sample of N(mean(s), std(s)^2), every entry by itself, so that
the policy can no longer have several modes. Paper, Appendix A.

Run: `python ablations/ampl_gaussian.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    without = ("noise_",)


class GaussianPolicy(nn.Module):
    """forward: obs [L, B, S] -> a sample of the raw (pre-tanh) action [L, B, A]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = ampl.MLP((args.num_seeds,), obs_dim, args.hidden, 2 * action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        mean, log_std = self.net(obs).chunk(2, -1)
        # Paper: a Gaussian. Code: log_std clamped to [-20, 2], no entropy term. Here: code.
        return mean + log_std.clamp(-20, 2).exp() * torch.randn_like(mean)


class Gaussian(ampl.AMPL):
    Policy = GaussianPolicy


if __name__ == "__main__":
    ampl.main(Args, Gaussian)
