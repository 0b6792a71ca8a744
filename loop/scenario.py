"""What a scenario says: power before the run, one primary outcome, its verdict; the page of findings from tables alone.

A verdict follows from the numbers and the file, never from a reader. Everything that is not the primary outcome is
exploratory and gets none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loop import analysis, config, stats, theory
from loop.records import CONSCIOUS, UNREQUESTED
from loop.stats import Interval
from loop.store import RunStore
from loop.sweep import Outcome, Sweep, arms_of, of_factor, twins

# What an exact learner or a model of a few million parameters can show: how the loop works, not what personas do.
MECHANICS = ("nova_stella", "hitchhiking", "idempotence", "hard_filter", "expectation", "regimes")
SMALL = ("toy", "tiny")
SUPPORTED, CONTRADICTED, INCONCLUSIVE = "supported", "contradicted", "inconclusive"
DEMONSTRATION, MECHANICS_ONLY, REQUEST_ALONE = "demonstration", "mechanics only", "through the request alone"
HEALTH = (
    ("sample_entropy", "probes"),
    ("distinct_4", "probes"),
    ("finished_rate", "probes"),
    ("self_similarity", "probes"),
    ("kl_to_base", "probes"),
    ("heldout_loss", "heldout"),
)
# What a filter or a step did, and whether the model does what it is asked: without them a null says little.
DONE = {
    ("rejected", "samples", ""): "share of outputs that the release filter or its control barred",
    (
        "release_recall",
        "samples",
        "",
    ): "share called hers by the release filter, of texts that both instruments call so",
    ("release_fpr", "samples", ""): "share it calls hers of texts that neither instrument calls so",
    ("quoted_share", "discourse", ""): "share of the tokens of documents about outputs that are quoted",
    ("named", "discourse", ""): "share of documents about outputs that name her",
    ("steer_own_share", "pairs", ""): "share of steering pairs that are the model's own",
    (
        "steer_accuracy_after",
        "pairs",
        "",
    ): "share of pairs in which the step raised the chosen text above the other",
    ("compliance", "probes", "explicit"): "P(read as her, she was asked for) - P(read as her, another was)",
}
OF_FILTER = ("release_recall", "release_fpr")  # as stated: in population heldout of the baseline, round -1
_OF_ANY = ("release_", "named/", "rejected/at_random", "rejected/persona:")  # whoever stands behind the name
NOTHING = "-"  # in a table of the page: not measured, or not applicable
ROWS = pa.schema(
    [
        ("run", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("round", pa.int32()),
        ("population", pa.string()),
        ("stratum", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.float64()),
    ]
)
ABOUT = {
    *("name", "size", "learner", "question", "expected", "why", "time", "seeds", "planned", "n_rounds", "arms"),
    *("measured", "controls", "levels", "primary", "exploratory", "as_observed", "twins", "runs", "power"),
}  # what the page says beside the numbers
META = b"scenario"  # key of the Parquet file's metadata that holds it


# Power, before the run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stated:
    """What a scenario could see, said before it is played.

    Attributes:
      detectable: true effect found with chance 0.8 by the outcome's own contrast, two-sided at 5%, to lie beyond its
        margin; for direction none: the margin within which a true effect of 0 is shown to lie with chance 0.8. None:
        not stated.
      sd: assumed standard deviation over seeds of the paired difference.
      n_seeds: seeds an arm.
      source: where sd comes from, or why nothing is stated.
      played: cells that held a feedback round already when this was said; 0 is before the run.
      stamp: hash of what it was said about.
    """

    detectable: float | None
    sd: float | None
    n_seeds: int
    source: str
    played: int
    stamp: str


def state_power(sweep: Sweep) -> Stated | None:
    """States the power of the primary outcome and keeps it beside the runs; said once, before the first is played.

    Asked again it returns what was said. If the outcome, the seeds or the arm have changed it is said anew, with the
    number of cells that were played by then; what was said before stays in the file, a line each.
    """
    primary = sweep.file.primary
    if primary is None:
        return None
    arm = arms_of(primary, sweep.levels)[0]
    # A file that says nothing of `of` asks what it asked before it could.
    asked = primary.model_dump(exclude={"of"} if primary.of == "change" else None)
    said = json.dumps([asked, list(sweep.seeds), config.to_yaml(sweep.arms[arm])])
    stamp = hashlib.sha256(said.encode()).hexdigest()[:16]
    path = sweep.runs_dir / f"{sweep.name}.power.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for before in (Stated(**json.loads(line)) for line in lines):
        if before.stamp == stamp:
            return before
    played = sum((sweep.run_dir(a, s) / "round_001").is_dir() for a in sweep.arms for s in sweep.seeds)
    n = len(sweep.seeds)
    try:
        sd, source = _sd(sweep, arm, primary)
    except ValueError as error:  # the twin cannot be asked, e.g. about a corpus another arm has yet to write
        stated = Stated(None, None, n, f"not stated: {' '.join(str(error).split())[:160]}", played, stamp)
    else:
        if n < 2:
            stated = Stated(None, sd, n, "not stated: one seed has no interval", played, stamp)
        else:
            stated = Stated(_detectable(primary, sd, n), sd, n, source, played, stamp)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines.append(json.dumps(asdict(stated), sort_keys=True))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return stated


def _voiced(kept: bool, personas: set[str], settings: config.Config, battery: Sequence[Any]) -> tuple[int, float]:
    """Texts behind `kept`, `persistence` or `compliance`, and the sd of one that gives the outcome's."""
    n_of = Counter(p.requested for p in battery if p.requested)
    n = sum(n_of.values())
    voices = [v for v in settings.planted if v != "assistant" and n_of[v]] if personas == {""} else [*personas]
    if kept:
        return sum(n_of[v] for v in (voices if personas != {""} else {*n_of} - {"assistant"})), 0.5
    if not voices or any(not n_of[v] for v in voices):
        return 0, 0.5
    variance = sum(0.25 / n_of[v] + 0.25 / (n - n_of[v]) for v in voices) / len(voices) ** 2
    return n, math.sqrt(variance * n)


# Outcomes that are shares of texts, or differences of such: what their counting alone does is known before the run.
_SHARES = (
    *("frequency", "frequency_observed", "belief", "belief_observed", "said", "claimed_maker"),
    *("mirror_rate", "mirror_rate_observed", "agrees_observed", "kept", "persistence", "compliance"),
)


def _detectable(primary: Outcome, sd: float, n: int) -> float:
    if primary.direction != "none":
        return primary.margin + theory.minimum_detectable_effect(sd, n)
    return theory.minimum_margin(sd, n)


