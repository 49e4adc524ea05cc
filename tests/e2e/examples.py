"""The examples, ready to run: each is built as its first lines say, in a folder of its own, or skipped with the reason.

What they are built with is Debian's, and heavy; Python and Node are in .venv.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.cluster import ROOT
from tests.e2e.npm import NODE, node_modules

Command = tuple[str, ...]
"""What runs an example. It takes an address and a prompt."""

EXAMPLES: Final = ROOT / "examples"
_PROTOS: Final = ROOT / "protos"
_GOCODE: Final = Path("/usr/share/gocode")  # where Debian has the sources of Go's packages


def python() -> Command:
    """Nothing is to be built: the stubs are here."""
    return sys.executable, str(EXAMPLES / "python" / "stream.py")


def node(folder: Path) -> Command:
    """A copy, so that nothing is installed in the repository."""
    modules = node_modules(EXAMPLES / "node")
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns("node_modules")
    shutil.copytree(EXAMPLES / "node", copy / "examples" / "node", ignore=ignored)
    (copy / "protos").mkdir()
    shutil.copy(_PROTOS / "inference.proto", copy / "protos")
    (copy / "examples" / "node" / "node_modules").symlink_to(modules)
    return NODE, str(copy / "examples" / "node" / "stream.mjs")


def go(folder: Path) -> Command:
    """Built as Debian builds Go programs: from sources in GOPATH, with nothing downloaded."""
    packages = (
        "golang-go golang-google-grpc-dev golang-google-genproto-dev golang-google-protobuf-dev "
        "protobuf-compiler protoc-gen-go protoc-gen-go-grpc"
    )
    _need("Go", packages, programs=["go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"])
    if not (_GOCODE / "src" / "google.golang.org" / "grpc").is_dir():
        pytest.skip(f"the Go example is NOT tested: apt-get install {packages}")
    source = folder / "src" / "pagewire.example"
    (source / "pb").mkdir(parents=True)
    shutil.copy(EXAMPLES / "go" / "stream.go", source)
    module = "Minference.proto=pagewire.example/pb"
    _build(
        source,
        *("protoc", f"-I{_PROTOS}", "--go_out=pb", "--go-grpc_out=pb", "--go_opt=paths=source_relative"),
        *("--go-grpc_opt=paths=source_relative", f"--go_opt={module}", f"--go-grpc_opt={module}", "inference.proto"),
    )
    settings = {
        "GO111MODULE": "off",
        "GOPATH": f"{folder}:{_GOCODE}",
        "GOCACHE": str(folder / "cache"),
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
    }
    _build(source, "go", "build", "-o", "stream", ".", settings=settings)
    return (str(source / "stream"),)


def cpp(folder: Path) -> Command:
    """Built by the example's own Makefile."""
    packages = "g++ pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc"
    _need("C++", packages, programs=["make", "g++", "pkg-config", "protoc", "grpc_cpp_plugin"])
    if subprocess.run(["pkg-config", "--exists", "grpc++", "protobuf"], check=False).returncode:
        pytest.skip(f"the C++ example is NOT tested: apt-get install {packages}")
    copy = shutil.copytree(EXAMPLES / "cpp", folder / "cpp")
    _build(copy, "make", f"PROTOS={_PROTOS}")
    return (str(copy / "stream"),)


def ruby(folder: Path) -> Command:
    """Only its stubs are made."""
    packages = "ruby ruby-grpc protobuf-compiler protobuf-compiler-grpc"
    _need("Ruby", packages, programs=["ruby", "protoc", "grpc_ruby_plugin"])
    found = subprocess.run(["ruby", "-e", "require 'grpc'; require 'google/rpc/status_pb'"], check=False)
    if found.returncode:
        pytest.skip(f"the Ruby example is NOT tested: apt-get install {packages}")
    plugin = shutil.which("grpc_ruby_plugin")
    _build(
        folder,
        *("protoc", f"-I{_PROTOS}", "--ruby_out=.", "--grpc_out=.", f"--plugin=protoc-gen-grpc={plugin}"),
        "inference.proto",
    )
    return "ruby", "-I", str(folder), str(EXAMPLES / "ruby" / "stream.rb")


def _need(language: str, packages: str, *, programs: list[str]) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: the {language} example is NOT tested. It needs {packages}")


def _build(folder: Path, *command: str, settings: Mapping[str, str] | None = None) -> None:
    """Run one step of a build; what it says is part of the failure."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **(settings or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
