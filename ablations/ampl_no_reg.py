"""AMPL without the policy regularizer: after the warm start the policy only maximises Q.

Its loss is -mean min_j Q_j, the first term of Eq. (17) without lambda. The warm start still
imitates through the GAN; after it the discriminator goes on for the log alone, where
losses/generator_loss tells how far the policy has left the data. Paper, Appendix A.

Run: `python ablations/ampl_no_reg.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    without = ("q_coef",)


class NoRegularizer(ampl.AMPL):
    def policy_loss(self, q_min: Tensor, gan_loss: Tensor) -> Tensor:
        return -q_min.mean(-1)


if __name__ == "__main__":
    ampl.main(Args, NoRegularizer)
