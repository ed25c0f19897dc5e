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
"""AMPL with omega by the variational power method (VPM; Wen, Dai, Li, Schuurmans 2020).

Omega is a fixed point of the flow equation, Eq. (9): the policy's visits are starts of episodes and
successors of visits. As the power method finds an eigenvector, so VPM finds omega: it moves omega
again and again towards what one step of that flow makes of it. No Q is needed. In step t of a
training, with a_t = 1 / sqrt(t), it is

    min over omega, max over v:
        E[omega^2] / 2 - (1 - a_t) E[omega omega'] - a_t flow + norm
        flow = (1 - gamma) E[omega(s0, a0)] + gamma E[omega(s', a') omega'(s, a)]
        norm = 2 v (E[omega] - 1) - v^2

E is a mean over the data, or over initial states s0. The actions a' and a0 are the policy's. omega'
is a copy of omega that is at most ten steps old. Without the norm, omega at its least is
(1 - a_t) omega' + a_t * (one step of the flow of omega'). The norm holds the mean of omega at 1: at
its largest over the multiplier v it is (E[omega] - 1)^2. Paper, Section 4.2 (b).

Run: `python ablations/ampl_vpm.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Args(ampl.Args):
    omega_steps: ampl.Count = 2000  # steps per training of omega (authors' code)
    omega_lr: ampl.Positive = 3e-4  # Adam learning rate of omega (authors' code)
    multiplier_lr: ampl.Positive = 3e-4  # Adam learning rate of the multiplier v (authors' code)
    omega_copy_every: ampl.Count = 10  # steps between copies of omega to omega' (authors' code)

    without = ("omega_power", "omega_tau", "omega_mean_bound", "omega_grad_norm")


class ClippedOmega(ampl.OmegaNetwork):
    """omega(s, a) as the net's output, softly clipped to (1e-8, 500), before any division."""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """[B, S], [B, A] -> [B]."""
        x = self.net(torch.cat([obs, action], -1)).squeeze(-1)
        # Paper: these bounds. Code: by two softplus, in place of ampl.py's power of one.
        below_500 = 500 - F.softplus(500 - x)
        return F.softplus(below_500 - 1e-8) + 1e-8


def vpm_loss(
    omega: Tensor,
    omega_target: Tensor,
    omega_next: Tensor,
    omega_initial: Tensor,
    flow_rate: Tensor,
    gamma: float,
) -> Tensor:
    """The loss of omega without the norm; flow_rate is a_t.

    omega and omega_target [B] are at stored pairs, omega_next [B] at (s', a'), omega_initial
    [omega_initial_batch_size] at (s0, a0).
    """
    flow = (1 - gamma) * omega_initial.mean() + gamma * (omega_next * omega_target).mean()
    inertia = (1 - flow_rate) * (omega * omega_target).mean()
    return omega.square().mean() / 2 - inertia - flow_rate * flow


def vpm_norm(mean_omega: Tensor, multiplier: Tensor) -> Tensor:
    """2 v (E[omega] - 1) - v^2."""
    return 2 * multiplier * (mean_omega - 1) - multiplier.square()


class VPM(ampl.AMPL):
    Omega = ClippedOmega

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__(args, obs_dim, action_dim, device)
        self.multiplier = nn.Parameter(torch.ones((), device=device))  # v
        self.multiplier_optimizer = self.adam([self.multiplier], args.multiplier_lr)
        self.register_buffer("step", torch.zeros((), device=device))  # t; a CUDA graph counts on

    def fit_omega(self, k: int, progress: ampl.Progress) -> Tensor:
        """As in ampl.py, with steps counted from 1. -> omega / its mean [N]"""
        self.step.zero_()  # omega', v and the moments of Adam go on from the last training
        return super().fit_omega(k, progress)

    def omega_step(self, q_data: Tensor) -> ampl.Scalars:
        """A step of omega down, then a step of v up. The Q of the data, q_data [N], is not used."""
        args = self.args
        batch = self.sample_data(args.omega_batch_size)
        start = self.random_rows(self.initial_obs, args.omega_initial_batch_size)
        with torch.no_grad():
            omega_target = self.omega_target(batch.obs, batch.action)
            next_action = self.actor(batch.next_obs)
            start_action = self.actor(start)

        # Paper: does not say. Code: flow goes on from a terminal row to the next episode's first
        # state, which its loader takes for s'. Here: to the stored s', or where the file has none,
        # to s.
        omega = self.omega(batch.obs, batch.action)
        omega_next = self.omega(batch.next_obs, next_action)
        omega_initial = self.omega(start, start_action)
        self.step.add_(1)
        flow_rate = self.step.rsqrt()  # a_t
        loss = vpm_loss(omega, omega_target, omega_next, omega_initial, flow_rate, args.gamma)
        loss = loss + vpm_norm(omega.mean(), self.multiplier.detach())
        self.omega_optimizer.zero_grad()
        loss.backward()
        self.omega_optimizer.step()

        # Code: v sees the mean of omega after omega's step.
        with torch.no_grad():
            mean_omega = self.omega(batch.obs, batch.action).mean()
        multiplier_loss = -vpm_norm(mean_omega, self.multiplier)
        self.multiplier_optimizer.zero_grad()
        multiplier_loss.backward()
        self.multiplier_optimizer.step()

        self.copy_omega_if_due()
        return {"losses/omega_loss": loss.detach(), "omega/batch_mean": mean_omega}

    @torch.no_grad()
    def copy_omega_if_due(self) -> None:
        """Copy omega to omega' after steps 1, 11, 21, ..., as in the authors' code."""
        due = (self.step - 1) % self.args.omega_copy_every == 0
        for target, parameter in zip(self.omega_target.parameters(), self.omega.parameters()):
            target.copy_(torch.where(due, parameter, target))  # a CUDA graph can hold no `if`


if __name__ == "__main__":
    ampl.main(Args, VPM)
