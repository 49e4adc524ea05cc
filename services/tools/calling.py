"""Tool calling for the model that is served: its format, and what its vocabulary makes of that."""

from __future__ import annotations

import string
from functools import partial
from hashlib import blake2b
from typing import Final

from common.sampling import Grammar
from common.types import FinishReason
from services.choice_text import Piece
from services.text import Tokenizer
from services.tools.format import ToolFormat
from services.tools.grammar import grammar_of
from services.tools.parser import CallParser
from services.tools.values import CallPiece, Tools

_ID_LETTERS: Final = string.digits + string.ascii_letters
_ID_LENGTH: Final = 9  # what Mistral's templates demand, and enough for any conversation
_WHOLE: Final = (FinishReason.EOS, FinishReason.STOP_TOKEN, FinishReason.STOP_STRING, FinishReason.LENGTH)


def call_id(request_id: str, choice: int, index: int) -> str:
    """The id of a call: the same wherever a stream goes on, so made of what every server is told."""
    digest = blake2b(f"{request_id}\0{choice}\0{index}".encode(), digest_size=16, person=b"pagewire call").digest()
    number, letters = int.from_bytes(digest, "little"), ""
    for _ in range(_ID_LENGTH):
        number, letter = divmod(number, len(_ID_LETTERS))
        letters += _ID_LETTERS[letter]
    return letters


class ToolCalling:
    """How the model is held to its tools, and understood."""

    def __init__(self, format: ToolFormat, tokenizer: Tokenizer) -> None:
        self.format = format
        self._tokens = {marker: id for marker in format.markers if (id := tokenizer.added.get(marker)) is not None}
        self.shown = tokenizer.special_ids.intersection(self._tokens.values())
        """Tokens that the text of an answer with tools has, though others of their kind are skipped."""
        not_in_text = tokenizer.special_ids.union(self._tokens.values())
        self._in_text = [id for id in tokenizer.added.values() if id not in not_in_text]

    def grammar(self, tools: Tools) -> Grammar:
        """What an answer may be that may call these. Raises InvalidRequest, as `grammar_of` does."""
        return grammar_of(self.format, tools, tokens=self._tokens, in_text=self._in_text)

    def reader(self, request_id: str, choice: int, tools: Tools) -> CallReader:
        """For one choice of one request that may call these, from its beginning."""
        id_of = partial(call_id, request_id, choice)
        return CallReader(CallParser(self.format, id_of, at_beginning=tools.text is not None))


class CallReader:
    """Tells the calls of one choice from its text."""

    def __init__(self, parser: CallParser) -> None:
        self._parser = parser

    def read(self, piece: Piece) -> tuple[Piece, list[CallPiece]]:
        """The piece without what calls are made of, and those; an end behind calls is a reason of its own."""
        text, calls = self._parser.push(piece.text)
        reason = piece.reason
        if reason in _WHOLE:
            text += self._parser.finish()
        if reason is FinishReason.EOS and self._parser.has_called:
            reason = FinishReason.TOOL_CALLS
        return piece._replace(text=text, reason=reason), calls
