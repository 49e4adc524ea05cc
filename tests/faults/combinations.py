"""Requests that ask for anything beside anything, in a crowd that is disturbed: each stream is its undisturbed run.

The real public handlers, the real scheduler and real runners with a tiny model, exact in float32, in one process and
virtual time; between them goes all that would go over a wire. What a request may ask for is `CONTROLS`: a name and how
it is drawn. A new control is one more entry, and is then asked for beside all others.

`python -m tests.faults.combinations --examples 1000 --seed 5` looks for more.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import tempfile
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import hypothesis
import torch
from hypothesis import strategies as st

from common.errors import PagewireError
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import Grammar, RequestLimits
from common.step import ExecutorFacts, StepPlan
from executor.guide import Grammars
from executor.model_runner import ModelRunner
from executor.runner import execute
from protos import inference_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from scheduler.suspicion import End
from services.answering import Answerer
from services.caller import Caller, let_in
from services.codec_link import plan_from_pb, plan_to_pb, result_from_pb, result_to_pb
from services.engine import Engine
from services.grammar_checker import GrammarChecker
from services.handlers import Context
from services.live_requests import LiveRequest, LiveRequests
from services.request_stream import RequestStream
from services.scheduler_service import SchedulerService
from services.text import Tokenizer
from services.tickets import KEY_BYTES, TicketKey, Tickets
from tests.executor.guides import LETTERS, save_letters
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny
from tests.faults.virtual_time import Process, World
from tests.services.heard import Heard

EOS: Final = 2
MAX_TOKENS: Final = 20
BLOCK_SIZE: Final = 16  # the fewest with which the kernels are exact
FEWEST_BLOCKS: Final = 4  # hold the longest sequence, and no second one

_SLAB_BLOCKS: Final = 64
_KEY: Final = TicketKey(id="virtual", secret=bytes(KEY_BYTES))

Asked = pb.GenerateStreamRequest
Draw = st.DrawFn
Control = Callable[[Draw, Asked], None]

_TOKENS: Final = st.integers(3, VOCAB_SIZE - 1)
_TOKEN_LISTS: Final = st.lists(_TOKENS, min_size=1, max_size=12, unique=True)
_TEXTS: Final = st.text(st.sampled_from(LETTERS), min_size=1, max_size=2)
_SCHEMA: Final = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


def _number(name: str, values: st.SearchStrategy[Any]) -> Control:
    return lambda draw, asked: setattr(asked.sampling, name, draw(values))


def _texts(of: Callable[[Asked], Any]) -> Control:
    return lambda draw, asked: of(asked).extend(draw(st.lists(_TEXTS, min_size=1, max_size=3, unique=True)))


def _biases(draw: Draw, asked: Asked) -> None:
    asked.sampling.logit_bias.update(draw(st.dictionaries(_TOKENS, st.sampled_from([-4.0, 2.0, 6.0]), max_size=4)))


def _banned(draw: Draw, asked: Asked) -> None:
    asked.sampling.banned_token_ids.extend(draw(_TOKEN_LISTS))


def _allowed(draw: Draw, asked: Asked) -> None:
    asked.sampling.allowed_token_ids.extend([EOS, *draw(_TOKEN_LISTS)])


def _structured(draw: Draw, asked: Asked) -> None:
    kinds: list[dict[str, Any]] = [
        {"regex": "[a-f]{2,5}-[0-9]+"},
        {"json_schema": _SCHEMA},
        {"grammar": 'start: item ("," item){1,4}\nitem: /[a-z]{1,3}/ | "(" item ")"'},
        {"choices": pb.StringList(values=["one", "oneness", "other"])},
    ]
    asked.sampling.structured.CopyFrom(pb.StructuredOutput(**draw(st.sampled_from(kinds))))


def _beams(draw: Draw, asked: Asked) -> None:
    asked.sampling.beams.width = 3
    asked.sampling.beams.length_penalty = draw(st.sampled_from([-1.0, 0.0, 1.0]))


def _cache(draw: Draw, asked: Asked) -> None:
    """Pins are drawn by the stories: that one is refused depends on what the others have."""
    if draw(st.booleans()):
        asked.cache.no_cache = True
    else:
        asked.cache.cache_salt = draw(st.sampled_from(["", "salt"]))


def _stop_tokens(draw: Draw, asked: Asked) -> None:
    asked.stopping.stop_token_ids.extend(draw(_TOKEN_LISTS))


def _min_tokens(draw: Draw, asked: Asked) -> None:
    asked.stopping.min_tokens = draw(st.integers(1, asked.stopping.max_tokens))


def _ignore_eos(draw: Draw, asked: Asked) -> None:
    asked.stopping.ignore_eos = True


def _include_stop(draw: Draw, asked: Asked) -> None:
    asked.stopping.include_stop = True


CONTROLS: Final[dict[str, Control]] = {
    "temperature": _number("temperature", st.sampled_from([0.0, 0.5, 2.0])),
    "top_k": _number("top_k", st.integers(1, 20)),
    "top_p": _number("top_p", st.sampled_from([0.3, 0.8, 0.95])),
    "min_p": _number("min_p", st.sampled_from([0.01, 0.2])),
    "typical_p": _number("typical_p", st.sampled_from([0.3, 0.9])),
    "n": _number("n", st.integers(2, 3)),
    "best_of": _number("best_of", st.integers(3, 4)),
    "beams": _beams,
    "cache": _cache,
    "repetition_penalty": _number("repetition_penalty", st.sampled_from([0.8, 1.3])),
    "presence_penalty": _number("presence_penalty", st.sampled_from([-1.0, 0.5])),
    "frequency_penalty": _number("frequency_penalty", st.sampled_from([-0.5, 1.0])),
    "logit_bias": _biases,
    "bad_words": _texts(lambda asked: asked.sampling.bad_words),
    "banned_token_ids": _banned,
    "allowed_token_ids": _allowed,
    "structured": _structured,
    "logprobs": _number("logprobs", st.integers(0, 3)),
    "prompt_logprobs": _number("prompt_logprobs", st.integers(0, 2)),
    "stop": _texts(lambda asked: asked.stopping.stop),
    "stop_token_ids": _stop_tokens,
    "min_tokens": _min_tokens,
    "ignore_eos": _ignore_eos,
    "include_stop": _include_stop,
    "max_drafts": lambda draw, asked: setattr(asked, "max_drafts", draw(st.integers(0, 2))),
    "skip_special_tokens": lambda draw, asked: setattr(asked, "skip_special_tokens", False),
    "resumable": lambda draw, asked: setattr(asked, "resumable", True),
}  # fmt: skip

NOT_DRAWN: Final = {
    "request_id": "each has its own",
    "model": "there is one",
    "text": "prompts are token ids here",
    "chat": "the model has no template",
    "token_ids": "always",
    "sampling": "field by field",
    "stopping": "field by field",
    "priority": "always",
    "seed": "always",
    "max_tokens": "always",
}
"""What is no control, or no choice; and why."""

CONTRADICTIONS: Final = [
    {"structured", "ignore_eos"},
    *({"beams", drawn} for drawn in ("temperature", "top_k", "top_p", "min_p", "typical_p", "best_of")),
]
"""Controls that no request may have together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnAsk:
    """One request of a crowd, and how its reader is disturbed."""

    message: Asked
    tenant: str
    arrives_s: float
    cuts: tuple[int, ...]  # after so many deltas its reader leaves, and comes back with its tickets


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnExecutor:
    """What an executor has, and when it is lost; it comes back as it was."""

    num_blocks: int
    max_sequences: int
    max_step_tokens: int
    credit: int
    compile_looks: int  # so often a grammar is looked for before it is there
    max_drafts: int  # tokens that it may guess ahead in a row: what followed the newest ones before
    dies_s: float | None = None


