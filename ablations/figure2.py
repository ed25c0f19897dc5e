"""The paper's Figure 2: how omega spreads over the data, a panel per run, a violin per re-training.

    python ablations/figure2.py out.png runs/<run of ampl.py> runs/<run of ampl_vpm.py> ...

Reads the runs' weight<iteration>.npy (first learner). Prints the quartiles, which the picture draws
as short lines.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

LEVELS = (0.25, 0.5, 0.75)


def log_weights(run: Path) -> dict[int, np.ndarray]:
    """Log of the normalised weights of all rows, by iteration of the re-training."""
    files = {int(file.stem.removeprefix("weight")): file for file in run.glob("weight*.npy")}
    return {iteration: np.log(np.load(files[iteration])[0]) for iteration in sorted(files)}


def draw(axes, run: Path) -> None:
    """One panel; a violin shows ten thousand rows spread evenly over the sorted data."""
    name, violins = run.name.split("__")[1], []
    for iteration, logs in (by_iteration := log_weights(run)).items():
        low, middle, high = np.quantile(logs, LEVELS)
        print(f"{name}, iteration {iteration}: quartiles {low:.3f}, {middle:.3f}, {high:.3f}; "
              f"from {logs.min():.2f} to {logs.max():.2f}")  # fmt: skip
        violins.append(np.sort(logs)[np.linspace(0, len(logs) - 1, 10_000).astype(int)])
    axes.violinplot(violins, quantiles=[LEVELS] * len(violins), widths=0.8)
    axes.set_xticks(range(1, len(violins) + 1), list(by_iteration))
    axes.set(title=name, xlabel="iteration of the re-training")
    axes.set_ylabel("log of the normalised weight")


def main(out: str, *runs: str) -> None:
    for run in runs:
        if not list(Path(run).glob("weight*.npy")):
            sys.exit(f"{run} holds no weight*.npy: has it re-trained its model?")
    figure = Figure(figsize=(3.5 * len(runs), 3.5), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs):
        draw(axes, Path(run))
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python ablations/figure2.py out.png RUN [RUN ...]")
    main(*sys.argv[1:])
