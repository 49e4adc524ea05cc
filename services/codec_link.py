"""Protobuf ↔ values, for the link: the only converter between protos/executor.proto and common/step.py.

Columns are little-endian u32 in bytes. Executor's side: each column is a memoryview of the message, which is not
copied and which numpy.asarray takes as it is. Scheduler's side: lists, because the scheduler reads every number.
Says whether a message is well formed; whether it makes sense now (session, step, free blocks) is its reader's to say.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final

from common.determinism import is_determinism_class
from common.errors import ExecutorRejected, InvalidRequest
from common.sampling import Grammar, RequestLimits, SamplingParams, check_sampling
from common.step import (
    MAX_DRAFTS,
    Embedded,
    ExecutorFacts,
    Logprobs,
    NewSequence,
    Ranked,
    Scored,
    StepPlan,
    StepResult,
)
from common.types import MAX_SLOTS, BlockId, SlotRef
from protos import executor_pb2 as pb

PROTOCOL: Final = 1
"""The version of the contract that this code speaks."""

INCARNATION_BYTES: Final = 16

_NATIVE: Final = sys.byteorder == "little" and array("I").itemsize == 4  # a column can be read where it lies

_U32: Final = (1 << 32) - 1

# The ranges that the sampler can compute with; a caller's limits were checked at the public edge.
_COMPUTABLE: Final = replace(
    RequestLimits(),
    max_temperature=sys.float_info.max,
    min_repetition_penalty=sys.float_info.min,
    max_repetition_penalty=sys.float_info.max,
    max_penalty=sys.float_info.max,
    max_logit_bias=sys.float_info.max,
    max_logprobs=_U32,
)

_NOTHING: Final = memoryview(array("I", ()))

# Columns of a plan that most steps do not have, and which of them have one number for each of another's.
_CHANGES: Final = (
    "append_refs", "append_blocks", "replace_refs", "replace_indices", "replace_blocks", "released",
    "told_refs", "told_tokens",
)  # fmt: skip
_EQUALLY_LONG: Final = (
    ("append_blocks", "append_refs"), ("replace_indices", "replace_refs"), ("replace_blocks", "replace_refs"),
    ("told_tokens", "told_refs"),
)  # fmt: skip

# At least 1, or the scheduler would divide by zero or wait for ever. It keeps a line for each block, and plans ahead
# while there is credit: where those are many it would be out of memory, or plan and do nothing else.
_MAX_FACTS: Final = {
    "vocab_size": _U32,
    "max_model_len": _U32,
    "num_blocks": 1 << 22,
    "block_size": 1 << 16,
    "max_sequences": MAX_SLOTS,
    "max_step_tokens": _U32,
    "credit": 16,
}
_MAX_WORD: Final = 256  # characters of a name: it goes into log lines


class WireError(ValueError):
    """A message of the link is malformed. `field` is its path in protos/executor.proto."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def plan_to_pb(plan: StepPlan, session: int) -> pb.StepPlan:
    """The plan as a message of `session`. A number that does not fit in 32 bits raises struct.error."""
    message = pb.StepPlan(session=session, step=plan.step, refs=_pack(plan.refs))
    if plan.num_scheduled.count(1) < len(plan.num_scheduled):
        message.num_scheduled = _pack(plan.num_scheduled)
    for name in _CHANGES:
        if len(column := getattr(plan, name)):
            setattr(message, name, _pack(column))
    if plan.new:
        message.new.extend([_new_to_pb(new) for new in plan.new])
    if plan.copies:
        message.copies = _pack([block for pair in plan.copies for block in pair])
    if plan.max_drafts:
        message.max_drafts = _pack(plan.max_drafts)
    return message


