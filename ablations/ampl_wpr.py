# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "d4rl==1.1", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "h5py==3.16.0",
#   "matplotlib==3.11.2", "mujoco==4.0.0", "numpy==2.4.6", "pillow", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""AMPL with the weighted policy regularizer (WPR), in one file.

Base: ampl.py
New here: the GAN keeps omega: it compares only the next pairs (s', a') of stored rows, each
    weighted by omega of its row.
Changes: `weighted_generator_loss`, `weighted_discriminator_loss`, `imagined_next_pairs`,
    `stored_next_pairs`, `update_gan`, `iterate`, `consecutive_rows`, `train` (section 3, 4, 7)

True pairs are the stored (s', a'), fake ones the model's s' after the stored (s, a) with an action
of the policy. The weights are those of the model's last fit, one before the first.

Run: `python ablations/ampl_wpr.py --env-id pen-human-v1`.
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
except AttributeError:  # all that PyOpenGL says when MUJOCO_GL names a library that is missing
    gl = os.environ.get("MUJOCO_GL")
    raise SystemExit(f"MUJOCO_GL={gl} cannot be loaded here: unset it or name another") from None

# ==================================================================================================
# 1. Arguments
# ==================================================================================================


@dataclass
class Args:
    # --- experiment ---
    env_id: str = "maze2d-umaze-v1"
    """task: a row of PAPER, another D4RL name, or a gymnasium id together with --dataset-path"""
    seed: int = 0
    """seed of the run; learner i is reported as seed + i, but is not the run of that seed"""
    num_seeds: int = 1
    """independent learners trained side by side in this process (the paper reports 5)"""
    total_iterations: int = 1_000_000
    """iterations of the main loop (authors' code: 1000 epochs of 1000)"""
    run_dir: str = "runs"
    """folder that receives the run's own folder"""
    resume: str | None = None
    """continue this run folder where its checkpoint stands, with its flags; only a larger
    --total-iterations is taken"""
    evaluate: str | None = None
    """only score the policy saved in this run folder, over --final-episodes episodes"""
    dynamics_from: str | None = None
    """take the first, unweighted model from this run folder instead of fitting it"""

    # --- tracking and saving ---
    track: bool = False
    """also log to Weights and Biases (needs `pip install wandb`)"""
    wandb_project_name: str = "ampl"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""
    log_every: int = 1000
    """iterations between two lines of log.jsonl and of TensorBoard"""
    checkpoint_every: int = 10_000
    """iterations, model steps or omega steps between two checkpoints"""
    capture_video: bool = False
    """render one episode of the policy to episode.gif (at the end, or with --evaluate)"""

    # --- data ---
    dataset_path: str | None = None
    """HDF5 file in D4RL's format; without it the D4RL folder is searched, then D4RL's server"""
    initial_states: Literal["simulator", "dataset"] = "simulator"
    """samples of mu0: simulator resets (authors' code) or the episodes' first states (no access)"""
    num_initial_states: int = 100_000
    """how many resets (authors' code)"""

    # --- world model ---
    ensemble_size: int = 7
    """members (authors' code)"""
    num_elites: int = 5
    """members with the lowest hold-out loss that make predictions (authors' code)"""
    model_hidden: int = 200
    """width of the four hidden layers (authors' code)"""
    model_lr: float = 1e-3
    """Adam (authors' launch script; their main program's default, 3e-4, is never used)"""
    model_batch_size: int = 128
    """rows per member and step (authors' code)"""
    model_weight_decay: tuple[float, float, float, float, float] = (
        2.5e-5,
        5e-5,
        7.5e-5,
        7.5e-5,
        1e-4,
    )
    """L2 of the four hidden layers and the heads, added to the gradient (authors' code)"""
    model_epoch_steps: int = 1000
    """steps between two looks at the hold-out loss (authors' code)"""
    model_patience: int = 10
    """epochs in a row in which no member improved, before a fit stops (authors' code)"""
    model_max_epochs: int = 10_000
    """at most this many epochs per fit (authors' code: 1e7 steps)"""
    holdout_size: int = 8092
    """rows held out, at most a fifth of the data (authors' code)"""
    model_retrain_every: int = 100_000
    """iterations between two weighted re-trainings of the model (paper)"""

    # --- rollouts ---
    horizon: int = 3
    """model steps per rollout (authors' launch script, per task)"""
    rollout_every: int = 250
    """iterations between two refreshes of the buffer (authors' code)"""
    rollout_rows: int = 32_000
    """model transitions per refresh: 128 per iteration (authors' code)"""
    buffer_size: int = 640_000
    """rows of model data, first in first out (authors' code: 5000 iterations' worth)"""
    real_fraction: float = 0.5
    """share f of real rows in a batch: 1 at first, falling down to this (paper)"""
    real_decay_every: int = 5000
    """it falls by 0.1 every this many iterations after the warm start (authors' code)"""
    shared_rollout_action: bool = False
    """all 2048 rollouts of a chunk take the first one's action (authors' code, by mistake)"""

    # --- critic ---
    gamma: float = 0.99
    """discount (authors' code)"""
    tau: float = 0.005
    """Polyak rate of the target critic and target policy (authors' code)"""
    batch_size: int = 512
    """rows per iteration (authors' code)"""
    critic_lr: float = 3e-4
    """Adam (authors' code)"""
    critic_grad_norm: float = 0.1
    """gradient norm of both critics together is clipped to this (authors' code)"""
    q_min_weight: float = 0.75
    """weight c of the smaller target in Eq. (12) (paper)"""
    q_bound: float = 2000.0
    """bootstrap values beyond this count as zero (authors' code)"""
    critic_huber_delta: float = 500.0
    """Huber threshold; errors stay far below it, so the loss is half a square (authors' code)"""

    # --- policy and discriminator ---
    hidden: tuple[int, int] = (400, 300)
    """hidden layers of policy, critics, discriminator and omega (authors' code)"""
    noise_dim: int = 50
    """inputs of the implicit policy that carry noise (authors' launch script, per task)"""
    noise_std: float = 1.0
    """their standard deviation; clamped to +-3 after scaling (authors' launch script, per task)"""
    actor_lr: float = 2e-4
    """Adam of the policy (authors' code)"""
    discriminator_lr: float = 2e-4
    """Adam of the discriminator (authors' code)"""
    gan_beta1: float = 0.4
    """first Adam coefficient of policy and discriminator (authors' code)"""
    policy_frequency: int = 2
    """the policy moves on every n-th iteration (authors' code)"""
    warmup_iterations: int = 40_000
    """iterations in which the policy only imitates through the GAN (authors' code)"""
    q_coef: float = 10.0
    """lambda': weight of Q, divided by the running mean of |Q|, in Eq. (17) (paper)"""
    label_smoothing: float = 0.8
    """labels of true pairs are drawn from [this, 1) (authors' code)"""

    # --- marginal importance weights (MIW) ---
    miw_steps: int = 100_000
    """steps of each training of omega, the network of weights (authors' code)"""
    miw_lr: float = 1e-6
    """Adam (authors' code)"""
    miw_batch_size: int = 1024
    """data rows per step (authors' code)"""
    miw_initial_batch_size: int = 2048
    """initial states per step (authors' code)"""
    miw_alpha: float = 0.2
    """omega = softplus(.) ** alpha (authors' launch script: 0.5 locomotion, 0.2 elsewhere)"""
    miw_tau: float = 0.01
    """Polyak rate of the slow copies of omega and of Q (authors' code)"""
    miw_mean_bound: float = 10.0
    """the mean of omega is kept below this (authors' code)"""
    miw_grad_norm: float = 1.0
    """gradient norm after the projection (authors' code)"""
    miw_refresh: int = 2000
    """steps between two evaluations of Q on fresh actions; 1 evaluates in every step (ours)"""

    # --- evaluation ---
    eval_every: int = 1000
    """iterations between two evaluations (authors' code)"""
    eval_episodes: int = 10
    """episodes per evaluation (authors' code)"""
    final_episodes: int = 100
    """episodes after training (ours: pen's returns have a standard deviation of 1800)"""
    eval_candidates: int = 10
    """actions drawn per state; the one with the largest min Q is taken (authors' code)"""
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


