"""Certificates for tests, made by the openssl command, and by no means kept."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Pair(NamedTuple):
    """A certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates for localhost; `ca` is what to trust. Skips its tests where there is no openssl."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed: TLS is NOT tested")
        self._folder = folder
        self.ca, self._key = folder / "ca.crt", folder / "ca.key"
        _openssl("req", "-x509", *_NEW_KEY, "-days", "60", "-keyout", self._key, "-out", self.ca, "-subj", "/CN=Test")

    def issue(self, name: str = "end", *, days: int = 60) -> Pair:
        """A new certificate with a new key."""
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        _openssl("req", *_NEW_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
        signer = ("-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-days", str(days), "-extfile", extensions)
        _openssl("x509", "-req", "-in", request, "-out", pair.cert, *signer)
        return pair


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
