"""A step that is in flight: what the host keeps of it between its launch and its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from common.step import Embedded, Ranked, Scored, StepResult
from executor.embedding import Embedding, embedded
from executor.gpu.inputs import StepInputs
from executor.gpu.packing import StagingBuffer
from executor.resident import Reserved
from executor.scoring import Asking, score_sampled


class _Owner(Protocol):
    """Who launched it."""

    def wait_for(self, buffer: StagingBuffer, /) -> None: ...

    def result_of(self, step: FlyingStep, /) -> StepResult: ...


class FlyingStep:
    """A step from its launch until its result is taken."""

    def __init__(self, owner: _Owner, number: int, buffer: StagingBuffer, asking: list[Asking], size: int) -> None:
        self.number = number
        self.buffer = buffer
        self.num_sampled = size
        self.reserved: Reserved | None = None
        self.chosen: dict[int, int] = {}  # tokens that the host chose, by sampled row; -1: none could be
        self.unready: list[int] = []  # sampled rows for which none can be chosen yet
        self.scored: list[Scored] = []  # tokens of prompts
        self.ranked: list[Ranked] = []  # beams
        self.embedding: list[Embedding] = []  # sampled rows that embed
        self.settled: StepResult | None = None
        # on the device, while it is launched
        self.inputs: StepInputs | None = None
        self.logits: Tensor | None = None
        self._owner = owner
        self._asking = asking
        self._raw: Tensor | None = None  # their logits, in page-locked memory, once `buffer.done` has come
        self._vectors: Tensor | None = None  # of rows that embed, likewise

    def wait(self) -> None:
        """Block until the device has computed it."""
        self._owner.wait_for(self.buffer)

    def result(self) -> StepResult:
        """What came out."""
        return self._owner.result_of(self)

    def give(
        self,
        tokens: Tensor,
        logits: Tensor,
        pinned: Callable[[int, torch.dtype], Tensor],
        hidden: Tensor | None = None,
    ) -> None:
        """Bring to the host what it will read of the step. Inside of queued work."""
        count = self.num_sampled
        self.buffer.tokens[:count].copy_(tokens[:count], non_blocking=True)
        self.logits = logits
        if hidden is not None:
            self._vectors = pinned(hidden.numel(), hidden.dtype).view(hidden.shape)
            self._vectors.copy_(hidden, non_blocking=True)
        if self._asking:
            vocab_size = logits.shape[1]
            self._raw = pinned(len(self._asking) * vocab_size, logits.dtype).view(-1, vocab_size)
            for line, each in zip(self._raw, self._asking, strict=True):
                line.copy_(logits[each.row], non_blocking=True)

    def score_sampled(self, tokens: list[int]) -> list[Scored]:
        """How likely the tokens (S,) are, where that is asked for."""
        if not self._asking:
            return []
        assert self._raw is not None
        return score_sampled(self._asking, self._raw.float().numpy(), tokens)

    def embedded(self, failed: list[int]) -> list[Embedded]:
        """The vectors of the rows that embed, but for those that failed."""
        return embedded(self.embedding, self._vectors, failed) if self._vectors is not None else []

    def forget(self) -> None:
        """Let go of everything but the result."""
        self.inputs = self.logits = self._raw = self._vectors = None
