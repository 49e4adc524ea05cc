"""A GGUF file becomes a model folder: `python -m executor.convert FILE.gguf FOLDER`. Done once for each file.

Weights are dequantised to bfloat16: half the disk of float32, and finer than any quantised file was. Whoever reads the
folder, in whatever type, reads the same numbers. The tokenizer and the chat template come out of the file too; nothing
is fetched. The folder appears at once and whole, or not at all.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from common.errors import ModelFolderError
from common.model_folder import read_model_folder

# Vocabularies learned with every digit a word of its own and GPT-2's rule for the rest. Transformers does not know them
# from the file and would cut "a   12" differently from how the model was trained.
_SINGLE_DIGITS: Final = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_GPT2: Final = frozenset({"", "default", "gpt-2", "phi-2"})

_SAMPLE: Final = "The 2 foxes, aged 12 and 345, said: it's (almost) over!"


def convert(source: Path, folder: Path) -> None:
    """Write `folder`, which must not exist. Raises ModelFolderError where the file cannot be converted."""
    if folder.exists():
        raise ModelFolderError(f"{folder}: the folder exists already. Remove it, or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_tokenizer(source, staging)
        _write_model(source, staging)
        read_model_folder(staging)
        for file in staging.iterdir():
            _sync(file)  # so that the name never stands for less than was written
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_tokenizer(source: Path, folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    backend = tokenizer.backend_tokenizer
    learned_with = _pre_tokenizer(source)
    if learned_with in _SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and learned_with not in _GPT2:
        warnings.warn(
            f"{source.name}: how its tokenizer ({learned_with}) cuts words is not known here; GPT-2's way is used",
            stacklevel=1,
        )
    again = backend.decode(backend.encode(_SAMPLE, add_special_tokens=False).ids)
    if again.strip() != _SAMPLE:
        raise ModelFolderError(f"{source}: its tokenizer does not give a text back ({again!r}). Take another file")
    tokenizer.save_pretrained(folder)


def _pre_tokenizer(source: Path) -> str:
    """What the file calls the way its vocabulary was learned, as llama.cpp names it."""
    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())


def _write_model(source: Path, folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        local_files_only=True,
        quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def main(arguments: list[str]) -> int:
    """Convert; return 0, or 1 after one line that says why not."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    [source, folder] = arguments
    try:
        convert(Path(source), Path(folder))
    except ModelFolderError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except Exception as error:  # noqa: BLE001 — a parser of foreign files fails in any way
        sys.stderr.write(f"{source}: cannot be converted ({type(error).__name__}: {error})\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
