"""collect.py's walker-walk, and the environment itself: against dm_control's formulae, the rows of
the episodes, their images, files in V-D4RL's format, --resume.

What needs dm_control's files or OpenGL is skipped without them; the rest draws with numpy.
"""

import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest

import collect
import combo_pixels
import mopo
from combo_pixels import WalkerWalk

NO_FILES = importlib.util.find_spec("dm_control") is None
needs_files = pytest.mark.skipif(NO_FILES, reason="needs pip install --no-deps dm_control")

TINY = {
    "env_id": "walker-walk",
    "episodes": 4,
    "sac_steps": 1000,
    "random_steps": 500,
    "eval_every": 500,
    "eval_episodes": 1,
    "medium_return": 0.0,  # which the first evaluation reaches
    "hidden": (8, 8),
    "batch_size": 16,
    "seed": 1,
    "cuda": False,
}


@pytest.fixture
def opengl():
    """Skips the test where nothing can be rendered, and says why."""
    try:
        env = WalkerWalk()
        env.reset(seed=0)
        env.close()
    except SystemExit as stop:
        pytest.skip(str(stop))


class NumpyCamera:
    """In place of WalkerWalk where images are rendered: an image that the position decides."""

    IMAGE_SIZE = 64
    shown = 0

    def show(self, qpos: np.ndarray) -> None:
        NumpyCamera.shown += 1
        self.qpos = qpos

    def image(self, size: int) -> np.ndarray:
        return drawn(self.qpos, size)

    def close(self) -> None:
        pass


def drawn(qpos: np.ndarray, size: int = 64) -> np.ndarray:
    """An image without OpenGL, [size, size, 3], of which no two positions have the same."""
    digest = hashlib.sha256(np.asarray(qpos, np.float64).tobytes()).digest()
    return np.full((size, size, 3), list(digest[:3]), np.uint8)


@pytest.fixture
def no_opengl(monkeypatch):
    """WalkerWalk's images are drawn without OpenGL."""
    monkeypatch.setattr(WalkerWalk, "image", lambda env, size: drawn(env.data.qpos, size))


def make(folder: Path, **settings) -> Path:
    return collect.collect(collect.Args(output=str(folder), **{**TINY, **settings}))


def read(folder: Path) -> list[dict[str, np.ndarray]]:
    """The episodes of a folder, in the order of their names."""
    episodes = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file, allow_pickle=False) as stored:
            episodes.append(dict(stored))
    return episodes


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- the environment ---
@pytest.fixture
def walker():
    return WalkerWalk(from_states=True)


@needs_files
def test_rewards_are_those_of_dm_control(walker):
    """By its own `tolerance`, which is loaded as a file, at states of random actions and others."""
    package = Path(importlib.util.find_spec("dm_control").origin).parent
    spec = importlib.util.spec_from_file_location("rewards", package / "utils" / "rewards.py")
    rewards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rewards)
    rng = np.random.default_rng(0)
    seen = []
    for number in range(300):
        walker.reset(seed=number)
        walker.data.qpos[0] = rng.uniform(-1.3, 0.3)  # the height, from lying to jumping
        walker.data.qpos[2] = rng.uniform(-0.3, 0.3)
        walker.data.qvel[1] = rng.uniform(-1, 2)  # the speed
        mujoco.mj_forward(walker.model, walker.data)
        height = walker.data.body("torso").xpos[2]
        upright = (1 + walker.data.body("torso").xmat[8]) / 2
        speed = walker.data.sensor("torso_subtreelinvel").data[0]
        standing = rewards.tolerance(height, bounds=(1.2, float("inf")), margin=0.6)
        moving = rewards.tolerance(
            speed, bounds=(1, float("inf")), margin=0.5, value_at_margin=0.5, sigmoid="linear"
        )
        expected = (3 * standing + upright) / 4 * (5 * moving + 1) / 6
        assert walker.reward() == pytest.approx(expected, abs=1e-12)
        seen.append(expected)
    assert min(seen) < 0.1 and max(seen) > 0.95


