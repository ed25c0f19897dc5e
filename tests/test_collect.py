"""collect.py's datasets: D4RL's recipe of maze2d, SAC's rows, stop rule, files, resume."""

import functools
import sys
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from test_graphs import graphs  # noqa: F401  (a fixture)

import ampl
import collect
import mopo

TINY = dict(
    hidden=(8, 8), batch_size=16, eval_episodes=1, sac_steps=160, random_steps=40, eval_every=40,
    medium_return=-1e3, steps=150, seed=1, cuda=False,
)  # fmt: skip
ANT, MAZE, QUIRKS = "ant-angle-v0", "maze2d-umaze-v1", "maze2d-umaze-dense-v1"
MIXED, REPLAY, RANDOM = "hopper-medium-expert-v2", "walker2d-medium-replay-v2", "hopper-random-v2"
MADE = {  # env id: rows, settings
    MAZE: (60_000, dict(steps=60_000, seed=2)),
    QUIRKS: (10_000, dict(steps=10_000, seed=2, keep_quirks=True)),
    ANT: (160, TINY | dict(random_steps=120)),
    **{name: (rows, TINY) for name, rows in ((MIXED, 300), (REPLAY, 40), (RANDOM, 150))},
}


def make(path, env_id, **settings):
    return collect.collect(collect.Args(env_id, output=path and str(path), **settings))


def read(path):
    """All columns of a file by name, and its attributes."""
    with h5py.File(path) as file:
        names = [*file.keys() - {"infos"}, *(f"infos/{name}" for name in file["infos"])]
        return {name: file[name][()] for name in names}, dict(file.attrs)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    with mock.patch.dict("os.environ", D4RL_DATASET_DIR=f"{tmp_path_factory.mktemp('d4rl')}/new"):
        yield functools.cache(lambda name: make(None, name, **MADE[name][1]))


def test_plan_is_that_of_q_iteration():
    """D4RL's planner, plainly: 50 sweeps of Q = r + 0.99 max Q', then the first best action."""
    free = {tuple(c) for c in mopo.make_env("maze2d-large-v1").env.open.astype(int).tolist()}
    cells = [(i, j) for i in range(9) for j in range(12)]
    ways = [[(i, j), (i, j - 1), (i, j + 1), (i - 1, j), (i + 1, j)] for i, j in cells]
    ways = [[way if way in free else cell for way in w] for cell, w in zip(cells, ways)]
    index = np.array([[cells.index(way) for way in w] for w in ways])  # [cells, moves]
    for goal in sorted(free)[::5]:
        reward, q = np.array([[float(cell == goal)] for cell in cells]), np.zeros(index.shape)
        for _ in range(50):
            q = reward + 0.99 * q.max(1)[index]
        best, got = {c: w[k] for c, w, k in zip(cells, ways, q.argmax(1))}, collect.plan(free, goal)
        assert got.keys() >= free and got == {cell: best[cell] for cell in got}


def test_maze2d_statistics(collected):
    """The hosted file has 12459 goal switches in a million rows: one in 80.26 (noiseless: 73)."""
    data, _ = read(collected(MAZE))
    lengths = np.diff(np.flatnonzero(np.r_[True, data["timeouts"]]))
    assert abs(lengths.mean() - 80.26) < 4 * 2.0 and 200 < lengths.max() <= 301
    assert (lengths == 1).mean() == pytest.approx(1 / 7, abs=0.05)
    assert data["rewards"].mean() == pytest.approx(0.079, abs=4 * 0.0046)  # of a million rows
    assert (np.abs(data["actions"]) == 1.0).mean() == pytest.approx(0.314, abs=0.013)
    shares = {(1, 1): 0.0718, (1, 2): 0.1332, (1, 3): 0.2045, (2, 3): 0.1804,  # like 0.314 from
              (3, 1): 0.0775, (3, 2): 0.1388, (3, 3): 0.1937}  # D4RL's controller  # fmt: skip
    ours = {c: (np.rint(data["observations"][:, :2]) == c).all(1).mean() for c in shares}
    assert ours == pytest.approx(shares, abs=0.026) and sum(ours.values()) > 0.999


