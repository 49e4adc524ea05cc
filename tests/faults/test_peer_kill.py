"""How the fate of another server's stream is told."""

from __future__ import annotations

import pytest

from tests.faults.peer_kill import Fate, Heard, Known

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
