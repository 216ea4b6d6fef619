"""Taps, embeddings and calibration on the default model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.fast.tap_tools import drive, embedding, engine, generation
from tokenmill.engine.embedding import embeddings
from tokenmill.engine.taps.calibration import calibrate
from tokenmill.engine.taps.points import FINAL_NORM, input_points
from tokenmill.engine.taps.tap import Recording, Tap, ablate, replace_values
from tokenmill.kernels import F32Array
from tokenmill.models.packing.compile import ExecutorConfig, create_executor
from tokenmill.models.store.directory import ModelDirectory

PROMPTS = ["The capital of France is", "Two plus two is", "Bread is made of flour,"]
NUM_TOKENS = 12
POINTS = (
    "hook_embed",
    "blocks.3.attn.hook_z",
    "blocks.7.mlp.hook_post",
    "blocks.12.hook_resid_post",
    FINAL_NORM,
)


class Tapped:
    """The model with an engine of its own, as the offline `LLM` would drive it."""

    def __init__(self, path: Path) -> None:
        self.model = ModelDirectory.open(path)
        config = ExecutorConfig(weights="w8a8", max_rows=128, max_out_rows=16, num_blocks=32, num_threads=1)
        self.executor = create_executor(self.model, config)
        self.core = engine(self.executor, num_blocks=32, prefix_cache=True)
        self.encode = self.model.tokenizer().encode

    def answers(self, *taps: Sequence[Tap]) -> list[list[int]]:
        """The greedy answer to each prompt, with these taps; all in one batch."""
        states = [
            generation(prompt, self.encode(prompt), NUM_TOKENS, *each)
            for prompt, each in zip(PROMPTS, taps, strict=True)
        ]
        drive(self.core, states)
        return [list(state.tokens) for state in states]

    def embed(self, texts: Sequence[str]) -> F32Array:
        states = [embedding(text, self.encode(text), "mean") for text in texts]
        drive(self.core, states)
        size = self.model.architecture.hidden_size
        return embeddings(states, hidden_size=size, normalize=True)


@pytest.fixture(scope="module")
def tapped(model_dir: Path) -> Tapped:
    return Tapped(model_dir)


@pytest.fixture(scope="module")
def plain(tapped: Tapped) -> list[list[int]]:
    return tapped.answers((), (), ())


def test_reading_changes_nothing_and_replacing_by_what_was_read_neither(
    tapped: Tapped, plain: list[list[int]]
) -> None:
    recording = Recording()
    reads = [Tap(point=point, handler=recording) for point in POINTS]
    assert tapped.answers(reads, (), reads) == plain
    edits = []
    for point in POINTS:
        rows = recording.rows(PROMPTS[0], point)
        assert rows.positions_T.tolist() == list(range(len(plain[0]) - 1))
        edits.append(replace_values(point, rows.values_TD, range(len(rows.values_TD))))
    assert tapped.answers(edits, reads, ()) == plain


def test_ablating_attention_changes_the_answer_and_no_neighbour(
    tapped: Tapped, plain: list[list[int]]
) -> None:
    for layer in (0, 15):
        answers = tapped.answers((), [ablate(f"blocks.{layer}.attn.hook_z")], ())
        assert answers[1] != plain[1]
        assert (answers[0], answers[2]) == (plain[0], plain[2])


def test_what_the_final_norm_holds_decides_the_next_token(tapped: Tapped, plain: list[list[int]]) -> None:
    recording = Recording()
    tapped.answers([Tap(point=FINAL_NORM, handler=recording)], (), ())
    donor_1D = recording.rows(PROMPTS[0], FINAL_NORM).values_TD[len(tapped.encode(PROMPTS[0])) - 1 :][:1]
    at = len(tapped.encode(PROMPTS[1])) - 1
    answer = tapped.answers((), [replace_values(FINAL_NORM, donor_1D, (at,))], ())[1]
    assert answer[at + 1] == plain[0][len(tapped.encode(PROMPTS[0]))] != plain[1][at + 1]


def test_embeddings_of_related_texts_are_nearer(tapped: Tapped) -> None:
    texts = [
        "The cat sleeps on the warm windowsill.",
        "A kitten is napping by the window.",
        "The central bank raised interest rates by a quarter of a percent.",
        "Higher rates are meant to slow inflation.",
    ]
    rows_ND = tapped.embed(texts)
    near = rows_ND @ rows_ND.T
    assert near[0, 1] > max(near[0, 2], near[0, 3]) and near[2, 3] > max(near[0, 2], near[1, 2])
    for row_D, text in zip(rows_ND, texts, strict=True):
        np.testing.assert_array_equal(tapped.embed([text])[0], row_D)


def test_calibration_over_windows_sees_every_linear(tapped: Tapped) -> None:
    ids = tapped.encode(" ".join(PROMPTS) * 20)
    names = input_points(tapped.executor.plan)
    stats = calibrate(tapped.core, [ids[first : first + 64] for first in range(0, 256, 64)], names)
    assert len(stats) == 4 * 30 + 1
    for each in stats.values():
        assert each.num_rows == 256 and np.isfinite(each.abs_max_K).all()
        # To rounding, no square's mean is above the largest square.
        assert (each.mean_square_K <= each.abs_max_K.astype(np.float64) ** 2 * (1 + 1e-12)).all()
        assert each.mean_square_K.max() > 0
