"""A package ``sglang`` with what the plug-in relies on and nothing else, for tests without SGLang.

Names, signatures and the order of steps are those of SGLang 0.5.23; the arithmetic is plain torch.
"""

from pathlib import Path

import fake_package

SOURCES = {
    "__init__": '__version__ = "0.5.23"\n',
    "srt.__init__": "",
    "srt.runtime_context": """
class RuntimeContext:
    def __init__(self):
        self.leaves = {
            "device": "cpu",
            "sampling_backend": "pytorch",
            "speculative_algorithm": None,
            "enable_deterministic_inference": False,
            "enable_watermark": False,
            "dllm_algorithm": None,
        }

    def config_leaf(self, name):
        return self.leaves[name]

    def override(self, source, **fields):
        self.leaves.update(fields)

_CONTEXT = RuntimeContext()

def get_context():
    return _CONTEXT
""",
    "srt.plugins.__init__": "",
    "srt.plugins.hook_registry": """
import functools
import sys
from enum import Enum
from typing import NamedTuple

class HookType(Enum):
    AROUND = "around"
    REPLACE = "replace"

class HookSource(NamedTuple):
    plugin_name: str
    dist_name: str

class HookRegistry:
    hooks = {}

    @classmethod
    def register(cls, target, hook, hook_type=HookType.AROUND, *, source=None):
        cls.hooks[target] = hook, hook_type

    @classmethod
    def apply_hooks(cls):
        for target, (hook, kind) in cls.hooks.items():
            module, _, name = target.rpartition(".")
            original = getattr(sys.modules[module], name)
            if original is hook or getattr(original, "__wrapped__", None) is not None:
                continue
            if kind is HookType.AROUND:
                ours = functools.wraps(original)(functools.partial(hook, original))
            else:
                ours = hook
            for other in list(sys.modules.values()):
                for attribute, value in list(vars(other).items()):
                    if value is original:
                        setattr(other, attribute, ours)
""",
    "srt.sampling.__init__": "",
    "srt.sampling.sampling_params": """
from dataclasses import dataclass

@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 1 << 30
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    sampling_seed: int | None = None

    def __post_init__(self):
        if self.temperature < 1e-6:
            self.temperature, self.top_k = 1.0, 1
        if self.top_k == -1:
            self.top_k = 1 << 30
""",
    "srt.sampling.penaltylib.__init__": """
from sglang.srt.sampling.penaltylib.orchestrator import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
)
""",
    "srt.sampling.penaltylib.orchestrator": """
class BatchedFrequencyPenalizer:
    pass

class BatchedMinNewTokensPenalizer:
    pass

class BatchedPenalizerOrchestrator:
    def __init__(self, vocab_size, batch, penalizers):
        self.penalizers = {penalizer: penalizer() for penalizer in penalizers}
""",
    "srt.sampling.sampling_batch_info": """
import dataclasses
from typing import Any

import torch

import sglang.srt.sampling.penaltylib as penaltylib

@dataclasses.dataclass
class SamplingBatchInfo:
    temperatures: torch.Tensor
    is_all_greedy: bool
    penalizer_orchestrator: Any = None
    grammar_mask: Any = None
    logit_bias: Any = None
    has_custom_logit_processor: bool = False
    sampling_mask_batch_indices: Any = None
    sampling_support_logprobs_capture_indices: Any = None

    @classmethod
    def from_schedule_batch(cls, batch, vocab_size):
        params = [request.sampling_params for request in batch.reqs]
        orchestrator = penaltylib.BatchedPenalizerOrchestrator(
            vocab_size,
            batch,
            {penaltylib.BatchedFrequencyPenalizer, penaltylib.BatchedMinNewTokensPenalizer},
        )
        info = cls(
            torch.tensor([[one.temperature] for one in params]),
            all(one.top_k <= 1 for one in params),
            orchestrator,
        )
        info.adjusted_from_schedule_batch(batch, vocab_size)
        return info

    def adjusted_from_schedule_batch(self, batch, vocab_size):
        pass

    def adjusted_merge_batch(self, other):
        pass

    def adjusted_filter_batch(self, keep_indices, keep_indices_device):
        pass

    def _apply_pre_grammar_logits_transforms(self, logits):
        pass

    def _apply_post_grammar_logits_transforms(self, logits):
        if self.logit_bias is not None:
            logits.add_(self.logit_bias)

    def apply_logits_bias(self, logits):
        self._apply_pre_grammar_logits_transforms(logits)
        if self.grammar_mask is not None:
            logits.masked_fill_(self.grammar_mask, float("-inf"))
        self._apply_post_grammar_logits_transforms(logits)

    def filter_batch(self, keep_indices, keep_indices_device):
        self.temperatures = self.temperatures[keep_indices_device]
        self.adjusted_filter_batch(keep_indices, keep_indices_device)

    def merge_batch(self, other):
        self.temperatures = torch.cat([self.temperatures, other.temperatures])
        self.is_all_greedy &= other.is_all_greedy
        self.adjusted_merge_batch(other)

    def copy_for_forward(self):
        return dataclasses.replace(self, penalizer_orchestrator=None)
""",
    "srt.layers.__init__": "",
    "srt.layers.logprob_processor": """
class LogprobResult:
    def __init__(self, logprobs, tokens):
        self.logprobs, self.tokens = logprobs, tokens

    def write_output_to(self, logits_output):
        logits_output.logprobs, logits_output.tokens = self.logprobs, self.tokens

class OutputLogprobProcessor:
    def compute_logprobs(
        self, logprobs, top_logprobs_nums, token_ids_logprobs, batch_next_token_ids
    ):
        return LogprobResult(logprobs, batch_next_token_ids)
""",
    "srt.layers.sampler": """
from typing import Any, NamedTuple

import torch

from sglang.srt.layers.logprob_processor import OutputLogprobProcessor
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

SGLANG_RETURN_ORIGINAL_LOGPROB = False
_CUSTOM_SAMPLER_FACTORIES = {}

class _SamplingMaskCapture(NamedTuple):
    weights: Any
    token_ids: Any
    selected_weight: Any
    batch_rows: Any

class Sampler(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.output_logprob_processor = OutputLogprobProcessor()
        self.synced = []

    def _preprocess_logits(self, logits, sampling_info):
        if sampling_info.has_custom_logit_processor:
            logits.mul_(0.5)
        return logits

    def forward(
        self,
        logits_output,
        sampling_info,
        return_logprob,
        top_logprobs_nums,
        token_ids_logprobs,
        positions,
        *,
        logprob_logits=None,
    ):
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        assert sampling_info.is_all_greedy or sampling_info.temperatures is not None
        return torch.full((logits.shape[0],), 5)  # a draw of SGLang's own

    def _sync_token_ids_across_tp(self, batch_next_token_ids, sampling_info):
        self.synced.append(batch_next_token_ids)

    def _build_sampling_mask_output(
        self, batch_next_token_ids, sampling_mask_capture, support_capture_indices
    ):
        return sampling_mask_capture

def register_sampler_backend(backend, factory):
    _CUSTOM_SAMPLER_FACTORIES[backend] = factory

def create_sampler(backend=None):
    backend = backend or get_context().config_leaf("sampling_backend")
    return _CUSTOM_SAMPLER_FACTORIES.get(backend, Sampler)()
""",
    "srt.mem_cache.__init__": "",
    "srt.mem_cache.memory_pool": """
import torch

class ReqToTokenPool:
    def __init__(self, size):
        self.req_to_token = torch.zeros(size + 1, 4)  # row 0 is padding
""",
    "srt.managers.__init__": "",
    "srt.managers.schedule_batch": """
from dataclasses import dataclass

import torch

from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

@dataclass
class ReqKvInfo:
    req_pool_idx: int | None = None

class Req:
    def __init__(self, rid, origin_input_ids, sampling_params):
        self.rid = rid
        self.origin_input_ids = origin_input_ids
        self.output_ids = []
        self.sampling_params = sampling_params
        self.kv = ReqKvInfo()

class ScheduleBatch:
    def __init__(self, reqs, req_to_token_pool, vocab_size):
        self.reqs = reqs
        self.req_to_token_pool = req_to_token_pool
        self.vocab_size = vocab_size

    def prepare_for_extend(self):
        self.sampling_info = SamplingBatchInfo.from_schedule_batch(self, self.vocab_size)

    def filter_batch(self, keep_indices):
        self.reqs = [self.reqs[i] for i in keep_indices]
        self.sampling_info.filter_batch(keep_indices, torch.tensor(keep_indices, dtype=torch.int64))

    def merge_batch(self, other):
        self.sampling_info.merge_batch(other.sampling_info)
        self.reqs = self.reqs + other.reqs
""",
    "srt.managers.scheduler": """
from contextlib import contextmanager

class Scheduler:
    @contextmanager
    def _forward_isolation(self, batch):
        kept = batch.sampling_info
        batch.sampling_info = kept.copy_for_forward()
        try:
            yield
        finally:
            batch.sampling_info = kept
""",
    "srt.model_executor.__init__": "",
    "srt.model_executor.model_runner": """
from sglang.srt.layers.sampler import create_sampler

class ModelRunner:
    def initialize(self):
        self.sampler = create_sampler()

    def _preprocess_logits(self, logits_output, sampling_info):
        sampling_info.apply_logits_bias(logits_output.next_token_logits)

    def sample(self, logits_output, forward_batch):
        self._preprocess_logits(logits_output, forward_batch.sampling_info)
        return self.sampler(
            logits_output,
            forward_batch.sampling_info,
            forward_batch.return_logprob,
            None,
            None,
            forward_batch.positions if forward_batch.is_decode else forward_batch.seq_lens - 1,
        )
""",
}


def write(folder: Path, *changes: tuple[str, str, str]) -> None:
    """Write the package into ``folder``; a change is (module, text, replacement)."""
    fake_package.write(folder, "sglang", SOURCES, changes)
