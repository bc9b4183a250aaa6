"""The metrics that a run reports to Ray, and the dashboard that shows them."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from elfs_ray.pipeline.stages import STAGES
from elfs_ray.runtime import metrics
from elfs_ray.runtime.progress import Progress, listen

DASHBOARD = Path(__file__).parents[2] / "cluster_configs" / "grafana-dashboard.json"
# Every gauge of a run, with its labels.
GAUGES = {name: labels for name, (_, labels) in metrics.GAUGES.items()} | {
    metrics.epoch_gauge(stage.name, metric): () for stage in STAGES for metric in stage.epoch_gauges
}


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return variables + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_queries_every_metric_and_no_other():
    queried = {name for query in queries() for name in re.findall(r"ray_\w+", query)}
    assert queried == {f"ray_{name}" for name in GAUGES}


def test_the_dashboard_queries_labels_that_the_metrics_have():
    existing = {"SessionName"} | {label for labels in GAUGES.values() for label in labels}
    dashboard = json.loads(DASHBOARD.read_text())
    legends = [target["legendFormat"] for panel in dashboard["panels"] for target in panel["targets"]]
    labels = {label for query in queries() for label in re.findall(r"\{(\w+)=", query)}
    assert labels | {label for legend in legends for label in re.findall(r"\{\{(\w+)\}\}", legend)} <= existing
    assert len({tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]}) == len(
        dashboard["panels"]
    )


@pytest.mark.slow
def test_a_node_exports_the_names_labels_and_values_of_the_dashboard(ray_cluster):
    import ray

    listen(metrics.report_progress)
    metrics.report_rejected(3)
    for stage in STAGES:
        metrics.report_epoch(stage.name, stage.epoch_gauges, dict.fromkeys(stage.epoch_gauges, 0.5))
    with Progress("embed", 200, "images") as progress:
        progress.advance(150)
        exported = ""
        deadline = time.monotonic() + 90
        (node,) = ray.nodes()
        while "ray_elfs_pretrain_epoch" not in exported or "ray_elfs_done{" not in exported:
            assert time.monotonic() < deadline, exported[-2000:]
            time.sleep(1)
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(address, timeout=10) as response:
                exported = response.read().decode()
    labels_of = dict(re.findall(r"^(ray_elfs_\w+)\{(.*)\} \S+$", exported, re.MULTILINE))
    assert set(labels_of) == {f"ray_{name}" for name in GAUGES}
    for name, labels in GAUGES.items():
        assert all(f'{label}="' in labels_of[f"ray_{name}"] for label in (*labels, "SessionName")), labels_of
    assert re.search(r'ray_elfs_total\{.*stage="embed".*\} 200', exported)
    assert re.search(r"ray_elfs_rejected\{.*\} 3", exported)
