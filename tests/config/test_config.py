"""Loading a config: what overrides what, one clear message for each bad value, and which keys decide a result."""

import contextlib
import operator
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elfs_ray.config import (
    Config,
    ConfigError,
    check_against_pool,
    deciding_keys,
    describe_keys,
    fields_of,
    load_config,
    load_keys,
)
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.pipeline.plan import plan_stage
from elfs_ray.pipeline.stages import stages_of
from elfs_ray.stages import cluster
from elfs_ray.stages.cluster import ClusterResult
from elfs_ray.stages.select import STAGE as SELECT
from elfs_ray.storage.run_dir import Marker, RunDir
from tests.tables import mark

REQUIRED = [
    "run_dir=/run",
    "pool.uri=/pool",
    "budget=0.1",
    "cluster.num_clusters=10",
    "select.method=double_end",
    "select.hard_fraction=0.3",
]

TEMI = ("cluster.method=temi", "cluster.temi.profile=cpu")
SELF_SUPERVISED = "embed.encoder=self_supervised"
SELECT_INPUTS = ("index", "embed", "cluster", "train")
INPUTS = {name: Marker(name, {}, {}, run_id=f"{name} made once") for name in SELECT_INPUTS}


def select_marker(config: Config) -> Marker:
    """Return the marker of a complete stage select that wrote empty tables."""
    identities = {name: marker.identity for name, marker in INPUTS.items()}
    runs = {name: marker.run_id for name, marker in INPUTS.items()}
    outputs = {name: {"files": 0, "bytes": 0} for name in SELECT.outputs(config)}
    return Marker(SELECT.name, SELECT.deciding_config(config), identities, input_runs=runs, outputs=outputs)


def message_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*REQUIRED, *overrides])
    return str(caught.value)


def test_overrides_win_over_the_yaml_file_and_the_file_over_defaults(tmp_path):
    yaml = tmp_path / "job.yaml"
    yaml.write_text("train: {epochs: 7, lr: 0.5}\nbudget: 0.2\n")
    config = load_config(yaml, [*REQUIRED, "train.lr=0.25"])
    assert (config.train.epochs, config.train.lr, config.train.momentum) == (7, 0.25, 0.9)


@pytest.mark.parametrize(
    "typed", ["2024_01_15", "007", "1e3", "on", "0x10", "1:30", "a: b", "[1]", "#2", "*", "'x'", " x"]
)
def test_a_text_is_taken_as_typed(tmp_path, typed):
    config = load_config(None, [*REQUIRED, f"run_dir={typed}", f"pool.label={typed}"])
    assert (config.run_dir, config.pool.label) == (typed, typed)
    # The others would need quotes in a YAML file.
    if typed[0] not in "[#*' " and ": " not in typed:
        (tmp_path / "job.yaml").write_text(f"run_dir: {typed}\npool: {{label: {typed}, uri: x}}\n")
        for config in (
            load_config(tmp_path / "job.yaml", REQUIRED[2:]),
            load_config(None, [*REQUIRED, f"run_dir={typed}", f"pool={{label: {typed}}}"]),
        ):
            assert (config.run_dir, config.pool.label) == (typed, typed)


def values_of(folder: Path, key: str, typed: str) -> list[object]:
    """Return what a key is set to by an override and by a YAML file; "refused" for an error that names the key."""
    section, _, name = key.rpartition(".")
    (folder / "job.yaml").write_text(f"{section}: {{{name}: {typed}}}" if section else f"{name}: {typed}")
    others = [override for override in REQUIRED if not override.startswith(f"{key}=")]
    values: list[object] = []
    for yaml, override in ((None, [f"{key}={typed}"]), (folder / "job.yaml", [])):
        try:
            values.append(operator.attrgetter(key)(load_config(yaml, [*others, *override])))
        except ConfigError as error:
            assert key in str(error) and str(error).count("\n") == 0
            values.append("refused")
    return values


NUMBERS = {
    **dict(zip(("010", "08", "+5", "1_000", "0x10", "0o10"), (10, 8, 5, 1000, 16, 8), strict=True)),
    **dict.fromkeys(["1:30", "1:30:00", "2024-01-15", "yes", "no", "on", "off", "y", "true", "12e", "1 0", ".inf"]),
}
FRACTIONS = {".5": 0.5, "1e-1": 0.1, "0.10": 0.1, "00.5": 0.5, "5.e-1": 0.5, "1_0e-2": 0.1, "190:20:30.15": None}


