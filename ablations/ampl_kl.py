"""AMPL with the dual of the KL divergence as the policy's regularizer, without weights (KL-dual).

The pairs are those of ampl_wpr.py, and all count the same. In place of the Jensen-Shannon
divergence of Eq. (8) they estimate KL(p || q), where p are the true and q the fake pairs:

    KL(p || q) = sup over T of  E_p[T] - log E_q[exp T]

T is the discriminator's output, any number. The discriminator raises this difference and the policy
lowers it. The model is refitted with omega as in ampl.py. Paper, Appendix A.

Run: `python ablations/ampl_kl.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl
from ampl_wpr import WPR


@dataclass
class Args(ampl.Args):
    mean_gap: bool = False  # the authors' code's objective, E_p[T] - E_q[T]

    without = ("true_label_min",)


def log_mean_exp(values: Tensor, keep: Tensor) -> Tensor:
    """The log of the mean of exp(values) over the rows with keep = 1; 0 without such rows.

    values and keep are [B].
    """
    count = keep.sum()
    log_sum = torch.where(keep > 0, values, -1e30).logsumexp(0)
    return torch.where(count > 0, log_sum - count.clamp(min=1).log(), 0.0)


def kl_generator_loss(fake: Tensor, keep: Tensor, mean_gap: bool) -> Tensor:
    """The part of the difference that the policy changes; fake is T at its pairs [B]."""
    # Paper: -log E_q[exp T]. Code: -E_q[T]. Here: the paper's, or the code's by --mean-gap.
    if mean_gap:
        return -ampl.masked_mean(fake, keep)
    return -log_mean_exp(fake, keep)


def kl_discriminator_loss(true: Tensor, fake: Tensor, keep: Tensor, mean_gap: bool) -> Tensor:
    """Minus the whole difference; true and fake are T at the pairs [B]."""
    return -kl_generator_loss(fake, keep, mean_gap) - ampl.masked_mean(true, keep)


class KL(WPR):
    def gan_losses(self, batch: ampl.Batch, step_actor: bool) -> tuple[Tensor, Tensor]:
        """The losses of policy and discriminator. The iteration's batch is not used."""
        # Paper: does not say. Code: unlike its WPR it keeps terminal rows, paired with the next
        # episode's action. Here: the pairs of ampl_wpr.py, all within an episode.
        true, fake, _, keep = self.next_pairs(step_actor)
        mean_gap = self.args.mean_gap
        disc_loss = kl_discriminator_loss(true, fake, keep, mean_gap)
        return kl_generator_loss(fake, keep, mean_gap), disc_loss


if __name__ == "__main__":
    ampl.main(Args, KL)
