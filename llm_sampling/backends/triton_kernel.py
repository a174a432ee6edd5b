"""The sampling kernel in Triton: all of docs/semantics.md in one launch, with its step numbers.

One program owns one row. A tile is BLOCK tokens; lane l of it holds the tokens l, l + BLOCK, ….
The key of a logit is its order as an int32; the code of a token is its place in the order of step 7
as an int64. So a kept set is a cut, the tokens whose code is at least that; every filter is a cut,
and of several the largest holds.

Passes over the row; a read is V logits loaded:

1. Maxima. Every lane keeps its largest logit. A greedy row ends here: 1 read.
2. Mass, where step 12 or the draw needs that of every token: the mass of each tile. An unfiltered
   row ends here, with a tile's pieces up to the drawn token for each draw: 2 reads.
3. Candidates. The n-th largest lane maximum bounds the n-th largest logit from below, so the first
   n of the order are in the lanes that reach it, n or a few more. What of those reaches the bound
   goes to the slab in id order; the filters and the draws end in it. For top-p, pass 2 stores the
   lanes on its way, so that a row with its nucleus in the slab takes 2 reads. For top-k and min-p
   the lanes alone are read again: 1 read, and n / BLOCK of one (1.01 for k = 50, 1.3 for 1,024).
4. Search, where the slab would overflow (a nucleus of more than NUCLEUS tokens, k beyond 1,500):
   each pass counts and weighs what reaches three codes, until what lies between two of them fits
   the slab; one more read fills it. The first three codes are those of a sample of SLAB tokens: 2
   to 5 reads. A code has 52 bits and a later pass tells one or more, so that every search ends.
5. Mass of the kept set, where the slab does not hold all of it: 1 read, then draws by tiles.

"raw" logprobs take 1 read more, and so does writing the filtered logits. So does a row with a
repetition penalty where that meets a logit far from 1: pass 1 is done again with another division.

Loads. A thread loads 16 bytes at once if rows begin at multiples of 16 logits. Where V is no such
multiple, the last few logits of a row are kept in registers and put in their place in every pass.

Hazards. The workspace is global memory that the program writes and reads: a barrier stands between,
and one before the next writes. A masked lane holds -inf, whose code is below every cut and whose
mass is 0. Programs share nothing: no two rows have the same slot of the history.

Nothing here may be fused into multiply-adds but where tl.fma says so: enable_fp_fusion=False.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ID_BITS = tl.constexpr(20)
_LAST_ID = tl.constexpr(2**20 - 1)
_LOWEST_KEY = tl.constexpr(-2139095040)  # of -3.4028235e38; that of -inf is one less
_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_C0 = tl.constexpr(float.fromhex("0x1.000000p+0"))
_C1 = tl.constexpr(float.fromhex("-0x1.62e3b2p-1"))
_C2 = tl.constexpr(float.fromhex("0x1.ebe206p-3"))
_C3 = tl.constexpr(float.fromhex("-0x1.c4eb2cp-5"))
_C4 = tl.constexpr(float.fromhex("0x1.2d4322p-7"))
_C5 = tl.constexpr(float.fromhex("-0x1.eca6f0p-11"))
_INF = tl.constexpr(float("inf"))
_NAN_BIT = tl.constexpr(2**20)
_WIDE_BIT = tl.constexpr(2**21)
_FLAGS = tl.constexpr(2**21 + 2**20)
_FAR = tl.constexpr(2.0**40)  # from 1, for a quotient by _quotient
_NAN_SEEN = tl.constexpr(1)
_NO_CANDIDATE = tl.constexpr(2)
_POS_INF_SEEN = tl.constexpr(4)
PROCESSED = tl.constexpr(1)
RAW = tl.constexpr(2)


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
def _loaded(logits, tail, vocab_size, first, ids, inside):
    """1 widen: some logits, and -inf where not inside.

    ``tail`` has the logits past the last whole group of as many. A mask that is the same for every
    group lets a thread load 16 bytes at once.
    """
    GROUP: tl.constexpr = tail.shape[0]
    if GROUP == 1 or first is None:
        x = tl.load(logits + ids, mask=inside, other=-_INF)
    else:
        GROUPS: tl.constexpr = ids.shape[0] // GROUP
        x = tl.load(logits + ids, mask=ids // GROUP < vocab_size // GROUP, other=-_INF)
        is_tail = first // GROUP + tl.arange(0, GROUPS) == vocab_size // GROUP
        x = tl.where(is_tail[:, None], tail[None, :], tl.reshape(x, [GROUPS, GROUP]))
        x = tl.reshape(x, [ids.shape[0]])
    return _widened(x)


@triton.jit
def _quotient(x, r, inverse):
    """The quotient x / r, rounded once, where nothing comes near over- or underflow.

    ``inverse`` is 1 / r, rounded once. The second correction is exact by P. Markstein, Computation
    of elementary functions on the IBM RISC System/6000 processor, 1990.
    """
    q = x * inverse
    q = tl.fma(tl.fma(-q, r, x), inverse, q)
    return tl.fma(tl.fma(-q, r, x), inverse, q)


@triton.jit
def _bits(words, first, ids, inside, vocab_size):
    """Bit ``id & 31`` of word ``id >> 5``, as a boolean; False where not inside.

    ``first`` is the id that begins a whole number of words, or None where the ids have no order.
    """
    if first is None:
        word = tl.load(words + (ids >> 5), mask=inside, other=0)
        is_set = ((word >> (ids & 31)) & 1) != 0
    else:
        # one load for 32 tokens
        number = tl.arange(0, ids.shape[0] // 32)
        word = tl.load(
            words + (first // 32 + number), mask=first + number * 32 < vocab_size, other=0
        )
        word = tl.reshape(tl.broadcast_to(word[:, None], [ids.shape[0] // 32, 32]), [ids.shape[0]])
        is_set = (((word >> (ids & 31)) & 1) != 0) & inside
    return is_set


@triton.jit
def _processed_and_flags(
    row,
    first,
    ids,
    inside,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
):
    """Steps 1 to 6 of some tokens, -inf where not inside; and the bits _NAN_BIT and _WIDE_BIT."""
    logits, tail, vocab_size, bias, mask, history, wide = row
    # 1 widen
    x = _loaded(logits, tail, vocab_size, first, ids, inside)

    # 2 bias, mask
    if HAS_BIAS:
        bias_ids, bias_values, bias_count = bias
        # the number of biases with a smaller id, by halving; they are in id order
        place = tl.zeros_like(ids)
        step = bias_count
        step |= step >> 1
        step |= step >> 2
        step |= step >> 4
        step |= step >> 8
        step |= step >> 16
        step = (step + 1) >> 1
        while step > 0:
            there = place + step <= bias_count
            id_there = tl.load(bias_ids + place + step - 1, mask=there, other=0)
            place = tl.where(there & (id_there < ids), place + step, place)
            step = step >> 1
        there = place < bias_count
        found = there & (tl.load(bias_ids + place, mask=there, other=-1) == ids)
        x = tl.where(found, x + tl.load(bias_values + place, mask=found, other=0.0), x)
    if HAS_MASK:
        x = tl.where(_bits(mask, first, ids, inside, vocab_size), x, -_INF)

    flags = tl.zeros_like(ids)
    if HAS_HISTORY:
        seen, counts, r, inverse, a, b = history
        if (r != 1.0) | (a != 0.0) | (b != 0.0):
            is_seen = _bits(seen, first, ids, inside, vocab_size)
            count = tl.load(counts + ids, mask=is_seen, other=0)
            # 3 repetition penalty: prompt and output
            if wide != 0:
                divided = tl.div_rn(x, r)
            else:
                divided = _quotient(x, r, inverse)
                is_near_1 = (x >= 1.0 / _FAR) & (x <= _FAR)
                flags = tl.where(is_seen & (x > 0.0) & (is_near_1 == 0), _WIDE_BIT, 0)
            x = tl.where(is_seen, tl.where(x > 0.0, divided, x * r), x)
            # 4 frequency penalty, 5 presence penalty: output
            x = tl.where(count > 0, x - a * count.to(tl.float32), x)
            x = tl.where(count > 0, x - b, x)

    # 6 canonical
    flags = tl.where(x != x, flags | _NAN_BIT, flags)
    return tl.maximum(x + 0.0, -_INF), flags  # of NaN and a number, maximum gives the number


@triton.jit
def _processed(
    row,
    first,
    ids,
    inside,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
):
    x, _ = _processed_and_flags(row, first, ids, inside, HAS_BIAS, HAS_MASK, HAS_HISTORY)
    return x


@triton.jit
def _key(x):
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
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
    p = p + _C4
    p = p * f
    p = p + _C3
    p = p * f
    p = p + _C2
    p = p * f
    p = p + _C1
    p = p * f
    p = p + _C0
    # trunc(p * 2^24) without one: floats from 0.5 to 1 are 2^-24 apart and their bits are 1 apart
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


@triton.jit
def _packed_counts(codes, p1, p2, p3):
    """How many codes reach each of three, 21 bits each."""
    packed = (codes >= p1).to(tl.int64)
    packed += (codes >= p2).to(tl.int64) << 21
    packed += (codes >= p3).to(tl.int64) << 42
    return packed


@triton.jit
def _narrow(bracket, p1, p2, p3, packed, w1, w2, w3, by_mass, target):
    """The part of a bracket, cut by three codes, in which the target is reached.

    A bracket is two codes and what reaches each: the lower reaches the target, or is the lowest;
    the upper does not.
    """
    low, high, n_low, n_high, w_high = bracket
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
    return low, high, n_low, n_high, w_high


@triton.jit
def _quarters(low, high):
    """Three codes that cut a bracket in four."""
    size = high - low
    return low + size // 4, low + size // 2, low + size * 3 // 4


@triton.jit
def _cut(codes, w, bracket, by_mass, target):
    """The lower code of a bracket with all of its tokens given, narrowed to a single one."""
    low, high, n_low, n_above, w_above = bracket
    n_high = n_above
    w_high = w_above
    while n_low - n_high > 1:
        p1, p2, p3 = _quarters(low, high)
        packed = tl.sum(_packed_counts(codes, p1, p2, p3), axis=0)
        packed += n_above * (1 + (1 << 21) + (1 << 42))
        w1 = tl.sum(tl.where(codes >= p1, w, 0), axis=0) + w_above
        w2 = tl.sum(tl.where(codes >= p2, w, 0), axis=0) + w_above
        w3 = tl.sum(tl.where(codes >= p3, w, 0), axis=0) + w_above
        bracket = (low, high, n_low, n_high, w_high)
        low, high, n_low, n_high, w_high = _narrow(
            bracket, p1, p2, p3, packed, w1, w2, w3, by_mass, target
        )
    return low


@triton.jit
def _lane_bound(keys, top_key, wanted):
    """A key that at least ``wanted`` of the lanes reach, and not many more; or the lowest."""
    low = tl.full((), _LOWEST_KEY, tl.int64)
    high = top_key.to(tl.int64) + 1
    none = tl.zeros((), tl.int64)
    reaching = tl.sum((keys >= _LOWEST_KEY).to(tl.int64), axis=0)
    enough = wanted + wanted // 8 + 16
    while (reaching > enough) & (high - low > 1):
        p1, p2, p3 = _quarters(low, high)
        packed = _packed_counts(keys, p1.to(tl.int32), p2.to(tl.int32), p3.to(tl.int32))
        low, high, reaching, _, _ = _narrow(
            (low, high, reaching, none, none),
            p1,
            p2,
            p3,
            tl.sum(packed, axis=0),
            none,
            none,
            none,
            False,
            wanted,
        )
    return low.to(tl.int32)


@triton.jit
def _depth_bound(m, scale, cut):
    """13 min-p: the lowest key whose depth is at most the cut. The depth grows as the key falls."""
    low = tl.full((), _LOWEST_KEY - 1, tl.int64)  # as if too deep
    high = _key(m).to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        x = _value(middle)
        near = tl.where(x == m, 0.0, (m - x) * scale) <= cut
        high = tl.where(near, middle, high)
        low = tl.where(near, low, middle)
    return high


@triton.jit
def _three_codes(v1, v2, v3, low, high):
    """The codes of three values, in order and inside a bracket of at least five keys."""
    k1 = _key(v1).to(tl.int64)
    k2 = _key(v2).to(tl.int64)
    k3 = _key(v3).to(tl.int64)
    first = tl.minimum(tl.minimum(k1, k2), k3)
    last = tl.maximum(tl.maximum(k1, k2), k3)
    middle = k1 + k2 + k3 - first - last
    least = (low >> _ID_BITS) + 1
    most = (high - 1) >> _ID_BITS
    p1 = _first_code(tl.minimum(tl.maximum(first, least), most))
    p2 = _first_code(tl.minimum(tl.maximum(middle, least), most))
    p3 = _first_code(tl.minimum(tl.maximum(last, least), most))
    return p1, p2, p3


@triton.jit
def _pivots(low, high):
    """Three codes that cut a bracket: two by thirds of the logits, one by half of the keys.

    A row's bulk is met in few passes by the former, and no row takes many for the latter.
    """
    low_key = low >> _ID_BITS
    high_key = (high - 1) >> _ID_BITS
    bottom = _value(low_key)
    top = _value(high_key)
    third = 0.33333334
    v1 = bottom * (1.0 - third) + top * third
    v2 = bottom * third + top * (1.0 - third)
    v3 = _value((low_key + high_key + 1) >> 1)
    p1, p2, p3 = _three_codes(v1, v2, v3, low, high)
    q1, q2, q3 = _quarters(low, high)
    is_wide = high_key - low_key >= 4
    return tl.where(is_wide, p1, q1), tl.where(is_wide, p2, q2), tl.where(is_wide, p3, q3)


@triton.jit
def _sampled_pivots(codes, w, low, high, each, w_between, by_mass, amount):
    """Three codes: where a sample reaches its share of the amount, and some deviations off.

    The amount is counted from the upper code down; the deviations are standard ones of a share.
    ``each`` is how many tokens one of the sample stands for, ``w_between`` the bracket's mass.
    """
    inside = (codes >= low) & (codes < high)
    codes = tl.where(inside, codes, low - 1)
    w = tl.where(inside, w, 0)
    n = tl.sum(inside.to(tl.int64), axis=0)
    of_sample = tl.where(by_mass, tl.sum(w, axis=0), n).to(tl.float32)
    of_all = tl.maximum(tl.where(by_mass, w_between, n * each), 1)
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
        target = tl.maximum((part * of_sample).to(tl.int64), 1)
        p1 = _cut(codes, w, (low, high, n, none, none), by_mass, target)
        p3 = tl.where(i == 0, p1, p3)
        p2 = tl.where(i == 1, p1, p2)
    return p1, p2, p3


@triton.jit
def _append(slab, held, x, ids, wanted, SLAB: tl.constexpr):
    """Add the wanted tokens to the slab, in their order, as far as there is room."""
    place = held + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    room = wanted & (place < SLAB)
    tl.store(slab + place, x.to(tl.int32, bitcast=True), mask=room)
    tl.store(slab + SLAB + place, ids, mask=room)
    return held + tl.sum(wanted.to(tl.int32), axis=0)


@triton.jit
def _slab(slab, held, m, scale, SLAB: tl.constexpr):
    """The slab's codes and mass; a code below every cut and no mass where it is not filled."""
    place = tl.arange(0, SLAB)
    filled = place < held
    x = tl.load(slab + place, mask=filled, other=0).to(tl.float32, bitcast=True)
    ids = tl.load(slab + SLAB + place, mask=filled, other=0)
    x = tl.where(filled, x, -_INF)
    return _code(x, ids), _mass(x, m, scale)


