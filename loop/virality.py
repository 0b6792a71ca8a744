"""Published text -> appeal -> rate -> cascades -> weight.

A sampled text stands for K public posts of it (`posts_per_sample`). Each post has its own author and its own luck:

    ln R = ln r0 - (sigma_author^2 + sigma_luck^2) / 2 + appeal + N(0, sigma_author^2) + N(0, sigma_luck^2),  R <= r_max

so r0 is the mean rate, before the cut, of a text of appeal 0. R is the mean number of people who reshare one post from
one account; the cascade is the total progeny of a branching process with that mean, and the weight of the text is a
mean over its K cascades, scaled to mean 1 over the round's texts. What an audience may read: `loop.appeal`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loop import rng as streams
from loop.appeal import AUDIENCES, CONTENT_SD, FEATURES, Audience, audience, features, fit_learned

if TYPE_CHECKING:
    import igraph

__all__ = [
    "AUDIENCES",
    "CONTENT_SD",
    "FEATURES",
    "PRESETS",
    "Audience",
    "Exposure",
    "FollowerGraph",
    "Preset",
    "audience",
    "check",
    "differential",
    "draw_cascades",
    "drift_warning",
    "expose",
    "features",
    "fit_learned",
    "follower_graph",
    "graph_cascades",
    "inclusion_weight",
    "n_eff",
    "rate",
    "resample",
    "shuffle",
    "structural_virality",
    "top1_share",
]

OFFSPRING = ("poisson", "negative_binomial", "pareto")
TRANSFORMS = ("visible", "inclusion", "log", "raw", "top_k")


@dataclass(frozen=True)
class Preset:
    """A calibration of rate and cascade.

    Attributes:
      r0: mean rate before the cut of a text of appeal 0.
      sigma_author, sigma_luck: standard deviations of ln(rate); with CONTENT_SD they split its variance 10 : 25 : 65.
      r_max: largest rate; below 1, so that every cascade ends.
      offspring: one of OFFSPRING.
    """

    r0: float
    sigma_author: float
    sigma_luck: float
    r_max: float = 0.9
    offspring: str = "pareto"


# r0 is E[R] / exp(CONTENT_SD^2 / 2): appeals of standard deviation CONTENT_SD bring the mean rate before the cut to
# 0.14, and to 0.372, where E[1 / (1 - R)] is 1.9 (quadrature).
PRESETS = {
    "goel2012": Preset(r0=0.14 / math.exp(0.2), sigma_author=1.0, sigma_luck=math.sqrt(2.6)),
    "goel2016_mean": Preset(r0=0.372 / math.exp(0.2), sigma_author=1.0, sigma_luck=math.sqrt(2.6)),
    # For theory: a post of appeal a < ln(r_max) is reshared with chance exactly 1 - exp(-exp(a)), and nothing else is
    # random. Appeals of the audiences that ship lie on both sides of that, `null`'s at 0: they are for the others.
    "exact": Preset(r0=1.0, sigma_author=0.0, sigma_luck=0.0, offspring="poisson"),
}
DEFAULT = PRESETS["goel2012"]

# Negative binomial dispersion with which one rate, R = 0.48, gives Goel's 95% one-shot cascades and mean 1.92. It then
# puts 8 times too many cascades above 100 adoptions, which is why it is an alternative and not the default.
DISPERSION = 0.0146
CRAWL_PROB = 0.03  # chance that one public copy is crawled; keeps n_eff at half the documents (design choice)


def _require(ok: bool, name: str, rule: str, got: object, where: str, way_out: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {rule}, got {got} at {where}; {way_out}")


def _finite_vector(values: Any, name: str, where: str) -> np.ndarray:
    out = np.asarray(values, np.float64)
    _require(
        out.ndim == 1 and out.size > 0, name, "a non-empty vector", f"shape {out.shape}", where, "give one per text"
    )
    bad = np.flatnonzero(~np.isfinite(out))
    _require(
        not bad.size, name, "finite", out[bad[0]] if bad.size else "", f"{where}[{bad[:1]}]", "drop that text first"
    )
    return out


def _weights(values: Any, where: str) -> np.ndarray:
    out = _finite_vector(values, "weights", where)
    bad = np.flatnonzero(out < 0)
    _require(
        not bad.size, "weights", ">= 0", out[bad[0]] if bad.size else "", f"{where}[{bad[:1]}]", "check the transform"
    )
    _require(out.sum() > 0, "weights", "above 0 somewhere", "all 0", where, "raise posts_per_sample or r0")
    return out


# ---------------------------------------------------------------------------------------------------- rate and cascades


def _log_rate(appeal: Any, r0: float, sigma_author: float, sigma_luck: float, r_max: float) -> tuple[np.ndarray, float]:
    """Returns ln(rate) without noise (n_docs,) and the standard deviation of the noise."""
    x = _finite_vector(appeal, "appeal", "appeal")
    _require(0 < r0 < math.inf, "r0", "above 0", r0, "rate", "PRESETS has calibrated values")
    _require(0 < r_max < 1, "r_max", "above 0 and below 1", r_max, "rate", "at 1 a cascade may never end")
    for name, sigma in (("sigma_author", sigma_author), ("sigma_luck", sigma_luck)):
        _require(0 <= sigma < math.inf, name, ">= 0", sigma, "rate", "0 turns it off")
    variance = sigma_author**2 + sigma_luck**2
    return math.log(r0) - variance / 2 + x, math.sqrt(variance)


def rate(
    appeal: Any,
    *,
    r0: float = DEFAULT.r0,
    sigma_author: float = DEFAULT.sigma_author,
    sigma_luck: float = DEFAULT.sigma_luck,
    r_max: float = DEFAULT.r_max,
    posts_per_sample: int = 1000,
    seed: int,
    round_index: int,
    first_id: int = 0,
    n_threads: int | None = None,
) -> np.ndarray:
    """Draws the rate of every post: the formula at the head of this module.

    An author posts once, so author and luck enter as one normal of variance sigma_author^2 + sigma_luck^2. They are two
    arguments because the variance budget is stated in those terms.

    Args:
      appeal: float (n_docs,), shift of ln(rate).
      r0, sigma_author, sigma_luck, r_max: see Preset.
      posts_per_sample: K posts a text.
      seed, round_index: name the random stream; text i of the call is text first_id + i of the round.

    Returns:
      float32 (n_docs, K), rates in (0, r_max].

    Raises:
      ValueError: an appeal that is not finite, an empty one, a parameter out of range.
    """
    base, sd = _log_rate(appeal, r0, sigma_author, sigma_luck, r_max)
    _require(posts_per_sample >= 1, "posts_per_sample", ">= 1", posts_per_sample, "rate", "1 is the luck arm")
    from loop import cascade

    key = np.uint64(streams.key(seed, "rate", round_index))
    out = np.empty((base.size, posts_per_sample), np.float32)
    cascade.in_chunks(
        base.size,
        lambda a, b: cascade.rates(base[a:b], posts_per_sample, sd, r_max, key, first_id + a, out[a:b]),
        n_threads=n_threads,
        chunk=max(1, 2**16 // posts_per_sample),
    )
    return out


def draw_cascades(
    rate: Any,
    *,
    seed: int,
    round_index: int,
    offspring: str = "poisson",
    first_id: int = 0,
    cap: int = 1_000_000,
    dispersion: float = DISPERSION,
    n_seeds: int = 1,
    n_threads: int | None = None,
    chunk: int | None = None,
) -> np.ndarray:
    """Draws cascade sizes: total progeny, the first post included, of a branching process with mean `rate`.

    poisson: size is Borel, P(n) = exp(-R n) (R n)^(n-1) / n!, mean 1 / (1 - R); with s seeds Borel-Tanner,
    (s / n) exp(-R n) (R n)^(n-s) / (n-s)!. negative_binomial: offspring of variance R + R^2 / dispersion. pareto:
    offspring Poisson(R F / E[F]), F followers of the account, truncated Pareto of density exponent 2.3 on 1..1e6.

    Post j draws from a sequence that (seed, round_index, j) names and from nothing else: the result does not depend on
    threads, on chunks or on how a round is cut into calls with `first_id`.

    Args:
      rate: (n_docs,) reproduction number of each post, in [0, 1); read as float32.
      seed, round_index: name the random stream.
      offspring: one of OFFSPRING.
      first_id: id of the first post of this call within the round.
      cap: cascades stop at this size; a size equal to `cap` was cut (sizes == cap is the flag).
      dispersion: of the negative binomial; > 0, smaller is more unequal.
      n_seeds: posts that a cascade starts from, 1..cap.
      n_threads, chunk: threads and posts a task; they change the time only.

    Returns:
      int32 (n_docs,), sizes in n_seeds..cap.

    Raises:
      ValueError: empty, nan, negative or >= 1 rates, with the position of the first; parameters out of range.
    """
    values = np.asarray(rate, np.float32)
    _require(
        values.ndim == 1 and values.size > 0, "rate", "a non-empty vector", f"shape {values.shape}", "rate", "ravel it"
    )
    _check_offspring(offspring, dispersion, cap)
    _require(1 <= n_seeds <= cap, "n_seeds", f"in 1..{cap}", n_seeds, "draw_cascades", "raise cap")
    from loop import cascade

    key = np.uint64(streams.key(seed, "cascade", round_index))
    code = cascade.OFFSPRING[offspring]
    out = np.empty(values.size, np.int32)

    def work(a: int, b: int) -> int:
        at = cascade.draw(values[a:b], key, first_id + a, code, dispersion, n_seeds, cap, out[a:b])
        return a + at if at >= 0 else -1

    # Threads pay from a hundred thousand cascades on.
    alone = values.size if values.size < 2**17 else None
    bad = cascade.in_chunks(values.size, work, n_threads=n_threads, chunk=chunk or alone)
    _require(
        bad < 0, "rate", "in [0, 1)", values[bad], f"rate[{bad}]", "cut it with r_max below 1; drop texts without one"
    )
    return out


def _check_offspring(offspring: str, dispersion: float, cap: int) -> None:
    _require(
        offspring in OFFSPRING, "offspring", f"one of {', '.join(OFFSPRING)}", offspring, "offspring", "see Preset"
    )
    _require(
        0 < dispersion < math.inf, "dispersion", "above 0", dispersion, "offspring", "use poisson for no dispersion"
    )
    _require(1 <= cap < 2**31, "cap", "in 1..2^31 - 1", cap, "cap", "sizes are int32")


# ---------------------------------------------------------------------------------------------------- weight


@dataclass(frozen=True)
class Exposure:
    """What the public made of a round's texts.

    Attributes:
      appeal: float64 (n_docs,), as given.
      rate: float64 (n_docs,), mean rate over the text's posts, in (0, r_max].
      cascades: float64 (n_docs,), mean cascade size over the posts, accounts that posted it, >= 1.
      reach: float64 (n_docs,), mean number of follower feeds that one post of it entered.
      visible: float64 (n_docs,), share of posts reshared at least once.
      weight: float64 (n_docs,), >= 0, mean 1.
      clip_rate: share of posts whose rate was cut at r_max.
      capped_rate: share of posts whose cascade was stopped at the cap.
      content_share: Var(appeal) / Var(ln R) before the cut; published work supports at most about 0.2.
      mean_depth: mean number of generations after the first post.
      one_generation: share of posts reshared by the author's followers only.
    """

    appeal: np.ndarray
    rate: np.ndarray
    cascades: np.ndarray
    reach: np.ndarray
    visible: np.ndarray
    weight: np.ndarray
    clip_rate: float
    capped_rate: float
    content_share: float
    mean_depth: float
    one_generation: float


def expose(
    appeal: Any,
    *,
    posts_per_sample: int = 1000,
    transform: str = "visible",
    r0: float = DEFAULT.r0,
    sigma_author: float = DEFAULT.sigma_author,
    sigma_luck: float = DEFAULT.sigma_luck,
    r_max: float = DEFAULT.r_max,
    offspring: str = DEFAULT.offspring,
    dispersion: float = DISPERSION,
    crawl_prob: float = CRAWL_PROB,
    top_share: float = 0.1,
    cap: int = 1_000_000,
    seed: int,
    round_index: int,
    first_id: int = 0,
    n_threads: int | None = None,
) -> Exposure:
    """Draws K posts of each text and turns their cascades into the text's weight.

    The same rates and sizes as `rate` and then `draw_cascades` over the flattened rates, without holding n_docs x K of
    them. Transforms, each scaled to mean 1:

      visible    share of the K posts reshared at least once (the default: most selection for the drift it brings)
      inclusion  mean of 1 - (1 - crawl_prob)^N: at least one copy of the post is crawled
      log        mean of 1 + log2(N)
      raw        mean of N: infinite-variance weights, here to show what they do
      top_k      1 for the texts in the top `top_share` by mean N, 0 for the rest; ties at the edge share what is left

    Where no post of any text is reshared, as may happen with few posts, all weigh 1.

    For `visible` under Poisson offspring a post is reshared with chance 1 - exp(-R); K draws of it are simulated all
    the same, so that luck is in the weight.

    Args:
      appeal: float (n_docs,).
      posts_per_sample: K; 1 is the luck arm.
      transform: one of TRANSFORMS.
      r0, sigma_author, sigma_luck, r_max, offspring: see Preset; dispersion, cap: see `draw_cascades`.
      crawl_prob: in (0, 1); read by `inclusion` alone.
      top_share: in (0, 1]; read by `top_k` alone.
      seed, round_index, first_id, n_threads: see `rate`.

    Raises:
      ValueError: what `rate` and `draw_cascades` refuse; an unknown transform.
    """
    base, sd = _log_rate(appeal, r0, sigma_author, sigma_luck, r_max)
    _require(posts_per_sample >= 1, "posts_per_sample", ">= 1", posts_per_sample, "expose", "1 is the luck arm")
    names = ", ".join(TRANSFORMS)
    _require(transform in TRANSFORMS, "transform", f"one of {names}", transform, "expose", "see expose")
    _require(
        0 < crawl_prob < 1, "crawl_prob", "in (0, 1)", crawl_prob, "expose", "towards 0 is raw, towards 1 unweighted"
    )
    _require(0 < top_share <= 1, "top_share", "in (0, 1]", top_share, "expose", "0.1 keeps one text in ten")
    _check_offspring(offspring, dispersion, cap)
    from loop import cascade

    rate_key = np.uint64(streams.key(seed, "rate", round_index))
    key = np.uint64(streams.key(seed, "cascade", round_index))
    code = cascade.OFFSPRING[offspring]
    sums = np.empty((base.size, len(cascade.SUMS)))  # (n_docs, n_sums)
    miss = math.log1p(-crawl_prob)

    def work(a: int, b: int) -> None:
        cascade.posts(
            base[a:b], posts_per_sample, sd, r_max, rate_key, key, first_id + a, code, dispersion, cap, miss, sums[a:b]
        )

    # Threads pay from a million posts on.
    alone = base.size * posts_per_sample < 2**20
    chunk = base.size if alone else max(1, 2**16 // posts_per_sample)
    cascade.in_chunks(base.size, work, n_threads=n_threads, chunk=chunk)
    mean = dict(zip(cascade.SUMS, (sums / posts_per_sample).T, strict=True))
    raw = {
        "visible": mean["visible"],
        "inclusion": mean["inclusion"],
        "log": mean["log"],
        "raw": mean["size"],
        "top_k": _top(mean["size"], top_share),
    }[transform]
    content = float(np.var(base))
    return Exposure(
        appeal=np.asarray(appeal, np.float64),
        rate=mean["rate"],
        cascades=mean["size"],
        reach=mean["reach"],
        visible=mean["visible"],
        weight=raw / raw.mean() if raw.any() else np.ones(base.size),
        clip_rate=float(mean["clipped"].mean()),
        capped_rate=float(mean["capped"].mean()),
        content_share=content / (content + sd**2) if content + sd**2 > 0 else 0.0,
        mean_depth=float(mean["depth"].mean()),
        one_generation=float(mean["one_generation"].mean()),
    )


def _top(size: np.ndarray, share: float) -> np.ndarray:
    """Returns 1 for the ceil(share * n) largest, 0 for the rest; values tied at the edge share the remaining places."""
    k = math.ceil(share * size.size)
    edge = np.partition(size, size.size - k)[size.size - k]
    above, tied = size > edge, size == edge
    return above + tied * ((k - above.sum()) / tied.sum())


def inclusion_weight(sizes: Any, crawl_prob: float) -> np.ndarray:
    """Returns 1 - (1 - crawl_prob)^N, the chance that a text with N public copies is crawled at least once.

    Special cases: N = 1 gives crawl_prob; crawl_prob -> 0 is proportional to size N; crawl_prob -> 1 is unweighted.

    Args:
      sizes: (n_docs,) cascade sizes, >= 0.
      crawl_prob: chance c in (0, 1) that one copy is crawled.

    Returns:
      float64 (n_docs,) in [0, 1], not scaled.
    """
    n = _finite_vector(sizes, "sizes", "inclusion_weight")
    bad = np.flatnonzero(n < 0)
    _require(not bad.size, "sizes", ">= 0", n[bad[0]] if bad.size else "", f"sizes[{bad[:1]}]", "a size counts posts")
    _require(0 < crawl_prob < 1, "crawl_prob", "in (0, 1)", crawl_prob, "inclusion_weight", "see expose")
    return -np.expm1(n * math.log1p(-crawl_prob))


def n_eff(weights: Any) -> float:
    """Returns the effective number of documents, (sum w)^2 / sum w^2, in 1..n_docs; n_docs for equal weights (Kish)."""
    w = _weights(weights, "n_eff")
    w = w / w.max()
    return float(w.sum() ** 2 / (w * w).sum())


def top1_share(weights: Any) -> float:
    """Returns the share of all weight on the heaviest 1% of texts (rounded up), in (0, 1]."""
    w = _weights(weights, "top1_share")
    k = math.ceil(0.01 * w.size)
    return float(np.partition(w, w.size - k)[w.size - k :].sum() / w.sum())


def differential(weights: Any, personas: Sequence[str]) -> dict[str, float]:
    """Returns mean weight of each persona over the mean weight of all; 1 is no selection.

    The persona labels meet the weights here, after the public has spoken, and never before.
    """
    w = _weights(weights, "differential")
    _require(
        len(personas) == w.size, "personas", f"{w.size} labels", len(personas), "differential", "one for each weight"
    )
    labels = np.asarray(personas)
    return {str(p): float(w[labels == p].mean() / w.mean()) for p in sorted(set(labels.tolist()))}


def drift_warning(weights: Any, *, transform: str, posts_per_sample: int) -> str | None:
    """Returns a warning if fewer than 5% of the documents carry the weight (n_eff), else None."""
    effective, n = n_eff(weights), len(weights)
    if effective >= 0.05 * n:
        return None
    cause = {
        "raw": "raw reach has infinite variance, a few documents take the corpus",
        "top_k": "top_share keeps too few documents",
    }.get(transform, f"{posts_per_sample} posts a text leave its weight to luck")
    way_out = "raise posts_per_sample" if transform not in ("raw", "top_k") else "use transform visible or inclusion"
    return (
        f"n_eff must be at least 5% of {n} documents, got {effective:.1f} ({100 * effective / n:.1f}%) at virality: "
        f"{cause}, so frequencies drift and selection cannot be told from it; {way_out}"
    )


def resample(weights: Any, n: int, *, rng: np.random.Generator) -> np.ndarray:
    """Draws n documents in proportion to weight, systematically: document i comes floor or ceil(n w_i / sum w) times.

    One uniform for the whole draw, so it adds the least noise a resampling can.

    Args:
      weights: (n_docs,) >= 0, any scale.
      n: documents to draw, >= 1.

    Returns:
      int64 (n,), indices, ascending.
    """
    w = _weights(weights, "resample")
    _require(n >= 1, "n", ">= 1", n, "resample", "draw at least one document")
    edges = np.cumsum(w)
    points = (rng.random() + np.arange(n)) * (edges[-1] / n)
    # The last point may round up to the total; documents of weight 0 at the end must not catch it.
    return np.minimum(np.searchsorted(edges, points, side="right"), np.flatnonzero(w)[-1])


def shuffle(exposure: Exposure, *, rng: np.random.Generator) -> Exposure:
    """Returns the same exposure on random documents: the control `shuffled`, drift without selection."""
    order = rng.permutation(len(exposure.weight))
    columns = ("appeal", "rate", "cascades", "reach", "visible", "weight")
    return replace(exposure, **{name: getattr(exposure, name)[order] for name in columns})


# ---------------------------------------------------------------------------------------------------- follower graph


@dataclass(frozen=True)
class FollowerGraph:
    """Who sees whose posts, in compressed sparse rows.

    Attributes:
      indptr: int32 (n_nodes + 1,); followers of node i are indices[indptr[i]:indptr[i + 1]].
      indices: int32 (n_edges,).
    """

    indptr: np.ndarray
    indices: np.ndarray

    @property
    def n_nodes(self) -> int:
        return self.indptr.size - 1

    @property
    def mean_followers(self) -> float:
        return self.indices.size / self.n_nodes


def follower_graph(graph: igraph.Graph) -> FollowerGraph:
    """Reads an igraph graph; a directed edge runs from an author to a follower, an undirected one both ways.

    Raises:
      ValueError: a graph without nodes or without edges.
    """
    _require(
        graph.vcount() > 0 and graph.ecount() > 0, "graph", "a graph with edges", graph.summary(), "graph", "add edges"
    )
    edges = np.asarray(graph.get_edgelist(), np.int64)  # (n_edges, 2)
    if not graph.is_directed():
        edges = np.concatenate([edges, edges[:, ::-1]])
    return _rows(edges, graph.vcount())


def _rows(edges: np.ndarray, n_nodes: int) -> FollowerGraph:
    edges = edges[np.lexsort((edges[:, 1], edges[:, 0]))]
    indptr = np.zeros(n_nodes + 1, np.int32)
    np.cumsum(np.bincount(edges[:, 0], minlength=n_nodes), out=indptr[1:])
    return FollowerGraph(indptr, edges[:, 1].astype(np.int32))


def graph_cascades(
    graph: FollowerGraph,
    rate: Any,
    *,
    seed: int,
    round_index: int,
    first_id: int = 0,
    cap: int = 1_000_000,
    n_threads: int | None = None,
    chunk: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws cascades on a follower graph: independent cascade from an author drawn uniformly.

    Each follower of a sharer shares with chance p = rate / mean_followers, once only. So `rate` is the mean number of
    reshares of a first post; later generations are larger by the degree bias of the graph (a follower has more
    followers than an account drawn at random) and smaller by those who have already shared.

    Args:
      graph: see `follower_graph`.
      rate: float (n_docs,), 0 <= rate <= mean_followers; read as float32.
      seed, round_index, first_id, cap, n_threads, chunk: see `draw_cascades`.

    Returns:
      sizes int32 (n_docs,) in 1..cap; structural virality float32 (n_docs,), nan for a cascade of one.

    Raises:
      ValueError: empty, nan, negative or too large rates, with the position of the first.
    """
    values = np.asarray(rate, np.float32)
    _require(
        values.ndim == 1 and values.size > 0, "rate", "a non-empty vector", f"shape {values.shape}", "rate", "ravel it"
    )
    _require(1 <= cap < 2**31, "cap", "in 1..2^31 - 1", cap, "cap", "sizes are int32")
    from loop import cascade

    key = np.uint64(streams.key(seed, "graph", round_index))
    sizes, virality = np.empty(values.size, np.int32), np.empty(values.size, np.float32)
    per_edge = 1.0 / graph.mean_followers

    def work(a: int, b: int) -> int:
        at = cascade.graph_posts(
            graph.indptr, graph.indices, values[a:b], per_edge, key, first_id + a, cap, sizes[a:b], virality[a:b]
        )
        return a + at if at >= 0 else -1

    bad = cascade.in_chunks(values.size, work, n_threads=n_threads, chunk=chunk)
    rule = f"in 0..{graph.mean_followers:g} (mean_followers)"
    _require(bad < 0, "rate", rule, values[bad], f"rate[{bad}]", "a follower shares with chance rate / mean_followers")
    return sizes, virality


