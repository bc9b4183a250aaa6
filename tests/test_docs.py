"""README, BENCHMARKS and docs/: links and file names lead to files, and jobs accept the keys of every command."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfs_ray.cli import read_arguments
from elfs_ray.commands import export, prepare, select
from elfs_ray.config import Config, fields_of
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.pipeline import reselect, rewrite_report
from elfs_ray.presets import NAMES

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

ACCEPTED = {
    "reselect": {"name", *(key for key, _ in fields_of(Config) if key in reselect.KEYS or key.startswith("select."))},
    "export": set(export.KEYS),
    "evaluate": {key for key, _ in fields_of(EvaluateRunsConfig)},
    "report": set(rewrite_report.KEYS),
    "prepare": set(prepare.KEYS),
}


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (command, its arguments) of every `elfs-ray COMMAND ...` and `python jobs/NAME.py ...` in a page's blocks.

    The script of a preset is the command select.
    """
    for block in re.findall(r"^```shell\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for position, word in enumerate(words[1:], start=1):
                match = re.fullmatch(r"jobs/(\w+)\.py", word)
                if match and words[position - 1] == "python":
                    is_preset = match[1] in NAMES
                    command = ["select", f"--preset={match[1]}"] if is_preset else [match[1]]
                    yield command[0], [*command[1:], *words[position + 1 :]]
                elif words[position - 1] == "elfs-ray" and not word.startswith("-"):
                    yield word, words[position + 1 :]


def broken_links(page: str, folder: Path) -> list[str]:
    """Return the relative links of a page in a folder that lead to no file."""
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page)
    return [link for link in links if "://" not in link and not (folder / link).exists()]


def missing_files(page: str) -> list[str]:
    """Return the tests, and the files of some folders, that a page names and that are not there."""
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    paths = re.findall(r"`((?:benchmarks|cluster_configs|jobs|docs)/[\w./-]+)`", page)
    names = re.findall(r"`(test_\w+\.py)`", page)
    return [path for path in paths if not (ROOT / path).exists()] + [name for name in names if name not in tests]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_file_names_lead_to_files(page):
    assert broken_links(page.read_text(), page.parent) == []
    assert missing_files(page.read_text()) == []


def test_a_broken_link_and_a_missing_file_are_detected():
    assert broken_links("[a](README.md#b) [c](docs/none.md) [d](https://none.org)", ROOT) == ["docs/none.md"]
    assert missing_files("`jobs/none.py` `jobs/cifar10.py` `test_none.py` `test_docs.py`") == [
        "jobs/none.py",
        "test_none.py",
    ]


def test_commands_of_the_pages_can_be_run():
    shown = {(command, *arguments) for page in PAGES for command, arguments in commands(page.read_text())}
    assert {command for command, *_ in shown} >= {"select", "prepare", "reselect", "evaluate"}
    for command, *arguments in sorted(shown):
        if command == "select":
            typed = read_arguments(arguments, select.KEYS, "pool.uri")
            if not typed.help:
                select.load(typed)
            continue
        keys = ACCEPTED[command]
        typed = read_arguments(arguments, keys, "run_dir")
        assert {override.partition("=")[0] for override in typed.overrides} <= {*keys, "run_dir"}, (command, arguments)


def test_a_command_of_a_page_is_read_as_a_shell_reads_it():
    page = "```shell\npython jobs/a.py x=1 \\\n  y='2 3'  # why\nray job submit -- elfs-ray b z=1\n```\n"
    page += "```shell\nelfs-ray --help\npython jobs/photos.py pool\n```\n"
    assert list(commands(page)) == [("a", ["x=1", "y=2 3"]), ("b", ["z=1"]), ("select", ["--preset=photos", "pool"])]
