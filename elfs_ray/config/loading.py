"""The config of a run: defaults, YAML and `key=value` overrides, merged by OmegaConf and checked before work starts.

The files beside this one declare the keys, a section each; checks.py holds the checks.
"""

import contextlib
import dataclasses
import difflib
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, UnsupportedValueType

from elfs_ray.config.checks import (
    check_fields,
    check_relations,
)
from elfs_ray.config.declaration import ConfigError, fields_of
from elfs_ray.config.run import Config
from elfs_ray.config.select import HardFraction
from elfs_ray.storage.credentials import refuse_credentials

Keys = TypeVar("Keys")  # a dataclass of options


def load_config(
    yaml_path: str | Path | None = None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Defaults, then those of `base` (nested, as in YAML), then a YAML file, then `key=value` overrides; checked.

    Raises ConfigError for an unknown key, a value of the wrong type or outside its bounds, or a missing key.
    """
    config = load_keys(Config, yaml_path, overrides, base)
    fractions = config.select.hard_fraction
    # 0 and 0.0 are one fraction, and so of one identity.
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
    """`load_config` for any dataclass of options, each key checked by itself. Raises ConfigError.

    A key that is a text takes it as typed, but for null; of one that is a path, ~ becomes the home directory.
    """
    merged = _defaults(kind)  # type: ignore[arg-type]  # mypy doubts that a type has a hash
    if base is not None:
        merged = _merge(merged, OmegaConf.create(dict(base)), "the run directory's config")
    if yaml_path is not None:
        if not Path(yaml_path).is_file():
            raise ConfigError(f"config file {str(yaml_path)!r} does not exist: give the path of a YAML file")
        merged = _merge(merged, _load_yaml(yaml_path, kind), str(yaml_path))
    for override in overrides:
        merged = _merge(merged, _parse_override(override, kind), override)
    config = _resolve(merged)
    assert isinstance(config, kind)
    check_fields(config)
    _expand_paths(config)
    return config


def expand_home(path: str) -> str:
    """A path as the shell would have it: ~ becomes the home directory."""
    with contextlib.suppress(ValueError):  # of a NUL, which whoever opens the path refuses
        return os.path.expanduser(path)
    return path


def _expand_paths(config: Any) -> None:
    for key, spec in fields_of(type(config)):
        value = operator.attrgetter(key)(config)
        if spec.metadata["is_path"] and value is not None:
            section, _, name = key.rpartition(".")
            expanded = [*map(expand_home, value)] if isinstance(value, list) else expand_home(value)
            setattr(operator.attrgetter(section)(config) if section else config, name, expanded)


def _as_float(value: HardFraction) -> HardFraction:
    """Return a number as float, a word as it is."""
    return value if isinstance(value, str) else float(value)


def _resolve(merged: DictConfig) -> Any:
    """The config as plain Python, with ${...} filled in. Raises ConfigError for keys that have no value."""
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"no value for {', '.join(missing)}: give {' '.join(f'{key}=...' for key in missing)}")
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"bad value for {error.full_key}: {str(error).splitlines()[0]}") from error


@lru_cache
def _defaults(kind: type) -> DictConfig:
    """Every key with its default; merging copies it."""
    merged = OmegaConf.structured(kind)
    OmegaConf.set_struct(merged, True)
    return merged


def describe_keys(yaml_path: str | Path | None = None, kind: type = Config) -> Iterator[tuple[str, str, str]]:
    """(key, default with its unit, meaning) of every key, with the defaults of a YAML file where one is given."""
    merged = _defaults(kind)
    if yaml_path is not None:
        merged = _merge(merged, _load_yaml(yaml_path, kind), str(yaml_path))
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
    """The keys of one section (a dataclass above) that decide its stage's result, with their values."""
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
        loaded = OmegaConf.load(path)
        if isinstance(loaded, DictConfig):
            loaded = _with_texts(loaded, _typed(Path(path).read_text("utf-8")), kind)
    except Exception as error:  # of the YAML parser, of the file system, of text that is none
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a list: needed are keys with values")
    _refuse_credentials("", OmegaConf.to_container(loaded))
    return loaded


def _parse_override(override: str, kind: type) -> DictConfig:
    key, equals, value = override.partition("=")
    _refuse_credentials(key, value)
    if not equals or not key or value.strip() == MISSING:
        raise ConfigError(f"{override!r} is not an override: write key=value (see --help for the keys)")
    try:
        if _texts(kind).get(key) is False:
            return OmegaConf.create(_nested(key, None if value in ("", "null") else value))
        return _with_texts(OmegaConf.from_dotlist([override]), _nested(key, _typed(value)), kind)
    except Exception as error:
        raise ConfigError(f"{override!r} cannot be read: {error}. Quote values with spaces or colons.") from error


def _typed(text: str) -> Any:
    """YAML with every value as the text that it is; no tag makes an object of it."""
    return yaml.BaseLoader(text).get_single_data()


@lru_cache
def _texts(kind: type) -> dict[str, bool]:
    """The keys that are texts, and whether each is a list of them."""
    types = {key: spec.type for key, spec in fields_of(kind)}
    return {key: own == list[str] for key, own in types.items() if own in (str, str | None, list[str])}


def _nested(key: str, value: Any) -> Any:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _with_texts(read: DictConfig, typed: Any, kind: type) -> DictConfig:
    """What YAML read, with every text as it was typed: YAML has 7 for 007, 20240115 for 2024_01_15, false for no."""

    def restore(value: Any, text: Any, key: str) -> Any:
        if isinstance(value, dict) and isinstance(text, dict):
            own = {name: f"{key}.{name}" if key else str(name) for name in value}
            return {name: restore(nested, text.get(name, nested), own[name]) for name, nested in value.items()}
        if key in _texts(kind) and isinstance(value, list) and isinstance(text, list):
            return [restore(*pair, key) for pair in zip(value, text, strict=True)]
        return text if key in _texts(kind) and isinstance(text, str) and value is not None else value

    return OmegaConf.create(restore(OmegaConf.to_container(read), typed, ""))


def _refuse_credentials(key: str, value: Any) -> None:
    """Raise ConfigError for credentials in any value, before a message could show them."""
    if isinstance(value, dict):
        for name, nested in value.items():
            _refuse_credentials(f"{key}.{name}" if key else str(name), nested)
    elif isinstance(value, str):
        try:
            refuse_credentials(value, key)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _merge(merged: DictConfig, added: DictConfig, source: str) -> DictConfig:
    kind = OmegaConf.get_type(merged)
    assert kind is not None
    known = [key for key, _ in fields_of(kind)]
    try:
        result = OmegaConf.merge(merged, added)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(getattr(error, "full_key", None) or error)
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists every key"
        raise ConfigError(f"{source}: no key named {key!r}; {hint}") from error
    except (OmegaConfBaseException, UnsupportedValueType, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None) or source
        raise ConfigError(f"{source}: bad value for {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, DictConfig)
    return result


def _parent(merged: DictConfig, key: str) -> tuple[DictConfig, str]:
    section, _, name = key.rpartition(".")
    return (OmegaConf.select(merged, section) if section else merged), name
