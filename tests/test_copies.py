"""The three files stay alike where they are alike, sizes stay small, README stays true."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import ampl
import combo
import mopo

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"ampl.py": ampl, "mopo.py": mopo, "combo.py": combo}
TEXTS = {name: (ROOT / name).read_text() for name in SCRIPTS}
README = (ROOT / "README.md").read_text()
BANNER = "# ===== Appendix, the same in ampl.py, mopo.py and combo.py"


def appendix(text: str) -> str:
    assert text.count(BANNER) == 1
    return text[text.index(BANNER) :]


def test_the_appendix_is_the_same():
    """A fix made in one file and not in the other two."""
    one, two, three = map(appendix, TEXTS.values())
    assert one == two == three


LINES = {  # what a reader is asked to read
    "ampl.py": 1450, "mopo.py": 1300, "combo.py": 1450,
    "collect.py": 900, "sweep.py": 300, "README.md": 250}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_files_stay_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= LINES[name]


def test_the_method_comes_first():
    assert TEXTS["ampl.py"].split(BANNER)[0].count("\n") <= 950


def test_functions_stay_short():
    """45 lines, `train` 80: what fits on a screen."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "ablations").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= (80 if node.name == "train" else 45), f"{path.name}: {node.name}"


def test_every_equation_of_the_method_has_a_line():
    """And none has a number that the paper has not."""
    numbers = set()
    for tag in re.findall(r"# Eq\. ([()\d, -]+)", TEXTS["ampl.py"]):
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", tag):
            numbers |= set(range(int(first), int(last or first) + 1))
    assert {4, 6, 10, 11, 12, 13, 14, 15, 16, 17} <= numbers <= set(range(1, 18))


COMMANDS = re.findall(r"python (\w+\.py) ([^\n`#&|]*)", README)


@pytest.mark.parametrize(
    "script, flags", sorted({(s, f) for s, f in COMMANDS if s in SCRIPTS and "<" not in f})
)
def test_readme_commands_parse(script, flags):
    argv = shlex.split(flags)
    if "--help" not in argv:
        SCRIPTS[script].parse_args(argv=argv)


def test_readme_has_commands_and_its_links_lead_somewhere():
    assert len(COMMANDS) >= 5
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_requirements_are_what_the_files_import():
    """The header that uv reads and requirements.txt name the same versions."""
    wanted = set(re.findall(r'"([\w-]+(?:==[\d.]+)?)"', TEXTS["ampl.py"].split("# ///")[1]))
    listed = {
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] != "#"
    }
    assert wanted and wanted <= listed
