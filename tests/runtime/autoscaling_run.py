"""Run the pipeline on a cluster that begins with only a head and grows by Ray's autoscaler; see test_autoscaling.py.

    python tests/runtime/autoscaling_run.py FOLDER key=value ...

Run it only as root in new process, network and mount namespaces: it uses fixed ports and mounts over a folder of Ray.
Nodes are processes on this machine (provider fake_multinode). The pipeline runs into FOLDER/run, up to embed and then
to its end; a line is printed whenever the number of worker nodes changes.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import ray
from ray.autoscaler._private import fake_multi_node

from elfs_ray.config import ConfigError, load_config
from elfs_ray.pipeline import runner as pipeline
from elfs_ray.presets import preset
from elfs_ray.runtime.cluster import connect, devices_of_cluster

JOB = preset("cifar10")
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
LAUNCHER = {
    "cluster_name": "elfs",
    "max_workers": 2,
    "idle_timeout_minutes": 0.1,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "foreground_node_launch": True,
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {
            "resources": {"CPU": 2, "object_store_memory": 200 << 20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


def add_providers_defaults(folder: Path) -> None:
    """Mount a copy of the provider's folder that has the file of defaults, which Ray's wheel lacks."""
    package = Path(fake_multi_node.__path__[0])
    complete = shutil.copytree(package, folder / "fake_multi_node")
    (complete / "example.yaml").write_text(json.dumps(LAUNCHER))
    subprocess.run(["mount", "--bind", complete, package], check=True)


def start_head(folder: Path) -> None:
    launcher = folder / "launcher.json"
    launcher.write_text(json.dumps(LAUNCHER))
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--num-cpus=0", "--port=6379"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder / 'ray'}", "--object-store-memory=200000000"]
    subprocess.run(
        [*command, f"--autoscaling-config={launcher}"], check=True, env=os.environ | environment, stdout=sys.stderr
    )


def num_workers() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes()) - 1


def watch(stop: threading.Event) -> None:
    """Print the number of worker nodes whenever it changes."""
    last = None
    while not stop.wait(0.2):
        now = num_workers()
        if now != last:
            print(f"workers {now}", flush=True)
        last = now


def wait_until_there_are_none() -> None:
    deadline = time.monotonic() + 120
    while num_workers():
        assert time.monotonic() < deadline, "nodes that are idle were not taken back"
        time.sleep(0.2)
    time.sleep(1)


def main() -> None:
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    add_providers_defaults(folder)
    start_head(folder)
    connect("127.0.0.1:6379")
    print(f"devices {devices_of_cluster().describe()}", flush=True)
    stop = threading.Event()
    threading.Thread(target=watch, args=(stop,), daemon=True).start()
    time.sleep(1)
    run_dir = f"run_dir={folder / 'run'}"
    try:
        pipeline.run(load_config(JOB, [*overrides, run_dir, "embed.num_workers=null"]))
    except ConfigError as error:
        print(f"refused {error}", flush=True)
    pipeline.run(load_config(JOB, [*overrides, run_dir, "until=embed"]))
    print("embedded", flush=True)
    wait_until_there_are_none()
    pipeline.run(load_config(JOB, [*overrides, run_dir]))
    print("finished", flush=True)
    wait_until_there_are_none()
    stop.set()


if __name__ == "__main__":
    main()
