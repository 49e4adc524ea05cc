"""Everything beside everything: in any crowd, after any disturbance, a stream is its undisturbed run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from protos import inference_pb2 as pb
from tests.faults import mutations
from tests.faults.combinations import CONTROLS, NOT_DRAWN, DrawnStory, check, stories
from tests.faults.planting import Mutation, Patch, planted


def test_whatever_is_asked_together_a_disturbed_stream_is_the_undisturbed_one() -> None:
    happened: Counter[str] = Counter()

    @settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(stories)
    def play(drawn: DrawnStory) -> None:
        happened.update(check(drawn))

    play()

    assert happened["tokens"] > 1000, "a proof in which nothing happens proves nothing"
    assert happened["preemptions"] > 20
    assert happened["deaths"] > 8
    assert happened["moved"] > 8
    assert happened["resumed"] > 50
    assert happened["attached"] > 3
    assert happened["rows_unready"] > 50
    assert happened["drafted_tokens"] > 50
    assert happened["accepted_tokens"] > 0
    assert happened["refused"] < 10


@pytest.mark.parametrize(
    "bug",
    [mutations.a_moved_sequence_draws_other_random_numbers, mutations.a_moved_sequence_counts_its_output_as_prompt],
)
def test_a_bug_is_seen(bug: Callable[[Patch], None]) -> None:
    @settings(
        max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.generate],
    )  # fmt: skip
    @given(stories)
    def play(drawn: DrawnStory) -> None:
        check(drawn)

    with planted(Mutation(bug)), pytest.raises(AssertionError):
        play()


def test_every_field_of_a_request_is_drawn_beside_the_others() -> None:
    """A new one is added to CONTROLS, or to NOT_DRAWN with the reason."""
    messages = (pb.GenerateStreamRequest, pb.SamplingParams, pb.StopConditions)
    fields = {name for message in messages for name in message.DESCRIPTOR.fields_by_name}

    assert fields - set(NOT_DRAWN) == set(CONTROLS)
