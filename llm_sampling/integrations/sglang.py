"""SGLang: the kernel in place of its sampler.

    sglang serve --model-path MODEL --sampling-backend llm_sampling

SGLang calls :func:`register`, by the entry point ``sglang.srt.plugins``, in each of its processes.
It names the sampling backend ``llm_sampling``. On a CPU SGLang always takes its own backend
"pytorch", whatever the flag says; there ``LLM_SAMPLING_SGLANG=1`` has the same effect. When a
scheduler then makes its sampler, two of SGLang's classes are replaced by its ``HookRegistry``:
``SamplingBatchInfo``, by a subclass that knows which request each row belongs to, and
``BatchedPenalizerOrchestrator``, by a subclass that leaves penalties to the kernel. If this SGLang
differs from what the plug-in relies on, nothing is replaced and one warning names the difference.

Importing this module does not import SGLang. docs/engines/sglang.md says what remains SGLang's own,
what is refused, and what differs from SGLang's sampler.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llm_sampling import backends
from llm_sampling.history import MAX_VOCAB_SIZE
from llm_sampling.integrations.engine import (
    LARGEST,
    LEAST,
    NO_FILTER,
    NO_PENALTY,
    EngineLog,
    Reliance,
    Warnings,
    backend_name,
    find,
    fresh_seed,
    on_device,
)
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.sample import filter_logits, sample
from llm_sampling.table import RequestTable

LOG = EngineLog("SGLang", "sglang", ("0.5.23",))

SWITCH = "LLM_SAMPLING_SGLANG"
#: What ``--sampling-backend`` calls the kernel.
BACKEND = "llm_sampling"


# ---- registration ----


def register() -> None:
    """Offer the kernel to SGLang as ``--sampling-backend llm_sampling``.

    With ``LLM_SAMPLING_SGLANG=1`` the kernel draws whatever that flag says. A second call has no
    effect.
    """
    try:
        offer = find(f"{_SAMPLER}:register_sampler_backend")
        registry = find(f"{_HOOKS}:HookRegistry")
        kinds = find(f"{_HOOKS}:HookType")
    except (ImportError, AttributeError) as error:
        LOG.refuse(str(error))
        return
    if BACKEND in find(f"{_SAMPLER}:_CUSTOM_SAMPLER_FACTORIES"):
        return
    offer(BACKEND, make_sampler)
    if LOG.is_on(SWITCH):
        registry.register(f"{_SAMPLER}.create_sampler", _instead, kinds.AROUND)


def _instead(create_sampler: Callable[..., Any], backend: str | None = None) -> Any:
    """The kernel's sampler, whatever ``--sampling-backend`` is."""
    return make_sampler()


def make_sampler() -> Any:
    """A sampler that draws by the kernel, or SGLang's own after a warning that says why.

    SGLang calls it in its scheduler, when its configuration is complete and before a model is
    loaded.
    """
    # SGLang's code knows no backend of this name, where it still draws.
    context = find(f"{_CONTEXT}:get_context")()
    if context.config_leaf("sampling_backend") == BACKEND:
        context.override(BACKEND, sampling_backend="pytorch")
    sampler = find(f"{_SAMPLER}:Sampler")
    if not LOG.accepts(RELIANCE):
        return sampler()
    reason = _why_not_here(context)
    if reason is not None:
        LOG.refuse(reason)
        return sampler()
    requests = Requests(context.config_leaf("device"))
    _replace_classes(requests)
    LOG.draws(requests.backend)
    return fused(sampler, requests)()


def _replace_classes(requests: Requests) -> None:
    """Have SGLang's batches tell ``requests`` of their rows, and make no tables of penalties."""
    registry, kinds = find(f"{_HOOKS}:HookRegistry"), find(f"{_HOOKS}:HookType")
    source = find(f"{_HOOKS}:HookSource")(BACKEND, "llm-sampling")
    classes = {
        f"{_INFO}:SamplingBatchInfo": followed(find(f"{_INFO}:SamplingBatchInfo"), requests),
        f"{_PENALTIES}:BatchedPenalizerOrchestrator": without_penalties(
            find(f"{_PENALTIES}:BatchedPenalizerOrchestrator"), requests
        ),
    }
    for place, ours in classes.items():
        registry.register(place.replace(":", "."), ours, kinds.REPLACE, source=source)
    registry.apply_hooks()
    for place, ours in classes.items():
        if find(place) is not ours:  # its log has the reason
            raise RuntimeError(f"llm_sampling: SGLang's HookRegistry did not replace {place}")


