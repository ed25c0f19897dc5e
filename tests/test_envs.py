"""Environments against parts of d4rl's sources (it cannot be imported) and numbers; evaluation."""

import functools
import importlib.util
import itertools
import re
import runpy
import sys
import types
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

import ampl

D4RL = Path(importlib.util.find_spec("d4rl").submodule_search_locations[0])


def run_source(text, **names):
    """What a piece of d4rl's source defines, without its imports."""
    exec(re.sub(r"^(from|import) .*$", "", text, flags=re.MULTILINE), names)
    return types.SimpleNamespace(**names)


def make(env_id):
    env = ampl.make_env(env_id)
    env.reset(seed=0)
    return env


# --- maze2d ---
# Our names of the mazes, and what D4RL calls their layouts.
D4RL_LAYOUTS = {
    "open": "OPEN",
    "umaze": "U_MAZE",
    "medium": "MEDIUM_MAZE",
    "large": "LARGE_MAZE",
    "eval-umaze": "U_MAZE_EVAL",
    "eval-medium": "MEDIUM_MAZE_EVAL",
    "eval-large": "LARGE_MAZE_EVAL",
}
GOALS = {
    # maze: goal, number of open cells
    "umaze": ((1, 1), 7),
    "medium": ((6, 6), 26),
    "large": ((7, 9), 46),
    "open": ((2, 3), 15),
}


def maze_id(maze):
    return f"maze2d-{maze}-v0" if maze == "open" else f"maze2d-{maze}-v1"


def step_from(env, state, action):
    """One step from the state (x, y, vx, vy) in D4RL's frame. -> obs, reward, ..."""
    origin = env.get_wrapper_attr("origin")[:2]
    env.unwrapped.set_state(np.subtract(state[:2], origin), np.array(state[2:]))
    return env.step(np.asarray(action, np.float32))


def d4rl_model_step(model, state, action):
    """The same step of D4RL's own model, which limits the speed before it. -> obs, touches?"""
    data = mujoco.MjData(model)
    data.qpos[:] = state[:2]
    data.qvel[:] = state[2:].clip(-5, 5)
    data.ctrl[:] = action
    mujoco.mj_step(model, data)
    return np.concatenate([data.qpos, data.qvel]), data.ncon > 0


@pytest.mark.parametrize("maze", D4RL_LAYOUTS)
def test_maze_steps_as_d4rls_own_model(maze):
    """Layout, frame, walls, mass, damping, motors, speed limit: one step from 400 random states."""
    builder = runpy.run_path(str(D4RL / "pointmaze/dynamic_mjc.py"))["MJCModel"]
    source = (D4RL / "pointmaze/maze_model.py").read_text().split("\nclass MazeEnv")[0]
    d4rl = run_source(source, np=np, MJCModel=builder)
    layout = getattr(d4rl, D4RL_LAYOUTS[maze])
    assert "\\".join(ampl.MAZES[maze]) == layout
    with d4rl.point_maze(layout).asfile() as file:
        model = mujoco.MjModel.from_xml_path(file.name)

    env = make(maze_id(maze))
    random = np.random.default_rng(0)
    touched = 0
    cells = np.argwhere(d4rl.parse_maze(layout) != d4rl.WALL)
    reach = np.array([0.42, 0.42, 6, 6])  # the walls are 0.4 away; speeds end at 5
    for cell in random.choice(cells, 400):
        state = random.uniform(-reach, reach)
        state[:2] += cell - 0.2  # the middle of the cell
        action = random.uniform(-1, 1, 2).astype(np.float32)
        expected, touches = d4rl_model_step(model, state, action)
        touched += touches
        obs = step_from(env, state, action)[0]
        assert obs == pytest.approx(expected, abs=1e-5)
    assert touched > 40


