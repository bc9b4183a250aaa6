"""The precision of matrix products in training: its names in a config and the dtypes of torch's autocast."""

from typing import Literal, cast

import torch

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """Return the precision for a device: "auto" is bf16 on GPUs and fp32 on CPUs, others stay as they are."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return cast(Precision, precision)
