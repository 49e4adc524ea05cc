"""The Python client: what it sends, what it believes, and when it tries again. Sans socket, then over one."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.errors import (
    AlreadyRunning,
    DeadlineExceeded,
    InvalidRequest,
    ModelFolderError,
    Overloaded,
    PagewireError,
    SlowReader,
    Superseded,
    TicketRefused,
    TicketStale,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from pagewire import Client, Delta, FinishReason, PinnedPrefix, TokenLogprob, TokenLogprobs
from pagewire.access import access
from pagewire.aio import AsyncClient
from pagewire.asking import Settings, request_of
from pagewire.calls import Asked, Manner, addresses_of
from pagewire.continuation import Continuation, OutOfStep
from pagewire.embeddings import embed_request
from pagewire.failures import Failure, judge, lost
from pagewire.retrying import Attempts, RetryBudget
from protos import inference_pb2 as pb
from services.handlers import Context
from services.status import internal_status, to_rpc_status
from tests.services.scripted import GONE, delta, finish, first, played, saying

UNAVAILABLE = Failure(error=Unavailable("draining"), may_pass=True, answered=True, retry_after_s=1.0)


# ---- what is asked


def test_a_prompt_is_words_or_messages_or_tokens() -> None:
    assert request_of("hi", {}).text == "hi"
    assert list(request_of(None, {"token_ids": [1, 2]}).token_ids.ids) == [1, 2]
    (message,) = request_of(None, {"messages": [{"role": "user", "content": "hi"}]}).chat.messages
    assert (message.role, message.content) == ("user", "hi")


def test_what_is_not_given_is_not_sent() -> None:
    assert request_of("hi", {}) == pb.GenerateStreamRequest(text="hi")
    assert request_of("hi", {"temperature": 0.0}).sampling.HasField("temperature")
    assert request_of("hi", {"stop": "."}).stopping.stop == ["."]
    assert request_of("hi", {"stop": [".", "!"], "max_tokens": 3}).stopping.max_tokens == 3


def test_every_control_of_the_api_is_a_setting_of_that_name() -> None:
    parts = (pb.SamplingParams, pb.StructuredOutput, pb.StopConditions, pb.CacheControl)
    fields = {name for part in parts for name in part.DESCRIPTOR.fields_by_name} - {"structured"}  # by its parts

    assert fields <= Settings.__annotations__.keys()


def test_controls_reach_the_request() -> None:
    request = request_of(
        "hi",
        {
            "typical_p": 0.5,
            "repetition_penalty": 1.5,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.25,
            "logit_bias": {5: -100},
            "allowed_token_ids": [1, 2],
            "banned_token_ids": (3,),
            "bad_words": "no",
            "min_tokens": 2,
            "include_stop": True,
            "cache_salt": "salt",
            "no_cache": False,
            "pin_seconds": 60,
            "pin_tokens": 16,
        },
    )

    assert request.sampling == pb.SamplingParams(
        typical_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={5: -100},
        allowed_token_ids=[1, 2],
        banned_token_ids=[3],
        bad_words=["no"],
    )
    assert request.stopping == pb.StopConditions(min_tokens=2, include_stop=True)
    assert request.cache == pb.CacheControl(cache_salt="salt", no_cache=False, pin_seconds=60, pin_tokens=16)


def test_a_beam_search_reaches_the_request_by_its_width_or_by_all_it_has() -> None:
    def asked(beams: Any) -> pb.BeamSearch:
        return request_of("hi", {"beams": beams}).sampling.beams

    assert asked(4) == pb.BeamSearch(width=4)
    assert asked({"width": 2, "length_penalty": -1, "early_stopping": True}) == pb.BeamSearch(
        width=2, length_penalty=-1.0, early_stopping=pb.EARLY_STOPPING_FULL
    )
    assert asked({"width": 2, "early_stopping": "never"}).early_stopping == pb.EARLY_STOPPING_NEVER
    for beams, field in (({"size": 2}, "beams.size"), (-1, "beams.width"), ({"early_stopping": "no"}, "beams.early")):
        with pytest.raises(InvalidRequest, match=field):
            asked(beams)


def test_what_an_answer_must_be_reaches_the_request() -> None:
    def asked(**settings: Any) -> pb.StructuredOutput:
        return request_of("hi", cast("Settings", settings)).sampling.structured

    assert asked(json_schema={"type": "null"}) == pb.StructuredOutput(json_schema='{"type": "null"}')
    assert asked(json_schema='{"type":"null"}') == pb.StructuredOutput(json_schema='{"type":"null"}')
    assert asked(json_object=True) == pb.StructuredOutput(json_object=True)
    assert asked(regex="a+") == pb.StructuredOutput(regex="a+")
    assert asked(grammar='start: "a"') == pb.StructuredOutput(grammar='start: "a"')
    assert asked(choices=["a", "b"]) == pb.StructuredOutput(choices=pb.StringList(values=["a", "b"]))
    assert asked(choices=[]).WhichOneof("kind") == "choices"
    assert not request_of("hi", {}).sampling.HasField("structured")


def test_what_goes_first_is_said_by_a_word() -> None:
    assert request_of("hi", {"priority": "low"}).priority == pb.PRIORITY_LOW
    assert embed_request("hi", {"priority": "high"}).priority == pb.PRIORITY_HIGH
    wrong: list[Any] = ["urgent", 1, []]
    for priority in wrong:
        with pytest.raises(InvalidRequest, match="priority: must be one of high, normal, low"):
            request_of("hi", {"priority": priority})


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (None, {}),
        ("a", {"token_ids": [1]}),
        (None, {"token_ids": [1], "messages": []}),
        ("a", {"temprature": 1}),
        ("a", {"regex": "a", "choices": ["a"]}),
    ],
    ids=str,
)
def test_a_mistake_in_the_call_is_a_type_error(prompt: str | None, settings: Any) -> None:
    with pytest.raises(TypeError, match=r"give one of|there is no setting 'temprature'"):
        request_of(prompt, settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"top_k": -1}, "top_k"),
        ({"seed": 1 << 64}, "seed"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"temperature": "hot"}, "temperature"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"banned_token_ids": ["a"]}, "banned_token_ids"),
        ({"bad_words": [1]}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"json_schema": {1, 2}}, "json_schema"),
        ({"regex": 1}, "regex"),
        ({"choices": [1]}, "choices"),
        ({"choices": 1}, "choices"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_sent_is_named(settings: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        request_of("secret prompt", settings)
    assert refusal.value.field == field


def test_a_message_that_is_none_is_named_without_its_words() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        request_of(None, {"messages": [{"role": "user", "content": "fine"}, {"role": "user", "text": "secret"}]})
    assert refusal.value.field == "messages[1]"
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "addresses"),
    [("a:1", ("a:1",)), ("a:1, b:2,a:1", ("a:1", "b:2")), (["a:1", "unix:/x"], ("a:1", "unix:/x"))],
)
def test_addresses_are_told_by_commas(text: Any, addresses: tuple[str, ...]) -> None:
    assert addresses_of(text) == addresses


@pytest.mark.parametrize("text", ["", ",", "a:1,", [], [""]])
def test_no_address_is_a_mistake(text: Any) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Client(text)


# ---- what is heard


def test_a_request_is_the_same_however_often_it_is_sent() -> None:
    asked = Continuation(pb.GenerateStreamRequest(text="hi"))
    sent = asked.next_call()

    assert isinstance(sent, pb.GenerateStreamRequest)
    assert sent.resumable and sent.request_id and sent.sampling.HasField("seed")
    assert asked.next_call() == sent
    assert Continuation(pb.GenerateStreamRequest(text="hi")).next_call() != sent, "another one is another one"


def scored(*tokens: int) -> list[pb.TokenLogprobs]:
    top = pb.TokenLogprob(token_id=7, logprob=-0.5, text=b"g")
    return [pb.TokenLogprobs(token=pb.TokenLogprob(token_id=t, logprob=-t, text=b"x"), top=[top]) for t in tokens]


def prompt_part(index: int, *logprobs: pb.TokenLogprobs) -> pb.GenerateStreamResponse:
    return pb.GenerateStreamResponse(prompt_logprobs=pb.PromptLogprobs(index=index, logprobs=logprobs))


def test_log_probabilities_are_part_of_deltas_and_answer_and_those_of_the_prompt_may_come_twice() -> None:
    asked = Continuation(pb.GenerateStreamRequest(text="hi"))
    nothing_before = pb.TokenLogprobs(token=pb.TokenLogprob(token_id=3, text=b"y"))
    new = pb.GenerateStreamResponse(
        delta=pb.Delta(index=0, token_ids=[65, 66], text="AB", ticket=b"t", logprobs=scored(65, 66))
    )
    for message in (first(), prompt_part(0, nothing_before, *scored(4)), first(), prompt_part(0, nothing_before)):
        assert asked.hear(message) is None
    asked.hear(prompt_part(1, *scored(4, 5)))
    told = asked.hear(new)
    asked.hear(finish())

    top = (TokenLogprob(token_id=7, logprob=-0.5, text=b"g"),)
    expected = [TokenLogprobs(token=TokenLogprob(token_id=t, logprob=-t, text=b"x"), top=top) for t in (4, 5, 65, 66)]
    alone = TokenLogprobs(token=TokenLogprob(token_id=3, logprob=None, text=b"y"), top=())
    assert isinstance(told, Delta) and told.logprobs == tuple(expected[2:])
    assert asked.answer().logprobs == tuple(expected[2:])
    assert asked.answer().prompt_logprobs == (alone, *expected[:2])


@pytest.mark.parametrize("n", [0, 3_000_000])
def test_a_number_of_choices_that_no_server_makes_is_refused_before_anything_is_kept_for_them(n: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"n: must be in \[1, 65536\], got {n}"):
        Continuation(pb.GenerateStreamRequest(sampling=pb.SamplingParams(n=n)))


def test_once_something_was_heard_the_rest_is_asked_for_with_all_that_was_heard() -> None:
    asked = Continuation(pb.GenerateStreamRequest(text="hi", sampling=pb.SamplingParams(n=3)))
    for message in (first(), delta(0, 65, 66), delta(0, 67, choice=1), delta(2, 68), finish(choice=1)):
        asked.hear(message)
    resumed = asked.next_call()

    assert isinstance(resumed, pb.ResumeRequest)
    assert resumed.request.stopping.max_tokens == 9
    assert [(p.choice, p.ticket, list(p.token_ids)) for p in resumed.choices] == [
        (0, b"0 after 3", [65, 66, 68]),
        (2, b"first", []),
    ]


def test_what_was_told_already_is_not_told_again() -> None:
    asked = Continuation(pb.GenerateStreamRequest(text="hi"))
    for message in (first(), delta(0, 65, 66), delta(2, 67)):
        asked.hear(message)

    assert asked.hear(delta(0, 65, 66)) is None
    assert asked.hear(delta(2, 67)) is None
    assert isinstance(new := asked.hear(delta(3, 68)), Delta) and new.token_ids == (68,)
    assert asked.hear(finish()) is not None
    assert asked.hear(finish()) is None
    assert asked.answer().text == "ABCD"


@pytest.mark.parametrize("message", [delta(2, 67), delta(0, 65, 66, 67), delta(0, 65, choice=1), finish(choice=7)])
def test_a_message_that_leaves_a_gap_or_was_not_asked_for_is_not_believed(message: pb.GenerateStreamResponse) -> None:
    asked = Continuation(pb.GenerateStreamRequest(text="hi"))
    asked.hear(first())
    asked.hear(delta(0, 65))

    with pytest.raises(OutOfStep):
        asked.hear(message)
    assert asked.finishes == {}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=30))
def test_whatever_comes_in_whatever_order_the_tokens_told_are_a_beginning_of_the_answer(
    pieces: list[tuple[int, int]],
) -> None:
    answer = list(range(65, 80))
    asked = Continuation(pb.GenerateStreamRequest(text="hi"))
    told: list[int] = []
    for index, count in pieces:
        try:
            new = asked.hear(delta(index, *answer[index : index + count]))
        except OutOfStep:
            continue
        if isinstance(new, Delta):
            assert new.index == len(told)
            told += new.token_ids
    assert told == answer[: len(told)]


def test_an_end_for_a_reason_of_a_later_server_is_an_end() -> None:
    asked = Continuation(pb.GenerateStreamRequest(text="hi"))
    later = pb.GenerateStreamResponse.FromString(finish().SerializeToString().replace(b"\x10\x04", b"\x10\x63"))
    for message in (first(), delta(0, 65), later):
        asked.hear(message)

    assert later.finish.reason == 99
    assert (asked.answer().text, asked.answer().finish.reason) == ("A", FinishReason.OTHER)


# ---- what a failure means


def every_error(kind: type[PagewireError] = PagewireError) -> Iterator[type[PagewireError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from every_error(child)


@pytest.mark.parametrize("kind", [kind for kind in every_error() if kind.__module__ == errors.__name__])
def test_an_error_is_made_again_as_it_was(kind: type[PagewireError]) -> None:
    error = kind("n", "too many") if issubclass(kind, InvalidRequest) else kind("why")
    error.add_note("a note")

    read = copy.copy(error)  # made again by __reduce__, as in any other process
    assert (type(read), str(read), vars(read)) == (kind, str(error), vars(error))


def judged(error: PagewireError) -> Failure:
    status = to_rpc_status(error)
    return judge(status.code, status.message, status.trailing_metadata, "a:1")


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("n", "too many"),
        UnknownModel("m"),
        DeadlineExceeded("late"),
        AlreadyRunning("twice"),
        Superseded("other"),
        TicketRefused("no"),
        TicketStale("old"),
        ModelFolderError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_will_not_pass_is_told_as_it_was_meant(error: PagewireError) -> None:
    failure = judged(error)

    assert not failure.may_pass
    assert type(failure.error) is type(error)
    assert str(failure.error) == str(error)


def test_a_reader_that_was_slow_may_go_on() -> None:
    failure = judged(SlowReader("no message was taken"))

    assert failure.may_pass and not failure.answered
    assert type(failure.error) is SlowReader


@pytest.mark.parametrize("kind", [Overloaded, Unavailable])
def test_a_refusal_says_when_to_come_back(kind: type[Overloaded | Unavailable]) -> None:
    failure = judged(kind("full", 2.5))

    assert failure.may_pass and failure.answered
    assert failure.retry_after_s == 2.5
    assert type(failure.error) is kind


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
    ],
)
def test_a_connection_that_broke_may_be_made_anew(code: grpc.StatusCode) -> None:
    failure = judge(code, "errors: [ipv4:1.2.3.4: Connection reset]", (), "a:1")

    assert failure.may_pass and not failure.answered
    assert str(failure.error) == "no connection to a:1: Connection reset"


def test_a_certificate_that_does_not_fit_is_told_as_that() -> None:
    told = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:5: Tls handshake failed "
        "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
        "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate: OK"
    )
    failure = judge(grpc.StatusCode.UNAVAILABLE, told, (), "a:1")

    assert str(failure.error) == "no connection to a:1: unable to get local issuer certificate"


def test_a_bug_of_the_servers_is_not_tried_again() -> None:
    status = internal_status("e5")
    failure = judge(status.code, status.message, status.trailing_metadata, "a:1")

    assert not failure.may_pass
    assert "e5" in str(failure.error)


def test_an_error_of_a_later_version_is_not_tried_again() -> None:
    detail = status_pb2.Status()
    detail.details.add().Pack(error_details_pb2.ErrorInfo(reason="NEVER_HEARD_OF", domain="pagewire"))
    trailers = (("grpc-status-details-bin", detail.SerializeToString()),)

    assert not judge(grpc.StatusCode.UNAVAILABLE, "new", trailers, "a:1").may_pass


def test_a_request_that_is_too_large_for_the_server_is_its_caller_s_mistake() -> None:
    told = "SERVER: Received message larger than max (5700082 vs. 4194304)"
    failure = judge(grpc.StatusCode.RESOURCE_EXHAUSTED, told, (), "a:1")

    assert isinstance(failure.error, InvalidRequest) and not failure.may_pass
    assert failure.error.problem == "has 5700082 bytes, and the server takes 4194304"
    of_answer = judge(grpc.StatusCode.RESOURCE_EXHAUSTED, told.replace("SERVER", "CLIENT"), (), "a:1")
    assert not isinstance(of_answer.error, InvalidRequest)


def test_mangled_details_leave_the_code_to_go_by() -> None:
    assert judge(grpc.StatusCode.UNAVAILABLE, "x", (("grpc-status-details-bin", b"\xff"),), "a:1").may_pass
    assert not judge(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", (), "a:1").may_pass


def asked_of(*addresses: str, clock_s: Callable[[], float] = lambda: 0.0) -> Asked:
    manner = Manner(addresses=addresses, timeout_s=600.0, patience_s=5.0, access=access(addresses, api_key=""))
    request = pb.GenerateStreamRequest(text="hi")
    return Asked(request, manner, RetryBudget(), first=addresses[0], timeout_s=None, clock_s=clock_s)


def fail(asked: Asked, error: PagewireError) -> None:
    status = to_rpc_status(error)
    asked.failed(status.code, status.message, status.trailing_metadata)


@pytest.mark.parametrize(
    "error", [TicketRefused("no"), TicketStale("no"), UnknownModel("no"), Unauthenticated("no")], ids=repr
)
def test_a_server_that_cannot_go_on_with_an_answer_keeps_it_from_no_other_that_can(error: PagewireError) -> None:
    now_s = [0.0]
    asked = asked_of("a:1", "b:1", clock_s=lambda: now_s[0])
    asked.next_call()
    for message in (first(), delta(0, 65)):
        asked.hear(message.SerializeToString())
    fail(asked, GONE)
    assert asked.next_call().address == "b:1"
    now_s[0] = 1.0
    fail(asked, error)
    assert asked.next_call().address == "a:1"
    with pytest.raises(type(error)):
        fail(asked, error)


@pytest.mark.parametrize("error", [UnknownModel("no"), Unauthenticated("no")], ids=repr)
def test_a_request_that_nobody_began_with_ends_where_it_is_refused(error: PagewireError) -> None:
    asked = asked_of("a:1", "b:1")
    asked.next_call()
    with pytest.raises(type(error)):
        fail(asked, error)


# ---- when and where to try again


def attempts(*addresses: str, patience_s: float = 30.0, deadline_s: float = 600.0, **changes: Any) -> Attempts:
    settings: dict[str, Any] = {"budget": RetryBudget(), "jitter": lambda: 1.0, "began_s": 0.0, **changes}
    return Attempts(
        addresses or ("a",), first=(addresses or ("a",))[0], patience_s=patience_s, deadline_s=deadline_s, **settings
    )


def delays_of(one: Attempts, failure: Failure, count: int, *, now_s: float = 0.0) -> list[float]:
    delays: list[float] = []
    for _ in range(count):
        delays.append(one.failed(failure, now_s))
        now_s += delays[-1]
    return delays


def test_delays_double_up_to_half_a_second_where_nobody_is_and_begin_anew_after_a_message() -> None:
    one = attempts()
    assert delays_of(one, lost("x"), 6) == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.5, 0.5])
    one.heard()
    assert one.failed(lost("x"), 9.0) == pytest.approx(0.05)


def test_delays_double_up_to_two_seconds_where_a_server_refuses() -> None:
    one = attempts(budget=RetryBudget(reserve=100.0))
    refused = Failure(error=Overloaded("full", 0.0), may_pass=True, answered=True)
    assert delays_of(one, refused, 8) == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])


def test_the_next_address_is_asked_at_once_and_only_a_whole_round_waits() -> None:
    three = attempts("a", "b", "c")
    tried, delays = [], []
    for _ in range(4):
        tried.append(three.address)
        delays.append(three.failed(lost("x"), 0.0))
    assert tried == ["a", "b", "c", "a"]
    assert delays[:2] == [0.0, 0.0]
    assert delays[2] == pytest.approx(0.05), "until the first may be asked again"


def test_a_server_is_not_asked_before_the_time_that_it_named() -> None:
    assert attempts().failed(UNAVAILABLE, 0.0) >= 1.0
    two = attempts("a", "b")
    assert two.failed(UNAVAILABLE, 0.0) == 0.0
    assert two.address == "b", "another one may be"


def test_what_cannot_pass_is_raised_at_once() -> None:
    with pytest.raises(InvalidRequest):
        attempts().failed(Failure(error=InvalidRequest("n", "x"), may_pass=False), 0.0)


def test_patience_begins_with_the_first_failure_and_anew_whenever_something_new_was_heard() -> None:
    one = attempts(patience_s=5.0)
    one.failed(lost("x"), 100.0)  # after a long wait in a queue, say
    one.failed(lost("x"), 104.8)
    with pytest.raises(Unavailable):
        one.failed(lost("x"), 105.0)
    one.heard()
    one.failed(lost("x"), 200.0)


def test_while_a_server_works_on_a_request_no_patience_is_used_up() -> None:
    one = attempts(patience_s=5.0)
    one.failed(lost("x"), 0.0)
    one.taken(0.1)
    one.failed(lost("x"), 40.0)  # after a long wait in a queue, and the server was killed once more
    one.failed(lost("x"), 44.5)
    with pytest.raises(Unavailable):
        one.failed(lost("x"), 45.0)


def test_a_server_that_takes_a_request_and_dies_at_once_uses_patience_up() -> None:
    one = attempts(patience_s=5.0)
    for now_s in range(5):
        one.taken(now_s)
        one.failed(lost("x"), now_s)
    one.taken(5.0)
    with pytest.raises(Unavailable):
        one.failed(lost("x"), 5.0)


def test_the_deadline_is_the_end_and_says_what_was_in_the_way() -> None:
    with pytest.raises(DeadlineExceeded, match="what was in the way"):
        attempts(deadline_s=10.0).failed(lost("what was in the way"), 9.99)


def test_streams_that_a_server_took_and_sends_elsewhere_are_no_refusals() -> None:
    """A scheduler that drains hands over all that it has at once: none of it may wait for the budget."""
    budget = RetryBudget()
    many = [attempts("a", "b", budget=budget) for _ in range(1000)]
    for one in many:
        one.taken(1.0)
        assert one.failed(UNAVAILABLE, 1.0) == 0.0
    refused = [one.failed(UNAVAILABLE, 1.0) for one in many[:20]]
    assert (refused[0], refused[-1]) == pytest.approx((1.0, 10.0)), "of those who refuse them there, the budget is kept"


def test_retries_over_the_budget_are_put_off_and_not_given_up() -> None:
    budget = RetryBudget(ratio=0.1, per_s=2.0, reserve=3.0)
    assert [budget.retry(0.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    assert budget.retry(10.0) == 0.0, "time fills it again"
    for _ in range(100):
        budget.call()
    assert [budget.retry(10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5], "never above the reserve"


def test_connections_that_could_not_be_made_cost_nothing_of_the_budget() -> None:
    budget = RetryBudget(reserve=1.0)
    many = [attempts(budget=budget) for _ in range(50)]
    assert all(one.failed(lost("x"), 0.0) < 0.1 for one in many)
    assert [attempts(budget=budget).failed(UNAVAILABLE, 0.0) for _ in range(4)] == pytest.approx([1.0, 1.0, 1.8, 2.7])


def test_refusals_of_many_who_ask_once_keep_nobody_from_the_next_server_nor_from_going_on() -> None:
    budget = RetryBudget()
    for _ in range(900):
        with pytest.raises(Unavailable):
            attempts("a", budget=budget, begin_patience_s=1.0).failed(UNAVAILABLE, 1.0)
    beginning = attempts("a", "b", budget=budget, begin_patience_s=1.0)
    assert (beginning.failed(UNAVAILABLE, 1.0), beginning.address) == (0.0, "b")
    running = attempts("a", "b", budget=budget, begin_patience_s=1.0)
    running.taken(1.0)
    running.heard()
    assert [running.failed(UNAVAILABLE, 1.0) for _ in range(2)] == [0.0, pytest.approx(1.0)]


def test_only_a_retry_that_is_made_costs_and_no_debt_outlasts_the_patience_of_a_request() -> None:
    budget = RetryBudget()
    for _ in range(900):
        with pytest.raises(DeadlineExceeded):
            attempts(deadline_s=1.5, budget=budget).failed(UNAVAILABLE, 1.0)
    assert budget.wait_s(1.0) == 0.0
    assert max(attempts(budget=budget).failed(UNAVAILABLE, 1.0) for _ in range(900)) == 10.0


@pytest.mark.parametrize("limits", [{"patience_s": 5.0}, {"deadline_s": 6.0}], ids=str)
def test_refusals_of_others_leave_time_for_one_more_try_however_short_the_patience(limits: dict[str, float]) -> None:
    refused = Failure(error=Overloaded("full", 0.05), may_pass=True, answered=True, retry_after_s=0.05)
    budget = RetryBudget()
    for _ in range(50):
        attempts(budget=budget).failed(refused, 1.0)
    for jitter in (0.5, 1.0, 1.49):
        one = attempts(budget=budget, jitter=lambda jitter=jitter: jitter, **limits)
        assert 2.4 < one.failed(refused, 1.0) < 5.0
        with pytest.raises(Overloaded if "patience_s" in limits else DeadlineExceeded):
            delays_of(one, refused, 8, now_s=3.5)


# ---- over a socket


async def silence(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
    yield first()
    await asyncio.Event().wait()


async def unpin(address: str, kind: str, *pin_id: str) -> int:
    """What either client says of it."""
    if kind == "async":
        async with AsyncClient(address) as client:
            return await client.unpin(*pin_id)

    def ask() -> int:
        with Client(address) as client:
            return client.unpin(*pin_id)

    return await asyncio.to_thread(ask)


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_pin_is_told_with_the_answer_and_ended_by_name_or_with_all_others(kind: str) -> None:
    pinned = pb.PinnedPrefix(pin_id="p", tokens=16, expires_s=99)
    with played(saying(first(pinned=pinned), delta(0, 1), finish())) as (_, run):
        answer = run(lambda address: generate(address, kind))
        assert answer.pinned == PinnedPrefix(pin_id="p", tokens=16, expires_s=99)
        assert run(lambda address: unpin(address, kind, "p")) == 3
        assert run(lambda address: unpin(address, kind)) == 7
        with pytest.raises(InvalidRequest, match="which: is bad"):
            run(lambda address: unpin(address, kind, "bad"))


async def generate(address: str, kind: str, **settings: Any) -> Any:
    """An answer, by either client."""
    if kind == "async":
        async with AsyncClient(address, **settings) as client:
            return await client.generate("hi")

    def ask() -> Any:
        with Client(address, **settings) as client:
            return client.generate("hi")

    return await asyncio.to_thread(ask)


both = pytest.mark.parametrize("kind", ["sync", "async"])


@both
def test_an_answer_comes_together_from_pieces_of_several_calls(kind: str) -> None:
    with played(
        saying(then=GONE),
        saying(first(), then=GONE),
        saying(first(), delta(0, 65), delta(1, 66), then=GONE),
        saying(first(resumed=True), delta(2, 67)),  # ends well, without an end
        saying(first(resumed=True), delta(9, 99)),  # out of step
        saying(first(resumed=True), delta(2, 67), delta(3, 68), then=GONE),  # a repeat
        saying(first(resumed=True), finish()),
    ) as (server, run):
        answer = run(lambda address: generate(address, kind))

    assert (answer.text, answer.token_ids, answer.model) == ("ABCD", (65, 66, 67, 68), "m")
    assert answer.finish.exact
    kinds = [type(request).__name__ for request in server.asked]
    assert kinds == ["GenerateStreamRequest"] * 3 + ["ResumeRequest"] * 4
    assert server.asked[0] == server.asked[1]
    assert [list(request.choices[0].token_ids) for request in server.asked[3:]] == [
        [65, 66],
        [65, 66, 67],
        [65, 66, 67],
        [65, 66, 67, 68],
    ]


@both
def test_an_error_that_will_not_pass_is_raised_as_what_it_is(kind: str) -> None:
    scripts = played(saying(then=InvalidRequest("n", "too many")))
    with scripts as (server, run), pytest.raises(InvalidRequest) as refusal:
        run(lambda address: generate(address, kind))
    assert (refusal.value.field, refusal.value.problem) == ("n", "too many")
    assert len(server.asked) == 1


@both
@pytest.mark.parametrize("timeout_s", [None, float("inf"), 1e10])
def test_an_answer_may_take_as_long_as_it_likes(kind: str, timeout_s: float | None) -> None:
    with played(saying(first(), delta(0, 65), finish())) as (_, run):
        assert run(lambda address: generate(address, kind, timeout_s=timeout_s)).text == "A"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"timeout_s": 0}, "timeout_s must be more than 0, got 0"),
        ({"timeout_s": -1.0}, "timeout_s must be more than 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be a number"),
        ({"patience_s": -1.0}, "patience_s must be at least 0"),
        ({"patience_s": float("nan")}, "patience_s must be at least 0"),
    ],
)
def test_a_limit_that_is_none_is_refused_by_its_name(kind: type[Client | AsyncClient], limits: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind("127.0.0.1:1", **limits)


@both
def test_nobody_there_is_an_error_once_patience_ends(kind: str) -> None:
    with pytest.raises(Unavailable, match=r"no connection to 127\.0\.0\.1:1: "):
        asyncio.run(generate("127.0.0.1:1", kind, patience_s=0.1))


@both
def test_a_server_that_says_nothing_is_waited_for_until_the_deadline(kind: str) -> None:
    with played(silence) as (_, run), pytest.raises(DeadlineExceeded):
        run(lambda address: generate(address, kind, timeout_s=0.3))


@both
def test_the_next_address_answers_where_the_first_does_not(kind: str) -> None:
    with played(saying(first(), delta(0, 65), finish())) as (_, run):
        answer = run(lambda address: generate(f"127.0.0.1:1,{address}", kind))
    assert answer.text == "A"


def test_a_stream_that_is_left_is_cancelled_by_its_name() -> None:
    async def leave(address: str) -> str:
        async with AsyncClient(address) as client, client.stream("hi") as stream:
            async for _ in stream:
                break
            return stream.request_id

    async def more(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        yield first()
        yield delta(0, 65)
        await asyncio.Event().wait()

    with played(more) as (server, run):
        name = run(leave)
    assert server.cancelled == [name]


@both
def test_a_client_that_is_closed_ends_what_it_has_under_way_and_takes_nothing_new(kind: str) -> None:
    hanging: list[str] = []
    all_hang = asyncio.Event()

    async def more(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        yield first()
        hanging.append(request.text)
        if len(hanging) == 4:
            all_hang.set()
        await asyncio.Event().wait()

    async def close(address: str) -> None:
        client = AsyncClient(address) if kind == "async" else Client(address)

        def ask(what: str) -> Awaitable[object]:
            if isinstance(client, AsyncClient):
                return client.generate(what)
            return asyncio.to_thread(client.generate, what)

        running = [asyncio.ensure_future(ask("hi")) for _ in range(4)]
        await all_hang.wait()
        closing = client.close()
        if closing is not None:
            await closing
        for asked in (*running, ask("late")):
            with pytest.raises(PagewireError, match="the client was closed"):
                await asked

    with played(*[more] * 4) as (server, run):
        run(close)
    assert hanging == ["hi"] * 4 and len(server.asked) == 4, "nothing was asked again"


def test_a_task_that_is_cancelled_is_cancelled_also_where_its_client_is_closed() -> None:
    async def cancel(address: str) -> None:
        client = AsyncClient(address)
        reading = asyncio.ensure_future(client.generate("hi"))
        await hangs.wait()
        reading.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await reading

    async def more(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        yield first()
        hangs.set()
        await asyncio.Event().wait()

    hangs = asyncio.Event()
    with played(more) as (_, run):
        run(cancel)


def test_a_stream_that_came_to_its_end_is_not_cancelled() -> None:
    async def read(address: str) -> None:
        async with AsyncClient(address) as client, client.stream("hi") as stream:
            assert [d.text async for d in stream] == ["A"]
            assert stream.finish is not None

    with played(saying(first(), delta(0, 65), finish())) as (server, run):
        run(read)
    assert server.cancelled == []


def test_metadata_goes_with_every_call() -> None:
    seen: list[Any] = []

    async def look(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        seen.append(dict(context.invocation_metadata() or ()).get("authorization"))
        yield first()
        yield delta(0, 65)
        if len(seen) == 1:
            raise GONE
        yield finish()

    with played(look, look) as (_, run):
        run(lambda address: generate(address, "async", metadata=[("authorization", "Bearer k")]))
    assert seen == ["Bearer k", "Bearer k"]


# ---- on behalf of somebody else


def test_whoever_asks_for_somebody_else_hears_a_refusal_once_each_server_has_refused() -> None:
    full = Failure(error=Overloaded("full", 2.0), may_pass=True, answered=True, retry_after_s=2.0)
    three = attempts("a", "b", "c", begin_patience_s=5.0)
    assert [three.failed(full, 0.1 * n) for n in range(2)] == [0.0, 0.0]
    with pytest.raises(Overloaded):
        three.failed(full, 0.2)


def test_whoever_asks_for_somebody_else_looks_for_a_server_for_a_while() -> None:
    one = attempts(begin_patience_s=1.0)
    one.failed(lost("x"), 0.0)
    one.failed(lost("x"), 0.5)
    with pytest.raises(Unavailable):
        one.failed(lost("x"), 1.0)


def test_a_request_that_was_begun_with_is_as_patient_as_any_other() -> None:
    one = attempts(begin_patience_s=0.0, patience_s=30.0)
    one.taken(0.0)
    one.failed(lost("x"), 0.0)
    one.failed(UNAVAILABLE, 20.0)


def test_a_stream_that_another_reader_took_over_is_not_ended_for_him() -> None:
    async def read(address: str) -> None:
        async with AsyncClient(address) as client, client.stream("hi") as stream:
            with pytest.raises(Superseded):
                async for _ in stream:
                    pass

    with played(saying(first(), delta(0, 65), then=Superseded("another one reads on"))) as (server, run):
        run(read)
    assert server.cancelled == []


def test_a_stream_may_be_left_for_another_one_to_go_on_with() -> None:
    async def leave(address: str) -> Continuation:
        async with AsyncClient(address) as client:
            stream = client.stream("hi")
            await anext(stream)
            await stream.close(linger=True)
            return stream.continuation

    async def go_on(address: str, heard: Continuation) -> str:
        request = pb.GenerateStreamRequest(text="hi", request_id=heard.request_id)
        async with AsyncClient(address) as client, client.send(request) as stream:
            stream.continuation.go_on({0: (heard.ticket(0), [65])}, ())
            return "".join([d.text async for d in stream])

    async def more(request: Any, context: Context) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        yield first()
        yield delta(0, 65)
        await asyncio.Event().wait()

    async def both_ways(address: str) -> str:
        return await go_on(address, await leave(address))

    with played(more, saying(first(resumed=True), delta(1, 66), finish())) as (server, run):
        assert run(both_ways) == "B"
    assert server.cancelled == []
    assert [list(point.token_ids) for point in server.asked[1].choices] == [[65]]
