"""A model without weights, for tests: known answers, at the speed of arithmetic, and faults on demand.

    model = MockModel(MockScript(answers=((b"2+2=", b"4"),)))
    llm = LLM(model, create=model.create)
    llm.generate(["2+2="], SamplingParams())[0].text                      # "4"

Everything above the executor is the real engine: scheduler, cache, sampler, detokenizer, process boundary.
Only the arithmetic is replaced. The logits of a row are a hash of the tokens before it, and the hash is
computed from what the row finds in the KV cache through its list of blocks: each slot keeps its token and a
digest of everything up to it. A wrong slot, block, position or row count, a block that was freed too early
or shared with another history, gives other tokens than `reference_tokens`, which knows no cache.

A `MockScript` sets exact answers, the duration of a step, and faults: rows that are not finite, a step that
raises or hangs, a process that exits. Tokens are bytes (`ByteTokenizer`), and text is rarely readable.

Not covered: taps (there is one operation before the final norm), adapters, speed of any real model.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tokenmill.core import NotFoundError, UsageError
from tokenmill.kernels import (
    KV_BLOCK,
    Attend,
    BufferName,
    F32Array,
    KvDtype,
    Norm,
    Op,
    PackedAdapter,
    PlanShape,
    Select,
    StepBatch,
    StepPlan,
)
from tokenmill.models.architecture import Architecture, Layer
from tokenmill.models.chat.template import ChatTemplate
from tokenmill.models.packing.compile import ExecutorConfig
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.text.byte_tokenizer import END_TEXT, END_TOKEN, ByteTokenizer
from tokenmill.models.weights import WeightSource

__all__ = [
    "MOCK_VOCAB_SIZE",
    "FaultKind",
    "MockClock",
    "MockExecutor",
    "MockFault",
    "MockModel",
    "MockScript",
    "mock_logits",
    "mock_plan",
    "reference_tokens",
]

MOCK_VOCAB_SIZE = 260
"""Bytes, the end token, and three ids that pad the vocabulary: never text, and never the best token."""

FaultKind = Literal["nan", "inf", "minus_inf", "raise", "hang", "exit"]

_PADDING_LOGIT = -32.0
_CERTAIN_LOGIT = 1e4
_HANG_S = 1e9
_EXIT_CODE = 70
_HIDDEN_SIZE = 8
_FINAL_NORM = "ln_final.hook_normalized"
_BAD_ROWS: dict[str, float] = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf}

_U64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class MockFault:
    """What goes wrong, and when: in the step with this number (1 is the executor's first), or in every
    step that computes a sequence whose tokens contain `marker`, one after the other.

    `nan` and `inf` set one logit, `minus_inf` all of them, in the rows concerned. `raise` raises
    RuntimeError in the step, `hang` never comes back from it, `exit` ends the process at once.

    The ids above the end token are markers that no text and no mock answer contains.
    """

    kind: FaultKind
    marker: tuple[int, ...] = ()
    at_step: int | None = None

    def __post_init__(self) -> None:
        if bool(self.marker) == (self.at_step is not None):
            raise UsageError("a fault needs a marker or a step", hint="give one of marker and at_step")


@dataclass(frozen=True, kw_only=True)
class MockScript:
    """What a mock model does. Two models of one script give the same logits, in any process.

    `answers` are pairs of token ids (or bytes): a prompt, and what follows it whatever the sampling
    parameters, then the end token. Of several prompts that fit, the longest counts. `endings` are the same
    for prompts that end in these tokens, so that a conversation can be answered whatever the template writes
    before. `template` is the chat template. A step takes `step_s` and `row_s` for each row, in seconds.
    `context_length` bounds prompt and answer together, in tokens.
    """

    seed: int = 0
    answers: tuple[tuple[tuple[int, ...] | bytes, tuple[int, ...] | bytes], ...] = ()
    step_s: float = 0.0
    row_s: float = 0.0
    faults: tuple[MockFault, ...] = ()
    context_length: int = 4096
    endings: tuple[tuple[tuple[int, ...] | bytes, tuple[int, ...] | bytes], ...] = ()
    template: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed is {self.seed}", hint="use a value from 0 to 2^63 - 1")
        if self.context_length < 2:
            raise UsageError(f"context_length is {self.context_length}", hint="use 2 or more")
        ids = {token for pair in (*self.answers, *self.endings) for tokens in pair for token in tokens}
        if not ids <= set(range(MOCK_VOCAB_SIZE)):
            raise UsageError("answers has a token id outside the vocabulary", hint="use bytes or END_TOKEN")

    def answer_after(self, tokens: Sequence[int]) -> int | None:
        """The scripted token after these; None if no answer was given, or the answer went another way."""
        best: tuple[int, int] | None = None
        for prompt, answer in self.answers:
            rest = list(tokens[len(prompt) :])
            fits = len(rest) <= len(answer) and list(tokens) == [*prompt, *answer[: len(rest)]]
            if fits and (best is None or len(prompt) > best[0]):
                best = len(prompt), answer[len(rest)] if len(rest) < len(answer) else END_TOKEN
        if best is None and self.endings:
            best = max(filter(None, (_after_ending(tokens, *pair) for pair in self.endings)), default=None)
        return None if best is None else best[1]


def _after_ending(
    tokens: Sequence[int], ending: Sequence[int], answer: Sequence[int]
) -> tuple[int, int] | None:
    """The length of an ending and the token after it; None if it is not there, or another answer follows."""
    text = "".join(map(chr, tokens))
    at = text.rfind("".join(map(chr, ending)))
    rest = tokens[at + len(ending) :]
    if at < 0 or len(rest) > len(answer) or list(rest) != list(answer[: len(rest)]):
        return None
    return len(ending), answer[len(rest)] if len(rest) < len(answer) else END_TOKEN


class MockExecutor:
    """An `Executor` whose cache holds two integers a slot. `sleep` takes the scripted time, in seconds.

    `num_steps` counts the steps begun.
    """

    def __init__(
        self,
        script: MockScript,
        *,
        num_blocks: int,
        max_rows: int,
        max_out_rows: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        final = Norm(src="y", weight=np.ones(_HIDDEN_SIZE, np.float32), eps=1e-5, act=None, name=_FINAL_NORM)
        self.plan = mock_plan(ops=(Attend(layer=0), Select(), final))
        self.kv_dtype: KvDtype = "bf16"
        self.script = script
        self.max_rows = max_rows
        self.max_out_rows = max_out_rows
        self.num_blocks = num_blocks
        self.num_steps = 0
        self._sleep = sleep
        # Of each slot: its token + 1 (0 is a slot never written), and the digest of the tokens up to it.
        self._kv = np.zeros((num_blocks, KV_BLOCK, 2), np.uint64)
        self._logits = np.zeros((max_out_rows, MOCK_VOCAB_SIZE), np.float32)
        self._hidden = np.zeros((max_out_rows, _HIDDEN_SIZE), np.float32)

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        """Run operations [first, last) of the plan: the first fills the cache, the head makes logits, or only
        the final norm where it ends before them.
        """
        self._logits[:] = np.nan
        view = _View.of(batch)
        if first == 0:
            self.num_steps += 1
            if duration := self.script.step_s + self.script.row_s * batch.num_rows:
                self._sleep(duration)
            self._store(batch, view)
        self._fail(batch, view)
        if last is None:
            self._head(batch, view)
        elif last == len(self.plan.ops):
            keys = self._keys(batch, view)
            self._hidden[: len(keys)] = _logits_of(keys, self.script.seed)[:, :_HIDDEN_SIZE]

    def buffer(self, name: BufferName) -> F32Array:
        """The logits [max_out_rows, V], or as y the final norm [max_out_rows, D]; both say what rows see."""
        assert name in ("logits", "y"), f"the mock has no {name}"
        return self._logits if name == "logits" else self._hidden

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination), in order."""
        for source, destination in pairs:
            self._kv[destination] = self._kv[source]

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of one block, a live view: to move it out of the cache and back."""
        block: npt.NDArray[np.uint8] = self._kv[index].reshape(-1).view(np.uint8)
        return block

    def set_adapter(self, slot: int, adapter: PackedAdapter | None) -> None:
        """Raises ValueError: the mock has no slots."""
        raise ValueError("adapter slot out of range")

    def _store(self, batch: StepBatch, view: "_View") -> None:
        """Write each row's token, and the digest of it and all before it, which the cache must know."""
        assert 0 < batch.num_rows <= self.max_rows, f"{batch.num_rows} rows"
        assert len(set(batch.kv_slots.tolist())) == batch.num_rows, "two rows write one slot"
        sequences = view.sequences_of(batch, np.arange(batch.num_rows))
        first_rows = batch.row_starts[:-1]
        steps = batch.positions - batch.positions[first_rows][sequences]
        assert np.array_equal(steps, np.arange(batch.num_rows) - first_rows[sequences]), "rows out of order"
        flat = self._kv.reshape(-1, 2)
        before = view.slots[np.maximum(view.starts[:-1] + batch.positions[first_rows] - 1, 0)]
        digests = np.where(batch.positions[first_rows] > 0, flat[before, 1], np.uint64(0))
        sums = np.cumsum(_mix(batch.tokens, batch.positions))
        sums_before = np.concatenate([np.zeros(1, np.uint64), sums])[first_rows]
        flat[batch.kv_slots, 0] = batch.tokens + 1
        flat[batch.kv_slots, 1] = (digests - sums_before)[sequences] + sums

    def _head(self, batch: StepBatch, view: "_View") -> None:
        keys = self._keys(batch, view)
        self._logits[: len(keys)] = _logits_of(keys, self.script.seed)
        seen = self._kv.reshape(-1, 2)[view.slots]
        starts = view.starts[view.sequences_of(batch, batch.out_rows)]
        stops = starts + batch.positions[batch.out_rows] + 1
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            _script_row(self._logits[index], seen[start:stop], self.script, self.num_steps)

    def _keys(self, batch: StepBatch, view: "_View") -> _U64Array:
        """What each row that goes through the head sees through the cache, as one number."""
        assert 0 < len(batch.out_rows) <= self.max_out_rows, f"{len(batch.out_rows)} rows with logits"
        starts = view.starts[view.sequences_of(batch, batch.out_rows)]
        stops = starts + batch.positions[batch.out_rows] + 1
        digests = self._kv.reshape(-1, 2)[view.slots][:, 1]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(digests, view.positions))])
        keys: _U64Array = sums[stops] - sums[starts]
        return keys

    def _fail(self, batch: StepBatch, view: "_View") -> None:
        """Do what the script says must go wrong in this step as a whole."""
        faults = [fault for fault in self.script.faults if fault.kind not in _BAD_ROWS]
        if not faults:
            return
        seen = self._kv.reshape(-1, 2)[view.slots]
        sequences = [seen[start:stop] for start, stop in pairwise(view.starts)]
        for fault in faults:
            if not any(_applies(fault, each, self.num_steps) for each in sequences):
                continue
            if fault.kind == "exit":
                os._exit(_EXIT_CODE)
            if fault.kind == "hang":
                self._sleep(_HANG_S)
            raise RuntimeError("the mock was told to fail")


