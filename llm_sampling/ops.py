"""The same calls as ops of torch.library, for compilers, tracers, modes and wrapped tensors.

Eager calls of plain tensors bypass them. An op takes the batch and the history field by field,
because a schema has tensors and numbers only. No gradient goes through an op: its results do not
require one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from llm_sampling import backends
from llm_sampling.backends.base import SampleCall
from llm_sampling.calls import make_call
from llm_sampling.fields import FIELDS
from llm_sampling.history import STATE_TENSORS, Text, TokenHistory
from llm_sampling.params import DTYPES, KERNEL_TENSORS, RULE_TENSORS, BatchParams
from llm_sampling.results import Kind, SampleOutput, Wanted, output_of, tensors_of
from llm_sampling.tensors import is_traced, is_wrapper

_TEXT_TENSORS = tuple(f"text_{name}" for name in Text._fields)
_NO_TEXT = (None,) * len(_TEXT_TENSORS)
_BATCH_FLAGS = ("all_greedy", "any_filter", "any_output_scope")

_INPUTS = ", ".join(
    [
        "Tensor logits",
        *(f"Tensor{'?' * (name in RULE_TENSORS)} {name}" for name in KERNEL_TENSORS),
        *(f"Tensor? {name}" for name in STATE_TENSORS),
        *(f"Tensor? {name}" for name in _TEXT_TENSORS),
        "Tensor? extra_output",
        "Tensor? allowed_mask",
        *(f"bool {name}" for name in _BATCH_FLAGS),
    ]
)
_LIBRARY = torch.library.Library("llm_sampling", "DEF")
_LIBRARY.define(
    f"sample({_INPUTS}, int num_samples, str? logprobs, bool check, str backend) "
    "-> (Tensor tokens, Tensor logprobs, Tensor status)"
)
# Where more is returned: the tensors of results.tensors_of. torch.func.vmap cannot call an op that
# returns a list, so it is another one. The kinds of logprobs are separated by commas.
_LIBRARY.define(
    f"sample_more({_INPUTS}, Tensor? token_ids, int num_samples, str logprobs, int? top_logprobs, "
    "str? kept, int max_kept_ids, bool check, str backend) -> Tensor[]"
)
_LIBRARY.define(f"filter_logits({_INPUTS}, str backend) -> Tensor")
_LIBRARY.define("pack(Tensor values, str parameter) -> Tensor")


def _inputs(call: SampleCall) -> tuple[Tensor | bool | None, ...]:
    history = [
        None if call.history is None else getattr(call.history, name) for name in STATE_TENSORS
    ]
    text = (None if call.history is None else call.history.text) or _NO_TEXT
    batch = [getattr(call.batch, name) for name in KERNEL_TENSORS]
    flags = [getattr(call.batch, name) for name in _BATCH_FLAGS]
    return (call.logits, *batch, *history, *text, call.extra_output, call.allowed_mask, *flags)


def _call(inputs: Sequence[Any], **options: Any) -> SampleCall:
    """The inverse of ``_inputs``, checked like the arguments of a user."""
    logits, *rest, extra_output, allowed_mask = inputs[: -len(_BATCH_FLAGS)]
    rest, text = rest[: -len(Text._fields)], Text(*rest[-len(Text._fields) :])
    batch = dict(zip(KERNEL_TENSORS, rest, strict=False))
    state = dict(zip(STATE_TENSORS, rest[len(KERNEL_TENSORS) :], strict=True))
    has_history = state["seen"] is not None
    if text.windows is None:
        window = torch.full_like(batch["top_k"], -1)
    else:
        window = text.windows[state["slots"].to(torch.int64)]
    params = BatchParams(
        **batch,
        penalty_last_n=window,
        unseeded=None,
        needs_history=has_history,
        any_window=text.windows is not None,
        any_ordered_rule=text.ids is not None,
        **dict(zip(_BATCH_FLAGS, inputs[-len(_BATCH_FLAGS) :], strict=True)),
    )
    history = None
    if has_history:
        found = None if text.ids is None else text
        history = TokenHistory(**state, vocab_size=logits.shape[1], text=found)
    return make_call(
        logits,
        params,
        history=history,
        extra_output_ids=extra_output,
        allowed_mask=allowed_mask,
        **options,
    )


def _sample(*args):  # type: ignore[no-untyped-def]
    *inputs, num_samples, logprobs, check, backend = args
    call = _call(inputs, num_samples=num_samples, logprobs=logprobs, check=check)
    output = backends.resolve(backend, call.logits.device).sample(call)
    no_logprobs = call.logits.new_empty(0, dtype=torch.float32)
    return output.tokens, no_logprobs if output.logprobs is None else output.logprobs, output.status


def _sample_fake(*args):  # type: ignore[no-untyped-def]
    logits, num_samples, logprobs = args[0], args[-4], args[-3]
    rows = logits.shape[0]
    shape = (rows,) if num_samples == 1 else (rows, num_samples)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty((0,) if logprobs is None else shape, dtype=torch.float32),
        logits.new_empty((rows,), dtype=torch.int32),
    )


#: The arguments of ``sample_more`` after its inputs.
_OPTIONS = (
    *("token_ids", "num_samples", "logprobs", "top_logprobs", "kept", "max_kept_ids"),
    *("check", "backend"),
)


def _options(call: SampleCall, backend: str) -> tuple[Any, ...]:
    asked = call.wanted
    return (
        *(asked.token_ids, call.num_samples, ",".join(asked.logprobs), asked.top_logprobs),
        *(asked.kept, asked.max_kept_ids, call.check, backend),
    )


def _kinds(names: str) -> tuple[Kind, ...]:
    """The kinds of logprobs of ``sample_more``; another name is refused when they are checked."""
    return tuple(cast("list[Kind]", names.split(","))) if names else ()


def _sample_more(*args):  # type: ignore[no-untyped-def]
    inputs = args[: -len(_OPTIONS)]
    options = dict(zip(_OPTIONS, args[-len(_OPTIONS) :], strict=True))
    backend = options.pop("backend")
    call = _call(
        inputs,
        logprob_token_ids=options.pop("token_ids"),
        logprobs=_kinds(options.pop("logprobs")) or None,
        max_kept_ids=options.pop("max_kept_ids") or None,
        **options,
    )
    return tensors_of(backends.resolve(backend, call.logits.device).sample(call))


def _sample_more_fake(*args):  # type: ignore[no-untyped-def]
    logits: Tensor = args[0]
    token_ids, num_samples, logprobs, top_logprobs, kept, max_kept_ids, *_ = args[-len(_OPTIONS) :]
    wanted = Wanted(_kinds(logprobs), top_logprobs, token_ids, kept, max_kept_ids)

    def take(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    return tensors_of(output_of(wanted, logits.shape[0], num_samples, logits.shape[1], take))


def _filter_logits(*args):  # type: ignore[no-untyped-def]
    *inputs, backend = args
    call = _call(inputs)
    return backends.resolve(backend, call.logits.device).filter_logits(call)


def _filter_logits_fake(*args):  # type: ignore[no-untyped-def]
    return args[0].new_empty(args[0].shape, dtype=torch.float32)


def _pack(values: Tensor, parameter: str) -> Tensor:
    """A parameter's values as its column has them, by the function that packs them elsewhere."""
    column = FIELDS[parameter].column
    assert column is not None
    packed = [column.pack(value) for value in values.tolist()]
    return torch.tensor(packed, dtype=column.dtype, device=values.device)


