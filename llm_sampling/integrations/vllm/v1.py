"""vLLM's V1 model runner: three of its names are replaced.

``Sampler``, by a subclass that draws by :class:`Requests`; ``build_logitsprocs``, so that
:class:`Requests` is told of every request that enters, leaves or moves; and ``InputBatch``, by a
subclass that leaves penalties to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llm_sampling import backends
from llm_sampling.backends.base import SampleCall, Step
from llm_sampling.calls import check_logits
from llm_sampling.history import TokenHistory
from llm_sampling.integrations.engine import (
    NO_FILTER,
    NO_PENALTY,
    NO_RULE,
    Reliance,
    Warnings,
    backend_name,
    find,
    on_device,
)
from llm_sampling.integrations.vllm.both import (
    FIELDS_OF_BOTH,
    LOG,
    READ_BY_V1,
    not_greedy,
    params_of,
    why_not_here,
    with_extra,
)
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.results import SampleOutput
from llm_sampling.sample import filter_logits
from llm_sampling.table import RequestTable

RUNNER = "vllm.v1.worker.gpu_model_runner"


def replace_names(runner: ModuleType) -> None:
    """Replace three names of the runner, or warn why they stay."""
    if LOG.accepts(RELIANCE, "V1 runner: "):
        runner.Sampler = _fused(runner.Sampler)  # type: ignore[attr-defined]
        runner.build_logitsprocs = _building(runner.build_logitsprocs)  # type: ignore[attr-defined]
        runner.InputBatch = _without_penalties(runner.InputBatch)  # type: ignore[attr-defined]


#: How many tokens more than its longest text a request may be drawn, with asynchronous scheduling.
_AHEAD = 16

# ---- what is relied on ----

_PROCESSORS = "vllm.v1.sample.logits_processor"
_SAMPLER = "vllm.v1.sample.sampler"
_BATCH = "vllm.v1.worker.gpu_input_batch"

RELIANCE = Reliance(
    signatures={
        f"{_PROCESSORS}:build_logitsprocs": (
            "vllm_config device is_pin_memory is_pooling_model custom_logitsprocs"
        ),
        f"{_SAMPLER}:Sampler.forward": (
            "self logits sampling_metadata predict_bonus_token logprobs_mode_override"
        ),
        f"{_SAMPLER}:Sampler.sample": "self logits sampling_metadata logprobs_mode_override",
        f"{_SAMPLER}:Sampler.compute_logprobs": "logits",
        "vllm.v1.outputs:SamplerOutput": "sampled_token_ids logprobs_tensors",
    },
    fields={
        **FIELDS_OF_BOTH,
        "vllm.config:ModelConfig": "max_model_len",
        f"{_PROCESSORS}:BatchUpdate": "batch_size removed added moved",
        "vllm.v1.sample.metadata:SamplingMetadata": (
            "max_num_logprobs logprob_token_ids no_penalties allowed_token_ids_mask "
            "bad_words_token_ids logitsprocs thinking_budget_state_holder"
        ),
    },
    lookups={
        f"{RUNNER}:GPUModelRunner.__init__": "Sampler build_logitsprocs InputBatch",
        f"{RUNNER}:GPUModelRunner._update_states": (
            "refresh_metadata output_token_ids all_token_ids"
        ),
        f"{RUNNER}:GPUModelRunner._bookkeeping_sync": "output_token_ids use_async_scheduling",
        f"{RUNNER}:GPUModelRunner._sample": "sampler sampling_metadata",
        f"{_SAMPLER}:Sampler.__init__": "logprobs_mode",
        f"{_SAMPLER}:Sampler.forward": "apply_logits_processors sample",
        f"{_SAMPLER}:Sampler.apply_penalties": "no_penalties",
        f"{_BATCH}:InputBatch.no_penalties.fget": "repetition_penalties_reqs",
        f"{_BATCH}:InputBatch._make_sampling_metadata": "no_penalties",
        f"{_BATCH}:InputBatch.refresh_metadata": "get_and_reset logitsprocs update_state",
        f"{_BATCH}:InputBatch._register_add_request": "added prompt_token_ids output_token_ids",
        f"{_BATCH}:InputBatch.condense": "moved UNIDIRECTIONAL",
        f"{_BATCH}:InputBatch.swap_states": "moved SWAP",
        f"{_PROCESSORS}:LogitsProcessors.__init__": "argmax_invariant non_argmax_invariant",
        f"{_PROCESSORS}:MinTokensLogitsProcessor.apply": "min_toks",
        f"{_PROCESSORS}:LogitBiasLogitsProcessor.apply": "biases",
        f"{_PROCESSORS}:AdapterLogitsProcessor.apply": "req_info",
        f"{_PROCESSORS}:MinPLogitsProcessor.apply": "min_p",
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.has_tracked_requests": "",
    },
)


def _building(build_logitsprocs: Callable[..., Any]) -> Callable[..., Any]:
    """``build_logitsprocs`` with a :class:`Requests` added, as the first to get batch updates."""

    def build(
        vllm_config: Any,
        device: torch.device,
        is_pin_memory: bool,
        is_pooling_model: bool,
        custom_logitsprocs: Sequence[Any] = (),
    ) -> Any:
        built = build_logitsprocs(
            vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs
        )
        if is_pooling_model:  # such a model draws no tokens
            return built
        reason = why_not_here(vllm_config)
        if vllm_config.speculative_config is not None:
            reason = "speculative_config: V1 accepts drafts by a sampler of their own, unlike V2"
        if reason is not None:
            LOG.refuse(reason)
            return built
        requests = Requests(
            vllm_config.model_config.get_vocab_size(),
            torch.device(device),
            capacity=vllm_config.scheduler_config.max_num_seqs,
            max_length=vllm_config.model_config.max_model_len + _AHEAD,
        )
        built.argmax_invariant.insert(0, requests)
        LOG.draws(requests.backend)
        return built

    return build


def _without_penalties(batch: Any) -> Any:
    """A subclass of vLLM's InputBatch that leaves penalties to :class:`Requests`.

    So vLLM does not copy the prompts for them, and with asynchronous scheduling it does not wait
    for the tokens of the step before.
    """

    class PenaltiesElsewhere(batch):  # type: ignore[misc]
        """vLLM's InputBatch, without penalties where the kernel applies them."""

        @property
        def no_penalties(self) -> bool:
            """Whether vLLM's own code has no penalty to apply."""
            processors = self.logitsprocs.argmax_invariant
            return super().no_penalties or any(isinstance(p, Requests) for p in processors)

    return PenaltiesElsewhere


