"""What a call returns, and what it is asked to return besides tokens and status."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from llm_sampling import checks
from llm_sampling.tensors import token_ids

#: The kinds of logprobs. "processed" ones are of the distribution that the token was drawn from,
#: "raw" ones of the softmax of the logits as they were given.
Kind = Literal["processed", "raw"]
#: The values of ``logprobs``: one kind, several of them, or None.
Logprobs = Kind | Sequence[Kind]
#: The values of ``kept``.
KeptForm = Literal["mask", "ids", "ends"]
#: Token ids whose logprobs are asked for: the same for all rows, or some for each row.
TokenIds = Sequence[int] | Sequence[Sequence[int]] | Tensor

KINDS: tuple[Kind, ...] = ("processed", "raw")
_FORMS = ("mask", "ids", "ends")

#: The longest list of a row: the largest ``top_logprobs`` and ``max_kept_ids``.
MAX_LISTED = 1024
#: How many kept ids a row lists unless the caller says otherwise.
DEFAULT_KEPT_IDS = 256


class TokenLogprobs(NamedTuple):
    """Logprobs of one kind. What was not asked for is None.

    The rank of a token is its place in the order, from 1: larger logits first, and among equal
    logits the smaller id. "processed" ranks are those in the kept set, "raw" ones those among all
    logits above -inf, before any bias, mask or penalty. A row whose token is -1 has logprobs NaN
    and ids and ranks -1; so has an id outside of the vocabulary.

    Attributes:
        logprobs: float32 natural logarithms, of the shape of the tokens.
        ranks: int32, the ranks of the tokens, of their shape. As are all ranks, they are given
            where ``top_logprobs`` is not None.
        top_ids: int32 ``(rows, top_logprobs)``, the first ids of the order; -1 where there are
            fewer.
        top_logprobs: float32, the logprobs of ``top_ids``; NaN where there is none.
        id_logprobs: float32 ``(rows, n)``, the logprobs of ``logprob_token_ids``; -inf for an id
            that is not kept ("processed"), or whose logit is -inf or NaN ("raw").
        id_ranks: int32 ``(rows, n)``, their ranks; -1 for ids that have none.
    """

    logprobs: Tensor
    ranks: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    id_logprobs: Tensor | None = None
    id_ranks: Tensor | None = None


class KeptSet(NamedTuple):
    """What steps 8 to 13 leave of each row. What was not asked for is None.

    ``ln(mass) - ln(total)`` is the processed logprob of a token, exactly as it was drawn.

    Attributes:
        counts: int32 ``(rows,)``, how many tokens are kept; 0 where nothing could be drawn.
        total: int64 ``(rows,)``, the mass of all kept tokens.
        masses: int64, the masses of the drawn tokens, of their shape; 0 where a token is -1.
        id_masses: int64 ``(rows, n)``, those of ``logprob_token_ids``; 0 for ids not kept.
        mask: int32 ``(rows, ceil(vocab_size / 32))``, a token bitmask of the kept tokens, as
            ``allowed_mask`` takes it.
        ids: int32 ``(rows, max_kept_ids)``, the kept ids in their order, then -1. All are -1 where
            there are more than ``max_kept_ids``.
        first_id: int32 ``(rows,)``, the first kept id of the order, or -1.
        first_logit: float32 ``(rows,)``, its logit after step 6, or NaN.
        last_id: int32 ``(rows,)``, the last kept id of the order, or -1.
        last_logit: float32 ``(rows,)``, its logit after step 6, or NaN. A token is kept if its
            logit is larger, or equal and its id at most ``last_id``.
    """

    counts: Tensor
    total: Tensor
    masses: Tensor
    id_masses: Tensor | None = None
    mask: Tensor | None = None
    ids: Tensor | None = None
    first_id: Tensor | None = None
    first_logit: Tensor | None = None
    last_id: Tensor | None = None
    last_logit: Tensor | None = None


class SampleOutput(NamedTuple):
    """What :func:`llm_sampling.sample` returns.

    Attributes:
        tokens: int64 ``(rows,)``, or ``(rows, num_samples)`` when ``num_samples`` > 1; -1 in a row
            without candidates.
        logprobs: float32 natural logarithms of the shape of ``tokens`` (NaN where the token is -1),
            of the kind that was asked for, or the first of several; None if none was.
        status: int32 ``(rows,)``, a set of bits: 1 NaN seen, 2 no candidate, 4 +inf seen, 8 no room
            for the row's token in the text of its history.
        processed: the logprobs of this kind, or None if not asked for.
        raw: the logprobs of this kind, or None if not asked for.
        kept: the kept set, or None if not asked for.
    """

    tokens: Tensor
    logprobs: Tensor | None
    status: Tensor
    processed: TokenLogprobs | None = None
    raw: TokenLogprobs | None = None
    kept: KeptSet | None = None


class ScoreOutput(NamedTuple):
    """What :func:`llm_sampling.score` returns, of the given tokens instead of drawn ones.

    Attributes:
        logprobs: float32 natural logarithms of the shape of the given tokens, of the kind that was
            asked for, or the first of several; -inf for a token that has no probability, NaN for an
            id outside of the vocabulary and in a row without candidates.
        ranks: int32 of that shape, the places of the tokens in the order, from 1; -1 for a token
            that is not in it.
        status: int32 ``(rows,)``, as of ``sample``.
        processed: the logprobs of this kind, or None if not asked for.
        raw: the logprobs of this kind, or None if not asked for.
        kept: the kept set, or None if not asked for.
    """

    logprobs: Tensor
    ranks: Tensor
    status: Tensor
    processed: TokenLogprobs | None
    raw: TokenLogprobs | None
    kept: KeptSet | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a call returns besides tokens and status, checked.

    Attributes:
        logprobs: the kinds.
        top_logprobs: how many tokens each kind lists; None: none, and no ranks.
        token_ids: int32 ``(rows, n)``, or ``(1, n)`` for all rows, contiguous: ids whose logprobs
            are returned; those outside the vocabulary are padding. None: none.
        kept: the form of the kept set, or None for no kept set.
        max_kept_ids: how many ids the form "ids" lists; 0 in every other form.
    """

    logprobs: tuple[Kind, ...] = ()
    top_logprobs: int | None = None
    token_ids: Tensor | None = None
    kept: KeptForm | None = None
    max_kept_ids: int = 0

    @property
    def is_more(self) -> bool:
        """Whether more than the tokens' logprobs of one kind is wanted."""
        return (
            len(self.logprobs) > 1
            or self.top_logprobs is not None
            or self.token_ids is not None
            or self.kept is not None
        )


