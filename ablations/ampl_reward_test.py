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
"""AMPL with the reward in place of Q as the test function of omega.

Omega is trained so that both sides of Eq. (10) agree, with the model's reward r^ where Q stands:

    E[omega r^(s, a)] = gamma E[omega' r^(s', a')] + (1 - gamma) E[r^(s0, a0)]

E is a mean over the data, or over initial states s0. The actions a' and a0 are the policy's.
Paper, Appendix A.

Run: `python ablations/ampl_reward_test.py --env-id pen-human-v1`
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


class RewardTest(ampl.AMPL):
    def model_reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Rewards drawn from the model: [B, S], [B, A] -> [B]."""
        reward, _ = self.elites.sample(obs, action)
        return reward

    def omega_step(self, q_data: Tensor) -> ampl.Scalars:
        """One step of omega, Eq. (11) with r^ for Q. The Q of the data, q_data [N], is not used."""
        args = self.args
        batch = self.sample_data(args.omega_batch_size)
        start = self.random_rows(self.initial_obs, args.omega_initial_batch_size)
        # Paper: the reward. Code: the model's reward, scaled like the data's and drawn anew on both
        # sides and in every step. There is no slow copy of it, as there is of Q.
        with torch.no_grad():
            reward = self.model_reward(batch.obs, batch.action)
            reward_next = self.model_reward(batch.next_obs, self.actor(batch.next_obs))
            reward_next = reward_next * (1 - batch.terminated)  # nothing follows a terminal state
            reward_initial = self.model_reward(start, self.actor(start))
            omega_target = self.omega_target(batch.obs, batch.action)
        omega = self.omega(batch.obs, batch.action)
        loss = ampl.omega_loss(omega, omega_target, reward, reward_next, reward_initial, args.gamma)
        mean_omega = omega.mean()
        self.move_omega(loss, mean_omega)
        ampl.polyak(self.omega_target, self.omega, args.omega_tau)
        return {"losses/omega_loss": loss.detach(), "omega/batch_mean": mean_omega.detach()}


if __name__ == "__main__":
    ampl.main(Args, RewardTest)
