"""Import an export with the tool itself: python importers.py TOOL EXPORT, in the environment of `make test-export`.

Prints a JSON list of the images, in the order that the tool has them: the SHA-256 of their bytes, and their metadata.
It imports neither elfs_ray nor pytest, which that environment lacks.
"""

import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIELDS = ("sample_id", "rank", "pseudo_label", "score", "similarity")
Image = dict[str, Any]
LABEL_CONFIG = (
    '<View><Image name="image" value="$image"/>'
    '<Choices name="class" toName="image"><Choice value="cat"/><Choice value="dog"/></Choices></View>'
)
START_S = 240


def described(data: bytes, metadata: dict[str, Any]) -> Image:
    return {"sha256": hashlib.sha256(data).hexdigest(), **{name: metadata.get(name) for name in FIELDS}}


def read_webdataset(export: Path) -> list[Image]:
    import webdataset

    rows = webdataset.WebDataset([str(path) for path in sorted(export.iterdir())], shardshuffle=False)
    return [described(row.get("jpg") or row["png"], json.loads(row["json"])) for row in rows]


def read_huggingface(export: Path) -> list[Image]:
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset(str(export), split="train", cache_dir=cache)
        assert all(row["image"].size for row in rows)  # decoded to Pillow's images
        rows = rows.cast_column("image", datasets.Image(decode=False))
        return [described(row["image"]["bytes"], row) for row in rows]


def read_fiftyone(export: Path) -> list[Image]:
    """Import with FiftyOne, with mongomock in place of the MongoDB that it downloads when it is installed."""
    import mongomock
    import pymongo
    from mongomock.store import ServerStore

    store = ServerStore()

    class Client(mongomock.MongoClient):
        _closed = False

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, _store=store, **options)

    pymongo.MongoClient = Client
    os.environ |= {"FIFTYONE_DATABASE_URI": "mongodb://localhost", "FIFTYONE_DATABASE_VALIDATION": "false"}
    os.environ |= {"FIFTYONE_DO_NOT_TRACK": "true"}
    import fiftyone

    dataset = fiftyone.Dataset.from_dir(
        dataset_dir=str(export), dataset_type=fiftyone.types.LegacyFiftyOneDataset, progress=False
    )
    images = []
    for sample in dataset:
        label = sample.pseudo_label and int(sample.pseudo_label.label)
        metadata = {name: sample[name] for name in FIELDS} | {"pseudo_label": label}
        images.append(described(Path(sample.filepath).read_bytes(), metadata))
    return images


def read_cvat(export: Path) -> list[Image]:
    """Make the request for a task with cvat-sdk; the server, which comes in containers alone, is not run."""
    from cvat_sdk.api_client import models

    entries = [json.loads(line) for line in export.read_text().splitlines()][2:]
    request = models.DataRequest(
        image_quality=70,
        server_files=[entry["name"] + entry["extension"] for entry in entries],
        sorting_method=models.SortingMethod("predefined"),
    )
    share = Path(os.environ["SHARE"])
    files = [(share / name).read_bytes() for name in request.to_dict()["server_files"]]
    return [described(data, entry["meta"]) for data, entry in zip(files, entries, strict=True)]


def read_label_studio(export: Path) -> list[Image]:
    """Start Label Studio, import the tasks and fetch their images; label the first two and export them."""
    import requests
    from label_studio_sdk import LabelStudio

    key, port, share = secrets.token_hex(20), "8097", os.environ["SHARE"]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "label-studio"), "start", "--no-browser", "--data-dir", folder]
        command += ["--port", port, "--internal-host", "127.0.0.1", "--enable-legacy-api-token", "--user-token", key]
        command += ["--username", "user@example.org", "--password", secrets.token_hex(8)]
        settings = {
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
            "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(Path(share).parent),
            "LATEST_VERSION_CHECK": "false",
            "COLLECT_ANALYTICS": "false",
        }
        server = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=sys.stderr)
        try:
            _wait_for(url, server)
            client = LabelStudio(base_url=url, api_key=key)
            project = client.projects.create(title="coreset", label_config=LABEL_CONFIG).id
            client.import_storage.local.create(project=project, path=share, use_blob_urls=True)
            client.projects.import_tasks(id=project, request=json.loads(export.read_text()))
            tasks = list(client.tasks.list(project=project))
            session = requests.Session()
            session.headers["Authorization"] = f"Token {key}"
            images = []
            for task in tasks:
                answer = session.get(url + task.data["image"], timeout=60)
                answer.raise_for_status()
                images.append(described(answer.content, task.data))
            choice = {"from_name": "class", "to_name": "image", "type": "choices", "value": {"choices": ["cat"]}}
            for task in tasks[:2]:
                client.annotations.create(id=task.id, result=[choice])
            for kind in ("JSON", "JSON_MIN"):
                exported = session.get(f"{url}/api/projects/{project}/export?exportType={kind}", timeout=60)
                Path(os.environ["LABELS"], f"{kind}.json").write_bytes(exported.content)
            return images
        finally:
            server.terminate()
            server.wait()


def _wait_for(url: str, server: subprocess.Popen) -> None:
    import requests

    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and server.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(1)
    raise TimeoutError(f"Label Studio did not start within {START_S} s (exit code {server.poll()})")


READERS = {
    "webdataset": read_webdataset,
    "huggingface": read_huggingface,
    "fiftyone": read_fiftyone,
    "cvat": read_cvat,
    "label-studio": read_label_studio,
}

if __name__ == "__main__":
    tool, path = sys.argv[1:]
    result = READERS[tool](Path(path))
    print(json.dumps(result))
