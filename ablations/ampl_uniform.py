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
"""AMPL with omega = 1: the model is refitted on AMPL's schedule, but all rows weigh the same.

It tells the effect of fitting the model further from the effect of the weights. The paper lacks
this control and needs it: the weights of the authors' code are nearly flat (see README.md), so
that AMPL against NW (ampl_nw.py) may mainly measure nine more fits.

Run: `python ablations/ampl_uniform.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
import torch
from torch import Tensor


@dataclass
class Args(ampl.Args):
    without = ("initial_states", "num_initial_states", "omega_")


class Uniform(ampl.AMPL):
    def fit_omega(self, k: int, progress: ampl.Progress) -> Tensor:
        """Omega stays untrained. -> ones [N], with which Eq. (6) is Eq. (4)"""
        return torch.ones(len(self.data), device=self.device)


if __name__ == "__main__":
    ampl.main(Args, Uniform)
