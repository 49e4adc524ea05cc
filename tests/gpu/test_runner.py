"""The GPU's runner on the CPU: the other runner's tokens, with steps in flight and all that may come between."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Set
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import executor.gpu.runner as gpu_runner
from common import failpoints
from common.errors import ModelFolderError
from common.sampling import Grammar, SamplingParams
from common.step import ExecutorFacts, NewSequence, Scored, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_ref
from executor import attention
from executor.attention.triton import TritonAttention
from executor.gpu import graphs
from executor.gpu.device import Event, HostDevice
from executor.gpu.models import open_gpu_model
from executor.gpu.runner import GpuRunner
from executor.guide import Guide
from executor.model_runner import ModelRunner
from executor.resident import PlanError
from executor.runner import DeviceLost, Launched, Runner, execute
from tests.executor.guides import held_up, save_letters, until_compiled
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny
from tests.gpu.story import BLOCK_SIZE, MAX_STEP_TOKENS, NUM_BLOCKS, NUM_SLOTS, Story
from tests.gpu.torch_forward import TorchForward, open_torch_forward, sample_as_the_host, sample_greedily

A, B, C = slot_ref(0, 0), slot_ref(1, 0), slot_ref(2, 0)
PROMPT = [5, 9, 13, 21, 34, 55, 8]
GREEDY = SamplingParams(temperature=0.0)
# numbers that float32 holds as float64 does
SAMPLED = SamplingParams(temperature=1.0, top_k=40, top_p=0.9375, min_p=0.015625, seed=0xFEDC_BA98_7654_3210)
PLAIN = (GREEDY, SAMPLED, SamplingParams(temperature=0.5, seed=3))
CONTROLLED = (
    SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5),
    SamplingParams(temperature=1.0, seed=8, bad_words=((7,),), logit_bias=((9, 2.0),)),
    SamplingParams(temperature=1.0, seed=9, typical_p=0.75),
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=1.0, seed=4, logprobs=0, prompt_logprobs=2),
    SamplingParams(temperature=1.0, seed=5, frequency_penalty=1.0, logprobs=1),
)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


def silent(_stage: str, _done: int, _total: int) -> None: ...


class Host:
    """A loaded GPU runner on a HostDevice, and the number of the next step."""

    def __init__(self, folder: Path, device: HostDevice | None = None, **settings: Any) -> None:
        self.device = device or HostDevice()
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "block_size": BLOCK_SIZE,
            "num_blocks": NUM_BLOCKS,
            "max_sequences": NUM_SLOTS,
            "max_step_tokens": MAX_STEP_TOKENS,
            "max_model_len": 64,
            "attention_backend": "torch",
            "open_forward": open_torch_forward,
            "sample": sample_as_the_host,
        }
        self.runner = GpuRunner(
            name="tiny",
            model_folder=folder,
            make_device=lambda _: self.device,
            **{**defaults, **settings},
        )
        self.facts: ExecutorFacts = self.runner.load(silent)
        self.next_step = 0

    @property
    def forward(self) -> TorchForward:
        forward = self.runner._model
        assert isinstance(forward, TorchForward)
        return forward

    def launch(self, *rows: tuple[SlotRef, int], **columns: Any) -> Launched:
        told = StepPlan(step=self.next_step, refs=[r for r, _ in rows], num_scheduled=[n for _, n in rows])
        self.next_step += 1
        return self.runner.launch(replace(told, **columns))

    def step(self, *rows: tuple[SlotRef, int], **columns: Any) -> StepResult:
        return self.launch(*rows, **columns).result()


def sequence(ref: SlotRef, tokens: list[int], blocks: list[int], **changes: Any) -> NewSequence:
    told = NewSequence(
        ref=ref,
        attempt=0,
        token_ids=tokens,
        num_prompt=len(tokens),
        num_computed=0,
        block_table=[BlockId(block) for block in blocks],
        sampling=GREEDY,
        choice=0,
        max_tokens=50,
        stop_token_ids=(),
    )
    return replace(told, **changes)


def check_same(ours: StepResult, theirs: StepResult, gone: Set[SlotRef] = frozenset()) -> None:
    """What is told of sequences that are `gone` counts for nobody."""
    assert ours.step == theirs.step

    def rows(result: StepResult) -> list[tuple[SlotRef, int, int]]:
        columns = zip(result.refs, result.tokens, result.indices, strict=True)
        return [row for row in columns if row[0] not in gone]

    def scores(result: StepResult) -> list[Scored]:
        return [each for each in result.scored if each.ref not in gone]

    assert rows(ours) == rows(theirs)
    assert [ref for ref in ours.failed if ref not in gone] == [ref for ref in theirs.failed if ref not in gone]
    assert [(each.ref, each.position) for each in scores(ours)] == [
        (each.ref, each.position) for each in scores(theirs)
    ]
    for mine, other in zip(scores(ours), scores(theirs), strict=True):
        assert mine.logprobs.token == pytest.approx(other.logprobs.token, abs=1e-4)
        assert mine.logprobs.top_ids == other.logprobs.top_ids


@pytest.fixture(scope="module")
def plain(folder: Path) -> Runner:
    return plain_for(folder)


def plain_for(folder: Path) -> Runner:
    runner = ModelRunner(
        name="tiny", model_folder=folder, dtype="float32", attention_backend="torch", block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS, max_sequences=NUM_SLOTS, max_step_tokens=MAX_STEP_TOKENS, max_model_len=64,
    )  # fmt: skip
    runner.load(silent)
    return runner


@pytest.fixture(scope="module")
def host(folder: Path) -> Host:
    return Host(folder)


def play(story: Story, plain: Runner, ours: GpuRunner, *, num_steps: int, depth: int) -> int:
    """Run the same plans in both, in ours with `depth` of them in flight; return how many tokens were sampled."""
    plain.begin_session()
    ours.begin_session()
    in_flight: deque[tuple[Launched, StepResult]] = deque()
    num_tokens, gone = 0, set[SlotRef]()
    for _ in range(num_steps):
        plan = story.plan()
        gone.update(plan.released)
        expected = plain.launch(plan).result()
        story.hear(expected)
        num_tokens += len(expected.tokens)
        in_flight.append((ours.launch(plan), expected))
        if len(in_flight) == depth:
            launched, expected = in_flight.popleft()
            launched.wait()
            check_same(launched.result(), expected, gone)
    for launched, expected in in_flight:
        check_same(launched.result(), expected, gone)
    return num_tokens


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_tokens_are_those_of_the_other_runner(plain: Runner, host: Host, depth: int) -> None:
    story = Story(seed=depth, samplings=PLAIN, lag=depth - 1, vocab_size=VOCAB_SIZE)

    assert play(story, plain, host.runner, num_steps=36, depth=depth) > 36


@pytest.mark.parametrize("depth", [2, 3])
def test_the_tokens_are_the_same_from_graphs_of_many_shapes(
    plain: Runner, folder: Path, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_SMALL_MIXED", (4, 8, 12, 16, 24, 32))
    monkeypatch.setattr(graphs, "_FEW_DECODES", {1: 24, 3: 16})
    monkeypatch.setattr(graphs, "_PREFILLS", (2, 4))
    host = Host(folder)
    while host.runner.idle():
        pass
    host.forward.seen.clear()
    story = Story(seed=10 + depth, samplings=PLAIN + CONTROLLED, lag=depth - 1, vocab_size=VOCAB_SIZE)

    assert play(story, plain, host.runner, num_steps=60, depth=depth) > 60
    seen = {(len(inputs.positions), inputs.num_decodes) for inputs in host.forward.seen if inputs.max_query_len > 1}
    assert len({shape for shape in seen if shape in _captured(host)}) > 8


def _captured(host: Host) -> set[tuple[int, int]]:
    assert host.runner._graphs is not None
    return {(graph.shape.num_tokens, graph.shape.num_decodes) for graph in host.runner._graphs._mixed}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by Triton, also where there is no GPU."""
    monkeypatch.setattr(attention, "BACKENDS", (TritonAttention(interpreted=True), *attention.BACKENDS))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_kernels_give_the_tokens_of_the_other_runner(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path, num_hidden_layers=1)
    settings: dict[str, Any] = {"max_sequences": 2, "max_step_tokens": 10}
    host = Host(folder, attention_backend="triton", open_forward=open_gpu_model, sample=None, **settings)
    story = Story(
        seed=6,
        samplings=(GREEDY, SAMPLED, CONTROLLED[0]),
        lag=1,
        vocab_size=VOCAB_SIZE,
        num_slots=2,
        max_step_tokens=10,
        num_blocks=host.facts.num_blocks,
    )

    assert play(story, plain_for(folder), host.runner, num_steps=5, depth=2) > 3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rows_that_need_the_host_run_among_the_others(plain: Runner, host: Host, depth: int) -> None:
    story = Story(seed=3 + depth, samplings=PLAIN + CONTROLLED, lag=depth - 1, vocab_size=VOCAB_SIZE)

    assert play(story, plain, host.runner, num_steps=36, depth=depth) > 36