def plan_from_pb(message: pb.StepPlan) -> StepPlan:
    """The plan of a message, its columns as memoryviews. Raises WireError naming the malformed field."""
    refs = _view("refs", message.refs)
    num_scheduled = _view("num_scheduled", message.num_scheduled)
    if not num_scheduled:
        num_scheduled = memoryview(array("I", (1,)) * len(refs))
    elif 0 in num_scheduled:
        raise WireError("num_scheduled", f"row {num_scheduled.tolist().index(0)} is granted no token")
    _check_lengths("num_scheduled", num_scheduled, "refs", refs)
    max_drafts: Sequence[int] = ()
    if message.max_drafts:
        max_drafts = _view("max_drafts", message.max_drafts)
        _check_lengths("max_drafts", max_drafts, "refs", refs)
    changes = {name: _view(name, column) for name in _CHANGES if (column := getattr(message, name))}
    for name, other in _EQUALLY_LONG if changes else ():
        _check_lengths(name, changes.get(name, _NOTHING), other, changes.get(other, _NOTHING))
    return StepPlan(
        step=message.step,
        refs=_named(refs),
        num_scheduled=num_scheduled,
        new=[_new_from_pb(new, f"new[{i}]") for i, new in enumerate(message.new)],
        copies=_copies_from_pb(message.copies) if message.copies else (),
        max_drafts=max_drafts,
        **{name: _named(column) for name, column in changes.items()},
    )


def result_to_pb(result: StepResult, session: int) -> pb.StepResult:
    """The result as a message of `session`. A number that does not fit in 32 bits raises struct.error."""
    message = pb.StepResult(
        session=session,
        step=result.step,
        refs=_pack(result.refs),
        tokens=_pack(result.tokens),
        indices=_pack(result.indices),
        failed=_pack(result.failed),
        unready=_pack(result.unready),
        compute_ns=result.compute_ns,
        idle_ns=result.idle_ns,
    )
    if result.scored:
        logprobs = [scored.logprobs for scored in result.scored]
        message.scored_refs = _pack([scored.ref for scored in result.scored])
        message.scored_positions = _pack([scored.position for scored in result.scored])
        message.scored_logprobs = _pack_floats([each.token for each in logprobs])
        message.top_counts = _pack([len(each.top) for each in logprobs])
        message.top_token_ids = _pack([token for each in logprobs for token in each.top_ids])
        message.top_logprobs = _pack_floats([value for each in logprobs for value in each.top])
    if result.ranked:
        message.ranked_refs = _pack([each.ref for each in result.ranked])
        message.ranked_indices = _pack([each.output_index for each in result.ranked])
        message.ranked_counts = _pack([len(each.token_ids) for each in result.ranked])
        message.ranked_token_ids = _pack([token for each in result.ranked for token in each.token_ids])
        message.ranked_logprobs = _pack_floats([value for each in result.ranked for value in each.logprobs])
        if any(each.raw for each in result.ranked):
            message.ranked_told = _pack([1 + len(each.top) if each.raw else 0 for each in result.ranked])
            message.ranked_raw = _pack_floats([value for each in result.ranked for value in each.raw])
            message.ranked_top_token_ids = _pack([token for each in result.ranked for token in each.top_ids])
            message.ranked_top_logprobs = _pack_floats([value for each in result.ranked for value in each.top])
    if result.drafted:
        message.drafted_refs = _pack([ref for ref, _ in result.drafted])
        message.num_drafted = _pack([count for _, count in result.drafted])
    if result.embedded:
        message.embedded_refs = _pack([each.ref for each in result.embedded])
        message.vectors = b"".join(each.vector for each in result.embedded)
    return message


def result_from_pb(message: pb.StepResult) -> StepResult:
    """The result of a message, its columns as lists. Raises WireError naming the malformed field."""
    refs = _list("refs", message.refs)
    tokens = _list("tokens", message.tokens)
    indices = _list("indices", message.indices)
    _check_lengths("tokens", tokens, "refs", refs)
    _check_lengths("indices", indices, "refs", refs)
    return StepResult(
        step=message.step,
        refs=_named(refs),
        tokens=tokens,
        indices=indices,
        failed=_named(_list("failed", message.failed)),
        unready=_named(_list("unready", message.unready)),
        compute_ns=message.compute_ns,
        idle_ns=message.idle_ns,
        scored=_scored_from_pb(message) if message.scored_refs else (),
        ranked=_ranked_from_pb(message) if message.ranked_refs else (),
        drafted=_drafted_from_pb(message) if message.drafted_refs else (),
        embedded=_embedded_from_pb(message) if message.embedded_refs else (),
    )


