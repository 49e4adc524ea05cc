"""The runner that computes: a plan to tensors, through the model, to tokens. Walks the stops; decides nothing.

Importing this module imports torch. Import it, and call everything in it, from the one compute thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch

from common import failpoints
from common.errors import ModelFolderError
from common.model_folder import ModelFolder, read_model_folder
from common.step import EMBEDS, Embedded, ExecutorFacts, StepPlan, StepResult
from common.types import SlotRef, slot_of
from executor.attention import choose
from executor.attention.protocol import AttentionBackend, LayerNeeds
from executor.batch import build_batch
from executor.choosing import NO_RUN, choose_run
from executor.determinism import class_of
from executor.devices import device_of
from executor.embedding import embedded, who_embeds
from executor.guide import Grammars
from executor.kv_cache import KvCache, LayerShape, SlabFormat, block_bytes, fit_slab, free_bytes
from executor.llama import LlamaModel
from executor.llama import why_not as why_not_fused
from executor.loading import Forward, Loaded, open_model, transformers_forward
from executor.native.library import INT4, INT8, native
from executor.proposers.draft_model import DraftModel, check_vocabularies
from executor.proposers.ngram import NgramProposer
from executor.proposers.protocol import Proposer
from executor.resident import Resident
from executor.runner import Done, Report
from executor.scoring import score_prompts
from executor.speculation import draft, drafted
from executor.token_pool import TokenPool

_log = logging.getLogger(__name__)

_CPU_SHARE: Final = 0.5  # of the free memory: a machine has other work
_CPU_MOST_BYTES: Final = 4 << 30
_GPU_SHARE: Final = 0.85  # the rest is for activations
_CPU_STEP_TOKENS: Final = 256  # a fifth of a second: what the other streams wait while a long prompt is read
_GPU_STEP_TOKENS: Final = 8192
_WEIGHT_KINDS: Final = {"auto": None, "int8": INT8, "int4": INT4}


class _Opened(NamedTuple):
    """A model with its weights, and how its K and V will lie."""

    folder: ModelFolder
    loaded: Loaded
    backends: list[AttentionBackend]
    slab: SlabFormat

    @property
    def shapes(self) -> list[LayerShape]:
        """Of its layers."""
        return [layer.shape for layer in self.loaded.needs]

    def block_bytes(self, block_size: int) -> int:
        """Bytes that one KV block takes."""
        return block_bytes(self.shapes, block_size, self.slab)


class ModelRunner:
    """A Runner over a Hugging Face folder."""

    def __init__(
        self,
        *,
        name: str,
        model_folder: Path,
        dtype: str = "auto",
        device: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        max_sequences: int = 256,
        max_step_tokens: int | None = None,
        max_model_len: int | None = None,
        num_threads: int | None = None,
        attention_backend: str = "auto",
        weights: str = "auto",
        kv_cache_dtype: str = "auto",
        credit: int = 2,
        speculate: str = "none",
        draft_model: Path | None = None,
        max_drafts: int = 8,
        step_overhead_tokens: int = 12,
    ) -> None:
        """Take the settings; nothing is read before `load`.

        `dtype` is auto, float32, bfloat16 or float16. `num_blocks` wins over `kv_cache_bytes`; without either the size
        is found from the free memory. Without `max_model_len` it is the model's, or less where the memory is less.
        `weights` is auto (as they are), int8 or int4; `kv_cache_dtype` auto (as the activations) or int8.
        `speculate` is none, ngram or draft (by the model in `draft_model`): a row then carries up to `max_drafts`
        drafts, as long as that pays beside a step's fixed cost of `step_overhead_tokens`.
        """
        self._name = name
        self._model_folder = model_folder
        self._dtype = dtype
        self._device = device_of(device)
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._kv_cache_bytes = kv_cache_bytes
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens or (
            _CPU_STEP_TOKENS if self._device.type == "cpu" else _GPU_STEP_TOKENS
        )
        self._max_model_len = max_model_len
        self._num_threads = num_threads
        self._attention_backend = attention_backend
        self._weights = weights
        self._kv_cache_dtype = kv_cache_dtype
        self._credit = credit
        self._speculate = speculate
        self._draft_model = draft_model
        self._max_drafts = max_drafts
        self._step_overhead_tokens = step_overhead_tokens
        self._proposer: Proposer | None = None

    def load(self, report: Report) -> ExecutorFacts:
        """Read the model, check that it can be served, take the KV slab, and run once to warm up.

        Raises ModelFolderError when the folder or the settings do not allow it.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        folder = read_model_folder(self._model_folder)
        grammars = Grammars.of(folder)
        report("weights", 0, 1)
        opened = self._open(folder)
        beside = self._open_draft(folder) if self._speculate == "draft" else None
        report("weights", 1, 1)

        loaded = opened.loaded
        longest = min(filter(None, [folder.max_model_len, loaded.longest]))
        other_bytes = beside.block_bytes(self._block_size) if beside is not None else 0
        num_blocks, max_model_len = fit_slab(
            opened.shapes,
            block_size=self._block_size,
            format=opened.slab,
            budget_bytes=self._budget_bytes(opened.block_bytes(self._block_size) + other_bytes),
            max_sequences=self._max_sequences,
            longest=longest,
            max_model_len=self._max_model_len,
            other_bytes=other_bytes,
        )
        report("KV cache", 0, 1)
        self._cache = self._slab(opened, num_blocks)
        self._model = self._fast_model(opened, self._cache, max_model_len)
        self._resident = Resident(
            num_blocks=num_blocks,
            block_size=self._block_size,
            max_sequences=self._max_sequences,
            max_step_tokens=self._max_step_tokens,
            max_model_len=max_model_len,
            vocab_size=folder.vocab_size,
            grammars=grammars,
        )
        self._pool = TokenPool(self._resident.token_ids, self._device)
        share_of_work = 0.0  # that a guess takes, of a step's
        if self._speculate == "ngram":
            self._proposer = NgramProposer(self._resident)
        elif beside is not None:
            share_of_work = _weight_bytes(beside.folder) / _weight_bytes(folder)
            cache = self._slab(beside, num_blocks)
            self._proposer = DraftModel(
                self._resident,
                self._fast_model(beside, cache, max_model_len),
                cache,
                longest=min(filter(None, [beside.folder.max_model_len, beside.loaded.longest])),
                catch_up=self._max_step_tokens,
            )
        report("KV cache", 1, 1)
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
            max_drafts=self._max_drafts if self._proposer is not None else 0,
            step_overhead_tokens=self._step_overhead_tokens,
            draft_cost=1 + (1 + self._step_overhead_tokens) * share_of_work,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            device=self._device.type,
            capabilities=(EMBEDS,),
            determinism=class_of(
                self._model,
                folder,
                loaded_as=f"{type(loaded.model).__name__} {loaded.model.dtype}",
                weights=self._weights,
                slab=opened.slab,
                block_size=self._block_size,
            ),
        )
        _log.info(
            "%s: %s on %s, %d blocks of %d tokens, at most %d tokens a sequence",
            folder.architecture, facts.dtype, facts.device, num_blocks, self._block_size, max_model_len,
        )  # fmt: skip
        return facts

    def begin_session(self) -> None:
        """Forget every resident sequence; what the KV slab holds is void."""
        self._resident.clear()
        if self._proposer is not None:
            self._proposer.begin_session()

    def idle(self) -> bool:
        """Nothing is left for idle moments."""
        return False

    def launch(self, plan: StepPlan) -> Done:
        """Run one step to its end. Raises PlanError when the plan does not fit what is resident."""
        started_ns = time.perf_counter_ns()
        held = self._resident
        rows = held.apply(plan)
        self._pool.admit(slot_of(sequence.ref) for sequence in plan.new)
        if plan.told_refs:
            self._pool.put(held.told_places(plan), plan.told_tokens)
        if plan.copies:
            failpoints.hit("before_block_copy")
        self._cache.copy_blocks(plan.copies)
        guessed: list[tuple[SlotRef, int]] = []
        if self._proposer is not None:
            self._proposer.begin_step(rows, plan.copies)
            rows = draft(held, rows, self._proposer)
            guessed = drafted(held, rows)
        run, vectors = NO_RUN, list[Embedded]()
        if len(rows.slots):
            batch = build_batch(held, rows)
            logits = self._model.forward(batch, self._pool.take(batch.token_places))
            if failpoints.hit("after_forward_before_sample") == "nan":
                logits = torch.full_like(logits, torch.nan)
            values = logits[: len(batch.sampled_slots) + len(batch.draft_rows)].float().cpu().numpy()
            run = choose_run(values, held, batch)
            if len(batch.scored_slots):
                prompts = logits[len(values) :]
                run.scored.extend(score_prompts(prompts, held, batch.scored_slots, batch.scored_positions))
            if self._model.hidden is not None and (embedding := who_embeds(held, batch)):
                vectors = embedded(embedding, self._model.hidden, run.first.failed)
            self._pool.put(batch.sampled_places, run.first.tokens)
        sampled = held.advance(rows, run.first.tokens, run.first.failed, unready=run.unready, more=run.more)
        return Done(
            StepResult(
                step=plan.step,
                refs=sampled.refs,
                tokens=sampled.tokens,
                indices=sampled.indices,
                failed=sampled.failed,
                unready=sampled.unready,
                compute_ns=time.perf_counter_ns() - started_ns,
                scored=run.scored,
                ranked=run.ranked,
                drafted=guessed,
                embedded=vectors,
            )
        )

    def _open(self, folder: ModelFolder) -> _Opened:
        loaded = open_model(
            folder,
            dtype=self._dtype,
            device=self._device,
            attention=self._attention_backend,
            kind=_WEIGHT_KINDS[self._weights],
            block_size=self._block_size,
        )
        backends = choose(loaded.needs, self._attention_backend)
        return _Opened(folder, loaded, backends, self._slab_format(loaded.needs, backends))

    def _open_draft(self, target: ModelFolder) -> _Opened:
        if self._draft_model is None:
            raise ModelFolderError(
                "--speculate draft needs a smaller model of the same vocabulary. Type: --draft-model PATH"
            )
        folder = read_model_folder(self._draft_model)
        check_vocabularies(target, folder)
        _log.info("drafts: %s", folder.name)
        return self._open(folder)

    def _slab(self, opened: _Opened, num_blocks: int) -> KvCache:
        return KvCache(
            opened.shapes,
            num_blocks=num_blocks,
            block_size=self._block_size,
            format=opened.slab,
            device=self._device,
        )

    def _fast_model(self, opened: _Opened, cache: KvCache, max_model_len: int) -> Forward:
        """The fastest forward that serves this model."""
        loaded, backends = opened.loaded, opened.backends
        kind = _WEIGHT_KINDS[self._weights]
        reason = why_not_fused(loaded.model, kind)
        if reason is None and not all(backend.packed for backend in backends):
            reason = "its attention is not native"
        if reason is not None:
            _log.info("forward: Transformers' own (not fused: %s)", reason)
            return transformers_forward(loaded, cache, backends, kind)
        _log.info("forward: fused (%s, %d threads)", native().isa, native().num_threads)
        return LlamaModel(native(), loaded.model, cache, loaded.needs, max_positions=max_model_len, kind=kind)

    def _slab_format(self, needs: Sequence[LayerNeeds], backends: Sequence[AttentionBackend]) -> SlabFormat:
        packed = all(backend.packed for backend in backends)
        if self._kv_cache_dtype == "fp8":
            other = "int8" if packed else "auto"
            raise ModelFolderError(
                f"an fp8 KV cache is for a GPU with Triton's kernels. Type: --kv-cache-dtype {other}"
            )
        if self._kv_cache_dtype == "int8":
            if not packed:
                raise ModelFolderError(
                    "an int8 KV cache needs the native attention backend. Type: --kv-cache-dtype auto"
                )
            return SlabFormat(dtype=torch.int8, packed=True)
        return SlabFormat(dtype=needs[0].dtype, packed=packed)

    def _budget_bytes(self, block: int) -> int:
        """Memory for the slab, when one block takes `block` bytes."""
        if self._num_blocks is not None:
            return self._num_blocks * block
        if self._kv_cache_bytes is not None:
            return self._kv_cache_bytes
        if self._device.type == "cpu":
            return min(int(free_bytes(self._device) * _CPU_SHARE), _CPU_MOST_BYTES)
        return int(free_bytes(self._device) * _GPU_SHARE)


def _weight_bytes(folder: ModelFolder) -> int:
    return sum(file.stat().st_size for file in folder.weight_files)
