"""Arms x seeds as one command: each cell an ordinary run, played by a local pool or by Ray; asking again resumes.

A sweep file names a base config, arms (dotted keys to change) and seeds. A cell is a run in `<runs_dir>/<arm>-s<seed>`
under the run's own lock, so that a finished cell costs nothing, an interrupted one goes on from its last whole stage,
and a cell of two sweeps with one `runs_dir` is played once.

Arms of a seed share what they agree on: round 0, where all that it reads is equal, else the untouched base's baseline.
Both are forked from the first such arm, which gives the same bytes as playing them again.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loop import config as configs
from loop.config import Config, ConfigError
from loop.records import METRICS, POPULATIONS, STRATA

# What round 0 does not read, so that arms may differ in it and share round 0: tests/test_sweep.py plays each both ways.
# A key that is not named here counts as read.
LATER = (
    "name",
    "n_rounds",
    "runs_dir",
    "mix.regime",
    "mix.real_share",
    "mix.weighting",
    "real.planted",
    "train.init_from",
)
# What the baseline, the probes of the untouched base, does not read either. A release filter is fitted there, on what
# users ask: where there is one, everything but the audience counts as read.
NOT_BASELINE = (*LATER, "mix", "users", "filters", "virality", "channels", "discourse", "steer")
NOT_RELEASE = (*LATER, "virality")
# Nor does round 0 read the audience before it is paid by it: model, texts and labels are then taken from the sibling.
BEFORE_ATTENTION = (*LATER, "virality")
RETRIES = 3  # of a cell whose Ray node died; a cell that raised is not tried again before the next command
LOCK_WAIT = 120  # seconds a retry waits: the lock of a dead node ends with its NFS lease, 90 s by default
REASON = 240  # characters of the line that says why a cell failed
TOKEN = ".sweep"  # in runs_dir: tells a Ray node that it sees the same directory as the driver

Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Outcome(_Section):
    """A number that a sweep is read for: between arms, paired by seed."""

    metric: str | Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)] = Field(
        description="a metric, or a weighted sum: {frequency/nova: 1, ...}"
    )
    population: str = "probes"
    stratum: str | None = None
    contrast: str = Field(
        description="ARM - CONTROL; ARM - CONTROL - OTHER + ITS_CONTROL: a difference of two such differences; ARM: "
        "its change alone; a factor of the sweep: its main effect; FACTOR given OTHER: its effect where OTHER is high"
    )
    of: Literal["change", "level"] = Field(
        "change",
        description="change: from round 0 to the final round; level: the final round alone, for arms that were treated "
        "in round 0 already, whose change would leave that out",
    )
    direction: Literal["up", "down", "none"] = Field(description="none: within +-margin, by two one-sided tests")
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(description="smallest effect that counts")

    @property
    def parts(self) -> dict[str, float]:
        """Metric -> coefficient."""
        return {self.metric: 1.0} if isinstance(self.metric, str) else dict(self.metric)

    @property
    def terms(self) -> dict[str, int]:
        """Arm (or factor) -> +1 or -1, in the order of the contrast. One alone is held against its own round 0."""
        first, *rest = re.split(r" ([+-]) ", self.contrast)
        signs = [1 if sign == "+" else -1 for sign in rest[::2]]
        return {first.strip(): 1} | dict(zip((arm.strip() for arm in rest[1::2]), signs, strict=True))

    @property
    def factor(self) -> tuple[str, str | None]:
        """The factor that the contrast is of, and the one that is held at its high level; of arms, nothing to go by."""
        factor, _, held = self.contrast.partition(" given ")
        return factor, held or None

    @property
    def arm(self) -> str:
        """The arm, or factor, that the contrast is about: its first."""
        return next(iter(self.terms))

    @property
    def control(self) -> str | None:
        """What that arm is held against; None: its own round 0."""
        return next((arm for arm, sign in self.terms.items() if sign < 0), None)

    @model_validator(mode="after")
    def _can_be_shown(self) -> Outcome:
        if self.direction == "none" and self.margin == 0:
            raise ValueError("margin must be > 0 for direction none, got 0; an effect of exactly 0 cannot be shown")
        terms = self.terms
        if len(terms) < 1 + len(re.findall(r" [+-] ", self.contrast)):
            raise ValueError(f"contrast must name each arm once, got {self.contrast!r}; name the control of each")
        if len(terms) == 1 and self.of == "level":
            raise ValueError(
                f"contrast must be between arms for of: level, got {self.contrast!r}; ARM - CONTROL, or of: change"
            )
        if len(terms) > 1 and sum(terms.values()) != 0:
            raise ValueError(
                f"contrast must add as many arms as it subtracts, got {self.contrast!r}; ARM - CONTROL, or "
                "ARM - CONTROL - OTHER + ITS_CONTROL"
            )
        return self


class Size(_Section):
    """A learner and how many seeds it gets."""

    base: str = Field(description="config, relative to the sweep file")
    seeds: Seeds
    overrides: dict[str, Any] = Field(default_factory=dict, description="dotted keys for every arm of this size")
    runs_dir: str | None = Field(None, description="where the runs live; default runs/<name of the file>")
    time: str | None = Field(None, description="expected time, in words")

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must each stand once, got {', '.join(map(str, seeds))}")
        return seeds


class File(_Section):
    """A sweep or scenario file."""

    question: str | None = None
    expected: str | None = None
    why: str | None = None
    primary: Outcome | None = Field(None, description="the one outcome the verdict follows from")
    exploratory: tuple[Outcome, ...] = Field((), description="what else is shown; never a verdict")
    controls: tuple[str, ...] = Field((), description="arms shown beside the primary outcome")
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict, description="arm -> dotted keys it changes")
    factors: dict[str, dict[str, tuple[Any, Any]]] = Field(
        default_factory=dict, description="factor -> dotted keys, each with its low and high level; arms are all cells"
    )
    sizes: dict[str, Size] = Field(default_factory=dict, description="size -> base, seeds; or base and seeds directly")
    base: str | None = None
    seeds: Seeds | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    runs_dir: str | None = None
    time: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> File:
        if bool(self.arms) == bool(self.factors):
            raise ValueError("must hold either arms or factors")
        direct = self.base is not None and self.seeds is not None
        if direct == bool(self.sizes):
            raise ValueError("must hold either base and seeds, or sizes")
        return self


@dataclass(frozen=True)
class Sweep:
    """A sweep file at one size, every arm resolved.

    Attributes:
      name: stem of the file.
      path: the file.
      size: name of the size; "" where the file has none.
      file: its content.
      seeds: paired over all arms.
      planned: seeds that the file plans; `seeds` are others, if the command says so.
      runs_dir: where its runs live.
      arms: arm -> config at the first seed.
      levels: arm -> level, 0 or 1, of each factor; empty without factors.
      time: expected time, in words.
    """

    name: str
    path: Path
    size: str
    file: File
    seeds: tuple[int, ...]
    planned: tuple[int, ...]
    runs_dir: Path
    arms: dict[str, Config]
    levels: dict[str, dict[str, int]] = field(default_factory=dict)
    time: str | None = None

    def config(self, arm: str, seed: int) -> Config:
        """The run of a cell."""
        return self.arms[arm].model_copy(update={"seed": seed})

    def run_dir(self, arm: str, seed: int) -> Path:
        """Where the run of a cell lies."""
        return self.runs_dir / self.config(arm, seed).run_name

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Name of each run -> hash of the config that the file means by it, as its manifest.json would hold it."""
        from loop.store import config_sha256

        cells = (self.config(arm, seed) for arm in self.arms for seed in self.seeds)
        return {config.run_name: config_sha256(config.model_dump_json()) for config in cells}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      config: the run.
      source: cell whose files it starts from, as an index; None: it starts from nothing.
      at: round it is forked from; -1 is the baseline.
      alike: its round 0 is the source's, too, up to the labels.
      needs: cells that its real corpus or its release filter takes from, played to their end before it starts.
    """

    config: Config
    source: int | None = None
    at: int = 0
    alike: bool = False
    needs: tuple[int, ...] = ()

    @property
    def run_dir(self) -> Path:
        """Where the run lies."""
        return Path(self.config.runs_dir) / self.config.run_name


class Task(NamedTuple):
    """A cell as a worker gets it: plain values, since it may lie on another machine."""

    config_text: str
    source: str | None
    at: int
    alike: bool
    allow_drift: bool
    folder: str | None = None  # working directory; None: the worker's own
    token: str | None = None  # content of TOKEN in runs_dir; None: not checked
    track: bool = False


class Result(NamedTuple):
    """How a cell ended.

    Attributes:
      reason: why it failed, one line; None: it is played to its last round.
      seconds: it took.
      shared: round it was forked from, -1 the baseline; None: played from nothing, or resumed.
      alike: model, texts and labels of round 0 were taken from a sibling.
    """

    reason: str | None
    seconds: float
    shared: int | None = None
    alike: bool = False


Watch = Callable[[int, str, Result | None], None]


# Reading a sweep file -----------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    *,
    size: str | None = None,
    seeds: Sequence[int] | None = None,
    runs_dir: str | Path | None = None,
) -> Sweep:
    """Reads a sweep file and resolves every arm.

    Args:
      path: YAML file; see File.
      size: which of its sizes; None: the only one.
      seeds: in place of the file's.
      runs_dir: in place of the file's.

    Raises:
      ConfigError: with every problem, each as `file:line: key: what is wrong; way out`.
    """
    path = Path(path)
    data, lines = configs._read(path)

    def place(*at: str) -> str:
        line = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), None)
        return str(path) if line is None else f"{path}:{line}"

    try:
        file = File.model_validate(data)
    except ValidationError as error:
        raise ConfigError([_explain(e, place) for e in error.errors()]) from None
    try:
        sizes = file.sizes or {"": Size.model_validate({n: getattr(file, n) for n in Size.model_fields})}
    except ValidationError as error:
        raise ConfigError([_explain(e, place) for e in error.errors()]) from None
    if size is None and len(sizes) > 1:
        raise ConfigError([f"{path}: --size must be one of {', '.join(sizes)}; the file holds several"])
    if size is not None and size not in sizes:
        known = ", ".join(name or "none" for name in sizes)
        raise ConfigError([f"{path}: --size must be one of {known}, got {size!r}"])
    chosen = next(iter(sizes)) if size is None else size
    settings = sizes[chosen]
    if seeds is not None:
        try:
            settings = Size.model_validate(settings.model_dump() | {"seeds": tuple(seeds)})
        except ValidationError as error:
            wrong = [e["msg"].removeprefix("Value error, ") for e in error.errors()]
            raise ConfigError([f"--seeds: {text}" for text in wrong]) from None
    where = Path(runs_dir or settings.runs_dir or f"runs/{path.stem}")
    arms, levels = _arms(file)
    prefix = ("sizes", chosen) if file.sizes else ()
    common = _overrides(settings.overrides)
    problems: list[str] = []
    resolved: dict[str, Config] = {}
    for arm, changes in arms.items():
        at = ("factors",) if file.factors else ("arms", arm)
        own = [k for k in ("name", "seed", "runs_dir") if k in changes]
        if own:
            problems.append(f"{place(*at, own[0])}: arm {arm}: {own[0]}: the sweep sets it; remove it here")
            continue
        head = [f"name={json.dumps(arm)}", f"seed={settings.seeds[0]}", f"runs_dir={json.dumps(str(where))}"]
        try:
            resolved[arm] = configs.load(path.parent / settings.base, [*common, *_overrides(changes), *head])
        except ConfigError as error:
            unchanged = _problems_of(path.parent / settings.base, [*common, *head])
            for problem in error.problems:
                said = re.sub(r"^(command line|\S+\.ya?ml(:\d+)?): ", "", problem)
                mine = _key(said, changes)
                if problem not in unchanged or mine is not None:
                    problems.append(f"{place(*at, *([mine] if mine else []))}: arm {arm}: {said}")
                elif (common_key := _key(said, settings.overrides)) is not None:
                    problems.append(f"{place(*prefix, 'overrides', common_key)}: {said}")
                else:
                    problems.append(problem)
    problems = list(dict.fromkeys(problems))
    same: dict[str, str] = {}
    for arm, config in resolved.items():
        first = same.setdefault(configs.to_yaml(config.as_read().model_copy(update={"name": "same"})), arm)
        if first != arm:
            unread = config.model_copy(update={"name": first}) != resolved[first]
            but = " but for keys that none of its channels reads; switch that channel on, or" if unread else ";"
            problems.append(
                f"{place('arms', arm)}: arm {arm}: the same resolved config as arm {first}{but} remove one of them"
            )
    planned = sizes[chosen].seeds
    sweep = Sweep(path.stem, path, chosen, file, settings.seeds, planned, where, resolved, levels, settings.time)
    if not problems:
        problems = _problems(sweep, place)
    if problems:
        raise ConfigError(problems)
    return sweep


def _arms(file: File) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, int]]]:
    """Arms of a file and their levels; a factorial has an arm per cell, named by its levels: copies1-talk0."""
    if file.arms:
        return file.arms, {}
    arms, levels = {}, {}
    for cell in product((0, 1), repeat=len(file.factors)):
        name = "-".join(f"{factor}{level}" for factor, level in zip(file.factors, cell, strict=True))
        levels[name] = dict(zip(file.factors, cell, strict=True))
        arms[name] = {
            key: both[level]
            for keys, level in zip(file.factors.values(), cell, strict=True)
            for key, both in keys.items()
        }
    return arms, levels


def of_factor(outcome: Outcome, levels: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether an outcome is a factor's effect; `levels` as for `arms_of`."""
    return any(outcome.factor[0] in level for level in levels.values())


