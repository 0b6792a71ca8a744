"""Compiled cascades: branching processes, a follower graph, and the gather that scores texts.

Importing this module imports numba (half a second); `loop.virality` and `loop.appeal` import it inside functions.

Random numbers are counter-based: post j of a round owns the splitmix64 sequence that starts at mix(key ^ mix(j)), key
naming (seed, stage, round). What a post draws depends on nothing else, so threads, chunks and order cannot change a
result. No fast-math: a plain Python loop over the same formulas gives the same draws.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

POISSON, NEGATIVE_BINOMIAL, PARETO = 0, 1, 2
OFFSPRING = {"poisson": POISSON, "negative_binomial": NEGATIVE_BINOMIAL, "pareto": PARETO}

# Followers of an account: truncated Pareto, density exponent 2.3 (degree exponent of the simulated network of Goel et
# al. 2016, quoted from memory), from 1 to 1e6.
TAIL = 1.3
FOLLOWERS_MIN = 1.0
FOLLOWERS_MAX = 1e6
_RATIO = (FOLLOWERS_MIN / FOLLOWERS_MAX) ** TAIL
_LOWER_RATIO = (FOLLOWERS_MIN / FOLLOWERS_MAX) ** (TAIL - 1)
MEAN_FOLLOWERS = TAIL / (TAIL - 1) * FOLLOWERS_MIN * (1 - _LOWER_RATIO) / (1 - _RATIO)  # 4.265

# Columns that `posts` sums over the posts of a text.
SUMS = ("rate", "size", "reach", "visible", "inclusion", "log", "depth", "one_generation", "clipped", "capped")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_TO_UNIT = 1.0 / 9007199254740992.0  # 2**-53
_CHUNK_LOG = 30.0  # a Poisson or negative binomial is drawn in parts whose P(0) >= exp(-30): inversion never underflows
_NEGLIGIBLE = 1e-20  # below the resolution 2**-53 of a uniform

_jit: Callable[..., Any] = njit(nogil=True, cache=True)
_inline: Callable[..., Any] = njit(nogil=True, cache=True, inline="always")


@_inline
def mix(x: Any) -> Any:
    """splitmix64 finaliser: a bijection of 64-bit words (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> _S30)) * _MIX1
    x = (x ^ (x >> _S27)) * _MIX2
    return x ^ (x >> _S31)


@_inline
def unit(x: Any) -> Any:
    """Uniform in [0, 1) from the top 53 bits of a word."""
    return np.float64(x >> _S11) * _TO_UNIT


@_jit
def normal(u: float) -> float:
    """Standard normal quantile, relative error 1e-16 (Wichura 1988, AS 241 PPND16); 85% of draws need no logarithm."""
    q = u - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        num = (((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r
                   + 4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r + 1.9715909503065514427e3) * r
                + 1.3314166789178437745e2) * r + 3.3871328727963666080e0)  # fmt: skip
        den = (((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r
                   + 2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r + 6.8718700749205790830e2) * r
                + 4.2313330701600911252e1) * r + 1.0)  # fmt: skip
        return q * num / den
    r = u if q < 0 else 1.0 - u
    r = math.sqrt(-math.log(max(r, 2.0**-54)))  # u = 0 stands for the cell [0, 2**-53)
    if r <= 5.0:
        r -= 1.6
        num = (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r
                   + 1.27045825245236838258e0) * r + 3.64784832476320460504e0) * r + 5.76949722146069140550e0) * r
                + 4.63033784615654529590e0) * r + 1.42343711074968357734e0)  # fmt: skip
        den = (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r
                   + 1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940e0) * r
                + 2.05319162663775882187e0) * r + 1.0)  # fmt: skip
    else:
        r -= 5.0
        num = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r
                   + 2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580e0) * r
                + 5.46378491116411436990e0) * r + 6.65790464350110377720e0)  # fmt: skip
        den = (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r
                   + 7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r
                + 5.99832206555887937690e-1) * r + 1.0)  # fmt: skip
    return -num / den if q < 0 else num / den


@_inline
def poisson_part(mean: float, u: float) -> int:
    """Poisson(mean) by inversion of one uniform; mean <= 30."""
    if u < 1.0 - mean:  # P(0) >= 1 - mean: most posts are settled without an exponential
        return 0
    p = math.exp(-mean)
    below = p
    k = 0
    while u >= below and (p > _NEGLIGIBLE or k < mean):
        k += 1
        p *= mean / k
        below += p
    return k


@_inline
def negative_binomial_part(shape: float, mean: float, u: float) -> int:
    """Negative binomial of given shape and mean by inversion; shape * log(1 + mean / shape) <= 30."""
    if u < 1.0 - mean:
        return 0
    p = math.exp(-shape * math.log1p(mean / shape))
    below = p
    q = mean / (mean + shape)
    k = 0
    while u >= below and (p > _NEGLIGIBLE or k < mean):
        p *= q * (shape + k) / (k + 1)
        k += 1
        below += p
    return k


@_inline
def followers(u: float) -> float:
    """Followers of one account: inverse distribution function of the truncated Pareto, a real number >= 1."""
    return FOLLOWERS_MIN * math.exp(-math.log(1.0 - u * (1.0 - _RATIO)) / TAIL)


