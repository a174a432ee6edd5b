"""Grammars: texts that conform to a JSON schema, a regular expression or a grammar.

    generate(..., allowed_mask=grammar.xgrammar(tokenizer, json_schema=schema))
    generate(..., allowed_mask=grammar.llguidance(tokenizer, regex=r"[0-9]{1,3}"))

Each function makes a :class:`GrammarMasks`, which a Sampler or a loop asks before each step. The
engines are xgrammar (https://github.com/mlc-ai/xgrammar) and llguidance
(https://github.com/guidance-ai/llguidance). They are imported when they are first needed, and the
extra ``grammar`` installs them.
"""

from __future__ import annotations

import importlib
import json
import re
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.step_masks import MaskRow, MaskStep

Schema = Mapping[str, Any] | str
Words = npt.NDArray[np.int32]
EngineName = Literal["xgrammar", "llguidance"]
Kind = Literal["json_schema", "regex", "grammar"]

#: The engines, by name; the first one is the default of the commands.
ENGINES: tuple[EngineName, ...] = ("xgrammar", "llguidance")

#: What a grammar can be given as.
KINDS: tuple[Kind, ...] = ("json_schema", "regex", "grammar")

#: What xgrammar writes before a message: the time, and a place in its source.
_PLACE = re.compile(r"^(\[[\d:]+\] )?\S+\.(cc|h):\d+: ")


def xgrammar(
    tokenizer: Any,
    *,
    json_schema: Schema | Sequence[Schema | None] | None = None,
    regex: str | Sequence[str | None] | None = None,
    grammar: str | Sequence[str | None] | None = None,
    end_token_ids: Collection[int] | None = None,
    any_whitespace: bool = False,
    jump_forward: bool = False,
) -> GrammarMasks:
    """Let rows draw only what a grammar allows, by xgrammar.

    Exactly one of ``json_schema``, ``regex`` and ``grammar`` is given: one for all prompts, or a
    list of one for each, in which None leaves the rows of a prompt free.

    Args:
        tokenizer: a fast tokenizer of transformers, the model's. The logits may be wider than its
            vocabulary, as where a model pads them, or narrower.
        json_schema: a JSON schema, as a dict or its JSON. Properties come in the schema's order.
            xgrammar allows no others than the schema names.
        regex: a regular expression, which the whole text matches.
        grammar: a grammar in xgrammar's EBNF, which is llama.cpp's GBNF, with the rule ``root``.
        end_token_ids: the tokens that end a text; they are allowed where the grammar is complete,
            and nowhere else. Default: the end tokens and stop tokens of the loop; the tokenizer's
            end token in a loop that has none, or in a Sampler.
        any_whitespace: whether JSON may have any whitespace between its elements. By default it
            stands in one line, with a space after each comma and colon.
        jump_forward: whether to force the tokens of a text that is certain. The tokens may then
            differ from those that would be drawn.

    Raises:
        ModuleNotFoundError: xgrammar is not installed.
        ValueError: an argument is not as above, or xgrammar refuses the schema, the regular
            expression or the grammar.

    Example:
        >>> masks = xgrammar(tokenizer, json_schema={"type": "object", ...})
        >>> generate(model, prompts, params, tokenizer=tokenizer, allowed_mask=masks)
    """
    given = _given(json_schema, regex, grammar)
    return GrammarMasks("xgrammar", tokenizer, given, end_token_ids, any_whitespace, jump_forward)


def llguidance(
    tokenizer: Any,
    *,
    json_schema: Schema | Sequence[Schema | None] | None = None,
    regex: str | Sequence[str | None] | None = None,
    grammar: str | Sequence[str | None] | None = None,
    end_token_ids: Collection[int] | None = None,
    any_whitespace: bool = False,
    jump_forward: bool = False,
) -> GrammarMasks:
    """Let rows draw only what a grammar allows, by llguidance.

    The arguments are those of :func:`xgrammar`, and so is what it raises, with these differences:

    Args:
        tokenizer: as there.
        json_schema: as there; other properties than those that the schema names are allowed unless
            it has ``"additionalProperties": false``.
        regex: a regular expression in the syntax of Rust's regex crate.
        grammar: a grammar in llguidance's Lark, with the rule ``start``.
        end_token_ids: as there.
        any_whitespace: as there.
        jump_forward: as there.

    Example:
        >>> masks = llguidance(tokenizer, regex=[r"[0-9]{4}", None])  # the second prompt is free
        >>> generate(model, prompts, params, tokenizer=tokenizer, allowed_mask=masks)
    """
    given = _given(json_schema, regex, grammar)
    return GrammarMasks("llguidance", tokenizer, given, end_token_ids, any_whitespace, jump_forward)


