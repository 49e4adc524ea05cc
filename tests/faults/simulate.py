"""Play stories by hand: `python -m tests.faults.simulate 4711` replays one, `--seeds 10000 --first 0` searches.

With `--minutes`, seeds go on from --first until the time is over.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from tests.faults.simulation import run


def main() -> None:
    """Play until something breaks, or the seeds or the minutes are used up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", help="play this one story")
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="go on until then, instead of --seeds")
    parser.add_argument("--late", action="store_true", help="executors launch a step before they know the last tokens")
    parser.add_argument("--go-on", action="store_true", help="print what breaks, and look for more")
    options = parser.parse_args()
    if options.seed is not None:
        print(run(options.seed, late=options.late))
        return
    began = time.monotonic()
    faults, happened = Counter[str](), Counter[str]()
    played = tokens = moved = preemptions = refusals = given_up = broken = 0
    seed = options.first
    while (time.monotonic() - began < 60 * options.minutes) if options.minutes else (played < options.seeds):
        try:
            story = run(seed, late=options.late)
        except Exception as error:
            if not options.go_on:
                raise
            broken += 1
            print(f"seed {seed}: {type(error).__name__}: {error}", *error.__notes__[1:], flush=True)
        else:
            faults, happened = faults + story.faults, happened + story.happened
            tokens, moved, preemptions = tokens + story.tokens, moved + story.moved, preemptions + story.preemptions
            refusals, given_up = refusals + story.refusals, given_up + story.given_up
        played, seed = played + 1, seed + 1
    seconds = time.monotonic() - began
    print(f"seeds {options.first} to {seed - 1}: {played} stories in {seconds:.0f} s, {played / seconds:.0f} a second;")
    print(
        f"{tokens} tokens, {moved} moves, {preemptions} preemptions, {refusals} refusals, {given_up} given up; "
        f"{broken or 'nothing'} broke."
    )
    for what, count in sorted((happened + faults).items()):
        print(f"  {count:>6} times {what.replace('_', ' ')}")


if __name__ == "__main__":
    main()
