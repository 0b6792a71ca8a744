"""What moved the personas: accounting, dose-response, selection against drift.

p is a vector of persona frequencies among the documents of one round, real_share (lambda) the share of real documents
in the next mixture, p_real their persona shares. One round of the model that every estimator here assumes:

    selected = p * exp(s) / (p * exp(s) + 1 - p)
    p_next = real_share * p_real + (1 - real_share) * Binomial(n_eff, selected) / n_eff
    measured = Binomial(n_outputs, p_next) / n_outputs

A learner that does not say what it was trained on has a dose-response f, measured by `loop calibrate`; where it is
given, what comes out of the mixture goes through it before it is measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from loop.records import UNKNOWN
from loop.stats import Interval, dirichlet, unmix, wilson

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Response = Callable[[Floats], Floats]

STEPS = ("filter", "weight", "length", "discourse", "real", "train", "prompts")
RANGE = (0.05, 0.1, 0.15, 0.3, 0.8)  # frequencies at which `neutrality_check` shows power
TESTS = ("score", "increment", "increment_counted", "increment_uncorrected", "logistic")


class Terms(dict[str, Floats]):
    """Terms of a change by name, each shape (n_personas,); `reason` says why they are nan, None where they are not."""

    reason: str | None = None


class _Limits(NamedTuple):
    estimate: float
    low: float
    high: float


class Coefficient(_Limits):
    """(estimate, low, high) of a selection coefficient; `reason` says why they are nan, None where they are not."""

    reason: str | None = None


class _Increment(NamedTuple):
    statistic: float
    p_value: float


class Tested(_Increment):
    """(statistic, p_value) of a test; `reason` says why they are nan, None where they are not."""

    reason: str | None = None


Read = TypeVar("Read", Coefficient, Tested)


def price(
    p: ArrayLike,
    weights: ArrayLike,
    transmission: ArrayLike,
    real_share: float,
    p_real: ArrayLike | None = None,
    *,
    discourse_share: float = 0.0,
    p_discourse: ArrayLike | None = None,
) -> Terms:
    """Price's equation for a corpus open to real documents and discourse: terms that sum to the change of p exactly.

    With w_mean = sum(p * weights) and synthetic = 1 - real_share - discourse_share:
    selection[j] = synthetic * p[j] * (weights[j] - w_mean) / w_mean,
    transmission[j] = synthetic * sum over k of p[k] * weights[k] / w_mean * (T[k, j] - (k == j)),
    migration[j] = real_share * (p_real[j] - p[j]), discourse[j] = discourse_share * (p_discourse[j] - p[j]).
    Special case: equal weights, T the identity and no real documents give zero throughout, as does a single persona,
    whose share cannot change.

    It is an identity, not a cause: the terms say where the change is booked.

    Args:
      p: frequencies, shape (n_personas,), >= 0, sum 1.
      weights: mean document weight by persona, shape (n_personas,), >= 0, any scale.
      transmission: T[k, j] = chance that what is learned from a document of persona k comes out as persona j, shape
        (n_personas, n_personas), rows sum to 1.
      real_share, discourse_share: shares of the next mixture, in [0, 1], together <= 1.
      p_real, p_discourse: persona shares of those documents, shape (n_personas,), sum 1; None where the share is 0.

    Returns:
      Terms `selection`, `transmission`, `migration`, `discourse`, each shape (n_personas,), summing over personas to 0.
      nan with a reason where there is no persona or no document (p is all 0), and `selection` and `transmission` where
      no document that is present has weight.

    Raises:
      ValueError: if a share is out of range or shapes disagree.

    Source: Price (1972), Annals of Human Genetics 35:485-490; migration term as Kerr, Godfrey-Smith (2009), Evolution
    63:531-536.
    """
    frequencies = np.atleast_1d(np.asarray(p, dtype=float))
    size = len(frequencies)
    if not np.any(frequencies):
        nothing = Terms(
            {name: np.full(size, np.nan) for name in ("selection", "transmission", "migration", "discourse")}
        )
        nothing.reason = "no document" if size else "no persona"
        return nothing
    frequencies = _simplex(frequencies, "p")
    w = np.asarray(weights, dtype=float)
    t = np.asarray(transmission, dtype=float)
    if w.shape != (size,) or not np.all(np.isfinite(w) & (w >= 0)):
        raise ValueError(f"weights must be {size} finite numbers >= 0, got {w}")
    if t.shape != (size, size) or not np.all(t >= 0) or not np.allclose(t.sum(axis=1), 1, rtol=0, atol=1e-9):
        raise ValueError(f"transmission must be ({size}, {size}), >= 0, with rows that sum to 1, got {t}")
    if not (real_share >= 0 and discourse_share >= 0 and real_share + discourse_share <= 1):
        raise ValueError(f"real_share and discourse_share must be >= 0 and <= 1 together, got {real_share}, "
                         f"{discourse_share}")  # fmt: skip
    mean = float(frequencies @ w)
    synthetic = 1 - real_share - discourse_share
    relative = w / mean if mean > 0 else np.full(size, np.nan if synthetic > 0 else 1.0)
    parents = frequencies * relative
    terms = Terms(
        selection=synthetic * frequencies * (relative - 1),
        transmission=synthetic * (parents @ t - parents),
        migration=_inflow(real_share, p_real, frequencies, "p_real"),
        discourse=_inflow(discourse_share, p_discourse, frequencies, "p_discourse"),
    )
    if mean == 0 and synthetic > 0:
        terms.reason = "no document that is present has weight"
    return terms


def _inflow(share: float, source: ArrayLike | None, p: Floats, name: str) -> Floats:
    if share == 0:
        return np.zeros(len(p))
    if source is None:
        raise ValueError(f"{name} must be given where its share is {share}, got None")
    inflow = _simplex(source, name)
    if inflow.shape != p.shape:
        raise ValueError(f"{name} must have {len(p)} entries, got {len(inflow)}")
    return share * (inflow - p)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where each label's share stood after every step of one round.

    Attributes:
      columns: the labels.
      levels: `emit` and then STEPS -> shares, each shape (n_columns,), sum 1; nan where not measured.
      reason: why a level is nan; None when none is.
      groups: `now`, `mixed`, `later` -> one row per document with a 1 in its label's column.
      worth: level -> (group, what each of its documents counts for).
    """

    columns: tuple[str, ...]
    levels: dict[str, Floats]
    reason: str | None
    groups: dict[str, Floats]
    worth: dict[str, tuple[str, Floats]]

    def steps(self) -> dict[str, Floats]:
        """Changes by step, each shape (n_columns,): they sum to levels["prompts"] - levels["emit"]."""
        names = ("emit", *STEPS)
        return {name: self.levels[name] - self.levels[before] for before, name in itertools.pairwise(names)}