def check_beams(plain: Runner, host: Host) -> None:
    """Both rank the same candidates of two beams, beside a row that samples, and go on from what they are told."""
    new = [
        sequence(A, PROMPT, [3, 9, 10], num_candidates=6),
        sequence(B, PROMPT, [4, 5, 6], num_candidates=6, sampling=CONTROLLED[0]),
        sequence(C, PROMPT, [1, 2, 7]),
    ]
    plans = [
        StepPlan(step=0, refs=[A, B, C], num_scheduled=[7, 7, 7], new=new),
        StepPlan(step=1, refs=[A, B, C], num_scheduled=[1, 1, 1], told_refs=[A, B], told_tokens=[11, 12]),
        StepPlan(step=2, refs=[B, C], num_scheduled=[1, 1], told_refs=[B], told_tokens=[13]),
    ]
    plain.begin_session()
    host.runner.begin_session()
    for plan in plans:
        ours, theirs = execute(host.runner, plan), execute(plain, plan)

        assert (ours.refs, ours.tokens) == (theirs.refs, theirs.tokens)
        assert [each.ref for each in ours.ranked] == [ref for ref in plan.refs if ref != C]
        assert [each[:3] for each in ours.ranked] == [each[:3] for each in theirs.ranked]
        for mine, other in zip(ours.ranked, theirs.ranked, strict=True):
            assert list(mine.logprobs) == pytest.approx(list(other.logprobs), abs=1e-4)


