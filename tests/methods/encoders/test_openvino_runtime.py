"""OpenVINO computes what torch computes, whatever the batch, and tells nobody about it."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import nn

from elfs_ray.methods.encoders.encoder import can_use_openvino, check_encoder, load_encoder
from elfs_ray.methods.encoders.networks import IMAGENET
from elfs_ray.methods.encoders.openvino_runtime import BATCH_SIZE, OpenVinoRuntime
from elfs_ray.methods.encoders.processor import Processor, common, find_processor

CONVOLUTIONS = ("torchvision/squeezenet1_1", 64)
TRANSFORMER = ("timm/vit_tiny_patch16_224", 64)


@lru_cache
def load(name: str, size: int, runtime: str, precision: str = "auto"):
    return load_encoder(name, weights="random:0", image_size=size, runtime=runtime, precision=precision)


def some_images(number: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.mark.parametrize(("name", "size"), [CONVOLUTIONS, TRANSFORMER])
def test_openvino_and_torch_agree_up_to_rounding(name, size):
    images = some_images(5, size)
    by_torch, by_openvino = (load(name, size, runtime, "fp32").encode(images) for runtime in ("torch", "openvino"))
    np.testing.assert_allclose(by_openvino, by_torch, rtol=1e-3, atol=1e-4 * np.abs(by_torch).max())


# torch emulates bf16 where the processor has none.
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_bf16_is_close_to_fp32(runtime):
    images = some_images(4, 64)
    exact, rounded = (load(*TRANSFORMER, runtime, precision).encode(images) for precision in ("fp32", "bf16"))
    assert cosines(exact, rounded).min() > 0.999
    computes_in_bf16 = runtime == "torch" or find_processor().has_bf16
    assert np.array_equal(exact, rounded) != computes_in_bf16


def test_features_do_not_depend_on_the_batch():
    encoder = load(*CONVOLUTIONS, "openvino", "fp32")
    images = some_images(BATCH_SIZE + 3, 64)
    features = encoder.encode(images)
    for one in (0, 7, BATCH_SIZE + 2):
        assert np.array_equal(encoder.encode(images[one : one + 1])[0], features[one])
    assert np.array_equal(encoder.encode(images[::-1])[::-1], features)


def test_threads_that_call_at_once_get_the_bytes_of_one_that_calls_alone():
    name, size = CONVOLUTIONS
    images = some_images(3 * BATCH_SIZE, size)
    alone = load(name, size, "openvino", "fp32").encode(images)
    encoder = load_encoder(
        name, weights="random:0", image_size=size, runtime="openvino", precision="fp32", num_threads=3
    )
    parts = [images[start:] for start in range(0, len(images), 5)]
    with ThreadPoolExecutor(3) as threads:
        for part, features in zip(parts, threads.map(encoder.encode, parts), strict=True):
            assert np.array_equal(features, alone[len(images) - len(part) :])


def test_no_usage_data_is_kept_or_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    load("torchvision/squeezenet1_1", 32, "openvino")
    assert not list(tmp_path.iterdir())


class _LeastSquares(nn.Module):
    """A network with a function that OpenVINO does not have."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lstsq(images.flatten(2), images.flatten(2)).solution.flatten(1)


def test_a_network_that_openvino_cannot_take_is_an_error_with_a_way_out():
    with pytest.raises(ValueError, match=r"OpenVINO cannot take this encoder: .*embed\.runtime=torch"):
        OpenVinoRuntime(_LeastSquares(), IMAGENET, 8, precision="fp32")


def test_ctrl_c_in_a_conversion_is_no_fault_of_the_encoder(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchScriptPythonDecoder, "get_op_type", interrupted)
    with pytest.raises(KeyboardInterrupt):
        OpenVinoRuntime(nn.Conv2d(3, 4, 3), IMAGENET, 8, precision="fp32")


@pytest.mark.parametrize("name", ["pixels", "file"])
def test_what_is_no_network_stays_with_torch(name):
    assert not can_use_openvino(name)
    with pytest.raises(ValueError, match=r"no network that OpenVINO could take; give embed\.runtime=torch"):
        check_encoder(name, runtime="openvino")


def test_machines_use_what_all_of_them_have():
    new, old, without = Processor(True, True), Processor(True, False), Processor(False, False)
    assert common([new, new]) == new and common([new, old]) == old and common([new, old, without]) == without
