"""The classifier: it learns, is stored as data, answers as it was trained, is served; prompted backends."""

import asyncio
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tests.fast.optimize_fakes import LABELS, WORDS, FakeBackend
from tokenmill.core import (
    Grammar,
    Message,
    ModelFormatError,
    NotFoundError,
    SamplingParams,
    StorageError,
    UsageError,
)
from tokenmill.optimize.classifier import train_classifier
from tokenmill.optimize.quality import find_scorer, passes
from tokenmill.router.backend import Job
from tokenmill.router.classifier import ClassifierBackend, ClassifierConfig
from tokenmill.router.linear import LinearClassifier, ngrams
from tokenmill.router.prompted import PromptedBackend, PromptedConfig, Turn
from tokenmill.wire import Call, FieldError, TextPiece, Totals


def texts(num: int, seed: int) -> tuple[list[str], list[str]]:
    random = Random(seed)
    labels = [LABELS[at % len(LABELS)] for at in range(num)]
    return [
        " ".join([*random.sample(WORDS, 4), f"{label}s", random.choice(WORDS)]) for label in labels
    ], labels


@pytest.fixture(scope="module")
def model() -> LinearClassifier:
    return train_classifier(*texts(400, 1))


def test_it_learns_and_knows_how_sure_it_is(model: LinearClassifier) -> None:
    asked, wanted = texts(200, 2)
    guesses = model.guesses(asked)
    assert np.mean([guess.label == label for guess, label in zip(guesses, wanted, strict=True)]) > 0.95
    assert all(0.25 <= guess.probability <= 1 for guess in guesses)
    unknown = model.guess("qqqq")
    assert unknown.probability < np.mean([guess.probability for guess in guesses])


def test_its_arithmetic_is_that_of_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    asked, wanted = texts(120, 3)
    vectors = TfidfVectorizer(analyzer=ngrams, sublinear_tf=True)
    twin = LinearSVC(C=1.0, random_state=0).fit(vectors.fit_transform(asked), wanted)
    model = LinearClassifier(
        labels=tuple(twin.classes_),
        terms=tuple(vectors.get_feature_names_out()),
        idf_F=vectors.idf_.astype(np.float32),
        weights_FC=twin.coef_.T.astype(np.float32),
        bias_C=twin.intercept_.astype(np.float32),
    )
    others, _ = texts(50, 4)
    scores = np.stack([model.scores(each) for each in others])
    assert np.allclose(scores, twin.decision_function(vectors.transform(others)), atol=1e-4)


def test_two_labels_are_enough_and_one_is_not() -> None:
    model = train_classifier(["yes please", "no thanks"] * 20, ["yes", "no"] * 20)
    assert model.guess("yes").label == "yes" and model.guess("no").label == "no"
    with pytest.raises(UsageError, match="two labels"):
        train_classifier(["a", "b"], ["x", "x"])


def test_it_comes_back_from_the_disk(model: LinearClassifier, tmp_path: Path) -> None:
    model.save(tmp_path / "c")
    again = LinearClassifier.load(tmp_path / "c")
    asked, _ = texts(20, 5)
    assert again.guesses(asked) == model.guesses(asked)


def test_a_damaged_or_hostile_folder_is_refused(model: LinearClassifier, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        LinearClassifier.load(tmp_path)
    model.save(tmp_path)
    config = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps(config | {"labels": ["a", "a"]}))
    with pytest.raises(ModelFormatError, match="twice"):
        LinearClassifier.load(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps(config | {"terms": config["terms"][:-1]}))
    with pytest.raises(ModelFormatError, match="numbers of"):
        LinearClassifier.load(tmp_path)
    (tmp_path / "classifier.json").write_text("[]")
    with pytest.raises(ModelFormatError):
        LinearClassifier.load(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps(config))
    np.savez(tmp_path / "classifier.npz", idf=np.array([print], dtype=object))  # a pickle: never opened
    with pytest.raises(StorageError, match="not the file"):
        LinearClassifier.load(tmp_path)


def call(text: str = "cards", **more: object) -> Call:
    return Call(model="c", messages=(Message(role="user", content=text),), **more)  # type: ignore[arg-type]


