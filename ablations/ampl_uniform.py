"""AMPL with omega = 1: the model is refitted on AMPL's schedule, but all rows weigh the same.

It tells the effect of fitting the model further from the effect of the weights. The paper lacks
this control and needs it: the weights of the authors' code are nearly flat (see README.md), so
that AMPL against NW (ampl_nw.py) may mainly measure nine more fits.

Run: `python ablations/ampl_uniform.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    without = ("initial_states", "num_initial_states", "omega_")


class Uniform(ampl.AMPL):
    def fit_omega(self, k: int, progress: ampl.Progress) -> Tensor:
        """Omega stays untrained. -> ones [N], with which Eq. (6) is Eq. (4)"""
        return torch.ones(len(self.data), device=self.device)


if __name__ == "__main__":
    ampl.main(Args, Uniform)
