# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "d4rl==1.1", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "h5py==3.16.0", "mujoco==4.0.0",
#   "numpy==2.4.6", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Make the datasets again that no server hosts (any more), each by its published recipe.

    python collect.py --env-id maze2d-umaze-v1       # one million rows, about a minute on one core
    python collect.py --env-id hopper-medium-v2      # also halfcheetah, walker2d; -random,
                                                     # -medium-replay, -medium-expert, -expert
    python collect.py --env-id halfcheetah-jump-v0   # MOPO's and COMBO's; also ant-angle-v0

The file goes to ~/.d4rl/datasets (or $D4RL_DATASET_DIR) under the name that D4RL's download would
have, so the learning scripts find it. It is a re-collection, not the hosted file: its attribute
`recollected` says so, and scores learned from it are to be reported as such.

maze2d: a ball is steered to one random goal after another and is never reset.
  1 draw a goal cell and plan a shortest path of cells to it
  2 push the ball from waypoint to waypoint with a PD controller; add N(0, 0.5) to the action, clip
  3 when the goal is reached, or after the task's step limit, set `timeouts` on that row and go to 1
  4 at the end, write the rewards toward the one evaluation goal, wherever the ball was steered to
Source: D4RL's generate_maze2d_datasets.py --noisy and relabel_maze2d_rewards.py. That D4RL used
--noisy is our inference: with it trajectories are as long as in the hosted umaze file (79.9 against
80.3 rows), without it they are not (73.0).

hopper, halfcheetah, walker2d: SAC, one gradient step per step of the environment.
  random         rows of uniform actions
  medium         rows of SAC's policy, stopped about halfway to an expert's return, sampled
  medium-replay  all rows that SAC saw until that stop
  expert         rows of SAC's policy after --sac-steps, sampled
  medium-expert  the rows of medium, then those of expert
Source: D4RL's paper (which says about a third). Its stop rule is not published: ours is the first
mean of 10 sampled episodes, taken every 5000 steps, that reaches 1500, 4700 or 2700, which are 47,
41 and 59 on D4RL's scale from 0 to 100. SAC's settings are those of MOPO's code, except the target
entropy and the flags marked (ours).

halfcheetah-jump, ant-angle: all rows that SAC saw in --sac-steps of another task (run no faster
than 3 m/s; run along x), with the rewards of the task that is to be learned from them.
Source: MOPO's paper; nobody published these files.
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
import pickle
import runpy
import signal
import sys
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from torch import Tensor, nn
from torch.nn import Module as Learners  # the shared functions' name for what they train
from tqdm import tqdm

# ======================================================================================
# 1. Arguments
# ======================================================================================


@dataclass
class Args:
    env_id: str = "maze2d-umaze-v1"
    """maze2d-[eval-]{umaze,medium,large}-[dense-]v1, halfcheetah-jump-v0, ant-angle-v0, or
    {hopper,halfcheetah,walker2d}-{random,medium,medium-replay,medium-expert,expert}-v2"""
    steps: int = 1_000_000
    """the rows of the dataset, in medium-expert of each half; D4RL's maze2d-umaze-v1 and locomotion
    files have a million, too. Where the rows are those that SAC saw, it has no effect"""
    seed: int = 0
    """the same seed gives the same file, byte for byte, with the same library versions (and, where
    SAC is trained, on the same kind of processor)"""
    output: str | None = None
    """the file to write (default: D4RL's own name in $D4RL_DATASET_DIR or ~/.d4rl/datasets)"""
    overwrite: bool = False
    """replace an existing file, and forget a stopped collection of it"""
    resume: bool = False
    """continue a stopped collection; the file comes out as if it had never stopped"""
    save_every: int | None = None
    """rows between two saves of the state that --resume starts from; SAC saves between episodes
    (default: 100,000; while SAC learns 10,000, two minutes)"""
    gzip: int = 4
    """compression level from 0 to 9: more is smaller and slower"""
    infos: bool = True
    """also write infos/qpos and infos/qvel (maze2d: and infos/goal), as D4RL does; half the file"""

    # maze2d
    action_noise: float = 0.5
    """standard deviation of the noise on the controller's action (D4RL: 0.5)"""
    keep_quirks: bool = False
    """repeat the observation of the row before a goal switch in the row after it, as D4RL's script
    does by an oversight: the first transition of a trajectory then spans two physical steps"""

    # SAC
    sac_steps: int = 1_000_000
    """steps of SAC; medium and medium-replay end before, at the medium return"""
    medium_return: float | None = None
    """return that ends medium (ours; default: hopper 1500, halfcheetah 4700, walker2d 2700)"""
    eval_every: int = 5_000
    """steps between two evaluations (ours)"""
    eval_episodes: int = 10
    """episodes per evaluation, with sampled actions (ours)"""
    random_steps: int = 5_000
    """first steps, with uniform actions and no training (ours)"""
    batch_size: int = 256
    """rows per gradient step (MOPO's code)"""
    hidden: tuple[int, ...] = (256, 256)
    """hidden layers of policy and critics (MOPO's code)"""
    gamma: float = 0.99
    """discount (MOPO's code)"""
    tau: float = 0.005
    """Polyak rate of the target critics (MOPO's code)"""
    critic_lr: float = 3e-4
    """Adam of the critics (MOPO's code)"""
    actor_lr: float = 3e-4
    """Adam of the policy (MOPO's code)"""
    alpha_lr: float = 3e-4
    """Adam of the temperature alpha, which starts at 1 (MOPO's code)"""
    target_entropy: float | None = None
    """entropy that alpha steers to (ours; default: minus the number of action entries)"""

    # speed of SAC
    cuda: bool = True
    """train on the GPU where there is one"""
    cuda_graphs: bool = True
    """record the gradient step as a CUDA graph (no effect on a CPU)"""
    cpu_fast_matmul: bool = True
    """let oneDNN compute fp32 products where a self-check finds fp32 accuracy (CPU only)"""
    threads: int = 1
    """CPU threads of torch; 0 leaves torch's default"""


