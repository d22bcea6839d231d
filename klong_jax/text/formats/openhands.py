"""OpenHands event histories: {"history": [actions and observations]} a JSONL line.

An action that the model called carries the model's own response, which becomes the assistant
message; several actions of one response are one message. Older histories (and the resolver's)
carry only the action: its thought becomes the content and the action itself the call. An
observation answers the call it names; one that answers no call is a user message, as OpenHands
shows it to the model.
"""

from collections import Counter
from typing import Any

from klong_jax.core.message import Message, ToolCall
from klong_jax.text.formats.base import Format, Record, Recording, need, objects, reject
from klong_jax.text.formats.openai import read_message

# Events that the model never sees; they are counted in meta["internal_events"].
_INTERNAL = {"recall", "null", "change_agent_state", "condensation", "condensation_request"}
# Fields of an action that are OpenHands' bookkeeping and were never part of a call.
_BOOKKEEPING = {
    "action", "action_risk", "args", "blocking", "cause", "confirmation_state", "hidden", "id",
    "is_confirmed", "keep_prompt", "kernel_init_code", "llm_metrics", "message", "security_risk",
    "source", "thought", "timestamp", "tool_call_metadata",
}  # fmt: skip
_META = ("error", "success", "test_result", "git_patch", "issue", "result_explanation", "metrics")


def _matches(value: Any) -> bool:
    events = value.get("history") if isinstance(value, dict) else value
    return isinstance(events, list) and any(
        isinstance(event, dict) and ("action" in event or "observation" in event)
        and "role" not in event
        for event in events[:1]
    )  # fmt: skip


def _read(record: Record) -> Recording:
    value = {"history": record.value} if isinstance(record.value, list) else record.value
    place = record.place
    messages: list[Message] = []
    responses: set[str] = set()
    internal: Counter[str] = Counter()
    meta = {key: value[key] for key in _META if key in value}
    for where, event in objects(value, "history", place):
        kind = event.get("action") or event.get("observation")
        if "observation" in event and kind != "agent_state_changed":
            messages.append(_observation(event, bool(messages and _called(messages)), where))
        elif kind in _INTERNAL or kind == "agent_state_changed":
            internal[str(kind)] += 1
        elif "action" in event:
            response = _response_id(event)
            if response and response in responses:
                continue
            responses.add(response)
            messages.append(_action(event, where))
            meta |= {"tools": event["args"]["tools"]} if _offers_tools(event) else {}
        else:
            reject(where, "is neither an action nor an observation")
    if internal:
        meta["internal_events"] = dict(internal)
    return Recording(place, _name(value, record.name), tuple(messages), meta=meta)


def _name(value: dict[str, Any], default: str) -> str:
    issue = value.get("issue")
    if isinstance(issue, dict) and {"owner", "repo", "number"} <= issue.keys():
        return f"{issue['owner']}/{issue['repo']}#{issue['number']}"
    return str(value.get("instance_id") or default)


def _called(messages: list[Message]) -> bool:
    """Whether the last call is still unanswered, for histories that name no calls."""
    return bool(messages[-1].tool_calls)


def _offers_tools(event: dict[str, Any]) -> bool:
    return event["action"] == "system" and bool((event.get("args") or {}).get("tools"))


def _response_id(event: dict[str, Any]) -> str:
    response = (event.get("tool_call_metadata") or {}).get("model_response") or {}
    return str(response.get("id") or "")


def _action(event: dict[str, Any], place: str) -> Message:
    metadata = event.get("tool_call_metadata")
    if metadata:
        response = need(metadata, "model_response", dict, f"{place}: tool_call_metadata")
        where = f"{place}: tool_call_metadata.model_response"
        for at, choice in objects(response, "choices", where):
            return read_message(need(choice, "message", dict, at), f"{at}: message")
        reject(where, "field 'choices' is empty")
    # The newer events keep an action's fields under args, the older ones beside it.
    fields = need(event, "args", dict, place) if "args" in event else event
    kind = need(event, "action", str, place)
    if kind in ("system", "message"):
        return Message(_speaker(kind, event, fields), need(fields, "content", str, place))
    if event.get("source") == "user":
        reject(place, f"action {kind!r} was taken by the user, which no chat message can say")
    arguments = {k: v for k, v in fields.items() if k not in _BOOKKEEPING and v is not None}
    thought = fields.get("thought") or ""
    return Message("assistant", thought, tool_calls=(ToolCall(kind, arguments),))


def _speaker(kind: str, event: dict[str, Any], fields: dict[str, Any]) -> Any:
    if kind == "system":
        return "system"
    # Without a source, it is the agent who waits for a response to its message.
    source = event.get("source") or ("agent" if fields.get("wait_for_response") else "user")
    return "assistant" if source == "agent" else "user"


def _observation(event: dict[str, Any], answers: bool, place: str) -> Message:
    content = need(event, "content", str, place)
    extras = event.get("extras") or {}
    shell = extras.get("metadata") or {}
    if isinstance(shell, dict):
        content = f"{shell.get('prefix') or ''}{content}{shell.get('suffix') or ''}"
    if event["observation"] == "recall":
        content = "\n\n".join([content, *_recalled(extras)])
    metadata = event.get("tool_call_metadata")
    if metadata:
        call_id = need(metadata, "tool_call_id", str, f"{place}: tool_call_metadata")
        return Message("tool", content, tool_call_id=call_id)
    # Newer events name their cause; an error that has none is the environment speaking up.
    caused = "source" not in event or event.get("cause") is not None
    return Message("tool" if answers and caused else "user", content)


def _recalled(extras: dict[str, Any]) -> list[str]:
    """The knowledge that a recall put before the model."""
    texts = [extras.get("repo_instructions"), extras.get("additional_agent_instructions")]
    texts += [item.get("content") for item in extras.get("microagent_knowledge") or []]
    return [text for text in texts if text]


OPENHANDS = Format("openhands", _matches, _read)
