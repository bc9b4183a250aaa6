"""Makes torchvision importable where its compiled operators do not load; import this module before torchvision.

torchvision's wheel on PyPI links CUDA libraries. Beside a CPU build of torch its extension cannot be loaded, and
`import torchvision` fails as it registers shape functions for two operators that nobody declared. Declaring their
schemas first is enough: models and transforms work, while ops.nms and the image decoders still do not. It happens
at import, as every process that unpickles a function of ours has to be ready before the function runs.
"""

import importlib.machinery
import importlib.util
import logging
import os
import sys

import torch

_logger = logging.getLogger(__name__)


def _extension_is_broken() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or spec is None or spec.origin is None:
        return False
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(os.path.dirname(spec.origin), loader).find_spec("_C")
    if extension is None or extension.origin is None:
        return True
    try:
        torch.ops.load_library(extension.origin)
    except OSError as error:
        _logger.info("torchvision's compiled operators do not load beside torch %s: %s", torch.__version__, error)
        return True
    return False


def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


# The declarations live as long as this object does.
_library = _declare_operators() if _extension_is_broken() else None
