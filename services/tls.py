"""TLS from PEM files: checked at the start, in words an operator can act on, and read again when they are replaced.

A server takes new files for the next handshake, whoever dials for the next dial; connections that stand go on.
"""

from __future__ import annotations

import logging
import re
import ssl
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import grpc
from grpc import aio

from services.grpc_options import Options
from services.lifecycle import StartupError
from services.watched_files import WatchedFiles

log = logging.getLogger(__name__)

SYSTEM: Final = "system"
"""In place of a file of authorities: those that gRPC brings along."""

_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_KEY: Final = re.compile(rb"-----BEGIN ([A-Z ]*)PRIVATE KEY-----")
_SOON_S: Final = 14 * 86400.0


class CertificateError(StartupError):
    """A file of TLS cannot be used. The message says which, why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PemFiles:
    """Paths; None where the operator gave none."""

    cert: Path | None  # this end's certificate, and the chain above it
    key: Path | None  # its private key
    ca: Path | None  # authorities that the other end's certificate must come from


class Pem(NamedTuple):
    """Contents of PemFiles."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


def server_files(cert: str, key: str, ca: str, *, flags: str) -> PemFiles | None:
    """The files of a server; None when it has no TLS. Raises CertificateError for flags that need each other.

    `flags` is what their flags begin with: "--tls".
    """
    if ca and not cert:
        raise CertificateError(f"who must show a certificate must be shown one: give {flags}-cert and {flags}-key")
    return _files(cert, key, ca, flags) if cert or key else None


def channel_files(cert: str, key: str, ca: str, *, flags: str, ca_flag: str) -> PemFiles | None:
    """The files of one who dials; None when that is without TLS. Raises CertificateError."""
    if (cert or key) and not ca:
        raise CertificateError(f"{flags}-cert needs {ca_flag}: whose server may be shown the certificate?")
    return _files(cert, key, "" if ca == SYSTEM else ca, flags) if ca else None


def server_credentials(files: PemFiles) -> grpc.ServerCredentials:
    """Credentials that follow the files; with `ca`, callers must show a certificate, too. Raises CertificateError."""
    watched = WatchedFiles(_paths(files), lambda: read(files))
    given = watched.current()

    def configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
        assert pem.key is not None and pem.cert is not None, "a server without a certificate"
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called before every handshake, on a thread of gRPC's. None: as before."""
        nonlocal given
        pem = watched.current()
        if pem is given:
            return None
        given = pem
        return configuration(pem)

    return grpc.dynamic_ssl_server_credentials(
        configuration(given),
        fetch,  # type: ignore[arg-type]  # its stub knows of no None
        require_client_authentication=files.ca is not None,
    )


class Dialer:
    """Opens channels to one address, each with what the files hold by then. Raises CertificateError when it is made."""

    def __init__(self, address: str, options: Options, files: PemFiles | None = None) -> None:
        self._address = address
        self._options = options
        self._pem = WatchedFiles(_paths(files), lambda: read(files)) if files is not None else None

    def __call__(self) -> aio.Channel:
        """A new channel."""
        credentials = self.credentials()
        if credentials is None:
            return aio.insecure_channel(self._address, options=self._options)
        return aio.secure_channel(self._address, credentials, options=self._options)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """What a channel of now is opened with; None without TLS."""
        if self._pem is None:
            return None
        pem = self._pem.current()
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)


def read(files: PemFiles, *, clock: Callable[[], float] = time.time) -> Pem:
    """What the files hold, checked. Raises CertificateError."""
    cert, key, ca = (_read(path) for path in (files.cert, files.key, files.ca))
    if files.cert is not None and files.key is not None and cert is not None and key is not None:
        _check_times(files.cert, _certificates(files.cert, cert)[:1], clock())
        _check_pair(files.cert, files.key, key)
        if (_read(files.cert), _read(files.key)) != (cert, key):
            raise CertificateError(f"{files.cert} and {files.key} changed while they were read")
    if files.ca is not None and ca is not None:
        _check_times(files.ca, _certificates(files.ca, ca), clock())
    return Pem(cert, key, ca)


