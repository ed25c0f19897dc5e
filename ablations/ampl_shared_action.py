# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "d4rl==1.1", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "h5py==3.16.0",
#   "matplotlib==3.11.2", "mujoco==4.0.0", "numpy==2.4.6", "pillow==13.0.0", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# [tool.uv]  # d4rl is only a table of URLs here: what it asks for is never installed
# override-dependencies = [
#   "click; python_version < '0'", "dm-control; python_version < '0'",
#   "gym; python_version < '0'", "mjrl; python_version < '0'",
#   "mujoco-py; python_version < '0'", "pybullet; python_version < '0'",
#   "termcolor; python_version < '0'",
# ]
# ///
"""AMPL with the rollouts of the authors' code, which give a whole batch of states one action.

That is a mistake there: the code takes the policy's actions [B, A] apart as if they were a tuple,
so that the action at the first of up to 2048 states serves them all. In the paper every rollout
acts by itself, a ~ pi(s), and so it does in ampl.py. The paper's scores were presumably reached
with the mistake. It acts on D_model alone.

Run: `python ablations/ampl_shared_action.py --env-id pen-human-v1`
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl  # before torch: it sets how threads wait
import torch
from torch import Tensor


@dataclass
class Args(ampl.Args):
    """The flags of ampl.py."""


class SharedAction(ampl.AMPL):
    def rollout_action(self, obs: Tensor) -> Tensor:
        """The policy's action at the first of every 2048 states: [B, S] -> [B, A]."""
        actions = [self.actor(part) for part in obs.split(2048)]
        return torch.cat([action[:1].expand_as(action) for action in actions])


if __name__ == "__main__":
    ampl.main(Args, SharedAction)
