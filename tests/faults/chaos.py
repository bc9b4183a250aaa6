"""Strike the pipeline at random moments and compare the final bytes with those of an undisturbed run.

    python -m tests.faults.chaos [--quick] [--faults N] [--seed S]

The pool is 4,000 digits. After an undisturbed run, further runs are struck by up to eight faults each, at moments
sampled from the seed: on three nodes or on a Ray that the driver starts, with the run directory on a disk or in a
bucket. Whenever the driver ends before its work is done, the same command is started again. In the end every table must
equal that of the undisturbed run, byte for byte. Prints a line of JSON for each fault, then a summary.

The extra `test` must be installed: it brings an S3 server. The full disk is a tmpfs, which only root may mount; for
other users that fault is left out.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.helpers.reporting import emit
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.faults.chaos_places import Place, bucket, small_disk, three_nodes, write_pool
from tests.faults.chaos_strikes import EXIT_CODES, STAGES, STRIKES, Rig, left_behind

ROOT = Path(__file__).parents[2]

YAML = ROOT / "jobs" / "quickstart.yaml"
TABLES = ("index", "rejected", "embeddings", "proxy_images", "clusters", "dynamics", "scores", "coreset", "coreset.txt")
STAGE_NAMES = ("index", "embed", "cluster", "train", "select", "report")
FAULTS_A_RUN = 8
LAST_MOMENT = 0.8  # of a stage's duration, which varies: a later strike might find the stage complete
TIMEOUT_S = 1200.0
# Two of Ray's agents look for a lost head for a minute before they exit (gcs_rpc_server_reconnect_timeout_s).
ALL_GONE_S = 120.0
POLL_S = 0.02
DRIVER = """
import sys
from elfs_ray.cli import report_errors, run_config
from elfs_ray.config import load_config
sys.exit(report_errors(lambda: run_config(load_config(sys.argv[1], sys.argv[2:]))))
"""


@dataclass
class Fault:
    """A strike of some kind in a stage, after a share of the time that the stage takes undisturbed."""

    kind: str
    stage: str
    share: float
    hit: str | None = None
    exits: list[int] = field(default_factory=list)
    said: str = ""


class Run:
    """A run that is struck and resumed until it is complete."""

    def __init__(self, place: Place, name: str, overrides: list[str], rng: random.Random, yaml: Path = YAML):
        self.run_dir = RunDir(filesystem.join(place.root, name))
        self._place, self._rng, self._log = place, rng, place.logs / f"{name}.log"
        self._command = [sys.executable, "-c", DRIVER, str(yaml), *overrides, f"run_dir={self.run_dir.uri}"]
        self._deadline = time.monotonic() + TIMEOUT_S
        self.start()

    def start(self) -> None:
        """Start the driver."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._started_s = time.time() - 1  # object stores round an object's time to whole seconds
        with self._log.open("wb") as sink:
            self.driver = subprocess.Popen(
                self._command, start_new_session=True, stdout=sink, stderr=sink, env=environment
            )

    def strike(self, fault: Fault, seconds: float) -> None:
        """Wait for the fault's moment and strike. `fault.hit` stays None if the stage ends without a target for it."""
        self._restart_if_ended(fault)
        while not self._is_in(fault.stage):
            if self._is_complete(fault.stage):
                return
            time.sleep(POLL_S)
            self._restart_if_ended(fault)
        time.sleep(fault.share * seconds)
        place = self._place
        rig = Rig(self.driver, place.cluster, place.nodes, place.disk, place.store, self._rng)
        while fault.hit is None and self.driver.poll() is None and not self._is_complete(fault.stage):
            fault.hit = STRIKES[fault.kind](rig)
        expected = EXIT_CODES.get(fault.kind)
        if fault.hit and expected is not None:
            message = self.last_message()
            assert self.driver.returncode == expected, f"{fault}: exit code {self.driver.returncode}, {message}"
            # A driver that is killed outright (negative code) says nothing.
            assert expected < 0 or message.startswith(("interrupted: ", "terminated: ")), message
            self._check_nothing_is_left()

    def finish(self, faults: list[Fault]) -> None:
        """Restart the driver until every stage is complete."""
        last = faults[-1] if faults else Fault("none", "none", 0)
        while not (self.driver.poll() == 0 and self._is_complete("report")):
            self._restart_if_ended(last)
            time.sleep(POLL_S)

    def last_message(self) -> str:
        """Return the driver's last message about an error, or the end of its output."""
        lines = self._log.read_text(errors="replace").splitlines()
        messages = [line for line in lines if line.startswith(("failed:", "error:", "interrupted:", "terminated:"))]
        return messages[-1] if messages else " | ".join(lines[-12:])

    def tables(self) -> dict[str, bytes]:
        """Return the path and the bytes of every file of every table."""
        files = {}
        for name in TABLES:
            uri = self.run_dir.path(name)
            if filesystem.file_size(uri) is not None:
                files[name] = filesystem.read_bytes(uri)
                continue
            root = filesystem.resolve(uri)[1]
            for info in filesystem.list_files(uri, recursive=True):
                relative = info.path.removeprefix(root).lstrip("/")
                if relative.endswith(".parquet"):
                    files[f"{name}/{relative}"] = filesystem.read_bytes(filesystem.join(uri, relative))
        return files

    def stages_left(self) -> list[str]:
        """Return the stages that are not complete, in order."""
        return [stage for stage in STAGE_NAMES if not self._is_complete(stage)]

    def seconds(self, stage: str) -> float:
        return self.run_dir.complete_marker(stage).seconds

    def end(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()

    def _is_in(self, stage: str) -> bool:
        """Return whether the current driver has begun a stage and not completed it."""
        store, path = filesystem.resolve(self.run_dir.path(stage, schema.STARTED_FILE))
        began = store.get_file_info(path).mtime
        # An earlier driver may have left the file.
        return began is not None and began.timestamp() >= self._started_s and not self._is_complete(stage)

    def _is_complete(self, stage: str) -> bool:
        return filesystem.exists(self.run_dir.path(stage, schema.SUCCESS_FILE))

    def _restart_if_ended(self, fault: Fault) -> None:
        """Start the driver again if it has ended before its work was done."""
        assert time.monotonic() < self._deadline, f"not complete after {TIMEOUT_S} s: {fault}, {self.last_message()}"
        code = self.driver.poll()
        if code is not None and not (code == 0 and self._is_complete("report")):
            fault.exits.append(code)
            fault.said = self.last_message()
            assert len(fault.exits) < 6, f"the driver makes no progress: {fault}"
            self.start()

    def _check_nothing_is_left(self) -> None:
        """Wait until no process of the driver's session is left; raise AssertionError if some stay."""
        deadline = time.monotonic() + ALL_GONE_S
        while orphans := left_behind(self.driver.pid):
            assert time.monotonic() < deadline, f"orphans: {orphans}"
            time.sleep(0.1)


def choose_fault(
    run: Run, seconds: dict[str, float], kinds: list[str], hits: Counter, rng: random.Random
) -> Fault | None:
    """Return a fault in one of the next two stages, of the kind with the fewest hits; None for a complete run."""
    stages = run.stages_left()[:2]
    if not stages:
        return None
    # Not in proportion to their duration: short stages must be hit, too.
    (stage,) = rng.choices(stages, [seconds[stage] ** 0.5 for stage in stages])
    possible = [kind for kind in kinds if stage in STAGES.get(kind, STAGE_NAMES)]
    kind = min(possible, key=lambda kind: (hits[kind], rng.random()))
    return Fault(kind, stage, round(rng.uniform(0, LAST_MOMENT), 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="600 digits, 2 faults")
    parser.add_argument("--faults", type=int, help="minimum number of faults that hit (default 40; quick: 2)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    num_faults = options.faults or (2 if options.quick else 40)
    num_images, epochs = (600, 2) if options.quick else (4000, 4)
    from tests import s3

    os.environ |= s3.environment()
    # A shell lets processes in the background ignore Ctrl-C, and the drivers would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # In /tmp, because the path of a socket may have at most 107 characters, and Ray's are long.
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    try:
        with (
            bucket(folder) as (root, store),
            small_disk(folder) as (disk, can_fill),
            three_nodes(folder) as (cluster, nodes),
        ):
            overrides = [f"pool.uri={write_pool(folder, num_images)}", "pool.label=null", "evaluate.test_uri=null"]
            overrides += ["budget=0.1", f"train.epochs={epochs}", "train.num_workers=2", "train.cpus_per_worker=1"]
            places = [
                Place(str(disk), folder, cluster, nodes, disk if can_fill else None),
                Place(root, folder, cluster, nodes, store=store),
                Place(str(disk), folder, disk=disk if can_fill else None),
            ]
            play(options.seed, num_faults, overrides, places)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def play(seed: int, num_faults: int, overrides: list[str], places: list[Place]) -> None:
    """Strike runs at each place in turn until enough faults have hit, print the summary and exit."""
    undisturbed = Run(places[0], "undisturbed", [*overrides, _address(places[0])], random.Random(seed))
    undisturbed.finish([])
    expected = undisturbed.tables()
    seconds = {stage: undisturbed.seconds(stage) for stage in STAGE_NAMES}
    print(json.dumps({"undisturbed": seconds, "files": len(expected)}), flush=True)
    hits: list[Fault] = []
    number = equal = 0
    while len(hits) < num_faults:
        place, rng = places[number % len(places)], random.Random(f"{seed} {number}")
        run = Run(place, f"run-{number}", [*overrides, _address(place)], rng)
        faults: list[Fault] = []
        try:
            while len([fault for fault in faults if fault.hit]) < min(FAULTS_A_RUN, num_faults - len(hits)):
                of_kind = Counter(fault.kind for fault in hits + faults)
                fault = choose_fault(run, seconds, place.kinds(), of_kind, rng)
                if fault is None:
                    break
                faults.append(fault)
                run.strike(fault, seconds[fault.stage])
            run.finish(faults)
            # The shortest time so far, so that strikes come before a stage is complete.
            seconds = {stage: min(shortest, run.seconds(stage)) for stage, shortest in seconds.items()}
        finally:
            run.end()
        is_equal = run.tables() == expected
        equal += is_equal
        for fault in faults:
            where = {"ray": "3 nodes" if place.cluster else "own", "at": "bucket" if place.store else "disk"}
            print(json.dumps({"run": number, **where, **vars(fault), "equal": is_equal}), flush=True)
        hits += [fault for fault in faults if fault.hit]
        filesystem.delete(run.run_dir.uri)
        number += 1
    by_kind, by_stage = (Counter(getattr(fault, key) for fault in hits) for key in ("kind", "stage"))
    print(json.dumps({"seed": seed, "faults": len(hits), "kinds": by_kind, "stages": by_stage}), flush=True)
    emit("chaos: runs with the bytes of the undisturbed run", equal, "runs", "runs that were struck", number)
    sys.exit(equal != number)


def _address(place: Place) -> str:
    return f"ray_address={place.cluster.address if place.cluster else 'local'}"


if __name__ == "__main__":
    main()
