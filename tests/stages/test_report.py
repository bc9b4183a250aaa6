"""report: one file that opens offline, every figure of it in metrics.json."""

import json
import re
from html.parser import HTMLParser

import numpy as np

from elfs_ray.stages.report.run import run_report
from elfs_ray.stages.select.run import run_select
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digits_config, mark, write_trained


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def make_report(tmp_path, *overrides: str) -> tuple[Page, dict]:
    run_dir = RunDir(tmp_path)
    write_trained(run_dir)
    mark(run_dir, "train", rows=1000, epochs=5, history=[])
    config = digits_config(tmp_path, *overrides)
    mark(run_dir, "select", **run_select(config, run_dir))
    run_report(config, run_dir)
    return Page((tmp_path / "report.html").read_text()), json.loads((tmp_path / "metrics.json").read_text())


def test_the_page_refers_to_nothing_outside_itself(ray_cluster, tmp_path):
    page, _ = make_report(tmp_path)
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"https?://", (tmp_path / "report.html").read_text())


def test_each_group_has_as_many_images_as_were_asked_for(ray_cluster, tmp_path):
    page, _ = make_report(tmp_path, "report.images_per_grid=7")
    assert page.tags.count("img") == 21


def test_an_end_that_was_not_pruned_shows_none(ray_cluster, tmp_path):
    page, metrics = make_report(tmp_path, "select.hard_fraction=0", "report.images_per_grid=5")
    assert metrics["counts"]["pruned_hard"] == 0
    assert page.tags.count("img") == 10 and "none" in page.texts


def test_counts_sizes_and_histogram_add_up(ray_cluster, tmp_path):
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


def test_clustering_and_training_are_told_to_the_reader(ray_cluster, tmp_path):
    run_dir, config = RunDir(tmp_path), digits_config(tmp_path)
    write_trained(run_dir)
    temi = {"head": 1, "head_losses": [-1.25, -1.75], "head_agreement": [0.625, 1.0], "loss_history": [-1.0, -1.75]}
    mark(
        run_dir,
        "cluster",
        rows=1000,
        method="temi",
        num_clusters=10,
        num_clusters_evidence=[{"num_clusters": 10, "silhouette": 0.375}, {"num_clusters": 20, "silhouette": 0.25}],
        neighbors={"search": "ivf", "num_neighbors": 50, "recall": 0.975},
        neighbor_purity=0.875,
        temi=temi,
    )
    names = ("loss", "accuracy", "images_per_s", "data_wait_share", "recorder_share")
    history = [{"epoch": epoch, **dict.fromkeys(names, 0.5 + epoch / 1000)} for epoch in range(100)]
    mark(run_dir, "train", rows=1000, epochs=5, history=history)
    mark(run_dir, "select", **run_select(config, run_dir))
    run_report(config, run_dir)
    rows = re.findall(r"<tr>(.*?)</tr>", (tmp_path / "report.html").read_text())
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in rows]
    assert ["10", "0.3750", "chosen"] in cells and ["20", "0.2500", ""] in cells
    assert ["1", "-1.7500", "100.0%", "chosen"] in cells and ["0", "-1.2500", "62.5%", ""] in cells
    assert ["nearest neighbours", "50 each, ivf, 97.5% of the exact ones found"] in cells
    assert ["neighbours that share a sample&#x27;s pseudo-label", "87.5%"] in cells
    epochs = [row for row in cells if len(row) == 6][1:]
    assert len(epochs) == 20 and epochs[0][0] == "1" and epochs[-1][:3] == ["100", "0.5990", "59.9%"]
    assert json.loads((tmp_path / "metrics.json").read_text())["stages"]["cluster"]["temi"] == temi


def test_the_training_of_an_encoder_is_told_where_there_was_one(ray_cluster, tmp_path):
    run_dir = RunDir(tmp_path)
    write_trained(run_dir)
    mark(run_dir, "train", rows=1000, epochs=5, history=[])
    names = ("loss", "spread", "effective_rank", "images_per_s", "data_wait_share")
    history = [{"epoch": epoch, **dict.fromkeys(names, 0.5 + epoch / 1000)} for epoch in range(50)]
    mark(run_dir, "copy", rows=1000)
    mark(run_dir, "pretrain", rows=1000, history=history)
    for encoder in ("self_supervised", "pixels"):
        config = digits_config(tmp_path, f"embed.encoder={encoder}")
        mark(run_dir, "select", **run_select(config, run_dir))
        run_report(config, run_dir)
        page, metrics = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "metrics.json").read_text())
        told = encoder == "self_supervised"
        assert ("Training the encoder" in page and "<td>50</td><td>0.5490</td><td>0.549</td>" in page) == told
        assert metrics["stages"].get("pretrain", {}).get("history") == (history if told else None)


def test_names_are_escaped(ray_cluster, tmp_path):
    page, _ = make_report(tmp_path, "pool.uri=/<script>alert(1)</script>")
    assert "script" not in page.tags


def test_what_speaks_for_a_hard_fraction_that_was_found_is_shown_and_kept(ray_cluster, tmp_path):
    search = ("select.search_iterations=2", "select.search_step=0.4")
    page, metrics = make_report(tmp_path, "budget=[0.2,0.1]", "select.hard_fraction=[search,auto]", *search)
    first, second = metrics["coresets"].values()
    trials = first["hard_fraction_evidence"]["trials"]
    assert [trial["hard_fraction"] for trial in trials] == [0.0, 0.4, 0.8]
    assert all(f"{trial['accuracy']:.1%}" in page.texts for trial in trials)
    assert f"Hard fraction of coreset: {first['hard_fraction']:g}, by select.hard_fraction=search" in page.texts
    assert f"Hard fraction of coreset-0.1: {second['hard_fraction']:g}, by select.hard_fraction=auto" in page.texts
    assert f"{second['hard_fraction_evidence']['risks'][0]['risk']:.4f}" in page.texts
