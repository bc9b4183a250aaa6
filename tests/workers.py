"""Ray Train's workers as processes, for tests that kill one."""

from pathlib import Path

import ray


def training_worker_pids() -> list[int]:
    """The processes of this Ray's training workers: children of the raylet that this process started."""
    session = ray._private.worker._global_node.get_session_dir_path()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
            if title.startswith(b"ray::") and b"TrainWorker" in title:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if session.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                    found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)
