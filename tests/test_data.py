"""Datasets: which rows become which transitions, what is refused."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

import ampl
import combo
import mopo
from small import build_ampl

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


def test_the_example_of_six_rows():
    """Letters a to f as numbers 0 to 5: the tables above `to_transitions`."""
    a, b, c, d, e, f = range(6)
    terminals = np.arange(6) == c
    timeouts = np.arange(6) == e
    data = ampl.to_transitions(rows(6, terminals=terminals, timeouts=timeouts))
    assert data["obs"][:, 0].tolist() == [a, b, c, d]
    assert data["next_obs"][:, 0].tolist() == [b, c, c, e]
    assert data["terminated"].tolist() == [False, False, True, False]
    assert data["has_next"].tolist() == [True, True, False, True]
    assert data["next_row"].tolist() == [1, 2, -1, -1]
    assert data["starts"][:, 0].tolist() == [a, d, f]

    # With stored next observations every row has its s', and the cut row f is a transition, too.
    raw = rows(6, terminals=terminals, timeouts=timeouts)
    raw["next_observations"] = raw["observations"] + 0.5
    data = ampl.to_transitions(raw)
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
    """The terminal wins and keeps its reward; it needs no s', so the last row stays, too."""
    terminals = np.isin(np.arange(11), (2, 8, 10)).astype(np.float64)[:, None]  # a column of 0, 1
    timeouts = np.isin(np.arange(11), (2, 5, 6)).astype(np.uint8)
    data = load(write(tmp_path / "d.hdf5", rows(terminals=terminals, timeouts=timeouts)))
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]
    assert data["reward"].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]
    assert data["obs"][data["terminated"]][:, 0].tolist() == [2, 8, 10]
    assert data["obs"][~data["has_next"]][:, 0].tolist() == [2, 8, 10]
    assert data["next_row"].tolist() == [1, 2, -1, 4, -1, 6, -1, 8, -1]
    assert data["next_obs"][:, 0].tolist() == [1, 2, 2, 4, 5, 8, 8, 10, 10]


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


AT = {  # rows as flags of 650; an episode of the maze has 300 steps
    "ends": np.isin(np.arange(650), (9, 309, 319)),  # after 10, 300 and 10 steps
    "falls": np.isin(np.arange(650), (9, 319)),
    "limits": np.isin(np.arange(650), (309,)),
}
# Keys of a file -> its terminals, and its time limits: 309 and, where they are counted, 619.
ENDS = [
    ({"terminals": "falls", "timeouts": "limits"}, [9, 319], [309]),
    ({"terminations": "falls", "truncations": "limits"}, [9, 319], [309]),
    ({"terminals": "falls", "truncations": "limits"}, [9, 319], [309]),
    ({"terminals": "ends", "timeouts": "limits"}, [9, 309, 319], []),  # a row with both
    ({"dones": "ends"}, [9, 319], [309, 619]),
    ({"done": "ends"}, [9, 319], [309, 619]),
    ({"dones": "falls"}, [9, 319], [309, 619]),  # another library's dones, without time limits
    ({"dones": "ends", "terminals": "falls"}, [9, 319], [309, 619]),
    ({"dones": "falls", "terminals": "falls"}, [9, 319], [309, 619]),
    ({"dones": "ends", "timeouts": "limits"}, [9, 319], [309]),
    ({"dones": "falls", "truncations": "limits"}, [9, 319], [309]),
    ({"dones": "ends", "terminals": "falls", "timeouts": "limits"}, [9, 319], [309]),
    ({"terminations": "falls"}, [9, 319], [309, 619]),
    ({}, [], [299, 599]),
]


