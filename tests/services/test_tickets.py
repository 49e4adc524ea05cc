"""A ticket is good for one request, one choice and the very tokens it was given with, and for nothing else."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.determinism import determinism_class
from common.errors import PagewireError, TicketRefused, TicketStale
from common.sampling import SamplingParams
from services import ticket_keys
from services.lifecycle import StartupError
from services.request import GenerateSpec, Text
from services.ticket_keys import new_key
from services.tickets import TICKET_BYTES, Scope, TicketKey, Tickets, scope

NOW_S = 1_700_000_000.5
OLD, NEW = TicketKey(id="old", secret=b"o" * 32), TicketKey(id="new", secret=b"n" * 32)
CLASS = determinism_class("a", "b")
SPEC = GenerateSpec(
    request_id="r",
    model="",
    input=Text(text="not looked at: the prompt's tokens are"),
    sampling=SamplingParams(seed=7),
    n=2,
    max_tokens=9,
    stop_token_ids=(3,),
    stop_strings=("end",),
    ignore_eos=False,
    skip_special_tokens=True,
)
PROMPT = [5, 6, 7]
TICKETS = Tickets([NEW, OLD], lifetime_s=100)
SENT = [11, 12, 13]


def scope_of(spec: GenerateSpec = SPEC, *, tenant: str = "t", prompt: list[int] = PROMPT, model: str = "m") -> Scope:
    return scope(tenant, spec.request_id, spec, prompt, model)


def ticket(tokens: list[int] = SENT, *, choice: int = 1, tickets: Tickets = TICKETS, computed_by: str = CLASS) -> bytes:
    return tickets.writer(scope_of(), choice, tokens).ticket(tickets.expiry(NOW_S), computed_by)


def check(ticket: bytes, tokens: list[int] = SENT, *, now_s: float = NOW_S, choice: int = 1, **changes: object) -> str:
    return TICKETS.check(ticket, scope_of(**changes), choice, tokens, now_s)  # type: ignore[arg-type]


def test_a_ticket_is_good_with_the_tokens_it_was_given_for_and_tells_who_computed_them() -> None:
    assert check(ticket()) == CLASS
    assert check(ticket(computed_by="")) == ""


def test_a_ticket_is_the_same_however_the_tokens_were_cut_into_messages() -> None:
    writer = TICKETS.writer(scope_of(), 1)
    for tokens in ([11], [], [12, 13]):
        writer.add(tokens)

    assert writer.ticket(TICKETS.expiry(NOW_S), CLASS) == ticket()


def test_before_the_first_token_one_ticket_serves_every_choice() -> None:
    first = ticket([], choice=0, computed_by="")

    assert check(first, [], choice=0) == check(first, [], choice=1) == ""
    with pytest.raises(TicketRefused):
        check(first, [11], choice=0)


@given(st.integers(0, TICKET_BYTES * 8 - 1))
def test_any_bit_that_is_flipped_makes_it_worthless(bit: int) -> None:
    forged = bytearray(ticket())
    forged[bit // 8] ^= 1 << bit % 8

    with pytest.raises((TicketRefused, TicketStale)):  # stale where the bit says that the model is another one
        check(bytes(forged))


@pytest.mark.parametrize("length", [0, 1, TICKET_BYTES - 1, TICKET_BYTES + 1, 1000])
def test_what_has_another_length_is_no_ticket(length: int) -> None:
    with pytest.raises(TicketRefused):
        check((ticket() * 20)[:length])


@given(st.lists(st.integers(0, 20), max_size=5))
def test_no_other_tokens_go_with_it(tokens: list[int]) -> None:
    if tokens != SENT:
        with pytest.raises(TicketRefused):
            check(ticket(), tokens)


def test_no_other_choice_goes_with_it() -> None:
    with pytest.raises(TicketRefused):
        check(ticket(), choice=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "u"},
        {"prompt": [5, 6, 8]},
        {"prompt": [5, 6, 7, 11]},
        {"spec": replace(SPEC, request_id="s")},
        {"spec": replace(SPEC, sampling=replace(SPEC.sampling, seed=8))},
        {"spec": replace(SPEC, sampling=replace(SPEC.sampling, temperature=0.0))},
        {"spec": replace(SPEC, sampling=replace(SPEC.sampling, top_k=1))},
        {"spec": replace(SPEC, sampling=replace(SPEC.sampling, top_p=0.5))},
        {"spec": replace(SPEC, sampling=replace(SPEC.sampling, min_p=0.5))},
        {"spec": replace(SPEC, sampling=replace(SPEC.sampling, logit_bias=((3, 0.5),)))},
        {"spec": replace(SPEC, sampling=replace(SPEC.sampling, banned_token_ids=(3,)))},
        {"spec": replace(SPEC, bad_words=("x",))},
        {"spec": replace(SPEC, min_tokens=1)},
        {"spec": replace(SPEC, include_stop=True)},
        {"spec": replace(SPEC, n=3)},
        {"spec": replace(SPEC, max_tokens=10)},
        {"spec": replace(SPEC, stop_token_ids=())},
        {"spec": replace(SPEC, stop_token_ids=(3, 4))},
        {"spec": replace(SPEC, stop_strings=("end", "s"))},
        {"spec": replace(SPEC, stop_strings=("ends",))},
        {"spec": replace(SPEC, ignore_eos=True)},
        {"spec": replace(SPEC, skip_special_tokens=False)},
    ],
    ids=str,
)
def test_no_other_request_goes_with_it(changes: dict[str, object]) -> None:
    with pytest.raises(TicketRefused, match="does not belong to this request, choice and tokens"):
        check(ticket(), **changes)  # type: ignore[arg-type]


def test_tenant_and_id_cannot_be_moved_into_each_other() -> None:
    one = scope("ab", "c", SPEC, PROMPT, "m")
    other = scope("a", "bc", SPEC, PROMPT, "m")

    assert one != other


def test_another_models_ticket_is_stale_and_not_refused() -> None:
    with pytest.raises(TicketStale, match="another model"):
        check(ticket(), model="n")


def test_a_ticket_ends() -> None:
    assert check(ticket(), now_s=NOW_S + 99) == CLASS
    with pytest.raises(TicketStale, match="expired"):
        check(ticket(), now_s=NOW_S + 100)


def test_an_expired_ticket_that_was_forged_tells_no_more_than_any_forged_one() -> None:
    with pytest.raises(TicketRefused):
        check(ticket(), [11, 12, 14], now_s=NOW_S + 1000)


def test_the_newest_key_signs_and_the_older_ones_still_verify() -> None:
    before = ticket(tickets=Tickets([OLD], lifetime_s=100))
    assert check(before) == CLASS

    after_the_rotation = Tickets([NEW], lifetime_s=100)
    assert after_the_rotation.check(ticket(), scope_of(), 1, SENT, NOW_S) == CLASS
    with pytest.raises(TicketRefused, match="a key that this server does not have"):
        after_the_rotation.check(before, scope_of(), 1, SENT, NOW_S)


def test_a_key_does_not_show_when_it_is_printed() -> None:
    assert "nnn" not in repr(NEW)
    assert NEW.secret.hex() not in repr(NEW)


# ---- the file


def test_a_file_of_keys_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "home" / "ticket-keys"
    (key,) = ticket_keys.read_or_make(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ticket_keys.read_or_make(path) == [key]
    assert list(path.parent.iterdir()) == [path], "nothing else is left behind"


def test_two_schedulers_that_start_at_once_have_the_same_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ticket-keys"
    missing = iter([False])  # the second one looks before the first has written
    (first,) = ticket_keys.read_or_make(path)
    monkeypatch.setattr(Path, "exists", lambda self: next(missing, True))

    assert ticket_keys.read_or_make(path) == [first]


def test_rotation_keeps_the_key_that_signed_until_now(tmp_path: Path) -> None:
    path = tmp_path / "ticket-keys"
    first, second, third = (ticket_keys.rotate(path) for _ in range(3))

    assert ticket_keys.read(path) == [third, second]
    assert first not in ticket_keys.read(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_a_file_that_others_may_read_or_write_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "ticket-keys"
    ticket_keys.read_or_make(path)
    path.chmod(mode)

    with pytest.raises(StartupError, match="chmod 600"):
        ticket_keys.read_or_make(path)


def test_another_users_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ticket-keys"
    ticket_keys.read_or_make(path)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:  # what root wrote may be had by anyone, but not if it can be changed
        path.chmod(0o622)

    with pytest.raises(StartupError, match="another user could change this file"):
        ticket_keys.read(path)


@pytest.mark.parametrize(
    "text", ["", "\n", "key", "a:zz", "a:" + "0" * 62, ":" + "0" * 64, "toolongid:" + "0" * 64, "a b:" + "0" * 64]
)
def test_a_file_without_a_good_key_is_refused_and_its_content_is_not_shown(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ticket-keys"
    path.write_text(text)
    path.chmod(0o600)

    with pytest.raises(StartupError, match="pagewire key") as refusal:
        ticket_keys.read(path)
    assert "000" not in str(refusal.value)


def test_a_written_key_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "ticket-keys"
    keys = [new_key(), new_key()]
    path.write_text("\n".join(map(ticket_keys.line_of, keys)))
    path.chmod(0o600)

    assert ticket_keys.read(path) == keys


def test_every_error_is_one_that_has_a_status() -> None:
    assert all(issubclass(kind, PagewireError) for kind in (TicketRefused, TicketStale, StartupError))
