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
"""COMBO, Conservative Offline Model-Based Policy Optimization, in one file (Yu et al. 2021).

COMBO learns a policy from a fixed dataset D, helped by rollouts in a learned model of the
environment. A policy that is optimised in a model finds the states where the model errs in its
favour. MOPO subtracts a penalty for the model's uncertainty from the reward, and so needs a model
that knows where it errs. COMBO does without: it teaches the critic to be pessimistic wherever the
policy leaves the data. Its critic Q minimises, Eq. (2):

    beta (E_rho[Q(s, a)] - E_D[Q(s, a)]) + 1/2 E_df[(Q(s, a) - r - gamma Q'(s', a'))^2]

The second term is the Bellman error on d_f, a mixture of data and rollouts. The first term, the
conservative gap, lowers Q on rho, the policy's actions at states of the rollouts (on most tasks
also of the data, see `rows_of_rho`), and raises it on the pairs of the data. Where rho and the data
agree its two means cancel. With beta large enough the learned values of the policy are, on average
over first states, no higher than the true ones (Prop. 4.1). In the loss (`conservative_gap`)
E_rho[Q] is, as in CQL, a soft maximum of Q over 3 n actions per state: n uniform ones, n of pi(.|s)
and n of pi(.|s').

Algorithm 1, made concrete on SAC and on MOPO's model:

    fit an ensemble of Gaussian models of (reward, next state) to the data, once
    for every iteration:
        every `rollout_every` iterations:
            let mu (the policy, or uniform actions) act in the model from states of the data, for
            `horizon` steps, into the buffer D_model
        sample a batch from d_f: a share f from the data, the rest from D_model
        critics: one step down the Bellman error + beta * the conservative gap        Eq. (2)
        policy: raise Q and the entropy at the batch's states                         Eq. (3)
        temperature: steer the entropy to `target_entropy`
        targets: the slow copies of the critics follow them

The paper's symbols. An observation has S numbers, an action A. B and M are the sizes of the batch
and of the model (members) at hand, n is `num_actions`.

    s, a, r, s'      obs, action, reward, next_obs    [B, S], [B, A], [B], [B, S]
    D, D_model       data, model_data                 [rows, S + A + 1 + S + 1], a transition a row
    d_f              a batch of `sample_mixed`        data in the first rows, then D_model
    rho              states: `rows_of_rho`; actions: `proposals`
    mu               rollout_actions                  who acts in rollouts
    pi               actor                            [B, S] -> mean, log_std [B, A]
    Q_j, Q'_j        critic, critic_target            [B, S], [B, A] -> [2, B]
    T^               model; elites, its best members  [M, B, S + A] -> mean, log_std [M, B, 1 + S]
    beta, f          beta, real_fraction
    alpha            exp(log_alpha), SAC's temperature

The authors released no code with the paper (NeurIPS 2021). Its main text lets all but the critic
follow MOPO, and leaves many constants to an appendix. What is from memory of that appendix is
marked (recalled); public re-implementations differ from one another. What COMBO takes from MOPO is
as in MOPO's code. Notes say where the sources differ: `Paper:` is COMBO's text, `Recalled:` its
appendix from memory, `MOPO's paper:` and `MOPO's code:` are MOPO's. This file follows the source
that is named last; `Here:` is its own choice. Eq. (1) is CQL's; Eq. (4) and (5) are theory. They
have no line.

`--select` chooses between finished runs with the paper's offline rule, `--probe-uncertainty` draws
a figure like Figure 2, and `--dynamics-from` also takes a run of mopo.py. What follows `main` is
plumbing and may be skipped; the method uses of it above all `capture` (a step as a CUDA graph; on a
CPU the step itself), `reseed` (a seed for each phase) and `known_termination` (a task's rule of
ending).
"""

import contextlib
import copy
import dataclasses
import difflib
import errno
import functools
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

# Threads that wait for work spin, which stops the others on a busy machine. With this they spin
# less: on two cores an iteration of ampl.py beside one more process takes 91 ms and not 132, and
# alone as long as before (tests/README.md, "A busy machine").
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"  # read when torch is imported

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ===== 1. Arguments ===============================================================================
# The types of numbers, with the range that a value must lie in.
class Range(NamedTuple):
    """From `low` to `high`, both included, unless low_is_allowed is False."""

    low: float
    high: float = 1e9  # above all that makes sense; a product of a few stays finite
    low_is_allowed: bool = True


CORES = os.cpu_count() or 1
Count = Annotated[int, Range(1), tyro.conf.arg(metavar="INT>=1")]
CountOrZero = Annotated[int, Range(0), tyro.conf.arg(metavar="INT>=0")]
Seed = Annotated[int, Range(0, 2**32 - 1), tyro.conf.arg(metavar="0..2^32-1")]
Threads = Annotated[int, Range(0, CORES), tyro.conf.arg(metavar=f"0..{CORES}")]
Share = Annotated[float, Range(0, 1), tyro.conf.arg(metavar="0..1")]
Rate = Annotated[float, Range(0, 1, low_is_allowed=False), tyro.conf.arg(metavar="0<..1")]
Positive = Annotated[float, Range(0, low_is_allowed=False), tyro.conf.arg(metavar="FLOAT>0")]
NonNegative = Annotated[float, Range(0), tyro.conf.arg(metavar="FLOAT>=0")]
Number = Annotated[float, Range(-1e9), tyro.conf.arg(metavar="FLOAT")]