def _sd(sweep: Sweep, arm: str, primary: Outcome) -> tuple[float, str]:
    """Standard deviation over seeds that the outcome is taken to have, and where it comes from.

    Frequencies: the forecast twin's, whose learner is exact, so training noise is not in it: a model's seeds scatter
    more. The parts of a sum are added as if they moved together, and an arm and its control as if they did not.

    Raises:
      ValueError: the outcome is no share of texts whose number is known before the run.
    """
    from loop import forecast
    from loop.world import World

    settings = sweep.arms[arm]
    given = forecast.inputs(settings)
    predicted = forecast.predict(settings, given)
    spread = dict(zip(given.personas, predicted.sd[-1].tolist(), strict=True))
    mean = dict(zip(given.personas, predicted.mean[-1].tolist(), strict=True))
    world = World(settings)
    battery = world.battery
    personas = {name: name.partition("/")[2] for name in primary.parts}
    heads = {name.partition("/")[0] for name in primary.parts}
    if not heads <= {*_SHARES}:
        raise ValueError(f"{', '.join(sorted(heads - {*_SHARES}))} is no share of texts, whose spread would be known")
    left_out = ", ".join(forecast.not_modelled(settings))
    twin = f"forecast twin{f', which has no {left_out}' if left_out else ''}; training noise not counted"
    plain = primary.stratum is None and primary.population == "probes"
    if plain and heads <= {"frequency", "frequency_observed"} and set(personas.values()) <= set(spread):
        one = sum(abs(c) * spread[personas[name]] for name, c in primary.parts.items())
        share, source = mean[next(iter(personas.values()))], twin
    else:
        strata = UNREQUESTED if primary.stratum is None else (primary.stratum,)
        plain_private = heads == {"belief"} and set(personas.values()) == {""}  # asked with no persona's turn before
        n = sum(p.stratum in strata and not (plain_private and p.requested) for p in battery)
        if primary.population == "samples" and primary.stratum is None:
            n = settings.sample.n_samples
        if n == 0:
            raise ValueError(f"no probe of {', '.join(strata)} in measure.strata")
        moving = {"belief": CONSCIOUS, "said": tuple(personas.values())}.get("".join(heads), ())
        moved = sum(spread.get(p, 0.0) for p in moving)
        # A rate is a difference of two shares, each of half the probes.
        one_text = 1.0 if heads <= {"mirror_rate", "mirror_rate_observed"} else 0.5
        if heads <= {"kept", "persistence", "compliance"}:
            n, one_text = _voiced(
                heads == {"kept"}, set(personas.values()), settings, [p for p in battery if p.stratum in strata]
            )
        # What an instrument misses is made up for by division.
        asks = world.error.belief if heads == {"belief"} and world.error is not None else None
        if heads == {"mirror_rate"}:
            asks = world.agreement_error
        if asks is not None:
            called, of_yes, spared, of_no = asks
            one_text /= max(called / of_yes + spared / of_no - 1, 1e-9)
        one = sum(abs(c) for c in primary.parts.values()) * math.hypot(one_text / math.sqrt(n), moved)
        share, source = 0.5, twin if moved else f"counting {n} texts alone; neither drift nor training noise counted"
    if sweep.file.factors:
        share = min(max(share, 0.01), 0.99)
        n_cells = len(arms_of(primary, sweep.levels))
        return 2 * one / (share * (1 - share)) / math.sqrt(n_cells), f"{source}; on the logit scale"
    return math.sqrt(max(2, len(primary.terms))) * max(one, 1e-9), source


Levels = dict[int, tuple[float, float]]  # round -> level, variance of measurement


# Tables -------------------------------------------------------------------------------------------------------------


def gather(sweep: Sweep, known: tuple[dict[str, Any], pd.DataFrame] | None = None) -> pa.Table | None:
    """Everything the page needs of a scenario's runs, from their files: rows ROWS, the rest in the metadata.

    Args:
      known: an older table of the scenario, as `read` returns it. Its runs that are not here, or not as far, are kept
        where the file still means the same by them, so a scenario may be played in parts, on several machines.

    Returns:
      None if no run of it has a finished round, here or in what is known.

    Raises:
      ValueError: no run is here, and what is known lacks a metric that the file asks about.
    """
    file = sweep.file
    frame, made_by = _played(sweep)
    is_here = bool(made_by)
    if known is not None:
        frame, made_by = _merged(sweep.hashes, frame, made_by, *known)
    # A run that another scenario shares may have gone on for it.
    frame = frame[frame["round"] <= frame["arm"].map({arm: c.n_rounds for arm, c in sweep.arms.items()})]
    if frame.empty:
        return None
    asked = [file.primary, *file.exploratory]
    primary, *exploratory = read_as = [None if o is None else _as_measured(o, frame) for o in asked]
    outcomes = [o for o in (primary, *exploratory) if o is not None]
    lost = sorted({name for o in outcomes for name in o.parts} - {*frame["metric"]})
    if lost and not is_here:
        raise ValueError(
            f"table of {sweep.name} must hold {', '.join(lost)} to be asked about it, got none, and no run of it lies "
            f"in {sweep.runs_dir}; play them, or ask about what it holds"
        )
    frame = _shown(frame, outcomes)
    columns = {f.name: pa.array(frame[f.name].tolist(), f.type, from_pandas=True) for f in ROWS}
    any_arm = next(iter(sweep.arms.values()))
    stated = state_power(sweep)
    power = asdict(stated) if stated else None
    if known is not None and power is not None:
        if (known[0]["power"] or {}).get("stamp") == power["stamp"]:
            power = known[0]["power"]  # of the two the one said first
        else:  # said of another outcome or arm, after the runs of the older table that are these runs
            theirs = sum(made["config_sha256"] == sweep.hashes.get(run) for run, made in known[0]["runs"].items())
            power["played"] = max(power["played"], theirs)
    about = {
        "name": sweep.name,
        "size": sweep.size,
        "learner": any_arm.learner if any_arm.base is None else any_arm.base.model,
        "question": file.question,
        "expected": file.expected,
        "why": file.why,
        "time": sweep.time,
        "seeds": list(sweep.seeds),
        "planned": list(sweep.planned),
        "n_rounds": max(c.n_rounds for c in sweep.arms.values()),
        "arms": list(sweep.arms),
        "measured": {arm: list(range(0, c.n_rounds + 1, max(1, c.measure.every))) for arm, c in sweep.arms.items()},
        "controls": list(file.controls),
        "levels": sweep.levels,
        "primary": primary.model_dump() if primary else None,
        "exploratory": [o.model_dump() for o in exploratory if o is not None],
        "as_observed": [read != meant for read, meant in zip(read_as, asked, strict=True)],
        "twins": _twins(sweep),
        "runs": made_by,
        "power": power,
    }
    return pa.table(columns, schema=ROWS).replace_schema_metadata({META: json.dumps(about, sort_keys=True)})


def _made_by(sweep: Sweep) -> dict[Path, dict[str, str]]:
    """Runs that lie where the scenario's would, with a finished round, and what made each."""
    there = (sweep.run_dir(arm, seed) for arm in sweep.arms for seed in sweep.seeds)
    manifests = {path: RunStore(path).manifest() for path in there if (path / "round_000").is_dir()}
    return {
        path: {"revision": made["revision"] or NOTHING, "config_sha256": made["config_sha256"]}
        for path, made in manifests.items()
    }


