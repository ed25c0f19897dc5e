# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1", "h5py>=3.8", "mujoco>=3.1", "numpy>=1.26", "tqdm", "tyro>=0.9"]
# ///
"""Make a D4RL dataset again, by D4RL's own recipe, for the days on which D4RL's server is down.

    uv run collect.py --env-id maze2d-umaze-v1    # one million rows, half a minute on one CPU core

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
"""

import contextlib
import difflib
import json
import math
import os
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import tyro
from tqdm import tqdm

# ======================================================================================
# 1. Arguments
# ======================================================================================


@dataclass
class Args:
    env_id: str = "maze2d-umaze-v1"
    """the D4RL task: maze2d-[eval-]{umaze,medium,large}-[dense-]v1"""
    steps: int = 1_000_000
    """the rows of the dataset; the hosted maze2d-umaze-v1 has a million, too"""
    seed: int = 0
    """the same seed gives the same file, byte for byte, with the same library versions"""
    output: str | None = None
    """the file to write (default: D4RL's own name in $D4RL_DATASET_DIR or ~/.d4rl/datasets)"""
    overwrite: bool = False
    """replace an existing file, and forget a stopped collection of it"""
    resume: bool = False
    """continue a stopped collection; the file comes out as if it had never stopped"""
    save_every: int = 100_000
    """rows between two saves of the state that --resume starts from"""
    gzip: int = 4
    """compression level from 0 to 9: more is smaller and slower"""
    infos: bool = True
    """also write infos/goal, infos/qpos and infos/qvel, as D4RL does; half of the file"""

    # maze2d
    action_noise: float = 0.5
    """standard deviation of the noise on the controller's action (D4RL: 0.5)"""
    keep_quirks: bool = False
    """repeat the observation of the row before a goal switch in the row after it, as D4RL's script
    does by an oversight: the first transition of a trajectory then spans two physical steps"""


class UserError(Exception):
    """A mistake the user can mend: main prints it as one sentence and exits with code 2."""


def refuse(sentence):
    """End with one sentence and a non-zero exit status."""
    sys.exit(f"collect.py: {sentence}")


def parse_args():
    """The flags, checked: whatever cannot work is refused here, before any row is collected."""
    args = tyro.cli(Args, description=__doc__)
    if args.env_id not in MAZE2D_TASKS:
        near = difflib.get_close_matches(args.env_id, MAZE2D_TASKS, n=3, cutoff=0.0)
        refuse(f"no recipe for --env-id {args.env_id}; the nearest names are {', '.join(near)}.")
    fewest = 10 * MAZE2D_TASKS[args.env_id].limit
    if args.steps < fewest:
        refuse(f"--steps {args.steps} is too small for some whole trajectories: at least {fewest}.")
    if not (math.isfinite(args.action_noise) and args.action_noise >= 0):
        refuse(f"--action-noise must be a finite number >= 0, not {args.action_noise}.")
    if args.seed < 0 or args.save_every < 1 or not 0 <= args.gzip <= 9:
        refuse("--seed must be >= 0, --save-every >= 1 and --gzip from 0 to 9.")
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
    moves are tried in D4RL's order, which decides between equally long ones. Walls have ways out
    and none in: the ball's centre reaches i - 0.6, so its rounded position can be a wall cell.
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
        start = at = nearest_cell(position)
        self.waypoints = []
        while not self.waypoints or at != cell:
            at = self.plans[cell][at]
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

    def restore(self, state):
        """The inverse of state()."""
        numbers = json.loads(str(state["numbers"]))
        if numbers["made_by"] != recipe_of(self.args):
            refuse(f"--resume needs the stopped run's settings: {numbers['made_by']}.")
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


# ======================================================================================
# 4. Files
# ======================================================================================

RECOLLECTED = "A re-collection by D4RL's recipe with collect.py, not the file that D4RL hosts."


def recipe_of(args):
    """What decides the rows, as one flat dict: kept in the dataset, and compared by --resume."""
    return {
        "env_id": args.env_id,
        "steps": args.steps,
        "seed": args.seed,
        "action_noise": args.action_noise,
        "quirks": "kept" if args.keep_quirks else "repaired",
        "infos": args.infos,
        "mujoco": mujoco.__version__,
        "numpy": np.__version__,
    }


def output_path(args):
    folder = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    path = args.output or os.path.join(folder, MAZE2D_TASKS[args.env_id].filename)
    return Path(path).expanduser()


def check_files(args, path, partial):
    """Refuse now what would fail, or destroy something, after the collection."""
    if path.is_dir():
        refuse(f"{path} is a folder: --output takes the name of a file.")
    if path.exists() and not args.overwrite:
        refuse(f"{path} exists: add --overwrite to replace it.")
    if args.resume and not partial.exists():
        refuse(f"nothing to resume: there is no {partial}.")
    if partial.exists() and not (args.resume or args.overwrite):
        refuse(f"{partial} is a stopped run: --resume continues it, --overwrite starts again.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(partial.with_suffix(".test"), lambda file: file.write(b"test"))
        partial.with_suffix(".test").unlink()
    except (UserError, OSError) as error:
        refuse(f"cannot write to {path.parent} ({error}).")


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


def write_dataset(path, columns, args):
    """D4RL's HDF5 layout, gzip after a byte shuffle, attributes that say what the file is."""

    def write(file):
        with h5py.File(file, "w") as h5:
            h5.attrs["recollected"] = RECOLLECTED
            h5.attrs.update(recipe_of(args))
            for name, column in columns.items():
                # One coordinate per chunk: neighbours in time are alike, x and y are not.
                chunks = (min(len(column), 100_000), 1)[: column.ndim]
                settings = {"compression": "gzip", "compression_opts": args.gzip, "shuffle": True}
                h5.create_dataset(name, data=column, chunks=chunks, **settings)

    write_atomically(path, write)


def collect(args):
    """Collect, saving the state now and then, and write the dataset. -> its path"""
    path = output_path(args)
    partial = path.with_name(path.name + ".partial.npz")
    check_files(args, path, partial)
    collection = Maze2dCollection(args)
    if args.resume:
        try:
            with np.load(partial, allow_pickle=False) as state:
                collection.restore(state)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            refuse(f"{partial} is damaged: --overwrite starts again.")
    else:
        partial.unlink(missing_ok=True)
    first, start = collection.count, time.perf_counter()
    for _ in tqdm(range(first, args.steps), initial=first, total=args.steps, unit=" rows"):
        collection.add_row()
        if collection.count % args.save_every == 0 and collection.count < args.steps:
            collection.save(partial)
    seconds = time.perf_counter() - start
    columns = collection.dataset()
    write_dataset(path, columns, args)
    partial.unlink(missing_ok=True)
    switches, reward = columns["timeouts"].sum(), columns["rewards"].mean()
    print(f"{path}: {args.steps} rows, {switches} goal switches, mean reward {reward:.4f}")
    print(f"{(args.steps - first) / seconds:.0f} rows/s")
    return path


def main():
    try:
        collect(parse_args())
    except KeyboardInterrupt:
        refuse("stopped; --resume continues from the last save, if there is one.")
    except (UserError, OSError, MemoryError) as error:
        refuse(f"{error}; --resume continues from the last save, if there is one.")


if __name__ == "__main__":
    main()
