"""Fit a linear probe on the embeddings of a selection with its true labels, and test it.

Reads   embeddings/ of the run
Writes  <folder>/, a run directory with the embeddings of the test images, by the run's encoder
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elfs_ray.config import load_config
from elfs_ray.evaluation.held_out import class_numbers, list_test_images
from elfs_ray.evaluation.trials import Trial, TrialPlace
from elfs_ray.evaluation.true_labels import TrueLabels, digest
from elfs_ray.evaluation.workload import Workload
from elfs_ray.methods.encoders.processor import OPENVINO
from elfs_ray.methods.training.linear_probe import fit_linear_probe
from elfs_ray.pipeline import runner
from elfs_ray.stages.index.records import gone_ids
from elfs_ray.stages.pretrain import PretrainResult
from elfs_ray.stages.training.classifier_inputs import load_embeddings
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir


@dataclass(frozen=True)
class TestEmbeddings:
    """Embeddings (n, d) float16 of the test images, their classes (n,), numbered as in the pool, and their uris."""

    embeddings: np.ndarray
    labels: np.ndarray
    uris: list[str]


@dataclass(frozen=True)
class Probes:
    """Fits linear probes: the run with the pool's embeddings, the labels and the test images."""

    run_dir: RunDir
    labels: TrueLabels
    test: TestEmbeddings

    depends_on_seed = False

    def identity(self) -> str:
        """Return a hash of everything that decides a result, beside the trial and its labels."""
        return digest("linear probe", self.run_dir.identity("embed"), self.test.embeddings, self.test.labels)

    def accuracies(self, trial: Trial, state_path: str, place: TrialPlace) -> list[float]:
        """Fit a probe; return its test accuracy, alone in a list."""
        embeddings = load_embeddings(self.run_dir, trial.sample_ids)
        num_classes = max(int(self.test.labels.max()) + 1, self.labels.num_classes)
        probe = fit_linear_probe(embeddings, self.labels.of(trial.sample_ids), num_classes, device=place.device)
        return [probe.accuracy(self.test.embeddings, self.test.labels)]


def embed_test_images(
    test_uri: str, workload: Workload, names: tuple[str, ...], device: str, folder: str
) -> TestEmbeddings:
    """Embed the test images as the first run embedded its pool, in a run directory of their own.

    Stages index and embed do it: on the whole cluster, and a killed one resumes. Memory: the embeddings. Raises
    ValueError for a test image that was rejected.
    """
    source, columns = workload.sources[0], workload.columns
    keys = [f"run_dir={folder}", f"pool.uri={test_uri}", f"pool.format={workload.pool_format}"]
    keys += [f"pool.label={columns.label}", *([f"pool.image_column={columns.image}"] if columns.image else [])]
    # Where OpenVINO has computed the pool's embeddings, on CPUs, it computes these, too.
    device = "cpu" if source.config.embed.runtime == OPENVINO else device
    keys += [f"embed.device={device}", "budget=1.0", "until=embed", "on_change=rerun"]
    # The evaluation has connected to Ray already, if it needs it.
    keys += ["on_pool_change=extend", "ray_address=local"]
    # A method that needs no copies of the images.
    keys += [
        "select.method=random",
        "select.hard_fraction=0",
        "select.labelled=null",
        "select.exclude=null",
        "duplicates.threshold=null",
    ]
    if source.config.pretrains:
        keys.append(f"embed.weights={PretrainResult.read(source.run_dir).encoder}")
    run_dir = runner.run(load_config(None, keys, base=source.base))
    _refuse_rejected(test_uri, run_dir)
    listed = list_test_images(test_uri, workload.pool_format, columns)
    uris, classes = listed[schema.URI], class_numbers(test_uri, listed, names)
    return TestEmbeddings(_embeddings_of(uris, run_dir), classes, uris.to_pylist())


def _embeddings_of(uris: pa.ChunkedArray, run_dir: RunDir) -> np.ndarray:
    """Return the embeddings of some images in the order of their uris, (n, d) float16; none of them was rejected."""
    embedded = pa.concat_tables(run_dir.read_table(schema.EMBEDDINGS))
    index = run_dir.read_rows(schema.INDEX, embedded[schema.SAMPLE_ID].to_numpy(), [schema.URI])
    # An image that has changed is in the index under two ids, and the first one is gone.
    is_present = ~np.isin(index[schema.SAMPLE_ID].to_numpy(), gone_ids(run_dir))
    present = index[schema.URI].filter(is_present).combine_chunks()
    places = pc.index_in(uris, value_set=present).to_numpy()
    return schema.matrix_of(embedded, schema.EMBEDDING)[is_present][places]


def _refuse_rejected(test_uri: str, run_dir: RunDir) -> None:
    gone = gone_ids(run_dir)
    for rows in run_dir.read_table(schema.REJECTED):
        for row in rows.filter(~np.isin(rows[schema.SAMPLE_ID].to_numpy(), gone)).slice(0, 1).to_pylist():
            raise ValueError(f"test_uri={test_uri}: test image {row[schema.URI]}: {row[schema.REASON]}")
