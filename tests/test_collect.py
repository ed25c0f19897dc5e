"""collect.py's datasets: maze2d against D4RL's, the rows of SAC, its step, files, --resume."""

import copy
import functools
import hashlib
import importlib.metadata
import math
import os
import resource
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.utils._python_dispatch import TorchDispatchMode

import collect
import mopo

MAZE = "maze2d-umaze-v1"
DENSE_MAZE = "maze2d-umaze-dense-v1"  # made with the quirks of D4RL's script
RANDOM = "hopper-random-v2"
MIXED = "hopper-medium-expert-v2"
REPLAY = "walker2d-medium-replay-v2"
ANT = "ant-angle-v0"

TINY_SAC = {
    "steps": 150,
    "sac_steps": 160,
    "random_steps": 40,
    "eval_every": 40,
    "eval_episodes": 1,
    "medium_return": -1000.0,  # which the first evaluation reaches
    "hidden": (8, 8),
    "batch_size": 16,
    "seed": 1,
    "cuda": False,
}
SETTINGS = {
    MAZE: {"steps": 60_000, "seed": 2},
    DENSE_MAZE: {"steps": 10_000, "seed": 2, "keep_quirks": True},
    RANDOM: TINY_SAC,
    MIXED: TINY_SAC,
    REPLAY: TINY_SAC,
    ANT: {**TINY_SAC, "random_steps": 120},
}
ROWS = {MAZE: 60_000, DENSE_MAZE: 10_000, RANDOM: 150, MIXED: 300, REPLAY: 40, ANT: 160}


