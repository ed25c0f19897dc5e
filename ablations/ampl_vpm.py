"""AMPL with omega by the variational power method (VPM; Wen, Dai, Li, Schuurmans 2020).

Omega, here tau, follows the flow equation of occupancies itself, Eq. (9), without a Q function: it
is regressed on a slower and slower average of its own one-step flow. Paper, Section 4.2 (b). In
step t, with tau' a copy of tau that is at most ten steps old and a_t = 1 / sqrt(t):

    min over tau:  E[tau^2] / 2 - (1 - a_t) E[tau tau'] - a_t flow(tau, tau') + norm(tau, v)
    max over v:    norm(tau, v) = 2 v (E[tau] - 1) - v^2, which holds the mean of tau at one
    flow(tau, tau') = (1 - gamma) E[tau(s0, a0)] + gamma E[tau(s', a') tau'(s, a)]

Run: `python ablations/ampl_vpm.py --env-id pen-human-v1`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    miw_steps: int = 2000  # steps of each training of omega: 200 power steps of 10 (authors' code)
    miw_lr: float = 3e-4  # Adam of omega (authors' code)
    miw_v_lr: float = 3e-4  # Adam of v, which holds the mean of omega at one (authors' code)
    miw_power_every: int = 10  # steps between two copies of omega to tau' (authors' code)

    without = ("miw_alpha", "miw_tau", "miw_mean_bound", "miw_grad_norm")


class ClippedWeight(ampl.ImportanceWeight):
    """omega(s, a), net(s, a) softly clipped to (1e-8, 500), not yet normalised. -> [L, B]"""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = self.net(torch.cat([obs, action], -1)).squeeze(-1)
        # Paper: these bounds. Code: by two softplus, in place of the power alpha. Here: code.
        return F.softplus(500 - F.softplus(500 - x) - 1e-8) + 1e-8


def vpm_norm(mean_tau: Tensor, v: Tensor) -> Tensor:
    """2 v (E[tau] - 1) - v^2, all [L]: at its largest over v it is the square of E[tau] - 1."""
    return 2 * v * (mean_tau - 1) - v.square()


def vpm_loss(
    tau: Tensor, tau_slow: Tensor, tau_next: Tensor, tau_initial: Tensor, a: Tensor, gamma: float
) -> Tensor:
    """Of tau, without the norm, [L]: at its least tau is (1 - a) tau' + a times the flow of tau'.

    tau and tau' [L, B] at the stored pairs, tau_next [L, B] at (s', a'), tau_initial [L, B0].
    """
    # Paper: the power method, no constants. Code: this, one Adam step for each t. Here: code.
    flow = (1 - gamma) * tau_initial.mean(-1) + gamma * (tau_next * tau_slow).mean(-1)
    return 0.5 * tau.square().mean(-1) - (1 - a) * (tau * tau_slow).mean(-1) - a * flow


class VPM(ampl.AMPL):
    Weight = ClippedWeight  # of omega and of omega_slow, here tau'

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__(args, obs_dim, action_dim, device)
        self.v = nn.Parameter(torch.ones(self.learners, device=device))
        self.register_buffer("t", torch.zeros((), device=device))  # so that a CUDA graph counts on
        self.optimizers["v"] = self.adam([self.v], args.miw_v_lr)

    def fit_weight(self, k: int, log: Callable) -> Tensor:
        self.t.zero_()  # a_t starts anew in every training; tau', v and Adam's moments go on
        return self.train_weight(self.miw_step, k, log)

    def miw_step(self) -> ampl.Logs:
        """One step of tau, which descends, and then of v, which ascends."""
        args, omega, v = self.args, self.optimizers["omega"], self.optimizers["v"]
        batch = self.sample_data(args.miw_batch_size)
        start = self.sample_rows(self.initial_obs, args.miw_initial_batch_size)
        with torch.no_grad():
            tau_slow = self.omega_slow(batch.obs, batch.action)
            next_action, action = (torch.tanh(self.actor(s)) for s in (batch.next_obs, start))
        # Paper: silent. Code: terminals flow on, to the next episode's first state (its loader's
        # s'). Here: they flow on to the stored s' (to s itself where the file has none).
        tau, tau_next = self.omega(batch.obs, batch.action), self.omega(batch.next_obs, next_action)
        self.t.add_(1)
        loss = vpm_loss(
            tau, tau_slow, tau_next, self.omega(start, action), self.t.rsqrt(), args.gamma
        )
        loss = loss + vpm_norm(tau.mean(-1), self.v.detach())
        ampl.move(omega, ampl.gradients(loss, omega))
        with torch.no_grad():
            mean_tau = self.omega(batch.obs, batch.action).mean(-1)  # after its step, as in Code
            # Code: tau is copied to tau' after steps 1, 11, 21, ...
            due = ((self.t - 1) % args.miw_power_every == 0).float()  # no branch: for a CUDA graph
            for slow, fast in zip(self.omega_slow.parameters(), self.omega.parameters()):
                slow.lerp_(fast, due)
        ampl.move(v, ampl.gradients(-vpm_norm(mean_tau, self.v), v))
        return {"losses/weight_loss": loss.detach(), "weights/batch_mean": mean_tau}


if __name__ == "__main__":
    ampl.main(Args, VPM)
