"""Weights files of image encoders: check, read and load them."""

import argparse
import dataclasses
import hashlib
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Keys under which training scripts keep the network in a checkpoint. Averaged weights, the better encoder, come first.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")
_TRAINED_ENCODER = "elfs_ray encoder, format"
_WRAPPER_PREFIX = re.compile(r"^(?:(?:module|_orig_mod|backbone)\.)+")


def check_sha256(path: Path, expected: str) -> None:
    """Compare a file with its SHA-256: all 64 hex digits, or the first ones as in `resnet50-11ad3fa6.pth`.

    Raises ValueError where they differ.
    """
    actual = sha256_of(path)
    if not actual.startswith(expected.lower()):
        raise ValueError(
            f"The weights file {path} has SHA-256 {actual}, but {expected} was expected: it is damaged, incomplete or "
            "another file. Download it again, or correct the hash."
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint, without the wrappers of training scripts. Code in the file is never run.

    Raises ValueError where the file holds no tensors by name, or anything but plain data.
    """
    checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    while isinstance(checkpoint, Mapping):
        inner = next((checkpoint[key] for key in _WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            break
        checkpoint = inner
    named = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
    tensors = OrderedDict((_unwrapped(key), value) for key, value in named if isinstance(value, torch.Tensor))
    if not tensors:
        raise ValueError(
            f"{path} holds no state dict; it must hold tensors by parameter name, at the top or under one of "
            f"{', '.join(_WRAPPERS)}. Save them with torch.save(model.state_dict(), path)."
        )
    # Layers read the version of their format from the metadata: old batch norms lack a counter, old MNASNets have other
    # widths. Without it their files would not load.
    versions = getattr(checkpoint, "_metadata", {})
    stripped = {_unwrapped(f"{key}.").rstrip("."): version for key, version in versions.items()}
    tensors._metadata = stripped  # type: ignore[attr-defined]
    return tensors


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder that a run trained on its pool, with its origin.

    network: a name of methods/training/networks.py. image_size (pixels), mean and std (0 to 1, per channel): the input
    that it was trained on. config: the keys and library versions of the stage that trained it. pool: a hash of how the
    pool was listed and copied, and of its number of files and bytes.
    """

    network: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: Mapping[str, Any]
    pool: str
    state_dict: Mapping[str, torch.Tensor]

    def to_bytes(self) -> bytes:
        """Return the file's content: plain data, which is read without running code."""
        fields = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        buffer = io.BytesIO()
        torch.save({_TRAINED_ENCODER: 1, **fields, "config": dict(self.config)}, buffer)
        return buffer.getvalue()


def read_trained_encoder(path: Path) -> TrainedEncoder:
    """Read a file of `TrainedEncoder.to_bytes`. Raises ValueError for any other file."""
    content = _read_pickle(path)
    if not isinstance(content, Mapping) or content.get(_TRAINED_ENCODER) != 1:
        raise ValueError(
            f"{path} is not an encoder that was trained on a pool; give the encoder.pt in pretrain/ of a run directory"
        )
    return TrainedEncoder(**{spec.name: content[spec.name] for spec in dataclasses.fields(TrainedEncoder)})


def drop_heads(state_dict: dict[str, torch.Tensor], heads: Iterable[str], keep: Container[str] = ()) -> None:
    """Remove the parameters of the modules named in `heads` from a state dict, except those named in `keep`."""
    prefixes = tuple(f"{head}." for head in heads)
    for key in [key for key in state_dict if key.startswith(prefixes) and key not in keep]:
        del state_dict[key]


def load_strictly(network: nn.Module, state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load a state dict in place. Raises ValueError unless its names and shapes are exactly the network's."""
    try:
        result = network.load_state_dict(state_dict, strict=False)
    except (RuntimeError, ValueError) as error:
        raise unfit(path, " ".join(str(error).split())) from error
    problems = [
        f"{len(keys)} {what}, such as {', '.join(keys[:3])}"
        for what, keys in (("missing", result.missing_keys), ("unknown to the network", result.unexpected_keys))
        if keys
    ]
    if problems:
        raise unfit(path, "; ".join(problems))


def unfit(path: Path, problem: str) -> ValueError:
    """Return the error for weights that do not fit their network."""
    return ValueError(
        f"The weights in {path} do not fit the encoder: {problem[:600]}. Name the encoder that they were trained as."
    )


def _unwrapped(key: object) -> str:
    return _WRAPPER_PREFIX.sub("", str(key))


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"{path} needs the safetensors package: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}. Download it again.") from error


def _read_pickle(path: Path) -> object:
    try:
        # Training scripts often save their arguments with the weights. A Namespace only holds attributes and is safe.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as plain weights: it is not a checkpoint, or holds objects whose loading could run "
            "code. If you trust it, load it and save its tensors alone with torch.save(model.state_dict(), path)."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {str(error)[:300]}. Download it again.") from error
