"""What the README says is what the sources say."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from common.config import ClientConfig, ExecutorConfig, GatewayConfig, SchedulerConfig
from common.sampling import RequestLimits, SamplingParams
from common.step import MAX_DRAFTS
from protos import inference_pb2 as pb
from scheduler.pins import PinLimits
from services.open_inference.words import AT_ONCE, INPUTS, MAX_ELEMENTS, MOST_NAMED, OUTPUTS
from services.tools.values import MAX_DEPTH, NAME_RULE
from services.vllm_api.kv_events import MAX_CHANGES
from services.vllm_api.service import VllmEngine
from tests.executor.tiny_models import TINY

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """The text under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(title: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head."""
    rows = [line.strip("|").split("|") for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_architecture_that_is_tested_is_named_once_and_no_other() -> None:
    named = [kind for row in cells("Models") for kind in re.findall(r"`(\w+)`", row[1])]

    assert sorted(named) == sorted(TINY)


def test_the_limits_are_the_defaults() -> None:
    limit = {row[0].strip("`"): row[1] for row in cells("Limits")}
    scheduler = SchedulerConfig()

    assert limit["n"] == f"{scheduler.max_choices}"
    assert limit["texts of one request for [embeddings](#embeddings)"] == f"{scheduler.max_embedding_inputs}"
    assert limit["their vectors together"] == f"{scheduler.max_embedding_bytes >> 20} MiB, 4 bytes a number"
    pinned = (
        f"tokens of prompts that one tenant has [pinned](#the-prefix-cache); {PinLimits().max_pins_per_tenant} pins"
    )
    assert limit[pinned] == f"{scheduler.max_pinned_tokens_per_tenant}" == f"{PinLimits().max_tokens_per_tenant}"
    assert scheduler.max_pinned_share == PinLimits().max_share == 0.25
    assert limit["one message"] == f"{scheduler.max_message_bytes >> 20} MiB"
    assert limit["sequences that wait"] == f"{scheduler.max_waiting}"
    assert limit["tokens that wait, prompts and expected answers"] == f"{scheduler.max_waiting_tokens}"
    assert limit["one request, from arrival to end"] == f"{scheduler.max_request_s:g} s"
    assert limit["wait while no executor is there"] == f"{scheduler.executor_wait_s:g} s"
    assert limit["a message that its reader does not take"] == f"{scheduler.reader_timeout_s:g} s"
    assert limit["calls that are open, reflection's too"] == f"{scheduler.max_streams}"
    behind = "tokens of a choice in one message, for a reader that fell behind"
    assert limit[behind] == f"{scheduler.max_chunk_tokens}"
    watches = "Watch` calls for health; of one host, as many as are still free"
    assert limit[watches] == f"{scheduler.max_health_watches}"
    assert f"{scheduler.drain_s:g} s (`--drain-s`)" in section("Restarts that nobody notices")


def test_every_control_stands_in_the_table_with_its_limit_and_its_default() -> None:
    request = RequestLimits()
    table = {row[0].strip("`"): row[1:] for row in cells("What a request may ask for")}
    limit = {name: row[0] for name, row in table.items()}
    penalty = f"[{-request.max_penalty:g}, {request.max_penalty:g}]"

    assert limit["temperature"] == f"[0, {request.max_temperature:g}]"
    assert limit["logit_bias"] == (
        f"{request.max_logit_biases} tokens, [{-request.max_logit_bias:g}, {request.max_logit_bias:g}]"
    )
    assert limit["repetition_penalty"] == f"[{request.min_repetition_penalty:g}, {request.max_repetition_penalty:g}]"
    assert (limit["presence_penalty"], limit["frequency_penalty"]) == (penalty, penalty)
    assert limit["bad_words"] == f"{request.max_bad_words} strings of 1 to {request.max_bad_word_bytes} bytes"
    assert limit["stop"] == f"{request.max_stop_strings} strings of 1 to {request.max_stop_string_bytes} bytes"
    assert limit["stop_token_ids"] == f"{request.max_stop_token_ids}"
    assert limit["logprobs"] == limit["prompt_logprobs"] == f"{request.max_logprobs}"
    assert limit["banned_token_ids"] == limit["allowed_token_ids"] == f"{request.max_listed_token_ids}"
    assert limit["max_drafts"] == f"[0, {MAX_DRAFTS}]"

    kibibytes = f"{request.max_structured_bytes >> 10} KiB"
    assert limit["json_schema"] == f"{kibibytes} (`--max-grammar-bytes`)"
    assert limit["regex"] == limit["grammar"] == kibibytes
    assert limit["choices"] == f"{request.max_structured_choices} strings, {kibibytes} together"

    assert limit["best_of"] == f"[`n`, {request.max_choices}] (`--max-choices`)"
    assert limit["cache_salt"] == f"{request.max_cache_salt_bytes} bytes"
    assert limit["pin_seconds"] == f"[1, {request.max_pin_seconds}] (`--max-pin-seconds`)"
    assert request.max_pin_seconds == SchedulerConfig().max_pin_seconds

    fields_of = (
        pb.SamplingParams.DESCRIPTOR,
        pb.StructuredOutput.DESCRIPTOR,
        pb.StopConditions.DESCRIPTOR,
        pb.CacheControl.DESCRIPTOR,
    )
    named = {name for message in fields_of for name in message.fields_by_name} - {"n", "max_tokens", "structured"}
    named.add("max_drafts")
    assert set(table) == named, "every field of the API, and no other"
    given = SamplingParams()
    for name, row in table.items():
        if row[1] not in ("", "drawn", "false") and hasattr(given, name):
            assert f"{getattr(given, name):g}" == row[1], name


def test_every_field_of_tools_stands_in_its_table_with_its_limit() -> None:
    request = RequestLimits()
    limit = {row[0].strip("`"): row[1] for row in cells("Tools")}

    assert limit["tools"] == f"{request.max_tools}, {request.max_tools_bytes >> 10} KiB together"
    schema = limit["a schema; a call's arguments in a message"]
    assert schema == f"{request.max_structured_bytes >> 10} KiB (`--max-grammar-bytes`), {MAX_DEPTH} deep"
    assert NAME_RULE.removeprefix("must be ") == limit["a name"]
    assert set(limit) >= set(pb.ChatMessages.DESCRIPTOR.fields_by_name) - {"messages"}


def test_every_flag_and_target_that_is_named_exists() -> None:
    configs = (SchedulerConfig, ExecutorConfig, ClientConfig, GatewayConfig)
    settings = {field.name for config in configs for field in fields(config)}
    flags = {
        flag.replace("-", "_")
        for part in (
            "Limits",
            "What a request may ask for",
            "Tools",
            "OpenAI's clients",
            "Triton's clients",
            "Keys, TLS and tenants",
            "Restarts that nobody notices",
            "Not there yet",
        )
        for flag in re.findall(r"--([a-z]+[a-z-]*)", section(part))
        if flag not in ("address", "tools")  # of `pagewire generate`
    }
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    assert flags and flags <= settings
    assert set(re.findall(r"\bmake ([a-z-]+)\b", README)) <= targets


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)

    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_limits_of_the_gateway_are_the_defaults() -> None:
    gateway = GatewayConfig()
    limit = {row[0]: row[1] for row in cells("OpenAI's clients") if len(row) == 4}

    assert limit["body of a request"] == f"{gateway.http_max_body_bytes} bytes, within {gateway.http_body_s:g} s"
    assert limit["bodies that are being read"] == f"{gateway.http_max_bodies_bytes} bytes"
    most = gateway.http_max_scores_bytes
    assert limit["log-probabilities that are not told yet"] == f"{most} bytes; of one answer {most // 2}"
    assert limit["head of a request"] == f"{gateway.http_max_head_bytes} bytes, within {gateway.http_head_s:g} s"
    assert limit["connections"] == f"{gateway.http_max_connections}"
    assert limit["time between two requests of a connection"] == f"{gateway.http_idle_s:g} s"
    assert limit["requests that are open"] == f"{gateway.http_max_requests}"
    assert limit["prompts of one request"] == f"{gateway.http_max_prompts}"
    assert limit["reader of an answer who takes nothing"] == f"{gateway.http_reader_timeout_s:g} s"
    assert limit["until a scheduler is there"] == f"{gateway.http_begin_patience_s:g} s"
    assert limit["the same, in the middle of a stream"] == f"{gateway.http_patience_s:g} s"
    assert limit["requests that run after SIGTERM"] == f"{gateway.http_drain_s:g} s"
    assert f"silent for {gateway.http_comment_s:g} s" in section("OpenAI's clients")


def test_every_method_that_smg_may_call_is_named_and_every_limit_there_is_the_one_in_use() -> None:
    served = {name for name in vars(VllmEngine) if name[0].isupper()}
    table = {row[0]: row[1] for row in cells("SMG")}
    named = {method for methods in table for method in re.findall(r"`(\w+)`", methods)}

    assert named == served
    assert f"up to {RequestLimits().max_logprobs}," in table["`Generate`"]
    assert f"falls {MAX_CHANGES} changes behind" in table["`SubscribeKvEvents`"]
    assert f"{SchedulerConfig().max_kv_streams} streams (" in table["`SubscribeKvEvents`"]


def test_every_word_of_the_open_inference_protocol_is_named_with_its_limits() -> None:
    told = section("Triton's clients")
    limit = {row[0]: row[1] for row in cells("Triton's clients") if len(row) == 4}

    named = {*INPUTS, *OUTPUTS, "priority", "timeout"}
    assert {word for word in named if f"`{word}`" not in told} == set()
    scheduler = SchedulerConfig()
    assert limit["a stream in which nothing is asked or answered"] == f"{scheduler.open_inference_idle_s:g} s"
    assert limit["such streams"] == f"{scheduler.max_streams}"
    assert limit["requests of one stream that are looked after at once"] == f"{AT_ONCE}"
    most = f"{MOST_NAMED}; {MOST_NAMED}; {MAX_ELEMENTS}"
    assert limit["tensors; parameters; elements of a tensor"] == most
