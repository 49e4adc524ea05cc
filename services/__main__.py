"""The command line. Reads the configuration, unpacks it, and starts one thing.

Nobody else reads flags, but for those of a request (services/typed_request.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import log
from common.config import (
    DEFAULT_MODEL,
    ClientConfig,
    ExecutorConfig,
    GatewayConfig,
    LogConfig,
    SchedulerConfig,
)
from common.errors import ExecutorRejected, ModelFolderError, PagewireError
from services import failpoints
from services.children import ChildFailed
from services.flags import add_flags, at_least_one, from_flags
from services.typed_request import add_request_flags, chat_of, request_of

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEMO_PROMPT = "Explain in three sentences why a server keeps the keys and values of earlier tokens."

_LINK_TLS = ("link_tls_cert", "link_tls_key", "link_tls_ca")

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 failed, 2 wrong usage, 78 an operator must act."""
    # gRPC's own log is a line for whatever strangers send, in their words; what is ours to know comes as an exception.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show or tell becomes a mark, not a traceback
            stream.reconfigure(errors="replace")
    parser = _parser()
    parsed = parser.parse_args(arguments)
    command: Command = parsed.command
    try:
        return command(parsed)
    except (ModelFolderError, ExecutorRejected) as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_CONFIG
    except PagewireError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, ChildFailed) and error.code == os.EX_CONFIG else 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130


# ---- servers


def _serve(parsed: argparse.Namespace) -> int:
    from services import lifecycle
    from services.model_store import resolve
    from services.serve import serve

    logs = _configure_log("serve", parsed)
    scheduler = from_flags(SchedulerConfig, parsed)
    executor = _executor_config(parsed)
    gateway = from_flags(GatewayConfig, parsed)
    model = resolve(scheduler.model)

    async def run() -> None:
        await serve(
            scheduler,
            executor,
            num_executors=parsed.executors,
            model=model,
            logs=logs,
            gateway=gateway if gateway.http else None,
            stop=lifecycle.stop_event(),
            on_ready=lambda running: print(_invitation(running, scheduler, gateway), flush=True),
        )

    _run(run())
    return 0


def _scheduler(parsed: argparse.Namespace) -> int:
    from services import scheduler_process
    from services.model_store import resolve

    logs = _configure_log("scheduler", parsed)
    _follow_parent(parsed)
    config = from_flags(SchedulerConfig, parsed)
    _run(scheduler_process.run(config, resolve(config.model), parsed.ready_fd, otlp_endpoint=logs.otlp_endpoint))
    return 0


def _executor(parsed: argparse.Namespace) -> int:
    from services.lifecycle import ReadyFile

    ReadyFile(parsed.ready_file)  # before what takes long: one of a process that crashed would speak for this one
    from services import executor_process
    from services.model_store import resolve

    logs = _configure_log(parsed.name or "executor", parsed)
    _follow_parent(parsed)
    config = _executor_config(parsed)
    draft_model = resolve(config.draft_model) if config.speculate == "draft" and config.draft_model else None
    started = executor_process.run(
        config,
        resolve(config.model),
        parsed.ready_fd,
        draft_model=draft_model,
        otlp_endpoint=logs.otlp_endpoint,
    )
    _run(started)
    return 0


def _gateway(parsed: argparse.Namespace) -> int:
    from services.gateway import process
    from services.tls import channel_files

    logs = _configure_log("gateway", parsed)
    _follow_parent(parsed)
    files = channel_files(parsed.client_cert, parsed.client_key, parsed.tls_ca, flags="--client", ca_flag="--tls-ca")
    addresses = [part.strip() for part in parsed.address.split(",")]
    config = from_flags(GatewayConfig, parsed)
    started = process.run(
        config,
        addresses,
        files,
        insecure=parsed.insecure,
        ready_fd=parsed.ready_fd,
        otlp_endpoint=logs.otlp_endpoint,
    )
    _run(started)
    return 0


# ---- clients


def _generate(parsed: argparse.Namespace) -> int:
    from services import talk

    _run(talk.generate(_server(parsed), request_of(parsed), stats=parsed.stats))
    return 0


