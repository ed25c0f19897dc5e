"""The scripts stay alike where they do the same, and plain; README stays true."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import ampl
import combo
import mopo

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"ampl.py": ampl, "mopo.py": mopo, "combo.py": combo}
README = (ROOT / "README.md").read_text()
BANNER = "# ===== Appendix, the same in ampl.py, mopo.py and combo.py"
TASKS_BANNER = "# ===== Appendix: the generalisation tasks of MOPO and COMBO"
PYTHON_FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("ablations/*.py"), *ROOT.glob("tests/*.py")])
MARKDOWN_NAMES = ["README.md", "ablations/README.md", "tests/README.md"]
MARKDOWN_FILES = [ROOT / name for name in MARKDOWN_NAMES]


def text_of(script: str) -> str:
    return (ROOT / script).read_text()


def part(text: str, start: str, end: str | None = None) -> str:
    """The text from the only line that begins with `start`, up to `end` if that is given."""
    assert text.count(start) == 1, start
    rest = text[text.index(start) :]
    return rest if end is None else rest[: rest.index(end)]


# ----- the same text -----
@pytest.mark.parametrize("script", ["mopo.py", "combo.py"])
def test_the_appendix_is_the_same(script):
    """A fix made in one script and not in the others. Only the class's name differs, once."""
    own_class = script.removesuffix(".py").upper()
    other = part(text_of(script), BANNER)
    other = other.replace(f"method: type = {own_class}", "method: type = AMPL")
    assert other == part(text_of("ampl.py"), BANNER)


def test_the_generalisation_tasks_are_the_same():
    one = part(text_of("mopo.py"), TASKS_BANNER, BANNER)
    two = part(text_of("combo.py"), TASKS_BANNER, BANNER)
    assert one == two


# Functions and methods that do the same thing in two scripts, and so have the same text.
SAME = {
    ("ampl.py", "mopo.py"): [
        "Range",
        "ModelEnsemble.inputs_and_targets",
        "polyak",
        "TwinCritic.forward",
        "build",
        "remember",
        "split",
        "choose_elites",
    ],
    ("mopo.py", "combo.py"): [
        "Range",
        "mlp",
        "squashed_sample",
        "TwinCritic",
        "EnsembleLinear",
        "ModelEnsemble",
        "critic_loss",
        "policy_loss",
        "temperature_loss",
        "model_loss",
        "polyak",
        "build",
        "adam",
        "split",
        "sample_data",
        "remember",
        "imagine",
        "end_outside_data",
        "rollout_action",
        "fit_model",
        "split_rows",
        "shuffle",
        "model_step",
        "fit_loss",
        "holdout_error",
        "choose_elites",
        "act",
    ],
    ("combo.py", "combo_pixels.py"): [
        "Range",
        "TwinCritic",
        "expectation",
        "bellman_target",
        "critic_loss",
        "polyak",
        "build",
        "adam",
        "split",
        "sample_data",
        "sample_mixed",
        "remember",
        "rows_of_rho",
        "q_of_actions",
        "real_rows",
        "parse_args",
        "expand_home",
        "expanded",
        "check_ranges",
        "as_tuples",
        "from_json",
        "lasting_settings",
        "can_print",
        "check_value",
        "check_number",
        "check_fields",
        "hide_unused_flags",
        "say_how_to_go_on",
        "refuse_new_flags",
        "measure_of",
        "choose_device",
        "choose_cpu_products",
        "capture",
        "RecordedStep",
        "reseed",
        "enough_memory",
        "vector_env",
        "evaluate",
        "in_eval_mode",
        "episode_seed",
        "report",
        "Bar",
        "Run.new_folder",
        "Run.save_origin",
        "Run.start_wandb",
        "Run.open_events",
        "Run.keep_lock",
        "Run.is_due",
        "Run.event_sizes",
        "Run.cut_events",
        "Run.progress",
        "Run.end_phase",
        "Run.advance",
        "Run.add_to_curve",
        "Run.save_checkpoint",
        "Run.origin",
        "Run.write_checkpoint",
        "Run.load_checkpoint",
        "Run.note_differences",
        "Run.plot_curves",
        "Run.finish",
        "name_of",
        "source_files",
        "versions",
        "ignore_os_errors",
        "git_commit",
        "random_generator",
        "optimizers_of",
        "parameters_of",
        "acting_buffers",
        "hides_networks",
        "check_optimizers",
        "note_idle_parameters",
        "lock_folder",
        "release_locks",
        "forget_locks",
        "unlocking",
        "refuse_another_model",
        "check_model",
        "check_sum",
        "writing",
        "replacing",
        "save",
        "loading",
        "folder_of_run",
        "load_args",
        "load_optimizer",
        "put_back",
        "go_on",
        "refuse_another_class",
        "load_policy",
        "try_env",
        "working",
        "SameShapes",
    ],
}