def structural_virality(parents: Any) -> float:
    """Returns the mean distance between two different nodes of a cascade's tree.

    2 / (n (n - 1)) * sum over edges of m (n - m), m the size of the subtree below the edge. Special cases: star of n
    nodes 2 - 2 / n, path (n + 1) / 3.

    Args:
      parents: int (n,), position of each node's parent, before the node itself; the first, of the root, is not read.

    Raises:
      ValueError: fewer than two nodes, or a parent that does not stand before its child.

    Source: Goel, Anderson, Hofman and Watts 2016, Management Science 62:180, eq. 1, in the O(n) form over edges.
    """
    p = np.asarray(parents, np.int64)
    _require(
        p.ndim == 1 and p.size >= 2, "parents", "a vector of >= 2", f"shape {p.shape}", "parents", "one post has none"
    )
    bad = np.flatnonzero((p[1:] < 0) | (p[1:] >= np.arange(1, p.size))) + 1
    at = int(bad[0]) if bad.size else 0
    _require(not bad.size, "parents", f"in 0..{at - 1}", p[at], f"parents[{at}]", "number nodes in order of arrival")
    from loop import cascade

    return float(cascade.mean_distance(p, np.empty(p.size, np.int64), p.size))


# ---------------------------------------------------------------------------------------------------- check


