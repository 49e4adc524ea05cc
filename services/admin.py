"""The operator's socket: what a scheduler tells of all tenants together is asked for there, and nowhere else.

A Unix socket that only the scheduler's own user can open. `pagewire status` finds it by the port that clients use.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from grpc import aio

from services.lifecycle import StartupError, is_local, split_address

NONE: Final = "none"
"""In place of an address: no socket."""


def admin_address(configured: str, listen: str) -> str | None:
    """Where to listen: as configured, or by default in the user's runtime folder, named by the clients' address.

    Raises StartupError when that can be no socket of this user's alone.
    """
    if configured == NONE:
        return None
    if configured:
        if not configured.startswith("unix:"):
            raise StartupError(f"--admin-listen {configured}: give unix:PATH, or {NONE}")
        return configured
    return f"unix:{_made(_folders(os.environ)[0]) / _name(listen)}" if not _is_unix(listen) else f"{listen}.admin"


def find_admin(address: str) -> str:
    """The admin socket of the scheduler that serves clients on `address`. Raises StartupError when none is there."""
    if _is_unix(address):
        return address
    if not is_local(address):
        raise StartupError(f"{address} is on another machine: ask there, an operator's socket never leaves its machine")
    paths = [folder / _name(address) for folder in _folders(os.environ)]
    for path in paths:
        if path.exists():
            return f"unix:{path}"
    raise StartupError(
        f"no scheduler of this user serves clients on {address}: {paths[0]} is not there. Start one: pagewire serve. "
        f"Or name its --admin-listen in place of the address: unix:PATH"
    )


def bind_admin(server: aio.Server, address: str) -> None:
    """Listen on a socket that this user alone can open. Raises StartupError when it is another's already."""
    path = path_of(address)
    if _answers(path):  # gRPC would take it away from there
        raise StartupError(f"{path}: another scheduler's admin socket. Choose another: --admin-listen unix:PATH")
    before = os.umask(0o177)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {path}: its folder must be there, writable, and its name at most 107 bytes long. "
            f"Choose another: --admin-listen unix:PATH, or {NONE}"
        ) from error
    finally:
        os.umask(before)


def path_of(address: str) -> Path:
    """The path in unix:PATH or unix:///PATH."""
    return Path(address.removeprefix("unix:").removeprefix("//"))


def _is_unix(address: str) -> bool:
    return address.startswith("unix:")


def _name(address: str) -> str:
    return f"admin-{split_address(address)[1]}.sock"


def _folders(environment: Mapping[str, str]) -> list[Path]:
    """Where the socket may lie, the best place first."""
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    shared = Path(tempfile.gettempdir()) / f"pagewire-{os.geteuid()}"
    return [Path(runtime) / "pagewire", shared] if runtime and Path(runtime).is_dir() else [shared]


def _made(folder: Path) -> Path:
    """The folder, made if it was not there, and nobody else's. In /tmp anybody may have been first."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise StartupError(f"{folder}: {error.strerror}. Choose: --admin-listen unix:PATH, or {NONE}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise StartupError(f"{folder}: others can open it. Remove it, or choose: --admin-listen unix:PATH, or {NONE}")
    return folder


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:  # nothing there, or left behind by one that died
            return False
    return True
