"""Dose-response of a learner: what it says of a persona after training on a share q of that persona's documents.

Measured from the base model before any run, kept under `<runs_dir>/<name>-calibration/`, and used by the forecast, its
null band and the selection estimates of every run with the same base, corpus, training and decoding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loop import evolution, readings
from loop.config import Config, ConfigError
from loop.records import PERSONAS, Sample
from loop.rng import stream
from loop.stats import Interval
from loop.world import Learner, World

Report = Callable[..., None]

GRID = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
N_GAP = 3  # rounds on one mixture behind the share of the gap closed; `init_from: previous` only
FORMAT = 1
NOT_READ = ("agreement", "agreement_error")  # instruments of a run that no frequency is read with

SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # dose: one training from the base; gap: round after round from the last adapter
        ("persona", pa.string()),
        ("q", pa.float64()),  # nominal dose
        ("share", pa.float64()),  # the persona's share of the documents trained on
        ("seed", pa.int64()),
        ("round_index", pa.int32()),
        ("said", pa.string()),  # persona whose emission this row is
        ("family", pa.string()),  # frequency (corrected) or frequency_observed
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n_outputs", pa.float64()),
    ]
)


class Unreadable(ConfigError):
    """A file of a calibration that is not as it was written."""

    exit_code = 3


@dataclass(frozen=True)
class Calibration:
    """What was measured of one persona.

    Attributes:
      persona: whose share was varied.
      folder: where it lies.
      response: the fitted f.
      share: realised share of the mixture at each dose, shape (n_doses,).
      values: measured emission by seed and dose, shape (n_seeds, n_doses), in [0, 1].
      n_outputs: effective outputs behind each value.
      overdispersion: variance between seeds over that of counting alone, >= 1; nan with one seed, whose band is blind
        to training noise.
      closed: share of the distance to f closed per round; None where a round starts from the base, nan with a reason
        where it was not measured.
      family: frequency (corrected) or frequency_observed.
      instruments: instrument -> sha256 it was measured with; empty for the toy's own word.
    """

    persona: str
    folder: Path
    response: evolution.DoseResponse
    share: np.ndarray
    values: np.ndarray
    n_outputs: float
    overdispersion: float
    closed: Interval | None
    family: str
    instruments: dict[str, str]

    @property
    def pace(self) -> float:
        """Share of the distance to f that a round closes: 1 from the base, and where it could not be measured."""
        return 1.0 if self.closed is None or not self.closed.value > 0 else self.closed.value


def meaning(config: Config) -> dict[str, Any]:
    """The part of a config that f depends on; audience, feedback, names and seeds are left out, so arms share an f."""
    plain = config.model_dump(mode="json")
    base = plain["base"] and {k: plain["base"][k] for k in ("model", "dtype")}
    return {
        "base": base,
        "classify": plain["classify"],
        "learner": plain["learner"],
        "measure": {"mixture": plain["measure"]["mixture"]},
        "mix": {"n_train": plain["mix"]["n_train"]},
        "real": {k: plain["real"][k] for k in ("shares", "private_share", "name_swap", "homophily", "corpora")},
        "sample": {
            k: plain["sample"][k] for k in ("temperature", "top_p", "max_new_tokens", "engine") if k in plain["sample"]
        },
        "toy": plain["toy"],
        "train": {k: v for k, v in plain["train"].items() if k != "init_from"},
    }


def folder_of(config: Config, runs_dir: Path | None = None) -> Path:
    """Where a config's own calibration lies."""
    return (Path(config.runs_dir) if runs_dir is None else runs_dir) / f"{config.name}-calibration"


