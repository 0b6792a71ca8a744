"""Closed forms the loop is checked against, and the forecast twin: what a config should show, without a model.

Words are those of population genetics in their exact sense, for haploid populations: with effective size N one round
of drift has variance p (1 - p) / N. `s` is log fitness per round, the log of a persona's differential (its mean weight
over the mean weight); only differences of `s` between personas matter. `real_share` is the share of real documents,
`lam` in the curation formulas the ratio of synthetic to real documents: real_share = 1 / (1 + lam).

In every map below `p_real` is what the real documents teach by themselves and `transmission` acts on the synthetic
part, transmission[k, j] = P(a model trained on a document of persona k says persona j). A learner that also distorts
what it reads in real documents is described by passing p_real @ transmission.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

REGIMES = ("replace", "accumulate", "accumulate_subsample")

Array = NDArray[np.float64]
Draw = Callable[[Array, float], Array]

MAX_REWARD_SPREAD = 700.0  # nats; beyond it exp() leaves the range of float64
MAX_CHAIN = 4000  # documents; the exact chain holds a dense (n + 1, n + 1) matrix, 128 MB at 4,000


# Curation and mixing ------------------------------------------------------------------------------------------------


def bt_curation(p: ArrayLike, reward: ArrayLike, k: float) -> Array:
    """Population after Bradley-Terry 1-of-k curation, exact.

    k answers are drawn from p and one is kept, answer i with probability e^r_i / sum_j e^r_j:

      p'_i = p_i * E[k e^r_i / (e^r_i + sum of the other k - 1)]
           = p_i * k e^r_i * integral_0^inf e^(-u e^r_i) phi(u)^(k-1) du,   phi(u) = sum_j p_j e^(-u e^r_j)

    by 1/x = integral e^(-u x) du. With u = e^x the integrand is analytic in a strip of half width pi/2, where it is at
    most 1 / cos(y) times its real twin, so the trapezoid rule with step 0.2 errs by less than 1e-16 of p'_i, whatever
    k and the rewards are.

    Special cases: k = 1 gives p; k = 2 and two personas p' - p = p (1 - p) tanh(r / 2); k = inf the replicator
    p e^r / E[e^r].

    Args:
      p: shares, shape (n_personas,), sum 1.
      reward: nats, shape (n_personas,); differences of at most 700.
      k: answers compared, an integer >= 1 or math.inf.

    Returns:
      Shares after curation, shape (n_personas,).

    Raises:
      ValueError: p is no distribution, shapes differ, k is no integer >= 1.

    Source: Ferbach et al., arXiv:2407.09499, equation for H^K; the integral is derived here.
    """
    shares, r = _shares("p", p), _vector("reward", reward)
    _same_length("reward", r, shares)
    _check_k(k)
    spread = float(r.max() - r.min())
    if spread > MAX_REWARD_SPREAD:
        raise ValueError(f"reward must spread over at most {MAX_REWARD_SPREAD:g} nats, got {spread:g}; use k=math.inf")
    return _curate(shares, r - r.max(), k)


def _curate(p: Array, r: Array, k: float) -> Array:
    if k == 1:
        return p
    if math.isinf(k):
        return _select(p, np.exp(r))
    first, last = -42.0 - math.log(k), 5.0 - r.min()  # u = e^x; what is left out at either end is below 1e-18
    # Not np.arange(first, last, 0.2): it rounds the step at the size of `first`, an error of 1e-14 in every sum.
    x = 0.2 * np.arange(math.floor(first / 0.2), math.ceil(last / 0.2))
    z = x[:, None] + r  # (n_nodes, n_personas)
    rate = np.exp(np.minimum(z, MAX_REWARD_SPREAD))
    missing = -np.expm1(-rate) @ p  # 1 - phi, accurate where phi is near 1 and k large
    with np.errstate(divide="ignore"):
        log_phi = np.where(missing < 0.5, np.log1p(-np.minimum(missing, 0.5)), np.log(np.exp(-rate) @ p))
    return p * (0.2 * k * np.exp(z - rate + (k - 1) * log_phi[:, None]).sum(axis=0))


def mix_fixed_point(p_ref: ArrayLike, reward: ArrayLike, k: float, lam: float) -> Array:
    """Fixed point of p' = (p_ref + lam * bt_curation(p, reward, k)) / (1 + lam), the one reached from p_ref.

    With k = inf it solves p_i = m p_ref_i + (1 - m) p_i e^r_i / e_bar, m = 1 / (1 + lam) the real share, so
    p_i = m p_ref_i e_bar / (e_bar - (1 - m) e^r_i), and sum p = 1 has one root e_bar > (1 - m) max e^r. Finite k is
    iterated until the remaining relative error, the last step times rate / (1 - rate), is below 1e-13.

    Special cases: lam = 0 gives p_ref; lam = inf gives p_ref restricted to the personas of highest reward.

    Args:
      p_ref: shares in the real documents, shape (n_personas,), sum 1.
      reward: nats, shape (n_personas,).
      k: answers compared, an integer >= 1 or math.inf.
      lam: synthetic documents per real document, >= 0, inf allowed.

    Returns:
      Shares, shape (n_personas,).

    Raises:
      ValueError: as bt_curation, or lam negative.
      RuntimeError: no convergence within 200,000 rounds (rewards within 1e-4 and almost no real documents).

    Source: Ferbach et al., arXiv:2407.09499, section on reference data; closed form for k = inf derived here.
    """
    ref, r = _shares("p_ref", p_ref), _vector("reward", reward)
    bt_curation(ref, r, k)  # checks
    if not lam >= 0:
        raise ValueError(f"lam must be >= 0, got {lam}; it is synthetic documents per real document")
    held = ref > 0
    if lam == 0 or k == 1:
        return ref
    if math.isinf(lam):
        best = np.where(held & (r >= r[held].max()), ref, 0.0)
        return best / best.sum()
    m = 1 / (1 + lam)
    if math.isinf(k):
        return _replicator_fixed_point(ref, r, m)
    r = r - r.max()
    p, step = ref, math.inf
    for _ in range(200_000):
        new = m * ref + (1 - m) * _curate(p, r, k)
        # Relative: a persona that starts at 1e-15 and grows must not look like one that stands still.
        last, step = step, float((np.abs(new - p)[held] / p[held]).max())
        p = new
        rate = step / last  # 0 on the first pass
        if step < 4 * np.finfo(float).eps or (0 < rate < 1 and step * rate / (1 - rate) < 1e-13):
            return p / p.sum()
    raise RuntimeError(f"mix_fixed_point did not settle in 200,000 rounds, last step {step:.2g}; use k=math.inf")


def _replicator_fixed_point(ref: Array, r: Array, m: float) -> Array:
    from scipy.optimize import brentq

    held = ref > 0
    a = (1 - m) * np.exp(r[held] - r[held].max())  # growth of each persona when the best one is all there is
    gap = a.max() - a

    def excess(d: float) -> float:  # decreasing in d = e_bar - a.max()
        return float((m * ref[held] * (a.max() + d) / (gap + d)).sum()) - 1

    lowest = m * float(ref[held][gap == 0].sum()) * float(a.max()) / 2
    d = float(brentq(excess, lowest, 2 * m, xtol=1e-300, rtol=4 * np.finfo(float).eps))
    p = np.zeros_like(ref)
    p[held] = m * ref[held] * (a.max() + d) / (gap + d)
    return p / p.sum()


def kl_bound(k: float, lam: float) -> float:
    """Upper bound on KL(p_t || p_ref) in nats for every round of curation mixed with real documents.

    -log(1 - lam (k - 1)) if lam < 1 / (k - 1), else inf. H^k <= k, so the largest ratio g = max p_i / p_ref_i obeys
    g' <= (1 + lam k g) / (1 + lam) from g = 1, whose fixed point is 1 / (1 - lam (k - 1)); KL <= log g.
    An inequality, loose by orders of magnitude for small rewards: test fixed points against `mix_fixed_point`.

    Args:
      k: answers compared, an integer >= 1 or math.inf.
      lam: synthetic documents per real document, >= 0.

    Source: Ferbach et al., arXiv:2407.09499; derived again here.
    """
    _check_k(k)
    if not lam >= 0:
        raise ValueError(f"lam must be >= 0, got {lam}; it is synthetic documents per real document")
    if lam == 0 or k == 1:
        return 0.0
    room = 1 - lam * (k - 1)
    return -math.log(room) if room > 0 else math.inf


def golden_ratio_weight(k: ArrayLike) -> Array:
    """Weight of the real sample that minimises the error a replace loop settles at; k = n_real / n_synthetic.

    theta' = w * (mean of n_real real) + (1 - w) * (mean of n_synthetic drawn at theta) has stationary variance
    sigma^2 [w^2 / n_real + (1 - w)^2 / n_synthetic] / [1 - (1 - w)^2]; its derivative vanishes where w^2 + k w - k = 0:
    w = 2 k / (sqrt(k^2 + 4 k) + k).

    Special cases: k = 1 gives 0.618, the golden ratio; k = 0.5 gives 0.5. Pooling would weigh k / (1 + k). The optimum
    is for estimation error with fresh real documents every round, not for the stability of a persona.

    Args:
      k: real documents per synthetic document, > 0, any shape.

    Source: arXiv:2502.18049; derived again here.
    """
    ratio = np.asarray(k, dtype=float)
    if not np.all(ratio > 0):
        raise ValueError(f"k must be > 0, got {ratio.min()}; it is n_real / n_synthetic")
    return np.asarray(2 * ratio / (np.sqrt(ratio**2 + 4 * ratio) + ratio))


# Selection ----------------------------------------------------------------------------------------------------------


def replicator_mutator(
    p0: ArrayLike,
    s: ArrayLike,
    transmission: ArrayLike | None,
    real_share: ArrayLike,
    p_real: ArrayLike,
    n_rounds: int,
) -> Array:
    """Frequencies without drift: p'_j = real_share * r_j + (1 - real_share) sum_k p_k e^s_k T_kj / sum_k p_k e^s_k.

    Special case: two personas, T = identity, real_share = 0: logit p_t = logit p_0 + t (s_0 - s_1).
    With T = identity the fixed point is mix_fixed_point(p_real, s, math.inf, (1 - real_share) / real_share).

    Args:
      p0: frequencies of model 0, shape (n_personas,), sum 1.
      s: log fitness per round, nats, shape (n_personas,) or (n_rounds, n_personas).
      transmission: rows sum to 1, shape (n_personas, n_personas); None is the identity.
      real_share: in [0, 1], a number or shape (n_rounds,); entry t - 1 belongs to round t.
      p_real: what real documents teach, shape (n_personas,), sum 1; without effect where real_share is 0.
      n_rounds: feedback rounds, >= 0.

    Returns:
      Trajectory, shape (n_rounds + 1, n_personas); row 0 is p0.

    Source: the replicator-mutator equation (Nowak 2006, Evolutionary Dynamics, ch. 2) with migration.
    """
    p = _shares("p0", p0)
    fitness, matrix, source = _fitness(s, n_rounds, len(p)), _transmission(transmission, len(p)), _real(p_real, p)
    share = _per_round("real_share", real_share, n_rounds, low=0, high=1)
    path = [p]
    for t in range(n_rounds):
        p = share[t] * source + (1 - share[t]) * (_select(p, fitness[t]) @ matrix)
        path.append(p)
    return np.array(path)


def invasion_threshold(real_share: ArrayLike, fidelity: ArrayLike = 1.0) -> Array:
    """Log fitness a rare persona needs over the resident to grow when real documents do not hold it.

    Rare, its frequency is multiplied by (1 - real_share) e^s fidelity a round: it grows if
    s > -ln((1 - real_share) fidelity). Read the other way, the critical real share is 1 - e^-s / fidelity. If real
    documents hold the persona it is never lost, and the same line is where selection overtakes dilution.

    Special case: real_share 0.5 gives ln 2.

    Args:
      real_share: in [0, 1], any shape; 1 gives inf.
      fidelity: T_jj, share of what a document of the persona teaches that is the persona itself, in (0, 1].

    Source: linearised replicator-mutator map; with real_share = 0 Eigen's error threshold.
    """
    share, kept = _within("real_share", real_share, 0, 1), np.asarray(fidelity, dtype=float)
    if not np.all((kept > 0) & (kept <= 1)):
        raise ValueError(f"fidelity must be in (0, 1], got {kept}; a persona that never breeds true cannot invade")
    with np.errstate(divide="ignore"):
        return np.asarray(-(np.log1p(-share) + np.log(kept)) + 0.0)  # + 0.0 turns -0.0 into 0.0


@dataclass(frozen=True, slots=True)
class PhaseGrid:
    """Final frequency of one persona over real share and selection.

    Attributes:
      real_share: shape (n,).
      selection: log fitness over the others, nats a round, shape (m,).
      frequency: after n_rounds, shape (n, m).
      boundary: selection above which the persona invades, shape (n,); inf where no synthetic documents are left.
    """

    real_share: Array
    selection: Array
    frequency: Array
    boundary: Array


def phase_grid(
    real_share: ArrayLike,
    selection: ArrayLike,
    *,
    p0: ArrayLike,
    p_real: ArrayLike,
    persona: int,
    n_rounds: int,
    transmission: ArrayLike | None = None,
    discourse_share: float = 0.0,
) -> PhaseGrid:
    """Final frequency of a persona on a grid, with the boundary of `invasion_threshold`.

    Every cell is `replicator_mutator` with log fitness `selection` for the persona and 0 for the rest; all cells
    advance together. Discourse documents play no persona: they leave real : synthetic as real_share : 1 - real_share
    - discourse_share.

    Args:
      real_share: shape (n,), each in [0, 1 - discourse_share].
      selection: shape (m,), nats a round.
      p0, p_real, transmission: as in replicator_mutator.
      persona: index of the persona under selection.
      n_rounds: feedback rounds, >= 0.
      discourse_share: in [0, 1).
    """
    start, s = _shares("p0", p0), _vector("selection", selection)
    shares = _vector("real_share", real_share)
    source, matrix = _real(p_real, start), _transmission(transmission, len(start))
    if not 0 <= persona < len(start):
        raise ValueError(f"persona must be an index below {len(start)}, got {persona}")
    share, _ = _migration(shares, source, discourse_share, None)
    log_fitness = np.zeros((len(s), len(start)))  # (m, n_personas)
    log_fitness[:, persona] = s
    fitness = np.exp(log_fitness - log_fitness.max(axis=1, keepdims=True))
    p = np.broadcast_to(start, (len(shares), len(s), len(start)))
    for _ in range(n_rounds):
        p = share[:, None, None] * source + (1 - share[:, None, None]) * (_select(p, fitness) @ matrix)
    return PhaseGrid(shares, s, p[:, :, persona].copy(), invasion_threshold(share, float(matrix[persona, persona])))


# Drift --------------------------------------------------------------------------------------------------------------


def effective_size(weights: ArrayLike, n_drawn: float, *, weighting: str = "multinomial") -> float:
    """Effective number of documents behind one round: drift has variance p (1 - p) / effective_size.

    Outputs carry independent personas and weights w that do not depend on the persona. If output i counts c_i times
    in the end, Var = p (1 - p) E[sum c_i^2] / (sum c_i)^2. With share a_i = n_drawn w_i / sum w and its fraction f_i:

      multinomial  n_drawn draws with replacement: E[c^2] = a + a^2 (1 - 1 / n_drawn), that is
                   1/N = 1/ESS + 1/n_drawn - 1/(ESS n_drawn),  ESS = (sum w)^2 / sum w^2 (Kish)
      resample     systematic, c is a rounded down or up: E[c^2] = a^2 + f (1 - f)
      loss         copies rounded from n_drawn / n without regard to w, w in the loss: N = ESS / (1 + g (1 - g) / b^2),
                   b = n_drawn / n, g its fraction. Exact for equal weights, else to first order in 1 / n

    Special cases: equal weights, n_drawn = n: multinomial N = n^2 / (2 n - 1), resample and loss N = n;
    n_drawn = inf gives ESS in all three.

    Args:
      weights: of all outputs, >= 0 with a positive sum, shape (n_outputs,).
      n_drawn: documents drawn, >= 1, or math.inf: every output is used with its weight.
      weighting: see above; "resample" and "loss" are what `mix` does.

    Returns:
      Effective number of documents, >= 1. Selection between personas makes it an approximation: give the weights of
      one persona then.

    Source: Kish (1965) Survey Sampling; composition derived here from the chance that two draws share their parent.
    """
    w = _vector("weights", weights)
    if np.any(w < 0) or not w.sum() > 0:
        raise ValueError(f"weights must be >= 0 with a positive sum, got sum {w.sum()} and smallest {w.min()}")
    if not n_drawn >= 1:
        raise ValueError(f"n_drawn must be >= 1, got {n_drawn}")
    share = w / w.sum()
    ess = 1 / float(share @ share)
    if math.isinf(n_drawn):
        return ess
    if weighting == "multinomial":
        return 1 / (1 / ess + 1 / n_drawn - 1 / (ess * n_drawn))
    if weighting == "resample":
        a = n_drawn * share
        return float(n_drawn**2 / (a**2 + (a % 1) * (1 - a % 1)).sum())
    if weighting == "loss":
        copies = n_drawn / len(w)
        return ess / (1 + (copies % 1) * (1 - copies % 1) / copies**2)
    raise ValueError(f"weighting must be multinomial, resample or loss, got {weighting!r}")


def wright_fisher(
    p0: ArrayLike,
    s: ArrayLike,
    n_eff: float,
    real_share: ArrayLike,
    p_real: ArrayLike,
    n_rounds: int,
    n_replicates: int,
    *,
    rng: np.random.Generator,
) -> Array:
    """Simulated null: x ~ Multinomial(n_eff, p e^s / sum p e^s), p' = real_share * p_real + (1 - real_share) x / n_eff.

    Real documents arrive at fixed shares and add no noise. Selection comes before the draw.

    Args:
      p0: shape (n_personas,), sum 1.
      s: log fitness per round, nats, shape (n_personas,) or (n_rounds, n_personas).
      n_eff: >= 1; between integers one of the two neighbours is used each round, at odds that make E[1/N] = 1/n_eff.
      real_share: in [0, 1], a number or shape (n_rounds,).
      p_real: shape (n_personas,), sum 1.
      n_rounds, n_replicates: >= 0, >= 1.

    Returns:
      Frequencies, shape (n_replicates, n_rounds + 1, n_personas).

    Source: Wright (1931), Genetics 16:97-159; Ewens (2004), Mathematical Population Genetics, section 3.2.
    """
    start = _shares("p0", p0)
    fitness, source = _fitness(s, n_rounds, len(start)), _real(p_real, start)
    share = _per_round("real_share", real_share, n_rounds, low=0, high=1)
    size = float(_per_round("n_eff", n_eff, 1, low=1, high=math.inf)[0])
    if n_replicates < 1:
        raise ValueError(f"n_replicates must be >= 1, got {n_replicates}")
    p = np.tile(start, (n_replicates, 1))
    path = np.empty((n_replicates, n_rounds + 1, len(start)))
    path[:, 0] = p
    for t in range(n_rounds):
        p = share[t] * source + (1 - share[t]) * _multinomial(_select(p, fitness[t]), size, rng)
        path[:, t + 1] = p
    return path


def neutral_moments(
    p0: ArrayLike, n_eff: float, real_share: ArrayLike, p_real: ArrayLike, n_rounds: int
) -> tuple[Array, Array]:
    """Mean and variance over runs of each frequency without selection, exact.

      m' = l r + (1 - l) m,   V' = (1 - l)^2 [V (1 - 1/N) + m (1 - m) / N],   l = real_share, r = p_real

    Special cases: l = 0: V_t = p0 (1 - p0) [1 - (1 - 1/N)^t], so that heterozygosity falls as (1 - 1/N)^t; p0 = r:
    V settles at r (1 - r) (1 - l)^2 / [N - (N - 1) (1 - l)^2].

    Args:
      p0, p_real: shape (n_personas,), sum 1.
      n_eff: >= 1.
      real_share: in [0, 1], a number or shape (n_rounds,).
      n_rounds: >= 0.

    Returns:
      (mean, variance), each of shape (n_rounds + 1, n_personas).

    Source: first two moments of `wright_fisher`.
    """
    mean, variance = _shares("p0", p0), np.zeros(len(np.atleast_1d(np.asarray(p0))))
    source = _real(p_real, mean)
    share = _per_round("real_share", real_share, n_rounds, low=0, high=1)
    size = float(_per_round("n_eff", n_eff, 1, low=1, high=math.inf)[0])
    means, variances = [mean], [variance]
    for keep in 1 - share:
        variance = keep**2 * (variance * (1 - 1 / size) + mean * (1 - mean) / size)
        mean = (1 - keep) * source + keep * mean
        means.append(mean)
        variances.append(variance)
    return np.array(means), np.array(variances)


def heterozygosity(h0: float, n_eff: float, n_rounds: int) -> Array:
    """Expected chance that two documents differ in persona, under replacement by drift alone: h0 (1 - 1/n_eff)^t.

    Special case: n_eff = 500 keeps 0.990 after 5 rounds, 0.905 after 50.

    Returns:
      Shape (n_rounds + 1,).

    Source: Wright (1931). Two draws of one round share their parent with chance 1/n_eff.
    """
    size = float(_per_round("n_eff", n_eff, 1, low=1, high=math.inf)[0])
    return np.asarray(h0 * (1 - 1 / size) ** np.arange(n_rounds + 1))


def accumulate_heterozygosity(n_documents: float, n_rounds: int, n_added: float | None = None) -> Array:
    """Expected share of heterozygosity left when nothing is thrown away and every round adds to the corpus.

    Corpus size C_t = n_documents + t n_added, and P' = (C P + n_added x) / C', x ~ Binomial(n_added, P) / n_added, so
    Var(P' | P) = P (1 - P) n_added / C'^2 and the product over rounds is prod (1 - n_added / C_t^2). With n_added =
    n_documents = N it is prod_{k=2}^{t+1} (1 - 1 / (N k^2)), which never falls below
    sin(pi / sqrt(N)) / (pi / sqrt(N)) / (1 - 1/N): diversity survives, where replacement loses all of it.

    Args:
      n_documents: real documents of round 0, >= 1.
      n_rounds: >= 0.
      n_added: documents added a round, >= 0; None is n_documents.

    Returns:
      H_t / H_0, shape (n_rounds + 1,).

    Source: derived here; the regime is that of arXiv:2410.16713.
    """
    added = n_documents if n_added is None else n_added
    if not (n_documents >= 1 and added >= 0):
        raise ValueError(f"n_documents must be >= 1 and n_added >= 0, got {n_documents} and {added}")
    size = n_documents + added * np.arange(1, n_rounds + 1)
    return np.concatenate([[1.0], np.cumprod(1 - added / size**2)])


def partial_replacement_variance(p: ArrayLike, n_documents: int, n_replaced: int) -> Array:
    """One round's drift variance when a corpus keeps most of its documents and replaces some by new outputs.

    n_replaced documents chosen at random leave, as many drawn at frequency p come. The kept ones are a draw without
    replacement, the new ones with: with a = n_replaced / n_documents and M = n_documents

      Var = p (1 - p) [a + a (1 - a) M / (M - 1)] / M,   about a (2 - a) p (1 - p) / M

    Special case: a = 1 is Wright-Fisher with M documents; a = 0.25 gives 0.4375 p (1 - p) / M up to 1 / M.

    Source: derived here; for large M the variance of Riis, arXiv:2604.08554, whose effective size M / [2 a (2 - a)]
    goes with a variance of p (1 - p) / 2N. In this module's sense it is twice that, so that a = 1 gives M.
    """
    q = np.asarray(p, dtype=float)
    return np.asarray(q * (1 - q) / partial_replacement_size(n_documents, n_replaced))


def partial_replacement_size(n_documents: int, n_replaced: int) -> float:
    """Effective size behind `partial_replacement_variance`: M / (a (2 - a)) up to 1 / M; inf if nothing is replaced."""
    if not (n_documents >= 1 and 0 <= n_replaced <= n_documents):
        raise ValueError(f"n_replaced must be in 0..n_documents, got {n_replaced} of {n_documents}")
    if n_replaced == 0:
        return math.inf
    a = n_replaced / n_documents
    kept = 0.0 if n_replaced == n_documents else a * (1 - a) * n_documents / (n_documents - 1)
    return n_documents / (a + kept)


# Loss and fixation --------------------------------------------------------------------------------------------------


def fixation_probability(p0: ArrayLike, s: ArrayLike, n_eff: ArrayLike) -> Array:
    """Chance that a persona takes over, diffusion limit: (1 - e^(-2 N s p0)) / (1 - e^(-2 N s)).

    Special cases: s = 0 gives p0; N s -> inf gives 1 - e^(-2 N s p0). Good to O(s); the exact chain is fixation_exact.

    Args:
      p0: frequency, in [0, 1], any shape that broadcasts with the others.
      s: log fitness over the rest, nats a round.
      n_eff: haploid effective size, >= 1.

    Source: Kimura (1962), Genetics 47:713-719, in its haploid form.
    """
    a = 2 * _within("n_eff", n_eff, 1, math.inf) * np.asarray(s, dtype=float)
    p, a = np.broadcast_arrays(_within("p0", p0, 0, 1), a)
    size = np.where(a == 0, 1.0, np.abs(a))
    # For s < 0 both exponentials are multiplied by e^(2 N s): nothing overflows, and the tail keeps its digits.
    u = np.expm1(-size * p) / np.expm1(-size) * np.where(a < 0, np.exp(-size * (1 - p)), 1.0)
    return np.asarray(np.where(a == 0, p, u))


def fixation_exact(n_documents: int, s: float) -> Array:
    """Chance that a persona takes over from each count, exact for the finite Wright-Fisher chain.

    count' ~ Binomial(N, q), q = c e^s / (c e^s + N - c). The chances u solve (I - Q) u = Q_N: Q among the counts
    1..N-1, Q_N the step to N.

    A loop that draws N outputs at frequency p0 before it selects starts from a count drawn from Binomial(N, p0):
    average u over it.

    Special cases: s = 0 gives c / N; N = 2 gives u_1 = e^2s / (1 + e^2s).

    Args:
      n_documents: N, an integer in 1..4000 (a dense linear system).
      s: log fitness over the rest, nats a round.

    Returns:
      Shape (n_documents + 1,); entry c is the chance from count c.

    Source: Ewens (2004), Mathematical Population Genetics, section 3.2; absorbing Markov chain.
    """
    step = _chain(n_documents, s)
    inner = slice(1, n_documents)
    u = np.zeros(n_documents + 1)
    u[-1] = 1.0
    if n_documents > 1:
        u[inner] = np.linalg.solve(np.eye(n_documents - 1) - step[inner, inner], step[inner, -1])
    return u


def survival_exact(n_documents: int, p0: float, n_rounds: int, s: float = 0.0) -> float:
    """Chance that a persona is still there after n_rounds draws, exact for the finite Wright-Fisher chain.

    Special case: one round without selection is 1 - (1 - p0)^N.

    Args:
      n_documents: documents drawn a round, an integer in 1..4000.
      p0: frequency the first round draws at, in [0, 1]; any value, not only multiples of 1 / n_documents.
      n_rounds: draws, >= 1.
      s: log fitness over the rest, nats a round; it acts from the first draw on.
    """
    from scipy.stats import binom

    if not (0 <= p0 <= 1 and n_rounds >= 1):
        raise ValueError(f"p0 must be in [0, 1] and n_rounds >= 1, got {p0} and {n_rounds}")
    step = _chain(n_documents, s)
    first = p0 if p0 in (0, 1) else 1 / (1 + math.exp(-s) * (1 - p0) / p0)
    counts = binom.pmf(np.arange(n_documents + 1), n_documents, first)  # (n_documents + 1,)
    for _ in range(n_rounds - 1):
        counts = counts @ step
    return float(counts[1:].sum())


def survival_bounds(n_documents: int, p0: float, n_rounds: int) -> tuple[float, float]:
    """Bounds on the chance that a persona survives n_rounds of drift without selection.

      1 - e^(-n p0 g)  <=  P(survive)  <=  1 - (1 - 3 n p0^2 - 3 k p0) e^(-n p0 g),   g_1 = 1, g_{k+1} = 1 - e^-g_k

    Lower: (1 - x/n)^n <= e^-x, applied k times to E[e^(-c count)]: the process with Poisson offspring, where g_k is the
    chance that one line survives, about 2 / k. Upper: (1 - y)^n >= e^(-n y) (1 - n y^2), whose losses add up, with
    sum g_k^2 < 3. The lower bound is nearly exact for small p0; the upper one says something only while k p0 << 1, and
    is cut at 1. Tested against `survival_exact`.

    Special case: n p0 = 10: at least 0.956 (k = 5), 0.821 (10), 0.600 (20), 0.319 (50).

    Args:
      n_documents: documents drawn a round, >= 1.
      p0: frequency at the start, in [0, 1].
      n_rounds: k, draws, >= 1.

    Returns:
      (lower, upper), each in [0, 1].

    Source: Suresh, Thangaraj, Khandavally, arXiv:2412.17646.
    """
    if not (n_documents >= 1 and 0 <= p0 <= 1 and n_rounds >= 1):
        raise ValueError(f"p0 must be in [0, 1] and n_rounds >= 1, got {p0} and {n_rounds}")
    g = 1.0
    for _ in range(n_rounds - 1):
        g = -math.expm1(-g)
    lost = math.exp(-n_documents * p0 * g)
    return 1 - lost, min(1.0, 1 - (1 - 3 * n_documents * p0**2 - 3 * n_rounds * p0) * lost)


def _chain(n: int, s: float) -> Array:
    from scipy.stats import binom

    if n != int(n) or not 1 <= n <= MAX_CHAIN:
        raise ValueError(f"n_documents must be an integer in 1..{MAX_CHAIN}, got {n}; use the diffusion limit")
    count = np.arange(n + 1)
    chance = count / (count + math.exp(-s) * (n - count))
    return np.asarray(binom.pmf(count[None, :], n, chance[:, None]))  # (n + 1, n + 1): from, to


# The expectation channel --------------------------------------------------------------------------------------------


def trust_lock_in(n: int, lambda1: float, lambda2: float) -> bool:
    """Whether mutual trust between one model and n - 1 users locks in what they happen to believe.

    Each side adds to its own evidence the confidence the other had the round before, times its trust:

      model' = evidence + lambda1 * sum over users,   user' = evidence + lambda2 * model

    Over two rounds confidence is multiplied by (n - 1) lambda1 lambda2, the square of the spectral radius of the trust
    matrix. Above 1 it grows geometrically while evidence grows linearly: later evidence no longer moves the belief.
    Below 1 the belief follows the evidence. At 1 confidence grows with the square of time, faster than evidence
    but not geometrically; it counts as not locked in.

    Args:
      n: agents, the model included, >= 2.
      lambda1: trust of the model in each user, >= 0.
      lambda2: trust of each user in the model, >= 0.

    Source: Qiu et al., arXiv:2506.06166.
    """
    if not (n >= 2 and lambda1 >= 0 and lambda2 >= 0):
        raise ValueError(f"n must be >= 2 and trust >= 0, got n={n}, lambda1={lambda1}, lambda2={lambda2}")
    return (n - 1) * lambda1 * lambda2 > 1


# The forecast twin --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted frequencies; every array has shape (n_rounds + 1, n_personas), row t is model t.

    Attributes:
      mean: expected frequency of the model.
      low, high: band that a measured frequency falls into with chance `level`, measurement noise included.
      sd: standard deviation of the measured frequency over runs.
      level: chance of the band, marginal for each round and persona.
      n_particles: simulated runs behind the band; its true chance is within about 2 sqrt(level (1 - level) /
        n_particles) of `level`.
    """

    mean: Array
    low: Array
    high: Array
    sd: Array
    level: float
    n_particles: int


def forecast(
    p0: ArrayLike,
    *,
    selection: ArrayLike,
    transmission: ArrayLike | None,
    real_share: ArrayLike | None,
    discourse_share: float,
    p_real: ArrayLike,
    n_eff: ArrayLike,
    n_outputs: float,
    n_rounds: int,
    rng: np.random.Generator,
    level: float = 0.9,
    regime: str = "replace",
    n_drawn: ArrayLike = math.inf,
    n_learning: float = math.inf,
    n_start: float = math.inf,
    p_discourse: ArrayLike | None = None,
    added_per_real: float = 1.0,
    response: Callable[[Array], Array] | None = None,
    n_particles: int | None = None,
) -> Forecast:
    """Predicts the frequencies of a run, round by round, with bands, from a handful of numbers.

    A cloud of runs is carried forward as frequencies, never as documents, so that cost does not depend on corpus size:

      x    ~ p + drift of n_eff outputs                what model t says
      y    = x e^s / sum x e^s                         weights, frozen in the round of birth
      pool = y (replace) or the mean of all y so far   accumulate, accumulate_subsample
      z    ~ pool + drift of n_drawn documents         what the mixture holds
      p'   = real * p_real + (1 - real) * z @ T        then `response`, then drift of n_learning for training noise

    Drift is a draw of normalised Poisson counts (above a mean of 16 a normal with the Poisson's skew), so that rare
    personas die out as they do in a run, which a linearised variance would miss. Sizes below 50 are drawn exactly. With
    equal selection and no response the mean is computed, not simulated.

    Discourse documents play no persona and leave the proportion of real to synthetic as it is, unless `p_discourse`
    says what they teach. With accumulate the real share is 1 / (1 + added_per_real * t) and `p_real` is what the real
    documents of round 0 hold.

    Args:
      p0: frequencies of model 0, shape (n_personas,), sum 1.
      selection: log differential per round, nats, shape (n_personas,) or (n_rounds, n_personas).
      transmission: shape (n_personas, n_personas), rows sum to 1; None is the identity.
      real_share: in [0, 1], a number or (n_rounds,); None with accumulate.
      discourse_share: in [0, 1); without effect with accumulate, whose ratio counts documents that play a persona.
      p_real: shape (n_personas,), sum 1.
      n_eff: effective outputs a round (`effective_size` with n_drawn = inf), >= 1 or inf, a number or (n_rounds,).
      n_outputs: outputs each measurement rests on, >= 1, or inf.
      n_rounds: feedback rounds, >= 0.
      level: of the bands, in (0, 1).
      n_drawn: effective documents drawn from the pool, >= 1, a number or (n_rounds,). inf: all are used. m out of M
        without replacement: 1 / (1/m - 1/M).
      n_learning: documents whose sampling would be as noisy as one training; inf: an exact learner.
      n_start: outputs p0 was estimated from; inf: known.
      p_discourse: what discourse documents teach, shape (n_personas,), sum 1.
      added_per_real: accumulate only: documents added a round per real document of round 0.
      response: dose-response of the learner, corpus frequencies (n_particles, n_personas) to model frequencies of the
        same shape; scaled to sum 1.
      n_particles: simulated runs; None: 4,000, fewer for long runs with many personas, at least 256.

    Raises:
      ValueError: an argument out of its range, or real_share given with accumulate.

    Source: Wright-Fisher with migration, see `wright_fisher`; the order of drift and selection is that of the loop.
    """
    start = _shares("p0", p0)
    n = len(start)
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {regime!r}")
    if (real_share is None) != (regime == "accumulate"):
        raise ValueError(f"real_share must be {'left out' if regime == 'accumulate' else 'given'} with {regime}")
    if real_share is None and p_discourse is not None:
        raise ValueError(f"p_discourse must be left out with {regime}, got {p_discourse!r}; use accumulate_subsample")
    if not added_per_real >= 0:
        raise ValueError(f"added_per_real must be >= 0, got {added_per_real}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    fitness, matrix = _fitness(selection, n_rounds, n), _transmission(transmission, n)
    if real_share is None:
        real = 1 / (1 + added_per_real * np.arange(1, n_rounds + 1))
        share, source = _migration(real, _real(p_real, start), 0.0, None)  # the ratio counts what plays a persona
    else:
        real = _per_round("real_share", real_share, n_rounds, low=0, high=1)
        share, source = _migration(real, _real(p_real, start), discourse_share, p_discourse)
    birth = _per_round("n_eff", n_eff, n_rounds, low=1, high=math.inf)
    drawn = _per_round("n_drawn", n_drawn, n_rounds, low=1, high=math.inf)
    learning, outputs, begin = (
        float(_per_round(name, value, 1, low=1, high=math.inf)[0])
        for name, value in (("n_learning", n_learning), ("n_outputs", n_outputs), ("n_start", n_start))
    )
    cells = (n_rounds + 1) * n
    runs = int(np.clip(2_500_000 // cells, 256, 4000)) if n_particles is None else n_particles
    if runs < 2:
        raise ValueError(f"n_particles must be >= 2, got {runs}")

    def advance(p: Array, pool: Array, t: int, draw: Draw) -> tuple[Array, Array]:
        y = _select(draw(p, birth[t]), fitness[t])
        pool = y if regime == "replace" else pool + (y - pool) / (t + 1)
        q = share[t] * source[t] + (1 - share[t]) * (draw(pool, drawn[t]) @ matrix)
        if response is not None:
            q = _respond(response, q)
        return draw(q, learning), pool

    def noisy(q: Array, size: float) -> Array:
        return _drift(q, size, rng)

    p = noisy(np.tile(start, (runs, 1)), begin)
    pool = np.zeros_like(p)
    mean, spread = np.empty((n_rounds + 1, n)), np.empty((n_rounds + 1, n))
    measured = np.empty((n_rounds + 1, n, runs), dtype=np.float32)  # 6 digits are enough for a band
    for t in range(n_rounds + 1):
        seen = noisy(p, outputs)
        mean[t], spread[t] = p.mean(axis=0), seen.std(axis=0, ddof=1)
        measured[t] = seen.T
        if t < n_rounds:
            p, pool = advance(p, pool, t, noisy)
    measured.sort(axis=-1)
    # A new run is exchangeable with the cloud: it lies below the i-th smallest of `runs` with chance i / (runs + 1).
    i = max(1, math.floor((runs + 1) * (1 - level) / 2))
    low, high = measured[..., i - 1].astype(float), measured[..., runs - i].astype(float)

    if response is None and np.all(fitness == fitness[:, :1]):
        q, calm = start[None, :], np.zeros((1, n))
        for t in range(n_rounds + 1):
            mean[t] = q[0]
            if t < n_rounds:
                q, calm = advance(q, calm, t, _no_drift)
    return Forecast(mean, low, high, spread, level, runs)


def _no_drift(q: Array, _size: float) -> Array:
    return q


def _respond(response: Callable[[Array], Array], q: Array) -> Array:
    p = np.asarray(response(q), dtype=float)
    if p.shape != q.shape or not np.all(p >= 0) or not np.all(p.sum(axis=-1) > 0):
        raise ValueError(f"response must return shares >= 0 of shape {q.shape}, got shape {p.shape}, least {p.min()}")
    return np.asarray(p / p.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Score:
    """How a forecast did; errors are mean absolute differences over rounds 1.., personas and runs.

    Attributes:
      coverage: share of measured frequencies inside the band.
      mae: error of the forecast mean.
      mae_no_change: error of repeating the measured round 0.
      mae_attractor: error of the attractor fit, each point predicted from the fit to the others; nan with fewer than
        three points a round.
      n: measured frequencies compared.
    """

    coverage: float
    mae: float
    mae_no_change: float
    mae_attractor: float
    n: int


def score_forecast(predicted: Forecast, measured: ArrayLike) -> Score:
    """Scores a forecast against measured frequencies, beside two forecasts that know no mechanism.

    No change says v_t = v_0. The attractor fit says v_t = I_t + s_t v_0, a line per round through the points
    (v_0, v_t) of all personas and runs; each point is predicted by the line through the others. It sees their
    outcome, which a forecast does not: beating it is not a formality.

    Args:
      predicted: a Forecast over n_rounds and n_personas.
      measured: shape (n_rounds + 1, n_personas) or (n_runs, n_rounds + 1, n_personas); nan is not measured.

    Source: the fit is that of arXiv:2407.04503, which fits all points at once; leaving one out is ours.
    """
    seen = np.asarray(measured, dtype=float)
    seen = seen[None] if seen.ndim == 2 else seen
    if seen.ndim != 3 or seen.shape[1:] != predicted.mean.shape:
        raise ValueError(f"measured must have shape (n_runs, *{predicted.mean.shape}), got {seen.shape}")
    later, start = seen[:, 1:], seen[:, :1]
    known = np.isfinite(later)
    inside = (later >= predicted.low[1:] - 1e-9) & (later <= predicted.high[1:] + 1e-9)
    fits = [_leave_one_out(seen[:, 0].ravel(), seen[:, t].ravel()) for t in range(1, seen.shape[1])]
    return Score(
        coverage=_mean(inside[known].astype(float)),
        mae=_mean(np.abs(later - predicted.mean[1:])),
        mae_no_change=_mean(np.abs(later - start)),
        mae_attractor=_mean(np.abs(np.concatenate(fits))) if fits else math.nan,
        n=int(known.sum()),
    )


def _leave_one_out(x: Array, y: Array) -> Array:
    """Residuals of a line through all the other points: e / (1 - leverage)."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or np.ptp(x) == 0:
        return np.full(len(x), math.nan)
    dx = x - x.mean()
    residual = y - y.mean() - dx * (dx @ y) / (dx @ dx)
    slack = 1 - 1 / len(x) - dx**2 / (dx @ dx)
    return np.asarray(np.where(slack > 1e-12, residual / np.maximum(slack, 1e-12), math.nan))


def _mean(values: Array) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if kept.size else math.nan


def power(effect: float, sd: float, n_seeds: int, alpha: float = 0.05, paired: bool = True) -> float:
    """Chance that a two-sided t test over seeds finds a true effect, by the noncentral t distribution.

    paired: df = n - 1, noncentrality effect sqrt(n) / sd, sd over seeds of the difference between arms.
    Not paired: df = 2 n - 2, noncentrality effect sqrt(n / 2) / sd, sd over seeds within an arm.

    Special cases: effect 0 gives alpha; 20 seeds an arm, not paired, effect = sd gives 0.869.

    Args:
      effect: true difference, any unit.
      sd: > 0, the same unit.
      n_seeds: per arm, >= 2.
      alpha: in (0, 1).

    Source: Johnson, Kotz, Balakrishnan (1995), Continuous Univariate Distributions 2, ch. 31.
    """
    df, scale = _design(sd, n_seeds, alpha, paired)
    return _t_power(effect / scale, df, alpha)


def minimum_detectable_effect(
    sd: float, n_seeds: int, alpha: float = 0.05, paired: bool = True, target: float = 0.8
) -> float:
    """Smallest true effect that `power` finds with chance `target`, in the unit of sd.

    Before a run, sd of a paired difference of frequencies is taken as sqrt(2) times `Forecast.sd`, as if pairing
    removed nothing; what training adds to it is not in that.

    Args:
      sd, n_seeds, alpha, paired: as in `power`.
      target: power wanted, in (alpha, 1).
    """
    from scipy.optimize import brentq

    df, scale = _design(sd, n_seeds, alpha, paired)
    if not alpha < target < 1:
        raise ValueError(f"target must be in (alpha, 1), got {target} with alpha {alpha}")
    high = 1.0
    while _t_power(high, df, alpha) < target:
        high *= 2
    return scale * float(brentq(lambda shift: _t_power(shift, df, alpha) - target, 0.0, high, xtol=1e-12))


def _design(sd: float, n_seeds: int, alpha: float, paired: bool) -> tuple[int, float]:
    if not (sd > 0 and n_seeds >= 2 and 0 < alpha < 1):
        raise ValueError(f"sd must be > 0, n_seeds >= 2, alpha in (0, 1), got {sd}, {n_seeds}, {alpha}")
    return (n_seeds - 1, sd / math.sqrt(n_seeds)) if paired else (2 * n_seeds - 2, sd * math.sqrt(2 / n_seeds))


def minimum_margin(sd: float, n_seeds: int, alpha: float = 0.05, target: float = 0.8) -> float:
    """Smallest margin within which two one-sided tests place an effect of 0 with chance `target`, in the unit of sd.

    They do where |mean| + t(1 - alpha) * se < margin. Special case: n_seeds → inf gives
    (z(1 - alpha) + z((1 + target) / 2)) * sd / sqrt(n_seeds); a few seeds need more, for se scatters too.

    Args:
      sd: of the paired difference over seeds, > 0.
      n_seeds: >= 2.
      alpha: of each test, in (0, 1).
      target: chance wanted, in (0, 1).

    Source: Schuirmann (1987), doi:10.1007/BF01068419.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtr, stdtrit

    df, scale = _design(sd, n_seeds, alpha, True)
    if not 0 < target < 1:
        raise ValueError(f"target must be in (0, 1), got {target}")
    c = -float(stdtrit(df, alpha)) / math.sqrt(df)

    def within(margin: float) -> float:
        # Given X of the chi distribution, se is scale * X / sqrt(df), and |Z| may be what it leaves of the margin.
        return _over_chi(lambda x: max(0.0, 2 * float(ndtr(margin - c * x)) - 1), df, [margin / c])

    high = 1.0
    while within(high) < target:
        high *= 2
    return scale * float(brentq(lambda margin: within(margin) - target, 0.0, high, xtol=1e-12))


def _t_power(shift: float, df: int, alpha: float) -> float:
    from scipy.special import ndtr, stdtrit

    # P(|Z + shift| > c X), X of the chi distribution, integrated over X: scipy's nct returns nan far in the tails.
    c = -float(stdtrit(df, alpha / 2)) / math.sqrt(df)
    middle = abs(shift) / c  # where the chance falls from 1 to 0
    turns = [middle + d / c for d in (-6, 0, 6)]
    return min(1.0, _over_chi(lambda x: float(ndtr(shift - c * x) + ndtr(-shift - c * x)), df, turns))


def _over_chi(chance: Callable[[float], float], df: int, turns: Sequence[float]) -> float:
    """Mean of a chance over X of the chi distribution; turns: where it changes fast."""
    from scipy.integrate import quad

    scale = (df / 2 - 1) * math.log(2) + math.lgamma(df / 2)

    def weighted(x: float) -> float:
        return chance(x) * math.exp((df - 1) * math.log(x) - x * x / 2 - scale)

    low, high = max(1e-300, math.sqrt(df) - 9), math.sqrt(df) + 9  # nothing within 1e-16 is outside
    points = sorted({min(max(x, low), high) for x in turns} - {low, high})
    return float(quad(weighted, low, high, points=points or None, limit=200)[0])


# Shared -------------------------------------------------------------------------------------------------------------


def _select(p: Array, fitness: Array) -> Array:
    grown = p * fitness
    return np.asarray(grown / grown.sum(axis=-1, keepdims=True))


def _multinomial(q: Array, size: float, rng: np.random.Generator) -> Array:
    """Frequencies of Multinomial(size, q), q of shape (n_rows, n_personas)."""
    if math.isinf(size):
        return q
    small = math.floor(size)
    # With chance a of floor, a / small + (1 - a) / (small + 1) = 1 / size: a fractional size keeps its variance.
    a = small * (small + 1) * (1 / size - 1 / (small + 1))
    n = np.where(rng.random(len(q)) < a, small, small + 1) if small != size else np.full(len(q), small)
    # The generator refuses rows whose rounding error makes them sum to more than 1.
    return np.asarray(rng.multinomial(n, q / q.sum(axis=-1, keepdims=True)) / n[:, None])


def _drift(q: Array, size: float, rng: np.random.Generator) -> Array:
    """Frequencies with mean q and variance q (1 - q) / size to O(1 / size^3); extinct personas stay extinct."""
    if math.isinf(size):
        return q
    if size < 50:
        return _multinomial(q, size, rng)
    rate = q * (size + 1)  # the total M is Poisson: E[1 / M] = 1 / size at a mean of size + 1
    z = rng.standard_normal(q.shape)
    counts = np.maximum(rate + np.sqrt(rate) * z + (z * z - 1) / 6, 0.0)
    rare = rate < 16
    counts[rare] = rng.poisson(rate[rare])
    return np.asarray(counts / counts.sum(axis=-1, keepdims=True))


def _migration(
    real_share: Array, p_real: Array, discourse_share: float, p_discourse: ArrayLike | None
) -> tuple[Array, Array]:
    """Share of what does not descend from outputs, shape (n,), and what it teaches, shape (n, n_personas)."""
    if not 0 <= discourse_share < 1:
        raise ValueError(f"discourse_share must be in [0, 1), got {discourse_share}")
    _within("real_share", real_share, 0, 1 - discourse_share + 1e-9)
    if p_discourse is None:
        return np.minimum(real_share / (1 - discourse_share), 1.0), np.tile(p_real, (len(real_share), 1))
    taught = _shares("p_discourse", p_discourse)
    _same_length("p_discourse", taught, p_real)
    share = np.minimum(real_share + discourse_share, 1.0)
    mixed = real_share[:, None] * p_real + discourse_share * taught
    weight = np.where(share > 0, share, 1.0)[:, None]
    return share, mixed / weight


def _vector(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size or not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be a finite vector, got shape {array.shape}: {array}")
    return array


def _shares(name: str, values: ArrayLike) -> Array:
    p = _vector(name, values)
    if np.any(p < 0) or abs(p.sum() - 1) > 1e-9:
        raise ValueError(f"{name} must be >= 0 and sum to 1, got sum {p.sum():.12g}, least {p.min():.3g}; scale it")
    return np.asarray(p / p.sum())


def _same_length(name: str, values: Array, p: Array) -> None:
    if len(values) != len(p):
        raise ValueError(f"{name} must have one entry per persona ({len(p)}), got {len(values)}")


def _real(p_real: ArrayLike, p: Array) -> Array:
    source = _shares("p_real", p_real)
    _same_length("p_real", source, p)
    return source


def _fitness(s: ArrayLike, n_rounds: int, n_personas: int) -> Array:
    """exp of log fitness, the largest of each round scaled to 1, shape (n_rounds, n_personas)."""
    if n_rounds < 0:
        raise ValueError(f"n_rounds must be >= 0, got {n_rounds}")
    array = np.asarray(s, dtype=float)
    if array.shape not in ((n_personas,), (n_rounds, n_personas)) or not np.all(np.isfinite(array)):
        raise ValueError(
            f"s must be finite, of shape ({n_personas},) or ({n_rounds}, {n_personas}), got shape {array.shape}"
        )
    if array.size and np.ptp(array, axis=-1).max() > MAX_REWARD_SPREAD:
        raise ValueError(f"s must spread over at most 700 nats, got {np.ptp(array, axis=-1).max():g}; it is a log")
    array = np.broadcast_to(array, (n_rounds, n_personas))
    return np.exp(array - array.max(axis=-1, keepdims=True))


def _transmission(transmission: ArrayLike | None, n_personas: int) -> Array:
    if transmission is None:
        return np.eye(n_personas)
    matrix = np.asarray(transmission, dtype=float)
    if (
        matrix.shape != (n_personas, n_personas)
        or not np.all(matrix >= 0)
        or np.abs(matrix.sum(axis=1) - 1).max() > 1e-9
    ):
        raise ValueError(
            f"transmission must be ({n_personas}, {n_personas}), >= 0 with rows that sum to 1, got {matrix.tolist()}"
        )
    return matrix


def _per_round(name: str, value: ArrayLike, n_rounds: int, *, low: float, high: float) -> Array:
    array = _within(name, value, low, high)
    if array.shape not in ((), (n_rounds,)):
        raise ValueError(f"{name} must be a number or have one entry per round ({n_rounds}), got shape {array.shape}")
    return np.broadcast_to(array, (n_rounds,))


def _within(name: str, value: ArrayLike, low: float, high: float) -> Array:
    array = np.asarray(value, dtype=float)
    bad = np.flatnonzero(~((array >= low) & (array <= high)))  # nan is outside
    if bad.size:
        where = f" at entry {bad[0]}" if array.ndim else ""
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {array.ravel()[bad[0]]:g}{where}")
    return array


def _check_k(k: float) -> None:
    if not (math.isinf(k) and k > 0) and not (k >= 1 and k == int(k)):
        raise ValueError(f"k must be an integer >= 1 or math.inf, got {k}")
