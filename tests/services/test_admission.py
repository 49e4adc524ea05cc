"""Who is taken and who is refused: numbers in, a refusal with a time to come back out."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequest, Overloaded
from common.tenant import TenantLimits
from common.types import Priority
from scheduler.line import Standing
from services.admission import Admission, AdmissionLimits, Ask

S = 1_000_000_000
EMPTY = Standing(num_waiting=0, num_tokens=0, own_waiting=0, own_tokens=0, own_resumed=0, tokens_before=0)


def ask(
    prompt: int = 10, output: int = 10, *, tenant: str = "", choices: int = 1, deadline_s: float = 0, **fields: Priority
) -> Ask:
    priority = fields.get("priority", Priority.NORMAL)
    return Ask(
        tenant=tenant,
        priority=priority,
        prompt_tokens=prompt,
        max_tokens=output,
        choices=choices,
        deadline_ns=int(deadline_s * S),
    )


def admission(
    tenants: dict[str, TenantLimits] | None = None, *, default: TenantLimits | None = None, **limits: float
) -> Admission:
    """One that does not spread its refusals."""
    return Admission(AdmissionLimits(**limits), tenants=(tenants or {}).get, default=default, jitter=lambda: 1.0)  # type: ignore[arg-type]


def refused(doorman: Admission, request: Ask, line: Standing = EMPTY, now_s: float = 0) -> tuple[str, float]:
    """The limit that the request met, and the seconds after which it may come back."""
    before = doorman.refusals.copy()
    with pytest.raises(Overloaded) as refusal:
        doorman.check(request, line, int(now_s * S))
    (limit,) = doorman.refusals - before
    return limit, round(refusal.value.retry_after_s, 6)


def moving(doorman: Admission, tokens_per_s: int) -> Admission:
    """It has seen the line move for two seconds."""
    for second in range(3):
        doorman.rate.observe(second * S, tokens_per_s * second, waiting=True)
    return doorman


def test_an_empty_line_takes_whatever_fits_into_an_executor() -> None:
    admission(max_waiting_tokens=100).check(ask(5000, 5000), EMPTY, 0)


def test_a_line_full_of_sequences_refuses_one_more() -> None:
    line = replace(EMPTY, num_waiting=9, num_tokens=900)
    doorman = moving(admission(max_waiting=10), 50)
    doorman.check(ask(choices=1), line, 0)
    assert refused(doorman, ask(choices=3), line) == ("waiting_sequences", 4.0), "two of 100 tokens must go first"


def test_a_line_full_of_tokens_refuses_what_does_not_fit() -> None:
    line = replace(EMPTY, num_waiting=9, num_tokens=900)
    doorman = moving(admission(max_waiting_tokens=1000), 50)
    doorman.check(ask(50, 50), line, 0)
    assert refused(doorman, ask(50, 150), line) == ("waiting_tokens", 2.0)


def test_every_choice_costs_an_answer_and_the_prompt_counts_once() -> None:
    line = replace(EMPTY, num_waiting=1, num_tokens=10)
    doorman = admission(max_waiting_tokens=10 + 40 + 3 * 20)
    doorman.check(ask(40, 20, choices=3), line, 0)
    assert refused(doorman, ask(41, 20, choices=3), line)[0] == "waiting_tokens"


def test_while_it_is_unknown_how_fast_the_line_moves_a_second_is_named() -> None:
    line = replace(EMPTY, num_waiting=10, num_tokens=900)
    assert refused(admission(max_waiting=10), ask(), line) == ("waiting_sequences", 1.0)


def test_a_tenant_may_have_as_much_waiting_as_is_still_free() -> None:
    doorman = admission(max_waiting_tokens=1000)
    alone = replace(EMPTY, num_waiting=5, num_tokens=460, own_waiting=5, own_tokens=460)
    doorman.check(ask(tenant="a", prompt=70), alone, 0)
    assert refused(doorman, ask(tenant="a", prompt=71), alone)[0] == "tenant_share"
    doorman.check(ask(tenant="b", prompt=71), replace(alone, own_waiting=0, own_tokens=0), 0)
    doorman.check(ask(tenant="", prompt=71), alone, 0)


def test_nor_may_it_fill_the_line_with_small_sequences() -> None:
    doorman = admission(max_waiting=100)
    alone = replace(EMPTY, num_waiting=50, num_tokens=50, own_waiting=50, own_tokens=50)
    assert refused(doorman, ask(tenant="a"), alone)[0] == "tenant_share"
    doorman.check(ask(tenant="b"), replace(alone, own_waiting=0, own_tokens=0), 0)


@pytest.mark.parametrize(
    ("line", "asked", "problem"),
    [
        (
            replace(EMPTY, num_waiting=77, num_tokens=77, own_waiting=1, own_tokens=1),
            ask(tenant="a", choices=50),
            "waiting_sequences: there is no room for 50 more; 100 may wait in all (--max-waiting)",
        ),
        (
            replace(EMPTY, num_waiting=77, num_tokens=77, own_waiting=1, own_tokens=1),
            ask(tenant="a", choices=23),
            "tenant_share: 1 of your sequences waits already; 100 may wait in all (--max-waiting), others",
        ),
        (
            replace(EMPTY, num_waiting=7, num_tokens=777, own_waiting=2, own_tokens=10),
            ask(250, 50, tenant="a"),
            "waiting_tokens: there is no room for 300 tokens more; 1000 may wait in all (--max-waiting-tokens)",
        ),
        (
            replace(EMPTY, num_waiting=7, num_tokens=777, own_waiting=2, own_tokens=100),
            ask(150, 50, tenant="a"),
            "tenant_share: 100 of your tokens wait already, and this needs 200; 1000 may wait in all (--max-waiting-t",
        ),
    ],
)
def test_a_refusal_says_which_limit_it_met_its_number_and_its_flag_and_nothing_of_others(
    line: Standing, asked: Ask, problem: str
) -> None:
    with pytest.raises(Overloaded) as refusal:
        admission(max_waiting=100, max_waiting_tokens=1000).check(asked, line, 0)
    assert str(refusal.value).startswith(problem)
    assert "77" not in str(refusal.value), "what others have waiting"


@pytest.mark.parametrize("num_tenants", [1, 2, 4])
def test_tenants_that_send_without_end_share_the_line_and_leave_as_much_to_a_newcomer(num_tenants: int) -> None:
    doorman, most = admission(max_waiting_tokens=10_000), 10_000
    own = [0] * num_tenants
    line = EMPTY
    for i in range(3000):
        for tenant in range(num_tenants):
            line = replace(
                EMPTY, num_waiting=1, num_tokens=sum(own), own_waiting=own[tenant] // 10, own_tokens=own[tenant]
            )
            with contextlib.suppress(Overloaded):
                doorman.check(ask(5, 5, tenant=f"t{tenant}"), line, 0)
                own[tenant] += 10
        doorman.check(ask(5, 5, tenant="newcomer"), replace(line, own_waiting=0, own_tokens=0), 0)
        if i % 3 == 0:  # one of each is served
            own = [max(0, tokens - 10) for tokens in own]
    assert own == pytest.approx([most / (num_tenants + 1)] * num_tenants, rel=0.02)


def test_a_tenants_rate_is_kept_and_others_do_not_notice() -> None:
    doorman = admission({"a": TenantLimits(tokens_per_s=10, burst_tokens=40)})
    for _ in range(2):
        doorman.check(ask(tenant="a"), EMPTY, 0)
        doorman.take(ask(tenant="a"), 0)
    assert refused(doorman, ask(tenant="a")) == ("tenant_rate", 2.0)
    doorman.check(ask(tenant="b"), EMPTY, 0)
    doorman.check(ask(tenant="a"), EMPTY, 2 * S)


def test_without_a_burst_a_tenant_has_ten_seconds_of_its_rate() -> None:
    doorman = admission(default=TenantLimits(tokens_per_s=10))
    doorman.take(ask(50, 50), 0)
    assert refused(doorman, ask(50, 50)) == ("tenant_rate", 10.0)


def test_a_tenant_pays_for_what_it_got_and_not_for_what_was_expected() -> None:
    doorman = admission({"a": TenantLimits(tokens_per_s=1, burst_tokens=100)})
    doorman.take(ask(20, 80, tenant="a"), 0)
    assert refused(doorman, ask(20, 10, tenant="a"))[0] == "tenant_rate"
    doorman.settle("a", expected=100, used=25, num_output=5, now_ns=0)
    doorman.check(ask(20, 55, tenant="a"), EMPTY, 0)
    assert refused(doorman, ask(20, 56, tenant="a")) == ("tenant_rate", 1.0)


def test_an_answer_is_expected_by_those_that_the_tenant_had() -> None:
    doorman = admission()
    for _ in range(30):
        doorman.settle("a", expected=0, used=0, num_output=12, now_ns=0)
    assert doorman.expected_output(ask(output=500, tenant="a")) == 15
    assert doorman.expected_output(ask(output=8, tenant="a")) == 8
    assert doorman.expected_output(ask(output=500, tenant="b")) == 500


def test_who_would_not_have_its_answer_in_time_is_refused_now() -> None:
    doorman = moving(admission(), 100)
    doorman.pace.add(100, 20 * S)  # so 10 tokens take 2 s
    line = replace(EMPTY, num_waiting=5, num_tokens=9000, tokens_before=900)
    doorman.check(ask(deadline_s=26), line, 10 * S)  # half as long again as it would wait, and the answer
    assert refused(doorman, ask(deadline_s=24.5), line, now_s=10) == ("predicted_wait", 0.666667)
    assert refused(doorman, ask(deadline_s=15), line, now_s=10) == ("predicted_wait", 7.0)
    doorman.check(ask(), line, 10 * S)


def test_nobody_is_refused_for_an_answer_that_takes_long_while_nobody_waits() -> None:
    doorman = moving(admission(), 100)
    doorman.pace.add(1, 3600 * S)
    doorman.check(ask(deadline_s=11), EMPTY, 10 * S)


def test_nobody_is_taken_on_who_would_wait_longer_than_the_server_promises() -> None:
    doorman = moving(admission(max_ttft_s=5), 100)
    assert refused(doorman, ask(deadline_s=100), replace(EMPTY, tokens_before=700)) == ("predicted_wait", 2.0)
    doorman.check(ask(), replace(EMPTY, tokens_before=490), 0)


def test_nobody_is_refused_by_a_rate_that_is_not_known() -> None:
    admission(max_ttft_s=0.1).check(ask(deadline_s=0.1), replace(EMPTY, tokens_before=100_000), 0)


def test_a_priority_above_a_tenants_best_is_its_mistake() -> None:
    doorman = admission({"a": TenantLimits(max_priority=Priority.NORMAL)})
    doorman.check(ask(tenant="a", priority=Priority.LOW), EMPTY, 0)
    with pytest.raises(InvalidRequest, match="priority: normal is the best"):
        doorman.check(ask(tenant="a", priority=Priority.HIGH), EMPTY, 0)
    doorman.check(ask(tenant="b", priority=Priority.HIGH), EMPTY, 0)


def test_one_call_too_many_is_refused_until_one_ends() -> None:
    doorman = admission(max_calls=1)
    with doorman.open_call():
        with pytest.raises(Overloaded, match="calls: 1 may be open"), doorman.open_call():
            pass
        assert doorman.refusals == {"calls": 1}
    with doorman.open_call():
        pass


def test_those_who_are_refused_together_do_not_come_back_together() -> None:
    doorman = Admission(AdmissionLimits(max_waiting=1))
    waits = {refused(doorman, ask(), replace(EMPTY, num_waiting=1, num_tokens=20))[1] for _ in range(50)}
    assert len(waits) > 25
    assert all(0.8 <= wait <= 1.2 for wait in waits)


@given(rate=st.integers(1, 10**7), waiting=st.integers(1, 10**7))
def test_nobody_is_sent_away_for_nothing_or_for_ever(rate: int, waiting: int) -> None:
    doorman = moving(admission(max_waiting_tokens=1), rate)
    wait = refused(doorman, ask(), replace(EMPTY, num_waiting=1, num_tokens=waiting))[1]
    assert 0.05 <= wait <= 60


def test_what_is_resumed_is_not_refused_for_what_others_wait_for_nor_for_what_its_tenant_asked_since() -> None:
    doorman = moving(admission(default=TenantLimits(tokens_per_s=1, max_priority=Priority.NORMAL), max_waiting=2), 1)
    doorman.take(ask(500, 500, tenant="a"), 0)
    line = Standing(
        num_waiting=2, num_tokens=10_000, own_waiting=2, own_tokens=10_000, own_resumed=1, tokens_before=10_000
    )
    resumed = replace(ask(tenant="a", deadline_s=1), resumed=True)
    doorman.check(resumed, line, 0)
    assert refused(doorman, resumed, replace(line, own_resumed=2)) == ("waiting_sequences", 1.0)


def test_what_is_resumed_is_paid_for_as_it_is_made() -> None:
    doorman = admission({"a": TenantLimits(tokens_per_s=1, burst_tokens=10)})
    doorman.take(replace(ask(500, 500, tenant="a"), resumed=True), 0)
    doorman.check(ask(5, 5, tenant="a"), EMPTY, 0)
    doorman.settle("a", expected=0, used=4, num_output=400, now_ns=0)
    assert refused(doorman, ask(5, 5, tenant="a")) == ("tenant_rate", 4.0)


def test_a_limit_that_changes_counts_from_then_on() -> None:
    limits = {"a": TenantLimits(tokens_per_s=10, burst_tokens=40)}
    doorman = admission(limits)
    doorman.take(ask(20, 20, tenant="a"), 0)
    assert refused(doorman, ask(tenant="a")) == ("tenant_rate", 2.0)
    del limits["a"]
    doorman.check(ask(tenant="a"), EMPTY, 0)
    limits["a"] = TenantLimits(tokens_per_s=5, burst_tokens=20)
    doorman.take(ask(tenant="a"), 0)
    assert refused(doorman, ask(tenant="a")) == ("tenant_rate", 4.0)
