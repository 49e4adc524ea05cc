"""`doctor`: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import ModelFolderError
from common.model_folder import read_model_folder
from services.lifecycle import split_address
from services.model_store import find


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `mend` is empty when all is well."""

    what: str
    is_well: bool
    detail: str
    mend: str = ""


def examine(model: str, listen: str) -> Iterator[Finding]:
    """Look at everything that a scheduler and an executor need here, last at the model and the address to listen on.

    Raises ModelFolderError and StartupError for a `model` or `listen` that can be none.
    """
    folder, address = find(model), split_address(listen)
    version = platform.python_version()
    yield Finding("Python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")
    yield Finding("processors", True, f"{os.cpu_count()}")
    yield _memory()
    for package in ("grpcio", "protobuf", "tokenizers", "uvloop"):
        yield _package(package, "make setup")
    for package in ("torch", "transformers"):
        yield _package(package, "make setup (only executors need it)")
    yield _gpu()
    yield _model(model, folder)
    yield _port(listen, *address)


def report(findings: Iterator[Finding]) -> bool:
    """Print the findings as they come. True when all is well."""
    well = True
    for finding in findings:
        well &= finding.is_well
        print(f"{'ok  ' if finding.is_well else 'BAD '} {finding.what:<14} {finding.detail}")
        if not finding.is_well and finding.mend:
            print(f"     {'':<14} → {finding.mend}")
    return well


def _memory() -> Finding:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return Finding("memory", True, "unknown on this system")
    return Finding("memory", free > 2 << 30, f"{free / (1 << 30):.1f} GiB available", "free at least 2 GiB")


def _package(name: str, mend: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", mend)


def _gpu() -> Finding:
    if not shutil.which("nvidia-smi"):
        return Finding("GPU", True, "none; the CPU is used")
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))):  # makes what launches Triton's kernels
        return Finding("GPU", False, "NVIDIA driver found, but no C compiler; Triton needs one", "apt-get install gcc")
    return Finding("GPU", True, "NVIDIA driver found")


def _model(model: str, path: Path | None) -> Finding:
    if path is None:
        return Finding("model", False, f"{model} is not here yet", f"pagewire pull {model}")
    try:
        folder = read_model_folder(path)
    except ModelFolderError as error:
        return Finding("model", False, str(error))  # says itself what to type
    return Finding("model", True, f"{folder.name}, {folder.architecture}, context {folder.max_model_len}, {path}")


def _port(listen: str, host: str, port: int) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding("port", False, f"{listen}: {error.strerror}", "stop what runs there, or use --listen")
    return Finding("port", True, f"{listen} is free")
