"""The process that compiles callers' grammars first: `python -m services.grammar_worker TOKENIZER VOCAB_SIZE EOS …`.

A grammar may be written to take minutes or gigabytes, or meet a bug of the library. So each one is compiled in a child
of its own, forked for it in a millisecond with the tokenizer in its memory: the child has so much time, so much memory,
and less stack than the executor's thread, and its end harms nobody.

Frames come in and each is answered with one, until the input ends. A frame is a length (u32, little-endian) and bytes:
a Grammar of protos/executor.proto down; up, what is wrong with it, in UTF-8, nothing, or LATE. One more frame comes
first: what is wrong with the tokenizer, or nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import select
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from llguidance import LLTokenizer

from common.sampling import Grammar
from executor.grammar import GrammarError, compile_grammar, load_tokenizer
from protos import executor_pb2 as pb
from services.codec_link import grammar_from_pb
from services.lifecycle import die_with_parent

_LENGTH: Final = struct.Struct("<I")
_STACK_BYTES: Final = 4 << 20  # half of what a thread has by default

LATE: Final = "\0"
"""The answer where too little of the processor was to be had to find out."""


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description="for the scheduler alone")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("vocab_size", type=int)
    parser.add_argument("eos", type=int, nargs="*")
    parser.add_argument("--cpu-s", type=float, required=True)
    parser.add_argument("--wait-s", type=float, required=True)
    parser.add_argument("--memory-mib", type=int, required=True)
    parser.add_argument("--die-with-parent", type=int, required=True)
    asked = parser.parse_args()
    die_with_parent(asked.die_with_parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever else is printed is no frame
    try:
        tokenizer = load_tokenizer(asked.tokenizer, vocab_size=asked.vocab_size, eos=asked.eos)
        compile_grammar(tokenizer, Grammar("json_schema", "{}"))  # what is made once, is made now
    except GrammarError as error:
        _write(replies, str(error))
        return
    _write(replies, "")
    requests = sys.stdin.buffer
    while head := requests.read(_LENGTH.size):
        grammar = grammar_from_pb(pb.Grammar.FromString(requests.read(_LENGTH.unpack(head)[0])), "")
        limits = {"cpu_s": asked.cpu_s, "memory_mib": asked.memory_mib, "wait_s": asked.wait_s}
        _write(replies, problem_of(tokenizer, grammar, **limits))


def _write(replies: BinaryIO, text: str) -> None:
    data = text.encode(errors="replace")
    replies.write(_LENGTH.pack(len(data)) + data)


def problem_of(tokenizer: LLTokenizer, grammar: Grammar, *, cpu_s: float, memory_mib: int, wait_s: float) -> str:
    """Compile the grammar in a child: what is wrong with it; empty when nothing is; LATE when nobody knows in time."""
    limits = f"must take at most {cpu_s:g} s and {memory_mib} MiB to compile"
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if not child:
        _compile_and_end(tokenizer, grammar, write_fd, cpu_s, memory_mib)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as answer:
        has_ended, _, _ = select.select([answer], [], [], wait_s)
        if not has_ended:
            os.kill(child, signal.SIGKILL)
        told = answer.read()
    _, status = os.waitpid(child, 0)
    if not has_ended:
        return LATE
    return told.decode() if status == 0 else limits


def _compile_and_end(
    tokenizer: LLTokenizer, grammar: Grammar, answer_fd: int, cpu_s: float, memory_mib: int
) -> NoReturn:
    """The child's whole life. An end by a signal, or without the code 0, is that of one that met a limit, or a bug."""
    told: list[str] = []

    def compile_it() -> None:
        try:
            compile_grammar(tokenizer, grammar)
            told.append("")
        except GrammarError as error:
            told.append(str(error))

    code = 1
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + (memory_mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # of the processor; its signal ends the process
        thread = threading.Thread(target=compile_it)
        thread.start()
        thread.join()
        with os.fdopen(answer_fd, "wb") as answer:
            answer.write(told.pop().encode(errors="replace"))
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
