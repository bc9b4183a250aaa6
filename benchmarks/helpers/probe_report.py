"""Report accuracies of linear probes by method and number of labels: a table, a chart, and how `auto` fares."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from elfs_ray.evaluation.chart import COLOURS

TITLES = {
    "cifar10": "CIFAR-10",
    "cifar10_tail": "CIFAR-10, long-tailed",
    "fashion_mnist": "Fashion-MNIST",
    "mnist": "MNIST",
    "cifar10_copies": "CIFAR-10, 30% near-duplicates",
    "imagenette": "Imagenette",
    "tiny_imagenet": "Tiny ImageNet",
}
METHOD_TITLES = {"kmeans_centres": "k-means centres", "typiclust": "TypiClust", "elfs": "ELFS", "auto": "`auto`"}
FEW = 10  # labels a class up to which `auto` must be above random by more than its spread


class Measured(Protocol):
    """What was measured on a pool; accuracies: in % by "method count", one for each draw."""

    name: str
    accuracies: dict[str, list[float]]

    @property
    def num_images(self) -> int: ...

    @property
    def counts(self) -> list[int]: ...

    @property
    def num_classes(self) -> int: ...


def title_of(track: Measured) -> str:
    """Return the pool's title in tables and charts, which tells its size."""
    return f"{TITLES.get(track.name, track.name)}, {track.num_images:,}"


class Cell(NamedTuple):
    """The mean accuracy over draws in %, and their standard deviation, 0 for one draw."""

    mean: float
    spread: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.spread:.1f}" if self.spread else f"{self.mean:.1f}"


def cells_of(track: Measured, method: str) -> dict[int, Cell]:
    """Return what has been measured of a method, by number of labels."""
    cells = {}
    for count in track.counts:
        if values := track.accuracies.get(f"{method} {count}"):
            cells[count] = Cell(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    return cells


def print_means(track: Measured, method: str) -> None:
    """Print the mean accuracies of a method on a pool, one for each number of labels, as a line of JSON."""
    means = [round(float(np.mean(track.accuracies[f"{method} {count}"])), 1) for count in track.counts]
    print(json.dumps({"pool": track.name, "method": method, "counts": track.counts, "accuracies": means}), flush=True)


def write_table(tracks: Sequence[Measured], methods: Sequence[str], path: Path) -> None:
    """Write a table for each pool: a row for each method, a column for each number of labels."""
    lines: list[str] = []
    for track in tracks:
        lines.append(f"| {title_of(track)} | " + " | ".join(f"{count:,}" for count in track.counts) + " |")
        lines.append("|---" * (len(track.counts) + 1) + "|")
        for method in methods:
            cells = cells_of(track, method)
            shown = " | ".join(str(cells.get(count, "–")) for count in track.counts)
            lines.append(f"| {METHOD_TITLES.get(method, method)} | {shown} |")
        lines.append("")
    path.write_text("\n".join(lines))


def judge(tracks: Sequence[Measured], methods: Sequence[str]) -> str:
    """Say in how many cells `auto` is above random, and level with the best method, by random's spread."""
    lines = []
    cells = at_random = few = above = best = 0
    for track in tracks:
        measured = {method: cells_of(track, method) for method in methods}
        for count, random in measured.get("random", {}).items():
            accuracies = {method: of[count].mean for method, of in measured.items() if count in of}
            if "auto" not in accuracies:
                continue
            auto, leader = accuracies["auto"], max(accuracies, key=lambda method: accuracies[method])
            is_few = count <= FEW * track.num_classes
            cells, few = cells + 1, few + is_few
            faults = {
                "below random": auto < random.mean - random.spread,
                "not above random": is_few and auto <= random.mean + random.spread,
                f"behind {leader} with {accuracies[leader]:.1f}": auto < accuracies[leader] - random.spread,
            }
            below, not_above, behind = faults.values()
            at_random, above, best = at_random + (not below), above + (is_few and not not_above), best + (not behind)
            if any(faults.values()):
                shown = ", ".join(fault for fault, is_so in faults.items() if is_so)
                lines.append(f"{title_of(track)}: {count:,} labels: auto {auto:.1f}, random {random}: {shown}")
    lines.append(f"auto: at least random's mean less its spread in {at_random} of {cells} cells")
    lines.append(f"auto: above random by more than its spread in {above} of {few} cells of up to {FEW} a class")
    lines.append(f"auto: best or within random's spread of the best in {best} of {cells} cells")
    return "\n".join(lines)


def write_chart(tracks: Sequence[Measured], methods: Sequence[str], path: Path) -> None:
    """Draw accuracy vs. labels, a panel for each pool; random with a band of one standard deviation."""
    with rc_context({"svg.hashsalt": "elfs_ray", "svg.fonttype": "none", "font.size": 9}):
        columns = min(4, len(tracks))
        rows = -(-len(tracks) // columns)
        figure = Figure(figsize=(3.1 * columns, 2.7 * rows + 0.4), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axes in panels[len(tracks) :]:
            axes.set_axis_off()
        for axes, track in zip(panels, tracks, strict=False):
            _draw(axes, track, methods)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(methods), frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw(axes: Axes, track: Measured, methods: Sequence[str]) -> None:
    for method, colour in zip(methods, COLOURS, strict=False):
        cells = cells_of(track, method)
        if not cells:
            continue
        counts, (means, spreads) = list(cells), np.transpose(list(cells.values()))
        width = 2.4 if method == "auto" else 1.2
        label = METHOD_TITLES.get(method, method).strip("`")
        axes.plot(counts, means, color=colour, linewidth=width, marker="o", markersize=3, label=label)
        if spreads.any():
            axes.fill_between(counts, means - spreads, means + spreads, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # between 200 and 2,000 they would lie on each other
    axes.set_title(title_of(track), fontsize=9)
    axes.set_xlabel("labels")
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