@pytest.mark.parametrize("velocity, paid", [(4.0, 0.0), (-4.0, 1.0)])
@pytest.mark.parametrize("dense", [False, True])
def test_reward_is_that_of_the_position_after_the_step(velocity, paid, dense):
    """Across the border 0.5 from the goal (1, 1), 0.04 in a step. The goal ends nothing."""
    env = make("maze2d-umaze-dense-v1" if dense else "maze2d-umaze-v1")
    start = [1.0, 1.5 - velocity / 200, 0.0, velocity]
    obs, reward, terminated, truncated, _ = step_from(env, start, [0, 0])
    distance = obs[1] - 1
    expected = np.exp(-distance) if dense else paid
    assert reward == pytest.approx(expected, abs=1e-6)
    assert (terminated, truncated) == (False, False)


@pytest.mark.parametrize("maze", GOALS)
def test_resets(maze):
    """In any open cell, the goal's too; at most 0.1 from its middle; speeds of deviation 0.1."""
    goal, num_cells = GOALS[maze]
    env = ampl.make_env(maze_id(maze))
    first = env.reset(seed=1)[0]
    obs = np.array([first] + [env.reset()[0] for _ in range(1499)])
    places = np.round(obs[:, :2])
    assert len(np.unique(places, axis=0)) == num_cells
    assert tuple(env.get_wrapper_attr("goal")) == goal
    assert (places == goal).all(1).any()
    assert 0.099 < np.abs(obs[:, :2] - places).max() <= 0.1
    assert obs[:, 2:].std() == pytest.approx(0.1, rel=0.06)
    assert np.array_equal(env.reset(seed=1)[0], first)


TIME_LIMITS = {
    "maze2d-open-v0": 150,
    "maze2d-umaze-v1": 300,
    "maze2d-medium-dense-v1": 600,
    "maze2d-eval-large-v1": 800,
    "hopper-medium-v2": 1000,
    "pen-human-v1": 100,
    "door-expert-v1": 200,
}


@pytest.mark.parametrize("env_id", TIME_LIMITS)
def test_time_limits(env_id):
    """D4RL's, which differ from its successors'."""
    assert ampl.make_env(env_id).get_wrapper_attr("_max_episode_steps") == TIME_LIMITS[env_id]


# --- D4RL's semantics ---


def d4rl_step(family, sim):
    """Reward and end that the `step` of D4RL's own Adroit task gives in our simulator's state.

    `task` stands for D4RL's environment: it has what that method reads, and simulates nothing.
    """
    text = (D4RL / f"hand_manipulation_suite/{family}_v0.py").read_text()
    method = "def step" + text.split("    def step")[1].split("    def get_obs")[0]
    step = run_source(method, np=np, ADD_BONUS_REWARDS=True).step

    def do_nothing(*args):
        pass

    data = sim.data
    task = types.SimpleNamespace()
    task.data = types.SimpleNamespace(
        site_xpos=data.site_xpos, body_xpos=data.xpos, qpos=data.qpos, qvel=data.qvel
    )
    task.act_mid = 0
    task.act_rng = 1
    task.frame_skip = 5
    task.do_simulation = do_nothing
    task.get_obs = do_nothing

    # The numbers of bodies and sites, by the names that D4RL looks up.
    kinds = {"site": mujoco.mjtObj.mjOBJ_SITE, "body": mujoco.mjtObj.mjOBJ_BODY}
    look_ups = re.findall(r"self\.(\w+) = .*model\.(site|body)_name2id\(.(\w+)", text)
    for attribute, kind, label in look_ups:
        setattr(task, attribute, mujoco.mj_name2id(sim.model, kinds[kind], label))
    if family == "pen":
        sites = data.site_xpos
        task.pen_length = np.linalg.norm(sites[task.obj_t_sid] - sites[task.obj_b_sid])
        task.tar_length = np.linalg.norm(sites[task.tar_t_sid] - sites[task.tar_b_sid])
    if family == "door":
        task.door_hinge_did = sim.model.joint("door_hinge").dofadr[0]
    _, reward, done, _ = step(task, np.zeros(1))
    return reward, done


