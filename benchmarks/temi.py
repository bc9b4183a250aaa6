"""Measure TEMI's training steps vs. a loop over separate heads and a matrix product, and its memory for each sample.

    python benchmarks/temi.py [--quick]
    python benchmarks/temi.py --batches DATA --embeddings FOLDER

The full size has 50 heads, embeddings of 768 dimensions, 100 clusters and a batch of 1,024, in bfloat16 on a GPU if
there is one. The loop is what one writes first: an nn.ModuleList of heads of standard layers, and the loss of one head
after the other. Both start from the same weights, and their first losses are compared before anything is timed.

With --batches it measures the accuracy of the pseudo-labels by the size of the batch, at as many samples seen, on
10,000 images of MNIST and CIFAR-10 (helpers/pools.py says what DATA holds), with 4 heads of the profile for CPUs. What
is done is kept in FOLDER, so that the same command goes on.
"""

import copy
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from helpers.pools import load_pool
from helpers.reporting import command_line, emit
from torch import Tensor, nn

from elfs_ray.methods.clustering_metrics import contingency_table, matched_accuracy
from elfs_ray.methods.neighbors.exact import nearest_neighbors
from elfs_ray.methods.numeric.pca import fit_pca, project
from elfs_ray.methods.temi.heads import CPU_PROFILE, MAX_BATCH_FACTOR, TemiHeads, TemiSettings, enlarge_batch
from elfs_ray.methods.temi.training import TemiTrainer, pick_head, steps_per_epoch, train_epoch

INPUT_DIM = 768
POOLS, SEEDS = ("mnist", "cifar10"), (0, 1)
VARIANTS = [(1, "as published"), (MAX_BATCH_FACTOR, "linear"), (MAX_BATCH_FACTOR, "sqrt")]


class LoopHead(nn.Module):
    """One of TEMI's heads in standard layers, with the weights of head `h`."""

    def __init__(self, heads: TemiHeads, h: int):
        super().__init__()
        num_clusters, bottleneck_dim = heads.cluster_direction[h].shape
        self.hidden = nn.Linear(INPUT_DIM, heads.hidden_bias.shape[2])
        self.bottleneck = nn.Linear(heads.hidden_bias.shape[2], bottleneck_dim)
        self.clusters = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck_dim, num_clusters, bias=False))
        with torch.no_grad():
            self.hidden.weight.copy_(heads.hidden_weight[h].T)
            self.hidden.bias.zero_()
            self.bottleneck.weight.copy_(heads.bottleneck_weight[h].T)
            self.bottleneck.bias.zero_()
            self.clusters.parametrizations.weight.original0.fill_(1)
            self.clusters.parametrizations.weight.original1.copy_(heads.cluster_direction[h])

    def forward(self, x: Tensor) -> Tensor:
        return self.clusters(F.normalize(self.bottleneck(F.gelu(self.hidden(x * INPUT_DIM**0.5))), dim=-1))


class LoopTrainer:
    """TEMI's training step, one head after the other."""

    def __init__(self, trainer: TemiTrainer, dtype: torch.dtype | None):
        self.settings, self.device, self.dtype = trainer.settings, trainer.device, dtype
        heads = range(self.settings.num_heads)
        self.students = nn.ModuleList(LoopHead(trainer.student, h) for h in heads).to(self.device)
        self.teachers = copy.deepcopy(self.students).requires_grad_(False)
        self.marginals = [torch.full_like(marginal, 1 / len(marginal)) for marginal in trainer.marginal]
        self.optimizer = torch.optim.AdamW(self.students.parameters(), lr=1e-4, weight_decay=1e-4)

    def train_step(self, x: Tensor, x_neighbor: Tensor) -> Tensor:
        s = self.settings
        views = torch.cat([x, x_neighbor])
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            with torch.no_grad():
                teacher_logits = [head(views) for head in self.teachers]
            student_logits = [head(views) for head in self.students]
        teacher_probs = [(z.float() / s.temperature).softmax(dim=-1).chunk(2) for z in teacher_logits]
        weight = sum((a * b).sum(dim=-1) for a, b in teacher_probs) / s.num_heads
        losses = []
        for h, (logits, (t_a, t_b)) in enumerate(zip(student_logits, teacher_probs, strict=True)):
            self.marginals[h] = 0.9 * self.marginals[h] + 0.1 * torch.cat([t_a, t_b]).mean(dim=0)
            s_a, s_b = (logits.float() / s.temperature).softmax(dim=-1).chunk(2)
            # The loss of TEMI is symmetric in the image (a) and its neighbour (b).
            forth = (((s_a * t_b) ** s.beta) / self.marginals[h]).sum(dim=-1).log()
            back = (((s_b * t_a) ** s.beta) / self.marginals[h]).sum(dim=-1).log()
            losses.append(-((weight * forth).mean() + (weight * back).mean()) / 2)
        self.optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(self.teachers.parameters(), self.students.parameters(), strict=True):
                teacher.mul_(s.teacher_momentum).add_(student, alpha=1 - s.teacher_momentum)
        return torch.stack(losses).detach()


