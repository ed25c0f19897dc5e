"""Keep the copies alike: `python tests/sync.py` after a change of ampl.py, before the commit.

Every script is a whole file, so common code stands in several. Same name means same source text
(EXEMPT says what may differ), and tests/test_copies.py holds it. This command repairs it: each
sibling gets ampl.py's uncommitted change by a three-way merge (`git merge-file`), as if it were a
branch. A conflict is left between the usual markers and ends the command with status 1. It then
writes README's generated tables anew.
"""

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = "ampl.py"
# What each method defines in its own way.
EXEMPT = {
    "Args", "PAPER", "parse_args", "check_args", "train", "main",
    "DynamicsEnsemble", "fit_model", "imagine",
}  # fmt: skip


def scripts() -> list[Path]:
    """All scripts that hold copies: those at the top and the ablations."""
    return sorted(ROOT.glob("*.py")) + sorted((ROOT / "ablations").glob("*.py"))


def definitions(source: str) -> dict[str, str]:
    """Top-level functions, classes and constants: name -> source text, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            name = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            first, name = node.lineno, node.targets[0].id
        else:
            continue
        found[name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def differing_copies(sources: dict[str, str]) -> list[str]:
    """Names with two texts among the files {file: source}, each as 'name: file, file'."""
    versions: dict[str, dict[str, list[str]]] = {}
    for file, source in sources.items():
        for name, text in definitions(source).items():
            if name not in EXEMPT:
                versions.setdefault(name, {}).setdefault(text, []).append(file)
    return [
        f"{name}: " + " | ".join(", ".join(files) for files in texts.values())
        for name, texts in versions.items()
        if len(texts) > 1
    ]


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


def main() -> int:
    show = ["git", "-C", str(ROOT), "show", f"HEAD:{BASE}"]
    old_base = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    new_base = (ROOT / BASE).read_text()
    conflicts = 0
    for path in scripts() if new_base != old_base else []:
        if path.name in (BASE, "collect.py"):
            continue
        text, conflict = merge(old_base, new_base, path.read_text())
        if text != path.read_text():
            path.write_text(text)
            print(f"{path.relative_to(ROOT)}: {'CONFLICT' if conflict else 'merged'}")
        conflicts += conflict
    readme = ROOT / "README.md"
    readme.write_text(readme_with_tables(readme.read_text()))
    for line in differing_copies({p.name: p.read_text() for p in scripts()}):
        print(f"differs: {line}")
        conflicts += 1
    return 1 if conflicts else 0


if __name__ == "__main__":
    sys.exit(main())
