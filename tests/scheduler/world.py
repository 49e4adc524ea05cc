"""A scheduler with fake executors in one thread: time, order of answers and losses are the test's to choose."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.sampling import SamplingParams, StopConditions
from common.step import StepPlan, StepResult
from common.types import FinishReason, Priority, SequenceId, slot_of
from executor.fake_runner import FakeRunner, NextToken, position_token
from executor.runner import execute
from scheduler.pins import PinLimits
from scheduler.reputation import Patience
from scheduler.scheduler import Losses, Scheduler, SchedulerLimits
from scheduler.sequence import Sequence as CoreSequence
from scheduler.suspicion import End
from scheduler.timeline import Timeline

GREEDY = SamplingParams(temperature=0.0)


class World:
    """One scheduler, any number of executors, and what every request received."""

    runner_class: type[FakeRunner] = FakeRunner

    def __init__(
        self,
        *,
        token_budget: int = 64,
        num_blocks: int = 64,
        block_size: int = 4,
        max_sequences: int = 16,
        max_model_len: int = 128,
        credit: int = 1,
        executors: int = 1,
        prefix_caching: bool = True,
        watermark: float = 0.0,
        vocab_size: int = 1000,
        eos: frozenset[int] = frozenset(),
        next_token: NextToken = position_token,
        patience: Patience | None = None,
        weights: Mapping[str, float] | None = None,
        pins: PinLimits | None = None,
    ) -> None:
        limits = SchedulerLimits(
            token_budget=token_budget,
            watermark=watermark,
            prefix_caching=prefix_caching,
            patience=patience or Patience(),
            pins=pins or PinLimits(),
        )
        self.scheduler = Scheduler(limits, model="fake", eos=eos, secret=b"test", weights=weights)
        self._shape: dict[str, Any] = {
            "num_blocks": num_blocks,
            "block_size": block_size,
            "max_sequences": max_sequences,
            "max_model_len": max_model_len,
            "credit": credit,
            "vocab_size": vocab_size,
        }
        self._next_token = next_token
        self._next_session = 0
        self.runners: dict[int, FakeRunner] = {}
        self.sent: dict[int, deque[StepPlan]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.timelines: dict[str, Timeline] = {}
        self.embedded: dict[str, CoreSequence] = {}  # those that end in a vector
        self.names: dict[SequenceId, str] = {}
        self.now_ns = 0
        for _ in range(executors):
            self.join()

    # ---- events

    def join(
        self,
        *,
        name: str | None = None,
        next_token: NextToken | None = None,
        **changes: Any,
    ) -> int:
        """Another executor; of a name of its own, unless told. `changes` are of its shape, or its `guess`."""
        session = self._next_session
        self._next_session += 1
        runner = self.runner_class(
            name=name or f"fake-{session}",
            next_token=next_token or self._next_token,
            **{**self._shape, **changes},
        )
        facts = runner.load(lambda stage, done, total: None)
        self.scheduler.join(session, facts, self.now_ns)
        self.runners[session], self.sent[session] = runner, deque()
        return session

    def lose(self, session: int, end: End = End.LOST, *, step: int = 0) -> Losses:
        """Kill an executor: whatever it was sent is never answered."""
        losses = self.scheduler.lose(session, self.now_ns, end, step=step)
        del self.runners[session], self.sent[session]
        for request in losses.given_up:
            for id in range(request.id, request.id + request.num_choices):
                self.reasons.setdefault(self.names[SequenceId(id)], FinishReason.ERROR)
        return losses

    def add(
        self,
        name: str,
        prompt: int | Sequence[int],
        *,
        max_tokens: int = 100,
        n: int = 1,
        tenant: str = "",
        priority: Priority = Priority.NORMAL,
        deadline_ns: int = 0,
        sampling: SamplingParams = GREEDY,
        stop_token_ids: tuple[int, ...] = (),
        salt: str = "",
        caches: bool = True,
        max_drafts: int | None = None,
        stop: StopConditions | None = None,
        dimensions: int = 0,
    ) -> list[SequenceId]:
        """A request. A number is a prompt of that many tokens that no other request shares.

        `stop` is instead of `max_tokens` and `stop_token_ids`. With `dimensions` it ends in a vector, which is kept.
        """
        if dimensions:
            stop = StopConditions(max_tokens=1, ignore_eos=True)
        if isinstance(prompt, int):
            start = 100 + 97 * len(self.names)
            prompt = [(start + i) % 1000 for i in range(prompt)]
        timeline = Timeline(name, self.now_ns, tenant=tenant)
        made = self.scheduler.add(
            prompt,
            sampling,
            stop or StopConditions(max_tokens=max_tokens, stop_token_ids=stop_token_ids),
            self.now_ns,
            choices=n,
            tenant=tenant,
            salt=salt,
            caches=caches,
            priority=priority,
            deadline_ns=deadline_ns,
            max_drafts=max_drafts,
            timeline=timeline,
            dimensions=dimensions,
        )
        self.timelines[name] = timeline
        if dimensions:
            self.embedded[name] = made[0]
        for choice, sequence in enumerate(made):
            label = name if n == 1 else f"{name}{choice}"
            self.names[sequence.id] = label
            self.tokens[label] = []
        return [sequence.id for sequence in made]

    def abort(self, name: str) -> None:
        """The caller of `name` leaves."""
        self.scheduler.finish(self.id(name))
        self.reasons.setdefault(name, FinishReason.ABORTED)

    # ---- steps

    def send(self, session: int = 0) -> StepPlan | None:
        """Schedule one step; it stays unanswered."""
        self.now_ns += 1
        plan = self.scheduler.schedule(session, self.now_ns)
        if plan is not None:
            self.sent[session].append(plan)
        return plan

    def answer(self, session: int = 0, *, compute_ns: int = 0, idle_ns: int = 0) -> StepResult:
        """Run the oldest unanswered step and fold its result back in, by an executor that took and waited so long."""
        self.now_ns += 1
        result = replace(self._result(session), compute_ns=compute_ns, idle_ns=idle_ns)
        for output in self.scheduler.update(session, result, self.now_ns):
            name = self.names[output.id]
            assert name not in self.reasons, f"{name} got a token after its end"
            if output.token is not None:
                self.tokens[name].append(output.token)
            if output.reason is not FinishReason.NONE:
                self.reasons[name] = output.reason
        return result

    def _result(self, session: int) -> StepResult:
        return execute(self.runners[session], self.sent[session].popleft())

    def step(self, session: int = 0) -> dict[str, int]:
        """Schedule and answer one step in lockstep; say what each row was granted."""
        plan = self.send(session)
        if plan is None:
            return {}
        rows = {self.name_at(session, ref): n for ref, n in zip(plan.refs, plan.num_scheduled, strict=True)}
        self.answer(session)
        return rows

    def run(self, max_steps: int = 10_000) -> None:
        """Fill every pipeline and answer in turn until nothing is left to do. Who is held back is waited for."""
        for _ in range(max_steps):
            for session in list(self.runners):
                while self.send(session) is not None:
                    pass
            busy = [s for s in self.runners if self.sent[s]]
            if not busy:
                held_ns = self.scheduler.held_back_ns(self.now_ns)
                if not held_ns or not self.scheduler.num_sequences:
                    break
                self.now_ns += held_ns
            for session in busy:
                self.answer(session)
            self.scheduler.check()
        assert self.scheduler.num_sequences == 0, f"{self.scheduler.num_sequences} sequences never ended"
        for timeline in self.timelines.values():
            timeline.check()

    # ---- looking

    def id(self, name: str) -> SequenceId:
        """The sequence behind a name."""
        return next(id for id, label in self.names.items() if label == name)

    def name_at(self, session: int, ref: int) -> str:
        """Who has the slot."""
        for sequence in self.scheduler.session(session).running:
            if sequence.ref == ref:
                return self.names[sequence.id]
        raise AssertionError(f"nobody runs in slot {slot_of(ref)}")  # type: ignore[arg-type]

    @property
    def num_free(self) -> int:
        """Free blocks of the first executor."""
        return self.scheduler.sessions[0].pool.num_free
