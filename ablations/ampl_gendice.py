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
"""AMPL with omega by GenDICE (Zhang, Dai, Li, Schuurmans 2020).

In place of one fixed Q a test function nu is learned, which seeks where omega breaks the flow
equation, Eq. (9). A multiplier v watches that the mean of omega is 1:

    min over omega, max over nu and v:
        J = (1 - gamma) E[nu(s0, a0)] + gamma E[omega nu(s', a')] - E[omega (nu + nu^2 / 4)]
            + v (E[omega] - 1) - v^2 / 2

E is a mean over the data, or over initial states s0. The actions a' and a0 are the policy's. Paper,
Section 4.2 (b).

Run: `python ablations/ampl_gendice.py --env-id pen-human-v1`
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
    omega_lr: ampl.Positive = 3e-3  # Adam learning rate of omega (authors' code)
    test_function_lr: ampl.Positive = (
        1e-4  # Adam learning rate of the test function nu (authors' code)
    )
    multiplier_lr: ampl.Positive = 1e-4  # Adam learning rate of the multiplier v (authors' code)
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


def gendice_objective(
    omega: Tensor,
    test: Tensor,
    test_next: Tensor,
    test_initial: Tensor,
    multiplier: Tensor,
    gamma: float,
) -> Tensor:
    """J, which omega makes small, and nu and v make large.

    omega and test (nu) [B] are at stored pairs, test_next [B] at (s', a'), test_initial
    [omega_initial_batch_size] at (s0, a0).
    """
    # Paper: does not say. Code: this J, where nu^2 / 4 belongs to the chi-square divergence.
    flow = (1 - gamma) * test_initial.mean() + gamma * (omega * test_next).mean()
    visits = (omega * (test + test.square() / 4)).mean()
    norm = multiplier * (omega.mean() - 1) - multiplier.square() / 2
    return flow - visits + norm


class GenDICE(ampl.AMPL):
    Omega = ClippedOmega

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__(args, obs_dim, action_dim, device)
        self.test_function = self.build("test function", TestFunction)
        self.multiplier = nn.Parameter(torch.ones((), device=device))
        self.test_optimizer = self.adam(self.test_function.parameters(), args.test_function_lr)
        self.multiplier_optimizer = self.adam([self.multiplier], args.multiplier_lr)

    def omega_step(self, q_data: Tensor) -> ampl.Scalars:
        """A step of omega, nu and v, all by the same J. The Q of the data, q_data [N], is not used.

        Omega, nu, v and the moments of Adam go on from one training to the next.
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
        objective = gendice_objective(
            omega, test, test_next, test_initial, self.multiplier, args.gamma
        )

        # All gradients are taken before anything steps. Omega goes down, the others up.
        optimizers = [self.omega_optimizer, self.test_optimizer, self.multiplier_optimizer]
        for optimizer in optimizers:
            optimizer.zero_grad()
        objective.backward(inputs=list(self.omega.parameters()), retain_graph=True)
        (-objective).backward(inputs=[*self.test_function.parameters(), self.multiplier])
        for optimizer in optimizers:
            parameters = ampl.parameters_of(optimizer)
            nn.utils.clip_grad_value_(parameters, args.omega_grad_value)
            optimizer.step()
        return {
            "losses/omega_loss": objective.detach(),
            "omega/batch_mean": omega.detach().mean(),
        }


if __name__ == "__main__":
    ampl.main(Args, GenDICE)
