"""Training from scratch: the same number of steps for every budget, and the same result after a resume."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from elfs_ray.evaluation.from_scratch import train_in_parts
from elfs_ray.methods.training.classifier import Classifier, ClassifierSettings, LabelledImages, train_and_test
from tests.tables import digit_images

SETTINGS = ClassifierSettings(
    network="small_cnn",
    iterations=24,
    batch_size=16,
    lr=0.05,
    min_lr=1e-4,
    momentum=0.9,
    weight_decay=5e-4,
    nesterov=True,
    crop_padding=1,
    flip=False,
    mean=(0.3,) * 3,
    std=(0.35,) * 3,
    num_tests=4,
)


def digits(rows: slice) -> LabelledImages:
    images, labels = digit_images(1200)
    return LabelledImages(np.repeat(images[rows][..., None], 3, axis=3), labels[rows], np.arange(1200)[rows])


@pytest.mark.parametrize("num_samples", [2, 10, 16, 100, 1000])
def test_every_budget_trains_for_the_same_number_of_iterations(num_samples):
    training = Classifier(10, SETTINGS, seed=0)
    due = [step for step in training.steps(digits(slice(num_samples))) if training.is_test_due()]
    assert training.num_steps == SETTINGS.iterations
    assert due == [6, 12, 18, 24]


def test_training_resumed_from_its_state_ends_with_the_same_weights():
    train, test = digits(slice(40)), digits(slice(1000, 1200))
    whole = Classifier(10, SETTINGS, seed=3)
    for _ in whole.steps(train):
        pass
    first = Classifier(10, SETTINGS, seed=3)
    for step in first.steps(train):
        if step == 11:
            break
    saved = io.BytesIO()
    torch.save(first.state(), saved)
    second = Classifier(10, SETTINGS, seed=3)
    second.restore(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert next(iter(second.steps(train))) == 12
    for _ in second.steps(train):
        pass
    assert second.num_steps == SETTINGS.iterations and second.accuracy(test) == whole.accuracy(test)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_killed_trial_resumes_to_the_accuracies_of_an_undisturbed_one(tmp_path):
    train, test = digits(slice(40)), digits(slice(1000, 1200))
    path = str(tmp_path / "trial.unfinished.pt")

    class Killed(Classifier):
        def accuracy(self, test):
            if self.num_steps >= 18:
                raise KeyboardInterrupt
            return super().accuracy(test)

    with pytest.raises(KeyboardInterrupt):
        train_in_parts(Killed(10, SETTINGS, seed=1), train, test, path, save_every_s=0)
    saved = torch.load(path, weights_only=True)
    assert (saved["num_steps"], len(saved["accuracies"])) == (17, 2)
    resumed = train_in_parts(Classifier(10, SETTINGS, seed=1), train, test, path, save_every_s=0)
    assert resumed == train_and_test(train, test, 10, SETTINGS, seed=1)


def test_features_and_probabilities_are_those_of_the_network():
    training = Classifier(10, SETTINGS, seed=0)
    for _ in training.steps(digits(slice(100))):
        pass
    test = digits(slice(0, 600))
    features, probs = training.features_and_probs(test.images)
    assert features.shape == (600, 256) and probs.shape == (600, 10)
    with torch.inference_mode():
        assert torch.allclose(torch.softmax(training.model.classifier(features), dim=1), probs, atol=1e-5)
    assert float((probs.argmax(1).numpy() == test.labels).mean()) == pytest.approx(training.accuracy(test))


@pytest.mark.slow
def test_a_process_compiles_once_for_trainings_of_one_shape():
    train, test = digits(slice(300)), digits(slice(1000, 1200))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = [train_and_test(train, test, 10, replace(SETTINGS, compile=True), seed=seed) for seed in (1, 2)]
    assert graphs["unique_graphs"] == 1
    plain = [train_and_test(train, test, 10, SETTINGS, seed=seed) for seed in (1, 2)]
    np.testing.assert_allclose(compiled, plain, atol=0.05)  # of 200 test images: compiled kernels round differently


def test_a_training_is_named_by_compile_only_where_it_is_on():
    assert set(replace(SETTINGS, compile=True).deciding()) - set(SETTINGS.deciding()) == {("compile", True)}
