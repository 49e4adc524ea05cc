"""What `pagewire top` shows, on terminals of every kind."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from protos import monitoring_pb2 as pb
from services.top_screen import Screen, spark


def picture() -> pb.WatchStateResponse:
    row = pb.RowState(request=7, tenant="al\x1b[2Jice", prompt_tokens=100, cached_prompt_tokens=64, output_tokens=20)
    row.max_tokens, row.num_blocks, row.age_ns = 60, 8, 2_500_000_000
    return pb.WatchStateResponse(
        scheduler=pb.SchedulerStatus(uptime_ns=90 * 10**9, num_running=1, num_waiting=3, preemptions=2),
        executors=[
            pb.ExecutorState(
                status=pb.ExecutorStatus(
                    name="cpu-0",
                    device="cpu",
                    dtype="float32",
                    num_blocks=10,
                    num_free_blocks=6,
                    num_running=1,
                    steps_in_flight=1,
                ),
                cells=bytes([1, 1, 2, 2, 3, 3, 4, 0, 0, 0]),
                blocks_per_cell=1,
                num_cached_blocks=5,
                credit=2,
                rows=[row],
            )
        ],
        num_executors=1,
        waiting=[pb.WaitingState(tenant="bob", priority=3, num_sequences=3, tokens=99, age_ns=10**9)],
        num_queues=1,
        output_tokens_per_s=41.25,
        first_tokens=pb.FirstTokenTimes(count=4, p50_ns=182_000_000, p95_ns=420_000_000),
    )


def shown(*, unicode: bool = True, width: int = 100, height: int = 30, color: bool = False) -> str:
    screen, out = Screen(unicode=unicode), io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=color, no_color=not color, _environ={})
    screen.see(picture())
    console.print(screen.render(picture(), width=width, height=height))
    return out.getvalue()


def test_the_screen_tells_blocks_rows_queue_and_rates() -> None:
    told = shown()

    assert "▓▓██░░▒···" in told
    assert "4 of 10 blocks held, 5 cached, 1 of 2 steps in flight" in told
    for word in ("41.2", "182 ms", "7.0", "bob", "low", "99", "1 running", "3 waiting", "2 preempted"):
        assert word in told, word


def test_a_terminal_without_unicode_gets_letters_that_differ_as_much() -> None:
    told = shown(unicode=False)

    assert "oo##--+..." in told
    assert told.isascii()


def test_no_name_can_move_the_cursor() -> None:
    assert "\x1b" not in shown()
    assert "al[2Jice" in shown()


@pytest.mark.parametrize(("width", "height"), [(100, 30), (40, 12), (20, 8), (200, 60)])
def test_the_screen_fits_the_terminal(width: int, height: int) -> None:
    assert all(len(line) <= width for line in shown(width=width, height=height).splitlines())


def test_a_line_tells_what_matters_where_the_terminal_can_do_no_more() -> None:
    assert Screen().line(picture()) == (
        "up 90 s: 41.2 tokens/s, first token 182 ms (p95 420), 1 running, 3 waiting, 1 steps in flight, "
        "6 of 10 blocks free, 2 preempted"
    )


def test_a_curve_is_drawn_by_the_share_of_its_peak() -> None:
    assert spark([0, 5, 10], "abc") == "abc"
    assert spark([0, 0], "abc") == "aa"
    assert spark([], "abc") == ""


def test_many_executors_share_the_screen() -> None:
    state = picture()
    for number in range(1, 30):
        state.executors.add().CopyFrom(state.executors[0])
        state.executors[-1].status.name = f"cpu-{number}"
    screen, out = Screen(), io.StringIO()
    Console(file=out, width=100, height=40, no_color=True).print(screen.render(state, width=100, height=40))

    assert "cpu-29" in out.getvalue()  # what is too much for the terminal is cropped by it, and nothing fails
