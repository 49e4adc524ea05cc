"""The report for people: a short table at the end of a check, and Markdown: python -m tests.gpu.check.render FILE."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def table(report: Report) -> str:
    """A line for each stage, what failed, and every aim."""
    about = report["about"]
    lines = [f"{'stage':<16}{'':<9}{'parts':>7}{'s':>7}"]
    for number, stage in report["stages"].items():
        parts = stage["parts"].values()
        done = sum(part["status"] == "ok" for part in parts)
        of = f"{done}/{len(parts)}"
        lines.append(f"{number + ' ' + stage['name']:<16}{stage['status']:<9}{of:>7}{stage['seconds']:>7.0f}")
        if "problem" in stage:
            lines.append(f"    {stage['problem']}: {_last(stage['traceback'])}")
        lines += [
            f"    {name}: {part['status']}: {'; '.join(part['problems'])[:200]}"
            for name, part in stage["parts"].items()
            if part["status"] != "ok"
        ]
    aims = list(_aims(report))
    if aims:
        lines += ["", "aims"]
        lines += [f"  {'met   ' if aim['met'] else 'missed'} {_aim(aim)}" for aim in aims]
    lines.append("")
    fake = " (fake: these numbers mean nothing)" if about["fake"] else ""
    lines.append(f"{about['took_s']:.0f} of {about['budget_s']:.0f} s{fake}")
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """What RESULTS.md keeps of one check."""
    about = report["about"]
    versions = _values(report, "0", "versions")
    packages = versions.get("packages", {})
    lines = [
        f"## {versions.get('gpu', 'No GPU')}, {about['date'][:10]}",
        "",
        f"`{about['command']}`: {about['took_s']:.0f} s. Commit {versions.get('commit') or 'unknown'}; "
        f"Python {versions.get('python', '?')}, CUDA {versions.get('cuda')}, "
        + ", ".join(f"{name} {version}" for name, version in packages.items())
        + ".",
        "",
    ]
    if about["fake"]:
        lines += ["**Made without a GPU: these numbers mean nothing.**", ""]
    aims = list(_aims(report))
    if aims:
        lines += ["| aim | bound | measured | |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {aim['what']} | {'≤' if aim['at_most'] else '≥'} {aim['bound']:g} | {aim['measured']:g} | "
            f"{'met' if aim['met'] else '**missed**'} |"
            for aim in aims
        ]
        lines.append("")
    for number, stage in report["stages"].items():
        lines += [f"### {number} {stage['name']}: {stage['status']}, {stage['seconds']:.0f} s", ""]
        if "problem" in stage:
            lines += [f"- **{stage['problem']}**: {_last(stage['traceback'])}"]
        for name, part in stage["parts"].items():
            lines += [f"- {line}" for line in part.get("lines", [])]
            if part["status"] != "ok":
                lines.append(f"- **{name}: {part['status']}**: {'; '.join(part['problems'])[:300]}")
        lines.append("")
        lines += _step_table(stage) if stage["name"] == "steps" else []
    return "\n".join(lines)


def _step_table(stage: dict[str, Any]) -> list[str]:
    rows = [(name, part["values"]) for name, part in stage["parts"].items() if "over_floor" in part.get("values", {})]
    if not rows:
        return []
    return [
        "| decode step | ms | floor, ms | times the floor | eager, ms | tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {each['ms']:.3f} | {each['floor_ms']:.3f} | {each['over_floor']:.2f} | "
            f"{each['eager_ms']:.2f} | {each['tokens_per_s']:,} |"
            for name, each in rows
        ),
        "",
    ]


def _aims(report: Report) -> Iterator[dict[str, Any]]:
    for stage in report["stages"].values():
        for part in stage["parts"].values():
            yield from part.get("aims", [])


def _aim(aim: dict[str, Any]) -> str:
    return f"{aim['what']}: {aim['measured']:g} ({'at most' if aim['at_most'] else 'at least'} {aim['bound']:g})"


def _values(report: Report, stage: str, part: str) -> dict[str, Any]:
    found: dict[str, Any] = report["stages"].get(stage, {}).get("parts", {}).get(part, {}).get("values", {})
    return found


def _last(trace: str) -> str:
    return trace.strip().split("\n")[-1][:200]


def main(arguments: list[str]) -> int:
    """Print the Markdown of a results.json."""
    [file] = arguments
    print(markdown(json.loads(Path(file).read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