# ---- what this module relies on in SGLang ----

_SAMPLER = "sglang.srt.layers.sampler"
_INFO = "sglang.srt.sampling.sampling_batch_info"
_PENALTIES = "sglang.srt.sampling.penaltylib.orchestrator"
_HOOKS = "sglang.srt.plugins.hook_registry"
_CONTEXT = "sglang.srt.runtime_context"
_BATCH = "sglang.srt.managers.schedule_batch"
_RUNNER = "sglang.srt.model_executor.model_runner"

RELIANCE = Reliance(
    signatures={
        f"{_SAMPLER}:Sampler.forward": (
            "self logits_output sampling_info return_logprob top_logprobs_nums "
            "token_ids_logprobs positions logprob_logits"
        ),
        f"{_SAMPLER}:Sampler._preprocess_logits": "self logits sampling_info",
        f"{_SAMPLER}:Sampler._sync_token_ids_across_tp": (
            "self batch_next_token_ids sampling_info"
        ),
        f"{_SAMPLER}:Sampler._build_sampling_mask_output": (
            "self batch_next_token_ids sampling_mask_capture support_capture_indices"
        ),
        f"{_SAMPLER}:_SamplingMaskCapture": "weights token_ids selected_weight batch_rows",
        "sglang.srt.layers.logprob_processor:OutputLogprobProcessor.compute_logprobs": (
            "self logprobs top_logprobs_nums token_ids_logprobs batch_next_token_ids"
        ),
        "sglang.srt.layers.logprob_processor:LogprobResult.write_output_to": "self logits_output",
        f"{_INFO}:SamplingBatchInfo.adjusted_from_schedule_batch": "self batch vocab_size",
        f"{_INFO}:SamplingBatchInfo.adjusted_filter_batch": (
            "self keep_indices keep_indices_device"
        ),
        f"{_INFO}:SamplingBatchInfo.adjusted_merge_batch": "self other",
        f"{_INFO}:SamplingBatchInfo._apply_pre_grammar_logits_transforms": "self logits",
        f"{_PENALTIES}:BatchedPenalizerOrchestrator.__init__": "self vocab_size batch penalizers",
        f"{_HOOKS}:HookRegistry.register": "target hook hook_type source",
        f"{_HOOKS}:HookRegistry.apply_hooks": "",
        f"{_HOOKS}:HookSource": "plugin_name dist_name",
    },
    fields={
        "sglang.srt.sampling.sampling_params:SamplingParams": (
            "temperature top_k top_p min_p repetition_penalty frequency_penalty presence_penalty "
            "sampling_seed"
        ),
        f"{_INFO}:SamplingBatchInfo": (
            "temperatures is_all_greedy logit_bias has_custom_logit_processor "
            "sampling_mask_batch_indices sampling_support_logprobs_capture_indices "
            "penalizer_orchestrator"
        ),
        f"{_BATCH}:ReqKvInfo": "req_pool_idx",
    },
    lookups={
        f"{_BATCH}:Req.__init__": "origin_input_ids output_ids sampling_params kv",
        f"{_BATCH}:ScheduleBatch.prepare_for_extend": "SamplingBatchInfo from_schedule_batch",
        f"{_BATCH}:ScheduleBatch.filter_batch": "sampling_info filter_batch",
        f"{_BATCH}:ScheduleBatch.merge_batch": "sampling_info merge_batch",
        "sglang.srt.managers.scheduler:Scheduler._forward_isolation": "copy_for_forward",
        "sglang.srt.mem_cache.memory_pool:ReqToTokenPool.__init__": "req_to_token",
        f"{_INFO}:SamplingBatchInfo.from_schedule_batch": (
            "BatchedPenalizerOrchestrator BatchedMinNewTokensPenalizer adjusted_from_schedule_batch"
        ),
        f"{_INFO}:SamplingBatchInfo.filter_batch": "adjusted_filter_batch",
        f"{_INFO}:SamplingBatchInfo.merge_batch": "adjusted_merge_batch",
        f"{_INFO}:SamplingBatchInfo.copy_for_forward": "dataclasses replace",
        f"{_INFO}:SamplingBatchInfo.apply_logits_bias": (
            "_apply_pre_grammar_logits_transforms grammar_mask "
            "_apply_post_grammar_logits_transforms"
        ),
        f"{_RUNNER}:ModelRunner.initialize": "create_sampler sampler",
        f"{_RUNNER}:ModelRunner._preprocess_logits": "apply_logits_bias next_token_logits",
        f"{_RUNNER}:ModelRunner.sample": "_preprocess_logits sampler positions seq_lens",
        f"{_SAMPLER}:Sampler.__init__": "output_logprob_processor",
        f"{_SAMPLER}:Sampler.forward": "_preprocess_logits is_all_greedy temperatures",
    },
)