def test_beams_are_ranked_among_the_others_and_go_on_from_what_they_are_told(plain: Runner, host: Host) -> None:
    check_beams(plain, host)


def test_rows_with_a_grammar_run_among_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path)
    save_letters(folder)
    is_ready = Guide.is_ready

    def once_compiled(guide: Guide) -> bool:
        wait([guide.compiling])
        return is_ready(guide)

    monkeypatch.setattr(Guide, "is_ready", once_compiled)  # else the two would put off different rows
    guided = [
        SamplingParams(temperature=0.0, grammar=Grammar("regex", "[^aeiou]*")),
        SamplingParams(temperature=1.0, seed=6, grammar=Grammar("regex", "([^xyz]{2}[A-Za-z])*"), presence_penalty=1.0),
    ]
    story = Story(seed=12, samplings=[*PLAIN, *guided, *guided], lag=1, vocab_size=VOCAB_SIZE)

    # tokens that they have from elsewhere are of no grammar at times: those rows fail, in both
    assert play(story, plain_for(folder), Host(folder).runner, num_steps=36, depth=2) > 36


def test_a_row_whose_grammar_is_still_compiled_is_put_off_and_those_in_flight_behind_it_are_its_next_tries(
    tmp_path: Path,
) -> None:
    folder = save_tiny("llama", tmp_path)
    save_letters(folder)
    host = Host(folder)
    grammars = host.runner._grammars
    guided = replace(SAMPLED, grammar=Grammar("regex", "[0-9]{4}[A-F]{2,9}"), logprobs=1)
    new = [sequence(A, PROMPT, [3, 9, 4, 1], sampling=guided), sequence(B, PROMPT, [5, 6, 7, 8], sampling=SAMPLED)]

    def tokens(results: list[StepResult], ref: SlotRef) -> list[int]:
        return [t for result in results for r, t in zip(result.refs, result.tokens, strict=True) if r == ref]

    host.runner.begin_session()
    alone = [host.launch((A, 3), (B, 3), new=new).result()]
    until_compiled(host.runner._resident)
    alone += [host.launch((A, count), (B, count)).result() for count in (4, 1, 1)]
    host.runner.begin_session()
    with held_up(grammars):
        launched = [host.launch((A, 7), (B, 7), new=new), host.launch((A, 1), (B, 1))]
        late = [each.result() for each in launched]
    until_compiled(host.runner._resident)
    found = late + [each.result() for each in [host.launch((A, 1), (B, 1)), host.launch((A, 1)), host.launch((A, 1))]]

    assert [result.unready for result in found] == [[A], [A], [], [], []]
    assert [result.refs for result in late] == [[B], [B]]
    assert tokens(found, A) == tokens(alone, A)
    assert tokens(found, B) == tokens(alone, B)
    assert [each.position for result in found for each in result.scored] == [7, 8, 9]


