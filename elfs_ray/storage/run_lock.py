"""One driver at a time on a run directory: a lock that names its owner and is renewed while the owner lives.

`_LOCK.json` holds host, pid, user and start of the driver, and a count that a thread raises every 10 s. Clocks are not
compared: a lock of another machine counts as dead once it has been watched for 60 s without a change. One whose process
is gone from this machine is taken over at once, so that a killed driver can be started again at once.

On a local path a driver also holds `_LOCK`, a lock of the kernel (filelock, flock), which ends with the process however
that ends: of drivers that start together exactly one gets it, and nobody takes over from a driver that is alive. NFS
(version 4, or 3 with lockd) shares it among machines. A file system that does not (mounts with local flock, some FUSE)
leaves two machines to what holds in a bucket.

pyarrow has no conditional write to an object store, so there a driver writes its token, waits 2 s and reads it back:
the last one to write has the lock, as long as nobody takes longer than that from reading the old lock to writing its
own. Where somebody does, the loser finds a foreign token when it renews, within 10 s, and stops. So it is with a driver
that was paused between reading its own token and renewing it: its renewal overwrites the driver that took over, which
reads a foreign token and stops. Either way exactly one goes on. A stopped driver's tasks may run on for a moment; they
write whole files of the same bytes.
"""

import contextlib
import errno
import getpass
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import filelock
from pyarrow import fs

from elfs_ray.storage import filesystem

LOCK_FILE = "_LOCK.json"
KERNEL_LOCK_FILE = "_LOCK"
RENEW_S = 10.0
EXPIRE_S = 60.0
SETTLE_S = 2.0
_GONE = "ZX"  # states of a process that has ended
_NO_KERNEL_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunDirInUse(RuntimeError):
    """Another driver writes to the run directory."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `machine` tells machines and containers of the same name apart, `process_start` pids."""

    token: str
    host: str
    machine: str
    pid: int
    process_start: str | None
    user: str
    started: str
    renewed: str
    renewals: int = 0

    @classmethod
    def of_this_process(cls) -> "Owner":
        pid, now = os.getpid(), _now()
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _process_start(pid), _user(), now, now)

    @classmethod
    def from_json(cls, data: bytes | None) -> "Owner | None":
        """Return None for a file that is no lock, or half of one."""
        try:
            return cls(**json.loads(data or b""))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def is_running(self) -> bool:
        """Return whether it is known to run: a process of this machine that this process sees."""
        return self.machine == _machine() and _process_start(self.pid) == self.process_start

    def is_gone(self) -> bool:
        """Return whether it is known to have ended; neither is known of a process of another machine."""
        return self.machine == _machine() and _process_start(self.pid) != self.process_start

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
        self._owner = Owner.of_this_process()
        self._kernel_lock: filelock.FileLock | None = None
        self._stop = threading.Event()
        self._lost: str | None = None
        self._interrupts_main = False
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)

    def __enter__(self) -> "RunLock":
        self._kernel_lock = self._acquire_kernel_lock()
        try:
            self._acquire()
        except BaseException:
            self._release_kernel_lock()
            raise
        self._interrupts_main = threading.current_thread() is threading.main_thread()
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=self._renew_s)
        try:
            if self._lost and (error is None or isinstance(error, KeyboardInterrupt)):
                raise RunDirInUse(self._lost) from None
            # A store that does not answer now costs the next driver a wait, and hides no error of this one.
            with contextlib.suppress(OSError):
                if self._is_own(self._read()):
                    filesystem.delete(self._uri)
        finally:
            self._release_kernel_lock()

    def check(self) -> None:
        """Raise RunDirInUse if the lock was lost."""
        if self._lost:
            raise RunDirInUse(self._lost)

    def _acquire_kernel_lock(self) -> filelock.FileLock | None:
        """Return the held kernel lock of a local path; None for a bucket, and for a file system that has none."""
        system, folder = filesystem.resolve(self._run_dir_uri)
        if not isinstance(system, fs.LocalFileSystem):
            return None
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, KERNEL_LOCK_FILE)
        # The file stays there, as unlinking it would let two drivers lock two files, and other users lock it next.
        lock = filelock.FileLock(path, mode=0o666, blocking=False, fallback_to_soft=False)
        while True:
            try:
                lock.acquire()
                return lock
            except filelock.Timeout:
                owner = Owner.from_json(self._read())
                if owner is None or not owner.is_gone():
                    raise RunDirInUse(self._refusal(owner, path)) from None
                time.sleep(0.05)  # a killed process lets go of its locks a moment after it is seen as ended
            except OSError as error:
                if error.errno not in _NO_KERNEL_LOCKS:
                    raise
                return None

    def _release_kernel_lock(self) -> None:
        if self._kernel_lock is not None:
            self._kernel_lock.release()

    def _acquire(self) -> None:
        watched: bytes | None = None
        since_s = time.monotonic()
        while True:
            present = self._read()
            owner = Owner.from_json(present)
            if owner is not None and owner.is_running():
                raise RunDirInUse(self._refusal(owner, self._uri))
            expired = present is not None and watched == present and time.monotonic() - since_s >= self._expire_s
            if expired or (owner is not None and owner.is_gone()):
                self._tell(f"the driver before this one is gone ({_describe(owner)}): its lock is taken over")
                present = None
            if present is None:
                # With the kernel lock, drivers of other machines alone can write beside this one: those of an expired
                # lock, on a disk that does not share kernel locks.
                if self._write_and_read_back(0 if self._kernel_lock and not expired else self._settle_s):
                    return
                watched = None
            elif watched is None:
                watched, since_s = present, time.monotonic()
                self._tell(
                    f"{self._run_dir_uri} is locked ({_describe(owner)}): watching for up to {self._expire_s:.0f} s "
                    "whether that driver is alive"
                )
            elif watched != present:
                raise RunDirInUse(self._refusal(owner, self._uri))
            time.sleep(min(1.0, self._renew_s / 5))

    def _write_and_read_back(self, settle_s: float) -> bool:
        filesystem.write_bytes(self._uri, self._owner.to_json())
        time.sleep(settle_s)
        return self._is_own(self._read())

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._renew_s):
            # While the store does not answer there is nothing to renew, and nothing that others could write.
            with contextlib.suppress(OSError):
                present = self._read()
                if present is not None and not self._is_own(present):
                    self._lose(Owner.from_json(present))
                    return
                self._owner = replace(self._owner, renewed=_now(), renewals=self._owner.renewals + 1)
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

    def _refusal(self, owner: Owner | None, file: str) -> str:
        return (
            f"{self._run_dir_uri} is being written by another driver: {_describe(owner)}. Wait for it, stop it, or "
            f"give another run_dir; if it is certainly gone, delete {file}."
        )

    def _is_own(self, data: bytes | None) -> bool:
        owner = Owner.from_json(data)
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
    except OSError:  # not Linux: nobody's pids are looked up, and each lock is watched
        return uuid.uuid4().hex


def _process_start(pid: int) -> str | None:
    """When a process started, in ticks since boot; None where there is no such process, or one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in _GONE else fields[18]
