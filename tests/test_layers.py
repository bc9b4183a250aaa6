"""Read the sources: imports run down only, only a stage knows its own name, and one stage reads true labels."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elfs_ray.pipeline.stages import STAGES

PACKAGE = Path(__file__).parent.parent / "elfs_ray"

# What each module or package at the top of elfs_ray may import of elfs_ray.
MAY_IMPORT = {
    "version": (),
    "methods": ("methods",),
    "storage": ("storage",),
    "config": ("config", "methods", "storage"),
    "runtime": ("config", "runtime"),
    "pool": ("pool", "storage"),
    "datasets": ("datasets", "methods", "pool", "runtime", "storage"),
    "stages": ("config", "methods", "pool", "runtime", "stages", "storage", "version"),
    "pipeline": ("config", "methods", "pipeline", "pool", "runtime", "stages", "storage"),
    "evaluation": ("config", "evaluation", "methods", "pipeline", "pool", "runtime", "stages", "storage"),
    "presets": ("config",),
    "handover": ("config", "handover", "methods", "pool", "runtime", "stages", "storage"),
    "api": ("config", "evaluation", "handover", "pool", "runtime", "stages", "storage"),
    "cli": ("config", "evaluation", "pipeline", "runtime", "stages", "storage"),
    "commands": (
        *("cli", "config", "datasets", "evaluation", "handover", "pipeline", "presets", "runtime", "stages", "storage"),
        "version",
    ),
    "__main__": ("commands",),
    "__init__": ("version",),
}
# Packages that are imported in some places alone.
IMPORTED_BY = {
    "ray": ("evaluation", "runtime", "stages"),
    "omegaconf": ("config", "evaluation"),
    "jobs": (),
    "tests": (),
    "benchmarks": (),
}
STAGE_NAMES = {stage.name for stage in STAGES}
READS_LABELS = "elfs_ray.stages.index.run"


def sources() -> dict[str, str]:
    """Return the source of every module of the package, by dotted name."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(module: str, source: str) -> Iterator[str]:
    """Yield the dotted names that a module imports, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def is_stage(module: str, source: str) -> bool:
    """Return whether a module does the work of a stage: it is stages/<name>/run.py and defines run_<name>."""
    parts = module.split(".")
    functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return parts[1] == "stages" and parts[-1] == "run" and f"run_{parts[-2]}" in functions


def import_faults(modules: dict[str, str]) -> list[str]:
    """Return a line for every import that the rules forbid."""
    stages = {module for module, source in modules.items() if is_stage(module, source)}
    faults = []
    for module, source in modules.items():
        layer = module.split(".")[1]
        if layer not in MAY_IMPORT:
            faults.append(f"{module} is in no layer: say in MAY_IMPORT what it may import")
            continue
        for name in imports(module, source):
            package, *rest = name.split(".")
            if package == "elfs_ray" and (not rest or rest[0] not in MAY_IMPORT[layer]):
                faults.append(f"{module} imports {name}: {layer} may import {MAY_IMPORT[layer]} of elfs_ray")
            if package in IMPORTED_BY and layer not in IMPORTED_BY[package]:
                faults.append(f"{module} imports {name}: only {IMPORTED_BY[package]} may import {package}")
            if layer == "stages" and any(name == stage or name.startswith(stage + ".") for stage in stages - {module}):
                faults.append(f"{module} imports {name}: a stage is imported by no other, only files pass between them")
    return faults


def stage_comparisons(source: str) -> list[str]:
    """Return every comparison in a source with the name of a stage, alone or in a list."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        for operand in (node.left, *node.comparators)
        for part in (operand, *(operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else ()))
        if isinstance(part, ast.Constant) and part.value in STAGE_NAMES
    ]


def label_reads(source: str) -> list[str]:
    """Return every place in a source that can reach the column of true labels."""
    tree = ast.parse(source)
    places = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (
            node.attr == "LABEL" or (node.attr == "label" and ast.unparse(node.value).endswith("pool"))
        ):
            places.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and node.value == "label":
            places.append("'label'")
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "LABEL" for alias in node.names):
            places.append("import LABEL")
    return places


def test_imports_run_down_only():
    modules = sources()
    assert {
        "elfs_ray.methods.kmeans.lloyd",
        "elfs_ray.stages.embed.run",
        "elfs_ray.pool.listing",
        "elfs_ray.__init__",
    } <= set(modules)
    assert not import_faults(modules), "\n".join(import_faults(modules))


def test_the_folders_with_a_stage_are_the_stages_of_the_pipeline():
    folders = {module.split(".")[-2] for module, source in sources().items() if is_stage(module, source)}
    assert folders == STAGE_NAMES


def test_only_a_stage_itself_switches_on_its_name():
    """All knowledge of a stage is in its `STAGE`, so that adding one touches its folder and pipeline/stages.py."""
    for module, source in sources().items():
        # In datasets/, train is a split of a benchmark.
        if module.split(".")[1] != "datasets" and module.split(".")[1:3] not in [
            ["stages", name] for name in STAGE_NAMES
        ]:
            assert not stage_comparisons(source), (module, stage_comparisons(source))


