# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "d4rl==1.1", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "h5py==3.16.0",
#   "matplotlib==3.11.2", "mujoco==4.0.0", "numpy==2.4.6", "pillow", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Make the datasets again that no server hosts (any more), each by its published recipe.

    python collect.py --env-id maze2d-umaze-v1       # one million rows, about a minute on one core
    python collect.py --env-id hopper-medium-v2      # also halfcheetah, walker2d; -random,
                                                     # -medium-replay, -medium-expert, -expert
    python collect.py --env-id halfcheetah-jump-v0   # MOPO's and COMBO's; also ant-angle-v0

The file goes to ~/.d4rl/datasets (or $D4RL_DATASET_DIR) under the name that D4RL's download would
have, so the learning scripts find it. It is a re-collection, not the hosted file: its attribute
`note` says so, and scores learned from it are to be reported as such.

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
41 and 59 on D4RL's scale from 0 to 100. SAC is mopo.py's, with the settings of MOPO's code, except
the target entropy and the flags marked (ours).

halfcheetah-jump, ant-angle: all rows that SAC saw in --sac-steps of another task (run no faster
than 3 m/s; run along x), with the rewards of the task that is to be learned from them.
Source: MOPO's paper; nobody published these files.
"""

import copy
import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium
import h5py
import mujoco
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import mopo

# ===== 1. Arguments ===============================================================================


@dataclasses.dataclass
class Args:
    # --- dataset ---
    env_id: str = "maze2d-umaze-v1"  # also maze2d-[eval-]{umaze,medium,large}[-dense]-v1, see above
    seed: int = 0  # the same seed gives the same file (SAC's: on the same kind of processor)
    steps: int = 1_000_000  # rows, of each half in medium-expert; not where the rows are SAC's own
    output: str | None = None  # file; default: D4RL's name in $D4RL_DATASET_DIR or ~/.d4rl/datasets
    overwrite: bool = False  # replace an existing file, and forget a stopped collection of it
    resume: bool = False  # go on with a stopped collection of SAC's, to the same file bit for bit
    save_every: int = 50_000  # rows between two saves of what --resume starts from (SAC)
    # --- maze2d ---
    action_noise: float = 0.5  # standard deviation of the noise on the controller's action (D4RL)
    keep_quirks: bool = False  # repeat an observation at each goal switch, as D4RL's script does
    # --- SAC ---
    sac_steps: int = 1_000_000  # steps of SAC; medium and medium-replay end before, at their return
    medium_return: float | None = None  # ends medium (ours: 1500, 4700 or 2700, see above)
    eval_every: int = 5_000  # steps between two evaluations (ours)
    eval_episodes: int = 10  # episodes per evaluation, with sampled actions (ours)
    random_steps: int = 5_000  # first steps, with uniform actions and no training (ours)
    batch_size: int = 256  # rows per gradient step (MOPO's code)
    hidden: tuple[int, ...] = (256, 256)  # hidden layers of policy and critics (MOPO's code)
    gamma: float = 0.99  # discount (MOPO's code)
    tau: float = 0.005  # Polyak rate of the target critics (MOPO's code)
    critic_lr: float = 3e-4  # Adam of the critics (MOPO's code)
    actor_lr: float = 3e-4  # Adam of the policy (MOPO's code)
    alpha_lr: float = 3e-4  # Adam of the temperature alpha, which starts at 1 (MOPO's code)
    target_entropy: float | None = None  # that alpha steers to (ours: minus the number of actions)
    # --- speed of SAC ---
    async_envs: bool | None = None  # a process per episode; default: on a GPU machine with 8 cores
    cuda: bool = True  # train on the GPU where there is one
    cuda_graphs: bool = True  # record the gradient step as a CUDA graph (no effect on a CPU)
    cpu_fast_matmul: bool = True  # oneDNN for fp32 products, where a self-check finds fp32 accuracy
    threads: int = 1  # CPU threads of torch; 0 leaves torch's default

    num_seeds, tf32 = 1, False  # no flags: what mopo.py's functions ask for beside those above


MEDIUM_RETURNS = {"hopper": 1500.0, "halfcheetah": 4700.0, "walker2d": 2700.0}
# Mean and maximum return of an episode of MOPO's data, under the task to be learned (MOPO's paper).
OOD_STATISTICS = {"halfcheetah-jump-v0": (-1022.6, 1808.6), "ant-angle-v0": (866.7, 2311.9)}


class Recipe(NamedTuple):
    """How SAC's datasets are made."""

    policies: tuple[str, ...]  # kept from SAC, which ends with the last; none: no SAC
    parts: tuple[str, ...]  # whose rows the dataset has, in turn


