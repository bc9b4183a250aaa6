"""Find the processes of Ray Train's workers, for tests that kill one."""

from pathlib import Path

import ray


def training_worker_pids() -> list[int]:
    """Return the pids of the training workers of this process's Ray.

    They are children of its raylet, which has the session's folder in its command line. Other Rays on this machine have
    other sessions.
    """
    session = ray._private.worker._global_node.get_session_dir_path()
    pids = []
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
            if title.startswith(b"ray::") and b"TrainWorker" in title:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if session.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                    pids.append(int(folder.name))
        except OSError:  # a process may end while it is looked at
            continue
    return sorted(pids)
