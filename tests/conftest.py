"""Puts the repository root on sys.path, keeps torch to one thread, lets Ctrl-C through."""

import functools
import importlib
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


@pytest.fixture(scope="module")
def short_episodes():
    """Of 15 steps in maze2d-umaze, in all scripts."""
    with pytest.MonkeyPatch.context() as patch:
        for script in map(importlib.import_module, ("ampl", "mopo", "combo")):
            new = functools.lru_cache(maxsize=1)(script.vector_env.__wrapped__)
            patch.setattr(script, "vector_env", new)  # its environments have these episodes
            patch.setitem(script.MAZE_LIMITS, "umaze", 15)
        yield