@pytest.mark.parametrize("name", [MAZE, QUIRKS])
def test_rows_of_maze2d(name, collected):
    """Every row follows from the one before by a step of the environment; the quirk by request."""
    (data, attributes), env = read(collected(name)), mopo.make_env(MAZE).env
    obs, switch = data["observations"], np.flatnonzero(data["timeouts"][:-1])
    truth = np.concatenate([data["infos/qpos"], data["infos/qvel"]], 1)
    repeated, kept = (obs[switch + 1] == obs[switch]).all(1), name == QUIRKS
    assert repeated.all() if kept else not repeated.any() and np.array_equal(obs, truth)
    assert attributes["quirk_row_repeated_after_a_goal_switch"] == ["repaired", "kept"][kept]
    distance = np.linalg.norm(obs[:, :2] - 1, axis=1)
    assert np.abs(data["rewards"] - (np.exp(-distance) if kept else distance <= 0.5)).max() < 1e-6
    for t in range(0, 9_999, 7):
        env.unwrapped.set_state(*np.split(truth[t] - env.origin, 2))
        assert np.abs(env.step(data["actions"][t])[0] - truth[t + 1]).max() < 2e-5


@pytest.mark.parametrize("name", MADE)
def test_file(name, collected):
    """D4RL's name, layout and types; the learning script finds it, and takes its rows."""
    path, (size, settings) = collected(name), MADE[name]
    (columns, attributes), urls = read(path), mopo.d4rl_tables()["DATASET_URLS"]
    assert path.name == urls.get(name, f"{name}.hdf5").rsplit("/", 1)[-1]
    keys = "observations actions rewards terminals timeouts infos/qpos infos/qvel".split()
    keys += ["infos/goal"] if "maze2d" in name else ["next_observations"]
    keys += ["infos/behaviour_rewards"] if name == ANT else []
    assert sorted(columns) == sorted(keys) and {len(x) for x in columns.values()} == {size}
    assert all(columns[k].dtype == (bool if k.startswith("t") else np.float32) for k in keys)
    over, cut, note = columns["terminals"], columns["timeouts"], attributes["note"]
    assert attributes["mujoco"] and attributes["seed"] == settings["seed"]
    assert not (over & cut).any()
    assert ("never published" if name == ANT else "not the file that D4RL hosts") in note
    assert all(attributes[key] in note for key in attributes if key.endswith("sha256"))
    if (over | cut).sum() > 1:  # ampl.py asks for two episodes
        data, keep = ampl.load_dataset(ampl.Args(env_id=name)), ~cut
        keep[-1] &= "next_observations" in columns
        assert np.array_equal(data["obs"], columns["observations"][keep])


@pytest.mark.parametrize("name", [ANT, REPLAY])
def test_rows_of_sac(name, collected, tmp_path):
    """s' is what followed, ends are the task's; SAC samples whole rows, with its own reward."""
    columns, _ = read(collected(name))
    obs, next_obs, over = (columns[k] for k in ("observations", "next_observations", "terminals"))
    ends = over | columns["timeouts"]
    assert np.array_equal(next_obs[:-1][~ends[:-1]], obs[1:][~ends[:-1]])
    assert np.array_equal(mopo.known_termination(name, torch.from_numpy(next_obs)).numpy(), over)
    own = columns["rewards" if name == REPLAY else "infos/behaviour_rewards"]
    sac = collect.SACCollection(collect.Args(name, **MADE[name][1]), tmp_path).sac
    sac.remember(columns, 0, len(obs))
    batch = [field[0].numpy() for field in sac.sample()]
    rows = [np.flatnonzero(own == reward)[0] for reward in batch[2]]
    fields = zip(batch, (obs, columns["actions"], own, next_obs, over))
    assert all(np.array_equal(field, column[rows]) for field, column in fields)


