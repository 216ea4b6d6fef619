"""Structured output: which tokens a grammar allows next, over the `llguidance` library.

A grammar is a stranger's program. So it is bounded at the door (size, nesting, counts), then compiled and
tried in a process that may be killed (`compile_worker`), and only what passed there, within the time and
memory of the limits, is compiled again in the engine. From then on the library bounds each step; a
sequence that reaches such a bound fails alone, with an error of its state.

The text of a sequence is the bytes of its tokens. Control tokens and ids that only pad the vocabulary are
never allowed, whatever a grammar says; end tokens are allowed exactly where the text may stop.

Shape legend: L sequences, R rows (drafts and one more), W words of 32 tokens.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from tokenmill.core import Grammar, ResourceError, TokenmillError, UsageError
from tokenmill.engine.structured.cache import TenantCache
from tokenmill.engine.structured.compile_process import CompileProcess
from tokenmill.engine.structured.compile_worker import Problem, library_tokenizer, prepare, text_bits

__all__ = ["CheckedGrammar", "GrammarCompiler", "GrammarLimits", "GrammarState", "TokenBytes", "U32Array"]

U32Array: TypeAlias = npt.NDArray[np.uint32]

_ANY_OBJECT: Final = '{"type": "object"}'
_GUIDANCE: Final = r'"x-guidance": {"whitespace_pattern": "[ \n]{0,12}"}'
_MAX_FORCED: Final = 64
# Where the child's allocator reused what was free, it sees less than this; a small grammar holds 150 KiB.
_MIN_ENTRY_BYTES: Final = 64 << 10
_REFUSAL_BYTES: Final = 1 << 10
# The engine repeats what the worker did, so the worker has a little less than half of the time.
_WORKER_SHARE: Final = 0.45


class TokenBytes(Protocol):
    """What is needed of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; b"" for an id that only pads the vocabulary."""
        ...

    def is_special(self, token_id: int) -> bool:
        """True for a control token."""
        ...

    def encode_after(self, text: str) -> list[int]:
        """Token ids of a text that continues another."""
        ...


@dataclass(frozen=True, kw_only=True)
class GrammarLimits:
    """Bounds of one grammar, and of all that are kept.

    `seconds` and `memory_bytes` bound compiling one; `held_bytes` what it may hold afterwards.
    `schema_depth` and `schema_values` bound a JSON schema: nested objects and arrays (a property takes
    two), and values. The next four bound the library in each step: lexer work (14,000 a millisecond),
    parser items a mask and a row, lexer states a sequence (1 to 2 kB each). `cache_bytes` bounds the
    grammars that are kept, `tenant_bytes` those of one tenant.
    """

    seconds: float = 2.0
    memory_bytes: int = 256 << 20
    held_bytes: int = 16 << 20
    schema_depth: int = 64
    schema_values: int = 16384
    step_lexer_fuel: int = 100_000
    step_max_items: int = 50_000
    max_items_in_row: int = 2000
    max_lexer_states: int = 25_000
    cache_bytes: int = 64 << 20
    tenant_bytes: int = 16 << 20


class _Vocabulary(NamedTuple):
    """What every state shares."""

    size: int
    end_ids: frozenset[int]
    text_W: U32Array
    ends_W: U32Array

    def is_text(self, token_id: int) -> bool:
        return 0 <= token_id < self.size and _has(self.text_W, token_id)


class GrammarState:
    """Where one sequence stands in its grammar. Belongs to one thread at a time."""

    def __init__(self, start: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._start = start
        self._matcher = start.deep_copy()
        self._vocabulary = vocabulary
        self._tokens: list[int] = []
        self._has_ended = False

    @property
    def num_words(self) -> int:
        """Words of a mask: a bit for each entry of a row of logits, the lowest first."""
        return len(self._vocabulary.text_W)

    @property
    def finished(self) -> bool:
        """True if nothing but an end token may follow. A mask that says so first is as good."""
        return self._has_ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def fill_mask(self, mask_W: U32Array) -> None:
        """Set the bits of the tokens that may come next.

        Where the grammar leaves no choice of text, that is the one token with which the tokenizer writes it.
        Raises UsageError if none may (the grammar led into a dead end), ResourceError if a limit of a step
        is reached. After either the state is of no further use.
        """
        assert mask_W.dtype == np.uint32 and mask_W.shape == self._vocabulary.text_W.shape
        assert mask_W.flags.c_contiguous
        if not self._has_ended:
            self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        self._finish_mask(mask_W)

    def allows(self, token_id: int) -> bool:
        """Whether `fill_mask` would set this token's bit, for a fraction of a mask's time.

        False also where a mask would raise. The state is as before.
        """
        if token_id in self._vocabulary.end_ids:
            return self._has_ended or self._matcher.is_accepting()
        if self._has_ended or self._matcher.is_stopped() or not self._vocabulary.is_text(token_id):
            return False
        if self._matcher.validate_tokens([token_id]) != 1:
            return False
        forced = self._matcher.compute_ff_tokens()
        return not forced or forced[0] == token_id

    def accept(self, token_id: int) -> None:
        """The token was chosen.

        Raises UsageError, and changes nothing, if its text is not allowed here; ResourceError if a limit of
        a step is reached, after which the state is of no further use.
        """
        is_end = token_id in self._vocabulary.end_ids
        if is_end and not self._has_ended and self._matcher.is_accepting():
            self._has_ended = True
        elif not is_end and not self._has_ended and self._vocabulary.is_text(token_id):
            # Whether the token is allowed shows as it is consumed: asking first would cost as much again.
            if not self._matcher.consume_token(token_id):
                self._refuse(token_id)
            self._tokens.append(token_id)
        else:
            raise _not_allowed(token_id)

    def num_valid(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, from the first on, write what the grammar allows.

        Masks may allow fewer, see `fill_mask`.
        """
        text = self._leading_text(tokens)
        if self._has_ended:
            return 0
        count = int(self._matcher.validate_tokens(text))
        if count < len(text) or count == len(tokens) or tokens[count] not in self._vocabulary.end_ids:
            return count
        if count and self._matcher.try_consume_tokens(text) < count:
            self._restore()
            return count
        may_end = self._matcher.is_accepting()
        self._go_back(count)
        return count + may_end

    def masks(self, drafts: Sequence[int], mask_RW: U32Array) -> int:
        """Masks before each draft and after the last; returns how many rows, from the first on, count.

        Rows stop counting after a draft that is not allowed or that is an end token, and where a draft leads
        into an error, which is then met again by whoever accepts it. Rows that do not count allow end tokens
        only. The state is as before. Raises like `fill_mask`, for the first row only.
        """
        assert mask_RW.shape[0] == len(drafts) + 1
        if not len(drafts):
            self.fill_mask(mask_RW[0])
            return 1
        mask_RW[:] = self._vocabulary.ends_W
        self.fill_mask(mask_RW[0])
        num_rows = 1
        with contextlib.suppress(TokenmillError):
            for draft in drafts:
                is_next = self._vocabulary.is_text(draft) and _has(mask_RW[num_rows - 1], draft)
                if self._has_ended or not is_next or not self._matcher.consume_token(draft):
                    break
                self.fill_mask(mask_RW[num_rows])
                num_rows += 1
        if self._matcher.is_error():
            mask_RW[num_rows:] = self._vocabulary.ends_W
            self._restore()
        else:
            self._go_back(num_rows - 1)
        return num_rows

    def forced(self) -> tuple[int, ...]:
        """The tokens that must come next, at most 64, as the tokenizer would write them; often none."""
        if self._has_ended or self._matcher.is_stopped():
            return ()
        text = self._leading_text(self._matcher.compute_ff_tokens()[:_MAX_FORCED])
        return tuple(text[: self._matcher.validate_tokens(text)])

    def _refuse(self, token_id: int) -> NoReturn:
        """Say why a token was not consumed; if it was only not allowed, be as before."""
        broken = self._matcher
        self._restore()
        if self._matcher.validate_tokens([token_id]) == 0:
            raise _not_allowed(token_id)
        self._matcher = broken
        raise _failure(broken)

    def _leading_text(self, tokens: Sequence[int]) -> list[int]:
        count = next((i for i, each in enumerate(tokens) if not self._vocabulary.is_text(each)), len(tokens))
        return list(tokens[:count])

    def _finish_mask(self, mask_W: U32Array) -> None:
        """From the library's mask to ours: only text, and end tokens where the text may stop."""
        if self._has_ended:
            mask_W[:] = self._vocabulary.ends_W
            return
        if self._matcher.is_error():
            raise _failure(self._matcher)
        mask_W &= self._vocabulary.text_W
        if self._matcher.is_accepting():
            mask_W |= self._vocabulary.ends_W
        elif not mask_W.any():
            raise _dead_end()

    def _go_back(self, num_tokens: int) -> None:
        if num_tokens and not self._matcher.rollback(num_tokens):
            self._restore()

    def _restore(self) -> None:
        """Come here again from the start: an error of the library is for ever."""
        self._matcher = self._start.deep_copy()
        if self._matcher.try_consume_tokens(self._tokens) < len(self._tokens):
            raise _failure(self._matcher)


