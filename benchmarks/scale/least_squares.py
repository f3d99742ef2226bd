"""What `secateur.repairs.regression` computes, as amounts of work."""

from __future__ import annotations

from benchmarks.scale.work import Work
from secateur.repairs.regression.elimination import STEPS

TRIED = 4
"""Dampings that `leastsquares.descend` tries, as a rule: it starts where the layer before ended."""


def fit(
    groups: int, columns: int, outputs: int, parts: int, *, rows: int = 0, intercept: bool, tried: int = TRIED
) -> Work:
    r"""`leastsquares.fit`, for every one of `groups` regressions of c columns and o outputs.

    Each of the parts p is predicted by what the others teach: a product :math:`S W` (:math:`c^2 o`
    multiply-adds in float64) to set its problem up once; then, for each damping that is tried, a Cholesky
    factor (:math:`c^3 / 6`), its two triangular solves (:math:`c^2 o`) and a product for the error. Keeping
    the weight, a candidate where there may be a bias, takes the latter. Before that each part's error is
    taken once, and at the end the whole is set up and solved once. With p = 1 nothing is held out. With
    `rows`, so few that their rows are kept, of r rows: :math:`r c (r + o)` to set up, a factor of
    :math:`r^3 / 6`, solves of :math:`r^2 o`, a product of :math:`r c o` behind them, and one for the error.

    Held at a time: the sums of p parts, of their whole, and of each part's rest where p > 2; each problem's
    own two matrices, the damped one, its factor, and what is made while the mean is taken off.

    Args:
        groups: Of a grouped convolution; else 1.
        columns: c.
        outputs: o.
        parts: p.
        rows: Positions of each part, where all of them together are no more than the columns; else 0.
        intercept: Whether there may be a bias.
        tried: Dampings.
    """
    c, o = columns, outputs

    def solved(r: int) -> Work:
        if rows:
            return Work({"matmul float64": r * c * o, "factor float64": r**3 / 6 + r * r * o})
        return Work({"factor float64": c**3 / 6 + c * c * o})

    def set_up(r: int) -> Work:
        return Work({"matmul float64": r * c * (r + o) if rows else c * c * o})

    s = rows * parts or c
    sums = 8 * s * (c + o) if rows else 8 * c * (c + o)
    rounds, kept = (tried * parts, parts * intercept) if parts > 1 else (0, 0)
    errors = parts + rounds + kept if parts > 1 else 2 * parts
    rest = rows * (parts - 1)
    work = set_up(rest) * (parts if parts > 1 else 0) + solved(rest) * rounds
    work += set_up(rows * parts) + solved(rows * parts)
    work += Work({"matmul float64": rows * c * o if rows else c * c * o}) * errors
    moved = parts * (max(parts - 2, 0) * 3 + 5) * sums + (rounds + 1) * 4 * 8 * s * s
    held = (2 * parts + 3 + parts * (parts > 2)) * sums + 3 * 8 * s * s
    work = work * groups + Work({"bytes": moved * groups, "calls": 25 * (rounds + kept + 1)})
    return work.beside(held * groups)


def merging(groups: int, columns: int, outputs: int, pieces: int) -> Work:
    """Adding the sums of so many pieces of data, which are products already: two read, one written."""
    return Work({"bytes": 3 * 8 * groups * columns * (columns + outputs) * pieces, "calls": 5 * pieces})


def eliminate(units: int, each: int, columns: int, outputs: int) -> Work:
    r"""`elimination.eliminate` for one regression of c columns and o outputs, k columns a unit.

    The inverse of the damped scatter takes :math:`c^3`. Every unit goes once, with :math:`k c (c + o)`
    multiply-adds for the downdate of the inverse and the weight, whatever is left: together :math:`c^2 (c +
    o)` where all columns belong to units. Before each of about `STEPS` steps, every unit that is left says
    what it would cost, by a :math:`k × k` solve of o right-hand sides.

    Held: the inverse and the weight, what is made in a downdate (twice the inverse's size), and while the
    inverse is made the damped scatter and a factor.
    """
    k, c, o = each, columns, outputs
    at_once = max(1, units // STEPS)
    steps = -(-units // at_once)
    left = units * (steps + 1) / 2
    amounts = {
        "matmul float64": units * k * c * (c + o),
        "factor float64": c**3 + left * (k**3 / 3 + k * k * o) + steps * (at_once * k) ** 2 * (c + o),
        "bytes": 8 * (steps * 5 * c * (c + o) + left * 3 * k * (k + o)),
        "calls": 40 * steps,
    }
    return Work(amounts, 8 * (4 * c * c + 2 * c * o))
