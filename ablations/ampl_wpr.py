"""AMPL with the weighted policy regularizer (WPR): the GAN keeps omega, which Eq. (8) drops.

As in Theorem 1 it compares next pairs (s', a') of stored rows, each weighted by omega of its row:
true ones are stored, fake ones are the model's s' after the stored (s, a) with an action of the
policy. The weights are those of the model's last fit, so one before the first re-training. Paper,
Section 4.2 (c); Eq. (15) and (16), with omega and without pairs at s.

Run: `python ablations/ampl_wpr.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    """Those of ampl.py."""


def weighted_generator_loss(fake: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """How far the policy's pairs, by their logits [L, B], are from passing as data; -> [L]"""
    return ampl.masked_mean(weight * F.softplus(-fake), keep)  # Eq. (15) with omega


def weighted_discriminator_loss(
    true: Tensor, fake: Tensor, weight: Tensor, keep: Tensor, label: Tensor
) -> Tensor:
    """Cross-entropy of telling true from fake pairs by their logits [L, B]; -> [L]"""
    each = F.softplus(true) - label * true + F.softplus(fake)
    return 0.5 * ampl.masked_mean(weight * each, keep)  # Eq. (16) with omega


class WPR(ampl.AMPL):
    def set_data(self, dataset: dict[str, Tensor]) -> None:
        super().set_data(dataset)
        rows = (dataset["next_row"] >= 0).nonzero().squeeze(-1)
        if len(rows) == 0:
            sys.exit("the regularizer needs rows that follow one another in the data")
        # Paper: silent. Code: all neighbours, at weight 0 after a terminal. As rows at time limits
        # are dropped, the row before one gets the next episode's first pair, and its s' becomes
        # that state for critic, model and omega, too (1 % of pen-expert's rows; the paper's WPR
        # numbers carry it). Here: neighbours within an episode, and everywhere the true s'.
        self.pairs = torch.stack([rows, dataset["next_row"][rows]], -1).to(self.device)  # [n, 2]

    def next_pairs(self, step_actor: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of true and of fake next pairs, weight and keep of their rows, [L, B] each."""
        rows, next_rows = self.sample_rows(self.pairs, self.args.batch_size).unbind(-1)
        batch, after = self.split(self.data[rows]), self.split(self.data[next_rows])
        with torch.set_grad_enabled(step_actor):
            reward, next_obs = self.elites.sample(batch.obs, batch.action)
            _, terminated = self.terminate(reward, next_obs)
            raw_action = self.actor(next_obs)
        fake = self.discriminator(next_obs, raw_action)
        true_raw = torch.atanh(after.action.clamp(-1 + 1e-7, 1 - 1e-7))
        true = self.discriminator(after.obs, true_raw)
        return true, fake, self.weight.gather(1, rows), 1 - terminated

    def gan_losses(self, obs: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments, where ampl.py's pairs start, only tell whether the policy moves."""
        true, fake, weight, keep = self.next_pairs(raw.requires_grad)
        smoothing = self.args.label_smoothing
        label = smoothing + (1 - smoothing) * torch.rand_like(true)
        disc_loss = weighted_discriminator_loss(true, fake, weight, keep, label)
        return weighted_generator_loss(fake, weight, keep), disc_loss


if __name__ == "__main__":
    ampl.main(Args, WPR)
