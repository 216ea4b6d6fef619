"""What is sent: lengths that are fixed, or those of a trace, or prompts of the user's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill.core import UsageError
from tokenmill.evals.load.prompts import PromptMaker, read_prompts
from tokenmill.evals.load.servegen import draw_calls, read_clients
from tokenmill.evals.load.target import LoadRequest
from tokenmill.evals.load.traces import Call, fit_context, read_trace, scaled_lengths
from tokenmill.models.text.tokenizer import Tokenizer

__all__ = ["Workload", "WorkloadConfig", "read_workload"]

_MAX_REQUESTS = 1 << 20
_LEVEL_SEEDS = 1 << 12


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """Which requests: `num_requests`, warm-up included.

    Lengths are `num_input` and `num_output` tokens; or those of `trace` (a file, or a folder of ServeGen's
    clients, drawn at `start_s` of their statistics), multiplied by `length_scale`; or prompts are those of
    the file `prompts`, again from its start when it ends, with `num_output` tokens each.
    """

    num_requests: int
    num_input: int = 128
    num_output: int = 64
    trace: Path | None = None
    prompts: Path | None = None
    length_scale: float = 1.0
    start_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_requests <= _MAX_REQUESTS:
            raise UsageError(f"{self.num_requests} requests", hint=f"use a value from 1 to {_MAX_REQUESTS}")
        if self.trace is not None and self.prompts is not None:
            raise UsageError("a trace and prompts", hint="give one of the two")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Calls in order, or texts. `num_left_out` calls of the trace did not fit into the context."""

    config: WorkloadConfig
    calls: tuple[Call, ...]
    texts: tuple[str, ...] = ()
    num_left_out: int = 0

    @property
    def has_times(self) -> bool:
        """Whether the calls were recorded with their times."""
        return bool(self.calls) and self.calls[0].at_s is not None

    def requests(self, level: int, tokenizer: Tokenizer | None, *, ignore_eos: bool) -> Sequence[LoadRequest]:
        """The requests of a level. Texts that are made differ from level to level, so that none is cached."""
        seed = self.config.seed * _LEVEL_SEEDS + level
        maker = PromptMaker(tokenizer, seed=seed, ignore_eos=ignore_eos)
        if self.texts:
            texts, num_output = self.texts, self.config.num_output
            numbers = range(self.config.num_requests)
            return [maker.given(number, texts[number % len(texts)], num_output) for number in numbers]
        return [maker.request(number, call) for number, call in enumerate(self.calls)]


def read_workload(config: WorkloadConfig, *, context_length: int | None) -> Workload:
    """The workload of a config, with what fits into the context. Raises UsageError, NotFoundError."""
    num = config.num_requests
    if config.prompts is not None:
        return Workload(config=config, calls=(), texts=read_prompts(config.prompts))
    if config.trace is None:
        call = Call(at_s=None, num_input_tokens=config.num_input, num_output_tokens=config.num_output)
        calls: tuple[Call, ...] = (call,) * num
    elif config.trace.is_dir():
        clients = read_clients(config.trace)
        calls = draw_calls(clients, start_s=config.start_s, num_calls=num, seed=config.seed)
    else:
        calls = read_trace(config.trace)
    scaled = scaled_lengths(calls, config.length_scale)
    fitting = scaled if context_length is None else fit_context(scaled, context_length)
    if not fitting:
        raise UsageError(
            f"no request fits into the context of {context_length} tokens",
            hint="use shorter --input and --output, or --length-scale",
        )
    taken = fitting[:num]
    num_left_out = len(scaled) - len(fitting) if len(fitting) <= num else _skipped(scaled, taken)
    return Workload(config=config, calls=taken, num_left_out=num_left_out)


def _skipped(calls: Sequence[Call], taken: Sequence[Call]) -> int:
    """How many calls lie before the last one taken without being taken."""
    last = next(at for at, call in enumerate(calls) if call is taken[-1])
    return max(0, last + 1 - len(taken))