@needs_files
def test_a_reward_worked_by_hand(walker):
    """Upright at the model's height of 1.3 m, at rest: (3 + 1) / 4 * (0 + 1) / 6."""
    walker.show(np.zeros(9))
    assert walker.data.body("torso").xpos[2] == pytest.approx(1.3)
    assert walker.reward() == pytest.approx(1 / 6)
    walker.data.qpos[0] = -0.7  # 0.6 m: half of 1.2, where a Gaussian is at 0.1
    walker.data.qvel[1] = 0.5
    mujoco.mj_forward(walker.model, walker.data)
    assert walker.reward() == pytest.approx((3 * 0.1 + 1) / 4 * (5 * 0.5 + 1) / 6)


@needs_files
def test_a_state_has_orientations_height_and_velocities(walker):
    walker.reset(seed=0)
    state = walker.state_observation()
    assert state.shape == walker.observation_space.shape == (24,)
    angle = walker.data.qpos[2]
    assert state[:2] == pytest.approx([np.cos(angle), np.sin(angle)])  # of the torso, the first
    assert state[14] == walker.data.body("torso").xpos[2]
    assert np.array_equal(state[15:], walker.data.qvel)


@needs_files
def test_starts_are_those_of_dm_control(walker):
    """The place is the model's. The angle and all joints are uniform, each in its range."""
    starts = []
    for seed in range(400):
        walker.reset(seed=seed)
        starts.append(walker.data.qpos.copy())
        assert not walker.data.qvel.any()
    starts = np.array(starts)
    assert not starts[:, :2].any()
    hip = [-20, 100]
    knee = [-150, 0]
    ankle = [-45, 45]
    ranges = np.radians([[-180, 180], hip, knee, ankle, hip, knee, ankle])
    for joint, (low, high) in enumerate(ranges, start=2):
        quarters, _ = np.histogram(starts[:, joint], bins=4, range=(low, high))
        assert quarters.sum() == 400
        assert quarters / 400 == pytest.approx(0.25, abs=0.09)  # four standard errors
    names = [walker.model.joint(joint).name for joint in range(9)]
    assert names[:4] == ["rootz", "rootx", "rooty", "right_hip"]


@needs_files
def test_an_episode_has_500_actions_and_is_decided_by_its_seed(walker):
    def play(seed: int) -> np.ndarray:
        rng = np.random.default_rng(0)
        walker.reset(seed=seed)
        rows = []
        for step in range(500):
            obs, reward, terminated, truncated, _ = walker.step(rng.uniform(-1, 1, 6))
            assert not terminated
            assert truncated == (step == 499)
            assert 0 <= reward <= 2
            rows.append([*obs, reward])
        return np.array(rows)

    first = play(3)
    assert np.array_equal(play(3), first)
    assert not np.array_equal(play(4), first)
    assert walker.data.time == pytest.approx(25)  # seconds


@needs_files
def test_an_action_is_held_for_two_control_steps_of_25_ms(walker):
    """And is clipped to [-1, 1]."""
    walker.reset(seed=0)
    walker.step(np.full(6, 7.0))
    assert walker.data.time == pytest.approx(0.05)
    assert np.array_equal(walker.data.ctrl, np.ones(6))


@needs_files
def test_derived_quantities_are_those_of_the_present_positions(walker):
    """mj_step alone would leave the reward a step of the physics behind."""
    walker.reset(seed=0)
    walker.step(np.ones(6))
    state = walker.state_observation()
    mujoco.mj_kinematics(walker.model, walker.data)
    assert np.array_equal(walker.state_observation(), state)


@needs_files
def test_images(opengl):
    env = WalkerWalk(render_mode="rgb_array")
    first, _ = env.reset(seed=0)
    assert env.observation_space.contains(first)
    position = env.data.qpos.copy()
    later, *_ = env.step(np.ones(6))
    assert not np.array_equal(first, later)
    assert env.render().shape == (256, 256, 3)
    env.show(position)
    assert np.array_equal(env.image(64), first)
    other = WalkerWalk()
    again, _ = other.reset(seed=0)
    assert np.array_equal(again, first)


