"""Settle what `auto` stands for in a run: the encoder, by the weights that are here, and profiles, by the devices.

It is decided once, on the driver, before anything else, and the markers record the decision as if it had been typed. A
run that is resumed keeps it, even where another choice would be made by now.
"""

import dataclasses
from typing import Any

from elfs_ray.config import ClusterConfig, Config, ConfigError, EmbedConfig, PretrainConfig
from elfs_ray.pipeline.replace import has_written, marker_of
from elfs_ray.stages import cluster, embed, pretrain
from elfs_ray.stages.stage import Stage
from elfs_ray.storage.run_dir import BadMarkerError, RunDir

AUTO = "auto"


def settle(config: Config, run_dir: RunDir) -> tuple[Config, list[str]]:
    """Return the config with a decision in place of each `auto`, and a line about each. Raises ConfigError.

    run_dir: its markers say what an earlier run has decided.
    """
    lines: list[str] = []
    if config.embed.encoder == AUTO:
        section, line = _settle_encoder(config.embed, run_dir)
        config = dataclasses.replace(config, embed=section)
        lines.append(line)
    if config.pretrain.profile == AUTO:
        profile = "gpu"
        if config.pretrains:
            profile, line = _settle_profile(config, run_dir, pretrain.STAGE, "pretrain.profile", profile)
            lines.append(line)
        config = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, profile=profile))
    if config.cluster.temi.profile == AUTO:
        profile = "paper"
        if config.cluster.method == "temi" and config.needs_clusters:
            profile, line = _settle_profile(config, run_dir, cluster.STAGE, "cluster.temi.profile", profile)
            lines.append(line)
        temi = dataclasses.replace(config.cluster.temi, profile=profile)
        config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, temi=temi))
    return config, lines


def _recorded(stage: Stage, run_dir: RunDir, key: str) -> Any:
    """Return the value of a key with which the tables of a stage are made, None if it has written nothing."""
    try:
        marker = marker_of(stage, run_dir)
        return marker.config.get(key) if marker and has_written(marker, run_dir) else None
    except BadMarkerError as error:
        raise ConfigError(str(error)) from error


def _settle_encoder(section: EmbedConfig, run_dir: RunDir) -> tuple[EmbedConfig, str]:
    from elfs_ray.methods.encoders.choice import CANDIDATES, choose, describe

    if section.weights is not None:
        raise ConfigError(f"embed.weights={section.weights} with embed.encoder=auto: say which encoder they are of")
    name = _recorded(embed.STAGE, run_dir, "embed.encoder")
    if name is None:
        try:
            chosen = choose()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        name, line = chosen.name, describe(chosen)
    else:
        line = f"{name}, with which this run has begun"
    sizes = {candidate.name: candidate.image_size for candidate in CANDIDATES}
    size = section.image_size or sizes.get(name)
    return dataclasses.replace(section, encoder=name, image_size=size), f"encoder   {line}"


def _settle_profile(config: Config, run_dir: RunDir, stage: Stage, key: str, on_gpus: str) -> tuple[str, str]:
    """Return the profile of a stage that the run has, and a line about it."""
    profile = _recorded(stage, run_dir, key)
    if profile is not None:
        return profile, f"profile   {key}={profile}, with which this run has begun"
    from elfs_ray.runtime.cluster import find_devices

    devices = stage.devices(config, find_devices(config.ray_address))
    section: PretrainConfig | ClusterConfig = getattr(config, stage.section)
    profile = on_gpus if devices.resolve(section.device, f"{stage.section}.device") == "cuda" else "cpu"
    return profile, f"profile   {key}={profile}, for {devices.describe()}"