class UserError(Exception):
    """A mistake the user can mend: main prints it as one sentence and exits with code 2."""


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


def parse_args():
    """The flags, checked before any row is collected. Raises UserError on what cannot work."""
    args = tyro.cli(Args, description=__doc__)
    known = [*MAZE2D_TASKS, *SAC_TASKS]
    if args.env_id not in known:
        near = difflib.get_close_matches(args.env_id, known, n=3, cutoff=0.0)
        raise UserError(f"no recipe for --env-id {args.env_id}; the nearest: {', '.join(near)}")
    fewest = 10 * MAZE2D_TASKS[args.env_id].limit if args.env_id in MAZE2D_TASKS else 1
    if args.steps < fewest:
        raise UserError(f"--steps {args.steps} is too few rows: at least {fewest}")
    if not 0 <= args.seed < 2**63 or not 0 <= args.gzip <= 9:
        raise UserError("--seed must be from 0 to 2**63 - 1 and --gzip from 0 to 9")
    may_be_zero = {"gzip", "action_noise", "random_steps", "gamma", "threads"}
    any_sign = ("seed", "medium_return", "target_entropy")
    check_numbers(args, may_be_zero, {"gamma", "tau"}, any_sign)
    if args.env_id in SAC_TASKS and args.sac_steps <= args.random_steps:
        raise UserError(f"--sac-steps must exceed --random-steps {args.random_steps}")
    return args


# ======================================================================================
# 2. Maze2d: the environment (the same text in every script)
# ======================================================================================

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


# ======================================================================================
# 3. Maze2d: planner, controller, collection
# ======================================================================================


@dataclass
class Maze2dTask:
    maze: str  # a key of MAZES
    reward_type: str
    limit: int  # steps after which a goal is given up
    filename: str  # D4RL's


# {"maze2d-umaze-v1": ("umaze", "sparse", 300, "maze2d-umaze-sparse-v1.hdf5"), ...}: 12 tasks
MAZE2D_TASKS = {
    f"maze2d-{layout}{maze}{suffix}-v1": Maze2dTask(
        layout + maze, reward_type, limit, f"maze2d-{layout}{maze}-{reward_type}-v1.hdf5"
    )
    for layout in ("", "eval-")
    for maze, limit in (("umaze", 300), ("medium", 600), ("large", 800))
    for suffix, reward_type in (("", "sparse"), ("-dense", "dense"))
}


def plan(maze, goal_cell):
    """For every cell the next cell of a shortest path to `goal_cell` (the goal itself at the goal).

    D4RL runs q-iteration on the grid; counting moves outward from the goal gives the same paths, as
    moves are tried in D4RL's order, which decides between equally long ones. Walls beside a cell
    have ways out and none in: the ball's centre reaches i - 0.6, which rounds to a wall's cell.
    """
    rows, moves = MAZES[maze].split("/"), ((0, -1), (0, 1), (-1, 0), (1, 0))
    inside = {(i, j) for i, row in enumerate(rows) for j in range(len(row))}
    open_cells = set(maze_cells(maze, "OG"))
    distance, queue = {goal_cell: 0}, deque([goal_cell])
    while queue:
        i, j = cell = queue.popleft()
        for neighbour in [(i + di, j + dj) for di, dj in moves]:
            if neighbour in inside and neighbour not in distance:
                distance[neighbour] = distance[cell] + 1
                if neighbour in open_cells:
                    queue.append(neighbour)
    next_cell = {goal_cell: goal_cell}
    for i, j in distance.keys() - {goal_cell}:
        ways = [(i + di, j + dj) for di, dj in moves if (i + di, j + dj) in open_cells]
        next_cell[i, j] = min(ways, key=distance.get)  # min keeps the first of equals
    return next_cell


def nearest_cell(position):
    return round(float(position[0])), round(float(position[1]))


