"""A request in the protocol's words → one in our own API's, from where everything is checked as for any other caller.

A setting is a tensor, a parameter of the request, or a member of the JSON object `sampling_parameters`, as Triton's
backend for vLLM takes it; none may be said twice. A number may be written as a string: the first version of the
protocol's parameters, which many clients speak, knows no fractions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from common.errors import InvalidRequest
from protos import inference_pb2, open_inference_pb2
from services.open_inference.tensors import elements_of
from services.open_inference.words import INPUTS, MOST_NAMED, OUTPUTS, PROTOCOL, Word

_MAX_JSON_BYTES: Final = 65_536
_WHERE: Final = "sampling_parameters"
_FLAGS: Final = {"true": True, "false": False}


class Given(NamedTuple):
    """What was said of a setting."""

    where: str  # as an error names it
    values: Sequence[Any]  # of a tensor or a JSON document, so of any type


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request of the protocol asks for."""

    request: inference_pb2.GenerateRequest
    stream: bool
    outputs: tuple[str, ...]
    shape: tuple[int, ...]  # of the text, and of each output
    raw: bool  # contents are raw, here and there
    before: str  # the prompt, where the answer begins with it
    timeout_s: float | None
    names: Mapping[str, str] = field(repr=False)  # fields of `request`, and what they were called

    @contextmanager
    def called_as_asked(self) -> Iterator[None]:
        """An InvalidRequest in here names what its sender has sent."""
        try:
            yield
        except InvalidRequest as error:
            raise InvalidRequest(self.names.get(error.field, error.field), error.problem) from None


def read(message: open_inference_pb2.ModelInferRequest) -> Asked:
    """What the message asks for. Raises InvalidRequest naming the tensor or the parameter."""
    raw = bool(message.raw_input_contents)
    given = _tensors(message)
    shape = next((tuple(tensor.shape) for tensor in message.inputs if tensor.name == "text_input"), (1,))
    _add(given, _parameters(message))
    if _WHERE in given:
        _add(given, _document(_text(given.pop(_WHERE))))
    if "text_input" not in given:
        raise InvalidRequest("text_input", "is missing: a tensor of BYTES with the shape [1]")

    request = inference_pb2.GenerateRequest(request_id=message.id)
    names = {"text": "text_input", "request_id": "id", "model": "model_name"}
    structured = [name for name in ("json_schema", "regex", "grammar") if name in given]
    if len(structured) > 1:
        raise InvalidRequest(given[structured[1]].where, f"must not be set with {structured[0]}")
    for name, said in given.items():
        word = INPUTS.get(name) or PROTOCOL[name]
        if word.field:
            _set(request, word, said)
            names[word.field.rpartition(".")[2]] = said.where
    request.text = _text(given["text_input"])
    if "priority" in given:
        # numbered alike: 0 is the default, 1 goes first
        request.priority = inference_pb2.Priority.ValueType(_whole(given["priority"], PROTOCOL["priority"].most))
    stream = "stream" in given and _flag(given["stream"])
    return Asked(
        request=request,
        stream=stream,
        outputs=_outputs(message),
        shape=shape,
        raw=raw,
        before=request.text if _repeats_prompt(given, stream=stream) else "",
        timeout_s=_timeout_s(given),
        names=names,
    )


def _tensors(message: open_inference_pb2.ModelInferRequest) -> dict[str, Given]:
    contents = message.raw_input_contents
    if len(message.inputs) > MOST_NAMED:
        raise InvalidRequest("inputs", f"at most {MOST_NAMED}, got {len(message.inputs)}")
    if contents and len(contents) != len(message.inputs):
        problem = f"must be one for each of {len(message.inputs)} inputs, got {len(contents)}"
        raise InvalidRequest("raw_input_contents", problem)
    given: dict[str, Given] = {}
    for i, tensor in enumerate(message.inputs):
        name = tensor.name
        word = INPUTS.get(name)
        if word is None:
            raise InvalidRequest(f"inputs[{i}].name", f"must be one of {', '.join(INPUTS)}, got {name!r}")
        if name in given:
            raise InvalidRequest(name, "is there twice")
        if tensor.parameters:
            raise InvalidRequest(name, "a tensor has no parameters here; its contents come with the request")
        if contents and tensor.HasField("contents"):
            raise InvalidRequest(name, "contents must not be set with raw_input_contents")
        elements = elements_of(tensor, contents[i] if contents else None)
        is_one = all(length == 1 for length in tensor.shape) and elements
        if word.kind != "texts" and not is_one:
            raise InvalidRequest(name, f"shape must be [1] or [1, 1], got {list(tensor.shape)}")
        if word.kind == "texts" and len(tensor.shape) == 2 and tensor.shape[0] != 1:
            raise InvalidRequest(name, f"shape must be [n] or [1, n], got {list(tensor.shape)}")
        given[name] = Given(name, elements)
    return given


