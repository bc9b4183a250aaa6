"""Label selectors: the nodes that match, where tasks, actors, Ray Data and Ray Train run, and refusals."""

from pathlib import Path

import pytest
from ray._private.label_utils import validate_label_selector

from elfs_ray.config import ConfigError, parse_label_selector
from elfs_ray.pipeline.stages import STAGES
from elfs_ray.runtime.cluster import Devices, find_devices
from elfs_ray.runtime.placement import is_chosen, on_nodes, placement
from tests.in_process import without_ray
from tests.scripts import run_script
from tests.tables import digits_config


@pytest.mark.parametrize(
    ("text", "chosen", "others"),
    [
        ("zone=a", [{"zone": "a", "x": "y"}], [{"zone": "b"}, {}]),
        ("zone=!a", [{"zone": "b"}, {}], [{"zone": "a"}]),
        ("zone=in(a,b)", [{"zone": "a"}, {"zone": "b"}], [{"zone": "c"}, {}]),
        ("zone=!in(a,b)", [{"zone": "c"}, {}], [{"zone": "b"}]),
        ("zone=a,kind=gpu", [{"zone": "a", "kind": "gpu"}], [{"zone": "a"}, {"kind": "gpu"}]),
    ],
)
def test_a_node_is_chosen_if_its_labels_meet_every_requirement(text, chosen, others):
    selector = parse_label_selector(text, "label_selector")
    assert validate_label_selector(selector) is None  # Ray takes it as it is
    with on_nodes(selector):
        assert all(is_chosen(labels) for labels in chosen)
        assert not any(is_chosen(labels) for labels in others)
        assert placement() == {"label_selector": selector}
    assert placement() == {} and is_chosen({})


@pytest.mark.parametrize("key", ["label_selector", "embed.label_selector"])
def test_labels_that_this_machine_cannot_have_are_refused(key, monkeypatch, tmp_path):
    config = digits_config(Path("/run"), f"{key}=ray.io/market-type=spot")
    with without_ray(monkeypatch, tmp_path):
        devices = find_devices("local")
        with pytest.raises(ConfigError, match=rf"^{key}: no node on this machine has .*ray\.io/market-type=spot\."):
            _stage("embed").devices(config, devices)
        if key != "label_selector":
            assert _stage("select").devices(config, devices) == devices


def _stage(name: str):
    (stage,) = (stage for stage in STAGES if stage.name == name)
    return stage


def test_a_stage_without_a_selector_has_all_devices():
    devices = Devices(96, 8, "in the Ray cluster now", node_cpus=48)
    assert _stage("embed").devices(digits_config(Path("/run")), devices) is devices


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_stage_runs_on_the_nodes_that_it_selects(tmp_path):
    """On a cluster of its own, in a process of its own: two nodes with labels, one for training alone."""
    places = run_script(Path(__file__).with_name("placement_run.py"), tmp_path)
    assert places == {"index": ["a"], "embed": ["a"], "cluster": ["a"], "train": ["b"], "select": ["a"]}