def measure(
    config: Config,
    *,
    persona: str,
    grid: Sequence[float] = GRID,
    n_seeds: int = 3,
    report: Report = lambda kind, **fields: None,
    learner: Learner | None = None,
) -> Calibration:
    """Trains on mixtures with a persona's share at each dose, others scaled, and measures what comes out.

    Every dose is one training from the base on `mix.n_train` real documents, with the streams that round 0 of a run
    with that seed would use: at the config's own share it is that round 0. Each (dose, seed) is written as soon as it
    is measured, and the same command does only what is missing. With `init_from: previous` each seed also starts at
    the lowest dose and trains `N_GAP` rounds on fresh documents at the highest, from adapter to adapter.

    Args:
      config: the run whose learner this is; its seed is the first of n_seeds.
      persona: whose share is varied.
      grid: doses, shares in [0, 1], at least two.
      n_seeds: trainings per dose, >= 1.
      report: told of each training, as `loop.run.play`.
      learner: None: the config's.

    Returns:
      A Calibration, fitted.

    Raises:
      ConfigError: a persona that cannot be dosed, a grid out of range, or a folder that holds the calibration of
        another learner.
    """
    from filelock import FileLock, Timeout

    doses = sorted({float(q) for q in grid})
    if len(doses) < 2 or not all(0 <= q <= 1 for q in doses):
        raise ConfigError([f"--grid must hold two or more shares in [0, 1], got {', '.join(map(str, grid))}"])
    if n_seeds < 1:
        raise ConfigError([f"--seeds must be >= 1, got {n_seeds}"])
    worlds = {q: World(_dosed(config, persona, q)) for q in doses}
    top = worlds[doses[-1]]  # the largest dose plants the persona, so that the toy knows its texts
    folder = folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _claim(folder, config, top.instrument_hashes())
            path = folder / f"{persona}.parquet"
            rows = _rows(path)
            seeds = range(config.seed, config.seed + n_seeds)
            todo = [("dose", q, seed) for q in doses for seed in seeds]
            if config.train.init_from == "previous":
                todo += [("gap", doses[-1], seed) for seed in seeds]
            done = {(r["kind"], r["q"], r["seed"]) for r in rows}
            todo = [cell for cell in todo if cell not in done]
            if todo and learner is None:
                report("stage", round_index=-1, stage="load base")
                learner = top.toy() if config.learner == "toy" else top.language_model()
            if todo and config.classify.instrument != "known":
                _share_instruments(top, worlds.values())
            for i, (kind, q, seed) in enumerate(todo):
                started = time.monotonic()
                assert learner is not None
                if kind == "dose":
                    rows += _dose(worlds[q].with_seed(seed), learner, persona, q)
                else:
                    rows += _gap(worlds[doses[0]].with_seed(seed), worlds[q].with_seed(seed), learner, persona, q)
                _write(path, _parquet(rows))
                seconds = time.monotonic() - started
                what = f"{persona} at {q:g}" if kind == "dose" else f"{N_GAP} rounds of {persona} at {q:g}"
                report("note", text=f"{what}, seed {seed}: {seconds:.1f} s, {i + 1} of {len(todo)}")
            mine = [r for r in rows if r["seed"] in seeds and (r["kind"] == "gap" or r["q"] in doses)]
            return _fitted(folder, persona, mine)
    except Timeout:
        raise ConfigError(
            [f"{folder} is being written by another process; wait for it, or give another name"]
        ) from None


def _share_instruments(world: World, others: Iterable[World]) -> None:
    """Hands on what does not depend on the dose: counting the instruments' error once takes longer than a dose."""
    _ = world.error
    kept = {k: v for k, v in vars(world).items() if k in ("instruments", "known_texts", "error", "base")}
    for other in others:
        vars(other).update(kept)


def _dosed(config: Config, persona: str, q: float) -> Config:
    """The config with a persona's share at q and the others scaled to 1 - q, measured on the headline strata alone."""
    if persona not in PERSONAS[:-1]:
        raise ConfigError([f"--persona must be one of {', '.join(PERSONAS[:-1])}, got {persona!r}"])
    own = [name for name, c in config.real.corpora.items() if c.persona == persona]
    component = own[0] if own and persona not in config.real.shares else persona
    others = {name: share for name, share in config.real.shares.items() if name != component}
    total = math.fsum(others.values())
    if not total > 0:
        raise ConfigError([f"real.shares must hold something beside {persona}, got nothing to scale"])
    shares = {name: share / total * (1 - q) for name, share in others.items()} | {component: q}
    used = [s for s in config.measure.strata if config.measure.mixture.get(s, 0) > 0]
    return config.model_copy(
        update={
            "real": config.real.model_copy(update={"shares": shares}),
            # Held-out documents would be read again at every dose, and are no part of f.
            "measure": config.measure.model_copy(
                update={"every": 1, "strata": tuple(used), "n_surprisal": 0, "n_heldout": 0}
            ),
        }
    )


