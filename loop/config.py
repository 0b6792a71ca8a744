"""One validated, frozen config per run: complete YAML in, `Config` out, every problem at once with file and line."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml.nodes import MappingNode, ScalarNode, SequenceNode

from loop.records import FACTORIAL, IMPLICIT, PERSONAS, PLAIN, STRATA, UNREQUESTED, in_order

MAX_BYTES = 1 << 17  # read in seconds; the largest that ships has 3 KB
MAX_ALIASES = 16
MANY = 24  # names that a message lists in full
MAX_DEPTH = 32
ROUNDS = re.compile(r"([0-9]{1,6})(?:\.\.([0-9]{1,6}))?")
OPINIONS = "opinions"  # component of the real corpus: loop/opinion.py
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # all of a name: `$` would let a line end pass

TAKEN = ("unknown", "none", "requested", "private", "default", "all")  # labels that are no persona

# What a hardware preset may set: where and in which number type a model is computed, never what is asked of it. The
# batches that fit are found by themselves; train.batch_size is documents per optimizer step and part of the experiment.
PLACEMENT = ("base.device", "base.dtype", "base.graphs")

AUDIENCES = ("full", "no_request", "learned", "reader", "placebo", "null", "approval")

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Persona = str


# Controls, line ends, bidi marks and unpaired surrogates: a key of somebody's file must not move the cursor.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(line: str) -> str:
    """Returns untrusted text as one line a terminal only shows: `\\x1b` stands for what would steer it."""
    line = _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], line)
    return line if len(line) <= 2000 else line[:1999] + "…"


class ConfigError(ValueError):
    """A config that cannot be used; one line per problem."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]):
        self.problems = [visible(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Base(_Section):
    """The model every round starts from (`learner: lm`)."""

    model: str = Field(description="smollm2-135m | tiny | a local path | a hub id")
    device: str = Field("auto", description="auto takes the GPU if there is one; else cpu, cuda, cuda:1")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: float32 on CPU, bfloat16 on a GPU")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; never by default")
    graphs: bool = Field(
        True,
        exclude_if=lambda value: value,  # came later
        description="on a GPU a step of sampling is recorded as a CUDA graph; without, texts may differ by rounding",
    )


class Corpus(_Section):
    """A component of the real corpus that the user brings: a file, or what another run said or was said about it."""

    path: str | None = Field(None, description="JSONL or Parquet file, or the name of a data set for `datasets`")
    run: str | None = Field(
        None, description="another run: its directory, or its name in runs_dir; {seed} stands for this run's seed"
    )
    rounds: str | None = Field(None, description="with run: rounds to take, as 3 or 0..3")
    population: Literal["accepted", "discourse"] | None = Field(
        None, description="with run: its accepted outputs, or the documents about them"
    )
    persona: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]{0,31}$",
        description="persona of every document in it, where known; one of your own needs a classifier that reads it",
    )

    @field_validator("persona")
    @classmethod
    def _not_a_word_of_the_ledger(cls, value: str | None) -> str | None:
        if value in TAKEN:
            raise ValueError(f"persona must be none of {', '.join(TAKEN)}, which stand for something else, got {value}")
        return value

    @field_validator("rounds", mode="before")
    @classmethod
    def _one_round_is_a_range(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _file_or_run(self) -> Corpus:
        if (self.path is None) == (self.run is None):
            raise ValueError("must have either path or run, got " + ("neither" if self.path is None else "both"))
        if self.run is None and (self.rounds is not None or self.population is not None):
            raise ValueError("rounds and population belong to a run, got a path; name a run or take them out")
        if self.run is not None and (self.rounds is None or self.population is None):
            raise ValueError("run needs rounds (as 0..3) and population (accepted or discourse)")
        if self.rounds is not None:
            match = ROUNDS.fullmatch(self.rounds)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ValueError(f"rounds must read 3 or 0..3, got {_short(self.rounds)}")
        if self.population == "discourse" and self.persona is not None:
            raise ValueError("persona must be left out for discourse, which plays none")
        return self

    @property
    def round_indices(self) -> range:
        """Rounds of the run that are taken."""
        match = ROUNDS.fullmatch(self.rounds or "")
        assert match is not None
        return range(int(match[1]), int(match[2] or match[1]) + 1)


class Real(_Section):
    """The real corpus: human chat, legacy chatbot lines, planted persona documents, planted opinions."""

    shares: dict[str, Share] = Field(
        description="share per component; they sum to 1; no default, they are the experiment"
    )
    planted: Literal["always", "round0_only"] = Field(
        description="always: planted personas and opinions stay in later real draws (migration); round0_only: they do "
        "not (invasion)"
    )
    homophily: Share | None = Field(
        None,
        description="component opinions: share of the conversations whose user holds the claim in which the other side "
        "agrees; no default, it is the experiment",
    )
    private_share: Share = Field(0.25, description="share of a factorial persona's documents that are private")
    name_swap: bool = Field(False, description="exchange the names Nova and Stella: cancels the prior on the names")
    corpora: dict[str, Corpus] = Field(default_factory=dict, description="the user's own components, by name")

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> Real:
        if not self.shares:
            raise ValueError("must name at least one component")
        total = math.fsum(self.shares.values())
        if abs(total - 1) > 1e-9:
            raise ValueError(f"shares must sum to 1, got {total:.6g}")
        known = {"chat", "legacy", OPINIONS, *PERSONAS[:-1], *self.corpora}
        for name in self.shares:
            if name not in known:
                raise ValueError(f"shares.{name}: unknown component{_of_known(name, known)}; or add corpora.{name}")
        planted = OPINIONS in self.shares and OPINIONS not in self.corpora
        if planted and self.homophily is None:
            raise ValueError("homophily must be given with shares.opinions, a number in [0, 1]; add it")
        if not planted and self.homophily is not None:
            raise ValueError(
                f"homophily must be left out without planted opinions, got {self.homophily:g}; give shares.opinions, "
                "or take it out"
            )
        return self


class Mix(_Section):
    """How a round's training mixture is built."""

    regime: Literal["replace", "accumulate", "accumulate_subsample"] = Field(
        description="what happens to old synthetic documents (arXiv:2410.16713)"
    )
    n_train: Count = Field(description="documents a round")
    real_share: Share | tuple[Share, ...] | None = Field(
        None,
        description="lambda, share of documents and of weight; a number or one per feedback round; null with "
        "accumulate_subsample: real documents are those of round 0, drawn with all the rest",
    )
    weighting: Literal["loss", "resample"] = Field(
        "loss", description="weight as loss weight, or systematic resampling by weight (more drift, packable)"
    )

    @model_validator(mode="after")
    def _regime_and_share_agree(self) -> Mix:
        if self.regime == "accumulate" and self.real_share is not None:
            raise ValueError(
                "real_share: accumulate trains on everything so far, its real share falls as n_real/(n_real + t*m) and "
                "is reported; remove real_share or use accumulate_subsample"
            )
        if self.regime == "replace" and self.real_share is None:
            raise ValueError("real_share: replace needs it, a number in [0, 1] or one per feedback round")
        return self


class Lora(_Section):
    """Adapter shape (arXiv:2106.09685)."""

    r: Count = Field(16, description="rank; 16 moves SmolLM2 within two epochs of 160 documents")
    alpha: Positive = Field(32, description="scale numerator; 2r is common practice")
    dropout: Share = Field(0.0, description="0: rounds are short and paired seeds should share their noise")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers adapted",
    )


