"""transformers' continuous batching: the kernel in place of the draw of its model runner.

    with fused_continuous_batching():
        outputs = model.generate_batch(prompts, generation_config=config)

transformers has no plug-in point for it, so :func:`fused_continuous_batching` replaces the name
``ContinuousBatchingManager`` of ``transformers.generation.continuous_batching.continuous_api`` by a
subclass, which takes the parameters of each request. It has a list of logits processors of a
subclass, which is told of every batch before the model runs, and runs a subclass of
``ModelRunner``, whose draw is one call of the kernel. If this transformers differs from what they
rely on, nothing is replaced and the error names the difference.

Importing this module does not import transformers. docs/engines/continuous-batching.md says what
remains transformers' own, what is refused, and what differs.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from llm_sampling import backends
from llm_sampling.checks import integer_at_least, refusal, true_or_false
from llm_sampling.generation.config import (
    AS_PROCESSORS,
    NOT_SUPPORTED,
    REPLACED,
    params_of_config,
    refuse_fields,
)
from llm_sampling.generation.rows import seeded
from llm_sampling.history import check_vocab_size
from llm_sampling.integrations.engine import (
    EngineLog,
    Reliance,
    Warnings,
    backend_name,
    find,
    fresh_seed,
)
from llm_sampling.params import SamplingParams
from llm_sampling.results import Kind
from llm_sampling.sample import sample
from llm_sampling.table import RequestTable

LOG = EngineLog("transformers", "transformers", ("5.23", "5.24"))

# ---- registration ----

_PACKAGE = "transformers.generation.continuous_batching"
_API = f"{_PACKAGE}.continuous_api"
_MANAGER = f"{_API}:ContinuousBatchingManager"
_PROCESSORS = f"{_PACKAGE}.cb_logits_processors:ContinuousBatchingLogitsProcessorList"
_RUNNER = f"{_PACKAGE}.model_runner:ModelRunner"


class fused_continuous_batching:  # noqa: N801 - it is called as a function
    """Have continuous batching of transformers draw by the kernel.

    It counts from the call on, for managers that are made then: by ``model.generate_batch``,
    ``model.continuous_batching_context_manager`` or ``model.init_continuous_batching``. At the end
    of a ``with`` block, or by :meth:`close`, transformers' own manager is put back; a manager that
    was made goes on as it is.

    Such a manager takes the parameters of each request, which all requests of transformers' own
    share: ``add_request(ids, temperature=0.7, top_p=0.9, seed=1)``, or ``params=`` with a
    :class:`~llm_sampling.SamplingParams`, or ``generation_config=``. ``add_requests`` takes
    ``params`` for all prompts or a list of one for each.

    Args:
        params: of requests that bring none: one for all, or for ``generate_batch`` and
            ``add_requests`` a list of one a prompt. They replace the ``do_sample``,
            ``temperature``, ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty`` of the
            generation config. Default: those of the config.
        penalties: whether requests may have penalties. Then ``max_requests_per_batch *
            vocab_size * 4`` bytes are kept on the device, and each step takes one launch more.
        max_length: the most ids of prompt and output together that a request may have. It is
            needed for ``penalty_last_n``; the ids are then kept in order, 4 bytes each.
        backend: as for :func:`llm_sampling.sample`.

    Raises:
        RuntimeError: this transformers has not what is relied on; the message names it.
        ValueError: an argument is out of its range.

    Example:
        >>> with fused_continuous_batching([SamplingParams(seed=1), SamplingParams(temperature=0)]):
        ...     outputs = model.generate_batch(prompts, max_new_tokens=20)
    """

    def __init__(
        self,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        penalties: bool = True,
        max_length: int | None = None,
        backend: str = "auto",
    ) -> None:
        backends.check_name(backend)
        options = _Options(
            _checked_params(params),
            true_or_false("penalties", penalties),
            None if max_length is None else integer_at_least("max_length", max_length, 1),
            backend,
        )
        if max_length is not None and not penalties:
            raise ValueError(f"max_length must be None where penalties is False, got {max_length}")
        reason = None if _is_replaced() else RELIANCE.difference()
        if reason is not None:
            raise RuntimeError(f"llm_sampling: transformers keeps its own sampler: {reason}")
        self._module = find(_API)
        self._before = self._module.ContinuousBatchingManager
        theirs = getattr(self._before, "theirs", self._before)
        self._module.ContinuousBatchingManager = _manager(theirs, options)

    def close(self) -> None:
        """Put back what the name was before. A second call has no effect."""
        if self._before is not None:
            self._module.ContinuousBatchingManager = self._before
        self._before = None

    def __enter__(self) -> fused_continuous_batching:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _is_replaced() -> bool:
    """Whether the manager is replaced already: transformers was looked at then."""
    module = sys.modules.get(_API)
    return hasattr(getattr(module, "ContinuousBatchingManager", None), "theirs")


@dataclass(frozen=True)
class _Options:
    """What :func:`fused_continuous_batching` was called with."""

    params: SamplingParams | list[SamplingParams] | None
    penalties: bool
    max_length: int | None
    backend: str


def _checked_params(params: Any) -> SamplingParams | list[SamplingParams] | None:
    if params is None or isinstance(params, SamplingParams):
        return params
    if isinstance(params, Sequence) and all(isinstance(one, SamplingParams) for one in params):
        return [*params]
    raise ValueError(f"params must be a SamplingParams or a sequence of them, got {params!r}")


# ---- what this module relies on in transformers ----

RELIANCE = Reliance(
    signatures={
        f"{_MANAGER}.__init__": (
            "self model generation_config continuous_batching_config workload_hints"
        ),
        f"{_MANAGER}.add_request": (
            "self input_ids request_id max_new_tokens streaming record_timestamps eos_token_id "
            "logit_processor_kwargs"
        ),
        f"{_MANAGER}.add_requests": (
            "self inputs max_new_tokens streaming record_timestamps logit_processor_kwargs"
        ),
        f"{_PROCESSORS}.check_kwargs": "self kwargs",
        f"{_PROCESSORS}.fill_defaults": "self int32_tensor",
        f"{_PROCESSORS}.prepare_tensor_args": "self requests_in_batch arg_storage",
        f"{_RUNNER}.__init__": (
            "self logit_processor cb_config inputs_and_outputs cache do_sample return_logprobs"
        ),
        f"{_RUNNER}.compute_batch": "self model batch_data",
        f"{_RUNNER}._sample": "self scores output_ids",
    },
    fields={
        f"{_PACKAGE}.requests:RequestState": (
            "request_id initial_tokens logit_processor_kwargs generated_tokens position_offset "
            "_true_initial_tokens"
        ),
        f"{_PACKAGE}.requests:FutureRequestState": "state has_new_token",
    },
    lookups={
        f"{_MANAGER}.__init__": (
            "_get_logits_processor ContinuousBatchingLogitsProcessorList logit_processor "
            "continuous_batching_config distributed_helper"
        ),
        f"{_MANAGER}.add_requests": "add_request",
        f"{_MANAGER}._create_batch_processor": "ContinuousBatchProcessor logit_processor",
        f"{_PROCESSORS}.__init__": "tensors_required",
        f"{_API}:ContinuousBatchProcessor.__init__": (
            "logit_processor cb_config inputs_and_outputs cache do_sample return_logprobs "
            "model_runner compute_stream"
        ),
        f"{_API}:ContinuousBatchProcessor._generation_step": "model_runner compute_batch",
        f"{_API}:ContinuousBatchProcessor._update_tp_group_state": (
            "check_kwargs logit_processor_kwargs"
        ),
        f"{_API}:ContinuousMixin.init_continuous_batching": "ContinuousBatchingManager",
        f"{_RUNNER}._forward_process_and_sample": "_sample",
        f"{_PACKAGE}.input_outputs:ContinuousBatchingIOs._setup_static_tensors": (
            "tensors_required fill_defaults"
        ),
        f"{_PACKAGE}.input_outputs:ContinuousBatchingIOs.prepare_batch_tensors": (
            "position_offset prepare_tensor_args static_inputs"
        ),
        f"{_PACKAGE}.requests:RequestState.update_and_check_completion": (
            "generated_tokens status FINISHED"
        ),
        f"{_PACKAGE}.requests:RequestState.create_equivalent_initial_request": (
            "get_request_config _true_initial_tokens"
        ),
    },
)


# ---- parameters of a request ----

_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))

#: The entry of transformers' ``logit_processor_kwargs`` of a request that has our own.
_OURS = "llm_sampling"


@dataclass(frozen=True)
class _Asked:
    """What a request asks for, which transformers keeps and copies with it.

    Attributes:
        params: its parameters, with a seed.
        request_id: the request that was added. Another request that has this is a sequence of it.
    """

    params: SamplingParams
    request_id: str

    def of(self, request_id: str) -> SamplingParams:
        """The parameters of the request itself, or of a sequence that was forked from it."""
        _, _, child = request_id.removeprefix(self.request_id).rpartition("#")
        return seeded(self.params, int(child) + 1) if child else self.params


class Prompt(list):  # type: ignore[type-arg]
    """A prompt with its parameters: ``add_requests`` sorts prompts before it adds them."""

    def __init__(self, ids: Sequence[int], params: SamplingParams) -> None:
        super().__init__(ids)
        self.params = params


def _manager(theirs: Any, options: _Options) -> Any:
    """A subclass of transformers' manager that takes the parameters of each request."""

    class FusedManager(theirs):  # type: ignore[misc]
        """transformers' manager, with parameters and a seed for each request.

        Attributes:
            theirs: the class of transformers itself.
            processors: the class of its list of processors.
            runner: the class of its model runner.
        """

        theirs: Any
        processors = _processors(find(_PROCESSORS))
        runner = _runner(find(_RUNNER))
        logit_processor: Any

        def __init__(
            self,
            model: Any,
            generation_config: Any,
            continuous_batching_config: Any,
            workload_hints: Any = None,
        ) -> None:
            refuse_fields(generation_config, NOT_SUPPORTED)
            vocab_size = check_vocab_size(model.config.get_text_config().vocab_size)
            backend = backend_name(backends.resolve(options.backend, model.device))
            self._options = options
            self._config_params = params_of_config(generation_config, None, top_k=0)
            # transformers then makes no processors of what the kernel applies
            config = copy.deepcopy(generation_config)
            for name, _ in REPLACED.values():
                setattr(config, name, None)
            super().__init__(model, config, continuous_batching_config, workload_hints)
            self.generation_config = generation_config
            resolved = self.continuous_batching_config
            if any(resolved.cuda_graph_booleans):
                _refuse_graphs(model.device.type, backend)
            requests = Requests(
                vocab_size,
                model.device,
                capacity=resolved.max_requests_per_batch,
                penalties=options.penalties,
                max_length=options.max_length,
                backend=options.backend,
            )
            self.logit_processor = self.processors(self.logit_processor, requests)
            seed = fresh_seed() if resolved.seed is None else resolved.seed
            self._seeds = torch.Generator().manual_seed(
                (seed + self.distributed_helper.dp_rank) % 2**63
            )
            LOG.draws(backend)

        def _create_batch_processor(self) -> Any:
            """See transformers; it is called when the manager starts, which may be much later."""
            processor = super()._create_batch_processor()
            if not isinstance(processor.model_runner, self.runner):
                processor.model_runner = self.runner(
                    logit_processor=processor.logit_processor,
                    cb_config=processor.cb_config,
                    inputs_and_outputs=processor.inputs_and_outputs,
                    cache=processor.cache,
                    do_sample=processor.do_sample,
                    return_logprobs=processor.return_logprobs,
                )
            return processor

        def add_request(
            self,
            input_ids: list[int],
            request_id: str | None = None,
            max_new_tokens: int | None = None,
            streaming: bool = False,
            record_timestamps: bool = False,
            eos_token_id: int | list[int] | None = None,
            **options: Any,
        ) -> str | None:
            """See transformers; ``options`` are the request's parameters.

            Raises:
                ValueError: they name what there is not, are out of range, or cannot be honoured.
            """
            config = options.get("generation_config")
            if config is not None:
                refuse_fields(config, {"stop_strings": ([],)})
                if max_new_tokens is None:
                    max_new_tokens = config.max_new_tokens
                if eos_token_id is None:
                    eos_token_id = config.eos_token_id
            params, others = self._asked(input_ids, options)
            longest = self.generation_config.max_new_tokens
            self._check(params, len(input_ids), max_new_tokens or longest)
            if request_id is None:
                with self._request_lock:
                    request_id = f"req_{self._request_counter}"
                    self._request_counter += 1
            others[_OURS] = _Asked(params, request_id)
            added: str | None = super().add_request(
                input_ids,
                request_id,
                max_new_tokens,
                streaming,
                record_timestamps,
                eos_token_id,
                **others,
            )
            return added

        def add_requests(
            self,
            inputs: list[list[int]],
            max_new_tokens: int | None = None,
            streaming: bool = False,
            record_timestamps: bool = False,
            *,
            params: SamplingParams | Sequence[SamplingParams] | None = None,
            **options: Any,
        ) -> list[str]:
            """See transformers; ``params`` may be a list of one for each prompt.

            Raises:
                ValueError: as :meth:`add_request`.
            """
            own = _checked_params(params)
            of_each = self._options.params if own is None and not options else own
            if isinstance(of_each, list):
                if len(of_each) != len(inputs):
                    raise ValueError(
                        f"params must have one for each of {len(inputs)} prompts, got "
                        f"{len(of_each)}"
                    )
                inputs = [Prompt(*of_one) for of_one in zip(inputs, of_each, strict=True)]
            elif own is not None:
                options["params"] = own
            names: list[str] = super().add_requests(
                inputs, max_new_tokens, streaming, record_timestamps, **options
            )
            return names

        def _asked(
            self, input_ids: Any, options: dict[str, Any]
        ) -> tuple[SamplingParams, dict[str, Any]]:
            """The parameters of a request, with a seed, and what is for others' processors."""
            fields = {name: value for name, value in options.items() if name in _FIELDS}
            others = {name: value for name, value in options.items() if name not in _FIELDS}
            params, config = others.pop("params", None), others.pop("generation_config", None)
            unknown = set(others) - set(self.logit_processor.supported_keys)
            if unknown:
                raise ValueError(
                    f"a request has no parameter {', '.join(sorted(unknown))}; there are params, "
                    f"generation_config, {', '.join(sorted(_FIELDS))}"
                )
            if isinstance(input_ids, Prompt):
                params = input_ids.params
            if params is not None and (config is not None or fields):
                more = ["generation_config"] * (config is not None) + sorted(fields)
                raise ValueError(f"params must not be given beside {', '.join(more)}")
            if params is None:
                params = self._default() if config is None else self.params_of(config)
            elif not isinstance(params, SamplingParams):
                raise refusal("params", "one SamplingParams", params)
            params = replace(params, **fields) if fields else params
            if params.seed is None:
                low, high = torch.randint(2**32, (2,), generator=self._seeds).tolist()
                params = replace(params, seed=low + (high << 32))
            return params, others

        def _default(self) -> SamplingParams:
            """The parameters of a request that brings none."""
            found = self._options.params
            if isinstance(found, list):
                raise ValueError(
                    "params must be given with a request where those of the manager are a list of "
                    "one a prompt; add_requests and generate_batch take it"
                )
            return self._config_params if found is None else found

        def params_of(self, config: Any) -> SamplingParams:
            """The parameters of a request's generation config.

            Raises:
                ValueError: the config asks for what cannot be honoured, or for other processors
                    than the manager's.
            """
            refuse_fields(config, NOT_SUPPORTED)
            of_manager = self.generation_config
            for name, off in {**AS_PROCESSORS, "num_return_sequences": (1,)}.items():
                value, known = getattr(config, name, None), getattr(of_manager, name, None)
                if value != known and not (value in (None, *off) and known in (None, *off)):
                    raise ValueError(
                        f"{name} of a request's generation_config must be that of the manager's, "
                        f"which counts for all requests, got {value!r}"
                    )
            return params_of_config(config, None, top_k=0)

        def _check(self, params: SamplingParams, prompt: int, output: int | None) -> None:
            """A ValueError if the table cannot hold such a request."""
            if params.needs_history and not self._options.penalties:
                raise ValueError(
                    "params must have no penalty where fused_continuous_batching was called with "
                    f"penalties=False, got {params}"
                )
            longest = self._options.max_length
            if params.has_window and longest is None:
                raise ValueError(
                    "params must have no penalty_last_n where fused_continuous_batching was called "
                    f"without max_length, got {params}"
                )
            if longest is not None and (output is None or prompt + output > longest):
                raise ValueError(
                    f"prompt and max_new_tokens must have at most max_length = {longest} ids "
                    f"together, got {prompt} and {output}"
                )

    FusedManager.theirs = theirs
    return FusedManager


