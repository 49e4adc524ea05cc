"""Who goes first: what has begun, then bands and age, then the tenant that was served least, then who came first."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling import BeamParams, SamplingParams, StopConditions
from common.types import FinishReason, Priority, SequenceId
from scheduler.account import W_IN, W_OUT
from scheduler.line import AGING_NS, Line
from scheduler.prefix_cache import BlockKey
from scheduler.sequence import Request, Sequence
from tests.scheduler.world import World

HIGH, NORMAL, LOW = Priority


class Queue:
    """A Line whose sequences have names."""

    def __init__(self, **weights: float) -> None:
        self.line = Line(weights)
        self.names: dict[Sequence, str] = {}
        self.now_ns = 0

    def add(self, name: str, *, prompt: int = 10, n: int = 1, priority: Priority = NORMAL) -> list[Sequence]:
        """A request; its tenant is the first letter of its name."""
        request = Request(id=SequenceId(len(self.names)), num_choices=n)
        made = [
            Sequence(
                id=SequenceId(len(self.names) + choice),
                request=request,
                order=len(self.names) + choice,
                tokens=array("I", [1] * prompt),
                num_prompt=prompt,
                root=BlockKey(b""),
                sampling=SamplingParams(),
                stop=StopConditions(max_tokens=10),
                choice=choice,
                tenant=name[0],
                priority=priority,
                cost=10 if choice else prompt + 10,
                arrived_ns=self.now_ns,
            )
            for choice in range(n)
        ]
        self.names |= {sequence: name if n == 1 else f"{name}.{sequence.choice}" for sequence in made}
        self.line.add(made)
        self.line.check()
        return made

    def serve(self, num: int = 1, *, output: int = 0) -> str:
        """Admit the first `num`, one after the other; each generates `output` tokens at once. Their names."""
        served: list[str] = []
        for sequence in self.line.walk(self.now_ns):
            if len(served) == num:
                break
            self.admit(sequence, output=output)
            served.append(self.names[sequence])
        return " ".join(served)

    def admit(self, sequence: Sequence, *, output: int = 0) -> None:
        self.line.admit(sequence, sequence.num_prompt, self.now_ns)
        sequence.attempt += 1
        assert sequence.account is not None
        sequence.account.counter += output * sequence.account.per_output
        self.line.check()

    def order(self) -> str:
        """Everybody, in the order in which they would be looked at if none could be admitted."""
        return " ".join(self.names[sequence] for sequence in self.line.walk(self.now_ns))


def test_without_tenants_and_priorities_who_came_first_goes_first() -> None:
    queue = Queue()
    for name in ("a1", "a2", "a3"):
        queue.add(name)
    assert queue.order() == "a1 a2 a3"
    assert queue.serve(3) == "a1 a2 a3"


def test_tenants_take_turns_however_much_one_of_them_sends() -> None:
    queue = Queue()
    for i in range(6):
        queue.add(f"a{i}")
    queue.add("b0")
    queue.add("b1")
    assert queue.serve(8) == "a0 b0 a1 b1 a2 a3 a4 a5"


def test_service_is_counted_in_tokens_and_not_in_requests() -> None:
    queue = Queue()
    queue.add("a1", prompt=100)
    queue.add("a2", prompt=100)
    for i in range(12):
        queue.add(f"b{i}", prompt=10)
    assert queue.serve(13) == "a1 b0 b1 b2 b3 b4 b5 b6 b7 b8 b9 a2 b10"


def test_an_output_token_counts_as_two() -> None:
    queue = Queue()
    for name in ("a1", "a2", "b1", "b2", "b3", "b4"):
        queue.add(name, prompt=10)
    assert queue.serve(1, output=10) == "a1"
    assert queue.serve(5) == "b1 b2 b3 a2 b4", "30 each, and who came first breaks the tie"


def test_a_weight_is_a_share() -> None:
    queue = Queue(a=4)
    for i in range(9):
        queue.add(f"a{i}")
        queue.add(f"b{i}")
    assert queue.serve(10) == "a0 b0 a1 a2 a3 b1 a4 a5 a6 a7"


def test_a_share_may_change_while_nothing_of_the_tenant_waits() -> None:
    queue = Queue()
    queue.add("a0")
    queue.line.weigh("a", 9)  # too early: a0 was listed with another
    assert queue.serve() == "a0"
    queue.line.weigh("a", 4)
    for i in range(1, 10):
        queue.add(f"a{i}")
        queue.add(f"b{i}")
    assert queue.serve(10) == "a1 b1 a2 a3 a4 b2 a5 a6 a7 a8"


def test_a_tenant_that_was_away_has_saved_nothing_up() -> None:
    queue = Queue()
    queue.add("b0")
    for i in range(9):
        queue.add(f"a{i}")
    assert queue.serve(6) == "b0 a0 a1 a2 a3 a4"
    for i in range(1, 4):
        queue.add(f"b{i}")
    assert queue.serve(5) == "a5 b1 a6 b2 a7", "b is lifted to what a has been served, and not five requests behind"


def test_a_tenant_that_leaves_and_comes_back_keeps_its_debt() -> None:
    queue = Queue()
    queue.add("a0", prompt=50)
    for i in range(9):
        queue.add(f"b{i}")
    assert queue.serve(2) == "a0 b0"
    queue.add("a1")
    assert queue.serve(6) == "b1 b2 b3 b4 b5 a1"


def test_a_newcomer_to_an_empty_line_starts_where_the_last_one_left() -> None:
    queue = Queue()
    queue.add("a0", prompt=50)
    assert queue.serve() == "a0"
    queue.add("b0")
    queue.add("b1")
    queue.add("a1")
    assert queue.serve(3) == "b0 a1 b1"


def test_a_better_band_goes_first() -> None:
    queue = Queue()
    queue.add("a1", priority=LOW)
    queue.add("a2")
    queue.add("a3", priority=HIGH)
    queue.add("b1", priority=HIGH)
    assert queue.serve(4) == "a3 b1 a2 a1"


def test_waiting_makes_a_request_better_band_by_band() -> None:
    queue = Queue()
    queue.add("a", priority=LOW)
    queue.now_ns = AGING_NS
    queue.add("b")
    queue.add("c", priority=HIGH)
    assert queue.order() == "c a b"
    queue.now_ns = 2 * AGING_NS - 1
    queue.add("d", priority=HIGH)
    assert queue.order() == "c d a b"
    queue.now_ns = 2 * AGING_NS
    queue.add("e", priority=HIGH)
    assert queue.order() == "a b c d e", "a and b have aged into the best band, and who came first breaks the tie"


def test_only_those_that_have_waited_are_better() -> None:
    queue = Queue()
    queue.add("a1")
    queue.now_ns = AGING_NS - 1
    queue.add("a2")
    queue.add("b1", priority=HIGH)
    queue.add("b2", priority=HIGH)
    queue.now_ns = AGING_NS
    assert queue.serve(4) == "a1 b1 b2 a2"


def test_what_a_tenant_is_served_in_one_band_is_not_held_against_it_in_another() -> None:
    queue = Queue()
    queue.add("a1", prompt=100, priority=HIGH)
    queue.add("b0")
    queue.add("a2")
    assert queue.serve(1) == "a1"
    queue.add("b1")
    assert queue.serve(3) == "b0 a2 b1"


def test_the_choices_of_a_request_stay_together() -> None:
    queue = Queue()
    queue.add("a1", n=3)
    queue.add("b1")
    assert queue.serve(4) == "a1.0 a1.1 a1.2 b1"


def test_the_other_choices_of_a_request_that_runs_go_before_everybody() -> None:
    queue = Queue()
    queue.add("a1", n=2)
    queue.add("b1", priority=HIGH)
    (first, _), (better,) = [s for s in queue.names if s.tenant == "a"], [s for s in queue.names if s.tenant == "b"]
    queue.admit(better)
    queue.admit(first)
    queue.add("b2", priority=HIGH)
    assert queue.order() == "a1.1 b2"


def test_one_that_comes_back_stands_in_front_at_its_old_place_and_pays_nothing() -> None:
    queue = Queue()
    (a1,) = queue.add("a1", prompt=10)
    (b1,) = queue.add("b1", prompt=10)
    for name in ("a2", "b2", "a3", "b3"):
        queue.add(name, prompt=10)
    queue.add("b4", priority=HIGH)
    queue.admit(a1)
    queue.admit(b1)
    queue.line.add_again(b1)
    queue.line.add_again(a1)
    assert queue.serve(7) == "a1 b1 b4 a2 b2 a3 b3"


def test_whoever_ends_in_the_line_leaves_no_gap() -> None:
    queue = Queue()
    made = [queue.add(name)[0] for name in ("a1", "a2", "b1", "b2")]
    queue.line.remove(made[0])
    queue.line.remove(made[3])
    queue.line.check()
    assert queue.serve(9) == "a2 b1"
    assert len(queue.line) == queue.line.num_tokens == 0


def test_one_that_is_passed_over_is_not_lost_and_the_rest_is_in_order() -> None:
    queue = Queue()
    for name in ("a1", "a2", "a3", "b1", "b2"):
        queue.add(name)
    seen: list[str] = []
    for sequence in queue.line.walk(0):
        seen.append(queue.names[sequence])
        if seen[-1] == "a2":  # a1 belongs elsewhere; a2 is served, so b is next
            queue.admit(sequence)
    assert seen == ["a1", "a2", "b1", "b2", "a3"]
    assert queue.order() == "b1 b2 a1 a3"


def test_the_standing_counts_what_goes_before_a_request() -> None:
    queue = Queue(b=2)
    for i in range(6):
        queue.add(f"a{i}")  # each costs 10 + 10
    queue.add("c0", priority=HIGH, prompt=30)
    queue.add("c1", priority=LOW, prompt=500)

    newcomer = queue.line.standing("b", NORMAL)
    assert (newcomer.num_waiting, newcomer.num_tokens, newcomer.own_waiting) == (8, 120 + 40 + 510, 0)
    assert newcomer.tokens_before == 40, "only the better band: it has been served nothing yet"
    queue.add("b0")
    assert queue.line.standing("b", NORMAL).tokens_before == 40 + 20 * 3 // 2, "as it has twice the weight of a"
    assert queue.line.standing("a", NORMAL).tokens_before == 40 + 140
    assert queue.line.standing("c", NORMAL).own_tokens == 40 + 510


# ---- against a line that is sorted anew whenever somebody looks


@dataclass
class Plain:
    """The rules of the line, word by word, without a thought for time."""

    weights: dict[str, float]
    begun: list[Sequence] = field(default_factory=list)
    requests: list[list[Sequence]] = field(default_factory=list)  # by arrival
    counters: dict[tuple[str, Priority], float] = field(default_factory=dict)
    listed: dict[tuple[str, Priority], Priority] = field(default_factory=dict)  # where each queue stood last
    left: dict[Priority, tuple[str, Priority]] = field(default_factory=dict)
    now_ns: int = 0

    def settle(self) -> None:
        """Every queue stands in the band of its head; tenants that enter a band are lifted."""
        stands: dict[tuple[str, Priority], Priority] = {}
        for request in self.requests:
            head = request[0]
            aged = max(HIGH, head.priority - (self.now_ns - head.arrived_ns) // AGING_NS)
            stands.setdefault((head.tenant, head.priority), Priority(aged))
        for queue, band in list(self.listed.items()):
            if stands.get(queue) is not band:
                del self.listed[queue]
                self.left[band] = (queue[0], band)
        for queue, band in stands.items():
            if queue not in self.listed:
                account = (queue[0], band)
                there = {(tenant, b) for (tenant, _), b in self.listed.items() if b is band}
                if account not in there:
                    last = {self.left[band]} if band in self.left else set()
                    floor = min((self.counters[other] for other in there or last), default=0.0)
                    self.counters[account] = max(self.counters.get(account, 0.0), floor)
                self.listed[queue] = band

    def order(self) -> list[Sequence]:
        def key(request: list[Sequence]) -> tuple[int, float, int]:
            band = self.listed[request[0].tenant, request[0].priority]
            return band, self.counters[request[0].tenant, band], request[0].order

        front = sorted(self.begun, key=lambda s: s.order)
        return front + [s for request in sorted(self.requests, key=key) for s in request]

    def admit(self, sequence: Sequence) -> tuple[str, Priority] | None:
        """Whose account it is from now on; None where it has one."""
        for request in self.requests:
            if sequence in request:
                account = (sequence.tenant, self.listed[sequence.tenant, sequence.priority])
                self.requests.remove(request)
                self.begun += [s for s in request if s is not sequence]
                return account
        self.begun.remove(sequence)
        return None


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "admit", "admit", "pass", "end", "return", "wait", "output"]),
        st.integers(0, 7),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(Priority),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(events=EVENTS)
def test_the_line_is_what_its_rules_say(events: Seq[tuple[str, int, str, Priority]]) -> None:
    queue, plain = Queue(b=2.0), Plain({"b": 2.0})
    accounts: dict[Sequence, tuple[str, Priority]] = {}
    running: list[Sequence] = []

    def charge(sequence: Sequence, tokens: int, price: int) -> None:
        plain.counters[accounts[sequence]] += tokens * (price / plain.weights.get(sequence.tenant, 1.0))

    for kind, number, tenant, priority in events:
        waiting = plain.order()
        if kind == "add":
            made = queue.add(f"{tenant}{len(queue.names)}", prompt=1 + number, n=1 + number % 3, priority=priority)
            plain.requests.append(list(made))
        elif kind == "wait":
            queue.now_ns += number * AGING_NS // 3
            plain.now_ns = queue.now_ns
        elif kind in ("admit", "pass") and waiting:
            place = 0 if kind == "admit" else number % len(waiting)
            sequence = waiting[place]
            for looked_at in queue.line.walk(queue.now_ns):
                if looked_at is sequence:
                    queue.admit(sequence)
                    break
            request = [s for r in plain.requests if sequence in r for s in r]
            account = plain.admit(sequence)
            if account is not None:
                accounts |= dict.fromkeys(request, account)
            if sequence.attempt == 1 and sequence not in running:
                charge(sequence, sequence.num_prompt, W_IN)
            running.append(sequence)
        elif kind == "end" and waiting:
            sequence = waiting[number % len(waiting)]
            queue.line.remove(sequence)
            plain.begun = [s for s in plain.begun if s is not sequence]
            plain.requests = [r for r in ([s for s in q if s is not sequence] for q in plain.requests) if r]
        elif kind == "return" and running:
            sequence = running.pop(number % len(running))
            queue.line.add_again(sequence)
            plain.begun.append(sequence)
        elif kind == "output" and running:
            sequence = running[number % len(running)]
            assert sequence.account is not None
            sequence.account.counter += number * sequence.account.per_output
            charge(sequence, number, W_OUT)
        plain.settle()
        queue.line.check()
        assert list(queue.line.walk(queue.now_ns)) == plain.order()


# ---- in the scheduler


def request(world: World, name: str, priority: Priority) -> Sequence:
    (id,) = world.add(name, prompt=8, max_tokens=10, priority=priority)
    return world.scheduler.sequence(id)


def test_small_requests_of_another_tenant_do_not_starve_a_large_one() -> None:
    world = World(num_blocks=8, max_model_len=32, prefix_caching=False)
    world.add("running", prompt=8, max_tokens=20, tenant="b")
    world.step()
    world.add("large", prompt=27, max_tokens=2, tenant="a")
    for i in range(20):
        world.add(f"small{i}", prompt=2, max_tokens=2, tenant="b")

    assert world.step() == {"running": 1}, "a was served less than b, and what is small waits with the rest"
    while "running" not in world.reasons:
        world.step()
    assert "large" in world.step()
    world.run()


def test_the_low_band_gives_its_blocks_back_first_however_old_it_is() -> None:
    world = World(num_blocks=6, block_size=4, max_model_len=24)
    low = request(world, "low", LOW)
    world.step()
    high = request(world, "high", HIGH)
    world.run()

    assert low.preemptions > 0 and high.preemptions == 0
    assert world.tokens["low"] == world.tokens["high"] == list(range(8, 18))


def test_a_low_one_that_has_waited_for_long_is_not_given_up_for_a_high_one() -> None:
    world = World(num_blocks=6, block_size=4, max_model_len=24)
    low = request(world, "low", LOW)
    world.now_ns = 2 * AGING_NS
    high = request(world, "high", HIGH)
    world.run()

    assert low.preemptions == 0 and high.preemptions > 0


def test_what_is_computed_again_is_charged_to_nobody() -> None:
    world = World(executors=2, prefix_caching=False)
    (id,) = world.add("a", prompt=20, max_tokens=10, tenant="a")
    sequence = world.scheduler.sequence(id)
    for session in (0, 1):
        world.send(session)
        world.answer(session)
        assert sequence.account is not None
        counted = sequence.account.counter
        world.lose(session)
    assert counted == W_IN * 20 + W_OUT * 2
    world.join()
    world.run()
    assert sequence.account is not None and sequence.account.counter == W_IN * 20 + W_OUT * 10


def test_a_prompt_that_is_in_the_cache_is_not_charged() -> None:
    world = World()
    for name in ("first", "second"):
        (id,) = world.add(name, prompt=list(range(20)), max_tokens=1, tenant="a")
        sequence = world.scheduler.sequence(id)
        world.run()
    assert sequence.account is not None
    assert sequence.account.counter == W_IN * 20 + W_OUT + W_IN * 1 + W_OUT


def test_a_request_whose_deadline_has_passed_is_never_computed() -> None:
    world = World(max_sequences=1)
    world.add("first", prompt=4, max_tokens=2)
    world.add("late", prompt=4, max_tokens=2, deadline_ns=1000)
    world.add("next", prompt=4, max_tokens=2, deadline_ns=9000)
    world.step()
    world.now_ns = 1000
    for _ in range(4):
        world.step()
    assert world.tokens == {"first": [4, 5], "late": [], "next": [4, 5]}
    world.abort("late")
    assert world.scheduler.num_sequences == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    weight=st.sampled_from([1.0, 1.0, 2.0, 5.0]),
    max_sequences=st.sampled_from([1, 3, 8]),
    token_budget=st.sampled_from([8, 24, 64]),
)
def test_two_tenants_that_always_wait_are_served_alike(
    data: st.DataObject, weight: float, max_sequences: int, token_budget: int
) -> None:
    """The bound of the paper: 2 · max(W_IN · longest prompt, W_OUT · tokens that fit), over the smaller weight."""
    longest, num_blocks, block_size = 24, 32, 4
    world = World(
        num_blocks=num_blocks,
        block_size=block_size,
        max_sequences=max_sequences,
        token_budget=token_budget,
        credit=2,
        prefix_caching=False,
        weights={"a": weight},
    )
    sizes = {t: data.draw(st.lists(st.tuples(st.integers(1, longest), st.integers(1, 30)), min_size=1)) for t in "ab"}
    # more requests than one step can admit: the line never runs out of a tenant's
    rate = {t: max_sequences + data.draw(st.integers(1, 20)) for t in "ab"}
    weights = {"a": weight, "b": 1.0}
    sequences: list[Sequence] = []
    bound = 2 * max(W_IN * longest, W_OUT * num_blocks * block_size)
    history: list[float] = []
    for _ in range(80):
        for tenant in "ab":
            while world.scheduler.waiting.standing(tenant, NORMAL).own_waiting < rate[tenant]:
                prompt, output = sizes[tenant][len(sequences) % len(sizes[tenant])]
                ids = world.add(f"{tenant}{len(sequences)}", prompt=prompt, max_tokens=output, tenant=tenant)
                sequences += [world.scheduler.sequence(id) for id in ids]
        world.send()
        if world.sent[0]:
            world.answer()
        served = dict.fromkeys("ab", 0.0)
        for s in sequences:
            tokens = W_IN * s.num_prompt * bool(s.admitted_ns) + W_OUT * s.num_output
            served[s.tenant] += tokens / weights[s.tenant]
        history.append(served["a"] - served["b"])
        assert max(history) - min(history) <= bound, "over any stretch of time, not only from the start"
    assert all(any(s.tenant == tenant and s.num_output for s in sequences) for tenant in "ab")


def steps_to_first_token(heavy: int) -> list[int]:
    """For 20 requests of a light tenant, one after the other, beside `heavy` of another tenant for each of them."""
    world = World(num_blocks=1024, max_sequences=32, token_budget=256, prefix_caching=False)
    took: list[int] = []
    for i in range(20):
        for j in range(heavy):
            world.add(f"heavy{i}.{j}", prompt=16, max_tokens=16, tenant="heavy")
        for _ in range(3):
            world.step()
        (sequence,) = [world.scheduler.sequence(id) for id in world.add(f"light{i}", 16, max_tokens=16, tenant="light")]
        steps = 0
        while not sequence.first_token_ns:
            world.step()
            steps += 1
        took.append(steps)
        while not sequence.reason:
            world.step()
    return took


def test_a_light_tenant_does_not_notice_one_that_sends_a_hundred_times_as_much() -> None:
    assert steps_to_first_token(heavy=0) == [1] * 20
    assert steps_to_first_token(heavy=100) == [1] * 20, "a slot was kept for it"


def test_nobody_else_takes_the_reserve() -> None:
    world = World(max_sequences=16, num_blocks=1024, token_budget=256)
    for i in range(20):
        world.add(f"a{i}", prompt=4, tenant="a")
        world.add(f"b{i}", prompt=4, tenant="b")
    assert len(world.step()) == 15, "both have as much as the reserve, so the last slot is for neither"
    world.add("c0", prompt=4, tenant="c")
    world.add("c1", prompt=4, tenant="c")
    assert [name for name in world.step() if name[0] == "c"] == ["c0"]


def test_a_group_of_beams_takes_nothing_of_the_reserve_either() -> None:
    world = World(max_sequences=16, num_blocks=1024, token_budget=256)
    beams = SamplingParams(temperature=0.0, beams=BeamParams(4))
    for i in range(5):
        world.add(f"a{i}", prompt=4, tenant="a", sampling=beams)
    for _ in range(4):
        world.step()

    (session,) = world.scheduler.sessions
    assert len(session.groups) == 3, "the fourth would take the last four slots, and one is not for it"


def test_blocks_are_kept_too() -> None:
    world = World(num_blocks=64, block_size=4, token_budget=1000, prefix_caching=False)
    for i in range(9):
        world.add(f"a{i}", prompt=36, max_tokens=3, tenant="a")
    assert len(world.step()) == 6, "of 64 blocks four are not for it, and each has nine"
    world.add("b0", prompt=12, max_tokens=3, tenant="b")
    assert "b0" in world.step()


def test_tenants_without_a_name_keep_nothing_for_each_other() -> None:
    world = World(max_sequences=16, num_blocks=1024, token_budget=256)
    for i in range(20):
        world.add(f"r{i}", prompt=4)
    assert len(world.step()) == 16


def test_a_large_request_of_a_tenant_that_runs_something_is_not_passed_by_others_that_do() -> None:
    world = World(num_blocks=32, block_size=4, prefix_caching=False, max_sequences=16)
    world.add("b0", prompt=40, max_tokens=20, tenant="b")
    world.add("a0", prompt=20, max_tokens=60, tenant="a")
    world.step()
    world.add("a1", prompt=70, max_tokens=4, tenant="a")
    for i in range(1, 30):
        world.add(f"b{i}", prompt=8, max_tokens=8, tenant="b")
    seen: list[str] = []
    while "a1" not in seen:
        seen += [name for name in world.step() if name not in seen]
    assert seen == ["b0", "a0", "a1"]


def test_everything_ends_with_the_reason_it_would_have_alone() -> None:
    world = World(num_blocks=24, max_sequences=4)
    for i in range(30):
        world.add(f"r{i}", prompt=3 + i % 7, max_tokens=5, tenant="abc"[i % 3], priority=[*Priority][i % 2])
    world.run()
    assert set(world.reasons.values()) == {FinishReason.LENGTH}


def test_a_tenant_within_its_share_is_let_in_although_it_runs_much() -> None:
    world = World(num_blocks=1024, max_sequences=16, token_budget=256, prefix_caching=False)
    light: list[Sequence] = []
    for i in range(200):  # the light tenant takes six slots of sixteen, the heavy one would take all
        world.now_ns = i * 100_000_000
        for j in range(4):
            world.add(f"heavy{i}.{j}", prompt=16, max_tokens=8 + (7 * i + 5 * j) % 17, tenant="heavy")
        if i >= 50 and i % 3 == 0:
            ids = world.add(f"light{i}", prompt=16, max_tokens=16, tenant="light")
            light += [world.scheduler.sequence(id) for id in ids]
        world.step()
        assert all(s.admitted_ns for s in light), "it waits for nobody, from the first to the last"
    assert world.scheduler.waiting.standing("heavy", NORMAL).own_waiting > 100
    assert world.scheduler.sessions[0].tenants["light"] > 4


def crowded(*tenants: str, seconds: int = 2) -> World:
    """Four slots, taken for long by tenants who send more than fits all the time."""
    world = World(max_sequences=4, num_blocks=1024, token_budget=256, prefix_caching=False)
    for i in range(8):
        for tenant in tenants:
            world.add(f"{tenant}{i}", prompt=8, max_tokens=60, tenant=tenant)
    for _ in range(10 * seconds):
        world.now_ns += 100_000_000
        world.step()
    return world


def test_where_no_slot_is_free_the_last_one_makes_way_for_a_tenant_that_was_served_too_little() -> None:
    world = crowded("heavy")
    world.add("light", prompt=8, max_tokens=4, tenant="light")
    step = world.step()

    assert "light" in step and "heavy3" not in step
    world.run()
    assert world.scheduler.counters.preemptions == 1
    assert world.tokens["light"] == [8, 9, 10, 11]
    assert all(world.tokens[f"heavy{i}"] == list(range(8, 68)) for i in range(8))


def test_a_tenant_that_is_owed_something_makes_others_wait_no_longer_than_that() -> None:
    world = crowded("heavy")
    for i in range(40):
        world.add(f"light{i}", prompt=8, max_tokens=60, tenant="light")
    for _ in range(80):
        world.now_ns += 100_000_000
        world.step()

    assert world.scheduler.counters.preemptions == 4
    assert world.scheduler.sessions[0].tenants == {"heavy": 4}, "it has caught up, and who made way goes on first"


def test_nobody_makes_way_for_a_tenant_that_has_its_share_nor_for_one_without_a_name() -> None:
    for world in (crowded("a", "b"), crowded("")):
        world.add("light", prompt=8, max_tokens=4, tenant="")
        world.step()
        for _ in range(30):
            world.now_ns += 100_000_000
            world.step()
        assert world.scheduler.counters.preemptions == 0
