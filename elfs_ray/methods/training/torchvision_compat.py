"""Make torchvision importable where its compiled operators do not load; import this module before torchvision.

torchvision's wheel on PyPI links CUDA libraries. With a CPU build of torch its extension cannot be loaded, and `import
torchvision` fails as it registers shape functions for two operators that were never declared. Declaring their schemas
first is enough: models and transforms work, while ops.nms and the image decoders still do not. It happens at import,
as every process that unpickles one of our functions must be ready before the function runs.
"""

import importlib.machinery
import importlib.util
import logging
import sys
from pathlib import Path

import torch

_logger = logging.getLogger(__name__)


def _extension_is_broken() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or spec is None or spec.origin is None:
        return False
    return not any(_loads(extension) for extension in find_extensions(Path(spec.origin).parent))


def find_extensions(package: Path) -> list[Path]:
    """Return the files of torchvision's operators, called `_C` up to version 0.28 and `_C_stable` from 0.29 on."""
    # No file may be missed: declaring an operator that the extension also declares ends the process.
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return sorted(path for path in package.glob("_C*") if path.name.endswith(suffixes))


def _loads(extension: Path) -> bool:
    try:
        torch.ops.load_library(extension)
    except OSError as error:
        _logger.info("torchvision's compiled operators do not load beside torch %s: %s", torch.__version__, error)
        return False
    return True


def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


# The declarations live as long as this object does.
_library = _declare_operators() if _extension_is_broken() else None
