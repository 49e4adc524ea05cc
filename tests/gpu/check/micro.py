"""Stage 4: each kernel's time at the sizes of serving, as a share of what the device can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from executor.attention.flashinfer import FlashInferAttention
from executor.attention.protocol import AttentionStep, LayerOptions
from executor.kv_cache import LayerCache, LayerShape
from tests.gpu.check.flashinfer import served_by_flashinfer
from tests.gpu.check.layouts import HowSampled, attention_step, layout, random_cache
from tests.gpu.check.parts import Aim, Check, Found, Part
from tests.gpu.check.shapes import LLAMA_3_8B, QWEN3_0_6B, TINY_QWEN3, Shape
from tests.gpu.check.timing import copies_beyond_cache, device_s, graph_s, launch_costs, quiet_host_s

ROWS: Final = (1, 64, 256)
CONTEXTS: Final = (512, 2048)
PROMPTS: Final = (2048, 8192)
_FP8: Final = torch.float8_e4m3fn
MEMORY_SHARE: Final = 0.75  # of the measured ceiling, for decode attention at 64 rows and more


def parts(check: Check) -> list[Part]:
    """All of them. The groups of query heads: 2 as in Qwen3-0.6B, 4 as in Llama-3-8B."""
    shapes = (TINY_QWEN3,) if check.fake else (QWEN3_0_6B, LLAMA_3_8B)
    groups = [(shape, f"groups of {shape.size.heads // shape.size.kv_heads}") for shape in shapes]
    return [
        *(Part(name=f"decode attention, {name}", work=partial(decode, shape=s), takes_s=6) for s, name in groups),
        *(
            Part(name=f"decode attention over fp8, {name}", work=partial(decode, shape=s, slab=_FP8), takes_s=6)
            for s, name in groups
        ),
        *(Part(name=f"prefill attention, {name}", work=partial(prefill, shape=s), takes_s=4) for s, name in groups),
        *(Part(name=f"FlashInfer, {name}", work=partial(flashinfer, shape=s), takes_s=8) for s, name in groups),
        Part(name="sampling", work=sampling, takes_s=5),
        *(Part(name=f"fused, {shape.name}", work=partial(fused, shape=shape), takes_s=3) for shape in shapes),
        *(
            Part(name=f"launching, {shape.name}", work=partial(launching, shape=shape), takes_s=2)
            for shape in shapes[:1]
        ),
        *(Part(name=f"matrices, {shape.name}", work=partial(matrices, shape=shape), takes_s=3) for shape in shapes),
    ]


def decode(check: Check, *, shape: Shape, slab: torch.dtype = torch.bfloat16) -> Found:
    """Rows of one token each, all with the same context, their blocks scattered."""
    from executor.attention.triton import Workspace, attend_stored  # noqa: PLC0415 - imports triton

    size, found = shape.size, Found()
    heads = _heads(shape)
    name_of = f"decode attention{' over fp8' if slab is _FP8 else ''}, groups of {heads.group_size}"
    for rows in (2,) if check.fake else ROWS:
        for context in (20,) if check.fake else CONTEXTS:
            step = layout([(context - 1, 1)] * rows, check.device, max_model_len=30 if check.fake else 4096)
            read = rows * context * 2 * slab.itemsize * size.kv_heads * size.head_dim
            copies = 1 if check.fake else copies_beyond_cache(read, most=32)
            cache = random_cache([heads] * copies, num_blocks=step.num_blocks, device=check.device, dtype=slab)
            query = torch.randn(rows, size.heads, size.head_dim, device=check.device).bfloat16()
            out = torch.empty_like(query)
            attend = partial(
                attend_stored,
                query,
                inputs=step.inputs,
                block_tables=step.tables.block_tables,
                scale=size.head_dim**-0.5,
                out=out,
                workspace=Workspace([heads], max_rows=rows, device=check.device),
            )
            seconds = graph_s([partial(attend, cache=layer) for layer in cache.layers], check.device)
            name = f"{rows} x {context}"
            share = read / seconds / check.bytes_per_s
            found.values[name] = {"us": _us(seconds), "gb_s": round(read / seconds / 1e9, 1), "share": round(share, 4)}
            if rows >= 64:
                what = f"{name_of}, {rows} x {context}: share of the memory rate"
                found.aims.append(Aim(what=what, measured=round(share, 3), bound=MEMORY_SHARE, at_most=False))
            del cache, attend
    told = ", ".join(f"{name} {each['share']:.0%}" for name, each in found.values.items())
    found.lines.append(f"{name_of}, share of the memory rate: {told}")
    return found


def prefill(check: Check, *, shape: Shape) -> Found:
    """One prompt, against torch's own attention over K and V that lie in one piece. Only visible pairs count."""
    from executor.attention.triton import Workspace, attend_stored  # noqa: PLC0415 - imports triton

    size, found = shape.size, Found()
    heads = _heads(shape)
    for tokens in (24,) if check.fake else PROMPTS:
        step = layout([(0, tokens)], check.device)
        flop = 4 * size.heads * size.head_dim * tokens * (tokens + 1) / 2
        cache = random_cache([heads] * 2, num_blocks=step.num_blocks, device=check.device)
        query = torch.randn(tokens, size.heads, size.head_dim, device=check.device).bfloat16()
        attend = partial(
            attend_stored,
            query,
            inputs=step.inputs,
            block_tables=step.tables.block_tables,
            scale=size.head_dim**-0.5,
            out=torch.empty_like(query),
            workspace=Workspace([heads], max_rows=1, device=check.device),
        )
        seconds = graph_s([partial(attend, cache=layer) for layer in cache.layers], check.device)
        values: dict[str, Any] = {"us": _us(seconds), "tflop_s": _tflop_s(flop, seconds)}
        values["share"] = round(flop / seconds / check.flop_per_s, 4)
        for name, other in _torchs_own(query, size.kv_heads).items():
            try:
                theirs = device_s(other, check.device)
            except RuntimeError as error:
                values[name] = f"not here: {str(error)[:120]}"
            else:
                values[name] = {"us": _us(theirs), "tflop_s": _tflop_s(flop, theirs)}
        found.values[str(tokens)] = values
        best = max((v["tflop_s"] for v in values.values() if isinstance(v, dict)), default=0.0)
        found.lines.append(
            f"prefill attention, groups of {heads.group_size}, {tokens} tokens: {values['tflop_s']:.0f} TFLOP/s, "
            f"torch's best {best:.0f}"
        )
    return found


