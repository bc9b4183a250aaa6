import numpy as np
import pytest
import torch
from torch import nn

from elfs_ray.methods.training.dynamics import BatchPlan, DynamicsRecorder, epoch_order, record


def plans(num_samples: int, global_batch: int, world_size: int, micro_batch: int | None) -> list[BatchPlan]:
    return [BatchPlan(num_samples, global_batch, rank, world_size, micro_batch) for rank in range(world_size)]


BATCHES = [(3, None), (3, 2), (128, None), (128, 2), (128, 17), (4096, None), (4096, 17)]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 1003, 1024])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
class TestBatchPlan:
    def test_every_position_is_real_once_an_epoch_and_in_its_own_global_batch(self, num_samples, world_size):
        for global_batch, micro_batch in BATCHES:
            num_seen = 0
            for steps in zip(
                *(p.steps() for p in plans(num_samples, global_batch, world_size, micro_batch)), strict=True
            ):
                real = np.concatenate([m.positions[m.mask] for step in steps for m in step.micro_batches])
                start = steps[0].index * global_batch
                end = min(start + global_batch, num_samples)
                assert real.tolist() == list(range(start, end))
                assert {step.num_real for step in steps} == {end - start}
                num_seen += len(real)
            assert num_seen == num_samples

    def test_every_rank_takes_as_many_steps_micro_batches_and_rows(self, num_samples, world_size):
        for global_batch, micro_batch in BATCHES:
            shapes = set()
            for plan in plans(num_samples, global_batch, world_size, micro_batch):
                steps = list(plan.steps())
                assert len(steps) == plan.num_steps
                assert sum(len(m.positions) for step in steps for m in step.micro_batches) == plan.num_rows
                shapes.add(tuple(tuple(len(m.positions) for m in step.micro_batches) for step in steps))
            assert len(shapes) == 1
            for sizes in shapes.pop():
                assert len(set(sizes)) == 1
                assert 2 <= sizes[0] <= (micro_batch or global_batch)

    def test_a_rank_pads_each_micro_batch_with_at_most_one_duplicate(self, num_samples, world_size):
        """Beyond the two rows that BatchNorm needs of every rank."""
        for global_batch, micro_batch in BATCHES:
            for plan in plans(num_samples, global_batch, world_size, micro_batch):
                for step in plan.steps():
                    start = step.index * global_batch
                    positions = np.concatenate([m.positions for m in step.micro_batches])
                    assert ((positions >= start) & (positions < start + step.num_real)).all()
                    num_duplicates = sum((~m.mask).sum() for m in step.micro_batches)
                    few = step.num_real < 2 * world_size
                    assert num_duplicates <= (2 if few else len(step.micro_batches))


def test_global_batches_do_not_depend_on_the_number_of_workers():
    batches = {
        world_size: [
            np.sort(np.concatenate([m.positions[m.mask] for step in steps for m in step.micro_batches])).tolist()
            for steps in zip(*(p.steps() for p in plans(1003, 64, world_size, 10)), strict=True)
        ]
        for world_size in (1, 2, 7)
    }
    assert batches[1] == batches[2] == batches[7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0, "global_batch": 4}, "num_samples is 0"),
        ({"num_samples": 5, "global_batch": 0}, "global_batch 0"),
        ({"num_samples": 5, "global_batch": 4, "micro_batch": 1}, "micro_batch is 1"),
        ({"num_samples": 5, "global_batch": 4, "rank": 2, "world_size": 2}, "rank is 2"),
    ],
)
def test_a_count_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(**arguments)


def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_alone_decide():
    order = epoch_order(5000, seed=1, epoch=2)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(5000))
    assert np.array_equal(order, epoch_order(5000, seed=1, epoch=2))
    for other in (epoch_order(5000, seed=2, epoch=2), epoch_order(5000, seed=1, epoch=3), np.arange(5000)):
        assert (order == other).sum() < 10
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05