def validity(der: bytes) -> tuple[datetime, datetime]:
    """From when until when an X.509 certificate in DER form is valid. Raises ValueError when it is none."""
    try:
        ((_, certificate),) = _der_parts(der)
        fields = _der_parts(_der_parts(certificate)[0][1])
        has_version = fields[0][0] == 0xA0
        first, last = _der_parts(fields[3 + has_version][1])  # after the serial number, the algorithm and the issuer
        return _der_time(*first), _der_time(*last)
    except (IndexError, ValueError) as error:
        raise ValueError("not an X.509 certificate") from error


def _files(cert: str, key: str, ca: str, flags: str) -> PemFiles:
    if bool(cert) != bool(key):
        given, lacks = (f"{flags}-cert", f"{flags}-key") if cert else (f"{flags}-key", f"{flags}-cert")
        raise CertificateError(f"{given} needs {lacks}: a certificate and its private key go together")
    path = [Path(name) if name else None for name in (cert, key, ca)]
    return PemFiles(cert=path[0], key=path[1], ca=path[2])


def _paths(files: PemFiles) -> list[Path]:
    return [path for path in (files.cert, files.key, files.ca) if path is not None]


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}") from error


def _certificates(path: Path, pem: bytes) -> list[bytes]:
    """In DER form, as they stand in the file."""
    try:
        found = [ssl.PEM_cert_to_DER_cert(text.decode("ascii")) for text in _CERTIFICATE.findall(pem)]
    except ValueError:
        found = []
    if not found:
        raise CertificateError(f"{path}: no certificate in PEM form is in there (-----BEGIN CERTIFICATE-----)")
    return found


def _check_pair(cert_path: Path, key_path: Path, key: bytes) -> None:
    found = _KEY.search(key)
    if found is None:
        raise CertificateError(f"{key_path}: no private key in PEM form is in there (-----BEGIN PRIVATE KEY-----)")
    if b"ENCRYPTED" in key:
        raise CertificateError(
            f"{key_path}: the key is encrypted, and nobody is here to type its password. "
            f"Decrypt it: openssl pkey -in {key_path} -out NEW_FILE"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_path, key_path, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(f"the key in {key_path} is not that of the certificate in {cert_path}") from error
        raise CertificateError(f"{cert_path} and {key_path} cannot be used: {error.reason or 'damaged'}") from error
    except OSError as error:
        raise CertificateError(f"{cert_path} and {key_path}: {error.strerror}") from error
    if stat.S_IMODE(key_path.stat().st_mode) & stat.S_IROTH:
        log.warning("%s: every user of this machine can read this key: chmod 600 %s", key_path, key_path)


def _check_times(path: Path, certificates: list[bytes], now_s: float) -> None:
    """One of the certificates must be valid now."""
    try:
        times = [validity(der) for der in certificates]
    except ValueError as error:
        raise CertificateError(f"{path}: {error}") from error
    now = datetime.fromtimestamp(now_s, UTC)
    if not any(first <= now < last for first, last in times):
        first, last = max(times, key=lambda time: time[1])
        if now < first:
            raise CertificateError(
                f"{path}: not valid before {first:%Y-%m-%d %H:%M} UTC; is this machine's clock right?"
            )
        raise CertificateError(f"{path}: expired on {last:%Y-%m-%d %H:%M} UTC; put a new certificate there")
    last = max(last for _, last in times)
    if last.timestamp() - now_s < _SOON_S:
        log.warning("%s: expires on %s UTC", path, f"{last:%Y-%m-%d %H:%M}")


def _der_parts(der: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of the elements that stand in `der` one after another."""
    parts: list[tuple[int, bytes]] = []
    at = 0
    while at < len(der):
        tag, length = der[at], der[at + 1]
        at += 2
        if length & 0x80:  # the next bytes say how long it is
            size = length & 0x7F
            length = int.from_bytes(der[at : at + size])
            at += size
        parts.append((tag, der[at : at + length]))
        at += length
    return parts


def _der_time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == 0x17:  # UTCTime: two digits of the year, 1950 to 2049
        text = ("20" if text < "50" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