@needs_files
def test_no_opengl_is_a_sentence_and_only_where_it_is_needed(monkeypatch):
    def broken(*sizes):
        raise mujoco.FatalError("no OpenGL platform\nlibrary")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    WalkerWalk(from_states=True).reset(seed=0)
    env = WalkerWalk()
    with pytest.raises(SystemExit, match="cannot render .no OpenGL platform library.: .*libegl1"):
        env.reset(seed=0)
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit, match="cannot render .there is no screen.: .*MUJOCO_GL=egl"):
        env.reset(seed=0)


def test_no_dm_control_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps dm_control"):
        WalkerWalk()
    spec = importlib.util.spec_from_file_location("dm_control", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SystemExit, match="walker.xml.*pip install --no-deps dm_control") as stop:
        WalkerWalk()
    assert "\n" not in str(stop.value)


# --- an episode in V-D4RL's layout ---
def episode_of(seed: int, length: int = 500) -> dict[str, np.ndarray]:
    """What collect.py keeps of an episode, with random numbers."""
    rng = np.random.default_rng(seed)
    positions = rng.standard_normal((length + 1, 9))
    return {
        "actions": rng.uniform(-1, 1, (length, 6)).astype(np.float32),
        "rewards": rng.random(length).astype(np.float32),
        "infos/qpos": positions[:-1],
        "infos/next_qpos": positions[1:],
    }


def test_a_row_has_the_action_that_led_to_its_image():
    kept = episode_of(0)
    episode = collect.with_images(kept, NumpyCamera())
    kinds = {name: (array.shape, array.dtype) for name, array in episode.items()}
    assert kinds == {
        "image": ((501, 64, 64, 3), np.uint8),
        "action": ((501, 6), np.float32),
        "reward": ((501,), np.float32),
        "discount": ((501,), np.float32),
        "is_first": ((501,), np.bool_),
        "is_last": ((501,), np.bool_),
        "is_terminal": ((501,), np.bool_),
    }
    assert np.array_equal(episode["image"][0], drawn(kept["infos/qpos"][0]))
    for row in (0, 1, 250, 499):
        assert np.array_equal(episode["action"][row + 1], kept["actions"][row])
        assert episode["reward"][row + 1] == kept["rewards"][row]
        assert np.array_equal(episode["image"][row + 1], drawn(kept["infos/next_qpos"][row]))
    assert not episode["action"][0].any()
    assert episode["reward"][0] == 0
    assert np.flatnonzero(episode["is_first"]).tolist() == [0]
    assert np.flatnonzero(episode["is_last"]).tolist() == [500]
    assert not episode["is_terminal"].any()
    assert (episode["discount"] == 1).all()


