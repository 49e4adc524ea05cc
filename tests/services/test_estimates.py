"""Rates, lengths and buckets, in numbers and given time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.estimates import AnswerLengths, AnswerPace, DrainRate, TokenBucket

S = 1_000_000_000


def test_nothing_is_known_of_a_line_that_was_never_long() -> None:
    rate = DrainRate()
    for second in range(100):
        rate.observe(second * S, 1000 * second, waiting=False)
    assert rate.tokens_per_s is None


def test_the_rate_is_that_of_the_time_in_which_somebody_waited() -> None:
    rate = DrainRate()
    for second in range(5):
        rate.observe(second * S, 300 * second, waiting=True)
    assert rate.tokens_per_s == pytest.approx(300)
    rate.observe(5 * S, 10_000, waiting=False)
    rate.observe(500 * S, 20_000, waiting=True)
    assert rate.tokens_per_s == pytest.approx(300), "idle time says nothing, nor what was taken in it"


def test_the_rate_follows_what_is_seen() -> None:
    rate = DrainRate(half_life_s=5.0)
    tokens = 0
    for second in range(60):
        rate.observe(second * S, tokens, waiting=True)
        tokens += 300
    for second in range(60, 80):
        rate.observe(second * S, tokens, waiting=True)
        tokens += 30
    known = rate.tokens_per_s
    assert known is not None and 30 < known < 60


def test_a_line_that_does_not_move_has_no_rate() -> None:
    rate = DrainRate()
    for second in range(5):
        rate.observe(second * S, 70, waiting=True)
    assert rate.tokens_per_s is None


def test_an_answer_is_expected_to_be_as_long_as_it_may_be_until_some_have_ended() -> None:
    lengths = AnswerLengths()
    for _ in range(19):
        lengths.add(10)
    assert lengths.expect(500) == 500
    lengths.add(10)
    assert lengths.expect(500) == 15
    assert lengths.expect(4) == 4


def test_one_long_answer_of_a_hundred_does_not_count_and_ten_do() -> None:
    lengths = AnswerLengths()
    for i in range(100):
        lengths.add(400 if i == 50 else 10)
    assert lengths.expect(1000) == 15
    for _ in range(10):
        lengths.add(400)
    assert lengths.expect(1000) == 511


def test_old_answers_are_forgotten() -> None:
    lengths = AnswerLengths()
    for _ in range(5000):
        lengths.add(4000)
    for _ in range(20_000):
        lengths.add(10)
    assert lengths.expect(10_000) == 15


@given(answers=st.lists(st.integers(1, 100_000), min_size=20, max_size=200))
def test_95_of_100_are_never_longer_than_expected_nor_is_that_twice_too_much(answers: list[int]) -> None:
    lengths = AnswerLengths()
    for answer in answers:
        lengths.add(answer)
    expected = lengths.expect(1 << 40)
    assert sum(answer > expected for answer in answers) <= 0.05 * len(answers)
    p95 = sorted(answers)[len(answers) - 1 - int(0.05 * len(answers))]
    assert expected < 2 * p95


def test_a_bucket_gives_its_burst_at_once_and_its_rate_after_that() -> None:
    bucket = TokenBucket(tokens_per_s=10, burst_tokens=50, now_ns=0)
    assert bucket.wait_s(50, 0) == 0
    bucket.take(50, 0)
    assert bucket.wait_s(20, 0) == 2.0
    assert bucket.wait_s(20, 2 * S) == 0
    assert bucket.wait_s(50, 100 * S) == 0
    bucket.take(50, 100 * S)
    assert bucket.wait_s(1, 100 * S) > 0, "it never holds more than its burst"


def test_what_costs_more_than_the_burst_may_go_when_it_is_full_and_is_paid_for_afterwards() -> None:
    bucket = TokenBucket(tokens_per_s=10, burst_tokens=50, now_ns=0)
    bucket.take(10, 0)
    assert bucket.wait_s(200, 0) == 1.0
    bucket.take(200, 1 * S)
    assert bucket.wait_s(10, 1 * S) == 16.0


def test_what_is_given_back_may_be_taken_again() -> None:
    bucket = TokenBucket(tokens_per_s=10, burst_tokens=50, now_ns=0)
    bucket.take(50, 0)
    bucket.take(-30, 0)
    assert bucket.wait_s(30, 0) == 0
    assert bucket.wait_s(31, 0) > 0


@given(events=st.lists(st.tuples(st.integers(0, 5 * S), st.integers(1, 300)), max_size=50))
def test_nobody_is_ever_given_more_than_burst_and_rate_and_one_request(events: list[tuple[int, int]]) -> None:
    bucket = TokenBucket(tokens_per_s=100, burst_tokens=200, now_ns=0)
    now = taken = 0
    for pause, tokens in events:
        now += pause
        if not bucket.wait_s(tokens, now):
            bucket.take(tokens, now)
            taken += tokens
        assert taken <= 200 + 100 * now / S + 300


def test_the_pace_of_answers_is_that_of_the_last_ones() -> None:
    pace = AnswerPace()
    assert pace.seconds_for(100) == 0.0
    pace.add(100, 2 * S)
    assert pace.seconds_for(50) == 1.0
    for _ in range(1000):
        pace.add(10, S)
    assert pace.seconds_for(50) == pytest.approx(5.0, rel=1e-3)