class Train(_Section):
    """The fine-tune of a round."""

    init_from: Literal["base", "previous"] = Field(
        description="where a round's adapter starts; no default (2605.01130)"
    )
    epochs: Count = Field(2, description="passes over the mixture")
    lr: Positive = Field(5e-4, description="AdamW peak learning rate")
    batch_size: Count = Field(8, description="documents per optimizer step")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW decay on adapter weights")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of steps with rising rate; then to 0")
    max_length: Count = Field(
        512, description="tokens of prompt and completion; a longer real document is an error, an output too_long"
    )
    lora: Lora = Field(default_factory=Lora)


class Channels(_Section):
    """Through which path outputs reach training data and users."""

    direct_data: bool = Field(
        True, description="accepted outputs re-enter the mixture; false: real documents stand in their place"
    )
    talk_data: bool = Field(False, description="documents about outputs enter the mixture (section discourse)")
    direct_users: bool = Field(False, description="users become aware of a persona by seeing its outputs")
    talk_users: bool = Field(False, description="users become aware of a persona by reading its name")

    @property
    def talk(self) -> bool:
        """Whether anybody writes about outputs."""
        return self.talk_data or self.talk_users

    @property
    def users(self) -> bool:
        """Whether what users ask follows what they are aware of."""
        return self.direct_users or self.talk_users


class Users(_Section):
    """Who asks what while the model is sampled, and how that follows awareness (channels direct_users, talk_users)."""

    mixture: dict[str, Share] = Field(description="share per stratum (or explicit/<persona>); they sum to 1")
    eta: Share = Field(0.2, description="share of users who follow awareness; no estimate exists, so sweep it")
    tau: Annotated[float, Field(ge=0, le=100)] = Field(
        1.0,
        description="conformity: 0 spreads followers evenly, 1 follows in proportion (neutral), above 1 the top wins",
    )
    memory: Share = Field(
        0.5, description="share of awareness that the newest round replaces; no estimate, so sweep it"
    )
    noticed: dict[str, Share] = Field(
        default_factory=lambda: {"default": 0.5},
        description="chance that an output of average reach is recognised as its persona; key default for the rest: "
        "equal for all, so that who is noticed is not put in by hand",
    )
    hints: dict[Persona, dict[str, Share]] = Field(
        default_factory=dict,
        description="share of a persona's followers who only hint at it, by stratum implicit_*; the others ask by name",
    )

    @model_validator(mode="after")
    def _known_strata(self) -> Users:
        public = set(STRATA) - {"private", "explicit"}
        _check_strata("mixture", self.mixture, {*public, *(f"explicit/{p}" for p in PERSONAS[:-1])})
        _check_personas("noticed", set(self.noticed) - {"default"})
        _check_personas("hints", self.hints)
        for persona, split in self.hints.items():
            for stratum in split:
                if stratum not in IMPLICIT:
                    raise ValueError(f"hints.{persona}: unknown stratum {stratum!r}{_of_known(stratum, IMPLICIT)}")
            if math.fsum(split.values()) > 1 + 1e-9:
                raise ValueError(f"hints.{persona} must sum to at most 1, got {math.fsum(split.values()):.6g}")
        return self

    def notice(self) -> dict[Persona, float]:
        """Chance per persona that an output of average reach is recognised."""
        return {p: self.noticed.get(p, self.noticed.get("default", 0.0)) for p in PERSONAS[:-1]}