KINDS = {
    "random": Recipe((), ("random",)),
    "medium": Recipe(("medium",), ("medium",)),
    "medium-replay": Recipe(("medium",), ("SAC",)),
    "medium-expert": Recipe(("medium", "expert"), ("medium", "expert")),
    "expert": Recipe(("expert",), ("expert",)),
}
SAC_TASKS = {f"{robot}-{kind}-v2": KINDS[kind] for robot in MEDIUM_RETURNS for kind in KINDS}
SAC_TASKS |= {task: Recipe(("behaviour",), ("SAC",)) for task in OOD_STATISTICS}
MAZE2D_TASKS = [
    f"maze2d-{prefix}{maze}{suffix}-v1"
    for prefix in ("", "eval-")
    for maze in ("umaze", "medium", "large")
    for suffix in ("", "-dense")
]

# ===== 2. maze2d: planner, controller, rows =======================================================

Cell = tuple[int, int]  # row i and column j of the maze: x and y rounded


def plan(open_cells: set[Cell], goal: Cell) -> dict[Cell, Cell]:
    """For every cell the next cell of a shortest path to `goal` (the goal itself at the goal).

    D4RL runs q-iteration on the grid; counting moves outward from the goal gives the same paths, as
    moves are tried in D4RL's order, which decides between equally long ones. Walls beside a cell
    have ways out and none in: the ball's centre reaches i - 0.6, which rounds to a wall's cell.
    """
    around = lambda i, j: [(i, j - 1), (i, j + 1), (i - 1, j), (i + 1, j)]
    distance, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for neighbour in around(*cell):
            if neighbour not in distance:
                distance[neighbour] = distance[cell] + 1
                if neighbour in open_cells:
                    queue.append(neighbour)
    next_cell = {goal: goal}
    for cell in distance.keys() - {goal}:
        ways = [neighbour for neighbour in around(*cell) if neighbour in open_cells]
        next_cell[cell] = min(ways, key=distance.get)  # the first of equals
    return next_cell


def nearest_cell(position: np.ndarray) -> Cell:
    return round(float(position[0])), round(float(position[1]))


class WaypointController:
    """D4RL's controller: action 10 * (waypoint - position) - velocity, along the cells of the path.

    It steers to the goal's *cell*, not to the goal: a new goal in the old cell counts as reached at
    once and gives a trajectory of one row (one in seven on umaze), as in D4RL's files.
    """

    def __init__(self, open_cells: set[Cell], rng: np.random.Generator):
        self.open_cells, self.rng = open_cells, rng
        self.plans = {}  # goal cell -> plan(), made when first needed: under a millisecond each
        self.cell = None  # the goal's cell
        self.waypoints = []  # [(x, y), ...]
        self.index = 0  # of the waypoint under way
        self.previous = (0.0, 0.0)  # the last position

    def set_goal(self, position: np.ndarray, cell: Cell) -> None:
        """Plan from `position` to `cell`; all waypoints but the last move by U(0, 0.2) inward."""
        if cell not in self.plans:
            self.plans[cell] = plan(self.open_cells, cell)
        start, ways = nearest_cell(position), self.plans[cell]
        # In a corner of the maze the ball can be nearest to a wall without a way out.
        at = start if start in ways else min(ways, key=lambda c: math.dist(c, position))
        self.waypoints = []
        while not self.waypoints or at != cell:
            at = ways[at]
            shift = (0.0, 0.0) if at == cell else self.rng.uniform(0.0, 0.2, 2).tolist()
            self.waypoints.append((at[0] - shift[0], at[1] - shift[1]))
        self.cell, self.index, self.previous = cell, 0, start

    def act(
        self, position: np.ndarray, velocity: np.ndarray, goal: np.ndarray
    ) -> tuple[np.ndarray, bool]:
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


