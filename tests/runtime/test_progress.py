"""The progress that a user reads in a terminal and in a log."""

import pytest

from elfs_ray.runtime import progress
from elfs_ray.runtime.progress import Progress, count, format_duration


@pytest.mark.parametrize(("seconds", "text"), [(7.24, "7.2 s"), (245, "4:05"), (3723, "1:02:03")])
def test_durations_are_written_as_people_write_them(seconds, text):
    assert format_duration(seconds) == text


def test_a_count_of_one_is_singular():
    assert (count(1, "image"), count(2000, "image"), count(3, "try", "tries")) == ("1 image", "2,000 images", "3 tries")


def test_a_log_has_the_last_line_only_once(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    with Progress("train", total=10, unit="images") as shown:
        shown.update(5)
        shown.update(10, "epoch 2/2")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train") and "5/10 images" in lines[0] and "left" in lines[0]
    assert "10/10 images 100%" in lines[1] and lines[1].endswith("epoch 2/2")


def test_a_line_in_a_terminal_takes_the_place_of_the_progress(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress, "TERMINAL_INTERVAL_S", 0.0)
    with Progress("embed", total=10, unit="images") as shown:
        shown.update(5)
        progress.say("a node was lost")
        shown.update(10)
    erased = capsys.readouterr().err.split("\r\x1b[2K")
    assert "5/10 images" in erased[1] and erased[2] == "a node was lost\n" and "10/10" in erased[3]


def test_a_failed_stage_does_not_print_its_last_line(capsys):
    with pytest.raises(RuntimeError), Progress("train", total=10, unit="images"):
        raise RuntimeError
    assert capsys.readouterr().err == ""