def source_of(script: str, name: str) -> str:
    """The code of a function, class or method, without comments and docstrings."""
    *classes, last = name.split(".")
    for node in ast.walk(ast.parse(text_of(script))):
        if (
            isinstance(node, (ast.ClassDef, ast.FunctionDef))
            and node.name == (classes or [last])[0]
        ):
            if classes:
                (node,) = [child for child in node.body if getattr(child, "name", "") == last]
            for inner in ast.walk(node):
                body = getattr(inner, "body", None)
                if isinstance(body, list) and begins_with_docstring(body):
                    inner.body = body[1:]
            return ast.unparse(node)
    raise LookupError(f"{script} has no {name}")


def begins_with_docstring(body: list) -> bool:
    """Whether the first of several statements is a docstring."""
    first = body[0]
    is_constant = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return is_constant and isinstance(first.value.value, str) and len(body) > 1


@pytest.mark.parametrize(
    "pair, name", [(pair, name) for pair, names in SAME.items() for name in names]
)
def test_the_same_thing_in_the_same_words(pair, name):
    one, two = pair
    other = source_of(two, name).replace("method: type=COMBOPixels", "method: type=COMBO")
    assert source_of(one, name) == other


# ----- plain -----
@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_functions_fit_on_a_screen(path):
    """45 lines; `iterate` 60, `train` 80."""
    limits = {"iterate": 60, "train": 80}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= limits.get(node.name, 45), f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_lines_of_code_are_at_most_100_columns(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("path", MARKDOWN_FILES, ids=MARKDOWN_NAMES)
def test_lines_of_prose_are_at_most_110_columns(path):
    """Tables, blocks of code, and lines with a link are excepted."""
    in_code = False
    wide = []
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            in_code = not in_code
        if len(line) > 110 and not in_code and not line.startswith("|") and "](" not in line:
            wide.append(line)
    assert wide == []


def test_imports_of_ours():
    """ablations -> ampl (and each other, as design has it); collect -> mopo, combo_pixels."""
    ours = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("ablations/*.py")]}
    allowed = {
        "collect": {"mopo", "combo_pixels"},
        "ampl_kl": {"ampl", "ampl_wpr"},
        "ampl_kl_wpr": {"ampl", "ampl_wpr"},
        "ampl_gendice": {"ampl", "ampl_vpm"},
        "ampl_dualdice": {"ampl", "ampl_vpm"},
    }
    for path in [*ROOT.glob("*.py"), *ROOT.glob("ablations/*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        default = {"ampl"} if path.parent.name == "ablations" else set()
        assert imported & ours <= allowed.get(path.stem, default), path.name


# ----- equations -----
def tagged_functions(script: str) -> dict[int, set[str]]:
    """{number of an equation: the functions whose comments name it} of a script.

    `train` is left out: it names the equations of what it calls.
    """
    text = text_of(script)
    functions = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            functions.append((node.lineno, node.end_lineno, node.name))
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        inside = [function for function in functions if function[0] <= number <= function[1]]
        if not inside or "# " not in line:
            continue
        name = max(inside)[2]  # the innermost one starts last
        comment = line.split("# ", 1)[1]
        for equations in re.findall(r"Eqs?\. (\(\d+\)(?:, \(\d+\))*)", comment):
            for equation in re.findall(r"\d+", equations):
                if name != "train":
                    found.setdefault(int(equation), set()).add(name)
    return found


def readme_functions(script: str) -> dict[int, set[str]]:
    """The same, from README's table of the script: | (12) | what it is | `f`, `g` |"""
    section = README.split(f"#### {script}\n", 1)[1]
    found = {}
    for line in section.split("\n#", 1)[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"\(\d+\)", cells[0]):
            found[int(cells[0].strip("()"))] = set(re.findall(r"`(\w+)`", cells[-1]))
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_readmes_table_of_equations(script):
    """Where each equation stands, as the tags in the script say."""
    assert readme_functions(script) == tagged_functions(script)


def test_every_equation_of_the_method_has_a_line():
    """And none has a number that the paper has not."""
    assert {4, 6, 11, 12, 13, 14, 15, 16, 17} <= tagged_functions("ampl.py").keys()
    assert tagged_functions("ampl.py").keys() <= set(range(1, 18))
    assert tagged_functions("mopo.py").keys() == {7}
    assert tagged_functions("combo.py").keys() == {2, 3}
    assert tagged_functions("combo_pixels.py").keys() == {2, 3}


# ----- README -----
def readme_commands() -> list[tuple[str, str]]:
    """Script and flags of each `python script.py ...`; a backslash at its end joins two lines."""
    joined = README.replace("\\\n", " ")
    return re.findall(r"python ([\w/]+\.py) ([^\n`#&|]*)", joined)


@pytest.mark.parametrize("script, flags", sorted(set(readme_commands())))
def test_readme_commands_parse(script, flags, monkeypatch, tmp_path):
    """Those of the three scripts and collect.py, but for placeholders such as runs/<run>."""
    modules = SCRIPTS | {}
    argv = shlex.split(flags)
    if script not in modules or "<" in flags or "--help" in argv or "--select" in argv:
        pytest.skip("a placeholder, or no command to parse")
    monkeypatch.setattr(sys, "argv", [script, *argv])
    modules[script].parse_args()


def test_readme_has_commands_and_its_links_lead_somewhere():
    assert len(readme_commands()) >= 8
    for path in MARKDOWN_FILES:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_readme_names_no_file_that_is_not_there():
    for name in re.findall(r"`((?:ablations/|tests/)?[a-z_0-9]+\.(?:py|md|txt))`", README):
        places = [ROOT / name, ROOT / "ablations" / name, ROOT / "tests" / name]
        assert name == "mine.py" or any(place.exists() for place in places), name


# ----- requirements -----
STARTED = sorted(
    [path.name for path in ROOT.glob("*.py")]
    + [f"ablations/{path.name}" for path in ROOT.glob("ablations/ampl_*.py")]
)


def header(script: str) -> set[str]:
    """The dependencies that uv reads from a script's header."""
    block = text_of(script).split("# ///")[1].split("[tool.uv]")[0]
    return set(re.findall(r'"([\w-]+(?:==[\d.]+)?)"', block))


@pytest.mark.parametrize("script", [name for name in STARTED if name != "sweep.py"])
def test_how_threads_wait_is_set_before_torch_is_imported(script):
    """Only then it acts. A variant and collect.py import the script that sets it first."""
    text = text_of(script)
    sets_it = re.search(r'^import (ampl|mopo)  #|^    os.environ."GOMP_SPINCOUNT". = ', text, re.M)
    imports_torch = re.search(r"^(import|from) (torch|numpy|gymnasium)", text, re.M)
    assert imports_torch is None or sets_it.start() < imports_torch.start()


@pytest.mark.parametrize("script", STARTED)
def test_requirements_are_what_the_files_import(script):
    """The header that uv reads and requirements.txt name the same versions."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    # README's commands install these without what they ask for.
    by_itself = {"d4rl==1.1", "dm-control==1.0.50"}
    assert header(script) - by_itself <= listed
    assert "pip install --no-deps d4rl==1.1" in README
    if script == "sweep.py":  # the only one that makes tables
        assert header("ampl.py") < header(script)
    elif script == "combo_pixels.py":  # neither files of HDF5 nor D4RL's simulators
        assert "dm-control==1.0.50" in header(script)
        assert header(script) - header("ampl.py") == {"dm-control==1.0.50"}
    else:
        assert header(script) == header("ampl.py")
