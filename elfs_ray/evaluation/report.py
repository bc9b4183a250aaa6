"""The table of an evaluation, for people: measured lines, and the paper's numbers in lines of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elfs_ray.evaluation.keys import ComparisonConfig
from elfs_ray.evaluation.plan import SUPERVISED, Plan
from elfs_ray.evaluation.published import PUBLISHED

ALL = "all"


@dataclass(frozen=True)
class Line:
    """A method's figures by budget (as `summarize` has them; "all" for the whole pool), and its hard fractions."""

    name: str
    cells: Mapping[str, Mapping[str, Any]]
    hard_fractions: Mapping[str, float]


def to_markdown(
    config: ComparisonConfig, plan: Plan, lines: Sequence[Line], quality: Mapping[str, Mapping[str, Any]]
) -> str:
    """The whole results.md."""
    budgets = [str(budget) for budget in config.budgets] + ([ALL] if any(ALL in line.cells for line in lines) else [])
    shares = _shares(plan, budgets)
    head = ["test accuracy, %", *(_heading(budget, plan, budgets) for budget in budgets)]
    rows = [[line.name, *(_cell(line.cells.get(budget)) for budget in budgets)] for line in lines]
    published = PUBLISHED[config.published] if config.published else {}
    for name, numbers in published.items():
        cells = [_published_cell(numbers, share) for share in shares]
        if any(cell != "–" for cell in cells):
            rows.append([f"{name}, published", *cells])
    parts = [
        f"# {plan.pool_uri}\n\nTested on {config.test_uri}. {config.network}, {config.iterations:,} steps of "
        f"{config.batch_size} at every budget, {config.seeds} seeds. Measured: the last accuracy, mean ± standard "
        "deviation over seeds, and in brackets the mean of the best over training.",
        _table(head, rows),
    ]
    if any(line.name.split("+")[0] in SUPERVISED for line in lines):
        proxy = plan.sources[0].base["train"]["network"]
        parts.append(f"{', '.join(SUPERVISED)}: scores of a {proxy} proxy that learned the true labels.")
    if published:
        parts.append("Published: the ELFS paper (2406.04273), best over training, read off its figures (±0.2).")
    fractions = [
        [line.name, *(f"{line.hard_fractions[own]:.2f}" if own in line.hard_fractions else "–" for own in budgets)]
        for line in lines
        if line.hard_fractions
    ]
    if fractions:
        parts.append(_table(["hard fraction", *head[1:]], fractions))
    judged = [
        [name, f"{own['num_clusters']}", *(f"{100 * own[key]:.1f}" for key in ("accuracy", "purity", "nmi", "ari"))]
        for name, own in quality.items()
    ]
    parts.append(_table(["pseudo-labels, %", "clusters", "right", "purity", "NMI", "ARI"], judged))
    return "\n\n".join(parts) + "\n"


def closing_lines(lines: Sequence[Line]) -> str:
    """The figures in short, for a terminal."""
    budgets = list(dict.fromkeys(budget for line in lines for budget in line.cells))
    width = max(len("selection"), *(len(line.name) for line in lines))
    shown = [f"{'selection':<{width}}" + "".join(f"  {budget:>13}" for budget in budgets)]
    for line in lines:
        cells = [_short_cell(line.cells.get(budget)) for budget in budgets]
        shown.append(f"{line.name:<{width}}" + "".join(f"  {cell:>13}" for cell in cells))
    return "\n".join(shown)


def _shares(plan: Plan, budgets: Sequence[str]) -> list[float]:
    """The share of the pool of each column."""
    num_samples = plan.sources[0].num_samples
    own = [count / num_samples for count in plan.counts]
    return own + [1.0] * (len(budgets) - len(own))


def _heading(budget: str, plan: Plan, budgets: Sequence[str]) -> str:
    num_samples = plan.sources[0].num_samples
    count = num_samples if budget == ALL else plan.counts[budgets.index(budget)]
    return f"{100 * count / num_samples:.3g}% ({count:,})"


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "–"
    return f"{_short_cell(figures)} ({100 * figures['best_mean']:.1f})"


def _short_cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "–"
    spread = f" ± {100 * figures['spread']:.1f}" if figures["seeds"] > 1 else ""
    return f"{100 * figures['mean']:.1f}{spread}"


def _published_cell(numbers: Mapping[float, float], share: float) -> str:
    found = [value for kept, value in numbers.items() if abs(kept - share) < 0.005]
    return f"{found[0]:.1f}" if found else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
