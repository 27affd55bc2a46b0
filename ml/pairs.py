"""Weighted counts of concordant pairs, for many bootstrap replicates at once.

Shape suffixes: N = scan, P = person, B = replicate. Sixteen replicates share each pass, so that one visit to a node of
the Fenwick tree serves them all; memory is 2 × 16 × 4 bytes a distinct risk, whatever B is.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

LANES = 16

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Weights = NDArray[np.uint16]


def risk_ranks(risk: Floats, tolerance: float = 1e-8) -> Ints:
    """(N,) dense ranks from 1 of risks; those within `tolerance` of their neighbour are tied."""
    order = np.argsort(risk, kind="stable")
    steps = np.diff(risk[order], prepend=risk[order[:1]]) > tolerance
    ranks = np.empty(len(risk), np.int64)
    ranks[order] = 1 + np.cumsum(steps)
    return ranks


def concordance(
    time: Floats, event: Bools, risk: Floats, person: Ints, event_weight: Floats, weights: Weights
) -> tuple[Floats, Floats]:
    """Weighted concordant and comparable pairs of scans of different persons, (B,) each.

    A pair (i, j) is comparable when i had the event and t_i < t_j, or t_i = t_j and j had none; it is concordant when
    risk_i > risk_j, half so at a tie. It counts event_weight_i × weight of i's person × weight of j's person.

    Args:
        time: (N,) days.
        event: (N,) True where observed.
        risk: (N,) larger means sooner.
        person: (N,) 0 to P - 1.
        event_weight: (N,) weight of the pairs a scan's event opens (1 for Harrell, G(t-)^-2 for Uno).
        weights: (P, B) how often each replicate drew each person.
    """
    order = np.lexsort((event, -time))  # latest first; at a tie those without the event first
    ranks = risk_ranks(risk)
    sorted_time = time[order]
    group = np.cumsum(np.diff(sorted_time, prepend=sorted_time[:1]) != 0)
    who = person[order].astype(np.int64)
    opened = np.where(event, event_weight, 0.0)[order].astype(np.float64)
    numerator, denominator = _all_pairs(group, opened, ranks[order], who, weights, int(ranks.max(initial=0)))
    repeated = np.bincount(person, minlength=len(weights)) > 1
    inside = np.flatnonzero(repeated[who])
    if len(inside):
        inside = inside[np.argsort(who[inside], kind="stable")]
        columns = (group[inside], opened[inside], ranks[order][inside], who[inside])
        own_numerator, own_denominator = _pairs_within(*columns, len(weights))
        squares = weights[repeated].astype(np.float64) ** 2
        numerator -= own_numerator[repeated] @ squares
        denominator -= own_denominator[repeated] @ squares
    return numerator, denominator


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _all_pairs(
    group: Ints, opened: Floats, rank: Ints, person: Ints, weights: Weights, top: int
) -> tuple[Floats, Floats]:
    """Pairs of all scans, those within a person included; rows latest first, censored before events at a tie."""
    n, replicates = len(group), weights.shape[1]
    numerator, denominator = np.zeros(replicates), np.zeros(replicates)
    for first in range(0, replicates, LANES):
        lanes = min(LANES, replicates - first)
        tree = np.zeros((top + 1, LANES), np.int32)
        same = np.zeros((top + 1, LANES), np.int32)
        total, below, weight = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
        above, pairs = np.zeros(LANES), np.zeros(LANES)
        entered = 0
        for i in range(n):
            # before the events of one time are asked, all later scans and its censored ones have entered
            while entered < n and (group[entered] < group[i] or (group[entered] == group[i] and opened[entered] == 0)):
                for k in range(lanes):
                    weight[k] = weights[person[entered], first + k]
                node = rank[entered]
                for k in range(LANES):
                    total[k] += weight[k]
                    same[node, k] += weight[k]
                while node <= top:
                    for k in range(LANES):
                        tree[node, k] += weight[k]
                    node += node & -node
                entered += 1
            if opened[i] == 0:
                continue
            for k in range(LANES):
                below[k] = 0
            node = rank[i] - 1
            while node > 0:
                for k in range(LANES):
                    below[k] += tree[node, k]
                node &= node - 1
            for k in range(lanes):
                weight[k] = weights[person[i], first + k]
            for k in range(LANES):
                share = opened[i] * weight[k]
                above[k] += share * (below[k] + 0.5 * same[rank[i], k])
                pairs[k] += share * total[k]
        for k in range(lanes):
            numerator[first + k], denominator[first + k] = above[k], pairs[k]
    return numerator, denominator


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _pairs_within(group: Ints, opened: Floats, rank: Ints, person: Ints, num_persons: int) -> tuple[Floats, Floats]:
    """The same counts among scans of one person, (P,) each; rows sorted by person."""
    numerator, denominator = np.zeros(num_persons), np.zeros(num_persons)
    begin = 0
    while begin < len(group):
        end = begin
        while end < len(group) and person[end] == person[begin]:
            end += 1
        for i in range(begin, end):
            if opened[i] == 0:
                continue
            for j in range(begin, end):
                if group[j] < group[i] or (group[j] == group[i] and opened[j] == 0):
                    denominator[person[begin]] += opened[i]
                    if rank[j] < rank[i]:
                        numerator[person[begin]] += opened[i]
                    elif rank[j] == rank[i]:
                        numerator[person[begin]] += 0.5 * opened[i]
        begin = end
    return numerator, denominator


def case_control(case: Floats, control: Floats, risk: Floats, person: Ints, weights: Weights) -> tuple[Floats, Floats]:
    """Weighted pairs of a case with larger risk than a control of another person, and all such pairs, (B,) each.

    Args:
        case: (N,) weight as a case, 0 for scans that are none.
        control: (N,) weight as a control.
        risk: (N,) larger means sooner.
        person: (N,) 0 to P - 1.
        weights: (P, B) how often each replicate drew each person.
    """
    ranks = risk_ranks(risk)
    order = np.argsort(ranks, kind="stable")
    columns = (ranks[order], case[order], control[order], person[order].astype(np.int64))
    numerator, denominator = _case_control(*columns, weights)
    repeated = np.bincount(person, minlength=len(weights)) > 1
    inside = np.flatnonzero(repeated[columns[3]])
    if len(inside):
        inside = inside[np.argsort(columns[3][inside], kind="stable")]
        own_numerator, own_denominator = _case_control_within(
            columns[0][inside], columns[1][inside], columns[2][inside], columns[3][inside], len(weights)
        )
        squares = weights[repeated].astype(np.float64) ** 2
        numerator -= own_numerator[repeated] @ squares
        denominator -= own_denominator[repeated] @ squares
    return numerator, denominator


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _case_control(rank: Ints, case: Floats, control: Floats, person: Ints, weights: Weights) -> tuple[Floats, Floats]:
    n, replicates = len(rank), weights.shape[1]
    numerator, denominator = np.zeros(replicates), np.zeros(replicates)
    below, tied, cases = np.zeros(replicates), np.zeros(replicates), np.zeros(replicates)
    begin = 0
    while begin < n:
        end = begin
        tied[:] = 0.0
        while end < n and rank[end] == rank[begin]:
            for k in range(replicates):
                tied[k] += control[end] * weights[person[end], k]
            end += 1
        for i in range(begin, end):
            if case[i] > 0:
                for k in range(replicates):
                    share = case[i] * weights[person[i], k]
                    cases[k] += share
                    numerator[k] += share * (below[k] + 0.5 * tied[k])
        for k in range(replicates):
            below[k] += tied[k]
        begin = end
    for k in range(replicates):
        denominator[k] = cases[k] * below[k]
    return numerator, denominator


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _case_control_within(
    rank: Ints, case: Floats, control: Floats, person: Ints, num_persons: int
) -> tuple[Floats, Floats]:
    numerator, denominator = np.zeros(num_persons), np.zeros(num_persons)
    begin = 0
    while begin < len(rank):
        end = begin
        while end < len(rank) and person[end] == person[begin]:
            end += 1
        for i in range(begin, end):
            for j in range(begin, end):
                pair = case[i] * control[j]
                denominator[person[begin]] += pair
                if rank[j] < rank[i]:
                    numerator[person[begin]] += pair
                elif rank[j] == rank[i]:
                    numerator[person[begin]] += 0.5 * pair
        begin = end
    return numerator, denominator
