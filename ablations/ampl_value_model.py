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
"""AMPL with the value function as the model's discriminator: refits of the model are value-aware.

The first fit is that of ampl.py, Eq. (4). In the refits a next state s^' that the model draws need
not be likely; it must have the value of the true s'. The loss of a row, in place of Eq. (6), is

    omega * (-log P^(r | s, a) + |Q_1(s', pi(s')) - Q_1(s^', pi(s^'))|)

with the likelihood of the reward alone (up to the constants of `model_loss`). The gradient flows
through the state s^' only. Held-out rows are judged by the squared error, as in ampl.py. Paper,
Appendix A.

Run: `python ablations/ampl_value_model.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
import torch
from torch import Tensor


@dataclass
class Args(ampl.Args):
    """The flags of ampl.py."""


class ValueModel(ampl.AMPL):
    def fit_model(self, k: int, omega: Tensor, progress: ampl.Progress) -> Tensor:
        """As in ampl.py, but value-aware from the second fit on. -> hold-out errors [M]"""
        self.value_aware = k > 0  # the same in all steps of a fit, as a CUDA graph needs it
        self.critic.requires_grad_(False)  # its gradients would cost time and are not used
        error = super().fit_model(k, omega, progress)
        self.critic.requires_grad_(True)
        return error

    def fit_loss(self, x: Tensor, y: Tensor, omega: Tensor) -> Tensor:
        """On inputs x and targets y [M, B, ...], both standardised, and omega [M, B]. -> [M]"""
        if not self.value_aware:
            return super().fit_loss(x, y, omega)
        mean, log_std = self.model(x)
        drawn = mean + log_std.exp() * torch.randn_like(mean)
        value_error = (self.next_value(x, y) - self.next_value(x, drawn)).abs()  # [M, B]
        reward_loss = ampl.model_loss(mean[..., :1], log_std[..., :1], y[..., :1], omega)
        return reward_loss + (omega * value_error).mean(-1)

    def next_value(self, x: Tensor, y: Tensor) -> Tensor:
        """Q_1(s', pi(s')) for inputs x and targets y [M, B, ...], both standardised. -> [M, B]"""
        model = self.model
        inputs = x * model.input_std + model.input_mean  # s, a
        targets = y * model.target_std + model.target_mean  # r, s' - s
        next_obs = inputs[..., : self.obs_dim] + targets[..., 1:]
        next_obs = next_obs.flatten(0, 1)  # [M * B, S]
        with torch.no_grad():
            next_action = self.actor(next_obs)
        return self.critic.q1_only(next_obs, next_action).view(x.shape[:2])


if __name__ == "__main__":
    ampl.main(Args, ValueModel)
