"""Stage 1: every kernel against float64, with everything it must not read or write full of NaN."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from executor.attention.protocol import AttentionBackend, LayerNeeds, LayerOptions
from executor.attention.reference import attend_one
from executor.gpu.inputs import DeviceTables, StepInputs
from executor.kv_cache import KvCache, LayerCache, LayerShape, SlabFormat
from executor.sampler import SamplingColumns, keep
from executor.sampler import sample as sample_on_host
from tests.gpu.check.flashinfer import served_by_flashinfer
from tests.gpu.check.layouts import GREEDY, HowSampled, Layout, attention_step, layout
from tests.gpu.check.parts import Check, Found, Part, Skipped

TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""Of the largest number of the answer: a few roundings of each type, and far less than any mistake makes."""

FP8: Final = torch.float8_e4m3fn
_FP8_STEP: Final = 0.0625 + 0.01  # half a step of 4 bits, and what the kernels' own roundings add
_THREADS: Final = 12


def parts(check: Check) -> list[Part]:
    """All of them."""
    checks: dict[str, Callable[[Check], Found]] = {
        **{f"attention {_name(dtype)}": partial(attention, dtype=dtype) for dtype in TOLERANCE},
        "attention backend": backend,
        "attention backend flashinfer": partial(flashinfer, names=_FLASHINFER),
        "attention backend flashinfer, window or cap": partial(flashinfer, names=_FLASHINFER_VARIANTS),
        "attention over fp8": partial(attention, dtype=torch.bfloat16, slab=FP8),
        **{f"rope_and_store {_name(dtype)}": partial(rope_and_store, dtype=dtype) for dtype in TOLERANCE},
        "rope_and_store to fp8": partial(rope_and_store, dtype=torch.bfloat16, slab=FP8),
        **{f"norms {_name(dtype)}": partial(norms, dtype=dtype) for dtype in TOLERANCE},
        **{f"silu_mul {_name(dtype)}": partial(silu_mul, dtype=dtype) for dtype in TOLERANCE},
        "sampling greedy": greedy,
        "sampling cuts": cuts,
        "sampling distribution": distribution,
    }
    every = [Part(name=name, work=work, takes_s=3, limit_s=120) for name, work in checks.items()]
    if check.fake:
        return every
    works = [work for name, work in checks.items() if not name.startswith("attention")]
    works += [
        partial(attention, dtype=dtype, slab=slab, only=name)
        for dtype, slab in [*((dtype, dtype) for dtype in TOLERANCE), (torch.bfloat16, FP8)]
        for name in _cases(check, slab)
    ]
    return [Part(name="compile", work=partial(compile_all, works=[*works, backend]), limit_s=120), *every]


def compile_all(check: Check, works: Sequence[Callable[[Check], Found]]) -> Found:
    """Run all of the others once, in threads: they compile beside each other. What fails is told by the part itself."""

    def quietly(work: Callable[[Check], Found]) -> None:
        with contextlib.suppress(Exception):
            work(check)

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(quietly, works))
    return Found(lines=[f"compiled in {_THREADS} threads"])


# ---- attention


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """One step through one layer."""

    rows: Sequence[tuple[int, int]]
    heads: int = 16
    kv_heads: int = 8
    dim: int = 128
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    padding: int = 0


