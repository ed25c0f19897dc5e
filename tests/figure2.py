"""AMPL's Figure 2: the weights of several methods over their re-trainings, one panel each.

    python tests/figure2.py out.png runs/<run of ampl.py> runs/<run of ampl_vpm.py> ...

Reads every run's miw.npz. Prints the quartiles, which the picture draws as short lines.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEVELS = (0.25, 0.5, 0.75)


def weights(run: Path) -> dict[int, np.ndarray]:
    """Log of the normalised weights of the first learner, by iteration of the re-training."""
    with np.load(run / "miw.npz") as saved:
        return {int(k): saved[k][0] for k in saved.files}


def draw(axes, run: Path) -> None:
    """One panel: a violin per re-training, ten thousand rows spread evenly over the sorted data."""
    by_iteration = weights(run)
    name = run.name.split("__")[1]
    violins = []
    for iteration, logs in by_iteration.items():
        quartiles = np.quantile(logs, LEVELS)
        shown = ", ".join(f"{q:.3f}" for q in quartiles)
        print(f"{name}, iteration {iteration}: quartiles {shown}; "
              f"from {logs.min():.2f} to {logs.max():.2f}")  # fmt: skip
        violins.append(np.sort(logs)[np.linspace(0, len(logs) - 1, 10_000).astype(int)])
    axes.violinplot(violins, quantiles=[LEVELS] * len(violins), widths=0.8)
    axes.set_xticks(range(1, len(violins) + 1), list(by_iteration))
    axes.set_title(name)
    axes.set_xlabel("iteration of the re-training")
    axes.set_ylabel("log of the normalised weight")


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python tests/figure2.py out.png RUN [RUN ...]")
    out, runs = sys.argv[1], [Path(p) for p in sys.argv[2:]]
    for run in runs:
        if not (run / "miw.npz").exists():
            sys.exit(f"figure2.py: {run} holds no miw.npz: has it trained omega?")
    size = (3.5 * len(runs), 3.5)
    figure, panels = plt.subplots(1, len(runs), figsize=size, layout="constrained", squeeze=False)
    for axes, run in zip(panels[0], runs, strict=True):
        draw(axes, run)
    figure.savefig(out, dpi=100)
    print(out)


if __name__ == "__main__":
    main()
