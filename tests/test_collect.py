"""collect.py's datasets of SAC: environments, file format, stop rule, relabelling, resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
import torch

import collect
import mopo

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    hidden=(8, 8), batch_size=16, eval_episodes=1, cpu_fast_matmul=False, cuda=False, threads=1
)  # fmt: skip
JUMP, ANT = "halfcheetah-jump-v0", "ant-angle-v0"


def read(path):
    """All columns of a file by name, and its attributes."""
    columns = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, x: columns.update({name: x[()]}) if isinstance(x, h5py.Dataset) else None
        )
        return columns, dict(file.attrs)


# ---- the two generalisation tasks


def plain_env(env_id, seed=0):
    env = collect.make_env(env_id).unwrapped
    env.reset(seed=seed)
    return env


@pytest.mark.parametrize("script", ["mopo", "combo", "collect"])
@pytest.mark.parametrize("env_id, obs_dim, action_dim", [(JUMP, 18, 6), (ANT, 27, 8)])
def test_make_env_finds_the_tasks(script, env_id, obs_dim, action_dim):
    env = __import__(script).make_env(env_id)
    assert env.observation_space.shape == env.reset(seed=0)[0].shape == (obs_dim,)
    assert env.action_space.shape == (action_dim,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert env.get_wrapper_attr("_max_episode_steps") == 1000
    assert env.unwrapped.dt == pytest.approx(0.05) and env.unwrapped.frame_skip == 5


@pytest.mark.parametrize("env_id, positions", [(JUMP, 1), (ANT, 2)])
def test_observations_and_reset_noise(env_id, positions):
    env = plain_env(env_id)
    rows, speeds = [], []
    for seed in range(200):
        obs = env.reset(seed=seed)[0]
        q, v = env.data.qpos, env.data.qvel
        height = [env.data.body("torso").xpos[2]] if env_id == JUMP else []
        assert np.array_equal(obs, np.concatenate([q[positions:], height, v]))
        rows.append(q - env.init_qpos)
        speeds.append(v.copy())
    assert 0.099 < np.abs(rows).max() <= 0.1
    assert np.std(speeds) == pytest.approx(0.1, rel=0.1)
    if env_id == JUMP:  # right after a reset, the body frame's 0.7 m plus the joint
        assert obs[8] == pytest.approx(0.7 + env.data.qpos[1])


def test_jump_rewards():
    env, rng = plain_env(JUMP), np.random.default_rng(0)
    first = env.data.body("torso").xpos[2]
    for t in range(30):
        action = rng.uniform(-1, 1, 6)
        if t % 10 == 5:  # beyond the cap, and far on the other side of it
            env.data.qvel[0] = 10.0 if t < 20 else -10.0
        x = env.data.qpos[0]
        _, reward, terminated, truncated, info = env.step(action)
        speed = (env.data.qpos[0] - x) / 0.05
        behaviour = min(speed, 3.0) - 0.1 * (action**2).sum()
        assert info["behaviour_reward"] == pytest.approx(behaviour)
        assert reward == pytest.approx(
            behaviour + 15 * (env.data.body("torso").xpos[2] - first), abs=1e-9
        )
        assert not terminated and not truncated
        if t % 10 == 5:
            assert (speed > 3.0) == (t < 20)
    env.data.qpos[1] = 50.0  # high up, where it would end if it ever did
    assert not env.step(np.zeros(6))[2]


def test_ant_rewards():
    env, rng = plain_env(ANT), np.random.default_rng(0)
    contacts = []
    for _ in range(60):
        action = rng.uniform(-1, 1, 8)
        before = env.data.body("torso").xpos[:2].copy()
        _, reward, _, truncated, info = env.step(action)
        vx, vy = (env.data.body("torso").xpos[:2] - before) / 0.05
        forces = np.clip(env.data.cfrc_ext, -1, 1)
        contacts.append((forces**2).sum())
        rest = 1 - 0.5 * (action**2).sum() - 0.5e-3 * contacts[-1]
        assert info["behaviour_reward"] == pytest.approx(vx + rest)
        assert reward == pytest.approx(vx * np.sqrt(0.75) + vy * 0.5 + rest)
        assert not truncated
    assert max(contacts) > 1  # zero throughout without mj_rnePostConstraint


@pytest.mark.parametrize("height, ends", [(0.19, True), (0.21, False), (0.99, False), (1.01, True)])
def test_ant_termination(height, ends):
    """As known_termination has it, and the last step is paid as any other."""
    env = plain_env(ANT)
    env.model.opt.gravity[:] = 0.0
    env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONSTRAINT  # nothing moves
    q = env.init_qpos.copy()
    q[2] = height
    env.set_state(q, np.zeros(14))
    obs, reward, terminated, truncated, info = env.step(np.zeros(8))
    assert obs[0] == pytest.approx(height)
    rule, known = mopo.known_termination(ANT)
    assert known and terminated == ends == bool(rule(torch.from_numpy(obs))) and not truncated
    assert info["behaviour_reward"] == pytest.approx(info["x_velocity"] + 1)
    turned = np.sqrt(0.75) * info["x_velocity"] + 0.5 * info["y_velocity"]
    assert reward == pytest.approx(turned + 1)


# ---- format and round trip

COLLECTED = {
    "hopper-random-v2": dict(steps=300),
    "halfcheetah-random-v2": dict(steps=2_100),
    "hopper-medium-v2": dict(steps=250),
    "walker2d-medium-replay-v2": {},
    "hopper-medium-expert-v2": dict(steps=150),
    "walker2d-expert-v2": dict(steps=200),
    JUMP: dict(sac_steps=2_100, random_steps=1_950, eval_every=1_000),
    ANT: dict(sac_steps=500, random_steps=300),
}
SETTINGS = dict(sac_steps=200, random_steps=100, eval_every=100, medium_return=-1e3, seed=1)
ROWS = {"walker2d-medium-replay-v2": 100, "hopper-medium-expert-v2": 300, JUMP: 2_100, ANT: 500}
FILES = {
    "hopper-random-v2": "hopper_random-v2.hdf5",
    "walker2d-medium-replay-v2": "walker2d_medium_replay-v2.hdf5",
    "hopper-medium-expert-v2": "hopper_medium_expert-v2.hdf5",
    JUMP: "halfcheetah-jump-v0.hdf5",
    ANT: "ant-angle-v0.hdf5",
}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """{env id: path}, each collected when first asked for, all in one D4RL folder."""
    folder, paths = tmp_path_factory.mktemp("d4rl"), {}

    def get(env_id):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("D4RL_DATASET_DIR", str(folder))
            if env_id not in paths:
                flags = TINY | SETTINGS | COLLECTED[env_id]
                paths[env_id] = collect.collect(collect.Args(env_id=env_id, **flags))
        return paths[env_id]

    return get


@pytest.mark.parametrize("env_id", COLLECTED)
def test_round_trip(env_id, collected, monkeypatch):
    path = collected(env_id)
    assert path.name == FILES.get(env_id, path.name)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(path.parent))  # mopo.py finds it with no flag
    columns, attributes = read(path)
    rows = ROWS.get(env_id, COLLECTED[env_id].get("steps"))
    env = mopo.make_env(env_id)
    (obs_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    q, v = env.unwrapped.data.qpos.shape, env.unwrapped.data.qvel.shape
    expected = {
        "observations": ((obs_dim,), "<f4"), "next_observations": ((obs_dim,), "<f4"),
        "actions": ((action_dim,), "<f4"), "rewards": ((), "<f4"), "terminals": ((), "|b1"),
        "timeouts": ((), "|b1"), "infos/qpos": (q, "<f4"), "infos/qvel": (v, "<f4"),
    }  # fmt: skip
    if env_id in (JUMP, ANT):
        expected["infos/behaviour_rewards"] = ((), "<f4")
    assert {k: (x.shape[1:], x.dtype.str) for k, x in columns.items()} == expected
    assert {len(x) for x in columns.values()} == {rows}
    assert not (columns["terminals"] & columns["timeouts"]).any()
    assert np.abs(columns["actions"]).max() <= 1

    data = mopo.load_dataset(env_id, None, env)
    keep = ~columns["timeouts"]
    assert np.array_equal(data.obs, columns["observations"][keep])
    assert np.array_equal(data.next_obs, columns["next_observations"][keep])
    assert np.array_equal(data.reward, columns["rewards"][keep])
    assert np.array_equal(data.terminated, columns["terminals"][keep])
    (note,) = data.notes
    assert note == f"recollected: {attributes['recollected']}"
    for word in ("Seed 1", mujoco.__version__, gymnasium.__version__, torch.__version__):
        assert word in note
    if "random" not in env_id:
        (digest, *_) = [x for k, x in attributes.items() if k.endswith("sha256")]
        assert len(digest) == 64 and digest in note and "return" in note and " steps" in note


@pytest.mark.parametrize("env_id", ["hopper-random-v2", "halfcheetah-random-v2", JUMP, ANT])
def test_next_observations(env_id, collected):
    """What followed, also where an episode ends: it terminates, or comes from one more step."""
    columns, _ = read(collected(env_id))
    obs, next_obs = columns["observations"], columns["next_observations"]
    ends = columns["terminals"] | columns["timeouts"]
    assert ends.any()
    assert np.array_equal(next_obs[:-1][~ends[:-1]], obs[1:][~ends[:-1]])
    assert (np.abs(next_obs[:-1] - obs[1:]).max(1)[ends[:-1]] > 0.01).all()
    rule, _ = mopo.known_termination(env_id)
    ended = rule(torch.from_numpy(next_obs)).numpy()
    assert np.array_equal(ended, columns["terminals"])
    env = collect.make_env(env_id)
    env.reset()
    worst = 0.0
    for t in np.flatnonzero(ends)[:10]:
        q, v = columns["infos/qpos"][t], columns["infos/qvel"][t]
        env.unwrapped.set_state(q.astype(float), v.astype(float))
        after = env.unwrapped.step(columns["actions"][t])[0]
        worst = max(worst, np.abs(after - next_obs[t]).max())
    assert worst < 0.05
    if env_id in ("halfcheetah-random-v2", JUMP):
        assert list(np.flatnonzero(columns["timeouts"])) == [999, 1999]


def test_both_policies_of_medium_expert(collected):
    """The first half ends with a flag: what follows it is another policy's episode."""
    columns, attributes = read(collected("hopper-medium-expert-v2"))
    assert (columns["terminals"] | columns["timeouts"])[149]
    assert attributes["medium_policy_steps"] == 100 and attributes["expert_policy_steps"] == 200
    assert attributes["medium_policy_sha256"] != attributes["expert_policy_sha256"]
    # SAC is looked at until its end, and the file keeps what was seen.
    steps, seen = attributes["eval_steps"], attributes["eval_returns"]
    assert list(steps) == [100, 200]
    assert seen[list(steps).index(100)] == attributes["medium_policy_return"]
    assert seen[-1] == attributes["expert_policy_return"]
    assert (
        f"mean return of the whole episodes {attributes['mean_return']:.1f}"
        in (attributes["recollected"])
    )