def make(env_id: str, path: Path, **settings) -> Path:
    return collect.collect(collect.Args(env_id, output=str(path), **settings))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """All columns of a file by name, and its attributes."""
    columns = {}

    def visit(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            columns[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(visit)
        return columns, dict(file.attrs)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Makes a dataset of SETTINGS in D4RL's folder, once, and gives its path."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("d4rl") / "datasets"  # is made when it is needed
        patch.setenv("D4RL_DATASET_DIR", str(folder))

        @functools.cache
        def collect_once(env_id: str) -> Path:
            return collect.collect(collect.Args(env_id, **SETTINGS[env_id]))

        yield collect_once


# --- the file ---
@pytest.mark.parametrize("env_id", SETTINGS)
def test_columns_are_those_of_d4rl(env_id, collected):
    columns, _ = read(collected(env_id))
    expected = {"observations", "actions", "rewards", "terminals", "timeouts"}
    expected |= {"infos/qpos", "infos/qvel"}
    if env_id in (MAZE, DENSE_MAZE):
        expected |= {"infos/goal"}
    else:
        expected |= {"next_observations"}
    if env_id == ANT:
        expected |= {"infos/behaviour_rewards"}
    assert columns.keys() == expected
    for name, column in columns.items():
        assert len(column) == ROWS[env_id]
        assert column.dtype == (bool if name in ("terminals", "timeouts") else np.float32)
        assert np.isfinite(column).all()
    assert np.abs(columns["actions"]).max() <= 1
    assert not (columns["terminals"] & columns["timeouts"]).any()


@pytest.mark.parametrize("env_id", SETTINGS)
def test_the_file_has_the_name_under_which_d4rl_would_download_it(env_id, collected):
    url = mopo.d4rl_tables()["DATASET_URLS"].get(env_id, "ant-angle-v0.hdf5")
    assert collected(env_id).name == url.rsplit("/", 1)[-1]


@pytest.mark.parametrize("env_id", [MAZE, DENSE_MAZE, RANDOM, MIXED])
def test_the_learning_scripts_find_and_take_the_file(env_id, collected, capsys):
    columns, attributes = read(collected(env_id))
    data = mopo.load_dataset(mopo.Args(env_id))
    keep = ~columns["timeouts"]
    if "next_observations" not in columns:
        keep[-1] = False
    assert np.array_equal(data["obs"], columns["observations"][keep])
    assert np.array_equal(data["reward"], columns["rewards"][keep])
    assert attributes["note"] in capsys.readouterr().out


@pytest.mark.parametrize("env_id", SETTINGS)
def test_the_note_says_what_the_file_is_and_is_not(env_id, collected):
    _, attributes = read(collected(env_id))
    if env_id == ANT:
        assert "its own file was never published" in attributes["note"]
    else:
        assert "A re-collection" in attributes["note"]
        assert "not the file that D4RL hosts" in attributes["note"]
    seed = SETTINGS[env_id]["seed"]
    assert f"Seed {seed}; {ROWS[env_id]} rows" in attributes["note"]


@pytest.mark.parametrize("env_id", SETTINGS)
def test_attributes_name_settings_and_versions(env_id, collected):
    _, attributes = read(collected(env_id))
    assert attributes["env_id"] == env_id
    assert attributes["seed"] == SETTINGS[env_id]["seed"]
    assert attributes["torch"] == importlib.metadata.version("torch")  # without "+cu130"
    assert attributes["numpy"] == np.__version__
    for package in ("mujoco", "gymnasium", "gymnasium-robotics"):
        assert package in attributes


# --- maze2d ---
def test_plan_is_that_of_q_iteration():
    """D4RL's planner: sweeps of Q = r + 0.99 max Q', then the first of the best moves.

    A move into a wall leaves the ball where it is. Staying is the first move.
    """
    maze = mopo.make_env("maze2d-large-v1").env
    open_cells = {tuple(cell) for cell in maze.open.astype(int).tolist()}
    cells = [(x, y) for x in range(9) for y in range(12)]
    destinations = []  # of the five moves from each cell
    index = np.zeros((len(cells), 5), int)  # of the destinations in `cells`
    for i, (x, y) in enumerate(cells):
        moves = [(x, y), (x, y - 1), (x, y + 1), (x - 1, y), (x + 1, y)]
        moves = [move if move in open_cells else (x, y) for move in moves]
        destinations.append(moves)
        index[i] = [cells.index(move) for move in moves]

    for goal in sorted(open_cells)[::5]:
        reward = np.array([float(cell == goal) for cell in cells])
        q = np.zeros(index.shape)  # [cells, moves]
        for _ in range(50):
            q = reward[:, None] + 0.99 * q.max(axis=1)[index]
        best = {}
        for cell, moves, values in zip(cells, destinations, q):
            best[cell] = moves[values.argmax()]
        plan = collect.plan(open_cells, goal)
        assert plan.keys() >= open_cells
        for cell, next_cell in plan.items():
            assert next_cell == best[cell]


def test_a_plan_around_the_corner():
    """umaze: from the lower left, the goal in the upper left lies behind a wall."""
    maze = mopo.make_env(MAZE).env
    open_cells = {tuple(cell) for cell in maze.open.astype(int).tolist()}
    plan = collect.plan(open_cells, goal=(1, 1))
    path = [(3, 1)]
    while path[-1] != (1, 1):
        path.append(plan[path[-1]])
    assert path == [(3, 1), (3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)]


def test_maze2d_has_the_statistics_of_d4rl(collected):
    """The hosted file has 12459 goal switches in a million rows, one in 80.26.

    Without noise on the actions it would be one in 73. All other numbers are of a million rows of
    D4RL's controller; tolerances are four standard errors of 60,000 rows.
    """
    columns, _ = read(collected(MAZE))
    lengths = np.diff(np.flatnonzero(columns["timeouts"]))
    assert lengths.mean() == pytest.approx(80.26, abs=8)
    assert (lengths == 1).mean() == pytest.approx(1 / 7, abs=0.05)
    assert columns["rewards"].mean() == pytest.approx(0.079, abs=0.0184)
    assert (np.abs(columns["actions"]) == 1).mean() == pytest.approx(0.314, abs=0.013)

    share_of_cell = {
        (1, 1): 0.0718,
        (1, 2): 0.1332,
        (1, 3): 0.2045,
        (2, 3): 0.1804,
        (3, 1): 0.0775,
        (3, 2): 0.1388,
        (3, 3): 0.1937,
    }
    nearest = np.rint(columns["observations"][:, :2])
    total = 0
    for cell, share in share_of_cell.items():
        ours = (nearest == cell).all(axis=1).mean()
        assert ours == pytest.approx(share, abs=0.026)
        total += ours
    assert total > 0.999


def test_maze2d_timeouts_are_where_the_goal_changes(collected):
    """Also after the task's 300 steps toward a goal, which row 301 finds to be over."""
    columns, attributes = read(collected(MAZE))
    changes = (columns["infos/goal"][1:] != columns["infos/goal"][:-1]).any(axis=1)
    assert np.array_equal(changes, columns["timeouts"][:-1])
    assert columns["timeouts"].sum() == attributes["goal_switches"]
    assert 200 < np.diff(np.flatnonzero(columns["timeouts"])).max() <= 301
    assert not columns["terminals"].any()


@pytest.mark.parametrize("env_id", [MAZE, DENSE_MAZE])
def test_maze2d_rewards_are_of_the_state_in_the_same_row(env_id, collected):
    """A step of the environment would pay for the next one. The goal is at (1, 1) throughout."""
    columns, attributes = read(collected(env_id))
    distance = np.linalg.norm(columns["observations"][:, :2] - [1, 1], axis=1)
    expected = distance <= 0.5 if env_id == MAZE else np.exp(-distance)
    assert np.abs(columns["rewards"] - expected).max() < 1e-6
    assert attributes["mean_reward"] == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.parametrize("env_id", [MAZE, DENSE_MAZE])
def test_maze2d_rows_follow_each_other_by_the_physics(env_id, collected):
    columns, _ = read(collected(env_id))
    state = np.concatenate([columns["infos/qpos"], columns["infos/qvel"]], axis=1)
    env = mopo.make_env(env_id).env
    for row in range(0, 9_999, 7):
        position, velocity = np.split(state[row] - env.origin, 2)
        env.unwrapped.set_state(position, velocity)
        next_obs, *_ = env.step(columns["actions"][row])
        assert np.abs(next_obs - state[row + 1]).max() < 2e-5


def test_maze2d_observations_are_the_states(collected):
    """D4RL's script repeats an observation after each goal switch; ours does not."""
    columns, attributes = read(collected(MAZE))
    state = np.concatenate([columns["infos/qpos"], columns["infos/qvel"]], axis=1)
    assert np.array_equal(columns["observations"], state)
    assert attributes["quirk_row_repeated_after_a_goal_switch"] == "repaired"


def test_maze2d_with_the_quirk_of_d4rl(collected):
    columns, attributes = read(collected(DENSE_MAZE))
    switches = np.flatnonzero(columns["timeouts"][:-1])
    observations = columns["observations"]
    assert len(switches) > 50
    assert np.array_equal(observations[switches + 1], observations[switches])
    assert attributes["quirk_row_repeated_after_a_goal_switch"] == "kept"


def test_a_seed_gives_one_file(tmp_path):
    once = make(MAZE, tmp_path / "once", steps=300, seed=5)
    again = make(MAZE, tmp_path / "again", steps=300, seed=5)
    other = make(MAZE, tmp_path / "other", steps=300, seed=6)
    assert once.read_bytes() == again.read_bytes()
    assert once.read_bytes() != other.read_bytes()


# --- the step of SAC ---
def small_sac(rows: int = 100) -> collect.SAC:
    """SAC in float64 on random rows, 5 numbers an observation and 2 an action."""
    args = collect.Args("hopper-medium-v2", hidden=(8, 8), batch_size=32, target_entropy=-2.0)
    sac = collect.SAC(args, 5, 2, rows, torch.device("cpu")).double()
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.standard_normal((rows, 5)),
        "actions": rng.uniform(-1, 1, (rows, 2)),
        "rewards": rng.standard_normal(rows),
        "next_observations": rng.standard_normal((rows, 5)),
        "terminals": rng.random(rows) < 0.3,
    }
    sac.remember(columns, 0, rows)
    return sac


def sample_squashed(policy: mopo.GaussianPolicy, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Actions and their log-density by torch.distributions, with the draw of policy.sample."""
    mean, log_std = policy.net(obs).chunk(2, dim=-1)
    gaussian = Normal(mean, log_std.clamp(-20, 2).exp())
    distribution = TransformedDistribution(gaussian, TanhTransform(cache_size=1))
    action = torch.tanh(gaussian.mean + gaussian.stddev * torch.randn_like(mean))
    return action, distribution.log_prob(action).sum(-1)


def first_step_of_adam(parameters: list[Tensor], loss: Tensor) -> None:
    """Adam's moments are the gradient and its square in the first step, once bias-corrected."""
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        with torch.no_grad():
            parameter -= 3e-4 * gradient / (gradient.abs() + 1e-8)


def test_a_step_is_that_of_soft_actor_critic():
    """Haarnoja et al. 2018 with two critics and a learned temperature, written once more."""
    sac = small_sac()
    torch.manual_seed(0)
    plain = copy.deepcopy(sac)
    sac.iterate()

    torch.manual_seed(0)
    place = (torch.rand(32) * 100).long()
    obs, action, reward, next_obs, terminated = plain.rows[place].split([5, 2, 1, 5, 1], dim=1)
    alpha = 1.0
    with torch.no_grad():
        next_action, next_log_prob = sample_squashed(plain.actor, next_obs)
        at_next = torch.cat([next_obs, next_action], dim=1)
        q_next = torch.minimum(plain.critic_target.q1(at_next), plain.critic_target.q2(at_next))
        value = q_next - alpha * next_log_prob[:, None]
        target = reward + 0.99 * (1 - terminated) * value
    for critic in (plain.critic.q1, plain.critic.q2):
        q = critic(torch.cat([obs, action], dim=1))
        first_step_of_adam(list(critic.parameters()), 0.5 * F.mse_loss(q, target))

    new_action, log_prob = sample_squashed(plain.actor, obs)
    at_policy = torch.cat([obs, new_action], dim=1)
    q = torch.minimum(plain.critic.q1(at_policy), plain.critic.q2(at_policy))
    loss = (alpha * log_prob[:, None] - q).mean()
    first_step_of_adam(list(plain.actor.parameters()), loss)
    entropy = -log_prob.detach().mean()
    first_step_of_adam([plain.log_alpha], plain.log_alpha * (entropy + 2.0))
    with torch.no_grad():
        for slow, fast in zip(plain.critic_target.parameters(), plain.critic.parameters()):
            slow += 0.005 * (fast - slow)

    for name, value in plain.state_dict().items():
        torch.testing.assert_close(sac.state_dict()[name], value, rtol=0, atol=1e-12, msg=name)


class RefuseToWait(TorchDispatchMode):
    """Refuses what makes a GPU wait, and so cannot be recorded as a CUDA graph."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        waiting = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        assert name not in waiting, f"{name} would wait for the GPU"
        return op(*args, **(kwargs or {}))


def test_steps_can_be_recorded_as_cuda_graphs():
    sac = small_sac()
    sac.float()
    actor = collect.Actor(sac.actor, sac)
    with RefuseToWait():
        sac.iterate()
        actor.draw_action()
    with pytest.raises(AssertionError, match="would wait"), RefuseToWait():
        sac.num_rows.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_make_the_rows_of_plain_steps(tmp_path):
    settings = {**TINY_SAC, "cuda": True}
    plain, _ = read(make(MIXED, tmp_path / "plain", cuda_graphs=False, **settings))
    recorded, _ = read(make(MIXED, tmp_path / "recorded", **settings))
    for name, column in plain.items():
        assert np.allclose(recorded[name], column, atol=1e-3), name


# --- datasets made with SAC ---
def replay(env_id: str, columns: dict, rows: range, policy: str) -> None:
    """Take the stored actions once more, from the seeds of the episodes, and compare."""
    env = mopo.make_env(env_id)
    episode = 0
    obs = None
    for row in rows:
        if obs is None:
            digest = hashlib.sha256(f"1 {policy} episode {episode}".encode()).digest()
            obs, _ = env.reset(seed=int.from_bytes(digest[:4], "little"))
        assert np.array_equal(columns["observations"][row], obs.astype(np.float32))
        assert np.array_equal(columns["infos/qpos"][row], np.float32(env.unwrapped.data.qpos))
        assert np.array_equal(columns["infos/qvel"][row], np.float32(env.unwrapped.data.qvel))
        obs, reward, terminated, truncated, info = env.step(columns["actions"][row])
        assert np.array_equal(columns["next_observations"][row], obs.astype(np.float32))
        assert columns["rewards"][row] == np.float32(reward)
        assert columns["terminals"][row] == terminated
        if row != rows[-1]:  # the last row of a part may be marked as cut
            assert columns["timeouts"][row] == truncated
        if env_id == ANT:
            behaviour_reward = columns["infos/behaviour_rewards"][row]
            assert behaviour_reward == np.float32(info["behaviour_reward"])
            assert behaviour_reward != columns["rewards"][row]
        if terminated or truncated:
            episode += 1
            obs = None
    assert episode > 0 or env_id in (ANT, REPLAY)


PARTS = [
    (RANDOM, range(150), "random"),
    (MIXED, range(150), "medium"),
    (MIXED, range(150, 300), "expert"),
    (REPLAY, range(40), "SAC"),
    (ANT, range(160), "SAC"),
]


@pytest.mark.parametrize("env_id, rows, policy", PARTS)
def test_rows_are_what_the_environment_did(env_id, rows, policy, collected):
    columns, _ = read(collected(env_id))
    replay(env_id, columns, rows, policy)


@pytest.mark.parametrize("env_id", [RANDOM, MIXED, REPLAY, ANT])
def test_terminals_are_by_the_rule_of_the_task(env_id, collected):
    columns, _ = read(collected(env_id))
    next_obs = torch.from_numpy(columns["next_observations"])
    assert np.array_equal(mopo.known_termination(env_id, next_obs), columns["terminals"])


def test_an_episode_at_the_time_limit_ends_in_a_timeout(tmp_path):
    """halfcheetah never terminates; it has 1000 steps."""
    settings = {**TINY_SAC, "steps": 1500}
    columns, attributes = read(make("halfcheetah-random-v2", tmp_path / "x", **settings))
    assert np.flatnonzero(columns["timeouts"]).tolist() == [999]
    assert not columns["terminals"].any()
    assert "1500 rows, 1 whole episodes" in attributes["note"]
    assert attributes["mean_return"] == pytest.approx(columns["rewards"][:1000].sum(), rel=1e-4)


def test_random_actions_are_uniform(tmp_path):
    settings = {**TINY_SAC, "steps": 3000}
    columns, _ = read(make(RANDOM, tmp_path / "x", **settings))
    quarters, _ = np.histogram(columns["actions"], bins=4, range=(-1, 1))
    assert quarters / columns["actions"].size == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("env_id, rewards", [(REPLAY, "rewards"), (ANT, "infos/behaviour_rewards")])
def test_sac_learns_from_whole_rows_with_the_rewards_of_its_own_task(env_id, rewards, collected):
    columns, _ = read(collected(env_id))
    size = ROWS[env_id]
    args = collect.Args(env_id, **SETTINGS[env_id])
    sac = collect.SACCollection(args, Path("unused")).sac
    sac.remember(columns, 0, size - 10)
    sac.remember(columns, size - 10, size)
    torch.manual_seed(0)
    for _ in range(20):
        batch = sac.sample()
        for i, reward in enumerate(batch.reward.numpy()):
            row = np.flatnonzero(columns[rewards] == reward)[0]
            assert np.array_equal(batch.obs[i], columns["observations"][row])
            assert np.array_equal(batch.action[i], columns["actions"][row])
            assert np.array_equal(batch.next_obs[i], columns["next_observations"][row])
            assert batch.terminated[i] == columns["terminals"][row]


def test_medium_expert_has_the_rows_of_both_policies(collected):
    """A flag ends the first half, as another policy's episode follows."""
    columns, attributes = read(collected(MIXED))
    ends = columns["terminals"] | columns["timeouts"]
    assert ends[149]
    assert attributes["medium_policy_steps"] == 40
    assert attributes["expert_policy_steps"] == 160
    assert attributes["eval_steps"].tolist() == [40, 80, 120, 160]
    assert attributes["medium_policy_return"] == attributes["eval_returns"][0]
    assert attributes["expert_policy_return"] == attributes["eval_returns"][3]
    assert attributes["medium_policy_sha256"] != attributes["expert_policy_sha256"]
    assert attributes["medium_policy_sha256"] in attributes["note"]
    assert attributes["expert_policy_sha256"] in attributes["note"]


def test_returns_are_of_whole_episodes():
    columns = {
        "rewards": np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        "terminals": np.array([False, True, False, False, False, False]),
        "timeouts": np.array([False, False, False, False, True, False]),
    }
    assert collect.returns_of(columns, "rewards") == (7.5, 12.0)  # of 3 and 12
    columns["terminals"][1] = False
    columns["timeouts"][4] = False
    mean_return, _ = collect.returns_of(columns, "rewards")
    assert math.isnan(mean_return)


def test_the_first_evaluation_at_the_medium_return_ends_sac(tmp_path, monkeypatch):
    """1500 for hopper. Out of reach it is one sentence, and more steps go on from there."""
    low, high = mopo.reference_returns("hopper-medium-v2")

    def evaluate(sac, args, episodes, steps):
        mean_return = 1500.0 if steps >= 100 else 1499.9
        return np.full(episodes, 100 * (mean_return - low) / (high - low))

    monkeypatch.setattr(mopo, "evaluate", evaluate)
    settings = {**TINY_SAC, "medium_return": None, "eval_every": 20, "save_every": 20}
    once = make("hopper-medium-v2", tmp_path / "once", **settings)
    columns, attributes = read(once)
    assert attributes["medium_return"] == 1500
    assert attributes["medium_policy_steps"] == 100
    assert len(columns["rewards"]) == 150

    again = tmp_path / "again"
    with pytest.raises(SystemExit, match="1499.9 in --sac-steps 80, not 1500.0: take more"):
        make("hopper-medium-v2", again, **{**settings, "sac_steps": 80})
    with pytest.raises(SystemExit, match="--sac-steps must exceed"):
        make("hopper-medium-v2", again, **{**settings, "sac_steps": 41, "resume": True})
    make("hopper-medium-v2", again, **settings, resume=True)
    assert again.read_bytes() == once.read_bytes()


# --- stopped collections ---
# With these settings MIXED saves about nine times: while SAC learns, then during each half.
@pytest.mark.parametrize("env_id, saves", [(MIXED, 1), (MIXED, 5), (MIXED, 9), (RANDOM, 2)])
def test_resume_is_bit_exact(env_id, saves, tmp_path, monkeypatch, collected):
    path = tmp_path / "x"
    settings = {**TINY_SAC, "save_every": 20}
    save = collect.SACCollection.save
    done = []

    def save_and_stop(collection):
        save(collection)
        done.append(collection)
        if len(done) == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collect.SACCollection, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            make(env_id, path, **settings)
    assert not path.exists()
    with pytest.raises(SystemExit, match="x.partial.pt is a stopped run: --resume continues it"):
        make(env_id, path, **settings)
    with pytest.raises(SystemExit, match="settings of the stopped run: seed was 1"):
        make(env_id, path, **{**settings, "seed": 4, "resume": True})
    make(env_id, path, **settings, resume=True)
    assert path.read_bytes() == collected(env_id).read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_overwrite_starts_a_stopped_collection_again(tmp_path, collected):
    (tmp_path / "x.partial.pt").write_bytes(b"of a stopped run")
    path = make(RANDOM, tmp_path / "x", **TINY_SAC, overwrite=True)
    assert path.read_bytes() == collected(RANDOM).read_bytes()
    assert list(tmp_path.iterdir()) == [path]


# --- writing ---
@pytest.fixture
def small_disk():
    """No file of this process may get larger than 5000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file(tmp_path, small_disk):
    path = tmp_path / "x.hdf5"
    path.write_bytes(b"precious")
    with pytest.raises(SystemExit, match=f"cannot write {path} .*; what was there is unharmed"):
        make(MAZE, path, steps=300, overwrite=True)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(MAZE, tmp_path / "x.hdf5", steps=300)
    assert list(tmp_path.iterdir()) == []


def test_the_content_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync

    def fsync(descriptor):
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_size)
        assert not (tmp_path / "x.hdf5").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    path = make(MAZE, tmp_path / "x.hdf5", steps=300)
    assert synced == [path.stat().st_size]


def test_what_a_killed_run_leaves_is_not_taken_for_data(tmp_path, monkeypatch):
    (tmp_path / "maze2d-umaze-sparse-v1.hdf5.part").write_bytes(b"half a file")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = collect.collect(collect.Args(MAZE, steps=300))
    assert path == mopo.find_dataset(mopo.Args(MAZE))
    assert list(tmp_path.iterdir()) == [path]
    assert len(read(path)[0]["rewards"]) == 300


@pytest.mark.parametrize("folder", ["there", "missing/x/y"])
def test_a_tilde_is_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir()
    assert make(MAZE, f"~/{folder}/a", steps=9) == tmp_path / folder / "a"
    monkeypatch.setenv("D4RL_DATASET_DIR", f"~/{folder}")
    path = collect.collect(collect.Args(MAZE, steps=9))
    assert path.parent == tmp_path / folder


# --- the command line ---
MISTAKES = [
    ("--env-id hopper-medum-v2", "no recipe for --env-id hopper-medum-v2.*hopper-medium-v2"),
    ("--steps 0", "--steps is 0, but must be at least 1"),
    ("--seed -1", "--seed is -1, but must be at least 0"),
    ("--gamma 1.1", "--gamma is 1.1, but must be at least 0 and at most 1"),
    ("--critic-lr 0", "--critic-lr is 0.0, but must be above 0"),
    ("--hidden 8 0", "--hidden is 0, but must be at least 1"),
    ("--action-noise -0.1", "--action-noise is -0.1, but must be at least 0"),
    ("--medium-return nan", "--medium-return is nan, but must be a number"),
    ("--target-entropy inf", "--target-entropy is inf, but must be at least -1000000000"),
    ("--tau 0", "--tau is 0.0, but must be above 0 and at most 1"),
    ("--threads 1000000", "--threads is 1000000, but must be at least 0"),
    ("--sac-steps 5000", "--sac-steps must exceed --random-steps 5000"),
    ("--env-id maze2d-umaze-v1 --resume", "saves nothing that --resume could start from"),
    ("--output {0}", "is a folder: --output takes the name of a file"),
    ("--output {0}/there", "there exists: add --overwrite to replace it"),
    ("--output {0}/there/x.hdf5", "cannot write .*there/x.hdf5"),
    ("--resume", "nothing to resume: there is no .*x.hdf5.partial.pt"),
    ("--resume --output {0}/y.hdf5", "y.hdf5.partial.pt is damaged"),
    (
        "--critic-lr 1e9 --sac-steps 60 --random-steps 9 --eval-every 50",
        "after 50 steps of SAC .* is not finite: lower the learning rates",
    ),
]


@pytest.mark.parametrize("flags, sentence", MISTAKES)
def test_a_mistake_is_one_sentence(flags, sentence, tmp_path, monkeypatch):
    (tmp_path / "there").write_bytes(b"precious")
    (tmp_path / "y.hdf5.partial.pt").write_bytes(b"PK rubbish")
    before = sorted(tmp_path.iterdir())
    command = f"collect.py --env-id hopper-medium-v2 --output {tmp_path}/x.hdf5 --no-cuda "
    monkeypatch.setattr(sys, "argv", (command + flags.format(tmp_path)).split())
    with pytest.raises(SystemExit, match=sentence) as stop:
        collect.main()
    assert "\n" not in str(stop.value)
    assert (tmp_path / "there").read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line_makes_a_file(tmp_path, monkeypatch, capsys):
    command = f"collect.py --env-id {MAZE} --steps 50 --seed 3 --output {tmp_path}/x.hdf5"
    monkeypatch.setattr(sys, "argv", command.split())
    collect.main()
    columns, attributes = read(tmp_path / "x.hdf5")
    assert len(columns["rewards"]) == 50
    assert attributes["note"] in capsys.readouterr().out


def test_help_starts_with_what_it_does_and_the_most_used_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["collect.py", "--help"])
    with pytest.raises(SystemExit):
        collect.main()
    description, _ = capsys.readouterr().out.split("options", 1)
    assert "Make anew the datasets that no server hosts" in description
    assert description.count("python collect.py --env-id") == 5
    assert len(description.splitlines()) < 18
