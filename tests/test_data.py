"""Datasets: which rows become which transitions, where files are found, what is refused."""

import hashlib
import http.server
import os
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import ampl

MAZE = "maze2d-umaze-v1"  # 4 observation entries, 2 actions, 300 steps; quick to make


def rows(size=11, **changes):
    """D4RL's arrays, row i with observation (i, i, i, i); `changes` replace keys, None removes.

    Episodes: 0-2 ends in a terminal, 3-5 and 6 at a time limit, 7-8 in a terminal, 9-10 is cut.
    """
    count = np.arange(size)
    data = {
        "observations": np.repeat(count.astype(np.float32)[:, None], 4, 1),
        "actions": np.linspace(-1, 1, 2 * size, dtype=np.float32).reshape(size, 2),
        "rewards": count.astype(np.float32),
        "terminals": np.isin(count, (2, 8)),
        "timeouts": np.isin(count, (5, 6)),
    }
    return {key: value for key, value in (data | changes).items() if value is not None}


def write(path, data):
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
    return str(path)


def load(path, env_id=MAZE):
    return ampl.load_dataset(ampl.Args(env_id=env_id, dataset_path=str(path)))


def refusal(function, *args):
    """The one sentence that `function` ends in."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


# --- rows ---


def test_pairs_without_stored_next_observations(tmp_path):
    """s' is the next row's state, never across the end of an episode; time limits bootstrap."""
    data = load(write(tmp_path / "d.hdf5", rows()))
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 3, 4, 7, 8, 9]  # not 5, 6, and not the cut 10
    assert data["next_obs"][:, 0].tolist() == [1, 2, 2, 4, 5, 8, 8, 10]  # not 3 after 2, 9 after 8
    assert data["terminated"].tolist() == [False, False, True, False, False, False, True, False]
    assert data["has_next"].tolist() == [True, True, False, True, True, True, False, True]
    assert data["next_row"].tolist() == [1, 2, -1, 4, -1, 6, -1, -1]
    assert data["reward"].tolist() == data["obs"][:, 0].tolist()
    assert data["action"].tolist() == rows()["actions"][[0, 1, 2, 3, 4, 7, 8, 9]].tolist()
    assert data["starts"].tolist() == [[i] * 4 for i in (0, 3, 6, 7, 9)]
    floats = {key for key, value in data.items() if getattr(value, "dtype", 0) == torch.float32}
    assert floats == {"obs", "action", "reward", "next_obs", "starts"}


def test_pairs_with_stored_next_observations(tmp_path):
    """Then s' of a terminal and of the last row are known, and are the stored ones."""
    stored = rows()["observations"] + 0.5
    data = load(write(tmp_path / "d.hdf5", rows(next_observations=stored)))
    assert data["next_obs"][:, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 7.5, 8.5, 9.5, 10.5]
    assert torch.equal(data["next_obs"], data["obs"] + 0.5) and data["has_next"].all()
    assert data["next_row"].tolist() == [1, 2, -1, 4, -1, 6, -1, 8, -1]


def test_rows_with_both_flags_and_a_terminal_at_the_end(tmp_path):
    """The time limit wins, as in D4RL's loader; a terminal needs no s', so the last row stays."""
    terminals = np.isin(np.arange(11), (2, 8, 10)).astype(np.float64)[:, None]  # a column of 0, 1
    timeouts = np.isin(np.arange(11), (2, 5, 6)).astype(np.uint8)
    data = load(write(tmp_path / "d.hdf5", rows(terminals=terminals, timeouts=timeouts)))
    assert data["obs"][:, 0].tolist() == [0, 1, 3, 4, 7, 8, 9, 10]
    assert data["terminated"].tolist() == [False] * 5 + [True, False, True]
    assert data["has_next"].tolist() == [True] * 5 + [False, True, False]
    assert data["next_row"].tolist() == [1, -1, 3, -1, 5, -1, 7, -1]
    assert data["next_obs"][:, 0].tolist() == [1, 2, 4, 5, 8, 8, 10, 10]


