import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from scipy.stats import chisquare
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from elfs_ray.methods.clustering_metrics import contingency_table, matched_accuracy
from elfs_ray.methods.numeric.pca import fit_pca, project
from elfs_ray.methods.temi import training as temi_training
from elfs_ray.methods.temi.heads import CPU_PROFILE, TemiHeads, TemiSettings
from elfs_ray.methods.temi.loss import cluster_log_probs, pair_weights, temi_loss
from elfs_ray.methods.temi.training import (
    ClusteringCollapseError,
    TemiTrainer,
    check_clustering_collapse,
    epoch_batches,
    pick_head,
    sample_neighbors,
    steps_per_epoch,
    train_epoch,
    update_marginal,
    update_teacher,
)

SMALL = TemiSettings(
    num_clusters=5,
    num_heads=3,
    hidden_dim=16,
    bottleneck_dim=8,
    num_epochs=4,
    num_warmup_epochs=2,
    batch_size=32,
    teacher_momentum=0.9,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def unit_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def toy_pool(n: int = 200, d: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings (n, d) float16 and the neighbours of each, (n, 10) int64."""
    embeddings = unit_rows(n, d).numpy().astype(np.float16)
    return embeddings, nearest_neighbors(embeddings, 10)


def nearest_neighbors(embeddings: np.ndarray, k: int) -> np.ndarray:
    wide = embeddings.astype(np.float64)
    return NearestNeighbors(n_neighbors=k + 1).fit(wide).kneighbors(wide, return_distance=False)[:, 1:]


def plain_losses(
    student_a: Tensor,
    student_b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    marginal: Tensor,
    beta: float,
    tau: float,
) -> Tensor:
    """Compute the losses as the paper prints them, head by head, from (H, b, C) logits."""
    num_heads = len(student_a)
    q_sa, q_sb, q_ta, q_tb = (torch.softmax(z / tau, dim=-1) for z in (student_a, student_b, teacher_a, teacher_b))
    weight = torch.zeros(student_a.shape[1], dtype=student_a.dtype)
    for h in range(num_heads):
        weight += (q_ta[h] * q_tb[h]).sum(dim=-1) / num_heads
    losses = []
    for h in range(num_heads):
        forth = -(weight * torch.log((((q_sa[h] * q_tb[h]) ** beta) / marginal[h]).sum(dim=-1))).mean()
        back = -(weight * torch.log((((q_sb[h] * q_ta[h]) ** beta) / marginal[h]).sum(dim=-1))).mean()
        losses.append((forth + back) / 2)
    return torch.stack(losses)


@pytest.mark.parametrize("num_clusters", [2, 10, 100])
@pytest.mark.parametrize("num_heads", [1, 3, 50])
@pytest.mark.parametrize("batch", [1, 64])
def test_loss_and_gradients_of_all_heads_equal_the_plain_formulas(
    num_clusters: int, num_heads: int, batch: int
) -> None:
    generator = torch.Generator().manual_seed(num_clusters * num_heads + batch)
    logits = [torch.rand(num_heads, batch, num_clusters, generator=generator) * 2 - 1 for _ in range(4)]
    marginal = torch.rand(num_heads, num_clusters, generator=generator) + 0.1
    marginal /= marginal.sum(dim=-1, keepdim=True)
    wide = [z.double().requires_grad_(i < 2) for i, z in enumerate(logits)]
    expected = plain_losses(wide[0], wide[1], wide[2], wide[3], marginal.double(), 0.6, 0.1)
    expected.mean().backward()

    student_a, student_b, teacher_a, teacher_b = (z.clone().requires_grad_() for z in logits)
    teacher_log_probs = cluster_log_probs(torch.stack([teacher_a, teacher_b], dim=1), 0.1)
    losses = temi_loss(
        cluster_log_probs(torch.stack([student_a, student_b], dim=1), 0.1),
        teacher_log_probs,
        marginal,
        pair_weights(teacher_log_probs),
        beta=0.6,
    )
    losses.mean().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    for narrow, reference in zip((student_a, student_b), wide, strict=False):
        assert narrow.grad is not None and reference.grad is not None
        scale = float(reference.grad.abs().max())
        torch.testing.assert_close(narrow.grad.double(), reference.grad, rtol=1e-5, atol=1e-5 * scale)
    assert teacher_a.grad is None and teacher_b.grad is None


def test_the_loss_stays_finite_for_certain_heads_and_a_dead_cluster() -> None:
    logits = torch.full((1, 2, 4, 3), -40.0)
    logits[:, 0, :, 0] = 40.0
    logits[:, 1, :, 1] = 40.0
    student = logits.clone().requires_grad_()
    teacher = cluster_log_probs(logits, 0.1)
    marginal = torch.tensor([[0.5, 0.5, 0.0]])
    loss = temi_loss(cluster_log_probs(student, 0.1), teacher, marginal, pair_weights(teacher), beta=0.6)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert student.grad is not None and torch.isfinite(student.grad).all()


class LoopHead(nn.Module):
    """One head built from torch's own layers, with the parameters of head `h` of a batched module."""

    def __init__(self, heads: TemiHeads, h: int):
        super().__init__()
        _, input_dim, hidden_dim = heads.hidden_weight.shape
        _, num_clusters, bottleneck_dim = heads.cluster_direction.shape
        self.hidden = nn.Linear(input_dim, hidden_dim)
        self.bottleneck = nn.Linear(hidden_dim, bottleneck_dim)
        self.clusters = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck_dim, num_clusters, bias=False))
        with torch.no_grad():
            self.hidden.weight.copy_(heads.hidden_weight[h].T)
            self.hidden.bias.copy_(heads.hidden_bias[h, 0])
            self.bottleneck.weight.copy_(heads.bottleneck_weight[h].T)
            self.bottleneck.bias.copy_(heads.bottleneck_bias[h, 0])
            self.clusters.parametrizations.weight.original0.copy_(heads.cluster_gain[h])
            self.clusters.parametrizations.weight.original1.copy_(heads.cluster_direction[h])

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.hidden(x * x.shape[1] ** 0.5))
        return self.clusters(F.normalize(self.bottleneck(hidden), dim=-1))