def collect_maze2d(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """Columns and attributes of the file. Takes a minute: --resume has nothing to start from."""
    env, rng = mopo.make_env(args.env_id), np.random.default_rng(args.seed)
    limit, maze, physics = env.get_wrapper_attr("_max_episode_steps"), env.env, env.unwrapped
    model, data, origin = physics.model, physics.data, maze.origin[:2]  # stepped without gymnasium
    controller = WaypointController({tuple(cell) for cell in maze.open.astype(int).tolist()}, rng)
    draw_place = lambda: maze.open[rng.integers(len(maze.open))] + rng.uniform(-0.1, 0.1, 2)
    data.qpos[:], data.qvel[:] = draw_place() - origin, 0.1 * rng.standard_normal(2)
    goal, age = draw_place(), 0  # age: steps toward the present goal
    position, velocity = data.qpos + origin, data.qvel.copy()
    names = ("actions", "infos/goal", "infos/qpos", "infos/qvel")
    rows = {name: np.zeros((args.steps, 2), np.float32) for name in names}
    rows["observations"] = np.zeros((args.steps, 4), np.float32)
    rows["timeouts"] = np.zeros(args.steps, np.bool_)
    for t in tqdm(range(args.steps), unit=" rows"):
        action, solved = controller.act(position, velocity, goal)
        action = np.clip(action + args.action_noise * rng.standard_normal(2), -1.0, 1.0)
        switch = solved or age >= limit
        rows["observations"][t, :2], rows["observations"][t, 2:] = position, velocity
        rows["actions"][t], rows["timeouts"][t], rows["infos/goal"][t] = action, switch, goal
        rows["infos/qpos"][t], rows["infos/qvel"][t] = data.qpos + origin, data.qvel
        data.ctrl[:], data.qvel[:] = action, np.clip(data.qvel, -5.0, 5.0)  # as PointMaze does
        mujoco.mj_step(model, data)
        age += 1
        if switch:
            goal, age = draw_place(), 0
        # D4RL's script does not look at the ball after a goal switch, though it has moved on: the
        # next row repeats the observation, and its transition spans two physical steps.
        if not (switch and args.keep_quirks):
            position, velocity = data.qpos + origin, data.qvel.copy()
    # A function of observations[t], as in D4RL's files; a step of the environment pays for t + 1.
    distance = np.linalg.norm(rows["observations"][:, :2] - maze.goal, axis=-1)
    reward = np.exp(-distance) if "dense" in args.env_id else distance <= 0.5
    rows["rewards"] = reward.astype(np.float32)
    rows["terminals"] = np.zeros(args.steps, np.bool_)  # the task has no terminal states
    return rows, maze2d_attributes(args, rows)


def maze2d_attributes(args: Args, rows: dict[str, np.ndarray]) -> dict:
    """What the file is, and how it stands to the quirks of D4RL's own."""
    switches, mean = int(rows["timeouts"].sum()), float(rows["rewards"].mean())
    attributes = settings_of(args, ("steps", "action_noise"))
    attributes |= dict(goal_switches=switches, mean_reward=mean)
    quirk = "kept" if args.keep_quirks else "repaired"
    attributes["quirk_row_repeated_after_a_goal_switch"] = quirk
    attributes["quirk_one_row_trajectories"] = "kept: a new goal in the old cell is reached at once"
    attributes["quirk_rewards_of_the_present_state"] = "kept: rewards[t] is of observations[t]"
    said = f"{args.steps} rows, {switches} goal switches, mean reward {mean:.4f}"
    return attributes | {"note": note(args, [said])}


# ===== 3. SAC: agent, rows, collection ============================================================
# Shapes: L = 1 learner, S observation, A action, C columns of a row.


class SAC(mopo.MOPO):
    """MOPO without its model: the same networks and `iterate`, on rows of the environment."""

    def __init__(
        self, args: Args, obs_dim: int, action_dim: int, capacity: int, device: torch.device
    ):
        nn.Module.__init__(self)
        self.args, self.device, self.learners = args, device, 1
        self.sizes, self.columns = (obs_dim, action_dim), [obs_dim, action_dim, 1, obs_dim, 1]
        self.actor = self.build("actor", mopo.GaussianPolicy)
        self.critic = self.build("critic", mopo.TwinCritic)
        self.critic_target = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.zeros(1))  # of the temperature
        rows = torch.zeros(1, capacity, sum(self.columns))
        self.register_buffer("buffer", rows, persistent=False)  # [L, capacity, C]
        filled = torch.zeros((), dtype=torch.long)
        self.register_buffer("buffer_rows", filled, persistent=False)
        self.to(device)
        self.optimizers = {
            "critic": self.adam(self.critic.parameters(), args.critic_lr),
            "actor": self.adam(self.actor.parameters(), args.actor_lr),
            "temperature": self.adam([self.log_alpha], args.alpha_lr),
        }

    def remember(self, rows: dict[str, np.ndarray], first: int, end: int) -> None:
        """Copy dataset rows from `first` to before `end` to the same place of the buffer."""
        reward = rows.get("infos/behaviour_rewards", rows["rewards"])
        parts = [rows["observations"], rows["actions"], reward]
        parts += [rows["next_observations"], rows["terminals"]]
        parts = [p[first:end].reshape(-1, width) for p, width in zip(parts, self.columns)]
        self.buffer[0, first:end] = torch.from_numpy(np.concatenate(parts, 1, dtype=np.float32))
        self.buffer_rows.fill_(end)

    def sample(self) -> mopo.Batch:
        """Uniform rows of the buffer, with replacement."""
        count = self.args.batch_size
        place = (torch.rand(count, device=self.device) * self.buffer_rows).long()
        place = place.minimum(self.buffer_rows - 1)  # rand may round up to 1
        return self.split(self.buffer[:, place])

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs [L, n, S] -> actions [L, n, A], sampled: evaluated is what makes the rows."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.actor.sample(obs)[0].cpu().numpy()


