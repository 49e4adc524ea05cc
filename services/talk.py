"""`generate`, `chat` and `demo`: answers on the screen as they are made, and what they cost."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import uvloop

from common.errors import PagewireError
from pagewire.answers import TokenLogprobs, Usage
from protos import inference_pb2 as pb
from services.client import Client, Server, connect


@dataclass(slots=True)
class Told:
    """An answer that was shown, and its times."""

    text: str = ""
    num_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    usage: Usage | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first over the time after the first."""
        decode_s = self.total_s - self.first_token_s
        return (self.num_tokens - 1) / decode_s if self.num_tokens > 1 and decode_s > 0 else 0.0

    def summary(self) -> str:
        """One line for people."""
        cached = (
            f", {self.usage.cached_prompt_tokens} of {self.usage.prompt_tokens} prompt tokens cached"
            if self.usage
            else ""
        )
        return (
            f"{self.num_tokens} tokens, {self.tokens_per_s:.1f} tokens/s, "
            f"first token after {1000 * self.first_token_s:.0f} ms{cached}"
        )


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def tell(client: Client, request: pb.GenerateStreamRequest, show: Callable[[str], None] = _show) -> Told:
    """Stream one answer, of one choice, to `show`. Raises PagewireErrors, on a line of their own."""
    told = Told()
    began = time.perf_counter()
    try:
        async with client.ask(request) as stream:
            async for delta in stream:
                told.total_s = time.perf_counter() - began
                if told.num_tokens == 0:
                    told.first_token_s = told.total_s
                told.num_tokens += len(delta.token_ids)
                told.text += delta.text
                show(delta.text)
                for part in delta.tool_calls:
                    show(f"\n{part.name} {part.arguments}" if part.name else part.arguments)
            told.usage = stream.answer.usage
            told.prompt_logprobs, told.logprobs = stream.answer.prompt_logprobs, stream.answer.logprobs
    except PagewireError:
        if told.text:
            show("\n")
        raise
    return told


async def generate(server: Server, request: pb.GenerateStreamRequest, *, stats: bool = True) -> None:
    """Answer one prompt on the screen."""
    async with connect(server) as client:
        await client.model()  # where nobody is, this says so at once; from here on an answer waits for a server
        told = await tell(client, request)
        print(flush=True)
        for line in lines_of([*told.prompt_logprobs, *told.logprobs]):
            print(line, flush=True)
        if stats:
            print(f"[{told.summary()}]", file=sys.stderr)


def lines_of(tokens: Sequence[TokenLogprobs]) -> Iterator[str]:
    """A line for each token: its log-probability and text, then the likeliest ones in its place."""
    for each in tokens:
        beside = ", ".join(f"{_shown(top.text)} {top.logprob:.4f}" for top in each.top)
        logprob = "" if each.token.logprob is None else f"{each.token.logprob:.4f}"
        yield f"{logprob:>9}  {_shown(each.token.text)}" + (f"  [{beside}]" if beside else "")


def _shown(text: bytes) -> str:
    return repr(text.decode(errors="backslashreplace"))


def chat(
    server: Server, sampling: pb.SamplingParams, stopping: pb.StopConditions, messages: Sequence[pb.ChatMessage] = ()
) -> None:
    """Talk until end of input. Ctrl-C ends the answer that runs, and the talk goes on. Raises PagewireErrors.

    The event loop runs while an answer does and stands still in between, so that line editing and Ctrl-C work at the
    prompt as in any other program.
    """
    talk = list(messages)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        try:
            client = runner.run(stack.enter_async_context(connect(server)))
            model = runner.run(client.model())
            print(f"{model.model}. Ctrl-C stops an answer, Ctrl-D ends the talk.")
            while (line := _next_line()) is not None:
                asked = pb.ChatMessage(role="user", content=line)
                request = pb.GenerateStreamRequest(
                    chat=pb.ChatMessages(messages=[*talk, asked]), sampling=sampling, stopping=stopping
                )
                try:
                    told = runner.run(tell(client, request))
                except KeyboardInterrupt:
                    print("\n[stopped]", flush=True)
                except PagewireError as error:
                    print(f"error: {error}", flush=True)
                else:
                    print(f"\n[{told.summary()}]", flush=True)
                    talk += [asked, pb.ChatMessage(role="assistant", content=told.text)]
        finally:
            runner.run(stack.aclose())


def _next_line() -> str | None:
    """What the person types next; None at the end of input. Ctrl-C drops the line that is being typed."""
    while True:
        try:
            line = input("\n> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            print()
            return None
        if line.strip():
            return line
