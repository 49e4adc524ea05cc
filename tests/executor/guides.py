"""Grammars whose compilation a test holds up, and a tiny model's tokenizer that can have some."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models

from executor.guide import Grammars
from executor.resident import Resident
from tests.executor.tiny_models import VOCAB_SIZE

LETTERS: Final = [chr(ord("!") + number) for number in range(VOCAB_SIZE - 3)]


def save_letters(folder: Path) -> None:
    """A tokenizer for a tiny model: from token 3 on each is one of the LETTERS."""
    letters = {letter: 3 + number for number, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@contextmanager
def held_up(grammars: Grammars) -> Iterator[None]:
    """Nothing is compiled meanwhile."""
    may_go = threading.Event()
    grammars._thread.submit(may_go.wait)
    try:
        yield
    finally:
        may_go.set()


def until_compiled(tables: Resident) -> None:
    """Return when every grammar of the tables is there."""
    wait([guide.compiling for guide in tables.guides if guide is not None])