def _refuse_graphs(device_type: str, backend: str) -> None:
    """A ValueError if a graph would keep what the requests of its capture ask for, or cannot be."""
    if device_type == "cpu" or (device_type == "cuda" and backend != "torch"):
        return
    raise ValueError(
        "use_cuda_graph of the ContinuousBatchingConfig must be False where the draw cannot be "
        f"captured, got the backend {backend!r} on {device_type!r}"
    )


# ---- the requests of a batch ----


@dataclass(eq=False, slots=True)
class _Request:
    """A request in a slot.

    Attributes:
        state: transformers' ``RequestState``.
        slot: its slot of the table.
        prompt_length: how many ids its prompt has, without what it has produced.
        needs_history: whether it has a penalty.
        recorded: how many tokens of its output the slot's history has when the batches that were
            prepared so far have run, where it needs one.
    """

    state: Any
    slot: int
    prompt_length: int
    needs_history: bool
    recorded: int = -1

    @property
    def has_ended(self) -> bool:
        """Whether transformers knows that it has finished or failed."""
        status = self.state.status
        return bool(status >= type(status).FINISHED)


#: How many rows the plug-in adds to transformers' ``logits_processor_args``. For each row of logits
#: they have its slot, its place in the text, and the slot that records its token, or -1 for none.
_ROWS = 3


