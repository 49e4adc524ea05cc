"""Fuzzing in small, and that it would see what it looks for; the long run and its figures are in RESULTS.md."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ExecutorRejected, InvalidRequest
from common.sampling import RequestLimits
from protos import executor_pb2, inference_pb2
from services import codec_link, codec_public
from services.codec_link import WireError
from services.scheduler_service import SchedulerService
from tests.faults import fuzz
from tests.faults.fuzz import Draw, Session

ALL = {
    "Cancel",
    "Detokenize",
    "Embed",
    "Explain",
    "Generate",
    "GenerateStream",
    "GetModel",
    "GetStatus",
    "Link",
    "Resume",
    "Tokenize",
    "Unpin",
    "WatchState",
}
HANG_S = 60.0  # for a call on a machine that has other work; whoever looks for late ones lets it have none
EVERY = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.large_base_example]
)


def test_whatever_is_sent_ends_soon_with_a_status_that_is_declared(tmp_path: Path) -> None:
    report = asyncio.run(fuzz.run(messages=2000, seed=7, folder=tmp_path, hang_s=HANG_S))

    assert report.failures == []
    assert set(report.tallies) == ALL
    for name, tally in report.tallies.items():
        assert tally.codes["OK"] and tally.codes["INVALID_ARGUMENT"], f"{name} was not tried in earnest"


def test_so_it_does_over_real_sockets(tmp_path: Path) -> None:
    report = asyncio.run(fuzz.run_sockets(messages=500, seed=8, folder=tmp_path, hang_s=HANG_S))

    assert report.failures == []
    assert set(report.tallies) == ALL


def test_a_bug_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(field: str, ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
        table = list(range(vocab_size))
        return tuple(table[i] for i in ids)  # IndexError where an id is outside the vocabulary

    monkeypatch.setattr(codec_public, "token_ids", counts)
    report = asyncio.run(fuzz.run(messages=300, seed=7, folder=tmp_path))

    assert any("ended with INTERNAL" in failure for failure in report.failures)


def test_a_call_that_never_ends_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_for_ever(*_: Any) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(SchedulerService, "GetModel", wait_for_ever)
    monkeypatch.setattr(fuzz, "_KEPT", 1)
    report = asyncio.run(fuzz.run(messages=300, seed=7, folder=tmp_path))

    assert [failure for failure in report.failures if "GetModel: did not end within 1 s, twice" in failure]


def test_a_number_is_always_the_same_message() -> None:
    def message(number: int) -> bytes:
        draw = Draw(random.Random(number))
        return draw.data(draw.message(inference_pb2.GenerateRequest))

    assert [message(n) for n in range(50)] == [message(n) for n in range(50)]
    assert len({message(n) for n in range(50)}) > 40
    assert Session(random.Random(4), "d").say() == Session(random.Random(4), "d").say()


@EVERY
@given(st.randoms(use_true_random=False), st.sampled_from(["Generate", "GenerateStream"]))
def test_a_request_is_a_value_or_names_its_field(draw: random.Random, name: str) -> None:
    request = drawn(draw, inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name[name])
    if request is None:
        return
    try:
        spec = codec_public.request_from_pb(request, RequestLimits(), vocab_size=320)
    except InvalidRequest as error:
        problem, named = error.problem, error.field
    else:
        assert spec.request_id and 1 <= spec.n <= RequestLimits().max_choices
        return
    assert problem and named


@EVERY
@given(st.randoms(use_true_random=False))
def test_a_message_of_the_link_is_a_value_or_names_its_field(draw: random.Random) -> None:
    make = Draw(draw)
    try:
        codec_link.facts_from_pb(parsed(make, executor_pb2.Hello))
        codec_link.result_from_pb(parsed(make, executor_pb2.StepResult))
        codec_link.plan_from_pb(parsed(make, executor_pb2.StepPlan))
    except (DecodeError, ExecutorRejected):
        return
    except WireError as error:
        problem, named = error.problem, error.field
    else:
        return
    assert problem and named


def drawn(draw: random.Random, method: MethodDescriptor) -> Any:
    try:
        return parsed(Draw(draw), GetMessageClass(method.input_type))
    except DecodeError:
        return None


def parsed(make: Draw, kind: Any) -> Any:
    return kind.FromString(make.data(make.message(kind)))
