"""The Llama family's forward on a GPU: seven to eleven kernels a layer, from the weights of the model as it was loaded.

What executor/llama.py is on a CPU, over a slab of rows. Between the kernels nothing is read back to the host and no
memory is taken, so that a step of decode rows can be captured as a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, nn

from executor.attention.protocol import LayerNeeds
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.gpu.triton_case import why_not as why_not_triton
from executor.kv_cache import KvCache, LayerCache
from executor.llama import forget, is_of_the_family, rotary_tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from executor.llama_folder import FolderLlama

_log = logging.getLogger(__name__)

_DTYPES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
_MEASURED: Final = (9, 0)  # compute capability from which on our products were held against torch's
_MOST_DISTANCE: Final = {torch.float32: 1e-2}  # of logits, to the largest of them: what ways to round add up to
_MOST_DISTANCE_HALF: Final = 0.1
_ALIGNMENT: Final = 128  # tokens: so many rows of any width end at a multiple of 256 bytes


class Linear(Protocol):
    """The product with one matrix: of rows (T, inputs), to rows (T, outputs)."""

    @property
    def own_rows(self) -> frozenset[int]:
        """For how many rows it is a kernel of our own: for each of these, down to the next smaller one."""
        ...

    def __call__(self, x: Tensor, out: Tensor) -> object:
        """Write x @ weight.T + bias to `out`."""

    def normed(self, x: Tensor, residual: Tensor, norm: Tensor, epsilon: float, *, room: Tensor, out: Tensor) -> object:
        """Add the product to `residual` (T, outputs), and write the RMS norm of the sum, times `norm`, to `out`.

        `room` (T, outputs) is for what is added.
        """

    def fused(
        self, x: Tensor, out: Tensor, *, norm: Tensor | None = None, epsilon: float = 0.0, adds: bool = False
    ) -> object:
        """The product of one row, RMS-normed where there is a `norm` (inputs,). May add to `out`. It is our own."""

    def give_up(self, rows: int) -> None:
        """Leave these of `own_rows` to torch from now on."""


class MatmulLinear:
    """torch's own product."""

    own_rows: frozenset[int] = frozenset()

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (outputs, inputs) and `bias` (outputs,), of one dtype and on one device."""
        self._weight, self._bias = weight.t(), bias

    def __call__(self, x: Tensor, out: Tensor) -> object:
        """Write x @ weight.T + bias to `out`."""
        if self._bias is None:
            return torch.mm(x, self._weight, out=out)
        return torch.addmm(self._bias, x, self._weight, out=out)

    def normed(self, x: Tensor, residual: Tensor, norm: Tensor, epsilon: float, *, room: Tensor, out: Tensor) -> object:
        """Norm by a kernel of its own."""
        from executor.gpu.kernels.norm import add_rms_norm

        self(x, room)
        return add_rms_norm(room, residual, norm, epsilon, out=out)

    def fused(
        self, x: Tensor, out: Tensor, *, norm: Tensor | None = None, epsilon: float = 0.0, adds: bool = False
    ) -> object:
        """Of no rows at all."""
        raise AssertionError("torch's product has nothing inside: `own_rows` is empty")

    def give_up(self, rows: int) -> None:
        """There is nothing to give up."""


def linears_for(device: torch.device) -> Callable[[Tensor, Tensor | None], Linear]:
    """What makes the products on `device`: our own for few rows on Hopper and later, where it was measured."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _MEASURED:
        return MatmulLinear
    from executor.gpu.kernels.skinny import SkinnyLinears

    return SkinnyLinears(device).make


def why_not(model: PreTrainedModel | FolderLlama) -> str | None:
    """Return why this model cannot take the fused forward on its device, or None when it can."""
    if not is_of_the_family(model):
        return f"{type(model).__name__} is not of the Llama family"
    if model.dtype not in _DTYPES:
        return str(model.dtype)
    if model.config.hidden_act != "silu":
        return f"activation {model.config.hidden_act}"
    return why_not_triton(model.device)