class WaypointController:
    """D4RL's controller: action 10 * (waypoint - position) - velocity, along the cells of the path.

    It steers to the goal's *cell*, not to the goal: a new goal in the old cell counts as reached at
    once and gives a trajectory of one row (one in seven on umaze), as in D4RL's files.
    """

    def __init__(self, maze, rng):
        self.maze, self.rng = maze, rng
        self.plans = {}  # goal cell -> plan(), made when first needed: under a millisecond each
        self.cell = None  # the goal's cell
        self.waypoints = []  # [(x, y), ...]
        self.index = 0  # of the waypoint under way
        self.previous = (0.0, 0.0)  # the last position

    def set_goal(self, position, cell):
        """Plan from `position` to `cell`; all waypoints but the last move by U(0, 0.2) inward."""
        if cell not in self.plans:
            self.plans[cell] = plan(self.maze, cell)
        start, ways = nearest_cell(position), self.plans[cell]
        # In a corner of the maze the ball can be nearest to a wall without a way out.
        at = start if start in ways else min(ways, key=lambda c: math.dist(c, position))
        self.waypoints = []
        while not self.waypoints or at != cell:
            at = ways[at]
            shift = (0.0, 0.0) if at == cell else self.rng.uniform(0.0, 0.2, 2).tolist()
            self.waypoints.append((at[0] - shift[0], at[1] - shift[1]))
        self.cell, self.index, self.previous = cell, 0, start

    def act(self, position, velocity, goal):
        """Position, velocity and goal, [2] each -> action [2], and whether the goal is reached."""
        if nearest_cell(goal) != self.cell:
            self.set_goal(position, nearest_cell(goal))
        # `slow` is D4RL's velocity threshold, on the way since the last step. The ball cannot go
        # 0.1 in a step, so it only acts on the first step to a goal, where `previous` is the cell.
        slow = math.dist(position, self.previous) < 0.1
        solved = slow and math.dist(position, self.cell) < 0.1
        aim = self.cell if solved else self.waypoints[self.index]
        action = np.clip(10.0 * (aim - position) - velocity, -1.0, 1.0)
        if slow and not solved and math.dist(position, aim) < 0.1:
            self.index += 1
        self.previous = position
        return action, solved


class Maze2dCollection:
    """All that the next row depends on, so that it can be saved and continued bit for bit."""

    partial = ".partial.npz"  # ending of the file that --resume reads
    save_every = 100_000

    def __init__(self, args):
        self.args, self.task = args, MAZE2D_TASKS[args.env_id]
        self.env = Maze2dEnv(self.task.maze, self.task.reward_type)
        self.rng = np.random.default_rng(args.seed)
        self.controller = WaypointController(self.task.maze, self.rng)
        self.env.np_random = self.rng  # one generator: two of one seed would draw equal numbers
        self.obs = self.env.reset()[0]
        self.goal = self.new_goal()
        self.age = 0  # steps toward the present goal
        self.count = 0  # rows so far
        self.rows = {
            "observations": np.zeros((args.steps, 4), np.float32),
            "actions": np.zeros((args.steps, 2), np.float32),
            "timeouts": np.zeros(args.steps, np.bool_),
        }
        if args.infos:
            for name in ("infos/goal", "infos/qpos", "infos/qvel"):
                self.rows[name] = np.zeros((args.steps, 2), np.float32)

    def total(self):
        return self.args.steps

    def may_save(self):
        return True

    def new_goal(self):
        cell = self.env.start_cells[self.rng.integers(len(self.env.start_cells))]
        return cell + self.rng.uniform(-0.1, 0.1, 2)

    def add_row(self):
        """One action, one row, one physics step."""
        action, solved = self.controller.act(self.obs[:2], self.obs[2:], self.goal)
        action = action + self.args.action_noise * self.rng.standard_normal(2)
        action = np.clip(action, -1.0, 1.0)
        switch = solved or self.age >= self.task.limit
        t, rows, physics = self.count, self.rows, self.env.data
        rows["observations"][t], rows["actions"][t], rows["timeouts"][t] = self.obs, action, switch
        if self.args.infos:
            rows["infos/goal"][t] = self.goal
            rows["infos/qpos"][t], rows["infos/qvel"][t] = physics.qpos, physics.qvel
        next_obs = self.env.step(action)[0]
        self.count, self.age = t + 1, self.age + 1
        if switch:
            self.goal, self.age = self.new_goal(), 0
        if not (switch and self.args.keep_quirks):
            self.obs = next_obs

    def state(self):
        """Numbers and strings only, for np.savez: no pickle."""
        numbers = {
            "made_by": recipe_of(self.args),
            "rng": self.rng.bit_generator.state,
            "age": self.age,
            "count": self.count,
            "cell": self.controller.cell,
            "index": self.controller.index,
            "waypoints": self.controller.waypoints,
            "previous": [float(x) for x in self.controller.previous],
            "goal": self.goal.tolist(),
            "obs": self.obs.tolist(),
        }
        rows = {name: column[: self.count] for name, column in self.rows.items()}
        return {"numbers": json.dumps(numbers), "physics": self.physics_state(), **rows}

    def physics_state(self):
        """Position, velocity, and the contact solver's warm start, which moves the last bits."""
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.zeros(mujoco.mj_stateSize(self.env.model, kind))
        mujoco.mj_getState(self.env.model, self.env.data, state, kind)
        return state

    def save(self, partial):
        state = self.state()
        write_atomically(partial, lambda file: np.savez(file, **state))

    def load(self, partial):
        with np.load(partial, allow_pickle=False) as state:
            self.restore(state)

    def restore(self, state):
        """The inverse of state()."""
        numbers = json.loads(str(state["numbers"]))
        if numbers["made_by"] != recipe_of(self.args):
            raise UserError(f"--resume needs the stopped run's settings: {numbers['made_by']}")
        self.rng.bit_generator.state = numbers["rng"]
        self.age, self.count = numbers["age"], numbers["count"]
        self.controller.cell, self.controller.index = tuple(numbers["cell"]), numbers["index"]
        self.controller.waypoints = numbers["waypoints"]
        self.controller.previous = numbers["previous"]
        self.goal, self.obs = np.array(numbers["goal"]), np.array(numbers["obs"])
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(self.env.model, self.env.data, state["physics"], kind)
        for name, column in self.rows.items():
            column[: self.count] = state[name]

    def dataset(self):
        """The file's columns. The reward is a function of observations[t], as in D4RL's files."""
        rewards = self.env.reward(self.rows["observations"]).astype(np.float32)
        terminals = np.zeros(len(rewards), np.bool_)  # the task has no terminal states
        return {**self.rows, "rewards": rewards, "terminals": terminals}

    def attributes(self, columns):
        """What the file is, and the quirks of D4RL's own file that it always has."""
        return {
            "recollected": RECOLLECTED,
            "quirk_one_row_trajectories": "kept: a new goal in the old cell is reached at once",
            "quirk_rewards_of_the_present_state": "kept: rewards[t] is of observations[t]",
        }

    def summary(self, columns):
        switches, reward = columns["timeouts"].sum(), columns["rewards"].mean()
        return f"{self.count} rows, {switches} goal switches, mean reward {reward:.4f}"


