"""AMPL with omega by DualDICE (Nachum, Chow, Dai, Li 2019).

Omega, here tau, plays against a test function nu, in place of one fixed Q; nothing holds the mean
of tau at one. Paper, Section 4.2 (b).

    max over tau, min over nu:
        J = E[(nu(s, a) - gamma nu(s', a')) tau] - E[tau^3 / 3] - (1 - gamma) E[nu(s0, a0)]

Run: `python ablations/ampl_dualdice.py --env-id pen-human-v1`
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


@dataclass
class Args(ampl.Args):
    miw_lr: float = 1e-4  # Adam of omega (authors' code)
    miw_nu_lr: float = 1e-4  # Adam of nu, the test function (authors' code)
    miw_grad_value: float = 1.0  # each entry of a gradient is clipped to +- this (authors' code)

    without = ("miw_alpha", "miw_tau", "miw_mean_bound", "miw_grad_norm")


class ClippedWeight(ampl.ImportanceWeight):
    """omega(s, a), net(s, a) softly clipped to (1e-8, 500), not yet normalised. -> [L, B]"""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = self.net(torch.cat([obs, action], -1)).squeeze(-1)
        # Paper: these bounds. Code: by two softplus, in place of the power alpha. Here: code.
        return F.softplus(500 - F.softplus(500 - x) - 1e-8) + 1e-8


def dualdice_objective(
    tau: Tensor, nu: Tensor, nu_next: Tensor, nu_initial: Tensor, gamma: float
) -> Tensor:
    """J, [L]: tau makes it large, nu makes it small.

    tau, nu [L, B] at the stored pairs, nu_next [L, B] at (s', a'), nu_initial [L, B0].
    """
    # Paper: DualDICE, no constants. Code: this, f*(x) = x^3 / 3. Here: code.
    gain = (nu - gamma * nu_next) * tau - tau**3 / 3
    return gain.mean(-1) - (1 - gamma) * nu_initial.mean(-1)


class DualDICE(ampl.AMPL):
    Weight = ClippedWeight

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__(args, obs_dim, action_dim, device)
        self.nu = self.build("nu", ampl.TwinCritic)  # of which the first head is used
        self.optimizers["nu"] = self.adam(self.nu.parameters(), args.miw_nu_lr)

    def fit_weight(self, k: int, log: Callable) -> Tensor:
        return self.train_weight(self.miw_step, k, log)

    def miw_step(self) -> ampl.Logs:
        """One step of tau and nu, each along J as it was before the step."""
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
        objective = dualdice_objective(tau, nu, nu_next, nu_initial, args.gamma)
        for player, sign in (("omega", -1), ("nu", 1)):
            optimizer = self.optimizers[player]
            grads = ampl.gradients(sign * objective, optimizer, keep_graph=True)
            ampl.move(optimizer, [g.clamp(-bound, bound) for g in grads])
        mean_tau = tau.detach().mean(-1)
        return {"losses/weight_loss": objective.detach(), "weights/batch_mean": mean_tau}


if __name__ == "__main__":
    ampl.main(Args, DualDICE)
