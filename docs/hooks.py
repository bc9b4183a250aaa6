"""Fill the page of keys from their declarations whenever mkdocs builds it, so that it cannot become outdated."""

import re
from itertools import groupby

from elfs_ray.config import describe_keys

MARK = "<!-- keys -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace MARK by a table of keys for each section. mkdocs calls it for every page."""
    return markdown.replace(MARK, "\n\n".join(_tables())) if MARK in markdown else markdown


def _tables() -> list[str]:
    sections = groupby(describe_keys(), lambda row: row[0].rpartition(".")[0])
    return [f"## {section or 'The run'}\n\n{_table(rows)}" for section, rows in sections]


def _table(rows) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{key}` | {_text(default)} | {_text(meaning)} |" for key, default, meaning in rows])


def _text(words: str) -> str:
    # Characters that Markdown would read as HTML, a column or emphasis.
    return re.sub(r"([|*_\[\]])", r"\\\1", words.replace("<", "&lt;"))
