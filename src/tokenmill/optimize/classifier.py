"""The control for closed label sets: a linear classifier on n-grams, trained with scikit-learn in seconds.

It learns the label that was wanted of each training row. Its strength of regularisation is chosen on a part
of the training rows that it does not see; select is for comparing it with others.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from tokenmill.core import UsageError
from tokenmill.optimize.candidate import CannotBeMadeError, Expected, Opened, Workshop
from tokenmill.optimize.cases import Case
from tokenmill.optimize.records import Artefact, Kind, Lineage
from tokenmill.router.classifier import ClassifierBackend, ClassifierConfig
from tokenmill.router.labeller import classified_text
from tokenmill.router.linear import CONFIG_NAME, NUMBERS_NAME, LinearClassifier, ngrams

__all__ = ["ClassifierCandidate", "file_digest", "train_classifier"]

_STRENGTHS: Final = (0.3, 1.0)
_SCALES: Final = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
_MIN_ROWS: Final = 2
_MAX_TERMS: Final = 200_000
_HELD_OUT: Final = 0.15


def train_classifier(
    texts: Sequence[str], labels: Sequence[str], *, seed: int = 0, strengths: Sequence[float] = _STRENGTHS
) -> LinearClassifier:
    """The classifier of these texts. Raises UsageError without scikit-learn, or for fewer than two labels."""
    if len(set(labels)) < 2:
        raise UsageError("a classifier needs rows of two labels", hint="give more rows that may train")
    held_out = np.random.default_rng(seed).random(len(texts)) < _HELD_OUT
    inner = [at for at in range(len(texts)) if not held_out[at]]
    outer = [at for at in range(len(texts)) if held_out[at]]
    best, best_score, scale = strengths[-1], -1.0, 1.0
    if outer and len({labels[at] for at in inner}) > 1:
        outer_texts, outer_labels = [texts[at] for at in outer], [labels[at] for at in outer]
        for strength in strengths:
            model = _fitted([texts[at] for at in inner], [labels[at] for at in inner], strength, seed)
            right = sum(
                model.guess(text).label == label
                for text, label in zip(outer_texts, outer_labels, strict=True)
            )
            if right > best_score:
                best, best_score, scale = strength, right, _scale(model, outer_texts, outer_labels)
    return _scaled(_fitted(texts, labels, best, seed), scale)


def _scale(model: LinearClassifier, texts: Sequence[str], labels: Sequence[str]) -> float:
    """The factor for its scores that makes the probabilities of these labels largest: how sure it may be."""
    places = {label: at for at, label in enumerate(model.labels)}
    known = [
        (model.scores(text), places[label])
        for text, label in zip(texts, labels, strict=True)
        if label in places
    ]
    if not known:
        return 1.0
    scores_NC = np.stack([scores for scores, _ in known]).astype(np.float64)
    rows_N, right_N = np.arange(len(known)), np.array([place for _, place in known])

    def loss(scale: float) -> float:
        moved_NC = scale * (scores_NC - scores_NC.max(axis=1, keepdims=True))
        return float((np.log(np.exp(moved_NC).sum(axis=1)) - moved_NC[rows_N, right_N]).mean())

    return min(_SCALES, key=loss)


def _scaled(model: LinearClassifier, scale: float) -> LinearClassifier:
    """The same labels, with scores of another size."""
    factor = np.float32(scale)
    return replace(model, weights_FC=factor * model.weights_FC, bias_C=factor * model.bias_C)


def _fitted(texts: Sequence[str], labels: Sequence[str], strength: float, seed: int) -> LinearClassifier:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC
    except ImportError:
        raise UsageError(
            "the classifier is trained with scikit-learn, which is not installed",
            hint="pip install 'tokenmill[train]'",
        ) from None
    min_count = 2 if len(texts) > 200 else 1
    vectors = TfidfVectorizer(
        analyzer=ngrams, sublinear_tf=True, min_df=min_count, max_features=_MAX_TERMS, dtype=np.float32
    )
    try:
        features = vectors.fit_transform(texts)
    except ValueError as error:
        raise UsageError(f"there is nothing to learn from in the texts ({error})") from error
    model = LinearSVC(C=strength, random_state=seed).fit(features, list(labels))
    weights_CF, bias_C = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        weights_CF, bias_C = np.concatenate([-weights_CF, weights_CF]), np.concatenate([-bias_C, bias_C])
    return LinearClassifier(
        labels=tuple(str(each) for each in model.classes_),
        terms=tuple(str(each) for each in vectors.get_feature_names_out()),
        idf_F=vectors.idf_.astype(np.float32),
        weights_FC=np.ascontiguousarray(weights_CF.T, np.float32),
        bias_C=bias_C.astype(np.float32),
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierCandidate:
    """Always tried where answers are a closed set."""

    name: str = "classifier"

    @property
    def kind(self) -> Kind:
        """A classifier."""
        return "classifier"

    @property
    def is_control(self) -> bool:
        """It is: what costs more must be better than this."""
        return True

    @property
    def is_trained(self) -> bool:
        """From rows."""
        return True

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What decides it, beside the rows."""
        return {"kind": "classifier", "version": 1, "strengths": list(_STRENGTHS)}

    def expected(self, workshop: Workshop, num_items: int) -> Expected:
        """Seconds."""
        num_labels = max(2, len(workshop.labels))
        return Expected(2.0 + 2e-5 * num_labels * len(workshop.train), 2.0 + 0.001 * num_items)

    def make(self, workshop: Workshop, share: float) -> Artefact:
        """Train it on the first share of the training rows."""
        began_s = time.monotonic()
        rows = [case for case in workshop.train if case.call is not None and _text(case) is not None]
        rows = rows[: max(_MIN_ROWS, round(share * len(rows)))]
        if len(rows) < _MIN_ROWS:
            raise CannotBeMadeError("there are no rows that may train a classifier", hint="see the terms")
        labels = set(workshop.labels)
        rows = [case for case in rows if not labels or case.wanted in labels]
        model = train_classifier(
            [_text(case) or "" for case in rows], [case.wanted for case in rows], seed=workshop.seed
        )
        model.save(workshop.folder)
        digest, num_bytes = file_digest(workshop.folder, (CONFIG_NAME, NUMBERS_NAME))
        return Artefact(
            path=str(workshop.folder),
            digest=digest,
            num_bytes=num_bytes,
            seconds=time.monotonic() - began_s,
            lineage=(
                Lineage(what="method", name="linear classifier, scikit-learn", terms=("BSD-3-Clause",)),
            ),
            trained_on=tuple(case.id for case in rows),
            settings={"num_rows": len(rows), "num_labels": len(model.labels), "num_terms": len(model.terms)},
        )

    @asynccontextmanager
    async def opened(self, artefact: Artefact, workshop: Workshop) -> AsyncIterator[Opened]:
        """Read it from its files."""
        model = await asyncio.to_thread(LinearClassifier.load, Path(artefact.path))
        backend = ClassifierBackend(self.name, model, usd_per_hour=workshop.usd_per_hour)
        yield Opened(backend, lambda: model.num_bytes)

    def deployment(self, artefact: Artefact, name: str) -> Mapping[str, Any]:
        """A classifier of the server."""
        config = ClassifierConfig(name=name, folder=artefact.path)
        return {"classifiers": [{"name": config.name, "folder": config.folder}]}


def file_digest(folder: Path, names: Sequence[str]) -> tuple[str, int]:
    """SHA-256 over the names and contents of files, and their size."""
    digest, num_bytes = hashlib.sha256(), 0
    for name in names:
        data = (folder / name).read_bytes()
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
        num_bytes += len(data)
    return digest.hexdigest(), num_bytes


def _text(case: Case) -> str | None:
    assert case.call is not None
    try:
        return classified_text(case.call.messages)
    except UsageError:
        return None