class CheckedGrammar:
    """A grammar that is compiled and may be used. It stays usable when the compiler forgets it."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def start(self) -> GrammarState:
        """The state of a new sequence. Takes about 0.1 ms."""
        return GrammarState(self._matcher, self._vocabulary)


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps them. Safe between threads.

    `check` may take up to two seconds, so call it where requests come in, not between steps.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        vocab_size: int,
        end_ids: Sequence[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        """`vocab_size` is the length of a row of logits, at least that of the tokenizer's vocabulary."""
        assert end_ids and all(0 <= each < vocab_size for each in end_ids)
        self.limits = limits or GrammarLimits()
        is_text = [not tokenizer.is_special(i) and i not in end_ids for i in range(vocab_size)]
        tokens = [tokenizer.token_bytes(i) if is_text[i] else b"" for i in range(vocab_size)]
        self._vocabulary = _Vocabulary(
            size=vocab_size,
            end_ids=frozenset(end_ids),
            text_W=_bits([i for i, token in enumerate(tokens) if token], vocab_size),
            ends_W=_bits(end_ids, vocab_size),
        )
        self._library_limits = {
            "step_lexer_fuel": self.limits.step_lexer_fuel,
            "step_max_items": self.limits.step_max_items,
            "max_items_in_row": self.limits.max_items_in_row,
            "max_lexer_states": self.limits.max_lexer_states,
        }
        self._text = text_bits(tokens)
        self._tokenizer = library_tokenizer(tokens, end_ids, tokenizer.encode_after)
        self._cache: TenantCache[CheckedGrammar | UsageError] = TenantCache(
            self.limits.cache_bytes, self.limits.tenant_bytes
        )
        setup = {
            "tokens": [token.decode("latin-1") for token in tokens],
            "end_ids": list(end_ids),
            "memory_bytes": self.limits.memory_bytes,
            "limits": self._library_limits,
        }
        self._process = CompileProcess(setup, self.limits.seconds * _WORKER_SHARE)

    def __enter__(self) -> "GrammarCompiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_words(self) -> int:
        """Words of a mask: a bit for each entry of a row of logits, the lowest first."""
        return len(self._vocabulary.text_W)

    @property
    def cache_bytes(self) -> int:
        """What the kept grammars hold, as estimated when each was compiled."""
        return self._cache.num_bytes

    def check(self, grammar: Grammar, tenant: str = "") -> CheckedGrammar:
        """Compile a grammar, or find it compiled.

        Raises UsageError if it is wrong, not supported or nothing satisfies it; ResourceError if it takes too
        much time or memory, which may be different another time and is not remembered.
        """
        found = self.find(grammar, tenant)
        if found is not None:
            return found
        made, num_bytes = self._compile(grammar)
        self._cache.put(_key(grammar, tenant), made, num_bytes + len(grammar.source), tenant)
        return _accepted(made)

    def find(self, grammar: Grammar, tenant: str = "") -> CheckedGrammar | None:
        """The grammar if it is kept, else None. Quick. Raises UsageError if its refusal is kept."""
        kept = self._cache.get(_key(grammar, tenant))
        return None if kept is None else _accepted(kept)

    def start(self, grammar: Grammar, tenant: str = "") -> GrammarState:
        """The state of a new sequence; quick after `check`, as long as the grammar is kept."""
        return self.check(grammar, tenant).start()

    def close(self) -> None:
        """End the child process. Grammars that were checked stay usable."""
        self._process.close()

    def _compile(self, grammar: Grammar) -> tuple[CheckedGrammar | UsageError, int]:
        """The grammar, or why it is refused; and the bytes that this answer holds."""
        try:
            kind, source = _normal_form(grammar, self.limits)
            num_bytes = _allowed(self._process.compile(kind, source), self.limits)
            prepared = prepare(self._tokenizer, self._text, kind, source, self._library_limits)
            if isinstance(prepared, Problem):
                raise _refusal(prepared)
            return CheckedGrammar(prepared, self._vocabulary), max(num_bytes, _MIN_ENTRY_BYTES)
        except UsageError as error:
            return UsageError(
                f"the grammar ({grammar.kind}) {error.message}", hint=error.hint
            ), _REFUSAL_BYTES
        except ResourceError as error:
            raise ResourceError(f"the grammar ({grammar.kind}) {error.message}", hint=error.hint) from None


