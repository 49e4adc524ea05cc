"""How the next token is chosen and when a choice ends: what a caller may ask, and its limits.

The defaults are those of a plain greedy-free sampler (temperature 1, nothing cut off, every control off). A request's
unset fields are filled in before this value is built (services/codec_public.py), so nothing here is optional. What each
control does, and in which order, is said in executor/controls.py and executor/sampler.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from common.errors import InvalidRequest

MAX_SEED = (1 << 64) - 1

Syntax = Literal["json_schema", "regex", "lark"]


class Grammar(NamedTuple):
    """What an answer must be, in the words of who asks. executor/grammar.py compiles it."""

    syntax: Syntax
    source: str


JSON_SPELLING: Final[Mapping[str, Any]] = {
    # Between two parts: pretty-printing fits, and a model that likes spaces does not go on for ever.
    "whitespace_flexible": True,
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}",
    "lenient": False,  # a keyword of the schema that cannot be kept is an error
}
"""How an answer in JSON may be written, in llguidance's words."""


EarlyStopping = bool | Literal["never"]


class BeamParams(NamedTuple):
    """A beam search instead of a choice, token by token. scheduler/beam_search.py says what the numbers do."""

    width: int  # beams that are kept
    length_penalty: float = 1.0  # above 0 longer answers are preferred
    early_stopping: EarlyStopping = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What the sampler needs to know about one sequence. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0  # in (0, 1]; 1 keeps every token
    min_p: float = 0.0  # in [0, 1]; tokens below min_p * max probability are cut
    seed: int = 0  # unsigned 64 bits; resolved at the edge when the caller gave none
    typical_p: float = 1.0  # in (0, 1]; 1 keeps every token
    repetition_penalty: float = 1.0  # divides the logits of tokens of prompt and output, where they are positive
    presence_penalty: float = 0.0  # taken from the logits of tokens of the output
    frequency_penalty: float = 0.0  # the same, times how often each is there
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), each id once
    allowed_token_ids: tuple[int, ...] = ()  # empty allows every token
    banned_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that are not completed
    logprobs: int | None = None  # not None: each output token is scored, beside so many of the likeliest
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    grammar: Grammar | None = None  # what the answer must be
    beams: BeamParams | None = None  # not None: nothing is drawn

    @property
    def greedy(self) -> bool:
        """True when the token is the argmax and no random number is drawn."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConditions:
    """When a choice ends. Token conditions are checked on the executor, and again by the scheduler."""

    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # before so many, no token that ends it is chosen, and no string ends it
    include_stop: bool = False  # the stop string is part of the text


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask for. Every bound is configuration; these are safe defaults."""

    max_choices: int = 8
    max_stop_strings: int = 8
    max_stop_string_bytes: int = 256
    max_stop_token_ids: int = 64
    max_temperature: float = 100.0
    max_messages: int = 4096  # of a chat
    min_repetition_penalty: float = 0.01  # a logit divided by less may not be finite any more
    max_repetition_penalty: float = 100.0
    max_penalty: float = 2.0  # presence and frequency, either sign
    max_logit_biases: int = 300
    max_logit_bias: float = 100.0  # either sign
    max_listed_token_ids: int = 1024  # of allowed_token_ids, and of banned_token_ids
    max_bad_words: int = 64
    max_bad_word_bytes: int = 256
    max_logprobs: int = 20  # likeliest tokens beside each one
    max_structured_bytes: int = 65_536  # of a schema, pattern, grammar, or of all choices
    max_structured_choices: int = 1024
    max_cache_salt_bytes: int = 256
    max_pin_seconds: int = 3600
    max_length_penalty: float = 5.0  # of a beam search, either sign
    max_tools: int = 128  # that a chat offers; and calls of one message
    max_tools_bytes: int = 131_072  # of their names, descriptions and schemas together
    max_embedding_inputs: int = 2048  # of one request for embeddings
    max_embedding_bytes: int = 16 << 20  # of all its vectors


