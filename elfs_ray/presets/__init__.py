"""Settings for kinds of pools, each a YAML file of this folder: photos for your own images, the others as in the paper.

`elfs-ray select --preset=<name>` starts from one, and key=value overrides what it sets.
"""

from difflib import get_close_matches
from pathlib import Path

from elfs_ray.config import ConfigError

DEFAULT = "photos"
NAMES = (DEFAULT, *sorted(path.stem for path in Path(__file__).parent.glob("*.yaml") if path.stem != DEFAULT))


def preset(name: str) -> Path:
    """Return the YAML file of a preset, for `load_config`. Raises ConfigError for an unknown name."""
    if name not in NAMES:
        close = get_close_matches(name, NAMES, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise ConfigError(f"no preset named {name!r}{hint}: must be one of {', '.join(NAMES)}")
    return Path(__file__).parent / f"{name}.yaml"