@dataclass(frozen=True)
class Target:
    """One row of `loop virality check`.

    Attributes:
      target: what is compared; kind: "theory" or "empirical"; source: where the value comes from.
      value: the published or exact value; tolerance: largest |got - value| that counts as a hit.
      preset: the preset tried, or the exact law; got: what it gives; hit: within tolerance.
    """

    target: str
    kind: str
    source: str
    value: float
    tolerance: float
    preset: str
    got: float
    hit: bool


def _row(target: str, kind: str, source: str, value: float, tolerance: float, preset: str, got: float) -> Target:
    return Target(target, kind, source, value, tolerance, preset, got, bool(abs(got - value) <= tolerance))


def check(*, seed: int = 0, n_posts: int = 2_000_000) -> list[Target]:
    """Compares the simulator with theory, and each preset with what is published; some targets are missed and say so.

    Theory rows: tolerance is 5 standard errors of n_posts draws. Empirical rows: 0.01 for the share never reshared, a
    quarter for rarer events, else the range named in the target; published figures differ by about as much.

    Args:
      seed: names the random stream.
      n_posts: posts for each row, >= 100,000, below which there may be no large cascade to speak of; 2 million take
        some seconds.
    """
    _require(n_posts >= 100_000, "n_posts", ">= 100000", n_posts, "check", "large cascades are rare")
    return _theory_rows(seed, n_posts) + [
        row for name in ("goel2012", "goel2016_mean") for row in _preset_rows(name, seed, n_posts)
    ]


