"""Compiles grammars, in the engine and before that in a process that may be killed.

As a script this file is that process. It reads JSON lines from standard input until that closes: first
the vocabulary and the limits, then one grammar a line, each answered by one line. Every grammar is compiled
in a fork of it, so nothing that a grammar does outlives its answer. It imports nothing of tokenmill and no
numpy, so that it starts quickly and has one thread.

A trial is part of compiling: a walk of a few tokens, drawn from what the grammar allows. It finds grammars
that lead nowhere or are too costly to follow, and leaves the matcher with the states that a text needs
first, so that the first masks of each sequence are not the slow ones.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

__all__ = ["Problem", "library_tokenizer", "prepare", "serve", "text_bits"]

_TRIAL_TOKENS: Final = 32
_MAX_TRIAL_SECONDS: Final = 0.25
_MAX_STEP_SECONDS: Final = 0.03
_MAX_FORCED_CHARS: Final = 512
_STACK_BYTES: Final = 1 << 20
_MAX_MESSAGE_CHARS: Final = 300
_DEAD_END: Final = "NoExtensionBias"


class Problem(NamedTuple):
    """Why a grammar cannot be used; `is_limit` if it took too much rather than being wrong."""

    message: str
    is_limit: bool


class _Vocabulary:
    """What `TokenizerWrapper` wraps."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], end_ids: Sequence[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.eos_token_id = end_ids[0]
        self.special_token_ids = list(end_ids)
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that must come next. The library asks at each step, so only its beginning."""
        whole = text if isinstance(text, str) else text.decode()
        return self._encode(whole[:_MAX_FORCED_CHARS])


def library_tokenizer(
    tokens: Sequence[bytes], end_ids: Sequence[int], encode: Callable[[str], list[int]]
) -> LLTokenizer:
    """The library's tokenizer from the bytes of each token: b"" for control tokens and padding."""
    wrapper = TokenizerWrapper(_Vocabulary(tokens, end_ids, encode))
    return LLTokenizer(wrapper, eos_token=list(end_ids))


def text_bits(tokens: Sequence[bytes]) -> int:
    """A bit for each token that stands for text, the first token's the lowest."""
    return int("".join("1" if token else "0" for token in reversed(tokens)), 2)


def prepare(
    tokenizer: LLTokenizer, text: int, kind: str, source: str, limits: Mapping[str, int]
) -> LLMatcher | Problem:
    """A matcher at its start after a trial over the tokens of `text`, or why there is none.

    `limits` are some of LLParserLimits.
    """
    compilers: dict[str, Callable[[str], str]] = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    try:
        bounds = LLParserLimits(
            step_lexer_fuel=limits["step_lexer_fuel"],
            step_max_items=limits["step_max_items"],
            max_items_in_row=limits["max_items_in_row"],
            max_lexer_states=limits["max_lexer_states"],
            verbose_errors=False,
        )
        matcher = LLMatcher(tokenizer, compilers[kind](source), log_level=0, limits=bounds)
        if matcher.is_error():
            return Problem(_summary(matcher.get_error()), is_limit=False)
        return _trial(matcher, text)
    except Exception as error:
        return Problem(_summary(str(error)), is_limit=False)


def serve() -> None:
    """Answer on standard output until standard input closes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = json.loads(sys.stdin.readline())
    tokens = [text.encode("latin-1") for text in setup["tokens"]]
    # Which tokens a forced text is made of makes no difference to a trial; any that make it up will do.
    greedy = library_tokenizer(tokens, setup["end_ids"], lambda text: [])
    tokenizer = library_tokenizer(tokens, setup["end_ids"], greedy.greedy_tokenize)
    text = text_bits(tokens)
    _send({"ready": True})
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _answer(tokenizer, text, json.loads(line), setup)
        _, status = os.waitpid(child, 0)
        if status != 0:
            _send(_fate(status))


def _trial(matcher: LLMatcher, text: int) -> LLMatcher | Problem:
    """Follow the grammar for a few tokens and go back. The walk is the same in every process."""
    started = now = time.thread_time()
    draw, longest = 1, 0.0
    for step in range(_TRIAL_TOKENS):
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") & text
        if matcher.is_error() or not allowed:
            if not matcher.is_error() and matcher.is_accepting():
                break
            return _trial_problem(matcher, step)
        # Every other token is the first in the vocabulary, which is short, so that the walk leaves strings.
        draw = draw * 48271 % 0x7FFFFFFF
        first = 0 if step % 2 else draw % text.bit_length()
        if not allowed >> first:
            first = 0
        rest = allowed >> first
        if not matcher.consume_token(first + (rest & -rest).bit_length() - 1):
            return _trial_problem(matcher, step)
        before, now = now, time.thread_time()
        longest = max(longest, now - before)
    if longest > _MAX_STEP_SECONDS or time.thread_time() - started > _MAX_TRIAL_SECONDS:
        return Problem("too costly to follow (time)", is_limit=True)
    matcher.reset()
    again = matcher.deep_copy()
    again.compute_bitmask()
    return _trial_problem(again, 0) if again.is_error() else matcher


def _trial_problem(matcher: LLMatcher, step: int) -> Problem:
    message = _summary(matcher.get_error())
    if message and not message.startswith(_DEAD_END):
        return Problem(f"too costly to follow ({message})", is_limit=True)
    where = "no text can satisfy it" if step == 0 else f"after {step} allowed tokens nothing is allowed"
    return Problem(where, is_limit=False)


def _summary(message: str) -> str:
    """One line of the library's message: its first, and the reason that a later one gives."""
    if message.startswith("panic"):
        return "the grammar library cannot take it"
    lines = [line.strip() for line in message.splitlines()] or [""]
    reasons = [line.removeprefix("error:") for line in lines[1:] if line.startswith("error:")]
    return (lines[0][: _MAX_MESSAGE_CHARS // 2] + "".join(reasons))[:_MAX_MESSAGE_CHARS]


def _answer(tokenizer: LLTokenizer, text: int, request: Mapping[str, str], setup: Mapping[str, Any]) -> None:
    """In the fork: compile within the limits, say how it went, and end."""
    with contextlib.suppress(BaseException):
        signal.setitimer(signal.ITIMER_REAL, setup["seconds"])
        most = _address_space() + setup["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
        before = _allocated()
        prepared = prepare(tokenizer, text, request["kind"], request["source"], setup["limits"])
        if isinstance(prepared, Problem):
            _send({"problem": prepared.message, "is_limit": prepared.is_limit})
        else:
            _send({"num_bytes": _allocated() - before})
        os._exit(0)
    os._exit(1)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


class _Mallinfo2(ctypes.Structure):
    """What glibc (2.33 and newer) says of its heap; see mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _allocated() -> int:
    """Bytes that are allocated now; with another C library, bytes of address space."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return _address_space()
    mallinfo2.restype = _Mallinfo2
    heap = mallinfo2()
    return int(heap.uordblks + heap.hblkhd)


def _fate(status: int) -> dict[str, Any]:
    """What became of a fork that did not answer."""
    is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return {"problem": "time" if is_late else "memory or nesting", "is_limit": True}


def _send(value: Mapping[str, Any]) -> None:
    os.write(sys.stdout.fileno(), json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    serve()
