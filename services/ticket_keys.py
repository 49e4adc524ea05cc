"""Where the keys of tickets lie: a file with a line `id:hex` for each, the newest first. It signs; all of them verify.

To rotate, put a new key in front on every scheduler and restart them in turn; drop the old one after a ticket's
lifetime. Schedulers that share the file go on with each other's streams.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from pathlib import Path

from services.lifecycle import StartupError
from services.tickets import KEY_BYTES, MAX_KEY_ID_BYTES, TicketKey

_log = logging.getLogger(__name__)

_LIVE = 2  # keys that `rotate` leaves in a file


def new_key() -> TicketKey:
    """A key of random bytes."""
    return TicketKey(id=secrets.token_hex(MAX_KEY_ID_BYTES // 2), secret=secrets.token_bytes(KEY_BYTES))


def line_of(key: TicketKey) -> str:
    """The key as it stands in a file."""
    return f"{key.id}:{key.secret.hex()}\n"


def read_or_make(path: Path) -> list[TicketKey]:
    """The keys in the file, which is made with one key where there is none.

    Raises StartupError when others may read the file, it is not ours, or a line in it is no key.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another scheduler was first: its key is the key
                _write(path, [new_key()], replace=False)
                _log.info("made a key for tickets: %s", path)
        except OSError as error:
            raise StartupError(f"{path}: cannot be made ({error.strerror}). Type: --ticket-keys FILE") from error
    return read(path)


def read(path: Path) -> list[TicketKey]:
    """The keys in the file. Raises StartupError as `read_or_make` does."""
    try:
        status = path.stat()
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path}: cannot be read as a file of keys: {error}") from error
    if status.st_mode & 0o077 and status.st_uid == os.geteuid():
        raise StartupError(f"{path}: others may read or write this file. Type: chmod 600 {path}")
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise StartupError(f"{path}: another user could change this file. Make one of your own: pagewire key FILE")
    keys = [_parse(path, number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not keys:
        raise StartupError(f"{path}: there is no key in it. Type: pagewire key {path}")
    return keys


def rotate(path: Path) -> TicketKey:
    """Put a new key in front, and keep the one that signed until now; make the file where there is none."""
    key = new_key()
    old = read(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, [key, *old][:_LIVE], replace=True)
    return key


def _parse(path: Path, number: int, line: str) -> TicketKey:
    id, _, text = line.strip().partition(":")
    with contextlib.suppress(ValueError):
        secret = bytes.fromhex(text)
        if id.isalnum() and len(id) <= MAX_KEY_ID_BYTES and len(secret) == KEY_BYTES:
            return TicketKey(id=id, secret=secret)
    raise StartupError(  # the line itself may be a key, mistyped: it is not shown
        f"{path}, line {number}: not ID:HEX, with an id of at most {MAX_KEY_ID_BYTES} letters and digits and "
        f"{2 * KEY_BYTES} hex digits. Type: pagewire key"
    )


def _write(path: Path, keys: list[TicketKey], *, replace: bool) -> None:
    """All at once, so that nobody reads half of it. Raises FileExistsError unless it may `replace` what is there."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ticket-keys-") as folder:
        arrived = Path(folder) / "keys"
        descriptor = os.open(arrived, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.writelines(line_of(key) for key in keys)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            arrived.replace(path)
        else:
            os.link(arrived, path)
