"""Bugs in what outlives a process: tickets, streams that are resumed, their readers, tenants, epochs, names, drains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common.sampling import StopConditions
from pagewire.calls import Asked
from pagewire.continuation import Continuation, OutOfStep
from protos import inference_pb2 as pb
from scheduler.prefix_cache import KeyChain
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from services import answering
from services.answer import Choice, Usage
from services.engine import Engine
from services.executor_service import ExecutorService
from services.link_service import ExecutorLinkService
from services.live_requests import LiveRequest, LiveRequests
from services.request_stream import RequestStream
from services.text import IncrementalDecoder, StopMatcher
from services.tickets import Scope, Tickets, TicketWriter, scope
from tests.faults.planting import Patch

# ---- tickets


def the_seed_is_not_in_the_ticket(patch: Patch) -> None:
    def seedless(tenant: str, request_id: str, asked: Any, *rest: Any) -> Scope:
        return scope(tenant, request_id, replace(asked, sampling=replace(asked.sampling, seed=0)), *rest)

    patch(answering, "make_scope", seedless)


def the_tenant_is_not_in_the_ticket(patch: Patch) -> None:
    patch(answering, "make_scope", lambda tenant, *rest: scope("", *rest))


def max_tokens_is_not_in_the_ticket(patch: Patch) -> None:
    def boundless(tenant: str, request_id: str, asked: Any, *rest: Any) -> Scope:
        return scope(tenant, request_id, replace(asked, max_tokens=0), *rest)

    patch(answering, "make_scope", boundless)


def the_prompt_is_not_in_the_ticket(patch: Patch) -> None:
    patch(
        answering,
        "make_scope",
        lambda tenant, request_id, asked, prompt, digest: scope(tenant, request_id, asked, [], digest),
    )


def a_ticket_counts_its_tokens_and_does_not_name_them(patch: Patch) -> None:
    add = TicketWriter.add
    patch(TicketWriter, "add", lambda self, tokens: add(self, [0] * len(tokens)))


def the_choice_is_not_in_the_ticket(patch: Patch) -> None:
    init = TicketWriter.__init__
    patch(TicketWriter, "__init__", lambda self, key, scope, choice, tokens: init(self, key, scope, 0, tokens))


def a_ticket_never_expires(patch: Patch) -> None:
    check: Any = Tickets.check
    patch(Tickets, "check", lambda self, *of_what: check(self, *of_what[:-1], 0.0))


def a_ticket_is_good_for_any_model(patch: Patch) -> None:
    check = Tickets.check

    def of_its_own(self: Tickets, ticket: bytes, scope: Scope, *rest: Any) -> str:
        return check(self, ticket, Scope(scope.digest, ticket[17:25]), *rest)

    patch(Tickets, "check", of_its_own)


def tickets_are_not_checked(patch: Patch) -> None:
    patch(Tickets, "check", lambda self, *_: "")


def a_ticket_forgets_what_class_computed_its_tokens(patch: Patch) -> None:
    ticket = TicketWriter.ticket
    patch(TicketWriter, "ticket", lambda self, expires_s, determinism: ticket(self, expires_s, ""))


# ---- streams that go on


def max_tokens_is_counted_from_where_a_stream_goes_on(patch: Patch) -> None:
    add = Scheduler.add

    def not_lowered(self: Scheduler, prompt: Any, sampling: Any, stop: StopConditions, *rest: Any, **more: Any) -> Any:
        begun = more.get("begun") or {}
        had = max((len(each.tokens) for each in begun.values()), default=0)
        return add(self, prompt, sampling, replace(stop, max_tokens=stop.max_tokens + had), *rest, **more)

    patch(Scheduler, "add", not_lowered)


def a_resumed_stream_counts_its_output_as_prompt(patch: Patch) -> None:
    add = Scheduler.add

    def all_prompt(self: Scheduler, *args: Any, **more: Any) -> list[Sequence]:
        made = add(self, *args, **more)
        for sequence in made:
            sequence.num_prompt = len(sequence.tokens)
        return made

    patch(Scheduler, "add", all_prompt)


def a_resumed_stream_is_computed_from_its_prompt_alone(patch: Patch) -> None:
    add = Scheduler.add

    def anew(self: Scheduler, *args: Any, **more: Any) -> list[Sequence]:
        made = add(self, *args, **more)
        for sequence in made:
            del sequence.tokens[sequence.num_prompt :]
        return made

    patch(Scheduler, "add", anew)


def a_stop_string_is_looked_for_behind_the_cut_alone(patch: Patch) -> None:
    begin = Choice.begin

    def forgetful(self: Choice, *args: Any, **more: Any) -> bool:
        ended = begin(self, *args, **more)
        stops = self._text._stops
        if stops is not None:
            self._text._stops = StopMatcher(stops._stops)
        return ended

    patch(Choice, "begin", forgetful)


def half_a_character_at_the_cut_is_told_as_a_replacement(patch: Patch) -> None:
    begin = Choice.begin

    def forgetful(self: Choice, *args: Any, **more: Any) -> bool:
        ended = begin(self, *args, **more)
        self._text._decoder = IncrementalDecoder(self._text._decoder._tokenizer)
        return ended

    patch(Choice, "begin", forgetful)


def tokens_from_before_the_cut_are_counted_twice(patch: Patch) -> None:
    begin, usage = Choice.begin, Choice._usage
    before: dict[int, int] = {}

    def counting(self: Choice, tokens: list[int], *rest: Any, **more: Any) -> bool:
        ended = begin(self, tokens, *rest, **more)
        before[id(self)] = len(tokens)
        return ended

    def twice(self: Choice, sequence: Sequence) -> Usage:
        told = usage(self, sequence)
        return replace(told, completion_tokens=told.completion_tokens + before.get(id(self), 0))

    patch(Choice, "begin", counting)
    patch(Choice, "_usage", twice)


def tokens_from_before_the_cut_are_not_counted(patch: Patch) -> None:
    begin = Choice.begin

    def from_zero(self: Choice, *args: Any, **more: Any) -> bool:
        ended = begin(self, *args, **more)
        self.num_tokens = 0
        return ended

    patch(Choice, "begin", from_zero)


def log_probabilities_are_told_of_the_tokens_before(patch: Patch) -> None:
    logprobs_of = Sequence.logprobs_of
    patch(Sequence, "logprobs_of", lambda self, first, count: logprobs_of(self, max(0, first - 1), count))


# ---- readers


def two_read_at_once(patch: Patch) -> None:
    patch(RequestStream, "supersede", lambda self, error: None)


def a_reader_who_is_superseded_ends_the_request(patch: Patch) -> None:
    patch(RequestStream, "supersede", lambda self, error: self.fail(error))


def a_reader_who_comes_back_misses_a_token(patch: Patch) -> None:
    attach = Engine.attach

    def one_late(self: Engine, stream: RequestStream, taken: Any, **more: Any) -> RequestStream:
        late = {n: min(count + 1, stream.sequences[n].num_output) for n, count in taken.items()}
        return attach(self, stream, late, **more)

    patch(Engine, "attach", one_late)


def a_reader_who_comes_back_hears_nothing_new(patch: Patch) -> None:
    attach = Engine.attach

    def deaf(self: Engine, stream: RequestStream, *args: Any, **more: Any) -> RequestStream:
        streams = dict(self._streams)
        taker = attach(self, stream, *args, **more)
        self._streams.update({id: streams[id] for id in self._streams})
        return taker

    patch(Engine, "attach", deaf)


def a_request_that_nobody_comes_back_for_runs_for_ever(patch: Patch) -> None:
    linger = LiveRequests.linger

    def patient(self: LiveRequests, live: LiveRequest) -> None:
        linger(self, live)
        live.stop_waiting()

    patch(LiveRequests, "linger", patient)


def a_request_that_ended_stays_in_the_book(patch: Patch) -> None:
    def end(self: LiveRequests, live: LiveRequest) -> None:
        self._lingering.pop(live, None)
        live.stop_waiting()
        live.stream.close()

    patch(LiveRequests, "end", end)


def the_client_takes_any_end_of_a_call_for_the_answers(patch: Patch) -> None:
    broke = Asked.broke

    def ended(self: Asked, why: OutOfStep | None = None) -> float:
        after_s = broke(self, why)
        self.continuation.ended = True  # type: ignore[attr-defined]
        return after_s

    patch(Asked, "broke", ended)
    patch(
        Asked,
        "is_done",
        property(lambda self: self.continuation.is_done or getattr(self.continuation, "ended", False)),
    )


def the_client_asks_again_for_what_has_ended(patch: Patch) -> None:
    def everything(self: Continuation) -> pb.GenerateStreamRequest | pb.ResumeRequest:
        if not self.finishes and not any(self._tokens):
            return self._request
        points = zip(self._tickets, self._tokens, strict=True)
        choices = [
            pb.ResumePoint(choice=n, ticket=ticket, token_ids=tokens) for n, (ticket, tokens) in enumerate(points)
        ]
        return pb.ResumeRequest(request=self._request, choices=choices)

    patch(Continuation, "next_call", everything)


def the_client_comes_back_with_its_first_ticket(patch: Patch) -> None:
    add = Continuation._add

    def keeps(self: Continuation, delta: pb.Delta) -> Any:
        before = self._tickets[delta.choice]
        new = add(self, delta)
        if delta.index:
            self._tickets[delta.choice] = before
        return new

    patch(Continuation, "_add", keeps)


# ---- tenants


def a_block_is_found_by_every_tenant(patch: Patch) -> None:
    root = KeyChain.root
    patch(KeyChain, "root", lambda self, model, tenant="", salt="": root(self, model, "", salt))


# ---- epochs and names


def an_executor_forgets_which_scheduler_was_the_last(patch: Patch) -> None:
    patch(ExecutorService, "_epoch", property(lambda self: 0, lambda self, epoch: None))


def a_name_goes_to_the_executor_that_came_last(patch: Patch) -> None:
    enter = ExecutorLinkService._enter

    def any_process(self: ExecutorLinkService, session: int, facts: Any, incarnation: bytes, context: Any) -> Any:
        old = self._live.get(facts.name)
        if old is not None:
            old.incarnation = incarnation
        return enter(self, session, facts, incarnation, context)

    patch(ExecutorLinkService, "_enter", any_process)


def who_says_no_hello_is_waited_for(patch: Patch) -> None:
    init = ExecutorLinkService.__init__

    def patient(self: ExecutorLinkService, *args: Any, **settings: Any) -> None:
        init(self, *args, **{**settings, "hello_timeout_s": 1e6})

    patch(ExecutorLinkService, "__init__", patient)


# ---- drains


def a_scheduler_that_leaves_drops_what_it_has(patch: Patch) -> None:
    async def at_once(self: Engine) -> None:
        return

    patch(Engine, "idle", at_once)


def an_abort_is_told_as_the_end_of_the_answer(patch: Patch) -> None:
    patch(RequestStream, "error", None)
