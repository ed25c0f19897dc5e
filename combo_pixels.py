# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "dm-control==1.0.50", "gymnasium==1.4.0", "matplotlib==3.11.2", "mujoco==4.0.0",
#   "numpy==2.4.6", "pillow==13.0.0", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1",
#   "tyro==1.0.17",
# ]
# [tool.uv]  # dm-control is only a file that describes the walker, and needs nothing of this:
# override-dependencies = [
#   "dm-env; python_version < '0'", "dm-tree; python_version < '0'",
#   "labmaze; python_version < '0'", "lxml; python_version < '0'",
#   "requests; python_version < '0'", "scipy; python_version < '0'",
# ]
# ///
"""COMBO from images, in the latent space of a recurrent model (Yu et al. 2021, section 5.2). The
paper "follows" LOMPO (Rafailov et al. 2020), whose code has the model and all constants but beta.

combo.py learns a policy from states. Here the state is hidden: an observation is one image of 64 x
64 pixels, which shows where a walker is and not how fast it moves. So a recurrent model is fitted
first, which infers a latent state from all images so far, and which predicts how that goes on
without images. From then on the latent state takes the place of the state, and what remains is
COMBO: rollouts in the model, critics that are pessimistic about them, a policy.

    1. the latent model: `model_steps` times                                  (LOMPO's code)
        draw sequences of images, actions and rewards of the data
        infer their latent states, one image after another
        raise the evidence lower bound of images and rewards by one step
    then infer a latent state for every image of the data: D
    2. COMBO in latent space: for every iteration                             Algorithm 1
        every `rollout_every` iterations:
            let mu (the policy with noise) act in the model from states of D, for `horizon` steps,
            into the buffer D_model
        sample a batch from d_f: a share f from D, the rest from D_model
        critics: one step down the Bellman error + beta * the conservative gap        Eq. (2)
        policy: raise Q at the batch's states                                         Eq. (3)
        targets: the slow copies of the critics follow them

The latent state s = (z, h) has a stochastic part z and the memory h of a GRU. In the step to time t

    h_t = GRU(h_{t-1}, z_{t-1}, a)    a is the action that led from image t-1 to image t
    z_t ~ q(z | h_t, x_t)             the posterior, where there is an image x_t
    z_t ~ p_k(z | h_t)                the prior, where there is none; one of K heads, at random

Posterior and priors are Gaussians. What is raised is a lower bound of log p(x_1.., r_1.. | a_1..):

    sum over t of  log N(x_t; decoder(s_t), 1) + log N(r_t; reward(s_t), 1) - KL(q || p_k)

The symbols. T and B are the numbers of steps and of sequences, or B alone that of rows of a batch;
S = 320 is the size of a latent state, A that of an action, K is `num_heads`, n is `num_actions`.

    x, r           images, rewards              [T, B, 3, 64, 64] in [-0.5, 0.5], [T, B]
    z, h           stoch, memory                [T, B, Z], [T, B, H], where Z = 64 and H = 256
    q, p_k         model.posterior, model.prior     -> mean, std [T, B, Z]
    s, a, r, s'    obs, action, reward, next_obs    [B, S], [B, A], [B], [B, S]: a latent state is
                                                to the agent what an observation is in combo.py
    D, D_model     data, model_data             [rows, S + A + 1 + S + 1], a transition a row
    rho            states: `rows_of_rho`; actions: `proposals`
    pi             actor                        [B, S] -> actions [B, A], deterministic
    Q_j, Q'_j      critic, critic_target        [B, S], [B, A] -> [2, B]
    beta, f        beta, real_fraction

Nobody released code of COMBO from images. Whose what is:

    that a recurrent model replaces the state, Eq. (2) and (3)       COMBO's section 5.2 and 3
    model, its fit (KL with weight 1, no free nats), rollouts        LOMPO's code
    agent's networks and constants, a deterministic policy           LOMPO's code
    the form of the gap in Eq. (2), with f and rho: a soft maximum   LOMPO's code, which has it
        over n uniform actions and pi's, equal weights, all states   switched off (weight 0)
        of a batch, a share f = 0.5 of data
    that this form with its f and rho is COMBO's, and beta           ours: the paper is silent
    no penalty for the model's uncertainty                           COMBO's idea; LOMPO's code has
                                                                     one, 5 times a deviation

Notes `LOMPO's code: ... Here: ...` say where this file differs. As in combo.py, Eq. (1), (4) and
(5) have no line. combo.py's `--select` also chooses between finished runs of this script, by the
paper's offline rule. What follows `main` is plumbing and may be skipped; the method uses of it
above all `capture` (a step as a CUDA graph; on a CPU the step itself) and `reseed` (a seed for each
phase).
"""

import contextlib
import copy
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

# Threads that wait for work spin, which stops the others on a busy machine. With this they spin
# less: on two cores an iteration of ampl.py beside one more process takes 91 ms and not 132, and
# alone as long as before (tests/README.md, "A busy machine").
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"  # read when torch is imported

import gymnasium
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


Level = Literal["random", "mixed", "medium", "medium_expert", "expert"]


# Defaults are those of LOMPO's code (its walker), from which COMBO's image experiments take all
# that the paper does not name, unless marked (ours).
@dataclasses.dataclass
class Args:
    # --- task and data ---
    env_id: str = "walker-walk"  # walker-walk, or module:id with images of 64 x 64 x 3
    level: Level = "mixed"  # V-D4RL's names; COMBO's: mixed is M-R, medium_expert is M-E
    dataset_path: str | None = None  # folder of .npz episodes (default: V-D4RL's in D4RL's folder)
    seed: Seed = 0  # seed of all random draws (the paper reports three)
    total_iterations: Count = 100_000  # iterations in latent space (V-D4RL's LOMPO 150,000)
    # --- latent model ---
    model_steps: Count = 25_000  # steps of the fit
    sequences: Count = 64  # sequences per step
    sequence_length: Count = 50  # images of a sequence, at most those of an episode
    model_lr: Positive = 6e-4  # Adam learning rate of the model
    memory_size: Count = 256  # numbers in h, and units of every hidden layer of the model
    stoch_size: Count = 64  # numbers in z
    num_heads: Count = 7  # K, the prior's heads
    conv_depth: Count = 32  # channels of the first convolution; then 2, 4, 8 times as many
    conv_bfloat16: bool = False  # convolutions in bfloat16: faster, less exact (ours)
    grad_norm: Positive = 100.0  # longest gradient of the model, of the critics, of the policy
    # --- rollouts ---
    horizon: Count = 5  # rollout length
    rollout_every: Count = 200  # iterations between rollout phases
    rollout_starts: Count = 3200  # rollouts per phase
    rollout_noise: NonNegative = 0.2  # deviation of the noise on the policy's actions in rollouts
    rollout_first_rows: Count = 50_000  # rows that D_model has before the first iteration
    model_rows: Count = 100_000  # rows that D_model holds (as many as the data of 200 episodes)
    real_fraction: Share = 0.5  # share f of data rows in a batch (ours: paper silent, as LOMPO's)
    # --- critics ---
    beta: NonNegative = 1.0  # weight of E_rho[Q] - E_D[Q] (ours: COMBO's middle one for states)
    num_actions: Count = 16  # n, the uniform actions per state in that gap
    rho_states: Literal["mixed", "model"] = "mixed"  # states of rho: d_f's (ours: as LOMPO's term)
    gamma: Share = 0.99  # discount factor
    tau: Rate = 0.005  # soft-update rate of the critics' targets
    batch_size: Count = 512  # batch size B, data and rollouts together
    critic_lr: Positive = 3e-4  # Adam learning rate of the critics
    hidden: tuple[Count, ...] = (256, 256, 256)  # hidden widths of the critics
    # --- policy ---
    actor_hidden: tuple[Count, ...] = (256, 256, 256, 256)  # hidden widths of the policy
    actor_lr: Positive = 3e-4  # Adam learning rate of the policy
    # --- evaluation (ours) ---
    eval_every: Count = 5000  # iterations between evaluations; rendering is what they cost
    eval_episodes: Count = 10  # episodes per evaluation
    final_episodes: Count = 100  # episodes of the last evaluation
    # --- how it runs (ours) ---
    run_dir: str = "runs"  # parent of the run folders
    resume: str | None = None  # folder of a run to continue, perhaps with more iterations
    evaluate: str | None = None  # folder of a run whose policy is scored, without training
    dynamics_from: str | None = None  # run whose latent model replaces the fit
    track: bool = False  # logging to Weights and Biases as well (needs `pip install wandb`)
    wandb_project_name: str = "combo_pixels"  # project that --track logs to
    wandb_entity: str | None = None  # team that --track logs to
    capture_video: bool = False  # an episode as episode.gif
    log_every: Count = 1000  # iterations between TensorBoard's points
    model_log_every: Count = 100  # steps of the fit between TensorBoard's points
    pictures_every: Count = 1000  # steps of the fit between drawings of reconstructions.png
    checkpoint_every: Count = 10_000  # iterations between checkpoints
    async_envs: bool | None = False  # evaluation in processes (not every OpenGL survives the fork)
    cuda: bool = True  # training on the GPU, if there is one
    cuda_graphs: bool = True  # recording of training steps as CUDA graphs (GPU)
    tf32: bool = False  # faster, less exact matrix products, with errors of 1e-3 (GPU)
    cpu_fast_matmul: bool = True  # oneDNN matrix products, if a test finds them exact (CPU)
    threads: Threads = 0  # CPU threads of torch (0: torch's default)