class Actor:
    """Sampled actions of a policy, one at a time, as a CUDA graph where there is a GPU."""

    def __init__(self, policy: mopo.GaussianPolicy, obs_dim: int, args: Args):
        self.policy, device = policy, next(policy.parameters()).device
        self.obs = torch.zeros(1, 1, obs_dim, device=device)
        self.step = mopo.capture(self.draw, args)

    @torch.no_grad()
    def draw(self) -> dict[str, Tensor]:
        return {"action": self.policy.sample(self.obs)[0]}

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs [S] -> action [A]"""
        self.obs.copy_(torch.from_numpy(obs))
        return self.step()["action"][0, 0].cpu().numpy()


class Recording:
    """The rows of one policy. Every episode starts from a seed of its own."""

    def __init__(self, env: gymnasium.Env, name: str, capacity: int, seed: int):
        self.env, self.name, self.capacity, self.seed = env, name, capacity, seed
        self.count = self.episodes = 0  # rows, whole episodes
        self.obs = None  # of the episode under way; None: the next row starts one
        shape, physics = env.observation_space.shape, env.unwrapped.data
        shapes = {"observations": shape, "next_observations": shape, "rewards": ()}
        shapes |= {"actions": env.action_space.shape}
        shapes |= {"infos/qpos": physics.qpos.shape, "infos/qvel": physics.qvel.shape}
        if env.spec.id in OOD_STATISTICS:
            shapes["infos/behaviour_rewards"] = ()
        self.rows = {name: np.zeros((capacity, *s), np.float32) for name, s in shapes.items()}
        self.rows |= {name: np.zeros(capacity, np.bool_) for name in ("terminals", "timeouts")}

    def add_row(self, act: Callable[[np.ndarray], np.ndarray]) -> None:
        """One row, one step. act: observation [S] -> action [A] in [-1, 1], both float32."""
        if self.obs is None:
            name = f"{self.seed} {self.name} episode {self.episodes}"
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            self.obs = self.env.reset(seed=seed)[0].astype(np.float32)
        action, physics = act(self.obs), self.env.unwrapped.data
        row = {"observations": self.obs, "actions": action}
        row |= {"infos/qpos": physics.qpos.copy(), "infos/qvel": physics.qvel.copy()}
        next_obs, reward, terminated, truncated, info = self.env.step(action)
        row |= {"next_observations": next_obs, "rewards": reward, "timeouts": truncated}
        row["terminals"] = terminated and not truncated  # as in D4RL, never both
        if "behaviour_reward" in info:
            row["infos/behaviour_rewards"] = info["behaviour_reward"]
        for name, value in row.items():
            self.rows[name][self.count] = value
        over = terminated or truncated
        self.obs = None if over else next_obs.astype(np.float32)
        self.count, self.episodes = self.count + 1, self.episodes + over


class SACCollection:
    """SAC, the policies kept from it, and their rows: all that the next row depends on."""

    def __init__(self, args: Args, partial: Path):
        self.recipe, self.partial = SAC_TASKS[args.env_id], partial
        self.env = mopo.make_env(args.env_id)
        (obs_dim,), (action_dim,) = self.env.observation_space.shape, self.env.action_space.shape
        if args.target_entropy is None:
            args = dataclasses.replace(args, target_entropy=-float(action_dim))
        if args.medium_return is None:
            usual = MEDIUM_RETURNS.get(args.env_id.split("-")[0])
            args = dataclasses.replace(args, medium_return=usual)
        self.args, sac_steps = args, args.sac_steps if self.recipe.policies else 0
        self.sac = SAC(args, obs_dim, action_dim, sac_steps, mopo.choose_device(args))
        self.kept = {}  # name -> policy, frozen
        self.stops = {}  # name -> [steps of SAC, mean return in the last evaluation]
        self.curve = []  # [steps of SAC, mean return] of every evaluation
        capacities = {name: args.steps for name in self.recipe.parts} | {"SAC": sac_steps}
        new = lambda name: Recording(self.env, name, capacities[name], args.seed)
        self.records = {name: new(name) for name in capacities}
        self.since_save = 0  # rows
        mopo.reseed(args.seed, "collection")

    def run(self) -> None:
        """SAC to its end, then the rows of the policies that were kept."""
        if self.learning():
            self.learn()
        for name in self.recipe.parts:
            record = self.records[name]
            if name != "SAC":
                kept = self.kept.get(name)
                act = Actor(kept, self.sac.sizes[0], self.args) if kept else self.act_uniformly
                for _ in self.missing_rows(record):
                    record.add_row(act)

    def learning(self) -> bool:
        """Whether SAC is not yet at its end."""
        return self.kept.keys() < set(self.recipe.policies)

    def learn(self) -> None:
        """SAC: a row, a gradient step, at times a look at the return."""
        args, sac, record = self.args, self.sac, self.records["SAC"]
        step, act = mopo.capture(sac.iterate, args), Actor(sac.actor, sac.sizes[0], args)
        for _ in self.missing_rows(record):
            explores = record.count < args.random_steps
            record.add_row(self.act_uniformly if explores else act)
            sac.remember(record.rows, record.count - 1, record.count)
            if not explores:
                step()
            last = record.count == args.sac_steps
            if last or record.count % args.eval_every == 0:
                self.evaluate(last)
                if not self.learning():
                    return

    def missing_rows(self, record: Recording) -> Iterator[None]:
        """One turn per row that a record lacks; between two episodes saves what is due."""
        progress = dict(total=record.capacity, initial=record.count, unit=" rows")
        with tqdm(desc=record.name, **progress) as bar:
            while record.count < record.capacity:
                yield
                bar.update()
                self.since_save += 1
                if record.obs is None and self.since_save >= self.args.save_every:
                    self.save()

    def act_uniformly(self, obs: np.ndarray) -> np.ndarray:
        shape, device = self.env.action_space.shape, self.sac.device
        return (2 * torch.rand(shape, device=device) - 1).cpu().numpy()

    def evaluate(self, last: bool) -> None:
        """Book the mean return of the policy as it is, and keep the policy if its time has come."""
        args, steps = self.args, self.records["SAC"].count
        self.check_finite()
        scores = mopo.evaluate(self.sac, args, args.eval_episodes, steps)
        zero, one = mopo.d4rl_score(args.env_id, [0.0, 1.0])  # from scores back to returns
        mean = float(((scores - zero) / (one - zero)).mean())
        self.curve.append([steps, mean])
        tqdm.write(f"{steps} steps: return {mean:.1f}")
        for name in self.recipe.policies:
            reached = mean >= args.medium_return if name == "medium" else last
            if reached and name not in self.kept:
                self.kept[name], self.stops[name] = copy.deepcopy(self.sac.actor), [steps, mean]
        if last and self.learning():
            best, wanted = max(m for _, m in self.curve), args.medium_return
            sys.exit(
                f"SAC reached a return of {best:.1f} in --sac-steps {steps}, not {wanted}: take "
                "more steps (--resume goes on from the last save) or another --seed"
            )

    def check_finite(self) -> None:
        """If SAC has diverged, neither a save nor a file must hold that."""
        for name, weight in self.sac.named_parameters():
            if not weight.isfinite().all():
                steps = self.records["SAC"].count
                sys.exit(f"{name} is not finite after {steps} steps of SAC: lower its rate")

    def settings(self) -> dict:
        """What decides the rows: stands in the file, and --resume must find it unchanged."""
        names = ("steps",) if self.recipe.parts != ("SAC",) else ()
        if self.recipe.policies:
            names += ("eval_every", "eval_episodes", "random_steps", "batch_size", "hidden")
            names += ("gamma", "tau", "critic_lr", "actor_lr", "alpha_lr", "target_entropy")
            # Where SAC ends at the medium return, more --sac-steps only allow it to get there.
            names += ("medium_return",) if "medium" in self.recipe.policies else ()
            names += ("sac_steps",) if self.recipe.policies != ("medium",) else ()
        return settings_of(self.args, names)

    def save(self) -> None:
        """To the file that --resume reads. Between two episodes: those have seeds."""
        self.check_finite()
        sac, random = self.sac, torch.cuda if self.sac.device.type == "cuda" else torch
        state = dict(settings=json.dumps(self.settings()), stops=self.stops, curve=self.curve)
        state |= dict(device=sac.device.type, rng=random.get_rng_state(), sac=sac.state_dict())
        state["optimizers"] = {name: o.state_dict() for name, o in sac.optimizers.items()}
        state["kept"] = {name: policy.state_dict() for name, policy in self.kept.items()}
        state["records"] = {}
        for name, record in self.records.items():
            rows = {k: torch.from_numpy(v[: record.count]) for k, v in record.rows.items()}
            state["records"][name] = dict(episodes=record.episodes, rows=rows)
        mopo.save(state, self.partial)
        self.since_save = 0

    def load(self) -> None:
        """Put back what save saved."""
        sac, args = self.sac, self.args
        with mopo.loading(self.partial) as state:
            if state["settings"] != json.dumps(self.settings()):
                sys.exit(f"--resume needs the stopped run's settings: {state['settings']}")
            sac.load_state_dict(state["sac"])
            for name, optimizer in sac.optimizers.items():
                mopo.load_optimizer(optimizer, state["optimizers"][name])
            for name, weights in state["kept"].items():
                self.kept[name] = copy.deepcopy(sac.actor)
                self.kept[name].load_state_dict(weights)
            self.stops, self.curve = state["stops"], state["curve"]
            count = len(state["records"]["SAC"]["rows"]["rewards"])
            if self.recipe.policies and args.sac_steps < count + self.learning():
                sys.exit(f"--sac-steps must exceed the {count} of the stopped run")
            for name, saved in state["records"].items():
                record, rows = self.records[name], saved["rows"]
                record.count, record.episodes = len(rows["rewards"]), saved["episodes"]
                for key, column in record.rows.items():
                    column[: record.count] = rows[key].numpy()
            sac.remember(self.records["SAC"].rows, 0, count)
        if state["device"] == sac.device.type:
            (torch.cuda if sac.device.type == "cuda" else torch).set_rng_state(state["rng"])
        else:
            print(f"note: was collected on {state['device']}, goes on on {sac.device.type}")

    def columns(self) -> dict[str, np.ndarray]:
        """The file's columns. Only the last row may be that of an episode that is cut unmarked."""
        parts = [self.records[name] for name in self.recipe.parts]
        for part in parts[:-1]:  # what follows are another policy's rows
            part.rows["timeouts"][part.count - 1] = not part.rows["terminals"][part.count - 1]
        join = lambda name: np.concatenate([part.rows[name][: part.count] for part in parts])
        return {name: join(name) for name in parts[0].rows}

    def attributes(self, columns: dict[str, np.ndarray]) -> dict:
        """What the file is: numbers, and a sentence for people."""
        numbers, mean, most = self.settings(), *returns_of(columns, "rewards")
        numbers |= dict(device=self.sac.device.type, mean_return=mean, max_return=most)
        whole = int((columns["terminals"] | columns["timeouts"]).sum())
        said = [f"{len(columns['rewards'])} rows, {whole} whole episodes of mean return {mean:.1f}"]
        said[0] += f" and maximum {most:.1f}"
        if task := OOD_STATISTICS.get(self.args.env_id):
            own = returns_of(columns, "infos/behaviour_rewards")[0]
            numbers["mean_behaviour_return"] = own
            said.append(f"MOPO's own data: {task[0]} and {task[1]}; here in SAC's task {own:.1f}")
        for name, (steps, mean) in self.stops.items():
            digest = policy_hash(self.kept[name])
            numbers |= {f"{name}_policy_steps": steps, f"{name}_policy_return": mean}
            numbers[f"{name}_policy_sha256"] = digest
            said.append(
                f"{name} policy of SAC after {steps} steps, whose last {self.args.eval_episodes} "
                f"test episodes returned {mean:.1f}, sha256 {digest}"
            )
        if self.curve:
            numbers |= dict(zip(("eval_steps", "eval_returns"), zip(*self.curve)))
        said += ["uniform actions"] if self.recipe.parts == ("random",) else []
        return numbers | {"note": note(self.args, said)}


