"""Copies stay alike, README stays true."""

import re
import shlex

import pytest
import sync

import ampl
import combo
import mopo

METHODS = {"ampl.py": ampl, "mopo.py": mopo, "combo.py": combo}
README = (sync.ROOT / "README.md").read_text()


def test_same_name_means_same_text():
    assert sync.differing_copies({p.name: p.read_text() for p in sync.scripts()}) == []


def test_a_planted_drift_is_found():
    source = (sync.ROOT / "ampl.py").read_text()
    drifted = source.replace("return reward + gamma", "return reward + 0.9 * gamma")
    assert drifted != source
    found = sync.differing_copies({"a.py": source, "b.py": drifted})
    assert found == ["conservative_target: a.py | b.py"]


def test_sync_carries_a_change_into_a_sibling():
    """A fix in the base reaches a copy that has its own new lines; a clash is a conflict."""
    base = "".join(f"line {i}\n" for i in range(40))
    sibling = base.replace("line 5\n", "line 5, its own idea\n")
    fixed = base.replace("line 30\n", "line 30, mended\n")
    merged, conflict = sync.merge(base, fixed, sibling)
    assert merged == fixed.replace("line 5\n", "line 5, its own idea\n") and not conflict
    clash = base.replace("line 5\n", "line 5, mended\n")
    assert sync.merge(base, clash, sibling)[1]


def test_readme_tables_are_current():
    assert sync.readme_with_tables(README) == README, "run python tests/sync.py"


def test_every_equation_of_the_method_has_a_line():
    table = sync.equation_table((sync.ROOT / "ampl.py").read_text(), "ampl.py")
    numbers = {int(n) for n in re.findall(r"^\| \((\d+)\)", table, flags=re.MULTILINE)}
    assert {4, 6, 10, 11, 12, 13, 14, 15, 16, 17} <= numbers <= set(range(1, 18))


COMMANDS = re.findall(r"(?:python|uv run) (\w+\.py) ([^\n`#&|]*)", README)


@pytest.mark.parametrize(
    "script, flags", sorted({(s, f) for s, f in COMMANDS if s in METHODS and "<" not in f})
)
def test_readme_commands_parse(script, flags):
    argv = shlex.split(flags)
    if "--help" not in argv:
        METHODS[script].check_args(METHODS[script].parse_args(argv))


def test_readme_has_commands():
    assert len(COMMANDS) >= 5


def test_sync_carries_a_change_into_one_definition():
    """A sibling with other code around gets the change; a definition that it lacks stays away."""
    base = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    sibling = "X = 5\n\n\ndef g():\n    return 2\n\n\ndef h():\n    return 3\n"
    fixed = base.replace("return 2", "return 20").replace("return 1", "return 10")
    merged, conflict = sync.merge_definitions(base, fixed, sibling)
    assert merged == sibling.replace("return 2", "return 20") and not conflict
    assert sync.merge_definitions(base, fixed, sibling.replace("return 2", "return -2"))[1]


def test_readme_counts_the_lines_of_every_ablation():
    """ "[6 new, 198 gone]" in README's table is what the ledger holds."""
    for name, text in sync.ledgers().items():
        signs = [line[:2] for line in text.splitlines()]
        counts = f"[{signs.count('+ ')} new, {signs.count('- ')} gone](tests/lineage/{name})"
        assert counts in README, counts