@_jit
def progeny(rate: float, start: Any, offspring: int, dispersion: float, n_seeds: int, cap: int) -> Any:
    """One cascade: total progeny of a branching process, aggregated by generation.

    Poisson and negative binomial: one draw a generation, by infinite divisibility. Pareto: one follower count for each
    account that posts, then Poisson(rate / E[F] * sum F).

    Returns:
      size (n_seeds..cap), followers reached, number of generations after the first post.
    """
    state = start
    alive = n_seeds
    size = n_seeds
    depth = 0
    reach = 0.0
    while alive > 0:
        if offspring == PARETO:
            feeds = 0.0
            for _ in range(alive):
                feeds += followers(unit(mix(state)))
                state += _GOLDEN
            mean = rate / MEAN_FOLLOWERS * feeds
        else:
            feeds = MEAN_FOLLOWERS * alive
            mean = rate * alive
        reach += feeds
        if size >= cap or rate <= 0.0:
            break
        born = 0
        if offspring == NEGATIVE_BINOMIAL:
            shape = dispersion * alive
            # -log P(0) = shape * log(1 + rate / dispersion) < mean: the logarithm is needed for large generations only.
            parts = 1 if mean < _CHUNK_LOG else int(shape * math.log1p(rate / dispersion) / _CHUNK_LOG) + 1
            for _ in range(parts):
                born += negative_binomial_part(shape / parts, mean / parts, unit(mix(state)))
                state += _GOLDEN
                if size + born >= cap:
                    break
        else:
            parts = int(mean / _CHUNK_LOG) + 1
            for _ in range(parts):
                born += poisson_part(mean / parts, unit(mix(state)))
                state += _GOLDEN
                if size + born >= cap:
                    break
        if born > cap - size:
            born = cap - size
        size += born
        alive = born
        if born > 0:
            depth += 1
    return size, reach, depth


@_jit
def draw(
    rate: Any, key: Any, first_id: int, offspring: int, dispersion: float, n_seeds: int, cap: int, out: Any
) -> int:
    """Cascade sizes of consecutive posts into `out`; returns the index of the first rate outside [0, 1), or -1."""
    for i in range(rate.size):
        r = np.float64(rate[i])
        if not (r >= 0.0 and r < 1.0):
            return i
        start = mix(key ^ mix(np.uint64(first_id + i)))
        # The first generation alone decides most posts: settled here without entering the loop.
        if offspring == POISSON and n_seeds == 1 and poisson_part(r, unit(mix(start))) == 0:
            out[i] = 1
            continue
        size, _, _ = progeny(r, start, offspring, dispersion, n_seeds, cap)
        out[i] = size
    return -1


@_jit
def noisy_rate(log_rate: float, sd: float, ceiling: float, key: Any, post: Any) -> Any:
    """Rate of one post, float32: exp(log_rate + sd z), cut at `ceiling`; and whether it was cut."""
    z = normal(unit(mix(mix(key ^ mix(post)))))
    x = math.exp(log_rate + sd * z)
    if x > ceiling:
        return np.float32(ceiling), 1.0
    return np.float32(x), 0.0


@_jit
def rates(log_rate: Any, n_posts: int, sd: float, ceiling: float, key: Any, first_id: int, out: Any) -> None:
    """Rates of `n_posts` posts for each text into out (n_docs, n_posts)."""
    for i in range(log_rate.size):
        for k in range(n_posts):
            post = np.uint64((first_id + i) * n_posts + k)
            out[i, k], _ = noisy_rate(log_rate[i], sd, ceiling, key, post)


@_jit
def posts(
    log_rate: Any,
    n_posts: int,
    sd: float,
    ceiling: float,
    rate_key: Any,
    key: Any,
    first_id: int,
    offspring: int,
    dispersion: float,
    cap: int,
    log_miss: float,
    out: Any,
) -> None:
    """Rates and cascades of `n_posts` posts for each text, summed into out (n_docs, len(SUMS)) as they are drawn.

    log_miss is log(1 - c), c the chance that one copy is crawled.
    """
    alone = 1.0 - math.exp(log_miss)
    for i in range(log_rate.size):
        for c in range(out.shape[1]):
            out[i, c] = 0.0
        for k in range(n_posts):
            post = np.uint64((first_id + i) * n_posts + k)
            r32, clipped = noisy_rate(log_rate[i], sd, ceiling, rate_key, post)
            r = np.float64(r32)
            out[i, 0] += r
            out[i, 8] += clipped
            start = mix(key ^ mix(post))
            if offspring == POISSON and poisson_part(r, unit(mix(start))) == 0:
                out[i, 1] += 1.0
                out[i, 2] += MEAN_FOLLOWERS
                out[i, 4] += alone
                out[i, 5] += 1.0
                continue
            size, reach, depth = progeny(r, start, offspring, dispersion, 1, cap)
            out[i, 1] += size
            out[i, 2] += reach
            out[i, 6] += depth
            if size == 1:
                out[i, 4] += alone
                out[i, 5] += 1.0
                continue
            out[i, 3] += 1.0
            out[i, 4] += 1.0 - math.exp(size * log_miss)
            out[i, 5] += 1.0 + math.log2(size)
            if depth == 1:
                out[i, 7] += 1.0
            if size >= cap:
                out[i, 9] += 1.0


