"""The formats of logs, each as data: how a line of it is known, and what it says of a call.

    capture        what `tokenmill serve` captured            exchange     {"request": ..., "response": ...}
    flywheel       records of NVIDIA's Data Flywheel          litellm      LiteLLM's logs and spend logs
    openai-batch   inputs and outputs, joined by custom_id    openai-eval  output items, events, samples
    openai-chat    {"messages": [...]}, as for fine-tuning    sharegpt     {"conversations": [...]}
    pairs          flat fields such as prompt and answer, as a row of a CSV file has them

A line may say only a part of a call; parts with the same `key` are put together by who reads them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from tokenmill.workload.messages import (
    DraftError,
    answer_of_message,
    answer_of_response,
    clean_request,
)

__all__ = ["COLUMNS", "FORMATS", "Columns", "Draft", "Format", "pairs_format"]

Columns: TypeAlias = Mapping[str, str]
"""Which column has what: keys of `COLUMNS`, values the names in the file."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a line says of one call; None and "" are what it does not say."""

    key: str = ""
    own_id: str = ""
    request: Mapping[str, Any] | None = None
    answer: str | None = None
    reference: str | None = None
    slice: str = ""
    created: float | None = None
    conversation: str = ""
    num_input_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None
    origin: str = ""
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A format: `matches` knows its lines, `drafts` reads one and raises DraftError for a wrong one."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    drafts: Callable[[Mapping[str, Any]], Sequence[Draft]] = field(repr=False)


COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "prompt": ("prompt", "input", "question", "instruction", "query", "user", "text", "utterance", "request"),
    "answer": (
        "answer",
        "completion",
        "output",
        "response",
        "assistant",
        "label",
        "category",
        "intent",
        "sql",
    ),
    "reference": ("reference", "expected", "ideal", "gold", "ground_truth"),
    "system": ("system", "system_prompt"),
    "slice": ("slice", "feature", "workload_id", "task"),
    "created": ("created", "created_at", "timestamp", "time", "date"),
    "conversation": ("conversation", "conversation_id", "session_id", "user_id", "client_id"),
    "id": ("id", "request_id", "call_id"),
    "input_tokens": ("input_tokens", "prompt_tokens"),
    "output_tokens": ("output_tokens", "completion_tokens"),
    "model": ("model",),
    "terms": ("terms", "license", "licence"),
}
"""What a flat row may have, and the names by which it is found if nobody says which column it is."""


def _of_exchange(
    line: Mapping[str, Any], *, request: object, response: object, created: object = None, slice: str = ""
) -> Draft:
    """A call from a request and the response of the API, with what stands beside them in the line."""
    body = response if isinstance(response, Mapping) else {}
    asked = request if isinstance(request, Mapping) else {}
    metadata = asked.get("metadata")
    feature = metadata.get("feature") if isinstance(metadata, Mapping) else None
    return Draft(
        own_id=_text(line.get("id") or line.get("request_id") or body.get("id")),
        request=clean_request(request),
        answer=answer_of_response(response),
        reference=_reference(line.get("reference")),
        slice=_text(line.get("slice") or slice or feature),
        created=_time(line.get("created") if created is None else created) or _time(body.get("created")),
        conversation=_text(
            line.get("conversation")
            or line.get("end_user")
            or asked.get("user")
            or asked.get("safety_identifier")
        ),
        origin=_text(body.get("model") or asked.get("model")),
        terms=_terms(line.get("terms")),
        **_usage(body.get("usage")),
    )


def _capture(line: Mapping[str, Any]) -> Sequence[Draft]:
    origin = line.get("origin")
    model = origin.get("model") if isinstance(origin, Mapping) else origin
    draft = _of_exchange(
        line, request=line.get("request"), response=line.get("response"), slice=_text(line.get("feature"))
    )
    return [_replaced(draft, origin=_text(model) or draft.origin)]


def _flywheel(line: Mapping[str, Any]) -> Sequence[Draft]:
    return [
        _of_exchange(
            line,
            request=line.get("request"),
            response=line.get("response"),
            created=line.get("timestamp"),
            slice=_text(line.get("workload_id")),
        )
    ]


