"""What `doctor` says of a machine with a GPU; tests/e2e/test_commands.py has the command itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.doctor import Finding, examine


def gpu(path: Path, monkeypatch: pytest.MonkeyPatch, *programs: str) -> Finding:
    """What is found where these programs are all that there are."""
    for program in programs:
        (path / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.delenv("CC", raising=False)
    (finding,) = [each for each in examine("smollm2", "127.0.0.1:0") if each.what == "GPU"]
    return finding


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_gpu_with_a_compiler_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    assert gpu(tmp_path, monkeypatch, "nvidia-smi", compiler).is_well


def test_a_gpu_without_a_compiler_is_not_for_triton_makes_its_way_to_the_driver_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gpu(tmp_path, monkeypatch, "nvidia-smi")

    assert not found.is_well and "C compiler" in found.detail
    assert found.mend == "apt-get install gcc"


def test_a_machine_without_a_gpu_wants_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu(tmp_path, monkeypatch).is_well
