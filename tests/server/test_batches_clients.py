"""Files and batches through the official clients: typed objects, typed errors, check by check."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.reliability.server import Server, running
from tests.server.batch_tools import add_keys, ask, bills_of, chat_lines, config, form, until_ended

openai = pytest.importorskip("openai", reason="the official client is an extra of development")
anthropic = pytest.importorskip("anthropic", reason="the official client is an extra of development")

CHAT: Final = "/v1/chat/completions"
JSON: Final = {"content_type": "application/json"}
ENDED: Final = ("completed", "failed", "cancelled", "expired")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all checks, with keys."""
    folder = tmp_path_factory.mktemp("batches")
    add_keys(folder / "server.db")
    with running(config(keys=True), folder) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    """OpenAI's client with a key of the project `one`."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tm_one", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[Any]:
    """Anthropic's client with the same key."""
    with anthropic.Anthropic(base_url=server.url, api_key="tm_one", max_retries=0) as found:
        yield found


def _submit(client: Any, content: bytes, endpoint: str = CHAT, **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def _ended(client: Any, batch: Any) -> Any:
    return until_ended(lambda: client.batches.retrieve(batch.id), lambda found: found.status in ENDED)


def _lines(client: Any, file_id: str) -> dict[str, Any]:
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found)
    return {line["custom_id"]: line for line in found}


def _requests(numbers: Any, **more: Any) -> list[Any]:
    return [
        {
            "custom_id": f"m{at}",
            "params": {
                "model": "mock",
                "max_tokens": 8,
                "messages": [{"role": "user", "content": f"q{at}"}],
                **more,
            },
        }
        for at in numbers
    ]


def _messages_ended(claude: Any, batch: Any) -> Any:
    return until_ended(
        lambda: claude.messages.batches.retrieve(batch.id), lambda found: found.processing_status == "ended"
    )


def test_files(client: Any) -> None:
    content = chat_lines(range(3)) + "ä\n".encode()
    file = client.files.create(file=("name ä.jsonl", content), purpose="batch")
    assert file.id.startswith("file-") and file.object == "file" and file.purpose == "batch"
    assert file.bytes == len(content) and file.filename == "name ä.jsonl" and file.status == "processed"
    assert file.expires_at - file.created_at == 30 * 86400
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert file.id in [each.id for each in client.files.list(purpose="batch")]
    assert not list(client.files.list(purpose="vision"))
    deleted = client.files.delete(file.id)
    assert deleted.id == file.id and deleted.deleted is True and deleted.object == "file"
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_files_are_listed_by_page_and_order(client: Any) -> None:
    made = [client.files.create(file=("x", b"{}\n"), purpose="batch").id for _ in range(5)]
    newest = client.files.list(limit=2)
    assert [each.id for each in newest.data] == made[:2:-1] and newest.has_more
    assert [each.id for each in client.files.list(limit=2)][:5] == made[::-1]
    after = client.files.list(order="asc", after=made[1], limit=2)
    assert [each.id for each in after.data] == made[2:4]
    for file_id in made:
        client.files.delete(file_id)


def test_a_file_may_expire_when_the_client_says_so(client: Any) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("x", b"{}"), purpose="batch", expires_after=expiry)
    assert file.expires_at - file.created_at == 3600
    for wrong in (10, 10**9):
        with pytest.raises(openai.BadRequestError) as raised:
            bad = {"anchor": "created_at", "seconds": wrong}
            client.files.create(file=("x", b"{}"), purpose="batch", expires_after=bad)
        assert raised.value.param == "expires_after[seconds]"