# ======================================================================================
# 4. Environments and episodes (the same text in every script that has them)
# ======================================================================================

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


@functools.lru_cache
def d4rl_tables() -> dict[str, dict]:
    """DATASET_URLS, REF_MIN_SCORE, REF_MAX_SCORE of the installed d4rl. UserError without d4rl."""
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        raise UserError("d4rl's tables are missing: pip install --no-deps d4rl==1.1")
    # Why: `import d4rl` needs gym and mujoco_py (MuJoCo 2.1). Its tables are one plain file.
    return runpy.run_path(os.path.join(spec.submodule_search_locations[0], "infos.py"))


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


# ======================================================================================
# 5. SAC (the same text in every script, but SAC, Policy and learn)
# ======================================================================================
# Shapes: L = 1 learner, B rows of a batch, S observation, A action, C columns of a row (see Batch).


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


class Batch(NamedTuple):
    """Rows [L, B, ...]; terminated is 0 or 1 and is the only thing that stops bootstrapping."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


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


class SAC(nn.Module):
    """Replay buffer, networks and optimizers of one learner."""

    def __init__(
        self, args: Args, obs_dim: int, action_dim: int, capacity: int, device: torch.device
    ):
        super().__init__()
        self.device = device
        self.columns = [obs_dim, action_dim, 1, obs_dim, 1]  # of a row: the fields of Batch
        rows = torch.zeros(1, capacity, sum(self.columns))
        self.register_buffer("buffer", rows, persistent=False)  # [L, capacity, C]
        filled = torch.zeros((), dtype=torch.long)
        self.register_buffer("buffer_rows", filled, persistent=False)
        seed_phase(args.seed, "networks")
        self.actor = GaussianPolicy(1, obs_dim, action_dim, args)
        self.critic = DoubleCritic(1, obs_dim, action_dim, args)
        self.critic_target = copy.deepcopy(self.critic)
        self.temperature = nn.ParameterList([torch.zeros(1)])  # log alpha, [L]
        self.to(device)
        self.optimizers = {
            "actor": adam(self.actor.parameters(), args.actor_lr),
            "critic": adam(self.critic.parameters(), args.critic_lr),
            "temperature": adam(self.temperature.parameters(), args.alpha_lr),
        }

    def remember(self, rows: dict[str, np.ndarray], first: int, end: int) -> None:
        """Copy dataset rows from `first` to before `end` to the same place of the buffer."""
        reward = rows.get("infos/behaviour_rewards", rows["rewards"])
        parts = rows["observations"], rows["actions"], reward, rows["next_observations"]
        parts = [
            part[first:end].reshape(end - first, width)
            for part, width in zip((*parts, rows["terminals"]), self.columns, strict=True)
        ]
        self.buffer[0, first:end] = torch.from_numpy(np.concatenate(parts, 1, dtype=np.float32))
        self.buffer_rows.fill_(end)

    def sample(self, count: int) -> Batch:
        """Uniform rows of the buffer, with replacement."""
        place = (torch.rand(count, device=self.device) * self.buffer_rows).long()
        rows = self.buffer[:, place.minimum(self.buffer_rows - 1)]  # rand may round up to 1
        obs, action, reward, next_obs, terminated = rows.split(self.columns, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))


class Policy(nn.Module):
    """Sampled actions of an actor. Their noise is the CPU's, wherever the actor is."""

    def __init__(self, actor: GaussianPolicy):
        super().__init__()
        self.actor = actor

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs [n, S] -> actions [n, A] in [-1, 1]"""
        device = next(self.parameters()).device
        mean, log_std = (x[0].cpu() for x in self.actor(torch.from_numpy(obs)[None].to(device)))
        return torch.tanh(mean + log_std.exp() * torch.randn(mean.shape)).numpy()


def phase_seed(seed: int, name: str, k: int = 0) -> int:
    """A seed for each network and phase, so that phases do not disturb one another."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name} {k}".encode()).digest()[:4], "little")


def seed_phase(seed: int, name: str, k: int = 0) -> None:
    """Reseed torch, CPU and CUDA, from (seed, name, k)."""
    torch.manual_seed(phase_seed(seed, name, k))


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


