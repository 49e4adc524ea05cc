"""The header of a safetensors file, checked against the file's size. Reads no weights.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the data. The JSON maps a tensor's name to its dtype, its
shape and its [begin, end) in the data. A file is sound when the tensors cover the data exactly, without gap or overlap,
and each one's bytes are shape times dtype; a truncated or tampered file is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.json_value import is_array, is_natural, is_object

MAX_HEADER_BYTES: Final = 100_000_000

DTYPE_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


class MalformedSafetensors(ValueError):
    """The file is not a sound safetensors file. The message says why, not which file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor's place in the file."""

    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    begin: int  # bytes, counted from the end of the header
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """What a safetensors file holds, and the bytes that say so."""

    raw: bytes  # the JSON as it stands in the file
    file_bytes: int
    tensors: Mapping[str, TensorEntry]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header. Raises MalformedSafetensors, or OSError where the file cannot be read."""
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        if file_bytes < 8:
            raise MalformedSafetensors(f"the file has {file_bytes} bytes, too few for a header length")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise MalformedSafetensors(f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
        if 8 + length > file_bytes:
            raise MalformedSafetensors(f"the header claims {length} bytes, the file has {file_bytes}")
        raw = file.read(length)
    tensors = _parse(raw)
    _check_cover(tensors, data_bytes=file_bytes - 8 - length)
    return SafetensorsHeader(raw=raw, file_bytes=file_bytes, tensors=tensors)


def _parse(raw: bytes) -> dict[str, TensorEntry]:
    try:
        header: object = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise MalformedSafetensors(f"the header is not JSON ({error})") from error
    if not is_object(header):
        raise MalformedSafetensors("the header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(name, value) for name, value in header.items()}


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(name: str, value: object) -> TensorEntry:
    fields = value if is_object(value) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and is_array(shape) and is_array(offsets) and len(offsets) == 2):
        raise MalformedSafetensors(f"tensor {name!r} has no dtype, shape and data_offsets")
    if dtype not in DTYPE_BITS:
        raise MalformedSafetensors(f"tensor {name!r} has the unknown dtype {dtype!r}")
    numbers = [number for number in (*shape, *offsets) if is_natural(number)]
    if len(numbers) != len(shape) + 2:
        raise MalformedSafetensors(f"tensor {name!r} has a shape or offset that is not a natural number")
    *sizes, begin, end = numbers
    if math.prod(sizes) * DTYPE_BITS[dtype] != (end - begin) * 8:
        raise MalformedSafetensors(f"tensor {name!r}: {dtype} of shape {sizes} does not fill {end - begin} bytes")
    return TensorEntry(dtype=dtype, shape=tuple(sizes), begin=begin, end=end)


def _check_cover(tensors: Mapping[str, TensorEntry], *, data_bytes: int) -> None:
    reached = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            raise MalformedSafetensors(f"tensor {name!r} begins at {entry.begin}, the one before it ends at {reached}")
        reached = entry.end
    if reached > data_bytes:
        raise MalformedSafetensors(f"truncated: the tensors need {reached} bytes, the file has {data_bytes}")
    if reached < data_bytes:
        raise MalformedSafetensors(f"{data_bytes - reached} bytes at the end belong to no tensor")
