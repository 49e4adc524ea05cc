"""Text to tokens, tokens to text, whole or as they come. Knows the tokenizer of the model, nothing of requests."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import tokenizers

from common.errors import ModelFolderError

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"

# Tokens that are decoded together with the next one. An unfinished UTF-8 character has at most 3 bytes, so at most 3
# tokens; the fourth is what a decoder that treats the first token of a text differently needs to see before them.
_CONTEXT: Final = 4
_NONE: Final[frozenset[int]] = frozenset()


class Tokenizer:
    """The model's tokenizer.json. Long calls release the GIL, so that a thread may run them beside the loop."""

    def __init__(self, file: Path) -> None:
        """Load the file. Raises ModelFolderError where it is not a tokenizer."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ModelFolderError(
                f"{file}: not a tokenizer ({error}). Save it again with Transformers, or fetch the default model:"
                " pagewire pull smollm2"
            ) from error
        self._tokenizer.no_truncation()  # some files carry the settings of their training
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.added = {token.content: id for id, token in added.items()}
        """Tokens that are one wherever they are spelled out."""
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._byte_of = self._find_byte_tokens()
        self._bytes_of: dict[int, bytes] = {}
        is_byte_level = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self._spellings = {skip: _Spelling(self, skip) for skip in (True, False)} if is_byte_level else {}
        self._spellings_shown: dict[frozenset[int], _Spelling] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text. Special tokens that are spelled out in it are recognised."""
        # The batch call is the one that releases the GIL, and without offsets it takes a third of the time.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around them."""
        return [each.ids for each in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens. Ids that stand for nothing give nothing.

        Bytes that form no character become U+FFFD, one for each piece that could not go on: what Python's and Rust's
        lossy decoding do, in every tokenizer. (Where single bytes are tokens of their own, the library would give up a
        whole run of them for one bad byte; a stream could then never show a character before the run's end.)
        """
        [text] = self._tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        if self._byte_of and REPLACEMENT in text:
            decoder = IncrementalDecoder(self, skip_special_tokens=skip_special_tokens)
            return decoder.push(ids) + decoder.finish()
        return text

    def silent(self, id: int, skip_special_tokens: bool, shown: frozenset[int] = _NONE) -> bool:
        """True for an id that adds nothing to any text: not in the vocabulary, or special where those are skipped.

        Of the special ones, `shown` are not skipped.
        """
        return self.name(id) is None or (skip_special_tokens and id in self.special_ids and id not in shown)

    def spelling(self, skip_special_tokens: bool, shown: frozenset[int] = _NONE) -> Mapping[int, bytes] | None:
        """The bytes of each token, where a text is no more than the bytes of its tokens; None where it is not."""
        if shown and skip_special_tokens and self._spellings:
            if shown not in self._spellings_shown:  # one set, that of the served model's tools
                self._spellings_shown[shown] = _Spelling(self, skip_special_tokens, shown)
            return self._spellings_shown[shown]
        return self._spellings.get(skip_special_tokens)

    def name(self, id: int) -> str | None:
        """How the vocabulary writes the token."""
        name: str | None = self._tokenizer.id_to_token(id)
        return name

    def bytes_of(self, id: int) -> bytes:
        """The text of a token within a text, special ones included. It may be half a character."""
        known = self._bytes_of.get(id)
        if known is None:
            known = self._bytes_of[id] = self._find_bytes_of(id)
        return known

    def _find_bytes_of(self, id: int) -> bytes:
        if False in self._spellings:
            return self._spellings[False][id]
        if id in self._byte_of:
            return bytes((self._byte_of[id],))
        if self.name(id) is None:
            return b""
        return self.raw_decode([id, id])[len(self.raw_decode([id])) :].encode()  # the second is at no text's beginning

    def byte(self, id: int) -> int | None:
        """The byte that the token stands for, in a tokenizer that spells unknown characters as byte tokens."""
        return self._byte_of.get(id)

    def byte_token(self, byte: int) -> int:
        """The token of a byte. Asked only of tokenizers that have them."""
        return self._token_of_byte[byte]

    def raw_decode(self, ids: list[int]) -> str:
        """What the library makes of a few ids, special ones included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _find_byte_tokens(self) -> dict[int, int]:
        """Token id → byte where the vocabulary has <0x00> to <0xFF> and the decoder reads them as bytes, else empty."""
        names = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._token_of_byte = [id for id in names if id is not None]
        if len(self._token_of_byte) < 256 or self.raw_decode([self._token_of_byte[ord("A")]]) != "A":
            return {}
        return {id: byte for byte, id in enumerate(self._token_of_byte)}


class _Spelling(dict[int, bytes]):
    """Token id → its bytes in a byte-level tokenizer. A token is spelled out when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, shown: frozenset[int] = _NONE) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown = shown

    def __missing__(self, id: int) -> bytes:
        name = self._tokenizer.name(id)
        if name is None or self._tokenizer.silent(id, self._skip_special_tokens, self._shown):
            spelled = b""
        else:
            try:
                spelled = bytes(_BYTE_OF_LETTER[letter] for letter in name)
            except KeyError:  # not in that alphabet: a token that was added, written as it is
                spelled = name.encode()
        self[id] = spelled
        return spelled


def _byte_level_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write bytes: GPT-2's way, printable ones as themselves, the rest from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = sorted(set(range(0x100)) - printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER: Final = _byte_level_alphabet()


class IncrementalDecoder:
    """Tokens in as they are sampled, text out as soon as it is certain. One for each choice.

    Let P be the prompt and O the output. What `push` and `finish` return, put together, is `decode(P + O)` without the
    beginning that it shares with `decode(P)`. So a tokenizer that strips the space before the first word of a text
    strips it only where the output is that first word (P gives no text), and a character that the prompt began is told
    by the output that completes it. Where P is empty, or all of it is skipped, the result is `decode(O)`.

    Text is certain once no further token can change it. Only a U+FFFD at the end is held back: it is either a character
    whose bytes are not all there, or really that character; the next token or `finish` tells. (In a byte-level
    tokenizer the bytes say which it is.) The work for a token does not grow with the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown: frozenset[int] = _NONE,
    ) -> None:
        """`prompt_tail` may be the whole prompt; only its last few tokens that give text are looked at.

        `shown` are special tokens that are not skipped.
        """
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown = shown
        self._spelling = tokenizer.spelling(skip_special_tokens, shown)
        self._window: list[int] = []  # the last tokens; what comes next is decoded together with them
        self._num_told = 0  # characters of the window's text that were returned already
        self._torn = b""  # the beginning of a character, told as bytes
        # the last token was told as bytes, not in the window: it was a byte token, or every token is bytes
        self._in_bytes = self._spelling is not None
        self._owed = ""  # what the prompt would end with if nothing came; not told again if it comes first

        context: list[int] = []
        for id in reversed(prompt_tail):
            if len(context) == _CONTEXT:
                break
            if not tokenizer.silent(id, skip_special_tokens, shown):
                context.append(id)
        self.push(reversed(context))
        self._owed = self._held()

    def fork(self) -> IncrementalDecoder:
        """Another one that stands where this one does."""
        other = copy.copy(self)
        other._window = self._window[:]
        return other

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that became certain."""
        if self._spelling is not None:
            text = self._decode(b"".join(map(self._spelling.__getitem__, token_ids)))
        else:
            silent, skip, shown = self._tokenizer.silent, self._skip_special_tokens, self._shown
            text = "".join([self._push(id) for id in token_ids if not silent(id, skip, shown)])
        return self._without_prompt(text) if self._owed else text

    def finish(self) -> str:
        """Return what was held back. Nothing may be pushed afterwards."""
        return self._without_prompt(self._held())

    def _without_prompt(self, text: str) -> str:
        if text:
            text, self._owed = text.removeprefix(self._owed), ""
        return text

    def _held(self) -> str:
        """Text that is there but not certain: U+FFFD, or nothing."""
        if self._in_bytes:
            return self._torn.decode(errors="replace")
        return self._tokenizer.raw_decode(self._window)[self._num_told :]

    def _push(self, id: int) -> str:
        byte = self._tokenizer.byte(id)
        if byte is not None:
            return self._push_byte(id, byte)
        if self._in_bytes:
            return self._leave_bytes() + self._push(id)
        self._window.append(id)
        text = self._tokenizer.raw_decode(self._window)
        num_certain = len(text) - text.endswith(REPLACEMENT)
        certain = text[self._num_told : num_certain]
        self._num_told = max(self._num_told, num_certain)
        if len(self._window) >= 2 * _CONTEXT:
            self._shorten(num_held=len(text) - self._num_told)
        return certain

    def _shorten(self, num_held: int) -> None:
        """Forget all but the last tokens. The held character lies in those, and is counted from the end."""
        window = self._window[-_CONTEXT:]
        num_told = len(self._tokenizer.raw_decode(window)) - num_held
        if num_told > 0:  # else these tokens give no text to stand behind, and the next would look like a text's first
            self._window, self._num_told = window, num_told

    def _push_byte(self, id: int, byte: int) -> str:
        first_of_text = not self._in_bytes and not self._window
        text = "" if self._in_bytes else self._held()
        self._in_bytes = True
        if first_of_text and byte == ord(" "):
            return self._tokenizer.raw_decode([id])  # stripped, where the tokenizer does that
        return text + self._decode(bytes((byte,)))

    def _leave_bytes(self) -> str:
        """End the run of byte tokens. One byte that is a character stands for it in the window from now on."""
        self._in_bytes = False
        self._window, self._num_told = [self._tokenizer.byte_token(ord("."))], 1
        text, self._torn = self._torn.decode(errors="replace"), b""
        return text

    def _decode(self, new: bytes) -> str:
        """The characters that are whole with these bytes."""
        known = self._torn + new
        text, num_used = codecs.utf_8_decode(known, "replace", False)
        self._torn = known[num_used:]
        return text


class StopMatcher:
    """Ends a text before the first stop string in it, wherever the pieces of the text are cut.

    The match that is complete first wins; of those complete at the same character, the longest. Text that may turn out
    to be the beginning of a stop string is held back. What is returned depends only on the text so far, not on how it
    was cut. A character costs a constant time for each stop string, whatever the strings are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings."""
        assert all(stops), "an empty stop string"
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._num_matched = [0] * len(self._stops)  # characters of each stop that the text so far ends with
        self._held = ""  # the longest such end; not returned yet
        self._matched: str | None = None

    def fork(self) -> StopMatcher:
        """Another one that stands where this one does."""
        other = copy.copy(self)
        other._num_matched = self._num_matched[:]
        return other

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, str | None]:
        """Take more text; return what may be told of it, and the stop string once it is there.

        After a match there is no more text, and the same stop string is returned. One that is complete with text that
        may not end it is like any other text.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        known = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            for which, stop in enumerate(self._stops):
                if self._advance(which, stop, character) == len(stop):
                    if may_end:
                        self._held, self._matched = "", stop
                        return known[: end - len(stop)], stop
                    self._num_matched[which] = self._fallbacks[which][-1]
        num_certain = len(known) - max(self._num_matched)
        self._held = known[num_certain:]
        return known[:num_certain], None

    def flush(self) -> str:
        """The text has ended: return what was held back."""
        held, self._held = self._held, ""
        self._num_matched = [0] * len(self._stops)
        return held

    def _advance(self, which: int, stop: str, character: str) -> int:
        """Knuth, Morris and Pratt: how much of the stop string the text ends with, one character later."""
        matched = self._num_matched[which]
        while matched and stop[matched] != character:
            matched = self._fallbacks[which][matched - 1]
        matched += stop[matched] == character
        self._num_matched[which] = matched
        return matched


def _fallbacks(stop: str) -> list[int]:
    """For each beginning of the string: the length of the longest shorter beginning that it also ends with."""
    fallbacks = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[index] != stop[matched]:
            matched = fallbacks[matched - 1]
        matched += stop[index] == stop[matched]
        fallbacks[index] = matched
    return fallbacks
