"""Cascades: exact laws, a plain-Python twin, and independence of threads, chunks and order.

Statistical tests fail on correct code with probability 1e-6 or less each.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import igraph
import numpy as np
import pytest
from scipy import stats
from scipy.special import gammaln, ndtri

from loop import cascade, virality
from loop.rng import key

ERROR = 1e-6
Z = -NormalDist().inv_cdf(ERROR / 2)  # 4.89 standard errors
WORD = 2**64 - 1


# ------------------------------------------------------------------------------------------------ exact laws


def borel_tanner(n: np.ndarray, r: float, s: int = 1) -> np.ndarray:
    """P(N = n) = (s/n) exp(-rn) (rn)^(n-s) / (n-s)! for n >= s."""
    n = n.astype(float)
    return np.exp(np.log(s / n) - r * n + (n - s) * np.log(r * n) - gammaln(n - s + 1))


def negative_binomial_progeny(n: np.ndarray, r: float, k: float) -> np.ndarray:
    """P(N = n) = Gamma(kn+n-1) / (Gamma(kn) Gamma(n+1)) (r/k)^(n-1) / (1+r/k)^(kn+n-1)."""
    n = n.astype(float)
    logs = gammaln(k * n + n - 1) - gammaln(k * n) - gammaln(n + 1)
    return np.exp(logs + (n - 1) * np.log(r / k) - (k * n + n - 1) * np.log1p(r / k))


def pareto_progeny(n_max: int, r: float) -> np.ndarray:
    """P(N = n), n = 1..n_max, by Otter-Dwass: P(X_1 + ... + X_n = n - 1) / n, X Poisson mixed over truncated Pareto."""
    low, high, a = 0.0, math.log(1e6), 1.3
    x = low + (np.arange(20_000) + 0.5) * (high - low) / 20_000  # log followers, density proportional to exp(-a x)
    weight = np.exp(-a * x)
    weight /= weight.sum()
    mean = r * np.exp(x) / (weight @ np.exp(x))
    j = np.arange(n_max)
    offspring = np.array([weight @ np.exp(k * np.log(mean) - mean - gammaln(k + 1)) for k in j])
    out, power = [], np.eye(1, n_max)[0]
    for n in range(1, n_max + 1):
        power = np.convolve(power, offspring)[:n_max]  # P(X_1 + ... + X_n = 0..n_max-1), exact below the truncation
        out.append(power[n - 1] / n)
    return np.array(out)


def distances(sizes: np.ndarray, pmf: np.ndarray, first: int) -> tuple[float, float]:
    """Returns KS distance over its 1e-6 bound and the p-value of a chi-square.

    The bound is Dvoretzky-Kiefer-Wolfowitz's, valid for discrete laws. Bins have expected count >= 25, the last is the
    tail.
    """
    n = sizes.size
    support = first + np.arange(pmf.size)
    counts = np.bincount(np.minimum(sizes, support[-1] + 1), minlength=support[-1] + 2)[first:].astype(float)
    ks = np.abs(np.cumsum(counts[:-1]) / n - np.cumsum(pmf)).max() / math.sqrt(math.log(2 / ERROR) / (2 * n))
    expected = np.append(pmf, max(0.0, 1 - pmf.sum())) * n
    observed, wanted, o, e = [], [], 0.0, 0.0
    for count, mean in zip(counts, expected, strict=True):
        o, e = o + count, e + mean
        if e >= 25:
            observed.append(o)
            wanted.append(e)
            o = e = 0.0
    observed[-1] += o
    wanted[-1] += e
    chi2 = float(((np.array(observed) - wanted) ** 2 / wanted).sum())
    return float(ks), float(stats.chi2.sf(chi2, len(wanted) - 1))


def assert_law(sizes: np.ndarray, pmf: np.ndarray, first: int = 1) -> None:
    ks, p = distances(sizes, pmf, first)
    assert ks <= 1, f"KS distance is {ks:.2f} times its bound"
    assert p >= ERROR, f"chi-square p = {p:.2g}"


def draw(r: float, n: int, **options: object) -> np.ndarray:
    return virality.draw_cascades(np.full(n, r), seed=7, round_index=3, **options)


N = 600_000


@pytest.mark.parametrize("r", [0.05, 0.3, 0.5, 0.9])
def test_poisson_offspring_give_borel_sizes(r):
    n = np.arange(1, 3000)
    sizes = draw(r, N)
    assert_law(sizes, borel_tanner(n, r))
    # A rate off by 3% must be seen.
    assert distances(sizes, borel_tanner(n, r * 1.03 + 0.003), 1)[1] < ERROR


def test_five_seeds_give_borel_tanner_sizes():
    sizes = draw(0.5, N, n_seeds=5)
    assert_law(sizes, borel_tanner(np.arange(5, 1000), 0.5, 5), first=5)
    # Five seeds and not four plus one reshare: the law of four seeds, shifted, is rejected.
    assert distances(sizes, borel_tanner(np.arange(4, 1000), 0.5, 4), 5)[1] < ERROR


@pytest.mark.parametrize(("r", "k", "wrong_k"), [(0.5, 0.5, 0.6), (0.3, 0.0146, 0.0175), (0.8, 40.0, 8.0)])
def test_negative_binomial_offspring_give_their_total_progeny_law(r, k, wrong_k):
    n = np.arange(1, 4000)
    sizes = draw(r, N, offspring="negative_binomial", dispersion=k)
    assert_law(sizes, negative_binomial_progeny(n, r, k))
    assert distances(sizes, negative_binomial_progeny(n, r, wrong_k), 1)[1] < ERROR


@pytest.mark.parametrize("r", [0.14, 0.6])
def test_pareto_followers_give_the_otter_dwass_law(r):
    sizes = draw(r, N, offspring="pareto")
    assert_law(sizes, pareto_progeny(100, r))
    assert distances(sizes, pareto_progeny(100, r * 1.05), 1)[1] < ERROR


@pytest.mark.parametrize("r", [0.3, 0.5])
def test_borel_mean_and_variance(r):
    sizes = draw(r, N).astype(float)
    mean, variance = 1 / (1 - r), r / (1 - r) ** 3
    n = np.arange(1, 3000)
    fourth = float((borel_tanner(n, r) * (n - mean) ** 4).sum())
    assert abs(sizes.mean() - mean) < Z * math.sqrt(variance / N)
    assert abs(((sizes - mean) ** 2).mean() - variance) < Z * math.sqrt((fourth - variance**2) / N)
    # Geometric sizes of the same mean have variance r / (1 - r)^2: outside.
    assert abs(r / (1 - r) ** 2 - variance) > 2 * Z * math.sqrt((fourth - variance**2) / N)


def test_every_offspring_law_has_mean_size_one_over_one_minus_rate():
    n = np.arange(1, 4000)
    second = float((negative_binomial_progeny(n, 0.4, 0.5) * (n - 1 / 0.6) ** 2).sum())
    sizes = draw(0.4, N, offspring="negative_binomial", dispersion=0.5)
    assert abs(sizes.mean() - 1 / 0.6) < Z * math.sqrt(second / N)
    # Pareto: the variance is finite through the truncation at 1e6 followers alone, sigma^2 = r + r^2 Var(F)/E[F]^2.
    a, top = 1.3, 1e6
    norm = 1 - top**-a
    m1 = a / (a - 1) * (1 - top ** (1 - a)) / norm
    m2 = a / (2 - a) * (top ** (2 - a) - 1) / norm
    assert m1 == pytest.approx(cascade.MEAN_FOLLOWERS, rel=1e-12)
    variance = (0.1 + 0.01 * (m2 / m1**2 - 1)) / 0.9**3
    assert abs(draw(0.1, N, offspring="pareto").mean() - 1 / 0.9) < Z * math.sqrt(variance / N)


# ------------------------------------------------------------------------------------------------ the plain twin


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


class Sequence:
    """splitmix64 as in its paper, one uniform at a time."""

    def __init__(self, key: int, post: int) -> None:
        self.state = mix(key ^ mix(post))

    def unit(self) -> float:
        word = mix(self.state)
        self.state = (self.state + 0x9E3779B97F4A7C15) & WORD
        return (word >> 11) / 2**53


def invert(u: float, first: float, ratio) -> int:
    """Smallest k whose cumulated probability exceeds u, the terms given by their ratios."""
    k, p = 0, first
    total = p
    while u >= total:
        p *= ratio(k)
        k += 1
        total += p
    return k


def slow_cascade(r: float, draws: Sequence, offspring: str, k: float, n_seeds: int, cap: int) -> int:
    size = alive = n_seeds
    while alive and size < cap and r > 0:
        mean = r * alive
        if offspring == "pareto":
            feeds = sum(math.exp(-math.log(1 - draws.unit() * (1 - (1 / 1e6) ** 1.3)) / 1.3) for _ in range(alive))
            mean = r / cascade.MEAN_FOLLOWERS * feeds
        born = 0
        if offspring == "negative_binomial":
            parts = int(k * alive * math.log1p(r / k) / 30) + 1
            shape, part = k * alive / parts, mean / parts
            q = part / (part + shape)
            for _ in range(parts):
                p0 = math.exp(-shape * math.log1p(part / shape))
                born += invert(draws.unit(), p0, lambda j, s=shape, q=q: q * (s + j) / (j + 1))
                if size + born >= cap:
                    break
        else:
            parts = int(mean / 30) + 1
            for _ in range(parts):
                born += invert(draws.unit(), math.exp(-mean / parts), lambda j, m=mean / parts: m / (j + 1))
                if size + born >= cap:
                    break
        alive = min(born, cap - size)
        size += alive
    return size


@pytest.mark.parametrize("offspring", virality.OFFSPRING)
@pytest.mark.parametrize(("n_seeds", "cap"), [(1, 10**6), (1, 6), (120, 10**6)])
def test_a_plain_python_twin_draws_the_same_sizes(offspring, n_seeds, cap):
    # 120 seeds: more than 30 expected offspring, so that a generation is drawn in parts.
    rates = np.tile(np.array([0.0, 0.02, 0.3, 0.6, 0.9], np.float32), 400 if n_seeds == 1 else 12)
    options = {"offspring": offspring, "dispersion": 0.5, "n_seeds": n_seeds, "cap": cap, "first_id": 11}
    fast = virality.draw_cascades(rates, seed=5, round_index=2, **options)
    name = key(5, "cascade", 2)
    slow = [slow_cascade(float(r), Sequence(name, 11 + i), offspring, 0.5, n_seeds, cap) for i, r in enumerate(rates)]
    assert fast.tolist() == slow
    assert fast.max() > n_seeds + 2


def test_a_plain_python_twin_draws_the_same_rates():
    appeal = np.linspace(-1, 1, 50)
    fast = virality.rate(appeal, r0=0.2, sigma_author=1.0, sigma_luck=1.5, posts_per_sample=20, seed=5, round_index=2)
    sd, quantile = math.sqrt(3.25), NormalDist().inv_cdf
    name = key(5, "rate", 2)
    slow = [
        [
            min(0.9, math.exp(math.log(0.2) - 3.25 / 2 + x + sd * quantile(Sequence(name, 20 * i + k).unit())))
            for k in range(20)
        ]
        for i, x in enumerate(appeal)
    ]
    # float32 has 24 bits; the standard library's quantile rounds its last bit differently.
    np.testing.assert_allclose(fast, slow, rtol=1e-7)


def slow_graph_cascade(graph: virality.FollowerGraph, p: float, draws: Sequence) -> tuple[int, list[int]]:
    author = int(draws.unit() * graph.n_nodes)
    queue, parent, seen = [author], [-1], {author}
    for head, node in enumerate(queue):
        followers = graph.indices[graph.indptr[node] : graph.indptr[node + 1]].tolist()
        at = 0
        while p > 0 and at < len(followers):
            skip = math.log(1 - draws.unit()) / math.log1p(-p)
            if skip >= len(followers) - at:
                break
            at += int(skip) + 1
            if followers[at - 1] not in seen:
                seen.add(followers[at - 1])
                queue.append(followers[at - 1])
                parent.append(head)
    return len(queue), parent


def barabasi(n: int, m: int) -> virality.FollowerGraph:
    import random

    igraph.set_random_number_generator(random.Random(0))
    try:
        return virality.follower_graph(igraph.Graph.Barabasi(n, m))
    finally:
        igraph.set_random_number_generator(random)


def test_a_plain_python_twin_draws_the_same_graph_cascades():
    graph = barabasi(300, 3)
    rates = np.tile(np.array([0.0, 0.2, 0.7, 1.1], np.float32), 300)
    sizes, nu = virality.graph_cascades(graph, rates, seed=5, round_index=2)
    name = key(5, "graph", 2)
    for i, r in enumerate(rates):
        size, parent = slow_graph_cascade(graph, float(r) / graph.mean_followers, Sequence(name, i))
        assert sizes[i] == size
        if size > 1:
            tree = igraph.Graph(list(enumerate(parent))[1:])
            assert nu[i] == pytest.approx(tree.average_path_length(), rel=1e-6)
        else:
            assert np.isnan(nu[i])


# ------------------------------------------------------------------------------------------------ keys and keepers


@pytest.mark.parametrize("offspring", virality.OFFSPRING)
def test_threads_chunks_and_cuts_do_not_change_a_bit(offspring):
    rates = np.random.default_rng(0).uniform(0, 0.9, 30_000)
    options = {"seed": 1, "round_index": 0, "offspring": offspring}
    whole = virality.draw_cascades(rates, n_threads=1, **options)
    for n_threads, chunk in ((2, None), (2, 777), (1, 1000), (3, 1)):
        part = slice(None) if chunk != 1 else slice(0, 500)
        assert np.array_equal(
            virality.draw_cascades(rates[part], n_threads=n_threads, chunk=chunk, **options), whole[part]
        )
    tail = virality.draw_cascades(rates[12_345:], first_id=12_345, **options)
    assert np.array_equal(tail, whole[12_345:])
    # Another seed, round or id is another draw.
    assert not np.array_equal(virality.draw_cascades(rates[12_345:], **options), whole[12_345:])
    assert not np.array_equal(virality.draw_cascades(rates, **{**options, "round_index": 1}), whole)
    assert not np.array_equal(virality.draw_cascades(rates, **{**options, "seed": 2}), whole)


def test_threads_chunks_and_cuts_do_not_change_graph_cascades():
    graph, rates = barabasi(500, 3), np.full(20_000, 0.8)
    whole = virality.graph_cascades(graph, rates, seed=1, round_index=0, n_threads=1)
    other = virality.graph_cascades(graph, rates, seed=1, round_index=0, n_threads=2, chunk=333)
    tail = virality.graph_cascades(graph, rates[700:], seed=1, round_index=0, first_id=700)
    for a, b, c in zip(whole, other, tail, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[700:], c)


def test_fused_exposure_is_rates_then_cascades():
    appeal = np.linspace(-0.5, 0.5, 40)
    for offspring in virality.OFFSPRING:
        options = {"seed": 3, "round_index": 4, "first_id": 9}
        seen = virality.expose(
            appeal, posts_per_sample=50, transform="raw", offspring=offspring, n_threads=2, **options
        )
        rates = virality.rate(appeal, posts_per_sample=50, **options)
        sizes = virality.draw_cascades(
            rates.ravel(), seed=3, round_index=4, offspring=offspring, first_id=9 * 50
        ).reshape(40, 50)
        np.testing.assert_allclose(seen.cascades, sizes.mean(1), rtol=1e-12)
        np.testing.assert_allclose(seen.visible, (sizes >= 2).mean(1), rtol=1e-12)
        np.testing.assert_allclose(seen.rate, rates.astype(float).mean(1), rtol=1e-12)
        np.testing.assert_allclose(seen.weight, sizes.mean(1) / sizes.mean(), rtol=1e-12)
        assert seen.clip_rate == pytest.approx((rates == np.float32(0.9)).mean())


def test_rate_zero_is_never_reshared():
    for offspring in virality.OFFSPRING:
        assert (draw(0.0, 1000, offspring=offspring) == 1).all()
    sizes, _ = virality.graph_cascades(barabasi(50, 2), np.zeros(100), seed=0, round_index=0)
    assert (sizes == 1).all()


@pytest.mark.parametrize("offspring", virality.OFFSPRING)
def test_the_cap_cuts_long_cascades_and_leaves_the_others_alone(offspring):
    free = draw(0.9, 20_000, offspring=offspring)
    cut = draw(0.9, 20_000, offspring=offspring, cap=20)
    assert (cut == np.minimum(free, 20)).all()
    assert (cut == 20).sum() > 100


def test_normal_quantile_agrees_with_scipy():
    u = np.concatenate([np.linspace(1e-6, 1 - 1e-6, 4001), 10.0 ** -np.arange(1, 16), 1 - 10.0 ** -np.arange(1, 15)])
    np.testing.assert_allclose([cascade.normal(x) for x in u], ndtri(u), rtol=1e-13, atol=1e-15)


# ------------------------------------------------------------------------------------------------ follower graph


def test_structural_virality_of_star_and_path():
    for n in (2, 3, 10, 500):
        assert virality.structural_virality(np.zeros(n, int)) == pytest.approx(2 - 2 / n)
        assert virality.structural_virality(np.arange(n) - 1) == pytest.approx((n + 1) / 3)


def test_a_certain_cascade_covers_star_ring_and_path():
    # p = 1: everybody shares. A star stays a star from whatever node it starts, a path stays a path.
    for graph, nu in ((igraph.Graph.Star(30), 2 - 2 / 30), (igraph.Graph(30, [(i, i + 1) for i in range(29)]), 31 / 3)):
        followers = virality.follower_graph(graph)
        rates = np.full(200, followers.mean_followers)
        sizes, got = virality.graph_cascades(followers, rates, seed=0, round_index=0)
        assert (sizes == 30).all()
        np.testing.assert_allclose(got, nu, rtol=1e-6)


def test_followers_share_independently_with_the_stated_chance():
    # Directed star, 1 author with 12 followers: from the hub the size is 1 + Binomial(12, p); from a leaf it is 1.
    graph = virality.follower_graph(igraph.Graph(13, [(0, i) for i in range(1, 13)], directed=True))
    p, n = 0.3, 400_000
    rates = np.full(n, p * graph.mean_followers)
    sizes, _ = virality.graph_cascades(graph, rates, seed=0, round_index=0)
    law = stats.binom.pmf(np.arange(13), 12, p) / 13
    law[0] += 12 / 13
    assert_law(sizes, law[:-1])
    wrong = stats.binom.pmf(np.arange(13), 12, p * 1.1) / 13
    wrong[0] += 12 / 13
    assert distances(sizes, wrong[:-1], 1)[1] < ERROR


def test_first_reshares_average_the_rate():
    # Depth is not returned; on a directed graph whose followers have no followers the size is 1 + first reshares.
    graph = virality.follower_graph(
        igraph.Graph(
            1100, [(i, 100 + (7 * i + j) % 1000) for i in range(100) for j in range(10 + i % 5)], directed=True
        )
    )
    sizes, _ = virality.graph_cascades(graph, np.full(N, 0.5), seed=0, round_index=0)
    # Var(size) <= E[(size - 1)^2] <= 14 * 0.5.
    assert abs(sizes.mean() - 1.5) < Z * math.sqrt(7 / N)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([0.1, float("nan"), 0.2], r"rate must be in \[0, 1\), got nan at rate\[1\]; cut it"),
        ([0.1, 0.2, -0.5], r"rate must be in \[0, 1\), got -0\.5 at rate\[2\]; cut it"),
        ([1.0], r"got 1\.0 at rate\[0\]"),
        ([], r"rate must be a non-empty vector, got shape \(0,\) at rate"),
        ([[0.1]], r"got shape \(1, 1\)"),
    ],
)
def test_bad_rates_are_refused_with_what_and_where(rates, message):
    with pytest.raises(ValueError, match=message):
        virality.draw_cascades(rates, seed=0, round_index=0)


def test_the_first_of_several_bad_rates_is_named_across_chunks():
    rates = np.full(5000, 0.1)
    rates[[4000, 1234]] = np.nan
    with pytest.raises(ValueError, match=r"at rate\[1234\]"):
        virality.draw_cascades(rates, seed=0, round_index=0, n_threads=2, chunk=100)


def test_bad_settings_are_refused():
    for options, message in (
        ({"offspring": "borel"}, "offspring must be one of poisson, negative_binomial, pareto, got borel"),
        ({"cap": 0}, "cap must be in 1"),
        ({"n_seeds": 0}, "n_seeds must be in 1"),
        ({"dispersion": 0.0}, "dispersion must be above 0"),
        ({"n_threads": 0}, "n_threads must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(0.1, 10, **options)
    graph = barabasi(50, 2)
    with pytest.raises(ValueError, match=r"rate must be in 0\.\.3\.88.*got 5\.0 at rate\[1\]"):
        virality.graph_cascades(graph, [0.1, 5.0], seed=0, round_index=0)
    with pytest.raises(ValueError, match="graph must be a graph with edges"):
        virality.follower_graph(igraph.Graph(3))
    with pytest.raises(ValueError, match=r"parents must be in 0\.\.1, got 2 at parents\[2\]"):
        virality.structural_virality([0, 0, 2])
    with pytest.raises(ValueError, match="parents must be a vector of >= 2"):
        virality.structural_virality([0])
