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
"""AMPL without the policy's regularizer: after the warm-up the policy only raises Q.

Its loss is then the first term of Eq. (17), without the factor lambda:

    - mean over s of min_j Q_j(s, pi(s))

The warm-up still imitates the data by the GAN. After it the discriminator goes on learning for the
log alone, where losses/generator_loss tells how far the policy has left the data. Paper,
Appendix A.

Run: `python ablations/ampl_no_reg.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
from torch import Tensor


@dataclass
class Args(ampl.Args):
    without = ("q_coef",)


class NoRegularizer(ampl.AMPL):
    def policy_loss(self, q_policy: Tensor, regularizer: Tensor) -> Tensor:
        """Minus the mean of q_policy [B]; the regularizer does not count."""
        return -q_policy.mean()


if __name__ == "__main__":
    ampl.main(Args, NoRegularizer)
