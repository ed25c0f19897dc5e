"""diagnose.py: what it compares with the simulator, and its report on small runs."""

import importlib
import shutil
from types import SimpleNamespace

import diagnose
import h5py
import numpy as np
import pytest
import torch

import mopo

# Of all three scripts, and of each.
SMALL_RUN = {
    "env_id": "hopper-medium-v2",
    "cuda": False,
    "threads": 1,
    "hidden": (8, 8),
    "model_hidden": 8,
    "model_max_epochs": 1,
    "total_iterations": 3,
    "eval_episodes": 1,
    "final_episodes": 1,
}
OF_SCRIPT = {
    "ampl": {"warmup_iterations": 1, "initial_states": "dataset", "model_epoch_steps": 4},
    "mopo": {"rollout_starts": 20},
    "combo": {"rollout_starts": 20},
}


def random_episodes(env_id: str, rows: int) -> dict[str, np.ndarray]:
    """Rows of uniform actions in a task of D4RL, as arrays in its format."""
    env = mopo.make_env(env_id)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    lists = {key: [] for key in ("observations", "actions", "rewards", "next_observations")}
    ends = {"terminals": [], "timeouts": []}
    for _ in range(rows):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        for key, value in zip(lists, (obs, action, reward, next_obs), strict=True):
            lists[key].append(value)
        ends["terminals"].append(terminated)
        ends["timeouts"].append(truncated)
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
    arrays = {key: np.array(values, np.float32) for key, values in lists.items()}
    return arrays | {key: np.array(values, bool) for key, values in ends.items()}


@pytest.fixture(scope="module", params=OF_SCRIPT)
def run(request, tmp_path_factory):
    """The folder of a small run of a script. Its args.json names the data."""
    place = tmp_path_factory.mktemp("diagnose")
    script = importlib.import_module(request.param)
    path = place / "data.hdf5"
    with h5py.File(path, "w") as file:
        for key, array in random_episodes("hopper-medium-v2", 300).items():
            file[key] = array
    settings = SMALL_RUN | OF_SCRIPT[request.param]
    args = script.Args(**settings, dataset_path=str(path), run_dir=str(place / "runs"))
    script.train(args)
    (folder,) = (place / "runs").iterdir()
    return folder


@pytest.mark.parametrize("family", diagnose.WHOLE_STATE)
def test_simulate(family):
    """From the observation alone it makes the step that the environment made."""
    rows = random_episodes(f"{family}-medium-v2", 200)
    env = mopo.make_env(f"{family}-medium-v2")
    obs = torch.as_tensor(rows["observations"])
    known = diagnose.is_whole(env, obs)
    assert known.sum() > 40
    rows = {key: array[known.numpy()] for key, array in rows.items()}
    reward, next_obs, ended = diagnose.simulate(env, obs[known], torch.as_tensor(rows["actions"]))
    assert np.abs(next_obs.numpy() - rows["next_observations"]).max() < 1e-3
    assert np.abs(reward.numpy() - rows["rewards"]).max() < 1e-3
    assert (ended.numpy() == rows["terminals"]).all()
    if family != "halfcheetah":  # which never ends
        assert 0 < ended.sum() < len(ended)


