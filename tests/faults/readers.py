"""Readers of a kill run: streams that are always live, and know what they must hear."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from common.sampling import SamplingParams, StopConditions
from common.types import FinishReason
from executor.fake_runner import prefix_hash_token
from pagewire import AsyncClient
from protos import inference_pb2 as pb
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.faults.checker import Expected, undisturbed
from tests.faults.kill_report import Report
from tests.faults.recorder import History, Source, record

_STREAM_TIMEOUT_S: Final = 120.0

TEXTS: Final = (
    "The sea is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "A list of the planets, from the sun outwards:",
    "Water boils at 100 degrees because",
    "The capital of France is Paris. The capital of Italy is",
)


class Question(NamedTuple):
    """A request, and what its answer is when nothing is disturbed."""

    request: pb.GenerateStreamRequest
    expected: list[Expected]


class Questions(Protocol):
    """Where questions come from."""

    def draw(self, draw: random.Random) -> Question:
        """One that any reader may ask."""
        ...

    def crowd(self, draw: random.Random) -> Question:
        """One that takes much memory: choices that share a prompt, long answers."""
        ...


class FakeQuestions:
    """The fake model's: any question, as the answer can be computed."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer(model / "tokenizer.json")

    def draw(self, draw: random.Random) -> Question:
        prompt = [*range(1, 1 + draw.choice([0, 16, 40, 100])), *(draw.randrange(300) for _ in range(3))]
        return self._ask(draw, prompt, n=draw.choice([1, 1, 1, 2]), max_tokens=draw.choice([40, 80, 160]))

    def crowd(self, draw: random.Random) -> Question:
        return self._ask(draw, [draw.randrange(300) for _ in range(200)], n=4, max_tokens=120)

    def _ask(self, draw: random.Random, prompt: list[int], *, n: int, max_tokens: int) -> Question:
        sampling = SamplingParams(temperature=float(draw.random() < 0.5), seed=draw.randrange(1 << 32))
        stop = StopConditions(max_tokens=max_tokens, ignore_eos=True)
        expected = self._expect(prompt, sampling, n, stop)
        stops: tuple[str, ...] = ()
        if draw.random() < 0.25 and (text := expected[0].text or ""):
            at = draw.randrange(len(text))
            stops = (text[at : at + 2],)
            expected = self._expect(
                prompt, sampling, n, StopConditions(max_tokens=max_tokens, ignore_eos=True, stop_strings=stops)
            )
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=sampling.temperature, seed=sampling.seed, n=n),
            stopping=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True, stop=stops),
        )
        return Question(request, expected)

    def _expect(self, prompt: list[int], sampling: SamplingParams, n: int, stop: StopConditions) -> list[Expected]:
        return [
            undisturbed(
                prompt,
                sampling,
                choice,
                stop,
                model=prefix_hash_token,
                tokenizer=self._tokenizer,
                vocab_size=fake_model.VOCAB_SIZE,
                eos=frozenset({fake_model.EOS}),
            )
            for choice in range(n)
        ]


class AskedBefore:
    """A real model's: a set of questions whose answers the same server gave before anything was disturbed."""

    def __init__(self, questions: list[Question]) -> None:
        self._questions = questions

    @classmethod
    async def ask(cls, model: Path, address: str, draw: random.Random, *, count: int, max_tokens: int) -> AskedBefore:
        """Ask each alone, one after the other."""
        tokenizer = Tokenizer(model / "tokenizer.json")
        questions: list[Question] = []
        async with AsyncClient(address) as client:
            for number in range(count):
                ids = tokenizer.encode(TEXTS[number % len(TEXTS)], True)
                request = pb.GenerateStreamRequest(
                    token_ids=pb.TokenIds(ids=ids),
                    sampling=pb.SamplingParams(
                        temperature=float(number % 2), seed=draw.randrange(1 << 32), n=1 + (number % 4 == 3)
                    ),
                    stopping=pb.StopConditions(max_tokens=draw.choice([max_tokens // 2, max_tokens]), ignore_eos=True),
                )
                answer = [await _answer(client, request)]
                if number % 3 == 2:  # the same again, ended by a piece of its text
                    text = answer[0][0].text or ""
                    at = len(text) // 2
                    request.stopping.stop.append(text[at : at + 6])
                    answer.append(await _answer(client, request))
                questions.append(Question(request, answer[-1]))
        return cls(questions)

    def draw(self, draw: random.Random) -> Question:
        return draw.choice(self._questions)

    def crowd(self, draw: random.Random) -> Question:
        return self.draw(draw)


async def _answer(client: AsyncClient, request: pb.GenerateStreamRequest) -> list[Expected]:
    async with client.send(request) as stream:
        async for _ in stream:
            pass
        answer = stream.answer
    return [
        Expected(
            tokens=choice.token_ids,
            reason=FinishReason[choice.finish.reason.name],
            text=choice.text,
            matched_stop=choice.finish.matched_stop,
        )
        for choice in answer.choices
    ]


class Readers:
    """A number of streams that are always live: whoever has his answer asks again."""

    def __init__(
        self, questions: Questions, sources: list[Source], history: History, report: Report, draw: random.Random
    ) -> None:
        """A reader for each of the sources."""
        self._questions = questions
        self._sources = sources
        self._history, self._report, self._draw = history, report, draw
        self._tasks: set[asyncio.Task[None]] = set()
        self._crowd: set[asyncio.Task[None]] = set()
        self._pausing = False

    @property
    def is_crowded(self) -> bool:
        """Streams of a crowd have not ended."""
        return bool(self._crowd)

    def start(self) -> None:
        """Begin to ask."""
        self._pausing = False
        for source in self._sources:
            self._spawn(self._ask_on(source))

    async def finish(self) -> None:
        """Ask no more; return when every stream has come to its end."""
        self._pausing = True
        await asyncio.gather(*self._tasks)

    async def cancel(self) -> None:
        """Leave every stream."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def crowd(self, count: int) -> None:
        """So many more streams, once each, that take much memory."""
        for _ in range(count):
            question = self._questions.crowd(self._draw)
            task = self._spawn(self._read(self._draw.choice(self._sources), question))
            self._crowd.add(task)
            task.add_done_callback(self._crowd.discard)

    def question(self) -> Question:
        """One for somebody who reads in his own way."""
        return self._questions.draw(self._draw)

    def _spawn(self, reading: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(reading)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask_on(self, source: Source) -> None:
        while not self._pausing and not self._report.broken:
            await self._read(source, self._questions.draw(self._draw))

    async def _read(self, source: Source, question: Question) -> None:
        self._report.asked += 1
        name = f"stream {self._report.asked}"
        try:
            async with asyncio.timeout(_STREAM_TIMEOUT_S):
                tokens = await record(self._history, source, name, question.request, question.expected)
        except Exception as error:  # noqa: BLE001 - a stream that ends badly is what we look for
            self._history.write("broken", stream=name, error=f"{type(error).__name__}: {error}")
            self._report.broken.append(f"{name}: {type(error).__name__}: {error}")
        else:
            self._report.answers += 1
            self._report.tokens += tokens
