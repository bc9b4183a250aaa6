"""Lock a run directory, so that only one driver at a time writes to it.

The lock file `_LOCK.json` names its owner (host, pid, user, start) and has a count that the owner raises every 10 s. A
lock of another machine expires once it has been watched for 60 s without a change, so clocks are never compared. A lock
whose process has ended on this machine is taken over at once, so that a killed driver can be restarted at once.

On a local path the driver also holds a kernel lock on `_LOCK` (flock, by the package filelock). The kernel releases it
when the process ends, however it ends. Of several drivers that start together exactly one gets it, and nobody can take
it from a live driver. NFS (version 4, or version 3 with lockd) shares kernel locks between machines. File systems that
do not (mounts with local flock, some FUSE) are as safe as a bucket:

pyarrow has no conditional write to an object store. There a driver writes its token, waits 2 s and reads it back: of
several drivers the last to write has the lock, if each took less than 2 s from reading the old lock to writing its own.
If one took longer, the loser reads a foreign token at its next renewal, within 10 s, and stops. Likewise, a driver that
was paused between reading its token and renewing it overwrites the lock of the driver that took over; that one then
reads a foreign token and stops. Either way exactly one driver continues. The tasks of the stopped driver may run for a
moment longer; they write whole files with the same bytes.
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
EXPIRE_S = 60.0  # six renewals: a store that does not answer for half a minute costs nobody the lock
SETTLE_S = 2.0  # longer than a read and a write of an object take
_GONE = "ZX"  # states in /proc of a process that has ended: zombie, dead
_NO_KERNEL_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # errors of file systems without flock


class RunDirInUse(RuntimeError):
    """Another driver writes to the run directory."""


@dataclass(frozen=True)
class Owner:
    """The driver that holds a lock.

    machine: distinguishes machines and containers that have the same host name. process_start: distinguishes processes
    that have had the same pid.
    """

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
        """Return the owner in a lock file; None for a file that cannot be read as a lock."""
        try:
            return cls(**json.loads(data or b""))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def is_running(self) -> bool:
        """Return whether this process can see that the owner is running; never true for another machine."""
        return self.machine == _machine() and _process_start(self.pid) == self.process_start

    def is_gone(self) -> bool:
        """Return whether this process can see that the owner has ended; never true for another machine."""
        return self.machine == _machine() and _process_start(self.pid) != self.process_start

    def describe(self) -> str:
        return f"pid {self.pid} of {self.user} on {self.host}, since {self.started}, last seen {self.renewed}"


class RunLock:
    """The lock of a run directory, held by a `with` block. Entering it raises RunDirInUse if another driver is alive.

    A driver that gives no sign of life for `expire_s` can lose its lock. It then stops with RunDirInUse: if the block
    runs in the main thread it is interrupted, in another thread it must call `check`.

    tell: is called with a line of text when entering the block takes a while.
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
            # The interrupt of `_lose` arrives as a KeyboardInterrupt; any other error matters more than the lock.
            if self._lost and (error is None or isinstance(error, KeyboardInterrupt)):
                raise RunDirInUse(self._lost) from None
            # If the store does not answer now, the next driver waits for the lock to expire. Raising here would hide
            # the error with which the block ended.
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
        """Return the kernel lock of a local path, held; None for a bucket and for a file system without such locks."""
        system, folder = filesystem.resolve(self._run_dir_uri)
        if not isinstance(system, fs.LocalFileSystem):
            return None
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, KERNEL_LOCK_FILE)
        # The file is never deleted: a driver could then lock the deleted file while the next one locks a new file of
        # the same name. 0o666, as the next driver may be another user's. No fallback to filelock's soft lock, which a
        # killed process leaves behind.
        lock = filelock.FileLock(path, mode=0o666, blocking=False, fallback_to_soft=False)
        while True:
            try:
                lock.acquire()
                return lock
            except filelock.Timeout:
                owner = Owner.from_json(self._read())
                if owner is None or not owner.is_gone():
                    raise RunDirInUse(self._refusal(owner, path)) from None
                time.sleep(0.05)  # the kernel releases a killed process's locks a moment after /proc says that it ended
            except OSError as error:
                if error.errno not in _NO_KERNEL_LOCKS:
                    raise
                return None

    def _release_kernel_lock(self) -> None:
        if self._kernel_lock is not None:
            self._kernel_lock.release()

    def _acquire(self) -> None:
        """Write this driver's lock once there is none, or the present one is dead or has expired."""
        watched: bytes | None = None  # the lock file of another machine, and since when it has not changed
        since_s = time.monotonic()
        while True:
            present = self._read()
            owner = Owner.from_json(present)
            if owner is not None and owner.is_running():
                raise RunDirInUse(self._refusal(owner, self._uri))
            expired = present is not None and watched == present and time.monotonic() - since_s >= self._expire_s
            if expired or (owner is not None and owner.is_gone()):
                self._tell(f"the previous driver is gone ({_describe(owner)}): taking over its lock")
                present = None
            if present is None:
                # Holding the kernel lock, this driver has no competitor on its machine and need not wait before it
                # reads back. An expired lock was another machine's, so that machine may not see the kernel lock: wait
                # then.
                if self._write_and_read_back(0 if self._kernel_lock and not expired else self._settle_s):
                    return
                watched = None
            elif watched is None:
                watched, since_s = present, time.monotonic()
                self._tell(
                    f"{self._run_dir_uri} is locked ({_describe(owner)}): watching for up to {self._expire_s:.0f} s to "
                    "see whether that driver is alive"
                )
            elif watched != present:  # renewed since
                raise RunDirInUse(self._refusal(owner, self._uri))
            time.sleep(min(1.0, self._renew_s / 5))

    def _write_and_read_back(self, settle_s: float) -> bool:
        filesystem.write_bytes(self._uri, self._owner.to_json())
        time.sleep(settle_s)
        return self._is_own(self._read())

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._renew_s):
            # A store that does not answer is no reason to stop: other drivers cannot write to it either.
            with contextlib.suppress(OSError):
                present = self._read()
                if present is not None and not self._is_own(present):
                    self._lose(Owner.from_json(present))
                    return
                self._owner = replace(self._owner, renewed=_now(), renewals=self._owner.renewals + 1)
                filesystem.write_bytes(self._uri, self._owner.to_json())

    def _lose(self, owner: Owner | None) -> None:
        self._lost = (
            f"this driver gave no sign of life for {self._expire_s:.0f} s or more, and another driver took over "
            f"{self._run_dir_uri} ({_describe(owner)}): this one stops"
        )
        if self._interrupts_main:
            # A real signal, because _thread.interrupt_main would not wake the main thread from a blocking call.
            main_thread = threading.main_thread().ident
            assert main_thread is not None
            signal.pthread_kill(main_thread, signal.SIGINT)

    def _refusal(self, owner: Owner | None, file: str) -> str:
        return (
            f"{self._run_dir_uri} is being written by another driver: {_describe(owner)}. Wait for it, stop it, or "
            f"give another run_dir; if that driver is certainly gone, delete {file}."
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
    except (KeyError, OSError):  # containers may run as a user without a name
        return str(os.getuid())


def _machine() -> str:
    """Return an id that two processes share exactly if they can look up each other's pids.

    It consists of the boot of the kernel and the namespace of pids, so that containers on one machine differ.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: a unique id, so that no pid is looked up and every lock is watched until it expires
        return uuid.uuid4().hex


def _process_start(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if there is none or it has ended."""
    try:
        # The name of the program is in brackets and may contain spaces and brackets: the fields follow the last one.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in _GONE else fields[18]  # field 22, starttime, in proc(5)
