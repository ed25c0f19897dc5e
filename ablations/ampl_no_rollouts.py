"""AMPL without D_model: every batch is from the data, that is, the share f of data rows stays 1.

The model is still fitted and refitted with omega, and still gives the s' of the fake pairs,
Eq. (14). Paper, Appendix A.

Run: `python ablations/ampl_no_rollouts.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    real_fraction: ampl.Share = 1.0  # final share f of data rows in a batch
    rollout_rows: ampl.Count = 1  # not used, but may not exceed buffer_size
    buffer_size: ampl.Count = 1  # D_model stays empty and should take no memory

    without = ("horizon", "rollout_", "buffer_size", "real_")


class NoRollouts(ampl.AMPL):
    def rollout(self) -> ampl.Scalars:
        """Write nothing to D_model."""
        return {}


if __name__ == "__main__":
    ampl.main(Args, NoRollouts)
