"""An engine over random small models, and sequences to put through it, for the tests of taps."""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from tests.fast.random_plan import make_plan
from tokenmill.core import Request, SamplingParams
from tokenmill.engine.core import CoreConfig, EngineCore
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.embedding import EmbeddingState, Pooling
from tokenmill.engine.sequence import GenerationState, ScoringState, SequenceState
from tokenmill.engine.taps import (
    Tap,
    TapHandler,
)
from tokenmill.kernels import (
    BufferName,
    Executor,
    F32Array,
    NumpyExecutor,
    PackedAdapter,
    StepBatch,
    StepPlan,
    available_isas,
    create_executor,
)

ISAS = available_isas()
NATIVE = ISAS[0]
NUM_BLOCKS = 12
HIDDEN, VOCAB = 96, 203
MID, POST = "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"


@cache
def small_plan() -> StepPlan:
    """The plan that is meant where none is given."""
    return make_plan("i8c", seed=3)


class Watched:
    """An executor that notes every run's (first, last)."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.plan = executor.plan
        self.max_rows = executor.max_rows
        self.max_out_rows = executor.max_out_rows
        self.kv_dtype = executor.kv_dtype
        self.runs: list[tuple[int, int | None]] = []

    def run(self, batch: StepBatch, first: int = 0, last: int | None = None) -> None:
        self.runs.append((first, last))
        self._executor.run(batch, first, last)

    def buffer(self, name: BufferName) -> F32Array:
        return self._executor.buffer(name)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._executor.copy_blocks(pairs)

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        return self._executor.block(index)

    def set_adapter(self, slot: int, adapter: PackedAdapter | None) -> None:
        self._executor.set_adapter(slot, adapter)


def executor(
    isa: str = NATIVE, *, plan: StepPlan | None = None, max_rows: int = 64, max_out_rows: int = 8
) -> Watched:
    plan = plan or small_plan()
    if isa == "numpy":
        made: Executor = NumpyExecutor(
            plan, max_rows=max_rows, max_out_rows=max_out_rows, num_blocks=NUM_BLOCKS, ordered=True
        )
    else:
        made = create_executor(
            plan,
            max_rows=max_rows,
            max_out_rows=max_out_rows,
            num_blocks=NUM_BLOCKS,
            num_threads=1,
            isa=isa,
        )
    return Watched(made)


def tokens(seed: int, count: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, VOCAB, count)]


def engine(watched: Executor, num_blocks: int = NUM_BLOCKS, *, prefix_cache: bool = False) -> EngineCore:
    model = "" if prefix_cache else None
    config = CoreConfig(num_blocks=num_blocks, max_sequences=watched.max_out_rows, model=model)
    return EngineCore(watched, config)


def generation(name: str, prompt: Sequence[int], num_tokens: int, *taps: Tap) -> GenerationState:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    state = GenerationState(
        Request(request_id=name, prompt=tuple(prompt), params=params),
        index=0,
        seed=0,
        max_total=len(prompt) + num_tokens,
        detokenizer=Detokenizer(lambda _: b"", ()),
        end_token_ids=frozenset(),
        submitted_s=0.0,
    )
    state.taps = taps
    return state


def scoring(name: str, ids: Sequence[int], *taps: Tap) -> ScoringState:
    state = ScoringState(name, ids, 1)
    state.taps = taps
    return state


def embedding(name: str, ids: Sequence[int], pooling: Pooling, *taps: Tap) -> EmbeddingState:
    state = EmbeddingState(name, ids, pooling)
    state.taps = taps
    return state


def drive(core: EngineCore, states: Iterable[SequenceState]) -> int:
    """Run to the end; how many preemptions it took."""
    for state in states:
        core.submit(state)
    num_preempted = 0
    while core.has_work:
        num_preempted += core.step().stats.num_preempted
    return num_preempted


def read(point: str, handler: TapHandler) -> Tap:
    return Tap(point=point, handler=handler)
