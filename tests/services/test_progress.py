"""Work that takes long shows that it goes on."""

from __future__ import annotations

import io
import sys

import pytest

from services.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_where_there_is_no_terminal_each_thing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as progress:
        for what in ("Downloading", "Unpacking"):
            for done in range(5):
                progress(what, done, 4)

    assert capsys.readouterr().err == "Downloading\nUnpacking\n"


def test_on_a_terminal_each_thing_is_a_bar_that_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    with ProgressBar() as progress:
        progress("Downloading", 1_000_000, 4_000_000)
        progress("Converting", 0, 0)

    last = terminal.getvalue()
    assert "Downloading" in last
    assert "4.0/4.0 MB" in last
    assert "Converting" in last
