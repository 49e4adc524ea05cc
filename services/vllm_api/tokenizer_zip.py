"""The model's tokenizer as an archive, for a gateway that has no copy of the model's folder."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

from services.vllm_api.stubs import common_pb2 as pb

_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
)  # fmt: skip
_CHUNK: Final = 64 << 10
_THE_BEGINNING: Final = (1980, 1, 1, 0, 0, 0)  # of time, to a zip: the same files are the same archive


class TokenizerZip:
    """Made when it is first asked for, and kept once that has worked.

    It is what a few files of the model's folder are at that time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._making: asyncio.Task[tuple[bytes, str]] | None = None

    async def chunks(self) -> AsyncGenerator[pb.GetTokenizerChunk, None]:
        """The archive in parts; the last one says the SHA-256 of all."""
        if self._making is None or (self._making.done() and _has_failed(self._making)):
            self._making = asyncio.create_task(asyncio.to_thread(make, self._folder), name="tokenizer zip")
        archive, digest = await asyncio.shield(self._making)  # the caller who asked first may leave
        for start in range(0, len(archive), _CHUNK):
            stop = start + _CHUNK
            yield pb.GetTokenizerChunk(data=archive[start:stop], sha256=digest if stop >= len(archive) else "")


def _has_failed(task: asyncio.Task[tuple[bytes, str]]) -> bool:
    return task.cancelled() or task.exception() is not None


def make(folder: Path) -> tuple[bytes, str]:
    """The archive and its SHA-256, in hex."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _FILES:
            if (folder / name).is_file():
                entry = zipfile.ZipInfo(name, _THE_BEGINNING)
                archive.writestr(entry, (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
    data = packed.getvalue()
    return data, hashlib.sha256(data).hexdigest()