@pytest.mark.parametrize("family", ["pen", "door", "hammer", "relocate"])
def test_adroit_rewards_and_ends_are_d4rls(family):
    """In gymnasium-robotics it pays to stay away from the object, and a drop ends nothing."""
    env = make(f"{family}-human-v1")
    random = np.random.default_rng(0)
    ends = 0
    for _ in range(600 if family == "pen" else 60):
        action = random.uniform(-1, 1, env.action_space.shape)
        _, reward, terminated, truncated, _ = env.step(action)
        expected, done = d4rl_step(family, env.unwrapped)
        assert reward == pytest.approx(expected, abs=1e-6)
        assert terminated == done
        ends += terminated
        if terminated or truncated:
            env.reset()
    if family == "pen":
        assert ends > 2
    else:
        assert ends == 0


def test_the_time_limit_wins_over_a_drop_in_the_same_step():
    env = make("pen-human-v1")
    for step in range(100):
        is_last = step == 99
        if is_last:
            env.unwrapped.data.qpos[-6] += 0.3  # m; the pen's own x axis points down
        obs, reward, terminated, truncated, _ = env.step(np.zeros(24))
        assert not terminated
        assert truncated == is_last
    assert obs[26] < 0.075
    assert reward < -4


@pytest.mark.parametrize("env_id", ["hopper-medium-v2", "walker2d-medium-v2", "pen-human-v1"])
def test_the_rule_of_ending_is_the_simulators(env_id):
    """`known_termination` says of every state what the simulator says, over some episodes."""
    env = make(env_id)
    random = np.random.default_rng(0)
    ends = 0
    for _ in range(600):
        action = random.uniform(-1, 1, env.action_space.shape)
        obs, _, terminated, truncated, _ = env.step(action)
        state = torch.as_tensor(obs, dtype=torch.float32)
        if not truncated:
            assert ampl.known_termination(env_id, state).item() == terminated
        ends += terminated
        if terminated or truncated:
            env.reset()
    assert ends > 2


RULES = {
    # Ids whose family's rule is known: D4RL's, gymnasium's, ours.
    "hopper-medium-v2": "hopper",
    "hopper-full-replay-v1": "hopper",
    "hopper-medium-expert-v0": "hopper",
    "walker2d-random-v2": "walker2d",
    "ant-medium-replay-v2": "ant",
    "ant-random-expert-v0": "ant",
    "ant-angle-v0": "ant",
    "pen-cloned-v1": "pen",
    "Hopper-v4": "hopper",
    "Walker2d-v5": "walker2d",
    "Ant-v2": "ant",
    # Tasks that never end, and other tasks whose names begin alike.
    "halfcheetah-medium-v2": None,
    "door-expert-v1": None,
    "pen-mine-v0": None,
    "hopper-mine-v0": None,
    "hopper-medium-v3": None,
    "my-hopper-medium-v2": None,
    "hopper-medium-v2-mine": None,
    "hopper": None,
    "Hopper-v40": None,
    "HOPPER-V4": None,
    "antmaze-umaze-v0": None,
    "ant-umaze-v0": None,
    "AdroitHandPen-v1": None,  # it goes on after a drop
    "bullet-hopper-medium-v0": None,
}


@pytest.mark.parametrize("env_id, family", RULES.items())
def test_a_rule_of_ending_belongs_to_exact_ids(env_id, family):
    assert ampl.rule_of_ending(env_id) == ampl.FAMILY_ENDS.get(family)


def test_every_id_of_d4rl_and_gymnasium_has_its_rule():
    """All of these families that d4rl's table and gymnasium's registry have."""
    ampl.load_simulators()
    for env_id in [*ampl.d4rl_tables()["DATASET_URLS"], *gymnasium.registry]:
        own = ampl.family_of(env_id) in ampl.FAMILY_ENDS and "mine" not in env_id
        assert (ampl.rule_of_ending(env_id) is not None) == own, env_id


