"""A model without weights: logits are a hash of the tokens that a row can see through the KV cache.

The fake executor stores tokens in cache slots and reads them back through the block lists, so a wrong
slot, block, position or row count gives other tokens than `reference_tokens`, which knows no cache. A token
is stored together with the adapter that it was computed with.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from tokenmill.core import Message
from tokenmill.engine.mock import mock_plan
from tokenmill.kernels import (
    KV_BLOCK,
    BufferName,
    F32Array,
    KvDtype,
    PackedAdapter,
    StepBatch,
    StepPlan,
)
from tokenmill.models.architecture import Architecture, Layer
from tokenmill.models.chat.template import ChatTemplate
from tokenmill.models.packing.compile import ExecutorConfig
from tokenmill.models.store.directory import ModelDirectory

__all__ = [
    "EOS",
    "VOCAB",
    "FakeExecutor",
    "FakeModel",
    "FakeTokenizer",
    "adapter_key",
    "conversation",
    "fake_adapter",
    "fake_hash",
    "fake_logits",
    "fake_model",
    "fake_plan",
    "reference_tokens",
]

EOS = 256
VOCAB = 260


class FakeExecutor:
    """An `Executor` over integers. `steps` records each batch; `fail_at` raises in the n-th run."""

    def __init__(self, *, num_blocks: int, max_rows: int, max_out_rows: int, max_adapters: int = 0) -> None:
        self.plan = fake_plan()
        self.max_rows = max_rows
        self.max_out_rows = max_out_rows
        self.kv_dtype: KvDtype = "bf16"
        self.num_threads: int | None = None
        self.num_blocks = num_blocks
        self.steps: list[StepBatch] = []
        self.num_body_runs = 0
        self.fail_at: dict[int, BaseException] = {}
        self.nan_hashes: set[int] = set()
        self.adapters: list[PackedAdapter | None] = [None] * max_adapters
        self._kv = np.zeros(num_blocks * KV_BLOCK, np.int64)
        self._x = np.zeros(max_rows, np.uint64)
        self._logits = np.zeros((max_out_rows, VOCAB), np.float32)

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        # A copy: who runs the next step may use the same arrays.
        self.steps.append(deepcopy(batch))
        self._logits[:] = np.nan
        if len(self.steps) in self.fail_at:
            raise self.fail_at[len(self.steps)]
        if first == 0:
            self.num_body_runs += 1
            self._body(batch)
        if last is None:
            assert 0 < len(batch.out_rows) <= self.max_out_rows
            for index, row in enumerate(batch.out_rows):
                self._logits[index] = _logits_of(int(self._x[row]))
                if int(self._x[row]) in self.nan_hashes:
                    self._logits[index, 3] = np.nan

    def buffer(self, name: BufferName) -> F32Array:
        assert name == "logits"
        return self._logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.block(target)[:] = self.block(source)

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        if not 0 <= index < self.num_blocks:
            raise ValueError("KV block out of range")
        return self._kv[index * KV_BLOCK : (index + 1) * KV_BLOCK].view(np.uint8)

    def set_adapter(self, slot: int, adapter: PackedAdapter | None) -> None:
        if not 0 <= slot < len(self.adapters):
            raise ValueError("adapter slot out of range")
        self.adapters[slot] = adapter

    def _adapter_key(self, batch: StepBatch, sequence: int) -> int:
        slot = int(batch.adapters[sequence]) if len(batch.adapters) else -1
        if slot == -1:
            return 0
        adapter = self.adapters[slot]
        assert slot >= 0 and adapter is not None, "a slot that holds no adapter"
        return adapter_key(adapter.digest)

    def _body(self, batch: StepBatch) -> None:
        assert 0 < batch.num_rows <= self.max_rows
        assert batch.blocks.shape == (batch.block_starts[-1], 3)
        assert len(batch.adapters) in (0, len(batch.row_starts) - 1)
        arrays = (batch.tokens, batch.positions, batch.kv_slots, batch.blocks, batch.out_rows, batch.adapters)
        for values in arrays:
            assert values.dtype == np.int32 and values.flags.c_contiguous
        assert len(set(batch.kv_slots.tolist())) == batch.num_rows, "two rows write one slot"
        for s in range(len(batch.row_starts) - 1):
            rows_of_s = slice(batch.row_starts[s], batch.row_starts[s + 1])
            stored = batch.tokens[rows_of_s] + self._adapter_key(batch, s)
            self._kv[batch.kv_slots[rows_of_s]] = stored
        for s in range(len(batch.row_starts) - 1):
            entries = batch.blocks[batch.block_starts[s] : batch.block_starts[s + 1]]
            slots = np.concatenate([block * KV_BLOCK + np.arange(rows) for block, _, rows in entries])
            positions = np.concatenate([first + np.arange(rows) for _, first, rows in entries])
            for row in range(batch.row_starts[s], batch.row_starts[s + 1]):
                seen = positions <= batch.positions[row]
                self._x[row] = _hash(self._kv[slots[seen]], positions[seen], int(batch.positions[row]))


class FakeTokenizer:
    """One token a byte, and one control token."""

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        return list(text.encode())

    def encode_after(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(i) for i in ids if not self.is_special(i)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return b"<end>" if token_id == EOS else bytes([token_id]) if token_id < 256 else b""

    def is_special(self, token_id: int) -> bool:
        return token_id == EOS

    @property
    def special_tokens(self) -> dict[str, int]:
        return {"<end>": EOS}

    def encode_marked(self, text: str, mark: str) -> list[int]:
        return self.encode(text.replace(mark, ""))


class FakeModel:
    """What `LLM` asks of a model directory, and the executor that it was compiled to."""

    manifest = None
    path = Path("fake")

    def __init__(self, max_positions: int, template: str = "") -> None:
        self.template = template
        self.architecture = Architecture(
            family="llama",
            vocab_size=VOCAB,
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
            eos_token_ids=(EOS,),
            layers=(Layer(),),
        )
        self.executor: FakeExecutor | None = None

    def tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer()

    def chat_template(self) -> ChatTemplate | None:
        return ChatTemplate(self.template) if self.template else None

    def create(self, directory: ModelDirectory, config: ExecutorConfig) -> FakeExecutor:
        """The executor factory to give to `LLM`."""
        self.executor = FakeExecutor(
            num_blocks=config.num_blocks,
            max_rows=config.max_rows,
            max_out_rows=config.max_out_rows,
            max_adapters=config.max_adapters,
        )
        self.executor.num_threads = config.num_threads
        self.executor.kv_dtype = config.kv_dtype
        return self.executor


def fake_model(fake: FakeModel) -> ModelDirectory:
    """The fake where a `ModelDirectory` is asked for."""
    return cast(ModelDirectory, fake)


def fake_plan() -> StepPlan:
    """A body of one operation, and a head of one."""
    return mock_plan(VOCAB)


def fake_adapter(digest: str) -> PackedAdapter:
    """An adapter whose only content is its digest (hexadecimal digits)."""
    return PackedAdapter(digest=digest, linears={})


def adapter_key(digest: str) -> int:
    """What a token differs by if computed with an adapter, by the start of its digest; 0 for none."""
    return int(digest[:4], 16) * 1024 + 512 if digest else 0


def fake_logits(tokens: Sequence[int], adapter: str = "") -> F32Array:
    """Logits [V] after these tokens, without any cache. `adapter` is a digest."""
    return _logits_of(fake_hash(tokens, adapter))


def fake_hash(tokens: Sequence[int], adapter: str = "") -> int:
    """What the last of these tokens sees."""
    keys = np.array(tokens, np.int64) + adapter_key(adapter)
    return _hash(keys, np.arange(len(tokens)), len(tokens) - 1)


def reference_tokens(
    prompt: Sequence[int], max_tokens: int, *, context: int = 1 << 30, adapter: str = ""
) -> list[int]:
    """The greedy answer, computed from scratch for every token."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, context):
        tokens.append(int(np.argmax(fake_logits(tokens, adapter))))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def conversation(text: str) -> list[Message]:
    """One user message."""
    return [Message(role="user", content=text)]


def _hash(tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], position: int) -> int:
    """A sum of mixed (token, position) pairs: each pair counts once, whatever block it lies in."""
    pairs: npt.NDArray[np.uint64] = (tokens.astype(np.uint64) + np.uint64(1)) << np.uint64(32)
    pairs = pairs ^ positions.astype(np.uint64)
    mixed = (pairs ^ (pairs >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (int(mixed.sum()) + position * 0x94D049BB133111EB) % (1 << 64)


def _logits_of(key: int) -> F32Array:
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(VOCAB, np.float32) * 3
