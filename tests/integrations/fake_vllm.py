"""A package ``vllm`` with what the plug-in relies on and nothing else, for tests without vLLM.

Names, signatures and the order of steps are those of vLLM 0.32; the arithmetic is plain torch.
"""

from pathlib import Path

import fake_package

SOURCES = {
    "__init__": '__version__ = "0.32.0"\n',
    "envs": "VLLM_USE_V2_MODEL_RUNNER = None\n",
    "triton_utils": "HAS_TRITON = False\n",
    "config": """
from dataclasses import dataclass
from typing import Any

@dataclass
class SchedulerConfig:
    max_num_seqs: int
    async_scheduling: bool

@dataclass
class ModelConfig:
    max_model_len: int

@dataclass
class VllmConfig:
    model_config: Any
    scheduler_config: SchedulerConfig
    speculative_config: Any = None
    kv_transfer_config: Any = None
    watermark_config: Any = None

@dataclass
class SpeculativeConfig:
    num_speculative_tokens: int
""",
    "sampling_params": """
from dataclasses import dataclass

@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    extra_args: dict | None = None
""",
    "v1.__init__": "",
    "v1.outputs": """
from dataclasses import dataclass
from typing import Any

@dataclass
class SamplerOutput:
    sampled_token_ids: Any
    logprobs_tensors: Any
""",
    "v1.sample.__init__": "",
    "v1.sample.thinking_budget_state": """
class ThinkingBudgetStateHolder:
    tracked = False

    def has_tracked_requests(self):
        return self.tracked

    def apply_to_logits(self, logits):
        logits[:] = -float("inf")
        logits[:, 7] = 1e9
        return logits
""",
    "v1.sample.metadata": """
from dataclasses import dataclass, field
from typing import Any

@dataclass
class SamplingMetadata:
    logitsprocs: Any
    max_num_logprobs: int | None = None
    logprob_token_ids: Any = None
    no_penalties: bool = True
    allowed_token_ids_mask: Any = None
    bad_words_token_ids: dict = field(default_factory=dict)
    thinking_budget_state_holder: Any = None
""",
    "v1.sample.logits_processor": """
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()

@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Any
    added: Any
    moved: Any

class LogitsProcessors:
    def __init__(self, logitsprocs=None):
        self.argmax_invariant = []
        self.non_argmax_invariant = []
        for one in logitsprocs or ():
            (self.argmax_invariant if one.is_argmax_invariant() else self.non_argmax_invariant
             ).append(one)

class MinPLogitsProcessor:
    min_p = 0.0

    def is_argmax_invariant(self):
        return True

    def apply(self, logits):
        raise AssertionError(f"min-p is the kernel's, got {self.min_p}")

class MinTokensLogitsProcessor:
    def __init__(self):
        self.min_toks = {}

    def is_argmax_invariant(self):
        return False

    def apply(self, logits):
        for row in self.min_toks:
            logits[row, 0] = -float("inf")
        return logits

class LogitBiasLogitsProcessor:
    def __init__(self):
        self.biases = {}

    def is_argmax_invariant(self):
        return False

    def apply(self, logits):
        for row, bias in self.biases.items():
            for token, value in bias.items():
                logits[row, token] += value
        return logits

class AdapterLogitsProcessor:
    def __init__(self):
        self.req_info = {}

    def is_argmax_invariant(self):
        return False

    def apply(self, logits):
        for row, change in self.req_info.items():
            logits[row] = change(logits[row])
        return logits

def build_logitsprocs(
    vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs=()
):
    builtin = [MinTokensLogitsProcessor(), LogitBiasLogitsProcessor(), MinPLogitsProcessor()]
    return LogitsProcessors([] if is_pooling_model else [*builtin, *custom_logitsprocs])
""",
    "v1.sample.sampler": """
import torch
from vllm.v1.outputs import SamplerOutput

class Sampler(torch.nn.Module):
    def __init__(self, logprobs_mode="raw_logprobs", use_fp64_gumbel=False):
        super().__init__()
        self.logprobs_mode = logprobs_mode

    def forward(
        self, logits, sampling_metadata, predict_bonus_token=False, logprobs_mode_override=None
    ):
        mode = logprobs_mode_override or self.logprobs_mode
        shown = None
        if sampling_metadata.max_num_logprobs is not None:
            if mode == "raw_logprobs":
                shown = self.compute_logprobs(logits)
            elif mode == "raw_logits":
                shown = logits.to(torch.float32, copy=True)
        logits = self.apply_logits_processors(
            logits.to(torch.float32), sampling_metadata, predict_bonus_token
        )
        sampled, processed = self.sample(logits, sampling_metadata)
        shown = shown if processed is None else processed
        return SamplerOutput(sampled.to(torch.int32).unsqueeze(-1), shown)

    @staticmethod
    def compute_logprobs(logits):
        return logits.log_softmax(dim=-1, dtype=torch.float32)

    def apply_logits_processors(self, logits, sampling_metadata, predict_bonus_token):
        if sampling_metadata.allowed_token_ids_mask is not None:
            logits.masked_fill_(sampling_metadata.allowed_token_ids_mask, float("-inf"))
        for row, words in sampling_metadata.bad_words_token_ids.items():
            logits[row, words] = float("-inf")
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            logits = processor.apply(logits)
        logits = self.apply_penalties(logits, sampling_metadata)
        holder = sampling_metadata.thinking_budget_state_holder
        if holder is not None and holder.has_tracked_requests():
            logits = holder.apply_to_logits(logits)
        return logits

    @staticmethod
    def apply_penalties(logits, sampling_metadata):
        if sampling_metadata.no_penalties:
            return logits
        raise AssertionError("penalties are the kernel's")

    def sample(self, logits, sampling_metadata, logprobs_mode_override=None):
        return torch.full((logits.shape[0],), 5), None  # a draw of vLLM's own
""",
    "v1.worker.__init__": "",
    "v1.worker.gpu_input_batch": """
class InputBatch:
    def __init__(self, logitsprocs):
        self.logitsprocs = logitsprocs
        self.repetition_penalties_reqs = set()

    @property
    def no_penalties(self):
        return not self.repetition_penalties_reqs

    def _make_sampling_metadata(self):
        return self.no_penalties

    def refresh_metadata(self):
        update = self.batch_update_builder.get_and_reset(self.num_reqs)
        for processor in self.logitsprocs.all:
            processor.update_state(update)

    def _register_add_request(self, request):
        self.batch_update_builder.added.append(
            (0, request.sampling_params, request.prompt_token_ids, request.output_token_ids)
        )

    def condense(self):
        self.batch_update_builder.moved.append((1, 0, MoveDirectionality.UNIDIRECTIONAL))

    def swap_states(self, i1, i2):
        self.batch_update_builder.moved.append((i1, i2, MoveDirectionality.SWAP))
""",
    "v1.worker.gpu_model_runner": """
import functools
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import InputBatch

def traced(function):
    @functools.wraps(function)
    def run(*args, **options):
        return function(*args, **options)
    return run

class GPUModelRunner:
    @traced
    def __init__(self, vllm_config, device, is_pooling_model=False, custom=()):
        self.sampler = Sampler(vllm_config.model_config.logprobs_mode)
        self.logitsprocs = build_logitsprocs(vllm_config, device, False, is_pooling_model, custom)
        self.input_batch = InputBatch(self.logitsprocs)

    def _update_states(self, scheduler_output):
        for request in self.requests:
            request.output_token_ids = scheduler_output.all_token_ids[request]
        self.input_batch.refresh_metadata()

    def _bookkeeping_sync(self, sampled):
        for request, tokens in zip(self.requests, sampled):
            request.output_token_ids.extend([-1] if self.use_async_scheduling else tokens)

    def _sample(self, logits, spec_decode_metadata):
        sampling_metadata = self.input_batch.sampling_metadata
        return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
""",
    "v1.worker.gpu.__init__": "",
    "v1.worker.gpu.states": """
import numpy as np
import torch

class Mirror:
    def __init__(self, *shape, dtype=torch.int32):
        self.gpu = torch.zeros(*shape, dtype=dtype)
        self.np = self.gpu.numpy()

class RequestState:
    def __init__(self, slots, length):
        self.index_to_req_id = {}
        self.prompt_len, self.prefill_len = Mirror(slots), Mirror(slots)
        self.total_len = Mirror(slots)
        self.all_token_ids = Mirror(slots, length)

    def add_request(self, slot, name, prompt, output):
        self.index_to_req_id[slot] = name
        self.prompt_len.np[slot] = len(prompt)
        self.prefill_len.np[slot] = self.total_len.np[slot] = len(prompt) + len(output)
        self.all_token_ids.np[slot, : self.total_len.np[slot]] = prompt + output

    def remove_request(self, slot):
        del self.index_to_req_id[slot]
""",
    "v1.worker.gpu.input_batch": """
def post_update(
    idx_mapping, num_computed_tokens, last_sampled_tokens, output_bin_counts, sampled_tokens,
    num_sampled, num_rejected, query_start_loc, all_token_ids, total_len,
):
    for slot, tokens, count in zip(idx_mapping.tolist(), sampled_tokens.tolist(), num_sampled):
        for token in tokens[: int(count)] if slot >= 0 else ():
            all_token_ids[slot, total_len[slot]] = token
            total_len[slot] += 1
            if output_bin_counts is not None:
                output_bin_counts[slot, token] += 1
""",
    "v1.worker.gpu.sample.__init__": "",
    "v1.worker.gpu.sample.logits_processor.__init__": "",
    "v1.worker.gpu.sample.logits_processor.interface": """
from dataclasses import dataclass
from typing import Any

@dataclass(frozen=True)
class LogitsContext:
    expanded_idx_mapping: Any
    idx_mapping: Any
    idx_mapping_np: Any
    expanded_local_pos: Any
    input_ids: Any
    pos: Any
    seq_lens_upper_bound_np: Any
""",
    "v1.worker.gpu.sample.logit_bias": """
import numpy as np

class LogitBiasState:
    def __init__(self, slots):
        self.use_logit_bias = np.zeros(slots, dtype=bool)

    def apply(self, logits, ctx):
        for row in np.flatnonzero(self.use_logit_bias[ctx.idx_mapping_np]):
            logits[row, 5] += 40.0
        return logits
""",
    "v1.worker.gpu.sample.bad_words": """
from vllm.v1.worker.gpu.states import Mirror

class BadWordsState:
    def __init__(self, slots):
        self.num_bad_words = Mirror(slots)

    def apply(self, logits, ctx):
        for row in self.num_bad_words.np[ctx.idx_mapping_np].nonzero()[0]:
            logits[row, :50] = -float("inf")
        return logits
""",
    "v1.worker.gpu.sample.thinking_budget": """
import numpy as np

class ThinkingBudgetState:
    def __init__(self, slots):
        self.enabled = True
        self.use_thinking_budget = np.zeros(slots, dtype=bool)

    def apply(self, logits, ctx):
        if self.enabled:
            for row in np.flatnonzero(self.use_thinking_budget[ctx.idx_mapping_np]):
                logits[row] = -float("inf")
                logits[row, 7] = 1e9
""",
    "v1.worker.gpu.sample.penalties": """
import torch

class PenaltiesState:
    def __init__(self, states, vocab_size):
        self.states, slots = states, len(states.prompt_len.np)
        self.prompt_bin_mask = torch.zeros(slots, -(-vocab_size // 32), dtype=torch.int32)
        self.output_bin_counts = torch.zeros(slots, vocab_size, dtype=torch.int32)

    def apply_staged_writes(self):
        return self.states.prefill_len, self.states.prompt_len, self.states.all_token_ids.gpu

    def apply(self, logits, ctx):
        raise AssertionError("penalties are the kernel's")
""",
    "v1.worker.gpu.sample.states": """
import torch
from vllm.v1.worker.gpu.states import Mirror

class SamplingStates:
    def __init__(self, slots):
        self.seeds = Mirror(slots, dtype=torch.int64)

    def add_request(self, slot, sampling_params):
        seed = 1000 + slot if sampling_params.seed is None else sampling_params.seed
        self.seeds.np[slot] = (seed + 2**63) % 2**64 - 2**63
        return sampling_params.temperature != 1.0
""",
    "v1.worker.gpu.sample.sampler": """
import numpy as np
import torch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState

class Sampler:
    def __init__(
        self, vllm_config, max_num_reqs, vocab_size, device, req_states,
        logprobs_mode="raw_logprobs", return_sampling_mask=False, custom_logits_processors=(),
    ):
        self.logprobs_mode = logprobs_mode
        self.return_sampling_mask = return_sampling_mask
        self.req_states = req_states
        self.sampling_states = SamplingStates(max_num_reqs)
        self.penalties_state = PenaltiesState(req_states, vocab_size)
        self.logits_processors = [
            LogitBiasState(max_num_reqs),
            self.penalties_state,
            BadWordsState(max_num_reqs),
            *custom_logits_processors,
        ]
        self.thinking_budget_state = ThinkingBudgetState(max_num_reqs)
        self.needs_logits_processing = np.zeros(max_num_reqs, dtype=bool)

    def add_request(self, req_idx, sampling_params):
        needs = self.sampling_states.add_request(req_idx, sampling_params)
        self.needs_logits_processing[req_idx] = needs

    def apply_staged_writes(self):
        self.penalties_state.apply_staged_writes()

    def __call__(self, logits, batch, return_logprobs=False):
        slots = batch.slots
        return self.sample(
            logits, slots, slots, slots.numpy(), batch.pos, batch.input_ids, batch.local_pos,
            None, return_logprobs,
        )

    def sample(
        self, logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids,
        expanded_local_pos, seq_lens_upper_bound_np, return_logprobs=False,
    ):
        return torch.full((logits.shape[0],), 5), logits  # a draw of vLLM's own

    def apply_sampling_params(
        self, logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids,
        expanded_local_pos, seq_lens_upper_bound_np, skip_top_k_top_p=False,
    ):
        return logits if not self.needs_logits_processing[idx_mapping_np].any() else -logits
""",
    "v1.worker.gpu.spec_decode.__init__": "",
    "v1.worker.gpu.spec_decode.rejection_sampler": """
class RejectionSampler:
    def __init__(self, sampler):
        self.sampler = sampler

    def _verify(self, *rows):
        return self.sampler.apply_sampling_params(*rows)
""",
    "v1.worker.gpu.model_runner": """
from vllm.v1.worker.gpu.input_batch import post_update
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

def create_watermarker(config):
    return config

class GPUModelRunner:
    def __init__(self, slots, length):
        self.req_states = RequestState(slots, length)

    def load_model(self, vllm_config, custom=(), **options):
        if vllm_config.watermark_config is not None:
            create_watermarker(vllm_config.watermark_config)
            return
        self.sampler = Sampler(
            vllm_config=vllm_config,
            max_num_reqs=len(self.req_states.prompt_len.np),
            vocab_size=vllm_config.model_config.get_vocab_size(),
            device="cpu",
            req_states=self.req_states,
            custom_logits_processors=custom,
            **options,
        )

    def add_requests(self, requests):
        for slot, name, sampling_params, prompt, output in requests:
            self.req_states.add_request(slot, name, prompt, output)
            self.sampler.add_request(slot, sampling_params)
        self.sampler.apply_staged_writes()

    def sample(self, logits, batch):
        return self.sampler(logits, batch)

    def postprocess_sampled(self, idx_mapping, sampled_tokens, num_sampled):
        output_bin_counts = self.sampler.penalties_state.output_bin_counts
        post_update(
            idx_mapping, None, None, output_bin_counts, sampled_tokens, num_sampled, None, None,
            self.req_states.all_token_ids.gpu, self.req_states.total_len.gpu,
        )
""",
}


def write(folder: Path, *changes: tuple[str, str, str]) -> None:
    """Write the package into ``folder``; a change is (module, text, replacement)."""
    fake_package.write(folder, "vllm", SOURCES, changes)
