"""The expected answer in float64, and how a provider's answer differs from it.

A kept set is compared with what several readings of the same parameters keep: ours
(docs/semantics.md, steps 7 to 13), and those of other samplers. The first reading that explains it
names the difference; an answer that no reading explains is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from llm_sampling import SamplingParams

#: How far a sampler's effective ``top_p``, and relatively its ``min_p``, may be off because it sums
#: in float32: tables say which of these was needed. Ours is off by up to 1e-6 by definition.
SLACKS = (1e-6, 1e-5, 1e-4, 1e-3)
#: The relative error that a probability may have.
PROBABILITY_TOLERANCE = 1e-3
#: The probability that a correct sampler's draws are called wrong.
FALSE_ALARM = 1e-6
BINS = 8


class WrongAnswerError(Exception):
    """A provider's answer is not the one that the case asks for."""


@dataclass(frozen=True)
class Reading:
    """One interpretation of the parameters.

    Attributes:
        ties_at_k: top-k keeps all tokens that equal its last one, and their mass counts in top-p.
        joint: top-p uses probabilities of the whole row, not of what top-k has kept.
        min_p_first: min-p is applied before top-p, which uses probabilities of what is left.
        drops_crossing: the token that crosses ``top_p`` is not kept.
    """

    ties_at_k: bool = False
    joint: bool = False
    min_p_first: bool = False
    drops_crossing: bool = False

    @property
    def words(self) -> list[str]:
        """The words for it in a table; none for our own reading."""
        words = {
            "top-k keeps ties": self.ties_at_k,
            "joint top-p": self.joint,
            "min-p before top-p": self.min_p_first,
            "drops the crossing token": self.drops_crossing,
        }
        return [word for word, said in words.items() if said]


OURS = Reading()
#: Those with the fewest differences from ours first. A joint top-p does not depend on the filters
#: before it, so it is not combined with readings of these.
READINGS = sorted(
    (
        Reading(*flags)
        for flags in itertools.product((False, True), repeat=4)
        if not (flags[1] and (flags[0] or flags[2]))
    ),
    key=lambda reading: len(reading.words),
)


@dataclass(frozen=True)
class Order:
    """Rows in the order of step 7: by falling logit, equals by rising id.

    Attributes:
        x: float64 ``(rows, vocab_size)``, the processed logits before the temperature, in order.
        ids: int64, the token of each.
    """

    x: Tensor
    ids: Tensor


