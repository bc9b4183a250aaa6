"""Measure how seconds and memory of the stages after embed grow with the pool: 100,000, a million and ten million.

    python benchmarks/scale.py --folder FOLDER [--sizes 100000,1000000] [--parts select,kmeans] [--nodes 2]
    python benchmarks/scale.py --quick

The tables of a pool are made by a generator (helpers/scale_pool.py; 128 dimensions, 10 epochs of dynamics; some 5 GB
for ten million). Each part runs in a process of its own, with Ray on 2 CPUs and an object store of 1 GiB; with
--nodes 2 on two Ray nodes of this machine with a CPU each. The parts:

    select            a tenth of the pool by the AUM of 10 epochs, double-end
    kmeans            10·√(10 n) clusters: 1,000, 3,162 and 10,000; one iteration after the seeding
    near-duplicates   the search of the inverted file for near-duplicates, and their groups
    neighbors         50 neighbours of every sample by the inverted file, of a recall of 95%
    coverage          a hundredth of the pool

FOLDER/results.jsonl gets a line for each measurement: seconds, CPU seconds of all processes, the peak memory of the
driver and of the largest worker, bytes spilled. What has a line is not measured again. At the end come the exponents
of growth from each size to the next, of CPU seconds, which other work on the machine changes little: log(CPU seconds'
ratio) / log(samples' ratio). For kmeans it is that of samples times clusters.
"""

import json
import math
import multiprocessing
import tempfile
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from helpers.processes import Watch
from helpers.reporting import command_line, emit
from helpers.scale_pool import write_pool

from elfs_ray.config import Config, load_config
from elfs_ray.runtime.cluster import connect
from elfs_ray.runtime.tasks import run_tasks
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import Overlay, RunDir

SIZES = (100_000, 1_000_000, 10_000_000)
OBJECT_STORE_BYTES = 1 << 30
NUM_CPUS = 2
MOST_GROWTH = 1.1
STAGES = ("elfs_ray.stages.cluster.run", "elfs_ray.stages.duplicates.run", "elfs_ray.stages.select.run")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--folder", type=Path, help="where pools and results are kept")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas")
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--quick", action="store_true", help="two parts of 2,000 and 20,000; under 45 s on 2 cores")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), [2_000, 20_000], ["select", "near-duplicates"], 1)
    elif arguments.folder is None:
        parser.error("give --folder, where pools and results are kept, or --quick")
    else:
        sizes = sorted(map(int, arguments.sizes.split(",")))
        measure(arguments.folder, sizes, arguments.parts.split(","), arguments.nodes)


def measure(folder: Path, sizes: list[int], parts: list[str], num_nodes: int) -> None:
    """Measure what has no result yet, and print the results and their growth."""
    results = folder / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    for num_samples in sizes:
        for part in parts:
            if _result(results, part, num_samples, num_nodes) is None:
                needs_dynamics = part == "select"
                run_dir = RunDir(folder / str(num_samples))
                write_pool(run_dir, num_samples, dynamics=needs_dynamics, embeddings=not needs_dynamics)
                # In a process of its own, so that no part adds to the driver's peak of another.
                process = context.Process(target=_measure, args=(folder, part, num_samples, num_nodes))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{part} of {num_samples:,} samples failed, see above")
            print(json.dumps(_result(results, part, num_samples, num_nodes)), flush=True)
    for part in parts:
        measured = [_result(results, part, num_samples, num_nodes) for num_samples in sizes]
        for smaller, larger in pairwise(measured):
            assert smaller is not None and larger is not None
            _print_growth(smaller, larger)


def _result(results: Path, part: str, num_samples: int, num_nodes: int) -> dict[str, Any] | None:
    lines = map(json.loads, results.read_text().splitlines()) if results.exists() else []
    key = (part, num_samples, num_nodes)
    return next((line for line in lines if (line["part"], line["samples"], line["nodes"]) == key), None)


def _print_growth(smaller: dict[str, Any], larger: dict[str, Any]) -> None:
    work = math.log(larger["work"] / smaller["work"])
    for measure in ("cpu_s", "seconds", "driver_bytes", "worker_bytes"):
        exponent = math.log(larger[measure] / smaller[measure]) / work
        name = f"{larger['part']}: growth of {measure} from {smaller['samples']:,} to {larger['samples']:,}"
        emit(name, exponent, "exponent", "target", MOST_GROWTH, less_is_better=True)


