"""The link's codec: nothing is lost, nothing malformed gets in, a plan stays small."""

from __future__ import annotations

import math
import struct
from array import array
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ExecutorRejected
from common.sampling import Grammar, SamplingParams
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
from common.types import MAX_SLOTS, BlockId, SlotRef, slot_ref
from protos import executor_pb2 as pb
from services import codec_link
from services.codec_link import (
    WireError,
    facts_from_pb,
    hello_to_pb,
    plan_from_pb,
    plan_to_pb,
    result_from_pb,
    result_to_pb,
)

U32: st.SearchStrategy[Any] = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
POSITIVE = st.integers(1, (1 << 32) - 1)


def column(size: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(U32, min_size=size, max_size=size)


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2.0**100, width=32),
    top_k=U32,
    top_p=st.floats(0, 1, exclude_min=True, width=32),
    min_p=st.floats(0, 1, width=32),
    seed=U64,
    typical_p=st.floats(0, 1, exclude_min=True, width=32),
    repetition_penalty=st.floats(2.0**-100, 2.0**100, width=32),
    presence_penalty=st.floats(-2, 2, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    logit_bias=st.lists(st.tuples(U32, st.floats(-100, 100, width=32)), max_size=3).map(tuple),
    allowed_token_ids=st.lists(U32, max_size=3).map(tuple),
    banned_token_ids=st.lists(U32, max_size=3).map(tuple),
    bad_words=st.lists(st.lists(U32, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    logprobs=st.none() | U32,
    prompt_logprobs=st.none() | U32,
    grammar=st.none() | st.builds(Grammar, st.sampled_from(["json_schema", "regex", "lark"]), st.text(max_size=9)),
)

LOGPROB = st.floats(-1000, 0, width=32) | st.just(-math.inf)
TOPS = st.lists(st.tuples(U32, LOGPROB), max_size=3)
SCORED = st.builds(
    lambda ref, position, token, top: Scored(
        ref, position, Logprobs(token, tuple(id for id, _ in top), tuple(value for _, value in top))
    ),
    U32, U32, LOGPROB, TOPS,
)  # fmt: skip


@st.composite
def ranked_rows(draw: st.DrawFn) -> Ranked:
    ids, logprobs = unzipped(draw(TOPS))
    row = Ranked(draw(U32), draw(U32), ids, logprobs)
    if not ids or draw(st.booleans()):
        return row
    raw = draw(st.lists(LOGPROB, min_size=len(ids), max_size=len(ids)))
    top_ids, top = unzipped(draw(TOPS))
    return row._replace(raw=tuple(raw), top_ids=top_ids, top=top)


def unzipped(pairs: list[tuple[int, float]]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return tuple(id for id, _ in pairs), tuple(value for _, value in pairs)


@st.composite
def new_sequences(draw: st.DrawFn) -> NewSequence:
    token_ids = draw(st.lists(U32, min_size=1, max_size=20))
    return NewSequence(
        ref=draw(U32),
        attempt=draw(U32),
        token_ids=token_ids,
        num_prompt=draw(st.integers(1, len(token_ids))),
        num_computed=draw(st.integers(0, len(token_ids))),
        block_table=draw(st.lists(U32, max_size=5)),
        sampling=draw(SAMPLING),
        choice=draw(U32),
        max_tokens=draw(U32),
        stop_token_ids=tuple(draw(st.lists(U32, max_size=4))),
        min_tokens=draw(U32),
        domain=draw(st.binary(max_size=16)),
        num_candidates=draw(U32),
        embeds=draw(st.booleans()),
    )


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    num_rows, num_appended, num_replaced, num_told = (draw(st.integers(0, 8)) for _ in range(4))
    granted = st.one_of(st.just([1] * num_rows), st.lists(POSITIVE, min_size=num_rows, max_size=num_rows))
    return StepPlan(
        step=draw(U64),
        refs=draw(column(num_rows)),
        num_scheduled=draw(granted),
        append_refs=draw(column(num_appended)),
        append_blocks=draw(column(num_appended)),
        replace_refs=draw(column(num_replaced)),
        replace_indices=draw(column(num_replaced)),
        replace_blocks=draw(column(num_replaced)),
        new=draw(st.lists(new_sequences(), max_size=3)),
        released=draw(st.lists(U32, max_size=8)),
        copies=draw(st.lists(st.tuples(U32, U32), max_size=4)),
        told_refs=draw(column(num_told)),
        told_tokens=draw(column(num_told)),
        max_drafts=draw(st.one_of(st.just([]), column(num_rows))),
    )


VECTORS = st.integers(1, 3).flatmap(lambda size: st.lists(st.binary(min_size=4 * size, max_size=4 * size), max_size=3))
EMBEDDED = VECTORS.flatmap(lambda vectors: st.tuples(*(st.builds(Embedded, U32, st.just(each)) for each in vectors)))


@st.composite
def results(draw: st.DrawFn) -> StepResult:
    num_rows = draw(st.integers(0, 8))
    return StepResult(
        step=draw(U64),
        refs=draw(column(num_rows)),
        tokens=draw(column(num_rows)),
        indices=draw(column(num_rows)),
        failed=draw(st.lists(U32, max_size=8)),
        unready=draw(st.lists(U32, max_size=8)),
        compute_ns=draw(U64),
        idle_ns=draw(U64),
        scored=draw(st.lists(SCORED, min_size=1, max_size=4)) if draw(st.booleans()) else (),
        ranked=draw(st.lists(ranked_rows(), min_size=1, max_size=4)) if draw(st.booleans()) else (),
        drafted=draw(st.lists(st.tuples(U32, U32), max_size=4)) or (),
        embedded=list(draw(EMBEDDED)) or (),
    )


WORD = st.text(max_size=256).filter(str.isprintable)
FACTS = st.builds(
    ExecutorFacts,
    name=WORD,
    model=WORD,
    model_digest=WORD,
    vocab_size=POSITIVE,
    max_model_len=POSITIVE,
    num_blocks=st.integers(1, 1 << 22),
    block_size=st.integers(1, 1 << 16),
    max_sequences=st.integers(1, MAX_SLOTS),
    max_step_tokens=POSITIVE,
    credit=st.integers(1, 16),
    dtype=WORD,
    device=WORD,
    capabilities=st.lists(st.text(), max_size=3).map(tuple),
    max_drafts=st.integers(0, MAX_DRAFTS),
    draft_cost=st.floats(1, 1e6, width=32),
    step_overhead_tokens=U32,
)


def plain(value: Any) -> Any:
    """The value with every sequence as a list, so that a memoryview equals the list it was made of."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, memoryview | list | tuple):
        return [plain(item) for item in value]
    return value


def over_the_wire(plan: StepPlan) -> StepPlan:
    return plan_from_pb(pb.StepPlan.FromString(plan_to_pb(plan, session=7).SerializeToString()))


def a_plan() -> pb.StepPlan:
    """A message with something in every field, two rows, well formed."""
    new = NewSequence(
        ref=slot_ref(2, 0),
        attempt=0,
        token_ids=[5, 6, 7],
        num_prompt=3,
        num_computed=0,
        block_table=[BlockId(9)],
        sampling=SamplingParams(),
        choice=0,
        max_tokens=4,
        stop_token_ids=(2,),
    )
    plan = StepPlan(
        step=3,
        refs=[slot_ref(1, 0), slot_ref(2, 0)],
        num_scheduled=[1, 3],
        append_refs=[slot_ref(1, 0)],
        append_blocks=[BlockId(8)],
        replace_refs=[slot_ref(1, 0)],
        replace_indices=[0],
        replace_blocks=[BlockId(7)],
        new=[new],
        released=[slot_ref(3, 0)],
        copies=[(BlockId(6), BlockId(7))],
        told_refs=[slot_ref(1, 0)],
        told_tokens=[5],
        max_drafts=[2, 0],
    )
    return plan_to_pb(plan, session=1)


@given(plans())
def test_a_plan_arrives_as_it_was_sent(plan: StepPlan) -> None:
    assert plain(over_the_wire(plan)) == plain(plan)


@given(plans())
def test_a_plan_arrives_as_it_was_sent_where_numbers_cannot_be_read_in_place(plan: StepPlan) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_link, "_NATIVE", False)
        assert plain(over_the_wire(plan)) == plain(plan)


@given(results())
def test_a_result_arrives_as_it_was_sent(result: StepResult) -> None:
    sent = result_to_pb(result, session=7).SerializeToString()

    assert result_from_pb(pb.StepResult.FromString(sent)) == result


@given(FACTS, st.binary(min_size=16, max_size=16))
def test_facts_arrive_as_they_were_sent(facts: ExecutorFacts, incarnation: bytes) -> None:
    hello = pb.Hello.FromString(hello_to_pb(facts, incarnation).SerializeToString())

    assert facts_from_pb(hello) == facts
    assert hello.incarnation == incarnation


def test_columns_are_little_endian_on_the_wire() -> None:
    plan = StepPlan(step=0, refs=[SlotRef(0x01020304)], num_scheduled=[1])

    assert plan_to_pb(plan, session=1).refs == b"\x04\x03\x02\x01"


def test_messages_name_the_session() -> None:
    assert plan_to_pb(StepPlan(step=0, refs=(), num_scheduled=()), session=7).session == 7
    assert result_to_pb(StepResult(step=0), session=7).session == 7


def test_a_plan_keeps_no_copy_of_its_columns() -> None:
    message = a_plan()
    refs = plan_from_pb(message).refs

    assert isinstance(refs, memoryview)
    assert refs.readonly
    assert refs.format == "I"


def test_rows_of_one_token_each_need_no_column() -> None:
    plan = StepPlan(step=0, refs=[slot_ref(i, 0) for i in range(3)], num_scheduled=[1, 1, 1])

    assert plan_to_pb(plan, session=1).num_scheduled == b""
    assert list(over_the_wire(plan).num_scheduled) == [1, 1, 1]


def test_a_decode_plan_of_256_rows_that_all_grow_fits_in_4_kib() -> None:
    refs = [slot_ref(i, 65_535) for i in range(256)]
    blocks = [BlockId(4_000_000_000 + i) for i in range(256)]
    plan = StepPlan(step=1 << 62, refs=refs, num_scheduled=[1] * 256, append_refs=refs, append_blocks=blocks)

    assert plan_to_pb(plan, session=1 << 62).ByteSize() <= 4096


@pytest.mark.parametrize("number", [-1, 1 << 32])
def test_a_number_beyond_32_bits_is_a_bug_of_the_sender(number: int) -> None:
    with pytest.raises(struct.error):
        plan_to_pb(StepPlan(step=0, refs=[SlotRef(number)], num_scheduled=[1]), session=1)


PLAN_COLUMNS = [
    "refs",
    "num_scheduled",
    "append_refs",
    "append_blocks",
    "replace_refs",
    "replace_indices",
    "replace_blocks",
    "released",
    "copies",
    "told_refs",
    "told_tokens",
    "max_drafts",
]


@pytest.mark.parametrize("name", PLAN_COLUMNS)
def test_a_plan_with_a_cut_number_is_refused_by_the_columns_name(name: str) -> None:
    message = a_plan()
    setattr(message, name, getattr(message, name)[:-1])

    with pytest.raises(WireError) as caught:
        plan_from_pb(message)
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        ("refs", "num_scheduled"),
        ("num_scheduled", "num_scheduled"),
        ("append_refs", "append_blocks"),
        ("append_blocks", "append_blocks"),
        ("replace_refs", "replace_indices"),
        ("replace_indices", "replace_indices"),
        ("replace_blocks", "replace_blocks"),
        ("told_refs", "told_tokens"),
        ("told_tokens", "told_tokens"),
        ("max_drafts", "max_drafts"),
    ],
)
def test_a_plan_with_columns_of_unequal_length_is_refused(name: str, blamed: str) -> None:
    message = a_plan()
    setattr(message, name, getattr(message, name) + bytes([1, 0, 0, 0]))

    with pytest.raises(WireError) as caught:
        plan_from_pb(message)
    assert caught.value.field == blamed


def test_a_copy_without_a_destination_is_refused() -> None:
    message = a_plan()
    message.copies += bytes(4)

    with pytest.raises(WireError, match="copies: source without destination"):
        plan_from_pb(message)


def test_a_row_that_is_granted_nothing_is_refused() -> None:
    message = a_plan()
    message.num_scheduled = array("I", [1, 0]).tobytes()

    with pytest.raises(WireError, match="num_scheduled: row 1"):
        plan_from_pb(message)


@pytest.mark.parametrize("name", ["token_ids", "block_table"])
def test_a_new_sequence_with_a_cut_number_is_refused_by_its_path(name: str) -> None:
    message = a_plan()
    setattr(message.new[0], name, b"\0\0\0")

    with pytest.raises(WireError) as caught:
        plan_from_pb(message)
    assert caught.value.field == f"new[0].{name}"


@pytest.mark.parametrize(("name", "value"), [("num_prompt", 0), ("num_prompt", 4), ("num_computed", 4)])
def test_a_new_sequence_that_counts_tokens_it_does_not_have_is_refused(name: str, value: int) -> None:
    message = a_plan()
    setattr(message.new[0], name, value)

    with pytest.raises(WireError) as caught:
        plan_from_pb(message)
    assert caught.value.field == f"new[0].{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("min_p", math.nan),
    ],
)
def test_sampling_that_cannot_be_computed_is_refused(name: str, value: float) -> None:
    message = a_plan()
    setattr(message.new[0].sampling, name, value)

    with pytest.raises(WireError) as caught:
        plan_from_pb(message)
    assert caught.value.field == f"new[0].sampling.{name}"


@pytest.mark.parametrize("name", ["refs", "tokens", "indices", "failed", "unready", "drafted_refs", "num_drafted"])
def test_a_result_with_a_cut_number_is_refused_by_the_columns_name(name: str) -> None:
    result = StepResult(
        step=0,
        refs=[slot_ref(1, 0)],
        tokens=[5],
        indices=[0],
        failed=[slot_ref(2, 0)],
        unready=[slot_ref(3, 0)],
        drafted=[(slot_ref(1, 0), 2)],
    )
    message = result_to_pb(result, session=1)
    setattr(message, name, getattr(message, name)[:-1])

    with pytest.raises(WireError) as caught:
        result_from_pb(message)
    assert caught.value.field == name


@pytest.mark.parametrize("name", ["tokens", "indices"])
def test_a_result_with_columns_of_unequal_length_is_refused(name: str) -> None:
    message = result_to_pb(StepResult(step=0, refs=[slot_ref(1, 0)], tokens=[5], indices=[0]), session=1)
    setattr(message, name, b"")

    with pytest.raises(WireError) as caught:
        result_from_pb(message)
    assert caught.value.field == name


def a_hello() -> pb.Hello:
    facts = ExecutorFacts(
        name="e0",
        model="m",
        model_digest="d",
        vocab_size=10,
        max_model_len=64,
        num_blocks=8,
        block_size=4,
        max_sequences=2,
        max_step_tokens=16,
    )
    return hello_to_pb(facts, bytes(16))


def test_an_executor_of_another_protocol_is_told_both_versions() -> None:
    hello = a_hello()
    hello.protocol = 2

    with pytest.raises(ExecutorRejected, match="version 2 of the link, this scheduler 1"):
        facts_from_pb(hello)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("incarnation", b"short"),
        ("vocab_size", 0),
        ("max_model_len", 0),
        ("num_blocks", 0),
        ("block_size", 0),
        ("max_step_tokens", 0),
        ("credit", 0),
        ("max_sequences", 0),
        ("max_sequences", MAX_SLOTS + 1),
        ("num_blocks", (1 << 32) - 1),
        ("block_size", (1 << 32) - 1),
        ("credit", (1 << 32) - 1),
        ("max_drafts", MAX_DRAFTS + 1),
        ("draft_cost", 0.5),
        ("draft_cost", math.nan),
        ("name", "x" * 257),
        ("name", "two\nlines"),
    ],
)
def test_an_impossible_fact_is_refused_by_name(name: str, value: float | bytes | str) -> None:
    hello = a_hello()
    setattr(hello, name, value)

    with pytest.raises(WireError) as caught:
        facts_from_pb(hello)
    assert caught.value.field == name


def a_scored_result() -> pb.StepResult:
    scored = [Scored(slot_ref(1, 0), 5, Logprobs(-0.5, (7, 8), (-0.25, -0.5))), Scored(slot_ref(2, 0), 9, Logprobs(-1))]
    return result_to_pb(StepResult(step=0, scored=scored), session=1)


@pytest.mark.parametrize(
    "name",
    ["scored_refs", "scored_positions", "scored_logprobs", "top_counts", "top_token_ids", "top_logprobs"],
)
def test_scores_with_a_cut_or_a_missing_number_are_refused_by_name(name: str) -> None:
    for end in (-1, -4):
        message = a_scored_result()
        setattr(message, name, getattr(message, name)[:end])

        with pytest.raises(WireError) as caught:
            result_from_pb(message)
        assert end == -4 or caught.value.field == name


def a_ranked_result() -> pb.StepResult:
    told = Ranked(slot_ref(1, 0), 5, (7, 8), (-0.25, -0.5), (-1.0, -2.0), (9,), (-0.1,))
    ranked = [told, Ranked(slot_ref(2, 0), 9, (3,), (-1.0,))]
    return result_to_pb(StepResult(step=0, ranked=ranked), session=1)


@pytest.mark.parametrize(
    "name",
    [
        "ranked_refs",
        "ranked_indices",
        "ranked_counts",
        "ranked_token_ids",
        "ranked_logprobs",
        "ranked_told",
        "ranked_raw",
        "ranked_top_token_ids",
        "ranked_top_logprobs",
    ],
)
def test_ranks_with_a_cut_or_a_missing_number_are_refused_by_name(name: str) -> None:
    for end in (-1, -4):
        message = a_ranked_result()
        setattr(message, name, getattr(message, name)[:end])

        with pytest.raises(WireError) as caught:
            result_from_pb(message)
        assert end == -4 or caught.value.field == name


def test_a_result_that_scores_nothing_carries_no_column_for_it() -> None:
    message = result_to_pb(StepResult(step=0, refs=[slot_ref(1, 0)], tokens=[3], indices=[0]), session=1)

    assert message.ByteSize() == len(b"\x08\x01") + 3 * 6


@pytest.mark.parametrize("size", [0, 7, 12])
def test_vectors_that_are_not_as_long_as_each_other_are_refused(size: int) -> None:
    refs = struct.pack("<2I", 1, 2)

    with pytest.raises(WireError, match=f"vectors: has {size} bytes"):
        result_from_pb(pb.StepResult(embedded_refs=refs, vectors=bytes(size)))
