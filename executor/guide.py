"""Which tokens may come next, so that an answer stays one of its grammar.

A Guide walks through the output tokens that are known, and nothing else decides what it allows. So it is the same after
a preemption, on another executor, and in a stream that was resumed. Nothing is ever taken back: it takes a token in
when the next one is to be chosen, so it has seen none that a step in flight might still lose.

Grammars are compiled by a thread of their own from the admission on, so mostly while the prompt is computed. No step
waits for it: a row whose grammar is not there when its token is to be chosen is put off (executor/controls.py), and its
last token is computed once more.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
_WAIT_S: Final = 0.02  # that a step of nobody else waits: what comes meanwhile hardly feels it
_LATE_S: Final = 30.0  # after which a grammar that is not compiled is given up here: it took less where it was let in


class Grammars:
    """Compiles the grammars of one model. Made on any thread; guides are for one."""

    def __init__(self, tokenizer_file: Path, *, vocab_size: int, eos: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizer = self._thread.submit(load_tokenizer, tokenizer_file, vocab_size=vocab_size, eos=eos)
        # the thread's own; by domain too, so that no tenant's first token comes sooner by what another one has asked.
        # The one used last is last.
        self._compiled: OrderedDict[tuple[bytes, Grammar], LLMatcher] = OrderedDict()

    @classmethod
    def of(cls, folder: ModelFolder) -> Grammars:
        """Of the model in `folder`."""
        return cls(folder.path / "tokenizer.json", vocab_size=folder.vocab_size, eos=folder.eos_token_ids)

    def guide(self, grammar: Grammar, domain: bytes, ends: Sequence[int], output: Sequence[int]) -> Guide:
        """A guide for a sequence that the tokens `ends` end, and that has this output already. Returns at once."""
        matcher = self._thread.submit(self._matcher, grammar, domain, output)
        return Guide(matcher, ends, self._vocab_size, num_taken=len(output))

    def _matcher(self, grammar: Grammar, domain: bytes, output: Sequence[int]) -> LLMatcher:
        """A matcher that stands behind `output`."""
        key = domain, grammar
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = compile_grammar(self._tokenizer.result(), grammar)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        matcher = compiled.deep_copy()
        if output and not matcher.consume_tokens(list(output)):
            raise GrammarError("does not allow what is there")
        return matcher


class Guide:
    """What one sequence may say next."""

    def __init__(self, matcher: Future[LLMatcher], ends: Sequence[int], vocab_size: int, *, num_taken: int = 0) -> None:
        """`matcher` has taken the first `num_taken` output tokens."""
        self.compiling = matcher
        self.has_begun = False  # it is compiled, or will never be: `allowed` may be asked
        self.times_left_out = 0  # steps in a row that had no time for it
        self._late_s = time.monotonic() + _LATE_S
        self._ends = np.array(ends, np.int64)
        self._vocab_size = vocab_size
        self._matcher: LLMatcher | None = None
        self._num_taken = num_taken  # output tokens
        self._num_allowed = -1  # output tokens that `_allowed` is behind; -1: there is none yet
        self._allowed: NDArray[np.bool_] | None = None
        self._is_broken = False

    def __del__(self) -> None:
        self.compiling.cancel()  # nobody wants it any more: those that wait behind it are compiled sooner

    def is_ready(self) -> bool:
        """Look whether it can be asked by now. Returns at once; where it cannot, `allowed` must not be called."""
        if self.has_begun:
            return True
        is_done = self.compiling.done()
        if not is_done and time.monotonic() < self._late_s:
            return False
        self.has_begun = True
        # whatever it is: the row fails, and nobody else. It could be compiled elsewhere, and must be the same there
        error = self.compiling.exception() if is_done else TimeoutError()
        if error is None:
            self._matcher = self.compiling.result()
        else:
            _log.error("a grammar that a scheduler let in was not compiled: %s", type(error).__name__)
            self._is_broken = True
        return True

    def allowed(self, output: NDArray[np.int32]) -> NDArray[np.bool_] | None:
        """Which tokens (vocab_size,) may follow `output`, all output tokens so far, of which there are ever more.

        None where the grammar cannot go on: it met a limit of one step, or did not allow what is there.
        """
        assert self.has_begun, "its grammar is still compiled"
        if len(output) != self._num_allowed and not self._is_broken:
            self._allowed = self._follow(output)
            self._is_broken = self._allowed is None
            self._num_allowed = len(output)
        return self._allowed

    def num_allowed(self, output: NDArray[np.int32], tokens: Sequence[int]) -> int:
        """How many of `tokens` the grammar lets follow `output`, one behind the other. None of them is taken in.

        0 while it is compiled. It costs no mask.
        """
        if not self.is_ready() or self._is_broken or not self._take(output):
            return 0
        assert self._matcher is not None
        return self._matcher.validate_tokens(list(tokens))

    def _take(self, output: NDArray[np.int32]) -> bool:
        """Let the grammar have the tokens that it has not yet. False where it did not allow them."""
        assert self._matcher is not None
        new = output[self._num_taken :].tolist()
        if new and not self._matcher.consume_tokens(new):
            self._is_broken, self._allowed = True, None
            return False
        self._num_taken = len(output)
        return True

    def _follow(self, output: NDArray[np.int32]) -> NDArray[np.bool_] | None:
        matcher = self._matcher
        if not self._take(output) or matcher is None:
            return None
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            return None
        allowed = np.unpackbits(mask, count=self._vocab_size, bitorder="little").view(np.bool_)
        if matcher.is_accepting():
            allowed[self._ends] = True
        return allowed


def wait_for_one(guides: Sequence[Guide]) -> None:
    """Return when one of these is ready, and after a moment in any case."""
    wait([guide.compiling for guide in guides], _WAIT_S, return_when=FIRST_COMPLETED)
