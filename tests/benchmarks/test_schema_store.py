"""Which schemas are let in: of a folder, of a wheel, and the real ones that come with setuptools."""

from __future__ import annotations

import importlib
import json
import sqlite3
import struct
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from tests.benchmarks.schema_store import kind_of, main, pickled_items, stored
from tests.e2e import fake_model


def pickled(items: dict[str, bytes | str]) -> bytes:
    """A dictionary as Python pickles it, protocol 4, written by hand."""
    parts = [b"\x80\x04}\x94("]
    for key, value in items.items():
        parts.append(b"\x8c" + bytes([len(key)]) + key.encode() + b"\x94")
        if isinstance(value, bytes):
            parts.append(b"B" + struct.pack("<I", len(value)) + value + b"\x94")
        else:
            parts.append(b"X" + struct.pack("<I", len(value.encode())) + value.encode() + b"\x94")
    return b"".join([*parts, b"u."])


def test_a_pickle_is_taken_apart_and_not_run() -> None:
    kept: dict[str, bytes | str] = {"_content": b"{}", "url": "https://example.com/a.json", "reason": "OK"}

    assert pickled_items(pickled(kept)) == kept
    evil = b"\x80\x04c" + b"builtins\nexit\n" + b"(tR."
    assert pickled_items(evil) == {}


def test_the_schemas_of_a_wheel_are_what_was_fetched_but_its_catalog(tmp_path: Path) -> None:
    cache = tmp_path / "cache.sqlite"
    with closing(sqlite3.connect(cache)) as database, database:
        database.execute("CREATE TABLE responses (key TEXT, value BLOB)")
        for name, content in (
            ("b", b'{"type": "null"}'),
            ("a", b"\xef\xbb\xbf{}"),
            ("x", b"<html>"),
            ("catalog", b"{}"),
        ):
            value = pickled({"_content": content, "url": f"https://example.com/{name}.json?key=secret"})
            database.execute("INSERT INTO responses VALUES (?, ?)", (name, value))
    wheel = tmp_path / "store.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(cache, "schemastore/cache.sqlite")

    assert stored(wheel) == {"example.com/a.json": "{}", "example.com/b.json": '{"type": "null"}'}


def test_what_is_refused_is_named_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, store = fake_model.write(tmp_path / "fake"), tmp_path / "store"
    store.mkdir()
    (real,) = (Path(place) / "config" for place in importlib.import_module("setuptools").__path__)
    schemas = {path.name.partition(".")[0]: path.read_text() for path in real.glob("*.schema.json")}
    schemas["large"] = json.dumps({"title": "x" * 65_536})
    schemas["open"] = json.dumps({"type": "array", "items": {"type": "integer"}})
    for name, text in schemas.items():
        (store / f"{name}.json").write_text(text)

    main([str(store), "--model", str(model), "--all", "--cpu-s", "5"])

    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith(" of 4 are let in")  # the real ones change with setuptools
    assert "    1  too large: large" in told
    assert not any("open" in line.split(": ")[-1].split(", ") for line in told)


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        ("at most 65536 bytes, got 99999", "too large"),
        ("must take at most 0.25 s and 512 MiB to compile", "takes too long, or too much memory"),
        ('Unimplemented keys: ["not"]', 'Unimplemented keys: ["not"]'),
        ("Unknown thing 'a' at 17", "Unknown thing … at N"),
        ("cannot fetch https://example.com/x.json now", "cannot fetch URL now"),
    ],
)
def test_reasons_of_one_kind_are_counted_together(problem: str, kind: str) -> None:
    assert kind_of(problem) == kind
