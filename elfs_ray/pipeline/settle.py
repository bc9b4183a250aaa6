"""Settle what `auto` stands for in a run: the encoder, by the weights that are here, and the rest by the machines.

It is decided once, on the driver, before anything else, and the markers record the decision as if it had been typed. A
run that is resumed keeps it, even where another choice would be made by now.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elfs_ray.config import ClusterConfig, Config, ConfigError, EmbedConfig, PretrainConfig, label_selector
from elfs_ray.methods.encoders.processor import BF16, FP32, INSTALL, OPENVINO, TORCH, common, find_processor
from elfs_ray.pipeline.plan import PlannedStage
from elfs_ray.pipeline.replace import has_written, marker_of
from elfs_ray.runtime.placement import on_nodes
from elfs_ray.stages import cluster, embed, pretrain
from elfs_ray.stages.stage import Stage
from elfs_ray.storage.run_dir import BadMarkerError, Marker, RunDir

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices

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
    if config.embed.runtime == AUTO:
        config = dataclasses.replace(config, embed=_keep_runtime(config.embed, run_dir))
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


def settle_runtime(config: Config, plan: Sequence[PlannedStage], devices: "Devices") -> tuple[Config, list[str]]:
    """Return the config with what is to compute the encoder, and lines about it. Raises ConfigError.

    It needs the machines, and so comes after `settle`, once a cluster has been joined.
    """
    section = config.embed
    is_done = any(planned.stage is embed.STAGE and planned.action == "done" for planned in plan)
    if is_done or section.runtime == TORCH:
        return config, []
    from elfs_ray.methods.encoders.encoder import can_use_openvino

    on_gpus = embed.STAGE.devices(config, devices).resolve(section.device, "embed.device") == "cuda"
    lines = []
    if section.runtime == AUTO and (on_gpus or not can_use_openvino(section.encoder)):
        section = dataclasses.replace(section, runtime=TORCH)
    else:
        with on_nodes(label_selector(config, embed.STAGE.section)[0]):
            section, line = _choose_runtime(section)
        lines.append(line)
    return dataclasses.replace(config, embed=section), lines


def _choose_runtime(section: EmbedConfig) -> tuple[EmbedConfig, str]:
    """Return the section with what all machines can do on their CPUs, and a line about it. Raises ConfigError."""
    from elfs_ray.runtime.tasks import on_every_machine

    processor = common(on_every_machine(find_processor))
    if not processor.has_openvino:
        if section.runtime == OPENVINO:
            raise ConfigError(f"embed.runtime=openvino, and not every machine has OpenVINO: {INSTALL} on each")
        section = dataclasses.replace(section, runtime=TORCH)
        return section, f"runtime   torch; faster on CPUs: OpenVINO, {INSTALL}"
    if section.precision == BF16 and not processor.has_bf16:
        raise ConfigError(
            "embed.precision=bf16, and not every machine's processor has bf16: give embed.precision=fp32, or auto"
        )
    precision = (BF16 if processor.has_bf16 else FP32) if section.precision == AUTO else section.precision
    return dataclasses.replace(section, runtime=OPENVINO, precision=precision), f"runtime   OpenVINO in {precision}"


def _keep_runtime(section: EmbedConfig, run_dir: RunDir) -> EmbedConfig:
    """Return the section with the runtime and precision with which stage embed has begun, if it has."""
    marker = _begun(embed.STAGE, run_dir)
    if marker is None:
        return section
    # Torch in automatic precision leaves no keys.
    runtime = marker.config.get("embed.runtime", TORCH)
    precision = marker.config.get("embed.precision", AUTO) if section.precision == AUTO else section.precision
    return dataclasses.replace(section, runtime=runtime, precision=precision)


def _begun(stage: Stage, run_dir: RunDir) -> Marker | None:
    """Return the marker with which the tables of a stage are made, None if it has written nothing."""
    try:
        marker = marker_of(stage, run_dir)
        return marker if marker and has_written(marker, run_dir) else None
    except NotADirectoryError:  # run_dir is a file: the plan refuses it, and says so better
        return None
    except (BadMarkerError, OSError) as error:
        raise ConfigError(str(error)) from error


def _recorded(stage: Stage, run_dir: RunDir, key: str) -> Any:
    """Return the value of a key with which the tables of a stage are made, None if it has written nothing."""
    marker = _begun(stage, run_dir)
    return marker.config.get(key) if marker else None


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
