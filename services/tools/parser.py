"""The text of an answer to text and calls: a function of the text so far, wherever it is cut.

Arguments are told as they come, once the name of their function is known; text that may turn out to be the beginning
of calls is held back. Whatever the text is, it has a meaning: what is no call of its format after all is text.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import Final

from services.tools.format import ToolFormat
from services.tools.values import NAME, CallPiece

_OUTSIDE: Final = re.compile(r'["{}\[\]]')
_IN_STRING: Final = re.compile(r'["\\]')


class _Place(enum.Enum):
    """Where the text has come to."""

    TEXT = enum.auto()
    HEAD = enum.auto()  # calls were opened: a call must begin
    ARGUMENTS = enum.auto()
    TAIL = enum.auto()  # of a call
    NEXT = enum.auto()  # behind a call: another one, or the end of all


class CallParser:
    """Takes the text of one choice."""

    def __init__(self, format: ToolFormat, id_of: Callable[[int], str], *, at_beginning: bool = False) -> None:
        """`id_of` gives the id of a call by its place among the calls of its choice.

        `at_beginning`: what does not begin with a call is text, whatever the format.
        """
        self._format = format
        self._id_of = id_of
        self._at_beginning = at_beginning or format.at_beginning
        self._place = _Place.HEAD if self._at_beginning else _Place.TEXT
        self._held = ""  # read, and not yet understood
        # what led to a head; text, where no call follows
        self._opened = format.opening + format.first if self._at_beginning else ""
        self._depth = 0  # brackets of the arguments that are open
        self._in_string = False
        self._is_escaped = False  # the next character is, by the backslash before it
        self._num_calls = 0  # that have begun

    @property
    def has_called(self) -> bool:
        """There are calls, and none of them is incomplete."""
        is_closed = self._place is _Place.TEXT or (self._place is _Place.NEXT and not self._format.closing)
        return bool(self._num_calls) and is_closed

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """Take more of it; return the text and the parts of calls that became certain."""
        self._held += text
        told: list[str] = []
        pieces: list[CallPiece] = []
        while self._held and self._advance(told, pieces):
            pass
        return "".join(told), pieces

    def finish(self) -> str:
        """The text has ended: return what was held back of it. Of a call that was cut short, no more is told."""
        held, self._held = self._held, ""
        return held if self._place is _Place.TEXT or self._is_before_mark(held) else ""

    def _is_before_mark(self, held: str) -> bool:
        """All of the text is held, and it is less than what calls begin with, or something else."""
        is_all = self._place is _Place.HEAD and self._at_beginning and not self._num_calls
        return is_all and not held.startswith(self._format.mark)

    def _advance(self, told: list[str], pieces: list[CallPiece]) -> bool:
        """Understand one thing in what is held. False: more must come first."""
        match self._place:
            case _Place.TEXT:
                return self._read_text(told)
            case _Place.HEAD:
                return self._read_head(told, pieces)
            case _Place.ARGUMENTS:
                return self._read_arguments(pieces)
            case _Place.TAIL:
                return self._expect(self._format.after_arguments, _Place.NEXT)
            case _Place.NEXT:
                return self._read_next()

    def _read_text(self, told: list[str]) -> bool:
        opening = self._format.opening
        if self._at_beginning:
            told.append(self._held)
            self._held = ""
            return False
        at = self._held.find(opening)
        if at >= 0:
            told.append(self._held[:at])
            self._open(opening + self._format.first, at)
            return True
        num_held = next(n for n in range(len(opening) - 1, -1, -1) if self._held.endswith(opening[:n]))
        certain = len(self._held) - num_held
        told.append(self._held[:certain])
        self._held = self._held[certain:]
        return False

    def _open(self, opened: str, at: int) -> None:
        """A head is to come behind `opened`, which is expected at a place in what is held."""
        self._held, self._opened, self._place = self._held[at:], opened, _Place.HEAD

    def _read_head(self, told: list[str], pieces: list[CallPiece]) -> bool:
        before, after = self._opened + self._format.before_name, self._format.after_name + "{"
        begins, rest = _begins(self._held, before)
        if begins is None:
            return False
        name = NAME.match(rest)
        if begins and name is None and not rest:
            return False
        if begins and name is not None:
            begins, arguments = _begins(rest[name.end() :], after)
            if begins is None:
                return False
            if begins:
                place, self._num_calls = self._num_calls, self._num_calls + 1
                pieces.append(CallPiece(place, "{", self._id_of(place), name[0]))
                self._held, self._place, self._depth = arguments, _Place.ARGUMENTS, 1
                return True
        # no call: what seemed to open one is text, and what is behind that may open one anew
        num_told = max(1, len(self._format.opening)) if self._held.startswith(self._format.opening) else 1
        told.append(self._held[:num_told])
        self._held, self._place = self._held[num_told:], _Place.TEXT
        return True

    def _read_arguments(self, pieces: list[CallPiece]) -> bool:
        end = self._end_of_arguments()
        told, self._held = self._held[:end], self._held[end:]
        place = self._num_calls - 1
        if pieces and pieces[-1].place == place:
            pieces[-1] = pieces[-1]._replace(arguments=pieces[-1].arguments + told)
        else:
            pieces.append(CallPiece(place, told))
        if not self._depth:
            self._place = _Place.TAIL
        return not self._depth

    def _end_of_arguments(self) -> int:
        """How much of what is held is still arguments."""
        at, size = 0, len(self._held)
        while at < size:
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _OUTSIDE).search(self._held, at)
            if found is None:
                return size
            at = found.end()
            match found[0]:
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._is_escaped = True
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if not self._depth:
                        return at
        return size

    def _expect(self, wanted: str, place: _Place) -> bool:
        begins, rest = _begins(self._held, wanted)
        if begins is None:
            return False
        self._held, self._place = (rest, place) if begins else (self._held, _Place.TEXT)
        return True

    def _read_next(self) -> bool:
        between, closing = self._format.between, self._format.closing
        if between:
            begins, _ = _begins(self._held, between)
            if begins is None:
                return False
            if begins:
                self._open(between, 0)
                return True
        if closing:
            return self._expect(closing, _Place.TEXT)
        self._place = _Place.TEXT
        return True


def _begins(text: str, wanted: str) -> tuple[bool | None, str]:
    """Whether the text begins with what is wanted, None where it is too short to tell, and what is behind that."""
    if text.startswith(wanted):
        return True, text[len(wanted) :]
    return (None if wanted.startswith(text) else False), ""