def time_s(device: torch.device, call: Callable[[], object], repeats: int) -> float:
    """Return the mean seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def step_flop(settings: TemiSettings) -> int:
    """Return the floating-point operations of a step's matrix products."""
    # A layer has one product forwards and two backwards, but the first layer computes no gradient of its input. The
    # teacher has one more product for each layer.
    first = INPUT_DIM * settings.hidden_dim
    rest = settings.hidden_dim * settings.bottleneck_dim + settings.bottleneck_dim * settings.num_clusters
    return 2 * settings.num_heads * 2 * settings.batch_size * (3 * first + 4 * rest)


def measure_steps(settings: TemiSettings, rounds: int, device: torch.device) -> None:
    """Measure a training step of all heads at once vs. the loop, and as a rate vs. a matrix product."""
    dtype = torch.bfloat16 if device.type == "cuda" else None
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(settings.batch_size, INPUT_DIM, generator=generator), dim=1).to(device)
    x_neighbor = F.normalize(x + 0.03 * torch.randn(x.shape, generator=generator).to(device), dim=1)
    batched = TemiTrainer(settings, INPUT_DIM, num_steps_per_epoch=1, seed=0, device=device, autocast_dtype=dtype)
    loop = LoopTrainer(batched, dtype)
    tolerance = 1e-4 if dtype is None else 1e-2
    torch.testing.assert_close(
        batched.train_step(x, x_neighbor), loop.train_step(x, x_neighbor), rtol=tolerance, atol=tolerance
    )

    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    repeats = 10 if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {"batched": [], "loop": [], "matmul": []}
    for _ in range(rounds):
        seconds["batched"].append(time_s(device, lambda: batched.train_step(x, x_neighbor), repeats))
        seconds["loop"].append(time_s(device, lambda: loop.train_step(x, x_neighbor), repeats))
        seconds["matmul"].append(time_s(device, lambda: a @ a, 10))
    batched_s, loop_s, matmul_s = (statistics.median(seconds[key]) for key in ("batched", "loop", "matmul"))
    shape = f"h{settings.num_heads}_d{INPUT_DIM}_c{settings.num_clusters}_b{settings.batch_size}"
    emit(f"temi_steps_{shape}", 1 / batched_s, "steps/s", "loop over separate heads", 1 / loop_s)
    ceiling = 2 * size**3 / matmul_s / 1e9
    emit(
        f"temi_matmul_rate_{shape}",
        step_flop(settings) / batched_s / 1e9,
        "GFLOP/s",
        f"{size} x {size} matrix product, the peak rate",
        ceiling,
    )


