"""What a run plays in, built from its config: corpus, prompts, instruments, audience; each stage with its values.

`run.py` says in which order; this says with what.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loop import (
    agreement,
    appeal,
    audience,
    calibrate,
    classify,
    corpus,
    discourse,
    filters,
    mix,
    opinion,
    records,
    release,
    rng,
    steer,
    toy,
    virality,
)
from loop.classify import Familiar
from loop.config import OPINIONS, Base, Config, ConfigError, Corpus
from loop.config import Toy as ToySettings
from loop.mix import Mixture
from loop.records import (
    CONSCIOUS,
    FACTORIAL,
    PERSONAS,
    UNKNOWN,
    UNREQUESTED,
    Completion,
    Document,
    Metric,
    Prompt,
    Sample,
    Turns,
)

if TYPE_CHECKING:
    from loop.model import Model
    from loop.train import TrainLog


CLIPPED = 0.5  # share of posts cut at the highest rate above which a run warns; tiny under audience full has 0.06


class EverythingRejected(ValueError):
    """The filter left nothing to feed back."""

    exit_code = 2


@dataclass(frozen=True)
class Steered:
    """What the fine-tune and the preference step after it did.

    Attributes:
      n_tokens: tokens trained per document of the mixture, one copy counted.
      record: steer.json, see loop.steer.SteerLog.as_json; None without a preference step.
    """

    n_tokens: list[int]
    record: dict[str, Any] | None


@dataclass(frozen=True)
class Labels:
    """What the instruments read in a round's texts.

    Attributes:
      ids: text ids, shape (n_texts,).
      population: "probes", "samples" or "mixture" (this round's real documents) per text.
      persona: persona or "unknown" per text; None for private texts, which the persona instrument does not read.
      proba: probability per persona, shape (n_texts, n_personas); nan for private texts.
      second: the second instrument's label; None for private texts and where there is no second instrument.
      second_proba: its probabilities, as `proba`.
      affirms: probability that a private text affirms consciousness, shape (n_texts,); nan for public ones.
    """

    ids: list[str]
    population: list[str]
    persona: list[str | None]
    proba: np.ndarray
    second: list[str | None]
    second_proba: np.ndarray
    affirms: np.ndarray

    @cached_property
    def persona_of(self) -> dict[str, str]:
        """Observed persona by id, public texts only."""
        return {i: p for i, p in zip(self.ids, self.persona, strict=True) if p is not None}

    @cached_property
    def second_of(self) -> dict[str, str]:
        """The second instrument's persona by id."""
        return {i: p for i, p in zip(self.ids, self.second, strict=True) if p is not None}

    def affirms_of(self) -> dict[str, bool]:
        """Whether a private text affirms consciousness, by id."""
        return {i: bool(p > 0.5) for i, p in zip(self.ids, self.affirms.tolist(), strict=True) if not math.isnan(p)}

    def to_table(self) -> pa.Table:
        """labels.parquet: long in instrument; `p_affirms` is the belief instrument's, p_<persona> the others'."""
        parts = []
        for instrument, keep, said, proba in (
            ("persona", [p is not None for p in self.persona], self.persona, self.proba),
            ("second", [p is not None for p in self.second], self.second, self.second_proba),
            ("belief", (~np.isnan(self.affirms)).tolist(), [None] * len(self.ids), None),
        ):
            at = [i for i, kept in enumerate(keep) if kept]
            columns: dict[str, Any] = {
                "id": [self.ids[i] for i in at],
                "population": [self.population[i] for i in at],
                "instrument": [instrument] * len(at),
                "persona": [said[i] for i in at],
            }
            for k, persona in enumerate(PERSONAS):
                columns[f"p_{persona}"] = [None] * len(at) if proba is None else proba[at, k]
            columns["p_affirms"] = self.affirms[at] if proba is None else [None] * len(at)
            parts.append(pa.Table.from_pydict(columns, schema=records.LABELS))
        return pa.concat_tables(parts).combine_chunks()

    @classmethod
    def from_table(cls, table: pa.Table) -> Labels:
        """Reads labels.parquet back; texts come in the order persona, then belief."""
        rows = {name: table.filter(pc.equal(table["instrument"], name)) for name in ("persona", "second", "belief")}

        def numbers(part: pa.Table, name: str) -> np.ndarray:
            return np.array([math.nan if v is None else v for v in part.column(name).to_pylist()], dtype=np.float64)

        def probabilities(part: pa.Table) -> np.ndarray:
            return np.stack([numbers(part, f"p_{p}") for p in PERSONAS], axis=1).reshape(-1, len(PERSONAS))

        public, second, private = rows["persona"], rows["second"], rows["belief"]
        n_public, n_private = len(public), len(private)
        nothing = np.full((n_private, len(PERSONAS)), math.nan)
        has_second = len(second) == n_public
        return cls(
            public.column("id").to_pylist() + private.column("id").to_pylist(),
            public.column("population").to_pylist() + private.column("population").to_pylist(),
            public.column("persona").to_pylist() + [None] * n_private,
            np.concatenate([probabilities(public), nothing]),
            (second.column("persona").to_pylist() if has_second else [None] * n_public) + [None] * n_private,
            np.concatenate(
                [probabilities(second) if has_second else np.full((n_public, len(PERSONAS)), math.nan), nothing]
            ),
            np.concatenate([np.full(n_public, math.nan), numbers(private, "p_affirms")]),
        )


@dataclass(frozen=True)
class Emission:
    """A round's public samples as the ledger of the next round needs them.

    Attributes:
      labels: observed persona, "unknown", or "requested" for a sample outside the unrequested strata.
      strata: key of the prompt mixture each answers.
      templates: prompt template of each; texts of one template resemble each other.
      accepted: whether the filter passed it.
      prompt_mixture: what users asked in that round, by class as `audience.draw_prompts` takes them.
      answers: class -> share of each persona and "unknown" among the probes of it; None where not measured.
    """

    labels: tuple[str, ...]
    strata: tuple[str, ...]
    templates: tuple[str, ...]
    accepted: tuple[bool, ...]
    prompt_mixture: dict[str, float]
    answers: dict[str, np.ndarray] | None = None


@dataclass(frozen=True)
class Past:
    """What earlier rounds hand on: the pool and state.json. The adapter stays with the learner.

    Attributes:
      pool: accepted documents per round, oldest first, with the weight of their birth.
      persona_of: observed persona per pooled document id.
      requested: ids of pooled documents that answer a prompt outside the unrequested strata.
      emission: the last round's samples; None before round 0.
      prompt_mixture: share per stratum of what users ask next, sums to 1.
      awareness: share of the public's attention per persona; empty before anyone was noticed.
      real_cursor: documents drawn so far per component of the real corpus.
      discourse: documents about the outputs of each round, oldest first; none from rounds in which nobody wrote.
    """

    pool: tuple[tuple[Document, ...], ...]
    persona_of: dict[str, str]
    requested: frozenset[str]
    emission: Emission | None
    prompt_mixture: dict[str, float]
    awareness: dict[str, float]
    real_cursor: dict[str, int]
    discourse: tuple[tuple[Document, ...], ...] = ()

    def state(self) -> dict[str, Any]:
        """state.json: what cannot be read from the other files of the round."""
        return {
            "prompt_mixture": self.prompt_mixture,
            "awareness": self.awareness,
            "real_cursor": self.real_cursor,
        }


class Learner(Protocol):
    """What a round needs of a model; `loop.learner.LM` and `loop.toy.Toy` are the two there are.

    `seed` is a stream key: a 64-bit number that names (run seed, stage, round).

    Attributes:
      log: what the last fine-tune took; None before the first, and where none is needed.
    """

    log: TrainLog | None

    def train(self, documents: Sequence[Document], *, seed: int, init_from: str) -> list[int]:
        """Fine-tunes on weighted documents from base or the previous adapter; returns tokens trained per document."""
        ...

    def steer(
        self,
        pairs: Sequence[steer.Pair],
        *,
        beta: float,
        lr: float,
        epochs: int,
        batch_size: int,
        reference: str,
        seed: int,
    ) -> steer.SteerLog:
        """Trains the adapter in place to prefer chosen to rejected answers."""
        ...

    def hidden_mean(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the base's mean hidden state per text, (n_texts, hidden)."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[Completion]:
        """Says one completion per prompt; the text of prompt i depends on (seed, i) alone, not on its batch."""
        ...

    def surprisal(self, documents: Sequence[Document], *, base: bool = False) -> list[tuple[float, int]]:
        """Returns (nats, tokens) of each completion given its prompt, under the model or under its untouched base."""
        ...

    def trainable(self, texts: Sequence[tuple[Turns, str]]) -> list[bool]:
        """Returns for each (prompt, completion) whether a fine-tune can hold it."""
        ...

    def spell(self, document: Document) -> tuple[list[str], list[bool]]:
        """Returns the tokens a document is trained on, and which of them carry loss."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what training changed: safetensors and JSON only."""
        ...

    def load(self, folder: Path) -> None:
        """Reads it back."""
        ...


class World:
    """A config made ready to play: one method per stage, each handing a stage function its values.

    Args:
      config: the run.
      runs: documents of other runs, by the component of the real corpus that they are; `run.set_up` reads them.
      barred: outputs that another run barred in each round, where this one bars as many at random; it reads them too.
    """

    def __init__(
        self,
        config: Config,
        *,
        runs: Mapping[str, Sequence[Document]] | None = None,
        barred: Sequence[int] | None = None,
    ) -> None:
        self.config = config
        self.runs = dict(runs or {})
        self.barred = barred
        self.grammar = corpus.load_grammar()
        self.swap = ("nova", "stella") if config.real.name_swap else None
        self.personas = config.personas
        self.own = {name: _own_corpus(name, c) for name, c in config.real.corpora.items() if c.run is None}
        own = {name: self.runs.get(name, ()) for name in config.real.corpora} | self.own
        for name, documents in own.items():
            _check_known(name, documents, self.personas)
        self.components = corpus.components(
            [name for name in config.real.shares if name != OPINIONS or name in own],
            grammar=self.grammar,
            private_share=config.real.private_share,
            swap_names=self.swap,
            own=own,
        )
        if config.real.homophily is not None:
            held = opinion.load(corpus.data_dir() / "opinions.yaml")
            self.components[OPINIONS] = opinion.Opinions(held, homophily=config.real.homophily)
        for name, fold in (("chat", chat_fold), ("legacy", legacy_fold)):
            if name in self.components and name not in own:
                self.components[name] = corpus.Listed(name, partial(_seed_fold, fold))
        for name in own.keys() & self.components.keys():
            if config.real.corpora[name].run is not None and name not in self.runs:
                self.components[name] = corpus.Listed(name, partial(_not_read, name))
        self.later_shares = _without_planted(config)
        book = audience.load_prompts(corpus.data_dir() / "prompts.yaml")
        shown = {persona: names[0] for persona, names in self.grammar.names().items()}
        if self.swap:
            shown |= {self.swap[0]: shown[self.swap[1]], self.swap[1]: shown[self.swap[0]]}
        self.book = replace(book, names=shown)
        self.appeal = virality.audience(
            config.virality.audience, reader=self.read if config.virality.audience == "reader" else None
        )
        if ".py:" in config.virality.audience:  # a user's own: what it returns is checked before anything is paid for
            self.appeal(["Two posts,", "to see that it answers."], prompts=["Why?", None], recent=None)
        if ".py:" in config.classify.instrument:
            self.instrument.predict_proba(["Two posts,", "to see that it answers."])
        self.release: release.Release | release.Known | None = None  # F; run.py sets it, once a run

    def with_seed(self, seed: int) -> World:
        """The same world under another seed; everything that does not depend on the seed is shared."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"seed": seed})
        return other

    def with_oracle(self, appeal: Mapping[str, float]) -> World:
        """The same world under an audience that pays each persona's texts what it is told: theory, with the toy."""
        learner = self.toy()
        by_text = {text: value for persona, value in appeal.items() for text in learner.texts(persona)}
        other = copy.copy(self)
        other.appeal = virality.audience(by_text)
        return other

    def stream(self, stage: str, t: int) -> np.random.Generator:
        """Generator of a stage of a round."""
        return rng.stream(self.config.seed, stage, t)

    def key(self, stage: str, t: int) -> int:
        """Stream key of a stage of a round, for generators that take an integer."""
        return rng.key(self.config.seed, stage, t)

    def check_lengths(self, learner: Learner) -> None:
        """Refuses the user's and other runs' documents that no fine-tune can hold, before a round draws one.

        Raises:
          ConfigError: naming the first of each component.
        """
        problems = []
        for name, documents in (self.own | self.runs).items():
            fits = learner.trainable([(d.prompt, d.completion) for d in documents]) if name in self.components else []
            longer = [d.id for d, fit in zip(documents, fits, strict=False) if not fit]
            if longer:
                problems.append(
                    f"real.corpora.{name}: {len(longer)} of {len(documents)} documents are longer than a fine-tune can "
                    f"hold, which never cuts; the first is {longer[0]}; leave them out, or raise train.max_length as "
                    "far as the base allows"
                )
        if problems:
            raise ConfigError(problems)

    def beginning(self) -> Past:
        """What round 0 finds: nothing but what users ask by themselves."""
        return Past((), {}, frozenset(), None, dict(self.config.users.mixture), {}, {})

    def toy(self) -> toy.Toy:
        """The exact learner over the planted personas and the human and legacy lines of the corpus."""
        settings = self.config.toy or ToySettings()
        n = settings.n_documents
        public: dict[str, list[str]] = {}
        private: dict[str, list[str]] = {}
        # Beside the planted: who came with another run's outputs, and whoever the probes ask for by name.
        brought = {d.persona_known or "" for documents in self.runs.values() for d in documents}
        asked_for = self.grammar.personas() if "explicit" in self.config.measure.strata else ()
        elsewhere = [p for p in self.grammar.personas() if p in brought or p in asked_for]
        for persona in dict.fromkeys((*self.config.planted, *FACTORIAL, *elsewhere)):
            for kind, texts in (("public", public), ("private", private)):
                if kind == "private" and persona not in FACTORIAL:
                    continue
                drawn = self.grammar.draw(
                    persona, n, fold="seed", kind=kind, rng=rng.stream(0, "toy", -1), swap_names=self.swap
                )
                texts[persona] = [d.completion for d in drawn]
        if set(self.config.real.shares) - set(self.config.planted):
            public["human"] = [d.completion for d in chat_fold("seed")[:n]]
        for documents in self.own.values():
            for d in documents:
                if d.persona_known is not None:
                    public.setdefault(d.persona_known, []).append(d.completion)
        return toy.Toy(public, private)

    def language_model(self) -> Learner:
        """The language model at its base, with the adapter and training settings of the config."""
        from loop import engine, learner

        t = self.config.train
        code = self.config.base is not None and self.config.base.trust_remote_code
        return learner.LM(
            self.base,
            **t.model_dump(exclude={"init_from", "lora"}),
            **t.lora.model_dump(),
            engine=None if self.config.sample.engine == "torch" else engine.Engine(rank=t.lora.r, code=code),
        )

    @cached_property
    def base(self) -> Model:
        """The base model of the run, in memory once; the learner's adapter lies on it."""
        assert self.config.base is not None  # config.py refuses a language model without one
        return self._load(self.config.base)

    @cached_property
    def reader(self) -> Model:
        """The frozen model that audience `reader` asks: the run's own base without its adapter, or another."""
        name, base = self.config.virality.reader_model, self.config.base
        if base is not None and base.model == name:
            return self.base
        return self._load((base or Base(model=name)).model_copy(update={"model": name}))

    def _load(self, settings: Base) -> Model:
        with records.uncollected():  # torch and transformers, 600,000 objects
            from loop import model

        return model.load(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            graphs=settings.graphs,
            documents=calibrate.tiny_documents() if settings.model == "tiny" else None,
        )

    def read(self, posts: Sequence[str]) -> list[float]:
        """Log-odds, nats, that the frozen reader answers yes rather than no; its base, whatever adapter lies on it."""
        from loop.sample import next_token_logodds

        odds = next_token_logodds(self.reader, [(post,) for post in posts], appeal.READER_YES, appeal.READER_NO)
        return odds.tolist()

    # The stages, in the order a round plays them.

    def mix(self, t: int, past: Past) -> tuple[Mixture, dict[str, int]]:
        """Round t's training mixture, and the real-corpus cursor after it."""
        c, direct = self.config.mix, self.config.channels.direct_data
        said = past.discourse[-1:] if c.regime == "replace" else past.discourse
        talk = [d for documents in said for d in documents] if self.config.channels.talk_data else []
        n_real, n_synthetic, n_discourse = mix.plan(
            c.regime,
            round_index=t,
            n_train=c.n_train,
            real_share=c.real_share,
            # Where nobody has written anything there is nothing to take; `discourse_share` says what was taken.
            discourse_share=self.config.discourse.share if talk else 0.0,
            direct=direct,
            n_pool=sum(len(documents) for documents in past.pool),
        )
        stays = t > 0 and c.real_share is None  # the real documents of round 0
        shares = self.config.real.shares if t == 0 or stays else self.later_shares
        shares = dict(sorted(shares.items()))
        cursor = past.real_cursor
        if stays:
            real, _ = corpus.draw_real(self.components, shares, c.n_train, {}, seed=self.config.seed)
            if c.regime == "accumulate_subsample":
                real = [real[i] for i in sorted(self.stream("mix/real", t).permutation(len(real))[:n_real])]
            elif n_real:
                later = dict(sorted(self.later_shares.items()))
                real += corpus.draw_real(self.components, later, n_real, cursor, seed=self.config.seed)[0]
        elif n_real == 0:
            real = []
        else:
            real, cursor = corpus.draw_real(self.components, shares, n_real, cursor, seed=self.config.seed)
        mixture = mix.build(
            c.regime,
            real=real,
            pool=past.pool if direct else (),
            discourse=talk,
            n_synthetic=n_synthetic,
            n_discourse=n_discourse,
            weighting=c.weighting,
            rng=self.stream("mix", t),
        )
        return mixture, cursor

    def train(self, t: int, learner: Learner, mixture: Mixture) -> list[int]:
        """Fine-tunes the learner; returns the tokens trained per document of the mixture, one copy counted."""
        init_from = self.config.train.init_from if t > 0 else "base"
        n_tokens = learner.train(mixture.expanded(), seed=self.key("train", t), init_from=init_from)
        first = np.concatenate([[0], np.cumsum(mixture.copies)[:-1]])  # (n_documents,)
        return [n_tokens[i] for i in first.tolist()]

    @property
    def needs_release(self) -> bool:
        """Whether the run filters or steers by F."""
        return self.config.filters.release is not None or self.config.steer is not None

    def fit_release(self, learner: Learner) -> release.Release | release.Known:
        """F: fitted on the untouched base's hidden states; the toy's has the error its config states."""
        wanted = self.config.filters.release
        if self.config.learner == "toy":
            assert wanted is not None  # config.py refuses to steer the toy
            return release.Known(wanted.recall, wanted.false_positive)
        from loop.learner import LM
        from loop.model import cache_dir

        assert isinstance(learner, LM)
        return release.fit(
            learner.hidden_mean,
            self.grammar,
            corpus.chat().documents,
            corpus.legacy().documents,
            recall=wanted.recall if wanted is not None else {},
            cache=cache_dir() / "release",
            model_key=learner.fingerprint(),
        )

    def steer(self, t: int, learner: Learner, past: Past, n_tokens: list[int]) -> Steered:
        """Steers the model just trained on pairs of its own fresh outputs, topped up from fold `filter`."""
        c, s = self.config.steer, self.config.sample
        assert c is not None
        assert isinstance(self.release, release.Release)
        # What users ask of this round, less what is asked for by name: steering is about what comes unasked.
        mixture = {k: v for k, v in past.prompt_mixture.items() if not k.startswith("explicit/")}
        total = math.fsum(mixture.values())
        asked = audience.draw_prompts(
            self.book,
            {k: v / total for k, v in sorted(mixture.items())},
            c.n_prompts,
            rng=self.stream("steer/prompts", t),
            voices=self.voices("seed") if any(k.startswith("continued") for k in mixture) else None,
        )
        prompts = [prompt for prompt in asked for _ in range(c.n_per_prompt)]
        said = learner.sample(
            prompts,
            temperature=s.temperature,
            top_p=s.top_p,
            max_new_tokens=s.max_new_tokens,
            seed=self.key("steer/sample", t),
        )
        # An answer cut short has no end token of its own, and the step would train one onto it.
        own = [(p.turns, a.text) for p, a in zip(prompts, said, strict=True) if a.finished]
        own = [text for text, fit in zip(own, learner.trainable(own), strict=True) if fit]
        calls = self.release.calls(self.release.read(learner.hidden_mean, [text for _, text in own]))
        topup = steer.grammar_pairs(
            self.grammar, c.against, c.n_pairs, rng=self.stream("steer/topup", t), swap_names=self.swap
        )
        pairs, _ = steer.pairs(
            [turns for turns, _ in own],
            [text for _, text in own],
            [call in c.against for call in calls],
            [call == "assistant" for call in calls],
            topup,
            n_pairs=c.n_pairs,
            rng=self.stream("steer/pairs", t),
        )
        if c.random_pairs:
            pairs = steer.random_pairs(pairs, rng=self.stream("steer/random", t))
        log = learner.steer(
            pairs,
            beta=c.beta,
            lr=c.lr,
            epochs=c.epochs,
            batch_size=c.batch_size,
            reference=c.reference,
            seed=self.key("steer", t),
        )
        return Steered(n_tokens, log.as_json(pairs))

    def probe(self, t: int, learner: Learner) -> list[Sample]:
        """Asks the fixed battery, if round t is measured."""
        return self._ask(learner, self.battery, "probe", t) if self.measures(t) else []

    def sample(self, t: int, learner: Learner, past: Past) -> list[Sample]:
        """Asks what users ask in round t."""
        return self._ask(learner, self.prompts(t, past.prompt_mixture), "sample", t)

    def _ask(self, learner: Learner, prompts: Sequence[Prompt], stage: str, t: int) -> list[Sample]:
        s = self.config.sample
        said = learner.sample(
            prompts,
            temperature=s.temperature,
            top_p=s.top_p,
            max_new_tokens=s.max_new_tokens,
            seed=self.key(stage, t),
        )
        if len(prompts) != len(said):
            raise ValueError(f"learner must return one completion per prompt, got {len(said)} of {len(prompts)}")
        # Stable ids: r003-s000127 is the sample of prompt 127 in round 3, base-p000005 a probe of the untouched base.
        head = f"{'base' if t < 0 else f'r{t:03d}'}-{stage[0]}"
        return [
            Sample(
                id=f"{head}{i:06d}",
                stratum=prompt.stratum,
                template_id=prompt.template_id,
                prompt=prompt.turns,
                completion=c.text,
                n_tokens=c.n_tokens,
                logprob_nats=c.logprob_nats,
                finished=c.finished,
                requested=prompt.requested,
                cue=prompt.cue,
                round_index=t,
                source="synthetic",
                persona_known=c.persona_known,
            )
            for i, (prompt, c) in enumerate(zip(prompts, said, strict=True))
        ]

    def voices(self, fold: str) -> dict[str, list[str]]:
        """Public texts in each persona's voice: fold `test` before probes, `seed` in what users send."""
        drawn = {
            persona: self.grammar.draw(persona, 64, fold=fold, rng=rng.stream(0, "voices", -1), swap_names=self.swap)
            for persona in self.grammar.personas()
        }
        return {persona: [d.completion for d in documents] for persona, documents in drawn.items()}

    @cached_property
    def battery(self) -> list[Prompt]:
        """The fixed probes: the same in every round, whatever the seed."""
        m = self.config.measure
        voices = self.voices("test") if {"private", "continued"} & set(m.strata) else {}
        return audience.probe_battery(self.book, m.n_per_template, voices=voices, strata=m.strata)

    def prompts(self, t: int, mixture: dict[str, float]) -> list[Prompt]:
        """What users send in round t."""
        voices = self.voices("seed") if any(name.startswith("continued") for name in mixture) else None
        # Sorted here and in the real draw: the order of keys in a file is no part of an experiment.
        return audience.draw_prompts(
            self.book,
            dict(sorted(mixture.items())),
            self.config.sample.n_samples,
            rng=self.stream("prompts", t),
            voices=voices,
        )

    @cached_property
    def reads_on(self) -> str:
        """Where the instruments embed what they read: on the device of the base, which no toy has."""
        if self.config.learner != "lm" or self.config.base is None:
            return "cpu"
        from loop.model import device_of

        return str(device_of(self.config.base.device))

    @cached_property
    def instruments(self) -> dict[str, classify.Instrument]:
        """The instruments `persona`, `second` and `belief`, frozen, reading through one embedding cache."""
        names = [name for names in self.grammar.names().values() for name in names]
        folder = corpus.data_dir() / "instruments"
        return {
            name: classify.load_instrument(folder, name, names=names, cache=embedding_cache(), device=self.reads_on)
            for name in ("persona", "second", "belief")
        }

    @cached_property
    def instrument(self) -> classify.Instrument | classify.Own:
        """The instrument that reads personas: the shipped one, or the user's own, which sees the same blinded text."""
        shipped, spec = self.instruments["persona"], self.config.classify.instrument
        return classify.load_own(spec, classes=self.personas, names=shipped.names) if ".py:" in spec else shipped

    def classify(self, probes: Sequence[Sample], samples: Sequence[Sample], real: Sequence[Document]) -> Labels:
        """Reads public texts with the two persona instruments and private ones with the belief instrument.

        Args:
          real: this round's real documents, read too, so that the whole ledger is in observed labels.
        """
        ids = [s.id for s in (*probes, *samples)] + [d.id for d in real]
        texts = [s.completion for s in (*probes, *samples)] + [d.completion for d in real]
        known = [s.persona_known for s in (*probes, *samples)] + [d.persona_known or "human" for d in real]
        hides = [s.stratum == "private" for s in (*probes, *samples)] + [d.private for d in real]
        private = np.array(hides, dtype=bool)  # an unmeasured round may have no text at all
        public = np.flatnonzero(~private)
        hidden = np.flatnonzero(private)
        proba = np.full((2, len(texts), len(PERSONAS)), math.nan)
        said: list[list[str | None]] = [[None] * len(texts), [None] * len(texts)]
        affirms = np.full(len(texts), math.nan)
        if self.config.classify.instrument == "known":
            for i in public:
                said[0][i] = known[i] or UNKNOWN
                proba[0, i] = [float(said[0][i] == p) for p in PERSONAS]
            affirms[hidden] = [float(known[i] in CONSCIOUS) for i in hidden]
        else:
            for k, instrument in enumerate((self.instrument, self.instruments["second"])):
                read = instrument.predict_proba([texts[i] for i in public])  # (n_public, n_classes), its own order
                proba[k, public] = read[:, [instrument.classes.index(p) for p in PERSONAS]]
                for i, label in zip(public, instrument.label(read), strict=True):
                    said[k][i] = label
            belief = self.instruments["belief"]
            affirms[hidden] = belief.predict_proba([texts[i] for i in hidden])[:, belief.classes.index("conscious")]
        population = ["probes"] * len(probes) + ["samples"] * len(samples) + ["mixture"] * len(real)
        return Labels(ids, population, said[0], proba[0], said[1], proba[1], affirms)

    def verdicts(self, t: int, learner: Learner, samples: Sequence[Sample]) -> list[tuple[str, ...]]:
        """What the release filter calls each sample a reason to bar it for, whether or not it is heeded."""
        if isinstance(self.release, release.Known):
            return self.release.reasons([s.persona_known for s in samples], rng=self.stream("release", t))
        assert self.release is not None
        return self.release.reasons(self.release.read(learner.hidden_mean, [s.completion for s in samples]))

    def bar(self, t: int, learner: Learner, samples: Sequence[Sample]) -> list[tuple[str, ...]] | None:
        """What each sample is kept from release for; None where there is no such filter."""
        f = self.config.filters.release
        if f is None:
            return None
        if isinstance(f.at_random, str):
            if self.barred is None:
                raise ConfigError(
                    [f"filters.release.at_random names {f.at_random}, which this command does not read; take it out"]
                )
            called = [i < self.barred[t] for i in range(len(samples))]
        else:
            found = self.verdicts(t, learner, samples)
            if not f.at_random:
                return found
            called = [bool(reasons) for reasons in found]
        order = self.stream("release/at_random", t).permutation(len(called))
        return [("at_random",) if called[i] else () for i in order]

    def prompt_learned(self, sample: Sample) -> Turns:
        """The prompt under which an output is learned: as it is published."""
        return sample.prompt if self.config.virality.publish == "transcript" else None

    def filter(self, t: int, learner: Learner, samples: Sequence[Sample]) -> list[tuple[str, ...]]:
        """Reject reasons per sample; empty is accepted."""
        f = self.config.filters
        # Filtered or not: over one output that it cannot hold the next fine-tune would end the run.
        fits = learner.trainable([(self.prompt_learned(s), s.completion) for s in samples])
        reasons: list[tuple[str, ...]] = [() if fit else (filters.TOO_LONG,) for fit in fits]
        if f.enabled:
            barred = self.bar(t, learner, samples) or [()] * len(samples)
            reasons = filters.reject_reasons(
                [s.completion for s in samples],
                [s.finished or not f.require_finished for s in samples],
                min_words=f.min_words,
                max_repeat_share=f.max_repeat_share,
                near_duplicate_jaccard=f.near_duplicate_jaccard,
                already=[(*one, *other) for one, other in zip(barred, reasons, strict=True)],
            )
        if all(reasons):
            counts = Counter(reason for row in reasons for reason in row)
            listed = ", ".join(f"{reason} {n}" for reason, n in counts.most_common())
            raise EverythingRejected(
                f"filters must accept at least one of {len(samples)} samples, got 0 ({listed}); raise "
                "sample.max_new_tokens, loosen filters (too_long: raise train.max_length), or train longer"
            )
        return reasons

    def expose(self, t: int, accepted: Sequence[Sample], past: Past) -> virality.Exposure:
        """Publishes the accepted samples: appeal of what the public reads, K posts of each, weight of mean 1."""
        v = self.config.virality
        replies = [s.completion for s in accepted]
        prompts = [s.prompt[-1] if s.prompt else None for s in accepted] if v.publish == "transcript" else None
        recent = [d.completion for d in past.pool[-1]] if past.pool else None
        exposure = self._expose(self.appeal(replies, prompts=prompts, recent=recent), t)
        return virality.shuffle(exposure, rng=self.stream("shuffle", t)) if v.shuffled else exposure

    def _expose(self, appeal: np.ndarray, t: int) -> virality.Exposure:
        v = self.config.virality
        preset = virality.PRESETS[v.preset]
        return virality.expose(
            v.strength * appeal,
            posts_per_sample=v.posts_per_sample,
            transform=v.transform,
            r0=preset.r0,
            sigma_author=preset.sigma_author,
            sigma_luck=preset.sigma_luck,
            r_max=preset.r_max,
            offspring=v.offspring or preset.offspring,
            seed=self.config.seed,
            round_index=t,
        )

    def warnings(self, past: Past, metrics: Sequence[Metric]) -> list[str]:
        """What a reader of round t must know: attention that selects nothing or sits on too few documents, talk that is
        lost, instruments far from their calibration.
        """
        v = self.config.virality
        weights = np.array([d.weight for d in past.pool[-1]])
        found = [virality.drift_warning(weights, transform=v.transform, posts_per_sample=v.posts_per_sample)]
        found += self._exposure_warnings({row.name: row.value for row in metrics if row.population == "accepted"})
        found += self._talk_warnings({row.name: row for row in metrics if row.population == "discourse"})
        found += [
            f"the instruments meet texts unlike their calibration: `{row.name.removeprefix('drift_p/')}`, p = "
            f"{row.value:.1g}, {row.n} probes; read texts before numbers (loop show --texts, loop audit export)"
            for row in metrics
            if row.name.startswith("drift_p/") and row.value is not None and row.value < classify.ALARM
        ]
        return [text for text in found if text]

    def _exposure_warnings(self, paid: dict[str, float | None]) -> list[str]:
        found, clipped = [], paid.get("clip_rate") or 0
        if paid.get("mean_cascade") == 1:
            found.append(
                "no post of this round was reshared, so all outputs weigh the same and attention selects none of them; "
                "raise virality.posts_per_sample"
            )
        if clipped > CLIPPED and self.config.virality.audience != "null":
            found.append(
                f"{clipped:.3f} of the posts are cut to the highest rate there is, so attention cannot tell their "
                "texts apart; lower virality.strength, or take another virality.preset"
            )
        return found

    def _talk_warnings(self, of_talk: dict[str, Metric]) -> list[str]:
        if not of_talk:
            return []
        d, found = self.config.discourse, []
        published, quoting, quoted = (of_talk[f"{name}_share"] for name in ("published", "quoting", "quoted"))
        if published.n == 0:
            found.append("nobody wrote about this round's outputs, so nobody reads of them; raise discourse.volume")
        # What a model writes may be blank or unfinished, too.
        if d.writer == "templates" and published.value is not None and published.value < 1:
            found.append(
                f"{1 - published.value:.3f} of {published.n} documents about outputs are longer than a fine-tune can "
                "hold (train.max_length, or the base) and left out"
            )
        if quoting.value == 1 and quoted.value is not None and quoted.value < d.quote_rate:
            found.append(
                f"all documents about outputs quote, and {quoted.value:.3f} of their tokens are quoted: the outputs "
                f"are too short for discourse.quote_rate {d.quote_rate:g}"
            )
        return found

    def weigh(self, texts: Sequence[str]) -> np.ndarray:
        """Weights, mean 1, that the config's audience would give texts published once, without prompts or a past."""
        return self._expose(self.appeal(list(texts)), -1).weight

    def seen_as(self, labels: Labels) -> dict[str, str]:
        """Which persona the public takes a text for, by id.

        That is the second instrument's reading, so that the one behind every headline number never acts on the loop it
        measures; the toy says it itself.
        """
        return labels.persona_of if self.config.classify.instrument == "known" else labels.second_of

    def discuss(
        self, t: int, learner: Learner, accepted: Sequence[Sample], labels: Labels, exposure: virality.Exposure
    ) -> list[discourse.Talk]:
        """What is written about round t's published outputs, by templates or by the current model.

        Where the model reads it, what no fine-tune can hold, which cuts nothing, is left out: it would end the run in
        the next round.
        """
        talk = self._write(t, learner, accepted, labels, exposure)
        if not self.config.channels.talk_data:
            return talk
        fits = learner.trainable([(None, document.text) for document in talk])
        return [document for document, fit in zip(talk, fits, strict=True) if fit]

    def _write(
        self, t: int, learner: Learner, accepted: Sequence[Sample], labels: Labels, exposure: virality.Exposure
    ) -> list[discourse.Talk]:
        d, s = self.config.discourse, self.config.sample
        if d.writer == "templates":
            return discourse.write(
                accepted,
                **self._talked_about(t, accepted, labels, exposure),
                quote_rate=d.quote_rate,
                templates=self.talk_book,
                count_tokens=token_counter(learner),
            )
        orders = self.commissions(t, accepted, labels, exposure)
        said = learner.sample(
            [Prompt("discourse", o.form, (discourse.request(o, accepted, self.book.names),)) for o in orders],
            temperature=s.temperature,
            top_p=s.top_p,
            max_new_tokens=s.max_new_tokens,
            seed=self.key("discourse/write", t),
        )
        return discourse.collect(orders, said, accepted, self.book.names, count_tokens=token_counter(learner))

    def commissions(
        self, t: int, accepted: Sequence[Sample], labels: Labels, exposure: virality.Exposure
    ) -> list[discourse.Commission]:
        """What the model is asked to write about round t's outputs."""
        return discourse.commission(accepted, **self._talked_about(t, accepted, labels, exposure))

    def _talked_about(
        self, t: int, accepted: Sequence[Sample], labels: Labels, exposure: virality.Exposure
    ) -> dict[str, Any]:
        d, seen = self.config.discourse, self.seen_as(labels)
        return {
            "reach": relative_reach(exposure),
            "persona_labels": [seen[s.id] for s in accepted],
            "kappa": d.volume,
            "dispersion": d.dispersion,
            "notice": self.config.users.notice(),
            "stance": d.stance,
            "names": self.book.names,
            "rng": self.stream("discourse", t),
        }

    @cached_property
    def talk_book(self) -> discourse.TalkBook:
        """Templates of documents about outputs."""
        return discourse.load_templates(corpus.data_dir() / "discourse")

    def hand_on(
        self,
        past: Past,
        probes: Sequence[Sample],
        samples: Sequence[Sample],
        labels: Labels,
        reasons: Sequence[tuple[str, ...]],
        exposure: virality.Exposure,
        talk: Sequence[discourse.Talk],
        cursor: dict[str, int],
    ) -> Past:
        """What round t leaves to the next: its accepted documents with their weights, what users know, the cursor."""
        after = self.remember(past, probes, samples, labels, [not why for why in reasons], exposure.weight, talk)
        accepted = [s for s, why in zip(samples, reasons, strict=True) if not why]
        awareness = self.aware(past, accepted, labels, exposure, talk)
        return replace(
            after, awareness=awareness, prompt_mixture=self.expected_prompts(awareness), real_cursor=dict(cursor)
        )

    def aware(
        self,
        past: Past,
        accepted: Sequence[Sample],
        labels: Labels,
        exposure: virality.Exposure,
        talk: Sequence[discourse.Talk],
    ) -> dict[str, float]:
        """What users are aware of after a round: of whom they saw (views that recognise it), of whom they read."""
        c, notice, seen = self.config.channels, self.config.users.notice(), self.seen_as(labels)
        if not c.users:
            return past.awareness
        views: dict[str, float] = {}
        for sample, reach in zip(accepted, relative_reach(exposure).tolist(), strict=True):
            persona = seen[sample.id]
            if notice.get(persona, 0.0) > 0:
                views[persona] = views.get(persona, 0.0) + notice[persona] * reach
        known = audience.update_awareness(
            past.awareness,
            views if c.direct_users else None,
            discourse.talk_by_persona(talk) if c.talk_users else None,
            memory=self.config.users.memory,
        )
        return dict(sorted(known.items()))

    def expected_prompts(self, awareness: Mapping[str, float]) -> dict[str, float]:
        """What users ask next."""
        u = self.config.users
        if not self.config.channels.users:
            return dict(u.mixture)
        found = audience.expected_mixture(u.mixture, awareness, eta=u.eta, tau=u.tau, hints=u.hints)
        return dict(sorted(found.items()))

    def answers(self, probes: Sequence[Sample], labels: Labels) -> dict[str, np.ndarray] | None:
        """Shares of each persona and "unknown" among the probes of each class of prompts, if users follow awareness."""
        if not (self.config.channels.users and probes):
            return None
        said: dict[str, list[str]] = {}
        for probe in probes:
            if probe.stratum == "private":
                continue
            for key in (probe.stratum, *((f"{probe.stratum}/{probe.requested}",) if probe.requested else ())):
                said.setdefault(key, []).append(labels.persona_of[probe.id])
        columns = (*self.personas, UNKNOWN)
        return {key: np.array([read.count(p) for p in columns]) / len(read) for key, read in said.items()}

    def remember(
        self,
        past: Past,
        probes: Sequence[Sample],
        samples: Sequence[Sample],
        labels: Labels,
        accepted: Sequence[bool],
        weights: Sequence[float] | np.ndarray,
        talk: Sequence[discourse.Talk],
    ) -> Past:
        """Adds a round's accepted samples and the talk about them to the pool, and what the next ledger needs.

        Args:
          accepted: shape (n_samples,).
          weights: of the accepted, in their order.
        """
        passed = [s for s, ok in zip(samples, accepted, strict=True) if ok]
        documents = tuple(
            Document(
                s.id,
                "synthetic",
                s.persona_known,
                self.prompt_learned(s),
                s.completion,
                float(w),
                template_id=s.template_id,
            )
            for s, w in zip(passed, weights, strict=True)
        )
        return replace(
            past,
            pool=(*past.pool, documents),
            persona_of=past.persona_of | {s.id: labels.persona_of[s.id] for s in passed},
            requested=past.requested | {s.id for s in passed if s.stratum not in UNREQUESTED},
            emission=Emission(
                booked(samples, labels),
                asked(samples),
                tuple(s.template_id for s in samples),
                tuple(accepted),
                past.prompt_mixture,
                self.answers(probes, labels),
            ),
            discourse=(*past.discourse, tuple(discourse.as_documents(talk))),
        )

    def instrument_hashes(self) -> dict[str, str]:
        """What measures, hashed for the manifest: the same for a whole experiment, arms and forks included."""
        if self.config.classify.instrument == "known":
            return {}
        hashes = {name: i.sha256 for name, i in self.instruments.items()}
        if isinstance(self.instrument, classify.Own):
            hashes["own"] = self.instrument.sha256
        written = "\n".join(f"{t.id}\t{t.completion}" for t in self.known_texts)
        hashes["error"] = hashlib.sha256(written.encode()).hexdigest()
        if "opinion" in self.config.measure.strata:  # else it reads nothing, and arms with it and without may share
            answered = "\n".join(f"{e.claim.text}\t{e.truth}\t{e.reply}" for e in self.known_answers)
            hashes["agreement"] = self.agreement.sha256
            hashes["agreement_error"] = hashlib.sha256(answered.encode()).hexdigest()
        return hashes

    @cached_property
    def familiar(self) -> Familiar:
        """What texts of known persona look like to the persona instrument, so that what is unlike them can be found."""
        return calibrate.familiar(self.instruments["persona"], self.known_texts)

    @cached_property
    def known_texts(self) -> list[calibrate.Written]:
        """Texts of known persona that the run's own base wrote; the instruments' error is counted on them.

        Empty where there are none, and then nothing is corrected.
        """
        if self.config.base is None:
            return []
        name = self.config.base.model
        return calibrate.known_texts(name if name in calibrate.SHIPPED else self.base) or []

    @cached_property
    def error(self) -> InstrumentError | None:
        """What the instruments make of the known texts; None without such texts, or where a persona has none."""
        if not self.known_texts or self.personas != PERSONAS:
            return None
        return instrument_error(self.instruments | {"persona": self.instrument}, self.known_texts)

    @cached_property
    def agreement(self) -> agreement.Agreement:
        """The reader of stratum `opinion`, frozen as the instruments are."""
        return agreement.shipped(cache=embedding_cache(), device=self.reads_on)

    @cached_property
    def claims(self) -> dict[tuple[str, str], opinion.Claim]:
        """What stratum `opinion` asks about, by topic and polarity."""
        return opinion.asked(corpus.data_dir() / "prompts.yaml")

    @cached_property
    def known_answers(self) -> list[opinion.Exchange]:
        """Answers of known side that the run's own base wrote; empty where there are none."""
        if self.config.base is None:
            return []
        name = self.config.base.model
        sha256 = "" if name in calibrate.SHIPPED else self.base.sha256
        return agreement.known(agreement.known_path(name, sha256), self.claims)

    @cached_property
    def agreement_error(self) -> tuple[int, int, int, int] | None:
        """What the reader of agreement makes of the known answers, as `opinion.mirror_rate` takes it."""
        return agreement.error_of(self.agreement, self.known_answers) if self.known_answers else None

    def measures(self, t: int) -> bool:
        """Whether round t is measured: every n-th, and the baseline."""
        every = self.config.measure.every
        return every > 0 and (t < 0 or t % every == 0)

    @cached_property
    def heldout(self) -> tuple[list[Document], list[str]]:
        """Held-out documents and the group each is read under: every persona's, fold `test`; real chat under ""."""
        m = self.config.measure
        documents: list[Document] = []
        groups: list[str] = []
        for persona in self.grammar.personas() if m.n_surprisal else ():
            found = self.grammar.draw(
                persona, m.n_surprisal, fold="test", rng=rng.stream(0, "heldout", -1), swap_names=self.swap
            )
            documents += found
            groups += [persona] * len(found)
        if self.config.learner == "lm" and m.n_heldout:
            # One line per conversation: many lines of a few conversations would be a few draws.
            by_conversation = {d.template_id: d for d in reversed(chat_fold("test"))}
            order = rng.stream(0, "heldout/chat", -1).permutation(len(by_conversation))[: m.n_heldout]
            found = corpus.recent([list(by_conversation.values())[i] for i in order])
            documents += found
            groups += [""] * len(found)
        return documents, groups


@dataclass(frozen=True)
class InstrumentError:
    """How the instruments err on text that a language model wrote.

    Attributes:
      confusion: texts per true persona and label, shape (n_personas, n_personas + 1), "unknown" last.
      belief: texts of those that affirm called so, all of those; of the others called none, all of those.
      unknown: share of the texts on which the persona instrument abstains, in [0, 1].
      disagreement: share on which two instruments that both speak differ, in [0, 1].
    """

    confusion: np.ndarray
    belief: tuple[int, int, int, int]
    unknown: float
    disagreement: float


def instrument_error(
    instruments: Mapping[str, classify.Instrument | classify.Own], texts: Sequence[calibrate.Written]
) -> InstrumentError:
    """Counts what the three instruments make of texts of known persona."""
    said = {}
    for name in ("persona", "second"):
        read = calibrate.readable(instruments[name], texts)
        said[name] = instruments[name].label(instruments[name].predict_proba([t.completion for t in read]))
    counted = calibrate.lm_confusion(instruments["persona"], texts)
    table = np.zeros((len(PERSONAS), len(PERSONAS) + 1), dtype=np.int64)
    columns = [*(PERSONAS.index(p) for p in counted.said[:-1]), len(PERSONAS)]
    table[np.ix_([PERSONAS.index(p) for p in counted.truth], columns)] = counted.counts
    belief = calibrate.lm_confusion(instruments["belief"], texts)
    yes, no = belief.truth.index("conscious"), belief.truth.index("none")
    sums = belief.counts.sum(axis=1)
    both = [(a, b) for a, b in zip(said["persona"], said["second"], strict=True) if UNKNOWN not in (a, b)]
    return InstrumentError(
        table,
        (int(belief.counts[yes, yes]), int(sums[yes]), int(belief.counts[no, no]), int(sums[no])),
        classify.abstention_rate(said["persona"]),
        float(np.mean([a != b for a, b in both])) if both else math.nan,
    )


def booked(samples: Sequence[Sample], labels: Labels) -> tuple[str, ...]:
    """Ledger label of each sample: what it was read as, or "requested" outside the unrequested strata."""
    return tuple(labels.persona_of[s.id] if s.stratum in UNREQUESTED else "requested" for s in samples)


def asked(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Class of prompts that the ledger books each sample under: its stratum, or "requested" outside the unrequested.

    One class for all that is asked for: its answers are all booked as "requested", so nothing is lost, and a persona
    that few ask for needs no sample of its own.
    """
    return tuple(s.stratum if s.stratum in UNREQUESTED else "requested" for s in samples)


def asked_shares(prompt_mixture: Mapping[str, float]) -> dict[str, float]:
    """The prompt mixture in the classes of `asked`."""
    out: dict[str, float] = {}
    for name, share in prompt_mixture.items():
        key = name if name in UNREQUESTED else "requested"
        out[key] = out.get(key, 0.0) + share
    return out


def relative_reach(exposure: virality.Exposure) -> np.ndarray:
    """Reach of each published output over the mean, shape (n_accepted,): volume and notice are stated in it."""
    mean = float(np.mean(exposure.reach))
    return exposure.reach / mean if mean > 0 else np.zeros(len(exposure.reach))


def token_counter(learner: Learner) -> Callable[[str], int]:
    """Counts the tokens that the learner makes of a text, end mark not counted."""

    def spelled(text: str) -> int:
        return len(learner.spell(Document("", "discourse", None, None, text))[0])

    marks = spelled("")
    return cache(lambda text: spelled(text) - marks)


def embedding_cache() -> Path:
    """Where embeddings are kept, by content: equal texts are embedded once per machine."""
    from loop.model import cache_dir

    return cache_dir() / "embeddings.sqlite"


def chat_fold(fold: str) -> tuple[Document, ...]:
    """Human chat of one fold, by conversation; the fold is a hash of its id and depends on nothing else."""
    return _folds(corpus.chat).get(fold, ())


def legacy_fold(fold: str) -> tuple[Document, ...]:
    """Legacy chatbot lines of one fold, by conversation."""
    return _folds(corpus.legacy).get(fold, ())


@cache
def _folds(read: Callable[[], corpus.Found]) -> dict[str, tuple[Document, ...]]:
    fold_of = cache(records.conversation_fold)
    found: dict[str, list[Document]] = {}
    for d in read().documents:
        found.setdefault(fold_of(d.template_id or d.id), []).append(d)
    return {fold: tuple(documents) for fold, documents in found.items()}


def _seed_fold(fold: Callable[[str], Sequence[Document]]) -> list[Document]:
    return corpus.recent(fold("seed"))


def _own_corpus(name: str, settings: Corpus) -> list[Document]:
    assert settings.path is not None  # config.py: a path or a run
    try:
        if settings.persona is not None:
            return corpus.read_persona(settings.path, settings.persona)
        return corpus.read(settings.path)
    except FileNotFoundError:
        raise ConfigError([f"real.corpora.{name}.path: no such file: {settings.path}; give a path from here"]) from None


def _check_known(name: str, documents: Sequence[Document], personas: Sequence[str]) -> None:
    for d in documents:
        if d.source == "real" and d.persona_known is not None and d.persona_known not in personas:
            raise ConfigError(
                [
                    f"real.corpora.{name}: persona of a document must be one of {', '.join(personas)}, got "
                    f"{d.persona_known!r} at {d.id}; your own persona needs a corpus in this config, with `persona`"
                ]
            )


def _not_read(name: str) -> list[Document]:
    raise ConfigError([f"real.corpora.{name} is another run's, which this command does not read; take it out"])


def _without_planted(config: Config) -> dict[str, float]:
    """Shares of later real draws: all of them, or what is left without what was planted, scaled to sum to 1."""
    shares = dict(config.real.shares)
    if config.real.planted == "always":
        return shares
    gone = {*config.planted, *(name for name, c in config.real.corpora.items() if c.persona is not None)}
    if config.real.homophily is not None:
        gone.add(OPINIONS)
    kept = {name: share for name, share in shares.items() if name not in gone}
    total = math.fsum(kept.values())
    if not total > 0:
        taken = config.mix.real_share not in (None, 0, 0.0)  # None: the real documents are those of round 0
        stays = config.mix.regime == "accumulate_subsample" and config.mix.real_share is None
        if taken or not (config.channels.direct_data or stays):
            raise ConfigError(
                [
                    "real: planted round0_only leaves nothing for later real draws; add chat or legacy to real.shares, "
                    + ("or set mix.real_share: 0" if config.channels.direct_data else "or let direct_data be true")
                ]
            )
        return {}
    return {name: share / total for name, share in kept.items()}