def _chat(parsed: argparse.Namespace) -> int:
    from services import talk

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()
    server, asked = _server(parsed), chat_of(parsed)
    talk.chat(server, asked.sampling, asked.stopping, asked.chat.messages)
    return 0


def _health(parsed: argparse.Namespace) -> int:
    from services.client import connect

    async def run() -> bool:
        # everybody may ask for health: no key is shown
        async with connect(replace(_server(parsed), api_key="")) as client:
            return await client.is_serving()

    serving = _run(run())
    print("SERVING" if serving else "NOT_SERVING: no executor is connected, or the scheduler drains")
    return 0 if serving else 1


def _status(parsed: argparse.Namespace) -> int:
    from services import client
    from services.admin import find_admin
    from services.monitoring import lines

    print("\n".join(lines(_run(client.status(find_admin(parsed.address))))))
    return 0


def _top(parsed: argparse.Namespace) -> int:
    from services import top
    from services.admin import find_admin

    if not 0.1 <= parsed.interval_s <= 10:  # what the scheduler allows
        raise PagewireError(f"--interval-s: must be in [0.1, 10], got {parsed.interval_s:g}")
    _run(top.top(find_admin(parsed.address), interval_ms=round(1000 * parsed.interval_s), most=parsed.pictures))
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    from services import client
    from services.admin import find_admin
    from services.explain import lines

    print("\n".join(lines(_run(client.explain(find_admin(parsed.address), parsed.request_id, parsed.tenant)))))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from protos import inference_pb2 as pb
    from services import talk
    from services.client import Server, connect
    from services.model_store import resolve
    from services.serve import cluster

    logs = LogConfig(log_level="warning")
    log.configure("demo", level=logs.log_level, fmt=logs.log_format)
    model = resolve(parsed.model)

    async def run() -> None:
        print("Starting a scheduler and an executor, each in a process of its own …", flush=True)
        async with cluster(
            SchedulerConfig(listen="127.0.0.1:0"), ExecutorConfig(), num_executors=1, model=model, logs=logs
        ) as running:
            print(f"Scheduler: {running.address} (process {running.scheduler.pid}). ", end="")
            print(f"Executor: process {running.executors[0].pid}.\n\n> {parsed.prompt}\n", flush=True)
            request = pb.GenerateStreamRequest(
                chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=parsed.prompt)]),
                sampling=pb.SamplingParams(temperature=0.0),
                stopping=pb.StopConditions(max_tokens=parsed.max_tokens),
            )
            async with connect(Server(address=running.address)) as client:
                told = await talk.tell(client, request)
            print(f"\n\n{told.summary()}", flush=True)

    _run(run())
    return 0


# ---- an operator's work


def _api_key(parsed: argparse.Namespace) -> int:
    from services.api_keys import line_of, new_key

    key = new_key()
    line = line_of(parsed.tenant, key, weight=parsed.weight)
    print(f"The API key of {parsed.tenant}, shown this once:\n\n  {key}\n", file=sys.stderr)
    if sys.stdout.isatty():
        print("The line for the file that the scheduler's --api-keys names:\n", file=sys.stderr)
    print(line)
    return 0


def _pull(parsed: argparse.Namespace) -> int:
    from services.model_store import pull

    log.configure("pull")
    print(pull(parsed.model))
    return 0


def _key(parsed: argparse.Namespace) -> int:
    from services import ticket_keys

    if parsed.file is None:
        print(ticket_keys.line_of(ticket_keys.new_key()), end="")
    else:
        key = ticket_keys.rotate(parsed.file)
        print(f"{parsed.file}: {key.id} signs from the next start on; the key before it is still accepted")
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from services import doctor

    return 0 if doctor.report(doctor.examine(parsed.model, parsed.listen)) else 1