def test_without_graphs_the_tokens_are_the_same(plain: Runner, folder: Path) -> None:
    story = Story(seed=4, samplings=PLAIN + CONTROLLED, lag=1, vocab_size=VOCAB_SIZE)
    host = Host(folder, cuda_graphs="off")

    assert play(story, plain, host.runner, num_steps=24, depth=2) > 24
    assert host.device.num_graphs == 0 and not host.runner.idle()


def test_a_long_prompt_is_scored_in_parts(plain: Runner, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "_SCORED_AT_ONCE", 5)
    samplings = (SamplingParams(temperature=1.0, seed=4, logprobs=1, prompt_logprobs=2), GREEDY)
    story = Story(seed=5, samplings=samplings, lag=1, vocab_size=VOCAB_SIZE)

    assert play(story, plain, host.runner, num_steps=30, depth=2) > 30


def test_a_launch_computes_nothing_and_a_result_no_more_than_its_own_step(host: Host) -> None:
    host.runner.begin_session()
    host.forward.seen.clear()

    first = host.launch((A, 7), new=[sequence(A, PROMPT, [3, 9, 4, 1])])
    second, third = host.launch((A, 1)), host.launch((A, 1))
    assert host.forward.seen == []

    first.wait()
    assert len(host.forward.seen) == 1
    first.result()
    assert len(host.forward.seen) == 1
    assert [len(each.result().tokens) for each in (second, third)] == [1, 1]


def test_results_may_be_taken_in_any_order(host: Host) -> None:
    host.runner.begin_session()
    launched = [host.launch((A, 7), new=[sequence(A, PROMPT, [3, 9, 4, 1])]), host.launch((A, 1)), host.launch((A, 1))]

    indices = [list(each.result().indices) for each in reversed(launched)]

    assert indices == [[2], [1], [0]]


def test_a_row_that_ended_while_it_was_in_flight_says_nothing_more(host: Host) -> None:
    host.runner.begin_session()
    told = sequence(A, PROMPT, [3, 9, 4, 1])
    free = [host.step((A, 7), new=[told]).tokens[0], host.step((A, 1)).tokens[0]]
    host.runner.begin_session()

    stops = replace(told, stop_token_ids=(free[1],))
    other = sequence(B, PROMPT[:3], [7, 8, 10])
    steps = [host.launch((A, 7), (B, 3), new=[stops, other])]
    steps += [host.launch((A, 1), (B, 1)) for _ in range(4)]

    assert [list(step.result().refs) for step in steps] == [[A, B], [A, B], [B], [B], [B]]


def three_prompts() -> list[NewSequence]:
    return [sequence(A, PROMPT, [3, 9, 4]), sequence(B, PROMPT[:3], [7, 8]), sequence(C, PROMPT[:2], [5, 6])]


def test_decode_steps_take_a_graph_of_their_rows(host: Host) -> None:
    host.runner.begin_session()
    host.step((A, 7), (B, 3), (C, 2), new=three_prompts())
    host.forward.seen.clear()

    host.step((A, 1), (B, 1), (C, 1))
    host.step((B, 1), (A, 1))
    host.step((B, 1), (A, 1))
    host.step((B, 1), (A, 1), released=[C], new=[sequence(slot_ref(2, 1), PROMPT, [5, 6])])

    seen = host.forward.seen
    assert [len(inputs.seq_lens) for inputs in seen] == [4, 2, 2, 2]
    assert seen[1] is seen[2] is seen[3]
    assert seen[0].max_seq_len == host.facts.max_model_len


