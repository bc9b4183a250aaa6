"""The files in cluster_configs/ are valid for Ray's launcher and KubeRay, and do what their comments promise."""

import copy
import http.server
import os
import re
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError, validate
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

from elfs_ray.cli import read_arguments
from elfs_ray.commands import select
from elfs_ray.version import __version__
from tests.cluster_configs.kuberay_schema import RAY_JOB

ROOT = Path(__file__).parents[2]
CLUSTER_CONFIGS = ROOT / "cluster_configs"
LAUNCHER_FILES = ("aws.yaml", "gcp.yaml")
SPOT = {
    "aws.yaml": lambda node: node["InstanceMarketOptions"]["MarketType"] == "spot",
    "gcp.yaml": lambda node: node["scheduling"]["provisioningModel"] == "SPOT",
}
on_each_cloud = pytest.mark.parametrize("name", LAUNCHER_FILES)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER_CONFIGS / name).read_text())


def launched(name: str) -> dict[str, Any]:
    """Return a launcher file as `ray up` sees it, with Ray's defaults filled in."""
    return prepare_config(load(name))


def pinned(package: str) -> str:
    pin = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None, package
    return pin[1]


@pytest.fixture(scope="module")
def ray_job() -> dict[str, Any]:
    return load("kuberay-rayjob.yaml")


@pytest.fixture(scope="module")
def ray_cluster_spec(ray_job: dict[str, Any]) -> dict[str, Any]:
    return ray_job["spec"]["rayClusterSpec"]


