"""Calls that change histories: what every backend must do with them, judged by torch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_sampling import BatchParams, SamplingParams, TokenHistory, backends
from llm_sampling.backends.base import BackendModule, ParamSlots, SampleCall, SampleOutput
from llm_sampling.history import HistoryUpdate, Text, UpdateKind
from llm_sampling.results import NOTHING, Wanted

TORCH = backends.resolve("torch", torch.device("cpu"))

#: The kinds of a history: without ids in order, with them, and with windows.
KINDS = ("bits", "text", "windows")
MAX_LENGTH = 19
WINDOWS = (-1, 0, 1, 2, 5, MAX_LENGTH, 10**6)
CAPACITY = 11

Ids = list[int]


def some_ids(rng: random.Random, vocab_size: int, most: int) -> Ids:
    """Return ids of which some are equal and some are padding."""
    few = [rng.randrange(vocab_size) for _ in range(3)]
    return [
        rng.choice([*few, rng.randrange(vocab_size), -1, vocab_size])
        for _ in range(rng.randrange(most + 1))
    ]


def history_of_kind(kind: str, vocab_size: int, rng: random.Random, device: str) -> TokenHistory:
    """Return a history with CAPACITY slots; texts are empty, full, and of any length between."""
    windows = [WINDOWS[slot % len(WINDOWS)] for slot in range(CAPACITY)]
    history = TokenHistory.empty(
        CAPACITY, vocab_size, max_length=None if kind == "bits" else MAX_LENGTH
    )
    if kind == "windows":
        assert history.text is not None
        of_slots = torch.tensor(windows, dtype=torch.int32)
        history = with_text(history, history.text._replace(windows=of_slots))
    prompts = [some_ids(rng, vocab_size, 9) for _ in range(CAPACITY)]
    outputs = [some_ids(rng, vocab_size, 8) for _ in range(CAPACITY)]
    outputs[0] = [rng.randrange(vocab_size) for _ in range(MAX_LENGTH)]
    rows = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    TORCH.update_history(
        HistoryUpdate(
            "fill",
            history,
            torch.arange(CAPACITY, dtype=torch.int32),
            torch.tensor([len(row) for row in rows], dtype=torch.int32),
            padded(rows),
            torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
        )
    )
    return history.to(device)


def with_text(history: TokenHistory, text: Text) -> TokenHistory:
    """Return a history of the same tensors with another text."""
    return TokenHistory.of_parts(
        history.seen,
        history.counts,
        history.lengths,
        history.slots,
        vocab_size=history.vocab_size,
        text=text,
    )


def padded(rows: list[Ids], more: int = 0) -> Tensor:
    """Return rows of ids as a tensor; what is past a row's end must not be read as its ids."""
    width = max(map(len, rows), default=0) + more
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]).view(len(rows), width)


def state_of(history: TokenHistory) -> dict[str, Tensor]:
    """Return copies of all tensors, on the CPU."""
    text = {} if history.text is None else history.text._asdict()
    tensors = {"seen": history.seen, "counts": history.counts, "lengths": history.lengths, **text}
    return {name: x.cpu().clone() for name, x in tensors.items() if x is not None}


def assert_same_state(got: TokenHistory, wanted: TokenHistory) -> None:
    """Check every tensor for equality."""
    expected = state_of(wanted)
    for name, tensor in state_of(got).items():
        assert torch.equal(tensor, expected[name]), (name, tensor, expected[name])


# ---- ids that were not drawn ---------------------------------------------------------------------


