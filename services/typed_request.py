"""A request as it is typed: its flags, and what they make. They are the settings of pagewire/asking.py, by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from common.errors import InvalidRequest, PagewireError
from services.flags import at_least_one

if TYPE_CHECKING:
    from pagewire.asking import Settings
    from protos import inference_pb2 as pb

_BEAMS: Final = {"beams": "width", "length_penalty": "length_penalty", "early_stopping": "early_stopping"}
_EARLY_STOPPING: Final[dict[str, bool | str]] = {"likely": False, "full": True, "never": "never"}
_NOT_TEXT: Final = "not valid UTF-8"


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every control. What is not typed is None, and the server's default."""
    parser.add_argument("--max-tokens", type=at_least_one, help="longest answer")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 1)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--typical-p", type=float)
    parser.add_argument("--repetition-penalty", type=float, help="for tokens of prompt and answer")
    parser.add_argument("--presence-penalty", type=float, help="for tokens of the answer")
    parser.add_argument("--frequency-penalty", type=float, help="the same, times how often they are there")
    parser.add_argument(
        "--logit-bias", type=_bias, action="append", metavar="ID=BIAS", help="add to a logit; repeatable"
    )
    parser.add_argument("--allowed-token-ids", type=_ids, metavar="ID,ID,…", help="choose no other tokens")
    parser.add_argument("--banned-token-ids", type=_ids, metavar="ID,ID,…", help="do not choose these")
    parser.add_argument("--bad-words", action="append", help="never write this text; repeatable")
    structured = parser.add_mutually_exclusive_group()
    structured.add_argument("--json-schema", metavar="JSON", help="answer in JSON that is valid by this")
    structured.add_argument("--json-object", action="store_true", default=None, help="answer with a JSON object")
    structured.add_argument("--regex", help="the whole answer matches it")
    structured.add_argument("--grammar", metavar="LARK", help="the answer is a `start` of it")
    structured.add_argument("--choices", action="append", help="answer with this text; repeatable")
    parser.add_argument("--logprobs", type=int, metavar="K", help="show each token beside K likely ones")
    parser.add_argument("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt")
    parser.add_argument("--beams", type=int, metavar="WIDTH", help="search for the best answer")
    parser.add_argument("--length-penalty", type=float, help="above 0 it prefers long answers")
    parser.add_argument("--early-stopping", choices=("likely", "full", "never"), help="when the search is over")
    parser.add_argument("--best-of", type=int, help="answer with the likeliest of so many choices")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--min-tokens", type=int, help="tokens before which nothing ends the answer")
    parser.add_argument("--stop", action="append", help="end the answer before this text; repeatable")
    parser.add_argument("--include-stop", action="store_true", default=None, help="end it behind that text")
    parser.add_argument("--stop-token-ids", type=_ids, metavar="ID,ID,…", help="end the answer with these")
    parser.add_argument("--cache-salt", help="share the prompt's blocks with requests of this salt alone")
    parser.add_argument("--no-cache", action="store_true", default=None, help="leave nothing of it in the prefix cache")
    parser.add_argument("--pin-seconds", type=int, help="keep the prompt in the prefix cache for so long")
    parser.add_argument("--pin-tokens", type=int, help="only so many first tokens of it")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="go on behind an end-of-sequence token")


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a token id, = and a number, got {text!r}") from None


def _ids(text: str) -> list[int]:
    try:
        return [int(id) for id in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be token ids with commas between them, got {text!r}") from None


def request_of(parsed: argparse.Namespace) -> pb.GenerateStreamRequest:
    """What `generate` asks. Raises PagewireError, which names the flag, for what cannot be sent."""
    settings = _settings(parsed)
    if parsed.tools or parsed.tool_choice:
        if parsed.raw:
            raise PagewireError("--tools and --tool-choice go with the chat template, which --raw leaves out")
        if parsed.tools is not None:
            settings["tools"] = _tools(parsed.tools)
    else:
        settings.pop("tool_choice", None)
    if parsed.raw:
        return _asked(parsed.prompt, settings, prompt_typed_as="the prompt")
    settings["messages"] = [{"role": "user", "content": parsed.prompt}]
    return _asked(None, settings, prompt_typed_as="the prompt")


def chat_of(parsed: argparse.Namespace) -> pb.GenerateStreamRequest:
    """What `chat` asks again and again, before anything is said. Raises as `request_of`."""
    settings = _settings(parsed)
    settings["messages"] = [{"role": "system", "content": parsed.system}] if parsed.system else []
    return _asked(None, settings, prompt_typed_as="--system")


def _settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was typed, by the names that `Settings` has. What a beam search has is one setting there."""
    from pagewire.asking import Settings

    typed = {name: value for name, value in vars(parsed).items() if value is not None}
    settings = {name: value for name, value in typed.items() if name in Settings.__annotations__}
    if beams := {part: typed[name] for name, part in _BEAMS.items() if name in typed}:
        if "early_stopping" in beams:
            beams["early_stopping"] = _EARLY_STOPPING[beams["early_stopping"]]
        settings["beams"] = beams
    if "logit_bias" in settings:
        settings["logit_bias"] = dict(settings["logit_bias"])
    return settings


def _tools(file: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON in UTF-8"
        raise PagewireError(f"--tools {file}: {why}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PagewireError(f"--tools {file}: must be a JSON array of objects")
    return tools


def _asked(prompt: str | None, settings: dict[str, Any], *, prompt_typed_as: str) -> pb.GenerateStreamRequest:
    """The request. An error tells of the setting as it was typed."""
    from pagewire import asking

    try:
        return asking.request_of(prompt, cast("Settings", settings))
    except InvalidRequest as error:
        if error.field.startswith("tools"):  # what is wrong is in the file, and was not typed
            raise
        if error.field == "text" or error.field.startswith("messages"):
            raise PagewireError(f"{prompt_typed_as}: {_NOT_TEXT}") from None
        name, _, part = error.field.partition(".")
        value = settings[name][part] if part else settings[name]
        flag = part if part not in ("", "width") else name
        raise PagewireError(f"--{flag.replace('_', '-')}: {_problem(value)}") from None


def _problem(value: Any) -> str:
    """Why a value of the right type cannot be sent: a text is none, or a number is greater or less than is sent."""
    if isinstance(value, dict):
        value = next(token for token in value if not 0 <= token < 1 << 32)
    if isinstance(value, str) or (isinstance(value, list) and isinstance(value[0], str)):
        return _NOT_TEXT
    return f"{','.join(map(str, value)) if isinstance(value, list) else value} is out of range"
