import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from elfs_ray.methods.training.dynamics import BatchPlan, epoch_order
from elfs_ray.methods.training.sgd import (
    LossMonitor,
    cosine_lr,
    data_parallel,
    forward_backward,
    make_grad_scaler,
    make_optimizer,
    masked_cross_entropy,
    set_learning_rate,
    update,
)

NUM_SAMPLES, GLOBAL_BATCH, NUM_CLASSES = 23, 9, 4
CPU = torch.device("cpu")


def make_problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a network without BatchNorm and a small data set, in float64, the same at every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES)).double()
    return model, torch.randn(NUM_SAMPLES, 3, 2, 2).double(), torch.arange(NUM_SAMPLES) % NUM_CLASSES


def accumulate(model: nn.Module, step, order: np.ndarray, images, targets, world_size: int) -> float:
    """Run a rank's micro-batches of a step and return the sum of their losses."""
    total = 0.0
    for i, micro in enumerate(step.micro_batches):
        ids = order[micro.positions]
        _, loss = forward_backward(
            model,
            images[ids],
            targets[ids],
            torch.from_numpy(micro.mask),
            num_real=step.num_real,
            is_last=i == len(step.micro_batches) - 1,
            scaler=make_grad_scaler("fp32", CPU),
            world_size=world_size,
        )
        total += loss.item()
    return total


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [None, 2, 4])
def test_gradients_average_over_ranks_to_that_of_the_global_batch(world_size, micro_batch):
    model, images, targets = make_problem()
    order = epoch_order(NUM_SAMPLES, 0, 0)
    plans = [BatchPlan(NUM_SAMPLES, GLOBAL_BATCH, rank, world_size, micro_batch) for rank in range(world_size)]
    for steps in zip(*(plan.steps() for plan in plans), strict=True):
        replicas = [copy.deepcopy(model) for _ in plans]
        losses = [
            accumulate(replica, step, order, images, targets, world_size)
            for replica, step in zip(replicas, steps, strict=True)
        ]
        model.zero_grad()
        batch = order[steps[0].index * GLOBAL_BATCH :][:GLOBAL_BATCH]
        expected = functional.cross_entropy(model(images[batch]), targets[batch])
        expected.backward()
        assert np.mean(losses) == pytest.approx(expected.item(), abs=1e-6)
        for parameter, *others in zip(model.parameters(), *(r.parameters() for r in replicas), strict=True):
            average = torch.stack([p.grad for p in others]).mean(0)
            torch.testing.assert_close(average, parameter.grad, rtol=1e-5, atol=1e-7)


def train_rank(rank: int, world_size: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    model, images, targets = make_problem()
    replica = data_parallel(model)
    train(replica, BatchPlan(NUM_SAMPLES, GLOBAL_BATCH, rank, world_size, micro_batch=2), images, targets)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def train(model: nn.Module, plan: BatchPlan, images: torch.Tensor, targets: torch.Tensor, num_epochs: int = 2) -> None:
    optimizer = make_optimizer(model, lr=0.1)
    for epoch in range(num_epochs):
        order = epoch_order(NUM_SAMPLES, 0, epoch)
        for step in plan.steps():
            lr = cosine_lr(epoch * plan.num_steps + step.index, num_epochs * plan.num_steps, 0.1)
            set_learning_rate(optimizer, lr)
            accumulate(model, step, order, images, targets, plan.world_size)
            update(optimizer, make_grad_scaler("fp32", CPU))


@pytest.mark.slow
def test_two_processes_with_micro_batches_learn_the_weights_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(train_rank, args=(2, str(tmp_path)), nprocs=2)
    alone, images, targets = make_problem()
    start = copy.deepcopy(alone)
    train(alone, BatchPlan(NUM_SAMPLES, GLOBAL_BATCH), images, targets)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, expected in alone.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(expected, start.state_dict()[name], atol=1e-4)


def test_masked_rows_count_neither_in_the_loss_nor_in_the_gradient():
    logits = torch.randn(6, 3, requires_grad=True)
    targets, mask = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([True, True, False, True, False, False])
    loss = masked_cross_entropy(logits, targets, mask, num_real=3)
    loss.backward()
    torch.testing.assert_close(loss, functional.cross_entropy(logits[mask], targets[mask]))
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).all()
    nothing = masked_cross_entropy(logits, targets, torch.zeros(6, dtype=torch.bool), num_real=3)
    assert nothing.item() == 0


