"""Faults at random moments, and the same bytes in the end: the pipeline on 4,000 digits, struck again and again.

    python -m tests.faults.chaos [--quick] [--faults N] [--seed S]

An undisturbed run comes first. Then runs of their own are struck by up to eight faults each, at moments drawn from the
seed: on three nodes or on a Ray that the driver starts, with the run directory on a disk or in a bucket. Whenever the
driver ends before its work is done, the same command is typed again. In the end every table has to equal the
undisturbed run's, byte for byte. A line of JSON for each fault, then a summary.

It needs the extra `test`, whose S3 server it starts. Filling a disk takes a tmpfs, which only root may mount; without,
that fault is left out.
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

from benchmarks.reporting import emit
from elfs_ray.storage import filesystem, schema
from elfs_ray.storage.run_dir import RunDir
from tests.faults.chaos_places import Place, bucket, small_disk, three_nodes, write_pool
from tests.faults.chaos_strikes import EXIT_CODES, STAGES, STRIKES, Rig, left_behind

ROOT = Path(__file__).parents[2]

YAML = ROOT / "jobs" / "quickstart.yaml"
TABLES = ("index", "rejected", "embeddings", "proxy_images", "clusters", "dynamics", "scores", "coreset", "coreset.txt")
STAGE_NAMES = ("index", "embed", "cluster", "train", "select", "report")
FAULTS_A_RUN = 8
LAST_MOMENT = 0.8  # as a share of a stage's time, which differs from run to run
TIMEOUT_S = 1200.0
# Two agents of a Ray whose head is gone look for it for a minute (gcs_rpc_server_reconnect_timeout_s).
ALL_GONE_S = 120.0
POLL_S = 0.02
DRIVER = "import sys; from elfs_ray.cli import run_job; sys.exit(run_job('chaos', sys.argv[1], sys.argv[2:]))"


@dataclass
class Fault:
    """A strike of a kind in a stage, after a share of the time that the stage takes undisturbed."""

    kind: str
    stage: str
    share: float
    hit: str | None = None
    exits: list[int] = field(default_factory=list)
    said: str = ""


class Run:
    """One run directory, struck and continued until it is complete."""

    def __init__(self, place: Place, name: str, overrides: list[str], rng: random.Random, yaml: Path = YAML):
        self.run_dir = RunDir(filesystem.join(place.root, name))
        self._place, self._rng, self._log = place, rng, place.logs / f"{name}.log"
        self._command = [sys.executable, "-c", DRIVER, str(yaml), *overrides, f"run_dir={self.run_dir.uri}"]
        self._deadline = time.monotonic() + TIMEOUT_S
        self.start()

    def start(self) -> None:
        """Type the command."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._started_s = time.time() - 1  # stores tell the time of an object in whole seconds
        with self._log.open("wb") as sink:
            self.driver = subprocess.Popen(
                self._command, start_new_session=True, stdout=sink, stderr=sink, env=environment
            )

    def strike(self, fault: Fault, seconds: float) -> None:
        """Wait for the fault's moment and strike; `fault.hit` stays None where there is nothing of its kind to hit."""
        self._go_on(fault)
        while not self._is_in(fault.stage):
            if self._is_complete(fault.stage):
                return
            time.sleep(POLL_S)
            self._go_on(fault)
        time.sleep(fault.share * seconds)
        place = self._place
        rig = Rig(self.driver, place.cluster, place.nodes, place.disk, place.store, self._rng)
        while fault.hit is None and self.driver.poll() is None and not self._is_complete(fault.stage):
            fault.hit = STRIKES[fault.kind](rig)
        wanted = EXIT_CODES.get(fault.kind)
        if fault.hit and wanted is not None:
            assert self.driver.returncode == wanted, f"{fault}: exit code {self.driver.returncode}, {self.said()}"
            assert wanted < 0 or self.said().startswith(("interrupted: ", "terminated: ")), self.said()
            self._check_nothing_is_left()

    def finish(self, faults: list[Fault]) -> None:
        """Continue until every stage is complete."""
        last = faults[-1] if faults else Fault("none", "none", 0)
        while not (self.driver.poll() == 0 and self._is_complete("report")):
            self._go_on(last)
            time.sleep(POLL_S)

    def said(self) -> str:
        """The last line of the driver's output that says something of an error."""
        lines = self._log.read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("failed:", "error:", "interrupted:", "terminated:"))]
        return told[-1] if told else " | ".join(lines[-12:])

    def tables(self) -> dict[str, bytes]:
        """Path and bytes of every file of every table."""
        found = {}
        for name in TABLES:
            uri = self.run_dir.path(name)
            if filesystem.file_size(uri) is not None:
                found[name] = filesystem.read_bytes(uri)
                continue
            root = filesystem.resolve(uri)[1]
            for info in filesystem.list_files(uri, recursive=True):
                relative = info.path.removeprefix(root).lstrip("/")
                if relative.endswith(".parquet"):
                    found[f"{name}/{relative}"] = filesystem.read_bytes(filesystem.join(uri, relative))
        return found

    def stages_left(self) -> list[str]:
        """The stages that are not complete, in order."""
        return [stage for stage in STAGE_NAMES if not self._is_complete(stage)]

    def seconds(self, stage: str) -> float:
        return self.run_dir.complete_marker(stage).seconds

    def end(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()

    def _is_in(self, stage: str) -> bool:
        """Whether the driver that runs now has begun a stage, and not ended it."""
        store, path = filesystem.resolve(self.run_dir.path(stage, schema.STARTED_FILE))
        began_s = store.get_file_info(path).mtime
        return began_s is not None and began_s.timestamp() >= self._started_s and not self._is_complete(stage)

    def _is_complete(self, stage: str) -> bool:
        return filesystem.exists(self.run_dir.path(stage, schema.SUCCESS_FILE))

    def _go_on(self, fault: Fault) -> None:
        """Type the command again where the driver has ended before its work was done."""
        assert time.monotonic() < self._deadline, f"not complete after {TIMEOUT_S} s: {fault}, {self.said()}"
        code = self.driver.poll()
        if code is not None and not (code == 0 and self._is_complete("report")):
            fault.exits.append(code)
            fault.said = self.said()
            assert len(fault.exits) < 6, f"the driver does not go on: {fault}"
            self.start()

    def _check_nothing_is_left(self) -> None:
        """No process of the driver's session outlives it for long."""
        deadline = time.monotonic() + ALL_GONE_S
        while left := left_behind(self.driver.pid):
            assert time.monotonic() < deadline, f"orphans: {left}"
            time.sleep(0.1)


def draw_fault(
    run: Run, seconds: dict[str, float], kinds: list[str], hits: Counter, rng: random.Random
) -> Fault | None:
    """A fault in one of the next two stages, of a kind drawn less often than others; None for a complete run."""
    stages = run.stages_left()[:2]
    if not stages:
        return None
    (stage,) = rng.choices(stages, [seconds[stage] ** 0.5 for stage in stages])  # short ones are to be hit, too
    possible = [kind for kind in kinds if stage in STAGES.get(kind, STAGE_NAMES)]
    kind = min(possible, key=lambda kind: (hits[kind], rng.random()))
    return Fault(kind, stage, round(rng.uniform(0, LAST_MOMENT), 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="600 digits, 2 faults")
    parser.add_argument("--faults", type=int, help="at least so many (40; quick: 2)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wanted = options.faults or (2 if options.quick else 40)
    num_images, epochs = (600, 2) if options.quick else (4000, 4)
    from tests import s3

    os.environ |= s3.environment()
    # A shell has what it starts in the background ignore Ctrl-C, and drivers would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # In /tmp, because the paths of Ray's sockets may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    try:
        with (
            bucket(folder) as (root, store),
            small_disk(folder) as (disk, can_fill),
            three_nodes(folder) as (cluster, nodes),
        ):
            overrides = [f"pool.uri={write_pool(folder, num_images)}", "pool.label=null", "budget=0.1"]
            overrides += [f"train.epochs={epochs}", "train.cpus_per_worker=1"]
            places = [
                Place(str(disk), folder, cluster, nodes, disk if can_fill else None),
                Place(root, folder, cluster, nodes, store=store),
                Place(str(disk), folder, disk=disk if can_fill else None),
            ]
            play(options.seed, wanted, overrides, places)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def play(seed: int, wanted: int, overrides: list[str], places: list[Place]) -> None:
    """Runs at each place in turn until enough faults have hit; the summary."""
    undisturbed = Run(places[0], "undisturbed", [*overrides, _address(places[0])], random.Random(seed))
    undisturbed.finish([])
    expected = undisturbed.tables()
    seconds = {stage: undisturbed.seconds(stage) for stage in STAGE_NAMES}
    print(json.dumps({"undisturbed": seconds, "files": len(expected)}), flush=True)
    hits: list[Fault] = []
    number = equal = 0
    while len(hits) < wanted:
        place, rng = places[number % len(places)], random.Random(f"{seed} {number}")
        run = Run(place, f"run-{number}", [*overrides, _address(place)], rng)
        faults: list[Fault] = []
        try:
            while len([fault for fault in faults if fault.hit]) < min(FAULTS_A_RUN, wanted - len(hits)):
                of_kind = Counter(fault.kind for fault in hits + faults)
                fault = draw_fault(run, seconds, place.kinds(), of_kind, rng)
                if fault is None:
                    break
                faults.append(fault)
                run.strike(fault, seconds[fault.stage])
            run.finish(faults)
            seconds = {stage: min(own, run.seconds(stage)) for stage, own in seconds.items()}
        finally:
            run.end()
        same = run.tables() == expected
        equal += same
        for fault in faults:
            where = {"ray": "3 nodes" if place.cluster else "own", "at": "bucket" if place.store else "disk"}
            print(json.dumps({"run": number, **where, **vars(fault), "equal": same}), flush=True)
        hits += [fault for fault in faults if fault.hit]
        filesystem.delete(run.run_dir.uri)
        number += 1
    by_kind, by_stage = (Counter(getattr(fault, key) for fault in hits) for key in ("kind", "stage"))
    print(json.dumps({"seed": seed, "faults": len(hits), "kinds": by_kind, "stages": by_stage}), flush=True)
    emit("chaos: runs with the undisturbed run's bytes", equal, "runs", "runs that were struck", number)
    sys.exit(equal != number)


def _address(place: Place) -> str:
    return f"ray_address={place.cluster.address if place.cluster else 'local'}"


if __name__ == "__main__":
    main()