def test_wrong_uploads_name_the_field(client: Any, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.files.create(file=("x", b"{}"), purpose="vision")
    assert raised.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as raised:
        client.files.create(file=("x", b"x\n" * 50_001), purpose="batch")
    assert raised.value.param == "file" and "50000 lines" in str(raised.value)
    key = {"authorization": "Bearer tm_one"}
    body, kind = form(b"{}", purpose=None)
    assert (
        ask(server.port, "POST", "/v1/files", body, content_type=kind, **key)[1]["error"]["param"]
        == "purpose"
    )
    for broken in (body[:-9], body.replace(b"--limit", b"--other"), b""):
        assert ask(server.port, "POST", "/v1/files", broken, content_type=kind, **key)[0] == 400
    assert ask(server.port, "POST", "/v1/files", b"{}", **JSON, **key)[0] == 400
    body, kind = form(b"{}", filename="../../etc/passwd")
    status, file, _ = ask(server.port, "POST", "/v1/files", body, content_type=kind, **key)
    assert status == 200 and file["filename"] == "../../etc/passwd", "a name is text, and no path"
    names = {each.name for each in Path(f"{server.store}.files").iterdir()}
    assert all(name.startswith("file-") for name in names), "nothing is left of what was refused"


def test_a_batch_of_chats(client: Any, server: Server) -> None:
    bad = {"custom_id": "bad", "method": "POST", "url": CHAT, "body": {"model": "nix", "messages": []}}
    content = chat_lines(range(40)) + json.dumps(bad).encode()
    batch = _submit(client, content, metadata={"night": "run"})
    assert batch.object == "batch" and batch.id.startswith("batch_") and batch.status == "validating"
    assert batch.endpoint == CHAT and batch.completion_window == "24h" and batch.metadata == {"night": "run"}
    assert batch.expires_at - batch.created_at == 86400 and batch.output_file_id is None
    with pytest.raises(openai.BadRequestError, match="has not ended"):
        client.files.delete(batch.input_file_id)
    done = _ended(client, batch)
    assert done.status == "completed" and done.errors is None and done.model == "mock"
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert (done.failed_at, done.expired_at, done.cancelled_at) == (None, None, None)
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (41, 40, 1)
    answers, errors = _lines(client, done.output_file_id), _lines(client, done.error_file_id)
    assert set(answers) == {f"c{at}" for at in range(40)} and set(errors) == {"bad"}
    for at in range(40):
        line = answers[f"c{at}"]
        assert line["error"] is None and line["response"]["status_code"] == 200
        reply = openai.types.chat.ChatCompletion.model_validate(line["response"]["body"])
        assert reply.choices[0].message.content == f"a{at}" and reply.choices[0].finish_reason == "stop"
        assert reply.id.endswith(line["response"]["request_id"])
    assert errors["bad"]["response"]["status_code"] in (400, 404)
    used = [line["response"]["body"]["usage"] for line in answers.values()]
    assert done.usage.input_tokens == sum(each["prompt_tokens"] for each in used)
    assert done.usage.total_tokens == sum(each["total_tokens"] for each in used)
    bills = bills_of(server.store, batch.id)
    assert len(bills) == 40 and sum(bills.values()) == done.usage.total_tokens * 1000, "the tier's price"
    output = client.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output" and output.filename == f"{batch.id}_output.jsonl"


@pytest.mark.parametrize(
    ("endpoint", "body", "content"),
    [
        ("/v1/completions", {"prompt": "q1="}, lambda body: body["choices"][0]["text"] == "a1"),
        (
            "/v1/embeddings",
            {"input": ["a", "b"]},
            lambda body: body["object"] == "list" and len(body["data"]) == 2,
        ),
        ("/v1/responses", {"input": "q2"}, lambda body: body["output"][0]["content"][0]["text"] == "a2"),
    ],
)
def test_other_endpoints(client: Any, server: Server, endpoint: str, body: Any, content: Any) -> None:
    line = {"custom_id": "x", "method": "POST", "url": endpoint, "body": {"model": "mock", **body}}
    done = _ended(client, _submit(client, json.dumps(line).encode(), endpoint))
    file_id = done.output_file_id or done.error_file_id
    found = _lines(client, file_id)["x"]["response"]
    assert found["status_code"] == 200, found
    assert content(found["body"])
    assert len(bills_of(server.store, done.id)) == 1


def test_batches_are_listed_by_page(client: Any) -> None:
    made = [_submit(client, chat_lines([at])).id for at in range(3)]
    page = client.batches.list(limit=2)
    assert [each.id for each in page.data] == made[:0:-1] and page.has_more is True
    assert [each.id for each in client.batches.list(limit=1)][:3] == made[::-1]
    assert client.batches.list(after=made[1], limit=1).data[0].id == made[0]
    with pytest.raises(openai.BadRequestError) as raised:
        client.batches.list(limit=101)
    assert raised.value.param == "limit"
    with pytest.raises(openai.NotFoundError):
        client.batches.list(after="batch_" + "0" * 32)


def test_an_input_that_makes_no_sense_fails_the_batch(client: Any) -> None:
    done = _ended(client, _submit(client, chat_lines([1, 1]) + b"nonsense\n"))
    assert done.status == "failed" and done.failed_at is not None and done.output_file_id is None
    assert done.errors.object == "list"
    assert [(each.line, each.code) for each in done.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_json_line"),
    ]
    with pytest.raises(openai.BadRequestError, match="failed already"):
        client.batches.cancel(done.id)


def test_wrong_batches_name_the_field(client: Any) -> None:
    file = client.files.create(file=("x", chat_lines([1])), purpose="batch")
    good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for field, wrong in (
        ("endpoint", "/v1/images/edits"),
        ("completion_window", "1h"),
        ("metadata", {"a": "b" * 513}),
        ("output_expires_after", {"anchor": "created_at", "seconds": 3600}),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            client.batches.create(**{**good, field: wrong})
        assert raised.value.param == field
    with pytest.raises(openai.NotFoundError):
        client.batches.create(**{**good, "input_file_id": "file-" + "0" * 32})


def test_cancel(client: Any) -> None:
    batch = _submit(client, chat_lines(range(300), max_tokens=64, ignore_eos=True, temperature=0))
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled") and cancelled.cancelling_at is not None
    done = _ended(client, batch)
    assert done.status == "cancelled" and done.cancelled_at is not None
    assert client.batches.cancel(batch.id).status == "cancelled", "again is no error"
    assert done.request_counts.completed < 300


def test_projects_do_not_see_each_other(client: Any, claude: Any, server: Server) -> None:
    done = _ended(client, _submit(client, chat_lines([1])))
    messages = _messages_ended(claude, claude.messages.batches.create(requests=_requests([1])))
    files, batches = f"/v1/files/{done.output_file_id}", f"/v1/batches/{done.id}"
    mine = f"/v1/messages/batches/{messages.id}"
    routes = [("GET", files), ("GET", f"{files}/content"), ("DELETE", files), ("GET", batches)]
    routes += [("POST", f"{batches}/cancel"), ("GET", mine), ("GET", f"{mine}/results"), ("DELETE", mine)]
    routes += [("POST", f"{mine}/cancel")]
    for method, path in routes:
        for secret, expected in (("tm_two", 404), ("tm_nobody", 401), ("", 401)):
            headers = {"x_api_key": secret} if secret else {}
            assert ask(server.port, method, path, b"", **headers)[0] == expected, (method, path, secret)
    for path in ("/v1/files", "/v1/batches", "/v1/messages/batches"):
        assert ask(server.port, "GET", path, x_api_key="tm_two")[1]["data"] == []
    body = json.dumps({"input_file_id": done.input_file_id, "endpoint": CHAT, "completion_window": "24h"})
    assert ask(server.port, "POST", "/v1/batches", body.encode(), x_api_key="tm_two")[0] == 404
    status, error, _ = ask(server.port, "POST", "/v1/batches", body.encode(), x_api_key="tm_fast")
    assert status == 400 and "tier batch" in error["error"]["message"]
    hidden = f"/v1/batches/{messages.id}", f"/v1/messages/batches/{done.id}"
    assert [ask(server.port, "GET", path, x_api_key="tm_one")[0] for path in hidden] == [404, 404]


def test_a_request_that_is_sent_again_makes_one_object(client: Any, server: Server) -> None:
    content = chat_lines([1])
    key = {"authorization": "Bearer tm_one", "idempotency_key": "upload-1"}
    body, kind = form(content)
    files = [ask(server.port, "POST", "/v1/files", body, content_type=kind, **key) for _ in range(3)]
    assert {each[0] for each in files} == {200} and len({each[1]["id"] for each in files}) == 1
    other, kind = form(content + b"\n")
    assert ask(server.port, "POST", "/v1/files", other, content_type=kind, **key)[0] == 422
    value = {"input_file_id": files[0][1]["id"], "endpoint": CHAT, "completion_window": "24h"}
    key["idempotency_key"] = "batch-1"

    def create(_: int) -> tuple[int, Any, dict[str, str]]:
        return ask(server.port, "POST", "/v1/batches", json.dumps(value).encode(), **key)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(create, range(64)))
    assert {each[0] for each in answers} <= {200, 409}
    assert len({each[1]["id"] for each in answers if each[0] == 200}) == 1
    assert create(0)[0] == 200, "and the same answer later"
    value["completion_window"] = "1h"
    assert create(0)[0] == 400, "what is refused before anything was done is refused each time"
    first = ask(
        server.port,
        "POST",
        "/v1/batches",
        b'{"endpoint": "x"}',
        authorization="Bearer tm_one",
        idempotency_key="b",
    )
    assert first[0] == 400, "and keeps nothing of its key"


def test_a_message_batch(claude: Any, server: Server) -> None:
    requests = _requests(range(20))
    requests += [{"custom_id": "nix", "params": {**requests[0]["params"], "model": "nix"}}]
    requests += [{"custom_id": "stream", "params": {**requests[0]["params"], "stream": True}}]
    batch = claude.messages.batches.create(requests=requests)
    assert batch.type == "message_batch" and batch.id.startswith("msgbatch_")
    assert batch.processing_status == "in_progress" and batch.results_url is None and batch.ended_at is None
    assert (batch.expires_at - batch.created_at).total_seconds() == 86400
    counts = batch.request_counts
    assert (counts.processing, counts.succeeded, counts.errored) == (22, 0, 0)
    done = _messages_ended(claude, batch)
    assert done.ended_at >= done.created_at and done.cancel_initiated_at is None and done.archived_at is None
    counts = done.request_counts
    assert (counts.processing, counts.succeeded, counts.errored) == (0, 20, 2)
    assert (counts.canceled, counts.expired) == (0, 0)
    assert done.results_url == f"{server.url}/v1/messages/batches/{batch.id}/results"
    results = {each.custom_id: each.result for each in claude.messages.batches.results(batch.id)}
    assert len(results) == 22
    for at in range(20):
        result = results[f"m{at}"]
        assert result.type == "succeeded" and result.message.content[0].text == f"a{at}"
        assert result.message.stop_reason == "end_turn" and result.message.usage.output_tokens > 0
    assert results["nix"].type == "errored" and results["nix"].error.error.type == "not_found_error"
    assert results["stream"].error.error.type == "invalid_request_error"
    assert len(bills_of(server.store, batch.id)) == 20
    assert claude.messages.batches.delete(batch.id).type == "message_batch_deleted"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.batches.retrieve(batch.id)


def test_message_batches_are_listed_and_cancelled(claude: Any) -> None:
    made = [claude.messages.batches.create(requests=_requests([at])).id for at in range(3)]
    page = claude.messages.batches.list(limit=2)
    assert [each.id for each in page.data] == made[:0:-1] and page.has_more
    assert page.first_id == made[2] and page.last_id == made[1]
    assert [each.id for each in claude.messages.batches.list(limit=1)][:3] == made[::-1]
    before = claude.messages.batches.list(before_id=made[0], limit=1)
    assert [each.id for each in before.data] == [made[1]]
    long = claude.messages.batches.create(requests=_requests(range(300), max_tokens=200, temperature=0.0))
    with pytest.raises(anthropic.BadRequestError, match="has not ended"):
        claude.messages.batches.delete(long.id)
    with pytest.raises(anthropic.AnthropicError, match="results_url"):
        claude.messages.batches.results(long.id)
    assert claude.messages.batches.cancel(long.id).processing_status in ("canceling", "ended")
    done = _messages_ended(claude, long)
    assert done.cancel_initiated_at is not None and done.request_counts.canceled > 0
    kinds = [each.result.type for each in claude.messages.batches.results(long.id)]
    assert len(kinds) == 300 and set(kinds) <= {"canceled", "succeeded"}
    assert kinds.count("canceled") == done.request_counts.canceled
    with pytest.raises(anthropic.BadRequestError, match="has ended"):
        claude.messages.batches.cancel(long.id)


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([], "requests: there are 0"),
        (_requests([1, 1]), "requests\\[1\\].custom_id"),
        ([{**_requests([1])[0], "custom_id": "a b"}], "requests\\[0\\].custom_id"),
        ([{**_requests([1])[0], "extra": 1}], "requests\\[0\\]"),
    ],
)
def test_wrong_message_batches_name_the_field(claude: Any, requests: Any, said: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=said):
        claude.messages.batches.create(requests=requests)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"requests":1}', b'{"requests":' + b"[" * 99_999])
def test_nonsense_is_refused(server: Server, body: bytes) -> None:
    status, error, _ = ask(server.port, "POST", "/v1/messages/batches", body, x_api_key="tm_one")
    assert status == 400 and error["error"]["type"] == "invalid_request_error"
    assert ask(server.port, "POST", "/v1/batches", body, x_api_key="tm_one")[0] == 400