@torch.no_grad()
def polyak(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """slow += rate * (fast - slow), in place."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)


def learn(agent: SAC, args: Args) -> dict[str, Tensor]:
    """One gradient step of critics, policy and temperature. -> logs [L]"""
    batch = agent.sample(args.batch_size)
    with torch.no_grad():
        next_action, log_prob = agent.actor.sample(batch.next_obs)
        q_next = agent.critic_target(batch.next_obs, next_action)
        entropy = -agent.temperature[0].exp().unsqueeze(-1) * log_prob
        target = soft_target(batch.reward, batch.terminated, q_next, entropy, args.gamma)
    loss = squared_td_error(agent.critic(batch.obs, batch.action), target)
    descend(agent, "critic", loss)
    logs = update_policy(agent, batch, args)
    polyak(agent.critic_target, agent.critic, args.tau)
    return logs | {"losses/critic_loss": loss.detach()}


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


# ======================================================================================
# 6. Datasets of SAC: recording, stop rule, collection
# ======================================================================================


@dataclass
class SACTask:
    until: str | None  # what ends SAC: the "medium" return, the "end" of --sac-steps; None: no SAC
    policies: tuple[str, ...]  # whose rows the dataset has, in turn; none: the rows that SAC saw

    def has_medium(self):
        """Whether a policy is kept where SAC first reaches the medium return."""
        return "medium" in (self.until, *self.policies)

    def last_policy(self):
        """The name of the policy that SAC ends with."""
        if self.policies:
            return self.policies[-1]
        return "medium" if self.until == "medium" else "behaviour"


MEDIUM_RETURNS = {"hopper": 1500.0, "halfcheetah": 4700.0, "walker2d": 2700.0}
SAC_KINDS = {
    "random": SACTask(None, ("random",)),
    "medium": SACTask("medium", ("medium",)),
    "medium-replay": SACTask("medium", ()),
    "medium-expert": SACTask("end", ("medium", "expert")),
    "expert": SACTask("end", ("expert",)),
}
# Mean and maximum return of an episode of MOPO's data, under the task to be learned (MOPO's paper).
OOD_STATISTICS = {"halfcheetah-jump-v0": (-1022.6, 1808.6), "ant-angle-v0": (866.7, 2311.9)}
SAC_TASKS = {
    **{f"{family}-{kind}-v2": SAC_KINDS[kind] for family in MEDIUM_RETURNS for kind in SAC_KINDS},
    **{env_id: SACTask("end", ()) for env_id in OOD_STATISTICS},
}


def medium_return(args):
    """The return that ends medium."""
    own = MEDIUM_RETURNS[args.env_id.split("-")[0]]
    return own if args.medium_return is None else args.medium_return


class Recording:
    """The rows of one policy. Every episode starts from a seed of its own."""

    def __init__(self, env, name, capacity, args):
        self.env, self.name, self.seed = env, name, args.seed
        self.count = self.episodes = 0  # rows, whole episodes
        self.obs = None  # of the episode under way; None: the next row starts one
        shape, simulator = env.observation_space.shape, getattr(env.unwrapped, "data", None)
        shapes = {"observations": shape, "actions": env.action_space.shape, "rewards": ()}
        shapes["next_observations"] = shape
        if args.infos and simulator is not None:
            shapes |= {"infos/qpos": simulator.qpos.shape, "infos/qvel": simulator.qvel.shape}
        if args.env_id in OOD_STATISTICS:
            shapes["infos/behaviour_rewards"] = ()
        self.rows = {name: np.zeros((capacity, *s), np.float32) for name, s in shapes.items()}
        self.rows |= {name: np.zeros(capacity, np.bool_) for name in ("terminals", "timeouts")}

    def add_row(self, act):
        """One row, one step. act: observation [S] -> action [A] in [-1, 1], both float32."""
        if self.obs is None:
            seed = phase_seed(self.seed, f"{self.name} episode", self.episodes)
            self.obs = self.env.reset(seed=seed)[0].astype(np.float32)
        t, action = self.count, act(self.obs)
        row = {"observations": self.obs, "actions": action}
        if "infos/qpos" in self.rows:
            simulator = self.env.unwrapped.data
            row |= {"infos/qpos": simulator.qpos.copy(), "infos/qvel": simulator.qvel.copy()}
        next_obs, reward, terminated, truncated, info = self.env.step(action)
        row |= {"next_observations": next_obs, "rewards": reward, "timeouts": truncated}
        row["terminals"] = terminated and not truncated  # as in D4RL, never both
        if "behaviour_reward" in info:
            row["infos/behaviour_rewards"] = info["behaviour_reward"]
        for name, value in row.items():
            self.rows[name][t] = value
        over = terminated or truncated
        self.obs = None if over else next_obs.astype(np.float32)
        self.count, self.episodes = t + 1, self.episodes + over


class SACCollection:
    """All that the next row depends on; it can be saved between episodes, as those have seeds."""

    partial = ".partial.pt"

    def __init__(self, args):
        if args.threads:
            torch.set_num_threads(args.threads)
        self.matmul = choose_cpu_matmul(args)
        self.task, self.env = SAC_TASKS[args.env_id], make_env(args.env_id)
        (obs_dim,), (action_dim,) = self.env.observation_space.shape, self.env.action_space.shape
        entropy = -action_dim if args.target_entropy is None else args.target_entropy
        self.args = args = dataclasses.replace(args, target_entropy=float(entropy))
        device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        sac_steps = args.sac_steps if self.task.until else 0
        self.agent = SAC(args, obs_dim, action_dim, sac_steps, device)
        self.step = capture(functools.partial(learn, self.agent, args), self.agent, args)
        self.parts = {
            name: Recording(self.env, name, args.steps, args) for name in self.task.policies
        }
        self.parts["SAC"] = Recording(self.env, "SAC", sac_steps, args)
        self.policy = Policy(self.agent.actor)  # learns
        self.policies = {}  # name -> Policy, frozen
        self.stops = {}  # name -> [steps of SAC, mean return]
        self.curve = []  # [steps of SAC, mean return] of every evaluation
        seed_phase(args.seed, "collection")

    @property
    def count(self):
        """Rows so far, of SAC and of frozen policies."""
        return sum(part.count for part in self.parts.values())

    def learning(self):
        """Whether SAC is not yet at its end."""
        return self.task.until is not None and self.task.last_policy() not in self.policies

    def total(self):
        """Rows of the whole collection; while SAC runs, at most."""
        sac = self.args.sac_steps if self.learning() else self.parts["SAC"].count
        return sac + len(self.task.policies) * self.args.steps

    @property
    def save_every(self):
        """Rows between two saves: what two minutes take while SAC learns, a minute afterwards."""
        return 10_000 if self.learning() else 100_000

    def active(self):
        """The recording that gets the next row."""
        unfinished = (n for n in self.task.policies if self.parts[n].count < self.args.steps)
        return self.parts["SAC" if self.learning() else next(unfinished, "SAC")]

    def may_save(self):
        return self.active().obs is None

    def act_uniformly(self, obs):
        return 2 * torch.rand(self.env.action_space.shape).numpy() - 1

    def act_by(self, policy):
        return lambda obs: policy.act(obs[None])[0]

    def add_row(self):
        """One row of SAC with its gradient step, or of a frozen policy."""
        part = self.active()
        if part.name == "SAC":
            self.learn_row(part)
        elif part.name == "random":
            part.add_row(self.act_uniformly)
        else:
            part.add_row(self.act_by(self.policies[part.name]))

    def learn_row(self, replay):
        """One row of SAC, its gradient step, and at times a look at the return."""
        args = self.args
        explores = replay.count < args.random_steps
        replay.add_row(self.act_uniformly if explores else self.act_by(self.policy))
        self.agent.remember(replay.rows, replay.count - 1, replay.count)
        if not explores:
            self.step()
        last = replay.count == args.sac_steps
        if last or replay.count % args.eval_every == 0:
            self.evaluate()
            self.stop_if_good_enough(last)

    def evaluate(self):
        """Book and print the mean return over --eval-episodes."""
        self.check_finite()
        step = self.parts["SAC"].count
        mean = float(evaluate(self.policy, self.args, 0, step, self.args.eval_episodes).mean())
        self.curve.append([step, mean])
        tqdm.write(f"{step} steps: return {mean:.1f}")

    def stop_if_good_enough(self, last):
        """Freeze the policies that the last evaluation, of all steps if `last`, completes."""
        mean = self.curve[-1][1]
        if self.task.has_medium() and "medium" not in self.policies:
            goal = medium_return(self.args)
            if mean >= goal:
                self.freeze("medium", mean)
            elif last:
                raise UserError(
                    f"SAC did not reach {goal} in --sac-steps {self.args.sac_steps}, at best "
                    f"{max(m for _, m in self.curve):.1f}: take more steps or another --seed"
                )
        if last and self.learning():
            self.freeze(self.task.last_policy(), mean)

    def check_finite(self):
        """Raises UserError if SAC has diverged: neither a save nor a file must hold that."""
        for name, weight in self.agent.named_parameters():
            if not weight.isfinite().all():
                step = self.parts["SAC"].count
                raise UserError(f"{name} is not finite after {step} steps of SAC: lower its rate")

    def freeze(self, name, mean):
        """Keep the policy as it is now."""
        self.policies[name] = Policy(copy.deepcopy(self.agent.actor))
        self.stops[name] = [self.parts["SAC"].count, mean]

    def save(self, partial):
        """Tensors, numbers and strings only, for torch.load's weights_only."""
        self.check_finite()
        state = {
            "made_by": json.dumps(recipe_of(self.args)),
            "agent": self.agent.state_dict(),
            "optimizers": {k: o.state_dict() for k, o in self.agent.optimizers.items()},
            "policies": {name: policy.state_dict() for name, policy in self.policies.items()},
            "stops": self.stops,
            "curve": self.curve,
            "matmul": self.matmul,
            "threads": torch.get_num_threads(),
            "device": self.agent.device.type,
            "rng": torch.get_rng_state(),
            "parts": {},
        }
        for name, part in self.parts.items():
            rows = {k: torch.from_numpy(v[: part.count]) for k, v in part.rows.items()}
            state["parts"][name] = {"episodes": part.episodes, "rows": rows}
        if self.agent.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.agent.device)
        write_atomically(partial, lambda file: torch.save(state, file))

    def load(self, partial):
        """The inverse of save()."""
        state = torch.load(partial, weights_only=True, map_location="cpu")
        if state["made_by"] != json.dumps(recipe_of(self.args)):
            raise UserError(f"--resume needs the stopped run's settings: {state['made_by']}")
        for name, saved in state["parts"].items():
            part = self.parts[name]
            part.count, part.episodes = len(saved["rows"]["rewards"]), saved["episodes"]
            if part.count > len(part.rows["rewards"]):
                raise UserError(f"--sac-steps must exceed the {part.count} of the stopped run")
            for key, column in part.rows.items():
                column[: part.count] = saved["rows"][key].numpy()
        self.agent.load_state_dict(state["agent"])
        self.agent.remember(self.parts["SAC"].rows, 0, self.parts["SAC"].count)
        for name, optimizer in self.agent.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name])
        for name, weights in state["policies"].items():
            self.policies[name] = Policy(copy.deepcopy(self.agent.actor))
            self.policies[name].load_state_dict(weights)
        self.stops, self.curve, self.matmul = state["stops"], state["curve"], state["matmul"]
        done, device = self.parts["SAC"].count, self.agent.device.type
        if self.learning() and done >= self.args.sac_steps:
            raise UserError(f"--sac-steps must exceed the {done} of the stopped run")
        set_cpu_matmul(self.matmul)  # processor settings decide the last bits of a result
        torch.set_num_threads(state["threads"])
        if state["device"] != device:
            print(f"was collected on {state['device']}, goes on on {device}: not bit for bit")
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.agent.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.agent.device)

    def dataset(self):
        """The file's columns. Only the last row may be that of an episode that is cut unmarked."""
        parts = [self.parts[name] for name in self.task.policies or ("SAC",)]
        for part in parts[:-1]:  # what follows are another policy's rows
            part.rows["timeouts"][part.count - 1] = not part.rows["terminals"][part.count - 1]
        names = parts[0].rows
        return {name: np.concatenate([p.rows[name][: p.count] for p in parts]) for name in names}

    def attributes(self, columns):
        """What the file is, in one sentence for the learning scripts to print, and in numbers."""
        recipe, made_anew = recipe_of(self.args), self.args.env_id in OOD_STATISTICS
        mean, most = statistics(columns, "rewards")
        facts, numbers = [], {"mean_return": mean, "max_return": most}
        for name, (steps, stop_return) in self.stops.items():
            digest = policy_hash(self.policies[name])
            facts.append(
                f"{name} policy of SAC after {steps} steps, whose last {self.args.eval_episodes} "
                f"test episodes returned {stop_return:.1f}, sha256 {digest}"
            )
            numbers |= {f"{name}_policy_steps": steps, f"{name}_policy_return": stop_return}
            numbers[f"{name}_policy_sha256"] = digest
        if self.curve:
            numbers["eval_steps"], numbers["eval_returns"] = map(
                list, zip(*self.curve, strict=True)
            )
        facts += ["uniform actions"] if self.task.until is None else []
        facts.append(f"mean return of the whole episodes {mean:.1f}")
        if made_anew:
            numbers["mean_behaviour_return"] = statistics(columns, "infos/behaviour_rewards")[0]
            facts.append(f"in SAC's own task {numbers['mean_behaviour_return']:.1f}")
        facts += [f"{name} {recipe[name]}" for name in ("gymnasium", "mujoco", "torch", "numpy")]
        origin = MADE_ANEW if made_anew else RECOLLECTED
        numbers["recollected"] = f"{origin} Seed {self.args.seed}; {'; '.join(facts)}."
        return numbers

    def summary(self, columns):
        mean, most = statistics(columns, "rewards")
        whole = (columns["terminals"] | columns["timeouts"]).sum()
        text = f"{len(columns['rewards'])} rows, {whole} whole episodes, "
        text += f"mean return {mean:.1f}, maximum {most:.1f}"
        if self.args.env_id in OOD_STATISTICS:
            paper = OOD_STATISTICS[self.args.env_id]
            text += (
                f"; the papers' data: {paper[0]} and {paper[1]}, "
                f"so ours is {mean - paper[0]:+.1f} and {most - paper[1]:+.1f} away"
            )
        return text


