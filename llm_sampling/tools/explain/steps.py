"""What each step does to one row of logits: the probabilities after it, and which tokens it cuts.

    model -> record -> logits, history -> explain -> Explanation -> rows

Every number comes from :mod:`llm_sampling.reference`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llm_sampling import checks, reference
from llm_sampling.backends.base import SampleCall, raise_on_status
from llm_sampling.calls import make_call
from llm_sampling.fields import FIELDS, to_float32
from llm_sampling.generation.models import LanguageModel
from llm_sampling.history import TokenHistory
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.sequence_rules import Reason, SequenceRules, penalty_reasons

#: The filters, in the order in which they apply.
FILTERS = tuple(name for name, f in FIELDS.items() if f.kind in ("rank", "mass", "depth"))

#: The stages after which there is a distribution, in order: the model's own, steps 2 to 6 of
#: docs/semantics.md, steps 9 and 10, then one stage for each filter.
STAGES = ("raw", "penalties", "temperature", *FILTERS)

#: Stage to the name of what cuts a token there: the token is at -inf, the row is greedy, or a
#: filter cuts it.
CUTS = {"penalties": "-inf", "temperature": "greedy", **{name: name for name in FILTERS}}


@dataclass(frozen=True, eq=False)
class Explanation:
    """One row after each step. Tensors are ``(vocab_size,)`` in id order, on the logits' device.

    Attributes:
        params: the row's parameters.
        logits: float64, the model's own.
        processed: float64, the logits after bias and penalties (steps 2 to 6).
        order: int64, the ids from the best token to the worst (step 7).
        probabilities: stage to float64. "raw" is the softmax of ``logits``, in which a NaN counts
            as -inf and the tokens at +inf share the mass. The others are the masses of step 10
            divided by their sum over the tokens kept so far; "penalties" uses temperature 1.
            :func:`~llm_sampling.sample` draws from those of "min_p".
        kept_after: stage to bool. A kept token may have probability 0; it is never drawn.
        cut_by: for each token a value of :data:`CUTS`, or None if it is kept to the end.
        reasons: by token id, why the rules that look at the history lower it (step 5a); a bad word
            of a single id is among them. Most tokens have no entry.
        text: the ids of prompt and output in which the reasons have their places; empty where the
            history does not keep them in order.
    """

    params: SamplingParams
    logits: Tensor
    processed: Tensor
    order: Tensor
    probabilities: Mapping[str, Tensor]
    kept_after: Mapping[str, Tensor]
    cut_by: tuple[str | None, ...]
    reasons: Mapping[int, tuple[Reason, ...]]
    text: tuple[int, ...]

    @property
    def kept(self) -> Tensor:
        """The tokens that are left after the last step, bool."""
        return self.kept_after[STAGES[-1]]

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self.logits.shape[0]


def explain(
    logits: Tensor, params: SamplingParams, *, history: TokenHistory | None = None
) -> Explanation:
    """Compute what each step does to one row.

    Args:
        logits: ``(vocab_size,)``, float32, float16 or bfloat16.
        params: the row's parameters; the seed does not matter.
        history: the history of one row; required if a penalty or a rule that looks at the history
            is on.

    Raises:
        ValueError: an argument is out of its range.
        InvalidLogitsError: the row holds NaN or +inf, or leaves no candidate.

    Example:
        >>> explanation = explain(torch.tensor([2.0, 1.0, 0.0]), SamplingParams(top_k=2))
        >>> explanation.cut_by
        (None, None, 'top_k')
    """
    call = checked_call(logits, params, history)
    x, _ = reference.processed_logits(call)
    own = call.logits[0].double()
    probabilities = {"raw": reference.raw_logprobs(call.logits)[0].exp()}
    kept_after = {"raw": own > -torch.inf}
    # Each stage is the reference's result with the later filters switched off.
    for position, stage in enumerate(STAGES[1:], 2):
        later: dict[str, Any] = {name: FIELDS[name].off for name in STAGES[position:]}
        so_far = BatchParams.from_list([replace(params, **later)], device=x.device)
        keep, mass = reference.kept_set(x, so_far)
        mass = torch.where(keep, mass, 0)[0]
        probabilities[stage] = mass.double() / mass.sum().double()
        kept_after[stage] = keep[0]
    text, output_length = sequence_of(call)
    reasons = penalty_reasons(rules_of(params), text, output_length, x.shape[1])
    return Explanation(
        params=params,
        logits=own,
        processed=x[0].double(),
        order=torch.sort(x[0], descending=True, stable=True).indices,
        probabilities=probabilities,
        kept_after=kept_after,
        cut_by=_cut_by(kept_after),
        reasons={token: tuple(of_token) for token, of_token in reasons.items()},
        text=tuple(text),
    )


def checked_call(
    logits: Tensor, params: SamplingParams, history: TokenHistory | None
) -> SampleCall:
    """The row as a call with one row.

    Raises:
        ValueError: an argument is out of its range.
        InvalidLogitsError: :func:`~llm_sampling.sample` would refuse the row.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dim() != 1:
        raise ValueError(f"logits must have shape (vocab_size,), got {tuple(logits.shape)}")
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
    # Drawing a seed would advance the caller's random generator, and no seed is needed.
    call = make_call(logits[None], params, history=history, seeded=False)
    raise_on_status(reference.sample(call).status)
    return call


