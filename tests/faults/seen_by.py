"""Which story saw a bug last: it is played first, so that a run need not search. `mutations --note` writes this file.

A story that a change has made harmless costs the search again, and nothing else.
"""

from __future__ import annotations

from typing import Final

SEEN_BY: Final[dict[str, int]] = {
    "the seed is not in the ticket": 30,
    "the tenant is not in the ticket": 30,
    "max tokens is not in the ticket": 30,
    "the prompt is not in the ticket": 33,
    "a ticket counts its tokens and does not name them": 116,
    "the choice is not in the ticket": 135,
    "a ticket never expires": 33,
    "a ticket is good for any model": 172,
    "a stop string is looked for behind the cut alone": 81,
    "half a character at the cut is told as a replacement": 16,
    "two read at once": 16,
    "a reader who is superseded ends the request": 16,
    "a reader who comes back hears nothing new": 16,
    "a request that nobody comes back for runs for ever": 21,
    "the client takes any end of a call for the answers": 92,
    "the client asks again for what has ended": 99,
    "an executor forgets which scheduler was the last": 53,
    "a scheduler that was replaced makes itself the latest": 53,
    "a name goes to the executor that came last": 70,
    "who says no hello is waited for": 14,
    "a scheduler that leaves drops what it has": 75,
}
