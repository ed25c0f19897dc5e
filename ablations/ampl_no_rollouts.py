"""AMPL without rollout data: every batch comes from the data, the share f of real rows stays 1.

The model still gives the s' of the policy's pairs, Eq. (14), and is re-trained with omega as in
ampl.py. Paper, Appendix A.

Run: `python ablations/ampl_no_rollouts.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    real_fraction: float = 1.0  # share f of real rows in a batch
    rollout_rows: int = 1  # like the next: the buffer stays empty and takes no memory
    buffer_size: int = 1

    without = ("horizon", "rollout_", "buffer_size", "real_", "shared_rollout_action")


class NoRollouts(ampl.AMPL):
    def rollout(self) -> ampl.Logs:
        return {}


if __name__ == "__main__":
    ampl.main(Args, NoRollouts)
