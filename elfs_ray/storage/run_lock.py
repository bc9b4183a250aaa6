"""One driver at a time on a run directory: a lock that names its owner and is renewed while the owner lives.

`_LOCK.json` holds host, pid, user and start of the driver, and a count that a thread raises every 10 s. Clocks are not
compared: a lock of another machine counts as dead once it has been watched for 60 s without a change. One whose process
is gone from this machine is taken over at once, so that a killed driver can be started again at once.

On a local path the file is created by O_EXCL and taken over under flock: of drivers that start together exactly one
gets it. pyarrow has no conditional write to an object store, so there a driver writes its token, waits 2 s and reads it
back: the last one to write has the lock, as long as nobody takes longer than that from reading the old lock to writing
its own. Where somebody does, the loser finds a foreign token when it renews, within 10 s, and stops. A stopped driver's
tasks may run on for a moment; they write whole files of the same bytes.
"""

import contextlib
import fcntl
import getpass
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pyarrow import fs

from elfs_ray.storage import filesystem

LOCK_FILE = "_LOCK.json"
RENEW_S = 10.0
EXPIRE_S = 60.0
SETTLE_S = 2.0
_GONE = "ZX"  # states of a process that has ended


class RunDirInUse(RuntimeError):
    """Another driver writes to the run directory."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `machine` tells machines and containers of the same name apart, `process_start` pids."""

    token: str
    host: str
    machine: str
    pid: int
    process_start: str
    user: str
    started: str
    renewed: str
    renewals: int = 0

    @classmethod
    def of_this_process(cls) -> "Owner":
        pid, now = os.getpid(), _now()
        start = _process_start(pid) or ""
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, start, _user(), now, now)

    @classmethod
    def from_json(cls, data: bytes) -> "Owner | None":
        """None for a file that is no lock, or half of one."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def is_here(self) -> bool:
        """Whether it is a process of this machine, as this process sees it."""
        return self.machine == _machine()

    def is_running(self) -> bool:
        """Whether a process of this machine still runs."""
        return _process_start(self.pid) == self.process_start

    def describe(self) -> str:
        return f"pid {self.pid} of {self.user} on {self.host}, since {self.started}, last seen {self.renewed}"


class RunLock:
    """Held by a `with` block; raises RunDirInUse on entry where another driver is alive.

    A driver that loses its lock, because it was not seen for `expire_s`, stops with RunDirInUse: in the main thread by
    a KeyboardInterrupt that leaves the block as such, elsewhere by `check`. `tell` gets a line for who waits.
    """

    def __init__(
        self,
        run_dir_uri: str,
        tell: Callable[[str], None],
        *,
        renew_s: float = RENEW_S,
        expire_s: float = EXPIRE_S,
        settle_s: float = SETTLE_S,
    ):
        self._run_dir_uri, self._uri = run_dir_uri, filesystem.join(run_dir_uri, LOCK_FILE)
        self._tell, self._renew_s, self._expire_s, self._settle_s = tell, renew_s, expire_s, settle_s
        self._is_local = isinstance(filesystem.resolve(self._uri)[0], fs.LocalFileSystem)
        self._owner = Owner.of_this_process()
        self._stop = threading.Event()
        self._lost: str | None = None
        self._interrupts_main = False
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)

    def __enter__(self) -> "RunLock":
        self._acquire()
        self._interrupts_main = threading.current_thread() is threading.main_thread()
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=self._renew_s)
        if self._lost and (error is None or isinstance(error, KeyboardInterrupt)):
            raise RunDirInUse(self._lost) from None
        # A store that does not answer now costs the next driver a wait, and hides no error of this one.
        with contextlib.suppress(OSError):
            if self._is_own(self._read()):
                filesystem.delete(self._uri)

    def check(self) -> None:
        """Raise RunDirInUse if the lock was lost."""
        if self._lost:
            raise RunDirInUse(self._lost)

    def _acquire(self) -> None:
        watched: bytes | None = None
        since_s = time.monotonic()
        while True:
            found = self._read()
            if found is None:
                if self._create():
                    return
                continue
            owner = Owner.from_json(found)
            if owner is not None and owner.is_here() and owner.is_running():
                raise RunDirInUse(self._refusal(owner))
            expired = watched == found and time.monotonic() - since_s >= self._expire_s
            if expired or (owner is not None and owner.is_here()):
                self._tell(f"the driver before this one is gone ({_describe(owner)}): its lock is taken over")
                if self._take_over(found):
                    return
                watched = None
            elif watched is None:
                watched, since_s = found, time.monotonic()
                self._tell(
                    f"{self._run_dir_uri} is locked ({_describe(owner)}): watching for up to {self._expire_s:.0f} s "
                    "whether that driver is alive"
                )
            elif watched != found:
                raise RunDirInUse(self._refusal(owner))
            time.sleep(min(1.0, self._renew_s / 5))

    def _create(self) -> bool:
        """Write the lock where there is none; whether it is this driver's now."""
        if not self._is_local:
            return self._write_and_read_back()
        _, path = filesystem.resolve(self._uri)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._owner.to_json())
        except BaseException:
            os.unlink(path)
            raise
        return True

    def _take_over(self, dead: bytes) -> bool:
        """Write the lock over a dead one, unless another driver has; whether it is this driver's now."""
        if not self._is_local:
            return self._write_and_read_back()
        _, path = filesystem.resolve(self._uri)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system that knows no such locks
                return self._write_and_read_back()
            if file.read() == dead and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                filesystem.write_bytes(self._uri, self._owner.to_json())
                return True
        return False

    def _write_and_read_back(self) -> bool:
        filesystem.write_bytes(self._uri, self._owner.to_json())
        time.sleep(self._settle_s)
        return self._is_own(self._read())

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._renew_s):
            # While the store does not answer there is nothing to renew, and nothing that others could write.
            with contextlib.suppress(OSError):
                found = self._read()
                if found is not None and not self._is_own(found):
                    self._lose(Owner.from_json(found))
                    return
                fields = asdict(self._owner) | {"renewed": _now(), "renewals": self._owner.renewals + 1}
                self._owner = Owner(**fields)
                filesystem.write_bytes(self._uri, self._owner.to_json())

    def _lose(self, owner: Owner | None) -> None:
        self._lost = (
            f"this driver was not seen for {self._expire_s:.0f} s or more, and another one took {self._run_dir_uri} "
            f"over ({_describe(owner)}): it goes on there, this one stops"
        )
        if self._interrupts_main:
            main_thread = threading.main_thread().ident
            assert main_thread is not None
            signal.pthread_kill(main_thread, signal.SIGINT)

    def _refusal(self, owner: Owner | None) -> str:
        return (
            f"{self._run_dir_uri} is being written by another driver: {_describe(owner)}. Wait for it, stop it, or "
            f"give another run_dir; if it is certainly gone, delete {self._uri}."
        )

    def _is_own(self, found: bytes | None) -> bool:
        owner = Owner.from_json(found) if found else None
        return owner is not None and owner.token == self._owner.token

    def _read(self) -> bytes | None:
        try:
            return filesystem.read_bytes(self._uri)
        except FileNotFoundError:
            return None


def _describe(owner: Owner | None) -> str:
    return owner.describe() if owner else "its owner cannot be read"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # containers run as users that have no name
        return str(os.getuid())


def _machine() -> str:
    """The boot of the kernel and the namespace of its pids: the same for processes that see each other's pids."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When a process started, in ticks since boot; None where there is no such process, or one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in _GONE else fields[18]
    except OSError:
        return None if Path("/proc/self/stat").exists() or not _answers(pid) else ""


def _answers(pid: int) -> bool:
    """Whether there is a process of that number, where /proc cannot tell."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
