"""A JSON object whose members are taken one by one, each by its name and type. What is left over was not understood.

Every problem is an InvalidRequest that names the member by its whole path: `messages[2].content`. null is as good as
not there, as in OpenAI's own API.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

from common.errors import InvalidRequest
from common.json_value import is_array, is_object
from services.gateway.errors import NotServed
from services.gateway.not_served import NOT_SERVED

MAX_U32: Final = (1 << 32) - 1
MAX_FLOAT: Final = 3.4028234663852886e38
"""The largest number that a float32 holds."""

MOST_LISTED: Final = 4096
"""Objects, or texts, in one list. The scheduler takes no more, and a body of nothing else would hold up all others."""

_EXACT: Final = 1 << 53  # from here on a float may stand for a neighbour

Form = Mapping[str, Any]
"""What a member may be, as a JSON schema has it."""

TOKEN_IDS: Final = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_U32}}


class LetPass:
    """How many members nobody knows, in a body and all that lies in it, where these are let pass."""

    num_members = 0


class Fields:
    """The members of one object."""

    def __init__(self, members: dict[str, object], path: str = "", let_pass: LetPass | None = None) -> None:
        """Takes `members` over: what is taken is gone from it. With `let_pass` what is left over is no error."""
        self._members = members
        self._path = path
        self._let_pass = let_pass

    def path(self, name: str) -> str:
        """What a member is called in a complaint."""
        return f"{self._path}.{name}" if self._path else name

    @property
    def here(self) -> str:
        """What the object itself is called in a complaint."""
        return self._path

    def take(self, name: str, form: Form | None = None) -> object:
        """Whatever it is; None where it is not there. `form` is what it may be, for the API's description."""
        return self._members.pop(name, None)

    def names(self) -> list[str]:
        """Of the members that nobody took."""
        return list(self._members)

    def peek(self, name: str) -> object:
        """Whatever it is; it stays."""
        return self._members.get(name)

    def copy(self) -> dict[str, object]:
        """The members that nobody took."""
        return dict(self._members)

    def take_if(self, name: str, value: int) -> bool:
        """Whether it is this whole number; then it is taken."""
        found = self._members.get(name)
        if isinstance(found, bool) or found != value:
            return False
        del self._members[name]
        return True

    def has(self, name: str) -> bool:
        """Whether it is there, not taken yet, and not null."""
        return self._members.get(name) is not None

    def string(self, name: str) -> str | None:
        """A text."""
        value = self.take(name)
        return None if value is None else text(value, self.path(name))

    def required_string(self, name: str) -> str:
        """A text that must be there."""
        value = self.string(name)
        if value is None:
            raise InvalidRequest(self.path(name), "must be a string, and is not there")
        return value

    def kind(self, name: str, known: Sequence[str]) -> str | None:
        """Which of several forms its object has. `known` are those that are served: whoever asks refuses others."""
        return self.string(name)

    def required_kind(self, name: str, known: Sequence[str]) -> str:
        """The same, where it must be there."""
        return self.required_string(name)

    def word(self, name: str, known: Sequence[str]) -> str | None:
        """One of the words that are known."""
        value = self.string(name)
        if value is not None and value not in known:
            raise InvalidRequest(self.path(name), f"must be one of {', '.join(known)}, got {shown_word(value)}")
        return value

    def harmless(self, name: str, word: str) -> None:
        """Take this word, which asks for nothing. Anything else stays, and is refused with what is not known."""
        if self._members.get(name) == word:
            del self._members[name]

    def required_word(self, name: str, known: Sequence[str]) -> str:
        """One of the words that are known; it must be there."""
        value = self.word(name, known)
        if value is None:
            raise InvalidRequest(self.path(name), f"must be one of {', '.join(known)}, and is not there")
        return value

    def boolean(self, name: str) -> bool | None:
        """True or false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(self.path(name), f"must be true or false, got {shown(value)}")
        return value

    def integer(self, name: str, least: int = 0, most: int = MAX_U32, range_: str = "") -> int | None:
        """A whole number in [least, most], which `range_` says in other words; 3.0 is one, as in JSON itself."""
        value = self.take(name)
        return None if value is None else integer(value, self.path(name), least, most, range_)

    def number(self, name: str) -> float | None:
        """A number that a float32 can hold."""
        value = self.take(name)
        return None if value is None else number(value, self.path(name))

    def strings(self, name: str) -> list[str]:
        """Texts; one alone needs no list."""
        value = self.take(name)
        if isinstance(value, str):
            return [text(value, self.path(name))]
        found = array(value, self.path(name), MOST_LISTED)
        return [text(each, f"{self.path(name)}[{i}]") for i, each in enumerate(found)]

    def integers(self, name: str) -> list[int]:
        """Token ids."""
        return integers(self.take(name), self.path(name))

    def schema(self, name: str) -> str | None:
        """A JSON schema, as text."""
        value = self.take(name)
        return None if value is None else schema_text(value, self.path(name))

    def required_schema(self, name: str, around: str = "") -> str:
        """A JSON schema that must be there, as text. `around` is what it lies in, where that is missing as well."""
        value = self.schema(name)
        if value is None and around:
            raise InvalidRequest(around, f"must be an object with a JSON schema, {name}, and is not there")
        if value is None:
            raise InvalidRequest(self.path(name), "must be a JSON schema, and is not there")
        return value

    def is_object(self, name: str) -> bool:
        """Whether it is an object, where it may also be something else."""
        return isinstance(self._members.get(name), dict)

    def is_boolean(self, name: str) -> bool:
        """Whether it is true or false, where it may also be something else."""
        return isinstance(self._members.get(name), bool)

    def fields(self, name: str, form: Form | None = None) -> Fields | None:
        """An object; with a `form` whose members have names that nobody knows before."""
        value = self.take(name)
        return None if value is None else self.inside(value, self.path(name))

    def inside(self, value: object, path: str) -> Fields:
        """An object that is a part of this one: what is left over there is refused, or let pass, as it is here."""
        if not is_object(value):
            raise InvalidRequest(path, f"must be an object, got {shown(value)}")
        return Fields(value, path, self._let_pass)

    def list_of_fields(self, name: str) -> list[Fields]:
        """Objects; none where it is not there."""
        path = self.path(name)
        return [self.inside(each, f"{path}[{i}]") for i, each in enumerate(array(self.take(name), path, MOST_LISTED))]

    def refuse_several(self, paths: Sequence[str], what: str) -> None:
        """Raise InvalidRequest where more than one of them is there. `what` only one can do."""
        if len(paths) > 1:
            raise InvalidRequest(paths[1], f"only one of {' and '.join(paths)} {what}")

    def ignore(self, *names: str) -> None:
        """Take what has no effect here."""
        for name in names:
            self._members.pop(name, None)

    def unknown(self) -> Iterator[str]:
        """Paths of the members that nobody took, but for null."""
        return (self.path(name) for name, value in self._members.items() if value is not None)

    @property
    def num_let_pass(self) -> int:
        """How many members were let pass so far, here, around it and in it."""
        return self._let_pass.num_members if self._let_pass is not None else 0

    def refuse_unknown(self) -> None:
        """Raise InvalidRequest for the first member that nobody took, NotServed for one of OpenAI's, or count them."""
        if self._let_pass is not None:
            self._let_pass.num_members += sum(1 for _ in self.unknown())
            self._members.clear()  # so that each counts once
            return
        for path in self.unknown():
            if (why := NOT_SERVED.get(path)) is not None:
                raise NotServed(path, f"{path}: {why}")
            raise InvalidRequest(cut(path), "is not known here")


