"""AMPL without weighted re-training (NW): the model is fitted to the data once.

Omega is never trained; up to the first re-training a run is bit for bit one of ampl.py. Paper,
Section 4.2 (a): do the weights of Eq. (6) and (11) help?

Run: `python ablations/ampl_nw.py --env-id pen-human-v1`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    without = ("model_retrain_every", "initial_states", "num_initial_states", "miw_")


class NW(ampl.AMPL):
    def retrain(self, k: int, log: Callable) -> None:
        """The first model, Eq. (4), stays."""


if __name__ == "__main__":
    ampl.main(Args, NW)
