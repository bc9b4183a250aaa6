"""Select again from a finished run, in seconds, with another budget, hard fraction, score or method."""

from elfs_ray.cli import coreset_lines, read_arguments
from elfs_ray.config import Config, describe_keys, fields_of
from elfs_ray.pipeline import reselect
from elfs_ray.stages.report import ReportResult
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir

HELP = """\
Choose again from a finished run, in seconds, with another budget, method or seed.

usage: elfs-ray reselect RUN_DIR name=NAME [--dry-run] [key=value ...]

RUN_DIR     the run directory of a finished run (or run_dir=...)
name=       the name of the selection: its coresets go to coresets/<name>/ in the run directory
--dry-run   check everything, print what would be written, do nothing
--help-all  list every key that a selection accepts

budget=200                another budget, or a list such as [50,200]
select.labelled=FILE      images that are labelled already: the budget is the next ones
select.method=coverage    another method, score (select.score) or hard fraction (select.hard_fraction)
seed=1                    another seed
on_change=rerun           replace a selection of this name

Keys that you leave out stay as in the run. The next 200 images after those of a first round:

    elfs-ray reselect elfs-ray/photos name=round2 budget=200 select.labelled=elfs-ray/photos/coreset.txt
"""


def main(arguments: list[str]) -> None:
    """Make, plan or explain a selection from a finished run."""
    keys = {key for key, _ in fields_of(Config) if key in reselect.KEYS or key.startswith("select.")}
    typed = read_arguments(arguments, keys | {"name"}, positional="run_dir")
    if typed.help:
        print(HELP if typed.help == "short" else all_keys())
        return
    config, name = reselect.load(typed.overrides)
    if typed.dry_run:
        print(reselect.describe(config, name))
        return
    for table, coreset in reselect.run(config, name).coresets.items():
        print("\n".join(coreset_lines(reselect.folder_of(config, name), table, coreset)))
    run_dir = RunDir(config.run_dir)
    if run_dir.success_marker(ReportResult.stage):
        print(f"report   {run_dir.path(schema.REPORT_FILE)}")


def all_keys() -> str:
    """Return the text of --help-all: every key that a selection accepts. Defaults are those of the run."""
    lines = [HELP, f"{'name':<22}  name of the selection; its coresets go to coresets/<name>/"]
    for key, _, meaning in describe_keys():
        if key in reselect.KEYS or key.startswith("select."):
            lines.append(f"{key:<22}  {meaning}")
    return "\n".join(lines)
