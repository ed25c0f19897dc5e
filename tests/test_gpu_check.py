"""The logic of gpu_check.py, without the GPU that it is for."""

import gpu_check
import pytest
import steps
import torch
from test_graphs import graphs  # noqa: F401 (a fixture)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    """One sentence, exit code 2, and no report."""
    assert gpu_check.main(gpu_check.Options(output=str(tmp_path / "report"))) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_failure_is_kept_and_not_raised(monkeypatch):
    """Without a limit, because on a busy machine Python alone may take long to start."""
    without_limit = gpu_check.PARTS["machine"]._replace(limit=None)
    monkeypatch.setitem(gpu_check.PARTS, "machine", without_limit)
    part = gpu_check.run_part("machine")
    assert not part["ok"]
    assert "CUDA" in part["error"]


def test_a_part_that_hangs_is_cut_off(monkeypatch):
    """Python needs longer than this limit to start, however idle the machine."""
    hanging = gpu_check.PARTS["machine"]._replace(limit=0.01)
    monkeypatch.setitem(gpu_check.PARTS, "machine", hanging)
    part = gpu_check.run_part("machine")
    assert not part["ok"]
    assert part["error"] == "more than 0.01 seconds"


def test_the_report_as_a_table():
    """A failed part stays in it. What was timed gets a table of its own."""
    phase = {"script": "ampl.py", "phase": "iteration", "ms": 1.2, "graphs": True, "tf32": False}
    report = {
        "speed ampl": {"ok": True, "seconds": 3, "result": [phase]},
        "tests": {"ok": False, "seconds": 9, "error": "a|b"},
    }
    lines = [line.replace(" ", "") for line in gpu_check.table(report).splitlines()]
    assert "|speedampl|True|3|below|" in lines
    assert "|tests|False|9|a/b|" in lines
    assert "|ampl.py|iteration|1.2|True|False|" in lines


def test_the_limits_keep_to_nine_minutes():
    assert sum(part.limit for part in gpu_check.PARTS.values()) <= 540


@pytest.mark.parametrize("script", [*gpu_check.SCRIPTS, "collect"])
def test_replay_compares_recorded_with_plain_steps(script, graphs, monkeypatch):  # noqa: F811
    """Under the emulation they are equal. A planted difference is found."""
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    assert gpu_check.replay(script, quick=True) == {"after 20": 0.0, "after 40": 0.0}
    num_graphs = 2 if script == "ampl" else 1  # with and without a step of the policy
    assert len(graphs) == num_graphs
    assert sum(graph.replays for graph in graphs) == 40 - 3 * num_graphs  # three calls are plain
    monkeypatch.setattr(steps, "difference", lambda *states: 0.1)
    with pytest.raises(AssertionError):
        gpu_check.replay(script, quick=True)
