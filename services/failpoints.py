"""Arms the failpoints of a process from PAGEWIRE_FAILPOINTS. For tests: whoever may set it may kill the process anyway.

    PAGEWIRE_FAILPOINTS="before_commit=kill@3;in_heartbeat=sleep:2@5+"
    PAGEWIRE_FAILPOINTS="@/run/orders"

NAME=ACTION, where ACTION is kill (SIGKILL), exit, freeze (SIGSTOP), raise, sleep:SECONDS (the thread stands still), or
an effect of the place itself (drop, nan; common/failpoints.py says which place knows which). `@n` is the n-th time
that the place is passed, 1 when nothing is said; `@n+` is that time and each one after it.

With `@FILE` the file holds that text. It is read as the process starts, if it is there, and again at each SIGUSR1, so
a process that is at work can be struck at a moment of one's choice; passages are counted from then on. What is about
to be done is added to FILE.struck, a line each, before it is done.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, cast

from common import failpoints
from common.errors import PagewireError
from common.failpoints import EFFECTS, NAMES, Effect

log = logging.getLogger(__name__)

VARIABLE: Final = "PAGEWIRE_FAILPOINTS"
EXIT_CODE: Final = os.EX_SOFTWARE

_RULE: Final = re.compile(r"(\w+)=(kill|exit|freeze|raise|drop|nan|sleep:\d+(?:\.\d+)?)(?:@(\d+)(\+?))?")


class FailpointError(PagewireError):
    """PAGEWIRE_FAILPOINTS names something that there is not."""


class Injected(Exception):
    """What the action `raise` raises: a bug that nobody expects."""


class _Rule(NamedTuple):
    action: str
    first: int
    goes_on: bool


def arm(environment: Mapping[str, str] = os.environ) -> None:
    """Read the variable and arm what it names. Without it nothing changes. Raises FailpointError."""
    text = environment.get(VARIABLE, "")
    if text.startswith("@"):
        orders = Path(text[1:])
        _obey(orders)
        signal.signal(signal.SIGUSR1, lambda *_: _obey(orders))
    elif text:
        _arm(text, None)


def _obey(orders: Path) -> None:
    """Do what the file says from now on, and nothing of what it said before."""
    failpoints.hit = failpoints.unarmed
    if orders.exists() and (text := orders.read_text()):
        _arm(text, orders.with_name(orders.name + ".struck"))


def _arm(text: str, struck: Path | None) -> None:
    rules: dict[str, list[_Rule]] = {}
    for part in text.split(";"):
        found = _RULE.fullmatch(part.strip())
        if found is None:
            raise FailpointError(f"{VARIABLE}: {part!r} is not NAME=ACTION or NAME=ACTION@N")
        name, action, first, goes_on = found.groups()
        if name not in NAMES:
            raise FailpointError(f"{VARIABLE}: there is no failpoint {name!r}; there are {', '.join(sorted(NAMES))}")
        if action in ("drop", "nan") and action not in EFFECTS.get(name, ()):
            raise FailpointError(f"{VARIABLE}: {name} knows no {action!r}")
        rules.setdefault(name, []).append(_Rule(action, int(first or 1), bool(goes_on)))
    log.warning("failpoints are armed, this process will fail as told: %s", text)
    counts = Counter[str]()

    def hit(name: str) -> Effect:
        of_place = rules.get(name)
        if of_place is None:
            return ""
        counts[name] += 1
        for rule in of_place:
            if counts[name] == rule.first or (rule.goes_on and counts[name] > rule.first):
                if struck is not None:
                    with struck.open("a") as told:
                        told.write(f"{name}={rule.action}\n")
                return _act(name, rule.action)
        return ""

    failpoints.hit = hit


def _act(name: str, action: str) -> Effect:
    log.warning("failpoint %s: %s", name, action)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # a signal to another thread of ours may need a moment
    elif action == "exit":
        os._exit(EXIT_CODE)
    elif action == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise Injected(name)
    elif action.startswith("sleep:"):
        time.sleep(float(action.removeprefix("sleep:")))
    else:
        return cast(Effect, action)
    return ""
