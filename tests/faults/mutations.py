"""The proof, proved: bugs that somebody could make in good faith, each planted alone, and each must be caught.

`python -m tests.faults.mutations` plants one after the other, plays stories until one breaks, and prints a table: which
bug, which invariant saw it, and the seed. A bug that no story sees is printed as SURVIVED and makes the run red.
(tests/scheduler/test_mutations.py does the same for the core alone, where more of its own bugs show.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import PagewireError
from common.step import NewSequence, StepResult
from common.types import BlockId, SequenceId
from executor.fake_runner import FakeRunner, Prefix, prefix_hash_token
from executor.resident import Resident, Rows, Sampled
from protos import inference_pb2 as pb
from scheduler import scheduler as core_module
from scheduler.moves import Moves
from scheduler.prefix_cache import BlockKey, KeyChain
from scheduler.results import read_result
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence as Running
from scheduler.sequence import Status
from scheduler.session import Session
from services import codec_link, codec_public, handlers
from services.answer import Answer, Choice, Delta, Finish, Usage
from services.best_of import BestOfAnswer
from services.choice_text import ChoiceText
from services.engine import Engine
from services.executor_service import ExecutorService
from services.link_service import ComputePulse, ExecutorLinkService
from services.request_stream import RequestStream
from services.scheduler_service import SchedulerService
from services.status import RpcStatus, to_rpc_status
from services.text import IncrementalDecoder, StopMatcher
from tests.faults import seen_by, simulation, stream_mutations, unit_mutations, virtual_executor
from tests.faults.planting import Mutation, Patch, fails, mutations_in, planted
from tests.faults.seen_by import SEEN_BY
from tests.scheduler import test_mutations as of_the_core


class _MonkeyPatch:
    """As much of pytest's as the core's mutations use."""

    def __init__(self, patch: Patch) -> None:
        self.setattr = patch


def core(plant: of_the_core.Plant) -> Mutation:
    """A bug of the core, that its own crowd catches too."""

    def planted(patch: Patch) -> None:
        plant(_MonkeyPatch(patch))  # type: ignore[arg-type]

    planted.__name__ = plant.__name__
    return Mutation(planted)


# ---- results that may not be believed


def an_index_that_is_not_the_next_is_taken(patch: Patch) -> None:
    read = read_result

    def any_index(flight: Any, result: StepResult, vocab_size: int) -> Any:
        rows = [flight.rows.get(ref) for ref in result.refs]
        indices = [
            row.sequence.num_output if row is not None else index
            for row, index in zip(rows, result.indices, strict=True)
        ]
        changed = StepResult(
            step=result.step, refs=result.refs, tokens=result.tokens, indices=indices, failed=result.failed
        )
        return read(flight, changed, vocab_size)

    patch(core_module, "read_result", any_index)


def a_result_of_another_step_answers_the_oldest(patch: Patch) -> None:
    update = Scheduler.update

    def any_step(self: Scheduler, session_id: int, result: StepResult, now_ns: int) -> Any:
        session = self._sessions.get(session_id)
        if session is not None and session.outstanding:
            result = StepResult(
                step=session.outstanding[0].step,
                refs=result.refs, tokens=result.tokens, indices=result.indices, failed=result.failed,
            )  # fmt: skip
        return update(self, session_id, result, now_ns)

    patch(Scheduler, "update", any_step)


# ---- executors that are lost


def the_sequences_of_a_lost_executor_are_forgotten(patch: Patch) -> None:
    patch(Moves, "wait_again", lambda self, sequence: sequence.become(Status.WAITING))


def a_moved_sequence_counts_its_output_as_prompt(patch: Patch) -> None:
    admit = Resident._admit

    def all_prompt(self: Resident, sequence: Any) -> None:
        admit(self, sequence)
        self.num_prompt[sequence.ref & 0xFFFF] = len(sequence.token_ids)

    patch(Resident, "_admit", all_prompt)


def random_numbers_count_calls(patch: Patch) -> None:
    calls = iter(range(1 << 60))

    def token(prefix: Prefix) -> int | None:
        true = prefix_hash_token(prefix)
        if prefix.greedy:
            return None if true % 512 == 77 else true
        return true + next(calls) // 3

    patch(virtual_executor, "true_token", token)


def an_executor_that_hangs_is_never_given_up(patch: Patch) -> None:
    patch(ComputePulse, "beat", lambda self, heartbeat, limit_s: None)
    patch(ExecutorLinkService, "_check_answers", lambda self, session: None)


def silence_is_taken_for_health(patch: Patch) -> None:
    init = ExecutorLinkService.__init__

    def patient(self: ExecutorLinkService, *args: Any, **settings: Any) -> None:
        init(self, *args, **{**settings, "silence_s": 1e6})

    patch(ExecutorLinkService, "__init__", patient)


def an_executor_dials_once(patch: Patch) -> None:
    link = ExecutorService._link
    dialled: set[int] = set()

    async def once(self: ExecutorService, facts: Any) -> Any:
        if id(self) in dialled:
            await self._loaded.get_loop().create_future()
        dialled.add(id(self))
        return await link(self, facts)

    patch(ExecutorService, "_link", once)


def a_new_session_finds_what_the_one_before_left(patch: Patch) -> None:
    patch(FakeRunner, "begin_session", lambda self: None)


def a_lost_session_stays_in_the_line(patch: Patch) -> None:
    def lose(self: Engine, session: int, *_: Any, **__: Any) -> None:
        if self._links.pop(session, None) is not None:
            self.scheduler.leave(session)

    patch(Engine, "lose", lose)


def a_moved_sequence_draws_other_random_numbers(patch: Patch) -> None:
    to_pb = codec_link._new_to_pb

    def reseeded(new: NewSequence) -> Any:
        message = to_pb(new)
        message.sampling.seed += new.attempt - 1
        return message

    patch(codec_link, "_new_to_pb", reseeded)


def choices_share_their_random_numbers(patch: Patch) -> None:
    to_pb = codec_link._new_to_pb
    patch(codec_link, "_new_to_pb", lambda new: to_pb(replace(new, choice=0)))


def more_plans_are_sent_than_there_is_credit(patch: Patch) -> None:
    patch(Session, "has_credit", property(lambda self: len(self.outstanding) <= self.facts.credit))


# ---- rows that fail


def a_row_that_is_not_finite_takes_its_step_with_it(patch: Patch) -> None:
    advance = Resident.advance

    def strict(self: Resident, rows: Rows, tokens: Sequence[int], failed: Sequence[int] = (), **more: Any) -> Sampled:
        if failed:
            raise ArithmeticError("not finite")
        return advance(self, rows, tokens, failed, **more)

    patch(Resident, "advance", strict)


def a_row_that_waits_for_its_grammar_counts_as_sampled(patch: Patch) -> None:
    patch(Scheduler, "_put_off", lambda self, session, unready, flight: None)


# ---- guesses


def a_step_follows_guesses_in_flight(patch: Patch) -> None:
    patch(Session, "speculates", property(lambda self: False))


def a_right_guess_does_not_count_as_computed(patch: Patch) -> None:
    patch(Scheduler, "_learn", lambda *_: None)


def a_wrong_guess_is_believed(patch: Patch) -> None:
    choose = FakeRunner._choose_run

    def believed(self: FakeRunner, slot: int, num_drafts: int) -> list[int | None]:
        known = int(self._resident.num_tokens[slot])
        guesses = self._token_ids[slot, known : known + num_drafts].tolist()
        return [*guesses, 1] if guesses else choose(self, slot, 0)

    patch(FakeRunner, "_choose_run", believed)


# ---- memory


def a_cancelled_sequence_keeps_its_blocks(patch: Patch) -> None:
    release = Session.release

    def keeps(self: Session, sequence: Running, *, forget: bool = False) -> None:
        held = list(sequence.block_table) if not sequence.num_output else []
        for block in held[:1]:
            self.pool.hold(block)
        release(self, sequence, forget=forget)

    patch(Session, "release", keeps)


def a_cached_block_is_found_by_its_own_tokens_alone(patch: Patch) -> None:
    child = KeyChain.child
    patch(KeyChain, "child", lambda self, parent, tokens: child(self, BlockKey(b"any"), tokens))


def a_block_is_freed_twice(patch: Patch) -> None:
    free = Session._free

    def twice(self: Session, blocks: Any) -> None:
        blocks = list(blocks)
        free(self, blocks)
        again: list[BlockId] = [block for block in blocks if self.pool.ref_count(block) > 0]
        free(self, again)

    patch(Session, "_free", twice)


# ---- streams


def a_slow_reader_loses_what_came_before(patch: Patch) -> None:
    note = RequestStream.note

    def only_the_last(self: RequestStream, id: SequenceId) -> None:
        note(self, id)
        choice = self._choice_of[id]
        self._taken[choice] = max(self._taken[choice], self.sequences[choice].num_output - 1)

    patch(RequestStream, "note", only_the_last)


def a_reader_is_woken_only_by_ends(patch: Patch) -> None:
    wake = RequestStream.wake

    def at_the_end(self: RequestStream) -> None:
        if any(self.sequences[choice].reason for choice in self._news) and len(self._news) > 1:
            wake(self)

    patch(RequestStream, "wake", at_the_end)


def a_result_does_not_wake_the_loop(patch: Patch) -> None:
    def answered(self: Engine, session: int, result: StepResult) -> None:
        self._answers.append((session, result))

    patch(Engine, "answered", answered)


def an_end_is_told_twice(patch: Patch) -> None:
    following = Answer.next

    async def twice(self: Answer) -> Any:
        events = await following(self)
        return [*events, *(event for event in events if isinstance(event, Finish))]

    patch(Answer, "next", twice)


def a_stream_ends_with_its_first_choice(patch: Patch) -> None:
    patch(RequestStream, "is_open", property(lambda self: len(self._open) == len(self.sequences)))


def a_stop_string_that_comes_in_two_pieces_is_missed(patch: Patch) -> None:
    push = StopMatcher.push

    def forgetful(self: StopMatcher, text: str) -> Any:
        told, matched = push(self, text)
        return (told if matched else told + self.flush()), matched

    patch(StopMatcher, "push", forgetful)


def half_a_character_is_told_as_a_replacement(patch: Patch) -> None:
    push = IncrementalDecoder.push
    patch(IncrementalDecoder, "push", lambda self, ids: push(self, ids) + self.finish())


def usage_counts_tokens_that_were_cut_off(patch: Patch) -> None:
    usage = Choice._usage

    def all_of_them(self: Choice, sequence: Running) -> Usage:
        return replace(usage(self, sequence), completion_tokens=sequence.num_output)

    patch(Choice, "_usage", all_of_them)


def text_after_a_stop_string_is_told(patch: Patch) -> None:
    up_to = ChoiceText._up_to_stop

    def beyond(self: ChoiceText, stops: StopMatcher, words: list[int], *, is_whole: bool) -> Any:
        text, matched, used = up_to(self, stops, words, is_whole=is_whole)
        return (text + matched if matched else text), matched, used

    patch(ChoiceText, "_up_to_stop", beyond)


def a_caller_who_left_is_served_on(patch: Patch) -> None:
    patch(RequestStream, "close", lambda self: None)


def a_cancelled_call_is_swallowed(patch: Patch) -> None:
    generate = SchedulerService.GenerateStream

    async def swallows(self: Any, request: Any, context: Any) -> Any:
        try:
            async for message in generate(self, request, context):
                yield message
        except BaseException:  # noqa: BLE001 - that is the bug
            return

    patch(SchedulerService, "GenerateStream", swallows)


def a_refusal_does_not_say_when_to_come_back(patch: Patch) -> None:
    def silent(error: PagewireError) -> RpcStatus:
        return RpcStatus(code=to_rpc_status(error).code, message=str(error), trailing_metadata=())

    patch(handlers, "to_rpc_status", silent)


def every_choice_is_told_as_the_first(patch: Patch) -> None:
    fill = codec_public.fill_delta

    def first(message: pb.Delta, delta: Delta, spell: codec_public.Spell) -> None:
        fill(message, replace(delta, choice=0), spell)

    patch(codec_public, "fill_delta", first)


def what_an_executor_says_wrongly_ends_the_engine(patch: Patch) -> None:
    def fold(self: Engine, session: int, result: StepResult) -> None:
        self._hand_out(self.scheduler.update(session, result, 0))

    patch(Engine, "_fold", fold)


def the_best_are_those_with_the_greatest_sum(patch: Patch) -> None:
    worth = BestOfAnswer._worth

    def by_sum(self: BestOfAnswer, number: int) -> tuple[bool, float, int]:
        is_good, mean, place = worth(self, number)
        return is_good, mean * self._choices[number].num_tokens, place

    patch(BestOfAnswer, "_worth", by_sum)


def a_choice_that_failed_is_among_the_best(patch: Patch) -> None:
    worth = BestOfAnswer._worth
    patch(BestOfAnswer, "_worth", lambda self, number: (True, *worth(self, number)[1:]))


MUTATIONS: list[Mutation] = [
    *mutations_in(globals()),
    *mutations_in(vars(stream_mutations)),
    *unit_mutations.MUTATIONS,
    *map(
        core,
        [
            of_the_core.a_key_does_not_name_the_salt,
            of_the_core.who_wants_nothing_of_the_cache_leaves_something_there,
            of_the_core.a_pin_that_is_over_keeps_its_blocks,
            of_the_core.a_fork_shares_its_last_block_without_a_copy,
            of_the_core.a_shared_block_is_written_in_place,
            of_the_core.a_tail_is_shared_without_a_copy,
            of_the_core.a_reused_block_is_not_forgotten,
            of_the_core.a_block_counts_as_written_one_step_too_early,
            of_the_core.a_prefix_hit_is_not_held,
            of_the_core.a_block_is_given_back_twice_when_it_is_shared,
            of_the_core.a_token_of_an_earlier_placement_is_committed,
            of_the_core.a_plan_forgets_what_is_in_flight,
            of_the_core.a_moved_sequence_loses_its_last_token,
            of_the_core.a_request_is_given_up_at_its_second_death,
            of_the_core.nobody_is_ever_given_up,
        ],
    ),
]


def catch(mutation: Mutation, *, seeds: int, first: int = 0) -> tuple[int, str] | None:
    """The first seed that sees the bug, and what it says; None when the bug survives."""
    with planted(mutation):
        if mutation.witness:
            return (-1, mutation.witness.rpartition("::")[2]) if fails(mutation.witness) else None
        for seed in (SEEN_BY.get(mutation.name, first), *range(first, first + seeds)):
            try:
                simulation.run(seed)
            except Exception as error:  # noqa: BLE001 - whatever shows it
                return seed, f"{type(error).__name__}: {error}".split("\n")[0]
    return None


def _note(seen: dict[str, int]) -> None:
    source = Path(seen_by.__file__)
    head = source.read_text().partition("SEEN_BY: Final")[0]
    lines = "".join(f'    "{name}": {seed},\n' for name, seed in sorted(seen.items()))
    source.write_text(f"{head}SEEN_BY: Final[dict[str, int]] = {{\n{lines}}}\n")


def main() -> int:
    """Print the table; 1 when a bug survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=600, help="stories that may be played for one bug")
    parser.add_argument("--only", default="", help="bugs whose name holds this")
    parser.add_argument("--note", action="store_true", help="write which story saw which bug into seen_by.py")
    options = parser.parse_args()
    survived = 0
    seen = dict(SEEN_BY)
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    print("| bug | seed | seen as | s |\n|---|---:|---|---:|")
    for mutation in chosen:
        began = time.monotonic()
        found = catch(mutation, seeds=options.seeds)
        survived += found is None
        seed, what = found or ("", "SURVIVED")
        if isinstance(seed, int) and seed >= 0:
            seen[mutation.name] = seed
        print(f"| {mutation.name} | {seed} | {what[:90]} | {time.monotonic() - began:.1f} |", flush=True)
    if options.note:
        _note(seen)
    print(f"\n{len(chosen) - survived} of {len(chosen)} caught.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