def _key(grammar: Grammar, tenant: str) -> bytes:
    name = "\0".join((tenant, grammar.kind, grammar.source))
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def _accepted(made: CheckedGrammar | UsageError) -> CheckedGrammar:
    if isinstance(made, UsageError):
        raise UsageError(made.message, hint=made.hint)
    return made


def _normal_form(grammar: Grammar, limits: GrammarLimits) -> tuple[str, str]:
    """Kind and source as the library knows them, within the bounds that need no compiling."""
    try:
        grammar.source.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"has half a surrogate pair at character {error.start}", hint="send UTF-8") from None
    if grammar.kind == "json_object":
        return "json_schema", _with_guidance(_ANY_OBJECT)
    if grammar.kind == "json_schema":
        schema = _check_schema(grammar.source, limits)
        bounded = isinstance(schema, dict) and "x-guidance" not in schema
        return grammar.kind, _with_guidance(grammar.source) if bounded else grammar.source
    return grammar.kind, grammar.source


def _with_guidance(source: str) -> str:
    """The schema with a bound on white space between tokens, in which weak models lose themselves.

    It is put into the text: a schema's numbers may be such that decoding and encoding would change them.
    """
    rest = source.strip()[1:]
    comma = "" if rest.strip() == "}" else ", "
    return "{" + _GUIDANCE + comma + rest