def _exchange(line: Mapping[str, Any]) -> Sequence[Draft]:
    return [_of_exchange(line, request=line.get("request"), response=line.get("response"))]


def _batch(line: Mapping[str, Any]) -> Sequence[Draft]:
    key = _text(line.get("custom_id"))
    if not key:
        raise DraftError("has no custom_id")
    if "body" in line:
        url = line.get("url", "/v1/chat/completions")
        if not str(url).endswith("/chat/completions"):
            raise DraftError(f"is for {url}, and only chat completions are read")
        body = line.get("body")
        user = body.get("user") if isinstance(body, Mapping) else None
        return [Draft(key=key, own_id=key, request=clean_request(body), conversation=_text(user))]
    if line.get("error"):
        raise DraftError(f"the call failed ({_said(line['error'])})")
    response = line.get("response")
    if not isinstance(response, Mapping) or response.get("status_code", 200) != 200:
        status = response.get("status_code") if isinstance(response, Mapping) else None
        raise DraftError(f"the call failed (status {status})")
    given = response.get("body")
    body = given if isinstance(given, Mapping) else {}
    return [
        Draft(
            key=key,
            own_id=key,
            answer=answer_of_response(given),
            created=_time(body.get("created")),
            origin=_text(body.get("model")),
            **_usage(body.get("usage")),
        )
    ]


def _eval(line: Mapping[str, Any]) -> Sequence[Draft]:
    """A sample of an eval, an output item of the Evals API, or an event of the recorder."""
    if "spec" in line or "final_report" in line:
        return ()
    if "event_id" in line or "sample_id" in line:
        return _eval_event(line)
    if "datasource_item" in line or isinstance(line.get("sample"), Mapping):
        return [_eval_item(line)]
    ideal = line.get("ideal")
    right = ideal[0] if isinstance(ideal, list) and ideal else ideal
    if not isinstance(right, str) or not right.strip():
        raise DraftError("has no ideal answer")
    return [
        Draft(own_id=_text(line.get("id")), request=_asked(line.get("input")), answer=right, reference=right)
    ]


def _eval_event(line: Mapping[str, Any]) -> Sequence[Draft]:
    key = f"{_text(line.get('run_id'))}/{_text(line.get('sample_id'))}"
    data = line.get("data")
    if not isinstance(data, Mapping):
        raise DraftError("the event has no data")
    if line.get("type") == "sampling":
        sampled = data.get("sampled")
        answer = sampled[0] if isinstance(sampled, list) and sampled else sampled
        return [
            Draft(
                key=key,
                own_id=key,
                request=_asked(data.get("prompt")),
                answer=answer_of_message({"content": answer}),
                created=_time(line.get("created_at")),
            )
        ]
    expected = data.get("expected")
    right = expected[0] if isinstance(expected, list) and expected else expected
    return [Draft(key=key, reference=right)] if isinstance(right, str) else ()


def _eval_item(line: Mapping[str, Any]) -> Draft:
    sample = line.get("sample")
    item = line.get("datasource_item") or line.get("item")
    if not isinstance(sample, Mapping):
        raise DraftError("the item has no sample")
    output = sample.get("output") or sample.get("outputs") or sample.get("choices")
    if isinstance(output, list) and output:
        answer = answer_of_message(
            output[-1].get("message", output[-1]) if isinstance(output[-1], Mapping) else None
        )
    else:
        answer = answer_of_message({"content": sample.get("output_text")})
    fields = item if isinstance(item, Mapping) else {}
    right = next((fields[name] for name in COLUMNS["reference"] if isinstance(fields.get(name), str)), None)
    return Draft(
        own_id=_text(line.get("id")),
        request=_asked(sample.get("input") or fields.get("input") or fields.get("messages")),
        answer=answer,
        reference=right,
        created=_time(line.get("created_at")),
        origin=_text(sample.get("model")),
        **_usage(sample.get("usage")),
    )


