"""Choose the nodes on which a stage's tasks and workers run, by the nodes' labels.

A stage starts tasks and workers in many places, and all of them must ask for the same labels. So what was chosen holds
for the process, as its connection to Ray does.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

_chosen: dict[str, str] = {}
_VALUE = re.compile(r"(?P<isnt>!?)(?:in\((?P<values>.*)\)|(?P<value>.*))")


@contextlib.contextmanager
def on_nodes(selector: Mapping[str, str]) -> Iterator[None]:
    """Run what is started within on nodes that a label selector matches; an empty one matches all."""
    before = dict(_chosen)
    _set(selector)
    try:
        yield
    finally:
        _set(before)


def _set(selector: Mapping[str, str]) -> None:
    _chosen.clear()
    _chosen.update(selector)


def placement() -> dict[str, Any]:
    """Return what was chosen, as options of ray.remote and of Ray Data's map_batches."""
    return {"label_selector": dict(_chosen)} if _chosen else {}


def describe_placement() -> str:
    """Return a phrase such as " on nodes with zone=a", or an empty one for all nodes."""
    return f" on nodes with {','.join(f'{key}={value}' for key, value in _chosen.items())}" if _chosen else ""


def is_chosen(labels: Mapping[str, str]) -> bool:
    """Return whether a node with these labels was chosen."""
    return all(_matches(labels.get(key), value) for key, value in _chosen.items())


def _matches(label: str | None, requirement: str) -> bool:
    parts = _VALUE.fullmatch(requirement)
    assert parts is not None
    values = parts["values"].split(",") if parts["values"] else [parts["value"]]
    return (label in values) != bool(parts["isnt"])
