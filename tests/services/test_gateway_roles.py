"""Who may speak in a chat over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway.app import UnknownFields
from services.gateway.roles import ROLES
from tests.services.gateway_calls import CHAT, Scheduler, ask, finish, gateway

RESPONSES = "/v1/responses"
USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALL: dict[str, Any] = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "a", "content": "noon"}
CALL_ITEM: dict[str, Any] = {"type": "function_call", "call_id": "a", "name": "clock", "arguments": "{}"}
RESULT_ITEM: dict[str, Any] = {"type": "function_call_output", "call_id": "a", "output": "noon"}


def asked(path: str, messages: list[Any], unknown_fields: UnknownFields = "refuse") -> tuple[int, str | None]:
    name = "input" if path == RESPONSES else "messages"
    call = ask(gateway(Scheduler(finish()), unknown_fields=unknown_fields), {name: messages}, path=path)
    return call.status, call.json["error"]["param"] if call.status != 200 else None


@pytest.mark.parametrize("role", ["banana", "", "User"])
def test_a_role_that_is_none_of_openais_is_refused(role: str) -> None:
    messages = [USER, {**USER, "role": role}]

    assert asked(CHAT, messages) == (400, "messages[1].role")
    assert asked(RESPONSES, messages) == (400, "input[1].role")


@pytest.mark.parametrize("role", [role for role in ROLES if role != "tool"])
def test_each_of_openais_is_taken(role: str) -> None:
    assert asked(CHAT, [{**USER, "role": role}]) == (200, None)


@pytest.mark.parametrize("before", [[USER], [USER, {**CALLS, "tool_calls": [{**CALL, "id": "b"}]}]])
def test_a_result_is_taken_behind_its_call_alone(before: list[Any]) -> None:
    assert asked(CHAT, [USER, CALLS, RESULT, USER, RESULT]) == (200, None)
    assert asked(CHAT, [*before, RESULT, CALLS]) == (400, f"messages[{len(before)}].tool_call_id")


def test_so_it_is_in_a_response() -> None:
    assert asked(RESPONSES, [USER, CALL_ITEM, RESULT_ITEM]) == (200, None)
    assert asked(RESPONSES, [USER, RESULT_ITEM, CALL_ITEM]) == (400, "input[1].call_id")


def test_where_what_is_not_known_is_let_pass_a_template_may_know_any_role() -> None:
    assert asked(CHAT, [{**USER, "role": "banana"}, RESULT], "ignore") == (200, None)
