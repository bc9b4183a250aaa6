"""Export a coreset of a finished run to another tool's format."""

import os
from collections.abc import Mapping
from pathlib import Path

from elfs_ray.config import ConfigError
from elfs_ray.handover.coreset import read_coreset
from elfs_ray.handover.format import Format
from elfs_ray.handover.formats import FORMATS
from elfs_ray.handover.places import mapped, with_copies
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir


def export(
    run_dir: str | os.PathLike[str] | RunDir,
    to: str,
    out: str | Path | None = None,
    *,
    coreset: str = "coreset",
    map: Mapping[str, str] | None = None,
    root: str | None = None,
    copies: str | Path | None = None,
) -> str:
    """Write a coreset of a finished run in another tool's format; return the path of the file or folder.

    to: label-studio, cvat, fiftyone, huggingface, csv, copy or webdataset.
    out: the file or folder to write, which must not exist; by default export/<coreset>/... in the run directory.
    coreset: "coreset", "coreset-0.3" for a further budget, "round2" or "round2/coreset-0.3" of a later selection.
    map: prefixes of uris, and by what the tool knows them: {"/home/me/photos": "/data/photos"}.
    root: the folder or bucket that the tool reads from: Label Studio's document root, the top of CVAT's share.
    copies: a folder that `to="copy"` wrote: the images are these files.

    Raises ConfigError for what cannot be exported, before anything is written; ValueError for an image that is gone.
    """
    run_dir = run_dir if isinstance(run_dir, RunDir) else RunDir(run_dir)
    chosen = _format(to)
    _refuse_useless(chosen, map, root, copies)
    try:
        selected = read_coreset(run_dir, coreset)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    if copies is not None:
        selected = with_copies(selected, os.fspath(copies))
    if map:
        selected = mapped(selected, map)
    target = filesystem.absolute(os.fspath(out)) if out is not None else filesystem.join(selected.folder, chosen.target)
    if filesystem.exists(target):
        raise ConfigError(f"{target} exists: delete it, or give another out")
    try:
        chosen.write(selected, target, root)
    except BaseException:  # Ctrl-C, too: nothing half-written is left
        filesystem.delete(target)
        raise
    return target


def _format(name: str) -> Format:
    for known in FORMATS:
        if known.name == name:
            return known
    raise ConfigError(f"to={name!r} is no format: give one of {', '.join(known.name for known in FORMATS)}")


def _refuse_useless(chosen: Format, map: object, root: object, copies: object) -> None:
    """Raise ConfigError for options that the format has no use for: the user expects another result."""
    if root is not None and not chosen.root:
        raise ConfigError(f"root={root!r} means nothing to {chosen.name}: leave it out")
    if not chosen.takes_places and (map or copies):
        raise ConfigError(f"map and copies mean nothing to {chosen.name}, which holds the images: leave them out")
