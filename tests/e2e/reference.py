"""What Transformers itself says, greedily and in float32: by `generate`, and in one pass of tokens that are there."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from transformers import AutoModelForCausalLM

_NUM_THREADS: Final = 2


class Said(NamedTuple):
    """The same tokens in two ways, where Transformers agrees."""

    in_one_pass: list[list[int]]
    by_its_own_loop: list[int]  # of the first prompt


def says(model: Path, prompts: list[list[int]], outputs: list[list[int]]) -> Said:
    """The token that is likeliest behind each prompt and each beginning of its output, end-of-sequence ignored.

    Outputs that are what comes back are those of `generate`, token for token: the first because it is the likeliest
    behind the prompt, and so each, because all before it are. One pass over a text costs a hundredth of its steps, so
    `generate` is asked for the first prompt alone. All in a process of its own: what torch and Transformers hold there
    ends with it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_says, model, prompts, outputs).result()


def _says(folder: Path, prompts: list[list[int]], outputs: list[list[int]]) -> Said:
    torch.set_num_threads(_NUM_THREADS)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    said: list[list[int]] = []
    with torch.inference_mode():
        for prompt, output in zip(prompts, outputs, strict=True):
            logits = model(torch.tensor([prompt + output[:-1]]), logits_to_keep=len(output)).logits
            said.append(logits[0].argmax(dim=-1).tolist())
    ids = torch.tensor([prompts[0]])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(outputs[0])
    )
    return Said(said, generated[0, len(prompts[0]) :].tolist())
