"""/v1/completions: texts or tokens in, what follows out. The endpoint that evaluations use: `echo` scores a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from common.errors import InvalidRequest
from pagewire.scores import Scores
from protos import inference_pb2 as pb
from services.gateway import scores
from services.gateway.answers import Answers, of_prompt
from services.gateway.asked import Asked, read_manner
from services.gateway.chat import DONE, Chunks, envelope, finish_reason, score, stop_reason, usage_json, wants_logprobs
from services.gateway.fields import MAX_U32, TOKEN_IDS, Fields, array, integers, shown, text
from services.gateway.options import read_options, read_structured
from services.gateway.upstream import Upstream

_DEFAULT_MAX_TOKENS: Final = 16  # OpenAI's
_MOST_ECHOES: Final = 8  # prompts of one request whose texts are asked for at once
_MAX_COPIED_BYTES: Final = 8_000_000  # of all that several prompts share, once for each


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedCompletion(Asked):
    """With what is told of the prompts."""

    echo: bool = False  # the prompt is told before its answer
    drop: bool = False  # nothing but the prompt is told: max_tokens was 0


def read(body: Fields, *, max_prompts: int) -> AskedCompletion:
    """What a completion request asks for. Raises InvalidRequest. Whoever calls refuses what is left over."""
    like = pb.GenerateStreamRequest()
    echo = body.boolean("echo") or False
    drop = echo and body.take_if("max_tokens", 0)
    names = read_options(body, like, max_tokens=("max_tokens", "max_completion_tokens"))
    if drop:
        like.stopping.max_tokens = 1  # the least that can be made
    elif not like.stopping.HasField("max_tokens"):
        like.stopping.max_tokens = _DEFAULT_MAX_TOKENS
    names |= read_structured(body, like.sampling)
    if (top := body.integer("logprobs", 0, MAX_U32)) is not None:
        like.sampling.logprobs = top
        if echo:
            if like.sampling.HasField("prompt_logprobs") and like.sampling.prompt_logprobs != top:
                raise InvalidRequest("prompt_logprobs", "with echo, logprobs is for the prompt, too: leave this out")
            like.sampling.prompt_logprobs = top
            names["prompt_logprobs"] = "logprobs"
    if body.string("suffix"):
        raise InvalidRequest("suffix", "is not served: text is made behind a prompt, not before something")
    given = body.take("prompt", prompts_form(max_prompts))
    prompts = read_prompts(given, max_prompts, "prompt")
    if len(prompts) == 1:  # of several, each error says which it is about
        name = "prompt[0]" if isinstance(given, list) and isinstance(given[0], str | list) else "prompt"
        names |= {"text": name, "token_ids": name, "prompt": name}
    if len(prompts) * like.ByteSize() > _MAX_COPIED_BYTES:  # each prompt is a request, with all that they share
        problem = f"{len(prompts)} prompts times {like.ByteSize()} bytes of other fields are over {_MAX_COPIED_BYTES}"
        raise InvalidRequest("prompt", f"{problem}: ask in several requests")
    requests: list[pb.GenerateStreamRequest] = []
    for prompt in prompts:
        request = pb.GenerateStreamRequest()
        request.CopyFrom(like)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
            request.token_ids.SetInParent()
        requests.append(request)
    return AskedCompletion(requests=requests, manner=read_manner(body), names=names, echo=echo, drop=drop)


def prompts_form(most: int) -> dict[str, Any]:
    """What prompts may be."""
    words, ids = {"type": "string", "minLength": 1}, {**TOKEN_IDS, "minItems": 1}
    several = {"type": "array", "items": {"anyOf": [words, ids]}, "minItems": 1, "maxItems": most}
    return {"anyOf": [words, ids, several]}


def read_prompts(value: object, most: int, name: str) -> list[str | list[int]]:
    """One text, several, the tokens of one, or of several, in the member `name`. Raises InvalidRequest."""
    if isinstance(value, str):
        return [_not_empty(text(value, name), name)]
    found = array(value, name)
    if not found:
        raise InvalidRequest(name, "must be a string, a list of token ids, or a list of these, and is empty")
    if not isinstance(found[0], str | list):
        return [integers(found, name)]
    if len(found) > most:
        raise InvalidRequest(name, f"at most {most} {name}s at once, got {len(found)}")
    prompts: list[str | list[int]] = []
    for i, each in enumerate(found):
        path = f"{name}[{i}]"
        if isinstance(each, str):
            prompts.append(_not_empty(text(each, path), path))
        elif isinstance(each, list):
            prompts.append(_not_empty(integers(each, path), path))
        else:
            raise InvalidRequest(path, f"must be a string or a list of token ids, got {shown(each)}")
    return prompts


def _not_empty(prompt: Any, path: str) -> Any:
    if not prompt:
        raise InvalidRequest(path, "is empty")
    return prompt


async def echoes(upstream: Upstream, asked: AskedCompletion, key: str) -> list[str]:
    """The texts of the prompts, to be told before their answers. Raises PagewireErrors; it asks for no more then."""
    turns = asyncio.Semaphore(_MOST_ECHOES)

    async def echo(number: int, request: pb.GenerateStreamRequest) -> str:
        if request.HasField("text"):
            return request.text
        async with turns:
            try:
                return await upstream.text(request.token_ids.ids, key)
            except InvalidRequest as error:
                raise (of_prompt(error, number) if len(asked.requests) > 1 else error) from None

    echoing = [asyncio.create_task(echo(i, request)) for i, request in enumerate(asked.requests)]
    try:
        return await asyncio.gather(*echoing)
    finally:
        for each in echoing:
            each.cancel()
        await asyncio.gather(*echoing, return_exceptions=True)


# ---- telling


async def whole(answers: Answers, asked: AskedCompletion, prompts: Sequence[str]) -> dict[str, Any]:
    """The answers, when all of them are there. Raises PagewireErrors."""
    while await answers.next() is not None:
        pass
    choices: list[dict[str, Any]] = []
    for i, (prompt, stream) in enumerate(zip(prompts, answers.streams, strict=True)):
        heard = stream.continuation
        before = heard.prompt_logprobs
        for n, finish in sorted(heard.finishes.items()):
            words, logprobs, _ = ("", Scores(), ()) if asked.drop else heard.heard(n)
            told: dict[str, Any] = {
                "index": len(choices),
                "text": prompt + words,
                "logprobs": scores.all_of_completion(before + logprobs) if wants_logprobs(asked) else None,
                "finish_reason": _finish_reason(finish, asked),
                "stop_reason": None if asked.drop else stop_reason(finish),
                **score(finish),
                **answers.told_of(i),
            }
            if asked.manner.return_token_ids:
                told["token_ids"] = [] if asked.drop else list(heard.token_ids(n))
            if before and not _has_prompt(asked):
                told["prompt_logprobs"] = scores.all_of_chat(before)
            choices.append(told)
    usage = _usage(answers, asked)
    return {**envelope(answers, asked, "cmpl", "text_completion"), "choices": choices, "usage": usage}


async def stream(answers: Answers, asked: AskedCompletion, prompts: Sequence[str]) -> AsyncGenerator[bytes, None]:
    """The answers in events, as they are made. Raises PagewireErrors."""
    chunks = Chunks(answers, asked, "cmpl", "text_completion", new='"text": ')
    scored, ids = wants_logprobs(asked), asked.manner.return_token_ids
    total = len(prompts) * answers.n
    # who comes back after an event of a choice has what is told of its prompt
    begun = [answers.has_begun(i) for i in range(total)]
    echoed = [not asked.echo or has_begun for has_begun in begun]  # what there was of a prompt to be told
    offsets = [scores.Offsets(len(prompts[i // answers.n]) + answers.characters(i)) for i in range(total)]
    in_the_middle = list(begun)  # of a character, perhaps
    while (piece := await answers.next()) is not None:
        is_echoed, echoed[piece.choice] = echoed[piece.choice], True
        if not (piece.text or piece.finish or scored or ids or not is_echoed):
            continue
        if asked.drop and is_echoed and not piece.finish:
            continue
        of_prompt = answers.streams[piece.choice // answers.n].continuation
        before = Scores() if begun[piece.choice] else of_prompt.prompt_logprobs
        if is_echoed and not (piece.finish or scored or ids or before):  # most of the time
            yield chunks.plain(piece)
            continue
        prompt = "" if is_echoed else prompts[piece.choice // answers.n]
        words = "" if asked.drop else piece.text
        new = () if asked.drop else piece.logprobs
        logprobs = scores.of_completion(new, offsets[piece.choice]) if scored and new else None
        if in_the_middle[
            piece.choice
        ]:  # its first bytes were told before: count what is told until there is a whole one
            offsets[piece.choice].at = len(prompts[piece.choice // answers.n]) + answers.characters(piece.choice)
            in_the_middle[piece.choice] = not piece.text
        choice: dict[str, Any] = {
            "index": piece.choice,
            "text": prompt + words,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(piece.finish, asked) if piece.finish else None,
        }
        if piece.finish:
            choice["stop_reason"] = None if asked.drop else stop_reason(piece.finish)
            choice |= {**score(piece.finish), **answers.told_of(piece.choice // answers.n)}
        if ids:
            choice["token_ids"] = [] if asked.drop else list(piece.token_ids)
        if not before:
            yield chunks.chunk([choice])
            continue
        if _has_prompt(asked):
            choice["logprobs"] = scores.all_of_completion(before, new)
        else:
            choice["prompt_logprobs"] = scores.all_of_chat(before)
        yield await chunks.long_chunk([choice], {})
        of_prompt.forget_prompt_logprobs()
    if asked.manner.include_usage:
        yield chunks.usage(_usage(answers, asked))
    yield DONE


def _has_prompt(asked: AskedCompletion) -> bool:
    """Whether the log-probabilities of the prompt are told as those of the answer, before them."""
    return asked.echo and wants_logprobs(asked)


def _usage(answers: Answers, asked: AskedCompletion) -> dict[str, Any]:
    """What it cost. The one token that was made where only the prompt is scored is nobody's."""
    usage = usage_json(answers.usage())
    return usage | {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]} if asked.drop else usage


def _finish_reason(finish: Any, asked: AskedCompletion) -> str:
    return "length" if asked.drop else finish_reason(finish)
