"""The queries of dashboards, alerts and autoscaling, and the names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
OBSERVABILITY = ROOT / "deploy" / "observability"
DASHBOARDS = sorted((OBSERVABILITY / "grafana" / "dashboards").glob("*.json"))

_WORDS = frozenset({"sum", "rate", "increase", "histogram_quantile", "by", "label_values", "or"})
"""Of Prometheus' language, and Grafana's, as far as they are used."""

_OWN = frozenset({"up"})
"""What Prometheus says of itself."""


def panels(path: Path) -> list[Mapping[str, Any]]:
    """The panels of a dashboard that show something."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def alerts() -> list[Mapping[str, Any]]:
    """Every alert."""
    groups = yaml.safe_load((OBSERVABILITY / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    """Each query, and where it stands."""
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                yield panel["title"], target["expr"]
        for variable in json.loads(path.read_text())["templating"]["list"]:
            yield variable["name"], variable["definition"]
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    scaled = ROOT / "deploy" / "kubernetes" / "components" / "autoscaling" / "executors.yaml"
    for trigger in yaml.safe_load(scaled.read_text())["spec"]["triggers"]:
        yield f"trigger {trigger['name']}", trigger["metadata"]["query"]


def metrics_in(query: str) -> set[str]:
    """Names of metrics in a query: what is left without labels, numbers, durations and words of the language."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)|\"[^\"]*\"|, instance\)", " ", query)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - _WORDS - _OWN


def labels_in(query: str) -> set[str]:
    """Names of labels in a query."""
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    grouped = [name.strip() for names in re.findall(r"\bby \(([^)]*)\)", query) for name in names.split(",")]
    return {*matched, *grouped}


def told(metrics: str) -> tuple[set[str], set[str]]:
    """Names of metrics and of labels in the text that Prometheus reads."""
    kinds = re.findall(r"^# TYPE (\S+) (\w+)$", metrics, flags=re.MULTILINE)
    names = {name for name, _ in kinds}
    names |= {f"{name}_{part}" for name, kind in kinds if kind == "histogram" for part in ("bucket", "sum", "count")}
    return names, set(re.findall(r"[{,](\w+)=\"", metrics))