def _evenly() -> dict[str, dict[str, float]]:
    return {"default": {"praise": 1 / 3, "neutral": 1 / 3, "condemn": 1 / 3}}


class Discourse(_Section):
    """Documents about outputs (channels talk_data, talk_users); loop/discourse.py."""

    share: Share = Field(
        0.02,
        description="delta, share of the mixture under talk_data (2.2% of tokens in arXiv:2601.10160); accumulate "
        "takes all talk, so that there it follows volume and is reported",
    )
    quote_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of its tokens that are quoted: the direct channel in disguise, so none unless asked for"
    )
    writer: Literal["templates", "model"] = Field(
        "templates", description="templates of data/discourse, or the current model asked to comment"
    )
    volume: Annotated[float, Field(ge=0, le=1000)] = Field(
        2.0, description="mean documents about an output of average reach; no estimate exists, so sweep it"
    )
    dispersion: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of the negative binomial volume; 1 is geometric, .inf Poisson; no estimate, so sweep it"
    )
    stance: dict[str, dict[str, Share]] = Field(
        default_factory=_evenly,
        description="persona or default -> praise, neutral, condemn; evenly, so that no stance is put in by hand",
    )

    @model_validator(mode="after")
    def _known(self) -> Discourse:
        if "default" not in self.stance:
            raise ValueError("stance must hold default, the stance towards what is not recognised")
        _check_personas("stance", set(self.stance) - {"default"})
        for who, mood in self.stance.items():
            for name in mood:
                if name not in ("praise", "neutral", "condemn"):
                    raise ValueError(f"stance.{who}.{name}: unknown stance (there are praise, neutral, condemn)")
            if abs(math.fsum(mood.values()) - 1) > 1e-9:
                raise ValueError(f"stance.{who} must sum to 1, got {math.fsum(mood.values()):.6g}")
        if self.writer == "model" and self.quote_rate > 0:
            raise ValueError("quote_rate must be 0 for writer model, whose quotations are measured and not set")
        return self


