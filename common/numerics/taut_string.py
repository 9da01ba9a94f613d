"""The compiled part of `total_variation`: the taut string, linear time in every case.

With the cumulative sums r_k = g_1 + … + g_k the dual of CER's problem reads: among all strings U with U_0 = 0 and
r_k - γ ≤ U_k ≤ r_k + γ for k = 1 … d, find the one with the least Σ (U_k - U_{k-1})²; then u_k = U_k - U_{k-1}. This is
the taut string of Davies and Kovac (Local extremes, runs, strings and multiresolution, Annals of Statistics 2001), with
its left end pinned and its right end free within the tube.

From the last knot on there are two chains: the greatest convex minorant of the tube's upper edge (slopes grow) and the
least concave majorant of its lower edge (slopes fall). As long as the first slope of the majorant is at most that of the
minorant, a straight line still fits through the tube. When a new point of one edge pulls its whole chain to one piece
that is steeper than the other chain's first piece, the string follows that first piece and a new knot is made at its
end. Two ways to the same pieces:

* `_by_bounds` keeps the first slopes only and starts again at each new knot. It looks at values again, few for most data,
  but there are data where that makes the time quadratic; it gives up when it has looked at too many.
* `_by_chains` keeps the chains. Every point seen before lies on the inner side of the piece followed, so the pulled
  chain is again one piece from the new knot: nothing is scanned twice, and every piece is made, merged and followed at
  most once. The lower chain is stored negated, so both are minorants and one function serves both. A piece is (sum,
  length), side by side; slopes are compared by cross multiplication.

No cumulative sum of the whole vector is made: it would cost digits.

This module imports numba, and its first call compiles for some seconds; import it where it is used. Loops are written
out because slices of arrays would take the compiler three times as long. All arguments must have the types given: for
others the compiler starts again.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PIECES = 1024  # pieces that a chain has room for at first; more where a long stretch stays undecided
PATIENCE = (
    2.0  # values looked at again for each one solved, before the chains take over; changes the time only
)


@njit(nogil=True)
def survey(g: Floats) -> tuple[float, int, float]:
    """Return the sum g_1 + … + g_k that is largest in magnitude, the first such k, and Σ |g_k|; zeros give zeros."""
    total, absolute, peak, where = 0.0, 0.0, 0.0, 0
    for k in range(g.size):
        total += g[k]
        absolute += abs(g[k])
        if abs(total) > abs(peak):
            peak = total
            where = k + 1
    return peak, where, absolute


@njit(nogil=True)
def _push(chain: Floats, head: int, tail: int, value: float) -> int:
    """Append a step to a convex chain, merging pieces until its slopes grow; return the new tail."""
    total, length = value, 1.0
    while tail > head and chain[2 * tail - 2] * length >= total * chain[2 * tail - 1]:
        tail -= 1
        total += chain[2 * tail]
        length += chain[2 * tail + 1]
    chain[2 * tail] = total
    chain[2 * tail + 1] = length
    return tail + 1


@njit(nogil=True)
def _room(chain: Floats, head: int, tail: int) -> Floats:
    """Return an array with the pieces head … tail at its front and as much room again behind them."""
    moved = np.empty(max(2 * PIECES, 4 * (tail - head)))
    for k in range(2 * (tail - head)):
        moved[k] = chain[2 * head + k]
    return moved


@njit(nogil=True)
def _write(g: Floats, start: int, stop: int, lift: float) -> None:
    """Set one piece of g to its level, summed from the values: the sums of the chains carry rounding along."""
    total = 0.0
    for k in range(start, stop):
        total += g[k]
    _fill(g, start, stop, (total + lift) / (stop - start))


@njit(nogil=True)
def _fill(g: Floats, start: int, stop: int, level: float) -> None:
    for k in range(start, stop):
        g[k] = level + 0.0  # no -0.0


@njit(nogil=True)
def _cross(chain: Floats, head: int, other: Floats, at: int) -> bool:
    """Tell whether the first pieces of the two chains leave no line between them."""
    return chain[2 * head] * other[2 * at + 1] + other[2 * at] * chain[2 * head + 1] < 0.0


@njit(nogil=True)
def taut_string(g: Floats, gamma: float) -> None:
    """Replace g by argmin_u ½‖u - g‖² + γ‖Λu‖₁; what is overwritten is never read again.

    Args:
        g: At least one finite value (d,), contiguous; 6 d Σ|g| must not overflow.
        gamma: γ, 0 < γ ≤ Σ|g|.
    """
    start, side = _by_bounds(g, gamma)
    if start < g.size:
        _by_chains(g, gamma, start, side)


@njit(nogil=True)
def _by_bounds(g: Floats, gamma: float) -> tuple[int, float]:
    """Solve by first slopes alone; return the last knot: how many values are solved, and its side of the tube.

    The side is +1 on the upper edge, -1 on the lower one and 0 at the pinned end.
    """
    start, side, again = 0, 0.0, 0
    while start < g.size:
        above, below = (
            g[start] + (1.0 - side) * gamma,
            g[start] - (1.0 + side) * gamma,
        )  # first slopes of the chains
        end_above, end_below = start + 1, start + 1  # where their first pieces end
        total = sum_above = sum_below = g[start]  # of the values, and of those of the pieces, from the left
        room_above, room_below = 0.0, 0.0  # from the pieces, prolonged, to the tube's edges
        k, edge = start + 1, 0.0
        while k < g.size and edge == 0.0:
            total += g[k]
            room_above += g[k] - above
            room_below += g[k] - below
            k += 1
            if room_above <= 0.0 or room_below >= 0.0:
                if room_above <= 0.0:
                    above, room_above, end_above, sum_above = above + room_above / (k - start), 0.0, k, total
                if room_below >= 0.0:
                    below, room_below, end_below, sum_below = below + room_below / (k - start), 0.0, k, total
                if above < below and end_above != end_below:
                    edge = 1.0 if end_above < end_below else -1.0
        if edge == 0.0:  # the right end is free: towards level, then level
            if above >= 0.0 and below <= 0.0:
                _fill(g, start, g.size, 0.0)
                return g.size, 0.0
            edge = 1.0 if above < 0.0 else -1.0
        stop, total = (end_above, sum_above) if edge > 0.0 else (end_below, sum_below)
        _fill(g, start, stop, (total + (edge - side) * gamma) / (stop - start))
        start, side = stop, edge
        again += k - stop
        if again > 4 * PIECES + PATIENCE * stop:
            return start, side
    return start, side


@njit(nogil=True)
def _by_chains(g: Floats, gamma: float, start: int, side: float) -> None:
    """Solve the values from a knot on by whole chains."""
    up, up_head, up_tail = np.empty(2 * PIECES), 0, 0
    low, low_head, low_tail = np.empty(2 * PIECES), 0, 0
    opening_up, opening_low = (1.0 - side) * gamma, (1.0 + side) * gamma  # from the knot to the edges
    for k in range(start, g.size):
        if 2 * up_tail == up.size:
            up, up_head, up_tail = _room(up, up_head, up_tail), 0, up_tail - up_head
        if 2 * low_tail == low.size:
            low, low_head, low_tail = _room(low, low_head, low_tail), 0, low_tail - low_head
        up_tail = _push(up, up_head, up_tail, opening_up + g[k])
        low_tail = _push(low, low_head, low_tail, opening_low - g[k])
        opening_up, opening_low = 0.0, 0.0
        if not _cross(up, up_head, low, low_head):
            continue
        # a chain's last piece ends at the newest point, where the tube is open: it is never followed here
        if low_tail - low_head == 1:
            while up_tail - up_head > 1 and _cross(up, up_head, low, low_head):
                stop = start + int(up[2 * up_head + 1])
                _write(g, start, stop, (1.0 - side) * gamma)
                low[2 * low_head] += up[2 * up_head]
                low[2 * low_head + 1] -= up[2 * up_head + 1]
                start, side, up_head = stop, 1.0, up_head + 1
        elif up_tail - up_head == 1:
            while low_tail - low_head > 1 and _cross(low, low_head, up, up_head):
                stop = start + int(low[2 * low_head + 1])
                _write(g, start, stop, (-1.0 - side) * gamma)
                up[2 * up_head] += low[2 * low_head]
                up[2 * up_head + 1] -= low[2 * low_head + 1]
                start, side, low_head = stop, -1.0, low_head + 1
    edge, chain, head, tail = 1.0, up, up_head, up_tail
    if low[2 * low_head] < 0.0:
        edge, chain, head, tail = -1.0, low, low_head, low_tail
    while head < tail and chain[2 * head] < 0.0:
        stop = start + int(chain[2 * head + 1])
        _write(g, start, stop, (edge - side) * gamma)
        start, side, head = stop, edge, head + 1
    _fill(g, start, g.size, 0.0)
