"""The gateway's certificates and whom it trusts, which may change while it serves."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from pathlib import Path

import pytest

from services import tls, watched_files
from services.gateway import process
from tests.certificates import Authority, Pair
from tests.services.served import HANG_S


def _context(server_ca: Path, pair: Pair) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=server_ca)
    context.load_cert_chain(pair.cert, pair.key)
    return context


async def _is_let_in(context: ssl.SSLContext, port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        writer.write(b"x")
        is_let_in = await reader.read(1) == b"y"
        writer.close()
    except (OSError, ssl.SSLError):
        return False
    return is_let_in


def _session(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
    """What another connection can begin with in place of a certificate; None where this one was not let in."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=session) as secret,
    ):
        try:
            secret.sendall(b"x")
            return secret.session if secret.recv(1) == b"y" else None
        except OSError:
            return None


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if await reader.read(1):
        writer.write(b"y")
    writer.close()


def test_an_authority_that_is_replaced_is_not_trusted_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_LOOK_S", 0.01)
    monkeypatch.setattr(watched_files, "_LOOK_EVERY_S", 0.0)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old, new, trusted = Authority(tmp_path / "old"), Authority(tmp_path / "new"), tmp_path / "trusted.crt"
    server = old.issue("server")
    olds, news = _context(old.ca, old.issue("client")), _context(old.ca, new.issue("client"))
    shutil.copy(old.ca, trusted)

    async def run() -> None:
        files = tls.server_files(str(server.cert), str(server.key), str(trusted), flags="--http-tls")
        context, follow = process._tls(files)
        following = asyncio.create_task(follow())
        async with await asyncio.start_server(_answer, "127.0.0.1", 0, ssl=context) as listening:
            port = listening.sockets[0].getsockname()[1]

            async def let_in() -> tuple[bool, bool]:
                return await _is_let_in(olds, port), await _is_let_in(news, port)

            assert await let_in() == (True, False)
            session = await asyncio.to_thread(_session, olds, port)
            assert session is not None
            shutil.copy(new.ca, trusted)
            async with asyncio.timeout(HANG_S):
                while await _is_let_in(olds, port):
                    pass
            assert await let_in() == (False, True)
            assert await asyncio.to_thread(_session, olds, port, session) is None
        following.cancel()

    asyncio.run(run())
