"""Which of a row's scores top-k and top-p keep, and which of those a random number draws.

One program has a row of V float32 scores. Nothing is sorted. A first pass keeps the largest score
of each of BLOCK interleaved lanes: what so many of these reach, so many scores reach at least. A
second pass lists those that do, CANDIDATES at most. As a rule the list holds what top-k keeps, and
a nucleus; where it does not, bisection over the whole row finds a part of the ranking that does and
is short enough.

Scores are ordered as int64 keys, no two of which are equal: the float's bits, made to sort as an
integer (the *order*), then the lower index first. What top-k and top-p keep is everything from one
key on, the *limit*. Probabilities are integers, in units of 2**-44 of the likeliest token's: their
sums do not depend on the order of adding, so all passes agree to the last bit. Temperature does not
change the ranking and is left out of the scores; it enters the exponentials.
"""

import triton
import triton.language as tl

from gpt2fast.kernels._triton.common import LOG2_E
from gpt2fast.kernels._triton.decode import shift_of

INF_ORDER = tl.constexpr(0x7F800000)
MINUS_INF_ORDER = tl.constexpr(-0x7F800001)
LARGEST_INDEX = tl.constexpr(0x7FFFFFFF)  # i ^ this is this - i
_NAN_ORDER = tl.constexpr(0x7FC00000)
_LEAST_ORDER = tl.constexpr(-0x80000000)
_LEAST_KEY = tl.constexpr(-0x8000000000000000)
_LARGEST_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_ONE = tl.constexpr(17592186044416.0)  # 2**44, the weight of the likeliest token
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _order(scores):
    """int32 that sort as the scores; NaN counts as the largest, the two zeros as equal."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(scores != scores, _NAN_ORDER, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def score_of(order):
    """The inverse of `_order`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _tile(row_ptr, tile, V, BLOCK: tl.constexpr):
    """Scores of a tile of the row and their keys; behind V -inf and the least key."""
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offs < V
    scores = tl.load(row_ptr + offs, mask=mask, other=-float("inf"))
    keys = (_order(scores).to(tl.int64) << 32) | (offs ^ LARGEST_INDEX).to(tl.int64)
    return scores, tl.where(mask, keys, _LEAST_KEY)


@triton.jit
def _weights(scores, scale):
    """int64 probabilities in units of 2**-44 of the likeliest's; scale is (its score, rate)."""
    best, rate = scale
    return (tl.exp2((scores - best) * rate) * _ONE).to(tl.int64)


@triton.jit
def _key_weights(keys, scale):
    """`_weights` of keys, 0 of the least key."""
    order = tl.where(keys == _LEAST_KEY, MINUS_INF_ORDER, keys >> 32)
    return _weights(score_of(order.to(tl.int32)), scale)


@triton.jit
def largest(row_ptr, V, BLOCK: tl.constexpr):
    """Order of the largest score of each lane, int32 ``[BLOCK]``, and its first tile."""
    lanes = tl.full([BLOCK], _LEAST_ORDER, tl.int32)
    tiles = tl.zeros([BLOCK], tl.int32)
    for tile in range(tl.cdiv(V, BLOCK)):
        offs = tile * BLOCK + tl.arange(0, BLOCK)
        scores = tl.load(row_ptr + offs, mask=offs < V, other=-float("inf"))
        order = tl.where(offs < V, _order(scores), _LEAST_ORDER)
        tiles = tl.where(order > lanes, tile, tiles)
        lanes = tl.maximum(lanes, order)
    return lanes, tiles


@triton.jit
def log_sum(logits_ptr, V, BLOCK: tl.constexpr):
    """log(sum(exp(logits)))."""
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + offs, mask=offs < V, other=-float("inf")) * LOG2_E
        new_top = tl.maximum(top, logits)
        shift = shift_of(new_top)
        total = total * tl.exp2(top - shift) + tl.exp2(logits - shift)
        top = new_top
    whole_top = tl.max(top, 0)
    return (whole_top + tl.log2(tl.sum(total * tl.exp2(top - whole_top), 0))) * _LN_2