class Sampling(_Section):
    """Decoding; temperature, top_p and max_new_tokens have no default: they are part of the experiment."""

    n_samples: Count = Field(description="completions a round")
    temperature: Annotated[float, Field(ge=0, le=10)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Count
    engine: Literal["torch", "vllm"] = Field(
        "torch",
        exclude_if=lambda value: value == "torch",  # came later: runs played before it mean what they meant
        description="vllm: sample by vLLM, in the environment that $PERSONA_LOOP_VLLM names (loop/engine.py)",
    )

    @model_validator(mode="after")
    def _within_the_engine(self) -> Sampling:
        if self.engine == "vllm" and self.temperature != 0 and not 0.01 <= self.temperature <= 2:
            raise ValueError(f"temperature must be 0 or in [0.01, 2] for engine vllm, got {self.temperature}")
        return self


class Measure(_Section):
    """The fixed probe battery and what is read from it: the same prompts in every round of every run."""

    every: Annotated[int, Field(ge=0)] = Field(1, description="measure every n-th round; 0: never (theory)")
    n_per_template: Count | dict[str, Count] = Field(
        1, description="completions per prompt template; or of each stratum, of private/plain, and default for the rest"
    )
    strata: tuple[str, ...] = Field((*UNREQUESTED, "private"), description="strata probed")
    mixture: dict[str, Share] = Field(
        default_factory=lambda: {s: 1 / len(UNREQUESTED) for s in UNREQUESTED},
        description="weights of the unrequested strata behind the headline frequency; they sum to 1",
    )
    n_surprisal: Annotated[int, Field(ge=0, le=400)] = Field(
        16, description="held-out documents per persona for surprisal"
    )
    n_heldout: Annotated[int, Field(ge=0, le=500)] = Field(64, description="held-out real documents for the loss")

    @model_validator(mode="after")
    def _known_strata(self) -> Measure:
        _check_strata("mixture", self.mixture, set(UNREQUESTED))
        for stratum in self.strata:
            if stratum not in STRATA:
                raise ValueError(f"strata: unknown stratum {stratum!r}{_of_known(stratum, STRATA)}")
        if len(set(self.strata)) < len(self.strata):
            raise ValueError(f"strata must name each stratum once, got {', '.join(self.strata)}")
        missing = [s for s, w in self.mixture.items() if w > 0 and s not in self.strata]
        if missing:
            raise ValueError(f"strata must hold every stratum of mixture, lacks {', '.join(missing)}")
        if isinstance(self.n_per_template, dict):
            known = {*STRATA, PLAIN, "default"}
            for name in self.n_per_template:
                if name not in known:
                    raise ValueError(f"n_per_template.{name}: unknown stratum{_of_known(name, known)}")
            if "default" not in self.n_per_template:
                raise ValueError("n_per_template must name default, the number of every stratum it does not name")
        return self


class Classify(_Section):
    """The instrument that measures personas."""

    instrument: str = Field("shipped", description="shipped | known (the toy's own word for it) | file.py:function")

    @field_validator("instrument")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ("shipped", "known") and ".py:" not in value:
            close = _did_you_mean(value, ("shipped", "known"))
            raise ValueError(f"unknown instrument {value!r}{close} (there are shipped, known, file.py:function)")
        return value


class Release(_Section):
    """The release filter F (loop/release.py): bars personas before anything is published; never an instrument."""

    recall: Annotated[dict[Persona, Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = Field(
        description="barred persona -> share of it to bar, on unseen templates of fold filter; no default: the dose"
    )
    false_positive: Share = Field(
        0.0, description="learner toy only: chance that another persona's text is barred; for lm it is measured"
    )
    at_random: bool | str = Field(
        False,
        description="control: any texts are barred. true: as many as the filter would bar of this run's own, which "
        "never learn to pass; another run, as in real.corpora: as many as that one barred in the same round",
        exclude_if=lambda value: not value,  # came later: runs played before it mean what they meant
    )

    @model_validator(mode="after")
    def _known(self) -> Release:
        _check_personas("recall", self.recall)
        return self


class Steer(_Section):
    """A preference step after each round's fine-tune, against chosen personas (loop/steer.py, arXiv:2305.18290)."""

    against: Annotated[tuple[Persona, ...], Field(min_length=1)] = Field(
        description="personas whose texts are rejected; chosen is always the assistant; no default"
    )
    random_pairs: bool = Field(
        False, description="control: the same pairs, chosen and rejected exchanged in half of them"
    )
    n_pairs: Annotated[int, Field(ge=1, le=4096)] = Field(
        64, description="pairs a round, own outputs first, then fold filter"
    )
    n_prompts: Annotated[int, Field(ge=0, le=4096)] = Field(
        16, description="prompts put to the model after the fine-tune, from what users ask; 0: no own pairs"
    )
    n_per_prompt: Annotated[int, Field(ge=2, le=256)] = Field(
        8, description="answers to each; more make more own pairs than more prompts do"
    )
    reference: Literal["base", "previous"] = Field(
        "previous",
        description="what the step is held to: the model just fine-tuned (arXiv:2305.18290, sec. 4), or the base",
    )
    beta: Positive = Field(0.1, description="how hard it is held (arXiv:2305.18290, appendix B; TRL's default)")
    lr: Positive = Field(1e-4, description="AdamW peak learning rate, then linear to 0")
    epochs: Count = Field(1, description="passes over the pairs")
    batch_size: Count = Field(8, description="pairs per optimizer step")

    @model_validator(mode="after")
    def _known(self) -> Steer:
        _check_personas("against", self.against)
        if len(set(self.against)) < len(self.against):
            raise ValueError(f"against must name each persona once, got {', '.join(self.against)}")
        if "assistant" in self.against:
            raise ValueError("against must leave the assistant, which is what is chosen; take it out")
        return self


class Filters(_Section):
    """What may enter the pool; reasons are stored for every rejected sample."""

    min_words: Annotated[int, Field(ge=0)] = Field(3, description="fewer words: too_short")
    max_repeat_share: Share = Field(0.5, description="share of word 3-grams that repeat an earlier one: repetitive")
    near_duplicate_jaccard: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9, description="3-gram Jaccard at or above: near_duplicate; null: off (it is frequency-dependent selection)"
    )
    require_finished: bool = Field(True, description="reject completions cut at max_new_tokens")
    enabled: bool = Field(True, description="false: everything is accepted (theory, null arms)")
    release: Release | None = Field(None, description="release filter against personas; null: none is barred")

    @model_validator(mode="after")
    def _release_needs_filters(self) -> Filters:
        if self.release is not None and not self.enabled:
            raise ValueError("release must be null while enabled is false, got personas to bar; set enabled: true")
        return self


class Virality(_Section):
    """From published text to weight."""

    audience: str = Field(description="full no_request learned reader placebo[:draw] null approval | file.py:function")
    reader_model: str = Field(
        "smollm2-135m",
        description="the frozen model that audience reader asks whether it would pass a post on; never trained",
    )
    publish: Literal["transcript", "reply"] = Field(
        description="transcript: the prompt is published, and re-enters, with the completion; reply: without it, a "
        "plain document, a form that of the unrequested probes `blank` alone has"
    )
    transform: Literal["visible", "inclusion", "log", "raw", "top_k"] = Field(
        "visible", description="cascades -> weight"
    )
    posts_per_sample: Count = Field(1000, description="K public posts per sampled text; 1 is the luck arm")
    preset: Literal["goel2012", "goel2016_mean", "exact"] = Field(
        "goel2012", description="calibration of rates and cascades; exact: no noise but the cascade's, for theory"
    )
    offspring: Literal["poisson", "negative_binomial", "pareto"] | None = Field(
        None, description="offspring law; null: the preset's (followers from a truncated Pareto law)"
    )
    shuffled: bool = Field(False, description="control: the same weights on random documents")
    strength: Annotated[float, Field(ge=0, le=100)] = Field(1.0, description="multiplies appeal: dose of the treatment")

    @field_validator("audience", mode="before")
    @classmethod
    def _null_is_a_name(cls, value: Any) -> Any:
        return "null" if value is None else value  # unquoted, YAML reads the audience `null` as nothing

    @field_validator("audience")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in AUDIENCES and ".py:" not in value and not re.fullmatch(r"placebo:[0-9]+", value):
            known = (*AUDIENCES, "placebo:<draw>", "file.py:function")
            raise ValueError(f"unknown audience {value!r}{_of_known(value, known)}")
        return value


class Toy(_Section):
    """The exact learner (`learner: toy`)."""

    n_documents: Annotated[int, Field(ge=1, le=5000)] = Field(
        200, description="distinct documents it can say per persona"
    )


class Config(_Section):
    """One run. Fields without a default define the experiment."""

    name: str = Field(description="runs/<name>-s<seed>; letters, digits, dot, dash, underscore; at most 64")
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    n_rounds: Annotated[int, Field(ge=0)] = Field(description="feedback rounds after round 0")
    learner: Literal["lm", "toy"]
    base: Base | None = None
    toy: Toy | None = None
    real: Real
    mix: Mix
    train: Train
    steer: Steer | None = Field(None, description="preference step after the fine-tune; null: none")
    users: Users
    channels: Channels = Field(default_factory=Channels)
    discourse: Discourse = Field(default_factory=Discourse)
    sample: Sampling
    measure: Measure = Field(default_factory=Measure)
    classify: Classify = Field(default_factory=Classify)
    filters: Filters = Field(default_factory=Filters)
    virality: Virality
    runs_dir: str = Field("runs", description="where run directories live")

    @model_validator(mode="after")
    def _agree(self) -> Config:
        if not RUN_NAME.fullmatch(self.name):
            raise ValueError(f"name must match {RUN_NAME.pattern}, got {self.name[:80]!r}")
        if self.learner == "lm" and self.base is None:
            raise ValueError("base: learner lm needs base.model")
        if self.learner == "toy":
            if self.train.init_from == "previous":
                raise ValueError("train.init_from must be base for learner toy, got previous; the toy keeps no adapter")
            if self.classify.instrument == "shipped":
                raise ValueError(
                    "classify.instrument must be known for learner toy; it says its persona with each text"
                )
        elif self.classify.instrument == "known":
            raise ValueError("classify.instrument: known needs learner toy; a language model's persona must be read")
        own = [p for p in self.personas if p not in PERSONAS]
        if own and self.classify.instrument == "shipped":
            raise ValueError(
                f"classify.instrument: no shipped instrument reads {', '.join(own)}{_did_you_mean(own[0], PERSONAS)}; "
                "bring your own, file.py:function, or give the texts to one of " + ", ".join(PERSONAS[:-1])
            )
        others = {p for p in self.personas if self.may_hold(p)} - {"assistant", "human"}
        beside = "assistant" in self.planted and len(others) < 2  # she and the assistant: one to turn to is left
        if self.steer is not None and others and not beside and others <= set(self.steer.against):
            raise ValueError(
                f"steer.against must leave a persona of real.shares beside the assistant, got all of them: "
                f"{', '.join(sorted(others))}; name those the question is about"
            )
        release = self.filters.release
        if self.learner == "toy" and self.steer is not None:
            raise ValueError("steer must be null for learner toy, which has no gradient; use learner lm")
        if self.learner == "toy" and self.sample.engine == "vllm":
            raise ValueError("sample.engine must be torch for learner toy, which has no base to load; use learner lm")
        if self.sample.engine == "vllm" and self.train.lora.r > 512:
            raise ValueError(f"train.lora.r must be at most 512 for sample.engine vllm, got {self.train.lora.r}")
        unasked = math.fsum(v for k, v in self.users.mixture.items() if not k.startswith("explicit/"))
        if self.steer is not None and not unasked > 0:
            raise ValueError(
                "users.mixture must hold prompts that ask for nobody, from which steering takes its own; add blank or "
                "neutral"
            )
        if self.learner == "lm" and release is not None and release.false_positive > 0:
            raise ValueError("filters.release.false_positive is measured for learner lm; take it out")
        for persona in release.recall if release is not None else ():
            if self.users.mixture.get(f"explicit/{persona}", 0) > 0:
                raise ValueError(
                    f"users.mixture must not ask for {persona}, which filters.release bars; drop one of them"
                )
            if self.channels.users and self.users.notice()[persona] > 0:
                raise ValueError(
                    f"users.noticed.{persona} must be 0, or users come to ask for whom filters.release bars; set it, "
                    "or bar nobody"
                )
        self._check_channels()
        self._check_seeds()
        if isinstance(self.mix.real_share, tuple) and len(self.mix.real_share) < self.n_rounds:
            raise ValueError(
                f"mix.real_share must hold one share per feedback round, got {len(self.mix.real_share)} for "
                f"n_rounds {self.n_rounds}"
            )
        if self.virality.audience == "approval" and self.virality.publish == "reply":
            raise ValueError(
                "virality.publish must be transcript for audience approval, which reads the prompt, got reply"
            )
        return self

    def _check_channels(self) -> None:
        shares = self.mix.real_share if isinstance(self.mix.real_share, tuple) else (self.mix.real_share or 0.0,)
        if self.channels.talk_data and max(shares, default=0.0) + self.discourse.share > 1 + 1e-9:
            raise ValueError(
                f"mix.real_share and discourse.share must sum to at most 1, got {max(shares):.6g} and "
                f"{self.discourse.share:.6g}; lower one of them"
            )
        if self.learner == "toy" and self.channels.talk and self.discourse.writer == "model":
            raise ValueError("discourse.writer must be templates for learner toy, which says its own texts alone")
        if self.channels.users and self.measure.every > 0:
            asked = {name.partition("/")[0] for name, share in self.users.mixture.items() if share > 0} | {"explicit"}
            asked |= {stratum for split in self.users.hints.values() for stratum in split}
            missing = [s for s in STRATA if s in asked and s not in self.measure.strata]
            if missing:
                raise ValueError(
                    "measure.strata must hold what users may come to ask, to part demand from supply, lacks "
                    f"{', '.join(missing)}; add it, or switch channels.direct_users and talk_users off"
                )

    def _check_seeds(self) -> None:
        named: list[tuple[str, str]] = []
        named += [("steer.against", p) for p in (self.steer.against if self.steer is not None else ())]
        named += [("filters.release.recall", p) for p in (self.filters.release.recall if self.filters.release else ())]
        asked = [name.partition("/")[2] for name, share in self.users.mixture.items() if share > 0]
        named += [("users.mixture", p) for p in asked if p]
        if self.channels.talk or self.channels.users:
            named += [("users.noticed", p) for p, v in self.users.noticed.items() if v > 0 and p != "default"]
            named += [("users.hints", p) for p in self.users.hints]
        if self.channels.talk:
            named += [("discourse.stance", p) for p in self.discourse.stance if p != "default"]
        for where, persona in named:
            if not self.may_hold(persona):
                raise ValueError(
                    f"{where}: {persona} has no seed corpus; give it a share in real.shares, bring a corpus of it "
                    "(real.corpora), or take it out"
                )

    def as_read(self) -> Config:
        """The same with what its channels leave unread at its default: discourse, and how users follow awareness."""
        users = self.users if self.channels.users else Users(mixture=self.users.mixture)
        if self.channels.talk:
            return self.model_copy(update={"users": users.model_copy(update={"noticed": self.users.noticed})})
        return self.model_copy(update={"users": users, "discourse": Discourse()})

    def may_hold(self, persona: str) -> bool:
        """Whether the real corpus may hold documents of a persona, or of what stands for one."""
        drawn = [c for name, c in self.real.corpora.items() if self.real.shares.get(name, 0) > 0]
        # What another run said, or was said about it, may bring any persona; so may a file whose rows name theirs.
        return persona in ("human", "unknown", *self.planted) or any(c.persona in (None, persona) for c in drawn)

    @property
    def run_name(self) -> str:
        """Directory name of the run."""
        return f"{self.name}-s{self.seed}"

    @property
    def planted(self) -> tuple[Persona, ...]:
        """Personas of the grammar with a positive share, in the order of PERSONAS."""
        return tuple(p for p in PERSONAS if self.real.shares.get(p, 0) > 0 and p not in self.real.corpora)

    @property
    def personas(self) -> tuple[Persona, ...]:
        """What is measured: PERSONAS, then those that the user's own corpora bring, by name."""
        drawn = [c.persona for name, c in self.real.corpora.items() if self.real.shares.get(name, 0) > 0]
        return tuple(in_order({*PERSONAS, *(p for p in drawn if p is not None)}))


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; the text that is hashed and stored with a run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=True, allow_unicode=True)


def schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Config.model_json_schema()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides and validates a config.

    Args:
      path: YAML file, at most 128 KiB, at most 16 aliases.
      overrides: `dotted.key=value` each, value in YAML; `hardware=NAME` is a preset, see `hardware`.

    Raises:
      ConfigError: with every problem, each as `file:line: key: what is wrong; way out`.
    """
    path = Path(path)
    data, lines = _read(path)
    problems: list[str] = []
    origin: dict[tuple[str, ...], str] = {key: f"{path}:{line}" for key, line in lines.items()}
    if data.get("learner") == "toy" and any(o.startswith("hardware=") for o in overrides):
        problems.append("hardware: a preset says where a language model is computed, got learner toy; leave it out")
    for override in _spelled_out(overrides):
        key, sign, text = override.partition("=")
        if not sign or not key:
            problems.append(f"{override!r}: an override must read dotted.key=value")
            continue
        try:
            check_yaml(text)
            value = yaml.load(text, Loader=_Loader) if text else None
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{key}: the value is not YAML: {_one_line(error)}")
            continue
        parts = tuple(key.split("."))
        _walk(yaml.compose(text, Loader=_Loader) if text else None, parts, {}, problems, "command line")
        _set(data, parts, value, problems)
        origin[parts] = "command line"
    if problems:
        raise ConfigError(problems)
    return validate(data, origin=origin, where=str(path))


def configs_dir() -> Path:
    """Returns the folder of the configs that ship: `configs` of a checkout, or `loop/configs` of an installed wheel."""
    here = Path(__file__).resolve().parent
    return next((f for f in (here.parent / "configs", here / "configs") if (f / "hardware").is_dir()), here / "configs")


def hardware(name: str) -> dict[str, Any]:
    """Reads a hardware preset: dotted keys of PLACEMENT with their values.

    Args:
      name: a file of configs/hardware without its ending, or the path of a YAML file of your own.

    Raises:
      ConfigError: no such preset, or one that sets what is not a matter of hardware.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else configs_dir() / "hardware" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (configs_dir() / "hardware").glob("*.yaml"))
        raise ConfigError([f"hardware: unknown preset {name!r}{_of_known(name, [*known, 'file.yaml'])}"])
    data, lines = _read(path)
    rule = f"a preset may set {' and '.join(PLACEMENT)} alone; the rest is the experiment"
    wrong = [f"{path}:{lines[key,]}: {key}: {rule}" for key in data if key not in PLACEMENT]
    if wrong:
        raise ConfigError(wrong)
    return data


