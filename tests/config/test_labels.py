"""Label selectors: what they require of nodes, and which texts are none."""

import pytest

from elfs_ray.config import ConfigError, label_selector, load_config, parse_label_selector

REQUIRED = ("run_dir=/run", "budget=0.1", "pool.uri=/pool", "cluster.num_clusters=2")


def test_a_selector_has_a_requirement_for_each_label():
    text = "ray.io/market-type=spot,zone=in(us-west-2a,us-west-2b),kind=!gpu,team=!in(a,b)"
    assert parse_label_selector(text, "key") == {
        "ray.io/market-type": "spot",
        "zone": "in(us-west-2a,us-west-2b)",
        "kind": "!gpu",
        "team": "!in(a,b)",
    }


@pytest.mark.parametrize("text", ["spot", "zone=", "=a", "a=b=c", "a=in(b", "a=in()", "a=-b", "a=b,,c=d", "a=in(b,!c)"])
def test_another_text_is_refused_by_the_name_of_its_key(text):
    with pytest.raises(ConfigError, match=r"^train\.label_selector=.*must be label=value"):
        load_config(None, [*REQUIRED, f"train.label_selector={text}"])


def test_a_stage_takes_its_selector_or_that_of_the_run():
    config = load_config(None, [*REQUIRED, "label_selector=market=spot", "train.label_selector=market=on-demand"])
    assert label_selector(config, "train") == ({"market": "on-demand"}, "train.label_selector")
    assert label_selector(config, "embed") == ({"market": "spot"}, "label_selector")
    assert label_selector(config, "select") == ({"market": "spot"}, "label_selector")
    assert label_selector(load_config(None, REQUIRED), "train") == ({}, "label_selector")