def test_batched_heads_equal_separate_heads_of_standard_layers() -> None:
    heads = TemiHeads(12, SMALL, seed=3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    x = unit_rows(9, 12)
    expected = torch.stack([LoopHead(heads, h)(x) for h in range(3)])
    assert heads(x).shape == (3, 9, 5)
    torch.testing.assert_close(heads(x), expected, rtol=1e-5, atol=1e-6)


def test_heads_start_from_a_truncated_normal_and_differ_from_each_other() -> None:
    heads = TemiHeads(64, TemiSettings(10, num_heads=4), seed=0)
    assert heads.hidden_weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(heads.hidden_weight[0], heads.hidden_weight[1])
    assert torch.equal(heads.hidden_weight, TemiHeads(64, TemiSettings(10, num_heads=4), seed=0).hidden_weight)
    assert not torch.equal(heads.hidden_weight, TemiHeads(64, TemiSettings(10, num_heads=4), seed=1).hidden_weight)


@pytest.mark.parametrize("part_bytes", [1, 32 << 10, 1 << 20])  # a head at a time, two, and all three
def test_training_steps_equal_a_plain_loop_over_separate_heads(
    monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(temi_training, "_PART_BYTES", part_bytes)
    embeddings, neighbors = toy_pool()
    trainer = TemiTrainer(SMALL, 12, num_steps_per_epoch=6, seed=5)
    students = nn.ModuleList(LoopHead(trainer.student, h) for h in range(3))
    teachers = copy.deepcopy(students).requires_grad_(False)
    matrices = [p for p in students.parameters() if p.ndim == 2 and p.shape[1] > 1]
    vectors = [p for p in students.parameters() if p.ndim == 1 or p.shape[1] == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": SMALL.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    )
    marginal = torch.full((3, 5), 0.2)
    for step, batch in enumerate(epoch_batches(200, 32, seed=5, epoch=0)):
        partners = sample_neighbors(neighbors, batch, 5, 0)
        a, b = torch.from_numpy(embeddings[batch]).float(), torch.from_numpy(embeddings[partners]).float()
        teacher_a, teacher_b = (torch.stack([head(x) for head in teachers]) for x in (a, b))
        mean = (torch.softmax(teacher_a / 0.1, -1).mean(1) + torch.softmax(teacher_b / 0.1, -1).mean(1)) / 2
        marginal = 0.9 * marginal + 0.1 * mean
        student_a, student_b = (torch.stack([head(x) for head in students]) for x in (a, b))
        losses = plain_losses(student_a, student_b, teacher_a, teacher_b, marginal, 0.6, 0.1)
        optimizer.zero_grad()
        losses.mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * 32 / 256 * min(1.0, (step + 1) / 12)
        optimizer.step()
        with torch.no_grad():
            for t, s in zip(teachers.parameters(), students.parameters(), strict=True):
                t.mul_(0.9).add_(0.1 * s)
        torch.testing.assert_close(trainer.train_step(a, b), losses.detach(), rtol=1e-5, atol=1e-6)
    assert trainer.step == 6
    torch.testing.assert_close(trainer.marginal, marginal, rtol=1e-5, atol=1e-6)
    for h in range(3):
        for mine, reference in ((trainer.student, students), (trainer.teacher, teachers)):
            for p, q in zip(LoopHead(mine, h).parameters(), reference[h].parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_teacher_moves_by_its_momentum() -> None:
    teacher, student = TemiHeads(4, SMALL, seed=0), TemiHeads(4, SMALL, seed=1)
    before = teacher.hidden_weight.clone()
    update_teacher(teacher, student, momentum=0.75)
    torch.testing.assert_close(teacher.hidden_weight, 0.75 * before + 0.25 * student.hidden_weight)


def test_the_marginal_moves_to_the_mean_of_both_views() -> None:
    log_probs = cluster_log_probs(torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(0)), 0.1)
    marginal = torch.full((3, 5), 0.2)
    update_marginal(marginal, log_probs, momentum=0.9)
    expected = 0.9 * 0.2 + 0.1 * (log_probs[:, 0].exp().mean(1) + log_probs[:, 1].exp().mean(1)) / 2
    torch.testing.assert_close(marginal, expected)


def test_the_learning_rate_scales_with_the_batch_and_warms_up() -> None:
    trainer = TemiTrainer(TemiSettings(2, num_heads=1, num_warmup_epochs=2, batch_size=1024), 4, 5, seed=0)
    rates = []
    for trainer.step in (0, 4, 9, 500):
        rates.append(trainer.learning_rate)
    assert rates == pytest.approx([4e-5, 2e-4, 4e-4, 4e-4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_matrix_products_keep_losses_and_gradients(dtype: torch.dtype) -> None:
    a, b = unit_rows(32, 64, 1), unit_rows(32, 64, 2)
    settings = TemiSettings(5, num_heads=50, hidden_dim=16, bottleneck_dim=8, batch_size=32)
    wide = TemiTrainer(settings, 64, 1, seed=0)
    half = TemiTrainer(settings, 64, 1, seed=0, autocast_dtype=dtype)
    torch.testing.assert_close(half.train_step(a, b), wide.train_step(a, b), rtol=0.02, atol=0.02)
    for p, q in zip(half.student.parameters(), wide.student.parameters(), strict=True):
        assert p.dtype == torch.float32 and p.grad is not None and q.grad is not None
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.98


def test_float16_embeddings_train_as_their_float32_values() -> None:
    a, b = unit_rows(32, 12, 1).half(), unit_rows(32, 12, 2).half()
    losses = [TemiTrainer(SMALL, 12, 1, seed=0).train_step(a.to(t), b.to(t)) for t in (torch.float16, torch.float32)]
    assert torch.equal(*losses)


def test_killed_and_resumed_equals_undisturbed_byte_for_byte() -> None:
    embeddings, neighbors = toy_pool()

    def run(trainer: TemiTrainer, epochs: range) -> np.ndarray:
        return [train_epoch(trainer, embeddings, neighbors, 7, epoch) for epoch in epochs][-1]

    undisturbed = TemiTrainer(SMALL, 12, 6, seed=7)
    losses = run(undisturbed, range(4))
    killed = TemiTrainer(SMALL, 12, 6, seed=7)
    run(killed, range(2))
    checkpoint = io.BytesIO()
    torch.save(killed.state_dict(), checkpoint)
    checkpoint.seek(0)
    resumed = TemiTrainer(SMALL, 12, 6, seed=99)
    resumed.load_state_dict(torch.load(checkpoint))
    assert np.array_equal(run(resumed, range(2, 4)), losses)
    assert tensor_bytes(resumed.state_dict()) == tensor_bytes(undisturbed.state_dict())


def tensor_bytes(state: object) -> object:
    """Return the same nested structure with every tensor as its bytes."""
    if isinstance(state, dict):
        return {key: tensor_bytes(value) for key, value in state.items()}
    if isinstance(state, list):
        return [tensor_bytes(value) for value in state]
    return state.numpy().tobytes() if isinstance(state, Tensor) else state


def _train_in_a_group(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    embeddings, neighbors = toy_pool()
    trainer = TemiTrainer(SMALL, 12, 6, seed=1, process_group=dist.group.WORLD)
    losses = train_epoch(trainer, embeddings, neighbors, 1, 0)
    gradients = [p.grad for p in trainer.student.parameters()]
    with pytest.raises(ValueError, match="33 does not split evenly over 2 workers"):
        TemiTrainer(TemiSettings(5, batch_size=33), 12, 6, seed=1, process_group=dist.group.WORLD)
    torch.save({"losses": losses, "gradients": gradients, "state": trainer.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_equal_one_on_the_same_global_batches(tmp_path: Path) -> None:
    mp.spawn(_train_in_a_group, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    embeddings, neighbors = toy_pool()
    alone = TemiTrainer(SMALL, 12, 6, seed=1)
    losses = train_epoch(alone, embeddings, neighbors, 1, 0)
    np.testing.assert_allclose(first["losses"], losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["state"]["marginal"], alone.marginal, rtol=1e-5, atol=1e-6)
    for gradient, parameter in zip(first["gradients"], alone.student.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max()))
    for name, parameter in alone.student.named_parameters():
        torch.testing.assert_close(first["state"]["student"][name], parameter.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(first["state"]["student"][name], second["state"]["student"][name])


def test_a_partner_depends_on_seed_epoch_and_sample_alone_and_is_uniform() -> None:
    neighbors = np.arange(5000)[:, None] * 100 + np.arange(50)
    ids = np.arange(5000)
    columns = sample_neighbors(neighbors, ids, seed=0, epoch=0) - ids * 100
    assert np.array_equal(sample_neighbors(neighbors, ids[::-7], 0, 0) - ids[::-7] * 100, columns[::-7])
    assert chisquare(np.bincount(columns, minlength=50)).pvalue > 1e-4
    for seed, epoch in ((1, 0), (0, 1)):
        assert (sample_neighbors(neighbors, ids, seed, epoch) - ids * 100 == columns).mean() < 0.05


def test_an_epoch_repeats_no_sample_and_others_leave_out_different_ones() -> None:
    epochs = [np.concatenate(list(epoch_batches(103, 10, seed=4, epoch=e))) for e in range(2)]
    for visited in epochs:
        assert len(visited) == 100 and len(np.unique(visited)) == 100 and visited.max() < 103
    assert set(epochs[0]) != set(epochs[1])
    assert np.array_equal(epochs[0], np.concatenate(list(epoch_batches(103, 10, seed=4, epoch=0))))


def test_a_pool_smaller_than_a_batch_is_refused_with_the_remedy() -> None:
    assert steps_per_epoch(103, TemiSettings(2, batch_size=10)) == 10
    with pytest.raises(ValueError, match="lower batch_size to 9 or less"):
        steps_per_epoch(9, TemiSettings(2, batch_size=10))


def test_the_cpu_profile_overrides_the_papers_defaults_by_name() -> None:
    settings = TemiSettings(num_clusters=10, **CPU_PROFILE)
    assert all(getattr(settings, name) == value for name, value in CPU_PROFILE.items())
    assert settings.num_heads < TemiSettings(num_clusters=10).num_heads


def test_settings_that_cannot_cluster_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 clusters"):
        TemiSettings(num_clusters=1)


def test_the_head_of_lowest_loss_is_picked_and_divergence_is_refused() -> None:
    assert pick_head(np.array([0.5, -1.0, -1.0, 3.0])) == 1
    with pytest.raises(ValueError, match=r"heads \[1\] are not finite"):
        pick_head(np.array([0.5, np.nan]))


def test_clusters_of_one_head_equal_its_row_of_all_heads() -> None:
    trainer = TemiTrainer(SMALL, 12, 6, seed=0)
    x = unit_rows(40, 12)
    labels = trainer.assign(x)
    assert labels.shape == (3, 40)
    assert torch.equal(trainer.assign(x, 2), labels[2])
    assert torch.equal(trainer.assign(x.half().float(), 2), trainer.assign(x.half(), 2))


def test_pca_equals_scikit_learn_with_the_largest_coordinate_positive() -> None:
    sample = np.random.default_rng(0).normal(size=(300, 8)) @ np.random.default_rng(1).normal(size=(8, 8))
    mean, components = fit_pca(sample.astype(np.float32), 3)
    reference = PCA(3, svd_solver="full").fit(sample)
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-5)
    signs = np.sign((components * reference.components_).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(components, reference.components_ * signs, atol=1e-4)
    assert (components[np.arange(3), np.abs(components).argmax(axis=1)] > 0).all()
    expected = reference.transform(sample) * signs.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(project(sample.astype(np.float16), mean, components), expected, atol=0.02)


def test_projecting_the_mean_itself_gives_zeros_not_nan() -> None:
    mean, components = fit_pca(np.eye(4, dtype=np.float32), 2)
    assert project(mean[None], mean, components).tolist() == [[0.0, 0.0]]


def test_more_components_than_the_sample_has_are_refused() -> None:
    with pytest.raises(ValueError, match="9 principal components need"):
        fit_pca(np.zeros((300, 8), dtype=np.float32), 9)


@pytest.mark.parametrize("sizes", [[100, 0], [0, 96, 4], [50, 50, 0, 0, 0]])
def test_a_collapsed_clustering_is_an_error_with_its_measures(sizes: list[int]) -> None:
    with pytest.raises(
        ClusteringCollapseError, match=rf"{np.count_nonzero(sizes)} of {len(sizes)} clusters are in use.*100"
    ):
        check_clustering_collapse(np.array(sizes))


@pytest.mark.parametrize("sizes", [[94, 6], [30, 30, 40, 0, 0]])
def test_an_uneven_clustering_is_no_collapse(sizes: list[int]) -> None:
    check_clustering_collapse(np.array(sizes))


@pytest.mark.slow
def test_temi_finds_the_ten_digits_better_than_k_means_on_average() -> None:
    pixels, digits = load_digits(return_X_y=True)
    embeddings = pixels - pixels.mean(axis=0)
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)
    neighbors = nearest_neighbors(embeddings, 20)
    settings = TemiSettings(
        num_clusters=10,
        num_heads=8,
        hidden_dim=64,
        bottleneck_dim=32,
        num_epochs=30,
        num_warmup_epochs=1,
        batch_size=128,
        learning_rate=2e-3,
        teacher_momentum=0.9,
    )

    def accuracy(clusters: np.ndarray) -> float:
        return matched_accuracy(contingency_table(clusters, digits, 10, 10))

    by_temi, by_k_means = [], []
    for seed in range(3):
        trainer = TemiTrainer(settings, 64, steps_per_epoch(len(embeddings), settings), seed)
        for epoch in range(settings.num_epochs):
            head_losses = train_epoch(trainer, embeddings, neighbors, seed, epoch)
        by_temi.append(accuracy(trainer.assign(torch.from_numpy(embeddings), pick_head(head_losses)).numpy()))
        by_k_means.append(accuracy(KMeans(10, n_init=3, random_state=seed).fit_predict(embeddings)))
    assert np.mean(by_temi) > np.mean(by_k_means) + 0.03, (by_temi, by_k_means)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_gpu_trains_as_the_cpu_does(dtype: torch.dtype | None) -> None:
    embeddings, neighbors = toy_pool()
    settings = TemiSettings(5, num_heads=50, hidden_dim=64, bottleneck_dim=32, batch_size=32, num_warmup_epochs=1)
    on_cpu = TemiTrainer(settings, 12, 6, seed=0)
    on_gpu = TemiTrainer(settings, 12, 6, seed=0, device="cuda", autocast_dtype=dtype)
    expected = train_epoch(on_cpu, embeddings, neighbors, 0, 0)
    losses = train_epoch(on_gpu, torch.from_numpy(embeddings).cuda(), neighbors, 0, 0)
    tolerance = 1e-4 if dtype is None else 0.02
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=tolerance)
    labels = on_gpu.assign(torch.from_numpy(embeddings)).cpu()
    assert (labels == on_cpu.assign(torch.from_numpy(embeddings))).double().mean() > (0.99 if dtype is None else 0.8)
