"""Chat messages to the prompt that the model was trained on, by the template in its folder and no other.

The environment is the one that Transformers renders templates in, so that the same template gives the same prompt. The
sandbox keeps a template from reaching into Python, and its output is capped; its running time is not, so a model
folder deserves the trust of a program that is run here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn, Self

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import InvalidRequest, ModelFolderError
from common.model_folder import ModelFolder
from services.request import Message
from services.tools.format import ToolFormat
from services.tools.formats import format_in
from services.tools.hermes import HERMES
from services.tools.values import MAX_DEPTH, Tool
from services.tools.words import in_words

MAX_PROMPT_CHARACTERS: Final = 16 << 20


class ChatTemplate:
    """The chat template of one model, compiled."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        max_characters: int = MAX_PROMPT_CHARACTERS,
        tool_format: ToolFormat | None = None,
    ) -> None:
        """Compile Jinja source. Raises jinja2.TemplateError. `special_tokens` are names that the template may use.

        `tool_format` is how the model writes calls, where its template does not say so in a way that is known here.
        """
        environment = _environment()
        self._template = environment.from_string(source)
        known = tool_format or format_in(source)
        uses_tools = any(name.name == "tools" for name in environment.parse(source).find_all(nodes.Name))
        self.knows_tools = known is not None and uses_tools
        """The template tells of tools. Where it does not, or of calls that are unknown here, messages do."""
        self.tool_format = known or HERMES
        self._special_tokens = dict(special_tokens)
        self._max_characters = max_characters

    @classmethod
    def of(cls, folder: ModelFolder, tool_format: ToolFormat | None = None) -> Self:
        """The template of a folder that has one. Raises ModelFolderError where it is not valid Jinja."""
        assert folder.chat_template is not None, f"{folder.path} has no chat template"
        try:
            return cls(folder.chat_template, folder.special_tokens, tool_format=tool_format)
        except jinja2.TemplateError as error:
            raise ModelFolderError(
                f"{folder.path}: the chat template is not valid Jinja ({error}). Mend chat_template.jinja, or fetch the"
                " default model: pagewire pull smollm2"
            ) from error

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The prompt for these messages, up to where the assistant's answer begins, for a model that has these tools.

        It brings its own special tokens: encode it without adding any. Raises InvalidRequest, in words that tell
        nothing of the template or the messages.
        """
        if not messages:
            raise InvalidRequest("chat", "must have at least one message")
        _check_calls(messages)
        if self.knows_tools or not (tools or any(each.tool_calls or each.tool_call_id for each in messages)):
            return self._render(messages, tools)
        try:
            return self._render(in_words(self.tool_format, messages, tools))
        except InvalidRequest:  # some templates know no system message either
            return self._render(in_words(self.tool_format, messages, tools, by_system=False))

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        told = [_told(message) for message in messages]
        pieces: list[str] = []
        room = self._max_characters
        try:
            for piece in self._template.generate(
                self._special_tokens,
                messages=told,
                add_generation_prompt=True,
                tools=[tool.as_function() for tool in tools] or None,
                documents=None,
            ):
                room -= len(piece)
                if room < 0:
                    break
                pieces.append(piece)
        except Exception as error:  # a template can fail in any way; it is the messages that made it
            raise InvalidRequest(
                "chat", "the model's chat template does not accept these messages; check their roles and order"
            ) from error
        if room < 0:
            raise InvalidRequest("chat", f"the prompt would exceed {self._max_characters} characters")
        return "".join(pieces)


def _check_calls(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        for j, call in enumerate(message.tool_calls):
            try:
                call.parsed()
            except ValueError:
                field = f"chat.messages[{i}].tool_calls[{j}].arguments"
                raise InvalidRequest(field, f"must be a JSON object, at most {MAX_DEPTH} deep") from None


def _told(message: Message) -> dict[str, Any]:
    """A message as templates know it: what it has not, is not there."""
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        told["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.parsed()}}
            for call in message.tool_calls
        ]
    told |= {name: value for name in ("tool_call_id", "name") if (value := getattr(message, name))}
    return told


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`: training marks the assistant's words with it. Here it is only what stands inside."""

    tags = {"generation"}  # noqa: RUF012 — declared so by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's body in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)  # noqa: DTZ005 — the day where the server stands, as in Transformers