_DECODES: Final = [(0, 1), (15, 1), (16, 1), (130, 1), (511, 1), (1999, 1), (4096, 1), (4100, 1)]
_MIXED: Final = [(7, 1), (1300, 1), (0, 5), (0, 200), (100, 64), (513, 31), (0, 16), (1000, 300)]
ATTENTION: Final = {
    "decode, groups of 2": AttentionCase(rows=_DECODES),
    "decode, groups of 4, padding": AttentionCase(rows=_DECODES, heads=32, padding=5),
    "decode, 200 rows": AttentionCase(rows=[(3 * n, 1) for n in range(200)], heads=32),
    "decode, one head": AttentionCase(rows=_DECODES, heads=1, kv_heads=1, dim=64),
    "decode, groups of 7": AttentionCase(rows=_DECODES, heads=14, kv_heads=2, dim=64, block_size=32),
    "decode, window, cap": AttentionCase(rows=_DECODES, window=100, softcap=30.0),
    "decode, sinks": AttentionCase(rows=_DECODES, heads=64, dim=64, sinks=True),
    "mixed, groups of 2": AttentionCase(rows=_MIXED),
    "mixed, groups of 4": AttentionCase(rows=_MIXED, heads=32, block_size=32),
    "mixed, groups of 3, window": AttentionCase(rows=_MIXED, heads=9, kv_heads=3, dim=64, window=70),
    "mixed, cap, sinks": AttentionCase(rows=_MIXED, softcap=20.0, sinks=True),
    "mixed, window": AttentionCase(rows=_MIXED, window=100),
    "mixed, cap": AttentionCase(rows=_MIXED, softcap=20.0),
    "prompt": AttentionCase(rows=[(0, 1500)], heads=32),
}
TINY_ATTENTION: Final = {
    "decode": AttentionCase(rows=[(0, 1), (20, 1)], heads=4, kv_heads=2, dim=16, padding=1),
    "mixed": AttentionCase(rows=[(17, 1), (3, 6)], heads=2, kv_heads=1, dim=16, window=9, softcap=20.0, sinks=True),
}
TINY_FLASHINFER: Final = {  # it serves no smaller heads, and no sinks
    "decode": AttentionCase(rows=[(0, 1), (20, 1)], heads=4, kv_heads=2, dim=64),
    "mixed": AttentionCase(rows=[(17, 1), (3, 6)], heads=2, kv_heads=1, dim=64, window=9, softcap=20.0),
}


_FEW: Final = {  # in other types than the one that is served most
    torch.float32: ("decode, groups of 2", "decode, groups of 7", "mixed, groups of 2", "mixed, cap, sinks"),
    torch.float16: ("decode, groups of 2", "mixed, groups of 4"),
    FP8: ("decode, groups of 2", "decode, groups of 4, padding", "mixed, groups of 2", "mixed, cap, sinks", "prompt"),
}
_BACKEND: Final = ("decode, groups of 2", "mixed, groups of 3, window", "mixed, cap, sinks")
_FLASHINFER: Final = ("decode, groups of 2", "decode, 200 rows", "mixed, groups of 2", "mixed, groups of 4", "prompt")
_FLASHINFER_VARIANTS: Final = ("mixed, window", "mixed, cap")  # other kernels of its own, each of which is compiled


def _cases(check: Check, slab: torch.dtype) -> dict[str, AttentionCase]:
    if check.fake:
        return TINY_ATTENTION
    return {name: ATTENTION[name] for name in _FEW.get(slab, tuple(ATTENTION))}


def attention(check: Check, *, dtype: torch.dtype, slab: torch.dtype | None = None, only: str = "") -> Found:
    """attend_stored, as the fused forward calls it, over a slab of the same dtype or of another."""
    from executor.attention.triton import Workspace, attend_stored  # noqa: PLC0415 - imports triton

    errors = {}
    for name, case in _cases(check, slab or dtype).items():
        if only and name != only:
            continue
        prepared = _Attention(case, check.device, dtype, slab)
        out = torch.full_like(prepared.query, torch.nan)
        attend_stored(
            prepared.query,
            prepared.cache,
            prepared.layout.inputs,
            prepared.layout.tables.block_tables,
            scale=prepared.options.scale,
            window=case.window,
            softcap=case.softcap,
            sinks=prepared.options.sinks,
            out=out,
            workspace=Workspace([prepared.shape], max_rows=len(prepared.query), device=check.device),
        )
        errors[name] = _error(out[: prepared.num_tokens], prepared.expected())
    return _judged("attention" if slab is None else f"attention over {_name(slab)},", dtype, errors)


def backend(check: Check) -> Found:
    """The backend "triton" behind the protocol, which also stores: what every other architecture goes through."""
    from executor.attention.triton import TritonAttention  # noqa: PLC0415 - imports triton

    cases = {name: ATTENTION[name] for name in _BACKEND}
    if check.fake:
        cases = {name: case for name, case in TINY_ATTENTION.items() if not case.padding}
    return _through(check, TritonAttention(interpreted=check.fake), cases, (torch.float32, torch.bfloat16))


def flashinfer(check: Check, *, names: Sequence[str]) -> Found:
    """The backend "flashinfer", where it is installed."""
    served = served_by_flashinfer(check)
    cases = TINY_FLASHINFER if check.fake else {name: ATTENTION[name] for name in names}
    try:
        return _through(check, served, cases, (torch.bfloat16,))
    except RuntimeError as error:
        if type(error).__name__ == "MissingJITCacheError":
            raise Skipped("FlashInfer has no compiled kernel for it, and FLASHINFER_DISABLE_JIT is set") from error
        raise


