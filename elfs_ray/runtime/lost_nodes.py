"""Say that nodes were lost on which a stage's workers ran, so that nobody waits for them unknowingly.

Ray starts lost workers again as soon as there is room, and says nothing as long as there is none. A cluster that
replaces its nodes goes on by itself; another one never would.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from elfs_ray.runtime.progress import say
from elfs_ray.runtime.resources import Request, describe_shortage

if TYPE_CHECKING:
    from elfs_ray.runtime.cluster import Devices

LOOK_INTERVAL_S = 5.0
PATIENCE_S = 30.0  # in which a cluster may replace a node


class Watch:
    """Finds that the devices have become too few for workers that had room when the stage began.

    `before` are those when it began, `devices` returns those that there are now. `look` returns a line to print once
    they have been too few for some looks in a row, else None.
    """

    def __init__(
        self,
        name: str,
        requests: Sequence[Request],
        before: "Devices",
        devices: Callable[[], "Devices"],
        patience: int,
    ) -> None:
        self._name, self._devices, self._patience = name, devices, patience
        self._requests = [request for request in requests if not describe_shortage(request, before)]
        self._looks = 0

    def look(self) -> str | None:
        here = self._devices()
        shortages = [shortage for request in self._requests if (shortage := describe_shortage(request, here))]
        self._looks = self._looks + 1 if shortages else 0
        if self._looks != self._patience:
            return None
        return (
            f"{self._name:<9} nodes were lost: {'; '.join(shortages)}. Workers without room wait for nodes to join; "
            "if none will, stop the run and type its command again: it goes on where it was, with what there is"
        )


@contextlib.contextmanager
def tell_of_lost_nodes(
    name: str, requests: Sequence[Request], before: "Devices", devices: Callable[[], "Devices"]
) -> Iterator[None]:
    """Watch the cluster within the context, from a thread, and print what is to be said."""
    watch = Watch(name, requests, before, devices, patience=int(PATIENCE_S / LOOK_INTERVAL_S))
    stop = threading.Event()

    def keep_looking() -> None:
        while not stop.wait(LOOK_INTERVAL_S):
            # A look that fails, as while Ray shuts down, must not fail the stage.
            with contextlib.suppress(Exception):
                line = watch.look()
                if line:
                    say(line)

    watcher = threading.Thread(target=keep_looking, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
