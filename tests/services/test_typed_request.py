"""A request as it is typed becomes the one that Python's client makes of the same settings; errors name the flag."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from common.errors import PagewireError
from pagewire import asking
from protos import inference_pb2 as pb
from services.typed_request import add_request_flags, chat_of, request_of

NOT_UTF8 = "\udcff"
HI = [{"role": "user", "content": "hi"}]


def typed(*flags: str, prompt: str = "hi", raw: bool = False, **others: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_request_flags(parser)
    told = {"prompt": prompt, "raw": raw, "tools": None, "tool_choice": None, **others}
    return parser.parse_args(flags, argparse.Namespace(**told))


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ((), {}),
        (("--temperature=0", "--seed=0", "--max-tokens=3"), {"temperature": 0, "seed": 0, "max_tokens": 3}),
        (("--logit-bias=5=2", "--logit-bias=6=-1"), {"logit_bias": {5: 2, 6: -1}}),
        (("--allowed-token-ids=1,2", "--stop=a", "--stop=b"), {"allowed_token_ids": [1, 2], "stop": ["a", "b"]}),
        (("--choices=a", "--choices=b", "--include-stop"), {"choices": ["a", "b"], "include_stop": True}),
        (("--json-object", "--ignore-eos", "--no-cache"), {"json_object": True, "ignore_eos": True, "no_cache": True}),
        (("--beams=2", "--early-stopping=full"), {"beams": {"width": 2, "early_stopping": True}}),
        (("--length-penalty=0", "--early-stopping=likely"), {"beams": {"length_penalty": 0, "early_stopping": False}}),
        (("--pin-seconds=5", "--cache-salt="), {"pin_seconds": 5, "cache_salt": ""}),
    ],
)
def test_flags_are_the_settings_of_their_names(flags: tuple[str, ...], settings: asking.Settings) -> None:
    assert request_of(typed(*flags)) == asking.request_of(None, {**settings, "messages": HI})
    assert request_of(typed(*flags, raw=True)) == asking.request_of("hi", settings)
    assert chat_of(typed(*flags, system="be")).chat.messages == [pb.ChatMessage(role="system", content="be")]
    assert chat_of(typed(*flags, system="")) == asking.request_of(None, {**settings, "messages": []})


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--seed=-1", "--seed: -1 is out of range"),
        ("--beams=-1", "--beams: -1 is out of range"),
        ("--logit-bias=4294967296=1", "--logit-bias: 4294967296 is out of range"),
        ("--banned-token-ids=1,-2", "--banned-token-ids: 1,-2 is out of range"),
        (f"--regex={NOT_UTF8}", "--regex: not valid UTF-8"),
        (f"--bad-words={NOT_UTF8}", "--bad-words: not valid UTF-8"),
    ],
)
def test_what_cannot_be_sent_is_named_by_its_flag(flag: str, problem: str) -> None:
    for ask in (request_of, chat_of):
        with pytest.raises(PagewireError) as refused:
            ask(typed(flag, system=""))
        assert str(refused.value) == problem


def test_a_text_that_is_none_is_named_as_it_was_typed() -> None:
    for raw in (True, False):
        with pytest.raises(PagewireError, match=r"^the prompt: not valid UTF-8$"):
            request_of(typed(prompt=NOT_UTF8, raw=raw))
    with pytest.raises(PagewireError, match=r"^--system: not valid UTF-8$"):
        chat_of(typed(system=NOT_UTF8))
    with pytest.raises(PagewireError, match=r"^--tool-choice: not valid UTF-8$"):
        request_of(typed(tool_choice=NOT_UTF8))


def test_tools_come_from_a_file_and_go_with_a_chat_alone(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text('[{"name": "look"}]')
    asked = request_of(typed(tools=file, tool_choice="look"))

    assert asked == asking.request_of(None, {"messages": HI, "tools": [{"name": "look"}], "tool_choice": "look"})
    for wrong, problem in (("{", "not JSON in UTF-8"), ("{}", "must be a JSON array of objects")):
        file.write_text(wrong)
        with pytest.raises(PagewireError, match=f"^--tools {file}: {problem}$"):
            request_of(typed(tools=file))
    with pytest.raises(PagewireError, match="go with the chat template, which --raw leaves out"):
        request_of(typed(tools=file, raw=True))