@triton.jit
def _tile_masses(
    row,
    cut,
    m,
    scale,
    vocab_size,
    tiles,
    store,
    num_lanes,
    place,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A read of the row: the mass of every tile's tokens, or of those that reach the cut."""
    tile = tl.arange(0, TILES)
    masses = tl.zeros([TILES], tl.int64)
    for t in tl.range(0, tiles, num_stages=STAGES):
        ids = t * BLOCK + tl.arange(0, BLOCK)
        x = _processed(row, t * BLOCK, ids, ids < vocab_size, HAS_BIAS, HAS_MASK, HAS_HISTORY)
        w = _mass(x, m, scale)
        if cut is not None:
            w = tl.where(_code(x, ids) >= cut, w, 0)
        masses = tl.where(tile == t, tl.sum(w, axis=0), masses)
        if STORE:
            tl.store(store + t * num_lanes + place, x.to(tl.int32, bitcast=True), mask=place >= 0)
    return masses


@triton.jit
def _raw_log_sum(logits, tail, vocab_size, tiles, BLOCK: tl.constexpr):
    """A read of the row: the largest raw logit m, and ln of the sum of exp(x - m)."""
    m = tl.full((), -_INF, tl.float32)
    total = tl.zeros((), tl.float32)
    for t in range(0, tiles):
        ids = t * BLOCK + tl.arange(0, BLOCK)
        x = _loaded(logits, tail, vocab_size, t * BLOCK, ids, ids < vocab_size)
        x = tl.where(x != x, -_INF, x)
        larger = tl.maximum(m, tl.max(x, axis=0))
        total = total * tl.where(m == larger, 1.0, tl.exp(m - larger))
        total += tl.sum(tl.where(x == larger, 1.0, tl.exp(x - larger)), axis=0)
        m = larger
    return m, tl.log(total)


@triton.jit
def _logprob(logits, token, w, total, raw, MODE: tl.constexpr):
    """Natural logarithm of the token's share of what was drawn from, or of the raw logits."""
    if MODE == PROCESSED:
        result = tl.log(tl.div_rn(w.to(tl.float32), total.to(tl.float32)))
    else:
        m, log_sum = raw
        x = _widened(tl.load(logits + token))
        result = tl.where(x == m, 0.0, x - m) - log_sum
    return result


@triton.jit
def _write(output, draw, token, w, total, MODE: tl.constexpr):
    """A draw's token, and its logprob; -1 and NaN where there was no candidate."""
    tokens, logprobs, logits, raw = output
    tl.store(tokens + draw, token.to(tl.int64))
    if MODE:
        logprob = _logprob(logits, tl.maximum(token, 0), w, total, raw, MODE)
        tl.store(logprobs + draw, tl.where(token < 0, float("nan"), logprob))


@triton.jit
def _top_p_target(z, p):
    """12 top-p: ceil(z * P / 2^31) in two halves."""
    share = (p * 2147483648.0).to(tl.int64) - 2048
    share = tl.maximum(share, 0)
    low = tl.full((), 0x7FFFFFFF, tl.int64)
    target = (z >> 31) * share + (((z & low) * share + low) >> 31)
    return tl.maximum(target, 1)


@triton.jit
def _scaled_random(seed, position, draw, total):
    """(R * total) >> 64."""
    return tl.umulhi(_random_bits(seed, position, draw), total.to(tl.uint64)).to(tl.int64)


@triton.jit
def _first_past(reach, r, ids, w, SIZE: tl.constexpr):
    """The first token, in id order, at which the running mass exceeds r; and its mass."""
    hit = tl.arange(0, SIZE) == tl.sum((reach <= r).to(tl.int32), axis=0)
    return tl.sum(tl.where(hit, ids, 0), axis=0), tl.sum(tl.where(hit, w, 0), axis=0)


@triton.jit
def _kept(
    row,
    filters,
    best,
    m,
    scale,
    vocab_size,
    tiles,
    lanes,
    slab,
    store,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    WEIGH_ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SLAB: tl.constexpr,
    NUCLEUS: tl.constexpr,
    MOST_STORED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Steps 11 to 13: the cut of the kept set, and its mass by tile or all of it in the slab."""
    lowest = _first_code(tl.full((), _LOWEST_KEY, tl.int64))
    top = _first_code(_key(m).to(tl.int64) + 1)
    held = tl.zeros((), tl.int32)
    top_k, top_p, depth_cut, keep = filters
    at_most = tl.where(top_k > 0, tl.maximum(top_k, keep), vocab_size)
    has_k = at_most < vocab_size
    has_p = top_p < 1.0
    has_min_p = depth_cut < _INF
    any_filter = has_k | has_p | has_min_p

    # the lanes that hold the first tokens of the order
    bound = tl.full((), _LOWEST_KEY, tl.int32)
    near = lowest
    num_lanes = tl.zeros((), tl.int32)
    weigh_all = has_p & (at_most >= vocab_size)
    stored = False
    place = tl.full([BLOCK], -1, tl.int32)
    if any_filter:
        wanted = tl.where(has_k, at_most, tl.where(has_p, tl.maximum(keep, NUCLEUS), keep))
        if has_min_p:
            near = _first_code(_depth_bound(m, scale, depth_cut))
        keys = _key(best)
        if vocab_size > SLAB:
            bound = _lane_bound(keys, _key(m), wanted)
            if not (has_k | has_p):
                bound = tl.minimum(bound, (near >> _ID_BITS).to(tl.int32))
        if wanted <= SLAB:
            chosen = keys >= bound
            place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(lanes + place, tl.arange(0, BLOCK), mask=chosen)
            num_lanes = tl.sum(chosen.to(tl.int32), axis=0)
            stored = weigh_all & (num_lanes <= MOST_STORED)
            place = tl.where(stored, tl.where(chosen, place, -1), -1)

    # the mass of all, for step 12 or for the draw of a row without filters
    masses = tl.zeros([TILES], tl.int64)
    z = tl.zeros((), tl.int64)
    if weigh_all | (WEIGH_ALL & (any_filter == 0)):
        masses = _tile_masses(
            row,
            None,
            m,
            scale,
            vocab_size,
            tiles,
            store,
            num_lanes,
            place,
            HAS_BIAS,
            HAS_MASK,
            HAS_HISTORY,
            True,
            BLOCK,
            TILES,
            STAGES,
        )
        z = tl.sum(masses, axis=0)

    # the tokens of those lanes that reach the bound
    slab_low = top
    slab_high = top
    n_above = tl.zeros((), tl.int64)
    w_above = tl.zeros((), tl.int64)
    tl.debug_barrier()
    start = tl.zeros((), tl.int32)
    while (start < num_lanes * tiles) & (held <= SLAB):
        index = start + tl.arange(0, SLAB)
        tile = index // num_lanes
        inside = tile < tiles
        lane = tl.load(lanes + index % num_lanes, mask=inside, other=0)
        ids = tile * BLOCK + lane
        inside = inside & (ids < vocab_size)
        if stored:
            x = tl.load(store + index, mask=inside, other=0).to(tl.float32, bitcast=True)
        else:
            x = _processed(row, None, ids, inside, HAS_BIAS, HAS_MASK, HAS_HISTORY)
        held = _append(slab, held, x, ids, inside & (_key(x) >= bound), SLAB)
        start += SLAB
    tl.debug_barrier()
    if (held > 0) & (held <= SLAB):
        slab_low = _first_code(bound)
    else:
        held = tl.zeros((), tl.int32)

    # 11 top-k, 12 top-p, and what min_tokens_to_keep asks for, each as a cut
    k_cut = lowest
    p_cut = lowest
    keep_cut = top
    for step in range(0, 3):
        by_mass = step == 1
        if tl.where(step == 0, has_k, tl.where(step == 1, has_p, (keep > 1) & (has_p | has_min_p))):
            target = tl.where(step == 0, at_most, keep).to(tl.int64)
            target = tl.where(by_mass, _top_p_target(z, top_p), target)
            codes, w = _slab(slab, held, m, scale, SLAB)
            above = tl.where(by_mass, w_above, n_above)
            below = above + tl.where(by_mass, tl.sum(w, axis=0), held.to(tl.int64))
            if (above >= target) | ((below < target) & (slab_low > lowest)):
                # not in the slab: begin below it, or anew; as many as are asked for reach the bound
                low = _first_code(bound)
                high = top
                n_low = tl.zeros((), tl.int64) + vocab_size
                n_high = tl.zeros((), tl.int64)
                w_high = tl.zeros((), tl.int64)
                if (slab_high == top) & (below < target):
                    high = slab_low
                    n_high = held.to(tl.int64)
                    w_high = tl.sum(w, axis=0)
                if by_mass:
                    # a token 44 octaves down has no mass
                    massive = _key(
                        tl.maximum(m - 44.0 / scale, _value(tl.full((), _LOWEST_KEY, tl.int32)))
                    )
                    low = tl.maximum(_first_code(massive), k_cut)
                # the slab holds a sample of the row meanwhile
                each = (vocab_size + SLAB - 1) // SLAB
                # other tokens for each filter: what does not change would be kept in registers
                sample_ids = tl.arange(0, SLAB) * each + (step & 1)
                in_row = sample_ids < vocab_size
                sample = _processed(row, None, sample_ids, in_row, HAS_BIAS, HAS_MASK, HAS_HISTORY)
                tl.debug_barrier()
                sampled = _append(slab, 0, sample, sample_ids, in_row, SLAB)
                tl.debug_barrier()
                codes, w = _slab(slab, sampled, m, scale, SLAB)
                missing = target - tl.where(by_mass, w_high, n_high)
                p1, p2, p3 = _sampled_pivots(
                    codes, w, low, high, each, z - w_high, by_mass, missing
                )
                # what reaches the lower code may never be counted: then the codes tell the end
                while (n_low - n_high > SLAB) & (high - low > SLAB):
                    packed_lanes = tl.zeros([SLAB], tl.int64)
                    w1_lanes = tl.zeros([SLAB], tl.int64)
                    w2_lanes = tl.zeros([SLAB], tl.int64)
                    w3_lanes = tl.zeros([SLAB], tl.int64)
                    for first in range(0, vocab_size, SLAB):
                        ids = first + tl.arange(0, SLAB)
                        x = _processed(
                            row, first, ids, ids < vocab_size, HAS_BIAS, HAS_MASK, HAS_HISTORY
                        )
                        code = _code(x, ids)
                        w = _mass(x, m, scale)
                        packed_lanes += _packed_counts(code, p1, p2, p3)
                        w1_lanes += tl.where(code >= p1, w, 0)
                        w2_lanes += tl.where(code >= p2, w, 0)
                        w3_lanes += tl.where(code >= p3, w, 0)
                    packed = tl.sum(packed_lanes, axis=0)
                    w1 = tl.sum(w1_lanes, axis=0)
                    w2 = tl.sum(w2_lanes, axis=0)
                    w3 = tl.sum(w3_lanes, axis=0)
                    low, high, n_low, n_high, w_high = _narrow(
                        (low, high, n_low, n_high, w_high),
                        p1,
                        p2,
                        p3,
                        packed,
                        w1,
                        w2,
                        w3,
                        by_mass,
                        target,
                    )
                    p1, p2, p3 = _pivots(low, high)
                tl.debug_barrier()
                held = tl.zeros((), tl.int32)
                for first in range(0, vocab_size, SLAB):
                    ids = first + tl.arange(0, SLAB)
                    x = _processed(
                        row, first, ids, ids < vocab_size, HAS_BIAS, HAS_MASK, HAS_HISTORY
                    )
                    code = _code(x, ids)
                    held = _append(slab, held, x, ids, (code >= low) & (code < high), SLAB)
                tl.debug_barrier()
                slab_low = low
                slab_high = high
                n_above = n_high
                w_above = w_high

                codes, w = _slab(slab, held, m, scale, SLAB)

            bracket = (slab_low, slab_high, n_above + held, n_above, w_above)
            low = _cut(codes, w, bracket, by_mass, target)
            if step == 0:
                k_cut = low
                z = w_above + tl.sum(tl.where(codes >= low, w, 0), axis=0)
            elif step == 1:
                p_cut = low
            else:
                keep_cut = low
    # 12 top-p, 13 min-p: neither leaves fewer than min_tokens_to_keep
    cut = tl.maximum(k_cut, tl.minimum(p_cut, keep_cut))
    cut = tl.maximum(cut, tl.minimum(near, keep_cut))

    in_slab = (slab_high == top) & (slab_low <= cut)
    if WEIGH_ALL & any_filter & (in_slab == 0):
        masses = _tile_masses(
            row,
            cut,
            m,
            scale,
            vocab_size,
            tiles,
            store,
            num_lanes,
            place,
            HAS_BIAS,
            HAS_MASK,
            HAS_HISTORY,
            False,
            BLOCK,
            TILES,
            STAGES,
        )
    return cut, masses, held, in_slab


@triton.jit
def sample_kernel(
    logits,
    logits_stride,
    vocab_size,
    tiles,
    temperature,
    top_k,
    top_p,
    min_p_cut,
    min_tokens_to_keep,
    repetition_penalty,
    frequency_penalty,
    presence_penalty,
    seed,
    position,
    logit_bias_offsets,
    logit_bias_ids,
    logit_bias_values,
    allowed_mask,
    allowed_mask_stride,
    seen,
    seen_stride,
    counts,
    counts_stride,
    lengths,
    slots,
    workspace,
    workspace_stride,
    tokens,
    logprobs,
    status,
    filtered,
    filtered_stride,
    num_samples,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    ANY_RANDOM: tl.constexpr,
    ANY_FILTER: tl.constexpr,
    LOGPROBS: tl.constexpr,
    ADVANCE: tl.constexpr,
    FILTER_ONLY: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SLAB: tl.constexpr,
    NUCLEUS: tl.constexpr,
    MOST_STORED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row ``program_id(0)`` of a batch."""
    index = tl.program_id(0).to(tl.int64)
    logits += index * logits_stride
    tail_ids = vocab_size // GROUP * GROUP + tl.arange(0, GROUP)
    tail = tl.load(logits + tail_ids, mask=tail_ids < vocab_size, other=-_INF)
    bias = 0
    if HAS_BIAS:
        first_bias = tl.load(logit_bias_offsets + index)
        bias_count = (tl.load(logit_bias_offsets + index + 1) - first_bias).to(tl.int32)
        bias = (logit_bias_ids + first_bias, logit_bias_values + first_bias, bias_count)
    mask = 0
    if HAS_MASK:
        mask = allowed_mask + index * allowed_mask_stride
    if HAS_HISTORY:
        slot = tl.load(slots + index).to(tl.int64)
        seen += slot * seen_stride
        counts += slot * counts_stride
        repetition = tl.load(repetition_penalty + index)
        frequency = tl.load(frequency_penalty + index)
        presence = tl.load(presence_penalty + index)
    t = tl.load(temperature + index)

    # pass 1: every lane's largest logit, and in which tile it is first
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -_INF, tl.float32)
    best_tile = tl.zeros([BLOCK], tl.int32)
    wide = tl.zeros((), tl.int32)
    history = 0
    if HAS_HISTORY:
        inverse = tl.div_rn(1.0, repetition)
        history = (seen, counts, repetition, inverse, frequency, presence)
        wide = ((repetition > _FAR) | (repetition < 1.0 / _FAR)).to(tl.int32)
    flags = tl.full((), _WIDE_BIT, tl.int32)
    while flags >= _WIDE_BIT:
        row = (logits, tail, vocab_size, bias, mask, history, wide)
        best = tl.full([BLOCK], -_INF, tl.float32)
        best_tile = tl.zeros([BLOCK], tl.int32)
        for tile in tl.range(0, tiles, num_stages=STAGES):
            ids = tile * BLOCK + lane
            x, x_flags = _processed_and_flags(
                row, tile * BLOCK, ids, ids < vocab_size, HAS_BIAS, HAS_MASK, HAS_HISTORY
            )
            better = x > best
            best = tl.where(better, x, best)
            best_tile = tl.where(better, (best_tile & _FLAGS) | tile, best_tile) | x_flags
        flags = tl.max(best_tile & _WIDE_BIT, axis=0) | tl.max(best_tile & _NAN_BIT, axis=0)
        wide = tl.where(flags >= _WIDE_BIT, 1, wide)
    row = (logits, tail, vocab_size, bias, mask, history, wide)
    m = tl.max(best, axis=0)
    greedy = tl.where(best == m, (best_tile & (_NAN_BIT - 1)) * BLOCK + lane, _LAST_ID)
    greedy = tl.min(greedy, axis=0)
    empty = m == -_INF
    if not FILTER_ONLY:
        seen_status = tl.where((flags & _NAN_BIT) != 0, _NAN_SEEN, 0)
        seen_status += empty.to(tl.int32) * _NO_CANDIDATE
        seen_status += (m == _INF).to(tl.int32) * _POS_INF_SEEN
        tl.store(status + index, seen_status)

    raw = 0
    if LOGPROBS == RAW:
        raw = _raw_log_sum(logits, tail, vocab_size, tiles, BLOCK)
    output = 0
    if not FILTER_ONLY:
        first_draw = index * num_samples
        output = (tokens + first_draw, 0, logits, raw)
        if LOGPROBS:
            output = (tokens + first_draw, logprobs + first_draw, logits, raw)

    # 8 greedy: the first of the order; and a row without candidates
    token = tl.where(empty, -1, greedy)
    cut = tl.where(empty, 0x7FFFFFFFFFFFFFFF, _code(m, greedy))
    one = tl.full((), 1, tl.int64)
    if empty | (t == 0.0):
        if not FILTER_ONLY:
            for draw in range(0, num_samples):
                _write(output, draw, token, one, one, LOGPROBS)
    elif ANY_RANDOM:
        scale = tl.div_rn(_LOG2_E, t)
        workspace += index * workspace_stride
        slab = workspace + BLOCK
        in_slab = False
        held = 0
        if ANY_FILTER:
            filters = (
                tl.load(top_k + index),
                tl.load(top_p + index),
                tl.load(min_p_cut + index),
                tl.maximum(tl.load(min_tokens_to_keep + index), 1),
            )
            cut, masses, held, in_slab = _kept(
                row,
                filters,
                best,
                m,
                scale,
                vocab_size,
                tiles,
                workspace,
                slab,
                slab + 2 * SLAB,
                HAS_BIAS,
                HAS_MASK,
                HAS_HISTORY,
                not FILTER_ONLY,
                BLOCK,
                TILES,
                SLAB,
                NUCLEUS,
                MOST_STORED,
                STAGES,
            )
        else:
            cut = _first_code(tl.full((), _LOWEST_KEY, tl.int64))
            if not FILTER_ONLY:
                masses = _tile_masses(
                    row,
                    None,
                    m,
                    scale,
                    vocab_size,
                    tiles,
                    workspace,
                    0,
                    lane,
                    HAS_BIAS,
                    HAS_MASK,
                    HAS_HISTORY,
                    False,
                    BLOCK,
                    TILES,
                    STAGES,
                )

        # 14 draw
        if not FILTER_ONLY:
            row_seed = tl.load(seed + index)
            row_position = tl.load(position + index)
            if in_slab:
                codes, w = _slab(slab, held, m, scale, SLAB)
                place = tl.arange(0, SLAB)
                slab_ids = tl.load(slab + SLAB + place, mask=place < held, other=0)
                w = tl.where(codes >= cut, w, 0)
                reach = tl.cumsum(w, axis=0)
                total = tl.sum(w, axis=0)
                for draw in range(0, num_samples):
                    r = _scaled_random(row_seed, row_position, draw, total)
                    token, token_w = _first_past(reach, r, slab_ids, w, SLAB)
                    _write(output, draw, token, token_w, total, LOGPROBS)
            else:
                tile_reach = tl.cumsum(masses, axis=0)
                total = tl.sum(masses, axis=0)
                for draw in range(0, num_samples):
                    r = _scaled_random(row_seed, row_position, draw, total)
                    tile = tl.sum((tile_reach <= r).to(tl.int32), axis=0)
                    before = tl.max(tl.where(tile_reach <= r, tile_reach, 0), axis=0)
                    # the piece of the tile, from its start on
                    first = tile * BLOCK - SLAB
                    ids = first + tl.arange(0, SLAB)
                    w = tl.zeros([SLAB], tl.int64)
                    piece = tl.zeros((), tl.int64)
                    while before + piece <= r:
                        before += piece
                        first += SLAB
                        ids = first + tl.arange(0, SLAB)
                        x = _processed(
                            row, first, ids, ids < vocab_size, HAS_BIAS, HAS_MASK, HAS_HISTORY
                        )
                        w = tl.where(_code(x, ids) >= cut, _mass(x, m, scale), 0)
                        piece = tl.sum(w, axis=0)
                    token, token_w = _first_past(tl.cumsum(w, axis=0), r - before, ids, w, SLAB)
                    _write(output, draw, token, token_w, total, LOGPROBS)

    if FILTER_ONLY:
        filtered += index * filtered_stride
        for tile in range(0, tiles):
            ids = tile * BLOCK + lane
            inside = ids < vocab_size
            x = _processed(row, tile * BLOCK, ids, inside, HAS_BIAS, HAS_MASK, HAS_HISTORY)
            divided = tl.where(t == 0.0, x, tl.div_rn(x, t))
            tl.store(filtered + ids, tl.where(_code(x, ids) >= cut, divided, -_INF), mask=inside)

    if ADVANCE:
        produced = (empty == 0).to(tl.int64)
        tl.store(position + index, tl.load(position + index) + produced)
        if HAS_HISTORY:
            # nobody reads the history after this
            tl.debug_barrier()
            if empty == 0:
                word = tl.load(seen + (token >> 5))
                tl.store(seen + (token >> 5), word | (1 << (token & 31)))
                tl.store(counts + token, tl.load(counts + token) + 1)
                tl.store(lengths + slot, tl.load(lengths + slot) + 1)