#: Settings with which the kernel cannot draw, and why.
REFUSED = {
    "speculative_algorithm": "drafts are accepted by a sampler of their own",
    "enable_deterministic_inference": "it promises the tokens of SGLang's own random numbers",
    "enable_watermark": "it changes how tokens are drawn",
    "dllm_algorithm": "a diffusion model draws many tokens of a request at once",
}


def _why_not_here(context: Any) -> str | None:
    """Why the kernel cannot draw with these settings; None if it can."""
    for name, why in REFUSED.items():
        if context.config_leaf(name):
            return f"{name}: {why}"
    if hasattr(find(f"{_INFO}:SamplingBatchInfo"), "followed_by"):
        return "a second model in one process"
    return None


# ---- the requests of a batch ----

#: Which part of a request's parameters a call of the kernel applies.
_Part = Callable[[SamplingParams], SamplingParams]


def params_of(theirs: Any, fresh: Callable[[], int] = fresh_seed) -> SamplingParams:
    """A request's parameters as :class:`~llm_sampling.SamplingParams`, with a seed.

    What changes logits in SGLang's own code, such as ``logit_bias``, is left to it. SGLang's
    repetition penalty is for the output alone.

    Args:
        theirs: a ``sglang.srt.sampling.sampling_params.SamplingParams``. It has ``top_k`` 1 for a
            greedy request and 2^30 where no token is cut.
        fresh: gives the seed of a request that has none and is not greedy. Default: from torch's
            default generator, which SGLang seeds with the engine's ``random_seed``.
    """
    greedy = theirs.top_k <= 1
    seed = theirs.sampling_seed
    if seed is None:
        seed = 0 if greedy else fresh()
    return SamplingParams(
        temperature=0.0 if greedy else min(float(theirs.temperature), LARGEST),
        top_k=int(theirs.top_k) if theirs.top_k <= MAX_VOCAB_SIZE else 0,
        top_p=float(theirs.top_p),
        min_p=float(theirs.min_p),
        repetition_penalty=max(float(theirs.repetition_penalty), LEAST),
        repetition_penalty_scope="output",
        frequency_penalty=float(theirs.frequency_penalty),
        presence_penalty=float(theirs.presence_penalty),
        seed=int(seed) % 2**64,  # SGLang takes negative ones
    )


def _penalties(params: SamplingParams) -> SamplingParams:
    """The penalties alone."""
    return replace(params, temperature=1.0, **NO_FILTER)


def _all_but_penalties(params: SamplingParams) -> SamplingParams:
    return replace(params, **NO_PENALTY)


@dataclass(eq=False)
class Request:
    """A request from when its prompt is scheduled until it ends, is retracted or is chunked.

    A chunk of a prompt has a Request of its own, whose draw SGLang throws away.

    Attributes:
        params: as :func:`params_of` gives them.
        slot: its row in SGLang's ``req_to_token_pool``, and its slot of the table.
        prompt_length: the length of its prompt.
        output: the tokens that it has produced before, if it was retracted; emptied on entering.
        needs_history: whether it has a penalty.
        is_entered: whether it has been put into its slot.
    """

    params: SamplingParams
    slot: int
    prompt_length: int
    output: Sequence[int]
    needs_history: bool
    is_entered: bool = False