def test_it_is_a_backend(model: LinearClassifier, tmp_path: Path) -> None:
    model.save(tmp_path)
    backend = ClassifierBackend.open(ClassifierConfig(name="c", folder=str(tmp_path)), usd_per_hour=3600.0)

    async def ask() -> None:
        prepared = await backend.prepare(call(params=SamplingParams(logprobs=0)))
        attempt = backend.start(prepared, Job(request_id="r"))
        pieces = [piece async for piece in attempt]
        (text,) = [piece for piece in pieces if isinstance(piece, TextPiece)]
        assert text.text == "card" and text.logprobs[0].logprob is not None
        spent = await attempt.spent()
        assert spent.nanoseconds > 0 and spent.cost_nano_usd >= spent.nanoseconds
        assert isinstance(pieces[-1], Totals)
        for bad in (
            call(tools=({"function": {"name": "f"}},)),
            call(params=SamplingParams(n=2, temperature=1)),
        ):
            with pytest.raises(FieldError):
                await backend.prepare(bad)
        with pytest.raises(UsageError, match="no message of the user"):
            await backend.prepare(Call(model="c", messages=(Message(role="system", content="x"),)))

    asyncio.run(ask())


def test_a_prompted_backend_tells_more_and_keeps_the_rest() -> None:
    inner = FakeBackend(lambda text: ("x", 0.9))
    grammar = Grammar(kind="regex", source="a|b")
    config = PromptedConfig(
        name="p",
        backend="fake",
        messages=(Turn(role="user", content="1"), Turn(role="assistant", content="a")),
        grammar=grammar,
        temperature=0.0,
        max_tokens=5,
    )
    backend = PromptedBackend(config, inner)
    told = backend.told(call("2", params=SamplingParams(temperature=1.0, max_tokens=99)))
    assert [each.content for each in told.messages] == ["1", "a", "2"]
    assert told.params.temperature == 0 and told.params.max_tokens == 5 and told.params.grammar == grammar
    own = Grammar(kind="json_object")
    assert backend.told(call(params=SamplingParams(grammar=own))).params.grammar == own
    system = Call(
        model="c", messages=(Message(role="system", content="s"), Message(role="user", content="2"))
    )
    assert [each.content for each in backend.told(system).messages] == ["s", "1", "a", "2"]
    with pytest.raises(FieldError):
        backend.told(Call(model="c", prompts=("raw",)))
    with pytest.raises(UsageError):
        PromptedConfig(name="p", backend="p")
    with pytest.raises(UsageError):
        Turn(role="tool", content="x")


@pytest.mark.parametrize(
    ("name", "wanted", "given", "score"),
    [
        ("exact", "a  b", "a b", 1.0),
        ("exact", "a", "b", 0.0),
        ("contains", "Paris", "It is Paris.", 1.0),
        ("contains", "", "x", 0.0),
        ("json", '{"a": 1, "b": "X"}', 'Sure: {"b": "x", "a": 1.0}', 1.0),
        ("json", '{"a": 1}', '{"a": true}', 0.0),
        ("json", '{"a": 1}', "no", 0.0),
        ("json", '[{"name": "f", "arguments": {}}]', '[{"arguments": {}, "name": "f"}]', 1.0),
        ("sql", "SELECT a FROM t;", "```sql\nselect a  from t\n```", 1.0),
        ("label", "card", "Label: Card.", 1.0),
        ("rouge", "a b c d", "a b c d", 1.0),
    ],
)
def test_scorers(name: str, wanted: str, given: str, score: float) -> None:
    assert find_scorer(name, LABELS)(wanted, given) == score


def test_what_passes() -> None:
    assert passes(1.0, 0.0, name="exact", margin=0.1, bar=None)
    assert not passes(0.99, 0.0, name="json", margin=0.1, bar=0.5)
    assert passes(0.45, 0.5, name="rouge", margin=0.1, bar=None)
    assert not passes(0.45, 0.5, name="rouge", margin=0.1, bar=0.5)
    with pytest.raises(UsageError, match="no scorer"):
        find_scorer("vibes")
