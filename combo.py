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
does without: it trains SAC on data and model rollouts, and pushes Q down at actions of the policy
and random ones, up on the data's pairs. What lies out of the data's reach ends up low.

Algorithm 1, with the equations as they are tagged below:

    fit an ensemble of Gaussian models of (reward, next state) to the data, once
    for each iteration:
        every `rollout_every`: roll out in the model from stored states, `horizon` steps, into a
            FIFO buffer
        sample a batch, a share f from the data and the rest from the buffer
        critics: Bellman error, plus beta (E_rho[Q] - E_D[Q])                         Eq. (2)
        policy and temperature, target critics                                        Eq. (3)

No code was released with the paper, and its main text leaves many constants to an appendix: those
marked `(recalled)` are from memory, not read. Public re-implementations differ from one another.
Eq. (1), (4) and (5) are theory and have no line. The model is MOPO's: `--dynamics-from` also takes
a run of mopo.py. `--select` chooses beta and f without the environment. What follows `main` may be
skipped. The method uses of it above all `reseed` (a seed for each phase), `capture` (a step, on a
GPU as a CUDA graph), `known_termination` (a task's rule of ending), `load_dataset` and `Run`.

Run: `python combo.py --env-id hopper-medium-replay-v2`. Settings of the paper's tasks: `PAPER`.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

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
@dataclasses.dataclass
class Args:
    # --- experiment ---
    env_id: str = "hopper-medium-replay-v2"  # of PAPER or D4RL, or a gymnasium id + --dataset-path
    seed: int = 0  # learner i is labelled seed + i; alone, --seed seed+i gives another run
    num_seeds: int = 1  # independent learners trained side by side (the paper reports 6)
    total_iterations: int = 1_000_000  # of the main loop (MOPO's code: 1000 epochs of 1000)
    run_dir: str = "runs"  # folder that receives the run's own folder
    resume: str | None = None  # go on with this run folder; only --total-iterations may be new
    evaluate: str | None = None  # only score the policy saved in this run folder
    dynamics_from: str | None = None  # take the model from this run folder instead of fitting it
    # --- tracking and saving ---
    track: bool = False  # also log to Weights and Biases (needs `pip install wandb`)
    wandb_project_name: str = "combo"  # project of --track
    wandb_entity: str | None = None  # team of --track
    log_every: int = 1000  # iterations between two points in TensorBoard
    checkpoint_every: int = 10_000  # at least so many iterations apart, on a GPU also a minute
    capture_video: bool = False  # render an episode to episode.gif (no screen: MUJOCO_GL=egl)
    # --- data ---
    dataset_path: str | None = None  # HDF5 of D4RL or Minari; else D4RL's folder, else its server
    # --- world model ---
    ensemble_size: int = 7  # members (MOPO's code)
    num_elites: int = 5  # members with the lowest hold-out error make predictions (MOPO's code)
    model_hidden: int = 200  # width of the four hidden layers (MOPO's code)
    model_lr: float = 1e-3  # Adam (MOPO's code)
    model_batch_size: int = 256  # rows per member and step (MOPO's code)
    model_weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # of each layer
    model_patience: int = 6  # epochs in which no member improved that end a fit (MOPO's code)
    model_max_epochs: int = 10_000  # at most this many epochs per fit (MOPO's code: no limit)
    holdout_size: int = 1000  # rows held out, at most a fifth of the data (MOPO's code)
    # --- rollouts ---
    horizon: int = 5  # model steps per rollout (per task)
    rollout_every: int = 1000  # iterations between two refreshes of the buffer (MOPO's code)
    rollout_starts: int = 50_000  # rollouts per refresh (MOPO's code)
    rollout_retain: int = 5  # refreshes that the buffer holds, first in first out (MOPO's code)
    rollout_actions: Literal["policy", "uniform"] = "policy"  # mu, who acts (recalled, per task)
    real_fraction: float = 0.5  # share f of real rows in a batch (recalled, per task)
    # --- critic ---
    gamma: float = 0.99  # discount (MOPO's code)
    tau: float = 0.005  # Polyak rate of the target critic (MOPO's code)
    batch_size: int = 256  # rows per iteration (MOPO's code)
    critic_lr: float = 3e-4  # Adam (recalled, per task)
    # --- policy ---
    hidden: tuple[int, ...] = (256, 256, 256)  # hidden layers of policy and critics (recalled)
    actor_lr: float = 1e-4  # Adam of the policy (recalled, per task)
    alpha_lr: float = 3e-4  # Adam of the temperature alpha, which starts at 1 (MOPO's code)
    target_entropy: float = -3.0  # that alpha steers to (MOPO's code; OfflineRL-Kit: -dim(A))
    # --- conservative critic ---
    beta: float = 1.0  # weight of E_rho[Q] - E_D[Q] (recalled, per task)
    num_actions: int = 10  # actions per state: uniform, of pi(.|s), of pi(.|s') (recalled)
    rho_states: Literal["mixed", "model"] = "mixed"  # of d_f (paper), or the model's (per task)
    select: bool = False  # train all pairs of the next two on one model, choose one of them
    select_beta: tuple[float, ...] = (0.5, 1.0, 5.0)  # values of beta to try (recalled)
    select_real_fraction: tuple[float, ...] = (0.5, 0.8)  # values of f to try (recalled)
    probe_uncertainty: str | None = None  # only draw a figure after Figure 2 for this run's model
    # --- evaluation ---
    eval_every: int = 1000  # iterations between two evaluations (MOPO's code)
    eval_episodes: int = 10  # episodes per evaluation (MOPO's code)
    final_episodes: int = 100  # episodes after training (ours: ten have an error of many points)
    async_envs: bool | None = None  # a process per episode; default: on a GPU machine with 8 cores
    # --- speed ---
    cuda: bool = True  # train on the GPU where there is one
    cuda_graphs: bool = True  # record the training steps as CUDA graphs (no effect on a CPU)
    tf32: bool = False  # let the GPU round inputs of products to 10 bits: faster, errors of 1e-3
    cpu_fast_matmul: bool = True  # oneDNN for fp32 products, where a self-check finds fp32 accuracy
    threads: int = 0  # CPU threads of torch; 0 leaves torch's default


# All recalled from the paper's appendix, partly confirmed by d3rlpy's script and by the sets that
# unifloral sweeps. The main text names no version of the datasets: -v2 and -v0 have the same here.
# OfflineRL-Kit's table for -v2 holds cql_weight, twice our beta (its Bellman term has no 1/2), and
# was tuned with a log-sum-exp over 3 actions instead of 30: it is another one.
TASKS = {
    "halfcheetah-random":        (0.5, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "halfcheetah-medium":        (0.5, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "halfcheetah-medium-replay": (0.5, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "halfcheetah-medium-expert": (0.5, 5, 0.5, 3e-4, 1e-4, "mixed", "policy"),
    "hopper-random":             (1.0, 5, 0.5, 3e-4, 1e-4, "model", "uniform"),
    "hopper-medium":             (5.0, 5, 0.5, 3e-4, 1e-4, "model", "uniform"),
    "hopper-medium-replay":      (1.0, 5, 0.5, 3e-4, 1e-4, "model", "uniform"),
    "hopper-medium-expert":      (5.0, 5, 0.5, 3e-4, 1e-4, "model", "uniform"),
    "walker2d-random":           (0.5, 1, 0.5, 1e-4, 1e-5, "mixed", "policy"),
    "walker2d-medium":           (5.0, 1, 0.8, 1e-4, 1e-5, "mixed", "policy"),
    "walker2d-medium-replay":    (0.5, 1, 0.5, 1e-4, 1e-5, "mixed", "policy"),
    "walker2d-medium-expert":    (5.0, 1, 0.8, 1e-4, 1e-5, "mixed", "policy"),
}  # fmt: skip
PAPER_FLAGS = ("beta", "horizon", "real_fraction", "critic_lr", "actor_lr", "rho_states")
PAPER_FLAGS += ("rollout_actions", "total_iterations")  # the last as in MOPO's code (inferred)
PAPER = {f"{task}-{v}": (*row, 1_000_000) for task, row in TASKS.items() for v in ("v0", "v2")}
PAPER["halfcheetah-jump-v0"] = (1.0, 5, 0.5, 3e-4, 1e-4, "mixed", "policy", 3_000_000)
PAPER["ant-angle-v0"] = (1.0, 25, 0.5, 3e-4, 1e-4, "mixed", "uniform", 3_000_000)


def check_args(args: Args) -> None:
    """Refuse what makes no sense. Raises SystemExit."""
    if args.num_elites > args.ensemble_size:
        sys.exit("--num-elites must fit --ensemble-size")
    if not pairs(args) or args.select and args.num_seeds not in (1, len(pairs(args))):
        sys.exit("--select trains a learner for each pair of its two lists: leave out --num-seeds")
    lists = args.select_beta, args.select_real_fraction
    if not args.select and lists != (Args.select_beta, Args.select_real_fraction):
        sys.exit("--select-beta and --select-real-fraction are for --select: add it")
    if min(real_rows(args)) < 1:
        sys.exit("a batch needs a row of data: raise --real-fraction or --batch-size")
    if args.rho_states == "model" and max(real_rows(args)) >= args.batch_size:
        sys.exit("--rho-states model needs model rows in a batch: lower --real-fraction")


def pairs(args: Args) -> list[tuple[float, float]]:
    """(beta, f) of every learner: the pairs that --select tries, else one for all."""
    if args.select:
        return list(itertools.product(args.select_beta, args.select_real_fraction))
    return [(args.beta, args.real_fraction)] * args.num_seeds


def real_rows(args: Args) -> list[int]:
    """Rows of a batch that are data, for every learner."""
    return [int(fraction * args.batch_size) for _, fraction in pairs(args)]


# ===== 2. Networks ================================================================================
# Several learners (seeds) train side by side: every parameter and batch carries their axis first.
# Shapes: L learners (read it as 1), M members of the ensemble, E elites, B rows of a batch, N rows
# of the data, n of a fit, S observation, A action, C = 2S + A + 2.
Logs = dict[str, Tensor]  # what a step reports, [L] each


class Batch(NamedTuple):
    """Rows [L, B, ...], stored side by side as [..., C]; no row is at a time limit."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor  # 0 or 1


class Linear(nn.Module):
    """torch.nn.Linear for every learner and member at once: weight [*lead, in, out].

    lead is (L,) for the policy, (L, 2) for the critics, (L, M) for the model. forward:
    [G, B, in] -> [G, B, out] with G the product of lead, as one batched product.
    """

    def __init__(self, lead: tuple[int, ...], n_in: int, n_out: int):
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(*lead, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*lead, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.flatten(0, -3), x, self.weight.flatten(0, -3))


class MLP(nn.Module):
    """Hidden layers with ReLU. forward: [*lead, B, in] -> [*lead, B, out]"""

    def __init__(self, lead: tuple[int, ...], n_in: int, hidden: tuple[int, ...], n_out: int):
        super().__init__()
        sizes = [n_in, *hidden, n_out]
        self.layers = nn.ModuleList(Linear(lead, i, o) for i, o in zip(sizes, sizes[1:]))
        for layer in self.layers:  # Keras' choice: Glorot-uniform weights, biases zero
            bound = math.sqrt(6 / sum(layer.weight.shape[-2:]))
            nn.init.uniform_(layer.weight, -bound, bound)
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

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = MLP((args.num_seeds,), obs_dim, args.hidden, 2 * action_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)  # MOPO's code

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs [L, B, S] -> an action per state [L, B, A] and its log-density [L, B]."""
        action, log_prob = self.samples(obs, 1)
        return action.squeeze(2), log_prob.squeeze(2)

    def samples(self, obs: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """obs [L, B, S] -> n actions per state [L, B, n, A] and their log-densities [L, B, n]."""
        mean, log_std = (x.unsqueeze(2) for x in self(obs))
        noise = torch.randn(*obs.shape[:2], n, mean.shape[-1], device=obs.device)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2) in a form that stays finite where tanh(u) rounds to 1.
        squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_prob - squash).sum(-1)


class TwinCritic(nn.Module):
    """Q_1 and Q_2. forward: obs [L, B, S], action [L, B, A] -> [L, 2, B]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = MLP((args.num_seeds, 2), obs_dim + action_dim, args.hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1).unsqueeze(1)  # [L, 1, B, S + A]
        return self.net(x.expand(-1, 2, -1, -1)).squeeze(-1)


class DynamicsEnsemble(nn.Module):
    """M Gaussian models of (reward, next_obs - obs) in their own units; inputs are normalised.

    forward: normalised inputs [L, M, B, S + A] -> mean, log_std [L, M, B, 1 + S].
    """

    def __init__(self, lead: tuple[int, int], obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim + action_dim] + 4 * [args.model_hidden]
        self.lead = lead  # learners and members
        self.trunk = nn.ModuleList(Linear(lead, i, o) for i, o in zip(sizes, sizes[1:]))
        self.heads = Linear(lead, sizes[-1], 2 * (1 + obs_dim))  # mean and log_var side by side
        # MOPO's paper: spectral norm. MOPO's code: taken out soon after the release. Here: code.
        for layer in [*self.trunk, self.heads]:
            std = 1 / (2 * math.sqrt(layer.weight.shape[-2]))
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)
        # Soft bounds of the log-variance, learned, shared by a learner's members (MOPO's code).
        self.max_log_var = nn.Parameter(torch.full((lead[0], 1, 1, 1 + obs_dim), 0.5))
        self.min_log_var = nn.Parameter(torch.full((lead[0], 1, 1, 1 + obs_dim), -10.0))
        self.register_buffer("input_mean", torch.zeros(obs_dim + action_dim))
        self.register_buffer("input_std", torch.ones(obs_dim + action_dim))
        self.register_buffer("member", torch.arange(lead[1]), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape, x = x.shape[:-1], x.flatten(0, -3)
        for layer in self.trunk:
            x = F.silu(layer(x), inplace=not torch.is_grad_enabled())  # backward needs layer(x)
        mean, log_var = self.heads(x).view(*shape, -1).chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        log_var = self.min_log_var + F.softplus(log_var - self.min_log_var)
        return mean, 0.5 * log_var

    def members(self) -> list[Tensor]:
        """The parameters of the members, [L, M, ...] each: all but the two bounds."""
        return [p for layer in [*self.trunk, self.heads] for p in layer.parameters()]

    @torch.no_grad()
    def normalise_by(self, inputs: Tensor) -> None:
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
        """Draw reward [L, B] and next_obs [L, B, S], every row from one member, in equal shares."""
        # Row i goes to member i - cut modulo M: a rollout, which keeps its row, changes its member.
        members, rows = self.lead[1], obs.shape[1]
        x = (torch.cat([obs, action], -1) - self.input_mean) / self.input_std
        x = F.pad(x, (0, 0, 0, -rows % members)).unflatten(1, (-1, members))  # [L, B / M, M, S + A]
        cut = torch.randint(members, (), device=obs.device)  # a tensor: no wait for the GPU
        mean, log_std = self(x[:, :, (self.member + cut) % members].transpose(1, 2))
        # MOPO's paper: the mean reward. MOPO's code: the sampled reward. Here: code.
        y = mean + log_std.exp() * torch.randn_like(mean)
        y = y.transpose(1, 2)[:, :, (self.member - cut) % members].flatten(1, 2)[:, :rows]
        return y[..., 0], obs + y[..., 1:]


# ===== 3. Equations ===============================================================================
# Losses average over the batch and keep the learners apart: they return [L], the caller sums.
def largest_std(std: Tensor) -> Tensor:
    """max_i ||sigma_i(s, a)||: std [L, M, B, 1 + S] of all members, in raw units -> [L, B]

    Standard deviations and not variances, the reward's included, and not of the elites alone.
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
    reward: Tensor, terminated: Tensor, q_next: Tensor, cost: Tensor, gamma: float
) -> Tensor:
    """r + gamma (min_j Q'_j - cost) where s' is no terminal; q_next [L, 2, B], the rest [L, B].

    cost: alpha log pi(a'|s') of the action in q_next; 0 makes the backup deterministic.
    """
    return reward + gamma * (1 - terminated) * (q_next.amin(1) - cost)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of both critics: q [L, 2, B] on target [L, B]."""
    target = target.unsqueeze(1).expand_as(q)
    return 0.5 * F.mse_loss(q, target, reduction="none").mean(-1).sum(-1)


def policy_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """mean of alpha log pi - min_j Q_j; q [L, 2, B], log_prob [L, B], alpha [L]."""
    return (alpha.unsqueeze(-1) * log_prob - q.min(1).values).mean(-1)


def temperature_loss(log_alpha: Tensor, entropy: Tensor, target_entropy: float) -> Tensor:
    """Its descent raises alpha [L] while the entropy [L] is below target."""
    return log_alpha * (entropy - target_entropy)


def model_loss(mean: Tensor, log_std: Tensor, target: Tensor) -> Tensor:
    """Gaussian negative log-likelihood, up to constants; [L, M, B, 1 + S] each -> [L, M]"""
    nll = (mean - target).square() * torch.exp(-2 * log_std) + 2 * log_std
    return nll.mean((-2, -1))


# Not equations, but what all steps are made of: an Adam step, a slow copy.


def descend(loss: Tensor, optimizer: torch.optim.Adam) -> None:
    """One Adam step along a loss [L], of this optimizer's parameters and none it passes through."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = torch.autograd.grad(loss, parameters, torch.ones_like(loss))  # that is, of its sum
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()


@torch.no_grad()
def polyak(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow += rate * (fast - slow), in place."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)


# ===== 4. The method ==============================================================================
class COMBO(nn.Module):
    """The state of training (networks, data, buffer, optimizers) and the steps of Algorithm 1.

    `iterate`, `rollout` and `model_step` read no Python value that changes and never wait for the
    GPU, so `capture` can record them.
    """

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__()
        self.args, self.device, self.learners = args, device, args.num_seeds
        self.sizes, self.columns = (obs_dim, action_dim), [obs_dim, action_dim, 1, obs_dim, 1]
        models = 1 if args.select else self.learners  # --select: one model for all pairs
        self.model = self.build("model", DynamicsEnsemble, (models, args.ensemble_size))
        self.elites = self.build("elites", DynamicsEnsemble, (self.learners, args.num_elites))
        self.actor = self.build("actor", GaussianPolicy)
        self.critic = self.build("critic", TwinCritic)
        self.critic_target = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.zeros(self.learners))  # of the temperature
        capacity = args.rollout_retain * args.rollout_starts * args.horizon
        rows = torch.zeros(self.learners, capacity, sum(self.columns))
        self.register_buffer("buffer", rows)  # [L, capacity, C]: D_model
        self.register_buffer("buffer_end", torch.zeros((), dtype=torch.long))  # next row to write
        self.register_buffer("buffer_rows", torch.zeros((), dtype=torch.long))  # rows filled
        real, betas = torch.tensor(real_rows(args)), torch.tensor([beta for beta, _ in pairs(args)])
        self.register_buffer("real_rows", real.unsqueeze(-1))  # of a mixed batch, [L, 1]
        self.register_buffer("beta", betas)  # [L]
        self.register_buffer("learner", torch.arange(self.learners), persistent=False)
        self.register_buffer("place", torch.arange(args.batch_size), persistent=False)
        self.to(device)
        # MOPO's code: L2 of the weights alone, added to the gradient.
        layers = [*self.model.trunk, self.model.heads]
        decays = zip(layers, args.model_weight_decay, strict=True)
        groups = [dict(params=[layer.weight], weight_decay=decay) for layer, decay in decays]
        rest = [layer.bias for layer in layers] + [self.model.max_log_var, self.model.min_log_var]
        self.optimizers = {
            "model": self.adam([*groups, dict(params=rest)], args.model_lr),
            "critic": self.adam(self.critic.parameters(), args.critic_lr),
            "actor": self.adam(self.actor.parameters(), args.actor_lr),
            "temperature": self.adam([self.log_alpha], args.alpha_lr),
        }

    def build(self, name: str, network: type, *sizes: tuple[int, int]) -> nn.Module:
        """A network whose first weights depend on the seed and its name alone."""
        reseed(self.args.seed, name)
        return network(*sizes, *self.sizes, self.args).to(self.device)

    def adam(self, parameters, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr, fused=True, capturable=self.device.type == "cuda")

    # --- data, buffer, batches ---

    def set_data(self, dataset: dict[str, Tensor]) -> None:
        """Take a dataset: its rows [N, C], and how far its states reach."""
        # MOPO's paper: silent. MOPO's code: of the two million rows that the -v0 files of
        # medium-expert have, only the last million. Here: all.
        obs, next_obs = dataset["obs"], dataset["next_obs"]
        reward, end = dataset["reward"], dataset["terminated"].float()
        rows = [obs, dataset["action"], reward[:, None], next_obs, end[:, None]]
        self.data = torch.cat(rows, -1).to(self.device)
        self.starts = dataset["starts"].to(self.device)  # first states of the episodes
        self.has_next = dataset["has_next"].nonzero().squeeze(-1).to(self.device)  # s' is known
        limit = 2 * torch.maximum(obs.abs(), next_obs.abs()).amax(0)
        self.obs_limit = limit.clamp(min=100).to(self.device)  # hopper's rule ends at 100

    def split(self, rows: Tensor) -> Batch:
        """Rows [..., C] by field."""
        obs, action, reward, next_obs, terminated = rows.split(self.columns, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def sample_data(self, count: int) -> Tensor:
        """Uniform rows of the data, with replacement. -> [L, count, C]"""
        return self.data[torch.randint(len(self.data), (self.learners, count), device=self.device)]

    def sample(self) -> Batch:
        """A mixed batch: the first real_rows rows from the data, the rest from the buffer.

        Both kinds are drawn in full and one is kept per row: the same shapes whatever the mix.
        """
        shape = self.learners, self.args.batch_size
        place = torch.rand(shape, device=self.device) * self.buffer_rows
        place = place.long().minimum(self.buffer_rows - 1)  # the product may have been rounded up
        imagined = self.buffer[self.learner.unsqueeze(-1), place]
        is_real = self.place < self.real_rows
        real = self.sample_data(self.args.batch_size)
        return self.split(torch.where(is_real.unsqueeze(-1), real, imagined))

    def remember(self, batch: Batch) -> None:
        """Write model transitions [L, B, ...] over the oldest rows of the buffer."""
        fields = [f.unsqueeze(-1) if f.dim() == 2 else f for f in batch]
        count, capacity = batch.obs.shape[1], self.buffer.shape[1]
        place = (self.buffer_end + torch.arange(count, device=self.device)) % capacity
        self.buffer.index_copy_(1, place, torch.cat(fields, -1))
        self.buffer_end.add_(count).remainder_(capacity)
        self.buffer_rows.add_(count).clamp_(max=capacity)

    # --- one iteration ---

    def iterate(self) -> Logs:
        """One iteration: critics, policy, temperature, target critics."""
        batch = self.sample()
        # One call of the policy for both ends of a row: it stands still until its own step.
        action, log_prob = self.actor.sample(torch.cat([batch.obs, batch.next_obs], 1))
        (action, next_action), log_prob = action.chunk(2, 1), log_prob.chunk(2, 1)[0]
        alpha = self.log_alpha.detach().exp()
        cost = torch.zeros_like(batch.reward)  # recalled: no entropy in the backup
        logs = self.update_critic(batch, next_action.detach(), cost)  # Eq. (2)
        # Eq. (3) takes the states of d_f whatever --rho-states says; its entropy term is optional.
        logs |= self.update_policy(batch.obs, action, log_prob, alpha)  # Eq. (3)
        polyak(self.critic_target, self.critic, self.args.tau)
        return logs

    def update_critic(self, batch: Batch, next_action: Tensor, cost: Tensor) -> Logs:
        """One step of both critics, with the policy's action at s' and what it costs in entropy."""
        in_data, in_rho = self.rows_of_rho()
        # With --rho-states model, rows that are data for every learner are not in rho: skipped.
        first = min(real_rows(self.args)) if self.args.rho_states == "model" else 0
        obs, next_obs, in_rho = batch.obs[:, first:], batch.next_obs[:, first:], in_rho[:, first:]
        with torch.no_grad():
            q_next = self.critic_target(batch.next_obs, next_action)
            target = soft_target(batch.reward, batch.terminated, q_next, cost, self.args.gamma)
            actions, log_density = self.proposals(obs, next_obs)
        q = self.critic(batch.obs, batch.action)
        soft_q = log_sum_exp(self.q_of_actions(obs, actions), log_density)
        # Paper: Q at an action of the policy. Recalled (appendix): as in CQL, the soft maximum of Q
        # over uniform and policy actions. Here: the latter, pushed up on data rows only.
        gap = expectation(soft_q, in_rho) - expectation(q, in_data)  # [L, 2]
        loss = critic_loss(q, target)
        descend(self.beta * gap.sum(-1) + loss, self.optimizers["critic"])  # Eq. (2)
        logs = dict(critic_loss=loss.detach(), conservative_gap=gap.detach().mean(-1))
        logs = {f"losses/{name}": value for name, value in logs.items()}
        # Apart, and beside Q at episode starts, because with mixed rho the penalty averages to zero
        # over d_f: Q rises on data rows and falls on model rows. Prop. 4.1 bounds it at the starts.
        for kind, rows in (("data", in_data), ("model", 1 - in_data)):
            logs[f"q_values/{kind}"] = expectation(q.detach(), rows).mean(-1)
        return logs

    def rows_of_rho(self) -> tuple[Tensor, Tensor]:
        """Which rows of a batch are data, and which are states of rho: 0 or 1, [L, B]."""
        in_data = (self.place < self.real_rows).float()
        return in_data, torch.ones_like(in_data) if self.args.rho_states == "mixed" else 1 - in_data

    def proposals(self, obs: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """3 n actions per state, [L, B, 3 n, A], and their log-densities, [L, B, 3 n].

        n each from the uniform distribution, pi(.|s) and (as in OfflineRL-Kit, d3rlpy) pi(.|s').
        """
        count, action_dim = self.args.num_actions, self.sizes[1]
        shape = (*obs.shape[:2], count)
        uniform = 2 * torch.rand(*shape, action_dim, device=self.device) - 1
        density = torch.full(shape, -action_dim * math.log(2.0), device=self.device)
        drawn = [self.actor.samples(states, count) for states in (obs, next_obs)]
        actions, densities = zip((uniform, density), *drawn)
        return torch.cat(actions, 2), torch.cat(densities, 2)

    def q_of_actions(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Q at (s, a_1), (s, a_2), ...: obs [L, B, S], actions [L, B, n, A] -> [L, 2, B, n]."""
        count = actions.shape[2]
        q = self.critic(obs.repeat_interleave(count, 1), actions.flatten(1, 2))
        return q.unflatten(-1, (-1, count))

    def update_policy(self, obs: Tensor, action: Tensor, log_prob: Tensor, alpha: Tensor) -> Logs:
        """One step of the policy and of the temperature."""
        loss = policy_loss(self.critic(obs, action), log_prob, alpha)
        descend(loss, self.optimizers["actor"])
        entropy, wanted = -log_prob.detach().mean(-1), self.args.target_entropy
        descend(temperature_loss(self.log_alpha, entropy, wanted), self.optimizers["temperature"])
        logs = dict(actor_loss=loss.detach(), entropy=entropy, alpha=alpha)
        return {f"losses/{name}": value for name, value in logs.items()}

    @torch.no_grad()
    def start_values(self) -> Logs:
        """Q at the first states of the data's episodes, for the policy's mean action."""
        obs = self.starts.expand(self.learners, -1, -1)
        q = self.critic(obs, torch.tanh(self.actor(obs)[0]))
        return {"q_values/starts": q.mean((1, 2))}

    @torch.no_grad()
    def regularizer(self, rows: int = 10_000) -> Tensor:
        """E_rho[Q] - E_D[Q], rho with actions of the policy, mean of both critics. -> [L]

        rho has the states that the critics' loss takes. The number of rows is ours.
        """
        in_data, in_rho = self.rows_of_rho()
        total = torch.zeros(self.learners, device=self.device)
        batches = max(1, rows // self.args.batch_size)
        for _ in range(batches):
            batch = self.sample()
            q_rho = self.critic(batch.obs, self.actor.sample(batch.obs)[0])
            q_data = self.critic(batch.obs, batch.action)
            total += (expectation(q_rho, in_rho) - expectation(q_data, in_data)).mean(-1)
        return total / batches

    # --- rollouts in the model ---

    def terminate(self, next_obs: Tensor) -> Tensor:
        """By the task's rule, or far outside the data. -> terminated (0 or 1), [L, B]"""
        # MOPO's paper: silent. MOPO's code: the known rule. Here: also a state far outside the data
        # (or NaN), which would overflow the critics.
        inside = (next_obs.abs() <= self.obs_limit).all(-1)
        return (~inside | known_termination(self.args.env_id, next_obs)).float()

    @torch.no_grad()
    def rollout(self) -> Logs:
        """Roll out in the model, write rollout_starts x horizon rows to the buffer.

        A rollout starts at a stored state and ends at its first terminated step, which is kept.
        """
        args, slots = self.args, self.args.rollout_starts
        sums = torch.zeros(2, self.learners, device=self.device)
        # A CPU works through chunks that stay in its cache; a GPU takes all rollouts at once.
        chunk = 500 if self.device.type == "cpu" else slots
        for count in [chunk] * (slots // chunk) + [slots % chunk] * (slots % chunk > 0):
            obs = self.split(self.sample_data(count)).obs
            for _ in range(args.horizon):
                action = self.actor.sample(obs)[0]
                if args.rollout_actions == "uniform":
                    action = 2 * torch.rand_like(action) - 1
                reward, next_obs = self.elites.sample(obs, action)
                terminated, reward = self.terminate(next_obs), reward.nan_to_num(0.0, 0.0, 0.0)
                next_obs = next_obs.nan_to_num(0.0).clamp(-self.obs_limit, self.obs_limit)
                sums += torch.stack([terminated.sum(-1), reward.sum(-1)])
                self.remember(Batch(obs, action, reward, next_obs, terminated))
                # MOPO's code: ended rollouts are dropped, a refresh shrinks. Here: the slot of an
                # ended rollout restarts, so that every refresh has the same shape.
                fresh = self.split(self.sample_data(count)).obs
                obs = torch.where(terminated.unsqueeze(-1) > 0, fresh, next_obs)
        means, names = sums / (slots * args.horizon), ("terminated_frac", "reward")
        return {f"rollout/{name}": mean for name, mean in zip(names, means)}

    # --- model ---

    def fit_model(self, log: Callable) -> Tensor:
        """Fit the model, once. -> hold-out errors [L, M]

        Every member sees a bootstrap sample of its own once per epoch, in a new order, until none
        has gained 1 % for `model_patience` epochs. A stopped learner keeps its best members.
        """
        args, model = self.args, self.model
        inputs, targets = self.model_pairs()
        held, train = self.split_rows(len(inputs), args.seed, args.holdout_size)
        model.normalise_by(inputs[train])
        inputs = (inputs - model.input_mean) / model.input_std
        shape = (*model.lead, len(train))
        bootstrap = train[torch.randint(len(train), shape).to(self.device)]
        order, place = bootstrap.clone(), torch.zeros((), dtype=torch.long, device=self.device)
        best = [p.detach().clone() for p in model.members()]
        best_error = torch.full(model.lead, 1e32, device=self.device)
        idle = torch.zeros(model.lead[0], device=self.device)  # epochs without a member's gain
        step = capture(lambda: self.model_step(inputs, targets, order, place), args)
        for epoch in range(args.model_max_epochs):
            reseed(args.seed, "model fit 0", epoch)
            shuffle = torch.rand(shape, device=self.device).argsort(-1)
            torch.gather(bootstrap, -1, shuffle, out=order)
            place.zero_()
            for _ in range(math.ceil(len(train) / args.model_batch_size)):
                logs = step()
            error = self.validate(inputs[held], targets[held])
            gained = (best_error - error) / best_error > 0.01
            gained &= (idle < args.model_patience).unsqueeze(-1)
            best_error = torch.where(gained, error, best_error)
            for saved, now in zip(best, model.members()):
                saved.copy_(torch.where(gained.view(*gained.shape, 1, 1), now.detach(), saved))
            idle = torch.where(gained.any(-1), 0, idle + 1)
            log(f"model fit, epoch {epoch}", logs | {"model/holdout_error": error.mean(-1)})
            if (idle >= args.model_patience).all():
                break
        with torch.no_grad():  # the bounds of the log-variance stay as they are, as in MOPO's code
            for saved, now in zip(best, model.members()):
                now.copy_(saved)
        self.choose_elites(best_error)
        return best_error

    def model_pairs(self) -> tuple[Tensor, Tensor]:
        """The model's inputs [n, S + A] and targets [n, 1 + S], raw, where s' is known."""
        batch = self.split(self.data[self.has_next])
        targets = torch.cat([batch.reward.unsqueeze(-1), batch.next_obs - batch.obs], -1)
        return torch.cat([batch.obs, batch.action], -1), targets

    def split_rows(self, count: int, seed: int, holdout_size: int) -> tuple[Tensor, Tensor]:
        """Numbers of the rows held out, at most a fifth, and of those to train on."""
        reseed(seed, "model split")
        rows, held = torch.randperm(count).to(self.device), min(count // 5, holdout_size)
        return rows[:held], rows[held:]

    def model_step(self, inputs: Tensor, targets: Tensor, order: Tensor, place: Tensor) -> Logs:
        """One Adam step of all members on the next rows of the epoch's order [L, M, n].

        The last batch of an epoch is filled up with its first rows, so that all have one shape.
        """
        args, model = self.args, self.model
        turn = place + torch.arange(args.model_batch_size, device=self.device)
        rows = order.index_select(2, turn % order.shape[2])  # [L, M, B]
        place += args.model_batch_size
        mean, log_std = model(inputs[rows])
        loss = model_loss(mean, log_std, targets[rows]).sum(-1)
        # Keeps the learned bounds of the log-variance from drifting apart (MOPO's code).
        spread = (model.max_log_var - model.min_log_var).flatten(1).sum(-1)
        descend(loss + 0.01 * spread, self.optimizers["model"])
        return {"model/train_nll": loss.detach() / args.ensemble_size}

    @torch.no_grad()
    def validate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error of the members on rows [n, ...], not the likelihood. -> [L, M]"""
        mean, _ = self.model(inputs.expand(*self.model.lead, -1, -1))
        return (mean - targets).square().mean((-2, -1))

    @torch.no_grad()
    def choose_elites(self, error: Tensor) -> None:
        """Copy the members with the lowest hold-out error [L, M] to self.elites."""
        ranked = error.argsort(-1)[:, : self.args.num_elites]  # [L, E]
        learner, model = torch.arange(len(error)).unsqueeze(-1), self.model.state_dict()
        for name, elite in self.elites.state_dict().items():
            of_members = name.startswith(("trunk", "heads"))
            elite.copy_(model[name][learner, ranked] if of_members else model[name])

    # --- evaluation ---

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs [L, n, S] -> actions [L, n, A] in [-1, 1]: the Gaussian's mean, through tanh"""
        mean, _ = self.actor(torch.as_tensor(obs, dtype=torch.float32, device=self.device))
        return torch.tanh(mean).cpu().numpy()


# ===== 5. Training ================================================================================
def train(args: Args, method: type = COMBO) -> dict:
    """Algorithm 1: train args.num_seeds learners; return what result.json holds."""
    dataset, args = load_dataset(args), dataclasses.replace(args, num_seeds=len(pairs(args)))
    combo = method(args, dataset["obs"].shape[1], dataset["action"].shape[1], choose_device(args))
    combo.set_data(dataset)
    run = Run(args, combo, dataset["source"])
    step, rollout = capture(combo.iterate, args), capture(combo.rollout, args)
    if run.iteration == 0 and args.dynamics_from:
        load_model(combo, Path(args.dynamics_from))
    elif run.iteration == 0:
        save_model(combo, combo.fit_model(run.log), run.folder)
    for i in run.iterations():  # which also logs, evaluates and saves
        if i % args.rollout_every == 0:
            reseed(args.seed, "rollout", i)
            run.logs |= rollout()  # D_model
            reseed(args.seed, "iterations", i)
        run.logs |= step()  # Eq. (2), (3)
        if (i + 1) % args.log_every == 0:
            run.logs |= combo.start_values()
    if args.select:
        run.source |= choose_pair(combo)
    return run.finish()


def choose_pair(combo: COMBO) -> dict:
    """Section 3's rule: the lowest E_rho[Q] - E_D[Q], without the environment. Prints a table."""
    reseed(combo.args.seed, "selection")
    rows = [(*pair, value) for pair, value in zip(pairs(combo.args), combo.regularizer().tolist())]
    chosen = min(range(len(rows)), key=lambda n: rows[n][2])
    print("setting   beta      f   E_rho[Q] - E_D[Q]")
    for n, (beta, fraction, value) in enumerate(rows):
        print(f"{n:7d} {beta:6g} {fraction:6g} {value:19.3f}{'   <- chosen' * (n == chosen)}")
    print("scores below were not looked at; their seeds count the settings in this order")
    names = ("beta", "real_fraction", "regularizer")
    return dict(selection=[dict(zip(names, row)) for row in rows], chosen=chosen)


@torch.no_grad()
def probe(args: Args) -> dict:
    """After Figure 2: largest std of the members against the true one-step error, held-out rows.

    Ours: the error is the distance of the elites' mean from (reward, next state), in raw units.
    Writes uncertainty.json and uncertainty.png to the run folder.
    """
    folder, saved = Path(args.probe_uncertainty), load_args(args.probe_uncertainty)
    source = Path(saved.dynamics_from or folder)  # the run that fitted the model, perhaps MOPO's
    with loading(source / "args.json") as fitted:
        learners = 1 if fitted.get("select") else fitted["num_seeds"]
        split = fitted["seed"], fitted["holdout_size"]
    saved = dataclasses.replace(saved, num_seeds=learners, select=False, rollout_starts=1)
    saved.dataset_path = args.dataset_path or saved.dataset_path
    dataset = load_dataset(saved)
    combo = COMBO(saved, dataset["obs"].shape[1], dataset["action"].shape[1], torch.device("cpu"))
    combo.set_data(dataset)
    load_model(combo, source)
    inputs, targets = combo.model_pairs()
    held, _ = combo.split_rows(len(inputs), *split)
    obs, action = inputs[held].expand(learners, -1, -1).split(combo.sizes, -1)
    std, mean = combo.model.predict(obs, action)[1], combo.elites.predict(obs, action)[0]
    std, error = largest_std(std)[0], (mean[0].mean(0) - targets[held]).norm(dim=-1)
    x, y = std.double().numpy(), error.double().numpy()
    (slope, intercept), r2 = np.polyfit(x, y, 1), np.corrcoef(x, y)[0, 1] ** 2
    result = dict(rows=len(held), slope=slope, intercept=intercept, r2=r2)
    result |= dict(uncertainty=std.tolist(), error=error.tolist())
    save(result, folder / "uncertainty.json")
    plot_uncertainty(folder / "uncertainty.png", result, saved.env_id)
    print(f"{len(held)} held-out rows: error = {slope:.3g} * std + {intercept:.3g}, R2 = {r2:.3f}")
    return result


def plot_uncertainty(path: Path, result: dict, title: str) -> None:
    """The scatter of `probe` with its line."""
    axes, x = Figure(layout="constrained").subplots(), np.sort(result["uncertainty"])
    axes.scatter(result["uncertainty"], result["error"], s=6, alpha=0.4, linewidths=0)
    line = result["slope"] * x + result["intercept"]
    axes.plot(x, line, color="black", label=f"least squares, R2 = {result['r2']:.2f}")
    axes.legend(title=title)
    axes.set(xlabel="largest predicted deviation of a member", ylabel="true one-step error")
    axes.figure.savefig(path)


def main(settings: type = Args, method: type = COMBO) -> None:
    """The command line. Mistakes end in one sentence on stderr and a non-zero exit status."""
    args = parse_args(settings)
    if args.probe_uncertainty:
        probe(args)
    elif args.evaluate:
        policy = load_policy(args.evaluate, settings, method)
        report(policy, args, evaluate(policy, args, args.final_episodes, 0), Path(args.evaluate))
    else:
        train(args, method)


# ===== Appendix: the generalisation tasks of both papers ==========================================
class HalfCheetahJumpEnv(HalfCheetahEnv):
    """halfcheetah-jump: no faster than 3 m/s, and the higher the better. It never terminates.

    Observation [18]: qpos but x [8], height of the torso in m [1], qvel [9].
    info["behaviour_reward"] is the task that the data's policy was trained on.
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
        info["behaviour_reward"], jump = float(behaviour), 15.0 * (obs[8] - self.first_height)
        return obs, float(behaviour + jump), terminated, truncated, info


class AntAngleEnv(AntEnv):
    """ant-angle: run at 30 degrees to the x axis, on data from a run along it.

    Observation [27]: qpos but x and y [13], qvel [14]. It terminates as Ant does, when the torso
    leaves heights from 0.2 to 1 m. Velocity: the torso's way during the step over its time.
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


# ===== Appendix, the same in ampl.py, mopo.py and combo.py: what follows may be skipped ===========
def parse_args(settings: type = Args, argv: list[str] | None = None) -> Args:
    """Two passes: the first finds the task or the run whose settings the second starts from."""
    about = "\n\n".join((sys.modules[settings.__module__].__doc__ or "").split("\n\n")[:2])
    for field in dataclasses.fields(settings):
        if field.name.startswith(getattr(settings, "without", ())):  # an ablation's: not taken
            settings.__annotations__[field.name] = tyro.conf.Fixed[field.type]
    first, _ = tyro.cli(settings, args=argv, add_help=False, return_unknown_args=True)
    default = settings(**dict(zip(PAPER_FLAGS, PAPER.get(first.env_id, ()))), env_id=first.env_id)
    mode, new = "resume", ["total_iterations"]  # which flags may be new
    if first.resume is None:
        mode, new = "evaluate", "seed eval_episodes final_episodes async_envs capture_video".split()
    if (run := getattr(first, mode)) is not None:
        default = dataclasses.replace(load_args(run, settings), **{mode: run})
    given = dict(args=argv, default=default, config=(tyro.conf.SuppressFixed,))
    args = tyro.cli(settings, description=about, **given)
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if run is not None and name not in new and value != getattr(default, name):
            sys.exit(f"--{mode} takes {flag} from the run: leave that flag out")
        least = int(name not in ("seed", "warmup_iterations", "threads"))
        if type(value) is int and value < least:
            sys.exit(f"{flag} must be at least {least}")
    if args.track and importlib.util.find_spec("wandb") is None:
        sys.exit("--track needs Weights and Biases: pip install wandb")
    check_args(args)
    return args


# --- data: what `import d4rl` would give, without mujoco_py ---
@functools.cache
def d4rl_tables() -> dict[str, dict]:
    """DATASET_URLS, REF_MIN_SCORE, REF_MAX_SCORE of the installed d4rl, which is not imported."""
    if not (spec := importlib.util.find_spec("d4rl")):
        sys.exit("d4rl's tables are missing: pip install --no-deps d4rl==1.1")
    return runpy.run_path(os.path.join(spec.submodule_search_locations[0], "infos.py"))


def d4rl_score(env_id: str, returns: np.ndarray) -> np.ndarray:
    """100 * (return - min) / (max - min) per episode, D4RL's references; raw returns without."""
    low = d4rl_tables()["REF_MIN_SCORE"].get(env_id, 0.0)
    high = d4rl_tables()["REF_MAX_SCORE"].get(env_id, 100.0)
    return 100 * (np.asarray(returns, np.float64) - low) / (high - low)


def find_dataset(args: Args) -> Path:
    """--dataset-path, else D4RL's folder, else a download into it."""
    url = d4rl_tables()["DATASET_URLS"].get(args.env_id)
    name = (url or f"{args.env_id}.hdf5").rsplit("/", 1)[-1]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    path, part = Path(args.dataset_path or folder / name), folder / f"{name}.{os.getpid()}.part"
    if args.dataset_path or path.exists():
        return path
    if url is None:
        sys.exit(f"{args.env_id} is no D4RL dataset: name an HDF5 file with --dataset-path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part))
        h5py.File(part).close()  # raises on a cut file or a login page
        os.replace(part, path)
    except Exception as error:  # the net, the disk and HDF5 each have their own
        part.unlink(missing_ok=True)
        minari = "D4RL/" + args.env_id.replace("-", "/", 1).rsplit("-", 1)[0] + "-v2"
        way = f"minari download {minari}: ~/.minari/datasets/{minari}/data/main_data.hdf5"
        if not args.env_id.startswith(("pen", "door", "hammer", "relocate")):
            way = "collect.py makes one anew (Minari's sets of this name are other data)"
        sys.exit(f"no {args.env_id} data ({error}): put {url} at {path}, or --dataset-path; {way}")
    return path


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """D4RL's arrays by key; Minari's main_data.hdf5 in the same form."""
    with h5py.File(path) as file:
        if "episode_0" not in file:
            if "note" in file.attrs:  # of collect.py: what this is and is not
                print(file.attrs["note"])
            return {key: file[key][()] for key in file if isinstance(file[key], h5py.Dataset)}
        episodes = [file[f"episode_{i}"] for i in range(len(file))]
        if isinstance(episodes[0]["observations"], h5py.Group):
            sys.exit(f"{path}: observations that are dictionaries do not work here")
        names = {"terminals": "terminations", "actions": "actions", "rewards": "rewards"}
        raw = {key: np.concatenate([e[name][()] for e in episodes]) for key, name in names.items()}
        last = np.cumsum([len(e["rewards"]) for e in episodes]) - 1  # a group is an episode
        raw["timeouts"] = np.isin(np.arange(last[-1] + 1), last) & ~raw["terminals"]
        raw["observations"] = np.concatenate([e["observations"][:-1] for e in episodes])
        raw["next_observations"] = np.concatenate([e["observations"][1:] for e in episodes])
        return raw


def check_arrays(path: Path, raw: dict[str, np.ndarray], env: gymnasium.Env) -> None:
    """Refuse what is odd; in place: to float32, actions to [-1, 1], flags of ends to bool."""
    seen, box = env.observation_space.shape, env.unwrapped.action_space
    shapes = {"observations": seen, "next_observations": seen, "actions": box.shape, "rewards": ()}
    for key in sorted(shapes.keys() - ({"next_observations"} - raw.keys())):
        shape = (len(raw["rewards"]), *shapes[key])
        if raw[key].shape != shape:
            sys.exit(f"{path}: {key} are {raw[key].shape} and not {shape}: of another task?")
        raw[key] = raw[key].astype(np.float32)
        if not np.isfinite(raw[key]).all():
            row = np.argwhere(~np.isfinite(raw[key]))[0][0]
            sys.exit(f"{path}: {key} holds NaN or infinity, first in row {row}")
    action = raw["actions"]
    outside = ((action < box.low - 1e-3) | (action > box.high + 1e-3)).any(1)
    if outside.any():
        sys.exit(f"{path}: the action in row {outside.argmax()} leaves the action space")
    scaled = (action.clip(box.low, box.high) - (box.high + box.low) / 2) / (box.high - box.low) * 2
    raw["actions"] = scaled.astype(np.float32)  # exactly as stored where the bounds are -1 and 1
    rows = np.arange(len(action))
    raw["terminals"] = raw.get("terminals", 0 * rows).astype(bool).reshape(rows.shape)
    if "timeouts" not in raw:  # then episodes end after as many steps as the task has
        begins = np.concatenate([[True], raw["terminals"][:-1]])
        step = 1 + rows - np.maximum.accumulate(np.where(begins, rows, 0))
        limit = env.get_wrapper_attr("_max_episode_steps")
        raw["timeouts"] = (step % limit == 0) & ~raw["terminals"]
    raw["timeouts"] = raw["timeouts"].astype(bool).reshape(rows.shape)


def load_dataset(args: Args) -> dict:
    """Transitions [N, ...] on the CPU, checked; rows at time limits are dropped, as in D4RL.
    has_next [N]: is s' known? (After a terminal stands the next episode's first state; AMPL's and
    MOPO's code take it.) next_row [N]: that of (s', a'), or -1. starts [episodes, S]. source: dict.
    """
    env, path = make_env(args.env_id), find_dataset(args)  # a wrong id is told first
    try:
        raw = read_hdf5(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        check_arrays(path, raw, env)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        sys.exit(f"{path} is missing, cut or no D4RL file ({' '.join(str(error).split())})")
    obs, size = raw["observations"], len(raw["rewards"])
    terminated, timeout = raw["terminals"], raw["timeouts"]
    ended, keep, stored = terminated | timeout, ~timeout, raw.get("next_observations")
    if ended.sum() < 2 or keep.sum() < 4:
        sys.exit(f"{path}: it needs at least two episodes that end, and four rows not at a limit")
    returns = np.diff(np.cumsum(raw["rewards"], dtype=np.float64)[ended], prepend=0.0)
    score = float(d4rl_score(args.env_id, returns).mean())
    if terminated.any() and not args.env_id.lower().startswith(("hopper", "walker", "ant", "pen")):
        print("note: this task's rule of ending is unknown: rollouts end only far outside the data")
    print(f"{path}: {size} rows, {len(returns)} whole episodes with a mean score of {score:.1f}")
    follows = ~ended & (np.arange(size) + 1 < size)  # the next row goes on with this episode
    if stored is None:
        keep[-1] &= terminated[-1]  # a cut tail: its last row has no s'
        stored = np.where(follows[:, None], np.roll(obs, -1, 0), obs)
    next_row = np.where(follows & np.roll(keep, -1), np.roll(np.cumsum(keep) - 1, -1), -1)
    has_next = np.ones(size, bool) if "next_observations" in raw else ~terminated
    rows = dict(obs=obs, action=raw["actions"], reward=raw["rewards"], next_obs=stored)
    rows |= dict(terminated=terminated, has_next=has_next, next_row=next_row)
    rows = {key: torch.from_numpy(value[keep]) for key, value in rows.items()}
    rows["starts"] = torch.from_numpy(obs[np.concatenate([[True], ended[:-1]])])
    return rows | {"source": dict(dataset=str(path), sha256=sha256, rows=size, data_score=score)}


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
# D4RL's layouts: '#' wall, 'O' open, 'G' the goal cell. Row i and column j are x and y.
MAZES = {
    "open": "#######/#OOOOO#/#OOGOO#/#OOOOO#/#######",
    "umaze": "#####/#GOO#/###O#/#OOO#/#####", "eval-umaze": "#####/#OOG#/#O###/#OOO#/#####",
    "medium": "########/#OO##OO#/#OO#OOO#/##OOO###/#OO#OOO#/#O#OO#O#/#OOO#OG#/########",
    "large": "############/#OOOO#OOOOO#/#O##O#O#O#O#/#OOOOOO#OOO#/#O####O###O#/"
    "#OO#O#OOOOO#/##O#O#O#O###/#OO#OOO#OGO#/############",
    "eval-medium": "########/#OOOOOG#/#O#O##O#/#OOOO#O#/###OO###/#OOOOOO#/#OO##OO#/########",
    "eval-large": "############/#OO#OOO#OGO#/##O###O#O#O#/#OO#O#OOOOO#/#O##O#OO##O#/"
    "#OOOOOO#OOO#/#O##O#O#O###/#OOOO#OOOOO#/############",
}  # fmt: skip
MAZE_LIMITS = {"open": 150, "umaze": 300, "medium": 600, "large": 800}


def known_termination(env_id: str, s: Tensor) -> Tensor:
    """The task's own rule, on next observations [..., S] -> bool [...]."""
    family = env_id.split("-")[0].lower()
    if family == "hopper":
        sane = s.isfinite().all(-1) & (s[..., 1:].abs() < 100).all(-1)
        return ~(sane & (s[..., 0] > 0.7) & (s[..., 1].abs() < 0.2))
    if family == "walker2d":
        return ~((s[..., 0] > 0.8) & (s[..., 0] < 2.0) & (s[..., 1].abs() < 1.0))
    if family == "ant":  # heights in m, from gymnasium's Ant
        return ~(s.isfinite().all(-1) & (s[..., 0] >= 0.2) & (s[..., 0] <= 1.0))
    if family == "pen":  # height of the pen in m
        return s[..., 26] < 0.075
    return torch.zeros_like(s[..., 0], dtype=torch.bool)  # halfcheetah, maze2d, other Adroit: never


class D4RLSemantics(gymnasium.Wrapper):
    """Ends and rewards a step as D4RL's environments do and gymnasium's successors do not."""

    def __init__(self, env: gymnasium.Env, family: str, reach: Callable | None):
        super().__init__(env)
        self.family, self.reach = family, reach

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.family == "pen":  # gymnasium-robotics goes on after a drop; obs[26]: height in m
            terminated = bool(obs[26] < 0.075)
        if self.reach is not None:  # gymnasium-robotics 1.4.2 has +0.1 * distance, D4RL -0.1
            reward -= 0.2 * np.linalg.norm(self.reach(obs))
        return obs, float(reward), terminated and not truncated, truncated, info  # as in D4RL


class Maze2d(gymnasium.Wrapper):
    """D4RL's maze2d: PointMaze's ball, walls and speed limit; its own frame, starts and reward."""

    def __init__(self, maze: str, dense: bool, render_mode: str | None):
        from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

        rows = MAZES[maze].split("/")
        walls = [[int(kind == "#") for kind in column] for column in zip(*rows)][::-1]
        super().__init__(PointMazeEnv(maze_map=walls, render_mode=render_mode).point_env)
        cells = [(kind, (i, j)) for i, row in enumerate(rows) for j, kind in enumerate(row)]
        self.open = np.array([cell for kind, cell in cells if kind in "OG"], np.float64)
        self.goal = np.array([cell for kind, cell in cells if kind == "G"][0], np.float64)
        self.origin = np.array([len(rows), len(rows[0]), 0, 0]) / 2 - [0.7, 0.7, 0, 0]
        self.dense = dense

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed)
        random = self.unwrapped.np_random
        position = self.open[random.integers(len(self.open))] + random.uniform(-0.1, 0.1, 2)
        self.unwrapped.set_state(position - self.origin[:2], 0.1 * random.standard_normal(2))
        return self.unwrapped._get_obs()[0] + self.origin, {}

    def step(self, action):
        obs = self.env.step(action)[0] + self.origin
        distance = np.linalg.norm(obs[:2] - self.goal)
        reward = np.exp(-distance) if self.dense else float(distance <= 0.5)
        return obs, float(reward), False, False, {}


def make_env(env_id: str, render_mode: str | None = None) -> gymnasium.Env:
    """A D4RL id with D4RL's semantics, else any registered environment; actions in [-1, 1]."""
    urls, (family, *words) = d4rl_tables()["DATASET_URLS"], env_id.split("-")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # else "-v4 is out of date"; it is D4RL's
    mujoco.set_mju_user_warning(lambda text: None)  # mujoco 4 on HalfCheetah's `settotalmass`
    with contextlib.redirect_stderr(io.StringIO()):  # a note on other versions of it
        import gymnasium_robotics
    gymnasium.register_envs(gymnasium_robotics)
    if env_id in urls and family == "maze2d":
        maze = "-".join(word for word in words[:-1] if word != "dense")
        env = Maze2d(maze, "dense" in words, render_mode)
        return gymnasium.wrappers.TimeLimit(env, MAZE_LIMITS[maze.removeprefix("eval-")])
    if env_id in urls and family in SIMULATORS:
        name, limit, reach = SIMULATORS[family]
        env = gymnasium.make(name, max_episode_steps=limit, render_mode=render_mode)
        return D4RLSemantics(env, family, reach)
    if env_id in urls:
        sys.exit(f"--env-id {env_id}: D4RL's {family} tasks have no simulator here")
    try:
        env = gymnasium.make(env_id, **(dict(render_mode=render_mode) if render_mode else {}))
        if env.spec.max_episode_steps is None:
            env = gymnasium.wrappers.TimeLimit(env, 1000)
    except Exception as error:  # gymnasium's own, ImportError, whatever a constructor raises
        near = difflib.get_close_matches(env_id, {*urls, *gymnasium.registry} - {env_id})
        why = " ".join(str(error).split())
        sys.exit(f"cannot make {env_id} ({why}): did you mean {' or '.join(near) or 'another'}?")
    spaces = env.observation_space, env.action_space
    if not all(isinstance(x, gymnasium.spaces.Box) and len(x.shape) == 1 for x in spaces):
        sys.exit(f"--env-id {env_id}: only flat observations and flat, continuous actions work")
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


@functools.lru_cache(maxsize=1)
def vector_env(env_id: str, count: int, asynchronous: bool) -> gymnasium.vector.VectorEnv:
    """`count` environments, made once: an Adroit one takes 0.1 s to build."""
    kind = gymnasium.vector.AsyncVectorEnv if asynchronous else gymnasium.vector.SyncVectorEnv
    return kind([functools.partial(make_env, env_id)] * count)


def evaluate(method: nn.Module, args: Args, episodes: int, k: int) -> np.ndarray:
    """D4RL scores [L, episodes]: rounds of one episode in each of `eval_episodes` environments."""
    shape, rounds = (method.learners, args.eval_episodes), []
    many_cores = method.device.type == "cuda" and os.cpu_count() >= 8
    asynchronous = many_cores if args.async_envs is None else args.async_envs
    envs = vector_env(args.env_id, math.prod(shape), asynchronous)
    with torch.random.fork_rng():
        reseed(args.seed, "evaluation", k)
        for first in range(0, episodes, args.eval_episodes):
            returns, live = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
            obs, _ = envs.reset(seed=10**10 * args.seed + 1000 * (k + first))  # all differ
            while live.any():
                action = method.act(obs.reshape(*shape, -1)).reshape(envs.num_envs, -1)
                obs, reward, terminated, truncated, _ = envs.step(action)
                returns += live * reward
                live &= ~(terminated | truncated)
            rounds.append(d4rl_score(args.env_id, returns.reshape(shape)))
    return np.concatenate(rounds, 1)[:, :episodes]


def report(method: nn.Module, args: Args, final: np.ndarray, run: Path) -> None:
    """Print the scores `final` [L, episodes], and render an episode if asked."""
    for seed, x in enumerate(final, args.seed):
        print(f"seed {seed}: normalized score {x.mean():.1f} +- {x.std() / len(x) ** 0.5:.1f}")
    if args.capture_video:
        record_episode(method, args, run / "episode.gif")


def record_episode(method: nn.Module, args: Args, path: Path) -> None:
    """An episode of the first learner, every third step, as a GIF."""
    env, frames, over = make_env(args.env_id, render_mode="rgb_array"), [], False
    obs, _ = env.reset(seed=args.seed)
    while not over:
        try:
            frames.append(Image.fromarray(env.render()))
        except Exception as error:  # every OpenGL backend fails in its own way
            sys.exit(f"cannot render ({error}); without a screen set MUJOCO_GL=egl or osmesa")
        action = method.act(np.stack([obs[None]] * method.learners))[0, 0]
        obs, _, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
    frames[0].save(path, save_all=True, append_images=frames[3::3], duration=50, loop=0)


def choose_device(args: Args) -> torch.device:
    """The GPU if there is one, else the CPU with its faster library; precision of products."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.backends.cuda.matmul.fp32_precision = "tf32" if args.tf32 else "ieee"
    warnings.filterwarnings("ignore", ".*capturable=True.*")  # the real steps before a recording
    if args.cuda and torch.cuda.is_available():
        return torch.device("cuda")
    if args.cpu_fast_matmul:
        # "bf16" lets oneDNN compute products, in bf16 if it likes. Without AMX it does not: fp32,
        # up to 1.7 times faster than torch's default on AMD. So the result decides.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        a, b = torch.randn(2, 512, 400), torch.randn(2, 400, 300)
        for left, right in ((a, b), (a @ b, b.mT), (a.mT, a @ b)):
            exact = left.double() @ right.double()
            if (left @ right - exact).abs().max() > 5e-6 * exact.abs().max():
                torch.backends.mkldnn.matmul.fp32_precision = "none"
    return torch.device("cpu")


def capture(step: Callable[[], dict], args: Args) -> Callable[[], dict]:
    """`step`, recorded as a CUDA graph at its fourth call and replayed after; as it is on a CPU."""
    if not (args.cuda and args.cuda_graphs and torch.cuda.is_available()):
        return step
    graph, stream, logs, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), {}, 0

    def call() -> dict:
        nonlocal calls
        calls += 1
        if calls == 4:
            with torch.cuda.graph(graph):
                logs.update(step())
        if calls >= 4:
            graph.replay()
            return logs
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # real steps, on the side stream that recording asks for
            result = step()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    return call


def reseed(seed: int, phase: str, k: int = 0) -> None:
    """A seed for each phase (a name and a number), so that phases do not disturb one another."""
    digest = hashlib.sha256(f"{seed} {phase} {k}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "little"))


class Run:
    """A run and its folder: progress, TensorBoard, evaluations, checkpoints, result.json."""

    def __init__(self, args: Args, method: nn.Module, source: dict):
        self.args, self.method, self.source = args, method, source
        self.iteration, self.logs, self.started = 0, {}, time.monotonic()
        self.curves = []  # per evaluation: iteration, score of each learner
        self.algo = Path(sys.modules[type(method).__module__].__file__).stem
        name = f"{args.env_id}__{self.algo}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.resume or Path(args.run_dir) / name.replace("/", "-"))
        if args.resume:
            self.load_checkpoint()
        elif self.folder.exists():
            sys.exit(f"{self.folder} is there already: start again in a second")
        save(vars(args) | {"resume": None}, self.folder / "args.json")
        for kind in type(method).mro()[:-2]:  # its own file, and those of its base classes
            file = Path(sys.modules[kind.__module__].__file__)
            (self.folder / file.name).write_bytes(file.read_bytes())
        if args.track:
            wandb = importlib.import_module("wandb")
            where = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=name)
            wandb.init(**where, config=vars(args), sync_tensorboard=True)
        self.writer = SummaryWriter(str(self.folder), purge_step=args.resume and self.iteration + 1)
        self.saved, self.saved_at = self.iteration, time.monotonic()  # the last checkpoint
        self.bar = tqdm(total=args.total_iterations, initial=self.iteration)

    def log(self, phase: str, logs: dict[str, Tensor]) -> None:
        """Tensors [L] to TensorBoard, at the present iteration."""
        self.bar.set_postfix_str(phase)
        for key, values in logs.items():
            for seed, value in enumerate(values.tolist(), self.args.seed):
                if not math.isfinite(value):
                    sys.exit(f"{phase}: {key} is {value}; {self.folder} keeps its last checkpoint")
                self.writer.add_scalar(f"{key}/seed_{seed}", value, self.iteration)

    def iterations(self) -> Iterator[int]:
        """The numbers of the iterations to be done; logs, evaluates and saves after each."""
        args = self.args
        while self.iteration < args.total_iterations:
            yield self.iteration
            self.iteration += 1
            self.bar.update()
            last = self.iteration == args.total_iterations
            waited = self.method.device.type == "cpu" or time.monotonic() - self.saved_at >= 60
            save_now = last or (self.iteration - self.saved >= args.checkpoint_every and waited)
            if self.iteration % args.log_every == 0 or save_now:
                self.log("training", self.logs)  # stops at NaN, before a checkpoint could hold it
            if self.iteration % args.eval_every == 0 or last:
                scores = evaluate(self.method, args, args.eval_episodes, self.iteration).mean(1)
                self.curves.append([self.iteration, *scores.tolist()])
                self.log("evaluation", {"eval/normalized_score": torch.tensor(scores)})
                self.bar.write(f"iteration {self.iteration}: score {scores.round(1)}")
            if save_now:
                self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """checkpoint.pt to go on from, policy.pt to use, curves.png to look at."""
        method, state = self.method, self.method.state_dict()
        random = torch.cuda if method.device.type == "cuda" else torch
        optimizers = {name: optimizer.state_dict() for name, optimizer in method.optimizers.items()}
        content = self.source | dict(algo=self.algo, iteration=self.iteration, curves=self.curves)
        content |= dict(method=state, optimizers=optimizers, device=method.device.type)
        content |= dict(seconds=time.monotonic() - self.started, rng=random.get_rng_state())
        policy = {k: v for k, v in state.items() if k.startswith(("actor.", "critic."))}
        save(dict(policy=policy, sizes=method.sizes), self.folder / "policy.pt")
        if self.curves:
            self.plot_curves()
        save(content, self.folder / "checkpoint.pt")  # last: a cut before it is made good
        self.saved, self.saved_at = self.iteration, time.monotonic()

    def load_checkpoint(self) -> None:
        """Put weights, buffer, optimizers, random state and progress back."""
        method, kind = self.method, self.method.device.type
        with loading(self.folder / "checkpoint.pt", method.device) as saved:
            if (saved["algo"], saved["sha256"]) != (self.algo, self.source["sha256"]):
                raise ValueError(f"a run of {saved['algo']}.py on {saved['dataset']} as it was")
            if saved["iteration"] > self.args.total_iterations:
                raise ValueError(f"it is at {saved['iteration']}: raise --total-iterations")
            method.load_state_dict(saved["method"])
            for name, optimizer in saved["optimizers"].items():
                load_optimizer(method.optimizers[name], optimizer)
            self.iteration, self.curves = saved["iteration"], saved["curves"]
            self.started -= saved["seconds"]
        if saved["device"] == kind:
            (torch.cuda if kind == "cuda" else torch).set_rng_state(saved["rng"].cpu())
        else:
            print(f"note: resumed on {kind}, which draws otherwise than {saved['device']} did")

    def plot_curves(self) -> None:
        """curves.png: the score of every learner against the iterations."""
        axes = Figure(layout="constrained").subplots()
        axes.plot(*np.split(np.array(self.curves), [1], 1))  # iteration, one score per learner
        axes.legend([f"seed {self.args.seed + i}" for i in range(self.args.num_seeds)])
        axes.set(xlabel="iteration", ylabel="score", title=f"{self.algo} on {self.args.env_id}")
        axes.figure.savefig(self.folder / "curves.png")

    def finish(self) -> dict:
        """The final evaluation and result.json, which is returned."""
        self.writer.close()
        self.bar.close()
        args, seconds = self.args, time.monotonic() - self.started
        final = evaluate(self.method, args, args.final_episodes, 0)
        result = dict(algo=self.algo, env_id=args.env_id, **self.source, curves=self.curves)
        result |= dict(seeds=[args.seed + i for i in range(args.num_seeds)], args=vars(args))
        result |= dict(mean_last_ten=np.mean(self.curves[-10:], 0)[1:].tolist(), seconds=seconds)
        result |= dict(last=self.curves[-1][1:], final_mean=final.mean(1).tolist())
        result |= dict(final_scores=final.tolist(), total_iterations=self.iteration)
        result |= dict(steps_per_second=self.iteration / seconds, device=str(self.method.device))
        result["versions"] = {m.__name__: m.__version__ for m in (torch, np, gymnasium, mujoco)}
        result["git"] = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
        save(result, self.folder / "result.json")
        report(self.method, args, final, self.folder)
        print(f"mean of the last ten: {np.round(result['mean_last_ten'], 1)}; see {self.folder}")
        return result


def save(content: dict, path: Path) -> None:
    """Tensors and plain values, or JSON, to a file that is the old or the new one, never half."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.part", "wb") as file:
            if path.suffix == ".json":
                file.write(json.dumps(content, indent=1).encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        sys.exit(f"cannot write {path} ({error}); what was there is unharmed")


@contextlib.contextmanager
def loading(path: Path, device: torch.device | str = "cpu"):
    """The content of a saved file; what goes wrong with it ends in one sentence."""
    try:
        if path.suffix == ".json":
            yield json.loads(path.read_text())
        else:
            yield torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        sys.exit(f"there is no {path}: did that run get so far?")
    except Exception as error:  # torch, pickle, zipfile and our look-ups each have their own
        sys.exit(f"{path} is damaged or of another setting ({' '.join(str(error).split())[:200]})")


def load_args(run: str, settings: type = Args) -> Args:
    """The settings that a run was started with."""
    with loading(Path(run) / "args.json") as saved:
        return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def load_optimizer(optimizer: torch.optim.Adam, saved: dict) -> None:
    """Its moments and counts; learning rate and the like stay as they are here."""
    optimizer.load_state_dict(saved | {"param_groups": optimizer.state_dict()["param_groups"]})


def save_model(method: nn.Module, error: Tensor, run: Path) -> None:
    """The first model and its hold-out errors [L, M], for --dynamics-from."""
    optimizer = method.optimizers["model"].state_dict()
    save(dict(model=method.model.state_dict(), optimizer=optimizer, error=error), run / "model.pt")


def load_model(method: nn.Module, run: Path) -> None:
    """What save_model saved."""
    with loading(run / "model.pt", method.device) as saved:
        method.model.load_state_dict(saved["model"])
        load_optimizer(method.optimizers["model"], saved["optimizer"])
        method.choose_elites(saved["error"])


def load_policy(run: str, settings: type, method: type) -> nn.Module:
    """What acts as a run's policy did: its `act`, on the CPU. Raises SystemExit."""
    args = load_args(run, settings)
    with loading(Path(run) / "policy.pt") as saved:
        policy = method(args, *saved["sizes"], torch.device("cpu"))
        policy.load_state_dict(saved["policy"], strict=False)
    return policy


if __name__ == "__main__":
    main()