@pytest.mark.parametrize("key", ["budget", "train.lr", "train.epochs"])
def test_a_number_is_read_as_people_write_it(tmp_path, key):
    """PyYAML by itself reads 010 as 8, 1:30 as 90 and no as false."""
    cases = NUMBERS | (FRACTIONS if key in ("budget", "train.lr") else {"1e3": None, ".5": None})
    for typed, value in cases.items():
        values = values_of(tmp_path, key, typed)
        assert values == ["refused" if value is None else value] * 2, (typed, values)
    # 1 is one image and 1.0 the whole pool, so the types matter.
    assert [type(value) for value in values_of(tmp_path, "budget", "010")] == [int, int]


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        *(("cluster.spherical", typed, True) for typed in ("true", "True", "yes", "on", "1")),
        *(("cluster.spherical", typed, False) for typed in ("false", "FALSE", "no", "off", "0")),
        *(("cluster.num_neighbors", typed, None) for typed in ("null", "~", "Null")),
        ("cluster.num_neighbors", "012", 12),
        *(("budget", "[010, 0.50]", [10, 0.5]), ("budget", "[1:30]", "refused")),
        *(("train.std", "[.5, 1e0, 010]", [0.5, 1.0, 10.0]), ("train.std", "[1, 1, 1:30]", "refused")),
        *(("select.hard_fraction", ".5", 0.5), ("select.hard_fraction", "auto", "auto")),
        *(("train.num_workers", "01", 1), ("train.num_workers", "1-4", "1-4"), ("train.num_workers", "1:4", "refused")),
        *(("select.method", "no", "refused"), ("pool.label", "010", "010"), ("pool.label", "1:30", "1:30")),
    ],
)
def test_every_type_of_key_reads_an_override_as_a_yaml_file(tmp_path, key, typed, value):
    assert values_of(tmp_path, key, typed) == [value, value]


def test_yaml_files_may_reuse_values_but_not_repeat_keys(tmp_path):
    yaml = tmp_path / "job.yaml"
    yaml.write_text("train: &train {momentum: .5}\npretrain: {<<: *train}\n")
    assert load_config(yaml, REQUIRED).pretrain.momentum == 0.5
    yaml.write_text("seed: &seed 010\ntrain: {epochs: *seed}\n")
    assert load_config(yaml, REQUIRED).train.epochs == 10
    yaml.write_text("train: {epochs: 3, lr: 0.1, epochs: 4}\n")
    with pytest.raises(ConfigError, match="epochs is given twice"):
        load_config(yaml, REQUIRED)


def test_null_is_the_only_value_that_is_not_a_text(tmp_path):
    (tmp_path / "job.yaml").write_text("pool: {label: null}\n")
    for config in (
        load_config(None, [*REQUIRED, "pool.label=x", "pool.label=null"]),
        load_config(tmp_path / "job.yaml", REQUIRED),
    ):
        assert config.pool.label is None
    assert "bad value for run_dir" in message_of("run_dir=null")


@pytest.mark.parametrize(
    ("typed", "uri"),
    [
        ("007", "007"),
        ("[1", "[1"),
        ("data/train-*", "data/train-*"),
        ("[007, no,~/x]", ["007", "no", os.path.expanduser("~/x")]),
        ("a [b]/*", "a [b]/*"),
    ],
)
def test_the_pool_is_a_path_a_pattern_or_a_list_of_them(tmp_path, typed, uri):
    config = load_config(None, [*REQUIRED, f"pool.uri={typed}"])
    assert config.pool.uri == uri and config.pool.uris == (uri if isinstance(uri, list) else [uri])
    if typed != "[1":
        (tmp_path / "job.yaml").write_text(f"pool:\n  uri: {typed}\n")
        assert load_config(tmp_path / "job.yaml", [*REQUIRED[:1], *REQUIRED[2:]]).pool.uri == uri


@pytest.mark.parametrize("typed", ["null", "", "[]", "[a,null]", "[a,{b: c}]", "[[a]]"])
def test_a_pool_of_anything_else_is_refused(typed):
    with pytest.raises(ConfigError, match=r"pool\.uri"):
        load_config(None, [*REQUIRED, f"pool.uri={typed}"])


def test_texts_in_a_list_are_taken_as_typed():
    config = load_keys(EvaluateRunsConfig, overrides=["runs=[007,2024_01_15,~/x]", "out=no", "test_uri=~/test"])
    assert config.runs == ["007", "2024_01_15", str(Path.home() / "x")]
    assert (config.out, config.test_uri) == ("no", str(Path.home() / "test"))