CALM: Final = DrawnExecutor(
    num_blocks=_SLAB_BLOCKS, max_sequences=8, max_step_tokens=64, credit=1, compile_looks=0, max_drafts=0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnStory:
    """A crowd and what it is served by. A step takes 10 ms."""

    asks: tuple[DrawnAsk, ...]
    executors: tuple[DrawnExecutor, ...]
    token_budget: int
    prefix_caching: bool
    preemptions_s: tuple[float, ...]  # when somebody has to give its blocks back


@st.composite
def asks(draw: Draw, controls: dict[str, Control] = CONTROLS) -> DrawnAsk:
    """A request with any of the controls."""
    shared = [3 + 7 * number % 90 for number in range(draw(st.sampled_from([0, 0, 20, 33])))]
    own = draw(st.lists(_TOKENS, min_size=1, max_size=7))
    asked = Asked(token_ids=pb.TokenIds(ids=[*shared, *own]))
    asked.sampling.seed = draw(st.integers(0, 3))
    if "temperature" in controls and draw(st.booleans()):
        asked.sampling.temperature = 0.0  # such an answer repeats itself, and is guessed
    asked.stopping.max_tokens = draw(st.integers(1, MAX_TOKENS))
    asked.priority = draw(st.sampled_from([pb.PRIORITY_HIGH, pb.PRIORITY_NORMAL, pb.PRIORITY_LOW]))
    names = draw(st.lists(st.sampled_from(list(controls)), max_size=7, unique=True))
    if "structured" in controls and "structured" not in names and draw(st.integers(0, 3)) == 0:
        names.append("structured")  # oftener than others: with it come rows that wait
    for name in names:
        if not any(name in pair and pair & set(names[: names.index(name)]) for pair in CONTRADICTIONS):
            controls[name](draw, asked)
    return DrawnAsk(
        message=asked,
        tenant=draw(st.sampled_from(["north", "south"])),
        arrives_s=draw(st.sampled_from([0.0, 0.005, 0.04, 0.1])),
        cuts=tuple(draw(st.lists(st.integers(1, 4), max_size=2))),
    )


executors = st.builds(
    DrawnExecutor,
    num_blocks=st.integers(FEWEST_BLOCKS, 9),
    max_sequences=st.sampled_from([2, 4, 8]),
    max_step_tokens=st.sampled_from([6, 16, 64]),
    credit=st.integers(1, 3),
    compile_looks=st.integers(0, 4),
    max_drafts=st.sampled_from([0, 4, 8]),
    dies_s=st.none() | st.floats(0.01, 0.3),
)


def _with_room(drawn: DrawnStory) -> DrawnStory:
    """The story where every executor can hold the beams that are asked for: else they are refused, and rightly."""
    width = max(ask.message.sampling.beams.width for ask in drawn.asks)
    roomier = tuple(
        replace(each, num_blocks=max(each.num_blocks, 3 + 3 * width), max_sequences=max(each.max_sequences, width + 1))
        for each in drawn.executors
    )
    return replace(drawn, executors=roomier) if width else drawn


stories = st.builds(
    DrawnStory,
    asks=st.lists(asks(), min_size=3, max_size=5).map(tuple),
    executors=st.tuples(executors, executors),
    token_budget=st.sampled_from([4, 24, 64]),
    prefix_caching=st.booleans(),
    preemptions_s=st.lists(st.floats(0.01, 0.3), max_size=3).map(tuple),
).map(_with_room)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """All that a reader was told of its request; equal for two runs that differ in nothing that may be seen."""

    tokens: dict[int, list[int]]
    text: dict[int, str]
    logprobs: dict[int, list[bytes]]
    prompt_logprobs: list[bytes]
    ends: dict[int, bytes]
    error: str = ""


def told(heard: Heard, error: PagewireError | None) -> Told:
    """What was heard, without times and without what the cache had."""
    ends: dict[int, bytes] = {}
    for choice, whole in sorted(heard.ends.items()):
        end = pb.Finish.FromString(whole.SerializeToString())
        usage = whole.usage
        end.usage.CopyFrom(
            pb.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
        )  # fmt: skip
        ends[choice] = end.SerializeToString()
    return Told(
        tokens=heard.tokens,
        text=heard.text,
        logprobs={
            choice: [each.SerializeToString() for each in found] for choice, found in heard.logprobs.items() if found
        },
        prompt_logprobs=[each.SerializeToString() for each in heard.prompt_logprobs],
        ends=ends,
        error=str(error or ""),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How a story went."""

    told: list[Told]
    happened: Counter[str]


# ---- what serves them


class _NotYet(Future[Any]):
    """A grammar that is compiled, and is not found so before it was looked for so often."""

    looks = 0

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0


class _Compiler:
    """Stands for the thread that compiles: it is done at once, and shows it when a test says."""

    looks = 0

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future = _NotYet()
        future.looks = self.looks
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001 - as an executor's thread does
            future.set_exception(error)
        return future


class _Computer:
    """A runner that is loaded once and serves one executor after the other."""

    def __init__(self, folder: Path) -> None:
        self.runner = ModelRunner(
            name="tiny",
            model_folder=folder,
            dtype="float32",
            block_size=BLOCK_SIZE,
            num_blocks=_SLAB_BLOCKS,
            max_sequences=CALM.max_sequences,
            max_step_tokens=CALM.max_step_tokens,
            num_threads=1,
            speculate="ngram",
        )
        self.facts: ExecutorFacts = self.runner.load(lambda stage, done, total: None)
        grammars = self.runner._resident._grammars
        assert isinstance(grammars, Grammars)
        grammars._tokenizer.result()
        self.compiler = grammars._thread = _Compiler()  # type: ignore[assignment]


@functools.cache
def _world() -> tuple[ModelFolder, Tokenizer, list[_Computer]]:
    """The model, and two that compute it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as kept:
        folder = save_tiny("llama", Path(kept) / "tiny")
        save_letters(folder)
        model = read_model_folder(folder)
        return model, Tokenizer(folder / "tokenizer.json"), [_Computer(folder) for _ in range(2)]


class _Executor:
    """One life of an executor, and the link to it: what goes over it is made a message, and a value again."""

    def __init__(self, cluster: _Cluster, computer: _Computer, drawn: DrawnExecutor, session: int) -> None:
        self._cluster, self._computer, self._session = cluster, computer, session
        self._plans: deque[StepPlan] = deque()
        self.is_dead = False
        computer.runner.begin_session()
        computer.compiler.looks = drawn.compile_looks
        self.facts = replace(
            computer.facts,
            name=f"executor-{session}",
            num_blocks=drawn.num_blocks,
            max_sequences=drawn.max_sequences,
            max_step_tokens=drawn.max_step_tokens,
            credit=drawn.credit,
            max_drafts=drawn.max_drafts,
            step_overhead_tokens=64,  # a guess is nearly always worth it
        )

    def send(self, plan: StepPlan) -> None:
        self._plans.append(plan_from_pb(plan_to_pb(plan, self._session)))
        if len(self._plans) == 1:
            self._cluster.world.after(0.01, self._compute)

    def close(self, why: str) -> None:
        raise AssertionError(f"the scheduler ends the link: {why}")

    def _compute(self) -> None:
        if self.is_dead:
            return
        # as long as it takes here: what the machine takes would be another story each time
        result = replace(execute(self._computer.runner, self._plans[0]), compute_ns=10_000_000)
        message = result_to_pb(result, self._session)
        self._cluster.process.call(self._cluster.engine.answered, self._session, result_from_pb(message))
        self._plans.popleft()
        if self._plans:
            self._cluster.world.after(0.01, self._compute)


class _Cluster:
    """A scheduler, its executors, and its callers."""

    def __init__(self, drawn: DrawnStory) -> None:
        model, tokenizer, self._computers = _world()
        self.happened: Counter[str] = Counter()
        self.world = World(0)
        self.process: Process = self.world.process("scheduler")
        self._drawn = drawn
        self._next_session = 0
        limits = SchedulerLimits(token_budget=drawn.token_budget, watermark=0.0, prefix_caching=drawn.prefix_caching)
        self.core = Scheduler(limits, model=model.digest, eos=set(model.eos_token_ids), secret=b"combinations")
        self.engine = Engine(self.core, clock_ns=lambda: int(self.process.time() * 1e9))
        answerer = Answerer(
            self.engine,
            model,
            tokenizer,
            None,
            tickets=Tickets([_KEY], lifetime_s=1000),
            live=_CountedRequests(self.happened),
            grammars=_Trusting(model),
            clock_s=self.world.wall_s,
        )
        self._service = SchedulerService(answerer, RequestLimits(), lambda: len(self.core.sessions))
        self._context = cast("Context", _NoDeadline())
        self.found: list[Told | None] = [None] * len(drawn.asks)

    def play(self) -> Played:
        """To the end of every stream. Raises what a reader, the loop or a runner does."""
        loop = self.process.spawn(self.engine.run())
        for computer, drawn in zip(self._computers, self._drawn.executors, strict=False):
            self._start(computer, drawn, drawn.dies_s)
        readers = [
            self.process.spawn(self._read(number, ask)) for number, ask in enumerate(self._drawn.asks)
        ]  # fmt: skip
        for when_s in self._drawn.preemptions_s:
            self.world.at(when_s, self._preempt)

        def is_over() -> bool:
            if loop.done():
                loop.result()
            return all(reader.done() for reader in readers)

        try:
            assert self.world.run(until=is_over, deadline_s=60.0), "a stream has no end"
            for reader in readers:
                reader.result()
            self.core.check()
        finally:
            self.world.close()
        for name in (
            "preemptions",
            "moved",
            "rows_unready",
            "cached_prompt_tokens",
            "drafted_tokens",
            "accepted_tokens",
        ):
            self.happened[name] += getattr(self.core.counters, name)
        return Played(told=[each for each in self.found if each is not None], happened=self.happened)

    def _start(self, computer: _Computer, drawn: DrawnExecutor, dies_s: float | None) -> None:
        """An executor dials in, and is lost when its time has come; then the next one comes with as much."""
        session = self._next_session
        self._next_session += 1
        executor = _Executor(self, computer, drawn, session)
        self.process.call(self.engine.join, session, executor.facts, executor)

        def die() -> None:
            executor.is_dead = True
            self.happened["deaths"] += bool(self.core.num_sequences)
            self.process.call(self.engine.lose, session, End.LOST)
            self.world.after(0.05, lambda: self._start(computer, drawn, None))

        if dies_s is not None:
            self.world.at(dies_s, die)

    def _preempt(self) -> None:
        """Somebody gives its blocks back: who was let in last."""
        for session in self.core.sessions:
            if session.running:
                self.core._moves.preempt(session, session.running[-1])
                self.process.call(self.engine._work.set)
                return

    async def _read(self, number: int, ask: DrawnAsk) -> None:
        let_in(Caller(tenant=ask.tenant))
        await asyncio.sleep(ask.arrives_s)
        asked = Asked(request_id=f"request-{number}")
        asked.MergeFrom(ask.message)
        heard, error = Heard(asked), None
        try:
            stream = self._service.GenerateStream(asked, self._context)
            for cut in (*ask.cuts, 0):
                if await _hear(heard, stream, cut):
                    break
                self.happened["resumed"] += 1
                stream = self._service.Resume(heard.to_resume(), self._context)
        except PagewireError as raised:
            error = raised
        self.found[number] = told(heard, error)


class _CountedRequests(LiveRequests):
    """Tells how often a reader came to a request that ran on."""

    def __init__(self, happened: Counter[str]) -> None:
        super().__init__()
        self._happened = happened

    def take_over(self, live: LiveRequest, stream: RequestStream) -> None:
        self._happened["attached"] += 1
        super().take_over(live, stream)


class _Trusting(GrammarChecker):
    """Lets every grammar in, without a worker."""

    async def check(self, field: str, grammar: Grammar, tenant: str) -> None:
        pass


class _NoDeadline:
    """As much of a call's context as the methods ask for."""

    def time_remaining(self) -> None:
        return None


async def _hear(heard: Heard, stream: AsyncGenerator[pb.GenerateStreamResponse, None], cut: int) -> bool:
    """Read until so many deltas have come, or to the end with 0. Returns whether that was the end."""
    num_deltas = 0
    async with aclosing(stream) as messages:
        async for message in messages:
            heard.hear(message)
            num_deltas += message.WhichOneof("event") == "delta"
            if cut and num_deltas == cut:
                return False
    return True


def play(drawn: DrawnStory) -> Played:
    """The story, to its end."""
    return _Cluster(drawn).play()


_alone: dict[bytes, Told] = {}


def alone(ask: DrawnAsk) -> Told:
    """What its reader is told when nothing else is asked for and nothing happens."""
    key = ask.message.SerializeToString(deterministic=True)
    if key not in _alone:
        calm = DrawnStory(
            asks=(replace(ask, arrives_s=0.0, cuts=()),),
            executors=(CALM,),
            token_budget=64,
            prefix_caching=False,
            preemptions_s=(),
        )
        (_alone[key],) = play(calm).told
    return _alone[key]


def check(drawn: DrawnStory) -> Counter[str]:
    """Assert that every stream of the story is its undisturbed run. Returns what has happened."""
    expected = [alone(ask) for ask in drawn.asks]
    played = play(drawn)
    assert played.told == expected
    played.happened["refused"] += sum(bool(each.error) for each in expected)
    played.happened["tokens"] += sum(len(tokens) for each in expected for tokens in each.tokens.values())
    return played.happened


def main() -> None:
    """Look until something breaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    happened: Counter[str] = Counter()

    @hypothesis.seed(options.seed)
    @hypothesis.settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
    @hypothesis.given(stories)
    def search(drawn: DrawnStory) -> None:
        happened.update(check(drawn))

    search()
    print(f"{options.examples} stories, nothing broke: {dict(happened)}")


if __name__ == "__main__":
    main()
