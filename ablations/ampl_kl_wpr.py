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
"""AMPL with the dual of the KL divergence as its weighted policy regularizer (KL-dual + WPR).

The pairs and their weights are those of ampl_wpr.py. In place of the Jensen-Shannon divergence of
Eq. (8) they estimate KL(p || q), where p are the true and q the fake pairs:

    KL(p || q) = sup over T of  E_p[T] - log E_q[exp T]

T is the discriminator's output, any number. The discriminator raises this difference and the policy
lowers it. Both means are weighted by omega. Paper, Appendix A.

Run: `python ablations/ampl_kl_wpr.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
from ampl_wpr import WPR
import torch
from torch import Tensor


@dataclass
class Args(ampl.Args):
    mean_gap: bool = False  # the authors' code's objective, E_p[omega T] - E_q[omega T]

    without = ("true_label_min",)


def weighted_log_mean_exp(values: Tensor, weight: Tensor) -> Tensor:
    """The log of the weighted mean of exp(values), that is, of sum(weight exp) / sum(weight).

    values and weight are [B]. It is 0 where no row has a weight.
    """
    weighted = values + weight.clamp(min=1e-30).log()
    log_sum = torch.where(weight > 0, weighted, -1e30).logsumexp(0)
    total = weight.sum()
    return torch.where(total > 0, log_sum - total.clamp(min=1e-30).log(), 0.0)


def weighted_kl_generator_loss(fake: Tensor, omega: Tensor, keep: Tensor, mean_gap: bool) -> Tensor:
    """The part of the difference that the policy changes; fake is T at its pairs [B]."""
    # Paper: -log E_q[exp T]. Code: -E_q[T]. Here: the paper's, or the code's by --mean-gap.
    if mean_gap:
        return -ampl.masked_mean(omega * fake, keep)
    return -weighted_log_mean_exp(fake, omega * keep)


def weighted_kl_discriminator_loss(
    true: Tensor, fake: Tensor, omega: Tensor, keep: Tensor, mean_gap: bool
) -> Tensor:
    """Minus the whole difference; true and fake are T at the pairs [B]."""
    true_part = ampl.masked_mean(omega * true, keep)
    if not mean_gap:
        # The weights must sum to 1 in p as they do in q. Else T could gain by a constant alone.
        true_part = true_part / ampl.masked_mean(omega, keep).clamp(min=1e-30)
    return -weighted_kl_generator_loss(fake, omega, keep, mean_gap) - true_part


class KLWPR(WPR):
    def gan_losses(self, batch: ampl.Batch, step_actor: bool) -> tuple[Tensor, Tensor]:
        """The losses of policy and discriminator. The iteration's batch is not used."""
        true, fake, omega, keep = self.next_pairs(step_actor)
        mean_gap = self.args.mean_gap
        disc_loss = weighted_kl_discriminator_loss(true, fake, omega, keep, mean_gap)
        return weighted_kl_generator_loss(fake, omega, keep, mean_gap), disc_loss


if __name__ == "__main__":
    ampl.main(Args, KLWPR)