# Defaults are MOPO's code's for all that COMBO takes from MOPO. COMBO's own are marked: (paper);
# (recalled), from memory of the paper's appendix and not read; (ours). Where env_id has a row in
# PAPER, as the default task has, that row replaces the defaults of the flags marked (task).
@dataclasses.dataclass
class Args:
    # --- task and data ---
    env_id: str = "hopper-medium-replay-v2"  # task in PAPER, or any with a simulator
    dataset_path: str | None = None  # HDF5 file (default: the task's in D4RL's folder)
    seed: Seed = 0  # seed of all random draws (the paper reports six)
    total_iterations: Count = 1_000_000  # iterations of the main loop (task)
    # --- model ---
    ensemble_size: Count = 7  # members of the model
    num_elites: Count = 5  # members that predict, those with the lowest hold-out error
    model_hidden: Count = 200  # width of each member's four hidden layers
    model_lr: Positive = 1e-3  # Adam learning rate of the model
    model_batch_size: Count = 256  # rows per member and step
    model_weight_decay: tuple[NonNegative, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # by layer
    model_patience: Count = 6  # epochs without improvement before the fit stops
    model_max_epochs: Count = 10_000  # maximum epochs of the fit (ours: MOPO's code has none)
    holdout_size: Count = 1000  # held-out rows, at most a fifth of the data
    # --- rollouts ---
    horizon: Count = 5  # rollout length (task)
    rollout_every: Count = 1000  # iterations between rollout phases
    rollout_starts: Count = 50_000  # rollouts per phase
    rollout_retain: Count = 5  # rollout phases that D_model holds
    rollout_actions: Literal["policy", "uniform"] = "policy"  # mu, who acts in rollouts (task)
    real_fraction: Share = 0.5  # share f of data rows in a batch (recalled, task)
    # --- critics ---
    beta: NonNegative = 1.0  # weight of the conservative gap E_rho[Q] - E_D[Q] (recalled, task)
    num_actions: Count = 10  # n of the 3 n actions per state in that gap (recalled)
    rho_states: Literal["mixed", "model"] = "mixed"  # states of rho: d_f's, or D_model's (task)
    gamma: Share = 0.99  # discount factor
    tau: Rate = 0.005  # soft-update rate of the critics' targets
    batch_size: Count = 256  # batch size B
    critic_lr: Positive = 3e-4  # Adam learning rate of the critics (recalled, task)
    # --- policy ---
    hidden: tuple[Count, ...] = (256, 256, 256)  # hidden widths of policy, critics (recalled)
    actor_lr: Positive = 1e-4  # Adam learning rate of the policy (recalled, task)
    alpha_lr: Positive = 3e-4  # Adam learning rate of the temperature alpha, which starts at 1
    target_entropy: Number = -3.0  # entropy that alpha steers to (on all tasks, and not -A)
    # --- evaluation ---
    eval_every: Count = 1000  # iterations between evaluations
    eval_episodes: Count = 10  # episodes per evaluation
    final_episodes: Count = 100  # episodes of the last evaluation (ours: ten are too noisy)
    # --- how it runs (ours) ---
    run_dir: str = "runs"  # parent of the run folders
    resume: str | None = None  # folder of a run to continue, perhaps with more iterations
    evaluate: str | None = None  # folder of a run whose policy is scored, without training
    select: tuple[str, ...] | None = None  # folders of runs of which one is chosen, without scores
    probe_uncertainty: str | None = None  # folder of a run whose model's errors are drawn
    dynamics_from: str | None = None  # run whose model replaces the fit
    track: bool = False  # logging to Weights and Biases as well (needs `pip install wandb`)
    wandb_project_name: str = "combo"  # project that --track logs to
    wandb_entity: str | None = None  # team that --track logs to
    capture_video: bool = False  # an episode as episode.gif (without a screen: MUJOCO_GL=egl)
    log_every: Count = 1000  # iterations between TensorBoard's points
    checkpoint_every: Count = 10_000  # iterations between checkpoints
    async_envs: bool | None = None  # evaluation in processes (default: with a GPU and 8 cores)
    cuda: bool = True  # training on the GPU, if there is one
    cuda_graphs: bool = True  # recording of training steps as CUDA graphs (GPU)
    tf32: bool = False  # faster, less exact matrix products, with errors of 1e-3 (GPU)
    cpu_fast_matmul: bool = True  # oneDNN matrix products, if a test finds them exact (CPU)
    threads: Threads = 0  # CPU threads of torch (0: torch's default)


# All of it is recalled from the paper's appendix, and in part confirmed by d3rlpy's script and by
# the values that unifloral sweeps. Only total_iterations is MOPO's code's. The main text names no
# version of the datasets, so -v0 and -v2 have the same values. OfflineRL-Kit's values for -v2 are
# no substitute: its weight is twice our beta (its Bellman error has no 1/2), and it was tuned with
# a log-sum-exp over 3 actions instead of 30: it drops the result of a reshape, so its values of Q
# stay [B n, 3].
PAPER_FLAGS = (
    "beta", "horizon", "real_fraction", "critic_lr", "actor_lr", "rho_states", "rollout_actions",
    "total_iterations",
)  # fmt: skip
PAPER = {
    # task: beta, horizon, real_fraction, critic_lr, actor_lr, rho_states, rollout_actions,
    #       total_iterations
    "halfcheetah-random-v0":       (0.5,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 1_000_000),
    "halfcheetah-medium-v0":       (0.5,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 1_000_000),
    "halfcheetah-medium-replay-v0":(0.5,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 1_000_000),
    "halfcheetah-medium-expert-v0":(0.5,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 1_000_000),
    "hopper-random-v0":            (1.0,  5, 0.5, 3e-4, 1e-4, "model", "uniform", 1_000_000),
    "hopper-medium-v0":            (5.0,  5, 0.5, 3e-4, 1e-4, "model", "uniform", 1_000_000),
    "hopper-medium-replay-v0":     (1.0,  5, 0.5, 3e-4, 1e-4, "model", "uniform", 1_000_000),
    "hopper-medium-expert-v0":     (5.0,  5, 0.5, 3e-4, 1e-4, "model", "uniform", 1_000_000),
    "walker2d-random-v0":          (0.5,  1, 0.5, 1e-4, 1e-5, "mixed", "policy", 1_000_000),
    "walker2d-medium-v0":          (5.0,  1, 0.8, 1e-4, 1e-5, "mixed", "policy", 1_000_000),
    "walker2d-medium-replay-v0":   (0.5,  1, 0.5, 1e-4, 1e-5, "mixed", "policy", 1_000_000),
    "walker2d-medium-expert-v0":   (5.0,  1, 0.8, 1e-4, 1e-5, "mixed", "policy", 1_000_000),
    "halfcheetah-random-v2":       (0.5,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 1_000_000),
    "halfcheetah-medium-v2":       (0.5,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 1_000_000),
    "halfcheetah-medium-replay-v2":(0.5,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 1_000_000),
    "halfcheetah-medium-expert-v2":(0.5,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 1_000_000),
    "hopper-random-v2":            (1.0,  5, 0.5, 3e-4, 1e-4, "model", "uniform", 1_000_000),
    "hopper-medium-v2":            (5.0,  5, 0.5, 3e-4, 1e-4, "model", "uniform", 1_000_000),
    "hopper-medium-replay-v2":     (1.0,  5, 0.5, 3e-4, 1e-4, "model", "uniform", 1_000_000),
    "hopper-medium-expert-v2":     (5.0,  5, 0.5, 3e-4, 1e-4, "model", "uniform", 1_000_000),
    "walker2d-random-v2":          (0.5,  1, 0.5, 1e-4, 1e-5, "mixed", "policy", 1_000_000),
    "walker2d-medium-v2":          (5.0,  1, 0.8, 1e-4, 1e-5, "mixed", "policy", 1_000_000),
    "walker2d-medium-replay-v2":   (0.5,  1, 0.5, 1e-4, 1e-5, "mixed", "policy", 1_000_000),
    "walker2d-medium-expert-v2":   (5.0,  1, 0.8, 1e-4, 1e-5, "mixed", "policy", 1_000_000),
    "halfcheetah-jump-v0":         (1.0,  5, 0.5, 3e-4, 1e-4, "mixed", "policy", 3_000_000),
    "ant-angle-v0":                (1.0, 25, 0.5, 3e-4, 1e-4, "mixed", "uniform", 3_000_000),
}  # fmt: skip


# ===== 2. Networks ================================================================================
Scalars = dict[str, Tensor]  # what a step reports, by TensorBoard's names; stays on the device
# Long phases call this as progress(name, done, total, scalars); total is None where it is unknown.
Progress = Callable[[str, int, int | None, Scalars], None]


class Batch(NamedTuple):
    """Transitions.

    In the data `terminated` means a real end, since rows that a time limit cut off were dropped on
    loading. In the model it also means a step outside the data: see `end_outside_data`.
    """

    obs: Tensor  # [B, S]
    action: Tensor  # [B, A]
    reward: Tensor  # [B]
    next_obs: Tensor  # [B, S]
    terminated: Tensor  # [B], 0 or 1


def mlp(n_in: int, hidden: tuple[int, ...], n_out: int) -> nn.Sequential:
    """Hidden layers with ReLU: [B, n_in] -> [B, n_out].

    Weights start Glorot-uniform and biases at zero, as in Keras, which MOPO's code uses.
    """
    layers = []
    for width in hidden:
        layers.append(nn.Linear(n_in, width))
        layers.append(nn.ReLU(inplace=True))
        n_in = width
    layers.append(nn.Linear(n_in, n_out))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class GaussianPolicy(nn.Module):
    """SAC's policy: a = tanh(u) with u ~ N(mean(s), std(s)^2), every entry by itself."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = mlp(obs_dim, args.hidden, 2 * action_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] -> mean and log_std of u, [B, A] each."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] -> an action per state [B, A] and its log-density [B]."""
        mean, log_std = self(obs)
        return squashed_sample(mean, log_std, torch.randn_like(mean))

    def samples(self, obs: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """[B, S] -> n actions per state [B, n, A] and their log-densities [B, n]."""
        mean, log_std = self(obs)
        noise = torch.randn(len(mean), n, mean.shape[1], device=mean.device)
        return squashed_sample(mean[:, None], log_std[:, None], noise)


def squashed_sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(u) with u = mean + std * noise, all [..., A], and its log-density [...]."""
    u = mean + log_std.exp() * noise
    log_density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)  # of u
    # The tanh raises the density by 1 / (1 - tanh(u)^2). In this form the logarithm of that stays
    # finite where tanh(u) rounds to 1.
    log_growth = 2 * (u + F.softplus(-2 * u) - math.log(2))
    return torch.tanh(u), (log_density + log_growth).sum(-1)


class TwinCritic(nn.Module):
    """Q_1 and Q_2."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.q1 = mlp(obs_dim + action_dim, args.hidden, 1)
        self.q2 = mlp(obs_dim + action_dim, args.hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Both values: [B, S], [B, A] -> [2, B]."""
        x = torch.cat([obs, action], -1)
        q = torch.cat([self.q1(x), self.q2(x)], -1)  # [B, 2]
        return q.T


class EnsembleLinear(nn.Module):
    """M layers like nn.Linear side by side, computed as one batched product."""

    def __init__(self, members: int, n_in: int, n_out: int):
        super().__init__()
        # MOPO's paper: spectral norm. MOPO's code: none, taken out soon after the release.
        std = 1 / (2 * math.sqrt(n_in))
        self.weight = nn.Parameter(torch.empty(members, n_in, n_out))
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        self.bias = nn.Parameter(torch.zeros(members, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        """[M, B, n_in] -> [M, B, n_out], member m on its own rows x[m]."""
        return torch.baddbmm(self.bias, x, self.weight)


class ModelEnsemble(nn.Module):
    """M Gaussian models of (reward, next_obs - obs).

    Inputs are standardised. Targets stay in their own units.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args, members: int):
        super().__init__()
        self.members = members
        n_in = obs_dim + action_dim
        n_out = 1 + obs_dim
        width = args.model_hidden
        self.layers = nn.ModuleList(
            [
                EnsembleLinear(members, n_in, width),
                EnsembleLinear(members, width, width),
                EnsembleLinear(members, width, width),
                EnsembleLinear(members, width, width),
                EnsembleLinear(members, width, 2 * n_out),  # mean and log_var side by side
            ]
        )
        # Bounds of the log-variance, learned and shared by the members, as in PETS (Chua et al.
        # 2018).
        self.max_log_var = nn.Parameter(torch.full((n_out,), 0.5))
        self.min_log_var = nn.Parameter(torch.full((n_out,), -10.0))
        self.register_buffer("input_mean", torch.zeros(n_in))
        self.register_buffer("input_std", torch.ones(n_in))

    # --- training: standardised inputs to a Gaussian ---

    def inputs_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's inputs [B, S + A] and what it predicts [B, 1 + S], in the data's units."""
        inputs = torch.cat([batch.obs, batch.action], -1)
        targets = torch.cat([batch.reward[:, None], batch.next_obs - batch.obs], -1)
        return inputs, targets

    @torch.no_grad()
    def set_statistics(self, inputs: Tensor) -> None:
        """Keep mean and standard deviation of inputs [rows, S + A]."""
        std, mean = torch.std_mean(inputs.double(), 0, correction=0)
        self.input_mean.copy_(mean)
        # MOPO's code: a deviation below 1e-12 counts as 1. Here: an input that deviates by less
        # than 0.001 would be huge once it changed. It is divided by 1e12, so that the model sees 0.
        self.input_std.copy_(input_scale(std))

    def standardise(self, inputs: Tensor) -> Tensor:
        """Inputs [..., S + A] with these means and deviations."""
        return (inputs - self.input_mean) / self.input_std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[M, B, S + A] -> mean, log_std [M, B, 1 + S]."""
        *hidden_layers, output_layer = self.layers
        in_place = not torch.is_grad_enabled()  # saves memory, where no gradient needs layer(x)
        for layer in hidden_layers:
            x = F.silu(layer(x), inplace=in_place)
        mean, log_var = output_layer(x).chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        log_var = self.min_log_var + F.softplus(log_var - self.min_log_var)
        return mean, 0.5 * log_var

    # --- prediction ---

    @torch.no_grad()
    def predict_by_all(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """What every member says at every row: mean and std of (r, s' - s), [M, B, 1 + S]."""
        x = self.standardise(torch.cat([obs, action], -1))
        mean, log_std = self(x.expand(self.members, -1, -1))
        return mean, log_std.exp()

    @torch.no_grad()
    def sample(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Draw reward [B] and next_obs [B, S], each row from a random member. No gradient."""
        mean, log_std = self.predict(obs, action)
        # MOPO's paper: the mean of the reward. MOPO's code: a sample of it.
        y = mean + log_std.exp() * torch.randn_like(mean)
        return y[:, 0], obs + y[:, 1:]

    def predict(self, obs: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        """`forward` at every row, each by a random member of its own: -> mean, log_std [B, 1 + S].

        The rows are shuffled, cut into M equal shares, one per member, and put back in order.
        """
        x = self.standardise(torch.cat([obs, action], -1))  # [B, S + A]
        missing = -len(x) % self.members  # rows to add so that M divides their number
        x = F.pad(x, (0, 0, 0, missing))
        shuffle = torch.rand(len(x), device=x.device).argsort()  # a random permutation
        shares = x[shuffle].unflatten(0, (self.members, -1))  # [M, (B + missing) / M, S + A]
        unshuffle = shuffle.argsort()[: len(obs)]  # argsort of a permutation is its inverse
        return tuple(output.flatten(0, 1)[unshuffle] for output in self(shares))


# ===== 3. Equations ===============================================================================
def largest_std(std: Tensor) -> Tensor:
    """The largest norm of a member's deviations, for `probe` alone: std [M, B, 1 + S] -> [B]

    It is MOPO's uncertainty. The norm has the reward's deviation in it, and the maximum is not over
    the elites alone.
    """
    # Paper: the norm of the variances. Here: that of their roots, as in MOPO's code.
    return std.norm(dim=-1).amax(0)


def log_sum_exp(q: Tensor, log_density: Tensor) -> Tensor:
    """log of the integral of exp Q(s, a) over a, but for the constant log K. -> [2, B]

    q [2, B, K] is at K actions per state. log_density [B, K], each of the distribution that its
    action was drawn from, corrects for how often actions were drawn (importance weights). The
    gradient is a softmax of q - log_density over the K actions: at equal densities descent lowers
    Q most where it is highest.
    """
    return (q - log_density).logsumexp(-1)


def expectation(q: Tensor) -> Tensor:
    """The mean of each critic over rows [2, rows] -> [2], or 0 without a row instead of NaN."""
    return q.sum(-1) / max(q.shape[-1], 1)


def bellman_target(batch: Batch, q_next: Tensor, gamma: float) -> Tensor:
    """r + gamma min_j Q'_j(s', a') -> [B]; after a terminal state r alone. q_next [2, B]

    Neither this nor the operator B^pi of the paper's section 2 has SAC's entropy term. The minimum
    is SAC's.
    """
    return batch.reward + gamma * (1 - batch.terminated) * q_next.amin(0)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """The Bellman error of Eq. (2), the sum over all critics: q [2, B], target [B]."""
    # mse_loss is a mean over the critics, too; times their number it is a sum.
    return 0.5 * len(q) * F.mse_loss(q, target.expand_as(q))


def policy_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """alpha log pi - min_j Q_j on average: q [2, B] and log_prob [B] at the policy's actions."""
    return (alpha * log_prob - q.amin(0)).mean()


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Its descent raises alpha while the entropy, the mean of -log_prob [B], is below target."""
    entropy = -log_prob.mean()
    return log_alpha * (entropy - target_entropy)


def model_loss(mean: Tensor, log_std: Tensor, target: Tensor) -> Tensor:
    """Gaussian negative log-likelihood of every member, [M, B, 1 + S] each. -> [M]

    It is doubled, without log(2 pi), and a mean over the 1 + S outputs instead of their sum.
    """
    nll = (mean - target).square() * torch.exp(-2 * log_std) + 2 * log_std
    return nll.mean((-2, -1))


@torch.no_grad()
def polyak(target: nn.Module, network: nn.Module, rate: float) -> None:
    """target += rate * (network - target), all parameters in one call."""
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), rate)


# ===== 4. The method ==============================================================================
class COMBO(nn.Module):
    """The state of training (networks, data, D_model, optimizers) and the steps of Algorithm 1.

    On a GPU `iterate`, `rollout` and `model_step` are recorded as CUDA graphs, so they never wait
    for a tensor's value and hold no `if` on what changes between calls.

    Variants of the method derive from this class, and their settings from Args. What their steps
    change must be a parameter or a buffer, made with its optimizer in __init__ or set_data; what
    they draw must be drawn by torch on self.device and stay a tensor. A CUDA graph freezes all
    else, and --resume does not restore it.
    """

    Model = ModelEnsemble
    Policy = GaussianPolicy
    Critic = TwinCritic
    acting = ("actor",)  # all networks that `act` uses; policy.pt holds these alone

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__()
        self.args = args
        self.device = device
        self.obs_dim = obs_dim
        self.action_dim = action_dim
        self.unfinished = {}  # where the long loops stand: --resume goes on within them
        self.model = self.build("model", self.Model, members=args.ensemble_size)
        # The elites imagine all transitions. The fit copies the best members of `model` to them.
        self.elites = self.build("elites", self.Model, members=args.num_elites)
        self.elites.requires_grad_(False)
        self.actor = self.build("actor", self.Policy)
        self.critic = self.build("critic", self.Critic)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        # A row of data or model_data is a Batch's fields side by side. The counters are tensors, so
        # that a CUDA graph can move them.
        self.field_sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        capacity = args.rollout_retain * args.rollout_starts * args.horizon
        self.register_buffer("model_data", torch.zeros(capacity, sum(self.field_sizes)))
        self.register_buffer("write_row", torch.zeros((), dtype=torch.long))  # of model_data
        self.register_buffer("num_model_rows", torch.zeros((), dtype=torch.long))  # filled so far
        self.to(device)

        self.actor_optimizer = self.adam(self.actor.parameters(), args.actor_lr)
        self.critic_optimizer = self.adam(self.critic.parameters(), args.critic_lr)
        self.temperature_optimizer = self.adam([self.log_alpha], args.alpha_lr)
        # Weights decay, biases and the bounds of the log-variance do not.
        biases = [layer.bias for layer in self.model.layers]
        groups = [{"params": [self.model.max_log_var, self.model.min_log_var, *biases]}]
        for layer, decay in zip(self.model.layers, args.model_weight_decay, strict=True):
            groups.append({"params": [layer.weight], "weight_decay": decay})
        self.model_optimizer = self.adam(groups, args.model_lr)

    def build(self, name: str, network: type, **options) -> nn.Module:
        """A new network. Its first weights depend only on the seed and on its name."""
        reseed(self.args.seed, name)
        return network(self.obs_dim, self.action_dim, self.args, **options).to(self.device)

    def adam(self, parameters, lr: float) -> torch.optim.Adam:
        """An optimizer that `capture` can record."""
        capturable = self.device.type == "cuda"
        return torch.optim.Adam(parameters, lr, fused=True, capturable=capturable)

    # --- data ---

    def set_data(self, dataset: dict[str, Tensor]) -> None:
        """Take what load_dataset gives. Not part of __init__: a saved policy acts without data."""
        # MOPO's paper: the dataset. MOPO's code: of the two million rows that the -v0 files of
        # medium-expert have, only the last million. Here: all rows.
        obs = dataset["obs"]
        next_obs = dataset["next_obs"]
        reward = dataset["reward"]
        terminated = dataset["terminated"].float()
        fields = [obs, dataset["action"], reward[:, None], next_obs, terminated[:, None]]
        self.data = torch.cat(fields, -1).to(self.device)  # D, [N, S + A + 1 + S + 1]

        # In a file without s' the s' of a row is the state of the next row. After a terminal row
        # that is another episode's, so s' is unknown, and s itself stands in for it: the critics'
        # target does not use it, and the model is not fitted to such rows.
        has_next = dataset["has_next"]
        self.rows_with_next = has_next.nonzero().squeeze(-1).to(self.device)  # row numbers
        lost = int((~has_next).sum())
        if lost:
            print(f"note: s' of {lost} terminals is not stored: the model never sees their rewards")

        # A state beyond this is outside the data: twice the largest |obs| of each dimension, or 100
        # if that is larger, since the rule of hopper ends an episode only at |obs| >= 100.
        farthest = torch.maximum(obs.abs(), next_obs.abs()).amax(0)
        self.obs_limit = (2 * farthest).clamp(min=100).to(self.device)

        self.episode_starts = dataset["starts"].to(self.device)  # first states, [episodes, S]

    def split(self, rows: Tensor) -> Batch:
        """Rows of data or model_data [B, S + A + 1 + S + 1] by field."""
        obs, action, reward, next_obs, terminated = rows.split(self.field_sizes, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def sample_data(self, count: int) -> Batch:
        """Uniform rows of D, with replacement."""
        rows = torch.randint(len(self.data), (count,), device=self.device)
        return self.split(self.data[rows])

    def sample_mixed(self) -> Batch:
        """B rows of d_f: a share f of D, then the rest of D_model."""
        num_real = real_rows(self.args)
        num_imagined = self.args.batch_size - num_real
        real = torch.randint(len(self.data), (num_real,), device=self.device)
        # Not randint: the number of rows changes, and a CUDA graph would freeze it. float32 has
        # 2**24 numbers between 0 and 1, too few for the rows of a larger D_model.
        exact = torch.float64 if len(self.model_data) > 2**24 else None
        draw = torch.rand(num_imagined, dtype=exact, device=self.device)
        row = (draw * self.num_model_rows).long()
        row = row.minimum(self.num_model_rows - 1)  # rand * n can round up to n
        return self.split(torch.cat([self.data[real], self.model_data[row]]))

    def remember(self, batch: Batch) -> None:
        """Write transitions over the oldest rows of D_model."""
        obs, action, reward, next_obs, terminated = batch
        rows = torch.cat([obs, action, reward[:, None], next_obs, terminated[:, None]], -1)
        place = self.write_row + torch.arange(len(rows), device=self.device)
        self.model_data.index_copy_(0, place % len(self.model_data), rows)
        self.write_row.add_(len(rows)).remainder_(len(self.model_data))
        self.num_model_rows.add_(len(rows)).clamp_(max=len(self.model_data))

    # --- one iteration ---

    def iterate(self) -> Scalars:
        """One iteration of Algorithm 1: critics, policy, temperature, targets."""
        batch = self.sample_mixed()
        alpha = self.log_alpha.detach().exp()

        # The critics step towards one target. Besides, the gap lowers Q on rho and raises it on the
        # data.
        target = self.q_target(batch)  # [B]
        q = self.critic(batch.obs, batch.action)  # [2, B]
        gap = self.conservative_gap(batch, q)  # [2]
        bellman_error = critic_loss(q, target)
        q_loss = bellman_error + self.args.beta * gap.sum()  # Eq. (2)
        self.critic_optimizer.zero_grad()
        q_loss.backward()
        self.critic_optimizer.step()

        # The policy raises Q and its entropy. Its loss passes through the critics; `inputs` keeps
        # the gradient to the policy.
        # Paper: at states of rho in Eq. (3), of d_f in Algorithm 1; an entropy term is optional.
        # Here: at those of d_f, the whole batch, and with SAC's entropy.
        action, log_prob = self.actor.sample(batch.obs)  # [B, A], [B]
        actor_loss = policy_loss(self.critic(batch.obs, action), log_prob, alpha)  # Eq. (3)
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=parameters_of(self.actor_optimizer))
        self.actor_optimizer.step()

        # The temperature steers the entropy of the policy to its target.
        alpha_loss = temperature_loss(self.log_alpha, log_prob.detach(), self.args.target_entropy)
        self.temperature_optimizer.zero_grad()
        alpha_loss.backward()
        self.temperature_optimizer.step()

        polyak(self.critic_target, self.critic, self.args.tau)
        # The gap is a difference: it does not tell whether Q fell on D_model or rose on the data.
        # So the means of Q on both are logged, too.
        num_real = real_rows(self.args)
        return {
            "losses/critic_loss": bellman_error.detach(),
            "losses/conservative_gap": gap.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
            "losses/entropy": -log_prob.detach().mean(),
            "losses/alpha": alpha,
            "q_values/data": expectation(q[:, :num_real].detach()).mean(),
            "q_values/model": expectation(q[:, num_real:].detach()).mean(),
        }

    @torch.no_grad()
    def q_target(self, batch: Batch) -> Tensor:
        """What the critics step towards. -> [B]"""
        next_action, _ = self.actor.sample(batch.next_obs)
        q_next = self.critic_target(batch.next_obs, next_action)  # [2, B]
        return bellman_target(batch, q_next, self.args.gamma)

    def conservative_gap(self, batch: Batch, q: Tensor) -> Tensor:
        """The gap in the loss: a soft maximum of Q on rho - the mean of Q on D. -> [2]

        It is of each critic; q [2, B] is at the batch.
        """
        # Paper: Q at an action of the policy. Recalled: as in CQL, a soft maximum of Q over uniform
        # actions and the policy's.
        rho = self.rows_of_rho(batch)
        actions, log_density = self.proposals(rho.obs, rho.next_obs)
        soft_q = log_sum_exp(self.q_of_actions(rho.obs, actions), log_density)  # [2, rows of rho]
        q_data = q[:, : real_rows(self.args)]  # the batch begins with the data
        return expectation(soft_q) - expectation(q_data)

    def rows_of_rho(self, batch: Batch) -> Batch:
        """The rows of a batch whose states are rho's: all of them, or those of D_model alone."""
        # Paper: states of rollouts of pi, to which the data's are added for stability. Recalled: on
        # hopper none of the data's. Here: the rollouts are those of mu, the only ones in D_model,
        # so with --rollout-actions uniform they are not pi's.
        if self.args.rho_states == "mixed":
            return batch
        num_real = real_rows(self.args)
        return Batch(*(field[num_real:] for field in batch))

    @torch.no_grad()
    def proposals(self, obs: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """3 n actions per state [B, 3 n, A] and their log-densities [B, 3 n].

        n are uniform, n are of pi(.|s), and n of pi(.|s'), as in OfflineRL-Kit and d3rlpy.
        """
        n = self.args.num_actions
        shape = (len(obs), n, self.action_dim)
        uniform = 2 * torch.rand(shape, device=self.device) - 1
        log_volume = self.action_dim * math.log(2)  # of the box [-1, 1]^A
        uniform_density = torch.full(shape[:2], -log_volume, device=self.device)
        action, log_density = self.actor.samples(obs, n)
        next_action, next_log_density = self.actor.samples(next_obs, n)
        actions = torch.cat([uniform, action, next_action], 1)
        log_densities = torch.cat([uniform_density, log_density, next_log_density], 1)
        return actions, log_densities

    def q_of_actions(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Both critics at K actions per state: [B, S], [B, K, A] -> [2, B, K]."""
        count = actions.shape[1]
        q = self.critic(obs.repeat_interleave(count, 0), actions.flatten(0, 1))  # [2, B K]
        return q.unflatten(1, (-1, count))

    # --- what the critics believe, for logs and --select ---

    @torch.no_grad()
    def start_values(self) -> Scalars:
        """Q at the first states of the data's episodes: Prop. 4.1 bounds its mean there.

        The action is the mean of the policy's Gaussian, through the tanh.
        """
        mean, _ = self.actor(self.episode_starts)
        q = self.critic(self.episode_starts, torch.tanh(mean))
        return {"q_values/starts": q.mean()}

    @torch.no_grad()
    def final_numbers(self) -> dict[str, float]:
        """The paper's E_rho[Q] - E_D[Q] at the end of training, which --select compares.

        It needs no environment. rho has the states that the critics' loss takes, and as in the
        paper's text one action of the policy each, not the soft maximum of the loss and of
        losses/conservative_gap. About 10,000 rows (ours), mean of both critics.
        """
        reseed(self.args.seed, "final numbers")
        num_real = real_rows(self.args)
        gaps = []
        for _ in range(math.ceil(10_000 / self.args.batch_size)):
            batch = self.sample_mixed()
            rho = self.rows_of_rho(batch)
            action, _ = self.actor.sample(rho.obs)
            q_rho = self.critic(rho.obs, action)
            q_data = self.critic(batch.obs[:num_real], batch.action[:num_real])
            gaps.append(expectation(q_rho) - expectation(q_data))
        return {"conservative_gap": float(torch.stack(gaps).mean())}

    # --- steps and rollouts in the model ---

    def imagine(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step in the model: reward [B], next_obs [B, S], terminated [B] (0 or 1)."""
        reward, next_obs = self.elites.sample(obs, action)
        # MOPO's paper: does not say. MOPO's code: the task's own rule of ending, of hopper and
        # walker2d, for example; halfcheetah never ends.
        ended = known_termination(self.args.env_id, next_obs)
        return self.end_outside_data(reward, next_obs, ended)

    def end_outside_data(
        self, reward: Tensor, next_obs: Tensor, ended: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step to a state beyond obs_limit, or to NaN, ends, too; the state is cut to the limit.

        -> reward [B], next_obs [B, S], terminated [B] (0 or 1)
        """
        # MOPO's paper: does not say. MOPO's code: none of it. Here: this, since such states would
        # overflow the critics.
        inside = (next_obs.abs() <= self.obs_limit).all(-1)  # false for NaN
        reward = reward.nan_to_num(0.0, 0.0, 0.0)
        next_obs = next_obs.nan_to_num(0.0).clamp(-self.obs_limit, self.obs_limit)
        return reward, next_obs, (~inside | ended).float()

    def rollout_action(self, obs: Tensor) -> Tensor:
        """The actions in rollouts, the policy's or uniform ones: [B, S] -> [B, A]."""
        action, _ = self.actor.sample(obs)
        if self.args.rollout_actions == "uniform":
            return 2 * torch.rand_like(action) - 1
        return action

    @torch.no_grad()
    def rollout(self) -> Scalars:
        """Write `rollout_starts` rollouts of `horizon` steps in the model to D_model.

        Rollouts start at states of the data. They run side by side.
        """
        # MOPO's code: rollouts that end are not replaced. Here: one that ends is replaced at once,
        # so that every step writes the same number of rows.
        args = self.args
        part = 500 if self.device.type == "cpu" else args.rollout_starts  # stays in a CPU's cache
        all_terminated = []
        all_rewards = []
        for first in range(0, args.rollout_starts, part):
            obs = self.sample_data(min(part, args.rollout_starts - first)).obs
            for _ in range(args.horizon):
                action = self.rollout_action(obs)
                reward, next_obs, terminated = self.imagine(obs, action)
                all_rewards.append(reward)
                self.remember(Batch(obs, action, reward, next_obs, terminated))
                restart = self.sample_data(len(obs)).obs
                obs = torch.where(terminated[:, None] > 0, restart, next_obs)
                all_terminated.append(terminated)
        return {
            "rollout/terminated_frac": torch.cat(all_terminated).mean(),
            "rollout/reward": torch.cat(all_rewards).mean(),
        }

    # --- fitting the model ---

    def fit_model(self, progress: Progress) -> Tensor:
        """Fit the model, once. -> hold-out errors [M]

        Every member has a bootstrap sample of the rows of its own, which it sees once per epoch, in
        a new order. It keeps the weights of its best epoch. The fit ends when for `model_patience`
        epochs no member has improved by 1 %. A resumed fit begins where it stopped (`go_on`).
        """
        args = self.args
        model = self.model

        # 1. Inputs [N', S + A] and targets [N', 1 + S] of the N' rows whose s' is known.
        inputs, targets = model.inputs_and_targets(self.split(self.data[self.rows_with_next]))
        held_out, train_rows = self.split_rows(len(inputs))
        model.set_statistics(inputs[train_rows])
        inputs = model.standardise(inputs)

        # 2. Epochs of steps. After each, the members are judged on the held-out rows.
        shape = (model.members, len(train_rows))
        bootstrap = train_rows[torch.randint(len(train_rows), shape, device=self.device)]
        order = bootstrap.clone()  # the rows in the epoch's order, written in place for `capture`
        position = torch.zeros((), dtype=torch.long, device=self.device)  # in that order, likewise
        step = capture(functools.partial(self.model_step, inputs, targets, order, position), args)
        best_error = torch.full((model.members,), 1e32, device=self.device)  # inf would give NaN
        best_layers = copy.deepcopy(model.layers.state_dict())
        phase = f"model fit, patience {args.model_patience} epochs"
        loop = go_on(self, phase, (0, 0, best_error, best_layers))
        first_epoch, idle_epochs, best_error, best_layers = loop
        for epoch in range(first_epoch, args.model_max_epochs):
            if idle_epochs >= args.model_patience:
                break
            self.shuffle(bootstrap, order, position, epoch)
            for _ in range(math.ceil(len(train_rows) / args.model_batch_size)):
                logs = step()
            error = self.holdout_error(inputs[held_out], targets[held_out])  # [M]
            improved = (best_error - error) / best_error > 0.01  # [M]
            best_error = torch.where(improved, error, best_error)
            for name, tensor in model.layers.state_dict().items():
                best_layers[name][improved] = tensor[improved]  # the first axis is the member
            idle_epochs = 0 if improved.any() else idle_epochs + 1
            judged = {"model/holdout_error": error.mean(), "model/idle_epochs": idle_epochs}
            self.unfinished[phase] = (epoch + 1, idle_epochs, best_error, best_layers)
            progress(phase, epoch + 1, None, logs | judged)
        model.layers.load_state_dict(best_layers)  # the bounds stay at their last values
        self.choose_elites(best_error)
        return best_error

    def split_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """A random split of the numbers below `count`: rows held out, rows to train on."""
        reseed(self.args.seed, "model split")
        rows = torch.randperm(count).to(self.device)
        held_count = min(count // 5, self.args.holdout_size)
        return rows[:held_count], rows[held_count:]

    def shuffle(self, bootstrap: Tensor, order: Tensor, position: Tensor, epoch: int) -> None:
        """Write the rows `bootstrap` [M, n] in a new order to `order`, and start at its front."""
        reseed(self.args.seed, "model fit", epoch)
        permutation = torch.rand(bootstrap.shape, device=self.device).argsort(-1)
        torch.gather(bootstrap, -1, permutation, out=order)
        position.zero_()

    def model_step(
        self, inputs: Tensor, targets: Tensor, order: Tensor, position: Tensor
    ) -> Scalars:
        """One Adam step of all members, each on the next rows of its `order` [M, n].

        The last batch of an epoch is filled up with its first rows, so that all have one shape.
        """
        model = self.model
        batch_size = self.args.model_batch_size
        columns = position + torch.arange(batch_size, device=self.device)
        rows = order.index_select(1, columns % order.shape[1])  # [M, B]
        position.add_(batch_size)
        loss = self.fit_loss(inputs[rows], targets[rows])  # [M]
        # As in PETS the learned bounds are pulled together by 0.01 times their gap.
        gap = (model.max_log_var - model.min_log_var).sum()
        self.model_optimizer.zero_grad()
        (loss.sum() + 0.01 * gap).backward()
        self.model_optimizer.step()
        return {"model/train_nll": loss.detach().mean()}

    def fit_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What the fit minimises, of inputs x and targets y [M, B, ...]. -> [M]"""
        mean, log_std = self.model(x)
        return model_loss(mean, log_std, y)

    @torch.no_grad()
    def holdout_error(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared error of every member on held-out rows x, y [n, ...]; not likelihood. -> [M]"""
        mean, _ = self.model(x.expand(self.model.members, -1, -1))
        return (mean - y).square().mean((-2, -1))

    @torch.no_grad()
    def choose_elites(self, error: Tensor) -> None:
        """Copy the `num_elites` members with the lowest hold-out error [M] to `elites`."""
        best = error.argsort()[: self.args.num_elites]
        state = self.model.state_dict()
        for name in state:
            if name.startswith("layers"):  # nothing else has an axis of members
                state[name] = state[name][best]
        self.elites.load_state_dict(state)

    # --- acting ---

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """How the policy acts when it is evaluated: obs [n, S] -> actions [n, A] in [-1, 1].

        It takes the mean of the Gaussian, through the tanh.
        """
        states = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        mean, _ = self.actor(states)
        return torch.tanh(mean).cpu().numpy()


# ===== 5. Training ================================================================================
def check_args(args: Args) -> None:
    """Stop on settings that make no sense or contradict each other. Raises SystemExit."""
    check_ranges(args)
    if args.num_elites > args.ensemble_size:
        sys.exit("--num-elites is larger than --ensemble-size")
    if len(args.model_weight_decay) != 5:
        sys.exit("--model-weight-decay needs a number for each of the five layers")
    num_real = real_rows(args)
    if num_real < 1:
        sys.exit("a batch needs a row of data: raise --real-fraction or --batch-size")
    if args.rho_states == "model" and num_real == args.batch_size:
        sys.exit("--rho-states model needs rows of D_model in a batch: lower --real-fraction")


def real_rows(args: Args) -> int:
    """How many rows of a batch are data."""
    return int(args.real_fraction * args.batch_size)


def train(args: Args, method: type = COMBO, arrays: dict[str, np.ndarray] | None = None) -> dict:
    """Algorithm 1, on the dataset that `args` name, or on D4RL's `arrays`. -> result.json

    `method` is the class to train: COMBO, or one derived from it.
    """
    check_args(args)
    dataset = load_dataset(args, arrays)
    obs_dim = dataset["obs"].shape[1]
    action_dim = dataset["action"].shape[1]
    combo = method(args, obs_dim, action_dim, choose_device(args))
    combo.set_data(dataset)
    run = Run(args, combo, dataset["source"])  # it goes on from a checkpoint under --resume
    iterate = capture(combo.iterate, args)
    rollout = capture(combo.rollout, args)

    if run.iteration == 0 and args.dynamics_from:
        load_model(combo, args.dynamics_from, dataset["source"], run.folder)
    elif run.iteration == 0:
        error = combo.fit_model(run.progress)
        save_model(combo, error, run.folder, dataset["source"])

    rollout_logs = {}
    while run.iteration < args.total_iterations:
        i = run.iteration
        if i % args.rollout_every == 0:
            reseed(args.seed, "rollout", i)  # its draws do not shift those of the iterations
            rollout_logs = rollout()  # into D_model
            reseed(args.seed, "iterations", i)
        logs = iterate()  # Eq. (2), (3)

        run.advance()  # from here on run.iteration counts this one, too
        last = run.iteration == args.total_iterations
        save_now = last or run.iteration % args.checkpoint_every == 0
        if run.iteration % args.log_every == 0 or save_now:
            start_logs = combo.start_values()
            # It stops the run at NaN, so that no checkpoint holds one.
            run.log("training", logs | rollout_logs | start_logs)
        if run.iteration % args.eval_every == 0 or last:
            run.add_to_curve()
        if save_now:
            run.save_checkpoint()
    return run.finish()


# The flags that may differ between the runs that --select compares, beside beta and f. None of them
# changes what training does, but for the seed, and dynamics_from, which may bring another fit.
MAY_DIFFER = (
    "seed", "dataset_path", "run_dir", "resume", "evaluate", "select", "probe_uncertainty",
    "dynamics_from", "eval_every", "eval_episodes", "final_episodes", "track", "wandb_project_name",
    "wandb_entity", "capture_video", "log_every", "checkpoint_every", "async_envs", "cuda",
    "cuda_graphs", "tf32", "cpu_fast_matmul", "threads",
)  # fmt: skip


def select(folders: tuple[str, ...]) -> str:
    """Choose beta and f as in the paper's section 3: the lowest E_rho[Q] - E_D[Q]. -> its folder

    `folders` are those of finished runs. The scores are not looked at. Raises SystemExit where the
    runs cannot be compared.
    """
    results = []
    for folder in folders:
        with loading(Path(folder) / "result.json") as result:
            if not math.isfinite(result.get("conservative_gap", math.nan)):
                sys.exit(f"{folder} has no conservative_gap: is it a run of combo.py?")
            results.append(result)
            check_comparable(folder, result, folders[0], results[0])
    gaps = [result["conservative_gap"] for result in results]
    chosen = folders[gaps.index(min(gaps))]
    print("    beta  real_fraction  conservative_gap  run")
    for folder, result, gap in zip(folders, results, gaps):
        beta = result["args"]["beta"]
        fraction = result["args"]["real_fraction"]
        print(f"{beta:8g}  {fraction:13g}  {gap:16.3f}  {folder}")
    print(f"chosen, with the lowest conservative_gap: {chosen}")
    return chosen


def check_comparable(folder: str, result: dict, first_folder: str, first: dict) -> None:
    """Stop unless two runs differ in beta, f and MAY_DIFFER alone. Raises SystemExit."""
    if result["kind"] != first["kind"]:
        sys.exit(f"{folder} is a run of {result['kind']}, {first_folder} of {first['kind']}")
    if result["env_id"] != first["env_id"]:
        sys.exit(f"{folder} is on {result['env_id']}, {first_folder} on {first['env_id']}")
    if result["sha256"] != first["sha256"]:
        sys.exit(f"{folder} and {first_folder} are on other data: the files' sha256 differ")
    for name, value in result["args"].items():
        if name not in ("beta", "real_fraction", *MAY_DIFFER) and value != first["args"].get(name):
            other = first["args"].get(name)
            sys.exit(f"{folder} has {name} {value}, {first_folder} has {other}: --select needs one")


@torch.no_grad()
def probe(args: Args, method: type = COMBO) -> dict:
    """Like Figure 2: what the model says of its error, and its true error, on held-out rows.

    The first is `largest_std`. The second (ours) is how far the mean of the elites is from (reward,
    next state - state). Both are in the data's units, where the paper scales its axes to [0, 1].
    Writes uncertainty.json, which is returned, and uncertainty.png to the run's folder.
    """
    folder = Path(args.probe_uncertainty)
    combo = load_fit(folder, args.dataset_path, type(args), method)
    held_out, _ = combo.split_rows(len(combo.rows_with_next))
    batch = combo.split(combo.data[combo.rows_with_next[held_out]])
    _, targets = combo.model.inputs_and_targets(batch)
    _, std = combo.model.predict_by_all(batch.obs, batch.action)
    mean, _ = combo.elites.predict_by_all(batch.obs, batch.action)
    uncertainty = largest_std(std).double().numpy()
    error = (mean.mean(0) - targets).norm(dim=-1).double().numpy()

    slope, intercept = np.polyfit(uncertainty, error, 1)
    result = {
        "rows": len(held_out),
        "slope": slope,
        "intercept": intercept,
        "r2": np.corrcoef(uncertainty, error)[0, 1] ** 2,
        "uncertainty": uncertainty.tolist(),
        "error": error.tolist(),
    }
    save(result, folder / "uncertainty.json")
    plot_uncertainty(folder / "uncertainty.png", result, combo.args.env_id)
    line = f"error = {slope:.3g} * std + {intercept:.3g}, R2 = {result['r2']:.3f}"
    print(f"{len(held_out)} held-out rows: {line}")
    return result


def load_fit(run: Path, dataset_path: str | None, settings: type, method: type) -> nn.Module:
    """A method with a run's model and its data, or those at another path, on the CPU.

    Its seed and holdout_size are those of the run that fitted the model, so that `split_rows` holds
    out the same rows.
    """
    args = load_args(run, settings)
    with loading(run / "model.pt") as fitted:  # perhaps by a run of mopo.py
        args = dataclasses.replace(
            args,
            seed=fitted["seed"],
            holdout_size=fitted["holdout_size"],
            dataset_path=dataset_path or args.dataset_path,
            rollout_starts=1,  # a small D_model, since none is needed
        )
    dataset = load_dataset(args)
    obs_dim = dataset["obs"].shape[1]
    action_dim = dataset["action"].shape[1]
    combo = method(args, obs_dim, action_dim, torch.device("cpu"))
    combo.set_data(dataset)
    load_model(combo, run, dataset["source"])
    return combo


def plot_uncertainty(path: Path, result: dict, title: str) -> None:
    """Draw what `probe` found, a point per row, and its line of least squares."""
    x = np.sort(result["uncertainty"])
    line = result["slope"] * x + result["intercept"]
    axes = Figure(layout="constrained").subplots()
    axes.scatter(result["uncertainty"], result["error"], s=6, alpha=0.4, linewidths=0)
    axes.plot(x, line, color="black", label=f"least squares, R2 = {result['r2']:.2f}")
    axes.legend(title=title)
    axes.set(xlabel="largest predicted deviation of a member", ylabel="true one-step error")
    save(axes.figure, path)


def main(settings: type = Args, method: type = COMBO) -> None:
    """The command line: train, or look at finished runs.

    --select chooses one of them, --probe-uncertainty draws the errors of one's model, and
    --evaluate scores one's policy.
    """
    args = parse_args(settings)
    if args.select is not None:
        select(args.select)
    elif args.probe_uncertainty:
        probe(args, method)
    elif args.evaluate:
        policy = load_policy(args.evaluate, settings, method)
        scores = evaluate(policy, args, args.final_episodes, k=0)  # the final one
        report(policy, args, scores, Path(args.evaluate))
    else:
        with enough_memory():
            train(args, method)


# ===== Appendix: the generalisation tasks of MOPO and COMBO, the same in mopo.py and combo.py =====
class HalfCheetahJumpEnv(HalfCheetahEnv):
    """halfcheetah-jump: no faster than 3 m/s, and the higher the better. It never terminates.

    An observation [18] is qpos but x [8], the height of the torso in m [1], and qvel [9].
    info["behaviour_reward"] is the reward of the task that the data's policy was trained on.
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
        behaviour = min(info["x_velocity"], 3.0) + info["reward_ctrl"]  # that is, - 0.1 |a|^2
        jump = 15.0 * (obs[8] - self.first_height)
        info["behaviour_reward"] = float(behaviour)
        return obs, float(behaviour + jump), terminated, truncated, info


class AntAngleEnv(AntEnv):
    """ant-angle: run at 30 degrees to the x axis, on data from a run along it.

    An observation [27] is qpos but x and y [13], and qvel [14]. It terminates as Ant does, when the
    torso leaves heights from 0.2 to 1 m. The velocity is the torso's way during the step over its
    time.
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


for name, kind in (("halfcheetah-jump-v0", HalfCheetahJumpEnv), ("ant-angle-v0", AntAngleEnv)):
    if name not in gymnasium.registry:  # else another script with the same text was there first
        gymnasium.register(name, kind, max_episode_steps=1000)


# ===== Appendix, the same in ampl.py, mopo.py and combo.py: may be skipped ========================
# Nothing here is part of the method. The sections stand about in the order in which a run meets
# them:
#   A. command line      the settings of the run
#   B. data              a file of D4RL or of Minari, as transitions
#   C. environments      D4RL's tasks, their rules of ending and their reference scores
#   D. device            the GPU or the CPU, CUDA graphs, seeds
#   E. evaluation        scores of a policy, and an episode as a moving picture
#   F. the run's folder  what a run writes, and how --resume and --evaluate read it
# The method uses above all:
#   load_dataset         the transitions of a D4RL or Minari file, checked
#   make_env             the simulator of a task
#   known_termination    a task's own rule of ending
#   reseed               a seed for each phase, so that no phase shifts the draws of another
#   capture              on a GPU, a step recorded as a CUDA graph; on a CPU, the step itself
#   Run                  a run's folder: progress, logs, evaluations, checkpoints


# ===== A. Command line ============================================================================
# A setting is what its flag says, else what a derived class of settings says, else what the task's
# row of `PAPER` says, else what `Args` says.
# --resume and --evaluate start from the settings of a saved run, and let only a few flags be new.
# The data must be the same, by sha256. Another machine may have fewer cores than --threads.
NEW_WITH_RESUME = ("total_iterations", "dataset_path", "threads")
NEW_WITH_EVALUATE = (
    "seed", "eval_episodes", "final_episodes", "async_envs", "capture_video", "threads",
)  # fmt: skip


def parse_args(settings: type = Args, argv: list[str] | None = None) -> Args:
    """The settings that a command line asks for. Raises SystemExit where it has a mistake.

    The command line is read twice. A first look finds the task, or the saved run; the defaults
    of the second look are the settings of that task or run, so that --help shows them.
    """
    if sys.stderr is None:  # some of the libraries cannot do without, nor could a mistake be said
        print("standard error is closed: send it somewhere, as with 2>/dev/null")
        sys.exit(1)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that it cannot print
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.excepthook = functools.partial(say_how_to_go_on, None)
    hide_unused_flags(settings)
    first, _ = tyro.cli(settings, args=argv, add_help=False, return_unknown_args=True)
    first = expand_home(first)
    if first.resume is not None:
        sys.excepthook = functools.partial(say_how_to_go_on, Path(first.resume))
        default = dataclasses.replace(load_args(first.resume, settings), resume=first.resume)
    elif first.evaluate is not None:
        default = dataclasses.replace(load_args(first.evaluate, settings), evaluate=first.evaluate)
    else:
        default = task_args(first.env_id, settings)

    args = tyro.cli(
        settings,
        args=argv,
        default=default,
        description=help_header(settings),
        config=(tyro.conf.SuppressFixed,),
    )
    args = expand_home(args)
    if first.resume is not None:
        refuse_new_flags("--resume", args, default, NEW_WITH_RESUME)
    elif first.evaluate is not None:
        refuse_new_flags("--evaluate", args, default, NEW_WITH_EVALUATE)
    if args.track:
        package = importlib.util.find_spec("wandb")
        if package is None or package.origin is None:  # a mere folder of that name has no origin
            sys.exit("--track needs Weights and Biases: pip install wandb")
    check_args(args)
    return args


def expand_home(args: Args) -> Args:
    """The settings with the home folder in place of a ~ at the beginning of a text.

    Raises SystemExit where a text is empty, as "$FOLDER" is without such a variable.
    """
    changes = {}
    for name, value in vars(args).items():
        if value == "":
            flag = "--" + name.replace("_", "-")
            sys.exit(f"{flag} is '', but must be a text that is not empty")
        if isinstance(value, str) and value.startswith("~"):
            changes[name] = os.path.expanduser(value)
    return dataclasses.replace(args, **changes)


def expanded(path: str | Path) -> Path:
    """A path with the home folder in place of a ~. Raises SystemExit where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        sys.exit(f"there is no home folder for {path}: set the variable HOME")


def help_header(settings: type) -> str:
    """What --help begins with: the first two sentences of the script, and its usual commands."""
    module = sys.modules[settings.__module__]
    sentences = " ".join((module.__doc__ or "").split()).split(". ")[:2]
    script = Path(sys.argv[0]).name
    commands = [
        f"python {script} --env-id {settings.env_id}",
        f"python {script} --resume runs/<run>",
        f"python {script} --evaluate runs/<run> --capture-video",
    ]
    marks = "In brackets: where a default is from. Those marked (task) depend on --env-id."
    return "\n\n".join([". ".join(sentences) + ".", *commands, marks])


def task_args(env_id: str, settings: type = Args, **flags) -> Args:
    """Settings of a task: `flags`, else a derived class's own, else PAPER's, else `Args`'s.

    A derived class's own defaults are those that differ from `Args`'s.
    """
    chosen = {"env_id": env_id}
    if env_id in PAPER:
        for name, value in zip(PAPER_FLAGS, PAPER[env_id], strict=True):
            if getattr(settings, name) == getattr(Args, name):
                chosen[name] = value
    chosen.update(flags)
    return settings(**chosen)


def check_ranges(args: Args) -> None:
    """Stop where a setting is none of the values that its type names. Raises SystemExit."""
    check_fields(args)
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        flag = "--" + name.replace("_", "-")
        value = getattr(args, name)
        check_value(flag, value, kind)
        try:
            text = json.dumps(value, ensure_ascii=False).encode()
            comes_back = from_json(text) == value
        except (TypeError, ValueError):
            comes_back = False
        if not comes_back:
            allowed = "a number, a text in UTF-8, True, False, None or a tuple of these"
            sys.exit(f"{flag} is {value!r}, which args.json cannot hold: it holds {allowed}")


def from_json(text: str | bytes):
    """What a JSON text holds, with tuples for its lists."""
    return as_tuples(json.loads(text))


def as_tuples(value):
    """A value of JSON's with tuples for its lists, also for lists in lists and in a dict."""
    if isinstance(value, list):
        return tuple(as_tuples(entry) for entry in value)
    if isinstance(value, dict):
        return {key: as_tuples(entry) for key, entry in value.items()}
    return value


def check_value(flag: str, value, kind: type) -> None:
    """Stop unless a value is of a type, of those that `Args` has. Raises SystemExit."""
    limit = Range(-1e9)
    if type(None) in get_args(kind):  # X | None
        if value is None:
            return
        kind = get_args(kind)[0]
    if get_origin(kind) is Annotated:
        kind, *extras = get_args(kind)
        for extra in extras:
            if isinstance(extra, Range):
                limit = extra

    if get_origin(kind) is Literal and value not in get_args(kind):
        sys.exit(f"{flag} is {value!r}, but must be one of {get_args(kind)}")
    if get_origin(kind) is tuple:  # all entries have the type of the first
        entries = get_args(kind)
        if not isinstance(value, tuple):
            sys.exit(f"{flag} is {value!r}, but must be a tuple")
        if not value:
            sys.exit(f"{flag} needs at least one value")
        if Ellipsis not in entries and len(value) != len(entries):
            sys.exit(f"{flag} is {value}, but must have {len(entries)} numbers")
        for entry in value:
            check_value(flag, entry, entries[0])
    if kind is bool and not isinstance(value, bool):
        sys.exit(f"{flag} is {value!r}, but must be True or False")
    if kind is str and not (isinstance(value, str) and value):
        sys.exit(f"{flag} is {value!r}, but must be a text that is not empty")
    if kind in (int, float):
        check_number(flag, value, kind, limit)


def check_number(flag: str, number: float, kind: type, limit: Range) -> None:
    """Stop unless it is a finite number of this kind, within its limit. Raises SystemExit."""
    whole = isinstance(number, int) and not isinstance(number, bool)
    if kind is int and not whole:
        sys.exit(f"{flag} is {number!r}, but must be a whole number")
    fractional = isinstance(number, float) and not math.isnan(number)
    if not (whole or fractional):
        sys.exit(f"{flag} is {number!r}, but must be a number")
    too_low = number < limit.low or (number == limit.low and not limit.low_is_allowed)
    if too_low or number > limit.high:
        least = "at least" if limit.low_is_allowed else "above"
        most = f" and at most {limit.high:.10g}"
        sys.exit(f"{flag} is {number}, but must be {least} {limit.low:.10g}{most}")


def check_fields(args: Args) -> None:
    """Stop where a derived class of settings changed a default in vain. Raises SystemExit."""
    kind = type(args)
    for field in dataclasses.fields(kind):
        if getattr(kind, field.name, field.default) != field.default:
            advice = f"put @dataclasses.dataclass above {kind.__name__} and a type behind the name"
            sys.exit(f"the default of {field.name} in {kind.__name__} has no effect: {advice}")


def lasting_settings(args: Args) -> dict:
    """The settings as args.json gives them back: with absolute paths, and without `resume`."""
    settings = vars(args) | {"resume": None}
    for name in ("dataset_path", "dynamics_from"):  # --resume may be called from another folder
        if settings[name]:
            settings[name] = str(expanded(settings[name]).absolute())
    return from_json(json.dumps(settings))


def note_changes(args: Args) -> None:
    """Say in which settings of `PAPER` the run differs from the task's row."""
    changes = []
    row = task_args(args.env_id)
    for name in PAPER_FLAGS:
        value = getattr(row, name)
        if args.env_id in PAPER and getattr(args, name) != value:
            changes.append(f"{name} is {getattr(args, name)} and not {value}")
    if changes:
        print(f"note: unlike PAPER's row of {args.env_id}, " + ", ".join(changes))


def hide_unused_flags(settings: type) -> None:
    """Take away the flags that a variant of the method has no use for.

    The variant's class of settings names them in a tuple without a type, by how the names of fields
    begin: without = ("noise_", "q_min_weight").
    """
    unused = getattr(settings, "without", ())
    if not isinstance(unused, tuple):
        sys.exit(f"`without` of {settings.__name__} must be a tuple: without = ('noise_',)")
    names = [field.name for field in dataclasses.fields(settings)]
    for beginning in unused:
        if not any(name.startswith(beginning) for name in names):
            sys.exit(f"`without` of {settings.__name__}: no setting begins with {beginning}")
    for field in dataclasses.fields(settings):
        if field.name.startswith(unused):
            settings.__annotations__[field.name] = tyro.conf.Fixed[field.type]


def say_how_to_go_on(run: Path | None, kind: type, error: BaseException, trace) -> None:
    """Python's hook for what nobody catches: Ctrl-C becomes a line, also in the folder of a run.

    So does that nobody takes what is printed, as `head` does after ten lines.
    """
    if issubclass(kind, KeyboardInterrupt):
        end = "stopped"
    elif issubclass(kind, OSError) and not can_print():
        end = f"stopped, since nothing more can be printed ({error.strerror})"
    else:
        sys.__excepthook__(kind, error, trace)
        return
    if run is not None and (run / "checkpoint.pt").exists():
        command = shlex.join(["python", sys.argv[0], "--resume", str(run)])
        tqdm.write(f"{end}; this goes on from the last checkpoint: {command}", file=sys.stderr)
    else:
        tqdm.write(f"{end}, with no checkpoint to go on from: start it again", file=sys.stderr)


def can_print() -> bool:
    """Whether standard output takes more. If not, it leads nowhere from now on."""
    try:
        print(flush=True)  # an empty line
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def refuse_new_flags(mode: str, args: Args, saved: Args, may_be_new: tuple[str, ...]) -> None:
    """Beside --resume or --evaluate (`mode`) most settings are those of the saved run."""
    for name, value in vars(args).items():
        if name not in may_be_new and value != getattr(saved, name):
            flag = "--" + name.replace("_", "-")
            sys.exit(f"{mode} takes {flag} from the run: leave that flag out")


# ===== B. Data ====================================================================================
# A dataset is found, read, checked and turned into transitions, each by functions of its own. It is
# a file of D4RL, or one of Minari that is brought into D4RL's form: arrays with a row per step.
def load_dataset(args: Args, arrays: dict[str, np.ndarray] | None = None) -> dict:
    """The dataset that `args` name, or D4RL's `arrays`, as N transitions. Raises SystemExit.

        obs          [N, S]
        action       [N, A]   in [-1, 1]
        reward       [N]
        next_obs     [N, S]
        terminated   [N]      did the task end here? (A time limit is no end.)
        has_next     [N]      is next_obs truly the state that followed?
        next_row     [N]      the number of the transition that followed, or -1
        starts       [E, S]   the first states of all E episodes
        source       a dict   which data this is, and its mean score, for result.json

    All tensors are on the CPU. The example above `to_transitions` explains the last three of them.
    """
    env = try_env(args.env_id)  # comes first, so that a mistyped id costs no download
    path = find_dataset(args) if arrays is None else Path("arrays")
    if arrays is None:
        raw, unused, sha256 = read_hdf5(path)
    else:
        raw, unused, sha256 = take_arrays(path, arrays)
    end_keys = check_arrays(path, raw, env)
    check_episodes(path, raw)
    note_contradictions(raw, env.get_wrapper_attr("_max_episode_steps"))
    origin = "arrays" if arrays is not None else origin_of(path, sha256)
    print(f"data from {origin}")
    source = {
        "dataset": str(path),
        "obtained_from": origin,
        "sha256": sha256,
        "rows": len(raw["rewards"]),
        "data_score": describe(path, raw, args.env_id),
    }
    data = to_transitions(raw)
    describe_rows(path, raw, data, end_keys, unused)
    note_rule(args.env_id, data)
    note_still_entries(data)
    check_rewards(path, data["reward"][data["has_next"]])
    return data | {"source": source}


def check_rewards(path: Path, reward: Tensor) -> None:
    """Stop if the rewards of the rows whose s' is known teach nothing. Raises SystemExit."""
    if len(reward) == 0:
        sys.exit(f"{path}: no row has a known s': store next_observations")
    if len(reward) < 5:
        sys.exit(
            f"{path}: {len(reward)} rows have a known s', but a fit needs five, one of them held "
            "out: add episodes, or store next_observations"
        )
    if reward.min() == reward.max():
        sys.exit(
            f"{path}: all rewards whose s' is stored are equal, so there is nothing to learn; if "
            "rewards come with terminals alone, store next_observations, too"
        )


ARRAYS = ("observations", "next_observations", "actions", "rewards")  # D4RL's keys
# What an end is called, and which of three kinds it is. Those of kind `dones` do not tell a time
# limit from a terminal.
END_KINDS = {
    "terminals": "terminals",
    "timeouts": "timeouts",
    "terminations": "terminals",
    "truncations": "timeouts",
    "dones": "dones",
    "done": "dones",
}
LIKE_AN_END = re.compile("done|termin|trunc", re.IGNORECASE)


# ----- find -----
# A file is looked for in the folders of D4RL and of Minari, then fetched from one source after
# another: D4RL's server, a mirror of it, Minari. What is printed says which is next and why. A
# source that fails leaves nothing that could be taken for data.
SILENCE = 30.0  # s without a byte after which a server counts as gone
PAUSE = 5.0  # s until the same server is asked again
TRIES = 3  # how often in a row a server may bring nothing new before its URL is given up
BUSY = (429, 500, 502, 503, 504)  # HTTP's words of a server that may answer a little later
NO_D4RL = "D4RL's tables are missing: pip install --no-deps d4rl==1.1"
# Not every file of the mirror is intact: it is asked only for those whose sha256 is known.
MIRROR = "datasets/imone/D4RL/resolve/9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5"
MINARI = "datasets/farama-minari/D4RL/resolve/main"
COLLECTED = re.compile(  # the tasks whose data collect.py can make
    r"maze2d-(eval-)?(umaze|medium|large)(-dense)?-v1"
    r"|(hopper|halfcheetah|walker2d)-(random|medium|medium-replay|medium-expert|expert)-v2"
    r"|halfcheetah-jump-v0|ant-angle-v0"
)


class Source(NamedTuple):
    """Where a task's file may be had."""

    name: str
    url: str
    path: Path  # where the file is kept
    check: Callable[[Path, str, str], None]  # raises ValueError for a file that is not accepted


@functools.cache
def d4rl_tables() -> dict[str, dict]:
    """DATASET_URLS, REF_MIN_SCORE and REF_MAX_SCORE of d4rl, by task; empty if not installed.

    `import d4rl` would need mujoco_py, so the one file that holds the tables is run by itself.
    """
    package = importlib.util.find_spec("d4rl")
    if package is None:
        return {"DATASET_URLS": {}, "REF_MIN_SCORE": {}, "REF_MAX_SCORE": {}}
    return runpy.run_path(os.path.join(package.submodule_search_locations[0], "infos.py"))


def d4rl_entry(table: str, env_id: str) -> str | float | None:
    """What a table of d4rl has for a task; None for a task that is not D4RL's.

    Raises SystemExit for D4RL's tasks if d4rl is not installed: without it a return would pass
    for a score. Other environments work without.
    """
    entries = d4rl_tables()[table]
    d4rl_family = env_id.split("-")[0] in (*SIMULATORS, "maze2d")  # gymnasium's have capitals
    if d4rl_family and not entries and env_id not in gymnasium.registry:
        sys.exit(f"{env_id}: {NO_D4RL}")
    return entries.get(env_id)


def find_dataset(args: Args, may_fetch: bool = True) -> Path:
    """--dataset-path, else the task's file in D4RL's or Minari's folder, else a download.

    Without `may_fetch` the last is only the place where it would be.
    """
    if args.dataset_path:
        return expanded(args.dataset_path)
    env_id = args.env_id
    url = d4rl_entry("DATASET_URLS", env_id)
    path = d4rl_path(env_id, url)
    if path.exists():
        return path
    if url is None and COLLECTED.fullmatch(env_id):
        sys.exit(f"there is no {path}, and no server has it: python collect.py --env-id {env_id}")
    if url is None:
        sys.exit(f"{env_id} is no D4RL dataset: name an HDF5 file with --dataset-path")
    if family_of(env_id) in ADROIT and minari_path(env_id).exists():
        print(f"there is no {path}, but Minari's file; delete that to look for D4RL's again")
        return minari_path(env_id)
    return download(env_id, url) if may_fetch else path


def d4rl_path(env_id: str, url: str | None) -> Path:
    """Where d4rl keeps a task's file. One's own data may lie there as well, under the task's id."""
    name = f"{env_id}.hdf5" if url is None else url.rsplit("/", 1)[-1]
    folder = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    return expanded(folder) / name


def minari_name(env_id: str) -> str:
    """pen/human-v2 of pen-human-v1."""
    return env_id.rsplit("-", 1)[0].replace("-", "/", 1) + "-v2"


def minari_path(env_id: str) -> Path:
    """Where minari keeps the data set of an Adroit task."""
    folder = os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets"
    return expanded(folder) / "D4RL" / minari_name(env_id) / "data/main_data.hdf5"


def sources_of(env_id: str, url: str) -> list[Source]:
    """Where the file of a D4RL task may be had, in the order in which it is tried."""
    path = d4rl_path(env_id, url)
    encrypted = url.replace("http://", "https://", 1)  # d4rl's table has http
    sources = [Source("D4RL's server", encrypted, path, check_d4rl)]
    if url != encrypted:
        sources.append(Source("D4RL's server, unencrypted", url, path, check_d4rl))
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if path.name in D4RL_FILES:
        name = "a mirror (accepted only with D4RL's sha256)"
        sources.append(Source(name, f"{hub}/{MIRROR}/{path.name}", path, check_mirror))
    if family_of(env_id) in ADROIT:
        name = "Minari (its re-recorded episodes, not D4RL's bytes)"
        minari_url = f"{hub}/{MINARI}/{minari_name(env_id)}/data/main_data.hdf5"
        sources.append(Source(name, minari_url, minari_path(env_id), check_minari))
    return sources


def download(env_id: str, url: str) -> Path:
    """The file of the first source that has it. Raises SystemExit with what helps instead."""
    path = d4rl_path(env_id, url)
    why = f"there is no {path}"
    for source in sources_of(env_id, url):
        print(f"{why}; next: {source.name}, {source.url}", flush=True)
        try:
            obtain(source)
            return source.path
        except Exception as error:  # the network, the disk and HDF5 raise errors of their own
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            why = f"that failed ({reason})"

    last = f"{source.name}: {reason}"
    lines = [f"no data for {env_id} (that failed, too: {last}). By hand, then start again:"]
    encrypted = url.replace("http://", "https://", 1)
    lines.append(f"curl -fL -C - --create-dirs -o {shlex.quote(str(path))} {encrypted}")
    if family_of(env_id) in ADROIT:
        minari_id = f"D4RL/{minari_name(env_id)}"
        lines.append(f'pip install "minari[hdf5,hf]" && minari download {minari_id}')
    elif COLLECTED.fullmatch(env_id):
        lines.append(f"python collect.py --env-id {env_id}  # makes data anew by D4RL's recipe")
    sys.exit("\n".join(lines))


def obtain(source: Source) -> None:
    """Fetch a file; only a whole one that passes its check gets its name.

    What it is fetched into bears the names of machine and process, since several may fetch it at
    once. What a killed process left is taken away an hour later.
    """
    path = source.path
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in path.parent.glob(f"{path.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # its process ended just now
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()

    part = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.part")
    record = part.with_suffix(".json.part")
    try:
        fetch(source.url, part)
        if not h5py.is_hdf5(part):
            start = part.read_bytes()[:20]
            raise ValueError(f"what came is no HDF5 file, but begins with {start}")
        h5py.File(part).close()  # raises OSError where the file is cut
        with open(part, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        source.check(part, path.name, sha256)
        record.write_text(json.dumps({"url": source.url, "sha256": sha256}))
        os.replace(record, record_path(path))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        record.unlink(missing_ok=True)
    print(f"got {path} with sha256 {sha256}", flush=True)


def fetch(url: str, part: Path) -> None:
    """Fetch a URL into `part`. After a break the same server is asked for what is missing.

    Raises the last error where a server refuses, or brings nothing new TRIES times in a row.
    """
    part.write_bytes(b"")
    furthest = 0
    in_vain = 0
    while True:
        try:
            fetch_rest(url, part)
            return
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                sys.exit(f"no room for {part.parent}/: {error}")
            size = part.stat().st_size
            in_vain = 0 if size > furthest else in_vain + 1
            furthest = max(furthest, size)
            worth_a_try = furthest > 0 or getattr(error, "code", None) in BUSY
            if not worth_a_try or in_vain == TRIES:
                raise
            print(f"{error}; the same server again in {PAUSE:g} s", flush=True)
        time.sleep(PAUSE)


def fetch_rest(url: str, part: Path) -> None:
    """Append to `part` what it lacks of a URL's file; a server that knows no parts sends it all."""
    size = part.stat().st_size
    headers = {"User-Agent": "offline-rl"}  # some servers refuse urllib's own name
    if size > 0:
        headers["Range"] = f"bytes={size}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=SILENCE) as response, open(part, "ab") as file:
        if response.status != 206:  # which would be: partial content
            file.truncate(0)
            size = 0
        total = None if response.length is None else size + response.length
        with contextlib.closing(Bar(url.rsplit("/", 1)[-1], total, size, unit="B")) as bar:
            while block := response.read1(2**16):
                file.write(block)
                size += len(block)
                bar.move_to(size, "")
    if total is not None and size < total:
        raise ConnectionError(f"the connection broke off after {size} of {total} bytes")


def check_d4rl(part: Path, name: str, sha256: str) -> None:
    """D4RL's own server: shorter than known is refused; otherwise a difference is a note."""
    if name not in D4RL_FILES:
        return
    known_size, known_sha256 = D4RL_FILES[name]
    size = part.stat().st_size
    if size < known_size:
        raise ValueError(f"{size} bytes, where {known_size} are known")
    if sha256 != known_sha256:
        print(f"note: {name} has another sha256 than the known one; it may be compressed anew")


def check_mirror(part: Path, name: str, sha256: str) -> None:
    """A copy by others: it must be D4RL's to the byte."""
    known_size, known_sha256 = D4RL_FILES[name]
    if sha256 != known_sha256:
        size = part.stat().st_size
        raise ValueError(f"not D4RL's file: {size} bytes and not {known_size}, or other bytes")


def check_minari(part: Path, name: str, sha256: str) -> None:
    """Minari's file, no checksum of which is known: it must hold whole episodes."""
    with h5py.File(part) as file:
        count = len(file)
        for i in range(count):
            episode = file[f"episode_{i}"]  # raises KeyError
            steps = len(episode["rewards"])
            sizes = [len(episode[key]) for key in ("actions", "terminations", "truncations")]
            if sizes != [steps] * 3 or len(episode["observations"]) != steps + 1:
                raise ValueError(f"episode_{i} is not of Minari's form")
    if count == 0:
        raise ValueError("a file without episodes")


def record_path(path: Path) -> Path:
    """The small file beside a download that says where its bytes came from."""
    return path.with_name(f"{path.name}.source.json")


def origin_of(path: Path, sha256: str) -> str:
    """Where a dataset's file was obtained, and whose data its bytes are."""
    place = "a local file"
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads(record_path(path).read_text())
        if record["sha256"] == sha256:  # else the file was replaced since
            place = record["url"]
    known = {checksum for _, checksum in D4RL_FILES.values()}
    with h5py.File(path) as file:
        if sha256 in known:
            kind = "D4RL's bytes, by their sha256"
        elif "episode_0" in file and "D4RL" in path.parts:
            kind = "Minari's re-recorded episodes, not D4RL's bytes"
        elif "episode_0" in file:
            kind = "episodes in Minari's form"
        elif "note" in file.attrs:
            kind = "made by collect.py, not D4RL's bytes"
        elif path.name in D4RL_FILES:
            kind = "not the bytes that are known under this name"
        else:
            kind = "no sha256 is known to compare it with"
    return f"{place} ({kind})"


# Bytes and sha256 of D4RL's files, as TensorFlow Datasets recorded them from D4RL's server. Those
# of maze2d and relocate were not found anywhere.
D4RL_FILES = {
    "hopper_medium.hdf5": (
        54_258_063, "3e6530f00ba134b375dbae56a2120d8e6d6d0afe33d402b0aca3ed3a09fca83b"),
    "hopper_medium_expert.hdf5": (
        65_017_623, "3a024c1ecb4ff816963546d4423e2a57d8db85c9e0f4579aee9294e837d3fad0"),
    "hopper_mixed.hdf5": (
        10_983_879, "901797e3f21a963b88ced7ab36ed8361ad548b470c38a0855bc265bb4dfb3de9"),
    "hopper_random.hdf5": (
        54_351_370, "667e8a78d3460d19d3104826ad3e56abc6b3c07b34e5c179c53865c3dcc6844e"),
    "halfcheetah_medium.hdf5": (
        86_943_361, "fcaf602daa063c3031b9c36b777342a1ba669b41eaa6113258ecb9fb789768c3"),
    "halfcheetah_medium_expert.hdf5": (
        174_437_297, "c9c90f6b9fca3caa662d6a1f89808171bdb4050bab1db05d24bd85d909a333f1"),
    "halfcheetah_mixed.hdf5": (
        9_016_685, "61270f65dcadddae451607eeec68fdae50d0d6ae73fab185d9fc1979cc4f385d"),
    "halfcheetah_random.hdf5": (
        88_909_895, "5ba6381942a5110069c78cdaabdeacf1847b970c5b2e72ea5be1756896363fa5"),
    "walker2d_medium.hdf5": (
        84_756_933, "181a62086f3f287759201a9643e805b9e56438a8532a3915825dbaa6555bd173"),
    "walker2d_medium_expert.hdf5": (
        166_972_341, "62b612b2fe593142391b52c1ee04814ea8ba36df5de007969ec50b8b1455f245"),
    "walker_mixed.hdf5": (
        8_832_937, "d23588d4e07e58cbc276efea183edaa26eede5a44a1c2265adc8cdb6f68a56c7"),
    "walker2d_random.hdf5": (
        82_217_081, "b68931aeb97c9c550f69c2054f2f303bd2a3621385001af82bf0db86fd04b2ed"),
    "hopper_expert-v2.hdf5": (
        152_427_435, "01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b"),
    "hopper_full_replay-v2.hdf5": (
        187_998_921, "56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e"),
    "hopper_medium-v2.hdf5": (
        152_756_557, "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0"),
    "hopper_medium_expert-v2.hdf5": (
        304_537_315, "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26"),
    "hopper_medium_replay-v2.hdf5": (
        75_854_457, "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b"),
    "hopper_random-v2.hdf5": (
        152_525_345, "63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054"),
    "halfcheetah_expert-v2.hdf5": (
        237_464_597, "d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f"),
    "halfcheetah_full_replay-v2.hdf5": (
        291_381_762, "27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0"),
    "halfcheetah_medium-v2.hdf5": (
        237_727_262, "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0"),
    "halfcheetah_medium_expert-v2.hdf5": (
        474_567_252, "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06"),
    "halfcheetah_medium_replay-v2.hdf5": (
        59_448_533, "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683"),
    "halfcheetah_random-v2.hdf5": (
        237_338_037, "25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba"),
    "walker2d_expert-v2.hdf5": (
        230_567_195, "2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a"),
    "walker2d_full_replay-v2.hdf5": (
        285_115_514, "f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a"),
    "walker2d_medium-v2.hdf5": (
        232_254_996, "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda"),
    "walker2d_medium_expert-v2.hdf5": (
        462_197_079, "6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04"),
    "walker2d_medium_replay-v2.hdf5": (
        86_323_963, "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db"),
    "walker2d_random-v2.hdf5": (
        216_109_364, "4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa"),
    "pen-human-v1.hdf5": (
        2_040_573, "209e345b2150b633f30a11612612c60f49e941f127ce6c4dc0cd790501c46f9f"),
    "pen-cloned-v1.hdf5": (
        155_074_191, "6d1a982cee1950501bedebbddedbcbb377e6284d379986c83abac8a6c0be0c22"),
    "pen-expert-v1.hdf5": (
        262_040_663, "3791b8ca6a802061770af2977c051ac3ae261488210ce73788760a5b8308f374"),
    "door-human-v1.hdf5": (
        3_121_206, "f9691288c3ddf2b4e7b31bdae0d8444b80ba035515495f8a902d60c43ee09370"),
    "door-cloned-v1.hdf5": (
        294_356_136, "1f6a60ecc4d2a2e5c02f41dd3412be61bb265a33dcf120ceee9e9682d4fe4d48"),
    "door-expert-v1.hdf5": (
        536_056_678, "66df4cd4e0a1e0b72ea72653ce088e29ecbfa99bac3cd2b52e64092e9a0aaab4"),
    "hammer-human-v1.hdf5": (
        5_606_475, "3e42f3f49b5c92a901601dfe867c6c62a9651cbe79f6760ec8b402a15816a498"),
    "hammer-cloned-v1.hdf5": (
        446_616_879, "e48d75b159bdd72f51d3f01448d3eca4d38275714e11e995c14a36f6cf159db3"),
    "hammer-expert-v1.hdf5": (
        557_047_483, "1c069a0f6e4852493023c77dc3b3a12d8d5ac2e3a034827fea3ab8a161e7185f"),
}  # fmt: skip


# ----- read -----
EPISODE = re.compile(r"episode_(\d+)")  # the groups of a file of Minari
MOST_PACKED = 2000  # bytes that one byte of a compressed array may stand for; gzip reaches 1032


def read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], list[str], str]:
    """The arrays of a file of D4RL or Minari by D4RL's keys, the keys not used, and the sha256."""
    with reading(path):
        before = path.stat()
        if not path.is_file():
            sys.exit(f"{path} is a folder or a device and no file")
        with h5py.File(path) as file:
            if any(EPISODE.fullmatch(key) for key in file):
                raw, unused = read_minari(path, file)
            else:
                used, unused = sort_keys(path, file)
                raw = {key: read_array(path, file, key) for key in used}
            if "note" in file.attrs:  # collect.py writes there what its datasets are and are not
                print(file.attrs["note"])
        with open(path, "rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        after = path.stat()
    if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
        sys.exit(f"{path} was changed while it was read: start again when it is complete")
    return raw, unused, sha256


@contextlib.contextmanager
def reading(path: Path):
    """`with reading(path):` where what HDF5 and the system refuse ends in one sentence."""
    try:
        yield
    except FileNotFoundError:
        sys.exit(f"there is no {path}: name the file's place with --dataset-path")
    except (OSError, KeyError, RuntimeError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())
        if "signature not found" in reason:
            sys.exit(f"{path} is no HDF5 file: what wrote it, an error page of a server?")
        if "truncated file" in reason:
            sys.exit(f"{path} is cut: fetch or copy it again ({reason})")
        if "lock" in reason or "already open for write" in reason:
            sys.exit(f"{path} is locked by a program that writes it: wait for its end ({reason})")
        sys.exit(f"{path} cannot be read, or is damaged ({reason})")


def take_arrays(path: Path, arrays: dict) -> tuple[dict[str, np.ndarray], list[str], str]:
    """The same as `read_hdf5` of arrays in memory."""
    if not isinstance(arrays, dict) or not all(isinstance(key, str) for key in arrays):
        sys.exit(f"{path} must be a dict with D4RL's keys: observations, actions, rewards, ...")
    used, unused = sort_keys(path, arrays)
    raw = {}
    digest = hashlib.sha256()
    for key in used:
        if np.ma.is_masked(arrays[key]):
            sys.exit(f"{path}: {key} has masked entries: leave out their episodes")
        try:
            raw[key] = np.asarray(arrays[key])
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a GPU
            reason = " ".join(str(error).split())
            sys.exit(f"{path}: {key} make no NumPy array, convert them yourself ({reason})")
        digest.update(f"{key} {raw[key].dtype} {raw[key].shape}".encode())
        digest.update(raw[key].tobytes())
    return raw, unused, digest.hexdigest()


def sort_keys(path: Path, found) -> tuple[list[str], list[str]]:
    """Of the keys found those that are used, in our order, and the others.

    Raises SystemExit where one is missing, or where one might say that an episode ends here and is
    none of END_KINDS: the borders between episodes would vanish.
    """
    used = [key for key in (*ARRAYS, *END_KINDS) if key in list(found)]
    unused = sorted(set(found) - set(used))
    for key in unused:
        if LIKE_AN_END.search(key):
            known = ", ".join(END_KINDS)
            sys.exit(f"{path}: {key} looks like the ends of episodes: call it one of {known}")
    if not {"observations", "actions", "rewards"} <= set(used):
        names = ", ".join(list(found)[:10]) or "nothing"
        sys.exit(
            f"{path} has another layout than D4RL's: expected observations, actions, rewards, and "
            f"terminals or timeouts; found {names}"
        )
    return used, unused


def read_array(path: Path, group: h5py.Group, key: str) -> np.ndarray:
    """An array that lies in the file itself, whole. Raises SystemExit for any other."""
    place = f"{group.name}/{key}".lstrip("/")
    name = f"{path}: {place}"
    if not isinstance(group.get(key, getlink=True), h5py.HardLink):
        sys.exit(f"{name} is a link, which is not followed: store the array in the file itself")
    dataset = group[key]
    if not isinstance(dataset, h5py.Dataset):
        sys.exit(f"{name} is a group of arrays, such as {', '.join(dataset)}, and not one array")
    if dataset.is_virtual or dataset.external:
        sys.exit(f"{name} lies in other files, which are not read: store it in the file itself")
    check_filters(name, dataset)
    if dataset.shape == ():
        sys.exit(f"{name} is a single value and not an array with a row per step")
    if not is_whole(dataset):
        sys.exit(f"{name} has the shape {dataset.shape}, but the file does not hold so much")
    return dataset[()]


def check_filters(name: str, dataset: h5py.Dataset) -> None:
    """Stop if an array is compressed in a way that neither HDF5 nor hdf5plugin can undo."""
    filters = dataset.id.get_create_plist()
    for i in range(filters.get_nfilters()):
        number, _, _, label = filters.get_filter(i)
        if not h5py.h5z.filter_avail(number):
            with contextlib.suppress(ImportError):
                importlib.import_module("hdf5plugin")  # adds its ways of compression to HDF5
        if not h5py.h5z.filter_avail(number):
            kind = label.decode() or number
            sys.exit(f"{name} is compressed by {kind}, which h5py lacks: pip install hdf5plugin")


def is_whole(dataset: h5py.Dataset) -> bool:
    """Whether a file can hold all numbers that the array's shape declares. Reads none of them.

    HDF5 itself fills what was never written with zeros.
    """
    if dataset.shape is None:
        return False
    size = dataset.size * dataset.dtype.itemsize  # bytes
    stored = dataset.id.get_storage_size()
    if dataset.chunks is None:
        return stored >= size
    chunks = [math.ceil(rows / step) for rows, step in zip(dataset.shape, dataset.chunks)]
    if dataset.id.get_num_chunks() < math.prod(chunks):
        return False
    if dataset.id.get_create_plist().get_nfilters() == 0:  # a chunk is written whole, or was cut
        return stored >= math.prod(chunks) * math.prod(dataset.chunks) * dataset.dtype.itemsize
    return size <= 2**26 + MOST_PACKED * stored  # 2**26: small arrays of zeros pack even better


def read_minari(path: Path, file: h5py.File) -> tuple[dict[str, np.ndarray], list[str]]:
    """Minari's episodes, which are groups of the file, end to end under D4RL's keys.

    -> the arrays, and the keys that were not used
    """
    names = [key for key in file if EPISODE.fullmatch(key)]
    for i in range(len(names)):
        if f"episode_{i}" not in names:
            sys.exit(f"{path}: there are {len(names)} episodes, but no episode_{i}: is it whole?")
    unused = set(file) - set(names)
    episodes = []
    for i in range(len(names)):
        arrays, unused_here = read_episode(path, file, f"episode_{i}")
        episodes.append(arrays)
        unused |= unused_here
    raw = {}
    for key in episodes[0]:
        raw[key] = np.concatenate([arrays[key] for arrays in episodes])
    return raw, sorted(unused)


def read_episode(path: Path, file: h5py.File, name: str) -> tuple[dict[str, np.ndarray], set[str]]:
    """The arrays of one of Minari's episodes, and the keys of it that were not used.

    An episode of T steps has T + 1 observations, so that s' is known for every step.
    """
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        sys.exit(f"{path}: {name} is a link, which is not followed: store the episode itself")
    episode = file[name]
    keys = ("observations", "actions", "rewards", "terminations")
    for key in keys:
        if key not in list(episode):
            sys.exit(f"{path}: {name} has no {key}; found {', '.join(episode)}")
    if isinstance(episode.get("observations"), h5py.Group):
        sys.exit(f"{path}: observations that are dictionaries do not work here")
    arrays = {key: read_array(path, episode, key) for key in keys}
    observations = arrays["observations"]
    steps = len(arrays["rewards"])
    lengths = {len(arrays["actions"]), len(arrays["terminations"]), len(observations) - 1}
    if lengths != {steps}:
        sys.exit(f"{path}: {name} needs as many actions and ends as rewards, one observation more")
    arrays["observations"] = observations[:-1]
    arrays["next_observations"] = observations[1:]
    # A group's last step ends its episode, also where the flags of the file do not say so.
    arrays["truncations"] = np.arange(steps) == steps - 1
    return arrays, set(episode) - arrays.keys()


# ----- check -----
def check_arrays(path: Path, raw: dict[str, np.ndarray], env: gymnasium.Env) -> list[str]:
    """Refuse arrays that cannot be the task's, and give the others one form, in place.

    Afterwards numbers are float32, actions are in [-1, 1], and terminals and timeouts are bool and
    never both true. -> the keys that the ends were read from
    """
    # The task's own bounds of actions; `env` itself takes them from [-1, 1] already.
    action_space = env.action_space
    if isinstance(env, gymnasium.wrappers.RescaleAction):
        action_space = env.env.action_space
    if raw["rewards"].ndim != 1:
        sys.exit(f"{path}: rewards are {raw['rewards'].shape} and not one number per row")
    size = len(raw["rewards"])
    shapes = {
        "actions": (size, *action_space.shape),
        "observations": (size, *env.observation_space.shape),
        "rewards": (size,),
    }
    if "next_observations" in raw:
        shapes["next_observations"] = shapes["observations"]
    for key, shape in shapes.items():
        if raw[key].shape != shape:
            sys.exit(f"{path}: {key} are {raw[key].shape} and not {shape}: of another task?")
        if raw[key].dtype.kind not in "biuf":
            sys.exit(f"{path}: {key} are of type {raw[key].dtype} and not numbers")
        exact = raw[key]
        raw[key] = exact.astype(np.float32)
        if not np.isfinite(raw[key]).all():
            row = np.argwhere(~np.isfinite(raw[key]))[0][0]
            sys.exit(f"{path}: {key} holds NaN or infinity, first in row {row}")
        note_rounding(key, exact, raw[key])
    raw["actions"] = unit_actions(path, raw["actions"], action_space)

    end_keys = [key for key in END_KINDS if key in raw]
    ends = {}
    for key in end_keys:
        if END_KINDS[key] in ends:
            sys.exit(f"{path}: of {', '.join(end_keys)} two say the same: leave one out")
        ends[END_KINDS[key]] = flags(path, key, raw[key], size)
    limit = env.get_wrapper_attr("_max_episode_steps")
    raw["terminals"], raw["timeouts"] = sort_ends(path, ends, size, limit)
    return end_keys


def note_rounding(key: str, exact: np.ndarray, rounded: np.ndarray) -> None:
    """Say where float32 rounds off more than a thousandth of an entry's range."""
    if exact.dtype == rounded.dtype or len(exact) == 0:
        return
    exact = exact.reshape(len(exact), -1).astype(np.float64)
    error = np.abs(rounded.reshape(exact.shape) - exact).max(0)
    spread = exact.max(0) - exact.min(0)
    lost = np.flatnonzero((error > 1e-3 * spread) & (spread > STILL)).tolist()
    if lost:
        some = ", ".join(map(str, lost[:10]))
        print(
            f"note: entries of {key} ({some}) are so far from 0 that float32 rounds off more than "
            "0.1% of their range: subtract a constant from each before storing them"
        )


def unit_actions(path: Path, action: np.ndarray, box: gymnasium.spaces.Box) -> np.ndarray:
    """Actions [rows, A] of the given bounds, scaled to [-1, 1]. A rounding error is cut off."""
    room = 5e-4 * (box.high - box.low)  # 0.001 where the bounds are -1 and 1
    outside = ((action < box.low - room) | (action > box.high + room)).any(1)
    if outside.any():
        sys.exit(f"{path}: the action in row {outside.argmax()} leaves the action space")
    high = max(box.high.max(), -box.low.min())
    if high > 1 and np.abs(action).max() <= 1:
        print(f"note: no action is beyond 1, the task's go to {high:g}: are these scaled already?")
    # Where the bounds are -1 and 1, as in all of D4RL, this gives exactly what is stored.
    middle = (box.high + box.low) / 2
    scaled = (action.clip(box.low, box.high) - middle) / (box.high - box.low) * 2
    return scaled.astype(np.float32)


def flags(path: Path, key: str, stored: np.ndarray, size: int) -> np.ndarray:
    """Stored 0s and 1s as bool [size]. Raises SystemExit for any other value."""
    if stored.size != size or stored.dtype.kind not in "biuf":
        sys.exit(f"{path}: {key} are {stored.shape} of type {stored.dtype} and not {size} flags")
    stored = stored.reshape(size)
    wrong = (stored != 0) & (stored != 1)
    if wrong.any():
        row = wrong.argmax()
        sys.exit(f"{path}: {key} must be 0 or 1, but row {row} holds {stored[row]}")
    return stored.astype(bool)


def sort_ends(
    path: Path, ends: dict[str, np.ndarray], size: int, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Terminals and timeouts, bool [rows], from those of the three kinds that there are.

    An end is a terminal or a time limit; a row that a file calls both is a terminal. Without
    timeouts an episode is over after `limit` steps. Of the ends that a file calls `dones` alone,
    those after just as many steps count as time limits, the others as terminals.
    """
    none = np.zeros(size, bool)
    dones = ends.get("dones", none)
    over = none
    if ends.keys() == {"dones"}:
        print(
            f"note: {path} does not tell time limits from terminals: an end after {limit} steps "
            "is taken for a time limit, any other for a terminal"
        )
    elif "timeouts" not in ends:
        print(f"note: {path} has no timeouts: an episode is taken to end after {limit} steps")
    if "timeouts" not in ends:
        over = at_limit(ends.get("terminals", none) | dones, limit)
    timeouts = ends.get("timeouts", over)
    terminals = ends.get("terminals", dones & ~timeouts)
    if "timeouts" not in ends:
        timeouts = timeouts | dones
    timeouts = timeouts & ~terminals
    if (dones & ~terminals & ~timeouts).any():
        row = (dones & ~terminals & ~timeouts).argmax()
        sys.exit(f"{path}: row {row} is done, but neither a terminal nor at a time limit")
    return terminals, timeouts


def at_limit(ended: np.ndarray, limit: int) -> np.ndarray:
    """Which rows are the step number `limit` of their episode, whether it ended there or not."""
    rows = np.zeros(len(ended), bool)
    steps = 0
    for row, end in enumerate(ended.tolist()):
        steps += 1
        rows[row] = steps == limit
        if end or rows[row]:
            steps = 0
    return rows


def check_episodes(path: Path, raw: dict[str, np.ndarray]) -> None:
    """Refuse a dataset without episodes that end, with hardly a transition, or without its end.

    What was never written of an array reads as zeros.
    """
    ended = raw["terminals"] | raw["timeouts"]
    last = [ended[-2:], raw["rewards"][-2:], raw["observations"][-2:], raw["actions"][-2:]]
    if len(ended) > 0 and not any(part.any() for part in last):
        sys.exit(f"{path}: the last rows are zeros in all arrays, as if never written: cut them")
    usable = ~raw["timeouts"]
    if ended.sum() < 2 or usable.sum() < 4:
        sys.exit(f"{path}: it needs at least two episodes that end, and four rows not at a limit")


def note_contradictions(raw: dict[str, np.ndarray], limit: int) -> None:
    """Say if stored next observations are not the next rows', or if terminals look like limits."""
    ended = raw["terminals"] | raw["timeouts"]
    obs = raw["observations"]
    if "next_observations" in raw:
        going_on = np.flatnonzero(~ended[:-1])
        error = np.abs(raw["next_observations"][going_on] - obs[going_on + 1])
        share = (error > 1e-3 * np.ptp(obs, 0)).any(1).sum() / max(1, len(going_on))
        if share > 0:
            print(
                f"note: {share:.2%} of the rows within episodes have next_observations that are "
                "not the observations of the row after them: are ends missing, or rows shuffled?"
            )
    ends = np.flatnonzero(ended)
    steps = np.diff(ends, prepend=-1)  # of each episode
    terminal_steps = steps[raw["terminals"][ends]]
    if len(terminal_steps) > 0 and (terminal_steps == limit).all():
        print(
            f"note: all {len(terminal_steps)} terminals stand at step {limit}, the task's time "
            "limit: if time is all that ended these episodes, call them timeouts"
        )


def describe(path: Path, raw: dict[str, np.ndarray], env_id: str) -> float:
    """Print what the dataset is. -> the mean score of its whole episodes"""
    ends = np.flatnonzero(raw["terminals"] | raw["timeouts"])
    # The last piece is no whole episode: it has the rows after the last end, if there are any.
    episodes = np.split(raw["rewards"], ends + 1)[:-1]
    returns = np.array([rewards.sum(dtype=np.float64) for rewards in episodes])
    score = float(scores_of(env_id, returns).mean())
    if raw["terminals"].any() and rule_of_ending(env_id) is None:
        print("note: this task's rule of ending is unknown: rollouts end only far outside the data")
    size = len(raw["rewards"])
    measure = measure_of(env_id)
    print(f"{path}: {size} rows, {len(returns)} whole episodes, their mean {measure} {score:.1f}")
    return score


def describe_rows(
    path: Path, raw: dict[str, np.ndarray], data: dict, end_keys: list[str], unused: list[str]
) -> None:
    """Print what became of the rows, and which keys were not used."""
    size = len(raw["rewards"])
    limits = raw["timeouts"].sum()
    dropped = size - len(data["obs"])
    unknown = int((~data["has_next"]).sum())
    ends = f"{raw['terminals'].sum()} terminals and {limits} time limits"
    if end_keys:
        ends += f" (from {', '.join(end_keys)})"
    why = f"{limits} at a time limit"
    if dropped > limits:
        why += ", the last for its s' is not stored"
    others = ", ".join(unused[:10]) or "none"
    print(
        f"{size} rows, {ends}; {dropped} dropped ({why}); {unknown} kept without a known s'; "
        f"keys not used: {others}"
    )


def note_rule(env_id: str, data: dict[str, Tensor]) -> None:
    """Say if the task's rule of ending is not what ended the data's episodes."""
    if rule_of_ending(env_id) is None:
        return
    form = "it must give a bool per state, [..., S] -> [...], such as (next_obs > 5).any(-1)"
    known = data["has_next"]
    next_obs = data["next_obs"][known]
    before = next_obs.clone()
    try:
        ruled = known_termination(env_id, next_obs)
    except Exception as error:  # whatever a rule of one's own raises
        reason = " ".join(str(error).split())
        sys.exit(f"the rule of ending of {env_id} does not work on its states ({reason}): {form}")
    if not isinstance(ruled, Tensor):
        sys.exit(f"the rule of ending of {env_id} gives {type(ruled).__name__}: {form}")
    if ruled.dtype != torch.bool or ruled.shape != next_obs.shape[:1]:
        given = f"{ruled.dtype} {list(ruled.shape)} for states {list(next_obs.shape)}"
        sys.exit(f"the rule of ending of {env_id} gives {given}: {form}")
    if not torch.equal(next_obs, before):
        sys.exit(f"the rule of ending of {env_id} changes the states that it is asked about")
    stored = data["terminated"][known]
    differ = (ruled != stored).float().mean().item()
    count = int(stored.sum())
    missed = int((stored & ~ruled).sum())
    if differ > 0.01 or missed > count / 2:
        by_rule = ruled.float().mean().item()
        by_data = stored.float().mean().item()
        print(
            f"note: {env_id}'s rule of ending ends {by_rule:.1%} of the rows with a known s', the "
            f"data's terminals {by_data:.1%}; they differ on {differ:.1%}, and the rule misses "
            f"{missed} of {count} terminals: is it the task's rule?"
        )


# ----- scales -----
# One rule: what varies by less than STILL counts as constant, and a constant tells nothing. The
# model does not see it, and the limit on states leaves it room. Otherwise the least change in an
# imagined step would be a million deviations, and the imagined reward as large. In D4RL's files the
# smallest deviation of an input is 0.02, of pen, in m: no number of theirs changes.
STILL = 1e-3  # a standard deviation, or the largest size, in the data's units


def input_scale(std: Tensor) -> Tensor:
    """What the model's inputs are divided by: their deviation, or 1e12, which makes them 0."""
    return torch.where(std < STILL, 1e12, std)


def note_still_entries(data: dict[str, Tensor]) -> None:
    """Say which entries of observations and actions the model does not see."""
    for name in ("obs", "action"):
        std = data[name].double().std(0)
        still = (std < STILL).nonzero().squeeze(-1).tolist()
        if still:
            some = ", ".join(map(str, still[:10]))
            print(
                f"note: {len(still)} of {len(std)} entries of {name} ({some}) vary by less than "
                f"{STILL:g}: the model ignores them"
            )


# ----- to transitions -----
# Six rows as an example. The first episode, a b c, ends in a terminal; the second, d e, ends at a
# time limit; the third is cut after f, because D4RL's files end at a round number of rows.
#
#     row of the file    0    1    2    3    4    5
#     observations       a    b    c    d    e    f
#     terminals          -    -    yes  -    -    -
#     timeouts           -    -    -    -    yes  -
#
# Rows 0 to 3 become transitions. Row 4 is dropped, as in D4RL's own loader, which drops every row
# at a time limit. Row 5 is dropped because its s' is not stored. That of row 2 is not stored
# either (D4RL's loader takes d), but nothing bootstraps from a terminal state, so the row stays.
#
#     transition         0    1    2    3
#     obs                a    b    c    d
#     next_obs           b    c    c    e    (c stands in for the s' of row 2)
#     terminated         -    -    yes  -
#     has_next           yes  yes  -    yes  (is next_obs truly s'?)
#     next_row           1    2    -1   -1   (the transition of (s', a'); row 4 became none)
#     starts             a    d    f         (the first observation of each episode)
#
# In a file with the key next_observations every row has its s'. Then has_next is true everywhere,
# and row 5 is a transition, too. A row with both flags is a terminal: it is kept, with its reward.
# (D4RL's own files have none.)
def to_transitions(raw: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Checked arrays [rows, ...] -> tensors [N, ...], as in the example above."""
    obs = raw["observations"]
    terminated = raw["terminals"]
    ended = terminated | raw["timeouts"]
    size = len(obs)
    # The rows whose episode goes on in the row after them. The file's last row has none after it.
    going_on = np.flatnonzero(~ended[:-1])

    keep = ~raw["timeouts"]
    if "next_observations" in raw:
        next_obs = raw["next_observations"]
        has_next = np.ones(size, bool)
    else:
        next_obs = obs.copy()
        next_obs[going_on] = obs[going_on + 1]
        has_next = ~terminated
        if not terminated[-1]:
            keep[-1] = False  # nothing stands after it that could be its s'

    transition = np.full(size, -1)  # what becomes of each row: in the example 0 1 2 3 -1 -1
    transition[keep] = np.arange(keep.sum())
    next_row = np.full(size, -1)
    next_row[going_on] = transition[going_on + 1]

    is_start = np.ones(size, bool)
    is_start[1:] = ended[:-1]

    columns = {
        "obs": obs,
        "action": raw["actions"],
        "reward": raw["rewards"],
        "next_obs": next_obs,
        "terminated": terminated,
        "has_next": has_next,
        "next_row": next_row,
    }
    data = {key: torch.from_numpy(column[keep]) for key, column in columns.items()}
    data["starts"] = torch.from_numpy(obs[is_start])
    return data


# ===== C. Environments ============================================================================
# D4RL's tasks run on gymnasium's simulators, changed where those are not what D4RL had. Any other
# environment that is registered with gymnasium works as well. A file of your own imports the
# script, calls gymnasium.register(id, entry_point=..., max_episode_steps=...), and may fill its
# tables ENDS[id] (rule of ending), REFERENCES[id] (returns of the scores 0 and 100) and PAPER[id]
# (settings). It ends in the script's main(); --dataset-path names its data. Without such a file,
# `--env-id module:id` imports the module that registers id, and takes the function `ends` in it, if
# there is one, as the rule of ending.
def family_of(env_id: str) -> str:
    """The first word of an id: hopper of hopper-medium-v2 and of Hopper-v4."""
    return env_id.split("-")[0].lower()


# Families of D4RL that gymnasium and gymnasium-robotics simulate: the id there, and D4RL's time
# limit in steps.
SIMULATORS = {
    "hopper": ("Hopper-v4", 1000),
    "halfcheetah": ("HalfCheetah-v4", 1000),
    "walker2d": ("Walker2d-v4", 1000),
    "pen": ("AdroitHandPen-v1", 100),
    "door": ("AdroitHandDoor-v1", 200),
    "hammer": ("AdroitHandHammer-v1", 200),
    "relocate": ("AdroitHandRelocate-v1", 200),
}
ADROIT = ("pen", "door", "hammer", "relocate")
PEN_DROPPED = 0.075  # m, the height of the pen below which it has fallen from the hand
# Where an observation has the way from the palm to the object that it reaches for, in m.
REACH = {
    "door": lambda obs: obs[35:38],
    "hammer": lambda obs: obs[33:36] - obs[36:39],
    "relocate": lambda obs: obs[30:33],
}
# D4RL's mazes: '#' is wall, 'O' is open, 'G' is the open cell with the goal. The line is x, the
# place in the line is y.
MAZES = {
    "open": (
        "#######",
        "#OOOOO#",
        "#OOGOO#",
        "#OOOOO#",
        "#######",
    ),
    "umaze": (
        "#####",
        "#GOO#",
        "###O#",
        "#OOO#",
        "#####",
    ),
    "eval-umaze": (
        "#####",
        "#OOG#",
        "#O###",
        "#OOO#",
        "#####",
    ),
    "medium": (
        "########",
        "#OO##OO#",
        "#OO#OOO#",
        "##OOO###",
        "#OO#OOO#",
        "#O#OO#O#",
        "#OOO#OG#",
        "########",
    ),
    "eval-medium": (
        "########",
        "#OOOOOG#",
        "#O#O##O#",
        "#OOOO#O#",
        "###OO###",
        "#OOOOOO#",
        "#OO##OO#",
        "########",
    ),
    "large": (
        "############",
        "#OOOO#OOOOO#",
        "#O##O#O#O#O#",
        "#OOOOOO#OOO#",
        "#O####O###O#",
        "#OO#O#OOOOO#",
        "##O#O#O#O###",
        "#OO#OOO#OGO#",
        "############",
    ),
    "eval-large": (
        "############",
        "#OO#OOO#OGO#",
        "##O###O#O#O#",
        "#OO#O#OOOOO#",
        "#O##O#OO##O#",
        "#OOOOOO#OOO#",
        "#O##O#O#O###",
        "#OOOO#OOOOO#",
        "############",
    ),
}
MAZE_LIMITS = {"open": 150, "umaze": 300, "medium": 600, "large": 800}  # steps, eval- or not


# ----- rules of ending -----
def hopper_ends(next_obs: Tensor) -> Tensor:
    """The hopper has fallen or leans over, or a number is out of range."""
    in_range = next_obs.isfinite().all(-1) & (next_obs[..., 1:].abs() < 100).all(-1)
    upright = (next_obs[..., 0] > 0.7) & (next_obs[..., 1].abs() < 0.2)  # m, rad
    return ~(in_range & upright)


def walker2d_ends(next_obs: Tensor) -> Tensor:
    """The walker has fallen or jumped too high, or leans over."""
    height = next_obs[..., 0]  # m
    angle = next_obs[..., 1]  # rad
    return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))


def ant_ends(next_obs: Tensor) -> Tensor:
    """The torso has left the heights that gymnasium's Ant allows."""
    height = next_obs[..., 0]  # m
    return ~(next_obs.isfinite().all(-1) & (height >= 0.2) & (height <= 1.0))


def pen_ends(next_obs: Tensor) -> Tensor:
    """The hand has dropped the pen."""
    return next_obs[..., 26] < PEN_DROPPED


# Rules of ending: next observations [..., S] -> bool [...]. Other tasks never end before their time
# limit: of D4RL's, halfcheetah, maze2d and the rest of Adroit. A rule is recorded in a CUDA graph,
# so it makes no tensors of numbers (torch.tensor).
FAMILY_ENDS = {
    "hopper": hopper_ends,
    "walker2d": walker2d_ends,
    "ant": ant_ends,
    "pen": pen_ends,
}
# The ids that have their family's rule: D4RL's, gymnasium's and ours. Other names that begin alike,
# such as hopper-mine-v0, are other tasks.
WITH_FAMILY_RULE = re.compile(
    r"(hopper|walker2d|ant)-(random|medium|expert|medium-replay|full-replay|medium-expert)-v[012]"
    r"|pen-(human|cloned|expert)-v[01]"
    r"|(Hopper|Walker2d|Ant)-v[2345]"
    r"|ant-random-expert-v0|ant-angle-v0"
)
ENDS: dict[str, Callable] = {}  # rules of other tasks, by id


def rule_of_ending(env_id: str) -> Callable | None:
    """ENDS's rule, a family's, or that of the module in module:id; None where none is known."""
    if env_id in ENDS:
        return ENDS[env_id]
    if WITH_FAMILY_RULE.fullmatch(env_id):
        return FAMILY_ENDS[family_of(env_id)]
    module, _, _ = env_id.rpartition(":")
    return getattr(importlib.import_module(module), "ends", None) if module else None


def known_termination(env_id: str, next_obs: Tensor) -> Tensor:
    """Whether the task ends at these states, by its own rule: [..., S] -> bool [...]."""
    rule = rule_of_ending(env_id)
    if rule is not None:
        return rule(next_obs)
    return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)


# ----- reference scores -----
# The returns that make scores 0 and 100, by id, for tasks that are not D4RL's, which has tables.
REFERENCES: dict[str, tuple[float, float]] = {}


def reference_returns(env_id: str) -> tuple[float, float] | None:
    """The returns that make normalized scores 0 and 100, or None for a task without them."""
    if env_id in REFERENCES:
        return REFERENCES[env_id]
    low = d4rl_entry("REF_MIN_SCORE", env_id)
    if low is None:
        return None
    return low, d4rl_entry("REF_MAX_SCORE", env_id)


def measure_of(env_id: str) -> str:
    """What a task's scores are: "normalized score", or without references "return"."""
    return "return" if reference_returns(env_id) is None else "normalized score"


def scores_of(env_id: str, returns: np.ndarray) -> np.ndarray:
    """D4RL's normalized score of each return: 100 * (return - low) / (high - low).

    Without references a score is the return itself.
    """
    returns = np.asarray(returns, np.float64)
    references = reference_returns(env_id)
    if references is None:
        return returns
    low, high = references
    return 100 * (returns - low) / (high - low)


# ----- simulators -----
def make_env(env_id: str, render_mode: str | None = None) -> gymnasium.Env:
    """A task of D4RL as D4RL has it, else any registered environment; actions in [-1, 1].

    Raises SystemExit where there is no such environment, or none that fits.
    """
    load_simulators()
    if d4rl_entry("DATASET_URLS", env_id) is not None:
        family = family_of(env_id)
        if family == "maze2d":
            return make_maze2d(env_id, render_mode)
        if family in SIMULATORS:
            return make_mujoco(family, render_mode)
        if env_id not in gymnasium.registry:
            sys.exit(f"--env-id {env_id}: D4RL's {family} tasks have no simulator here")
    return make_registered(env_id, render_mode)


def load_simulators() -> None:
    """Register gymnasium-robotics' environments, and silence what is said of old versions."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # "-v4 is out of date": it is D4RL's
    mujoco.set_mju_user_warning(lambda text: None)  # on a setting in HalfCheetah's model
    with contextlib.redirect_stderr(io.StringIO()):  # the import recommends other versions
        import gymnasium_robotics
    gymnasium.register_envs(gymnasium_robotics)


def make_maze2d(env_id: str, render_mode: str | None) -> gymnasium.Env:
    """Of maze2d-umaze-v1, maze2d-eval-large-dense-v1, ..."""
    maze = env_id.removeprefix("maze2d-").rsplit("-", 1)[0]  # without family and version
    layout = maze.removesuffix("-dense")
    env = Maze2d(layout, maze.endswith("-dense"), render_mode)
    return gymnasium.wrappers.TimeLimit(env, MAZE_LIMITS[layout.removeprefix("eval-")])


def make_mujoco(family: str, render_mode: str | None) -> gymnasium.Env:
    """Of a family in SIMULATORS. Its datasets (human, medium, ...) all have the same simulator."""
    name, time_limit = SIMULATORS[family]
    env = gymnasium.make(name, max_episode_steps=time_limit, render_mode=render_mode)
    return D4RLSemantics(env, family)


def make_registered(env_id: str, render_mode: str | None) -> gymnasium.Env:
    """Any other environment of gymnasium, with a limit of 1000 steps where it has none itself."""
    try:
        if render_mode is None:
            env = gymnasium.make(env_id)  # a class that never renders need not take a render_mode
        else:
            env = gymnasium.make(env_id, render_mode=render_mode)
        if env.spec.max_episode_steps is None:
            env = gymnasium.wrappers.TimeLimit(env, 1000)
    except Exception as error:  # gymnasium's own, ImportError, whatever a constructor raises
        reason = " ".join(str(error).split())
        hint = "" if d4rl_tables()["DATASET_URLS"] else f" ({NO_D4RL})"
        sys.exit(f"cannot make {env_id} ({reason}): {advice_on_id(env_id)}{hint}")
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            sys.exit(f"--env-id {env_id}: only flat observations and flat, continuous actions work")
    box = env.action_space
    if box.dtype.kind != "f":
        sys.exit(f"--env-id {env_id}: its actions are {box.dtype}; only continuous actions work")
    widths = np.subtract(box.high, box.low, dtype=np.float64)
    unfit = ~((widths > 0) & (widths < 1e9))
    if unfit.any():
        i = unfit.argmax()
        bounds = f"from {box.low[i]} to {box.high[i]}"
        sys.exit(f"--env-id {env_id}: entry {i} of an action goes {bounds}: no finite range")
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def advice_on_id(env_id: str) -> str:
    """Which ids one may have meant: those that are much alike and that can be made here."""
    d4rl_ids = []
    for name in d4rl_tables()["DATASET_URLS"]:
        if family_of(name) in (*SIMULATORS, "maze2d"):
            d4rl_ids.append(name)
    works = []
    for name in difflib.get_close_matches(env_id, {*d4rl_ids, *gymnasium.registry}, cutoff=0.75):
        with contextlib.suppress(Exception):  # an old version, a package that is missing
            box = gymnasium.spaces.Box
            if name in d4rl_ids or isinstance(gymnasium.make(name).action_space, box):
                works.append(name)
    if works:
        return f"did you mean {' or '.join(works)}?"
    return "is it registered? (--env-id module:id imports the module that registers it)"


def try_env(env_id: str) -> gymnasium.Env:
    """The environment after one step, so that its mistakes show now and not after an hour's fit.

    Raises SystemExit where it cannot be reset with the largest seed or stepped, or where what it
    gives is no observation of its space, or no single finite number as the reward.
    """
    env = make_env(env_id)
    shape = env.observation_space.shape
    dtype = env.observation_space.dtype
    with working(env_id):
        obs, _ = env.reset(seed=2**32 - 1)
        middle = np.zeros(env.action_space.shape, np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(middle)
        for state in (obs, next_obs):
            if np.shape(state) != shape or not np.isfinite(state).all():
                raise ValueError(f"an observation is {state} and not {shape} finite numbers")
            if not np.can_cast(np.asarray(state).dtype, dtype, "same_kind"):
                raise ValueError(f"observations are not of their space's type, {dtype}")
        if np.shape(reward) != () or not math.isfinite(reward):
            raise ValueError(f"the reward is {reward!r} and not a finite number")
        if np.shape(terminated) != () or np.shape(truncated) != ():
            raise ValueError("terminated and truncated are arrays and not True or False")
    return env


@contextlib.contextmanager
def working(env_id: str):
    """`with working(env_id):` where whatever an environment raises ends in one sentence."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            raise  # the environment's own sentence
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        sys.exit(f"--env-id {env_id}: a reset or a step does not work, mend it first ({reason})")


class D4RLSemantics(gymnasium.Wrapper):
    """Ends and rewards a step as D4RL's environments do and their successors do not."""

    def __init__(self, env: gymnasium.Env, family: str):
        super().__init__(env)
        self.family = family

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.family == "pen":  # gymnasium-robotics goes on after the pen was dropped
            terminated = bool(obs[26] < PEN_DROPPED)
        if self.family in REACH:
            # gymnasium-robotics 1.4.2 adds 0.1 * distance of the palm, which D4RL subtracts.
            distance = np.linalg.norm(REACH[self.family](obs))
            reward = reward - 0.2 * distance
        # D4RL's files have no row with both flags, so a step at the limit is no terminal. (A file
        # that does have such rows knows better, and to_transitions believes it.)
        if truncated:
            terminated = False
        return obs, float(reward), terminated, truncated, info


class Maze2d(gymnasium.Wrapper):
    """D4RL's maze2d: the ball, walls and speed limit of PointMaze, the rest as D4RL has it.

    An observation is x, y and the velocities [4]; where the ball starts, how far the origin is
    from the maze's corner, and the reward are D4RL's. Nothing ends an episode but its time limit.
    """

    def __init__(self, layout: str, dense: bool, render_mode: str | None):
        from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv  # see load_simulators

        cells = np.array([list(line) for line in MAZES[layout]])  # cells[x, y], one letter each
        # PointMaze reads its map as one sees it: x to the right, y upwards, 1 is wall.
        walls = (cells == "#").astype(int).T[::-1]
        maze = PointMazeEnv(maze_map=walls.tolist(), render_mode=render_mode)
        super().__init__(maze.point_env)
        self.open = np.argwhere(cells != "#").astype(np.float64)  # [open cells, 2]
        self.goal = np.argwhere(cells == "G")[0].astype(np.float64)  # [2]
        # PointMaze counts from the middle of the maze. D4RL's cell (0, 0) begins at (-0.7, -0.7).
        length, width = cells.shape
        self.origin = np.array([length / 2 - 0.7, width / 2 - 0.7, 0, 0])
        self.dense = dense

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed)
        random = self.unwrapped.np_random
        cell = self.open[random.integers(len(self.open))]
        position = cell + random.uniform(-0.1, 0.1, 2)
        velocity = 0.1 * random.standard_normal(2)
        self.unwrapped.set_state(position - self.origin[:2], velocity)
        return self.unwrapped._get_obs()[0] + self.origin, {}

    def step(self, action):
        obs = self.env.step(action)[0] + self.origin
        distance = np.linalg.norm(obs[:2] - self.goal)
        reward = np.exp(-distance) if self.dense else distance <= 0.5
        return obs, float(reward), False, False, {}


# ===== D. Device, CUDA graphs, seeds ==============================================================
# A GPU spends most of a small step waiting for Python to launch it. `capture` records a step once,
# as a CUDA graph, and launches it as a whole from then on.
def choose_device(args: Args) -> torch.device:
    """The GPU if there is one, else the CPU. Sets how exactly either computes products."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.backends.cuda.matmul.fp32_precision = "tf32" if args.tf32 else "ieee"
    # Adam warns where a step that it could record is taken plainly, as `capture` does at first.
    warnings.filterwarnings("ignore", ".*capturable=True.*")
    if args.cuda and torch.cuda.is_available():
        return torch.device("cuda")
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # whatever a run before this one chose
    if args.cpu_fast_matmul:
        choose_cpu_products()
    return torch.device("cpu")


def choose_cpu_products() -> None:
    """Let oneDNN compute products of matrices, if what it computes is as exact as fp32.

    The setting "bf16" lets it, and would also allow it to round to bf16. It does so only on CPUs
    with AMX; on others it stays with fp32, and on AMD's is up to 1.7 times faster than torch's
    default. So the result of a test decides.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    a = torch.randn(2, 512, 400)
    b = torch.randn(2, 400, 300)
    product = a @ b
    # The three products of a layer: forward, and the gradients of its input and of its weights.
    for left, right in ((a, b), (product, b.mT), (a.mT, product)):
        exact = left.double() @ right.double()
        error = (left @ right - exact).abs().max()
        if error > 5e-6 * exact.abs().max():
            torch.backends.mkldnn.matmul.fp32_precision = "none"


def capture(step: Callable[..., dict], args: Args) -> Callable[..., dict]:
    """`step` as a CUDA graph, which does the same in less time; on a CPU `step` is just called.

    A graph holds no `if`, so each combination of the arguments of `step`, which are bool, gets one
    of its own. The first call of each is checked for shapes that do not fit: see SameShapes.
    """
    graphs = args.cuda and args.cuda_graphs and torch.cuda.is_available()
    known = {}

    def call(*flags: bool) -> dict:
        if flags in known:
            return known[flags]()
        own_step = functools.partial(step, *flags)
        known[flags] = RecordedStep(own_step) if graphs else own_step
        with SameShapes():
            return known[flags]()

    return call


class SameShapes(torch.overrides.TorchFunctionMode):
    """`with SameShapes():` where shapes end the run that torch would stretch without a word.

    A network of one's own that gives [B, 1] in place of [B] is the usual case: combined with a [B]
    it becomes [B, B], all pairs, whose mean trains something else. So do losses of torch whose two
    arguments differ. Raises SystemExit with the line of code.
    """

    PAIRED = (F.mse_loss, F.huber_loss, F.l1_loss, F.smooth_l1_loss)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        shapes = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                shapes.append(tuple(value.shape))
        if function in self.PAIRED and shapes[0] != shapes[1]:
            self.refuse(shapes[0], shapes[1])
        result = function(*args, **kwargs)
        if function is F.linear:  # whose weights may be [B, 1] and its biases [B]
            return result
        for shape in shapes:
            column = (*shape, 1)
            all_pairs = shape + shape
            if len(shape) == 1 and column in shapes and column != all_pairs:
                if getattr(result, "shape", None) == all_pairs:
                    self.refuse(column, shape)
        return result

    def refuse(self, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        """Name the line where two shapes meet, which is not torch's own."""
        torch_folder = str(Path(torch.__file__).parent)
        for place in traceback.extract_stack()[:-2]:
            if not place.filename.startswith(torch_folder):
                last = place
        sys.exit(
            f"{last.filename}, line {last.lineno}, combines shapes {list(one)} and {list(other)}: "
            "which network or function gives one too many or too few? ([B, 1] needs .squeeze(-1). "
            "Where all pairs are meant, write the second as [None, :])"
        )


class RecordedStep:
    """A step, from its fourth call on as a CUDA graph.

    The graph repeats what the GPU was told to do when it was recorded, on the same tensors, without
    the Python around it. So the step may neither wait for the GPU nor read a Python value that
    changes. Its result is always the same dict, whose tensors each call overwrites.
    """

    def __init__(self, step: Callable[[], dict]):
        self.step = step
        self.graph = torch.cuda.CUDAGraph()
        self.side_stream = torch.cuda.Stream()
        self.calls = 0
        self.result = {}

    def __call__(self) -> dict:
        self.calls += 1
        if self.calls <= 3:
            # CUDA asks for some plain steps on a side stream before it records. They are real ones.
            self.side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side_stream):
                plain_result = self.step()
            torch.cuda.current_stream().wait_stream(self.side_stream)
            return plain_result
        if self.calls == 4:
            with torch.cuda.graph(self.graph):  # this records, and computes nothing
                self.result = self.step()
        self.graph.replay()
        return self.result


def reseed(seed: int, phase: str, k: int = 0) -> None:
    """Give phase number k of a name its own random numbers, however many the others have drawn."""
    digest = hashlib.sha256(f"{seed} {phase} {k}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "little"))


@contextlib.contextmanager
def enough_memory():
    """`with enough_memory():` where too little memory, in torch's words or NumPy's, is a sentence.

    Raises SystemExit. Other errors pass.
    """
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, RuntimeError) and not re.search("memory|overflow", reason, re.I):
            raise
        sys.exit(f"the sizes need more memory than there is: lower them ({reason})")


# ===== E. Evaluation and video ====================================================================
# Whatever has a function `act`, from observations [n, S] to actions [n, A] in [-1, 1], can be
# evaluated. A score is the return of a whole episode on D4RL's scale.
@functools.lru_cache(maxsize=1)
def vector_env(env_id: str, count: int, asynchronous: bool) -> gymnasium.vector.VectorEnv:
    """`count` environments side by side, made once a run: building Adroit's takes 0.1 s each."""
    makers = [functools.partial(make_env, env_id)] * count
    if asynchronous:
        return gymnasium.vector.AsyncVectorEnv(makers)
    return gymnasium.vector.SyncVectorEnv(makers)


def evaluate(method: nn.Module, args: Args, episodes: int, k: int) -> np.ndarray:
    """Scores [episodes] of the policy `method.act`.

    k numbers the evaluations of a run, and the final one is 0. The training's random numbers stay
    as they are, so that it may be evaluated at any time.
    """
    asynchronous = args.async_envs
    if asynchronous is None:  # with a GPU the other cores are idle; a few cores gain nothing
        asynchronous = method.device.type == "cuda" and os.cpu_count() >= 8
    envs = vector_env(args.env_id, args.eval_episodes, asynchronous)
    scores = []
    with torch.random.fork_rng(), in_eval_mode(method):
        reseed(args.seed, "evaluation", k)
        for first in range(0, episodes, args.eval_episodes):
            numbers = range(first, first + args.eval_episodes)
            env_seeds = [episode_seed(args.seed, k, number) for number in numbers]
            returns = one_episode_each(method, envs, env_seeds, args.env_id)
            scores.append(scores_of(args.env_id, returns))
    return np.concatenate(scores)[:episodes]


@contextlib.contextmanager
def in_eval_mode(method: nn.Module):
    """`with in_eval_mode(method):` where dropout and batch norm do what they do when one acts.

    Afterwards the networks that were in train mode are in it again. A stand-in that is no nn.Module
    has none.
    """
    modules = method.modules() if isinstance(method, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def episode_seed(seed: int, k: int, number: int) -> int:
    """What the environment of an episode is seeded with: below 2**32, as NumPy's RandomState asks.

    A hash, so that runs of neighbouring seeds and neighbouring evaluations have no start in common,
    as they would with sums. Of the 50,000 episodes of a paper's curve two are alike with
    probability 1/4, wherever they stand.
    """
    digest = hashlib.sha256(f"{seed} episode {k} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def one_episode_each(
    method: nn.Module, envs: gymnasium.vector.VectorEnv, env_seeds: list[int], env_id: str
) -> np.ndarray:
    """Returns [environments] of one episode in each environment.

    Those that are done wait for the others. To take the first episodes that end, wherever they
    do, would prefer short ones.
    """
    returns = np.zeros(envs.num_envs)
    running = np.ones(envs.num_envs, bool)
    with working(env_id):
        obs, _ = envs.reset(seed=env_seeds)
    while running.any():
        with working(env_id):
            if not np.isfinite(obs[running]).all():
                raise ValueError("an observation holds NaN or infinity")
        action = method.act(obs)
        if not np.isfinite(action[running]).all():
            sys.exit(f"--env-id {env_id}: the policy's actions are NaN: lower the learning rates")
        with working(env_id):
            obs, reward, terminated, truncated, _ = envs.step(action)
            returns[running] += reward[running]
            running &= ~(terminated | truncated)
            if not np.isfinite(returns).all():
                raise ValueError(f"a reward makes the returns {returns}")
    return returns


def report(method: nn.Module, args: Args, final: np.ndarray, run: Path) -> None:
    """Print the mean of the scores `final` [episodes] with its standard error; render if asked."""
    error = final.std() / len(final) ** 0.5
    measure = measure_of(args.env_id)
    print(f"{measure} over {len(final)} episodes: {final.mean():.1f} +- {error:.1f}")
    if args.capture_video:
        record_episode(method, args, run / "episode.gif")


def record_episode(method: nn.Module, args: Args, path: Path) -> None:
    """Save an episode as a GIF of about 20 frames a second, at the speed of the environment."""
    env = make_env(args.env_id, render_mode="rgb_array")
    steps_per_second = env.metadata.get("render_fps") or 30
    every = max(1, round(steps_per_second / 20))  # steps of the environment per frame
    with working(args.env_id):
        obs, _ = env.reset(seed=args.seed)
    frames = []
    over = False
    with contextlib.closing(Bar("episode.gif", None)) as bar:
        for step in itertools.count():
            if step % every == 0:
                try:
                    frames.append(Image.fromarray(env.render()))
                except Exception as error:  # every OpenGL backend fails in its own way
                    advice = "without a screen set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
                    sys.exit(f"cannot render ({error}); {advice}")
            if over:
                break
            with in_eval_mode(method):
                action = method.act(obs[None])[0]
            with working(args.env_id):
                obs, _, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            bar.move_to(step, "")
    milliseconds = 1000 * every / steps_per_second
    film = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    with replacing(path) as file:
        frames[0].save(file, "GIF", **film)
    print(f"an episode of {step} steps: {path}")


# ===== F. The run's folder ========================================================================
# `Run` keeps a run's progress and writes its folder. Below it stand the functions that save and
# load single files; a file is always the old one or the new one as a whole.
class Bar:
    """A progress bar with the time left. Off a terminal it prints a line a minute instead.

    (A file would receive a bar's every state.) `total` is None where the end is not known. What
    is counted are iterations ("it") or bytes ("B", shown as 12.3MB).
    """

    def __init__(self, name: str, total: int | None, done: int = 0, unit: str = "it"):
        self.name = name
        self.unit = unit
        self.total = total
        self.done = done
        self.text = ""  # what stands behind the bar
        self.started = time.monotonic()
        self.printed = self.started  # when the last line was printed
        self.printed_done = done  # and how much was done then
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            desc=name,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=unit == "B",
            leave=False,
            dynamic_ncols=True,
            disable=not self.on_terminal,
        )

    def move_to(self, done: int, text: str) -> None:
        """Show that `done` of `total` are done, and a text."""
        if self.on_terminal:
            if text != self.text:  # this draws the bar, and takes a while
                self.bar.set_postfix_str(text)
            self.bar.update(done - self.done)
        self.done = done
        self.text = text
        if not self.on_terminal and time.monotonic() - self.printed >= 60:
            self.print_line()

    def print_line(self) -> None:
        """Print the bar's present state as a line."""
        now = time.monotonic()
        rate = None  # that is, since the start
        if self.done > self.printed_done and now > self.printed:
            rate = (self.done - self.printed_done) / (now - self.printed)
        line = tqdm.format_meter(
            self.done,
            self.total,
            now - self.started,
            prefix=self.name,
            postfix=self.text,
            rate=rate,
            unit=self.unit,
            unit_scale=self.unit == "B",
            ncols=0,
        )
        print(line, file=sys.stderr, flush=True)
        self.restart_rate()

    def restart_rate(self) -> None:
        """Measure the rate of the next line from now on."""
        self.printed = time.monotonic()
        self.printed_done = self.done

    def write(self, line: str) -> None:
        """Print a line that stays, without harm to the bar."""
        if self.on_terminal:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


FAR_REWARD = 10  # ranges of the data's rewards that an imagined one may lie beyond them
PHASE_SAVED_EVERY = 600  # seconds between checkpoints within a long phase


class Run:
    """A run and its folder.

        file                  written                      holds
        args.json             at the start                 the settings
        *.py                  at the start                 the script, and those it derives from
        events.out.tfevents*  every --log-every            TensorBoard's curves
        model.pt              after the first fit          that model, for --dynamics-from
        policy.pt             every --checkpoint-every     the networks that act, for --evaluate,
                                                           and the method's own buffers
        curves.png            every --checkpoint-every     the scores against the iterations
        checkpoint.pt         every --checkpoint-every     all that --resume needs
        result.json           at the end                   scores, settings, times, versions
        episode.gif           at the end                   an episode, with --capture-video
        lock                  at the start                 whose process writes here, and the names
                                                           of the TensorBoard files it wrote

    `method` is a module with `act`, `device`, `obs_dim`, `action_dim` and `acting`, the names of
    the networks that `act` uses. It may have `final_numbers`, of which result.json holds what it
    returns. `source` says which data it learns from: see load_dataset.
    """

    def __init__(self, args: Args, method: nn.Module, source: dict):
        self.args = args
        self.settings = lasting_settings(args)
        self.method = method
        self.source = source
        self.iteration = 0  # how many are done
        self.measure = measure_of(args.env_id)
        self.curve = []  # [iteration, score] of each evaluation
        self.started = time.monotonic()  # less the seconds before --resume
        self.algo = name_of(type(method))
        self.bar = Bar(self.algo, args.total_iterations)
        self.phase_bar = None  # the bar of a long phase between two iterations: see `progress`
        self.phase_points = {}  # how often each such phase has reported
        self.saved_at = time.monotonic()  # when the last checkpoint was written, or the run began
        self.event_files = set()  # the names of TensorBoard's files that this run has written
        self.events_to_keep = {}  # name and size of those at the checkpoint of --resume
        # TensorBoard's files before the points that only the end of a run has: see `is_due`.
        self.extra_points_from = None
        self.rollouts_judged = False  # by note_odd_rollouts
        check_optimizers(method)
        check_model(args, method)
        note_changes(args)
        vector_env.cache_clear()  # a notebook may have changed the task since the last run
        if args.resume:
            self.folder = expanded(args.resume)
            saved = dataclasses.replace(load_args(args.resume, type(args)), resume=args.resume)
            refuse_new_flags("--resume", args, saved, ("run_dir", *NEW_WITH_RESUME))
            self.lock = lock_folder(self.folder)
            self.load_checkpoint()
            self.bar = Bar(self.algo, args.total_iterations, self.iteration)
        else:
            self.folder = self.new_folder()
            self.lock = lock_folder(self.folder)
        sys.excepthook = functools.partial(say_how_to_go_on, self.folder)
        self.first_iteration = self.iteration
        self.save_origin()
        if args.resume:  # after args.json: a run killed before it is still to be extended, if it is
            self.cut_events()
        if args.track:
            self.start_wandb()
        # TensorBoard's thread would print a traceback of a full disk. `log` says it in a sentence.
        threading.excepthook = ignore_os_errors
        self.open_events()
        start = f", and goes on at iteration {self.iteration}" if args.resume else ""
        self.bar.write(f"this run writes to {self.folder}{start}")

    def new_folder(self) -> Path:
        """Make the folder of a new run. Raises SystemExit if it is there already."""
        args = self.args
        name = f"{args.env_id}__{self.algo}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        folder = expanded(args.run_dir) / name.replace("/", "-")
        with writing(folder):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                sys.exit(f"{folder} is there already: start again in a second")
        return folder

    def save_origin(self) -> None:
        """Save the settings and the scripts. A script that was edited since is kept beside."""
        save(self.settings, self.folder / "args.json")
        for file in source_files(type(self.method)):
            content = file.read_bytes()
            copy = self.folder / file.name
            for number in itertools.count(2):
                if not copy.exists() or (copy.is_file() and copy.read_bytes() == content):
                    break
                copy = self.folder / f"{file.stem}.{number}.py"
            if copy.name != file.name:
                print(f"note: {file} is not what this run began with; it is kept as {copy.name}")
            save(content, copy)

    def start_wandb(self) -> None:
        """Log to Weights and Biases. A resumed run goes on there, too, by its folder's name."""
        wandb = importlib.import_module("wandb")
        wandb.init(
            project=self.args.wandb_project_name,
            entity=self.args.wandb_entity,
            name=self.folder.name,
            id=hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:16],
            resume="allow",
            config=vars(self.args),
            sync_tensorboard=True,
        )

    def log(self, phase: str, logs: dict[str, Tensor | float], point: int = 0) -> None:
        """Write scalars to TensorBoard at the present iteration, plus `point` for a phase's points.

        Stop the run at NaN or infinity. Reading the scalars waits for the GPU, which is why a run
        logs every --log-every iterations only.
        """
        for key, value in logs.items():
            if not math.isfinite(value):
                saved = (self.folder / "checkpoint.pt").exists()
                kept = "keeps its last checkpoint" if saved else "has no checkpoint so far"
                sys.exit(f"{phase}: {key} is {value}; {self.folder} {kept}")
        if self.is_due(phase):
            self.extra_points_from = None
        elif self.extra_points_from is None:
            self.extra_points_from = self.event_sizes()
        for key, value in logs.items():
            with writing(self.folder / "events.out.tfevents"):
                self.writer.add_scalar(key, value, self.iteration + point)
        if "rollout/terminated_frac" in logs and not self.rollouts_judged:
            self.rollouts_judged = True
            note_odd_rollouts(self.method, float(logs["rollout/terminated_frac"]))

    def is_due(self, phase: str) -> bool:
        """Would a longer run log this phase here, too, and not just because it ends here?"""
        args = self.args
        if phase == "evaluation":
            return self.iteration % args.eval_every == 0
        if phase == "training":
            saved = self.iteration % args.checkpoint_every == 0
            return saved or self.iteration % args.log_every == 0
        return True

    def open_events(self) -> None:
        """Begin a file of TensorBoard's. Its name goes into the lock: the run changes no others."""
        with writing(self.folder / "events.out.tfevents"):
            others = {file.name for file in self.folder.glob("events.out.tfevents*")}
            self.writer = SummaryWriter(str(self.folder))
            for file in self.folder.glob("events.out.tfevents*"):
                if file.name not in others:
                    self.event_files.add(file.name)
                    with open(self.folder / "lock", "a") as lock:
                        lock.write(file.name + "\n")

    def event_sizes(self) -> dict[str, int]:
        """Name and size, with all that has been logged so far, of the run's TensorBoard files."""
        with writing(self.folder / "events.out.tfevents"):
            self.writer.flush()
            files = self.folder.glob("events.out.tfevents*")
            own_files = [file for file in files if file.name in self.event_files]
            return {file.name: file.stat().st_size for file in own_files}

    def cut_events(self) -> None:
        """Take from the run's TensorBoard files what was logged after the checkpoint.

        It is logged again.
        """
        sizes = self.events_to_keep
        for file in self.folder.glob("events.out.tfevents*"):
            with writing(file):
                if file.name not in self.event_files:
                    continue
                if file.name not in sizes:
                    file.unlink()
                elif file.stat().st_size > sizes[file.name]:
                    os.truncate(file, sizes[file.name])

    def progress(self, phase: str, done: int, total: int | None, logs: dict) -> None:
        """Log and show a long phase between two iterations, such as a fit, on a bar of its own.

        If it has noted in `method.unfinished` where it stands, it is saved every ten minutes.
        """
        if self.phase_bar is None or self.phase_bar.name != phase:
            self.end_phase()
            self.phase_bar = Bar(phase, total)
        self.phase_points[phase] = self.phase_points.get(phase, 0) + 1
        self.log(phase, logs, self.phase_points[phase])
        numbers = [f"{key.rsplit('/')[-1]} {float(value):.4g}" for key, value in logs.items()]
        self.phase_bar.move_to(done, ", ".join(numbers))
        overdue = time.monotonic() - self.saved_at > PHASE_SAVED_EVERY
        if overdue and phase in self.method.unfinished:
            self.write_checkpoint()

    def end_phase(self) -> None:
        """Take away the bar of a long phase, after a last line of it off a terminal."""
        if self.phase_bar is not None:
            if not self.phase_bar.on_terminal:
                self.phase_bar.print_line()
            self.phase_bar.close()
            self.bar.restart_rate()
        self.phase_bar = None

    def advance(self) -> None:
        """Count an iteration that is done."""
        self.end_phase()
        self.phase_points = {}
        self.method.unfinished = {}
        self.method.checkpoint = None
        self.iteration += 1
        if self.iteration == self.first_iteration + 1:
            note_idle_parameters(self.method)
        last_score = f"{self.measure} {self.curve[-1][1]:.1f}" if self.curve else ""
        self.bar.move_to(self.iteration, last_score)

    def add_to_curve(self) -> None:
        """Add the mean score of the present policy to the curve, print it and log it."""
        scores = evaluate(self.method, self.args, self.args.eval_episodes, self.iteration)
        score = float(scores.mean())  # NumPy's own float could not be loaded with weights_only
        self.curve.append([self.iteration, score])
        self.log("evaluation", {"eval/" + self.measure.replace(" ", "_"): score})
        self.bar.write(f"iteration {self.iteration}: {self.measure} {score:.1f}")

    def keep_lock(self) -> None:
        """Lock the folder again if somebody removed the lock, or stop if another process has it."""
        if self.lock is None:
            return
        try:
            kept = os.path.samestat(os.fstat(self.lock), os.stat(self.folder / "lock"))
        except OSError:
            kept = False
        if not kept:
            self.lock = lock_folder(self.folder)

    def save_checkpoint(self) -> None:
        """Save policy.pt, curves.png and checkpoint.pt.

        The checkpoint comes last: a run that is cut in between goes on from the checkpoint before
        it, and writes all three again.
        """
        method = self.method
        if method.unfinished:  # resumed within a long phase: checkpoint.pt is further than this
            return
        self.keep_lock()
        policy = {
            **self.origin(),
            "policy": {name: getattr(method, name).state_dict() for name in method.acting},
            "buffers": acting_buffers(method),
            "sizes": (method.obs_dim, method.action_dim),
        }
        save(policy, self.folder / "policy.pt")
        if self.curve:
            self.plot_curves()
        self.write_checkpoint()

    def origin(self) -> dict:
        """Of which script, class, task and settings this is a run."""
        kind = type(self.method).__name__
        env_id = self.args.env_id
        return {"algo": self.algo, "kind": kind, "env_id": env_id, "args": self.settings}

    def write_checkpoint(self) -> None:
        """Save checkpoint.pt, also within a long phase."""
        self.keep_lock()
        method = self.method
        events = self.event_sizes()
        checkpoint = {
            **self.origin(),
            **self.source,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "events": events,
            "events_of_longer_run": self.extra_points_from or events,
            "iteration": self.iteration,
            "curve": self.curve,
            "unfinished": method.unfinished,
            "phase_points": self.phase_points,
            "method": method.state_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in optimizers_of(method)},
            "device": method.device.type,
            "rng": random_generator(method.device).get_rng_state(),
            "seconds": time.monotonic() - self.started,
        }
        save(checkpoint, self.folder / "checkpoint.pt")
        self.saved_at = time.monotonic()

    def load_checkpoint(self) -> None:
        """Put networks, buffer, optimizers, random numbers and progress back to the checkpoint's.

        On a CPU the run then goes on bit for bit as if it had not been interrupted. It must be a
        run of the same method on the same data.
        """
        method = self.method
        device = method.device.type
        with loading(self.folder / "checkpoint.pt", method.device) as saved:
            refuse_another_class(self.folder, saved, method, self.args)
            if saved["sha256"] != self.source["sha256"]:
                sys.exit(f"{self.folder} is a run on other data, {saved['dataset']} as it was")
            if saved["iteration"] > self.args.total_iterations:
                done = saved["iteration"]
                advice = f"raise --total-iterations above {done}, or leave it out"
                sys.exit(f"{self.folder} has done {done} iterations already: {advice}")
            put_back(method, saved)
            method.checkpoint = saved  # for `go_on`
            method.unfinished = dict(saved["unfinished"])
            self.phase_points = saved["phase_points"]
            self.iteration = saved["iteration"]
            self.curve = saved["curve"]
            self.started -= saved["seconds"]
            self.note_differences(saved)
            events = saved["events"]
            if self.args.total_iterations > self.iteration:
                # The last evaluation of a shorter run is none of a longer one's.
                every = self.args.eval_every
                self.curve = [point for point in self.curve if point[0] % every == 0]
                events = saved["events_of_longer_run"]
            self.events_to_keep = events
            own_files = (self.folder / "lock").read_text(errors="replace").splitlines()
            self.event_files = {*saved["events"], *own_files}
            other = saved["device"]
            if other != device:
                print(f"note: resumed on {device}, which draws otherwise than {other} did")

    def note_differences(self, saved: dict) -> None:
        """Say what is not as it was when the checkpoint was written."""
        for package, version in versions().items():
            old = saved["versions"][package]
            if version != old:
                print(f"note: {package} is {version} and was {old}: numbers may differ")
        threads = torch.get_num_threads()
        if threads != saved["threads"]:
            print(f"note: {threads} CPU threads, and not {saved['threads']}: numbers may differ")

    def plot_curves(self) -> None:
        """Draw curves.png: the scores of the evaluations against the iterations."""
        iterations, scores = zip(*self.curve)
        axes = Figure(layout="constrained").subplots()
        axes.plot(iterations, scores)
        title = f"{self.algo} on {self.args.env_id}"
        axes.set(xlabel="iteration", ylabel=self.measure, title=title)
        save(axes.figure, self.folder / "curves.png")

    def finish(self) -> dict:
        """Evaluate the last policy on more episodes, and save and return what result.json holds."""
        with writing(self.folder / "events.out.tfevents"):
            self.writer.close()
        self.bar.close()
        args = self.args
        seconds = time.monotonic() - self.started  # of training, with its evaluations
        final_numbers = {}
        if hasattr(self.method, "final_numbers"):
            final_numbers = self.method.final_numbers()
        final = evaluate(self.method, args, args.final_episodes, k=0)
        scores = [score for _, score in self.curve]
        mean_last_ten = float(np.mean(scores[-10:]))
        result = {
            "algo": self.algo,
            "kind": type(self.method).__name__,
            "env_id": args.env_id,
            **self.source,
            "curve": self.curve,
            "seed": args.seed,
            "args": self.settings,
            "seconds": seconds,
            "measure": self.measure,
            "last": scores[-1],
            "mean_last_ten": mean_last_ten,
            "final_mean": float(final.mean()),
            "final_scores": final.tolist(),
            **final_numbers,
            "total_iterations": self.iteration,
            "folder": str(self.folder),
            "steps_per_second": self.iteration / seconds,
            "device": str(self.method.device),
            "versions": versions(),
            "git": git_commit(),
        }
        save(result, self.folder / "result.json")
        report(self.method, args, final, self.folder)
        count = "ten" if len(scores) >= 10 else len(scores)
        print(f"mean of the last {count}: {mean_last_ten:.1f}; see {self.folder}")
        release_locks()
        return result


def name_of(method: type) -> str:
    """The name of a method in its run's folder: its file's, or in a notebook its class's."""
    file = getattr(sys.modules[method.__module__], "__file__", None)
    return method.__name__ if file is None else Path(file).stem


def source_files(method: type) -> list[Path]:
    """The files of a method's class and of its base classes, then the script that was started.

    Each comes once. What a notebook defines has no file.
    """
    own_classes = [kind for kind in method.mro() if kind not in (nn.Module, object)]
    modules = [kind.__module__ for kind in own_classes] + ["__main__"]
    files = []
    for module in modules:
        name = getattr(sys.modules[module], "__file__", None)
        if name is not None and Path(name).is_file() and Path(name) not in files:
            files.append(Path(name))
    return files


def versions() -> dict[str, str]:
    """Of the packages that a run's numbers depend on."""
    packages = (torch, np, gymnasium, mujoco)
    return {package.__name__: str(package.__version__) for package in packages}


def ignore_os_errors(failure) -> None:
    """Python's hook for what ends a thread: all but a file's errors are shown."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def git_commit() -> str | None:
    """The commit of this script's repository, or None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    commit = answer.stdout.strip()
    return commit if re.fullmatch("[0-9a-f]{40,64}", commit) else None


def random_generator(device: torch.device):
    """Where the random numbers of a device come from: get_rng_state() and set_rng_state()."""
    return torch.cuda if device.type == "cuda" else torch


def optimizers_of(method: nn.Module) -> list[tuple[str, torch.optim.Optimizer]]:
    """Name and optimizer of all the attributes of a method that are optimizers."""
    optimizers = []
    for name, value in vars(method).items():
        if isinstance(value, torch.optim.Optimizer):
            optimizers.append((name, value))
    return optimizers


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def acting_buffers(method: nn.Module) -> dict[str, Tensor]:
    """The method's own buffers, not its networks', that `act` may use.

    That is all but those of AMPL, MOPO and COMBO themselves, which serve the training alone, and
    those with an entry for each row of the data.
    """
    of_training = ("model_data", "write_row", "num_model_rows", "num_real", "q_avg")
    num_rows = len(getattr(method, "data", ()))
    buffers = {}
    for name, buffer in method.named_buffers(recurse=False):
        of_rows = buffer.dim() > 0 and len(buffer) == num_rows
        if not of_rows and name not in of_training:
            buffers[name] = buffer
    return buffers


def hides_networks(value) -> bool:
    """Whether lists, tuples and dicts, one in another perhaps, hold a network or a parameter."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(hides_networks(entry) for entry in value)
    return isinstance(value, (nn.Module, nn.Parameter))


def check_optimizers(method: nn.Module) -> None:
    """Stop if a parameter that takes a gradient has no optimizer, or if torch cannot find it."""
    for name, module in method.named_modules():
        for attribute, value in vars(module).items():
            own = not attribute.startswith("_") and isinstance(value, (dict, list, tuple))
            if own and hides_networks(value):
                place = f"{name}.{attribute}".lstrip(".")
                sys.exit(f"{place} hides networks from torch: make it an nn.ModuleList")
    moved = set()
    for _, optimizer in optimizers_of(method):
        moved.update(parameters_of(optimizer))
    for name, parameter in method.named_parameters():
        if parameter.requires_grad and parameter not in moved:
            sys.exit(f"no optimizer moves {name}: add it to one, or let it require no gradient")


def note_idle_parameters(method: nn.Module) -> None:
    """Say if an optimizer has moved some of its parameters and no loss has reached the others."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    for optimizer_name, optimizer in optimizers_of(method):
        parameters = parameters_of(optimizer)
        idle = []
        for parameter in parameters:
            if parameter.grad is None or not parameter.grad.any():
                idle.append(parameter)
        if idle and len(idle) < len(parameters):
            name = names.get(idle[0], "a parameter outside the method")
            print(f"note: no loss has reached {name} so far, which {optimizer_name} should move")


def note_odd_rollouts(method: nn.Module, terminated: float) -> None:
    """Say if most imagined steps end, or if imagined rewards are far from all of the data's.

    `terminated` is the share of imagined steps that end. Rewards are as the buffer holds them, with
    penalties. FAR_REWARD ranges of the data's rewards beyond the largest or smallest are far.
    """
    if terminated > 0.5:
        print(f"note: {terminated:.0%} of the imagined steps end at once: is the model any good?")
    real = method.split(method.data).reward
    imagined = method.split(method.model_data[: int(method.num_model_rows)]).reward
    if len(imagined) == 0:
        return
    low = real.min().item()
    high = real.max().item()
    room = FAR_REWARD * (high - low)
    farthest = imagined[(imagined - (low + high) / 2).abs().argmax()].item()
    if not low - room <= farthest <= high + room:
        print(
            f"note: an imagined reward is {farthest:.3g}, the data's are from {low:.3g} to "
            f"{high:.3g}: the model is far outside the data"
        )


# ----- files -----
LOCKS = []  # the files that hold this process's locks, open


def lock_folder(folder: Path) -> int | None:
    """Keep other processes out of a run's folder until release_locks, or until this process ends.

    -> the open file that holds the lock, or None where there are no locks. Whoever holds it removes
    what a killed process left half-written. Raises SystemExit where another process has it.
    """
    with writing(folder / "lock"):
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not lockf: that would end when this process reads the file, as to copy the folder.
        fcntl = importlib.import_module("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        os.close(file)
        if getattr(error, "errno", None) in (errno.EACCES, errno.EAGAIN):
            sys.exit(f"another process works in {folder}: wait for its end, or stop it first")
        print(f"note: no locks here ({error}): see to it that no other process uses {folder}")
        return None
    LOCKS.append(file)
    for part in folder.glob("*.part"):
        with writing(part):
            part.unlink()
    return file


def release_locks() -> None:
    """Let other processes into the folders that this one has locked."""
    for file in LOCKS:
        fcntl = importlib.import_module("fcntl")
        # To close it is not enough: a process that was forked a moment ago has it open, too.
        fcntl.flock(file, fcntl.LOCK_UN)
    forget_locks()


def forget_locks() -> None:
    """Close the files of the locks. A forked process does so, whose parent keeps its locks."""
    while LOCKS:
        os.close(LOCKS.pop())


def unlocking(function: Callable) -> Callable:
    """`function`, after which, however it ends, this process keeps no lock."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        finally:
            release_locks()

    return call


# A notebook lives on after its training has failed, and another process may go on then.
train = unlocking(train)
if hasattr(os, "register_at_fork"):  # a worker process, which may outlive this one, holds no lock
    os.register_at_fork(after_in_child=forget_locks)


@contextlib.contextmanager
def writing(path: Path):
    """`with writing(path):` where a full or read-only disk, say, ends the run in one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or error
        sys.exit(f"cannot write {path} ({reason}); what was there is unharmed")


@contextlib.contextmanager
def replacing(path: Path):
    """`with replacing(path) as file:` to write a file that is the old or the new, come what may.

    Raises SystemExit, in one sentence, where there is no room, no permission or no such folder.
    """
    part = Path(f"{path}.{os.getpid()}.part")
    with writing(path):
        try:
            with open(part, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # else the new name might reach the disk before the content
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def save(content, path: Path) -> None:
    """Write bytes, JSON, an array (.npy), a figure (.png), or tensors and plain values (.pt)."""
    with replacing(path) as file:
        if isinstance(content, bytes):
            file.write(content)
        elif path.suffix == ".json":
            file.write(json.dumps(content, indent=1).encode())
        elif path.suffix == ".npy":
            np.save(file, content)
        elif path.suffix == ".png":
            content.savefig(file, format="png")
        else:
            torch.save(content, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.write(digest.encode())  # `check_sum` reads it; torch.load does not mind it


@contextlib.contextmanager
def loading(path: Path, device: torch.device | str = "cpu"):
    """`with loading(path) as content:` where any error, also in the block, ends in one sentence."""
    try:
        if path.suffix == ".json":
            yield from_json(path.read_text())
        else:
            check_sum(path)
            yield torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        sys.exit(f"there is no {path}: did that run get so far?")
    except Exception as error:  # torch, pickle, JSON and our look-ups raise errors of their own
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"{path} is damaged or of another setting ({reason})")


def check_sum(path: Path) -> None:
    """Raise ValueError unless a file ends in the checksum, as 64 letters, of what precedes it.

    torch.load looks at no checksum, and where there is one in its format, the headers have none.
    """
    content = np.memmap(path, np.uint8, "r")
    digest = hashlib.sha256(content[:-64]).hexdigest()
    if content[-64:].tobytes() != digest.encode():
        raise ValueError("the checksum at its end is not that of its content")


def folder_of_run(run: str | Path) -> Path:
    """The folder that --resume, --evaluate or --dynamics-from names. Raises SystemExit for a file.

    A folder that is not there is said where its files are read.
    """
    folder = expanded(run)
    if folder.is_file():
        sys.exit(f"{run} is a file: name the folder, {folder.parent}")
    return folder


def load_args(run: str, settings: type = Args) -> Args:
    """The settings that a run was started with, checked like those of a command line."""
    path = folder_of_run(run) / "args.json"
    with loading(path) as saved:
        if isinstance(saved.get("threads"), int):  # this machine may have fewer cores
            saved["threads"] = min(saved["threads"], os.cpu_count())
        unknown = saved.keys() - {field.name for field in dataclasses.fields(settings)}
        if unknown:
            sys.exit(f"{path} has {min(unknown)}, which is no setting here: of another script?")
        args = settings(**saved)
        try:
            check_args(args)
        except SystemExit as stop:
            sys.exit(f"{path} was edited or is damaged: {stop}")
    return args


def load_optimizer(optimizer: torch.optim.Adam, saved: dict) -> None:
    """Load moments and counts. Learning rates and the like stay as the settings have them."""
    own_groups = optimizer.state_dict()["param_groups"]
    # A copy, because Adam changes its moments in place, and `go_on` loads what was saved again.
    optimizer.load_state_dict(copy.deepcopy(saved) | {"param_groups": own_groups})


def put_back(method: nn.Module, saved: dict) -> None:
    """Networks, buffers, optimizers and random numbers as they were at a checkpoint."""
    method.load_state_dict(saved["method"])
    for name, optimizer in optimizers_of(method):
        load_optimizer(optimizer, saved["optimizers"][name])
    if saved["device"] == method.device.type:
        random_generator(method.device).set_rng_state(saved["rng"].cpu())


def go_on(method: nn.Module, phase: str, start: tuple) -> tuple:
    """Where a long loop begins: at `start`, or where it stood at the checkpoint of --resume.

    All is then put back to that checkpoint once more, since the method has come to this loop from
    the beginning of its phase, and has set seeds and targets on its way.
    """
    saved = getattr(method, "checkpoint", None)
    if saved is None or phase not in saved["unfinished"]:
        return start
    put_back(method, saved)
    return saved["unfinished"][phase]


def save_model(method: nn.Module, error: Tensor, run: Path, source: dict) -> None:
    """Save the first model and the hold-out errors [M] of its members, for --dynamics-from."""
    content = {
        "kind": type(method).__name__,
        "env_id": method.args.env_id,
        "sha256": source["sha256"],
        "seed": method.args.seed,
        "holdout_size": method.args.holdout_size,
        "reward_range": getattr(method, "reward_range", None),
        "model": method.model.state_dict(),
        "optimizer": method.model_optimizer.state_dict(),
        "error": error,
    }
    save(content, run / "model.pt")
    note_unpredicted(method)


@torch.no_grad()
def note_unpredicted(method: nn.Module) -> None:
    """Say which outputs the elites predict no better than a draw at random from the data would.

    Samples and data then differ by twice the output's variance; a perfect model has, with its
    noise, at most about the same. Outputs that hardly vary, beside what float32 rounds off, are
    left out. The random numbers of the run stay as they are. A fit that --model-max-epochs has cut
    is not judged: with large and small outputs it may only be on its way.
    """
    for state in method.unfinished.values():
        is_of_a_fit = len(state) == 4  # epochs, idle epochs, best error, best layers
        if is_of_a_fit and state[1] < method.args.model_patience:
            return
    rows = method.rows_with_next
    every = max(1, len(rows) // 1000)
    batch = method.split(method.data[rows[::every]])
    with torch.random.fork_rng():
        reseed(method.args.seed, "unpredicted")
        reward, next_obs = method.elites.sample(batch.obs, batch.action)[:2]  # more in a variant
    target = torch.cat([batch.reward[:, None], batch.next_obs - batch.obs], -1).double()
    sample = torch.cat([reward[:, None], next_obs - batch.obs], -1).double()
    size = torch.cat([batch.reward[:, None], batch.obs], -1).abs().amax(0)
    variance = target.var(0)
    error = (sample - target).square().mean(0)
    bad = (error > 1.5 * variance) & (variance.sqrt() > 1e-5 * size.clamp(min=STILL))
    names = []
    if bad[0]:
        names.append("reward")
    entries = bad[1:].nonzero().squeeze(-1).tolist()
    if entries:
        some = ", ".join(map(str, entries[:10]))
        names.append(f"{len(entries)} of {len(bad) - 1} entries of next_obs ({some})")
    if names:
        print(
            f"note: the model hardly predicts {' and '.join(names)}: does the large scale of "
            "another output hide them? (then rescale the data)"
        )


def refuse_another_model(path: Path, saved: dict, method: nn.Module) -> None:
    """Stop if a saved model is of another task, or predicts in other units or sizes."""
    env_id = method.args.env_id
    if saved["env_id"] != env_id:
        sys.exit(f"{path} is a model of {saved['env_id']}, not of {env_id}")
    own_range = getattr(method, "reward_range", None)
    old_range = saved["reward_range"]
    if old_range != own_range:
        sys.exit(
            f"{path} was fitted to rewards scaled by a minimum and maximum of {old_range}, these "
            f"data have {own_range}: leave out --dynamics-from, so that a model is fitted to them"
        )
    for name, tensor in method.model.state_dict().items():
        own_shape = list(tensor.shape)
        old_shape = list(saved["model"][name].shape)
        if old_shape != own_shape:
            advice = "give the flags of the model that that run has"
            sys.exit(f"{path}: {name} is {old_shape} there and {own_shape} here: {advice}")


def check_model(args: Args, method: nn.Module) -> None:
    """Refuse the model that --dynamics-from names before a folder is made for what cannot begin."""
    if args.dynamics_from and not args.resume:
        path = folder_of_run(args.dynamics_from) / "model.pt"
        with loading(path) as saved:
            refuse_another_model(path, saved, method)


def load_model(
    method: nn.Module, run: str | Path, source: dict, keep_in: Path | None = None
) -> None:
    """Take the model that save_model saved, and choose its elites by the saved errors.

    A copy goes to the folder `keep_in`. Raises SystemExit where the model is of another task or
    setting. Other data of the task and another class are said.
    """
    path = folder_of_run(run) / "model.pt"
    with loading(path, method.device) as saved:
        refuse_another_model(path, saved, method)
        if saved["sha256"] != source["sha256"]:
            print(f"note: {path} was fitted to other data than {source['dataset']}")
        own = type(method).__name__
        kind = saved["kind"]
        if kind != own and {kind, own} != {"MOPO", "COMBO"}:  # whose models are alike
            print(f"note: {path} was fitted by {kind}, this is {own}: do both learn the same data?")
        method.model.load_state_dict(saved["model"])
        load_optimizer(method.model_optimizer, saved["optimizer"])
        method.choose_elites(saved["error"])
    if keep_in is not None:
        save(saved, keep_in / "model.pt")


def refuse_another_class(run: str | Path, saved: dict, method: nn.Module, args: Args) -> None:
    """Stop if what was saved is of another class, task or settings. Raises SystemExit.

    Another name of the script is said, because a script may be copied and go on.
    """
    own = type(method).__name__
    if saved["kind"] != own:
        sys.exit(f"{run} is a run of {saved['kind']}, not of {own}: start the script of that class")
    if saved["env_id"] != args.env_id:
        sys.exit(f"{run} holds what was learned on {saved['env_id']}, not on {args.env_id}")
    settings = lasting_settings(args)
    for name, old in saved["args"].items():
        value = settings.get(name)
        if name not in ("run_dir", *NEW_WITH_RESUME) and value != old:
            sys.exit(f"{run}/args.json was edited, put it back: {name} is {value} and was {old}")
    name = name_of(type(method))
    if saved["algo"] != name:
        print(f"note: {run} was made by {saved['algo']}, and this is {name}")


def load_policy(run: str, settings: type = Args, method: type = COMBO) -> nn.Module:
    """A method that acts as the policy of a saved run did, on the CPU. Raises SystemExit."""
    args = load_args(run, settings)
    path = expanded(run) / "policy.pt"
    with loading(path) as saved:
        obs_dim, action_dim = saved["sizes"]
        policy = method(args, obs_dim, action_dim, torch.device("cpu"))
        refuse_another_class(run, saved, policy, args)
        if saved["policy"].keys() != set(policy.acting):
            sys.exit(f"{path} holds {list(saved['policy'])}, but needs {list(policy.acting)}")
        for name in policy.acting:
            getattr(policy, name).load_state_dict(saved["policy"][name])
        for name, buffer in saved["buffers"].items():
            policy.register_buffer(name, buffer)
    return policy.eval()


if __name__ == "__main__":
    main()
