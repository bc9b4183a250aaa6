"""Select again from a finished run, in seconds, with another budget, hard fraction, score or method.

The coreset is written to coresets/<name>/ in the run directory. Keys that you leave out stay as in the run. Example:

    python jobs/reselect.py run_dir=runs/quickstart name=el2n select.score=el2n budget=0.1
"""

# This file is not called select.py: that would hide the standard library's module `select` from scripts in this folder.
import sys

from elfs_ray.cli import asks_for_help, coreset_lines, report_errors, split_arguments
from elfs_ray.config import describe_keys
from elfs_ray.pipeline import reselect


def help_text() -> str:
    """Return the text of --help: every key that a selection accepts. Defaults are those of the run."""
    lines = [str(__doc__), "usage: python jobs/reselect.py [--dry-run] [--help] run_dir=... name=... key=value ...", ""]
    lines += ["--dry-run  check everything, print what would be written, do nothing", ""]
    lines += [f"{'name':<22}  name of the selection; its coresets go to coresets/<name>/"]
    for key, _, meaning in describe_keys():
        if key in reselect.KEYS or key.startswith("select."):
            lines.append(f"{key:<22}  {meaning}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if asks_for_help(arguments):
        print(help_text())
        return
    options, overrides = split_arguments(arguments)
    config, name = reselect.load(overrides)
    if options:
        print(reselect.describe(config, name))
        return
    for table, coreset in reselect.run(config, name).coresets.items():
        print("\n".join(coreset_lines(reselect.folder_of(config, name), table, coreset)))


if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(sys.argv[1:])))