def _theory_rows(seed: int, n: int) -> list[Target]:
    rows = []

    def add(target: str, value: float, sd: float, got: float) -> None:
        rows.append(_row(target, "theory", "exact law", value, 5 * sd / math.sqrt(n), "", got))

    def sizes(index: int, r: float, **options: Any) -> np.ndarray:
        return draw_cascades(np.full(n, r, np.float32), seed=seed, round_index=index, **options).astype(np.float64)

    for index, r in enumerate((0.3, 0.5, 0.9)):
        borel = sizes(index, r)
        add(f"Borel R={r}: mean 1/(1-R)", 1 / (1 - r), math.sqrt(r / (1 - r) ** 3), borel.mean())
        p = math.exp(-r)
        add(f"Borel R={r}: P(1) = exp(-R)", p, math.sqrt(p * (1 - p)), float((borel == 1).mean()))
    tanner = sizes(3, 0.5, n_seeds=5)
    add("Borel-Tanner R=0.5, 5 seeds: mean s/(1-R)", 10.0, math.sqrt(5 * 0.5 / 0.5**3), tanner.mean())
    k = 0.5
    nb = sizes(4, 0.5, offspring="negative_binomial", dispersion=k)
    p = (1 + 0.5 / k) ** -k
    add("negative binomial R=0.5, k=0.5: P(1)", p, math.sqrt(p * (1 - p)), float((nb == 1).mean()))
    add("negative binomial R=0.5, k=0.5: mean", 2.0, math.sqrt((0.5 + 0.25 / k) / 0.5**3), nb.mean())
    p = _pareto_p1(0.5)
    pareto = sizes(5, 0.5, offspring="pareto")
    add("Pareto R=0.5: P(1) = E exp(-R F / E[F])", p, math.sqrt(p * (1 - p)), float((pareto == 1).mean()))
    star, path = structural_virality(np.zeros(50, int)), structural_virality(np.arange(50) - 1)
    rows.append(_row("structural virality, star of 50: 2 - 2/n", "theory", "exact law", 1.96, 1e-12, "", star))
    rows.append(_row("structural virality, path of 50: (n + 1)/3", "theory", "exact law", 17.0, 1e-12, "", path))
    return rows