@pytest.mark.parametrize("keys, terminals, limits", ENDS)
def test_what_ends_are_called(keys, terminals, limits, tmp_path, capsys):
    """By any of their names they are the same ends; the line of the rows says which were read."""
    own = {key: AT[name] for key, name in keys.items()}
    own = {"terminals": None, "timeouts": None} | own
    data = load(write(tmp_path / "d.hdf5", rows(650, **own)))
    assert data["obs"][data["terminated"]][:, 0].tolist() == terminals
    dropped = set(range(650)) - set(data["obs"][:, 0].int().tolist())
    assert dropped == {*limits, 649}
    starts = sorted(row + 1 for row in terminals + limits)
    assert data["starts"][:, 0].tolist() == [0, *starts]
    printed = capsys.readouterr().out
    assert f"650 rows, {len(terminals)} terminals and {len(limits)} time limits" in printed
    if keys:
        assert f"(from {', '.join(sorted(keys, key=list(ampl.END_KINDS).index))})" in printed
    alone = keys.keys() <= {"dones", "done"} and len(keys) > 0
    assert ("an end after 300 steps is taken for a time limit, any other" in printed) == alone


def test_the_line_of_the_rows(tmp_path, capsys):
    """Always one: rows, terminals, time limits, what was dropped and why, unused keys."""
    path = write(tmp_path / "d.hdf5", rows(pixels=np.zeros((11, 2)), note=np.zeros(3)))
    load(path)
    line = (
        "11 rows, 2 terminals and 2 time limits (from terminals, timeouts); "
        "3 dropped (2 at a time limit, the last for its s' is not stored); "
        "2 kept without a known s'; keys not used: note, pixels"
    )
    assert line in capsys.readouterr().out.splitlines()


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


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 0.01), (-500, 500), (2, 1002)])
def test_how_far_outside_an_action_may_be(low, high):
    """A twentieth of a percent of the range, however wide it is."""
    box = gymnasium.spaces.Box(low, high, (1,))
    width = high - low
    near = np.array([[low - 0.0004 * width], [high + 0.0004 * width]], np.float32)
    assert ampl.unit_actions(Path("d"), near, box).tolist() == [[-1], [1]]
    for far in (low - 0.0006 * width, high + 0.0006 * width):
        sentence = refusal(ampl.unit_actions, Path("d"), np.array([[far]], np.float32), box)
        assert "the action in row 0 leaves the action space" in sentence


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
    assert line in capsys.readouterr().out.splitlines()


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


# --- what is taken, but said ---


def next_rows(wrong=()):
    """Observation i + 1 for row i, but at some rows another."""
    stored = rows()["observations"] + 1
    stored[list(wrong)] += 2
    return stored


LARGE = 1e6 + rows()["observations"].astype(np.float64) / 100
# Changes of sound arrays, and what is said. Rows 0, 1, 3, 4, 7 and 9 are followed by their s'.
SAID = {
    "another s' once": (
        {"next_observations": next_rows([4])},
        "note: 16.67% of the rows within episodes have next_observations that are not the obs",
    ),
    "other s'": ({"next_observations": next_rows(range(11))}, "note: 100.00% of the rows within"),
    "all terminals at the limit": (
        {"size": 650, "terminals": np.isin(np.arange(650), (299, 599)), "timeouts": None},
        "note: all 2 terminals stand at step 300, the task's time limit",
    ),
    "a large offset": (
        {"observations": LARGE},
        "note: entries of observations .0, 1, 2, 3. are so far from 0 that float32 rounds off",
    ),
    "rewards with an offset": ({"rewards": LARGE[:, 0]}, "note: entries of rewards .0. are so far"),
}
NOT_SAID = [
    {},
    {"next_observations": next_rows()},
    {"next_observations": next_rows([2, 5, 6, 8, 10])},  # ends, and the last row
    {"next_observations": next_rows() + 1e-5},
    {"size": 650, "terminals": np.isin(np.arange(650), (9, 309)), "timeouts": None},
    {"observations": LARGE.astype(np.float32)},  # nothing is lost any more
    {"observations": LARGE - 1e6},
    {"observations": np.full((11, 4), 0.1)},
]


