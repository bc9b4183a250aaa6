"""docs/python.md: its blocks run one after another, and print what it says."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text()


def run_blocks(page: str) -> dict:
    """Run the blocks of a page in one namespace, which is returned."""
    namespace: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), namespace)
    return namespace


def shown(page: str) -> list[str]:
    """Return what the page says that its blocks print."""
    return re.findall(r"^```text\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def test_selections_from_embeddings_print_what_the_page_shows(capsys):
    before_ray = PAGE.partition("## From images")[0]
    run_blocks(before_ray)
    assert capsys.readouterr().out == "".join(shown(before_ray))


@pytest.mark.slow
def test_a_run_and_its_exports_print_what_the_page_shows(ray_cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = run_blocks(PAGE)
    printed = capsys.readouterr().out.replace(str(tmp_path), "/home/me")
    assert printed == "".join(shown(PAGE))
    assert len(namespace["table"]) == 30
    assert Path(namespace["path"]).exists() and Path("tasks.json").exists()