# Per task: launch script of the authors' code. Datasets: v2 locomotion, v1 Maze2D and Adroit.
# Code: noise_dim 0 stands for min(10, S // 2): 2 on maze2d-umaze, 10 on door. Here: written out.
PAPER: dict[str, dict] = {
    # fmt: off
    "halfcheetah-medium-expert-v2": dict(horizon=5, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "hopper-medium-expert-v2": dict(horizon=3, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "walker2d-medium-expert-v2": dict(horizon=5, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "halfcheetah-medium-v2": dict(horizon=1, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "hopper-medium-v2": dict(horizon=1, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "walker2d-medium-v2": dict(horizon=3, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "halfcheetah-medium-replay-v2": dict(horizon=3, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "hopper-medium-replay-v2": dict(horizon=1, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "walker2d-medium-replay-v2": dict(horizon=5, noise_dim=50, miw_alpha=0.5, noise_std=1.0),
    "maze2d-umaze-v1": dict(horizon=3, noise_dim=2, miw_alpha=0.2, noise_std=1.0),
    "maze2d-medium-v1": dict(horizon=3, noise_dim=50, miw_alpha=0.2, noise_std=1.0),
    "maze2d-large-v1": dict(horizon=1, noise_dim=50, miw_alpha=0.2, noise_std=1.0),
    "pen-cloned-v1": dict(horizon=5, noise_dim=1, miw_alpha=0.2, noise_std=1e-3),
    "pen-expert-v1": dict(horizon=1, noise_dim=50, miw_alpha=0.2, noise_std=1.0),
    "door-expert-v1": dict(horizon=1, noise_dim=10, miw_alpha=0.2, noise_std=1.0),
    "pen-human-v1": dict(horizon=1, noise_dim=1, miw_alpha=0.2, noise_std=1e-3),
    # fmt: on
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
    may_be_zero = {"warmup_iterations", "threads", "eval_workers", "model_weight_decay", "gamma"}
    may_be_zero |= {"gan_beta1", "q_min_weight", "q_coef", "noise_std", "label_smoothing"}
    at_most_one = {"gamma", "gan_beta1", "q_min_weight", "label_smoothing", "tau", "miw_tau"}
    at_most_one |= {"real_fraction"}
    check_numbers(args, may_be_zero, at_most_one)
    clashes = {
        "--resume continues a run and --evaluate scores one: give one of them": (
            args.resume is not None and args.evaluate is not None
        ),
        "--gamma and --gan-beta1 must be below 1": max(args.gamma, args.gan_beta1) == 1,
        f"the warm start ({args.warmup_iterations} iterations) is longer than the run "
        f"({args.total_iterations}): lower --warmup-iterations": (
            args.warmup_iterations > args.total_iterations
        ),
        "--num-elites is larger than --ensemble-size": args.num_elites > args.ensemble_size,
        "--buffer-size must hold at least one refresh of --rollout-rows": (
            args.buffer_size < args.rollout_rows
        ),
        "--track needs Weights and Biases: pip install wandb": (
            args.track and importlib.util.find_spec("wandb") is None
        ),
    }
    refuse_clashes(clashes)


# ==================================================================================================
# 2. Networks
# ==================================================================================================
# Shapes: L learners, M members of the ensemble, E elites, B rows of a batch, N rows of the data,
# N0 initial states, S observation, A action, C columns of a row (see Batch).


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


class MLP(nn.Module):
    """Two hidden layers with leaky ReLU (slope 0.01), linear output. Inputs are not normalised.

    forward: [*lead, B, in] -> [*lead, B, out].
    """

    def __init__(self, lead: tuple[int, ...], n_in: int, hidden: tuple[int, int], n_out: int):
        super().__init__()
        self.layer1 = Linear(lead, n_in, hidden[0])
        self.layer2 = Linear(lead, hidden[0], hidden[1])
        self.out = Linear(lead, hidden[1], n_out)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape[:-1], x.flatten(0, -3)
        x = F.leaky_relu(self.layer1(x), inplace=True)
        x = F.leaky_relu(self.layer2(x), inplace=True)
        return self.out(x).view(*shape, -1)


class ImplicitPolicy(nn.Module):
    """a = tanh(net(s, z)) with noise z ~ N(0, noise_std^2) clamped to +-3: any distribution of a.

    forward: obs [L, B, S] -> a sample of the raw (pre-tanh) action [L, B, A].
    """

    def __init__(self, learners: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.noise_dim, self.noise_std = args.noise_dim, args.noise_std
        self.net = MLP((learners,), obs_dim + args.noise_dim, args.hidden, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        # Paper: z ~ p_z. Code: N(0, noise_std^2), clamped to +-3 after scaling. Here: code.
        noise = torch.randn(*obs.shape[:-1], self.noise_dim, device=obs.device)
        noise = (self.noise_std * noise).clamp(-3, 3)
        return self.net(torch.cat([obs, noise], -1))


class TwinCritic(nn.Module):
    """Q_1 and Q_2. forward: obs [L, B, S], action [L, B, A] -> [L, 2, B]."""

    def __init__(self, learners: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = MLP((learners, 2), obs_dim + action_dim, args.hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1).unsqueeze(1)  # [L, 1, B, S + A]
        return self.net(x.expand(-1, 2, -1, -1)).squeeze(-1)

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q_1 alone, [L, B]: all that MIW training needs, at half the cost."""
        x = torch.cat([obs, action], -1)
        for layer in (self.net.layer1, self.net.layer2):
            x = F.leaky_relu(torch.baddbmm(layer.bias[:, 0], x, layer.weight[:, 0]))
        return torch.baddbmm(self.net.out.bias[:, 0], x, self.net.out.weight[:, 0]).squeeze(-1)


class Discriminator(nn.Module):
    """Logit of "this (s, raw action) pair is from the data". forward -> [L, B]."""

    def __init__(self, learners: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = MLP((learners,), obs_dim + action_dim, args.hidden, 1)

    def forward(self, obs: Tensor, raw_action: Tensor) -> Tensor:
        # Paper: input a. Code: the raw action, data actions through atanh. Here: code.
        return self.net(torch.cat([obs, raw_action], -1)).squeeze(-1)


class ImportanceWeight(nn.Module):
    """omega(s, a) = softplus(net(s, a)) ** alpha, not yet normalised. forward -> [L, B] > 0."""

    def __init__(self, learners: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha = args.miw_alpha
        self.net = MLP((learners,), obs_dim + action_dim, args.hidden, 1)
        nn.init.uniform_(self.net.out.weight, -3e-3, 3e-3)
        nn.init.zeros_(self.net.out.bias)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = self.net(torch.cat([obs, action], -1)).squeeze(-1)
        # Paper: unspecified. Code: softplus to the power alpha. Here: code.
        return (F.softplus(x - 1e-8) + 1e-8) ** self.alpha


class DynamicsEnsemble(nn.Module):
    """M Gaussian models of (reward, next_obs - obs), in units of the data's mean and deviation.

    forward: normalised inputs [L, M, B, S + A] -> mean, log_std [L, M, B, 1 + S].
    """

    def __init__(self, learners: int, members: int, obs_dim: int, action_dim: int, width: int):
        super().__init__()
        sizes = [obs_dim + action_dim] + 4 * [width]
        self.lead = lead = (learners, members)
        self.trunk = nn.ModuleList(Linear(lead, i, o) for i, o in itertools.pairwise(sizes))
        self.heads = Linear(lead, width, 2 * (1 + obs_dim))  # mean and log_std side by side
        for layer in [*self.trunk, self.heads]:
            # Normal, values beyond 2 replaced by their remainder: the authors' truncated normal.
            std = 1 / (2 * math.sqrt(layer.weight.shape[-2]))
            layer.weight.data.normal_().fmod_(2).mul_(std)
            nn.init.zeros_(layer.bias)
        # Soft bounds of log_std, learned, shared by the members of a learner.
        self.max_log_std = nn.Parameter(torch.full((learners, 1, 1, 1 + obs_dim), 0.25))
        self.min_log_std = nn.Parameter(torch.full((learners, 1, 1, 1 + obs_dim), -5.0))
        self.register_buffer("input_mean", torch.zeros(obs_dim + action_dim))
        self.register_buffer("input_std", torch.ones(obs_dim + action_dim))
        self.register_buffer("target_mean", torch.zeros(1 + obs_dim))
        self.register_buffer("target_std", torch.ones(1 + obs_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape, x = x.shape[:-1], x.flatten(0, -3)
        for layer in self.trunk:
            x = F.silu(layer(x), inplace=not torch.is_grad_enabled())  # backward needs layer(x)
        mean, log_std = self.heads(x).view(*shape, -1).chunk(2, -1)
        log_std = self.max_log_std - F.softplus(self.max_log_std - log_std)
        log_std = self.min_log_std + F.softplus(log_std - self.min_log_std)
        return mean, log_std

    def bounds(self) -> list[nn.Parameter]:
        return [self.max_log_std, self.min_log_std]

    def member_parameters(self) -> list[nn.Parameter]:
        """All parameters with a member axis, [L, M, ...]: everything but the two bounds."""
        return [p for layer in [*self.trunk, self.heads] for p in (layer.weight, layer.bias)]

    @torch.no_grad()
    def normalise_by(self, inputs: Tensor, targets: Tensor) -> None:
        """Set the units from data rows [N, S + A] and [N, 1 + S] (unbiased deviation)."""
        for name, values in (("input", inputs.double()), ("target", targets.double())):
            std, mean = torch.std_mean(values, 0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(std.clamp(min=1e-12))

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
        y = mean + log_std.exp() * torch.randn_like(mean)
        y = y.transpose(1, 2).reshape(learners, padded, -1)
        y = y.index_select(1, (torch.arange(rows, device=obs.device) - offset) % padded)
        # NaN becomes 0, as in the authors' code. The clamp is ours: predictions far outside the
        # data, which the termination rule ends, must not overflow the other networks.
        y = (y * self.target_std + self.target_mean).nan_to_num(nan=0.0).clamp(-1e6, 1e6)
        return y[..., 0], obs + y[..., 1:]


# ==================================================================================================
# 3. The method: one function per equation
# ==================================================================================================
# Losses average over the batch and keep the learners apart: they return [L], the caller sums.


def conservative_target(
    reward: Tensor, terminated: Tensor, q_next: Tensor, gamma: float, c: float, bound: float
) -> Tensor:
    """r + gamma (c min_j Q'_j + (1 - c) max_j Q'_j); q_next [L, 2, B], the rest [L, B]."""
    q = c * q_next.amin(1) + (1 - c) * q_next.amax(1)
    # Paper: all of q. Code: none at terminals, none where |q| >= 2000. Here: code.
    q = torch.where((terminated > 0) | (q.abs() >= bound), 0.0, q)
    return reward + gamma * q  # Eq. (12)


def critic_loss(q: Tensor, target: Tensor, delta: float) -> Tensor:
    """Huber regression of both critics: q [L, 2, B] on target [L, B]."""
    # Paper: Huber. Code: Huber with threshold 500, in effect half the square. Here: code.
    target = target.unsqueeze(1).expand_as(q)
    return F.huber_loss(q, target, reduction="none", delta=delta).mean(-1).sum(-1)  # Eq. (13)


def masked_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over the rows with keep = 1; [L, B] -> [L]. The same as dropping the other rows."""
    return (values * keep).sum(-1) / keep.sum(-1).clamp(min=1)


def weighted_generator_loss(logit_fake: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """How far the policy's pairs [L, B] are from passing as data; softplus(-logit) is -log D."""
    # Paper: mean log(1 - D). Code: -log D, which does not saturate. Here: code.
    return masked_mean(weight * F.softplus(-logit_fake), keep)  # Eq. (15)


def weighted_discriminator_loss(
    logit_true: Tensor, logit_fake: Tensor, weight: Tensor, keep: Tensor, label: Tensor
) -> Tensor:
    """Cross-entropy of telling true from fake pairs; label [L, B] of the true rows."""
    # Paper: labels 1, no factor. Code: labels U[0.8, 1) and half the sum. Here: code.
    true_part = F.softplus(logit_true) - label * logit_true
    return 0.5 * masked_mean(weight * (true_part + F.softplus(logit_fake)), keep)  # Eq. (16)


def policy_loss(q_min: Tensor, q_avg: Tensor, gan_loss: Tensor, q_coef: float) -> Tensor:
    """-lambda mean min_j Q_j + L_g with lambda = lambda' / Q_avg; q_min [L, B], the rest [L]."""
    return -(q_coef / q_avg) * q_min.mean(-1) + gan_loss  # Eq. (17)


def model_loss(mean: Tensor, log_std: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted Gaussian negative log-likelihood, up to constants and a factor 2 / (1 + S).

    mean, log_std, target: [L, M, B, 1 + S], reward included; weight: [L, M, B] -> [L, M]
    """
    nll = (mean - target).square() * torch.exp(-2 * log_std) + 2 * log_std
    return (weight * nll.mean(-1)).mean(-1)  # Eq. (6), and at weight one Eq. (4)


def miw_moments(
    omega: Tensor, omega_slow: Tensor, q: Tensor, q_next: Tensor, q_initial: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Both sides of the flow equation against Q, [L] each; rows [L, B], initial states [L, B0].

    q_next is zero at terminals: nothing flows on from there.
    """
    # Paper: Q of pi in the model on both sides. Code: the critic's Q_1 on the left, a slow copy of
    # it on the right, slow omega there too. Here: code.
    left = (omega * q).mean(-1)  # Eq. (10)
    right = gamma * (omega_slow * q_next).mean(-1)
    return left, right + (1 - gamma) * q_initial.mean(-1)  # Eq. (10)


def miw_loss(left: Tensor, right: Tensor) -> Tensor:
    """Distance of the two sides, [L]."""
    # Paper: the square. Code: Huber with threshold 1. Here: code.
    return F.huber_loss(left, right, reduction="none", delta=1.0)  # Eq. (11)


def project_gradient(
    loss_grads: list[Tensor], mean_grads: list[Tensor], mean_omega: Tensor, bound: float
) -> list[Tensor]:
    """Bend the gradient so that the mean of omega stays below its bound, per learner and parameter.

    g + l c with l = max(0, (phi - <g, c>) / |c|^2), where c is the gradient of mean omega [L] and
    phi = min(mean omega - bound, |c|^2): above the bound, just enough of c that a step lowers it.
    """
    # Paper: no constraint. Code: this one (dynamic barrier gradient descent). Here: code.
    projected = []
    for g, c in zip(loss_grads, mean_grads, strict=True):
        norm2 = c.square().flatten(1).sum(1)
        phi = torch.minimum(mean_omega - bound, norm2)
        factor = ((phi - (g * c).flatten(1).sum(1)) / (norm2 + 1e-8)).clamp(min=0)
        projected.append(g + factor.view(-1, *[1] * (g.dim() - 1)) * c)
    return projected


# ==================================================================================================
# 4. The learners and one iteration
# ==================================================================================================


class TerminationRule(NamedTuple):
    """When a model rollout ends: the task's known rule, or a prediction far outside the data."""

    known: Callable[[Tensor], Tensor]  # next_obs [..., S] -> bool [...]
    obs_limit: Tensor  # [S]: twice the largest |s| of the data
    reward_limit: Tensor  # []: the data's largest |r|, ten standard deviations further out

    def __call__(self, reward: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """-> reward [L, B], which far outside becomes -reward_limit; terminated [L, B], 0 or 1."""
        # Paper: silent. Code: the known rule and these two ranges. Here: code.
        outside = (next_obs.abs() > self.obs_limit).any(-1) | (reward.abs() > self.reward_limit)
        terminated = outside | self.known(next_obs)
        return torch.where(outside, -self.reward_limit, reward), terminated.float()


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


class AMPL(Learners):
    """The networks of AMPL: policy, critics, discriminator, omega, and their slow copies."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__(args, obs_dim, action_dim, args.buffer_size, device)
        sizes = (obs_dim, action_dim, args)
        self.actor = self.build(args, "actor", ImplicitPolicy, *sizes)
        self.critic = self.build(args, "critic", TwinCritic, *sizes)
        self.discriminator = self.build(args, "discriminator", Discriminator, *sizes)
        self.omega = self.build(args, "omega", ImportanceWeight, *sizes)
        self.actor_target, self.critic_target = map(copy.deepcopy, (self.actor, self.critic))
        # The slow copies in the training of omega.
        self.omega_slow, self.critic_slow = map(copy.deepcopy, (self.omega, self.critic))
        self.register_buffer("q_avg", torch.full((args.num_seeds,), -1.0))  # -1: no batch seen yet
        self.to(device)
        gan = dict(betas=(args.gan_beta1, 0.999))
        self.optimizers = {
            "actor": adam(self.actor.parameters(), args.actor_lr, **gan),
            "discriminator": adam(self.discriminator.parameters(), args.discriminator_lr, **gan),
            "critic": adam(self.critic.parameters(), args.critic_lr),
            "omega": adam(self.omega.parameters(), args.miw_lr),
            "model": self.model_optimizer(args, decay_biases=True),
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


def update_critic(agent: AMPL, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One step of both critics. -> logs [L]"""
    with torch.no_grad():
        next_action = torch.tanh(agent.actor_target(batch.next_obs))
        q_next = agent.critic_target(batch.next_obs, next_action)
        target = conservative_target(
            batch.reward, batch.terminated, q_next, args.gamma, args.q_min_weight, args.q_bound
        )
    q = agent.critic(batch.obs, batch.action)
    loss = critic_loss(q, target, args.critic_huber_delta)
    descend(agent, "critic", loss, max_norm=args.critic_grad_norm)
    return {"losses/critic_loss": loss.detach(), "losses/q_values": q.detach().mean((1, 2))}


def imagined_next_pairs(
    agent: AMPL, batch: Batch, rule: TerminationRule
) -> tuple[Tensor, Tensor, Tensor]:
    """The model's s' after stored (s, a) with the policy's raw action there; keep. [L, B, ...]

    The gradient reaches the policy through the raw action; s' is a constant.
    """
    reward, next_obs = agent.elites.sample(batch.obs, batch.action)
    _, terminated = rule(reward, next_obs)
    # Paper: all pairs. Code: those at a terminal s' are removed. Here: code, as weight 0.
    return next_obs, agent.actor(next_obs), 1 - terminated


def stored_next_pairs(agent: AMPL, data: Tensor, next_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The stored (s', a') with raw action: obs [L, B, S], atanh(action) [L, B, A]."""
    batch = agent.split(data[next_rows])
    return batch.obs, torch.atanh(batch.action.clamp(-1 + 1e-7, 1 - 1e-7))


def update_gan(
    agent: AMPL, batch: Batch, data: Tensor, pairs: Tensor, rule: TerminationRule, args: Args,
    warmup: bool, step_actor: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """One step of the discriminator and, if `step_actor`, of the policy. -> logs [L]"""
    with torch.set_grad_enabled(step_actor and not warmup):
        q_min = agent.critic(batch.obs, torch.tanh(agent.actor(batch.obs))).amin(1)
    q_abs = q_min.detach().abs().mean(-1)
    q_avg = torch.where(agent.q_avg < 0, q_abs, agent.q_avg)  # the first batch sets it
    # Paper: silent. Code: pairs at s' of stored rows alone. Here: code.
    rows, next_rows = agent.sample_data(pairs, args.batch_size).unbind(-1)
    with torch.set_grad_enabled(step_actor):
        obs, raw, keep = imagined_next_pairs(agent, agent.split(data[rows]), rule)
    logit_fake = agent.discriminator(obs, raw)
    logit_true = agent.discriminator(*stored_next_pairs(agent, data, next_rows))
    weight = agent.row_weight.gather(1, rows)
    gan_loss = weighted_generator_loss(logit_fake, weight, keep)
    # Paper: no warm start. Code: 40,000 iterations that only imitate. Here: code.
    actor_loss = gan_loss if warmup else policy_loss(q_min, q_avg, gan_loss, args.q_coef)
    label = args.label_smoothing + (1 - args.label_smoothing) * torch.rand_like(logit_true)
    disc_loss = weighted_discriminator_loss(logit_true, logit_fake, weight, keep, label)
    # Paper: discriminator first. Code: policy first, both losses with the old D. Here: code. (D's
    # gradient needs D's weights and the fake pairs; the policy's step leaves both alone.)
    if step_actor:
        descend(agent, "actor", actor_loss, retain_graph=True)
    descend(agent, "discriminator", disc_loss)
    agent.q_avg.copy_(q_avg.lerp(q_abs, args.tau))
    return {
        "losses/actor_loss": actor_loss.detach(),
        "losses/generator_loss": gan_loss.detach(),
        "losses/discriminator_loss": disc_loss.detach(),
    }


def iterate(
    agent: AMPL, data: Tensor, pairs: Tensor, rule: TerminationRule, args: Args,
    warmup: bool, step_actor: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """One iteration: critics, policy, discriminator, targets. -> logs [L]

    Reads no Python value that changes and never waits for the GPU, so `capture` can record it.
    """
    batch = agent.sample(data, args.batch_size)
    logs = update_critic(agent, batch, args)  # Eq. (12), (13)
    # Eq. (15) to (17)
    logs |= update_gan(agent, batch, data, pairs, rule, args, warmup, step_actor)
    polyak(agent.critic_target, agent.critic, args.tau)
    polyak(agent.actor_target, agent.actor, args.tau)
    return logs


def scheduled_real_rows(iteration: int, args: Args) -> int:
    """Rows of a batch that come from the data: all in the warm start, then fewer step by step."""
    # Paper: f = 0.5. Code: 1 until iteration 45,000, 0.1 less every 5000 after. Here: code.
    steps = max(0, (iteration - args.warmup_iterations) // args.real_decay_every)
    return int(max(args.real_fraction, 1 - 0.1 * steps) * args.batch_size)


# ==================================================================================================
# 5. World model and importance weights: fit, imagine
# ==================================================================================================


@torch.no_grad()
def imagine(agent: AMPL, data: Tensor, rule: TerminationRule, args: Args) -> dict[str, Tensor]:
    """Roll the policy out in the model and write slots x horizon transitions to the buffer.

    A rollout starts at a stored state and ends at its first terminated step, which is kept.
    """
    slots = math.ceil(args.rollout_rows / args.horizon)
    # A CPU works through chunks that stay in its cache; a GPU takes all slots at once.
    chunk = 2048 if args.shared_rollout_action or agent.device.type == "cpu" else slots
    ends = torch.zeros(agent.learners, device=agent.device)
    for first in range(0, slots, chunk):
        count = min(chunk, slots - first)
        obs = agent.split(agent.sample_data(data, count)).obs
        for _ in range(args.horizon):
            action = torch.tanh(agent.actor(obs))
            # Paper: a ~ pi per state. Code: by mistake one action for all rows. Here: paper.
            if args.shared_rollout_action:
                action = action[:, :1].expand_as(action).contiguous()
            reward, next_obs = agent.elites.sample(obs, action)
            reward, terminated = rule(reward, next_obs)
            agent.remember(Batch(obs, action, reward, next_obs, terminated))
            # Paper: silent. Code: new rollouts until 32,000 rows are there. Here: the slot of an
            # ended rollout restarts, so that every refresh has the same shape.
            fresh = agent.split(agent.sample_data(data, count)).obs
            obs = torch.where(terminated.unsqueeze(-1) > 0, fresh, next_obs)
            ends += terminated.mean(-1) * (count / (slots * args.horizon))
    return {"rollout/terminated_frac": ends}


def training_pairs(agent: AMPL, dataset: "Dataset", data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The model's rows, normalised: inputs [n, S + A], targets [n, 1 + S]; their numbers [n].

    Terminals whose next observation was not stored stay out.
    """
    rows = dataset.has_next.nonzero().squeeze(-1).to(agent.device)
    batch = agent.split(data[rows])
    inputs = torch.cat([batch.obs, batch.action], -1)
    targets = torch.cat([batch.reward.unsqueeze(-1), batch.next_obs - batch.obs], -1)
    agent.model.normalise_by(inputs, targets)
    inputs = (inputs - agent.model.input_mean) / agent.model.input_std
    targets = (targets - agent.model.target_mean) / agent.model.target_std
    return inputs, targets, rows


def model_step(
    agent: AMPL, inputs: Tensor, targets: Tensor, weight: Tensor, train_rows: Tensor, args: Args
) -> dict[str, Tensor]:
    """One Adam step of all members on rows of their own, drawn with replacement. -> logs [L]"""
    shape = (agent.learners, args.ensemble_size * args.model_batch_size)
    pick = torch.randint(train_rows.shape[1], shape, device=agent.device)
    rows = train_rows.gather(1, pick).view(agent.learners, args.ensemble_size, -1)  # [L, M, B]
    row_weight = weight.gather(1, rows.flatten(1)).view_as(rows)
    model = agent.model
    mean, log_std = model(inputs[rows])
    loss = model_loss(mean, log_std, targets[rows], row_weight).sum(-1)  # Eq. (6)
    # Keeps the learned bounds of log_std from drifting apart.
    spread = (model.max_log_std - model.min_log_std).flatten(1).sum(-1)
    descend(agent, "model", loss + 0.02 * spread)
    return {"model/train_nll": loss.detach() / args.ensemble_size}


@torch.no_grad()
def holdout_loss(
    agent: AMPL, inputs: Tensor, targets: Tensor, weight: Tensor, rows: Tensor
) -> Tensor:
    """The weighted loss of every member on rows [L, n]. -> [L, M]"""
    total, chunk = 0.0, 512 if agent.device.type == "cpu" else rows.shape[1]
    for part in rows.split(chunk, 1):  # chunks stay in a CPU's cache
        x, y = inputs[part].unsqueeze(1), targets[part].unsqueeze(1)  # [L, 1, chunk, ...]
        mean, log_std = agent.model(x.expand(-1, agent.model.lead[1], -1, -1))
        loss = model_loss(mean, log_std, y, weight.gather(1, part).unsqueeze(1))
        total = total + loss * part.shape[1]
    return total / rows.shape[1]


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


def fit_model(
    agent: AMPL, dataset: "Dataset", data: Tensor, weight: Tensor, args: Args, k: int, run: "Run"
) -> Tensor:
    """Fit k of the model with weights [L, N]; fit 0 is unweighted. -> hold-out losses [L, M]

    A re-fit goes on from the present weights and Adam state, on a new split, until no member has
    gained 1 % on the hold-out rows for `model_patience` epochs. Paper: silent. Code: this. Here:
    code.
    """
    inputs, targets, rows = training_pairs(agent, dataset, data)
    weight = weight[:, rows].contiguous()
    seed_phase(args.seed, "model split", k)
    order = torch.stack([torch.randperm(len(rows)) for _ in range(agent.learners)]).to(agent.device)
    held = min(len(rows) - int(0.8 * len(rows)), args.holdout_size)
    holdout_rows, train_rows = order[:, :held].contiguous(), order[:, held:].contiguous()
    fit = run.progress["fit"] = run.progress.get("fit") or fit_state(agent)
    step = capture(
        lambda: model_step(agent, inputs, targets, weight, train_rows, args), agent, args
    )
    while fit["epoch"] < args.model_max_epochs and not fit["stopped"].all():
        seed_phase(args.seed, f"model fit {k}", fit["epoch"])
        for _ in range(args.model_epoch_steps):
            logs = step()
        loss = holdout_loss(agent, inputs, targets, weight, holdout_rows)
        judge_epoch(agent, fit, loss, args)
        logs = logs | {"model/holdout_loss": loss.mean(-1)}
        run.after_steps(f"model fit {k}", args.model_epoch_steps, logs)
    restore_best(agent, fit)
    loss = holdout_loss(agent, inputs, targets, weight, holdout_rows)
    choose_elites(agent, loss, args)
    return loss


def q_of_policy(agent: AMPL, obs: Tensor) -> Tensor:
    """Q'_1(s, a) with a fresh action of the policy; [L, B, S] -> [L, B]."""
    return agent.critic_slow.first(obs, torch.tanh(agent.actor(obs)))


class QTables(NamedTuple):
    """Q over the data and the initial states: policy and critic stand still in MIW training."""

    q: Tensor  # [L, N]: Q_1 at the stored (s, a)
    q_next: Tensor  # [L, N]: Q'_1(s', a'), one fresh a' per row
    q_initial: Tensor  # [L, N0]: Q'_1(s0, a0), one fresh a0 per state


@torch.no_grad()
def fill_tables(agent: AMPL, tables: QTables, data: Tensor, initial_obs: Tensor) -> None:
    """Evaluate Q on all rows, with one fresh action each, into `tables` (in place)."""
    chunk = 1024 if agent.device.type == "cpu" else 65_536
    for first in range(0, len(data), chunk):
        part = data[first : first + chunk].expand(agent.learners, -1, -1)
        batch = agent.split(part)
        tables.q[:, first : first + chunk] = agent.critic.first(batch.obs, batch.action)
        tables.q_next[:, first : first + chunk] = q_of_policy(agent, batch.next_obs)
    for first in range(0, len(initial_obs), chunk):
        obs = initial_obs[first : first + chunk].expand(agent.learners, -1, -1)
        tables.q_initial[:, first : first + chunk] = q_of_policy(agent, obs)


def miw_step(
    agent: AMPL, data: Tensor, initial_obs: Tensor, tables: QTables | None, args: Args
) -> dict[str, Tensor]:
    """One step of omega; Q comes from tables, or is evaluated here. -> logs [L]"""
    rows = torch.randint(len(data), (agent.learners, args.miw_batch_size), device=agent.device)
    starts = (agent.learners, args.miw_initial_batch_size)
    starts = torch.randint(len(initial_obs), starts, device=agent.device)
    batch = agent.split(data[rows])
    with torch.no_grad():
        if tables is None:
            q, q_next = (
                agent.critic.first(batch.obs, batch.action),
                q_of_policy(agent, batch.next_obs),
            )
            q_initial = q_of_policy(agent, initial_obs[starts])
            polyak(agent.critic_slow, agent.critic, args.miw_tau)
        else:
            q, q_next = tables.q.gather(1, rows), tables.q_next.gather(1, rows)
            q_initial = tables.q_initial.gather(1, starts)
        omega_slow = agent.omega_slow(batch.obs, batch.action)
    omega = agent.omega(batch.obs, batch.action)
    q_next = (1 - batch.terminated) * q_next
    loss = miw_loss(*miw_moments(omega, omega_slow, q, q_next, q_initial, args.gamma))
    mean_omega = omega.mean(-1)
    parameters = list(agent.omega.parameters())
    loss_grads = torch.autograd.grad(loss.sum(), parameters, retain_graph=True)
    mean_grads = torch.autograd.grad(mean_omega.sum(), parameters)
    grads = project_gradient(loss_grads, mean_grads, mean_omega.detach(), args.miw_mean_bound)
    apply_gradients(
        agent.optimizers["omega"], parameters, clip_gradients(grads, args.miw_grad_norm)
    )
    polyak(agent.omega_slow, agent.omega, args.miw_tau)
    return {"losses/weight_loss": loss.detach(), "weights/batch_mean": mean_omega.detach()}


@torch.no_grad()
def normalised_weight(agent: AMPL, data: Tensor) -> Tensor:
    """omega over the data divided by its mean, [L, N]."""
    # Paper: omega. Code: omega / mean(omega). Here: code.
    parts = [agent.split(p.expand(agent.learners, -1, -1)) for p in data.split(4096)]
    omega = torch.cat([agent.omega(p.obs, p.action) for p in parts], -1)
    return omega / omega.mean(-1, keepdim=True)


def fit_weight(
    agent: AMPL, data: Tensor, initial_obs: Tensor, args: Args, k: int, run: "Run"
) -> Tensor:
    """Train omega before re-fit k, Eq. (11). -> weights of the data with mean one, [L, N]

    Policy and critic stand still, so Q over the data is constant, and Q' changes with its fresh
    actions and while its slow copy travels from the target critic to the critic. The first window
    of `miw_refresh` steps evaluates Q' in every step, later ones once.
    """
    done = run.progress.setdefault("miw_step", 0)
    if done == 0:
        agent.critic_slow.load_state_dict(agent.critic_target.state_dict())
    sizes = (len(data), len(data), len(initial_obs))
    tables = QTables(*(torch.zeros(agent.learners, n, device=agent.device) for n in sizes))
    plain = capture(lambda: miw_step(agent, data, initial_obs, None, args), agent, args)
    cached = capture(lambda: miw_step(agent, data, initial_obs, tables, args), agent, args)
    window = args.miw_refresh if args.miw_refresh > 1 else 1000
    while done < args.miw_steps:  # nothing to do on a resume inside the re-fit
        seed_phase(args.seed, f"miw {k}", done)
        count = min(window, args.miw_steps - done)
        use_tables = done > 0 and args.miw_refresh > 1
        if use_tables:
            fill_tables(agent, tables, data, initial_obs)
            polyak(agent.critic_slow, agent.critic, 1 - (1 - args.miw_tau) ** count)
        for _ in range(count):
            logs = (cached if use_tables else plain)()
        run.progress["miw_step"] = done = done + count
        run.after_steps(f"omega {k}", count, logs)
    weight = normalised_weight(agent, data)
    effective = weight.sum(-1).square() / weight.square().sum(-1) / weight.shape[1]
    if "fit" not in run.progress:  # else this is a resumed re-fit, and they are logged already
        logs = {"weights/max": weight.amax(-1), "weights/effective_sample_share": effective}
        run.log(f"weights {k}", logs)
        save_weight(run, weight)
    return weight


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


# --- evaluation ---


class Policy(nn.Module):
    """Actor and critic of one learner, on the CPU: what policy.pt holds. See `load_policy`."""

    networks = ("actor", "critic")

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.candidates = args.eval_candidates
        self.actor = ImplicitPolicy(1, obs_dim, action_dim, args)
        self.critic = TwinCritic(1, obs_dim, action_dim, args)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs [n, S] -> actions [n, A] in [-1, 1]: of some samples the one with the best min Q."""
        # Paper: silent. Code: best of 10 by min Q. Here: code.
        states = torch.as_tensor(obs, dtype=torch.float32).repeat_interleave(self.candidates, 0)
        action = torch.tanh(self.actor(states[None]))
        value = self.critic(states[None], action).amin(1).view(len(obs), self.candidates)
        best = value.argmax(-1) + self.candidates * torch.arange(len(obs))
        return action[0, best].numpy()


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


def save_weight(run: Run, weight: Tensor) -> None:
    """miw.npz: log of the normalised weights [L, N] by iteration; miw.png: Figure 2 of AMPL."""
    path, logs = run.dir / "miw.npz", {}
    if path.exists():
        with reading(path), np.load(path, allow_pickle=False) as saved:
            logs = {k: saved[k] for k in saved.files if int(k) < run.iteration}
    # The clamp keeps the log of a weight that underflowed to zero finite.
    logs[str(run.iteration)] = weight.clamp(min=1e-30).log().cpu().numpy()
    write_atomically(path, lambda file: np.savez(file, **logs))
    # Of the first learner, ten thousand rows spread evenly over the sorted weights.
    rows = np.linspace(0, weight.shape[1] - 1, min(weight.shape[1], 10_000)).astype(int)
    violins = [np.sort(x[0])[rows] for x in logs.values()]
    title = f"{run.algo.upper()} on {run.args.env_id}"
    labels = "iteration of the re-training", "log of the normalised weight"
    with picture(run.dir / "miw.png", title, *labels) as axes:
        axes.violinplot(violins, quantiles=[[0.25, 0.5, 0.75]] * len(violins), widths=0.8)
        axes.set_xticks(range(1, len(violins) + 1), list(logs))


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


def scale_rewards(reward: Tensor) -> Tensor:
    """Rewards [N] to about [0, 1], the scale that the constants assume. Raises UserError."""
    # Paper: the task's rewards. Code: min-max scaled, plus 1e-3 / span. Here: code.
    span = reward.max() - reward.min()
    if span == 0:
        raise UserError("all rewards of the dataset are equal, so there is nothing to learn")
    return (reward - reward.min() + 1e-3) / span


def data_rows(dataset: Dataset, device: torch.device) -> Tensor:
    """The dataset as rows [N, C] of Batch's fields."""
    columns = [dataset.obs, dataset.action, dataset.reward[:, None], dataset.next_obs]
    return torch.cat([*columns, dataset.terminated.float()[:, None]], -1).to(device)


def consecutive_rows(dataset: Dataset, device: torch.device) -> Tensor:
    """Numbers [n, 2] of a row (s, a, s') and of the one with (s', a'). Raises UserError.

    Paper: silent. Code: neighbours among the rows kept, masked at terminals, so some pairs cross
    a time limit. Here: pairs within an episode.
    """
    rows = (dataset.next_row >= 0).nonzero().squeeze(-1)
    if not len(rows):
        raise UserError("the regularizer needs rows that follow one another in the data")
    return torch.stack([rows, dataset.next_row[rows]], -1).to(device)


def termination_rule(dataset: Dataset, args: Args, device: torch.device) -> TerminationRule:
    """The task's own rule and the ranges of its data."""
    reward, extremes = dataset.reward, torch.maximum(dataset.obs.abs(), dataset.next_obs.abs())
    margin = 10 * reward.std()
    reward_limit = torch.maximum((reward.min() - margin).abs(), (reward.max() + margin).abs())
    known, _ = known_termination(args.env_id)
    return TerminationRule(known, 2 * extremes.amax(0).to(device), reward_limit.to(device))


def initial_observations(env_id: str, count: int, seed: int) -> np.ndarray:
    """Observations after `count` resets, float32 [count, S]; 1e5 take 2 s (hopper), 9 s (door)."""
    env = env_slots(env_id, 1)[0]
    seeds = [seed] + [None] * (count - 1)
    return np.array([env.reset(seed=s)[0] for s in seeds], np.float32)


def sample_initial_states(dataset: Dataset, args: Args, device: torch.device) -> Tensor:
    """Observations from mu0, [N0, S]."""
    # Paper: mu0. Code: simulator resets, which are online access. Here: code, or the data's own.
    if args.initial_states == "dataset":
        return dataset.episode_start_obs.to(device)
    tqdm.write(f"omega: {args.num_initial_states} simulator resets (else --initial-states dataset)")
    seed = phase_seed(args.seed, "initial states")
    obs = initial_observations(args.env_id, args.num_initial_states, seed)
    return torch.as_tensor(obs).to(device)


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
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    dataset = load_dataset(args.env_id, args.dataset_path, make_env(args.env_id))
    if args.batch_size > len(dataset.obs):
        raise UserError(f"--batch-size {args.batch_size} exceeds the {len(dataset.obs)} data rows")
    matmul = choose_cpu_matmul(args)
    announce(dataset, args, device, matmul)
    dataset = dataset._replace(reward=scale_rewards(dataset.reward))
    data, rule = data_rows(dataset, device), termination_rule(dataset, args, device)
    pairs = consecutive_rows(dataset, device)
    agent = AMPL(args, dataset.obs.shape[1], dataset.action.shape[1], device)
    # Weights [L, N] of the model's last fit, a buffer so that checkpoints hold them.
    agent.register_buffer("row_weight", torch.ones(agent.learners, len(data), device=device))
    if args.dynamics_from and not args.resume:
        load_model(agent, dataset, args)
    run = Run(args, "ampl_wpr")
    run.open(agent, matmul, dataset.sha256)

    step = {
        (warmup, step_actor): capture(
            functools.partial(iterate, agent, data, pairs, rule, args, warmup, step_actor),
            agent,
            args,
        )
        for warmup in (True, False)
        for step_actor in (True, False)
    }
    refresh = capture(functools.partial(imagine, agent, data, rule, args), agent, args)
    initial_obs = None  # drawn when omega first needs them

    with contextlib.closing(run):
        while run.iteration < args.total_iterations:  # Alg. 1
            i = run.iteration
            if i == 0:
                if not args.dynamics_from:
                    ones = torch.ones(agent.learners, len(data), device=device)
                    loss = fit_model(agent, dataset, data, ones, args, 0, run)  # Eq. (4)
                    save_model(agent, loss, dataset, run)
                run.took("model")
            elif i % args.model_retrain_every == 0:
                k = i // args.model_retrain_every
                if initial_obs is None:
                    initial_obs = sample_initial_states(dataset, args, device)
                weight = fit_weight(agent, data, initial_obs, args, k, run)  # Eq. (11)
                agent.row_weight.copy_(weight)
                run.took("miw")
                fit_model(agent, dataset, data, weight, args, k, run)  # Eq. (6)
                seed_phase(args.seed, "iterations", i)
                run.took("model")
            if i % args.rollout_every == 0:
                run.took("iterations")
                seed_phase(args.seed, "rollout", i)
                run.rollout_logs = refresh()  # D_model
                seed_phase(args.seed, "iterations", i)
                run.took("rollout")
            agent.real_rows.fill_(scheduled_real_rows(i, args))
            warmup, step_actor = i < args.warmup_iterations, i % args.policy_frequency == 0
            logs = step[warmup, step_actor]()  # Eq. (12) to (17)
            run.after_iteration(logs)

        result = run.finish(dataset)
    if args.capture_video:
        record_episode(load_policy(run.dir), args.env_id, run.dir / "episode.gif")
    return result


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
        if args.evaluate is not None:
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
