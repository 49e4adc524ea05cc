"""Stage 2: a small model's greedy tokens through the runner's own plans, against Transformers' generate, in float32."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.gpu.check.checkpoint import write_checkpoint
from tests.gpu.check.driving import blocks_needed, drive
from tests.gpu.check.ours import runner_for
from tests.gpu.check.parts import Check, Found, Part
from tests.gpu.check.shapes import TINY_LLAMA, TINY_QWEN3, Shape

_SPREAD = 0.15  # larger than at the start of training, so that logits differ clearly
_BLOCK_SIZE = 16


def parts(check: Check) -> list[Part]:
    """Both kinds, launched kernel by kernel and from graphs."""
    found: list[Part] = []
    for shape in (TINY_QWEN3,) if check.fake else (TINY_QWEN3, TINY_LLAMA):
        for graphs in (True,) if check.fake else (False, True):
            work = partial(parity, shape=_sized(check, shape), graphs=graphs)
            found.append(Part(name=f"{shape.kind}, {'graphs' if graphs else 'eager'}", work=work, takes_s=8))
    return found


def parity(check: Check, *, shape: Shape, graphs: bool) -> Found:
    """Prompts of several lengths in chunks, beside rows that decode, two steps in flight: token for token."""
    folder = write_checkpoint(shape, check.folder / f"parity-{shape.kind}", dtype=torch.float32, spread=_SPREAD)
    draw = random.Random(4)
    lengths, count = ((3, 9), 3) if check.fake else ((3, 17, 33, 70, 120, 16), 24)
    prompts = [[draw.randrange(3, shape.size.vocabulary) for _ in range(length)] for length in lengths]
    expected = _transformers(folder, prompts, count, check.device)
    runner = runner_for(
        check,
        folder,
        dtype="float32",
        graphs=graphs,
        block_size=_BLOCK_SIZE,
        num_blocks=blocks_needed(prompts, count, _BLOCK_SIZE),
        max_sequences=2 if check.fake else 8,
        max_step_tokens=6 if check.fake else 256,
        max_model_len=32 if check.fake else shape.max_positions,
    )
    if graphs:
        while runner.idle():
            pass
    tokens = drive(runner, prompts, count, block_size=_BLOCK_SIZE, chunk=5 if check.fake else 11)
    agreeing = [_agreement(ours, theirs) for ours, theirs in zip(tokens, expected, strict=True)]
    found = Found(
        values={"prompts": list(lengths), "tokens": count, "agreeing": agreeing},
        lines=[f"{shape.kind}: {sum(agreeing)} of {count * len(prompts)} tokens are those of Transformers"],
    )
    found.problems += [
        f"the prompt of {length} tokens goes another way after {same} of {count} tokens"
        for length, same in zip(lengths, agreeing, strict=True)
        if same != count
    ]
    return found


def _transformers(folder: Path, prompts: list[list[int]], count: int, device: torch.device) -> list[list[int]]:
    """What generate gives, one prompt after the other, with its own plain attention."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device).eval()
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def _agreement(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    for place, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return place
    return min(len(ours), len(theirs))


def _sized(check: Check, shape: Shape) -> Shape:
    """On a GPU a few times wider, with heads as large as they are elsewhere."""
    if check.fake:
        return shape
    size = replace(shape.size, layers=3, hidden=512, intermediate=768, heads=8, head_dim=64, vocabulary=2000)
    return replace(shape, size=replace(size, kv_heads=4 if shape.kind == "qwen3" else 2))
