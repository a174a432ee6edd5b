"""The entry points: check the arguments, resolve the backend, run it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llm_sampling import backends, checks, ops
from llm_sampling.calls import ExtraIds, Params, check_logits, make_call
from llm_sampling.history import TokenHistory
from llm_sampling.masks import Mask
from llm_sampling.results import (
    KeptForm,
    Logprobs,
    SampleOutput,
    ScoreOutput,
    TokenIds,
    score_of,
)
from llm_sampling.table import RequestTable
from llm_sampling.tensors import token_ids


def sample(
    logits: Tensor,
    params: Params,
    slots: Sequence[int] | Tensor | None = None,
    *,
    history: TokenHistory | None = None,
    allowed_mask: Mask | None = None,
    positions: Sequence[int] | Tensor | None = None,
    text_positions: Sequence[int] | Tensor | None = None,
    record: bool | Sequence[bool] | Tensor = False,
    extra_output_ids: ExtraIds | None = None,
    num_samples: int = 1,
    logprobs: Logprobs | None = None,
    top_logprobs: int | None = None,
    logprob_token_ids: TokenIds | None = None,
    kept: KeptForm | None = None,
    max_kept_ids: int | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> SampleOutput:
    """Draw a token from each row of ``logits``: penalties, temperature, top-k, top-p, min-p, draw.

    A token is a function of its row's logits, parameters, history, seed and position, and of
    nothing else: not of the backend, the device, the batch or the number of threads.
    docs/semantics.md gives the rules; :mod:`llm_sampling.reference` is the same in torch.

    Args:
        logits: ``(rows, vocab_size)``, float32, float16 or bfloat16, ``vocab_size`` in 1 .. 2^20,
            dense, with any strides (a copy is made where the last is not 1). Never modified. No
            gradient goes through a draw: the results do not require one.
        params: one for all rows, one per row, a prepared :class:`BatchParams`, or a
            :class:`RequestTable`.
        slots: where ``params`` is a :class:`RequestTable`: integers ``(rows,)``, the slot of each
            row; several rows may have the same. -1 is a row of padding: its logits are not read,
            its token is -1, its logprob NaN and its status 0. Any other slot that does not exist
            gives the token -1 and the status 2.
        history: the tokens so far; needed where a penalty is on. Not modified: append the tokens
            with :meth:`TokenHistory.append`.
        allowed_mask: which tokens may be drawn. An int32 tensor ``(rows, ceil(vocab_size / 32))``
            is a bitmask, as xgrammar and llguidance produce it: bit ``t & 31`` of word ``t >> 5``
            set means that token t may be drawn. A bool tensor is ``(rows, vocab_size)``. Either may
            be one row for all rows, a numpy array, or wider than the logits, where the rest is
            padding. A list has a list of token ids, or None for all tokens, for each row.
            :func:`llm_sampling.pack_mask` makes a bitmask of any of them.
        positions: ``(rows,)`` integers, taken modulo 2^64: how many tokens each request has
            produced so far. A seed draws anew at every position, and the same token at the same
            position. Default: the position in ``params``, else the length of the output in
            ``history``, else 0, so that a loop without a history must count them.
        text_positions: instead of ``positions``, where ``params`` is a :class:`RequestTable`:
            ``(rows,)`` integers, the place in its whole text, from 0 on, of the token whose logits
            each row has. The position is ``text_position + 1 - prompt_length``.
        record: where ``params`` is a :class:`RequestTable`: after the draw, add each row's token to
            its slot's history, where the table keeps any, and 1 to its slot's position, unless
            positions of either kind are given. A row that shares its slot with another row is not
            recorded, nor is a row that is False in a bool tensor or sequence ``(rows,)``. A row
            that is to be recorded, and whose slot has as many ids as the table's ``max_length``,
            gets the token -1 and the status 8.
        extra_output_ids: ids that come next in each row's output, for this call alone, as those of
            a draft do that its row is to verify: integers ``(rows, n)``, n at most 64, with padding
            outside the vocabulary such as -1, or a list of ids for each row. The history stays as
            it is, and so does the position.
        num_samples: how many tokens to draw from each row, independently; draw 0 is the token of
            ``num_samples=1``.
        logprobs: None; "processed": of the distribution that the token was drawn from; "raw": of
            ``softmax(logits)`` without penalties, temperature or filters; or both in a sequence.
            Natural logarithms.
        top_logprobs: how many tokens each kind of logprobs lists, 0 .. 1024, the best ones first;
            0 lists none and gives the ranks of the tokens alone. None: neither lists nor ranks.
        logprob_token_ids: token ids whose logprobs are returned too: a list for all rows, or a list
            for each row (padded with -1), or an integer tensor ``(n,)`` or ``(rows, n)``. A list of
            one row is for all rows. An id outside of the vocabulary is padding.
        kept: None; or a form in which the kept set is returned, with its mass and that of the
            tokens: a token bitmask ("mask"), the ids in their order ("ids"), or the first and the
            last token of it ("ends").
        max_kept_ids: how many ids ``kept="ids"`` lists, 1 .. 1024; a row that keeps more lists
            none, and gives their number. Default: 256.
        backend: a name in :data:`llm_sampling.backends.BACKENDS`, which runs or raises, or "auto".
        check: raise for rows with NaN, +inf or no candidate. Default: True for logits on the CPU,
            False where it would wait for the device.

    Returns:
        ``SampleOutput(tokens, logprobs, status, processed, raw, kept)``: tokens int64 and logprobs
        float32 (or None), both ``(rows,)``, or ``(rows, num_samples)`` where ``num_samples`` > 1;
        status int32 ``(rows,)``; the lists of each kind of logprobs; the kept set.

    Raises:
        ValueError: an argument is out of its range, or shapes, dtypes or devices disagree; the
            message names the argument, the rule and the value.
        InvalidLogitsError: ``check`` found bad rows; ``.rows`` holds their indices.
        RuntimeError: the named backend cannot run here; the message says why.

    Example:
        >>> params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, seed=1)
        >>> tokens = sample(torch.randn(2, 32000), params).tokens
    """
    asked = None
    if (
        isinstance(params, RequestTable)
        and history is None
        and positions is None
        and text_positions is None
        and extra_output_ids is None
        and logprob_token_ids is None
        and (logprobs is None or isinstance(logprobs, (str, tuple)))
        and (record is True or record is False)
        and isinstance(logits, Tensor)
    ):
        asked = (
            *(logits.dtype, record, num_samples, check, backend),
            *(logprobs, top_logprobs, kept, max_kept_ids),
        )
        output = params.run_prepared(asked, logits, slots, allowed_mask)
        if output is not None:
            return output
    call = make_call(
        logits,
        params,
        history=history,
        allowed_mask=allowed_mask,
        positions=positions,
        num_samples=num_samples,
        check=check,
        slots=slots,
        text_positions=text_positions,
        record=record,
        extra_output_ids=extra_output_ids,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        logprob_token_ids=logprob_token_ids,
        kept=kept,
        max_kept_ids=max_kept_ids,
    )
    if call.param_slots is None and ops.is_needed(call):
        return ops.sample(call, backend)
    module = backends.resolve(backend, call.logits.device)
    if not isinstance(params, RequestTable):
        return module.sample(call)
    return params.run(module, call, asked)


def score(
    logits: Tensor,
    tokens: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    params: Params,
    slots: Sequence[int] | Tensor | None = None,
    *,
    history: TokenHistory | None = None,
    allowed_mask: Mask | None = None,
    extra_output_ids: ExtraIds | None = None,
    logprobs: Logprobs = "processed",
    top_logprobs: int = 0,
    kept: KeptForm | None = None,
    max_kept_ids: int | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> ScoreOutput:
    """The logprobs and ranks of given tokens, as :func:`sample` has them; nothing is drawn.

    So prompts are scored, and so a trainer asks how likely the tokens of a sampler were.

    Args:
        logits: as for :func:`sample`, and so are the others: one row for each place of a text.
        tokens: the tokens to score: ``(rows,)``, one for each row, or ``(rows, n)``; integers in
            lists or a tensor on the logits' device. An id outside of the vocabulary is padding,
            whose logprob is NaN and whose rank is -1.
        params: positions and seeds do not matter here.
        slots: as for :func:`sample`.
        history: needed where a penalty is on.
        allowed_mask: the tokens that may be drawn.
        extra_output_ids: ids that come next in each row's output.
        logprobs: "processed", "raw" or both in a sequence. A token that no draw can give has the
            processed logprob -inf.
        top_logprobs: how many tokens each kind lists, 0 .. 1024.
        kept: as for :func:`sample`; ``masses`` are those of the given tokens.
        max_kept_ids: as for :func:`sample`.
        backend: a name or "auto".
        check: as for :func:`sample`.

    Returns:
        ``ScoreOutput(logprobs, ranks, status, processed, raw, kept)``: logprobs float32 and ranks
        int32 of the shape of ``tokens``; status int32 ``(rows,)``; the lists of each kind; the kept
        set.

    Raises:
        ValueError, InvalidLogitsError, RuntimeError: as :func:`sample`.

    Example:
        >>> logprobs = score(logits[:-1], prompt_ids[1:], SamplingParams(), logprobs="raw").logprobs
    """
    logits = check_logits(logits)
    rows = logits.shape[0]
    rule = f"integers ({rows},) or ({rows}, n)"
    ids = token_ids("tokens", tokens, rule, logits.device)
    if ids.dim() not in (1, 2) or ids.shape[0] != rows:
        raise ValueError(f"tokens must be {rule}, got shape {tuple(ids.shape)}")
    if logprobs is None:
        raise checks.refusal("logprobs", '"processed", "raw", or both in a sequence', logprobs)
    top_logprobs = checks.integer_at_least("top_logprobs", top_logprobs, 0)
    call = make_call(
        logits,
        params,
        history=history,
        allowed_mask=allowed_mask,
        seeded=False,
        slots=slots,
        extra_output_ids=extra_output_ids,
        check=check,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        logprob_token_ids=ids.unsqueeze(-1) if ids.dim() == 1 else ids,
        kept=kept,
        max_kept_ids=max_kept_ids,
    )
    if call.param_slots is None and ops.is_needed(call):
        output = ops.sample(call, backend)
    else:
        output = backends.resolve(backend, call.logits.device).sample(call)
    return score_of(output, call.wanted.logprobs[0], ids.shape)


def filter_logits(
    logits: Tensor,
    params: Params,
    slots: Sequence[int] | Tensor | None = None,
    *,
    history: TokenHistory | None = None,
    allowed_mask: Mask | None = None,
    extra_output_ids: ExtraIds | None = None,
    backend: str = "auto",
) -> Tensor:
    """The logits that :func:`sample` would draw from, for loops that draw themselves.

    Args:
        logits: as for :func:`sample`, and so are the others.
        params: positions and seeds do not matter here.
        slots: as for :func:`sample`; a row without a slot is all -inf.
        history: needed where a penalty is on.
        allowed_mask: the tokens that may be kept.
        extra_output_ids: ids that come next in each row's output.
        backend: a name or "auto".

    Returns:
        float32 ``(rows, vocab_size)``: the processed logits divided by the temperature in the kept
        set, -inf elsewhere. A greedy row keeps its one token's processed logit undivided. A row
        without candidates is all -inf.

    Raises:
        ValueError, RuntimeError: as :func:`sample`.
    """
    call = make_call(
        logits,
        params,
        history=history,
        allowed_mask=allowed_mask,
        seeded=False,
        slots=slots,
        extra_output_ids=extra_output_ids,
    )
    if call.param_slots is None and ops.is_needed(call):
        return ops.filter_logits(call, backend)
    return backends.resolve(backend, call.logits.device).filter_logits(call)