@pytest.mark.parametrize("changes, line", SAID.values(), ids=SAID.keys())
def test_what_is_said(changes, line, tmp_path, capsys):
    """In one line."""
    load(write(tmp_path / "d.hdf5", rows(**changes)))
    said = [text for text in capsys.readouterr().out.splitlines() if re.search(line, text)]
    assert len(said) == 1


@pytest.mark.parametrize("changes", NOT_SAID)
def test_what_is_not_said(changes, tmp_path, capsys):
    load(write(tmp_path / "d.hdf5", rows(**changes)))
    assert not re.search("within episodes|terminals stand|rounds off", capsys.readouterr().out)


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
    """Three steps that end in a terminal, and three that end at a time limit."""
    return [minari_episode(0, 3, terminated=True), minari_episode(10, 3, terminated=False)]


def write_minari(path, episodes):
    with h5py.File(path, "w") as file:
        for i, episode in enumerate(episodes):
            for key, value in episode.items():
                file[f"episode_{i}/{key}"] = value
    return path


def assert_two_episodes(data):
    assert data["obs"][:, 0].tolist() == [0, 1, 2, 10, 11]  # 12 was at the time limit
    assert data["next_obs"][:, 0].tolist() == [1, 2, 3, 11, 12]
    assert data["has_next"].all()
    assert data["terminated"].tolist() == [False, False, True, False, False]
    assert data["action"][:, 0].tolist() == pytest.approx([0, 0, 0, 0.1, 0.1])
    assert data["next_row"].tolist() == [1, 2, -1, 4, -1]
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
    episodes[3]["truncations"] = np.zeros(3, bool)
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


# --- scales ---

MAZE_ENTRIES = {"obs": 4, "action": 2}
# What the last entry of every observation or action is: a value, and noise around it.
STILL = [
    ("obs", 0.0, 0.0),
    ("obs", 7.3, 0.0),
    ("obs", 0.0, 1e-7),
    ("obs", 5.0, 1e-6),
    ("obs", 0.0, 1e-5),
    ("obs", 0.0, 1e-4),
    ("action", 0.0, 0.0),
    ("action", 0.0, 1e-7),
    ("action", -0.5, 1e-5),
    ("action", 1.0, 1e-4),
]
FITTED = {
    ampl.AMPL: {"model_epoch_steps": 30, "rollout_rows": 2000, "buffer_size": 2000},
    mopo.MOPO: {"rollout_starts": 400, "horizon": 5},
    combo.COMBO: {"rollout_starts": 400, "horizon": 5},
}


def moving_point(name, value, noise):
    """D4RL's arrays of a point that the actions push about, but for an entry that hardly varies."""
    random = np.random.default_rng(0)
    action = random.uniform(-1, 1, (600, 2))
    obs = np.zeros((601, 4))
    if name == "action":
        action[:, -1] = (value + noise * random.standard_normal(600)).clip(-1, 1)
    for row in range(600):
        obs[row + 1, :2] = (obs[row, :2] + 0.1 * action[row]).clip(-1, 1)
        obs[row + 1, 2:] = action[row]
    if name == "obs":
        obs[:, -1] = value + noise * random.standard_normal(601)
    return {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        "actions": action,
        "rewards": -np.abs(obs[1:, :2]).sum(1),
        "terminals": np.zeros(600),
        "timeouts": np.arange(600) % 30 == 29,
    }