def _check_schema(source: str, limits: GrammarLimits) -> Any:
    """The schema. Refuses what is no JSON, no schema, too deep or too long."""
    too_deep = f"is nested more than {limits.schema_depth} deep"
    try:
        schema = msgspec.json.decode(source)
    except msgspec.DecodeError as error:
        raise UsageError(f"is no JSON: {error}", hint="send one JSON value") from None
    except RecursionError:
        raise UsageError(too_deep, hint="use $defs and $ref") from None
    if not isinstance(schema, dict | bool):
        raise UsageError("is no JSON object or boolean", hint="send a schema such as {'type': 'object'}")
    level: list[Any] = [schema]
    num_values = depth = 0
    while level:
        num_values += len(level)
        depth += 1
        if num_values > limits.schema_values:
            raise UsageError(f"has more than {limits.schema_values} values", hint="send a smaller schema")
        if depth > limits.schema_depth + 1:
            raise UsageError(too_deep, hint="use $defs and $ref")
        level = [each for value in level for each in _inside(value)]
    return schema


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _allowed(answer: dict[str, Any], limits: GrammarLimits) -> int:
    """The bytes that the child measured. Raises what it found wrong."""
    if "problem" in answer:
        raise _refusal(Problem(str(answer["problem"]), bool(answer["is_limit"])))
    num_bytes = int(answer["num_bytes"])
    if num_bytes > limits.held_bytes:
        raise _refusal(Problem(f"it holds {num_bytes >> 20} MiB", is_limit=True))
    return num_bytes


def _refusal(problem: Problem) -> TokenmillError:
    if problem.is_limit:
        return ResourceError(f"takes too much to compile: {problem.message}", hint="use a simpler one")
    return UsageError(f"cannot be used: {problem.message}", hint="correct it")


def _failure(matcher: LLMatcher) -> TokenmillError:
    """The error of a matcher that allowed no token or reached a limit."""
    message = matcher.get_error().partition("\n")[0]
    if message.startswith("NoExtension"):
        return _dead_end()
    return ResourceError(
        f"the grammar takes too much to follow here ({message[:200]})", hint="use a simpler one"
    )


def _not_allowed(token_id: int) -> UsageError:
    return UsageError(f"the grammar does not allow token {token_id} here", hint="sample with the mask")


def _dead_end() -> UsageError:
    return UsageError(
        "the grammar allows no token here", hint="correct the grammar: this text cannot be ended"
    )


def _bits(token_ids: Sequence[int], vocab_size: int) -> U32Array:
    bits = np.zeros(32 * -(-vocab_size // 32), np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _has(mask_W: U32Array, token_id: int) -> bool:
    return bool(int(mask_W[token_id >> 5]) >> (token_id & 31) & 1)