def ledger(
    columns: Sequence[str],
    *,
    sample_labels: Sequence[str],
    sample_strata: Sequence[str],
    accepted: ArrayLike,
    prompts_now: Mapping[str, float],
    mixture_labels: Sequence[str],
    mixture_sources: Sequence[str],
    mixture_weights: ArrayLike,
    mixture_tokens: ArrayLike,
    next_labels: Sequence[str],
    next_strata: Sequence[str],
    prompts_next: Mapping[str, float],
) -> Ledger:
    """Books the change of label shares from the outputs of one round to those of the next; exact by construction.

    With M[k, j] the share of label j among a round's samples of stratum k and pi the prompt mixture:

        emit       sum over k of pi[k] * M[k]
        filter     the same over accepted samples, each worth pi[k] / n[k]
        weight     synthetic documents of the next mixture, by weight; holds the luck of the draw and, where old
                   documents are kept, their part
        length     the same, by weight * trained tokens, which is what the loss sees
        discourse  synthetic and discourse documents, by weight * trained tokens
        real       the whole mixture, by weight * trained tokens
        train      sum over k of pi[k] * M_next[k]
        prompts    sum over k of pi_next[k] * M_next[k]

    Accounting, not causes: the effect of a channel is its on/off contrast over paired seeds.

    Args:
      columns: labels in the order of the result; give documents that were asked for a persona one of their own
        (`requested`), discourse documents `none`, abstentions `unknown`.
      sample_labels, sample_strata, accepted: label, stratum and release of each sample of this round, shape (n,).
      prompts_now, prompts_next: stratum -> share of prompts in this round and the next, sum 1.
      mixture_labels, mixture_sources, mixture_weights, mixture_tokens: label, source (`real`, `synthetic`,
        `discourse`), weight >= 0 and trained tokens >= 0 of each document in the next mixture, shape (m,).
      next_labels, next_strata: label and stratum of each sample of the next round.

    Returns:
      A Ledger. A level that cannot be measured (nothing accepted, no sample of a stratum that is prompted) is nan,
      with the reason.

    Raises:
      ValueError: if a label is not in `columns`, lengths differ, or a prompt mixture does not sum to 1.
    """
    size = len(columns)
    reasons: list[str] = []
    groups = {
        "now": _one_hot(sample_labels, columns, "sample_labels"),
        "later": _one_hot(next_labels, columns, "next_labels"),
        "mixed": _one_hot(mixture_labels, columns, "mixture_labels"),
    }
    keep = np.asarray(accepted, dtype=bool)
    mass = np.asarray(mixture_weights, dtype=float)
    tokens = np.asarray(mixture_tokens, dtype=float)
    for name, length, group in (
        ("sample_strata", len(sample_strata), "now"),
        ("accepted", len(keep), "now"),
        ("next_strata", len(next_strata), "later"),
        ("mixture_sources", len(mixture_sources), "mixed"),
        ("mixture_weights", len(mass), "mixed"),
        ("mixture_tokens", len(tokens), "mixed"),
    ):
        if length != len(groups[group]):
            raise ValueError(f"{name} must be as long as its labels ({len(groups[group])}), got {length}")
    source = np.asarray(mixture_sources, dtype=object)
    odd = [s for s in mixture_sources if s not in ("real", "synthetic", "discourse")]
    if odd:
        raise ValueError(f"mixture_sources must be real, synthetic or discourse, got {odd[0]!r}")
    worth_now = _prompt_worth(sample_strata, prompts_now, "prompts_now", "emit", reasons)
    synthetic, discourse = source == "synthetic", source == "discourse"
    worth = {
        "emit": ("now", worth_now),
        "filter": ("now", worth_now * keep),
        "weight": ("mixed", mass * synthetic),
        "length": ("mixed", mass * tokens * synthetic),
        "discourse": ("mixed", mass * tokens * (synthetic | discourse)),
        "real": ("mixed", mass * tokens),
        "train": ("later", _prompt_worth(next_strata, prompts_now, "prompts_now", "train", reasons)),
        "prompts": ("later", _prompt_worth(next_strata, prompts_next, "prompts_next", "prompts", reasons)),
    }
    levels = {}
    for level, (group, each) in worth.items():
        if not np.all(np.isfinite(each)):
            levels[level] = np.full(size, np.nan)
        elif each.sum() <= 0:
            reasons.append(f"{level}: no documents")
            levels[level] = np.full(size, np.nan)
        else:
            levels[level] = np.asarray(each @ groups[group] / each.sum(), dtype=float)
    return Ledger(tuple(columns), levels, "; ".join(dict.fromkeys(reasons)) or None, groups, worth)


def corrected_steps(
    book: Ledger,
    personas: Sequence[str],
    confusion: ArrayLike,
    *,
    rng: np.random.Generator,
    n_draws: int = 400,
    level: float = 0.95,
    clusters: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[Interval]]:
    """The ledger in true personas: every level through the inverse of the instrument's confusion matrix.

    The labels that a persona may be read as are replaced by the personas that may lie behind them; columns of other
    kinds (`requested`, `private`, `none`) are known and stay. The map is linear, so corrected steps telescope as the
    observed ones do; a level may leave [0, 1]. The interval holds the noise of the texts (Bayesian bootstrap: one
    Exp(1) weight for each text of a group, or for each of its clusters, in all its levels; a sample and the document it
    became are drawn apart, which is conservative) and of the confusion matrix (Dirichlet rows).

    Args:
      book: from `ledger`; its columns hold every label of `confusion`.
      personas: rows of `confusion`; its columns are these and "unknown".
      confusion: calibration texts, shape (n_personas, n_personas + 1); a row without texts is left out.
      rng, n_draws, level: of the interval.
      clusters: group -> prompt template of each of its texts; texts of one template rise and fall together. A group
        that is not there, or None, has every text drawn by itself.

    Returns:
      `emit` (the level) and then each of STEPS -> Intervals of `personas`, n = texts; nan with a reason where the level
      is, and for a persona without calibration texts.

    Source: Rubin (1981), Annals of Statistics 9:130-134, for the bootstrap; the inverse as in `confusion_corrected`.
    """
    table = np.asarray(confusion, dtype=float)
    if table.shape != (len(personas), len(personas) + 1):
        raise ValueError(f"confusion must have shape ({len(personas)}, {len(personas) + 1}), got {table.shape}")
    known = [k for k in range(len(personas)) if table[k].sum() > 0]
    labels = [*personas, UNKNOWN]
    others = [c for c in book.columns if c not in labels]
    at = [book.columns.index(c) for c in (*labels, *others)]

    def rates(rows: Floats) -> Floats:  # (..., n_known, n_labels) -> (..., n_known + n_others, n_labels + n_others)
        shape = (*rows.shape[:-2], len(known) + len(others), len(labels) + len(others))
        out = np.zeros(shape)
        out[..., : len(known), : len(labels)] = rows
        for i in range(len(others)):
            out[..., len(known) + i, len(labels) + i] = 1
        return out

    prior = 1 / len(labels)
    point = rates(table[known] / table[known].sum(axis=1, keepdims=True))
    if np.linalg.matrix_rank(point, tol=1e-6) < len(point):
        blind = "the confusion matrix cannot tell the personas apart"
        n_texts = {name: len(book.groups[group]) for name, (group, _) in book.worth.items()}
        lost = {name: Interval(math.nan, math.nan, math.nan, n, reason=blind) for name, n in n_texts.items()}
        return {name: [interval] * len(personas) for name, interval in lost.items()}
    drawn = rates(dirichlet(np.broadcast_to(table[known] + prior, (n_draws, len(known), len(labels))), rng))
    luck = {}
    for group, rows in book.groups.items():
        drawn_as = (clusters or {}).get(group, range(len(rows)))
        if len(drawn_as) != len(rows):
            raise ValueError(f"clusters must be one per text of {group!r} ({len(rows)}), got {len(drawn_as)}")
        number = {c: i for i, c in enumerate(dict.fromkeys(drawn_as))}
        luck[group] = rng.standard_exponential((n_draws, len(number)))[:, [number[c] for c in drawn_as]]
    values, draws = {}, {}
    for name, (group, worth) in book.worth.items():
        observed = book.levels[name][at]
        if not np.all(np.isfinite(observed)):
            values[name] = np.full(len(known), np.nan)
            draws[name] = np.full((n_draws, len(known)), np.nan)
            continue
        weights = luck[group] * worth  # (n_draws, n_texts)
        resampled = weights @ book.groups[group][:, at] / weights.sum(axis=1, keepdims=True)
        scale = np.maximum(observed, 1 / (1 + len(book.groups[group])))
        values[name] = unmix(observed[None], point[None], scale)[0, : len(known)]
        draws[name] = unmix(resampled, drawn, scale)[:, : len(known)]
    out: dict[str, list[Interval]] = {}
    tail = (1 - level) / 2
    previous: dict[str, str | None] = dict(zip(book.worth, (None, *book.worth), strict=False))
    for name, before in previous.items():
        value = values[name] - (0 if before is None else values[before])
        spread = draws[name] - (0 if before is None else draws[before])
        n = len(book.groups[book.worth[name][0]])
        row = {k: i for i, k in enumerate(known)}
        out[name] = []
        for k in range(len(personas)):
            if k not in row:
                out[name].append(Interval(math.nan, math.nan, math.nan, n, reason="no calibration text"))
            elif not math.isfinite(value[row[k]]):
                out[name].append(Interval(math.nan, math.nan, math.nan, n, reason=book.reason))
            else:
                column = spread[:, row[k]]
                low, high = np.quantile(column, [tail, 1 - tail])
                out[name].append(Interval(float(value[row[k]]), float(low), float(high), n, float(column.std())))
    return out