@pytest.mark.parametrize("count, expected", [(3, [0, 2, 4]), (1, [0]), (5, [0, 1, 2, 3, 4])])
def test_episodes_are_spread_over_the_whole_run(count, expected):
    """Of 2750 rows the last 250 are no whole episode."""
    columns = {"rewards": np.arange(2750), "actions": np.zeros((2750, 6))}
    chosen = collect.spread_episodes(columns, count)
    assert (chosen["rewards"][::500] // 500).tolist() == expected
    assert np.array_equal(np.diff(chosen["rewards"][:500]), np.ones(499))
    assert chosen["actions"].shape == (500 * count, 6)


def test_no_episode_is_taken_twice():
    columns = {"rewards": np.arange(1000)}
    assert np.array_equal(collect.spread_episodes(columns, 7)["rewards"], np.arange(1000))


# --- datasets ---
PARTS = {
    "random": ["random"] * 2,
    "mixed": ["SAC"],  # the first evaluation ends it after an episode
    "medium": ["medium"] * 2,
    "medium_expert": ["medium"] + ["expert"],
    "expert": ["expert"] * 2,
}


@needs_files
@pytest.mark.parametrize("level", PARTS)
def test_episodes_are_what_the_environment_did(level, tmp_path, monkeypatch, no_opengl, walker):
    """Take the stored actions once more, from the seeds of the episodes, and compare."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    folder = collect.collect(collect.Args(level=level, **{**TINY, "episodes": 2}))
    assert folder == tmp_path / "vd4rl" / "main" / "walker_walk" / level / "64px"
    episodes = read(folder)
    numbers = {}  # of the episodes so far, by policy
    assert len(episodes) == len(PARTS[level])
    for policy, episode in zip(PARTS[level], episodes):
        number = numbers.get(policy, 0)
        numbers[policy] = number + 1
        digest = hashlib.sha256(f"1 {policy} episode {number}".encode()).digest()
        walker.reset(seed=int.from_bytes(digest[:4], "little"))
        assert np.array_equal(episode["image"][0], drawn(walker.data.qpos))
        for row in range(1, 501):
            _, reward, *_ = walker.step(episode["action"][row])
            assert episode["reward"][row] == np.float32(reward)
            assert np.array_equal(episode["image"][row], drawn(walker.data.qpos))
    returns = [episode["reward"].sum(dtype=np.float64) for episode in episodes]
    attributes = json.loads((folder / "collection.json").read_text())
    assert attributes["mean_return"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert attributes["level"] == level
    note = (folder / "note.txt").read_text()
    assert note == attributes["note"]
    assert "neither V-D4RL's data nor COMBO's" in note
    assert f"{len(episodes)} whole episodes" in note


@needs_files
def test_images_are_those_that_an_agent_would_have_seen(opengl, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "WALKER_STEPS", 30)
    folder = make(tmp_path / "x", level="random", episodes=1)
    (episode,) = read(folder)
    env = WalkerWalk()
    digest = hashlib.sha256(b"1 random episode 0").digest()
    image, _ = env.reset(seed=int.from_bytes(digest[:4], "little"))
    assert np.array_equal(episode["image"][0], image)
    for row in range(1, 31):
        image, *_ = env.step(episode["action"][row])
        assert np.array_equal(episode["image"][row], image)


@needs_files
def test_combo_pixels_takes_the_folder(tmp_path, no_opengl):
    folder = make(tmp_path / "x", level="random", episodes=2)
    data, _ = combo_pixels.read_folder(folder, 6)
    episodes = read(folder)
    for key in ("image", "action", "reward"):
        assert np.array_equal(data[key], np.stack([episode[key] for episode in episodes]))


@needs_files
def test_episodes_of_sac_that_come_too_late_are_left_out(tmp_path, monkeypatch, no_opengl):
    """mixed has 2 of the 3 that SAC saw until the return was reached: the first and the last."""
    returns = iter([1.0, 2.0, 3.0])
    settings = {"level": "mixed", "episodes": 2, "sac_steps": 1500, "medium_return": 3.0}

    def evaluate(sac, args, episodes, steps):
        return np.array([next(returns)])

    monkeypatch.setattr(mopo, "evaluate", evaluate)
    folder = make(tmp_path / "x", **settings)
    assert len(read(folder)) == 2
    attributes = json.loads((folder / "collection.json").read_text())
    assert attributes["medium_policy_steps"] == 1500
    names = sorted(file.name for file in folder.glob("*.npz"))
    assert names == ["episode-00000-501.npz", "episode-00001-501.npz"]


# --- stopped collections, old folders ---
def stopping_after(calls: int, function):
    """The function, which Ctrl-C stops at the end of its call number `calls`."""
    done = []

    def stopped(*arguments):
        result = function(*arguments)
        done.append(result)
        if len(done) == calls:
            raise KeyboardInterrupt
        return result

    return stopped


@needs_files
def test_resume_goes_on_with_the_next_image(tmp_path, monkeypatch, no_opengl):
    """Stopped while SAC learns, then while it renders the third episode, then not at all."""
    whole = contents(make(tmp_path / "whole", level="medium_expert"))
    settings = {"level": "medium_expert", "save_every": 500}
    path = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(collect.SACCollection, "save", stopping_after(1, collect.SACCollection.save))
        with pytest.raises(KeyboardInterrupt):
            make(path, **settings)
    assert [file.name for file in tmp_path.glob("x*")] == ["x.partial.pt"]
    with pytest.raises(SystemExit, match="x.partial.pt is a stopped run"):
        make(path, **settings)
    with pytest.raises(SystemExit, match="settings of the stopped run: level was medium_expert"):
        make(path, level="medium", save_every=500, resume=True)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "with_images", stopping_after(3, collect.with_images))
        with pytest.raises(KeyboardInterrupt):
            make(path, **settings, resume=True)
    assert not path.exists()
    part = tmp_path / "x.part"
    assert len(list(part.glob("*.npz"))) == 2
    (part / "episode-00002-501.npz.77.part").write_bytes(b"half a file")

    with monkeypatch.context() as patch:  # the other two are all that is left to render
        patch.setattr(collect, "with_images", stopping_after(3, collect.with_images))
        make(path, **settings, resume=True)
    assert contents(path) == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["whole", "x"]


@needs_files
def test_overwrite_replaces_the_folder_at_the_end(tmp_path, monkeypatch, no_opengl):
    path = tmp_path / "x"
    path.mkdir()
    (path / "old-501.npz").write_bytes(b"old")
    with pytest.raises(SystemExit, match="x exists: add --overwrite to replace it"):
        make(path, level="random", episodes=1)

    def interrupted(episode, camera):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collect, "with_images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(path, level="random", episodes=1, overwrite=True)
    assert contents(path) == {"old-501.npz": b"old"}
    (tmp_path / "x.part" / "episode-00000-501.npz").write_bytes(b"of another seed")
    make(path, level="random", episodes=1, overwrite=True)
    assert len(read(path)) == 1
    assert not (tmp_path / "x.part").exists()
    (path / "thesis.tex").write_bytes(b"precious")
    with pytest.raises(SystemExit, match="x has thesis.tex, which is no episode"):
        make(path, level="random", episodes=1, overwrite=True)
    assert (path / "thesis.tex").read_bytes() == b"precious"


def test_episodes_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Without dm_control too: its camera is replaced."""
    monkeypatch.setattr(combo_pixels, "WalkerWalk", NumpyCamera)
    columns = {}
    for name, column in episode_of(0).items():
        columns[name] = np.concatenate([column, episode_of(1)[name]])
    path = tmp_path / "x"
    monkeypatch.setattr(NumpyCamera, "shown", 0)
    collect.write_episodes(path, columns, {"note": "what it is", "seed": 1})
    assert NumpyCamera.shown == 2 * 501
    assert sorted(contents(path)) == [
        "collection.json",
        "episode-00000-501.npz",
        "episode-00001-501.npz",
        "note.txt",
    ]
    for seed, episode in enumerate(read(path)):
        assert np.array_equal(episode["reward"][1:], episode_of(seed)["rewards"])


# --- the command line ---
MISTAKES = [
    ("--level expret", "expret"),
    ("--episodes 0", "--episodes is 0, but must be at least 1"),
    ("--level medium_expert --episodes 3", "--episodes is 3, but both policies make half of them"),
    ("--sac-steps 5000", "--sac-steps must exceed --random-steps 5000"),
    ("--output {0}/there", "there is a file: --output takes the name of a folder"),
    ("--output {0}/there/x", "cannot write .*there/x"),
    ("--output {0}", "{0} has there, which is no episode: take another --output"),
    ("--resume", "nothing to resume: there is no .*64px.partial.pt"),
]


@pytest.mark.parametrize("flags, sentence", MISTAKES)
def test_a_mistake_is_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    (tmp_path / "there").write_bytes(b"precious")
    command = "collect.py --env-id walker-walk --no-cuda " + flags.format(tmp_path)
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stop:
        collect.main()
    said = str(stop.value) if stop.value.code != 2 else capsys.readouterr().err
    assert re.search(sentence.format(tmp_path), said), said
    assert (tmp_path / "there").read_bytes() == b"precious"


def test_what_cannot_render_does_not_collect(tmp_path, monkeypatch):
    """It would be known only after hours of SAC."""

    class Blind(NumpyCamera):
        def reset(self, seed):
            sys.exit("cannot render")

    monkeypatch.setattr(combo_pixels, "WalkerWalk", Blind)
    with pytest.raises(SystemExit, match="cannot render"):
        make(tmp_path / "x", level="random")
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_levels_of_both_papers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["collect.py", "--help"])
    with pytest.raises(SystemExit):
        collect.main()
    text = capsys.readouterr().out
    for level in (*collect.LEVELS, "medium-replay", "medium-expert"):
        assert level in text
