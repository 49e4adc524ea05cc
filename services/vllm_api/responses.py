"""Our events → messages of vllm.grpc.engine. Token ids and numbers: their readers make text of them.

A stream has the new tokens of a choice in each chunk, and at the choice's end a message with the reason and the counts.
An answer that is asked for whole has one such message for each choice, with its tokens, in the order of the choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from common.step import Logprobs
from common.types import FinishReason
from services.answer import Delta, Finish, PromptLogprobs
from services.vllm_api.stubs import vllm_pb2 as vllm

Event = PromptLogprobs | Delta | Finish

_REASONS: Final = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
    FinishReason.ERROR: "error",
}


class Told(Protocol):
    """How an answer is told."""

    def take(self, event: Event) -> Iterator[vllm.GenerateResponse]:
        """What there is to say of it now."""
        ...


class Streamed:
    """As it is made. How likely the prompt was comes with the first chunk of choice 0."""

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self._prompt: vllm.InputLogProbs | None = None

    def take(self, event: Event) -> Iterator[vllm.GenerateResponse]:
        """See Told."""
        if isinstance(event, PromptLogprobs):
            self._prompt = add_prompt_logprobs(self._prompt, event)
        elif isinstance(event, Finish):
            yield vllm.GenerateResponse(complete=_complete(event))
        else:
            chunk = vllm.GenerateStreamChunk(
                index=event.choice,
                token_ids=event.token_ids,
                prompt_tokens=self._num_prompt,
                completion_tokens=len(event.token_ids),  # of this chunk: their readers add them up
                output_logprobs=output_logprobs(event.token_ids, event.logprobs),
            )
            if self._prompt is not None and not event.choice:
                chunk.input_logprobs.CopyFrom(self._prompt)
                self._prompt = None
            yield vllm.GenerateResponse(chunk=chunk)


class Whole:
    """At its end."""

    def __init__(self, num_choices: int) -> None:
        self._choices = [vllm.GenerateComplete(index=index) for index in range(num_choices)]
        self._num_open = num_choices
        self._prompt: vllm.InputLogProbs | None = None

    def take(self, event: Event) -> Iterator[vllm.GenerateResponse]:
        """See Told."""
        if isinstance(event, PromptLogprobs):
            self._prompt = add_prompt_logprobs(self._prompt, event)
        elif isinstance(event, Finish):
            self._choices[event.choice].MergeFrom(_complete(event))
            self._num_open -= 1
            if not self._num_open:
                yield from self._all()
        else:
            choice = self._choices[event.choice]
            choice.output_ids.extend(event.token_ids)
            if (logprobs := output_logprobs(event.token_ids, event.logprobs)) is not None:
                choice.output_logprobs.MergeFrom(logprobs)

    def _all(self) -> Iterator[vllm.GenerateResponse]:
        for choice in self._choices:
            if self._prompt is not None:
                choice.input_logprobs.CopyFrom(self._prompt)
            yield vllm.GenerateResponse(complete=choice)


def output_logprobs(tokens: Sequence[int], logprobs: Sequence[Logprobs | None]) -> vllm.OutputLogProbs | None:
    """How likely these tokens were; None where that was not asked for."""
    if not logprobs:
        return None
    told = vllm.OutputLogProbs()
    for token, each in zip(tokens, logprobs, strict=True):
        if each is not None:
            told.token_ids.append(token)
            told.token_logprobs.append(each.token)
            told.top_logprobs.add(token_ids=each.top_ids, values=each.top)
    return told


def add_prompt_logprobs(told: vllm.InputLogProbs | None, part: PromptLogprobs) -> vllm.InputLogProbs:
    """How likely the prompt was, up to the end of this part. Nothing is before its first token, which has no number."""
    told = vllm.InputLogProbs() if told is None else told
    for token, each in zip(part.token_ids, part.logprobs, strict=True):
        told.token_ids.append(token)
        told.token_logprobs.add(value=None if each is None else each.token)
        told.top_logprobs.add(token_ids=each.top_ids if each else (), values=each.top if each else ())
    return told


def _complete(finish: Finish) -> vllm.GenerateComplete:
    usage = finish.usage
    return vllm.GenerateComplete(
        index=finish.choice,
        finish_reason=_REASONS[finish.reason],
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_prompt_tokens,
        matched_stop_str=finish.matched_stop,
        # the end of the sequence is no stop of the caller's
        matched_token_id=finish.matched_token_id if finish.reason is FinishReason.STOP_TOKEN else None,
        spec_accepted_tokens=usage.accepted_tokens,
        spec_draft_tokens=usage.drafted_tokens,
    )
