"""Rules that a linter cannot say: what the sources of the server never do."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = ("common", "executor", "pagewire", "protos", "scheduler", "services")
RUN_WHAT_THEY_READ = frozenset(
    {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "code", "yaml"}
)  # a queue or a pipe of multiprocessing pickles; yaml is not needed here at all
RUN_WHAT_THEY_ARE_GIVEN = frozenset({"eval", "exec", "compile", "__import__"})


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that the source names in an import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def runs_what_it_reads(tree: ast.AST) -> list[str]:
    """Ways in which the source would execute bytes that came from a file or a wire."""
    found = [name for name in imported(tree) if name.partition(".")[0] in RUN_WHAT_THEY_READ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call.removeprefix("builtins.") in RUN_WHAT_THEY_ARE_GIVEN or call in {"torch.load", "torch.save"}:
                found.append(call)
            found += [
                f"{call}({word.arg}=...)"
                for word in node.keywords
                if word.arg in {"allow_pickle", "trust_remote_code"} and ast.unparse(word.value) != "False"
            ]
    return found


def sources(*packages: str) -> list[Path]:
    """The Python files of these packages, relative to the root."""
    return sorted(path.relative_to(ROOT) for package in packages for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("source", sources(*SERVER), ids=str)
def test_nothing_that_is_read_is_ever_run(source: Path) -> None:
    assert runs_what_it_reads(ast.parse((ROOT / source).read_text())) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "def late():\n    from pickle import loads",
        "from multiprocessing import Queue",
        "import yaml",
        "eval(text)",
        "compile(text, name, 'exec')",
        "builtins.exec(text)",
        "__import__(name)",
        "torch.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=trust)",
    ],
)
def test_the_rule_sees_every_way_to_break_it(planted: str) -> None:
    assert len(runs_what_it_reads(ast.parse(planted))) == 1


@pytest.mark.parametrize("source", sources("common", "scheduler"), ids=str)
def test_the_scheduler_and_the_shared_words_need_only_the_standard_library(source: Path) -> None:
    allowed = sys.stdlib_module_names | ({"common"} if source.parts[0] == "common" else {"common", "scheduler"})
    named = {name.partition(".")[0] for name in imported(ast.parse((ROOT / source).read_text()))}

    assert named <= allowed
