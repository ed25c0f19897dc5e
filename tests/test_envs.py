"""Environments against parts of d4rl's sources (it cannot be imported) and numbers; evaluation."""

import importlib.util
import re
import runpy
import types
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

import ampl

D4RL = Path(importlib.util.find_spec("d4rl").submodule_search_locations[0])
MAZES = {
    "open": "OPEN", "umaze": "U_MAZE", "medium": "MEDIUM_MAZE", "large": "LARGE_MAZE",
    "eval-umaze": "U_MAZE_EVAL", "eval-medium": "MEDIUM_MAZE_EVAL", "eval-large": "LARGE_MAZE_EVAL",
}  # fmt: skip


def run_source(text, **names):
    """What a piece of d4rl's source defines, without its imports."""
    exec(re.sub(r"^(from|import) .*$", "", text, flags=re.MULTILINE), names)
    return types.SimpleNamespace(**names)


def make(env_id):
    env = ampl.make_env(env_id)
    env.reset(seed=0)
    return env


# --- maze2d ---


def maze_id(maze):
    return f"maze2d-{maze}-v{int(maze != 'open')}"


def step_from(env, state, action):
    """One step from the state (x, y, vx, vy) in D4RL's frame. -> obs, reward, ..."""
    origin = env.get_wrapper_attr("origin")[:2]
    env.unwrapped.set_state(np.subtract(state[:2], origin), np.array(state[2:]))
    return env.step(np.asarray(action, np.float32))


@pytest.mark.parametrize("maze", MAZES)
def test_maze_steps_as_d4rls_own_model(maze):
    """Layout, frame, walls, mass, damping, motors, speed limit: one step from 400 random states."""
    builder = runpy.run_path(str(D4RL / "pointmaze/dynamic_mjc.py"))["MJCModel"]
    source = (D4RL / "pointmaze/maze_model.py").read_text().split("\nclass MazeEnv")[0]
    d4rl = run_source(source, np=np, MJCModel=builder)
    layout = getattr(d4rl, MAZES[maze])
    assert ampl.MAZES[maze] == layout.replace("\\", "/")
    with d4rl.point_maze(layout).asfile() as file:
        model = mujoco.MjModel.from_xml_path(file.name)
    env, rng, touched = make(maze_id(maze)), np.random.default_rng(0), 0
    reach, cells = np.array([0.42, 0.42, 6, 6]), np.argwhere(d4rl.parse_maze(layout) != d4rl.WALL)
    for cell in rng.choice(cells, 400):
        state, action = rng.uniform(-reach, reach), rng.uniform(-1, 1, 2).astype(np.float32)
        state[:2] += cell - 0.2  # the middle of the cell; the walls are 0.4 away
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:], data.ctrl[:] = state[:2], state[2:].clip(-5, 5), action
        mujoco.mj_step(model, data)
        touched += data.ncon > 0
        obs = step_from(env, state, action)[0]
        assert obs == pytest.approx(np.concatenate([data.qpos, data.qvel]), abs=1e-5)
    assert touched > 40


@pytest.mark.parametrize("velocity, paid", [(4.0, 0.0), (-4.0, 1.0)])
@pytest.mark.parametrize("reward_type", ["", "dense-"])
def test_reward_is_that_of_the_position_after_the_step(velocity, paid, reward_type):
    """Across the border 0.5 from the goal (1, 1), 0.04 in a step. The goal ends nothing."""
    start = [1.0, 1.5 - velocity / 200, 0.0, velocity]
    step = step_from(make(f"maze2d-umaze-{reward_type}v1"), start, [0, 0])
    expected = np.exp(1 - step[0][1]) if reward_type else paid
    assert step[1] == pytest.approx(expected, abs=1e-6) and step[2:4] == (False, False)


@pytest.mark.parametrize("maze, goal, cells", [
    ("umaze", (1, 1), 7), ("medium", (6, 6), 26), ("large", (7, 9), 46), ("open", (2, 3), 15),
])  # fmt: skip
def test_resets(maze, goal, cells):
    """Anywhere open, the goal too; +-0.1 about the integers; speeds of deviation 0.1; by seed."""
    env = ampl.make_env(maze_id(maze))
    obs = np.array([env.reset(seed=None if k else 1)[0] for k in range(1500)])
    places = np.round(obs[:, :2])
    assert len(np.unique(places, axis=0)) == cells and (places == goal).all(1).any()
    assert tuple(env.get_wrapper_attr("goal")) == goal
    assert 0.099 < np.abs(obs[:, :2] - places).max() <= 0.1
    assert obs[:, 2:].std() == pytest.approx(0.1, rel=0.06)
    assert np.array_equal(env.reset(seed=1)[0], obs[0])


# --- D4RL's semantics ---