def _pack_fake(values: Tensor, parameter: str) -> Tensor:
    column = FIELDS[parameter].column
    assert column is not None
    return values.new_empty(values.shape, dtype=column.dtype)


def _without_gradient(name: str) -> Callable[..., Any]:
    """The op for inputs that may require a gradient, which its results do not."""

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.llm_sampling, name)(*args)

    return run


for _name, _kernel, _fake in (
    ("sample", _sample, _sample_fake),
    ("sample_more", _sample_more, _sample_more_fake),
    ("filter_logits", _filter_logits, _filter_logits_fake),
    ("pack", _pack, _pack_fake),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    _LIBRARY.impl(_name, _without_gradient(_name), "Autograd")
    torch.library.register_fake(f"llm_sampling::{_name}", _fake, lib=_LIBRARY)


def is_needed(call: SampleCall) -> bool:
    """Whether a call must be an op, because something else than plain tensors takes part in it."""
    inputs = _inputs(call)
    return is_traced() or any(is_wrapper(value) for value in inputs if isinstance(value, Tensor))


_Result = TypeVar("_Result")


def _run(op: Callable[..., _Result], call: SampleCall, backend: str, *options: object) -> _Result:
    """Call an op; what a class of tensors or a transform cannot do with it is a refusal by name."""
    if torch.compiler.is_compiling():
        return op(*_inputs(call), *options)
    backends.resolve(backend, call.logits.device)  # what it refuses is no fault of the logits
    inputs = _inputs(call)
    mode = getattr(call.logits, "fake_mode", None)
    if mode is not None:  # a fake tensor, which goes with fake tensors alone
        inputs = tuple(mode.from_tensor(x) if type(x) is Tensor else x for x in inputs)
    try:
        return op(*inputs, *options)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            "logits must be a plain tensor, or one whose class or transform can run custom ops, "
            f"got {type(call.logits).__name__}: {error}"
        ) from error


