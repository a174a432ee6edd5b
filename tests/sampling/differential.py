"""Compare every backend with the reference on random rows.

``python tests/sampling/differential.py --rows 1000000`` makes random batches of all sizes and
memory layouts, with parameters, histories, biases and masks, until it has compared that many rows.
Tokens, status and filtered logits must be equal to the bit, and logprobs to 1e-5. A row that
differs is reduced to a small one and printed as a program that shows the difference; the exit code
is then 1. ``--seed`` chooses other batches. ``--backends`` chooses the backends; the default is
every backend that runs on this machine's CPU. ``--emulated`` adds an emulation of the CUDA kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_sampling import SamplingParams, TokenHistory, backends, filter_logits, sample
from llm_sampling.fields import OFF_VALUES
from llm_sampling.results import Kind

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
#: The largest size of a batch. The reference, which sorts rows, takes about 50 ms for such a batch.
MOST_ELEMENTS, MOST_ROWS = 2**19, 512
LARGEST_VOCAB = 2**18
SPECIAL = (0.0, -0.0, 1.0, INF, -INF, NAN, 1e-40, -1e-40, 3e38, -3e38, 65504.0)
POSITIONS = (0, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
LOGPROB_TOLERANCE = 1e-5
#: No row has more ids in prompt and output together.
MOST_IDS = 90


@dataclass(frozen=True)
class Rows:
    """The arguments of one call: rows that share a vocabulary, a dtype, a layout and options."""

    logits: Tensor
    params: tuple[SamplingParams, ...]
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    allowed: Tensor | None  # bool, (rows, vocab_size)
    positions: tuple[int, ...]
    num_samples: int
    logprobs: Kind | None
    around: tuple[int, int]  # how many NaN lie before and after each row in memory

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[1]

    def row(self, row: int) -> Rows:
        """Return a call with this row alone."""
        at = slice(row, row + 1)
        return replace(
            self,
            logits=self.logits[at],
            params=self.params[at],
            prompts=self.prompts[at],
            outputs=self.outputs[at],
            allowed=None if self.allowed is None else self.allowed[at],
            positions=self.positions[at],
        )


class Answer(NamedTuple):
    """The results of one backend for one call."""

    tokens: Tensor
    status: Tensor
    filtered: Tensor
    logprobs: Tensor | None


def mask_words(allowed: Tensor) -> Tensor:
    """Pack a bool mask ``(rows, V)`` into int32 words ``(rows, ceil(V / 32))``."""
    rows, vocab_size = allowed.shape
    bits = torch.zeros(rows, -(-vocab_size // 32) * 32, dtype=torch.int64)
    bits[:, :vocab_size] = allowed
    return (bits.view(rows, -1, 32) << torch.arange(32)).sum(-1).to(torch.int32)


def history_of(rows: Rows) -> TokenHistory:
    """Return the history of the rows with their windows, which few rows have."""
    ids = rows.prompts, rows.outputs, rows.vocab_size
    windows = [row.penalty_last_n for row in rows.params]
    if max(windows) < 0:
        return TokenHistory.from_ids(*ids)
    return TokenHistory.from_ids(*ids, max_length=MOST_IDS, penalty_last_n=windows)


def answers(rows: Rows, names: Sequence[str]) -> Iterator[Answer]:
    """Yield the answer of each named backend in turn."""
    before = rows.around[0]
    logits = torch.nn.functional.pad(rows.logits, rows.around, value=NAN)
    logits = logits[:, before : before + rows.vocab_size]
    given: dict[str, Any] = {
        "history": history_of(rows),
        "allowed_mask": None if rows.allowed is None else mask_words(rows.allowed),
    }
    asked: dict[str, Any] = {
        "positions": rows.positions,
        "num_samples": rows.num_samples,
        "logprobs": rows.logprobs,
        "check": False,
    }
    for name in names:
        drawn = sample(logits, rows.params, **given, **asked, backend=name)
        filtered = filter_logits(logits, rows.params, **given, backend=name)
        count = len(rows.params)
        yield Answer(
            drawn.tokens.reshape(count, -1),
            drawn.status,
            filtered,
            None if drawn.logprobs is None else drawn.logprobs.reshape(count, -1),
        )


def differing(wanted: Answer, got: Answer) -> list[int]:
    """Return the rows in which two answers differ."""
    differs = wanted.status != got.status
    differs = differs | (wanted.tokens != got.tokens).any(-1)
    bits = (wanted.filtered.view(torch.int32), got.filtered.view(torch.int32))
    differs = differs | (bits[0] != bits[1]).any(-1)
    if wanted.logprobs is not None:
        assert got.logprobs is not None
        close = torch.isclose(
            got.logprobs, wanted.logprobs, rtol=0, atol=LOGPROB_TOLERANCE, equal_nan=True
        )
        differs = differs | ~close.all(-1)
    return differs.nonzero().flatten().tolist()


# ---- Random batches ------------------------------------------------------------------------------


def random_logits(rng: random.Random, rows: int, vocab_size: int) -> Tensor:
    """Make rows of one random kind, then overwrite random places with special values."""
    generator = torch.Generator().manual_seed(rng.randrange(2**62))
    x = torch.randn(rows, vocab_size, generator=generator)
    scale = 10.0 ** torch.empty(rows, 1).uniform_(-2, 1.2, generator=generator)
    kind = rng.randrange(6)
    if kind == 0:  # a few dominant tokens over a tail
        x = x + 10 * (torch.rand(x.shape, generator=generator) < 20 / vocab_size)
    elif kind == 1:  # ties
        x = (x * 4).round() / 4
    elif kind == 2:  # nearly sorted by token id
        x = torch.linspace(rng.uniform(-9, 9), rng.uniform(-9, 9), vocab_size) + 0.1 * x
    elif kind == 3:  # mostly -inf, as under a grammar
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.95, -INF, x)
    elif kind == 4:  # five distinct values
        palette = torch.randn(5, generator=generator)
        x = palette[torch.randint(5, x.shape, generator=generator)]
    x = x * scale
    for _ in range(rng.randrange(rows + 1)):
        x[rng.randrange(rows), rng.randrange(vocab_size)] = rng.choice(SPECIAL)
    return x.to(rng.choice(DTYPES))


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Draw each field as off, as a boundary value, or as any value of its range."""

    def maybe(*values: float) -> Any:
        return rng.choice((None, None, *values))

    bias = None
    if rng.random() < 0.1:
        bias = {rng.randrange(vocab_size + 3): rng.uniform(-9, 9) for _ in range(rng.randrange(6))}
        bias = {token: value if value < 6 else -math.inf for token, value in bias.items()}
    return SamplingParams(
        temperature=maybe(0.0, 0.7, rng.uniform(0.05, 3), 10 ** rng.uniform(-44, 38)),
        top_k=maybe(1, 50, rng.randrange(1, 1200), rng.randrange(1, vocab_size + 2)),
        top_p=maybe(0.9, 0.5 + 2.0**-20, rng.uniform(1e-6, 1), 1 - rng.uniform(0, 1e-4)),
        min_p=maybe(0.1, rng.uniform(0, 1), rng.uniform(0, 1e-3)),
        repetition_penalty=maybe(1.1, rng.uniform(0.3, 3)),
        frequency_penalty=maybe(0.5, rng.uniform(-2, 2)),
        presence_penalty=maybe(0.5, rng.uniform(-2, 2)),
        min_tokens_to_keep=rng.choice((1, 1, 1, 2, rng.randrange(1, vocab_size + 2))),
        logit_bias=bias,
        seed=rng.randrange(2**64),
        repetition_penalty_scope=rng.choice(("all", "output")),
        penalty_last_n=rng.choice((*[-1] * 6, 0, 1, rng.randrange(MOST_IDS), 2**31)),
    )