def _dose(world: World, learner: Learner, persona: str, q: float) -> list[dict[str, Any]]:
    mixture, _ = world.mix(0, world.beginning())
    world.train(0, learner, mixture)
    at = {"kind": "dose", "persona": persona, "q": q, "seed": world.config.seed, "round_index": 0}
    return _read_out(world, learner, 0, at | {"share": _share(mixture, persona)})


def _gap(low: World, high: World, learner: Learner, persona: str, q: float) -> list[dict[str, Any]]:
    past = low.beginning()
    mixture, cursor = low.mix(0, past)
    low.train(0, learner, mixture)
    at = {"kind": "gap", "persona": persona, "q": q, "seed": low.config.seed}
    rows = _read_out(low, learner, 0, at | {"round_index": 0, "share": _share(mixture, persona)})
    for t in range(1, N_GAP + 1):
        mixture, cursor = high.mix(0, replace(past, real_cursor=cursor))
        high.train(t, learner, mixture)
        rows += _read_out(high, learner, t, at | {"round_index": t, "share": _share(mixture, persona)})
    return rows


def _share(mixture: Any, persona: str) -> float:
    mine = [d.persona_known == persona for d in mixture.documents]
    return float(mixture.copies[np.array(mine)].sum() / mixture.n_train)


def _read_out(world: World, learner: Learner, t: int, at: Mapping[str, Any]) -> list[dict[str, Any]]:
    probes = world.probe(t, learner)
    public = [s for s in probes if s.stratum != "private"]
    labels = world.classify(probes, [], [])
    metrics = readings.frequencies(world, public, labels, weighted=True, round_index=t, population="probes")
    found = {m.name: m for m in metrics if m.stratum is None}
    corrected = any(name.startswith("frequency/") and m.value is not None for name, m in found.items())
    family = "frequency" if corrected else "frequency_observed"
    n = kish(probes, world.config.measure.mixture)
    return [
        {**at, "said": name.partition("/")[2], "family": family, "value": m.value, "low": m.low, "high": m.high}
        | {"n_outputs": n}
        for name, m in found.items()
        if name.startswith(f"{family}/") and m.value is not None
    ]


def kish(probes: Sequence[Sample], mixture: Mapping[str, float]) -> float:
    """Outputs that a share under a mixture of strata is worth: 1 / sum over s of weight[s]**2 / n[s]; nan if none."""
    n = {s: sum(p.stratum == s for p in probes) for s, w in mixture.items() if w > 0}
    return 1 / sum(mixture[s] ** 2 / n[s] for s in n) if n and all(n.values()) else math.nan


def fit(persona: str, share: np.ndarray, values: np.ndarray, n_outputs: float) -> tuple[evolution.DoseResponse, float]:
    """Monotone f through the mean over seeds at each dose, and the overdispersion its band allows for.

    Overdispersion is the variance between seeds over p (1 - p) / n_outputs, pooled over doses, at least 1: what one
    training differs from the next beyond the counting of its outputs. Each dose then counts as
    n_seeds * n_outputs / overdispersion outputs.

    Args:
      persona: names the stream of the band's draws.
      share: realised share at each dose, shape (n_doses,), all different.
      values: measured emission, shape (n_seeds, n_doses), in [0, 1].
      n_outputs: effective outputs behind each value, > 0.

    Returns:
      (f, overdispersion); the second is nan with one seed, and then taken as 1.
    """
    n_seeds = len(values)
    mean = values.mean(axis=0)
    excess = math.nan
    if n_seeds > 1:
        counting = float((mean * (1 - mean)).sum()) / n_outputs
        excess = max(1.0, float(values.var(axis=0, ddof=1).sum()) / counting) if counting > 0 else 1.0
    n = n_seeds * n_outputs / (1.0 if math.isnan(excess) else excess)
    drawn = stream(0, f"calibrate/{persona}", -1)
    return evolution.dose_response(share, mean * n, n, rng=drawn), excess


