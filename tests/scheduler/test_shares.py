"""Who was served less than its share lately."""

from __future__ import annotations

from collections import Counter

from scheduler.shares import CREDIT_NS, Shares

S = 1_000_000_000


class Town:
    """Shares of tenants whose service the test says."""

    def __init__(self) -> None:
        self.served = Counter[str]()
        self.shares = Shares(lambda tenant: float(self.served[tenant]))
        self.now_ns = 0

    def second(self, **served: int) -> None:
        """A second in which so much is served."""
        self.served.update(served)
        self.now_ns += S
        self.shares.look(self.now_ns)

    def visit(self, tenant: str) -> bool:
        """The tenant waits for a moment. Whether it is owed something then."""
        self.shares.wait(tenant)
        owed = self.shares.owes(tenant)
        self.shares.leave(tenant)
        return owed


def test_whoever_waits_all_the_time_is_owed_nothing() -> None:
    town = Town()
    town.shares.wait("a")
    town.shares.wait("b")
    for i in range(50):
        town.second(a=100, b=90 + 20 * (i % 2))
        assert not town.shares.owes("a") and not town.shares.owes("b")


def test_who_asks_for_less_than_the_others_is_owed_something_whenever_it_comes() -> None:
    town = Town()
    town.shares.wait("heavy")
    for i in range(60):
        town.second(heavy=100, light=90 if i % 2 else 99)
        assert town.visit("light")


def test_what_was_not_used_may_be_used_for_a_while_after() -> None:
    town = Town()
    town.shares.wait("heavy")
    for _ in range(8):
        town.second(heavy=100, light=50)
    owed = 0
    while town.visit("light"):
        town.second(heavy=50, light=100)
        owed += 1
    assert owed == 8, "400 were left, and 50 of them are used up in each second"


def test_to_be_away_saves_up_ten_seconds_of_a_share_at_most() -> None:
    town = Town()
    town.shares.wait("heavy")
    for _ in range(1000):
        town.second(heavy=100)
    town.shares.wait("light")
    town.served["light"] += 100 * CREDIT_NS // S - 1
    assert town.shares.owes("light")
    town.served["light"] += 1
    assert not town.shares.owes("light")


def test_nothing_is_saved_up_while_there_is_room_for_all() -> None:
    town = Town()
    town.shares.wait("heavy")
    town.shares.leave("heavy")
    for _ in range(1000):
        town.second(heavy=100)
    town.shares.wait("heavy")
    town.shares.wait("light")
    town.served["light"] += 100 * CREDIT_NS // S
    assert not town.shares.owes("light")


def test_several_that_are_owed_something_do_not_hold_each_other_back() -> None:
    town = Town()
    town.shares.wait("heavy")
    town.second(heavy=100)
    town.shares.wait("poor")
    town.shares.wait("poorer")
    for _ in range(50):
        town.second(heavy=100)
        town.shares.leave("poor")
        town.shares.wait("poor")
    assert town.shares.owes("poor") and town.shares.owes("poorer") and not town.shares.owes("heavy")
    town.served["poorer"] += 5000
    assert town.shares.owes("poorer"), "it was not away, so all of it is kept"


def test_a_tenant_with_two_queues_is_away_when_both_are_empty() -> None:
    town = Town()
    town.shares.wait("heavy")
    town.second(heavy=100)
    town.shares.wait("light")
    town.shares.wait("light")
    for _ in range(100):
        town.second(heavy=100)
    town.shares.leave("light")
    town.shares.wait("light")
    town.served["light"] += 9000
    assert town.shares.owes("light")
