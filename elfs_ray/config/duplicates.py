"""Keys of section duplicates: which images count as copies of one another."""

from dataclasses import dataclass

from elfs_ray.config.declaration import Bounds, option

DUPLICATE_NEIGHBORS = 8
"""Nearest neighbours of each image among which its near-duplicates are, where the run needs neighbours for no more."""
MEASURED_ENCODER = "efficientnet_lite0"
"""The encoder for which the threshold of the preset photos was measured."""


@dataclass
class DuplicatesConfig:
    """Near-duplicates: images whose embeddings are so similar that one of them stands for all."""

    threshold: float | None = option(
        None,
        "images at least so similar (cosine of their embeddings) are near-duplicates, of which one may be chosen; 0.93 "
        "suits efficientnet_lite0, for other encoders look at duplicates/; null looks for none",
        unit="similarity",
        bounds=Bounds(at_least=0.5, at_most=1),
    )