def never(next_obs):
    return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)


def test_rules_of_ones_own(monkeypatch):
    """By id in ENDS, which comes first, or as `ends` of the module that registers the id."""
    own = types.ModuleType("own_tasks")
    own.ends = never
    monkeypatch.setitem(sys.modules, "own_tasks", own)
    monkeypatch.setitem(sys.modules, "other_tasks", types.ModuleType("other_tasks"))
    assert ampl.rule_of_ending("own_tasks:pen-mine-v0") is never
    assert ampl.rule_of_ending("other_tasks:pen-mine-v0") is None
    assert ampl.rule_of_ending("pen-mine-v0") is None
    monkeypatch.setitem(ampl.ENDS, "own_tasks:pen-mine-v0", ampl.hopper_ends)
    monkeypatch.setitem(ampl.ENDS, "Hopper-v4", never)
    assert ampl.rule_of_ending("own_tasks:pen-mine-v0") is ampl.hopper_ends
    assert ampl.known_termination("Hopper-v4", torch.zeros(2, 11)).tolist() == [False, False]


CONTRADICTIONS = [
    # rows that the rule ends and rows that the data's terminals end, of 100 with a known s'
    (5, 5, None),
    (5, 4, None),
    (7, 5, "ends 7.0% of the rows with a known s', the data's terminals 5.0%; they differ on 2.0%"),
    (0, 30, "ends 0.0% of the rows .* terminals 30.0%; they differ on 30.0%"),
    (0, 1, "ends 0.0% of the rows .* differ on 1.0%, and the rule misses 1 of 1 terminals"),
]


@pytest.mark.parametrize("ruled, stored, message", CONTRADICTIONS)
def test_a_rule_that_contradicts_the_data(ruled, stored, message, monkeypatch, capsys):
    """In one line with both figures, from 1 % of the rows on. Rows without s' do not count."""
    monkeypatch.setitem(ampl.ENDS, "mine-v0", is_small)
    row = torch.arange(110)
    next_obs = row[:, None].float()
    data = {"next_obs": next_obs, "terminated": row < stored, "has_next": row < 100}
    next_obs[ruled:100] += 1000
    ampl.note_rule("mine-v0", data)
    printed = capsys.readouterr().out
    if message is None:
        assert printed == ""
    else:
        assert re.search(f"note: mine-v0's rule of ending {message}", printed)
        assert printed.count("\n") == 1


def is_small(next_obs):
    return next_obs[..., 0] < 1000


def test_a_rule_that_does_not_fit_the_observations(monkeypatch):
    monkeypatch.setitem(ampl.ENDS, "mine-v0", ampl.pen_ends)
    data = {"next_obs": torch.zeros(9, 4), "terminated": torch.zeros(9)}
    with pytest.raises(SystemExit, match="ending of mine-v0 does not work on its states"):
        ampl.note_rule("mine-v0", data | {"has_next": torch.ones(9, dtype=torch.bool)})


def test_scores():
    """D4RL's references of two tasks; what has none scores its return."""
    # maze2d-umaze: 23.85 is 0, 161.86 is 100, and 92.855 is half-way.
    scores = ampl.scores_of("maze2d-umaze-v1", np.array([23.85, 161.86, 92.855]))
    assert scores.tolist() == pytest.approx([0, 100, 50])
    assert ampl.scores_of("hopper-medium-v2", 3234.3) == pytest.approx(100)
    assert ampl.scores_of("hopper-medium-v2", -20.272305) == pytest.approx(0)
    assert ampl.scores_of("Pendulum-v1", -150.0) == -150


# --- other environments ---


