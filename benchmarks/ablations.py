"""Change one thing at a time to see what the quality of a coreset depends on, in one table with the baselines.

    python benchmarks/ablations.py --data FOLDER [--only fashion_mnist] [--folder runs/scratch_track]
    python benchmarks/ablations.py --quick

FOLDER and --folder are those of scratch_track.py, whose run of a dataset is the base, and is made if it does not exist.
The variants change the encoder, the clustering, the proxy, its epochs, the score or the hard fraction, and leave the
rest as in the base; kmeans_linear and kmeans_30_linear change several. A variant's folder gets the base's stages before
the change, by hard links. Each line of the table is the accuracy of a coreset at the smallest budget of the dataset's
track, over three seeds; Fashion-MNIST's table also has the baselines that its track lacks. The table is
<dataset>-ablated/ablations.txt. Every part is kept, and the same command resumes where it was stopped. --quick takes
1,000 digits and one seed. A line of JSON compares the base with each other line.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.tracks import Track, emit_comparison, run_pipeline, run_sets
from scratch_track import PIXELS, QUICK, TRACKS

from elfs_ray.evaluation import run
from elfs_ray.evaluation.report import Results, closing_lines
from elfs_ray.evaluation.workload import load
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.storage.run_dir import RunDir

TABLE = "ablations.txt"
TRACK_OF = {track.name: track for track in TRACKS}


@dataclass(frozen=True)
class Variant:
    """A run that differs from the base from `first_stage` on."""

    name: str
    first_stage: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Ablation:
    """The base's track, its variants, and the methods of `elfs-ray evaluate` that only select differently."""

    track: Track
    variants: tuple[Variant, ...]
    methods: tuple[str, ...]


LINEAR = Variant("linear", "train", ("train.network=linear",))
KMEANS = Variant("kmeans", "cluster", ("cluster.method=kmeans",))
MORE_CLUSTERS = Variant("30_clusters", "cluster", ("cluster.num_clusters=30",))
KMEANS_LINEAR = Variant("kmeans_linear", "cluster", (*KMEANS.keys, *LINEAR.keys))
KMEANS_30_LINEAR = Variant("kmeans_30_linear", "cluster", (*KMEANS_LINEAR.keys, *MORE_CLUSTERS.keys))
FRACTIONS = tuple(f"elfs+hard_fraction={beta}" for beta in (0, 0.2, 0.4, 0.6))  # 0: the hardest
SCORES = tuple(f"elfs+score={score}" for score in ("el2n", "forgetting"))
OTHER_RIVALS = ("dual", "zcore+zcore_draws=100000", "badge", "aum_ccs", "el2n", "forgetting", "full")
ABLATIONS = (
    Ablation(
        TRACK_OF["fashion_mnist"],
        (
            Variant("pixels", "embed", PIXELS[:2]),
            KMEANS,
            MORE_CLUSTERS,
            Variant("3_epochs", "train", ("train.epochs=3",)),
            LINEAR,
            KMEANS_LINEAR,
            KMEANS_30_LINEAR,
        ),
        (*FRACTIONS, *SCORES, "elfs+balance=true", *OTHER_RIVALS),
    ),
    Ablation(
        TRACK_OF["cifar10"],
        (LINEAR, KMEANS_LINEAR, KMEANS_30_LINEAR),
        ("aum_hardest", "elfs+hard_fraction=0.2", "elfs+hard_fraction=0.6", "elfs+balance=true"),
    ),
)
QUICK_ABLATION = Ablation(QUICK, (LINEAR,), ("elfs+hard_fraction=0.4",))


def ablate(ablation: Ablation, pool: Path, test: Path, folder: Path, seeds: int) -> None:
    """Complete an ablation: the base, the variants, every training, the table."""
    track = ablation.track
    base = folder / track.name
    run_pipeline(track, pool, base)
    runs = [base]
    for variant in ablation.variants:
        runs.append(folder / f"{track.name}-{variant.name}")
        take_over(base, runs[-1], _names_before(variant.first_stage, base))
        run_pipeline(track, pool, runs[-1], variant.keys)
    keys = [f"test_uri={test}", f"budgets=[{track.budgets[0]}]", f"num_seeds={seeds}", *track.evaluation]
    base_methods = ["random", *ablation.methods]  # these only select differently, so the base's run suffices
    parts = []
    for name, judged_runs, methods in (("ablated", runs, ["elfs"]), ("ablated-base", [base], base_methods)):
        out = folder / f"{track.name}-{name}"
        take_over(folder / f"{track.name}-judged", out, ["trials"])  # trainings on random samples and on the base
        places = [f"runs=[{','.join(map(str, judged_runs))}]", f"out={out}", f"methods=[{','.join(methods)}]"]
        parts.append(run.run(load([*places, *keys])))
    lines = tuple(line for part in parts for line in part.lines)
    results = Results(parts[0].network, lines, {**parts[0].quality, **parts[1].quality})
    table = closing_lines(results)
    (folder / f"{track.name}-ablated" / TABLE).write_text(f"{table}\n")
    print(table, file=sys.stderr)
    emit_comparison(track.name, results.lines[0], results.lines[1:], seeds)


def take_over(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy the folders that `target` lacks from `source`, as hard links."""
    # Links are safe: files of a run are replaced, never changed in place.
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_dir() and not (target / name).exists():
            unfinished = target / f".{name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(source / name, unfinished, copy_function=os.link)
            unfinished.rename(target / name)


def _names_before(first_stage: str, base: Path) -> list[str]:
    """Return the folders that the stages before one have left in a run."""
    position = [stage.name for stage in STAGES].index(first_stage)
    markers = [RunDir(base).success_marker(stage.name) for stage in STAGES[:position]]
    return [name for marker in markers if marker for name in (marker.stage, *marker.outputs)]


if __name__ == "__main__":
    run_sets(__doc__, {ablation.track.name: ablation for ablation in ABLATIONS}, QUICK_ABLATION, ablate)