def _torchs_own(query: Tensor, kv_heads: int) -> dict[str, Callable[[], object]]:
    """What torch has by name, over K and V without pages, a query head's own each where they want it so."""
    tokens, num_heads, dim = query.shape
    q = query.transpose(0, 1)[None].contiguous()
    k, v = torch.randn(2, 1, kv_heads, tokens, dim, device=query.device).to(query.dtype)
    wide = [x.repeat_interleave(num_heads // kv_heads, dim=1) for x in (k, v)]

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, wide[0], wide[1], is_causal=True)

    if query.device.type != "cuda":
        return {"math": partial(run, SDPBackend.MATH)}
    return {
        "flash": partial(run, SDPBackend.FLASH_ATTENTION),
        "cudnn": partial(run, SDPBackend.CUDNN_ATTENTION),
    }


def flashinfer(check: Check, *, shape: Shape) -> Found:
    """FlashInfer's kernels at the sizes of ours, in graphs as ours; and what a plan of theirs takes of the host."""
    heads, found = _heads(shape), Found()
    decodes = [
        (rows, context) for rows in ((2,) if check.fake else ROWS) for context in ((20,) if check.fake else CONTEXTS)
    ]
    steps = {f"{rows} x {context}": ("fa2", [(context - 1, 1)] * rows) for rows, context in decodes}
    steps |= {
        str(tokens) if prompts == "fa2" else f"{tokens} by {prompts}": (prompts, [(0, tokens)])
        for prompts in ("fa2", "fa3")
        for tokens in ((24,) if check.fake else PROMPTS)
    }
    backends = {prompts: served_by_flashinfer(check, prompts=prompts) for prompts in ("fa2", "fa3")}
    ours: dict[str, Any] = {}
    for kind in ("decode", "prefill"):
        ours |= check.earlier.get(f"micro/{kind} attention, groups of {heads.group_size}", {})
    for name, (prompts, rows) in steps.items():
        try:
            seconds, plan_s = _flashinfer_s(check, shape, backends[prompts], rows)
        except RuntimeError as error:
            found.values[name] = f"not here: {str(error)[:120]}"
        else:
            found.values[name] = {"us": _us(seconds), "plan_us": _us(plan_s)}
            found.values[name] |= {"ours_us": ours.get(name.partition(" by ")[0], {}).get("us")}
    measured = {name: each for name, each in found.values.items() if isinstance(each, dict)}
    told = ", ".join(f"{name} {each['us']} ({each['ours_us']})" for name, each in measured.items())
    found.lines.append(f"FlashInfer, groups of {heads.group_size}, µs (ours): {told or found.values}")
    if measured:
        plans = [each["plan_us"] for each in measured.values()]
        found.lines.append(f"FlashInfer plans in {min(plans)} to {max(plans)} µs of the host")
    return found


def _flashinfer_s(
    check: Check, shape: Shape, served: FlashInferAttention, rows: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """Seconds of the device for the attention of a layer, and of the host for the plan."""
    size, step = shape.size, layout(rows, check.device)
    num_bytes = sum(before + now for before, now in rows) * 4 * size.kv_heads * size.head_dim
    copies = 1 if check.fake else copies_beyond_cache(num_bytes, most=32)
    layers = random_cache([_heads(shape)] * copies, num_blocks=step.num_blocks, device=check.device).layers
    query = torch.randn(len(step.inputs.positions), size.heads, size.head_dim, device=check.device).bfloat16()
    out, planned = torch.empty_like(query), attention_step(step)
    options = LayerOptions(scale=size.head_dim**-0.5)

    def attend(layer: LayerCache, step: AttentionStep = planned) -> None:
        served.attend_stored(query, layer, step, options, out)

    def plan_and_attend() -> None:
        attend(layers[0], replace(planned))  # another step, of the same rows

    seconds = graph_s([partial(attend, layer) for layer in layers], check.device)
    without_s = quiet_host_s(partial(attend, layers[0]), check.device)
    return seconds, quiet_host_s(plan_and_attend, check.device) - without_s


def sampling(check: Check) -> Found:
    """Microseconds of a step's sampling, over Qwen3's vocabulary."""
    from executor.gpu.kernels.sampling import sample  # noqa: PLC0415 - imports triton

    vocabulary, found = (40 if check.fake else QWEN3_0_6B.size.vocabulary), Found()
    for name, how in {
        "greedy": HowSampled(),
        "temperature": HowSampled(temperature=0.6),
        "top-k and top-p": HowSampled(temperature=0.6, top_k=50, top_p=0.9),
        "top-p": HowSampled(temperature=0.6, top_p=0.9),
    }.items():
        for rows in (2,) if check.fake else ROWS:
            step = layout([(3, 1)] * rows, check.device, vocab_size=vocabulary, how=how)
            copies = 1 if check.fake else copies_beyond_cache(2 * rows * vocabulary)
            logits = torch.randn(copies, rows, vocabulary, device=check.device, dtype=torch.bfloat16) * 2
            out = torch.empty(rows, dtype=torch.int32, device=check.device)
            works = [partial(sample, each, step.inputs, step.tables, out) for each in logits]
            seconds = graph_s(works, check.device)
            found.values[f"{name}, {rows}"] = {"us": _us(seconds), "gb_s": round(logits[0].nbytes / seconds / 1e9, 1)}
    told = ", ".join(f"{name} {each['us']:.0f}" for name, each in found.values.items())
    found.lines.append(f"sampling from {vocabulary:,} tokens, µs: {told}")
    return found


def fused(check: Check, *, shape: Shape) -> Found:
    """What lies between the products: norm and residual, gated activation, rotary embedding and store."""
    from executor.gpu.kernels.activation import silu_mul  # noqa: PLC0415 - imports triton
    from executor.gpu.kernels.norm import add_rms_norm  # noqa: PLC0415
    from executor.gpu.kernels.rotary import rope_and_store  # noqa: PLC0415

    size, found, device = shape.size, Found(), check.device
    cos_sin = torch.randn(9000, size.head_dim, device=device)
    qk_norm = torch.ones(size.head_dim, device=device).bfloat16() if shape.kind == "qwen3" else None
    for tokens in (3,) if check.fake else (1, 256, 8192):
        step = layout([(5, 1)] * tokens if tokens <= 256 else [(0, tokens)], device)
        attended, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
        bytes_of = {  # read and written
            "add_rms_norm": 2 * tokens * 4 * size.hidden,
            "silu_mul": 2 * tokens * 3 * size.intermediate,
            "rope_and_store": 2 * tokens * 2 * (attended + 2 * kv) + 4 * tokens * size.head_dim,
        }
        copies = 1 if check.fake else copies_beyond_cache(bytes_of["add_rms_norm"], most=16)
        caches = random_cache([_heads(shape)] * copies, num_blocks=step.num_blocks, device=device).layers
        weight = torch.ones(size.hidden, device=device).bfloat16()

        def noise(
            width: int, copies: int = copies, tokens: int = tokens, device: torch.device = device
        ) -> Iterable[Tensor]:
            return torch.empty(copies, tokens, width, device=device, dtype=torch.bfloat16).normal_()

        works: dict[str, list[Callable[[], object]]] = {
            "add_rms_norm": [
                partial(add_rms_norm, x, residual, weight, 1e-6, out=out)
                for x, residual, out in zip(*(noise(size.hidden) for _ in range(3)), strict=True)
            ],
            "silu_mul": [
                partial(silu_mul, gate_up, out=out)
                for gate_up, out in zip(noise(2 * size.intermediate), noise(size.intermediate), strict=True)
            ],
            "rope_and_store": [
                partial(
                    rope_and_store,
                    qkv,
                    step.inputs.positions,
                    cos_sin,
                    step.inputs.slot_mapping,
                    cache.keys,
                    cache.values,
                    num_heads=size.heads,
                    num_kv_heads=size.kv_heads,
                    q_norm=qk_norm,
                    k_norm=qk_norm,
                    epsilon=1e-6,
                    out_query=query.view(tokens, size.heads, size.head_dim),
                )
                for qkv, query, cache in zip(noise(attended + 2 * kv), noise(attended), caches, strict=True)
            ],
        }
        for name, calls in works.items():
            seconds = graph_s(calls, device)
            rate = bytes_of[name] / seconds
            found.values[f"{name}, {tokens}"] = {"us": _us(seconds), "gb_s": round(rate / 1e9, 1)}
    told = ", ".join(f"{name}: {each['us']:.1f} µs" for name, each in islice(found.values.items(), 3))
    found.lines.append(f"fused, {shape.name}: {told}")
    return found


def launching(check: Check, *, shape: Shape) -> Found:
    """Microseconds of the host for one launch of our kernels, few rows: what a graph saves.

    All of it, of that in Triton, and what a launch of the compiled kernel takes, whose arguments nobody looks at again.
    """
    from executor.attention.triton import Workspace, attend_stored  # noqa: PLC0415 - imports triton
    from executor.gpu.kernels.activation import silu_mul  # noqa: PLC0415
    from executor.gpu.kernels.norm import add_rms_norm  # noqa: PLC0415

    if check.fake:
        return Found(lines=["launching: a graphics processor is needed"])
    size, found, heads = shape.size, Found(), _heads(shape)
    x, residual, out = torch.randn(3, 16, size.hidden, device=check.device).bfloat16()
    gate_up = torch.randn(16, 2 * size.intermediate, device=check.device).bfloat16()
    middle = gate_up[:, : size.intermediate].contiguous()
    query = torch.randn(16, size.heads, size.head_dim, device=check.device).bfloat16()
    attended = torch.empty_like(query)

    def attend(rows: list[tuple[int, int]]) -> Callable[[], object]:
        step = layout(rows, check.device)
        return partial(
            attend_stored,
            query,
            random_cache([heads], num_blocks=step.num_blocks, device=check.device).layers[0],
            step.inputs,
            step.tables.block_tables,
            scale=size.head_dim**-0.5,
            out=attended,
            workspace=Workspace([heads], max_rows=16, device=check.device),
        )

    works: dict[str, Callable[[], object]] = {
        "add_rms_norm": partial(add_rms_norm, x, residual, x[0].contiguous(), 1e-6, out=out),
        "silu_mul": partial(silu_mul, gate_up, out=middle),
        "decode attention, two kernels": attend([(20, 1)] * 16),
        "prefill attention": attend([(0, 16)]),
        "a product of torch": partial(torch.mm, x, x.t(), out=torch.empty(16, 16, device=x.device, dtype=x.dtype)),
    }
    for name, work in works.items():
        seconds, in_triton, compiled = launch_costs(work)
        found.values[name] = {"us": _us(seconds), "in_triton_us": _us(in_triton), "compiled_us": _us(compiled)}
    told = ", ".join(
        f"{name} {each['us']:.0f} ({each['in_triton_us']:.0f} in Triton, {each['compiled_us']:.0f} compiled)"
        for name, each in found.values.items()
    )
    found.lines.append(f"launching, µs of the host: {told}")
    return found


def matrices(check: Check, *, shape: Shape) -> Found:
    """The four products of a layer as torch does them, the layers taking turns: what a decode step is made of."""
    found, device = Found(), check.device
    numbers = sum(inputs * outputs for inputs, outputs in shape.size.linears)
    copies = 1 if check.fake else copies_beyond_cache(2 * numbers, most=16)
    layers = [
        [
            torch.empty(outputs, inputs, device=device, dtype=torch.bfloat16).normal_(0, 0.02)
            for inputs, outputs in shape.size.linears
        ]
        for _ in range(copies)
    ]
    for rows in (2,) if check.fake else (1, 8, 64, 256, 2048):
        inputs = [torch.randn(rows, width, device=device).bfloat16() for width, _ in shape.size.linears]
        outputs = [torch.empty(rows, width, device=device).bfloat16() for _, width in shape.size.linears]

        def layer(weights: list[Tensor], inputs: list[Tensor] = inputs, outputs: list[Tensor] = outputs) -> None:
            for x, weight, y in zip(inputs, weights, outputs, strict=True):
                torch.mm(x, weight.t(), out=y)

        seconds = graph_s([partial(layer, weights) for weights in layers], device)
        floor = max(2 * numbers / check.bytes_per_s, 2 * numbers * rows / check.flop_per_s)
        found.values[str(rows)] = {
            "us_a_layer": _us(seconds),
            "gb_s": round(2 * numbers / seconds / 1e9, 1),
            "tflop_s": _tflop_s(2 * numbers * rows, seconds),
            "over_floor": round(seconds / floor, 3),
        }
    told = ", ".join(f"{rows} rows {each['over_floor']:.2f}" for rows, each in found.values.items())
    found.lines.append(f"torch's products of {shape.name}, times their floor: {told}")
    return found


def _heads(shape: Shape) -> LayerShape:
    size = shape.size
    return LayerShape(num_heads=size.heads, num_kv_heads=size.kv_heads, key_dim=size.head_dim, value_dim=size.head_dim)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def _tflop_s(flop: float, seconds: float) -> float:
    return round(flop / seconds / 1e12, 2)
