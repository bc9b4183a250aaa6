"""README, BENCHMARKS and docs/: links and file names lead to files, and jobs accept the keys of every command."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfs_ray.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (name of the job, its arguments) of every `python jobs/<name>.py ...` in the code blocks of a page."""
    for block in re.findall(r"^```shell\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for position, word in enumerate(words[1:], start=1):
                match = re.fullmatch(r"jobs/(\w+)\.py", word)
                if match and words[position - 1] == "python":
                    yield match[1], words[position + 1 :]


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
    shown = {(job, *arguments) for page in PAGES for job, arguments in commands(page.read_text())}
    assert {job for job, *_ in shown} >= {"imagenet", "cifar10", "prepare", "reselect", "evaluate"}
    known_keys: dict[str, set[str]] = {}
    for job, *arguments in sorted(shown):
        overrides = [argument for argument in arguments if argument not in ("--help", "--dry-run")]
        if (ROOT / f"jobs/{job}.yaml").exists():
            if overrides:
                load_config(ROOT / f"jobs/{job}.yaml", overrides)
            continue
        if job not in known_keys:
            command = [sys.executable, f"jobs/{job}.py", "--help"]
            help_text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            known_keys[job] = {line.split()[0] for line in help_text.splitlines() if line.strip()}
        # These jobs have no YAML of their own; their --help lists every key that they accept.
        assert {override.partition("=")[0] for override in overrides} <= known_keys[job], (job, overrides)


def test_a_command_of_a_page_is_read_as_a_shell_reads_it():
    page = "```shell\npython jobs/a.py x=1 \\\n  y='2 3'  # why\nray job submit -- python jobs/b.py z=1\n```\n"
    assert list(commands(page)) == [("a", ["x=1", "y=2 3"]), ("b", ["z=1"])]
