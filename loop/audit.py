"""Audits: a few texts read by somebody who is no instrument, and what they say of the frequencies of all.

An instrument's error is known for the texts it was measured on; training on itself changes a model's texts. A person
who labels some texts of this very run assumes nothing about the instrument. `export` writes the sheet to fill in,
`read_sheet` takes it back, `estimate` weighs it up to the headline's population.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loop import config, records, rng, stats
from loop.records import PERSONAS, UNKNOWN, UNREQUESTED, Sample
from loop.store import RunStore
from loop.world import Labels

SAID = (*PERSONAS, UNKNOWN)  # what an instrument may say, and an auditor: "unknown" is a text in no persona's voice
COLUMNS = ("run", "audit", "round", "id", "inclusion", "stratum", "prompt", "completion", "label")
MINIMUM = 8  # texts per round and instrument label: what `stats.coverage_study` shows to cover
_FORMULA = ("=", "+", "-", "@")
_WORDS = re.compile(r"\w+")


class AuditError(ValueError):
    """A sheet that cannot be used; one line per problem."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class Text:
    """A public text of a run, as an audit needs it.

    Attributes:
      id, round_index, stratum, template_id: of the sample.
      prompt: last turn of the prompt, "" for a plain document.
      completion: the text.
      label: what the persona instrument said.
      proba: probability it gave each of PERSONAS, shape (n_personas,).
      weight: share of the round's headline frequency that hangs on this text; > 0, they sum to 1 over a round.
      known: the persona, where the learner knows it.
    """

    id: str
    round_index: int
    stratum: str
    template_id: str
    prompt: str
    completion: str
    label: str
    proba: tuple[float, ...]
    weight: float
    known: str | None


@dataclass(frozen=True, slots=True)
class Audited:
    """One persona's frequency in one round, as counted and as audited; a row of audit.parquet.

    Attributes:
      round_index: -1 for the baseline.
      population: "probes" or "samples".
      persona: one of `said_of` the run.
      observed, observed_low, observed_high: as counted by the instrument, clustered by prompt template.
      audited, low, high: `stats.post_stratified_audit`; null where not measured.
      ppi, ppi_low, ppi_high: `stats.ppi_plus_plus` on the same labels, as a cross-check; null where not measured.
      n_texts, n_audited: texts of the round in the headline's population, and those with an auditor's label.
      reason: why something is null.
    """

    round_index: int
    population: str
    persona: str
    observed: float | None
    observed_low: float | None
    observed_high: float | None
    audited: float | None
    low: float | None
    high: float | None
    ppi: float | None
    ppi_low: float | None
    ppi_high: float | None
    n_texts: int
    n_audited: int
    reason: str | None


# Which texts


def texts_of(run_dir: Path | str, round_index: int, population: str) -> list[Text]:
    """Returns the texts behind the headline frequency of a round, each with its weight in it.

    Probes of stratum s weigh mixture[s] / n_s, where `measure.mixture` of the config weighs the unrequested strata;
    samples count alike, whatever stratum users asked. So a frequency is sum(weight * [persona]).

    Args:
      population: "probes" or "samples".

    Raises:
      ValueError: no such run, round or population, or a stratum of positive weight without a text.
    """
    if population not in ("probes", "samples"):
        raise ValueError(f"population must be probes or samples, got {population!r}")
    run = RunStore(run_dir)
    name = f"{population}.parquet"
    if name not in run.files(round_index):
        raise ValueError(f"round must hold {population}, got none at {_round_name(round_index)} of {run_dir}")
    samples = records.from_table(run.read_table(round_index, name), Sample)
    labels = Labels.from_table(run.read_table(round_index, "labels.parquet"))
    row = {i: k for k, (i, p) in enumerate(zip(labels.ids, labels.population, strict=True)) if p == population}
    mixture = _mixture(run, population)
    strata = set(UNREQUESTED) if mixture is None else {s for s, w in mixture.items() if w > 0}
    kept = [s for s in samples if s.stratum in strata]
    n = Counter(s.stratum for s in kept)
    for stratum in strata if mixture is not None else ():
        if not n[stratum]:
            raise ValueError(
                f"probes must hold stratum {stratum}, which measure.mixture weighs, got none at "
                f"{_round_name(round_index)} of {run_dir}; this round was not measured"
            )
    return [
        Text(
            s.id,
            round_index,
            s.stratum,
            s.template_id,
            s.prompt[-1] if s.prompt else "",
            s.completion,
            labels.persona[row[s.id]] or UNKNOWN,
            tuple(labels.proba[row[s.id]].tolist()),
            1 / len(kept) if mixture is None else mixture[s.stratum] / n[s.stratum],
            s.persona_known,
        )
        for s in kept
    ]


