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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
from ampl_wpr import WPR
import torch
from torch import Tensor


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