def test_both_policies_of_medium_expert(collected):
    """The first half ends with a flag: what follows it is another policy's episode."""
    (columns, of), kept = read(collected(MIXED)), ("medium", "expert")
    assert (columns["terminals"] | columns["timeouts"])[149] and of["medium_policy_steps"] == 40
    assert of["eval_steps"].tolist() == [40, 80, 120, 160]
    assert of["eval_returns"][[0, 3]].tolist() == [of[f"{x}_policy_return"] for x in kept]
    assert len({of[f"{x}_policy_sha256"] for x in kept}) == 2


def test_medium_rule(tmp_path, monkeypatch):
    """The first evaluation at 1500 ends SAC; out of reach is a sentence, more steps go on."""
    zero, one = mopo.d4rl_score(task := "hopper-medium-v2", [0.0, 1.0])
    score = lambda step: zero + (one - zero) * (1500.0 if step >= 100 else 1499.9)
    monkeypatch.setattr(mopo, "evaluate", lambda sac, args, n, k: np.full((1, n), score(k)))
    settings = TINY | dict(medium_return=None, eval_every=20, save_every=20)
    once, again = make(tmp_path / "once", task, **settings), tmp_path / "again"
    assert read(once)[1]["medium_policy_steps"] == 100 and len(read(once)[0]["rewards"]) == 150
    with pytest.raises(SystemExit, match="1499.9 in --sac-steps 80, not 1500.0: take more"):
        make(again, task, **settings | dict(sac_steps=80))
    with pytest.raises(SystemExit, match="--sac-steps must exceed the"):
        make(again, task, **settings | dict(sac_steps=41, resume=True))
    make(again, task, **settings, resume=True)
    assert again.read_bytes() == once.read_bytes()


@pytest.mark.parametrize("name, saves", [(MIXED, 1), (MIXED, 5), (MIXED, 9), (RANDOM, 2)])
def test_resume_is_bit_exact(name, saves, tmp_path, monkeypatch, collected):
    """Stopped while SAC learns, and while either policy is rolled out."""
    path, settings, save = tmp_path / "x", TINY | dict(save_every=20), collect.SACCollection.save
    stop = mock.Mock(side_effect=[None] * (saves - 1) + [KeyboardInterrupt])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect.SACCollection, "save", lambda self: (save(self), stop()))
        make(path, name, **settings)
    for flags, says in ((dict(), "stopped run"), (dict(seed=4, resume=True), "settings")):
        with pytest.raises(SystemExit, match=says):
            make(path, name, **settings | flags)
    make(path, name, **settings, resume=True)
    assert path.read_bytes() == collected(name).read_bytes() and [*tmp_path.iterdir()] == [path]


def test_emulated_cuda_graphs_make_the_same_rows(tmp_path, monkeypatch, graphs, collected):  # noqa: F811
    monkeypatch.setattr(mopo, "choose_device", lambda args: torch.device("cpu"))
    path = make(tmp_path / "x.hdf5", MIXED, **TINY | dict(cuda=True))
    assert path.read_bytes() == collected(MIXED).read_bytes()
    assert [graph.replays for graph in graphs] == [117, 117, 147, 147]


MISTAKES = [
    ("--env-id hopper-medum-v2", "hopper-medium-v2"),
    ("--sac-steps 5000", "must exceed --random-steps 5000"),
    ("--output {0}/there", "--overwrite"),
    ("--output {0}/there/x.hdf5", "cannot write"),
    ("--resume", "nothing to resume"),
    ("--resume --output {0}/y.hdf5", "damaged"),
    ("--critic-lr 1e30 --sac-steps 60 --random-steps 9 --eval-every 50", "not finite after 50"),
]


@pytest.mark.parametrize("flags, says", MISTAKES)
def test_a_mistake_is_one_sentence(flags, says, tmp_path, monkeypatch):
    (tmp_path / "there").write_bytes(b"precious")
    (tmp_path / "y.hdf5.partial.pt").write_bytes(b"PK rubbish")
    argv = f"collect.py --env-id hopper-medium-v2 --output {{0}}/x.hdf5 --no-cuda {flags}"
    monkeypatch.setattr(sys, "argv", argv.format(tmp_path).split())
    with pytest.raises(SystemExit, match=says):
        collect.main()
    assert (tmp_path / "there").read_bytes() == b"precious" and len([*tmp_path.iterdir()]) == 2
