"""Train TEMI deep clustering in a group of workers: heads learn to put a sample and its neighbours into one cluster.

Reads   embeddings/, neighbors/
Writes  cluster/labels/ (of the best head), cluster/temi/ (checkpoints, and the losses of every epoch)

Embeddings and neighbours are joined once into the object store, where the workers of a node share one copy. The head
with the lowest training loss in the last epoch gives the labels; no true label is used. A lost worker costs one epoch,
or the epochs of the last minute.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from elfs_ray.config import PCA_SAMPLES, Config, TemiConfig, check_temi_workers
from elfs_ray.methods.clustering_metrics import head_agreement
from elfs_ray.methods.numeric.hashing import hash_uint64
from elfs_ray.methods.numeric.pca import fit_pca, project
from elfs_ray.methods.numeric.precision import AUTOCAST_DTYPES, resolve_precision
from elfs_ray.methods.temi.heads import CPU_PROFILE, TemiSettings, batch_factor, cap_samples_seen, enlarge_batch
from elfs_ray.methods.temi.training import (
    TemiTrainer,
    check_clustering_collapse,
    pick_head,
    steps_per_epoch,
    train_epoch,
)
from elfs_ray.runtime.cluster import devices_of_cluster
from elfs_ray.runtime.progress import Progress
from elfs_ray.runtime.remote_progress import remote_progress
from elfs_ray.runtime.tasks import get_result, start_task
from elfs_ray.stages.cluster import request_temi_workers
from elfs_ray.stages.cluster.shards import write_label_file
from elfs_ray.stages.training.checkpoints import CheckpointReporter, load_checkpoint
from elfs_ray.stages.training.group_member import GroupMember
from elfs_ray.stages.training.notice import LeftOnNotice, Notice
from elfs_ray.stages.training.shared_data import share
from elfs_ray.stages.training.worker_group import WorkerGroup, run_workers
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

CHECKPOINTS_DIR = "temi"
RESULT_FILE = "result.json"
AGREEMENT_SAMPLES = 20_000
ASSIGN_ROWS = 8192  # bounds the memory of the logits of all heads
_PCA_STREAM = 0x706361  # keeps these random numbers apart from others of the same seed


@dataclass(frozen=True)
class _Job:
    """The inputs of every worker. `data` refers to (sample_ids, embeddings (n, d), neighbours as positions (n, k))."""

    settings: TemiSettings
    precision: str
    seed: int
    run_dir: RunDir
    data: list[Any]
    board: Any


def temi_settings(config: TemiConfig, num_clusters: int, num_samples: int, num_workers: int) -> TemiSettings:
    """Return the hyperparameters: those of the config, else of the profile, else of the paper.

    For a pool smaller than a batch, the batch is the largest that the workers can share evenly, and the profile's
    projection has no more components than the samples span. A pool larger than ImageNet has a larger batch and fewer
    epochs, unless the config sets them. Raises ConfigError for a batch that the workers cannot share evenly.
    """
    profile = CPU_PROFILE if config.profile == "cpu" else {}
    names = {spec.name for spec in dataclasses.fields(TemiSettings)} - {"num_clusters"}
    from_config = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    chosen = {**profile, **from_config}
    if "pca_dim" in profile and config.pca_dim is None:
        chosen["pca_dim"] = min(chosen["pca_dim"], num_samples - 1)
    chosen["pca_dim"] = chosen.get("pca_dim") or None  # 0 is the config's word for no projection
    settings = TemiSettings(num_clusters=num_clusters, **chosen)
    check_temi_workers(settings.batch_size, num_workers)
    if config.batch_size is None:
        moments = {name: chosen[name] for name in ("teacher_momentum", "marginal_momentum") if name in from_config}
        settings = dataclasses.replace(enlarge_batch(settings, batch_factor(num_samples)), **moments)
    if config.num_epochs is None and config.num_warmup_epochs is None:  # which are numbers of the same epochs
        settings = cap_samples_seen(settings, num_samples)
    largest = max(1, num_samples // num_workers) * num_workers
    return dataclasses.replace(settings, batch_size=min(settings.batch_size, largest))


def run_temi(config: Config, run_dir: RunDir, num_clusters: int, num_samples: int) -> dict[str, Any]:
    """Train the heads and write the labels of the best one. Returns the losses and the agreement of the heads.

    Raises ClusteringCollapseError if nearly all samples end in one cluster, RuntimeError if training gives up.
    """
    temi = config.cluster.temi
    request = request_temi_workers(config.cluster, devices_of_cluster())
    settings = temi_settings(temi, num_clusters, num_samples, request.most)
    total = settings.num_epochs * steps_per_epoch(num_samples, settings)
    with Progress("cluster", total, "TEMI steps") as progress, remote_progress(progress) as board:

        def make_job() -> _Job:
            data = _load(run_dir, settings.pca_dim, config.seed)
            return _Job(settings, temi.precision, config.seed, run_dir, [data], board)

        group = WorkerGroup(
            folder=run_dir.path("cluster"), name=CHECKPOINTS_DIR, request=request, max_failures=temi.max_failures
        )
        run_workers(group, _train_heads, make_job)
    metrics = json.loads(filesystem.read_bytes(run_dir.path("cluster", CHECKPOINTS_DIR, RESULT_FILE)))
    check_clustering_collapse(np.array(metrics["sizes"]))
    return metrics


def _load(run_dir: RunDir, pca_dim: int | None, seed: int) -> Any:
    """Join embeddings/ (projected to `pca_dim`) and neighbors/ into one object. Returns its reference.

    Memory of the object store: 2·d + 4·k bytes a sample; 1.28M samples of 768 dimensions with 50 neighbours take 2.2
    GB.
    """
    names = [filesystem.basename(path) for path in run_dir.table_files(schema.EMBEDDINGS)]
    parts = [start_task(_read_file, run_dir, name) for name in names]
    return share(_join, pca_dim, seed, *parts)


def _read_file(run_dir: RunDir, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    embedded = filesystem.read_table(run_dir.path(schema.EMBEDDINGS, name))
    neighbors = filesystem.read_table(run_dir.path(schema.NEIGHBORS, name), [schema.NEIGHBOR_IDS])
    sample_ids = embedded[schema.SAMPLE_ID].to_numpy()
    return sample_ids, schema.matrix_of(embedded, schema.EMBEDDING), schema.matrix_of(neighbors, schema.NEIGHBOR_IDS)


def _join(
    pca_dim: int | None, seed: int, *parts: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sample_ids = np.concatenate([part[0] for part in parts])
    neighbors = np.concatenate([np.searchsorted(sample_ids, part[2]).astype(np.int32) for part in parts])
    if pca_dim is None or pca_dim >= parts[0][1].shape[1]:
        return sample_ids, np.concatenate([part[1] for part in parts]), neighbors
    embeddings = np.concatenate([part[1] for part in parts])
    # The samples with the smallest hashes: the same ones however the files are divided.
    sample = np.sort(np.argsort(hash_uint64(seed, _PCA_STREAM, sample_ids), kind="stable")[:PCA_SAMPLES])
    mean, components = fit_pca(embeddings[sample].astype(np.float32), pca_dim)
    return sample_ids, np.concatenate([project(part[1], mean, components) for part in parts]), neighbors


def _train_heads(job: _Job) -> None:
    """Train the epochs that are left, as one worker of the group; rank 0 then writes the result."""
    member = GroupMember.current()
    sample_ids, embeddings, neighbors = get_result(job.data[0])
    num_steps = steps_per_epoch(len(embeddings), job.settings)
    trainer = TemiTrainer(
        job.settings,
        embeddings.shape[1],
        num_steps,
        job.seed,
        device=member.device,
        autocast_dtype=AUTOCAST_DTYPES[resolve_precision(job.precision, member.device)],
        process_group=member.process_group,
    )
    # Copied, because memory of the object store is read-only and torch warns of it.
    rows = torch.from_numpy(embeddings.copy()).to(member.device) if member.device.type == "cuda" else embeddings
    first_epoch, losses = _load_checkpoint(job, trainer, member)
    checkpoints, notice = CheckpointReporter(_checkpoints(job), member), Notice(member)
    for epoch in range(first_epoch, job.settings.num_epochs):
        losses.append(train_epoch(trainer, rows, neighbors, job.seed, epoch).tolist())
        if member.rank == 0:
            note = f"epoch {epoch + 1}/{job.settings.num_epochs}, lowest head loss {min(losses[-1]):.4f}"
            job.board.write.remote((epoch + 1) * num_steps, note)
        is_last = epoch == job.settings.num_epochs - 1
        leaves = notice.is_here() and not is_last
        checkpoints.end_epoch(
            {"epoch": epoch},
            lambda: {"trainer": trainer.state_dict(), "losses": losses},
            is_last=is_last or leaves,
        )
        if leaves:
            raise LeftOnNotice
    if member.rank == 0:
        _write_result(job, trainer, sample_ids, embeddings, losses)


def _checkpoints(job: _Job) -> str:
    return job.run_dir.path("cluster", CHECKPOINTS_DIR)


def _load_checkpoint(job: _Job, trainer: TemiTrainer, member: GroupMember) -> tuple[int, list[list[float]]]:
    """Restore the last checkpoint, if there is one. Returns the next epoch and the losses of the epochs before it."""
    state = load_checkpoint(_checkpoints(job), member)
    if state is None:
        return 0, []
    trainer.load_state_dict(state["trainer"])
    return len(state["losses"]), state["losses"]


def _write_result(
    job: _Job, trainer: TemiTrainer, sample_ids: np.ndarray, embeddings: np.ndarray, losses: list[list[float]]
) -> None:
    """Label every sample by the teacher of the best head; write the labels and the agreement of the heads."""
    head = pick_head(np.array(losses[-1]))
    assign = partial(_assign, trainer, embeddings)
    labels = assign(np.arange(len(embeddings)), head)
    for path in job.run_dir.table_files(schema.EMBEDDINGS):
        ids = filesystem.read_table(path, [schema.SAMPLE_ID])[schema.SAMPLE_ID].to_numpy()
        write_label_file(job.run_dir, filesystem.basename(path), ids, labels[np.searchsorted(sample_ids, ids)])
    sample = np.linspace(0, len(embeddings) - 1, min(AGREEMENT_SAMPLES, len(embeddings))).astype(np.int64)
    agreement = head_agreement(assign(sample, None), head, job.settings.num_clusters)
    result = {
        "settings": dataclasses.asdict(job.settings),
        "head": head,
        "head_losses": losses[-1],
        "loss_history": [min(epoch_losses) for epoch_losses in losses],
        "head_agreement": agreement.tolist(),
        "sizes": np.bincount(labels, minlength=job.settings.num_clusters).tolist(),
    }
    path = job.run_dir.path("cluster", CHECKPOINTS_DIR, RESULT_FILE)
    filesystem.write_bytes(path, json.dumps(result).encode())


def _assign(trainer: TemiTrainer, embeddings: np.ndarray, rows: np.ndarray, head: int | None) -> np.ndarray:
    """Return the labels that one head gives to some rows, (n,), or those of all heads, (H, n)."""
    starts = range(0, len(rows), ASSIGN_ROWS)
    parts = [trainer.assign(torch.from_numpy(embeddings[rows[s : s + ASSIGN_ROWS]]), head).cpu() for s in starts]
    return torch.cat(parts, dim=-1).numpy()