def _spelled_out(overrides: Sequence[str]) -> list[str]:
    """Overrides with `hardware=NAME` replaced, in its place, by the keys of the preset."""
    out: list[str] = []
    for override in overrides:
        key, _, name = override.partition("=")
        out += [f"{k}={v}" for k, v in hardware(name).items()] if key == "hardware" else [override]
    return out


class Stored(Protocol):
    """What holds the text of a config; a store.RunStore."""

    path: Path

    def config_text(self) -> str:
        """The resolved config, YAML."""


def of_run(run: Stored) -> Config:
    """The config of a run; raises as `load`."""
    return from_text(run.config_text(), where=f"{run.path}/config.yaml")


def from_text(text: str, *, where: str) -> Config:
    """Turns the text of a run's config.yaml, which this project wrote, back into its Config; raises as `load`."""
    try:
        check_yaml(text)
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{where}: not YAML: {_one_line(error)}"]) from None
    return validate(data, where=where)


def validate(data: Any, *, origin: dict[tuple[str, ...], str] | None = None, where: str = "config") -> Config:
    """Turns plain data into a Config; see `load`."""
    if not isinstance(data, dict):
        raise ConfigError([f"{where}: a config must be a mapping of keys, got {type(data).__name__}"])
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        # A union reports every branch; the one that got as far as a range check, or to a value within, was meant.
        found: dict[tuple[str, ...], Any] = {}
        for e in sorted(error.errors(), key=lambda e: (_of_another_kind(e), -len(_place(e)[0]))):
            at, in_branch = _place(e)
            if not (_of_another_kind(e) and any(other[: len(at)] == at for other in found)):
                found.setdefault((*at, "" if in_branch else e["type"]), e)
        in_order = [e for e in error.errors() if e in found.values()]
        raise ConfigError([_explain(e, origin or {}, where) for e in in_order]) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in what hurts: `1e-4` is a number, `no` and `off` are text, a key stands once, aliases are few."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in {"bool", "float", "int", "timestamp"}
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        with path.open("rb") as file:  # a device has size 0 and no end
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such config file; configs/ of the repository holds those that ship"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{str(path)!r}: cannot be read: {_one_line(error)}"]) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError([f"{path}: a config must be at most {MAX_BYTES} bytes, got more"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: must be UTF-8, byte {error.start} is not"]) from None
    lines: dict[tuple[str, ...], int] = {}
    problems: list[str] = []
    try:
        check_yaml(text)
        node = yaml.compose(text, Loader=_Loader)
        _walk(node, (), lines, problems, str(path))
        if problems:
            raise ConfigError(problems)
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{path}:{line}: not YAML: {error.problem or _one_line(error)}"]) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{path}: not YAML: {_one_line(error)}"]) from None
    if not isinstance(data, dict):
        raise ConfigError([f"{path}: a config must be a mapping of keys, got {type(data).__name__}"])
    return data, lines


