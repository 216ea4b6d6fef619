"""The cascade's threshold and bound: they hold in draws, and the deployed cascade does what was judged."""

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest

from tests.fast.optimize_fakes import FakeBackend
from tokenmill.core import Message, SamplingParams, UsageError
from tokenmill.optimize.cascade import Kept, bound, careful_to_bold, learn_then_test, risk_at, threshold_for
from tokenmill.router.backend import Job
from tokenmill.router.cascade import CascadeBackend, CascadeConfig, answer_probability
from tokenmill.wire import Begin, Call, Finish, TextPiece, TokenText, ToolPiece

MAX_RISK = 0.05
NUM_DRAWS = 1000


def draw(rng: np.random.Generator, num: int) -> list[Kept]:
    """Rows of a model that is a little surer of right answers than of wrong ones."""
    losses = rng.random(num) < 0.25
    sure = np.clip(rng.normal(np.where(losses, 0.5, 0.75), 0.15), 0, 1)
    return [Kept(float(p), bool(loss)) for p, loss in zip(sure, losses, strict=True)]


def true_risk(threshold: float) -> float:
    """The share of all rows that are kept and lost, in closed form."""
    return 0.25 * 0.5 * math.erfc((threshold - 0.5) / (0.15 * math.sqrt(2)))


def test_the_bound_holds_in_a_thousand_draws() -> None:
    rng = np.random.default_rng(11)
    broken = naive = proven = false_proof = ltt_false = ltt_found = 0
    for _ in range(NUM_DRAWS):
        select, certify = draw(rng, 300), draw(rng, 400)
        threshold = threshold_for(select, max_risk=MAX_RISK)
        assert threshold is not None
        risk = true_risk(threshold)
        found = bound(certify, threshold, max_risk=MAX_RISK)
        broken += risk > found.risk_high
        naive += risk > risk_at(certify, threshold)[1] / len(certify)
        proven += found.is_proven
        false_proof += found.is_proven and risk > MAX_RISK
        bold = learn_then_test(certify, careful_to_bold(select, max_risk=MAX_RISK), max_risk=MAX_RISK)
        if bold is not None:
            ltt_found += 1
            ltt_false += true_risk(bold.threshold) > MAX_RISK
    # 5 % of 1,000 with four standard errors of a binomial: 50 + 28.
    assert broken <= 78 and false_proof <= 78 and ltt_false <= 78
    assert naive > 300, "without the bound the observed share would be believed"
    assert proven > 500 and ltt_found > 900


def test_choosing_on_certify_itself_would_break_the_promise() -> None:
    """The control: the boldest threshold whose bound on certify looks good, tried on certify alone."""
    rng = np.random.default_rng(12)
    false = 0
    for _ in range(300):
        certify = draw(rng, 400)
        threshold = threshold_for(certify, max_risk=MAX_RISK, confidence=0.95)
        false += threshold is not None and true_risk(threshold) > MAX_RISK
    assert false / 300 > 0.05


def test_no_threshold_where_nothing_is_safe() -> None:
    unsafe = [Kept(0.5, True)] * 100
    assert threshold_for(unsafe, max_risk=0.05) is None
    assert threshold_for([], max_risk=0.05) is None
    assert learn_then_test(unsafe, [0.5], max_risk=0.05) is None
    assert learn_then_test([], [0.5], max_risk=0.05) is None
    with pytest.raises(UsageError):
        bound([], 0.5, max_risk=0.05)


def test_equal_probabilities_are_kept_or_deferred_together() -> None:
    rows = [Kept(0.9, False)] * 200 + [Kept(0.5, False)] * 50 + [Kept(0.5, True)] * 50
    assert threshold_for(rows, max_risk=0.05) == 0.9


CALL = Call(model="c", messages=(Message(role="user", content="q"),))


def cascade(probability: float, *, min_probability: float = 0.8) -> CascadeBackend:
    first, second = FakeBackend(lambda text: ("small", probability)), FakeBackend(lambda text: ("large", 0.9))
    config = CascadeConfig(name="c", first="a", second="b", min_probability=min_probability)
    return CascadeBackend(config, first, second)


async def ask(backend: CascadeBackend, call: Call = CALL) -> tuple[list[object], object, bool]:
    attempt = backend.start(await backend.prepare(call), Job(request_id="r"))
    pieces: list[object] = [piece async for piece in attempt]
    return pieces, await attempt.spent(), attempt.was_deferred


@pytest.mark.parametrize(("probability", "text", "times"), [(0.9, "small", 1), (0.7, "large", 2)])
def test_the_backend_keeps_what_it_is_sure_of(probability: float, text: str, times: int) -> None:
    pieces, spent, was_deferred = asyncio.run(ask(cascade(probability)))
    texts = [piece for piece in pieces if isinstance(piece, TextPiece)]
    assert [piece.text for piece in texts] == [text] and was_deferred == (times == 2)
    assert spent.nanoseconds == 1_000_000 * times  # type: ignore[attr-defined]
    assert spent.usage.num_output_tokens == 4 * times  # type: ignore[attr-defined]
    assert isinstance(pieces[0], Begin) and pieces[0].model == "c"
    if times == 1:
        assert texts[0].logprobs == ()  # nobody asked for them


def test_what_the_first_cannot_take_goes_to_the_second() -> None:
    backend = cascade(0.9)

    async def refuse(call: Call) -> object:
        raise UsageError("too long")

    backend.first.prepare = refuse  # type: ignore[method-assign, assignment]
    pieces, spent, was_deferred = asyncio.run(ask(backend))
    assert was_deferred and any(isinstance(each, TextPiece) and each.text == "large" for each in pieces)
    assert spent.nanoseconds == 1_000_000  # type: ignore[attr-defined]


def test_a_cancelled_call_begins_no_second_attempt() -> None:
    backend = cascade(0.1)

    async def go() -> object:
        attempt = backend.start(await backend.prepare(CALL), Job(request_id="r"))
        attempt.cancel()
        return await attempt.spent()

    asyncio.run(go())
    assert isinstance(backend.second, FakeBackend) and backend.second.calls == []


def piece(*logprobs: float) -> TextPiece:
    return TextPiece("x", logprobs=tuple(TokenText("x", each) for each in logprobs))


@pytest.mark.parametrize(
    ("pieces", "probability"),
    [
        ([piece(-0.5), piece(-0.5), Finish("completed")], math.exp(-1)),
        ([piece(-0.5), Finish("length")], 0.0),
        ([piece(-0.5)], 0.0),
        ([piece(), Finish("completed")], 0.0),
        ([ToolPiece(0, name="f"), piece(0.0), Finish("completed")], 0.0),
    ],
)
def test_the_probability_of_an_answer(pieces: Sequence[object], probability: float) -> None:
    assert answer_probability(pieces) == pytest.approx(probability)  # type: ignore[arg-type]


def test_more_than_one_answer_is_refused() -> None:
    many = Call(model="c", messages=CALL.messages, params=SamplingParams(n=2, temperature=1.0))
    with pytest.raises(UsageError, match="one answer"):
        asyncio.run(cascade(0.9).prepare(many))
    with pytest.raises(UsageError):
        CascadeConfig(name="c", first="c", second="b", min_probability=0.5)
    with pytest.raises(UsageError):
        CascadeConfig(name="c", first="a", second="b", min_probability=1.5)