def check(
    engine: EngineName,
    *,
    json_schema: Schema | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> None:
    """Check a schema, a regular expression or a grammar without a tokenizer.

    Raises:
        ModuleNotFoundError: the engine is not installed.
        ValueError: as :func:`xgrammar`.
    """
    if engine not in ENGINES:
        raise checks.refusal("engine", " or ".join(map(repr, ENGINES)), engine)
    kind, sources = _given(json_schema, regex, grammar)
    for source in sources if isinstance(sources, list) else [sources]:
        if source is not None:
            _PARSERS[engine](kind, source, False)


# ---- what was asked for --------------------------------------------------------------------------


class _Given(NamedTuple):
    """The sources of grammars: one for all prompts, or a list of one for each."""

    kind: Kind
    sources: str | list[str | None]


def _given(json_schema: Any, regex: Any, grammar: Any) -> _Given:
    """The one that is given of three, checked; a schema as JSON."""
    values = zip(KINDS, (json_schema, regex, grammar), strict=True)
    found = [(kind, value) for kind, value in values if value is not None]
    if len(found) != 1:
        got = ", ".join(kind for kind, _ in found) or "none"
        raise ValueError(f"one of json_schema, regex and grammar must be given, got {got}")
    ((kind, value),) = found
    if isinstance(value, (list, tuple)):
        if not value:
            raise checks.refusal(kind, "one for all prompts, or one for each", value)
        return _Given(kind, [None if one is None else _source(kind, one) for one in value])
    return _Given(kind, _source(kind, value))


def _source(kind: Kind, value: object) -> str:
    if kind != "json_schema":
        if not isinstance(value, str):
            raise checks.refusal(kind, "a text, or a list of a text or None for each prompt", value)
        return value
    rule = "a JSON schema (a dict, or its JSON)"
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if isinstance(schema, Mapping):
            return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:  # no JSON
        raise ValueError(f"json_schema must be {rule}: {error}") from None
    raise checks.refusal("json_schema", rule, value)


# ---- the engines ---------------------------------------------------------------------------------


class _Matcher(Protocol):
    """Where a text stands in its grammar."""

    def fill(self, words: Words) -> None:
        """Set the bits of the tokens that may come next, in a row of the vocabulary's width."""

    def accept(self, token: int) -> bool:
        """Go on with a token; False, and nothing changes, if the grammar does not allow it."""

    def rollback(self, number: int) -> None:
        """Take the last tokens away."""

    def is_complete(self) -> bool:
        """Whether the text may end here."""

    def forced(self) -> list[int]:
        """The tokens of the text that is certain to follow."""

    def copy(self) -> _Matcher:
        """Another matcher that stands in the same place."""


class _Vocabulary(Protocol):
    """A tokenizer as an engine has it.

    Attributes:
        size: how many tokens there are.
    """

    size: int

    def compile(self, kind: Kind, source: str, any_whitespace: bool) -> Callable[[], _Matcher]:
        """A function that makes a matcher at the beginning of a text."""


def _engine(name: EngineName) -> ModuleType:
    """The engine's module; a ModuleNotFoundError that names the extra if there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"grammars need the extra 'grammar' ({error.name} not found): "
            "pip install 'llm-sampling[grammar]'",
            name=error.name,
        ) from error


def _refused(kind: Kind, engine: EngineName, reason: object) -> ValueError:
    """The error for what an engine cannot compile."""
    said = _PLACE.sub("", str(reason).strip())
    return ValueError(f"{kind} must be one that {engine} can compile: {said}")


def _xgrammar_of(kind: Kind, source: str, any_whitespace: bool) -> Any:
    """An ``xgrammar.Grammar``."""
    engine = _engine("xgrammar")
    try:
        if kind == "json_schema":
            return engine.Grammar.from_json_schema(source, any_whitespace=any_whitespace)
        if kind == "regex":
            return engine.Grammar.from_regex(source)
        return engine.Grammar.from_ebnf(source)
    except (RuntimeError, ValueError) as error:
        raise _refused(kind, "xgrammar", error) from None


def _llguidance_of(kind: Kind, source: str, any_whitespace: bool) -> str:
    """A grammar as llguidance's matchers take it."""
    matcher = _engine("llguidance").LLMatcher
    try:
        if kind == "json_schema":
            form: dict[str, Any] = {"whitespace_flexible": any_whitespace}
            if not any_whitespace:
                form |= {"item_separator": ", ", "key_separator": ": "}
            found = matcher.grammar_from_json_schema(source, overrides=form)
        elif kind == "regex":
            found = matcher.grammar_from_regex(source)
        else:
            found = matcher.grammar_from_lark(source)
    except ValueError as error:
        raise _refused(kind, "llguidance", error) from None
    is_wrong, said = matcher.validate_grammar_with_warnings(found)
    if is_wrong:
        raise _refused(kind, "llguidance", said[0])
    return str(found)


#: engine -> what parses a source without a tokenizer
_PARSERS: Mapping[str, Callable[[Kind, str, bool], Any]] = {
    "xgrammar": _xgrammar_of,
    "llguidance": _llguidance_of,
}


class _XgrammarVocabulary:
    def __init__(self, tokenizer: Any) -> None:
        self._engine = _engine("xgrammar")
        with warnings.catch_warnings():  # about stop tokens, which GrammarMasks takes care of
            warnings.simplefilter("ignore")
            info = self._engine.TokenizerInfo.from_huggingface(tokenizer)
        self.size: int = info.vocab_size
        self._compiler = self._engine.GrammarCompiler(info, max_threads=torch.get_num_threads())

    def compile(self, kind: Kind, source: str, any_whitespace: bool) -> Callable[[], _Matcher]:
        parsed = _xgrammar_of(kind, source, any_whitespace)
        try:
            compiled = self._compiler.compile_grammar(parsed)
        except RuntimeError as error:
            raise _refused(kind, "xgrammar", error) from None
        return lambda: _XgrammarMatcher(self._engine.GrammarMatcher(compiled))


class _XgrammarMatcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, words: Words) -> None:
        words.fill(-1)
        self._matcher.fill_next_token_bitmask(words[None])

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def rollback(self, number: int) -> None:
        self._matcher.rollback(number)

    def is_complete(self) -> bool:
        return bool(self._matcher.is_completed())

    def forced(self) -> list[int]:
        return list(self._matcher.find_jump_forward_tokens())

    def copy(self) -> _XgrammarMatcher:
        return _XgrammarMatcher(self._matcher.fork())