def test_steps_with_prompts_take_one_of_their_tokens(host: Host) -> None:
    host.runner.begin_session()
    host.forward.seen.clear()

    host.step((A, 7), (B, 3), new=three_prompts())
    host.step((C, 2), (B, 1), (A, 1), copies=[(BlockId(3), BlockId(30))])
    unlike = SamplingParams(temperature=0.0, prompt_logprobs=0)
    later = slot_ref(0, 1)
    host.step((later, 7), released=[A], new=[sequence(later, PROMPT, [3, 9], sampling=unlike)])

    first, second, scored = host.forward.seen
    assert first is second
    assert (len(first.positions), first.num_decodes, len(first.seq_lens)) == (MAX_STEP_TOKENS, NUM_SLOTS, 2 * NUM_SLOTS)
    assert first.seq_lens.tolist() == [4, 8, *[0] * 4, 2, *[0] * 5]
    assert len(scored.positions) == 7  # launched as it is


def test_a_long_list_of_what_changed_does_not_keep_a_step_from_its_graph(host: Host) -> None:
    host.runner.begin_session()
    long = PROMPT * 8
    told = [sequence(slot_ref(slot, 0), long, list(range(1 + 15 * slot, 15 + 15 * slot))) for slot in range(6)]
    host.forward.seen.clear()

    first = host.step((A, 20), new=told[:1]).tokens, host.step((A, len(long) - 20)).tokens
    host.runner.begin_session()
    again = host.step((A, 20), new=told).tokens, host.step((A, len(long) - 20)).tokens

    assert first == again
    assert [len(inputs.positions) for inputs in host.forward.seen] == [MAX_STEP_TOKENS] * 4


def test_padding_writes_to_nobodys_blocks_and_tokens(host: Host) -> None:
    host.runner.begin_session()
    tables, layers = host.runner._tables.tables, host.runner._cache.layers
    slabs = [slab for layer in layers for slab in (layer.keys, layer.values)]
    for slab in slabs:
        slab.zero_()
    tables.token_ids[:NUM_SLOTS] = -7
    host.step((A, 7), (B, 3), (C, 1), new=three_prompts())
    before, tokens, blocks = [slab.clone() for slab in slabs], tables.token_ids.clone(), tables.block_tables.clone()
    host.forward.seen.clear()

    host.step((A, 1), (C, 1), (B, 1))
    other = slot_ref(3, 0)
    host.step((other, 5), (B, 1), new=[sequence(other, PROMPT, [20, 21])])

    assert [len(inputs.positions) for inputs in host.forward.seen] == [4, MAX_STEP_TOKENS]
    places = {(9, 3), (5, 1), (7, 3), (8, 0), (20, 0), (20, 1), (20, 2), (20, 3), (21, 0)}  # block, offset
    for slab, old in zip(slabs, before, strict=True):
        changed = (slab != old).any(dim=3).any(dim=1).nonzero().tolist()
        assert {(block, offset) for block, offset in changed} == places
    changed = (tables.token_ids[:NUM_SLOTS] != tokens[:NUM_SLOTS]).nonzero().tolist()
    assert changed == [[0, 8], [1, 4], [1, 5], [2, 2], *([3, place] for place in range(7))]
    assert torch.equal(tables.block_tables[:3], blocks[:3]) and torch.equal(tables.block_tables[4:], blocks[4:])


def test_more_graphs_are_captured_when_there_is_nothing_to_do(folder: Path) -> None:
    host = Host(folder, max_sequences=40)
    before = host.device.num_graphs

    assert host.runner.idle()
    assert not host.runner.idle()
    assert host.device.num_graphs == before + 2


def test_a_decode_step_waits_for_nothing_on_the_host(folder: Path) -> None:
    class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"}, name
            assert name != "index" or all(i is None or i.dtype is not torch.bool for i in args[1]), "a mask: nonzero"
            return func(*args, **(kwargs or {}))

    host = Host(folder, sample=sample_greedily)
    steps = [host.launch((A, 7), (B, 3), new=[sequence(A, PROMPT, [3, 9]), sequence(B, PROMPT[:3], [7])])]
    steps.append(host.launch((A, 1), (B, 1), append_refs=[B], append_blocks=[BlockId(8)]))
    steps.append(host.launch((A, 1), append_refs=[A], append_blocks=[BlockId(2)], copies=[(BlockId(3), BlockId(20))]))

    with NoWaits():  # type: ignore[no-untyped-call]
        host.device.synchronize()

    assert [len(step.result().tokens) for step in steps] == [2, 2, 1]


