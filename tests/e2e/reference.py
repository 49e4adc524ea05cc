"""What Transformers itself says, greedily and in float32: by `generate`, and in one pass of tokens that are there."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

_NUM_THREADS: Final = 2


def says(model: Path, prompts: list[list[int]], outputs: list[list[int]]) -> list[list[int]]:
    """The token that is likeliest behind each prompt and each beginning of its output, end-of-sequence ignored.

    Outputs that are what comes back are those of `generate`, token for token: the first because it is the likeliest
    behind the prompt, and so each, because all before it are. One pass over a text costs a hundredth of its steps.
    """
    said: list[list[int]] = _elsewhere(_says, model, prompts, outputs)
    return said


def generates(model: Path, prompt: list[int], num_new: int) -> list[int]:
    """The next `num_new` tokens by Transformers' own loop and cache."""
    tokens: list[int] = _elsewhere(_generates, model, prompt, num_new)
    return tokens


def _elsewhere(work: Any, *arguments: Any) -> Any:
    """In a process of its own: what torch and Transformers hold there ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _load(folder: Path) -> Any:
    torch.set_num_threads(_NUM_THREADS)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def _says(folder: Path, prompts: list[list[int]], outputs: list[list[int]]) -> list[list[int]]:
    model = _load(folder)
    said: list[list[int]] = []
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            logits = model(torch.tensor([prompt + output[:-1]]), logits_to_keep=len(output)).logits
            said.append(logits[0].argmax(dim=-1).tolist())
    return said


def _generates(folder: Path, prompt: list[int], num_new: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = _load(folder).generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
