"""What was asked for beyond OpenAI's API is told in the answer, whole and streamed, or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from protos import inference_pb2 as pb
from tests.services.gateway_calls import CHAT, HI, Call, Scheduler, ask, delta, gateway

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {CHAT: HI, COMPLETIONS: {"prompt": "hi"}, RESPONSES: {"input": "hi"}}
PATHS = pytest.mark.parametrize("path", list(BODIES))
STREAM = pytest.mark.parametrize("stream", [False, True])

PINNED = pb.PinnedPrefix(pin_id="pin-1", tokens=16, expires_s=1_900_000_000)
SCORED = pb.TokenLogprobs(token=pb.TokenLogprob(token_id=5, logprob=-0.5, text=b"hi"))
BEGUN = pb.GenerateStreamResponse(prompt=pb.PromptInfo(model="m", pinned=PINNED))
PROMPT = pb.GenerateStreamResponse(prompt_logprobs=pb.PromptLogprobs(logprobs=[SCORED, SCORED]))
ENDED = pb.GenerateStreamResponse(
    finish=pb.Finish(reason=pb.FINISH_REASON_EOS, usage=pb.Usage(prompt_tokens=2), score=-1.5)
)


def told(*messages: pb.GenerateStreamResponse, path: str, **asked: Any) -> Call:
    call = ask(
        gateway(Scheduler(*messages, delta(0, 7, ""), delta(1, 8, "é"), ENDED)), {**BODIES[path], **asked}, path=path
    )
    assert call.status == 200, call.json
    return call


def found(call: Call, name: str) -> list[Any]:
    """Each member of this name, wherever it is."""

    def walk(value: Any) -> list[Any]:
        if isinstance(value, list):
            return [each for inner in value for each in walk(inner)]
        if not isinstance(value, dict):
            return []
        return ([value[name]] if name in value else []) + walk(list(value.values()))

    return walk(call.events if call.headers["content-type"].startswith("text/event-stream") else call.json)


@PATHS
@STREAM
def test_a_pin_is_told_with_when_it_ends(path: str, stream: bool) -> None:
    call = told(BEGUN, path=path, stream=stream, pin_seconds=60)

    assert found(call, "pinned") == [{"id": "pin-1", "tokens": 16, "expires": 1_900_000_000}]


@PATHS
@STREAM
def test_who_pins_nothing_and_searches_no_beams_hears_nothing_of_that(path: str, stream: bool) -> None:
    plain = pb.GenerateStreamResponse(finish=pb.Finish(reason=pb.FINISH_REASON_EOS))
    call = ask(gateway(Scheduler(delta(0, 7, "a"), plain)), {**BODIES[path], "stream": stream}, path=path)

    assert call.status == 200
    assert [found(call, name) for name in ("pinned", "score", "prompt_logprobs")] == [[], [], []]


@PATHS
@STREAM
def test_an_answer_of_a_beam_search_has_its_score(path: str, stream: bool) -> None:
    assert found(told(path=path, stream=stream, beams=2), "score") == [-1.5]


@PATHS
@STREAM
@pytest.mark.parametrize("echo", [False, True])
def test_how_likely_a_prompt_was_is_told_once(path: str, stream: bool, echo: bool) -> None:
    asked = {"echo": True} if echo and path == COMPLETIONS else {}
    call = told(PROMPT, path=path, stream=stream, prompt_logprobs=0, **asked)

    (each,) = found(call, "prompt_logprobs")
    assert [(token["token"], token["logprob"]) for token in each] == [("hi", -0.5)] * 2


@STREAM
def test_an_echoed_prompt_s_log_probabilities_are_told_before_the_answer_s_and_not_again(stream: bool) -> None:
    call = told(PROMPT, path=COMPLETIONS, stream=stream, echo=True, logprobs=0, prompt_logprobs=0)

    assert found(call, "prompt_logprobs") == []
    assert found(call, "token_logprobs")[0][:2] == [-0.5, -0.5]


def test_two_numbers_for_the_log_probabilities_of_one_prompt_are_refused() -> None:
    asked = {"prompt": "hi", "echo": True, "logprobs": 0, "prompt_logprobs": 2}
    call = ask(gateway(Scheduler()), asked, path=COMPLETIONS)

    assert call.status == 400 and call.json["error"]["param"] == "prompt_logprobs"


def test_the_likeliest_tokens_of_a_response_are_for_those_who_include_log_probabilities() -> None:
    call = ask(gateway(Scheduler()), {"input": "hi", "top_logprobs": 2}, path=RESPONSES)

    assert call.status == 400 and call.json["error"]["param"] == "top_logprobs"
    assert "include message.output_text.logprobs" in call.json["error"]["message"]
    told(path=RESPONSES, top_logprobs=0)  # asks for nothing