def check_sampling(params: SamplingParams, limits: RequestLimits) -> None:
    """Raise InvalidRequest naming the first number that is out of its range."""
    _check_range("temperature", params.temperature, 0.0, limits.max_temperature)
    if params.top_k < 0:
        raise InvalidRequest("top_k", f"must be 0 (off) or positive, got {params.top_k}")
    _check_share("top_p", params.top_p)
    _check_range("min_p", params.min_p, 0.0, 1.0)
    if not 0 <= params.seed <= MAX_SEED:
        raise InvalidRequest("seed", f"must be an unsigned 64-bit number, got {params.seed}")
    _check_share("typical_p", params.typical_p)
    least, most = limits.min_repetition_penalty, limits.max_repetition_penalty
    _check_range("repetition_penalty", params.repetition_penalty, least, most)
    _check_range("presence_penalty", params.presence_penalty, -limits.max_penalty, limits.max_penalty)
    _check_range("frequency_penalty", params.frequency_penalty, -limits.max_penalty, limits.max_penalty)
    bound = limits.max_logit_bias
    for token, bias in params.logit_bias:
        if not abs(bias) <= bound:  # neither is NaN
            raise InvalidRequest("logit_bias", f"must be in [{-bound:g}, {bound:g}], got {bias} for token {token}")
    for field, number in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if number is not None and not 0 <= number <= limits.max_logprobs:
            raise InvalidRequest(field, f"must be in [0, {limits.max_logprobs}], got {number}")


def check_beams(params: SamplingParams, n: int, limits: RequestLimits) -> None:
    """Raise InvalidRequest where a beam search has a number out of its range, or is asked for beside what it is not."""
    beams = params.beams
    if beams is None:
        return
    if not 2 <= beams.width <= limits.max_choices:
        raise InvalidRequest("beams.width", f"must be in [2, {limits.max_choices}], got {beams.width}")
    _check_range("beams.length_penalty", beams.length_penalty, -limits.max_length_penalty, limits.max_length_penalty)
    if n > beams.width:
        raise InvalidRequest("n", f"must be at most beams.width, {beams.width}, got {n}")
    for field, value, off in (
        ("temperature", params.temperature, 0.0),
        ("top_k", params.top_k, 0),
        ("top_p", params.top_p, 1.0),
        ("min_p", params.min_p, 0.0),
        ("typical_p", params.typical_p, 1.0),
    ):
        if value != off:
            raise InvalidRequest(field, f"must be {off:g}, or not set, with beams, which draw nothing; got {value:g}")


def check_lengths(limits: RequestLimits, *, logit_bias: int, allowed: int, banned: int, bad_words: int) -> None:
    """Raise InvalidRequest naming the first list that is too long. Asked before anything is made of the lists."""
    _check_length("logit_bias", logit_bias, limits.max_logit_biases)
    _check_length("allowed_token_ids", allowed, limits.max_listed_token_ids)
    _check_length("banned_token_ids", banned, limits.max_listed_token_ids)
    _check_length("bad_words", bad_words, limits.max_bad_words)


