"""Tensors ↔ values: the elements of an input, in whichever of the two ways they were sent, and those of an output.

A tensor is told by its name, a datatype and a shape; its elements are typed `contents`, or raw bytes beside the
tensors. What does not fit together is an InvalidRequest that names the tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from common.errors import InvalidRequest
from protos import open_inference_pb2 as pb
from services.open_inference.words import MAX_ELEMENTS

Element = bool | int | float | bytes

_LENGTH: Final = struct.Struct("<I")  # before each element of a raw tensor of BYTES


class _Datatype(NamedTuple):
    contents: str  # the field of InferTensorContents; empty: raw only
    code: str  # of `struct`; empty: elements have a length of their own


_BY_NAME: Final = {
    "BOOL": _Datatype("bool_contents", "?"),
    "INT8": _Datatype("int_contents", "b"),
    "INT16": _Datatype("int_contents", "h"),
    "INT32": _Datatype("int_contents", "i"),
    "INT64": _Datatype("int64_contents", "q"),
    "UINT8": _Datatype("uint_contents", "B"),
    "UINT16": _Datatype("uint_contents", "H"),
    "UINT32": _Datatype("uint_contents", "I"),
    "UINT64": _Datatype("uint64_contents", "Q"),
    "FP16": _Datatype("", "e"),
    "FP32": _Datatype("fp32_contents", "f"),
    "FP64": _Datatype("fp64_contents", "d"),
    "BYTES": _Datatype("bytes_contents", ""),
}

DATATYPES: Final = tuple(_BY_NAME)


def elements_of(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> list[Element]:
    """The elements, in row-major order; `raw` has them unless it is None. Raises InvalidRequest naming the tensor."""
    name, datatype = tensor.name, _BY_NAME.get(tensor.datatype)
    if datatype is None:
        raise InvalidRequest(name, f"datatype must be one of {', '.join(DATATYPES)}, got {tensor.datatype!r}")
    shape = list(tensor.shape[:3])
    if len(shape) == 3 or min(shape, default=0) < 0:
        raise InvalidRequest(name, "shape must be [n] or [1, n]")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise InvalidRequest(name, f"at most {MAX_ELEMENTS} elements, its shape is {shape}")
    if raw is not None:
        return _unpacked(name, datatype, count, raw)
    if not datatype.contents:
        raise InvalidRequest(name, f"{tensor.datatype} must be sent as raw_input_contents")
    contents: Sequence[Element] = getattr(tensor.contents, datatype.contents)
    if len(contents) != count:
        problem = f"its shape {shape} has {count} elements, contents.{datatype.contents} has {len(contents)}"
        raise InvalidRequest(name, problem)
    return list(contents)


def _unpacked(name: str, datatype: _Datatype, count: int, raw: bytes) -> list[Element]:
    if datatype.code:
        layout = struct.Struct(f"<{count}{datatype.code}")
        if len(raw) != layout.size:
            raise InvalidRequest(name, f"{count} elements have {layout.size} raw bytes, got {len(raw)}")
        return list(layout.unpack(raw))
    elements: list[Element] = []
    at = 0
    for _ in range(count):
        begin = at + _LENGTH.size
        if begin > len(raw) or (at := begin + _LENGTH.unpack_from(raw, at)[0]) > len(raw):
            problem = f"each of {count} elements is its length, as UINT32, and its bytes; got {len(raw)} bytes"
            raise InvalidRequest(name, problem)
        elements.append(raw[begin:at])
    if at != len(raw):
        raise InvalidRequest(name, f"{count} elements have {at} raw bytes, got {len(raw)}")
    return elements


def add_output(
    response: pb.ModelInferResponse, name: str, datatype: str, element: Element, *, shape: Sequence[int], raw: bool
) -> None:
    """Another output of one element, beside those that the response has."""
    output = response.outputs.add(name=name, datatype=datatype, shape=shape)
    known = _BY_NAME[datatype]
    if not raw:
        contents: Any = getattr(output.contents, known.contents)
        contents.append(element)
    elif known.code:
        response.raw_output_contents.append(struct.pack(f"<{known.code}", element))
    else:
        assert isinstance(element, bytes), "an element of BYTES"
        response.raw_output_contents.append(_LENGTH.pack(len(element)) + element)
