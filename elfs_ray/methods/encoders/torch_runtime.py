"""Run an encoder's network by torch, on a CPU or a GPU."""

import numpy as np
import torch
from torch import nn

from elfs_ray.methods.encoders.networks import Preprocessing
from elfs_ray.methods.encoders.processor import BF16


class TorchRuntime:
    """A network on a device; calling it maps (n, s, s, 3) uint8 images to its features, a tensor (n, d).

    precision: fp32, bf16 or auto, which is bf16 on a GPU and fp32 on a CPU; bf16 is used where autocast does.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        is_program: bool,
        precision: str,
    ) -> None:
        self._on_gpu = device.type == "cuda"
        self._in_bf16 = self._on_gpu if precision == "auto" else precision == BF16
        self._device = device
        self._is_program = is_program
        self._network = network
        if not is_program:  # channels last is about twice as fast for convolutions; a program has its layout built in
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, dtype=torch.float32, device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> torch.Tensor:
        # Images reach a GPU as uint8, a quarter of float32's bytes, from pinned memory, so that the host does not wait.
        host = torch.empty(images.shape, dtype=torch.uint8, pin_memory=self._on_gpu)
        host.numpy()[...] = images
        # Images arrive channels last, which is also the fastest layout for convolutions: permute moves no bytes.
        inputs = host.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
        inputs.sub_(self._mean).div_(self._std)
        if self._is_program:
            return self._network(inputs.contiguous())  # an export may have fixed the strides of its input
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._in_bf16):
            return self._network(inputs)
