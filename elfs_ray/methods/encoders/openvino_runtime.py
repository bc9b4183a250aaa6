"""Run an encoder's network by OpenVINO, which is faster than torch on CPUs.

One thread of a processor with AVX2 encodes 2.6 times as many images by EfficientNet-lite0 as torch, and 1.2 times as
many by a ViT-S/16, whose large matrix products torch does well already.
"""

import threading
import warnings
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from elfs_ray.methods.encoders.networks import Preprocessing
from elfs_ray.methods.encoders.processor import BF16, INSTALL

# Images in one forward pass: 8 to 32 were about equally fast, 64 slower. The number is fixed, and a smaller batch is
# filled up, because kernels are chosen by shape: so an image's features do not depend on its batch.
BATCH_SIZE = 16


class _FromBytes(nn.Module):
    """A network together with its preprocessing: OpenVINO merges both into fewer passes over the memory."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)


class OpenVinoRuntime:
    """A network compiled for this CPU; calling it maps (n, s, s, 3) uint8 images to features, a tensor (n, d).

    precision: fp32, or bf16, which a processor without it replaces by fp32. num_threads: how many threads may call it
    at the same time; each computes with torch's number of threads. Raises ValueError where OpenVINO is not installed or
    cannot take the network.
    """

    def __init__(
        self, network: nn.Module, preprocessing: Preprocessing, image_size: int, *, precision: str, num_threads: int = 1
    ) -> None:
        if find_spec("openvino") is None:
            raise ValueError(f"embed.runtime=openvino, and this machine has no OpenVINO: {INSTALL}, on every machine.")
        self._shape = (BATCH_SIZE, image_size, image_size, 3)
        self._compiled = _compile(_FromBytes(network, preprocessing).eval(), self._shape, precision, num_threads)
        self._of_thread = threading.local()  # a request is for one thread

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._compiled.create_infer_request()
        parts = []
        for start in range(0, len(images), BATCH_SIZE):
            part = images[start : start + BATCH_SIZE]
            batch = np.zeros(self._shape, np.uint8)
            batch[: len(part)] = part
            # Copied: the next batch is computed into the same memory.
            parts.append(self._of_thread.request.infer([batch])[0][: len(part)].copy())
        return torch.from_numpy(np.concatenate(parts))


def _compile(network: nn.Module, shape: tuple[int, ...], precision: str, num_threads: int):
    """Return a network compiled for as many requests at once as threads. Takes two to five seconds."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    try:
        # By hand, as openvino.convert_model would send usage data to its makers. With a whole batch, because a network
        # may turn the batch's size into a constant while it is traced.
        with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
            traced = torch.jit.trace(network, torch.zeros(shape, dtype=torch.uint8), check_trace=False)
            decoder = TorchScriptPythonDecoder(traced)  # a name for it: OpenVINO does not keep it alive
            frontend = FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))
        model.reshape(list(shape))
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == BF16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads() * num_threads,
            "NUM_STREAMS": num_threads,
        }
        return openvino.Core().compile_model(model, "CPU", settings)
    except Exception as error:  # torch and OpenVINO raise several kinds for what they cannot trace or convert
        if "KeyboardInterrupt" in str(error):  # which OpenVINO, called back by C++, wraps into its own
            raise KeyboardInterrupt from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"OpenVINO cannot take this encoder: {reason}. Give embed.runtime=torch.") from error
