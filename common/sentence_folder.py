"""What a folder in sentence-transformers' form says of a model that makes vectors of texts: a few small JSON files.

modules.json lists what a text goes through: a Transformer, a Pooling that makes one vector of those of all tokens, and
perhaps a Normalize. Only the last token's vector can be had of a model that is served here: a prompt is computed in
parts, on several executors, and what the prefix cache has of it is not computed at all.

Source: https://github.com/huggingface/sentence-transformers (Transformer, Pooling and Normalize).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.json_value import is_array, is_natural, is_object

_MAX_BYTES: Final = 1 << 20
_SERVED: Final = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_OTHER_POOLINGS: Final = (
    "pooling_mode_cls_token",
    "pooling_mode_mean_tokens",
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The vector that a model makes of a text: what is behind its last norm, of the last token."""

    dimensions: int  # numbers of it
    normalizes: bool  # its length becomes 1
    appends_eos: bool  # the tokenizer is told to end a text with its EOS token, whatever tokenizer.json says


def read_embedding(path: Path, config: Mapping[str, object], tokenizer_config: Mapping[str, object]) -> Embedding | str:
    """What the model in the folder `path` makes of a text; or why it makes no vectors, naming file and field.

    `config` is that of the language model. Nothing is raised: what makes no vectors may still make text.
    """
    try:
        return _read(path, config, tokenizer_config)
    except _NotServed as reason:
        return str(reason)


class _NotServed(Exception):
    """Why not."""


def _read(path: Path, config: Mapping[str, object], tokenizer_config: Mapping[str, object]) -> Embedding:
    if not (path / "modules.json").exists():
        raise _NotServed(
            "modules.json is not there: vectors are made by models in sentence-transformers' form, whose Pooling takes "
            "the last token"
        )
    pooling, normalizes = _read_modules(path)
    own = "sentence_bert_config.json"
    if (path / own).exists() and _read_object(path, own).get("do_lower_case"):
        raise _NotServed(f'{own}: "do_lower_case" must be false: a text is taken as it is')
    return Embedding(
        dimensions=_read_pooling(path, f"{pooling}/config.json", config),
        normalizes=normalizes,
        appends_eos=tokenizer_config.get("add_eos_token") is True,
    )


def _read_modules(path: Path) -> tuple[str, bool]:
    """The folder of the Pooling, and whether there is a Normalize."""
    modules = _read_json(path, "modules.json")
    names: list[str] = []
    places: list[str] = []
    for module in modules if is_array(modules) else ():
        kind, place = (module.get("type"), module.get("path")) if is_object(module) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str):
            raise _NotServed('modules.json: each module must have a "type" and a "path"')
        package, _, name = kind.rpartition(".")
        names.append(name if package.startswith("sentence_transformers") else kind)
        places.append(place)
    if names not in _SERVED:
        found = ", ".join(names)[:200] or "none"
        raise _NotServed(f'modules.json: "type" must be Transformer, Pooling and perhaps Normalize, got {found}')
    if places[0] not in ("", "."):
        raise _NotServed(f'modules.json: "path" of the Transformer must be empty, got {places[0][:80]!r}')
    if not re.fullmatch(r"\w[\w.-]*", places[1]):
        raise _NotServed(f'modules.json: "path" of the Pooling must be a folder\'s name, got {places[1][:80]!r}')
    return places[1], len(names) == 3


def _read_pooling(path: Path, file: str, config: Mapping[str, object]) -> int:
    """How many numbers come out of it."""
    pooling = _read_object(path, file)
    if "pooling_mode" in pooling:  # as later versions write it
        if pooling["pooling_mode"] not in ("lasttoken", ["lasttoken"]):
            raise _NotServed(f'{file}: "pooling_mode" must be lasttoken, got {str(pooling["pooling_mode"])[:80]!r}')
    else:
        for name in _OTHER_POOLINGS:  # where nothing is said, the mean is taken
            if pooling.get(name, name == "pooling_mode_mean_tokens"):
                raise _NotServed(f'{file}: "{name}" must be false: only the last token\'s vector can be had')
        if not pooling.get("pooling_mode_lasttoken"):
            raise _NotServed(f'{file}: "pooling_mode_lasttoken" must be true')
    name = "embedding_dimension" if "embedding_dimension" in pooling else "word_embedding_dimension"
    dimensions, hidden = pooling.get(name), config.get("hidden_size", config.get("n_embd"))
    if not is_natural(dimensions) or not dimensions or (hidden is not None and hidden != dimensions):
        raise _NotServed(f'{file}: "{name}" must be the model\'s hidden size, {hidden}, got {str(dimensions)[:80]}')
    return dimensions


def _read_object(path: Path, file: str) -> Mapping[str, object]:
    value = _read_json(path, file)
    if not is_object(value):
        raise _NotServed(f"{file} is not a JSON object")
    return value


def _read_json(path: Path, file: str) -> object:
    try:
        if not (path / file).is_file():
            raise _NotServed(f"{file} is not there")
        if (path / file).stat().st_size > _MAX_BYTES:
            raise _NotServed(f"{file} has more than {_MAX_BYTES} bytes")
        value: object = json.loads((path / file).read_bytes().decode())
    except OSError as error:
        raise _NotServed(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _NotServed(f"{file} is not valid JSON") from error
    return value
