"""Load a config: defaults, then a YAML file, then `key=value` overrides, merged by OmegaConf and checked.

The neighbouring files declare the keys, one file for each section; checks.py has the checks.
"""

import contextlib
import copy
import dataclasses
import difflib
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, UnsupportedValueType

from elfs_ray.config.checks import check_fields, check_relations
from elfs_ray.config.declaration import ConfigError, fields_of
from elfs_ray.config.run import Config
from elfs_ray.config.select import USES_HARD_FRACTION, HardFraction, uses_clusters
from elfs_ray.storage import filesystem
from elfs_ray.storage.credentials import refuse_credentials

_NUMBER = re.compile(r"[-+]?\.?[0-9]")  # how a number begins; float() also takes nan and infinity
Keys = TypeVar("Keys")  # a dataclass of options


def load_config(
    yaml_path: str | Path | None = None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Return a checked config from defaults, `base`, a YAML file and `key=value` overrides, in this order.

    base: values that replace defaults, nested as in YAML.

    Raises ConfigError for an unknown key, a value of the wrong type or outside its bounds, or a missing key.
    """
    config = load_keys(Config, yaml_path, overrides, base)
    fractions = config.select.hard_fraction
    # A stage's identity hashes the JSON of its keys, in which 0 and 0.0 differ although they are the same fraction.
    config.select.hard_fraction = [*map(_as_float, fractions)] if isinstance(fractions, list) else _as_float(fractions)
    check_relations(config)
    idle = [text for text in overrides if text.startswith("evaluate.") and not text.startswith("evaluate.test_uri=")]
    if config.evaluate.test_uri is None and idle:
        raise ConfigError(
            f"{' '.join(idle)}: nothing is evaluated without test images: give evaluate.test_uri=..., too"
        )
    return config


def load_keys(
    kind: type[Keys],
    yaml_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Keys:
    """Do what `load_config` does for any dataclass of options, without the checks of keys against each other.

    A key of type str takes its value as typed, except null; in a path, a leading ~ becomes the home directory.

    Raises ConfigError.
    """
    merged = _defaults(kind)
    if base is not None:
        _merge(merged, OmegaConf.create(dict(base)), "the run directory's config")
    if yaml_path is not None:
        if not Path(yaml_path).is_file():
            raise ConfigError(f"config file {str(yaml_path)!r} does not exist: give the path of a YAML file")
        _merge(merged, _load_yaml(yaml_path, kind), str(yaml_path))
    for override in overrides:
        _merge(merged, _parse_override(override, kind), override)
    config = _resolve(merged)
    assert isinstance(config, kind)
    check_fields(config)
    _expand_paths(config)
    return config


def expand_home(path: str) -> str:
    """Return a path with a leading ~ replaced by the home directory, as a shell does.

    Shells leave the ~ of an argument such as `pool.uri=~/x` alone, and no shell reads the YAML.
    """
    # expanduser raises for a NUL character, which opening the path refuses anyway, with a message about the path.
    with contextlib.suppress(ValueError):
        return os.path.expanduser(path)
    return path


def _expand_paths(config: Any) -> None:
    for key, spec in fields_of(type(config)):
        value = operator.attrgetter(key)(config)
        if spec.metadata["is_path"] and value is not None:
            section, _, name = key.rpartition(".")
            places = [expand_home(place) for place in (value if isinstance(value, list) else [value])]
            try:
                for place in places:
                    filesystem.absolute(place)
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from error
            owner = operator.attrgetter(section)(config) if section else config
            setattr(owner, name, places if isinstance(value, list) else places[0])


def _as_float(value: HardFraction) -> HardFraction:
    """Return a number as float, and a word unchanged."""
    return value if isinstance(value, str) else float(value)


def _fill_unused(merged: DictConfig) -> None:
    """Set required keys that the selection does not use, so that nobody has to."""
    select, cluster = merged.select, merged.cluster
    clusters = uses_clusters(select.method, select.balance)
    if OmegaConf.is_missing(select, "hard_fraction") and select.method not in USES_HARD_FRACTION:
        select.hard_fraction = 0.0
    if OmegaConf.is_missing(cluster, "num_clusters") and not clusters:
        cluster.num_clusters = "auto"


def _resolve(merged: DictConfig) -> Any:
    """Return the config as plain dataclasses, with ${...} filled in. Raises ConfigError for keys without a value."""
    try:
        if OmegaConf.get_type(merged) is Config:
            _fill_unused(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"no value for {', '.join(missing)}: give {' '.join(f'{key}=...' for key in missing)}")
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"bad value for {error.full_key}: {str(error).splitlines()[0]}") from error


def _defaults(kind: type) -> DictConfig:
    """Return every key of a dataclass with its default."""
    # A copy takes a third of the time that OmegaConf takes to read the dataclasses.
    return copy.deepcopy(_structure(kind))


@lru_cache
def _structure(kind: type) -> DictConfig:
    merged: DictConfig = OmegaConf.structured(kind)
    # Struct mode makes OmegaConf refuse keys that are not declared, so a misspelt key is an error.
    OmegaConf.set_struct(merged, True)
    return merged


def describe_keys(yaml_path: str | Path | None = None, kind: type = Config) -> Iterator[tuple[str, str, str]]:
    """Yield (key, default with its unit, help text) of every key; a YAML file replaces the defaults that it sets."""
    merged = _defaults(kind)
    if yaml_path is not None:
        _merge(merged, _load_yaml(yaml_path, kind), str(yaml_path))
    for key, spec in fields_of(kind):
        value = None if OmegaConf.is_missing(*_parent(merged, key)) else OmegaConf.select(merged, key)
        required = OmegaConf.is_missing(*_parent(merged, key))
        default = "required" if required else "null" if value is None else str(value)
        meaning = spec.metadata["help"]
        if spec.metadata["choices"]:
            meaning += f" [{', '.join(spec.metadata['choices'])}]"
        if spec.metadata["bounds"]:
            meaning += f" [{spec.metadata['bounds'].describe()}]"
        unit = "" if required else spec.metadata["unit"]
        if required and spec.metadata["unit"]:
            meaning += f" ({spec.metadata['unit']})"
        yield key, f"{default} {unit}".strip(), meaning


def deciding_keys(section: Any) -> dict[str, Any]:
    """Return the keys of one section that decide its stage's result, with their values."""
    keys: dict[str, Any] = {}
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        if dataclasses.is_dataclass(value):
            keys |= {f"{spec.name}.{key}": nested for key, nested in deciding_keys(value).items()}
        else:
            decides = spec.metadata["decides"]
            if decides(section) if callable(decides) else decides:
                keys[spec.name] = value
    return keys


def _load_yaml(path: str | Path, kind: type) -> DictConfig:
    try:
        read = _read_yaml(Path(path).read_text("utf-8"))
        loaded = None if isinstance(read, list) else OmegaConf.create(_typed(read or {}, kind))
    # Broken files raise errors of many kinds: YAML's, OmegaConf's, OSError, UnicodeDecodeError, RecursionError.
    except Exception as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a list: a config file must hold keys with values, such as budget: 0.1")
    # Before merging, as OmegaConf's own messages show the values that they refuse.
    _refuse_credentials("", OmegaConf.to_container(loaded))
    return loaded


def _parse_override(override: str, kind: type) -> DictConfig:
    key, equals, value = override.partition("=")
    _refuse_credentials(key, value)
    # "???" is OmegaConf's mark for a missing value.
    if not equals or not key or value.strip() == MISSING:
        raise ConfigError(f"{override!r} is not an override: write key=value (--help lists the keys)")
    try:
        # A text is not parsed at all: YAML would refuse "a: b", "[1" or "*", which are names of files.
        is_list = value.startswith("[") and value.endswith("]")
        if _texts(kind).get(key) is False or (_texts(kind).get(key, True) is None and not is_list):
            return OmegaConf.create(_nested(key, None if value in ("", "null") else value))
        return OmegaConf.create(_typed(_nested(key, _read_yaml(value)), kind))
    except Exception as error:
        raise ConfigError(f"{override!r} cannot be read: {error}. Quote values with spaces or colons.") from error


class _Plain(str):
    """A value without quotes in YAML, as it was typed."""


class _Loader(yaml.SafeLoader):
    """A reader of YAML that leaves values without quotes to `_typed`, and refuses keys that occur twice.

    By itself PyYAML reads them as YAML 1.1 does: 010 is 8, 1:30 is 90, and no is false.
    """

    # Only << keeps its meaning.
    yaml_implicit_resolvers: ClassVar = {
        "<": [pair for pair in yaml.SafeLoader.yaml_implicit_resolvers["<"] if pair[0].endswith(":merge")]
    }

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node)
        return text if node.style else _Plain(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [name.value for name, _ in node.value]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{min(twice)} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)


