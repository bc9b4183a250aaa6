"""Networks that proxy training and evaluation train from scratch: on images by name, or on embeddings."""

from collections.abc import Callable

import torch
from torch import nn

from elfs_ray.methods.training import torchvision_compat  # noqa: F401  before torchvision

# Unit vectors would give a linear layer gradients too small for the learning rates of networks on images.
EMBEDDING_LENGTH = 16.0


def build_proxy_model(name: str, num_classes: int) -> nn.Module:
    """Build a freshly initialized network from (n, 3, h, w) float32 images to (n, num_classes) logits.

    `name` is one of `PROXY_MODELS`; the weights come from torch's global generator. Images may have any size from 8
    pixels. Raises ValueError for an unknown name or fewer than one class.
    """
    if name not in PROXY_MODELS:
        raise ValueError(f"unknown proxy model {name!r}; known: {', '.join(PROXY_MODELS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
    return PROXY_MODELS[name](num_classes)


def build_linear_model(dim: int, num_classes: int) -> nn.Module:
    """Build a linear classifier from unit-length embeddings (n, dim) float32 to (n, num_classes) logits.

    It scales embeddings to a length of 16, so that it learns at the learning rates of networks on images. The weights
    come from torch's global generator.
    """
    return nn.Sequential(_Scale(), nn.Linear(dim, num_classes))


def build_backbone(name: str) -> tuple[nn.Module, int]:
    """Build a proxy model without its classifier, from images to (n, d) features, and return it with d."""
    model = build_proxy_model(name, 1)  # the single class goes with the classifier
    dim = classifier_of(model).in_features
    setattr(model, _classifier_name(model), nn.Identity())
    return model, dim


def classifier_of(model: nn.Module) -> nn.Linear:
    """Return the last layer of a proxy model, from features to logits."""
    return getattr(model, _classifier_name(model))


def _classifier_name(model: nn.Module) -> str:
    return "classifier" if isinstance(model, SmallCNN) else "fc"


class _Scale(nn.Module):
    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings * EMBEDDING_LENGTH


class SmallCNN(nn.Module):
    """Three convolutions and a pooled linear layer: the network that learns most per second of a CPU core.

    It has 380,000 parameters and takes 11 million multiply-adds for a 32×32 image.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # A stem of stride 2: early layers at full resolution cost a CPU most of its time, for memory, not arithmetic.
        self.features = nn.Sequential(
            *_conv_block(3, 64, kernel_size=6, stride=2, padding=2),
            nn.MaxPool2d(2),
            *_conv_block(64, 128),
            nn.MaxPool2d(2),
            *_conv_block(128, 256),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(256, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


def _conv_block(
    num_in: int, num_out: int, kernel_size: int = 3, stride: int = 1, padding: int = 1
) -> tuple[nn.Module, ...]:
    conv = _conv(num_in, num_out, kernel_size, stride, padding)
    return conv, nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)


def _conv(num_in: int, num_out: int, kernel_size: int = 3, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    """Build a convolution that is initialised as torchvision's ResNets are."""
    conv = nn.Conv2d(num_in, num_out, kernel_size, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _imagenet_resnet(depth: int) -> Callable[[int], nn.Module]:
    """Return a builder of torchvision's unchanged ResNet, with a 7×7 stem of stride 2 and a max-pool."""

    def build(num_classes: int) -> nn.Module:
        from torchvision import models  # takes a second to import, which small networks save

        return models.get_model(f"resnet{depth}", weights=None, num_classes=num_classes)

    return build


def _cifar_resnet18(num_classes: int) -> nn.Module:
    """Build ResNet-18 for small images, with a 3×3 stem of stride 1 and no max-pool, as is usual on CIFAR."""
    model = _imagenet_resnet(18)(num_classes)
    model.conv1 = _conv(3, 64)
    model.maxpool = nn.Identity()
    return model


PROXY_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "small_cnn": SmallCNN,
    "resnet18": _cifar_resnet18,
    "resnet18_imagenet": _imagenet_resnet(18),
    "resnet34": _imagenet_resnet(34),
    "resnet50": _imagenet_resnet(50),
}