# ---- the parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pagewire", description="A server for large language models, in two halves.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = _add(commands, "serve", _serve, "start a scheduler and local executors; stays up")
    serve.add_argument("--executors", type=at_least_one, default=1, help="local executors (default: 1)")
    add_flags(serve, SchedulerConfig)
    _add_executor_flags(serve, but=("model", "scheduler", "name", "ready_file", "drain_s", *_LINK_TLS))
    add_flags(serve, GatewayConfig)
    add_flags(serve, LogConfig)

    scheduler = _add(commands, "scheduler", _scheduler, "start a scheduler; executors dial in")
    add_flags(scheduler, SchedulerConfig)
    add_flags(scheduler, LogConfig)
    _add_child_flags(scheduler)

    executor = _add(commands, "executor", _executor, "start an executor; it dials the scheduler")
    add_flags(executor, ExecutorConfig)
    add_flags(executor, LogConfig)
    _add_child_flags(executor)

    gateway = _add(commands, "gateway", _gateway, "start a gateway for OpenAI's clients; it asks the schedulers")
    gateway.add_argument("--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT,…", help="the schedulers")
    gateway.add_argument("--tls-ca", default="", help="authorities, PEM, for their certificates, or `system`")
    gateway.add_argument("--client-cert", default="", help="certificate that they are shown, PEM")
    gateway.add_argument("--client-key", default="", help="its private key, PEM")
    gateway.add_argument(
        "--insecure", action="store_true", help="no TLS and no keys, also where other machines are in between"
    )
    add_flags(gateway, GatewayConfig)
    add_flags(gateway, LogConfig)
    _add_child_flags(gateway)

    generate = _add(commands, "generate", _generate, "stream one answer")
    generate.add_argument("prompt", help="what to answer")
    generate.add_argument("--raw", action="store_true", help="send the text as it is, without the chat template")
    generate.add_argument("--tools", type=Path, metavar="FILE", help="functions that it may call: a JSON array of them")
    generate.add_argument("--tool-choice", metavar="CHOICE", help="auto, none, required, or the name of a function")
    generate.add_argument("--max-drafts", type=int, default=None, help="tokens guessed ahead in one step; 0 is none")
    generate.add_argument("--no-stats", dest="stats", action="store_false", help="print the answer alone")
    _add_client_flags(generate)

    chat = _add(commands, "chat", _chat, "talk; Ctrl-C stops an answer")
    chat.add_argument("--system", default="", help="a system message")
    _add_client_flags(chat)

    health = _add(commands, "health", _health, "exit 0 when the server can answer requests")
    health.add_argument("address", nargs="?", default=DEFAULT_ADDRESS, metavar="HOST:PORT")
    _add_access_flags(health)

    status = _add(commands, "status", _status, "what the server did, and how busy its executors are")
    status.add_argument(
        "address",
        nargs="?",
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help="where it serves clients, on this machine; or unix:PATH, its --admin-listen",
    )

    top = _add(commands, "top", _top, "what the server does now: blocks, rows, queues; q quits")
    top.add_argument(
        "address",
        nargs="?",
        default=DEFAULT_ADDRESS,
        metavar="ADMIN",
        help="unix:PATH, its --admin-listen; or where it serves clients, on this machine",
    )
    top.add_argument("--interval-s", type=float, default=0.5, help="between two pictures: 0.1 to 10 (default: 0.5)")
    top.add_argument(
        "--pictures", type=at_least_one, default=0, help="end after so many (default: 0, when q is pressed)"
    )
    explain = _add(commands, "explain", _explain, "what happened to one request: its timeline")
    explain.add_argument("address", metavar="HOST:PORT", help="as for status")
    explain.add_argument("request_id", metavar="REQUEST_ID", help="as its caller chose it, or was told")
    explain.add_argument("--tenant", default=None, help="of this tenant alone (default: the last of any)")

    pull = _add(commands, "pull", _pull, "fetch a model, convert it once, print its folder")
    pull.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="smollm2, a .gguf file or a repository id")

    demo = _add(commands, "demo", _demo, "start everything, stream one answer, stop everything")
    demo.add_argument("prompt", nargs="?", default=DEMO_PROMPT)
    demo.add_argument("--model", default=DEFAULT_MODEL)
    demo.add_argument("--max-tokens", type=at_least_one, default=96)

    api_key = _add(commands, "api-key", _api_key, "make an API key; its line for the scheduler's file goes to stdout")
    api_key.add_argument("tenant", help="whose key it is")
    api_key.add_argument("--weight", type=float, default=1.0, help="the tenant's share among tenants (default: 1)")
    key = _add(commands, "key", _key, "make a key for tickets, with which streams are resumed")
    key.add_argument("file", nargs="?", type=Path, help="put it first in this file (default: print it)")

    doctor = _add(commands, "doctor", _doctor, "look at this machine and say what is missing")
    doctor.add_argument("--model", default=DEFAULT_MODEL)
    doctor.add_argument("--listen", default=DEFAULT_ADDRESS)
    return parser


