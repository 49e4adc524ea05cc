"""Whether a caller's grammar can be compiled: asked of a worker, which compiles it within limits. Nothing does here.

The worker (services/grammar_worker.py) is a process that is started with the first question, and again should it ever
be lost. Its answers are remembered, so that most requests wait for none; for each tenant apart, because how soon an
answer comes would tell whether somebody had asked the same before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import sys
from collections import Counter, OrderedDict
from contextvars import Context
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final
from weakref import WeakValueDictionary

from common.errors import InvalidRequest, Overloaded, Unavailable
from common.model_folder import ModelFolder
from common.sampling import Grammar
from services.children import ROOT
from services.codec_link import grammar_to_pb
from services.piped_child import PipedChild

_log = logging.getLogger(__name__)

_LENGTH: Final = struct.Struct("<I")
LIMIT: Final = "must take at most"  # how a worker begins that met a limit
_LATE: Final = "\0"  # the worker's LATE, which is not imported: it would bring the executor's packages
_START_S: Final = 30.0  # a large vocabulary on a busy machine
_PATIENCE: Final = 4  # times the processor's time that is allowed: others want the processor too
_SLACK_S: Final = 2.0  # beyond what the worker allows a grammar: then the worker itself is stuck
_MAX_LINE: Final = 64  # grammars that wait to be compiled
_MAX_LINE_OF_ONE: Final = 8  # of one tenant
_REMEMBERED_BYTES: Final = 1 << 20  # of answers and keys
_ENTRY_BYTES: Final = 200  # what an entry takes beside its text


@dataclass(slots=True, eq=False)
class _Asked:
    """A grammar that waits for its turn, or is compiled, and those who wait for the answer."""

    tenant: str
    task: asyncio.Task[str]
    num_callers: int = 0
    is_compiled: bool = False  # now: a frame that is on its way is not torn in two


class GrammarChecker:
    """Asks one worker, one grammar at a time; tenants take turns."""

    def __init__(self, model: ModelFolder, *, cpu_s: float = 0.25, memory_mib: int = 512) -> None:
        """A grammar may take `cpu_s` of a processor's time, and `memory_mib` of memory."""
        self._cpu_s = cpu_s
        self._memory_mib = memory_mib
        self._arguments = [str(model.path / "tokenizer.json"), str(model.vocab_size), *map(str, model.eos_token_ids)]
        self._worker: asyncio.Task[PipedChild] | None = None
        self._no_tokenizer = ""  # what is wrong with it: nothing will ever be compiled
        self._one_at_a_time = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._asked: dict[bytes, _Asked] = {}  # those that wait or are compiled
        self._waiting: Counter[str] = Counter()  # how many of those each tenant has
        self._known: OrderedDict[bytes, str] = OrderedDict()  # key → what is wrong with it; the last used is last
        self._known_bytes = 0

    async def check(self, field: str, grammar: Grammar, tenant: str) -> None:
        """Raise InvalidRequest, naming `field`, for a grammar that no text can be of, or that asks too much.

        Raises Overloaded where too many wait or the machine is busy, Unavailable where the worker cannot be started.
        """
        message = grammar_to_pb(grammar).SerializeToString()
        key = _key(tenant, message)
        problem = self._known.get(key)
        if problem is not None:
            self._known.move_to_end(key)
        else:
            problem = await self._answer(self._asked.get(key) or self._line_up(field, key, message, tenant), key)
        if problem:
            raise InvalidRequest(field, problem)

    def _line_up(self, field: str, key: bytes, message: bytes, tenant: str) -> _Asked:
        """A place in the line. Raises Overloaded where there is none."""
        if len(self._asked) >= _MAX_LINE or self._waiting[tenant] >= _MAX_LINE_OF_ONE:
            raise Overloaded(f"{field}: {self._waiting[tenant]} of yours wait to be compiled, of {len(self._asked)}")
        # in a context of its own: others may wait for it, too, so what it logs is about no one request
        task = asyncio.create_task(self._ask(key, message, tenant), context=Context())
        asked = self._asked[key] = _Asked(tenant, task)
        self._waiting[tenant] += 1
        asked.task.add_done_callback(lambda _: self._leave(key, asked))
        return asked

    async def _answer(self, asked: _Asked, key: bytes) -> str:
        """Wait for it. Where everybody has left who did, the place is free at once."""
        asked.num_callers += 1
        try:
            return await asyncio.shield(asked.task)
        finally:
            asked.num_callers -= 1
            if not asked.num_callers and not asked.is_compiled:
                asked.task.cancel()
                self._leave(key, asked)

    def _leave(self, key: bytes, asked: _Asked) -> None:
        """Give up its place. Twice is harmless."""
        if self._asked.get(key) is not asked:
            return
        del self._asked[key]
        self._waiting[asked.tenant] -= 1
        if not self._waiting[asked.tenant]:
            del self._waiting[asked.tenant]

    async def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.cancel()
            if self._worker.done() and not self._worker.cancelled() and self._worker.exception() is None:
                await self._worker.result().end()

    async def _ask(self, key: bytes, message: bytes, tenant: str) -> str:
        """What is wrong with the grammar; empty when nothing is. Raises Unavailable, Overloaded."""
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        async with turn, self._one_at_a_time:
            worker = await self._ready()
            if self._no_tokenizer:
                return self._no_tokenizer
            self._asked[key].is_compiled = True
            try:
                async with asyncio.timeout(_PATIENCE * self._cpu_s + _SLACK_S):
                    problem = await _exchange(worker, message)
            except Exception as error:  # noqa: BLE001 - whatever a transport raises whose process is gone
                _log.error("the worker for grammars is lost: %s", type(error).__name__)
                self._worker = None
                await worker.end()
                raise Unavailable("structured output cannot be checked now") from None
            if problem == _LATE:
                raise Overloaded("the machine is too busy to check structured output")
            if not problem.startswith(LIMIT):  # that may be the moment's
                self._remember(key, problem)
            return problem

    def _remember(self, key: bytes, problem: str) -> None:
        self._known[key] = problem
        self._known_bytes += len(problem) + _ENTRY_BYTES
        while self._known_bytes > _REMEMBERED_BYTES:
            _, oldest = self._known.popitem(last=False)
            self._known_bytes -= len(oldest) + _ENTRY_BYTES

    async def _ready(self) -> PipedChild:
        worker = self._worker or self._start()
        try:
            process = await asyncio.shield(worker)
            if process.returncode is not None:  # it ended while nobody asked
                await process.end()
                process = await asyncio.shield(self._start())
            return process
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            _log.error("the worker for grammars cannot be started: %s", type(error).__name__)
            self._worker = None
            raise Unavailable("structured output cannot be checked now") from None

    def _start(self) -> asyncio.Task[PipedChild]:
        self._worker = asyncio.create_task(self._run())
        return self._worker

    async def _run(self) -> PipedChild:
        """A worker that has loaded the tokenizer."""
        worker = await PipedChild.start(
            [
                *(sys.executable, "-m", "services.grammar_worker", *self._arguments),
                *("--cpu-s", str(self._cpu_s), "--memory-mib", str(self._memory_mib)),
                *("--wait-s", str(_PATIENCE * self._cpu_s)),
                *("--die-with-parent", str(os.getpid())),
            ],
            {  # nothing of ours: no key, no failpoint
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            },
        )
        try:
            async with asyncio.timeout(_START_S):
                self._no_tokenizer = await _frame(worker)
        except BaseException:
            await worker.end()
            _log.info("the worker for grammars ended with exit code %s before it was ready", worker.returncode)
            raise
        return worker


def _key(tenant: str, message: bytes) -> bytes:
    """Of a grammar and who asks: nobody learns by the clock what another tenant has asked."""
    name = tenant.encode()
    return blake2b(len(name).to_bytes(4, "little") + name + message, digest_size=32).digest()


async def _exchange(worker: PipedChild, message: bytes) -> str:
    worker.write(_LENGTH.pack(len(message)) + message)
    return await _frame(worker)


async def _frame(worker: PipedChild) -> str:
    (length,) = _LENGTH.unpack(await worker.read(_LENGTH.size))
    return (await worker.read(length)).decode()
