"""How fast tokenmill trains, against a plain loop, in turns on the same machine.

    python -m scripts.train_speed smollm2-135m train.jsonl --steps 3 --rounds 2

The plain loop is what one writes first: float32 weights under autocast to bf16, short rows padded to the
longest of 32, logits for every token, AdamW over all parameters one by one. Both read the same examples and
take `--steps` steps a turn after one that is not counted; turns alternate (A B A B). A token counts if it
is no padding. What differs besides: ours takes `--tokens-per-step` tokens a step, the plain loop 32 rows.
Needs the extra `train`; DATA is what `tokenmill train` reads. With `--student` both train a random model of
4M parameters with a vocabulary of 4,096 on random tokens of the same lengths.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch
from torch.nn import functional

from tokenmill.core import Message
from tokenmill.models.architecture import Architecture, Layer
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library
from tokenmill.train import (
    ConversationEncoder,
    Example,
    TorchDecoder,
    TrainConfig,
    Trainer,
    make_row,
    peak_flops,
    plan_epoch,
    row_flops,
)
from tokenmill.train.losses import target_loss

__all__ = ["main"]

_PLAIN_ROWS = 32
_STUDENT_VOCABULARY = 4096

Turn = Callable[[int], tuple[int, float, float]]
"""Takes so many steps: real tokens, operations, seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in turns and print a line for each, and the ratio of the medians."""
    args = _arguments(argv)
    directory = Library().find(args.model)
    examples = _read(args.data, directory, args.limit)
    if args.student:
        examples = [_within(each) for each in examples]
    threads = torch.get_num_threads()
    turns = {"plain": _plain(_model(directory, args.student), examples)}
    config = TrainConfig(tokens_per_step=args.tokens_per_step)
    turns["ours"] = _ours(_model(directory, args.student), examples, config)
    peak = peak_flops(threads)
    print(f"{threads} threads, {peak / 1e12:.2f} TFLOP/s in bf16, {len(examples)} examples")
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn(1)
    for number in range(args.rounds):
        for name, turn in turns.items():
            tokens, flops, seconds = turn(args.steps)
            speeds[name].append(tokens / seconds)
            used = flops / seconds / peak
            print(f"{number} {name:5} {tokens / seconds:8.0f} tokens/s  {used:6.1%} of the peak", flush=True)
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    print(f"ours / plain: {medians['ours'] / medians['plain']:.2f}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=2000, help="examples to read")
    parser.add_argument("--student", action="store_true", help="a random model of 4M parameters instead")
    return parser.parse_args(argv)


def _read(path: Path, directory: ModelDirectory, limit: int) -> list[Example]:
    encoder = ConversationEncoder(directory)
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line)["messages"] for _, line in zip(range(limit), file, strict=False)]
    return [
        encoder.example([Message(role=each["role"], content=each["content"]) for each in messages])
        for messages in lines
    ]


def _within(example: Example) -> Example:
    return Example([token % _STUDENT_VOCABULARY for token in example.tokens], example.is_target)


def _model(directory: ModelDirectory, is_student: bool) -> TorchDecoder:
    if not is_student:
        return TorchDecoder.load(directory.architecture, directory.weights())
    torch.manual_seed(0)
    return TorchDecoder(_student(directory.architecture))


def _student(teacher: Architecture) -> Architecture:
    return replace(
        teacher,
        vocab_size=_STUDENT_VOCABULARY,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
        intermediate_size=768,
        layers=(Layer(),) * 4,
    )


def _ours(model: TorchDecoder, examples: list[Example], config: TrainConfig) -> Turn:
    lengths = [each.num_inputs for each in examples]
    plan = plan_epoch(
        lengths,
        tokens_per_step=config.tokens_per_step,
        tokens_per_row=config.tokens_per_row,
        seed=0,
        epoch=0,
    )
    steps = cycle(plan)
    trainer = Trainer(model, config, 1000)

    def turn(count: int) -> tuple[int, float, float]:
        tokens, flops, start = 0, 0.0, time.perf_counter()
        for _ in range(count):
            rows = [make_row(examples, each) for each in next(steps)]
            tokens += trainer.step(rows, target_loss).num_tokens
            flops += sum(row_flops(model.architecture, r.packed.lengths, len(r.rows_R)) for r in rows)
        return tokens, flops, time.perf_counter() - start

    return turn


def _plain(model: TorchDecoder, examples: list[Example]) -> Turn:
    batches = _batches(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def turn(count: int) -> tuple[int, float, float]:
        tokens, flops, start = 0, 0.0, time.perf_counter()
        for _ in range(count):
            batch = next(batches)
            longest = max(len(each.tokens) for each in batch)
            ids = torch.tensor([[*each.tokens] + [0] * (longest - len(each.tokens)) for each in batch])
            marks = [[*each.is_target] + [False] * (longest - len(each.tokens)) for each in batch]
            labels = torch.where(torch.tensor(marks), ids, -100)[:, 1:]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids)[:, :-1]
            loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            lengths = [each.num_inputs for each in batch]
            tokens += sum(lengths)
            flops += row_flops(model.architecture, lengths, sum(each.num_targets for each in batch))
        return tokens, flops, time.perf_counter() - start

    return turn


def _batches(examples: list[Example]) -> Iterator[list[Example]]:
    for start in cycle(range(0, max(1, len(examples) - _PLAIN_ROWS), _PLAIN_ROWS)):
        yield examples[start : start + _PLAIN_ROWS]


if __name__ == "__main__":
    sys.exit(main())
