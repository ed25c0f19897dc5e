"""dm_control's walker-walk on raw MuJoCo, for the appendix of combo_pixels.py."""

import importlib.util
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np


# ===== walker-walk from images ====================================================================
# Two things of the machine's that it needs, and what is said where they are missing.
NO_WALKER = (
    "walker-walk needs the file walker.xml of dm_control, which is not installed: "
    "pip install --no-deps dm_control (none of its code is run)"
)
NO_OPENGL = (
    "without a screen set MUJOCO_GL=egl or MUJOCO_GL=osmesa, for which Debian has the packages "
    "libegl1 and libosmesa6"
)


class WalkerWalk(gymnasium.Env):
    """dm_control's walker-walk with LOMPO's images: 64 x 64, camera 0, action repeat 2.

    The planar walker is to run at 1 m/s or more with its torso up. Only the model is dm_control's,
    `walker.xml`, whose package does not run on this MuJoCo; start, steps and reward are written
    anew below. An action is six torques in [-1, 1] that are held for two control steps of 25 ms.
    An episode has 500 actions and nothing ends it before, so a return lies between 0 and 1000. A
    reset's seed decides the whole episode.

    An observation is the image [64, 64, 3], uint8. With from_states=True it is instead what
    dm_control gives [24], which needs no OpenGL: for each of the 7 bodies two numbers of its
    orientation, the height of the torso in m, and the 9 velocities of the joints.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    IMAGE_SIZE = 64  # pixels a side, of an observation
    VIDEO_SIZE = 256  # pixels a side, of what `render` gives
    ACTION_REPEAT = 2  # control steps of an action (LOMPO)
    PHYSICS_STEPS = 10  # of 2.5 ms each, in a control step
    EPISODE_STEPS = 500  # actions: dm_control's 25 s

    def __init__(self, render_mode: str | None = None, from_states: bool = False):
        self.render_mode = render_mode
        self.from_states = from_states
        self.model = load_walker()
        self.data = mujoco.MjData(self.model)
        self.renderers = {}  # by size, made when they are needed
        self.steps = 0  # actions of the episode so far
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self.model.nu,), np.float32)
        if from_states:
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (24,), np.float64)
        else:
            image_shape = (self.IMAGE_SIZE, self.IMAGE_SIZE, 3)
            self.observation_space = gymnasium.spaces.Box(0, 255, image_shape, np.uint8)

    # --- an episode ---

    def reset(self, *, seed=None, options=None):
        """Drop the walker at a random angle, with random joints, at the height of the model."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        for joint in range(self.model.njnt):
            place = self.model.jnt_qposadr[joint]
            if self.model.jnt_limited[joint]:
                low, high = self.model.jnt_range[joint]
                self.data.qpos[place] = self.np_random.uniform(low, high)
            elif self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE:
                self.data.qpos[place] = self.np_random.uniform(-np.pi, np.pi)
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        """Hold an action [6]. The reward is the sum of its control steps' rewards, at most 2."""
        self.data.ctrl[:] = np.clip(action, -1.0, 1.0)
        reward = 0.0
        for _ in range(self.ACTION_REPEAT):
            mujoco.mj_step(self.model, self.data, self.PHYSICS_STEPS)
            # mj_step leaves positions of bodies and sensors as they were before its last step.
            mujoco.mj_step1(self.model, self.data)
            reward += self.reward()
        self.steps += 1
        truncated = self.steps >= self.EPISODE_STEPS
        return self.observe(), reward, False, truncated, {}

    def reward(self) -> float:
        """dm_control's reward of a control step, in [0, 1]: for standing, and for speed with it."""
        torso = self.data.body("torso")
        height = torso.xpos[2]  # m
        upright = (1 + torso.xmat[8]) / 2  # 1 with the head up, 0 with the head down
        speed = self.data.sensor("torso_subtreelinvel").data[0]  # m/s, of the centre of mass
        # From 1.2 m on it stands; below, a Gaussian falls to 0.1 at half that height.
        shortfall = max(0.0, 1.2 - height) / 0.6
        standing = 0.1 ** (shortfall**2)
        stand_reward = (3 * standing + upright) / 4
        move_reward = np.clip(speed, 0.0, 1.0)
        return float(stand_reward * (5 * move_reward + 1) / 6)

    # --- what is seen ---

    def observe(self) -> np.ndarray:
        """The image [64, 64, 3] uint8, or the state [24]."""
        return self.state_observation() if self.from_states else self.image(self.IMAGE_SIZE)

    def state_observation(self) -> np.ndarray:
        """dm_control's observation [24] of the present state."""
        turns = self.data.xmat[1:]  # [7, 9]: the rotation matrix of each body but the world, by row
        orientations = turns[:, [0, 2]].ravel()
        height = self.data.body("torso").xpos[2]
        return np.concatenate([orientations, [height], self.data.qvel])

    def image(self, size: int) -> np.ndarray:
        """What camera 0 sees, [size, size, 3] uint8. Raises SystemExit where OpenGL is missing."""
        try:
            if size not in self.renderers:
                self.renderers[size] = mujoco.Renderer(self.model, size, size)
            renderer = self.renderers[size]
            renderer.update_scene(self.data, camera=0)
            return renderer.render()
        except Exception as error:  # every OpenGL backend fails in its own way
            reason = " ".join(str(error).split())[:200]
            sys.exit(f"cannot render ({reason}): {NO_OPENGL}")

    def render(self) -> np.ndarray:
        """A frame of a video, [256, 256, 3] uint8."""
        return self.image(self.VIDEO_SIZE)

    def show(self, qpos: np.ndarray) -> None:
        """Place the joints at positions [9] that were stored, so that they can be rendered."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        mujoco.mj_forward(self.model, self.data)

    def close(self) -> None:
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}


def load_walker() -> mujoco.MjModel:
    """The model of dm_control's installed files. Raises SystemExit where there are none.

    The package is found and not imported, because it fails on this version of MuJoCo.
    """
    package = importlib.util.find_spec("dm_control")
    if package is None or package.origin is None:
        sys.exit(NO_WALKER)
    path = Path(package.origin).parent / "suite" / "walker.xml"
    try:
        model = mujoco.MjModel.from_xml_path(str(path))
    except ValueError as error:  # also where there is no such file
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"cannot read {path} ({reason}); {NO_WALKER}")
    # dm_control's shadow map is 2048 x 2048. With this one a core renders 77 images of 64 pixels a
    # second instead of 47, which differ by 0.03 of 255 levels on average.
    model.vis.quality.shadowsize = 512
    return model
