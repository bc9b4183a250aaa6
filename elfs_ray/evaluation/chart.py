"""Test accuracy against budget as SVG: a curve a method, a band of one standard deviation over seeds."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.evaluation.published import PUBLISHED
from elfs_ray.evaluation.report import ALL, Line
from elfs_ray.evaluation.workload import Workload

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 56, 190, 24, 44
NAME_HEIGHT = 14
PUBLISHED_SUFFIX = ", published"
# Told apart by people who see red and green alike, too (Okabe and Ito); dashes tell them apart from the ninth on.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#8c6d1f")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.axis{stroke:#999}.grid{stroke:#e4e4e4}.curve{fill:none;"
    "stroke-width:2}.band{opacity:.15;stroke:none}.published{stroke-dasharray:2 4}"
)


@dataclass(frozen=True)
class Curve:
    """Points (share of the pool, accuracy in %, standard deviation), by share."""

    name: str
    points: tuple[tuple[float, float, float], ...]
    is_published: bool = False


def draw_chart(config: EvaluateRunsConfig, workload: Workload, lines: Sequence[Line]) -> str:
    """The whole results.svg; lines without budgets, such as full, are drawn as one point."""
    shares = dict(
        zip(map(str, config.budgets), (n / workload.sources[0].num_samples for n in workload.counts), strict=True)
    )
    curves = [_measured(line, shares | {ALL: 1.0}) for line in lines]
    low = min(share for curve in curves for share, _, _ in curve.points)
    high = max(share for curve in curves for share, _, _ in curve.points)
    for name, numbers in (PUBLISHED[config.published] if config.published else {}).items():
        points = tuple(sorted((share, value, 0.0) for share, value in numbers.items() if low <= share <= high))
        if points:
            curves.append(Curve(name + PUBLISHED_SUFFIX, points, is_published=True))
    return _svg(curves)


def _measured(line: Line, shares: dict[str, float]) -> Curve:
    points = [(shares[budget], 100 * cell.mean, 100 * cell.spread) for budget, cell in line.cells.items()]
    return Curve(line.name, tuple(sorted(points)))


@dataclass(frozen=True)
class Frame:
    """Where shares of the pool (logarithmic) and accuracies in % lie on the page."""

    low: float
    high: float
    bottom: float
    top: float

    def x(self, share: float) -> float:
        part = math.log(share / self.low) / math.log(self.high / self.low) if self.high > self.low else 0.5
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.bottom) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)


def _svg(curves: Sequence[Curve]) -> str:
    shares = sorted({share for curve in curves for share, _, _ in curve.points})
    edges = [(value - dev, value + dev) for curve in curves for _, value, dev in curve.points]
    frame = Frame(shares[0], shares[-1], *_limits([value for edge in edges for value in edge]))
    parts = _axes(frame, shares)
    # Published and measured curves of one method have one colour.
    methods = list(dict.fromkeys(curve.name.removesuffix(PUBLISHED_SUFFIX) for curve in curves))
    heights = _spread_names([frame.y(curve.points[-1][1]) for curve in curves])
    for curve, height in zip(curves, heights, strict=True):
        number = methods.index(curve.name.removesuffix(PUBLISHED_SUFFIX))
        parts.append(_curve(curve, frame, COLOURS[number % len(COLOURS)], number >= len(COLOURS), height))
    label = "Test accuracy against the share of images that are labelled"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{label}'>"
        f"<style>{STYLE}</style><rect width='100%' height='100%' fill='#fff'/>{''.join(parts)}</svg>\n"
    )


def _axes(frame: Frame, shares: Sequence[float]) -> list[str]:
    """Lines at round accuracies, a mark at each budget, and what they are."""
    parts, axis = [], HEIGHT - BOTTOM
    for tick in _ticks(frame.bottom, frame.top):
        y = frame.y(tick)
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{tick:g}</text>")
    for share in shares:
        x = frame.x(share)
        parts.append(f"<line class='axis' x1='{x:.1f}' x2='{x:.1f}' y1='{axis}' y2='{axis + 5}'/>")
        parts.append(f"<text x='{x:.1f}' y='{axis + 19}' text-anchor='middle'>{100 * share:.3g}%</text>")
    parts.append(f"<text x='{LEFT}' y='{TOP - 10}'>test accuracy, %</text>")
    parts.append(f"<text x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 6}' text-anchor='middle'>images labelled</text>")
    return parts


def _curve(curve: Curve, frame: Frame, colour: str, is_dashed: bool, name_y: float) -> str:
    """A band, a curve with a dot a budget, and its name at the right with a thin line to it."""
    x, y = frame.x, frame.y
    centre = [(x(share), y(value)) for share, value, _ in curve.points]
    upper = [(x(share), y(value + dev)) for share, value, dev in curve.points]
    lower = [(x(share), y(value - dev)) for share, value, dev in curve.points]
    css = "curve published" if curve.is_published else "curve"
    dash = " stroke-dasharray='7 3'" if is_dashed and not curve.is_published else ""
    parts = []
    if not curve.is_published:
        parts.append(f"<polygon class='band' fill='{colour}' points='{_points(upper + lower[::-1])}'/>")
    parts.append(f"<polyline class='{css}' stroke='{colour}'{dash} points='{_points(centre)}'/>")
    for (cx, cy), (share, value, dev) in zip(centre, curve.points, strict=True):
        title = f"{html.escape(curve.name)}, {100 * share:.3g}%: {value:.1f}" + (f" ± {dev:.1f}" if dev else "")
        parts.append(f"<circle cx='{cx:.1f}' cy='{cy:.1f}' r='3' fill='{colour}'><title>{title}</title></circle>")
    end_x, end_y = centre[-1]
    parts.append(
        f"<line x1='{end_x + 5:.1f}' y1='{end_y:.1f}' x2='{WIDTH - RIGHT + 18}' y2='{name_y:.1f}' stroke='{colour}' "
        f"stroke-width='.6'/><text x='{WIDTH - RIGHT + 22}' y='{name_y + 4:.1f}' style='fill:{colour}'>"
        f"{html.escape(curve.name)}</text>"
    )
    return "".join(parts)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the range of some values, never empty."""
    low, high = min(values), max(values)
    margin = max((high - low) * 0.06, 0.5)
    return max(low - margin, 0.0), min(high + margin, 100.0)


def _ticks(low: float, high: float) -> list[float]:
    """Some five round numbers between two."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [round(step * i, 6) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _spread_names(heights: Sequence[float]) -> list[float]:
    """Heights for names, in the order of the curves' ends, none closer to the next than a line of text."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [0.0] * len(heights)
    above = -math.inf
    for i in order:
        placed[i] = above = max(heights[i], above + NAME_HEIGHT)
    overflow = max(0.0, above - (HEIGHT - BOTTOM))
    return [height - overflow for height in placed]