def arms_of(outcome: Outcome, levels: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Arms that an outcome takes: those of its contrast; of a factor all, or those where the factor given is high.

    Args:
      levels: arm -> level of each factor; empty without factors.
    """
    if not of_factor(outcome, levels):
        return list(outcome.terms)
    _, held = outcome.factor
    return [arm for arm, level in levels.items() if held is None or level[held]]


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={json.dumps(value)}" for key, value in changes.items()
    ]  # JSON is YAML, and has no bare `null` traps


def _problems_of(base: Path, overrides: Sequence[str]) -> list[str]:
    try:
        configs.load(base, overrides)
    except ConfigError as error:
        return error.problems
    return []


def _key(said: str, changes: Mapping[str, Any]) -> str | None:
    """The changed key that a problem is about: it names that key, one below it, or the section it lies in."""
    at = said.partition(": ")[0]
    return next((k for k in changes if k == at or k.startswith(f"{at}.") or at.startswith(f"{k}.")), None)


def _problems(sweep: Sweep, place: Callable[..., str]) -> list[str]:
    """What is wrong with the outcomes and controls of a file whose arms are sound."""
    file, found = sweep.file, []
    for arm in file.controls:
        if arm not in sweep.arms:
            close = configs._of_known(arm, [*sweep.arms])
            found.append(f"{place('controls')}: controls: unknown arm {arm}{close}")
    outcomes: list[tuple[str, Outcome]] = [("primary", file.primary)] if file.primary else []
    outcomes += [("exploratory", o) for o in file.exploratory]
    for key, outcome in outcomes:
        factor, held = outcome.factor
        known_factor = factor in file.factors and held != factor and (held is None or held in file.factors)
        unknown = [] if known_factor else [arm for arm in outcome.terms if arm not in sweep.arms]
        known = [*(file.factors if len(outcome.terms) == 1 else ()), *sweep.arms]
        for arm in unknown:
            close = configs._of_known(arm, known)
            found.append(f"{place(key, 'contrast')}: {key}.contrast: unknown arm {arm!r}{close}")
        if not unknown:
            found += [f"{place(key)}: {key}.{said}" for said in _unmeasured(sweep, outcome)]
    if file.primary and not found and file.primary.direction != "none" and not file.factors:
        lacking = [audience for audience, contrast in twins(sweep, file.primary).items() if contrast is None]
        if lacking and any(sweep.arms[a].virality.audience == "full" for a in file.primary.terms):
            paid = " and ".join(a for a in file.primary.terms if sweep.arms[a].virality.audience == "full")
            found.append(
                f"{place('primary', 'contrast')}: primary.contrast: a claim made under audience full needs arms that "
                f"differ from {paid} in virality.audience alone: {' and '.join(lacking)}; add them"
            )
    return found


def _unmeasured(sweep: Sweep, outcome: Outcome) -> list[str]:
    """What an outcome asks of that no run of the sweep will measure: found now, not after hours of play."""
    arms = [sweep.arms[arm] for arm in arms_of(outcome, sweep.levels)]
    found = []
    if outcome.population not in POPULATIONS:
        close = configs._of_known(outcome.population, POPULATIONS)
        found.append(f"population: unknown population {outcome.population!r}{close}")
    if outcome.stratum is not None and outcome.stratum not in STRATA:
        found.append(f"stratum: unknown stratum {outcome.stratum!r}{configs._of_known(outcome.stratum, STRATA)}")
    elif outcome.population == "probes" and any(outcome.stratum not in (None, *arm.measure.strata) for arm in arms):
        found.append(f"stratum: {outcome.stratum} must be one of measure.strata; add it there")
    on_log_odds = of_factor(outcome, sweep.levels)
    if on_log_odds and len(outcome.parts) > 1:
        found.append("metric: a factor is read on the log odds of one share, got a sum; name one metric")
    personas = {*(p for arm in sweep.arms.values() for p in arm.personas), "unknown"}
    for name in outcome.parts:
        head, slash, persona = name.partition("/")
        if head not in METRICS:
            found.append(f"metric: unknown metric {head!r} in {name}{configs._of_known(head, METRICS)}")
            continue
        metric = METRICS[head]
        found += [f"metric: {name} needs {way}" for way in {_needs(head, persona, arm): None for arm in arms} if way]
        if slash and metric.persona is not None and persona not in personas:
            found.append(f"metric: unknown persona {persona!r} in {name}{configs._of_known(persona, personas)}")
        elif slash and metric.persona == "planted" and not any(c.may_hold(persona) for c in sweep.arms.values()):
            found.append(
                f"metric: {persona} in {name} has no seed corpus in any arm; give it a share in real.shares, or "
                "ask about another"
            )
        if outcome.population in POPULATIONS and outcome.population not in metric.populations:
            where = " or ".join(metric.populations)
            found.append(f"population: {name} is read in {where}, got {outcome.population}; give that")
        if metric.stratum is None and outcome.stratum is not None:
            found.append(f"stratum: {name} is read over all strata, got {outcome.stratum}; leave it out")
        elif metric.stratum == "each" and (
            outcome.stratum == "private" or (outcome.population == "mixture" and outcome.stratum)
        ):
            found.append(f"stratum: {name} of {outcome.population} is not read in {outcome.stratum}; leave it out")
        elif metric.stratum not in ("each", outcome.stratum):
            found.append(f"stratum: {name} is read in {metric.stratum} alone, got {outcome.stratum}; give that")
        if on_log_odds and not metric.share:
            found.append(f"metric: a factor is read on the log odds of a share, got {name}; name a share")
    return found


def _needs(head: str, persona: str, arm: Config) -> str | None:
    """What an arm lacks for a metric that only some configs have; None if nothing."""
    barred = arm.filters.release
    if head in ("release_recall", "release_fpr") and (barred is None or persona not in barred.recall):
        return f"filters.release.recall.{persona} in every arm of the contrast; add it"
    if head in ("aware", "asked", "demand", "supply") and not arm.channels.users:
        return "direct_users or talk_users in every arm of the contrast; add it"
    if head in ("demand", "supply") and arm.measure.every != 1:
        return "the round before measured too; set measure.every: 1"
    return None


def twins(sweep: Sweep, outcome: Outcome) -> dict[str, str | None]:
    """The same contrast under no_request and under learned, which a claim must hold under too; None: no such arms.

    Each arm paid by audience full is replaced by the one that differs from it in the audience alone; the others stay.
    """

    def without(config: Config) -> str:
        virality = config.virality.model_copy(update={"audience": "null"})
        measure = config.measure.model_copy(update={"every": 1})  # how often a run is read moves nothing in it
        return configs.to_yaml(config.model_copy(update={"name": "same", "virality": virality, "measure": measure}))

    def instead(arm: str, audience: str) -> str | None:
        mine = sweep.arms[arm]
        if mine.virality.audience != "full":
            return arm
        alike = (a for a, c in sweep.arms.items() if c.virality.audience == audience and without(c) == without(mine))
        return next(alike, None)

    found: dict[str, str | None] = {}
    for audience in ("no_request", "learned"):
        arms = [instead(arm, audience) for arm in outcome.terms]
        if len(set(arms)) < len(arms):  # what full is held against is paid by that audience: nothing would be left
            found[audience] = None
            continue
        signs = ["", *(" + " if sign > 0 else " - " for sign in list(outcome.terms.values())[1:])]
        known = [sign + arm for sign, arm in zip(signs, arms, strict=True) if arm is not None]
        found[audience] = "".join(known) if len(known) == len(arms) else None
    return found


def _explain(error: Any, place: Callable[..., str]) -> str:
    at = tuple(str(part) for part in error["loc"])
    name, message = ".".join(at), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        section: Any = (
            {"primary": Outcome, "exploratory": Outcome, "sizes": Size}.get(at[0], File) if len(at) > 1 else File
        )
        known = set(section.model_fields)
        message = f"unknown key{configs._did_you_mean(at[-1], known)} (allowed: {', '.join(sorted(known))})"
    elif error["type"] == "missing":
        message = "missing"
    return f"{place(*at)}: {name + ': ' if name else ''}{message[0].lower() + message[1:]}"


# Cells --------------------------------------------------------------------------------------------------------------


def cells(sweeps: Sequence[Sweep]) -> list[Cell]:
    """The runs of one or several sweeps, each once, every one with the cell it may start from.

    Raises:
      ConfigError: if two sweeps mean different runs by one directory.
    """
    found: dict[Path, Config] = {}
    flat: dict[Path, dict[str, Any]] = {}
    problems = []
    for sweep in sweeps:
        dumps = {arm: _flat(config.model_dump(mode="json")) for arm, config in sweep.arms.items()}
        for seed in sweep.seeds:  # all arms of a seed come before the next: contrasts are complete as early as may be
            for arm in sweep.arms:
                config, path = sweep.config(arm, seed), sweep.run_dir(arm, seed).absolute()
                mine = dumps[arm] | {"seed": seed}
                other = found.setdefault(path, config)
                theirs = flat.setdefault(path, mine)
                differ = sorted(
                    k for k in {**mine, **theirs}
                    if k not in ("n_rounds", "runs_dir") and mine.get(k, _flat) != theirs.get(k, _flat)
                )  # fmt: skip
                if differ:
                    problems.append(
                        f"{sweep.path}: arm {arm}: {path} is another run in another of the sweeps ({', '.join(differ)} "
                        "differ); rename the arm, or give one of the sweeps its own runs_dir"
                    )
                elif config.n_rounds > other.n_rounds:
                    found[path] = config
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    out: list[Cell] = []
    first: dict[tuple[int, bool, str], int] = {}  # (shared round, alike, all that it reads) -> the first run with it
    places = {path: i for i, path in enumerate(found)}
    for i, (path, config) in enumerate(found.items()):
        shares = ((0, False, LATER), (-1, True, BEFORE_ATTENTION), (-1, False, _free_of_baseline(config)))
        read = [(at, alike, _read(flat[path], free)) for at, alike, free in shares]
        # The first with it has no source of its own at this depth, so nothing waits for what waits for it.
        source, at, alike = next(((first[key], *key[:2]) for key in read if key in first), (None, 0, False))
        for key in read:
            first.setdefault(key, i)
        out.append(Cell(config, source, at, alike, tuple(places[p] for p in _origins(config) if p in places)))
    return out


def _free_of_baseline(config: Config) -> tuple[str, ...]:
    return NOT_RELEASE if config.filters.release is not None else NOT_BASELINE


def _read(flat: Mapping[str, Any], free: Sequence[str]) -> str:
    """What a run reads of its config, as text: every dotted key but those of `free` and below."""
    kept = {k: v for k, v in flat.items() if not any(k == f or k.startswith(f + ".") for f in free)}
    return json.dumps(kept, sort_keys=True)


def _origins(config: Config) -> set[Path]:
    """Runs that a config's real corpus or its release filter takes something from."""
    release = config.filters.release
    named = [c.run for c in config.real.corpora.values()] + [release.at_random if release is not None else None]
    names = [name.replace("{seed}", str(config.seed)) for name in named if isinstance(name, str)]
    return {path for name in names for path in (Path(name).absolute(), (Path(config.runs_dir) / name).absolute())}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".lstrip(".")).items()}


def play_cell(task: Task) -> Result:
    """Plays one cell to its end, or says in one line why it could not; what the pool and Ray both call.

    A task that may be another machine's retry (it names its folder) waits for the lock, up to LOCK_WAIT.
    """
    from loop import run, store, track

    started = time.monotonic()
    shared = None
    try:
        if task.folder is not None:
            os.chdir(task.folder)
        config = configs.validate(json.loads(task.config_text), where="sweep")
        runs_dir = Path(config.runs_dir)
        if task.token is not None and _token(runs_dir) != task.token:
            raise OSError(f"runs_dir must be one directory shared by all nodes, got another at {runs_dir} on "
                          f"{socket.gethostname()}; mount it there")  # fmt: skip
        sibling = None
        mirror = track.Beside if task.track else run.unmirrored
        while True:
            try:
                if task.source is not None and _made_alike(source := Path(task.source), task.at, config):
                    if not (runs_dir / config.run_name / "manifest.json").exists():
                        run.fork(source, task.at, config)
                        shared = task.at
                    sibling = source if task.alike and _has(source, 0) else None
                run.play(config, allow_drift=task.allow_drift, mirror=mirror, sibling=sibling)
                break
            except store.LockedError:
                if task.folder is None or time.monotonic() > started + LOCK_WAIT:
                    raise
                time.sleep(1)
    except Exception as error:
        if os.environ.get("PERSONA_LOOP_TRACEBACK"):
            sys.excepthook(type(error), error, error.__traceback__)
        return Result(_reason(error), time.monotonic() - started, shared)
    return Result(None, time.monotonic() - started, shared, sibling is not None)


def _made_alike(source: Path, at: int, config: Config) -> bool:
    """Whether another run was made with the code, data and packages at hand, so that its files stand for the work."""
    from loop import run, store

    theirs, mine = store.RunStore(source).manifest(), json.loads(json.dumps(run.manifest(run.set_up(config))))
    audience = () if at >= 0 else ("audience", "reader")
    return all(theirs.get(key) == value for key, value in mine.items() if key not in audience)


def _reason(error: Exception) -> str:
    known = hasattr(error, "exit_code") or isinstance(error, (ValueError, OSError))
    text = " ".join(str(error).split())
    return text[:REASON] if known and text else f"{type(error).__name__}: {text}"[:REASON]


# Playing ------------------------------------------------------------------------------------------------------------


class Workers(Protocol):
    """Where cells are played."""

    def free(self) -> int:
        """How many cells may be started now."""
        ...

    def start(self, index: int, task: Task) -> None:
        """Starts a cell."""
        ...

    def wait(self, seconds: float) -> list[tuple[int, Result]]:
        """Cells that ended, waiting for the first at most that long."""
        ...

    def close(self) -> None:
        """Ends what still runs."""
        ...


def play(
    plan: Sequence[Cell],
    workers: Workers,
    *,
    allow_drift: bool = False,
    track: bool = False,
    remote: bool = False,
    watch: Watch = lambda index, what, result: None,
) -> list[Result]:
    """Plays cells, each once its source has what it shares; a cell that fails stops no other.

    A cell whose source failed before that is played from nothing, so a retry gives the same bytes.

    Args:
      plan: from `cells`.
      workers: where; closed at the end.
      allow_drift: as in `run.play`.
      track: each cell has a W&B mirror beside it, on the machine that plays it.
      remote: workers may be on other machines: runs_dir is then given in full, and its token checked there.
      watch: told (index, "start" | "done" | "failed" | "wait", result or None).

    Returns:
      A Result per cell, in order.
    """
    results: dict[int, Result] = {}
    waiting, running = list(range(len(plan))), set[int]()

    def ready(i: int) -> bool:
        cell = plan[i]
        if any(k not in results for k in cell.needs):
            return False
        if cell.source is None or (cell.run_dir / "manifest.json").exists() or cell.source in results:
            return True
        return _has(plan[cell.source].run_dir, 0 if cell.alike else cell.at)

    try:
        while waiting or running:
            for i in [i for i in waiting if ready(i)][: workers.free()]:
                cell = plan[i]
                waiting.remove(i)
                broken = next((plan[k] for k in cell.needs if results[k].reason), None)
                if broken is not None:
                    results[i] = Result(f"it takes from what {broken.run_dir} says, which failed", 0.0)
                    watch(i, "failed", results[i])
                    continue
                source = plan[cell.source] if cell.source is not None else None
                share = str(source.run_dir.absolute()) if source is not None and _has(source.run_dir, cell.at) else None
                workers.start(i, _task(cell, share, allow_drift, remote)._replace(track=track))
                running.add(i)
                watch(i, "start", None)
            for i, result in workers.wait(0.25):
                running.discard(i)
                results[i] = result
                watch(i, "failed" if result.reason else "done", result)
            watch(-1, "wait", None)
    finally:
        workers.close()
    return [results[i] for i in range(len(plan))]


def _text(config: Config) -> str:
    """A config as JSON, its keys in their order: sums over a mapping may round by it, and a cell is to equal a run."""
    return json.dumps(config.model_dump(mode="json"))


def _task(cell: Cell, share: str | None, allow_drift: bool, remote: bool) -> Task:
    if not remote:
        return Task(_text(cell.config), share, cell.at, cell.alike, allow_drift)
    runs_dir = Path(cell.config.runs_dir).absolute()
    config = cell.config.model_copy(update={"runs_dir": str(runs_dir)})
    return Task(_text(config), share, cell.at, cell.alike, allow_drift, os.getcwd(), _token(runs_dir))


def _has(run_dir: Path, at: int) -> bool:
    part = "baseline" if at < 0 else f"round_{at:03d}"
    return (run_dir / part / "MANIFEST.json").exists()


class Local:
    """Processes of this machine, each playing one cell after another.

    One that dies (out of memory, killed) fails its cell alone and is replaced. Each gets its part of the cores, unless
    OMP_NUM_THREADS says otherwise, and one GPU where there are several.
    """

    def __init__(self, jobs: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._jobs = jobs
        self._gpus = _gpus()
        self._workers: dict[int, tuple[Any, Connection]] = {}  # slot -> process and our end of its pipe
        self._playing: dict[int, int] = {}  # slot -> index of its cell
        self._started: dict[int, float] = {}

    def free(self) -> int:
        """Idle slots."""
        return self._jobs - len(self._playing)

    def start(self, index: int, task: Task) -> None:
        """Gives a cell to an idle process, which is started if need be."""
        slot = next(s for s in range(self._jobs) if s not in self._playing)
        if slot not in self._workers:
            self._workers[slot] = self._spawn(slot)
        self._playing[slot], self._started[slot] = index, time.monotonic()
        self._workers[slot][1].send(task)

    def wait(self, seconds: float) -> list[tuple[int, Result]]:
        """Results that came, and failures of processes that ended."""
        done = []
        ready = wait([self._workers[slot][1] for slot in self._playing], timeout=seconds) if self._playing else []
        for slot in [s for s in self._playing if self._workers[s][1] in ready]:
            process, pipe = self._workers[slot]
            index = self._playing.pop(slot)
            try:
                result = pipe.recv()
            except (EOFError, OSError):
                process.join()
                del self._workers[slot]
                code = process.exitcode or 0
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                hint = "; out of memory? try fewer --jobs" if code == -signal.SIGKILL else ""
                result = Result(f"its process ended with {how}{hint}", time.monotonic() - self._started[slot])
            done.append((index, result))
        return done

    def close(self) -> None:
        """Ends the processes; what they were playing is resumed by the next command."""
        for process, pipe in self._workers.values():
            with suppress(OSError):
                pipe.send(None)
            process.join(0 if self._playing else 5)
            if process.is_alive():
                process.terminate()
                process.join()
        self._workers.clear()

    def _spawn(self, slot: int) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        given = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self._jobs))} | (
            {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if len(self._gpus) > 1 else {}
        )
        if "OMP_NUM_THREADS" in os.environ:
            del given["OMP_NUM_THREADS"]
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)  # a process takes its threads and GPUs from the environment it is started in
        try:
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        theirs.close()
        return process, ours


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep ends its processes itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while (task := pipe.recv()) is not None:
        pipe.send(play_cell(task))


