"""Every key with every kind of bad value: one clear message, exit code 2, no traceback, and no work started."""

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elfs_ray.commands import main
from elfs_ray.config import Config, ConfigError, fields_of, load_config
from elfs_ray.presets import preset
from tests.tables import digit_images, png

YAML = preset("cifar10")
BASE = {
    "run_dir": "/run",
    "budget": 0.1,
    "pool": {"uri": "/pool"},
    "cluster": {"num_clusters": 2},
    "select": {"hard_fraction": 0.3},
}
KEYS = dict(fields_of(Config))
NUMBERS = {key for key, spec in KEYS.items() if spec.metadata["bounds"] or "int" in str(spec.type)}
FLAGS = {key for key, spec in KEYS.items() if spec.type is bool}
CHOSEN = {key for key, spec in KEYS.items() if spec.metadata["choices"] and not spec.metadata["bounds"]}
TEXTS = set(KEYS) - NUMBERS - FLAGS - CHOSEN - {"train.mean", "train.std"}
WRONG_FOR_ALL = ["${oops}"]
WRONG_FOR_ALL_BUT_TEXTS = ["[[1]]", "{a: 1}"]  # which a text takes as typed
WRONG_FOR = {
    "a number": (NUMBERS, ["fast", "true", "nan", "inf", "-7", "99999999999999999999"]),
    "a flag": (FLAGS, ["maybe", "1.5", "nan"]),
    "a choice": (CHOSEN, ["fast", "-1", "nan", "AUTO"]),
    "a text": (TEXTS, []),
    "three numbers": ({"train.mean", "train.std"}, ["nan", "[nan,0,0]", "[1e99,1,1]", "[a,b,c]", "[1,2]", "3"]),
}


def run_the_job(*arguments: str) -> tuple[int, str]:
    """Run the job as its script does; return its exit code and what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        code = main(["select", "--preset=cifar10", *arguments])
    return code, output.getvalue()


def test_every_key_is_of_exactly_one_kind():
    kinds = [NUMBERS, FLAGS, CHOSEN, TEXTS, {"train.mean", "train.std"}]
    assert set().union(*kinds) == set(KEYS) and sum(map(len, kinds)) == len(KEYS)


@pytest.mark.parametrize("kind", WRONG_FOR)
def test_every_key_refuses_values_of_other_kinds(kind):
    keys, values = WRONG_FOR[kind]
    values = values if kind == "a text" else [*WRONG_FOR_ALL_BUT_TEXTS, *values]
    assert keys
    for number, key in enumerate(sorted(keys)):
        # "key=" means null, which is a good value for some keys.
        empty = [] if "None" in str(KEYS[key].type) else [""]
        # A third of the values for each key, as reading a config takes some 20 ms.
        for value in [*WRONG_FOR_ALL, *values, *empty][number % 3 :: 3]:
            with pytest.raises(ConfigError) as caught:
                load_config(None, [f"{key}={value}"], base=BASE)
            message = str(caught.value)
            assert key.rpartition(".")[2] in message, (key, value, message)
            assert message.count("\n") == 0 and len(message) < 600, (key, value, message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.epochs=-1"],
        ["train.epoch=3"],
        ["budget=nan"],
        ["run_dir="],
        ["train={lr: [1]}"],
        ["train.crop_padding=32"],
        ["nonsense"],
        ["train.lr=???"],
        ["train.mean=[]"],
        ["--fast"],
        ["run_dir=nosuch://bucket/run"],
        ["run_dir=s3:/bucket/run"],
        ["pool.uri=gs:bucket/pool"],
        ["cluster.labels_uri=s3://bucket/../labels"],
        ["run_dir=/etc/hostname/run"],
        ["cluster.method=file", "cluster.labels_uri=/no/such"],
        ["embed.weights=\x00"],
        ["pool.uri=\x00"],
        ["cluster.num_neighbors=3"],
    ],
)
def test_a_job_with_a_bad_config_ends_with_one_message(arguments, pool, tmp_path):
    run_dir = tmp_path / "run"
    code, output = run_the_job(f"pool.uri={pool}", f"run_dir={run_dir}", "embed.encoder=pixels", *FITTING, *arguments)
    assert code == 2 and output.startswith("error: "), output
    assert "Traceback" not in output
    assert not run_dir.exists()


BROKEN_YAML = (b"a: [1", b"\xff\xfe\x00", b"a: &a [*a]", b"- 1", b"train: 3", b"!!python/object:os.system x")


@pytest.mark.parametrize("content", BROKEN_YAML)
def test_a_broken_yaml_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_config(tmp_path / "job.yaml", base=BASE)


FITTING = ["budget=1", "cluster.num_clusters=2", "select.hard_fraction=0.1"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """Return a folder with three images of digits."""
    folder = tmp_path_factory.mktemp("pool")
    images, _ = digit_images(3)
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(png(image))
    return folder


VALUES = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "null", "true", "[]", "{}", "[1,2]", "{a: 1}", "'x'", "a b", "\x00", "é", "~", "/", "s3://", "a://b"]
    ),
    st.text(max_size=12),
)
# Keys for which a random value would make the test look for a cluster, or for files on a network.
ELSEWHERE = {"ray_address", "embed.encoder", "run_dir", "pool.uri", "embed.weights", "cluster.labels_uri"}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(key="train.batch_size", value="999999")
@example(key="cluster.num_neighbors", value="2")
@given(key=st.sampled_from(sorted(set(KEYS) - ELSEWHERE)) | st.text(max_size=12), value=VALUES)
def test_a_job_with_any_input_can_run_or_says_why_not(pool, tmp_path, key, value):
    run_dir = tmp_path / "run"
    arguments = [f"pool.uri={pool}", f"run_dir={run_dir}", "embed.encoder=pixels", "ray_address=local", *FITTING]
    code, output = run_the_job("--dry-run", *arguments, f"{key}={value}")
    assert code in (0, 2), output
    assert ("error: " in output) == (code == 2) and "Traceback" not in output
    assert not run_dir.exists()
