"""Controls, processor by processor: what Transformers makes of the same logits, in any company, after any move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, slot_ref
from executor.controls import edit
from executor.resident import PlanError, Resident
from executor.sampler import sample

VOCAB_SIZE, EOS, STOP = 60, 2, 3
OFF = SamplingParams(temperature=0.0)
Logits = NDArray[np.float32]
Processors = Callable[[int], list[Any]]  # by the length of the prompt


def told(slot: int, prompt: Sequence[int], output: Sequence[int] = (), **changes: Any) -> NewSequence:
    """A sequence that has this output already."""
    new = NewSequence(
        ref=slot_ref(slot, 0),
        attempt=0,
        token_ids=[*prompt, *output],
        num_prompt=len(prompt),
        num_computed=0,
        block_table=[BlockId(slot)],
        sampling=OFF,
        choice=0,
        max_tokens=60,
        stop_token_ids=(EOS, STOP),
    )
    return replace(new, **changes)


def held(*sequences: NewSequence) -> Resident:
    """Tables in which they are resident, each about to sample."""
    tables = Resident(
        num_blocks=8, block_size=64, max_sequences=8, max_step_tokens=512, max_model_len=64, vocab_size=VOCAB_SIZE
    )
    tables.apply(StepPlan(step=0, refs=(), num_scheduled=(), new=sequences))
    return tables


def edited(logits: Logits, tables: Resident, slots: Sequence[int]) -> Logits:
    rows = logits.copy()
    edit(rows, tables, np.array(slots, np.int64))
    return rows


def noise(rows: int, seed: int) -> Logits:
    return (np.random.default_rng(seed).standard_normal((rows, VOCAB_SIZE)) * 3).astype(np.float32)


def tokens(count: int, seed: int, below: int = VOCAB_SIZE) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(0, below, count).tolist()
    return drawn


BIASES = {4: 2.5, 59: -100.0, 0: 7.0}
BAD = ((7,), (1, 8), (0, 1, 9), (2, 2, 2))
EVERYTHING = SamplingParams(
    temperature=0.0,
    logit_bias=tuple(sorted(BIASES.items())),
    repetition_penalty=1.7,
    bad_words=BAD,
    banned_token_ids=(5, 6),
    allowed_token_ids=tuple(range(8, 50)),
)


def bias(_: int) -> list[Any]:
    return [SequenceBiasLogitsProcessor({(token,): value for token, value in BIASES.items()})]  # type: ignore[arg-type]


def repetition(_: int) -> list[Any]:
    return [RepetitionPenaltyLogitsProcessor(1.7)]


def bad_words(_: int) -> list[Any]:
    return [NoBadWordsLogitsProcessor([list(word) for word in BAD], eos_token_id=[EOS, STOP])]


def min_tokens(num_prompt: int) -> list[Any]:
    return [MinNewTokensLengthLogitsProcessor(num_prompt, 5, [EOS, STOP])]


def banned(_: int) -> list[Any]:
    return [SuppressTokensLogitsProcessor([5, 6])]


def allowed(_: int) -> list[Any]:
    return [PrefixConstrainedLogitsProcessor(lambda _batch, _ids: list(range(8, 50)), num_beams=1)]


def everything(num_prompt: int) -> list[Any]:
    parts: list[Processors] = [bias, repetition, bad_words, min_tokens, banned, allowed]
    return [processor for part in parts for processor in part(num_prompt)]


@pytest.mark.parametrize(
    ("sampling", "least", "processors"),
    [
        (replace(OFF, logit_bias=EVERYTHING.logit_bias), 0, bias),
        (replace(OFF, repetition_penalty=1.7), 0, repetition),
        (replace(OFF, bad_words=BAD), 0, bad_words),
        (OFF, 5, min_tokens),
        (replace(OFF, banned_token_ids=(5, 6)), 0, banned),
        (replace(OFF, allowed_token_ids=EVERYTHING.allowed_token_ids), 0, allowed),
        (EVERYTHING, 5, everything),
    ],
    ids=["logit_bias", "repetition_penalty", "bad_words", "min_tokens", "banned", "allowed", "everything"],
)
def test_a_control_does_what_transformers_processor_does(
    sampling: SamplingParams, least: int, processors: Processors
) -> None:
    changed = 0
    for trial in range(40):
        prompt, output = tokens(1 + trial % 7, trial, below=4), tokens(trial % 9, 1000 + trial, below=4)
        logits = noise(1, trial)
        theirs = LogitsProcessorList(processors(len(prompt)))(
            torch.tensor([prompt + output]),  # type: ignore[arg-type]
            torch.from_numpy(logits.copy()),
        ).numpy()

        ours = edited(logits, held(told(0, prompt, output, sampling=sampling, min_tokens=least)), [0])

        assert np.isfinite(ours).tolist() == np.isfinite(theirs).tolist()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        changed += bool((ours != logits).any())
    assert changed >= 20


def test_presence_counts_once_and_frequency_every_time_and_only_over_the_answer() -> None:
    sampling = replace(OFF, presence_penalty=0.5, frequency_penalty=0.25)
    logits = noise(1, 1)

    ours = edited(logits, held(told(0, [7, 7, 8], [9, 4, 9, 9], sampling=sampling)), [0])

    expected = logits.copy()
    expected[0, 4] -= 0.75
    expected[0, 9] -= 1.25
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert ours[0, 7] == logits[0, 7] and ours[0, 8] == logits[0, 8]


def test_the_output_penalties_come_behind_the_repetition_penalty() -> None:
    sampling = replace(OFF, repetition_penalty=2.0, presence_penalty=1.0)
    logits = np.full((1, VOCAB_SIZE), 4, np.float32)

    assert edited(logits, held(told(0, [1], [9], sampling=sampling)), [0])[0, 9] == 4 / 2 - 1


def test_negative_penalties_favour_what_was_said() -> None:
    sampling = replace(OFF, presence_penalty=-2.0, frequency_penalty=-1.0, repetition_penalty=0.5)
    logits = np.ones((1, VOCAB_SIZE), np.float32)

    assert edited(logits, held(told(0, [1], [9, 9], sampling=sampling)), [0])[0, [1, 9]].tolist() == [2, 6]


def test_a_greedy_row_takes_the_likeliest_token_that_is_left() -> None:
    logits = noise(1, 3)
    best = int(logits.argmax())
    rows = edited(logits, held(told(0, [1], sampling=replace(OFF, banned_token_ids=(best,)))), [0])

    (chosen,) = sample(rows, None).tokens

    assert chosen == int(logits[0].argsort()[-2])


def test_rows_without_controls_are_not_touched() -> None:
    logits = noise(3, 4)
    tables = held(told(0, [1]), told(1, [2], sampling=EVERYTHING), told(2, [3], min_tokens=0))

    ours = edited(logits, tables, [2, 1, 0])

    assert (ours[[0, 2]] == logits[[0, 2]]).all()
    assert not (ours[1] == logits[1]).all()


def test_a_slot_forgets_the_controls_of_who_had_it_before() -> None:
    tables = held(told(0, [1], sampling=replace(EVERYTHING, presence_penalty=1.0), min_tokens=4))
    again = told(0, [1], ref=slot_ref(0, 1))
    tables.apply(StepPlan(step=1, refs=(), num_scheduled=(), released=[slot_ref(0, 0)], new=[again]))

    logits = noise(1, 5)

    assert (edited(logits, tables, [0]) == logits).all()


@pytest.mark.parametrize(
    ("sampling", "least", "left"),
    [
        (replace(OFF, allowed_token_ids=(7,), bad_words=((7,),)), 0, [7]),
        (replace(OFF, allowed_token_ids=(7, 8), bad_words=((1, 7), (8,))), 0, [7, 8]),
        (replace(OFF, allowed_token_ids=(EOS, 8), bad_words=((8,),)), 1, [8]),
        (replace(OFF, allowed_token_ids=(7, 8), bad_words=((7,),)), 0, [8]),
    ],
)
def test_bad_words_that_would_leave_nothing_do_not_count(sampling: SamplingParams, least: int, left: list[int]) -> None:
    ours = edited(noise(1, 6), held(told(0, [1], sampling=sampling, min_tokens=least)), [0])

    assert np.flatnonzero(np.isfinite(ours[0])).tolist() == left


def test_a_rule_for_a_token_that_there_is_not_is_refused_by_name() -> None:
    for wrong in (
        replace(OFF, logit_bias=((VOCAB_SIZE, 1.0),)),
        replace(OFF, allowed_token_ids=(VOCAB_SIZE,)),
        replace(OFF, banned_token_ids=(1, VOCAB_SIZE)),
        replace(OFF, bad_words=((1, VOCAB_SIZE),)),
    ):
        with pytest.raises(PlanError, match="a rule for a token outside the vocabulary of 60"):
            held(told(0, [1], sampling=wrong))


ID = st.integers(0, 11)  # few, so that they meet
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.dictionaries(ID, st.floats(-100, 100, width=32), max_size=3).map(lambda d: tuple(sorted(d.items()))),
    allowed_token_ids=st.lists(st.integers(12, 20), max_size=4).map(tuple),
    banned_token_ids=st.lists(ID, max_size=3).map(tuple),
    bad_words=st.lists(st.lists(ID, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(SAMPLINGS, st.lists(ID, min_size=1, max_size=9), st.integers(0, 6)), min_size=1, max_size=6))
def test_a_row_among_others_is_what_it_is_alone(asked: list[tuple[SamplingParams, list[int], int]]) -> None:
    sequences = [
        told(slot, known[:1], known[1:], sampling=sampling, min_tokens=least)
        for slot, (sampling, known, least) in enumerate(asked)
    ]
    logits = noise(len(asked), 7)
    order = list(range(len(asked)))[::-1]

    together = edited(logits, held(*sequences), order)

    for row, slot in enumerate(order):
        assert (edited(logits[row : row + 1], held(sequences[slot]), [slot]) == together[row]).all()


@settings(deadline=None, max_examples=60)
@given(
    sampling=SAMPLINGS,
    prompt=st.lists(ID, min_size=1, max_size=5),
    least=st.integers(0, 12),
    seed=st.integers(0, 1000),
    at=st.integers(1, 11),
)
def test_a_sequence_that_is_told_again_behind_any_token_goes_on_as_if_it_had_never_moved(
    sampling: SamplingParams, prompt: list[int], least: int, seed: int, at: int
) -> None:
    def generate(new: NewSequence) -> list[int]:
        """Greedy tokens up to the twelfth, of a model that looks at nothing but how many there are."""
        tables, chosen = held(new), [*new.token_ids[new.num_prompt :]]
        while len(chosen) < 12 and not (chosen and chosen[-1] in (EOS, STOP)):
            rows = tables.apply(StepPlan(step=0, refs=[new.ref], num_scheduled=[_left(tables)]))
            logits = edited(noise(1, seed + len(chosen)), tables, [0])
            chosen += tables.advance(rows, sample(logits, None).tokens).tokens
        return chosen

    whole = generate(told(0, prompt, sampling=sampling, min_tokens=least))
    at = min(at, len(whole) - 1)

    assert generate(told(0, prompt, whole[:at], sampling=sampling, min_tokens=least)) == whole
    ended = [n for n, token in enumerate(whole, start=1) if token in (EOS, STOP)]
    assert all(n > least for n in ended)


def _left(tables: Resident) -> int:
    return int(tables.num_tokens[0] - tables.num_computed[0])