def test_relabelled_rewards_of_jump(collected):
    """From the file alone: x stands in infos/qpos, the height in the observations."""
    columns, _ = read(collected(JUMP))
    x, cost = columns["infos/qpos"][:, 0], 0.1 * (columns["actions"] ** 2).sum(1)
    inside = np.flatnonzero(~columns["timeouts"][:-1])  # x after the last step is not stored
    speed = (x[inside + 1] - x[inside]) / 0.05
    behaviour = np.minimum(speed, 3.0) - cost[inside]
    assert columns["infos/behaviour_rewards"][inside] == pytest.approx(behaviour, abs=1e-3)
    start = columns["observations"][inside // 1000 * 1000, 8]
    height = columns["next_observations"][inside, 8] - start
    assert columns["rewards"][inside] == pytest.approx(behaviour + 15 * height, abs=1e-3)
    assert np.abs(15 * height).max() > 1


def test_relabelled_rewards_of_ant(collected):
    """The two rewards differ by the direction alone; the file's rows replay from their seeds."""
    columns, _ = read(collected(ANT))
    rewards, behaviour = columns["rewards"], columns["infos/behaviour_rewards"]
    ends = np.flatnonzero(columns["terminals"])
    inside = np.setdiff1d(np.arange(len(rewards) - 1), ends)
    way = columns["infos/qpos"][inside + 1, :2] - columns["infos/qpos"][inside, :2]
    vx, vy = way.T / 0.05
    turn = vx * (np.cos(np.pi / 6) - 1) + vy * np.sin(np.pi / 6)
    # The torso's position is MuJoCo's of the last substep's kinematics, not quite that of qpos.
    assert (rewards - behaviour)[inside] == pytest.approx(turn, abs=0.1)
    assert np.abs(turn).max() > 0.5

    env, first = collect.make_env(ANT).unwrapped, 0
    for k, end in enumerate(ends[:3]):
        obs = env.reset(seed=collect.phase_seed(1, "SAC episode", k))[0]
        for t in range(first, end + 1):
            assert np.array_equal(obs.astype(np.float32), columns["observations"][t])
            torso = env.data.body("torso").xpos[:2].copy()
            obs = env.step(columns["actions"][t])[0]
            vx, vy = (env.data.body("torso").xpos[:2] - torso) / 0.05
            rest = 1 - 0.5 * (columns["actions"][t] ** 2).sum()
            rest -= 0.5e-3 * (np.clip(env.data.cfrc_ext, -1, 1) ** 2).sum()
            assert behaviour[t] == pytest.approx(vx + rest, abs=1e-5)
            assert rewards[t] == pytest.approx(vx * np.sqrt(0.75) + vy * 0.5 + rest, abs=1e-5)
        first = end + 1


@pytest.mark.parametrize("env_id", [JUMP, ANT])
def test_batch_statistics(env_id, collected, capsys):
    columns, attributes = read(collected(env_id))
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"])
    returns = [part.sum() for part in np.split(columns["rewards"].astype(float), ends + 1)][:-1]
    assert attributes["mean_return"] == pytest.approx(np.mean(returns))
    assert attributes["max_return"] == pytest.approx(np.max(returns))
    every = {JUMP: [1000, 2000, 2100], ANT: [100, 200, 300, 400, 500]}  # and the last step
    assert list(attributes["eval_steps"]) == every[env_id] and len(attributes["eval_returns"]) > 2
    own = np.split(columns["infos/behaviour_rewards"].astype(float), ends + 1)[:-1]
    own = np.mean([part.sum() for part in own])
    assert attributes["mean_behaviour_return"] == pytest.approx(own)
    assert f"in SAC's own task {own:.1f}" in attributes["recollected"]
    collection = collect.SACCollection(collect.Args(env_id=env_id, sac_steps=10, **TINY))
    mean, most = collect.OOD_STATISTICS[env_id]
    said = collection.summary(columns)
    assert f"{mean} and {most}" in said
    assert f"{np.mean(returns) - mean:+.1f} and {np.max(returns) - most:+.1f} away" in said


# ---- SAC


def test_sac_is_trained_on_the_behaviour_reward(collected):
    args = collect.Args(env_id=ANT, sac_steps=30, random_steps=30, **TINY)
    collection = collect.SACCollection(args)
    for _ in range(30):
        collection.parts["SAC"].add_row(collection.act_uniformly)
    rows = collection.parts["SAC"].rows
    collection.agent.remember(rows, 0, 30)
    batch = collection.agent.sample(1000)
    assert set(batch.reward[0].tolist()) == set(rows["infos/behaviour_rewards"].tolist())
    assert not set(batch.reward[0].tolist()) & set(rows["rewards"].tolist())
    for row in range(5):  # a row of the batch is one row of the data, whole
        t = int(np.flatnonzero(rows["infos/behaviour_rewards"] == batch.reward[0, row].item())[0])
        assert np.array_equal(batch.obs[0, row], rows["observations"][t])
        assert np.array_equal(batch.action[0, row], rows["actions"][t])
        assert np.array_equal(batch.next_obs[0, row], rows["next_observations"][t])
        assert batch.terminated[0, row] == rows["terminals"][t]


def test_policy_samples():
    args = collect.Args(hidden=(8,))
    policy = collect.Policy(collect.GaussianPolicy(1, 3, 2, args))
    obs = np.random.default_rng(0).standard_normal(3).astype(np.float32)
    u = np.arctanh(policy.act(np.tile(obs, (20_000, 1))).astype(float))
    mean, log_std = policy.actor(torch.from_numpy(obs)[None, None])
    assert u.mean(0) == pytest.approx(mean[0, 0].detach().numpy(), abs=0.05)
    assert u.std(0) == pytest.approx(log_std[0, 0].detach().exp().numpy(), rel=0.03)


@pytest.mark.parametrize("kind, rows", [("medium-replay", 60), ("medium", 60 + 40)])
def test_stop_rule(kind, rows, monkeypatch):
    """The first evaluation that reaches the medium return ends SAC, at a multiple of eval_every."""
    returns, steps = iter([1.0, 1499.9, 1500.0, 9.0]), []

    def evaluate(policy, args, learner, k, episodes):
        steps.append((k, episodes))
        return np.full(10, next(returns))

    monkeypatch.setattr(collect, "evaluate", evaluate)
    args = collect.Args(
        env_id=f"hopper-{kind}-v2", sac_steps=100, random_steps=10, eval_every=20, steps=40, **TINY
    )
    collection = collect.SACCollection(args)
    while collection.count < collection.total():
        collection.add_row()
    assert steps == [(20, 1), (40, 1), (60, 1)]
    assert collection.count == rows
    assert collection.stops == {"medium": [60, 1500.0]}
    columns = collection.dataset()
    assert len(columns["rewards"]) == (60 if kind == "medium-replay" else 40)
    weights = zip(
        collection.policies["medium"].parameters(), collection.agent.actor.parameters(), strict=True
    )
    assert all(torch.equal(a, b) and a is not b for a, b in weights)


def test_a_return_out_of_reach_is_one_sentence(tmp_path):
    args = collect.Args(
        env_id="hopper-medium-v2", sac_steps=40, random_steps=10, eval_every=20,
        output=str(tmp_path / "x.hdf5"), **TINY,
    )  # fmt: skip
    with pytest.raises(collect.UserError, match="did not reach 1500.0 in --sac-steps 40, at best"):
        collect.collect(args)
    assert list(tmp_path.iterdir()) == []


def test_a_return_out_of_reach_can_be_reached_with_more_steps(tmp_path, monkeypatch):
    """What SAC has done until then is not lost: --resume with more steps gives the same file."""

    def evaluate(policy, args, learner, step, episodes):
        return np.full(10, 2000.0 if step >= 100 else 0.0)

    monkeypatch.setattr(collect, "evaluate", evaluate)
    monkeypatch.setattr(collect.SACCollection, "save_every", 20)
    settings = dict(env_id="hopper-medium-v2", random_steps=40, eval_every=20, steps=30) | TINY
    once, again = (str(tmp_path / name) for name in ("once.hdf5", "again.hdf5"))
    collect.collect(collect.Args(output=once, sac_steps=200, **settings))
    with pytest.raises(collect.UserError, match="did not reach"):
        collect.collect(collect.Args(output=again, sac_steps=80, **settings))
    assert Path(again + ".partial.pt").exists() and not Path(again).exists()
    collect.collect(collect.Args(output=again, sac_steps=200, resume=True, **settings))
    assert Path(again).read_bytes() == Path(once).read_bytes()


def test_medium_returns():
    defaults = [collect.medium_return(collect.Args(env_id=f"{f}-medium-v2"))
                for f in ("hopper", "halfcheetah", "walker2d")]  # fmt: skip
    assert defaults == [1500.0, 4700.0, 2700.0]
    assert collect.medium_return(collect.Args("hopper-medium-v2", medium_return=7.0)) == 7.0


def test_sac_solves_pendulum(monkeypatch):
    """gymnasium's own: random about -1200, solved above -200."""

    def make_env(env_id):
        return gymnasium.wrappers.RescaleAction(gymnasium.make(env_id), *np.float32([-1, 1]))

    monkeypatch.setattr(collect, "make_env", make_env)
    monkeypatch.setitem(collect.SAC_TASKS, "Pendulum-v1", collect.SACTask("end", ()))
    fast = dict(hidden=(64, 64), batch_size=128, gamma=0.95, tau=0.01)
    rates = dict(actor_lr=2e-3, critic_lr=2e-3, alpha_lr=2e-3)
    args = TINY | fast | rates | dict(sac_steps=5_000, random_steps=400)
    collection = collect.SACCollection(collect.Args(env_id="Pendulum-v1", **args))
    for _ in range(4_800):
        collection.add_row()
    returns = collection.parts["SAC"].rows["rewards"][:4_800].reshape(-1, 200).sum(1)
    assert returns[:2].mean() < -700
    assert returns[-8:].mean() > -300


# ---- resume

FLAGS = dict(
    env_id="hopper-medium-expert-v2", steps=150, sac_steps=160, random_steps=40, eval_every=40,
    medium_return=-1e3, save_every=20, seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a collection that was never stopped."""
    path = tmp_path_factory.mktemp("whole") / "whole.hdf5"
    collect.collect(collect.Args(output=str(path), **FLAGS, **TINY))
    return path.read_bytes()


def test_sigkill_and_resume_give_the_same_bytes(tmp_path, whole):
    cut, partial = tmp_path / "cut.hdf5", tmp_path / "cut.hdf5.partial.pt"
    command = [sys.executable, str(ROOT / "collect.py"), "--output", str(cut), "--no-cuda"]
    for name, value in (FLAGS | TINY).items():
        if not isinstance(value, bool):
            values = value if isinstance(value, tuple) else (value,)
            command += ["--" + name.replace("_", "-"), *map(str, values)]
    process = subprocess.Popen([*command, "--no-cpu-fast-matmul"], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not partial.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists() and not cut.exists()
    again = FLAGS | TINY | dict(output=str(cut))
    with pytest.raises(collect.UserError, match="stopped run"):
        collect.collect(collect.Args(**again))
    with pytest.raises(collect.UserError, match="settings"):
        collect.collect(collect.Args(**again | dict(seed=4, resume=True)))
    collect.collect(collect.Args(**again | dict(resume=True)))
    assert cut.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["cut.hdf5"]


@pytest.mark.parametrize("saves", [1, 4, 8, 12])
def test_resume_at_any_save(saves, tmp_path, monkeypatch, whole):
    """Stopped while SAC learns, and while either policy is rolled out."""
    path, count = tmp_path / "x.hdf5", 0
    save = collect.SACCollection.save

    def save_and_stop(self, partial):
        nonlocal count
        save(self, partial)
        count += 1
        if count == saves:
            raise KeyboardInterrupt

    args = FLAGS | TINY | dict(output=str(path))
    with monkeypatch.context() as patch:
        patch.setattr(collect.SACCollection, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            collect.collect(collect.Args(**args))
    torch.manual_seed(0)
    collect.collect(collect.Args(**args | dict(resume=True)))
    assert path.read_bytes() == whole


def test_resume_of_uniform_actions(tmp_path, monkeypatch):
    """Where no SAC is trained."""
    settings = TINY | dict(env_id="hopper-random-v2", steps=120, save_every=20)
    once, again = (str(tmp_path / name) for name in ("once.hdf5", "again.hdf5"))
    collect.collect(collect.Args(output=once, **settings))
    save = collect.SACCollection.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect.SACCollection, "save", lambda *a: (save(*a), stop_now()))
        collect.collect(collect.Args(output=again, **settings))
    collect.collect(collect.Args(output=again, resume=True, **settings))
    assert Path(again).read_bytes() == Path(once).read_bytes()


def stop_now():
    raise KeyboardInterrupt


def test_resume_needs_steps_to_take(tmp_path, monkeypatch):
    """An unfinished SAC with as many rows as --sac-steps must not pass for a finished one."""
    settings = TINY | dict(
        env_id="halfcheetah-medium-replay-v2", random_steps=10, eval_every=5000, save_every=900,
        output=str(tmp_path / "x.hdf5"),
    )  # fmt: skip
    monkeypatch.setattr(collect, "evaluate", lambda *args: np.zeros(10))
    save = collect.SACCollection.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect.SACCollection, "save", lambda *a: (save(*a), stop_now()))
        collect.collect(collect.Args(sac_steps=2000, **settings))
    for steps in (1000, 900):
        with pytest.raises(collect.UserError, match="--sac-steps must exceed the 1000 of"):
            collect.collect(collect.Args(sac_steps=steps, resume=True, **settings))


def test_resume_keeps_the_settings_of_the_processor(tmp_path, monkeypatch):
    args = collect.Args(**FLAGS, **TINY)
    collection = collect.SACCollection(args)
    collection.matmul = "as saved"
    collection.save(tmp_path / "x.pt")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    seen = []
    monkeypatch.setattr(collect, "set_cpu_matmul", seen.append)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    fresh = collect.SACCollection(args)
    seen.clear()
    fresh.load(tmp_path / "x.pt")
    assert seen == ["as saved", 1] and fresh.matmul == "as saved"


def test_diverged_training_is_one_sentence_and_leaves_no_file(tmp_path):
    settings = TINY | dict(env_id="hopper-medium-replay-v2", sac_steps=200, random_steps=40)
    args = collect.Args(
        output=str(tmp_path / "x.hdf5"), eval_every=100, critic_lr=1e30, actor_lr=1e30, **settings
    )
    with pytest.raises(collect.UserError, match="is not finite after 100 steps of SAC"):
        collect.collect(args)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_saves_and_a_second_one_stops(tmp_path, monkeypatch, whole):
    """The first Ctrl-C waits for the end of the episode, then saves; nothing is lost."""
    path, add_row = tmp_path / "x.hdf5", collect.SACCollection.add_row
    args = FLAGS | TINY | dict(output=str(path), save_every=10_000)
    presses = {"once": [60], "twice": [60, 61]}

    def press(self):
        add_row(self)
        if self.count in presses[mode]:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    for mode in ("twice", "once"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(collect.SACCollection, "add_row", press)
            collect.collect(collect.Args(**args))
        assert Path(f"{path}.partial.pt").exists() == (mode == "once")
        assert signal.getsignal(signal.SIGINT) is handler
    collect.collect(collect.Args(**args | dict(resume=True)))
    assert path.read_bytes() == whole


# ---- bad input

BAD = {
    "unknown id": ("--env-id hopper-medum-v2", "hopper-medium-v2"),
    "unknown task": ("--env-id halfcheetah-jump-v1", "halfcheetah-jump-v0"),
    "not v2": ("--env-id walker2d-expert-v0", "walker2d-expert-v2"),
    "zero steps": ("--steps 0", "at least 1"),
    "zero SAC steps": ("--sac-steps 0", "--sac-steps is 0; it must be at least 1"),
    "too few SAC steps": ("--sac-steps 5000", "must exceed --random-steps 5000"),
    "batch": ("--batch-size 0", "at least 1"),
    "width": ("--hidden 8 0", "must be positive"),
    "discount": ("--gamma 1.5", "at most 1"),
    "rate": ("--actor-lr 0", "positive"),
    "NaN": ("--medium-return nan", "finite"),
    "exists": ("--output {tmp}/there", "--overwrite"),
    "nothing to resume": ("--resume", "nothing to resume"),
    "damaged": ("--resume --output {tmp}/y.hdf5", "damaged"),
    "foreign": ("--resume --output {tmp}/z.hdf5", "damaged"),
    "too many SAC steps": ("--sac-steps 10000000000000", "memory"),
    "seed": ("--seed 9223372036854775808", "2**63"),
}


@pytest.mark.parametrize("flags, says", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence(flags, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").write_bytes(b"precious")
    (tmp_path / "y.hdf5.partial.pt").write_bytes(b"PK rubbish")
    torch.save({"other": 1}, tmp_path / "z.hdf5.partial.pt")
    files = {p.name for p in tmp_path.iterdir()}
    defaults = ["--env-id", "hopper-medium-v2", "--output", str(tmp_path / "x.hdf5")]
    monkeypatch.setattr(sys, "argv", ["collect.py", *defaults, *flags.format(tmp=tmp_path).split()])
    with pytest.raises(SystemExit) as stop:
        collect.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in message and message.startswith("collect.py: ") and message.count("\n") == 1
    assert (tmp_path / "there").read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == files


def test_names_are_those_of_d4rl(monkeypatch, tmp_path):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    urls = mopo.d4rl_tables()["DATASET_URLS"]
    for env_id in collect.SAC_TASKS:
        name = collect.output_path(collect.Args(env_id=env_id)).name
        assert name == (os.path.basename(urls[env_id]) if env_id in urls else f"{env_id}.hdf5")
    assert len(collect.SAC_TASKS) == 17
