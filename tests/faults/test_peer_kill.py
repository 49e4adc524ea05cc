"""How the fate of another server's stream is told, and the run itself, on a server that is none."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from tests.benchmarks import machine
from tests.benchmarks.engines import Engine
from tests.faults import peer_kill
from tests.faults.peer_kill import Fate, Heard, Known, PeerRun, main

KNOWN = Known([1, 2, 3], list(range(100, 140)), "a text")
WHOLE = list(KNOWN.tokens)


@pytest.mark.parametrize(
    ("tokens", "changes", "fate"),
    [
        (WHOLE, {}, "whole"),
        (WHOLE, {"text": "another text"}, "changed"),
        (WHOLE[:20], {"problem": "ClientPayloadError"}, "lost"),
        ([], {"was_begun": False, "problem": "ClientConnectorError"}, "refused"),
        (WHOLE[:20], {"finish": ""}, "without an end"),
        (WHOLE[:20], {}, "without an end"),
        (WHOLE[:20] + WHOLE[25:], {}, "gapped"),
        (WHOLE[:20] + WHOLE[15:], {}, "repeated"),
        (WHOLE[:20] + [7] * 20, {}, "changed"),
        ([*WHOLE[:39], 7], {}, "changed"),
    ],
)
def test_a_stream_has_one_fate(tokens: list[int], changes: dict[str, object], fate: Fate) -> None:
    heard = Heard(tokens=tokens, text="a text", finish="length", was_begun=True)
    for name, value in changes.items():
        setattr(heard, name, value)

    assert heard.fate(KNOWN) == fate


FAKE = Engine(
    name="fake",
    dialect="vllm",
    precision="none",
    command=["${PYTHON}", "-m", "tests.faults.fake_peer", "--port", "${PORT}"],
)


def lives(pid: int) -> bool:
    """Whether it is more than a number that nobody has taken back."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_server_is_struck_in_every_way_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_kill, "_FROZEN_S", 0.2)
    run = PeerRun(FAKE, tmp_path, times=1, seed=1)
    table = asyncio.run(run.play())

    fates = {name: dict(row.fates) for name, row in run._rows.items()}
    assert fates == {
        "nothing (control)": {"whole": 8},
        "engine process killed": {"lost": 8},
        "API server killed": {"lost": 8},
        "engine process stopped for 10 s": {"whole": 8},
    }
    assert (tmp_path / "table.md").read_text() == table + "\n"
    events = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] in ("start", "blow")] == [
        *("start", "blow", "start", "blow", "start", "blow")
    ]
    assert run._server is not None
    while any(lives(pid) for pid in machine.processes(run._server.pid)):
        time.sleep(0.01)


def test_a_server_whose_engine_cannot_be_found_is_told_of_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_kill, "_ENGINE", b"another name")
    with pytest.raises(ProcessLookupError, match="another name"):
        asyncio.run(PeerRun(FAKE, tmp_path, times=1, seed=1).play())


def test_what_is_missing_here_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PEERS", raising=False)

    assert main(["--peer", "vllm", "--times", "1", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("vllm-bf16: PEERS is not set\n")
