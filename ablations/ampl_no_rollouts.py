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
"""AMPL without D_model: every batch is from the data, that is, the share f of data rows stays 1.

The model is still fitted and refitted with omega, and still gives the s' of the fake pairs,
Eq. (14). Paper, Appendix A.

Run: `python ablations/ampl_no_rollouts.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait


@dataclass
class Args(ampl.Args):
    real_fraction: ampl.Share = 1.0  # final share f of data rows in a batch
    rollout_rows: ampl.Count = 1  # not used, but a rollout of it must fit into buffer_size
    buffer_size: ampl.Count = 10  # D_model stays empty and should take no memory

    without = ("horizon", "rollout_", "buffer_size", "real_")


class NoRollouts(ampl.AMPL):
    def rollout(self) -> ampl.Scalars:
        """Write nothing to D_model."""
        return {}


if __name__ == "__main__":
    ampl.main(Args, NoRollouts)