def _read_yaml(text: str) -> Any:
    """Return what YAML text holds; values without quotes become `_Plain`."""
    # A subclass of SafeLoader, so that !!python/object makes no object.
    return _Loader(text).get_single_data()


@lru_cache
def _texts(kind: type) -> dict[str, bool | None]:
    """Return the keys whose values are texts: True for a list of texts, False for a single one, None for either."""
    are_lists: dict[Any, bool] = {str: False, str | None: False, list[str]: True}
    keys = list(fields_of(kind))
    either: dict[str, bool | None] = {key: None for key, spec in keys if spec.type is Any and spec.metadata["is_path"]}
    return either | {key: are_lists[spec.type] for key, spec in keys if spec.type in are_lists}


def _nested(key: str, value: Any) -> Any:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _typed(value: Any, kind: type, key: str = "") -> Any:
    """Return what `_read_yaml` read with the type that each value without quotes stands for.

    For a key whose type is str that is the text itself: a folder may be named 007, 2024_01_15 or no.
    """
    if isinstance(value, dict):
        return {
            str(name): _typed(nested, kind, f"{key}.{name}" if key else str(name)) for name, nested in value.items()
        }
    if isinstance(value, list):
        return [_typed(item, kind, key) for item in value]
    if not isinstance(value, _Plain):
        return value
    if value in ("", "~", "null", "Null", "NULL"):
        return None
    return str(value) if key in _texts(kind) else _number_or_word(value)


