"""Configuration ↔ command line and environment: every field of a config class is --a-flag and PAGEWIRE_A_FLAG."""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from common.config import help_of, range_of

ENVIRONMENT_PREFIX = "PAGEWIRE_"

Config = TypeVar("Config")


def add_flags(parser: argparse.ArgumentParser, config: type[Any], environment: Mapping[str, str] = os.environ) -> None:
    """Add a flag for every field. A flag on the command line wins over the environment, that over the default."""
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        kind = types[field.name]
        text = f"{help_of(field)} (default: {field.default}; environment: {variable})".replace("%", "%%")
        given = environment.get(variable)
        if kind is bool:
            default = field.default if given is None else _parse_bool(parser, variable, given)
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
            continue
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        if choices and given is not None and given not in choices:
            parser.error(f"{variable}={given}: choose from {', '.join(choices)}")
        # argparse converts a default that is a string as if it had been typed, and names the flag where it cannot
        default = field.default if given is None else given
        number = _number(kind, *range_of(field)) if kind in (int, float) else None
        parser.add_argument(flag, type=number or str, choices=choices, default=default, help=text)


def from_flags(config: type[Config], arguments: argparse.Namespace) -> Config:
    """The configuration in parsed arguments."""
    names = [field.name for field in dataclasses.fields(typing.cast(Any, config))]
    return config(**{name: getattr(arguments, name) for name in names})


def to_flags(config: Any) -> list[str]:
    """The command line that gives this configuration to another process, whatever its environment says."""
    flags: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def at_least_one(text: str) -> int:
    """For argparse: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _number(kind: type[int | float], least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if not least <= number <= most:
            bound = f"at most {most:g}" if number > most else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return number

    parse.__name__ = kind.__name__  # argparse names it where a text is no number
    return parse


def _parse_bool(parser: argparse.ArgumentParser, variable: str, text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        parser.error(f"{variable}={text}: choose from {', '.join(words)}")
    return words[text.lower()]
