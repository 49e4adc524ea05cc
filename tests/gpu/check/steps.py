"""Stage 5: whole steps of two model shapes, forward and sampling, against the least that they could take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch

from executor.gpu.graphs import mixed_shapes
from executor.gpu.inputs import StepInputs
from executor.gpu.packing import Shape as PackedShape
from executor.kv_cache import KvCache
from tests.gpu.check.floors import step_floor
from tests.gpu.check.layouts import HowSampled, Layout, layout, padded, random_cache
from tests.gpu.check.parts import Aim, Check, Found, Part, Skipped
from tests.gpu.check.shapes import LLAMA_3_8B, QWEN3_0_6B, TINY_QWEN3, Shape, random_model
from tests.gpu.check.timing import capture, device_s, eager_s

STEP_OVER_FLOOR: Final = 1.35  # at 64 rows and more
ONE_ROW_MS: Final = {"Qwen3-0.6B": 0.9, "Llama-3-8B": 4.2}  # on an H200
PREFILL_SHARE: Final = {"Llama-3-8B": 0.6}  # of the floor's rate

_DECODES: Final = tuple((rows, context) for context in (512, 2048) for rows in (1, 8, 64, 256))
_PROMPTS: Final = (512, 2048, 8192)
_MIXED: Final = (64, 512, 512)  # decode rows, their context, tokens of a prompt beside them
_LONGEST: Final = 4096  # what a captured graph is made for, as in serving
_HOW: Final = HowSampled(temperature=0.6)
_KERNELS_TOLD: Final = 12
_KEPT_FREE: Final = 6 << 30  # bytes: what a prompt of 8192 tokens needs beside the slab, and some


def parts(check: Check) -> list[Part]:
    """For each shape: decode steps, prompts, and where the time of a step goes."""
    found: list[Part] = []
    for shape in (TINY_QWEN3,) if check.fake else (QWEN3_0_6B, LLAMA_3_8B):
        found += [
            Part(name=f"{shape.name}, made", work=partial(made, shape=shape), takes_s=8, limit_s=120),
            *(
                Part(
                    name=f"{shape.name}, {rows} x {context}",
                    work=partial(decode, shape=shape, rows=rows, context=context),
                    takes_s=2,
                )
                for rows, context in (((2, 20),) if check.fake else _DECODES)
            ),
            *(
                Part(
                    name=f"{shape.name}, prompt of {tokens}",
                    work=partial(prefill, shape=shape, tokens=tokens),
                    takes_s=2,
                )
                for tokens in ((5,) if check.fake else _PROMPTS)
            ),
            Part(name=f"{shape.name}, mixed step", work=partial(mixed, shape=shape), takes_s=2),
            Part(name=f"{shape.name}, where the time goes", work=partial(breakdown, shape=shape), takes_s=4),
        ]
    return found


@dataclass(slots=True)
class _Made:
    """The model that is on the device. There is room for one."""

    shape: Shape
    model: Any  # executor.gpu.llama.GpuLlama
    num_blocks: int
    cache: KvCache


_on_device: list[_Made] = []


def made(check: Check, *, shape: Shape) -> Found:
    """Put a model of the shape on the device, and take as large a slab as its largest step needs, or as fits."""
    model = _made(check, shape)
    free = 0 if check.fake else torch.cuda.mem_get_info()[0]
    return Found(
        values={"num_blocks": model.num_blocks, "free_gib_after": round(free / 2**30, 1)},
        lines=[f"{shape.name}: a slab of {model.num_blocks * 16:,} tokens"],
    )


def decode(check: Check, *, shape: Shape, rows: int, context: int) -> Found:
    """One decode step, from a captured graph: median of its replays."""
    made, before = _made(check, shape), [(context - 1, 1)] * rows
    step = layout(
        before, check.device, vocab_size=shape.size.vocabulary, max_model_len=40 if check.fake else _LONGEST, how=_HOW
    )
    _check_room(made, step)
    work = _step(made, step)
    eager = eager_s(work, check.device)
    seconds = eager if check.fake else device_s(capture([work]).replay, check.device, rounds=15)
    floor = step_floor(shape, before, bytes_per_s=check.bytes_per_s, flop_per_s=check.flop_per_s)
    ratio = seconds * 1e3 / floor.ms
    found = Found(
        values={
            "ms": round(seconds * 1e3, 4),
            "eager_ms": round(eager * 1e3, 4),
            "floor_ms": round(floor.ms, 4),
            "floor": {name: round(ms, 4) for name, ms in asdict(floor).items()},
            "over_floor": round(ratio, 3),
            "tokens_per_s": round(rows / seconds),
        },
        lines=[
            f"{shape.name}, {rows} x {context}: {seconds * 1e3:.3f} ms, {ratio:.2f} floors; {eager * 1e3:.2f} eager"
        ],
    )
    if rows >= 64:
        what = f"{shape.name}, step of {rows} rows of {context}: times its floor"
        found.aims.append(Aim(what=what, measured=round(ratio, 3), bound=STEP_OVER_FLOOR))
    if rows == 1 and context == 512 and shape.name in ONE_ROW_MS:
        what = f"{shape.name}, step of one row: ms"
        found.aims.append(Aim(what=what, measured=round(seconds * 1e3, 3), bound=ONE_ROW_MS[shape.name]))
    return found


def prefill(check: Check, *, shape: Shape, tokens: int) -> Found:
    """One prompt in one step, from the graph that serves it, and launched kernel by kernel."""
    made, rows = _made(check, shape), [(0, tokens)]
    _check_room(made, layout(rows, check.device))
    seconds, found = _with_prompts(check, made, rows, f"{shape.name}, prompt of {tokens}")
    share = found.values["share_of_floor_rate"]
    found.values["tokens_per_s"] = round(tokens / seconds)
    if shape.name in PREFILL_SHARE and tokens >= 2048:
        what = f"{shape.name}, prompt of {tokens}: share of the floor's rate"
        aim = Aim(what=what, measured=round(share, 3), bound=PREFILL_SHARE[shape.name], at_most=False)
        found.aims.append(aim)
    return found


def mixed(check: Check, *, shape: Shape) -> Found:
    """A prompt that arrives while others decode: how long their tokens wait for it."""
    decodes, context, tokens = (2, 9, 4) if check.fake else _MIXED
    made, rows = _made(check, shape), [(context - 1, 1)] * decodes + [(0, tokens)]
    _check_room(made, layout(rows, check.device))
    _, found = _with_prompts(check, made, rows, f"{shape.name}, {decodes} x {context} and a prompt of {tokens}")
    return found


def _with_prompts(check: Check, made: _Made, rows: Sequence[tuple[int, int]], name: str) -> tuple[float, Found]:
    """Seconds of a step from its graph, padded as that is, and what was found."""
    shape, longest = made.shape, 40 if check.fake else max(_LONGEST, *(sum(row) for row in rows))
    step = layout(rows, check.device, vocab_size=shape.size.vocabulary, max_model_len=longest, how=_HOW)
    eager = eager_s(_step(made, step), check.device)
    counts = [now for _, now in rows]
    exact = PackedShape(num_tokens=sum(counts), num_rows=len(rows), num_decodes=counts.count(1), num_sampled=len(rows))
    most = (64, 4) if check.fake else (max(_PROMPTS), 256)
    fitting = next(each for each in mixed_shapes(*most) if each.holds(exact))
    work = _step(made, padded(step, fitting))
    seconds = eager_s(work, check.device) if check.fake else device_s(capture([work]).replay, check.device)
    floor = step_floor(shape, rows, bytes_per_s=check.bytes_per_s, flop_per_s=check.flop_per_s)
    share = floor.ms / seconds / 1e3
    found = Found(
        values={
            "ms": round(seconds * 1e3, 3),
            "eager_ms": round(eager * 1e3, 3),
            "floor_ms": round(floor.ms, 3),
            "share_of_floor_rate": round(share, 4),
            "graph_tokens": fitting.num_tokens,
            "graph_decodes": fitting.num_decodes,
        },
        lines=[f"{name}: {seconds * 1e3:.2f} ms, {share:.0%} of the floor's rate; {eager * 1e3:.2f} eager"],
    )
    return seconds, found


def breakdown(check: Check, *, shape: Shape) -> Found:
    """The kernels of one decode step and of one prompt by the time that they take, from torch's profiler."""
    made, found = _made(check, shape), Found()
    steps = {"decode": [(511, 1)] * 64, "prompt": [(0, 2048)]}
    for name, each in {"decode": [(9, 1)]}.items() if check.fake else steps.items():
        step = layout(each, check.device, vocab_size=shape.size.vocabulary, how=_HOW)
        work = _step(made, step)
        if not check.fake:
            work()  # compiles
        told = _profile(work, check)
        found.values[name] = told
        first = ", ".join(f"{kernel['name'][:40]} {kernel['share']:.0%}" for kernel in told["kernels"][:3])
        found.lines.append(f"{shape.name}, {name}: {told['launches']} launches; {first}")
    return found


