"""What a beam search finds over the fake model when nothing else exists: no blocks, no steps, no scheduler."""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Set

from common.sampling import SamplingParams
from executor.fake_runner import NextToken, Prefix, digests_of, fake_candidates, position_token
from scheduler.beam_search import BeamSearch, Hypothesis


def searched(
    prompt: Sequence[int],
    sampling: SamplingParams,
    max_tokens: int,
    *,
    ends: Set[int],
    vocab_size: int,
    model: NextToken = position_token,
) -> list[Hypothesis] | None:
    """The answers, the best first; None where `model` has no token for a beam, which ends the search."""
    assert sampling.beams is not None
    search = BeamSearch(sampling.beams, num_ends=len(ends), max_tokens=max_tokens)
    beams = [array("I")]
    while beams:
        digests = [digests_of([*prompt, *beam])[-1] for beam in beams]
        length = len(prompt) + len(beams[0])
        prefixes = [
            Prefix(num_tokens=length, digest=digest, greedy=True, seed=sampling.seed, choice=0) for digest in digests
        ]
        if any(model(prefix) is None for prefix in prefixes):
            return None
        ranked = [fake_candidates(digest, search.num_kept, vocab_size) for digest in digests]
        going_on = search.choose(ranked, beams, lambda _, token: token in ends)
        beams = [beams[each.parent] + array("I", [each.token]) for each in going_on]
    return search.answers
