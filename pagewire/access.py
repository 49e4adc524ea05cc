"""How a client shows who it is, and knows whom it speaks to: an API key and certificates, read when it is made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from pagewire.borrowed import borrow

if TYPE_CHECKING:
    from common import addresses
else:
    addresses = borrow("common.addresses")

API_KEY: Final = "PAGEWIRE_API_KEY"
"""The environment's variable for the key of a client that is given none."""

SYSTEM: Final = "system"
"""In place of a file of authorities: the public ones, which gRPC brings along."""

_NAME: Final = re.compile(r"[a-z0-9_.-]+")

Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What each call shows, and what each channel is opened with; no credentials: without TLS."""

    metadata: Metadata
    credentials: grpc.ChannelCredentials | None


def access(
    servers: Sequence[str],
    *,
    api_key: str | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    insecure: bool = False,
    credentials: grpc.ChannelCredentials | None = None,
    metadata: Metadata = (),
    environment: Mapping[str, str] = os.environ,
) -> Access:
    """What a client of these servers was given, checked.

    Without `api_key` the environment's is taken, unless `metadata` has an `authorization`. An empty one is none.
    Raises ValueError for what does not fit together, and for a key that would go over a network in the clear: never to
    another machine without TLS, unless `insecure`. Raises OSError for a file that cannot be read.
    """
    if credentials is not None and (tls_ca or tls_cert or tls_key):
        raise ValueError("credentials say it all: tls_ca, tls_cert and tls_key do not go with them")
    if bool(tls_cert) != bool(tls_key):
        raise ValueError("tls_cert and tls_key go together: a certificate and its private key")
    if tls_cert and not tls_ca:
        raise ValueError(f"tls_cert needs tls_ca, the authorities for the server's certificate: a file, or {SYSTEM!r}")
    if tls_ca:
        credentials = grpc.ssl_channel_credentials(
            None if tls_ca == SYSTEM else Path(tls_ca).read_bytes(),
            Path(tls_key).read_bytes() if tls_key else None,
            Path(tls_cert).read_bytes() if tls_cert else None,
        )
    metadata = tuple((name.lower(), value) for name, value in metadata)  # gRPC takes no others
    for name, value in metadata:
        _check_metadata(name, value)
    shown = any(name == "authorization" for name, _ in metadata)
    if api_key and shown:
        raise ValueError("api_key and an authorization in metadata: give one of them")
    key, origin = (api_key, "the API key") if api_key is not None or shown else (environment.get(API_KEY), API_KEY)
    if not key:
        return Access(metadata=metadata, credentials=credentials)
    if not _is_printable(key) or " " in key:  # gRPC would repeat it in its complaint
        raise ValueError(f"{origin} is no key: printable ASCII without spaces is needed")
    if credentials is None and not insecure:
        open_to = [server for server in servers if not _is_local(server)]
        if open_to:
            raise ValueError(
                f"{origin} is not sent to {open_to[0]} without TLS: give tls_ca, or say insecure=True if the network "
                f"itself is trusted"
            )
    return Access(metadata=(*metadata, ("authorization", f"Bearer {key}")), credentials=credentials)


def _check_metadata(name: str, value: str | bytes) -> None:
    """Raise ValueError for what gRPC does not take. Values are not shown: they may be keys."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"metadata cannot be called {name!r}: letters, digits, _, - and . are needed")
    if name.endswith("-bin"):  # for bytes of any kind
        return
    if not _is_printable(value if isinstance(value, str) else value.decode("latin-1")):
        raise ValueError(f"the value of the metadata {name!r} cannot be sent: printable ASCII is needed")


def _is_printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _is_local(server: str) -> bool:
    try:
        return addresses.is_local(server)
    except ValueError:  # a name of gRPC's own kind, which may lead anywhere
        return False