def _pareto_p1(r: float) -> float:
    """Returns E[exp(-r F / E[F])] over the truncated Pareto, by the midpoint rule on its quantiles in log F."""
    from loop import cascade

    low, high, a = math.log(cascade.FOLLOWERS_MIN), math.log(cascade.FOLLOWERS_MAX), cascade.TAIL
    x = low + (np.arange(200_000) + 0.5) * (high - low) / 200_000
    density = np.exp(-a * (x - low))
    return float((density * np.exp(-r / cascade.MEAN_FOLLOWERS * np.exp(x))).sum() / density.sum())


def _preset_rows(name: str, seed: int, n: int) -> list[Target]:
    preset = PRESETS[name]
    appeal = CONTENT_SD * streams.stream(seed, "check", 0).standard_normal(n)
    # One post a text, so that `cascades` is the size of that post's cascade.
    seen = expose(
        appeal,
        posts_per_sample=1,
        transform="raw",
        r0=preset.r0,
        sigma_author=preset.sigma_author,
        sigma_luck=preset.sigma_luck,
        r_max=preset.r_max,
        offspring=preset.offspring,
        seed=seed,
        round_index=0,
    )
    size = seen.cascades
    log_size = np.log(size)
    tail = size[size >= 50]
    exponent = 1 + tail.size / np.log(tail / 49.5).sum()  # Clauset, Shalizi and Newman 2009, eq. 3.7, x_min = 50
    r2 = float(np.corrcoef(appeal, log_size)[0, 1] ** 2)
    graph_size, graph_virality = _preset_on_graph(seen.rate, seed)
    big = graph_size >= 10
    few = big.sum() < 3  # nothing to correlate: nan, a miss
    correlation = math.nan if few else float(np.corrcoef(np.log(graph_size[big]), graph_virality[big])[0, 1])
    goel12 = "Goel, Watts and Goldstein 2012, quoted in a secondary source"
    goel16 = "Goel et al. 2016, quoted in a secondary source"
    found = (
        ("share of posts never reshared", goel12, 0.95, 0.01, 1 - float(seen.visible.mean())),
        ("share reshared by the author's followers only", goel12, 0.03, 0.0075, seen.one_generation),
        ("share with at least 100 adoptions", goel16, 2.5e-4, 6e-5, float((size >= 100).mean())),
        (
            "mean size, as E[1/(1-R)]",  # sizes have a variance so large that their sample mean says little
            goel16 + " (1.2 billion adoptions of 600 million posts: 1.9 to 2)",
            1.95,
            0.15,
            float((1 / (1 - seen.rate)).mean()),
        ),
        ("exponent of the size density", "Leskovec et al. 2007, blog cascades, recalled", 2.0, 0.25, float(exponent)),
        ("R2 of ln N on content, 0 to 0.2", "Martin et al. 2016: under half with all features", 0.1, 0.1, r2),
        (
            "median structural virality, 2 to 4",
            "Goel et al. 2016, order recalled",
            3.0,
            1.0,
            math.nan if few else float(np.median(graph_virality[big])),
        ),
        ("correlation of structural virality and ln N, -0.3 to 0.3", "Goel et al. 2016: low", 0.0, 0.3, correlation),
    )
    return [_row(target, "empirical", source, value, tol, name, got) for target, source, value, tol, got in found]


def _preset_on_graph(rates: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sizes and structural virality of up to 500,000 posts of these rates on a scale-free graph of 50,000.

    Degree exponent 2.3 as for the followers, 250,000 friendships, ends drawn in proportion to rank^(-1 / 1.3) (Goh,
    Kahng and Kim 2001). Its degree bias is divided out, so that a reshare breeds as many reshares in both routes.
    """
    n_nodes = 50_000
    weight = np.arange(1, n_nodes + 1) ** (-1 / 1.3)
    ends = streams.stream(seed, "graph", 0).choice(n_nodes, size=(250_000, 2), p=weight / weight.sum())
    ends = np.unique(np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1), axis=0)  # no loops, no double friendships
    graph = _rows(np.concatenate([ends, ends[:, ::-1]]), n_nodes)
    degree = np.diff(graph.indptr).astype(np.float64)
    bias = float((degree**2).mean() / degree.mean() ** 2)
    return graph_cascades(graph, rates[:500_000] / bias, seed=seed, round_index=0)