def _gpus() -> list[str]:
    """Names of the GPUs there are, for CUDA_VISIBLE_DEVICES; asked without torch, which a sweep never loads."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30).stdout
    return [str(k) for k, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


class Ray:
    """Nodes of a Ray cluster that see one shared directory; a cell whose node dies is played on by another node."""

    def __init__(self, address: str, *, cpus: float = 1, gpus: float = 0) -> None:
        """Connects.

        Args:
          address: `auto` or host:port of the cluster this machine belongs to; ray://host:port, with ray[client], of
            another.
          cpus, gpus: what a cell asks for; a fraction of a GPU lets cells share it.

        Raises:
          ConfigError: Ray is not installed, or no cluster answers there.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Read at import. A port that answers but is not Ray's costs 47 s a try, and Ray would make 20.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError:
            raise ConfigError(
                ["--ray needs the package ray, which is not installed; pip install 'ray>=2.60'"]
            ) from None
        _reachable(address)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
            raise _no_cluster(address, " ".join(str(error).split())[:REASON]) from None
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init sets its own, which exits without a word
        if not any(_offers(node, cpus, gpus) for node in ray.nodes()):
            print(
                f"--ray: no node offers the {cpus:g} CPUs and {gpus:g} GPUs that a cell asks for; cells wait for one",
                file=sys.stderr,
            )
        self._ray = ray
        self._refs: dict[Any, int] = {}
        threads = {"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(cpus))))}}
        self._remote = ray.remote(play_cell).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, runtime_env=threads
        )

    def free(self) -> int:
        """Ray queues what does not fit."""
        return 1 << 20

    def start(self, index: int, task: Task) -> None:
        """Hands a cell to the cluster."""
        self._refs[self._remote.remote(task)] = index

    def wait(self, seconds: float) -> list[tuple[int, Result]]:
        """Results that came."""
        if not self._refs:
            time.sleep(seconds)
            return []
        try:
            done, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=seconds)
        except SystemError as error:  # so Ray wraps what a signal handler of ours raised
            raise (error.__cause__ or error) from None
        out = []
        for ref in done:
            try:
                result = Result(*self._ray.get(ref))
            except self._ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error  # a RayTaskError's own text begins with a traceback
                text = " ".join(str(cause).partition("\n")[0].split())
                result = Result(f"{type(cause).__name__}: {text}"[:REASON], 0.0)
            out.append((self._refs.pop(ref), result))
        return out

    def close(self) -> None:
        """Cancels what still runs and disconnects; the cluster stays."""
        for ref in self._refs:
            self._ray.cancel(ref, force=True)
        self._ray.shutdown()


