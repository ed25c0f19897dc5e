"""The short form of fuzz.py."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")


def test_odd_values_and_damaged_files():
    """No traceback, nothing senseless taken, nothing sound refused."""
    command = [sys.executable, str(FUZZ), "--cases", "40", "--files", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
