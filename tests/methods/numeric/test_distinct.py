"""Tell equal embeddings apart from others: minus zero equals zero."""

import numpy as np

from elfs_ray.methods.numeric.distinct import first_of_equal


def test_the_first_of_equal_rows_stands_for_them():
    rows = np.array([[1, 0], [0.5, 2], [1, -0.0], [0.5, 2], [2, 0.5], [1, 0]], np.float16)
    assert first_of_equal(rows).tolist() == [0, 1, 4]
    assert first_of_equal(rows[:1]).tolist() == [0]