def rules_of(params: SamplingParams) -> SequenceRules:
    """The rules that look at the history, bad words of a single id included."""
    values: dict[str, Any] = {
        f.name: () if getattr(params, f.name) is None else getattr(params, f.name)
        for f in fields(SequenceRules)
    }
    # as the kernels read it: a tiny one is 0, which is off
    values["dry_multiplier"] = to_float32(params.dry_multiplier)
    return SequenceRules(**values)


def sequence_of(call: SampleCall) -> tuple[list[int], int]:
    """The ids of the only row's prompt and output, if they are kept, and the output's length."""
    history = call.history
    if history is None:
        return [], 0
    slot, text = int(history.slots[0]), history.text
    ids = [] if text is None else text.ids[slot, : int(text.lengths[slot])].tolist()
    return ids, int(history.lengths[slot])


def _cut_by(kept_after: Mapping[str, Tensor]) -> tuple[str | None, ...]:
    names = (None, *CUTS.values())
    code = torch.zeros_like(kept_after["raw"], dtype=torch.int64)
    # From the last stage to the first, so that the first stage that cuts a token wins.
    for stage, name in reversed(CUTS.items()):
        code = torch.where(kept_after[stage], code, names.index(name))
    return tuple(names[i] for i in code.tolist())


@dataclass(frozen=True, slots=True)
class Row:
    """One token in the table of steps.

    Attributes:
        token: the token id.
        logit: the model's own.
        processed: the logit after bias and penalties.
        probabilities: stage to probability; 0 once the token is cut.
        kept: whether the token is left after the last step.
        cut_by: a value of :data:`CUTS`, or None if the token is kept.
        reasons: why the rules that look at the history lower it; empty if they do not.
    """

    token: int
    logit: float
    processed: float
    probabilities: Mapping[str, float]
    kept: bool
    cut_by: str | None
    reasons: tuple[Reason, ...]