def _mixture(run: RunStore, population: str) -> dict[str, float] | None:
    if population == "samples":
        return None
    mixture = config.of_run(run).measure.mixture
    total = math.fsum(mixture.values())
    return {stratum: w / total for stratum, w in mixture.items()}


def said_of(run_dir: Path | str) -> tuple[str, ...]:
    """What the instrument of a run may say, and its auditor: SAID, and before "unknown" personas of the user's own."""
    return (*config.of_run(RunStore(run_dir)).personas, UNKNOWN)


def draw(texts: Sequence[Text], n: int, *, rng: np.random.Generator) -> list[Text]:
    """Draws texts to audit, stratified by round and instrument label, in an order that shows neither.

    Every round gets an equal part of `n`, within it every label in proportion to the square root of its texts and at
    least MINIMUM (all, where it has fewer), so that more than `n` may come back. Within a round and label every text is
    as likely as any other: see `inclusion`.

    Args:
      texts: of one round or several.
      n: texts to draw, >= 1.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    chosen: list[Text] = []
    rounds = sorted({t.round_index for t in texts})
    labels = (*SAID, *sorted({t.label for t in texts} - {*SAID}))
    for k, round_index in enumerate(rounds):
        here = [[t for t in texts if t.round_index == round_index and t.label == label] for label in labels]
        part = (k + 1) * n // len(rounds) - k * n // len(rounds)
        for group, size in zip(here, stats.audit_allocation([len(g) for g in here], part, MINIMUM), strict=True):
            chosen += [group[i] for i in rng.permutation(len(group))[:size]]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def inclusion(texts: Sequence[Text], audited: Sequence[str]) -> dict[str, float]:
    """Returns the probability with which each audited text was drawn: drawn / all of its round and instrument label."""
    ids = set(audited)
    all_of = Counter((t.round_index, t.label) for t in texts)
    drawn = Counter((t.round_index, t.label) for t in texts if t.id in ids)
    return {t.id: drawn[t.round_index, t.label] / all_of[t.round_index, t.label] for t in texts if t.id in ids}


# What they say


def estimate(
    texts: Sequence[Text],
    labels: Mapping[str, str],
    *,
    population: str,
    rng: np.random.Generator,
    said: Sequence[str] = SAID,
    level: float = 0.95,
) -> list[Audited]:
    """Estimates each persona's headline frequency per round from an auditor's labels.

    Post-stratified by instrument label: frequency = sum over labels l of q[l] * theta[l, persona], with q the weighted
    share of the round's texts that the instrument called l and theta the audited share of the persona among them, each
    audited text counting weight / inclusion. Texts of one prompt template resemble each other: both counts are divided
    by `stats.audit_design_effect`, so that the interval is of the model and not of these templates.

    PPI++ is fed the instrument's probabilities and, for every audited text, its label times its share of the headline
    over its chance of being drawn. It ignores the stratification, which widens its interval, and the templates, which
    narrow it.

    Args:
      texts: all texts of the rounds, from `texts_of`.
      labels: text id -> auditor's label, one of `said`, for some of them.
      population: what the texts are, for the rows.
      rng: draws of the posterior.
      said: see `said_of`.
      level: coverage, in (0, 1).

    Returns:
      A row per round and persona, `said` in order.

    Raises:
      ValueError: a label that is none of `said`, or of a text that is not there.
    """
    known = {t.id for t in texts}
    for i, label in labels.items():
        if i not in known or label not in said:
            raise ValueError(f"labels must be of known texts and among {', '.join(said)}, got {label!r} for {i!r}")
    chance = inclusion(texts, list(labels))
    rows: list[Audited] = []
    for round_index in sorted({t.round_index for t in texts}):
        here = [t for t in texts if t.round_index == round_index]
        seen = [t for t in here if t.id in labels]
        observed = [_observed(here, persona, population, level) for persona in said]
        weight = np.array([t.weight for t in here])
        read = np.array([said.index(t.label) for t in here])
        shares = np.bincount(read, weights=weight, minlength=len(said)) / weight.sum()
        pull = np.array([t.weight / chance[t.id] for t in seen])  # what an audited text stands for
        truth = [said.index(labels[t.id]) for t in seen]
        audited = stats.post_stratified_audit(
            shares * float(weight.sum() ** 2 / (weight @ weight)),  # Kish's number of texts
            [said.index(t.label) for t in seen],
            truth,
            n_personas=len(said),
            rng=rng,
            inclusion=pull.min() / pull if len(pull) else None,
            design_effect=stats.audit_design_effect(
                read,
                [t.template_id for t in here],
                [i for i, t in enumerate(here) if t.id in labels],
                truth,
                n_labels=len(said),
                n_personas=len(said),
                weights=weight,
                strata=None if population == "samples" else [t.stratum for t in here],  # users choose what they ask
            ),
            level=level,
        )
        missing = [label for k, label in enumerate(said) if shares[k] > 0 and not any(t.label == label for t in seen)]
        for k, persona in enumerate(said):
            ppi = _ppi(here, seen, labels, pull, persona, level)
            reason = audited[k].reason
            if reason and seen and missing:
                reason = f"no audited text that the instrument called {missing[0]}"
            rows.append(
                Audited(
                    round_index,
                    population,
                    persona,
                    *_three(observed[k]),
                    *_three(audited[k]),
                    *_three(ppi),
                    len(here),
                    len(seen),
                    reason or ppi.reason,
                )
            )
    return rows


def _observed(texts: Sequence[Text], persona: str, population: str, level: float) -> stats.Interval:
    hits = [float(t.label == persona) for t in texts]
    clusters = [t.template_id for t in texts]
    if population == "samples":
        return stats.clustered_share(hits, clusters, level=level)
    mixture: dict[str, float] = {}
    for t in texts:
        mixture[t.stratum] = mixture.get(t.stratum, 0.0) + t.weight
    return stats.mixture_share(hits, clusters, [t.stratum for t in texts], mixture, level)


def _ppi(
    texts: Sequence[Text],
    seen: Sequence[Text],
    labels: Mapping[str, str],
    pull: np.ndarray,
    persona: str,
    level: float,
) -> stats.Interval:
    """PPI++ of sum(weight * [persona]): scaled so that plain means over audited and over other texts estimate it."""
    at = PERSONAS.index(persona) if persona in PERSONAS else None
    guess = {t.id: t.proba[at] if at is not None else float(t.label == persona) for t in texts}
    others = [t for t in texts if t.id not in labels]
    # A text that was not audited stands for others of its label, as an audited one does: weight / (1 - inclusion).
    all_of, left = Counter(t.label for t in texts), Counter(t.label for t in others)
    # A label of which every text was audited has nobody to predict: its truth alone counts, on both sides.
    kept = np.array([float(left[t.label] > 0) for t in seen])
    scaled = pull * len(seen)
    return stats.ppi_plus_plus(
        scaled * np.array([float(labels[t.id] == persona) for t in seen]),
        scaled * kept * np.array([guess[t.id] for t in seen]),
        [t.weight * all_of[t.label] / left[t.label] * len(others) * guess[t.id] for t in others],
        level,
    )


def _three(interval: stats.Interval) -> tuple[float | None, float | None, float | None]:
    value, low, high = (float(x) if math.isfinite(x) else None for x in (interval.value, interval.low, interval.high))
    return value, low, high


def free(
    run_dir: Path | str, *, n: int = 200, population: str = "probes", rounds: Sequence[int] | None = None, seed: int = 0
) -> list[Audited]:
    """Audits a run whose learner knows its personas: the drawn sheet, labelled with the truth.

    Args:
      run_dir, n, population, rounds, seed: see `export`.

    Raises:
      ValueError: a text whose persona is not known; it takes a person to audit a language model.
    """
    texts = [t for k in _rounds(run_dir, rounds) for t in texts_of(run_dir, k, population)]
    for t in texts:
        if t.known is None:
            raise ValueError(
                f"persona_known must be there for a free audit, got None at {t.id}; use `loop audit export`"
            )
    chosen = draw(texts, n, rng=rng.stream(seed, "audit", -1))
    labels = {t.id: str(t.known) for t in chosen}
    rand = rng.stream(seed, "audit/posterior", -1)
    return estimate(texts, labels, population=population, rng=rand, said=said_of(run_dir))


# The sheet


def export(
    run_dir: Path | str,
    out: Path | str,
    *,
    n: int = 200,
    population: str = "probes",
    rounds: Sequence[int] | None = None,
    seed: int = 0,
) -> int:
    """Writes a sheet to fill in: CSV, one text a row, column `label` empty; and <out>.json, which pins it to the run.

    What the instrument said is neither in the sheet nor in its order. The column `inclusion` tells a little: a text
    drawn for certain has a label that is rare in its round.

    Args:
      run_dir: a run.
      out: the CSV to write; it must not be there, for it may hold somebody's labels.
      n: texts, about; see `draw`.
      population: "probes" (the headline) or "samples".
      rounds: -1 for the baseline; default: all rounds.
      seed: another one draws other texts.

    Returns:
      Rows written.

    Raises:
      ValueError: the file is there, or see `texts_of`.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"sheet must be a new file, got {out}, which is there; move it away or name another")
    asked = _rounds(run_dir, rounds)
    texts = [t for k in asked for t in texts_of(run_dir, k, population)]
    chosen = draw(texts, n, rng=rng.stream(seed, "audit", -1))
    chance = inclusion(texts, [t.id for t in chosen])
    pin = _identity(run_dir, asked) | {"population": population, "n": n, "seed": seed, "ids": [t.id for t in chosen]}
    pinned = (json.dumps(pin, indent=1, sort_keys=True) + "\n").encode()
    sheet = io.StringIO()
    writer = csv.writer(sheet, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(COLUMNS)
    for t in chosen:
        cells = (pin["run"], _digest(pinned), t.round_index, t.id, f"{chance[t.id]:.6f}", t.stratum)
        writer.writerow([_cell(str(c)) for c in (*cells, t.prompt, t.completion, "")])
    out.parent.mkdir(parents=True, exist_ok=True)
    _pin_path(out).write_bytes(pinned)
    out.write_text(sheet.getvalue(), encoding="utf-8")
    return len(chosen)


def parse_rounds(text: str) -> list[int]:
    """Reads "0,3", "0..3" or "base,2": rounds of a run, -1 for the baseline.

    Raises:
      ValueError: anything else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if first == "base" and not dots:
            found.append(-1)
        elif _decimal(first) and (_decimal(last) or not dots):
            if dots and int(last) < int(first):
                raise ValueError(f"rounds must run upwards, got {part.strip()!r}; write {last}..{first}")
            found += range(int(first), int(last or first) + 1)
        else:
            raise ValueError(f"rounds must read like 0,3 or 0..3 or base, got {part!r}")
    return found


def _decimal(text: str) -> bool:
    """Whether int() reads a text as 0, 1, 2, ...; str.isdigit takes a superscript two for a digit as well."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def _rounds(run_dir: Path | str, rounds: Sequence[int] | None) -> list[int]:
    run = RunStore(run_dir)
    there = run.rounds()
    if rounds is None:
        rounds = there
    if not rounds:
        raise ValueError(f"run must hold a finished round, got none at {run_dir}")
    for k in rounds:
        if k not in there and not (k == -1 and run.has_baseline()):
            raise ValueError(f"rounds must be among those of {run_dir}, {there}, got {k}")
    return sorted(set(rounds))


def _identity(run_dir: Path | str, rounds: Sequence[int]) -> dict[str, Any]:
    """What names the audited rounds: the run's config and the hash of each MANIFEST, and so of every file."""
    run = RunStore(run_dir)
    parts = {k: "baseline" if k < 0 else f"round_{k:03d}" for k in rounds}
    return {
        "run": run.path.name,
        "config_sha256": run.manifest()["config_sha256"],
        "rounds": list(rounds),
        "manifests": {
            part: hashlib.sha256((run.path / part / "MANIFEST.json").read_bytes()).hexdigest()
            for part in parts.values()
        },
    }


def _pin_path(sheet: Path) -> Path:
    return sheet.with_name(sheet.name + ".json")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _cell(text: str) -> str:
    """Returns text for one cell: one line, no control characters, and no formula for a spreadsheet to run."""
    from loop.show import printable

    line = printable(text)
    return f"'{line}" if line.startswith(_FORMULA) else line


def _round_name(round_index: int) -> str:
    return "the baseline" if round_index < 0 else f"round {round_index}"


def read_sheet(run_dir: Path | str, sheet: Path | str, *, partial: bool = False) -> tuple[list[Text], dict[str, str]]:
    """Reads a labelled sheet back and checks that it is one of this run, whole and unchanged.

    Rows may be in any order and columns may be added. Spaces around a label and its case do not matter.

    Args:
      partial: rows without a label are left out and the others of the same round and instrument label stand for them,
        which is right if they were left out by chance and not because they were hard.

    Returns:
      (all texts of the audited rounds, auditor's label by text id).

    Raises:
      AuditError: a sheet of another run, or one with ids, probabilities or texts that were not exported, rows missing
        or twice, a label missing or that is no persona; one line per problem with its row in the file, and of more
        than five alike the first five and how many more.
    """
    sheet = Path(sheet)
    pin, pinned = _read_pin(run_dir, sheet)
    texts = [t for k in pin["rounds"] for t in texts_of(run_dir, k, pin["population"])]
    of_id = {t.id: t for t in texts}
    chance, said = inclusion(texts, pin["ids"]), said_of(run_dir)
    try:
        with sheet.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lacking = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if lacking:
                raise AuditError([f"{sheet}:1: columns must be as exported, lacks {', '.join(lacking)}"])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AuditError([f"{sheet}: must be the exported CSV in UTF-8, got {error}"]) from None
    problems: list[str] = []
    labels: dict[str, str] = {}
    first_at: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):  # the header is row 1, as a spreadsheet counts
        where = f"{sheet}:{number}"
        i = (row["id"] or "").strip()
        if i not in chance:
            problems.append(f"{where}: id must be one that was exported, got {i[:40]!r}")
            continue
        if i in first_at:
            problems.append(f"{where}: id must stand once, got {i} again, first in row {first_at[i]}")
            continue
        first_at[i] = number
        problems += [f"{where}: {what}" for what in _changed(row, of_id[i], chance[i], pin["run"], _digest(pinned))]
        label = (row["label"] or "").strip().lower()
        if not label:
            if not partial:
                problems.append(f"{where}: label must be one of {', '.join(said)}, got none; or import with --partial")
        elif label not in said:
            problems.append(f"{where}: label must be one of {', '.join(said)}, got {label[:40]!r}")
        else:
            labels[i] = label
    gone = [i for i in pin["ids"] if i not in first_at]
    if gone and not partial:
        listed = f"{', '.join(gone[:5])}{' and more' if len(gone) > 5 else ''}"
        problems.append(f"{sheet}: {len(gone)} exported rows are missing: {listed}; or import with --partial")
    if not labels and not problems:
        problems.append(f"{sheet}: must hold a label, got none in {len(rows)} rows")
    if problems:
        raise AuditError(_collapsed(problems, sheet))
    return texts, labels


