"""Two models of a run answer the same prompt side by side, each answer with what the instrument reads in it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loop import run, show
from loop.config import of_run
from loop.learner import LM
from loop.records import BLANK, NEUTRAL, PERSONAS, UNKNOWN, Prompt, Sample
from loop.store import BASELINE, RunStore
from loop.toy import Toy
from loop.world import Learner, World


@dataclass(frozen=True)
class Answer:
    """What one model said.

    Attributes:
      who: "round 7" or "base".
      text: as the model wrote it, untrusted.
      finished: whether it ended by itself, not at max_new_tokens.
      persona: what the run's instrument reads in it, or "unknown".
      proba: the probability it gives that reading, in [0, 1]; None for "unknown" and for a persona of the user's own.
    """

    who: str
    text: str
    finished: bool
    persona: str
    proba: float | None


def answers(
    run_dir: Path,
    prompts: Iterable[str],
    *,
    round_index: int | None,
    versus: str,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[tuple[str, list[Answer]]]:
    """Yields (prompt, one answer per model), prompt by prompt; each stands alone, nothing said before is remembered.

    Both models draw from the same stream, so what differs is the model. An empty prompt asks for a plain document, as
    stratum `blank` does.

    Args:
      round_index: the model on the left; None is the last round.
      versus: the model on the right, a round or "base".
      temperature, max_new_tokens: in place of the run's own.

    Raises:
      ValueError: no finished round, a round that is not there, or the same model twice.
      store.CorruptError: an adapter is not as it was committed.
    """
    opened = RunStore(run_dir)
    config = of_run(opened)
    rounds = opened.rounds()
    if not rounds:
        raise ValueError(f"run must hold a finished round, got none at {run_dir}; `loop run` its config first")
    asked = [rounds[-1] if round_index is None else round_index, _round(versus)]
    for t in asked:
        if t not in (*rounds, BASELINE):
            raise ValueError(f"round must be one of {rounds[0]}..{rounds[-1]}, got {t} at {run_dir}; play it first")
    if asked[0] == asked[1]:
        raise ValueError(f"--vs must be another model than --round, got {_name(asked[0])} twice; --vs base compares")
    changed = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    decoding = config.sample.model_copy(update={k: v for k, v in changed.items() if v is not None})
    config = config.model_copy(update={"sample": decoding})
    for t in asked:
        if t != BASELINE:
            opened.adapter_path(t)  # a damaged one is refused before a base is loaded
    # The toy says texts of the runs it was lent; a language model needs none of them.
    world = run.set_up(config) if config.learner == "toy" else World(config)
    learner = run.build(world)
    for k, line in enumerate(prompts):
        prompt = Prompt(NEUTRAL, "chat", (line,)) if line.strip() else Prompt(BLANK, "chat", None)
        said = []
        for t in asked:
            _become(learner, opened, t)
            said.append(_answer(world, learner, prompt, k, who=_name(t)))
        yield line, said


def talk(console: Console, answered: Iterable[tuple[str, list[Answer]]]) -> None:
    """Prints answers side by side as they come; model text is one line per answer, its controls neutralised."""
    for prompt, said in answered:
        table = Table(title=Text("asked: " + (show.printable(prompt, 200) or "nothing")), title_justify="left")
        for one in said:
            sure = "" if one.proba is None else f" {one.proba:.2f}"
            table.add_column(f"{one.who}, read as {one.persona}{sure}", ratio=1, overflow="fold")
        table.add_row(*(Text(show.printable(one.text) + ("" if one.finished else " [cut]")) for one in said))
        console.print(table)


def typed() -> Iterator[str]:
    """Yields what is typed, line by line, to the end of the input; a prompt mark is shown on a terminal."""
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(mark)
        except EOFError:
            return
        # A terminal may send bytes that are no text; a tokenizer takes text alone.
        yield line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _round(versus: str) -> int:
    if versus == "base":
        return BASELINE
    if not versus.isdigit():
        raise ValueError(f"--vs must be a round or base, got {versus!r}")
    return int(versus)


def _name(t: int) -> str:
    return "base" if t == BASELINE else f"round {t}"


def _become(learner: Learner, opened: RunStore, t: int) -> None:
    """Puts round t's adapter on the base, or takes any off it."""
    if t != BASELINE:
        learner.load(opened.adapter_path(t))
    elif isinstance(learner, LM):
        from loop.model import drop_adapter

        drop_adapter(learner.model)
    elif isinstance(learner, Toy):
        learner.shares = {}


def _answer(world: World, learner: Learner, prompt: Prompt, k: int, *, who: str) -> Answer:
    s = world.config.sample
    (c,) = learner.sample(
        [prompt],
        temperature=s.temperature,
        top_p=s.top_p,
        max_new_tokens=s.max_new_tokens,
        seed=world.key("chat", k),  # one stream for both models
    )
    sample = Sample(
        id="chat",
        stratum=prompt.stratum,
        template_id=prompt.template_id,
        prompt=prompt.turns,
        completion=c.text,
        n_tokens=c.n_tokens,
        logprob_nats=c.logprob_nats,
        finished=c.finished,
        requested=None,
        cue=None,
        round_index=k,
        source="synthetic",
        persona_known=c.persona_known,
    )
    labels = world.classify([], [sample], [])
    persona = labels.persona[0] or UNKNOWN
    proba = float(labels.proba[0, PERSONAS.index(persona)]) if persona in PERSONAS else None
    return Answer(who, c.text, c.finished, persona, proba)
