"""The paper's Figure 2: how omega spreads over the data, a panel per run, a violin per refit.

    python ablations/figure2.py out.png runs/<run of ampl.py> runs/<run of ampl_vpm.py> ...

It reads omega<iteration>.npy [N] from each run's folder and prints the quartiles of log(omega),
which the picture shows as short lines.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

QUARTILES = (0.25, 0.5, 0.75)
PREFIX = "omega"  # of the files that hold omega


def log_omega(run: Path) -> dict[int, np.ndarray]:
    """The log of omega / its mean at every row [N], by the iteration of the refit."""
    files = {}
    for file in run.glob(f"{PREFIX}*.npy"):
        iteration = int(file.stem.removeprefix(PREFIX))
        files[iteration] = file
    return {iteration: np.log(np.load(files[iteration])) for iteration in sorted(files)}


def draw(axes, run: Path) -> None:
    """One panel, with a violin for every refit, of ten thousand rows that stand for all."""
    name = run.name.split("__")[1]
    by_iteration = log_omega(run)
    violins = []
    for iteration, values in by_iteration.items():
        low, middle, high = np.quantile(values, QUARTILES)
        print(
            f"{name}, iteration {iteration}: quartiles {low:.3f}, {middle:.3f}, {high:.3f}; "
            f"from {values.min():.2f} to {values.max():.2f}"
        )
        places = np.linspace(0, len(values) - 1, 10_000).astype(int)
        violins.append(np.sort(values)[places])
    axes.violinplot(violins, quantiles=[QUARTILES] * len(violins), widths=0.8)
    axes.set_xticks(range(1, len(violins) + 1), list(by_iteration))
    axes.set(title=name, xlabel="iteration of the refit", ylabel="log(omega / its mean)")


def main(out: str, runs: list[str]) -> None:
    """Draw the runs side by side."""
    for run in runs:
        if not list(Path(run).glob(f"{PREFIX}*.npy")):
            sys.exit(f"{run} holds no {PREFIX}<iteration>.npy: has it refitted its model?")
    figure = Figure(figsize=(3.5 * len(runs), 3.5), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, run in zip(panels, runs):
        draw(axes, Path(run))
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python ablations/figure2.py out.png RUN [RUN ...]")
    main(sys.argv[1], sys.argv[2:])