class Slots(gymnasium.Env):
    """Episodes of 1 + seed % 5 steps, worth 1 each. A reset without a seed is worth a million.

    So a score that counts what comes after an episode's end is far from what it should be. Every
    other length ends by `terminated`, the rest by `truncated`.
    """

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        if seed is None:
            self.length = 1
            self.value = 1e6
        else:
            self.length = 1 + seed % 5
            self.value = 1.0
        self.left = self.length
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.left -= 1
        ended = self.left <= 0
        terminated = ended and self.length % 2 == 0
        return np.zeros(3, np.float32), self.value, terminated, ended and not terminated, {}


gymnasium.register("Slots-v0", Slots)


def test_gymnasium_ids_take_actions_in_the_unit_box():
    """Pendulum's torque reaches from -2 to 2; an environment without a time limit gets 1000."""
    env = make("Pendulum-v1")
    plain = gymnasium.make("Pendulum-v1")
    plain.reset(seed=0)
    for action in np.array([[1.0], [-0.25], [0.5]], np.float32):
        assert env.step(action)[1] == pytest.approx(plain.step(2 * action)[1])
    assert env.get_wrapper_attr("_max_episode_steps") == 200
    assert make("math:Slots-v0").get_wrapper_attr("_max_episode_steps") == 1000


class Own(gymnasium.Env):
    """An environment as a user might bring it, sound unless an argument says otherwise.

    The reward is the sum of the action that arrives. `low` and `high` bound the actions [2];
    `state` is what is observed, of which two finite numbers are right; `paid` makes the reward.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, low=-1.0, high=1.0, dtype=np.float32, state=(0, 0), paid=sum, seeder=None):
        low = np.broadcast_to(low, 2).astype(dtype)
        high = np.broadcast_to(high, 2).astype(dtype)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=dtype)
        self.state = np.array(state, np.float32)
        self.paid = paid
        self.seeder = seeder

    def reset(self, *, seed=None, options=None):
        if self.seeder is not None:
            self.random = self.seeder(seed)
        return self.state, {}

    def step(self, action):
        noise = 0.0 if self.seeder is None else self.random.rand()
        return self.state, self.paid(action) + noise, False, self.seeder is not None, {}


class FiveTimes(gymnasium.ActionWrapper):
    """Actions from 0 to 1 outside, from -5 to 5 inside."""

    def __init__(self):
        super().__init__(Own(low=-5.0, high=5.0))
        self.action_space = gymnasium.spaces.Box(0, 1, (2,))

    def action(self, action):
        return 10 * action - 5


def as_array(action):
    return np.array([np.sum(action)])


OWN = {
    "Seeded-v0": {"seeder": np.random.RandomState},
    "Integers-v0": {"low": 0, "high": 10, "dtype": np.int64},
    "Unbounded-v0": {"low": -np.inf, "high": np.inf},
    "HalfBounded-v0": {"low": 0.0, "high": np.inf},
    "Huge-v0": {"low": -3e38, "high": 3e38},
    "Point-v0": {"low": [-1.0, 0.0], "high": [1.0, 0.0]},
    "ArrayReward-v0": {"paid": as_array},
    "NanReward-v0": {"paid": lambda action: np.nan},
    "TextReward-v0": {"paid": lambda action: "1"},
    "NanState-v0": {"state": (0, np.nan)},
    "WideState-v0": {"state": (0, 0, 0)},
}
for env_id, arguments in OWN.items():
    gymnasium.register(env_id, Own, kwargs=arguments, disable_env_checker=True)
gymnasium.register("FiveTimes-v0", FiveTimes)


class IntegerSpace(Own):
    """Its observations are floats, and its space says that they are integers."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.int64)


gymnasium.register("IntegerSpace-v0", IntegerSpace)


def test_the_wrapped_action_space_counts():
    """Data are in the space that the environment shows, and the same action is executed."""
    env = ampl.try_env("FiveTimes-v0")
    action = np.array([[0.0, 1.0], [0.75, 0.5]] * 3, np.float32)
    raw = {"observations": np.zeros((6, 2)), "actions": action, "rewards": np.arange(6)}
    ampl.check_arrays(Path("data"), raw, env)
    assert raw["actions"][:2].tolist() == [[-1.0, 1.0], [0.5, 0.0]]
    for own, scaled in zip(action, raw["actions"]):
        assert env.step(scaled)[1] == pytest.approx(10 * own.sum() - 10)