def sample(call: SampleCall, backend: str) -> SampleOutput:
    """``sample`` as one op of a graph."""
    if call.wanted.is_more:
        more = torch.ops.llm_sampling.sample_more
        tensors = iter(_run(more, call, backend, *_options(call, backend)))
    else:
        (kind,) = call.wanted.logprobs or (None,)
        op = torch.ops.llm_sampling.sample
        tokens, logprobs, status = _run(
            op, call, backend, call.num_samples, kind, call.check, backend
        )
        tensors = iter((tokens, status, logprobs))

    def take(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor: Tensor = next(tensors)
        return tensor

    rows, vocab_size = call.logits.shape  # which may be symbols
    return output_of(call.wanted, rows, call.num_samples, vocab_size, take)


def filter_logits(call: SampleCall, backend: str) -> Tensor:
    """``filter_logits`` as one op of a graph."""
    result: Tensor = _run(torch.ops.llm_sampling.filter_logits, call, backend, backend)
    return result


# ---- Pytrees: a batch and a history may be inputs and outputs of exported programs ---------------


#: The flags on which a graph may depend; the others become the conservative ones.
_FLAGS = ("needs_history", "any_window", "any_ordered_rule", *_BATCH_FLAGS)


#: A name that another one continues comes after that one: torch.export replaces the names of inputs
#: in the text of its guards one after the other, and would find it inside of the longer one.
_BATCH_NAMES = tuple(sorted(DTYPES, key=len, reverse=True))


def _batch_to_pytree(batch: BatchParams) -> tuple[list[Tensor | None], list[Any]]:
    return [getattr(batch, name) for name in _BATCH_NAMES], [getattr(batch, x) for x in _FLAGS]


def _batch_from_pytree(tensors: Iterable[Any], flags: Sequence[Any]) -> BatchParams:
    columns = dict(zip(_BATCH_NAMES, tensors, strict=True))
    return BatchParams(**columns, **dict(zip(_FLAGS, flags, strict=True)))


def _history_to_pytree(history: TokenHistory) -> tuple[list[Tensor | None], int]:
    text = history.text or _NO_TEXT
    return [*(getattr(history, name) for name in STATE_TENSORS), *text], history.vocab_size


def _history_from_pytree(tensors: Iterable[Any], vocab_size: int) -> TokenHistory:
    *state, ids, lengths, prompt_lengths, windows = tensors
    text = None if ids is None else Text(ids, lengths, prompt_lengths, windows)
    return TokenHistory.of_parts(*state, vocab_size=vocab_size, text=text)


def _with_keys(
    flatten: Callable[[Any], tuple[list[Any], Any]], names: Iterable[str]
) -> Callable[[Any], tuple[list[tuple[pytree.KeyEntry, Any]], Any]]:
    keys = [pytree.GetAttrKey(name) for name in names]

    def run(tree: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], Any]:
        tensors, context = flatten(tree)
        return list(zip(keys, tensors, strict=True)), context

    return run


pytree.register_pytree_node(
    BatchParams,
    _batch_to_pytree,
    _batch_from_pytree,
    serialized_type_name="llm_sampling.BatchParams",
    flatten_with_keys_fn=_with_keys(_batch_to_pytree, _BATCH_NAMES),
)
pytree.register_pytree_node(
    TokenHistory,
    _history_to_pytree,
    _history_from_pytree,
    serialized_type_name="llm_sampling.TokenHistory",
    flatten_with_keys_fn=_with_keys(_history_to_pytree, (*STATE_TENSORS, *_TEXT_TENSORS)),
)