def _asked(given: object) -> dict[str, Any]:
    """A request of messages, or of one question."""
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return clean_request({"messages": messages})


def _litellm(line: Mapping[str, Any]) -> Sequence[Draft]:
    status = line.get("status")
    if status not in (None, "success"):
        raise DraftError(f"the call failed ({_said(line.get('error_str') or status)})")
    if "completion" not in str(line.get("call_type", "completion")):
        raise DraftError(f"is a call of the kind {line['call_type']}, and only completions are read")
    sent = _parsed(line.get("proxy_server_request"))
    body = sent.get("body", sent) if isinstance(sent, Mapping) else {}
    parameters = _parsed(line.get("model_parameters")) or body
    messages = _parsed(line.get("messages")) or (body.get("messages") if isinstance(body, Mapping) else None)
    response = _parsed(line.get("response"))
    tags = _parsed(line.get("request_tags"))
    draft = Draft(
        own_id=_text(line.get("id") or line.get("request_id")),
        request=clean_request(parameters if isinstance(parameters, Mapping) else {}, messages),
        answer=answer_of_response(response),
        slice=_text(tags[0]) if isinstance(tags, list) and tags else "",
        created=_time(line.get("startTime")),
        conversation=_text(line.get("end_user") or line.get("session_id")),
        origin=_text(line.get("model")),
        **_usage(response.get("usage") if isinstance(response, Mapping) else None),
    )
    counted = _usage(line)
    return [draft if draft.num_input_tokens is not None else _replaced(draft, **counted)]


def _chat(line: Mapping[str, Any]) -> Sequence[Draft]:
    """The last message is the answer; what stands beside `messages` is a body."""
    messages = line.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DraftError("has no messages")
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise DraftError("the last message is not the assistant's: there is no answer")
    if last.get("weight", 1) == 0:
        raise DraftError("the answer has the weight 0")
    body = {name: line[name] for name in _BODY_FIELDS if name in line}
    return [
        Draft(
            own_id=_text(line.get("id")),
            request=clean_request(body, messages[:-1]),
            answer=answer_of_message(last),
            reference=_reference(line.get("reference")),
            slice=_text(line.get("slice")),
            created=_time(line.get("created")),
            conversation=_text(line.get("conversation") or line.get("user")),
            origin=_text(line.get("model")),
            terms=_terms(line.get("terms")),
            **_usage(line.get("usage")),
        )
    ]


_BODY_FIELDS: Final = (
    "tools",
    "tool_choice",
    "functions",
    "parallel_tool_calls",
    "response_format",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
)
_SPEAKERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
}


def _sharegpt(line: Mapping[str, Any]) -> Sequence[Draft]:
    """Every answer of the assistant is a call, with what was said before."""
    turns = line.get("conversations")
    if not isinstance(turns, list):
        raise DraftError("conversations is no list")
    own_id, said = _text(line.get("id")), []
    if isinstance(line.get("system"), str) and line["system"].strip():
        said.append({"role": "system", "content": line["system"]})
    drafts = []
    for at, turn in enumerate(turns):
        role = _SPEAKERS.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, Mapping) else None
        if role is None:
            raise DraftError(f"conversations[{at}] is from nobody known")
        content = turn.get("value", turn.get("content"))
        if role == "assistant" and any(each["role"] == "user" for each in said):
            key = f"{own_id}#{at}" if own_id else ""
            answer = answer_of_message({"content": content})
            request = clean_request({"messages": said})
            drafts.append(Draft(own_id=key, request=request, answer=answer, conversation=own_id))
        said.append({"role": role, "content": content})
    if not drafts:
        raise DraftError("nobody asks and is answered in it")
    return drafts


