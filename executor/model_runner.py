"""The runner that computes: a plan to tensors, through the model, to tokens. Walks the stops; decides nothing.

Importing this module imports torch. Import it, and call everything in it, from the one compute thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from common import failpoints
from common.errors import ModelFolderError
from common.model_folder import read_model_folder
from common.step import ExecutorFacts, Ranked, Scored, StepPlan, StepResult
from common.types import slot_of
from executor.attention import choose
from executor.attention.protocol import AttentionBackend, LayerNeeds
from executor.batch import build_batch
from executor.controls import columns, edit, unready
from executor.determinism import class_of
from executor.devices import device_of
from executor.guide import Grammars
from executor.kv_cache import KvCache, SlabFormat, block_bytes, fit_slab, free_bytes
from executor.llama import LlamaModel
from executor.llama import why_not as why_not_fused
from executor.loading import Forward, Loaded, open_model, transformers_forward
from executor.native.library import INT4, INT8, native
from executor.ranking import prepare, rank_all, who_ranks
from executor.resident import Resident
from executor.runner import Done, Report
from executor.sampler import Choice, sample
from executor.scoring import score_prompts, score_sampled, who_asks
from executor.token_pool import TokenPool

_log = logging.getLogger(__name__)

_CPU_SHARE: Final = 0.5  # of the free memory: a machine has other work
_CPU_MOST_BYTES: Final = 4 << 30
_GPU_SHARE: Final = 0.85  # the rest is for activations
_CPU_STEP_TOKENS: Final = 256  # a fifth of a second: what the other streams wait while a long prompt is read
_GPU_STEP_TOKENS: Final = 8192
_WEIGHT_KINDS: Final = {"auto": None, "int8": INT8, "int4": INT4}


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
    ) -> None:
        """Take the settings; nothing is read before `load`.

        `dtype` is auto, float32, bfloat16 or float16. `num_blocks` wins over `kv_cache_bytes`; without either the size
        is found from the free memory. Without `max_model_len` it is the model's, or less where the memory is less.
        `weights` is auto (as they are), int8 or int4; `kv_cache_dtype` auto (as the activations) or int8.
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

    def load(self, report: Report) -> ExecutorFacts:
        """Read the model, check that it can be served, take the KV slab, and run once to warm up.

        Raises ModelFolderError when the folder or the settings do not allow it.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        folder = read_model_folder(self._model_folder)
        grammars = Grammars.of(folder)
        report("weights", 0, 1)
        loaded = open_model(
            folder,
            dtype=self._dtype,
            device=self._device,
            attention=self._attention_backend,
            kind=_WEIGHT_KINDS[self._weights],
            block_size=self._block_size,
        )
        report("weights", 1, 1)

        needs = loaded.needs
        backends = choose(needs, self._attention_backend)
        slab = self._slab_format(needs, backends)
        longest = min(filter(None, [folder.max_model_len, loaded.longest]))
        shapes = [layer.shape for layer in needs]
        num_blocks, max_model_len = fit_slab(
            shapes,
            block_size=self._block_size,
            format=slab,
            budget_bytes=self._budget_bytes(block_bytes(shapes, self._block_size, slab)),
            max_sequences=self._max_sequences,
            longest=longest,
            max_model_len=self._max_model_len,
        )
        report("KV cache", 0, 1)
        self._cache = KvCache(
            shapes,
            num_blocks=num_blocks,
            block_size=self._block_size,
            format=slab,
            device=self._device,
        )
        self._model = self._fast_model(loaded, backends, max_model_len)
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
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            device=self._device.type,
            determinism=class_of(
                self._model,
                folder,
                loaded_as=f"{type(loaded.model).__name__} {loaded.model.dtype}",
                weights=self._weights,
                slab=slab,
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

    def idle(self) -> bool:
        """Nothing is left for idle moments."""
        return False

    def launch(self, plan: StepPlan) -> Done:
        """Run one step to its end. Raises PlanError when the plan does not fit what is resident."""
        started_ns = time.perf_counter_ns()
        rows = self._resident.apply(plan)
        self._pool.admit(slot_of(sequence.ref) for sequence in plan.new)
        if plan.told_refs:
            self._pool.put(self._resident.told_places(plan), plan.told_tokens)
        if plan.copies:
            failpoints.hit("before_block_copy")
        self._cache.copy_blocks(plan.copies)
        chosen = Choice(tokens=[], failed=[])
        scored: list[Scored] = []
        waiting: list[int] = []
        ranked: list[Ranked] = []
        if len(rows.slots):
            batch = build_batch(self._resident, rows)
            logits = self._model.forward(batch, self._pool.take(batch.token_places))
            if failpoints.hit("after_forward_before_sample") == "nan":
                logits = torch.full_like(logits, torch.nan)
            values = logits[: len(batch.sampled_slots)].float().cpu().numpy()
            waiting = unready(self._resident, batch.sampled_slots, len(rows.slots))
            asking = who_asks(self._resident, batch.sampled_slots)
            # a copy: what is asked for is of the model's own logits
            raw = values[[each.row for each in asking]] if asking else values
            ranking = who_ranks(self._resident, batch.sampled_slots, waiting)
            finite = prepare(values, ranking)
            edit(values, self._resident, batch.sampled_slots, waiting)
            chosen = sample(values, columns(self._resident, batch.sampled_slots, batch.sampled_indices))
            ranked, chosen = rank_all(values, ranking, finite, chosen)
            if asking:
                scored = score_sampled(asking, raw, chosen.or_none(waiting))
            if len(batch.scored_slots):
                scored += score_prompts(
                    logits[len(batch.sampled_slots) :], self._resident, batch.scored_slots, batch.scored_positions
                )
            self._pool.put(batch.sampled_places, chosen.tokens)
        sampled = self._resident.advance(rows, chosen.tokens, chosen.failed, waiting)
        return Done(
            StepResult(
                step=plan.step,
                refs=sampled.refs,
                tokens=sampled.tokens,
                indices=sampled.indices,
                failed=sampled.failed,
                unready=sampled.unready,
                compute_ns=time.perf_counter_ns() - started_ns,
                scored=scored,
                ranked=ranked,
            )
        )

    def _fast_model(self, loaded: Loaded, backends: list[AttentionBackend], max_model_len: int) -> Forward:
        """The fastest forward that serves this model."""
        kind = _WEIGHT_KINDS[self._weights]
        reason = why_not_fused(loaded.model, kind)
        if reason is None and not all(backend.packed for backend in backends):
            reason = "its attention is not native"
        if reason is not None:
            _log.info("forward: Transformers' own (not fused: %s)", reason)
            return transformers_forward(loaded, self._cache, backends, kind)
        _log.info("forward: fused (%s, %d threads)", native().isa, native().num_threads)
        return LlamaModel(
            native(), loaded.model, self._cache, loaded.needs, max_positions=max_model_len, kind=kind
        )  # fmt: skip

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
