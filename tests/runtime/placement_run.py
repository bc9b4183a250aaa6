"""Run the stages on a cluster whose nodes have labels; print on which nodes each stage ran, as JSON.

python tests/runtime/placement_run.py FOLDER
"""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_tasks

from elfs_ray.config import load_config
from elfs_ray.pipeline import runner
from elfs_ray.presets import preset
from tests.tables import digit_images, png

NODE = {"num_cpus": 3, "object_store_memory": 200 << 20}


def main(folder: Path) -> None:
    (folder / "pool").mkdir()
    for number, image in enumerate(digit_images(200)[0]):
        (folder / "pool" / f"{number:03d}.png").write_bytes(png(image))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": True})
    nodes = {zone: cluster.add_node(**NODE, labels={"zone": zone}) for zone in ("a", "b")}
    zones = {node.node_id: zone for zone, node in nodes.items()}
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        places, seen = {}, set()
        for stage in ("index", "embed", "cluster", "train", "select"):
            runner.run(_config(folder, stage))
            ran = _ran_on(seen)
            places[stage] = sorted({zones.get(node, "head") for node in ran})
        print(json.dumps(places))
    finally:
        ray.shutdown()
        cluster.shutdown()


def _config(folder: Path, until: str):
    return load_config(
        preset("cifar10"),
        [
            *(f"pool.uri={folder / 'pool'}", f"run_dir={folder / 'run'}", f"until={until}", "budget=0.25"),
            *("embed.encoder=pixels", "embed.image_size=8", "embed.proxy_image_size=8", "embed.num_workers=1"),
            *("cluster.method=kmeans", "cluster.num_clusters=10", "cluster.num_workers=1", "train.network=small_cnn"),
            *("train.epochs=1", "train.batch_size=64", "train.augmentation=crop", "train.crop_padding=1"),
            *("train.num_workers=2", "train.cpus_per_worker=1", "select.method=double_end", "select.hard_fraction=0.2"),
            *("label_selector=zone=a", "train.label_selector=zone=b"),
        ],
    )


def _ran_on(seen: set[str]) -> set[str]:
    """Return the nodes of the tasks and actors with CPUs that were not seen yet, and remember them.

    Without CPUs are Ray's own actors, and the one that shows the progress.
    """
    tasks = [(task.task_id, task) for task in list_tasks(detail=True, limit=10_000)]
    actors = [(actor.actor_id, actor) for actor in list_actors(detail=True, limit=10_000)]
    nodes = set()
    for name, each in [*tasks, *actors]:
        has_cpus = any(resource.startswith("CPU") for resource in each.required_resources or {})
        if has_cpus and each.node_id and name not in seen:
            seen.add(name)
            nodes.add(each.node_id)
    return nodes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
