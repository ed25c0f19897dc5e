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
"""Make anew the datasets that no server hosts, each by its published recipe. The file goes to
~/.d4rl/datasets (or $D4RL_DATASET_DIR) under D4RL's name, where the learning scripts find it.

    python collect.py --env-id maze2d-umaze-v1       # also medium, large; a minute on one core
    python collect.py --env-id hopper-medium-v2      # also halfcheetah, walker2d; -random,
                                                     # -medium-replay, -medium-expert, -expert
    python collect.py --env-id halfcheetah-jump-v0   # MOPO's and COMBO's; also ant-angle-v0
    python collect.py --env-id walker-walk --level mixed   # images; also random, medium,
                                                           # medium_expert, expert
    python collect.py --env-id hopper-medium-v2 --resume   # goes on where it was stopped

What is made is a re-collection, not the file that D4RL hosts. The attribute `note` of the file says
so, and scores learned from it are to be reported as such.

maze2d: a ball is steered to one random goal after another and is never reset.

    draw a goal cell, and plan a shortest path of cells to it
    push the ball from waypoint to waypoint with a PD controller; add noise N(0, 0.5^2), clip
    when the goal is reached, or at the task's limit of steps, set `timeouts` and draw a new goal
    at the end, write the rewards toward the task's one goal, wherever the ball was steered to

Source: D4RL's generate_maze2d_datasets.py --noisy and relabel_maze2d_rewards.py. That D4RL used
--noisy is our inference: with it a trajectory has 79.9 rows on average, where the hosted umaze file
has 80.3; without it, 73.0.

hopper, halfcheetah, walker2d: SAC, with one gradient step per step of the environment.

    random          rows of uniform actions
    medium          rows of SAC's policy, stopped about halfway to an expert's return
    medium-replay   all rows that SAC saw until that stop
    expert          rows of SAC's policy after --sac-steps
    medium-expert   the rows of medium, then those of expert

Source: D4RL's paper, which says "about a third" and publishes no rule for the stop. Ours is the
first mean of 10 sampled episodes, taken every 5000 steps, that reaches a return of 1500 (hopper),
4700 (halfcheetah) or 2700 (walker2d). These are 47, 41 and 59 on D4RL's scale from 0 to 100. The
settings of SAC are those of MOPO's code, except the target entropy and the flags marked (ours).

halfcheetah-jump, ant-angle: all rows that SAC saw while it learned another task (to run no faster
than 3 m/s; to run along x), with the rewards of the task that is to be learned from them.

Source: MOPO's paper. Nobody published these files.

walker-walk: SAC as above, from states. The frames are rendered afterwards, from stored positions.

    random          episodes of uniform actions
    mixed           episodes that SAC saw until the medium policy (COMBO: medium-replay)
    medium          episodes of SAC's policy, stopped about halfway to the largest return
    medium_expert   half of the episodes of medium, half of expert (COMBO: medium-expert)
    expert          episodes of SAC's policy after --sac-steps

Source: COMBO's section 5.2, "similar to Fu et al., each consisting of 200 trajectories", that is to
D4RL; the names and the format, a folder with a file an episode, are V-D4RL's. COMBO does not say
where it stopped; ours is the first mean of 10 sampled episodes that reaches a return of 500. Of
the episodes that SAC saw until then mixed has --episodes, evenly spaced; all, if they are fewer.
"""

import copy
import dataclasses
import difflib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import mopo  # before torch: it sets how threads wait

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mopo import Count, CountOrZero, NonNegative, Number, Positive, Rate, Seed, Share, Threads


# ===== 1. Arguments ===============================================================================
Level = Literal["random", "mixed", "medium", "medium_expert", "expert"]


@dataclasses.dataclass
class Args:
    # --- dataset ---
    env_id: str = "maze2d-umaze-v1"  # task whose dataset is made
    seed: Seed = 0  # seed of all random draws
    steps: Count = 1_000_000  # rows, of each half in medium-expert (not where all are SAC's own)
    output: str | None = None  # file, or walker-walk's folder (default: D4RL's or V-D4RL's name)
    overwrite: bool = False  # replace an existing file, or start a stopped collection again
    resume: bool = False  # go on with a stopped collection, to the same file bit for bit (SAC)
    save_every: Count = 50_000  # rows between two saves of what --resume starts from (SAC)
    # --- maze2d ---
    action_noise: NonNegative = 0.5  # standard deviation of the noise on actions (D4RL's script)
    keep_quirks: bool = False  # repeat an observation at each goal switch, as D4RL's script does
    # --- walker-walk ---
    level: Level = "mixed"  # V-D4RL's names; COMBO's are medium-replay (mixed), medium-expert, ...
    episodes: Count = 200  # of 500 steps each, in the whole dataset (COMBO)
    # --- SAC ---
    sac_steps: Count = 1_000_000  # steps of SAC; medium and medium-replay end at their return
    medium_return: Number | None = None  # return that ends medium (ours: 1500, 4700, 2700 or 500)
    eval_every: Count = 5_000  # steps between two evaluations (ours)
    eval_episodes: Count = 10  # episodes per evaluation, with sampled actions (ours)
    random_steps: CountOrZero = 5_000  # first steps, of uniform actions without training (ours)
    batch_size: Count = 256  # rows per gradient step
    hidden: tuple[Count, ...] = (256, 256)  # widths of the hidden layers of policy and critics
    gamma: Share = 0.99  # discount factor
    tau: Rate = 0.005  # soft-update rate of the critics' targets
    critic_lr: Positive = 3e-4  # Adam learning rate of the critics
    actor_lr: Positive = 3e-4  # Adam learning rate of the policy
    alpha_lr: Positive = 3e-4  # Adam learning rate of the temperature alpha, which starts at 1
    target_entropy: Number | None = None  # entropy that alpha steers to (ours: -A, for A actions)
    # --- how SAC runs ---
    async_envs: bool | None = None  # evaluation in processes (default: with a GPU and 8 cores)
    cuda: bool = True  # training on the GPU, if there is one
    cuda_graphs: bool = True  # recording of training steps as CUDA graphs (GPU)
    tf32: bool = False  # faster, less exact matrix products, with errors of 1e-3 (GPU)
    cpu_fast_matmul: bool = True  # oneDNN matrix products, if a test finds them exact (CPU)
    threads: Threads = 1  # CPU threads of torch (0: torch's default)