def policy_hash(policy):
    """sha256 of a policy's weights, hex."""
    digest = hashlib.sha256()
    for weight in policy.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def statistics(columns, rewards):
    """Mean and maximum of the whole episodes' sums of column `rewards`; NaN without any."""
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"])
    returns = np.diff(np.cumsum(columns[rewards], dtype=np.float64)[ends], prepend=0.0)
    return (float(returns.mean()), float(returns.max())) if len(ends) else (math.nan, math.nan)


# ======================================================================================
# 7. Files
# ======================================================================================

RECOLLECTED = "A re-collection by D4RL's recipe with collect.py, not the file that D4RL hosts."
MADE_ANEW = "Made with collect.py as MOPO's paper says; its own file was never published."


SAC_FLAGS = (
    "eval_every eval_episodes random_steps batch_size hidden gamma tau critic_lr actor_lr alpha_lr"
).split()


def recipe_of(args):
    """What decides the rows, as one flat dict: kept in the dataset, and compared by --resume."""
    recipe = {"env_id": args.env_id, "steps": args.steps, "seed": args.seed, "infos": args.infos}
    modules = [mujoco, np]
    if args.env_id in MAZE2D_TASKS:
        recipe["action_noise"] = args.action_noise
        quirk = "kept" if args.keep_quirks else "repaired"
        recipe["quirk_row_repeated_after_a_goal_switch"] = quirk
    else:
        modules += [gymnasium, torch]
    if args.env_id in SAC_TASKS and SAC_TASKS[args.env_id].until is not None:
        recipe |= {flag: getattr(args, flag) for flag in SAC_FLAGS}
        if args.target_entropy is not None:
            recipe["target_entropy"] = args.target_entropy
        recipe["hidden"] = list(args.hidden)
        # Where SAC ends at the medium return, more --sac-steps only allow it to get there.
        if SAC_TASKS[args.env_id].until == "end":
            recipe["sac_steps"] = args.sac_steps
        if SAC_TASKS[args.env_id].has_medium():
            recipe["medium_return"] = medium_return(args)
    return recipe | {module.__name__: str(module.__version__) for module in modules}


