"""The engine in this process: a model, compiled, with its tokenizer, and the step loop over requests.

Whoever drives it submits requests, calls `step` while there is work, and reads the states that it got: the
offline `LLM` in its own loop, the engine process between two looks at its socket. It belongs to one thread.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenmill.core import Grammar, Message, Request, SamplingParams, Tier, UsageError
from tokenmill.costs.power import PowerCounters
from tokenmill.engine.adapters import AdapterSlots
from tokenmill.engine.config import LLMConfig
from tokenmill.engine.core import CoreConfig, EngineCore, StepResult
from tokenmill.engine.counts import EngineCounts
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.embedding import EmbeddingRequest, EmbeddingState, Pooling
from tokenmill.engine.meter import Meter
from tokenmill.engine.sequence import TIER_DELAY_S, GenerationState, ScoringState, SequenceState
from tokenmill.engine.speculation.draft_model import DraftModel
from tokenmill.engine.speculation.history import SuffixProposer
from tokenmill.engine.speculation.ngram import NgramProposer
from tokenmill.engine.speculation.proposers import CombinedProposer, Proposer
from tokenmill.engine.step_time import ROW_TILE
from tokenmill.engine.structured.grammar import CheckedGrammar, GrammarCompiler
from tokenmill.engine.swap import SwapFile
from tokenmill.engine.taps.calibration import InputStats, calibrate
from tokenmill.engine.taps.routing import RoutingStats, routing
from tokenmill.engine.taps.tap import Tap
from tokenmill.kernels import KV_BLOCK, Executor, ExpertCacheStats, StepPlan
from tokenmill.models.chat.template import ChatTemplate, encode_chat
from tokenmill.models.packing.compile import ExecutorConfig, ExecutorFactory, create_executor
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["LocalEngine", "guide"]


class LocalEngine:
    """A compiled model and its step loop. `clock` returns seconds and never goes back.

    `draft` is a small model with the same vocabulary that guesses for this one. `counters` are those of the
    machine's energy, by which requests are charged.
    """

    def __init__(
        self,
        model: ModelDirectory,
        config: LLMConfig | None = None,
        *,
        create: ExecutorFactory = create_executor,
        draft: ModelDirectory | None = None,
        clock: Callable[[], float] = time.perf_counter,
        counters: PowerCounters | None = None,
    ) -> None:
        self.config = config or LLMConfig()
        self.num_blocks = self.config.num_blocks(model.architecture)
        executor = self._compile(model, create, self.num_blocks, self.config.max_adapters)
        self.plan: StepPlan = executor.plan
        self.tokenizer = model.tokenizer()
        self.adapters = AdapterSlots(executor, model.architecture, self.config.max_adapters)
        self._model = model
        self._core = EngineCore(
            executor,
            CoreConfig(
                num_blocks=self.num_blocks,
                max_sequences=self.config.max_batch,
                max_waiting=self.config.max_waiting,
                model=self._identity if self.config.prefix_cache else None,
                fast_step_s=self.config.fast_step_s,
                fast_ratio=self.config.fast_ratio,
                batch_step_s=self.config.batch_step_s,
                guesses_for=self.config.guesses_for,
            ),
            swap=self._swap_file(executor),
            proposer=self._proposer(create, draft),
            clock=clock,
            counters=counters,
        )

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together, that a request may have."""
        return self._model.architecture.max_positions

    @property
    def has_work(self) -> bool:
        """True if any submitted sequence is not finished."""
        return self._core.has_work

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks yet."""
        return len(self._core.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._core.scheduler.running)

    @property
    def num_blocks_in_use(self) -> int:
        """KV blocks that sequences hold; 0 without work."""
        return self._core.scheduler.pool.num_in_use

    @property
    def step_bound_s(self) -> float:
        """Seconds after which the step that runs now must be hanging. May be read from another thread."""
        return self._core.step_bound_s

    @property
    def counts(self) -> EngineCounts:
        """What was done since the start; it goes on counting."""
        return self._core.scheduler.counts

    def by_tier(self) -> tuple[dict[Tier, int], dict[Tier, int]]:
        """Sequences that run, and that wait, of each tier."""
        scheduler = self._core.scheduler
        queues = [Counter(state.tier for state in queue) for queue in (scheduler.running, scheduler.waiting)]
        running, waiting = ({tier: queue[tier] for tier in TIER_DELAY_S} for queue in queues)
        return running, waiting

    @property
    def meter(self) -> Meter:
        """What the engine's time and energy were charged for."""
        return self._core.meter

    @property
    def idle_ns(self) -> int:
        """Nanoseconds in which the engine had no work."""
        return self._core.meter.idle_ns(self._core.clock())

    def encode_chat(
        self,
        conversation: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt that the model's chat template makes of a conversation, ready for the answer.

        `tools` and `variables` as in `ChatTemplate.render`. Raises `UsageError` if the model has no
        template, or the template refuses the conversation.
        """
        if self._chat_template is None:
            raise UsageError("the model has no chat template", hint="it is a base model: use generate")
        return encode_chat(
            self.tokenizer, self._chat_template, conversation, tools=tools, variables=variables
        )

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA adapter, which requests then name. Errors as in `AdapterSlots.load`."""
        self.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises `NotFoundError` if it is not loaded, `UsageError` while it is used."""
        slot = self.adapters.find(name)
        scheduler = self._core.scheduler
        if any(state.adapter == slot for state in (*scheduler.running, *scheduler.waiting)):
            raise UsageError(f"requests are using the adapter {name!r}", hint="let them end first")
        self.adapters.unload(name)

    def check_grammar(self, grammar: Grammar, tenant: str = "") -> CheckedGrammar:
        """Compile a grammar, which may take two seconds, or find it compiled.

        May be called from another thread. Raises `UsageError` for a grammar that is wrong, `ResourceError`
        for one that costs too much.
        """
        return self._grammars.check(grammar, tenant)

    def find_grammar(self, grammar: Grammar, tenant: str = "") -> CheckedGrammar | None:
        """The grammar if it was compiled before, at once. Raises `UsageError` if it was refused then."""
        return self._grammars.find(grammar, tenant) if "_grammars" in self.__dict__ else None

    def submit(self, request: Request, taps: Sequence[Tap] = ()) -> tuple[GenerationState, ...]:
        """Queue a request; one state for each of its `n` completions.

        Raises `UsageError` for one that cannot be run, `NotFoundError` for an adapter that is not loaded,
        `ResourceError` if the cache could never hold it or the queue is full.
        """
        states = self.prepare(request, taps)
        self.submit_state(states[0])
        return states

    def prepare(self, request: Request, taps: Sequence[Tap] = ()) -> tuple[GenerationState, ...]:
        """The states of a request, checked and not submitted. Errors as in `submit`, but for the queue."""
        states = self.prepare_unguided(request, taps)
        if request.params.grammar is not None:
            guide(states, self.check_grammar(request.params.grammar, request.tenant))
        return states

    def prepare_unguided(self, request: Request, taps: Sequence[Tap] = ()) -> tuple[GenerationState, ...]:
        """As `prepare`, but for the grammar, which is for the caller to check and to `guide` them by."""
        self.check_tokens(request.prompt, "prompt", room=1)
        params = request.params
        if params.n > 1 and any(tap.intervention is None for tap in taps):
            raise UsageError(
                f"n is {params.n} for a request that is read", hint="read one completion at a time"
            )
        adapter = self.adapters.find(request.adapter)
        seed = secrets.randbelow(1 << 62) if params.seed is None else params.seed
        submitted_s = self._core.clock()
        states = [
            GenerationState(
                request,
                index=index,
                seed=_seed(seed, index),
                max_total=min(len(request.prompt) + params.max_tokens, self.context_length),
                detokenizer=Detokenizer(self._text_bytes, params.stop, params.min_tokens),
                end_token_ids=self._end_token_ids(params),
                bad_words=self._bad_words(params),
                submitted_s=submitted_s,
            )
            for index in range(params.n)
        ]
        for state in states:
            state.adapter, state.taps = adapter, tuple(taps)
        states[0].branch(states[1:])
        self._core.scheduler.check_fits(states[0])
        return tuple(states)

    def prepare_score(self, request_id: str, ids: Sequence[int], num_context: int) -> ScoringState:
        """The state of a text to be scored from token `num_context` on, checked and not submitted."""
        state = ScoringState(request_id, ids, num_context)
        self._core.scheduler.check_fits(state)
        return state

    def prepare_embedding(self, request_id: str, ids: Sequence[int], pooling: Pooling) -> EmbeddingState:
        """The state of a text to be embedded, checked and not submitted."""
        self.check_tokens(ids, "text", room=0)
        state = EmbeddingState(request_id, ids, pooling)
        self._core.scheduler.check_fits(state)
        return state

    def prepare_embeddings(self, request: EmbeddingRequest) -> tuple[EmbeddingState, ...]:
        """The states of a request's texts, checked and not submitted. Who drives them keeps the deadline."""
        now_s = self._core.clock()
        prepared = [
            self.prepare_embedding(request.request_id, ids, request.pooling) for ids in request.prompts
        ]
        for state in prepared:
            state.tenant, state.tier = request.tenant, request.tier
            state.rank_s = now_s + TIER_DELAY_S[request.tier]
            state.expires_s = None if request.timeout_s is None else now_s + request.timeout_s
        return tuple(prepared)

    def calibrate(
        self, windows: Iterable[Sequence[int]], points: Sequence[str], *, second_moment: bool = False
    ) -> Mapping[str, InputStats]:
        """Statistics of what the linears at these points read; see `calibration`."""
        return calibrate(self._core, windows, points, second_moment=second_moment)

    @property
    def expert_cache(self) -> ExpertCacheStats | None:
        """What the cache of experts did so far; None without one."""
        return self._core.expert_cache

    def routing(self, windows: Iterable[Sequence[int]]) -> Mapping[int, RoutingStats]:
        """How the tokens of windows are shared among the experts of each layer; see `routing`."""
        return routing(self._core, self.plan, windows)

    def submit_state(self, state: SequenceState) -> None:
        """Queue a prepared state.

        Raises `ResourceError` if the queue is full, `NotFoundError` if its adapter was unloaded since.
        """
        self.adapters.check(state.adapter)
        self._core.submit(state)

    def abort(self, state: SequenceState, reason: Literal["cancelled", "expired"] = "cancelled") -> None:
        """End it between two steps: blocks are free at once. No-op if it is finished.

        Before a request's first token this ends all of its completions, submitted or not.
        """
        self._core.abort(state, reason)

    def is_late(self, state: SequenceState) -> bool:
        """True if its time is up. A generation that is submitted ends by itself then."""
        return state.expires_s is not None and state.expires_s <= self._core.clock()

    def close(self) -> None:
        """End the process that compiles grammars, if there is one. The engine stays usable without them."""
        if "_grammars" in self.__dict__:
            self._grammars.close()

    def step(self) -> StepResult:
        """Compute one step."""
        return self._core.step()

    def check_integrity(self) -> None:
        """Assert that every KV block is free, cached, or held by a sequence that is not finished."""
        self._core.check_integrity()

    def check_tokens(self, ids: Sequence[int], what: str, *, room: int) -> None:
        """Raise `UsageError` unless these are tokens of the model that leave `room` in its context."""
        if not len(ids):
            raise UsageError(f"a {what} is empty", hint="give at least one token of text")
        if len(ids) + room > self.context_length:
            needs = " and needs room for an answer" if room else ""
            raise UsageError(
                f"a {what} has {len(ids)} tokens{needs}; the model's context is {self.context_length}",
                hint=f"shorten the {what}",
            )
        vocab_size = self._model.architecture.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UsageError(f"a {what} has a token id outside the vocabulary of {vocab_size}")

    def _compile(
        self, model: ModelDirectory, create: ExecutorFactory, num_blocks: int, max_adapters: int = 0
    ) -> Executor:
        config = ExecutorConfig(
            weights=self.config.weights,
            max_rows=self.config.max_rows,
            # Guesses need logits too: a small batch has room for a tile of them.
            max_out_rows=max(self.config.max_batch, ROW_TILE),
            num_blocks=num_blocks,
            num_threads=self.config.num_threads,
            kv_dtype=self.config.kv_dtype,
            max_adapters=max_adapters,
            expert_cache_bytes=self.config.expert_cache_bytes,
        )
        return create(model, config)

    def _swap_file(self, executor: Executor) -> SwapFile | None:
        num_slots = self.config.swap_tokens // KV_BLOCK
        if not num_slots:
            return None
        return SwapFile(self.config.swap_folder, num_slots, executor.block(0).nbytes)

    def _proposer(self, create: ExecutorFactory, draft: ModelDirectory | None) -> Proposer | None:
        proposers: list[Proposer] = []
        if self.config.speculation == "lookup":
            proposers += [NgramProposer(), SuffixProposer()]
        if draft is not None:
            num_blocks = self.config.num_blocks(draft.architecture)
            proposers.append(
                DraftModel(
                    self._compile(draft, create, num_blocks),
                    num_blocks=num_blocks,
                    context=draft.architecture.max_positions,
                    target_vocab_size=self._model.architecture.vocab_size,
                )
            )
        return CombinedProposer(proposers) if proposers else None

    @property
    def _identity(self) -> str:
        """What the model computes with, for prefix keys. Files without a manifest are not read for it."""
        model = self._model
        return f"{model.path if model.manifest is None else model.digest} {self.config.weights}"

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        architecture = self._model.architecture
        return GrammarCompiler(self.tokenizer, architecture.vocab_size, architecture.eos_token_ids)

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        return self._model.chat_template()

    def _end_token_ids(self, params: SamplingParams) -> frozenset[int]:
        vocab_size = self._model.architecture.vocab_size
        named = [*params.stop_token_ids, *(token_id for token_id, _ in params.logit_bias)]
        if any(token_id >= vocab_size for token_id in named):
            raise UsageError(
                f"token {max(named)} is outside the vocabulary of {vocab_size}",
                hint="look at stop_token_ids and logit_bias",
            )
        return frozenset(() if params.ignore_eos else self._model.architecture.eos_token_ids)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The token sequences of each bad word, at the start of a text and after a space."""
        forms = [form for word in params.bad_words for form in (word, " " + word.lstrip())]
        return tuple(dict.fromkeys(tuple(self.tokenizer.encode_after(form)) for form in forms))

    def _text_bytes(self, token_id: int) -> bytes:
        """The bytes of a token as text; a control token stands for none, as in `Tokenizer.decode`."""
        return b"" if self.tokenizer.is_special(token_id) else self.tokenizer.token_bytes(token_id)


def guide(states: Sequence[GenerationState], grammar: CheckedGrammar) -> None:
    """Make these completions, which have no token yet, follow a grammar."""
    for state in states:
        state.grammar = grammar.start()


def _seed(seed: int, index: int) -> int:
    """The seed of one completion of a request: the first has the request's own."""
    return (seed + index * 0x9E3779B97F4A7C15) % (1 << 63)
