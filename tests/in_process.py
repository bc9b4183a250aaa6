"""Stages index and embed without Ray: tasks and encoders run one after the other in this process."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from elfs_ray.config import Config
from elfs_ray.methods.encoders.processor import TORCH
from elfs_ray.pipeline import runner
from elfs_ray.stages.embed import run as embed
from elfs_ray.stages.index import run as index
from elfs_ray.storage.run_dir import RunDir


def run_here(monkeypatch, config: Config) -> RunDir:
    """Run the pipeline up to stage embed, as the runner does."""
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_connect", lambda config: None)
        patch.setattr(runner, "_settle_runtime", lambda config, plan: _with_torch(config))
        patch.setattr(runner, "_announce_requests", lambda plan, config: None)
        patch.setattr(runner, "_warn_of_days", lambda config, run_dir, plan: None)
        patch.setattr(runner, "_watch", lambda stage, config: contextlib.nullcontext())
        patch.setattr(index, "run_tasks", _run_tasks)
        patch.setattr(embed, "_stream", _stream)
        patch.setattr(embed, "report_rejected", lambda count: None)
        return runner.run(config)


def _with_torch(config: Config) -> Config:
    return replace(config, embed=replace(config.embed, runtime=TORCH))


def _run_tasks(function: Callable[..., Any], arguments: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
    for position, each in enumerate(arguments):
        yield position, function(*each)


def _stream(job: embed.EmbedJob, blocks: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    encoder = embed._DecodeAndEncodeBlock(job, "cpu")
    for first, last in blocks:
        summary = encoder({"first": [first], "last": [last]})
        yield {name: values[0] for name, values in summary.items()}