def _measure(folder: Path, part: str, num_samples: int, num_nodes: int) -> None:
    """Measure a part, and add its line to the results."""
    base, own_folder = RunDir(folder / str(num_samples)), folder / f"{part}-{num_samples}"
    run, tables = PARTS[part]
    filesystem.delete(str(own_folder))  # left by an interrupted measurement
    run_dir = Overlay(own_folder, base, tables)
    _connect(num_nodes)
    # Workers start and import before the measurement: that takes as long for a small pool as for a large one.
    for _ in run_tasks(import_module, [(name,) for name in STAGES] * 2 * NUM_CPUS):
        pass
    with Watch() as watch:
        facts = run(run_dir, num_samples, watch)
    worker, worker_bytes = watch.largest_worker
    line = {
        "part": part,
        "samples": num_samples,
        "nodes": num_nodes,
        "work": num_samples,
        "seconds": round(watch.seconds, 1),
        "cpu_s": round(watch.cpu_seconds, 1),
        "driver_bytes": watch.peaks["driver"],
        "worker_bytes": worker_bytes,
        "worker": worker,
        "all_bytes": watch.peak_bytes,
        "spilled_bytes": _spilled_bytes(),
        **facts,
    }
    with (folder / "results.jsonl").open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    filesystem.delete(str(own_folder))


def _connect(num_nodes: int) -> None:
    if num_nodes == 1:
        connect("local", num_cpus=NUM_CPUS, object_store_memory=OBJECT_STORE_BYTES)
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=True)
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=NUM_CPUS // num_nodes, object_store_memory=OBJECT_STORE_BYTES // num_nodes)
    connect(cluster.address)


def _spilled_bytes() -> int:
    """Return the bytes that all nodes have written from their object stores to disk."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)


def _config(run_dir: Overlay, num_samples: int, *keys: str) -> Config:
    required = ["pool.uri=/pool", f"run_dir={run_dir.uri}", "cluster.method=kmeans", "cluster.num_clusters=1000"]
    return load_config(None, [*required, f"budget={num_samples // 100}", *keys])


def select(run_dir: Overlay, num_samples: int, watch: Watch) -> dict[str, Any]:
    from elfs_ray.stages.select.run import run_select

    keys = ("select.method=double_end", "select.hard_fraction=0.1", f"budget={num_samples // 10}")
    return {"rows": run_select(_config(run_dir, num_samples, *keys), run_dir).rows}


def coverage(run_dir: Overlay, num_samples: int, watch: Watch) -> dict[str, Any]:
    from elfs_ray.stages.select.run import run_select

    result = run_select(_config(run_dir, num_samples, "select.method=coverage"), run_dir)
    return {"rows": result.rows, "coverage": result.coresets["coreset"].coverage}


def kmeans(run_dir: Overlay, num_samples: int, watch: Watch) -> dict[str, Any]:
    from elfs_ray.stages.cluster.run import run_cluster

    num_clusters = round(10**0.5 * num_samples**0.5)
    keys = (f"cluster.num_clusters={num_clusters}", "cluster.num_tries=1", "cluster.max_iterations=1")
    result = run_cluster(_config(run_dir, num_samples, *keys, f"cluster.num_workers={NUM_CPUS}"), run_dir)
    return {"work": num_samples * num_clusters, "clusters": num_clusters, "objective": result.objective}


def neighbors(run_dir: Overlay, num_samples: int, watch: Watch) -> dict[str, Any]:
    return _search(_config(run_dir, num_samples, "cluster.num_neighbors=50", "cluster.neighbor_search=ivf"), run_dir)


def near_duplicates(run_dir: Overlay, num_samples: int, watch: Watch) -> dict[str, Any]:
    from elfs_ray.stages.duplicates.run import run_duplicates

    config = _config(run_dir, num_samples, "duplicates.threshold=0.93", "cluster.neighbor_search=ivf")
    facts = _search(config, run_dir)
    searching_s = watch.cpu_seconds
    result = run_duplicates(config, run_dir)
    return {**facts, "rows": result.rows, "groups_cpu_s": round(watch.cpu_seconds - searching_s, 1)}


def _search(config: Config, run_dir: Overlay) -> dict[str, Any]:
    from elfs_ray.stages.neighbors.run import run_neighbors

    result = run_neighbors(config, run_dir)
    return {"lists": result.num_lists, "nprobe": result.nprobe, "recall": result.recall}


# The parts in their order, the cheapest first, with the tables that each writes.
PARTS: dict[str, tuple[Callable[[Overlay, int, Watch], dict[str, Any]], tuple[str, ...]]] = {
    "select": (select, ("scores", "select", "coreset")),
    "kmeans": (kmeans, ("cluster", "clusters")),
    "near-duplicates": (near_duplicates, ("neighbors", "duplicates")),
    "neighbors": (neighbors, ("neighbors",)),
    "coverage": (coverage, ("select", "coreset")),
}


if __name__ == "__main__":
    main()