def rows(explanation: Explanation, top: int = 20) -> list[Row]:
    """The ``top`` best tokens of the model and the ``top`` best tokens after the penalties.

    There are at most ``2 * top`` rows. They are sorted as after the penalties, so the kept tokens
    come first.

    Raises:
        ValueError: ``top`` is not an integer >= 1.
    """
    checks.integer_at_least("top", top, 1)
    logits = explanation.logits
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    own = torch.sort(logits, descending=True, stable=True).indices[:top]
    shown = {*own.tolist(), *explanation.order[:top].tolist()}
    # The whole order is searched: penalties can move the model's best token to the end.
    ids = [token for token in explanation.order.tolist() if token in shown]
    numbers = {stage: p[ids].tolist() for stage, p in explanation.probabilities.items()}
    return [
        Row(
            token=token,
            logit=logit,
            processed=processed,
            probabilities={stage: numbers[stage][line] for stage in STAGES},
            kept=explanation.cut_by[token] is None,
            cut_by=explanation.cut_by[token],
            reasons=explanation.reasons.get(token, ()),
        )
        for line, (token, logit, processed) in enumerate(
            zip(
                ids,
                explanation.logits[ids].tolist(),
                explanation.processed[ids].tolist(),
                strict=True,
            )
        )
    ]


def record(
    language_model: LanguageModel,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int] = (),
    *,
    penalty_last_n: int = -1,
) -> tuple[Tensor, TokenHistory]:
    """The model's logits for the next token, and the history that the penalties read.

    Args:
        language_model: the model; it is called once.
        prompt_ids: the prompt's token ids, at least one.
        output_ids: the ids generated since; frequency and presence penalty count only these.
        penalty_last_n: that of the parameters.

    Returns:
        float32 ``(vocab_size,)`` on the CPU, and a history of one row, which keeps the ids in
        order.

    Raises:
        ValueError: an id is not in the model's vocabulary, or ``penalty_last_n`` is out of its
            range.
    """
    check_ids("prompt_ids", prompt_ids, language_model.vocab_size)
    if len(output_ids) > 0:
        check_ids("output_ids", output_ids, language_model.vocab_size)
    ids = [*prompt_ids, *output_ids]
    model = language_model.model
    options: dict[str, Any] = {"use_cache": False}
    # Logits of every position of a long prompt would not fit in memory.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids], device=model.device), **options)
    logits = output.logits[0, -1].to("cpu", torch.float32)
    history = TokenHistory.from_ids(
        [list(prompt_ids)],
        [list(output_ids)],
        logits.shape[0],
        max_length=len(ids),
        penalty_last_n=penalty_last_n,
    )
    return logits, history


def token_texts(language_model: LanguageModel) -> list[str]:
    """The text of every token of the vocabulary, including a leading space.

    Incomplete characters become U+FFFD; an id without a token has the text "".
    """
    tokenizer = language_model.tokenizer
    # Some tokenizers drop a leading space, so each token is decoded after a letter.
    letter: int = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    before = len(tokenizer.decode([letter], **options))
    pairs = [[letter, token] for token in range(language_model.vocab_size)]
    return [text[before:] for text in tokenizer.batch_decode(pairs, **options)]