REFUSED = {
    "Hoper-v4": "did you mean .*Hopper-v4",
    "antmaze-umaze-v0": "antmaze tasks have no simulator here",
    "CartPole-v1": "continuous actions",
    "Integers-v0": "its actions are int64; only continuous actions work",
    "Unbounded-v0": "entry 0 of an action goes from -inf to inf: no finite range",
    "HalfBounded-v0": "from 0.0 to inf: no finite range",
    "Huge-v0": "no finite range",
    "Point-v0": "entry 1 of an action goes from 0.0 to 0.0: no finite range",
    "ArrayReward-v0": "the reward is .* and not a finite number",
    "NanReward-v0": "the reward is nan and not a finite number",
    "TextReward-v0": "a reset or a step does not work",
    "NanState-v0": "an observation is .*nan.* and not .2,. finite numbers",
    "WideState-v0": "an observation is .* and not .2,. finite numbers",
    "IntegerSpace-v0": "observations are not of their space's type, int64",
    "hopper-medium-v7": "did you mean hopper-medium-v2 or hopper-medium-v1",
    "maze2d-umaze-v0": "mean maze2d-umaze-v1 or maze2d-eval-umaze-v1 or maze2d-um",  # not bullet-
    "Hopper-v9": "did you mean Hopper-v5 or Hopper-v4[?]",  # not v3, which gymnasium cannot make
    "cartpole-v1": "is it registered?",  # CartPole's actions are not continuous
}


@pytest.mark.parametrize("env_id", REFUSED)
def test_environments_that_do_not_work(env_id):
    """In one sentence, before anything is trained."""
    with pytest.raises(SystemExit) as stop:
        ampl.load_dataset(ampl.Args(env_id=env_id))
    assert "\n" not in stop.value.code
    assert re.search(REFUSED[env_id], stop.value.code)


# --- evaluation ---


class Actor:
    """Stands for a method: `rule` takes observations [n, S] to actions [n, A]."""

    device = torch.device("cpu")

    def __init__(self, rule):
        self.act = rule


def random_actor(env_id):
    random = np.random.default_rng(0)
    shape = make(env_id).action_space.shape

    def rule(obs):
        return random.uniform(-1, 1, (len(obs), *shape))

    return Actor(rule)


RANDOM_SCORES = [
    # task, episodes, largest standard error
    ("maze2d-umaze-v1", 40, 8.0),
    ("pen-human-v1", 30, 2.5),
    ("door-human-v1", 4, 0.05),
]


@pytest.mark.parametrize("env_id, episodes, largest", RANDOM_SCORES)
def test_random_policies_score_about_zero(env_id, episodes, largest):
    """D4RL's minimum scores are random returns; ours within 4 standard errors, which are small."""
    args = ampl.Args(env_id=env_id, eval_episodes=episodes)
    scores = ampl.evaluate(random_actor(env_id), args, episodes, 0)
    error = scores.std(ddof=1) / np.sqrt(episodes)
    assert abs(scores.mean()) < 4 * error
    assert 0 < error < largest


def test_an_evaluation_has_one_episode_in_each_environment():
    """Whoever is done early waits: counting what ends first would favour short episodes."""
    args = ampl.Args(env_id="Slots-v0", seed=3, eval_episodes=4)
    scores = ampl.evaluate(random_actor("Slots-v0"), args, 6, 7)  # one round and a half
    seeds = [ampl.episode_seed(3, 7, number) for number in range(6)]
    assert scores.tolist() == [1 + seed % 5 for seed in seeds]
    assert len(set(scores)) > 1


