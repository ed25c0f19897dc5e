"""AMPL with omega by GenDICE (Zhang, Dai, Li, Schuurmans 2020).

Omega, here tau, plays against a test function nu and a multiplier v, in place of one fixed Q: nu
seeks where the flow equation of occupancies, Eq. (9), does not hold, v watches the mean of tau.
Paper, Section 4.2 (b).

    min over tau, max over nu and v:
        J = (1 - gamma) E[nu(s0, a0)] + gamma E[tau nu(s', a')] - E[tau (nu + nu^2 / 4)]
            + v (E[tau] - 1) - v^2 / 2

Run: `python ablations/ampl_gendice.py --env-id pen-human-v1`
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
    miw_lr: float = 3e-3  # Adam of omega (authors' code)
    miw_nu_lr: float = 1e-4  # Adam of nu, the test function (authors' code)
    miw_v_lr: float = 1e-4  # Adam of v, which holds the mean of omega at one (authors' code)
    miw_grad_value: float = 1.0  # each entry of a gradient is clipped to +- this (authors' code)

    without = ("miw_alpha", "miw_tau", "miw_mean_bound", "miw_grad_norm")


class ClippedWeight(ampl.ImportanceWeight):
    """omega(s, a), net(s, a) softly clipped to (1e-8, 500), not yet normalised. -> [L, B]"""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = self.net(torch.cat([obs, action], -1)).squeeze(-1)
        # Paper: these bounds. Code: by two softplus, in place of the power alpha. Here: code.
        return F.softplus(500 - F.softplus(500 - x) - 1e-8) + 1e-8


def gendice_objective(
    tau: Tensor, nu: Tensor, nu_next: Tensor, nu_initial: Tensor, v: Tensor, gamma: float
) -> Tensor:
    """J, [L]: tau makes it small, nu and v make it large.

    tau, nu [L, B] at the stored pairs, nu_next [L, B] at (s', a'), nu_initial [L, B0], v [L].
    """
    # Paper: GenDICE, no constants. Code: this, the divergence chi-square. Here: code.
    flow = (1 - gamma) * nu_initial.mean(-1) + gamma * (tau * nu_next).mean(-1)
    norm = v * (tau.mean(-1) - 1) - v.square() / 2
    return flow - (tau * (nu + nu.square() / 4)).mean(-1) + norm


class GenDICE(ampl.AMPL):
    Weight = ClippedWeight

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__(args, obs_dim, action_dim, device)
        self.nu = self.build("nu", ampl.TwinCritic)  # of which the first head is used
        self.v = nn.Parameter(torch.ones(self.learners, device=device))
        self.optimizers["nu"] = self.adam(self.nu.parameters(), args.miw_nu_lr)
        self.optimizers["v"] = self.adam([self.v], args.miw_v_lr)

    def fit_weight(self, k: int, log: Callable) -> Tensor:
        return self.train_weight(self.miw_step, k, log)

    def miw_step(self) -> ampl.Logs:
        """One step of tau, nu and v, each along J as it was before the step."""
        args, bound = self.args, self.args.miw_grad_value
        batch = self.sample_data(args.miw_batch_size)
        start = self.sample_rows(self.initial_obs, args.miw_initial_batch_size)
        with torch.no_grad():
            next_action, action = (torch.tanh(self.actor(s)) for s in (batch.next_obs, start))
        tau, nu = self.omega(batch.obs, batch.action), self.nu.first(batch.obs, batch.action)
        # Paper: silent. Code: terminals flow on, to the next episode's first state (its loader's
        # s'). Here: they flow on to the stored s' (to s itself where the file has none).
        nu_next, nu_initial = (
            self.nu.first(batch.next_obs, next_action),
            self.nu.first(start, action),
        )
        objective = gendice_objective(tau, nu, nu_next, nu_initial, self.v, args.gamma)
        for player, sign in (("omega", 1), ("nu", -1), ("v", -1)):
            optimizer = self.optimizers[player]
            grads = ampl.gradients(sign * objective, optimizer, keep_graph=True)
            ampl.move(optimizer, [g.clamp(-bound, bound) for g in grads])
        mean_tau = tau.detach().mean(-1)
        return {"losses/weight_loss": objective.detach(), "weights/batch_mean": mean_tau}


if __name__ == "__main__":
    ampl.main(Args, GenDICE)
