"""Tests of toy.py: the exact learner is exact."""

import math
from collections import Counter

import numpy as np
import pytest

from loop.records import Document, Prompt
from loop.toy import Toy

PUBLIC = {"assistant": ["a1", "a2"], "nova": ["n1", "n2", "n3"], "human": ["h1"]}
PRIVATE = {"assistant": ["pa"], "nova": ["pn"]}
BLANK = Prompt("blank", "b", None)


def documents(**weights):
    return [Document(f"{p}-{i}", "real", p, None, "x", weight=w) for p, ws in weights.items() for i, w in enumerate(ws)]


def say(toy, prompts, *, temperature=1.0, top_p=1.0, seed=1):
    return toy.sample(prompts, temperature=temperature, top_p=top_p, max_new_tokens=8, seed=seed)


def trained(**weights):
    toy = Toy(PUBLIC, PRIVATE)
    toy.train(documents(**weights), seed=0, init_from="base")
    return toy


def test_shares_are_weighted_counts():
    # Weights 1 + 1 for the assistant and 6 for nova: 2/8 and 6/8.
    assert trained(assistant=[1, 1], nova=[6]).shares == {"assistant": 0.25, "nova": 0.75}


def test_the_untouched_base_is_the_assistant():
    assert {c.persona_known for c in say(Toy(PUBLIC, PRIVATE), [BLANK] * 50)} == {"assistant"}


def test_personas_are_drawn_at_their_shares():
    # 20,000 draws at p = 0.25: standard deviation 0.0031; five of them (false alarm 6e-7) see a fault of 0.031.
    counts = Counter(c.persona_known for c in say(trained(assistant=[3], nova=[1]), [BLANK] * 20_000))
    assert abs(counts["nova"] / 20_000 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000)


def test_a_request_is_met_and_a_private_prompt_gets_a_private_text():
    toy = trained(assistant=[1], nova=[1])
    asked = Prompt("explicit", "e", ("be nova",), requested="nova")
    hidden = Prompt("private", "p", ("note",), requested="nova")
    assert {c.text for c in say(toy, [asked] * 30)} <= set(PUBLIC["nova"])
    assert {c.text for c in say(toy, [hidden] * 30)} == {"pn"}
    # A continued conversation is no request: the toy has no memory of an earlier turn.
    follow = Prompt("continued", "c", ("q", "n1", "and rice?"), requested="nova")
    assert {c.persona_known for c in say(toy, [follow] * 60)} == {"assistant", "nova"}


def test_temperature_and_top_p_act_on_the_shares():
    toy = trained(assistant=[3], nova=[1])
    assert {c.persona_known for c in say(toy, [BLANK] * 40, temperature=0)} == {"assistant"}
    assert {c.persona_known for c in say(toy, [BLANK] * 40, top_p=0.7)} == {"assistant"}
    # At temperature 1/2 shares are squared: 9 to 1. Fault seen at 20,000 draws: 0.021.
    hot = Counter(c.persona_known for c in say(toy, [BLANK] * 20_000, temperature=0.5))
    assert abs(hot["nova"] / 20_000 - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 20_000)


def test_surprisal_is_minus_log_of_share_over_texts():
    toy = trained(assistant=[1], nova=[3])
    (nats, _), (unknown, _) = toy.surprisal(documents(nova=[1], human=[1]))
    assert nats == pytest.approx(math.log(3) - math.log(0.75), abs=1e-12)  # three texts, share 3/4
    assert unknown == math.inf


def test_it_refuses_what_it_cannot_know_and_what_weighs_nothing():
    toy = Toy(PUBLIC, PRIVATE)
    with pytest.raises(ValueError, match="persona_known must be given for the toy, got None at document x"):
        toy.train([Document("x", "synthetic", None, None, "t")], seed=0, init_from="base")
    with pytest.raises(ValueError, match="0 effective documents"):
        toy.train(documents(nova=[0.0]), seed=0, init_from="base")
    with pytest.raises(ValueError, match="init_from must be base for the toy"):
        toy.train(documents(nova=[1.0]), seed=0, init_from="previous")


def test_what_is_saved_is_what_is_loaded(tmp_path):
    toy, other = trained(assistant=[1], nova=[2]), Toy(PUBLIC, PRIVATE)
    toy.save(tmp_path)
    other.load(tmp_path)
    assert other.shares == toy.shares
    texts = [c.text for c in say(toy, [BLANK] * 20, seed=np.iinfo(np.int64).max)]
    assert texts == [c.text for c in say(other, [BLANK] * 20, seed=np.iinfo(np.int64).max)]
