"""Who is timed: our backends, Hugging Face, plain torch, two limits; each with its own check."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from cases import Case, Inputs
from torch import Tensor

from llm_sampling import (
    BatchParams,
    Sampler,
    SamplingParams,
    TokenHistory,
    backends,
    filter_logits,
    sample,
)

#: Sums of float32 may be wrong by this much: a kept set is taken as right if it lies between ours
#: for ``top_p`` less and more than asked by this, and for ``min_p`` that is off by this share.
SUM_TOLERANCE = 1e-4


class WrongAnswerError(Exception):
    """A provider does not compute what its row of the table says."""


@dataclass(frozen=True)
class Contender:
    """A provider made ready for one case on its inputs.

    Attributes:
        call: what is timed: draws from the buffer with this index.
        check: compares the provider with the reference on every buffer. Returns in what it differs,
            "" if in nothing; raises WrongAnswerError if that is more than ties and rounding.
    """

    call: Callable[[int], object]
    check: Callable[[], str]


class Task:
    """One case on its inputs, and what the reference makes of it.

    Args:
        case: the parameters.
        inputs: the tensors.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        self.inputs = inputs
        self.params = case.row_params(inputs.rows)
        self._bounds: dict[tuple[tuple[str, float], ...], list[KeptBounds]] = {}

    def history(self) -> TokenHistory | None:
        """A new history of the inputs' ids, or None where the case has none."""
        if self.case.history_length == 0:
            return None
        return TokenHistory.from_ids(
            self.inputs.prompt_ids, self.inputs.output_ids, self.inputs.vocab_size
        )

    @cached_property
    def reference_tokens(self) -> list[Tensor]:
        """For every buffer, the tokens by the reference."""
        history = self.history()
        return [
            sample(
                logits,
                self.params,
                history=history,
                num_samples=self.case.num_samples,
                backend="torch",
            ).tokens
            for logits in self.inputs.buffers
        ]

    def reference_filtered(self, **changes: Any) -> list[Tensor]:
        """For every buffer, ``filter_logits`` by the reference, with some parameters changed."""
        params = [replace(row, **changes) for row in self.params]
        history = self.history()
        return [
            filter_logits(logits, params, history=history, backend="torch")
            for logits in self.inputs.buffers
        ]

    def kept_bounds(self, **changes: float) -> list[KeptBounds]:
        """For every buffer, what is a right answer for a sampler that sums in float32."""
        key = tuple(sorted(changes.items()))
        if key not in self._bounds:
            self._bounds[key] = self._kept_bounds(changes)
        return self._bounds[key]

    def _kept_bounds(self, changes: dict[str, float]) -> list[KeptBounds]:
        top_p, min_p = self.case.params.top_p, self.case.params.min_p
        tight = {"top_p": top_p - SUM_TOLERANCE if top_p < 1 else 1.0}
        loose = {"top_p": min(1.0, top_p + SUM_TOLERANCE)}
        tight["min_p"] = min(1.0, min_p * (1 + SUM_TOLERANCE))
        loose["min_p"] = min_p * (1 - SUM_TOLERANCE)
        sets = zip(
            self.reference_filtered(**changes),
            self.reference_filtered(**changes, **tight),
            self.reference_filtered(**changes, **loose),
            self.reference_filtered(**changes, top_k=0, top_p=1, min_p=0),
            strict=True,
        )
        return [
            KeptBounds(ours > -torch.inf, least > -torch.inf, most > -torch.inf, logits)
            for ours, least, most, logits in sets
        ]


@dataclass(frozen=True)
class KeptBounds:
    """Our kept set, the least and the most that others may keep; all bool ``(rows, vocab_size)``.

    ``logits`` are the processed ones of every token, kept or not.
    """

    ours: Tensor
    least: Tensor
    most: Tensor
    logits: Tensor

    def compare(self, theirs: Tensor) -> str:
        """In what ``theirs`` differs from ours; WrongAnswerError if that is more than rounding."""
        extra, missing = theirs & ~self.ours, self.ours & ~theirs
        if not (extra | missing).any():
            return ""
        only_ties = not ((extra | missing) & ~self._tied_at_the_cut(self.ours)).any()
        if only_ties and (extra.sum(-1) >= missing.sum(-1)).all():
            return "cuts ties elsewhere" if missing.any() else "keeps ties"
        tokens = int((extra | missing).sum(-1).max())
        too_many = theirs & ~self.most & ~self._tied_at_the_cut(self.most)
        if too_many.any() or (self.least & ~theirs).any():
            raise WrongAnswerError(f"kept set differs by up to {tokens} tokens")
        return f"kept set off by <= {_round_up(tokens)}"

    def _tied_at_the_cut(self, kept: Tensor) -> Tensor:
        last = self.logits.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        return self.logits == last


Build = Callable[[Task], "Contender | str"]


# Ours