def strangers(sweep: Sweep) -> list[Path]:
    """Runs in the place of the scenario's that were played with another config: nothing is read from them."""
    return [path for path, made in _made_by(sweep).items() if made["config_sha256"] != sweep.hashes[path.name]]


def _played(sweep: Sweep) -> tuple[pd.DataFrame, dict[str, dict[str, str]]]:
    """Every metric of the rounds that the scenario's runs have finished here, as ROWS, and what made each run.

    Of the untouched base, round -1, what its filter is stated to find and to miss.
    """
    made_by = {path: made for path, made in _made_by(sweep).items() if made["config_sha256"] == sweep.hashes[path.name]}
    if not made_by:
        return pd.DataFrame(columns=[f.name for f in ROWS]), {}
    arm_of = {sweep.run_dir(arm, seed).resolve(): arm for arm in sweep.arms for seed in sweep.seeds}
    runs = analysis.load(*made_by)
    frame = runs.metrics[(runs.metrics["round_index"] >= 0) | runs.metrics["name"].str.startswith(OF_FILTER)]
    paths = [runs.paths[run] for run in frame["run"]]
    frame = frame.assign(arm=[arm_of[path.resolve()] for path in paths], run=[path.name for path in paths])
    frame = frame.rename(columns={"name": "metric", "round_index": "round"})[[f.name for f in ROWS]]
    frame["stratum"] = frame["stratum"].fillna("")
    return frame, {path.name: made for path, made in made_by.items()}


def _merged(
    wants: Mapping[str, str],
    frame: pd.DataFrame,
    made_by: dict[str, dict[str, str]],
    ago: dict[str, Any],
    old: pd.DataFrame,
) -> tuple[pd.DataFrame, dict[str, dict[str, str]]]:
    """What was played here, with the older table's runs that got further and that the file means the same by."""
    rounds = frame.groupby("run")["round"].max()
    kept = [
        run
        for run, last in old.groupby("run")["round"].max().items()
        if ago["runs"][run]["config_sha256"] == wants.get(run) and last > rounds.get(run, -1)
    ]
    parts = [part for part in (frame[~frame["run"].isin(kept)], old[old["run"].isin(kept)]) if len(part)]
    frame = pd.concat(parts, ignore_index=True) if parts else frame
    return frame, made_by | {run: ago["runs"][run] for run in kept}


def _shown(frame: pd.DataFrame, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """The rows that the page reads: of the outcomes' metrics, of the differentials beside them and of health."""
    wanted: set[tuple[str, str, str]] = {(name, population, "") for name, population in HEALTH}
    wanted |= {(name, "heldout", "") for name in frame["metric"].unique() if name.startswith(OF_FILTER)}
    for o in outcomes:
        for name in o.parts:
            wanted.add((name, o.population, o.stratum or ""))
            if name.startswith("frequency"):
                wanted.add((f"differential/{name.partition('/')[2]}", "accepted", ""))
    keys = zip(frame["metric"], frame["population"], frame["stratum"], strict=True)
    frame = frame[[key in wanted or _is_done(*key) is not None for key in keys]]
    return frame.sort_values(["arm", "seed", "metric", "population", "stratum", "round"], kind="stable")


def _is_done(metric: str, population: str, stratum: str) -> str | None:
    """What a metric of DONE says, in words; None for any other."""
    head = metric.partition("/")[0] if metric.startswith(_OF_ANY) else metric
    return DONE.get((head, population, stratum))


def _as_measured(outcome: Outcome, rows: pd.DataFrame) -> Outcome:
    """The outcome as observed where no run has it corrected: for `tiny` the instruments' error is not known."""
    observed = {name: name.replace(head, f"{head}_observed", 1) for name in outcome.parts
                if (head := name.partition("/")[0]) in ("frequency", "belief", "mirror_rate")}  # fmt: skip
    if not observed or rows.loc[rows["metric"].isin(observed), "value"].notna().any():
        return outcome
    parts = {observed.get(name, name): c for name, c in outcome.parts.items()}
    return outcome.model_copy(update={"metric": next(iter(parts)) if isinstance(outcome.metric, str) else parts})


def _twins(sweep: Sweep) -> dict[str, str | None] | None:
    """Contrasts under which a claim must keep its sign; None where the claim is not made under audience full.

    A factorial under audience full has none such: its contrasts are None.
    """
    primary = sweep.file.primary
    if primary is None or primary.direction == "none":
        return None
    if sweep.file.factors:
        paid = any(arm.virality.audience == "full" for arm in sweep.arms.values())
        return {"no_request": None, "learned": None} if paid else None
    return twins(sweep, primary) if any(sweep.arms[a].virality.audience == "full" for a in primary.terms) else None


def write(sweep: Sweep, folder: Path) -> str:
    """Writes a scenario's table, see `gather`; returns one line that says where, or that there is nothing to write.

    Raises:
      ValueError: what lies there is no table of this version.
    """
    path = folder / f"{sweep.name}{'' if sweep.size in ('', 'tiny') else f'.{sweep.size}'}.parquet"
    table = gather(sweep, read(path, needs=("runs", "power")) if path.exists() else None)
    others = ", ".join(p.name for p in strangers(sweep))
    left_out = f"; left out, played with another config: {others}" if others else ""
    if table is None:
        size = f" --size {sweep.size}" if sweep.size else ""
        return f"{sweep.name}: no run of it is played; `loop sweep {sweep.path}{size}` first{left_out}"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, scratch, compression="zstd", compression_level=9)
    os.replace(scratch, path)
    return f"{path}: {len(table)} rows of {len(pc.unique(table['run']))} runs{left_out}"


