"""Grammars of callers, the evil ones too, with the real worker: each gets its answer, and nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidRequest, Overloaded, Unavailable
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import Grammar
from executor.grammar import load_tokenizer
from protos import executor_pb2 as pb
from services import grammar_checker, grammar_worker
from services.codec_link import grammar_from_pb
from services.grammar_checker import GrammarChecker
from tests.e2e import fake_model
from tests.services.served import HANG_S, until

GOOD = Grammar("regex", "[a-c]+")
BAD = Grammar("regex", "((")
SLOW = Grammar("json_schema", '{"type": "integer", "multipleOf": 999983}')  # fifteen seconds, 300 MiB
WIDE = Grammar(
    "json_schema", json.dumps({"properties": {f"property number {i}": {"type": "string"} for i in range(5000)}})
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(fake_model.write(tmp_path_factory.mktemp("checker") / "fake"))


def with_checker(
    model: ModelFolder, test: Callable[[GrammarChecker], Awaitable[None]], *, patience: int = 10_000, **limits: Any
) -> None:
    """Run a test with a worker that is waited for as long as it takes, however busy the machine is."""

    async def main() -> None:
        checker = GrammarChecker(model, **limits)
        try:
            async with asyncio.timeout(2 * HANG_S):
                await test(checker)
        finally:
            await checker.close()

    with pytest.MonkeyPatch.context() as changed:
        for limit in ("_START_S", "_SLACK_S"):
            changed.setattr(grammar_checker, limit, HANG_S)
        changed.setattr(grammar_checker, "_PATIENCE", patience)
        asyncio.run(main())


async def problem_with(checker: GrammarChecker, grammar: Grammar, tenant: str = "") -> str:
    with pytest.raises(InvalidRequest) as refused:
        await checker.check("the_field", grammar, tenant)
    assert refused.value.field == "the_field"
    return refused.value.problem


def test_a_good_grammar_passes_and_a_bad_one_is_refused_by_its_field_and_reason(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        await checker.check("regex", GOOD, "")
        assert await problem_with(checker, BAD) == "unclosed group"
        await checker.check("regex", GOOD, "")

    with_checker(model, test)


@pytest.mark.parametrize("grammar", [SLOW, WIDE], ids=["slow", "wide"])
def test_one_that_takes_too_long_is_refused_and_the_next_is_served(model: ModelFolder, grammar: Grammar) -> None:
    async def test(checker: GrammarChecker) -> None:
        assert await problem_with(checker, grammar) == "must take at most 0.3 s and 512 MiB to compile"
        await checker.check("regex", GOOD, "")

    with_checker(model, test, cpu_s=0.3)  # less, and a busy machine would not know


def test_where_the_machine_is_too_busy_to_find_out_that_is_told_and_no_fault_of_the_grammar(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        with pytest.raises(Overloaded, match="the machine is too busy"):
            await checker.check("regex", SLOW, "")

    with_checker(model, test, patience=0)


def test_one_that_takes_too_much_memory_is_refused_and_the_next_is_served(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        assert await problem_with(checker, WIDE) == "must take at most 20 s and 16 MiB to compile"
        await checker.check("regex", GOOD, "")

    with_checker(model, test, cpu_s=20, memory_mib=16)


def test_the_loop_goes_on_while_an_evil_grammar_is_compiled(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        turns = 0
        refused = asyncio.ensure_future(problem_with(checker, SLOW))
        while not refused.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 100

    with_checker(model, test, cpu_s=0.1)


def test_what_is_known_is_told_without_the_worker(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        await checker.check("regex", GOOD, "")
        await problem_with(checker, BAD)
        await checker.close()
        await checker.check("regex", GOOD, "")
        assert await problem_with(checker, BAD) == "unclosed group"

    with_checker(model, test)


def test_what_is_remembered_is_bounded_in_bytes(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_checker, "_REMEMBERED_BYTES", 1000)

    async def test(checker: GrammarChecker) -> None:
        for number in range(12):
            await checker.check("regex", Grammar("regex", f"a{{{number}}}"), "")
        assert 0 < len(checker._known) <= 5
        assert checker._known_bytes == sum(200 + len(problem) for problem in checker._known.values())

    with_checker(model, test)


def test_a_worker_that_is_lost_is_one_unavailable_answer_and_then_a_new_worker(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        await checker.check("regex", GOOD, "")
        assert checker._worker is not None
        worker = await checker._worker
        os.kill(worker.pid, signal.SIGSTOP)  # so that it has been asked, and has not answered, when it is lost
        asking = asyncio.ensure_future(checker.check("regex", BAD, ""))
        await until(lambda: any(asked.is_compiled for asked in checker._asked.values()))
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(Unavailable):
            await asking
        assert await problem_with(checker, BAD) == "unclosed group"

    with_checker(model, test)


def test_a_worker_that_ended_while_nobody_asked_is_started_anew(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        await checker.check("regex", GOOD, "")
        assert checker._worker is not None
        worker = await checker._worker
        os.kill(worker.pid, signal.SIGKILL)
        await worker.wait()

        assert await problem_with(checker, BAD) == "unclosed group"

    with_checker(model, test)


def test_what_met_a_limit_is_asked_again(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["must take at most 1 s and 1 MiB to compile", ""])

    async def exchange(*_: Any) -> str:
        return next(answers)

    monkeypatch.setattr(grammar_checker, "_exchange", exchange)

    async def test(checker: GrammarChecker) -> None:
        assert (await problem_with(checker, GOOD)).startswith("must take at most")
        await checker.check("regex", GOOD, "")

    with_checker(model, test)


def test_who_leaves_while_it_waits_takes_no_answer_from_others(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        first = asyncio.create_task(checker.check("json_schema", SLOW, ""))
        second = asyncio.create_task(checker.check("regex", GOOD, ""))
        third = asyncio.create_task(problem_with(checker, BAD))
        while not checker._asked:
            await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        await second
        assert await third == "unclosed group"

    with_checker(model, test, cpu_s=0.1)


def test_a_tenant_with_many_grammars_lets_another_one_in_between(model: ModelFolder) -> None:
    async def test(checker: GrammarChecker) -> None:
        done: list[str] = []

        async def check(tenant: str, number: int) -> None:
            await checker.check("regex", Grammar("regex", f"{tenant}{{{number}}}"), tenant)
            done.append(tenant)

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(check("a", number))
            group.create_task(check("b", 0))

        assert done.index("b") < 3

    with_checker(model, test)


def test_where_too_many_wait_one_more_is_refused(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_checker, "_MAX_LINE", 2)

    async def test(checker: GrammarChecker) -> None:
        waiting = [asyncio.create_task(checker.check("regex", Grammar("regex", "a" * n), "")) for n in (1, 2)]
        while len(checker._asked) < 2:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await checker.check("regex", GOOD, "")
        await asyncio.gather(*waiting)
        await checker.check("regex", GOOD, "")

    with_checker(model, test)


def test_a_tenant_with_too_many_that_wait_keeps_no_place_from_another(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checker, "_MAX_LINE_OF_ONE", 2)

    async def test(checker: GrammarChecker) -> None:
        waiting = [asyncio.create_task(checker.check("regex", Grammar("regex", "a" * n), "a")) for n in (1, 2)]
        while len(checker._asked) < 2:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 of yours"):
            await checker.check("regex", GOOD, "a")
        await checker.check("regex", GOOD, "b")
        await asyncio.gather(*waiting)
        await checker.check("regex", Grammar("regex", "b"), "a")

    with_checker(model, test)


class Script:
    """Stands for the worker: what it was asked, and answers once it may."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()

    async def exchange(self, _: object, message: bytes) -> str:
        self.asked.append(grammar_from_pb(pb.Grammar.FromString(message), "").source)
        await self.may_answer.wait()
        return ""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()

    async def ready(_: GrammarChecker) -> None:
        return None

    monkeypatch.setattr(GrammarChecker, "_ready", ready)
    monkeypatch.setattr(grammar_checker, "_exchange", script.exchange)
    return script