def hello_to_pb(
    facts: ExecutorFacts, incarnation: bytes, last_epoch: int = 0, last_epoch_age_s: float = 0.0
) -> pb.Hello:
    """The first message of an executor whose process drew the 16 random bytes `incarnation`."""
    assert len(incarnation) == INCARNATION_BYTES, f"incarnation of {len(incarnation)} bytes"
    return pb.Hello(
        protocol=PROTOCOL,
        name=facts.name,
        incarnation=incarnation,
        model=facts.model,
        model_digest=facts.model_digest,
        vocab_size=facts.vocab_size,
        max_model_len=facts.max_model_len,
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        max_sequences=facts.max_sequences,
        max_step_tokens=facts.max_step_tokens,
        credit=facts.credit,
        dtype=facts.dtype,
        device=facts.device,
        capabilities=facts.capabilities,
        determinism=facts.determinism,
        max_drafts=facts.max_drafts,
        step_overhead_tokens=facts.step_overhead_tokens,
        draft_cost=facts.draft_cost,
        last_epoch=last_epoch,
        last_epoch_age_ms=int(1000 * last_epoch_age_s),
    )


def facts_from_pb(hello: pb.Hello) -> ExecutorFacts:
    """What the executor says of itself.

    Raises ExecutorRejected when it speaks another version of the contract, WireError when a fact is impossible.
    """
    if hello.protocol != PROTOCOL:
        raise ExecutorRejected(f"executor speaks version {hello.protocol} of the link, this scheduler {PROTOCOL}")
    if len(hello.incarnation) != INCARNATION_BYTES:
        raise WireError("incarnation", f"must have {INCARNATION_BYTES} bytes, got {len(hello.incarnation)}")
    for name, most in _MAX_FACTS.items():
        if not 1 <= getattr(hello, name) <= most:
            raise WireError(name, f"must be in [1, {most}], got {getattr(hello, name)}")
    for name in ("name", "model", "model_digest", "dtype", "device"):
        if len(word := getattr(hello, name)) > _MAX_WORD or not word.isprintable():
            raise WireError(name, f"must be at most {_MAX_WORD} printable characters")
    if hello.max_drafts > MAX_DRAFTS:
        raise WireError("max_drafts", f"must be at most {MAX_DRAFTS}, got {hello.max_drafts}")
    if not 1 <= (hello.draft_cost or 1) <= _U32:  # nor NaN
        raise WireError("draft_cost", f"must be at least 1, got {hello.draft_cost}")
    if not is_determinism_class(hello.determinism):
        raise WireError("determinism", "must be 16 hex digits, or empty")
    return ExecutorFacts(
        name=hello.name,
        model=hello.model,
        model_digest=hello.model_digest,
        vocab_size=hello.vocab_size,
        max_model_len=hello.max_model_len,
        num_blocks=hello.num_blocks,
        block_size=hello.block_size,
        max_sequences=hello.max_sequences,
        max_step_tokens=hello.max_step_tokens,
        credit=hello.credit,
        dtype=hello.dtype,
        device=hello.device,
        capabilities=tuple(hello.capabilities),
        max_drafts=hello.max_drafts,
        step_overhead_tokens=hello.step_overhead_tokens,
        draft_cost=hello.draft_cost or 1.0,
        determinism=hello.determinism,
    )


def grammar_to_pb(grammar: Grammar) -> pb.Grammar:
    """The grammar as a message."""
    return pb.Grammar(**{grammar.syntax: grammar.source})


def grammar_from_pb(message: pb.Grammar, path: str) -> Grammar:
    """The grammar of the message at `path`. Raises WireError where there is none."""
    syntax = message.WhichOneof("source")
    if syntax is None:
        raise WireError(path, "has no source")
    return Grammar(syntax, getattr(message, syntax))


def _new_to_pb(new: NewSequence) -> pb.NewSequence:
    return pb.NewSequence(
        ref=new.ref,
        attempt=new.attempt,
        token_ids=_pack(new.token_ids),
        num_prompt=new.num_prompt,
        num_computed=new.num_computed,
        block_table=_pack(new.block_table),
        sampling=_sampling_to_pb(new.sampling),
        choice=new.choice,
        max_tokens=new.max_tokens,
        stop_token_ids=new.stop_token_ids,
        min_tokens=new.min_tokens,
        domain=new.domain,
        num_candidates=new.num_candidates,
        trace=new.trace,
        embeds=new.embeds,
    )


