"""What a request may say, and what its answer can tell: the one list that is checked, converted and described by.

The names are those of Triton's backends for language models where these have one, and our own API's otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["text", "texts", "flag", "whole number", "number"]

VERSION: Final = "1"
"""The version of a model: there is one."""

MOST_NAMED: Final = 64  # tensors, and parameters, of one request
MAX_ELEMENTS: Final = 1024  # of one tensor
AT_ONCE: Final = 256  # requests of one stream that are looked after; more of them lie unread, and hold their sender up


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A tensor that a request may have, or a parameter of that name."""

    kind: Kind
    datatype: str  # that is described; others that hold such a value are taken, too
    field: str = (
        ""  # of our own request, below `sampling` or `stopping`; empty: services/open_inference/asked.py has it
    )
    most: int = (1 << 32) - 1  # of a whole number, as the field holds it


INPUTS: Final = {
    "text_input": Word(kind="text", datatype="BYTES"),
    "stream": Word(kind="flag", datatype="BOOL"),
    "exclude_input_in_output": Word(kind="flag", datatype="BOOL"),
    "sampling_parameters": Word(kind="text", datatype="BYTES"),
    "max_tokens": Word(kind="whole number", datatype="INT32", field="stopping.max_tokens"),
    "min_tokens": Word(kind="whole number", datatype="INT32", field="stopping.min_tokens"),
    "stop": Word(kind="texts", datatype="BYTES", field="stopping.stop"),
    "include_stop": Word(kind="flag", datatype="BOOL", field="stopping.include_stop"),
    "ignore_eos": Word(kind="flag", datatype="BOOL", field="stopping.ignore_eos"),
    "temperature": Word(kind="number", datatype="FP32", field="sampling.temperature"),
    "top_p": Word(kind="number", datatype="FP32", field="sampling.top_p"),
    "top_k": Word(kind="whole number", datatype="INT32", field="sampling.top_k"),
    "min_p": Word(kind="number", datatype="FP32", field="sampling.min_p"),
    "typical_p": Word(kind="number", datatype="FP32", field="sampling.typical_p"),
    "repetition_penalty": Word(kind="number", datatype="FP32", field="sampling.repetition_penalty"),
    "presence_penalty": Word(kind="number", datatype="FP32", field="sampling.presence_penalty"),
    "frequency_penalty": Word(kind="number", datatype="FP32", field="sampling.frequency_penalty"),
    "seed": Word(kind="whole number", datatype="UINT64", field="sampling.seed", most=(1 << 64) - 1),
    "json_schema": Word(kind="text", datatype="BYTES", field="sampling.structured.json_schema"),
    "regex": Word(kind="text", datatype="BYTES", field="sampling.structured.regex"),
    "grammar": Word(kind="text", datatype="BYTES", field="sampling.structured.grammar"),
}

# What the protocol itself has parameters for.
PROTOCOL: Final = {
    "priority": Word(kind="whole number", datatype="", most=3),
    "timeout": Word(kind="whole number", datatype="", most=(1 << 63) - 1),  # microseconds
    "triton_enable_empty_final_response": Word(kind="flag", datatype=""),  # there is always a final response
}

OUTPUTS: Final = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",  # "stop", "length"; empty before the end
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",  # of this response
}
"""By datatype. Who names none gets the first."""