def test_discounted():
    assert diagnose.discounted(np.array([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]


def episode(steps: int, terminated: bool) -> diagnose.Episode:
    """One with rewards of 1."""
    return diagnose.Episode(
        torch.zeros(steps, 2), torch.zeros(steps, 1), np.ones(steps), terminated
    )


def test_value_table():
    """A critic that says 10 everywhere, gamma 0.5; the lower of two counts."""

    def critic(obs, action):
        ten = torch.full(obs.shape[:1], 10.0)
        return torch.stack([ten, ten + 2])

    method = SimpleNamespace(args=SimpleNamespace(gamma=0.5), critic=critic)
    table = diagnose.value_table(method, [episode(20, True)]).set_index("steps until the end")
    assert table["states"].to_list() == [10, 10, 0, 0]
    assert table["min Q"].to_list()[:2] == [10, 10]
    of_one = 2 - 2 * 0.5 ** np.arange(1, 11)  # with 1 to 10 steps left
    assert table["discounted return to come"].iloc[0] == pytest.approx(of_one.mean())
    # Of an episode that the time limit cut, only states count after which 0.5**left < 0.01.
    table = diagnose.value_table(method, [episode(20, False)]).set_index("steps until the end")
    assert table["states"].to_list() == [4, 10, 0, 0]
    # AMPL's Q is of rewards that are scaled: here 1 is (1 + 1 + 0.001) / 2.
    method.reward_range = (-1.0, 1.0)
    table = diagnose.value_table(method, [episode(20, True)])
    assert table["discounted return to come"].iloc[0] == pytest.approx(1.0005 * of_one.mean())


def test_model_table():
    """The simulator as the model has no error. One that never ends, one step late, is found out."""
    rows = random_episodes("hopper-medium-v2", 100)
    obs = torch.as_tensor(rows["observations"])
    action = torch.as_tensor(rows["actions"])
    env = mopo.make_env("hopper-medium-v2")
    unit = torch.ones(obs.shape[1])
    right = SimpleNamespace(
        rollout_action=lambda states: action[: len(states)],
        imagine=lambda states, actions: diagnose.simulate(env, states, actions),
    )
    table = diagnose.model_table(right, env, "data", obs, unit, steps=2)
    assert table["states"].to_list()[0] == 100
    assert table["states"].to_list()[1] < 100
    assert table["95 %"].max() < 1e-3
    assert table["ends missed"].max() == table["false ends"].max() == 0

    def stand_still(states, actions):
        return torch.zeros(len(states)), states, torch.zeros(len(states))

    wrong = SimpleNamespace(rollout_action=right.rollout_action, imagine=stand_still)
    table = diagnose.model_table(wrong, env, "data", obs, unit, steps=1)
    change = (rows["next_observations"] - rows["observations"]) ** 2
    median = np.median(np.sqrt(change.mean(1)))
    assert table["error of s', median"].item() == pytest.approx(median, rel=0.05)
    assert table["reward minus simulator's"].item() == pytest.approx(-rows["rewards"].mean(), 1e-3)
    assert table["ends"].item() == table["ends missed"].item() == rows["terminals"].sum() > 0
    assert table["false ends"].item() == 0


def test_distance_table():
    """Visited states near the data, and then far away, where D_model follows them."""
    data = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    near = data[:50] + torch.tensor([1e-3, 0, 0, 0])
    away = data[50:120] + torch.tensor([100.0, 0, 0, 0])
    visited = torch.cat([near, away])
    one = diagnose.Episode(visited, torch.zeros(120, 1), np.zeros(120), True)
    table = diagnose.distance_table(data, away, [one]).set_index("states")
    assert table["number"].to_list() == [500, 50, 50, 20]
    to_data = table["to data, median"].to_list()
    assert to_data[0] > 0.1
    assert to_data[1] == pytest.approx(1e-3 / data[:, 0].std().item(), 0.01)
    assert to_data[2] > 80
    to_model = table["to D_model, median"].to_list()
    assert np.isnan(to_model[0])
    assert to_model[1] > 80
    assert to_model[2] == to_model[3] == 0


def test_report(run, capsys):
    """Of a whole run, which stays as it was."""
    before = {path: path.read_bytes() for path in run.iterdir()}
    diagnose.main(diagnose.Options(str(run), episodes=2, states=10, steps=1))
    printed = capsys.readouterr().out
    assert f"{run}: 3 iterations" in printed
    titles = ("Episodes", "Q and returns", "Distance to the nearest state", "Steps in the model")
    places = [printed.index(title) for title in titles]
    assert places == sorted(places)
    assert printed.count("| terminated") + printed.count("| time limit") == 2
    assert printed.count("| last 20 steps |") == 1
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_another_folder(run, tmp_path):
    with pytest.raises(SystemExit, match="is no run of ampl.py, mopo.py or combo.py"):
        diagnose.load_run(tmp_path)
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoint.pt").unlink()
    with pytest.raises(SystemExit, match="there is no .*checkpoint.pt"):
        diagnose.load_run(copy)


def test_a_variant(run, monkeypatch):
    """A run of a class of another name ends in one sentence."""
    name = next(name for name in diagnose.METHODS if (run / f"{name}.py").exists())
    script = importlib.import_module(name)
    variant = type("Variant", (getattr(script, diagnose.METHODS[name]),), {})
    monkeypatch.setitem(diagnose.METHODS, name, "Variant")
    monkeypatch.setattr(script, "Variant", variant, raising=False)
    with pytest.raises(SystemExit, match="is a run of .*, which this cannot read"):
        diagnose.load_run(run)