def _through(
    check: Check, served: AttentionBackend, cases: Mapping[str, AttentionCase], dtypes: Sequence[torch.dtype]
) -> Found:
    """Store and attend as the protocol has it."""
    found = Found()
    for dtype in dtypes:
        errors = {}
        for name, case in cases.items():
            prepared = _Attention(case, check.device, dtype)
            reason = served.why_not(
                LayerNeeds(
                    shape=prepared.shape,
                    dtype=dtype,
                    device=check.device,
                    window=case.window,
                    softcap=case.softcap,
                    sinks=case.sinks,
                    block_size=case.block_size,
                )
            )
            if reason is not None:
                found.problems.append(f"{name}, {_name(dtype)}: not served: {reason}")
                continue
            key, value = prepared.take_back_the_new()
            step = attention_step(prepared.layout)
            out = served.attend(prepared.query, key, value, prepared.cache, step, prepared.options)
            errors[name] = _error(out, prepared.expected())
        judged = _judged(f"backend {served.name}", dtype, errors)
        found.values[_name(dtype)] = judged.values
        found.lines += judged.lines
        found.problems += judged.problems
    return found


class _Attention:
    """A case with its tensors. The slab holds NaN wherever no token lies."""

    def __init__(
        self, case: AttentionCase, device: torch.device, dtype: torch.dtype, slab: torch.dtype | None = None
    ) -> None:
        self._case = case
        self._device = device
        torch.manual_seed(1)
        self.shape = LayerShape(num_heads=case.heads, num_kv_heads=case.kv_heads, key_dim=case.dim, value_dim=case.dim)
        self.layout = layout(case.rows, device, block_size=case.block_size, padding=case.padding)
        self.num_tokens = sum(now for _, now in case.rows)
        self.query = torch.randn(self.num_tokens + case.padding, case.heads, case.dim, device=device).to(dtype)
        self.cache = poisoned(self.shape, self.layout.num_blocks, case.block_size, device, slab or dtype)
        self.options = LayerOptions(
            scale=case.dim**-0.5,
            window=case.window,
            softcap=case.softcap,
            sinks=torch.randn(case.heads, device=device).to(dtype) if case.sinks else None,
        )
        for row, (before, now) in enumerate(case.rows):
            blocks, offsets = self._places(row, torch.arange(before + now, device=device))
            for each in (self.cache.keys, self.cache.values):
                noise = torch.randn(before + now, case.kv_heads, case.dim, device=device)
                _bits(each)[blocks, :, offsets] = _bits(noise.to(each.dtype))
        self._keys, self._values = self.cache.keys.double(), self.cache.values.double()

    def expected(self) -> Tensor:
        """By the plainest of backends, in float64."""
        options = replace(self.options, sinks=None if self.options.sinks is None else self.options.sinks.double())
        out, first = [], 0
        for row, (before, now) in enumerate(self._case.rows):
            blocks, offsets = self._places(row, torch.arange(before + now, device=self._device))
            keys, values = self._keys[blocks, :, offsets], self._values[blocks, :, offsets]
            out.append(attend_one(self.query[first : first + now].double(), keys, values, options))
            first += now
        return torch.cat(out)

    def take_back_the_new(self) -> tuple[Tensor, Tensor]:
        """Cut this step's K and V (T, num_kv_heads, dim) out of the slab, as if they were not stored yet."""
        taken = []
        for row, (before, now) in enumerate(self._case.rows):
            blocks, offsets = self._places(row, torch.arange(before, before + now, device=self._device))
            taken.append((self.cache.keys[blocks, :, offsets], self.cache.values[blocks, :, offsets]))
            self.cache.keys[blocks, :, offsets] = torch.nan
            self.cache.values[blocks, :, offsets] = torch.nan
        return torch.cat([key for key, _ in taken]), torch.cat([value for _, value in taken])

    def _places(self, row: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        table = self.layout.tables.block_tables[row].long()
        return table[positions // self._case.block_size], positions % self._case.block_size


def poisoned(
    shape: LayerShape, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> LayerCache:
    """One layer's slab, full of NaN."""
    cache = KvCache(
        [shape], num_blocks=num_blocks, block_size=block_size, format=SlabFormat(dtype=dtype), device=device
    )
    for slab in (cache.layers[0].keys, cache.layers[0].values):
        _bits(slab).fill_(0x7F if dtype is FP8 else torch.nan)
    return cache.layers[0]


def _bits(numbers: Tensor) -> Tensor:
    """What torch can index: of numbers of 8 bits, the bits."""
    return numbers.view(torch.uint8) if numbers.dtype is FP8 else numbers


# ---- what is fused


def rope_and_store(check: Check, *, dtype: torch.dtype, slab: torch.dtype | None = None) -> Found:
    """Norm of each head, rotary embedding and the store, against the same in float64."""
    from executor.gpu.kernels.rotary import rope_and_store as ours  # noqa: PLC0415 - imports triton

    cases = {"Qwen3": (16, 8, 128, 128, True), "Llama": (32, 8, 128, 128, False), "partial": (8, 2, 64, 32, False)}
    if check.fake:
        cases = {"tiny": (4, 2, 16, 16, True), "partial": (2, 1, 16, 8, False)}
    rows = [(5, 1), (0, 1), (3, 6)] if check.fake else [(70, 1), (0, 1), (33, 100), (0, 64)]
    device, errors, problems = check.device, dict[str, float](), list[str]()
    for name, (heads, kv_heads, dim, rotary_dim, normed) in cases.items():
        step = layout(rows, device)
        tokens = len(step.inputs.positions)
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
        norms = [torch.rand(dim, device=device).to(dtype) + 0.5 if normed else None for _ in range(2)]
        angles = torch.outer(torch.arange(256).double(), 1e4 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim))
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).float().to(device)
        shape = LayerShape(num_heads=heads, num_kv_heads=kv_heads, key_dim=dim, value_dim=dim)
        cache = poisoned(shape, step.num_blocks, 16, device, slab or dtype)
        slots = step.inputs.slot_mapping.clone()
        slots[1] = -1  # as a padding row: nothing of it may be written
        query = torch.full((tokens, heads, dim), torch.nan, device=device).to(dtype)
        ours(
            qkv,
            step.inputs.positions,
            cos_sin,
            slots,
            cache.keys,
            cache.values,
            num_heads=heads,
            num_kv_heads=kv_heads,
            q_norm=norms[0],
            k_norm=norms[1],
            epsilon=1e-6,
            out_query=query,
        )
        each = qkv.double().view(tokens, -1, dim)
        q, k, v = each[:, :heads], each[:, heads : heads + kv_heads], each[:, heads + kv_heads :]
        turned = [
            _rotated(_normed(x, norm), cos_sin[step.inputs.positions.long()])
            for x, norm in ((q, norms[0]), (k, norms[1]))
        ]
        kept = slots >= 0
        places = (slots[kept].long() // 16, slots[kept].long() % 16)
        errors[f"{name}, query"] = _error(query, turned[0])
        keys, values = cache.keys.float(), cache.values.float()
        key_error = _error(keys[places[0], :, places[1]], turned[1][kept])
        if slab is None:
            errors[f"{name}, key"] = key_error
        elif not key_error <= _FP8_STEP:
            problems.append(f"{name}, key: off by {key_error:.2e}, {_FP8_STEP:.0e} are allowed")
        errors[f"{name}, value"] = _error(values[places[0], :, places[1]], v[kept].to(dtype).to(cache.values.dtype))
        written = int((~keys.isnan()).sum() + (~values.isnan()).sum())
        if written != 2 * int(kept.sum()) * kv_heads * dim:
            problems.append(f"{name}: {written} numbers were stored, not {2 * int(kept.sum()) * kv_heads * dim}")
    found = _judged("rope_and_store" if slab is None else f"rope_and_store to {_name(slab)},", dtype, errors)
    found.problems += problems
    return found


def norms(check: Check, *, dtype: torch.dtype) -> Found:
    """add_rms_norm and rms_norm."""
    from executor.gpu.kernels.norm import add_rms_norm, rms_norm  # noqa: PLC0415 - imports triton

    errors = {}
    for rows, width in [(3, 48)] if check.fake else [(1, 1024), (200, 4096), (33, 576), (7, 8192)]:
        x, residual = (torch.randn(rows, width, device=check.device).to(dtype) * 3 for _ in range(2))
        weight = torch.rand(width, device=check.device).to(dtype) + 0.5
        summed = (x.double() + residual.double()).to(dtype).double()
        out = torch.full_like(x, torch.nan)
        plain = torch.full_like(x, torch.nan)
        rms_norm(x, weight, 1e-6, offset=1.0, out=plain)
        errors[f"{rows} x {width}, plain"] = _error(plain, _normed(x.double(), weight.double() + 1))
        add_rms_norm(x, residual, weight, 1e-6, out=out)
        errors[f"{rows} x {width}, sum"] = _error(residual, summed)
        errors[f"{rows} x {width}, norm"] = _error(out, _normed(summed, weight))
    return _judged("norms", dtype, errors)


def silu_mul(check: Check, *, dtype: torch.dtype) -> Found:
    """The gated activation."""
    from executor.gpu.kernels.activation import silu_mul as ours  # noqa: PLC0415 - imports triton

    errors = {}
    for rows, width in [(3, 40)] if check.fake else [(1, 3072), (300, 14_336), (17, 1536)]:
        gate_up = torch.randn(rows, 2 * width, device=check.device).to(dtype) * 4
        gate, up = gate_up.double().chunk(2, dim=1)
        errors[f"{rows} x {width}"] = _error(ours(gate_up), torch.nn.functional.silu(gate) * up)
    return _judged("silu_mul", dtype, errors)


def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight.double()


def _rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """GPT-NeoX's way: number i turns with number i + rotary_dim / 2."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin.double()[:, None, :half], cos_sin.double()[:, None, half:]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


# ---- sampling


def greedy(check: Check) -> Found:
    """The largest logit, in every type; rows that are not finite are told, and nothing is written for them."""
    from executor.gpu.kernels.sampling import sample  # noqa: PLC0415 - imports triton

    found = Found()
    rows, vocabulary = (5, 300) if check.fake else (64, 151_936)
    for dtype in TOLERANCE:
        step = _sampled_step(rows, vocabulary, check.device, GREEDY)
        logits = torch.randn(rows, vocabulary, device=check.device).to(dtype)
        best = torch.randint(0, vocabulary, (rows,), device=check.device)
        logits[torch.arange(rows), best] = 9.0
        logits[1, vocabulary - 1], logits[2, 0] = torch.nan, torch.inf
        pool = step.tables.token_ids.clone()
        out = torch.full((rows,), -7, dtype=torch.int32, device=check.device)
        sample(logits, step.inputs, step.tables, out)
        expected = best.int()
        expected[1:3] = -1
        wrong = int((out != expected).sum())
        places = step.inputs.sampled_places.long()
        pool.view(-1)[places[expected >= 0]] = expected[expected >= 0]
        if wrong:
            found.problems.append(f"{_name(dtype)}: {wrong} of {rows} rows are wrong")
        if not torch.equal(pool, step.tables.token_ids):
            found.problems.append(f"{_name(dtype)}: the token pool holds something else")
        found.values[_name(dtype)] = {"rows": rows, "wrong": wrong}
    found.lines.append(f"sampling: the largest of {vocabulary:,} in {rows} rows")
    return found


def cuts(check: Check) -> Found:
    """No token outside of what is kept; the same token whatever the company."""
    from executor.gpu.kernels.sampling import sample  # noqa: PLC0415 - imports triton

    found = Found()
    rows, vocabulary = (2, 40) if check.fake else (128, 32_003)
    for name, how in {
        "temperature": HowSampled(temperature=0.6),
        "top_k": HowSampled(temperature=1.0, top_k=20),
        "top_p": HowSampled(temperature=0.8, top_p=0.7),
        "min_p": HowSampled(temperature=1.2, min_p=0.1),
        "all": HowSampled(temperature=0.9, top_k=50, top_p=0.9, min_p=0.02),
    }.items():
        step = _sampled_step(rows, vocabulary, check.device, how)
        logits = torch.randn(rows, vocabulary, device=check.device) * 3
        out = _sample(sample, logits, step)
        alone = replace(
            step.inputs,
            sampled_slots=step.inputs.sampled_slots[-1:],
            sampled_places=step.inputs.sampled_places[-1:],
            sampled_indices=step.inputs.sampled_indices[-1:],
            logits_indices=step.inputs.logits_indices[-1:],
        )
        again = _sample(sample, logits[-1:], replace(step, inputs=alone))
        host = logits.cpu().numpy()
        outside = 0
        for row, token in enumerate(out.tolist()):
            ids, weights = keep(
                host[row], temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p
            )
            kept = np.flatnonzero(weights) if ids is None else ids[weights > 0]
            outside += token not in kept
        agreeing = _agreeing(host, step, out.tolist())
        found.values[name] = {"rows": rows, "outside": outside, "as_on_the_host": agreeing}
        if outside > rows // 100:  # sums of another order may put the border one token further
            found.problems.append(f"{name}: {outside} of {rows} tokens are none that are kept")
        if out[-1] != again[0]:
            found.problems.append(f"{name}: a row's token depends on its company")
    found.lines.append(f"sampling: {rows} rows each way, none outside of what is kept")
    return found


def distribution(check: Check) -> Found:
    """How often each token comes, against how often it should: chi-square over its degrees of freedom, 1 if perfect."""
    from executor.gpu.kernels.sampling import sample  # noqa: PLC0415 - imports triton

    rows, vocabulary = (12, 8) if check.fake else (8192, 64)
    step = _sampled_step(rows, vocabulary, check.device, HowSampled(temperature=0.7))
    inputs = replace(
        step.inputs,
        sampled_slots=torch.zeros_like(step.inputs.sampled_slots),  # all of one seed
        sampled_indices=torch.arange(rows, dtype=torch.int32, device=check.device),
    )
    torch.manual_seed(5)
    one = torch.randn(vocabulary)
    out = _sample(sample, one.expand(rows, -1).contiguous().to(check.device), replace(step, inputs=inputs))
    chances = (one.double() / 0.7).softmax(dim=0)
    counts = torch.bincount(out.long().cpu(), minlength=vocabulary).double()
    spread = float(((counts - rows * chances) ** 2 / (rows * chances)).sum() / (vocabulary - 1))
    found = Found(
        values={"rows": rows, "chi_square_per_degree": round(spread, 3)},
        lines=[f"sampling: chi-square {spread:.2f} a degree of freedom over {rows} draws"],
    )
    if spread > (4.0 if check.fake else 1.8):
        found.problems.append(f"chi-square is {spread:.2f} a degree of freedom")
    return found


def _sampled_step(rows: int, vocabulary: int, device: torch.device, how: HowSampled) -> Layout:
    return layout([(3, 1)] * rows, device, vocab_size=vocabulary, how=how)


def _sample(sample: Callable[[Tensor, StepInputs, DeviceTables, Tensor], None], logits: Tensor, step: Layout) -> Tensor:
    out = torch.full((len(logits),), -7, dtype=torch.int32, device=logits.device)
    sample(logits, step.inputs, step.tables, out)
    return out


def _agreeing(logits: np.ndarray, step: Layout, tokens: Sequence[int]) -> float:
    """Share of tokens that the host's sampler chooses, too. Not asked for: the two draw in their own ways."""
    tables, slots = step.tables, step.inputs.sampled_slots.long()

    def column(values: Tensor, dtype: type) -> np.ndarray:
        return values[slots].cpu().numpy().astype(dtype)

    halves = tables.seed[slots].cpu().numpy().view(np.uint32).astype(np.uint64)
    columns = SamplingColumns(
        temperature=column(tables.temperature, np.float64),
        top_k=column(tables.top_k, np.int64),
        top_p=column(tables.top_p, np.float64),
        min_p=column(tables.min_p, np.float64),
        typical_p=np.ones(len(slots)),
        seed=halves[:, 0] | halves[:, 1] << np.uint64(32),
        choice=column(tables.choice, np.int64),
        index=step.inputs.sampled_indices.cpu().numpy().astype(np.int64),
    )
    chosen = sample_on_host(logits.copy(), columns).tokens
    return float(np.mean([ours == theirs for ours, theirs in zip(tokens, chosen, strict=True)]))


# ---- judging


def _error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number; NaN counts as infinite."""
    difference = (got.double() - expected.double()).abs().max()
    error = float(difference / expected.double().abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")  # noqa: PLR0124 - NaN


def _judged(what: str, dtype: torch.dtype, errors: dict[str, float]) -> Found:
    worst = max(errors, key=errors.__getitem__)
    found = Found(
        values={"max_relative_error": {name: float(f"{error:.3g}") for name, error in errors.items()}},
        lines=[f"{what} {_name(dtype)}: {errors[worst]:.1e} at most, of {len(errors)} cases ({worst})"],
    )
    found.problems += [
        f"{name}: off by {error:.2e}, {TOLERANCE[dtype]:.0e} are allowed"
        for name, error in errors.items()
        if not error <= TOLERANCE[dtype]
    ]
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