def text(value: object, path: str) -> str:
    """A text that can be encoded: JSON can name half of a character, and no tokenizer can do anything with that."""
    if not isinstance(value, str):
        raise InvalidRequest(path, f"must be a string, got {shown(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(path, "has half of a surrogate pair, which is no text") from None
    return value


def integer(value: object, path: str, least: int = 0, most: int = MAX_U32, range_: str = "") -> int:
    """A whole number in [least, most]."""
    whole = int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT else value
    if not isinstance(whole, int) or isinstance(whole, bool):
        raise InvalidRequest(path, f"must be a whole number, got {shown(value)}")
    if not least <= whole <= most:
        raise InvalidRequest(path, f"{range_ or f'must be in [{least}, {most}]'}, got {shown(value)}")
    return whole


def integers(value: object, path: str) -> list[int]:
    """Whole numbers that could be token ids."""
    found = array(value, path)
    # all at once where they are what they should be: a prompt may have a hundred thousand
    if set(map(type, found)) == {int}:
        numbers = cast("list[int]", found)
        if min(numbers) >= 0 and max(numbers) <= MAX_U32:
            return numbers
    return [integer(each, f"{path}[{i}]") for i, each in enumerate(found)]


def number(value: object, path: str) -> float:
    """A finite number within the range of a float32."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequest(path, f"must be a number, got {shown(value)}")
    if not abs(value) <= MAX_FLOAT:  # neither is NaN
        raise InvalidRequest(path, f"must be a finite number, got {shown(value)}")
    return float(value)


def schema_text(schema: object, path: str) -> str:
    """A schema as text, which it may be already. Raises InvalidRequest where it cannot be one."""
    if isinstance(schema, str):
        source = schema
    elif isinstance(schema, dict | bool):
        try:
            source = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except RecursionError:
            raise InvalidRequest(path, "is nested too deep") from None
        except ValueError:
            raise InvalidRequest(path, "has a number that is not finite") from None
    else:
        raise InvalidRequest(path, f"must be an object, got {shown(schema)}")
    try:
        source.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(path, "has half of a surrogate pair, which is no text") from None
    return source


def array(value: object, path: str, most: int | None = None) -> list[object]:
    """A list, of at most `most`; an empty one where there is none."""
    if value is None:
        return []
    if not is_array(value):
        raise InvalidRequest(path, f"must be a list, got {shown(value)}")
    if most is not None and len(value) > most:
        raise InvalidRequest(path, f"at most {most}, got {len(value)}")
    return value


def shown(value: object) -> str:
    """A value in a complaint: a number as it is, of anything else what it is, for a short text may be a prompt, too."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def shown_word(value: object) -> str:
    """The same where one of a few words belongs, or a name: what is there is no prompt."""
    return repr(value) if isinstance(value, str) and len(value) <= 32 and value.isascii() else shown(value)


def cut(path: str) -> str:
    """A path that travels in an error; members may be called anything."""
    printable = path.encode("utf-8", "replace").decode("utf-8", "replace")
    return printable if len(printable) <= 128 else f"{printable[:127]}…"