# ---- the requests of a batch ----


@dataclass(eq=False, slots=True)
class _Request:
    """A request of the batch.

    Attributes:
        params: as :func:`params_of` gives them.
        prompt: its token ids; empty if the prompt came as embeddings.
        output: vLLM's own list, which grows by one with every token of the request. With
            asynchronous scheduling the tokens that the host does not know are -1 there.
        slot: its slot of the table.
        needs_history: whether it has a penalty or a rule that looks at the history.
        recorded: how many tokens of the output the slot's history has, where it needs one.
    """

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    slot: int
    needs_history: bool
    recorded: int = 0


#: Which part of a request's parameters a call of the kernel applies.
_Part = Callable[[SamplingParams], SamplingParams]


def _everything(params: SamplingParams) -> SamplingParams:
    return params


def _scaling(params: SamplingParams) -> SamplingParams:
    """Penalties and temperature, which come before processors that vLLM applies after these."""
    return not_greedy(replace(params, **NO_FILTER))


def _filters(params: SamplingParams) -> SamplingParams:
    """The filters and the draw, which come after those processors."""
    return replace(params, temperature=1.0 if params.temperature else 0.0, **NO_PENALTY)


def _not_greedy_filters(params: SamplingParams) -> SamplingParams:
    return not_greedy(_filters(params))