# ===== 4. From the command line to the file =======================================================


def collect(args: Args) -> Path:
    """Collect, and write the dataset. -> its path"""
    path = output_path(args)
    partial = path.with_name(path.name + ".partial.pt")
    check_files(args, path, partial)
    start = time.perf_counter()
    if args.env_id in MAZE2D_TASKS:
        columns, attributes = collect_maze2d(args)
    else:
        collection = SACCollection(args, partial)
        if args.resume:
            collection.load()
        else:
            partial.unlink(missing_ok=True)
        collection.run()
        columns = collection.columns()
        attributes = collection.attributes(columns)
    rows, seconds = len(columns["rewards"]), time.perf_counter() - start
    print(f"{rows} rows in {seconds:.0f} s, {rows / seconds:.0f} rows/s")
    write_hdf5(path, columns, attributes)
    partial.unlink(missing_ok=True)
    print(f"{path}: {attributes['note']}")
    return path


def main() -> None:
    """The command line. Mistakes end in one sentence on stderr and a non-zero exit status."""
    args = tyro.cli(Args, description=__doc__)
    known = [*MAZE2D_TASKS, *SAC_TASKS]
    if args.env_id not in known:
        near = difflib.get_close_matches(args.env_id, known, n=3, cutoff=0.0)
        sys.exit(f"no recipe for --env-id {args.env_id}; the nearest: {', '.join(near)}")
    for name in ("steps", "save_every", "eval_every", "eval_episodes"):
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} must be at least 1")
    if args.env_id in SAC_TASKS and args.sac_steps <= args.random_steps:
        sys.exit(f"--sac-steps must exceed --random-steps {args.random_steps}")
    try:
        collect(args)
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues from the last save, if there is one")


