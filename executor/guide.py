"""Which tokens may come next, so that an answer stays one of its grammar.

A Guide walks through the output tokens that are known, and nothing else decides what it allows. So it is the same after
a preemption, on another executor, and in a stream that was resumed. Nothing is ever taken back: it takes a token in
when the next one is to be chosen, so it has seen none that a step in flight might still lose.

Grammars are compiled by a thread of their own from the admission on, so mostly while the prompt is computed.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from common.model_folder import ModelFolder
from common.sampling import Grammar
from executor.grammar import GrammarError, compile_grammar, load_tokenizer

_log = logging.getLogger(__name__)

_KEPT: Final = 64  # compiled grammars
_WAIT_S: Final = 0.5  # that the rows of a step wait for compilations, together: more would look like a step that hangs


class Grammars:
    """Compiles the grammars of one model. Made on any thread; guides are for one."""

    def __init__(self, tokenizer_file: Path, *, vocab_size: int, eos: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._patience = _Patience()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizer = self._thread.submit(load_tokenizer, tokenizer_file, vocab_size=vocab_size, eos=eos)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # the thread's own; the one used last is last

    @classmethod
    def of(cls, folder: ModelFolder) -> Grammars:
        """Of the model in `folder`."""
        return cls(folder.path / "tokenizer.json", vocab_size=folder.vocab_size, eos=folder.eos_token_ids)

    def guide(self, grammar: Grammar, ends: Sequence[int]) -> Guide:
        """A guide for a sequence that the tokens `ends` end. Returns at once."""
        self.begin_step()
        return Guide(self._thread.submit(self._matcher, grammar), ends, self._vocab_size, self._patience)

    def begin_step(self) -> None:
        """Another step: its rows may wait for what is not compiled."""
        self._patience.begin_step()

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = compile_grammar(self._tokenizer.result(), grammar)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return compiled.deep_copy()


class _Patience:
    """How long the compute thread may wait for compilations: all rows of a step share it."""

    def __init__(self) -> None:
        self._until_s: float | None = None  # None: nobody has waited in this step

    def begin_step(self) -> None:
        """Wait anew."""
        self._until_s = None

    def left_s(self) -> float:
        """Seconds that the next row may wait."""
        now_s = time.monotonic()
        if self._until_s is None:
            self._until_s = now_s + _WAIT_S
        return max(0.0, self._until_s - now_s)


class Guide:
    """What one sequence may say next."""

    def __init__(
        self, matcher: Future[LLMatcher], ends: Sequence[int], vocab_size: int, patience: _Patience | None = None
    ) -> None:
        self._future = matcher
        self._patience = patience or _Patience()
        self._ends = np.array(ends, np.int64)
        self._vocab_size = vocab_size
        self._matcher: LLMatcher | None = None
        self._num_taken = -1  # output tokens that `_allowed` is behind; -1: there is none yet
        self._allowed: NDArray[np.bool_] | None = None
        self._is_broken = False

    def __del__(self) -> None:
        self._future.cancel()  # nobody wants it any more: those that wait behind it are compiled sooner

    def allowed(self, output: NDArray[np.int32]) -> NDArray[np.bool_] | None:
        """Which tokens (vocab_size,) may follow `output`, all output tokens so far, of which there are ever more.

        None where the grammar cannot go on: it met a limit of one step, or did not allow what is there.
        """
        if len(output) != self._num_taken and not self._is_broken:
            self._allowed = self._follow(output)
            self._is_broken = self._allowed is None
            self._num_taken = len(output)
        return self._allowed

    def num_allowed(self, output: NDArray[np.int32], tokens: Sequence[int]) -> int:
        """How many of `tokens` the grammar lets follow `output`, one behind the other. None of them is taken in."""
        if self.allowed(output) is None or self._matcher is None:
            return 0
        return self._matcher.validate_tokens(list(tokens))

    def _follow(self, output: NDArray[np.int32]) -> NDArray[np.bool_] | None:
        if self._matcher is None:
            try:
                self._matcher = self._future.result(self._patience.left_s())
            except (GrammarError, TimeoutError) as error:  # it could be compiled elsewhere, and must be the same there
                _log.error("a grammar that the scheduler let in was not compiled: %s", type(error).__name__)
                return None
        matcher = self._matcher
        new = output[max(self._num_taken, 0) :].tolist()
        if new and not matcher.consume_tokens(new):
            return None
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            return None
        allowed = np.unpackbits(mask, count=self._vocab_size, bitorder="little").view(np.bool_)
        if matcher.is_accepting():
            allowed[self._ends] = True
        return allowed