def containers(ray_cluster_spec: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [ray_cluster_spec["headGroupSpec"], *ray_cluster_spec["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


@on_each_cloud
def test_rays_own_validation_accepts_the_launcher_file(name: str):
    validate_config(launched(name))


@on_each_cloud
def test_rays_own_validation_refuses_the_launcher_file_with_a_misspelt_key(name: str):
    config = copy.deepcopy(launched(name))
    config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")
    with pytest.raises(ValidationError, match="idle_timeout_minute"):
        validate_config(config)


@on_each_cloud
def test_no_task_runs_on_the_launchers_head(name: str):
    config = launched(name)
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


@on_each_cloud
def test_the_launchers_workers_are_spot_nodes_with_and_without_gpus(name: str):
    config = launched(name)
    workers = {key: node for key, node in config["available_node_types"].items() if key != config["head_node_type"]}
    assert all(SPOT[name](node["node_config"]) for node in workers.values())
    assert sorted(node["resources"]["GPU"] > 0 for node in workers.values()) == [False, True]
    for node in workers.values():
        run_options = node.get("docker", {}).get("worker_run_options", [])
        assert ("--gpus all" in run_options) == (node["resources"]["GPU"] > 0)


@on_each_cloud
def test_a_launcher_cluster_terminates_idle_nodes(name: str):
    config = launched(name)
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False
    workers = [node for key, node in config["available_node_types"].items() if key != config["head_node_type"]]
    assert all(node["min_workers"] == 0 for node in workers)
    assert config["max_workers"] == sum(node["max_workers"] for node in config["available_node_types"].values())


@on_each_cloud
def test_the_launchers_dashboard_listens_only_on_the_head(name: str):
    start = launched(name)["head_start_ray_commands"][-1]
    assert re.findall(r"--dashboard-host=(\S+)", start) == ["127.0.0.1"]
    assert "security_group" not in launched(name)["provider"]


@on_each_cloud
def test_every_launcher_node_has_the_token_and_requires_it(name: str):
    config = launched(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


@on_each_cloud
def test_launcher_nodes_install_nothing_when_they_start(name: str):
    config = launched(name)
    commands = [*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"]]
    assert not [command for command in commands if "install" in command]


class _Metadata(http.server.BaseHTTPRequestHandler):
    """A cloud's metadata server, which gives notice from the third question on; AWS's wants a token with each."""

    num_asked = 0

    def do_PUT(self) -> None:
        self._answer(b"a-token" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else None)

    def do_GET(self) -> None:
        _Metadata.num_asked += 1
        has_notice = _Metadata.num_asked > 2
        if (
            self.path == "/latest/meta-data/spot/instance-action"
            and self.headers["X-aws-ec2-metadata-token"] == "a-token"
        ):
            self._answer(b'{"action": "terminate"}' if has_notice else None)
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(b"TRUE" if has_notice else b"FALSE")
        else:
            self._answer(None)

    def _answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


@pytest.mark.skipif(shutil.which("wget") is None, reason="needs wget, which Ray's image has")
@on_each_cloud
def test_a_launchers_worker_drains_itself_when_its_cloud_gives_notice(name: str, tmp_path: Path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Metadata.num_asked = 0
    ray, drained = tmp_path / "ray", tmp_path / "drained"
    ray.write_text(f'#!/bin/bash\necho "$@" > {drained}.new; mv {drained}.new {drained}\n')
    ray.chmod(0o755)
    command = load(name)["worker_start_ray_commands"][-1].replace("/tmp/spot-notice.log", str(tmp_path / "log"))
    for host in ("169.254.169.254", "metadata.google.internal"):
        command = command.replace(f"http://{host}/", f"http://127.0.0.1:{server.server_port}/")
    command = re.sub(r"sleep \d", "sleep 0.1", command)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    try:
        subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=20)
        _wait_until(drained.exists)
    finally:
        server.shutdown()
    assert _Metadata.num_asked == 3
    assert drained.read_text().startswith(
        "drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message=spot notice"
    )


def _wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@on_each_cloud
def test_the_launchers_nodes_have_labels_of_their_market(name: str):
    config = launched(name)
    nodes = dict(config["available_node_types"])
    assert nodes.pop(config["head_node_type"])["labels"]["ray.io/market-type"] == "on-demand"
    assert all(node["labels"]["ray.io/market-type"] == "spot" for node in nodes.values())
    assert {node["labels"]["ray.io/availability-region"] for node in nodes.values()} == {config["provider"]["region"]}


def test_the_rayjob_is_valid_for_kuberay(ray_job: dict[str, Any]):
    validate(ray_job, RAY_JOB)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("spec", "shutdownAfterJobFinish", True),
        ("spec.rayClusterSpec", "authOption", {"mode": "token"}),
        ("spec.rayClusterSpec.authOptions", "mode", "tokens"),
        ("spec.rayClusterSpec.autoscalerOptions", "version", "2"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams", "num-cpus", 0),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "maxReplicas", "2"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec", "nodeSelectors", {}),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits", "memory", "160 GB"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.lifecycle", "prestop", {}),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "labels", {"spot": True}),
        ("spec", "deletionStrategy", {"deletionRules": [{"policy": "DeleteCluster", "condition": {}}]}),
    ],
)
def test_a_misspelt_key_or_a_wrong_type_in_the_rayjob_is_detected(ray_job, place, key, value):
    changed = copy.deepcopy(ray_job)
    target: Any = changed
    for part in place.split("."):
        target = target[int(part) if part.isdecimal() else part]
    target[key] = value
    with pytest.raises(ValidationError):
        validate(changed, RAY_JOB)


def test_the_rayjob_scales_with_autoscaler_v2(ray_cluster_spec: dict[str, Any]):
    assert ray_cluster_spec["enableInTreeAutoscaling"] is True
    assert ray_cluster_spec["autoscalerOptions"]["version"] == "v2"
    assert 0 < ray_cluster_spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 600
    for group in ray_cluster_spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # Autoscaler v2 takes a restarted container for an unknown node.
        assert group["template"]["spec"]["restartPolicy"] == "Never"


def test_no_task_runs_on_the_rayjobs_head(ray_cluster_spec: dict[str, Any]):
    assert ray_cluster_spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_rayjobs_workers_are_spot_pods_with_and_without_gpus(ray_cluster_spec: dict[str, Any]):
    pods = [group["template"]["spec"] for group in ray_cluster_spec["workerGroupSpecs"]]
    assert all(pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"} for pod in pods)
    assert sorted("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] for pod in pods) == [False, True]


def test_the_rayjob_requires_a_token_and_opens_no_public_port(ray_cluster_spec: dict[str, Any]):
    assert ray_cluster_spec["authOptions"] == {"mode": "token"}
    assert ray_cluster_spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not ray_cluster_spec["headGroupSpec"].get("enableIngress")


def test_the_rayjob_deletes_its_cluster_and_retries_a_failed_job(ray_job: dict[str, Any]):
    assert ray_job["spec"]["shutdownAfterJobFinishes"] is True
    assert ray_job["spec"]["ttlSecondsAfterFinished"] > 0
    assert ray_job["spec"]["backoffLimit"] > 0


def test_the_deletion_rules_in_the_comments_are_valid_in_place_of_the_shutdown(ray_job: dict[str, Any]):
    text = (CLUSTER_CONFIGS / "kuberay-rayjob.yaml").read_text()
    commented = re.search(r"^#   deletionStrategy:\n(?:#     .*\n)+", text, re.MULTILINE)
    assert commented is not None
    changed = copy.deepcopy(ray_job)
    changed["spec"] |= yaml.safe_load(re.sub(r"^#   ", "", commented[0], flags=re.MULTILINE))
    with pytest.raises(ValidationError):  # as the operator refuses both
        validate(changed, RAY_JOB)
    del changed["spec"]["shutdownAfterJobFinishes"], changed["spec"]["ttlSecondsAfterFinished"]
    validate(changed, RAY_JOB)


def test_a_rayjobs_pod_that_must_go_drains_its_node_in_time(ray_cluster_spec: dict[str, Any]):
    for group in ray_cluster_spec["workerGroupSpecs"]:
        assert group["labels"] == {"ray.io/market-type": "spot"}
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert command.startswith("ray drain-node --reason=DRAIN_NODE_REASON_PREEMPTION ")
        assert pod["terminationGracePeriodSeconds"] > int(re.findall(r"--deadline-remaining-seconds=(\d+)", command)[0])


def test_the_rayjobs_gpus_are_requested_by_stages_and_released_after(ray_job: dict[str, Any]):
    (gpus,) = (
        group["maxReplicas"] * int(limits["nvidia.com/gpu"])
        for group in ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        if "nvidia.com/gpu" in (limits := group["template"]["spec"]["containers"][0]["resources"]["limits"])
    )
    overrides = dict(word.split("=") for word in ray_job["spec"]["entrypoint"].split() if "=" in word)
    for stage in ("embed", "cluster", "train"):
        assert overrides[f"{stage}.device"] == "cuda"
        assert overrides[f"{stage}.num_workers"].rpartition("-")[2] == str(gpus)
    assert all(group["minReplicas"] == 0 for group in ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"])


def test_the_rayjob_runs_an_existing_job_with_keys_that_exist(ray_job: dict[str, Any]):
    script, command, *arguments = ray_job["spec"]["entrypoint"].split()
    assert (script, command) == ("elfs-ray", "select")
    config = select.load(read_arguments(arguments, select.KEYS, "pool.uri"))
    assert config.pool.uri.startswith("gs://") and config.train.network == "resnet34"


def test_the_versions_are_those_of_the_constraints_file(ray_cluster_spec: dict[str, Any]):
    dockerfile = (CLUSTER_CONFIGS / "Dockerfile").read_text()
    assert re.findall(r"^FROM rayproject/ray:([\d.]+)-py311$", dockerfile, re.MULTILINE) == [pinned("ray")]
    assert re.findall(r"faiss-gpu==([\d.]+)", dockerfile) == [pinned("faiss-cpu")]
    assert ray_cluster_spec["rayVersion"] == pinned("ray")


def test_every_file_names_the_image_of_this_version(ray_cluster_spec: dict[str, Any]):
    images = [container["image"] for container in containers(ray_cluster_spec)]
    images += [load(name)["docker"]["image"] for name in LAUNCHER_FILES]
    assert {image.rpartition("/")[2] for image in images} == {f"elfs-ray:{__version__}"}


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "kuberay-rayjob.yaml", "Dockerfile"])
def test_every_file_begins_with_what_to_edit(name: str):
    lines = (CLUSTER_CONFIGS / name).read_text().splitlines()
    comment = lines[: next(position for position, line in enumerate(lines) if not line.startswith("#"))]
    assert any(line.startswith("# Edit") for line in comment)


def test_a_submitted_working_directory_has_the_jobs_and_no_runs(tmp_path: Path):
    for folder in (".git", ".venv", "runs", "tests", "jobs", "elfs_ray/methods", "elfs_ray/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file.py").write_text("")
    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    package = tmp_path / "package.zip"
    create_package(str(tmp_path), package, include_gitignore=False)
    with zipfile.ZipFile(package) as archive:
        files = {name for name in archive.namelist() if name.endswith(".py")}
    assert files == {"jobs/file.py", "elfs_ray/methods/file.py"}
