"""faiss is an optional dependency: what does without it runs, and what needs it is refused before any work."""

import os
import subprocess
import sys
from pathlib import Path

import faiss
import pytest
from PIL import Image

from elfs_ray.config import ConfigError
from elfs_ray.methods.numeric.faiss_build import check_faiss, device_of_search
from elfs_ray.runtime.cluster import Devices
from elfs_ray.stages.cluster import STAGE as CLUSTER
from elfs_ray.stages.neighbors import STAGE as NEIGHBORS
from tests.tables import digits_config

CPUS, GPUS = (Devices(8, num_gpus, "in the Ray cluster now", 8) for num_gpus in (0, 1))

# Run by a process in which faiss cannot be imported.
PLAIN_INSTALL = """
import sys
from pathlib import Path
import numpy as np
from elfs_ray.config import ConfigError
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.neighbors.exact import nearest_neighbors
from elfs_ray.pipeline.dry_run import describe_plan, look
import elfs_ray.stages.cluster.run
from tests.tables import digits_config

rows, ids = np.eye(6, dtype=np.float16), np.arange(6)
assert kmeans(ArrayPoints(rows, ids), 6, seed=0).objective == 0

def message(call, *arguments):
    try:
        call(*arguments)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"

print(message(nearest_neighbors, rows, ids, [(rows, ids)], 2))
for overrides in ([], ["cluster.method=temi"], ["cluster.num_neighbors=3"], ["cluster.engine=faiss"]):
    pool = [f"pool.uri={sys.argv[1]}/pool", "budget=0.5", "cluster.num_clusters=2", "cluster.device=cpu"]
    config = digits_config(Path(sys.argv[1]) / "run", *pool, *overrides)
    print(message(lambda: describe_plan(look(config))))
"""


@pytest.mark.slow
def test_a_plain_install_clusters_and_refuses_what_needs_faiss_before_work(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "faiss.py").write_text("raise ImportError('no faiss here')")
    (tmp_path / "pool").mkdir()
    for number in range(20):
        Image.new("L", (8, 8), number).save(tmp_path / "pool" / f"{number}.png")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}{os.pathsep}{Path(__file__).parents[3]}"}
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_INSTALL, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    missing = "needs faiss, which is not installed: pip install 'elfs-ray[cpu]' on every machine"
    assert result.stdout.splitlines() == [
        f"ValueError: the search for neighbours {missing}",
        "accepted",
        f"ConfigError: cluster.method=temi {missing}",
        f"ConfigError: cluster.num_neighbors=3 {missing}",
        f"ConfigError: cluster.engine=faiss {missing}",
    ]


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="the installed faiss is built for GPUs")
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("override", ["cluster.engine=faiss", "cluster.num_neighbors=3", "cluster.method=temi"])
def test_a_gpu_is_refused_to_a_faiss_that_is_built_for_cpus(device, override):
    config = digits_config(Path("/run"), f"cluster.device={device}", override)
    stage = CLUSTER if override == "cluster.engine=faiss" else NEIGHBORS
    with pytest.raises(ConfigError, match=rf"{override} runs on a GPU.*built for CPUs.*elfs-ray\[gpu\]"):
        stage.requests(config, GPUS)


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="the installed faiss is built for GPUs")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_evaluation_on_a_gpu_searches_on_cpus_with_a_faiss_for_those(device):
    check_faiss("an evaluation", device_of_search(device))
    assert device_of_search(device) == "cpu"


def test_a_faiss_for_cpus_serves_cpus_and_the_inverted_file():
    for devices, *overrides in (
        (CPUS, "cluster.engine=faiss", "cluster.num_neighbors=3"),
        (GPUS, "cluster.neighbor_search=ivf", "cluster.num_neighbors=3"),
        (GPUS, "cluster.method=temi", "cluster.num_neighbors=50", "cluster.device=cpu"),
        (GPUS,),
    ):
        config = digits_config(Path("/run"), *overrides)
        assert CLUSTER.requests(config, devices)
        if config.needs_neighbors:
            NEIGHBORS.requests(config, devices)
