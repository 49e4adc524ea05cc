"""Every gRPC option that is set anywhere, with its reason. The defaults of gRPC were found wanting by measurement."""

from __future__ import annotations

from typing import Final

Options = tuple[tuple[str, int], ...]

MIB: Final = 1 << 20

LINK_KEEPALIVE_MS: Final = 1000
"""How often the ends of a link ping each other; gRPC sends no pings closer than a second."""

_EVERYWHERE: Final[Options] = (
    # A few bytes that unpack to gigabytes are refused, and not unpacked to see how many they are.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # An idle connection is pinged too, and as often as we say: a dead peer is found before the next call needs it.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL: Final[Options] = (
    # A proxy meant for web pages must not be handed prompts, nor stand between the two halves.
    ("grpc.enable_http_proxy", 0),
)
_SERVER: Final[Options] = (
    # A second server on the same port is an error, and does not silently take half of the traffic.
    ("grpc.so_reuseport", 0),
    # A call that gRPC itself refuses (too large, for one) hears so at once: by default it waits 0.1 to 1 s for that.
    ("grpc.http.tarpit", 0),
    # Nobody reads channelz here; its records cost memory for each connection.
    ("grpc.enable_channelz", 0),
)


def link_options(
    *, keepalive_ms: int = LINK_KEEPALIVE_MS, handshake_timeout_ms: int = 5000, max_connections: int = 1024
) -> Options:
    """Options of a link between scheduler and executor, for both ends; each end passes over what is the other's."""
    return (
        *_EVERYWHERE,
        *_CHANNEL,
        *_SERVER,
        *_pings(keepalive_ms, answer_within_ms=2 * keepalive_ms, min_interval_ms=keepalive_ms // 4),
        # A plan that admits many long prompts is larger than the 4 MiB that gRPC allows.
        ("grpc.max_receive_message_length", 64 * MIB),
        # Who connects and says nothing does not stay, and not everybody may connect at once.
        ("grpc.server_handshake_timeout_ms", handshake_timeout_ms),
        ("grpc.http2.settings_timeout", handshake_timeout_ms),
        ("grpc.max_allowed_incoming_connections", max_connections),
        # One link is all that an executor opens.
        ("grpc.max_concurrent_streams", 8),
        # A link has a connection of its own: what others send cannot delay a plan.
        ("grpc.use_local_subchannel_pool", 1),
        # A session that broke starts anew, by our rules; gRPC must not start it again behind our back.
        ("grpc.enable_retries", 0),
        # A scheduler that restarts is found again within a second or two, not after the two minutes that gRPC waits.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 1000),
    )


def server_options(
    *,
    max_streams: int = 1024,
    max_message_bytes: int = 4 * MIB,
    max_metadata_bytes: int = 8192,
    max_connections: int = 4096,
    keepalive_ms: int = 20_000,
    min_ping_interval_ms: int = LINK_KEEPALIVE_MS // 4,
    handshake_timeout_ms: int = 5000,
    max_idle_ms: int = 300_000,
    max_age_ms: int = 3_600_000,
    max_call_ms: int = 3_600_000,
) -> Options:
    """Options of a server that strangers call, each with `max_streams` calls at once that we would still answer.

    A caller may ping as often as an executor does, once a second: some clients do, and are cut off by default.
    """
    return (
        *_EVERYWHERE,
        *_SERVER,
        *_pings(keepalive_ms, answer_within_ms=keepalive_ms // 2, min_interval_ms=min_ping_interval_ms),
        # Twice our own limit, so that the call too many gets our clean refusal and not a reset stream.
        ("grpc.max_concurrent_streams", 2 * max_streams),
        # gRPC cancels calls of a burst that are not picked up yet, from 1,000 on; our own admission comes first.
        ("grpc.server.max_pending_requests", max(1000, 4 * max_streams)),
        ("grpc.server.max_pending_requests_hard_limit", max(3000, 8 * max_streams)),
        # Nor those that were not picked up within 30 s, which is how long a burst may take on a machine that is busy.
        ("grpc.server_max_unrequested_time_in_server", 300),
        # A prompt fits in this many times over; no larger message is even buffered.
        ("grpc.max_receive_message_length", max_message_bytes),
        # Between the two gRPC refuses at random, which nobody can explain to a caller.
        ("grpc.max_metadata_size", max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", max_metadata_bytes),
        # Connections are bounded, like everything a stranger can have many of.
        ("grpc.max_allowed_incoming_connections", max_connections),
        # Who connects and says nothing, says nothing, or never finishes, is dropped: in seconds, minutes, hours.
        ("grpc.server_handshake_timeout_ms", handshake_timeout_ms),
        ("grpc.http2.settings_timeout", handshake_timeout_ms),
        ("grpc.max_connection_idle_ms", max_idle_ms),
        ("grpc.max_connection_age_ms", max_age_ms),
        ("grpc.max_connection_age_grace_ms", max_call_ms),
    )


def client_options(
    *, keepalive_ms: int = 1000, answer_within_ms: int = 1500, max_message_bytes: int = 64 * MIB
) -> Options:
    """Options of a channel to a server: the command line, the gateway, the Python client.

    A server that stands still is noticed within two and a half seconds, so that a stream goes on elsewhere within four.
    """
    return (
        *_EVERYWHERE,
        *_CHANNEL,
        *_pings(keepalive_ms, answer_within_ms=answer_within_ms, min_interval_ms=keepalive_ms // 4),
        # The whole answer in one message, times n, may be larger than the 4 MiB that gRPC allows.
        ("grpc.max_receive_message_length", max_message_bytes),
        # A connection of its own, that no other client of the process has seen break, or keeps from being made anew.
        ("grpc.use_local_subchannel_pool", 1),
        # A stream that broke is resumed, by our rules; gRPC, which cannot do that, must not try again behind our back.
        ("grpc.enable_retries", 0),
        # A server that restarts is found again at once, not after the two minutes that gRPC waits; a connection may
        # take a second to be made (that is the second one), but the next one is tried much sooner.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 250),
    )


def _pings(keepalive_ms: int, *, answer_within_ms: int, min_interval_ms: int) -> Options:
    return (
        ("grpc.keepalive_time_ms", keepalive_ms),
        # The first bounds a connection that drops packets, the second a peer whose kernel answers and which itself
        # does not (a stopped process): without it that is seen only after a minute.
        ("grpc.keepalive_timeout_ms", answer_within_ms),
        ("grpc.http2.ping_timeout_ms", answer_within_ms),
        # The peer may ping this often; by default the third ping within five minutes costs it the connection.
        ("grpc.http2.min_ping_interval_without_data_ms", min_interval_ms),
    )
