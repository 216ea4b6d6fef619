"""What is taken out of captured text, what is left, and that hostile text is not slow."""

import json
import time

import pytest

from tokenmill.core import UsageError
from tokenmill.server.redaction import PATTERNS, Redactor, load_redactor

KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to ann.lee+x@mail.example.co.uk, please", "write to [EMAIL], please"),
        ("jürgen@exämple.de", "[EMAIL]"),
        ("call +49 171 1234567 or (212) 555-0123", "call [PHONE] or [PHONE]"),
        ("030 / 1234567, 0044 20 7946 0958", "[PHONE], [PHONE]"),
        ("card 4111 1111 1111 1111.", "card [CARD]."),
        ("card 4111-1111-1111-1111 and 378282246310005", "card [CARD] and [CARD]"),
        ("to DE89 3704 0044 0532 0130 00 today", "to [IBAN] today"),
        ("GB82WEST12345698765432", "[IBAN]"),
        ("key sk-proj-abcdefghijklmnop1234", "key [SECRET]"),
        ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: [SECRET]"),
        ("password=hunter22, ok", "[SECRET], ok"),
        ("AKIAIOSFODNN7EXAMPLE", "[SECRET]"),
        (f"a {KEY} b", "a [SECRET] b"),
    ],
)
def test_what_has_a_form_is_taken_out(text: str, redacted: str) -> None:
    assert Redactor().text(text) == redacted
    assert Redactor(()).text(text) == text, "the control: without patterns it is kept"


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22 21:05:06, order 12345, version 1.2.3",
        "card 4111 1111 1111 1112",
        "DE88370400440532013000",
        "3.14159265358979323846",
        "git commit 9bfcfd4, port 8000, 10.0.0.255",
        "x = a @ b",
        "the sk-learn package; the password is secret",
        "0 1 2 3 4 5",
    ],
)
def test_what_only_looks_like_it_is_left(text: str) -> None:
    assert Redactor().text(text) == text


def test_arguments_stay_json_and_names_are_searched() -> None:
    arguments = json.dumps({"card": 4111111111111111, "to": ["bob@example.com"], "n": 3, "ok": True})
    value = Redactor().value({"arguments": arguments, "metadata": {"eve@example.com": "x"}, "n": 1})
    assert json.loads(value["arguments"]) == {"card": "[CARD]", "to": ["[EMAIL]"], "n": 3, "ok": True}
    assert value["metadata"] == {"[EMAIL]": "x"} and value["n"] == 1
    assert Redactor().value({"arguments": "no json bob@example.com"}) == {"arguments": "no json [EMAIL]"}


def test_nothing_is_missed_where_a_long_text_is_cut() -> None:
    for pad in range(0, 40, 5):
        text = (
            "some words " * 2978 + "x" * pad + " card 4111 1111 1111 1111 of bob@example.com " + "and " * 9000
        )
        redacted = Redactor().text(text)
        assert "4111" not in redacted and "bob" not in redacted


@pytest.mark.parametrize(
    "text", ["1 " * 200_000, "a" * 400_000, "a@" * 100_000, "DE11" * 100_000, "+1(" * 99_999]
)
def test_hostile_texts_are_not_slow(text: str) -> None:
    begun_s = time.perf_counter()
    Redactor().text(text)
    assert time.perf_counter() - begun_s < 5.0


def test_the_operators_function() -> None:
    assert Redactor((), str.upper).text("abc") == "ABC"
    assert load_redactor("") is None
    with pytest.raises(UsageError, match="no text"):
        Redactor(PATTERNS, lambda text: None).text("abc")  # type: ignore[arg-type, return-value]
    for name in ("json", "json:nothing", "no_such_module:f", "json:__name__"):
        with pytest.raises(UsageError, match="redact"):
            load_redactor(name)