def pairs_format(columns: Columns, given: Sequence[str]) -> Format | None:
    """Flat rows with these fields; `columns` names those that are not found by their usual names.

    None if no field has a question, or none an answer.
    """
    found = dict(columns)
    for what, names in COLUMNS.items():
        if what not in found:
            lowered = {each.lower(): each for each in reversed(given) if each not in found.values()}
            name = next((lowered[each] for each in names if each in lowered), "")
            if name:
                found[what] = name
    if "answer" not in found and "reference" in found:
        found["answer"] = found["reference"]
    if "prompt" not in found or "answer" not in found:
        return None
    question, answer = found["prompt"], found["answer"]
    return Format("pairs", lambda line: question in line and answer in line, lambda line: _pair(line, found))


def _pair(line: Mapping[str, Any], columns: Columns) -> Sequence[Draft]:
    def cell(what: str) -> Any:
        return line.get(columns.get(what, ""))

    question, context = cell("prompt"), line.get("input") if columns["prompt"] == "instruction" else None
    if not isinstance(question, str) or not question.strip():
        raise DraftError(f"{columns['prompt']} is empty")
    text = f"{question}\n\n{context}" if isinstance(context, str) and context.strip() else question
    system = cell("system")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    messages.append({"role": "user", "content": text})
    answer = cell("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise DraftError(f"{columns['answer']} is empty")
    usage = {
        "prompt_tokens": _whole(cell("input_tokens")),
        "completion_tokens": _whole(cell("output_tokens")),
    }
    return [
        Draft(
            own_id=_text(cell("id")),
            request=clean_request({"messages": messages}),
            answer=answer,
            reference=_reference(cell("reference")),
            slice=_text(cell("slice")),
            created=_time(cell("created")),
            conversation=_text(cell("conversation")),
            origin=_text(cell("model")),
            terms=_terms(cell("terms")),
            **_usage(usage),
        )
    ]


def _replaced(draft: Draft, **changes: Any) -> Draft:
    return Draft(**{**draft.__dict__, **changes})


def _usage(usage: object) -> dict[str, Any]:
    if not isinstance(usage, Mapping):
        return {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return {
        "num_input_tokens": _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        "num_cached_tokens": _count(cached),
        "num_output_tokens": _count(usage.get("completion_tokens", usage.get("output_tokens"))),
    }


def _count(value: object) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_count and isinstance(value, int) else None


def _whole(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def _time(value: object) -> float | None:
    """Unix seconds from seconds, milliseconds or an ISO date."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = float(text)
        except ValueError:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                return None
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e17:
        return None
    for unit in (1e11, 1e14):  # later than the year 5138: milliseconds, then microseconds
        value = value / 1000 if value >= unit else value
    return float(value) if value < 1e11 else float(value) / 1000


def _terms(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    return tuple(each for each in value if isinstance(each, str) and each) if isinstance(value, list) else ()


def _reference(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _text(value: object) -> str:
    """A short text or number as text, else ""."""
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return str(value)[:200] if is_plain and value != "" else ""


def _parsed(value: object) -> Any:
    """A value that may be written as JSON inside a text."""
    if isinstance(value, str) and value[:1] in "[{" and value:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _said(value: object) -> str:
    said = value.get("message") if isinstance(value, Mapping) else value
    return " ".join(str(said).split())[:120]


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda line: all(name in line for name in names)


def _is_eval(line: Mapping[str, Any]) -> bool:
    marks: Iterator[bool] = iter(
        (
            "ideal" in line and "input" in line,
            "datasource_item" in line,
            "item" in line and isinstance(line.get("sample"), Mapping),
            "sample_id" in line and "data" in line,
            "spec" in line,
            "final_report" in line,
        )
    )
    return any(marks)


FORMATS: Final = (
    Format("capture", _has("request", "response", "deployment", "origin"), _capture),
    Format("flywheel", _has("request", "response", "workload_id"), _flywheel),
    Format("exchange", _has("request", "response"), _exchange),
    Format("openai-batch", _has("custom_id"), _batch),
    Format("litellm", lambda line: "call_type" in line and "response" in line, _litellm),
    Format("openai-eval", _is_eval, _eval),
    Format("sharegpt", _has("conversations"), _sharegpt),
    Format("openai-chat", _has("messages"), _chat),
)
"""In the order in which they are tried; rows that are none of these may be `pairs`."""