class Recipe(NamedTuple):
    """How a dataset is made with SAC."""

    policies: tuple[str, ...]  # kept from SAC, which ends with the last of them; none: no SAC
    parts: tuple[str, ...]  # the policies whose rows the dataset has, in turn; "SAC": all it saw


RECIPES = {
    "random": Recipe(policies=(), parts=("random",)),
    "medium": Recipe(policies=("medium",), parts=("medium",)),
    "medium-replay": Recipe(policies=("medium",), parts=("SAC",)),
    "medium-expert": Recipe(policies=("medium", "expert"), parts=("medium", "expert")),
    "expert": Recipe(policies=("expert",), parts=("expert",)),
}
MEDIUM_RETURNS = {"hopper": 1500.0, "halfcheetah": 4700.0, "walker2d": 2700.0}
# Mean and maximum return of an episode of MOPO's data, under the task to be learned (MOPO's paper).
GENERALISATION = {"halfcheetah-jump-v0": (-1022.6, 1808.6), "ant-angle-v0": (866.7, 2311.9)}

WALKER = "walker-walk"
WALKER_STEPS = 500  # of an episode
WALKER_MEDIUM_RETURN = 500.0  # that ends medium (ours): half of the 1000 that are possible
LEVELS = {  # V-D4RL's names of walker-walk's datasets, and D4RL's, which are COMBO's
    "random": "random",
    "mixed": "medium-replay",
    "medium": "medium",
    "medium_expert": "medium-expert",
    "expert": "expert",
}

SAC_TASKS = {}
for robot in MEDIUM_RETURNS:
    for kind, recipe in RECIPES.items():
        SAC_TASKS[f"{robot}-{kind}-v2"] = recipe
for task in GENERALISATION:
    SAC_TASKS[task] = Recipe(policies=("behaviour",), parts=("SAC",))

MAZE2D_TASKS = []
for maze in ("umaze", "medium", "large", "eval-umaze", "eval-medium", "eval-large"):
    MAZE2D_TASKS.append(f"maze2d-{maze}-v1")
    MAZE2D_TASKS.append(f"maze2d-{maze}-dense-v1")

Columns = dict[str, np.ndarray]  # a dataset by D4RL's names of columns, [rows, ...] each


# ===== 2. maze2d ==================================================================================
Cell = tuple[int, int]  # a cell of the maze: x and y, rounded


def neighbours(cell: Cell) -> list[Cell]:
    """The four cells beside one, in the order in which D4RL tries moves."""
    x, y = cell
    return [(x, y - 1), (x, y + 1), (x - 1, y), (x + 1, y)]


def plan(open_cells: set[Cell], goal: Cell) -> dict[Cell, Cell]:
    """For every cell the next cell of a shortest path to `goal`; for the goal, the goal.

    D4RL runs q-iteration on the grid. Counting the moves from the goal outwards gives the same
    paths, because among equally short ones the first move in D4RL's order is taken. Walls beside an
    open cell have a way out and none in: the centre of the ball gets as far as 0.6 from the middle
    of a cell, which rounds to the wall beside it.
    """
    moves_to_goal = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for neighbour in neighbours(cell):
            if neighbour not in moves_to_goal:
                moves_to_goal[neighbour] = moves_to_goal[cell] + 1
                if neighbour in open_cells:
                    queue.append(neighbour)

    next_cell = {goal: goal}
    for cell in moves_to_goal:
        if cell != goal:
            ways = [neighbour for neighbour in neighbours(cell) if neighbour in open_cells]
            next_cell[cell] = min(ways, key=moves_to_goal.get)  # the first among equals
    return next_cell


def nearest_cell(position: np.ndarray) -> Cell:
    """The cell that a position [2] lies in."""
    x, y = position
    return round(float(x)), round(float(y))


class WaypointController:
    """D4RL's controller: action 10 * (waypoint - position) - velocity, along the cells of the path.

    It steers to the cell of the goal, not to the goal. So a new goal in the old cell counts as
    reached at once and makes a trajectory of one row, on umaze every seventh, as in D4RL's files.
    """

    def __init__(self, open_cells: set[Cell], rng: np.random.Generator):
        self.open_cells = open_cells
        self.rng = rng
        self.plans = {}  # of every goal cell so far, as `plan` returns it
        self.goal_cell = None
        self.waypoints = []  # positions (x, y); the last is the middle of the goal's cell
        self.index = 0  # of the waypoint that the ball is steered to
        self.previous = (0.0, 0.0)  # the position at the last step

    def set_goal(self, position: np.ndarray, goal_cell: Cell) -> None:
        """Plan a path. All of its waypoints but the last are moved by U(0, 0.2) in x and y."""
        if goal_cell not in self.plans:
            self.plans[goal_cell] = plan(self.open_cells, goal_cell)
        next_cell = self.plans[goal_cell]
        start = nearest_cell(position)
        cell = start
        if cell not in next_cell:  # in a corner, the nearest can be a wall without a way out
            cell = min(next_cell, key=lambda known: math.dist(known, position))
        self.waypoints = []
        while True:  # at least once: also from the goal's cell itself there is one waypoint
            cell = next_cell[cell]
            if cell == goal_cell:
                break
            shift_x, shift_y = self.rng.uniform(0.0, 0.2, 2).tolist()
            self.waypoints.append((cell[0] - shift_x, cell[1] - shift_y))
        self.waypoints.append(goal_cell)
        self.goal_cell = goal_cell
        self.index = 0
        self.previous = start

    def act(
        self, position: np.ndarray, velocity: np.ndarray, goal: np.ndarray
    ) -> tuple[np.ndarray, bool]:
        """Position, velocity and goal, [2] each -> action [2], and whether the goal is reached."""
        if nearest_cell(goal) != self.goal_cell:
            self.set_goal(position, nearest_cell(goal))
        # D4RL's threshold of the velocity is one of the way since the last step. The ball cannot go
        # 0.1 in a step, so it acts only in the first step to a goal, where `previous` is a cell.
        is_slow = math.dist(position, self.previous) < 0.1
        reached = is_slow and math.dist(position, self.goal_cell) < 0.1
        aim = self.goal_cell if reached else self.waypoints[self.index]
        action = np.clip(10.0 * (aim - position) - velocity, -1.0, 1.0)
        if is_slow and not reached and math.dist(position, aim) < 0.1:
            self.index += 1
        self.previous = position
        return action, reached


