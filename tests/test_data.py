"""Datasets and environments: bad files, pairing, download, D4RL's semantics and scores."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import ampl as script

MAZE = "maze2d-umaze-v1"  # 4 observation entries, 2 actions; the quickest environment to make


# Episodes in the hand-made file: 0-2 terminal, 3-5 timeout, 6 timeout, 7-8 terminal, 9-10 cut tail.
def rows(size=11, **changes):
    """D4RL arrays whose observation row i is [i, i, i, i]; `changes` replace keys, None removes."""
    data = {
        "observations": np.repeat(np.arange(size, dtype=np.float32)[:, None], 4, 1),
        "actions": np.linspace(-1, 1, 2 * size, dtype=np.float32).reshape(size, 2),
        "rewards": np.arange(size, dtype=np.float32),
        "terminals": np.isin(np.arange(size), (2, 8)),
        "timeouts": np.isin(np.arange(size), (5, 6)),
    }
    return {key: value for key, value in (data | changes).items() if value is not None}


def write(path, data, **attributes):
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file.create_dataset(key, data=value)
        file.attrs.update(attributes)
    return str(path)


def load(path, env_id=MAZE):
    return script.load_dataset(env_id, path, script.make_env(env_id))


def put(key, row, value):
    """The array `key` of rows() with one row replaced."""
    array = rows()[key].astype(np.float32)
    array[row] = value
    return {key: array}


def stored(row, value):
    array = rows()["observations"] + 0.5
    array[row] = value
    return {"next_observations": array}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rewards": None}, ["lacks rewards"]),
        ({"observations": None, "actions": None}, ["lacks observations, actions"]),
        ({"terminals": None, "timeouts": None}, ["neither terminals nor timeouts"]),
        ({"rewards": np.zeros(10, np.float32)}, ["differ in length", "10", "11"]),
        ({"observations": np.zeros((11, 5), np.float32)}, ["observations", "(5,)", "(4,)"]),
        ({"next_observations": np.zeros((11, 3), np.float32)}, ["next_observations", "(3,)"]),
        ({"actions": np.zeros((11, 3), np.float32)}, ["actions", "(3,)", "(2,)"]),
        ({"rewards": np.zeros((11, 2), np.float32)}, ["rewards", "(2,)"]),
        (put("observations", 7, np.nan), ["observations", "NaN", "row 7"]),
        (put("rewards", 3, np.inf), ["rewards", "infinity", "row 3"]),
        (put("actions", 4, [np.nan, 0]), ["actions", "NaN", "row 4"]),
        (stored(9, -np.inf), ["next_observations", "row 9"]),
        (put("actions", 6, [0, 1.002]), ["action in row 6", "0.002"]),
        (put("actions", 6, [-1.5, 0]), ["action in row 6", "0.5"]),
        (dict(terminals=np.zeros(11, bool), timeouts=np.zeros(11, bool)), ["0 complete"]),
        (dict(terminals=None, timeouts=np.arange(11) == 4), ["1 complete"]),
        (rows(0), ["empty"]),
        ({"rewards": np.array([b"a"] * 11)}, ["not D4RL's HDF5"]),
    ],
)
def test_bad_datasets_are_one_sentence(tmp_path, changes, words):
    path = write(tmp_path / "bad.hdf5", rows(**changes))
    with pytest.raises(script.UserError) as error:
        load(path)
    message = str(error.value)
    assert path in message and "\n" not in message
    assert all(word in message for word in words), message


def test_files_that_are_no_hdf5(tmp_path):
    with pytest.raises(script.UserError, match="no such file"):
        load(str(tmp_path / "absent.hdf5"))
    with pytest.raises(script.UserError, match="no such file"):
        load(str(tmp_path))
    (tmp_path / "page.hdf5").write_text("<html>log in</html>")
    with pytest.raises(script.UserError, match="truncated or not"):
        load(str(tmp_path / "page.hdf5"))
    path = write(tmp_path / "cut.hdf5", rows())
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(script.UserError, match="truncated or not"):
        load(path)


def test_pairs_without_stored_next_observations(tmp_path):
    path = write(tmp_path / "d.hdf5", rows(), recollected="by hand")
    data = load(path)
    assert data.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 7, 8, 9]  # no timeouts (5, 6), no last row
    assert data.next_obs[:, 0].tolist() == [1, 2, 2, 4, 5, 8, 8, 10]  # a terminal repeats obs
    assert data.has_next.tolist() == [True, True, False, True, True, True, False, True]
    assert data.terminated.tolist() == [False, False, True, False, False, False, True, False]
    assert data.next_row.tolist() == [1, 2, -1, 4, -1, 6, -1, -1]
    assert data.reward.tolist() == data.obs[:, 0].tolist()
    assert data.episode_start_obs[:, 0].tolist() == [0, 3, 6, 7, 9]
    returns = [3.0, 12.0, 6.0, 15.0]
    assert data.episodes == {"count": 4, "mean": np.mean(returns), "std": np.std(returns)}
    assert data.notes == ["recollected: by hand"]
    assert data.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    kinds = {"obs": torch.float32, "action": torch.float32, "next_row": torch.int64}
    kinds |= {"terminated": torch.bool, "has_next": torch.bool, "reward": torch.float32}
    assert all(getattr(data, key).dtype == kind for key, kind in kinds.items())


def test_pairs_with_stored_next_observations(tmp_path):
    data = load(write(tmp_path / "d.hdf5", rows(**stored(0, 0.5))))
    assert data.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]
    assert torch.equal(data.next_obs, data.obs + 0.5)
    assert data.has_next.all()
    assert data.next_row.tolist() == [1, 2, -1, 4, -1, 6, -1, 8, -1]


def test_old_files(tmp_path):
    """Columns, flags as numbers, a row with both flags, a terminal in the last row."""
    both = rows()["timeouts"] | (np.arange(11) == 2)
    last = np.isin(np.arange(11), (2, 8, 10))
    data = rows(rewards=rows()["rewards"][:, None], terminals=last[:, None].astype(np.float64))
    data = load(write(tmp_path / "d.hdf5", data | {"timeouts": both.astype(np.uint8)}))
    assert data.obs[:, 0].tolist() == [0, 1, 3, 4, 7, 8, 9, 10]
    assert data.terminated.tolist() == [False] * 5 + [True, False, True]
    assert data.has_next.tolist() == [True] * 5 + [False, True, False]
    assert data.next_row.tolist() == [1, -1, 3, -1, 5, -1, 7, -1]


def test_time_limit_stands_in_for_missing_timeouts(tmp_path):
    terminals = np.isin(np.arange(1000), (9, 709))  # umaze's limit is 300: ends at 309, 609, 709
    path = write(tmp_path / "d.hdf5", rows(1000, timeouts=None, terminals=terminals))
    data = load(path)
    assert sorted(set(range(1000)) - set(data.obs[:, 0].int().tolist())) == [309, 609, 999]
    assert data.episodes["count"] == 4 and "300 steps" in data.notes[0]


def test_actions_are_scaled_clipped_and_counted(tmp_path):
    path = write(tmp_path / "d.hdf5", rows(**put("actions", 3, [1.0005, -1.0005])))
    data = load(path)
    assert data.action[3].tolist() == [1.0, -1.0] and "2 action entries" in data.notes[0]
    assert torch.equal(data.action[0], torch.tensor(rows()["actions"][0]))  # D4RL: unchanged
    wide = rows(observations=np.zeros((11, 3)), actions=np.linspace(-2, 2, 11)[:, None])
    data = load(write(tmp_path / "p.hdf5", wide), "Pendulum-v1")  # bounds -2 and 2
    assert torch.allclose(data.action[:3, 0], torch.tensor([-1.0, -0.8, -0.6]))


# ---- finding and downloading ---------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A dataset server: `ranges`, `cut` and `status` set its manners, `log` keeps its requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted, body, state = self.headers.get("Range"), server.body, server
            state.log.append(wanted)
            start = int(wanted[6:-1]) if wanted and state.ranges else 0
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206 if start else state.status)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cut, state.cut = state.cut, None  # only the first answer is cut
            self.wfile.write(body[start:cut])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body = Path(write(tmp_path / "origin.hdf5", rows(2000))).read_bytes()
    server.log, server.ranges, server.cut, server.status = [], True, None, 200
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/maze.hdf5"
    monkeypatch.setattr(script, "d4rl_tables", lambda: {"DATASET_URLS": {MAZE: server.url}})
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    server.path = tmp_path / "cache" / "maze.hdf5"
    yield server
    server.shutdown()
    server.server_close()


def test_search_order(server, tmp_path):
    assert script.find_dataset(MAZE) == server.path and server.path.read_bytes() == server.body
    requests = len(server.log)
    assert (
        script.find_dataset(MAZE) == server.path and len(server.log) == requests
    )  # from the cache
    own = write(tmp_path / "own.hdf5", rows())
    assert str(script.find_dataset(MAZE, own)) == own
    with pytest.raises(script.UserError, match="--dataset-path"):
        script.find_dataset("Pendulum-v1")


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_download_resumes(server, ranges):
    server.ranges, server.cut = ranges, len(server.body) // 2
    with pytest.raises(script.UserError, match="cut after"):
        script.find_dataset(MAZE)
    assert not server.path.exists()
    assert script.find_dataset(MAZE).read_bytes() == server.body
    assert server.log == [None, f"bytes={len(server.body) // 2}-"]
    assert [p.name for p in server.path.parent.iterdir()] == ["maze.hdf5"]


@pytest.mark.parametrize("ranges", [True, False])
def test_stale_partial_download_starts_anew(server, ranges):
    server.ranges = ranges
    server.path.parent.mkdir()
    server.path.with_name("maze.hdf5.part").write_bytes(b"x" * (len(server.body) + 1))
    assert script.find_dataset(MAZE).read_bytes() == server.body


def test_what_is_no_dataset_never_enters_the_cache(server):
    server.body = b"<html>please log in</html>"
    with pytest.raises(script.UserError, match="not a whole HDF5"):
        script.find_dataset(MAZE)
    assert list(server.path.parent.iterdir()) == []


def test_https_comes_first(monkeypatch, tmp_path):
    seen = []

    def fetch(url, part):
        seen.append(url)
        raise OSError("unreachable")

    monkeypatch.setattr(script, "fetch", fetch)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    with pytest.raises(script.UserError, match="unreachable"):
        script.find_dataset("hopper-medium-v2")
    rest = "://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5"
    assert seen == ["https" + rest, "http" + rest]


def test_failed_download_names_the_ways_out(server):
    server.status = 404
    with pytest.raises(script.UserError) as error:
        script.find_dataset(MAZE)
    for word in (server.url, str(server.path), "--dataset-path", "collect.py", "404"):
        assert word in str(error.value)
    assert list(server.path.parent.iterdir()) == []


def test_processes_that_download_together(server):
    threads = [threading.Thread(target=script.find_dataset, args=(MAZE,)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert server.path.read_bytes() == server.body
    assert [p.name for p in server.path.parent.iterdir()] == ["maze.hdf5"]


def test_missing_d4rl_is_one_sentence(monkeypatch):
    script.d4rl_tables.cache_clear()
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(script.UserError, match="pip install --no-deps d4rl==1.1"):
        script.d4rl_tables()


# ---- scores and environments ---------------------------------------------------------------------


def test_scores():
    assert script.has_reference("hopper-medium-v2") and not script.has_reference("Hopper-v4")
    score = script.d4rl_score("hopper-medium-v2", np.array([-20.272305, 3234.3, 1607.0138475]))
    np.testing.assert_allclose(score, [0, 100, 50], atol=1e-9)
    assert script.d4rl_score("Hopper-v4", [7.0]).tolist() == [7.0]


@pytest.mark.parametrize(
    "env_id, word",
    [
        ("hopper-medum-v2", "hopper-medium-v2"),
        ("Hoper-v4", "Hopper-v4"),
        ("xyzzy", "cannot be made"),
        ("Hopper-v3", "mujoco"),
        ("antmaze-umaze-v0", "antmaze tasks have no simulator"),
        ("ant-medium-v2", "ant tasks have no simulator"),
        ("kitchen-mixed-v0", "kitchen tasks have no simulator"),
        ("CartPole-v1", "bounded actions"),
        ("FrozenLake-v1", "flat observations"),
    ],
)
def test_environments_that_do_not_work(env_id, word):
    with pytest.raises(script.UserError) as error:
        script.make_env(env_id)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "env_id, widths, limit",
    [
        ("maze2d-umaze-v1", (4, 2), 300),
        ("maze2d-medium-dense-v1", (4, 2), 600),
        ("maze2d-eval-large-v1", (4, 2), 800),
        ("hopper-random-v0", (11, 3), 1000),
        ("halfcheetah-medium-expert-v1", (17, 6), 1000),
        ("walker2d-medium-replay-v2", (17, 6), 1000),
        ("pen-cloned-v1", (45, 24), 100),
        ("door-human-v1", (39, 28), 200),
        ("hammer-expert-v1", (46, 26), 200),
        ("relocate-human-v1", (39, 30), 200),
    ],
)
def test_widths_and_time_limits(env_id, widths, limit):
    env = script.make_env(env_id)
    assert env.observation_space.shape + env.action_space.shape == widths
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    env.reset(seed=0)
    env.unwrapped.reset()
    ends = []
    while not ends or not ends[-1][1]:  # terminations are ignored: only the limit stops this loop
        ends.append(env.step(0 * env.action_space.low)[2:4])
    assert len(ends) == limit and ends[-1] == (False, True)


# Mean return of a uniformly random policy and its standard error over 100 episodes, measured apart
# from this code. D4RL's own minimum: 96.26, -56.51, -20.27 (not reproducible), -280.18, 1.63.
RANDOM = {
    "pen-human-v1": (104.4, 28.1, 20),
    "door-human-v1": (-56.52, 0.06, 8),
    "hopper-medium-v2": (17.8, 1.5, 50),
    "halfcheetah-medium-v2": (-299.1, 7.8, 12),
    "walker2d-medium-v2": (1.58, 0.65, 50),
}


@pytest.mark.parametrize("env_id", RANDOM)
def test_random_policy_scores_as_in_d4rl(env_id):
    mean, error, episodes = RANDOM[env_id]
    width, rng = script.make_env(env_id).action_space.shape[0], np.random.default_rng(0)
    returns, lengths = script.run_episodes(
        env_id, lambda obs: rng.uniform(-1, 1, (episodes, width)), episodes, seed=1
    )
    tolerance = 4 * error * np.sqrt(1 + 100 / episodes)  # theirs and ours
    assert abs(returns.mean() - mean) < tolerance, (returns.mean(), tolerance)
    assert (lengths > 0).all()


def test_slots_are_independent_and_reproducible():
    def act(obs):
        assert obs.shape == (3, 11) and obs.dtype == np.float32
        return np.tanh(obs[:, :3] * 5 - 1)

    first, again = (script.run_episodes("hopper-medium-v2", act, 3, seed=5) for _ in range(2))
    other = script.run_episodes("hopper-medium-v2", act, 3, seed=6)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(set(first[0])) == 3

    def alone(obs):
        return np.tanh(obs[:, :3] * 5 - 1)

    single = script.run_episodes("hopper-medium-v2", alone, 1, seed=5)
    assert single[0][0] == first[0][0] and single[1][0] == first[1][0]


def test_actions_reach_the_bounds_of_other_environments():
    """Pendulum (bounds -2, 2): a constant 1 must earn what a torque of 2 earns."""
    returns, lengths = script.run_episodes("Pendulum-v1", lambda obs: np.ones((1, 1)), 1, seed=0)
    env = script.make_env("Pendulum-v1")
    env.reset(seed=int(np.random.SeedSequence([0, 0]).generate_state(1)[0]))
    expected = sum(env.step(np.array([2.0], np.float32))[1] for _ in range(200))
    assert returns[0] == pytest.approx(expected) and lengths[0] == 200


def pen_reward(obs):
    """D4RL's pen reward (pen_v0.py), recomputed from an observation."""
    distance, likeness = np.linalg.norm(obs[39:42]), obs[33:36] @ obs[36:39]
    bonus = 10.0 * (distance < 0.075 and likeness > 0.9) + 50.0 * (
        distance < 0.075 and likeness > 0.95
    )
    return likeness - distance + bonus - 5.0 * (obs[26] < 0.075)


