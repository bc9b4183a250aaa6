"""Stage report: one file that opens offline, with every number of it in metrics.json."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.copy import CopyResult
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.neighbors import NeighborsResult
from elfs_ray.stages.pretrain import PretrainResult
from elfs_ray.stages.report.run import run_report
from elfs_ray.stages.select.run import run_select
from elfs_ray.stages.train import TrainResult
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digits_config, mark, write_trained

SCRIPTS = [{"type": "application/json", "id": "data"}, {}]


class Page(HTMLParser):
    """Tags, links, names of images, texts, and the rows of tables, as a browser reads them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.image_names: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: list[dict[str, str | None]] = []
        self.data = ""
        self._is_in_cell = self._is_in_data = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag == "img":
            self.image_names.append(dict(attributes)["alt"])
        elif tag == "script":
            self.scripts.append(dict(attributes))
            self._is_in_data = dict(attributes).get("id") == "data"
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._is_in_cell = True

    def handle_endtag(self, tag):
        self._is_in_cell = self._is_in_cell and tag not in ("td", "th")
        self._is_in_data = self._is_in_data and tag != "script"

    def handle_data(self, data):
        self.texts.append(data)
        if self._is_in_data:
            self.data += data
        if self._is_in_cell:
            self.rows[-1][-1] += data


def write_run(run_dir: RunDir) -> None:
    """Write what the stages before select leave, with a training that has no epochs to show."""
    write_trained(run_dir)
    mark(run_dir, TrainResult(1000, 5, 1, "memory", history=[]))


def select_and_report(folder, *overrides: str) -> tuple[Page, dict]:
    """Select from the tables in a run directory and report on them; the page and the metrics."""
    run_dir, config = RunDir(folder), digits_config(folder, *overrides)
    mark(run_dir, run_select(config, run_dir))
    run_report(config, run_dir)
    return Page((folder / "report.html").read_text()), json.loads((folder / "metrics.json").read_text())


def make_report(folder, *overrides: str) -> tuple[Page, dict]:
    write_run(RunDir(folder))
    return select_and_report(folder, *overrides)


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    page, _ = make_report(tmp_path)
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert page.scripts == SCRIPTS
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://", text)
    # A browser runs the page's script alone, and loads nothing.
    assert re.search(r"default-src 'none'; img-src data:; .*script-src 'sha256-[\w+/=]+'", text)


def test_what_the_listing_passed_over_and_warned_of_is_shown(tmp_path):
    write_run(RunDir(tmp_path))
    num_samples = IndexResult.read(RunDir(tmp_path)).rows
    told = {"passed_over": {".jxl": 10, ".heic": 5000}, "warnings": ["a.tar is <cut> short"]}
    mark(RunDir(tmp_path), IndexResult(num_samples, 1, "folder", [], **told))
    _, metrics = select_and_report(tmp_path, "pool.uri=[/a,/b]")
    page = (tmp_path / "report.html").read_text()
    assert "not listed as images: 5,000 .heic, 10 .jxl." in page and "a.tar is &lt;cut&gt; short" in page
    assert {name: metrics["stages"]["index"][name] for name in told} == told and metrics["pool"] == "/a, /b"


def test_each_group_has_the_configured_number_of_images(tmp_path):
    page, _ = make_report(tmp_path, "report.images_per_grid=7")
    assert page.tags.count("img") == 21


def test_an_end_that_was_not_pruned_shows_none(tmp_path):
    page, metrics = make_report(tmp_path, "select.hard_fraction=0", "report.images_per_grid=5")
    assert metrics["counts"]["pruned_hard"] == 0
    assert page.tags.count("img") == 10 and "None were left out at this end." in page.texts


def test_counts_sizes_and_histogram_add_up(tmp_path):
    _, metrics = make_report(tmp_path)
    counts = metrics["counts"]
    assert counts["pool"] == counts["embedded"] + counts["rejected"] == 1003
    assert counts["pruned_hard"] + counts["coreset"] + counts["pruned_easy"] == counts["embedded"]
    assert sum(metrics["score_histogram"]["counts"]) == counts["embedded"]
    assert sum(metrics["pseudo_label_sizes"]["before"]) == counts["embedded"]
    assert sum(metrics["pseudo_label_sizes"]["after"]) == counts["coreset"]
    edges = np.array(metrics["score_histogram"]["edges"])
    cuts = [metrics["score_histogram"]["hardest_kept"], metrics["score_histogram"]["easiest_kept"]]
    assert edges[0] <= cuts[0] <= cuts[1] <= edges[-1]


def test_clustering_and_training_are_described(tmp_path):
    run_dir = RunDir(tmp_path)
    write_trained(run_dir)
    temi = {"head": 1, "head_losses": [-1.25, -1.75], "head_agreement": [0.625, 1.0], "loss_history": [-1.0, -1.75]}
    result = ClusterResult(
        rows=1000,
        method="temi",
        num_clusters=10,
        workers=1,
        sizes=[100] * 10,
        num_clusters_evidence=[{"num_clusters": 10, "silhouette": 0.375}, {"num_clusters": 20, "silhouette": 0.25}],
        trust={"neighbor_purity": 0.875, "agreement": 0.75, "right": 0.65625},
        temi=temi,
    )
    mark(run_dir, result)
    mark(run_dir, NeighborsResult(1000, 50, "ivf", recall=0.975))
    names = ("loss", "accuracy", "images_per_s", "data_wait_share", "recorder_share")
    history = [{"epoch": epoch, **dict.fromkeys(names, 0.5 + epoch / 1000)} for epoch in range(100)]
    mark(run_dir, TrainResult(1000, 5, 1, "memory", history))
    page, metrics = select_and_report(tmp_path, "cluster.method=temi")
    assert ["10", "0.3750", "chosen"] in page.rows and ["20", "0.2500", ""] in page.rows
    assert ["1", "-1.7500", "100.0%", "chosen"] in page.rows and ["0", "-1.2500", "62.5%", ""] in page.rows
    assert ["Nearest neighbours of each image", "50, ivf search (97.5% of the true ones found)"] in page.rows
    assert ["Neighbours that are in the same group as the image", "87.5%"] in page.rows
    assert ["Images in the right group, an estimate: the product of both", "65.6%"] in page.rows
    epochs = [row for row in page.rows if len(row) == 6][1:]
    assert len(epochs) == 20 and epochs[0][0] == "1" and epochs[-1][:3] == ["100", "0.5990", "59.9%"]
    assert metrics["stages"]["cluster"]["temi"] == temi


