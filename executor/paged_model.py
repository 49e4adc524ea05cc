"""A Transformers model over a KV slab: one batch in, the logits of its sampled rows out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import ModelFolderError
from executor.attention.protocol import AttentionBackend, AttentionStep, LayerNeeds, LayerOptions
from executor.batch import InputBatch
from executor.kv_cache import KvCache, LayerShape
from executor.weights import PagedCalls, answering


class PagedModel:
    """The model, its slab and the attention backend of each layer."""

    def __init__(self, model: PreTrainedModel, cache: KvCache, backends: Sequence[AttentionBackend]) -> None:
        self._model = model
        self._cache = cache
        self._backends = backends
        self.hidden: Tensor | None = None  # (E, hidden) of the rows of a batch that embed

    def forward(self, batch: InputBatch, token_ids: Tensor) -> Tensor:
        """Compute every token of the batch; return logits (S, vocab_size) in the model's dtype.

        `token_ids` (T,) int64, on the model's device.
        """
        device = token_ids.device
        return self.forward_on_device(
            token_ids,
            torch.from_numpy(batch.positions).to(device),
            torch.from_numpy(batch.logits_indices).to(device),
            AttentionStep.of(batch, device),
            torch.from_numpy(batch.embedded_rows).to(device) if len(batch.embedded_rows) else None,
        )

    def forward_on_device(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logits_indices: Tensor,
        step: AttentionStep,
        embedded_rows: Tensor | None = None,
    ) -> Tensor:
        """The same for columns that are there already, all int64."""
        calls = _SlabCalls(self._cache, self._backends, step)
        if embedded_rows is None:
            return run(self._model, token_ids, positions, logits_indices, calls)
        with keeping_hidden(self._model) as states:
            logits = run(self._model, token_ids, positions, logits_indices, calls)
        self.hidden = states[0][logits_indices[embedded_rows]]
        return logits


class _SlabCalls:
    """One step's attention calls, answered from the slab."""

    def __init__(self, cache: KvCache, backends: Sequence[AttentionBackend], step: AttentionStep) -> None:
        self._cache = cache
        self._backends = backends
        self._step = step

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Tensor:
        return self._backends[layer].attend(query, key, value, self._cache.layers[layer], self._step, options)


class _Probe:
    """Answers the calls of a forward over one token, and notes what each layer asks for."""

    def __init__(self) -> None:
        self.needs: dict[int, LayerNeeds] = {}
        self.num_calls = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Tensor:
        self.num_calls += 1
        self.needs[layer] = LayerNeeds(
            shape=LayerShape(
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                key_dim=key.shape[2],
                value_dim=value.shape[2],
            ),
            dtype=key.dtype,
            device=key.device,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks is not None,
        )
        return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # one token attends to itself


def run(
    model: PreTrainedModel, token_ids: Tensor, positions: Tensor, logits_indices: Tensor, calls: PagedCalls
) -> Tensor:
    """Run the model over T tokens of any number of rows; return the logits (S, vocab_size) of `logits_indices` (S,)."""
    with torch.inference_mode(), answering(calls):
        out = model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logits_indices,
        )
    logits = out.logits[0]
    assert isinstance(logits, Tensor)
    return logits


@contextmanager
def keeping_hidden(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Keep what comes out of the model's body, behind its last norm: (T, hidden) of each forward that runs inside."""
    states: list[Tensor] = []

    def keep(_module: object, _inputs: object, out: Any) -> None:
        states.append(out[0][0])

    handle = model.base_model.register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def probe_layers(model: PreTrainedModel, vocab_size: int) -> list[LayerNeeds]:
    """Run one token through the model and return what each layer asks of its attention, in layer order.

    Raises ModelFolderError when the model does not call our attention exactly once a layer, or its logits are not those
    of `vocab_size` tokens.
    """
    probe = _Probe()
    one = torch.zeros(1, dtype=torch.int64, device=model.device)
    name, num_layers = type(model).__name__, model.config.get_text_config().num_hidden_layers
    try:
        logits = run(model, one, one, one, probe)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelFolderError(f"{name} cannot be run one step at a time: {error}") from error
    if probe.num_calls != num_layers or sorted(probe.needs) != list(range(num_layers)):
        raise ModelFolderError(
            f"{name} has {num_layers} layers and called paged attention {probe.num_calls} times, for layers "
            f"{sorted(probe.needs)}: its attention is of a kind that is not served"
        )
    if logits.shape != (1, vocab_size):
        raise ModelFolderError(f"{name} gives logits of shape {tuple(logits.shape)} for a vocabulary of {vocab_size}")
    return [probe.needs[layer] for layer in range(num_layers)]