def a(count: int) -> Grammar:
    return Grammar("regex", "a" * count)


async def waiting(checker: GrammarChecker, count: int, tenant: str = "", *, first: int = 1) -> list[asyncio.Task[None]]:
    """So many calls that wait for grammars of their own."""
    calls = [asyncio.create_task(checker.check("regex", a(n), tenant)) for n in range(first, first + count)]
    for _ in range(5):
        await asyncio.sleep(0)
    return calls


async def leave(*calls: asyncio.Task[None]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def test_what_one_tenant_has_asked_makes_no_answer_sooner_for_another(model: ModelFolder, worker: Script) -> None:
    async def test(checker: GrammarChecker) -> None:
        both = [asyncio.create_task(checker.check("regex", GOOD, tenant)) for tenant in ("north", "south")]
        worker.may_answer.set()
        await asyncio.gather(*both)
        for tenant in ("north", "east"):
            await checker.check("regex", GOOD, tenant)

        assert worker.asked == [GOOD.source] * 3, "once for each tenant"

    with_checker(model, test)


def test_a_name_and_a_grammar_are_never_taken_for_another_name_and_another_grammar() -> None:
    assert grammar_checker._key("a", b"bc") != grammar_checker._key("ab", b"c")


def test_who_leaves_gives_up_its_place_at_once(
    model: ModelFolder, worker: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checker, "_MAX_LINE_OF_ONE", 3)

    async def test(checker: GrammarChecker) -> None:
        compiled, *others = await waiting(checker, 3)
        with pytest.raises(Overloaded):
            await checker.check("regex", a(9), "")
        await leave(*others)
        next_ones = await waiting(checker, 2, first=5)
        worker.may_answer.set()
        await asyncio.gather(compiled, *next_ones)

        assert worker.asked == ["a", "a" * 5, "a" * 6], "nothing is compiled for those who have left"
        assert not checker._asked and not checker._waiting

    with_checker(model, test)


def test_one_that_is_compiled_when_its_caller_leaves_is_remembered(model: ModelFolder, worker: Script) -> None:
    async def test(checker: GrammarChecker) -> None:
        await leave(*await waiting(checker, 1))
        later = await waiting(checker, 1)
        worker.may_answer.set()
        await asyncio.gather(*later)
        await checker.check("regex", a(1), "")

        assert worker.asked == ["a"]

    with_checker(model, test)


def test_a_place_is_kept_as_long_as_one_of_those_who_ask_the_same_is_there(model: ModelFolder, worker: Script) -> None:
    async def test(checker: GrammarChecker) -> None:
        compiled = await waiting(checker, 1)
        one, other = [asyncio.create_task(checker.check("regex", GOOD, "")) for _ in range(2)]
        await asyncio.sleep(0)
        await leave(one)
        worker.may_answer.set()
        await asyncio.gather(*compiled, other)

        assert worker.asked == ["a", GOOD.source]

    with_checker(model, test)


def test_a_model_whose_tokenizer_cannot_be_read_says_so(model: ModelFolder, tmp_path: Path) -> None:
    folder = fake_model.write(tmp_path / "fake")
    (folder / "tokenizer.json").write_text('{"model": {}}')

    async def test(checker: GrammarChecker) -> None:
        for _ in range(2):
            assert "the tokenizer of this model allows no structured output" in await problem_with(checker, GOOD)

    with_checker(read_model_folder(folder), test)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # other tests leave threads behind
def test_a_child_that_a_signal_ends_met_a_limit(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(model.path / "tokenizer.json", vocab_size=model.vocab_size, eos=model.eos_token_ids)
    monkeypatch.setattr(grammar_worker, "compile_grammar", lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    problem = grammar_worker.problem_of(tokenizer, GOOD, cpu_s=5, memory_mib=64, wait_s=HANG_S)

    assert problem == "must take at most 5 s and 64 MiB to compile"
