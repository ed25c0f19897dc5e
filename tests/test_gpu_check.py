"""The logic of gpu_check.py, which nobody here can run on what it is for."""

import gpu_check
import pytest
import steps
import torch
from test_graphs import graphs  # noqa: F401 (a fixture)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    """One sentence and exit code 2; and a part's failure is kept, not raised."""
    assert gpu_check.main(gpu_check.Options(output=str(tmp_path / "report"))) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
    part = gpu_check.run_part("machine")
    assert not part["ok"] and "CUDA" in part["error"]


def test_a_part_that_hangs_is_cut_off(monkeypatch):
    monkeypatch.setitem(gpu_check.PARTS, "machine", (None, 0.05))
    assert gpu_check.run_part("machine")["error"] == "more than 0.05 seconds"


def test_the_report_as_a_table():
    """A failed part stays in it; what was timed gets a table of its own."""
    step = dict(script="ampl.py", phase="iteration", seeds=5, graphs=True, tf32=False, ms=1.2)
    speed = dict(ok=True, seconds=3, result=[step | dict(peak_gib=0.5)])
    text = gpu_check.table({"speed ampl": speed, "tests": dict(ok=False, seconds=9, error="a|b")})
    lines = [line.replace(" ", "") for line in text.splitlines()]
    assert "|tests|False|9|a/b|" in lines and "|ampl.py|iteration|5|True|False|1.2|0.5|" in lines


def test_the_limits_keep_to_nine_minutes():
    assert sum(limit for _, limit in gpu_check.PARTS.values()) <= 540


@pytest.mark.parametrize("script", [*gpu_check.SCRIPTS, "collect"])
def test_replay_compares_recorded_with_plain_steps(script, graphs, monkeypatch):  # noqa: F811
    """Under the emulation they are equal; a planted difference is found."""
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    assert set(gpu_check.replay(script, quick=True).values()) == {0.0}
    assert len(graphs) == 1 and graphs[0].replays == 37
    monkeypatch.setattr(steps, "difference", lambda *states: 0.1)
    with pytest.raises(AssertionError):
        gpu_check.replay(script, quick=True)
