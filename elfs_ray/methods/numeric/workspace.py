"""Memory for one chunk of rows after the other."""

import math

import torch


class Workspace:
    """Tensors that are used again from chunk to chunk.

    A C library gives large blocks back to the system as soon as they are free, and every page of the next one has to be
    cleared again: on a CPU that costs more than a pass over the rows.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._held: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with anything in it; it holds until the next call with that name."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < size or held.dtype != dtype:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
        return held[:size].view(shape)

    def copy(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values in another dtype; on a CPU float16 becomes float64 2.5 times faster by way of float32."""
        if values.dtype == torch.float16 and dtype == torch.float64:
            values = self.copy(f"{name}, float32", values, torch.float32)
        return self.tensor(name, tuple(values.shape), dtype).copy_(values)