def _fitted(folder: Path, persona: str, rows: Sequence[Mapping[str, Any]]) -> Calibration:
    said = [r for r in rows if r["said"] == persona]
    cells = {(r["seed"], r["q"]): r for r in said if r["kind"] == "dose"}
    # Of seeds that all have the same doses the most cells: one that was interrupted has fewer doses than others, and a
    # grid that was extended for some seeds has more of them than all have.
    of_seed = {s: {q for t, q in cells if t == s} for s, _ in sorted(cells)}
    blocks = [(q, [s for s, theirs in of_seed.items() if q <= theirs]) for q in of_seed.values() if len(q) > 1]
    common, seeds = max(blocks, key=lambda b: (len(b[0]) * len(b[1]), len(b[1])), default=(set(), []))
    doses = sorted(common)
    families = {r["family"] for r in said}
    if len(doses) < 2 or not seeds or len(families) > 1:
        lacks = "one family of frequencies" if len(families) > 1 else "two doses of one seed"
        raise ConfigError([f"calibration of {persona} must hold {lacks}, at {folder}; run `loop calibrate` again"])
    share = np.array([np.mean([cells[s, q]["share"] for s in seeds]) for q in doses])
    values = np.array([[cells[s, q]["value"] for q in doses] for s in seeds])
    n_outputs = float(np.mean([cells[s, q]["n_outputs"] for s in seeds for q in doses]))
    # Few documents: two nominal doses may come to the same documents, and then are one dose.
    distinct, at = np.unique(share, return_inverse=True)
    merged = np.stack([values[:, at == i].mean(axis=1) for i in range(len(distinct))], axis=1)
    if len(distinct) < 2:
        raise ConfigError([f"--grid must come to two different shares of n_train, got {share} at {folder}"])
    response, excess = fit(persona, distinct, merged, n_outputs)
    steps: dict[int, dict[int, float]] = {}
    for r in said:
        if r["kind"] == "gap" and r["q"] == doses[-1]:
            steps.setdefault(r["seed"], {})[r["round_index"]] = r["value"]
    closed = None
    if steps:
        n = len(steps) * n_outputs / (1.0 if math.isnan(excess) else excess)
        path = np.mean([[values[t] for t in sorted(values)] for values in steps.values()], axis=0)
        closed = evolution.gap_closed(path, float(response(max(distinct))), n)
    instruments = json.loads((folder / "calibration.json").read_text())["instruments"]
    return Calibration(
        persona, folder, response, distinct, merged, n_outputs, excess, closed, families.pop(), instruments
    )


def find(
    config: Config, *, runs_dir: Path | None = None, instruments: Callable[[], Mapping[str, str]] | None = None
) -> tuple[dict[str, Calibration], str]:
    """Calibrations that hold for a config, by persona, and one line that says what transmission is taken to be.

    The config's own folder comes first, then any other of the same runs_dir: arms of one experiment share their f. One
    that was made for another base, corpus, training or decoding, or with other instruments, is not used.

    Args:
      config: the run.
      runs_dir: where to look; None: the config's.
      instruments: gives instrument -> sha256 that the run measures with, asked for only where there is a calibration to
        compare; None: not compared.

    Raises:
      Unreadable: the config's own folder cannot be read; of another folder the line says that it is left out.
    """
    here = Path(config.runs_dir) if runs_dir is None else runs_dir
    own = folder_of(config, here)
    refused = skipped = ""
    for folder in [own, *sorted(set(here.glob("*-calibration")) - {own})]:
        if not (folder / "calibration.json").is_file():
            continue
        try:
            why = _differs(folder, config, instruments() if instruments else None)
            if why:
                refused = refused or (f"; {folder} is of another {why}" if folder == own else "")
                continue
            found = {}
            for path in sorted(folder.glob("*.parquet")):
                rows = _rows(path)
                try:
                    found[path.stem] = _fitted(folder, path.stem, rows)
                except ConfigError:  # begun, and not far enough for a curve
                    continue
        except Unreadable as error:
            if folder == own:
                raise
            skipped += f"; left out: {error}"
            continue
        if config.train.init_from == "previous":
            if found and all(c.closed is None for c in found.values()):
                refused = (
                    refused or f"; {folder} was measured from the base alone: `loop calibrate` this config as well"
                )
            found = {p: c for p, c in found.items() if c.closed is not None}
        if found:
            what = ", ".join(f"{p} {len(c.share)} points" for p, c in found.items())
            paces = ", ".join(
                f"; {p} closes {c.closed.value:.2f} of the gap a round"
                for p, c in found.items()
                if c.closed is not None and config.train.init_from == "previous"
            )
            return found, f"measured f(q): {what}, {folder}{paces}{skipped}"
    return {}, f"assumed exact{refused or '; `loop calibrate` has not been run for this base'}{skipped}"