def _our_sample(backend: str) -> Build:
    def build(task: Task) -> Contender | str:
        history, params = task.history(), task.params
        buffers, num_samples = task.inputs.buffers, task.case.num_samples

        def call(buffer: int) -> Tensor:
            return sample(
                buffers[buffer], params, history=history, num_samples=num_samples, backend=backend
            ).tokens

        def check() -> str:
            for buffer, expected in enumerate(task.reference_tokens):
                _check_tokens(call(buffer), expected)
            return ""

        return Contender(call, check)

    return build


def _our_sampler(backend: str) -> Build:
    def build(task: Task) -> Contender | str:
        case, inputs = task.case, task.inputs
        if case.num_samples > 1 and case.params.needs_history:
            return "a Sampler's history follows one token per row"

        def make(backend: str) -> Sampler:
            return Sampler(
                task.params,
                vocab_size=inputs.vocab_size,
                history=task.history(),
                num_samples=case.num_samples,
                backend=backend,
            )

        sampler = make(backend)

        def check() -> str:
            # Step by step, since a Sampler advances: every buffer is one step of a decode loop.
            ours, reference = make(backend), make("torch")
            for logits in inputs.buffers:
                _check_tokens(ours(logits).tokens, reference(logits).tokens)
            return ""

        return Contender(lambda buffer: sampler(inputs.buffers[buffer]), check)

    return build


def _check_tokens(tokens: Tensor, expected: Tensor) -> None:
    if not torch.equal(tokens, expected):
        rows = (tokens != expected).flatten(1 if tokens.dim() > 1 else 0)
        raise WrongAnswerError(f"{int(rows.sum())} of {tokens.numel()} tokens differ")


# Others


def _hugging_face(task: Task) -> Contender | str:
    """``generate``'s chain: LogitsProcessorList, softmax, multinomial; argmax where greedy."""
    from transformers.generation import logits_process as hf

    params, num_samples = task.case.params, task.case.num_samples
    buffers = task.inputs.buffers
    input_ids: Any = torch.cat([task.inputs.prompt_ids, task.inputs.output_ids], dim=1)
    chain = hf.LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature not in (0, 1):
        chain.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(hf.MinPLogitsWarper(params.min_p))

    def call(buffer: int) -> Tensor:
        scores = chain(input_ids, buffers[buffer])
        if params.temperature == 0:
            return scores.argmax(-1)
        probabilities = torch.softmax(scores, dim=-1)
        # generate draws one and has no replacement to speak of
        return torch.multinomial(probabilities, num_samples, replacement=num_samples > 1)

    missing = {
        name: 0.0
        for name in ("frequency_penalty", "presence_penalty")
        if getattr(params, name) != 0
    }

    def check() -> str:
        notes = ["without frequency and presence penalties"] if missing else []
        expected = task.reference_filtered(**missing)
        if params.temperature == 0:
            return _check_greedy(call, buffers, expected)
        bounds = task.kept_bounds(**missing)
        for buffer, logits in enumerate(buffers):
            scores = chain(input_ids, logits)
            both = (scores > -torch.inf) & (expected[buffer] > -torch.inf)
            difference = (scores - expected[buffer])[both].abs().max()
            if not difference <= 1e-4:
                raise WrongAnswerError(f"a kept logit differs by {difference:.2g}")
            notes.append(bounds[buffer].compare(scores > -torch.inf))
            _check_drawn(call(buffer), scores > -torch.inf)
        return _join(notes)

    return Contender(call, check)


def _plain_torch(task: Task) -> Contender | str:
    """What one writes by hand: a topk or a sort, few tokens after it, multinomial."""
    params, num_samples, inputs = task.case.params, task.case.num_samples, task.inputs
    input_ids = torch.cat([inputs.prompt_ids, inputs.output_ids], dim=1)
    ones = torch.ones_like(inputs.output_ids, dtype=torch.float32)

    def probabilities(buffer: int) -> tuple[Tensor, Tensor | None]:
        """Unnormalised, with the ids that they belong to unless they are all in their places."""
        x = inputs.buffers[buffer]
        if params.repetition_penalty != 1:
            seen = x.gather(1, input_ids)
            r = params.repetition_penalty
            x = x.scatter(1, input_ids, torch.where(seen > 0, seen / r, seen * r))
        if params.frequency_penalty != 0 or params.presence_penalty != 0:
            counts = torch.zeros_like(x).scatter_add_(1, inputs.output_ids, ones)
            x = x - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        ids = None
        if params.top_k > 0:
            x, ids = x.topk(min(params.top_k, x.shape[1]))
        elif params.top_p < 1:
            x, ids = x.sort(descending=True)
        if params.temperature != 1:
            x = x / params.temperature
        p = torch.softmax(x, -1)
        if params.top_p < 1:
            p = p.masked_fill(p.cumsum(-1) - p >= params.top_p, 0)
        if params.min_p > 0:
            p = p.masked_fill(p < params.min_p * p.amax(-1, keepdim=True), 0)
        return p, ids

    def call(buffer: int) -> Tensor:
        if params.temperature == 0:
            return inputs.buffers[buffer].argmax(-1)
        p, ids = probabilities(buffer)
        drawn = torch.multinomial(p, num_samples, replacement=num_samples > 1)
        return drawn if ids is None else ids.gather(1, drawn)

    def check() -> str:
        if params.temperature == 0:
            return _check_greedy(call, inputs.buffers, task.reference_filtered())
        bounds = task.kept_bounds()
        notes = []
        for buffer, logits in enumerate(inputs.buffers):
            p, ids = probabilities(buffer)
            kept = p > 0
            if ids is not None:
                kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, kept)
            notes.append(bounds[buffer].compare(kept))
            _check_drawn(call(buffer), kept)
        return _join(notes)

    return Contender(call, check)


