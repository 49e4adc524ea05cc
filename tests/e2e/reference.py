"""What Transformers itself says: plain `generate`, greedy, in float32, one prompt at a time."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

NUM_PROCESSES = 2


def generate(model: Path, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """The next `num_new` tokens of each prompt, end-of-sequence ignored. Two processes share the prompts."""
    shares = [prompts[i::NUM_PROCESSES] for i in range(NUM_PROCESSES)]
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        outputs = list(pool.map(_generate, [model] * NUM_PROCESSES, shares, [num_new] * NUM_PROCESSES))
    return [outputs[i % NUM_PROCESSES][i // NUM_PROCESSES] for i in range(len(prompts))]


def _generate(folder: Path, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    torch.set_num_threads(1)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new)
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs
