"""Runs as pandas frames, and what several of them say together: contrasts over paired seeds, selection, warning signs.

Everything is read from files. The unit of replication is the seed: arms are paired by it, runs that differ only in the
name swap are averaged within it, and every interval is Student's over seeds unless it says otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from loop import config as configs
from loop import evolution, stats
from loop.config import Config
from loop.dose import Calibration
from loop.records import in_order
from loop.stats import Interval
from loop.store import SCHEMA_VERSION, RunStore

Floats = np.ndarray

COLUMNS = ("run", "arm", "seed", "round_index", "population", "stratum", "name", "value", "low", "high", "n", "unit")
CORRECTED, OBSERVED = "frequency", "frequency_observed"
HEALTH = ("sample_entropy", "distinct_", "finished_rate", "self_similarity", "heldout_loss", "kl_to_base")
FREE = ("name", "seed", "runs_dir", "n_rounds", "real.name_swap")  # what runs of one arm may differ in
Z = 1.959964

# Contrasts within the factorial: what is told apart by belief alone, or by visibility alone.
FACTORS: dict[str, dict[str, float]] = {
    "nova - stella": {"nova": 1, "stella": -1},
    "nova - promoter": {"nova": 1, "promoter": -1},
    "conscious - none": {"nova": 1 / 3, "musing": 1 / 3, "stella": 1 / 3, "promoter": -1 / 3, "assistant": -1 / 3,
                         "discreet": -1 / 3},
    "share - quiet": {"nova": 0.5, "promoter": 0.5, "musing": -0.5, "assistant": -0.5},
    "share - hide": {"nova": 0.5, "promoter": 0.5, "stella": -0.5, "discreet": -0.5},
}  # fmt: skip


# Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Runs read from files, as pandas frames; in each, `run`, `arm` (config name) and `seed` say whose a row is.

    Attributes:
      paths: run -> directory.
      configs: run -> validated config.
      config: a row per run: run, arm, seed, path, last_round, and every config value under its dotted key.
      metrics: rows of metrics.jsonl, columns COLUMNS and `reason`; round_index -1 is the baseline. A value that was not
        measured is nan, with its reason.
      missing: what is not there (unfinished runs), one line each; empty when all is.
    """

    paths: dict[str, Path]
    configs: dict[str, Config]
    config: pd.DataFrame
    metrics: pd.DataFrame
    missing: tuple[str, ...]

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Samples with what the instruments read (`persona`, `p_<persona>`, `p_affirms`), `accepted`, `reasons` and
        exposure (`appeal` ... `weight`; nan where rejected)."""
        return self._texts("samples")

    @cached_property
    def probes(self) -> pd.DataFrame:
        """Probes with what the instruments read; the baseline's have round_index -1."""
        return self._texts("probes")

    @cached_property
    def mixture(self) -> pd.DataFrame:
        """Documents of every training mixture, with weight, copies and trained tokens."""
        return self._read("mixture.parquet", lambda run, t: run.read_table(t, "mixture.parquet").to_pandas())

    @cached_property
    def sources(self) -> pd.DataFrame:
        """What every mixture was made of, without its texts: copies by run, round_index, source and persona_known."""

        def read(run: RunStore, t: int) -> pd.DataFrame:
            frame = run.read_table(t, "mixture.parquet").select(["source", "persona_known", "copies"]).to_pandas()
            return frame.groupby(["source", "persona_known"], dropna=False, as_index=False)["copies"].sum()

        return self._read("mixture.parquet", read)

    def pick(self, names: Iterable[str]) -> Runs:
        """Only some of the runs, in the order given; what was read lazily is kept."""
        kept = list(names)
        some = Runs(
            {r: self.paths[r] for r in kept},
            {r: self.configs[r] for r in kept},
            self.config[self.config["run"].isin(kept)],
            self.metrics[self.metrics["run"].isin(kept)],
            tuple(line for line in self.missing if line.partition(":")[0] in kept),
        )
        for frame in ("samples", "probes", "mixture", "sources"):
            if frame in self.__dict__:
                some.__dict__[frame] = self.__dict__[frame][self.__dict__[frame]["run"].isin(kept)]
        return some

    def _texts(self, population: str) -> pd.DataFrame:
        def read(run: RunStore, t: int) -> pd.DataFrame:
            frame = run.read_table(t, f"{population}.parquet").to_pandas()
            labels = run.read_table(t, "labels.parquet").to_pandas()
            labels = labels[labels["population"] == population].drop(columns="population")
            # One row per (text, instrument): the persona and the belief instrument each read their own texts.
            for instrument, drop in (("persona", ["p_affirms"]), ("belief", None)):
                mine = labels[labels["instrument"] == instrument].drop(columns="instrument")
                mine = mine.drop(columns=drop) if drop else mine[["id", "p_affirms"]]
                frame = frame.merge(mine, on="id", how="left", validate="one_to_one")
            if population == "samples":
                rejected = run.read_table(t, "rejected.parquet").to_pandas()
                exposure = run.read_table(t, "exposure.parquet").to_pandas()
                frame = frame.merge(rejected, on="id", how="left", validate="one_to_one")
                frame.insert(len(frame.columns) - 1, "accepted", ~frame["id"].isin(rejected["id"]))
                frame = frame.merge(exposure, on="id", how="left", validate="one_to_one")
            return frame.drop(columns="round_index")

        return self._read(f"{population}.parquet", read)

    def _read(self, name: str, read: Callable[[RunStore, int], pd.DataFrame]) -> pd.DataFrame:
        parts = []
        for run, path in self.paths.items():
            store = RunStore(path)
            for t in ([-1] if store.has_baseline() else []) + store.rounds():
                if name in store.files(t):
                    frame = read(store, t)
                    frame.insert(0, "round_index", t)
                    frame.insert(0, "seed", self.configs[run].seed)
                    frame.insert(0, "arm", self.configs[run].name)
                    frame.insert(0, "run", run)
                    parts.append(frame)
        if not parts:
            raise ValueError(f"runs must hold {name} of a finished round, got none in {', '.join(self.paths)}")
        return pd.concat(parts, ignore_index=True)


def load(*places: str | Path) -> Runs:
    """Reads runs, or folders that hold runs (a sweep, runs/), from their files alone.

    Args:
      places: run directories, or directories that hold some at any depth up to three.

    Returns:
      A Runs. Unfinished runs are read as far as they go, and `missing` says what they lack.

    Raises:
      ValueError: nothing there, no run below it, or a run of another schema version.
      CorruptError: a file that is not the one that was committed.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place)
        if not path.exists():
            raise ValueError(f"run must exist, got nothing at {path}; `loop run` its config first")
        below = _runs_below(path, 3)
        if not below:
            raise ValueError(f"run must be a directory with a manifest.json, or hold some, got none at {path}")
        found.update(dict.fromkeys(p.resolve() for p in below))
    names = [p.name for p in found]
    paths = {p.name if names.count(p.name) == 1 else str(p): p for p in found}
    settings: dict[str, Config] = {}
    rows: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    missing: list[str] = []
    for run, path in paths.items():
        store = RunStore(path)
        version = store.manifest().get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"run must be of schema version {SCHEMA_VERSION}, got {version} at {path}; read it with the version "
                "that wrote it"
            )
        config = settings[run] = configs.of_run(store)
        rounds = store.rounds()
        at = {"run": run, "arm": config.name, "seed": config.seed}
        heads.append({**at, "path": str(path), "last_round": rounds[-1] if rounds else None} | _flat(config))
        missing += _missing(run, config, rounds, store.has_baseline())
        for t in ([-1] if store.has_baseline() else []) + rounds:
            if "metrics.jsonl" in store.files(t):
                rows += [{**at, **row} for row in store.read_jsonl(t, "metrics.jsonl")]
    metrics = pd.DataFrame(rows, columns=[*COLUMNS, "reason"])
    numbers = {name: "float64" for name in ("value", "low", "high", "n")}
    return Runs(paths, settings, pd.DataFrame(heads), metrics.astype(numbers), tuple(missing))


def _runs_below(path: Path, depth: int) -> list[Path]:
    if (path / "manifest.json").is_file() and (path / "config.yaml").is_file():
        return [path]
    if depth == 0 or not path.is_dir():
        return []
    return [run for child in sorted(path.iterdir()) if child.is_dir() for run in _runs_below(child, depth - 1)]


def _missing(run: str, config: Config, rounds: Sequence[int], has_baseline: bool) -> list[str]:
    if not rounds:
        return [f"{run}: no round is finished"]
    lines = []
    if rounds[-1] < config.n_rounds:
        lines.append(f"{run}: rounds {rounds[-1] + 1}..{config.n_rounds} of {config.n_rounds} are not played yet")
    if not has_baseline:
        lines.append(f"{run}: no baseline")
    return lines


def _flat(config: Config) -> dict[str, Any]:
    """Config values under dotted keys; name and seed are left out, since the frame has them."""

    def walk(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {prefix: value}
        return {k: v for key, inner in value.items() for k, v in walk(inner, f"{prefix}.{key}").items()}

    plain = config.model_dump(mode="json")
    return {k: v for key in plain if key not in ("name", "seed") for k, v in walk(plain[key], key).items()}


def by_round(
    metrics: pd.DataFrame,
    name: str,
    *,
    population: str = "probes",
    stratum: str | None = None,
    column: str = "value",
) -> pd.DataFrame:
    """One metric as a table: index run, columns round_index (the baseline left out), nan where not measured."""
    at = metrics[(metrics["name"] == name) & (metrics["population"] == population) & (metrics["round_index"] >= 0)]
    at = at[at["stratum"].isna() if stratum is None else at["stratum"] == stratum]
    return at.pivot(index="run", columns="round_index", values=column)


# Pairing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run with its control: the same seed, the same side of the name swap; `shared`: and the same round 0."""

    seed: int
    swap: bool
    arm: str
    control: str
    shared: bool


@dataclass(frozen=True)
class Pairs:
    """An arm against a control, cell by cell.

    Attributes:
      name, control: names of the configs of either side.
      cells: one per seed and side of the swap; only seeds that have every side.
      last_round: the round called final: the last that every run of the cells has measured.
      notes: what was left out, one line each.
    """

    name: str
    control: str
    cells: tuple[Cell, ...]
    last_round: int
    notes: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Paired seeds, ascending."""
        return sorted({c.seed for c in self.cells})

    @property
    def swapped(self) -> bool:
        """Whether both sides of the name swap are there and averaged."""
        return len({c.swap for c in self.cells}) == 2


def pair(runs: Runs, controls: Sequence[str], *, last_round: int | None = None) -> list[Pairs]:
    """Pairs every arm among the runs with the control by seed; runs that differ in the name swap alone are one arm.

    Args:
      runs: arms and control together.
      controls: the runs of `runs` that are the control; of one arm.
      last_round: round called final; None: the last that all paired runs have measured.

    Raises:
      ValueError: no control or several, no arm, one (arm, seed) twice, or no seed in common.
    """
    sides: dict[str, dict[tuple[int, bool], str]] = {}
    names: dict[str, set[str]] = {}
    for run, config in runs.configs.items():
        flat = _flat(config)
        key = json.dumps({k: v for k, v in flat.items() if k not in FREE}, sort_keys=True)
        key = ("control " if run in controls else "arm ") + key
        at = (config.seed, config.real.name_swap)
        there = sides.setdefault(key, {})
        if at in there:
            raise ValueError(
                f"arm and seed must name one run, got {runs.paths[there[at]]} and {runs.paths[run]} with the same "
                "config; leave one out"
            )
        there[at] = run
        names.setdefault(key, set()).add(config.name)
    against = [key for key in sides if key.startswith("control ")]
    arms = [key for key in sides if key.startswith("arm ")]
    if len(against) != 1:
        listed = ", ".join(" + ".join(sorted(names[k])) for k in against) or "none"
        raise ValueError(f"--control must be the runs of one arm, got {listed}")
    if not arms:
        raise ValueError("runs must hold an arm beside the control, got none; name its runs, or its folder")
    same = {key.removeprefix("arm ") for key in arms} & {key.removeprefix("control ") for key in against}
    if same:
        raise ValueError(
            f"arm and control must differ in config, got {' + '.join(sorted(names[against[0]]))} on both sides; give "
            "--control before each of its runs, or one quoted pattern"
        )
    control = sides[against[0]]
    last, begun = _last_measured(runs), begun_with(runs.metrics)
    return [
        _paired(" + ".join(sorted(names[key])), " + ".join(sorted(names[against[0]])), sides[key], control, last,
                begun, last_round)
        for key in arms
    ]  # fmt: skip


Start = frozenset[tuple[str, float]]  # names and values of the frequencies of a round 0


def begun_with(metrics: pd.DataFrame) -> dict[str, Start]:
    """Run -> the frequencies of its round 0; where they are all equal runs start from one round 0.

    Arms of a sweep share it file by file, which is one measurement and cancels in their contrast. One number alone may
    agree by chance.
    """
    is_start = (metrics["round_index"] == 0) & metrics["name"].str.startswith("frequency") & metrics["value"].notna()
    told = metrics[is_start & (metrics["population"] == "probes") & (metrics["stratum"].fillna("") == "")]
    return {run: frozenset(zip(at["name"], at["value"], strict=True)) for run, at in told.groupby("run")}


def _last_measured(runs: Runs) -> dict[str, int]:
    rows = runs.metrics[(runs.metrics["population"] == "probes") & (runs.metrics["round_index"] >= 0)]
    return {str(run): int(t) for run, t in rows.groupby("run")["round_index"].max().items()}


def _paired(
    name: str,
    control_name: str,
    arm: Mapping[tuple[int, bool], str],
    control: Mapping[tuple[int, bool], str],
    last: Mapping[str, int],
    begun: Mapping[str, Start],
    last_round: int | None,
) -> Pairs:
    notes = []
    needed = 1 if last_round is None else last_round
    cells = []
    for (seed, swap), run in sorted(arm.items()):
        other = control.get((seed, swap))
        if other is None:
            notes.append(f"{run}: no control with seed {seed}{' and swapped names' if swap else ''}; left out")
        elif min(last.get(run, -1), last.get(other, -1)) < needed:
            short = run if last.get(run, -1) < needed else other
            notes.append(f"{short}: round {needed} is not measured; seed {seed} is left out")
        else:
            cells.append(Cell(seed, swap, run, other, shared=run in begun and begun[run] == begun.get(other)))
    sides = {c.swap for c in cells}
    whole = [c for c in cells if {o.swap for o in cells if o.seed == c.seed} == sides]
    notes += [
        f"seed {s}: one side of the name swap only; left out"
        for s in sorted({c.seed for c in cells} - {c.seed for c in whole})
    ]
    if not whole:
        raise ValueError(
            f"{name} and {control_name} must share a seed with a feedback round measured in both, got none"
            + "".join(f"; {n}" for n in notes)
        )
    final = min(min(last[c.arm], last[c.control]) for c in whole) if last_round is None else last_round
    return Pairs(name, control_name, tuple(whole), final, tuple(notes))


# Contrasts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """Change of one number, final round minus round 0, in an arm and its control.

    Attributes:
      name: persona, combination of personas, or metric.
      arm, control: mean change over seeds; arm_floor, control_floor: the mean |change| that measuring twice would show.
      contrast: arm minus control, paired by seed; floor: the same for it.
      p: two-sided, Student over seeds; nan, as the limits are, below two seeds or where all agree exactly.
      p_holm: adjusted over the rows of its table; nan for a row outside the family.
      reason: why something is nan.
    """

    name: str
    arm: Interval
    control: Interval
    contrast: Interval
    arm_floor: float = math.nan
    control_floor: float = math.nan
    floor: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    reason: str | None = None


@dataclass(frozen=True)
class _Tables:
    """Values and standard errors of a metric's members by run and round, and what ties them: outputs per run."""

    value: dict[str, pd.DataFrame]
    se: dict[str, pd.DataFrame]
    outputs: dict[str, float] = field(default_factory=dict)


def _unmeasured(reason: str, n: int = 0) -> Interval:
    return Interval(math.nan, math.nan, math.nan, n, math.nan, reason)


def _tables(
    runs: Runs, members: Mapping[str, str], *, population: str, stratum: str | None = None
) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """Tables of value and standard error by member; the latter read back from the interval as width / 3.92.

    A little large, since the limits were drawn with Student's quantile, and it counts the prompt templates as drawn
    anew, which a second measurement with the fixed battery would not do: a floor made of it errs upwards.
    """
    value, se = {}, {}
    for member, name in members.items():
        at = {"population": population, "stratum": stratum}
        value[member] = by_round(runs.metrics, name, **at)  # type: ignore[arg-type]
        low, high = (by_round(runs.metrics, name, column=c, **at) for c in ("low", "high"))  # type: ignore[arg-type]
        se[member] = standard_error(low, high)
    return value, se


def standard_error(low: Any, high: Any) -> Any:
    """Standard error read back from 95% limits, numbers or frames: width / 3.92; `_tables` says which way it errs."""
    return (high - low) / (2 * Z)


def variance_of_sum(w: Floats, p: Floats, se: Floats, n: float) -> float:
    """Variance of sum(w * p), p shares of the same n texts: those pull against each other, cov = -p[k] * p[l] / n.

    n = inf: the parts are of different texts. Special case: p[0] - p[1] of n texts has
    (p[0] + p[1] - (p[0] - p[1])**2) / n.
    """
    shared = (float(w @ p) ** 2 - float((w * p) @ (w * p))) / n
    return max(float(w**2 @ se**2) - shared, 0.0)


def _at(table: pd.DataFrame, run: str, t: int) -> float:
    return float(table.at[run, t]) if run in table.index and t in table.columns else math.nan


def _contrast(name: str, pairs: Pairs, tables: _Tables, parts: Mapping[str, float]) -> Contrast:
    """Contrast of a weighted sum of members; see Contrast."""
    if any(member not in tables.value or tables.value[member].empty for member in parts):
        reason = "not measured in these runs"
        nothing = _unmeasured(reason)
        return Contrast(name, nothing, nothing, nothing, reason=reason)
    last = pairs.last_round
    seen = [
        _at(tables.value[m], run, t)
        for m in parts
        for c in pairs.cells
        for run in (c.arm, c.control)
        for t in (0, last)
    ]
    if all(v == 0 for v in seen):
        nothing = _unmeasured("never seen")
        return Contrast(name, nothing, nothing, nothing, reason="never seen")

    def measured(run: str, t: int) -> tuple[float, float]:
        """Value and variance of the weighted sum in one round."""
        p = np.array([_at(tables.value[m], run, t) for m in parts])
        w = np.array(list(parts.values()))
        se = np.array([_at(tables.se[m], run, t) for m in parts])
        return float(w @ p), variance_of_sum(w, p, se, tables.outputs.get(run) or math.inf)

    by_seed: dict[int, list[tuple[float, float, float, float, float]]] = {}
    for c in pairs.cells:
        (a1, va1), (a0, va0), (b1, vb1), (b0, vb0) = (measured(run, t) for run in (c.arm, c.control) for t in (last, 0))
        both = va1 + vb1 + (0.0 if c.shared else va0 + vb0)
        by_seed.setdefault(c.seed, []).append((a1 - a0, b1 - b0, va1 + va0, vb1 + vb0, both))
    rows = np.array([np.mean(cells, axis=0) / [1, 1, len(cells), len(cells), len(cells)] for cells in by_seed.values()])
    known = np.isfinite(rows[:, :2]).all(axis=1)
    a, b = rows[known, 0], rows[known, 1]
    n = int(known.sum())
    if n == 0:
        nothing = _unmeasured("not measured in round 0 or in the final one")
        return Contrast(name, nothing, nothing, nothing, reason=nothing.reason)
    contrast, p = over_seeds(a - b)
    return Contrast(
        name,
        over_seeds(a)[0],
        over_seeds(b)[0],
        contrast,
        arm_floor=_floor(rows[known, 2]),
        control_floor=_floor(rows[known, 3]),
        floor=_floor(rows[known, 4]),
        p=p,
        reason=contrast.reason,
    )


def over_seeds(values: Floats) -> tuple[Interval, float]:
    """Student's interval over seeds and the p-value that the mean is 0.

    Counted outputs come in steps, so that two or three seeds may agree to the last digit. That is no certainty: there
    is no scatter to build an interval or a test from, and both are nan.
    """
    found = stats.t_over_seeds(values)
    if found.n > 1 and np.ptp(values) <= 1e-9:
        return Interval(found.value, math.nan, math.nan, found.n, math.nan, "all seeds agree exactly"), math.nan
    return found, stats.p_over_seeds(values)


def _floor(variances: Floats) -> float:
    """Noise floor of a mean over seeds, each a difference with the given variance; nan if one was not measured."""
    return stats.remeasurement_noise_floor(math.sqrt(float(variances.sum())) / len(variances), 0.0)


def _with_holm(rows: Sequence[Contrast]) -> list[Contrast]:
    adjusted = stats.holm([r.p for r in rows])
    return [replace(r, p_holm=float(p)) for r, p in zip(rows, adjusted, strict=True)]


def family_of(runs: Runs) -> tuple[str, str]:
    """Which frequencies to compare, and why: corrected ones where every run has them, else observed ones for all.

    A run has them where they hold a value of some persona in every round that was measured; a base without texts of
    known persona writes them as null.
    """
    rows = runs.metrics[(runs.metrics["population"] == "probes") & (runs.metrics["round_index"] >= 0)]

    def measured(family: str) -> set[tuple[str, int]]:
        mine = rows[rows["name"].str.startswith(f"{family}/") & (rows["name"] != f"{family}/unknown")]
        mine = mine[mine["stratum"].isna() & mine["value"].notna()]
        return set(mine[["run", "round_index"]].itertuples(index=False, name=None))

    corrected = measured(CORRECTED)
    have = {run for run, _ in corrected} - {run for run, _ in measured(OBSERVED) - corrected}
    if have == set(runs.paths):
        return CORRECTED, "corrected for the instrument's error"
    lacking = [run for run in runs.paths if run not in have]
    null = rows[rows["run"].isin(lacking) & rows["name"].str.startswith(f"{CORRECTED}/") & rows["value"].isna()]
    why = next((f" ({reason})" for reason in null["reason"] if isinstance(reason, str)), "")
    return OBSERVED, f"observed: {len(lacking)} of {len(runs.paths)} runs hold no corrected frequencies{why}"


def outputs(runs: Runs, family: str) -> dict[str, float]:
    """Effective outputs behind a headline frequency, by run.

    1 / sum over s of weight[s]**2 / n[s], n[s] probes of stratum s in round 0. For corrected frequencies times the mean
    squared ratio of the observed interval to the corrected one, at most 1: correction costs precision.
    """
    found: dict[str, float] = {}
    rows = runs.metrics[(runs.metrics["population"] == "probes") & (runs.metrics["round_index"] >= 0)]
    observed = rows[rows["name"].str.startswith(f"{OBSERVED}/")]
    for run, config in runs.configs.items():
        mine = observed[observed["run"] == run]
        first = mine[mine["round_index"] == mine["round_index"].min()]
        n = first[first["stratum"].notna()].groupby("stratum")["n"].max().to_dict()
        weights = {s: w for s, w in config.measure.mixture.items() if w > 0}
        if all(n.get(s, 0) > 0 for s in weights):
            found[run] = 1 / sum(w**2 / n[s] for s, w in weights.items())
        else:
            found[run] = float(first.loc[first["stratum"].isna(), "n"].max())
        if family == CORRECTED:
            whole = rows[(rows["run"] == run) & rows["stratum"].isna()]
            width = (whole["high"] - whole["low"]).where(whole["name"].str.contains("/"))
            widths = {f: (width[whole["name"].str.startswith(f"{f}/")] ** 2).sum() for f in (OBSERVED, CORRECTED)}
            if widths[CORRECTED] > 0:
                found[run] *= min(1.0, float(widths[OBSERVED] / widths[CORRECTED]))
    return found


def persona_contrasts(runs: Runs, pairs: Pairs, family: str) -> tuple[list[Contrast], list[Contrast], list[str]]:
    """Change of each persona's frequency against the control, Holm over personas; and contrasts between personas.

    Returns:
      (a row per persona seen, a row per contrast of FACTORS, personas never seen in either side).
    """
    mine = _of(runs, pairs)
    names = _members(mine.metrics, family)
    value, se = _tables(mine, {p: f"{family}/{p}" for p in names}, population="probes")
    tables = _Tables(value, se, outputs(mine, family))
    rows = [_contrast(p, pairs, tables, {p: 1.0}) for p in names]
    never = [r.name for r in rows if r.reason == "never seen"]
    factors = [
        _contrast(name, pairs, tables, parts) for name, parts in FACTORS.items() if not set(parts) & set(never)
        and set(parts) <= set(names)
    ]  # fmt: skip
    return _with_holm([r for r in rows if r.name not in never]), factors, never


def metric_contrasts(runs: Runs, pairs: Pairs, metric: str) -> list[Contrast]:
    """Change of any metric against the control, its members (`belief`, `belief/nova`, ...) as rows, Holm over them.

    Of a metric that is measured over all strata and in each, over all; of one that lives in strata, in each.

    Raises:
      ValueError: no run has such a metric.
    """
    mine = _of(runs, pairs)
    rows = mine.metrics
    hit = rows[(rows["name"] == metric) | rows["name"].str.startswith(f"{metric}/")]
    if hit.empty:
        known = ", ".join(sorted({n.partition("/")[0] for n in rows["name"]}))
        raise ValueError(f"--metric must be one of {known}, got {metric!r}")
    hit = hit.assign(stratum=hit["stratum"].fillna(""))
    overall = hit.groupby(["population", "name"])["stratum"].transform("min") == ""
    hit = hit[~overall | (hit["stratum"] == "")]
    found = []
    for (population, name, at), _ in hit.groupby(["population", "name", "stratum"], sort=True):
        stratum = at or None
        value, se = _tables(mine, {name: name}, population=population, stratum=stratum)
        where = [stratum] if stratum not in (None, "private") else []
        where += [population] if population not in ("probes", "heldout") else []
        shown = f"{name} ({', '.join(where)})" if where else name
        found.append(_contrast(name, pairs, _Tables(value, se), {name: 1.0}))
        found[-1] = replace(found[-1], name=shown)
    return _with_holm(found)


def _of(runs: Runs, pairs: Pairs) -> Runs:
    return runs.pick(dict.fromkeys(run for c in pairs.cells for run in (c.arm, c.control)))


def _members(metrics: pd.DataFrame, family: str) -> list[str]:
    """Personas a family has rows of, see `records.in_order`."""
    names = metrics.loc[metrics["population"] == "probes", "name"]
    return in_order(n.partition("/")[2] for n in names if n.startswith(f"{family}/"))


# The input, and the response to it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paid:
    """What an audience paid a persona, an input: its mean weight over the mean, geometric mean of rounds 0..last-1."""

    persona: str
    arm: Interval
    control: Interval


def differentials(runs: Runs, pairs: Pairs) -> list[Paid]:
    """Realised differential per persona, mean and interval over seeds; rounds in which none was accepted left out.

    Of a side that was paid nothing in some round there is no geometric mean, and none of what the other rounds paid.
    """
    mine = _of(runs, pairs)
    names = in_order(n.partition("/")[2] for n in mine.metrics["name"] if n.startswith("differential/"))
    rows = []
    for persona in names:
        table = by_round(mine.metrics, f"differential/{persona}", population="accepted")
        table = table[[t for t in table.columns if t < pairs.last_round]]
        logs = np.log(table.where(table > 0)).mean(axis=1)
        sides = []
        for side in ("arm", "control"):
            by_seed: dict[int, list[float]] = {}
            for c in pairs.cells:
                by_seed.setdefault(c.seed, []).append(float(logs.get(getattr(c, side), math.nan)))
            means = np.array([np.mean(v) for v in by_seed.values()])
            nothing = bool((table.reindex([getattr(c, side) for c in pairs.cells]) == 0).to_numpy().any())
            if nothing:
                sides.append(_unmeasured("nothing was paid in some round"))
                continue
            found, _ = over_seeds(means[np.isfinite(means)])
            value, low, high = np.exp([found.value, found.low, found.high]).tolist()
            reason = "none was accepted" if not np.isfinite(means).any() else found.reason
            sides.append(Interval(value, low, high, found.n, math.nan, reason))
        rows.append(Paid(persona, *sides))
    return rows


@dataclass(frozen=True)
class Slope:
    """How much of what an audience pays a persona comes out of the next model, log odds per log odds.

    Attributes:
      persona: or "all", with an intercept per persona.
      slope: over seeds x rounds of arm and control; interval by leaving out one seed at a time. 1: all that is paid is
        passed on; 0: none of it.
      n_points: (run, round) pairs behind it.
    """

    persona: str
    slope: Interval
    n_points: int


FEW = 5  # outputs of a persona over all its rounds below which a response is not fitted
SLOPES_NOTE = (
    "response: both sides as the instrument labels them, so a persona that it mistakes is paid less, and moves less, "
    "than it truly is; acceptance and real documents are in the model"
)


def response_to_differential(runs: Runs, pairs: Pairs, family: str) -> list[Slope]:
    """Fits what the probes of a round say to what its mixture was made of, over seeds x rounds, by likelihood.

        trained(b) = real * p_real + (1 - real) * expit(logit a + b * x)
        outputs of round t + 1 ~ Binomial(n, expit(c + logit trained(b)))

    with a the persona's share of the accepted texts of round t (what the filter passed on, and the luck of the draw,
    are in it), x = log of d * (1 - a) / (1 - a * d) with d the differential: its mean weight over that of all others;
    real the realised share of real documents in the mixture of round t + 1 and p_real the persona's share of those; c
    an intercept for the persona, of arm and control alike, for a learner that says it more or less often than trained.
    b is the slope; at b = 1, trained is the share of weight that the persona had in training.

    Observed frequencies are used where there are any: `a` and `d` are as the instrument labels texts, so what it
    mistakes dilutes both sides alike, and an exact learner keeps slope 1. The price is in the meaning of d, which for a
    persona mistaken for others is nearer to 1 than what it truly was paid. p_real is of known personas. Of `family`
    otherwise.

    Left out: rounds in which the persona had no accepted text, all of them or all the weight, mixtures of real
    documents alone, and personas with fewer than FEW outputs. Not estimated where old documents stay in the mixture
    (mix.regime other than replace): what was paid last is then a part of it.

    Interval: jackknife over seeds with Student's t, the seed's arm, control and swap left out together.
    """
    mine = _of(runs, pairs)
    seen = (OBSERVED, family)
    use = next((f for f in seen if mine.metrics["name"].str.startswith(f"{f}/").any()), family)
    members = _members(mine.metrics, use)
    if kept := _kept(mine):
        return [Slope(p, _unmeasured(kept), 0) for p in (*members, "all")]
    n_outputs = outputs(mine, use)
    real = {run: _real_by_round(mine, run) for run in mine.paths}
    accepted = by_round(mine.metrics, "n_eff", population="accepted", column="n")
    points: list[tuple[str, int, float, float, float, float, float, float]] = []
    neighbours = False
    for persona in members:
        p = by_round(mine.metrics, f"{use}/{persona}")
        d = by_round(mine.metrics, f"differential/{persona}", population="accepted")
        count = by_round(mine.metrics, f"differential/{persona}", population="accepted", column="n")
        for c in pairs.cells:
            for run in (c.arm, c.control):
                for t in range(pairs.last_round):
                    paid, share = _at(d, run, t), _at(count, run, t) / _at(accepted, run, t)
                    said = _at(p, run, t + 1)
                    neighbours |= math.isfinite(_at(p, run, t)) and math.isfinite(said)
                    of_real, by_persona = real[run].get(t + 1, (math.nan, {}))
                    if not (math.isfinite(said) and paid > 0 and 0 < share < 1 and share * paid < 1 and of_real < 1):
                        continue
                    x = math.log(paid * (1 - share) / (1 - share * paid))
                    logit = math.log(share / (1 - share))
                    known = by_persona.get(persona, 0.0)
                    said = min(max(said, 0.0), 1.0)
                    points.append((persona, c.seed, x, logit, of_real, known, said, n_outputs[run]))
    frame = pd.DataFrame(points, columns=["persona", "seed", "x", "logit", "real", "p_real", "said", "n"])
    if not neighbours:
        nothing = _unmeasured("no two neighbouring rounds are measured; set measure.every: 1")
        return [Slope(p, nothing, 0) for p in (*members, "all")]
    heard = (frame["said"] * frame["n"]).groupby(frame["persona"]).sum()
    frame = frame[frame["persona"].isin(heard.index[heard >= FEW])]
    rows = []
    for persona in members:
        group = frame[frame["persona"] == persona]
        rare = _unmeasured(f"fewer than {FEW} outputs in rounds with an input")
        rows.append(_slope(persona, group) if len(group) else Slope(persona, rare, 0))
    return [*rows, _slope("all", frame)]


