"""Any event at any moment: blocks are conserved, nobody writes what another holds, and no token ever changes.

The rules are the events, the Witness is the judge. `python -m tests.scheduler.crowd` searches further, by random walks.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from common.sampling import Grammar, SamplingParams, StopConditions
from common.types import FinishReason, Priority
from scheduler.suspicion import End
from tests.scheduler.crowd import prompt_of, stories
from tests.scheduler.witness import VOCAB_SIZE, Witness

TOKENS = st.integers(0, VOCAB_SIZE - 1)
PROMPTS = st.builds(prompt_of, st.integers(0, 1), st.integers(0, 20), st.lists(TOKENS, min_size=1, max_size=4))
STOPS = st.builds(
    StopConditions,
    max_tokens=st.integers(1, 16),
    stop_token_ids=st.sampled_from([(), (5,), (5, 9, 11, 30)]),
    ignore_eos=st.booleans(),
)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2),
    grammar=st.sampled_from([None, Grammar("regex", "a+")]),
)


class Machine(RuleBasedStateMachine):
    """Every public move of the scheduler, as often and in any order that hypothesis likes."""

    world: Witness

    @initialize(budget=st.sampled_from([4, 9, 24, 64]), caching=st.booleans(), watermark=st.sampled_from([0.0, 0.1]))
    def begin(self, budget: int, caching: bool, watermark: float) -> None:
        self.world = Witness(token_budget=budget, prefix_caching=caching, watermark=watermark)

    @rule(
        prompt=PROMPTS,
        n=st.sampled_from([1, 1, 2, 4]),
        stop=STOPS,
        sampling=SAMPLING,
        tenant=st.sampled_from("ab"),
        priority=st.sampled_from(Priority),
        salt=st.sampled_from(["", "", "salt"]),
        caches=st.sampled_from([True, True, False]),
    )
    def request(
        self,
        prompt: list[int],
        n: int,
        stop: StopConditions,
        sampling: SamplingParams,
        tenant: str,
        priority: Priority,
        salt: str,
        caches: bool,
    ) -> None:
        self.world.request(
            prompt, n=n, stop=stop, sampling=sampling, tenant=tenant, priority=priority, salt=salt, caches=caches
        )

    @rule(prompt=PROMPTS, tenant=st.sampled_from("ab"))
    def embed(self, prompt: list[int], tenant: str) -> None:
        stop = StopConditions(max_tokens=1, ignore_eos=True)
        self.world.request(prompt, n=1, stop=stop, tenant=tenant, embeds=True)

    @rule(prompt=PROMPTS, tenant=st.sampled_from("ab"), salt=st.sampled_from(["", "salt"]), seconds=st.integers(1, 20))
    def pin(self, prompt: list[int], tenant: str, salt: str, seconds: int) -> None:
        self.world.pin(prompt, tenant=tenant, salt=salt, seconds=seconds)

    @rule(tenant=st.sampled_from("ab"))
    def unpin(self, tenant: str) -> None:
        self.world.unpin(tenant)

    @rule(tenant=st.sampled_from("ab"))
    def flush(self, tenant: str) -> None:
        self.world.flush(tenant)

    @precondition(lambda self: self.world.prompts)
    @rule(draw=st.data(), own=st.lists(TOKENS, min_size=1, max_size=3))
    def talk_on(self, draw: st.DataObject, own: list[int]) -> None:
        name = draw.draw(st.sampled_from(list(self.world.prompts)))
        prompt = [*self.world.prompts[name], *self.world.tokens[name], *own]
        if len(prompt) < 48:
            self.world.request(prompt, n=1, stop=StopConditions(max_tokens=8))

    @precondition(lambda self: self.world.alive)
    @rule(draw=st.data())
    def abort(self, draw: st.DataObject) -> None:
        self.world.abort(self.world.names[draw.draw(st.sampled_from(self.world.alive))])

    @precondition(lambda self: len(self.world.runners) < 3)
    @rule(
        block_size=st.sampled_from([1, 2, 4, 8]),
        num_tokens=st.sampled_from([16, 24, 40, 64]),
        credit=st.integers(1, 3),
        max_sequences=st.sampled_from([1, 2, 4, 8]),
        max_step_tokens=st.sampled_from([8, 256]),
        compile_rows=st.integers(0, 3),
        left_out_every=st.integers(0, 3),
        glitches=st.booleans(),
    )
    def join(
        self,
        block_size: int,
        num_tokens: int,
        credit: int,
        max_sequences: int,
        max_step_tokens: int,
        compile_rows: int,
        left_out_every: int,
        glitches: bool,
    ) -> None:
        self.world.join(
            next_token=self.world.glitch if glitches else None,
            block_size=block_size,
            num_blocks=num_tokens // block_size,
            credit=credit,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            compile_rows=compile_rows,
            left_out_every=left_out_every,
        )

    @precondition(lambda self: self.world.runners)
    @rule(draw=st.data(), end=st.sampled_from([None, *End]))
    def lose(self, draw: st.DataObject, end: End | None) -> None:
        session = draw.draw(st.sampled_from(list(self.world.runners)))
        if end is None:
            self.world.leave(session)
        else:
            self.world.lose(session, end)

    @precondition(lambda self: any(self.world.sent.values()) and len(self.world.runners) == 1)
    @rule(ends=st.lists(st.sampled_from([End.LOST, End.FAILED]), min_size=1, max_size=3))
    def crash(self, ends: list[End]) -> None:
        """The only executor dies in its first step, again and again."""
        for end in ends:
            self.world.lose(next(iter(self.world.runners)), end)
            self.world.send(self.world.join(num_blocks=20, block_size=4, max_sequences=6, credit=2))

    @precondition(lambda self: self.world.dead)
    @rule()
    def acquit(self) -> None:
        self.world.acquit()

    @precondition(lambda self: self.world.runners)
    @rule(draw=st.data(), silent=st.booleans())
    def hush(self, draw: st.DataObject, silent: bool) -> None:
        session = draw.draw(st.sampled_from(list(self.world.runners)))
        (self.world.scheduler.fell_silent if silent else self.world.scheduler.spoke)(session)

    @precondition(lambda self: self.world.runners)
    @rule(draw=st.data())
    def schedule(self, draw: st.DataObject) -> None:
        self.world.send(draw.draw(st.sampled_from(list(self.world.runners))))

    @precondition(lambda self: any(self.world.sent.values()))
    @rule(draw=st.data(), twice=st.booleans(), wrongly=st.booleans())
    def answer(self, draw: st.DataObject, twice: bool, wrongly: bool) -> None:
        session = draw.draw(st.sampled_from([session for session, plans in self.world.sent.items() if plans]))
        if wrongly:
            self.world.answer_wrongly(session)
        self.world.answer(session)
        if twice:
            self.world.answer_twice(session)

    @rule(seconds=st.sampled_from([2, 11, 25]))
    def wait(self, seconds: int) -> None:
        self.world.now_ns += seconds * 1_000_000_000

    @precondition(lambda self: self.world.runners)
    @rule(steps=st.integers(2, 12))
    def steps(self, steps: int) -> None:
        """Some time passes: every executor takes what its credit allows and answers one step."""
        for _ in range(steps):
            for session in list(self.world.runners):
                while self.world.send(session) is not None:
                    pass
                if self.world.sent[session]:
                    self.world.answer(session)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


def test_no_order_of_events_changes_a_token_or_loses_a_block() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=90,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_a_crowd_on_tiny_executors_ends_with_the_tokens_each_would_have_had_alone() -> None:
    worlds = list(stories(num_seeds=150, num_events=150))
    assert sum(w.scheduler.counters.preemptions for w in worlds) > 300, "memory was never short"
    assert sum(w.scheduler.counters.moved for w in worlds) > 150, "no executor was ever lost"
    assert sum(w.scheduler.counters.cached_prompt_tokens for w in worlds) > 5000, "no prefix was ever found"
    assert sum(w.scheduler.prefixes.pins.num_made for w in worlds) > 500, "nothing was ever pinned"
    assert sum(w.scheduler.counters.trials for w in worlds) > 10, "no request ever had to run alone"
    assert sum(w.scheduler.counters.given_up for w in worlds) > 1, "no request was ever given up"
    assert sum(w.scheduler.counters.quarantines for w in worlds) > 20, "no executor was ever quarantined"
    assert sum(w.scheduler.counters.rows_unready for w in worlds) > 500, "no grammar was ever late"
    embedded = sum(w.scheduler.counters.finished.get(FinishReason.EMBEDDED, 0) for w in worlds)
    assert embedded > 300, "nothing was ever embedded"
