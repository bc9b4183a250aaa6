"""The command line that all jobs share: key=value overrides, --help, --dry-run, and one message for an error."""

import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from elfs_ray.config import Config, ConfigError, describe_keys, load_config
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.runtime.progress import count, discard, say
from elfs_ray.stages.report import ReportResult
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import BadMarkerError, RunDir

if TYPE_CHECKING:
    from elfs_ray.evaluation.report import Results

EXIT_OK, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143


def run_job(description: str, yaml_path: str | Path, arguments: list[str] | None = None) -> int:
    """Run a job: the pipeline, and the evaluation if the config has one; return the exit code.

    The config is that of `yaml_path` with the overrides of the command line. Exit codes: 0 done, 1 a failure,
    2 a config that cannot be run (no work was started), 130 Ctrl-C, 143 SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return report_errors(lambda: _run(description, yaml_path, arguments))


def report_errors(job: Callable[[], None]) -> int:
    """Call `job`; turn its errors, Ctrl-C and SIGTERM into one message and an exit code."""
    _make_streams_hold_any_text()
    on_sigterm = _OnSigterm()
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        job()
        sys.stdout.flush()
    except (ConfigError, BadMarkerError) as error:
        say(f"error: {error}")
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt as stop:
        how, code = ("terminated", EXIT_TERMINATED) if on_sigterm.came else ("interrupted", EXIT_INTERRUPTED)
        _say_what_is_kept(stop, how)
        return code
    except Exception as error:
        # The reader of a pipe has closed it, as `head` does: no failure, as results are printed when all work is done.
        # The connections that work needs may break in the same way.
        if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):
            discard(sys.stdout)
            return EXIT_OK
        if os.environ.get("ELFS_RAY_TRACEBACK"):
            raise
        say(
            f"failed: {type(error).__name__}: {error}\n"
            "Completed work is kept: run the same command to resume. Set ELFS_RAY_TRACEBACK=1 to see the traceback."
        )
        return EXIT_FAILED
    return EXIT_OK


def _make_streams_hold_any_text() -> None:
    """Let stdout and stderr print any path, with escapes for what their encoding lacks, also where one is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Python has no stream for a closed descriptor, which the next file to be opened would get.
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # it stays open until the process ends
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_closed(stream: TextIO) -> bool:
    """Return whether a stream is a pipe whose reader is gone."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _OnSigterm:
    """A handler of SIGTERM that stops the job as Ctrl-C does, and remembers that it was called.

    It raises KeyboardInterrupt because that is the only exception that Ray's calls pass on unchanged.
    """

    came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


def _say_what_is_kept(stop: KeyboardInterrupt, how: str) -> None:
    """Print one line that says what is kept and how to resume."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A second Ctrl-C ends the process at once instead of waiting for Ray to shut down. That is safe: Ray's
        # processes on this machine end with the process that started them, however that ends.
        signal.signal(number, signal.SIG_DFL)
    kept = "; ".join(getattr(stop, "__notes__", ())) or "completed work is kept"
    line = f"{how}: {kept}; run the same command to resume"
    # A terminal shows ^C and perhaps half a line of progress: the message starts on a line of its own.
    say(f"\n{line}" if sys.stderr.isatty() else line)


def _run(description: str, yaml_path: str | Path, arguments: list[str]) -> None:
    if asks_for_help(arguments):
        print(help_text(description, yaml_path))
        return
    options, overrides = split_arguments(arguments)
    config = load_config(yaml_path, overrides)
    # These imports load Ray, which takes seconds, and --help should not wait for it.
    if options:
        from elfs_ray.evaluation.job import describe

        print(describe(config))
        return
    run_config(config)


def run_config(config: Config) -> None:
    """Run the pipeline, and the evaluation if the config has one; print the results and where everything is."""
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
    """Return whether --help or -h is among the arguments."""
    return not {"--help", "-h"}.isdisjoint(arguments)


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return (options, overrides): --dry-run or nothing, and all other arguments. Raises ConfigError for other options.

    An argument is an option if it begins with "-".
    """
    arguments = list(arguments)
    options = [argument for argument in arguments if argument.startswith("-")]
    unknown = sorted(set(options) - {"--dry-run"})
    if unknown:
        raise ConfigError(f"unknown option {' '.join(unknown)}: use --help, --dry-run and key=value")
    return options, [argument for argument in arguments if argument not in options]


def coreset_lines(run_dir: RunDir, table: str, coreset: CoresetResult) -> list[str]:
    """Return the line that says where the list of a coreset is, and one about how well it covers the pool, if known."""
    lines = [f"coreset  {run_dir.path(schema.coreset_text_file(table))}  ({count(coreset.rows, 'image')})"]
    if coreset.coverage is not None:
        lines.append(
            f"covers   the pool: mean similarity {coreset.coverage['coreset']:.3f} to the nearest image chosen, "
            f"with random images {coreset.coverage['random']:.3f}"
        )
    return lines


def closing_lines(config: Config, run_dir: RunDir) -> str:
    """Return the last lines of a job: where the coreset and the report are."""
    lines = []
    # A run that ends before stage select, because of `until`, has neither.
    if run_dir.success_marker(SelectResult.stage):
        for table, coreset in SelectResult.read(run_dir).coresets.items():
            lines += coreset_lines(run_dir, table, coreset)
    if run_dir.success_marker(ReportResult.stage):
        lines.append(f"report   {run_dir.path(schema.REPORT_FILE)}")
    return "\n".join(lines) or f"complete up to {config.until} in {run_dir.uri}"


def help_text(description: str, yaml_path: str | Path) -> str:
    """Return the text of --help: usage, options, and every key with the default that a YAML file gives it."""
    job = Path(sys.argv[0]).name
    lines = [
        description,
        "",
        f"usage: python jobs/{job} [--dry-run] [--help] key=value ...",
        "",
        "--dry-run  check everything and print the plan, with counts and resources, without running it",
        f"until=...  stop after a stage: {', '.join(stage.name for stage in STAGES)}",
        f"The defaults below are those of {Path(yaml_path).name}.",
        "",
    ]
    return "\n".join([*lines, *key_lines(describe_keys(yaml_path))])


def key_lines(keys: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return two lines for each (key, default, help text): the key with its help text, and its default."""
    keys = list(keys)
    width = max(len(key) for key, _, _ in keys)
    return [
        line
        for key, default, meaning in keys
        for line in (f"{key:<{width}}  {meaning}", f"{'':<{width}}  default: {default}")
    ]
