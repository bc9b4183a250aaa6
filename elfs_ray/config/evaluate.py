"""evaluate.*: what a coreset is worth."""

from dataclasses import dataclass

from elfs_ray.config.declaration import BATCH, POSITIVE, Bounds, option


@dataclass
class EvaluateConfig:
    """Training from scratch with true labels, on the coreset and on random samples; other keys are those of train."""

    test_uri: str | None = option(
        None, "labelled images to test on, stored as the pool is; never seen by a selection", is_path=True
    )
    network: str = option("resnet18", "resnet18 (3x3 stem), resnet34, resnet50, small_cnn")
    iterations: int = option(40_000, "steps of every training, whatever the budget", unit="steps", bounds=POSITIVE)
    batch_size: int = option(256, "images a step", unit="images", bounds=BATCH)
    lr: float = option(0.1, "SGD learning rate at the start", bounds=Bounds(above=0))
    num_seeds: int = option(3, "trainings of each selection; each seed draws other random samples", bounds=POSITIVE)
