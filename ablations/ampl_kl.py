"""AMPL with a policy regularizer from the dual of the KL divergence, without weights (KL-dual).

Pairs are those of WPR (ampl_wpr.py), each counts the same; the discriminator is an unbounded
function T that estimates KL(p || q), p the true and q the fake pairs. The model is re-trained with
omega as in ampl.py. Paper, Appendix A.

    KL(p || q) = sup over T: E_p[T] - log E_q[exp T]

Run: `python ablations/ampl_kl.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import ampl
from ampl_wpr import WPR


@dataclass
class Args(ampl.Args):
    mean_gap: bool = False  # the objective is E_p[T] - E_q[T] (authors' code), without log and exp

    without = ("label_smoothing",)


def log_mean_exp(values: Tensor, keep: Tensor) -> Tensor:
    """log of the mean of exp(values) over rows with keep = 1, [L, B] -> [L]; 0 without rows."""
    total, values = keep.sum(-1), torch.where(keep > 0, values, -1e30)
    return torch.where(total > 0, values.logsumexp(-1) - total.clamp(min=1).log(), 0.0)


def kl_generator_loss(fake: Tensor, keep: Tensor, mean_gap: bool) -> Tensor:
    """The part of the KL dual that the policy moves, [L]; fake [L, B]: T at its pairs."""
    # Paper: -log E_q[exp T]. Code: -E_q[T]. Here: paper, or code by --mean-gap.
    return -(ampl.masked_mean if mean_gap else log_mean_exp)(fake, keep)


def kl_discriminator_loss(true: Tensor, fake: Tensor, keep: Tensor, mean_gap: bool) -> Tensor:
    """Minus the KL dual, [L]; T [L, B] at the true and at the fake pairs."""
    return -kl_generator_loss(fake, keep, mean_gap) - ampl.masked_mean(true, keep)


class KL(WPR):
    def gan_losses(self, obs: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        # Paper: silent. Code: unlike WPR it gives terminals no weight 0, so that they are paired
        # with the next episode's action. Here: pairs within an episode, as in ampl_wpr.py.
        true, fake, _, keep = self.next_pairs(raw.requires_grad)
        disc_loss = kl_discriminator_loss(true, fake, keep, self.args.mean_gap)
        return kl_generator_loss(fake, keep, self.args.mean_gap), disc_loss


if __name__ == "__main__":
    ampl.main(Args, KL)