@triton.jit
def _lane_threshold(lanes, wanted):
    """A key that at least ``wanted`` lanes reach, and not many more if it can be."""
    low = tl.full([], _LEAST_ORDER, tl.int64)
    high = tl.max(lanes, 0).to(tl.int64) + 1
    count = wanted * 2
    while (high - low > 1) & (count > wanted + wanted // 2):
        middle = (low + high) >> 1
        reaching = tl.sum((lanes >= middle.to(tl.int32)).to(tl.int32), 0)
        if reaching >= wanted:
            low = middle
            count = reaching
        else:
            high = middle
    return low << 32


@triton.jit
def _kept(keys, weights, limit, min_p):
    """Weights of keys, 0 below the limit or where less than ``min_p`` of the largest."""
    least = tl.cast(min_p * _ONE, tl.int64)
    return tl.where((keys >= limit) & (weights >= least), weights, 0)


@triton.jit
def _reached(row_ptr, limit, min_p, scale, V, BLOCK: tl.constexpr):
    """How many keys reach the limit, and the sum of their weights; both int64.

    Weights that are less than ``min_p`` of the largest count as 0.
    """
    count = tl.full([], 0, tl.int64)
    mass = tl.full([], 0, tl.int64)
    for tile in range(tl.cdiv(V, BLOCK)):
        scores, keys = _tile(row_ptr, tile, V, BLOCK)
        count += tl.sum((keys >= limit).to(tl.int32), 0)
        mass += tl.sum(_kept(keys, _weights(scores, scale), limit, min_p), 0)
    return count, mass


@triton.jit
def _gather(row_ptr, low, high, list_ptr, V, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr):
    """The keys in ``[low, high)``, by index, ``[CANDIDATES]``; and how many there are.

    Behind them, the least key. Those that find no room are counted only.
    """
    tl.debug_barrier()  # what was listed before is read no more
    count = tl.full([], 0, tl.int32)
    for tile in range(tl.cdiv(V, BLOCK)):
        _, keys = _tile(row_ptr, tile, V, BLOCK)
        listed = ((keys >= low) & (keys < high)).to(tl.int32)
        place = count + tl.cumsum(listed, 0) - 1
        tl.store(list_ptr + place, keys, mask=(listed != 0) & (place < CANDIDATES))
        count += tl.sum(listed, 0)
    tl.debug_barrier()
    offs = tl.arange(0, CANDIDATES)
    return tl.load(list_ptr + offs, mask=offs < count, other=_LEAST_KEY), count


@triton.jit
def _middle(low, high):
    """Between two keys, as far in scores from both as can be; ``low`` only if nothing is."""
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    low_score = score_of((low >> 32).to(tl.int32))
    high_score = score_of((high >> 32).to(tl.int32))
    # Around zero, orders differ by far more than scores do.
    between = _order(low_score * 0.5 + high_score * 0.5).to(tl.int64) << 32
    near = (high_score - low_score < 1024.0) & (between > low) & (between < high)
    return tl.where(near, between, middle)


@triton.jit
def _narrow(
    row_ptr, low, high, goal, by_mass, above, count_high, scale,
    V, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """A part ``[low, high)`` of the ranking, of CANDIDATES keys at most, that goal is reached in.

    goal: a number of scores, or a sum of weights, at most that of what reaches ``low``; what
    reaches ``high`` is ``count_high`` scores with ``above`` of goal's units, which are less. Also
    returns the units above the part, and the goal.
    """
    count_low, mass = _reached(row_ptr, low, 0.0, scale, V, BLOCK)
    goal = tl.minimum(goal, tl.where(by_mass, mass, count_low))
    while count_low - count_high > CANDIDATES:
        # No name here may start the loop as another one's value (`middle = low`) and be assigned to
        # it within: Triton's compiler would not carry the change to the next round.
        middle = _middle(low, high)
        count, mass = _reached(row_ptr, middle, 0.0, scale, V, BLOCK)
        units = tl.where(by_mass, mass, count)
        if units >= goal:
            low = middle
            count_low = count
        else:
            high = middle
            count_high = count
            above = units
    return low, high, above, goal


@triton.jit
def _crossing(keys, units, low, high, above, goal):
    """The first key, from the largest down, that brings the units, with ``above``, to goal.

    Only those in ``[low, high)`` are looked at, below which nothing is listed. The last one if goal
    is more than all, and ``low`` if there is none.
    """
    inside = tl.sum(((keys >= low) & (keys < high)).to(tl.int32), 0)
    while inside > 1:
        middle = _middle(low, high)
        if above + tl.sum(tl.where(keys >= middle, units, 0), 0) >= goal:
            low = middle
        else:
            high = middle
        inside = tl.sum(((keys >= low) & (keys < high)).to(tl.int32), 0)
    last = tl.min(tl.where(keys >= low, keys, _LARGEST_KEY), 0)
    return tl.where(last == _LARGEST_KEY, low, last)


@triton.jit
def find_limit(
    row_ptr, lanes, scale, top_k, top_p, list_ptr, V, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr
):
    """The least key that top-k and then top-p keep; also a list of keys, ``[CANDIDATES]`` by index.

    And whether all that are kept are in the list; if not, it is of no use.
    """
    SURE: tl.constexpr = CANDIDATES // 2
    end = (tl.max(lanes, 0).to(tl.int64) + 1) << 32
    limit = tl.full([], MINUS_INF_ORDER + 1, tl.int64) << 32
    keys = tl.full([CANDIDATES], _LEAST_KEY, tl.int64)
    sure = end  # all keys from here on are listed
    for stage in range(2):
        by_mass = stage == 1
        active = tl.where(by_mass, top_p < 1.0, (top_k > 0) & (top_k < V))
        if active:
            if sure == end:
                wanted = tl.where(by_mass, SURE, tl.minimum(top_k, SURE))
                sure = tl.maximum(_lane_threshold(lanes, wanted), limit)
                keys, count = _gather(row_ptr, sure, end, list_ptr, V, BLOCK, CANDIDATES)
                if count > CANDIDATES:
                    sure = end
                    keys = tl.full([CANDIDATES], _LEAST_KEY, tl.int64)
            low = limit
            units = (keys != _LEAST_KEY).to(tl.int64)
            count = tl.sum(units, 0)
            goal = tl.cast(top_k, tl.int64)
            if by_mass:
                units = _key_weights(keys, scale)
                if sure <= limit:
                    mass = tl.sum(tl.where(keys >= limit, units, 0), 0)
                else:
                    _, mass = _reached(row_ptr, limit, 0.0, scale, V, BLOCK)
                goal = tl.maximum((tl.cast(top_p, tl.float64) * mass).to(tl.int64), 1)
                # All tokens less likely than this are together less than what top-p leaves.
                rare = (1.0 - top_p) * (mass.to(tl.float32) / (V * _ONE))
                rarest = _order(scale[0] + (tl.log2(rare) - 0.01) / scale[1])
                low = tl.maximum(low, rarest.to(tl.int64) << 32)
            above = tl.sum(units, 0)
            if (sure <= limit) | (above >= goal):
                crossing = _crossing(keys, units, tl.maximum(sure, limit), end, 0, goal)
            else:
                low, high, above, goal = _narrow(
                    row_ptr, low, sure, goal, by_mass, above, count, scale, V, BLOCK, CANDIDATES
                )
                keys, _ = _gather(row_ptr, low, high, list_ptr, V, BLOCK, CANDIDATES)
                units = (keys != _LEAST_KEY).to(tl.int64)
                if by_mass:
                    units = _key_weights(keys, scale)
                crossing = _crossing(keys, units, low, high, above, goal)
                sure = end
                keys = tl.full([CANDIDATES], _LEAST_KEY, tl.int64)
            limit = tl.where(by_mass, crossing, crossing >> 32 << 32)
    return limit, keys, sure <= limit


@triton.jit
def _point(uniform, total):
    """Where in ``[0, total)`` a uniform number lies."""
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _first_above(keys, weights, before, point):
    """The index of the first key at which the running sum of weights exceeds point."""
    running = before + tl.cumsum(weights, 0)
    index = (keys & LARGEST_INDEX) ^ LARGEST_INDEX
    return tl.min(tl.where(running > point, index, LARGEST_INDEX), 0).to(tl.int32)


@triton.jit
def draw(row_ptr, limit, keys, listed, min_p, uniform, scale, V, BLOCK: tl.constexpr):
    """Invert the distribution function of what is kept, tokens in order of their indices.

    keys are all that reach the limit, and maybe others, if ``listed``.
    """
    token = tl.full([], LARGEST_INDEX, tl.int32)
    if listed:
        weights = _kept(keys, _key_weights(keys, scale), limit, min_p)
        point = _point(uniform, tl.sum(weights, 0))
        token = _first_above(keys, weights, 0, point)
    else:
        _, total = _reached(row_ptr, limit, min_p, scale, V, BLOCK)
        point = _point(uniform, total)
        before = tl.full([], 0, tl.int64)
        for tile in range(tl.cdiv(V, BLOCK)):
            if before <= point:
                scores, of_tile = _tile(row_ptr, tile, V, BLOCK)
                kept = _kept(of_tile, _weights(scores, scale), limit, min_p)
                within = tl.sum(kept, 0)
                if before + within > point:
                    token = _first_above(of_tile, kept, before, point)
                before += within
    return token