def _profile(work: Any, check: Check) -> dict[str, Any]:
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if check.fake else activity.CUDA]) as profile:
        work()
        if not check.fake:
            torch.cuda.synchronize()
    events: list[Any] = list(profile.key_averages())

    def time_us(event: Any) -> float:
        return float(event.self_cpu_time_total if check.fake else event.self_device_time_total)

    events = sorted((event for event in events if time_us(event) > 0), key=time_us, reverse=True)
    total_us = sum(time_us(event) for event in events) or 1.0
    return {
        "launches": sum(event.count for event in events),
        "total_us": round(total_us, 1),
        "kernels": [
            {
                "name": event.key[:120],
                "count": event.count,
                "us": round(time_us(event), 1),
                "share": round(time_us(event) / total_us, 4),
            }
            for event in events[:_KERNELS_TOLD]
        ],
    }


def _step(made: _Made, step: Layout) -> Any:
    """Forward and sampling."""
    from executor.gpu.kernels.sampling import sample  # noqa: PLC0415 - imports triton

    out = torch.empty(len(step.inputs.sampled_slots), dtype=torch.int32, device=step.inputs.positions.device)

    def work(inputs: StepInputs = step.inputs) -> None:
        with torch.inference_mode():
            sample(made.model.forward(inputs, step.tables), inputs, step.tables, out)

    return work


