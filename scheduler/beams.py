"""A request whose answers come of a beam search: its beams are sequences that run, its answers are what is read.

The two are not the same. Answers (`Request.id` and those behind it) wait until the search is over, get all their tokens
at once, and end. Beams (`Sequence.beams` is not None) are computed: a beam's row samples nothing, its continuations are
ranked on the executor, and when all beams of the group were ranked, the search chooses. A beam that goes on more than
once is forked: both share all blocks, and who writes into one first gets a copy. A beam that does not go on gives its
blocks back.

A group is on one executor, all of it, or in the line, where its first beam stands for all. Preempted, lost with an
executor or withdrawn, it computes its beams again from their tokens: the first one what they have in common, and the
others share those blocks and go on from there. So no group holds memory with half of its beams while it waits for room
for the others, and two groups never wait for each other. It has no step in flight beyond those that rank its beams.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from common.blocks import blocks_for
from common.step import Logprobs, Ranked
from scheduler.beam_search import BeamSearch, Continuation, Hypothesis

if TYPE_CHECKING:
    from scheduler.moves import Moves
    from scheduler.sequence import Sequence


class TextFollower(Protocol):
    """What some tokens say, as far as stop strings go."""

    def behind(self, token: int) -> tuple[TextFollower, bool]:
        """Of one token more, and whether that completes a stop string which ends the text. This one stays as it is."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class BeamGroup:
    """The beams of one request, and the answers that they are for."""

    width: int
    search: BeamSearch
    ends: frozenset[int]  # tokens that end an answer
    answers: list[Sequence]  # those that were asked for; `Sequence.choice` is the place of each, the best's being 0
    beams: list[Sequence] = field(default_factory=list["Sequence"])  # in the order of the search
    num_resident: int = 0  # of them on an executor
    num_generated: int = 0  # tokens that were computed for it, over all beams
    ranked: dict[Sequence, Ranked] = field(default_factory=dict["Sequence", Ranked])  # those that were, by beam
    texts: dict[Sequence, TextFollower] = field(default_factory=dict["Sequence", TextFollower])  # with stop strings
    _told: dict[bytes, list[Logprobs]] = field(default_factory=dict[bytes, list[Logprobs]])  # by the output's tokens

    @property
    def leader(self) -> Sequence:
        """The beam that stands for all in the line."""
        return self.beams[0]

    @property
    def open_answers(self) -> list[Sequence]:
        """Those that somebody still waits for."""
        return [answer for answer in self.answers if not answer.reason]

    @property
    def is_ranked(self) -> bool:
        """Every beam was."""
        return len(self.ranked) == len(self.beams)

    def num_common(self) -> int:
        """Tokens that all beams begin with. The last one of each is not among them: it makes its logits."""
        low, high = (end(beam.tokens for beam in self.beams) for end in (min, max))  # of all, these differ first
        known = len(low) - 1
        return next((n for n in range(self.leader.num_prompt, known) if low[n] != high[n]), known)

    def blocks_beside(self, block_size: int) -> int:
        """Blocks of the known tokens of all beams but the first, where what is common is shared."""
        beside = len(self.beams) - 1
        if not beside:
            return 0
        return beside * (blocks_for(len(self.leader.tokens), block_size) - self.num_common() // block_size)

    def blocks_pending(self, block_size: int) -> int:
        """Blocks of the known tokens of those that wait for what is common."""
        pending = sum(beam.is_pending for beam in self.beams)
        return self.blocks_beside(block_size) * pending // (len(self.beams) - 1) if pending else 0

    def most_blocks(self, block_size: int) -> int:
        """Blocks that the group can come to need: behind the prompt, its beams may have nothing in common."""
        first = self.answers[0]
        shared = first.num_prompt // block_size
        return shared + self.width * (blocks_for(first.max_length, block_size) - shared)

    def found(self, answer: Sequence) -> Hypothesis | None:
        """What the search found for one of its answers, if it did.

        What the reader was told of it by another scheduler must be the beginning: else they computed otherwise.
        """
        found = self.search.answers[answer.choice : answer.choice + 1]
        begun = answer.tokens[answer.num_prompt :]
        return found[0] if found and found[0].tokens[: len(begun)] == begun else None

    def told(self, found: Hypothesis) -> list[Logprobs]:
        """How likely the tokens of an answer were, where that is asked for."""
        return self._told.get(found.tokens.tobytes(), [])

    def grow(self, moves: Moves, now_ns: int) -> bool:
        """Every beam was ranked: let those go on that the search chooses, and no others. False when it is over."""
        behind: dict[tuple[int, int], TextFollower] = {}

        def ends(parent: int, token: int) -> bool:
            text = self.texts.get(self.beams[parent])
            if token in self.ends or text is None:
                return token in self.ends
            behind[parent, token], is_end = text.behind(token)
            return is_end

        rows = [self.ranked[beam] for beam in self.beams]
        self.ranked.clear()
        self.num_generated += len(self.beams)
        for answer in self.open_answers:
            answer.first_token_ns = answer.first_token_ns or now_ns
        going_on = self.search.choose(
            [list(zip(row.token_ids, row.logprobs, strict=True)) for row in rows],
            [beam.tokens[beam.num_prompt :] for beam in self.beams],
            ends,
        )
        if self.leader.sampling.logprobs is not None:
            self._keep_told(rows, going_on)
        if not going_on:
            return False
        placed = self._place(going_on, moves)
        self.beams = [placed[each] for each in going_on]
        if self.texts:
            self.texts = {placed[each]: behind[each.parent, each.token] for each in going_on}
        return True

    def _keep_told(self, rows: list[Ranked], going_on: list[Continuation]) -> None:
        """How likely the tokens of all were that go on, and of the answers there are: by those tokens."""
        before, self._told = self._told, {}
        outputs = [beam.tokens[beam.num_prompt :] for beam in self.beams]
        parents = {output.tobytes(): n for n, output in enumerate(outputs)}
        new = [outputs[each.parent] + array("I", [each.token]) for each in going_on]
        for tokens in [*new, *(answer.tokens for answer in self.search.answers)]:
            key, beginning = tokens.tobytes(), tokens[:-1].tobytes()
            if beginning in parents:
                self._told[key] = [*before.get(beginning, ()), rows[parents[beginning]].told(tokens[-1])]
            else:  # an answer that was found before
                self._told[key] = before[key]

    def _place(self, going_on: list[Continuation], moves: Moves) -> dict[Continuation, Sequence]:
        """A sequence for each beam that goes on: the first of a parent's is the parent itself."""
        children: dict[int, list[Continuation]] = {n: [] for n in range(len(self.beams))}
        for each in going_on:
            children[each.parent].append(each)
        for n, beam in enumerate(self.beams):
            if not children[n]:
                moves.prune(beam)  # before any is forked: it needs a slot
        placed: dict[Continuation, Sequence] = {}
        for n, beam in enumerate(self.beams):
            if own := children[n]:
                placed.update(zip(own, [beam, *(moves.fork(beam) for _ in own[1:])], strict=True))
        for each, beam in placed.items():
            beam.tokens.append(each.token)
            if beam.account is not None:
                beam.account.counter += beam.account.per_output
        return placed
