"""Keep the copies alike: `python tests/sync.py` after a change of ampl.py, before the commit.

Every script is a whole file, so common code stands in several. Same name means same source text
(EXEMPT says what may differ), and tests/test_copies.py holds it. This command repairs it with
ampl.py's uncommitted change and `git merge-file`, as if each copy were a branch: an ablation is
merged as a whole file, mopo.py and combo.py definition by definition, as their order is their own.
A conflict is left between the usual markers and ends the command with status 1: mend, commit, run
again. Else it writes README's generated tables and the ablations' ledgers (tests/lineage) anew.

An ablation's docstring names its `Base:` and lists in `Changes:` every definition that is not the
base's, and the sections; its new lines are those that stand nowhere in the base.
"""

import ast
import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LINEAGE = ROOT / "tests" / "lineage"
BASE = "ampl.py"
# What each method defines in its own way.
EXEMPT = {
    "Args", "PAPER", "parse_args", "check_args", "train", "main",
    "DynamicsEnsemble", "fit_model", "imagine", "Policy",
}  # fmt: skip
parse = functools.cache(ast.parse)


def scripts() -> list[Path]:
    """All scripts that hold copies: those at the top and the ablations."""
    return sorted(ROOT.glob("*.py")) + sorted((ROOT / "ablations").glob("*.py"))


@functools.cache
def definitions(source: str) -> dict[str, str]:
    """Top-level functions, classes and constants: name -> source text, decorators included."""
    found, lines = {}, source.splitlines()
    for node in parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            name = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            first, name = node.lineno, node.targets[0].id
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, name = node.lineno, node.target.id
        else:
            continue
        found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


class Lineage(NamedTuple):
    """What an ablation's docstring says."""

    base: str
    changes: set[str]  # definitions that are new, differ from the base's, or are removed
    sections: set[int]