def test_a_leading_tilde_is_the_home_directory(tmp_path):
    keys = [key for key, spec in fields_of(Config) if spec.metadata["is_path"]]
    of_sections = {"pool.uri", "embed.weights", "cluster.labels_uri", "select.labelled"}
    of_sections |= {"select.exclude", "evaluate.test_uri"}
    assert {"run_dir", *of_sections} == set(keys)
    home = (f"{key}=~/a/b" for key in keys)
    config = load_config(None, [*REQUIRED, "select.method=auto", "pool.label=label", *home])
    assert {operator.attrgetter(key)(config) for key in keys} == {str(Path.home() / "a" / "b")}
    assert load_config(None, [*REQUIRED, "pool.uri=s3://b/~/x"]).pool.uri == "s3://b/~/x"


def test_an_unknown_key_is_named_with_the_closest_known_ones():
    assert "no key named 'train.epoch'; did you mean train.epochs" in message_of("train.epoch=3")
    assert "no key named 'trian'" in message_of("trian.lr=3")


def test_missing_keys_are_all_named_at_once():
    with pytest.raises(ConfigError, match=r"budget, cluster\.num_clusters, pool\.uri, run_dir, select\.hard_fraction"):
        load_config(None, ["select.method=double_end"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=-1", "must be a number > 0"),
        ("train.lr=fast", "could not be converted to Float"),
        ("train.epochs=1.5", "could not be converted to Integer"),
        ("train.momentum=1", "must be a number >= 0 and < 1"),
        ("train.augmentation=cutout", "must be one of crop_flip, crop, resized_crop_flip, none"),
        ("train.mean=[1,2]", "must be 3 numbers"),
        ("train.std=[1,1,0]", "must be numbers > 0"),
        ("train.min_lr=1", "is above the learning rate"),
        ("train.image_size=64", "is above embed.proxy_image_size=32"),
        ("cluster.temi.batch_size=100 cluster.temi.num_workers=3", "give a multiple of 3"),
        ("budget=0", "must be a number > 0"),
        ("budget=-3", "must be a number > 0"),
        ("budget=nan", "bad value for budget"),
        ("select.hard_fraction=-0.1", "must be a number >= 0 and < 1"),
        ("select.hard_fraction=best", "must be a number >= 0 and < 1 or one of auto, search"),
        ("select.hard_fraction=[0.1,auto] budget=[0.1,0.2,0.3]", "has 2 values for 3 budgets"),
        ("select.search_step=0", "must be a number > 0"),
        ("cluster.num_clusters=1", "must be a number >= 2"),
        ("embed.encoder=", "embed.encoder"),
        ("train.network=linear train.reading=streamed", "reads no images"),
        ("train.network=linear select.hard_fraction=search", "linear sees embeddings: give auto or a number"),
        ("train.momentum=0", "train.nesterov=true, which needs momentum: give train.nesterov=false"),
        ("pretrain.momentum=0", "must be a number > 0 and < 1"),
        ("cluster.method=temi cluster.num_neighbors=0", "learns from neighbours: give a number, or null for 50"),
        ("cluster.num_clusters=65537 select.balance=true", "give at most 65,536 clusters, or select.balance=false"),
        (f"{SELF_SUPERVISED} pretrain.epochs=3 pretrain.warmup_epochs=3", "must be less than 3 epochs"),
        (f"{SELF_SUPERVISED} pretrain.warmup_epochs=400", "must be less than 400 epochs"),
        (f"{SELF_SUPERVISED} pretrain.profile=cpu pretrain.warmup_epochs=16", "must be less than 16 epochs"),
        ("train=3", "bad value"),
        ("pool=null", "bad value"),
        ("budget", "write key=value"),
        ("=3", "write key=value"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(override, message):
    assert message in message_of(*override.split(" "))


def test_a_missing_config_file_and_one_without_keys_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml", REQUIRED)
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(tmp_path / "list.yaml", REQUIRED)


@pytest.mark.parametrize(
    "overrides",
    [
        "train.momentum=0 train.nesterov=false",
        "cluster.method=temi",
        "cluster.num_clusters=65536 select.balance=true",
        f"{SELF_SUPERVISED} pretrain.epochs=0 pretrain.warmup_epochs=5",
        f"{SELF_SUPERVISED} pretrain.epochs=3",
        "pretrain.epochs=3 pretrain.warmup_epochs=3",  # unused, as the run does not pretrain
    ],
)
def test_values_next_to_the_refused_ones_are_accepted(overrides):
    load_config(None, [*REQUIRED, *overrides.split(" ")])


@pytest.mark.parametrize(
    ("overrides", "num_samples", "message"),
    [
        ([], 0, "holds no images"),
        (["budget=1", "cluster.num_clusters=2"], 1, "holds one image: a selection needs at least 2"),
        (["cluster.num_clusters=auto"], 39, "num_clusters=auto with a pool of 39 samples: needs at least 40"),
        (["select.method=auto", "cluster.num_clusters=auto"], 33, "num_clusters=auto with a pool of 33"),
        (
            [*TEMI, "cluster.temi.pca_dim=34"],
            33,
            r"cluster\.temi\.pca_dim=34 with a pool of 33 samples: give 33 at most",
        ),
        ([*TEMI, "cluster.temi.pca_dim=20001"], 10**6, "give 20000 at most, or null"),
        ([*TEMI, "cluster.temi.num_workers=64", "cluster.temi.batch_size=64"], 33, r"cluster\.temi\.num_workers=64"),
        ([*TEMI, "select.method=d2"], 10, "select.d2_neighbors=10 with a pool of 10 samples: must be less"),
        (["select.method=zcore", "budget=1"], 1, "zcore needs at least 2"),
        (["budget=1", "select.hard_fraction=search"], 100, "search trains on the coreset: give a budget of 2"),
        (["cluster.num_clusters=11"], 10, "more than the pool's 10 samples"),
        (["budget=101"], 100, "budget"),
        (["budget=0.001"], 100, "rounds down to no sample"),
        (["budget=0.9", "select.hard_fraction=0.2"], 100, "hard_fraction"),
        (["budget=95", "select.hard_fraction=0.06"], 100, "hard_fraction"),
    ],
)
def test_a_config_that_does_not_fit_the_pool_is_refused(overrides, num_samples, message):
    config = load_config(None, [*REQUIRED, *overrides])
    with pytest.raises(ConfigError, match=message):
        check_against_pool(config, num_samples)


@pytest.mark.parametrize(
    ("overrides", "num_samples"),
    [
        (["cluster.num_clusters=auto"], 40),
        ([*TEMI, "cluster.temi.profile=cpu"], 33),
        ([*TEMI, "cluster.temi.pca_dim=33"], 33),
        ([*TEMI, "cluster.temi.pca_dim=0"], 33),
        (["select.method=coverage", "cluster.num_clusters=auto", "cluster.temi.pca_dim=99", "budget=2"], 2),
        (["cluster.method=file", "cluster.labels_uri=/x", "cluster.num_clusters=auto"], 33),
        ([*TEMI, "select.method=d2"], 11),
    ],
)
def test_a_config_that_just_fits_the_pool_is_accepted(overrides, num_samples):
    check_against_pool(load_config(None, [*REQUIRED, *overrides]), num_samples)


def test_too_many_clusters_of_a_file_to_balance_over_are_refused(tmp_path):
    """Stage cluster counts them, long before stage select would balance over them."""
    config = load_config(None, [*REQUIRED, "cluster.method=file", "cluster.labels_uri=/x", "select.balance=true"])
    for num_clusters in (65536, 65537):
        mark(RunDir(tmp_path), ClusterResult(100_000, num_clusters, "file", workers=1, sizes=[]))
        refused = pytest.raises(ConfigError, match=r"select\.balance=true with 65,537 clusters")
        with refused if num_clusters > 65536 else contextlib.nullcontext():
            cluster.STAGE.check_result(config, RunDir(tmp_path))


def test_beta_may_be_zero_or_all_that_the_budget_leaves():
    for beta in ("0", "0.9"):
        check_against_pool(load_config(None, [*REQUIRED, f"select.hard_fraction={beta}"]), 1003)


def test_a_hard_fraction_may_be_a_word_alone_or_among_numbers():
    """A method without a hard fraction ignores it."""
    for words, expected in (("auto", ["auto"] * 3), ("[search,0.2,auto]", ["search", 0.2, "auto"])):
        overrides = [*REQUIRED, "budget=[0.1,0.3,0.5]", f"select.hard_fraction={words}"]
        config = load_config(None, overrides)
        assert config.hard_fractions == expected
        check_against_pool(config, 1003)
        assert load_config(None, [*overrides, "select.method=random"]).hard_fractions == [0.0] * 3


def test_training_keys_decide_a_result_and_numbers_of_workers_do_not():
    keys = deciding_keys(load_config(None, REQUIRED).train)
    assert "num_workers" not in keys and "device" not in keys
    assert {"epochs", "lr", "network", "augmentation"} <= set(keys)


@pytest.mark.parametrize(
    ("overrides", "searches"),
    [
        ([], False),
        (["select.hard_fraction=auto"], False),
        (["select.hard_fraction=search"], True),
        (["select.hard_fraction=search", "select.method=random"], False),
        (["budget=[0.1,0.2]", "select.hard_fraction=[0.2,search]"], True),
    ],
)
def test_the_keys_of_search_decide_only_where_there_is_a_search(overrides, searches):
    keys = deciding_keys(load_config(None, [*REQUIRED, *overrides]).select)
    assert {"search_step" in keys, "search_iterations" in keys, "search_holdout" in keys} == {searches}
    assert {"hard_fraction", "method", "score", "balance"} <= set(keys)


@pytest.mark.parametrize(("hard_fraction", "action"), [("0.3", "done"), ("search", "rerun")])
def test_a_changed_key_of_search_matters_only_where_there_is_a_search(tmp_path, hard_fraction, action):
    run_dir = RunDir(tmp_path)
    overrides = [*REQUIRED, f"select.hard_fraction={hard_fraction}"]
    before, after = (load_config(None, [*overrides, f"select.search_iterations={steps}"]) for steps in (5, 6))
    run_dir.mark_complete(select_marker(before))
    assert plan_stage(SELECT, before, run_dir, INPUTS).action == "done"
    assert plan_stage(SELECT, after, run_dir, INPUTS).action == action


@pytest.mark.parametrize(
    ("before", "after", "action", "differences"),
    [
        ("select.hard_fraction=0", "select.hard_fraction=0.0", "done", ()),
        (
            *("budget=[0.1,1] select.hard_fraction=[0,0.5]", "budget=[0.1,1] select.hard_fraction=[0.0,0.5]"),
            *("done", ()),
        ),
        ("budget=1", "budget=1.0", "rerun", ("budget: 1 in the run directory, 1.0 now",)),
        ("seed=0", "seed=1", "rerun", ("seed: 0 in the run directory, 1 now",)),
    ],
)
def test_equal_values_change_nothing_and_every_difference_is_shown(tmp_path, before, after, action, differences):
    run_dir = RunDir(tmp_path)
    config, changed = (load_config(None, [*REQUIRED, *overrides.split(" ")]) for overrides in (before, after))
    run_dir.mark_complete(select_marker(config))
    planned = plan_stage(SELECT, changed, run_dir, INPUTS)
    assert (planned.action, planned.differences) == (action, differences)


def test_a_difference_in_the_inputs_or_in_a_removed_key_is_shown(tmp_path):
    run_dir, config = RunDir(tmp_path), load_config(None, REQUIRED)
    marker = select_marker(config)
    for changes, difference in (
        ({"config": {**marker.config, "select.gone": None}}, "select.gone: null in the run directory, not set now"),
        ({"inputs": {**marker.inputs, "copy": "another"}}, "made from another copy"),
        ({"input_runs": {**marker.input_runs, "train": "another"}}, "made from another train"),
    ):
        run_dir.mark_complete(replace(marker, **changes))
        assert plan_stage(SELECT, config, run_dir, INPUTS).differences == (difference,)


@pytest.mark.parametrize("until", ["nothing", "copy", "pretrain"])
def test_until_must_be_a_stage_of_the_run(until):
    with pytest.raises(ConfigError, match=f"until='{until}': must be one of index, embed, cluster, train, select, rep"):
        stages_of(load_config(None, [*REQUIRED, f"until={until}"]))
    names = [stage.name for stage in stages_of(load_config(None, [*REQUIRED, SELF_SUPERVISED, "until=pretrain"]))]
    assert names == ["index", "copy", "pretrain"]


def test_every_key_is_described_with_its_default_and_meaning():
    described = {key: (default, meaning) for key, default, meaning in describe_keys()}
    assert described["train.epochs"][0] == "200 epochs"
    assert described["run_dir"][0] == "required"
    assert all(meaning for _, meaning in described.values())


KEYS = [key for key, _, _ in describe_keys()]
VALUES = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(["", "null", "true", "[]", "{}", "[1,2]", "{a: 1}", "'x'", "a b", "\x00", "é", "~", "1e400"]),
    st.text(max_size=20),
)


@settings(max_examples=50, deadline=None)
@given(key=st.sampled_from(KEYS) | st.text(max_size=15), value=VALUES)
def test_any_input_gives_a_config_or_a_config_error(key, value):
    try:
        load_config(None, [*REQUIRED, f"{key}={value}"])
    except ConfigError as error:
        assert str(error)
