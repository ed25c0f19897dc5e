# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "d4rl==1.1", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "h5py==3.16.0",
#   "matplotlib==3.11.2", "mujoco==4.0.0", "numpy==2.4.6", "pillow", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""AMPL: offline model-based RL that alternates model training and policy learning, in one file.

Yang, Zhang, Feng, Zhou: A Unified Framework for Alternating Offline Model Training and Policy
Learning, NeurIPS 2022. A model fitted once to the data is good where the data is, not where the
policy goes. AMPL refits it with weights omega, which say how many times as often as the data the
policy visits each stored (s, a), and keeps the policy's (s, a) pairs close to the data's by a GAN.

Algorithm 1, in the order of the authors' code, with the equations as they are tagged below:

    initialise policy, critics, discriminator, omega; fit the model to the data       Eq. (4)
    for each iteration:
        every `model_retrain_every`: estimate omega, refit the model with it          Eq. (11), (6)
        every `rollout_every`: roll the policy out in the model into a FIFO buffer
        sample a batch, a part from the data and the rest from the buffer
        critics:       regress on a conservative target                               Eq. (12), (13)
        GAN pairs:     the data's (s, a) and the policy's (s, a), (s', a')            Eq. (14)
        policy:        maximise Q, and fool the discriminator                         Eq. (15), (17)
        discriminator: tell the two kinds of pairs apart                              Eq. (16)

