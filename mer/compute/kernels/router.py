"""Choosing experts from router logits."""

from __future__ import annotations

import math

import numpy as np

from mer.compute.kernels.ir import load_f32, load_i64, store_f32, store_i32
from mer.compute.kernels.step import ARG0, step


@step
def route(row: int, thread: int, n_threads: int) -> None:
    """Write the k experts with the largest logits, in descending order, ties to the lower number, and their weights.

    Softmax over the chosen k equals the softmax over all experts renormalized over them, so both routings share one
    computation: w = e**(logit - largest) divided by the sum over the chosen. A logit that is not finite sets the row's
    `damaged`, if there is one; NaN then ranks as minus infinity, so that the k experts are always different ones.

    Arguments: logits (float32), stride_bytes, n, n_experts, k, ids (int32 [n, k]), weights (float32 [n, k]), damaged
    (int32 [n], or 0), turn (the thread that takes the first row).
    """
    logits, stride, n = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    n_experts, k = load_i64(row, ARG0 + 3), load_i64(row, ARG0 + 4)
    ids, weights, damaged = load_i64(row, ARG0 + 5), load_i64(row, ARG0 + 6), load_i64(row, ARG0 + 7)
    for t in range((thread + n_threads - load_i64(row, ARG0 + 8)) % n_threads, n, n_threads):
        scores = logits + t * stride
        if damaged != 0:
            for e in range(n_experts):
                if not math.isfinite(load_f32(scores, e)):
                    store_i32(damaged, t, np.int32(1))
        previous, previous_id = np.float32(np.inf), -1
        top, total = np.float32(0), 0.0
        for j in range(k):
            best, best_id = np.float32(-np.inf), -1
            for e in range(n_experts):
                score = load_f32(scores, e)
                if math.isnan(score):
                    score = np.float32(-np.inf)
                after = score < previous or (score == previous and e > previous_id)
                if after and (best_id < 0 or score > best):
                    best, best_id = score, e
            if j == 0:
                top = best
            weight = math.exp(np.float64(best) - np.float64(top))
            total += weight
            store_i32(ids, t * k + j, np.int32(best_id))
            store_f32(weights, t * k + j, np.float32(weight))
            previous, previous_id = best, best_id
        for j in range(k):
            store_f32(weights, t * k + j, np.float32(load_f32(weights, t * k + j) / total))