def output_path(args):
    folder = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    if args.output is not None:
        return Path(args.output).expanduser()
    if args.env_id in MAZE2D_TASKS:
        name = MAZE2D_TASKS[args.env_id].filename
    else:
        url = d4rl_tables()["DATASET_URLS"].get(args.env_id, f"/{args.env_id}.hdf5")
        name = url.rsplit("/", 1)[1]
    return Path(folder).expanduser() / name


def check_files(args, path, partial):
    """Refuse now what would fail, or destroy something, after the collection."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: --output takes the name of a file")
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} exists: add --overwrite to replace it")
    if args.resume and not partial.exists():
        raise UserError(f"nothing to resume: there is no {partial}")
    if partial.exists() and not (args.resume or args.overwrite):
        hint = "--resume continues it, --overwrite starts again"
        raise UserError(f"{partial} is a stopped run: {hint}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(partial.with_suffix(".test"), lambda file: file.write(b"test"))
        partial.with_suffix(".test").unlink()
    except (UserError, OSError) as error:
        raise UserError(f"cannot write to {path.parent} ({error})") from None


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


def write_dataset(path, columns, args, attributes):
    """D4RL's HDF5 layout, gzip after a byte shuffle, attributes that say what the file is."""

    def write(file):
        with h5py.File(file, "w") as h5:
            h5.attrs.update(recipe_of(args) | attributes)
            for name, column in columns.items():
                # One coordinate per chunk: neighbours in time are alike, x and y are not.
                chunks = (min(len(column), 100_000), 1)[: column.ndim]
                settings = {"compression": "gzip", "compression_opts": args.gzip, "shuffle": True}
                h5.create_dataset(name, data=column, chunks=chunks, **settings)

    write_atomically(path, write)


