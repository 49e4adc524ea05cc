"""Requests become checked values: every field at its limit and beyond it, unset and zero told apart."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from common.cache_control import CacheControl
from common.errors import InvalidRequest
from common.sampling import MAX_SEED, Grammar, RequestLimits, SamplingParams
from common.step import Logprobs
from common.types import FinishReason, Priority
from protos import inference_pb2 as pb
from services.answer import Delta, Finish, PromptLogprobs, Usage
from services.codec_public import (
    fill_delta,
    fill_finish,
    finish_pb,
    input_from_pb,
    pin_id_from_pb,
    prompt_logprobs_pb,
    request_from_pb,
    size_from_pb,
    token_ids,
)
from services.request import Chat, GenerateSpec, Message, Text, TokenIds

LIMITS = RequestLimits(
    max_choices=4,
    max_stop_strings=3,
    max_stop_string_bytes=5,
    max_stop_token_ids=2,
    max_temperature=2.0,
    min_repetition_penalty=0.5,
    max_repetition_penalty=3.0,
    max_penalty=1.5,
    max_logit_biases=2,
    max_logit_bias=10.0,
    max_listed_token_ids=3,
    max_bad_words=2,
    max_bad_word_bytes=4,
    max_logprobs=3,
    max_cache_salt_bytes=5,
    max_pin_seconds=60,
)
VOCAB_SIZE = 100

Request = pb.GenerateRequest | pb.GenerateStreamRequest
Change = Callable[[Any], object]

FLOATS = st.floats(width=32)


def spec_of(request: Request) -> GenerateSpec:
    return request_from_pb(request, LIMITS, vocab_size=VOCAB_SIZE)


def refused(request: Request) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        spec_of(request)
    return caught.value


def sampling(**values: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(**values))


def stopping(**values: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hi", stopping=pb.StopConditions(**values))


# ---- the message


def shape(message: Descriptor) -> list[tuple[Any, ...]]:
    def one(field: FieldDescriptor) -> tuple[Any, ...]:
        of = field.message_type.full_name if field.message_type else None
        oneof = field.containing_oneof.name if field.containing_oneof else None
        return field.name, field.number, field.type, field.is_repeated, field.has_presence, of, oneof

    return [one(field) for field in message.fields]


def test_the_two_generate_requests_are_the_same_field_for_field_but_a_stream_can_be_resumable() -> None:
    *fields, resumable = shape(pb.GenerateStreamRequest.DESCRIPTOR)
    assert shape(pb.GenerateRequest.DESCRIPTOR) == fields
    assert resumable[0] == "resumable"


def test_the_numbers_of_finish_reasons_are_those_of_the_wire() -> None:
    on_the_wire = {
        value.name.removeprefix("FINISH_REASON_"): value.number for value in pb.FinishReason.DESCRIPTOR.values
    }

    assert {reason.name: reason.value for reason in FinishReason} | {"UNSPECIFIED": 0} == on_the_wire | {"NONE": 0}


def test_the_numbers_of_priorities_are_those_of_the_wire() -> None:
    on_the_wire = {value.name.removeprefix("PRIORITY_"): value.number for value in pb.Priority.DESCRIPTOR.values}

    assert {priority.name: priority.value for priority in Priority} | {"UNSPECIFIED": 0} == on_the_wire


def test_a_request_is_normal_unless_it_says_otherwise() -> None:
    assert spec_of(pb.GenerateRequest(text="hi")).priority is Priority.NORMAL
    assert spec_of(pb.GenerateRequest(text="hi", priority=pb.PRIORITY_HIGH)).priority is Priority.HIGH


def test_a_priority_that_there_is_not_is_refused() -> None:
    problem = refused(pb.GenerateRequest.FromString(pb.GenerateRequest(text="hi").SerializeToString() + b"\x60\x07"))

    assert (problem.field, problem.problem) == ("priority", "must be one of HIGH, NORMAL, LOW, got 7")


# ---- defaults, and what is not one


@pytest.mark.parametrize("kind", [pb.GenerateRequest, pb.GenerateStreamRequest])
def test_what_is_not_set_takes_its_default(kind: type[Request]) -> None:
    spec = spec_of(kind(text="hi"))
    drawn = spec.sampling.seed

    assert spec == GenerateSpec(
        request_id=spec.request_id,
        model="",
        input=Text(text="hi"),
        sampling=SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=drawn),
        n=1,
        max_tokens=None,
        stop_token_ids=(),
        stop_strings=(),
        ignore_eos=False,
        skip_special_tokens=True,
    )
    assert spec.request_id != ""


@pytest.mark.parametrize(
    ("asked", "field", "grammar"),
    [
        (pb.StructuredOutput(json_schema="{}"), "json_schema", Grammar("json_schema", "{}")),
        (pb.StructuredOutput(regex="a|b"), "regex", Grammar("regex", "a|b")),
        (pb.StructuredOutput(grammar="start: x"), "grammar", Grammar("lark", "start: x")),
        (pb.StructuredOutput(json_object=True), "json_object", Grammar("json_schema", '{"type": "object"}')),
        (
            pb.StructuredOutput(choices=pb.StringList(values=["a", 'ü"\\\n', "a"])),
            "choices",
            Grammar("lark", 'start: "a" | "ü\\"\\\\\\n"'),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_every_kind_of_structured_output_becomes_a_grammar(
    asked: pb.StructuredOutput, field: str, grammar: Grammar
) -> None:
    spec = spec_of(pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(structured=asked)))

    assert (spec.structured, spec.sampling.grammar) == (field, grammar)


@pytest.mark.parametrize(
    ("asked", "field", "problem"),
    [
        (pb.StructuredOutput(), "structured", "one of json_schema, regex, grammar, choices, json_object must be set"),
        (pb.StructuredOutput(json_object=False), "json_object", "must be true, or not set"),
        (pb.StructuredOutput(regex=""), "regex", "must not be empty"),
        (pb.StructuredOutput(json_schema="ü" * 32_769), "json_schema", "at most 65536 bytes, got 65538"),
        (pb.StructuredOutput(choices=pb.StringList()), "choices", "is empty"),
        (pb.StructuredOutput(choices=pb.StringList(values=["a", ""])), "choices", "has an empty string"),
        (pb.StructuredOutput(choices=pb.StringList(values=["a"] * 1025)), "choices", "at most 1024, got 1025"),
        (pb.StructuredOutput(choices=pb.StringList(values=["a" * 999] * 66)), "choices", "at most 65536 bytes"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_structured_output_that_says_nothing_or_too_much_is_refused(
    asked: pb.StructuredOutput, field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem) as refusal:
        spec_of(pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(structured=asked)))

    assert refusal.value.field == field


@pytest.mark.parametrize("kind", [pb.GenerateRequest, pb.GenerateStreamRequest])
def test_every_field_reaches_the_value(kind: type[Request]) -> None:
    request = kind(
        request_id="r",
        model="m",
        text="hi",
        sampling=pb.SamplingParams(
            temperature=0.1,
            top_k=5,
            top_p=0.2,
            min_p=0.3,
            seed=7,
            n=2,
            typical_p=0.4,
            repetition_penalty=1.1,
            presence_penalty=-0.1,
            frequency_penalty=0.7,
            logit_bias={8: -0.3, 2: 10},
            allowed_token_ids=[3, 1],
            banned_token_ids=[5, 4],
            bad_words=["x", " y"],
            logprobs=0,
            prompt_logprobs=3,
        ),
        stopping=pb.StopConditions(
            max_tokens=9, stop=["a", "b"], stop_token_ids=[3], ignore_eos=True, min_tokens=4, include_stop=True
        ),
        skip_special_tokens=False,
        cache=pb.CacheControl(cache_salt="salt", pin_seconds=60, pin_tokens=1),
        max_drafts=6,
    )

    assert spec_of(request) == GenerateSpec(
        request_id="r",
        model="m",
        input=Text(text="hi"),
        sampling=SamplingParams(
            temperature=0.1,
            top_k=5,
            top_p=0.2,
            min_p=0.3,
            seed=7,
            typical_p=0.4,
            repetition_penalty=1.1,
            presence_penalty=-0.1,
            frequency_penalty=0.7,
            logit_bias=((2, 10.0), (8, -0.3)),
            allowed_token_ids=(3, 1),
            banned_token_ids=(5, 4),
            logprobs=0,
            prompt_logprobs=3,
        ),
        n=2,
        max_tokens=9,
        stop_token_ids=(3,),
        stop_strings=("a", "b"),
        ignore_eos=True,
        skip_special_tokens=False,
        bad_words=("x", " y"),
        min_tokens=4,
        include_stop=True,
        cache=CacheControl(salt="salt", pin_seconds=60, pin_tokens=1),
        max_drafts=6,
    )


@pytest.mark.parametrize(
    ("asked", "cache"),
    [
        (pb.CacheControl(), None),
        (pb.CacheControl(cache_salt="", no_cache=False), None),
        (pb.CacheControl(cache_salt="ééx"), CacheControl(salt="ééx")),
        (pb.CacheControl(cache_salt="s", no_cache=True), CacheControl(salt="s", no_cache=True)),
        (pb.CacheControl(pin_seconds=1), CacheControl(pin_seconds=1)),
        (pb.CacheControl(pin_seconds=60, pin_tokens=2**32 - 1), CacheControl(pin_seconds=60, pin_tokens=2**32 - 1)),
    ],
)
def test_what_is_said_of_the_cache_is_taken_and_nothing_is_nothing(
    asked: pb.CacheControl, cache: CacheControl | None
) -> None:
    assert spec_of(pb.GenerateRequest(text="hi", cache=asked)).cache == cache


@pytest.mark.parametrize(
    ("asked", "field", "problem"),
    [
        (pb.CacheControl(cache_salt="ééxy"), "cache_salt", "at most 5 bytes, got 6"),
        (pb.CacheControl(pin_seconds=0), "pin_seconds", "must be at least 1, or not set; Unpin ends a pin"),
        (pb.CacheControl(pin_seconds=61), "pin_seconds", r"must be in \[1, 60\], got 61"),
        (pb.CacheControl(pin_seconds=2**32 - 1), "pin_seconds", r"must be in \[1, 60\], got 4294967295"),
        (pb.CacheControl(pin_seconds=1, pin_tokens=0), "pin_tokens", "must be at least 1, or not set"),
        (pb.CacheControl(pin_tokens=5), "pin_tokens", "needs pin_seconds"),
        (pb.CacheControl(pin_seconds=5, no_cache=True), "pin_seconds", "must not be set with no_cache"),
    ],
)
@pytest.mark.parametrize("kind", [pb.GenerateRequest, pb.GenerateStreamRequest])
def test_what_cannot_be_said_of_the_cache_is_refused(
    kind: type[Request], asked: pb.CacheControl, field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem) as refusal:
        spec_of(kind(text="hi", cache=asked))

    assert refusal.value.field == field


def test_a_pin_is_ended_by_its_id_or_with_all_others_and_not_by_chance() -> None:
    assert pin_id_from_pb(pb.UnpinRequest(pin_id="p")) == "p"
    assert pin_id_from_pb(pb.UnpinRequest(pin_id="")) == "", "which is nobody's"
    assert pin_id_from_pb(pb.UnpinRequest(all=True)) is None
    for request in (pb.UnpinRequest(), pb.UnpinRequest(all=False)):
        with pytest.raises(InvalidRequest, match="which: pin_id must be set, or all be true"):
            pin_id_from_pb(request)


def test_zero_is_a_value_and_not_unset() -> None:
    spec = spec_of(sampling(temperature=0.0, top_k=0, min_p=0.0, seed=0))

    assert spec.sampling == SamplingParams(temperature=0.0, top_k=0, min_p=0.0, seed=0)
    assert spec.sampling.greedy


@pytest.mark.parametrize(
    ("request_", "field"),
    [(sampling(top_p=0.0), "top_p"), (sampling(n=0), "n"), (stopping(max_tokens=0), "max_tokens")],
)
def test_a_zero_that_makes_no_sense_is_refused_and_not_taken_for_the_default(
    request_: pb.GenerateRequest, field: str
) -> None:
    assert refused(request_).field == field


def test_a_seed_that_is_not_set_is_drawn_anew_each_time() -> None:
    seeds = {spec_of(pb.GenerateRequest(text="hi")).sampling.seed for _ in range(8)}

    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@given(st.integers(0, MAX_SEED))
def test_a_seed_that_is_set_is_kept(seed: int) -> None:
    assert spec_of(sampling(seed=seed)).sampling.seed == seed


# ---- numbers


def as_float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    assert isinstance(rounded, float)
    return rounded


@given(FLOATS, st.sampled_from(["temperature", "top_p", "min_p"]))
def test_a_float_is_taken_inside_its_range_and_refused_by_name_outside(value: float, name: str) -> None:
    inside = {"temperature": 0 <= value <= 2, "top_p": 0 < value <= 1, "min_p": 0 <= value <= 1}[name]
    request = sampling(**{name: value})

    if inside:
        assert as_float32(getattr(spec_of(request).sampling, name)) == value
    else:
        assert refused(request).field == name


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("temperature", [0.0, 2.0], [-1e-6, 2.001, math.nan, math.inf, -math.inf]),
        ("top_p", [1e-6, 1.0], [0.0, -0.1, 1.001, math.nan, math.inf, -math.inf]),
        ("min_p", [0.0, 1.0], [-1e-6, 1.001, math.nan, math.inf, -math.inf]),
        ("typical_p", [1e-6, 1.0], [0.0, -0.1, 1.001, math.nan, math.inf, -math.inf]),
        ("repetition_penalty", [0.5, 3.0], [0.0, 0.49, -1.0, 3.001, math.nan, math.inf, -math.inf]),
        ("presence_penalty", [-1.5, 0.0, 1.5], [-1.501, 1.501, math.nan, math.inf, -math.inf]),
        ("frequency_penalty", [-1.5, 0.0, 1.5], [-1.501, 1.501, math.nan, math.inf, -math.inf]),
    ],
)
def test_a_float_at_its_limit_is_taken_and_the_next_is_refused(
    name: str, inside: list[float], outside: list[float]
) -> None:
    for value in inside:
        assert getattr(spec_of(sampling(**{name: value})).sampling, name) == value
    for value in outside:
        assert refused(sampling(**{name: value})).field == name


@pytest.mark.parametrize("bias", [-10.001, 10.001, math.nan, math.inf, -math.inf])
def test_a_bias_beyond_its_limit_is_refused(bias: float) -> None:
    error = refused(sampling(logit_bias={3: 10.0, 4: bias}))

    assert str(error).startswith("logit_bias: must be in [-10, 10], got ")
    assert str(error).endswith(" for token 4")


@given(st.decimals(0, 2, places=3))
def test_a_float_is_the_number_that_the_caller_typed(typed: Any) -> None:
    assert spec_of(sampling(temperature=float(typed))).sampling.temperature == float(typed)


@given(st.decimals("1.001", 99, places=3))
def test_a_problem_is_told_in_the_number_that_the_caller_typed(typed: Any) -> None:
    assert str(refused(sampling(top_p=float(typed)))) == f"top_p: must be in (0, 1], got {float(typed)}"


@pytest.mark.parametrize("largest", [3.4028234663852886e38, -3.4028234663852886e38])
def test_the_largest_float_is_refused_like_any_other(largest: float) -> None:
    assert refused(sampling(temperature=largest)).field == "temperature"


@given(st.integers(0, (1 << 32) - 1))
def test_any_top_k_is_taken(top_k: int) -> None:
    assert spec_of(sampling(top_k=top_k)).sampling.top_k == top_k


@given(st.integers(0, (1 << 32) - 1) | st.integers(0, 6))
def test_n_is_taken_up_to_its_limit(n: int) -> None:
    if 1 <= n <= LIMITS.max_choices:
        assert spec_of(sampling(n=n)).n == n
    else:
        assert str(refused(sampling(n=n))) == f"n: must be in [1, 4], got {n}"


@given(st.integers(0, (1 << 32) - 1) | st.integers(0, 6), st.integers(1, 4))
def test_best_of_is_taken_from_n_up_to_the_limit_of_n(best_of: int, n: int) -> None:
    asked = sampling(n=n, best_of=best_of)
    size = size_from_pb(asked, LIMITS, max_length=64)
    if n <= best_of <= LIMITS.max_choices:
        spec = spec_of(asked)
        assert (spec.n, spec.best_of, spec.num_made) == (n, best_of if best_of > 1 else 0, best_of)
        assert size.num_sequences == best_of
    else:
        assert str(refused(asked)) == f"best_of: must be in [{n}, 4], from n on, got {best_of}"
        assert 1 <= size.num_sequences <= LIMITS.max_choices


@given(st.integers(1, (1 << 32) - 1))
def test_any_max_tokens_above_zero_is_taken(max_tokens: int) -> None:
    assert spec_of(stopping(max_tokens=max_tokens)).max_tokens == max_tokens


# ---- the prompt


@pytest.mark.parametrize("kind", [pb.GenerateRequest, pb.GenerateStreamRequest])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: None, "input"),
        (lambda r: setattr(r, "text", ""), "text"),
        (lambda r: r.token_ids.SetInParent(), "token_ids"),
        (lambda r: r.chat.SetInParent(), "chat"),
        (lambda r: r.chat.messages.add(content="hi"), "chat.messages[0].role"),
    ],
    ids=["no input", "empty text", "no token ids", "no messages", "no role"],
)
def test_a_request_without_a_prompt_is_refused(kind: type[Request], change: Change, field: str) -> None:
    request = kind()
    change(request)

    assert refused(request).field == field


def test_the_message_without_a_role_is_named() -> None:
    messages = [pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(content="hi")]

    assert refused(pb.GenerateRequest(chat=pb.ChatMessages(messages=messages))).field == "chat.messages[1].role"


def test_messages_keep_their_order_and_may_be_empty() -> None:
    messages = [pb.ChatMessage(role="system"), pb.ChatMessage(role="user", content="hi")]

    assert spec_of(pb.GenerateRequest(chat=pb.ChatMessages(messages=messages))).input == Chat(
        messages=(Message(role="system", content=""), Message(role="user", content="hi"))
    )


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=5))
def test_token_ids_inside_the_vocabulary_are_taken(ids: list[int]) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))

    assert spec_of(request).input == TokenIds(ids=tuple(ids))


@given(st.integers(VOCAB_SIZE, (1 << 32) - 1), st.integers(0, 3))
def test_a_token_id_outside_the_vocabulary_is_named(beyond: int, place: int) -> None:
    ids = [1, 2, 3]
    ids.insert(place, beyond)
    error = refused(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids)))

    assert str(error) == f"token_ids: must be in [0, 100), got {beyond} at index {place}"


def test_ids_to_detokenize_are_checked_alike() -> None:
    assert token_ids("token_ids", (0, 99), VOCAB_SIZE) == (0, 99)
    with pytest.raises(InvalidRequest, match="got 100"):
        token_ids("token_ids", (100,), VOCAB_SIZE)


def test_a_text_to_tokenize_is_checked_alike() -> None:
    assert input_from_pb(pb.TokenizeRequest(text="hi"), LIMITS, vocab_size=VOCAB_SIZE) == Text(text="hi")
    with pytest.raises(InvalidRequest, match="input: one of text"):
        input_from_pb(pb.TokenizeRequest(), LIMITS, vocab_size=VOCAB_SIZE)


# ---- stop conditions


def test_stop_strings_at_their_limits_are_taken() -> None:
    assert spec_of(stopping(stop=["a", "b", "12345"])).stop_strings == ("a", "b", "12345")


@pytest.mark.parametrize("stop", [["a"] * 4, [""], ["a", "123456"], ["ééé"]], ids=["many", "empty", "long", "bytes"])
def test_stop_strings_beyond_their_limits_are_refused(stop: list[str]) -> None:
    assert refused(stopping(stop=stop)).field == "stop"


def test_stop_token_ids_at_their_limits_are_taken() -> None:
    assert spec_of(stopping(stop_token_ids=[0, 99])).stop_token_ids == (0, 99)


@pytest.mark.parametrize("ids", [[100], [1, 2, 3]], ids=["outside the vocabulary", "many"])
def test_stop_token_ids_beyond_their_limits_are_refused(ids: list[int]) -> None:
    assert refused(stopping(stop_token_ids=ids)).field == "stop_token_ids"


def test_where_an_id_is_outside_the_vocabulary_is_told() -> None:
    assert "got 100 at index 1" in refused(stopping(stop_token_ids=[99, 100])).problem
    assert "got 101 at index 2" in refused(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[100, 7, 101]))).problem


# ---- lists of tokens and words


def test_lists_at_their_limits_are_taken() -> None:
    asked = {"allowed_token_ids": [0, 99, 1], "banned_token_ids": [2, 3, 4], "bad_words": ["1234", "é"]}
    spec = spec_of(sampling(**asked, logit_bias={0: -10, 99: 10}))

    assert spec.sampling.allowed_token_ids == (0, 99, 1)
    assert spec.sampling.banned_token_ids == (2, 3, 4)
    assert spec.sampling.logit_bias == ((0, -10), (99, 10))
    assert spec.bad_words == ("1234", "é")


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"logit_bias": {1: 1, 2: 1, 3: 1}}, "logit_bias: at most 2, got 3"),
        ({"logit_bias": {100: 1}}, "logit_bias: is for tokens in [0, 100), got one for 100"),
        ({"allowed_token_ids": [1, 2, 3, 4]}, "allowed_token_ids: at most 3, got 4"),
        ({"allowed_token_ids": [1, 100]}, "allowed_token_ids: must be in [0, 100), got 100 at index 1"),
        ({"banned_token_ids": [1, 2, 3, 4]}, "banned_token_ids: at most 3, got 4"),
        ({"banned_token_ids": [100]}, "banned_token_ids: must be in [0, 100), got 100 at index 0"),
        (
            {"allowed_token_ids": [1, 2], "banned_token_ids": [3, 2]},
            "banned_token_ids: must not be in allowed_token_ids too, got 2",
        ),
        ({"bad_words": ["a", "b", "c"]}, "bad_words: at most 2, got 3"),
        ({"logprobs": 4}, "logprobs: must be in [0, 3], got 4"),
        ({"prompt_logprobs": 4}, "prompt_logprobs: must be in [0, 3], got 4"),
        ({"bad_words": [""]}, "bad_words: each string must have 1 to 4 bytes, got 0"),
        ({"bad_words": ["ok", "ééé"]}, "bad_words: each string must have 1 to 4 bytes, got 6"),
    ],
    ids=str,
)
def test_a_list_beyond_its_limits_is_refused_by_name(asked: dict[str, Any], problem: str) -> None:
    assert str(refused(sampling(**asked))) == problem


# ---- request ids


def test_a_request_id_is_kept() -> None:
    longest = "x" * 128

    assert spec_of(pb.GenerateRequest(text="hi", request_id=longest)).request_id == longest


def test_a_request_id_that_is_not_given_is_made() -> None:
    first, second = (spec_of(pb.GenerateRequest(text="hi")).request_id for _ in range(2))

    assert first != second


@pytest.mark.parametrize("request_id", ["x" * 129, "a\nERROR forged line", "a\x1b[31m", "ünicode", " "])
def test_a_request_id_that_would_spoil_a_log_is_refused(request_id: str) -> None:
    assert refused(pb.GenerateRequest(text="hi", request_id=request_id)).field == "request_id"


# ---- answers

USAGE = Usage(prompt_tokens=1, cached_prompt_tokens=2, completion_tokens=3, queue_ns=4, prefill_ns=5, decode_ns=6)
USAGE_PB = pb.Usage(prompt_tokens=1, cached_prompt_tokens=2, completion_tokens=3, queue_ns=4, prefill_ns=5, decode_ns=6)


def a_finish(reason: FinishReason, stop: str | None = None, token: int | None = None) -> Finish:
    return Finish(choice=2, reason=reason, matched_stop=stop, matched_token_id=token, usage=USAGE)


def test_a_delta_tells_all_it_has() -> None:
    delta = Delta(choice=1, index=7, token_ids=[5, 6], text="hi")

    assert message_of(delta) == pb.Delta(choice=1, index=7, token_ids=[5, 6], text="hi")


def spell(token: int) -> bytes:
    return bytes((token,))


def message_of(delta: Delta) -> pb.Delta:
    message = pb.Delta()
    fill_delta(message, delta, spell)
    return message


def test_log_probabilities_come_with_the_text_of_their_tokens() -> None:
    scores = [Logprobs(-0.5, (6, 5), (-0.25, -0.5)), None]
    delta = Delta(choice=1, index=7, token_ids=[5, 6], text="hi", logprobs=scores)

    assert list(message_of(delta).logprobs) == [
        pb.TokenLogprobs(
            token=pb.TokenLogprob(token_id=5, logprob=-0.5, text=b"\x05"),
            top=[
                pb.TokenLogprob(token_id=6, logprob=-0.25, text=b"\x06"),
                pb.TokenLogprob(token_id=5, logprob=-0.5, text=b"\x05"),
            ],
        ),
        pb.TokenLogprobs(token=pb.TokenLogprob(token_id=6, text=b"\x06")),
    ]


def test_a_part_of_the_prompt_says_where_it_begins() -> None:
    part = PromptLogprobs(index=256, token_ids=[5], logprobs=[Logprobs(-0.5)])

    message = prompt_logprobs_pb(part, spell)

    token = pb.TokenLogprob(token_id=5, logprob=-0.5, text=b"\x05")
    assert message == pb.PromptLogprobs(index=256, logprobs=[pb.TokenLogprobs(token=token)])


@pytest.mark.parametrize("reason", [reason for reason in FinishReason if reason is not FinishReason.NONE])
def test_a_finish_tells_its_reason_by_name(reason: FinishReason) -> None:
    message = finish_pb(a_finish(reason))

    assert pb.FinishReason.Name(message.reason) == f"FINISH_REASON_{reason.name}"
    assert (message.choice, message.usage) == (2, USAGE_PB)


def test_a_finish_without_a_match_names_none_and_token_zero_is_a_match() -> None:
    by_length = finish_pb(a_finish(FinishReason.LENGTH))
    by_token = finish_pb(a_finish(FinishReason.STOP_TOKEN, token=0))
    by_string = finish_pb(a_finish(FinishReason.STOP_STRING, stop="end"))

    assert not by_length.HasField("matched_stop") and not by_length.HasField("matched_token_id")
    assert by_token.HasField("matched_token_id") and by_token.matched_token_id == 0
    assert by_string.matched_stop == "end"


@pytest.mark.parametrize(
    "finish",
    [
        a_finish(FinishReason.LENGTH),
        a_finish(FinishReason.STOP_TOKEN, token=0),
        a_finish(FinishReason.STOP_STRING, stop="end"),
    ],
    ids=lambda finish: finish.reason.name,
)
def test_the_unary_answer_ends_a_choice_like_the_stream(finish: Finish) -> None:
    choice, end = pb.Choice(index=2, text="hi"), finish_pb(finish)
    fill_finish(choice, finish)

    assert choice == pb.Choice(
        index=2,
        text="hi",
        reason=end.reason,
        matched_stop=end.matched_stop if end.HasField("matched_stop") else None,
        matched_token_id=end.matched_token_id if end.HasField("matched_token_id") else None,
        usage=end.usage,
    )