class Requests:
    """The requests of a manager, in slots of a :class:`RequestTable`: follows batches, and draws.

    transformers prepares a batch on the host, with three numbers for each of its requests: slot,
    place in the text, and the slot in which the drawn token is recorded. They go to the device
    with transformers' own inputs, to a fixed address. So the draw reads nothing of the host, and a
    CUDA graph that captured it sees the requests that come later.

    A token depends on nothing but its request: logits, parameters, seed, and the tokens so far,
    whose number is the position. transformers counts the ids that it has processed, also where
    the tokens of the batch before are still on the device. Penalties need these tokens themselves;
    each draw adds its own to the histories there. The history of a request is filled anew where it
    has another length, which is so when transformers has thrown a drawn token away.

    Args:
        vocab_size: the width of the logits, 1 .. 2^20.
        device: the logits'.
        capacity: the most requests that a batch has.
        penalties: whether to keep histories.
        max_length: how many ids a history keeps in order; None: it does not.
        backend: as for :func:`llm_sampling.sample`.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        *,
        capacity: int,
        penalties: bool = True,
        max_length: int | None = None,
        backend: str = "auto",
    ) -> None:
        self._backend = backend
        self._keeps_histories = penalties
        self._table = RequestTable(
            capacity,
            vocab_size=vocab_size,
            history=penalties,
            # asynchronous batches draw one token too many for a request that has ended
            max_length=None if max_length is None else max_length + 1,
            backend=backend,
            device=device,
        )
        self._free = list(range(capacity))
        self._by_id: dict[str, _Request] = {}  # the least recently used first
        #: The stream of the draws, in whose order the table is changed; None: the current one.
        self.stream: Any = None
        self._warnings = Warnings(LOG)

    # Called while a batch is prepared, on the host

    def follow(self, states: Sequence[Any]) -> list[tuple[int, int, int]]:
        """The slot, the place and the recording slot of each request that gets a token.

        Args:
            states: their ``RequestState``, whose ``position_offset`` counts this batch.

        Raises:
            RuntimeError: the history of a request is needed and nobody knows its last token.
        """
        with self._on_stream():
            for request in [one for one in self._by_id.values() if one.has_ended]:
                self._leave(request)
            names = {state.request_id for state in states}
            return [self._numbers_of(state, names) for state in states]

    def _on_stream(self) -> AbstractContextManager[Any]:
        if self.stream is None:
            return nullcontext()
        context: AbstractContextManager[Any] = torch.get_device_module(self._table.device).stream(
            self.stream
        )
        return context

    def _numbers_of(self, state: Any, names: set[str]) -> tuple[int, int, int]:
        asked = state.logit_processor_kwargs.get(_OURS)
        if asked is None:  # of transformers' warm-up
            return -1, -1, -1
        request = self._by_id.pop(state.request_id, None)
        if request is None or request.state is not state:
            slot = self._free_slot(names) if request is None else request.slot
            params = asked.of(state.request_id)
            prompt_length = state._true_initial_tokens or len(state.initial_tokens)
            request = _Request(state, slot, prompt_length, params.needs_history)
            self._table.set(slot, params, prompt_length=prompt_length)
        self._by_id[state.request_id] = request
        place = state.position_offset - 1
        if not request.needs_history:
            return request.slot, place, -1
        if request.recorded != place + 1 - request.prompt_length:
            self._fill(request, place + 1)
        request.recorded += 1
        return request.slot, place, request.slot

    def _fill(self, request: _Request, length: int) -> None:
        """Make the history of a request hold its text, which has ``length`` ids."""
        ids = [*request.state.initial_tokens, *request.state.generated_tokens]
        if len(ids) != length:
            raise RuntimeError(
                f"llm_sampling: request {request.state.request_id} has a penalty and {length} ids, "
                f"of which {len(ids)} are known"
            )
        params = self._table.params(request.slot)
        assert params is not None
        prompt, output = ids[: request.prompt_length], ids[request.prompt_length :]
        self._table.set(request.slot, params, prompt_ids=prompt, output_ids=output)
        request.recorded = len(output)

    def _free_slot(self, names: set[str]) -> int:
        """A slot; if none is free, that of the request that was in no batch for the longest time.

        Such a request waits for memory or for room in a batch, and its tokens are known by then.
        """
        if not self._free:
            self._leave(next(one for name, one in self._by_id.items() if name not in names))
        return self._free.pop()

    def _leave(self, request: _Request) -> None:
        self._by_id.pop(request.state.request_id)
        self._table.clear(request.slot)
        self._free.append(request.slot)

    # Called where the model runs; a CUDA graph may be captured

    def draw(
        self, logits: Tensor, numbers: Tensor, *, logprobs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The next token of each row, and its logprob.

        Args:
            logits: ``(rows, vocab_size)`` float32, float16 or bfloat16. Never modified.
            numbers: int32 ``(3, rows)``, what :meth:`follow` gave for each row.
            logprobs: whether they are asked for.

        Returns:
            int64 ``(rows,)``, 0 for rows of padding; float32 ``(rows,)``, of the distribution that
            the token was drawn from, which for a greedy row is the logits' softmax, or None.
        """
        slots, places, recording = numbers
        kind: Kind | None = "processed" if logprobs else None
        output = sample(
            logits,
            self._table,
            slots,
            text_positions=places,
            logprobs=kind,
            check=False,
            backend=self._backend,
        )
        tokens = self._warnings.token_for_each(output.tokens, slots)
        if self._keeps_histories:
            # counts as a tensor, since a list would be copied from the host in each replay
            self._table.append(tokens, torch.ones_like(recording), slots=recording)
        if output.logprobs is None:
            return tokens, None
        of_row = slots.clamp(min=0).to(torch.int64)
        is_greedy = self._table.batch.temperature[of_row] == 0
        chosen = logits.gather(1, tokens[:, None])[:, 0].float()
        raw = chosen - logits.float().logsumexp(1)
        return tokens, torch.where(is_greedy, raw, output.logprobs)