def _number_or_word(text: str) -> int | float | bool | str:
    """Return what a value means, as in YAML 1.2: numbers are decimal unless they begin with 0x or 0o.

    Words other than true and false stay words; OmegaConf takes yes, no, on and off for a flag, too.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _NUMBER.match(text):
        # The first reads 010 as 10, the second knows prefixes.
        for read in (int, partial(int, base=0), float):
            with contextlib.suppress(ValueError):
                return read(text)
    return str(text)


def _refuse_credentials(key: str, value: Any) -> None:
    """Raise ConfigError for credentials in any value, before another message could show them."""
    if isinstance(value, dict):
        for name, nested in value.items():
            _refuse_credentials(f"{key}.{name}" if key else str(name), nested)
    elif isinstance(value, list):
        for item in value:
            _refuse_credentials(key, item)
    elif isinstance(value, str):
        try:
            refuse_credentials(value, key)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _merge(merged: DictConfig, added: DictConfig, source: str) -> None:
    """Set in `merged` the keys of `added`. After a ConfigError only some of them may be set."""
    kind = OmegaConf.get_type(merged)
    assert kind is not None
    known = [key for key, _ in fields_of(kind)]
    try:
        # In place: OmegaConf.merge() would copy all keys for each override.
        merged.merge_with(added)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(getattr(error, "full_key", None) or error)
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists every key"
        raise ConfigError(f"{source}: no key named {key!r}; {hint}") from error
    except (OmegaConfBaseException, UnsupportedValueType, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or source
        raise ConfigError(f"{source}: bad value for {key}: {str(error).splitlines()[0]}") from error


def _parent(merged: DictConfig, key: str) -> tuple[DictConfig, str]:
    section, _, name = key.rpartition(".")
    return (OmegaConf.select(merged, section) if section else merged), name
