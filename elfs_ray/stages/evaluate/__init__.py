"""evaluate: train on the coreset and on random samples with true labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from elfs_ray.stages.stage import Result, Stage


@dataclass(frozen=True)
class EvaluateResult(Result):
    """The trainings, and what they say of each selection, of the pseudo-labels and of the embeddings."""

    stage: ClassVar[str] = "evaluate"
    rows: int
    test_images: int
    clustering: Mapping[str, Any]
    knn: Mapping[str, Any]
    selections: Mapping[str, Mapping[str, Any]]


STAGE = Stage(
    result=EvaluateResult,
    section="evaluate",
    inputs=lambda config: ("index", "embed", "train", "select"),
    describe=lambda config, num_samples: "train on the coreset and on random samples",
)
