"""What the stages that train networks share: readers, worker groups on Ray Train, checkpoints, epoch logs."""

from elfs_ray.config import ConfigError


def check_network(key: str, network: str, *others: str) -> None:
    """Raise ConfigError for a network that is neither one on images nor among `others`."""
    from elfs_ray.methods.training.networks import PROXY_MODELS  # imports torch

    known = (*PROXY_MODELS, *others)
    if network not in known:
        raise ConfigError(f"{key}={network!r}: must be one of {', '.join(known)}")
