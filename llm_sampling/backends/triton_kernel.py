"""The sampling kernel in Triton: docs/semantics.md in one launch, with the same step numbers.

One program samples one row, or ``CONFIG.parts`` programs do where rows are few. A tile is
``CONFIG.tile`` consecutive tokens, processed at once. Column c of a row is the tokens c, c + tile,
c + 2 * tile, …: one token of each tile.

The key of a logit is an int32 in the order of the logits. The code of a token is an int64 in the
order of step 7: the logit's key, then the token's id. A threshold is a code, and keeps the tokens
whose code is at least that. Every filter is a threshold; the largest of them holds.

Passes over the row. A read is vocab_size logits loaded:

1. Maxima. Every column keeps its largest logit. A greedy row ends here, after 1 read.
2. Mass, where step 12 or the draw needs it of every token: the mass of each tile. An unfiltered row
   ends here. Each draw reads the tile that it falls into up to the drawn token: 2 reads.
3. Gather. The n-th largest maximum of a column is a lower bound of the n-th largest logit, so that
   the columns whose maximum reaches it, n or a few more, hold the first n tokens of the order.
   Their tokens that reach the bound become the candidates, a list in id order in the workspace;
   filters and draws then look at nothing else. For top-p, pass 2 stores these columns on its way,
   so that a row whose nucleus fits takes 2 reads. For top-k and min-p, these columns alone are read
   again: 1 read, and n / tile of one (1.01 for k = 50, 1.3 for k = 1,024).
4. Search, where the candidates would not fit (a nucleus of more than ``CONFIG.nucleus`` tokens, k
   beyond 1,500). Each read counts and weighs the tokens that reach each of three codes, the pivots,
   until the tokens between two pivots fit; one more read collects those. The first pivots come from
   a probe of the row, evenly spaced tokens: 2 to 5 reads. A code has 52 bits and every further read
   settles one or more of them, so the search ends.
5. Mass of the kept set, where the candidates are not all of it: 1 read, then draws as after pass 2.

Parts. Each program of a split row takes some consecutive tiles, its part, through passes 1 and 3,
for which it needs no other part: the first n tokens of the row are among the first n of each part,
and a depth below the largest logit of a part is not above that depth below the row's. It writes
what it finds into a header and a list of its own in the workspace, and counts itself. The program
that counts last reads the headers and lists of all parts and goes on alone: their largest bound is
a bound of the row, and what reaches it in the lists becomes the candidates. No program waits for
another one. Split are greedy rows, rows with top-k where ``CONFIG.most_wanted`` is enough, and rows
with min-p alone. Every other row needs the mass of all tokens, or more candidates than the lists
would leave room for: one program samples it, and the others end at once.

Ids that count as output for this call alone change the bits and counts of a few tokens, those that
they push out of a window included. A list of these tokens with their bits and counts is written
into the workspace before pass 1, and steps 3 to 5 look at it wherever they read the history.

Rules that look at the history give a row a list for step 5a, which triton_rules.py makes in a
launch before this one. Two numbers of it say whether a tile has any listed tokens: every pass loads
them for each tile. Only in a tile that has, the pass tests the bit of each token, and loads the
amount where it is set. Where the tokens are not consecutive, as in pass 3, it tests them wherever
the row's list is not empty.

Lists, ranks and the kept set follow the draw. Where the candidates hold the kept set, these are all
that is looked at. Otherwise the first tokens of the order take pass 3, and pass 4 and one more read
where there are too many candidates; every three ranks take 1 read, which counts the tokens that
reach each of three codes; size, mask and last token of the kept set take 1 read together. Raw lists
and ranks take the same reads of a row without bias, mask and history. What a row without a token
has is written first, and nothing else if it has none or one of its draws has failed.

Raw logprobs and the writing of filtered logits take 1 read each. So does a repetition penalty that
meets a logit far from 1: pass 1 is repeated with a slower division.

Loads. A thread loads 16 bytes at once if rows begin at multiples of 16 logits. Where vocab_size is
not such a multiple, the last few logits of a row are held in registers and inserted by every pass.

Hazards. The workspace is global memory that the threads of a program write and read: a barrier
stands between, and another before the next writes. A masked position holds -inf, whose code is
below every threshold and whose mass is 0. Threads that set bits of one word of a mask do so by
atomic operations, whose order does not matter. No program writes what one of another row uses: rows
have slots of their own in a history that a call advances. (Rows without a penalty may share a slot
in one of ``TokenHistory.among``, which is only read.)

Between the programs of a split row stands _arrive: its atomic addition releases the header and the
list of a part, and acquires those of the parts that were counted before. The other parts have ended
their reads of the history when the last program writes it. The last program alone writes results,
state and the row's candidates. A row's counter is 0 between launches: every program of a row,
split or not, is counted once, and the last one resets it.

Nobody has checked the values that a call's tensors hold, and somebody may overwrite a row while it
is read. Offsets, slots, parameters, places in a list and what other parts have written are limited
where they are loaded. Every loop ends whatever the logits are in each read, and a draw that does
not meet the mass that an earlier read has found gives the token -1 and the status bit
_NO_CANDIDATE.

Nothing may be fused into multiply-adds except by tl.fma: launch with enable_fp_fusion=False.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

_ID_BITS = tl.constexpr(20)
_LAST_ID = tl.constexpr(2**20 - 1)
_LOWEST_KEY = tl.constexpr(-2139095040)  # of -3.4028235e38; that of -inf is one less
_LOWEST = tl.constexpr(-float.fromhex("0x1.fffffep+127"))
_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_C0 = tl.constexpr(float.fromhex("0x1.000000p+0"))
_C1 = tl.constexpr(float.fromhex("-0x1.62e3b2p-1"))
_C2 = tl.constexpr(float.fromhex("0x1.ebe206p-3"))
_C3 = tl.constexpr(float.fromhex("-0x1.c4eb2cp-5"))
_C4 = tl.constexpr(float.fromhex("0x1.2d4322p-7"))
_C5 = tl.constexpr(float.fromhex("-0x1.eca6f0p-11"))
_INF = tl.constexpr(float("inf"))
_WHOLE = tl.constexpr(2**42)  # the mass of a row's largest logit
# Pass 1 keeps these flags in the bits above a tile's number.
_NAN_BIT = tl.constexpr(2**20)
_DIVISION_BIT = tl.constexpr(2**21)
_FLAG_BITS = tl.constexpr(2**21 + 2**20)
_SPAN = tl.constexpr(1024)  # places of a text that are read at once
_MOST_BIASES = tl.constexpr(2**30 - 1)  # of a row; twice as many overflow _biased's int32
_FAR = tl.constexpr(2.0**40)  # _quotient is exact for operands between 1 / _FAR and _FAR
_NAN_SEEN = tl.constexpr(1)
_NO_CANDIDATE = tl.constexpr(2)
_POS_INF_SEEN = tl.constexpr(4)
_TEXT_FULL = tl.constexpr(8)
OUTPUT_SCOPE = tl.constexpr(1)
KEPT_MASK = tl.constexpr(1)
KEPT_IDS = tl.constexpr(2)
KEPT_ENDS = tl.constexpr(3)
POSITION_OF_SLOT = tl.constexpr(1)
POSITION_OF_TEXT = tl.constexpr(2)

# In these tuples and in the kernel's arguments, () is what a call does not have: Triton 3.6 cannot
# return tuples that hold None.

#: What steps 1 to 6 need of a row. tail: the logits past the last multiple of its length. bias:
#: (ids, values, count). mask: (a pointer,). history: a History. lowered: a RuleLists. division:
#: (1 / repetition, whether step 3 must use tl.div_rn, because _quotient would not be exact).
Row = namedtuple("Row", "logits tail vocab_size num_tiles bias mask history lowered division")
#: Pointers to the lists of step 5a, as triton_rules.py makes them, or to that of one row, of which
#: ``counts`` is the count itself. capacity: how many amounts a row has room for.
RuleLists = namedtuple("RuleLists", "bits before counts amounts capacity")
#: The slots of a batch that has an entry for each slot; capacity: how many there are.
#: prompt_lengths: (a pointer,).
BySlot = namedtuple("BySlot", "slots capacity bias_counts prompt_lengths")
#: The histories of a call. text: a Text. extra, the ids that count as output for this call alone:
#: (a pointer, how many a row has).
Histories = namedtuple(
    "Histories", "seen seen_stride counts counts_stride lengths slots text extra"
)
#: The texts of a history's slots, or pointers to that of one slot. windows: (a pointer,).
Text = namedtuple("Text", "ids max_length lengths prompt_lengths windows")
#: A row's slot of the history, and its penalties. scope, of step 3: (a value,). overrides: an
#: Overrides.
History = namedtuple("History", "seen counts length repetition frequency presence scope overrides")
#: Tokens whose bit and count are others for this call. entries: a pointer to ``size`` ids, -1 where
#: there is none, and behind them as many counts, -1 where the bit is not set. Of the vocabulary's
#: parts of ``grain`` tokens, the g-th may have one of them if bit ``g & 31`` of ``grains`` is set.
Overrides = namedtuple("Overrides", "entries size grains grain")
#: The parameters of steps 11 to 13; keep is min_tokens_to_keep.
Filters = namedtuple("Filters", "top_k top_p depth_cut keep")
#: Pointers: the chosen columns' numbers, the candidates' logits and ids, the stored columns.
Workspace = namedtuple("Workspace", "columns logits ids stored")
#: Two codes between which a threshold lies, how many tokens reach each of them, and the mass of
#: those that reach high. The target is reached at low, or low is the lowest code; not at high.
Bracket = namedtuple("Bracket", "low high n_low n_high w_high")
#: What a threshold must reach: a mass or a count. z is the mass of all tokens that it is taken
#: from, offset the first token of the probe.
Goal = namedtuple("Goal", "by_mass target z offset")
#: The candidates are the tokens in low .. high - 1, held of them; n_high of mass w_high are above.
Listed = namedtuple("Listed", "held low high n_high w_high")
#: What the lists of a row's parts come to. bound: at least as many tokens as the filters need reach
#: this key, and the candidates are all that do; held: how many they are, or more than fit.
#: is_split: whether the row is split; if it is not, bound and held have no meaning.
Merged = namedtuple("Merged", "is_split bound held")
#: Where a row's draws go. processed, for their processed logprobs: (a pointer,). raw, for raw ones:
#: (a pointer, one to the logits, their maximum, their log sum). masses: (a pointer,).
Output = namedtuple("Output", "tokens processed raw masses")
#: Where all else goes, for all rows or for one. processed, raw: a Lists. kept: a Kept. token_ids:
#: (a pointer, the stride of rows), the ids that the caller has named. num_top, num_ids and num_kept
#: are how many first tokens, named ids and kept ids a row has.
More = namedtuple("More", "processed raw kept token_ids num_top num_ids num_kept")
#: Pointers to what there is of one kind besides the drawn tokens' logprobs.
Lists = namedtuple("Lists", "ranks top_ids top_logprobs id_logprobs id_ranks")
#: Pointers to what there is of the kept set besides the drawn tokens' masses. form: (mask,), (ids,)
#: or (first_id, first_logit, last_id, last_logit).
Kept = namedtuple("Kept", "counts total id_masses form")
#: What lists and ranks are of: the tokens of a row that reach a threshold, in the order of step 7.
#: best: the columns' maxima, or -inf where they are not known. m: the largest logit. total: the
#: mass of the tokens. log_sum, of raw logprobs: (a value,). held: how many candidates there are;
#: is_listed: whether these hold all of the tokens.
Order = namedtuple("Order", "row threshold best m scale total log_sum held is_listed")


@triton.jit
def _widened(x):
    """1 widen, exactly: the interpreter's own conversion of bfloat16 loses subnormals."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        widened = bits.to(tl.float32, bitcast=True)
    else:
        widened = x.to(tl.float32)
    return widened


