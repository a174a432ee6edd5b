"""Logits processors as a user of vLLM writes them, two for each runner: test_vllm_engine.py."""

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import interface as v2


class Halves(LogitsProcessor):
    """Masks logits more than 2 below the best one; vLLM applies it after the temperature."""

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self):
        return True

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        limit = logits.amax(-1, keepdim=True) - 2.0
        return logits.masked_fill_(logits < limit, -torch.inf)


class NoDigits(Halves):
    """Masks digits, which the greedy texts have; vLLM applies it before the penalties."""

    def is_argmax_invariant(self):
        return False

    def apply(self, logits):
        logits[:, 15:25] = -torch.inf
        return logits


class HalvesV2(v2.LogitsProcessor):
    """As :class:`Halves`; the V2 runner applies it after the penalties, before the temperature."""

    def apply(self, logits, ctx):
        limit = logits.amax(-1, keepdim=True) - 2.0
        return logits.masked_fill_(logits < limit, -torch.inf)


class NoDigitsV2(v2.LogitsProcessor):
    """As :class:`NoDigits`."""

    def apply(self, logits, ctx):
        logits[:, 15:25] = -torch.inf
        return logits
