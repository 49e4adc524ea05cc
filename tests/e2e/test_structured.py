"""Structured output over real processes: every kind, in a crowd, when blocks run out, when an executor is killed."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from common.errors import InvalidRequest
from pagewire import Answer, Client, FinishReason
from protos import inference_pb2 as pb
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway
from tests.e2e.programs import PAGEWIRE, run
from tests.e2e.survivors import answers_through_a_kill
from tests.executor.schemas import problem

PROMPT = [70, 71, 72, 5, 9]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PEOPLE: dict[str, Any] = {"type": "array", "minItems": 2, "maxItems": 3, "items": PERSON}
SERIAL = r"([a-f]{3}-){4}[0-9]{2,9}"


def is_person(text: str) -> bool:
    return problem(json.loads(text), PEOPLE) is None


KINDS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "schema": ({"json_schema": PEOPLE}, is_person),
    "regex": ({"regex": SERIAL}, lambda text: re.fullmatch(SERIAL, text) is not None),
    "grammar": (
        {"grammar": 'start: "<" part{1,9} ">"\npart: /[a-z]{1,4}/ ";"'},
        lambda text: re.fullmatch(r"<([a-z]{1,4};){1,9}>", text) is not None,
    ),
    "choices": ({"choices": ["one", "oneness", 'zwölf "☃"\n']}, {"one", "oneness", 'zwölf "☃"\n'}.__contains__),
    "penalised": ({"json_schema": PEOPLE, "frequency_penalty": 0.5, "bad_words": ["a", "12"]}, is_person),
    "greedy": ({"regex": SERIAL, "temperature": 0.0, "min_tokens": 25, "logprobs": 2}, lambda text: len(text) >= 25),
}
TOOLS: dict[str, Any] = {
    "token_ids": None,
    "messages": [{"role": "user", "content": "Who is there?"}],
    "tools": [{"name": "tell", "parameters": {"type": "object", "properties": {"all": PEOPLE}, "required": ["all"]}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 180,
    "request_id": "calls",
}
FORMED: dict[str, Any] = {**TOOLS, "tool_choice": "auto", "json_schema": PEOPLE, "request_id": "formed"}
FREE: dict[str, Any] = {"ignore_eos": True}
DEFAULTS: dict[str, Any] = {"token_ids": PROMPT, "temperature": 1.0, "max_tokens": 200, "seed": 11}


def ask(running: Cluster, **settings: Any) -> Answer:
    with Client(running.address) as client:
        return client.generate(**{**DEFAULTS, **settings})


def asked_together(running: Cluster) -> dict[str, Answer]:
    """Every kind at once, between answers that are free."""
    settings = {name: asked for name, (asked, _) in KINDS.items()}
    settings |= {"tools": TOOLS, "free": FREE, "free too": {**FREE, "seed": 2}}
    with ThreadPoolExecutor(len(settings)) as pool:
        return dict(zip(settings, pool.map(lambda asked: ask(running, **asked), settings.values()), strict=True))


def said(answer: Answer) -> tuple[Any, ...]:
    return answer.token_ids, answer.text, answer.tool_calls, answer.finish.reason


def heard(answer: Answer) -> tuple[Any, ...]:
    return *said(answer), answer.logprobs


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_was_asked_for_and_ends_when_it_is_complete(server: Cluster, kind: str) -> None:
    settings, is_right = KINDS[kind]

    for seed in range(3):
        answer = ask(server, **settings, seed=seed)
        assert answer.finish.reason is FinishReason.EOS
        assert is_right(answer.text), answer.text


def test_any_json_object_is_one(server: Cluster) -> None:
    answer = ask(server, json_object=True, bad_words=['"'], max_tokens=400)

    assert isinstance(json.loads(answer.text), dict)


def test_every_choice_of_a_request_is_of_its_grammar(server: Cluster) -> None:
    answer = ask(server, regex=SERIAL, n=4)

    assert all(re.fullmatch(SERIAL, choice.text) for choice in answer.choices)
    assert len({choice.text for choice in answer.choices}) == 4


def test_a_crowd_gives_each_what_it_gets_alone(server: Cluster) -> None:
    alone = {name: heard(ask(server, **settings)) for name, (settings, _) in KINDS.items()}

    together = asked_together(server)

    assert {name: heard(together[name]) for name in KINDS} == alone


def test_structured_output_holds_when_blocks_run_out(server: Cluster, tiny: Path, tmp_path: Path) -> None:
    undisturbed = asked_together(server)
    running = Cluster(tiny, tmp_path, flags=["--log-format=json"])
    try:
        num = len(undisturbed)
        crowded = running.crowded(num, lambda: asked_together(running), "--num-blocks=60", "--block-size=4")
        preemptions = running.counters()["preemptions"]
    finally:
        running.close()

    assert {name: said(answer) for name, answer in crowded.items()} == {
        name: said(answer) for name, answer in undisturbed.items()
    }
    assert preemptions > 0


def test_structured_output_holds_when_an_executor_is_killed(server: Cluster, tiny: Path, tmp_path: Path) -> None:
    asked = [*(settings for settings, _ in KINDS.values()), TOOLS, FORMED]
    undisturbed = [ask(server, **settings) for settings in asked]
    answers, moved = answers_through_a_kill(tiny, tmp_path, [{**DEFAULTS, **settings} for settings in asked])

    assert moved > 0
    assert [heard(answer) for answer in answers] == [heard(answer) for answer in undisturbed]


def test_a_stream_goes_on_behind_any_token_as_if_it_had_never_ended(server: Cluster) -> None:
    sampling = pb.SamplingParams(seed=5, structured=pb.StructuredOutput(json_schema=json.dumps(PEOPLE)))
    asked = pb.GenerateStreamRequest(
        request_id="structured",
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=sampling,
        stopping=pb.StopConditions(max_tokens=300),
    )
    _, *deltas, end = server.stub.GenerateStream(asked)
    whole = [token for message in deltas for token in message.delta.token_ids]

    for number in range(0, len(deltas), 5):
        sent = [token for message in deltas[: number + 1] for token in message.delta.token_ids]
        point = pb.ResumePoint(choice=0, ticket=deltas[number].delta.ticket, token_ids=sent)
        _, *rest = server.stub.Resume(pb.ResumeRequest(request=asked, choices=[point]))
        assert sent + [token for message in rest[:-1] for token in message.delta.token_ids] == whole
        assert rest[-1].finish.reason == end.finish.reason


@pytest.mark.parametrize(
    ("settings", "field", "problem"),
    [
        ({"json_schema": '{"type": "strin"}'}, "json_schema", "Invalid type"),
        ({"json_schema": {"type": "integer", "multipleOf": 999983}}, "json_schema", "to compile"),
        ({"json_schema": {"$ref": "#"}}, "json_schema", "no text can be of it"),
        ({"json_schema": " " * 65_537}, "json_schema", "at most 65536 bytes"),
        ({"regex": "(("}, "regex", "unclosed group"),
        ({"regex": ""}, "regex", "must not be empty"),
        ({"grammar": "start: x"}, "grammar", "unknown name"),
        ({"choices": []}, "choices", "is empty"),
        ({"choices": ["a", ""]}, "choices", "has an empty string"),
        ({"choices": ["a"] * 1025}, "choices", "at most 1024"),
        ({"json_object": False}, "json_object", "must be true"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "must be false"),
        ({"regex": "a", "banned_token_ids": [fake_model.EOS]}, "banned_token_ids", "must end"),
        ({"regex": "a", "allowed_token_ids": [1, 2]}, "allowed_token_ids", "must end"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_field(
    server: Cluster, settings: dict[str, Any], field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem) as refused:
        ask(server, **settings)

    assert refused.value.field == field


def test_two_kinds_at_once_are_a_mistake_of_the_program(server: Cluster) -> None:
    with pytest.raises(TypeError, match="give one of choices= and regex="):
        ask(server, regex="a", choices=["a"])


def test_the_command_line_has_every_kind(server: Cluster) -> None:
    asked = ["generate", "--address", server.address, "--raw", "--no-stats", "--temperature=0", "--max-tokens=60"]

    for flags, wanted in (
        (["--regex=abc"], "abc"),
        (["--choices=yes"], "yes"),
        (['--grammar=start: "a" "b"'], "ab"),
        (['--json-schema={"const": [1]}'], "[1]"),
    ):
        ended = run(*PAGEWIRE, *asked, *flags, "hi")
        assert (ended.code, re.sub(r"\s", "", ended.out)) == (0, wanted), ended.err


def test_the_default_model_fills_in_a_schema_also_when_its_executor_is_killed(
    default_model: Path, tmp_path: Path
) -> None:
    call: dict[str, Any] = {"name": "tell", "parameters": {"properties": {"person": PERSON}, "required": ["person"]}}
    settings: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Invent two people. Answer in JSON."}],
        "json_schema": PEOPLE,
        "temperature": 0.7,
        "max_tokens": 200,
        "seed": 3,
    }
    running = Cluster(default_model, tmp_path)
    try:
        for _ in range(2):
            running.start_executor("--threads=1", "--num-blocks=256", fake=False)
        with Client(running.address) as client:
            undisturbed = client.generate(**settings)
            asked = {**settings, "json_schema": None, "tools": [call], "tool_choice": "tell"}
            (told,) = client.generate(**asked).tool_calls
            both: dict[str, Any] = {**settings, "tools": [call], "parallel_tool_calls": False}
            either = client.generate(**both)
            with client.stream(**settings) as stream:
                next(stream)
                next(stream)
                running.executors[0].signal(signal.SIGKILL)
                for _ in stream:
                    pass
            moved = stream.answer
            running.start_executor("--threads=1", "--num-blocks=256", fake=False)
            with client.stream(**settings) as stream:
                next(stream)
                running.executors[1].signal(signal.SIGKILL)
                for _ in stream:
                    pass
            moved_again = stream.answer
    finally:
        running.close()

    assert undisturbed.finish.reason is FinishReason.EOS
    assert is_person(undisturbed.text), undisturbed.text
    assert problem(told.parsed["person"], PERSON) is None, "told of tools in words, and held to them"
    if either.tool_calls:
        assert problem(either.tool_calls[0].parsed["person"], PERSON) is None and not either.text
    else:
        assert is_person(either.text)
    assert moved.text == moved_again.text == undisturbed.text


class Verdict(BaseModel):
    """An answer as OpenAI's client describes it."""

    agrees: bool
    stars: Literal[1, 2, 3]


def test_openai_s_client_gets_what_its_schema_says(server: Cluster, tmp_path: Path) -> None:
    hi: list[Any] = [{"role": "user", "content": "hi"}]
    with Gateway(server.address, tmp_path / "log") as gateway, gateway.client() as client:
        chat = client.chat.completions.parse(model="", messages=hi, response_format=Verdict, seed=11)
        response = client.responses.parse(model="", input="hi", text_format=Verdict, extra_body={"seed": 11})
        schema: Any = {"type": "json_schema", "json_schema": {"name": "people", "schema": PEOPLE, "strict": True}}
        people = client.chat.completions.create(model="", messages=hi, response_format=schema, max_tokens=200, seed=11)
        serial = client.completions.create(model="", prompt=PROMPT, max_tokens=40, extra_body={"regex": SERIAL})

    assert isinstance(chat.choices[0].message.parsed, Verdict)
    assert response.output_parsed == chat.choices[0].message.parsed and response.status == "completed"
    assert people.choices[0].message.content is not None and is_person(people.choices[0].message.content)
    assert people.choices[0].finish_reason == "stop"
    assert re.fullmatch(SERIAL, serial.choices[0].text)
