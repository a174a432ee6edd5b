"""What a generation config of transformers asks for: parameters of sampling, and more.

Nothing here imports transformers: a config is any object with these attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from llm_sampling import checks
from llm_sampling.params import SamplingParams

#: The logits processors of transformers that :class:`~llm_sampling.SamplingParams` replace, by
#: their class, and the field of the generation config that ``generate`` makes each from, with the
#: value at which it is off.
REPLACED: Mapping[str, tuple[str, float]] = {
    "TemperatureLogitsWarper": ("temperature", 1.0),
    "TopKLogitsWarper": ("top_k", 0),
    "TopPLogitsWarper": ("top_p", 1.0),
    "MinPLogitsWarper": ("min_p", 0.0),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", 1.0),
}

#: Fields that change which tokens are drawn, and the values besides None at which each is off.
#: transformers makes logits processors of the first, which run before the kernel in its own
#: ``generate``. What the second ask for is not supported.
AS_PROCESSORS: Mapping[str, tuple[object, ...]] = {
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0, 1),
}
NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "use_mtp": (False,),
    "speculation_type": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "renormalize_logits": (False,),
    "watermarking_config": (),
    "constraints": (),
    "force_words_ids": (),
}


#: Those of AS_PROCESSORS that :func:`rules_of_config` makes rules of.
AS_RULES = ("no_repeat_ngram_size", "bad_words_ids", "min_new_tokens")
#: Those that :func:`with_rules_of_config` takes.
_HONOURED = (*AS_RULES, "min_length")


def refuse_fields(
    config: Any, fields: Mapping[str, tuple[object, ...]], remedy: str | None = None
) -> None:
    """A ValueError that names the first field that is on.

    Args:
        config: the generation config.
        fields: the fields, and the values besides None at which each is off.
        remedy: what the message tells to do instead.
    """
    for name, off in fields.items():
        value = getattr(config, name, None)
        if value is not None and value not in off:
            more = "" if remedy is None else f": {remedy}"
            raise ValueError(
                f"{name} of the generation config cannot be honoured, got {value!r}{more}"
            )


def check_config(config: Any, *, takes_stop_strings: bool) -> None:
    """A ValueError if a model's generation config asks for what our own loop does not do.

    What :func:`with_rules_of_config` takes from it is done, if its values are in their ranges.

    Args:
        config: the generation config; None if the model has none.
        takes_stop_strings: whether the caller takes care of its ``stop_strings``.
    """
    if not takes_stop_strings:
        refuse_fields(config, {"stop_strings": ([],)}, "pass them as stop, or stop=()")
    others = {name: off for name, off in AS_PROCESSORS.items() if name not in _HONOURED}
    refuse_fields(config, {**others, **NOT_SUPPORTED}, "set it to None there")
    with_rules_of_config(SamplingParams(), config, end_ids=(), prompt_length=0)


def declared_ids(declared: int | Iterable[int] | None) -> list[int]:
    """The ids of a config's ``eos_token_id``, which may be None, an id or several."""
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared)


def rules_of_config(config: Any) -> dict[str, Any]:
    """The fields of :class:`~llm_sampling.SamplingParams` that stand for AS_RULES."""
    end_ids = declared_ids(getattr(config, "eos_token_id", None))
    ends = [[token] for token in end_ids]
    words = getattr(config, "bad_words_ids", None)
    if isinstance(words, (list, tuple)):  # SamplingParams names what is neither
        # as NoBadWordsLogitsProcessor, which bans no end token
        words = [word for word in words if word not in ends]
    least = getattr(config, "min_new_tokens", None)
    return {
        "no_repeat_ngram_size": getattr(config, "no_repeat_ngram_size", None),
        "bad_words": words or (),
        "min_tokens": least,
        "stop_token_ids": end_ids if least else None,  # elsewhere the loop says what ends a text
    }


def with_rules_of_config(
    params: SamplingParams,
    config: Any,
    *,
    end_ids: Iterable[int],
    prompt_length: int,
    has_least: bool = False,
) -> SamplingParams:
    """The parameters of a row with the rules of its model's generation config.

    They are those of ``no_repeat_ngram_size``, ``bad_words_ids``, ``min_new_tokens`` and
    ``min_length``, as ``generate`` of transformers applies them, where the row's own parameters
    leave the rule off.

    Args:
        params: of the row.
        config: the generation config; None if the model has none.
        end_ids: the end tokens, which are not drawn until the text has its least length.
        prompt_length: how many ids the prompt has, which count for ``min_length``.
        has_least: whether the row has a least length already.

    Raises:
        ValueError: a value of the config is out of its range.
    """
    rules = rules_of_config(config)
    least = rules["min_tokens"]
    if least is None:
        shortest = getattr(config, "min_length", None) or 0
        shortest = checks.integer_at_least("min_length of the generation config", shortest, 0)
        least = max(shortest - prompt_length, 0)
    changes: dict[str, Any] = {}
    if rules["no_repeat_ngram_size"] and not params.no_repeat_ngram_size:
        changes = {
            "no_repeat_ngram_size": rules["no_repeat_ngram_size"],
            "no_repeat_ngram_window": 0,
        }
    if rules["bad_words"] and not params.bad_words:
        changes["bad_words"] = rules["bad_words"]
    if least and not has_least and not params.min_tokens:
        changes |= {"min_tokens": least, "stop_token_ids": sorted(end_ids)}
    if not changes:
        return params
    try:
        return replace(params, **changes)
    except ValueError as error:
        raise ValueError(f"the generation config cannot be honoured: {error}") from error


def params_of_config(config: Any, seed: int | None, top_k: int) -> SamplingParams:
    """The parameters of a config; ``top_k`` is that of a config whose field is None."""

    def value(name: str, default: Any) -> Any:
        found = getattr(config, name, None)
        return default if found is None else found

    penalty = value("repetition_penalty", 1.0)
    if not config.do_sample:  # generate then builds none of the filters
        return SamplingParams(temperature=0.0, repetition_penalty=penalty, seed=seed)
    return SamplingParams(
        temperature=value("temperature", 1.0),
        top_k=value("top_k", top_k),
        top_p=value("top_p", 1.0),
        min_p=value("min_p", 0.0),
        repetition_penalty=penalty,
        seed=seed,
    )
