"""Write the report page of a finished run again, such as after an update of elfs_ray."""

from elfs_ray.cli import read_arguments
from elfs_ray.config import ConfigError, describe_keys
from elfs_ray.pipeline import rewrite_report
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir


def main(arguments: list[str]) -> None:
    """Write the report of a run, or explain the command."""
    typed = read_arguments(arguments, rewrite_report.KEYS, positional="run_dir")
    if typed.help:
        print(help_text())
        return
    if typed.dry_run:
        raise ConfigError("unknown option --dry-run: a report is written in seconds and replaces nothing else")
    config = rewrite_report.load(typed.overrides)
    rewrite_report.rewrite(config)
    print(f"report   {RunDir(config.run_dir).path(schema.REPORT_FILE)}")


def help_text() -> str:
    """Return the text of --help: all that the command takes."""
    lines = [str(__doc__), "", "usage: elfs-ray report RUN_DIR [key=value ...]", ""]
    lines += [f"{key:<22}  {meaning}" for key, _, meaning in describe_keys() if key in rewrite_report.KEYS]
    return "\n".join(lines)