@functools.cache
def lineage(source: str) -> Lineage | None:
    """Read `Base:` and `Changes:`, which goes on to the next empty line; None without them."""
    docstring = ast.get_docstring(parse(source)) or ""
    base = re.search(r"^Base: (\w+\.py)$", docstring, re.MULTILINE)
    changes = re.search(r"^Changes: (.*?)(?:\n\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if not base or not changes:
        return None
    sections = re.search(r"\(sections? ([\d,\s]+)\)", changes[1])[1]
    names = set(re.findall(r"`(\w+)`", changes[1]))
    return Lineage(base[1], names, {int(n) for n in sections.split(",")})


def differing_copies(sources: dict[str, str]) -> list[str]:
    """Names with two texts among the files {file: source}, each as 'name: file, file'.

    An ablation is compared with its base, and may differ in nothing but its own list of changes.
    """
    found: list[str] = []
    versions: dict[str, dict[str, list[str]]] = {}
    for file, source in sources.items():
        origin = lineage(source)
        if origin and origin.base in sources:
            base = definitions(sources[origin.base])
            for name, text in definitions(source).items():
                if name not in origin.changes and text != base.get(name):
                    found.append(f"{name}: {file} | {origin.base}")
            continue
        for name, text in definitions(source).items():
            if name not in EXEMPT:
                versions.setdefault(name, {}).setdefault(text, []).append(file)
    return found + [
        f"{name}: " + " | ".join(", ".join(files) for files in texts.values())
        for name, texts in versions.items()
        if len(texts) > 1
    ]


@functools.cache
def counted_lines(source: str) -> list[tuple[int, str]]:
    """(section, stripped line) of all lines that count: not empty, docstring or row of PAPER."""
    docstring, section, counted = parse(source).body[0], 0, []
    for number, line in enumerate(source.splitlines(), 1):
        banner = re.match(r"# (\d+)\. ", line)
        section = int(banner[1]) if banner else section
        row = re.match(r'    "[\w-]+": dict\(', line)
        if line.strip() and not row and not docstring.lineno <= number <= docstring.end_lineno:
            counted.append((section, line.strip()))
    return counted


def new_lines(source: str, base: str) -> list[tuple[int, str]]:
    """(section, line) of the lines that stand nowhere in the base."""
    known = {line for _, line in counted_lines(base)}
    return [(section, line) for section, line in counted_lines(source) if line not in known]


def ledger(source: str, base: str) -> str:
    """The new lines (+) of an ablation and the base's lines that it lacks (-)."""
    lines = [f"+ {line}" for _, line in new_lines(source, base)]
    lines += [f"- {line}" for _, line in new_lines(base, source)]
    return "\n".join(lines) + "\n"


def ledgers() -> dict[str, str]:
    """Of every ablation: the ledger's name -> its text."""
    sources = {p.name: p.read_text() for p in scripts()}
    origins = {file: lineage(source) for file, source in sources.items()}
    return {
        file.replace(".py", ".txt"): ledger(sources[file], sources[origin.base])
        for file, origin in origins.items()
        if origin
    }


def merge(old_base: str, new_base: str, sibling: str) -> tuple[str, bool]:
    """The sibling with the base's change in it, and whether there is a conflict."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("sibling", "old_base", "new_base")]
        for path, text in zip(paths, (sibling, old_base, new_base), strict=True):
            path.write_text(text)
        done = subprocess.run(["git", "merge-file", "-p", *paths], capture_output=True, text=True)
    if done.returncode < 0 or done.returncode > 127:
        raise RuntimeError(done.stderr)
    return done.stdout, done.returncode > 0


def merge_definitions(old_base: str, new_base: str, sibling: str) -> tuple[str, bool]:
    """The same for a sibling that shares only some definitions with the base."""
    old, new, own = map(definitions, (old_base, new_base, sibling))
    conflicts = False
    for name in (old.keys() & new.keys() & own.keys()) - EXEMPT:
        if old[name] != new[name]:
            text, conflict = merge(*(f"{d[name]}\n" for d in (old, new, own)))
            sibling = sibling.replace(own[name], text.removesuffix("\n"))
            conflicts |= conflict
    return sibling, conflicts


def equation_table(source: str, file: str) -> str:
    """Markdown: equation, the functions that compute it, their tagged lines."""
    lines = source.splitlines()
    spans = [
        (node.lineno, node.end_lineno, node.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    ]
    rows: dict[int, list[str]] = {}
    for number, line in enumerate(lines, 1):
        tag = re.search(r"# Eq\. (.*)$", line)
        inside = [s for s in spans if s[0] <= number <= s[1]]
        if tag and inside:
            name = max(inside)[2]  # the innermost function
            for equation in re.findall(r"\((\d+)\)", tag[1]):
                link = f"[`{name}`:{number}]({file}#L{number})"
                rows.setdefault(int(equation), []).append(link)
    table = ["| equation | computed in |", "|---|---|"]
    table += [f"| ({e}) | {', '.join(links)} |" for e, links in sorted(rows.items())]
    return "\n".join(table)


def readme_with_tables(readme: str) -> str:
    """README with everything between its `generated` markers written anew."""
    table = equation_table((ROOT / BASE).read_text(), BASE)
    pattern = r"(<!-- generated: equations of ampl.py -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", readme, flags=re.DOTALL)


def git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    new_base, synced = (ROOT / BASE).read_text(), ROOT / git("rev-parse", "--git-dir").strip()
    synced = synced / "synced_ampl.py"
    # A copy holds HEAD's text of the base or, before the commit, that of the last sync.
    old_bases = [git("show", f"HEAD:{BASE}")] + [p.read_text() for p in [synced] if p.exists()]
    conflicts = 0
    for path in scripts() if new_base != old_bases[0] else []:
        if path.name in (BASE, "collect.py"):
            continue
        how = merge if path.parent.name == "ablations" else merge_definitions
        tries = [how(old_base, new_base, path.read_text()) for old_base in old_bases]
        text, conflict = min(tries, key=lambda merged: merged[1])
        if text != path.read_text():
            path.write_text(text)
            print(f"{path.relative_to(ROOT)}: {'CONFLICT' if conflict else 'merged'}")
        conflicts += conflict
    if conflicts:
        return 1
    synced.write_text(new_base)
    readme = ROOT / "README.md"
    readme.write_text(readme_with_tables(readme.read_text()))
    LINEAGE.mkdir(exist_ok=True)
    for path in LINEAGE.iterdir():
        path.unlink()
    for name, text in ledgers().items():
        (LINEAGE / name).write_text(text)
    for line in differing_copies({p.name: p.read_text() for p in scripts()}):
        print(f"differs: {line}")
        conflicts += 1
    return 1 if conflicts else 0


if __name__ == "__main__":
    sys.exit(main())
