"""What dashboards, alerts and autoscaling ask for is what a live gateway tells; and promtool has nothing against it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway
from tests.house.observed import DASHBOARDS, OBSERVABILITY, ROOT, alerts, labels_in, metrics_in, panels, queries, told

ADDED = frozenset({"instance", "job", "namespace"})
"""Labels that Prometheus adds to what it reads."""

UNSEEN = frozenset({"limit"})
"""Labels of what did not happen here: a request that was refused."""


def test_every_query_asks_for_what_a_live_gateway_tells(shared: Cluster, tmp_path: Path) -> None:
    with Gateway(shared.address, tmp_path / "log", f"--http-admin={shared.admin}") as gateway:
        asked = {"model": "", "prompt": [1, 2, 3], "max_tokens": 4}
        assert gateway.post("/v1/completions", asked).status == 200
        metrics, labels = told(gateway.get("/metrics").text())

    asked_for = {name for _, query in queries() for name in metrics_in(query)}
    assert len(asked_for) > 25
    assert {f"{where}: {name}" for where, query in queries() for name in metrics_in(query) - metrics} == set()
    assert {name for _, query in queries() for name in labels_in(query)} <= labels | ADDED | UNSEEN


def test_a_query_for_what_is_not_told_would_be_found() -> None:
    assert metrics_in('sum by (le) (rate(made_up_total{status=~"5.."}[5m])) / 2') == {"made_up_total"}
    assert labels_in('sum by (le, x) (a{status=~"5..", y="z"})') == {"le", "x", "status", "y"}


def test_every_panel_has_a_place_of_its_own() -> None:
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in panels(path):
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
            taken |= cells


def test_the_operators_page_says_of_every_alert_what_to_do() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    rows = re.findall(r"^\| `(Pagewire\w+)` \|", page, flags=re.MULTILINE)

    assert rows == [rule["alert"] for rule in alerts()]
    assert all(rule["labels"]["severity"] in ("page", "ticket") for rule in alerts())


@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "config", "--syntax-only", "prometheus.tls.yml"],  # the files that it names are elsewhere
        ["check", "config", "--syntax-only", "kubernetes.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_has_nothing_against_it(command: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    done = subprocess.run([promtool, *command], cwd=OBSERVABILITY, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