class LateFault(Own):
    """Sound for three steps; then `fault` makes what the fourth one gives."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        result = super().step(action)
        return self.fault(*result) if self.steps == 4 else result


def a_wide_observation(obs, reward, *others):
    return np.zeros(3), reward, *others


def two_rewards(obs, reward, *others):
    return obs, np.zeros(2), *others


def an_error(*result):
    raise KeyError("battery")


def a_nan_reward(obs, reward, *others):
    return obs, np.nan, *others


def a_nan_observation(obs, reward, *others):
    return np.full(2, np.nan), reward, *others


def an_exit(*result):
    sys.exit(0)


FAULTS = [a_wide_observation, two_rewards, an_error, a_nan_reward, a_nan_observation, an_exit]


@pytest.mark.parametrize("fault", FAULTS)
def test_late_faults_of_an_environment(fault):
    """In one sentence, also where the first step was sound."""
    env_id = f"{fault.__name__.replace('_', '')}-v0"
    make_it = functools.partial(LateFault, fault)
    gymnasium.register(env_id, make_it, disable_env_checker=True, max_episode_steps=10)
    ampl.try_env(env_id)
    args = ampl.Args(env_id=env_id, eval_episodes=2)
    sentence = f"--env-id {env_id}: a reset or a step does not work, mend it first"
    with pytest.raises(SystemExit, match=sentence) as stop:
        ampl.evaluate(random_actor(env_id), args, 2, 0)
    assert "\n" not in stop.value.code


def test_an_environments_own_sentence_stays():
    """walker-walk, for example, says which packages it lacks."""
    with pytest.raises(SystemExit, match="^install the simulator$"):
        with ampl.working("Own-v0"):
            sys.exit("install the simulator")


def test_no_two_episodes_begin_alike():
    """Of neighbouring seeds and evaluations; RandomState takes no seed of 2**32 or more."""
    seeds = set()
    for seed, k, number in itertools.product(range(5), range(0, 100_000, 1000), range(10)):
        seeds.add(ampl.episode_seed(seed, k, number))
    assert len(seeds) == 5 * 100 * 10
    assert 0 <= min(seeds) and max(seeds) < 2**32
    scores = ampl.evaluate(random_actor("Seeded-v0"), ampl.Args(env_id="Seeded-v0", seed=9), 10, 0)
    assert len(set(scores)) == 10


def test_an_evaluation_leaves_the_training_alone():
    """Torch's random numbers go on as if there had been none, and its own depend on the seed."""
    seen = []

    def rule(obs):
        seen.append(torch.rand(1).item())
        return np.zeros((len(obs), 2))

    torch.manual_seed(4)
    expected = torch.rand(3)
    for seed in (0, 0, 1):
        args = ampl.Args(env_id="Slots-v0", seed=seed, eval_episodes=1)
        torch.manual_seed(4)
        ampl.evaluate(Actor(rule), args, 1, 0)
        assert torch.equal(torch.rand(3), expected)
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def hop(obs):
    """A rule for the hopper that ends some episodes early."""
    return np.tanh(obs[:, :3] * 5 - 1)


def test_processes_give_the_same_returns():
    """--async-envs; other evaluations and other seeds start elsewhere."""
    method = Actor(hop)
    args = ampl.Args(env_id="hopper-medium-v2", eval_episodes=2)
    one = ampl.evaluate(method, args, 4, 7)
    next_evaluation = ampl.evaluate(method, args, 4, 8)
    other_args = ampl.Args(env_id="hopper-medium-v2", seed=1, eval_episodes=2)
    other_seed = ampl.evaluate(method, other_args, 4, 7)
    assert len(np.unique([one, next_evaluation, other_seed])) == 12
    args.async_envs = True
    assert np.array_equal(one, ampl.evaluate(method, args, 4, 7))
    ampl.vector_env("hopper-medium-v2", 2, True).close()
    ampl.vector_env.cache_clear()
