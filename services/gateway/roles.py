"""Who speaks in a chat: OpenAI's roles, and what came of calls only behind these. A model's template may know others.

So they are asked for over gRPC, or where a gateway lets pass what is not known.
"""

from __future__ import annotations

from typing import Final

from common.errors import InvalidRequest
from protos import inference_pb2 as pb
from services.gateway.fields import shown_word

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")


def check_roles(chat: pb.ChatMessages) -> None:
    """Raise InvalidRequest for the first message, by the scheduler's name of it, of a role that is none of these.

    Also for a result whose call is not before it: the model would read what came of something that it never asked for.
    """
    called: set[str] = set()
    for i, message in enumerate(chat.messages):
        path = f"chat.messages[{i}]"
        if message.role not in ROLES:
            raise InvalidRequest(f"{path}.role", f"must be one of {', '.join(ROLES)}, got {shown_word(message.role)}")
        called.update(call.id for call in message.tool_calls)
        if message.role == "tool" and message.tool_call_id not in called:
            raise InvalidRequest(f"{path}.tool_call_id", "is the id of no call in a message before this one")
