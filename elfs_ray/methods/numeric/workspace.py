"""Buffers that loops over chunks of rows use again and again."""

import math

import torch


class Workspace:
    """Named tensors whose memory is reused from chunk to chunk.

    By default glibc returns large blocks to the OS as soon as they are free, and the OS clears every page of the next
    one: on a CPU that costs more than a pass over the rows.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._held: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor, valid until the next call with that name."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < size or held.dtype != dtype:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
        return held[:size].view(shape)

    def copy(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of values in another dtype, valid until the next call with that name."""
        # On a CPU torch converts float16 to float64 by way of float32 2.5 times faster than directly.
        if values.dtype == torch.float16 and dtype == torch.float64:
            values = self.copy(f"{name}, float32", values, torch.float32)
        return self.tensor(name, tuple(values.shape), dtype).copy_(values)
