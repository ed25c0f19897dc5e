"""Datasets: which rows become which transitions, what is refused."""

import hashlib
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import ampl

MAZE = "maze2d-umaze-v1"  # 4 numbers an observation, 2 an action, 300 steps; quick to make


def rows(size=11, **changes):
    """D4RL's arrays, row i with observation (i, i, i, i); `changes` replace keys, None removes.

    Episodes: 0 to 2 ends in a terminal, 3 to 5 and 6 at a time limit, 7 and 8 in a terminal; 9 and
    10 are cut.
    """
    number = np.arange(size)
    data = {
        "observations": np.repeat(number.astype(np.float32)[:, None], 4, 1),
        "actions": np.linspace(-1, 1, 2 * size, dtype=np.float32).reshape(size, 2),
        "rewards": number.astype(np.float32),
        "terminals": np.isin(number, (2, 8)),
        "timeouts": np.isin(number, (5, 6)),
    }
    data.update(changes)
    return {key: value for key, value in data.items() if value is not None}


def write(path, data):
    """An HDF5 file of these arrays. -> its path as text"""
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
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


# --- rows ---


def test_the_example_of_six_rows(tmp_path):
    """Letters a to f as numbers 0 to 5: the tables above `to_transitions`."""
    a, b, c, d, e, f = range(6)
    terminals = np.arange(6) == c
    timeouts = np.arange(6) == e
    data = load(write(tmp_path / "d.hdf5", rows(6, terminals=terminals, timeouts=timeouts)))
    assert data["obs"][:, 0].tolist() == [a, b, c, d]
    assert data["next_obs"][:, 0].tolist() == [b, c, c, e]
    assert data["terminated"].tolist() == [False, False, True, False]
    assert data["has_next"].tolist() == [True, True, False, True]
    assert data["next_row"].tolist() == [1, 2, -1, -1]
    assert data["starts"][:, 0].tolist() == [a, d, f]

    # With stored next observations every row has its s', and the cut row f is a transition, too.
    raw = rows(6, terminals=terminals, timeouts=timeouts)
    raw["next_observations"] = raw["observations"] + 0.5
    data = load(write(tmp_path / "e.hdf5", raw))
    assert data["obs"][:, 0].tolist() == [a, b, c, d, f]
    assert data["next_obs"][:, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 5.5]
    assert data["has_next"].all()
    assert data["next_row"].tolist() == [1, 2, -1, -1, -1]


def test_without_stored_next_observations(tmp_path):
    """s' is the next row's state, never across the end of an episode."""
    data = load(write(tmp_path / "d.hdf5", rows()))
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 3, 4, 7, 8, 9]  # not 5, 6, and not the cut 10
    assert data["next_obs"][:, 0].tolist() == [1, 2, 2, 4, 5, 8, 8, 10]  # not 3 after 2, 9 after 8
    assert data["terminated"].tolist() == [False, False, True, False, False, False, True, False]
    assert data["has_next"].tolist() == [True, True, False, True, True, True, False, True]
    assert data["next_row"].tolist() == [1, 2, -1, 4, -1, 6, -1, -1]
    assert data["reward"].tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert data["action"].tolist() == rows()["actions"][[0, 1, 2, 3, 4, 7, 8, 9]].tolist()
    assert data["starts"].tolist() == [[0] * 4, [3] * 4, [6] * 4, [7] * 4, [9] * 4]
    for key in ("obs", "action", "reward", "next_obs", "starts"):
        assert data[key].dtype == torch.float32


def test_with_stored_next_observations(tmp_path):
    """Then s' of a terminal and of the last row are known, and are the stored ones."""
    stored = rows()["observations"] + 0.5
    data = load(write(tmp_path / "d.hdf5", rows(next_observations=stored)))
    assert data["next_obs"][:, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 7.5, 8.5, 9.5, 10.5]
    assert torch.equal(data["next_obs"], data["obs"] + 0.5)
    assert data["has_next"].all()
    assert data["next_row"].tolist() == [1, 2, -1, 4, -1, 6, -1, 8, -1]


