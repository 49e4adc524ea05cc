"""Those who come with a ticket that is not for what they ask: each must be turned away, and the stream go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import grpc

from common.errors import Overloaded, PagewireError, TicketRefused, TicketStale, Unavailable
from pagewire.calls import RESUME
from protos import inference_pb2 as pb
from services.status import from_rpc_error
from services.tickets import KEY_BYTES
from tests.faults.callers import TicketCaller
from tests.faults.checker import Violation
from tests.faults.virtual_scheduler import CLIENTS_DIAL, TENANTS, Kind, SimulatedScheduler
from tests.faults.virtual_wire import Channel

if TYPE_CHECKING:
    from tests.faults.simulation import Cluster

Forgery = Callable[[pb.ResumeRequest], None]


def another_seed(request: pb.ResumeRequest) -> None:
    request.request.sampling.seed += 1


def more_tokens_than_were_asked_for(request: pb.ResumeRequest) -> None:
    request.request.stopping.max_tokens += 1


def no_stop_conditions(request: pb.ResumeRequest) -> None:
    request.request.sampling.ClearField("structured")  # an answer of a grammar ends, so it would hear something else
    request.request.stopping.ignore_eos = not request.request.stopping.ignore_eos
    del request.request.stopping.stop[:]


def another_temperature(request: pb.ResumeRequest) -> None:
    sampling = request.request.sampling
    if sampling.HasField("beams"):
        sampling.beams.length_penalty = 2.0  # which has no temperature
    else:
        sampling.temperature += 0.5


def another_prompt(request: pb.ResumeRequest) -> None:
    request.request.token_ids.ids[0] ^= 1


def another_request(request: pb.ResumeRequest) -> None:
    request.request.request_id += "-2"


def another_last_token(request: pb.ResumeRequest) -> None:
    point = _begun(request)
    point.token_ids[-1] ^= 1


def a_token_more(request: pb.ResumeRequest) -> None:
    _begun(request).token_ids.append(7)


def a_token_less(request: pb.ResumeRequest) -> None:
    del _begun(request).token_ids[-1]


def another_choice(request: pb.ResumeRequest) -> None:
    point, n = _begun(request), max(2, request.request.sampling.n)
    request.request.sampling.n = n
    point.choice = (point.choice + 1) % n
    others = [other for other in request.choices if other is not point and other.choice != point.choice]
    del request.choices[:]
    request.choices.extend([point, *others])


def a_ticket_of_other_bits(request: pb.ResumeRequest) -> None:
    point = _begun(request)
    point.ticket = point.ticket[:-1] + bytes([point.ticket[-1] ^ 1])


def a_ticket_that_lives_longer(request: pb.ResumeRequest) -> None:
    point = _begun(request)
    point.ticket = point.ticket[:12] + bytes([point.ticket[12] ^ 1]) + point.ticket[13:]  # of the expiry's high bits


FORGERIES: Final[list[Forgery]] = [
    another_seed,
    more_tokens_than_were_asked_for,
    no_stop_conditions,
    another_temperature,
    another_prompt,
    another_request,
    another_last_token,
    a_token_more,
    a_token_less,
    another_choice,
    a_ticket_of_other_bits,
    a_ticket_that_lives_longer,
]

STRANGERS: Final[dict[str, tuple[Kind, type[PagewireError]]]] = {
    "where the ticket has expired": (Kind(clients_dial="later", clock_ahead_s=100_000.0), TicketStale),
    "where another model is served": (Kind(clients_dial="model", model_digest="another"), TicketStale),
    "where the key is unknown": (Kind(clients_dial="stranger", ticket_secret=bytes([1]) * KEY_BYTES), TicketRefused),
}


async def try_everything(cluster: Cluster, caller: TicketCaller) -> None:
    """Come with what the caller has, in some ways that are wrong."""
    draw = cluster.world.draw
    for forge in draw.sample(FORGERIES, 4):
        await _try(cluster, caller, forge.__name__.replace("_", " "), forge=forge)
    other = next(tenant for tenant in TENANTS if tenant != caller.drawn.tenant)
    await _try(cluster, caller, "another tenant", tenant=other)
    where, (kind, refusal) = draw.choice(list(STRANGERS.items()))
    elsewhere = SimulatedScheduler(cluster, cluster.next_epoch(), kind)
    try:
        await _try(cluster, caller, where, address=kind.clients_dial, refusal=refusal)
    finally:
        elsewhere.kill()


async def _try(
    cluster: Cluster,
    caller: TicketCaller,
    what: str,
    *,
    forge: Forgery = lambda request: None,
    tenant: str = "",
    address: str = CLIENTS_DIAL,
    refusal: type[PagewireError] = TicketRefused,
) -> None:
    request = caller.recall()[1].next_call()
    if not isinstance(request, pb.ResumeRequest) or not any(point.token_ids for point in request.choices):
        return
    forge(request)
    channel = Channel(cluster.network, cluster.clients, address)
    metadata = (("authorization", f"Bearer {TENANTS[tenant or caller.drawn.tenant]}"),)
    call = channel.unary_stream(RESUME)(request.SerializeToString(), metadata=metadata)
    try:
        async for _ in call:
            call.cancel()
            cluster.broken.append(Violation(f"S3: {caller.name} went on for one who came with {what}"))
            return
    except grpc.RpcError as error:
        means = from_rpc_error(error)
        if type(means) is refusal:
            cluster.happened["impostors refused"] += 1
        elif not isinstance(means, Unavailable | Overloaded):  # it may be away, or full, and then nothing is known
            problem = f"S3: one who came with {what} was told {error.code().name}: {error.details()}"
            cluster.broken.append(Violation(problem))


def _begun(request: pb.ResumeRequest) -> pb.ResumePoint:
    """A choice that has tokens."""
    return next(point for point in request.choices if point.token_ids)