class Ball:
    """The ball in a maze. It is moved without gymnasium, whose checks would take most of the time.

    Positions and velocities are [2] each.
    """

    def __init__(self, maze: mopo.Maze2d):
        self.origin = maze.origin[:2]
        self.model = maze.unwrapped.model
        self.data = maze.unwrapped.data

    def place(self, position: np.ndarray, velocity: np.ndarray) -> None:
        self.data.qpos[:] = position - self.origin
        self.data.qvel[:] = velocity

    def push(self, action: np.ndarray) -> None:
        """Take one step of the simulator, as PointMaze does, which limits the velocity before."""
        self.data.ctrl[:] = action
        self.data.qvel[:] = np.clip(self.data.qvel, -5.0, 5.0)
        mujoco.mj_step(self.model, self.data)

    def position(self) -> np.ndarray:
        return self.data.qpos + self.origin

    def velocity(self) -> np.ndarray:
        return self.data.qvel.copy()


def draw_place(maze: mopo.Maze2d, rng: np.random.Generator) -> np.ndarray:
    """A place near the middle of a random open cell, [2]."""
    cell = maze.open[rng.integers(len(maze.open))]
    return cell + rng.uniform(-0.1, 0.1, 2)


def collect_maze2d(args: Args) -> Columns:
    """All columns of the file. A million rows take a minute, so --resume has nothing to go on."""
    env = mopo.make_env(args.env_id)
    time_limit = env.get_wrapper_attr("_max_episode_steps")
    maze = env.env
    ball = Ball(maze)
    rng = np.random.default_rng(args.seed)
    open_cells = {tuple(cell) for cell in maze.open.astype(int).tolist()}
    controller = WaypointController(open_cells, rng)
    columns = empty_maze2d_columns(args.steps)
    bar = mopo.Bar(args.env_id, args.steps)

    ball.place(position=draw_place(maze, rng), velocity=0.1 * rng.standard_normal(2))
    goal = draw_place(maze, rng)
    steps_to_goal = 0
    position = ball.position()
    velocity = ball.velocity()
    for row in range(args.steps):
        action, reached = controller.act(position, velocity, goal)
        noise = args.action_noise * rng.standard_normal(2)
        action = np.clip(action + noise, -1.0, 1.0)
        switch = reached or steps_to_goal >= time_limit
        columns["observations"][row] = np.concatenate([position, velocity])
        columns["actions"][row] = action
        columns["timeouts"][row] = switch
        columns["infos/goal"][row] = goal
        columns["infos/qpos"][row] = ball.position()
        columns["infos/qvel"][row] = ball.velocity()
        ball.push(action)
        steps_to_goal += 1
        if switch:
            goal = draw_place(maze, rng)
            steps_to_goal = 0
        # D4RL's script does not look at the ball after a goal switch, though it has moved on: the
        # next row repeats the observation, and its transition spans two physical steps.
        if not (switch and args.keep_quirks):
            position = ball.position()
            velocity = ball.velocity()
        if row % 1000 == 999:
            bar.move_to(row + 1, "")
    bar.close()
    columns["rewards"] = maze2d_rewards(maze, columns["observations"])
    return columns


def empty_maze2d_columns(rows: int) -> Columns:
    """Columns of zeros in D4RL's layout. No row ends in a terminal: maze2d has no such states."""
    return {
        "observations": np.zeros((rows, 4), np.float32),
        "actions": np.zeros((rows, 2), np.float32),
        "terminals": np.zeros(rows, np.bool_),
        "timeouts": np.zeros(rows, np.bool_),
        "infos/goal": np.zeros((rows, 2), np.float32),
        "infos/qpos": np.zeros((rows, 2), np.float32),
        "infos/qvel": np.zeros((rows, 2), np.float32),
    }


def maze2d_rewards(maze: mopo.Maze2d, observations: np.ndarray) -> np.ndarray:
    """Rewards [rows] of the states [rows, 4] themselves, as in D4RL's files.

    A step of the environment pays for the state that follows.
    """
    distance = np.linalg.norm(observations[:, :2] - maze.goal, axis=-1)
    reward = np.exp(-distance) if maze.dense else distance <= 0.5
    return reward.astype(np.float32)


def maze2d_attributes(args: Args, columns: Columns) -> dict:
    """What the file is, and how it stands to the quirks of D4RL's own."""
    switches = int(columns["timeouts"].sum())
    mean_reward = float(columns["rewards"].mean())
    facts = f"{args.steps} rows, {switches} goal switches, mean reward {mean_reward:.4f}"
    return {
        **settings_of(args, ["steps", "action_noise"]),
        "goal_switches": switches,
        "mean_reward": mean_reward,
        "quirk_row_repeated_after_a_goal_switch": "kept" if args.keep_quirks else "repaired",
        "quirk_one_row_trajectories": "kept: a new goal in the old cell is reached at once",
        "quirk_rewards_of_the_present_state": "kept: rewards[t] is of observations[t]",
        "note": note(args, [facts]),
    }


