"""Read label selectors, which say on which nodes of a Ray cluster a stage may run."""

import re
from typing import TYPE_CHECKING

from elfs_ray.config.declaration import ConfigError

if TYPE_CHECKING:
    from elfs_ray.config.run import Config

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REQUIREMENT = re.compile(rf"(?P<key>(?:{_WORD}/)?{_WORD})=(?P<value>!?(?:in\({_WORD}(?:,{_WORD})*\)|{_WORD}))(?:,|$)")


def parse_label_selector(text: str | None, key: str) -> dict[str, str]:
    """Return the requirements of a selector by their labels: {"a": "x", "b": "in(y,z)"} for "a=x,b=in(y,z)".

    The values are as Ray takes them: x, !x, in(x,y) or !in(x,y). Raises ConfigError, naming `key`, for another text.
    """
    selector: dict[str, str] = {}
    position = 0
    while position < len(text or ""):
        requirement = _REQUIREMENT.match(text or "", position)
        if requirement is None:
            raise ConfigError(
                f"{key}={text}: must be label=value, with commas between several, where a value may also be !value, "
                "in(value,value) or !in(value,value), such as ray.io/market-type=spot,zone=in(us-west-2a,us-west-2b)"
            )
        selector[requirement["key"]] = requirement["value"]
        position = requirement.end()
    return selector


def label_selector(config: "Config", section: str) -> tuple[dict[str, str], str]:
    """Return the requirements for the nodes of the stages of a section, and the key that sets them."""
    of_sections = {
        "embed": config.embed.label_selector,
        "cluster": config.cluster.label_selector,
        "train": config.train.label_selector,
        "pretrain": config.pretrain.label_selector,
    }
    text = of_sections.get(section)
    key = "label_selector" if text is None else f"{section}.label_selector"
    return parse_label_selector(config.label_selector if text is None else text, key), key
