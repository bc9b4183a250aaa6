"""embed: a unit-length vector for every image, and a small copy for the proxy network."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from elfs_ray.config import SELF_SUPERVISED, Config, ConfigError, check_against_pool
from elfs_ray.methods.encoders.processor import OPENVINO
from elfs_ray.runtime.resources import Request, request_workers
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.stage import Result, Stage
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices

MAX_ENLARGEMENT = 2  # of images, compared with the size that a self-supervised encoder was trained on


@dataclass(frozen=True)
class EmbedResult(Result):
    """The images embedded and rejected, the dimension of an embedding, and facts about the weights file, if any."""

    stage: ClassVar[str] = "embed"
    rows: int
    rejected: int
    dim: int
    weights: Mapping[str, Any] | None = None


def num_selectable(run_dir: RunDir) -> int:
    """Return the number of embedded images that are still in the pool. Memory: 8 bytes an image gone or rejected."""
    num_embedded = EmbedResult.read(run_dir).rows
    if not IndexResult.read(run_dir).gone:
        return num_embedded
    gone, rejected = (run_dir.read_column(table, column=schema.SAMPLE_ID) for table in (schema.GONE, schema.REJECTED))
    return num_embedded - len(np.setdiff1d(gone, rejected, assume_unique=True))


def _tables(config: Config) -> tuple[str, ...]:
    # With pretraining, stage copy has written them.
    copies = (schema.PROXY_IMAGES,) if config.keeps_copies and not config.pretrains else ()
    return (schema.EMBEDDINGS, *copies, schema.REJECTED)


def _describe(config: Config, num_samples: int) -> str:
    if config.pretrains:
        return f"{config.embed.encoder}, of the copies"
    copies = f"proxy copies of {config.embed.proxy_image_size} pixels" if config.keeps_copies else "no copies"
    return f"{config.embed.encoder}, {copies}"


def request_encoders(config: Config, devices: "Devices") -> Request:
    """Return the workers that embed, each with one encoder. Raises ConfigError for a GPU where OpenVINO computes."""
    embed = config.embed
    device = embed.device
    if embed.runtime == OPENVINO:
        if device == "cuda":
            raise ConfigError(
                "embed.device=cuda, and embed.runtime=openvino, which is for CPUs: give embed.device=cpu, or "
                "embed.runtime=torch, which makes other embeddings"
            )
        device = "cpu"
    return request_workers(
        devices,
        "embed",
        "encoder",
        device=device,
        num_workers=embed.num_workers,
        usual=devices.num_cpus,
        cpus=embed.cpus_per_worker or 1,
        memory_gib=embed.memory_gib,
    )


def _check(config: Config) -> None:
    """Raise ConfigError for an encoder that cannot be loaded, or weights out of reach. Fetches those in a bucket."""
    if config.pretrains:  # this run has yet to train the weights
        return
    from elfs_ray.methods.encoders.encoder import check_encoder, encoder_input, reach_weights

    embed = config.embed
    file = embed.weights_file
    with filesystem.local_file(file) if file is not None else nullcontext(embed.weights) as weights:
        try:
            check_encoder(embed.encoder, weights, embed.weights_sha256, embed.runtime)
            if weights is None:
                reach_weights(embed.encoder)
        except (ValueError, ConnectionError) as error:
            keys = f"embed.encoder={embed.encoder}" + (f", embed.weights={embed.weights}" if embed.weights else "")
            raise ConfigError(f"{keys}: {error}") from error
        if embed.encoder == SELF_SUPERVISED and embed.image_size is not None:
            trained_on = encoder_input(embed.encoder, weights=weights).crop
            if embed.image_size > MAX_ENLARGEMENT * trained_on:
                raise ConfigError(
                    f"embed.image_size={embed.image_size}: the encoder of embed.weights was trained on images of "
                    f"{trained_on} pixels, and its features of such large images are poor; give embed.image_size=null "
                    f"for the size that it was trained on, or a size up to {MAX_ENLARGEMENT * trained_on}"
                )


def _check_result(config: Config, run_dir: RunDir) -> None:
    check_against_pool(config, num_selectable(run_dir), EmbedResult.read(run_dir).rejected)


STAGE = Stage(
    result=EmbedResult,
    section="embed",
    global_keys=(),
    is_estimated=True,
    grows=True,
    inputs=lambda config: ("index", "copy", "pretrain") if config.pretrains else ("index",),
    tables=_tables,
    describe=_describe,
    requests=lambda config, devices: [request_encoders(config, devices)],
    check=_check,
    check_result=_check_result,
)