@pytest.mark.parametrize("method", FITTED, ids=lambda method: method.__name__)
@pytest.mark.parametrize("name, value, noise", STILL)
def test_entries_that_hardly_vary(name, value, noise, method, capsys):
    """Imagined rewards stay within FAR_REWARD ranges of the data's, and few rollouts end."""
    script = sys.modules[method.__module__]
    small = {"model_max_epochs": 3, "model_hidden": 32, "holdout_size": 50, "hidden": (16, 16)}
    args = script.Args(env_id=MAZE, cuda=False, **small, **FITTED[method])
    dataset = script.load_dataset(args, moving_point(name, value, noise))
    entry = MAZE_ENTRIES[name] - 1
    line = f"1 of {entry + 1} entries of {name} ({entry}) vary by less than 0.001"
    assert line in capsys.readouterr().out
    point = method(args, 4, 2, torch.device("cpu"))
    point.set_data(dataset)
    options = [0, torch.ones(len(point.data))] if method is ampl.AMPL else []
    point.fit_model(*options, lambda *report: None)
    ended = point.rollout()["rollout/terminated_frac"]
    assert ended < 0.2
    script.note_odd_rollouts(point, ended.item())
    assert capsys.readouterr().out == ""
    reward = point.split(point.data).reward
    imagined = point.split(point.model_data[: point.num_model_rows]).reward
    room = script.FAR_REWARD * (reward.max() - reward.min())
    assert reward.min() - room < imagined.min()
    assert imagined.max() < reward.max() + room


def test_odd_rollouts_are_noted(capsys):
    """Most steps end; a reward 11 ranges beyond the data's."""
    method = build_ampl()
    capsys.readouterr()
    ampl.note_odd_rollouts(method, 0.5)
    assert capsys.readouterr().out == ""
    ampl.note_odd_rollouts(method, 0.51)
    assert "51% of the imagined steps end" in capsys.readouterr().out
    method.model_data[3, 5] = -11.0  # the data's are from 0 to 1
    ampl.note_odd_rollouts(method, 0.1)
    assert "an imagined reward is -11, the data's are from 0.0" in capsys.readouterr().out


class Guesses:
    """Stands for elites that predict the data, but for one entry, which they draw at random."""

    def __init__(self, batch, entry):
        self.reward = batch.reward.clone()
        self.next_obs = batch.next_obs.clone()
        order = torch.randperm(len(self.reward), generator=torch.Generator().manual_seed(0))
        if entry == "reward":
            self.reward = self.reward[order]
        elif entry is not None:
            change = (batch.next_obs - batch.obs)[order]
            self.next_obs[:, entry] = (batch.obs + change)[:, entry]

    def sample(self, obs, action):
        torch.rand(9)  # as a model draws
        return self.reward, self.next_obs


GUESSED = [
    (None, None),
    ("reward", "note: the model hardly predicts reward: "),
    (2, "note: the model hardly predicts 1 of 3 entries of next_obs (2): "),
]


