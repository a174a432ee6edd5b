"""vLLM's V2 model runner: three of its names are replaced.

``Sampler``, by a function that makes a subclass of it, which draws by :class:`Requests`;
``post_update``, which records what was drawn, so that :class:`Requests` records it; and
``create_watermarker``, to say that a watermark is drawn by another sampler.

V2 gives each request a slot of tables on the device, among them the prompts' tokens as bits and the
counts of the outputs' tokens. :class:`Requests` draws from these very tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llm_sampling import backends
from llm_sampling.backends.base import MAX_EXTRA_OUTPUT
from llm_sampling.history import TokenHistory
from llm_sampling.integrations.engine import (
    NO_FILTER,
    NO_PENALTY,
    Reliance,
    Warnings,
    backend_name,
    find,
    on_device,
)
from llm_sampling.integrations.vllm.both import (
    FIELDS_OF_BOTH,
    LOG,
    READ_BY_V2,
    not_greedy,
    params_of,
    why_not_here,
    with_extra,
)
from llm_sampling.params import SamplingParams
from llm_sampling.sample import filter_logits, sample
from llm_sampling.table import EMPTY, RequestTable

RUNNER = "vllm.v1.worker.gpu.model_runner"


def replace_names(runner: ModuleType) -> None:
    """Replace three names of the runner, or warn why they stay."""
    if LOG.accepts(RELIANCE, "V2 runner: "):
        runner.Sampler = _building(runner.Sampler)  # type: ignore[attr-defined]
        runner.post_update = _recording(runner.post_update)  # type: ignore[attr-defined]
        runner.create_watermarker = _telling(runner.create_watermarker)  # type: ignore[attr-defined]


# ---- what is relied on ----

_SAMPLE = "vllm.v1.worker.gpu.sample"
_SAMPLER = f"{_SAMPLE}.sampler:Sampler"
_ROWS = (
    "self logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids expanded_local_pos "
    "seq_lens_upper_bound_np"
)

RELIANCE = Reliance(
    signatures={
        f"{_SAMPLER}.add_request": "self req_idx sampling_params",
        f"{_SAMPLER}.apply_staged_writes": "self",
        f"{_SAMPLER}.sample": f"{_ROWS} return_logprobs",
        f"{_SAMPLER}.apply_sampling_params": f"{_ROWS} skip_top_k_top_p",
        f"{_SAMPLE}.logits_processor.interface:LogitsContext": (
            "expanded_idx_mapping idx_mapping idx_mapping_np expanded_local_pos input_ids pos "
            "seq_lens_upper_bound_np"
        ),
        "vllm.v1.worker.gpu.input_batch:post_update": (
            "idx_mapping num_computed_tokens last_sampled_tokens output_bin_counts sampled_tokens "
            "num_sampled *"
        ),
    },
    fields={
        **FIELDS_OF_BOTH,
        "vllm.config:SpeculativeConfig": "num_speculative_tokens",
        f"{_SAMPLER}.__init__": "vllm_config custom_logits_processors",
    },
    lookups={
        f"{RUNNER}:GPUModelRunner.load_model": "Sampler create_watermarker",
        f"{RUNNER}:GPUModelRunner.add_requests": "add_request apply_staged_writes",
        f"{RUNNER}:GPUModelRunner.sample": "sampler",
        f"{RUNNER}:GPUModelRunner.postprocess_sampled": (
            "sampler penalties_state output_bin_counts post_update"
        ),
        f"{_SAMPLER}.__init__": (
            "req_states sampling_states penalties_state logits_processors thinking_budget_state "
            "return_sampling_mask logprobs_mode"
        ),
        f"{_SAMPLER}.__call__": "sample",
        f"{_SAMPLER}.apply_sampling_params": "needs_logits_processing",
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler._verify": (
            "apply_sampling_params"
        ),
        f"{_SAMPLE}.states:SamplingStates.__init__": "seeds",
        f"{_SAMPLE}.states:SamplingStates.add_request": "seeds np",
        f"{_SAMPLE}.penalties:PenaltiesState.__init__": "prompt_bin_mask output_bin_counts",
        f"{_SAMPLE}.penalties:PenaltiesState.apply_staged_writes": (
            "prefill_len prompt_len all_token_ids gpu"
        ),
        f"{_SAMPLE}.logit_bias:LogitBiasState.apply": "use_logit_bias idx_mapping_np",
        f"{_SAMPLE}.bad_words:BadWordsState.apply": "num_bad_words np idx_mapping_np",
        f"{_SAMPLE}.thinking_budget:ThinkingBudgetState.apply": "enabled use_thinking_budget",
        "vllm.v1.worker.gpu.states:RequestState.add_request": "index_to_req_id np",
        "vllm.v1.worker.gpu.states:RequestState.remove_request": "index_to_req_id",
    },
)


# ---- the requests, by slot ----

#: Those whose engine runs in this process.
_ALIVE: weakref.WeakSet[Requests] = weakref.WeakSet()


class Requests:
    """The requests of vLLM's slots: follows those that come and go, draws, and records.

    A token depends on nothing but its request: logits, parameters, seed and the tokens so far,
    whose number is the position. A preempted request comes back with its output, so it goes on
    where it stopped.

    Histories are vLLM's own tensors. The bits hold the output too, which changes nothing for vLLM's
    own code: it takes a token for seen whose bit is set or whose count is not 0.

    Args:
        seen: int32 ``(slots, ceil(vocab_size / 32))``, vLLM's ``prompt_bin_mask``.
        counts: int32 ``(slots, vocab_size)``, vLLM's ``output_bin_counts``.
        has_processors: whether the penalties are applied by :meth:`penalised`, since logits
            processors come between them and the temperature.
        backend: as for :func:`llm_sampling.sample`.
    """

    def __init__(
        self, seen: Tensor, counts: Tensor, *, has_processors: bool = False, backend: str = "auto"
    ) -> None:
        self.counts = counts
        self.capacity, self.vocab_size = counts.shape
        self.backend = backend_name(backends.resolve(backend, counts.device))
        slots = torch.arange(self.capacity, dtype=torch.int32, device=counts.device)
        self._history = TokenHistory(seen, counts, None, slots, self.vocab_size)
        # What the draw applies, what "processed" logits show, and what comes before processors.
        self._drawn = self._make_table()
        self._shown = self._make_table()
        self._penalised = self._make_table() if has_processors else None
        self._taken: set[int] = set()
        self._unfilled: list[int] = []  # slots whose request has a penalty and no history yet
        self._warnings = Warnings(LOG)
        for slot in range(self.capacity):
            self._set(slot, EMPTY)  # vLLM's trial runs draw for slots without a request
        _ALIVE.add(self)

    def _make_table(self) -> RequestTable:
        return RequestTable(
            self.capacity,
            vocab_size=self.vocab_size,
            history=self._history,
            max_logit_bias=0,  # vLLM's own code adds biases
            backend=self.backend,
            device=self.counts.device,
        )

    def _set(self, slot: int, params: SamplingParams, position: int = 0) -> None:
        rest = params
        if self._penalised is not None:
            rest = replace(params, **NO_PENALTY)
            self._penalised.set(slot, replace(params, temperature=1.0, **NO_FILTER))
        self._drawn.set(slot, rest, position=position)
        self._shown.set(slot, not_greedy(rest))

    def enter(self, slot: int, theirs: Any, seed: int, position: int) -> None:
        """Put a request into a slot.

        Args:
            slot: vLLM's index of the request.
            theirs: its ``vllm.SamplingParams``.
            seed: the one that vLLM has given it, if it has none of its own.
            position: how many tokens it has produced.
        """
        params = with_extra(params_of(theirs, seed), theirs, READ_BY_V2, self._warnings)
        self._set(slot, params, position)
        self._taken.add(slot)
        if params.needs_history:
            self._unfilled.append(slot)

    def stay(self, slots: Collection[int]) -> None:
        """Free all slots but these, so that no kernel does what only a past request needed."""
        for slot in self._taken.difference(slots):
            self._set(slot, EMPTY)
            self._taken.discard(slot)

    def fill(self, ids: Tensor, lengths: Sequence[int], prompt_lengths: Sequence[int]) -> None:
        """Fill the histories of those that have entered with a penalty, in one launch.

        Args:
            ids: int32 ``(slots, n)``, prompt and output of each slot, on the device.
            lengths: by slot, how many of them there are.
            prompt_lengths: by slot, how many of these are the prompt.
        """
        slots, self._unfilled = [*dict.fromkeys(self._unfilled)], []
        if not slots:
            return
        of_slots = [int(lengths[slot]) for slot in slots]
        there = on_device(slots, torch.int64, ids.device)
        self._drawn.fill(
            slots,
            ids[there, : max(of_slots)],
            of_slots,
            [int(prompt_lengths[slot]) for slot in slots],
        )

    def record(self, tokens: Tensor, counts: Tensor, slots: Tensor) -> None:
        """Add tokens to the outputs of their slots, in one launch.

        Args:
            tokens: int32 or int64 ``(rows, k)``.
            counts: int32 ``(rows,)``, how many of each row's tokens are the request's: none for a
                prompt that is not yet complete.
            slots: int32 ``(rows,)``; -1 for a row whose request has gone.
        """
        self._drawn.append(tokens, counts, slots=slots)

    def draw(self, logits: Tensor, slots: Tensor) -> Tensor:
        """int64 ``(rows,)``: the next token of each row, in one launch.

        Args:
            logits: ``(rows, vocab_size)`` float32, float16 or bfloat16. Never modified.
            slots: int32 or int64 ``(rows,)``.
        """
        slots = slots.to(torch.int32)  # as a prepared call takes them
        tokens = sample(logits, self._drawn, slots, check=False, backend=self.backend).tokens
        return self._warnings.token_for_each(tokens)

    def penalised(self, logits: Tensor, slots: Tensor, drafts: Tensor | None = None) -> Tensor:
        """float32 ``(rows, vocab_size)``: the logits with penalties, for logits processors.

        Args:
            logits: as for :meth:`draw`, and so are the slots, which may be named more than once.
            slots: see there.
            drafts: int64 ``(rows, n)``, the tokens of a draft that come before each row's; -1 where
                there is none.
        """
        assert self._penalised is not None
        return self._filtered(self._penalised, logits, slots, drafts)

    def processed(self, logits: Tensor, slots: Tensor, drafts: Tensor | None = None) -> Tensor:
        """float32 ``(rows, vocab_size)``: divided by the temperature, -inf outside the kept set.

        A greedy row is neither divided nor filtered, as in vLLM. The arguments are those of
        :meth:`penalised`.
        """
        return self._filtered(self._shown, logits, slots, drafts)

    def _filtered(
        self, table: RequestTable, logits: Tensor, slots: Tensor, drafts: Tensor | None
    ) -> Tensor:
        if not table.batch.needs_history:
            drafts = None
        return filter_logits(logits, table, slots, extra_output_ids=drafts, backend=self.backend)


# ---- the sampler ----


def _building(sampler: Any) -> Callable[..., Any]:
    """A function that makes V2's sampler: one that draws by :class:`Requests`, or vLLM's own."""
    fused = _fused(sampler)

    def build(**options: Any) -> Any:
        config = options["vllm_config"]
        reason, length = why_not_here(config), _draft_length(config)
        if length > MAX_EXTRA_OUTPUT:
            rule = f"it must be at most {MAX_EXTRA_OUTPUT}"
            reason = f"num_speculative_tokens: {rule}, got {length}"
        if reason is None:
            return fused(**options)
        LOG.refuse(reason)
        return sampler(**options)

    return build


def _draft_length(vllm_config: Any) -> int:
    """How many tokens a draft may have; 0 without speculative decoding."""
    config = vllm_config.speculative_config
    return 0 if config is None else int(config.num_speculative_tokens)


def _recording(post_update: Callable[..., None]) -> Callable[..., None]:
    """``post_update`` that leaves counting what was drawn to the :class:`Requests` that drew it."""

    def update(
        idx_mapping: Tensor,
        num_computed_tokens: Tensor,
        last_sampled_tokens: Tensor,
        output_bin_counts: Tensor | None,
        sampled_tokens: Tensor,
        num_sampled: Tensor,
        *others: Any,
    ) -> None:
        for requests in _ALIVE:
            if requests.counts is output_bin_counts:
                requests.record(sampled_tokens, num_sampled, idx_mapping)
                output_bin_counts = None
        post_update(
            idx_mapping,
            num_computed_tokens,
            last_sampled_tokens,
            output_bin_counts,
            sampled_tokens,
            num_sampled,
            *others,
        )

    return update


def _telling(create_watermarker: Callable[..., Any]) -> Callable[..., Any]:
    """``create_watermarker`` with a warning that its sampler is vLLM's own."""

    def create(*args: Any) -> Any:
        LOG.refuse("watermark_config: a watermark is drawn by a sampler of its own")
        return create_watermarker(*args)

    return create


