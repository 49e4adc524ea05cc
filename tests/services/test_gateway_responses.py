"""What a response says of text and calls, in which events, and that its stream goes on in any of them."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import Unavailable
from protos import inference_pb2 as pb
from services.gateway.positions import Heard, Writer, pack_prompt
from tests.services.gateway_calls import Call, Scheduler, ask, finish, gateway

PATH = "/v1/responses"
CLOCK: dict[str, Any] = {"type": "function", "name": "clock", "parameters": {"type": "object"}}
ASKED: dict[str, Any] = {"input": "hi", "request_id": "mine", "seed": 7, "tools": [CLOCK]}


def part(index: int, arguments: str, id: str = "", name: str = "") -> pb.ToolCallDelta:
    return pb.ToolCallDelta(index=index, id=id, name=name, arguments=arguments)


def said(*each: str | list[pb.ToolCallDelta], scored: bool = False) -> list[pb.GenerateStreamResponse]:
    """A token each, with text or parts of calls."""
    deltas: list[pb.GenerateStreamResponse] = []
    for i, new in enumerate(each):
        text, parts = (new, []) if isinstance(new, str) else ("", new)
        logprob = pb.TokenLogprobs(token=pb.TokenLogprob(token_id=i, text=text.encode(), logprob=-float(i)))
        deltas.append(
            pb.GenerateStreamResponse(
                delta=pb.Delta(
                    index=i, token_ids=[i], text=text, tool_calls=parts, ticket=b"t", logprobs=[logprob] * scored
                )
            )
        )
    return deltas


def numbered(messages: list[pb.GenerateStreamResponse]) -> list[pb.GenerateStreamResponse]:
    """The same from the first token on, with ids of their own."""
    copies = [pb.GenerateStreamResponse.FromString(message.SerializeToString()) for message in messages]
    for i, message in enumerate(copies):
        message.delta.index = i
        message.delta.token_ids[:] = [i]
    return copies


TWO_CALLS = said(
    "One ", "moment", "", [part(0, "", "a", "clock")], [part(0, '{"x":')], [part(0, "1}"), part(1, "{", "b", "clock")],
    [part(1, "}")],
)  # fmt: skip


def told(*messages: pb.GenerateStreamResponse, last: str | bytes = b"", **asked: Any) -> Call:
    headers = [(b"last-event-id", bytes(last, "ascii") if isinstance(last, str) else last)] if last else []
    app = gateway(Scheduler(*messages, finish(pb.FINISH_REASON_TOOL_CALLS)))
    return ask(app, {**ASKED, "stream": True, **asked}, path=PATH, headers=headers)


def kinds(call: Call) -> list[str]:
    return [event["type"].removeprefix("response.") for event in call.events]


def test_a_stream_tells_its_usage_also_where_that_is_asked_for() -> None:
    call = told(*TWO_CALLS, stream_options={"include_usage": True})

    assert call.status == 200
    assert call.events[-1]["response"]["usage"]["input_tokens"] == 3


def test_text_and_calls_are_items_that_begin_and_end_one_after_the_other() -> None:
    call = told(*TWO_CALLS)
    whole = ask(gateway(Scheduler(*TWO_CALLS, finish(pb.FINISH_REASON_TOOL_CALLS))), ASKED, path=PATH).json

    assert kinds(call) == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in call.events] == list(range(len(call.events)))
    message, *calls = call.events[-1]["response"]["output"]
    assert message["content"][0]["text"] == "One moment"
    assert [(c["call_id"], c["name"], c["arguments"], c["status"]) for c in calls] == [
        ("a", "clock", '{"x":1}', "completed"),
        ("b", "clock", "{}", "completed"),
    ]
    done = [event for event in call.events if event["type"] == "response.output_item.done"]
    assert [event["item"] for event in done] == [message, *calls]
    assert [event["output_index"] for event in done] == [0, 1, 2]
    assert whole["output"] == [message, *calls]
    assert whole["tools"][0]["name"] == "clock" and whole["tool_choice"] == "auto"


def test_a_response_repeats_which_tools_it_was_allowed_and_how_what_is_too_long_is_cut() -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}
    asked = {**ASKED, "tool_choice": choice, "truncation": "auto"}
    told = ask(gateway(Scheduler(*said("Hi"), finish())), asked, path=PATH).json

    assert told["tool_choice"] == choice and told["truncation"] == "auto"


def test_the_event_of_an_error_has_the_number_behind_the_last_one() -> None:
    app = gateway(Scheduler(*said("One moment"), then=Unavailable("no executor")))
    call = ask(app, {**ASKED, "stream": True}, path=PATH)

    assert call.events[-1]["type"] == "error" and len(call.events) > 2
    assert [event["sequence_number"] for event in call.events] == list(range(len(call.events)))


def test_an_answer_that_only_calls_has_no_message_and_one_that_says_nothing_has_an_empty_one() -> None:
    called = told(*said([part(0, "{}", "a", "clock")]))
    silent = told(*said(""))

    assert [item["type"] for item in called.events[-1]["response"]["output"]] == ["function_call"]
    assert "output_text.delta" not in kinds(called)
    assert kinds(silent)[2:-1] == [
        "output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
    ]  # fmt: skip


def test_a_call_that_was_cut_short_is_incomplete_and_those_before_it_are_not() -> None:
    messages = said([part(0, "{}", "a", "clock")], [part(1, "{", "b", "clock")])
    call = ask(gateway(Scheduler(*messages, finish(pb.FINISH_REASON_LENGTH))), ASKED, path=PATH)

    assert [item["status"] for item in call.json["output"]] == ["completed", "incomplete"]
    assert call.json["status"] == "incomplete"


@pytest.mark.parametrize("messages", [TWO_CALLS, TWO_CALLS[3:], said("One", ""), said("")])
def test_who_asks_for_token_ids_gets_each_once_in_the_events_and_all_in_the_response(
    messages: list[pb.GenerateStreamResponse],
) -> None:
    messages = numbered(messages)
    app = gateway(Scheduler(*messages, finish()))
    whole = ask(app, {**ASKED, "return_token_ids": True}, path=PATH).json
    call = told(*messages, return_token_ids=True)

    *events, last = call.events
    assert whole["token_ids"] == last["response"]["token_ids"] == list(range(len(messages)))
    assert [id for event in events for id in event.get("token_ids", ())] == whole["token_ids"]
    assert not any("token_ids" in event for event in told(*messages).events)


@pytest.mark.parametrize("more", [{}, {"include": ["message.output_text.logprobs"]}, {"return_token_ids": True}])
@pytest.mark.parametrize("messages", [TWO_CALLS, TWO_CALLS[3:], TWO_CALLS[:3]], ids=["text and calls", "calls", "text"])
def test_a_stream_goes_on_behind_any_event_that_has_an_id(
    messages: list[pb.GenerateStreamResponse], more: dict[str, Any]
) -> None:
    messages = numbered(messages)
    whole = told(*messages, **more)
    assert len(whole.ids) >= 2

    lines = b"".join(whole.parts).splitlines()
    for id in whole.ids:
        at = lines.index(b"id: " + id)
        heard = sum(line.startswith(b"data: ") for line in lines[: at + 2])
        rest = told(*messages, last=id, **more)
        assert whole.events[:heard] + rest.events == whole.events


def test_an_id_with_calls_that_were_never_told_is_refused_and_no_bug() -> None:
    forged = Heard(calls=3, digest=bytes(8))
    id = Writer("mine", 7, 0, prompts=1, choices=1).id(1, pack_prompt(9) + forged.packed())

    call = told(*TWO_CALLS, last=id)

    assert call.events[-1]["code"] == "resume_refused"


def test_tokens_that_open_a_call_are_no_part_of_the_text_that_is_scored() -> None:
    messages = said("One ", "moment", "", [part(0, "{}", "a", "clock")], scored=True)
    call = told(*messages, include=["message.output_text.logprobs"])

    streamed = [p["token"] for event in call.events if event["type"].endswith("text.delta") for p in event["logprobs"]]
    (done,) = [event for event in call.events if event["type"] == "response.output_text.done"]
    message = call.events[-1]["response"]["output"][0]
    assert streamed == [p["token"] for p in done["logprobs"]] == ["One ", "moment"]
    assert message["content"][0]["logprobs"] == done["logprobs"]


def test_every_token_is_scored_where_nothing_is_called() -> None:
    messages = said("One ", "", scored=True)
    for tools in ([], [CLOCK]):
        call = told(*messages, include=["message.output_text.logprobs"], tools=tools)

        streamed = [p for event in call.events if event["type"].endswith("text.delta") for p in event["logprobs"]]
        assert [p["token"] for p in streamed] == ["One ", ""]
        assert call.events[-1]["response"]["output"][0]["content"][0]["logprobs"] == streamed


def test_what_is_only_repeated_must_be_text_for_it_is_written_into_the_answer() -> None:
    app = gateway(Scheduler(*said("a"), finish()))
    for asked, param in (({"metadata": {"a": float("nan")}}, "metadata.a"), ({"user": 5}, "user")):
        assert ask(app, {**ASKED, **asked}, path=PATH).json["error"]["param"] == param
    assert ask(app, {**ASKED, "metadata": {"a": "b"}}, path=PATH).json["metadata"] == {"a": "b"}
