"""Measure the training of a network on this machine, for the estimates of stages pretrain and train."""

import resource

import torch

from elfs_ray.methods.training.networks import build_proxy_model
from elfs_ray.runtime.resources import Request
from elfs_ray.stages.estimate import in_worker, rate_of, require_local_gpus

MAX_BATCH = 256
NUM_CLASSES = 10  # of the measured network; the last layer takes next to nothing of the time


def measure_training(request: Request, network: str, image_size: int) -> tuple[float, float]:
    """Return images a second of all workers of a request, and the bytes of one beside its data.

    Raises RuntimeError where it cannot be measured.
    """
    if request.gpus:
        require_local_gpus()
    rate, memory = in_worker(train_steps, network, image_size, request.cpus, request.device)
    return rate * request.most, memory


def train_steps(network: str, image_size: int, num_threads: int, device: str) -> tuple[float, float]:
    """Train on random images for about two seconds; return images a second and the peak memory of this process."""
    torch.set_num_threads(num_threads)
    model = build_proxy_model(network, NUM_CLASSES)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(number: int) -> None:
        images = torch.rand(number, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
        targets = torch.zeros(number, dtype=torch.long, device=device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU

    rate = rate_of(step, MAX_BATCH)
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