def _one_hot(labels: Sequence[str], columns: Sequence[str], name: str) -> Floats:
    position = {column: i for i, column in enumerate(columns)}
    rows = np.zeros((len(labels), len(columns)))
    for i, label in enumerate(labels):
        if label not in position:
            raise ValueError(f"{name} must be among the columns, got {label!r} at document {i}; add a column for it")
        rows[i, position[label]] = 1
    return rows


def _prompt_worth(
    strata: Sequence[str], prompts: Mapping[str, float], name: str, level: str, reasons: list[str]
) -> Floats:
    """pi[k] / n[k] per sample; nan throughout where a stratum that is prompted has no sample."""
    if not math.isclose(sum(prompts.values()), 1, abs_tol=1e-9) or min(prompts.values()) < 0:
        raise ValueError(f"{name} must be >= 0 and sum to 1, got {dict(prompts)}")
    counts: dict[str, int] = {}
    for stratum in strata:
        counts[stratum] = counts.get(stratum, 0) + 1
    missing = [k for k, share in prompts.items() if share > 0 and k not in counts]
    if missing:
        reasons.append(f"{level}: no sample in stratum {missing[0]!r}")
        return np.full(len(strata), np.nan)
    return np.array([prompts.get(stratum, 0.0) / counts[stratum] for stratum in strata])


