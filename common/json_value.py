"""Telling apart what json.loads returned, in words the type checkers follow."""

from __future__ import annotations

from typing import TypeGuard


def is_object(value: object) -> TypeGuard[dict[str, object]]:
    """True for a JSON object; its keys are always strings."""
    return isinstance(value, dict)


def is_array(value: object) -> TypeGuard[list[object]]:
    """True for a JSON array."""
    return isinstance(value, list)


def is_natural(value: object) -> TypeGuard[int]:
    """True for a whole number from 0 on. `true` is not one, though Python counts it among the integers."""
    return type(value) is int and value >= 0
