"""The cases that are timed: their parameters, and the runs that combine them with inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llm_sampling import SamplingParams

#: Every penalty and every filter.
EVERYTHING = SamplingParams(
    repetition_penalty=1.1,
    frequency_penalty=0.5,
    presence_penalty=0.25,
    temperature=0.8,
    top_k=50,
    top_p=0.9,
    min_p=0.05,
)
#: A common choice where a penalty is set.
FULL_CHAIN = SamplingParams(repetition_penalty=1.1, temperature=0.8, top_k=50, top_p=0.9)


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        name: what ``--cases`` calls it.
        params: the rows take these in turn; each row has a seed of its own.
        history_length: tokens in prompt and output together; 0 where no penalty needs them.
        num_samples: draws per row.
        logprobs: whether the drawn token's log-probability under the unprocessed logits ("raw") is
            returned too.
    """

    name: str
    params: tuple[SamplingParams, ...]
    history_length: int = 0
    num_samples: int = 1
    logprobs: bool = False

    def row_params(self, rows: int) -> list[SamplingParams]:
        """One SamplingParams per row."""
        return [replace(self.params[row % len(self.params)], seed=row) for row in range(rows)]


def _case(name: str, *params: SamplingParams, **more: int) -> Case:
    return Case(name, params, **more)  # type: ignore[arg-type]


#: The goals compare the ends of these sweeps.
SWEEP_K = (1, 5, 20, 50, 100, 250, 500, 1024, 2048)
SWEEP_P = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999)
SWEEP_HISTORY = (0, 256, 1024, 4096, 8192, 16384, 32768)
SWEEP_VOCAB = (4096, 16384, 32000, 65536, 128256, 262144)
SWEEP_ROWS = (1, 2, 4, 8, 16, 32, 64)


def _table() -> dict[str, Case]:
    nucleus = SamplingParams(top_k=50, top_p=0.9)
    cases = [
        _case("greedy", SamplingParams(temperature=0)),
        _case("temperature-0.8", SamplingParams(temperature=0.8)),
        _case("min-p-0.05", SamplingParams(min_p=0.05)),
        _case("top-k-50-top-p-0.9", nucleus),
        _case("full-chain", FULL_CHAIN, history_length=4096),
        _case("everything-1k", EVERYTHING, history_length=1024),
        _case("everything-8k", EVERYTHING, history_length=8192),
        _case("everything-32k", EVERYTHING, history_length=32768),
        _case(
            "mixed-rows",  # half neutral, a quarter greedy, a quarter filtered
            SamplingParams(),
            SamplingParams(temperature=0),
            SamplingParams(),
            SamplingParams(temperature=0.7, top_k=40, top_p=0.95, min_p=0.02),
        ),
        _case("logprobs", nucleus, logprobs=True),
        _case("draws-8", nucleus, num_samples=8),
    ]
    cases += [_case(f"top-k-{k}", SamplingParams(top_k=k)) for k in SWEEP_K]
    cases += [_case(f"top-p-{p:g}", SamplingParams(top_p=p)) for p in SWEEP_P]
    cases += [_case(f"history-{n}", FULL_CHAIN, history_length=n) for n in SWEEP_HISTORY]
    return {case.name: case for case in cases}


CASES: Mapping[str, Case] = _table()

#: The cases of a complete comparison.
COMPARED = (
    "greedy",
    "temperature-0.8",
    "top-k-20",
    "top-k-50",
    "top-k-1024",
    "top-p-0.5",
    "top-p-0.9",
    "top-p-0.99",
    "min-p-0.05",
    "top-k-50-top-p-0.9",
    "full-chain",
    "everything-1k",
    "everything-8k",
    "everything-32k",
    "mixed-rows",
    "logprobs",
    "draws-8",
)


@dataclass(frozen=True)
class Run:
    """Cases and inputs: every case is timed on every input, vocabulary size and number of rows.

    Attributes:
        inputs: names of inputs; a real model's have a vocabulary of their own.
        vocab_sizes: of the synthetic ones.
        swept: the horizontal axis of this run's picture; "" where it has only a table.
        variants: whether further variants of the peers are timed too.
        by_default: whether a complete run includes it.
    """

    inputs: tuple[str, ...]
    vocab_sizes: tuple[int, ...]
    rows: tuple[int, ...]
    cases: tuple[str, ...]
    swept: str = ""
    variants: bool = False
    by_default: bool = True


SYNTHETIC = ("flat", "normal2", "normal5", "model", "ties", "masked", "ascending", "one-hot")
REAL = ("smollm2", "gemma3")

RUNS: Mapping[str, Run] = {
    "real": Run(REAL, (), (1, 8), COMPARED, variants=True),
    "synthetic": Run(("model",), (128256,), (8,), COMPARED, variants=True),
    "batch": Run(("model", *REAL), (128256,), (64,), ("top-k-50", "top-p-0.9", "full-chain")),
    "distributions": Run(SYNTHETIC, (128256,), (8,), ("top-k-50", "top-p-0.9", "full-chain")),
    "vocab": Run(("model",), SWEEP_VOCAB, (8,), ("full-chain", "top-p-0.9"), "vocab_size"),
    "rows": Run(("model",), (128256,), SWEEP_ROWS, ("full-chain", "top-p-0.9"), "rows"),
    "k": Run(("model",), (128256,), (8,), tuple(f"top-k-{k}" for k in SWEEP_K), "k"),
    "p": Run(("flat", "model"), (128256,), (8,), tuple(f"top-p-{p:g}" for p in SWEEP_P), "p"),
    "history": Run(
        ("model",), (128256,), (8,), tuple(f"history-{n}" for n in SWEEP_HISTORY), "history_length"
    ),
    "goals": Run(
        ("model", "flat", *REAL),
        (128256,),
        (1, 8),
        (
            "temperature-0.8",
            "top-k-20",
            "top-k-50",
            "top-k-1024",
            "top-p-0.5",
            "top-p-0.9",
            "top-p-0.99",
            "full-chain",
            "history-0",
            "history-1024",
            "history-32768",
        ),
    ),
    "quick": Run(("model", "ties"), (1000,), (1, 3), COMPARED, variants=True, by_default=False),
    # every case on every input: takes hours
    "full": Run(
        (*SYNTHETIC, *REAL),
        (32000, 128256, 151936),
        (1, 8, 64),
        COMPARED,
        variants=True,
        by_default=False,
    ),
}