# ---- the sampler ----


def _prepared(numbers: Sequence[tuple[int, int, int]], storage: Tensor) -> Tensor:
    """int32 of the shape of ``storage``: the numbers of each row, and -1 for rows of padding."""
    prepared = torch.full(storage.shape, -1, dtype=torch.int32)
    if numbers:
        prepared[:, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32).T
    return prepared


def _processors(theirs: Any) -> Any:
    """A subclass of transformers' list of processors that tells :class:`Requests` of batches."""

    class FusedProcessors(theirs):  # type: ignore[misc]
        """A list of transformers with rows of arguments for the draw, behind those of its own.

        Args:
            made: the list that transformers has made; this one takes its place.
            requests: what is told of the batches.
        """

        def __init__(self, made: Any, requests: Requests) -> None:
            self.__dict__.update(vars(made))
            self.tensors_required += _ROWS
            self.requests = requests

        def fill_defaults(self, int32_tensor: Tensor) -> None:
            """The arguments of rows of padding."""
            super().fill_defaults(int32_tensor)
            int32_tensor[-_ROWS:] = -1

        def check_kwargs(self, kwargs: dict[str, Any]) -> None:
            """Checks what is for other processors; the manager has checked the rest."""
            super().check_kwargs({name: kwargs[name] for name in kwargs if name != _OURS})

        def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
            """Writes the arguments of all rows of the batch, those of padding included."""
            super().prepare_tensor_args(requests_in_batch, arg_storage)
            states = [one.state for one in requests_in_batch if one.has_new_token]
            ours = arg_storage[-_ROWS:]
            ours.copy_(_prepared(self.requests.follow(states), ours))
            return arg_storage

    return FusedProcessors


def _runner(theirs: Any) -> Any:
    """A subclass of transformers' model runner that draws by :class:`Requests`."""

    class FusedRunner(theirs):  # type: ignore[misc]
        """transformers' model runner, with penalties, filters and the draw in one call."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._requests: Requests = self.logit_processor.requests
            self._requests.stream = self.inputs_and_outputs.compute_stream

        def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
            """Runs the model and draws, or replays a graph that does."""
            self._numbers = batch_data["logits_processor_args"][-_ROWS:]
            super().compute_batch(model, batch_data)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
            """Draw from ``(1, rows, vocab_size)``; write tokens, and logprobs as int32 bits."""
            tokens, logprobs = self._requests.draw(
                scores[0], self._numbers, logprobs=self.return_logprobs
            )
            rows = tokens.shape[0]
            output_ids[0, :rows].copy_(tokens)
            if logprobs is not None:
                output_ids[1, :rows].copy_(logprobs.view(torch.int32))

    return FusedRunner
