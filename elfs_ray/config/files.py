"""The files that keys name and stages read: their content decides a stage's result as the keys do."""

import dataclasses
import hashlib
from typing import Any

from elfs_ray.config.declaration import ConfigError
from elfs_ray.storage import filesystem

DIGEST = ".sha256"  # ends the name under which a marker holds the digest of the file that a key names


def digests_of_files(section: Any, name: str) -> dict[str, str]:
    """Return the SHA-256 of each file that the keys of a section name and stages read, as "<section>.<key>.sha256".

    Raises ConfigError for a file that cannot be read.
    """
    digests = {}
    for spec in dataclasses.fields(section):
        path, key = getattr(section, spec.name), f"{name}.{spec.name}"
        if not spec.metadata.get("is_file") or path is None:
            continue
        try:
            digests[key + DIGEST] = hashlib.sha256(filesystem.read_bytes(path)).hexdigest()
        except FileNotFoundError as error:
            raise ConfigError(f"{key}={path!r} does not exist") from error
        except OSError as error:
            raise ConfigError(f"{key}={path!r} cannot be read: {error}") from error
    return digests