def _offers(node: Mapping[str, Any], cpus: float, gpus: float) -> bool:
    has = node["Resources"]
    return bool(node["Alive"]) and has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus


def _reachable(address: str) -> None:
    """Asks host:port for an answer before Ray does, which would wait for minutes."""
    host, sign, port = address.rpartition("://")[2].rpartition(":")
    if not sign:
        if address not in ("auto", "local"):
            raise _no_cluster(address, "no port in it")
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        [
            f"--ray must be auto or the address of a running cluster, got {address} ({why}); start one with "
            "`ray start --head`, join it with `ray start --address`, or leave --ray out"
        ]
    )


# The shared directory -----------------------------------------------------------------------------------------------


def prepare(runs_dir: Path, *, seconds: float = 20) -> None:
    """Makes sure that runs can be written to a directory, and leaves the token by which other nodes know it.

    Raises:
      OSError: it cannot be made, written to or read, or does not answer within `seconds`.
    """
    found: list[OSError | None] = []

    def attempt() -> None:
        try:
            runs_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=runs_dir, prefix=".tmp-sweep-") as file:
                file.write(b"1")
                file.flush()
                os.fsync(file.fileno())
            token = runs_dir / TOKEN
            if not token.exists():
                token.write_text(secrets.token_hex(8))
            found.append(None)
        except OSError as error:
            found.append(error)

    # A dead network mount does not refuse, it hangs, in a call no signal ends.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    answer = found[0] if found else OSError(f"no answer in {seconds:g} s")
    if isinstance(answer, OSError):
        raise OSError(
            f"runs_dir must be a directory that runs can be written to, got {answer.strerror or answer} at {runs_dir}; "
            "mount it, or give --runs-dir"
        )


