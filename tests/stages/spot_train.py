"""Train on a node that a cloud takes away; print what was trained twice, as JSON.

    python tests/stages/spot_train.py train|pretrain noticed|unnoticed FOLDER

The stage runs into FOLDER/undisturbed. It then runs into FOLDER/spot: within the second epoch, the node of all workers
gets a notice of NOTICE_S seconds, another node is added, and the first node is killed when the time is up. Unnoticed,
it is killed at once, and with it what the workers have read. The workers hold all CPUs of a node.
"""

import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from elfs_ray.pipeline import runner
from elfs_ray.stages.pretrain import run as pretrain
from elfs_ray.stages.pretrain.worker import PretrainJob, PretrainWorker
from elfs_ray.stages.train import run as train
from elfs_ray.stages.train.worker import ProxyTrainingJob, ProxyTrainingWorker
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digit_images, digits_config, png, write_clustered

NUM_SAMPLES, BATCH = {"train": 1003, "pretrain": 600}, {"train": 10, "pretrain": 40}
STEP_S = {"train": 0.1, "pretrain": 0.5}  # of sleep, so that an epoch takes as long on a fast machine
NOTICE_S = 15
NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}


def main(stage: str, kind: str, folder: Path) -> None:
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1"  # tests switch it off
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    spot = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        run = partial(
            {"train": _train, "pretrain": _pretrain}[stage], max_failures={"noticed": 0, "unnoticed": 3}[kind]
        )
        run(folder / "undisturbed", 0.0)
        # Ray starts nodes from the main thread only.
        training = ThreadPoolExecutor().submit(run, folder / "spot", STEP_S[stage])
        _wait_for_step(folder / "spot", NUM_SAMPLES[stage] // BATCH[stage] * 4 // 3, training)
        drained_s = time.time()
        if kind == "noticed":
            _give_notice(cluster.address, spot.node_id)
            cluster.add_node(**NODE)
            while time.time() < drained_s + NOTICE_S and not training.done():
                time.sleep(0.1)
        cluster.remove_node(spot, allow_graceful=False)
        if kind == "unnoticed":
            cluster.add_node(**NODE)
        training.result()
        print(json.dumps(_repeated(folder / "spot", drained_s)))
    finally:
        ray.shutdown()
        cluster.shutdown()


def _train(folder: Path, step_s: float, max_failures: int) -> None:
    write_clustered(RunDir(str(folder)), NUM_SAMPLES["train"])
    config = digits_config(
        folder,
        "train.num_workers=2",
        "train.cpus_per_worker=1",
        "train.epochs=3",
        f"train.batch_size={BATCH['train']}",
        f"train.max_failures={max_failures}",
    )
    train.train_proxy = partial(_train_and_log, folder=folder, step_s=step_s)
    train.run_train(config, RunDir(str(folder)))


def _train_and_log(job: ProxyTrainingJob, folder: Path, step_s: float) -> None:
    """Train as the stage does; rank 0 writes a line for each step."""
    training = ProxyTrainingWorker(job)
    rate_of = training._learning_rate

    def rate_and_log(step: int) -> float:
        if training.member.rank == 0:
            _log(folder, step, step_s)
        return rate_of(step)

    training._learning_rate = rate_and_log
    training.train()


def _pretrain(folder: Path, step_s: float, max_failures: int) -> None:
    (folder / "pool").mkdir(parents=True)
    for number, image in enumerate(digit_images(NUM_SAMPLES["pretrain"])[0]):
        (folder / "pool" / f"{number:03d}.png").write_bytes(png(image))
    config = digits_config(
        folder / "run",
        *(f"pool.uri={folder / 'pool'}", "until=pretrain", "embed.encoder=self_supervised"),
        *("embed.proxy_image_size=16", "pretrain.profile=cpu", "pretrain.epochs=3", "pretrain.cpus_per_worker=1"),
        *(f"pretrain.batch_size={BATCH['pretrain']}", "pretrain.lr=0.1", f"pretrain.max_failures={max_failures}"),
    )
    pretrain.pretrain_worker = partial(_pretrain_and_log, folder=folder, step_s=step_s)
    runner.run(config)


def _pretrain_and_log(job: PretrainJob, folder: Path, step_s: float) -> None:
    """Pretrain as the stage does; write a line for each step."""
    training = PretrainWorker(job)
    rate_of = training.trainer.learning_rate

    def rate_and_log(epoch: int, step: int) -> float:
        _log(folder, epoch * training.plan.num_steps + step, step_s)
        return rate_of(epoch, step)

    training.trainer.learning_rate = rate_and_log
    training.train()


def _log(folder: Path, step: int, step_s: float) -> None:
    """Write a step, counted over all epochs, and the time; sleep before."""
    time.sleep(step_s)
    with Path(folder, "steps.txt").open("a") as file:
        file.write(f"{step} {time.time()}\n")


def _steps(folder: Path) -> list[tuple[int, float]]:
    log = folder / "steps.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines if line.count(" ") == 1]


def _wait_for_step(folder: Path, step: int, training: Future) -> None:
    while not any(number >= step for number, _ in _steps(folder)):
        assert not training.done(), training.result()
        time.sleep(0.05)


def _give_notice(address: str, node_id: str) -> None:
    """Do what `ray drain-node` does."""
    accepted, reason = ray._raylet.GcsClient(address=address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a spot node is about to be taken away",
        int(time.time() * 1000) + NOTICE_S * 1000,
    )
    assert accepted, reason


def _repeated(folder: Path, drained_s: float) -> dict[str, float]:
    """Return how much was trained twice, and for how long no step was taken after the notice."""
    steps = _steps(folder)
    took_s: dict[int, float] = {}
    again = []
    for (_, before), (number, after) in pairwise(steps):
        again += [number] if number in took_s else []
        took_s.setdefault(number, after - before)
    pause_s, left_s = max((after - before, before) for (_, before), (_, after) in pairwise(steps))
    return {
        "steps": len({number for number, _ in steps}),
        "repeated_steps": len(again),
        "repeated_s": round(sum(took_s[number] for number in again), 1),
        "left_after_s": round(left_s - drained_s, 1),
        "pause_s": round(pause_s, 1),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