`# Paper: ... Code: ... Here: ...` marks a place where the paper's main text and the authors' code
(Shentao-YANG/AMPL_NeurIPS2022) differ, and says what this file does. Eq. (1)-(3), (5) and (7)-(9)
are theory and have no line. What follows `main` may be skipped. The method uses of it above all
`reseed` (a seed for each phase), `capture` (a step as a CUDA graph; on a CPU the step itself),
`known_termination` (a task's rule of ending), `make_env`, `load_dataset` and `Run`.

Run: `python ampl.py --env-id pen-human-v1`. Settings of the paper's sixteen tasks: `PAPER`.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
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
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ===== 1. Arguments ===============================================================================
@dataclasses.dataclass
class Args:
    # --- experiment ---
    env_id: str = "maze2d-umaze-v1"  # a task of PAPER or D4RL, or a gymnasium id + --dataset-path
    seed: int = 0  # learner i is labelled seed + i; alone, --seed seed+i gives another run
    num_seeds: int = 1  # independent learners trained side by side (the paper reports 5)
    total_iterations: int = 1_000_000  # of the main loop (authors' code: 1000 epochs of 1000)
    run_dir: str = "runs"  # folder that receives the run's own folder
    resume: str | None = None  # go on with this run folder; only --total-iterations may be new
    evaluate: str | None = None  # only score the policy saved in this run folder
    dynamics_from: str | None = None  # take the first, unweighted model from this run folder
    # --- tracking and saving ---
    track: bool = False  # also log to Weights and Biases (needs `pip install wandb`)
    wandb_project_name: str = "ampl"  # project of --track
    wandb_entity: str | None = None  # team of --track
    log_every: int = 1000  # iterations between two points in TensorBoard
    checkpoint_every: int = 10_000  # at least so many iterations apart, on a GPU also a minute
    capture_video: bool = False  # render an episode to episode.gif (no screen: MUJOCO_GL=egl)
    # --- data ---
    dataset_path: str | None = None  # HDF5 of D4RL or Minari; else D4RL's folder, else its server
    initial_states: Literal["simulator", "dataset"] = "simulator"  # mu0: resets (code), or data's
    num_initial_states: int = 100_000  # how many resets (authors' code)
    # --- world model ---
    ensemble_size: int = 7  # members (authors' code)
    num_elites: int = 5  # members with the lowest hold-out error make predictions (authors' code)
    model_hidden: int = 200  # width of the four hidden layers (authors' code)
    model_lr: float = 1e-3  # Adam (authors' launch script; their program's 3e-4 is never used)
    model_batch_size: int = 128  # rows per member and step (authors' code)
    model_weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # per layer (code)
    model_epoch_steps: int = 1000  # steps between two looks at the hold-out error (authors' code)
    model_patience: int = 10  # epochs in which no member improved that end a fit (authors' code)
    model_max_epochs: int = 10_000  # at most this many epochs per fit (authors' code)
    holdout_size: int = 8092  # rows held out (sic), at most a fifth (authors' code)
    model_retrain_every: int = 100_000  # iterations between two weighted re-trainings (paper)
    # --- rollouts ---
    horizon: int = 3  # model steps per rollout (authors' launch script, per task)
    rollout_every: int = 250  # iterations between two refreshes of the buffer (launch script)
    rollout_rows: int = 32_000  # transitions per refresh: 128 per iteration (launch script)
    buffer_size: int = 640_000  # rows of model data, first in first out (launch script)
    real_fraction: float = 0.5  # share f of real rows in a batch, once it has fallen from 1 (paper)
    real_decay_every: int = 5000  # it falls by 0.1 every this many iterations (authors' code)
    shared_rollout_action: bool = False  # a whole batch gets one action (authors' code: a bug)
    # --- critic ---
    gamma: float = 0.99  # discount (authors' code)
    tau: float = 0.005  # Polyak rate of the target critic and target policy (authors' code)
    batch_size: int = 512  # rows per iteration (authors' launch script)
    critic_lr: float = 3e-4  # Adam (authors' code)
    critic_grad_norm: float = 0.1  # gradient norm of both critics together (authors' code)
    critic_huber_delta: float = 500.0  # Huber threshold, in effect half a square (authors' code)
    q_min_weight: float = 0.75  # weight c of the smaller target in Eq. (12) (paper)
    q_bound: float = 2000.0  # bootstrap values beyond this count as zero (authors' code)
    # --- policy and discriminator ---
    hidden: tuple[int, int] = (400, 300)  # layers of all networks but the model (authors' code)
    noise_dim: int = 50  # noise inputs of the implicit policy (authors' launch script, per task)
    noise_std: float = 1.0  # their deviation; clamped to +-3 after scaling (the same)
    actor_lr: float = 2e-4  # Adam of the policy (authors' code)
    discriminator_lr: float = 2e-4  # Adam of the discriminator (authors' code)
    gan_beta1: float = 0.4  # first Adam coefficient of policy and discriminator (authors' code)
    policy_frequency: int = 2  # the policy moves on every n-th iteration (authors' code)
    warmup_iterations: int = 40_000  # the policy only imitates through the GAN (authors' code)
    q_coef: float = 10.0  # lambda' of Eq. (17), divided by the running mean of |Q| (paper)
    label_smoothing: float = 0.8  # labels of true pairs are drawn from [this, 1) (authors' code)
    # --- marginal importance weights (MIW) ---
    miw_steps: int = 100_000  # steps of each training of omega (authors' code)
    miw_lr: float = 1e-6  # Adam (authors' code)
    miw_batch_size: int = 1024  # data rows per step (authors' code)
    miw_initial_batch_size: int = 2048  # initial states per step (authors' code)
    miw_alpha: float = 0.2  # omega = softplus(.) ** alpha (launch script: 0.5 on locomotion)
    miw_tau: float = 0.01  # Polyak rate of the slow copies of omega and of Q (authors' code)
    miw_mean_bound: float = 10.0  # the mean of omega is kept below this (authors' code)
    miw_grad_norm: float = 1.0  # gradient norm after the projection (authors' code)
    # --- evaluation ---
    eval_every: int = 1000  # iterations between two evaluations (authors' code)
    eval_episodes: int = 10  # episodes per evaluation (authors' code)
    final_episodes: int = 100  # episodes after training (ours: pen's returns deviate by 1800)
    eval_candidates: int = 10  # actions drawn per state, the best by min Q is taken (authors' code)
    async_envs: bool | None = None  # a process per episode; default: on a GPU machine with 8 cores
    # --- speed ---
    cuda: bool = True  # train on the GPU where there is one
    cuda_graphs: bool = True  # record the training steps as CUDA graphs (no effect on a CPU)
    tf32: bool = False  # let the GPU round inputs of products to 10 bits: faster, errors of 1e-3
    cpu_fast_matmul: bool = True  # oneDNN for fp32 products, where a self-check finds fp32 accuracy
    threads: int = 0  # CPU threads of torch; 0 leaves torch's default


# Per task, from the launch script of the authors' code. Other tasks: the defaults above, ours.
# Code: noise_dim 0 stands for min(10, S // 2): 2 on maze2d-umaze, 10 on door. Here: written out.
PAPER_FLAGS = ("horizon", "noise_dim", "miw_alpha", "noise_std")
PAPER = {
    "halfcheetah-medium-v2":        (1, 50, 0.5, 1.0),
    "halfcheetah-medium-replay-v2": (3, 50, 0.5, 1.0),
    "halfcheetah-medium-expert-v2": (5, 50, 0.5, 1.0),
    "hopper-medium-v2":             (1, 50, 0.5, 1.0),
    "hopper-medium-replay-v2":      (1, 50, 0.5, 1.0),
    "hopper-medium-expert-v2":      (3, 50, 0.5, 1.0),
    "walker2d-medium-v2":           (3, 50, 0.5, 1.0),
    "walker2d-medium-replay-v2":    (5, 50, 0.5, 1.0),
    "walker2d-medium-expert-v2":    (5, 50, 0.5, 1.0),
    "maze2d-umaze-v1":              (3,  2, 0.2, 1.0),
    "maze2d-medium-v1":             (3, 50, 0.2, 1.0),
    "maze2d-large-v1":              (1, 50, 0.2, 1.0),
    "pen-human-v1":                 (1,  1, 0.2, 1e-3),
    "pen-cloned-v1":                (5,  1, 0.2, 1e-3),
    "pen-expert-v1":                (1, 50, 0.2, 1.0),
    "door-expert-v1":               (1, 10, 0.2, 1.0),
}  # fmt: skip


def check_args(args: Args) -> None:
    """Refuse what makes no sense. Raises SystemExit."""
    if args.warmup_iterations > args.total_iterations and not args.evaluate:
        sys.exit("the warm start is longer than the run: lower --warmup-iterations")
    if args.num_elites > args.ensemble_size or args.rollout_rows > args.buffer_size:
        sys.exit("--num-elites must fit --ensemble-size, and --rollout-rows must fit --buffer-size")


# ===== 2. Networks ================================================================================
# Several learners (seeds) train side by side: every parameter and batch carries their axis first.
# Shapes: L learners (read it as 1), M members of the ensemble, E elites, B rows of a batch, N rows
# of the data, n of a fit, N0 initial states (B0 a step), S observation, A action, C = 2S + A + 2.
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
    """Two hidden layers with leaky ReLU (slope 0.01). forward: [*lead, B, in] -> [*lead, B, out]"""

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
    """tanh(net(s, z)), z ~ N(0, noise_std^2): forward samples a raw (pre-tanh) action [L, B, A]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.noise_dim, self.noise_std = args.noise_dim, args.noise_std
        self.net = MLP((args.num_seeds,), obs_dim + args.noise_dim, args.hidden, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        # Paper: z ~ p_z. Code: N(0, noise_std^2), clamped to +-3 after scaling. Here: code.
        noise = torch.randn(*obs.shape[:-1], self.noise_dim, device=obs.device)
        noise = (self.noise_std * noise).clamp(-3, 3)
        return self.net(torch.cat([obs, noise], -1))


class TwinCritic(nn.Module):
    """Q_1 and Q_2. forward: obs [L, B, S], action [L, B, A] -> [L, 2, B]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = MLP((args.num_seeds, 2), obs_dim + action_dim, args.hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1).unsqueeze(1)  # [L, 1, B, S + A]
        return self.net(x.expand(-1, 2, -1, -1)).squeeze(-1)

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q_1 alone, [L, B]: all that the training of omega needs, at half the cost."""
        x = torch.cat([obs, action], -1)
        for layer in (self.net.layer1, self.net.layer2):
            x = F.leaky_relu(torch.baddbmm(layer.bias[:, 0], x, layer.weight[:, 0]))
        return torch.baddbmm(self.net.out.bias[:, 0], x, self.net.out.weight[:, 0]).squeeze(-1)


class Discriminator(nn.Module):
    """Logit of "this (s, raw action) pair is from the data". forward -> [L, B]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = MLP((args.num_seeds,), obs_dim + action_dim, args.hidden, 1)

    def forward(self, obs: Tensor, raw_action: Tensor) -> Tensor:
        # Paper: input a. Code: the raw action, data actions through atanh. Here: code.
        return self.net(torch.cat([obs, raw_action], -1)).squeeze(-1)


class ImportanceWeight(nn.Module):
    """omega(s, a) = softplus(net(s, a)) ** alpha, not yet normalised. forward -> [L, B] > 0."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha = args.miw_alpha
        self.net = MLP((args.num_seeds,), obs_dim + action_dim, args.hidden, 1)
        nn.init.uniform_(self.net.out.weight, -3e-3, 3e-3)  # authors' code, as the zero bias
        nn.init.zeros_(self.net.out.bias)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = self.net(torch.cat([obs, action], -1)).squeeze(-1)
        # Paper: unspecified. Code: softplus to the power alpha, with both 1e-8. Here: code.
        return (F.softplus(x - 1e-8) + 1e-8) ** self.alpha


class DynamicsEnsemble(nn.Module):
    """M Gaussian models of (reward, next_obs - obs), in units of the data's mean and deviation.

    forward: normalised inputs [L, M, B, S + A] -> mean, log_std [L, M, B, 1 + S].
    """

    def __init__(self, members: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim + action_dim] + 4 * [args.model_hidden]
        self.lead = lead = (args.num_seeds, members)
        self.trunk = nn.ModuleList(Linear(lead, i, o) for i, o in zip(sizes, sizes[1:]))
        self.heads = Linear(lead, sizes[-1], 2 * (1 + obs_dim))  # mean and log_std side by side
        for layer in [*self.trunk, self.heads]:
            # Normal, values beyond 2 replaced by their remainder: the authors' truncated normal.
            std = 1 / (2 * math.sqrt(layer.weight.shape[-2]))
            layer.weight.data.normal_().fmod_(2).mul_(std)
            nn.init.zeros_(layer.bias)
        # Soft bounds of log_std, learned, shared by the members of a learner (authors' code).
        self.max_log_std = nn.Parameter(torch.full((args.num_seeds, 1, 1, 1 + obs_dim), 0.25))
        self.min_log_std = nn.Parameter(torch.full((args.num_seeds, 1, 1, 1 + obs_dim), -5.0))
        self.register_buffer("input_mean", torch.zeros(obs_dim + action_dim))
        self.register_buffer("input_std", torch.ones(obs_dim + action_dim))
        self.register_buffer("target_mean", torch.zeros(1 + obs_dim))
        self.register_buffer("target_std", torch.ones(1 + obs_dim))
        self.register_buffer("member", torch.arange(members), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape, x = x.shape[:-1], x.flatten(0, -3)
        for layer in self.trunk:
            x = F.silu(layer(x), inplace=not torch.is_grad_enabled())  # backward needs layer(x)
        mean, log_std = self.heads(x).view(*shape, -1).chunk(2, -1)
        log_std = self.max_log_std - F.softplus(self.max_log_std - log_std)
        log_std = self.min_log_std + F.softplus(log_std - self.min_log_std)
        return mean, log_std

    def members(self) -> list[Tensor]:
        """The parameters of the members, [L, M, ...] each: all but the two bounds."""
        return [p for layer in [*self.trunk, self.heads] for p in layer.parameters()]

    @torch.no_grad()
    def normalise_by(self, inputs: Tensor, targets: Tensor) -> None:
        """Set the units from data rows [N, S + A] and [N, 1 + S]; floor 1e-12: authors' code."""
        self.input_mean.copy_(inputs.double().mean(0))
        self.input_std.copy_(inputs.double().std(0).clamp(min=1e-12))
        self.target_mean.copy_(targets.double().mean(0))
        self.target_std.copy_(targets.double().std(0).clamp(min=1e-12))

    @torch.no_grad()
    def sample(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Draw reward [L, B] and next_obs [L, B, S], every row from one member.

        Rows are dealt to the members like cards, row i to member i - cut modulo M: at random, since
        rows of a batch are, and a rollout, which keeps its row, changes members by the random cut.
        7 rows, 5 members, cut 3: padded to 10; member 0 gets rows 3 and 8, member 1 rows 4 and 9.
        """
        # Paper: silent. Code: a random member per row, all evaluated. Here: equal shares, one is.
        members, rows = self.lead[1], obs.shape[1]
        x = (torch.cat([obs, action], -1) - self.input_mean) / self.input_std
        x = F.pad(x, (0, 0, 0, -rows % members)).unflatten(1, (-1, members))  # [L, B / M, M, S + A]
        cut = torch.randint(members, (), device=obs.device)  # a tensor: no wait for the GPU
        mean, log_std = self(x[:, :, (self.member + cut) % members].transpose(1, 2))
        y = mean + log_std.exp() * torch.randn_like(mean)
        y = y.transpose(1, 2)[:, :, (self.member - cut) % members].flatten(1, 2)[:, :rows]
        # NaN becomes 0, as in the authors' code. The clamp is ours: predictions far outside the
        # data, which end a rollout, must not overflow the other networks.
        y = (y * self.target_std + self.target_mean).nan_to_num(nan=0.0).clamp(-1e6, 1e6)
        return y[..., 0], obs + y[..., 1:]


# ===== 3. Equations; at the end what every step is made of ========================================
# Losses average over the batch and keep the learners apart: they return [L], the caller sums.
def scale_rewards(reward: Tensor) -> Tensor:
    """Rewards [N] to about [0, 1], the scale that the constants assume."""
    # Paper: the task's rewards. Code: min-max scaled, plus 1e-3 / span. Here: code.
    span = reward.max() - reward.min()
    if span == 0:
        sys.exit("all rewards of the dataset are equal, so there is nothing to learn")
    return (reward - reward.min() + 1e-3) / span


def real_count(iteration: int, args: Args) -> int:
    """Rows of a batch that come from the data: all in the warm start, then fewer step by step."""
    # Paper: f = 0.5. Code: 1 until iteration 45,000, 0.1 less every 5000 after. Here: code.
    falls = max(0, (iteration - args.warmup_iterations) // args.real_decay_every)
    return int(max(args.real_fraction, 1 - 0.1 * falls) * args.batch_size)


def conservative_target(batch: Batch, q_next: Tensor, args: Args) -> Tensor:
    """r + gamma (c min_j Q'_j + (1 - c) max_j Q'_j); q_next [L, 2, B] -> [L, B]"""
    q = args.q_min_weight * q_next.amin(1) + (1 - args.q_min_weight) * q_next.amax(1)
    # Paper: all of q. Code: none at terminals, none where |q| >= 2000. Here: code.
    q = torch.where((batch.terminated > 0) | (q.abs() >= args.q_bound), 0.0, q)
    return batch.reward + args.gamma * q  # Eq. (12)


def critic_loss(q: Tensor, target: Tensor, delta: float) -> Tensor:
    """Huber regression of both critics: q [L, 2, B] on target [L, B]."""
    # Paper: Huber. Code: threshold 500, in effect half the square, gradient norm 0.1. Here: code.
    target = target.unsqueeze(1).expand_as(q)
    return F.huber_loss(q, target, reduction="none", delta=delta).mean(-1).sum(-1)  # Eq. (13)


def masked_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over the rows with keep = 1; [L, B] -> [L]. The same as dropping the other rows."""
    return (values * keep).sum(-1) / keep.sum(-1).clamp(min=1)


def generator_loss(logit_fake: Tensor, keep: Tensor) -> Tensor:
    """How far the policy's pairs [L, B] are from passing as data; softplus(-logit) is -log D."""
    # Paper: mean log(1 - D). Code: -log D, flat in fp32 below a logit of -28. Here: -log D, exact.
    return masked_mean(F.softplus(-logit_fake), keep)  # Eq. (15)


def discriminator_loss(true: Tensor, fake: Tensor, keep: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of telling true from fake pairs by their logits [L, B]; labels of the true."""
    # Paper: labels 1, no factor. Code: labels U[0.8, 1) and half the sum. Here: code.
    true_part = (F.softplus(true) - label * true).mean(-1)
    return 0.5 * (true_part + masked_mean(F.softplus(fake), keep))  # Eq. (16)


def model_loss(mean: Tensor, log_std: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted Gaussian negative log-likelihood, up to constants; [L, M, B, 1 + S] -> [L, M]"""
    nll = (mean - target).square() * torch.exp(-2 * log_std) + 2 * log_std
    return (weight * nll.mean(-1)).mean(-1)  # Eq. (6), and at weight one Eq. (4)


def model_error(mean: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error in the model's units, which judges it on held-out rows; -> [L, M]."""
    # Paper: silent. Code: this, unpacking (likelihood, error) as (error, likelihood). Here: code.
    return (weight * (mean - target).square().mean(-1)).mean(-1)


def miw_loss(
    omega: Tensor, omega_slow: Tensor, q: Tensor, q_next: Tensor, q_initial: Tensor, gamma: float
) -> Tensor:
    """Distance of the sides of the flow equation, tested by Q, [L]; rows [L, B], initial [L, B0].

    omega_slow is the paper's omega'; q_next is zero at terminals: nothing flows on from there.
    """
    # Paper: Q of pi in the model on both sides, squared distance. Code: the critic's Q_1 on the
    # left, its slow copy on the right, 0 at terminals; Huber with threshold 1. Here: code.
    left = (omega * q).mean(-1)
    right = gamma * (omega_slow * q_next).mean(-1) + (1 - gamma) * q_initial.mean(-1)  # Eq. (10)
    return F.huber_loss(left, right, reduction="none", delta=1.0)  # Eq. (11)


def keep_mean_below(bound: float, mean: Tensor, mean_grads: list, loss_grads: list) -> list[Tensor]:
    """Bend the loss gradient so that the mean of omega [L] stays below a bound.

    Dynamic barrier gradient descent (Gong, Liu, Liu 2021), per learner and parameter tensor: the
    smallest f >= 0 for which g = loss_grad + f mean_grad has <g, mean_grad> >= min(mean - bound,
    |mean_grad|^2). Above the bound a step must lower the mean; below, it may rise within the room.
    """
    # Paper: no constraint. Code: this one. Here: code.
    norm2 = torch.stack([g.square().flatten(1).sum(1) for g in mean_grads])  # [tensors, L]
    pairs = list(zip(loss_grads, mean_grads, strict=True))
    product = torch.stack([(a * b).flatten(1).sum(1) for a, b in pairs])
    wanted = torch.minimum(mean - bound, norm2)
    factor = ((wanted - product) / (norm2 + 1e-8)).clamp(min=0)
    return [a + torch.einsum("l,l...->l...", f, b) for f, (a, b) in zip(factor, pairs)]


def gradients(loss: Tensor, optimizer: torch.optim.Adam, keep_graph: bool = False) -> list[Tensor]:
    """Gradients of a loss [L] for this optimizer's parameters and no others that it passes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return list(torch.autograd.grad(loss.sum(), parameters, retain_graph=keep_graph))


def move(optimizer: torch.optim.Adam, grads: list[Tensor], max_norm: float = math.inf) -> None:
    """One Adam step along gradients [L, ...], clipped per learner as torch's clip_grad_norm_."""
    if max_norm < math.inf:
        norm = torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        grads = [torch.einsum("l,l...->l...", scale, g) for g in grads]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()


@torch.no_grad()
def polyak(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow += rate * (fast - slow), in place."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)


# ===== 4. The method ==============================================================================
class AMPL(nn.Module):
    """The state of training (networks, data, buffer, optimizers) and the steps of Algorithm 1.

    `iterate`, `rollout`, `model_step` and `miw_step` read no Python value that changes and never
    wait for the GPU, so `capture` can record them. `ablations/` derives the paper's variants.
    """

    Policy, Weight = ImplicitPolicy, ImportanceWeight  # networks of actor and omega

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__()
        self.args, self.device, self.learners = args, device, args.num_seeds
        self.sizes, self.columns = (obs_dim, action_dim), [obs_dim, action_dim, 1, obs_dim, 1]
        self.model = self.build("model", DynamicsEnsemble, args.ensemble_size)
        self.elites = self.build("elites", DynamicsEnsemble, args.num_elites)  # the best members
        self.actor = self.build("actor", self.Policy)
        self.critic = self.build("critic", TwinCritic)
        self.discriminator = self.build("discriminator", Discriminator)
        self.omega = self.build("omega", self.Weight)
        self.actor_target, self.critic_target = map(copy.deepcopy, (self.actor, self.critic))
        self.omega_slow, self.critic_slow = map(copy.deepcopy, (self.omega, self.critic))
        rows = torch.zeros(self.learners, args.buffer_size, sum(self.columns))
        self.register_buffer("buffer", rows)  # [L, capacity, C]: D_model, 300 MB on pen
        self.register_buffer("buffer_end", torch.zeros((), dtype=torch.long))  # next row to write
        self.register_buffer("buffer_rows", torch.zeros((), dtype=torch.long))  # rows filled
        self.register_buffer("real_rows", torch.tensor(args.batch_size))  # of a mixed batch
        self.register_buffer("q_avg", torch.zeros(self.learners))  # running mean of |Q|; 0: none
        self.register_buffer("learner", torch.arange(self.learners), persistent=False)
        self.register_buffer("place", torch.arange(args.batch_size), persistent=False)
        self.to(device)
        layers = zip([*self.model.trunk, self.model.heads], args.model_weight_decay, strict=True)
        groups = [dict(params=layer.parameters(), weight_decay=decay) for layer, decay in layers]
        bounds = dict(params=[self.model.max_log_std, self.model.min_log_std])
        gan = self.discriminator.parameters(), args.discriminator_lr, args.gan_beta1
        self.optimizers = {
            "model": self.adam([*groups, bounds], args.model_lr),
            "critic": self.adam(self.critic.parameters(), args.critic_lr),
            "actor": self.adam(self.actor.parameters(), args.actor_lr, args.gan_beta1),
            "discriminator": self.adam(*gan),
            "omega": self.adam(self.omega.parameters(), args.miw_lr),
        }

    def build(self, name: str, network: type, *sizes: int) -> nn.Module:
        """A network whose first weights depend on the seed and its name alone."""
        reseed(self.args.seed, name)
        return network(*sizes, *self.sizes, self.args).to(self.device)

    def adam(self, parameters, lr: float, beta1: float = 0.9) -> torch.optim.Adam:
        on_gpu = self.device.type == "cuda"
        return torch.optim.Adam(parameters, lr, (beta1, 0.999), fused=True, capturable=on_gpu)

    # --- data, buffer, batches ---

    def set_data(self, dataset: dict[str, Tensor]) -> None:
        """Take a dataset (see load_dataset): rows [N, C] with scaled rewards, and their limits."""
        obs, next_obs = dataset["obs"], dataset["next_obs"]
        reward, end = scale_rewards(dataset["reward"]), dataset["terminated"].float()
        rows = [obs, dataset["action"], reward[:, None], next_obs, end[:, None]]
        self.data = torch.cat(rows, -1).to(self.device)
        self.has_next = dataset["has_next"].nonzero().squeeze(-1).to(self.device)  # s' is known
        self.episode_starts = dataset["starts"]
        self.register_buffer("weight", torch.ones(self.learners, len(self.data)).to(self.device))
        # A prediction beyond these ends a rollout: twice the data's largest values, and its largest
        # reward and 10 deviations (authors' code; rewards are positive here).
        self.obs_limit = 2 * torch.maximum(obs.abs(), next_obs.abs()).amax(0).to(self.device)
        self.reward_limit = (reward.max() + 10 * reward.std()).to(self.device)

    def split(self, rows: Tensor) -> Batch:
        """Rows [..., C] by field."""
        obs, action, reward, next_obs, terminated = rows.split(self.columns, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def sample_rows(self, rows: Tensor, count: int) -> Tensor:
        """Uniform rows of a table [N, ...], with replacement. -> [L, count, ...]"""
        return rows[torch.randint(len(rows), (self.learners, count), device=self.device)]

    def sample_data(self, count: int) -> Batch:
        return self.split(self.sample_rows(self.data, count))

    def sample(self) -> Batch:
        """Two mixed batches [L, 2, B, ...]: real_rows rows of the data, the rest of the buffer."""
        # Both kinds are drawn in full and one is kept per row: fixed shapes, and a count that is a
        # tensor, so that the iteration can be a CUDA graph while the mix changes.
        shape = self.learners, 2, self.args.batch_size
        place = torch.rand(shape, device=self.device) * self.buffer_rows
        place = place.long().minimum(self.buffer_rows - 1)  # the product may have been rounded up
        imagined = self.buffer[self.learner.view(-1, 1, 1), place]
        real = self.data[torch.randint(len(self.data), shape, device=self.device)]
        is_real = self.place < self.real_rows  # [B]
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

    def iterate(self, warmup: bool, step_actor: bool) -> Logs:
        """One iteration: critics, policy, discriminator, targets."""
        both = self.sample()  # one for Q, and states of their own for the fake pairs
        batch = Batch(*(field[:, 0] for field in both))
        logs = self.update_critic(batch)  # Eq. (12), (13)
        logs |= self.update_policy_and_discriminator(both.obs, warmup, step_actor)  # Eq. (14)-(17)
        polyak(self.critic_target, self.critic, self.args.tau)
        polyak(self.actor_target, self.actor, self.args.tau)
        return logs

    def update_critic(self, batch: Batch) -> Logs:
        args, optimizer = self.args, self.optimizers["critic"]
        with torch.no_grad():
            next_action = torch.tanh(self.actor_target(batch.next_obs))
            q_next = self.critic_target(batch.next_obs, next_action)
            target = conservative_target(batch, q_next, args)
        q = self.critic(batch.obs, batch.action)
        loss = critic_loss(q, target, args.critic_huber_delta)
        move(optimizer, gradients(loss, optimizer), args.critic_grad_norm)
        return {"losses/critic_loss": loss.detach(), "losses/q_values": q.detach().mean((1, 2))}

    def update_policy_and_discriminator(self, obs: Tensor, warmup: bool, step_actor: bool) -> Logs:
        """The policy moves if `step_actor`, the discriminator always; obs [L, 2, B, S]."""
        with torch.set_grad_enabled(step_actor):
            raw = self.actor(obs.flatten(1, 2)).view(*obs.shape[:3], -1)
        with torch.set_grad_enabled(step_actor and not warmup):  # otherwise only for q_avg
            q_min = self.critic(obs[:, 0], torch.tanh(raw[:, 0])).amin(1)
        q_abs = q_min.detach().abs().mean(-1)
        self.q_avg.copy_(torch.where(self.q_avg > 0, self.q_avg, q_abs))  # the first batch sets it
        gan_loss, disc_loss = self.gan_losses(obs[:, 1], raw[:, 1])
        # Paper: no warm start. Code: 40,000 iterations that only imitate. Here: code.
        actor_loss = gan_loss if warmup else self.policy_loss(q_min, gan_loss)
        # Paper: discriminator first. Code: policy first, every second time; both losses with the
        # old D. Here: code. They share a graph, of which D's gradient uses nothing that has moved.
        if step_actor:
            actor = self.optimizers["actor"]
            move(actor, gradients(actor_loss, actor, keep_graph=True))
        discriminator = self.optimizers["discriminator"]
        move(discriminator, gradients(disc_loss, discriminator))
        self.q_avg.lerp_(q_abs, self.args.tau)
        losses = dict(actor_loss=actor_loss, generator_loss=gan_loss, discriminator_loss=disc_loss)
        return {f"losses/{name}": loss.detach() for name, loss in losses.items()}

    def policy_loss(self, q_min: Tensor, gan_loss: Tensor) -> Tensor:
        """-lambda mean min_j Q_j + L_g with lambda = lambda' / Q_avg; q_min [L, B] -> [L]"""
        return -(self.args.q_coef / self.q_avg) * q_min.mean(-1) + gan_loss  # Eq. (17)

    def gan_losses(self, obs: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Of generator and discriminator, from the policy's raw actions at obs, [L, B, ...]."""
        args = self.args
        with torch.set_grad_enabled(raw.requires_grad):
            fake_obs, fake_raw, keep = self.fake_pairs(obs, raw)
        # Paper: silent. Code: as many true pairs as fake ones remain. Here: always 2B.
        data = self.sample_data(2 * args.batch_size)
        true_raw = torch.atanh(data.action.clamp(-1 + 1e-7, 1 - 1e-7))  # fp32: at most 8.3
        pairs = torch.cat([data.obs, fake_obs], 1), torch.cat([true_raw, fake_raw], 1)
        logit_true, logit_fake = self.discriminator(*pairs).chunk(2, 1)
        label = args.label_smoothing + (1 - args.label_smoothing) * torch.rand_like(logit_true)
        disc_loss = discriminator_loss(logit_true, logit_fake, keep, label)
        return generator_loss(logit_fake, keep), disc_loss

    def fake_pairs(self, obs: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's pairs at s and at the model's s': obs, raw action, keep [L, 2B, ...]."""
        # The gradient reaches the policy through both raw actions; s' is a constant.
        reward, next_obs = self.elites.sample(obs, torch.tanh(raw.detach()))
        _, terminated = self.terminate(reward, next_obs)
        next_raw = self.actor(next_obs)
        # Paper: all pairs. Code: those at a terminal s' are removed. Here: code, as weight 0.
        keep = torch.cat([torch.ones_like(terminated), 1 - terminated], 1)
        return torch.cat([obs, next_obs], 1), torch.cat([raw, next_raw], 1), keep  # Eq. (14)

    # --- rollouts in the model ---

    def terminate(self, reward: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor]:
        """By the task's rule, or far outside the data. -> reward, terminated (0 or 1), [L, B]"""
        # Paper: silent. Code: the known rule, and two ranges that cost -reward_limit. Here: code.
        outside = (next_obs.abs() > self.obs_limit).any(-1) | (reward.abs() > self.reward_limit)
        terminated = outside | known_termination(self.args.env_id, next_obs)
        return torch.where(outside, -self.reward_limit, reward), terminated.float()

    @torch.no_grad()
    def rollout(self) -> Logs:
        """Roll out from stored states, up to the first terminated step, and store every step."""
        args, ended = self.args, []
        # Paper: silent. Code: batches of 2048 rollouts until 32,000 rows are there or more (37,120
        # at horizon 5). Here: 32,000, and an ended rollout's slot restarts, so that shapes are
        # fixed. A CPU works in chunks that stay in its cache, a GPU on all at once.
        slots = math.ceil(args.rollout_rows / args.horizon)
        chunk = 2048 if args.shared_rollout_action or self.device.type == "cpu" else slots
        for first in range(0, slots, chunk):
            count = min(chunk, slots - first)
            obs = self.sample_data(count).obs
            for _ in range(args.horizon):
                action = torch.tanh(self.actor(obs))
                # Paper: a ~ pi per state. Code: by mistake one action for all rows. Here: paper.
                if args.shared_rollout_action:
                    action = action[:, :1].expand_as(action)
                reward, next_obs = self.elites.sample(obs, action)
                reward, terminated = self.terminate(reward, next_obs)
                self.remember(Batch(obs, action, reward, next_obs, terminated))
                fresh = self.sample_data(count).obs
                obs = torch.where(terminated.unsqueeze(-1) > 0, fresh, next_obs)
                ended.append(terminated)
        return {"rollout/terminated_frac": torch.cat(ended, -1).mean(-1)}

    # --- model and omega ---

    def retrain(self, k: int, log: Callable) -> None:
        """Re-training k: estimate omega, refit the model with it."""
        self.fit_model(k, self.fit_weight(k, log), log)

    def fit_model(self, k: int, weight: Tensor, log: Callable) -> Tensor:
        """Fit k of the model, rows weighted by weight [L, N]. -> hold-out errors [L, M]"""
        # Paper: silent. Code: a re-fit goes on from the present weights and Adam state, on a new
        # split, until no member has gained 1 % for `model_patience` epochs. Here: code. A learner
        # that stops before the others keeps its best members; its Adam state goes on.
        args, model = self.args, self.model
        self.weight.copy_(weight)
        inputs, targets = self.model_pairs()
        weight = weight[:, self.has_next]  # [L, n]
        reseed(args.seed, "model", k)
        order = torch.rand(weight.shape, device=self.device).argsort(-1)  # other rows per learner
        held = min(len(inputs) // 5, args.holdout_size)
        holdout, train = order[:, :held].contiguous(), order[:, held:].contiguous()
        best = [p.detach().clone() for p in model.members()]
        best_error = torch.full(model.lead, 1e32, device=self.device)
        idle = torch.zeros(self.learners, device=self.device)  # epochs without a member's gain
        step = capture(lambda: self.model_step(inputs, targets, weight, train), args)
        for epoch in range(args.model_max_epochs):
            for _ in range(args.model_epoch_steps):
                logs = step()
            error = self.validate(inputs, targets, weight, holdout)
            gained = (best_error - error) / best_error > 0.01
            gained &= (idle < args.model_patience).unsqueeze(-1)
            best_error = torch.where(gained, error, best_error)
            for saved, now in zip(best, model.members()):
                saved.copy_(torch.where(gained[..., None, None], now.detach(), saved))
            idle = torch.where(gained.any(-1), 0, idle + 1)
            log(f"model fit {k}, epoch {epoch}", logs | {"model/holdout_error": error.mean(-1)})
            if (idle >= args.model_patience).all():
                break
        with torch.no_grad():  # the bounds of log_std stay as they are, as in the authors' code
            for saved, now in zip(best, model.members()):
                now.copy_(saved)
        self.choose_elites(best_error)
        return best_error

    def model_pairs(self) -> tuple[Tensor, Tensor]:
        """The model's inputs [n, S + A] and targets [n, 1 + S], normalised, where s' is known."""
        batch, model = self.split(self.data[self.has_next]), self.model
        inputs = torch.cat([batch.obs, batch.action], -1)
        targets = torch.cat([batch.reward.unsqueeze(-1), batch.next_obs - batch.obs], -1)
        model.normalise_by(inputs, targets)
        inputs = (inputs - model.input_mean) / model.input_std
        return inputs, (targets - model.target_mean) / model.target_std

    def model_step(self, inputs: Tensor, targets: Tensor, weight: Tensor, train: Tensor) -> Logs:
        """One Adam step of all members on rows of their own, drawn from the rows train [L, n]."""
        args, model, optimizer = self.args, self.model, self.optimizers["model"]
        shape = (self.learners, args.ensemble_size * args.model_batch_size)
        rows = train.gather(1, torch.randint(train.shape[1], shape, device=self.device))
        weight = weight.gather(1, rows).view(*model.lead, -1)
        rows = rows.view(*model.lead, -1)  # [L, M, B]
        loss = self.fit_loss(inputs[rows], targets[rows], weight).sum(-1)
        # Keeps the learned bounds of log_std from drifting apart (authors' code).
        spread = (model.max_log_std - model.min_log_std).flatten(1).sum(-1)
        move(optimizer, gradients(loss + 0.02 * spread, optimizer))
        return {"model/train_nll": loss.detach() / args.ensemble_size}

    def fit_loss(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Of normalised inputs and targets [L, M, B, ...]. -> [L, M]"""
        return model_loss(*self.model(x), y, weight)

    @torch.no_grad()
    def validate(self, inputs: Tensor, targets: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """Errors of the members on rows [L, n], in parts that stay in a CPU's cache. -> [L, M]"""
        total = 0.0
        for part in rows.split(512, -1):
            x, y = inputs[part].unsqueeze(1), targets[part].unsqueeze(1)  # [L, 1, 512, ...]
            mean, _ = self.model(x.expand(-1, self.model.lead[1], -1, -1))
            error = model_error(mean, y, weight.gather(1, part).unsqueeze(1))
            total = total + error * part.shape[1] / rows.shape[1]
        return total

    @torch.no_grad()
    def choose_elites(self, error: Tensor) -> None:
        """Copy the members with the lowest hold-out error [L, M] to self.elites."""
        ranked = error.argsort(-1)[:, : self.args.num_elites]  # [L, E]
        learner, chosen = torch.arange(len(error)).unsqueeze(-1), self.model.state_dict()
        for name in chosen:
            if name.startswith(("trunk", "heads")):
                chosen[name] = chosen[name][learner, ranked]
        self.elites.load_state_dict(chosen)

    def fit_weight(self, k: int, log: Callable) -> Tensor:
        """Train omega before re-fit k. -> weights of the data: omega over its mean, [L, N]"""
        self.critic_slow.load_state_dict(self.critic_target.state_dict())
        # Policy and critic stand still meanwhile, so Q_1 at the stored pairs is computed once.
        q_data = self.over_data(lambda batch: self.critic.first(batch.obs, batch.action))
        return self.train_weight(lambda: self.miw_step(q_data), k, log)

    def train_weight(self, step: Callable[[], Logs], k: int, log: Callable) -> Tensor:
        """`miw_steps` steps of omega. -> its normalised weights of the data, [L, N]"""
        reseed(self.args.seed, "omega", k)
        step = capture(step, self.args)
        for t in range(1, self.args.miw_steps + 1):
            logs = step()
            if t % 1000 == 0 or t == self.args.miw_steps:
                log(f"omega {k}, step {t}", logs)
        omega = self.over_data(lambda batch: self.omega(batch.obs, batch.action))
        # Paper: omega. Code: omega / mean(omega). Here: code.
        return omega / omega.mean(-1, keepdim=True)

    def miw_step(self, q_data: Tensor) -> Logs:
        """One step of omega, Eq. (11); q_data [L, N] is Q_1 at the stored pairs."""
        args, shape = self.args, (self.learners, self.args.miw_batch_size)
        rows = torch.randint(len(self.data), shape, device=self.device)
        start = self.sample_rows(self.initial_obs, args.miw_initial_batch_size)
        batch, q = self.split(self.data[rows]), q_data.gather(1, rows)
        with torch.no_grad():
            next_action = torch.tanh(self.actor(batch.next_obs))
            q_next = self.critic_slow.first(batch.next_obs, next_action) * (1 - batch.terminated)
            q_initial = self.critic_slow.first(start, torch.tanh(self.actor(start)))
            omega_slow = self.omega_slow(batch.obs, batch.action)
        omega = self.omega(batch.obs, batch.action)
        loss = miw_loss(omega, omega_slow, q, q_next, q_initial, args.gamma)
        polyak(self.critic_slow, self.critic, args.miw_tau)
        return self.move_omega(omega, loss)

    def move_omega(self, omega: Tensor, loss: Tensor) -> Logs:
        """One Adam step of omega [L, B] along its loss [L], and of its slow copy."""
        args, optimizer, mean_omega = self.args, self.optimizers["omega"], omega.mean(-1)
        loss_grads = gradients(loss, optimizer, keep_graph=True)
        mean_grads = gradients(mean_omega, optimizer)
        mean_omega = mean_omega.detach()
        grads = keep_mean_below(args.miw_mean_bound, mean_omega, mean_grads, loss_grads)
        move(optimizer, grads, args.miw_grad_norm)
        polyak(self.omega_slow, self.omega, args.miw_tau)
        return {"losses/weight_loss": loss.detach(), "weights/batch_mean": mean_omega}

    @functools.cached_property
    def initial_obs(self) -> Tensor:
        """Observations from mu0, [N0, S], drawn when omega is trained first."""
        # Paper: mu0. Code: simulator resets, online access. Here: code, or the data's own.
        if self.args.initial_states == "dataset":
            return self.episode_starts.to(self.device)
        env, count = make_env(self.args.env_id), self.args.num_initial_states
        states = [env.reset(seed=None if i else self.args.seed)[0] for i in range(count)]
        return torch.as_tensor(np.array(states, np.float32), device=self.device)

    @torch.no_grad()
    def over_data(self, function: Callable[[Batch], Tensor]) -> Tensor:
        """A function of a batch, Batch -> [L, B], for every row of the data. -> [L, N]"""
        parts = (self.split(rows.expand(self.learners, -1, -1)) for rows in self.data.split(4096))
        return torch.cat([function(batch) for batch in parts], -1)

    # --- evaluation ---

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs [L, n, S] -> actions [L, n, A] in [-1, 1]"""
        # Paper: silent. Code: of ten samples the one with the largest min Q. Here: code.
        states = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        states = states.repeat_interleave(self.args.eval_candidates, 1)
        action = torch.tanh(self.actor(states))
        q = self.critic(states, action).amin(1).view(*obs.shape[:2], -1)
        action = action.view(*q.shape, -1)  # [L, n, candidates, A]
        best = q.argmax(-1)[..., None, None]
        return action.take_along_dim(best, 2).squeeze(2).cpu().numpy()


# ===== 5. Training ================================================================================
def train(args: Args, method: type = AMPL) -> dict:
    """Algorithm 1: train args.num_seeds learners; return what result.json holds."""
    dataset = load_dataset(args)
    ampl = method(args, dataset["obs"].shape[1], dataset["action"].shape[1], choose_device(args))
    ampl.set_data(dataset)
    run = Run(args, ampl, dataset["source"])
    # Python's `if` cannot be a part of a CUDA graph: each kind of iteration is a step of its own.
    kinds = [(warmup, step_actor) for warmup in (True, False) for step_actor in (True, False)]
    step = {kind: capture(functools.partial(ampl.iterate, *kind), args) for kind in kinds}
    rollout = capture(ampl.rollout, args)
    if run.iteration == 0 and args.dynamics_from:
        load_model(ampl, Path(args.dynamics_from))
    elif run.iteration == 0:
        error = ampl.fit_model(0, torch.ones_like(ampl.weight), run.log)  # Eq. (4)
        save_model(ampl, error, run.folder)
    for i in run.iterations():  # which also logs, evaluates and saves
        if i > 0 and i % args.model_retrain_every == 0:
            run.save_checkpoint()  # more than an hour of one CPU core may follow
            ampl.retrain(i // args.model_retrain_every, run.log)  # Eq. (11), (6)
            np.save(run.folder / f"weight{i}.npy", ampl.weight.cpu())  # for the paper's Figure 2
        if i % args.rollout_every == 0:  # Paper: in every iteration. Code: every 250. Here: code.
            reseed(args.seed, "rollout", i)
            run.logs |= rollout()  # D_model
            reseed(args.seed, "iterations", i)
        if real_count(i, args) != real_count(i - 1, args):
            ampl.real_rows.fill_(real_count(i, args))
        warmup, step_actor = i < args.warmup_iterations, i % args.policy_frequency == 0
        run.logs |= step[warmup, step_actor]()  # Eq. (12)-(17)
    return run.finish()


def main(settings: type = Args, method: type = AMPL) -> None:
    """The command line. Mistakes end in one sentence on stderr and a non-zero exit status."""
    args = parse_args(settings)
    if args.evaluate:
        policy = load_policy(args.evaluate, settings, method)
        report(policy, args, evaluate(policy, args, args.final_episodes, 0), Path(args.evaluate))
    else:
        train(args, method)


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
