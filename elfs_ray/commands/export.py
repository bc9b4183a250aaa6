"""Hand a coreset over to a labelling tool or a trainer."""

from difflib import get_close_matches

from elfs_ray.cli import read_arguments
from elfs_ray.config import ConfigError, expand_home
from elfs_ray.handover.formats import FORMATS

KEYS = {
    "to": "the format, see below",
    "out": "file or folder to write, which must not exist; default: export/<coreset>/... in the run directory",
    "coreset": "coreset-0.3 for a further budget, round2 for a selection by reselect; default: the run's",
    "map": "FROM=TO, where the tool knows the images below FROM by another path or address; may be repeated",
    "root": "the folder or bucket from which the tool reads; see below",
    "copies": "a folder that --to copy has written: the tool reads these files",
}
EXAMPLES = """\
    elfs-ray export elfs-ray/photos --to label-studio --root /data
    elfs-ray export elfs-ray/photos --to cvat --map /home/me/photos=/data/photos --root /data
    elfs-ray export elfs-ray/photos --to copy --out to-label --coreset round2"""


def main(arguments: list[str]) -> None:
    """Write an export and print where it is, or explain the command."""
    typed = read_arguments(arguments, {"run_dir", *KEYS}, positional="run_dir")
    if typed.help:
        print(help_text())
        return
    if typed.dry_run:
        raise ConfigError("unknown option --dry-run: an export replaces nothing")
    values, prefixes = _read_values(typed.overrides)
    # Late, as it imports torch, for which --help should not wait.
    from elfs_ray.handover.export import export

    run_dir, to = values.pop("run_dir"), values.pop("to")
    print(f"exported {export(run_dir, to, map=prefixes, **values)}")


def _read_values(overrides: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the values by key, and the prefixes of --map. Raises ConfigError for unknown, missing and doubled ones."""
    values: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in ("run_dir", *KEYS):
            close = get_close_matches(key, KEYS, n=1)
            hint = f", did you mean {close[0]}?" if close else f": give {', '.join(KEYS)}"
            raise ConfigError(f"unknown key {key}{hint}")
        if key == "map":
            old, equals, new = value.partition("=")
            if not (old and equals and new):
                raise ConfigError(f"map={value!r}: give FROM=TO, such as /home/me/photos=/data/photos")
            prefixes[expand_home(old)] = new
        else:
            values[key] = expand_home(value) if key in ("run_dir", "out", "root", "copies") else value
    for key, example in (("run_dir", "elfs-ray export RUN_DIR ..."), ("to", "--to label-studio")):
        if not values.get(key):
            raise ConfigError(f"no value for {key}: give {example} (--help lists the formats)")
    return values, prefixes


def help_text() -> str:
    """Return the text of --help: the options, the formats, and what --root means to each."""
    lines = [str(__doc__), "", "usage: elfs-ray export RUN_DIR --to FORMAT [--out PATH] ...", ""]
    lines += [f"--{key:<8}  {meaning}" for key, meaning in KEYS.items()]
    lines += ["", "formats:"]
    for known in FORMATS:
        lines.append(f"{known.name:<12}  {known.meaning}")
        lines += [f"{'':<12}  --root: {known.root}"] if known.root else []
    return "\n".join([*lines, "", EXAMPLES])