def test_pen_ends_when_dropped_and_the_time_limit_wins():
    env = script.make_env("pen-human-v1")
    for drop_at, ending in ((5, (True, False)), (100, (False, True))):
        env.reset(seed=3)
        for step in range(1, drop_at + 1):
            if step == drop_at:
                env.unwrapped.data.qpos[-6] += 0.3  # the pen's own x axis points down, m
            obs, reward, terminated, truncated, _ = env.step(np.zeros(24))
            assert reward == pytest.approx(pen_reward(obs), abs=1e-6)
            assert (terminated, truncated) == ((False, False) if step < drop_at else ending)
        assert obs[26] < 0.075 and reward < -4


def test_door_reward_falls_with_the_distance_to_the_handle():
    """D4RL's reward, term by term; gymnasium-robotics 1.4.2 has the first sign wrong."""
    env = script.make_env("door-human-v1")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, 28))
        speed = np.sum(env.unwrapped.data.qvel**2)
        expected = -0.1 * np.linalg.norm(obs[35:38]) - 0.1 * (obs[28] - 1.57) ** 2 - 1e-5 * speed
        assert reward == pytest.approx(expected, abs=1e-6) and obs[28] < 0.2


def test_hammer_and_relocate_rewards():
    """D4RL's formulas (hammer_v0.py, relocate_v0.py) on the first random steps."""
    rng = np.random.default_rng(0)
    env = script.make_env("relocate-human-v1")
    env.reset(seed=0)
    for _ in range(10):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, 30))
        assert env.unwrapped.data.xpos[env.unwrapped.obj_body_id][2] < 0.04  # on the table
        assert reward == pytest.approx(-0.1 * np.linalg.norm(obs[30:33]), abs=1e-6)
    env = script.make_env("hammer-human-v1")
    env.reset(seed=0)
    sim = env.unwrapped
    for _ in range(10):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, 26))
        palm, hammer, nail = obs[33:36], obs[36:39], obs[42:45]
        head, goal = (sim.data.site_xpos[i] for i in (sim.tool_site_id, sim.goal_site_id))
        expected = -0.1 * np.linalg.norm(palm - hammer) - np.linalg.norm(head - nail)
        expected -= 10 * np.linalg.norm(nail - goal) + 1e-2 * np.linalg.norm(sim.data.qvel)
        expected += 2 * (hammer[2] > 0.04 and head[2] > 0.04)
        assert reward == pytest.approx(expected, abs=1e-6)


def test_initial_observations():
    for env_id, width in (("hopper-medium-v2", 11), (MAZE, 4)):
        first = script.initial_observations(env_id, 50, seed=0)
        assert first.shape == (50, width) and first.dtype == np.float32
        assert len(np.unique(first, axis=0)) == 50
        assert np.array_equal(first, script.initial_observations(env_id, 50, seed=0))
        assert not np.array_equal(first, script.initial_observations(env_id, 50, seed=1))


def test_no_warning_and_no_chatter():
    """Importing and making every family says nothing, with warnings turned into errors."""
    ids = ["halfcheetah-medium-v2", "pen-human-v1", MAZE, "Hopper-v4", "Pendulum-v1"]
    code = f"import {script.__name__} as s; [s.make_env(i).reset(seed=0) for i in {ids}]"
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=os.path.dirname(script.__file__)
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        script.make_env("walker2d-medium-v2").reset(seed=0)