# ===== 3. SAC =====================================================================================
class SAC(nn.Module):
    """Soft actor-critic: networks, the rows so far, optimizers, and the step.

    `iterate` is that of mopo.py with other rows. B is the batch size; an observation has S numbers,
    an action A. On a GPU it is recorded as a CUDA graph.
    """

    def __init__(
        self, args: Args, obs_dim: int, action_dim: int, capacity: int, device: torch.device
    ):
        super().__init__()
        self.args = args
        self.device = device
        self.obs_dim = obs_dim
        self.action_dim = action_dim
        self.actor = self.build("actor", mopo.GaussianPolicy)
        self.critic = self.build("critic", mopo.TwinCritic)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        # A row is a Batch's fields side by side. A save has the rows as columns of the dataset, so
        # they are no part of the state_dict.
        self.field_sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        rows = torch.zeros(capacity, sum(self.field_sizes))
        self.register_buffer("rows", rows, persistent=False)
        num_rows = torch.zeros((), dtype=torch.long)  # a tensor, which a CUDA graph reads anew
        self.register_buffer("num_rows", num_rows, persistent=False)
        self.to(device)

        self.actor_optimizer = self.adam(self.actor.parameters(), args.actor_lr)
        self.critic_optimizer = self.adam(self.critic.parameters(), args.critic_lr)
        self.temperature_optimizer = self.adam([self.log_alpha], args.alpha_lr)

    def build(self, name: str, network: type) -> nn.Module:
        """A network whose first weights depend on nothing but the seed and its name."""
        mopo.reseed(self.args.seed, name)
        return network(self.obs_dim, self.action_dim, self.args)

    def adam(self, parameters, lr: float) -> torch.optim.Adam:
        """An optimizer that `mopo.capture` can record."""
        capturable = self.device.type == "cuda"
        return torch.optim.Adam(parameters, lr, fused=True, capturable=capturable)

    def remember(self, columns: Columns, first: int, end: int) -> None:
        """Take the dataset's rows from `first` to before `end`, each to its own place."""
        reward = columns.get("infos/behaviour_rewards", columns["rewards"])
        fields = [
            columns["observations"][first:end],
            columns["actions"][first:end],
            reward[first:end, None],
            columns["next_observations"][first:end],
            columns["terminals"][first:end, None],
        ]
        rows = np.concatenate(fields, axis=1, dtype=np.float32)
        self.rows[first:end] = torch.from_numpy(rows)
        self.num_rows.fill_(end)

    def sample(self) -> mopo.Batch:
        """B uniform rows of all so far, with replacement."""
        place = (torch.rand(self.args.batch_size, device=self.device) * self.num_rows).long()
        place = place.minimum(self.num_rows - 1)  # rand * n can round up to n
        obs, action, reward, next_obs, terminated = self.rows[place].split(self.field_sizes, -1)
        return mopo.Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def iterate(self) -> mopo.Scalars:
        """One step of SAC: critics, policy, temperature, targets."""
        batch = self.sample()
        alpha = self.log_alpha.detach().exp()

        # The critics step towards one target.
        with torch.no_grad():
            next_action, next_log_prob = self.actor.sample(batch.next_obs)  # [B, A], [B]
            q_next = self.critic_target(batch.next_obs, next_action)  # [2, B]
            target = mopo.soft_target(batch, q_next, next_log_prob, alpha, self.args.gamma)  # [B]
        q = self.critic(batch.obs, batch.action)  # [2, B]
        q_loss = mopo.critic_loss(q, target)
        self.critic_optimizer.zero_grad()
        q_loss.backward()
        self.critic_optimizer.step()

        # The policy raises Q and its entropy. Its loss passes through the critics; `inputs` keeps
        # the gradient to the policy.
        action, log_prob = self.actor.sample(batch.obs)
        actor_loss = mopo.policy_loss(self.critic(batch.obs, action), log_prob, alpha)
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=mopo.parameters_of(self.actor_optimizer))
        self.actor_optimizer.step()

        # The temperature steers the entropy of the policy to its target.
        target_entropy = self.args.target_entropy
        alpha_loss = mopo.temperature_loss(self.log_alpha, log_prob.detach(), target_entropy)
        self.temperature_optimizer.zero_grad()
        alpha_loss.backward()
        self.temperature_optimizer.step()

        mopo.polyak(self.critic_target, self.critic, self.args.tau)
        return {"critic loss": q_loss.detach(), "alpha": alpha}

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs [n, S] -> actions [n, A], sampled: what is evaluated is what makes the rows."""
        states = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        action, _ = self.actor.sample(states)
        return action.cpu().numpy()


class Actor:
    """Sampled actions of a policy, one at a time; on a GPU as a CUDA graph."""

    def __init__(self, policy: mopo.GaussianPolicy, sac: SAC):
        self.policy = policy
        self.obs = torch.zeros(1, sac.obs_dim, device=sac.device)  # what the graph reads
        self.draw = mopo.capture(self.draw_action, sac.args)

    @torch.no_grad()
    def draw_action(self) -> dict[str, Tensor]:
        action, _ = self.policy.sample(self.obs)
        return {"action": action}

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs [S] -> action [A]"""
        self.obs.copy_(torch.from_numpy(obs))
        return self.draw()["action"][0].cpu().numpy()


# ===== 4. Datasets made with SAC ==================================================================
class Recording:
    """The rows of one policy. Every episode starts from a seed of its own."""

    def __init__(self, env: gymnasium.Env, name: str, capacity: int, seed: int):
        self.env = env
        self.name = name
        self.capacity = capacity
        self.seed = seed
        self.count = 0  # rows so far
        self.episodes = 0  # whole episodes so far
        self.obs = None  # of the episode under way; None: the next row starts one
        observation = env.observation_space.shape
        physics = env.unwrapped.data
        is_walker = env.spec.id == WALKER
        physics_type = np.float64 if is_walker else np.float32  # images are rendered from it
        self.columns = {
            "observations": np.zeros((capacity, *observation), np.float32),
            "actions": np.zeros((capacity, *env.action_space.shape), np.float32),
            "rewards": np.zeros(capacity, np.float32),
            "next_observations": np.zeros((capacity, *observation), np.float32),
            "terminals": np.zeros(capacity, np.bool_),
            "timeouts": np.zeros(capacity, np.bool_),
            "infos/qpos": np.zeros((capacity, *physics.qpos.shape), physics_type),
            "infos/qvel": np.zeros((capacity, *physics.qvel.shape), physics_type),
        }
        if is_walker:  # an episode has one image more than rows
            self.columns["infos/next_qpos"] = np.zeros((capacity, *physics.qpos.shape))
        if env.spec.id in GENERALISATION:  # the rewards that SAC learns from
            self.columns["infos/behaviour_rewards"] = np.zeros(capacity, np.float32)

    def add_row(self, act: Callable[[np.ndarray], np.ndarray]) -> None:
        """Take one step. `act` turns an observation [S] into an action [A] in [-1, 1]."""
        if self.obs is None:
            name = f"{self.seed} {self.name} episode {self.episodes}"
            digest = hashlib.sha256(name.encode()).digest()
            first_obs, _ = self.env.reset(seed=int.from_bytes(digest[:4], "little"))
            self.obs = first_obs.astype(np.float32)
        action = act(self.obs)
        row = self.count
        physics = self.env.unwrapped.data
        self.columns["observations"][row] = self.obs
        self.columns["actions"][row] = action
        self.columns["infos/qpos"][row] = physics.qpos
        self.columns["infos/qvel"][row] = physics.qvel

        next_obs, reward, terminated, truncated, info = self.env.step(action)
        self.columns["rewards"][row] = reward
        self.columns["next_observations"][row] = next_obs
        self.columns["terminals"][row] = terminated and not truncated  # as in D4RL, never both
        self.columns["timeouts"][row] = truncated
        if "infos/behaviour_rewards" in self.columns:
            self.columns["infos/behaviour_rewards"][row] = info["behaviour_reward"]
        if "infos/next_qpos" in self.columns:
            self.columns["infos/next_qpos"][row] = physics.qpos
        self.count += 1
        if terminated or truncated:
            self.episodes += 1
            self.obs = None
        else:
            self.obs = next_obs.astype(np.float32)


