"""What is compared: the systems with their settings, and the rows that they are measured in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from tokenmill.models.store.export import GgufType

__all__ = ["ROWS", "SYSTEMS", "Isa", "Row", "Run", "System", "for_isa", "runs"]

Source: TypeAlias = Literal["directory", "model.gguf"] | GgufType
Isa: TypeAlias = Literal["amx", "avx512", "avx2"]


@dataclass(frozen=True, kw_only=True)
class System:
    """One line of the table: a system with one format of the weights.

    `environment` is empty for tokenmill's own. `source` is what it reads: the model directory, the GGUF file
    that was pulled, or one that tokenmill exports. `options` go to its runner.
    """

    key: str
    environment: str
    runner: str
    weights: str
    kv: str
    source: Source
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether it is tokenmill."""
        return not self.environment


@dataclass(frozen=True, kw_only=True)
class Run:
    """`batch` prompts of `prompt` tokens at once, then `output` tokens of each."""

    batch: int
    prompt: int
    output: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: a phase of a run, in tokens a second."""

    key: str
    title: str
    run: Run
    phase: Literal["prefill", "decode"]


def _own(key: str, weights: str, kv: str = "bf16") -> System:
    return System(
        key=f"tokenmill-{key}",
        environment="",
        runner="tokenmill_runner",
        weights=weights,
        kv=kv,
        source="directory",
        options={"weights": weights, "kv_dtype": kv},
    )


def _llama_cpp(weights: str, source: Source) -> System:
    return System(
        key=f"llamacpp-{weights.lower()}",
        environment="llamacpp",
        runner="llamacpp_runner",
        weights=weights,
        kv="f16",
        source=source,
    )


SYSTEMS: tuple[System, ...] = (
    _own("w8a8", "w8a8"),
    _own("w8a8-kv8", "w8a8", "int8"),
    _own("w4a8", "w4a8"),
    _own("bf16", "bf16"),
    _llama_cpp("Q8_0", "q8_0"),
    _llama_cpp("Q4_1", "model.gguf"),
    _llama_cpp("Q4_0", "q4_0"),
    System(
        key="openvino-int8",
        environment="openvino",
        runner="openvino_runner",
        weights="int8",
        kv="u8",
        source="f16",
    ),
    System(
        key="transformers-bf16",
        environment="transformers",
        runner="transformers_runner",
        weights="bf16",
        kv="bf16",
        source="directory",
    ),
)

_BATCH_32 = Run(batch=32, prompt=128, output=64)
ROWS: tuple[Row, ...] = (
    Row(
        key="prefill-512",
        title="prefill 512",
        run=Run(batch=1, prompt=512, output=1),
        phase="prefill",
    ),
    Row(key="prefill-32x128", title="prefill 32 x 128", run=_BATCH_32, phase="prefill"),
    Row(
        key="decode-1",
        title="decode, batch 1",
        run=Run(batch=1, prompt=128, output=64),
        phase="decode",
    ),
    Row(key="decode-32", title="decode, batch 32", run=_BATCH_32, phase="decode"),
    Row(
        key="decode-64",
        title="decode, batch 64",
        run=Run(batch=64, prompt=128, output=64),
        phase="decode",
    ),
)


def for_isa(systems: Sequence[System], isa: Isa | None) -> tuple[System, ...]:
    """The systems that can be held to an instruction set, in the environment that is: ours and llama.cpp.

    `amx` and None leave every system to the best it finds.
    """
    if isa is None or isa == "amx":
        return tuple(systems)
    return tuple(
        system if system.is_own else replace(system, environment=f"{system.environment}-{isa}")
        for system in systems
        if system.is_own or system.environment == "llamacpp"
    )


def runs(rows: Sequence[Row]) -> list[Run]:
    """The runs that give these rows, each once, in order."""
    return list(dict.fromkeys(row.run for row in rows))