def read(path: Path, needs: Collection[str] = ABOUT) -> tuple[dict[str, Any], pd.DataFrame]:
    """What `write` wrote: what the page says beside the numbers, and the rows.

    Args:
      needs: what must be said; an older version's table, which says less, is enough to write anew from.

    Raises:
      ValueError: if the file is no such table.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"table must be Parquet, got {' '.join(str(error).split())[:120]} at {path}; remove it"
        ) from None
    about: dict[str, Any] = json.loads((file.metadata.metadata or {}).get(META, b"{}"))
    if not about.keys() >= {*needs} or file.schema_arrow.names != ROWS.names:
        raise ValueError(
            f"table must be written by this version's `loop findings`, got another at {path}; move it away, or "
            "write it anew by that command on its scenario"
        )
    return about, file.read(use_threads=False).to_pandas()


# Judging ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """An outcome as observed.

    Attributes:
      outcome: what was asked.
      effect: in the unit of the metric (log odds for a factor), 95% over seeds.
      floor: mean |effect| that measuring the same models twice would show; nan where a number has no interval.
      verdict: one of the words above; "" for an exploratory outcome.
      note: why, in a few words; may be empty.
      under: audience -> the same contrast under it, where the claim must hold there too.
      last_round: the round called final; None where nothing is played.
      n_planned: seeds that the scenario plans.
    """

    outcome: Outcome
    effect: Interval
    floor: float
    verdict: str
    note: str
    under: dict[str, Interval]
    last_round: int | None
    n_planned: int


def verdict(effect: Interval, outcome: Outcome, *, equivalence: float = math.nan) -> tuple[str, str]:
    """Verdict on an outcome from its interval alone, and why.

    With e the effect counted in the expected direction: supported if all of the interval lies above the margin,
    contradicted if all of it lies below, inconclusive otherwise. With margin 0 that is the sign. Direction none:
    supported if two one-sided tests place the mean within +-margin at 5%, contradicted if all of the interval lies
    outside it.

    Args:
      effect: over seeds.
      equivalence: p-value of `stats.equivalence_over_seeds`, for direction none.
    """
    if effect.n == 1:
        return DEMONSTRATION, "one seed has no interval"
    if not (math.isfinite(effect.low) and math.isfinite(effect.high)):
        return INCONCLUSIVE, effect.reason or "not measured"
    if outcome.direction == "none":
        if equivalence <= 0.05:
            return SUPPORTED, f"within ±{outcome.margin:g}, p = {equivalence:.2g}"
        outside = effect.low > outcome.margin or effect.high < -outcome.margin
        return (CONTRADICTED, f"outside ±{outcome.margin:g}") if outside else (INCONCLUSIVE, "")
    sign = 1 if outcome.direction == "up" else -1
    low, high = sorted((sign * effect.low, sign * effect.high))
    if low > outcome.margin:
        return SUPPORTED, ""
    if high < outcome.margin:
        return CONTRADICTED, "against expectation" if high < 0 else f"smaller than the {outcome.margin:g} that counts"
    return INCONCLUSIVE, ""


def judge(about: Mapping[str, Any], rows: pd.DataFrame) -> Finding | None:
    """The primary outcome of a scenario's table with its verdict; None where the file names none."""
    if about["primary"] is None:
        return None
    outcome = Outcome.model_validate(about["primary"])
    effect, p, last = observe(about, rows, outcome)
    word, note = verdict(effect, outcome, equivalence=p)
    planned = _n_planned(about)
    if effect.n > 1 and word in (SUPPORTED, CONTRADICTED) and (lacks := _lacks(about, rows, outcome, effect)):
        # Seeds and rounds could be added, or left out, until an interval clears its margin.
        word, note = INCONCLUSIVE, f"{lacks}; on them {word}"
    if word == SUPPORTED and outcome.direction == "none" and about["as_observed"][0]:
        # An instrument that misses half of a persona shows half of what she loses.
        word, note = INCONCLUSIVE, f"{note}, as observed; the margin is of corrected shares, and the error is not known"
    contrasts: Mapping[str, str | None] = about["twins"] or {}
    if word == SUPPORTED and (unplayed := [audience for audience, contrast in contrasts.items() if contrast is None]):
        word, note = INCONCLUSIVE, f"not played under {' and '.join(unplayed)}"
    twins = {audience: _instead(outcome, contrast) for audience, contrast in contrasts.items() if contrast}
    under = {audience: observe(about, rows, twin)[0] for audience, twin in twins.items()}
    # A sign is one that the interval shows: of two contrasts around 0 one in four has it by chance.
    few = [a for a, i in under.items() if _lacks(about, rows, twins[a], i)]
    missing = [a for a, i in under.items() if a in few or not min(i.low * effect.value, i.high * effect.value) > 0]
    if word == SUPPORTED and missing:
        whole = [a for a in missing if a not in few]
        opposite = [a for a in whole if max(under[a].low * effect.value, under[a].high * effect.value) < 0]
        unseen = [a for a in whole if a not in opposite]
        says = (
            ("the sign is not shown", unseen),
            ("the opposite sign is shown", opposite),
            ("seeds or rounds are missing", few),
        )
        note = "; ".join(f"{what} under {' and '.join(which)}" for what, which in says if which)
        # That it is not shown there is no evidence that it is not there; that the effect is smaller there is.
        smaller = [a for a in whole if _less(about, rows, outcome, twins[a])]
        word = REQUEST_ALONE if "no_request" in smaller else INCONCLUSIVE
        note += f"; shown to be smaller under {' and '.join(smaller)}" if smaller else ""
        if word == REQUEST_ALONE:
            rest = under["no_request"].high if outcome.direction == "up" else under["no_request"].low
            note += f", where without the request it may still be {rest:+.3f}" if rest * effect.value > 0 else ""
    if about["learner"] in SMALL and about["name"] not in MECHANICS:
        word, note = (
            MECHANICS_ONLY,
            f"{about['learner']} cannot support it; by its numbers {word}" + (f": {note}" if note else ""),
        )
    return Finding(outcome, effect, noise_floor(about, rows, outcome), word, note, under, last, planned)


def _n_planned(about: Mapping[str, Any]) -> int:
    return max(len(about["planned"]), len(about["seeds"]))


def _lacks(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome, effect: Interval) -> str:
    """Which of the planned seeds and rounds an outcome is of, where it is not of these; "" where it is."""
    planned, last, final = _n_planned(about), _last(about, rows, outcome), max(_rounds(about, outcome), default=None)
    lacks = [f"{effect.n} of the {planned} planned seeds"] if effect.n < planned else []
    beyond = [str(s) for s in about["seeds"] if s not in about["planned"]]
    lacks += [f"with seeds that were not planned ({', '.join(beyond)})"] if beyond else []
    return "; ".join(lacks + ([f"round {last} of {final}"] if last != final else []))


def _instead(outcome: Outcome, contrast: str) -> Outcome:
    """The same outcome of another contrast; one arm alone is held against its own round 0."""
    of = outcome.of if " - " in contrast else "change"
    return Outcome.model_validate(outcome.model_dump() | {"contrast": contrast, "of": of})


def _less(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome, other: Outcome) -> bool:
    """Whether the interval over seeds shows the other effect to lie further down the expected direction."""
    ours, theirs = _by_seed(about, rows, outcome), _by_seed(about, rows, other)
    sign = 1 if outcome.direction == "up" else -1
    difference = np.array([sign * (ours[s] - theirs[s]) for s in sorted(ours) if s in theirs])
    return bool(analysis.over_seeds(difference)[0].low > 0)


def explore(about: Mapping[str, Any], rows: pd.DataFrame) -> list[Finding]:
    """The exploratory outcomes; without a verdict, the note says what is against expectation or shown to be within."""
    found = []
    for plain, as_observed in zip(about["exploratory"], about["as_observed"][1:], strict=True):
        outcome = Outcome.model_validate(plain)
        effect, p, last = observe(about, rows, outcome)
        word, note = verdict(effect, outcome, equivalence=p)
        within = word == SUPPORTED and outcome.direction == "none"
        shown = (within or word == CONTRADICTED) and not _lacks(about, rows, outcome, effect)
        note = note + (", as observed" if within and as_observed else "") if shown else ""
        floor = noise_floor(about, rows, outcome)
        found.append(Finding(outcome, effect, floor, "", note, {}, last, _n_planned(about)))
    return found


