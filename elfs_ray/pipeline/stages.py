"""The stages, in their order: what decides each one's result, what it reads, what it leaves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elfs_ray.config import STAGE_NAMES, Config, deciding_keys
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir


@dataclass(frozen=True)
class Stage:
    """One stage: what decides its result, what it reads, what it writes (tables, and files beside them).

    `mends` says that it makes what is missing of its tables and files again from what is there, when it goes on.

    Its function is `run_<name>` in `elfs_ray.stages.<name>.run`; it is imported when it runs, so that --help and
    --dry-run are quick and a worker imports only its own stage.
    """

    name: str
    section: str
    inputs: tuple[str, ...]
    tables: tuple[str, ...]
    global_keys: tuple[str, ...] = ("seed",)
    section_keys: tuple[str, ...] | None = None  # where the others of the section are for another stage
    files: tuple[str, ...] = ()
    mends: bool = False

    def deciding_config(self, config: Config) -> dict[str, Any]:
        found = deciding_keys(getattr(config, self.section))
        keys = {f"{self.section}.{key}": found[key] for key in self.section_keys or found}
        return {**{key: getattr(config, key) for key in self.global_keys}, **keys}

    def all_tables(self, deciding_config: Mapping[str, Any]) -> list[str]:
        """Its tables with the coresets of further budgets."""
        if self.name != "select":
            return list(self.tables)
        budget = deciding_config["budget"]
        return [*self.tables, *schema.coreset_tables(budget if isinstance(budget, list) else [budget])[1:]]

    def outputs(self, deciding_config: Mapping[str, Any]) -> list[str]:
        """Every table and file that it leaves."""
        tables = self.all_tables(deciding_config)
        texts = [schema.coreset_text_file(table) for table in tables if table.startswith(schema.CORESET)]
        return [*tables, *texts, *self.files]

    def function(self) -> Callable[[Config, RunDir], Mapping[str, Any]]:
        module = __import__(f"elfs_ray.stages.{self.name}.run", fromlist=["run"])
        return getattr(module, f"run_{self.name}")


STAGES = (
    Stage("index", "pool", (), (schema.INDEX,), global_keys=()),
    Stage(
        "embed",
        "embed",
        ("index",),
        (schema.EMBEDDINGS, schema.PROXY_IMAGES, schema.REJECTED),
        global_keys=(),
        mends=True,
    ),
    Stage("cluster", "cluster", ("embed",), (schema.CLUSTERS, schema.NEIGHBORS)),
    Stage("train", "train", ("embed", "cluster"), (schema.DYNAMICS,)),
    Stage("select", "select", ("index", "cluster", "train"), (schema.SCORES, schema.CORESET), ("seed", "budget")),
    Stage(
        "report",
        "report",
        ("index", "embed", "cluster", "train", "select"),
        (),
        global_keys=(),
        files=(schema.REPORT_FILE, schema.METRICS_FILE),
    ),
)
COPY_KEYS = ("proxy_image_size", "proxy_jpeg_quality", "max_image_pixels", "block_images")
# In place of embed, where the encoder is trained on the pool itself: it needs the copies first.
PRETRAINING_STAGES = (
    Stage("copy", "embed", ("index",), (schema.PROXY_IMAGES,), global_keys=(), section_keys=COPY_KEYS, mends=True),
    Stage("pretrain", "pretrain", ("index", "copy"), (), files=(f"pretrain/{schema.ENCODER_FILE}",), mends=True),
    Stage(
        "embed",
        "embed",
        ("index", "copy", "pretrain"),
        (schema.EMBEDDINGS, schema.REJECTED),
        global_keys=(),
        mends=True,
    ),
)
EVALUATE = Stage("evaluate", "evaluate", ("index", "embed", "train", "select"), ())
assert tuple(stage.name for stage in (STAGES[0], *PRETRAINING_STAGES, *STAGES[2:])) == STAGE_NAMES


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run, in their order."""
    return (STAGES[0], *PRETRAINING_STAGES, *STAGES[2:]) if config.pretrains else STAGES
