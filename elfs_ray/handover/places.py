"""Say where a tool reads the images of a coreset: at their uris, below another prefix, or as copies."""

import posixpath
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import pyarrow as pa
from pyarrow import csv

from elfs_ray.config import ConfigError
from elfs_ray.handover.coreset import Coreset
from elfs_ray.pool.parquet import container_of
from elfs_ray.storage import filesystem, schema

COPIES_FILE = "coreset.csv"
FILE = "file"


def with_copies(coreset: Coreset, folder: str) -> Coreset:
    """Return a coreset whose images are the files that `--to copy` wrote into a folder.

    Raises ConfigError where the folder has no such copies, or not those of every image.
    """
    path = filesystem.join(filesystem.absolute(folder), COPIES_FILE)
    try:
        table = csv.read_csv(pa.BufferReader(filesystem.read_bytes(path)))
        files = dict(zip(table[schema.URI].to_pylist(), table[FILE].to_pylist(), strict=True))
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise ConfigError(f"copies={folder!r} is no folder that --to copy has written: {error}") from error
    uris = coreset.rows[schema.URI].to_pylist()
    missing = [uri for uri in uris if uri not in files]
    if missing:
        raise ConfigError(
            f"copies={folder!r} has no copies of {len(missing):,} images, such as {missing[0]}: export this coreset "
            "with --to copy into another folder, and give that"
        )
    root = filesystem.absolute(folder)
    return coreset.at(tuple(filesystem.join(root, files[uri]) for uri in uris))


def mapped(coreset: Coreset, prefixes: Mapping[str, str]) -> Coreset:
    """Return a coreset whose images lie below other prefixes, such as {"/home/me/photos": "s3://bucket/photos"}.

    Raises ConfigError for a prefix that no image lies below.
    """
    places = list(coreset.places)
    for old, new in prefixes.items():
        folder = filesystem.absolute(old).rstrip("/") + "/"
        below = [position for position, place in enumerate(places) if place.startswith(folder)]
        if not below:
            raise ConfigError(f"map={old}={new}: no image lies below {folder}; the first one is {places[0]}")
        for position in below:
            rest = places[position].removeprefix(folder)
            # In a URL of the web, spaces and # have a meaning; in a bucket or on a disk they are part of the name.
            is_url = new.startswith(("http://", "https://"))
            places[position] = posixpath.join(new, quote(rest) if is_url else rest)
    return coreset.at(tuple(places))


def refuse_containers(coreset: Coreset, tool: str) -> None:
    """Raise ConfigError for images inside tars and Parquet files, which no tool can open by a path."""
    inside = [place for place in coreset.places if container_of(place) is not None]
    if inside:
        raise ConfigError(
            f"{tool} cannot open images inside Parquet files or tars, such as {inside[0]}: export with --to copy "
            "--out FOLDER first, then with --copies FOLDER"
        )


def relative_places(coreset: Coreset, root: str) -> list[str]:
    """Return the places relative to the folder or bucket `root`. Raises ConfigError for one that is not below it."""
    folder = filesystem.absolute(root).rstrip("/") + "/"
    outside = [place for place in coreset.places if not place.startswith(folder)]
    if outside:
        raise ConfigError(
            f"root={root!r} does not hold {outside[0]}: give the folder or bucket from which the tool reads the "
            "images, or --map FROM=TO if it sees them elsewhere"
        )
    return [place.removeprefix(folder) for place in coreset.places]


def common_folder(places: Sequence[str]) -> str:
    """Return the deepest folder that holds all places. Raises ConfigError for places in several buckets."""
    folder = posixpath.commonprefix(list(places)).rpartition("/")[0] or "/"
    if folder.endswith(":/"):
        raise ConfigError("the images lie in several buckets: give root=, or map those of one to the other")
    return folder