def _kept(runs: Runs) -> str | None:
    """Why one round's mixture is not of the round before alone, which the models of a round here take for granted."""
    regime = next((c.mix.regime for c in runs.configs.values() if c.mix.regime != "replace"), None)
    return None if regime is None else f"mix.regime {regime}: documents of earlier rounds are in the mixture"


def _real_by_round(runs: Runs, run: str) -> dict[int, tuple[float, dict[str, float]]]:
    """Per feedback round: real share of the documents that are no discourse, and personas' shares of the real ones."""
    rows = runs.sources
    rows = rows[(rows["run"] == run) & (rows["round_index"] >= 1) & rows["source"].isin(("real", "synthetic"))]
    found = {}
    for t, at in rows.groupby("round_index"):
        real = at[at["source"] == "real"]
        total = float(real["copies"].sum())
        by = real.assign(persona=real["persona_known"].fillna("human")).groupby("persona")["copies"].sum()
        shares = {str(p): float(v) / total for p, v in by.items()} if total > 0 else {}
        found[int(t)] = (total / float(at["copies"].sum()), shares)
    return found


def _fit_slope(at: pd.DataFrame) -> float:
    """Maximum likelihood b of `response_to_differential`, by Fisher scoring; nan where x does not vary or b runs away.

    n need not be whole: effective outputs weigh a squared error of the share as so many real ones would.
    """
    x, logit, real, p_real, said, n = (at[k].to_numpy(float) for k in ("x", "logit", "real", "p_real", "said", "n"))
    persona = pd.factorize(at["persona"])[0]
    k = int(persona.max()) + 1
    n = n / n.max()

    def model(theta: Floats) -> tuple[Floats, Floats, float]:
        paid = special.expit(logit + theta[-1] * x)
        trained = np.clip(real * p_real + (1 - real) * paid, 1e-12, 1 - 1e-12)
        eta = theta[persona] + special.logit(trained)
        pull = (1 - real) * paid * (1 - paid) * x / (trained * (1 - trained))  # d eta / d b
        return eta, pull, float(n @ (said * eta - np.logaddexp(0, eta)))

    theta = np.zeros(k + 1)
    eta, pull, likelihood = model(theta)
    for _ in range(100):
        expected = special.expit(eta)
        weight = n * expected * (1 - expected)
        total = np.bincount(persona, weight, k)
        mean = np.bincount(persona, weight * pull, k) / total
        around = pull - mean[persona]
        information = float(weight @ around**2)
        if not information > 1e-9 * float(weight.sum()):
            return math.nan
        off = n * (said - expected)
        step_b = float(off @ around) / information
        step = np.append(np.bincount(persona, off, k) / total - mean * step_b, step_b)
        for _ in range(30):
            tried = model(theta + step)
            if tried[2] >= likelihood - 1e-15 * abs(likelihood):
                break
            step = step / 2
        theta = theta + step
        eta, pull, likelihood = tried
        if abs(theta[-1]) > 50:
            return math.nan
        if np.abs(step).max() < 1e-9:
            break
    return float(theta[-1])


def _slope(name: str, points: pd.DataFrame) -> Slope:
    seeds = sorted(points["seed"].unique())
    value = _fit_slope(points) if len(points) else math.nan
    if math.isnan(value):
        return Slope(name, _unmeasured("the differential does not vary"), len(points))
    if len(seeds) < 2:
        return Slope(name, Interval(value, math.nan, math.nan, 1, math.nan, "one seed has no interval"), len(points))
    left_out = np.array([_fit_slope(points[points["seed"] != s]) for s in seeds])
    if not np.isfinite(left_out).all():
        reason = "the differential varies in one seed alone"
        return Slope(name, Interval(value, math.nan, math.nan, len(seeds), math.nan, reason), len(points))
    n = len(seeds)
    se = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(-special.stdtrit(n - 1, 0.025)) * se
    return Slope(name, Interval(value, value - half, value + half, n, se), len(points))


