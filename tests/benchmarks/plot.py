"""One picture of a benchmark's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from tests.benchmarks.results import Figure, Results

_BARS: Final = (
    ("w1", ("output_tokens_per_s",), "W1, 32 at once: output tokens/s"),
    ("w2", ("output_tokens_per_s",), "W2, one stream: output tokens/s"),
    ("w2", ("ttft_ms", "p50"), "W2: first token, ms (less is better)"),
    ("w4", ("output_tokens_per_s",), "W4, shared prefix: output tokens/s"),
    ("w5", ("disturbance", "longest_ms"), "W5: longest gap, ms (less is better)"),
)


def draw(results: Results, path: Path) -> None:
    """Write the picture; its format is that of the path's ending."""
    mpl.rcParams["svg.hashsalt"] = "pagewire"  # the same results make the same file
    names = results.names()
    colour = {name: f"C{i % 10}" for i, name in enumerate(names)}
    canvas = Canvas(figsize=(13, 7), layout="constrained")
    axes = iter(canvas.subplots(2, 4).flat)
    for workload, path_in_summary, title in _BARS:
        _bars(next(axes), names, [results.figure(n, workload, *path_in_summary) for n in names], title, colour)
    _bars(next(axes), names, [results.start(n, "ready_s") for n in names], "From command to ready, s", colour)
    _bars(next(axes), names, [results.start(n, "after", "pss_mib") for n in names], "Memory after, MiB", colour)
    _goodput(next(axes), results, colour)
    canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(
    axis: Any, names: Sequence[str], figures: Sequence[Figure | None], title: str, colour: dict[str, str]
) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    for place, (name, figure) in enumerate(zip(names, figures, strict=True)):
        if figure is not None:
            spread = [[figure.median - figure.low], [figure.high - figure.median]]
            axis.barh(place, figure.median, xerr=spread, color=colour[name], ecolor="0.3")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()


def _goodput(axis: Any, results: Results, colour: dict[str, str]) -> None:
    rates = [float(w.partition("@")[2]) for w in results.workloads() if w.startswith("w3@")]
    axis.set_title("W3: goodput over requests offered, each a second", fontsize=9)
    axis.tick_params(labelsize=7)
    axis.plot(rates, rates, color="0.8", linestyle="--")
    for name in results.names():
        found = [(rate, results.figure(name, f"w3@{rate:g}", "online", "goodput_per_s")) for rate in rates]
        points = [(rate, figure.median) for rate, figure in found if figure is not None]
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", color=colour[name], label=name)
    if rates:
        axis.legend(fontsize=7)