@triton.jit
def _loaded(row, first, ids, inside):
    """1 widen: some logits, and -inf where not inside.

    ``first`` is the first of consecutive ids, a multiple of the tail's length; None if they are not
    consecutive. A mask that does not change within 16 logits lets a thread load 16 bytes at once;
    the logits that such a mask leaves out are the tail.
    """
    ALIGN: tl.constexpr = row.tail.shape[0]
    if ALIGN == 1 or first is None:
        x = tl.load(row.logits + ids, mask=inside, other=-_INF)
    else:
        RUNS: tl.constexpr = ids.shape[0] // ALIGN
        is_whole = ids // ALIGN < row.vocab_size // ALIGN
        x = tl.load(row.logits + ids, mask=is_whole, other=-_INF)
        is_tail = first // ALIGN + tl.arange(0, RUNS) == row.vocab_size // ALIGN
        x = tl.where(is_tail[:, None], row.tail[None, :], tl.reshape(x, [RUNS, ALIGN]))
        x = tl.reshape(x, [ids.shape[0]])
    return _widened(x)


@triton.jit
def _quotient(x, r, inverse):
    """The quotient x / r, correctly rounded, for operands that cannot over- or underflow.

    ``inverse`` is 1 / r, rounded. That two corrections suffice is proved by P. Markstein,
    Computation of elementary functions on the IBM RISC System/6000 processor, 1990.
    """
    q = x * inverse
    q = tl.fma(tl.fma(-q, r, x), inverse, q)
    return tl.fma(tl.fma(-q, r, x), inverse, q)


