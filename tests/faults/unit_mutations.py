"""Bugs that no story can show: each is planted under the test that is there for it, and that test must fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from common import log
from common.step import NewSequence
from executor.resident import Resident
from pagewire.continuation import Continuation
from pagewire.retrying import Attempts, RetryBudget
from protos import inference_pb2 as pb
from scheduler import line
from scheduler.block_pool import BlockPool, Rank
from scheduler.pins import Pins
from scheduler.prefix_cache import BlockKey
from services import gate, handlers
from services.caller import ANONYMOUS
from services.choice_text import ChoiceText
from services.engine import Engine
from services.link_service import ExecutorLinkService
from services.live_requests import LiveRequest
from services.status import RpcStatus, internal_status
from tests.faults.planting import Mutation, Patch


def the_text_of_an_exception_is_shown_to_the_client(patch: Patch) -> None:
    def telling(error_id: str) -> RpcStatus:
        status = internal_status(error_id)
        return RpcStatus(code=status.code, message=f"{sys.exception()!r}", trailing_metadata=status.trailing_metadata)

    patch(handlers, "internal_status", telling)


def the_text_of_an_exception_is_logged(patch: Patch) -> None:
    without_texts = log.without_texts

    def telling(error: BaseException) -> Any:
        yield from without_texts(error)
        yield str(error)

    patch(log, "without_texts", telling)


def what_a_refused_call_held_waits_for_the_collector(patch: Patch) -> None:
    patch(handlers, "answer", handlers._until_told)


def a_call_without_a_key_is_let_in(patch: Patch) -> None:
    patch(gate.Gate, "_caller", lambda self, metadata: ANONYMOUS)


def a_tenant_that_was_away_has_saved_something_up(patch: Patch) -> None:
    patch(line._Band, "_floor", lambda self: 0.0)


def a_scheduler_that_leaves_takes_new_requests(patch: Patch) -> None:
    patch(Engine, "_is_draining", property(lambda self: False, lambda self, draining: None))


def a_reader_with_other_tokens_is_given_what_runs(patch: Patch) -> None:
    patch(LiveRequest, "holds", lambda self, begun: True)


def a_scheduler_that_was_replaced_makes_itself_the_latest(patch: Patch) -> None:
    patch(ExecutorLinkService, "_age_ms", lambda self: -1)


def a_scheduler_that_nobody_knows_takes_itself_for_the_latest(patch: Patch) -> None:
    outrank, welcome = ExecutorLinkService._outrank, ExecutorLinkService._run

    def unknown(self: ExecutorLinkService, epoch: int, age_ms: int) -> None:
        outrank(self, epoch, age_ms if getattr(self, "is_known", False) else 1 << 60)

    async def known(self: ExecutorLinkService, *args: Any) -> None:
        self.is_known = True  # type: ignore[attr-defined]
        await welcome(self, *args)

    patch(ExecutorLinkService, "_outrank", unknown)
    patch(ExecutorLinkService, "_run", known)


def a_scheduler_whose_clock_went_back_takes_itself_for_replaced(patch: Patch) -> None:
    outrank = ExecutorLinkService._outrank
    patch(ExecutorLinkService, "_outrank", lambda self, epoch, age_ms: outrank(self, epoch, 0))


def penalties_take_the_answer_for_prompt_where_a_sequence_is_told_again(patch: Patch) -> None:
    _told_again(patch, lambda new: replace(new, num_prompt=len(new.token_ids)))


def min_tokens_is_counted_from_where_a_sequence_is_told_again(patch: Patch) -> None:
    _told_again(patch, lambda new: replace(new, min_tokens=new.min_tokens + len(new.token_ids) - new.num_prompt))


def _told_again(patch: Patch, change: Callable[[NewSequence], NewSequence]) -> None:
    apply = Resident.apply
    patch(Resident, "apply", lambda self, plan: apply(self, replace(plan, new=[change(new) for new in plan.new])))


def a_stop_string_ends_an_answer_before_min_tokens(patch: Patch) -> None:
    init = ChoiceText.__init__
    patch(ChoiceText, "__init__", lambda self, *args, **more: init(self, *args, **{**more, "min_tokens": 0}))


def the_client_tells_again_what_it_has_told(patch: Patch) -> None:
    add = Continuation._add

    def anyhow(self: Continuation, delta: pb.Delta) -> Any:
        self._tokens[delta.choice] = self._tokens[delta.choice][: delta.index]
        return add(self, delta)

    patch(Continuation, "_add", anyhow)


def the_client_tries_again_at_once(patch: Patch) -> None:
    failed = Attempts.failed

    def at_once(self: Attempts, *args: Any, **more: Any) -> float:
        failed(self, *args, **more)
        return 0.0

    patch(Attempts, "failed", at_once)


def the_client_has_no_budget_for_retries(patch: Patch) -> None:
    patch(RetryBudget, "retry", lambda self, now_s: 0.0)


def a_block_that_is_pinned_is_not_free(patch: Patch) -> None:
    patch(BlockPool, "num_free", property(lambda self: len(self._free)))


def the_youngest_pin_makes_way_first(patch: Patch) -> None:
    rank = Pins.rank

    def turned(self: Pins, key: BlockKey) -> Rank | None:
        found = rank(self, key)
        return None if found is None else Rank(-found.order, found.place)

    patch(Pins, "rank", turned)


def a_pin_is_ended_by_another_tenant(patch: Patch) -> None:
    patch(Pins, "find", lambda self, tenant, id: [pin for pin in self if id in (None, pin.id)])


_SERVICES: Final = "tests/services/"
_TOLD_AGAIN: Final = (
    "tests/executor/test_controls.py"
    "::test_a_sequence_that_is_told_again_behind_any_token_goes_on_as_if_it_had_never_moved"
)
MUTATIONS: Final[list[Mutation]] = [
    Mutation(
        a_block_that_is_pinned_is_not_free,
        "tests/scheduler/test_pins.py::test_a_pin_keeps_nobody_waiting_and_has_nobody_preempted",
    ),
    Mutation(
        the_youngest_pin_makes_way_first,
        "tests/scheduler/test_pins.py"
        "::test_as_memory_runs_out_the_oldest_pin_goes_first_and_its_end_before_its_beginning",
    ),
    Mutation(
        a_pin_is_ended_by_another_tenant,
        "tests/scheduler/test_pins.py::test_pins_end_by_name_or_all_at_once_and_nobody_ends_those_of_another_tenant",
    ),
    Mutation(
        the_text_of_an_exception_is_shown_to_the_client,
        _SERVICES + "test_handlers.py::test_an_exceptions_text_reaches_neither_the_client_nor_the_log",
    ),
    Mutation(
        the_text_of_an_exception_is_logged,
        _SERVICES + "test_log.py::test_an_exception_is_logged_with_its_place_and_without_its_text",
    ),
    Mutation(
        what_a_refused_call_held_waits_for_the_collector,
        _SERVICES + "test_handlers.py::test_what_a_refused_call_held_is_free_at_once_and_waits_for_no_collector",
    ),
    Mutation(a_call_without_a_key_is_let_in, _SERVICES + "test_gate.py::test_every_reason_to_refuse_looks_the_same"),
    Mutation(
        a_tenant_that_was_away_has_saved_something_up,
        "tests/scheduler/test_line.py::test_a_tenant_that_was_away_has_saved_nothing_up",
    ),
    Mutation(
        a_scheduler_that_leaves_takes_new_requests,
        _SERVICES + "test_engine.py::test_a_draining_engine_finishes_what_it_has_and_takes_nothing_new",
    ),
    Mutation(
        a_reader_with_other_tokens_is_given_what_runs,
        _SERVICES + "test_resuming.py::test_what_runs_here_ends_when_its_reader_comes_back_with_other_tokens",
    ),
    Mutation(
        a_scheduler_that_was_replaced_makes_itself_the_latest,
        _SERVICES + "test_link_service.py::test_a_scheduler_that_was_replaced_does_not_take_its_executors_back",
    ),
    Mutation(
        a_scheduler_that_nobody_knows_takes_itself_for_the_latest,
        _SERVICES + "test_link_service.py"
        "::test_one_that_stood_still_while_it_was_replaced_is_not_the_later_one_though_nobody_knows_it",
    ),
    Mutation(
        a_scheduler_whose_clock_went_back_takes_itself_for_replaced,
        _SERVICES
        + "test_link_service.py::test_a_scheduler_that_begins_when_its_clock_went_back_is_still_the_later_one",
    ),
    Mutation(
        penalties_take_the_answer_for_prompt_where_a_sequence_is_told_again,
        "tests/executor/test_resident.py::test_a_resumed_sequence_counts_its_output_from_the_prompt",
    ),
    Mutation(min_tokens_is_counted_from_where_a_sequence_is_told_again, _TOLD_AGAIN),
    Mutation(
        a_stop_string_ends_an_answer_before_min_tokens,
        _SERVICES + "test_choice_text.py::test_a_stop_string_before_min_tokens_is_text_like_any_other",
    ),
    Mutation(
        the_client_tells_again_what_it_has_told,
        _SERVICES + "test_client.py::test_what_was_told_already_is_not_told_again",
    ),
    Mutation(
        the_client_tries_again_at_once,
        _SERVICES
        + "test_client.py::test_delays_double_up_to_half_a_second_where_nobody_is_and_begin_anew_after_a_message",
    ),
    Mutation(
        the_client_has_no_budget_for_retries,
        _SERVICES + "test_client.py::test_retries_over_the_budget_are_put_off_and_not_given_up",
    ),
]
