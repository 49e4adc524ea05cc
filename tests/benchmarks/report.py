"""Tables of a benchmark's results. Run it again on a file with `python -m tests.benchmarks.report RESULTS.json`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.benchmarks.floors import decode_floor_ms, prefill_floor_ms
from tests.benchmarks.results import Figure, Results

_TITLES: Final = {
    "w1": "W1: 32 requests at once, prompts of 64 to 512 tokens, answers of 64 to 256",
    "w2": "W2: one stream, prompt of 128 tokens, answer of 256",
    "w3": "W3: {} requests a second, as chance has it, for 30 s; prompts of 64 to 512 tokens, answers of 32 to 128",
    "w4": "W4: 32 requests at once that share 1,024 new tokens, then 32 of their own; answers of 32",
    "w5": "W5: four streams of 512 tokens; three prompts of 4,096 tokens arrive while they decode",
    "prefill": "A prompt of {} tokens alone, to the first token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One quantity of a summary."""

    title: str
    path: tuple[str, ...]
    more_is_better: bool = False
    spread: bool = False


_TTFT = Column(title="first token ms", path=("ttft_ms", "p50"))
_TTFT_P99 = Column(title="p99", path=("ttft_ms", "p99"))
_OUTPUT = Column(title="output tokens/s", path=("output_tokens_per_s",), more_is_better=True, spread=True)
_TOTAL = Column(title="all tokens/s", path=("total_tokens_per_s",), more_is_better=True)
_TPOT = Column(title="ms a token", path=("tpot_ms", "p50"), spread=True)
_ITL = (
    Column(title="gap ms", path=("itl_ms", "p50")),
    Column(title="gap p99", path=("itl_ms", "p99")),
    Column(title="gap longest", path=("itl_ms", "longest")),
)
_GOODPUT = Column(title="goodput/s", path=("online", "goodput_per_s"), more_is_better=True, spread=True)
_WITHIN = Column(title="kept", path=("online", "within_slo"), more_is_better=True)
_SHORT_GAP = Column(title="longest gap of a short stream ms", path=("disturbance", "longest_ms"), spread=True)
_SHORT_BEFORE = Column(title="gap before", path=("disturbance", "before_p50_ms"))
_SHORT_DURING = Column(title="gap meanwhile", path=("disturbance", "during_p50_ms"))
_LONG_TTFT = Column(title="first token of the long", path=("disturbance", "long_ttft_p50_ms"))

_COLUMNS: Final = {
    "w1": (_OUTPUT, _TOTAL, _TTFT, _TTFT_P99, *_ITL),
    "w2": (_TPOT, _OUTPUT, Column(title="first token ms", path=("ttft_ms", "p50"), spread=True), *_ITL),
    "w3": (_GOODPUT, _WITHIN, _TTFT, _TTFT_P99, _TPOT, *_ITL),
    "w4": (_OUTPUT, _TOTAL, _TTFT, _TTFT_P99, *_ITL),
    "w5": (_SHORT_GAP, _SHORT_BEFORE, _SHORT_DURING, _LONG_TTFT, _OUTPUT, _TOTAL),
    "prefill": (Column(title="first token ms", path=("ttft_ms", "p50"), spread=True), _TTFT_P99),
}

