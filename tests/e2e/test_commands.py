"""The commands that a person types, against a running server: what they print, and how they end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from protos import inference_pb2 as pb
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.programs import CTRL_C, CTRL_D, PAGEWIRE, Terminal, run

NOBODY = "127.0.0.1:1"  # no process listens on port 1
BEGINNING = "9:;<="  # of the fake model's answer to a chat that says "hi"
NO_MODEL = "/there/is/no/model"
NOT_UTF8 = b"\xff\xfe"


def test_generate_prints_the_answer_and_tells_what_it_cost_apart(shared: Cluster) -> None:
    ended = run(*PAGEWIRE, "generate", "--address", shared.address, "--max-tokens=5", "hi")

    assert (ended.code, ended.out) == (0, f"{BEGINNING}\n")
    assert ended.err.startswith("[5 tokens, ")


def test_generate_can_print_the_answer_alone(shared: Cluster) -> None:
    flags = ["--address", shared.address, "--max-tokens=3", "--raw", "--no-stats"]
    ended = run(*PAGEWIRE, "generate", *flags, "hello")

    assert (ended.code, ended.out, ended.err) == (0, "&'(\n", "")


def test_generate_ends_before_a_stop_string(shared: Cluster) -> None:
    flags = ["--address", shared.address, "--stop=<", "--no-stats"]
    ended = run(*PAGEWIRE, "generate", *flags, "hi")

    assert (ended.code, ended.out) == (0, "9:;\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--temperature=-1", "hi"], "temperature: must be in [0, 100], got -1.0"),
        (["--temperature=nan", "hi"], "temperature: must be in [0, 100], got nan"),
        (["--top-p=0", "hi"], "top_p: must be in (0, 1], got 0.0"),
        (["--top-k=-1", "hi"], "--top-k: -1 is out of range"),
        (["--seed=18446744073709551616", "hi"], "--seed: 18446744073709551616 is out of range"),
        (["--max-tokens=9999999999", "hi"], "--max-tokens: 9999999999 is out of range"),
        (["--max-tokens=500", "hi"], "max_tokens: at most 488 after a prompt of 24 tokens, got 500"),
        (["--stop=", "hi"], "stop: each string must have 1 to 256 bytes, got 0"),
        (["--raw", ""], "text: is empty"),
        (["--stop", NOT_UTF8, "hi"], "--stop: not valid UTF-8"),
        ([NOT_UTF8], "the prompt: not valid UTF-8"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value,
)
def test_a_wrong_argument_is_one_line_that_names_it(
    shared: Cluster, arguments: list[str | bytes], problem: str
) -> None:
    ended = run(*PAGEWIRE, "generate", "--address", shared.address, *arguments)

    assert (ended.code, ended.out, ended.err) == (1, "", f"error: {problem}\n")


@pytest.mark.parametrize(
    "command",
    [["generate", "--address", NOBODY, "hi"], ["chat", "--address", NOBODY], ["health", NOBODY]],
    ids=" ".join,
)
def test_where_no_server_listens_one_line_says_so_and_how_to_start_one(command: list[str]) -> None:
    ended = run(*PAGEWIRE, *command)

    problem = "no connection to 127.0.0.1:1: Connection refused. Is a server running there? Start one: pagewire serve"
    assert (ended.code, ended.out, ended.err) == (1, "", f"error: {problem}\n")


def test_a_server_of_another_kind_is_not_taken_for_ours(fake_folder: Path, tmp_path: Path) -> None:
    with cluster(fake_folder, tmp_path, executors=0) as running:
        ended = run(*PAGEWIRE, "generate", "--address", running.link, "hi")

    assert ended.code == 1
    assert ended.err.startswith(f"error: what answers on {running.link} is not a Pagewire server for clients")
    assert ended.err.count("\n") == 1


def test_ctrl_c_ends_generate_and_cancels_its_call(slow: Cluster) -> None:
    with Terminal(*PAGEWIRE, "generate", "--address", slow.address, "hi") as terminal:
        terminal.read_until(BEGINNING)
        terminal.type(CTRL_C)
        ended = terminal.end()

    assert ended.code == 130
    assert "Traceback" not in ended.out
    assert slow.counters()["finished"] == {str(pb.FINISH_REASON_ABORTED): 1}


def test_a_chat_remembers_what_was_said(shared: Cluster) -> None:
    with Terminal(*PAGEWIRE, "chat", "--address", shared.address, "--max-tokens=5") as terminal:
        terminal.read_until("fake. Ctrl-C stops an answer, Ctrl-D ends the talk.")
        terminal.read_until("> ")
        terminal.type("hi\n")
        terminal.read_until(BEGINNING)
        terminal.read_until("[5 tokens, ")
        terminal.read_until("> ")
        terminal.type("ho\n")
        terminal.read_until("WXYZ[")  # the fake model counts the prompt's tokens: question, answer and question
        terminal.read_until("[5 tokens, ")
        terminal.read_until("> ")
        terminal.type(CTRL_D)
        assert terminal.end().code == 0


def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_talk(slow: Cluster) -> None:
    with Terminal(*PAGEWIRE, "chat", "--address", slow.address) as terminal:
        for _ in range(2):
            terminal.read_until("> ")
            terminal.type("hi\n")
            terminal.read_until(BEGINNING)  # both times: what was not answered is not part of the talk
            terminal.type(CTRL_C)
            terminal.read_until("[stopped]")
        terminal.read_until("> ")
        terminal.type("never said")
        terminal.read_until("never said")
        terminal.type(CTRL_C)
        terminal.read_until("> ")
        terminal.type(CTRL_D)
        assert terminal.end().code == 0

    assert slow.counters()["finished"] == {str(pb.FINISH_REASON_ABORTED): 2}


def test_a_refusal_in_a_chat_ends_the_turn_and_not_the_talk(shared: Cluster) -> None:
    said = "a" * 600 + "\nhi\n"
    ended = run(*PAGEWIRE, "chat", "--address", shared.address, "--max-tokens=5", said=said)

    assert ended.code == 0
    assert "error: chat: 622 tokens leave no room in the context of 512\n" in ended.out
    assert f"> {BEGINNING}\n" in ended.out


def test_status_says_what_was_done_and_how_busy_the_executors_are(shared: Cluster) -> None:
    shared.tokens([1, 2, 3], 5)
    ended = run(*PAGEWIRE, "status", shared.admin)

    scheduler, executor = ended.out.splitlines()
    assert ended.code == 0
    assert re.fullmatch(
        r"scheduler: up \d+ s, 0 sequences run, 0 wait \(0 tokens\), 0 requests refused, "
        r"\d+ tokens made at \d+ µs of CPU each",
        scheduler,
    )
    assert re.fullmatch(
        r"executor-0: none on none, 0 sequences run, 4096 of 4096 blocks free, idle for \d+\.\d% of its working time",
        executor,
    )


def test_health_is_told_by_words_and_by_the_exit_code(shared: Cluster, fake_folder: Path, tmp_path: Path) -> None:
    healthy = run(*PAGEWIRE, "health", shared.address)
    assert (healthy.code, healthy.out) == (0, "SERVING\n")

    with cluster(fake_folder, tmp_path, executors=0) as running:
        ended = run(*PAGEWIRE, "health", running.address)
    assert ended.code == 1
    assert ended.out == "NOT_SERVING: no executor is connected, or the scheduler drains\n"


def test_a_key_is_printed_or_put_first_in_a_file(tmp_path: Path) -> None:
    printed = run(*PAGEWIRE, "key")
    assert printed.code == 0
    assert re.fullmatch(r"[0-9a-f]{8}:[0-9a-f]{64}\n", printed.out)

    file = tmp_path / "keys"
    for number in (1, 2, 2):  # the newest two are kept
        assert run(*PAGEWIRE, "key", str(file)).code == 0
        assert len(file.read_text().splitlines()) == number


def test_doctor_finds_a_machine_that_passes_these_tests_well(fake_folder: Path) -> None:
    ended = run(*PAGEWIRE, "doctor", "--model", str(fake_folder), "--listen", "127.0.0.1:0")

    assert ended.code == 0, ended.out
    lines = ended.out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert f"ok   Python         {sys.version.split()[0]}" in lines
    assert f"ok   model          fake, LlamaForCausalLM, context 512, {fake_folder}" in lines


def test_doctor_says_what_is_wrong_and_what_to_do(shared: Cluster, tmp_path: Path) -> None:
    ended = run(*PAGEWIRE, "doctor", "--model", str(tmp_path), "--listen", shared.address)

    assert ended.code == 1
    model, port, mend = ended.out.splitlines()[-3:]
    assert model.startswith(f"BAD  model          {tmp_path}/config.json: the file is missing. ")
    assert port == f"BAD  port           {shared.address}: Address already in use"
    assert mend.strip() == "→ stop what runs there, or use --listen"


def test_doctor_refuses_an_address_that_is_none() -> None:
    ended = run(*PAGEWIRE, "doctor", "--listen=nonsense")

    assert ended.code == 1
    assert ended.err == "error: 'nonsense' is not HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051\n"


@pytest.mark.parametrize("command", ["serve", "scheduler", "executor", "doctor", "demo", "pull"])
def test_an_unknown_model_is_a_matter_for_the_operator_who_is_told_what_to_type(command: str) -> None:
    name = [NO_MODEL] if command == "pull" else ["--model", NO_MODEL]
    ended = run(*PAGEWIRE, command, *name)

    assert ended.code == 78
    problem, _, advice = ended.err.rpartition(". ")
    assert problem.startswith(f"error: '{NO_MODEL}' is not a model")
    assert advice == "Type: pagewire pull smollm2\n"


@pytest.mark.parametrize("command", ["serve", "scheduler", "executor"])
def test_a_folder_without_a_model_is_a_matter_for_the_operator(command: str, tmp_path: Path) -> None:
    flags = ["--model", str(tmp_path)] + (["--scheduler", f"unix:{tmp_path}/link"] if command == "executor" else [])
    ended = run(*PAGEWIRE, command, *flags)

    assert ended.code == 78
    assert f"error: {tmp_path}/config.json: the file is missing. " in ended.err
    assert "pagewire pull smollm2" in ended.err
    assert "Traceback" not in ended.err