def check_listed(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest naming the first list that has an id outside the vocabulary, or contradicts another."""
    for token, _ in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequest("logit_bias", f"is for tokens in [0, {vocab_size}), got one for {token}")
    _check_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
    _check_ids("banned_token_ids", params.banned_token_ids, vocab_size)
    both = set(params.allowed_token_ids).intersection(params.banned_token_ids)
    if both:
        raise InvalidRequest("banned_token_ids", f"must not be in allowed_token_ids too, got {min(both)}")


def check_bad_words(words: Sequence[str], limits: RequestLimits) -> None:
    """Raise InvalidRequest when one has too many bytes, or none."""
    _check_texts("bad_words", words, limits.max_bad_word_bytes)


def check_structured(field: str, texts: Sequence[str], limits: RequestLimits) -> None:
    """Raise InvalidRequest when there are too many, none, an empty one, or too many bytes of them together."""
    if not texts:
        raise InvalidRequest(field, "is empty")
    _check_length(field, len(texts), limits.max_structured_choices)
    if not all(texts):
        raise InvalidRequest(field, "must not be empty" if len(texts) == 1 else "has an empty string")
    size, most = sum(len(text.encode()) for text in texts), limits.max_structured_bytes
    if size > most:
        raise InvalidRequest(field, f"at most {most} bytes, got {size}")


def check_stop(stop: StopConditions, limits: RequestLimits, vocab_size: int) -> None:
    """Raise InvalidRequest naming the first stop condition that is out of its range."""
    if stop.max_tokens < 1:
        raise InvalidRequest("max_tokens", f"must be at least 1, got {stop.max_tokens}")
    if len(stop.stop_strings) > limits.max_stop_strings:
        raise InvalidRequest("stop", f"at most {limits.max_stop_strings} strings, got {len(stop.stop_strings)}")
    _check_texts("stop", stop.stop_strings, limits.max_stop_string_bytes)
    _check_length("stop_token_ids", len(stop.stop_token_ids), limits.max_stop_token_ids)
    _check_ids("stop_token_ids", stop.stop_token_ids, vocab_size)


def check_choosable(params: SamplingParams, stop: StopConditions, eos: Set[int], vocab_size: int) -> None:
    """Raise InvalidRequest when the request's own words leave no token to choose, or none before min_tokens."""
    if stop.min_tokens > stop.max_tokens:
        raise InvalidRequest("min_tokens", f"must be at most max_tokens, {stop.max_tokens}, got {stop.min_tokens}")
    if params.grammar is not None:
        _check_can_end(params, stop, eos)
    ends = {*stop.stop_token_ids, *(() if stop.ignore_eos else eos)} if stop.min_tokens else set[int]()
    if params.allowed_token_ids:
        if ends.issuperset(params.allowed_token_ids):
            problem = f"has only tokens that end the answer, which must have at least {stop.min_tokens}, min_tokens"
            raise InvalidRequest("allowed_token_ids", problem)
    elif len(ends.union(params.banned_token_ids)) >= vocab_size:
        raise InvalidRequest("banned_token_ids", f"leaves none of {vocab_size} tokens to choose")


def _check_can_end(params: SamplingParams, stop: StopConditions, eos: Set[int]) -> None:
    """An answer of a grammar ends by itself: raise InvalidRequest for what would never let it."""
    if stop.ignore_eos:
        raise InvalidRequest("ignore_eos", "must be false with structured output or tools: the answer ends by itself")
    if not eos:
        raise InvalidRequest("structured", "like tools, needs a model that has an end-of-sequence token")
    ends = {*eos, *stop.stop_token_ids}
    if ends.issubset(params.banned_token_ids):
        raise InvalidRequest("banned_token_ids", "has every token that ends an answer, and with a grammar it must end")
    if params.allowed_token_ids and ends.isdisjoint(params.allowed_token_ids):
        problem = "has no token that ends an answer, and with a grammar it must end"
        raise InvalidRequest("allowed_token_ids", problem)


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(field, f"must be in [{low:g}, {high:g}], got {value}")


def _check_share(field: str, value: float) -> None:
    if not (math.isfinite(value) and 0.0 < value <= 1.0):
        raise InvalidRequest(field, f"must be in (0, 1], got {value}")


def _check_length(field: str, length: int, most: int) -> None:
    if length > most:
        raise InvalidRequest(field, f"at most {most}, got {length}")


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    for i, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(field, f"must be in [0, {vocab_size}), got {token} at index {i}")


def _check_texts(field: str, texts: Sequence[str], most_bytes: int) -> None:
    for text in texts:
        size = len(text.encode())
        if not 0 < size <= most_bytes:
            raise InvalidRequest(field, f"each string must have 1 to {most_bytes} bytes, got {size}")