@_jit
def graph_posts(
    indptr: Any,
    indices: Any,
    rate: Any,
    per_edge: float,
    key: Any,
    first_id: int,
    cap: int,
    sizes: Any,
    virality: Any,
) -> int:
    """Independent cascades on a follower graph, breadth first, from a uniform author; returns as `draw` does.

    A sharer's followers are visited by geometric skips, so a cascade costs its successes and not its edges.
    """
    n_nodes = indptr.size - 1
    seen = np.full(n_nodes, -1, np.int32)  # the cascade that last reached a node
    queue = np.empty(n_nodes, np.int32)
    parent = np.empty(n_nodes, np.int64)  # position in the queue
    below = np.empty(n_nodes, np.int64)  # size of the subtree
    p, scale, last = 0.0, 0.0, -1.0
    for i in range(rate.size):
        r = np.float64(rate[i])
        if r != last:
            p = r * per_edge
            if not (r >= 0.0 and p <= 1.0):
                return i
            scale = 1.0 / math.log1p(-p) if 0.0 < p < 1.0 else 0.0
            last = r
        state = mix(key ^ mix(np.uint64(first_id + i)))
        author = int(unit(mix(state)) * n_nodes)
        state += _GOLDEN
        queue[0] = author
        size = 1
        if p > 0.0:
            head = 0
            while head < size and size < cap:
                node = queue[head]
                stop = indptr[node + 1]
                at = np.int64(indptr[node])
                while at < stop:
                    # Failures before the next success: geometric, floor(log(1 - u) / log(1 - p)). All of d followers
                    # fail where 1 - u <= (1 - p)^d, at least 1 - p d: mostly known without the logarithm.
                    u = unit(mix(state))
                    state += _GOLDEN
                    if u >= p * (stop - at):
                        break
                    skip = math.log(1.0 - u) * scale
                    if skip >= stop - at:
                        break
                    at += np.int64(skip)
                    seen[author] = i  # here and not at the start: most cascades never touch this memory
                    follower = indices[at]
                    at += 1
                    if seen[follower] != i:
                        seen[follower] = i
                        queue[size] = follower
                        parent[size] = head
                        size += 1
                        if size >= cap:
                            break
                head += 1
        sizes[i] = size
        if size == 1:
            virality[i] = np.nan
        else:
            virality[i] = mean_distance(parent, below, size)
    return -1


@_jit
def mean_distance(parent: Any, below: Any, n: int) -> float:
    """Mean distance between two nodes of a tree whose parents stand before their children; see virality.py."""
    for j in range(n):
        below[j] = 1
    total = 0.0
    for j in range(n - 1, 0, -1):
        m = below[j]
        below[parent[j]] += m
        total += np.float64(m) * np.float64(n - m)
    return 2.0 * total / (np.float64(n) * np.float64(n - 1))


@_jit
def gather_rows(ids: Any, offsets: Any, table: Any, first: int, out: Any) -> None:
    """Sums table rows over each text into `out`, which holds texts first..first + len(out)."""
    for i in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[i, c] = 0.0
        for j in range(offsets[first + i], offsets[first + i + 1]):
            row = ids[j]
            for c in range(out.shape[1]):
                out[i, c] += table[row, c]


def n_workers(n_threads: int | None) -> int:
    """Returns the number of threads to use: the given one, else one for each core this process may run on."""
    if n_threads is not None:
        if n_threads < 1:
            raise ValueError(f"n_threads must be >= 1, got {n_threads}; leave it out to use every core")
        return n_threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_chunks(n: int, work: Callable[[int, int], int | None], *, n_threads: int | None, chunk: int | None) -> int:
    """Runs work(start, stop) over 0..n in chunks, on threads (the kernels release the interpreter lock).

    Threads of our own and not numba's: the number is an argument, nothing survives the call, and forking stays safe.
    Starting two takes half a millisecond; a chunk that holds all is done by the caller.

    Returns:
      the smallest non-negative value that any chunk returned, or -1.
    """
    workers = n_workers(n_threads)
    size = chunk or max(1 << 11, min(1 << 16, -(-n // (4 * workers))))
    spans = [(a, min(a + size, n)) for a in range(0, n, size)]
    if workers == 1 or len(spans) == 1:
        found = [work(a, b) for a, b in spans]
    else:
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda span: work(*span), spans))
    return min((f for f in found if f is not None and f >= 0), default=-1)


def gather(ids: np.ndarray, offsets: np.ndarray, table: np.ndarray, *, n_threads: int | None = None) -> np.ndarray:
    """Sums table rows over each text; see `loop.appeal.gather`."""
    out = np.empty((offsets.size - 1, table.shape[1]), np.float32)
    in_chunks(
        len(out),
        lambda a, b: gather_rows(ids, offsets, table, a, out[a:b]),
        n_threads=n_threads,
        chunk=None,
    )
    return out