class SACCollection:
    """SAC, the policies kept from it, and their rows: all that the next row depends on."""

    def __init__(self, args: Args, partial: Path):
        self.recipe = recipe_of(args)
        self.partial = partial  # the file that --resume reads
        if args.env_id == WALKER:
            register_walker()
        self.env = mopo.make_env(args.env_id)
        (obs_dim,) = self.env.observation_space.shape
        (action_dim,) = self.env.action_space.shape
        self.args = with_task_defaults(args, action_dim)
        sac_steps = args.sac_steps if self.recipe.policies else 0
        capacities = {part: self.args.steps for part in self.recipe.parts}
        capacities["SAC"] = sac_steps
        self.records = {}
        for name, capacity in capacities.items():
            self.records[name] = Recording(self.env, name, capacity, args.seed)
        self.sac = SAC(self.args, obs_dim, action_dim, sac_steps, mopo.choose_device(args))
        self.kept = {}  # the policies of the recipe so far, by name; nothing moves them any more
        self.stops = {}  # of each of them: steps of SAC, and mean return in the last evaluation
        self.curve = []  # [steps of SAC, mean return] of every evaluation
        self.rows_since_save = 0
        mopo.reseed(args.seed, "collection")

    def run(self) -> None:
        """SAC to its end, then the rows of the policies that were kept."""
        if self.is_learning():
            self.learn()
        for name in self.recipe.parts:
            if name != "SAC":
                self.roll_out(name)

    def is_learning(self) -> bool:
        """Whether SAC is not yet at its end."""
        return any(name not in self.kept for name in self.recipe.policies)

    def learn(self) -> None:
        """Run SAC until all policies of the recipe are kept."""
        args = self.args
        record = self.records["SAC"]
        act = Actor(self.sac.actor, self.sac)
        iterate = mopo.capture(self.sac.iterate, args)
        bar = mopo.Bar("SAC", args.sac_steps, record.count)
        text = ""  # what stands behind the bar
        losses = {}  # of the last gradient step
        while self.is_learning():
            explores = record.count < args.random_steps
            record.add_row(self.act_uniformly if explores else act)
            self.sac.remember(record.columns, record.count - 1, record.count)
            if not explores:
                losses = iterate()

            is_last = record.count == args.sac_steps
            if is_last or record.count % args.eval_every == 0:
                mean_return = self.evaluate()
                bar.write(f"{record.count} steps of SAC: return {mean_return:.1f}")
                numbers = {"return": mean_return, **losses}
                text = ", ".join(f"{name} {float(x):.4g}" for name, x in numbers.items())
                self.keep_policies(mean_return, is_last)
            bar.move_to(record.count, text)
            self.save_if_due(record)
        bar.close()

    def roll_out(self, name: str) -> None:
        """Record the rows of a kept policy, or of uniform actions."""
        record = self.records[name]
        act = self.act_uniformly if name == "random" else Actor(self.kept[name], self.sac)
        bar = mopo.Bar(f"rows of {name}", record.capacity, record.count)
        while record.count < record.capacity:
            record.add_row(act)
            bar.move_to(record.count, "")
            self.save_if_due(record)
        bar.close()

    def act_uniformly(self, obs: np.ndarray) -> np.ndarray:
        """obs [S] -> action [A]"""
        action = 2 * torch.rand(self.sac.action_dim, device=self.sac.device) - 1
        return action.cpu().numpy()

    def evaluate(self) -> float:
        """The mean return of the policy as it is, which also goes to the curve."""
        self.check_finite()
        steps = self.records["SAC"].count
        scores = mopo.evaluate(self.sac, self.args, self.args.eval_episodes, steps)
        mean_return = float(scores.mean())
        references = mopo.reference_returns(self.args.env_id)
        if references is not None:  # then a score is not the return itself
            low, high = references
            mean_return = low + mean_return / 100 * (high - low)
        self.curve.append([steps, mean_return])
        return mean_return

    def keep_policies(self, mean_return: float, is_last: bool) -> None:
        """Keep a copy of the policy if its time has come. Stop if the last step kept too few."""
        steps = self.records["SAC"].count
        for name in self.recipe.policies:
            is_due = mean_return >= self.args.medium_return if name == "medium" else is_last
            if is_due and name not in self.kept:
                self.kept[name] = copy.deepcopy(self.sac.actor)
                self.stops[name] = [steps, mean_return]
        if is_last and self.is_learning():
            best = max(mean for _, mean in self.curve)
            sys.exit(
                f"SAC reached a return of {best:.1f} in --sac-steps {steps}, not "
                f"{self.args.medium_return}: take more steps (--resume goes on from the last save) "
                "or another --seed"
            )

    def check_finite(self) -> None:
        """Stop if SAC has diverged, before a save or a dataset could hold that."""
        for name, weight in self.sac.named_parameters():
            if not weight.isfinite().all():
                steps = self.records["SAC"].count
                sys.exit(
                    f"after {steps} steps of SAC {name} is not finite: lower the learning rates"
                )

    # --- what --resume reads ---

    def save_if_due(self, record: Recording) -> None:
        """Save between two episodes, which have seeds of their own, so that no state is lost."""
        self.rows_since_save += 1
        if self.rows_since_save >= self.args.save_every and record.obs is None:
            self.save()

    def save(self) -> None:
        """Save all that the next row depends on."""
        self.check_finite()
        records = {}
        for name, record in self.records.items():
            columns = {}
            for key, column in record.columns.items():
                columns[key] = torch.from_numpy(column[: record.count])
            records[name] = {"episodes": record.episodes, "columns": columns}
        state = {
            "settings": json.dumps(self.settings()),
            "sac": self.sac.state_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in mopo.optimizers_of(self.sac)},
            "kept": {name: policy.state_dict() for name, policy in self.kept.items()},
            "stops": self.stops,
            "curve": self.curve,
            "records": records,
            "device": self.sac.device.type,
            "rng": mopo.random_generator(self.sac.device).get_rng_state(),
        }
        mopo.save(state, self.partial)
        self.rows_since_save = 0

    def load(self) -> None:
        """Put back what `save` saved. On a CPU the rows then go on bit for bit."""
        sac = self.sac
        with mopo.loading(self.partial) as saved:
            self.check_resumable(saved)
            sac.load_state_dict(saved["sac"])
            for name, optimizer in mopo.optimizers_of(sac):
                mopo.load_optimizer(optimizer, saved["optimizers"][name])
            for name, weights in saved["kept"].items():
                self.kept[name] = copy.deepcopy(sac.actor)
                self.kept[name].load_state_dict(weights)
            self.stops = saved["stops"]
            self.curve = saved["curve"]
            for name, part in saved["records"].items():
                record = self.records[name]
                record.episodes = part["episodes"]
                record.count = len(part["columns"]["rewards"])
                for key, column in record.columns.items():
                    column[: record.count] = part["columns"][key].numpy()
            sac.remember(self.records["SAC"].columns, 0, self.records["SAC"].count)
            if saved["device"] == sac.device.type:
                mopo.random_generator(sac.device).set_rng_state(saved["rng"])
            else:
                other = saved["device"]
                print(f"note: goes on on {sac.device.type}, which draws otherwise than {other} did")

    def check_resumable(self, saved: dict) -> None:
        """Stop if the settings are not those of the stopped run. Raises SystemExit."""
        before = json.loads(saved["settings"])
        now = json.loads(json.dumps(self.settings()))  # lists for tuples, as in `before`
        other = [f"{name} was {before[name]}" for name in before if before[name] != now.get(name)]
        if other:
            sys.exit(f"--resume needs the settings of the stopped run: {', '.join(other)}")
        steps = len(saved["records"]["SAC"]["columns"]["rewards"])
        is_learning = any(name not in saved["kept"] for name in self.recipe.policies)
        needed = steps + 1 if is_learning else steps
        if self.recipe.policies and self.args.sac_steps < needed:
            sys.exit(
                f"the stopped run has taken {steps} steps of SAC: --sac-steps must exceed them"
            )

    def settings(self) -> dict:
        """What decides the rows. It stands in the file, and --resume must find it unchanged."""
        names = []
        if self.args.env_id == WALKER:
            names += ["level", "episodes"]
        elif self.recipe.parts != ("SAC",):
            names += ["steps"]
        if self.recipe.policies:
            names += ["eval_every", "eval_episodes", "random_steps", "batch_size", "hidden"]
            names += ["gamma", "tau", "critic_lr", "actor_lr", "alpha_lr", "target_entropy"]
        if "medium" in self.recipe.policies:
            names += ["medium_return"]
        # SAC that ends at the medium return may be given more steps to get there.
        if self.recipe.policies and self.recipe.policies != ("medium",):
            names += ["sac_steps"]
        return settings_of(self.args, names)

    # --- what the file holds ---

    def columns(self) -> Columns:
        """The columns of the file. Only its last row may be of an episode that is cut unmarked."""
        parts = [self.records[name] for name in self.recipe.parts]
        for part in parts[:-1]:  # the rows after them are another policy's
            last = part.count - 1
            part.columns["timeouts"][last] = not part.columns["terminals"][last]
        columns = {}
        for name in parts[0].columns:
            pieces = [part.columns[name][: part.count] for part in parts]
            columns[name] = np.concatenate(pieces)
        if self.args.env_id == WALKER and self.recipe.parts == ("SAC",):
            columns = spread_episodes(columns, self.args.episodes)
        return columns

    def attributes(self, columns: Columns) -> dict:
        """What the file is: numbers, and a note for people."""
        env_id = self.args.env_id
        mean_return, max_return = returns_of(columns, "rewards")
        attributes = self.settings()
        attributes["device"] = self.sac.device.type
        attributes["mean_return"] = mean_return
        attributes["max_return"] = max_return
        rows = len(columns["rewards"])
        episodes = int((columns["terminals"] | columns["timeouts"]).sum())
        facts = [
            f"{rows} rows, {episodes} whole episodes of mean return {mean_return:.1f} and maximum "
            f"{max_return:.1f}"
        ]
        if env_id in GENERALISATION:
            their_mean, their_max = GENERALISATION[env_id]
            behaviour_return, _ = returns_of(columns, "infos/behaviour_rewards")
            attributes["mean_behaviour_return"] = behaviour_return
            facts.append(
                f"MOPO's own data: {their_mean} and {their_max}; here in SAC's task "
                f"{behaviour_return:.1f}"
            )
        for name, (steps, last_return) in self.stops.items():
            digest = sha256_of(self.kept[name])
            attributes[f"{name}_policy_steps"] = steps
            attributes[f"{name}_policy_return"] = last_return
            attributes[f"{name}_policy_sha256"] = digest
            facts.append(
                f"{name} policy of SAC after {steps} steps, whose last {self.args.eval_episodes} "
                f"test episodes returned {last_return:.1f}, sha256 {digest}"
            )
        if self.curve:
            attributes["eval_steps"] = [steps for steps, _ in self.curve]
            attributes["eval_returns"] = [mean for _, mean in self.curve]
        if self.recipe.parts == ("random",):
            facts.append("uniform actions")
        attributes["note"] = note(self.args, facts)
        return attributes


