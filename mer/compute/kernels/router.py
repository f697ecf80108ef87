"""Choosing experts from router logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from mer.compute.kernels.claim import claim_unit
from mer.compute.kernels.ir import (
    I32,
    I64,
    LANES,
    V16F32,
    V16I32,
    call,
    const,
    i64,
    lane_mask,
    load,
    load_f32,
    load_i32,
    load_i64,
    splat,
    store_f32,
    store_i32,
)
from mer.compute.kernels.numba_api import cgutils, intrinsic, njit
from mer.compute.kernels.step import step
from mer.compute.kernels.words import Words, columns

_V16I64 = ir.VectorType(I64, LANES)
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1
_NUMBER_MASK = 0x7FFFFFFF


def _for_vectors(b: Any, scores: Any, n: Any, body: Any) -> None:
    """Emit body(first index, 16 scores, which of them exist) for all of n scores; there is room for whole vectors."""
    with cgutils.for_range(b, b.lshr(b.add(n, i64(LANES - 1)), i64(4)), intp=I64) as loop:
        first = b.mul(loop.index, i64(LANES))
        body(first, load(b, scores, b.mul(first, i64(4)), V16F32, 4), lane_mask(b, b.sub(n, first)))


@intrinsic
def _all_finite(_ctx: Any, scores: Any, n: Any) -> Any:
    """Return whether n scores are finite."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        scores, n = args
        largest = cgutils.alloca_once_value(b, const(V16I32, 0))

        def look(_first: Any, vector: Any, exists: Any) -> None:
            magnitude = b.and_(b.bitcast(vector, V16I32), const(V16I32, 0x7FFFFFFF))
            magnitude, so_far = b.select(exists, magnitude, const(V16I32, 0)), b.load(largest)
            b.store(b.select(b.icmp_signed(">", magnitude, so_far), magnitude, so_far), largest)

        _for_vectors(b, scores, n, look)
        top = call(b, "llvm.vector.reduce.smax.v16i32", I32, b.load(largest))
        return b.icmp_signed("<", top, ir.Constant(I32, 0x7F800000))

    return types.boolean(types.int64, types.int64), codegen


@intrinsic
def _best_below(_ctx: Any, scores: Any, n: Any, below: Any) -> Any:
    """Return the largest key below a key; keys order like the scores, and of equal ones the lower number is larger.

    A key is the score's bits, turned so that they order like the score, above 2**31 - 1 minus its number. Negative zero
    counts as zero and NaN as minus infinity.
    """

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        scores, n, below = args
        limit = splat(b, below, _V16I64)
        best = cgutils.alloca_once_value(b, const(_V16I64, _LOWEST))

        def look(first: Any, vector: Any, exists: Any) -> None:
            number = b.fcmp_ordered("ord", vector, vector)
            vector = b.select(number, b.fadd(vector, const(V16F32, 0.0)), const(V16F32, -math.inf))
            bits = b.bitcast(vector, V16I32)
            bits = b.xor(bits, b.and_(b.ashr(bits, const(V16I32, 31)), const(V16I32, 0x7FFFFFFF)))
            last = ir.Constant(_V16I64, [_NUMBER_MASK - lane for lane in range(LANES)])
            key = b.add(b.shl(b.sext(bits, _V16I64), const(_V16I64, 32)), b.sub(last, splat(b, first, _V16I64)))
            so_far = b.load(best)
            better = b.and_(b.icmp_signed(">", key, so_far), b.icmp_signed("<", key, limit))
            b.store(b.select(b.and_(better, exists), key, so_far), best)

        _for_vectors(b, scores, n, look)
        return call(b, "llvm.vector.reduce.smax.v16i64", I64, b.load(best))

    return types.int64(types.int64, types.int64, types.int64), codegen


class RouterWords(Words):
    """Words that the steps of a router have in common.

    logits (float32), stride (bytes, whole vectors of 16), n, n_experts, k, ids (int32 [n, k]), weights (float32 [n,
    k]), damaged (int32 [n], or 0).
    """

    logits: int
    stride: int
    n: int
    n_experts: int
    k: int
    ids: int
    weights: int
    damaged: int


class RouteWords(RouterWords):
    """Words of a row of `route`.

    logits, stride, n, n_experts, k, ids, weights, damaged (see `RouterWords`), over_all (1: the weights are shares of
    all experts).
    """

    over_all: int


class ScoreWords(RouterWords):
    """Words of a row of `route_by_score`.

    logits, stride, n, n_experts, k, ids, weights, damaged (see `RouterWords`), scores (float32 [n, scores_stride],
    scratch), scores_stride (bytes, whole vectors of 16: for the experts' scores and then for those of the groups), bias
    (float32 [n_experts], or 0), sigmoid (0: softmax), groups (count << 32 | used, or 0), least (address of the smallest
    sum that weights are divided by, or 0: they are not), scale (address), expert_scale (float32 [n_experts], or 0).
    """

    scores: int
    scores_stride: int
    bias: int
    sigmoid: int
    groups: int
    least: int
    scale: int
    expert_scale: int


ROUTE, SCORE = columns(RouteWords), columns(ScoreWords)


