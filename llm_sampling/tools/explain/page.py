"""The steps of one row as an HTML page, whose sliders recompute them in the browser.

logits, history, params -> JSON -> data/explain.html, which has a copy of the rules in JavaScript
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_sampling.fields import FIELDS
from llm_sampling.history import TokenHistory
from llm_sampling.params import SamplingParams
from llm_sampling.sequence_rules import SequenceRules, breaks, matches, penalty_list
from llm_sampling.tools.explain.steps import (
    check_text,
    check_texts,
    checked_call,
    rules_of,
    sequence_of,
    visible,
)

#: The parameters that have a slider on the page.
SETTINGS = tuple(
    name for name, field in FIELDS.items() if field.kind not in ("bias", "seed", "sequences")
)

_TEMPLATE = Path(__file__).parent.parent / "data" / "explain.html"
_DATA_MARK = "{{data}}"


def page(
    logits: Tensor,
    texts: Sequence[str],
    params: SamplingParams,
    history: TokenHistory | None = None,
    prompt: str = "",
) -> str:
    """One self-contained HTML file, whose sliders recompute the row in the browser.

    The page holds the row's float32 logits and follows docs/semantics.md to the bit, so it keeps
    the tokens that :func:`~llm_sampling.sample` keeps.

    Args:
        logits: ``(vocab_size,)``, float32, float16 or bfloat16.
        texts: the text of each token, ``vocab_size`` of them.
        params: the sliders' first positions; its ``logit_bias`` and ``bad_words`` always apply,
            and its ``dry_breakers`` and ``stop_token_ids`` where their rules are on.
        history: the history of one row, for the penalties; without it they change nothing. Where it
            keeps the ids in order (``max_length``) the page can also change ``penalty_last_n`` and
            the rules that look at the order.
        prompt: shown at the top of the page.

    Raises:
        ValueError: an argument is out of its range.
        InvalidLogitsError: the row cannot be sampled from.
    """
    call = checked_call(logits, params, history)
    check_texts(texts, call.logits.shape[1])
    check_text("prompt", prompt)
    batch = call.batch
    bias = zip(batch.logit_bias_ids.tolist(), batch.logit_bias_values.tolist(), strict=True)
    alone = {word[0] for word in params.bad_words or () if len(word) == 1}
    data = {
        "prompt": prompt,
        "logits": base64.b64encode(
            call.logits[0].to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()
        ).decode("ascii"),
        "texts": [visible(text) for text in texts],
        "fields": {name: {"rule": FIELDS[name].rule, "off": FIELDS[name].off} for name in SETTINGS},
        "settings": {name: getattr(params, name) for name in SETTINGS},
        # JSON has no inf: null is a min-p that is off, and a bias that bans.
        "min_p_cut": _finite(batch.min_p_cut.item()),
        "bias": [
            [token, _finite(value)]
            for token, value in bias
            if token < len(texts) and token not in alone
        ],
        **_history_of_one(history),
        "rules": _rules(params, *sequence_of(call), len(texts)),
    }
    # JSON in ASCII without <, > and & cannot end the script element or start a comment.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for c in "<>&":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return _TEMPLATE.read_text(encoding="utf-8").replace(_DATA_MARK, text, 1)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _rules(
    params: SamplingParams, text: list[int], output_length: int, vocab_size: int
) -> dict[str, Any]:
    """What the rules that look at the history find, for any values of their numbers."""
    rules = rules_of(params)
    words = SequenceRules(bad_words=rules.bad_words)
    stop_ids = dict.fromkeys(token for token in rules.stop_token_ids if token < vocab_size)
    return {
        "matches": matches(text),
        "breaks": list(breaks(text, rules.dry_breakers)),
        "breaker_ids": [breaker[0] for breaker in rules.dry_breakers if len(breaker) == 1],
        "bad": list(penalty_list(words, text, output_length, vocab_size)),
        "stop_token_ids": list(stop_ids),
        "output_length": output_length,
    }


def _history_of_one(history: TokenHistory | None) -> dict[str, Any]:
    """What the penalties read: the ids in order if they are kept, else which ids there are.

    "ids" has the prompt, of "prompt_length", and the output. "seen" has the ids of either, and
    "counts" [id, count] for each id of the output.
    """
    if history is None:
        return {"ids": [], "prompt_length": 0, "seen": [], "counts": []}
    slot, text = int(history.slots[0]), history.text
    if text is not None:
        ids = text.ids[slot, : int(text.lengths[slot])].tolist()
        return {"ids": ids, "prompt_length": int(text.prompt_lengths[slot])}
    words = history.seen[slot].cpu().numpy().astype("<i4")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    count = history.counts[slot].cpu()
    produced = count.nonzero()[:, 0]
    return {
        "ids": None,
        "seen": bits.nonzero()[0].tolist(),
        "counts": torch.stack([produced, count[produced]], -1).tolist(),
    }