def some_update(
    kind: UpdateKind, history: TokenHistory, rng: random.Random, position: Tensor | None
) -> HistoryUpdate:
    """Return an update of some slots, in any order, and of slots that do not exist."""
    slots = [*rng.sample(range(CAPACITY), rng.randrange(1, CAPACITY + 1)), -1, CAPACITY, -(2**31)]
    rng.shuffle(slots)
    rows = [some_ids(rng, history.vocab_size, 12) for _ in slots]
    device = history.device

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    update = HistoryUpdate(
        kind, history, column(slots), column([rng.randrange(-1, 9) for _ in slots])
    )
    if kind != "rollback":
        ids = padded(rows, more=rng.randrange(3)).to(rng.choice([torch.int32, torch.int64]))
        if rng.random() < 0.5:  # rows with a gap between them
            ids = torch.nn.functional.pad(ids, (0, 3), value=1)[:, :-3]
        numbers = [rng.choice([len(row), len(row), len(row) // 2, -3, 10**6]) for row in rows]
        update = replace(update, ids=ids.to(device), numbers=column(numbers))
    if kind == "fill" and rng.random() < 0.8:
        prompts = [rng.choice([0, len(row), rng.randrange(len(row) + 1), 10**6]) for row in rows]
        update = replace(update, prompt_lengths=column(prompts))
    if position is None:
        return update
    by_slot = rng.random() < 0.5
    position = position if by_slot else position[: len(slots)]
    return replace(update, position=position, position_of="slot" if by_slot else "row")


def assert_updates(
    backend: BackendModule, kind: str, vocab_size: int, seed: int, device: str
) -> None:
    """Check the state after each of some updates."""
    rng = random.Random(seed)
    history = history_of_kind(kind, vocab_size, rng, device)
    judged = history.clone().to("cpu")
    kinds: tuple[UpdateKind, ...] = ("append", "fill", "rollback")
    for _ in range(12):
        what = rng.choice(kinds[:2] if kind == "bits" else kinds)
        position = torch.arange(100, 100 + CAPACITY + 3) if rng.random() < 0.7 else None
        update = some_update(what, judged, rng, position)
        moved = {
            name: None if value is None else value.clone().to(device)
            for name in ("slots", "numbers", "ids", "prompt_lengths", "position")
            for value in [getattr(update, name)]
        }
        if update.ids is not None:
            moved["ids"] = update.ids.to(device)  # with its strides
        given = replace(update, history=history, **moved)
        before = {name: x.clone() for name, x in moved.items() if x is not None}
        TORCH.update_history(update)
        backend.update_history(given)
        assert_same_state(history, judged)
        if position is not None:
            assert given.position is not None
            assert update.position is not None
            assert torch.equal(given.position.cpu(), update.position)
        for name in before.keys() - {"position"}:
            tensor = moved[name]
            assert tensor is not None
            assert torch.equal(tensor, before[name]), f"{name} was changed"


# ---- tokens that are drawn, and ids that count for one call --------------------------------------


@dataclass
class Drawing:
    """A call that records, and the same call for the judge, with tensors of its own."""

    call: SampleCall
    judged: SampleCall


#: How many sorts of calls there are.
TURNS = 6


def drawings(
    kind: str, vocab_size: int, seed: int, device: str, turns: Iterable[int] = range(TURNS)
) -> Iterator[Drawing]:
    """Yield calls with histories of a kind: by row and by slot, with masks and ids for one call."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for turn in turns:
        history = history_of_kind(kind, vocab_size, rng, device)
        slots = rng.sample(range(CAPACITY), rng.randrange(1, CAPACITY + 1))
        if turn % 2 == 0 and 0 not in slots:
            slots[0] = 0  # the slot that is full
        by_slot = turn in (1, 2, 4)
        if by_slot:
            slots += [slots[0], -1, CAPACITY, 2**31 - 1]
            rng.shuffle(slots)
        rows = len(slots)
        of_rows = torch.tensor(slots, dtype=torch.int32, device=device)
        history = history.with_slots(of_rows)
        params = [
            SamplingParams(
                temperature=rng.choice([0.0, 0.8, 1.5]),
                top_k=rng.choice([0, 1, 5]),
                top_p=rng.choice([1.0, 0.9]),
                repetition_penalty=rng.choice([1.0, 1.7, 0.6]),
                repetition_penalty_scope=rng.choice(["all", "output"]),
                frequency_penalty=rng.choice([0.0, 0.7, -0.4]),
                presence_penalty=rng.choice([0.0, 0.9]),
                seed=rng.randrange(2**64),
            )
            for _ in range(CAPACITY if by_slot else rows)
        ]
        positions = [rng.randrange(100) for _ in params]
        batch = BatchParams.from_list(params, positions=positions, device=device)
        batch = replace(batch, needs_history=True)
        record, extra = None, None
        if turn % 3 > 0:
            record = torch.tensor([rng.random() < 0.6 for _ in slots])
        if turn > 1:
            ids = [(some_ids(rng, vocab_size, 7) + [-1] * 7)[:7] for _ in slots]
            extra = torch.tensor(ids, dtype=torch.int32)
        call = SampleCall(
            logits=(torch.randn(rows, vocab_size, generator=generator) * 2).to(device),
            batch=batch,
            history=history,
            allowed_mask=None,
            wanted=(Wanted(("processed",)), Wanted(("raw",)), NOTHING)[turn % 3],
            advance=True,
            record=None if record is None else record.to(device),
            extra_output=None if extra is None else extra.to(device),
            param_slots=ParamSlots(
                of_rows, torch.zeros(CAPACITY, dtype=torch.int32, device=device), "slot"
            )
            if by_slot
            else None,
        )
        yield Drawing(call, on_the_cpu(call))


def on_the_cpu(call: SampleCall) -> SampleCall:
    """Return a copy of a call whose tensors are the judge's own."""
    assert call.history is not None
    assert call.batch.position is not None
    batch, slots = call.batch.to("cpu"), call.param_slots
    if slots is not None:
        slots = replace(slots, of_rows=slots.of_rows.cpu(), bias_counts=slots.bias_counts.cpu())
    return replace(
        call,
        logits=call.logits.cpu(),
        batch=replace(batch, position=call.batch.position.cpu().clone()),
        history=call.history.clone().to("cpu"),
        record=None if call.record is None else call.record.cpu(),
        extra_output=None if call.extra_output is None else call.extra_output.cpu(),
        param_slots=slots,
    )


def assert_same_output(got: SampleOutput, wanted: SampleOutput) -> None:
    """Check tokens and status for equality."""
    assert torch.equal(got.tokens.cpu(), wanted.tokens), (got.tokens, wanted.tokens)
    assert torch.equal(got.status.cpu(), wanted.status), (got.status, wanted.status)
    if wanted.logprobs is None:
        assert got.logprobs is None
    else:
        assert got.logprobs is not None
        torch.testing.assert_close(
            got.logprobs.cpu(), wanted.logprobs, rtol=0, atol=1e-5, equal_nan=True
        )


def assert_drawings(
    backend: BackendModule,
    kind: str,
    vocab_size: int,
    seed: int,
    device: str,
    turns: Iterable[int] = range(TURNS),
) -> None:
    """Check results, filtered logits, and the state after calls that record."""
    for drawing in drawings(kind, vocab_size, seed, device, turns):
        call, judged = drawing.call, drawing.judged
        to_filter = {"wanted": NOTHING, "advance": False, "record": None}
        filtered = backend.filter_logits(replace(call, **to_filter)).cpu()
        wanted = TORCH.filter_logits(replace(judged, **to_filter))
        assert torch.equal(filtered.view(torch.int32), wanted.view(torch.int32))
        several = {"num_samples": 3, "advance": False, "record": None}
        assert_same_output(
            backend.sample(replace(call, **several)), TORCH.sample(replace(judged, **several))
        )
        assert_same_output(backend.sample(call), TORCH.sample(judged))
        assert call.history is not None
        assert judged.history is not None
        assert_same_state(call.history, judged.history)
        assert call.batch.position is not None
        assert judged.batch.position is not None
        assert torch.equal(call.batch.position.cpu(), judged.batch.position)