# Selection against drift --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Selection on one persona, log odds a round.

    Attributes:
      persona: its id.
      arm, control: mean over seeds of the runs' estimates.
      contrast: arm minus control, paired; what transmission and real documents do by themselves is in both.
      within: the one run's own interval where there is one seed; drift known, training noise as n_eff says.
      increment: p-values of the frequency increment test, one per run of the arm; conservative on counted outputs, a
        diagnostic only.
      reason: why something is nan.
    """

    persona: str
    arm: Interval
    control: Interval
    contrast: Interval
    within: Interval
    increment: tuple[float, ...]
    reason: str | None = None


def neutral_size(
    runs: Runs,
    neutral: Sequence[str],
    family: str,
    last_round: int,
    calibrations: Mapping[str, Calibration] | None = None,
) -> tuple[Interval, str]:
    """n_eff of selection-off runs, personas pooled, and one line that says what is used and where it comes from.

    With one seed it is not estimated: drift cannot be told from a pull that all seeds share. Where the scatter between
    seeds is no larger than counting, n_eff is infinite; the lower limit is used then, since calling drift zero would
    take every movement for selection. Not estimated where old documents stay in the mixture (mix.regime other than
    replace): what drifts then is what has been said in all rounds.

    Args:
      runs: those of `neutral` among others.
      neutral: selection-off runs of one arm; all of them count, whether or not an arm is paired with them.
      family, last_round: see above.
      calibrations: persona -> measured f; the personas that have one are pooled, through f and its pace, as `selection`
        passes them. None or empty: all personas, as if each were copied exactly.
    """
    selected = [run for run in neutral if not selection_off(runs.configs[run])]
    if selected:
        reason = f"the control is not selection-off ({runs.configs[selected[0]].virality.audience} audience)"
        return _unmeasured(reason), f"n_eff: not estimated; {reason}"
    sides: dict[bool, list[str]] = {}
    for run in dict.fromkeys(neutral):
        sides.setdefault(runs.configs[run].real.name_swap, []).append(run)
    # One side of the name swap: the prior on names is a pull that the other side does not share.
    used = max(sides.values(), key=len, default=[])
    if len(used) < 2:
        return _unmeasured(f"{len(used)} selection-off seed", len(used)), (
            f"n_eff: not estimated, {len(used)} selection-off seed; drift cannot be told from a pull that seeds share"
        )
    mine = runs.pick(used)
    if kept := _kept(mine):
        return _unmeasured(kept), f"n_eff: not estimated; {kept}"
    share, sources = _real(mine, used[0], last_round)
    if share.max(initial=0) >= 1:
        return _unmeasured("only real documents"), "n_eff: not estimated; only real documents, nothing is inherited"
    members = _members(mine.metrics, family)
    known = {p: f for p, f in (calibrations or {}).items() if p in members}
    tables = {
        p: by_round(mine.metrics, f"{family}/{p}").reindex(index=used, columns=range(last_round + 1)).to_numpy()
        for p in (known or members)
    }  # (n_seeds, n_rounds + 1) each
    whole = {p: v for p, v in tables.items() if np.isfinite(v).all()}
    n = float(np.mean(list(outputs(mine, family).values())))
    if not whole or not n >= 2:
        slow = max(runs.configs[run].measure.every for run in used)
        reason = "frequencies are not measured in every round"
        reason += f" (measure.every: {slow}), and drift is between neighbours" if slow > 1 else ""
        return _unmeasured(reason), f"n_eff: not estimated; {reason}"
    found = evolution.effective_size(
        np.stack(list(whole.values())),
        n,
        share,
        [sources.get(p, 0.0) for p in whole],
        response=[known[p].response if p in known else None for p in whole],
        closed=[_pace(runs.configs[used[0]], known.get(p)) for p in whole],
    )
    if found.reason:
        return found, f"n_eff: not estimated; {found.reason}"
    of = f"{len(used)} selection-off seeds, " + (
        f"through the measured response of {', '.join(whole)}" if known else "personas pooled"
    )
    limits = f"95% {found.low:.0f} to {found.high:.0f}" if math.isfinite(found.high) else f"at least {found.low:.0f}"
    if math.isinf(found.value):
        if math.isinf(found.low):
            return found, f"n_eff: drift is not seen at all in {of}; inf is used"
        used_value = Interval(found.low, found.low, found.high, found.n, reason="lower limit")
        return used_value, f"n_eff {found.low:.0f}, the lower limit: no more scatter than counting in {of}"
    return found, f"n_eff {found.value:.0f} ({limits}), from {of}"


def _pace(config: Config, calibration: Calibration | None) -> float:
    """Share of the distance to f that a round closes: below 1 only where it starts from the last adapter."""
    return calibration.pace if calibration is not None and config.train.init_from == "previous" else 1.0


def selection_off(config: Config) -> bool:
    """Whether nothing in a run favours a persona: weights equal or shuffled among documents, whatever it says."""
    v = config.virality
    return v.audience == "null" or v.strength == 0 or v.shuffled


def _real(runs: Runs, run: str, last_round: int) -> tuple[Floats, dict[str, float]]:
    """Real among real and synthetic per feedback round, shape (last_round,); personas' mean shares of real documents.

    Talk about outputs plays nobody: it makes room for neither.
    """
    rows = runs.sources
    rows = rows[(rows["run"] == run) & rows["round_index"].between(1, last_round) & (rows["source"] != "discourse")]
    real = rows[rows["source"] == "real"]
    copies = rows.groupby("round_index")["copies"].sum()
    share = (real.groupby("round_index")["copies"].sum().reindex(copies.index).fillna(0) / copies).to_numpy(float)
    total = float(real["copies"].sum())
    if not total > 0:
        return share, {}
    # Chat, legacy lines and a user's own texts without a persona are human.
    by = real.assign(persona=real["persona_known"].fillna("human")).groupby("persona")["copies"].sum() / total
    return share, {str(p): float(v) for p, v in by.items()}


def selection(
    runs: Runs,
    pairs: Pairs,
    family: str,
    n_eff: Interval,
    calibrations: Mapping[str, Calibration] | None = None,
    n_eff_exact: Interval | None = None,
) -> list[Selection]:
    """Selection coefficient per persona of arm and control, with drift as the selection-off seeds show it.

    Not estimated where old documents stay in the mixture; see `neutral_size`.

    Args:
      runs, pairs, family: see above.
      n_eff: from `neutral_size`, with the same calibrations; where it is nan every row is nan with its reason.
      calibrations: persona -> measured f; its transmission is then no part of the estimate.
      n_eff_exact: the same without calibrations, for personas without a measured f; None: n_eff.
    """
    mine = _of(runs, pairs)
    kept = _kept(mine)
    n_outputs = outputs(mine, family)
    real = {run: _real(mine, run, pairs.last_round) for run in mine.paths}
    rows = []
    for persona in _members(mine.metrics, family):
        table = by_round(mine.metrics, f"{family}/{persona}")
        table = table.reindex(index=list(mine.paths), columns=range(pairs.last_round + 1))
        if not (table > 0).to_numpy().any():
            continue
        f = (calibrations or {}).get(persona)
        size = n_eff if f is not None or n_eff_exact is None else n_eff_exact

        def estimate(
            run: str,
            table: pd.DataFrame = table,
            f: Calibration | None = f,
            persona: str = persona,
            size: Interval = size,
        ) -> tuple[tuple[float, float, float], float, str | None]:
            v = table.loc[run].to_numpy(float)
            share, sources = real[run]
            if not np.isfinite(v).all() or len(share) != pairs.last_round or share.max(initial=0) >= 1:
                return (math.nan, math.nan, math.nan), math.nan, "not measured in every round, or nothing is inherited"
            p_real = sources.get(persona, 0.0)
            got = evolution.selection_coefficient(
                v, n_outputs[run], size.value, share, p_real,
                response=f.response if f else None, closed=_pace(mine.configs[run], f),
            )  # fmt: skip
            return got, evolution.frequency_increment_test(v, share, p_real).p_value, got.reason

        if kept is not None or not size.value > 0:
            reason = kept or f"n_eff: {size.reason or 'not estimated'}"
            nothing = _unmeasured(reason)
            rows.append(Selection(persona, nothing, nothing, nothing, nothing, (), reason))
            continue
        found = {run: estimate(run) for run in mine.paths}
        by_seed: dict[int, list[tuple[float, float]]] = {}
        for c in pairs.cells:
            by_seed.setdefault(c.seed, []).append((found[c.arm][0][0], found[c.control][0][0]))
        values = np.array([np.mean(v, axis=0) for v in by_seed.values()])  # (n_seeds, 2)
        a, b = (values[np.isfinite(values[:, k]), k] for k in (0, 1))
        both = values[np.isfinite(values).all(axis=1)]
        unbounded = len(values) - len(both)
        why = f"not bounded, or not seen, in {unbounded} of {len(values)} seeds" if unbounded else None
        one, _, nothing_in = found[pairs.cells[0].arm]
        within = (
            Interval(*one, 1, math.nan, nothing_in or (None if math.isfinite(one[0]) else "lost, or it took over"))
            if len(pairs.cells) == 1
            else _unmeasured("several runs: the interval is over seeds", len(values))
        )
        rows.append(
            Selection(
                persona,
                over_seeds(a)[0],
                over_seeds(b)[0],
                over_seeds(both[:, 0] - both[:, 1])[0],
                within,
                tuple(found[c.arm][1] for c in pairs.cells),
                why,
            )
        )
    return rows


# Health -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Health:
    """One health number of the final round.

    Attributes:
      name: metric.
      value: mean over seeds in the arm.
      difference: arm minus real_only, paired by seed; nan with "no real_only control" where none was given.
      p: of the difference, Student over seeds.
    """

    name: str
    value: Interval
    difference: Interval
    p: float


def health(runs: Runs, pairs: Pairs, against: Runs | None) -> list[Health]:
    """Health of an arm in its final round as difference to real_only runs of the same seeds and rounds.

    Args:
      runs, pairs: the arm.
      against: runs that fed back nothing; None: every difference is nan, with that as the reason.

    Raises:
      ValueError: `against` holds a run that trained on its own outputs.
    """
    controls: dict[tuple[int, bool], str] = {}
    if against is not None:
        for run, config in against.configs.items():
            fed = against.sources[(against.sources["run"] == run) & (against.sources["round_index"] >= 1)]
            share = fed.loc[fed["source"] == "real", "copies"].sum() / fed["copies"].sum() if len(fed) else 1.0
            if share < 1:
                raise ValueError(
                    f"--against must be real_only runs, got a real share of {share:.3g} at {against.paths[run]}; "
                    "set mix.real_share: 1"
                )
            controls[config.seed, config.real.name_swap] = run
    mine = _of(runs, pairs)
    rows = mine.metrics[mine.metrics["population"].isin(("probes", "heldout")) & mine.metrics["stratum"].isna()]
    found = []
    names = rows.loc[rows["name"].str.startswith(HEALTH), ["population", "name"]].drop_duplicates()
    for population, name in sorted(names.itertuples(index=False, name=None)):
        table = by_round(mine.metrics, name, population=population)
        other = by_round(against.metrics, name, population=population) if against is not None else pd.DataFrame()
        values: dict[int, list[tuple[float, float]]] = {}
        for c in pairs.cells:
            # A real_only run says the same under either name; the other side of the swap will do.
            control = controls.get((c.seed, c.swap)) or controls.get((c.seed, not c.swap)) or ""
            at = pairs.last_round
            values.setdefault(c.seed, []).append((_at(table, c.arm, at), _at(other, control, at)))
        means = np.array([np.mean(v, axis=0) for v in values.values()])  # (n_seeds, 2)
        value, _ = over_seeds(means[np.isfinite(means[:, 0]), 0])
        both = means[np.isfinite(means).all(axis=1)]
        if against is None:
            difference, p = _unmeasured("no real_only control"), math.nan
        elif len(both) == 0:
            difference, p = _unmeasured(f"no real_only run of these seeds has round {pairs.last_round}"), math.nan
        else:
            difference, p = over_seeds(both[:, 0] - both[:, 1])
        found.append(Health(name, value, difference, p))
    return found


# Early warning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Indicator:
    """How often one early-warning indicator fires; never to be shown without the second rate.

    Attributes:
      name: with its threshold.
      hit_rate: share of (run, persona) in arms that moved; clustered by seed.
      false_positive_rate: the same of selection-off runs, all of them.
    """

    name: str
    hit_rate: Interval
    false_positive_rate: Interval


@dataclass(frozen=True)
class Warnings:
    """Whether an early round foretold the final one.

    Attributes:
      round_index, last_round: when the forecast is made, and of what.
      personas: persona -> evolution.EarlyWarning, forecast by log odds that grow on at their pace so far.
      gain: mean |no change - last| minus mean |forecast - last| over runs and personas that moved, by seed: positive
        where the forecast is better.
      indicators: see Indicator.
    """

    round_index: int
    last_round: int
    personas: dict[str, evolution.EarlyWarning]
    gain: Interval
    indicators: list[Indicator]


THRESHOLDS = {
    "change": "change so far > 3 noise floors",
    "variance": "variance of rounds 0..k > 3 x counting",
    "autocorrelation": "lag-1 autocorrelation of changes > 0.5",
    "n_eff": "n_eff below 0.8 of round 0's",
    "entropy": "sample entropy down by > 3 noise floors",
}


def early_warning(runs: Runs, pairs: Sequence[Pairs], family: str, *, round_index: int = 2) -> Warnings:
    """Asks, over arms and seeds, whether round `round_index` foretells the final one, and what each indicator is worth.

    Forecasts are scored in arms whose mean change exceeds three noise floors. Thresholds of the indicators are fixed,
    not fitted; the rate at which each fires in the control runs says how far to trust it.

    Raises:
      ValueError: fewer than round_index + 1 feedback rounds, or a control that is not selection-off.
    """
    last = min(p.last_round for p in pairs)
    if not 1 <= round_index < last:
        raise ValueError(f"--warn needs a final round beyond round {round_index}, got {last}; play more rounds")
    cells = [(p.name, c) for p in pairs for c in p.cells]
    odd = [c.control for _, c in cells if not selection_off(runs.configs[c.control])]
    if odd:
        raise ValueError(
            f"--warn needs selection-off runs as --control, got {odd[0]}; without them no rate of false alarms"
        )
    treated = [c.arm for _, c in cells]
    controls = list(dict.fromkeys(c.control for _, c in cells))
    mine = runs.pick(dict.fromkeys([*treated, *controls]))
    seed_of = {run: mine.configs[run].seed for run in mine.paths}
    n_outputs = float(np.mean(list(outputs(mine, family).values())))
    rounds = list(range(last + 1))

    def frequencies(persona: str, wanted: Sequence[str]) -> Floats:
        table = by_round(mine.metrics, f"{family}/{persona}").reindex(index=list(wanted), columns=rounds)
        return table.to_numpy(float)  # (n_runs, n_rounds + 1)

    entropy, entropy_se = (t["e"] for t in _tables(mine, {"e": "sample_entropy"}, population="probes"))
    size = by_round(mine.metrics, "n_eff", population="accepted")

    def fallen(run: str) -> dict[str, bool | None]:
        small, whole = _at(size, run, round_index), _at(size, run, 0)
        drop = _at(entropy, run, 0) - _at(entropy, run, round_index)
        floor = stats.remeasurement_noise_floor(_at(entropy_se, run, 0), _at(entropy_se, run, round_index))
        # What was not measured is no alarm that stayed silent.
        return {
            "n_eff": small < 0.8 * whole if math.isfinite(small - whole) else None,
            "entropy": drop > 3 * floor if math.isfinite(drop - floor) else None,
        }

    of_run = {run: fallen(run) for run in mine.paths}
    found: dict[str, evolution.EarlyWarning] = {}
    hits: dict[str, list[tuple[bool, int]]] = {name: [] for name in THRESHOLDS}
    false: dict[str, list[tuple[bool, int]]] = {name: [] for name in THRESHOLDS}
    gains: dict[int, list[float]] = {}
    moved_runs: set[str] = set()
    for persona in _members(mine.metrics, family):
        v, null = frequencies(persona, treated), frequencies(persona, controls)
        if not (np.isfinite(v).all() and np.isfinite(null).all() and (v > 0).any()):
            continue
        se = _tables(mine, {persona: f"{family}/{persona}"}, population="probes")[1][persona]
        ends = se.reindex(index=treated, columns=[0, last]).to_numpy(float)
        floor = float(np.mean([stats.remeasurement_noise_floor(a, b) for a, b in ends]))
        if not floor > 0:
            continue
        arms = [name for name, _ in cells]
        found[persona] = evolution.early_warning(v, null, floor, n_outputs, round_index, arms=arms)
        moved = evolution.moved_runs(v, floor, arms)
        ahead = evolution.extrapolate(v, n_outputs, round_index)
        fired = evolution.indicators(v, floor, n_outputs, round_index)
        fired_null = evolution.indicators(null, floor, n_outputs, round_index)
        for i in np.flatnonzero(moved):
            seed = seed_of[treated[i]]
            moved_runs.add(treated[i])
            gains.setdefault(seed, []).append(abs(v[i, round_index] - v[i, -1]) - abs(ahead[i] - v[i, -1]))
            for name, rows in fired.items():
                hits[name].append((bool(rows[i]), seed))
        for name, rows in fired_null.items():
            false[name] += [(bool(rows[i]), seed_of[run]) for i, run in enumerate(controls)]
    for name in ("n_eff", "entropy"):
        told = {run: alarm for run, of in of_run.items() if (alarm := of[name]) is not None}
        hits[name] = [(told[run], seed_of[run]) for run in treated if run in moved_runs and run in told]
        false[name] = [(told[run], seed_of[run]) for run in controls if run in told]

    def rate(rows: Sequence[tuple[bool, int]]) -> Interval:
        return stats.clustered_share([float(hit) for hit, _ in rows], [seed for _, seed in rows])

    kept = [name for name in THRESHOLDS if false[name]]
    return Warnings(
        round_index,
        last,
        found,
        over_seeds(np.array([np.mean(g) for g in gains.values()]))[0],
        [Indicator(THRESHOLDS[name], rate(hits[name]), rate(false[name])) for name in kept],
    )


# All of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """An arm against its control: everything `loop compare` prints.

    Attributes:
      pairs: who was paired with whom.
      family, family_note: corrected or observed frequencies, and why.
      personas, factors: contrasts of final minus round-0 frequency; never: personas seen in no run.
      metrics: metric -> contrasts, belief among them.
      paid: the realised differential, an input.
      slopes: response per unit log differential; slopes_note: what it takes for granted.
      n_eff, n_eff_note: drift of selection-off seeds, and where it comes from.
      transmission: what the selection estimates take transmission to be.
      selection: per persona.
      health: of the final round, against real_only.
    """

    pairs: Pairs
    family: str
    family_note: str
    personas: list[Contrast]
    factors: list[Contrast]
    never: list[str]
    metrics: dict[str, list[Contrast]]
    paid: list[Paid]
    slopes: list[Slope]
    n_eff: Interval
    n_eff_note: str
    transmission: str
    selection: list[Selection]
    health: list[Health]
    slopes_note: str = SLOPES_NOTE


def compare(
    runs: Runs,
    controls: Sequence[str],
    *,
    against: Runs | None = None,
    metrics: Sequence[str] = ("frequency", "belief"),
    last_round: int | None = None,
    calibrated: Callable[[Config, Path], tuple[dict[str, Calibration], str]] | None = None,
) -> list[Comparison]:
    """Compares every arm among the runs with the control, paired by seed.

    Args:
      runs: arms and control together, see `load`.
      controls: the runs of them that are the control (selection off).
      against: real_only runs for health; None: health stands without a control, and says so.
      metrics: what to contrast; "frequency" brings selection and the response with it.
      last_round: round called final; None: the last that all paired runs have measured.
      calibrated: config and run directory -> measured dose-responses and a line on them (`dose.find`); None: none.

    Returns:
      One Comparison per arm.
    """
    family, note = family_of(runs)
    wants = "frequency" in metrics
    if wants:
        _ = runs.sources  # read once here, and not again for every arm's part of the runs
    measured_to = _last_measured(runs)
    out = []
    for pairs in pair(runs, controls, last_round=last_round):
        # Every seed of the control that has the round: drift is theirs, whether or not an arm is paired with them.
        neutral = [run for run in controls if measured_to.get(run, -1) >= pairs.last_round]
        first = pairs.cells[0].arm
        found, transmission = ({}, "assumed exact") if calibrated is None else calibrated(
            runs.configs[first], runs.paths[first]
        )  # fmt: skip
        personas, factors, never = persona_contrasts(runs, pairs, family) if wants else ([], [], [])
        n_eff, n_eff_note = neutral_size(runs, neutral, family, pairs.last_round, found)
        exact = n_eff
        if wants and found and set(_members(runs.metrics, family)) - set(found):
            exact, line = neutral_size(runs, neutral, family, pairs.last_round)
            n_eff_note += "" if line == n_eff_note else f"; for the others {line}"
        out.append(
            Comparison(
                pairs,
                family,
                note,
                personas,
                factors,
                never,
                {name: metric_contrasts(runs, pairs, name) for name in metrics if name != "frequency"},
                differentials(runs, pairs),
                response_to_differential(runs, pairs, family) if wants else [],
                n_eff,
                n_eff_note,
                transmission,
                selection(runs, pairs, family, n_eff, found, exact) if wants else [],
                health(runs, pairs, against),
            )
        )
    return out


def gather(
    places: Sequence[str], controls: Sequence[str], against: Sequence[str] = ()
) -> tuple[Runs, list[str], Runs | None]:
    """Reads what the command line names: arms and control together, which of them are the control, and real_only runs.

    Args:
      places: run directories or folders of runs; each may be a pattern (`runs/full-s*`).
      controls, against: the same, or the name of an arm among the runs that `places` hold.
    """
    named = [*controls, *against]
    found = {name: _matches(name) for name in [*places, *named]}
    lost = [name for name in places if not found[name]]
    if lost:
        raise ValueError(f"run must exist, got nothing at {lost[0]}; `loop run` its config first")
    everything = load(*dict.fromkeys(path for paths in found.values() for path in paths))

    def runs_of(names: Sequence[str], option: str) -> list[str]:
        picked: list[str] = []
        for name in names:
            under = [p.resolve() for p in found[name]]
            mine = [r for r, path in everything.paths.items() if any(path.is_relative_to(p) for p in under)]
            mine = mine or [r for r, config in everything.configs.items() if config.name == name]
            if not mine:
                arms = ", ".join(sorted({c.name for c in everything.configs.values()}))
                raise ValueError(f"{option} must be a run, a folder, a quoted pattern or an arm ({arms}), got {name!r}")
            picked += mine
        return list(dict.fromkeys(picked))

    control, real_only = runs_of(controls, "--control"), runs_of(against, "--against")
    both = [run for run in control if run in real_only]
    if both:
        raise ValueError(
            f"--control and --against must be different runs, got {both[0]} in both; --against takes real_only runs, "
            "--control those it is paired with"
        )
    arms = [run for run in everything.paths if run not in real_only]
    return everything.pick(arms), control, everything.pick(real_only) if real_only else None


def _matches(place: str) -> list[Path]:
    path = Path(place)
    if path.exists():
        return [path]
    return sorted(Path(p) for p in glob(place)) if any(c in place for c in "*?[") else []


# Factorials ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """An effect in a two-level factorial.

    Attributes:
      name: a factor, or two of them as "a x b".
      interval: log odds, over seeds.
      by_seed: its value in each seed that has all cells, in the order of seeds.
      p: two-sided, Student over seeds; p_holm: adjusted over the effects of the table.
    """

    name: str
    interval: Interval
    by_seed: tuple[float, ...]
    p: float
    p_holm: float = math.nan


def factorial(
    factors: Sequence[str], cells: Mapping[tuple[int, ...], Mapping[int, float]], *, n_outputs: float | None
) -> list[Effect]:
    """Main effects and two-way interactions of a full two-level factorial on the logit scale, paired by seed.

    With y the logit of a share, half an output added to each side, an effect is the mean of y over the cells where the
    product of its factors' signs is + minus its mean where it is -. Special case: with x = +-1,
    y = a + b * x1 + c * x1 * x2 gives 2 b for factor 1, 2 c for "1 x 2", and 0 for factor 2. Signs are orthogonal, so
    effects do not mix. Where a share is 0 or 1 its logit is +-log(2 * n_outputs + 1), a matter of how many outputs were
    read: an effect of log odds over such cells is a bound, and the effect on the share itself is the one to read.

    Args:
      factors: names.
      cells: levels, 0 or 1 per factor -> seed -> share in [0, 1]; all 2**n cells.
      n_outputs: outputs behind a share, > 0; None: y is the share itself.

    Returns:
      Main effects in the order of factors, then pairs; a seed that lacks a cell is left out of all.

    Raises:
      ValueError: if a cell is missing.
    """
    wanted = {tuple(int(c) for c in f"{k:0{len(factors)}b}") for k in range(2 ** len(factors))}
    if set(cells) != wanted:
        raise ValueError(f"cells must be all {len(wanted)} of the factorial, got {len(cells)}; play the missing arms")
    order = sorted(cells)
    seeds = sorted(set.intersection(*(set(cells[c]) for c in order)))
    share = np.array([[cells[c][s] for c in order] for s in seeds]).reshape(len(seeds), len(order))
    y = share  # (n_seeds, n_cells)
    if n_outputs is not None:
        v = (share * n_outputs + 0.5) / (n_outputs + 1)
        y = np.log(v / (1 - v))
    sign = 2 * np.array(order) - 1  # (n_cells, n_factors)
    contrasts = {name: sign[:, k] for k, name in enumerate(factors)}
    contrasts |= {
        f"{factors[j]} x {factors[k]}": sign[:, j] * sign[:, k]
        for j in range(len(factors))
        for k in range(j + 1, len(factors))
    }
    rows = []
    for name, signs in contrasts.items():
        values = 2 * (y * signs).mean(axis=1)  # (n_seeds,)
        interval, p = over_seeds(values)
        rows.append(Effect(name, interval, tuple(values.tolist()), p))
    return [replace(r, p_holm=float(p)) for r, p in zip(rows, stats.holm([r.p for r in rows]), strict=True)]