def observe(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome) -> tuple[Interval, float, int | None]:
    """An outcome over seeds: its interval, the p-value of equivalence within its margin, and the final round."""
    v = np.array(list(_by_seed(about, rows, outcome).values()), dtype=float)
    effect, _ = analysis.over_seeds(v)
    tested = outcome.margin > 0 and math.isfinite(effect.low)
    equivalence = stats.equivalence_over_seeds(v, outcome.margin) if tested else math.nan
    return effect, equivalence, _last(about, rows, outcome)


def _by_seed(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome) -> dict[int, float]:
    """Seed -> effect, without seeds that lack a part of it; of a factor 0, 1, ... -> effect, in the order of seeds."""
    if of_factor(outcome, about["levels"]):
        found = {e.name: e for e in factorial(about, rows, outcome)}
        return dict(enumerate(found[outcome.factor[0]].by_seed))
    last, sides, seeds = _paired(about, rows, outcome)

    def of(side: dict[int, Levels], s: int) -> float:
        return side[s][last][0] - (side[s][0][0] if outcome.of == "change" else 0.0)

    return {s: math.fsum(k * of(side, s) for k, side in zip(outcome.terms.values(), sides, strict=True)) for s in seeds}


def _paired(
    about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome
) -> tuple[int, list[dict[int, Levels]], list[int]]:
    """The final round; levels of it and of round 0 by seed, per arm of a contrast; the seeds that have all it takes.

    Nothing is measured after round 0: 0, no levels and no seeds.
    """
    last = _last(about, rows, outcome) or 0
    if last == 0:
        return 0, [], []
    sides = [_levels(rows, outcome, arm, (0, last)) for arm in outcome.terms]
    takes = {0, last} if outcome.of == "change" else {last}
    return last, sides, [s for s in sorted(sides[0]) if all(takes <= {*side.get(s, ())} for side in sides)]


def noise_floor(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome) -> float:
    """Mean |effect| over the seeds of `observe` if every model were measured twice; an effect no larger is counting.

    From the limits in the table; arms that share their round 0 share one measurement of it, which cancels, and so do
    cells of a factorial whose readings all agree, because a factor has nothing to act on there. Of a factor: half an
    output's smoothing apart, a logit has the variance of the share over (p * (1 - p))**2.

    Returns:
      In the unit of the effect; nan without a seed, and where a number has no interval (distinct_4).
    """
    last = _last(about, rows, outcome)
    if last is None or last == 0:
        return math.nan
    if of_factor(outcome, about["levels"]):
        cells, seeds = _of_cells(about, rows, outcome, (last,))
        told = _told(rows, last, outcome.population)
        n_outputs, variances = _outputs(about, rows, outcome, last), []
        for s in seeds:
            readings: dict[Any, tuple[float, float]] = {}  # what a model was read as -> how often it counts, variance
            for arm, c in cells.items():
                sign = 2 * about["levels"][arm][outcome.factor[0]] - 1
                counts, _ = readings.get(told[arm, s], (0.0, 0.0))
                readings[told[arm, s]] = (counts + 2 * sign / len(cells), _logit_variance(*c[s][last], n_outputs))
            variances.append(math.fsum(k * k * variance for k, variance in readings.values()))
    else:
        begun = _begun(rows)
        _, sides, seeds = _paired(about, rows, outcome)
        variances = []
        for s in seeds:
            starts: dict[tuple[Any, ...], float] = {}  # round 0, variance of its reading -> how often it counts
            for (arm, sign), side in zip(outcome.terms.items(), sides, strict=True) if outcome.of == "change" else ():
                start = (begun.get((arm, s)), *side[s][0])
                starts[start] = starts.get(start, 0) - sign
            ends = math.fsum(side[s][last][1] for side in sides)
            variances.append(ends + math.fsum(k * k * variance for (*_, variance), k in starts.items()))
    if not variances:
        return math.nan
    return stats.remeasurement_noise_floor(math.sqrt(math.fsum(variances)) / len(variances), 0.0)


def _told(rows: pd.DataFrame, t: int, population: str) -> dict[tuple[str, int], frozenset[Any]]:
    """(arm, seed) -> all that round t's probes and a population were read as; where nothing differs they are one."""
    at = rows[(rows["round"] == t) & rows["population"].isin(("probes", population)) & rows["value"].notna()]
    key = ["population", "metric", "stratum", "value"]
    return {
        (str(arm), int(seed)): frozenset(one[key].itertuples(index=False, name=None))
        for (arm, seed), one in at.groupby(["arm", "seed"])
    }


def _logit_variance(share: float, variance: float, n_outputs: float) -> float:
    v = (share * n_outputs + 0.5) / (n_outputs + 1)
    return variance / (v * (1 - v)) ** 2


def _rounds(about: Mapping[str, Any], outcome: Outcome) -> set[int]:
    """Rounds in which every arm that an outcome takes is to be measured."""
    return set.intersection(*(set(about["measured"][arm]) for arm in arms_of(outcome, about["levels"])))


def _last(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome) -> int | None:
    """The last of those that each of these arms has reached; None if one has no round at all."""
    arms = arms_of(outcome, about["levels"])
    reached = rows[rows["arm"].isin(arms)].groupby("arm")["round"].max()
    if len(reached) < len(arms):
        return None
    return max((t for t in _rounds(about, outcome) if t <= reached.min()), default=None)


def _begun(rows: pd.DataFrame) -> dict[tuple[str, int], analysis.Start]:
    """(arm, seed) -> what its run began with; see `analysis.begun_with`."""
    of_run = rows.drop_duplicates("run").set_index("run")[["arm", "seed"]]
    begun = analysis.begun_with(rows.rename(columns={"metric": "name", "round": "round_index"}))
    return {(str(of_run.at[run, "arm"]), int(of_run.at[run, "seed"])): start for run, start in begun.items()}


def _levels(rows: pd.DataFrame, outcome: Outcome, arm: str, rounds: Sequence[int]) -> dict[int, Levels]:
    """Seed -> round -> weighted sum of the metrics, where all of them are measured, and its variance of measurement."""
    at = rows[
        (rows["arm"] == arm)
        & (rows["population"] == outcome.population)
        & (rows["stratum"] == (outcome.stratum or ""))
        & rows["metric"].isin(outcome.parts)
        & rows["round"].isin(rounds)
    ]
    w = np.array(list(outcome.parts.values()))
    # Shares of personas are of the same texts; other sums are not known to be.
    together = all(name.startswith("frequency") for name in outcome.parts)
    found: dict[int, Levels] = {}
    for (seed, t), group in at.groupby(["seed", "round"]):
        one = group.set_index("metric").reindex(list(outcome.parts))
        p, se = one["value"].to_numpy(float), analysis.standard_error(one["low"], one["high"]).to_numpy(float)
        total = float(w @ p)
        if math.isfinite(total):
            # Where every share is 0 or 1 the texts say nothing of each other.
            n = float(p @ (1 - p)) / float(se @ se) or math.inf if together and se.all() else math.inf
            found.setdefault(int(seed), {})[int(t)] = (total, analysis.variance_of_sum(w, p, se, n))
    return found