def with_task_defaults(args: Args, action_dim: int) -> Args:
    """The settings with the numbers that stand for None."""
    target_entropy = args.target_entropy
    if target_entropy is None:
        target_entropy = -float(action_dim)
    medium_return = args.medium_return
    if medium_return is None and args.env_id == WALKER:
        medium_return = WALKER_MEDIUM_RETURN
    elif medium_return is None:
        medium_return = MEDIUM_RETURNS.get(mopo.family_of(args.env_id))
    args = dataclasses.replace(args, target_entropy=target_entropy, medium_return=medium_return)
    if args.env_id == WALKER:
        steps = WALKER_STEPS * args.episodes // len(recipe_of(args).parts)
        # Other processes would not know the environment, and have little to do without images.
        args = dataclasses.replace(args, steps=steps, async_envs=False)
    return args


def recipe_of(args: Args) -> Recipe:
    """How the dataset is made, if it is one of SAC's."""
    return RECIPES[LEVELS[args.level]] if args.env_id == WALKER else SAC_TASKS[args.env_id]


def returns_of(columns: Columns, rewards: str) -> tuple[float, float]:
    """Mean and maximum of the sums of a column of rewards over whole episodes; NaN without any."""
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"])
    if len(ends) == 0:
        return math.nan, math.nan
    sums_so_far = np.cumsum(columns[rewards], dtype=np.float64)
    returns = np.diff(sums_so_far[ends], prepend=0.0)
    return float(returns.mean()), float(returns.max())