@pytest.mark.parametrize(
    "source",
    [
        "stage == 'train'",
        "'embed' != stage.name",
        "if name in ('copy', x): pass",
        "[planned for planned in plan if planned.stage.name == 'index']",
    ],
)
def test_a_comparison_with_the_name_of_a_stage_is_found(source):
    assert len(stage_comparisons(source)) == 1
    assert not stage_comparisons("stage.name == name; config.until is None; x = 'train'; read('train')")


def test_the_list_of_stages_is_quick_to_import():
    """--help and --dry-run import it, and a worker must import only its own stage."""
    heavy = "{'ray', 'torch', 'torchvision', 'faiss', 'scipy', 'sklearn'}"
    script = f"import sys, elfs_ray.pipeline.stages; print(sorted({heavy}.intersection(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True)
    assert result.stdout == "[]\n"


def test_index_is_the_only_stage_that_reads_true_labels():
    for module, source in sources().items():
        if module.startswith("elfs_ray.stages."):
            assert bool(label_reads(source)) == (module == READS_LABELS), (module, label_reads(source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("elfs_ray.methods.x", "import ray"),
        ("elfs_ray.methods.x", "import ray.data as data"),
        ("elfs_ray.methods.x", "def f():\n    from ray import remote"),
        ("elfs_ray.methods.x", "from elfs_ray.config import Config"),
        ("elfs_ray.methods.x", "from elfs_ray import config"),
        ("elfs_ray.methods.x", "from .. import pipeline"),
        ("elfs_ray.methods.x", "from ..storage import filesystem"),
        ("elfs_ray.methods.x", "import elfs_ray.stages.train.run"),
        ("elfs_ray.methods.x", "if TYPE_CHECKING:\n    from elfs_ray.storage.run_dir import RunDir"),
        ("elfs_ray.methods.x", "import elfs_ray"),
        ("elfs_ray.methods.x", "from omegaconf import OmegaConf"),
        ("elfs_ray.storage.x", "import ray"),
        ("elfs_ray.storage.x", "from elfs_ray.methods import kmeans"),
        ("elfs_ray.storage.x", "from elfs_ray.stages import train"),
        ("elfs_ray.storage.x", "from elfs_ray.config import Config"),
        ("elfs_ray.config.x", "import ray"),
        ("elfs_ray.config.x", "from elfs_ray.runtime import progress"),
        ("elfs_ray.config.x", "from elfs_ray.runtime.cluster import connect"),
        ("elfs_ray.pipeline.x", "import ray"),
        ("elfs_ray.pipeline.x", "from elfs_ray.cli import report_errors"),
        ("elfs_ray.runtime.cluster", "from elfs_ray.stages import train"),
        ("elfs_ray.stages.x", "from elfs_ray import pipeline"),
        ("elfs_ray.stages.x", "from elfs_ray.stages.train import run"),
        ("elfs_ray.stages.x", "from elfs_ray.stages.train.run import run_train"),
        ("elfs_ray.stages.x", "from .train.run import run_train"),
        ("elfs_ray.stages.x", "from tests.tables import mark"),
        ("elfs_ray.stages.x", "import jobs.quickstart"),
        ("elfs_ray.new", ""),
    ],
)
def test_an_import_that_runs_up_or_across_is_found(module, source):
    assert import_faults({"elfs_ray.stages.train.run": "def run_train(config, run_dir): ...", module: source})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("elfs_ray.methods.x", "import numpy\nfrom elfs_ray.methods.numeric.hashing import hash_uint64"),
        ("elfs_ray.methods.x", "from . import hashing"),
        ("elfs_ray.storage.x", "import pyarrow\nfrom elfs_ray.storage import filesystem, schema"),
        (
            "elfs_ray.stages.x",
            "import ray.data\nfrom elfs_ray.config import Config\nfrom elfs_ray.stages import part",
        ),
        ("elfs_ray.stages.x", "from elfs_ray.stages.train.worker import train_worker"),
        ("elfs_ray.stages.x", "from elfs_ray.stages.train import TrainResult"),
        ("elfs_ray.stages.train.run", "def run_train(config, run_dir):\n    from elfs_ray.methods import kmeans"),
    ],
)
def test_an_import_that_runs_down_is_allowed(module, source):
    assert import_faults({"elfs_ray.stages.train.run": "def run_train(config, run_dir): ...", module: source}) == []


@pytest.mark.parametrize(
    ("source", "num_reads"),
    [
        ("rows[schema.LABEL]", 1),
        ("from elfs_ray.storage.schema import LABEL", 1),
        ("rows['label']", 1),
        ("columns = ['uri', 'label']", 1),
        ("PoolColumns(None, config.pool.label)", 1),
        ("rows[schema.PSEUDO_LABEL]; points.label(x); 'a label'", 0),
    ],
)
def test_a_read_of_true_labels_is_found(source, num_reads):
    assert len(label_reads(source)) == num_reads
