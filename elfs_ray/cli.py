"""The command line that every job shares: key=value overrides, --help, --dry-run, one message for an error."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from elfs_ray.config import Config, ConfigError, describe_keys, load_config
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.runtime.progress import count, say
from elfs_ray.stages.report import ReportResult
from elfs_ray.stages.select import SelectResult
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import BadMarkerError, RunDir

if TYPE_CHECKING:
    from elfs_ray.evaluation.report import Results

EXIT_OK, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143


def run_job(description: str, yaml_path: str | Path, arguments: list[str] | None = None) -> int:
    """Run a job: the pipeline, and the evaluation that is asked for, with the keys of `yaml_path` and the command line.

    Returns the exit code: 0 done, 2 for a config that cannot be run (one message, no work begun), 1 for a failure, 130
    for Ctrl-C, 143 for SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return report_errors(lambda: _run(description, yaml_path, arguments))


def report_errors(job: Callable[[], None]) -> int:
    """Call `job`; turn what it raises, Ctrl-C and SIGTERM into a message and an exit code."""
    on_sigterm = _OnSigterm()
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        job()
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has seen enough, as `head` does. Python's own flush at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, BadMarkerError) as error:
        say(f"error: {error}")
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt as stop:
        what, code = ("terminated", EXIT_TERMINATED) if on_sigterm.came else ("interrupted", EXIT_INTERRUPTED)
        _say_what_is_kept(stop, what)
        return code
    except Exception as error:
        if os.environ.get("ELFS_RAY_TRACEBACK"):
            raise
        say(
            f"failed: {type(error).__name__}: {error}\n"
            "What is complete is kept; the same command goes on from there. ELFS_RAY_TRACEBACK=1 shows the traceback."
        )
        return EXIT_FAILED
    return EXIT_OK


class _OnSigterm:
    """Ends the job as Ctrl-C does. Ray lets a KeyboardInterrupt through its calls, and nothing else as it was."""

    came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


def _say_what_is_kept(stop: KeyboardInterrupt, what: str) -> None:
    """One line: what is kept and how to go on. Who is told to stop once more ends at once, without waiting for Ray."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Ray's processes on this machine end with the one that started them, however it ends.
        signal.signal(number, signal.SIG_DFL)
    kept = "; ".join(getattr(stop, "__notes__", ())) or "what is complete is kept"
    line = f"{what}: {kept}; the same command goes on from there"
    say(f"\n{line}" if sys.stderr.isatty() else line)


def _run(description: str, yaml_path: str | Path, arguments: list[str]) -> None:
    if asks_for_help(arguments):
        print(help_text(description, yaml_path))
        return
    options, overrides = split_arguments(arguments)
    config = load_config(yaml_path, overrides)
    if options:
        from elfs_ray.evaluation.job import describe

        print(describe(config))
        return
    run_config(config)


def run_config(config: Config) -> None:
    """Run the pipeline, and the evaluation that the config asks for; print the results and where everything is."""
    from elfs_ray.evaluation.job import keys_of_job, run_with_results

    run_dir, results = run_with_results(config)
    if results is not None:
        print_results(results, RunDir(keys_of_job(config).out))
    print(closing_lines(config, run_dir))


def print_results(results: "Results", out: RunDir) -> None:
    """Print the table of an evaluation, and where its files are."""
    from elfs_ray.evaluation.report import closing_lines as lines_of
    from elfs_ray.evaluation.run import written_files

    print(lines_of(results))
    for name, path in written_files(out):
        print(f"{name:<9}{path}")


def asks_for_help(arguments: Iterable[str]) -> bool:
    """Whether --help or -h is among the arguments."""
    return not {"--help", "-h"}.isdisjoint(arguments)


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """(options, overrides): --dry-run or nothing, and the rest. Raises ConfigError for an option that no job has."""
    arguments = list(arguments)
    options = [argument for argument in arguments if argument.startswith("-")]
    unknown = sorted(set(options) - {"--dry-run"})
    if unknown:
        raise ConfigError(f"unknown option {' '.join(unknown)}: there are --help, --dry-run and key=value")
    return options, [argument for argument in arguments if argument not in options]


def coreset_line(run_dir: RunDir, table: str, num_rows: int) -> str:
    """Return where the list of a coreset is."""
    return f"coreset  {run_dir.path(schema.coreset_text_file(table))}  ({count(num_rows, 'image')})"


def closing_lines(config: Config, run_dir: RunDir) -> str:
    """Return where the coreset and the report are."""
    lines = []
    if run_dir.success_marker(SelectResult.stage):
        for table, coreset in SelectResult.read(run_dir).coresets.items():
            lines.append(coreset_line(run_dir, table, coreset.rows))
    if run_dir.success_marker(ReportResult.stage):
        lines.append(f"report   {run_dir.path(schema.REPORT_FILE)}")
    return "\n".join(lines) or f"complete up to {config.until} in {run_dir.uri}"


def help_text(description: str, yaml_path: str | Path) -> str:
    job = Path(sys.argv[0]).name
    lines = [
        description,
        "",
        f"usage: python jobs/{job} [--dry-run] [--help] key=value ...",
        "",
        "--dry-run  check everything, print the plan with counts and resources, do nothing",
        f"until=...  one of {', '.join(stage.name for stage in STAGES)}",
        f"The defaults below are those of {Path(yaml_path).name}.",
        "",
    ]
    return "\n".join([*lines, *key_lines(describe_keys(yaml_path))])


def key_lines(keys: Iterable[tuple[str, str, str]]) -> list[str]:
    """Two lines for each (key, default, meaning): what it means, and its default."""
    keys = list(keys)
    width = max(len(key) for key, _, _ in keys)
    return [
        line
        for key, default, meaning in keys
        for line in (f"{key:<{width}}  {meaning}", f"{'':<{width}}  default: {default}")
    ]
