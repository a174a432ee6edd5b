"""Exact, fused sampling of language-model logits.

    SamplingParams -> BatchParams -+
                                   +-> sample() -> BACKENDS[name] -> one launch -> SampleOutput
    logits, TokenHistory ----------+

Importing this package imports torch and numpy; a backend is loaded when it is first asked for.
"""

from llm_sampling import backends
from llm_sampling.backends import backend_info
from llm_sampling.backends.base import InvalidLogitsError
from llm_sampling.distributed import sample_sharded
from llm_sampling.history import TokenHistory
from llm_sampling.masks import pack_mask, unpack_mask
from llm_sampling.params import BatchParams, SamplingParams
from llm_sampling.results import KeptSet, SampleOutput, ScoreOutput, TokenLogprobs
from llm_sampling.sample import filter_logits, sample, score
from llm_sampling.sampler import Sampler
from llm_sampling.step_masks import MaskRow, MaskStep
from llm_sampling.table import RequestTable
from llm_sampling.version import VERSION

__version__ = VERSION

__all__ = [
    "BatchParams",
    "InvalidLogitsError",
    "KeptSet",
    "MaskRow",
    "MaskStep",
    "RequestTable",
    "SampleOutput",
    "Sampler",
    "SamplingParams",
    "ScoreOutput",
    "TokenHistory",
    "TokenLogprobs",
    "backend_info",
    "backends",
    "filter_logits",
    "pack_mask",
    "sample",
    "sample_sharded",
    "score",
    "unpack_mask",
]