@step(RouteWords)
def route(row: int, _thread: int, _n_threads: int) -> None:
    """Write the k experts with the largest logits, in descending order, ties to the lower number, and their weights.

    w = e**(logit - largest) divided by the sum over the chosen, or over all experts; the first is the softmax over all
    renormalized over the chosen, and needs no look at the others. A logit that is not finite sets the row's
    `damaged`, if there is one; NaN then ranks as minus infinity, so that the k experts are always different ones.

    Rows are claimed.
    """
    logits, stride, n = load_i64(row, ROUTE.logits), load_i64(row, ROUTE.stride), load_i64(row, ROUTE.n)
    n_experts, k = load_i64(row, ROUTE.n_experts), load_i64(row, ROUTE.k)
    ids, weights, damaged = load_i64(row, ROUTE.ids), load_i64(row, ROUTE.weights), load_i64(row, ROUTE.damaged)
    over_all = load_i64(row, ROUTE.over_all)
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        scores = logits + t * stride
        if damaged != 0 and not _all_finite(scores, n_experts):
            store_i32(damaged, t, np.int32(1))
        # One look at all scores for each of the k: a few vectors, in which sorting would cost a branch per expert.
        key, top, total = _HIGHEST, np.float32(0), 0.0
        for j in range(k):
            key = _best_below(scores, n_experts, key)
            best_id = _NUMBER_MASK - (key & _NUMBER_MASK)
            best = load_f32(scores, best_id)
            if math.isnan(best):
                best = np.float32(-np.inf)
            if j == 0:
                top = best
            weight = math.exp(np.float64(best) - np.float64(top))
            total += weight
            store_i32(ids, t * k + j, np.int32(best_id))
            store_f32(weights, t * k + j, np.float32(weight))
        if over_all != 0:
            total = 0.0
            for expert in range(n_experts):
                score = load_f32(scores, expert)
                if not math.isnan(score):
                    total += math.exp(np.float64(score) - np.float64(top))
        for j in range(k):
            store_f32(weights, t * k + j, np.float32(load_f32(weights, t * k + j) / total))


@njit
def _share(logit, sigmoid, top, total):  # type: ignore[no-untyped-def]
    """Return the logistic sigmoid of a logit, or its share of a softmax."""
    if sigmoid != 0:
        return 1.0 / (1.0 + math.exp(-np.float64(logit)))
    return math.exp(np.float64(logit) - top) / total


@njit
def _leave_best_groups(scores, of_groups, n_experts, count, used):  # type: ignore[no-untyped-def]
    """Set the scores of all experts to minus infinity whose group is not among the best; see `Groups`."""
    size = n_experts // count
    for group in range(count):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for expert in range(group * size, (group + 1) * size):
            score = load_f32(scores, expert)
            if score > first:
                first, second = score, first
            elif score > second:
                second = score
        store_f32(of_groups, group, first + second)
    key, kept = _HIGHEST, 0
    for _ in range(used):
        key = _best_below(of_groups, count, key)
        kept |= 1 << (_NUMBER_MASK - (key & _NUMBER_MASK))
    for expert in range(n_experts):
        if not kept >> (expert // size) & 1:
            store_f32(scores, expert, np.float32(-np.inf))


@step(ScoreWords)
def route_by_score(row: int, _thread: int, _n_threads: int) -> None:
    """As `route`, for weights that are sigmoids, are scaled, or are not what the experts are chosen by.

    Experts are chosen by sigmoid or share plus their bias, rounded to float32, within the best groups. A score that is
    not finite sets the row's `damaged` too.

    Rows are claimed.
    """
    logits, stride, n = load_i64(row, SCORE.logits), load_i64(row, SCORE.stride), load_i64(row, SCORE.n)
    n_experts, k = load_i64(row, SCORE.n_experts), load_i64(row, SCORE.k)
    ids, weights, damaged = load_i64(row, SCORE.ids), load_i64(row, SCORE.weights), load_i64(row, SCORE.damaged)
    scores, scores_stride = load_i64(row, SCORE.scores), load_i64(row, SCORE.scores_stride)
    bias, sigmoid, groups = load_i64(row, SCORE.bias), load_i64(row, SCORE.sigmoid), load_i64(row, SCORE.groups)
    least, scale = load_i64(row, SCORE.least), np.float64(load_f32(load_i64(row, SCORE.scale), 0))
    expert_scale = load_i64(row, SCORE.expert_scale)
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        logit, score = logits + t * stride, scores + t * scores_stride
        top, total = -np.inf, 1.0
        if sigmoid == 0:
            for expert in range(n_experts):
                top = max(top, np.float64(load_f32(logit, expert)))
            total = 0.0
            for expert in range(n_experts):
                total += math.exp(np.float64(load_f32(logit, expert)) - top)
        by_logit = bias == 0 and groups == 0
        if by_logit:
            score = logit
        else:
            for expert in range(n_experts):
                share = _share(load_f32(logit, expert), sigmoid, top, total)
                if bias != 0:
                    share += np.float64(load_f32(bias, expert))
                store_f32(score, expert, np.float32(share))
        if damaged != 0 and not (_all_finite(logit, n_experts) and (by_logit or _all_finite(score, n_experts))):
            store_i32(damaged, t, np.int32(1))
        if groups != 0:
            after = score + (n_experts + LANES - 1) // LANES * 4 * LANES
            _leave_best_groups(score, after, n_experts, groups >> 32, groups & 0xFFFFFFFF)
        key, of_all = _HIGHEST, 0.0
        for j in range(k):
            key = _best_below(score, n_experts, key)
            best_id = _NUMBER_MASK - (key & _NUMBER_MASK)
            weight = _share(load_f32(logit, best_id), sigmoid, top, total)
            of_all += weight
            store_i32(ids, t * k + j, np.int32(best_id))
            store_f32(weights, t * k + j, np.float32(weight))
        by = scale
        if least != 0:
            by = scale / max(of_all, np.float64(load_f32(least, 0)))
        for j in range(k):
            weight = np.float64(load_f32(weights, t * k + j)) * by
            if expert_scale != 0:
                weight *= np.float64(load_f32(expert_scale, load_i32(ids, t * k + j)))
            store_f32(weights, t * k + j, np.float32(weight))
