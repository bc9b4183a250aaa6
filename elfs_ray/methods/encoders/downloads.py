"""Where a library's pretrained weights come from, and their download. Nothing here waits long for an answer."""

import http.client
import os
import re
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch

from elfs_ray.methods.encoders.choice import HUB_FILE, in_hub_cache, what_is_here
from elfs_ray.methods.encoders.weights import check_sha256

STALL_S = 10  # without a byte, after which a download counts as failed
_AGENT = {"User-Agent": "elfs_ray"}  # some servers refuse urllib's own


class Origin(ABC):
    """The place that an encoder's weights come from."""

    @abstractmethod
    def is_here(self) -> bool:
        """Return whether the weights are on this machine."""

    @abstractmethod
    def fetch(self) -> Path:
        """Return the path of the weights, downloaded if necessary.

        Raises ConnectionError where the network fails, ValueError for damaged weights.
        """

    @abstractmethod
    def reach(self) -> None:
        """Raise ConnectionError if the weights are not here and their server does not answer within STALL_S."""


@dataclass(frozen=True)
class Package(Origin):
    """Weights in an installed package; `find` returns their checked path."""

    find: Callable[[], Path]

    def reach(self) -> None:
        pass

    def is_here(self) -> bool:
        return True

    def fetch(self) -> Path:
        return self.find()


@dataclass(frozen=True)
class Web(Origin):
    """A file at an address, kept in torch.hub's folder, often with the start of its SHA-256 in its name."""

    url: str

    @property
    def path(self) -> Path:
        return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(self.url).path).name)

    def is_here(self) -> bool:
        return self.path.exists()

    def reach(self) -> None:
        if not self.is_here():
            _reach(self.url, self.url)

    def fetch(self) -> Path:
        self.reach()
        if not self.is_here():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _download(self.url, self.path)
        if match := _sha256_in(self.path):  # also for a file that was there before, which may have been cut short
            check_sha256(self.path, match)
        return self.path


@dataclass(frozen=True)
class Hub(Origin):
    """A model of the Hugging Face hub, kept in its cache."""

    repo_id: str

    def is_here(self) -> bool:
        return in_hub_cache(self.repo_id) is not None

    def reach(self) -> None:
        from huggingface_hub import constants

        if self.is_here():
            return
        if constants.HF_HUB_OFFLINE:
            raise _unreachable(self._name, "HF_HUB_OFFLINE is set")
        _reach(constants.ENDPOINT, self._name)

    def fetch(self) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        # Before the hub's client, which tries a server that does not answer for a minute.
        self.reach()
        try:
            path = Path(in_hub_cache(self.repo_id) or hf_hub_download(self.repo_id, HUB_FILE))
        except (OSError, HfHubHTTPError) as error:
            raise _unreachable(self._name, error) from error
        # The cache stores a large file under its SHA-256 and links to it.
        if re.fullmatch("[0-9a-f]{64}", path.resolve().name):
            check_sha256(path, path.resolve().name)
        return path

    @property
    def _name(self) -> str:
        return f"{self.repo_id} on the Hugging Face hub"


def _sha256_in(path: Path) -> str | None:
    match = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    return match and match[1]


def _reach(url: str, name: str) -> None:
    """Raise ConnectionError unless a server answers a request within STALL_S."""
    outcome: Future[None] = Future()

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD", headers=_AGENT), timeout=STALL_S).close()
        except HTTPError:
            pass  # an answer, if only that it takes no such request; the download itself will say what is wrong
        except (OSError, http.client.HTTPException) as error:
            outcome.set_exception(error)
            return
        outcome.set_result(None)

    # In a thread: the timeout of a connection does not count the search for its name, nor its further addresses.
    threading.Thread(target=ask, daemon=True).start()
    try:
        outcome.result(timeout=STALL_S)
    except TimeoutError as error:
        raise _unreachable(name, f"no answer within {STALL_S} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(name, error) from error


def _download(url: str, path: Path) -> None:
    """Write a file under its name when it is complete and its hash is right."""
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            with urlopen(Request(url, headers=_AGENT), timeout=STALL_S) as response:
                shutil.copyfileobj(response, file)
                size = response.headers.get("Content-Length")
            file.flush()
            # A connection that ends early is no error in itself.
            if size is not None and int(size) != os.path.getsize(file.name):
                raise ConnectionError(f"{os.path.getsize(file.name):,} of {int(size):,} bytes arrived")
            if expected := _sha256_in(path):
                check_sha256(Path(file.name), expected)
            os.replace(file.name, path)
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(url, error) from error
        except ValueError as error:
            raise ValueError(f"The file downloaded from {url} is damaged: {error}. Try again.") from error
        finally:
            Path(file.name).unlink(missing_ok=True)


def _unreachable(source: str, why: Exception | str) -> ConnectionError:
    return ConnectionError(
        f"Could not download the encoder's weights from {source} ({str(why)[:300]}). {what_is_here()}. Or download the "
        "file elsewhere and give its path as embed.weights"
    )
