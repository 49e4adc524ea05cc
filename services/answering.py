"""From a request to its answer: prompt to token ids, what is left of a request that began elsewhere, who reads what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Final

from common import failpoints
from common.cache_control import CacheControl
from common.errors import AlreadyRunning, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, UnknownModel
from common.model_folder import ModelFolder
from common.sampling import StopConditions, check_choosable
from common.types import FinishReason
from scheduler.sequence import Begun
from scheduler.stopping import finish_reason
from scheduler.timeline import Controls, Timeline
from services.admission import Ask
from services.answer import Answer, Choice, PinnedPrefix
from services.bad_words import token_sequences
from services.best_of import BestOfAnswer
from services.caller import Caller
from services.chat_template import ChatTemplate
from services.choice_text import ChoiceText, StopFollower
from services.engine import Engine
from services.grammar_checker import GrammarChecker
from services.live_requests import LiveRequest, LiveRequests
from services.request import (
    CHARACTERS_A_TOKEN,
    Chat,
    GenerateSpec,
    Input,
    RequestSize,
    ResumePoint,
    Text,
    TokenIds,
)
from services.request_stream import RequestStream
from services.text import Tokenizer
from services.ticket_keys import new_key
from services.tickets import Scope, Tickets
from services.tickets import scope as make_scope
from services.tools.calling import ToolCalling

_TORN_TOKENS = 64  # tokens that the end of a text that was cut short may have more than the whole
_LONG_CHAT = 64  # messages
_LONG_TEXT = 4096  # characters; above, tokenising would hold up other streams for a millisecond
_A_DAY_S: Final = 86_400


class Answerer:
    """Starts answers: knows the model's tokenizer, its chat template and its limits."""

    def __init__(
        self,
        engine: Engine,
        model: ModelFolder,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        default_max_tokens: int = 0,
        tickets: Tickets | None = None,
        live: LiveRequests | None = None,
        grammars: GrammarChecker | None = None,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        """`tickets`: by default signed with a key that nobody else has, so good for this process alone.

        Without `grammars` no structured output can be asked for.
        """
        self.model = model
        self.tokenizer = tokenizer
        self._engine = engine
        self._template = template
        self._tools = ToolCalling(template.tool_format, tokenizer) if template is not None else None
        self._default_max_tokens = default_max_tokens
        self._tickets = tickets or Tickets([new_key()], lifetime_s=_A_DAY_S)
        self._live = LiveRequests() if live is None else live
        self._grammars = grammars
        self._clock_s = clock_s

    @property
    def engine(self) -> Engine:
        """What computes the answers."""
        return self._engine

    def check_model(self, name: str) -> None:
        """Raise UnknownModel unless `name` is empty or the served model's."""
        if name not in ("", self.model.name):
            raise UnknownModel(f"model: {name!r} is not served here; {self.model.name!r} is")

    async def prompt(
        self, source: Input, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of an input. Raises InvalidRequest when it has none, or when the model cannot chat.

        With `max_tokens`, a text that must have more is refused after its beginning, not after megabytes of work.
        """
        match source:
            case TokenIds():
                return list(source.ids)
            case Chat():
                if self._template is None:
                    raise InvalidRequest("chat", f"{self.model.name} has no chat template; send text instead")
                render, add_special_tokens = self._template.render, False
                offered = source.tools.offered if source.tools else ()
                if len(source.messages) > _LONG_CHAT or offered or any(m.tool_calls for m in source.messages):
                    text = await asyncio.to_thread(render, source.messages, offered)
                else:
                    text = render(source.messages)
            case Text():
                text = source.text
        if max_tokens is not None and len(text) > CHARACTERS_A_TOKEN * max_tokens:
            head = await self._encode(text[: CHARACTERS_A_TOKEN * max_tokens], add_special_tokens)
            if len(head) > max_tokens + _TORN_TOKENS:
                raise InvalidRequest(source.field, f"more than {max_tokens} tokens, which is all the context has")
        ids = await self._encode(text, add_special_tokens)
        if not ids:
            raise InvalidRequest(source.field, "the prompt has no tokens")
        return ids

    async def text(self, ids: tuple[int, ...], *, skip_special_tokens: bool) -> str:
        """The text of token ids. Raises InvalidRequest when there are more than a sequence can have."""
        if len(ids) > self.model.max_model_len:
            raise InvalidRequest("token_ids", f"at most {self.model.max_model_len}, got {len(ids)}")
        return await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens)

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > _LONG_TEXT:  # the tokenizer works without the interpreter lock: streams go on meanwhile
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens)

    @property
    def max_length(self) -> int:
        """Tokens that one sequence can have, prompt and answer together."""
        return min(self._engine.scheduler.max_length or self.model.max_model_len, self.model.max_model_len)

    @property
    def determinism(self) -> str:
        """The determinism class of the executors that are there; empty where they differ, or promise nothing."""
        classes = {session.facts.determinism for session in self._engine.scheduler.sessions}
        return classes.pop() if len(classes) == 1 else ""

    def check_room(self, size: RequestSize, tenant: str, *, time_left_s: float | None = None) -> None:
        """Raise what `start` and `resume` would where there is no room: Overloaded, Unavailable, DeadlineExceeded.

        By the fewest tokens that the prompt can have, so with what is known before it is looked at. What runs here
        already needs no room.
        """
        if size.resumable and self._live.get(tenant, size.request_id) is not None:
            return
        ask = Ask(
            tenant=tenant,
            priority=size.priority,
            prompt_tokens=size.fewest_tokens,
            max_tokens=size.max_tokens,
            choices=size.num_sequences,
            deadline_ns=self._engine.deadline_after(time_left_s),
            resumed=size.resumed,
        )
        with self.refusals(size.request_id, tenant):
            self._engine.check_room(ask)

    async def start(self, spec: GenerateSpec, caller: Caller, *, time_left_s: float | None = None) -> Answer:
        """Queue the request; a resumable one that runs already is taken over, from its beginning.

        Raises every PagewireError that a request can meet before its first token. `check_room` tells sooner of some.
        """
        tenant, deadline_ns = caller.tenant, self._engine.deadline_after(time_left_s)
        timeline = self._timeline(spec, tenant)
        spec, prompt, scope = await self._understand(spec, tenant)
        live = self._live_of(spec, tenant, scope)
        if live is None and spec.sampling.grammar is not None:  # what runs was checked when it began
            await self._check_grammar(spec, tenant)
            live = self._live_of(spec, tenant, scope)  # it may have begun meanwhile
        if live is not None:
            choices = {n: self._choice(spec, prompt, scope, n) for n in range(spec.num_made)}
            if live.holds(dict.fromkeys(choices, ())):
                return self._attach(spec, prompt, choices, live, deadline_ns, scope=scope)
            self._live.end(live)
        stream = self._submit(spec, prompt, caller, deadline_ns, timeline)
        choices = {n: self._choice(spec, prompt, scope, n) for n in range(spec.num_made)}
        live = self._live.add(tenant, spec.request_id, scope, stream) if spec.resumable else None
        return self._answer(spec, prompt, choices, stream, live, scope=scope)

    async def resume(
        self, spec: GenerateSpec, points: Sequence[ResumePoint], caller: Caller, *, time_left_s: float | None = None
    ) -> Answer:
        """Go on behind the points: with the request itself where it runs here, else by making the rest anew.

        A grammar is not checked again: a ticket proves that a scheduler with the key has let it in.

        Raises what `start` raises, TicketRefused or TicketStale, and RequestFailed when it was given up meanwhile.
        """
        tenant, deadline_ns = caller.tenant, self._engine.deadline_after(time_left_s)
        timeline = self._timeline(spec, tenant)
        spec, prompt, scope = await self._understand(spec, tenant)
        failpoints.hit("on_resume_verify")
        choices: dict[int, Choice] = {}
        begun: dict[int, Begun] = {}
        for point in points:
            n, tokens = point.choice, point.token_ids
            determinism = self._tickets.check(point.ticket, scope, n, tokens, self._clock_s())
            choices[n] = self._choice(spec, prompt, scope, n)
            end, is_scored = self._natural_end(spec, tokens), spec.sampling.beams is not None
            if not choices[n].begin(list(tokens), end, exact=bool(determinism), is_scored=is_scored):
                begun[n] = Begun(tokens, determinism)
        resumed = choices
        told = {n: before.tokens for n, before in begun.items()}
        if spec.best_of and begun:  # which are the best is known when all are made anew
            begun = {n: Begun((), "") for n in range(spec.best_of)}
            choices = {n: self._choice(spec, prompt, scope, n) for n in begun}
        live = self._live.get(tenant, spec.request_id)
        if live is not None and live.scope == scope and live.holds({n: b.tokens for n, b in begun.items()}):
            return self._attach(spec, prompt, choices, live, deadline_ns, resumed=resumed, told=told, scope=scope)
        if live is not None:
            self._live.end(live)  # what it made, the caller does not have: two answers must not go on side by side
        stream = None
        if begun:
            resumes = any(map(len, told.values()))
            stream = self._submit(spec, prompt, caller, deadline_ns, timeline, begun, resumed=resumes)
        live = self._live.add(tenant, spec.request_id, scope, stream) if spec.resumable and stream else None
        return self._answer(spec, prompt, choices, stream, live, resumed=resumed, told=told, scope=scope)

    def cancel(self, request_id: str, *, tenant: str = "") -> bool:
        """End a resumable request. False where none of that id runs."""
        live = self._live.get(tenant, request_id)
        if live is not None:
            live.stream.abort()
            self._live.end(live)
        return live is not None

    def unpin(self, pin_id: str | None, *, tenant: str = "") -> int:
        """End a pin, or all of the tenant's. Returns the tokens that were pinned."""
        return self._engine.scheduler.prefixes.unpin(tenant, pin_id)

    def _submit(
        self,
        spec: GenerateSpec,
        prompt: list[int],
        caller: Caller,
        deadline_ns: int,
        timeline: Timeline,
        begun: Mapping[int, Begun] | None = None,
        *,
        resumed: bool = False,
    ) -> RequestStream:
        sampling = spec.sampling
        if spec.best_of and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)  # of the chosen tokens alone
        stop = _stop(spec)
        timeline.controls = Controls(
            max_tokens=stop.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
        )
        with self.refusals(spec.request_id, caller.tenant):
            return self._engine.submit(
                prompt,
                sampling,
                stop,
                choices=spec.num_made,
                begun=begun,
                tenant=caller.tenant,
                weight=caller.weight,
                priority=spec.priority,
                deadline_ns=deadline_ns,
                cache=spec.cache or CacheControl(),
                follow=StopFollower(self._text(spec, prompt)) if spec.sampling.beams and spec.stop_strings else None,
                max_drafts=spec.max_drafts,
                resumed=resumed,
                timeline=timeline,
            )

    def _timeline(self, spec: GenerateSpec, tenant: str) -> Timeline:
        """Of a request that arrives now."""
        return self._engine.timeline(
            spec.request_id, tenant=tenant, operation="chat" if isinstance(spec.input, Chat) else "text_completion"
        )

    @contextmanager
    def refusals(self, request_id: str, tenant: str) -> Iterator[None]:
        """What is refused meanwhile is remembered for who asks why."""
        try:
            yield
        except (Overloaded, Unavailable, DeadlineExceeded) as error:
            self._engine.refused(request_id, _limit_of(error), tenant)
            raise

    async def _understand(self, spec: GenerateSpec, tenant: str) -> tuple[GenerateSpec, list[int], Scope]:
        """The request with its max_tokens, its prompt's tokens, and what its tickets are for."""
        self.check_model(spec.model)
        if not self.model.makes_text:
            raise InvalidRequest(
                "model", f"{self.model.name} makes vectors alone, and no text: it has no output matrix"
            )
        prompt = await self.prompt(spec.input, max_tokens=self.max_length)
        room = self.max_length - len(prompt)
        if room < 1:
            problem = f"{len(prompt)} tokens leave no room in the context of {self.max_length}"
            raise InvalidRequest(spec.input.field, problem)
        max_tokens = spec.max_tokens or min(self._default_max_tokens or room, room)
        if max_tokens > room:
            problem = f"at most {room} after a prompt of {len(prompt)} tokens, got {max_tokens}"
            raise InvalidRequest("max_tokens", problem)
        if spec.cache is not None and spec.cache.pin_tokens > len(prompt):
            problem = f"at most {len(prompt)}, which are the tokens of the prompt, got {spec.cache.pin_tokens}"
            raise InvalidRequest("pin_tokens", problem)
        spec = self._with_tools(replace(spec, max_tokens=max_tokens))
        check_choosable(spec.sampling, _stop(spec), set(self.model.eos_token_ids), self.model.vocab_size)
        if spec.sampling.grammar is not None and self._grammars is None:
            raise InvalidRequest(spec.structured, "structured output is not served here")
        scope = make_scope(tenant, spec.request_id, spec, prompt, self.model.digest)  # of what was asked for
        if spec.bad_words:
            bad = await self._bad_words(spec.bad_words)
            spec = replace(spec, sampling=replace(spec.sampling, bad_words=bad))
        return spec, prompt, scope

    async def _check_grammar(self, spec: GenerateSpec, tenant: str) -> None:
        """Raise what GrammarChecker.check does. Waits for its turn and for the worker."""
        assert self._grammars is not None and spec.sampling.grammar is not None, "it was understood"
        tools = spec.input.tools if isinstance(spec.input, Chat) else None
        if tools is not None and tools.text is not None:  # alone first: what is wrong with it is told by its own field
            await self._grammars.check(tools.text.field, tools.text.grammar, tenant)
        await self._grammars.check(spec.structured, spec.sampling.grammar, tenant)

    def _live_of(self, spec: GenerateSpec, tenant: str, scope: Scope) -> LiveRequest | None:
        """The same request, if it runs here. Raises AlreadyRunning where another one of its id does."""
        live = self._live.get(tenant, spec.request_id) if spec.resumable else None
        if live is not None and live.scope != scope:
            raise AlreadyRunning(f"request_id: {spec.request_id} runs already, and asks for something else")
        return live

    def _with_tools(self, spec: GenerateSpec) -> GenerateSpec:
        """The request with the grammar of its tools' calls, which is a part of what its tickets are for."""
        if not isinstance(spec.input, Chat) or spec.input.tools is None:
            return spec
        assert self._tools is not None, "the chat was rendered"
        grammar = self._tools.grammar(spec.input.tools)
        return replace(spec, structured="chat.tools", sampling=replace(spec.sampling, grammar=grammar))

    async def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        arguments = words, self.tokenizer, self.model.eos_token_ids
        if sum(map(len, words)) > _LONG_TEXT:
            return await asyncio.to_thread(token_sequences, *arguments)
        return token_sequences(*arguments)

    def _tools_of(self, spec: GenerateSpec) -> ToolCalling | None:
        """What reads its answers, where it is a chat that offers tools."""
        return self._tools if isinstance(spec.input, Chat) and spec.input.tools else None

    def _choice(self, spec: GenerateSpec, prompt: list[int], scope: Scope, n: int) -> Choice:
        reader = None
        if isinstance(spec.input, Chat) and spec.input.tools is not None:
            assert self._tools is not None, "the chat was rendered"
            reader = self._tools.reader(spec.request_id, n, spec.input.tools)
        return Choice(n, len(prompt), self._text(spec, prompt), self._tickets.writer(scope, n), reader)

    def _text(self, spec: GenerateSpec, prompt: list[int]) -> ChoiceText:
        tools = self._tools_of(spec)
        return ChoiceText(
            self.tokenizer,
            prompt,
            stop_strings=spec.stop_strings,
            skip_special_tokens=spec.skip_special_tokens,
            min_tokens=spec.min_tokens,
            include_stop=spec.include_stop,
            shown=tools.shown if tools else frozenset(),
        )

    def _natural_end(self, spec: GenerateSpec, tokens: Sequence[int]) -> FinishReason:
        """Whether tokens that we have sent end the choice: nothing follows an end, so only the last can be one."""
        if not tokens:
            return FinishReason.NONE
        return finish_reason(tokens[-1], len(tokens), _stop(spec), set(self.model.eos_token_ids))

    def _attach(
        self,
        spec: GenerateSpec,
        prompt: list[int],
        choices: dict[int, Choice],
        live: LiveRequest,
        deadline_ns: int,
        *,
        scope: Scope,
        resumed: Mapping[int, Choice] | None = None,
        told: Mapping[int, Sequence[int]] | None = None,
    ) -> Answer:
        taken = {n: choice.num_tokens for n, choice in choices.items() if not choice.has_ended}
        self._live.take_over(live, self._engine.attach(live.stream, taken, deadline_ns=deadline_ns))
        return self._answer(spec, prompt, choices, live.stream, live, scope=scope, resumed=resumed, told=told)

    def _answer(
        self,
        spec: GenerateSpec,
        prompt: list[int],
        choices: dict[int, Choice],
        stream: RequestStream | None,
        live: LiveRequest | None,
        *,
        scope: Scope,
        resumed: Mapping[int, Choice] | None = None,
        told: Mapping[int, Sequence[int]] | None = None,
    ) -> Answer:
        """`choices`: all that are made. `resumed`: those that go on, and what of them was `told` before."""
        make: Callable[..., Answer] = Answer
        if spec.best_of:
            wanted = resumed or {n: self._choice(spec, prompt, scope, n) for n in range(spec.n)}
            make = partial(BestOfAnswer, wanted, told or {})
        return make(
            spec,
            choices,
            stream,
            live,
            self._live,
            num_prompt_tokens=len(prompt),
            ticket=b"" if resumed else self._tickets.writer(scope, 0).ticket(self._expiry_s(), ""),
            resumed=resumed is not None,
            expiry_s=self._expiry_s,
            pinned=self._pinned(stream),
        )

    def _pinned(self, stream: RequestStream | None) -> PinnedPrefix | None:
        pin = stream.pin if stream is not None else None
        if pin is None:
            return None
        expires_s = int(self._clock_s() + self._engine.seconds_until(pin.until_ns))
        return PinnedPrefix(pin_id=pin.id, tokens=len(pin.tokens), expires_s=expires_s)

    def _expiry_s(self) -> int:
        return self._tickets.expiry(self._clock_s())


def _limit_of(refusal: Overloaded | Unavailable | DeadlineExceeded) -> str:
    """The limit that a refused request met."""
    if isinstance(refusal, Overloaded):
        return refusal.limit
    return "draining" if isinstance(refusal, Unavailable) else "deadline"


def _stop(spec: GenerateSpec) -> StopConditions:
    assert spec.max_tokens is not None, "its max_tokens is not known yet"
    return StopConditions(
        max_tokens=spec.max_tokens,
        stop_token_ids=spec.stop_token_ids,
        stop_strings=spec.stop_strings,
        ignore_eos=spec.ignore_eos,
        min_tokens=spec.min_tokens,
        include_stop=spec.include_stop,
    )
