"""See what a machine offers to encoders on its CPUs. Importing this module imports neither torch nor OpenVINO."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

TORCH, OPENVINO = "torch", "openvino"
FP32, BF16 = "fp32", "bf16"
INSTALL = "pip install 'elfs-ray[cpu-fast]'"


@dataclass(frozen=True)
class Processor:
    """Whether OpenVINO is installed on a machine, and whether it computes in bf16 on the machine's processor."""

    has_openvino: bool
    has_bf16: bool


def find_processor() -> Processor:
    """Return what this machine has."""
    if importlib.util.find_spec("openvino") is None:
        return Processor(has_openvino=False, has_bf16=False)
    from openvino import Core

    # OpenVINO lists bf16 for processors with instructions for it, not for those on which it is emulated.
    return Processor(has_openvino=True, has_bf16="BF16" in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def common(processors: Sequence[Processor]) -> Processor:
    """Return what all of some machines have: every worker must compute alike."""
    return Processor(
        has_openvino=all(processor.has_openvino for processor in processors),
        has_bf16=all(processor.has_bf16 for processor in processors),
    )