def test_orders_of_four_come_equally_often():
    counts = np.unique([epoch_order(4, seed=0, epoch=e) for e in range(4800)], axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.min() > 140  # 200 each, with a standard deviation of 14
    assert counts.max() < 260


def recomputed(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return target_prob, max_other_prob and el2n, (3, b), by their definitions in float64."""
    rows = []
    for row, target in zip(logits.astype(np.float64), targets, strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        others = np.delete(p, target)
        onehot = np.eye(len(p))[target]
        rows.append((p[target], others.max() if len(others) else 0.0, np.sqrt(((onehot - p) ** 2).sum())))
    return np.array(rows).T


@pytest.mark.parametrize("num_classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 60.0])
def test_recorded_values_are_those_of_the_definitions(num_classes, spread):
    rng = np.random.default_rng(num_classes)
    logits = (spread * rng.standard_normal((50, num_classes))).astype(np.float32)
    targets = rng.integers(num_classes, size=50)
    targets[:10] = logits[:10].argmax(axis=1)
    recorded = record(torch.from_numpy(logits), torch.from_numpy(targets))
    for values, expected in zip(recorded, recomputed(logits, targets), strict=True):
        assert values.dtype == torch.float32
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_computed_in_float32_whatever_the_network_ran_in(dtype):
    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(40) % 12
    for values, expected in zip(record(logits, targets), recomputed(logits.double().numpy(), targets), strict=True):
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("num_samples", "world_size"), [(1, 2), (103, 1), (103, 3)])
def test_an_epochs_records_hold_every_sample_once_with_its_own_values(num_samples, world_size):
    rng = np.random.default_rng(4)
    logits = torch.from_numpy(rng.standard_normal((num_samples, 6)).astype(np.float32))
    targets = torch.from_numpy(rng.integers(6, size=num_samples))
    recorders = [DynamicsRecorder(p.num_rows, "cpu") for p in plans(num_samples, 20, world_size, 5)]
    for epoch in range(2):
        order = epoch_order(num_samples, 0, epoch)
        shown = logits * (epoch + 1)
        for plan, recorder in zip(plans(num_samples, 20, world_size, 5), recorders, strict=True):
            for step in plan.steps():
                for m in step.micro_batches:
                    ids = order[m.positions]
                    # What a duplicate was recorded as must not matter.
                    seen = torch.where(torch.from_numpy(m.mask)[:, None], shown[ids], -shown[ids])
                    recorder.add(ids, m.mask, seen, targets[ids])
        records = [recorder.finish() for recorder in recorders]
        for each in records:
            assert (np.diff(each["sample_id"]) > 0).all()
        ids = np.concatenate([each["sample_id"] for each in records])
        assert np.array_equal(np.sort(ids), np.arange(num_samples))
        expected = recomputed(shown.numpy(), targets.numpy())[:, ids]
        for name, values in zip(("target_prob", "max_other_prob", "el2n"), expected, strict=True):
            np.testing.assert_allclose(np.concatenate([each[name] for each in records]), values, atol=1e-6)


def recorded(plan: BatchPlan, recorder: DynamicsRecorder, steps: range) -> None:
    """Record some steps of an epoch in the order of ids; the logits of a sample are a function of its id."""
    for step in plan.steps(steps.start):
        if step.index in steps:
            for m in step.micro_batches:
                logits = torch.from_numpy(np.outer(m.positions, [0.01, 0.02, -0.01]))
                recorder.add(m.positions, m.mask, logits, torch.zeros(len(m.positions), dtype=torch.int64))


@pytest.mark.parametrize("resumed_by", [1, 2, 3, 4])
def test_an_epoch_resumed_by_any_number_of_ranks_has_every_record_once(resumed_by):
    first, last = range(3), range(3, 6)
    states = []
    for plan in plans(103, 20, 3, 5):
        recorder = DynamicsRecorder(plan.num_rows, "cpu")
        recorded(plan, recorder, first)
        states.append(recorder.records())
    records = []
    for plan in plans(103, 20, resumed_by, 5):
        recorder = DynamicsRecorder(plan.num_rows, "cpu")
        recorder.resume(plan.num_rows_before(last.start), states[plan.rank :: resumed_by])
        recorded(plan, recorder, last)
        records.append(recorder.finish())
    ids = np.concatenate([each["sample_id"] for each in records])
    assert np.array_equal(np.sort(ids), np.arange(103))
    (alone,) = plans(103, 20, 1, 5)
    undisturbed = DynamicsRecorder(alone.num_rows, "cpu")
    recorded(alone, undisturbed, range(6))
    expected = undisturbed.finish()
    for name in ("target_prob", "max_other_prob", "el2n"):
        values = np.concatenate([each[name] for each in records])[np.argsort(ids)]
        assert values.tobytes() == expected[name].tobytes()


def test_records_of_an_epoch_do_not_change_while_the_next_is_recorded():
    recorder, targets = DynamicsRecorder(2, "cpu"), torch.tensor([0, 1])
    recorder.add(np.arange(2), np.ones(2, dtype=bool), torch.eye(2), targets)
    first = recorder.finish()
    before = {name: values.copy() for name, values in first.items()}
    recorder.add(np.arange(2) + 7, np.ones(2, dtype=bool), -torch.eye(2), targets)
    for name, values in first.items():
        assert np.array_equal(values, before[name])


def test_recording_leaves_the_gradient_and_the_logits_alone():
    model = nn.Linear(3, 4)
    logits = model(torch.randn(5, 3))
    before = logits.detach().clone()
    recorder = DynamicsRecorder(5, "cpu")
    recorder.add(np.arange(5), np.ones(5, dtype=bool), logits, torch.zeros(5, dtype=torch.int64))
    assert torch.equal(logits.detach(), before)
    logits.sum().backward()
    assert model.weight.grad is not None


def test_a_sample_recorded_twice_or_an_epoch_cut_short_is_an_error():
    recorder, logits, targets = DynamicsRecorder(4, "cpu"), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    recorder.add(np.array([0, 1]), np.ones(2, dtype=bool), logits, targets)
    with pytest.raises(AssertionError, match="2 rows of 4"):
        recorder.finish()
    recorder.add(np.array([1, 2]), np.ones(2, dtype=bool), logits, targets)
    with pytest.raises(AssertionError, match="twice"):
        recorder.finish()


@pytest.mark.gpu
def test_recording_on_a_gpu_waits_for_nothing_and_equals_the_cpu():
    logits, targets = torch.randn(64, 10), torch.randint(0, 10, (64,))
    cpu, gpu = DynamicsRecorder(64, "cpu"), DynamicsRecorder(64, "cuda")
    ids, mask = np.random.default_rng(0).permutation(64), np.arange(64) < 60
    on_gpu = logits.cuda(), targets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.add(ids, mask, *on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cpu.add(ids, mask, logits, targets)
    expected, records = cpu.finish(), gpu.finish()
    for name, values in records.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6)