#: Tokens and status alone.
NOTHING = Wanted()


def wanted(
    rows: int,
    device: torch.device,
    *,
    logprobs: Logprobs | None = None,
    top_logprobs: int | None = None,
    logprob_token_ids: TokenIds | None = None,
    kept: KeptForm | None = None,
    max_kept_ids: int | None = None,
) -> Wanted:
    """The arguments of a call that say what it returns, checked.

    Raises:
        ValueError: one is out of its range, or needs another one.
    """
    kinds = kinds_of(logprobs)
    for name, value in (("top_logprobs", top_logprobs), ("logprob_token_ids", logprob_token_ids)):
        if value is not None and not kinds:
            raise ValueError(f'{name} needs logprobs, "processed", "raw" or both, got None')
    if top_logprobs is not None:
        top_logprobs = list_length("top_logprobs", top_logprobs, 0)
    if kept is not None and kept not in _FORMS:
        raise checks.refusal("kept", 'None, "mask", "ids" or "ends"', kept)
    if max_kept_ids is not None:
        if kept != "ids":
            raise ValueError(f'max_kept_ids needs kept="ids", got kept={kept!r}')
        max_kept_ids = list_length("max_kept_ids", max_kept_ids, 1)
    return Wanted(
        kinds,
        top_logprobs,
        None if logprob_token_ids is None else _token_ids(logprob_token_ids, rows, device),
        kept,
        (max_kept_ids or DEFAULT_KEPT_IDS) if kept == "ids" else 0,
    )