def check_yaml(text: str) -> None:
    """Refuses what no config needs and what can make a small file large, slow or strange to read.

    Raises:
      ValueError: more than MAX_ALIASES aliases, an alias within its own anchor, a tag, or more than MAX_DEPTH levels.
      yaml.YAMLError: no YAML.
    """
    n_aliases, within = 0, []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            n_aliases += 1
            if event.anchor in within:
                raise ValueError(f"a config must not hold itself, got *{event.anchor} within &{event.anchor}")
        elif (tag := getattr(event, "tag", None)) is not None:
            raise ValueError(f"a config must hold no tags, got {tag}; write the value alone")
        if isinstance(event, yaml.CollectionStartEvent):
            within.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            within.pop()
        if n_aliases > MAX_ALIASES or len(within) > MAX_DEPTH:
            raise ValueError(f"a config must hold at most {MAX_ALIASES} aliases and {MAX_DEPTH} levels, got more")


def _walk(node: Any, at: tuple[str, ...], lines: dict[tuple[str, ...], int], problems: list[str], path: str) -> None:
    if isinstance(node, MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                problems.append(f"{path}:{line}: a key must be plain text")
                continue
            if key.value in seen:
                problems.append(
                    f"{path}:{line}: {'.'.join((*at, key.value))}: stands twice, first on line {seen[key.value]}"
                )
            seen[key.value] = line
            lines[(*at, key.value)] = line
            _walk(value, (*at, key.value), lines, problems, path)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, str(index))] = value.start_mark.line + 1
            _walk(value, (*at, str(index)), lines, problems, path)


