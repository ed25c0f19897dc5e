"""AMPL with the reward as the test function of omega, in place of Q.

The flow equation is held against r_hat(s, a), drawn from the model on both sides of Eq. (10):

    E[omega r_hat(s, a)] = gamma E[omega' r_hat(s', a')] + (1 - gamma) E[r_hat(s0, a0)]

Paper, Appendix A.

Run: `python ablations/ampl_reward_test.py --env-id pen-human-v1`
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
    miw_tau: float = 0.01  # Polyak rate of the slow copy of omega (authors' code)


class RewardTest(ampl.AMPL):
    def model_reward(self, obs: Tensor, action: Tensor | None = None) -> Tensor:
        """A draw of r_hat(s, a) [L, B], without an action at a fresh one of the policy."""
        action = torch.tanh(self.actor(obs)) if action is None else action
        return self.elites.sample(obs, action)[0]

    def fit_weight(self, k: int, log: Callable) -> Tensor:
        return self.train_weight(self.miw_step, k, log)

    def miw_step(self) -> ampl.Logs:
        """One step of omega, Eq. (11) with r_hat for Q; all else is ampl.py's."""
        args = self.args
        batch = self.sample_data(args.miw_batch_size)
        start = self.sample_rows(self.initial_obs, args.miw_initial_batch_size)
        with torch.no_grad():
            # Paper: the reward. Code: the model's, in scaled units, drawn anew on both sides and
            # in every step, no slow copy of it. Here: code.
            reward = self.model_reward(batch.obs, batch.action)
            reward_next = self.model_reward(batch.next_obs) * (1 - batch.terminated)
            reward_initial = self.model_reward(start)
            omega_slow = self.omega_slow(batch.obs, batch.action)
        omega = self.omega(batch.obs, batch.action)
        loss = ampl.miw_loss(omega, omega_slow, reward, reward_next, reward_initial, args.gamma)
        return self.move_omega(omega, loss)


if __name__ == "__main__":
    ampl.main(Args, RewardTest)
