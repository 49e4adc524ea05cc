"""What may be in the body of a request, told by those who read it, so that it is written down once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from services.gateway.fields import MAX_U32, TOKEN_IDS, Fields, Form

_TEXT: Final = {"type": "string"}
_TRUTH: Final = {"type": "boolean"}


def described(read: Callable[[Fields], object], needed: Mapping[str, object]) -> dict[str, Any]:
    """The JSON schema of the bodies that `read` takes; they must have what is `needed`, such as this.

    Where a member may be one thing or another, it is read as each of them.
    """
    forms: list[dict[str, Any]] = []
    for other in (False, True):
        body = Description(other=other, needed=needed)
        read(body)
        forms.append(body.form())
    one, another = (form["properties"] for form in forms)
    return {
        **forms[0],
        "properties": {name: _any_of([one.get(name), another.get(name)]) for name in {**one, **another}},
    }


class Description(Fields):
    """In place of a body: nothing that is asked for is there, and what it would have to be is noted."""

    def __init__(self, path: str = "", *, other: bool, needed: Mapping[str, object] | None = None) -> None:
        """`other`: what may be an object, or true or false, is that; else it is what it may be beside that."""
        super().__init__({}, path)
        self._other = other
        self._needed: Mapping[str, object] = needed or {}
        self._forms: dict[str, list[Form | Description | list[Description]]] = {}
        self._required = list(self._needed)

    def form(self) -> dict[str, Any]:
        """The JSON schema of this object."""
        properties = {
            name: form if name in self._required else _or_null(form)
            for name, form in ((name, _any_of([_form(each) for each in forms])) for name, forms in self._forms.items())
        }
        required = {"required": self._required} if self._required else {}
        return {"type": "object", "properties": properties, **required, "additionalProperties": False}

    def take(self, name: str, form: Form | None = None) -> object:
        """What it must be, where the reader cannot do without it."""
        if form is not None:
            self._note(name, form)
        return self._needed.get(name)

    def string(self, name: str) -> str | None:
        """A text."""
        self._note(name, _TEXT)
        return None

    def required_string(self, name: str) -> str:
        """A text that must be there."""
        self._note(name, _TEXT, required=True)
        return ""

    def kind(self, name: str, known: Sequence[str]) -> str | None:
        """One of the forms that are served."""
        return self.word(name, known)

    def required_kind(self, name: str, known: Sequence[str]) -> str:
        """One of these, too."""
        return self.required_word(name, known)

    def word(self, name: str, known: Sequence[str]) -> str | None:
        """One of these words."""
        self._note(name, {"enum": list(known)})
        return None

    def harmless(self, name: str, word: str) -> None:
        """This word alone."""
        self._note(name, {"enum": [word]})

    def required_word(self, name: str, known: Sequence[str]) -> str:
        """The last one of these words: it has most to tell."""
        self._note(name, {"enum": list(known)}, required=True)
        return known[-1]

    def boolean(self, name: str) -> bool | None:
        """True where anything else is only read beside that."""
        self._note(name, _TRUTH)
        return name == "stream" or None

    def integer(self, name: str, least: int = 0, most: int = MAX_U32, range_: str = "") -> int | None:
        """A whole number."""
        self._note(name, {"type": "integer", "minimum": least, "maximum": most})
        return None

    def number(self, name: str) -> float | None:
        """A number."""
        self._note(name, {"type": "number"})
        return None

    def strings(self, name: str) -> list[str]:
        """Texts, or one."""
        self._note(name, {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]})
        return []

    def integers(self, name: str) -> list[int]:
        """Token ids."""
        self._note(name, TOKEN_IDS)
        return []

    def schema(self, name: str) -> str | None:
        """A JSON schema, also as text."""
        self._note(name, {"type": ["object", "boolean", "string"]})
        return None

    def required_schema(self, name: str, around: str = "") -> str:
        """The same, where it must be there."""
        self.schema(name)
        self._required.append(name)
        return "{}"

    def is_object(self, name: str) -> bool:
        """Both, one after the other."""
        return self._other

    def is_boolean(self, name: str) -> bool:
        """Both, one after the other."""
        return self._other

    def fields(self, name: str, form: Form | None = None) -> Fields | None:
        """An object that is described in turn."""
        if form is not None:
            self._note(name, form)
            return None
        inner = Description(self.path(name), other=self._other)
        self._note(name, inner)
        return inner

    def list_of_fields(self, name: str) -> list[Fields]:
        """One such object."""
        inner = Description(f"{self.path(name)}[0]", other=self._other)
        self._note(name, [inner])
        return [inner]

    def refuse_several(self, paths: Sequence[str], what: str) -> None:
        """Each of them is described."""

    def ignore(self, *names: str) -> None:
        """Whatever these are."""
        for name in names:
            if name not in self._forms:
                self._note(name, {})

    def _note(self, name: str, form: Form | Description | list[Description], *, required: bool = False) -> None:
        self._forms.setdefault(name, []).append(form)
        if required:
            self._required.append(name)


def _form(noted: Form | Description | list[Description]) -> Form:
    if isinstance(noted, Description):
        return noted.form()
    return {"type": "array", "items": noted[0].form()} if isinstance(noted, list) else noted


def _or_null(form: Form) -> Form:
    """The same, or null, which is as good as not there."""
    if (kind := form.get("type")) is not None:
        return {**form, "type": [*([kind] if isinstance(kind, str) else kind), "null"]}
    if "enum" in form:
        return {**form, "enum": [*form["enum"], None]}
    return {"anyOf": [*form["anyOf"], {"type": "null"}]} if "anyOf" in form else form


def _any_of(forms: Sequence[Form | None]) -> Form:
    """Any of these, each once; without a word of what anything may be."""
    found: list[Form] = []
    for form in forms:
        if form is not None:
            found += [each for each in form.get("anyOf", [form]) if each not in found]
    return {} if {} in found else found[0] if len(found) == 1 else {"anyOf": found}