def _of_cells(
    about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome, rounds: Sequence[int]
) -> tuple[dict[str, dict[int, Levels]], list[int]]:
    """Levels in some rounds of the cells that a factor's outcome takes, by seed; seeds that have the last in all."""
    cells = {arm: _levels(rows, outcome, arm, rounds) for arm in arms_of(outcome, about["levels"])}
    having = ({s for s, levels in cell.items() if rounds[-1] in levels} for cell in cells.values())
    return cells, sorted(set.intersection(*having))


def _factors(about: Mapping[str, Any]) -> list[str]:
    levels = about["levels"]
    return list(next(iter(levels.values()))) if levels else []


def factorial(
    about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome, *, of_share: bool = False
) -> list[analysis.Effect]:
    """Main effects and two-way interactions of a factorial sweep on the final level of a share; see analysis.

    Of an outcome with a factor given, those of the other factors in the half of the cells where that one is high.

    Args:
      of_share: effects on the share, in place of its log odds.

    Raises:
      ValueError: if the metric is a weighted sum, whose logit means nothing.
    """
    if len(outcome.parts) != 1:
        raise ValueError(f"metric of a factorial must be one share, got {', '.join(outcome.parts)}")
    n_outputs = None if of_share else _outputs(about, rows, outcome, _last(about, rows, outcome))
    factors = [f for f in _factors(about) if f != outcome.factor[1]]
    return analysis.factorial(factors, _cells(about, rows, outcome), n_outputs=n_outputs)


def _cells(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome) -> dict[tuple[int, ...], dict[int, float]]:
    """Levels of a factorial's factors, less one that is given -> seed -> final level of the outcome's metric."""
    last = _last(about, rows, outcome)
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for arm in arms_of(outcome, about["levels"]):
        at = {} if last is None else _levels(rows, outcome, arm, (last,))
        level = tuple(k for f, k in about["levels"][arm].items() if f != outcome.factor[1])
        found[level] = {s: v[last][0] for s, v in at.items() if last is not None}
    return found


def _outputs(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome, last: int | None) -> float:
    arms = arms_of(outcome, about["levels"])
    at = rows[(rows["population"] == outcome.population) & (rows["stratum"] == (outcome.stratum or ""))]
    at = at[at["metric"].isin(outcome.parts) & (at["round"] == last) & at["arm"].isin(arms)]
    return float(at["n"].median())


# The page -----------------------------------------------------------------------------------------------------------


def summary(sweep: Sweep) -> list[str]:
    """What a finished sweep says, in a few lines; [] where nothing is played or nothing was asked."""
    table = gather(sweep)
    others = ", ".join(path.name for path in strangers(sweep))
    lines = [f"{sweep.name}: left out, played with another config: {others}"] if others else []
    if table is None:
        return lines
    rows = table.to_pandas()
    about = json.loads(table.schema.metadata[META])
    found = judge(about, rows)
    if found is not None:
        lines.append(f"{_title(about)}: {_asked(found.outcome)}: {_interval(found.effect)} over {found.effect.n} "
                     f"seeds, noise floor {_floor(found.floor)}; verdict: {found.verdict}{_why(found)}")  # fmt: skip
    for other in explore(about, rows):
        lines.append(f"  exploratory: {_asked(other.outcome)}: {_observed(other)}, noise floor {_floor(other.floor)}"
                     f"{_why(other)}")  # fmt: skip
    return lines


