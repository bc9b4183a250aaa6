"""Write the results of an evaluation as text: tables in Markdown, and a summary for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elfs_ray.config import LINEAR_PROBE
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.evaluation.leaks import Leaks
from elfs_ray.evaluation.methods import METHODS
from elfs_ray.evaluation.published import PUBLISHED
from elfs_ray.evaluation.quality import ClusteringQuality, NeighborVote
from elfs_ray.evaluation.trials import Accuracy
from elfs_ray.evaluation.workload import Workload

ALL = "all"  # the budget of the method full


@dataclass(frozen=True)
class Line:
    """A method's accuracies and, if it uses one, hard fractions, by budget (ALL: the whole pool)."""

    name: str
    cells: Mapping[str, Accuracy]
    hard_fractions: Mapping[str, float]


@dataclass(frozen=True)
class Quality:
    """How good the pseudo-labels, if there are any, and the embeddings of a run are."""

    clustering: ClusteringQuality | None
    neighbors: NeighborVote


@dataclass(frozen=True)
class Results:
    """Everything that an evaluation measured.

    network: what learned from the selections. quality: by name of the run. leaks: None where nobody looked for them.
    """

    network: str
    lines: tuple[Line, ...]
    quality: Mapping[str, Quality]
    leaks: Leaks | None = None


def to_markdown(config: EvaluateRunsConfig, workload: Workload, results: Results) -> str:
    """Return results.md. The paper's numbers have rows of their own, so that nobody takes them for measured ones."""
    lines = results.lines
    budgets = [str(budget) for budget in config.budgets] + ([ALL] if any(ALL in line.cells for line in lines) else [])
    head = ["test accuracy, %", *_headings(budgets, workload)]
    parts = [
        f"# {workload.pool_uri}\n\nTested on {config.test_uri}. {_describe_learning(config)}",
        _table(head, [*_measured_rows(config, lines, budgets), *_published_rows(config, workload, budgets)]),
    ]
    supervised = [name for name, method in METHODS.items() if method.is_supervised]
    if any(line.name.split("+")[0] in supervised for line in lines):
        proxy = workload.sources[0].base["train"]["network"]
        parts.append(f"{', '.join(supervised)}: scores of a {proxy} proxy that learned the true labels.")
    if config.published:
        parts.append("Published: the ELFS paper (2406.04273), best over training, read off its figures (±0.2).")
    fractions = [
        [line.name, *(f"{line.hard_fractions[key]:.2f}" if key in line.hard_fractions else "–" for key in budgets)]
        for line in lines
        if line.hard_fractions
    ]
    if fractions:
        parts.append(_table(["hard fraction", *head[1:]], fractions))
    parts.append(_quality_table(results.quality))
    if results.leaks is not None:
        parts.append(_describe_leaks(results.leaks))
        if results.leaks.examples:
            pairs = [[f"`{test}`", f"`{pool}`", f"{cosine:.3f}"] for test, pool, cosine in results.leaks.examples]
            parts.append(_table(["test image", "image of the pool", "similarity"], pairs))
    return "\n\n".join(parts) + "\n"


def closing_lines(*evaluations: Results) -> str:
    """Return a summary for the terminal: a table for each evaluation of the same runs, and the quality of these."""
    shown = [line for results in evaluations for line in (*_accuracy_table(results), "")]
    first = evaluations[0]
    for name, quality in first.quality.items():
        of_run = f" of {name}" if len(first.quality) > 1 else ""
        shown += [_describe_clustering(quality.clustering, of_run)] if quality.clustering else []
        shown.append(_describe_embeddings(quality.neighbors, of_run))
    if first.leaks is not None:
        shown.append(_describe_leaks(first.leaks))
    return "\n".join(shown)


def _accuracy_table(results: Results) -> list[str]:
    """Return what was measured, the budgets, and a line for each method."""
    lines = results.lines
    # Budgets in the order of the first line that has them; "all" comes with the line full.
    counts = {budget: cell.num_samples for line in lines for budget, cell in line.cells.items()}
    heads = [f"{count:,}" if budget == str(count) else f"{budget} ({count:,})" for budget, count in counts.items()]
    width = max(len("selection"), *(len(line.name) for line in lines))
    widths = [max(len(head), 13) for head in heads]
    num_seeds = max(cell.num_seeds for line in lines for cell in line.cells.values())
    learner = "linear probe of the embeddings" if results.network == LINEAR_PROBE else f"{results.network} from scratch"
    shown = [
        f"{learner}: test accuracy in % by budget (images)"
        + (f", mean ± spread of {num_seeds} seeds" if num_seeds > 1 else ""),
        f"{'selection':<{width}}" + "".join(f"  {head:>{wide}}" for head, wide in zip(heads, widths, strict=True)),
    ]
    for line in lines:
        cells = [_short_cell(line.cells.get(budget)) for budget in counts]
        row = "".join(f"  {cell:>{wide}}" for cell, wide in zip(cells, widths, strict=True))
        shown.append(f"{line.name:<{width}}{row}")
    return shown