def _token(runs_dir: Path) -> str | None:
    try:
        return (runs_dir / TOKEN).read_text()
    except OSError:
        return None


# The table ----------------------------------------------------------------------------------------------------------


@contextmanager
def table(plan: Sequence[Cell], *, quiet: bool = False) -> Iterator[Watch]:
    """Yields what `play` reports to: a live table of cells on a terminal, a line per finished cell elsewhere."""
    state = dict.fromkeys(range(len(plan)), "waits")
    if quiet or not sys.stderr.isatty():

        def plain(index: int, what: str, result: Result | None) -> None:
            if result is not None and not quiet:
                cell = plan[index]
                print(f"{cell.run_dir}: {_said(result)}", file=sys.stderr, flush=True)

        yield plain
        return

    def draw() -> Table:
        seeds = sorted({c.config.seed for c in plan})
        drawn = Table(*["arm", *(f"seed {s}" for s in seeds)])
        for arm in dict.fromkeys((c.config.runs_dir, c.config.name) for c in plan):
            at = {
                c.config.seed: _progress(c) if state[i] == "plays" else state[i]
                for i, c in enumerate(plan)
                if (c.config.runs_dir, c.config.name) == arm
            }
            drawn.add_row(arm[1], *(at.get(s, "") for s in seeds))
        return drawn

    with Live(draw(), console=Console(stderr=True), refresh_per_second=2) as live:

        def watch(index: int, what: str, result: Result | None) -> None:
            if what == "start":
                state[index] = "plays"
            elif result is not None:
                state[index] = "failed" if result.reason else f"done, {result.seconds:.0f} s"
            live.update(draw())

        yield watch


def _progress(cell: Cell) -> str:
    n = len(list(cell.run_dir.glob("round_*")))
    return f"round {n} of 0..{cell.config.n_rounds}" if n <= cell.config.n_rounds else "ends"


def _said(result: Result) -> str:
    if result.reason:
        return "failed"
    return f"done in {result.seconds:.0f} s" + (
        "" if result.shared is None else f", {'baseline' if result.shared < 0 else f'round {result.shared}'} shared"
    )


def failures(plan: Sequence[Cell], results: Sequence[Result]) -> Table | None:
    """Cells that failed, each with its reason on one line; None where none did."""
    failed = [(c, r.reason) for c, r in zip(plan, results, strict=True) if r.reason]
    if not failed:
        return None
    drawn = Table("cell", "reason", title=f"{len(failed)} of {len(plan)} cells failed", title_justify="left")
    for cell, reason in failed:
        drawn.add_row(Text(cell.config.run_name), Text(str(reason)))
    return drawn
