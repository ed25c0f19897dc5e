"""maze2d: the environment against D4RL's numbers, and collect.py against D4RL's recipe."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import ampl as maze2d
import collect

ROOT = Path(__file__).resolve().parents[1]
TOP_SPEED = 5 + 0.95 / 4.19879  # one step of 100 N against damping from the clipped 5 m/s


def env_at(maze, x, y, vx=0.0, vy=0.0, **kwargs):
    env = maze2d.Maze2dEnv(maze, **kwargs)
    env.reset(seed=0)
    env.data.qpos[:], env.data.qvel[:] = (x, y), (vx, vy)
    return env


# ---- environment


@pytest.mark.parametrize(
    "maze, goal, cells", [("umaze", (1, 1), 7), ("medium", (6, 6), 26), ("large", (7, 9), 46)]
)
def test_layout(maze, goal, cells):
    env = maze2d.Maze2dEnv(maze)
    assert tuple(env.goal) == goal
    assert len(env.start_cells) == cells
    assert len({len(row) for row in maze2d.MAZES[maze].split("/")}) == 1


@pytest.mark.parametrize("speed", [5.0, 5.2, 100.0])
def test_velocity_is_clipped_before_the_step(speed):
    obs = env_at("umaze", 1.0, 1.5, vy=speed).step([0.0, 1.0])[0]
    assert obs[3] == pytest.approx(TOP_SPEED, abs=1e-6)


@pytest.mark.parametrize(
    "action, axis, wall", [((-1, 0), 0, 0.4), ((1, 0), 0, 1.2), ((0, -1), 1, 0.4)]
)
def test_free_range_of_a_cell(action, axis, wall):
    """Pushed against the walls of cell (1, 1), the ball rests at i - 0.6 or i + 0.2."""
    env = env_at("umaze", 0.8, 0.8)
    for _ in range(300):
        obs = env.step(action)[0]
    assert obs[axis] == pytest.approx(wall, abs=0.03)
    assert abs(obs[2 + axis]) < 0.01


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.0, 1.5])
def test_reward_radius(angle):
    env = maze2d.Maze2dEnv("umaze")
    way = np.array([np.cos(angle), np.sin(angle), 0.0, 0.0])
    obs = np.array([1.0, 1.0, 0.0, 0.0]) + np.array([[0.499], [0.501]]) * way
    assert env.reward(obs).tolist() == [1.0, 0.0]
    env = maze2d.Maze2dEnv("umaze", reward_type="dense")
    assert env.reward(obs) == pytest.approx(np.exp([-0.499, -0.501]))


@pytest.mark.parametrize("velocity, reward", [(4.0, 0.0), (-4.0, 1.0)])
def test_reward_of_a_step_is_that_of_the_next_position(velocity, reward):
    """From 0.5 -+ 0.02 of the goal across the border, 0.04 per step."""
    start = 1.5 - 0.02 * np.sign(velocity)
    env = env_at("umaze", 1.0, start, vy=velocity)
    before = env.reward(np.array([1.0, start, 0.0, 0.0]))
    _, got, terminated, truncated, _ = env.step([0.0, 0.0])
    assert (before, got, terminated, truncated) == (1.0 - reward, reward, False, False)


@pytest.mark.parametrize(
    "maze, limit, episodes, reference",
    [("umaze", 300, 400, 23.85), ("medium", 600, 150, 13.13), ("large", 800, 150, 6.7)],
)
def test_random_return_is_that_of_d4rl(maze, limit, episodes, reference):
    """D4RL's minimum scores are random returns; within 4 standard errors of ours, and not zero."""
    env, rng = maze2d.Maze2dEnv(maze), np.random.default_rng(0)
    env.reset(seed=0)
    returns = np.zeros(episodes)
    for k in range(episodes):
        env.reset()
        returns[k] = sum(env.step(action)[1] for action in rng.uniform(-1, 1, (limit, 2)))
    error = returns.std(ddof=1) / np.sqrt(episodes)
    assert abs(returns.mean() - reference) < 4 * error
    assert returns.mean() > 2 * error


def test_reset_spread_and_seed():
    env = maze2d.Maze2dEnv("umaze")
    obs = np.array([env.reset(seed=1 if k == 0 else None)[0] for k in range(2000)])
    cells = np.round(obs[:, :2])
    assert len(np.unique(cells, axis=0)) == 7
    assert 0.09 < np.abs(obs[:, :2] - cells).max() <= 0.1
    assert obs[:, 2:].std() == pytest.approx(0.1, rel=0.1)
    assert np.array_equal(env.reset(seed=1)[0], obs[0])