# What is compared with the best peer, and by which factor Pagewire is meant to be better.
_AIMS: Final = (
    ("w1", _OUTPUT, 1.3),
    ("w2", _TPOT, 1.3),
    ("w2", _TTFT, 1.0),
    ("w3", _GOODPUT, 1.3),
    ("w4", _OUTPUT, 1.3),
    ("w5", _SHORT_GAP, 2.0),
    ("w5", _TOTAL, 1.0),
)


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [
        _about(results),
        *(_against_the_best_peer(results, precision) for precision in _precisions(results)),
        *(_table_of(results, workload) for workload in results.workloads()),
        _floors(results),
        _starts(results),
        _cpu(results),
        _limits(results),
        _footnote(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(results: Results) -> str:
    about, machine = results.about, results.about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    engines = [f"- {_engine_line(name, results.engines[name])}" for name in results.names()]
    engines += [f"- Left out: {why}" for why in results.left_out.values()]
    return (
        f"# Results\n\n{about['date']}, on {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}.\n"
        f"Command: `{about['command']}`. Model: {about['model']}. Versions: {versions}.\n\n"
        "Engines took turns; each was started anew for each turn. A cell is the median of its runs, and the lowest and "
        "highest in brackets.\n\n" + "\n".join(engines)
    )


def _engine_line(name: str, engine: dict[str, str]) -> str:
    return f"**{name}** ({engine['precision']})" + "".join(
        f"; {engine[part]}" for part in ("version", "note") if engine[part]
    )


def _precisions(results: Results) -> list[str]:
    return list(dict.fromkeys(engine["precision"] for engine in results.engines.values()))


def _against_the_best_peer(results: Results, precision: str) -> str:
    names = results.names(precision)
    ours = [name for name in names if results.engines[name]["dialect"] == "pagewire"]
    peers = [name for name in names if name not in ours]
    body = []
    for workload in results.workloads():
        for kind, column, aim in _AIMS:
            if workload.partition("@")[0] != kind or not ours or not peers:
                continue
            sign = 1 if column.more_is_better else -1
            own = results.figure(ours[0], workload, *column.path)
            others = [(f.median, peer) for peer in peers if (f := results.figure(peer, workload, *column.path))]
            if own is None or not others:
                continue
            best, peer = max(others, key=lambda other: sign * other[0])
            worse, better = (best, own.median) if sign > 0 else (own.median, best)
            factor = better / worse if worse else float("inf")
            body.append(
                [workload.upper(), column.title, _cell(own), f"{_number(best)} ({peer})", f"{factor:.2f}", f"{aim:g}",
                 "yes" if factor >= aim else "no"]
            )  # fmt: skip
    if not body:
        return ""
    head = ["", "", ours[0], "best peer", "times better", "aim", "reached"]
    return f"## {precision}: against the best peer\n\n" + _table(head, body)


def _table_of(results: Results, workload: str) -> str:
    kind, _, parameter = workload.partition("@")
    columns = _COLUMNS[kind]
    body = []
    for name in results.names():
        runs = [run for run in results.runs if (run["engine"], run["workload"]) == (name, workload)]
        if not runs:
            continue
        figures = [results.figure(name, workload, *column.path) for column in columns]
        cells = [_cell(f, spread=c.spread) for f, c in zip(figures, columns, strict=True)]
        short = sum(run["summary"]["short_of_asked"] for run in runs)
        failed = sum(run["summary"]["failed"] for run in runs)
        odd = ", ".join(f"{count} {what}" for count, what in ((failed, "failed"), (short, "too short")) if count)
        body.append([name, *cells, f"{len(runs)}", odd])
    head = ["engine", *(column.title for column in columns), "runs", "requests"]
    if not any(row[-1] for row in body):
        head, body = head[:-1], [row[:-1] for row in body]
    return f"## {_TITLES[kind].format(parameter)}\n\n" + _table(head, body)


def _floors(results: Results) -> str:
    shape, read_gb_s, matrix_gflop_s = results.model_shape(), results.read_gb_s(), results.matrix_gflop_s()
    if shape is None or read_gb_s is None or matrix_gflop_s is None:
        return ""
    body = []
    for name in results.names():
        engine = results.engines[name]
        for workload in results.workloads():
            kind, _, parameter = workload.partition("@")
            if kind == "w2" and (figure := results.figure(name, workload, "tpot_ms", "p50")):
                floor = decode_floor_ms(
                    shape, read_gb_s, prompt=128, output=256,
                    weight_bits=engine["weight_bits"], kv_bits=engine["kv_bits"],
                )  # fmt: skip
                what = "a token of W2 over memory"
            elif kind == "prefill" and (figure := results.figure(name, workload, "ttft_ms", "p50")):
                floor = prefill_floor_ms(shape, matrix_gflop_s, int(parameter))
                what = f"{int(parameter):,} tokens of prompt over bf16 products"
            else:
                continue
            body.append([name, what, _number(floor), _cell(figure), f"{floor / figure.median:.0%}"])
    if not body:
        return ""
    head = ["engine", "", "floor ms", "measured ms", "share"]
    return "## How near the machine's limits\n\n" + _table(head, body)


def _starts(results: Results) -> str:
    columns = (
        ("ready_s",),
        ("at_ready", "rss_mib"),
        ("at_ready", "pss_mib"),
        ("after", "rss_mib"),
        ("after", "pss_mib"),
    )
    body = [[name, *(_cell(results.start(name, *path), spread=i == 0) for i, path in enumerate(columns))]
            for name in results.names()]  # fmt: skip
    head = ["engine", "s from command to ready", "RSS MiB when ready", "PSS", "RSS MiB after all workloads", "PSS"]
    return "## Start and memory\n\n" + _table(head, body)


def _cpu(results: Results) -> str:
    batch = [workload for workload in results.workloads() if workload.partition("@")[0] in {"w1", "w2", "w3"}]
    body = []
    for name in results.names():
        for process in [*results.processes(name), "client"]:
            spent = [results.cpu_us_per_token(name, workload, process) for workload in batch]
            body.append([name, process, *("" if us is None else _number(us) for us in spent)])
    if not batch or not body:
        return ""
    return "## Processor time, µs for each token that came out\n\n" + _table(
        ["engine", "process", *(workload.upper() for workload in batch)], body
    )


def _limits(results: Results) -> str:
    if not results.limits:
        return ""
    body = []
    for index, first in enumerate(results.limits[0]):
        rounds = [limits[index] for limits in results.limits]
        cells = [_range([r["read_gb_s"] for r in rounds])]
        cells += [_range([r["matrix_gflop_s"][rows] for r in rounds]) for rows in first["matrix_gflop_s"]]
        body.append([f"{first['threads']}", *cells])
    head = [
        "threads",
        "memory read GB/s",
        *(f"bf16 GFLOP/s, {rows} rows" for rows in results.limits[0][0]["matrix_gflop_s"]),
    ]
    return "## The machine\n\nMeasured before each round of turns; floors use the best.\n\n" + _table(head, body)


def _footnote(results: Results) -> str:
    disturbed = sum(run["disturbed"] for run in results.runs)
    return (
        f"{disturbed} of {len(results.runs)} runs were disturbed: other processes took more than 5% of the machine. "
        "They are left out where undisturbed runs are there, else the three least disturbed are shown with a *. "
        "A run with a failed request is treated in the same way."
    )


def _cell(figure: Figure | None, *, spread: bool = True) -> str:
    if figure is None:
        return ""
    text = _number(figure.median)
    if spread and figure.low != figure.high:
        text += f" [{_number(figure.low)}-{_number(figure.high)}]"
    return text if figure.trusted else text + "*"


def _range(values: Sequence[float]) -> str:
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low}-{high}"


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(markdown(Results.load(Path(sys.argv[1]))), end="")