class _LlguidanceVocabulary:
    def __init__(self, tokenizer: Any) -> None:
        self._engine = _engine("llguidance")
        end, special = tokenizer.eos_token_id, _special_tokens(tokenizer)
        if end is None and not special:
            raise checks.refusal("tokenizer", "one with an end or special token", tokenizer)
        self._tokenizer = importlib.import_module("llguidance.hf").from_tokenizer(
            # without one llguidance would take token 0, which is text
            tokenizer,
            eos_token=min(special) if end is None else end,
        )
        self.size: int = self._tokenizer.vocab_size

    def compile(self, kind: Kind, source: str, any_whitespace: bool) -> Callable[[], _Matcher]:
        parsed = _llguidance_of(kind, source, any_whitespace)
        first = self._engine.LLMatcher(self._tokenizer, parsed, log_level=0)
        if first.is_error():
            raise _refused(kind, "llguidance", first.get_error())
        return lambda: _LlguidanceMatcher(first.deep_copy())


class _LlguidanceMatcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, words: Words) -> None:
        found = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        if self._matcher.is_error():  # a limit of the parser was reached
            raise RuntimeError(f"llguidance cannot go on: {self._matcher.get_error()}")
        words[:] = found[: len(words)]

    def accept(self, token: int) -> bool:
        # a matcher that has consumed a wrong token is of no use any more
        if self._matcher.validate_tokens([token]) != 1:
            return False
        return bool(self._matcher.consume_token(token))

    def rollback(self, number: int) -> None:
        self._matcher.rollback(number)

    def is_complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def forced(self) -> list[int]:
        return list(self._matcher.compute_ff_tokens())

    def copy(self) -> _LlguidanceMatcher:
        return _LlguidanceMatcher(self._matcher.deep_copy())