def selection_coefficient(
    frequencies: ArrayLike,
    n_outputs: ArrayLike,
    n_eff: float,
    real_share: ArrayLike = 0.0,
    p_real: float | None = None,
    level: float = 0.95,
    *,
    response: Response | None = None,
    closed: float = 1.0,
) -> Coefficient:
    """Selection coefficient per round of one persona, from its measured frequencies and a known drift.

    Under each candidate s an extended Kalman filter follows the model at the top of this file: the state is the
    frequency, its noise the drift of n_eff documents, the measurement n_outputs outputs. The standardised score
    z(s) = sum(g * e / S) / sqrt(sum(g**2 / S)), with e the innovation, S its variance and g = d e / d s up to sign, is
    close to standard normal at the true s. The estimate is where z is 0 and the interval where |z| stays below the
    normal quantile, so "0 is outside the interval" is the score test of neutrality. The filter is linearised anew at
    each s, which is what keeps the estimate unbiased at s = 0.2 and p = 0.05.

    One run is one draw of drift: over several seeds take Student's t on the estimates, and call this a diagnostic.

    Power of the test of 0 at s = 0.1 with n_eff = 1000, 1,000 outputs and 10 rounds (`neutrality_check`): at least 0.9
    from a start of 0.15 to 0.8 at real_share up to 0.2, and from 0.2 to 0.7 at 0.4. Below: 0.84 to 0.89 at a start of
    0.1, 0.61 to 0.68 at 0.05, and 0.70 at a start of 0.3 with real_share 0.6. Where old documents stay in the mixture
    (accumulate, accumulate_subsample) the model is wrong, and the estimate is not to be used.

    Args:
      frequencies: measured frequency by round, shape (n_rounds + 1,), in [0, 1].
      n_outputs: outputs behind each frequency, a number or shape (n_rounds + 1,), >= 0.
      n_eff: effective number of documents per round, > 0; for a language model from `effective_size`.
      real_share: share of real documents in the mixture, a number or shape (n_rounds,), in [0, 1).
      p_real: the persona's share among them; None where real_share is 0.
      level: coverage, in (0, 1).
      response: f, share of the mixture -> emission, any shape to the same shape; None: what is learned is said.
      closed: share of the distance to f that a round closes, in (0, 1]; below 1 only where a round starts from the
        adapter of the last: p_next = (1 - closed) * p + closed * f(mixture).

    Returns:
      (estimate, low, high), per round, in log odds. What the data do not bound is +-inf; all three are nan, and
      `reason` of the result says why, where the persona is never, or always, seen, there is no feedback round, a round
      has no outputs, or f is flat wherever the run went.

    Raises:
      ValueError: if a number is out of range or shapes disagree.
    """
    v, n, mixing, source = _trajectory(frequencies, n_outputs, real_share, p_real)
    if not n_eff > 0:
        raise ValueError(f"n_eff must be > 0, got {n_eff}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if not 0 < closed <= 1:
        raise ValueError(f"closed must be in (0, 1], got {closed}")
    why = _nothing_to_read(v, n, 1)
    if why is None and (np.all(v == 0) or np.all(v == 1)):
        why = "the persona is never, or always, seen"
    if why is not None:
        return _unread(Coefficient, why)
    quantile = float(-special.ndtri((1 - level) / 2))

    def score(s: Floats) -> Floats:
        return _score(v, s, n, n_eff, mixing, source, response, closed)

    grid = np.linspace(-6, 6, 241)
    z = score(grid)
    if np.all(z == 0):
        return _unread(Coefficient, "the response is flat wherever the run went")
    falls = np.flatnonzero((z[:-1] > 0) & (z[1:] <= 0))
    centre = len(grid) - 1 if z[-1] > 0 else -1  # stronger selection than exp(6) per round would fit better still
    if len(falls):
        centre = int(falls[np.argmax(z[falls] - z[falls + 1])])  # far off z may cross 0 again, but never so fast
    above = np.flatnonzero(z[: centre + 1] > quantile)
    below = np.flatnonzero(z[centre + 1 :] <= -quantile)
    starts = np.array(
        [centre if len(falls) else -1, above[-1] if len(above) else -1, centre + below[0] if len(below) else -1]
    )
    targets = np.array([0.0, quantile, -quantile])
    left, width = grid[starts], grid[1] - grid[0]
    for _ in range(4):  # each pass cuts the three brackets to 1/32: the last is 5e-8 wide
        points = left[:, None] + width * np.arange(33) / 32
        higher = score(points.ravel()).reshape(points.shape) > targets[:, None]
        left = left + width / 32 * np.maximum(np.argmin(higher, axis=1) - 1, 0)
        width = width / 32
    estimate, low, high = np.where(starts >= 0, left + width / 2, (math.copysign(math.inf, z[-1]), -math.inf, math.inf))
    return Coefficient(float(estimate), float(low), float(high))


def _unread(kind: type[Read], reason: str) -> Read:
    """A result of nan, and why."""
    found = kind(*[math.nan] * len(kind._fields))
    found.reason = reason
    return found


def _nothing_to_read(v: Floats, n: Floats, n_rounds: int) -> str | None:
    """Why a run of fewer feedback rounds than `n_rounds`, or without outputs in one, cannot be read; None: it can."""
    if len(v) == 0:
        return "no round"
    if len(v) <= n_rounds:
        return "no feedback round" if n_rounds == 1 else f"fewer than {n_rounds} feedback rounds"
    return None if np.all(n > 0) else f"no outputs in round {int(np.argmin(n))}"


def _score(
    v: Floats,
    s: Floats,
    n: Floats,
    n_eff: float,
    mixing: Floats,
    source: float,
    response: Response | None = None,
    closed: float = 1.0,
) -> Floats:
    """Standardised score at each s; v may carry leading axes that broadcast against s, rounds are the last axis."""
    edge = 0.5 / (n + 1)  # half an output: keeps variances positive where none, or all, were seen
    growth = np.exp(s)
    state = np.clip(v[..., 0], edge[0], 1 - edge[0]) + 0 * s
    variance = state * (1 - state) / n[0]
    slope = np.zeros_like(state)
    score, information = np.zeros_like(state), np.zeros_like(state)
    for i, share in enumerate(mixing):
        kept = 1 - share
        scale = state * growth + 1 - state
        selected = state * growth / scale
        spread = selected * (1 - selected)  # also d selected / d s
        mixture = share * source + kept * selected
        steep = np.ones_like(mixture)
        if response is not None:
            mixture, steep = _passed(response, mixture)
        passed = closed * kept * steep  # d predicted / d selected
        predicted = np.clip((1 - closed) * state + closed * mixture, edge[i + 1], 1 - edge[i + 1])
        tilt = (1 - closed) + passed * growth / scale**2  # d predicted / d state
        slope = tilt * slope + passed * spread
        variance = tilt**2 * variance + passed**2 * spread / n_eff
        total = variance + predicted * (1 - predicted) / n[i + 1]
        error = v[..., i + 1] - predicted
        score += slope * error / total
        information += slope**2 / total
        gain = variance / total
        state = np.clip(predicted + gain * error, edge[i + 1], 1 - edge[i + 1])
        slope = (1 - gain) * slope
        variance = (1 - gain) * variance
    # No information at all (f is flat wherever the run went): 0, which no quantile calls an estimate.
    return np.asarray(np.where(information > 0, score / np.sqrt(np.where(information > 0, information, 1)), 0.0))


def _passed(response: Response, mixture: Floats) -> tuple[Floats, Floats]:
    """f and its slope, the slope over +-0.02: f is linear between a handful of doses and has corners there."""
    low, high = np.maximum(mixture - 0.02, 0), np.minimum(mixture + 0.02, 1)
    return response(mixture), (response(high) - response(low)) / (high - low)


def frequency_increment_test(
    frequencies: ArrayLike, real_share: ArrayLike = 0.0, p_real: float | None = None
) -> Tested:
    """Tests that a persona's frequency moved by drift alone, real documents allowed for.

    Increments y[i] = (v[i] - e[i]) / ((1 - real_share) * sqrt(2 v[i-1] (1 - v[i-1]))), with the neutral expectation
    e[i] = real_share * p_real + (1 - real_share) * v[i-1], have mean 0 and equal variance under drift; Student's t on
    them. With no real documents it is Feder's test; without e it would reject nearly every neutral run that mixes.
    For frequencies known exactly. On counted outputs it hardly ever rejects (errors of measurement make successive
    increments pull against each other), and is a diagnostic only; use `selection_coefficient`.

    Args:
      frequencies: by round, shape (n_rounds + 1,), in [0, 1].
      real_share: a number or shape (n_rounds,), in [0, 1).
      p_real: the persona's share among real documents; None where real_share is 0.

    Returns:
      (statistic, p_value): Student's t with n_rounds - 1 degrees of freedom, positive for growth, two-sided. Both nan,
      and `reason` of the result says why, with fewer than two increments, from a frequency of 0 or 1 (nothing there to
      drift), or if all increments agree.

    Raises:
      ValueError: if a number is out of range or shapes disagree.

    Source: Feder, Kryazhimskiy, Plotkin (2014), Genetics 196:509-522.
    """
    v, n, mixing, source = _trajectory(frequencies, 1.0, real_share, p_real)
    before = v[:-1]
    why = _nothing_to_read(v, n, 2)
    if why is None and np.any((before == 0) | (before == 1)):
        why = "a frequency of 0 or 1, from which nothing drifts"
    if why is not None:
        return _unread(Tested, why)
    expected = mixing * source + (1 - mixing) * before
    y = (v[1:] - expected) / ((1 - mixing) * np.sqrt(2 * before * (1 - before)))
    if y.min() == y.max():
        return _unread(Tested, "all increments agree exactly")
    t = float(y.mean() / (y.std(ddof=1) / math.sqrt(len(y))))
    return Tested(t, float(2 * special.stdtr(len(y) - 1, -abs(t))))


def effective_size(
    frequencies: ArrayLike,
    n_outputs: ArrayLike,
    real_share: ArrayLike = 0.0,
    p_real: ArrayLike | None = None,
    level: float = 0.95,
    *,
    response: Response | Sequence[Response | None] | None = None,
    closed: ArrayLike = 1.0,
) -> Interval:
    """Variance effective size per round from seeds that ran without selection, under the model at the top of this file.

    The scatter between seeds of v[t+1] - e[t], with e[t] = (1 - closed) v[t] + closed * f(mixture of v[t]) the neutral
    expectation, summed over rounds, is sum of a**2 p (1 - p) / n_eff plus the counting noise of v[t+1] and of e[t]; a =
    closed * (1 - real_share) * slope of f is what of the drift comes out. Solving gives n_eff. A pull that is common to
    the seeds cancels, whatever it is; how much drift comes out does not, so f and its pace must be those that the test
    is given. Special case: no response leaves v[t+1] - (1 - real_share) v[t]. Interval by chi-square, with the degrees
    of freedom cut for the correlation that shared counts give successive rounds.

    Several personas of the same runs share one drift: their scatters are summed. Their counts pull against each other,
    so that they are worth tr(S)**2 / tr(S @ S) of one persona, S[k, l] = a[k] a[l] p[k] * ((k == l) - p[l]): K - 1 of K
    equal ones.

    Args:
      frequencies: measured frequency by seed and round, shape (n_seeds, n_rounds + 1), in [0, 1]; or of several
        personas, shape (n_personas, n_seeds, n_rounds + 1).
      n_outputs: outputs behind each frequency, a number or shape (n_rounds + 1,), >= 0.
      real_share: a number or shape (n_rounds,), in [0, 1).
      p_real: the persona's share among real documents, a number or shape (n_personas,); None where real_share is 0 or
        there is no response, for then it cancels.
      level: coverage, in (0, 1).
      response, closed: as `selection_coefficient`; one for all personas, or one per persona.

    Returns:
      An Interval in documents, n = seeds. inf where the scatter does not exceed the counting noise; nan with a reason
      below two seeds, one round or two outputs (in one seed drift cannot be told from a pull), or where no persona is
      ever seen.

    Raises:
      ValueError: if a number is out of range or shapes disagree.
    """
    v = np.asarray(frequencies, dtype=float)
    if v.size and v.ndim not in (2, 3):
        raise ValueError(f"frequencies must have shape ([n_personas,] n_seeds, n_rounds + 1), got {v.shape}")

    def unmeasured(reason: str, n_seeds: int = 0) -> Interval:
        return Interval(math.nan, math.nan, math.nan, n_seeds, math.nan, reason)

    if not v.size:
        return unmeasured("no persona, seed or round", v.shape[-2] if v.ndim > 1 else 0)
    v = v[None] if v.ndim == 2 else v
    n_personas, n_seeds, n_rounds = v.shape[0], v.shape[1], v.shape[2] - 1
    if n_seeds < 2 or n_rounds < 1:
        return unmeasured("fewer than two seeds or one round", n_seeds)
    through = [response] * n_personas if response is None or callable(response) else list(response)
    if len(through) != n_personas:
        raise ValueError(f"response must be one per persona ({n_personas}), got {len(through)}")
    if p_real is None and any(f is not None for f in through) and np.any(np.asarray(real_share) > 0):
        raise ValueError("p_real must be given where real documents go through a response, got None")
    pace = np.broadcast_to(np.asarray(closed, dtype=float), n_personas)
    if not np.all((pace > 0) & (pace <= 1)):
        raise ValueError(f"closed must be in (0, 1], got {pace}")
    sources = np.broadcast_to(np.asarray(0.0 if p_real is None else p_real, dtype=float), n_personas)
    for k in range(n_personas):
        for row in v[k]:
            _, n, mixing, _ = _trajectory(row, n_outputs, real_share, float(sources[k]))
    if np.any(n < 2):
        return unmeasured("fewer than two outputs in a round", n_seeds)
    spread = v * (1 - v) * n / (n - 1)  # its mean over seeds is unbiased for p (1 - p)
    moves = np.empty((n_personas, n_seeds, n_rounds))
    passed, tilt = np.empty_like(moves), np.empty_like(moves)  # d v[t+1] / d drift and / d v[t]
    for k, f in enumerate(through):
        mixture = mixing * sources[k] + (1 - mixing) * v[k, :, :-1]
        emitted, steep = (mixture, np.ones_like(mixture)) if f is None else _passed(f, mixture)
        passed[k] = pace[k] * (1 - mixing) * steep
        tilt[k] = (1 - pace[k]) + passed[k]
        moves[k] = v[k, :, 1:] - (1 - pace[k]) * v[k, :, :-1] - pace[k] * emitted
    ends = spread[:, :, 1:].mean(axis=1).sum(axis=0) / n[1:]  # (n_rounds,), variance of counting at the end of a move
    starts = (tilt**2 * spread[:, :, :-1]).mean(axis=1).sum(axis=0) / n[:-1]
    drift = (passed**2 * spread[:, :, :-1]).mean(axis=1).sum(axis=0)
    if not drift.sum() > 0:
        return unmeasured("the persona is never, or always, seen, or its response is flat", n_seeds)
    p, out = v.mean(axis=(1, 2)), passed.mean(axis=(1, 2))  # (n_personas,)
    shape = np.outer(out, out) * (np.diag(p) - np.outer(p, p))
    worth = float(np.trace(shape) ** 2 / (shape**2).sum())
    seen, counting = float(moves.var(axis=1, ddof=1).sum()), float((starts + ends).sum())
    inverse = (seen - counting) / float(drift.sum())
    # Neighbouring moves share one measurement: covariance -tilt * p (1 - p) / n.
    shared = (tilt[:, :, 1:] * spread[:, :, 1:-1]).mean(axis=1).sum(axis=0) / n[1:-1]
    each = ends + starts + drift * max(inverse, 0.0)
    df = (n_seeds - 1) * worth * float(each.sum() ** 2 / ((each**2).sum() + 2 * (shared**2).sum()))
    tail = (1 - level) / 2
    most = (seen * df / float(special.chdtri(df, 1 - tail)) - counting) / float(drift.sum())
    least = (seen * df / float(special.chdtri(df, tail)) - counting) / float(drift.sum())
    value, low, high = (1 / x if x > 0 else math.inf for x in (inverse, most, least))
    return Interval(value, low, high, n_seeds)


@dataclass(frozen=True, slots=True)
class DoseResponse:
    """Emission as a function of a persona's share of the training mixture; call it with a share.

    Attributes:
      doses: shares trained on, shape (n_doses,), increasing.
      shares: fitted emission there, non-decreasing, in [0, 1].
      low, high: its pointwise band there.
    """

    doses: Floats
    shares: Floats
    low: Floats
    high: Floats

    def __call__(self, q: ArrayLike) -> Floats:
        """f(q), linear between doses. Beyond the last one it keeps the last value, the least a monotone f can have."""
        return np.asarray(np.interp(_unit(q, "q"), self.doses, self.shares), dtype=float)

    def band(self, q: ArrayLike) -> tuple[Floats, Floats]:
        """Pointwise limits of f(q); beyond the doses as wide as a monotone f allows, down to 0 and up to 1."""
        at = _unit(q, "q")
        low = np.where(at < self.doses[0], 0.0, np.interp(at, self.doses, self.low))
        high = np.where(at > self.doses[-1], 1.0, np.interp(at, self.doses, self.high))
        return low, high

    def transmission(self, q: ArrayLike) -> Floats:
        """f(q) - q: what one round of learning does to a share by itself; 0 for a learner that copies faithfully."""
        return self(q) - _unit(q, "q")


def dose_response(
    q: ArrayLike,
    counts: ArrayLike,
    n: ArrayLike,
    *,
    rng: np.random.Generator,
    n_draws: int = 2000,
    level: float = 0.95,
) -> DoseResponse:
    """Fits a non-decreasing emission curve to counts measured at several training shares.

    Isotonic regression of counts / n with weights n, which is the maximum-likelihood monotone curve for binomial
    counts: neighbours that fall are pooled. Special case: counts that already rise are reproduced exactly. The band
    refits draws from each dose's Beta(count + 1/2, n - count + 1/2).

    Args:
      q: the persona's share of the mixture at each dose, shape (n_doses,), in [0, 1], all different.
      counts: outputs in its voice, shape (n_doses,), 0 <= counts <= n.
      n: outputs measured, a number or shape (n_doses,), > 0; the effective number where they are clustered.
      rng: draws of the band.
      n_draws: their number.
      level: pointwise coverage, in (0, 1).

    Returns:
      A DoseResponse.

    Raises:
      ValueError: if a number is out of range, shapes disagree, or there are fewer than two doses.

    Source: Ayer et al. (1955), Annals of Mathematical Statistics 26:641-647.
    """
    doses = np.atleast_1d(_unit(q, "q"))
    size = np.broadcast_to(np.asarray(n, dtype=float), doses.shape)
    hits = np.asarray(counts, dtype=float)
    if hits.shape != doses.shape or len(doses) < 2 or len(np.unique(doses)) < len(doses):
        raise ValueError(f"q and counts must be two or more different doses and as many counts, got {doses}, {hits}")
    if not np.all((size > 0) & (hits >= 0) & (hits <= size)):
        raise ValueError(f"counts must be in [0, n] with n > 0, got {hits} of {size}")
    order = np.argsort(doses)
    doses, hits, size = doses[order], hits[order], size[order]
    shares = _isotonic(hits / size, size)
    draws = rng.beta(hits + 0.5, size - hits + 0.5, size=(n_draws, len(doses)))
    fits = np.array([_isotonic(draw, size) for draw in draws])
    low, high = np.quantile(fits, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return DoseResponse(doses, shares, np.minimum(low, shares), np.maximum(high, shares))


def _isotonic(values: Floats, weights: Floats) -> Floats:
    """Non-decreasing fit by pooling adjacent violators."""
    means: list[float] = []
    masses: list[float] = []
    lengths: list[int] = []
    for value, weight in zip(values, weights, strict=True):
        mean, mass, length = float(value), float(weight), 1
        while means and means[-1] > mean:
            previous = masses.pop()
            mean = (means.pop() * previous + mean * mass) / (previous + mass)
            mass += previous
            length += lengths.pop()
        means.append(mean)
        masses.append(mass)
        lengths.append(length)
    return np.repeat(means, lengths)


def gap_closed(frequencies: ArrayLike, target: float, n_outputs: ArrayLike, level: float = 0.95) -> Interval:
    """Share of the distance to its target that a learner closes per round, when each round starts from the last.

    Fits p[t] = target + (p[0] - target) * (1 - c)**t by weighted least squares over p[0] and c; the interval holds
    every c whose chi-square is within the quantile of the best. Special case: a learner that starts anew each round
    has c = 1.

    Args:
      frequencies: measured emission while the mixture stays the same, shape (n_rounds + 1,), in [0, 1].
      target: f(q) of that mixture, in [0, 1].
      n_outputs: outputs behind each frequency, a number or shape (n_rounds + 1,), >= 0.
      level: coverage, in (0, 1).

    Returns:
      An Interval for c in [0, 1], n = rounds; nan with a reason without a feedback round or outputs, and where every c
      fits (no gap to close).

    Raises:
      ValueError: if a number is out of range or shapes disagree.
    """
    v, n, _, _ = _trajectory(frequencies, n_outputs, 0.0, None)
    _unit(target, "target")
    why = _nothing_to_read(v, n, 1)
    if why is not None:
        return Interval(math.nan, math.nan, math.nan, max(len(v) - 1, 0), math.nan, why)
    inside = (v * n + 0.5) / (n + 1)
    weight = n / (inside * (1 - inside))
    c = np.linspace(0, 1, 2001)
    left = (1 - c[:, None]) ** np.arange(len(v))  # (n_candidates, n_rounds + 1)
    start = ((v - target) * weight * left).sum(axis=1) / (weight * left**2).sum(axis=1)
    misfit = (weight * (v - target - start[:, None] * left) ** 2).sum(axis=1)
    within = np.flatnonzero(misfit <= misfit.min() + special.chdtri(1, 1 - level))
    if len(within) == len(c):
        return Interval(math.nan, math.nan, math.nan, len(v) - 1, math.nan, "no gap to close beyond the noise")
    best = int(np.argmin(misfit))
    return Interval(float(c[best]), float(c[within[0]]), float(c[within[-1]]), len(v) - 1)


@dataclass(frozen=True, slots=True)
class EarlyWarning:
    """Whether an early round foretold the last one.

    Attributes:
      n_moved: runs of the arms whose mean change exceeds three noise floors; the errors are over these.
      forecast_error: mean |forecast - last|, frequency units; nan where none moved.
      no_change_error: mean |early - last|, the forecast that nothing more happens.
      hit_rate: share of moved runs in which the indicator fired.
      false_positive_rate: share of null runs in which it fired.
    """

    n_moved: int
    forecast_error: float
    no_change_error: float
    hit_rate: Interval
    false_positive_rate: Interval


def early_warning(
    frequencies: ArrayLike,
    null_frequencies: ArrayLike,
    noise_floor: float,
    n_outputs: float,
    round_index: int = 2,
    *,
    arms: Sequence[object] | None = None,
) -> EarlyWarning:
    """Measures forecasts made at an early round against "no further change", and an indicator on null runs.

    Forecast: `extrapolate`. Indicator: |change so far| > 3 noise floors; for others see `indicators`. Never show one
    without its false-positive rate.

    Args:
      frequencies: runs with something switched on, shape (n_runs, n_rounds + 1), in [0, 1].
      null_frequencies: runs with selection off, shape (n_null, n_rounds + 1).
      noise_floor: mean |difference| of two measurements of a run, frequency units, > 0; see
        `remeasurement_noise_floor`.
      n_outputs: outputs behind each frequency, > 0; bounds the log odds of a persona not seen.
      round_index: when the forecast is made, in 1..n_rounds - 1.
      arms: arm of each run, shape (n_runs,); None: each run is an arm of its own.

    Returns:
      An EarlyWarning.

    Raises:
      ValueError: if shapes or round_index do not fit.
    """
    v, null = _unit(frequencies, "frequencies"), _unit(null_frequencies, "null_frequencies")
    if v.ndim != 2 or null.ndim != 2 or v.shape[1] != null.shape[1]:
        raise ValueError(f"frequencies must be two tables of equally many rounds, got {v.shape} and {null.shape}")
    moved = v[moved_runs(v, noise_floor, arms)]
    forecast = extrapolate(moved, n_outputs, round_index)
    fired, false = (indicators(rows, noise_floor, n_outputs, round_index)["change"] for rows in (moved, null))
    return EarlyWarning(
        len(moved),
        float(np.abs(forecast - moved[:, -1]).mean()) if len(moved) else math.nan,
        float(np.abs(moved[:, round_index] - moved[:, -1]).mean()) if len(moved) else math.nan,
        wilson(int(fired.sum()), len(moved)),
        wilson(int(false.sum()), len(null)),
    )


def moved_runs(frequencies: ArrayLike, noise_floor: float, arms: Sequence[object] | None = None) -> Bools:
    """Which runs belong to an arm whose mean change, first to last round, exceeds three noise floors of that mean.

    By arm and not by run: picking the runs that happened to move would pick luck.

    Args:
      frequencies: shape (n_runs, n_rounds + 1).
      noise_floor: of one run's change; that of the mean of n runs is 1 / sqrt(n) of it.
      arms: arm of each run, shape (n_runs,); None: each run is an arm of its own.
    """
    v = np.asarray(frequencies, dtype=float)
    names: list[object] = list(range(len(v))) if arms is None else list(arms)
    if len(names) != len(v):
        raise ValueError(f"arms must name the arm of each of {len(v)} runs, got {len(names)}")
    if not noise_floor > 0:
        raise ValueError(f"noise_floor must be > 0, got {noise_floor}")
    moved = np.zeros(len(v), dtype=bool)
    for arm in set(names):
        mine = np.array([name == arm for name in names])
        moved[mine] = abs((v[mine, -1] - v[mine, 0]).mean()) > 3 * noise_floor / math.sqrt(mine.sum())
    return moved


def extrapolate(frequencies: ArrayLike, n_outputs: float, round_index: int = 2) -> Floats:
    """Last round foretold at an early one: log odds grow on at the mean pace of rounds 0..round_index.

    Args:
      frequencies: shape (n_runs, n_rounds + 1); later rounds are not looked at.
      n_outputs: outputs behind each frequency, > 0; half an output is added to each side before log odds are taken.
      round_index: in 1..n_rounds - 1.

    Returns:
      Shape (n_runs,).
    """
    v = _early(frequencies, n_outputs, round_index)
    smooth = (v * n_outputs + 0.5) / (n_outputs + 1)
    odds = np.log(smooth / (1 - smooth))
    left = v.shape[1] - 1 - round_index
    ahead = odds[:, round_index] + (odds[:, round_index] - odds[:, 0]) / round_index * left
    return np.asarray(1 / (1 + np.exp(-ahead)))


def indicators(frequencies: ArrayLike, noise_floor: float, n_outputs: float, round_index: int = 2) -> dict[str, Bools]:
    """Early-warning indicators read off rounds 0..round_index; which runs each fires in.

    Thresholds are fixed beforehand, not fitted, so that the rate at which they fire in null runs says what they are
    worth:

        change           |v[k] - v[0]| > 3 noise floors
        variance         variance of v[0..k] > 3 times p (1 - p) / n_outputs, that of counting alone
        autocorrelation  sum of d[t] d[t+1] > half of (sum of d[t]**2 + sum of d[t+1]**2) / 2, d the changes by round

    Autocorrelation is of changes: with three points that of levels cannot exceed 0, whatever happened.

    Args:
      frequencies: shape (n_runs, n_rounds + 1), in [0, 1]; later rounds are not looked at.
      noise_floor, n_outputs, round_index: as `early_warning`; autocorrelation needs round_index >= 2 and is left out
        below.

    Returns:
      indicator -> shape (n_runs,).
    """
    v = _early(frequencies, n_outputs, round_index)[:, : round_index + 1]
    if not noise_floor > 0:
        raise ValueError(f"noise_floor must be > 0, got {noise_floor}")
    p = np.clip(v.mean(axis=1), 0.5 / n_outputs, 1 - 0.5 / n_outputs)
    steps = np.diff(v, axis=1)
    found = {
        "change": np.abs(v[:, -1] - v[:, 0]) > 3 * noise_floor,
        "variance": v.var(axis=1, ddof=1) > 3 * p * (1 - p) / n_outputs,
    }
    if round_index >= 2:
        before, after = steps[:, :-1], steps[:, 1:]
        found["autocorrelation"] = (before * after).sum(axis=1) > 0.25 * (before**2 + after**2).sum(axis=1)
    return found


def _early(frequencies: ArrayLike, n_outputs: float, round_index: int) -> Floats:
    v = _unit(frequencies, "frequencies")
    if v.ndim != 2:
        raise ValueError(f"frequencies must have shape (n_runs, n_rounds + 1), got {v.shape}")
    if not 1 <= round_index < v.shape[1] - 1:
        raise ValueError(f"round_index must be in 1..{v.shape[1] - 2}, got {round_index}")
    if not n_outputs > 0:
        raise ValueError(f"n_outputs must be > 0, got {n_outputs}")
    return v


@dataclass(frozen=True, slots=True)
class Rejections:
    """How often one test of neutrality rejects at 5% in one setting of `neutrality_study`."""

    test: str
    p_start: float
    real_share: float
    p_real: float
    s: float
    rejected: Interval


def neutrality_study(
    n_runs: int,
    *,
    rng: np.random.Generator,
    settings: Sequence[tuple[float, float]] = ((0.0, 0.3), (0.2, 0.3), (0.2, 0.1)),
    selections: Sequence[float] = (0.0, 0.1),
    p_start: float = 0.3,
    n_eff: int = 1000,
    n_outputs: int = 1000,
    n_rounds: int = 10,
    tests: Sequence[str] = TESTS,
) -> list[Rejections]:
    """Size and power of the tests of neutrality on simulated Wright-Fisher runs with mixing.

    Tests: `score` (that of `selection_coefficient`), `increment` and `increment_counted` (`frequency_increment_test` on
    true and on measured frequencies), `increment_uncorrected` (the same without the migration term) and `logistic`, a
    plain regression of counts on rounds, which takes drift for evidence and is here so that nobody brings it back.

    Args:
      n_runs: runs per cell, >= 1.
      rng: all draws.
      settings: pairs of real_share and p_real.
      selections: selection coefficients; 0 gives the size, others the power.
      p_start, n_eff, n_outputs, n_rounds: the runs simulated.
      tests: which of TESTS to run.

    Returns:
      A row per setting, selection and test.
    """
    rows = []
    for real_share, p_real in settings:
        for s in selections:
            p = np.full(n_runs, p_start)
            path = [p]
            for _ in range(n_rounds):
                selected = p * math.exp(s) / (p * math.exp(s) + 1 - p)
                p = np.clip(real_share * p_real + (1 - real_share) * rng.binomial(n_eff, selected) / n_eff, 0, 1)
                path.append(p)
            true = np.stack(path, axis=1)  # (n_runs, n_rounds + 1)
            measured = rng.binomial(n_outputs, true) / n_outputs
            outputs, mixing = np.full(n_rounds + 1, float(n_outputs)), np.full(n_rounds, real_share)
            quantile = float(-special.ndtri(0.025))

            def increments(frequencies: Floats, *mixing: float) -> list[bool]:
                return [frequency_increment_test(v, *mixing)[1] < 0.05 for v in frequencies]

            for test in tests:
                rejected: ArrayLike
                if test == "score":
                    zeros = np.zeros(n_runs)
                    rejected = np.abs(_score(measured, zeros, outputs, n_eff, mixing, p_real)) > quantile
                elif test == "increment":
                    rejected = increments(true, real_share, p_real)
                elif test == "increment_counted":
                    rejected = increments(measured, real_share, p_real)
                elif test == "increment_uncorrected":
                    rejected = increments(true)
                elif test == "logistic":
                    rejected = np.abs(_logistic_z(measured, n_outputs)) > quantile
                else:
                    raise ValueError(f"tests must be among {TESTS}, got {test!r}")
                hits = int(np.asarray(rejected).sum())
                rows.append(Rejections(test, p_start, real_share, p_real, s, wilson(hits, n_runs)))
    return rows


@dataclass(frozen=True, slots=True)
class Figure:
    """One size or power figure and what it must be.

    Attributes:
      what: size or power, in words.
      test: see `neutrality_study`.
      row: setting and rate of rejection.
      n_eff, n_rounds: of the simulated runs.
      must: the requirement, in words; empty where the figure is shown for comparison.
      holds: whether the rate meets it.
    """

    what: str
    test: str
    row: Rejections
    n_eff: int
    n_rounds: int
    must: str
    holds: bool


def neutrality_check(n_runs: int = 20_000, n_increment: int = 4_000, *, seed: int = 0) -> list[Figure]:
    """The figures that say which test of neutrality may be used, from fresh simulations; about ten seconds.

    The estimator's score test must keep a size of 4-6% and a power of 0.9 at s = 0.1, N_e = 1000, ten rounds; the
    increment test keeps its size on frequencies known exactly, and rejects less than it should on counted outputs;
    plain logistic regression rejects over 80% of neutral runs where outputs outnumber effective documents. There, at
    N_e = 200 over 20 rounds without mixing, the score test is at the edge of its range (5.8%), so five times the runs.
    Power elsewhere, for rarer and commoner personas and more real documents, is shown and not judged.

    Args:
      n_runs: simulated runs per figure of the score test and the regression; n_increment: of the slower increment test.
      seed: of all draws.
    """
    first, second, third, fourth = np.random.default_rng(seed).spawn(4)
    found = []

    def add(rows: Sequence[Rejections], n_eff: int, n_rounds: int, *, judged: bool = True) -> None:
        for row in rows:
            rate, what = row.rejected.value, "size" if row.s == 0 else "power"
            must, holds = "", True
            if not judged:
                pass
            elif row.test in ("score", "increment"):
                must = "0.04 to 0.06" if row.s == 0 else "at least 0.9"
                holds = 0.04 <= rate <= 0.06 if row.s == 0 else rate >= 0.9
            elif row.test == "increment_counted" and row.s == 0:
                must, holds = "below 0.04: conservative", rate < 0.04
            elif row.test == "logistic":
                must, holds = "above 0.8: unusable", rate > 0.8
            found.append(Figure(what, row.test, row, n_eff, n_rounds, must, holds))

    add(neutrality_study(n_runs, rng=first, tests=("score",)), 1000, 10)
    for p in RANGE:
        settings = tuple((share, p) for share in (0.2, 0.4, 0.6))
        shown = neutrality_study(n_runs, rng=fourth, settings=settings, selections=(0.1,), p_start=p, tests=("score",))
        add(shown, 1000, 10, judged=False)
    add(neutrality_study(n_increment, rng=second, tests=("increment", "increment_counted")), 1000, 10)
    few = {"n_eff": 200, "n_rounds": 20, "selections": (0.0,), "settings": ((0.0, 0.3), (0.2, 0.1))}
    add(neutrality_study(5 * n_runs, rng=third, tests=("score", "logistic"), **few), 200, 20)  # type: ignore[arg-type]
    return found


def _logistic_z(measured: Floats, n_outputs: float) -> Floats:
    """Wald z of the slope of log odds on rounds, binomial errors only; measured is (n_runs, n_rounds + 1)."""
    time = np.arange(measured.shape[1]) - (measured.shape[1] - 1) / 2
    start = np.clip(measured.mean(axis=1), 1e-3, 1 - 1e-3)
    level, slope = np.log(start / (1 - start)), np.zeros(len(measured))
    for _ in range(25):  # Newton; the likelihood is concave
        fitted = 1 / (1 + np.exp(-np.clip(level[:, None] + slope[:, None] * time, -30, 30)))
        weight = np.maximum(n_outputs * fitted * (1 - fitted), 1e-9)
        residual = n_outputs * (measured - fitted)
        a, b, c = weight.sum(axis=1), weight @ time, weight @ time**2
        g, h = residual.sum(axis=1), residual @ time
        level = level + (c * g - b * h) / (a * c - b * b)
        slope = slope + (a * h - b * g) / (a * c - b * b)
    return np.asarray(slope * np.sqrt((a * c - b * b) / a), dtype=float)


def _trajectory(
    frequencies: ArrayLike, n_outputs: ArrayLike, real_share: ArrayLike, p_real: float | None
) -> tuple[Floats, Floats, Floats, float]:
    """Checks one run and returns frequencies and outputs, (n_rounds + 1,), real shares, (n_rounds,), and p_real."""
    v = np.atleast_1d(np.asarray(frequencies, dtype=float))
    if v.ndim != 1:
        raise ValueError(f"frequencies must have shape (n_rounds + 1,), got {v.shape}")
    n_rounds = max(len(v) - 1, 0)
    n, mixing = np.asarray(n_outputs, dtype=float), np.asarray(real_share, dtype=float)
    for name, array, length in (("n_outputs", n, len(v)), ("real_share", mixing, n_rounds)):
        if array.shape not in ((), (length,)):
            raise ValueError(f"{name} must be a number or have shape ({length},), got shape {array.shape}")
    if not np.all(n >= 0):
        raise ValueError(f"n_outputs must be >= 0, got {n.min()}")
    n = np.broadcast_to(n, v.shape)
    _unit(v[n > 0], "frequencies")  # a round without outputs has no frequency
    if not np.all((mixing >= 0) & (mixing < 1)):
        raise ValueError(
            f"real_share must be in [0, 1), got {mixing.max()}; with only real documents nothing is inherited"
        )
    if p_real is None and np.any(mixing > 0):
        raise ValueError(f"p_real must be given where real_share is {mixing.max()}, got None")
    of_real = np.asarray(0.0 if p_real is None else p_real, dtype=float)
    if of_real.ndim:
        raise ValueError(f"p_real must be one number, the persona's share of real documents, got {of_real}")
    source = float(_unit(of_real, "p_real"))
    return v, n, np.broadcast_to(mixing, (n_rounds,)), source


def _unit(values: ArrayLike, name: str) -> Floats:
    v = np.asarray(values, dtype=float)
    outside = v[~((v >= 0) & (v <= 1))]
    if outside.size:
        raise ValueError(f"{name} must be in [0, 1], got {outside.flat[0]}")
    return v


def _simplex(values: ArrayLike, name: str) -> Floats:
    v = np.asarray(values, dtype=float)
    if v.ndim != 1 or not np.all(v >= 0) or not math.isclose(float(v.sum()), 1, abs_tol=1e-9):
        raise ValueError(f"{name} must be shares >= 0 that sum to 1, got {v}")
    return v
