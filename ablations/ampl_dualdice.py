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
"""AMPL with omega by DualDICE (Nachum, Chow, Dai, Li 2019).

In place of one fixed Q a test function nu is learned, which seeks where omega breaks the flow
equation, Eq. (9). Nothing holds the mean of omega at 1:

    max over omega, min over nu:
        J = E[(nu(s, a) - gamma nu(s', a')) omega] - E[omega^3 / 3] - (1 - gamma) E[nu(s0, a0)]

E is a mean over the data, or over initial states s0. The actions a' and a0 are the policy's. Paper,
Section 4.2 (b).

Run: `python ablations/ampl_dualdice.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
from ampl_vpm import ClippedOmega
import torch
from torch import Tensor, nn


@dataclass
class Args(ampl.Args):
    omega_lr: ampl.Positive = 1e-4  # Adam learning rate of omega (authors' code)
    test_function_lr: ampl.Positive = (
        1e-4  # Adam learning rate of the test function nu (authors' code)
    )
    omega_grad_value: ampl.Positive = 1.0  # bound of each entry of a gradient (authors' code)

    without = ("omega_power", "omega_tau", "omega_mean_bound", "omega_grad_norm")


class TestFunction(nn.Module):
    """nu(s, a)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = ampl.mlp(obs_dim + action_dim, args.hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """[B, S], [B, A] -> [B]."""
        return self.net(torch.cat([obs, action], -1)).squeeze(-1)


def dualdice_objective(
    omega: Tensor, test: Tensor, test_next: Tensor, test_initial: Tensor, gamma: float
) -> Tensor:
    """J, which omega makes large and nu makes small.

    omega and test (nu) [B] are at stored pairs, test_next [B] at (s', a'), test_initial
    [omega_initial_batch_size] at (s0, a0).
    """
    # Paper: does not say. Code: this J, where x^3 / 3 is DualDICE's convex function.
    gain = (test - gamma * test_next) * omega - omega**3 / 3
    return gain.mean() - (1 - gamma) * test_initial.mean()


class DualDICE(ampl.AMPL):
    Omega = ClippedOmega

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__(args, obs_dim, action_dim, device)
        self.test_function = self.build("test function", TestFunction)
        self.test_optimizer = self.adam(self.test_function.parameters(), args.test_function_lr)

    def omega_step(self, q_data: Tensor) -> ampl.Scalars:
        """A step of omega and nu, both by the same J. The Q of the data, q_data [N], is not used.

        Omega, nu and the moments of Adam go on from one training to the next.
        """
        args = self.args
        batch = self.sample_data(args.omega_batch_size)
        start = self.random_rows(self.initial_obs, args.omega_initial_batch_size)
        with torch.no_grad():
            next_action = self.actor(batch.next_obs)
            start_action = self.actor(start)

        # Paper: does not say. Code: flow goes on from a terminal row to the next episode's first
        # state, which its loader takes for s'. Here: to the stored s', or where the file has none,
        # to s.
        omega = self.omega(batch.obs, batch.action)
        test = self.test_function(batch.obs, batch.action)
        test_next = self.test_function(batch.next_obs, next_action)
        test_initial = self.test_function(start, start_action)
        objective = dualdice_objective(omega, test, test_next, test_initial, args.gamma)

        # Both gradients are taken before anything steps. Omega goes up, nu down.
        optimizers = [self.omega_optimizer, self.test_optimizer]
        for optimizer in optimizers:
            optimizer.zero_grad()
        (-objective).backward(inputs=list(self.omega.parameters()), retain_graph=True)
        objective.backward(inputs=list(self.test_function.parameters()))
        for optimizer in optimizers:
            parameters = ampl.parameters_of(optimizer)
            nn.utils.clip_grad_value_(parameters, args.omega_grad_value)
            optimizer.step()
        return {
            "losses/omega_loss": objective.detach(),
            "omega/batch_mean": omega.detach().mean(),
        }


if __name__ == "__main__":
    ampl.main(Args, DualDICE)
