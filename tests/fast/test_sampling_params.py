"""Every sampling parameter has a bound at both ends and a type, checked when the object is made."""

import math
from typing import Any

import pytest

from tokenmill.core import Grammar, SamplingParams, UsageError

INTEGERS = {
    "max_tokens": (1, 1 << 20),
    "n": (1, 8),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "top_k": (0, 1 << 20),
    "seed": (0, 2**63 - 1),
}
REALS = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
LISTS: dict[str, tuple[int, Any]] = {
    "stop": (16, "x"),
    "stop_token_ids": (256, 1),
    "bad_words": (256, "x"),
    "logit_bias": (1024, (1, 1.0)),
}
OTHERS = {"min_tokens", "top_p", "ignore_eos", "grammar"}
"""Tested by name below."""


def make(**values: Any) -> SamplingParams:
    return SamplingParams(**values)


def refused(**values: Any) -> None:
    with pytest.raises(UsageError) as caught:
        make(**values)
    assert caught.value.hint


def test_every_field_is_tested_here() -> None:
    assert set(SamplingParams.__dataclass_fields__) == {*INTEGERS, *REALS, *LISTS, *OTHERS}


@pytest.mark.parametrize("name", INTEGERS)
def test_whole_numbers(name: str) -> None:
    low, high = INTEGERS[name]
    for value in (low, high):
        assert getattr(make(**{name: value}), name) == value
    for bad in (low - 1, high + 1, -(2**63), 2**64, True, 1.0, "1", [1], math.nan):
        refused(**{name: bad})


@pytest.mark.parametrize("name", REALS)
def test_numbers(name: str) -> None:
    low, high = REALS[name]
    for value in (low, high):
        assert getattr(make(**{name: value}), name) == value
    below, above = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
    for bad in (low - 1, high + 1, below, above, math.nan, math.inf, -math.inf, True, "1", None, [1.0]):
        refused(**{name: bad})


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str) -> None:
    most, entry = LISTS[name]
    assert len(getattr(make(**{name: (entry,) * most}), name)) == most
    refused(**{name: (entry,) * (most + 1)})
    refused(**{name: "xyz"})


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_texts(name: str) -> None:
    assert getattr(make(**{name: ("x" * 256,)}), name) == ("x" * 256,)
    for bad in ("", "x" * 257, 5, None, b"x"):
        refused(**{name: (bad,)})


def test_token_ids() -> None:
    for bad in (-1, (1 << 31) + 1, True, 1.0, "1", None):
        refused(stop_token_ids=(bad,))
        refused(logit_bias=((bad, 1.0),))


def test_a_logit_bias_is_a_number_within_a_hundred() -> None:
    assert make(logit_bias=((0, -100.0), (1, 100))).logit_bias == ((0, -100.0), (1, 100))
    for bad in (-100.5, 101, math.nan, math.inf, True, "1", None):
        refused(logit_bias=((0, bad),))


def test_min_tokens_is_at_most_max_tokens() -> None:
    assert make(min_tokens=5, max_tokens=5).min_tokens == 5
    for bad in (-1, 6, True, 1.0, None):
        refused(min_tokens=bad, max_tokens=5)


def test_top_p_is_above_zero() -> None:
    assert make(top_p=1).top_p == 1 and make(top_p=5e-324).top_p > 0
    for bad in (0, 0.0, -0.1, 1.0000001, math.nan, math.inf, True, "1", None):
        refused(top_p=bad)


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
def test_a_grammar_has_a_known_kind_and_a_bounded_text(kind: Any) -> None:
    assert make(grammar=Grammar(kind=kind, source="x" * (64 << 10))).grammar is not None
    assert Grammar(kind="json_object").source == ""
    bad: Any
    for bad in ("", "x" * ((64 << 10) + 1), 5, None):
        with pytest.raises(UsageError):
            Grammar(kind=kind, source=bad)
    for bad in ("xml", "", None, 5):
        with pytest.raises(UsageError):
            Grammar(kind=bad, source="x")


def test_what_parameters_say_of_themselves() -> None:
    assert make().greedy and not make(temperature=0.1).greedy
    assert not make().penalises
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert make(**{name: 1.5}).penalises