def _fused(sampler: Any) -> Any:
    """A subclass of V2's Sampler that draws by :class:`Requests`.

    vLLM's own ``__call__`` still computes logprobs. If a batch needs nothing that changes logits
    before the penalties, the kernel reads the logits as the model gave them.
    """
    context = find(f"{_SAMPLE}.logits_processor.interface:LogitsContext")
    logit_bias = find(f"{_SAMPLE}.logit_bias:LogitBiasState")
    bad_words = find(f"{_SAMPLE}.bad_words:BadWordsState")

    class FusedSampler(sampler):  # type: ignore[misc]
        """V2's Sampler, with penalties, filters and the draw in one launch."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._has_custom = bool(options.get("custom_logits_processors"))
            self._draft_length = _draft_length(options["vllm_config"])
            by_type = {type(processor): processor for processor in self.logits_processors}
            self._logit_bias, self._bad_words = by_type[logit_bias], by_type[bad_words]
            self.requests = Requests(
                self.penalties_state.prompt_bin_mask,
                self.penalties_state.output_bin_counts,
                has_processors=self._has_custom,
            )
            LOG.draws(self.requests.backend)

        def add_request(self, req_idx: int, sampling_params: Any) -> None:
            super().add_request(req_idx, sampling_params)
            states = self.req_states
            self.requests.enter(
                req_idx,
                sampling_params,
                int(self.sampling_states.seeds.np[req_idx]),
                int(states.prefill_len.np[req_idx] - states.prompt_len.np[req_idx]),
            )

        def apply_staged_writes(self) -> None:
            super().apply_staged_writes()
            states = self.req_states
            self.requests.stay(states.index_to_req_id)
            self.requests.fill(
                states.all_token_ids.gpu, states.prefill_len.np, states.prompt_len.np
            )

        def sample(
            self,
            logits: Tensor,
            expanded_idx_mapping: Tensor,
            idx_mapping: Tensor,
            idx_mapping_np: Any,
            pos: Tensor,
            input_ids: Tensor,
            expanded_local_pos: Tensor,
            seq_lens_upper_bound_np: Any,
            return_logprobs: bool = False,
        ) -> tuple[Tensor, Tensor]:
            """The tokens, and "processed" logits if they are asked for, else others."""
            places = expanded_idx_mapping, idx_mapping, idx_mapping_np, expanded_local_pos
            more = input_ids, pos, seq_lens_upper_bound_np
            logits = self._changed(logits, context(*places, *more), None)
            tokens = self.requests.draw(logits, expanded_idx_mapping)
            are_shown = return_logprobs and self.logprobs_mode.startswith("processed")
            if are_shown or self.return_sampling_mask:
                logits = self.requests.processed(logits, expanded_idx_mapping)
            return tokens, logits

        def apply_sampling_params(
            self,
            logits: Tensor,
            expanded_idx_mapping: Tensor,
            idx_mapping: Tensor,
            idx_mapping_np: Any,
            pos: Tensor,
            input_ids: Tensor,
            expanded_local_pos: Tensor,
            seq_lens_upper_bound_np: Any,
            skip_top_k_top_p: bool = False,
        ) -> Tensor:
            """The "processed" logits of rows of drafts, which vLLM's rejection sampler draws."""
            if skip_top_k_top_p:  # only vLLM's own draw asks for that
                skipped: Tensor = super().apply_sampling_params(
                    *(logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos),
                    *(input_ids, expanded_local_pos, seq_lens_upper_bound_np, True),
                )
                return skipped
            if not self.needs_logits_processing[idx_mapping_np].any():
                return logits
            drafts = self._drafts(input_ids, expanded_local_pos)
            places = expanded_idx_mapping, idx_mapping, idx_mapping_np, expanded_local_pos
            more = input_ids, pos, seq_lens_upper_bound_np
            logits = self._changed(logits, context(*places, *more), drafts)
            return self.requests.processed(logits, expanded_idx_mapping, drafts)

        def _drafts(self, input_ids: Tensor, local_pos: Tensor) -> Tensor:
            """int64 ``(rows, n)``: the draft's tokens before each row's; -1 where there is none.

            Args:
                input_ids: the token that the model read in each row: in a request's first row the
                    last token of its text, in the others those of the draft.
                local_pos: how many of the draft's tokens come before each row's.
            """
            nth = torch.arange(self._draft_length, device=input_ids.device)
            row = torch.arange(len(input_ids), device=input_ids.device)[:, None]
            before = local_pos[:, None]
            places = (row - before + 1 + nth).clamp(max=len(input_ids) - 1)
            return torch.where(nth < before, input_ids[places].to(torch.int64), -1)

        def _changes_logits(self, slots: Any) -> bool:
            """Whether vLLM's code, or a logits processor, changes a row other than by penalties."""
            budget = self.thinking_budget_state
            return bool(
                self._has_custom
                or self._logit_bias.use_logit_bias[slots].any()
                or self._bad_words.num_bad_words.np[slots].any()
                or (budget.enabled and budget.use_thinking_budget[slots].any())
            )

        def _changed(self, logits: Tensor, rows: Any, drafts: Tensor | None) -> Tensor:
            """The logits after all of vLLM's code that comes before the temperature.

            They are the same tensor where that code changes no row. The penalties are left out
            where no processor has to see them.
            """
            if not self._changes_logits(rows.idx_mapping_np):
                return logits
            logits = logits.to(torch.float32, copy=True)
            for processor in self.logits_processors:
                if processor is not self.penalties_state:
                    logits = processor.apply(logits, rows)
                elif self._has_custom:
                    slots = rows.expanded_idx_mapping
                    logits = self.requests.penalised(logits, slots, drafts)
            self.thinking_budget_state.apply(logits, rows)
            return logits

    return FusedSampler