class Requests:
    """The requests of SGLang's batches, each in a slot of a :class:`RequestTable`, and their draws.

    A request keeps its row of SGLang's pool while it runs, so that row is its slot. All that
    changes a slot is done in the sampler, on the stream on which the model runs and in the order in
    which batches are launched. So with the overlap scheduler, where the host does not yet know the
    tokens of the step before, penalties see them: they are added to the histories on the device,
    where they were drawn. A slot that another request takes over is filled anew, from the tokens
    that the request has produced before it was retracted, or from none.

    A token depends on nothing but its request: logits, parameters, seed and the tokens so far,
    whose number is the position. SGLang gives the place of each row in its whole text, from which
    the position is computed on the device.

    Args:
        device: the logits'.
        backend: as for :func:`llm_sampling.sample`.
    """

    def __init__(self, device: torch.device | str, *, backend: str = "auto") -> None:
        self.device = torch.empty(0, device=device).device
        self._backend_name = backend
        self.backend = backend_name(backends.resolve(backend, self.device))
        self._vocab_size = self._capacity = 0
        self._table: RequestTable | None = None
        self._in_slot: dict[int, weakref.ref[Request]] = {}
        self._ended: list[int] = []  # slots whose request is gone; perhaps another one is there
        self._seeds: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._rows: Sequence[Request] = ()  # of the last batch, and what was made for it
        self._needs_history = False
        self._slots = self._prompt_lengths = torch.zeros(0)
        self._batches: dict[_Part, BatchParams] = {}
        self._warnings = Warnings(LOG)

    # Called where SGLang makes its batches

    def accepts(self, vocab_size: int) -> bool:
        """Whether the kernel draws from so many tokens; warns if not."""
        if vocab_size > MAX_VOCAB_SIZE:
            self._warnings.refuse(f"vocab_size: it must be in 1 .. 2^20, got {vocab_size}")
            return False
        return True

    def of_batch(self, batch: Any, vocab_size: int) -> list[Request] | None:
        """A :class:`Request` for each row of a batch whose prompts are to be computed.

        Args:
            batch: SGLang's ``ScheduleBatch``.
            vocab_size: the width of the logits.

        Returns:
            None if the kernel does not draw for them.
        """
        if not self.accepts(vocab_size):
            return None
        self._vocab_size = vocab_size
        self._capacity = len(batch.req_to_token_pool.req_to_token)
        return [self._made(request) for request in batch.reqs]

    def _made(self, theirs: Any) -> Request:
        def fresh() -> int:
            if theirs not in self._seeds:
                self._seeds[theirs] = fresh_seed()
            return self._seeds[theirs]

        params = params_of(theirs.sampling_params, fresh)
        return Request(
            params,
            int(theirs.kv.req_pool_idx),
            len(theirs.origin_input_ids),
            list(theirs.output_ids),
            params.needs_history,
        )

    # Called by the sampler

    def are_of(self, info: Any, logits: Tensor) -> bool:
        """Whether each row of ``logits`` belongs to a request of ``info``; warns if not.

        Raises:
            RuntimeError: there are other rows, and a request has a penalty, which SGLang's own code
                does not apply any more.
        """
        rows = info.requests
        if not rows:  # what no request asked for, such as a warm-up
            return False
        shape = (len(rows), self._vocab_size)
        if logits.shape == shape and logits.device == self.device:
            return True
        found = f"shape {tuple(logits.shape)} on {logits.device}, and not {shape} on {self.device}"
        if any(request.needs_history for request in rows):
            raise RuntimeError(f"llm_sampling: penalties cannot be applied to logits of {found}")
        self._warnings.warn(f"SGLang's own sampler draws where logits have {found}")
        return False

    def _follow(self, rows: Sequence[Request]) -> RequestTable:
        """The table, with each of the rows in its slot.

        Raises:
            RuntimeError: a request that has been drawn has lost its slot to another one.
        """
        while self._ended:
            slot = self._ended.pop()
            if slot in self._in_slot and self._in_slot[slot]() is None:
                del self._in_slot[slot]
                assert self._table is not None
                self._table.clear(slot)
        needs_history = any(request.needs_history for request in rows)
        if self._table is None or (needs_history and self._table.history is None):
            self._table = self._made_table(history=needs_history)
        for request in rows:
            found = self._in_slot.get(request.slot)
            if found is None or found() is not request:
                self._enter(self._table, request)
        if rows is not self._rows:
            self._rows, self._needs_history, self._batches = rows, needs_history, {}
            self._slots = on_device([request.slot for request in rows], torch.int32, self.device)
            lengths = [request.prompt_length for request in rows]
            self._prompt_lengths = on_device(lengths, torch.int64, self.device)
        return self._table

    def _made_table(self, *, history: bool) -> RequestTable:
        """A table for as many requests as SGLang has rows for, with those that are there now.

        None of these has a penalty where the table is the first one with histories.
        """
        table = RequestTable(
            self._capacity,
            vocab_size=self._vocab_size,
            history=history,
            max_logit_bias=0,  # SGLang's own code adds biases
            backend=self._backend_name,
            device=self.device,
        )
        for slot, found in self._in_slot.items():
            request = found()
            if request is not None:
                table.set(slot, request.params, prompt_length=request.prompt_length)
        return table

    def _enter(self, table: RequestTable, request: Request) -> None:
        if request.is_entered:
            raise RuntimeError(
                f"llm_sampling: two requests that run have the slot {request.slot} of SGLang's pool"
            )
        slot, ended = request.slot, self._ended
        output = request.output if request.needs_history else None
        length = request.prompt_length
        table.set(slot, request.params, output_ids=output, prompt_length=length)
        self._in_slot[slot] = weakref.ref(request, lambda _: ended.append(slot))
        request.is_entered, request.output = True, ()

    def _packed(self, part: _Part) -> BatchParams:
        batch = self._batches.get(part)
        if batch is None:
            params = [part(request.params) for request in self._rows]
            batch = self._batches[part] = BatchParams.from_list(params, device=self.device)
        return batch

    def penalised(self, rows: Sequence[Request], logits: Tensor) -> Tensor:
        """float32 ``(rows, vocab_size)``: the logits after the penalties of their requests.

        ``logits`` themselves if no request has one.

        Args:
            rows: the request of each row.
            logits: ``(rows, vocab_size)``. Never modified.
        """
        table = self._follow(rows)
        if not self._needs_history:
            return logits
        history = table.history_of(self._slots)
        return filter_logits(logits, self._packed(_penalties), history=history)

    def draw(
        self, rows: Sequence[Request], logits: Tensor, places: Tensor, *, are_penalised: bool
    ) -> Tensor:
        """int64 ``(rows,)``: each request's next token, in one launch.

        Args:
            rows: the request of each row.
            logits: ``(rows, vocab_size)`` float32, float16 or bfloat16. Never modified.
            places: integers ``(rows,)``, the place in its whole text of the token whose logits each
                row has.
            are_penalised: whether the penalties have been applied already. The tokens are the same.
        """
        table = self._follow(rows)
        places = places[: len(rows)]
        if are_penalised and self._needs_history:
            positions = places + 1 - self._prompt_lengths
            batch = self._packed(_all_but_penalties)
            tokens = sample(logits, batch, positions=positions, check=False).tokens
        else:
            tokens = sample(
                logits, table, slots=self._slots, text_positions=places, check=False
            ).tokens
        return self._warnings.token_for_each(tokens)

    def kept(self, rows: Sequence[Request], logits: Tensor, *, are_penalised: bool) -> Tensor:
        """float32 ``(rows, vocab_size)``: what :meth:`draw` draws from, -inf where it does not."""
        table = self._follow(rows)
        if are_penalised and self._needs_history:
            return filter_logits(logits, self._packed(_all_but_penalties))
        return filter_logits(logits, table, slots=self._slots)

    def record(self, rows: Sequence[Request], tokens: Tensor) -> None:
        """Add each request's next token to its history, if a request of the batch has a penalty.

        Args:
            rows: the request of each row.
            tokens: int64 ``(rows,)``, on the device.
        """
        table = self._follow(rows)
        if self._needs_history:
            table.append(tokens, slots=self._slots)


