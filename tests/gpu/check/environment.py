"""Stage 0: what this machine is, and what it can do at best. Every later number is held against these ceilings."""

from __future__ import annotations

import datetime as dt
import platform
import shutil
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

import torch

from tests.benchmarks import machine
from tests.gpu.check.parts import Check, Found, Part
from tests.gpu.check.timing import device_s, graph_s

_PACKAGES: Final = (
    "torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "grpcio", "protobuf", "uvloop",
    "flash_attn", "flashinfer-python", "nano-vllm", "minisgl",
)  # fmt: skip


def parts(check: Check) -> list[Part]:
    """All of them."""
    return [
        Part(name="versions", work=versions, takes_s=1),
        Part(name="memory", work=memory, takes_s=2),
        Part(name="matrix products", work=products, takes_s=3),
        Part(name="launches", work=launches, takes_s=1),
    ]


def versions(check: Check) -> Found:
    """Of everything that may matter, and the device by name."""
    found: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _told("git", "describe", "--always", "--dirty=+changes", "--abbrev=12"),
        "machine": machine.describe(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "programs": {name: bool(shutil.which(name)) for name in ("nvcc", "gcc", "g++", "ninja", "ptxas")},
        "importable": {name: util.find_spec(name) is not None for name in ("grpc", "google", "triton")},
        "shm_free_gib": round(shutil.disk_usage("/dev/shm").free / 2**30, 1) if Path("/dev/shm").is_dir() else 0,
    }
    if not check.fake:
        properties: Any = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
            "memory_gib": round(total / 2**30, 1),
            "memory_free_gib": round(free / 2**30, 1),
            "driver": _told(
                "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"
            ),
        }
    else:
        found["gpu"] = "none (fake)"
    packages = found["packages"]
    line = f"{found['gpu']}, torch {packages.get('torch')}, triton {packages.get('triton', 'missing')}"
    return Found(values=found, lines=[f"{line}, transformers {packages.get('transformers')}, Python {found['python']}"])


def memory(check: Check) -> Found:
    """Gigabytes a second: a copy (read and written), and reductions that only read."""
    numbers = 1 << (12 if check.fake else 30)
    source = torch.empty(numbers, device=check.device, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    bytes_ = source.numel() * source.element_size()
    words = source.view(torch.int32)
    rates = {
        "copy": 2 * bytes_ / device_s(lambda: target.copy_(source), check.device),
        "sum of float32": bytes_ / device_s(lambda: source.view(torch.float32).sum(), check.device),
        "max of int32": bytes_ / device_s(words.max, check.device),
        "sum of bfloat16": bytes_ / device_s(source.sum, check.device),
        "fill": bytes_ / device_s(target.zero_, check.device),
    }
    gb_s = {name: float(f"{rate / 1e9:.5g}") for name, rate in rates.items()}
    reading = max(rate for name, rate in gb_s.items() if name not in {"copy", "fill"})
    ceiling = max(gb_s["copy"], reading)
    return Found(
        values={"gb_s": gb_s, "read_gb_s": reading, "ceiling_gb_s": ceiling},
        lines=[f"memory: copies at {gb_s['copy']:,.0f} GB/s (read + written), reads at {reading:,.0f} GB/s"],
    )


def products(check: Check) -> Found:
    """bf16 matrix products of random numbers, as large as one likes; several in a row, so that the clock settles."""
    width = 64 if check.fake else 8192
    pairs = [
        tuple(torch.randn(width, width, device=check.device, dtype=torch.bfloat16) for _ in range(2)) for _ in range(2)
    ]
    out = torch.empty(width, width, device=check.device, dtype=torch.bfloat16)

    def many() -> None:
        for turn in range(2 if check.fake else 40):
            torch.matmul(*pairs[turn % 2], out=out)

    seconds = device_s(many, check.device, rounds=7) / (2 if check.fake else 40)
    rate = 2 * width**3 / seconds / 1e12
    first = 2 * width**3 / device_s(lambda: torch.matmul(*pairs[0], out=out), check.device) / 1e12
    return Found(
        values={"tflop_s": float(f"{rate:.4g}"), "single_tflop_s": float(f"{first:.4g}"), "width": width},
        lines=[f"matrix products: {rate:,.0f} TFLOP/s in bf16 ({width} wide, {first:,.0f} for one alone)"],
    )


def launches(check: Check) -> Found:
    """What a kernel that does nothing costs: one by one from Python, and in a graph."""
    small = torch.zeros(16, device=check.device)

    def many() -> None:
        for _ in range(100):
            small.add_(1)

    eager_us = device_s(many, check.device) / 100 * 1e6
    graph_us = graph_s([lambda: small.add_(1)], check.device) * 1e6
    return Found(
        values={"eager_us": round(eager_us, 2), "graph_us": round(graph_us, 2)},
        lines=[f"an empty kernel: {eager_us:.1f} µs launched from Python, {graph_us:.1f} µs in a graph"],
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _told(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]