def respond(calibrations: Mapping[str, Calibration], personas: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """The learner as a map of shares: measured personas go through f, the others share what is left in proportion.

    Args:
      calibrations: persona -> calibration, at least one of `personas`.
      personas: names of the columns.

    Returns:
      A function of shares, shape (..., n_personas) with sum 1, to shares of the same shape.
    """
    measured = {k: calibrations[p].response for k, p in enumerate(personas) if p in calibrations}

    def emission(q: np.ndarray) -> np.ndarray:
        out = np.array(q, dtype=float)
        for k, f in measured.items():
            out[..., k] = f(np.clip(q[..., k], 0, 1))
        rest = [k for k in range(len(personas)) if k not in measured]
        said = out[..., list(measured)].sum(axis=-1)
        left, others = np.maximum(1 - said, 0), out[..., rest].sum(axis=-1)
        scale = np.where(others > 0, left / np.where(others > 0, others, 1), 0)
        out[..., rest] *= scale[..., None]
        total = out.sum(axis=-1, keepdims=True)
        return np.asarray(np.where(total > 0, out / np.where(total > 0, total, 1), q))

    return emission


def remember(
    emission: Callable[[np.ndarray], np.ndarray], closed: float, start: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """A response that starts at `start` and closes a share of the distance to `emission` at each call, once a round.

    For `init_from: previous`. It holds a state, and so serves one forecast; it is exact while nothing but this response
    changes the model, that is with n_learning inf.
    """
    state = np.asarray(start, dtype=float)

    def step(q: np.ndarray) -> np.ndarray:
        nonlocal state
        state = (1 - closed) * state + closed * emission(q)
        return state

    return step


# Files. The folder is no run: one file per persona, replaced whole after each training.


def _claim(folder: Path, config: Config, instruments: Mapping[str, str]) -> None:
    path = folder / "calibration.json"
    if path.is_file():
        why = _differs(folder, config, instruments)
        if why:
            raise ConfigError(
                [f"{folder} holds a calibration of another {why}; give this one another name, or remove the folder"]
            )
        return
    said = meaning(config)
    content = {"format": FORMAT, "config_sha256": _digest(said), "config": said, "instruments": dict(instruments)}
    _write(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def _differs(folder: Path, config: Config, instruments: Mapping[str, str] | None) -> str | None:
    """What a folder's calibration was made with that a config does not have, in words; None: nothing."""
    path = folder / "calibration.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        theirs, found, version = content["config"], content["instruments"], content["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Unreadable([f"{path}: must be a calibration as written, got none that can be read; remove it"]) from None
    if version != FORMAT:
        return f"format ({version}, here {FORMAT})"
    mine = meaning(config)
    before, after = _flat(theirs), _flat(mine)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            return f"{key} ({before.get(key)}, here {after.get(key)})"
    if instruments is not None and {k: v for k, v in instruments.items() if k not in NOT_READ} != found:
        return "instrument"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise Unreadable([f"{path}: must be a calibration as written, got {str(error)[:80]}; remove it"]) from None
    if table.schema.names != SCHEMA.names:
        raise Unreadable([f"{path}: must have columns {', '.join(SCHEMA.names)}; remove it"])
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(r) for r in rows], schema=SCHEMA), sink)
    return bytes(sink.getvalue())


def _write(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one; what a killed process leaves is a .tmp file, overwritten next time."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