def measure_memory(sizes: tuple[int, int], num_neighbors: int = 50) -> None:
    """Measure the memory that each sample adds, from the peaks of an epoch over memory maps of two pool sizes."""
    settings = TemiSettings(2, num_heads=1, hidden_dim=4, bottleneck_dim=4, num_warmup_epochs=0)
    peaks = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            embeddings = np.memmap(Path(folder) / "embeddings", np.float16, "w+", shape=(n, INPUT_DIM))
            neighbors = np.memmap(Path(folder) / "neighbors", np.int32, "w+", shape=(n, num_neighbors))
            trainer = TemiTrainer(settings, INPUT_DIM, n // settings.batch_size, seed=0)
            tracemalloc.start()
            train_epoch(trainer, embeddings, neighbors, seed=0, epoch=0)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    bytes_per_sample = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    emit(
        f"temi_memory_a_sample_to_n{sizes[1]}",
        bytes_per_sample,
        "bytes",
        "embeddings and neighbours held in memory",
        INPUT_DIM * 2 + num_neighbors * 4,
        less_is_better=True,
    )


def measure_batches(data: Path, folder: Path) -> None:
    """Measure the accuracy of the labels with each batch and rule for the learning rate, for each seed."""
    path = folder / "batches.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for seed, (factor, rule), name in itertools.product(SEEDS, VARIANTS, POOLS):
        key = f"{name} x{factor} {rule} seed {seed}"
        if key not in done:
            done[key] = accuracy_of_batch(*temi_inputs(name, data, folder), factor, rule, seed)
            path.write_text(json.dumps(done, indent=1))
    for name, (factor, rule) in itertools.product(POOLS, VARIANTS):
        mean, published = (
            float(np.mean([done[f"{name} x{f} {r} seed {seed}"][0] for seed in SEEDS]))
            for f, r in ((factor, rule), VARIANTS[0])
        )
        emit(f"temi_accuracy_{name}_x{factor}_{rule}", mean, "share", "the profile's batch", published)


def temi_inputs(name: str, data: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a pool's projected embeddings, the 50 nearest neighbours of each and the classes."""
    pool = load_pool(name, data, folder)
    path = folder / f"{name}-neighbors.npy"
    ids = np.arange(len(pool.embeddings))
    if not path.exists():
        blocks = np.array_split(ids, 10)
        shards = [(pool.embeddings, ids)]
        parts = [nearest_neighbors(pool.embeddings[rows], rows, shards, 50).neighbor_ids for rows in blocks]
        np.save(path, np.concatenate(parts).astype(np.int32))
    mean, components = fit_pca(pool.embeddings.astype(np.float32), CPU_PROFILE["pca_dim"])
    return project(pool.embeddings, mean, components), np.load(path), pool.classes


def accuracy_of_batch(
    x: np.ndarray, neighbors: np.ndarray, classes: np.ndarray, factor: int, rule: str, seed: int
) -> tuple[float, float]:
    """Return the share of images whose matched label is right, by the chosen head, and the mean over all heads."""
    settings = enlarge_batch(TemiSettings(10, **{**CPU_PROFILE, "num_heads": 4}), factor)
    if rule == "sqrt":
        settings = dataclasses.replace(settings, learning_rate=settings.learning_rate / factor**0.5)
    trainer = TemiTrainer(settings, x.shape[1], steps_per_epoch(len(x), settings), seed)
    for epoch in range(settings.num_epochs):
        losses = train_epoch(trainer, x, neighbors, seed, epoch)
    labels = trainer.assign(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    right = [matched_accuracy(contingency_table(of_head, classes, 10, 10)) for of_head in labels]
    return right[pick_head(losses)], float(np.mean(right))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="10 heads, batch 256, 200,000 samples; under 45 s")
    parser.add_argument(
        "--batches", type=Path, metavar="DATA", help="measure accuracy by the size of the batch instead"
    )
    parser.add_argument("--embeddings", type=Path, metavar="FOLDER", help="where --batches keeps what it has done")
    arguments = parser.parse_args()
    if arguments.batches:
        if arguments.embeddings is None:
            parser.error("--batches needs --embeddings FOLDER")
        measure_batches(arguments.batches, arguments.embeddings)
        return
    quick = arguments.quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = (
        TemiSettings(100, num_heads=10, batch_size=256, num_warmup_epochs=0)
        if quick
        else TemiSettings(100, num_warmup_epochs=0)
    )
    measure_steps(settings, rounds=9 if quick else 5, device=device)
    measure_memory((20_000, 200_000) if quick else (100_000, 1_000_000))


if __name__ == "__main__":
    main()