# ---- the classes ----


def without_penalties(orchestrator: Any, requests: Requests) -> Any:
    """A subclass of SGLang's BatchedPenalizerOrchestrator that leaves penalties to the kernel.

    So SGLang makes no ``(rows, vocab_size)`` tables of them. Minimum lengths stay with it.
    """
    min_new_tokens = find("sglang.srt.sampling.penaltylib:BatchedMinNewTokensPenalizer")

    class PenaltiesElsewhere(orchestrator):  # type: ignore[misc]
        """SGLang's BatchedPenalizerOrchestrator, for minimum lengths alone."""

        def __init__(self, vocab_size: int, batch: Any, penalizers: set[Any]) -> None:
            if requests.accepts(vocab_size):
                penalizers = penalizers & {min_new_tokens}
            super().__init__(vocab_size, batch, penalizers)

    return PenaltiesElsewhere


def followed(batch_info: Any, requests: Requests) -> Any:
    """A subclass of SGLang's SamplingBatchInfo that knows the request of each row."""

    @dataclass
    class FollowedBatchInfo(batch_info):  # type: ignore[misc]
        """SGLang's SamplingBatchInfo, with two fields more.

        Attributes:
            requests: a :class:`Request` for each row; None where the kernel does not draw.
            penalised: the logits to which penalties have been applied, of this step.
        """

        requests: list[Request] | None = None
        penalised: Tensor | None = None

        def adjusted_from_schedule_batch(self, batch: Any, vocab_size: int) -> None:
            super().adjusted_from_schedule_batch(batch, vocab_size)
            self.requests = requests.of_batch(batch, vocab_size)

        def adjusted_filter_batch(
            self, keep_indices: list[int], keep_indices_device: Tensor
        ) -> None:
            super().adjusted_filter_batch(keep_indices, keep_indices_device)
            if self.requests is not None:
                self.requests = [self.requests[index] for index in keep_indices]

        def adjusted_merge_batch(self, other: Any) -> None:
            super().adjusted_merge_batch(other)
            if self.requests is not None:
                self.requests = self.requests + other.requests

        def _apply_pre_grammar_logits_transforms(self, logits: Tensor) -> None:
            """Penalties come before biases and processors of others, as in SGLang."""
            super()._apply_pre_grammar_logits_transforms(logits)
            if self.logit_bias is None and not self.has_custom_logit_processor:
                return  # the kernel applies them in the draw
            if requests.are_of(self, logits):
                penalised = requests.penalised(self.requests or (), logits)
                if penalised is not logits:
                    logits.copy_(penalised)
                self.penalised = logits

    FollowedBatchInfo.followed_by = requests
    return FollowedBatchInfo


