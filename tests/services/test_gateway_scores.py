"""Log-probabilities of whole answers: what they are in JSON, what memory they have, and that others go on meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from common.errors import InvalidRequest, Overloaded
from pagewire.continuation import Continuation
from pagewire.scores import Scores
from protos import inference_pb2 as pb
from services.gateway import scores
from services.gateway.held_scores import HeldScores
from services.gateway.long_json import Long, in_turns, pieces
from tests.services.gateway_calls import CHAT, HI, Call, Scheduler, Stream, ask, finish, gateway

COMPLETIONS = "/v1/completions"
SCORED: dict[str, Any] = {**HI, "logprobs": True, "top_logprobs": 20}
FREE = 1 << 16


@cache
def scored(i: int, text: bytes = b" word", num_top: int = 20, *, first: bool = False) -> pb.TokenLogprobs:
    each = [pb.TokenLogprob(token_id=i + k, logprob=-1.5 - k / 7, text=text + b"%d" % k) for k in range(num_top + 1)]
    if first:
        each[0].ClearField("logprob")
        del each[1:]
    return pb.TokenLogprobs(token=each[0], top=each[1:])


def said(count: int, *, prompt: int = 0) -> list[pb.GenerateStreamResponse]:
    """A prompt and an answer of so many tokens, each with the twenty likeliest in its place."""
    of_prompt = pb.PromptLogprobs(logprobs=[scored(i, first=not i) for i in range(prompt)])
    return [pb.GenerateStreamResponse(prompt_logprobs=of_prompt)] * bool(prompt) + [
        pb.GenerateStreamResponse(delta=pb.Delta(index=i, token_ids=[i], text=" w", ticket=b"t", logprobs=[scored(i)]))
        for i in range(count)
    ]


def kept(*told: pb.TokenLogprobs) -> Scores:
    found = Scores()
    found.put(0, told)
    return found


def kept_bytes(count: int) -> int:
    return Scores().put(0, map(scored, range(count)))


def test_a_long_list_is_written_as_a_short_one() -> None:
    for count in (0, 1, 31, 32, 33, 100):
        values = [{"a": i, "é": None} for i in range(count)]
        whole = {"choices": [{"x": Long(values.copy), "y": "long-0"}], "z": Long(lambda: "ab")}

        written = list(pieces(whole))

        assert "".join(written) == json.dumps({"choices": [{"x": values, "y": "long-0"}], "z": ["a", "b"]})
        assert len(written) > count / 32
    assert list(pieces({"a": [1, {}]})) == ['{"a": [1, {}]}']


def test_a_whole_answer_says_of_its_tokens_what_its_pieces_say() -> None:
    told = [scored(0, b"a", first=True), scored(1, b"\xc3", 0), scored(2, b"\xa9\xff"), *map(scored, range(70))]
    objects = list(kept(*told))

    assert "".join(pieces(scores.all_of_chat(kept(*told)))) == json.dumps(scores.of_chat(objects))
    all_of_them = json.dumps(scores.of_completion(objects, scores.Offsets()))
    assert "".join(pieces(scores.all_of_completion(kept(*told)))) == all_of_them
    assert "".join(pieces(scores.all_of_completion(kept(*told[:9]), objects[9:]))) == all_of_them
    assert "".join(pieces(scores.all_of_completion(kept(*told[:9]) + kept(*told[9:])))) == all_of_them


USAGE = pb.Usage(prompt_tokens=2, completion_tokens=1)
TOKENS = [b"\xe6\x97", b"\xa5", b"\xf0", b"\x9f", b"\x98", b"\x80", " é".encode(), b"\xff", b" nice", b"!"]
TEXTS = ["", "日", "", "", "", "😀", " é", "\ufffd", " nice", "!"]
STARTS = [0, 0, 1, 1, 1, 1, 2, 4, 5, 10]


def of_tokens(*, of_prompt: bool = False) -> list[pb.GenerateStreamResponse]:
    told = [pb.TokenLogprobs(token=pb.TokenLogprob(token_id=i, logprob=-1, text=t)) for i, t in enumerate(TOKENS)]
    prompt = [pb.GenerateStreamResponse(prompt_logprobs=pb.PromptLogprobs(logprobs=told))] * of_prompt
    return prompt + [
        pb.GenerateStreamResponse(delta=pb.Delta(index=i, token_ids=[i], text=text, ticket=b"t", logprobs=[told[i]]))
        for i, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_a_token_that_ends_no_character_stands_where_the_character_begins(stream: bool, echo: bool) -> None:
    app = gateway(Scheduler(*of_tokens(of_prompt=echo), finish()))
    asked = {"prompt": "".join(TEXTS), "logprobs": 0, "echo": echo, "stream": stream}
    call = ask(app, asked, path=COMPLETIONS)

    choices = [c for each in (call.events[:-1] if stream else [call.json]) for c in each["choices"]]
    offsets = [offset for c in choices if c["logprobs"] for offset in c["logprobs"]["text_offset"]]
    behind = [len("".join(TEXTS)) + start for start in STARTS]
    assert offsets == (STARTS + behind if echo else STARTS)


def test_a_stream_counts_what_scoring_a_prompt_took_as_a_whole_answer_does() -> None:
    said = of_tokens(of_prompt=True)[:2]
    app = gateway(
        Scheduler(*said, pb.GenerateStreamResponse(finish=pb.Finish(reason=pb.FINISH_REASON_LENGTH, usage=USAGE)))
    )
    asked = {"prompt": "a", "logprobs": 0, "echo": True, "max_tokens": 0}
    stream = ask(app, {**asked, "stream": True, "stream_options": {"include_usage": True}}, path=COMPLETIONS)

    usage = ask(app, asked, path=COMPLETIONS).json["usage"]
    assert stream.events[-2]["usage"] == usage
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 0, 2)


def test_where_tokens_begin_is_told_alike_by_a_stream_that_goes_on() -> None:
    asked = {"prompt": "a", "logprobs": 0, "stream": True, "request_id": "mine", "seed": 7}
    app = gateway(Scheduler(*of_tokens(), finish()))
    ids = ask(app, asked, path=COMPLETIONS).ids

    for told, id in enumerate(ids[: len(TOKENS)], 1):
        rest = ask(app, asked, path=COMPLETIONS, headers=[(b"last-event-id", id)]).events[:-1]
        offsets = [
            offset
            for event in rest
            for c in event["choices"]
            if c["logprobs"]
            for offset in c["logprobs"]["text_offset"]
        ]
        assert offsets == STARTS[told:]


def test_what_is_kept_of_a_token_and_the_twenty_likeliest_is_half_a_kilobyte() -> None:
    heard = Continuation(pb.GenerateStreamRequest())
    sizes: list[int] = []
    heard.on_kept = sizes.append

    for message in said(10, prompt=5):
        heard.hear(message)

    assert len(sizes) == 11
    assert sum(sizes) < 15 * 512
    heard.forget_prompt_logprobs()
    for message in said(0, prompt=5):  # it comes again
        heard.hear(message)
        heard.hear(message)
    assert sum(sizes[:11]) == sum(sizes)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**SCORED, "prompt_logprobs": 20}),
        (COMPLETIONS, {"prompt": "a", "logprobs": 20, "echo": True}),
        (COMPLETIONS, {"prompt": "a", "logprobs": 20, "prompt_logprobs": 20}),
        ("/v1/responses", {"input": "a", "include": ["message.output_text.logprobs"], "top_logprobs": 20}),
    ],
)
def test_a_large_answer_is_written_in_parts_and_others_have_their_turns_meanwhile(
    path: str, body: dict[str, Any]
) -> None:
    turns: list[int] = []

    class Counting(Call):
        async def send(self, message: Any) -> None:
            await super().send(message)
            turns.append(num_turns)

    num_turns = 0

    async def run() -> Counting:
        async def others() -> None:
            nonlocal num_turns
            while True:
                await asyncio.sleep(0)
                num_turns += 1

        waiting = asyncio.create_task(others())
        call = Counting(body, path=path)
        app = gateway(Scheduler(*said(200, prompt=100), finish()))
        await app(call.scope, call.receive, call.send)
        waiting.cancel()
        return call

    call = asyncio.run(run())

    assert call.status == 200 and "content-length" not in call.headers
    assert json.dumps(call.json).encode() == b"".join(call.parts)
    assert len(call.parts) > 2 and max(map(len, call.parts)) < 4 << 16
    assert turns[-1] - turns[1] > 200 // 32
    assert all(before < later for before, later in pairwise(turns[1:-1]))


def test_a_small_answer_is_written_at_once_with_its_length() -> None:
    call = ask(gateway(Scheduler(*said(3), finish())), {**SCORED, "top_logprobs": 2})

    assert len(call.parts) == 1 and call.headers["content-length"] == str(len(call.parts[0]))
    assert [each["token_id"] for each in call.json["choices"][0]["logprobs"]["content"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, SCORED, "top_logprobs"),
        (CHAT, {**HI, "prompt_logprobs": 20}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 20, "echo": True, "max_tokens": 0}, "logprobs"),
        (COMPLETIONS, {"prompt": ["a", "b", "c"], "logprobs": 20}, "logprobs"),
        (
            "/v1/responses",
            {"input": "a", "include": ["message.output_text.logprobs"], "stream": True},
            "top_logprobs",
        ),
    ],
)
def test_an_answer_of_too_many_log_probabilities_is_refused_in_words_and_ended(
    path: str, body: dict[str, Any], param: str
) -> None:
    is_stream = body.get("stream", False)
    scheduler = Scheduler(*said(150, prompt=0 if is_stream else 150))  # and it goes on

    call = ask(gateway(scheduler, max_scores_bytes=80_000), body, path=path)

    error = call.events[-1] if is_stream else call.json["error"]
    assert error["param"] == param
    assert "40000 bytes" in error["message"] and "several requests" in error["message"]
    assert call.status == (200 if is_stream else 400)
    assert all(stream.closed == [False] for stream in scheduler.streams)


def test_a_stream_holds_only_what_it_has_not_told() -> None:
    app = gateway(Scheduler(*said(100, prompt=100), finish()), max_scores_bytes=100_000)
    asked = {"prompt": "a", "logprobs": 20, "echo": True}

    assert ask(app, asked, path=COMPLETIONS).status == 400
    call = ask(app, {**asked, "stream": True, "stream_options": {"include_usage": True}}, path=COMPLETIONS)

    told = [event["choices"][0]["logprobs"] for event in call.events[:-3]]
    assert [len(each["tokens"]) for each in told] == [101, *[1] * 99]
    assert all(set(each) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"} for each in told)
    chat = ask(app, {**HI, "prompt_logprobs": 20, "stream": True})
    assert len(chat.events[0]["prompt_logprobs"]) == 100 and chat.events[-1] == "[DONE]"


class Changing(Scheduler):
    """What it says to the next request can be changed."""

    says: Sequence[pb.GenerateStreamResponse] = ()

    def ask(self, request: pb.GenerateStreamRequest, key: str) -> Stream:
        self.streams.append(Stream(request, self.says, None))
        return self.streams[-1]


class Stuck(Call):
    """Its reader takes nothing of what is written."""

    async def send(self, message: Any) -> None:
        await super().send(message)
        await asyncio.Event().wait()


@pytest.mark.parametrize("leaves", [0, 1])
def test_where_others_hold_all_of_it_an_answer_is_to_come_back_later_but_for_a_small_one(leaves: int) -> None:
    most = 600  # tokens of one answer: over three times what each has free
    max_bytes = 2 * kept_bytes(most)
    scheduler = Changing()
    app = gateway(scheduler, max_scores_bytes=max_bytes)

    begun = said(most)

    async def answer(count: int) -> Call:
        scheduler.says = [*begun[:count], finish()]
        call = Call(SCORED)
        await app(call.scope, call.receive, call.send)
        return call

    async def run() -> None:
        making, writing = Call(SCORED), Stuck(SCORED)
        tasks: list[asyncio.Task[None]] = []
        for call, says in ((making, begun), (writing, [*begun, finish()])):
            scheduler.says = says
            tasks.append(asyncio.create_task(app(call.scope, call.receive, call.send)))
            while len(scheduler.streams) < len(tasks):
                await asyncio.sleep(0)
        while not writing.status or len(scheduler.streams[0].continuation.token_ids(0)) < most:
            await asyncio.sleep(0)

        refused = await answer(most)
        assert refused.status == 429 and refused.headers["retry-after"] == "5"
        assert f"{max_bytes} bytes" in refused.json["error"]["message"]
        assert (await answer(100)).status == 200  # a small one
        assert not any(task.done() for task in tasks)  # nobody else was disturbed
        (making, writing)[leaves].left.set()  # its reader leaves
        await tasks[leaves]
        assert [(await answer(most)).status for _ in range(2)] == [200, 200]  # each gives back what it held
        making.left.set()
        writing.left.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_of_what_all_hold_each_has_its_beginning_free_and_at_most_a_half() -> None:
    held = HeldScores(max_bytes=10 * FREE)
    first, second, third = (held.share("logprobs") for _ in range(3))

    first.take(5 * FREE)
    with pytest.raises(InvalidRequest, match=f"logprobs: .*{5 * FREE} bytes"):
        first.take(1)
    first.take(-1)
    second.take(5 * FREE)
    assert held.num_bytes == 8 * FREE
    third.take(3 * FREE)
    with pytest.raises(Overloaded, match=f"{10 * FREE} bytes"):
        third.take(1)
    fourth = held.share("logprobs")
    fourth.take(FREE)
    with pytest.raises(Overloaded):
        fourth.take(1)
    second.give_back()
    fourth.take(1)
    for share in (first, second, third, fourth):
        share.give_back()
    assert held.num_bytes == 0


def test_what_is_written_in_turns_is_what_is_written_at_once() -> None:
    assert asyncio.run(in_turns({"a": Long(lambda: range(100))})) == json.dumps({"a": list(range(100))})
