"""Certificates: what is said of bad ones at the start, and who gets through a handshake."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc import aio

from services import tls
from services.tls import CertificateError, Dialer, PemFiles, read
from tests.certificates import Authority, Pair
from tests.services.served import HANG_S

DAY_S = 86400.0


def files(pair: Pair | None = None, ca: Path | None = None) -> PemFiles:
    return PemFiles(cert=pair.cert if pair else None, key=pair.key if pair else None, ca=ca)


def refusal(pem: PemFiles, *, in_days: float = 0) -> str:
    now_s = datetime.now(UTC).timestamp() + in_days * DAY_S
    with pytest.raises(CertificateError) as refused:
        read(pem, clock=lambda: now_s)
    return str(refused.value)


# ---- files


def test_good_files_are_read_whole(authority: Authority) -> None:
    pair = authority.issue("good")

    assert read(files(pair, authority.ca)) == (
        pair.cert.read_bytes(),
        pair.key.read_bytes(),
        authority.ca.read_bytes(),
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(files(ca=tmp_path / "ca")) == f"{tmp_path}/ca: No such file or directory"


def test_a_file_that_is_not_pem_is_named(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("pem")
    for bad in (
        b"",
        b"\x30\x82 DER",
        pair.key.read_bytes(),
        b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----",
    ):
        (tmp_path / "bad").write_bytes(bad)
        assert refusal(files(ca=tmp_path / "bad")).startswith(f"{tmp_path}/bad: no"), bad
        assert f"{tmp_path}/bad: no" in refusal(files(Pair(tmp_path / "bad", pair.key)))
    (tmp_path / "bad").write_bytes(pair.cert.read_bytes())
    assert refusal(files(Pair(pair.cert, tmp_path / "bad"))).startswith(f"{tmp_path}/bad: no private key in PEM form")


def test_a_key_of_another_certificate_is_found_out(authority: Authority) -> None:
    one, other = authority.issue("one"), authority.issue("other")

    assert refusal(files(Pair(one.cert, other.key))) == (
        f"the key in {other.key} is not that of the certificate in {one.cert}"
    )


def test_an_encrypted_key_is_refused_before_anybody_is_asked_for_its_password(
    authority: Authority, tmp_path: Path
) -> None:
    pair = authority.issue("locked")
    locked = tmp_path / "locked.key"
    flags = ["-in", str(pair.key), "-out", str(locked), "-aes256", "-passout", "pass:secret"]
    subprocess.run(["openssl", "pkey", *flags], check=True, capture_output=True)

    assert "openssl pkey -in" in refusal(files(Pair(pair.cert, locked)))


def test_an_expired_certificate_is_refused_with_its_date(authority: Authority) -> None:
    pair = authority.issue("expiring")
    _, last = tls.validity(ssl.PEM_cert_to_DER_cert(pair.cert.read_text()))

    told = f"{pair.cert}: expired on {last:%Y-%m-%d %H:%M} UTC; put a new certificate there"
    assert refusal(files(pair), in_days=61) == told
    assert refusal(files(ca=authority.ca), in_days=61).startswith(f"{authority.ca}: expired on ")


def test_a_certificate_of_the_future_makes_one_doubt_the_clock(authority: Authority) -> None:
    assert refusal(files(authority.issue("early")), in_days=-1).endswith("is this machine's clock right?")


def test_the_times_of_a_certificate_are_what_openssl_says(authority: Authority) -> None:
    pair = authority.issue("dated", days=20000)  # beyond 2049 years have four digits
    said = subprocess.run(
        ["openssl", "x509", "-in", pair.cert, "-noout", "-enddate"], check=True, capture_output=True, text=True
    ).stdout.strip()
    expected = datetime.strptime(said, "notAfter=%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
    first, last = tls.validity(ssl.PEM_cert_to_DER_cert(pair.cert.read_text()))

    assert last == expected
    assert last - first == timedelta(days=20000)


@pytest.mark.parametrize("der", [b"", b"\x30", b"\x30\x03\x02\x01", b"\x30\x82", b"\x05\x00" * 9])
def test_what_is_no_certificate_has_no_times(der: bytes) -> None:
    with pytest.raises(ValueError, match=r"not an X\.509 certificate"):
        tls.validity(der)


def test_a_key_that_everybody_can_read_is_warned_of(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pair = authority.issue("open")
    pair.key.chmod(0o644)
    read(files(pair))

    assert f"chmod 600 {pair.key}" in caplog.text


@pytest.mark.parametrize(
    ("cert", "key", "ca", "problem"),
    [
        ("c", "", "", "--tls-cert needs --tls-key"),
        ("", "k", "", "--tls-key needs --tls-cert"),
        ("", "", "a", "give --tls-cert and --tls-key"),
    ],
)
def test_flags_of_a_server_that_need_each_other_say_so(cert: str, key: str, ca: str, problem: str) -> None:
    with pytest.raises(CertificateError, match=problem):
        tls.server_files(cert, key, ca, flags="--tls")


def test_a_certificate_is_shown_to_nobody_who_is_not_known() -> None:
    with pytest.raises(CertificateError, match="--client-cert needs --tls-ca"):
        tls.channel_files("c", "k", "", flags="--client", ca_flag="--tls-ca")


def test_without_flags_there_is_no_tls() -> None:
    assert tls.server_files("", "", "", flags="--tls") is None
    assert tls.channel_files("", "", "", flags="--client", ca_flag="--tls-ca") is None


# ---- handshakes


@asynccontextmanager
async def served(pem: PemFiles) -> AsyncIterator[str]:
    """The address of a server that echoes."""
    server = aio.server()

    async def echo(data: bytes, _: object) -> bytes:
        return data

    method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Echo": method}),))
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(pem))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def echoes(address: str, pem: PemFiles | None) -> bool:
    """Whether a call over a new connection comes through."""
    async with Dialer(address, (("grpc.use_local_subchannel_pool", 1),), pem)() as channel:
        call: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Echo/Echo")
        try:
            return await call(b"x", timeout=HANG_S) == b"x"
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False


def test_only_who_trusts_the_servers_authority_gets_through(authority: Authority, stranger: Authority) -> None:
    async def scenario() -> None:
        async with served(files(authority.issue("server"))) as address:
            assert await echoes(address, files(ca=authority.ca))
            assert not await echoes(address, files(ca=stranger.ca))
            assert not await echoes(address, None)

    asyncio.run(scenario())


def test_with_an_authority_for_callers_only_its_certificates_get_through(
    authority: Authority, stranger: Authority
) -> None:
    async def scenario() -> None:
        async with served(files(authority.issue("server"), authority.ca)) as address:
            assert await echoes(address, files(authority.issue("caller"), authority.ca))
            assert not await echoes(address, files(ca=authority.ca))
            assert not await echoes(address, files(stranger.issue("caller"), authority.ca))

    asyncio.run(scenario())


def test_new_files_serve_the_next_handshake_and_standing_connections_go_on(
    authority: Authority, stranger: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.watched_files._LOOK_EVERY_S", 0.0)
    pair, old, new = Pair(tmp_path / "crt", tmp_path / "key"), authority.issue("old"), stranger.issue("new")

    def put(new: Pair) -> None:
        for source, target in zip(new, pair, strict=True):
            shutil.copy(source, target)

    async def scenario() -> None:
        put(old)
        async with served(files(pair)) as address, Dialer(address, (), files(ca=authority.ca))() as channel:
            standing: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Echo/Echo")
            assert await standing(b"1", timeout=HANG_S) == b"1"
            put(new)
            assert await echoes(address, files(ca=stranger.ca))
            assert not await echoes(address, files(ca=authority.ca))
            assert await standing(b"2", timeout=HANG_S) == b"2"
            shutil.copy(old.key, pair.key)  # half of an exchange, or a broken one: the new ones stay
            assert await echoes(address, files(ca=stranger.ca))
            put(old)
            assert await echoes(address, files(ca=authority.ca))

    asyncio.run(scenario())


def test_who_dials_shows_new_files_at_the_next_dial(
    authority: Authority, stranger: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.watched_files._LOOK_EVERY_S", 0.0)
    ca = tmp_path / "ca"
    shutil.copy(stranger.ca, ca)

    async def scenario() -> None:
        async with served(files(authority.issue("server"))) as address:
            dial = Dialer(address, (("grpc.use_local_subchannel_pool", 1),), files(ca=ca))
            results: list[object] = []
            for authorities in (stranger.ca, authority.ca):
                shutil.copy(authorities, ca)
                async with dial() as channel:
                    call: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Echo/Echo")
                    try:
                        results.append(await call(b"x", timeout=HANG_S))
                    except aio.AioRpcError as error:
                        results.append(error.code())
            assert results == [grpc.StatusCode.UNAVAILABLE, b"x"]

    asyncio.run(scenario())