def scratch_bytes(model: PreTrainedModel | FolderLlama, max_tokens: int) -> int:
    """Bytes that `GpuLlama` takes for what lies between its kernels, when a step has at most `max_tokens` tokens."""
    return _aligned(max_tokens) * _Widths.of(model).a_token * model.dtype.itemsize


class GpuLlama:
    """A model of the family over a KV slab. Takes the weights: the model that it is made of cannot run afterwards.

    What it takes beside them is fixed: `scratch_bytes`, and the logits of `max_rows` rows.
    """

    def __init__(
        self,
        model: PreTrainedModel | FolderLlama,
        cache: KvCache,
        needs: Sequence[LayerNeeds],
        *,
        max_positions: int,
        max_rows: int,
        max_tokens: int,
        linear: Callable[[Tensor, Tensor | None], Linear] | None = None,
        report: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Bring the weights to the slab's device, a layer at a time, those of one input merged.

        A step has at most `max_tokens` tokens and `max_rows` rows, at positions below `max_positions`. `linear` makes
        the product with a weight and a bias, where it is not `linears_for` the device; `report` is told how many of the
        layers are done.
        """
        from executor.attention.triton import Workspace

        body: Any = model.model
        lm_head: Any = model.lm_head
        self._device = cache.layers[0].keys.device
        self._cache = cache  # its tensors may still be exchanged for larger ones, until a graph is captured
        self._linear = linear or linears_for(self._device)
        self._epsilon = float(model.config.rms_norm_eps)
        self._widths = _Widths.of(model)
        self._embedding = self._bring(body.embed_tokens.weight)
        cos_sin = torch.cat(rotary_tables(body.rotary_emb, max_positions, self._device), dim=1)
        norms = [self._bring(layer.input_layernorm.weight) for layer in body.layers] + [self._bring(body.norm.weight)]
        self._first_norm = norms[0]
        self._layers: list[_Layer] = []
        for index, layer in enumerate(body.layers):
            rotary = cos_sin if getattr(layer.self_attn, "use_rope", True) else None
            self._layers.append(self._layer(layer, norms[index + 1], rotary, needs[index].window))
            forget(layer)  # a copy of the weights at a time, not two of all
            report(index + 1, len(body.layers))
        tied = lm_head.weight.data_ptr() == body.embed_tokens.weight.data_ptr()
        head = self._embedding if tied else self._bring(lm_head.weight)
        self._head = self._linear(head, None if lm_head.bias is None else self._bring(lm_head.bias))
        self._fuses_one = all(1 in each.own_rows for each in self._linears())
        self._logits = head.new_empty(max_rows, len(head))
        self._scratch = _Scratch.take(self._widths, max_tokens, self._embedding)
        self._workspace = Workspace([layer.shape for layer in needs], max_rows=max_rows, device=self._device)
        self.hidden: Tensor | None = None  # (E, hidden) of the rows of a step that embed

    def check_products(self, tables: DeviceTables) -> None:
        """Hold steps of few rows, where products may be our own, against one of more, where they are torch's.

        Where they disagree, torch does those of so many rows from then on, and the log says so: a compiler for a GPU
        that nobody tried may make of a kernel what no test has seen. Before any step: `tables` are of nobody, the
        slab's first block is overwritten, and the device is waited for.
        """
        own_rows = sorted(frozenset[int]().union(*(linear.own_rows for linear in self._linears())))
        if not own_rows:
            return
        several = own_rows[-1] + 1
        tokens = tables.token_ids.view(-1)[:several]
        tokens.copy_(torch.arange(len(tokens), device=self._device) % len(self._embedding))  # no two rows alike
        self.forward(_nobody(1, self._device, len(tokens), stored=True), tables)  # what all of them attend to
        *ours, theirs = (
            self.forward(_nobody(rows, self._device, len(tokens)), tables).float().clone()
            for rows in (*own_rows, several)
        )
        tokens.zero_()
        most = _MOST_DISTANCE.get(self._logits.dtype, _MOST_DISTANCE_HALF)
        for rows, found in zip(own_rows, ours, strict=True):
            wanted = theirs[:rows]
            sound = wanted.isfinite().all(1)  # a token may be embedded as zeros, which no norm survives
            distance = float((found - wanted)[sound].abs().max() / wanted[sound].abs().max()) if sound.any() else 0.0
            if not distance <= most:  # NaN, too
                _log.warning(
                    "our own products of up to %d rows are off by %.2g on this device: torch does them", rows, distance
                )
                for linear in self._linears():
                    linear.give_up(rows)
        self._fuses_one = all(1 in each.own_rows for each in self._linears())

    def forward(self, inputs: StepInputs, tables: DeviceTables, embedded_rows: Tensor | None = None) -> Tensor:
        """Compute every token of the step; return logits (S + P, vocab_size) in the model's dtype.

        They are void at the next call. Up to `max_rows` of them lie always at the same address; more, where a prompt is
        scored, in memory of their own. `hidden` is what those of `embedded_rows` (E,) int64 are made of.
        """
        num_logits = len(inputs.logits_indices)
        if num_logits > len(self._logits):
            logits = self._logits.new_empty(num_logits, self._logits.shape[1])
        else:
            logits = self._logits[:num_logits]
        with torch.inference_mode():
            self._compute(inputs, tables, logits, embedded_rows)
        return logits

    def _compute(
        self, inputs: StepInputs, tables: DeviceTables, logits: Tensor, embedded_rows: Tensor | None = None
    ) -> None:
        from executor.gpu.kernels.embedding import embed
        from executor.gpu.kernels.norm import rms_norm

        num_tokens, room = len(inputs.token_places), len(self._scratch.residual)
        assert num_tokens <= room, f"{num_tokens} tokens in memory for {room}"
        rows = self._scratch.first(num_tokens)
        embed(tables.token_ids, inputs.token_places, self._embedding, rows.residual)
        if not self._fuses(rows):
            rms_norm(rows.residual, self._first_norm, self._epsilon, out=rows.normed)
        *others, (last, cache) = zip(self._layers, self._cache.layers, strict=True)
        norm = self._first_norm
        for layer, layer_cache in others:
            self._store(layer, norm, layer_cache, rows, inputs)
            self._attend(layer, layer_cache, rows, inputs, tables)
            self._project(layer, rows)
            norm = layer.next_norm
        self._store(last, norm, cache, rows, inputs)
        if len(logits):  # else a part of a prompt: what is stored is all that is wanted of it
            self._attend(last, cache, rows, inputs, tables)
            rows = rows.pick(inputs.logits_indices)
            self._project(last, rows)
            self._multiply(self._head, last.next_norm, rows, logits)
            if embedded_rows is not None:
                self.hidden = rms_norm(rows.residual[embedded_rows], last.next_norm, self._epsilon)

    def _store(self, layer: _Layer, norm: Tensor, cache: LayerCache, rows: _Scratch, inputs: StepInputs) -> None:
        """From the residual, or what is normed of it, to the query, and to K and V in the slab."""
        from executor.gpu.kernels.rotary import rope_and_store

        self._multiply(layer.qkv, norm, rows, rows.qkv)
        rope_and_store(
            rows.qkv,
            inputs.positions,
            layer.cos_sin,
            inputs.slot_mapping,
            cache.keys,
            cache.values,
            num_heads=self._widths.num_heads,
            num_kv_heads=self._widths.num_kv_heads,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            epsilon=self._epsilon,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
            out_query=self._by_heads(rows.query),
        )

    def _attend(
        self, layer: _Layer, cache: LayerCache, rows: _Scratch, inputs: StepInputs, tables: DeviceTables
    ) -> None:
        """From the query and the slab to what is attended."""
        from executor.attention.triton import attend_stored

        attend_stored(
            self._by_heads(rows.query),
            cache,
            inputs,
            tables.block_tables,
            scale=layer.scale,
            window=layer.window,
            out=self._by_heads(rows.attended),
            workspace=self._workspace,
        )

    def _project(self, layer: _Layer, rows: _Scratch) -> None:
        """From what is attended through the MLP to what the next layer, or the last product, is given."""
        from executor.gpu.kernels.activation import silu_mul

        self._close(layer.o, rows.attended, layer.mlp_norm, rows)
        self._multiply(layer.gate_up, layer.mlp_norm, rows, rows.gate_up)
        silu_mul(rows.gate_up, out=rows.middle)
        self._close(layer.down, rows.middle, layer.next_norm, rows)

    def _close(self, linear: Linear, x: Tensor, norm: Tensor, rows: _Scratch) -> None:
        """Add the product of x to the residual, and norm it; where products fuse, the next one norms what it reads."""
        if self._fuses(rows):
            linear.fused(x, rows.residual, adds=True)
        else:
            linear.normed(x, rows.residual, norm, self._epsilon, room=rows.x, out=rows.normed)

    def _multiply(self, linear: Linear, norm: Tensor, rows: _Scratch, out: Tensor) -> None:
        """The product of the normed residual."""
        if self._fuses(rows):
            linear.fused(rows.residual, out, norm=norm, epsilon=self._epsilon)
        else:
            linear(rows.normed, out)

    def _fuses(self, rows: _Scratch) -> bool:
        """Whether the products do norms and additions, too: `normed` and `x` are not written then."""
        return self._fuses_one and len(rows.residual) == 1

    def _linears(self) -> list[Linear]:
        return [*(each for layer in self._layers for each in layer.linears), self._head]

    def _by_heads(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self._widths.num_heads, self._widths.head_dim)

    def _layer(self, layer: Any, next_norm: Tensor, cos_sin: Tensor | None, window: int | None) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return _Layer(
            qkv=self._merge([attention.q_proj, attention.k_proj, attention.v_proj]),
            o=self._merge([attention.o_proj]),
            gate_up=self._merge([mlp.gate_proj, mlp.up_proj]),
            down=self._merge([mlp.down_proj]),
            mlp_norm=self._bring(layer.post_attention_layernorm.weight),
            next_norm=next_norm,
            q_norm=None if q_norm is None else self._bring(q_norm.weight),
            k_norm=None if k_norm is None else self._bring(k_norm.weight),
            cos_sin=cos_sin,
            scale=float(attention.scaling),
            window=window,
        )

    def _merge(self, layers: list[nn.Linear]) -> Linear:
        """One product for layers of one input."""
        if len(layers) == 1:
            weight, bias = self._bring(layers[0].weight), layers[0].bias
            return self._linear(weight, None if bias is None else self._bring(bias))
        outputs = [len(each.weight) for each in layers]
        first = layers[0].weight
        weight = torch.empty(sum(outputs), first.shape[1], dtype=first.dtype, device=self._device)
        merged_bias = None
        if any(each.bias is not None for each in layers):
            merged_bias = torch.zeros(sum(outputs), dtype=first.dtype, device=self._device)
        for begin, each in zip(_starts(outputs), layers, strict=True):
            weight[begin : begin + len(each.weight)].copy_(each.weight.detach())
            if merged_bias is not None and each.bias is not None:
                merged_bias[begin : begin + len(each.weight)].copy_(each.bias.detach())
        return self._linear(weight, merged_bias)

    def _bring(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    mlp_norm: Tensor  # (hidden,) before the MLP
    next_norm: Tensor  # (hidden,) after it: that of the next layer's attention, or the last of all
    q_norm: Tensor | None  # (head_dim,)
    k_norm: Tensor | None
    cos_sin: Tensor | None  # (max_positions, rotary_dim) float32; None in a layer without positions
    scale: float
    window: int | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class _Widths:
    """How many numbers a token has at each place between the kernels."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel | FolderLlama) -> _Widths:
        config = model.config
        num_heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        )

    @property
    def in_attention(self) -> dict[str, int]:
        heads = self.num_heads * self.head_dim
        return {"qkv": heads + 2 * self.num_kv_heads * self.head_dim, "query": heads, "attended": heads}

    @property
    def in_mlp(self) -> dict[str, int]:
        return {"gate_up": 2 * self.intermediate, "middle": self.intermediate}

    @property
    def a_token(self) -> int:
        return 3 * self.hidden + max(sum(self.in_attention.values()), sum(self.in_mlp.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scratch:
    """What lies between the kernels, one row a token. Taken once, so that a graph finds it where it was.

    What attention writes and what the MLP writes lie at one place: neither is read once the other one begins, but what
    was attended, which is read by the product before.
    """

    residual: Tensor  # (T, hidden)
    x: Tensor  # (T, hidden) to be added to it
    normed: Tensor  # (T, hidden)
    qkv: Tensor  # (T, (num_heads + 2 * num_kv_heads) * head_dim)
    query: Tensor  # (T, num_heads * head_dim)
    attended: Tensor  # (T, num_heads * head_dim)
    gate_up: Tensor  # (T, 2 * intermediate)
    middle: Tensor  # (T, intermediate)

    @classmethod
    def take(cls, widths: _Widths, max_tokens: int, like: Tensor) -> _Scratch:
        rows = _aligned(max_tokens)
        flat = like.new_empty(rows * widths.a_token)
        places: dict[str, Tensor] = {}
        everywhere = dict.fromkeys(("residual", "x", "normed"), widths.hidden)
        for parts in ({**everywhere, **widths.in_attention}, {**everywhere, **widths.in_mlp}):
            for begin, (name, width) in zip(_starts(parts.values()), parts.items(), strict=True):
                places[name] = flat[rows * begin : rows * (begin + width)].view(rows, width)
        return cls(**places)

    def first(self, num_tokens: int) -> _Scratch:
        """The rows of so many tokens."""
        return _Scratch(**{field.name: getattr(self, field.name)[:num_tokens] for field in fields(self)})

    def pick(self, indices: Tensor) -> _Scratch:
        """The rows `indices` (R,) of what is attended and of the residual, and room for R rows of all the rest.

        They go where nothing is read any more: to the query's place, and to that of what was normed; that moves to the
        old residual's.
        """
        assert len(indices) <= len(self.query), f"{len(indices)} rows of {len(self.query)}"
        rows = self.first(len(indices))
        torch.index_select(self.attended, 0, indices, out=rows.query)
        torch.index_select(self.residual, 0, indices, out=rows.normed)
        return replace(rows, attended=rows.query, residual=rows.normed, normed=rows.residual)


def _nobody(rows: int, device: torch.device, num_tokens: int, *, stored: bool = False) -> StepInputs:
    """So many prompts of one token each, the first ones of the pool's `num_tokens`, over and over.

    Each attends to the first slot of the slab alone. Nothing is stored, or there.
    """
    zeros, ones = (
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.ones(rows, dtype=torch.int32, device=device),
    )
    order = torch.arange(rows + 1, dtype=torch.int32, device=device)
    return StepInputs(
        num_decodes=0, max_query_len=1, max_seq_len=1,
        token_places=order[:-1] % num_tokens, positions=zeros, slot_mapping=zeros if stored else zeros - 1,
        query_start_loc=order, seq_lens=ones, table_rows=zeros,
        logits_indices=order[:-1], sampled_slots=zeros, sampled_places=zeros, sampled_indices=zeros,
    )  # fmt: skip


def _starts(widths: Iterable[int]) -> list[int]:
    """Where each part begins when they lie one after the other."""
    return list(accumulate(widths, initial=0))[:-1]


def _aligned(max_tokens: int) -> int:
    return -(-max_tokens // _ALIGNMENT) * _ALIGNMENT