def sha256_of(policy: nn.Module) -> str:
    """sha256 of a policy's weights, hexadecimal."""
    digest = hashlib.sha256()
    for weight in policy.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()


# ===== 5. The images of walker-walk ===============================================================
def register_walker() -> None:
    """Make walker-walk, seen from states, an environment that gymnasium knows."""
    from combo_pixels import WalkerWalk  # which only this task needs

    if WALKER not in gymnasium.registry:
        limit = WalkerWalk.EPISODE_STEPS
        gymnasium.register(
            WALKER, WalkerWalk, max_episode_steps=limit, kwargs={"from_states": True}
        )


def check_rendering() -> None:
    """Render an image now, not after hours of SAC. Raises SystemExit where that does not work."""
    from combo_pixels import WalkerWalk

    camera = WalkerWalk()
    camera.reset(seed=0)
    camera.close()


def spread_episodes(columns: Columns, count: int) -> Columns:
    """The rows of `count` whole episodes, evenly spaced in time; of all if there are fewer."""
    whole = len(columns["rewards"]) // WALKER_STEPS
    if whole == 0:
        sys.exit(f"SAC was stopped within its first {WALKER_STEPS} steps: raise --medium-return")
    chosen = np.linspace(0, whole - 1, min(count, whole)).round().astype(int)
    rows = WALKER_STEPS * chosen[:, None] + np.arange(WALKER_STEPS)  # [chosen, 500]
    return {name: column[rows.ravel()] for name, column in columns.items()}


def write_episodes(path: Path, columns: Columns, attributes: dict) -> None:
    """Render the episodes and write each to a file in the folder `path`, in V-D4RL's format.

    They are collected in a folder beside it, which gets the name when the last is there. An episode
    that a stopped run wrote stays. Beside the episodes stand note.txt, which the learning script
    prints, and collection.json with the attributes.
    """
    from combo_pixels import WalkerWalk

    camera = WalkerWalk()
    part = part_of(path)
    with mopo.writing(part):
        part.mkdir(exist_ok=True)
        for left in part.glob("*.part"):  # of a run that was killed while it wrote
            left.unlink()
    count = len(columns["rewards"]) // WALKER_STEPS
    bar = mopo.Bar("episodes rendered", count)
    for number in range(count):
        # V-D4RL's readers take the rows of an episode from the end of its name.
        file = part / f"episode-{number:05d}-{WALKER_STEPS + 1}.npz"
        if not file.exists():
            rows = slice(WALKER_STEPS * number, WALKER_STEPS * (number + 1))
            episode = {name: column[rows] for name, column in columns.items()}
            content = io.BytesIO()
            np.savez_compressed(content, **with_images(episode, camera))
            mopo.save(content.getvalue(), file)
        bar.move_to(number + 1, "")
    bar.close()
    camera.close()
    mopo.save(attributes["note"].encode(), part / "note.txt")
    mopo.save(attributes, part / "collection.json")
    with mopo.writing(path):
        if path.exists():
            shutil.rmtree(path)
        part.rename(path)


def with_images(episode: Columns, camera: gymnasium.Env) -> Columns:
    """The rows [500] of an episode -> Dreamer's layout [501], which V-D4RL has.

    Row t has the image after action t, that action, and its reward. Row 0 has the first image, and
    zeros. No row is terminal, as an episode ends by its time limit; so the discount is 1.
    """
    rows = WALKER_STEPS + 1
    positions = np.concatenate([episode["infos/qpos"][:1], episode["infos/next_qpos"]])
    images = np.zeros((rows, camera.IMAGE_SIZE, camera.IMAGE_SIZE, 3), np.uint8)
    for row, position in enumerate(positions):
        camera.show(position)
        images[row] = camera.image(camera.IMAGE_SIZE)
    step = np.arange(rows)
    return {
        "image": images,
        "action": np.pad(episode["actions"], ((1, 0), (0, 0))),
        "reward": np.pad(episode["rewards"], (1, 0)),
        "discount": np.ones(rows, np.float32),
        "is_first": step == 0,
        "is_last": step == WALKER_STEPS,
        "is_terminal": np.zeros(rows, np.bool_),
    }


# ===== 6. From the command line to the file =======================================================
def collect(args: Args) -> Path:
    """Collect a dataset and write it. -> its path"""
    check_args(args)
    path = output_path(args)
    partial = path.with_name(path.name + ".partial.pt")
    check_files(args, path, partial)
    if args.env_id == WALKER:
        check_rendering()
    started = time.monotonic()
    first = "" if args.env_id in MAZE2D_TASKS else ", after SAC has learned, which takes hours"
    size = f"--steps {args.steps}"
    if args.env_id == WALKER:
        size = f"--level {args.level}, --episodes {args.episodes}"
    print(f"collecting {args.env_id}, {size}{first}, to {path}", flush=True)
    if args.env_id in MAZE2D_TASKS:
        columns = collect_maze2d(args)
        attributes = maze2d_attributes(args, columns)
    else:
        collection = SACCollection(args, partial)
        if args.resume:
            collection.load()
        else:
            partial.unlink(missing_ok=True)
            if args.env_id == WALKER:
                shutil.rmtree(part_of(path), ignore_errors=True)
        collection.run()
        columns = collection.columns()
        attributes = collection.attributes(columns)
    if args.env_id == WALKER:
        collection.save()  # all rows: --resume goes on with the images
        write_episodes(path, columns, attributes)
    else:
        write_hdf5(path, columns, attributes)
    partial.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    print(f"{path}: {attributes['note']} It took {seconds:.0f} s.")
    return path


