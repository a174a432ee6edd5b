"""Two logits processors as a user of vLLM writes them, for test_vllm_engine.py."""

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor


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
