# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "d4rl==1.1", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "h5py==3.16.0",
#   "matplotlib==3.11.2", "mujoco==4.0.0", "numpy==2.4.6", "pillow", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""COMBO: conservative offline model-based policy optimisation, in one file.

Yu, Kumar, Rafailov, Rajeswaran, Levine, Finn: COMBO: Conservative Offline Model-Based Policy
Optimization, NeurIPS 2021. A penalty such as MOPO's needs a model that knows where it errs. COMBO
does without: it trains SAC on data and model rollouts, and pushes Q down on states of the rollouts
with actions of the policy, up on the data. What lies out of the data's reach ends up low.

Algorithm 1, with the equations as they are tagged below:

    fit an ensemble of Gaussian models of (reward, next state) to the data, once
    for each iteration:
        every `rollout_every`: roll out in the model from stored states, `horizon` steps, into a
            FIFO buffer
        sample a batch, a share f from the data and the rest from the buffer
        critics: Bellman error, plus beta (E_rho[Q] - E_D[Q])                         Eq. (2)
        policy and temperature, target critics                                        Eq. (3)

No code was released with the paper, and its main text leaves many constants to an appendix. Those
that are recalled or inferred rather than read say so in their help text: `(recalled)`. Public
re-implementations differ from one another; README lists where, and what this file does.
Eq. (1), (4) and (5) are theory and have no line; tests/test_combo.py checks (4) and Proposition
4.1 on tabular MDPs. The model is MOPO's: `--dynamics-from` also takes a run of mopo.py.
Sections: 1 arguments, 2 networks, 3 equations, 4 one iteration, 5 model, 6 plumbing (may be
skipped), 7 `train`, the selection of settings without the environment, and the paper's Figure 2.

Run: `python combo.py --env-id hopper-medium-replay-v2`. Settings of the paper's tasks: `PAPER`.
Parameters, buffers and batches carry a leading axis of independent learners: [learners, ...].
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import http.client
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import h5py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

try:
    import mujoco
    from gymnasium.envs.mujoco.ant_v5 import AntEnv
    from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
except AttributeError:  # all that PyOpenGL says when MUJOCO_GL names a library that is missing
    gl = os.environ.get("MUJOCO_GL")
    raise SystemExit(f"MUJOCO_GL={gl} cannot be loaded here: unset it or name another") from None

# ==================================================================================================
# 1. Arguments
# ==================================================================================================


@dataclass
class Args:
    # --- experiment ---
    env_id: str = "hopper-medium-replay-v2"
    """task: a row of PAPER, another D4RL name, or a gymnasium id together with --dataset-path"""
    seed: int = 0
    """seed of the run; learner i is reported as seed + i, but is not the run of that seed"""
    num_seeds: int = 1
    """independent learners trained side by side in this process (the paper reports 6)"""
    total_iterations: int = 1_000_000
    """iterations of the main loop (MOPO's code: 1000 epochs of 1000)"""
    run_dir: str = "runs"
    """folder that receives the run's own folder"""
    resume: str | None = None
    """continue this run folder where its checkpoint stands, with its flags; only a larger
    --total-iterations is taken"""
    evaluate: str | None = None
    """only score the policy saved in this run folder, over --final-episodes episodes"""
    dynamics_from: str | None = None
    """take the model from this run folder instead of fitting it"""

    # --- tracking and saving ---
    track: bool = False
    """also log to Weights and Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "combo"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""
    log_every: int = 1000
    """iterations between two lines of log.jsonl and of TensorBoard"""
    checkpoint_every: int = 10_000
    """iterations or steps of a fit between two checkpoints"""
    capture_video: bool = False
    """render one episode of the policy to episode.gif (at the end, or with --evaluate)"""

    # --- data ---
    dataset_path: str | None = None
    """HDF5 file in D4RL's format; without it the D4RL folder is searched, then D4RL's server"""

    # --- world model ---
    ensemble_size: int = 7
    """members (MOPO's code)"""
    num_elites: int = 5
    """members with the lowest hold-out loss that make predictions (MOPO's code)"""
    model_hidden: int = 200
    """width of the four hidden layers (MOPO's code)"""
    model_lr: float = 1e-3
    """Adam (MOPO's code)"""
    model_batch_size: int = 256
    """rows per member and step (MOPO's code)"""
    model_weight_decay: tuple[float, float, float, float, float] = (
        2.5e-5,
        5e-5,
        7.5e-5,
        7.5e-5,
        1e-4,
    )
    """L2 of the four hidden layers and the heads, added to the gradient (MOPO's code)"""
    model_patience: int = 6
    """epochs in a row in which no member improved, before a fit stops (MOPO's code)"""
    model_max_epochs: int = 10_000
    """at most this many epochs per fit (MOPO's code: no limit)"""
    holdout_size: int = 1000
    """rows held out, at most a fifth of the data (MOPO's code)"""

    # --- rollouts ---
    horizon: int = 5
    """model steps per rollout (per task, see PAPER)"""
    rollout_every: int = 1000
    """iterations between two refreshes of the buffer (MOPO's code)"""
    rollout_starts: int = 50_000
    """rollouts per refresh (MOPO's code)"""
    rollout_retain: int = 5
    """refreshes that the buffer holds, first in first out (MOPO's code)"""
    rollout_actions: Literal["policy", "uniform"] = "policy"
    """mu, who acts in the model: the policy, or uniform noise (recalled, per task)"""
    real_fraction: float = 0.5
    """share f of real rows in a batch (recalled, per task)"""

    # --- critic ---
    gamma: float = 0.99
    """discount (MOPO's code)"""
    tau: float = 0.005
    """Polyak rate of the target critic (MOPO's code)"""
    batch_size: int = 256
    """rows per iteration (MOPO's code)"""
    critic_lr: float = 3e-4
    """Adam (recalled, per task)"""

    # --- policy ---
    hidden: tuple[int, ...] = (256, 256, 256)
    """hidden layers of policy and critics (recalled)"""
    actor_lr: float = 1e-4
    """Adam of the policy (recalled, per task)"""
    alpha_lr: float = 3e-4
    """Adam of the temperature alpha, which starts at 1 (MOPO's code)"""
    target_entropy: float = -3.0
    """entropy that alpha steers to (MOPO's code: -3 for every D4RL task, not -dim(A))"""

    # --- COMBO ---
    beta: float = 1.0
    """weight of E_rho[Q] - E_D[Q] in the critics' loss (recalled, per task)"""
    num_actions: int = 10
    """actions per state of each kind (10 recalled; pi(.|s') as in OfflineRL-Kit and d3rlpy)"""
    rho_states: Literal["mixed", "model"] = "mixed"
    """states of rho: those of d_f, data and model (paper), or the model's (recalled, per task)"""
    select: bool = False
    """train all pairs of the next two flags on one model; choose by the lowest E_rho[Q] - E_D[Q]"""
    select_beta: tuple[float, ...] = (0.5, 1.0, 5.0)
    """values of beta that --select tries (recalled)"""
    select_real_fraction: tuple[float, ...] = (0.5, 0.8)
    """values of f that --select tries (recalled)"""
    probe_uncertainty: str | None = None
    """only draw a figure after the paper's Figure 2: predicted std and true error of a run's model"""

    # --- evaluation ---
    eval_every: int = 1000
    """iterations between two evaluations (MOPO's code)"""
    eval_episodes: int = 10
    """episodes per evaluation (MOPO's code)"""
    final_episodes: int = 100
    """episodes after training (ours: one evaluation of 10 has a standard error of many points)"""
    eval_workers: int = 0
    """processes that evaluate beside the training; 0 evaluates in this one (ours)"""

    # --- speed ---
    cuda: bool = True
    """train on the GPU where there is one"""
    cuda_graphs: bool = True
    """record the training steps as CUDA graphs (no effect on a CPU)"""
    cpu_fast_matmul: bool = True
    """let oneDNN compute fp32 products where a self-check finds fp32 accuracy (CPU only)"""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's default"""


# All recalled from the paper's appendix, partly confirmed by d3rlpy's script and by the sets that
# unifloral sweeps. Its main text names no version of the datasets: v2 and v0 have the same here.
# OfflineRL-Kit's beta for -v2, tuned with a log-sum-exp over 3 actions, is another for
# halfcheetah-medium-expert (5), hopper-medium-replay (0.5); its f is 0.5, its rho mixed everywhere.
COMBO_TASKS: dict[str, dict] = {
    # fmt: off
    "halfcheetah-random": dict(beta=0.5, horizon=5),
    "halfcheetah-medium": dict(beta=0.5, horizon=5),
    "halfcheetah-medium-replay": dict(beta=0.5, horizon=5),
    "halfcheetah-medium-expert": dict(beta=0.5, horizon=5),
    "hopper-random": dict(beta=1.0, horizon=5, rho_states="model", rollout_actions="uniform"),
    "hopper-medium": dict(beta=5.0, horizon=5, rho_states="model", rollout_actions="uniform"),
    "hopper-medium-replay": dict(
        beta=1.0, horizon=5, rho_states="model", rollout_actions="uniform"
    ),
    "hopper-medium-expert": dict(
        beta=5.0, horizon=5, rho_states="model", rollout_actions="uniform"
    ),
    "walker2d-random": dict(beta=0.5, horizon=1, critic_lr=1e-4, actor_lr=1e-5),
    "walker2d-medium": dict(beta=5.0, horizon=1, critic_lr=1e-4, actor_lr=1e-5, real_fraction=0.8),
    "walker2d-medium-replay": dict(beta=0.5, horizon=1, critic_lr=1e-4, actor_lr=1e-5),
    "walker2d-medium-expert": dict(
        beta=5.0, horizon=1, critic_lr=1e-4, actor_lr=1e-5, real_fraction=0.8
    ),
    # fmt: on
}
PAPER: dict[str, dict] = {
    **{f"{k}-{v}": row for v in ("v2", "v0") for k, row in COMBO_TASKS.items()},
    "halfcheetah-jump-v0": dict(beta=1.0, horizon=5),
    "ant-angle-v0": dict(beta=1.0, horizon=25, rollout_actions="uniform"),
}


def parse_args(argv: list[str] | None = None) -> Args:
    """Two passes: the first finds --env-id, the second starts from that task's row of PAPER.

    So `--help` shows the task's own numbers, and an explicit flag always wins.
    """
    first, _ = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)
    return tyro.cli(
        Args,
        args=argv,
        description="\n\n".join(__doc__.split("\n\n")[:2]),
        default=Args(env_id=first.env_id, **PAPER.get(first.env_id, {})),
    )


def check_args(args: Args) -> None:
    """Refuse flags that make no sense, one sentence each. Raises UserError."""
    may_be_zero = {"threads", "eval_workers", "model_weight_decay", "gamma", "beta", "select_beta"}
    at_most_one = {"gamma", "tau", "real_fraction", "select_real_fraction"}
    check_numbers(args, may_be_zero, at_most_one, ("seed", "target_entropy"))
    real_rows = real_row_counts(args) or [0]
    modes = [m for m in ("resume", "evaluate", "probe_uncertainty") if getattr(args, m) is not None]
    refuse_clashes(
        {
            "give one of --resume, --evaluate and --probe-uncertainty": len(modes) > 1,
            "--gamma must be below 1": args.gamma == 1,
            "--num-elites is larger than --ensemble-size": args.num_elites > args.ensemble_size,
            "--select needs a value in --select-beta and in --select-real-fraction": (
                not settings(args)
            ),
            "--select trains one learner per setting: leave --num-seeds at 1": (
                args.select and args.num_seeds not in (1, len(settings(args)))
            ),
            "a batch needs a real row: raise --real-fraction or --batch-size": min(real_rows) < 1,
            "--rho-states model needs model rows: lower --real-fraction": (
                args.rho_states == "model" and max(real_rows) >= args.batch_size
            ),
            "--track needs Weights and Biases: pip install wandb": (
                args.track and importlib.util.find_spec("wandb") is None
            ),
        }
    )


def settings(args: Args) -> list[tuple[float, float]]:
    """(beta, f) of every learner: the pairs that --select tries, else one for all."""
    if args.select:
        return list(itertools.product(args.select_beta, args.select_real_fraction))
    return [(args.beta, args.real_fraction)] * args.num_seeds


def real_row_counts(args: Args) -> list[int]:
    """Rows of a batch that are data, for every learner."""
    return [int(fraction * args.batch_size) for _, fraction in settings(args)]


# ==================================================================================================
# 2. Networks
# ==================================================================================================
# Shapes: L learners, M members of the ensemble, E elites, B rows of a batch, N rows of the data,
# S observation, A action, C columns of a row (see Batch).


class Linear(nn.Module):
    """A linear layer for every learner (and member): weight [*lead, in, out], bias [*lead, 1, out].

    lead is (L,) for the policy, (L, 2) for the critics, (L, M) for the model. Initialised like
    torch.nn.Linear. forward: [G, B, in] -> [G, B, out] with G the product of lead, so that all
    learners and members are one batched product.
    """

    def __init__(self, lead: tuple[int, ...], n_in: int, n_out: int):
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(*lead, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*lead, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.flatten(0, -3), x, self.weight.flatten(0, -3))


