"""One driver at a time: which one is refused, which one takes over, and what a driver does that lost its lock."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from elfs_ray.storage import filesystem
from elfs_ray.storage.run_lock import LOCK_FILE, Owner, RunDirInUse, RunLock

SHORT = {"renew_s": 0.1, "expire_s": 0.6, "settle_s": 0.1}
HOLDER = (
    "import sys, time; from elfs_ray.storage.run_lock import RunLock\n"
    "with RunLock(sys.argv[1], print): print('held', flush=True); time.sleep(100)"
)


@pytest.fixture(params=["local", "object store"])
def root(request, tmp_path) -> str:
    """Return a run directory on disk, and one in a bucket."""
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_bucket") + "/run"


def lock(root: str, said: list[str] | None = None) -> RunLock:
    return RunLock(root, (said if said is not None else []).append, **SHORT)


def owner_on_disk(root: str) -> Owner:
    owner = Owner.from_json(filesystem.read_bytes(f"{root}/{LOCK_FILE}"))
    assert owner is not None
    return owner


def write_owner(root: str, owner: Owner) -> None:
    filesystem.write_bytes(f"{root}/{LOCK_FILE}", owner.to_json())


def elsewhere() -> Owner:
    return replace(Owner.of_this_process(), host="node-7", machine="another boot", user="anna")


def take_over(root: str, owner: Owner) -> None:
    """Write as a driver does that sees neither renewals nor the kernel lock of another machine.

    A renewal that is under way may overwrite the lock; the driver then reads a foreign token back and retries.
    """
    for _ in range(100):
        write_owner(root, owner)
        time.sleep(0.3)


def hold_in_a_process(root: str) -> subprocess.Popen:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, root], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    while holder.stdout.readline().strip() != "held":
        assert holder.poll() is None
    return holder


def test_a_lock_names_its_owner_and_is_released_also_after_an_error(root):
    for error in (None, ValueError, KeyboardInterrupt):
        try:
            with lock(root):
                fields = json.loads(filesystem.read_bytes(f"{root}/{LOCK_FILE}"))
                assert fields["pid"] == os.getpid() and fields["host"] and fields["user"] and fields["started"]
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt) as raised:
            assert type(raised) is error
        assert not filesystem.exists(f"{root}/{LOCK_FILE}")


def test_a_lock_is_renewed_while_it_is_held(root):
    with lock(root) as held:
        held.check()
        deadline = time.monotonic() + 30
        while owner_on_disk(root).renewals < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_second_driver_on_the_same_machine_is_refused_at_once(tmp_path):
    holder = hold_in_a_process(str(tmp_path))
    try:
        needed = rf"another driver: pid {holder.pid} of \S+ on \S+, since .*\. Wait for it, .* delete .*_LOCK"
        with pytest.raises(RunDirInUse, match=needed), RunLock(str(tmp_path), print):
            pass
        assert owner_on_disk(str(tmp_path)).pid == holder.pid
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("waited_for", [True, False], ids=["reaped", "zombie"])
def test_the_lock_of_a_killed_driver_is_taken_over_at_once(tmp_path, waited_for):
    holder = hold_in_a_process(str(tmp_path))
    os.kill(holder.pid, signal.SIGKILL)
    if waited_for:
        holder.wait()
    else:
        while "Z" not in Path(f"/proc/{holder.pid}/stat").read_text():
            time.sleep(0.01)
    said: list[str] = []
    with RunLock(str(tmp_path), said.append, expire_s=1e9):
        assert owner_on_disk(str(tmp_path)).pid == os.getpid()
    assert len(said) == 1 and f"is gone (pid {holder.pid}" in said[0]
    holder.wait()


def test_a_lock_is_not_kept_by_a_new_process_with_the_old_pid(root):
    write_owner(root, replace(Owner.of_this_process(), process_start="1"))
    with lock(root):
        assert owner_on_disk(root).process_start != "1"


def test_a_driver_on_another_machine_that_renews_its_lock_keeps_it(root):
    owner, stop = elsewhere(), threading.Event()
    write_owner(root, owner)

    def renew() -> None:
        renewals = 0
        while not stop.wait(0.1):
            renewals += 1
            write_owner(root, replace(owner, renewals=renewals))

    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        with pytest.raises(RunDirInUse, match="of anna on node-7"), RunLock(root, print, renew_s=0.1, expire_s=60):
            pass
    finally:
        stop.set()
        renewer.join()
    assert owner_on_disk(root).token == owner.token


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff", b'{"token": "x"}'])
def test_a_lock_that_nobody_renews_is_taken_over_when_it_expires(root, content):
    filesystem.write_bytes(f"{root}/{LOCK_FILE}", elsewhere().to_json() if content is None else content)
    said: list[str] = []
    with lock(root, said):
        assert owner_on_disk(root).pid == os.getpid()
    assert "watching for up to 1 s" in said[0] and "taking over its lock" in said[1]
    assert not filesystem.exists(f"{root}/{LOCK_FILE}")


def test_a_driver_that_lost_its_lock_stops_and_leaves_the_lock(root):
    other = elsewhere()
    with (
        pytest.raises(RunDirInUse, match=r"another driver took over .* \(pid .* of anna on node-7"),
        lock(root) as held,
    ):
        take_over(root, other)  # ended by the interrupt
        held.check()
    assert owner_on_disk(root) == other


def test_nobody_takes_over_from_a_driver_that_has_the_kernel_lock(tmp_path):
    """Not even another machine that shares the disk and sees no renewal for a long time."""
    holder = hold_in_a_process(str(tmp_path))
    try:
        os.kill(holder.pid, signal.SIGSTOP)
        write_owner(str(tmp_path), replace(owner_on_disk(str(tmp_path)), host="node-7", machine="another boot"))
        with (
            pytest.raises(RunDirInUse, match=rf"pid {holder.pid} .* on node-7.* delete \S+/_LOCK\."),
            lock(str(tmp_path)),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_second_driver_is_refused_without_kernel_locks_too(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock(str(tmp_path)):
        assert owner_on_disk(str(tmp_path)).pid == os.getpid()
        with pytest.raises(RunDirInUse, match=f"pid {os.getpid()} "), lock(str(tmp_path)):
            pass
    assert not filesystem.exists(f"{tmp_path}/{LOCK_FILE}")


@pytest.mark.parametrize("left_by_a_dead_driver", [False, True])
def test_only_one_of_many_drivers_that_start_together_gets_the_lock(tmp_path, left_by_a_dead_driver):
    if left_by_a_dead_driver:
        write_owner(str(tmp_path), replace(Owner.of_this_process(), pid=2**22 + 1))
    holders, most, outcomes, start = [], [], [], threading.Barrier(8)

    def drive() -> None:
        start.wait()
        try:
            with RunLock(str(tmp_path), lambda line: None):
                holders.append(1)
                most.append(len(holders))
                time.sleep(0.5)
                holders.pop()
                outcomes.append("held")
        except RunDirInUse:
            outcomes.append("refused")

    drivers = [threading.Thread(target=drive) for _ in range(8)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert set(most) == {1} and len(outcomes) == 8 and "refused" in outcomes


def test_a_lock_is_read_back_as_it_was_written():
    owner = Owner.of_this_process()
    assert Owner.from_json(owner.to_json()) == owner and owner.is_running()
    assert set(asdict(owner)) >= {"host", "pid", "user", "started"}
    assert replace(owner, pid=2**22 + 1).is_gone() and not owner.is_gone()
    assert not elsewhere().is_running() and not elsewhere().is_gone()