class Requests:
    """The requests of vLLM's batch, in its order: follows vLLM's updates, and draws.

    To vLLM it is a logits processor, since these get every update of the batch before the model
    runs; it changes no logits. Each request has a slot of a :class:`RequestTable`. All work on the
    host is done in the update, so that a draw is one launch. A token depends on nothing but its
    request: logits, parameters, seed and the tokens so far, whose number is the position. A
    preempted request comes back with its output, so it goes on where it stopped.

    With asynchronous scheduling an update comes before the host knows the tokens of the step
    before. Their number is known, and so is which requests got one; the tokens themselves, which
    penalties need, are still on the device, where the last draw has left them.

    Args:
        vocab_size: the width of the logits, 1 .. 2^20.
        device: the logits'.
        capacity: the most requests that a batch has.
        max_length: the most ids that prompt and output have together. They are kept in order once
            a request asks for what looks at their order.
        backend: as for :func:`llm_sampling.sample`.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        *,
        capacity: int,
        max_length: int,
        backend: str = "auto",
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.empty(0, device=device).device
        self.capacity = capacity
        self.max_length = max_length
        self._backend_name = backend
        self._backend = backends.resolve(backend, self.device)
        self._table = self._make_table(history=False, has_text=False)
        self._free = list(range(capacity))
        self._by_index: dict[int, _Request] = {}  # by vLLM's index of the request in its batch
        self._rows: list[_Request] = []  # the same in order
        self._penalised: list[_Request] = []  # those of the rows that need a history
        self._slots = torch.zeros(0, dtype=torch.int32, device=self.device)
        self._position = torch.zeros(capacity, dtype=torch.int64, device=self.device)  # by slot
        # What the last draw has left on the device, and the row of each request in it.
        self._drawn: Tensor | None = None
        self._row_drawn: dict[_Request, int] = {}
        # Prepared calls by the logits' dtype, and what they were prepared for; packed parameters of
        # the calls that apply a part of them, until the batch changes.
        self._steps: dict[torch.dtype, tuple[BatchParams, Step]] = {}
        self._batches: dict[_Part, BatchParams] = {}
        self._warnings = Warnings(LOG)

    def _make_table(self, *, history: bool, has_text: bool) -> RequestTable:
        return RequestTable(
            self.capacity,
            vocab_size=self.vocab_size,
            history=history,
            max_length=self.max_length if has_text else None,
            max_logit_bias=0,  # vLLM's own code adds biases
            backend=self._backend_name,
            device=self.device,
        )

    @property
    def backend(self) -> str:
        """The name of the backend that draws."""
        return backend_name(self._backend)

    # Called by vLLM

    def is_argmax_invariant(self) -> bool:
        """True, so that vLLM does not call :meth:`apply` before the penalties."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """``logits`` as they are."""
        return logits

    def update_state(self, update: Any) -> None:
        """Follow a change of the batch. vLLM calls it once a step.

        The outputs have grown by the tokens of the step before by then.

        Args:
            update: a ``BatchUpdate``, or None if no request has come, gone or moved.
        """
        if update is not None:
            self._follow(update)
        self._record()
        position = [0] * self.capacity
        for request in self._rows:
            position[request.slot] = len(request.output)
        self._position.copy_(on_device(position, torch.int64, self.device), non_blocking=True)

    def _follow(self, update: Any) -> None:
        """Remove, add and then move requests, as vLLM does."""
        requests = self._by_index
        for index in update.removed:
            self._leave(requests.pop(index, None))
        for index, theirs, prompt, output in update.added:
            self._leave(requests.pop(index, None))
            params = with_extra(params_of(theirs), theirs, READ_BY_V1, self._warnings)
            requests[index] = self._enter(self._possible(params), prompt or (), output)
        for first, second, direction in update.moved:
            moved, other = requests.pop(first, None), requests.pop(second, None)
            if moved is not None:
                requests[second] = moved
            if other is not None and direction.name == "SWAP":
                requests[first] = other
            else:
                self._leave(other)
        self._rows = [requests[index] for index in range(update.batch_size)]
        self._penalised = [request for request in self._rows if request.needs_history]
        self._slots = on_device([r.slot for r in self._rows], torch.int32, self.device)
        self._batches = {}

    def _enter(
        self, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
    ) -> _Request:
        request = _Request(params, prompt, output, self._free.pop(), params.needs_history)
        has_history, has_text = self._kept()
        needs_text = has_text or params.needs_text
        if (request.needs_history and not has_history) or needs_text > has_text:
            self._grow(has_text=needs_text)
        self._set(request)
        return request

    def _kept(self) -> tuple[bool, bool]:
        """Whether the table has histories, and whether they have the ids in order."""
        history = self._table.history
        return history is not None, history is not None and history.text is not None

    def _grow(self, *, has_text: bool) -> None:
        """Make a table with histories; what the one before knows of its requests stays.

        That waits for the device if the one before has histories, which happens once at most.
        """
        before = self._table.history
        self._table = self._make_table(history=True, has_text=has_text)
        for other in self._by_index.values():
            prompt: list[int] | None = None
            output: Tensor | None = None
            if before is not None and other.needs_history:
                # The host may not know the ids of the output. Their order matters to no request
                # that is here, since the table before did not keep it.
                counts = before.counts[other.slot].cpu()
                output = torch.arange(self.vocab_size).repeat_interleave(counts)
                prompt = [*other.prompt]
            self._table.set(other.slot, other.params, prompt_ids=prompt, output_ids=output)

    def _possible(self, params: SamplingParams) -> SamplingParams:
        """The parameters without rules that cannot be honoured here, with a warning."""
        if not params.has_rules:
            return params
        most = self._table.max_sequence_ids
        if len(params.sequences) <= most:
            return params
        self._warnings.warn(
            f"rules of extra_args are left out: dry_breakers have more than {most} ids"
        )
        return replace(params, **NO_RULE)

    def _leave(self, request: _Request | None) -> None:
        if request is not None:
            self._table.clear(request.slot)
            self._free.append(request.slot)

    def _set(self, request: _Request) -> None:
        """Put a request into its slot.

        Its ids go with it where a penalty needs them, if all of them are known; otherwise
        ``recorded`` stays as it is, and the request cannot be drawn yet.
        """
        prompt, output = None, None
        if request.needs_history and -1 not in request.output:
            prompt, output = [*request.prompt], [*request.output]
            request.recorded = len(output)
        self._table.set(request.slot, request.params, prompt_ids=prompt, output_ids=output)

    def _record(self) -> None:
        """Make the histories hold the outputs, which have one token more in nearly every step.

        The history of a request whose output changed in another way is filled anew.
        """
        drawn = self._row_drawn
        grown, known = [], []
        for request in self._penalised:
            if len(request.output) == request.recorded + 1:
                token = request.output[-1]
                if token >= 0 or request in drawn:
                    grown.append(request)
                    known.append(token)
        if grown:
            tokens = on_device(known, torch.int64, self.device)
            if self._drawn is not None and min(known) < 0:
                of_rows = [drawn.get(request, 0) for request in grown]
                rows = on_device(of_rows, torch.int64, self.device)
                tokens = torch.where(tokens < 0, self._drawn[rows], tokens)
            slots = on_device([request.slot for request in grown], torch.int32, self.device)
            self._table.append(tokens, slots=slots)
            for request in grown:
                request.recorded += 1
        for request in self._penalised:
            if request.recorded != len(request.output):
                self._set(request)
        self._drawn, self._row_drawn = None, {}

    # Called by the sampler

    def fit(self, logits: Tensor) -> bool:
        """Whether ``logits`` have a row for each request, on its device; warns if not.

        Raises:
            RuntimeError: they have not, and a request has a penalty, which vLLM leaves to this.
        """
        shape = (len(self._rows), self.vocab_size)
        if logits.shape == shape and logits.device == self.device:
            return True
        found = f"shape {tuple(logits.shape)} on {logits.device}, and not {shape} on {self.device}"
        if self._table.batch.needs_history:
            raise RuntimeError(f"llm_sampling: penalties cannot be applied to logits of {found}")
        self._warnings.warn(f"vLLM's own sampler draws where logits have {found}")
        return False

    def draw(self, logits: Tensor) -> Tensor:
        """int64 ``(rows,)``: each request's next token, in one launch; see :meth:`draw_after`.

        Args:
            logits: ``(rows, vocab_size)`` float32, float16 or bfloat16. Never modified.
        """
        return self._draw(logits, _everything)

    def draw_after(self, logits: Tensor, processors: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """:meth:`draw` with logits processors between the temperature and the filters.

        All rows take two launches, even those that no processor changes: the rounding differs from
        that of one launch, and a request's tokens must not depend on the other requests.

        Returns:
            The tokens, and float32 ``(rows, vocab_size)``, the logits after the processors.
        """
        scaled = filter_logits(logits, self._packed(_scaling), history=self._history_of_rows())
        for processor in processors:
            scaled = processor.apply(scaled)
        return self._draw(scaled, _filters), scaled

    def processed(self, logits: Tensor, *, are_scaled: bool = False) -> Tensor:
        """float32 ``(rows, vocab_size)``: divided by the temperature, -inf outside the kept set.

        A greedy row is neither divided nor filtered, as in vLLM.

        Args:
            logits: as for :meth:`draw`; with ``are_scaled`` those that :meth:`draw_after` returned.
            are_scaled: whether penalties and temperature have been applied to them already.
        """
        if are_scaled:
            return filter_logits(logits, self._packed(_not_greedy_filters))
        return filter_logits(logits, self._packed(not_greedy), history=self._history_of_rows())

    def _history_of_rows(self) -> TokenHistory | None:
        """The histories of the rows, if one has a penalty.

        Raises:
            RuntimeError: nobody knows the tokens of such a request: vLLM has not told them, and
                they were not drawn here.
        """
        if not self._table.batch.needs_history:
            return None
        if any(request.recorded != len(request.output) for request in self._penalised):
            raise RuntimeError(
                "llm_sampling: the output of a request with a penalty has tokens that are not known"
            )
        return self._table.history_of(self._slots)

    def _packed(self, part: _Part) -> BatchParams:
        batch = self._batches.get(part)
        if batch is None:
            params = [part(request.params) for request in self._rows]
            batch = self._batches[part] = BatchParams.from_list(params, device=self.device)
        return batch

    def _draw_all(self, logits: Tensor) -> SampleOutput:
        """Draw with all parameters, by a call that stays prepared while requests come and go."""
        history = self._history_of_rows()
        found = self._steps.get(logits.dtype)
        if found is None or found[0] is not self._table.batch:
            batch, by_slot = self._table.batch_of(self._slots, None, "slot")
            batch = replace(batch, position=self._position)
            call = SampleCall(logits, batch, history, None, param_slots=by_slot)
            found = self._table.batch, self._backend.prepare(call.without_logits())
            self._steps[logits.dtype] = found
        return found[1](logits, None, self._slots)

    def _draw(self, logits: Tensor, part: _Part) -> Tensor:
        logits = check_logits(logits)
        if part is _everything:
            tokens = self._draw_all(logits).tokens
        else:
            position = self._position[self._slots.to(torch.int64)]
            batch = replace(self._packed(part), position=position)
            tokens = self._backend.sample(SampleCall(logits, batch, None, None)).tokens
        tokens = self._warnings.token_for_each(tokens)
        self._drawn = tokens
        self._row_drawn = {request: row for row, request in enumerate(self._rows)}
        return tokens


# ---- the sampler ----


def _requests_of(metadata: Any, logits: Tensor) -> Requests | None:
    """The :class:`Requests` that draw this batch; None if vLLM's own sampler does.

    There is none in the runner's dummy runs, and none if the engine was refused.
    """
    for processor in metadata.logitsprocs.argmax_invariant:
        if isinstance(processor, Requests):
            return processor if processor.fit(logits) else None
    return None


def _fused(sampler: Any) -> Any:
    """A subclass of vLLM's Sampler that draws by :class:`Requests`.

    vLLM's own ``forward`` still computes logprobs and applies what changes logits before the
    penalties. If a batch needs neither, the kernel reads the logits as the model gave them.
    """
    output_of = find("vllm.v1.outputs:SamplerOutput")
    min_tokens = find(f"{_PROCESSORS}:MinTokensLogitsProcessor")
    logit_bias = find(f"{_PROCESSORS}:LogitBiasLogitsProcessor")
    min_p = find(f"{_PROCESSORS}:MinPLogitsProcessor")
    adapted = find(f"{_PROCESSORS}:AdapterLogitsProcessor.apply")

    def is_idle(processor: Any) -> bool:
        """Whether a processor that is applied before the penalties would change no row."""
        if type(processor) is min_tokens:
            return not processor.min_toks
        if type(processor) is logit_bias:
            return not processor.biases
        return type(processor).apply is adapted and not processor.req_info

    def changes_logits(metadata: Any) -> bool:
        """Whether vLLM's code would change a row's logits before the penalties."""
        holder = metadata.thinking_budget_state_holder
        return (
            metadata.allowed_token_ids_mask is not None
            or bool(metadata.bad_words_token_ids)
            or not all(map(is_idle, metadata.logitsprocs.non_argmax_invariant))
            or (holder is not None and holder.has_tracked_requests())
        )

    def needs_logprobs(metadata: Any) -> bool:
        return metadata.max_num_logprobs is not None or bool(metadata.logprob_token_ids)

    class FusedSampler(sampler):  # type: ignore[misc]
        """vLLM's Sampler, with penalties, filters and the draw in one launch."""

        def forward(
            self,
            logits: Tensor,
            sampling_metadata: Any,
            predict_bonus_token: bool = False,
            logprobs_mode_override: Any = None,
        ) -> Any:
            if not needs_logprobs(sampling_metadata) and not changes_logits(sampling_metadata):
                requests = _requests_of(sampling_metadata, logits)
                if requests is not None:
                    tokens, _ = self.sample(logits, sampling_metadata)
                    return output_of(
                        sampled_token_ids=tokens.to(torch.int32).unsqueeze(-1),
                        logprobs_tensors=None,
                    )
            return super().forward(
                logits, sampling_metadata, predict_bonus_token, logprobs_mode_override
            )

        def sample(
            self, logits: Tensor, sampling_metadata: Any, logprobs_mode_override: Any = None
        ) -> Any:
            """The tokens, and "processed" logits or logprobs if they are asked for, else None."""
            requests = _requests_of(sampling_metadata, logits)
            if requests is None:
                return super().sample(logits, sampling_metadata, logprobs_mode_override)
            others = [
                processor
                for processor in sampling_metadata.logitsprocs.argmax_invariant
                if processor is not requests and type(processor) is not min_p  # the kernel does it
            ]
            if others:
                tokens, logits = requests.draw_after(logits, others)
            else:
                tokens = requests.draw(logits)
            mode = logprobs_mode_override or self.logprobs_mode
            if not mode.startswith("processed") or not needs_logprobs(sampling_metadata):
                return tokens, None
            processed = requests.processed(logits, are_scaled=bool(others))
            if mode == "processed_logprobs":
                processed = self.compute_logprobs(processed)
            return tokens, processed

    return FusedSampler