def test_rows_with_both_flags_and_a_terminal_at_the_end(tmp_path):
    """The time limit wins, as in D4RL's loader; a terminal needs no s', so the last row stays."""
    terminals = np.isin(np.arange(11), (2, 8, 10)).astype(np.float64)[:, None]  # a column of 0, 1
    timeouts = np.isin(np.arange(11), (2, 5, 6)).astype(np.uint8)
    data = load(write(tmp_path / "d.hdf5", rows(terminals=terminals, timeouts=timeouts)))
    assert data["obs"][:, 0].tolist() == [0, 1, 3, 4, 7, 8, 9, 10]
    assert data["terminated"].tolist() == [False, False, False, False, False, True, False, True]
    assert data["has_next"].tolist() == [True, True, True, True, True, False, True, False]
    assert data["next_row"].tolist() == [1, -1, 3, -1, 5, -1, 7, -1]
    assert data["next_obs"][:, 0].tolist() == [1, 2, 4, 5, 8, 8, 10, 10]


def test_a_file_without_timeouts(tmp_path):
    """Episodes end where the task's 300 steps are over, counted from the last end."""
    terminals = np.isin(np.arange(1000), (9, 609, 709))  # 609: a fall at the limit, no time limit
    data = load(write(tmp_path / "d.hdf5", rows(1000, timeouts=None, terminals=terminals)))
    dropped = set(range(1000)) - set(data["obs"][:, 0].int().tolist())
    assert dropped == {309, 999}
    assert data["obs"][data["terminated"]][:, 0].tolist() == [9, 609, 709]
    assert data["starts"][:, 0].tolist() == [0, 10, 310, 610, 710]


def test_a_file_without_terminals(tmp_path):
    """Then no row is one, and the time limits end the episodes."""
    data = load(write(tmp_path / "d.hdf5", rows(terminals=None)))
    assert not data["terminated"].any()
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert data["next_obs"][:, 0].tolist() == [1, 2, 3, 4, 5, 8, 9, 10]


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


def test_arrays_instead_of_a_file(tmp_path):
    """They give the same transitions, and are not changed."""
    from_file = load(write(tmp_path / "d.hdf5", rows()))
    arrays = rows(rewards=np.arange(11))  # whole numbers
    before = {key: value.copy() for key, value in arrays.items()}
    from_arrays = ampl.load_dataset(ampl.Args(env_id=MAZE), arrays)
    assert from_file.keys() == from_arrays.keys()
    for key in from_file.keys() - {"source"}:
        assert torch.equal(from_file[key], from_arrays[key])
    assert from_arrays["source"]["dataset"] == "arrays"
    other = ampl.load_dataset(ampl.Args(env_id=MAZE), rows(rewards=2 * np.arange(11)))
    assert other["source"]["sha256"] != from_arrays["source"]["sha256"]
    for key, value in before.items():
        assert np.array_equal(arrays[key], value)
        assert arrays[key].dtype == value.dtype


def test_counts_and_score(tmp_path, capsys):
    """The score is that of the whole episodes: the cut tail, 9 + 10, must not count."""
    path = write(tmp_path / "d.hdf5", rows())
    source = load(path)["source"]
    # Returns 0 + 1 + 2, 3 + 4 + 5, 6 and 7 + 8; D4RL's references of maze2d-umaze.
    score = 100 * (np.mean([3, 12, 6, 15]) - 23.85) / (161.86 - 23.85)
    assert source["data_score"] == pytest.approx(score)
    assert source["dataset"] == path
    assert source["obtained_from"] == "a local file (no sha256 is known to compare it with)"
    assert source["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert source["rows"] == 11
    line = f"{path}: 11 rows, 4 whole episodes, their mean normalized score {score:.1f}"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_bundled_sample():
    """Steps are as short as the ball's top speed allows; another episode would be far away."""
    path = Path(__file__).parent / "data/maze2d-medium-v1-sample.hdf5"
    data = load(path, "maze2d-medium-v1")
    assert len(data["obs"]) == 100_000 - 608 - 1  # 608 time limits, and the last row
    assert len(data["starts"]) == 609
    way = (data["next_obs"] - data["obs"])[:, :2].abs().max()
    assert way < 0.0524  # m: 5.226 m/s for 0.01 s
    follows = data["next_row"] >= 0
    assert torch.equal(data["next_obs"][follows], data["obs"][data["next_row"][follows]])


# --- Minari ---


def minari_episode(first, steps, terminated):
    """An episode as Minari stores it: observations first, first + 1, ..., one more than steps."""
    observations = np.arange(first, first + steps + 1.0)
    is_last = np.arange(steps) == steps - 1
    never = np.zeros(steps, bool)
    return {
        "observations": np.repeat(observations[:, None], 4, 1),
        "actions": np.full((steps, 2), first / 100),
        "rewards": np.arange(first, first + steps),
        "terminations": is_last if terminated else never,
        "truncations": never if terminated else is_last,
    }


def two_episodes():
    """Three steps that end in a terminal, and two that end at a time limit."""
    return [minari_episode(0, 3, terminated=True), minari_episode(10, 2, terminated=False)]


def write_minari(path, episodes):
    with h5py.File(path, "w") as file:
        for i, episode in enumerate(episodes):
            for key, value in episode.items():
                file[f"episode_{i}/{key}"] = value
    return path


def assert_two_episodes(data):
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 10]  # 11 was at the time limit
    assert data["next_obs"][:, 0].tolist() == [1, 2, 3, 11]
    assert data["has_next"].all()
    assert data["terminated"].tolist() == [False, False, True, False]
    assert data["action"][:, 0].tolist() == pytest.approx([0, 0, 0, 0.1])
    assert data["next_row"].tolist() == [1, 2, -1, -1]
    assert data["starts"][:, 0].tolist() == [0, 10]