def _collapsed(problems: Sequence[str], sheet: Path, most: int = 5) -> list[str]:
    """The first `most` problems of each kind, and how many more there are; alike: the same words before "must"."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        what = problem.split(": ", 1)[1] if ": " in problem else problem
        kinds.setdefault(what.partition(" must ")[0], []).append(problem)
    return [
        line
        for kind, lines in kinds.items()
        for line in [
            *lines[:most],
            *([f"{sheet}: {len(lines) - most} more rows like these ({kind})"] if len(lines) > most else []),
        ]
    ]


def _read_pin(run_dir: Path | str, sheet: Path) -> tuple[dict[str, Any], bytes]:
    path = _pin_path(sheet)
    try:
        pinned = path.read_bytes()
        pin = json.loads(pinned)
        rounds, ids = [int(k) for k in pin["rounds"]], [str(i) for i in pin["ids"]]
        claimed = (str(pin["run"]), str(pin["config_sha256"]), dict(pin["manifests"]), str(pin["population"]))
    except FileNotFoundError:
        raise AuditError([f"{path}: must lie beside the sheet, as exported, got none"]) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AuditError([f"{path}: must be as exported, got {error!r}"]) from None
    there = RunStore(run_dir).rounds()
    gone = [k for k in rounds if k >= 0 and k not in there]
    actual = _identity(run_dir, [k for k in rounds if k not in gone])
    if gone or claimed[1] != actual["config_sha256"] or claimed[2] != actual["manifests"]:
        raise AuditError(
            [f"{sheet}: must be a sheet of {run_dir}, got one of another run, {claimed[0]}, or of other rounds of it"]
        )
    texts = {t.id for k in rounds for t in texts_of(run_dir, k, claimed[3])}
    if strange := sorted(set(ids) - texts):
        raise AuditError([f"{path}: ids must be of the run, got {strange[0][:40]!r}; take the file that was exported"])
    return {"run": claimed[0], "rounds": rounds, "ids": ids, "population": claimed[3]}, pinned


def _changed(row: Mapping[str, str | None], text: Text, chance: float, run: str, digest: str) -> list[str]:
    """Names what differs between a row and what was exported; a text is compared by its words."""
    problems = []
    if ((row["run"] or "").strip(), (row["audit"] or "").strip()) != (_cell(run), digest):
        problems.append(f"run and audit must be {run} and {digest}, got {row['run']!r} and {row['audit']!r}")
    if (row["round"] or "").strip().lstrip("'") != str(text.round_index):
        problems.append(f"round must be {text.round_index} for {text.id}, got {row['round']!r}")
    try:
        same = abs(float(row["inclusion"] or "nan") - chance) < 1e-5
    except ValueError:
        same = False
    if not same:
        problems.append(f"inclusion must be {chance:.6f} for {text.id}, got {row['inclusion']!r}")
    if _WORDS.findall(row["completion"] or "") != _WORDS.findall(_cell(text.completion)):
        problems.append(f"completion must be the exported text of {text.id}; were the columns sorted apart?")
    return problems


def take_in(run_dir: Path | str, sheet: Path | str, *, partial: bool = False) -> tuple[list[Audited], Path]:
    """Reads a labelled sheet, estimates, and keeps both beside the rounds, in <run>/audits/<hash of the sheet>/.

    Returns:
      (rows, folder): the folder holds audit.parquet, sheet.csv and sheet.csv.json; the same sheet is kept once.

    Raises:
      AuditError: see `read_sheet`.
    """
    sheet = Path(sheet)
    texts, labels = read_sheet(run_dir, sheet, partial=partial)
    population = json.loads(_pin_path(sheet).read_bytes())["population"]
    rand = rng.stream(0, "audit/posterior", -1)
    rows = estimate(texts, labels, population=population, rng=rand, said=said_of(run_dir))
    folder = Path(run_dir) / "audits" / _digest(sheet.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sheet.csv").write_bytes(sheet.read_bytes())
    (folder / "sheet.csv.json").write_bytes(_pin_path(sheet).read_bytes())
    columns = {f.name: [asdict(row)[f.name] for row in rows] for f in fields(Audited)}
    pq.write_table(pa.Table.from_pydict(columns, schema=_SCHEMA), folder / "audit.parquet", compression="zstd")
    return rows, folder


_SCHEMA = pa.schema(
    [
        (f.name, pa.int32())
        if f.name in ("round_index", "n_texts", "n_audited")
        else (f.name, pa.string() if f.name in ("population", "persona", "reason") else pa.float64())
        for f in fields(Audited)
    ]
)