def test_a_new_session_knows_nothing_of_steps_that_were_in_flight(host: Host) -> None:
    host.runner.begin_session()
    alone = [host.step((A, 7), new=[sequence(A, PROMPT, [3, 9, 4])]).tokens, host.step((A, 1)).tokens]
    host.launch((A, 1))
    host.launch((A, 1))

    host.runner.begin_session()

    again = [host.step((A, 7), new=[sequence(A, PROMPT, [8, 1, 2])]).tokens, host.step((A, 1)).tokens]
    assert again == alone
    with pytest.raises(PlanError, match="not resident"):
        host.step((B, 1))


def test_a_session_that_ended_by_a_wrong_plan_leaves_no_trace(host: Host) -> None:
    host.runner.begin_session()
    told = sequence(A, PROMPT, [3, 9, 4])
    expected = host.step((A, 7), new=[told]).tokens

    for _ in range(5):
        host.runner.begin_session()
        with pytest.raises(PlanError):
            host.launch((A, 9), new=[told])

    host.runner.begin_session()
    assert host.step((A, 7), new=[told]).tokens == expected


def test_a_step_without_rows_has_a_result(host: Host) -> None:
    host.runner.begin_session()
    host.step((A, 7), new=[sequence(A, PROMPT, [3, 9, 4])])

    result = host.step(released=[A])

    assert (list(result.refs), list(result.failed)) == ([], [])


def test_logits_that_are_not_finite_fail_their_rows_alone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.runner.begin_session()
    host.step((A, 7), new=[sequence(A, PROMPT, [3, 9, 4])])
    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "hit", lambda name: "nan" if name == "after_forward_before_sample" else "")
        broken = host.step((A, 1))
    later = host.step((A, 1), (B, 3), new=[sequence(B, PROMPT[:3], [7, 8])])

    assert (list(broken.refs), list(broken.failed)) == ([], [A])
    assert list(later.refs) == [B]


def test_the_pause_before_a_step_is_told_by_the_device(folder: Path) -> None:
    class Clock(HostDevice):
        """An event a millisecond."""

        def event(self) -> Event:
            event = super().event()
            event.ns_since = lambda earlier: 1_000_000  # type: ignore[method-assign]
            return event

    host = Host(folder, Clock())
    first = host.step((A, 7), new=[sequence(A, PROMPT, [3, 9, 4])])
    second = host.step((A, 1))

    assert (first.idle_ns, first.compute_ns) == (0, 1_000_000)
    assert (second.idle_ns, second.compute_ns) == (1_000_000, 1_000_000)


