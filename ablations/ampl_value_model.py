"""AMPL with the value function as the model's discriminator: re-fits are value-aware.

After fit 0, Eq. (4), the model's loss in place of Eq. (6) is, per row and times omega, the negative
log-likelihood of the reward alone plus the error of Q_1 at the next state that the model draws:

    |Q_1(s', pi(s')) - Q_1(s'_hat, pi(s'_hat))|, the gradient through the state s'_hat only

Elites and the end of a fit are judged by the squared error, as in ampl.py. Paper, Appendix A.

Run: `python ablations/ampl_value_model.py --env-id pen-human-v1`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    """Those of ampl.py."""


class ValueModel(ampl.AMPL):
    def fit_model(self, k: int, weight: Tensor, log: Callable) -> Tensor:
        self.value_aware = k > 0  # the same in all steps of a fit, as its CUDA graph needs
        return super().fit_model(k, weight, log)

    def next_value(self, x: Tensor, target: Tensor) -> Tensor:
        """Q_1(s', pi(s')) of normalised inputs and targets [L, M, B, ...]. -> [L, M, B]"""
        model = self.model
        obs = (x * model.input_std + model.input_mean)[..., : self.sizes[0]]
        next_obs = obs + (target * model.target_std + model.target_mean)[..., 1:]
        next_obs = next_obs.flatten(1, 2)  # [L, M B, S]
        with torch.no_grad():
            action = torch.tanh(self.actor(next_obs))
        return self.critic.first(next_obs, action).view(x.shape[:3])

    def fit_loss(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Of normalised inputs and targets [L, M, B, ...]. -> [L, M]"""
        if not self.value_aware:
            return super().fit_loss(x, y, weight)
        mean, log_std = self.model(x)
        y_hat = mean + log_std.exp() * torch.randn_like(mean)
        gap = (self.next_value(x, y) - self.next_value(x, y_hat)).abs()
        reward_loss = ampl.model_loss(mean[..., :1], log_std[..., :1], y[..., :1], weight)
        return reward_loss + (weight * gap).mean(-1)


if __name__ == "__main__":
    ampl.main(Args, ValueModel)