def test_an_episode_does_not_depend_on_the_one_before():
    env, actions = maze2d.Maze2dEnv("umaze"), np.random.default_rng(0).uniform(-1, 1, (400, 2))

    def episode():
        env.reset(seed=3)
        env.data.qpos[:] = 0.399, 0.399  # against two walls, where the solver has work
        return np.array([env.step(action)[0] for action in actions])

    first = episode()
    for _ in range(100):
        env.step([1.0, 1.0])  # into a wall, to leave the contact solver warm
    assert np.array_equal(first, episode())


RENDER = """
import numpy as np, ampl as maze2d
env = maze2d.Maze2dEnv("umaze", render_mode="rgb_array")
env.reset(seed=0)
for position in ((0.8, 2.8), (2.8, 0.8)):
    env.data.qpos[:] = position
    image = env.render().astype(int)
    green = np.argwhere(image[..., 1] - image[..., 0] > 40).mean(0) / image.shape[0]
    print(image.shape, *green.round(2))
env.close()
"""


def test_render():
    """The ball at high y is drawn at the top, at high x on the right."""
    run = subprocess.run(
        [sys.executable, "-c", RENDER],
        cwd=ROOT,
        env={**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")},
        capture_output=True,
        text=True,
    )
    if run.returncode and "GL" in run.stderr:
        pytest.skip("no OpenGL on this machine")
    upper_left, lower_right = run.stdout.splitlines()
    assert upper_left.startswith("(480, 480, 3)")
    row, column = map(float, upper_left.split()[3:])
    assert row < 0.4 and column < 0.4
    row, column = map(float, lower_right.split()[3:])
    assert row > 0.6 and column > 0.6


# ---- collect.py


def q_iteration_path(maze, goal):
    """D4RL's planner, plainly: 50 sweeps of Q = r + 0.99 max Q', then the first best action."""
    moves = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)]
    rows, free = maze2d.MAZES[maze].split("/"), set(maze2d.maze_cells(maze, "OG"))
    cells = [(i, j) for i in range(len(rows)) for j in range(len(rows[0]))]
    where = {cell: k for k, cell in enumerate(cells)}
    next_cells = []  # [cells, moves]
    for i, j in cells:
        ways = [(i + di, j + dj) for di, dj in moves]
        next_cells.append([way if way in free else (i, j) for way in ways])
    index = np.array([[where[n] for n in ns] for ns in next_cells])  # [cells, moves]
    reward, q = np.array([[float(cell == goal)] for cell in cells]), np.zeros(index.shape)
    for _ in range(50):
        q = reward + 0.99 * q.max(1)[index]
    return {cell: next_cells[k][q[k].argmax()] for k, cell in enumerate(cells)}


@pytest.mark.parametrize("maze", ["umaze", "medium", "large", "eval-large"])
def test_plan_is_that_of_q_iteration(maze):
    for goal in maze2d.maze_cells(maze, "OG"):
        expected, got = q_iteration_path(maze, goal), collect.plan(maze, goal)
        assert got.keys() >= set(maze2d.maze_cells(maze, "OG"))
        assert got == {cell: expected[cell] for cell in got}


def test_waypoints_lie_in_the_free_middle_of_the_cells():
    controller = collect.WaypointController("umaze", np.random.default_rng(0))
    shifts = []
    for _ in range(50):
        controller.set_goal((1.1, 0.9), (3, 3))
        assert controller.waypoints[-1] == (3.0, 3.0)
        shifts.append(np.array([(1, 2), (1, 3), (2, 3)]) - controller.waypoints[:-1])
    assert 0.0 <= np.min(shifts) < 0.01 and 0.19 < np.max(shifts) <= 0.2


def test_a_way_out_of_a_corner():
    """The ball's centre reaches 0.4 on both axes, which rounds to a wall that no way leaves."""
    controller = collect.WaypointController("umaze", np.random.default_rng(0))
    assert (0, 0) not in collect.plan("umaze", (3, 3))
    controller.set_goal((0.42, 0.43), (3, 3))
    assert [nearest(w) for w in controller.waypoints] == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3)]


def nearest(waypoint):
    """The cell of a waypoint, which lies up to 0.2 inward of it."""
    return tuple(int(np.ceil(x)) for x in waypoint)


