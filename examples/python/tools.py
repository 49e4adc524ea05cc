"""Let a model call functions of this program, and answer with what they give back.

    python examples/python/tools.py 127.0.0.1:50051 "What is 17 times 23?"

The arguments are valid by the schema, whatever the model: it is held to it while it writes.
"""

from __future__ import annotations

import json
import operator
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the client lies: pagewire/
from pagewire import Client

OPERATIONS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
CALCULATE = {
    "name": "calculate",
    "description": "Calculates with two whole numbers.",
    "parameters": {
        "type": "object",
        "properties": {
            "left": {"type": "integer", "minimum": -1000, "maximum": 1000},
            "operation": {"enum": list(OPERATIONS)},
            "right": {"type": "integer", "minimum": -1000, "maximum": 1000},
        },
        "required": ["left", "operation", "right"],
        "additionalProperties": False,
    },
}


def calculate(left: int, operation: str, right: int) -> int:
    """What the model may call."""
    return OPERATIONS[operation](left, right)


def main(address: str = "127.0.0.1:50051", question: str = "What is 17 times 23?") -> int:
    """Print what is called and what comes of it, then the answer."""
    messages = [{"role": "user", "content": question}]
    with Client(address) as client:
        called = client.generate(
            messages=messages,
            tools=[CALCULATE],
            tool_choice="required",  # "auto" lets the model choose, and a capable one does
            parallel_tool_calls=False,
            temperature=0.0,
            max_tokens=128,
        )
        messages.append(called.message)
        for call in called.tool_calls:
            result = calculate(**call.parsed)
            print(f"{call.name}({call.arguments}) = {result}")
            messages.append(call.result(json.dumps(result)))
        with client.stream(messages=messages, temperature=0.0, max_tokens=64) as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