# ===== Appendix: plumbing, may be skipped =========================================================


def settings_of(args: Args, names: tuple[str, ...]) -> dict:
    """Some of the settings, and the versions of what turns them into rows."""
    settings = {name: getattr(args, name) for name in ("env_id", "seed", *names)}
    packages = ("gymnasium", "gymnasium-robotics", "mujoco", "numpy", "torch")
    return settings | {package: importlib.metadata.version(package) for package in packages}


def note(args: Args, facts: list[str]) -> str:
    """What the file is, in a sentence."""
    origin = "A re-collection by D4RL's recipe with collect.py, not the file that D4RL hosts."
    if args.env_id in OOD_STATISTICS:
        origin = "Made with collect.py as MOPO's paper says; its own file was never published."
    return f"{origin} Seed {args.seed}; {'; '.join(facts)}."


def policy_hash(policy: nn.Module) -> str:
    """sha256 of a policy's weights, hex."""
    digest = hashlib.sha256()
    for weight in policy.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def returns_of(columns: dict[str, np.ndarray], rewards: str) -> tuple[float, float]:
    """Mean and maximum of the whole episodes' sums of column `rewards`; NaN without any."""
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"])
    returns = np.diff(np.cumsum(columns[rewards], dtype=np.float64)[ends], prepend=0.0)
    return (float(returns.mean()), float(returns.max())) if len(ends) else (math.nan, math.nan)


