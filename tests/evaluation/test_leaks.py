"""Test images that are near-duplicates of images in the pool are told."""

import re

import numpy as np
import pytest

from elfs_ray.evaluation.leaks import Leaks, find_leaks
from elfs_ray.evaluation.report import Line, Results, closing_lines
from elfs_ray.evaluation.trials import Accuracy
from elfs_ray.storage.run_dir import RunDir
from tests.tables import embeddings_of, write_embedded


def test_leaks_are_the_test_images_near_the_pool(tmp_path, monkeypatch):
    monkeypatch.setattr("elfs_ray.evaluation.leaks.QUERIES_PER_TASK", 40)
    run_dir = RunDir(tmp_path / "run")
    ids = write_embedded(run_dir)
    pool = embeddings_of(run_dir)
    tests = np.random.default_rng(0).standard_normal((100, pool.shape[1]))
    tests = (tests / np.linalg.norm(tests, axis=1, keepdims=True)).astype(np.float16)
    tests[[7, 95]] = pool[[200, 50]]
    uris = [f"/test/{i}.png" for i in range(100)]
    leaks = find_leaks(run_dir, tests, uris, 0.97, "cpu", str(tmp_path))
    assert (leaks.num_leaking, leaks.num_tested) == (2, 100)
    expected = {("/test/7.png", f"/digits/{ids[200]}.png"), ("/test/95.png", f"/digits/{ids[50]}.png")}
    assert {tuple(pair[:2]) for pair in leaks.examples} == expected
    assert find_leaks(run_dir, tests, uris, 0.97, "cpu", str(tmp_path)).num_leaking == 2  # from its file


@pytest.mark.parametrize(
    ("leaks", "line"),
    [
        (Leaks(0, 50, 0.93, []), "leaks: 0 of 50 test images are near-duplicates of images in the pool"),
        (Leaks(1, 50, 0.93, [("/a.png", "/b.png", 0.97)]), "leaks: 1 of 50 test images .*, such as /a.png of /b.png"),
    ],
)
def test_the_summary_tells_leaks(leaks, line):
    lines = (Line("random", {"10": Accuracy(10, 1, 0.5, 0.0, 0.5, 0.0)}, {}),)
    assert re.search(line, closing_lines(Results("linear_probe", lines, {}, leaks)))