@contextlib.contextmanager
def noticing_ctrl_c():
    """Yields a list that Ctrl-C fills; a second Ctrl-C raises KeyboardInterrupt at once."""
    pressed = []

    def notice(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        os.write(2, b"\nCtrl-C: saving at the next safe point (again: stop without saving)\n")

    old_handler = signal.signal(signal.SIGINT, notice)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, old_handler)


def add_rows(collection, partial, save_every):
    """Collect all rows that are missing, saving now and then. -> rows per second

    Raises KeyboardInterrupt after Ctrl-C, with the state saved.
    """
    first, start = collection.count, time.perf_counter()
    saved = first
    with (
        noticing_ctrl_c() as pressed,
        tqdm(initial=first, total=collection.total(), unit=" rows") as bar,
    ):
        while collection.count < collection.total():
            collection.add_row()
            bar.update()
            due = pressed or collection.count - saved >= (save_every or collection.save_every)
            if due and collection.may_save() and collection.count < collection.total():
                collection.save(partial)
                saved = collection.count
                if pressed:
                    raise KeyboardInterrupt
        bar.total = collection.total()
    return (collection.count - first) / (time.perf_counter() - start)


def collect(args):
    """Collect, saving the state now and then, and write the dataset. -> its path

    Raises UserError on what cannot work; what was saved before can be resumed.
    """
    path = output_path(args)
    kind = Maze2dCollection if args.env_id in MAZE2D_TASKS else SACCollection
    partial = path.with_name(path.name + kind.partial)
    check_files(args, path, partial)
    try:
        collection = kind(args)
    except RuntimeError as error:  # torch's way to say that there is not enough memory
        raise UserError(str(error).splitlines()[0]) from None
    if args.resume:
        try:
            collection.load(partial)
        except (
            ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError
        ):  # fmt: skip
            raise UserError(f"{partial} is damaged: --overwrite starts again") from None
    else:
        partial.unlink(missing_ok=True)
    rate = add_rows(collection, partial, args.save_every)
    columns = collection.dataset()
    write_dataset(path, columns, args, collection.attributes(columns))
    partial.unlink(missing_ok=True)
    print(f"{path}: {collection.summary(columns)}")
    print(f"{rate:.0f} rows/s")
    return path


def main():
    """Collect. A mistake of the user is one sentence and exit code 2, Ctrl-C 130."""
    advice = "--resume continues from the last save, if there is one"
    try:
        args = parse_args()
    except UserError as error:
        print(f"collect.py: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        collect(args)
    except KeyboardInterrupt:
        print(f"collect.py: stopped; {advice}", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, MemoryError) as error:
        print(f"collect.py: {error}; {advice}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
