"""Prompts of a given length, made of common words.

What a prompt says hardly changes what it costs, but how long it is does, and whether it begins like
another. So a prompt is a row of words drawn by seed and name: with a local tokenizer only words that are
one token each, and the result is encoded and corrected until its count is exact; without one, one word a
token, which holds for common English words in most vocabularies, and the system's own count is what the
figures use.

A prompt of blocks (`Call.blocks`) has the same words wherever the same block stands, so beginnings that
were the same in the recorded traffic are the same text, and a prefix cache finds them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.core import SamplingParams, UsageError
from tokenmill.evals.data import Place, read_lines, read_text
from tokenmill.evals.load.target import LoadRequest
from tokenmill.evals.load.traces import Call
from tokenmill.models.text.tokenizer import Tokenizer

__all__ = ["PromptMaker", "read_prompts"]

_WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue side
kind head house service friend father power hour game line end member law car city community name
president team minute idea body information back parent face others level office door health person art
war history party result change morning reason research girl guy moment air teacher force education foot
boy age policy music market sense nation plan college interest death experience effect use class control
care field development role effort rate heart drug show leader light voice wife police mind price report
decision son view relationship town road arm difference value building action model season society tax
director position player record paper space ground form event official matter center couple site project
activity star table need court oil
"""

_MIN_WORDS = 16
_MAX_TRIES = 16


class PromptMaker:
    """Makes requests. `tokenizer` is the system's own, if it is here. Two makers of one seed make the
    same.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, *, seed: int = 0, ignore_eos: bool = True) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._ignore_eos = ignore_eos
        words = _WORDS.split()
        self._words = [w for w in words if tokenizer is None or len(tokenizer.encode(" " + w)) == 1]
        if len(self._words) < _MIN_WORDS:
            raise UsageError("the tokenizer knows too few common words", hint="give prompts of your own")

    def request(self, number: int, call: Call) -> LoadRequest:
        """The request of a call; `number` makes its words its own, and its blocks those of others."""
        words = self._block_words(call) if call.blocks else self._drawn((1, number), call.num_input_tokens)
        text, ids = self._exact(words, call.num_input_tokens)
        return self._request(number, text, ids, call.num_input_tokens, call.num_output_tokens)

    def given(self, number: int, text: str, num_output_tokens: int) -> LoadRequest:
        """The request of a text as it is."""
        ids = () if self._tokenizer is None else tuple(self._tokenizer.encode_prompt(text))
        return self._request(number, text, ids, len(ids) or max(1, len(text) // 4), num_output_tokens)

    def _request(
        self, number: int, text: str, ids: tuple[int, ...], num_input: int, num_output: int
    ) -> LoadRequest:
        params = SamplingParams(max_tokens=num_output, ignore_eos=self._ignore_eos)
        return LoadRequest(
            id=f"load-{number}", text=text, params=params, num_input_tokens=num_input, token_ids=ids
        )

    def _block_words(self, call: Call) -> list[str]:
        words = [word for block in call.blocks for word in self._drawn((0, block), call.block_tokens)]
        return words[: call.num_input_tokens]

    def _drawn(self, key: tuple[int, int], num_words: int) -> list[str]:
        rng = np.random.default_rng([self._seed, *key])
        return [self._words[i] for i in rng.integers(0, len(self._words), num_words)]

    def _exact(self, words: Sequence[str], num_tokens: int) -> tuple[str, tuple[int, ...]]:
        """The words as text of just so many tokens, corrected at its end; as text alone without a
        tokenizer.
        """
        if self._tokenizer is None:
            return " ".join(words), ()
        words = list(words)
        for _ in range(_MAX_TRIES):
            text = " ".join(words)
            ids = tuple(self._tokenizer.encode_prompt(text))
            if (surplus := len(ids) - num_tokens) == 0:
                return text, ids
            words = words[: len(words) - surplus] if surplus > 0 else words + [self._words[0]] * -surplus
            if not words:
                break
        raise UsageError(f"no text of {num_tokens} tokens can be made", hint="give longer prompts")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a file of JSON lines, or of one JSON list, perhaps .gz.

    A row is a text, or an object with one of `prompt`, `instruction`, `question`, `turns` or `messages`
    (the last turn of the user), or a call of a workload, which has them in `request`. Raises UsageError with
    file and line.
    """
    prompts = []
    for place, row in _rows(path):
        text = _text_of(row)
        if not text:
            place.refuse("no prompt", "a row needs prompt, instruction, question, turns or messages")
        prompts.append(text)
    if not prompts:
        raise UsageError(f"{path} has no prompts", hint="give JSON lines")
    return tuple(prompts)


def _rows(path: Path) -> Iterator[tuple[Place, Any]]:
    """A row with its line, or of a list with its number."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = enumerate(_parsed(Place(path, 1), text), start=1)
        yield from ((Place(path, number), row) for number, row in rows)
        return
    for place, line in read_lines(path):
        if line.strip():
            yield place, _parsed(place, line)


def _parsed(place: Place, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place.refuse(f"no JSON ({error})", "give JSON lines")


def _text_of(row: Any) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return ""
    if isinstance(row.get("request"), dict):
        return _text_of(row["request"])
    for name in ("prompt", "instruction", "question"):
        if isinstance(row.get(name), str):
            return str(row[name])
    turns = row.get("turns")
    if isinstance(turns, list) and turns:
        return _text_of(turns[0])
    messages = row.get("messages")
    asked = (
        [m for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        if isinstance(messages, list)
        else []
    )
    return str(asked[-1].get("content") or "") if asked else ""