def _add(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.set_defaults(command=command)
    return parser


def _add_executor_flags(parser: argparse.ArgumentParser, but: Sequence[str]) -> None:
    """The executors' flags beside the scheduler's; those both have are given once."""
    alone = argparse.ArgumentParser(add_help=False)
    add_flags(alone, ExecutorConfig)
    for action in alone._actions:  # argparse has no public way to copy a flag
        if action.dest not in but:
            parser._add_action(action)


def _add_child_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ready-fd", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--die-with-parent", type=int, default=None, help=argparse.SUPPRESS)


def _add_client_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="the scheduler")
    _add_access_flags(parser)
    add_request_flags(parser)


def _add_access_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ClientConfig)
    # typed each time: the variable that its name would make is the scheduler's, and means other addresses
    parser.add_argument("--insecure", action="store_true", help="send the API key to another machine without TLS")


# ---- unpacking


def _executor_config(parsed: argparse.Namespace) -> ExecutorConfig:
    known = {name: getattr(parsed, name) for name in ExecutorConfig.__dataclass_fields__ if hasattr(parsed, name)}
    return ExecutorConfig(**known)


def _server(parsed: argparse.Namespace) -> Any:
    from pagewire.access import API_KEY
    from services.client import Server
    from services.tls import channel_files

    config = from_flags(ClientConfig, parsed)
    key = os.environ.get(API_KEY, "").strip()
    if config.api_key_file:
        try:
            key = Path(config.api_key_file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not a text file"
            raise PagewireError(f"--api-key-file {config.api_key_file}: {why}") from error
    files = channel_files(config.client_cert, config.client_key, config.tls_ca, flags="--client", ca_flag="--tls-ca")
    return Server(address=parsed.address, api_key=key, tls=files, insecure=parsed.insecure)


def _configure_log(process: str, parsed: argparse.Namespace) -> LogConfig:
    logs = from_flags(LogConfig, parsed)
    log.configure(process, level=logs.log_level, fmt=logs.log_format)
    failpoints.arm()
    return logs


def _follow_parent(parsed: argparse.Namespace) -> None:
    if parsed.die_with_parent is not None:
        from services.lifecycle import die_with_parent

        die_with_parent(parsed.die_with_parent)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    import uvloop

    from services.event_loop import EventLoop

    return uvloop.run(work, loop_factory=EventLoop)


def _invitation(running: Any, config: SchedulerConfig, gateway: GatewayConfig) -> str:
    from services.lifecycle import is_local

    address = running.address
    body = '{"chat": {"messages": [{"role": "user", "content": "Hello!"}]}, "stopping": {"max_tokens": 64}}'
    trust = " --tls-ca AUTHORITIES" if config.tls_cert else ""
    key = " --api-key-file FILE" if config.api_keys else ""
    first = f"Serving on {address}. Try:\n  {_as_typed('pagewire')} generate --address {address}{trust}{key} 'Hello!'"
    if running.http:
        scheme = "https" if gateway.http_tls_cert else "http"
        first += f"\nFor OpenAI's clients: base_url={scheme}://{running.http}/v1"
        if gateway.live_view != "none" and (gateway.live_view or is_local(running.http)):
            first += f"\nA live view: {scheme}://{running.http}/"
    if trust or key:
        return first
    return (
        f"{first}\n"
        f"  {_as_typed('buf')} curl --protocol grpc -d '{body}' \\\n"
        f"    http://{address}/pagewire.v1.InferenceService/GenerateStream"
    )


def _as_typed(program: str) -> str:
    """How a person starts a program of this environment from here: .venv/bin/pagewire, where it is not on the path."""
    beside = Path(sys.executable).with_name(program)
    if shutil.which(program) or not beside.exists():
        return program
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


if __name__ == "__main__":
    sys.exit(main())