def test_a_file_without_timeouts(tmp_path):
    """Episodes end where the task's 300 steps are over, counted from the last end."""
    terminals = np.isin(np.arange(1000), (9, 609, 709))  # 609: a fall at the limit, no time limit
    data = load(write(tmp_path / "d.hdf5", rows(1000, timeouts=None, terminals=terminals)))
    assert sorted({*range(1000)} - {*data["obs"][:, 0].int().tolist()}) == [309, 999]
    assert data["obs"][data["terminated"]][:, 0].tolist() == [9, 609, 709]
    assert data["starts"][:, 0].tolist() == [0, 10, 310, 610, 710]


def test_actions_of_other_bounds_are_rescaled(tmp_path):
    """Bounds -1 and 1: as stored, a rounding outside is cut. Pendulum's -2 and 2: halved."""
    action = rows()["actions"].copy()
    action[3] = 1.0005, -1.0005
    data = load(write(tmp_path / "d.hdf5", rows(actions=action)))
    assert data["action"][3].tolist() == [1, -1]
    assert torch.equal(data["action"][:3], torch.from_numpy(rows()["actions"][:3]))
    wide = rows(observations=np.zeros((11, 3)), actions=np.linspace(-2, 2, 11)[:, None])
    data = load(write(tmp_path / "p.hdf5", wide), "Pendulum-v1")
    assert data["action"][:3, 0].tolist() == pytest.approx([-1, -0.8, -0.6])


def test_counts_and_score(tmp_path, capsys):
    """The score is that of the whole episodes: the cut tail, 9 + 10, must not count."""
    path = write(tmp_path / "d.hdf5", rows())
    source = load(path)["source"]
    score = 100 * (np.mean([3, 12, 6, 15]) - 23.85) / (161.86 - 23.85)
    assert source.pop("data_score") == pytest.approx(score)
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert source == dict(dataset=path, sha256=sha256, rows=11)
    line = f"{path}: 11 rows, 4 whole episodes with a mean score of {score:.1f}"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_bundled_sample():
    path = Path(__file__).parent / "data/maze2d-medium-v1-sample.hdf5"
    data = load(path, "maze2d-medium-v1")
    assert len(data["obs"]) == 100_000 - 608 - 1 and len(data["starts"]) == 609
    way = (data["next_obs"] - data["obs"])[:, :2].abs().max()
    assert way < 0.0524  # m: the top speed of 5.226 m/s for 0.01 s; another episode is far away
    follows = data["next_row"] >= 0
    assert torch.equal(data["next_obs"][follows], data["obs"][data["next_row"][follows]])


# --- Minari ---


def minari_rows():
    """Two episodes as Minari stores them: T + 1 observations, T of the rest. 3 and 2 steps."""
    for first, steps, end in ((0, 3, "terminations"), (10, 2, "truncations")):
        last = np.arange(steps) == steps - 1
        episode = dict(observations=np.repeat(np.arange(first, first + steps + 1.0), 4))
        episode["observations"] = episode["observations"].reshape(-1, 4)
        episode |= dict(actions=np.full((steps, 2), 0.1 * first / 10), rewards=np.ones(steps))
        yield episode | dict(terminations=last & False, truncations=last & False) | {end: last}


def assert_minari(data):
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 10]  # 11 was at the time limit
    assert data["next_obs"][:, 0].tolist() == [1, 2, 3, 11] and data["has_next"].all()
    assert data["terminated"].tolist() == [False, False, True, False]
    assert data["action"][:, 0].tolist() == pytest.approx([0, 0, 0, 0.1])
    assert data["next_row"].tolist() == [1, 2, -1, -1] and data["starts"][:, 0].tolist() == [0, 10]


def write_minari(path, episodes):
    with h5py.File(path, "w") as file:
        for i, episode in enumerate(episodes):
            for key, value in episode.items():
                file[f"episode_{i}/{key}"] = value
    return path


def test_minari_layout(tmp_path):
    assert_minari(load(write_minari(tmp_path / "main_data.hdf5", minari_rows())))


