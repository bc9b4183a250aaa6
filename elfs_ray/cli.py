"""What all commands share: arguments, --help, --dry-run, one message for an error, the last lines of a run."""

import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from elfs_ray.config import Config, ConfigError
from elfs_ray.runtime.progress import count, discard, say
from elfs_ray.stages.duplicates import DuplicatesResult
from elfs_ray.stages.report import ReportResult
from elfs_ray.stages.select import CoresetResult, SelectResult
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import BadMarkerError, RunDir

if TYPE_CHECKING:
    from elfs_ray.evaluation.report import Results

EXIT_OK, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")  # anything else with an equals sign in it is the name of a file


def report_errors(job: Callable[[], None]) -> int:
    """Call `job`; turn its errors, Ctrl-C and SIGTERM into one message and an exit code.

    Exit codes: 0 done, 1 a failure, 2 a config that cannot be run (no work was started), 130 Ctrl-C, 143 SIGTERM.
    """
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


def run_config(config: Config) -> None:
    """Run the pipeline, and the evaluation if the config has one; print the results and where everything is."""
    # This import loads Ray, which takes seconds, and --help should not wait for it.
    from elfs_ray.evaluation.job import keys_of_job, run_with_results

    run_dir, results = run_with_results(config)
    if results is not None:
        print_results((results, RunDir(keys_of_job(config).out)))
    print(closing_lines(config, run_dir))


def print_results(*evaluations: tuple["Results", RunDir]) -> None:
    """Print the tables of evaluations of the same runs, and where the files of each are."""
    from elfs_ray.evaluation.report import closing_lines as lines_of
    from elfs_ray.evaluation.run import written_files

    print(lines_of(*(results for results, _ in evaluations)))
    for _, out in evaluations:
        for name, path in written_files(out):
            print(f"{name:<9}{path}")


@dataclass(frozen=True)
class Arguments:
    """The arguments of a command: `key=value` overrides, whether to only print the plan, and the help asked for.

    help: "" for none, "short" for --help, "all" for --help-all.
    """

    overrides: list[str]
    dry_run: bool
    help: str

    def take(self, key: str) -> str | None:
        """Remove a key that the config does not have from the overrides; return its last value, None without any."""
        values = [value for name, _, value in (text.partition("=") for text in self.overrides) if name == key]
        self.overrides[:] = [text for text in self.overrides if text.partition("=")[0] != key]
        return values[-1] if values else None


def read_arguments(arguments: Sequence[str], keys: Collection[str], positional: str) -> Arguments:
    """Return the arguments of a command.

    keys: those that can also be written as --key value, with - for _. positional: the key of an argument without a key.

    Raises ConfigError for an unknown option, an option without its value, and a second argument without a key.
    """
    rest = list(arguments)
    overrides: list[str] = []
    flags = set()
    while rest:
        argument = rest.pop(0)
        if argument in ("--dry-run", "--help", "-h", "--help-all"):
            flags.add(argument)
        elif argument.startswith("-"):
            option, equals, value = argument.partition("=")
            key = option.removeprefix("--").replace("-", "_")
            if key not in keys:
                close = get_close_matches(key, keys, n=1)
                hint = f", did you mean --{close[0]}?" if close else ": use --help, --help-all, --dry-run and key=value"
                raise ConfigError(f"unknown option {option}{hint}")
            if not equals and not rest:
                raise ConfigError(f"{option} has no value: give {option} VALUE or {key}=VALUE")
            overrides.append(f"{key}={value if equals else rest.pop(0)}")
        elif _OVERRIDE.match(argument):
            overrides.append(argument)
        elif any(text.startswith(f"{positional}=") for text in overrides):
            raise ConfigError(f"{argument!r}: {positional} is set already; write key=value (--help lists the keys)")
        else:
            overrides.append(f"{positional}={argument}")
    help_length = "all" if "--help-all" in flags else "short" if flags & {"--help", "-h"} else ""
    return Arguments(overrides, "--dry-run" in flags, help_length)


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
    if config.duplicates.threshold is not None and run_dir.success_marker(DuplicatesResult.stage):
        copies = DuplicatesResult.read(run_dir)
        if copies.rows:
            of_images = count(copies.representatives, "image")
            folder = run_dir.path(schema.DUPLICATES)
            lines.append(f"left out {count(copies.rows, 'near-duplicate')} of {of_images}, listed in {folder}")
    if run_dir.success_marker(ReportResult.stage):
        lines.append(f"report   {run_dir.path(schema.REPORT_FILE)}")
    return "\n".join(lines) or f"complete up to {config.until} in {run_dir.uri}"


def key_lines(keys: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return two lines for each (key, default, help text): the key with its help text, and its default."""
    keys = list(keys)
    width = max(len(key) for key, _, _ in keys)
    return [
        line
        for key, default, meaning in keys
        for line in (f"{key:<{width}}  {meaning}", f"{'':<{width}}  default: {default}")
    ]
