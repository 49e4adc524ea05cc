"""Guess with a smaller model of the same vocabulary, which draws the same random numbers.

It has a KV slab of its own with as many blocks as the other one, and lives in the same block tables: what the scheduler
shares, copies, takes away or finds again of the other model's K and V, it does so of its own. It is never asked to keep
up. For each place of the slab it is known whether this model has computed the token whose K and V the other model wrote
there last, so what a sequence still lacks is found when it is asked for a guess, and computed then: a prompt, tokens of
steps without drafts, blocks that came of a prefix hit. That needs nothing of a sequence's life, and survives all of it.

A draft is sampled as a token would be, with its controls and the random number of its position (grammars aside, for
they take no token back; what they do not allow is cut from the drafts). Two models that nearly agree then say the same
also at a temperature, which independent draws would not: executor/choosing.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ModelFolderError
from common.model_folder import ModelFolder
from common.types import BlockId
from executor.batch import InputBatch, build_batch
from executor.controls import columns, edit
from executor.kv_cache import KvCache
from executor.loading import Forward
from executor.resident import Resident, Rows, spread
from executor.sampler import sample


def check_vocabularies(target: ModelFolder, draft: ModelFolder) -> None:
    """Raise ModelFolderError when the same number is another token in the two models."""
    if draft.vocab_size != target.vocab_size:
        raise ModelFolderError(
            f"{draft.name} has {draft.vocab_size} tokens and {target.name} {target.vocab_size}: a draft model must "
            "have those of the model that is served. Type: --draft-model with a smaller one of its family"
        )
    if _tokens_of(draft) != _tokens_of(target):
        raise ModelFolderError(
            f"{draft.name} has as many tokens as {target.name}, but other ones: a draft model must have those of the "
            "model that is served. Type: --draft-model with a smaller one of its family"
        )


def _tokens_of(folder: ModelFolder) -> object:
    """The tokens and their numbers, as the tokenizer's file has them."""
    tokenizer = json.loads((folder.path / "tokenizer.json").read_bytes())
    return tokenizer.get("model", {}).get("vocab")


class DraftModel:
    """A model beside the one that is served. `catch_up`: tokens that it may compute in one step to be up to date."""

    def __init__(self, held: Resident, model: Forward, cache: KvCache, *, longest: int, catch_up: int) -> None:
        self._held = held
        self._model = model
        self._cache = cache
        self._longest = longest  # tokens of a sequence that its positions allow
        self._catch_up = catch_up
        # for each place of the slab: it holds what this model makes of the token that the other one wrote there last
        self._is_fresh = np.zeros((cache.num_blocks, cache.block_size), np.bool_)

    def begin_session(self) -> None:
        """Nothing in the slab is anybody's."""
        self._is_fresh.fill(False)

    def begin_step(self, rows: Rows, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copy what the other model's slab copies. What it is about to write, this one has not computed."""
        self._cache.copy_blocks(copies)
        for source, destination in copies:
            self._is_fresh[destination] = self._is_fresh[source]
        self._spoil(rows.slots, rows.starts, rows.stops)

    def propose(self, slots: NDArray[np.int64], most: NDArray[np.int64]) -> list[list[int]]:
        """Guess one token after the other, all sequences side by side. Who has too much to catch up with waits."""
        held = self._held
        known = held.num_tokens[slots]
        most = np.clip(self._longest - known, 0, most)
        drafts: list[list[int]] = [[] for _ in slots]
        self._spoil(slots, known, known + most)  # guesses that were wrong may lie there
        begun, stops = self._missing(slots, known)
        here = np.flatnonzero((stops > begun) & (most > 0))
        place = 0
        while len(here):
            reaches_end = stops[here] == known[here] + place
            rows = Rows(slots=slots[here], starts=begun[here], stops=stops[here], samples=reaches_end)
            batch = build_batch(held, rows, scores_prompts=False)
            here = here[reaches_end]
            for n, token in zip(here.tolist(), self._sample(batch, place), strict=True):
                drafts[n].append(token)
                held.token_ids[slots[n], known[n] + place] = token
            self._mark(rows)
            place += 1
            ends = [place == most[n] or drafts[n][-1] in held.stop_token_ids[slots[n]] for n in here.tolist()]
            here = here[~np.array(ends, np.bool_)]
            begun[here], stops[here] = known[here] + place - 1, known[here] + place
        return drafts

    def _missing(self, slots: NDArray[np.int64], known: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """What each sequence has to compute before it can guess, [starts, stops), as far as one step has time."""
        starts, stops, left = known.copy(), known.copy(), self._catch_up
        fresh = self._is_fresh.reshape(-1)
        for n, (slot, length) in enumerate(zip(slots.tolist(), known.tolist(), strict=True)):
            positions = np.arange(length)
            places = self._held.slot_mapping(np.full(length, slot), positions)
            starts[n] = int(np.argmin(fresh[places]))  # the last known token at the latest: it is about to be written
            stops[n] = min(length, starts[n] + left)
            left -= int(stops[n] - starts[n])
        return starts, stops

    def _sample(self, batch: InputBatch, ahead: int) -> list[int]:
        """The next token of each row that is sampled, as if `ahead` drafts were known tokens."""
        held, slots = self._held, batch.sampled_slots
        table = held.token_ids.reshape(-1)
        logits = self._model.forward(batch, torch.from_numpy(table[batch.token_places].astype(np.int64)))
        values = logits.float().numpy()
        edit(values, held, slots, ahead=ahead, guided=False)
        return sample(values, columns(held, slots, batch.sampled_indices + ahead)).tokens

    def _spoil(self, slots: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        owners, positions = spread(slots, starts, stops - starts)
        self._is_fresh.reshape(-1)[self._held.slot_mapping(owners, positions)] = False

    def _mark(self, rows: Rows) -> None:
        slots, positions = rows.each_token()
        self._is_fresh.reshape(-1)[self._held.slot_mapping(slots, positions)] = True