def test_an_encoder_trained_by_the_run_is_described(tmp_path):
    run_dir = RunDir(tmp_path)
    write_run(run_dir)
    names = ("loss", "spread", "effective_rank", "images_per_s", "data_wait_share")
    history = [{"epoch": epoch, **dict.fromkeys(names, 0.5 + epoch / 1000)} for epoch in range(50)]
    mark(run_dir, CopyResult(1000, 3))
    mark(run_dir, PretrainResult(1000, 50, 1, "memory", {}, "encoder.pt", history))
    for encoder in ("self_supervised", "pixels"):
        page, metrics = select_and_report(tmp_path, f"embed.encoder={encoder}")
        is_described = "Training the encoder" in page.texts
        assert is_described == any(row[:3] == ["50", "0.5490", "0.549"] for row in page.rows)
        assert is_described == (encoder == "self_supervised")
        assert metrics["stages"].get("pretrain", {}).get("history") == (history if is_described else None)


def test_hostile_names_are_shown_as_they_are(tmp_path):
    """Uris, the pool and the run directory are text of strangers: shown letter by letter, never read as HTML."""
    hostile = """<script>alert("1")</script>&amp;'><img src=x onerror=alert(1)>"""
    folder = tmp_path / "<b>&amp;run"
    run_dir = RunDir(folder)
    write_run(run_dir)
    uris = [f'/{i}/{hostile}\n"{i}.png' for i in range(1003)]
    index = pa.table([np.arange(1003), uris, pa.nulls(1003, pa.int32())], schema=schema.INDEX_SCHEMA)
    filesystem.write_table(run_dir.path(schema.INDEX, schema.range_file(0, 1002)), index)
    page, _ = select_and_report(folder, "pool.uri=/<script>alert(1)</script>&amp;", "report.images_per_grid=9")
    assert len(page.image_names) == 27 and set(page.image_names) <= set(uris)
    assert page.scripts == SCRIPTS and page.tags.count("img") == 27
    data = json.loads(page.data)
    assert {data["prefix"] + uri for uri in data["uris"]} == {uris[i] for i in data["ids"]}
    assert "<" not in page.data
    assert "/<script>alert(1)</script>&amp;" in page.texts and str(folder) in page.texts


def test_images_that_were_not_sampled_are_counted_and_explained(tmp_path):
    page, metrics = make_report(tmp_path, "select.method=random")
    counts = metrics["counts"]
    assert counts["not_sampled"] == counts["embedded"] - counts["coreset"] > 0
    (row,) = [row for row in page.rows if row and row[0].startswith("Not sampled")]
    assert row[1:] == [f"{counts['not_sampled']:,}", f"{counts['not_sampled'] / counts['pool']:.2%}"]
    assert "Hard fraction (β)" not in "".join(page.texts)


def test_the_choice_of_the_hard_fraction_is_explained(tmp_path):
    search = ("select.search_iterations=2", "select.search_step=0.4")
    page, metrics = make_report(tmp_path, "budget=[0.2,0.1]", "select.hard_fraction=[search,auto]", *search)
    first, second = metrics["coresets"].values()
    assert [trial["hard_fraction"] for trial in first["hard_fraction_evidence"]["trials"]] == [0.0, 0.4, 0.8]
    for trial in first["hard_fraction_evidence"]["trials"]:
        mark = "chosen" if trial["hard_fraction"] == first["hard_fraction"] else ""
        assert [f"{trial['hard_fraction']:g}", f"{trial['accuracy']:.1%}", mark] in page.rows
    assert f"Why the hard fraction (β) of coreset is {first['hard_fraction']:g}" in page.texts
    assert f"Why the hard fraction (β) of coreset-0.1 is {second['hard_fraction']:g}" in page.texts
    risk = second["hard_fraction_evidence"]["risks"][0]
    assert ["0", *(f"{risk[name]:.4f}" for name in ("bias", "variance", "risk"))] in page.rows
    assert f"Hard fraction (β): {first['hard_fraction']:.3g}" in page.texts


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (0.75, "so the first images were chosen about one for each group"),
        (0.25, "and the groups were not used to choose images"),
    ],
)
def test_a_selection_by_auto_says_how_far_its_groups_are_trusted(tmp_path, right, words):
    run_dir = RunDir(tmp_path)
    write_run(run_dir)
    trust = {"neighbor_purity": 1.0, "agreement": right, "right": right}
    mark(run_dir, dataclasses.replace(ClusterResult.read(run_dir), trust=trust))
    page, metrics = select_and_report(tmp_path, "select.method=auto", "budget=30")
    text = "".join(page.texts)
    assert f"About {right:.0%} of the images seem to be in the right group" in text and words in text
    assert metrics["coresets"]["coreset"]["coverage"]["classes_first"] == (right > 0.5)
    assert "Too hard" not in text and "score_histogram" not in metrics