def _parameters(message: open_inference_pb2.ModelInferRequest) -> dict[str, Given]:
    if len(message.parameters) > MOST_NAMED:
        raise InvalidRequest("parameters", f"at most {MOST_NAMED}, got {len(message.parameters)}")
    given: dict[str, Given] = {}
    for name, parameter in message.parameters.items():
        where = f"parameters.{name}"
        if name not in PROTOCOL and (name not in INPUTS or name == "text_input"):
            known = ", ".join(word for word in (*INPUTS, *PROTOCOL) if word != "text_input")
            raise InvalidRequest("parameters", f"must be of {known}, got {name!r}")
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(where, "has no value")
        given[name] = Given(where, [getattr(parameter, kind)])
    return given


def _document(text: str) -> dict[str, Given]:
    """The settings in a JSON object."""
    if len(text) > _MAX_JSON_BYTES:
        raise InvalidRequest(_WHERE, f"at most {_MAX_JSON_BYTES} characters, got {len(text)}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(_WHERE, "must be a JSON object") from None
    if not isinstance(document, dict):
        raise InvalidRequest(_WHERE, "must be a JSON object")
    given: dict[str, Given] = {}
    for name, value in document.items():
        if name not in INPUTS or not INPUTS[name].field:
            known = ", ".join(name for name, word in INPUTS.items() if word.field)
            raise InvalidRequest(_WHERE, f"its members must be of {known}, got {name!r}")
        if value is not None:  # as if it were not there
            given[name] = Given(f"{_WHERE}.{name}", value if isinstance(value, list) else [value])
    return given


def _add(given: dict[str, Given], more: Mapping[str, Given]) -> None:
    for name, said in more.items():
        if name in given:
            raise InvalidRequest(said.where, f"is said already, as {given[name].where}")
        given[name] = said


def _set(request: inference_pb2.GenerateRequest, word: Word, said: Given) -> None:
    *path, name = word.field.split(".")
    message: Any = request
    for part in path:
        message = getattr(message, part)
    match word.kind:
        case "text":
            setattr(message, name, _text(said))
        case "texts":
            getattr(message, name).extend(_text(Given(said.where, [value])) for value in said.values)
        case "flag":
            setattr(message, name, _flag(said))
        case "whole number":
            setattr(message, name, _whole(said, word.most))
        case "number":
            setattr(message, name, _number(said))


def _outputs(message: open_inference_pb2.ModelInferRequest) -> tuple[str, ...]:
    if len(message.outputs) > len(OUTPUTS):
        raise InvalidRequest("outputs", f"at most {len(OUTPUTS)}, got {len(message.outputs)}")
    for i, output in enumerate(message.outputs):
        if output.name not in OUTPUTS:
            raise InvalidRequest(f"outputs[{i}].name", f"must be one of {', '.join(OUTPUTS)}, got {output.name!r}")
        if output.parameters:
            raise InvalidRequest(output.name, "an output has no parameters here; its contents come with the answer")
    named = tuple(dict.fromkeys(output.name for output in message.outputs))
    if len(named) < len(message.outputs):
        raise InvalidRequest("outputs", "one is there twice")
    return named or (next(iter(OUTPUTS)),)


def _repeats_prompt(given: Mapping[str, Given], *, stream: bool) -> bool:
    said = given.get("exclude_input_in_output")
    if said is None or _flag(said):
        return False
    if stream:
        raise InvalidRequest(said.where, "must be true, or not set, with stream")
    return True


def _timeout_s(given: Mapping[str, Given]) -> float | None:
    if "timeout" not in given:
        return None
    microseconds = _whole(given["timeout"], PROTOCOL["timeout"].most)
    return microseconds / 1e6 if microseconds else None  # 0: none, as in Triton


# ---- values of any type


def _one(said: Given) -> Any:
    if len(said.values) != 1:
        raise InvalidRequest(said.where, f"must be one value, got {len(said.values)}")
    (value,) = said.values
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(said.where, "must be UTF-8") from None
    return value


def _text(said: Given) -> str:
    value = _one(said)
    if not isinstance(value, str):
        raise InvalidRequest(said.where, f"must be a text, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise InvalidRequest(said.where, "must be text that UTF-8 can encode") from None
    return value


def _flag(said: Given) -> bool:
    value = _one(said)
    flag = _FLAGS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise InvalidRequest(said.where, f"must be true or false, got {_shown(value)}")
    return flag


def _whole(said: Given, most: int) -> int:
    value = _one(said)
    number = _parsed(value, (int,))
    if not isinstance(number, int) or not 0 <= number <= most:
        raise InvalidRequest(said.where, f"must be a whole number in [0, {most}], got {_shown(value)}")
    return number


def _number(said: Given) -> float:
    value = _one(said)
    number = _parsed(value, (int, float))
    try:
        return float(number)
    except (TypeError, OverflowError):
        raise InvalidRequest(said.where, f"must be a number, got {_shown(value)}") from None


def _parsed(value: Any, types: Iterable[type[int | float]]) -> Any:
    """The number that a value is, or that is written in it; None where that is none of these types."""
    if isinstance(value, str):
        for kind in types:
            try:
                return kind(value)
            except ValueError:
                continue
    is_number = isinstance(value, tuple(types)) and not isinstance(value, bool)
    return value if is_number else None


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool) and not _is_huge(value) else type(value).__name__
    return text if len(text) <= 64 else f"{text[:63]}…"


def _is_huge(value: Any) -> bool:
    """Whether Python refuses to write the number."""
    return isinstance(value, int) and value.bit_length() > 256
