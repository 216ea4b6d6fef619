"""Guessing from what was seen before, against plain decoding, per kind of work.

    python -m scripts.speculation [--data DIR] [--work NAME ...] [--tune] [--write]

`DIR` holds public test sets, one folder each (humaneval, snips, news_summaries, mt_bench); a kind of work
whose set is not there is said to be missing, and nothing of a set is kept. Every round makes two engines, one
that guesses and one that does not, with nothing remembered, and gives every prompt to both, in turns of who
is first; one stream, greedy, tokens compared. Rows are split by a hash of their text: with `--tune` the half
to tune on is measured, else the other, which is the one to report.
"""

import argparse
import gzip
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from scripts.performance_page import PAGE, fill, markdown_table, merge_rows, section, today
from tokenmill.core import Completion, Message, SamplingParams
from tokenmill.engine import LLM, LLMConfig
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.library import Library

__all__ = ["HEADER", "WORKS", "Pair", "Round", "Work", "main", "row_cells", "split"]

HEADER: Final = (
    "work",
    "plain, tok/s",
    "guessing, tok/s",
    "ratio",
    "lowest-highest (rounds)",
    "with the prompt",
    "guesses right",
    "target",
    "met",
    "day",
)
_NEVER_BELOW: Final = 0.97
_DATA: Final = Path(__file__).parents[2] / "shared/data"
_MAX_PROMPT: Final = 1200
_KV_TOKENS: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Work:
    """A kind of work: its prompts, from the folder of a data set; `raw` ones are continued as they are."""

    name: str
    title: str
    folder: str
    prompts: Callable[[Path], Iterator[str]]
    bound: float
    raw: bool = False
    max_tokens: int = 128
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt: seconds of decoding and of the whole call, plain and guessing, and what was guessed."""

    num_tokens: int
    plain_s: float
    guess_s: float
    plain_total_s: float
    guess_total_s: float
    num_guessed: int
    num_right: int


Round = Sequence[Pair]
"""All prompts once."""


def row_cells(work: Work, rounds: Sequence[Round]) -> list[str]:
    """A row of the table; rates are over all rounds, the ratio is the median of theirs."""
    every = [pair for each in rounds for pair in each]
    tokens = sum(pair.num_tokens for pair in every)
    ratios = [sum(p.plain_s for p in each) / sum(p.guess_s for p in each) for each in rounds]
    totals = [sum(p.plain_total_s for p in each) / sum(p.guess_total_s for p in each) for each in rounds]
    guessed, right = sum(p.num_guessed for p in every), sum(p.num_right for p in every)
    ratio = statistics.median(ratios)
    return [
        work.title,
        f"{tokens / sum(p.plain_s for p in every):,.0f}",
        f"{tokens / sum(p.guess_s for p in every):,.0f}",
        f"{ratio:.2f}",
        f"{min(ratios):.2f}-{max(ratios):.2f} ({len(rounds)} of {len(rounds[0])} prompts)",
        f"{statistics.median(totals):.2f}",
        f"{right} of {guessed} ({right / max(1, guessed):.0%}), {right / max(1, tokens):.0%} of all tokens",
        f"at least {work.bound:.2f}",
        "yes" if ratio >= work.bound else "**no**",
        today(),
    ]


def split(prompts: Iterator[str], tune: bool) -> Iterator[str]:
    """The half of the rows to tune on, or the half to report."""
    for prompt in prompts:
        is_for_tuning = _hash_of(prompt)[0] % 2 == 0
        if is_for_tuning == tune:
            yield prompt


def _hash_of(text: str) -> bytes:
    """What decides the split and the order of rows."""
    return hashlib.sha256(text.encode()).digest()


def _json_lines(path: Path) -> Iterator[Any]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _code_edits(folder: Path) -> Iterator[str]:
    for row in _json_lines(folder / "HumanEval.jsonl.gz"):
        code = row["prompt"] + row["canonical_solution"]
        task = "Add a comment to each step of this function and give back the whole code."
        yield f"{task}\n\n```python\n{code}```"


def _extractions(folder: Path) -> Iterator[str]:
    """Slots of a sentence as JSON, after six examples of the same intent."""
    for path in sorted(folder.glob("validate_*.json.gz")):
        intent = path.name.removeprefix("validate_").removesuffix(".json.gz")
        rows = json.loads(gzip.decompress(path.read_bytes()))[intent]
        examples = "".join(_slots(row, with_answer=True) for row in rows[:6])
        for row in rows[6:]:
            yield f"Write the details of each request as JSON.\n\n{examples}{_slots(row, with_answer=False)}"


def _slots(row: Mapping[str, Any], *, with_answer: bool) -> str:
    text = "".join(part["text"] for part in row["data"])
    slots = {part["entity"]: part["text"] for part in row["data"] if "entity" in part}
    answer = json.dumps({"request": text.strip(), "slots": slots}, ensure_ascii=False) + "\n\n"
    return f"Request: {text.strip()}\nDetails:{' ' + answer if with_answer else ''}"


def _articles(folder: Path) -> Iterator[str]:
    for row in _json_lines(folder / "cnn_dailymail_3_0_0_news_summary.jsonl.gz"):
        yield row["prompt"].strip()


def _questions(folder: Path) -> Iterator[str]:
    for name in ("mt_bench_question.jsonl", "vicuna_bench_question.jsonl"):
        for row in _json_lines(folder / name):
            yield row["turns"][0]


WORKS: Final = (
    Work(
        name="code-edit",
        title="code edit (HumanEval functions)",
        folder="humaneval",
        prompts=_code_edits,
        bound=1.3,
        max_tokens=192,
    ),
    Work(
        name="extraction",
        title="extraction (SNIPS slots as JSON)",
        folder="snips",
        prompts=_extractions,
        bound=1.3,
        raw=True,
        stop=("\n",),
    ),
    Work(
        name="summary",
        title="summarising (CNN / Daily Mail)",
        folder="news_summaries",
        prompts=_articles,
        bound=_NEVER_BELOW,
    ),
    Work(
        name="question",
        title="open questions (MT-bench, Vicuna)",
        folder="mt_bench",
        prompts=_questions,
        bound=_NEVER_BELOW,
    ),
)


class _Pairing:
    """Two engines of one model, with nothing remembered."""

    def __init__(self, model: ModelDirectory) -> None:
        config = LLMConfig(max_batch=1, kv_tokens=_KV_TOKENS, prefix_cache=False)
        self._plain = LLM(model, config)
        self._guess = LLM(model, replace(config, speculation="lookup"))
        warm = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        for llm in (self._plain, self._guess):
            llm.generate_tokens([list(range(1000, 1100))], warm)

    def close(self) -> None:
        """End what runs beside the process."""
        self._plain.close()
        self._guess.close()

    def encode(self, work: Work, prompt: str) -> list[int]:
        """Token ids of a prompt."""
        if work.raw:
            return self._plain.encode(prompt)
        return self._plain.encode_chat([Message(role="user", content=prompt)])

    def run(self, work: Work, ids: Sequence[int], guess_first: bool) -> Pair | None:
        """Both engines on one prompt; None if the answer has no token after the first."""
        params = SamplingParams(max_tokens=work.max_tokens, temperature=0.0, stop=work.stop)
        found: dict[bool, Completion] = {}
        for guess in (guess_first, not guess_first):
            llm = self._guess if guess else self._plain
            [found[guess]] = llm.generate_tokens([ids], params)
        plain, guessed = found[False], found[True]
        assert plain.token_ids == guessed.token_ids, "guessing changed an answer"
        if len(plain.token_ids) < 2:
            return None
        return Pair(
            num_tokens=len(plain.token_ids) - 1,
            plain_s=plain.total_s - plain.ttft_s,
            guess_s=guessed.total_s - guessed.ttft_s,
            plain_total_s=plain.total_s,
            guess_total_s=guessed.total_s,
            num_guessed=guessed.usage.num_draft_tokens,
            num_right=guessed.usage.num_accepted_tokens,
        )


def measure(model: ModelDirectory, work: Work, prompts: Sequence[str], num_rounds: int) -> list[Round]:
    """The rounds of one kind of work."""
    rounds: list[Round] = []
    for number in range(num_rounds):
        pairing = _Pairing(model)
        encoded = [pairing.encode(work, prompt) for prompt in prompts]
        fitting = [ids for ids in encoded if len(ids) <= _MAX_PROMPT]
        pairs = [pairing.run(work, ids, (index + number) % 2 == 1) for index, ids in enumerate(fitting)]
        rounds.append([pair for pair in pairs if pair is not None])
        pairing.close()
    return rounds


def main() -> None:
    """Measure, print, and with `--write` put the rows into the page."""
    names = [work.name for work in WORKS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=_DATA)
    parser.add_argument("--work", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16, help="of each kind of work")
    parser.add_argument("--tune", action="store_true", help="the rows to tune on; never written")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    model = Library().find(args.model)
    for work in WORKS:
        if work.name not in args.work:
            continue
        folder = Path(args.data) / work.folder
        if folder.is_dir():
            # Spread over the whole set, always the same ones.
            rows = sorted(split(work.prompts(folder), args.tune), key=_hash_of)
            cells = row_cells(work, measure(model, work, rows[: args.prompts], args.rounds))
        else:
            cells = [work.title, *["-"] * (len(HEADER) - 3), f"no data set {work.folder} here", today()]
        print(markdown_table(HEADER, [cells]).splitlines()[-1], flush=True)
        if args.write and not args.tune:
            page = PAGE.read_text(encoding="utf-8")
            titles = [each.title for each in WORKS]
            table = merge_rows(section(page, "speculation"), HEADER, [cells], titles)
            PAGE.write_text(fill(page, "speculation", table), encoding="utf-8")


if __name__ == "__main__":
    main()