def _new_from_pb(message: pb.NewSequence, path: str) -> NewSequence:
    token_ids = _view(f"{path}.token_ids", message.token_ids)
    if not 1 <= message.num_prompt <= len(token_ids):
        raise WireError(f"{path}.num_prompt", f"must be in [1, {len(token_ids)}], got {message.num_prompt}")
    if message.num_computed > len(token_ids):
        raise WireError(f"{path}.num_computed", f"is {message.num_computed} of {len(token_ids)} tokens")
    return NewSequence(
        ref=SlotRef(message.ref),
        attempt=message.attempt,
        token_ids=token_ids,
        num_prompt=message.num_prompt,
        num_computed=message.num_computed,
        block_table=_named(_view(f"{path}.block_table", message.block_table)),
        sampling=_sampling_from_pb(message.sampling, f"{path}.sampling"),
        choice=message.choice,
        max_tokens=message.max_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        domain=message.domain,
        num_candidates=message.num_candidates,
        trace=message.trace,
        embeds=message.embeds,
    )


def _sampling_to_pb(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        typical_p=sampling.typical_p if sampling.typical_p != 1 else None,
        repetition_penalty=sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        biased_token_ids=[token for token, _ in sampling.logit_bias],
        biases=[bias for _, bias in sampling.logit_bias],
        allowed_token_ids=sampling.allowed_token_ids,
        banned_token_ids=sampling.banned_token_ids,
        bad_words=[pb.TokenSequence(token_ids=word) for word in sampling.bad_words],
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        grammar=grammar_to_pb(sampling.grammar) if sampling.grammar is not None else None,
    )


def _sampling_from_pb(message: pb.SamplingParams, path: str) -> SamplingParams:
    _check_lengths(f"{path}.biases", message.biases, "biased_token_ids", message.biased_token_ids)
    if not all(word.token_ids for word in message.bad_words):
        raise WireError(f"{path}.bad_words", "one has no token")
    sampling = SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        typical_p=message.typical_p if message.HasField("typical_p") else 1.0,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(zip(message.biased_token_ids, message.biases, strict=True)),
        allowed_token_ids=tuple(message.allowed_token_ids),
        banned_token_ids=tuple(message.banned_token_ids),
        bad_words=tuple(tuple(word.token_ids) for word in message.bad_words),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        grammar=grammar_from_pb(message.grammar, f"{path}.grammar") if message.HasField("grammar") else None,
    )
    try:
        check_sampling(sampling, _COMPUTABLE)
    except InvalidRequest as error:
        raise WireError(f"{path}.{error.field}", error.problem) from None
    return sampling


def _scored_from_pb(message: pb.StepResult) -> list[Scored]:
    refs = _list("scored_refs", message.scored_refs)
    positions = _list("scored_positions", message.scored_positions)
    values = _floats("scored_logprobs", message.scored_logprobs)
    counts = _list("top_counts", message.top_counts)
    top_ids = _list("top_token_ids", message.top_token_ids)
    top = _floats("top_logprobs", message.top_logprobs)
    _check_lengths("scored_positions", positions, "scored_refs", refs)
    _check_lengths("scored_logprobs", values, "scored_refs", refs)
    _check_lengths("top_counts", counts, "scored_refs", refs)
    _check_lengths("top_logprobs", top, "top_token_ids", top_ids)
    if sum(counts) != len(top_ids):
        raise WireError("top_counts", f"tell of {sum(counts)} tokens, top_token_ids has {len(top_ids)}")
    scored: list[Scored] = []
    begin = 0
    for ref, position, value, count in zip(refs, positions, values, counts, strict=True):
        end = begin + count
        logprobs = Logprobs(value, tuple(top_ids[begin:end]), tuple(top[begin:end]))
        scored.append(Scored(SlotRef(ref), position, logprobs))
        begin = end
    return scored