class MockClock:
    """Seconds that pass only when the mock computes: give it as `clock`, and its `sleep` to the model."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """The seconds so far."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


class MockModel(ModelDirectory):
    """What `LLM` takes as a model, without a folder; give it `create=model.create` too.

    `template` is the chat template, if there is to be another one than the script's. `sleep` is that of the
    executor, which is kept as `executor` once it is made.
    """

    executor: MockExecutor

    def __init__(
        self,
        script: MockScript | None = None,
        *,
        template: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.script = script or MockScript()
        self._template = template or self.script.template
        self._sleep = sleep
        super().__init__(Path("mock"), _mock_architecture(self.script.context_length), manifest=None)

    @cached_property
    def digest(self) -> str:
        """The identity of the script."""
        return hashlib.sha256(repr(self.script).encode()).hexdigest()

    def tokenizer(self) -> ByteTokenizer:
        """One token a byte."""
        return ByteTokenizer()

    def chat_template(self) -> ChatTemplate | None:
        """The template that was given, each time the same."""
        return self._chat_template

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        return ChatTemplate(self._template, eos_token=END_TEXT) if self._template else None

    def weights(self) -> WeightSource:
        """Raises NotFoundError: there are none."""
        raise NotFoundError("the mock model has no weights", hint="give `create=model.create` to the engine")

    def create(self, directory: ModelDirectory, config: ExecutorConfig) -> MockExecutor:
        """Make the executor: the factory to give to `LLM`. Formats and threads mean nothing here."""
        self.executor = MockExecutor(
            self.script,
            num_blocks=config.num_blocks,
            max_rows=config.max_rows,
            max_out_rows=config.max_out_rows,
            sleep=self._sleep,
        )
        return self.executor


def mock_logits(tokens: Sequence[int], script: MockScript | None = None) -> F32Array:
    """Logits [V] after these tokens, computed without any cache."""
    script = script or MockScript()
    ids, positions = np.array(tokens, np.int64), np.arange(len(tokens))
    digests = np.cumsum(_mix(ids, positions))
    logits: F32Array = _logits_of(_mix(digests, positions).sum(keepdims=True), script.seed)[0]
    seen = np.stack([(ids + 1).astype(np.uint64), digests], axis=1)
    _script_row(logits, seen, replace(script, faults=()), 0)
    return logits


def reference_tokens(
    prompt: Sequence[int],
    max_tokens: int,
    script: MockScript | None = None,
    *,
    ignore_eos: bool = False,
) -> list[int]:
    """The greedy answer to a prompt, computed from scratch for every token: what the engine must give.

    It ends with `END_TOKEN` unless that is ignored, or where `max_tokens` or the script's context length is
    reached. Faults of the script are left out.
    """
    script = script or MockScript()
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, script.context_length):
        tokens.append(int(np.argmax(mock_logits(tokens, script))))
        if tokens[-1] == END_TOKEN and not ignore_eos:
            break
    return tokens[len(prompt) :]