class Breaking(HostDevice):
    """Raises what it is told to when anything is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.lost = False

    def queue(self, work: Any, /) -> None:
        if self.error is not None:
            raise self.error
        super().queue(work)

    def is_lost(self) -> bool:
        return self.lost


@contextmanager
def breaking(device: Breaking, error: Exception, *, lost: bool) -> Iterator[None]:
    device.error, device.lost = error, lost
    yield
    device.error, device.lost = None, False


def test_memory_that_is_out_ends_the_session_and_not_the_process(folder: Path) -> None:
    device = Breaking()
    host = Host(folder, device)
    told = sequence(A, PROMPT, [3, 9, 4])
    error = torch.OutOfMemoryError("CUDA out of memory")
    with breaking(device, error, lost=True), pytest.raises(torch.OutOfMemoryError):
        host.launch((A, 7), new=[told])

    host.runner.begin_session()

    assert len(host.step((A, 7), new=[told]).tokens) == 1


def test_an_error_that_stays_is_told_from_one_that_does_not(folder: Path) -> None:
    device = Breaking()
    host = Host(folder, device)
    told = sequence(A, PROMPT, [3, 9, 4])

    with breaking(device, RuntimeError("CUDA error: invalid argument"), lost=False), pytest.raises(RuntimeError):
        host.launch((A, 7), new=[told])
    host.runner.begin_session()
    error = RuntimeError("CUDA error: an illegal memory access")
    with breaking(device, error, lost=True), pytest.raises(DeviceLost, match="answers nothing any more"):
        host.launch((A, 7), new=[told])


def test_the_slab_takes_the_memory_that_model_graphs_and_driver_leave(folder: Path) -> None:
    block = 2 * 2 * 2 * 16 * BLOCK_SIZE * 4  # layers, K and V, heads, numbers, tokens, bytes
    graphs = 5 * (4 << 20)  # of 1, 2, 4 and 8 rows, and of 48 tokens
    for cuda_graphs, memory in (("off", 128 << 10), ("auto", graphs + (520 << 10))):
        facts = Host(folder, HostDevice(memory), num_blocks=None, cuda_graphs=cuda_graphs).facts
        taken = (graphs if cuda_graphs == "auto" else 0) + int(memory * 0.02)
        assert facts.num_blocks == (memory - taken) // block


def test_a_folder_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="give more memory"):
        Host(folder, HostDevice(1 << 10), num_blocks=None, cuda_graphs="off")


@pytest.mark.usefixtures("interpreted")
def test_an_fp8_cache_has_four_times_the_blocks_of_a_float32_one_and_its_own_tokens(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, num_hidden_layers=1)
    settings: dict[str, Any] = {
        "kv_cache_bytes": 1 << 13, "num_blocks": None, "attention_backend": "triton", "open_forward": open_gpu_model,
        "sample": sample_as_the_host, "max_step_tokens": 7, "max_sequences": 4, "max_model_len": 32,
        "cuda_graphs": "off",
    }  # fmt: skip
    plain, fp8 = (Host(folder, kv_cache_dtype=dtype, **settings) for dtype in ("auto", "fp8"))

    assert fp8.facts.num_blocks == 4 * plain.facts.num_blocks
    assert {layer.keys.dtype for layer in fp8.runner._cache.layers} == {torch.float8_e4m3fn}
    first = fp8.step((A, len(PROMPT)), new=[sequence(A, PROMPT, [0, 1])])
    second = fp8.step((A, 1))
    assert [len(first.tokens), len(second.tokens)] == [1, 1] and not first.failed and not second.failed


def test_an_fp8_cache_needs_attention_that_reads_it(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"float8_e4m3fn.* Type: --kv-cache-dtype auto"):
        Host(folder, kv_cache_dtype="fp8")


@pytest.mark.parametrize("settings", [{"weights": "int8"}, {"kv_cache_dtype": "int8"}])
def test_what_is_for_the_cpu_is_refused(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelFolderError, match="--device cpu"):
        Host(folder, **settings)


def test_vectors_are_the_other_runners_whoever_has_the_slot_when_they_are_read(plain: Runner, host: Host) -> None:
    told = sequence(A, PROMPT, [3, 9], embeds=True, max_tokens=1)
    beside, next_here = sequence(B, PROMPT[2:], [5, 6]), sequence(slot_ref(0, 1), PROMPT[3:], [7])
    steps: list[dict[str, Any]] = [
        {"refs": [A, B], "num_scheduled": [4, 5], "new": [told, beside]},
        {"refs": [A, B], "num_scheduled": [3, 1]},
        {"refs": [next_here.ref, B], "num_scheduled": [4, 1], "released": [A], "new": [next_here]},
    ]
    plans = [StepPlan(step=n, **columns) for n, columns in enumerate(steps)]
    plain.begin_session()
    host.runner.begin_session()

    expected = [plain.launch(plan).result() for plan in plans]
    found = [launched.result() for launched in [host.runner.launch(plan) for plan in plans]]

    for ours, theirs in zip(found, expected, strict=True):
        check_same(ours, theirs)
    assert [[each.ref for each in result.embedded] for result in found] == [[], [A], []]
    [(_, vector)], [(_, wanted)] = found[1].embedded, expected[1].embedded
    assert np.frombuffer(vector, "<f4") == pytest.approx(np.frombuffer(wanted, "<f4"), abs=1e-4)
    assert A not in found[1].refs
