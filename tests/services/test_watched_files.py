"""Files that change while they are in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import PagewireError
from services.watched_files import WatchedFiles


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Watched:
    """A file of numbers; anything else in it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock()
        self.num_reads = 0
        path.write_text("1")
        self.files = WatchedFiles([path], self.read, clock=self.clock)

    def read(self) -> int:
        self.num_reads += 1
        try:
            return int(self.path.read_text())
        except (OSError, ValueError):
            raise PagewireError(f"{self.path}: no number") from None

    def a_second_later(self) -> int:
        self.clock.now_s += 1
        return self.files.current()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "number")


def test_what_changed_is_read_anew_and_what_did_not_is_not(watched: Watched) -> None:
    assert watched.a_second_later() == 1
    assert watched.num_reads == 1
    watched.path.write_text("22")
    assert watched.a_second_later() == 22
    assert watched.a_second_later() == 22
    assert watched.num_reads == 2


def test_nobody_looks_twice_in_a_second(watched: Watched) -> None:
    watched.path.write_text("22")
    watched.clock.now_s = 0.9

    assert watched.files.current() == 1


def test_a_change_that_cannot_be_used_is_logged_once_and_changes_nothing(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    for broken in ("nonsense", None):
        watched.path.write_text(broken) if broken else watched.path.unlink()
        assert [watched.a_second_later() for _ in range(3)] == [1, 1, 1]
    watched.path.write_text("333")
    assert watched.a_second_later() == 333

    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told == [f"{watched.path}: no number; what was read before stays in force"] * 2


def test_a_file_that_is_swapped_behind_a_link_is_seen(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    link, clock = tmp_path / "link", Clock()
    link.symlink_to("a")
    files = WatchedFiles([link], link.read_text, clock=clock)
    link.unlink()
    link.symlink_to("b")
    clock.now_s = 1.0

    assert files.current() == "2"


def test_a_mounted_file_whose_place_another_took_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Docker mounts secrets, each by itself: who was taken out of the other file would go on being let in."""
    file, clock = tmp_path / "keys", Clock()
    file.write_text("1")
    with file.open() as mounted:
        path = Path(f"/proc/self/fd/{mounted.fileno()}")  # found by its path, wherever its folder has gone
        files = WatchedFiles([path], path.read_text, clock=clock)
        (tmp_path / "new").write_text("2")
        (tmp_path / "new").replace(file)
        clock.now_s = 1.0

        assert files.current() == "1"
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told.startswith(f"{path}: outside of this container another file") and "cat NEW > FILE" in told


def test_what_cannot_be_used_at_first_is_the_makers_to_hear(tmp_path: Path) -> None:
    def read() -> int:
        raise PagewireError("no number")

    with pytest.raises(PagewireError, match="no number"):
        WatchedFiles([tmp_path / "number"], read)