class _View(NamedTuple):
    """What the sequences of a batch see: slots in order of position, those of sequence `s` at
    [starts[s], starts[s + 1])."""

    slots: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, batch: StepBatch) -> "_View":
        """Follow the lists of blocks."""
        assert batch.blocks.shape == (batch.block_starts[-1], 3), "the lists of blocks do not add up"
        block_B, first_B, rows_B = batch.blocks.astype(np.int64).T
        places_P = np.arange(KV_BLOCK)
        used_BP = places_P < rows_B[:, None]
        sequence_B = np.repeat(np.arange(len(batch.block_starts) - 1), np.diff(batch.block_starts))
        sequences = np.repeat(sequence_B, rows_B)
        positions = (first_B[:, None] + places_P)[used_BP]
        order = np.lexsort((positions, sequences))
        lengths = np.bincount(sequences, minlength=len(batch.block_starts) - 1)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        positions = positions[order]
        dense = np.arange(len(positions)) - np.repeat(starts[:-1], lengths)
        assert np.array_equal(positions, dense), "a position is missing or there twice"
        return cls((block_B[:, None] * KV_BLOCK + places_P)[used_BP][order], positions, starts)

    def sequences_of(self, batch: StepBatch, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """The sequence of each of these rows."""
        return np.searchsorted(batch.row_starts, rows, side="right") - 1


def _logits_of(keys_L: _U64Array, seed: int) -> F32Array:
    """Logits [L, V], one row a key."""
    keys_LV = np.broadcast_to((keys_L + np.uint64(seed))[:, None], (len(keys_L), MOCK_VOCAB_SIZE))
    bits_LV = _mix(keys_LV, np.arange(MOCK_VOCAB_SIZE)) >> np.uint64(40)
    logits_LV: F32Array = bits_LV.astype(np.float32) * np.float32(2.0**-20) - np.float32(8.0)
    logits_LV[:, END_TOKEN + 1 :] = _PADDING_LOGIT
    return logits_LV


def _script_row(logits_V: F32Array, seen: _U64Array, script: MockScript, step: int) -> None:
    """Write over a row what the script says of the tokens that it sees."""
    if script.answers or script.endings:
        token = script.answer_after((seen[:, 0].astype(np.int64) - 1).tolist())
        if token is not None:
            logits_V[:] = 0.0
            logits_V[token] = _CERTAIN_LOGIT
    for fault in script.faults:
        if fault.kind in _BAD_ROWS and _applies(fault, seen, step):
            logits_V[slice(None) if fault.kind == "minus_inf" else 3] = _BAD_ROWS[fault.kind]


def _applies(fault: MockFault, seen: _U64Array, step: int) -> bool:
    """Whether it is the fault's step, or its marker is among the tokens seen."""
    if fault.at_step is not None:
        return fault.at_step == step
    tokens = seen[:, 0].astype("<u4").tobytes()
    marker = (np.array(fault.marker) + 1).astype("<u4").tobytes()
    at = tokens.find(marker)
    while at % 4 and at >= 0:
        at = tokens.find(marker, at + 1)
    return at >= 0


def _mix(values: npt.NDArray[np.generic], places: npt.NDArray[np.generic]) -> _U64Array:
    """64 well-mixed bits of each pair (the finaliser of SplitMix64)."""
    bits: _U64Array = values.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    bits = bits + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _mock_architecture(max_positions: int) -> Architecture:
    return Architecture(
        family="llama",
        vocab_size=MOCK_VOCAB_SIZE,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=max_positions,
        tied_embeddings=True,
        bos_token_id=None,
        eos_token_ids=(END_TOKEN,),
        layers=(Layer(),),
    )


def mock_plan(
    vocab_size: int = MOCK_VOCAB_SIZE, ops: tuple[Op, ...] = (Attend(layer=0), Select())
) -> StepPlan:
    """A plan of the smallest sizes; by default a body of one operation and a head of one."""
    shape = PlanShape(
        hidden_size=_HIDDEN_SIZE,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        vocab_size=vocab_size,
        num_layers=1,
        softmax_scale=1.0,
        cos=np.ones((1, 4), np.float32),
        sin=np.zeros((1, 4), np.float32),
    )
    return StepPlan(shape=shape, ops=ops)