@pytest.mark.parametrize("total_steps", [1, 2, 37])
def test_the_schedule_is_torch_cosine_annealing(total_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=1e-4)
    for step in range(total_steps):
        assert cosine_lr(step, total_steps, 0.1, 1e-4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_a_warm_up_rises_linearly_and_the_cosine_follows_it():
    rates = [cosine_lr(step, 30, 0.4, 0.01, warmup_steps=4) for step in range(30)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4:] == pytest.approx([cosine_lr(step, 26, 0.4, 0.01) for step in range(26)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_lr": 1e-5}, "min_lr is 0.0001 and base_lr 1e-05"),
        ({"base_lr": 0.1, "min_lr": -1.0}, "min_lr is -1.0"),
        ({"base_lr": 0.1, "warmup_steps": 10}, "warmup_steps is 10; it must be at least 0 and below total_steps = 10"),
    ],
)
def test_a_schedule_out_of_order_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cosine_lr(0, 10, **arguments)


def test_the_optimizer_is_nesterov_sgd_with_decay_everywhere():
    model, images, targets = make_problem()
    optimizer = make_optimizer(model, lr=0.1, momentum=0.9, weight_decay=0.02)
    weights = [p.detach().clone() for p in model.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for lr in (0.1, 0.03):
        set_learning_rate(optimizer, lr)
        functional.cross_entropy(model(images), targets).backward()
        for i, p in enumerate(model.parameters()):
            gradient = p.grad + 0.02 * weights[i]
            velocities[i] = 0.9 * velocities[i] + gradient
            weights[i] = weights[i] - lr * (gradient + 0.9 * velocities[i])
        update(optimizer, make_grad_scaler("fp32", CPU))
        assert all(p.grad is None for p in model.parameters())
        for p, expected in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), expected)


def test_an_fp16_overflow_skips_its_step_and_the_next_is_plain_sgd():
    model, images, targets = make_problem()
    model, images = model.float(), images.float()
    optimizer, scaler = make_optimizer(model, lr=0.1), make_grad_scaler("fp16", CPU)
    before = copy.deepcopy(model)
    for overflows in (True, False):
        loss = functional.cross_entropy(model(images), targets)
        scaler.scale(loss * (math.inf if overflows else 1)).backward()
        update(optimizer, scaler)
    plain = torch.optim.SGD(before.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    functional.cross_entropy(before(images), targets).backward()
    plain.step()
    for ours, expected in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_bf16_runs_the_network_in_bf16_and_the_loss_in_float32():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, NUM_CLASSES))
    logits, loss = forward_backward(
        model,
        torch.randn(5, 3, 2, 2),
        torch.zeros(5, dtype=torch.int64),
        torch.ones(5, dtype=torch.bool),
        num_real=5,
        is_last=True,
        scaler=make_grad_scaler("bf16", CPU),
        precision="bf16",
    )
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert not logits.requires_grad
    assert model[1].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_epoch_step_and_learning_rate(value):
    monitor = LossMonitor()
    monitor.add(torch.tensor(1.0), num_real=4, epoch=3, step=11, lr=0.25)
    with pytest.raises(FloatingPointError, match=r"epoch 3, step 12, learning rate 0\.125"):
        monitor.add(torch.tensor(value), num_real=4, epoch=3, step=12, lr=0.125)


def test_the_epochs_loss_weighs_steps_by_their_rows_and_starts_anew():
    monitor = LossMonitor()
    monitor.add(torch.tensor(2.0), num_real=10, epoch=0, step=0, lr=0.1)
    monitor.add(torch.tensor(5.0), num_real=5, epoch=0, step=1, lr=0.1)
    assert monitor.finish() == pytest.approx(3.0)
    monitor.add(torch.tensor(7.0), num_real=1, epoch=1, step=0, lr=0.1)
    assert monitor.finish() == 7.0


def test_the_epochs_loss_goes_on_from_a_saved_sum():
    saved, resumed = LossMonitor(), LossMonitor()
    saved.add(torch.tensor(2.0), num_real=10, epoch=0, step=0, lr=0.1)
    resumed.load_state(*saved.state())
    resumed.add(torch.tensor(5.0), num_real=5, epoch=0, step=1, lr=0.1)
    assert resumed.finish() == pytest.approx(3.0)


@pytest.mark.gpu
def test_on_a_gpu_a_nan_is_noticed_within_eight_steps_without_waiting():
    monitor, losses = LossMonitor(), torch.ones(20, device="cuda")
    losses[3] = float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(FloatingPointError, match="step 3"):
            for step in range(12):
                monitor.add(losses[step], num_real=1, epoch=0, step=step, lr=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_learns_in_every_precision(precision):
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES)).to(device)
    images, targets = torch.randn(16, 3, 2, 2, device=device), torch.arange(16, device=device) % NUM_CLASSES
    mask = torch.ones(16, dtype=torch.bool, device=device)
    optimizer, scaler = make_optimizer(model, lr=0.1), make_grad_scaler(precision, device)
    losses = []
    for _ in range(60):
        _, loss = forward_backward(
            model, images, targets, mask, num_real=16, is_last=True, scaler=scaler, precision=precision
        )
        update(optimizer, scaler)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