# ===== 2. Networks ================================================================================
Scalars = dict[str, Tensor]  # what a step reports, by TensorBoard's names; stays on the device
# Long phases call this as progress(name, done, total, scalars); total is None where it is unknown.
Progress = Callable[[str, int, int | None, Scalars], None]


class Batch(NamedTuple):
    """Transitions between latent states. The model knows no end, so `terminated` is always 0."""

    obs: Tensor  # [B, S]
    action: Tensor  # [B, A]
    reward: Tensor  # [B]
    next_obs: Tensor  # [B, S]
    terminated: Tensor  # [B]


def start_as_keras(network: nn.Module) -> nn.Module:
    """Weights Glorot-uniform, those of a GRU's memory orthogonal, biases zero. -> the network

    These are the defaults of Keras, which LOMPO's code uses.
    """
    for name, parameter in network.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif name.endswith("weight_hh"):
            nn.init.orthogonal_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)
    return network


def mlp(n_in: int, hidden: tuple[int, ...], n_out: int) -> nn.Sequential:
    """Hidden layers with ELU: [..., n_in] -> [..., n_out]."""
    layers = []
    for width in hidden:
        layers.append(nn.Linear(n_in, width))
        layers.append(nn.ELU(inplace=True))
        n_in = width
    layers.append(nn.Linear(n_in, n_out))
    return start_as_keras(nn.Sequential(*layers))