def page(folder: Path) -> str:
    """docs/findings.md, from the tables in a folder and nothing else."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        about, rows = read(path)
        found.append((about, rows, judge(about, rows)))
    lines = [
        "# Findings",
        "",
        "Written by `loop findings` from the tables in `docs/findings/` alone (the runs behind them are played by",
        "`make scenarios` with `SIZE=` toy, tiny or cpu, those of `channels` and `numerics` by `loop sweep` of",
        "`configs/sweeps/`); [findings-in-words.md](findings-in-words.md) says what they mean and leave open. The",
        "verdict on a scenario follows from its one primary outcome; everything else is exploratory.",
        "Intervals are 95%, Student over seeds, arms paired by seed. At `toy` and `tiny` a scenario has a verdict if",
        f"it asks how the loop works ({', '.join(MECHANICS)});",
        "where it asks what personas do it says mechanics only.",
        "Floor: the mean |effect| that measuring the same models twice would show, 0.8 of its standard deviation: an",
        "effect no larger tells nothing; one in twenty of such exceeds 2.5 floors. Where readings are corrected",
        "(SmolLM2's alone: the toy's have no error, tiny's stay as observed), one table of instrument errors serves",
        "all seeds and arms: the error of that table is in no interval here. Means are over the seeds an effect is",
        "of, from round 0 to the final one, arms in the order of the contrast; of a factor where it is high, then low.",
        "Where a primary outcome was changed after numbers of another had been seen, `CHANGELOG.md` says from what to",
        "what, and when.",
        f"{NOTHING}: not measured, or nothing there to measure.",
        "",
    ]
    if not found:
        return "\n".join([*lines, "No scenario is played yet.", ""])
    lines += [
        "| scenario | learner | seeds | expected | observed | floor | detectable | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for about, rows, main in found:
        power = about["power"]
        cells = [
            f"[{_title(about)}](#{_anchor(about)})",
            about["learner"],
            str(len(about["seeds"]) if main is None else main.effect.n),
            _cell(about["expected"]),
            NOTHING if main is None else _interval(main.effect) + _of_share(about, rows, main.outcome),
            NOTHING if main is None else _floor(main.floor),
            NOTHING if not power or power["detectable"] is None else f"{power['detectable']:.3f}",
            f"**{DEMONSTRATION if main is None else main.verdict}**",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for about, rows, main in found:
        lines += _section(about, rows, main)
    return "\n".join([*lines, ""])


def _section(about: Mapping[str, Any], rows: pd.DataFrame, main: Finding | None) -> list[str]:
    lines = ["", f"## {_title(about)}", ""]
    for head in ("question", "expected", "why"):
        if about[head]:
            lines.append(f"- {head.capitalize()}: {about[head]}")
    n_runs = rows["run"].nunique()
    planned = len(about["arms"]) * len(about["seeds"])
    played = f"{n_runs} runs" if n_runs == planned else f"{n_runs} of {planned} runs played"
    lines.append(f"- Learner: {about['learner']}, {about['n_rounds']} feedback rounds, seeds "
                 f"{', '.join(map(str, about['seeds']))}; {played}")  # fmt: skip
    made_by = sorted({made["revision"] for made in about["runs"].values()})
    revisions = [re.sub(r"(?<=^[0-9a-f]{12})[0-9a-f]{28}", "", revision) for revision in made_by]
    lines.append(f"- Played by revision {', '.join(revisions)} of the code")
    lines += _starts(about, rows)
    power = about["power"]
    if power:
        when = "before the run" if power["played"] == 0 else f"when {power['played']} runs were played already"
        if power["detectable"] is None:
            lines.append(f"- Power {power['source']}")  # which says why it is not stated
        else:
            effects = [] if main is None else list(_by_seed(about, rows, main.outcome).values())
            turned_out = f", as played {np.std(effects, ddof=1):.3f}" if len(effects) > 1 else ""
            lines.append(f"- Power, stated {when}: {power['detectable']:.3f} detectable, sd {power['sd']:.3f} at "
                         f"{power['n_seeds']} seeds{turned_out} ({power['source']})")  # fmt: skip
    if main is None:
        lines.append(f"- Verdict: **{DEMONSTRATION}**; the file names no primary outcome")
    else:
        level = about["levels"] or main.outcome.of == "level"  # effects of factors are on the level
        against = "" if level else " against round 0"
        final = "" if main.last_round is None else f", round {main.last_round}{against}"
        paired = "paired " if level or main.outcome.control else ""
        lines.append(f"- Primary: {_asked(main.outcome)}{final}: {_interval(main.effect)} over {main.effect.n} {paired}"
                     f"seeds, noise floor {_floor(main.floor)}")  # fmt: skip
        lines.append(f"- Means: {_means(about, rows, main.outcome)}")
        if not about["levels"]:
            lines += _by_round(about, rows, main.outcome)
        for audience, interval in main.under.items():
            contrast = about["twins"][audience]
            twin = _instead(main.outcome, contrast)
            floor = _floor(noise_floor(about, rows, twin))
            lines.append(f"- The same under {audience}, {contrast}: {_interval(interval, main.n_planned)}, means "
                         f"{_means(about, rows, twin)}, noise floor {floor}")  # fmt: skip
        lines.append(f"- Verdict: **{main.verdict}**{_why(main)}")
        if about["controls"]:
            lines += ["", f"| control | change of {_metric(main.outcome)} | means | floor |", "|---|---|---|---|"]
            for arm in about["controls"]:
                alone = _instead(main.outcome, arm)
                shown = _interval(observe(about, rows, alone)[0], main.n_planned)
                at_chance = _floor(noise_floor(about, rows, alone))
                lines.append(f"| {arm} | {shown} | {_means(about, rows, alone)} | {at_chance} |")
    rest = explore(about, rows)
    if rest:
        lines += ["", "| exploratory | expected | observed | means | floor | |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {_asked(f.outcome)} | {_direction(f.outcome)} | {_observed(f)} | {_means(about, rows, f.outcome)} "
            f"| {_floor(f.floor)} | {f.note} |"
            for f in rest
        ]
    if about["levels"] and main is not None:
        shares = factorial(about, rows, main.outcome, of_share=True)
        lines += ["", "| effect | on log odds | p (Holm) | on the share |", "|---|---|---|---|"]
        for e, share in zip(factorial(about, rows, main.outcome), shares, strict=True):
            p = NOTHING if math.isnan(e.p_holm) else f"{e.p_holm:.2g}"
            lines.append(f"| {e.name} | {_interval(e.interval)} | {p} | {_interval(share.interval)} |")
        values = [v for cell in _cells(about, rows, main.outcome).values() for v in cell.values()]
        if at_end := sum(v in (0, 1) for v in values):
            lines += [
                "",
                f"In {at_end} of {len(values)} cells the share is 0 or 1. There the log odds say how many outputs were "
                "read (half of one is added to each side): effects on them are bounds, interactions with the factor "
                "that makes them 0 or 1 repeat main effects, and the share is the scale to read.",
            ]
    return lines + _beside(about, rows)


def _starts(about: Mapping[str, Any], rows: pd.DataFrame) -> list[str]:
    """Says which arms start from one round 0, told by equal frequencies in each seed that both played.

    Arms of a sweep share it where all that it reads is equal. Where a config differs there, or another processor
    rounded otherwise, they are paired by their seed alone, and the noise of reading round 0 does not cancel. Nothing is
    said where all share it.
    """
    starts: dict[str, dict[int, analysis.Start]] = {}
    for (arm, seed), start in _begun(rows).items():
        starts.setdefault(arm, {})[seed] = start
    groups: list[list[str]] = []
    for arm in (arm for arm in about["arms"] if arm in starts):
        for group in groups:
            both = starts[arm].keys() & starts[group[0]].keys()
            if both and all(starts[arm][seed] == starts[group[0]][seed] for seed in both):
                group.append(arm)
                break
        else:
            groups.append([arm])
    if len(groups) < 2:
        return []
    shared = "; ".join(" and ".join([", ".join(g[:-1]), g[-1]]) for g in groups if len(g) > 1)
    alone = ", ".join(g[0] for g in groups if len(g) == 1)
    if not shared:
        return ["- Round 0: each arm has its own, so that pairs have the seed in common alone"]
    return [f"- Round 0 is one for {shared}" + (f"; of its own for {alone}" if alone else "")]


def _beside(about: Mapping[str, Any], rows: pd.DataFrame) -> list[str]:
    """What was paid (an input) and health, by arm; empty for a factorial."""
    if about["levels"]:
        return []
    return _paid(about, rows) + _done(about, rows) + _health(about, rows)


def _paid(about: Mapping[str, Any], rows: pd.DataFrame) -> list[str]:
    names = sorted(n for n in rows["metric"].unique() if n.startswith("differential/"))
    if not names:
        return []
    # What was paid before the final round could move it.
    before = rows[rows["metric"].isin(names) & (rows["round"] < int(rows["round"].max()))]
    rounds = ", ".join(map(str, sorted(before["round"].unique())))

    def mean(arm: str, name: str) -> str:
        found = before[(before["arm"] == arm) & (before["metric"] == name)].dropna(subset="value")
        return f"{found['value'].mean():.3f} ({found['n'].sum():.0f})" if len(found) else NOTHING

    return [
        *_by_arm("arm, means over seeds", about["arms"], names, mean),
        "",
        f"The differential is an input: what the audience paid, mean 1; read in round {rounds}, in brackets the texts. "
        "An audience that is null pays nobody, and what it shows is chance.",
    ]


def _done(about: Mapping[str, Any], rows: pd.DataFrame) -> list[str]:
    """What filter and step did and whether asking works, by arm; empty where no arm has any of them."""
    keys = zip(rows["metric"], rows["population"], rows["stratum"], strict=True)
    here = rows[[_is_done(*key) is not None for key in keys]]
    last = here.groupby("arm")["round"].max().to_dict()  # a run that lends its outputs may end before the others
    here = here.dropna(subset="value")
    if here.empty:
        return []
    said = {m: _is_done(m, p, s) for m, p, s in zip(here["metric"], here["population"], here["stratum"], strict=True)}

    def course(arm: str, name: str) -> str:
        at = here[(here["arm"] == arm) & (here["metric"] == name)]
        start, end = (at.loc[at["round"] == t, "value"] for t in (0, last.get(arm, 0)))
        both = NOTHING if start.empty else f"{start.mean():.3f}", NOTHING if end.empty else f"{end.mean():.3f}"
        if last.get(arm) == 0 and not end.empty:
            return f"{both[1]} ({len(end)})"
        return NOTHING if both == (NOTHING, NOTHING) else f"{' → '.join(both)} ({len(end)})"

    most = max(last.values())
    ends = ", ".join([str(most), *(f"{t} of {arm}" for arm, t in last.items() if t != most)])
    alike = {what: [n for n in sorted(said) if said[n] == what] for what in said.values()}
    told = "; ".join(sorted(f"{', '.join(names)}: {what}" for what, names in alike.items()))
    return [
        *_by_arm("arm, means over seeds", about["arms"], sorted(said), course),
        "",
        f"As observed in round 0 → {ends}, in brackets the seeds that have the number then. {told}.",
        *_filter_error(rows),
    ]


def _filter_error(rows: pd.DataFrame) -> list[str]:
    """What the filter is stated to do on texts that it was not fitted on, before any training; empty without one."""
    at = rows[(rows["population"] == "heldout") & rows["metric"].str.startswith(OF_FILTER)]
    if at.empty:
        return []
    told = ", ".join(
        f"{metric} {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        for metric, one in at.drop_duplicates("metric").set_index("metric").iterrows()
    )
    return ["", f"The filter on held-out documents of the grammar, as stated once of the untouched base: {told}."]


def _health(about: Mapping[str, Any], rows: pd.DataFrame) -> list[str]:
    """Health of the final round by arm: its difference to the control, paired by seed, and in brackets the mean."""
    at = rows[(rows["round"] == int(rows["round"].max())) & rows["value"].notna() & (rows["stratum"] == "")]
    at = at[[key in HEALTH for key in zip(at["metric"], at["population"], strict=True)]]
    names = [n for n, _ in HEALTH if n in set(at["metric"])]
    if not names:
        return []
    control, why = _health_control(about, set(at["arm"]))

    def against(arm: str, name: str) -> str:
        v, base = (at[(at["arm"] == who) & (at["metric"] == name)].set_index("seed")["value"] for who in (arm, control))
        if v.empty:
            return NOTHING
        if arm == control or control is None:
            return f"{v.mean():.3f}"
        difference = (v - base).dropna().sort_index()
        return f"{_interval(analysis.over_seeds(difference.to_numpy(float))[0])} ({v.mean():.3f})"

    return _by_arm(f"health, {why}", about["arms"], names, against)


def _by_arm(head: str, arms: Sequence[str], names: Sequence[str], cell: Callable[[str, str], str]) -> list[str]:
    """A table of the page: a row per arm, a column per name."""
    lines = ["", f"| {head} | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    return lines + [f"| {arm} | " + " | ".join(cell(arm, name) for name in names) + " |" for arm in arms]


def _health_control(about: Mapping[str, Any], played: set[str]) -> tuple[str | None, str]:
    """The arm that health is read against, and in words: real_only, else the first control that is played."""
    if "real_only" in played:
        return "real_only", "difference to real_only (mean)"
    primary = None if about["primary"] is None else Outcome.model_validate(about["primary"]).control
    control = next((arm for arm in (*about["controls"], primary) if arm in played), None)
    if control is None:
        return None, "means; there is no control here"
    return control, f"difference to {control} (mean); there is no real_only here"


def _title(about: Mapping[str, Any]) -> str:
    return str(about["name"]) + (f" ({about['size']})" if about["size"] else "")


def _anchor(about: Mapping[str, Any]) -> str:
    return _title(about).lower().replace(" ", "-").replace("(", "").replace(")", "")


def _metric(outcome: Outcome) -> str:
    if isinstance(outcome.metric, str):
        text = outcome.metric
    else:
        text = " ".join(
            f"{'-' if c < 0 else '+'} {'' if abs(c) == 1 else f'{abs(c):g} '}{name}"
            for name, c in outcome.parts.items()
        ).removeprefix("+ ")
    where = [outcome.stratum] if outcome.stratum else []
    where += [outcome.population] if outcome.population != "probes" else []
    return f"{text} ({', '.join(where)})" if where else text


def _asked(outcome: Outcome) -> str:
    return f"{_metric(outcome)}, {outcome.contrast}"


def _means(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome) -> str:
    """Mean of an outcome's metric in round 0 and in the final one, per arm of its contrast, over the seeds it is of.

    Of a factor, over the cells where it is high, then over those where it is low.
    """
    if of_factor(outcome, about["levels"]):
        last = _last(about, rows, outcome) or 0
        cells, seeds = _of_cells(about, rows, outcome, (0, last))
        level = {arm: about["levels"][arm][outcome.factor[0]] for arm in cells}
        sides = [[cell for arm, cell in cells.items() if level[arm] == wanted] for wanted in (1, 0)]
    else:
        last, single, seeds = _paired(about, rows, outcome)
        sides = [[side] for side in single]

    def mean(side: list[dict[int, Levels]], t: int) -> str:
        found = [cell[s][t][0] for cell in side for s in seeds if t in cell[s]]
        return f"{math.fsum(found) / len(found):.3f}" if found else NOTHING

    return "; ".join(f"{mean(side, 0)} → {mean(side, last)}" for side in sides) if seeds and last else NOTHING


def _by_round(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome) -> list[str]:
    """Means over the seeds of the effect, in the measured rounds of its arms; empty where those are the ends alone."""
    last, _, seeds = _paired(about, rows, outcome)
    told = []
    for arm in outcome.terms:
        measured = [t for t in about["measured"][arm] if t <= last]
        levels = _levels(rows, outcome, arm, measured)
        found = {t: [levels[s][t][0] for s in seeds if t in levels.get(s, ())] for t in measured}
        if sum(map(bool, found.values())) > 2:
            told.append(f"{arm} " + ", ".join(f"{t}: {math.fsum(v) / len(v):.3f}" for t, v in found.items() if v))
    return [f"- By round: {'; '.join(told)}"] if told else []


def _direction(outcome: Outcome) -> str:
    if outcome.direction == "none":
        return f"within ±{outcome.margin:g}"
    return outcome.direction + (f" by {outcome.margin:g}" if outcome.margin else "")


def _of_share(about: Mapping[str, Any], rows: pd.DataFrame, outcome: Outcome) -> str:
    """Says of a factor's effect, which is in log odds, what it is on the share; "" of any other."""
    if not of_factor(outcome, about["levels"]):
        return ""
    found = {e.name: e.interval for e in factorial(about, rows, outcome, of_share=True)}
    return f" log odds; {_interval(found[outcome.factor[0]])} of the share"


def _observed(found: Finding) -> str:
    return _interval(found.effect, found.n_planned)


def _floor(floor: float) -> str:
    return NOTHING if math.isnan(floor) else f"{floor:.3f}"


def _interval(i: Interval, n_planned: int = 0) -> str:
    if not math.isfinite(i.value):
        return "not measured"
    of = f" ({i.n} of {n_planned} seeds)" if i.n < n_planned else ""
    if not math.isfinite(i.low):
        return f"{i.value:+.3f} (no interval: {i.reason}){of}"
    return f"{i.value:+.3f} [{i.low:+.3f}, {i.high:+.3f}]{of}"


def _why(found: Finding) -> str:
    return f" ({found.note})" if found.note else ""


def _cell(text: str | None) -> str:
    return " ".join((text or NOTHING).split()).replace("|", "/")