class Oracle:
    """One case on its inputs, in float64, from the logits as they are.

    Args:
        inputs: the tensors.
        params: of every row.
        orders: the buffers' orders without penalties, shared by all cases; filled on demand.
    """

    def __init__(
        self, inputs: Inputs, params: Sequence[SamplingParams], orders: dict[int, Order]
    ) -> None:
        self.inputs = inputs
        self.params = params
        penalised = inputs.prompt_ids.shape[1] + inputs.output_ids.shape[1] > 0
        self._orders: dict[int, Order] = {} if penalised else orders
        self._probabilities: dict[int, Tensor] = {}
        self._kept: dict[tuple[int, Reading, float], Tensor] = {}

    def _column(self, name: str) -> Tensor:
        """A parameter of every row, rounded to float32 as every provider gets it."""
        values = [float(getattr(row, name)) for row in self.params]
        return torch.tensor(values, dtype=torch.float32).double().unsqueeze(1)

    def order(self, buffer: int) -> Order:
        """A buffer's rows in order; steps 1 to 7."""
        if buffer not in self._orders:
            self._orders[buffer] = Order(
                *self._penalised(buffer).sort(dim=-1, descending=True, stable=True)
            )
        return self._orders[buffer]

    def _penalised(self, buffer: int) -> Tensor:
        """Steps 1 to 6, in float32 as in every provider; widened afterwards."""
        x = self.inputs.buffers[buffer].cpu().float()
        prompt, output = self.inputs.prompt_ids.cpu(), self.inputs.output_ids.cpu()
        if prompt.shape[1] + output.shape[1] == 0:
            return x.double()
        counts = torch.zeros_like(x).scatter_add_(1, output, torch.ones(output.shape))
        seen = counts.scatter(1, prompt, 1.0) > 0
        r, a, b = (
            self._column(name).float()
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        x = torch.where(seen, torch.where(x > 0, x / r, x * r), x)
        x = x - a * counts
        return (x - b * (counts > 0)).double()

    def probabilities(self, buffer: int) -> Tensor:
        """The probability of every token before any filter, in order; steps 9 and 10."""
        if buffer not in self._probabilities:
            temperature = self._column("temperature")
            x = self.order(buffer).x / torch.where(temperature == 0, 1.0, temperature)
            self._probabilities[buffer] = torch.softmax(x, -1)
        return self._probabilities[buffer]

    def kept(self, buffer: int, reading: Reading = OURS, slack: float = 0.0) -> Tensor:
        """What a reading keeps, in order, if ``top_p`` and ``min_p`` are off by a slack."""
        key = (buffer, reading, slack)
        if key not in self._kept:
            self._kept[key] = self._keep(buffer, reading, slack)
        return self._kept[key]

    def _keep(self, buffer: int, reading: Reading, slack: float) -> Tensor:
        p = self.probabilities(buffer)
        rank = torch.arange(p.shape[1])
        k = torch.where(self._column("temperature") == 0, 1.0, self._column("top_k"))
        of_top_k = (rank < k) | (k <= 0)
        if reading.ties_at_k:
            of_top_k = _with_ties(of_top_k.expand_as(p), self.order(buffer).x)
        min_p = self._column("min_p") * (1 - slack)
        of_min_p = p >= min_p.clamp(max=1.0) * p[:, :1]
        whole = p if reading.joint else p * of_top_k
        if reading.min_p_first:
            whole = whole * of_min_p
        total = whole.sum(-1, keepdim=True) if not reading.joint else 1.0
        after = (whole / total).cumsum(-1)
        before = after - whole / total
        top_p = self._column("top_p")
        filtered = top_p < 1
        top_p = top_p + slack
        of_top_p = (after <= top_p) if reading.drops_crossing else (before < top_p)
        kept = of_top_k & (of_top_p | ~filtered) & of_min_p & (p > 0)
        kept[:, 0] = True
        return kept

    def explain(self, theirs: Sequence[Tensor]) -> str:
        """How kept sets differ from ours, in words; "" if they do not.

        Args:
            theirs: for each buffer bool ``(rows, vocab_size)``, by token id.

        Raises:
            WrongAnswerError: no reading explains all of them.
        """
        ranked = [kept.cpu().gather(1, self.order(i).ids) for i, kept in enumerate(theirs)]
        differing = [int((kept ^ self.kept(i)).sum(-1).max()) for i, kept in enumerate(ranked)]
        if not any(differing):
            return ""
        # our reading with rounding, then any reading without, then any reading with rounding
        for readings, slacks in ((READINGS[:1], SLACKS[:2]), (READINGS, ()), (READINGS, SLACKS)):
            for reading in readings:
                found = [
                    self._difference(i, reading, kept, slacks) for i, kept in enumerate(ranked)
                ]
                if None not in found:
                    left = [difference for difference in found if difference is not None]
                    return "; ".join([*reading.words, *_in_words(left)])
        raise WrongAnswerError(
            f"keeps {max(differing)} tokens more or less, which no reading explains"
        )

    def _difference(
        self, buffer: int, reading: Reading, theirs: Tensor, slacks: Sequence[float]
    ) -> tuple[str, float] | None:
        """The kind of difference from a reading, and the slack that it needs.

        None where neither ties nor one of the slacks explain the difference.
        """
        kept = self.kept(buffer, reading)
        if torch.equal(theirs, kept):
            return "", 0.0
        x = self.order(buffer).x
        number, wanted = theirs.sum(-1), kept.sum(-1)
        # Apart from ties at its own end, a kept set is the first of the order.
        if (~theirs & (x > _last(theirs, x) + _rounding(x))).any():
            return None
        if torch.equal(number, wanted):
            return "cuts ties elsewhere", 0.0
        if (number >= wanted).all() and not (theirs & ~_with_ties(kept, x)).any():
            return "keeps ties", 0.0
        for slack in slacks:
            least, most = self.kept(buffer, reading, -slack), self.kept(buffer, reading, slack)
            if (number >= least.sum(-1)).all() and not (theirs & ~_with_ties(most, x)).any():
                return "cut off", slack
        return None

    def check_distribution(self, buffer: int, theirs: Tensor) -> None:
        """Check that probabilities are the softmax over the tokens that have any.

        Args:
            buffer: index of the logits.
            theirs: ``(rows, vocab_size)``, by token id; rows sum to 1.

        Raises:
            WrongAnswerError: a probability is off by more than PROBABILITY_TOLERANCE.
        """
        theirs = theirs.cpu().double().gather(1, self.order(buffer).ids)
        p = self.probabilities(buffer) * (theirs > 0)
        p = p / p.sum(-1, keepdim=True)
        # the clamp ignores probabilities that float32 cannot tell from 0
        off = ((theirs - p).abs() / p.clamp(min=1e-12)).max()
        if not off <= PROBABILITY_TOLERANCE:
            raise WrongAnswerError(f"a probability is off by {float(off):.2g} of itself")

    def places(self, buffer: int, tokens: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
        """Where drawn tokens lie in their distribution: uniform in [0, 1) for a right sampler.

        Args:
            buffer: index of the logits.
            tokens: int64 ``(rows, draws)``.
            kept: bool ``(rows, vocab_size)``, by token id: what the sampler keeps.
            noise: uniform, of the shape of ``tokens``: a token's place is anywhere in its share.

        Raises:
            WrongAnswerError: a token is not in the kept set.
        """
        tokens = tokens.cpu()
        if ((tokens < 0) | (tokens >= kept.shape[1])).any():
            raise WrongAnswerError("drew a token outside the vocabulary")
        if not kept.cpu().gather(1, tokens).all():
            raise WrongAnswerError("drew a token outside its own kept set")
        order = self.order(buffer)
        p = self.probabilities(buffer) * kept.cpu().gather(1, order.ids)
        p = p / p.sum(-1, keepdim=True)
        found = torch.empty(tokens.shape, dtype=torch.float64)
        for draw, token in enumerate(tokens.unbind(1)):
            is_it = order.ids == token.unsqueeze(1)
            rank = is_it.int().argmax(1, keepdim=True)
            before = (p * (torch.arange(p.shape[1]) < rank)).sum(-1)
            found[:, draw] = before + noise[:, draw] * p.gather(1, rank).squeeze(1)
        return found


def check_uniform(places: Tensor) -> None:
    """Pearson's chi-squared of places in [0, 1), in equal bins.

    Raises:
        WrongAnswerError: a right sampler gives such draws with a chance below FALSE_ALARM.
    """
    counts = torch.histc(places.float(), bins=BINS, min=0, max=1).double()
    expected = counts.sum() / BINS
    statistic = ((counts - expected) ** 2 / expected).sum()
    chance = torch.special.gammaincc(
        torch.tensor((BINS - 1) / 2, dtype=torch.float64), statistic / 2
    )
    if chance < FALSE_ALARM:
        raise WrongAnswerError(f"draws are not so distributed: chi-squared {float(statistic):.0f}")


def _in_words(differences: Sequence[tuple[str, float]]) -> list[str]:
    """Each kind of difference once, with the largest slack that it needed."""
    largest: dict[str, float] = {}
    for kind, slack in differences:
        largest[kind] = max(slack, largest.get(kind, 0.0))
    return [
        f"{kind} by <= {slack:.0e}" if slack else kind
        for kind, slack in sorted(largest.items())
        if kind
    ]


def _last(kept: Tensor, x: Tensor) -> Tensor:
    """The smallest logit that is kept, for each row."""
    return x.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)


def _rounding(x: Tensor) -> Tensor:
    """How far apart equal logits may be: providers round once more, or in another order."""
    return 1e-6 * x.abs()


def _with_ties(kept: Tensor, x: Tensor) -> Tensor:
    """A kept set, and all tokens that tie with its last."""
    return kept | (x >= _last(kept, x) - _rounding(x))