class ReluNet(nn.Module):
    """Hidden layers with ReLU, linear output, Glorot-uniform weights, biases zero (Keras' choice).

    forward: [*lead, B, in] -> [*lead, B, out].
    """

    def __init__(self, lead: tuple[int, ...], n_in: int, hidden: tuple[int, ...], n_out: int):
        super().__init__()
        sizes = list(itertools.pairwise([n_in, *hidden, n_out]))
        self.layers = nn.ModuleList(Linear(lead, i, o) for i, o in sizes)
        for layer, (i, o) in zip(self.layers, sizes, strict=True):
            nn.init.uniform_(layer.weight, -math.sqrt(6 / (i + o)), math.sqrt(6 / (i + o)))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape[:-1], x.flatten(0, -3)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.layers[-1](x).view(*shape, -1)


class GaussianPolicy(nn.Module):
    """a = tanh(u) with u ~ N(mean(s), std(s)^2), every entry by itself.

    forward: obs [L, B, S] -> mean and log_std of u, [L, B, A] each.
    """

    def __init__(self, learners: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = ReluNet((learners,), obs_dim, args.hidden, 2 * action_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)  # MOPO's code

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [L, B, S] -> an action [L, B, A] in (-1, 1) and its log-density [L, B]."""
        return self.draw(*self(obs))

    def draw(self, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """The same from what `forward` returns."""
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2) in a form that stays finite where tanh(u) rounds to 1.
        squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_prob - squash).sum(-1)


class DoubleCritic(nn.Module):
    """Q_1 and Q_2. forward: obs [L, B, S], action [L, B, A] -> [L, 2, B]."""

    def __init__(self, learners: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = ReluNet((learners, 2), obs_dim + action_dim, args.hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1).unsqueeze(1)  # [L, 1, B, S + A]
        return self.net(x.expand(-1, 2, -1, -1)).squeeze(-1)


class DynamicsEnsemble(nn.Module):
    """M Gaussian models of (reward, next_obs - obs) in their own units; inputs are standardised.

    forward: standardised inputs [L, M, B, S + A] -> mean, log_std [L, M, B, 1 + S].
    """

    def __init__(self, learners: int, members: int, obs_dim: int, action_dim: int, width: int):
        super().__init__()
        sizes = [obs_dim + action_dim] + 4 * [width]
        self.lead = lead = (learners, members)
        self.trunk = nn.ModuleList(Linear(lead, i, o) for i, o in itertools.pairwise(sizes))
        self.heads = Linear(lead, width, 2 * (1 + obs_dim))  # mean and log-variance side by side
        for layer in [*self.trunk, self.heads]:  # first weights and bounds: MOPO's code
            std = 1 / (2 * math.sqrt(layer.weight.shape[-2]))
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)
        # Soft bounds of the log-variance, learned, shared by the members of a learner.
        self.max_log_var = nn.Parameter(torch.full((learners, 1, 1, 1 + obs_dim), 0.5))
        self.min_log_var = nn.Parameter(torch.full((learners, 1, 1, 1 + obs_dim), -10.0))
        self.register_buffer("input_mean", torch.zeros(obs_dim + action_dim))
        self.register_buffer("input_std", torch.ones(obs_dim + action_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape, x = x.shape[:-1], x.flatten(0, -3)
        for layer in self.trunk:
            x = F.silu(layer(x), inplace=not torch.is_grad_enabled())  # backward needs layer(x)
        mean, log_var = self.heads(x).view(*shape, -1).chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        log_var = self.min_log_var + F.softplus(log_var - self.min_log_var)
        return mean, 0.5 * log_var

    def bounds(self) -> list[nn.Parameter]:
        return [self.max_log_var, self.min_log_var]

    def member_parameters(self) -> list[nn.Parameter]:
        """All parameters with a member axis, [L, M, ...]: everything but the two bounds."""
        return [p for layer in [*self.trunk, self.heads] for p in (layer.weight, layer.bias)]

    @torch.no_grad()
    def standardise_by(self, inputs: Tensor) -> None:
        """Set the units of the inputs from data rows [N, S + A]."""
        std, mean = torch.std_mean(inputs.double(), 0, correction=0)
        self.input_mean.copy_(mean)
        self.input_std.copy_(torch.where(std < 1e-12, 1.0, std))

    @torch.no_grad()
    def predict(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """What every member says: mean and std of (reward, next_obs - obs), [L, M, B, 1 + S]."""
        x = (torch.cat([obs, action], -1) - self.input_mean) / self.input_std
        mean, log_std = self(x.unsqueeze(1).expand(-1, self.lead[1], -1, -1))
        return mean, log_std.exp()

    @torch.no_grad()
    def sample(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Draw reward [L, B] and next_obs [L, B, S], every row from one member.

        Rows of a batch are random anyway, so row i goes to member (i - offset) mod M with a random
        offset: each member gets an equal share, and no row is evaluated by all M.
        """
        (learners, members), rows = self.lead, obs.shape[1]
        padded = math.ceil(rows / members) * members
        x = (torch.cat([obs, action], -1) - self.input_mean) / self.input_std
        offset = torch.randint(members, (), device=obs.device)  # a tensor: no wait for the GPU
        turn = (torch.arange(padded, device=obs.device) + offset) % padded
        x = F.pad(x, (0, 0, 0, padded - rows)).index_select(1, turn)
        mean, log_std = self(x.view(learners, -1, members, x.shape[-1]).transpose(1, 2))
        # MOPO's paper: the mean reward. MOPO's code: the sampled reward. Here: code.
        y = mean + log_std.exp() * torch.randn_like(mean)
        y = y.transpose(1, 2).reshape(learners, padded, -1)
        y = y.index_select(1, (torch.arange(rows, device=obs.device) - offset) % padded)
        return y[..., 0], obs + y[..., 1:]


# ==================================================================================================
# 3. The method: one function per equation
# ==================================================================================================
# Losses average over the batch and keep the learners apart: they return [L], the caller sums.


def largest_std(std: Tensor) -> Tensor:
    """max_i ||sigma_i(s, a)||: the members' std [L, M, B, 1 + S], reward included -> [L, B].

    In the data's units, standard deviations and not variances, all members and not the elites.
    """
    return std.norm(dim=-1).amax(1)


def log_sum_exp(q: Tensor, log_density: Tensor) -> Tensor:
    """log sum_a exp Q(s, a), up to log n, from n sampled actions: q [L, 2, B, n] -> [L, 2, B].

    log_density [L, B, n] of the distributions that the actions came from: importance weights. The
    gradient is a softmax over all n actions, so it pushes down where Q is large.
    """
    return (q - log_density.unsqueeze(1)).logsumexp(-1)


def expectation(q: Tensor, among: Tensor) -> Tensor:
    """Mean of q [L, 2, B] over the rows with among [L, B] = 1. -> [L, 2]"""
    return (q * among.unsqueeze(1)).sum(-1) / among.sum(-1, keepdim=True).clamp(min=1)


def soft_target(
    reward: Tensor, terminated: Tensor, q_next: Tensor, entropy_bonus: Tensor, gamma: float
) -> Tensor:
    """r + gamma (min_j Q'_j + bonus) where s' is no terminal; q_next [L, 2, B], the rest [L, B].

    entropy_bonus: -alpha log pi(a'|s') of the action in q_next; 0 makes the backup deterministic.
    """
    return reward + gamma * (1 - terminated) * (q_next.amin(1) + entropy_bonus)


def squared_td_error(q: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of both critics: q [L, 2, B] on target [L, B]."""
    return 0.5 * (q - target.unsqueeze(1)).square().mean(-1).sum(-1)


def soft_policy_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """mean of alpha log pi - min_j Q_j; q [L, 2, B], log_prob [L, B], alpha [L]."""
    return (alpha.unsqueeze(-1) * log_prob - q.amin(1)).mean(-1)


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Its descent raises alpha [L] while the entropy, mean -log_prob [L, B], is below target."""
    return -log_alpha * (log_prob + target_entropy).mean(-1)


def gaussian_nll(mean: Tensor, log_std: Tensor, target: Tensor) -> Tensor:
    """Gaussian negative log-likelihood, up to constants; [L, M, B, 1 + S] -> [L, M]"""
    nll = (mean - target).square() * torch.exp(-2 * log_std) + 2 * log_std
    return nll.mean((-2, -1))


# ==================================================================================================
# 4. The learners and one iteration
# ==================================================================================================


class Batch(NamedTuple):
    """Rows [L, B, ...]; terminated is 0 or 1 and is the only thing that stops bootstrapping."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


class Learners(nn.Module):
    """Buffer, networks and optimizers of all learners; its state is the whole training state.

    A method adds its networks and `optimizers`, one for each network it trains, by name.
    """

    def __init__(
        self, args: Args, obs_dim: int, action_dim: int, capacity: int, device: torch.device
    ):
        super().__init__()
        self.device, self.learners = device, args.num_seeds
        self.columns = [obs_dim, action_dim, 1, obs_dim, 1]  # of a row: the fields of Batch
        rows = torch.zeros(args.num_seeds, capacity, sum(self.columns))
        self.register_buffer("buffer", rows)  # [L, capacity, C] of model data
        self.register_buffer("buffer_end", torch.zeros((), dtype=torch.long))  # next row to write
        self.register_buffer("buffer_rows", torch.zeros((), dtype=torch.long))  # rows filled
        real_rows = torch.full((args.num_seeds, 1), args.batch_size)  # of a mixed batch
        self.register_buffer("real_rows", real_rows)
        sizes = (obs_dim, action_dim, args.model_hidden)
        self.model = self.build(args, "model", DynamicsEnsemble, args.ensemble_size, *sizes)
        self.elites = self.build(args, "elites", DynamicsEnsemble, args.num_elites, *sizes)
        self.elites.requires_grad_(False)  # a copy of the best members, made after each fit

    def build(self, args: Args, name: str, network: Callable[..., nn.Module], *sizes) -> nn.Module:
        """A network whose first weights depend on the seed and its name alone."""
        seed_phase(args.seed, name)
        return network(args.num_seeds, *sizes)

    def model_optimizer(self, args: Args, decay_biases: bool) -> torch.optim.Adam:
        groups, rest = [], list(self.model.bounds())
        layers = [*self.model.trunk, self.model.heads]
        for layer, decay in zip(layers, args.model_weight_decay, strict=True):
            decayed = list(layer.parameters()) if decay_biases else [layer.weight]
            rest += [] if decay_biases else [layer.bias]
            groups.append(dict(params=decayed, weight_decay=decay))
        return adam([*groups, dict(params=rest, weight_decay=0.0)], args.model_lr)

    def split(self, rows: Tensor) -> Batch:
        obs, action, reward, next_obs, terminated = rows.split(self.columns, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def remember(self, batch: Batch) -> None:
        """Write model transitions [L, B, ...] over the oldest rows of the buffer."""
        fields = [f.unsqueeze(-1) if f.dim() == 2 else f for f in batch]
        count, capacity = batch.obs.shape[1], self.buffer.shape[1]
        place = (self.buffer_end + torch.arange(count, device=self.device)) % capacity
        self.buffer.index_copy_(1, place, torch.cat(fields, -1))
        self.buffer_end.add_(count).remainder_(capacity)
        self.buffer_rows.add_(count).clamp_(max=capacity)

    def sample_data(self, data: Tensor, count: int) -> Tensor:
        """Uniform rows of data [N, C], with replacement. -> [L, count, C]"""
        return data[torch.randint(len(data), (self.learners, count), device=self.device)]

    def sample(self, data: Tensor, count: int) -> Batch:
        """A mixed batch: the first real_rows rows from data [N, C], the rest from the buffer.

        Both kinds are drawn in full and one is kept per row: fixed shapes, and a count that is a
        tensor, so that the iteration can be a CUDA graph while the mix changes.
        """
        place = torch.rand(self.learners, count, device=self.device) * self.buffer_rows
        place = place.long().minimum(self.buffer_rows - 1).clamp(min=0)  # rand may round up to 1
        learner = torch.arange(self.learners, device=self.device).unsqueeze(-1)
        imagined = self.buffer[learner, place]
        is_real = torch.arange(count, device=self.device) < self.real_rows
        return self.split(
            torch.where(is_real.unsqueeze(-1), self.sample_data(data, count), imagined)
        )


class RolloutEnd(NamedTuple):
    """When a model rollout ends: by the task's known rule, or because the model has diverged."""

    known: Callable[[Tensor], Tensor]  # next_obs [..., S] -> bool [...]
    obs_limit: Tensor  # [S]: twice the largest |s| of the data (ours), at least 100 (hopper's)

    def __call__(self, next_obs: Tensor) -> Tensor:
        """next_obs [L, B, S] -> terminated [L, B], 0 or 1."""
        # MOPO's paper: silent. MOPO's code: the known rule. Here: also a state far outside the data
        # (or NaN), which would overflow the critics.
        inside = (next_obs.abs() <= self.obs_limit).all(-1)
        return (~inside | self.known(next_obs)).float()


def known_termination(env_id: str) -> tuple[Callable[[Tensor], Tensor], bool]:
    """The rule on next_obs [..., S] of a task family, and whether one is known at all."""

    def never(s: Tensor) -> Tensor:
        return torch.zeros_like(s[..., 0], dtype=torch.bool)

    def hopper(s: Tensor) -> Tensor:
        sane = s.isfinite().all(-1) & (s[..., 1:].abs() < 100).all(-1)
        return ~(sane & (s[..., 0] > 0.7) & (s[..., 1].abs() < 0.2))

    def walker2d(s: Tensor) -> Tensor:
        return ~((s[..., 0] > 0.8) & (s[..., 0] < 2.0) & (s[..., 1].abs() < 1.0))

    def ant(s: Tensor) -> Tensor:  # heights in m, from gymnasium's Ant
        return ~(s.isfinite().all(-1) & (s[..., 0] >= 0.2) & (s[..., 0] <= 1.0))

    def pen(s: Tensor) -> Tensor:
        return s[..., 26] < 0.075  # height of the pen

    rules = {"hopper": hopper, "walker2d": walker2d, "ant": ant, "pen": pen}
    rules |= dict.fromkeys(("halfcheetah", "maze2d", "door"), never)
    family = env_id.split("-")[0].lower()
    return rules.get(family, never), family in rules


class COMBO(Learners):
    """The networks of COMBO: the model, and SAC's policy, critics and temperature."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        capacity = args.rollout_retain * args.rollout_starts * args.horizon
        super().__init__(args, obs_dim, action_dim, capacity, device)
        sizes = (obs_dim, action_dim, args)
        self.actor = self.build(args, "actor", GaussianPolicy, *sizes)
        self.critic = self.build(args, "critic", DoubleCritic, *sizes)
        self.critic_target = copy.deepcopy(self.critic)
        self.temperature = nn.ParameterList([torch.zeros(args.num_seeds)])  # log alpha, [L]
        self.register_buffer("epoch_place", torch.zeros((), dtype=torch.long))  # see ensemble_step
        if args.select:  # one model for all settings
            one, widths = dataclasses.replace(args, num_seeds=1), (obs_dim, action_dim)
            sizes = (args.ensemble_size, *widths, args.model_hidden)
            self.model = self.build(one, "model", DynamicsEnsemble, *sizes)
        self.register_buffer("beta", torch.tensor([beta for beta, _ in settings(args)]))  # [L]
        self.real_rows.copy_(torch.tensor(real_row_counts(args)).unsqueeze(-1))
        self.to(device)
        self.optimizers = {
            "actor": adam(self.actor.parameters(), args.actor_lr),
            "critic": adam(self.critic.parameters(), args.critic_lr),
            "temperature": adam(self.temperature.parameters(), args.alpha_lr),
            "model": self.model_optimizer(args, decay_biases=False),
        }


def descend(
    agent: Learners, name: str, loss: Tensor, max_norm: float = math.inf, retain_graph: bool = False
) -> None:
    """One optimizer step of a network along the gradient of its loss [L], clipped per learner.

    autograd.grad computes the gradients of these parameters only: in the policy's step none of the
    weights of other networks, which the loss passes through.
    """
    parameters = list(getattr(agent, name).parameters())
    grads = torch.autograd.grad(loss.sum(), parameters, retain_graph=retain_graph)
    if max_norm < math.inf:
        grads = clip_gradients(grads, max_norm)
    apply_gradients(agent.optimizers[name], parameters, grads)


def proposals(agent: COMBO, obs: Tensor, next_obs: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """3 n actions per state, [L, B, 3 n, A], and their log-densities, [L, B, 3 n].

    n each from the uniform distribution, from pi(.|s) and from pi(.|s'); all are evaluated at s.
    """
    count, action_dim = args.num_actions, agent.columns[1]
    shape = (*obs.shape[:2], count)
    uniform = 2 * torch.rand(*shape, action_dim, device=agent.device) - 1
    uniform_density = torch.full(shape, -action_dim * math.log(2.0), device=agent.device)
    actions, densities = [uniform], [uniform_density]
    for states in (obs, next_obs):
        mean, log_std = (x.repeat_interleave(count, 1) for x in agent.actor(states))
        action, log_prob = agent.actor.draw(mean, log_std)
        actions.append(action.view(*shape, action_dim))
        densities.append(log_prob.view(shape))
    return torch.cat(actions, 2), torch.cat(densities, 2)


def q_of_actions(agent: COMBO, obs: Tensor, actions: Tensor) -> Tensor:
    """Q at (s, a_1), (s, a_2), ...: obs [L, B, S], actions [L, B, n, A] -> [L, 2, B, n]."""
    count = actions.shape[2]
    q = agent.critic(obs.repeat_interleave(count, 1), actions.flatten(1, 2))
    return q.unflatten(-1, (-1, count))


def rows_of_rho(agent: COMBO, args: Args) -> tuple[Tensor, Tensor]:
    """Which rows of a batch are data, and which are states of rho: 0 or 1, [L, B]."""
    in_data = (torch.arange(args.batch_size, device=agent.device) < agent.real_rows).float()
    return in_data, torch.ones_like(in_data) if args.rho_states == "mixed" else 1 - in_data


def update_conservative_critic(agent: COMBO, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step of both critics. -> logs [L]"""
    in_data, in_rho = rows_of_rho(agent, args)
    # Rows that are data for every learner may be no states of rho: they are not evaluated then.
    first = min(real_row_counts(args)) if args.rho_states == "model" else 0
    obs, next_obs, in_rho = batch.obs[:, first:], batch.next_obs[:, first:], in_rho[:, first:]
    with torch.no_grad():
        next_action, _ = agent.actor.sample(batch.next_obs)
        q_next = agent.critic_target(batch.next_obs, next_action)
        # Recalled: no entropy in the backup.
        no_bonus = torch.zeros_like(batch.reward)
        target = soft_target(batch.reward, batch.terminated, q_next, no_bonus, args.gamma)
        actions, log_density = proposals(agent, obs, next_obs, args)
    q = agent.critic(batch.obs, batch.action)
    soft_q = log_sum_exp(q_of_actions(agent, obs, actions), log_density)
    # Paper: Q at an action of the policy. Recalled (appendix): as in CQL, the soft maximum of Q
    # over uniform and policy actions. Here: the latter, pushed up on data rows only.
    gap = expectation(soft_q, in_rho) - expectation(q, in_data)  # [L, 2]
    bellman_error = squared_td_error(q, target)
    descend(agent, "critic", agent.beta * gap.sum(-1) + bellman_error)  # Eq. (2)
    return {
        "losses/critic_loss": bellman_error.detach(),
        "losses/conservative_gap": gap.detach().mean(-1),
        "losses/q_values": q.detach().mean((1, 2)),
    }


def update_policy(agent: Learners, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step of the policy and of the temperature. -> logs [L]"""
    action, log_prob = agent.actor.sample(batch.obs)
    log_alpha = agent.temperature[0]
    loss = soft_policy_loss(agent.critic(batch.obs, action), log_prob, log_alpha.detach().exp())
    descend(agent, "actor", loss)
    descend(
        agent, "temperature", temperature_loss(log_alpha, log_prob.detach(), args.target_entropy)
    )
    return {
        "losses/actor_loss": loss.detach(),
        "losses/entropy": -log_prob.detach().mean(-1),
        "losses/alpha": log_alpha.detach().exp(),
    }


def combo_step(agent: COMBO, data: Tensor, args: Args) -> dict[str, Tensor]:
    """One iteration: critics, policy, temperature, target critics. -> logs [L]

    Reads no Python value that changes and never waits for the GPU, so `capture` can record it.
    """
    batch = agent.sample(data, args.batch_size)
    logs = update_conservative_critic(agent, batch, args)  # Eq. (2)
    # Eq. (3) takes the states of d_f whatever --rho-states says; its entropy term is optional.
    logs |= update_policy(agent, batch, args)  # Eq. (3)
    polyak(agent.critic_target, agent.critic, args.tau)
    return logs


# ==================================================================================================
# 5. World model: fit, imagine
# ==================================================================================================


@torch.no_grad()
def imagine(agent: Learners, data: Tensor, end: RolloutEnd, args: Args) -> dict[str, Tensor]:
    """Roll out in the model, write rollout_starts x horizon transitions to the buffer.

    A rollout starts at a stored state and ends at its first terminated step, which is kept.
    """
    # A CPU works through chunks that stay in its cache; a GPU takes all rollouts at once.
    chunk = 500 if agent.device.type == "cpu" else args.rollout_starts
    sums = torch.zeros(2, agent.learners, device=agent.device)
    for first in range(0, args.rollout_starts, chunk):
        count = min(chunk, args.rollout_starts - first)
        obs = agent.split(agent.sample_data(data, count)).obs
        for _ in range(args.horizon):
            action = agent.actor.sample(obs)[0]
            if args.rollout_actions == "uniform":
                action = 2 * torch.rand_like(action) - 1
            reward, next_obs = agent.elites.sample(obs, action)
            terminated, reward = end(next_obs), reward.nan_to_num(0.0, 0.0, 0.0)
            next_obs = next_obs.nan_to_num(0.0).clamp(-end.obs_limit, end.obs_limit)
            sums += torch.stack([terminated.sum(-1), reward.sum(-1)])
            agent.remember(Batch(obs, action, reward, next_obs, terminated))
            # MOPO's code: ended rollouts are dropped, a refresh shrinks. Here: the slot of an ended
            # rollout restarts, so that every refresh has the same shape.
            fresh = agent.split(agent.sample_data(data, count)).obs
            obs = torch.where(terminated.unsqueeze(-1) > 0, fresh, next_obs)
    means = sums / (args.rollout_starts * args.horizon)
    return {
        "rollout/terminated_frac": means[0],
        "rollout/reward": means[1],
    }


def model_rows(agent: Learners, dataset: "Dataset", data: Tensor) -> tuple[Tensor, Tensor]:
    """The model's rows: inputs [n, S + A], targets [n, 1 + S] in their own units.

    Terminals whose next observation was not stored stay out.
    """
    batch = agent.split(data[dataset.has_next.nonzero().squeeze(-1).to(agent.device)])
    targets = torch.cat([batch.reward.unsqueeze(-1), batch.next_obs - batch.obs], -1)
    return torch.cat([batch.obs, batch.action], -1), targets


def split_rows(
    count: int, seed: int, holdout_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Numbers of the rows held out, at most a fifth, and of those to train on."""
    seed_phase(seed, "model split")
    rows = torch.randperm(count).to(device)
    held = min(count // 5, holdout_size)
    return rows[:held], rows[held:]


def ensemble_step(
    agent: Learners, inputs: Tensor, targets: Tensor, order: Tensor, args: Args
) -> dict[str, Tensor]:
    """One Adam step of all members on the next rows of the epoch's order [L, M, n]. -> logs [L]

    The last batch of an epoch is filled up with its first rows, so that all have one shape.
    """
    place = agent.epoch_place + torch.arange(args.model_batch_size, device=agent.device)
    rows = order.index_select(2, place % order.shape[2])  # [L, M, B]
    agent.epoch_place += args.model_batch_size
    model = agent.model
    mean, log_std = model(inputs[rows])
    loss = gaussian_nll(mean, log_std, targets[rows]).sum(-1)
    # Keeps the learned bounds of the log-variance from drifting apart (MOPO's code).
    spread = (model.max_log_var - model.min_log_var).flatten(1).sum(-1)
    descend(agent, "model", loss + 0.01 * spread)
    return {"model/train_nll": loss.detach() / args.ensemble_size}


@torch.no_grad()
def holdout_error(agent: Learners, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of every member on rows [n, ...]. -> [L, M]"""
    mean, _ = agent.model(inputs.expand(*agent.model.lead, -1, -1))
    return (mean - targets).square().mean((-2, -1))


def fit_state(agent: Learners) -> dict:
    """What early stopping remembers, all of which goes into checkpoints.

    Learners train in one product but stop on their own: what a stopped one has is set aside
    ("frozen") and put back at the end; "idle" counts its epochs without a gain of any member.
    """
    learners, members = agent.model.lead
    return {
        "epoch": 0,
        "best": torch.full((learners, members), 1e32, device=agent.device),
        # epochs since a member's gain
        "idle": torch.zeros(learners, dtype=torch.long, device=agent.device),
        "stopped": torch.zeros(learners, dtype=torch.bool, device=agent.device),
        "best_members": [p.detach().clone() for p in agent.model.member_parameters()],
        "frozen": {},  # learner -> its weights and Adam moments
    }


def model_tensors(agent: Learners) -> list[Tensor]:
    """The model's parameters and Adam moments, all [L, ...]."""
    parameters = list(agent.model.parameters())
    moments = [agent.optimizers["model"].state[p] for p in parameters]
    return [p.detach() for p in parameters] + [
        m[k] for m in moments for k in ("exp_avg", "exp_avg_sq")
    ]


@torch.no_grad()
def judge_epoch(agent: Learners, fit: dict, loss: Tensor, args: Args) -> None:
    """Snapshot the members that gained over 1 %, stop the learners that were idle for too long."""
    gained = (fit["best"] - loss) / fit["best"].abs() > 0.01
    gained &= ~fit["stopped"].unsqueeze(-1)
    fit["best"] = torch.where(gained, loss, fit["best"])
    for best, now in zip(fit["best_members"], agent.model.member_parameters(), strict=True):
        best.copy_(torch.where(gained.view(*gained.shape, 1, 1), now, best))
    fit["idle"] = torch.where(gained.any(-1), 0, fit["idle"] + 1)
    fit["epoch"] += 1
    stops = (fit["idle"] >= args.model_patience) & ~fit["stopped"]
    for learner in stops.nonzero().flatten().tolist():
        fit["frozen"][learner] = [t[learner].clone() for t in model_tensors(agent)]
    fit["stopped"] |= stops


@torch.no_grad()
def restore_best(agent: Learners, fit: dict) -> None:
    """Put learners back to their own stop and members to their best epoch."""
    for learner, saved in fit["frozen"].items():
        for tensor, value in zip(model_tensors(agent), saved, strict=True):
            tensor[learner].copy_(value)
    # Why not the bounds of the spread: the code of AMPL and that of MOPO leave them, too.
    for now, best in zip(agent.model.member_parameters(), fit["best_members"], strict=True):
        now.copy_(best)
    if agent.model.lead[0] > 1:
        # Adam counts its steps for all learners together. A full count (bias correction over, as
        # it is to 2e-5 after the shortest fit) keeps a learner independent of the others' stops.
        for state in agent.optimizers["model"].state.values():
            state["step"].fill_(1e6)


@torch.no_grad()
def choose_elites(agent: Learners, loss: Tensor, args: Args) -> None:
    """Copy the members with the lowest hold-out loss [L, M] to agent.elites.

    A model of one learner serves all.
    """
    order = loss.argsort(-1)[:, : args.num_elites]  # [L, E]
    learner = torch.arange(len(loss), device=agent.device).unsqueeze(-1)
    for elite, member in zip(
        agent.elites.member_parameters(), agent.model.member_parameters(), strict=True
    ):
        elite.copy_(member[learner, order])
    shared = [*agent.elites.bounds(), *agent.elites.buffers()]
    for elite, value in zip(shared, [*agent.model.bounds(), *agent.model.buffers()], strict=True):
        elite.copy_(value)


def fit_model(agent: Learners, dataset: "Dataset", data: Tensor, args: Args, run: "Run") -> Tensor:
    """Fit the ensemble, once. -> hold-out errors [L, M]

    Every member has a bootstrap sample of its own and sees it once per epoch, in a new order; the
    fit stops when no member has gained 1 % on the hold-out rows for `model_patience` epochs.
    """
    inputs, targets = model_rows(agent, dataset, data)
    held_rows, train_rows = split_rows(len(inputs), args.seed, args.holdout_size, agent.device)
    agent.model.standardise_by(inputs[train_rows])
    inputs = (inputs - agent.model.input_mean) / agent.model.input_std
    shape = (*agent.model.lead, len(train_rows))
    bootstrap = train_rows[torch.randint(len(train_rows), shape).to(agent.device)]
    order = bootstrap.clone()
    steps = math.ceil(len(train_rows) / args.model_batch_size)
    fit = run.progress["fit"] = run.progress.get("fit") or fit_state(agent)
    step = capture(lambda: ensemble_step(agent, inputs, targets, order, args), agent, args)
    while fit["epoch"] < args.model_max_epochs and not fit["stopped"].all():
        seed_phase(args.seed, "model fit 0", fit["epoch"])
        shuffle = torch.rand(shape, device=agent.device).argsort(-1)
        torch.gather(bootstrap, -1, shuffle, out=order)
        agent.epoch_place.zero_()
        for _ in range(steps):
            logs = step()
        error = holdout_error(agent, inputs[held_rows], targets[held_rows])
        judge_epoch(agent, fit, error, args)
        logs = logs | {"model/validation_mse": error.mean(-1)}
        run.after_steps("model fit", steps, logs)
    restore_best(agent, fit)
    error = holdout_error(agent, inputs[held_rows], targets[held_rows])
    choose_elites(agent, error, args)
    return error


# ==================================================================================================
# 6. Plumbing, the same in every file: data, environments, evaluation, training helpers, run folder
# ==================================================================================================

# --- datasets ---


class UserError(Exception):
    """A mistake the user can mend: main prints it as one sentence and exits with code 2."""


def refuse_clashes(clashes: dict[str, bool]) -> None:
    """Raises UserError with the first sentence that holds."""
    for sentence, clash in clashes.items():
        if clash:
            raise UserError(sentence)


def check_numbers(
    args: Args, may_be_zero: set[str], at_most_one: set[str], any_sign: tuple[str, ...] = ("seed",)
) -> None:
    """Refuse numbers that no setting can have. Raises UserError."""
    for name, value in vars(args).items():
        if isinstance(value, bool | str | None):
            continue
        flag = "--" + name.replace("_", "-")
        least = "at least 0" if name in may_be_zero else "at least 1"
        if isinstance(value, float | tuple) and name not in may_be_zero:
            least = "positive"
        for number in value if isinstance(value, tuple) else (value,):
            if not math.isfinite(number):
                raise UserError(f"{flag} is {number}; it must be finite")
            if name not in any_sign and (number < 0 or (number == 0 and least != "at least 0")):
                raise UserError(f"{flag} is {number}; it must be {least}")
            if number > 1 and name in at_most_one:
                raise UserError(f"{flag} is {number}; it must be at most 1")


class Dataset(NamedTuple):
    """N transitions on the CPU, S observation and A action entries; no rows at time limits."""

    obs: Tensor  # [N, S] float32
    action: Tensor  # [N, A] float32 in [-1, 1], whatever the environment's own bounds
    reward: Tensor  # [N] float32, as stored
    next_obs: Tensor  # [N, S] float32; repeats obs where has_next is False
    terminated: Tensor  # [N] bool
    next_row: Tensor  # [N] int64, the row that holds (s', a'); -1 where this table has none
    has_next: Tensor  # [N] bool; False: s' was not stored, so the world model skips the row
    episode_start_obs: Tensor  # [episodes, S] float32, a cut last episode included
    episodes: dict  # complete episodes: count, mean and std of their undiscounted return
    source: str  # path of the file
    sha256: str  # of the file, hex
    notes: list  # sentences worth printing


@functools.lru_cache
def d4rl_tables() -> dict[str, dict]:
    """DATASET_URLS, REF_MIN_SCORE, REF_MAX_SCORE of the installed d4rl. UserError without d4rl."""
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        raise UserError("d4rl's tables are missing: pip install --no-deps d4rl==1.1")
    # Why: `import d4rl` needs gym and mujoco_py (MuJoCo 2.1). Its tables are one plain file.
    return runpy.run_path(os.path.join(spec.submodule_search_locations[0], "infos.py"))


def find_dataset(env_id: str, dataset_path: str | None = None) -> Path:
    """`dataset_path`, else D4RL's cache, else a download into it. UserError: no file."""
    if dataset_path is not None:
        if not os.path.isfile(dataset_path):
            raise UserError(f"--dataset-path {dataset_path}: there is no such file")
        return Path(dataset_path)
    url = d4rl_tables()["DATASET_URLS"].get(env_id)
    cache = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"  # D4RL's own places and names
    name = f"{env_id.replace('/', '-')}.hdf5" if url is None else url.rsplit("/", 1)[1]
    path = Path(cache).expanduser() / name
    if url is None and not path.is_file():
        raise UserError(
            f"{env_id} is not a D4RL dataset, and there is no {path}: name an HDF5 file with "
            "--dataset-path, or see which ones collect.py makes"
        )
    if not path.is_file():
        download(url, path, env_id)
    return path


def download(url: str, path: Path, env_id: str) -> None:
    """Fetch `url` to `path`, which appears only when whole. UserError names the ways out."""
    part, reasons = path.with_name(path.name + ".part"), []
    for address in dict.fromkeys((url.replace("http:", "https:", 1), url)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(address, part)
            os.replace(part, path)
            return
        except (OSError, http.client.HTTPException) as error:
            if path.is_file():  # another process was faster
                return
            reasons.append(f"{address.split(':')[0]}: {error}")
    raise UserError(
        f"no dataset for {env_id} ({'; '.join(reasons)}): run again (a cut download resumes), "
        f"download {url} to {path} by hand, name a file with --dataset-path, "
        "or make one with collect.py"
    )


def fetch(url: str, part: Path) -> None:
    """Complete the file `part` from `url`, resuming where an earlier try stopped. OSError: cut."""
    # Why no lock and no truncation at the start: processes that fetch the same file at once write
    # the same bytes to the same places, so none can spoil another's work.
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the file ends before `start`, or right there. Begin anew
            raise
        part.unlink()
        return fetch(url, part)
    part.touch()
    with response, open(part, "r+b") as file:
        start = start if response.status == 206 else 0  # 200: this server cannot resume
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        file.seek(start)
        style = dict(unit="B", unit_scale=True, desc=part.stem, disable=None)
        with tqdm(total=total, initial=start, **style) as bar:
            while block := response.read(1 << 18):
                file.write(block)
                bar.update(len(block))
        if total is not None and file.tell() < total:
            raise OSError(f"cut after {file.tell()} of {total} bytes")
        file.truncate()
    try:
        h5py.File(part, "r").close()
    except OSError:  # a login page, say, or a file without its tail
        part.unlink()
        raise OSError("what the server sent is not a whole HDF5 file") from None


def read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """D4RL's arrays by key, float32 [rows, ...] and flags bool [rows], and a list of notes.

    UserError: truncated, not HDF5, not D4RL's layout, lengths that differ, no rows.
    """
    required, flags = ("observations", "actions", "rewards"), ("terminals", "timeouts")
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in required if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                raise UserError(f"{path} is no D4RL file: it lacks {', '.join(missing)}")
            if not any(key in file for key in flags):
                raise UserError(f"{path} has neither terminals nor timeouts to tell episodes apart")
            keys = [key for key in (*required, "next_observations", *flags) if key in file]
            data = {key: file[key].astype(np.float32)[()] for key in keys}
            origin = file.attrs.get("recollected")
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is truncated or not D4RL's HDF5: get it again ({error})") from None
    for key in {"rewards", *flags} & set(data):
        if data[key].shape[1:] == (1,):  # some old files store columns
            data[key] = data[key][:, 0]
    for key in set(flags) & set(data):
        data[key] = data[key] != 0  # and flags as 0.0 / 1.0 or uint8
    lengths = {key: len(array) if array.ndim else 0 for key, array in data.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path} is damaged: its arrays differ in length, {lengths}")
    if not lengths["rewards"]:
        raise UserError(f"{path} is empty: collect or download it again")
    return data, [] if origin is None else [f"recollected: {origin}"]


def check_arrays(path: Path, data: dict[str, np.ndarray], env: gymnasium.Env) -> list[str]:
    """Widths, finite numbers, actions within the space; clips and scales data["actions"] in place.

    Returns notes. UserError names the key and the first bad row.
    """
    seen, box = env.observation_space.shape, env.action_space
    shapes = {"observations": seen, "next_observations": seen, "actions": box.shape, "rewards": ()}
    for key in (key for key in shapes if key in data):
        array, shape = data[key], data[key].shape[1:]
        if shape != shapes[key]:
            raise UserError(
                f"{path}: a row of {key} has shape {shape}, in the environment {shapes[key]}: "
                "is it another task's file?"
            )
        if not np.isfinite(array.sum(dtype=np.float64)):  # NaN and inf survive a sum; it is fast
            row = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))[0]
            raise UserError(f"{path} is damaged: {key} holds NaN or infinity, first in row {row}")
    action = data["actions"]
    outside = np.flatnonzero(((action < box.low) | (action > box.high)).any(1))
    excess = np.maximum(action[outside] - box.high, box.low - action[outside])
    if (excess > 1e-3).any():
        first = np.flatnonzero((excess > 1e-3).any(1))[0]
        raise UserError(
            f"{path}: the action in row {outside[first]} leaves the action space by "
            f"{excess[first].max():.3g}: clip the actions before they are stored"
        )
    action[outside] = np.clip(action[outside], box.low, box.high)
    action -= (box.high + box.low) / 2  # exactly nothing for D4RL, whose bounds are -1 and 1
    action /= (box.high - box.low) / 2
    count = int((excess > 0).sum())
    return [f"{count} action entries beyond the bounds by <= 1e-3 were clipped"] if count else []


def episode_flags(path: Path, data: dict, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(terminated, timeout), bool [rows]; without timeouts in the file, `limit` steps are one."""
    size = len(data["rewards"])
    terminated = data.get("terminals", np.zeros(size, bool))
    timeout = data.get("timeouts")  # a row with both flags is dropped, as by D4RL's loader
    if timeout is None:
        row = np.arange(size)
        begins = np.concatenate([[True], terminated[:-1]])
        step = row - np.maximum.accumulate(np.where(begins, row, 0))
        timeout = (step % limit == limit - 1) & ~terminated
    count = int((terminated | timeout).sum())
    if count < 2:
        raise UserError(
            f"{path} has {count} complete episodes: its terminals or timeouts must end at least 2"
        )
    return terminated, timeout


def pair(data: dict, terminated: np.ndarray, timeout: np.ndarray) -> dict[str, np.ndarray]:
    """Which rows stay, and what follows each: the Dataset fields that are arrays, by name."""
    obs, stored, size = data["observations"], data.get("next_observations"), len(terminated)
    ended = terminated | timeout
    keep = ~timeout
    if stored is None:
        keep[-1] &= terminated[-1]  # a cut tail: its last row has no s'
    rows = np.flatnonzero(keep)
    after = np.minimum(rows + 1, size - 1)
    follows = ~ended[rows] & (rows + 1 < size)
    first = np.concatenate([[True], ended[:-1]])
    # Why: after a terminal stands the next episode's first state. It must never become s'.
    unstored = obs[np.where(follows, after, rows)] if stored is None else None
    return dict(
        obs=obs[rows],
        action=data["actions"][rows],
        reward=data["rewards"][rows],
        next_obs=unstored if stored is None else stored[rows],
        terminated=terminated[rows],
        next_row=np.where(follows & keep[after], np.cumsum(keep)[after] - 1, -1),
        has_next=follows if stored is None else np.ones(len(rows), bool),
        episode_start_obs=obs[first],
    )


def load_dataset(env_id: str, dataset_path: str | None, env: gymnasium.Env) -> Dataset:
    """Find, read, check, pair. UserError: everything that can be wrong with the file."""
    path = find_dataset(env_id, dataset_path)
    data, notes = read_hdf5(path)
    notes += check_arrays(path, data, env)
    limit = env.get_wrapper_attr("_max_episode_steps")
    if "timeouts" not in data:
        notes.append(f"no timeouts in the file: episodes are taken to end after {limit} steps")
    if env_id.startswith(("hammer-", "relocate-")):
        notes.append("scores of this environment were not checked against D4RL's references")
    terminated, timeout = episode_flags(path, data, limit)
    last = np.flatnonzero(terminated | timeout)
    returns = np.diff(np.cumsum(data["rewards"], dtype=np.float64)[last], prepend=0.0)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Dataset(
        **{key: torch.from_numpy(x) for key, x in pair(data, terminated, timeout).items()},
        episodes={"count": len(last), "mean": float(returns.mean()), "std": float(returns.std())},
        source=str(path),
        sha256=digest,
        notes=notes,
    )


def has_reference(env_id: str) -> bool:
    """Whether D4RL has reference scores for `env_id`."""
    return env_id in d4rl_tables()["REF_MIN_SCORE"]


def d4rl_score(env_id: str, returns: np.ndarray) -> np.ndarray:
    """100 * (return - min) / (max - min) per episode, D4RL's references; raw returns without."""
    returns = np.asarray(returns, np.float64)
    if not has_reference(env_id):
        return returns
    low, high = (d4rl_tables()[name][env_id] for name in ("REF_MIN_SCORE", "REF_MAX_SCORE"))
    return 100.0 * (returns - low) / (high - low)


# --- environments ---

# D4RL family: gymnasium id, D4RL's time limit, where palm minus object stands in an observation.
SIMULATORS = {
    "hopper": ("Hopper-v4", 1000, None),
    "halfcheetah": ("HalfCheetah-v4", 1000, None),
    "walker2d": ("Walker2d-v4", 1000, None),
    "pen": ("AdroitHandPen-v1", 100, None),
    "door": ("AdroitHandDoor-v1", 200, lambda obs: obs[35:38]),
    "hammer": ("AdroitHandHammer-v1", 200, lambda obs: obs[33:36] - obs[36:39]),
    "relocate": ("AdroitHandRelocate-v1", 200, lambda obs: obs[30:33]),
}
MAZE_LIMITS = {"open": 150, "umaze": 300, "medium": 600, "large": 800}


class D4RLSemantics(gymnasium.Wrapper):
    """Ends and rewards a step as D4RL's environments do and gymnasium's successors do not."""

    def __init__(self, env: gymnasium.Env, pen: bool, reach: Callable | None):
        super().__init__(env)
        self.pen, self.reach = pen, reach

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.pen:  # gymnasium-robotics takes the -5 for a drop but goes on; obs[26]: height, m
            terminated = bool(obs[26] < 0.075)
        if self.reach is not None:  # gymnasium-robotics 1.4.2 has +0.1 * distance, D4RL -0.1
            reward -= 0.2 * np.linalg.norm(self.reach(obs))
        # In D4RL a time limit wins over a fall in the same step.
        return obs, float(reward), terminated and not truncated, truncated, info


def quiet_make(name: str, limit: int | None, render_mode: str | None) -> gymnasium.Env:
    """gymnasium.make without what third parties say at every start and no user can change."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # gymnasium: "-v4 is out of date". It is D4RL's physics
        mujoco.set_mju_user_warning(lambda text: None)  # mujoco 4: HalfCheetah's `settotalmass`
        try:
            if name not in gymnasium.registry:
                import gymnasium_robotics  # 0.2 s; prints that rewards changed: see D4RLSemantics

                gymnasium.register_envs(gymnasium_robotics)
            limit = limit or gymnasium.spec(name).max_episode_steps or 1000
            kwargs = dict(max_episode_steps=limit, render_mode=render_mode)
            return gymnasium.make(name, disable_env_checker=True, **kwargs)
        finally:
            mujoco.set_mju_user_warning(None)


def make_env(env_id: str, render_mode: str | None = None) -> gymnasium.Env:
    """A D4RL id with D4RL's semantics, else any registered environment. UserError: neither."""
    urls = d4rl_tables()["DATASET_URLS"]
    family, *words = env_id.split("-")
    if env_id in urls and family == "maze2d":
        maze = "-".join(word for word in words[:-1] if word != "dense")
        env = Maze2dEnv(maze, "dense" if "dense" in words else "sparse", render_mode=render_mode)
        return gymnasium.wrappers.TimeLimit(env, MAZE_LIMITS[maze.removeprefix("eval-")])
    if env_id in urls and family in SIMULATORS:
        name, limit, reach = SIMULATORS[family]
        return D4RLSemantics(quiet_make(name, limit, render_mode), family == "pen", reach)
    if env_id in urls:
        raise UserError(f"--env-id {env_id}: D4RL's {family} tasks have no simulator here")
    try:
        env = quiet_make(env_id, None, render_mode)
    except Exception as error:  # gymnasium's own errors, ImportError, whatever a constructor raises
        near = difflib.get_close_matches(env_id, [*urls, *gymnasium.registry])
        why = " ".join(f"{type(error).__name__} {error}".split())
        if near and env_id not in gymnasium.registry:
            why = f"did you mean {', '.join(near)}?"
        raise UserError(f"--env-id {env_id} cannot be made: {why}") from None
    spaces = env.observation_space, env.action_space
    flat = all(isinstance(x, gymnasium.spaces.Box) and len(x.shape) == 1 for x in spaces)
    if not (flat and env.action_space.is_bounded()):
        raise UserError(f"--env-id {env_id}: only flat observations and flat, bounded actions work")
    return env


@functools.lru_cache(maxsize=4)
def env_slots(env_id: str, count: int) -> list[gymnasium.Env]:
    """`count` environments, made once: an Adroit one takes 0.1 s to build."""
    return [make_env(env_id) for _ in range(count)]


def run_episodes(
    env_id: str, act: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """One episode per slot, all in lockstep. -> returns float64, lengths int64, [episodes] each

    act: observations [episodes, S] float32 -> actions [episodes, A] in [-1, 1]. The batch keeps its
    size (a finished slot repeats its last observation) so that no slot's result depends on others.
    """
    envs = env_slots(env_id, episodes)
    seeds = [np.random.SeedSequence([seed, slot]).generate_state(1)[0] for slot in range(episodes)]
    obs = np.array([envs[i].reset(seed=int(seeds[i]))[0] for i in range(episodes)], np.float32)
    low, high = envs[0].action_space.low, envs[0].action_space.high
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    live = list(range(episodes))
    while live:
        actions = (high + low) / 2 + np.asarray(act(obs)) * ((high - low) / 2)
        for slot in tuple(live):
            obs[slot], reward, terminated, truncated, _ = envs[slot].step(actions[slot])
            returns[slot] += reward
            lengths[slot] += 1
            if terminated or truncated:
                live.remove(slot)
    return returns, lengths


# D4RL's layouts, rows separated by "/": '#' wall, 'O' open, 'G' the goal cell (open as well). Row i
# and column j are the x and y of an observation, so umaze's goal is at (1, 1).
# Source: d4rl's pointmaze/maze_model.py.
MAZES = {
    "open": "#######/#OOOOO#/#OOGOO#/#OOOOO#/#######",
    "umaze": "#####/#GOO#/###O#/#OOO#/#####",
    "medium": "########/#OO##OO#/#OO#OOO#/##OOO###/#OO#OOO#/#O#OO#O#/#OOO#OG#/########",
    "large": "############/#OOOO#OOOOO#/#O##O#O#O#O#/#OOOOOO#OOO#/#O####O###O#/"
    "#OO#O#OOOOO#/##O#O#O#O###/#OO#OOO#OGO#/############",
    "eval-umaze": "#####/#OOG#/#O###/#OOO#/#####",
    "eval-medium": "########/#OOOOOG#/#O#O##O#/#OOOO#O#/###OO###/#OOOOOO#/#OO##OO#/########",
    "eval-large": "############/#OO#OOO#OGO#/##O###O#O#O#/#OO#O#OOOOO#/#O##O#OO##O#/"
    "#OOOOOO#OOO#/#O##O#O#O###/#OOOO#OOOOO#/############",
}


def maze_cells(maze: str, kinds: str) -> list[tuple[int, int]]:
    """The (i, j) of every cell of `maze` whose letter is in `kinds`, row by row."""
    rows = MAZES[maze].split("/")
    return [(i, j) for i, row in enumerate(rows) for j, kind in enumerate(row) if kind in kinds]


def maze_xml(maze: str) -> str:
    """The MJCF of one maze, constants from d4rl's maze_model.py; colours and camera are ours.

    The ball's joints are zero at world (1.2, 1.2) and wall (i, j) is centred on (i + 1, j + 1).
    Observations are joint positions: the ball's centre (radius 0.1) can reach [i - 0.6, i + 0.2]
    of a lone cell i, whose middle is i - 0.2, not i.
    """
    walls = "".join(
        f'<geom class="wall" type="box" pos="{i + 1} {j + 1} 0" size=".5 .5 .2"/>'
        for i, j in maze_cells(maze, "#")
    )
    rows = MAZES[maze].split("/")
    eye = f"{(len(rows) + 1) / 2} {(len(rows[0]) + 1) / 2} {1.25 * max(len(rows), len(rows[0]))}"
    goal = "{} {}".format(*(k + 1.2 for k in maze_cells(maze, "G")[0]))
    return f"""
    <mujoco>
      <compiler inertiafromgeom="true"/>
      <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
      <visual><headlight ambient=".5 .5 .5"/></visual>
      <default>
        <geom density="1000" friction=".5 .1 .1" margin=".002" condim="1"/>
        <default class="wall"><geom contype="2" rgba=".7 .5 .3 1"/></default>
        <default class="look"><geom contype="0" conaffinity="0" rgba=".2 .25 .3 1"/></default>
      </default>
      <worldbody>
        <camera name="top" fovy="45" pos="{eye}"/>
        <geom class="look" type="plane" pos="0 0 -.1" size="40 40 1"/>
        <site type="cylinder" pos="{goal} -.09" size=".5 .005" rgba=".6 .3 .3 1"/>
        {walls}
        <body pos="1.2 1.2 0">
          <geom type="sphere" size=".1" rgba=".3 .8 .3 1"/>
          <joint name="x" type="slide" axis="1 0 0" damping="1"/>
          <joint name="y" type="slide" axis="0 1 0" damping="1"/>
        </body>
      </worldbody>
      <actuator>
        <motor joint="x" gear="100" ctrllimited="true" ctrlrange="-1 1"/>
        <motor joint="y" gear="100" ctrllimited="true" ctrlrange="-1 1"/>
      </actuator>
    </mujoco>"""


class Maze2dEnv(gymnasium.Env):
    """D4RL's maze2d-v1, which never terminates; the limit of 300, 600 or 800 steps is make_env's.

    Observation: (x, y, vx, vy) in m and m/s, float64 [4]. Action: force on x and y in 100 N, [2].
    The reward of a step is a function of the *next* position: sparse, 1 within 0.5 of the goal
    cell, else 0; dense, exp(-distance). In D4RL's datasets it is the same function of the *current*
    position (D4RL issue #194).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}

    def __init__(
        self, maze: str = "umaze", reward_type: str = "sparse", render_mode: str | None = None
    ):
        if maze not in MAZES or reward_type not in ("sparse", "dense"):
            raise ValueError(f"no maze {maze!r} with {reward_type!r} reward; mazes: {list(MAZES)}")
        self.maze, self.reward_type, self.render_mode = maze, reward_type, render_mode
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.goal = np.array(maze_cells(maze, "G")[0], np.float64)
        self.start_cells = np.array(maze_cells(maze, "OG"), np.float64)  # [cells, 2]
        self.model = mujoco.MjModel.from_xml_string(maze_xml(maze))
        self.data = mujoco.MjData(self.model)
        self.renderer = None

    def reset(self, *, seed=None, options=None):
        """A random open cell, position noise U(-0.1, 0.1), velocity noise N(0, 0.1)."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)  # forgets the contact solver's warm start, too
        cell = self.start_cells[self.np_random.integers(len(self.start_cells))]
        self.data.qpos[:] = cell + self.np_random.uniform(-0.1, 0.1, 2)
        self.data.qvel[:] = 0.1 * self.np_random.standard_normal(2)
        return np.concatenate([self.data.qpos, self.data.qvel]), {}

    def step(self, action):
        """One physics step of 0.01 s."""
        self.data.ctrl[:] = np.clip(action, -1.0, 1.0)
        # The limit of 5 m/s acts before the step: observed speeds reach 5 + 0.95 / 4.19879 = 5.226.
        self.data.qvel[:] = np.clip(self.data.qvel, -5.0, 5.0)
        mujoco.mj_step(self.model, self.data)
        obs = np.concatenate([self.data.qpos, self.data.qvel])
        return obs, float(self.reward(obs)), False, False, {}

    def reward(self, obs: np.ndarray) -> np.ndarray:
        """Observations [..., 4] -> rewards [...], for steps of the environment and dataset rows."""
        distance = np.linalg.norm(obs[..., :2] - self.goal, axis=-1)
        return np.exp(-distance) if self.reward_type == "dense" else 1.0 * (distance <= 0.5)

    def render(self):
        """From above, x right, y up; the disc is the rewarded area. -> uint8 [480, 480, 3]"""
        if self.renderer is None:
            self.renderer = mujoco.Renderer(self.model, 480, 480)
        mujoco.mj_forward(self.model, self.data)
        self.renderer.update_scene(self.data, camera="top")
        return self.renderer.render()

    def close(self):
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None


class HalfCheetahJumpEnv(HalfCheetahEnv):
    """halfcheetah-jump of MOPO and COMBO: no faster than 3 m/s, and the higher the better.

    Observation: qpos but x [8], height of the torso in m [1], qvel [9], float64 [18]; it never
    terminates. info["behaviour_reward"] is the task that the data's policy was trained on.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (18,), np.float64)

    def _get_obs(self):
        return np.insert(super()._get_obs(), 8, self.data.body("torso").xpos[2])

    def reset_model(self):
        obs = super().reset_model()
        self.first_height = obs[8]  # with the noise of the reset
        return obs

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        # The appendix prints max; the text ("maximum velocity 3") and the authors' code mean min.
        behaviour = min(info["x_velocity"], 3.0) + info["reward_ctrl"]  # - 0.1 |a|^2
        reward = behaviour + 15.0 * (obs[8] - self.first_height)
        info["behaviour_reward"] = float(behaviour)
        return obs, float(reward), terminated, truncated, info


class AntAngleEnv(AntEnv):
    """ant-angle of MOPO and COMBO: run at 30 degrees to the x axis, on data from a run along it.

    Observation: qpos but x and y [13], qvel [14], float64 [27]. It terminates as Ant does, when the
    torso leaves heights from 0.2 to 1 m. Velocity: the torso's way during the step over its time.
    """

    def __init__(self, **kwargs):
        super().__init__(include_cfrc_ext_in_observation=False, **kwargs)

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        # -0.5 |a|^2 - 0.0005 |contact forces, clipped to +-1|^2 + 1, the 1 in the last step, too.
        # gymnasium calls mj_rnePostConstraint; without it the forces would be zero.
        rest = info["reward_ctrl"] + info["reward_contact"] + 1.0
        angle = math.radians(30)
        along = info["x_velocity"] * math.cos(angle) + info["y_velocity"] * math.sin(angle)
        info["behaviour_reward"] = float(info["x_velocity"] + rest)
        return obs, float(along + rest), terminated, truncated, info


for ood_id, ood_env in (("halfcheetah-jump-v0", HalfCheetahJumpEnv), ("ant-angle-v0", AntAngleEnv)):
    if ood_id not in gymnasium.registry:  # else another of these scripts, with the same text
        gymnasium.register(ood_id, ood_env, max_episode_steps=1000)


# --- evaluation ---


class Policy(nn.Module):
    """The actor of one learner, on the CPU: what policy.pt holds. See `load_policy`."""

    networks = ("actor",)

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.actor = GaussianPolicy(1, obs_dim, action_dim, args)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs [n, S] -> actions [n, A] in [-1, 1], the Gaussian's mean through tanh."""
        mean, _ = self.actor(torch.as_tensor(obs, dtype=torch.float32)[None])
        return torch.tanh(mean[0]).numpy()


def policy_state(agent: Learners, learner: int) -> dict[str, Tensor]:
    """The tensors of one learner's Policy, copied to the CPU."""
    own = {k: v for k, v in agent.state_dict().items() if k.split(".")[0] in Policy.networks}
    return {k: v[learner : learner + 1].cpu().clone() for k, v in own.items()}


def load_policy(run: str | Path, learner: int = 0) -> Policy:
    """The policy saved in a run folder. Raises UserError if there is none."""
    path = Path(run) / "policy.pt"
    if not path.exists():
        raise UserError(f"{path} does not exist: is {run} a run folder with a checkpoint?")
    args = load_args(run)
    with reading(path):
        saved = torch.load(path, weights_only=True)
        policy = Policy(args, saved["obs_dim"], saved["action_dim"])
        policy.load_state_dict(saved["learners"][learner])
    return policy


def evaluate(policy: Policy, args: Args, learner: int, k: int, episodes: int) -> np.ndarray:
    """Returns [episodes] of a learner's policy in evaluation k; the same in any process."""
    threads, seed = torch.get_num_threads(), args.seed + learner
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):  # the GPU's state is not touched
        torch.default_generator.manual_seed(phase_seed(seed, "evaluation", k))
        returns, _ = run_episodes(
            args.env_id, policy.act, episodes, phase_seed(seed, "episodes", k)
        )
    torch.set_num_threads(threads)
    return returns


def start_worker(matmul: str) -> None:
    """First call in an evaluation process: Ctrl-C is for the parent, products are as there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Why: a parent that is killed tells its workers nothing, and they would wait for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    set_cpu_matmul(matmul)


def record_episode(policy: Policy, env_id: str, path: Path) -> None:
    """Render an episode, at most 500 frames, to a GIF. Raises UserError if nothing can render."""
    from PIL import Image  # matplotlib brings it

    try:
        if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
            os.environ["MUJOCO_GL"] = "egl"  # no screen needed; mujoco has read it at import
            importlib.reload(mujoco.rendering.classic.gl_context)
        env = make_env(env_id, render_mode="rgb_array")
        frames, (obs, _), over = [], env.reset(seed=0), False
        low, high = env.action_space.low, env.action_space.high
        while not over and len(frames) < 500:
            frames.append(Image.fromarray(env.render()).resize((240, 240)))
            action = policy.act(obs[None])[0]
            obs, _, terminated, truncated, _ = env.step(low + (action + 1) / 2 * (high - low))
            over = terminated or truncated
        env.close()
    except UserError:
        raise
    except Exception as error:  # every OpenGL backend fails in its own way
        raise UserError(
            f"cannot render ({type(error).__name__}: {error}); install EGL, or OSMesa and set "
            "MUJOCO_GL=osmesa"
        ) from None
    film = dict(format="GIF", save_all=True, append_images=frames[1:], duration=33, loop=0)
    write_atomically(path, lambda file: frames[0].save(file, **film))
    print(path)


# --- training helpers ---


def phase_seed(seed: int, name: str, k: int = 0) -> int:
    """A seed for each network and phase, so that phases do not disturb one another."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name} {k}".encode()).digest()[:4], "little")


def seed_phase(seed: int, name: str, k: int = 0) -> None:
    """Reseed torch, CPU and CUDA, from (seed, name, k)."""
    torch.manual_seed(phase_seed(seed, name, k))


def adam(parameters, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
    """Fused Adam. Its state exists from the start, for checkpoints and CUDA graphs to find it."""
    parameters = list(parameters)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    capturable = first.device.type == "cuda"
    optimizer = torch.optim.Adam(parameters, lr, betas, fused=True, capturable=capturable)
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments
    return optimizer


def load_optimizer(optimizer: torch.optim.Adam, saved: dict) -> None:
    """Take over saved moments and step counts; learning rate and the like stay as they are."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(saved | {"param_groups": groups})


def apply_gradients(optimizer: torch.optim.Adam, parameters: list, grads: list) -> None:
    """One optimizer step along the given gradients."""
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()


def clip_gradients(grads: list[Tensor], max_norm: float) -> list[Tensor]:
    """Scale gradients [L, ...] so that each learner's norm over all of them is at most max_norm."""
    norm = torch.stack([g.square().flatten(1).sum(1) for g in grads]).sum(0).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    return [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in grads]


@torch.no_grad()
def polyak(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow += rate * (fast - slow), in place."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)


def capture(step: Callable[[], dict], agent: Learners, args: Args) -> Callable[[], dict]:
    """`step` recorded as a CUDA graph at its first call and replayed after; `step` itself on a CPU.

    Recording needs warm-up calls. What they change (weights, moments, buffers, random state) is
    put back, so a replayed run computes what plain calls would.
    """
    if agent.device.type != "cuda" or not args.cuda_graphs:
        return step
    graph, logs = torch.cuda.CUDAGraph(), {}

    def record() -> None:
        tensors = list(agent.state_dict().values())
        for optimizer in agent.optimizers.values():
            tensors += [t for state in optimizer.state.values() for t in state.values()]
        saved, rng = [t.clone() for t in tensors], torch.cuda.get_rng_state(agent.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch._foreach_copy_(tensors, saved)
        torch.cuda.set_rng_state(rng, agent.device)
        with torch.cuda.graph(graph):
            logs.update(step())

    def replay() -> dict:
        if not logs:
            record()
        graph.replay()
        return logs

    return replay


def set_cpu_matmul(matmul: str) -> None:
    """Let oneDNN ("oneDNN") or torch's default library ("default") compute fp32 products."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if matmul == "oneDNN" else "none"


def choose_cpu_matmul(args: Args) -> str:
    """oneDNN for fp32 products where it keeps fp32 accuracy. -> "oneDNN" or "default"

    The setting permits bf16. Processors without AMX compute in fp32 all the same, twice as fast as
    the default on AMD; those with AMX do not. So the results are compared with float64.
    """
    set_cpu_matmul("oneDNN" if args.cpu_fast_matmul else "default")
    if not args.cpu_fast_matmul:
        return "default"
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator) for s in ((2, 512, 400), (2, 400, 300)))
    error = 0.0
    for a, b in ((x, w), (x[0], w[0])):  # bmm and mm, forward and the two backward products
        c = a.double() @ b.double()
        for left, right in ((a, b), (c.float(), b.mT), (a.mT, c.float())):
            exact = left.double() @ right.double()
            error = max(error, ((left @ right - exact).abs().max() / exact.abs().max()).item())
    matmul = "oneDNN" if error < 5e-6 else "default"
    set_cpu_matmul(matmul)
    return matmul


# --- run folder: logs, checkpoints, curves ---


def write_atomically(path: Path, write: Callable) -> None:
    """write(file) into a temporary file, sync, rename: `path` is the old or the new, never half.

    Raises UserError if the disk is full or the folder is not writable; `path` is then untouched.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write {path} ({error}); what was there is unharmed") from None


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


@contextlib.contextmanager
def writing(path: Path):
    """A block that writes to a log. Raises UserError on a full disk and the like."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); the last checkpoint is kept") from None


@contextlib.contextmanager
def reading(path: Path):
    """A block that reads a file of torch.save's. Raises UserError if it is damaged or foreign."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch, pickle, zipfile and our own look-ups each have their own
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"{path} is damaged or does not fit ({reason})") from None


def load_args(run: str | Path) -> Args:
    """The arguments of a run folder. Raises UserError if it is none."""
    try:
        saved = json.loads((Path(run) / "args.json").read_text())
        return Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{run} is not a run folder of this script: {error}") from None


class Run:
    """The run's folder, and all that is written to it: logs, checkpoints, curves, the result."""

    saved = ("iteration", "progress", "curves", "seconds", "rollout_logs", "matmul")

    def __init__(self, args: Args, algo: str):
        self.args, self.algo, self.iteration, self.unsaved = args, algo, 0, 0
        self.progress: dict = {}  # of a model fit or MIW training that a checkpoint interrupts
        self.curves: list[dict] = []  # of every evaluation: iteration and returns [L][episodes]
        self.pending: list = []  # evaluations under way in workers
        self.rollout_logs: dict[str, Tensor] = {}  # of the last rollout, logged with the losses
        self.seconds = {"iterations": 0.0}  # by phase
        self.last_log, self.interrupted, self.workers, self.wandb = (0, 0.0), False, None, None
        if args.resume:
            self.dir = Path(args.resume)
            return
        name = f"{args.env_id}__{algo}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = Path(args.run_dir) / name.replace("/", "-")
        try:
            self.dir.mkdir(parents=True)
            shutil.copy(__file__, self.dir)
        except OSError as error:
            raise UserError(f"cannot make the run folder {self.dir} ({error})") from None
        write_json(self.dir / "args.json", dataclasses.asdict(args))

    def open(self, agent: Learners, matmul: str, dataset_sha256: str) -> None:
        """Load the checkpoint if the run is resumed; open the logs, cut back to it."""
        self.agent, self.matmul, self.dataset_sha256 = agent, matmul, dataset_sha256
        log_bytes = 0
        if self.args.resume:
            log_bytes = self.load_checkpoint()
            write_json(self.dir / "args.json", dataclasses.asdict(self.args) | {"resume": None})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what tensorboard's own imports say
            from torch.utils.tensorboard import SummaryWriter
        with writing(self.dir):
            self.log_file = open(self.dir / "log.jsonl", "ab")
            self.log_file.truncate(min(log_bytes, self.log_file.tell()))
            # TensorBoard drops what an interrupted run wrote after its checkpoint.
            purge = self.iteration + 1 if self.args.resume else None
            self.board = SummaryWriter(str(self.dir), purge_step=purge)
        if self.args.track:
            self.wandb = start_wandb(self.args, self.dir)
        if self.args.eval_workers:
            spawn = multiprocessing.get_context("spawn")
            self.workers = ProcessPoolExecutor(
                self.args.eval_workers, spawn, start_worker, (self.matmul,)
            )
        total = self.args.total_iterations
        self.bar = tqdm(total=total, initial=self.iteration, unit="it", mininterval=1.0)
        self.old_handler = signal.signal(signal.SIGINT, self.on_interrupt)
        self.clock = time.perf_counter()

    def on_interrupt(self, *_) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        # os.write: a signal may come in the midst of a print, which must not be entered twice.
        os.write(2, b"\nCtrl-C: saving at the next safe point (again: stop without saving)\n")

    def took(self, phase: str) -> None:
        """Book the time since the last call to `phase`."""
        if self.agent.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.clock
        self.clock = now

    def finite(self, phase: str, logs: dict[str, Tensor]) -> dict[str, list[float]]:
        """Read tensors [L] from the device. Raises UserError if one is not finite."""
        values = {k: v.tolist() for k, v in logs.items()}
        for key, row in values.items():
            if not np.isfinite(row).all():
                raise UserError(
                    f"{key} is not finite ({row}) in {phase} at iteration {self.iteration}; the "
                    f"last good checkpoint is kept in {self.dir}"
                )
        return values

    def log(self, phase: str, logs: dict[str, Tensor]) -> None:
        """Write tensors [L] to log.jsonl, TensorBoard, wandb. UserError: one is not finite."""
        values = self.finite(phase, logs)
        line = {"iteration": self.iteration, "phase": phase} | values
        with writing(self.dir):
            self.log_file.write((json.dumps(line) + "\n").encode())
            self.log_file.flush()
            for key, row in values.items():
                for learner, value in enumerate(row):
                    tag = key if len(row) == 1 else f"{key}/seed_{self.args.seed + learner}"
                    self.board.add_scalar(tag, value, self.iteration)
        if self.wandb:
            self.wandb.log({k: float(np.mean(v)) for k, v in values.items()}, step=self.iteration)

    def after_steps(self, phase: str, steps: int, logs: dict[str, Tensor]) -> None:
        """To be called at every safe point of a model fit or MIW training."""
        self.log(phase, logs)
        shown = ", ".join(f"{k.split('/')[1]} {v.mean():.3g}" for k, v in logs.items())
        self.bar.set_postfix_str(f"{phase}: {shown}")
        self.unsaved += steps
        if self.interrupted or self.unsaved >= self.args.checkpoint_every:
            self.save_checkpoint()

    def after_iteration(self, logs: dict[str, Tensor]) -> None:
        """Count an iteration; log, evaluate and save when it is time."""
        args = self.args
        self.iteration, self.unsaved, self.progress = self.iteration + 1, self.unsaved + 1, {}
        self.bar.update()
        last = self.iteration == args.total_iterations
        to_evaluate = self.iteration % args.eval_every == 0 or last
        to_log = to_evaluate or self.iteration % args.log_every == 0
        to_save = self.interrupted or last or self.unsaved >= args.checkpoint_every
        logs = logs | self.rollout_logs
        if to_save:
            self.finite("training", logs)
        if to_log:
            self.took("iterations")
            count, seconds = self.iteration - self.last_log[0], self.seconds["iterations"]
            rate = count / max(seconds - self.last_log[1], 1e-9)
            self.last_log = (self.iteration, seconds)
            self.log("training", logs | {"charts/SPS": torch.tensor([rate])})
        if to_evaluate:
            self.start_evaluation()
        if to_save:
            self.took("iterations")
            self.save_checkpoint()

    def policy(self, learner: int) -> Policy:
        with torch.random.fork_rng(devices=[]):  # its first weights must not disturb the training
            policy = Policy(self.args, *self.agent.columns[:2])
        policy.load_state_dict(policy_state(self.agent, learner))
        return policy

    def start_evaluation(self) -> None:
        """Evaluate all learners as they stand, here or in the workers."""
        k, args = self.iteration // self.args.eval_every, self.args
        jobs = [(self.policy(n), args, n, k, args.eval_episodes) for n in range(args.num_seeds)]
        if self.workers:
            futures = [self.workers.submit(evaluate, *job) for job in jobs]
            self.pending.append((self.iteration, futures))
        else:
            self.record(self.iteration, [evaluate(*job) for job in jobs])
        self.took("evaluation")
        self.collect_evaluations(wait=False)

    def collect_evaluations(self, wait: bool) -> None:
        while self.pending and (wait or all(f.done() for f in self.pending[0][1])):
            iteration, futures = self.pending.pop(0)
            try:
                returns = [f.result() for f in futures]
            except BrokenExecutor:
                raise UserError("an evaluation process died (out of memory?)") from None
            self.record(iteration, returns)

    def record(self, iteration: int, returns: list[np.ndarray]) -> None:
        """Keep, log and show one evaluation."""
        self.curves.append({"iteration": iteration, "returns": [r.tolist() for r in returns]})
        scores = [d4rl_score(self.args.env_id, r) for r in returns]
        logs = {
            "eval/iteration": [iteration],
            "eval/episodic_return": [r.mean() for r in returns],
            "eval/normalized_score_mean": [s.mean() for s in scores],
            "eval/normalized_score_std": [s.std() for s in scores],
        }
        self.log("evaluation", {k: torch.tensor(v, dtype=torch.float64) for k, v in logs.items()})
        shown = ", ".join(f"{s.mean():.1f}" for s in scores)
        self.bar.write(f"iteration {iteration}: score {shown}")
        self.bar.set_postfix_str(f"score {shown}")

    def scores(self) -> np.ndarray:
        """Mean score of every evaluation so far, [evaluations, L]."""
        return np.array(
            [[d4rl_score(self.args.env_id, r).mean() for r in c["returns"]] for c in self.curves]
        ).reshape(-1, self.args.num_seeds)

    def save_checkpoint(self) -> None:
        """Write checkpoint.pt, policy.pt and curves.png; after Ctrl-C, end here."""
        self.collect_evaluations(wait=True)
        agent = self.agent
        state = agent.state_dict()
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{name} is not finite at iteration {self.iteration}; the last good checkpoint "
                    f"is kept in {self.dir}"
                )
        state["buffer"] = agent.buffer[:, : agent.buffer_rows].clone()  # no rows still empty
        checkpoint = {
            **{k: getattr(self, k) for k in self.saved},
            "log_bytes": self.log_file.tell(), "rng": torch.get_rng_state(),
            "threads": torch.get_num_threads(), "agent": state,
            "dataset_sha256": self.dataset_sha256,
            "optimizers": {k: o.state_dict() for k, o in agent.optimizers.items()},
        }  # fmt: skip
        if agent.device.type == "cuda":
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state(agent.device)
        write_atomically(self.dir / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        learners = [policy_state(agent, learner) for learner in range(agent.learners)]
        obs_dim, action_dim = agent.columns[:2]
        policy = {"obs_dim": obs_dim, "action_dim": action_dim, "learners": learners}
        write_atomically(self.dir / "policy.pt", lambda file: torch.save(policy, file))
        plot_curves(self)
        self.unsaved = 0
        if self.interrupted:
            self.close()
            print(f"saved; to continue: python {Path(__file__).name} --resume {self.dir}")
            raise SystemExit(130)

    def load_checkpoint(self) -> int:
        """Put everything back as it was. -> length of the log then. Raises UserError."""
        path = self.dir / "checkpoint.pt"
        if not path.exists():
            raise UserError(f"{self.dir} holds no checkpoint yet: start again without --resume")
        agent = self.agent
        with reading(path):
            saved = torch.load(path, weights_only=True, map_location=agent.device)
            if saved["dataset_sha256"] != self.dataset_sha256:
                raise UserError(f"{self.dir} was trained on another dataset than it finds now")
            filled = saved["agent"]["buffer"]
            agent.buffer[:, : filled.shape[1]] = filled
            agent.load_state_dict(saved["agent"] | {"buffer": agent.buffer})
            for name, optimizer in agent.optimizers.items():
                load_optimizer(optimizer, saved["optimizers"][name])
            for key in self.saved:
                setattr(self, key, saved[key])
            set_cpu_matmul(self.matmul)
            torch.set_num_threads(saved["threads"])
            torch.set_rng_state(saved["rng"].cpu())
            if "cuda_rng" in saved and agent.device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"].cpu(), agent.device)
        self.last_log = (self.iteration, self.seconds["iterations"])
        return saved["log_bytes"]

    def finish(self, dataset: Dataset, **more) -> dict:
        """Score the final policies over more episodes; write result.json, print and return it."""
        args, learners = self.args, range(self.args.num_seeds)
        signal.signal(signal.SIGINT, self.old_handler)  # all is saved: Ctrl-C stops at once
        self.clock = time.perf_counter()
        returns = [evaluate(self.policy(n), args, n, -1, args.final_episodes) for n in learners]
        self.took("evaluation")
        final, scores = [d4rl_score(args.env_id, r) for r in returns], self.scores()
        result = {
            "algo": self.algo, "env_id": args.env_id, "normalized": has_reference(args.env_id),
            "dataset": dataset.source, "dataset_sha256": dataset.sha256,
            "dataset_notes": dataset.notes, "args": dataclasses.asdict(args) | {"resume": None},
            "seeds": [args.seed + n for n in learners], "total_steps": self.iteration,
            "last": scores[-1].tolist(), "mean_last_ten": scores[-10:].mean(0).tolist(),
            "final_mean": [s.mean() for s in final], "final_scores": [s.tolist() for s in final],
            "evaluations": [[c["iteration"], *s] for c, s in zip(self.curves, scores, strict=True)],
            "seconds": self.seconds,
            "steps_per_second": self.iteration / max(self.seconds["iterations"], 1e-9),
            "device": str(self.agent.device), "threads": torch.get_num_threads(),
            "cpu_matmul": self.matmul, "versions": versions(), "git": git_hash(), **more,
        }  # fmt: skip
        write_json(self.dir / "result.json", result)
        self.close()
        report_scores(args, final)
        ten = ", ".join(f"{s:.1f}" for s in result["mean_last_ten"])
        print(f"mean of the last ten evaluations: {ten}")
        print(f"{self.dir / 'result.json'}, {self.dir / 'curves.png'}")
        return result

    def close(self) -> None:
        """Close whatever is open; a second call does nothing."""
        self.bar.close()
        for file in (self.board, self.log_file):
            with contextlib.suppress(OSError):  # on a full disk
                file.close()
        if self.workers:
            self.workers.shutdown(cancel_futures=True)
        if self.wandb:
            self.wandb.finish()
        signal.signal(signal.SIGINT, self.old_handler)


def report_scores(args: Args, scores: list[np.ndarray]) -> None:
    """Print every learner's score with its spread over the episodes."""
    kind = "normalized score" if has_reference(args.env_id) else "return (no D4RL reference)"
    for learner, s in enumerate(scores):
        print(
            f"seed {args.seed + learner}: {kind} {s.mean():.1f}, standard deviation {s.std():.1f} "
            f"over {len(s)} episodes (standard error {s.std() / math.sqrt(len(s)):.1f})"
        )


def start_wandb(args: Args, run_dir: Path):
    """A Weights and Biases run."""
    import wandb

    place = {"project": args.wandb_project_name, "entity": args.wandb_entity}
    return wandb.init(**place, name=run_dir.name, config=dataclasses.asdict(args))


@contextlib.contextmanager
def picture(path: Path, title: str, xlabel: str, ylabel: str):
    """Axes to draw into; the PNG is written at the end of the block. Raises UserError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    yield axes
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)


def plot_curves(run: Run) -> None:
    """curves.png: the score of every learner, and their mean, against the iterations."""
    iterations, scores = [c["iteration"] for c in run.curves], run.scores()
    kind = "normalized score" if has_reference(run.args.env_id) else "return"
    title = f"{run.algo.upper()} on {run.args.env_id}"
    with picture(run.dir / "curves.png", title, "iteration", kind) as axes:
        for learner in range(scores.shape[1]):
            label = f"seed {run.args.seed + learner}"
            axes.plot(iterations, scores[:, learner], alpha=0.6, label=label)
        if scores.shape[1] > 1:
            axes.plot(iterations, scores.mean(1), color="black", linewidth=2, label="mean")
        axes.grid(alpha=0.3)
        axes.legend()


def versions() -> dict[str, str]:
    modules = {"torch": torch, "numpy": np, "gymnasium": gymnasium, "mujoco": mujoco}
    return {"python": platform.python_version()} | {k: m.__version__ for k, m in modules.items()}


def git_hash() -> str | None:
    """Commit of the repository this script lies in, if any."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ==================================================================================================
# 7. Training
# ==================================================================================================


def data_rows(dataset: Dataset, device: torch.device) -> Tensor:
    """The dataset as rows [N, C] of Batch's fields."""
    columns = [dataset.obs, dataset.action, dataset.reward[:, None], dataset.next_obs]
    return torch.cat([*columns, dataset.terminated.float()[:, None]], -1).to(device)


def rollout_end(dataset: Dataset, args: Args, device: torch.device) -> RolloutEnd:
    """The task's own rule and the range of its data."""
    extremes = torch.maximum(dataset.obs.abs(), dataset.next_obs.abs()).amax(0)
    known, _ = known_termination(args.env_id)
    return RolloutEnd(known, (2 * extremes).clamp(min=100).to(device))


def save_model(agent: Learners, loss: Tensor, dataset: Dataset, run: Run) -> None:
    """Save the first model and its hold-out losses [L, M], for --dynamics-from."""
    saved = {
        "model": agent.model.state_dict(), "holdout_loss": loss,
        "optimizer": agent.optimizers["model"].state_dict(), "dataset_sha256": dataset.sha256,
        "seed": run.args.seed, "holdout_size": run.args.holdout_size,
    }  # fmt: skip
    write_atomically(run.dir / "model.pt", lambda file: torch.save(saved, file))


def load_model(agent: Learners, dataset: Dataset, args: Args) -> None:
    """The first model of another run, with its optimizer. Raises UserError if it does not fit.

    Of a run of more learners the first ones; a run of one learner gives all the same.
    """
    path = Path(args.dynamics_from) / "model.pt"
    if not path.exists():
        raise UserError(f"--dynamics-from: {path} does not exist; did that run fit its model?")
    with reading(path):
        saved = torch.load(path, weights_only=True, map_location=agent.device)
        if saved["dataset_sha256"] != dataset.sha256:
            raise UserError(f"--dynamics-from {path}: that model was fitted to another dataset")
        need, have = agent.model.lead[0], len(saved["holdout_loss"])
        if 1 < have < need:
            raise UserError(f"--dynamics-from {path} holds {have} models, and {need} are asked for")
        learners = torch.arange(need, device=agent.device).clamp(max=have - 1)
        parameters = {name for name, _ in agent.model.named_parameters()}
        own = {k: v[learners] if k in parameters else v for k, v in saved["model"].items()}
        agent.model.load_state_dict(own)
        for state in saved["optimizer"]["state"].values():
            state |= {k: t[learners] for k, t in state.items() if t.dim()}
        load_optimizer(agent.optimizers["model"], saved["optimizer"])
        choose_elites(agent, saved["holdout_loss"][learners], args)


def announce(dataset: Dataset, args: Args, device: torch.device, matmul: str) -> None:
    """Say what is trained on what, before the hours begin."""
    count, mean = dataset.episodes["count"], dataset.episodes["mean"]
    score = f"return {mean:.1f}, score {d4rl_score(args.env_id, mean):.1f}"
    print(f"dataset: {dataset.source}: {len(dataset.obs)} transitions, {count} whole episodes, "
          f"on average {score}")  # fmt: skip
    for note in dataset.notes:
        print(f"note: {note}")
    if args.env_id not in PAPER:
        print(f"note: {args.env_id} is not a task of the paper: defaults and your flags apply")
    if not known_termination(args.env_id)[1]:
        print("note: no termination rule is known: rollouts end only far outside the data")
    print(f"device: {device}, {torch.get_num_threads()} CPU threads, products by {matmul} library")


def train(args: Args) -> dict:
    """Train args.num_seeds learners; return what result.json holds. Raises UserError."""
    check_args(args)
    args = dataclasses.replace(args, num_seeds=len(settings(args)))
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    dataset = load_dataset(args.env_id, args.dataset_path, make_env(args.env_id))
    if args.batch_size > len(dataset.obs):
        raise UserError(f"--batch-size {args.batch_size} exceeds the {len(dataset.obs)} data rows")
    matmul = choose_cpu_matmul(args)
    announce(dataset, args, device, matmul)
    data, end = data_rows(dataset, device), rollout_end(dataset, args, device)
    agent = COMBO(args, dataset.obs.shape[1], dataset.action.shape[1], device)
    if args.dynamics_from and not args.resume:
        load_model(agent, dataset, args)
    run = Run(args, "combo")
    run.open(agent, matmul, dataset.sha256)

    step = capture(functools.partial(combo_step, agent, data, args), agent, args)
    refresh = capture(functools.partial(imagine, agent, data, end, args), agent, args)

    with contextlib.closing(run):
        while run.iteration < args.total_iterations:  # Alg. 1
            i = run.iteration
            if i == 0 and not args.dynamics_from:
                error = fit_model(agent, dataset, data, args, run)
                save_model(agent, error, dataset, run)
                run.took("model")
            if i % args.rollout_every == 0:
                run.took("iterations")
                seed_phase(args.seed, "rollout", i)
                run.rollout_logs = refresh()  # D_model
                seed_phase(args.seed, "iterations", i)
                run.took("rollout")
            run.after_iteration(step())

        choice = choose_setting(agent, data, args, run) if args.select else {}
        result = run.finish(dataset, **choice)
    if args.capture_video:
        record_episode(
            load_policy(run.dir, choice.get("chosen", 0)), args.env_id, run.dir / "episode.gif"
        )
    return result


@torch.no_grad()
def regularizer(agent: COMBO, data: Tensor, args: Args, rows: int = 10_000) -> Tensor:
    """E_rho[Q] - E_D[Q] of the policies as they stand, mean of both critics. -> [L]

    rho: the states that the critics' loss takes, with actions of the policy. The number of rows is
    ours.
    """
    in_data, in_rho = rows_of_rho(agent, args)
    total = torch.zeros(agent.learners, device=agent.device)
    batches = max(1, rows // args.batch_size)
    for _ in range(batches):
        batch = agent.sample(data, args.batch_size)
        q_rho = agent.critic(batch.obs, agent.actor.sample(batch.obs)[0])
        q_data = agent.critic(batch.obs, batch.action)
        total += (expectation(q_rho, in_rho) - expectation(q_data, in_data)).mean(-1)
    return total / batches


def choose_setting(agent: COMBO, data: Tensor, args: Args, run: Run) -> dict:
    """Section 3's rule: the lowest E_rho[Q] - E_D[Q], without the environment. Prints a table."""
    seed_phase(args.seed, "selection")
    values = regularizer(agent, data, args).tolist()
    best = min(range(len(values)), key=values.__getitem__)
    table = [
        {"beta": beta, "real_fraction": f, "regularizer": v}
        for (beta, f), v in zip(settings(args), values, strict=True)
    ]
    print("setting   beta      f   E_rho[Q] - E_D[Q]")
    for n, row in enumerate(table):
        print(f"{n:7d} {row['beta']:6g} {row['real_fraction']:6g} {row['regularizer']:19.3f}"
              f"{'   <- chosen' if n == best else ''}")  # fmt: skip
    print("scores below were not looked at; the seeds name the settings in this order")
    return {"selection": table, "chosen": best}


@torch.no_grad()
def probe(args: Args) -> dict:
    """After Figure 2: largest std of the members against the true one-step error, held-out rows.

    Ours: the error is the distance of the elites' mean from (reward, next state), in raw units.
    Writes uncertainty.json and uncertainty.png to the run folder. Raises UserError.
    """
    check_args(args)
    saved = load_args(args.probe_uncertainty)
    dataset = load_dataset(saved.env_id, args.dataset_path or saved.dataset_path,
                           make_env(saved.env_id))  # fmt: skip
    device = torch.device("cpu")
    source = saved.dynamics_from or args.probe_uncertainty
    if not (Path(source) / "model.pt").exists():
        raise UserError(f"{source} holds no model.pt: was its model fitted?")
    saved = dataclasses.replace(
        saved, num_seeds=1, select=False, rollout_starts=1, dynamics_from=source
    )
    agent = COMBO(saved, dataset.obs.shape[1], dataset.action.shape[1], device)
    load_model(agent, dataset, saved)
    # The split of the run that fitted the model.
    inputs, targets = model_rows(agent, dataset, data_rows(dataset, device))
    with reading(Path(source) / "model.pt"):
        fitted = torch.load(Path(source) / "model.pt", weights_only=True)
        held, _ = split_rows(len(inputs), fitted["seed"], fitted["holdout_size"], device)
    obs, action = inputs[held].split(agent.columns[:2], -1)
    _, std = agent.model.predict(obs[None], action[None])
    mean, _ = agent.elites.predict(obs[None], action[None])
    uncertainty, error = largest_std(std)[0], (mean[0].mean(0) - targets[held]).norm(dim=-1)
    slope, intercept = np.polyfit(uncertainty.double().numpy(), error.double().numpy(), 1)
    residual = error - (slope * uncertainty + intercept)
    r2 = 1 - (residual.square().sum() / (error - error.mean()).square().sum()).item()
    result = {"rows": len(held), "slope": slope, "intercept": intercept, "r2": r2,
              "uncertainty": uncertainty.tolist(), "error": error.tolist()}  # fmt: skip
    folder = Path(args.probe_uncertainty)
    write_json(folder / "uncertainty.json", result)
    plot_uncertainty(folder / "uncertainty.png", result, saved.env_id)
    print(f"{len(held)} held-out rows: error = {slope:.3g} * std + {intercept:.3g}, R2 = {r2:.3f}")
    print(f"{folder / 'uncertainty.json'}, {folder / 'uncertainty.png'}")
    return result


def plot_uncertainty(path: Path, result: dict, env_id: str) -> None:
    """The scatter of `probe` with its line."""
    x = np.array(result["uncertainty"])
    labels = "largest predicted standard deviation of a member", "true one-step error"
    with picture(path, env_id, *labels) as axes:
        axes.scatter(x, result["error"], s=6, alpha=0.4, linewidths=0)
        line = result["slope"] * np.sort(x) + result["intercept"]
        axes.plot(np.sort(x), line, color="black", label=f"least squares, R2 = {result['r2']:.2f}")
        axes.legend()


def evaluate_run(args: Args) -> None:
    """--evaluate: score the saved policies of a run; --capture-video also renders an episode."""
    check_args(args)
    saved = load_args(args.evaluate)
    policies = [load_policy(args.evaluate, learner) for learner in range(saved.num_seeds)]
    returns = [evaluate(p, saved, n, -2, args.final_episodes) for n, p in enumerate(policies)]
    report_scores(saved, [d4rl_score(saved.env_id, r) for r in returns])
    if args.capture_video:
        record_episode(policies[0], saved.env_id, Path(args.evaluate) / "episode.gif")


def resumed_args(argv: list[str]) -> Args:
    """The arguments of the run to be resumed. Raises UserError if flags ask for others.

    Only --total-iterations may grow: where a run will end matters for its last evaluation alone.
    """
    args, default = parse_args(argv), parse_args([])
    check_args(dataclasses.replace(args, total_iterations=default.total_iterations))
    saved = load_args(args.resume)
    own = {"resume": args.resume}
    longer = any(word.replace("_", "-").startswith("--total-iterations") for word in argv)
    if longer and args.total_iterations > saved.total_iterations:
        own["total_iterations"] = args.total_iterations
    for name, value in vars(args).items():
        if name not in own and value not in (getattr(saved, name), getattr(default, name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--resume takes all flags from the run, where {flag} is not {value}")
    return dataclasses.replace(saved, **own)


def main() -> None:
    """The command line. A UserError is one sentence on stderr and exit status 2."""
    try:
        args = parse_args(sys.argv[1:])
        if args.probe_uncertainty is not None:
            probe(args)
        elif args.evaluate is not None:
            evaluate_run(args)
        elif args.resume is not None:
            train(resumed_args(sys.argv[1:]))
        else:
            train(args)
    except UserError as error:
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped without saving; --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
