"""SimCLR: the loss equals its formula, for any number of workers, and a collapse is noticed."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from elfs_ray.methods.simclr.loss import (
    CollapseMeasures,
    CollapseMonitor,
    EncoderCollapseError,
    check_encoder_collapse,
    nt_xent,
)
from elfs_ray.methods.simclr.training import SimclrSettings, SimclrTrainer, even_batch, shares_of, simclr_settings
from elfs_ray.methods.simclr.views import ViewSettings
from elfs_ray.methods.training.networks import PROXY_MODELS, build_backbone

SMALL = SimclrSettings(network="small_cnn", epochs=3, batch_size=32, lr=0.4, warmup_epochs=0, hidden_dim=24)
CPU = torch.device("cpu")
STEPS = ((7, 0), (1, 1), (6, 2))  # (images of the global batch, its number), divided unevenly, one worker without any


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from a second one, and lose much beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def written_out(projections: torch.Tensor, temperature: float) -> torch.Tensor:
    """Equation 1 of the paper, term by term: projections (2, n, p), both views of each image."""
    _, n, _ = projections.shape
    views = [projections[view, image] for view in range(2) for image in range(n)]

    def similarity(i: int, k: int) -> torch.Tensor:
        return (views[i] @ views[k]) / (views[i].norm() * views[k].norm())

    loss = torch.zeros((), dtype=projections.dtype)
    for i in range(2 * n):
        positive = torch.exp(similarity(i, (i + n) % (2 * n)) / temperature)
        everything = sum(torch.exp(similarity(i, k) / temperature) for k in range(2 * n) if k != i)
        loss = loss - torch.log(positive / everything)
    return loss / (2 * n)


@pytest.mark.parametrize(("n", "temperature"), [(7, 0.5), (2, 0.1), (1, 0.5)])
def test_the_loss_and_its_gradient_are_the_formula_written_out_in_float64(n, temperature):
    rows = torch.randn(2, n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    exact = rows.clone().requires_grad_()
    expected = written_out(exact, temperature)
    expected.backward()
    ours = rows.float().requires_grad_()
    loss = nt_xent(ours, temperature, shares=[n])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def images_of(num_images: int, number: int) -> torch.Tensor:
    """Two views (2, n, 3, 12, 12) of some images, a function of the batch's number."""
    return torch.randn(2, num_images, 3, 12, 12, generator=torch.Generator().manual_seed(number))


def train(trainer: SimclrTrainer, rank: int, world_size: int) -> list[float]:
    """Take a few steps on this worker's share of each global batch and return its parts of the losses."""
    losses = []
    for num_images, number in STEPS:
        shares = shares_of(num_images, world_size)
        first = sum(shares[:rank])
        images = images_of(num_images, number)[:, first : first + shares[rank]].to(trainer.device)
        _, loss, _ = trainer.step(images.flatten(0, 1), shares, epoch=0, step=number)
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_compiled_network_trains_as_a_plain_one_does():
    plain, compiled = (SimclrTrainer(SMALL, len(STEPS), seed=1, device=CPU, compiles=value) for value in (False, True))
    np.testing.assert_allclose(train(compiled, 0, 1), train(plain, 0, 1), rtol=1e-3, atol=1e-5)
    for name, expected in plain.state_dict()["model"].items():
        torch.testing.assert_close(compiled.state_dict()["model"][name], expected, rtol=1e-2, atol=1e-3, msg=name)