def main() -> None:
    """The command line. A mistake ends in one sentence on stderr and a non-zero exit status."""
    what_and_examples = "\n\n".join(__doc__.split("\n\n")[:2])
    args = tyro.cli(Args, description=what_and_examples)
    try:
        collect(args)
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on from the last save, if there is one")
    except MemoryError:
        sys.exit("these are more rows than fit into memory")


def check_args(args: Args) -> None:
    """Stop on settings that make no sense or contradict each other. Raises SystemExit."""
    known = [*MAZE2D_TASKS, *SAC_TASKS, WALKER]
    if args.env_id not in known:
        nearest = difflib.get_close_matches(args.env_id, known, n=3, cutoff=0.0)
        sys.exit(f"no recipe for --env-id {args.env_id}; the nearest: {', '.join(nearest)}")
    mopo.check_ranges(args)
    if args.env_id in MAZE2D_TASKS and args.resume:
        sys.exit("maze2d takes a minute and saves nothing that --resume could start from")
    if args.env_id == WALKER and args.episodes % len(recipe_of(args).parts) != 0:
        sys.exit(f"--episodes is {args.episodes}, but both policies make half of them")
    has_policies = args.env_id not in MAZE2D_TASKS and recipe_of(args).policies
    if has_policies and args.sac_steps <= args.random_steps:
        sys.exit(f"--sac-steps must exceed --random-steps {args.random_steps}")


# ===== Appendix: may be skipped ===================================================================
def settings_of(args: Args, names: list[str]) -> dict:
    """Some of the settings, and the versions of the packages that turn them into rows."""
    settings = {"env_id": args.env_id, "seed": args.seed}
    for name in names:
        settings[name] = getattr(args, name)
    packages = ["gymnasium", "gymnasium-robotics", "mujoco", "numpy", "torch"]
    if args.env_id == WALKER:
        packages.append("dm_control")
    for package in packages:
        settings[package] = importlib.metadata.version(package)
    return settings


def note(args: Args, facts: list[str]) -> str:
    """What the file is and is not, and the facts of it."""
    origin = "A re-collection by D4RL's recipe with collect.py, not the file that D4RL hosts."
    if args.env_id in GENERALISATION:
        origin = "Made with collect.py as MOPO's paper says; its own file was never published."
    if args.env_id == WALKER:
        origin = "A re-collection with collect.py, neither V-D4RL's data nor COMBO's."
    return f"{origin} Seed {args.seed}; {'; '.join(facts)}."


def output_path(args: Args) -> Path:
    """--output, else D4RL's own name in D4RL's folder. For walker-walk it is a folder."""
    if args.output is not None:
        return mopo.expanded(args.output)
    url = mopo.d4rl_tables()["DATASET_URLS"].get(args.env_id, f"{args.env_id}.hdf5")
    folder = mopo.expanded(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
    if args.env_id == WALKER:
        return folder / "vd4rl" / "main" / "walker_walk" / args.level / "64px"
    return folder / url.rsplit("/", 1)[-1]


def check_files(args: Args, path: Path, partial: Path) -> None:
    """Refuse now what would fail, or destroy something, after the collection."""
    probe = part_of(partial)
    try:
        if args.env_id == WALKER:
            check_old_episodes(path)
            check_old_episodes(part_of(path))
        elif path.is_dir():
            sys.exit(f"{path} is a folder: --output takes the name of a file")
        if path.exists() and not args.overwrite:
            sys.exit(f"{path} exists: add --overwrite to replace it")
        if args.resume and not partial.exists():
            sys.exit(f"nothing to resume: there is no {partial}")
        if partial.exists() and not (args.resume or args.overwrite):
            sys.exit(f"{partial} is a stopped run: --resume continues it, --overwrite starts again")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        sys.exit(f"cannot write {path} ({error})")


def check_old_episodes(path: Path) -> None:
    """Refuse a folder that holds more than a collection, which replaces it. Raises SystemExit."""
    if path.exists() and not path.is_dir():
        sys.exit(f"{path} is a file: --output takes the name of a folder for {WALKER}")
    if path.is_dir():
        for file in path.iterdir():
            is_ours = file.suffix in (".npz", ".part")
            if not is_ours and file.name not in ("note.txt", "collection.json"):
                sys.exit(f"{path} has {file.name}, which is no episode: take another --output")


def part_of(path: Path) -> Path:
    """Where a file is built before it gets its name. No learning script takes it for data."""
    return path.with_name(path.name + ".part")


def write_hdf5(path: Path, columns: Columns, attributes: dict) -> None:
    """Write the file. Whatever happens, `path` is the old file or the new one, never a part of it.

    The file is built in memory, because HDF5 crashes where the disk is full.
    """
    part = part_of(path)
    try:
        content = hdf5_of(columns, attributes)
        with open(part, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # else the new name might be on the disk before the content
        os.replace(part, path)
    except OSError as error:
        sys.exit(f"cannot write {path} ({error}); what was there is unharmed")
    finally:
        part.unlink(missing_ok=True)  # after a failure or Ctrl-C


def hdf5_of(columns: Columns, attributes: dict) -> io.BytesIO:
    """The content of an HDF5 file in D4RL's layout, gzip after a byte shuffle."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs.update(attributes)
        for name, column in columns.items():
            # One coordinate per chunk: neighbours in time are alike, x and y are not.
            chunks = (min(len(column), 100_000), 1)[: column.ndim]
            file.create_dataset(
                name,
                data=column,
                chunks=chunks,
                compression="gzip",
                compression_opts=4,
                shuffle=True,
            )
    return content


if __name__ == "__main__":
    main()