@pytest.mark.parametrize("distance, solved", [(0.099, True), (0.101, False)])
def test_controller(distance, solved):
    """D4RL's gains 10 and -1, thresholds 0.1, for a goal whose cell is (1, 1)."""
    controller = collect.WaypointController("umaze", np.random.default_rng(0))
    controller.act(np.array([1.15, 1.0]), np.zeros(2), np.array([1.05, 0.95]))
    there, same_cell = np.array([1.0 + distance, 1.0]), np.array([0.9, 1.1])
    action, reached = controller.act(there, np.array([0.5, -0.25]), same_cell)
    assert reached == solved
    assert action == pytest.approx([max(-1.0, -10 * distance - 0.5), 0.25])


@pytest.mark.parametrize("seed", [0, 1])
def test_state_is_complete(seed):
    """Restored into a fresh collection at any row, the state gives the same next row and state."""
    args = collect.Args(seed=seed, steps=3_000, keep_quirks=True)
    one = collect.Maze2dCollection(args)
    one.add_row()
    for t in range(1, 500):
        if t % 50 == 0:  # into a corner, where the contact solver's warm start moves the last bits
            one.env.data.qpos[:], one.env.data.qvel[:] = (0.4, 0.4), -1.0
            one.add_row()
        two = collect.Maze2dCollection(args)
        two.restore(one.state())
        one.add_row()
        two.add_row()
        a, b = one.state(), two.state()
        assert a["numbers"] == b["numbers"] and np.array_equal(a["physics"], b["physics"]), t
        assert all(np.array_equal(a[name], b[name]) for name in one.rows)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half a")
        file.flush()
        raise OSError("no space")

    with pytest.raises(collect.UserError, match="no space"):
        collect.write_atomically(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def collected(steps, keep_quirks):
    collection = collect.Maze2dCollection(
        collect.Args(seed=2, steps=steps, keep_quirks=keep_quirks)
    )
    for _ in range(steps):
        collection.add_row()
    return collection.dataset()


def test_collected_segments_and_rewards():
    """The hosted file has 12459 goal switches in a million rows: one in 80.26 (noiseless: 73)."""
    data = collected(100_000, keep_quirks=False)
    lengths = np.diff(np.flatnonzero(np.r_[True, data["timeouts"]]))
    assert abs(lengths.mean() - 80.26) < 4 * 1.55
    assert 200 < lengths.max() <= 301
    assert (lengths == 1).mean() == pytest.approx(1 / 7, abs=0.04)
    # 0.0714 in 200,000 rows made with D4RL's own controller, 0.079 in a million of ours, whose
    # fifths lie between 0.070 and 0.084.
    assert data["rewards"].mean() == pytest.approx(0.079, abs=4 * 0.0036)
    assert not data["terminals"].any()
    at_limit = np.abs(data["actions"]) == 1.0  # 0.314 in a file made with D4RL's own controller
    assert at_limit.mean() == pytest.approx(0.314, abs=0.01)
    assert np.abs(data["actions"]).max() == 1.0
    distance = np.linalg.norm(data["observations"][:, :2] - [1.0, 1.0], axis=1)
    assert np.array_equal(data["rewards"], distance <= 0.5)
    # The share of rows per cell in 200,000 rows made with D4RL's own controller; over chunks of
    # 100,000 of ours a share has a standard deviation of 0.003 to 0.006.
    shares = {(1, 1): 0.0718, (1, 2): 0.1332, (1, 3): 0.2045, (2, 3): 0.1804,
              (3, 1): 0.0775, (3, 2): 0.1388, (3, 3): 0.1937}  # fmt: skip
    cells = np.rint(data["observations"][:, :2])
    ours = {cell: (cells == cell).all(1).mean() for cell in shares}
    assert ours == pytest.approx(shares, abs=0.02) and sum(ours.values()) > 0.999


@pytest.mark.parametrize("quirks", [False, True], ids=["repaired", "quirks"])
def test_row_after_a_goal_switch(quirks):
    data = collected(10_000, keep_quirks=quirks)
    obs, switch = data["observations"], np.flatnonzero(data["timeouts"][:-1])
    truth = np.concatenate([data["infos/qpos"], data["infos/qvel"]], axis=1)
    repeated = np.all(obs[switch + 1] == obs[switch], axis=1)
    longest_way = np.abs(np.diff(obs[:, :2], axis=0)).max()
    one_step = 0.01 * TOP_SPEED + 1e-4
    assert np.abs(np.diff(truth[:, :2], axis=0)).max() <= one_step
    if quirks:
        assert repeated.all()
        assert longest_way > one_step
    else:
        assert not repeated.any()
        assert np.array_equal(obs, truth)
        assert longest_way <= one_step


@pytest.mark.parametrize("maze", ["medium"])
def test_sample_replays(maze):
    """The bundled files: every row follows from the one before by one step of the environment."""
    with h5py.File(ROOT / f"tests/data/maze2d-{maze}-v1-sample.hdf5") as file:
        assert "re-collection" in file.attrs["recollected"]
        obs, actions = file["observations"][:20_000].astype(float), file["actions"][:20_000]
    env = env_at(maze, 0.0, 0.0)
    worst = 0.0
    for t in range(len(obs) - 1):
        env.data.qpos[:], env.data.qvel[:] = obs[t, :2], obs[t, 2:]
        worst = max(worst, np.abs(env.step(actions[t])[0] - obs[t + 1]).max())
    assert worst < 2e-5


def test_sigkill_and_resume_give_the_same_bytes(tmp_path):
    """With D4RL's quirks on, whose repeated observation is one more thing to carry over."""
    flags = dict(steps=40_000, seed=4, save_every=4_000, keep_quirks=True)
    whole, cut = str(tmp_path / "whole.hdf5"), tmp_path / "cut.hdf5"
    partial = tmp_path / "cut.hdf5.partial.npz"
    command = "--steps 40000 --seed 4 --save-every 4000 --keep-quirks --output".split()
    script = [sys.executable, str(ROOT / "collect.py"), *command, str(cut)]
    process = subprocess.Popen(script, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not partial.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists() and not cut.exists()

    collect.collect(collect.Args(output=whole, **flags))
    with pytest.raises(collect.UserError, match="stopped run"):
        collect.collect(collect.Args(output=str(cut), **flags))
    with pytest.raises(collect.UserError, match="settings"):
        other = {**flags, "seed": 5}
        collect.collect(collect.Args(output=str(cut), resume=True, **other))
    collect.collect(collect.Args(output=str(cut), resume=True, **flags))
    assert cut.read_bytes() == Path(whole).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.hdf5", "whole.hdf5"]


def test_file_layout_and_default_name(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "new" / "folder"))
    path = collect.collect(collect.Args(env_id="maze2d-umaze-dense-v1", steps=3_000, seed=7))
    assert path == tmp_path / "new" / "folder" / "maze2d-umaze-dense-v1.hdf5"
    with h5py.File(path) as file:
        layout = {}
        file.visititems(lambda name, item: layout.update({name: item}))
        shapes = {k: (v.shape, v.dtype.str) for k, v in layout.items() if k != "infos"}
        obs, rewards = file["observations"][:], file["rewards"][:]
        assert file.attrs["quirk_row_repeated_after_a_goal_switch"] == "repaired"
        assert file.attrs["seed"] == 7
        assert sum(name.startswith("quirk_") for name in file.attrs) == 3
    two, one = (3_000, 2), (3_000,)
    assert shapes == {
        "observations": ((3_000, 4), "<f4"),
        "actions": (two, "<f4"),
        "rewards": (one, "<f4"),
        "terminals": (one, "|b1"),
        "timeouts": (one, "|b1"),
        "infos/goal": (two, "<f4"),
        "infos/qpos": (two, "<f4"),
        "infos/qvel": (two, "<f4"),
    }
    assert rewards == pytest.approx(np.exp(-np.linalg.norm(obs[:, :2] - [1, 1], axis=1)))


BAD = {
    "unknown id": ("--env-id maze2d-umaz-v1", "maze2d-umaze-v1"),
    "too few rows": ("--steps 2999", "at least 3000"),
    "too many rows": ("--steps 1000000000000000", "allocate"),
    "noise": ("--action-noise nan", "finite"),
    "gzip": ("--gzip 10", "from 0 to 9"),
    "seed": ("--seed -1", "from 0 to"),
    "exists": ("--output {tmp}/there", "--overwrite"),
    "a folder": ("--overwrite --output {tmp}", "is a folder"),
    "unwritable": ("--output {tmp}/there/x.hdf5", "cannot write"),
    "nothing to resume": ("--resume --output {tmp}/x.hdf5", "nothing to resume"),
    "damaged": ("--resume --output {tmp}/y.hdf5", "damaged"),
}


@pytest.mark.parametrize("flags, says", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence(flags, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").write_bytes(b"precious")
    (tmp_path / "y.hdf5.partial.npz").write_bytes(b"PK rubbish")
    defaults = ["--steps", "3000", "--output", str(tmp_path / "x.hdf5")]
    argv = ["collect.py", *defaults, *flags.format(tmp=tmp_path).split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        collect.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in message and message.startswith("collect.py: ") and message.count("\n") == 1
    assert (tmp_path / "there").read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == {"there", "y.hdf5.partial.npz"}