def _ranked_from_pb(message: pb.StepResult) -> list[Ranked]:
    refs = _list("ranked_refs", message.ranked_refs)
    indices = _list("ranked_indices", message.ranked_indices)
    counts = _list("ranked_counts", message.ranked_counts)
    ids = _list("ranked_token_ids", message.ranked_token_ids)
    values = _floats("ranked_logprobs", message.ranked_logprobs)
    _check_lengths("ranked_indices", indices, "ranked_refs", refs)
    _check_lengths("ranked_counts", counts, "ranked_refs", refs)
    _check_lengths("ranked_logprobs", values, "ranked_token_ids", ids)
    if sum(counts) != len(ids):
        raise WireError("ranked_counts", f"tell of {sum(counts)} tokens, ranked_token_ids has {len(ids)}")
    told = _list("ranked_told", message.ranked_told) or [0] * len(refs)
    _check_lengths("ranked_told", told, "ranked_refs", refs)
    raw = _floats("ranked_raw", message.ranked_raw)
    top_ids = _list("ranked_top_token_ids", message.ranked_top_token_ids)
    top = _floats("ranked_top_logprobs", message.ranked_top_logprobs)
    _check_lengths("ranked_top_logprobs", top, "ranked_top_token_ids", top_ids)
    if sum(count for count, each in zip(counts, told, strict=True) if each) != len(raw):
        raise WireError("ranked_raw", f"has {len(raw)} numbers, not one for each candidate that is told of")
    if sum(each - 1 for each in told if each) != len(top_ids):
        raise WireError("ranked_told", f"does not tell of {len(top_ids)} tokens, as many as ranked_top_token_ids has")
    candidates, owns, tops = iter(zip(ids, values, strict=True)), iter(raw), iter(zip(top_ids, top, strict=True))
    ranked: list[Ranked] = []
    for ref, index, count, each in zip(refs, indices, counts, told, strict=True):
        row = Ranked(SlotRef(ref), index, *_unzip(islice(candidates, count)))
        if each:
            row = Ranked(*row[:4], tuple(islice(owns, count)), *_unzip(islice(tops, each - 1)))
        ranked.append(row)
    return ranked


def _unzip(pairs: Iterable[tuple[int, float]]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    both = list(pairs)
    return tuple(token for token, _ in both), tuple(value for _, value in both)


def _drafted_from_pb(message: pb.StepResult) -> list[tuple[SlotRef, int]]:
    refs, counts = _list("drafted_refs", message.drafted_refs), _list("num_drafted", message.num_drafted)
    _check_lengths("num_drafted", counts, "drafted_refs", refs)
    return [(SlotRef(ref), count) for ref, count in zip(refs, counts, strict=True)]


def _embedded_from_pb(message: pb.StepResult) -> list[Embedded]:
    refs, vectors = _list("embedded_refs", message.embedded_refs), message.vectors
    if not vectors or len(vectors) % (4 * len(refs)):
        raise WireError("vectors", f"has {len(vectors)} bytes, not as many f32 for each of {len(refs)} embedded_refs")
    size = len(vectors) // len(refs)
    return [Embedded(SlotRef(ref), vectors[n * size : (n + 1) * size]) for n, ref in enumerate(refs)]


def _copies_from_pb(data: bytes) -> list[tuple[BlockId, BlockId]]:
    column = _view("copies", data)
    if len(column) % 2:
        raise WireError("copies", f"source without destination: {len(column)} numbers")
    blocks: Iterable[BlockId] = iter(_named(column))
    return list(zip(blocks, blocks, strict=True))  # takes two at a time


def _pack(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers) if len(numbers) else b""


def _pack_floats(numbers: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def _floats(field: str, data: bytes) -> Sequence[float]:
    if len(data) % 4:
        raise WireError(field, f"an f32 column has a multiple of 4 bytes, got {len(data)}")
    return struct.unpack(f"<{len(data) // 4}f", data)


def _list(field: str, data: bytes) -> list[int]:
    return _view(field, data).tolist() if data else []


def _view(field: str, data: bytes) -> memoryview[int]:
    if not data:
        return _NOTHING
    if len(data) % 4:
        raise WireError(field, f"a u32 column has a multiple of 4 bytes, got {len(data)}")
    if _NATIVE:
        return memoryview(data).cast("I")
    return memoryview(array("I", struct.unpack(f"<{len(data) // 4}I", data)))


def _named(column: Sequence[int]) -> Sequence[Any]:
    """The column as one of ids: its numbers take the type of the field they go to."""
    return column


def _check_lengths(field: str, column: Sequence[float], other_field: str, other: Sequence[float]) -> None:
    if len(column) != len(other):
        raise WireError(field, f"has {len(column)} numbers, {other_field} has {len(other)}")
