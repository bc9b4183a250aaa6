"""Every key with every kind of bad value: one clear message, exit code 2, no traceback, no work begun."""

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elfs_ray import cli
from elfs_ray.config import Config, ConfigError, fields_of, load_config
from tests.tables import digit_images, png

JOBS = Path(__file__).parents[2] / "jobs"
YAML = JOBS / "cifar10.yaml"
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
WRONG_FOR_OTHERS = ["[[1]]", "{a: 1}"]  # than texts, which take what is typed
WRONG_FOR = {
    "a number": (NUMBERS, ["fast", "true", "nan", "inf", "-7", "99999999999999999999"]),
    "a flag": (FLAGS, ["maybe", "1.5", "nan"]),
    "a choice": (CHOSEN, ["fast", "-1", "nan", "AUTO"]),
    "a text": (TEXTS, []),
    "three numbers": ({"train.mean", "train.std"}, ["nan", "[nan,0,0]", "[1e99,1,1]", "[a,b,c]", "[1,2]", "3"]),
}


def in_the_job(*arguments: str) -> tuple[int, str]:
    """(exit code, what is said) of the job, called as its script does."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.run_job("a job", YAML, list(arguments))
    return code, said.getvalue()


def test_every_key_is_of_one_kind():
    kinds = [NUMBERS, FLAGS, CHOSEN, TEXTS, {"train.mean", "train.std"}]
    assert set().union(*kinds) == set(KEYS) and sum(map(len, kinds)) == len(KEYS)


@pytest.mark.parametrize("kind", WRONG_FOR)
def test_every_key_refuses_what_is_not(kind):
    keys, values = WRONG_FOR[kind]
    values = values if kind == "a text" else [*WRONG_FOR_OTHERS, *values]
    assert keys
    for key in sorted(keys):
        # Nothing is null, where a key may be that.
        empty = [] if "None" in str(KEYS[key].type) else [""]
        for value in [*WRONG_FOR_ALL, *values, *empty]:
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
        ["run_dir=/etc/hostname/run"],
        ["cluster.method=file", "cluster.labels_uri=/no/such"],
        ["embed.weights=\x00"],
        ["pool.uri=\x00"],
        ["cluster.num_neighbors=3"],
    ],
)
def test_a_job_with_a_bad_config_ends_with_one_message_and_no_work(arguments, pool, tmp_path):
    run_dir = tmp_path / "run"
    code, said = in_the_job(f"pool.uri={pool}", f"run_dir={run_dir}", "embed.encoder=pixels", *FITTING, *arguments)
    assert code == 2 and said.startswith("error: "), said
    assert "Traceback" not in said
    assert not run_dir.exists()


BROKEN_YAML = (b"a: [1", b"\xff\xfe\x00", b"a: &a [*a]", b"- 1", b"train: 3", b"!!python/object:os.system x")


@pytest.mark.parametrize("content", BROKEN_YAML)
def test_a_broken_yaml_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_config(tmp_path / "job.yaml", base=BASE)


FITTING = ["budget=1", "cluster.num_clusters=2", "select.hard_fraction=0.1"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """A folder of three digits."""
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
# Keys whose values would have the test look for a cluster, or for files on a network.
ELSEWHERE = {"ray_address", "embed.encoder", "run_dir", "pool.uri", "embed.weights", "cluster.labels_uri"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(key="train.batch_size", value="999999")
@example(key="cluster.num_neighbors", value="2")
@given(key=st.sampled_from(sorted(set(KEYS) - ELSEWHERE)) | st.text(max_size=12), value=VALUES)
def test_whatever_is_typed_the_job_can_run_or_says_why_not(pool, tmp_path, key, value):
    run_dir = tmp_path / "run"
    arguments = [f"pool.uri={pool}", f"run_dir={run_dir}", "embed.encoder=pixels", "ray_address=local", *FITTING]
    code, said = in_the_job("--dry-run", *arguments, f"{key}={value}")
    assert code in (0, 2), said
    assert ("error: " in said) == (code == 2) and "Traceback" not in said
    assert not run_dir.exists()