def d4rl_step(family, sim):
    """Reward and end that the `step` of D4RL's own Adroit task gives in our simulator's state."""
    text = (D4RL / f"hand_manipulation_suite/{family}_v0.py").read_text()
    method = "def step" + text.split("    def step")[1].split("    def get_obs")[0]
    step = run_source(method, np=np, ADD_BONUS_REWARDS=True).step
    data, kinds = sim.data, dict(site=mujoco.mjtObj.mjOBJ_SITE, body=mujoco.mjtObj.mjOBJ_BODY)
    places = dict(site_xpos=data.site_xpos, body_xpos=data.xpos, qpos=data.qpos, qvel=data.qvel)
    self = types.SimpleNamespace(data=types.SimpleNamespace(**places), act_mid=0, act_rng=1)
    self.frame_skip, self.do_simulation, self.get_obs = 5, lambda *_: None, lambda: None
    numbers = re.findall(r"self\.(\w+) = .*model\.(site|body)_name2id\(.(\w+)", text)
    for name, kind, label in numbers:
        setattr(self, name, mujoco.mj_name2id(sim.model, kinds[kind], label))
    if family == "pen":
        norm = lambda a, b: np.linalg.norm(data.site_xpos[a] - data.site_xpos[b])
        self.pen_length = norm(self.obj_t_sid, self.obj_b_sid)
        self.tar_length = norm(self.tar_t_sid, self.tar_b_sid)
    if family == "door":
        self.door_hinge_did = sim.model.joint("door_hinge").dofadr[0]
    return step(self, np.zeros(1))[1:3]


@pytest.mark.parametrize("family", ["pen", "door", "hammer", "relocate"])
def test_adroit_rewards_and_ends_are_d4rls(family):
    """In gymnasium-robotics it pays to stay away from the object, and a drop ends nothing."""
    env, rng, ends = make(f"{family}-human-v1"), np.random.default_rng(0), 0
    for _ in range(600 if family == "pen" else 60):
        _, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        expected, done = d4rl_step(family, env.unwrapped)
        assert reward == pytest.approx(expected, abs=1e-6) and terminated == done
        ends += terminated
        if terminated or truncated:
            env.reset()
    assert (ends > 2) == (family == "pen")


def test_the_time_limit_wins_over_a_drop_in_the_same_step():
    env = make("pen-human-v1")
    for step in range(100):
        if step == 99:
            env.unwrapped.data.qpos[-6] += 0.3  # m; the pen's own x axis points down
        obs, reward, *ended = env.step(np.zeros(24))[:4]
        assert ended == [False, step == 99]
    assert obs[26] < 0.075 and reward < -4


# --- other environments, scores, evaluation ---


class Slots(gymnasium.Env):
    """Episodes of 1 + seed % 5 steps, worth 1 each, ended in both ways; autoresets are poison."""

    observation_space, action_space = (gymnasium.spaces.Box(-1, 1, (n,)) for n in (3, 2))

    def reset(self, *, seed=None, options=None):
        self.left, self.value = (1 + seed % 5, 1.0) if seed is not None else (1, 1e6)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.left -= 1
        ended = self.left <= 0
        return np.zeros(3, np.float32), self.value, ended and self.value > 1, ended, {}


gymnasium.register("Slots-v0", Slots)


def actor(act, learners=1):
    """Stands for a method."""
    return types.SimpleNamespace(act=act, device=torch.device("cpu"), learners=learners)


def random_actor(env_id, learners=1):
    rng, width = np.random.default_rng(0), make(env_id).action_space.shape
    return actor(lambda obs: rng.uniform(-1, 1, (*obs.shape[:2], *width)), learners)


def test_gymnasium_ids_take_actions_in_the_unit_box():
    """Pendulum's torque reaches from -2 to 2; an environment without a time limit gets 1000."""
    env, plain = make("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    plain.reset(seed=0)
    for action in np.array([[1.0], [-0.25], [0.5]], np.float32):
        assert env.step(action)[1] == pytest.approx(plain.step(2 * action)[1])
    assert env.get_wrapper_attr("_max_episode_steps") == 200
    assert make("math:Slots-v0").get_wrapper_attr("_max_episode_steps") == 1000


@pytest.mark.parametrize("env_id, episodes, largest", [
    (maze_id("umaze"), 40, 8.0), ("pen-human-v1", 30, 2.5), ("door-human-v1", 4, 0.05),
])  # fmt: skip
def test_random_policies_score_about_zero(env_id, episodes, largest):
    """D4RL's minimum scores are random returns; ours within 4 standard errors, which are small."""
    args = ampl.Args(env_id, eval_episodes=episodes)
    scores = ampl.evaluate(random_actor(env_id), args, episodes, 0)
    error = scores.std(ddof=1) / np.sqrt(episodes)
    assert abs(scores.mean()) < 4 * error and 0 < error < largest


def test_an_evaluation_has_one_episode_per_slot():
    """Whoever is done early waits: counting what ends first would favour short episodes."""
    args = ampl.Args("Slots-v0", seed=3, eval_episodes=4)
    scores = ampl.evaluate(random_actor("Slots-v0", 2), args, 6, 0)  # one round and a half
    first = 3 * 10**10 + np.arange(8).reshape(2, 4)  # in the second round 4000 more
    assert scores.tolist() == (1 + np.hstack([first, (first + 4000)[:, :2]]) % 5).tolist()


def test_processes_give_the_same_returns():
    """--async-envs, with two learners; other evaluations and other seeds start elsewhere."""
    env_id, rule = "hopper-medium-v2", lambda obs: np.tanh(obs[..., :3] * 5 - 1)
    method, args = actor(rule, 2), [ampl.Args(env_id, seed, eval_episodes=2) for seed in (0, 1)]
    one, *others = (ampl.evaluate(method, args[i], 4, k) for i, k in ((0, 7), (0, 8), (1, 7)))
    args[0].async_envs = True
    assert np.array_equal(one, ampl.evaluate(method, args[0], 4, 7))
    assert len(np.unique([one, *others])) == 24
    ampl.vector_env(env_id, 4, True).close()
    ampl.vector_env.cache_clear()
