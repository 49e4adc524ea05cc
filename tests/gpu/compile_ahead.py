"""A process of its own for test_compiling.py: two kernels asked for ahead, with a driver that knows no device."""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from executor.gpu.compiling import compiling_ahead
from executor.gpu.kernels import activation, norm


class NoDevice:
    """What Triton asks of a driver until it launches."""

    def __init__(self) -> None:
        self.utils = self
        self.loaded: list[str] = []

    def launcher_cls(self, _source: Any, metadata: Any) -> Any:
        """Makes what launches a kernel."""
        return lambda: metadata.name

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, _binary: bytes, _shared: int, _device: int) -> tuple[int, int, int, int, int]:
        """Returns handles, then registers, spills, threads at most."""
        self.loaded.append(name)
        return 1, 1, 32, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def main() -> None:
    """Print what was compiled and loaded, whether a later launch finds it, and whether anything ran."""
    active: Any = driver
    device = NoDevice()
    active.set_active(device)
    jit: Any = JITFunction
    run = jit.run
    x = torch.full((4, 64), 3.0)
    gate_up, out = x.clone(), x[:, :32].clone()

    def launch() -> None:
        norm.rms_norm(x, x[0], 1e-6, out=x)
        activation.silu_mul(gate_up, out=out)

    with compiling_ahead():
        launch()
        launch()
    compiled = {kernel.fn.__name__: _compiled(kernel) for kernel in _kernels()}
    jit.run = lambda self, *arguments, grid, warmup, **keywords: run(
        self, *arguments, grid=grid, warmup=True, **keywords
    )
    launch()
    again = {kernel.fn.__name__: _compiled(kernel) for kernel in _kernels()}
    told = {
        "compiled": compiled,
        "again": again == compiled,
        "loaded": sorted(device.loaded),
        "untouched": bool((x == 3).all()) and bool((out == 3).all()),
    }
    print(json.dumps(told))


def _kernels() -> list[Any]:
    found = {id(each): each for module in (norm, activation) for each in vars(module).values()}
    return [each for each in found.values() if isinstance(each, JITFunction) and _compiled(each)]


def _compiled(kernel: Any) -> list[str]:
    """Kernels that are ready for a launch, by their keys."""
    cache = kernel.device_caches[0][0]
    return sorted(key for key, compiled in cache.items() if type(compiled).__name__ == "CompiledKernel")


if __name__ == "__main__":
    main()