@pytest.mark.parametrize("entry, sentence", GUESSED)
def test_what_the_model_does_not_predict_is_noted(entry, sentence, capsys):
    """After the fit, in one line, without a random number of the run's."""
    method = build_ampl()
    batch = method.split(method.data[method.rows_with_next])
    object.__setattr__(method, "elites", Guesses(batch, entry))
    state = torch.get_rng_state()
    capsys.readouterr()
    ampl.note_unpredicted(method)
    printed = capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    assert printed.startswith(sentence or "")
    assert printed.count("\n") == (0 if sentence is None else 1)


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
    "no rewards": (
        {"rewards": None},
        "expected observations, actions, rewards, .* found actions, observations, terminals",
    ),
    "NaN": ({"rewards": with_nan(rows()["rewards"], 7)}, "rewards holds NaN .* row 7"),
    "infinity": ({"observations": np.full((11, 4), np.inf)}, "infinity, first in row 0"),
    "an action outside": ({"actions": np.full((11, 2), 1.1)}, "row 0 leaves the action space"),
    "text": ({"rewards": np.array(11 * [b"one"])}, "rewards are of type .S3 and not numbers"),
    "NaN as a flag": ({"terminals": np.full(11, np.nan)}, "terminals must be 0 or 1, but row 0"),
    "a small flag": (
        {"timeouts": np.where(np.arange(11) == 5, 0.001, 0)},
        "timeouts must be 0 or 1, but row 5 holds 0.001",
    ),
    "a negative flag": (
        {"terminals": -(np.arange(11) == 5).astype(int)},
        "must be 0 or 1, but row 5 holds -1",
    ),
    "flags as text": ({"terminals": np.array(11 * [b"False"])}, "terminals are .* not 11 flags"),
    "too few flags": ({"terminals": np.zeros(9)}, "terminals are .9,. .* not 11 flags"),
    "an unknown end": ({"is_done": np.zeros(11)}, "is_done looks like the ends of episodes"),
    "an unknown terminal": ({"Terminated": np.zeros(11)}, "Terminated looks like the ends"),
    "an unknown limit": ({"trunc": np.zeros(11)}, "trunc looks like the ends"),
    "two names of one": (
        {"terminations": np.zeros(11)},
        "of terminals, timeouts, terminations two say the same",
    ),
    "dones that contradict": (
        {"dones": np.arange(11) == 4},
        "row 4 is done, but neither a terminal nor at a time limit",
    ),
    "no episode that ends": ({"terminals": np.zeros(11), "timeouts": np.zeros(11)}, "two episodes"),
    "equal rewards": ({"rewards": np.ones(11)}, "all rewards .*equal"),
    "equal rewards but where s' is unknown": (
        {"rewards": np.isin(np.arange(11), (2, 8))},
        "all rewards .*equal",
    ),
    "too few rows for a fit": (
        {"terminals": np.isin(np.arange(11), (0, 1, 2, 4, 6, 8)), "timeouts": np.zeros(11)},
        "4 rows have a known s', but a fit needs five",
    ),
    "time limits only": ({"timeouts": np.ones(11)}, "four rows not at a limit"),
    "an end that was never written": (
        {key: np.where(np.arange(11) < 9, value.T, 0).T for key, value in rows().items()},
        "the last rows are zeros in all arrays, as if never written",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused_files(changes, message, tmp_path):
    """In one sentence that names the file."""
    path = write(tmp_path / "d.hdf5", rows(**changes))
    sentence = refusal(load, path)
    assert path in sentence
    assert re.search(message, sentence)


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused_arrays(changes, message):
    """The same sentences where the arrays are given by hand."""
    arrays = rows(**changes)
    sentence = refusal(ampl.load_dataset, ampl.Args(env_id=MAZE), arrays)
    assert re.search(message.replace("actions, observations", "observations, actions"), sentence)


def on_a_graph(array):
    return torch.from_numpy(array).requires_grad_()


ODD_ARRAYS = [
    ({0: np.zeros(11)}, "arrays must be a dict with D4RL's keys"),
    ({"rewards": [[0.0], [1.0, 2.0]]}, "rewards make no NumPy array, convert them yourself"),
    ({"rewards": on_a_graph(rows()["rewards"])}, "rewards make no NumPy array"),
    ({"rewards": 1.0}, "rewards are .. and not one number per row"),
]


@pytest.mark.parametrize("changes, message", ODD_ARRAYS)
def test_arrays_that_are_none(changes, message):
    arrays = rows() | changes
    assert re.search(message, refusal(ampl.load_dataset, ampl.Args(env_id=MAZE), arrays))


def test_lists_and_tensors_are_arrays(tmp_path):
    arrays = {key: torch.from_numpy(value) for key, value in rows().items()}
    arrays["rewards"] = rows()["rewards"].tolist()
    from_file = load(write(tmp_path / "d.hdf5", rows()))
    given = ampl.load_dataset(ampl.Args(env_id=MAZE), arrays)
    for key in given.keys() - {"source"}:
        assert torch.equal(given[key], from_file[key])
    everything = list(rows().values())
    sentence = refusal(ampl.load_dataset, ampl.Args(env_id=MAZE), everything)
    assert "arrays must be a dict with D4RL's keys" in sentence


def no_file(path):
    pass


def a_folder(path):
    path.mkdir()


def a_pipe(path):
    os.mkfifo(path)


def a_page(path):
    path.write_text("<html>please log in</html>")


def cut(path):
    write(path, rows())
    path.write_bytes(path.read_bytes()[:-100])


def a_flipped_chunk(path):
    with h5py.File(path, "w") as file:
        for key, value in rows().items():
            file.create_dataset(key, data=value, chunks=value.shape, fletcher32=True)
        place = file["rewards"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def another_layout(path):
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = np.zeros((3, 2))
        file["mask/train"] = np.zeros(3)


def a_group(path):
    write(path, rows(observations=None))
    with h5py.File(path, "a") as file:
        file["observations/position"] = np.zeros((11, 2))


def external_link(path):
    write(path, rows(rewards=None))
    other = write(path.with_name("other.hdf5"), rows())
    with h5py.File(path, "a") as file:
        file["rewards"] = h5py.ExternalLink(other, "rewards")


def soft_link(path):
    write(path, rows(rewards=None))
    with h5py.File(path, "a") as file:
        file["rewards"] = h5py.SoftLink("/elsewhere")


def virtual_array(path):
    write(path, rows(rewards=None))
    other = write(path.with_name("other.hdf5"), rows())
    layout = h5py.VirtualLayout((11,), np.float32)
    layout[:] = h5py.VirtualSource(other, "rewards", (11,))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("rewards", layout)


def external_array(path):
    write(path, rows(rewards=None))
    with h5py.File(path, "a") as file:
        file.create_dataset("rewards", (11,), np.float32, external=[(b"/etc/hostname", 0, 44)])


def too_large(path, **options):
    write(path, rows(observations=None))
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", (10**12, 4), np.float32, **options)


def too_large_and_packed(path):
    too_large(path, chunks=(10**6, 4), compression="gzip")


def half_written(path):
    write(path, rows(observations=None))
    with h5py.File(path, "a") as file:
        written = file.create_dataset("observations", (11, 4), np.float32, chunks=(4, 4))
        written[:8] = 1.0


def a_half_chunk(path):
    write(path, rows(observations=None))
    with h5py.File(path, "a") as file:
        written = file.create_dataset("observations", (11, 4), np.float32, chunks=(4, 4))
        written[:] = 1.0
        written.id.write_direct_chunk((8, 0), bytes(32))


def a_chunk_that_unpacks_too_far(path):
    write(path, rows(observations=None))
    with h5py.File(path, "a") as file:
        shape = (2**27, 4)
        options = {"chunks": shape, "compression": "gzip"}
        packed = file.create_dataset("observations", shape, np.float32, **options)
        packed.id.write_direct_chunk((0, 0), b"not much")


def unknown_compression(path):
    write(path, rows(rewards=None))
    with h5py.File(path, "a") as file:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((11,))
        settings.set_filter(32999, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((11,))
        dataset = h5py.h5d.create(file.id, b"rewards", h5py.h5t.NATIVE_FLOAT, space, settings)
        dataset.write_direct_chunk((0,), b"packed")


def a_gap(path):
    write_minari(path, two_episodes() + two_episodes())
    with h5py.File(path, "a") as file:
        del file["episode_2"]


def no_first_episode(path):
    write_minari(path, two_episodes())
    with h5py.File(path, "a") as file:
        del file["episode_0"]


def a_linked_episode(path):
    write_minari(path, two_episodes())
    with h5py.File(path, "a") as file:
        del file["episode_1"]
        file["episode_1"] = h5py.ExternalLink("other.hdf5", "episode_1")


def an_episode_without_rewards(path):
    episodes = two_episodes()
    del episodes[1]["rewards"]
    write_minari(path, episodes)


def a_single_reward(path):
    episodes = two_episodes()
    episodes[1]["rewards"] = 1.0
    write_minari(path, episodes)


def a_missing_observation(path):
    episodes = two_episodes()
    episodes[0]["observations"] = episodes[0]["observations"][1:]
    write_minari(path, episodes)


BROKEN = [
    (no_file, "there is no "),
    (a_folder, "is a folder or a device and no file"),
    (a_pipe, "is a folder or a device and no file"),
    (a_page, "is no HDF5 file"),
    (cut, "is cut: fetch or copy it again"),
    (a_flipped_chunk, "cannot be read, or is damaged"),
    (another_layout, "another layout .*expected observations, actions, .* found data, mask"),
    (a_group, "observations is a group of arrays, such as position"),
    (external_link, "rewards is a link"),
    (soft_link, "rewards is a link"),
    (virtual_array, "rewards lies in other files"),
    (external_array, "rewards lies in other files"),
    (too_large, "observations has the shape .1000000000000, 4., but the file does not hold"),
    (too_large_and_packed, "observations has the shape .*does not hold so much"),
    (half_written, "observations has the shape .11, 4., but the file does not hold so much"),
    (a_half_chunk, "observations has the shape .11, 4., but the file does not hold so much"),
    (a_chunk_that_unpacks_too_far, "observations has the shape .*does not hold so much"),
    (unknown_compression, "rewards is compressed by .*pip install hdf5plugin"),
    (a_gap, "there are 3 episodes, but no episode_2"),
    (no_first_episode, "there are 1 episodes, but no episode_0"),
    (a_linked_episode, "episode_1 is a link"),
    (an_episode_without_rewards, "episode_1 has no rewards; found actions, observations"),
    (a_single_reward, "episode_1/rewards is a single value and not an array"),
    (a_missing_observation, "episode_0 needs as many actions and ends as rewards, one obs"),
]


@pytest.mark.parametrize(
    "broken, message", BROKEN, ids=lambda value: getattr(value, "__name__", value)
)
def test_broken_files(broken, message, tmp_path):
    """A sentence of its own for each, before memory is asked for."""
    path = tmp_path / "d.hdf5"
    broken(path)
    sentence = refusal(load, path)
    assert str(path) in sentence
    assert re.search(message, sentence)


def test_a_file_that_is_being_written(tmp_path):
    path = write(tmp_path / "d.hdf5", rows())
    hold = (
        "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print('open', flush=True); input()"
    )
    command = [sys.executable, "-c", hold, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        assert "is locked by a program that writes it" in refusal(load, path)
        writer.communicate(b"\n")
    load(path)


def test_a_file_that_changes_meanwhile(tmp_path, monkeypatch):
    """Its hash would not be that of the rows that were read."""
    path = write(tmp_path / "d.hdf5", rows())
    read_array = ampl.read_array

    def replace_and_read(path, group, key):
        other = write(path.with_name("other.hdf5"), rows(rewards=np.ones(11)))
        os.replace(other, path)
        return read_array(path, group, key)

    monkeypatch.setattr(ampl, "read_array", replace_and_read)
    assert "was changed while it was read" in refusal(load, path)


def test_what_is_not_needed_is_not_read(tmp_path, capsys):
    """A large array of another key, even one that cannot be read."""
    path = tmp_path / "d.hdf5"
    write(path, rows())
    with h5py.File(path, "a") as file:
        file.create_dataset("images", (10**12, 4), np.uint8)
        file["elsewhere"] = h5py.ExternalLink("none.hdf5", "none")
    load(path)
    assert "keys not used: elsewhere, images" in capsys.readouterr().out


def test_dictionary_observations_are_refused(tmp_path):
    """As PointMaze's of Minari are: observation, achieved_goal, desired_goal."""
    parts = two_episodes()[0]
    del parts["observations"]
    parts["observations/observation"] = np.zeros((4, 4))
    path = write_minari(tmp_path / "main_data.hdf5", [parts])
    assert "dictionaries" in refusal(load, path)