def _lose_in_a_group(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    parts = []
    for num_images, number in STEPS:
        shares = shares_of(num_images, world_size)
        first = sum(shares[:rank])
        share = projections_of(num_images, number)[:, first : first + shares[rank]].requires_grad_()
        loss = nt_xent(share, 0.5, shares=shares, group=dist.group.WORLD)
        loss.backward()
        parts.append((loss.detach(), share.grad))
    torch.save(parts, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def projections_of(num_images: int, number: int) -> torch.Tensor:
    """Two views (2, n, 5) of some images, a function of the batch's number."""
    return torch.randn(2, num_images, 5, generator=torch.Generator().manual_seed(number))


def test_two_workers_share_negatives_and_gradients(tmp_path: Path):
    """Shares of unequal size, and a worker that has no image of a batch. DDP averages gradients over workers."""
    assert [shares_of(n, 2) for n, _ in STEPS] == [[3, 4], [0, 1], [3, 3]]
    spawn(_lose_in_a_group, args=(2, str(tmp_path)), nprocs=2)
    workers = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for (num_images, number), (loss, grad), (other_loss, other_grad) in zip(STEPS, *workers, strict=True):
        alone = projections_of(num_images, number).requires_grad_()
        expected = nt_xent(alone, 0.5, shares=[num_images])
        expected.backward()
        torch.testing.assert_close((loss + other_loss) / 2, expected.detach())
        torch.testing.assert_close(torch.cat([grad, other_grad], dim=1) / 2, alone.grad)


def test_measures_are_the_formulas_over_all_embeddings_in_float64():
    features = np.random.default_rng(0).standard_normal((300, 8)) * np.geomspace(1, 0.01, 8) + 0.5
    monitor = CollapseMonitor(8, CPU)
    for part in (features[:100], features[100:100], features[100:]):
        monitor.add(torch.from_numpy(part))
    measures = monitor.finish()
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    shares = eigenvalues / eigenvalues.sum()
    assert measures.spread == pytest.approx(rows.std(0).mean() * math.sqrt(8), rel=1e-4)
    assert measures.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    monitor.add(torch.randn(5000, 8, generator=torch.Generator().manual_seed(0)))
    isotropic = monitor.finish()  # of what came after the first measures alone
    assert isotropic.spread == pytest.approx(1, abs=0.02) and isotropic.effective_rank == pytest.approx(8, abs=0.1)


def test_measures_go_on_from_saved_sums():
    features = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    whole, saved, resumed = (CollapseMonitor(8, CPU) for _ in range(3))
    whole.add(features)
    saved.add(features[:120])
    resumed.load_state(saved.state())
    resumed.add(features[120:])
    assert resumed.finish() == pytest.approx(whole.finish())


@pytest.mark.parametrize(
    "features", [torch.ones(50, 4), torch.zeros(50, 4), torch.linspace(-1, 1, 50)[:, None] * torch.eye(4)[:1]]
)
def test_a_point_and_a_line_are_a_collapse(features):
    monitor = CollapseMonitor(4, CPU)
    monitor.add(features)
    with pytest.raises(EncoderCollapseError, match=r"collapsed in epoch 3: .* Lower pretrain\.lr"):
        check_encoder_collapse(monitor.finish(), 3)


@pytest.mark.parametrize(("weight_decay", "collapses"), [(5e-4, False), (4.0, True)])
def test_withered_weights_are_noticed_and_healthy_ones_are_not(weight_decay, collapses):
    settings = SimclrSettings(
        network="small_cnn", epochs=1, batch_size=32, lr=0.8, warmup_epochs=0, weight_decay=weight_decay
    )
    trainer, monitor = SimclrTrainer(settings, 40, seed=0, device=CPU), CollapseMonitor(256, CPU)
    images = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    for step in range(40):
        views = torch.cat([images, images]) + 0.1 * torch.randn(32, 3, 12, 12, generator=noise)
        features, _, _ = trainer.step(views, [16], epoch=0, step=step)
        if step >= 35:
            monitor.add(features)
    measures = monitor.finish()
    if collapses:
        with pytest.raises(EncoderCollapseError):
            check_encoder_collapse(measures, 0)
    else:
        check_encoder_collapse(measures, 0)


def test_a_healthy_measure_passes():
    check_encoder_collapse(CollapseMeasures(spread=0.3, effective_rank=5.0), 0)


def test_a_trainer_that_resumes_from_its_state_ends_with_the_same_bytes():
    whole, first, second = (SimclrTrainer(SMALL, len(STEPS), seed=3, device=CPU) for _ in range(3))
    for trainer, numbers in ((whole, (0, 1)), (first, (0,))):
        for number in numbers:
            trainer.step(images_of(8, number).flatten(0, 1), [8], epoch=0, step=number)
    second.load_state_dict(first.state_dict())
    second.step(images_of(8, 1).flatten(0, 1), [8], epoch=0, step=1)
    for name, tensor in whole.state_dict()["model"].items():
        assert tensor.numpy().tobytes() == second.state_dict()["model"][name].numpy().tobytes(), name


def test_keys_override_the_profile_and_the_profile_the_defaults():
    assert simclr_settings({"profile": "gpu"}, 32).views == ViewSettings()
    chosen = simclr_settings({"profile": "cpu", "temperature": 0.1, "flip": False, "lr": None}, 96)
    assert (chosen.network, chosen.temperature, chosen.lr) == ("small_cnn", 0.1, 0.3)
    assert chosen.views == ViewSettings(min_crop_area=0.2, blur_probability=0.5, flip=False)


def test_the_seed_alone_decides_the_weights_at_the_start():
    def weights(seed: int) -> torch.Tensor:
        torch.rand(3)
        return SimclrTrainer(SMALL, 1, seed=seed, device=CPU).state_dict()["model"]["projector.0.weight"]

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_batches_are_as_even_as_their_number_allows():
    assert [even_batch(n, 512) for n in (50_000, 513, 512, 100, 1)] == [511, 257, 512, 100, 1]
    for n in range(1, 300):
        batch = even_batch(n, 32)
        assert batch <= 32 and -(-n // batch) == -(-n // 32)
        assert batch - (n - 1) % batch - 1 < -(-n // batch)  # the last batch lacks fewer images than there are batches


def test_the_learning_rate_rises_and_falls_to_nothing():
    settings = SimclrSettings(epochs=10, batch_size=512, lr=0.1, warmup_epochs=2)
    trainer = SimclrTrainer(settings, 5, seed=0, device=CPU)
    rates = [trainer.learning_rate(epoch, step) for epoch in range(10) for step in range(5)]
    assert max(rates) == pytest.approx(0.2) and rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(0.02) and rates[-1] < 0.001


@pytest.mark.parametrize("name", sorted(PROXY_MODELS))
def test_every_backbone_gives_one_vector_per_image_and_has_no_classifier(name):
    backbone, dim = build_backbone(name)
    with torch.inference_mode():
        assert backbone.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, dim)
    assert not any(key.startswith(("fc.", "classifier.")) for key in backbone.state_dict())


def _train_in_a_group(rank: int, world_size: int, folder: str) -> None:
    device = torch.device("cuda", 0)
    # gloo, as NCCL refuses two workers on one GPU.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    trainer = SimclrTrainer(SMALL, len(STEPS), seed=1, device=device, group=dist.group.WORLD)
    losses = train(trainer, rank, world_size)
    torch.save({"losses": losses, **trainer.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
def test_two_workers_have_the_loss_weights_and_statistics_of_one(tmp_path: Path):
    """Both on one GPU, with shares of unequal size, and a worker that has no image of a batch."""
    spawn(_train_in_a_group, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True, map_location=CPU) for rank in range(2))
    alone = SimclrTrainer(SMALL, len(STEPS), seed=1, device=torch.device("cuda", 0))
    losses = train(alone, 0, 1)
    assert losses[0] > 1 and losses[1] == 0  # one image has no negatives
    np.testing.assert_allclose(np.mean([first["losses"], second["losses"]], axis=0), losses, rtol=1e-2, atol=1e-4)
    for name, expected in alone.state_dict()["model"].items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        torch.testing.assert_close(first["model"][name], expected.cpu(), rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_in_every_precision(precision):
    device = torch.device("cuda")
    settings = SimclrSettings(network="resnet18", epochs=1, batch_size=32, warmup_epochs=0)
    trainer = SimclrTrainer(settings, 30, seed=0, device=device, precision=precision)
    images = torch.rand(32, 3, 32, 32, device=device)
    losses = []
    for step in range(30):
        views = torch.cat([images, images]) + 0.05 * torch.randn(64, 3, 32, 32, device=device)
        losses.append(trainer.step(views, [32], epoch=0, step=step)[1].item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("profile", "epochs", "warmup"),
    [
        ("gpu", None, 10),
        ("gpu", 400, 10),
        ("gpu", 60, 6),
        ("gpu", 8, 1),
        ("gpu", 1, 0),
        ("cpu", None, 1),
        ("cpu", 0, 0),
    ],
)
def test_an_unset_warm_up_leaves_epochs_to_the_cosine(profile, epochs, warmup):
    keys = {"profile": profile, "epochs": epochs, "warmup_epochs": None}
    assert simclr_settings(keys, 32).warmup_epochs == warmup
    assert simclr_settings({**keys, "warmup_epochs": 5}, 32).warmup_epochs == 5
