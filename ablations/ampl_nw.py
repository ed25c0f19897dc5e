"""AMPL without weighted refits of the model (NW, "no weights"): the model is fitted once, Eq. (4).

Omega is never trained. Until the first refit would be due, a run is one of ampl.py bit for bit.
The question of the paper's Section 4.2 (a): do the weighted refits, Eq. (6) and (11), help?

Run: `python ablations/ampl_nw.py --env-id pen-human-v1`
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