def _check_room(made: _Made, step: Layout) -> None:
    if step.num_blocks > made.num_blocks:
        raise Skipped(f"it needs {step.num_blocks:,} blocks; {made.num_blocks:,} fit into the memory")


def _made(check: Check, shape: Shape) -> _Made:
    if _on_device and _on_device[0].shape is shape:
        return _on_device[0]
    _on_device.clear()
    if not check.fake:
        torch.cuda.empty_cache()
    from executor.gpu.llama import GpuLlama  # noqa: PLC0415 - imports triton
    from executor.paged_model import probe_layers  # noqa: PLC0415 - imports Transformers

    dtype = torch.float32 if check.fake else torch.bfloat16
    loaded = random_model(shape, check.device, dtype)
    needs = probe_layers(loaded, shape.size.vocabulary)
    num_blocks = _fitting_blocks(check, shape)
    cache = random_cache([need.shape for need in needs], num_blocks=num_blocks, device=check.device, dtype=dtype)
    model = GpuLlama(
        loaded,
        cache,
        needs,
        max_positions=max(_LONGEST, *_PROMPTS) + 1,
        max_rows=256,
        max_tokens=64 if check.fake else max(_PROMPTS),
    )
    del loaded
    _on_device.append(_Made(shape, model, num_blocks, cache))
    return _on_device[0]


def _fitting_blocks(check: Check, shape: Shape) -> int:
    """Enough for the largest step, or all that fits."""
    if check.fake:
        return 8
    steps: Sequence[tuple[int, int]] = [*_DECODES, *((1, tokens) for tokens in _PROMPTS)]
    wanted = max(rows * (context // 16 + 1) for rows, context in steps)
    biggest = 2 * 3 * shape.size.hidden * shape.size.intermediate  # a layer's matrices are merged into new ones
    free = torch.cuda.mem_get_info()[0] - _KEPT_FREE - biggest
    return int(min(wanted, free // (16 * shape.kv_token_bytes)))
