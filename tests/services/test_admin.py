"""The operator's socket: where it lies, and who can open it."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest
from grpc import aio

from services.admin import admin_address, bind_admin, find_admin, path_of
from services.lifecycle import StartupError


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's runtime folder."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like /tmp, and no runtime folder."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def bind(address: str) -> aio.Server:
    server = aio.server()
    bind_admin(server, address)
    await server.start()
    return server


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_scheduler_is_found_by_the_port_that_clients_use(runtime: Path) -> None:
    address = admin_address("", "0.0.0.0:50051")
    assert address == f"unix:{runtime}/pagewire/admin-50051.sock"

    async def scenario() -> None:
        server = await bind(str(address))
        assert find_admin("127.0.0.1:50051") == find_admin("[::1]:50051") == address
        await server.stop(0)

    asyncio.run(scenario())


def test_it_is_this_users_alone(runtime: Path, shared: Path) -> None:
    for address in (admin_address("", "127.0.0.1:1"), f"unix:{shared}/mine", f"unix://{shared}/my-other"):
        assert address is not None

        async def scenario(address: str = address) -> None:
            umask = os.umask(0)
            os.umask(umask)
            server = await bind(address)
            assert mode_of(path_of(address)) == 0o600
            assert os.umask(umask) == umask, "new files have the rights that they had before"
            await server.stop(0)

        asyncio.run(scenario())
    assert mode_of(shared / f"pagewire-{os.geteuid()}") == 0o700


def test_where_there_is_no_runtime_folder_it_lies_among_temporary_files(shared: Path) -> None:
    assert admin_address("", "127.0.0.1:7") == f"unix:{shared}/pagewire-{os.geteuid()}/admin-7.sock"


def test_a_folder_that_others_can_open_is_not_used(shared: Path) -> None:
    folder = shared / f"pagewire-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(StartupError, match=r"others can open it. Remove it, or choose: --admin-listen unix:PATH"):
        admin_address("", "127.0.0.1:7")


def test_a_link_that_somebody_laid_is_not_followed(shared: Path) -> None:
    (shared / "elsewhere").mkdir(mode=0o700)
    (shared / f"pagewire-{os.geteuid()}").symlink_to("elsewhere")
    with pytest.raises(StartupError, match="others can open it"):
        admin_address("", "127.0.0.1:7")


def test_a_second_scheduler_does_not_take_the_firsts(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = await bind(f"unix:{tmp_path}/a")
        with pytest.raises(StartupError, match="another scheduler's admin socket"):
            await bind(f"unix:{tmp_path}/a")
        await server.stop(0)

    asyncio.run(scenario())


def test_one_that_a_killed_scheduler_left_behind_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "a"))

    async def scenario() -> None:
        await (await bind(f"unix:{tmp_path}/a")).stop(0)

    asyncio.run(scenario())


def test_an_address_of_the_operators_own_is_a_unix_socket_or_none(tmp_path: Path) -> None:
    assert admin_address("none", "127.0.0.1:7") is None
    assert admin_address(f"unix:{tmp_path}/a", "127.0.0.1:7") == f"unix:{tmp_path}/a"
    assert admin_address("", "unix:/run/clients") == "unix:/run/clients.admin"
    with pytest.raises(StartupError, match="give unix:PATH, or none"):
        admin_address("127.0.0.1:50053", "127.0.0.1:7")


def test_where_it_cannot_be_made_one_line_says_so(tmp_path: Path) -> None:
    for bad in (tmp_path / "no" / "folder", tmp_path / ("long" * 40)):
        with pytest.raises(StartupError, match="cannot listen on"):
            asyncio.run(bind(f"unix:{bad}"))


def test_who_asks_where_nobody_is_hears_what_to_type(runtime: Path) -> None:
    with pytest.raises(
        StartupError, match=r"no scheduler of this user serves clients on 127.0.0.1:9: .*pagewire serve"
    ):
        find_admin("127.0.0.1:9")
    with pytest.raises(StartupError, match="is on another machine"):
        find_admin("example.org:50051")
