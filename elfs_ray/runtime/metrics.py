"""Report a run to Ray's metrics, for Prometheus and the dashboard in cluster_configs/grafana-dashboard.json.

Ray puts ray_ before each name and exports the metrics on every node. The driver reports the progress of every stage;
the first worker of a training adds the metrics of each epoch that its stage names (Stage.epoch_gauges).
"""

from collections.abc import Mapping
from functools import lru_cache

import ray
from ray.util.metrics import Gauge

# Name: (description, labels).
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "elfs_running": ("1 while the stage runs, else 0", ("stage",)),
    "elfs_done": ("units of work that the stage has done", ("stage", "unit")),
    "elfs_total": ("units of work that the stage has in all", ("stage", "unit")),
    "elfs_per_s": ("units of work a second, since the stage's first progress", ("stage", "unit")),
    "elfs_rejected": ("images that could not be used", ()),
}


def epoch_gauge(stage: str, metric: str) -> str:
    """Return the name of the gauge for a metric of each epoch."""
    return f"elfs_{stage}_{metric}"


# Cached, because Ray must see one gauge for each name in a process, not one for each report.
@lru_cache
def _gauge(name: str) -> Gauge:
    meaning, labels = GAUGES[name]
    return Gauge(name, description=meaning, tag_keys=labels)


@lru_cache
def _epoch_gauge(name: str, meaning: str) -> Gauge:
    return Gauge(name, description=meaning)


def report_progress(stage: str, unit: str, done: int, total: int, per_s: float, running: bool) -> None:
    """Set the gauges of a stage's progress."""
    labels = {"stage": stage, "unit": unit}
    _gauge("elfs_running").set(int(running), {"stage": stage})
    _gauge("elfs_done").set(done, labels)
    _gauge("elfs_total").set(total, labels)
    _gauge("elfs_per_s").set(per_s, labels)


def report_rejected(count: int) -> None:
    """Set the number of images that could not be used; do nothing without Ray."""
    if ray.is_initialized():
        _gauge("elfs_rejected").set(count)


def report_epoch(stage: str, meanings: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    """Set the gauges of an epoch of a stage, one for each metric in `meanings`; do nothing without Ray."""
    if not ray.is_initialized():
        return
    for metric, meaning in meanings.items():
        _epoch_gauge(epoch_gauge(stage, metric), meaning).set(metrics[metric])