def output_path(args: Args) -> Path:
    """--output, else D4RL's own name in D4RL's folder."""
    if args.output is not None:
        return Path(args.output).expanduser()
    url = mopo.d4rl_tables()["DATASET_URLS"].get(args.env_id, f"{args.env_id}.hdf5")
    folder = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    return Path(folder).expanduser() / url.rsplit("/", 1)[-1]


def check_files(args: Args, path: Path, partial: Path) -> None:
    """Refuse now what would fail, or destroy something, after the collection."""
    if path.is_dir():
        sys.exit(f"{path} is a folder: --output takes the name of a file")
    if path.exists() and not args.overwrite:
        sys.exit(f"{path} exists: add --overwrite to replace it")
    if args.env_id in SAC_TASKS and args.resume and not partial.exists():
        sys.exit(f"nothing to resume: there is no {partial}")
    if partial.exists() and not (args.resume or args.overwrite):
        sys.exit(f"{partial} is a stopped run: --resume continues it, --overwrite starts again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (test := path.with_name(path.name + ".part")).write_bytes(b"")
        test.unlink()
    except OSError as error:
        sys.exit(f"cannot write to {path.parent} ({error})")


def write_hdf5(path: Path, columns: dict[str, np.ndarray], attributes: dict) -> None:
    """D4RL's layout, gzip after a byte shuffle; `path` is the old or the new file, never half."""
    part = path.with_name(path.name + ".part")
    settings = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    try:
        with h5py.File(part, "w") as file:
            file.attrs.update(attributes)
            for name, column in columns.items():
                # One coordinate per chunk: neighbours in time are alike, x and y are not.
                chunks = (min(len(column), 100_000), 1)[: column.ndim]
                file.create_dataset(name, data=column, chunks=chunks, **settings)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # HDF5 reports a full disk as either
        part.unlink(missing_ok=True)
        sys.exit(f"cannot write {path} ({error}); what was there is unharmed")


if __name__ == "__main__":
    main()
