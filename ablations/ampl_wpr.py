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
"""AMPL with the weighted policy regularizer (WPR): the GAN keeps omega, which Eq. (8) drops.

As in Theorem 1 it compares pairs (s', a') that follow stored rows (s, a), each weighted by the
omega of its row. A true pair is the one that is stored. A fake pair is the s' that the model gives
after the stored (s, a), with an action of the policy. Policy and discriminator then minimise

    mean of omega * -log D(fake)
    mean of omega * (-log D(true) - log(1 - D(fake))) / 2

that is, Eq. (15) and (16) with omega and without pairs at s. Omega is that of the model's last fit,
so it is 1 before the first refit. Paper, Section 4.2 (c).

Run: `python ablations/ampl_wpr.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Args(ampl.Args):
    """The flags of ampl.py."""


def weighted_generator_loss(fake_logit: Tensor, omega: Tensor, keep: Tensor) -> Tensor:
    """`generator_loss` with weights: all arguments are [B]."""
    return ampl.masked_mean(omega * F.softplus(-fake_logit), keep)  # Eq. (15) with omega


def weighted_discriminator_loss(
    true_logit: Tensor, fake_logit: Tensor, omega: Tensor, keep: Tensor, true_label: Tensor
) -> Tensor:
    """`discriminator_loss` with weights, over pairs that belong together: all arguments are [B]."""
    true_part = F.binary_cross_entropy_with_logits(true_logit, true_label, reduction="none")
    fake_part = F.softplus(fake_logit)
    return ampl.masked_mean(omega * (true_part + fake_part), keep) / 2  # Eq. (16) with omega


class WPR(ampl.AMPL):
    def set_data(self, dataset: dict[str, Tensor]) -> None:
        """Find the rows of the data that another row follows."""
        super().set_data(dataset)
        next_row = dataset["next_row"]
        rows = (next_row >= 0).nonzero().squeeze(-1)
        if len(rows) == 0:
            sys.exit("the regularizer needs rows that follow one another in the data")
        # Paper: does not say. Code: takes every row and the one below it in the file, with weight 0
        # after a terminal. Where the row at a time limit was dropped, that is the next episode's
        # first pair, and its state becomes the s' of critic, model and omega, too (in 1 % of
        # pen-expert's rows; the paper's scores of WPR carry it). Here: only rows of one episode,
        # and the true s' everywhere.
        self.followed = torch.stack([rows, next_row[rows]], -1).to(self.device)  # [rows, 2]

        # A part of the state, so that --resume finds it. A CUDA graph reads this very tensor.
        self.register_buffer("data_omega", torch.ones(len(self.data), device=self.device))  # [N]

    def fit_omega(self, k: int, progress: ampl.Progress) -> Tensor:
        """As in ampl.py, and keep omega for the regularizer. -> omega / its mean [N]"""
        omega = super().fit_omega(k, progress)
        self.data_omega.copy_(omega)
        return omega

    def gan_losses(self, batch: ampl.Batch, step_actor: bool) -> tuple[Tensor, Tensor]:
        """The weighted losses of policy and discriminator. The iteration's batch is not used."""
        true_logit, fake_logit, omega, keep = self.next_pairs(step_actor)
        smallest = self.args.true_label_min
        true_label = smallest + (1 - smallest) * torch.rand_like(true_logit)
        disc_loss = weighted_discriminator_loss(true_logit, fake_logit, omega, keep, true_label)
        return weighted_generator_loss(fake_logit, omega, keep), disc_loss

    def next_pairs(self, step_actor: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the discriminator says of pairs that follow B rows of the data, all [B].

        -> true pairs, fake pairs, omega of their rows, and keep, which is 0 where the model's s' is
        terminal. With step_actor the gradient reaches the policy through the fake pairs.
        """
        rows, next_rows = self.random_rows(self.followed, self.args.batch_size).unbind(-1)
        row = self.split(self.data[rows])
        following = self.split(self.data[next_rows])
        with torch.set_grad_enabled(step_actor):
            _, next_obs, terminated = self.imagine(row.obs, row.action)
            fake_raw = self.actor.raw_action(next_obs)
        fake = self.discriminator(next_obs, fake_raw)
        true_raw = torch.atanh(following.action.clamp(-1 + 1e-7, 1 - 1e-7))
        true = self.discriminator(following.obs, true_raw)
        return true, fake, self.data_omega[rows], 1 - terminated


if __name__ == "__main__":
    ampl.main(Args, WPR)
