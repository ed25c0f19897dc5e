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

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampl


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
