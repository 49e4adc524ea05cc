"""Why the command line has no connection, and what it says to type next."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import grpc
import pytest
from grpc import aio

from common.errors import Unavailable
from services.client import Server, _why, connect
from services.tls import PemFiles
from tests.certificates import Authority, Pair

AGAIN = "Is a server running there? Start one: pagewire serve"


def told(
    pair: Pair | None,
    ca: Path | None,
    host: Literal["localhost", "[::1]"] = "localhost",
    *,
    asks_whom: bytes | None = None,
) -> str:
    """What is said of a server with this certificate, or without TLS, to who trusts `ca`, or asks without TLS.

    `asks_whom`: callers must show a certificate of this authority.
    """

    async def run() -> str:
        server = aio.server()
        if pair is None:
            port = server.add_insecure_port(f"{host}:0")
        else:
            files = [(pair.key.read_bytes(), pair.cert.read_bytes())]
            credentials = grpc.ssl_server_credentials(files, asks_whom, asks_whom is not None)
            port = server.add_secure_port(f"{host}:0", credentials)
        await server.start()
        address = f"{host}:{port}"
        try:
            async with connect(
                Server(address=address, tls=PemFiles(cert=None, key=None, ca=ca) if ca else None)
            ) as client:
                with pytest.raises(Unavailable) as failed:
                    await client.is_serving()
                return str(failed.value).removeprefix(f"no connection to {address}: ")
        finally:
            await server.stop(None)

    return asyncio.run(run())


def test_a_certificate_of_somebody_elses_is_told_with_the_flag_that_names_its_authority(
    authority: Authority, stranger: Authority
) -> None:
    assert told(stranger.issue(), authority.ca) == (
        "its certificate is not trusted: unable to get local issuer certificate. If that is the right server, name the "
        "authority that signed it: --tls-ca FILE"
    )


def test_an_expired_certificate_is_told_as_that(authority: Authority) -> None:
    assert told(authority.issue("over", days=0), authority.ca) == (
        "its certificate is not trusted: certificate has expired. If that is the right server, put a new one there"
    )


@pytest.mark.parametrize(
    ("reason", "then"),
    [
        ("self-signed certificate in certificate chain", "name the authority that signed it: --tls-ca FILE"),
        ("certificate is not yet valid", "set the clock of this machine"),
        ("unsuitable certificate purpose", "make it one for servers"),
    ],
)
def test_what_is_wrong_with_a_certificate_decides_what_to_do(reason: str, then: str) -> None:
    details = f"Ssl handshake failed: SSL_ERROR_SSL: error:1000007d: CERTIFICATE_VERIFY_FAILED: {reason}: OK"

    assert _why(details, has_tls=True) == (
        f"its certificate is not trusted: {reason}. If that is the right server, {then}"
    )


def test_a_certificate_for_another_name_is_told_as_that(authority: Authority) -> None:
    why = told(authority.issue(), authority.ca, "[::1]")

    assert why == "its certificate is for another name. Call it by a name that is in there"


def test_who_forgets_tls_or_has_too_much_of_it_hears_which_flag_that_is(authority: Authority) -> None:
    forgot, too_much = told(authority.issue(), None), told(None, authority.ca)

    assert forgot == "it closed the connection. If it speaks TLS, name the authority of its certificate: --tls-ca FILE"
    assert too_much == "it speaks no TLS. If that is the right server, leave out --tls-ca"


def test_who_shows_no_certificate_where_one_is_asked_for_hears_how_to_show_one(authority: Authority) -> None:
    why = told(authority.issue(), authority.ca, asks_whom=authority.ca.read_bytes())

    assert why == (
        "it closed the connection. If it asks for a certificate, show one: --client-cert FILE --client-key FILE"
    )


@pytest.mark.parametrize("has_tls", [True, False])
def test_where_nobody_listens_a_server_can_be_started(authority: Authority, has_tls: bool) -> None:
    files = PemFiles(cert=None, key=None, ca=authority.ca) if has_tls else None

    async def run() -> str:
        async with connect(Server(address="127.0.0.1:1", tls=files)) as client:
            with pytest.raises(Unavailable) as failed:
                await client.is_serving()
            return str(failed.value)

    assert asyncio.run(run()) == f"no connection to 127.0.0.1:1: Connection refused. {AGAIN}"
