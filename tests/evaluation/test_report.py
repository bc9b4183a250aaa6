"""The summary of an evaluation for the terminal."""

from elfs_ray.evaluation.quality import NeighborVote
from elfs_ray.evaluation.report import Line, Quality, Results, closing_lines
from elfs_ray.evaluation.trials import Accuracy, summarize

AUTO = Line("auto", {"20": Accuracy(20, 3, 0.645, 0.0, 0.645, 0.0)}, {})
RANDOM = Line("random", {"20": Accuracy(20, 3, 0.505, 0.034, 0.51, 0.03)}, {})
QUALITY = {"kmeans": Quality(None, NeighborVote(0.946, 10, 4000))}


def test_each_way_of_testing_has_a_table_and_the_quality_is_told_once():
    probed, trained = Results("linear_probe", (AUTO, RANDOM), QUALITY), Results("small_cnn", (RANDOM,), QUALITY)
    assert closing_lines(probed, trained).splitlines() == [
        "linear probe of the embeddings: test accuracy in % by budget (images), mean ± spread of 3 seeds",
        "selection             20",
        "auto                64.5",
        "random        50.5 ± 3.4",
        "",
        "small_cnn from scratch: test accuracy in % by budget (images), mean ± spread of 3 seeds",
        "selection             20",
        "random        50.5 ± 3.4",
        "",
        "embeddings: 94.6% of 4,000 samples have the class that most of their 10 nearest neighbours have",
    ]


def test_a_fraction_is_shown_with_its_number_of_images():
    line = Line("random", {"0.1": Accuracy(400, 1, 0.9, 0.0, 0.9, 0.0)}, {})
    assert "0.1 (400)" in closing_lines(Results("linear_probe", (line,), {})).splitlines()[1]


def test_equal_results_have_no_spread():
    """In floating point, the deviation of three times 0.1 from their mean is not 0."""
    rows = [{"num_samples": 20, "last_accuracy": 0.1, "best_accuracy": 0.1}] * 3
    assert summarize(rows).spread == 0