_VOCABULARIES: Mapping[str, Callable[[Any], _Vocabulary]] = {
    "xgrammar": _XgrammarVocabulary,
    "llguidance": _LlguidanceVocabulary,
}

#: tokenizer -> engine and number of tokens -> its vocabulary, which takes a while to make.
_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], _Vocabulary]] = (
    weakref.WeakKeyDictionary()
)


def _special_tokens(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token for token, its in added if its.special}


def _vocabulary(engine: EngineName, tokenizer: Any) -> _Vocabulary:
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise checks.refusal("tokenizer", "a fast tokenizer of transformers", tokenizer)
    known, key = _KNOWN.setdefault(tokenizer, {}), (engine, len(tokenizer))
    if key not in known:
        known[key] = _VOCABULARIES[engine](tokenizer)
    return known[key]


# ---- the callback --------------------------------------------------------------------------------


class _Row:
    """A row with a grammar.

    Attributes:
        matcher: where its text stands.
        tokens: the tokens that it has been told, in order.
        past: how many of them, the last ones, are end tokens after the text.
    """

    def __init__(self, matcher: _Matcher) -> None:
        self.matcher = matcher
        self.tokens: list[int] = []
        self.past = 0

    def copy(self) -> _Row:
        """Another row with the same tokens."""
        other = _Row(self.matcher.copy())
        other.tokens, other.past = list(self.tokens), self.past
        return other

    def take_away(self, number: int) -> None:
        """Forget the last tokens."""
        of_end = min(number, self.past)
        if number > of_end:
            self.matcher.rollback(number - of_end)
        del self.tokens[len(self.tokens) - number :]
        self.past -= of_end

    def add(self, token: int, ends: Collection[int], banned: Collection[int]) -> bool:
        """Go on with a token; False, and nothing changes, if it is not allowed."""
        is_end = token in ends and (self.past > 0 or self.matcher.is_complete())
        if not is_end and (self.past or token in banned or not self.matcher.accept(token)):
            return False
        self.past += is_end
        self.tokens.append(token)
        return True


