"""The output of a response as it is made: a message, calls of functions, or both; each an item that begins and ends.

What comes next depends on nothing but what was told before and what is told now. So a stream goes on in any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pagewire.answers import TokenLogprob, TokenLogprobs
from pagewire.scores import Scores
from pagewire.tools import ToolCall
from services.gateway import scores
from services.gateway.answers import Answers, Piece

Told = tuple[str, dict[str, Any]]
"""An event: its name, and what it has beside that."""


class Items:
    """The items of one answer, and their events."""

    def __init__(self, answers: Answers, request_id: str, *, scored: bool, may_call: bool) -> None:
        """With `scored` the tokens of the message have log-probabilities; `may_call`: functions are offered."""
        self._answers = answers
        self._request_id = request_id
        self._scored = scored
        self._may_call = may_call
        self._calls = answers.calls(0)  # that have begun
        self._has_message = answers.characters(0) > 0 if self._calls else answers.has_begun(0)
        self._held: list[TokenLogprobs] = []  # of tokens without text so far: they may be the beginning of a call

    def add(self, piece: Piece) -> list[Told]:
        """What there is to tell of a piece that is no end."""
        told: list[Told] = []
        if not self._calls:
            self._held += piece.logprobs
            if piece.text or (self._scored and not self._may_call):
                told += self._add_text(piece.text)
        for part in piece.tool_calls:
            if part.name:
                told += self._end_last("completed")
                self._calls += 1
                call = self._call(ToolCall(id=part.id, name=part.name, arguments=""), self._calls - 1, "in_progress")
                told.append(("response.output_item.added", {"output_index": self._place, "item": call}))
            if part.arguments:
                delta = {**self._of_call, "delta": part.arguments}
                told.append(("response.function_call_arguments.delta", delta))
        return told

    def end(self, status: str) -> list[Told]:
        """What is left to tell at the end, which is in one of the items: there is always one."""
        told: list[Told] = []
        if not self._calls:
            if self._held:
                told += self._add_text("", whole=True)
            told += self._begin_message()
        return told + self._end_last(status)

    def all(self, status: str) -> list[dict[str, Any]]:
        """The items when all have ended, the last one so."""
        text, logprobs, calls = self._answers.streams[0].continuation.heard(0)
        items: list[dict[str, Any]] = []
        if text or not calls:
            items.append(self._message("completed" if calls else status, [self._part(text, logprobs, calls)]))
        last = len(calls) - 1
        items += [self._call(call, k, "completed" if k < last else status) for k, call in enumerate(calls)]
        return items

    @property
    def _place(self) -> int:
        """Of the last item among all."""
        return self._calls - 1 + self._has_message

    @property
    def _of_message(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._request_id}", "output_index": 0, "content_index": 0}

    @property
    def _of_call(self) -> dict[str, Any]:
        return {"item_id": self._call_id(self._calls - 1), "output_index": self._place}

    def _add_text(self, text: str, *, whole: bool = False) -> list[Told]:
        """Words, with the log-probabilities of their tokens; with `whole` of all that have come."""
        told = self._begin_message()
        count = len(self._held)
        if self._may_call and not whole:
            count = _count_of((each.token for each in self._held), text)
        logprobs = scores.of_chat(self._held[:count]) if self._scored else []
        del self._held[:count]
        told.append(("response.output_text.delta", {**self._of_message, "delta": text, "logprobs": logprobs}))
        return told

    def _begin_message(self) -> list[Told]:
        if self._has_message:
            return []
        self._has_message = True
        return [
            ("response.output_item.added", {"output_index": 0, "item": self._message("in_progress", [])}),
            ("response.content_part.added", {**self._of_message, "part": self._part("", Scores(), ())}),
        ]

    def _end_last(self, status: str) -> list[Told]:
        text, logprobs, calls = self._answers.streams[0].continuation.heard(0)
        if self._calls:
            call = self._call(calls[self._calls - 1], self._calls - 1, status)
            done = {**self._of_call, "name": call["name"], "arguments": call["arguments"]}
            return [
                ("response.function_call_arguments.done", done),
                ("response.output_item.done", {"output_index": self._place, "item": call}),
            ]
        if not self._has_message:
            return []
        part = self._part(text, logprobs, calls)
        done = {**self._of_message, "text": text, "logprobs": part["logprobs"]}
        return [
            ("response.output_text.done", done),
            ("response.content_part.done", {**self._of_message, "part": part}),
            ("response.output_item.done", {"output_index": 0, "item": self._message(status, [part])}),
        ]

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._request_id}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _part(self, text: str, logprobs: Scores, calls: Sequence[ToolCall]) -> dict[str, Any]:
        of_text = logprobs[: _count_of(logprobs.tokens(), text)] if calls else logprobs
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": scores.all_of_chat(of_text) if self._scored else [],
        }

    def _call(self, call: ToolCall, number: int, status: str) -> dict[str, Any]:
        return {
            "id": self._call_id(number),
            "type": "function_call",
            "status": status,
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }

    def _call_id(self, number: int) -> str:
        return f"fc_{self._request_id}_{number}"


def _count_of(tokens: Iterable[TokenLogprob], text: str) -> int:
    """How many first tokens have this text together: behind it come tokens that open a call."""
    left, count = len(text.encode()), 0
    for token in tokens:
        if left <= 0:
            break
        left -= len(token.text)
        count += 1
    return count