def _describe_learning(config: EvaluateRunsConfig) -> str:
    if config.network == LINEAR_PROBE:
        return (
            "A linear probe: logistic regression on the embeddings. The spread is over the selections of methods that "
            f"select anew for each of {config.num_seeds} seeds."
        )
    return (
        f"{config.network}, {config.iterations:,} steps of {config.batch_size} at every budget, {config.num_seeds} "
        "seeds. Measured: the last accuracy, mean ± standard deviation over seeds, and in brackets the mean of the "
        "best over training."
    )


def _describe_clustering(clustering: ClusteringQuality, of_run: str) -> str:
    return (
        f"pseudo-labels{of_run}: {clustering.accuracy:.1%} right when clusters and classes are matched one to one, "
        f"purity {clustering.purity:.1%}, NMI {clustering.nmi:.3f}, ARI {clustering.ari:.3f} "
        f"({clustering.num_clusters} clusters, {clustering.num_classes} classes)"
    )


def _describe_embeddings(vote: NeighborVote, of_run: str) -> str:
    return (
        f"embeddings{of_run}: {vote.accuracy:.1%} of {vote.num_queries:,} samples have the class that most of their "
        f"{vote.num_neighbors} nearest neighbours have"
    )


def _describe_leaks(leaks: Leaks) -> str:
    such = f", such as {leaks.examples[0][0]} of {leaks.examples[0][1]}" if leaks.examples else ""
    return (
        f"leaks: {leaks.num_leaking:,} of {leaks.num_tested:,} test images are near-duplicates of images in the pool "
        f"(similarity of {leaks.threshold} or more){such}"
    )


def _quality_table(quality: Mapping[str, Quality]) -> str:
    rows = []
    for name, of_run in quality.items():
        cells = ["–"] * 5
        if made := of_run.clustering:
            shares = (made.accuracy, made.purity, made.nmi, made.ari)
            cells = [f"{made.num_clusters}", *(f"{100 * share:.1f}" for share in shares)]
        rows.append([name, *cells, f"{100 * of_run.neighbors.accuracy:.1f}"])
    num_neighbors = max(of_run.neighbors.num_neighbors for of_run in quality.values())
    head = ["pseudo-labels, %", "clusters", "right", "purity", "NMI", "ARI", f"{num_neighbors}-NN of the embeddings"]
    return _table(head, rows)


def _headings(budgets: Sequence[str], workload: Workload) -> list[str]:
    num_samples = workload.sources[0].num_samples
    counts = [*workload.counts, *[num_samples] * (len(budgets) - len(workload.counts))]
    return [f"{100 * count / num_samples:.3g}% ({count:,})" for count in counts]


def _measured_rows(config: EvaluateRunsConfig, lines: Sequence[Line], budgets: Sequence[str]) -> list[list[str]]:
    def shown(cell: Accuracy | None) -> str:
        if cell is None or config.network == LINEAR_PROBE:  # a probe is tested once
            return _short_cell(cell)
        return f"{_short_cell(cell)} ({100 * cell.best_mean:.1f})"

    return [[line.name, *(shown(line.cells.get(budget)) for budget in budgets)] for line in lines]


def _published_rows(config: EvaluateRunsConfig, workload: Workload, budgets: Sequence[str]) -> list[list[str]]:
    """Return a row for each method with a published number at one of the budgets."""
    num_samples = workload.sources[0].num_samples
    shares = [count / num_samples for count in workload.counts]
    shares += [1.0] * (len(budgets) - len(shares))
    rows = []
    for name, numbers in (PUBLISHED[config.published] if config.published else {}).items():
        cells = [_published_cell(numbers, share) for share in shares]
        if any(cell != "–" for cell in cells):
            rows.append([f"{name}, published", *cells])
    return rows


def _published_cell(numbers: Mapping[float, float], share: float) -> str:
    # Not exactly equal: budgets can be counts, and fractions of the pool are rounded down to whole samples.
    near = [value for kept, value in numbers.items() if abs(kept - share) < 0.005]
    return f"{near[0]:.1f}" if near else "–"


def _short_cell(cell: Accuracy | None) -> str:
    if cell is None:
        return "–"
    # One selection for all seeds gives a probe one result, which has no spread.
    spread = f" ± {100 * cell.spread:.1f}" if cell.spread > 0 else ""
    return f"{100 * cell.mean:.1f}{spread}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