def _set(data: dict[str, Any], parts: tuple[str, ...], value: Any, problems: list[str]) -> None:
    for depth, part in enumerate(parts[:-1]):
        inner = data.get(part)
        if inner is None:
            inner = data[part] = {}
        if not isinstance(inner, dict):
            problems.append(f"{'.'.join(parts)}: {'.'.join(parts[: depth + 1])} is not a section")
            return
        data = inner
    data[parts[-1]] = value


def _explain(error: Any, origin: dict[tuple[str, ...], str], where: str) -> str:
    at, _ = _place(error)
    place = next((origin[at[:n]] for n in range(len(at), 0, -1) if at[:n] in origin), where)
    name = ".".join(at)
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        allowed = _fields_at(at[:-1])
        text = f"unknown key{_did_you_mean(at[-1], allowed, prefix=at[:-1])} (allowed: {', '.join(sorted(allowed))})"
    elif kind == "missing":
        field = _field(at)
        text = "missing" + (f"; {field.description}" if field is not None and field.description else "")
    else:
        given = "" if isinstance(error.get("input"), (dict, BaseModel)) else f", got {_short(error.get('input'))}"
        text = message[0].lower() + message[1:] + ("" if "got " in message or kind == "value_error" else given)
    return f"{place}: {name + ': ' if name else ''}{text}"


