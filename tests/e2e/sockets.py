"""What a process listens on, as the kernel tells."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import struct
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"


def listening(pid: int) -> set[str]:
    """IP addresses with ports that the process listens on, TCP and UDP."""
    inodes = set(_inodes(pid))
    found: set[str] = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in inodes and (words[3] == _LISTEN or table.startswith("udp")):
                host, _, port = words[1].partition(":")
                found.add(f"{_address(host)}:{int(port, 16)}")
    return found


def _inodes(pid: int) -> Iterator[str]:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(fd.readlink())):
                yield match[1]


def _address(digits: str) -> str:
    """An address of the kernel's tables: 32-bit words, each in the machine's own order."""
    words = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