def kinds_of(logprobs: object) -> tuple[Kind, ...]:
    """``logprobs`` as a tuple of kinds; a ValueError if it has others, or one twice."""
    rule = 'None, "processed", "raw", or both of them in a sequence'
    if logprobs is None:
        return ()
    given = [logprobs] if isinstance(logprobs, str) else logprobs
    if not isinstance(given, Sequence) or not given:
        raise checks.refusal("logprobs", rule, logprobs)
    if len(set(map(repr, given))) < len(given) or any(kind not in KINDS for kind in given):
        raise checks.refusal("logprobs", rule, logprobs)
    return tuple(given)


def list_length(name: str, value: object, least: int) -> int:
    """The length of a row's list, at least ``least``; a ValueError if it is not one."""
    number = checks.integer_at_least(name, value, least)
    if number > MAX_LISTED:
        raise checks.refusal(name, f"at most {MAX_LISTED}", value)
    return number


def _token_ids(given: object, rows: int, device: torch.device) -> Tensor:
    """``logprob_token_ids`` as int32 ``(rows, n)``, or ``(1, n)`` for all rows."""
    name = "logprob_token_ids"
    rule = f"integers, the same for all rows or some for each of the {rows} rows"
    ids = token_ids(name, given, rule, device)
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] not in (1, rows)):
        raise ValueError(f"{name} must be {rule}, got shape {tuple(ids.shape)}")
    return ids if ids.dim() == 2 else ids.unsqueeze(0)


# ---- The results' tensors ----

#: Gives a tensor of a shape and a dtype.
Take = Callable[[tuple[int, ...], torch.dtype], Tensor]