@triton.jit
def _words(words, first, ids, inside, vocab_size):
    """Word ``id >> 5`` of some words; 0 where not inside, if the ids are not consecutive.

    ``first`` is the first of consecutive ids, a multiple of 32; None if they are not consecutive.
    """
    if first is None:
        word = tl.load(words + (ids >> 5), mask=inside, other=0)
    else:
        # one load for 32 tokens
        number = tl.arange(0, ids.shape[0] // 32)
        word = tl.load(
            words + (first // 32 + number), mask=first + number * 32 < vocab_size, other=0
        )
        word = tl.reshape(tl.broadcast_to(word[:, None], [ids.shape[0] // 32, 32]), [ids.shape[0]])
    return word


@triton.jit
def _bits(words, first, ids, inside, vocab_size):
    """Bit ``id & 31`` of word ``id >> 5``, as a boolean; False where not inside."""
    word = _words(words, first, ids, inside, vocab_size)
    is_set = ((word >> (ids & 31)) & 1) != 0
    if first is not None:
        is_set = is_set & inside
    return is_set


@triton.jit
def _biased(x, bias, ids):
    """2 bias: each id is found by binary search among the ids with a bias.

    The ids should be in order; if they are not, some of them are not found.
    """
    bias_ids, bias_values, count = bias
    place = tl.zeros_like(ids)  # how many biases have a smaller id
    # the largest power of two that is at most the count
    step = count
    for i in tl.static_range(5):
        step |= step >> (1 << i)
    step = (step + 1) >> 1
    while step > 0:
        exists = place + step <= count
        bias_id = tl.load(bias_ids + place + step - 1, mask=exists, other=0)
        place = tl.where(exists & (bias_id < ids), place + step, place)
        step = step >> 1
    exists = place < count
    found = exists & (tl.load(bias_ids + place, mask=exists, other=-1) == ids)
    value = tl.load(bias_values + place, mask=found, other=0.0)
    biased = tl.where(value == -_INF, -_INF, x + value)  # a ban hides NaN and +inf
    return tl.where(found, biased, x)


@triton.jit
def _overridden(overrides, first, ids, is_seen, count):
    """The bits and counts of some tokens, but of those that have entries the entries' ones.

    ``first`` is the first of consecutive ids; None if they are not consecutive.
    """
    entries, size, grains, grain = overrides
    number = tl.where(grains == 0, 0, size)
    if first is not None:
        # hardly any tile has one of the tokens
        is_there = (grains >> (first // grain & 31)) & 1
        number = tl.where((is_there == 0) & (ids.shape[0] == grain), 0, number)
    # both in one register
    count = tl.where(is_seen, tl.maximum(count, 0), -1)
    for entry in range(0, number):
        is_it = ids == tl.load(entries + entry)
        count = tl.where(is_it, tl.load(entries + size + entry), count)
    return count >= 0, count


@triton.jit
def ones(words):
    """How many bits of each word are set."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _listed_from(lowered, first, SIZE: tl.constexpr, vocab_size):
    """How many of ``SIZE`` consecutive tokens are listed; the first one is a token of the row."""
    end = first + SIZE
    before = tl.load(lowered.before + first // 32)
    return tl.load(lowered.before + end // 32, mask=end < vocab_size, other=lowered.counts) - before


@triton.jit
def _lowered(x, lowered, first, ids, inside, vocab_size):
    """5a list of the rules: each listed token less its amount, or -inf where that is infinite.

    ``first`` is the first of consecutive ids; None if they are not consecutive.
    """
    bits, before, _, amounts, capacity = lowered
    word = _words(bits, first, ids, inside, vocab_size)
    is_listed = inside & (((word >> (ids & 31)) & 1) != 0)
    place = _words(before, first, ids, is_listed, vocab_size)
    place += ones(word & ((1 << (ids & 31)) - 1))
    place = tl.minimum(tl.maximum(place, 0), capacity - 1)
    amount = tl.load(amounts + place, mask=is_listed, other=0.0)
    less = tl.where(amount == _INF, -_INF, x - amount)  # a ban hides NaN and +inf
    return tl.where(is_listed, less, x)


@triton.jit
def _processed_and_flags(row, first, ids, inside):
    """Steps 1 to 6 of some tokens, -inf where not inside; and _NAN_BIT and _DIVISION_BIT.

    ``first`` is the first of consecutive ids; None if they are not consecutive.
    """
    # 1 widen
    x = _loaded(row, first, ids, inside)

    # 2 bias, mask
    if len(row.bias) > 0:
        x = _biased(x, row.bias, ids)
    if len(row.mask) > 0:
        x = tl.where(_bits(row.mask[0], first, ids, inside, row.vocab_size), x, -_INF)

    flags = tl.zeros_like(ids)
    if len(row.history) > 0:
        seen, counts, _, r, a, b, scope, overrides = row.history
        if (r != 1.0) | (a != 0.0) | (b != 0.0):
            is_seen = _bits(seen, first, ids, inside, row.vocab_size)
            count = tl.load(counts + ids, mask=is_seen, other=0)
            if len(overrides) > 0:
                is_seen, count = _overridden(overrides, first, ids, is_seen, count)
            # 3 repetition penalty: prompt and output, or output
            if len(scope) > 0:
                is_seen = tl.where(scope[0] == OUTPUT_SCOPE, count > 0, is_seen)
            inverse, use_division = row.division
            if use_division != 0:
                divided = tl.div_rn(x, r)
            else:
                divided = _quotient(x, r, inverse)
                is_near_1 = (x >= 1.0 / _FAR) & (x <= _FAR)
                flags = tl.where(is_seen & (x > 0.0) & (is_near_1 == 0), _DIVISION_BIT, 0)
            x = tl.where(is_seen, tl.where(x > 0.0, divided, x * r), x)
            # 4 frequency penalty, 5 presence penalty: output
            x = tl.where(count > 0, x - a * count.to(tl.float32), x)
            x = tl.where(count > 0, x - b, x)
    if len(row.lowered) > 0:
        number = row.lowered.counts
        if first is not None:
            number = _listed_from(row.lowered, first, ids.shape[0], row.vocab_size)
        if number > 0:
            x = _lowered(x, row.lowered, first, ids, inside, row.vocab_size)

    # 6 canonical
    flags = tl.where(x != x, flags | _NAN_BIT, flags)
    return tl.maximum(x + 0.0, -_INF), flags  # the maximum of NaN and a number is the number


@triton.jit
def _processed(row, first, ids, inside):
    """Steps 1 to 6 of some tokens, -inf where not inside."""
    x, _ = _processed_and_flags(row, first, ids, inside)
    return x


@triton.jit
def _key(x):
    """An int32 in the order of the float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_code(key):
    """The smallest code of a key."""
    return key.to(tl.int64) << _ID_BITS


@triton.jit
def _code(x, ids):
    """7 order: larger x first, equal x by smaller id."""
    return _first_code(_key(x)) | (ids ^ _LAST_ID).to(tl.int64)


@triton.jit
def _mass(x, m, scale):
    """9 depth, 10 mass: 0 .. 2^42, and 0 for -inf while m is not."""
    d = tl.maximum((m - x) * scale, 0.0)  # 0 for NaN, which inf - inf and 0 * inf are, where x is m
    d = tl.minimum(d, 63.0)
    # floor without a conversion: 2^23 + d is rounded to an integer, perhaps to the one above
    shifted = d + 8388608.0
    nearest = shifted - 8388608.0
    above = nearest > d
    f = d - tl.where(above, nearest - 1.0, nearest)
    e = shifted.to(tl.int32, bitcast=True) - 0x4B000000
    e = tl.where(above, e - 1, e)
    p = f * _C5
    p = (p + _C4) * f
    p = (p + _C3) * f
    p = (p + _C2) * f
    p = (p + _C1) * f
    p = p + _C0
    # trunc(p * 2^24) without a conversion: neighbouring floats in 0.5 .. 1 differ by 2^-24, and
    # their bits, read as integers, by 1
    whole = p.to(tl.int32, bitcast=True) - 0x3E800000
    return (whole.to(tl.int64) << 18) >> e.to(tl.int64)


@triton.jit
def _random_bits(seed, position, draw):
    """Philox4x32-10 (Salmon et al., SC 2011). Key: seed; counter: position, draw, stream 0."""
    low = tl.full((), 0xFFFFFFFF, tl.uint64)
    seed = seed.to(tl.uint64, bitcast=True)
    position = position.to(tl.uint64, bitcast=True)
    k0 = seed & low
    k1 = seed >> 32
    c0 = position & low
    c1 = position >> 32
    c2 = tl.zeros((), tl.uint64) + draw
    c3 = tl.zeros((), tl.uint64)
    for _ in tl.static_range(10):
        first = c0 * tl.full((), 0xD2511F53, tl.uint64)
        second = c2 * tl.full((), 0xCD9E8D57, tl.uint64)
        c0 = (second >> 32) ^ c1 ^ k0
        c1 = second & low
        c2 = (first >> 32) ^ c3 ^ k1
        c3 = first & low
        k0 = (k0 + tl.full((), 0x9E3779B9, tl.uint64)) & low
        k1 = (k1 + tl.full((), 0xBB67AE85, tl.uint64)) & low
    return c0 | (c1 << 32)


# Thresholds


@triton.jit
def _packed_counts(codes, pivots):
    """How many codes reach each of three pivots, in 21 bits each."""
    packed = (codes >= pivots[0]).to(tl.int64)
    packed += (codes >= pivots[1]).to(tl.int64) << 21
    packed += (codes >= pivots[2]).to(tl.int64) << 42
    return packed


@triton.jit
def _narrowed(bracket, pivots, packed, w1, w2, w3, by_mass, target):
    """The part of a bracket between two neighbouring pivots in which the target is reached.

    ``packed`` and w1 to w3 are the count and the mass of all tokens that reach each pivot; the
    target is a mass or a count.
    """
    low, high, n_low, n_high, w_high = bracket
    p1, p2, p3 = pivots
    n1 = packed & 0x1FFFFF
    n2 = (packed >> 21) & 0x1FFFFF
    n3 = packed >> 42
    r1 = tl.where(by_mass, w1, n1) >= target
    r2 = tl.where(by_mass, w2, n2) >= target
    r3 = tl.where(by_mass, w3, n3) >= target
    low = tl.where(r3, p3, tl.where(r2, p2, tl.where(r1, p1, low)))
    n_low = tl.where(r3, n3, tl.where(r2, n2, tl.where(r1, n1, n_low)))
    high = tl.where(r3, high, tl.where(r2, p3, tl.where(r1, p2, p1)))
    n_high = tl.where(r3, n_high, tl.where(r2, n3, tl.where(r1, n2, n1)))
    w_high = tl.where(r3, w_high, tl.where(r2, w3, tl.where(r1, w2, w1)))
    return Bracket(low, high, n_low, n_high, w_high)


@triton.jit
def _quarters(low, high):
    """Three pivots that divide a bracket into four equal parts."""
    size = high - low
    return low + size // 4, low + size // 2, low + size * 3 // 4


@triton.jit
def _threshold(codes, w, bracket, by_mass, target):
    """The largest code at which the target is reached, for a bracket whose tokens are all given.

    The difference of two codes is at least the number of tokens between them, unless the counts are
    of two reads that found other logits: it ends the loop in any case.
    """
    n_above = bracket.n_high
    w_above = bracket.w_high
    while (bracket.n_low > bracket.n_high + 1) & (bracket.high > bracket.low + 1):
        pivots = _quarters(bracket.low, bracket.high)
        packed = tl.sum(_packed_counts(codes, pivots), axis=0)
        packed += n_above * (1 + (1 << 21) + (1 << 42))
        w1 = tl.sum(tl.where(codes >= pivots[0], w, 0), axis=0) + w_above
        w2 = tl.sum(tl.where(codes >= pivots[1], w, 0), axis=0) + w_above
        w3 = tl.sum(tl.where(codes >= pivots[2], w, 0), axis=0) + w_above
        bracket = _narrowed(bracket, pivots, packed, w1, w2, w3, by_mass, target)
    return bracket.low


@triton.jit
def _column_bound(keys, top_key, wanted):
    """A key that ``wanted`` of the columns' maxima reach, and not many more; or the lowest key."""
    none = tl.zeros((), tl.int64)
    reaching = tl.sum((keys >= _LOWEST_KEY).to(tl.int64), axis=0)
    low = tl.full((), _LOWEST_KEY, tl.int64)
    bracket = Bracket(low, top_key.to(tl.int64) + 1, reaching, none, none)
    enough = wanted + wanted // 8 + 16
    while (bracket.n_low > enough) & (bracket.high - bracket.low > 1):
        p1, p2, p3 = _quarters(bracket.low, bracket.high)
        packed = _packed_counts(keys, (p1.to(tl.int32), p2.to(tl.int32), p3.to(tl.int32)))
        packed = tl.sum(packed, axis=0)
        bracket = _narrowed(bracket, (p1, p2, p3), packed, none, none, none, False, wanted)
    return bracket.low.to(tl.int32)


@triton.jit
def depth_cut(batch, index):
    """13 min-p: the depth down to which a row's filters by depth keep tokens; inf if none is on.

    A further filter by depth is a further term of a minimum here.
    """
    return tl.load(batch.min_p_cut + index)  # inf where min-p is off


@triton.jit
def _lowest_key_within(cut, m, scale):
    """The lowest key whose depth is at most the cut. The depth grows as the key falls."""
    low = tl.full((), _LOWEST_KEY - 1, tl.int64)  # taken as too deep
    high = _key(m).to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        x = _value(middle)
        is_within = tl.where(x == m, 0.0, (m - x) * scale) <= cut
        high = tl.where(is_within, middle, high)
        low = tl.where(is_within, low, middle)
    return high


@triton.jit
def _pivots(low, high):
    """Three pivots inside a bracket: two at thirds of its logits, one at half of its keys.

    The former find a threshold among many similar logits in few reads; the latter bounds the
    number of reads for any row. A bracket of less than five keys is divided by its codes.
    """
    low_key = low >> _ID_BITS
    high_key = (high - 1) >> _ID_BITS
    bottom = _value(low_key)
    top = _value(high_key)
    third = 0.33333334
    k1 = _key(bottom * (1.0 - third) + top * third).to(tl.int64)
    k2 = _key(bottom * third + top * (1.0 - third)).to(tl.int64)
    k3 = _key(_value((low_key + high_key + 1) >> 1)).to(tl.int64)
    first = tl.minimum(tl.minimum(k1, k2), k3)
    last = tl.maximum(tl.maximum(k1, k2), k3)
    middle = k1 + k2 + k3 - first - last
    least = low_key + 1
    p1 = _first_code(tl.minimum(tl.maximum(first, least), high_key))
    p2 = _first_code(tl.minimum(tl.maximum(middle, least), high_key))
    p3 = _first_code(tl.minimum(tl.maximum(last, least), high_key))
    q1, q2, q3 = _quarters(low, high)
    is_wide = high_key - low_key >= 4
    return tl.where(is_wide, p1, q1), tl.where(is_wide, p2, q2), tl.where(is_wide, p3, q3)


@triton.jit
def _probe_pivots(codes, w, bracket, spacing, w_between, by_mass, amount):
    """Three pivots: where a probe reaches its share of the amount, and some deviations around it.

    The amount is a count or a mass, counted from the bracket's upper code down; the deviations are
    standard deviations of a binomial share. A token of the probe stands for ``spacing`` tokens;
    ``w_between`` is the bracket's mass.
    """
    low = bracket.low
    high = bracket.high
    inside = (codes >= low) & (codes < high)
    codes = tl.where(inside, codes, low - 1)
    w = tl.where(inside, w, 0)
    n = tl.sum(inside.to(tl.int64), axis=0)
    of_probe = tl.where(by_mass, tl.sum(w, axis=0), n).to(tl.float32)
    of_all = tl.maximum(tl.where(by_mass, w_between, n * spacing), 1)
    share = tl.minimum(tl.div_rn(amount.to(tl.float32), of_all.to(tl.float32)), 1.0)
    variance = tl.div_rn(share * (1.0 - share), tl.maximum(n, 1).to(tl.float32))
    spread = tl.sqrt_rn(variance)
    spread *= tl.where(by_mass, 3.0, 2.0)
    none = tl.zeros((), tl.int64)
    p1 = low
    p2 = low
    p3 = low
    for i in range(0, 3):
        part = tl.minimum(tl.maximum(share + spread * (i - 1), 0.0), 1.0)
        target = tl.maximum((part * of_probe).to(tl.int64), 1)
        p1 = _threshold(codes, w, Bracket(low, high, n, none, none), by_mass, target)
        p3 = tl.where(i == 0, p1, p3)
        p2 = tl.where(i == 1, p1, p2)
    return p1, p2, p3


# Candidates


@triton.jit
def _memory(start, CONFIG: tl.constexpr):
    """A Workspace whose parts follow each other from ``start`` on."""
    listed = start + CONFIG.tile
    return Workspace(start, listed, listed + CONFIG.candidates, listed + 2 * CONFIG.candidates)


@triton.jit
def _append(workspace, held, x, ids, wanted, CAPACITY: tl.constexpr):
    """Append the wanted tokens to the candidates, as far as they fit; how many there would be."""
    place = held + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    has_room = wanted & (place < CAPACITY)
    tl.store(workspace.logits + place, x.to(tl.int32, bitcast=True), mask=has_room)
    tl.store(workspace.ids + place, ids, mask=has_room)
    return held + tl.sum(wanted.to(tl.int32), axis=0)


@triton.jit
def _candidates(workspace, held, m, scale, CAPACITY: tl.constexpr):
    """The candidates' codes and masses; past the last, a code below every threshold and no mass."""
    place = tl.arange(0, CAPACITY)
    filled = place < held
    x = tl.load(workspace.logits + place, mask=filled, other=0).to(tl.float32, bitcast=True)
    ids = tl.load(workspace.ids + place, mask=filled, other=0)
    x = tl.where(filled, x, -_INF)
    return _code(x, ids), _mass(x, m, scale)


@triton.jit
def _choose_columns(keys, bound, workspace, TILE: tl.constexpr):
    """List the columns whose maxima reach the bound: which, their places in the list, how many."""
    is_chosen = keys >= bound
    place = tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    tl.store(workspace.columns + place, tl.arange(0, TILE), mask=is_chosen)
    return is_chosen, place, tl.sum(is_chosen.to(tl.int32), axis=0)


@triton.jit
def _gather(row, tiles, workspace, num_columns, bound, is_stored, CONFIG: tl.constexpr):
    """Pass 3: the tokens of the chosen columns that reach the bound become the candidates.

    ``tiles`` is the first tile, and the one after the last. Returns how many candidates there are;
    it ends early where they are more than fit.
    """
    CAPACITY: tl.constexpr = CONFIG.candidates
    held = tl.zeros((), tl.int32)
    tl.debug_barrier()
    start = tl.zeros((), tl.int32)
    first_tile, end_tile = tiles
    while (start < num_columns * (end_tile - first_tile)) & (held <= CAPACITY):
        index = start + tl.arange(0, CAPACITY)
        tile = first_tile + index // num_columns
        inside = tile < end_tile
        column = tl.load(workspace.columns + index % num_columns, mask=inside, other=0)
        ids = tile * CONFIG.tile + column
        inside = inside & (ids < row.vocab_size)
        if is_stored:
            stored = tl.load(workspace.stored + index, mask=inside, other=0)
            x = stored.to(tl.float32, bitcast=True)
        else:
            x = _processed(row, None, ids, inside)
        held = _append(workspace, held, x, ids, inside & (_key(x) >= bound), CAPACITY)
        start += CAPACITY
    tl.debug_barrier()
    return held


@triton.jit
def _search(row, workspace, bracket, m, scale, goal, CAPACITY: tl.constexpr):
    """Pass 4: narrow a bracket until the tokens in it fit the candidates, whose memory is used."""
    by_mass, target, z, offset = goal
    spacing = (row.vocab_size + CAPACITY - 1) // CAPACITY
    probe_ids = tl.arange(0, CAPACITY) * spacing + offset
    inside = probe_ids < row.vocab_size
    probe = _processed(row, None, probe_ids, inside)
    tl.debug_barrier()
    held = _append(workspace, 0, probe, probe_ids, inside, CAPACITY)
    tl.debug_barrier()
    codes, w = _candidates(workspace, held, m, scale, CAPACITY)
    missing = target - tl.where(by_mass, bracket.w_high, bracket.n_high)
    pivots = _probe_pivots(codes, w, bracket, spacing, z - bracket.w_high, by_mass, missing)
    # Until a pivot reaches the target, n_low is too large. The difference of two codes is at least
    # the number of tokens between them, so it ends the loop in any case.
    while (bracket.n_low - bracket.n_high > CAPACITY) & (bracket.high - bracket.low > CAPACITY):
        packed_sums = tl.zeros([CAPACITY], tl.int64)
        w1_sums = tl.zeros([CAPACITY], tl.int64)
        w2_sums = tl.zeros([CAPACITY], tl.int64)
        w3_sums = tl.zeros([CAPACITY], tl.int64)
        for first in range(0, row.vocab_size, CAPACITY):
            ids = first + tl.arange(0, CAPACITY)
            x = _processed(row, first, ids, ids < row.vocab_size)
            code = _code(x, ids)
            w = _mass(x, m, scale)
            packed_sums += _packed_counts(code, pivots)
            w1_sums += tl.where(code >= pivots[0], w, 0)
            w2_sums += tl.where(code >= pivots[1], w, 0)
            w3_sums += tl.where(code >= pivots[2], w, 0)
        packed = tl.sum(packed_sums, axis=0)
        w1 = tl.sum(w1_sums, axis=0)
        w2 = tl.sum(w2_sums, axis=0)
        w3 = tl.sum(w3_sums, axis=0)
        bracket = _narrowed(bracket, pivots, packed, w1, w2, w3, by_mass, target)
        pivots = _pivots(bracket.low, bracket.high)
    return bracket


@triton.jit
def _collect(row, workspace, low, high, CAPACITY: tl.constexpr):
    """A read of the row: all tokens in low .. high - 1 become the candidates; how many they are."""
    tl.debug_barrier()
    held = tl.zeros((), tl.int32)
    for first in range(0, row.vocab_size, CAPACITY):
        ids = first + tl.arange(0, CAPACITY)
        x = _processed(row, first, ids, ids < row.vocab_size)
        code = _code(x, ids)
        held = _append(workspace, held, x, ids, (code >= low) & (code < high), CAPACITY)
    tl.debug_barrier()
    return held


# Parts of a row


@triton.jit
def _may_be_split(is_greedy, filters, vocab_size, CONFIG: tl.constexpr):
    """Whether the first few tokens of each part are all that the filters of a row may keep.

    ``filters`` is () where no row has any.
    """
    is_split = is_greedy
    if len(filters) > 0:
        at_most, has_k, has_p, has_depth_cut = _filters_on(filters, vocab_size)
        wanted = tl.where(has_k, at_most, filters.keep)
        is_listed = (has_k | (has_depth_cut & (has_p == 0))) & (wanted <= CONFIG.most_wanted)
        is_split = is_split | is_listed
    return is_split


@triton.jit
def _list_part(row, tiles, filters, best, m, scale, workspace, CONFIG: tl.constexpr):
    """Pass 3 of a part: its tokens that reach a bound become its candidates.

    ``best`` and m are maxima of the part. As many tokens of the part as the filters need reach the
    bound, or it is the lowest key. For min-p, the depth below m is one below a larger maximum, so
    that the bound is not above what the row keeps. Returns the bound and how many candidates there
    are, or more than fit.
    """
    at_most, has_k, _, has_depth_cut = _filters_on(filters, row.vocab_size)
    keys = _key(best)
    bound = _column_bound(keys, _key(m), tl.where(has_k, at_most, filters.keep))
    if has_depth_cut & (has_k == 0):
        bound = tl.minimum(bound, _lowest_key_within(filters.depth_cut, m, scale).to(tl.int32))
    _, _, num_columns = _choose_columns(keys, bound, workspace, CONFIG.tile)
    return bound, _gather(row, tiles, workspace, num_columns, bound, False, CONFIG)


@triton.jit
def _hand_over(
    row,
    tiles,
    filters,
    is_greedy,
    temperature,
    best,
    m,
    first_best,
    flags,
    workspace,
    CONFIG: tl.constexpr,
):
    """Write the header and, where a filter needs it, the list of a part.

    ``flags`` are those of pass 1, and ``workspace`` is the part's.
    """
    bound = tl.full((), _LOWEST_KEY, tl.int32)
    held = tl.zeros((), tl.int32)
    if CONFIG.any_filter:
        needs_list = (m > -_INF) & (is_greedy == 0)
        if needs_list:
            scale = tl.div_rn(_LOG2_E, temperature)
            memory = _memory(workspace + 2 * CONFIG.overrides, CONFIG)
            bound, held = _list_part(row, tiles, filters, best, m, scale, memory, CONFIG)
    header = workspace + CONFIG.header
    tl.store(header, _key(m))
    tl.store(header + 1, first_best)
    tl.store(header + 2, flags | row.division[1] * _DIVISION_BIT)
    tl.store(header + 3, bound)
    tl.store(header + 4, held)


@triton.jit
def _arrive(counter, CONFIG: tl.constexpr):
    """Count this program of the row, and say whether it is the last one.

    The barrier puts the stores of all threads before the atomic operation of one of them, which
    releases them to the program that counts after this one; the second barrier puts the loads of
    all threads after it.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    is_last = before == CONFIG.parts - 1
    if is_last:
        tl.store(counter, 0)  # for the next launch
    return is_last


@triton.jit
def _merged_maxima(workspace, vocab_size, CONFIG: tl.constexpr):
    """The largest logit of all parts, the first token that has it, and the flags of all.

    ``workspace`` is the row's.
    """
    header = workspace + CONFIG.header + tl.arange(0, CONFIG.parts) * CONFIG.part_words
    keys = tl.load(header)
    top = tl.max(keys, axis=0)
    first_best = tl.min(tl.where(keys == top, tl.load(header + 1), _LAST_ID), axis=0)
    first_best = tl.minimum(tl.maximum(first_best, 0), vocab_size - 1)
    flags = tl.load(header + 2)
    flags = tl.max(flags & _NAN_BIT, axis=0) | tl.max(flags & _DIVISION_BIT, axis=0)
    return _value(top), first_best, flags


@triton.jit
def _merged_lists(workspace, vocab_size, CONFIG: tl.constexpr):
    """The candidates of all parts that reach the largest of their bounds become those of the row.

    The part that has this bound has enough of them. No other part has left one out, since its own
    bound is not larger, unless it had more than fit. Lists are in id order and parts follow each
    other, so that the row's candidates are in id order, too. ``workspace`` is the row's. Returns
    the bound and how many candidates there are, or more than fit.
    """
    CAPACITY: tl.constexpr = CONFIG.candidates
    header = workspace + CONFIG.header + tl.arange(0, CONFIG.parts) * CONFIG.part_words
    bound = tl.max(tl.load(header + 3), axis=0)
    counts = tl.where(tl.load(header) >= bound, tl.load(header + 4), 0)
    width = tl.max(counts, axis=0)
    lists = _memory(workspace + 2 * CONFIG.overrides, CONFIG)
    memory = _memory(workspace + CONFIG.parts * CONFIG.part_words, CONFIG)
    held = tl.where(width > CAPACITY, width, 0)
    start = tl.zeros((), tl.int32)
    while (start < CONFIG.parts * width) & (held <= CAPACITY):
        index = start + tl.arange(0, CAPACITY)
        part = index // width
        place = index % width  # below CAPACITY whatever the counts are
        offset = part * CONFIG.part_words
        inside = part < CONFIG.parts
        count = tl.load(workspace + CONFIG.header + offset + 4, mask=inside, other=0)
        inside = inside & (place < count)
        x = tl.load(lists.logits + offset + place, mask=inside, other=0)
        x = x.to(tl.float32, bitcast=True)
        ids = tl.load(lists.ids + offset + place, mask=inside, other=0)
        ids = tl.minimum(tl.maximum(ids, 0), vocab_size - 1)
        held = _append(memory, held, x, ids, inside & (_key(x) >= bound), CAPACITY)
        start += CAPACITY
    tl.debug_barrier()
    return bound, held


# The kept set


@triton.jit
def _filters(batch, params, vocab_size):
    """The parameters of steps 11 to 13, limited to values for which these have a meaning."""
    return Filters(
        tl.load(batch.top_k + params),
        tl.maximum(tl.load(batch.top_p + params), 0.0),  # 0 for NaN
        depth_cut(batch, params),
        tl.minimum(tl.maximum(tl.load(batch.min_tokens_to_keep + params), 1), vocab_size),
    )


@triton.jit
def _filters_on(filters, vocab_size):
    """How many tokens step 11 keeps at most, and which of steps 11, 12 and 13 are on."""
    at_most = tl.where(filters.top_k > 0, tl.maximum(filters.top_k, filters.keep), vocab_size)
    return at_most, at_most < vocab_size, filters.top_p < 1.0, filters.depth_cut < _INF


@triton.jit
def _tile_masses(row, threshold, m, scale, store, CONFIG: tl.constexpr):
    """A read of the row: the mass of each tile's tokens, or of those that reach a threshold.

    ``store`` is None or (stored, num_columns, place): then the token of column c in tile t is put
    at ``stored + t * num_columns + place[c]``, unless place[c] is negative.
    """
    TILE: tl.constexpr = CONFIG.tile
    MAX_TILES: tl.constexpr = CONFIG.max_tiles
    tile = tl.arange(0, MAX_TILES)
    masses = tl.zeros([MAX_TILES], tl.int64)
    for t in tl.range(0, row.num_tiles, num_stages=CONFIG.stages):
        ids = t * TILE + tl.arange(0, TILE)
        x = _processed(row, t * TILE, ids, ids < row.vocab_size)
        w = _mass(x, m, scale)
        if threshold is not None:
            w = tl.where(_code(x, ids) >= threshold, w, 0)
        masses = tl.where(tile == t, tl.sum(w, axis=0), masses)
        if store is not None:
            stored, num_columns, place = store
            bits = x.to(tl.int32, bitcast=True)
            tl.store(stored + t * num_columns + place, bits, mask=place >= 0)
    return masses


@triton.jit
def _top_p_target(z, p):
    """12 top-p: ceil(z * P / 2^31), from two halves of z."""
    share = (p * 2147483648.0).to(tl.int64) - 2048
    share = tl.maximum(share, 0)
    low = tl.full((), 0x7FFFFFFF, tl.int64)
    target = (z >> 31) * share + (((z & low) * share + low) >> 31)
    return tl.maximum(target, 1)


@triton.jit
def _find(row, workspace, listed, bound, k_threshold, m, scale, goal, CAPACITY: tl.constexpr):
    """The largest code at which the goal is reached: among the candidates, or found by a search.

    Where the goal is a count, at least so many tokens reach the key ``bound``. A search replaces
    the candidates. Returns what they are, their codes and masses, and the code.
    """
    by_mass, target, _, _ = goal
    top = _first_code(_key(m).to(tl.int64) + 1)
    codes, w = _candidates(workspace, listed.held, m, scale, CAPACITY)
    above = tl.where(by_mass, listed.w_high, listed.n_high)
    below = above + tl.where(by_mass, tl.sum(w, axis=0), listed.held.to(tl.int64))
    is_whole_row = listed.low <= _first_code(tl.full((), _LOWEST_KEY, tl.int64))
    if (above >= target) | ((below < target) & (is_whole_row == 0)):
        # the code is not among the candidates: it is below them, or they do not begin at the top
        low = _first_code(bound)
        high = top
        n_high = tl.zeros((), tl.int64)
        w_high = tl.zeros((), tl.int64)
        if (listed.high == top) & (below < target):
            high = listed.low
            n_high = listed.held.to(tl.int64)
            w_high = tl.sum(w, axis=0)
        if by_mass:
            # a token 44 octaves down has no mass
            lowest_value = _value(tl.full((), _LOWEST_KEY, tl.int32))
            massive = _key(tl.maximum(m - 44.0 / scale, lowest_value))
            low = tl.maximum(_first_code(massive), k_threshold)
        n_low = tl.zeros((), tl.int64) + row.vocab_size
        bracket = Bracket(low, high, n_low, n_high, w_high)
        bracket = _search(row, workspace, bracket, m, scale, goal, CAPACITY)
        held = _collect(row, workspace, bracket.low, bracket.high, CAPACITY)
        listed = Listed(held, bracket.low, bracket.high, bracket.n_high, bracket.w_high)
        codes, w = _candidates(workspace, held, m, scale, CAPACITY)
    n_low = listed.n_high + listed.held
    bracket = Bracket(listed.low, listed.high, n_low, listed.n_high, listed.w_high)
    return listed, codes, w, _threshold(codes, w, bracket, by_mass, target)


@triton.jit
def _kept(
    row, filters, best, m, scale, workspace, merged, WEIGH_ALL: tl.constexpr, CONFIG: tl.constexpr
):
    """Steps 11 to 13: the threshold of the kept set, and what a draw from it needs.

    ``best`` are the columns' maxima; ``merged`` is () or a Merged. Returns the threshold, the kept
    set's mass by tile, how many candidates there are, and whether these hold the whole kept set.
    The masses have no meaning in that case, nor without WEIGH_ALL.
    """
    CAPACITY: tl.constexpr = CONFIG.candidates
    TILE: tl.constexpr = CONFIG.tile
    MAX_TILES: tl.constexpr = CONFIG.max_tiles
    lowest = _first_code(tl.full((), _LOWEST_KEY, tl.int64))
    top = _first_code(_key(m).to(tl.int64) + 1)
    top_p, cut, keep = filters.top_p, filters.depth_cut, filters.keep
    at_most, has_k, has_p, has_depth_cut = _filters_on(filters, row.vocab_size)
    any_filter = has_k | has_p | has_depth_cut
    is_split = False
    if len(merged) > 0:
        is_split = merged.is_split

    # the columns that hold the first tokens of the order
    bound = tl.full((), _LOWEST_KEY, tl.int32)
    depth_threshold = lowest
    num_columns = tl.zeros((), tl.int32)
    weigh_all = has_p & (at_most >= row.vocab_size)
    is_stored = False
    place = tl.full([TILE], -1, tl.int32)
    if any_filter:
        wanted = tl.where(has_k, at_most, tl.where(has_p, tl.maximum(keep, CONFIG.nucleus), keep))
        if has_depth_cut:
            depth_threshold = _first_code(_lowest_key_within(cut, m, scale))
        keys = _key(best)
        if (row.vocab_size > CAPACITY) & (is_split == 0):
            bound = _column_bound(keys, _key(m), wanted)
            if not (has_k | has_p):
                bound = tl.minimum(bound, (depth_threshold >> _ID_BITS).to(tl.int32))
        if (wanted <= CAPACITY) & (is_split == 0):
            is_chosen, place, num_columns = _choose_columns(keys, bound, workspace, TILE)
            is_stored = weigh_all & (num_columns <= CONFIG.max_stored)
            place = tl.where(is_stored, tl.where(is_chosen, place, -1), -1)

    # the mass of all tokens, for step 12 or for the draw of a row without filters
    masses = tl.zeros([MAX_TILES], tl.int64)
    z = tl.zeros((), tl.int64)
    if weigh_all | (WEIGH_ALL & (any_filter == 0)):
        store = (workspace.stored, num_columns, place)
        masses = _tile_masses(row, None, m, scale, store, CONFIG)
        z = tl.sum(masses, axis=0)

    none = tl.zeros((), tl.int64)
    low = top  # of no candidates
    held = _gather(row, (0, row.num_tiles), workspace, num_columns, bound, is_stored, CONFIG)
    if len(merged) > 0:
        held = tl.where(is_split, merged.held, held)
        bound = tl.where(is_split, merged.bound, bound)
    if (held > 0) & (held <= CAPACITY):
        low = _first_code(bound)
    else:
        held = tl.zeros((), tl.int32)
    listed = Listed(held, low, top, none, none)

    # 11 top-k, 12 top-p, and what min_tokens_to_keep asks for, each as a threshold. They are found
    # in a loop, so that the search is compiled once and not three times.
    k_threshold = lowest
    p_threshold = depth_threshold  # of 12 top-p and of 13 min-p
    keep_threshold = top
    for step in range(0, 3):
        by_mass = step == 1
        has_keep = (keep > 1) & (has_p | has_depth_cut)
        if tl.where(step == 0, has_k, tl.where(step == 1, has_p, has_keep)):
            target = tl.where(step == 0, at_most, keep).to(tl.int64)
            target = tl.where(by_mass, _top_p_target(z, top_p), target)
            # Each step probes other tokens: a probe that is the same for all steps would be moved
            # out of the loop, where it occupies registers.
            goal = Goal(by_mass, target, z, step & 1)
            listed, codes, w, threshold = _find(
                row, workspace, listed, bound, k_threshold, m, scale, goal, CAPACITY
            )
            if step == 0:
                k_threshold = threshold
                z = listed.w_high + tl.sum(tl.where(codes >= threshold, w, 0), axis=0)
            elif step == 1:
                p_threshold = tl.maximum(p_threshold, threshold)
            else:
                keep_threshold = threshold
    # neither of 12 top-p and 13 min-p leaves fewer than min_tokens_to_keep
    threshold = tl.maximum(k_threshold, tl.minimum(p_threshold, keep_threshold))

    is_listed = (listed.high == top) & (listed.low <= threshold)
    if WEIGH_ALL & any_filter & (is_listed == 0):
        masses = _tile_masses(row, threshold, m, scale, None, CONFIG)
    return threshold, masses, listed.held, is_listed


# Draws


@triton.jit
def _raw_log_sum(row, CONFIG: tl.constexpr):
    """A read of the row: the largest raw logit m, and ln of the sum of exp(x - m).

    The third value is each column's largest raw logit, or () where no list needs it.
    """
    TILE: tl.constexpr = CONFIG.tile
    m = tl.full((), -_INF, tl.float32)
    total = tl.zeros((), tl.float32)
    best = ()
    if CONFIG.lists:
        best = tl.full([TILE], -_INF, tl.float32)
    for t in range(0, row.num_tiles):
        ids = t * TILE + tl.arange(0, TILE)
        x = _loaded(row, t * TILE, ids, ids < row.vocab_size)
        x = tl.where(x != x, -_INF, x)
        larger = tl.maximum(m, tl.max(x, axis=0))
        total = total * tl.where(m == larger, 1.0, tl.exp(m - larger))
        total += tl.sum(tl.where(x == larger, 1.0, tl.exp(x - larger)), axis=0)
        m = larger
        if CONFIG.lists:
            best = tl.maximum(best, x + 0.0)  # no -0.0, as in step 6
    return m, tl.log(total), best


@triton.jit
def _raw_logprob(x, m, log_sum):
    """The logprob of a raw logit that is no NaN."""
    return tl.where(x == m, 0.0, x - m) - log_sum


@triton.jit
def _share(w, total):
    """The logprob of a mass."""
    return tl.log(tl.div_rn(w.to(tl.float32), total.to(tl.float32)))


@triton.jit
def _write(output, draw, token, w, total):
    """A draw's token, and what is asked for of it; -1, NaN and 0 where there was no candidate."""
    tl.store(output.tokens + draw, token.to(tl.int64))
    if len(output.raw) > 0:
        logprobs, logits, raw_max, raw_log_sum = output.raw
        x = _widened(tl.load(logits + tl.maximum(token, 0)))
        logprob = _raw_logprob(x, raw_max, raw_log_sum)
        tl.store(logprobs + draw, tl.where(token < 0, float("nan"), logprob))
    if len(output.processed) > 0:
        logprob = _share(w, total)
        tl.store(output.processed[0] + draw, tl.where(token < 0, float("nan"), logprob))
    if len(output.masses) > 0:
        tl.store(output.masses[0] + draw, tl.where(token < 0, 0, w))


@triton.jit
def _scaled_random(random, draw, total):
    """14 draw: (R * total) >> 64; ``random`` is (seed, position)."""
    seed, position = random
    return tl.umulhi(_random_bits(seed, position, draw), total.to(tl.uint64)).to(tl.int64)


@triton.jit
def _first_beyond(running, r, ids, w):
    """The first token, in id order, at which the running sum of mass exceeds r; and its mass.

    The token is -1 if the sum of all does not exceed r.
    """
    is_drawn = tl.arange(0, ids.shape[0]) == tl.sum((running <= r).to(tl.int32), axis=0)
    return tl.max(tl.where(is_drawn, ids, -1), axis=0), tl.sum(tl.where(is_drawn, w, 0), axis=0)


@triton.jit
def _draw_from_candidates(
    workspace, held, threshold, m, scale, random, num_samples, output, CAPACITY: tl.constexpr
):
    """14 draw, from the candidates that reach the threshold.

    Returns the last draw's token; the smallest of all draws, which is -1 where one has failed; and
    the mass that is drawn from.
    """
    codes, w = _candidates(workspace, held, m, scale, CAPACITY)
    place = tl.arange(0, CAPACITY)
    ids = tl.load(workspace.ids + place, mask=place < held, other=0)
    w = tl.where(codes >= threshold, w, 0)
    running = tl.cumsum(w, axis=0)
    total = tl.sum(w, axis=0)
    token = tl.full((), -1, tl.int32)
    smallest = tl.full((), _LAST_ID, tl.int32)
    for draw in range(0, num_samples):
        r = _scaled_random(random, draw, total)
        token, token_w = _first_beyond(running, r, ids, w)
        smallest = tl.minimum(smallest, token)
        _write(output, draw, token, token_w, total)
    return token, smallest, total


@triton.jit
def _draw_by_tile(
    row, masses, threshold, m, scale, random, num_samples, output, CONFIG: tl.constexpr
):
    """14 draw, from all tokens that reach the threshold: first a tile, then a token of it.

    ``masses`` are the tiles' masses of these tokens. Returns what _draw_from_candidates does.
    """
    PIECE: tl.constexpr = CONFIG.candidates
    running = tl.cumsum(masses, axis=0)
    total = tl.sum(masses, axis=0)
    token = tl.full((), -1, tl.int32)
    smallest = tl.full((), _LAST_ID, tl.int32)
    for draw in range(0, num_samples):
        r = _scaled_random(random, draw, total)
        tile = tl.sum((running <= r).to(tl.int32), axis=0)
        before = tl.max(tl.where(running <= r, running, 0), axis=0)
        # the pieces of the tile, from its start on; past the row where there is no mass at all
        first = tile * CONFIG.tile - PIECE
        last = tl.minimum((tile + 1) * CONFIG.tile, row.vocab_size) - PIECE
        ids = first + tl.arange(0, PIECE)
        w = tl.zeros([PIECE], tl.int64)
        piece_mass = tl.zeros((), tl.int64)
        while (before + piece_mass <= r) & (first < last):
            before += piece_mass
            first += PIECE
            ids = first + tl.arange(0, PIECE)
            x = _processed(row, first, ids, ids < row.vocab_size)
            w = tl.where(_code(x, ids) >= threshold, _mass(x, m, scale), 0)
            piece_mass = tl.sum(w, axis=0)
        token, token_w = _first_beyond(tl.cumsum(w, axis=0), r - before, ids, w)
        smallest = tl.minimum(smallest, token)
        _write(output, draw, token, token_w, total)
    return token, smallest, total


# Lists, ranks, and the kept set


@triton.jit
def _fill(values, size, value):
    """Store a value ``size`` times."""
    for first in range(0, size, _SPAN):
        place = first + tl.arange(0, _SPAN)
        tl.store(values + place, value, mask=place < size)


@triton.jit
def _more_of_row(more, index, num_samples, vocab_size, CONFIG: tl.constexpr):
    """Where the results of row ``index`` go."""
    processed, raw, kept, token_ids, num_top, num_ids, num_kept = more
    if CONFIG.processed:
        processed = _lists_of_row(processed, index, num_samples, num_top, num_ids, CONFIG)
    if CONFIG.raw:
        raw = _lists_of_row(raw, index, num_samples, num_top, num_ids, CONFIG)
    if CONFIG.has_ids:
        ids, stride = token_ids
        token_ids = (ids + index * stride,)
    if CONFIG.kept > 0:
        counts, total, id_masses, form = kept
        if CONFIG.has_ids:
            id_masses += index * num_ids
        if CONFIG.kept == KEPT_MASK:
            form = (form[0] + index * ((vocab_size + 31) // 32),)
        elif CONFIG.kept == KEPT_IDS:
            form = (form[0] + index * num_kept,)
        else:
            form = (form[0] + index, form[1] + index, form[2] + index, form[3] + index)
        kept = Kept(counts + index, total + index, id_masses, form)
    return More(processed, raw, kept, token_ids, num_top, num_ids, num_kept)


@triton.jit
def _lists_of_row(lists, index, num_samples, num_top, num_ids, CONFIG: tl.constexpr):
    """Where the lists of row ``index`` go."""
    ranks, top_ids, top_logprobs, id_logprobs, id_ranks = lists
    if CONFIG.lists:
        ranks += index * num_samples
        top_ids += index * num_top
        top_logprobs += index * num_top
        if CONFIG.has_ids:
            id_ranks += index * num_ids
    if CONFIG.has_ids:
        id_logprobs += index * num_ids
    return Lists(ranks, top_ids, top_logprobs, id_logprobs, id_ranks)


@triton.jit
def _clear(more, num_samples, vocab_size, CONFIG: tl.constexpr):
    """What a row without a token has: -1, NaN and 0 in all results but those of the draws."""
    tl.debug_barrier()
    if CONFIG.processed:
        _clear_lists(more.processed, num_samples, more.num_top, more.num_ids, CONFIG)
    if CONFIG.raw:
        _clear_lists(more.raw, num_samples, more.num_top, more.num_ids, CONFIG)
    if CONFIG.kept > 0:
        tl.store(more.kept.counts, 0)
        tl.store(more.kept.total, 0)
        if CONFIG.has_ids:
            _fill(more.kept.id_masses, more.num_ids, 0)
        if CONFIG.kept == KEPT_MASK:
            _fill(more.kept.form[0], (vocab_size + 31) // 32, 0)
        elif CONFIG.kept == KEPT_IDS:
            _fill(more.kept.form[0], more.num_kept, -1)
        else:
            first_id, first_logit, last_id, last_logit = more.kept.form
            tl.store(first_id, -1)
            tl.store(first_logit, float("nan"))
            tl.store(last_id, -1)
            tl.store(last_logit, float("nan"))
    tl.debug_barrier()


@triton.jit
def _clear_lists(lists, num_samples, num_top, num_ids, CONFIG: tl.constexpr):
    """What a row without a token has of one kind, but for the draws' logprobs."""
    if CONFIG.lists:
        _fill(lists.ranks, num_samples, -1)
        _fill(lists.top_ids, num_top, -1)
        _fill(lists.top_logprobs, num_top, float("nan"))
        if CONFIG.has_ids:
            _fill(lists.id_ranks, num_ids, -1)
    if CONFIG.has_ids:
        _fill(lists.id_logprobs, num_ids, float("nan"))


@triton.jit
def _clear_draws(output, num_samples):
    """No token, where one of the draws has failed."""
    _fill(output.tokens, num_samples, -1)
    if len(output.processed) > 0:
        _fill(output.processed[0], num_samples, float("nan"))
    if len(output.raw) > 0:
        _fill(output.raw[0], num_samples, float("nan"))
    if len(output.masses) > 0:
        _fill(output.masses[0], num_samples, 0)


@triton.jit
def _processed_codes(row, first, SIZE: tl.constexpr):
    """The codes of consecutive tokens; past the row, a code below every threshold."""
    ids = first + tl.arange(0, SIZE)
    return _code(_processed(row, first, ids, ids < row.vocab_size), ids)


@triton.jit
def _logprob(order, x):
    """The logprob of a logit whose token reaches the threshold."""
    if len(order.log_sum) > 0:
        logprob = _raw_logprob(x, order.m, order.log_sum[0])
    else:
        logprob = _share(_mass(x, order.m, order.scale), order.total)
    return logprob


@triton.jit
def _ranks(order, pivots, memory, CAPACITY: tl.constexpr):
    """How many tokens reach each of three codes, packed: the rank of a token is that of its code.

    None of the codes is below the threshold. It takes a read of the row, unless the candidates hold
    all tokens of the order.
    """
    row = order.row
    if order.is_listed:
        codes, _ = _candidates(memory, order.held, order.m, order.scale, CAPACITY)
        packed = _packed_counts(codes, pivots)
    else:
        packed = tl.zeros([CAPACITY], tl.int64)
        for first in range(0, row.vocab_size, CAPACITY):
            packed += _packed_counts(_processed_codes(row, first, CAPACITY), pivots)
    return tl.sum(packed, axis=0)


@triton.jit
def _look_up(row, ids):
    """Which of some ids exist, their logits and codes."""
    exists = (ids >= 0) & (ids < row.vocab_size)
    ids = tl.where(exists, ids, 0)
    x = _processed(row, None, ids, exists)
    return exists, x, _code(x, ids)


@triton.jit
def _write_asked(order, output, lists, masses, more, num_samples, memory, CONFIG: tl.constexpr):
    """What there is of the drawn tokens and of the ids that the caller has named.

    ``lists`` is () or that of the kind, ``masses`` () or a pointer to the masses of the ids. Three
    tokens at a time share the read that counts their ranks.
    """
    WITH_RANKS: tl.constexpr = CONFIG.lists and len(lists) > 0
    STEP: tl.constexpr = 3 if WITH_RANKS else _SPAN
    lane = tl.arange(0, 4 if WITH_RANKS else _SPAN)
    number = num_samples
    if CONFIG.has_ids:
        number += more.num_ids
    for start in range(0 if WITH_RANKS else num_samples, number, STEP):
        place = start + lane
        is_draw = (place < num_samples) & (lane < STEP)
        of_ids = place - num_samples
        is_id = (of_ids >= 0) & (of_ids < more.num_ids) & (lane < STEP)
        ids = tl.load(output.tokens + place, mask=is_draw, other=-1).to(tl.int32)
        if CONFIG.has_ids:
            ids = tl.where(is_id, tl.load(more.token_ids[0] + of_ids, mask=is_id, other=-1), ids)
        exists, x, codes = _look_up(order.row, ids)
        is_in = exists & (codes >= order.threshold)
        if WITH_RANKS:
            pivots = tl.where(is_in, codes, 0x7FFFFFFFFFFFFFFF)
            p1 = tl.min(tl.where(lane == 0, pivots, 0x7FFFFFFFFFFFFFFF), axis=0)
            p2 = tl.min(tl.where(lane == 1, pivots, 0x7FFFFFFFFFFFFFFF), axis=0)
            p3 = tl.min(tl.where(lane == 2, pivots, 0x7FFFFFFFFFFFFFFF), axis=0)
            packed = _ranks(order, (p1, p2, p3), memory, CONFIG.candidates)
            ranks = ((packed >> (21 * lane)) & 0x1FFFFF).to(tl.int32)
            ranks = tl.where(is_in, ranks, -1)
            tl.store(lists.ranks + place, ranks, mask=is_draw)
            if CONFIG.has_ids:
                tl.store(lists.id_ranks + of_ids, ranks, mask=is_id)
        if CONFIG.has_ids:
            if len(lists) > 0:
                logprobs = tl.where(is_in, _logprob(order, x), -_INF)
                logprobs = tl.where(exists, logprobs, float("nan"))
                tl.store(lists.id_logprobs + of_ids, logprobs, mask=is_id)
            if len(masses) > 0:
                w = tl.where(is_in, _mass(x, order.m, order.scale), 0)
                tl.store(masses[0] + of_ids, w, mask=is_id)


@triton.jit
def _packed_words(bits):
    """Words of 32 bits each, the lowest first."""
    SIZE: tl.constexpr = bits.shape[0]
    bit = tl.reshape(bits.to(tl.int32), [SIZE // 32, 32])
    return tl.sum(bit << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def _write_kept_set(order, kept, first_best, memory, CONFIG: tl.constexpr):
    """The kept set, but for its ids and for what there is of single tokens; how many tokens it has.

    It takes a read of the row, unless the candidates hold the kept set.
    """
    CAPACITY: tl.constexpr = CONFIG.candidates
    row = order.row
    if order.is_listed:
        codes, _ = _candidates(memory, order.held, order.m, order.scale, CAPACITY)
        is_kept = codes >= order.threshold
        counts = is_kept.to(tl.int32)
        last = tl.where(is_kept, codes, 0x7FFFFFFFFFFFFFFF)
        if CONFIG.kept == KEPT_MASK:
            # the words are 0 before; several threads set bits of one word
            ids = (codes & _LAST_ID).to(tl.int32) ^ _LAST_ID
            words = kept.form[0] + (ids >> 5)
            bit = tl.full([CAPACITY], 1, tl.int32) << (ids & 31)
            tl.atomic_or(words, bit, mask=is_kept, sem="relaxed", scope="cta")
    else:
        counts = tl.zeros([CAPACITY], tl.int32)
        last = tl.full([CAPACITY], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for first in range(0, row.vocab_size, CAPACITY):
            codes = _processed_codes(row, first, CAPACITY)
            is_kept = codes >= order.threshold
            counts += is_kept.to(tl.int32)
            if CONFIG.kept == KEPT_ENDS:
                last = tl.minimum(last, tl.where(is_kept, codes, 0x7FFFFFFFFFFFFFFF))
            if CONFIG.kept == KEPT_MASK:
                place = first // 32 + tl.arange(0, CAPACITY // 32)
                inside = place < (row.vocab_size + 31) // 32
                tl.store(kept.form[0] + place, _packed_words(is_kept), mask=inside)
    count = tl.sum(counts, axis=0)
    tl.store(kept.counts, count)
    tl.store(kept.total, order.total)
    if CONFIG.kept == KEPT_ENDS:
        first_id, first_logit, last_id, last_logit = kept.form
        tl.store(first_id, first_best)
        tl.store(first_logit, order.m)
        code = tl.min(last, axis=0)
        if count > 0:
            tl.store(last_id, (code & _LAST_ID).to(tl.int32) ^ _LAST_ID)
            tl.store(last_logit, _value(code >> _ID_BITS))
    return count


@triton.jit
def _list_first(order, wanted, memory, CONFIG: tl.constexpr):
    """The first tokens of an order, as many as are wanted, become the candidates; how many.

    All of them do where there are fewer. Unless the candidates hold all tokens of the order, those
    of pass 3 are taken, and pass 4 where they do not fit.
    """
    CAPACITY: tl.constexpr = CONFIG.candidates
    row, m = order.row, order.m
    none = tl.zeros((), tl.int64)
    top = _first_code(_key(m).to(tl.int64) + 1)
    bound = tl.full((), _LOWEST_KEY, tl.int32)
    held = tl.zeros((), tl.int32) + order.held
    low = order.threshold
    target = tl.zeros((), tl.int64) + wanted
    if order.is_listed:
        codes, _w = _candidates(memory, held, m, order.scale, CAPACITY)
        there = tl.sum((codes >= low).to(tl.int64), axis=0)
        target = tl.maximum(tl.minimum(target, there), 1)
    else:
        keys = _key(order.best)
        bound = _column_bound(keys, _key(m), wanted)
        _, _, num_columns = _choose_columns(keys, bound, memory, CONFIG.tile)
        tiles = (0, row.num_tiles)
        held = _gather(row, tiles, memory, num_columns, bound, False, CONFIG)
        is_there = (held > 0) & (held <= CAPACITY)
        held = tl.where(is_there, held, 0)
        low = tl.where(is_there, _first_code(bound), top)
    listed = Listed(held, low, top, none, none)
    goal = Goal(False, target, none, 0)
    listed, codes, _w, threshold = _find(
        row, memory, listed, bound, order.threshold, m, order.scale, goal, CAPACITY
    )
    threshold = tl.maximum(threshold, order.threshold)
    if (listed.high == top) & (listed.low <= threshold):
        x = _value(codes >> _ID_BITS)
        ids = (codes & _LAST_ID).to(tl.int32) ^ _LAST_ID
        tl.debug_barrier()
        held = _append(memory, 0, x, ids, codes >= threshold, CAPACITY)
        tl.debug_barrier()
    else:
        held = _collect(row, memory, threshold, top, CAPACITY)
    return tl.minimum(held, CAPACITY)


@triton.jit
def _write_first(order, wanted, lists, num_top, kept_ids, num_kept, memory, CONFIG: tl.constexpr):
    """The first tokens of an order, as many as are wanted, each at its place.

    ``lists`` and ``kept_ids`` are () or where they go.
    """
    held = tl.zeros((), tl.int32)
    if wanted > 0:
        held = _list_first(order, wanted, memory, CONFIG)
    some = tl.arange(0, 32)
    others = tl.arange(0, 128)
    for first in range(0, held, 32):
        place = first + some
        inside = place < held
        ids = tl.load(memory.ids + place, mask=inside, other=0)
        x = tl.load(memory.logits + place, mask=inside, other=0).to(tl.float32, bitcast=True)
        codes = _code(x, ids)
        before = tl.zeros([32], tl.int32)
        for other in range(0, held, 128):
            is_other = other + others < held
            other_ids = tl.load(memory.ids + other + others, mask=is_other, other=0)
            other_x = tl.load(memory.logits + other + others, mask=is_other, other=0)
            other_codes = _code(other_x.to(tl.float32, bitcast=True), other_ids)
            is_before = (other_codes[None, :] > codes[:, None]) & is_other[None, :]
            before += tl.sum(is_before.to(tl.int32), axis=1)
        if CONFIG.lists and len(lists) > 0:
            is_top = inside & (before < num_top)
            tl.store(lists.top_ids + before, ids, mask=is_top)
            tl.store(lists.top_logprobs + before, _logprob(order, x), mask=is_top)
        if len(kept_ids) > 0:
            tl.store(kept_ids[0] + before, ids, mask=inside & (before < num_kept))


@triton.jit
def _write_processed(order, output, more, first_best, num_samples, memory, CONFIG: tl.constexpr):
    """All results that are of the kept set."""
    masses = ()
    if (CONFIG.kept > 0) and CONFIG.has_ids:
        masses = (more.kept.id_masses,)
    lists = more.processed
    HAS_LISTS: tl.constexpr = CONFIG.lists and CONFIG.processed
    if CONFIG.has_ids or HAS_LISTS:
        _write_asked(order, output, lists, masses, more, num_samples, memory, CONFIG)
    wanted = tl.zeros((), tl.int32)
    if HAS_LISTS:
        wanted += more.num_top
    kept_ids = ()
    num_kept = 0
    if CONFIG.kept > 0:
        count = _write_kept_set(order, more.kept, first_best, memory, CONFIG)
        if CONFIG.kept == KEPT_IDS:
            kept_ids = more.kept.form
            # where there are more than fit, none is listed
            num_kept = tl.where(count <= more.num_kept, count, 0)
            wanted = tl.maximum(wanted, num_kept)
    if HAS_LISTS or CONFIG.kept == KEPT_IDS:
        _write_first(order, wanted, lists, more.num_top, kept_ids, num_kept, memory, CONFIG)


@triton.jit
def _write_raw(order, output, more, num_samples, memory, CONFIG: tl.constexpr):
    """All raw results but the draws' logprobs."""
    if CONFIG.lists or CONFIG.has_ids:
        _write_asked(order, output, more.raw, (), more, num_samples, memory, CONFIG)
    if CONFIG.lists:
        wanted = tl.zeros((), tl.int32) + more.num_top
        _write_first(order, wanted, more.raw, more.num_top, (), 0, memory, CONFIG)


# The history of a row


@triton.jit
def _history_slot(history, index, num_slots):
    """The slot of row ``index``."""
    slot = tl.load(history.slots + index).to(tl.int64)
    return tl.minimum(tl.maximum(slot, 0), num_slots - 1)


@triton.jit
def text_of(text, slot):
    """The text of a slot."""
    ids, max_length, lengths, prompt_lengths, windows = text
    window = ()
    if len(windows) > 0:
        window = (windows[0] + slot,)
    return Text(ids + slot * max_length, max_length, lengths + slot, prompt_lengths + slot, window)


@triton.jit
def text_length(text):
    """How many ids a slot's text has."""
    return tl.minimum(tl.maximum(tl.load(text.lengths), 0), text.max_length)


@triton.jit
def window_begin(text, length):
    """The first place that counts in a slot's text of this length."""
    begin = tl.zeros((), tl.int64)
    if len(text.windows) > 0:
        window = tl.load(text.windows[0]).to(tl.int64)
        begin = tl.where((window < 0) | (window > length), 0, length - window)
    return begin


@triton.jit
def _text_is_full(history, index, num_slots):
    """Whether the text of row ``index`` has no room for one more id."""
    text = text_of(history.text, _history_slot(history, index, num_slots))
    return text_length(text) >= text.max_length


@triton.jit
def _occur(text, begin, end, ids, SPAN: tl.constexpr):
    """Whether each of the ids is at one of the places begin .. end - 1 of a text."""
    found = tl.zeros([ids.shape[0], SPAN], tl.int32)
    for first in range(begin, end, SPAN):
        place = first + tl.arange(0, SPAN)
        there = tl.load(text.ids + place, mask=place < end, other=-1)
        found |= (ids[:, None] == there[None, :]).to(tl.int32)
    return tl.max(found, axis=1) != 0


@triton.jit
def _times(ids, others, counted):
    """How often each of the ids is among the others that are counted."""
    is_one = (ids[:, None] == others[None, :]) & counted[None, :]
    return tl.sum(is_one.to(tl.int32), axis=1)


@triton.jit
def _overrides(history, slot, counts, index, vocab_size, entries, CONFIG: tl.constexpr):
    """The ids that count as output for this call alone, and those that they push out of a window.

    Entries of equal tokens are equal, so that their order does not matter.
    """
    MOST: tl.constexpr = CONFIG.overrides // 2  # ids of either sort
    added_ids, number = history.extra
    added_ids += index * number
    i = tl.arange(0, MOST)
    added = tl.load(added_ids + i, mask=i < number, other=-1)
    is_added = (added >= 0) & (added < vocab_size)
    entry = tl.arange(0, CONFIG.overrides)
    ids = tl.load(added_ids + entry, mask=entry < number, other=-1)
    is_seen = entry < 0
    fewer = tl.zeros([CONFIG.overrides], tl.int32)
    if CONFIG.has_windows:
        text = text_of(history.text, slot)
        length = text_length(text)
        old_begin = window_begin(text, length)
        # a window of no limit begins at 0 whatever the length is
        begin = window_begin(text, length + tl.sum(is_added.to(tl.int64), axis=0))
        is_added = is_added & (length + tl.cumsum(is_added.to(tl.int64), axis=0) > begin)
        # no more ids leave than are added
        end = tl.minimum(begin, length)
        place = old_begin + i
        leaving = tl.load(text.ids + place, mask=place < end, other=-1)
        was_output = (place < end) & (place >= tl.load(text.prompt_lengths))
        place = old_begin + entry - MOST
        left = tl.load(text.ids + place, mask=(entry >= MOST) & (place < end), other=-1)
        ids = tl.where(entry < MOST, ids, left)
        # what is added is seen while nothing is pushed out
        first = tl.where(begin > old_begin, begin, length)
        is_seen = _occur(text, first, length, ids, 4096 // CONFIG.overrides)
        fewer = _times(ids, leaving, was_output)
    more = _times(ids, added, is_added)
    is_id = (ids >= 0) & (ids < vocab_size)
    count = tl.load(counts + ids, mask=is_id, other=0) - fewer + more
    is_seen |= more > 0
    tl.store(entries + entry, tl.where(is_id, ids, -1))
    tl.store(entries + CONFIG.overrides + entry, tl.where(is_seen, tl.maximum(count, 0), -1))
    tl.debug_barrier()

    GRAIN: tl.constexpr = CONFIG.tile if CONFIG.tile < CONFIG.candidates else CONFIG.candidates
    bit = tl.arange(0, 32)
    is_there = ((ids // GRAIN & 31)[:, None] == bit[None, :]) & is_id[:, None]
    is_there = tl.max(is_there.to(tl.int32), axis=0)
    grains = tl.sum(is_there << bit, axis=0)
    size = tl.full((), CONFIG.overrides, tl.int32)
    return Overrides(entries, size, grains, tl.full((), GRAIN, tl.int32))


# The row


@triton.jit
def _list_of_row(rule_lists, index, vocab_size):
    """The list of row ``index``."""
    bits, before, counts, amounts, capacity = rule_lists
    words = index * ((vocab_size + 31) // 32)
    count = tl.load(counts + index)
    return RuleLists(bits + words, before + words, count, amounts + index * capacity, capacity)


@triton.jit
def _row(
    logits,
    vocab_size,
    num_tiles,
    batch,
    bias_size,
    index,
    params,
    by_slot,
    mask,
    history,
    num_slots,
    lowered,
    workspace,
    CONFIG: tl.constexpr,
):
    """What steps 1 to 6 need of row ``index``; ``logits`` points to it, ``params`` is its entry.

    Overrides are written to the beginning of ``workspace``.
    """
    tail_ids = vocab_size // CONFIG.align * CONFIG.align + tl.arange(0, CONFIG.align)
    tail = tl.load(logits + tail_ids, mask=tail_ids < vocab_size, other=-_INF)
    bias = ()
    if CONFIG.has_bias:
        start = tl.load(batch.logit_bias_offsets + params)
        start = tl.minimum(tl.maximum(start, 0), bias_size)
        if len(by_slot) > 0:
            end = start + tl.load(by_slot.bias_counts + params)
        else:
            end = tl.load(batch.logit_bias_offsets + params + 1)
        end = tl.minimum(tl.maximum(end, start), bias_size)
        count = tl.minimum(end - start, _MOST_BIASES).to(tl.int32)
        bias = (batch.logit_bias_ids + start, batch.logit_bias_values + start, count)
    row_mask = ()
    if len(mask) > 0:
        words, stride = mask
        row_mask = (words + index * stride,)
    row_history = ()
    if len(history) > 0:
        slot = _history_slot(history, index, num_slots)
        seen = history.seen + slot * history.seen_stride
        counts = history.counts + slot * history.counts_stride
        repetition = tl.load(batch.repetition_penalty + params)
        frequency = tl.load(batch.frequency_penalty + params)
        presence = tl.load(batch.presence_penalty + params)
        scope = ()
        if CONFIG.any_output_scope:
            scope = (tl.load(batch.repetition_penalty_scope + params),)
        overrides = ()
        if CONFIG.overrides > 0:
            overrides = _overrides(history, slot, counts, index, vocab_size, workspace, CONFIG)
        row_history = History(
            seen,
            counts,
            history.lengths + slot,
            repetition,
            frequency,
            presence,
            scope,
            overrides,
        )
    return Row(logits, tail, vocab_size, num_tiles, bias, row_mask, row_history, lowered, ())


@triton.jit
def _with_division(row, division):
    """The same row with another division in step 3."""
    logits, tail, vocab_size, num_tiles, bias, mask, history, lowered, _ = row
    return Row(logits, tail, vocab_size, num_tiles, bias, mask, history, lowered, division)


@triton.jit
def _maxima(row, tiles, CONFIG: tl.constexpr):
    """Pass 1: each column's largest logit, the first tile that has it, _NAN_BIT if a NaN was seen.

    ``tiles`` is the first tile that is read, and the one after the last. The pass is repeated with
    tl.div_rn if it meets a logit for which _quotient is not exact. Also returns the row with the
    division that the other passes must use.
    """
    TILE: tl.constexpr = CONFIG.tile
    column = tl.arange(0, TILE)
    best = tl.full([TILE], -_INF, tl.float32)
    best_tile = tl.zeros([TILE], tl.int32)
    inverse = 1.0
    use_division = tl.zeros((), tl.int32)
    if len(row.history) > 0:
        r = row.history.repetition
        inverse = tl.div_rn(1.0, r)
        use_division = ((r > _FAR) | (r < 1.0 / _FAR)).to(tl.int32)
    flags = tl.full((), _DIVISION_BIT, tl.int32)
    while flags >= _DIVISION_BIT:
        current = _with_division(row, (inverse, use_division))
        best = tl.full([TILE], -_INF, tl.float32)
        best_tile = tl.zeros([TILE], tl.int32)
        for tile in tl.range(tiles[0], tiles[1], num_stages=CONFIG.stages):
            ids = tile * TILE + column
            x, new_flags = _processed_and_flags(current, tile * TILE, ids, ids < row.vocab_size)
            is_better = x > best
            best = tl.where(is_better, x, best)
            best_tile = tl.where(is_better, (best_tile & _FLAG_BITS) | tile, best_tile) | new_flags
        flags = tl.max(best_tile & _DIVISION_BIT, axis=0) | tl.max(best_tile & _NAN_BIT, axis=0)
        use_division = tl.where(flags >= _DIVISION_BIT, 1, use_division)
    return best, best_tile & (_NAN_BIT - 1), flags, _with_division(row, (inverse, use_division))


@triton.jit
def _is_named_once(slots, index):
    """Whether row ``index`` is the only row of the launch with its slot."""
    own = tl.load(slots + index)
    rows = tl.num_programs(0)
    named = tl.zeros((), tl.int32)
    for first in range(0, rows, 128):
        row = first + tl.arange(0, 128)
        named += tl.sum((tl.load(slots + row, mask=row < rows, other=-1) == own).to(tl.int32))
    return named == 1


@triton.jit
def _advance(position, history, text, token, vocab_size):
    """Add 1 to the row's position and the token to its output, unless it is -1.

    ``position`` is () where positions are not advanced, ``text`` () or the slot's.
    """
    if len(position) > 0:
        produced = (token >= 0).to(tl.int64)
        tl.store(position[0], tl.load(position[0]) + produced)
    if len(history) > 0:
        if len(text) > 0:
            _record_in_text(history, text, token, vocab_size)
        else:
            # All threads have read the history before any of it changes.
            tl.debug_barrier()
            if token >= 0:
                _count(history, token)
                tl.store(history.length, tl.load(history.length) + 1)


@triton.jit
def _count(history, token):
    """Set a token's bit and add 1 to its count."""
    word = tl.load(history.seen + (token >> 5))
    tl.store(history.seen + (token >> 5), word | (1 << (token & 31)))
    tl.store(history.counts + token, tl.load(history.counts + token) + 1)


@triton.jit
def _record_in_text(history, text, token, vocab_size):
    """Add a token, unless it is -1, to the output, the text and the window of a slot.

    ``enters`` says whether the window takes the token; ``left`` is the id that leaves the window,
    or -1.
    """
    length = text_length(text)
    # A full text was seen before the draw; this length is loaded anew, and limits the store below.
    token = tl.where(length < text.max_length, token, -1)
    enters = token >= 0
    left = tl.full((), -1, tl.int32)
    was_output = 0
    stays = False
    if len(text.windows) > 0:
        enters &= tl.load(text.windows[0]) != 0
        begin = window_begin(text, length)
        next_begin = window_begin(text, length + 1)
        leaves = (token >= 0) & (begin < next_begin) & (begin < length)
        left = tl.load(text.ids + begin, mask=leaves, other=-1)
        left = tl.where((left >= 0) & (left < vocab_size), left, -1)
        was_output = (begin >= tl.load(text.prompt_lengths)).to(tl.int32)
        # An id that leaves keeps its bit if the next window has it at another place.
        end = tl.where(left >= 0, length, next_begin)
        found = tl.zeros([_SPAN], tl.int32)
        for first in range(next_begin, end, _SPAN):
            place = first + tl.arange(0, _SPAN)
            there = tl.load(text.ids + place, mask=place < end, other=-1)
            found |= (there == left).to(tl.int32)
        stays = tl.max(found, axis=0) != 0
    # All threads have read the history before any of it changes. From here on every value is that
    # of a single token or place, and one thread stores it after it has loaded the old one.
    tl.debug_barrier()
    if left >= 0:
        word = tl.load(history.seen + (left >> 5))
        word = tl.where(stays, word, word & ~(1 << (left & 31)))
        tl.store(history.seen + (left >> 5), word)
        tl.store(history.counts + left, tl.load(history.counts + left) - was_output)
    if enters:
        _count(history, token)
    if token >= 0:
        tl.store(text.ids + length, token)
        tl.store(text.lengths, length + 1)
        tl.store(history.length, tl.load(history.length) + 1)


@triton.jit
def _write_filtered(
    row, vocab_size, num_tiles, filtered, threshold, m, temperature, TILE: tl.constexpr
):
    """A read of the row: logits over temperature, -inf below the threshold and where it has none.

    The largest logit m is subtracted first where its quotient would not be finite. What is kept is
    finite.
    """
    is_finite = tl.abs(tl.div_rn(m, temperature)) < _INF
    base = tl.where(is_finite, 0.0, m)
    most = tl.where(is_finite, _INF, 0.0)
    for tile in range(0, num_tiles):
        ids = tile * TILE + tl.arange(0, TILE)
        x = _processed(row, tile * TILE, ids, ids < row.vocab_size)
        # the minimum of NaN, which inf - inf is, and a number is the number
        divided = tl.div_rn(tl.minimum(x - base, most), temperature)
        finite = tl.maximum(divided, _LOWEST)
        kept = tl.where(_code(x, ids) >= threshold, finite, -_INF)
        tl.store(filtered + ids, kept, mask=ids < vocab_size)


@triton.jit(do_not_specialize=["bias_size", "num_slots"])  # they change from step to step
def sample_kernel(
    logits,
    logits_stride,
    vocab_size,
    num_tiles,
    batch,
    bias_size,
    by_slot,
    mask,
    history,
    num_slots,
    rule_lists,
    record,
    workspace,
    workspace_stride,
    counters,
    results,
    more,
    filtered,
    filtered_stride,
    num_samples,
    CONFIG: tl.constexpr,
):
    """Row ``program_id(0)`` of a batch: draw its tokens, or write its filtered logits.

    If there are parts, part ``program_id(1)`` of it; ``counters`` is a pointer to 0 for each row.

    ``batch`` has a BatchParams' tensors by their names, and ``bias_size`` is the number of biases
    of all rows. ``by_slot`` is () or a BySlot. ``mask`` is (mask, stride), ``history`` a Histories,
    ``rule_lists`` a RuleLists, ``record`` (a pointer to bytes,), ``results`` (tokens, processed
    logprobs, raw logprobs, masses, status), ``more`` a More. Without ``results`` the filtered
    logits are written.
    """
    index = tl.program_id(0).to(tl.int64)
    params = index
    own_size, own_tiles, status_of_nothing = vocab_size, num_tiles, _NO_CANDIDATE
    if len(by_slot) > 0:
        params = tl.load(by_slot.slots + index).to(tl.int64)
        status_of_nothing = tl.where(params == -1, 0, _NO_CANDIDATE)
        exists = (params >= 0) & (params < by_slot.capacity)
        params = tl.where(exists, params, 0)
        # no logit is read of a row without parameters, so none is found that could be drawn
        own_size, own_tiles = tl.where(exists, vocab_size, 0), tl.where(exists, num_tiles, 0)
    temperature = tl.load(batch.temperature + params)
    temperature = tl.where((temperature >= 0.0) & (temperature < _INF), temperature, 1.0)
    is_greedy = tl.full((), 1, tl.int1)
    if CONFIG.any_random:
        is_greedy = temperature == 0.0
    filters = ()
    if CONFIG.parts > 1:
        # All programs of a row decide alike: a launch does not change what this depends on.
        if CONFIG.any_filter:
            filters = _filters(batch, params, vocab_size)
        is_split = _may_be_split(is_greedy, filters, vocab_size, CONFIG)
        part = tl.program_id(1)
        if is_split == 0:
            _arrive(counters + index, CONFIG)
        if (is_split == 0) & (part > 0):
            return
    is_recorded = tl.full((), 1, tl.int1)
    if len(record) > 0:
        is_recorded = tl.load(record[0] + index) != 0
    if CONFIG.records_text:
        # a row without room for its token has no logits, like one without parameters
        has_room = (is_recorded & _text_is_full(history, index, num_slots)) == 0
        status_of_nothing = tl.where(has_room | (own_size == 0), status_of_nothing, _TEXT_FULL)
        own_size, own_tiles = tl.where(has_room, own_size, 0), tl.where(has_room, own_tiles, 0)
    logits += index * logits_stride
    workspace += index * workspace_stride
    own = workspace
    tiles = (0, own_tiles)
    if CONFIG.parts > 1:
        own += part * CONFIG.part_words
        parts = tl.where(is_split, CONFIG.parts, 1)
        tiles = (part * own_tiles // parts, (part + 1) * own_tiles // parts)
    lowered = ()
    if len(rule_lists) > 0:
        lowered = _list_of_row(rule_lists, index, vocab_size)
    row = _row(
        logits,
        own_size,
        own_tiles,
        batch,
        bias_size,
        index,
        params,
        by_slot,
        mask,
        history,
        num_slots,
        lowered,
        own,
        CONFIG,
    )

    best, best_tile, flags, row = _maxima(row, tiles, CONFIG)
    m = tl.max(best, axis=0)
    first_best = tl.where(best == m, best_tile * CONFIG.tile + tl.arange(0, CONFIG.tile), _LAST_ID)
    first_best = tl.min(first_best, axis=0)
    merged = ()
    if CONFIG.parts > 1:
        inverse, use_division = row.division
        bound = tl.full((), _LOWEST_KEY, tl.int32)
        held = tl.zeros((), tl.int32)
        is_last = is_split == 0
        if is_split:
            _hand_over(
                row,
                tiles,
                filters,
                is_greedy,
                temperature,
                best,
                m,
                first_best,
                flags,
                own,
                CONFIG,
            )
            is_last = _arrive(counters + index, CONFIG)
        if is_last == 0:
            return
        if is_split:
            m, first_best, flags = _merged_maxima(workspace, vocab_size, CONFIG)
            use_division = ((flags & _DIVISION_BIT) != 0).to(tl.int32)
            if CONFIG.any_filter:
                bound, held = _merged_lists(workspace, vocab_size, CONFIG)
        row = _with_division(row, (inverse, use_division))
        merged = Merged(is_split, bound, held)
    is_empty = m == -_INF
    output = ()
    if len(results) > 0:
        tokens, logprobs, raw_logprobs, drawn_masses, status = results
        bits = tl.where((flags & _NAN_BIT) != 0, _NAN_SEEN, 0)
        bits += is_empty.to(tl.int32) * status_of_nothing
        bits += (m == _INF).to(tl.int32) * _POS_INF_SEEN
        tl.store(status + index, bits)
        first_draw = index * num_samples
        if CONFIG.processed:
            logprobs = (logprobs + first_draw,)
        raw = ()
        if CONFIG.raw:
            raw_logprobs += first_draw
            raw_max, raw_log_sum, raw_best = _raw_log_sum(row, CONFIG)
            raw = (raw_logprobs, row.logits, raw_max, raw_log_sum)
        if CONFIG.kept > 0:
            drawn_masses = (drawn_masses + first_draw,)
        output = Output(tokens + first_draw, logprobs, raw, drawn_masses)

    # 8 greedy: the first of the order; and a row without candidates
    token = tl.where(is_empty, -1, first_best)
    threshold = tl.where(is_empty, 0x7FFFFFFFFFFFFFFF, _code(m, first_best))
    smallest = token
    total = tl.full((), _WHOLE if len(more) > 0 else 1, tl.int64)
    scale = tl.full((), 1.0, tl.float32)
    held = tl.full((), 1, tl.int32)
    is_listed = is_greedy
    if is_empty | is_greedy:
        if len(output) > 0:
            for draw in range(0, num_samples):
                _write(output, draw, token, total, total)
    elif CONFIG.any_random:
        scale = tl.div_rn(_LOG2_E, temperature)
        memory = _memory(workspace + CONFIG.parts * CONFIG.part_words, CONFIG)
        held = 0
        is_listed = False
        if CONFIG.any_filter:
            threshold, masses, held, is_listed = _kept(
                row,
                _filters(batch, params, vocab_size),
                best,
                m,
                scale,
                memory,
                merged,
                len(output) > 0,
                CONFIG,
            )
        else:
            threshold = _first_code(tl.full((), _LOWEST_KEY, tl.int64))
            if len(output) > 0:
                masses = _tile_masses(row, None, m, scale, None, CONFIG)

        if len(output) > 0:
            if CONFIG.position_of == POSITION_OF_SLOT:
                position = tl.load(batch.position + params)
            else:
                position = tl.load(batch.position + index)
            if CONFIG.position_of == POSITION_OF_TEXT:
                position += 1 - tl.load(by_slot.prompt_lengths[0] + params)
            random = (tl.load(batch.seed + params), position)
            if is_listed:
                token, smallest, total = _draw_from_candidates(
                    memory,
                    held,
                    threshold,
                    m,
                    scale,
                    random,
                    num_samples,
                    output,
                    CONFIG.candidates,
                )
            else:
                token, smallest, total = _draw_by_tile(
                    row, masses, threshold, m, scale, random, num_samples, output, CONFIG
                )
            if smallest < 0:
                # the thread that stores is the one that has stored the bits above
                tl.store(status + index, tl.load(status + index) | _NO_CANDIDATE)

    if len(more) > 0:
        of_row = _more_of_row(more, index, num_samples, vocab_size, CONFIG)
        _clear(of_row, num_samples, vocab_size, CONFIG)
        if smallest < 0:
            token = tl.full((), -1, tl.int32)
            _clear_draws(output, num_samples)
        else:
            memory = _memory(workspace + CONFIG.parts * CONFIG.part_words, CONFIG)
            if is_greedy:
                # the only candidate
                tl.debug_barrier()
                tl.store(memory.logits, m.to(tl.int32, bitcast=True))
                tl.store(memory.ids, first_best)
                tl.debug_barrier()
            if CONFIG.processed or (CONFIG.kept > 0):
                if CONFIG.parts > 1:
                    # the maxima of a part are not those of the row
                    best = tl.where(is_split, -_INF, best)
                order = Order(row, threshold, best, m, scale, total, (), held, is_listed)
                _write_processed(order, output, of_row, first_best, num_samples, memory, CONFIG)
            if CONFIG.raw:
                raw_row = Row(
                    row.logits, row.tail, row.vocab_size, row.num_tiles, (), (), (), (), ()
                )
                lowest = _first_code(tl.full((), _LOWEST_KEY, tl.int64))
                log_sum = (raw_log_sum,)
                order = Order(
                    raw_row, lowest, raw_best, raw_max + 0.0, 1.0, total, log_sum, 0, False
                )
                _write_raw(order, output, of_row, num_samples, memory, CONFIG)

    if len(output) == 0:
        _write_filtered(
            row,
            vocab_size,
            num_tiles,
            filtered + index * filtered_stride,
            threshold,
            m,
            tl.where(is_greedy, 1.0, temperature),
            CONFIG.tile,
        )
    if CONFIG.advance:
        place = (batch.position + index,)
        if CONFIG.position_of == POSITION_OF_SLOT:
            place = (batch.position + params,)
        if CONFIG.position_of == POSITION_OF_TEXT:
            place = ()
        if len(by_slot) > 0:
            is_alone = _is_named_once(by_slot.slots, index)
            if len(history) > 0:
                is_alone &= _is_named_once(history.slots, index)
            token = tl.where(is_alone, token, -1)
        if len(record) > 0:
            token = tl.where(is_recorded, token, -1)
        text = ()
        if CONFIG.records_text:
            text = text_of(history.text, _history_slot(history, index, num_slots))
        _advance(place, row.history, text, token, vocab_size)
