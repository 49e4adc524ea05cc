"""Plans for a runner as a scheduler would make them: chunked prompts beside decode rows, steps in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.blocks import blocks_for
from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_ref

GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True, kw_only=True)
class _Sequence:
    told: NewSequence
    computed: int = 0
    planned: int = 0  # output tokens that plans have asked for
    tokens: list[int] = field(default_factory=list[int])


def drive(
    runner: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    block_size: int,
    chunk: int,
    in_flight: int = 2,
    sampling: SamplingParams = GREEDY,
    together: bool = False,
    heard: Callable[[StepResult], None] = lambda _: None,
) -> list[list[int]]:
    """Answer all prompts in one session, at most `chunk` tokens of a prompt a step; the tokens of each.

    The first prompt begins alone, the next one a step later, and so on: steps are mixed, and then all decode. Or all
    begin together. `heard` is given each result when it is there.
    """
    runner.begin_session()
    waiting = deque(_sequences(prompts, max_tokens, block_size, sampling))
    everyone = list(waiting)
    by_ref = {each.told.ref: each for each in everyone}
    running: list[_Sequence] = []
    launched: deque[Any] = deque()
    step = 0
    while waiting or running or launched:
        if len(launched) == in_flight or not (waiting or running):
            heard(_fold(launched.popleft(), by_ref))
            continue
        new = [waiting.popleft().told for _ in range(len(waiting) if together else min(1, len(waiting)))]
        running += [by_ref[told.ref] for told in new]
        refs, granted = _rows(running, chunk, max_tokens)
        running = [each for each in running if each.planned < max_tokens]
        launched.append(runner.launch(StepPlan(step=step, refs=refs, num_scheduled=granted, new=new)))
        step += 1
    return [each.tokens for each in everyone]


def _rows(running: Sequence[_Sequence], chunk: int, max_tokens: int) -> tuple[list[SlotRef], list[int]]:
    refs, granted = [], []
    for each in running:
        left = len(each.told.token_ids) - each.computed
        count = min(chunk, left) if left > 0 else 1
        each.computed += count
        if each.computed >= len(each.told.token_ids):
            each.planned += 1
        refs.append(each.told.ref)
        granted.append(count)
    return refs, granted


def _fold(launched: Any, by_ref: dict[SlotRef, _Sequence]) -> StepResult:
    launched.wait()
    result: StepResult = launched.result()
    if result.failed:
        raise RuntimeError(f"logits of {len(result.failed)} rows are not finite")
    for ref, token in zip(result.refs, result.tokens, strict=True):
        by_ref[ref].tokens.append(token)
    return result


def _sequences(
    prompts: Sequence[Sequence[int]], max_tokens: int, block_size: int, sampling: SamplingParams
) -> list[_Sequence]:
    """Each with all the blocks that it will need, scattered."""
    each = [blocks_for(len(prompt) + max_tokens, block_size) for prompt in prompts]
    names = iter(np.random.default_rng(3).permutation(sum(each)).tolist())
    return [
        _Sequence(
            told=NewSequence(
                ref=slot_ref(slot, 0),
                attempt=0,
                token_ids=list(prompt),
                num_prompt=len(prompt),
                num_computed=0,
                block_table=[BlockId(next(names)) for _ in range(each[slot])],
                sampling=sampling,
                choice=0,
                max_tokens=max_tokens,
                stop_token_ids=(),
            )
        )
        for slot, prompt in enumerate(prompts)
    ]


def blocks_needed(prompts: Sequence[Sequence[int]], max_tokens: int, block_size: int) -> int:
    """Blocks that `drive` hands out."""
    return sum(blocks_for(len(prompt) + max_tokens, block_size) for prompt in prompts)
