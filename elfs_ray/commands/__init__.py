"""The commands of `elfs-ray`, each a file of this folder with `main(arguments)`, and a line in `COMMANDS`.

The script `elfs-ray`, `python -m elfs_ray` and the scripts in jobs/ call `main`.
"""

import importlib
import sys
from difflib import get_close_matches

from elfs_ray.cli import report_errors
from elfs_ray.config import ConfigError
from elfs_ray.version import __version__

COMMANDS = {
    "select": "choose which images of a pool to label",
    "reselect": "choose again from a finished run, in seconds",
    "evaluate": "train on coresets with their true labels, beside random images and other baselines",
    "export": "hand a coreset over to a labelling tool: Label Studio, CVAT, FiftyOne and others",
    "report": "write the report page of a finished run again",
    "prepare": "turn a published benchmark into pools",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command with the arguments of the command line, or with `arguments`; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return report_errors(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        # Only now: --help and the other commands do not wait for what this one imports.
        importlib.import_module(f"elfs_ray.commands.{name}").main(rest)
    else:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"must be one of {', '.join(COMMANDS)}; see --help"
        raise ConfigError(f"no command named {name!r}: {hint}")


def overview() -> str:
    """Return the text of `elfs-ray --help`: the commands."""
    lines = ["Choose which images of an unlabelled pool to label.", "", "    elfs-ray select photos --budget 200", ""]
    lines += [f"{name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join([*lines, "", "`elfs-ray COMMAND --help` says more."])
