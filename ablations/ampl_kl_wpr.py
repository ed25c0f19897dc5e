"""AMPL with the weighted policy regularizer from the dual of the KL divergence (KL-dual + WPR).

Pairs and weights are those of WPR (ampl_wpr.py); the discriminator is an unbounded function T that
estimates KL(p || q), p the true and q the fake pairs, in place of the Jensen-Shannon divergence of
Eq. (8). Paper, Appendix A.

    KL(p || q) = sup over T: E_p[T] - log E_q[exp T]

Run: `python ablations/ampl_kl_wpr.py --env-id pen-human-v1`
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


def log_mean_exp(values: Tensor, weight: Tensor) -> Tensor:
    """log of the weighted mean of exp(values), [L, B] -> [L]; 0 where no row has a weight."""
    values = torch.where(weight > 0, values + weight.clamp(min=1e-30).log(), -1e30)
    total = weight.sum(-1)
    return torch.where(total > 0, values.logsumexp(-1) - total.clamp(min=1e-30).log(), 0.0)


def kl_generator_loss(fake: Tensor, weight: Tensor, keep: Tensor, mean_gap: bool) -> Tensor:
    """The part of the KL dual that the policy moves, [L]; fake [L, B]: T at its pairs."""
    # Paper: -log E_q[exp T]. Code: -E_q[T]. Here: paper, or code by --mean-gap.
    if mean_gap:
        return -ampl.masked_mean(weight * fake, keep)
    return -log_mean_exp(fake, weight * keep)


def kl_discriminator_loss(
    true: Tensor, fake: Tensor, weight: Tensor, keep: Tensor, mean_gap: bool
) -> Tensor:
    """Minus the KL dual of the weighted pairs, [L]; T [L, B] at the true and at the fake ones."""
    # Weights sum to one in p as they do in q: else T could gain by a constant alone.
    scale = 1.0 if mean_gap else ampl.masked_mean(weight, keep).clamp(min=1e-30)
    true_part = ampl.masked_mean(weight * true, keep) / scale
    return -kl_generator_loss(fake, weight, keep, mean_gap) - true_part


class KLWPR(WPR):
    def gan_losses(self, obs: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        true, fake, weight, keep = self.next_pairs(raw.requires_grad)
        mean_gap = self.args.mean_gap
        disc_loss = kl_discriminator_loss(true, fake, weight, keep, mean_gap)
        return kl_generator_loss(fake, weight, keep, mean_gap), disc_loss


if __name__ == "__main__":
    ampl.main(Args, KLWPR)