def random_rows(seed: int, batch: int) -> Rows:
    """Make batch number ``batch`` of a run, with a vocabulary size that is log-uniform."""
    rng = random.Random(f"{seed} {batch}")
    vocab_size = math.floor(math.exp(rng.uniform(0, math.log(LARGEST_VOCAB + 1))))
    rows = max(1, min(MOST_ROWS, MOST_ELEMENTS // vocab_size))
    params = tuple(random_params(rng, vocab_size) for _ in range(rows))

    def ids(most: int) -> tuple[int, ...]:
        size = rng.choice((0, 1, 5, most))
        return tuple(rng.choices(range(-1, vocab_size + 1), k=size))

    allowed = None
    if rng.random() < 0.2:
        generator = torch.Generator().manual_seed(rng.randrange(2**62))
        share = rng.choice((0.01, 0.5, 0.99))
        allowed = torch.rand(rows, vocab_size, generator=generator) < share
    return Rows(
        logits=random_logits(rng, rows, vocab_size),
        params=params,
        prompts=tuple(ids(MOST_IDS - 30) for _ in params),
        outputs=tuple(ids(30) for _ in params),
        allowed=allowed,
        positions=tuple(rng.choice((*POSITIONS, rng.randrange(2**64))) for _ in params),
        num_samples=rng.choice((1, 1, 1, 3)),
        logprobs=rng.choice((None, "processed", "raw")),
        around=rng.choice(((0, 0), (0, 0), (rng.randrange(9), rng.randrange(9)))),
    )


# ---- Reduction of a row that differs -------------------------------------------------------------

#: A function that says whether a row still shows the difference.
Differs = Callable[[Rows], bool]


def without(row: Rows, begin: int, end: int) -> Rows:
    """Remove the tokens ``begin .. end - 1`` from the vocabulary; larger ids move down."""

    def moved(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i if i < begin else i - end + begin for i in ids if not begin <= i < end)

    def cut(x: Tensor) -> Tensor:
        return torch.cat([x[:, :begin], x[:, end:]], dim=1)

    params = row.params[0]
    if params.logit_bias:
        bias = {moved([i])[0]: b for i, b in params.logit_bias.items() if moved([i])}
        params = replace(params, logit_bias=bias or None)
    return replace(
        row,
        logits=cut(row.logits),
        params=(params,),
        prompts=(moved(row.prompts[0]),),
        outputs=(moved(row.outputs[0]),),
        allowed=None if row.allowed is None else cut(row.allowed),
    )


def fewer_tokens(row: Rows, differs: Differs) -> Rows:
    """Remove blocks of half the vocabulary, then a quarter and so on, while the row differs."""
    size = row.vocab_size // 2
    while size and row.vocab_size // size <= 512:  # more blocks would take too long to try
        begin = 0
        while begin < row.vocab_size and row.vocab_size > size:
            smaller = without(row, begin, min(begin + size, row.vocab_size))
            if differs(smaller):
                row = smaller
            else:
                begin += size
        size //= 2
    return row


def fewer(ids: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield shorter id lists: the empty list, each half, then the list without each one id."""
    half = len(ids) // 2
    yield from ((), ids[:half], ids[half:]) if half else ((),) if ids else ()
    if half:
        yield from (ids[:i] + ids[i + 1 :] for i in range(len(ids)))


def simpler_values(name: str, value: Any) -> Iterator[Any]:
    """Yield simpler values of the parameter ``name``, the simplest first."""
    values = [0 if name == "seed" else OFF_VALUES[name]]
    if isinstance(value, str):
        pass  # there is no simpler word than that which is off
    elif value is None or isinstance(value, tuple):
        values += [] if value is None else [value[:i] + value[i + 1 :] for i in range(len(value))]
    elif name == "logit_bias":
        values += [{i: b for i, b in (value or {}).items() if i != token} for token in value or ()]
    elif isinstance(value, int):
        values += [1, 2, value // 2]
    else:
        values += [float(f"{value:.1g}"), float(f"{value:.2g}")]
    for simple in values:
        if simple == value:
            return
        yield simple


def simpler(row: Rows) -> Iterator[Rows]:
    """Yield variants of the row in which one argument is removed or simpler."""
    params = row.params[0]
    for name in OFF_VALUES:
        for value in simpler_values(name, getattr(params, name)):
            yield replace(row, params=(replace(params, **{name: value}),))
    for ids in fewer(row.prompts[0]):
        yield replace(row, prompts=(ids,))
    for ids in fewer(row.outputs[0]):
        yield replace(row, outputs=(ids,))
    if row.allowed is not None:
        yield replace(row, allowed=None)
    if row.num_samples > 1:
        yield replace(row, num_samples=1)
    if row.logprobs is not None:
        yield replace(row, logprobs=None)
    if row.positions != (0,):
        yield replace(row, positions=(0,))
    if row.around != (0, 0):
        yield replace(row, around=(0, 0))
    if row.logits.dtype != torch.float32:
        yield replace(row, logits=row.logits.float())


def simplest(row: Rows, differs: Differs) -> Rows:
    """Apply :func:`simpler` until none of its variants differs any more."""
    while (found := next(filter(differs, simpler(row)), None)) is not None:
        row = found
    return row


def rounder(row: Rows, differs: Differs) -> Rows:
    """Round the logits of a short row: first equal logits together, then each one alone."""
    if row.vocab_size > 64:
        return row
    alone = torch.eye(row.vocab_size, dtype=torch.bool).unsqueeze(1)
    for places in [*(row.logits == row.logits.T).unsqueeze(1), *alone]:
        value = row.logits[places][0].item()
        tenth = round(value, 1) if math.isfinite(value) else value
        for simple in (0.0, math.copysign(1.0, value), tenth):
            if simple == value:
                break
            rounded = replace(row, logits=row.logits.masked_fill(places, simple))
            if differs(rounded):
                row = rounded
                break
    return row


def shrink(row: Rows, differs: Differs, tries: int = 10_000) -> Rows:
    """Reduce a row by trial to a simple one that still differs, with at most ``tries`` trials."""

    def still_differs(row: Rows) -> bool:
        nonlocal tries
        tries -= 1
        return tries >= 0 and differs(row)

    before = None
    while before is not row:
        before = row
        for step in (fewer_tokens, simplest, rounder):
            row = step(row, still_differs)
    return row


def as_program(row: Rows, backend: str) -> str:
    """Return a program that prints the results of the reference and of a backend for a row."""
    params = row.params[0]
    changed = {
        field.name: getattr(params, field.name)
        for field in fields(params)
        if getattr(params, field.name) != OFF_VALUES[field.name]
    }
    arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    prompts, outputs = [[*ids] for ids in row.prompts], [[*ids] for ids in row.outputs]
    window = ""
    if params.penalty_last_n >= 0:
        window = f", max_length={MOST_IDS}, penalty_last_n={params.penalty_last_n}"
    mask = "None"
    if row.allowed is not None:
        mask = f"torch.tensor({mask_words(row.allowed).tolist()}, dtype=torch.int32)"
    layout = ""
    if row.around != (0, 0):
        before, after = row.around
        layout = f"""\
logits = torch.nn.functional.pad(logits, ({before}, {after}), value=nan)
logits = logits[:, {before} : {before} + {row.vocab_size}]
"""
    return f"""\
import torch
from math import inf, nan
from llm_sampling import SamplingParams, TokenHistory, filter_logits, sample

logits = torch.tensor({row.logits.float().tolist()}, dtype={row.logits.dtype})
{layout}params = SamplingParams({arguments})
history = TokenHistory.from_ids({prompts}, {outputs}, {row.vocab_size}{window})
given = {{"history": history, "allowed_mask": {mask}}}
asked = {{"positions": {[*row.positions]}, "num_samples": {row.num_samples},
         "logprobs": {row.logprobs!r}, "check": False}}
for backend in ("torch", {backend!r}):
    drawn = sample(logits, params, **given, **asked, backend=backend)
    filtered = filter_logits(logits, params, **given, backend=backend)
    values = (drawn.tokens, drawn.logprobs, drawn.status, filtered)
    print(backend, *(x if x is None else x.tolist() for x in values))
"""


# ---- The run -------------------------------------------------------------------------------------


def first_difference(rows: Rows, names: Sequence[str], threads: int) -> tuple[str, int] | None:
    """Return the first backend that differs from the reference, and the row; None if none does.

    The reference runs on one thread, because its many small operations are slower on several.
    """
    torch.set_num_threads(1)
    every = answers(rows, ("torch", *names))
    wanted = next(every)
    torch.set_num_threads(threads)
    for name, got in zip(names, every, strict=True):
        found = differing(wanted, got)
        if found:
            return name, found[0]
    return None


def run(seed: int, least_rows: int, names: Sequence[str]) -> tuple[int, str | None]:
    """Return how many rows were compared, and a program that shows the first difference."""
    done, batch, shown = 0, 0, time.monotonic()
    threads_before = torch.get_num_threads()
    try:
        while done < least_rows:
            rows = random_rows(seed, batch)
            threads = (1, 2, 3)[batch % 3]
            found = first_difference(rows, names, threads)
            done += len(rows.params)
            if found is not None:
                name, row = found
                alone = rows.row(row)

                def differs(row: Rows, name: str = name, threads: int = threads) -> bool:
                    return first_difference(row, [name], threads) is not None

                if not differs(alone):
                    batch_name = f"row {row} of random_rows({seed}, {batch})"
                    return done, f"# {name} differs in {batch_name}, and not alone\n"
                return done, as_program(shrink(alone, differs), name)
            batch += 1
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                sys.stderr.write(f"{done:,} rows, {batch:,} batches\n")
    finally:
        torch.set_num_threads(threads_before)
    return done, None


def here() -> list[str]:
    """Return the backends that can be compared with the reference on this machine's CPU."""
    cpu = torch.device("cpu")
    return [
        name
        for name, backend in backends.BACKENDS.items()
        if name != "torch" and backend.why_unavailable(cpu) is None
    ]


@contextlib.contextmanager
def emulated(seed: int) -> Iterator[str]:
    """Install the emulated CUDA kernel and yield its name. The seed chooses its launch shape."""
    import pytest

    sys.path.append(str(Path(__file__).parents[1] / "kernels" / "cuda_emulation"))
    import backend as emulation

    launch = emulation.Launch((1, 2, 4, 8)[seed % 4], seed // 4 % 2 == 0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        yield emulation.install(patch, emulation.build(Path(folder)), launch)


def main(argv: Sequence[str]) -> int:
    """Run the command line and print the result."""
    parser = argparse.ArgumentParser(description="Every backend against the reference.")
    parser.add_argument("--rows", type=int, default=100_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", choices=here(), default=here())
    parser.add_argument("--emulated", action="store_true", help="also the CUDA kernel; needs g++")
    options = parser.parse_args(argv)
    if options.rows < 1:
        parser.error(f"--rows must be an integer >= 1, got {options.rows}")
    if not options.backends and not options.emulated:
        parser.error("no backend but the reference runs on this machine's CPU")
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        names = [*options.backends]
        if options.emulated:
            names.append(stack.enter_context(emulated(options.seed)))
        done, program = run(options.seed, options.rows, names)
    minutes = (time.monotonic() - start) / 60
    sys.stdout.write(f"{done:,} rows, {', '.join(names)} against torch, {minutes:.1f} minutes\n")
    sys.stdout.write("no difference\n" if program is None else program)
    return 0 if program is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