def conv_encoder(depth: int) -> nn.Sequential:
    """Images [N, 3, 64, 64] -> features [N, 32 depth]. Dreamer's: sides of 64, 31, 14, 6, 2."""
    return start_as_keras(
        nn.Sequential(
            nn.Conv2d(3, depth, 4, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(depth, 2 * depth, 4, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * depth, 4 * depth, 4, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * depth, 8 * depth, 4, stride=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
    )


def conv_decoder(n_in: int, depth: int) -> nn.Sequential:
    """Latent states [N, n_in] -> images [N, 3, 64, 64]. Dreamer's: sides of 1, 5, 13, 30, 64."""
    return start_as_keras(
        nn.Sequential(
            nn.Linear(n_in, 32 * depth),
            nn.Unflatten(1, (32 * depth, 1, 1)),
            nn.ConvTranspose2d(32 * depth, 4 * depth, 5, stride=2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(4 * depth, 2 * depth, 5, stride=2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * depth, depth, 6, stride=2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(depth, 3, 6, stride=2),
        )
    )


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of a layer's output [..., 2 n] as mean and std [..., n]; std is above 0.1."""
    mean, raw_std = x.chunk(2, -1)
    return mean, F.softplus(raw_std) + 0.1


class HeadLinear(nn.Module):
    """K layers like nn.Linear, of which each step of a sequence uses one."""

    def __init__(self, heads: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(heads, 1, n_out))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, head: Tensor) -> Tensor:
        """[T, B, n_in] and the numbers of heads [T] -> [T, B, n_out]."""
        weight = self.weight.index_select(0, head)
        bias = self.bias.index_select(0, head)
        return torch.baddbmm(bias, x, weight)


class PriorHeads(nn.Module):
    """p_1 .. p_K: what each expects of z after a memory h, without the image."""

    def __init__(self, heads: int, memory_size: int, stoch_size: int):
        super().__init__()
        self.heads = heads
        self.hidden = HeadLinear(heads, memory_size, memory_size)
        self.output = HeadLinear(heads, memory_size, 2 * stoch_size)

    def forward(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[T, B, H] -> mean, std [T, B, Z], in each of the T steps by a random head."""
        head = torch.randint(self.heads, memory.shape[:1], device=memory.device)
        x = F.elu(self.hidden(memory, head))
        return gaussian(self.output(x, head))


class Belief(NamedTuple):
    """What `LatentModel.observe` infers from sequences of T images."""

    obs: Tensor  # [T, B, S], the latent states: z and h side by side
    memory: Tensor  # [T, B, H], h alone
    mean: Tensor  # [T, B, Z], of the posterior that z was drawn from
    std: Tensor  # [T, B, Z]


class LatentModel(nn.Module):
    """The recurrent model of images and rewards: encoder, GRU, posterior, priors, two decoders.

    `obs` is a latent state here, too, (z, h) side by side, and never an image. An image's features
    are [B, F] with F = 32 conv_depth.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.sizes = [args.stoch_size, args.memory_size]  # of z and h in a latent state
        self.bfloat16 = args.conv_bfloat16
        width = args.memory_size
        self.encoder = conv_encoder(args.conv_depth)
        self.decoder = conv_decoder(obs_dim, args.conv_depth)
        self.input = mlp(args.stoch_size + action_dim, (), width)
        self.gru = start_as_keras(nn.GRUCell(width, width))
        self.posterior = mlp(width + 32 * args.conv_depth, (width,), 2 * args.stoch_size)
        self.prior = PriorHeads(args.num_heads, width, args.stoch_size)
        self.reward = mlp(obs_dim, (width, width), 1)

    def start(self, count: int, device: torch.device) -> Tensor:
        """Latent states before the first image: zeros [count, S]."""
        return torch.zeros(count, sum(self.sizes), device=device)

    def remember_step(self, obs: Tensor, action: Tensor) -> Tensor:
        """h of the next step: latent states [B, S] and the actions in them [B, A] -> [B, H]."""
        stoch, memory = obs.split(self.sizes, -1)
        x = F.elu(self.input(torch.cat([stoch, action], -1)))
        return self.gru(x, memory)

    def infer(self, memory: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draw of the posterior: h [B, H], image features [B, F] -> obs [B, S], mean, std."""
        mean, std = gaussian(self.posterior(torch.cat([memory, features], -1)))
        stoch = mean + std * torch.randn_like(mean)
        return torch.cat([stoch, memory], -1), mean, std

    def imagine(self, obs: Tensor, action: Tensor) -> Tensor:
        """A draw of the prior, one head for all rows: [B, S], [B, A] -> the next states [B, S]."""
        memory = self.remember_step(obs, action)
        mean, std = self.prior(memory[None])
        stoch = mean[0] + std[0] * torch.randn_like(mean[0])
        return torch.cat([stoch, memory], -1)

    def observe(self, images: Tensor, actions: Tensor) -> Belief:
        """The latent states that images [T, B, 3, 64, 64] lead to, from an empty memory.

        actions [T, B, A] are those before the images: actions[t] led to images[t].
        """
        features = self.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # [T, B, F]
        obs = self.start(images.shape[1], images.device)
        steps = []
        for step_features, action in zip(features, actions):
            memory = self.remember_step(obs, action)
            obs, mean, std = self.infer(memory, step_features)
            steps.append((obs, memory, mean, std))
        return Belief(*(torch.stack(series) for series in zip(*steps)))

    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, 64, 64] -> features [N, F]."""
        with self.precision(images.device):
            return self.encoder(images).float()

    def decode(self, obs: Tensor) -> Tensor:
        """The images expected in latent states [N, S] -> [N, 3, 64, 64]."""
        with self.precision(obs.device):
            return self.decoder(obs).float()

    def precision(self, device: torch.device):
        """A context in which convolutions are computed in bfloat16, if the settings say so."""
        if self.bfloat16:
            return torch.autocast(device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def expected_reward(self, obs: Tensor) -> Tensor:
        """The reward of the step that led to latent states [..., S] -> [...]."""
        return self.reward(obs).squeeze(-1)


class Actor(nn.Module):
    """The policy, deterministic: latent states [B, S] -> actions [B, A] in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net = mlp(obs_dim, args.actor_hidden, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.net(obs))


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


# ===== 3. Equations ===============================================================================
def gaussian_kl(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(prior_mean, prior_std^2)), summed over the last axis: -> [...]"""
    ratio = (std / prior_std).square()
    distance = ((mean - prior_mean) / prior_std).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


def unit_log_density(x: Tensor, mean: Tensor) -> Tensor:
    """log N(x; mean, 1), elementwise, without its constant -log(2 pi) / 2."""
    return -0.5 * (x - mean).square()


def evidence_lower_bound(image: Tensor, reward: Tensor, kl: Tensor) -> Tensor:
    """The mean over steps and sequences of log-densities of images and rewards, less the KL.

    All three are [T, B]. Unlike Dreamer's, the KL counts fully, however small it is.
    """
    return (image + reward - kl).mean()


def log_sum_exp(q: Tensor) -> Tensor:
    """A soft maximum of Q over n + 1 actions per state, but for a constant. -> [2, B]

    q is [2, B, n + 1]. As combo.py's, with equal densities: a deterministic policy has none.
    Descent lowers Q most where it is highest.
    """
    return q.logsumexp(-1)


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


def policy_loss(q: Tensor) -> Tensor:
    """-min_j Q_j on average: q [2, B] at the policy's actions."""
    return -q.amin(0).mean()


@torch.no_grad()
def polyak(target: nn.Module, network: nn.Module, rate: float) -> None:
    """target += rate * (network - target), all parameters in one call."""
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), rate)


# ===== 4. The method ==============================================================================
class COMBOPixels(nn.Module):
    """The state of training (networks, data, D_model, optimizers) and the steps of the algorithm.

    On a GPU `model_step`, `rollout` and `iterate` are recorded as CUDA graphs, so they never wait
    for a tensor's value and hold no `if` on what changes between calls.
    """

    acting = ("model", "actor")  # all networks that `act` uses; policy.pt holds these alone

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__()
        self.args = args
        self.device = device
        self.obs_dim = obs_dim  # S, of a latent state
        self.action_dim = action_dim
        self.unfinished = {}  # where the long loops stand: --resume goes on within them
        self.latest = None  # latent states and actions of the episodes in which `act` acts
        self.model = self.build("model", LatentModel)
        self.actor = self.build("actor", Actor)
        self.critic = self.build("critic", TwinCritic)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        # A row of data or model_data is a Batch's fields side by side. The counters are tensors, so
        # that a CUDA graph can move them.
        self.field_sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.register_buffer("model_data", torch.zeros(args.model_rows, sum(self.field_sizes)))
        self.register_buffer("write_row", torch.zeros((), dtype=torch.long))  # of model_data
        self.register_buffer("num_model_rows", torch.zeros((), dtype=torch.long))  # filled so far
        self.to(device)

        self.model_optimizer = self.adam(self.model.parameters(), args.model_lr)
        self.actor_optimizer = self.adam(self.actor.parameters(), args.actor_lr)
        self.critic_optimizer = self.adam(self.critic.parameters(), args.critic_lr)

    def build(self, name: str, network: type, **options) -> nn.Module:
        """A new network. Its first weights depend only on the seed and on its name."""
        reseed(self.args.seed, name)
        return network(self.obs_dim, self.action_dim, self.args, **options).to(self.device)

    def adam(self, parameters, lr: float) -> torch.optim.Adam:
        """An optimizer that `capture` can record."""
        capturable = self.device.type == "cuda"
        return torch.optim.Adam(parameters, lr, fused=True, capturable=capturable)

    # --- the data: images, and later latent states ---

    def set_data(self, dataset: dict) -> None:
        """Take what load_dataset gives. Not part of __init__: a saved policy acts without data.

        E episodes of L images each stand end to end, so that image t of episode e is row e L + t.
        """
        self.num_episodes, self.episode_length = dataset["image"].shape[:2]
        self.images = dataset["image"].flatten(0, 1).to(self.device)  # [E L, 64, 64, 3], uint8
        self.actions = dataset["action"].flatten(0, 1).to(self.device)  # [E L, A]
        self.rewards = dataset["reward"].flatten(0, 1).to(self.device)  # [E L]

    def pixels(self, images: Tensor) -> Tensor:
        """Stored images [..., 64, 64, 3], uint8 -> images for the model [..., 3, 64, 64]."""
        return images.movedim(-1, -3).float() / 255 - 0.5

    def sequences_from(self, episode: Tensor, first: Tensor, length: int) -> tuple[Tensor, ...]:
        """Images [T, B, 3, 64, 64], actions [T, B, A], rewards [T, B] of B sequences of T steps.

        They begin at image number first [B] of the episodes [B].
        """
        step = torch.arange(length, device=self.device)[:, None]
        rows = episode * self.episode_length + first + step  # [T, B]
        return self.pixels(self.images[rows]), self.actions[rows], self.rewards[rows]

    def sample_sequences(self) -> tuple[Tensor, ...]:
        """Random sequences, each within an episode: see `sequences_from`."""
        args = self.args
        length = min(args.sequence_length, self.episode_length)
        starts = self.episode_length - length + 1  # from which a whole sequence follows
        episode = torch.randint(self.num_episodes, (args.sequences,), device=self.device)
        first = torch.randint(starts, (args.sequences,), device=self.device)
        return self.sequences_from(episode, first, length)

    @torch.no_grad()
    def encode_data(self, progress: Progress) -> None:
        """Infer a latent state for every image of the data, which makes D of it.

        Sets data [E (L - 1), S + A + 1 + S + 1] and episode_starts [E, S]. The random numbers of
        the run stay as they are, so that a resumed run may do it again.
        """
        # LOMPO's code: an episode is encoded anew between two phases of iterations. Here: all are
        # encoded once.
        length = self.episode_length
        at_once = max(1, self.args.sequences * self.args.sequence_length // length)  # episodes
        all_rows = []
        all_starts = []
        with torch.random.fork_rng():
            reseed(self.args.seed, "encoding")
            for first in range(0, self.num_episodes, at_once):
                last = min(first + at_once, self.num_episodes)
                episode = torch.arange(first, last, device=self.device)
                sequences = self.sequences_from(episode, torch.zeros_like(episode), length)
                images, actions, rewards = sequences
                obs = self.model.observe(images, actions).obs  # [L, at_once, S]
                end = torch.zeros_like(rewards[1:, :, None])
                # The action and the reward of the step from image t stand with image t + 1.
                fields = [obs[:-1], actions[1:], rewards[1:, :, None], obs[1:], end]
                all_rows.append(torch.cat(fields, -1).transpose(0, 1).flatten(0, 1))
                all_starts.append(obs[0])
                progress("encoding the data", last, self.num_episodes, {})
        self.data = torch.cat(all_rows)
        self.episode_starts = torch.cat(all_starts)

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

    # --- phase 1: the latent model ---

    def fit_model(self, progress: Progress, folder: Path) -> None:
        """Fit the latent model, for `model_steps` steps. Draws reconstructions.png in between."""
        args = self.args
        step = capture(self.model_step, args)
        phase = "latent model"
        (first_step,) = go_on(self, phase, (0,))  # 0, unless resumed in a fit
        for done in range(first_step + 1, args.model_steps + 1):
            logs = step()
            last = done == args.model_steps
            if last or done % args.pictures_every == 0:
                draw_reconstructions(folder / "reconstructions.png", self.reconstruct(), done)
            if last or done % args.model_log_every == 0:
                self.unfinished[phase] = (done,)
                progress(phase, done, args.model_steps, logs)

    def model_step(self) -> Scalars:
        """One step up the evidence lower bound, on random sequences of the data."""
        images, actions, rewards = self.sample_sequences()
        bound, logs = self.model_bound(images, actions, rewards)
        self.model_optimizer.zero_grad()
        (-bound).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_norm)
        self.model_optimizer.step()
        return logs | {"model/gradient_norm": norm}

    def model_bound(
        self, images: Tensor, actions: Tensor, rewards: Tensor
    ) -> tuple[Tensor, Scalars]:
        """The bound on sequences [T, B, ...] as `observe` takes them, and its parts for the log."""
        model = self.model
        belief = model.observe(images, actions)
        prior_mean, prior_std = model.prior(belief.memory)
        decoded = model.decode(belief.obs.flatten(0, 1)).unflatten(0, images.shape[:2])
        image = unit_log_density(images, decoded).sum((-3, -2, -1))  # [T, B]
        reward = unit_log_density(rewards, model.expected_reward(belief.obs))  # [T, B]
        kl = gaussian_kl(belief.mean, belief.std, prior_mean, prior_std)  # [T, B]
        bound = evidence_lower_bound(image, reward, kl)
        logs = {
            "model/lower_bound": bound.detach(),
            "model/image_error": -2 * image.detach().mean(),  # squares, summed over an image
            "model/reward_error": -2 * reward.detach().mean(),
            "model/kl": kl.detach().mean(),
        }
        return bound, logs

    @torch.no_grad()
    def reconstruct(self, context: int = 5) -> Tensor:
        """What the model sees and foresees of two sequences: -> images [2, 3, T, 3, 64, 64]

        The second axis has the data's images, those of the posterior, and those of an open loop:
        from image number `context` on it knows the actions alone. The random numbers of the run
        stay as they are.
        """
        length = min(50, self.episode_length)
        with torch.random.fork_rng():
            reseed(self.args.seed, "reconstructions")
            episode = torch.tensor([0, self.num_episodes - 1], device=self.device)
            first = torch.full_like(episode, (self.episode_length - length) // 2)
            images, actions, _ = self.sequences_from(episode, first, length)
            inferred = self.model.observe(images, actions).obs  # [T, 2, S]
            foreseen = list(inferred[:context])
            for action in actions[context:]:
                foreseen.append(self.model.imagine(foreseen[-1], action))
            rows = [images]
            for obs in (inferred, torch.stack(foreseen)):
                decoded = self.model.decode(obs.flatten(0, 1))
                rows.append(decoded.unflatten(0, (length, 2)))
        return (torch.stack(rows) + 0.5).clamp(0, 1).permute(2, 0, 1, 3, 4, 5)

    # --- phase 2: rollouts in latent space ---

    @torch.no_grad()
    def rollout(self) -> Scalars:
        """Write `rollout_starts` rollouts of `horizon` steps in latent space to D_model.

        The policy acts, with noise. In each step a head of the prior is drawn for all rollouts.
        """
        # LOMPO's code: starts at states of 64 sequences of 50 images, which are encoded anew, from
        # an empty memory in the middle of an episode. Here: at rows of D, which know their episode
        # from its beginning and cost no convolutions.
        # LOMPO's code: subtracts 5 deviations of what the heads predict from the reward. Here: no
        # penalty, which is COMBO's point.
        obs = self.sample_data(self.args.rollout_starts).obs
        all_rewards = []
        for _ in range(self.args.horizon):
            action = self.rollout_action(obs)
            next_obs = self.model.imagine(obs, action)
            reward = self.model.expected_reward(next_obs)
            self.remember(Batch(obs, action, reward, next_obs, torch.zeros_like(reward)))
            all_rewards.append(reward)
            obs = next_obs
        return {"rollout/reward": torch.cat(all_rewards).mean()}

    def rollout_action(self, obs: Tensor) -> Tensor:
        """The policy's actions with Gaussian noise, cut to [-1, 1]: [B, S] -> [B, A]."""
        action = self.actor(obs)
        noise = self.args.rollout_noise * torch.randn_like(action)
        return (action + noise).clamp(-1, 1)

    def rollout_phases(self, iteration: int) -> int:
        """How many phases follow one another: before the first iteration, as many whole phases as
        give `rollout_first_rows`."""
        if iteration > 0:
            return 1
        rows_per_phase = self.args.rollout_starts * self.args.horizon
        return math.ceil(self.args.rollout_first_rows / rows_per_phase)

    # --- phase 2: one iteration ---

    def iterate(self) -> Scalars:
        """One iteration of COMBO in latent space: critics, policy, targets."""
        batch = self.sample_mixed()

        # The critics step towards one target. Besides, the gap lowers Q on rho and raises it on the
        # data.
        target = self.q_target(batch)  # [B]
        q = self.critic(batch.obs, batch.action)  # [2, B]
        gap = self.conservative_gap(batch, q)  # [2]
        bellman_error = critic_loss(q, target)
        q_loss = bellman_error + self.args.beta * gap.sum()  # Eq. (2)
        self.critic_optimizer.zero_grad()
        q_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.grad_norm)
        self.critic_optimizer.step()

        # The policy raises Q. Its loss passes through the critics; `inputs` keeps the gradient to
        # the policy.
        # Paper: at states of rho in Eq. (3), of d_f in Algorithm 1. Here: at those of d_f, all of
        # the batch. LOMPO's code: the gradient is that of the critics before their step. Here:
        # after it, as in combo.py.
        actor_loss = policy_loss(self.critic(batch.obs, self.actor(batch.obs)))  # Eq. (3)
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=parameters_of(self.actor_optimizer))
        nn.utils.clip_grad_norm_(self.actor.parameters(), self.args.grad_norm)
        self.actor_optimizer.step()

        polyak(self.critic_target, self.critic, self.args.tau)
        # The gap is a difference: it does not tell whether Q fell on D_model or rose on the data.
        # So the means of Q on both are logged, too.
        num_real = real_rows(self.args)
        return {
            "losses/critic_loss": bellman_error.detach(),
            "losses/conservative_gap": gap.detach().mean(),
            "losses/actor_loss": actor_loss.detach(),
            "q_values/data": expectation(q[:, :num_real].detach()).mean(),
            "q_values/model": expectation(q[:, num_real:].detach()).mean(),
        }

    @torch.no_grad()
    def q_target(self, batch: Batch) -> Tensor:
        """What the critics step towards. -> [B]"""
        q_next = self.critic_target(batch.next_obs, self.actor(batch.next_obs))  # [2, B]
        return bellman_target(batch, q_next, self.args.gamma)

    def conservative_gap(self, batch: Batch, q: Tensor) -> Tensor:
        """The gap in the loss: a soft maximum of Q on rho - the mean of Q on D. -> [2]

        It is of each critic; q [2, B] is at the batch.
        """
        rho = self.rows_of_rho(batch)
        actions = self.proposals(rho.obs)
        soft_q = log_sum_exp(self.q_of_actions(rho.obs, actions))  # [2, rows of rho]
        q_data = q[:, : real_rows(self.args)]  # the batch begins with the data
        return expectation(soft_q) - expectation(q_data)

    def rows_of_rho(self, batch: Batch) -> Batch:
        """The rows of a batch whose states are rho's: all of them, or those of D_model alone."""
        # Paper: states of rollouts, to which the data's are added for stability.
        if self.args.rho_states == "mixed":
            return batch
        num_real = real_rows(self.args)
        return Batch(*(field[num_real:] for field in batch))

    @torch.no_grad()
    def proposals(self, obs: Tensor) -> Tensor:
        """n uniform actions per state and the policy's: [B, S] -> [B, n + 1, A]."""
        shape = (len(obs), self.args.num_actions, self.action_dim)
        uniform = 2 * torch.rand(shape, device=self.device) - 1
        return torch.cat([uniform, self.actor(obs)[:, None]], 1)

    def q_of_actions(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Both critics at K actions per state: [B, S], [B, K, A] -> [2, B, K]."""
        count = actions.shape[1]
        q = self.critic(obs.repeat_interleave(count, 0), actions.flatten(0, 1))  # [2, B K]
        return q.unflatten(1, (-1, count))

    # --- what the critics believe, for logs and combo.py's --select ---

    @torch.no_grad()
    def start_values(self) -> Scalars:
        """Q at the first states of the data's episodes: Prop. 4.1 bounds its mean there."""
        q = self.critic(self.episode_starts, self.actor(self.episode_starts))
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
            q_rho = self.critic(rho.obs, self.actor(rho.obs))
            q_data = self.critic(batch.obs[:num_real], batch.action[:num_real])
            gaps.append(expectation(q_rho) - expectation(q_data))
        return {"conservative_gap": float(torch.stack(gaps).mean())}

    # --- acting ---

    def forget(self) -> None:
        """Begin new episodes: what `act` is given next are their first images."""
        self.latest = None

    @torch.no_grad()
    def act(self, images: np.ndarray) -> np.ndarray:
        """The policy's actions [n, A] in [-1, 1] after the next images [n, 64, 64, 3] of episodes.

        The latent state is a draw of the posterior, as in LOMPO's code. It is kept until `forget`.
        """
        pixels = self.pixels(torch.as_tensor(images, device=self.device))
        if self.latest is None:
            obs = self.model.start(len(pixels), self.device)
            action = torch.zeros(len(pixels), self.action_dim, device=self.device)
        else:
            obs, action = self.latest
        memory = self.model.remember_step(obs, action)
        obs, _, _ = self.model.infer(memory, self.model.encode(pixels))
        action = self.actor(obs)
        self.latest = (obs, action)
        return action.cpu().numpy()


def draw_reconstructions(path: Path, images: Tensor, step: int) -> None:
    """Draw what `COMBOPixels.reconstruct` returns, every fifth image of the sequences."""
    names = ("data", "posterior", "open loop")
    shown = list(range(0, images.shape[2], 5))
    if shown[-1] != images.shape[2] - 1:
        shown.append(images.shape[2] - 1)
    size = (len(shown), len(names) * len(images))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(size[1], size[0], squeeze=False)
    rows = images.flatten(0, 1).movedim(-3, -1).cpu().numpy()  # [2 * 3, T, 64, 64, 3]
    for number, row in enumerate(rows):
        for column, time_step in enumerate(shown):
            axes[number, column].imshow(row[time_step])
            axes[number, column].set(xticks=[], yticks=[])
            axes[0, column].set_title(f"t = {time_step}", fontsize=8)
        axes[number, 0].set_ylabel(names[number % 3], fontsize=8)
    figure.suptitle(f"after {step} steps; the open loop sees the first five images", fontsize=8)
    save(figure, path)


# ===== 5. Training ================================================================================
def check_args(args: Args) -> None:
    """Stop on settings that make no sense or contradict each other. Raises SystemExit."""
    check_ranges(args)
    num_real = real_rows(args)
    if num_real < 1:
        sys.exit("a batch needs a row of data: raise --real-fraction or --batch-size")
    if args.rho_states == "model" and num_real == args.batch_size:
        sys.exit("--rho-states model needs rows of D_model in a batch: lower --real-fraction")
    if args.rollout_starts * args.horizon > args.model_rows:
        what = "--rollout-starts times --horizon is larger than --model-rows"
        sys.exit(f"{what}: a phase of rollouts would not fit into D_model")


def real_rows(args: Args) -> int:
    """How many rows of a batch are data."""
    return int(args.real_fraction * args.batch_size)


def train(args: Args, method: type = COMBOPixels) -> dict:
    """Both phases, on the dataset that `args` name. -> result.json

    `method` is the class to train: COMBOPixels, or one derived from it.
    """
    check_args(args)
    dataset = load_dataset(args)
    obs_dim = args.stoch_size + args.memory_size
    action_dim = dataset["action"].shape[-1]
    combo = method(args, obs_dim, action_dim, choose_device(args))
    combo.set_data(dataset)
    run = Run(args, combo, dataset["source"])  # it goes on from a checkpoint under --resume

    # Phase 1: the latent model, and the latent states of the data.
    if run.iteration == 0 and args.dynamics_from:
        load_model(combo, args.dynamics_from, dataset["source"], run.folder)
    elif run.iteration == 0:
        combo.fit_model(run.progress, run.folder)
        save_model(combo, run.folder, dataset["source"])
    combo.encode_data(run.progress)

    # Phase 2: COMBO in latent space.
    iterate = capture(combo.iterate, args)
    rollout = capture(combo.rollout, args)
    rollout_logs = {}
    while run.iteration < args.total_iterations:
        i = run.iteration
        if i % args.rollout_every == 0:
            reseed(args.seed, "rollout", i)  # its draws do not shift those of the iterations
            for _ in range(combo.rollout_phases(i)):
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


def main(settings: type = Args, method: type = COMBOPixels) -> None:
    """The command line: train, or score the policy of a finished run with --evaluate."""
    args = parse_args(settings)
    if args.evaluate:
        policy = load_policy(args.evaluate, settings, method)
        scores = evaluate(policy, args, args.final_episodes, k=0)  # the final one
        report(policy, args, scores, Path(args.evaluate))
    else:
        with enough_memory():
            train(args, method)


# ===== Appendix: may be skipped ===================================================================
# Nothing here is part of the method. Most of it has the same text as the appendix of combo.py
# (tests/test_copies.py lists what). The sections stand in the order in which a run meets them:
#   A. command line      the settings of the run
#   B. data              a folder of V-D4RL's episodes
#   C. environments      walker-walk on MuJoCo, or one of your own
#   D. device            the GPU or the CPU, CUDA graphs, seeds
#   E. evaluation        scores of a policy, and an episode as a moving picture
#   F. the run's folder  what a run writes, and how --resume and --evaluate read it


# ===== A. Command line ============================================================================
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
        f"python {script} --env-id {settings.env_id} --level mixed",
        f"python {script} --resume runs/<run>",
        f"python {script} --evaluate runs/<run> --capture-video",
    ]
    marks = "Defaults are those of LOMPO's code, unless it says (ours)."
    return "\n\n".join([". ".join(sentences) + ".", *commands, marks])


def task_args(env_id: str, settings: type = Args, **flags) -> Args:
    """Settings of a task: `flags`, else the defaults. No task has settings of its own here."""
    return settings(env_id=env_id, **flags)


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
# V-D4RL keeps an episode a file, as Dreamer does. A row t holds image t, the action that led to it
# and the reward that came with it; the action and the reward of row 0 mean nothing.
def load_dataset(args: Args) -> dict:
    """The episodes that `args` name, E of L rows each. Raises SystemExit.

        image    [E, L, 64, 64, 3]   uint8
        action   [E, L, A]           in [-1, 1]
        reward   [E, L]
        source   a dict              which data this is, and its mean score, for result.json

    All tensors are on the CPU.
    """
    env = try_env(args.env_id)  # comes first, so that a missing simulator shows now
    action_dim = env.action_space.shape[0]
    env.close()
    folder = find_dataset(args)
    data, sha256 = read_folder(folder, action_dim)
    reward = data["reward"][:, 1:]
    if reward.min() == reward.max():
        sys.exit(f"{folder}: all rewards are equal: there is nothing to learn")
    if data["action"][:, 0].any():
        print(
            f"note: {folder} has first actions that are not 0, but no action led to a first image: "
            "do actions and rewards stand with the image that they led to, or one row too early?"
        )
    episodes, length = data["reward"].shape
    score = float(scores_of(args.env_id, reward.sum(1, dtype=np.float64)).mean())
    measure = measure_of(args.env_id)
    print(f"{folder}: {episodes} episodes of {length - 1} steps, their mean {measure} {score:.1f}")
    note = folder / "note.txt"  # collect.py writes there what its datasets are and are not
    if note.exists():
        with reading(note):
            print(note.read_text().strip())
    if length < args.sequence_length:
        print(f"note: sequences have {length} images, as the episodes, not {args.sequence_length}")
    source = {
        "dataset": str(folder),
        "obtained_from": "made by collect.py" if note.exists() else "a local folder",
        "sha256": sha256,
        "rows": episodes * (length - 1),
        "data_score": score,
    }
    tensors = {key: torch.from_numpy(array) for key, array in data.items()}
    return tensors | {"source": source}


# ----- find -----
# Where the data of a level lies in V-D4RL's folders. One version of its README calls mixed by
# D4RL's name.
FOLDERS = {"mixed": ("mixed", "medium_replay")}


def find_dataset(args: Args, may_fetch: bool = True) -> Path:
    """--dataset-path, else V-D4RL's folder of the level. Raises SystemExit with what helps.

    sweep.py says `may_fetch` to every script. This one fetches nothing in either case.
    """
    if args.dataset_path:
        folder = expanded(args.dataset_path)
        if not folder.is_dir():
            sys.exit(f"there is no folder {folder}: name the folder of episodes, --dataset-path")
        return folder
    if args.env_id != "walker-walk":
        sys.exit(f"{args.env_id} has no data of V-D4RL's: name a folder with --dataset-path")
    root = expanded(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    tasks = root / "vd4rl" / "main" / "walker_walk"
    names = FOLDERS.get(args.level, (args.level,))
    for name in names:
        if (tasks / name / "64px").is_dir():
            return tasks / name / "64px"
    folder = tasks / names[0] / "64px"
    patterns = [f"'vd4rl/main/walker_walk/{name}/64px/*'" for name in names]
    sys.exit(
        f"there is no {folder}. Fetch V-D4RL's (about 1.2 GB), or make one anew:\n"
        "pip install huggingface_hub\n"
        f"hf download conglu/vd4rl --repo-type dataset --include {' '.join(patterns)} "
        f"--local-dir {shlex.quote(str(root))}\n"
        f"python collect.py --env-id walker-walk --level {args.level}"
    )


# ----- read -----
KEYS = ("image", "action", "reward", "is_first", "is_last", "is_terminal")
MOST_BYTES = 2**31  # that an episode may have unpacked; one of V-D4RL's has 6 MB


def read_folder(folder: Path, action_dim: int) -> tuple[dict[str, np.ndarray], str]:
    """Image, action and reward of all episodes [E, L, ...], and the sha256 of their files."""
    with reading(folder):
        files = sorted(folder.glob("*.npz"))
    if len(files) < 2:
        count = "one episode" if files else "no episode"
        sys.exit(f"{folder} holds {count}, but at least two .npz files are needed")
    digest = hashlib.sha256()
    data = {}
    with contextlib.closing(Bar("reading episodes", len(files))) as bar:
        for number, file in enumerate(files):
            with reading(file):
                content = file.read_bytes()
            digest.update(hashlib.sha256(content).digest())
            episode = read_episode(file, content)
            check_episode(file, episode, action_dim)
            length = len(episode["reward"])
            for key in ("image", "action", "reward"):
                if number == 0:
                    data[key] = np.empty((len(files), *episode[key].shape), episode[key].dtype)
                if length != data[key].shape[1]:
                    other = f"{data[key].shape[1]} rows, as in {files[0].name}"
                    sys.exit(f"{file} has {length} rows and not {other}: all need the same length")
                data[key][number] = episode[key]
            bar.move_to(number + 1, "")
    return data, digest.hexdigest()


def read_episode(file: Path, content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file of V-D4RL's by KEYS. Raises SystemExit where one cannot be read."""
    with reading(file):
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            unpacked = sum(part.file_size for part in parts.infolist())
        if unpacked > MOST_BYTES:
            raise ValueError(f"it unpacks to {unpacked} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            missing = [key for key in KEYS if key not in stored]
            if "discount" in stored and missing == ["is_terminal"]:  # as old files of Dreamer's
                missing = []
            if missing:
                names = ", ".join(list(stored)[:10]) or "nothing"
                sys.exit(f"{file} has no {missing[0]}, as V-D4RL's episodes do; found {names}")
            arrays = {key: stored[key] for key in KEYS if key in stored}
            if "is_terminal" not in arrays:
                arrays["is_terminal"] = stored["discount"] == 0
    return arrays


@contextlib.contextmanager
def reading(path: Path):
    """`with reading(path):` where what NumPy and the system refuse ends in one sentence."""
    try:
        yield
    except FileNotFoundError:
        sys.exit(f"there is no {path}: name the folder of episodes with --dataset-path")
    except (OSError, ValueError, LookupError, MemoryError, EOFError, NotImplementedError) as error:
        sys.exit(f"{path} cannot be read, or is damaged ({' '.join(str(error).split())[:200]})")
    except (RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        sys.exit(f"{path} cannot be read, or is damaged ({' '.join(str(error).split())[:200]})")


# ----- check -----
def check_episode(file: Path, episode: dict[str, np.ndarray], action_dim: int) -> None:
    """Refuse an episode that cannot be the task's, and give the others one form, in place."""
    size = episode["reward"].size
    shapes = {"image": (size, 64, 64, 3), "action": (size, action_dim), "reward": (size,)}
    for key, array in episode.items():
        shape = shapes.get(key, (size,))
        if array.shape != shape:
            sys.exit(f"{file}: {key} is {array.shape} and not {shape}: of another task?")
        if array.dtype.kind not in "biuf":
            sys.exit(f"{file}: {key} is of type {array.dtype} and not numbers")
    if episode["image"].dtype != np.uint8:
        sys.exit(f"{file}: images are {episode['image'].dtype} and not uint8, from 0 to 255")
    if size < 3:
        sys.exit(f"{file} has {size} rows: an episode needs at least three")
    for key in ("action", "reward"):
        episode[key] = episode[key].astype(np.float32)
        if not np.isfinite(episode[key]).all():
            row = np.argwhere(~np.isfinite(episode[key]))[0][0]
            sys.exit(f"{file}: {key} holds NaN or infinity, first in row {row}")
    outside = (np.abs(episode["action"]) > 1 + 1e-3).any(1)
    if outside.any():
        sys.exit(f"{file}: the action in row {outside.argmax()} leaves [-1, 1]")
    episode["action"] = episode["action"].clip(-1, 1)
    row = np.arange(size)
    borders = {"is_first": row == 0, "is_last": row == size - 1}
    for key, expected in borders.items():
        wrong = episode[key] != expected
        if wrong.any():
            row = wrong.argmax()
            stored = episode[key][row]
            sys.exit(f"{file}: {key} is {stored} in row {row}: a file must be one whole episode")
    if episode["is_terminal"].any():
        row = episode["is_terminal"].argmax()
        sys.exit(f"{file}: row {row} is terminal, but the latent model knows no end but a limit")


# ===== C. Environments ============================================================================
# walker-walk below, which needs `pip install --no-deps dm_control`, or any environment that is
# registered with gymnasium, whose observations are images [64, 64, 3], uint8, and whose episodes
# all have the same length: `--env-id module:id` imports the module that registers id, and
# --dataset-path names its data.
REFERENCES: dict[str, tuple[float, float]] = {
    "walker-walk": (0.0, 1000.0),  # as V-D4RL's scores; how COMBO scaled its own, it does not say
}


def reference_returns(env_id: str) -> tuple[float, float] | None:
    """The returns that make scores 0 and 100, or None for a task without them."""
    return REFERENCES.get(env_id)


def measure_of(env_id: str) -> str:
    """What a task's scores are: "normalized score", or without references "return"."""
    return "return" if reference_returns(env_id) is None else "normalized score"


def scores_of(env_id: str, returns: np.ndarray) -> np.ndarray:
    """The normalized score of each return: 100 * (return - low) / (high - low).

    Without references a score is the return itself.
    """
    returns = np.asarray(returns, np.float64)
    references = reference_returns(env_id)
    if references is None:
        return returns
    low, high = references
    return 100 * (returns - low) / (high - low)


def make_env(env_id: str, render_mode: str | None = None) -> gymnasium.Env:
    """walker-walk, or any registered environment with images and actions in [-1, 1].

    Raises SystemExit where there is no such environment, or none that fits.
    """
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    if env_id == "walker-walk":
        return WalkerWalk(render_mode)
    try:
        if render_mode is None:
            env = gymnasium.make(env_id)  # a class that never renders need not take a render_mode
        else:
            env = gymnasium.make(env_id, render_mode=render_mode)
        if env.spec.max_episode_steps is None:
            env = gymnasium.wrappers.TimeLimit(env, 1000)
    except Exception as error:  # gymnasium's own, ImportError, whatever a constructor raises
        reason = " ".join(str(error).split())
        near = difflib.get_close_matches(env_id, ["walker-walk", *gymnasium.registry])
        sys.exit(f"cannot make {env_id} ({reason}): did you mean {' or '.join(near) or 'another'}?")
    images = env.observation_space
    if images.shape != (64, 64, 3) or images.dtype != np.uint8:
        sys.exit(f"--env-id {env_id}: only images of 64 x 64 x 3, uint8, work (states: combo.py)")
    box = env.action_space
    flat = isinstance(box, gymnasium.spaces.Box) and len(box.shape) == 1 and box.dtype.kind == "f"
    if not flat or not np.isfinite(box.low).all() or not np.isfinite(box.high).all():
        sys.exit(f"--env-id {env_id}: only flat, continuous actions within bounds work")
    if (box.low != -1).any() or (box.high != 1).any():
        sys.exit(f"--env-id {env_id}: its actions must go from -1 to 1, as those of the data do")
    return env


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


# ===== walker-walk from images ====================================================================
# Two things of the machine's that it needs, and what is said where they are missing.
NO_WALKER = (
    "walker-walk needs the file walker.xml of dm_control, which is not installed: "
    "pip install --no-deps dm_control (none of its code is run)"
)
NO_OPENGL = (
    "without a screen set MUJOCO_GL=egl or MUJOCO_GL=osmesa, for which Debian has the packages "
    "libegl1 and libosmesa6"
)


class WalkerWalk(gymnasium.Env):
    """dm_control's walker-walk with LOMPO's images: 64 x 64, camera 0, action repeat 2.

    The planar walker is to run at 1 m/s or more with its torso up. Only the model is dm_control's,
    `walker.xml`, whose package does not run on this MuJoCo; start, steps and reward are written
    anew below. An action is six torques in [-1, 1] that are held for two control steps of 25 ms.
    An episode has 500 actions and nothing ends it before, so a return lies between 0 and 1000. A
    reset's seed decides the whole episode.

    An observation is the image [64, 64, 3], uint8. With from_states=True it is instead what
    dm_control gives [24], which needs no OpenGL: for each of the 7 bodies two numbers of its
    orientation, the height of the torso in m, and the 9 velocities of the joints.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    IMAGE_SIZE = 64  # pixels a side, of an observation
    VIDEO_SIZE = 256  # pixels a side, of what `render` gives
    ACTION_REPEAT = 2  # control steps of an action (LOMPO)
    PHYSICS_STEPS = 10  # of 2.5 ms each, in a control step
    EPISODE_STEPS = 500  # actions: dm_control's 25 s

    def __init__(self, render_mode: str | None = None, from_states: bool = False):
        self.render_mode = render_mode
        self.from_states = from_states
        self.model = load_walker()
        self.data = mujoco.MjData(self.model)
        self.renderers = {}  # by size, made when they are needed
        self.steps = 0  # actions of the episode so far
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self.model.nu,), np.float32)
        if from_states:
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (24,), np.float64)
        else:
            image_shape = (self.IMAGE_SIZE, self.IMAGE_SIZE, 3)
            self.observation_space = gymnasium.spaces.Box(0, 255, image_shape, np.uint8)

    # --- an episode ---

    def reset(self, *, seed=None, options=None):
        """Drop the walker at a random angle, with random joints, at the height of the model."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        for joint in range(self.model.njnt):
            place = self.model.jnt_qposadr[joint]
            if self.model.jnt_limited[joint]:
                low, high = self.model.jnt_range[joint]
                self.data.qpos[place] = self.np_random.uniform(low, high)
            elif self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE:
                self.data.qpos[place] = self.np_random.uniform(-np.pi, np.pi)
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        """Hold an action [6]. The reward is the sum of its control steps' rewards, at most 2."""
        self.data.ctrl[:] = np.clip(action, -1.0, 1.0)
        reward = 0.0
        for _ in range(self.ACTION_REPEAT):
            mujoco.mj_step(self.model, self.data, self.PHYSICS_STEPS)
            # mj_step leaves positions of bodies and sensors as they were before its last step.
            mujoco.mj_step1(self.model, self.data)
            reward += self.reward()
        self.steps += 1
        truncated = self.steps >= self.EPISODE_STEPS
        return self.observe(), reward, False, truncated, {}

    def reward(self) -> float:
        """dm_control's reward of a control step, in [0, 1]: for standing, and for speed with it."""
        torso = self.data.body("torso")
        height = torso.xpos[2]  # m
        upright = (1 + torso.xmat[8]) / 2  # 1 with the head up, 0 with the head down
        speed = self.data.sensor("torso_subtreelinvel").data[0]  # m/s, of the centre of mass
        # From 1.2 m on it stands; below, a Gaussian falls to 0.1 at half that height.
        shortfall = max(0.0, 1.2 - height) / 0.6
        standing = 0.1 ** (shortfall**2)
        stand_reward = (3 * standing + upright) / 4
        move_reward = np.clip(speed, 0.0, 1.0)
        return float(stand_reward * (5 * move_reward + 1) / 6)

    # --- what is seen ---

    def observe(self) -> np.ndarray:
        """The image [64, 64, 3] uint8, or the state [24]."""
        return self.state_observation() if self.from_states else self.image(self.IMAGE_SIZE)

    def state_observation(self) -> np.ndarray:
        """dm_control's observation [24] of the present state."""
        turns = self.data.xmat[1:]  # [7, 9]: the rotation matrix of each body but the world, by row
        orientations = turns[:, [0, 2]].ravel()
        height = self.data.body("torso").xpos[2]
        return np.concatenate([orientations, [height], self.data.qvel])

    def image(self, size: int) -> np.ndarray:
        """What camera 0 sees, [size, size, 3] uint8. Raises SystemExit where OpenGL is missing."""
        on_screen = os.environ.get("MUJOCO_GL", "").lower() not in ("egl", "osmesa")
        has_screen = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
        if sys.platform == "linux" and on_screen and not has_screen:  # MuJoCo might abort
            sys.exit(f"cannot render (there is no screen): {NO_OPENGL}")
        try:
            if size not in self.renderers:
                self.renderers[size] = mujoco.Renderer(self.model, size, size)
            renderer = self.renderers[size]
            renderer.update_scene(self.data, camera=0)
            return renderer.render()
        except Exception as error:  # every OpenGL backend fails in its own way
            reason = " ".join(str(error).split())[:200]
            sys.exit(f"cannot render ({reason}): {NO_OPENGL}")

    def render(self) -> np.ndarray:
        """A frame of a video, [256, 256, 3] uint8."""
        return self.image(self.VIDEO_SIZE)

    def show(self, qpos: np.ndarray) -> None:
        """Place the joints at positions [9] that were stored, so that they can be rendered."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        mujoco.mj_forward(self.model, self.data)

    def close(self) -> None:
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}


def load_walker() -> mujoco.MjModel:
    """The model of dm_control's installed files. Raises SystemExit where there are none.

    The package is found and not imported, because it fails on this version of MuJoCo.
    """
    package = importlib.util.find_spec("dm_control")
    if package is None or package.origin is None:
        sys.exit(NO_WALKER)
    path = Path(package.origin).parent / "suite" / "walker.xml"
    try:
        model = mujoco.MjModel.from_xml_path(str(path))
    except ValueError as error:  # also where there is no such file
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"cannot read {path} ({reason}); {NO_WALKER}")
    # dm_control's shadow map is 2048 x 2048. With this one a core renders 77 images of 64 pixels a
    # second instead of 47, which differ by 0.03 of 255 levels on average.
    model.vis.quality.shadowsize = 512
    return model


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
# Whatever has a function `act`, from the next images of episodes to actions [n, A] in [-1, 1], and
# `forget`, which begins new episodes, can be evaluated.
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
    method.forget()
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
    method.forget()
    reseed(args.seed, "video")
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
        reconstructions.png   every --pictures-every       what the latent model sees and foresees
        model.pt              after the fit                the latent model, for --dynamics-from
        policy.pt             every --checkpoint-every     the networks that act, for --evaluate
        curves.png            every --checkpoint-every     the scores against the iterations
        checkpoint.pt         every --checkpoint-every     all that --resume needs
        result.json           at the end                   scores, settings, times, versions
        episode.gif           at the end                   an episode, with --capture-video
        lock                  at the start                 whose process writes here, and the names
                                                           of the TensorBoard files it wrote

    `method` is a module with `act`, `forget`, `device`, `obs_dim`, `action_dim` and `acting`, the
    names of the networks that `act` uses. It may have `final_numbers`, of which result.json holds
    what it returns. `source` says which data it learns from: see load_dataset.
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
        if "rollout/reward" in logs and not self.rollouts_judged:
            self.rollouts_judged = True
            note_odd_rollouts(self.method)

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


def note_odd_rollouts(method: nn.Module) -> None:
    """Say if imagined rewards are far from all of the data's.

    FAR_REWARD ranges of the data's rewards beyond the largest or smallest are far.
    """
    real = method.split(method.data).reward
    imagined = method.split(method.model_data[: int(method.num_model_rows)]).reward
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


def save_model(method: nn.Module, run: Path, source: dict) -> None:
    """Save the latent model, for --dynamics-from."""
    content = {
        "kind": type(method).__name__,
        "env_id": method.args.env_id,
        "sha256": source["sha256"],
        "reward_range": getattr(method, "reward_range", None),
        "model": method.model.state_dict(),
        "optimizer": method.model_optimizer.state_dict(),
    }
    save(content, run / "model.pt")


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
    """Take the latent model that save_model saved.

    A copy goes to the folder `keep_in`. Raises SystemExit where the model is of another task or
    setting. Other data of the task and another class are said.
    """
    path = folder_of_run(run) / "model.pt"
    with loading(path, method.device) as saved:
        refuse_another_model(path, saved, method)
        if saved["sha256"] != source["sha256"]:
            print(f"note: {path} was fitted to other data than {source['dataset']}")
        own = type(method).__name__
        if saved["kind"] != own:
            kind = saved["kind"]
            print(f"note: {path} was fitted by {kind}, this is {own}: do both learn the same data?")
        method.model.load_state_dict(saved["model"])
        load_optimizer(method.model_optimizer, saved["optimizer"])
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


def load_policy(run: str, settings: type = Args, method: type = COMBOPixels) -> nn.Module:
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
