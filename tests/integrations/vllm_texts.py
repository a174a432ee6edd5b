"""Requests of vLLM for tests without vLLM: their parameters, logits, and what each draws alone."""

import fake_vllm
import torch

from llm_sampling import TokenHistory, sample

V = 101
#: Prompt and output have at most so many ids.
MAX_LENGTH = 200


def their_params():
    """The stand-in package's SamplingParams: the fields that are read, with vLLM's defaults."""
    namespace = {"__name__": __name__}
    exec(fake_vllm.SOURCES["sampling_params"], namespace)
    return namespace["SamplingParams"]


Theirs = their_params()


def random_params(rng):
    """Parameters of every kind: greedy or not, with and without penalties and filters."""
    return Theirs(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
        top_k=rng.choice([-1, 0, 5, 40]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
        presence_penalty=rng.choice([0.0, 0.0, -0.3]),
        seed=rng.choice([0, 7, 2**63 + 5, -3, rng.getrandbits(40)]),
    )


def random_extra(rng):
    """What a request asks for in extra_args; often nothing."""
    extra = {}
    if rng.random() < 0.3:
        extra |= {"dry_multiplier": rng.choice([1, 3.0]), "dry_allowed_length": 1}
        extra |= {"dry_breakers": rng.choice([None, [[5], [7, 8]], [5, 9]])}
    if rng.random() < 0.2:
        extra |= {"no_repeat_ngram_size": 1, "no_repeat_ngram_window": rng.choice([0, 5])}
    if rng.random() < 0.2:
        extra |= {"penalty_last_n": rng.choice([0, 4]), "repetition_penalty_scope": "output"}
    return {**extra, "of_another": 3} if extra else None


def logits_of(request, dtype=torch.float32):
    generator = torch.Generator().manual_seed(request.name * 10_000 + len(request.tokens))
    return (torch.randn(V, generator=generator) * 2).to(dtype)


def alone(request, params, dtype=torch.float32):
    """The request's next token by ``sample``, without other requests."""
    ids = [request.prompt or []], [request.tokens]
    window = params.penalty_last_n
    history = TokenHistory.from_ids(*ids, V, max_length=MAX_LENGTH, penalty_last_n=window)
    logits = logits_of(request, dtype).unsqueeze(0)
    positions = [len(request.tokens)]
    return int(sample(logits, params, history=history, positions=positions).tokens)
