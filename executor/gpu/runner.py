"""The runner for a GPU: it launches steps and does not wait for them.

A step needs nothing of the step before that is not on the device already: its tokens lie in the token pool there, and
rows, positions and blocks are known without them. So while one step is computed the next ones are launched behind it;
tokens are read when their step's event has come, and a row that had met its end by then was computed in vain.

Four kinds of rows need the host: those whose logits are edited (their launch waits for the tokens before), those with
typical-p, which only the host's sampler knows, beams, which are ranked, and prompts that are scored.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from common import failpoints
from common.blocks import blocks_for
from common.errors import ModelFolderError
from common.model_folder import read_model_folder
from common.step import EMBEDS, ExecutorFacts, StepPlan, StepResult
from common.types import BlockId, slot_of
from executor.attention import choose
from executor.attention.protocol import AttentionBackend, LayerNeeds
from executor.batch import InputBatch, build_batch
from executor.choosing import pick
from executor.controls import unready
from executor.embedding import who_embeds
from executor.gpu.device import CudaDevice, Device
from executor.gpu.flying import FlyingStep
from executor.gpu.graphs import StepGraph, StepGraphs, buckets_for, mixed_shapes
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.gpu.models import OpenModel, open_gpu_model
from executor.gpu.packing import NO_ROWS, Layout, Padding, Shape, Staging, StagingBuffer
from executor.gpu.part_clock import PartClock
from executor.gpu.tables import MirroredTables, Updates
from executor.guide import Grammars
from executor.kv_cache import KvCache, SlabFormat, block_bytes, copied_together, fit_slab
from executor.loading import open_model
from executor.resident import Resident
from executor.runner import DeviceLost, Launched, Report
from executor.scoring import score_prompts, who_asks

_log = logging.getLogger(__name__)

_STEP_TOKENS: Final = 8192
_SCORED_AT_ONCE: Final = 1024  # positions of prompts whose logits lie in memory together
_LEFT_FREE: Final = 0.02  # of the memory: what the driver and the libraries take while we serve
_KV_DTYPES: Final = {"auto": None, "fp8": torch.float8_e4m3fn}
_GRAPH_BYTES: Final = 4 << 20  # of each graph beside its share of the pool

Sample = Callable[[Tensor, StepInputs, DeviceTables, Tensor], None]
"""sample(logits, inputs, tables, tokens): as in executor/gpu/kernels/sampling.py."""


class GpuRunner:
    """A Runner over a Hugging Face folder, on a GPU."""

    def __init__(
        self,
        *,
        name: str,
        model_folder: Path,
        dtype: str = "auto",
        device: str = "cuda",
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        max_sequences: int = 256,
        max_step_tokens: int | None = None,
        max_model_len: int | None = None,
        attention_backend: str = "auto",
        weights: str = "auto",
        kv_cache_dtype: str = "auto",
        cuda_graphs: str = "auto",
        credit: int = 2,
        make_device: Callable[[torch.device], Device] = CudaDevice,
        open_forward: OpenModel = open_gpu_model,
        sample: Sample | None = None,
    ) -> None:
        """Take the settings, which are ModelRunner's; nothing is read before `load`.

        `cuda_graphs` is auto or off. The last three are for tests: without them the device is CUDA's, the model the
        fastest that serves, and tokens are chosen by our kernel.
        """
        self._name = name
        self._model_folder = model_folder
        self._dtype = dtype
        self._wanted_device = device
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._kv_cache_bytes = kv_cache_bytes
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens or _STEP_TOKENS
        self._max_model_len = max_model_len
        self._attention_backend = attention_backend
        self._weights = weights
        self._kv_cache_dtype = kv_cache_dtype
        self._has_graphs = cuda_graphs != "off"
        self._credit = credit
        self._make_device = make_device
        self._open_forward = open_forward
        self._sample = sample
        self._graph_logits: Tensor | None = None
        self._in_flight: deque[FlyingStep] = deque()
        # of the step whose result was read last: the next one's pause is told from its end
        self._last: StagingBuffer | None = None

    def load(self, report: Report) -> ExecutorFacts:
        """Read the model, run it at its largest to see what memory it takes, give the rest to the KV slab, capture.

        Raises ModelFolderError when the folder or the settings do not allow it.
        """
        self._refuse_what_is_for_the_cpu()
        clock = PartClock()
        self._device = self._make_device(torch.device(self._wanted_device))
        where = self._device.torch_device
        folder = read_model_folder(self._model_folder)
        self._grammars = Grammars.of(folder)
        report("weights", 0, 1)
        loaded = open_model(
            folder,
            dtype=self._dtype,
            device=where,
            attention=self._attention_backend,
            kind=None,
            block_size=self._block_size,
            fused_on_gpu=self._open_forward is open_gpu_model,
        )
        needs = loaded.needs
        backends = self._choose(needs)
        dtype = loaded.model.dtype
        shapes = [layer.shape for layer in needs]
        slab = SlabFormat(dtype=_KV_DTYPES[self._kv_cache_dtype] or needs[0].dtype)
        longest = min(filter(None, [folder.max_model_len, loaded.longest]))
        # one block to begin with: what is left for the others shows once the model has run
        self._cache = KvCache(shapes, num_blocks=1, block_size=self._block_size, format=slab, device=where)
        max_rows = max(self._max_sequences, *buckets_for(self._max_sequences))
        self._model = self._open_forward(
            loaded,
            self._cache,
            backends,
            max_positions=longest,
            max_rows=max_rows,
            max_tokens=max(self._max_step_tokens, max_rows),
            report=partial(report, "weights"),
        )
        del loaded  # the forward has taken the weights
        if self._sample is None:
            from executor.gpu.kernels.sampling import sample as sample_on_device

            self._sample = sample_on_device
        report("weights", 1, 1)
        clock.tell("weights")

        self._make_tables(num_blocks=1, max_model_len=self._max_model_len or longest, vocab_size=folder.vocab_size)
        report("kernels", 0, 1)
        self._compile()
        report("kernels", 1, 1)
        clock.tell("kernels")
        report("KV cache", 0, 1)
        self._warm_up()
        self._model.check(self._tables.tables)
        num_blocks, max_model_len = fit_slab(
            shapes,
            block_size=self._block_size,
            format=slab,
            budget_bytes=self._budget_bytes(block_bytes(shapes, self._block_size, slab)),
            max_sequences=self._max_sequences,
            longest=longest,
            max_model_len=self._max_model_len,
        )
        self._cache.resize(num_blocks)
        self._make_tables(num_blocks=num_blocks, max_model_len=max_model_len, vocab_size=folder.vocab_size)
        report("KV cache", 1, 1)
        clock.tell("memory")
        if self._graphs is not None:
            report("graphs", 0, 1)
            self._graphs.capture_first()
            report("graphs", 1, 1)
            clock.tell("graphs")
        facts = ExecutorFacts(
            name=self._name,
            model=folder.name,
            model_digest=folder.digest,
            vocab_size=folder.vocab_size,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=self._block_size,
            max_sequences=self._max_sequences,
            max_step_tokens=self._max_step_tokens,
            credit=self._credit,
            dtype=str(dtype).removeprefix("torch."),
            device=where.type,
            capabilities=(EMBEDS,),
        )
        _log.info(
            "%s: %s on %s, %d blocks of %d tokens (%.1f GiB), at most %d tokens a sequence",
            folder.architecture, facts.dtype, where, num_blocks, self._block_size,
            num_blocks * block_bytes(shapes, self._block_size, slab) / 2**30, max_model_len,
        )  # fmt: skip
        _log.info("ready after %s", clock)
        return facts

    def begin_session(self) -> None:
        """Forget every resident sequence; what the KV slab holds is void."""
        with self._noticing_loss():
            self._device.synchronize()
        self._in_flight.clear()
        self._last = None
        self._staging.reset()
        self._resident.clear()

    def launch(self, plan: StepPlan) -> Launched:
        """Launch one step behind those in flight. Raises PlanError when the plan does not fit what is resident."""
        with self._noticing_loss():
            return self._launch(plan)

    def idle(self) -> bool:
        """Capture one more graph, if one is missing; return whether more are. For when nothing is in flight."""
        with self._noticing_loss():
            return self._graphs is not None and self._graphs.capture_next()

    # ---- a step

    def _launch(self, plan: StepPlan) -> Launched:
        held = self._resident
        if held.controlled and any(slot_of(ref) in held.controlled for ref in plan.refs):
            self._settle_all()  # to edit its logits, all tokens of a sequence must be known here
        rows = held.apply(plan)
        batch = build_batch(held, rows, gathers_tables=self._model.reads_host) if len(rows.slots) else NO_ROWS
        asking = who_asks(held, batch.sampled_slots)
        step = FlyingStep(self, plan.step, self._staging.take(), asking, len(batch.sampled_slots))
        step.embedding = who_embeds(held, batch)
        step.buffer.begun.record()
        if plan.copies:
            failpoints.hit("before_block_copy")
        self._queue(step, batch, self._tables.updates(plan), plan.copies)
        self._choose_on_the_host(step, batch)
        self._score_prompts(step, batch)
        step.reserved = held.reserve(rows, step.unready)
        step.buffer.done.record()
        step.logits = step.inputs = None  # nobody reads them any more, and the next step needs the memory
        self._in_flight.append(step)
        return step

    def _queue(
        self,
        step: FlyingStep,
        batch: InputBatch,
        updates: Updates,
        copies: Sequence[tuple[BlockId, BlockId]],
    ) -> None:
        """Queue what the device does for `step`: one copy to it, what the plan changed, forward, sampling, tokens."""
        poisoned = bool(len(batch.seq_lens)) and failpoints.hit("after_forward_before_sample") == "nan"
        graph = None if poisoned or step.embedding else self._graph_for(Shape.of(batch))
        shape = Shape.of(batch) if graph is None else graph.shape
        layout = Layout(shape, num_updates=len(updates.places), num_copies=len(copies))
        layout.write(step.buffer.room(layout.size), batch, self._padding, updates, copies)
        runs = copied_together(copies)

        def work() -> None:
            if graph is not None and layout.size <= len(graph.buffer):
                on_device = graph.buffer[: layout.size]
            else:
                on_device = torch.empty(layout.size, dtype=torch.int32, device=self._device.torch_device)
            step.buffer.copy_to(on_device)
            if len(updates.places):
                self._tables.apply(*layout.updates(on_device))
            if runs:
                blocks = layout.copies(on_device).long()
                for run in runs:
                    self._cache.copy_together(blocks[run, 0], blocks[run, 1])
            if graph is not None:
                if layout.size > len(graph.buffer):  # a long list of updates
                    graph.buffer[: layout.columns_size].copy_(on_device[: layout.columns_size])
                graph.replay()
                step.give(graph.tokens, graph.logits, self._device.pinned)
            elif len(batch.seq_lens):
                step.inputs = _inputs(layout, on_device, batch)
                tokens = torch.empty(step.num_sampled, dtype=torch.int32, device=on_device.device)
                logits = self._compute(_first_scored(step.inputs, step.num_sampled), tokens, batch, poisoned=poisoned)
                step.give(tokens, logits, self._device.pinned, self._model.hidden if step.embedding else None)

        self._device.queue(work)

    def _graph_for(self, shape: Shape) -> StepGraph | None:
        """The graph for a step of the shape, if there is one."""
        return self._graphs.fitting(shape) if self._graphs is not None and shape.num_rows else None

    def _compute(
        self, inputs: StepInputs, tokens: Tensor, batch: InputBatch | None = None, *, poisoned: bool = False
    ) -> Tensor:
        """Forward and sampling; the tokens (S,) go to `tokens` and to the token pool. Returns the logits (S + P, V)."""
        assert self._sample is not None, "load comes first"
        with torch.inference_mode():
            logits = self._model.forward(inputs, self._tables.tables, batch)
            if poisoned:
                logits = torch.full_like(logits, torch.nan)
            if len(tokens):
                self._sample(logits, inputs, self._tables.tables, tokens)
        return logits

    def _compute_in_graph(self, inputs: StepInputs, tokens: Tensor) -> Tensor:
        """The same, its logits where those of every other graph lie: else each would hold its own for ever."""
        logits = self._compute(inputs, tokens)
        if self._model.keeps_logits:
            return logits
        if self._graph_logits is None or len(self._graph_logits) < len(logits):  # in the pass before a capture
            self._graph_logits = logits.new_empty(max(len(logits), self._max_sequences), logits.shape[1])
        return self._graph_logits[: len(logits)].copy_(logits)

    def _choose_on_the_host(self, step: FlyingStep, batch: InputBatch) -> None:
        """Choose again, here, for rows whose logits are edited, or that only the sampler of the host can cut."""
        held, slots = self._resident, batch.sampled_slots
        there = list(enumerate(slots.tolist())) if held.controlled or held.beams else []
        beams = {row for row, slot in there if slot in held.beams}
        typical = (held.typical_p[slots] < 1) & (held.temperature[slots] > 0)
        controlled = {row for row, slot in there if slot in held.controlled}
        rows = sorted({*controlled, *beams, *np.flatnonzero(typical).tolist()})
        if not rows:
            return
        step.unready = unready(held, slots, len(batch.seq_lens))  # the device computes meanwhile
        self._device.synchronize()
        rows = [row for row in rows if row not in step.unready]
        if not rows:
            return
        assert step.logits is not None
        values = torch.stack([step.logits[row] for row in rows]).float().cpu().numpy()
        step.ranked, chosen = pick(values, held, slots[rows], batch.sampled_indices[rows])
        step.chosen = dict(zip(rows, chosen.or_none(), strict=True))
        good = [row for row, token in step.chosen.items() if token >= 0 and row not in beams]
        where = self._device.torch_device
        places = torch.from_numpy(batch.sampled_places[good]).to(where)
        tokens = torch.tensor([step.chosen[row] for row in good], dtype=torch.int32).to(where)
        self._device.queue(lambda: self._tables.put_tokens(places, tokens))

    def _score_prompts(self, step: FlyingStep, batch: InputBatch) -> None:
        """How likely the tokens of prompts are. Where many are asked for, the step is computed once for each part."""
        num_scored = len(batch.scored_slots)
        for begin in range(0, num_scored, _SCORED_AT_ONCE):
            part = slice(begin, begin + _SCORED_AT_ONCE)
            if begin:
                self._device.queue(lambda part=part: self._compute_again(step, batch, part))  # type: ignore[misc]
            self._device.synchronize()
            assert step.logits is not None
            logits = step.logits if begin else step.logits[step.num_sampled :]
            step.scored += score_prompts(logits, self._resident, batch.scored_slots[part], batch.scored_positions[part])

    def _compute_again(self, step: FlyingStep, batch: InputBatch, part: slice) -> None:
        """The logits of a part of the scored positions. K and V are what they are, and nothing is sampled."""
        inputs = step.inputs
        assert inputs is not None
        none = inputs.sampled_slots[:0]
        inputs = replace(
            inputs,
            logits_indices=inputs.logits_indices[step.num_sampled :][part],
            sampled_slots=none, sampled_places=none, sampled_indices=none,
        )  # fmt: skip
        step.logits = None  # before there are as many again
        step.logits = self._compute(inputs, none, replace(batch, embedded_rows=batch.embedded_rows[:0]))

    # ---- its result

    def _settle_all(self) -> None:
        """Wait for all that is in flight, and learn what it sampled."""
        while self._in_flight:
            self._settle(self._in_flight.popleft())

    def wait_for(self, buffer: StagingBuffer) -> None:
        """Block, in any thread, until the step has been computed that uses `buffer`."""
        with self._noticing_loss():
            buffer.done.wait()

    def result_of(self, step: FlyingStep) -> StepResult:
        """What came out of `step`, and before it of all that was launched before it."""
        with self._noticing_loss():
            while step.settled is None:
                assert self._in_flight, "a step of a session that is over"
                self._settle(self._in_flight.popleft())
        return step.settled

    def _settle(self, step: FlyingStep) -> None:
        """Wait for `step`, the oldest in flight, and take its tokens into the resident tables."""
        buffer = step.buffer
        buffer.done.wait()
        tokens: list[int] = buffer.tokens[: step.num_sampled].tolist()
        for row, token in step.chosen.items():
            tokens[row] = token
        failed = [row for row, token in enumerate(tokens) if token < 0]
        assert step.reserved is not None
        sampled = self._resident.settle(step.reserved, tokens, failed)
        known = set(sampled.refs)  # others had met their end before: nothing of them counts
        scored = [each for each in step.score_sampled(tokens) if each.ref in known] + step.scored
        last, self._last = self._last, buffer
        idle_ns = 0
        if last is not None:
            idle_ns = max(0, buffer.begun.ns_since(last.done))
            self._staging.give_back(last)
        step.settled = StepResult(
            step=step.number,
            refs=sampled.refs,
            tokens=sampled.tokens,
            indices=sampled.indices,
            failed=sampled.failed,
            unready=sampled.unready,
            compute_ns=buffer.done.ns_since(buffer.begun),
            idle_ns=idle_ns,
            scored=scored,
            ranked=step.ranked,
            embedded=step.embedded(failed),
        )
        step.forget()

    @contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        """Tell an error after which the device answers nothing any more from one that ends the session alone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self._device.is_lost():
                raise DeviceLost(f"{self._device.torch_device} answers nothing any more in this process") from error
            raise

    # ---- memory

    def _make_tables(self, *, num_blocks: int, max_model_len: int, vocab_size: int) -> None:
        """Make everything that depends on how many blocks there are, and on how long a sequence may be."""
        self._graphs = None
        self._resident = Resident(
            num_blocks=num_blocks,
            block_size=self._block_size,
            max_sequences=self._max_sequences,
            max_step_tokens=self._max_step_tokens,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            grammars=self._grammars,
        )
        self._tables = MirroredTables(self._resident, self._device.torch_device)
        self._padding = Padding(line=self._max_sequences, place=self._max_sequences * max_model_len)
        most = Shape(
            num_tokens=self._max_step_tokens,
            num_rows=self._max_sequences,
            num_decodes=self._max_sequences,
            num_sampled=self._max_sequences,
        )
        self._staging = Staging(
            self._device,
            count=self._credit + 2,  # one that is filled, and the last one, whose end the next step's pause is told by
            size=Layout(most, num_updates=self._max_step_tokens).size,
            max_sampled=self._max_sequences,
        )
        if self._has_graphs and not self._model.reads_host:
            self._graphs = StepGraphs(
                self._device,
                self._compute_in_graph,
                max_rows=self._max_sequences,
                max_tokens=self._max_step_tokens,
                padding=self._padding,
                max_seq_len=max_model_len,
            )

    def _compile(self) -> None:
        """Compile the kernels of whatever is run or captured, beside each other. What they would compute is void."""
        where = self._device.torch_device
        if where.type != "cuda":
            return
        from executor.gpu.compiling import compiling_ahead

        most = min(self._max_step_tokens, self._resident.max_model_len * self._max_sequences)
        with compiling_ahead(lambda: torch.cuda.set_device(where)):
            for rows in buckets_for(self._max_sequences):
                self._run_once(self._nobody(0, num_decodes=rows))
            for num_tokens in {min(most, 64), min(most, 512), most}:
                self._run_once(self._nobody(num_tokens - 1, num_decodes=1))

    def _warm_up(self) -> None:
        """Run steps of nobody, the largest first: it shows what memory a step takes."""
        most = min(self._max_step_tokens, self._resident.max_model_len * self._max_sequences)
        for batch in (
            self._nobody(most, num_scored=min(most, _SCORED_AT_ONCE)),
            self._nobody(most // 2, num_decodes=min(most - most // 2, self._max_sequences // 2)),
            self._nobody(min(most, 64)),
            self._nobody(0, num_decodes=1),
        ):
            self._run_once(batch)

    def _nobody(self, num_prefilled: int, *, num_decodes: int = 0, num_scored: int = 0) -> InputBatch:
        """A batch of rows of nobody that write to the first slot: decode rows, then prompts of full length."""
        longest = self._resident.max_model_len
        prompts = [min(longest, num_prefilled - begin) for begin in range(0, num_prefilled, longest)]
        counts = np.array([1] * num_decodes + prompts, np.int64)
        loc = np.concatenate((np.zeros(1, np.int64), counts.cumsum()))
        num_rows, num_tokens = len(counts), int(loc[-1])
        num_scored = min(num_scored, num_tokens - num_rows)  # the last token of a row is sampled, and never scored
        return InputBatch(
            token_places=np.full(num_tokens, self._padding.place),
            positions=np.arange(num_tokens) - np.repeat(loc[:-1], counts),
            slot_mapping=np.zeros(num_tokens, np.int64),
            query_start_loc=loc,
            seq_lens=counts,
            block_tables=np.zeros((num_rows, blocks_for(int(counts.max()), self._block_size)), np.int32),
            num_decodes=num_decodes,
            logits_indices=np.concatenate((loc[1:] - 1, np.arange(num_scored))),
            sampled_slots=np.full(num_rows, self._padding.line),
            sampled_places=np.full(num_rows, self._padding.place),
            sampled_indices=np.zeros(num_rows, np.int64),
            scored_slots=np.zeros(num_scored, np.int64),
            scored_positions=np.ones(num_scored, np.int64),
            table_rows=np.full(num_rows, self._padding.line),
        )

    def _run_once(self, batch: InputBatch) -> None:
        layout = Layout(Shape.of(batch))
        numbers = np.empty(layout.size, np.int32)
        layout.write(numbers, batch, self._padding)
        on_device = torch.from_numpy(numbers).to(self._device.torch_device)
        tokens = torch.empty(len(batch.sampled_slots), dtype=torch.int32, device=on_device.device)
        inputs = _inputs(layout, on_device, batch)

        def work() -> None:
            self._compute(inputs, tokens, batch)

        self._device.queue(work)
        self._device.synchronize()

    def _budget_bytes(self, block: int) -> int:
        """Memory for the slab, when one block takes `block` bytes. Runs the model once, at its largest."""
        if self._num_blocks is not None:
            return self._num_blocks * block
        if self._kv_cache_bytes is not None:
            return self._kv_cache_bytes
        device = self._device
        device.release_unused()
        device.begin_peak()
        self._warm_up()
        activations = device.peak_bytes()
        device.release_unused()  # else what torch keeps of them would count as used, and be missed in what graphs take
        graphs = self._graph_bytes()
        free, spare = device.free_bytes(), int(device.total_bytes() * _LEFT_FREE)
        _log.info(
            "memory: %.1f GiB free beside the weights; a step takes %.2f, graphs %.2f, %.2f stay free",
            free / 2**30, activations / 2**30, graphs / 2**30, spare / 2**30,
        )  # fmt: skip
        return max(0, free - activations - graphs - spare)

    def _graph_bytes(self) -> int:
        """Memory that all graphs will take: that of the largest, whose pool the others share, and a little for each."""
        if self._graphs is None:
            return 0
        before = self._device.free_bytes()
        self._graphs.capture_largest()
        self._device.release_unused()
        largest = before - self._device.free_bytes()
        self._graphs = None
        self._device.forget_graphs()
        self._device.release_unused()
        count = len(buckets_for(self._max_sequences)) + len(mixed_shapes(self._max_step_tokens, self._max_sequences))
        return max(0, largest) + count * _GRAPH_BYTES

    def _choose(self, needs: Sequence[LayerNeeds]) -> list[AttentionBackend]:
        """Each layer's attention, for K and V as they are wanted."""
        kv_dtype = _KV_DTYPES[self._kv_cache_dtype]
        try:
            return choose([replace(layer, kv_dtype=kv_dtype) for layer in needs], self._attention_backend)
        except ModelFolderError as refused:
            if kv_dtype is None:
                raise
            raise ModelFolderError(f"{refused}. Type: --kv-cache-dtype auto") from refused

    def _refuse_what_is_for_the_cpu(self) -> None:
        if self._weights != "auto":
            raise ModelFolderError(f"{self._weights} weights are for a CPU. Type: --weights auto, or --device cpu")
        if self._kv_cache_dtype not in _KV_DTYPES:
            raise ModelFolderError("an int8 KV cache is for a CPU. Type: --kv-cache-dtype fp8, or --device cpu")


def _inputs(layout: Layout, buffer: Tensor, batch: InputBatch) -> StepInputs:
    """The columns of `batch`, which lie in `buffer`."""
    counts = np.diff(batch.query_start_loc)
    return layout.inputs(
        buffer,
        max_query_len=int(counts.max()),
        max_seq_len=int(batch.seq_lens.max()),
    )


def _first_scored(inputs: StepInputs, num_sampled: int) -> StepInputs:
    """`inputs` with as many scored positions as may be computed at once."""
    most = num_sampled + _SCORED_AT_ONCE
    if len(inputs.logits_indices) <= most:
        return inputs
    return replace(inputs, logits_indices=inputs.logits_indices[:most])
