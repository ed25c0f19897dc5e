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

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    without = ("q_coef",)


class NoRegularizer(ampl.AMPL):
    def policy_loss(self, q_policy: Tensor, regularizer: Tensor) -> Tensor:
        """Minus the mean of q_policy [B]; the regularizer does not count."""
        return -q_policy.mean()


if __name__ == "__main__":
    ampl.main(Args, NoRegularizer)