class GrammarMasks:
    """A grammar, or one for each prompt, as the ``allowed_mask`` of a Sampler or a loop.

    It has a matcher for each row: it follows the row's tokens, says which may come next, and where
    the text is complete allows the row's end tokens too. Special tokens are not allowed, since they
    are not part of a text. A token that its grammar does not allow, as one that was appended,
    raises a ValueError.

    One object serves one Sampler or loop at a time, and any number of them one after the other.
    ``copy.deepcopy`` copies it with where its rows stand, as it is part of a Sampler that is
    copied; it cannot be pickled.

    Made by :func:`xgrammar` and :func:`llguidance`.
    """

    def __init__(
        self,
        engine: EngineName,
        tokenizer: Any,
        given: _Given,
        end_token_ids: Collection[int] | None,
        any_whitespace: bool,
        jump_forward: bool,
    ) -> None:
        self._any_whitespace = checks.true_or_false("any_whitespace", any_whitespace)
        self._jump_forward = checks.true_or_false("jump_forward", jump_forward)
        self._kind = given.kind
        self._vocabulary = _vocabulary(engine, tokenizer)
        self._are_given = end_token_ids is not None
        if end_token_ids is None:
            end = tokenizer.eos_token_id
            end_token_ids = [] if end is None else [end]
        ends = checks.token_ids("end_token_ids", end_token_ids)
        self._ends = tuple(checks.integer_at_least("end_token_ids", token, 0) for token in ends)
        self._banned = _special_tokens(tokenizer)
        self._is_one = isinstance(given.sources, str)
        sources = [given.sources] if isinstance(given.sources, str) else given.sources
        self._starts = [self._compiled(source) for source in sources]
        size = self._vocabulary.size
        self._words: Words = np.zeros(-(-size // 32), dtype=np.int32)
        self._usable = _all_but(self._banned, size)
        self._rows: dict[int, _Row] = {}

    def append(self, source: Schema | None) -> None:
        """Add the grammar of one more prompt, for a row that a Sampler adds.

        Args:
            source: of the kind that this object was made with; None leaves the row free.

        Raises:
            ValueError: the engine refuses it, or there is one grammar for all rows.
        """
        if self._is_one:
            raise ValueError("append needs a grammar for each prompt, and there is one for all")
        self._starts.append(self._compiled(None if source is None else _source(self._kind, source)))

    def __deepcopy__(self, memo: dict[int, Any]) -> GrammarMasks:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._starts, other._words = list(self._starts), self._words.copy()
        other._rows = {id: row.copy() for id, row in self._rows.items()}
        return other

    def __getstate__(self) -> NoReturn:
        raise TypeError("a GrammarMasks cannot be pickled, since its matchers cannot")

    def _compiled(self, source: str | None) -> Callable[[], _Matcher] | None:
        if source is None:
            return None
        return self._vocabulary.compile(self._kind, source, self._any_whitespace)

    def __call__(self, step: MaskStep) -> Tensor | None:
        """The bitmask of a step; None if all of its rows are free.

        Raises:
            ValueError: there is not a grammar for each prompt, or a row has got a token that its
                grammar does not allow.
            RuntimeError: llguidance has reached a limit of its parser.
        """
        count = len(self._starts)
        if not self._is_one and step.prompts is not None and count != step.prompts:
            raise ValueError(
                f"{self._kind} must have one for each of {step.prompts} prompts, got {count}"
            )
        rows: dict[int, _Row] = {}
        words = step.bitmask.numpy()
        for place, told in enumerate(step.rows):
            row = self._row(told)
            if row is None:
                continue
            rows[told.id], ends = row, self._ends_of(told)
            row.take_away(len(row.tokens) - told.start)
            for token in told.tokens:
                if not row.add(token, ends, self._banned):
                    raise ValueError(
                        f"row {told.id} has got token {token}, which its grammar does not allow "
                        "there"
                    )
            step.forced[place].extend(self._forced(row, ends, step.vocab_size))
            if not step.forced[place]:
                self._fill(words[place], row, ends)
        self._rows = {
            **{id: row for id, row in self._rows.items() if id not in step.ended},
            **rows,
        }
        return step.bitmask if rows else None

    def _row(self, told: MaskRow) -> _Row | None:
        """The row, at the beginning of its text if it is new; None if it is free."""
        place = 0 if self._is_one else told.prompt
        if place >= len(self._starts):
            raise ValueError(
                f"{self._kind} must have one for each prompt, and there is none for row {told.id}"
            )
        start = self._starts[place]
        if start is None:
            return None
        if told.is_new:
            return _Row(start())
        if told.id not in self._rows:
            raise ValueError(f"row {told.id} must have been asked for from its beginning on")
        return self._rows[told.id]

    def _ends_of(self, told: MaskRow) -> tuple[int, ...]:
        ends = self._ends if self._are_given or not told.ends else told.ends
        if not ends:
            raise ValueError(
                "end_token_ids must be given where neither the loop nor the tokenizer has an end "
                "token"
            )
        return ends

    def _forced(self, row: _Row, ends: Collection[int], vocab_size: int) -> list[int]:
        """The tokens that a row is certain to get, as far as they can be drawn."""
        if not self._jump_forward or row.past or row.matcher.is_complete():
            return []
        forced: list[int] = []
        for token in row.matcher.forced():
            if token in self._banned or token in ends or token >= vocab_size:
                break
            forced.append(token)
        return forced

    def _fill(self, words: Words, row: _Row, ends: Collection[int]) -> None:
        """Clear the bits of the tokens that a row must not draw."""
        words[:] = 0
        if not row.past:
            row.matcher.fill(self._words)
            self._words &= self._usable
            width = min(len(words), len(self._words))
            words[:width] = self._words[:width]
        is_complete = row.past > 0 or row.matcher.is_complete()
        bits = words.view(np.uint32)
        for token in ends:
            if token < 32 * len(words):  # what is past the logits' width is dropped
                bit = np.uint32(1 << (token & 31))
                bits[token >> 5] = bits[token >> 5] & ~bit | (bit if is_complete else 0)


def _all_but(banned: Collection[int], size: int) -> Words:
    """A row of a bitmask in which the bits of all tokens but those are set."""
    bits = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
    bits[:size] = 1
    bits[[token for token in banned if token < size]] = 0
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