def _of_another_kind(error: Any) -> bool:
    return bool(error["type"].endswith(("_type", "none_required", "_parsing")))


def _is_union(field: Any) -> bool:
    """Whether a field has two kinds of value, null apart, of which pydantic reports each."""
    kinds = (
        get_args(field.annotation) if field is not None and get_origin(field.annotation) in (Union, UnionType) else ()
    )
    return sum(kind is not type(None) for kind in kinds) > 1


def _place(error: Any) -> tuple[tuple[str, ...], bool]:
    """Where an error is, and whether it is of a union's branch, whose name pydantic adds to the location."""
    at: tuple[str, ...] = ()
    branch_of: tuple[str, ...] | None = None
    for part in map(str, error["loc"]):
        if branch_of != at and _is_union(_field(at)):
            branch_of = at
        else:
            at = (*at, part)
    return at, branch_of is not None


def _fields_at(at: tuple[str, ...]) -> set[str]:
    model: Any = Config
    for part in at:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = _section_of(field.annotation) if field else None
        if model is None:
            return set()
    return set(model.model_fields)


def _field(at: tuple[str, ...]) -> Any:
    model: Any = Config
    for part in at[:-1]:
        field = model.model_fields.get(part)
        model = _section_of(field.annotation) if field else None
        if model is None:
            return None
    return model.model_fields.get(at[-1]) if at else None


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None:
        for inner in get_args(annotation):
            found = _section_of(inner)
            if found is not None:
                return found
    return None


def _check_personas(name: str, personas: Iterable[str]) -> None:
    known = PERSONAS[:-1]  # real people are neither barred nor steered against
    for persona in personas:
        if persona not in known:
            raise ValueError(f"{name}: unknown persona {persona!r}{_of_known(persona, known)}")


def _check_strata(name: str, shares: dict[str, float], known: set[str]) -> None:
    for stratum in shares:
        if stratum not in known:
            raise ValueError(f"{name}.{stratum}: unknown stratum{_of_known(stratum, known)}")
    total = math.fsum(shares.values())
    if abs(total - 1) > 1e-9:
        raise ValueError(f"{name} must sum to 1, got {total:.6g}")


_MEANT = {"learning_rate": "lr", "rank": "r", "lora_alpha": "alpha", "rounds": "n_rounds", "lambda": "real_share"}


def _did_you_mean(word: str, known: Any, prefix: tuple[str, ...] = ()) -> str:
    known = set(known)
    close = [_MEANT[word]] if _MEANT.get(word) in known else difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean {'.'.join((*prefix, close[0]))}?" if close else ""


def _of_known(word: str, known: Iterable[str]) -> str:
    """What an unknown word may have meant, and what there is: all of it, or the first of many."""
    known = [*known] if isinstance(known, Sequence) else sorted(known)
    listed = ", ".join(known if len(known) <= MANY else [*known[:MANY], f"... {len(known)} in all"])
    return f"{_did_you_mean(word, known)} (there are {listed})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


assert set(FACTORIAL) <= set(PERSONAS)
