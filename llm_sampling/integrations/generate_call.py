"""What surrounds us inside of transformers' ``generate``: its arguments, its loop, its processors.

It is read from the stack frames of transformers. There is no plainer way: a logits processor is not
told which loop calls it, which other processors there are or which rows have ended, and
``generate`` does not pass ``streamer``, ``synced_gpus`` and ``assistant_model`` to a custom loop
(see its ``_extract_generation_mode_kwargs``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class GenerateCall(NamedTuple):
    """A call of ``generate``.

    Attributes:
        config: its generation config, with the arguments that replace fields of it.
        processors: the logits processors that the user gave.
        mask: the attention mask of the prompts, as :func:`prompt_mask` gives it.
        streamer: as ``generate`` got it, and so are the others.
        synced_gpus: see there.
        assistant_model: see there.
    """

    config: GenerationConfig
    processors: list[Any]
    mask: Tensor | None
    streamer: Any
    synced_gpus: Any
    assistant_model: Any


def generate_call() -> GenerateCall | None:
    """The call of ``generate`` that we are in; None if there is none."""
    for frame in _callers():
        if frame.f_code.co_name == "generate":
            found = frame.f_locals
            return GenerateCall(
                found["generation_config"],
                list(found["logits_processor"] or ()),
                prompt_mask(found["self"], found["model_kwargs"]),
                found["streamer"],
                found["synced_gpus"],
                found["assistant_model"],
            )
    return None


def prompt_mask(model: Any, model_kwargs: Mapping[str, Any]) -> Tensor | None:
    """The mask of the ids that a text goes on from; None where no id is padding."""
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    return model_kwargs.get(name)


def calling_list(processor: LogitsProcessor) -> LogitsProcessorList | None:
    """The list of processors that calls this one; None if something else calls it."""
    for frame in _callers():
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if isinstance(caller, LogitsProcessorList) and any(one is processor for one in caller):
            return caller
    return None


def unfinished_rows() -> Tensor | None:
    """Of each row, whether ``generate``'s own loop goes on with it; None if it does not run."""
    loops = (frame.f_locals for frame in _callers() if frame.f_code.co_name == "_sample")
    found: Tensor | None = next(loops, {}).get("unfinished_sequences")
    return None if found is None else found.bool()


def refuse_other_loops() -> None:
    """A ValueError inside of beam search or assisted decoding."""
    for name in (frame.f_code.co_name for frame in _callers()):
        if name.startswith("_") and name.endswith(("_search", "_decoding")):
            raise ValueError(
                "a fused processor must draw one text a row (num_beams=1, no assistant_model, no "
                f"prompt lookup), and transformers called it in {name}"
            )


def _callers() -> Iterator[FrameType]:
    """The stack frames of transformers' generation code, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("transformers.generation."):
            yield frame
        frame = frame.f_back