def visible(text: str) -> str:
    """A token's text on one line: spaces as ␣, unprintable characters escaped as in Python."""
    return "".join(
        "\N{OPEN BOX}"
        if c == " "
        else c
        if c.isprintable()
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def stage_label(stage: str, params: SamplingParams) -> str:
    """A stage and its setting, such as "top-p 0.9"."""
    if stage == "raw":
        return "model"
    if stage == "penalties":
        return "penalties" if params.logit_bias is None else "bias and penalties"
    if stage == "temperature" and is_greedy(params):
        return "greedy"
    value = getattr(params, stage)
    return f"{cut_label(stage)} {value if FIELDS[stage].is_integer else format(value, 'g')}"


def is_greedy(params: SamplingParams) -> bool:
    """Whether the temperature is 0 in float32."""
    return BatchParams.from_list([params]).all_greedy


def cut_label(cut_by: str) -> str:
    """A value of :data:`CUTS` as it is shown, such as "top-k"."""
    return cut_by.replace("_", "-")


#: A rule to its name in a few letters.
_RULES = {
    "dry_multiplier": "DRY",
    "no_repeat_ngram_size": "n-gram",
    "bad_words": "bad word",
    "min_tokens": "min tokens",
}
#: Of a longer sequence so many last tokens are shown.
_SHOWN = 8


def lowered(explanation: Explanation) -> list[int]:
    """The tokens that the rules lower, from the best of the model to the worst."""
    own = explanation.probabilities["raw"]
    return sorted(explanation.reasons, key=lambda token: (-float(own[token]), token))


def list_label(reasons: Sequence[Reason]) -> str:
    """Reasons in a few words, bans first, such as "banned by n-gram, -0.8 by DRY"."""
    labels = [
        f"{_amount(reason)} by {_RULES[reason.rule]}" for reason in sorted(reasons, key=_bans_first)
    ]
    return ", ".join(dict.fromkeys(labels))


def reason_label(explanation: Explanation, token: int, reason: Reason, texts: Sequence[str]) -> str:
    """A reason in a sentence with its facts, such as "banned by min_tokens 9: the output has 3".

    Args:
        explanation: of the row.
        token: the token's id.
        reason: one of ``explanation.reasons[token]``.
        texts: the text of each token, ``vocab_size`` of them.

    Places are counted from 0, over the ids of prompt and output.
    """
    params, length = explanation.params, reason.length
    ids = explanation.text[len(explanation.text) - length :]
    if reason.rule == "dry_multiplier":
        allowed = params.dry_allowed_length
        rule = f"DRY, dry_allowed_length {allowed}"
        end = "the last token" if length == 1 else f"the last {length} tokens"
        fact = f"it followed {end}, {_quoted(ids, texts)}, at place {reason.place}"
    elif reason.rule == "no_repeat_ngram_size":
        rule = f"no_repeat_ngram_size {params.no_repeat_ngram_size}"
        after = f"followed {_quoted(ids, texts)}" if length else "came"
        fact = f"it {after} at place {reason.place}"
    elif reason.rule == "bad_words":
        word = (*ids, token)
        rule, fact = "bad_words", f"it completes {_quoted(word, texts)}, {list(word[-_SHOWN:])}"
    else:
        rule, fact = f"min_tokens {params.min_tokens}", f"the output has {length}"
    return f"{_amount(reason)} by {rule}: {fact}"


def _amount(reason: Reason) -> str:
    return "banned" if reason.amount == math.inf else f"-{reason.amount:g}"


def _bans_first(reason: Reason) -> bool:
    return reason.amount < math.inf


def _quoted(ids: Sequence[int], texts: Sequence[str]) -> str:
    left_out = "…" if len(ids) > _SHOWN else ""
    return f'"{left_out}{visible("".join(texts[token] for token in ids[-_SHOWN:]))}"'


def changes(stage: str, params: SamplingParams) -> bool:
    """Whether a stage may change the row; a filter never changes a greedy one."""
    if stage == "raw":
        return True
    if stage == "penalties":
        return params.needs_history or bool(params.logit_bias or params.bad_words)
    if stage != "temperature" and is_greedy(params):
        return False
    return bool(getattr(params, stage) != FIELDS[stage].off)


def check_ids(name: str, ids: object, vocab_size: int) -> None:
    """Raise a ValueError unless ``ids`` is a sequence of at least one id of the vocabulary."""
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)) or not ids:
        raise ValueError(f"{name} must be a sequence of at least one token id, got {ids!r}")
    for token in ids:
        if not checks.is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(f"{name} must hold integers in 0 .. {vocab_size - 1}, got {token!r}")


def check_text(name: str, text: object) -> None:
    """Raise a ValueError unless ``text`` is a str."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {text!r}")


def check_texts(texts: object, vocab_size: int) -> None:
    """Raise a ValueError unless ``texts`` holds one str for each token."""
    if not isinstance(texts, Sequence) or isinstance(texts, (str, bytes)):
        raise ValueError(f"texts must be a sequence of texts, got {type(texts).__name__}")
    if len(texts) != vocab_size:
        raise ValueError(f"texts must have one for each of {vocab_size} tokens, got {len(texts)}")
    for token, text in enumerate(texts):
        check_text(f"texts[{token}]", text)
