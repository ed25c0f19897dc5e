"""AMPL with omega = 1: tells the effect of re-training the model from that of the weights.

The model is re-trained on AMPL's schedule, Eq. (6), with every weight one. The paper lacks this
control, and needs it: the released weights are nearly flat (README), so that AMPL against NW may
mainly measure nine more re-trainings.

Run: `python ablations/ampl_uniform.py --env-id pen-human-v1`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    without = ("initial_states", "num_initial_states", "miw_")


class Uniform(ampl.AMPL):
    def retrain(self, k: int, log: Callable) -> None:
        self.fit_model(k, torch.ones_like(self.weight), log)  # Eq. (6) at omega = 1


if __name__ == "__main__":
    ampl.main(Args, Uniform)
