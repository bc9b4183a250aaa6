"""What a run reports to Ray's metrics, for Prometheus and the dashboard of cluster_configs/grafana-dashboard.json.

Ray puts ray_ before each name and exports it on every node. The driver reports what every stage's progress says; the
first worker of train and pretrain adds what an epoch came to.
"""

from functools import lru_cache

from ray.util.metrics import Gauge

# Name, meaning, labels.
_PROGRESS = {
    "elfs_running": ("1 while the stage runs, else 0", ("stage",)),
    "elfs_done": ("what the stage has done, in its unit", ("stage", "unit")),
    "elfs_total": ("what the stage has to do, in its unit", ("stage", "unit")),
    "elfs_per_s": ("done a second since the stage's first progress", ("stage", "unit")),
    "elfs_rejected": ("images that could not be used", ()),
}
_TRAIN = {
    "elfs_train_epoch": ("proxy training's last epoch, from 0", ()),
    "elfs_train_loss": ("mean loss of that epoch", ()),
    "elfs_train_accuracy": ("share of pseudo-labels predicted in that epoch", ()),
    "elfs_train_images_per_s": ("images a second of that epoch, over all workers", ()),
    "elfs_train_data_wait_share": ("share of that epoch spent waiting for images", ()),
    "elfs_train_recorder_share": ("share of that epoch spent recording", ()),
}
_PRETRAIN = {
    "elfs_pretrain_epoch": ("pretraining's last epoch, from 0", ()),
    "elfs_pretrain_loss": ("mean loss of that epoch", ()),
    "elfs_pretrain_spread": ("spread of the features of that epoch", ()),
    "elfs_pretrain_effective_rank": ("effective rank of the features of that epoch", ()),
    "elfs_pretrain_images_per_s": ("images a second of that epoch, over all workers", ()),
    "elfs_pretrain_data_wait_share": ("share of that epoch spent waiting for images", ()),
}
GAUGES = {**_PROGRESS, **_TRAIN, **_PRETRAIN}


@lru_cache
def _gauge(name: str) -> Gauge:
    meaning, labels = GAUGES[name]
    return Gauge(name, description=meaning, tag_keys=labels)


def report_progress(stage: str, unit: str, done: int, total: int, per_s: float, running: bool) -> None:
    """Set the gauges of a stage's progress."""
    labels = {"stage": stage, "unit": unit}
    _gauge("elfs_running").set(int(running), {"stage": stage})
    _gauge("elfs_done").set(done, labels)
    _gauge("elfs_total").set(total, labels)
    _gauge("elfs_per_s").set(per_s, labels)


def report_rejected(count: int) -> None:
    """Set the number of images that could not be used."""
    _gauge("elfs_rejected").set(count)


def report_epoch(stage: str, figures: dict[str, float]) -> None:
    """Set the gauges of an epoch of stage train or pretrain; figures that have none are passed over."""
    for name in _TRAIN if stage == "train" else _PRETRAIN:
        _gauge(name).set(figures[name.removeprefix(f"elfs_{stage}_")])
