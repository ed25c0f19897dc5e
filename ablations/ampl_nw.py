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
"""AMPL without weighted refits of the model (NW, "no weights"): the model is fitted once, Eq. (4).

Omega is never trained. Until the first refit would be due, a run is one of ampl.py bit for bit.
The question of the paper's Section 4.2 (a): do the weighted refits, Eq. (6) and (11), help?

Run: `python ablations/ampl_nw.py --env-id pen-human-v1`
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
    without = ("model_retrain_every", "initial_states", "num_initial_states", "omega_")


class NW(ampl.AMPL):
    def fit_omega(self, k: int, progress: ampl.Progress) -> Tensor:
        """Omega stays untrained. -> ones [N], which weight nothing"""
        return torch.ones(len(self.data), device=self.device)

    def fit_model(self, k: int, omega: Tensor, progress: ampl.Progress) -> Tensor | None:
        """The first fit as in ampl.py. Where a refit would be due, the model stays as it is."""
        if k > 0:
            return None
        return super().fit_model(k, omega, progress)


if __name__ == "__main__":
    ampl.main(Args, NW)