def test_minari_episodes_stand_apart_and_in_order(tmp_path):
    """10 comes after 9, not after 1; and where one has no flags, the file still says its end."""
    episodes = list(minari_rows()) * 6
    for i, episode in enumerate(episodes):
        episode = episode | {"observations": np.full_like(episode["observations"], i)}
        episodes[i] = episode | {"truncations": np.zeros(2, bool)} if i == 3 else episode
    data = load(write_minari(tmp_path / "main_data.hdf5", episodes))
    assert data["starts"][:, 0].tolist() == list(range(12))
    row, follower = torch.arange(len(data["obs"])), data["next_row"]
    assert (data["obs"][follower] == data["obs"][row])[follower >= 0].all()


@pytest.mark.filterwarnings("ignore")  # minari's own
def test_minari_package(tmp_path, monkeypatch):
    """What the package itself writes."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = ampl.make_env(MAZE)
    spaces = dict(observation_space=env.observation_space, action_space=env.action_space)
    buffers = [EpisodeBuffer(id=i, **episode) for i, episode in enumerate(minari_rows())]
    minari.create_dataset_from_buffers("hand/made-v0", buffers, **spaces)
    assert_minari(load(tmp_path / "hand/made-v0/data/main_data.hdf5"))


def test_dictionary_observations_are_refused(tmp_path):
    """As PointMaze's of Minari are: observation, achieved_goal, desired_goal."""
    parts = {"observations/observation": np.zeros((4, 4)), "rewards": np.zeros(3)}
    assert "dictionaries" in refusal(load, write_minari(tmp_path / "main_data.hdf5", [parts]))


# --- finding and downloading ---


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A dataset server on this machine; it sends `cut` bytes of `body`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body[: server.cut])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body = Path(write(tmp_path / "origin.hdf5", rows())).read_bytes()
        server.requests, server.cut, server.status = 0, None, 200
        server.url = f"http://127.0.0.1:{server.server_port}/maze.hdf5"
        server.folder = tmp_path / "new" / "cache"
        tables = lambda: {"DATASET_URLS": dict.fromkeys([MAZE, "pen-human-v1"], server.url)}
        monkeypatch.setattr(ampl, "d4rl_tables", tables)
        monkeypatch.setenv("D4RL_DATASET_DIR", str(server.folder))
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_search_order(server, tmp_path, monkeypatch):
    """--dataset-path, then D4RL's folder, then its server; each hit ends the search."""
    own = write(tmp_path / "own.hdf5", rows())
    assert ampl.find_dataset(ampl.Args(MAZE, dataset_path=own)) == Path(own)
    assert server.requests == 0 and not server.folder.exists()
    for _ in range(2):
        assert ampl.find_dataset(ampl.Args(MAZE)).read_bytes() == server.body
    assert server.requests == 1 and os.listdir(server.folder) == ["maze.hdf5"]
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".d4rl/datasets"
    assert ampl.find_dataset(ampl.Args(MAZE)) == home / "maze.hdf5"
    write(home / "Pendulum-v1.hdf5", rows())  # the folder may hold one's own, too
    assert ampl.find_dataset(ampl.Args("Pendulum-v1")) == home / "Pendulum-v1.hdf5"
    assert "--dataset-path" in refusal(ampl.find_dataset, ampl.Args("Hopper-v4"))


@pytest.mark.parametrize("manners", [
    dict(cut=900), dict(body=b"<html>please log in</html>"), dict(body=b""), dict(status=404),
    dict(url="http://127.0.0.1:9/maze.hdf5"),  # nobody listens there
])  # fmt: skip
def test_a_bad_download_leaves_nothing_behind(manners, server):
    """No part of it gets the name of the dataset. One sentence says what helps: not collect.py."""
    good = {name: getattr(server, name) for name in manners}
    vars(server).update(manners)
    message = refusal(ampl.find_dataset, ampl.Args("pen-human-v1"))
    words = "pen-human-v1", server.url, str(server.folder / "maze.hdf5"), "--dataset-path"
    for word in (
        *words,
        "minari download D4RL/pen/human-v2",
        "D4RL/pen/human-v2/data/main_data.hdf5",
    ):
        assert word in message
    assert "collect.py makes one anew" in refusal(ampl.find_dataset, ampl.Args(MAZE))
    assert "collect" not in message and not os.listdir(server.folder)
    vars(server).update(good)
    assert ampl.find_dataset(ampl.Args("pen-human-v1")).read_bytes() == server.body