def _softmax(task: Task) -> Contender:
    buffers = task.inputs.buffers

    def check() -> str:
        for logits in buffers:
            expected = logits.double().softmax(-1)
            if not torch.allclose(torch.softmax(logits, -1).double(), expected, rtol=1e-4):
                raise WrongAnswerError("not the softmax in float64")
        return "not a sampler"

    return Contender(lambda buffer: torch.softmax(buffers[buffer], -1), check)


def _amax(task: Task) -> Contender:
    buffers = task.inputs.buffers

    def check() -> str:
        for logits in buffers:
            if not torch.equal(logits.amax(-1), logits.double().amax(-1).float()):
                raise WrongAnswerError("not the maximum in float64")
        return "not a sampler"

    return Contender(lambda buffer: buffers[buffer].amax(-1), check)


# How others differ


def _check_greedy(
    call: Callable[[int], Tensor], buffers: list[Tensor], expected: list[Tensor]
) -> str:
    for buffer, logits in enumerate(buffers):
        best = logits.gather(1, call(buffer).unsqueeze(-1)).squeeze(-1)
        if not torch.equal(best, expected[buffer].amax(-1)):
            raise WrongAnswerError("not the largest logit")
    return ""


def _check_drawn(tokens: Tensor, kept: Tensor) -> None:
    if not kept.gather(1, tokens).all():
        raise WrongAnswerError("drew a token outside its own kept set")


def _round_up(number: int) -> int:
    """To the next power of ten, so that buffers that differ by a little share a note."""
    return int(10 ** len(str(number - 1))) if number > 1 else 1


def _join(notes: list[str]) -> str:
    return "; ".join(sorted({note for note in notes if note}))


# The table


@dataclass(frozen=True)
class Provider:
    """One row of the table.

    Attributes:
        name: what ``--providers`` calls it.
        why_absent: None if it can run here, else the reason.
        build: a Contender for a task, or why it cannot do that task.
    """

    name: str
    why_absent: Callable[[], str | None]
    build: Build


def _always() -> str | None:
    return None


def _why_no_transformers() -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        from transformers.generation import logits_process  # noqa: F401
    except Exception as error:  # whatever an optional package makes of its own dependencies
        return f"transformers cannot be imported: {error}"
    return None


def _why_no_backend(name: str) -> Callable[[], str | None]:
    return lambda: backends.BACKENDS[name].why_unavailable(torch.device("cpu"))


HUGGING_FACE, PLAIN_TORCH, SOFTMAX, AMAX = "huggingface", "plain-torch", "softmax", "amax"


def sampler_of(backend: str) -> str:
    """The name of a backend's prepared Sampler in ``PROVIDERS``."""
    return f"{backend}:Sampler"


def sample_of(backend: str) -> str:
    """The name of a backend's ``sample()`` in ``PROVIDERS``."""
    return f"{backend}:sample"


def _providers() -> dict[str, Provider]:
    table = []
    for name in backends.BACKENDS:
        absent = _why_no_backend(name)
        table.append(Provider(sampler_of(name), absent, _our_sampler(name)))
        table.append(Provider(sample_of(name), absent, _our_sample(name)))
    table.append(Provider(HUGGING_FACE, _why_no_transformers, _hugging_face))
    table.append(Provider(PLAIN_TORCH, _always, _plain_torch))
    table.append(Provider(SOFTMAX, _always, _softmax))
    table.append(Provider(AMAX, _always, _amax))
    return {provider.name: provider for provider in table}


PROVIDERS: Mapping[str, Provider] = MappingProxyType(_providers())


def fastest_backend() -> str:
    """The backend that ``"auto"`` takes for tensors on the CPU."""
    device = torch.device("cpu")
    return next(b.name for b in backends.BACKENDS.values() if b.why_unavailable(device) is None)


def overhead_calls(vocab_size: int) -> dict[str, Callable[[int], object]]:
    """Ways to draw from one tiny row, where the kernel has next to nothing to do."""
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=0)
    batch = BatchParams.from_list([params], positions=[0])
    sampler = Sampler([params], vocab_size=vocab_size)
    return {
        "Sampler": lambda _: sampler(logits),
        "sample, BatchParams": lambda _: sample(logits, batch),
        "sample, SamplingParams": lambda _: sample(logits, params),
    }
