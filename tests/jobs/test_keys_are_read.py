"""Every key that a job accepts is read by the code that the job runs.

mypy knows the class of every attribute that the sources read. A key counts as read if it is read from its section
outside config/. The modules of config/ declare and check keys, so there only functions and properties that the other
packages call count, such as Config.budgets. A section that is passed on by the names of its keys must arrive in a class
that has them all.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import pytest
from mypy.build import BuildSource, build
from mypy.inspections import find_by_location
from mypy.nodes import Expression, MypyFile
from mypy.options import Options
from mypy.types import Instance, Type, UnionType, get_proper_type

from elfs_ray.config import Config, PretrainConfig, TemiConfig, fields_of
from elfs_ray.config.evaluate import EvaluateConfig
from elfs_ray.evaluation.keys import EvaluateRunsConfig
from elfs_ray.methods.simclr.training import SimclrSettings, ViewSettings
from elfs_ray.methods.temi.heads import TemiSettings
from elfs_ray.pipeline import reselect
from elfs_ray.presets import NAMES

ROOT = Path(__file__).parent.parent.parent
# Keys of these sections become the fields of the same names of the classes.
HANDED_OVER = {PretrainConfig: (SimclrSettings, ViewSettings), TemiConfig: (TemiSettings,)}
KEY_NAMES = {name.rpartition(".")[2] for kind in (Config, EvaluateRunsConfig) for name, _ in fields_of(kind)}
Read = tuple[str, str]  # full name of a class, attribute


@dataclass
class Reads:
    """The attributes and names that each function of some modules reads; "" is code outside of functions."""

    attributes: dict[str, set[Read]] = field(default_factory=lambda: defaultdict(set))
    names: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add_module(self, source: str, tree: MypyFile, types: Mapping[Expression, Type]) -> None:
        """Add what a source reads: names, and attributes with the classes that mypy knows their owners by."""
        for function, node in _with_functions(ast.parse(source), ""):
            if isinstance(node, ast.Name):
                self.names[function].add(node.id)
            elif isinstance(node, ast.Attribute):
                self.names[function].add(node.attr)
                if node.attr in KEY_NAMES:
                    owner = node.value
                    place = (owner.lineno, owner.col_offset, owner.end_lineno, owner.end_col_offset)
                    kind = get_proper_type(types.get(find_by_location(tree, *place)))
                    # A function of two sections, such as TrainConfig | PretrainConfig, reads the key of both.
                    for item in kind.items if isinstance(kind, UnionType) else [kind]:
                        item = get_proper_type(item)
                        if isinstance(item, Instance):
                            # A key read from a subclass counts as read from the class that declares it.
                            self.attributes[function] |= {(base.fullname, node.attr) for base in item.type.mro}


def _with_functions(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield every node with the name of the outermost function that it is in."""
    for child in ast.iter_child_nodes(node):
        inside = function or (child.name if isinstance(child, ast.FunctionDef) else "")
        yield inside, child
        yield from _with_functions(child, inside)


@cache
def reads() -> dict[str, Reads]:
    """Return what each package at the top of elfs_ray reads."""
    options = Options()
    options.export_types = options.preserve_asts = options.check_untyped_defs = True
    options.incremental = False
    options.ignore_missing_imports, options.follow_imports = True, "skip"  # types of elfs_ray are all it takes
    paths = sorted((ROOT / "elfs_ray").rglob("*.py"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    result = build([BuildSource(str(path), name) for path, name in zip(paths, modules, strict=True)], options)
    packages: dict[str, Reads] = defaultdict(Reads)
    for path, module in zip(paths, modules, strict=True):
        tree = result.files[module]
        packages[module.partition(".")[2].partition(".")[0]].add_module(path.read_text(), tree, result.types)
    return packages


def read_by(packages: tuple[str, ...]) -> set[Read]:
    """Return what packages read, themselves or through functions and properties of config/ that do more than check."""
    config = reads()["config"]
    functions = {name for name in config.names if name and "check" not in name and not name.startswith("load")}
    result = set().union(*(read for package in packages for read in reads()[package].attributes.values()))
    called = set().union(*(names for package in packages for names in reads()[package].names.values()))
    done: set[str] = set()
    while left := (functions & called) - done:
        for name in left:
            result |= config.attributes[name]
            called |= config.names[name]
        done |= left
    return result


def unread(kind: type, packages: tuple[str, ...], prefix: str = "") -> list[str]:
    """Return the keys of a section, and of those in it, that the packages do not read."""
    reads_of_packages, missing = read_by((*packages, "methods")), []
    for spec in fields(kind):
        if not spec.metadata:
            missing += unread(spec.type, packages, f"{prefix}{spec.name}.")
            continue
        declared = next(base for base in reversed(kind.__mro__) if spec.name in getattr(base, "__annotations__", {}))
        owner = f"{declared.__module__}.{declared.__qualname__}"
        targets = [target for target in HANDED_OVER.get(kind, ()) if spec.name in target.__dataclass_fields__]
        read = {(f"{target.__module__}.{target.__qualname__}", spec.name) for target in targets} | {(owner, spec.name)}
        if not read & reads_of_packages:
            missing.append(prefix + spec.name)
    return missing


RUN = ("commands", "cli", "pipeline", "runtime", "stages")
EVALUATION = ("commands", "cli", "evaluation")


@pytest.mark.timeout(600)
def test_every_key_of_a_run_is_read_by_what_a_run_does():
    keys_of_evaluation = {f"evaluate.{key}" for key, _ in fields_of(EvaluateConfig)}
    assert set(unread(Config, RUN)) <= keys_of_evaluation
    assert unread(Config, (*RUN, "evaluation")) == []


@pytest.mark.timeout(600)
def test_every_key_of_an_evaluation_is_read_by_the_evaluator():
    assert unread(EvaluateRunsConfig, EVALUATION) == []
    assert unread(EvaluateConfig, EVALUATION) == []


@pytest.mark.timeout(600)
def test_a_key_that_nobody_reads_is_found():
    read = (f"{EvaluateConfig.__module__}.EvaluateConfig", "lr")
    functions = [attributes for attributes in reads()["evaluation"].attributes.values() if read in attributes]
    assert functions
    for attributes in functions:
        attributes.remove(read)
    try:
        assert unread(EvaluateConfig, EVALUATION) == ["lr"]
    finally:
        for attributes in functions:
            attributes.add(read)


@pytest.mark.parametrize("name", NAMES)
def test_the_job_of_each_preset_is_the_command_select(name):
    """So the job reads every key that a run reads."""
    tree = ast.parse((ROOT / "jobs" / f"{name}.py").read_text())
    main = tree.body[-1]
    assert isinstance(main, ast.If)
    assert [ast.unparse(line) for line in main.body] == [
        f"sys.exit(main(['select', '--preset={name}', *sys.argv[1:]]))"
    ]


def test_every_key_of_a_reselection_is_one_of_a_run():
    """Other keys are refused: see tests/pipeline/test_reselect.py."""
    assert set(reselect.KEYS) <= {key for key, _ in fields_of(Config)}