def output_of(
    wanted: Wanted, rows: int, num_samples: int, vocab_size: int, take: Take
) -> SampleOutput:
    """A SampleOutput whose tensors are taken, one after the other, each once."""
    of_tokens = (rows,) if num_samples == 1 else (rows, num_samples)
    of_ids = None if wanted.token_ids is None else (rows, wanted.token_ids.shape[1])
    float32, int32, int64 = torch.float32, torch.int32, torch.int64

    def of_kind(kind: Kind) -> TokenLogprobs | None:
        if kind not in wanted.logprobs:
            return None
        logprobs = take(of_tokens, float32)
        ranks = top_ids = top_logprobs = id_logprobs = id_ranks = None
        if wanted.top_logprobs is not None:
            ranks = take(of_tokens, int32)
            top_ids = take((rows, wanted.top_logprobs), int32)
            top_logprobs = take((rows, wanted.top_logprobs), float32)
        if of_ids is not None:
            id_logprobs = take(of_ids, float32)
            if wanted.top_logprobs is not None:
                id_ranks = take(of_ids, int32)
        return TokenLogprobs(logprobs, ranks, top_ids, top_logprobs, id_logprobs, id_ranks)

    def of_kept_set() -> KeptSet | None:
        if wanted.kept is None:
            return None
        kept = KeptSet(
            counts=take((rows,), int32),
            total=take((rows,), int64),
            masses=take(of_tokens, int64),
            id_masses=None if of_ids is None else take(of_ids, int64),
        )
        if wanted.kept == "mask":
            return kept._replace(mask=take((rows, -(-vocab_size // 32)), int32))
        if wanted.kept == "ids":
            return kept._replace(ids=take((rows, wanted.max_kept_ids), int32))
        return kept._replace(
            first_id=take((rows,), int32),
            first_logit=take((rows,), float32),
            last_id=take((rows,), int32),
            last_logit=take((rows,), float32),
        )

    tokens, status = take(of_tokens, int64), take((rows,), int32)
    kinds = {kind: of_kind(kind) for kind in KINDS}
    first = kinds[wanted.logprobs[0]] if wanted.logprobs else None
    return SampleOutput(
        tokens,
        None if first is None else first.logprobs,
        status,
        kinds["processed"],
        kinds["raw"],
        of_kept_set(),
    )


def tensors_of(output: SampleOutput) -> list[Tensor]:
    """The tensors of an output in the order in which :func:`output_of` takes them."""
    parts = (output.processed, output.raw, output.kept)
    tensors = (tensor for part in parts if part is not None for tensor in part)
    return [output.tokens, output.status, *(tensor for tensor in tensors if tensor is not None)]


def outputs_of(wanted: Wanted, many: Iterable[tuple[Tensor, ...]]) -> list[SampleOutput]:
    """An output of each tuple of tensors, which are in the order of :func:`tensors_of`.

    What is worked out here once would take microseconds in each step of a decode loop.
    """
    places = itertools.count()
    plan: Any = output_of(wanted, 1, 1, 1, lambda shape, dtype: next(places))  # type: ignore[arg-type,return-value]
    make = tuple.__new__  # without a named tuple's check of the length
    if next(places) == 2:  # the same as below, in a tenth of the time
        return [make(SampleOutput, (t, None, s, None, None, None)) for t, s in many]

    def maker_of(part: Any) -> Callable[[tuple[Tensor | None, ...]], Any]:
        """Picks the tensors of a part; place -1 has None."""
        if part is None:
            return lambda tensors: None
        pick = operator.itemgetter(*(-1 if place is None else place for place in part))
        return lambda tensors: make(type(part), pick(tensors))

    parts = [maker_of(part) for part in (plan.processed, plan.raw, plan.kept)]
    place_of_logprobs = -1 if plan.logprobs is None else plan.logprobs

    def output(tensors: tuple[Tensor | None, ...]) -> SampleOutput:
        of_parts = [part(tensors) for part in parts]
        tokens, status, logprobs = tensors[0], tensors[1], tensors[place_of_logprobs]
        return make(SampleOutput, (tokens, logprobs, status, *of_parts))

    return [output((*tensors, None)) for tensors in many]


_Part = TypeVar("_Part", bound=SampleOutput | TokenLogprobs | KeptSet)

#: What a row that has no token holds, where it is neither -1 nor NaN.
_NOTHING_OF = dict.fromkeys(("counts", "total", "masses", "id_masses", "mask"), 0)


def without_rows(output: SampleOutput, is_gone: Tensor) -> SampleOutput:
    """The results with nothing in some rows, bool ``(rows,)``; their status stays as it is."""

    def cleared(name: str, tensor: Tensor) -> Tensor:
        of_row = is_gone.view(-1, *[1] * (tensor.dim() - 1))
        nothing = torch.nan if tensor.is_floating_point() else _NOTHING_OF.get(name, -1)
        return torch.where(of_row, nothing, tensor)

    def part_of(part: _Part) -> _Part:
        values: dict[str, Any] = {}
        for name, value in zip(part._fields, part, strict=True):
            if isinstance(value, Tensor):
                values[name] = value if name == "status" else cleared(name, value)
            else:
                values[name] = None if value is None else part_of(value)
        return type(part)(**values)

    return part_of(output)


def without_draws(output: SampleOutput) -> SampleOutput:
    """The results of one draw, whose dimension of draws is taken away."""

    def squeezed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.squeeze(-1)

    def of_kind(kind: TokenLogprobs | None) -> TokenLogprobs | None:
        if kind is None:
            return None
        return kind._replace(logprobs=kind.logprobs.squeeze(-1), ranks=squeezed(kind.ranks))

    kept = output.kept
    return SampleOutput(
        output.tokens.squeeze(-1),
        squeezed(output.logprobs),
        output.status,
        of_kind(output.processed),
        of_kind(output.raw),
        None if kept is None else kept._replace(masses=kept.masses.squeeze(-1)),
    )


def score_of(output: SampleOutput, kind: Kind, shape: Sequence[int]) -> ScoreOutput:
    """What a call says of the ids that it was asked for, ``(rows, n)``, in place of its draws.

    ``shape`` is that of the result for them, and ``kind`` the first one.
    """

    def of_kind(found: TokenLogprobs | None) -> TokenLogprobs | None:
        if found is None:
            return None
        assert found.id_logprobs is not None
        assert found.id_ranks is not None
        return TokenLogprobs(
            found.id_logprobs.view(shape),
            found.id_ranks.view(shape),
            found.top_ids,
            found.top_logprobs,
        )

    kinds = {"processed": of_kind(output.processed), "raw": of_kind(output.raw)}
    first, kept = kinds[kind], output.kept
    if kept is not None:
        assert kept.id_masses is not None
        kept = kept._replace(masses=kept.id_masses.view(shape), id_masses=None)
    assert first is not None
    assert first.ranks is not None
    return ScoreOutput(
        first.logprobs, first.ranks, output.status, kinds["processed"], kinds["raw"], kept
    )