def fused(sampler: Any, requests: Requests) -> Any:
    """A subclass of SGLang's Sampler that draws by :class:`Requests`."""
    capture_of = find(f"{_SAMPLER}:_SamplingMaskCapture")
    of_original = find(f"{_SAMPLER}:SGLANG_RETURN_ORIGINAL_LOGPROB")

    class FusedSampler(sampler):  # type: ignore[misc]
        """SGLang's Sampler, with penalties, filters and the draw in one launch."""

        def forward(
            self,
            logits_output: Any,
            sampling_info: Any,
            return_logprob: bool,
            top_logprobs_nums: list[int],
            token_ids_logprobs: list[Any],
            positions: Tensor,
            *,
            logprob_logits: Tensor | None = None,
        ) -> Any:
            logits = logits_output.next_token_logits
            if not requests.are_of(sampling_info, logits):
                return super().forward(
                    logits_output,
                    sampling_info,
                    return_logprob,
                    top_logprobs_nums,
                    token_ids_logprobs,
                    positions,
                    logprob_logits=logprob_logits,
                )
            rows = sampling_info.requests
            done = sampling_info.penalised is logits
            sampling_info.penalised = None
            logits = self._preprocess_logits(logits, sampling_info)
            tokens = requests.draw(rows, logits, positions, are_penalised=done)
            if return_logprob:
                scored = logits if done else requests.penalised(rows, logits)
                if not (sampling_info.is_all_greedy or of_original):
                    scored = scored / sampling_info.temperatures
                self.output_logprob_processor.compute_logprobs(
                    scored.log_softmax(-1), top_logprobs_nums, token_ids_logprobs, tokens
                ).write_output_to(logits_output)
            self._sync_token_ids_across_tp(tokens, sampling_info)
            asked = sampling_info.sampling_mask_batch_indices
            if asked is not None:
                kept = requests.kept(rows, logits, are_penalised=done)[asked]
                logits_output.sampling_mask_output = self._build_sampling_mask_output(
                    tokens,
                    capture_of(kept.softmax(-1), None, None, asked),
                    sampling_info.sampling_support_logprobs_capture_indices,
                )
            requests.record(rows, tokens)
            return tokens

    return FusedSampler
