"""k6, which loads gRPC servers, against a scheduler: unary calls and streams side by side, none of which may fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import ROOT, Cluster
from tests.e2e.programs import run

K6 = Path(sys.executable).with_name("k6")
LOAD = str(ROOT / "tests" / "clients" / "load.js")

pytestmark = pytest.mark.skipif(not K6.exists(), reason="k6 is not installed: make clients")


@pytest.mark.parametrize(("served", "tokens"), [("shared", 32), ("smollm", 4)], ids=["fake model", "default model"])
def test_k6_finds_no_call_and_no_stream_that_fails(
    served: str, tokens: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    running: Cluster = request.getfixturevalue(served)
    summary = tmp_path / "summary.json"
    settings = {"ADDRESS": running.address, "USERS": "8", "SECONDS": "3", "TOKENS": str(tokens)}
    flags = [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]
    ended = run(str(K6), "run", "--quiet", "--no-usage-report", "--summary-export", str(summary), *flags, LOAD)

    assert ended.code == 0, ended.out + ended.err
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics["checks"]["fails"] == 0 and metrics["checks"]["passes"] > 0
    assert metrics["output_tokens"]["count"] > 0
    assert {"unary_answer", "streamed_answer", "time_to_first_token"} <= set(metrics)