def test_minari_layout(tmp_path):
    assert_two_episodes(load(write_minari(tmp_path / "main_data.hdf5", two_episodes())))


def test_minari_episodes_stand_apart_and_in_order(tmp_path):
    """10 comes after 9, not after 1; and where one has no flags, the file still says its end."""
    episodes = []
    for i in range(12):
        episode = two_episodes()[i % 2]
        episode["observations"] = np.full_like(episode["observations"], i)
        episodes.append(episode)
    episodes[3]["truncations"] = np.zeros(2, bool)
    data = load(write_minari(tmp_path / "main_data.hdf5", episodes))
    assert data["starts"][:, 0].tolist() == list(range(12))
    follows = data["next_row"] >= 0
    assert torch.equal(data["obs"][follows], data["obs"][data["next_row"][follows]])


@pytest.mark.filterwarnings("ignore")  # minari's own
def test_minari_package(tmp_path, monkeypatch):
    """What the package itself writes."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = ampl.make_env(MAZE)
    buffers = [EpisodeBuffer(id=i, **episode) for i, episode in enumerate(two_episodes())]
    minari.create_dataset_from_buffers(
        "hand/made-v0",
        buffers,
        observation_space=env.observation_space,
        action_space=env.action_space,
    )
    assert_two_episodes(load(tmp_path / "hand/made-v0/data/main_data.hdf5"))


# --- what is refused ---


def with_nan(array, row):
    array = array.copy()
    array[row] = np.nan
    return array


REFUSED = {
    "another task": (
        {"observations": np.zeros((11, 5))},
        "observations are .11, 5. and not .11, 4",
    ),
    "rows missing": ({"actions": rows()["actions"][:9]}, "actions are .9, 2. and not .11, 2"),
    "stored s' of another shape": (
        {"next_observations": np.zeros((9, 4))},
        "next_observations are",
    ),
    "no rewards": ({"rewards": None}, "missing, cut or no D4RL file .*rewards"),
    "NaN": ({"rewards": with_nan(rows()["rewards"], 7)}, "rewards holds NaN .* row 7"),
    "infinity": ({"observations": np.full((11, 4), np.inf)}, "infinity, first in row 0"),
    "an action outside": ({"actions": np.full((11, 2), 1.1)}, "row 0 leaves the action space"),
    "text": ({"rewards": np.array(11 * [b"one"])}, "no D4RL file"),
    "no episode that ends": ({"terminals": np.zeros(11), "timeouts": np.zeros(11)}, "two episodes"),
    "equal rewards": ({"rewards": np.ones(11)}, "all rewards .*equal"),
    "equal rewards but where s' is unknown": (
        {"rewards": np.isin(np.arange(11), (2, 8))},
        "all rewards .*equal",
    ),
    "time limits only": ({"timeouts": np.ones(11)}, "four rows not at a limit"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused_files(changes, message, tmp_path):
    """In one sentence that names the file."""
    path = write(tmp_path / "d.hdf5", rows(**changes))
    sentence = refusal(load, path)
    assert path in sentence
    assert re.search(message, sentence)


def test_files_that_are_none(tmp_path):
    """No file, and one that is no HDF5."""
    assert "no D4RL file" in refusal(load, tmp_path / "missing.hdf5")
    (tmp_path / "page.hdf5").write_text("<html>please log in</html>")
    assert "no D4RL file" in refusal(load, tmp_path / "page.hdf5")


def test_dictionary_observations_are_refused(tmp_path):
    """As PointMaze's of Minari are: observation, achieved_goal, desired_goal."""
    parts = {"observations/observation": np.zeros((4, 4)), "rewards": np.zeros(3)}
    path = write_minari(tmp_path / "main_data.hdf5", [parts])
    assert "dictionaries" in refusal(load, path)
