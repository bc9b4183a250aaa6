"""Draw test accuracy vs. budget as SVG with matplotlib: a curve per method, a band of one standard deviation."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.evaluation.published import PUBLISHED
from elfs_ray.evaluation.report import ALL, Line
from elfs_ray.evaluation.workload import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED_SUFFIX = ", published"
# Okabe and Ito's palette, which colour-blind readers can tell apart, with brown in place of their yellow.
# From the ninth method on the colours repeat, with dashes.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#8c6d1f")


@dataclass(frozen=True)
class Curve:
    """A curve of the chart: points (share of the pool, accuracy in %, standard deviation in %), sorted by share."""

    name: str
    points: tuple[tuple[float, float, float], ...]
    is_published: bool = False

    @property
    def method(self) -> str:
        """Return the method's name, the same for its measured and its published curve: both get one colour."""
        return self.name.removesuffix(PUBLISHED_SUFFIX)


def draw_chart(config: EvaluateRunsConfig, workload: Workload, lines: Sequence[Line]) -> bytes:
    """Return results.svg. A line without budgets, such as full, becomes one point.

    Raises ImportError if matplotlib is not installed.
    """
    # matplotlib is an optional extra: importing it here lets evaluations run without it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves = _curves(config, workload, lines)
    methods = list(dict.fromkeys(curve.method for curve in curves))
    # The same results must give the same bytes. By default matplotlib salts the ids of elements at random, and draws
    # text as outlines of the machine's fonts.
    with rc_context({"svg.hashsalt": "elfs_ray", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            _draw_curve(axes, curve, methods.index(curve.method))
        _label_axes(axes, sorted({share for curve in curves for share, _, _ in curve.points}))
        # Outside the axes, where the legend cannot cover a curve.
        figure.legend(loc="outside right upper", frameon=False)
        buffer = io.BytesIO()
        # The creator would name matplotlib's version.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _curves(config: EvaluateRunsConfig, workload: Workload, lines: Sequence[Line]) -> list[Curve]:
    """Return the measured curves, and the paper's within the range of shares that was measured."""
    num_samples = workload.sources[0].num_samples
    shares = [count / num_samples for count in workload.counts]
    share_of = dict(zip(map(str, config.budgets), shares, strict=True)) | {ALL: 1.0}
    curves = []
    for line in lines:
        points = [(share_of[budget], 100 * cell.mean, 100 * cell.spread) for budget, cell in line.cells.items()]
        curves.append(Curve(line.name, tuple(sorted(points))))
    low = min(share for curve in curves for share, _, _ in curve.points)
    high = max(share for curve in curves for share, _, _ in curve.points)
    for name, numbers in (PUBLISHED[config.published] if config.published else {}).items():
        published = tuple(sorted((share, value, 0.0) for share, value in numbers.items() if low <= share <= high))
        if published:
            curves.append(Curve(name + PUBLISHED_SUFFIX, published, is_published=True))
    return curves


def _draw_curve(axes: "Axes", curve: Curve, number: int) -> None:
    """Draw a curve; the number of its method decides colour and dashes."""
    shares, values, deviations = zip(*curve.points, strict=True)
    colour = COLOURS[number % len(COLOURS)]
    style = ":" if curve.is_published else "-" if number < len(COLOURS) else "--"
    axes.plot(shares, values, style, color=colour, linewidth=2, marker="o", markersize=5, label=curve.name)
    if not curve.is_published:
        lower = [value - deviation for value, deviation in zip(values, deviations, strict=True)]
        upper = [value + deviation for value, deviation in zip(values, deviations, strict=True)]
        axes.fill_between(shares, lower, upper, color=colour, alpha=0.15, linewidth=0, gid=f"band-{number}")


def _label_axes(axes: "Axes", shares: Sequence[float]) -> None:
    """Label the axes: a tick per budget on a logarithmic scale, and grid lines for the accuracies."""
    axes.set_xscale("log")
    axes.minorticks_off()  # a log axis would add ticks between the budgets
    axes.set_xticks(shares, [f"{100 * share:.3g}%" for share in shares])
    axes.set_xlabel("images labelled")
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
