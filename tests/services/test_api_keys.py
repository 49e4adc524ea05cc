"""Keys and the operator's file of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.tenant import TenantLimits
from common.types import Priority
from services.api_keys import KeyFileError, line_of, new_key, read_api_keys
from services.caller import Caller


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_key_is_found_with_its_tenant_and_weight(tmp_path: Path) -> None:
    acme, other, second = new_key(), new_key(), new_key()
    lines = ["# who may call", line_of("acme", acme, weight=2.5), "", line_of("other", other) + "  # comment"]
    keys = read_api_keys(written(tmp_path / "keys", *lines, line_of("acme", second, weight=2.5)))

    assert len(keys) == 3
    assert keys.find(acme) == keys.find(second) == Caller(tenant="acme", weight=2.5)
    assert keys.find(other) == Caller(tenant="other")


def test_a_line_says_what_its_tenant_may_have_and_what_it_does_not_say_is_as_for_all(tmp_path: Path) -> None:
    defaults = TenantLimits(tokens_per_s=100, burst_tokens=500)
    acme = line_of("acme", new_key(), weight=2) + " tokens_per_s=2.5e3 max_priority=normal"
    free = line_of("free", new_key()) + " tokens_per_s=0 burst_tokens=7"
    keys = read_api_keys(written(tmp_path / "keys", acme, free, line_of("other", new_key())), defaults)

    assert keys.limits_of("acme") == TenantLimits(
        weight=2, tokens_per_s=2500, burst_tokens=500, max_priority=Priority.NORMAL
    )
    assert keys.limits_of("free") == TenantLimits(burst_tokens=7)
    assert keys.limits_of("other") == defaults
    assert keys.limits_of("nobody") is None


def test_no_other_text_is_a_key(tmp_path: Path) -> None:
    key = new_key()
    line = line_of("acme", key)
    keys = read_api_keys(written(tmp_path / "keys", line))
    digest = line.split()[1]

    for wrong in ("", "acme", new_key(), key[:-1], key + "A", key.swapcase(), f" {key}", digest, digest[8:], "é" * 46):
        assert keys.find(wrong) is None, wrong


def test_the_file_does_not_hold_the_key(tmp_path: Path) -> None:
    key = new_key()
    line = line_of("acme", key)

    assert re.fullmatch(r"acme blake2b:[0-9a-f]{64}", line)
    assert key[3:] not in line


def test_two_keys_are_never_the_same() -> None:
    assert len({new_key() for _ in range(1000)}) == 1000


def test_a_file_without_a_key_lets_nobody_in(tmp_path: Path) -> None:
    assert read_api_keys(written(tmp_path / "keys", "# nobody")).find(new_key()) is None


HASH = "blake2b:" + "0" * 64


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["acme"], "line 1: after acme a hash is needed"),
        (["acme sha256:abc"], "line 1: after acme a hash is needed"),
        (["", "a/b " + HASH], "line 2: a tenant is 1 to 64 letters"),
        ([".a " + HASH], "line 1: a tenant is 1 to 64 letters"),
        *(
            ([f"acme {HASH} {option}"], "line 1: after the hash only weight=NUMBER (over 0), tokens_per_s=NUMBER")
            for option in (
                "weight=0",
                "weight=nan",
                "heavy",
                "tokens_per_s=-1",
                "max_priority=best",
                "max_priority",
                "=1",
            )
        ),
        ([f"acme {HASH}", f"other {HASH}"], "line 2: the key of other is there already"),
        (
            [line_of("acme", new_key(), weight=2), line_of("acme", new_key())],
            "line 2: acme has other options in a line above",
        ),
    ],
)
def test_a_line_that_says_nothing_is_refused_by_its_number(lines: list[str], problem: str, tmp_path: Path) -> None:
    path = written(tmp_path / "keys", *lines)
    with pytest.raises(KeyFileError) as refused:
        read_api_keys(path)

    assert str(refused.value).startswith(f"{path}, {problem}")


@pytest.mark.parametrize("line", ["{key}", "acme {key}", "{key} " + HASH, "acme " + HASH + " {key}"])
def test_a_key_that_stands_in_the_file_itself_is_refused_and_not_repeated(line: str, tmp_path: Path) -> None:
    key = new_key()
    with pytest.raises(KeyFileError) as refused:
        read_api_keys(written(tmp_path / "keys", line.format(key=key)))

    assert key[3:] not in str(refused.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"No such file or directory. Make a key: pagewire api-key TENANT >> "):
        read_api_keys(tmp_path / "keys")
