"""What a client hears of a stream, checked as it comes: neither gap nor repeat, and all that it needs to go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from protos import inference_pb2 as pb

Call = aio.UnaryStreamCall[Any, pb.GenerateStreamResponse]


@dataclass
class Heard:
    """What a client has heard of a stream: all that it needs to go on."""

    request: pb.GenerateStreamRequest
    first: pb.PromptInfo = field(default_factory=pb.PromptInfo)
    tokens: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    text: dict[int, str] = field(default_factory=dict[int, str])
    tickets: dict[int, bytes] = field(default_factory=dict[int, bytes])
    ends: dict[int, pb.Finish] = field(default_factory=dict[int, pb.Finish])
    logprobs: dict[int, list[pb.TokenLogprobs]] = field(default_factory=dict[int, list[pb.TokenLogprobs]])
    prompt_logprobs: list[pb.TokenLogprobs] = field(default_factory=list[pb.TokenLogprobs])

    def hear(self, message: pb.GenerateStreamResponse) -> None:
        kind = message.WhichOneof("event")
        if kind == "prompt":
            if not message.prompt.resumed:
                self.first = message.prompt
            for choice in range(self.request.sampling.n or 1):
                self.tokens.setdefault(choice, [])
                self.text.setdefault(choice, "")
                self.tickets.setdefault(choice, message.prompt.ticket)
        elif kind == "delta":
            delta = message.delta
            assert delta.index == len(self.tokens[delta.choice]), "neither a gap nor a repeat"
            assert delta.choice not in self.ends
            self.tokens[delta.choice] += delta.token_ids
            self.text[delta.choice] += delta.text
            self.tickets[delta.choice] = delta.ticket
            self.logprobs.setdefault(delta.choice, []).extend(delta.logprobs)
        elif kind == "prompt_logprobs":
            assert not self.tokens[0] and message.prompt_logprobs.index == len(self.prompt_logprobs)
            self.prompt_logprobs += message.prompt_logprobs.logprobs
        else:
            assert message.finish.choice not in self.ends
            self.ends[message.finish.choice] = message.finish

    async def until(self, call: Call, num_tokens: int) -> None:
        """Read until choice 0 has so many tokens."""
        while len(self.tokens.get(0, ())) < num_tokens:
            message = await call.read()
            assert isinstance(message, pb.GenerateStreamResponse), "the stream ended too soon"
            self.hear(message)

    async def rest(self, call: Call) -> None:
        while isinstance(message := await call.read(), pb.GenerateStreamResponse):
            self.hear(message)

    def to_resume(self) -> pb.ResumeRequest:
        request = pb.GenerateStreamRequest()
        request.CopyFrom(self.request)
        request.request_id = self.first.request_id
        request.sampling.seed = self.first.seed
        request.stopping.max_tokens = self.first.max_tokens
        points = [
            pb.ResumePoint(choice=choice, ticket=self.tickets[choice], token_ids=tokens)
            for choice, tokens in self.tokens.items()
            if choice not in self.ends
        ]
        return pb.ResumeRequest(request=request, choices=points)
