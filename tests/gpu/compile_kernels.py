"""Compile every kernel ahead of time for a GPU that is not here, and tell what became of it. A program of its own.

`python -m tests.gpu.compile_kernels sm_90 0/2` compiles the first half of the cases of all modules in
executor/gpu/kernels, and prints one JSON line for each. A third word keeps the cases that have it in their names.
TRITON_INTERPRET must not be set: Triton would not compile.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia

import executor.gpu.kernels
from executor.gpu.triton_case import CompileCase


def all_cases() -> list[CompileCase]:
    """What each module has to offer, in the order of the modules' names."""
    found: list[CompileCase] = []
    for module in sorted(each.name for each in pkgutil.iter_modules(executor.gpu.kernels.__path__)):
        loaded = importlib.import_module(f"executor.gpu.kernels.{module}")
        found += getattr(loaded, "compile_cases", list)()
    return found


def compile_case(case: CompileCase, sm: int) -> dict[str, Any]:
    """Compile for compute capability `sm`; return what the machine code takes and which instructions it has."""
    kernel = case.kernel
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    given = dict(case.constants)
    if "OVERLAP" in given:
        given["OVERLAP"] = sm >= 90  # as executor/gpu/kernels/overlap.py has it
    constants = {(kernel.arg_names.index(name),): value for name, value in given.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes(kernel, signature)),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = tool("cuobjdump", "-res-usage", cubin), tool("nvdisasm", "-c", cubin)
    numbers = {name: int(count) for name, count in re.findall(r"\b([A-Z]+(?:\[\d+\])?):(\d+)", usage)}
    return {
        "name": case.name,
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "wanted": case.instructions,
        "instructions": sorted(set(re.findall(r"\b(HGMMA|HMMA|IMMA|LDGSTS|DFMA)\b", code))),
    }


def attributes(kernel: Any, signature: dict[str, str]) -> dict[tuple[int], list[list[object]]]:
    """What the just-in-time compiler sees of its arguments: pointers and strides are multiples of 16."""
    changing = {param.name for param in kernel.params if param.do_not_specialize}
    return {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or ("stride" in name and kind in ("i32", "i64") and name not in changing)
    }


def tool(name: str, *arguments: str | Path) -> str:
    """Run one of the programs that come with Triton."""
    path = getattr(nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Read the command line and do what the module says."""
    sm, (part, parts) = int(sys.argv[1].removeprefix("sm_")), map(int, sys.argv[2].split("/"))
    named = sys.argv[3] if len(sys.argv) > 3 else ""
    for case in [each for each in all_cases() if sm in each.targets and named in each.name][part::parts]:
        try:
            report = compile_case(case, sm)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next case is compiled too)
            report = {"name": case.name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
