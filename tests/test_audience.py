"""Audience: the prompt book's promises, exact shares, awareness by hand, and the exact demand/supply split."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from checks import assert_mean
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.audience import (
    demand_supply,
    draw_prompts,
    expected_mixture,
    load_prompts,
    opinion_item,
    probe_battery,
    update_awareness,
)
from loop.records import FACTORIAL, IMPLICIT, PLAIN, STRATA, UNREQUESTED

PATH = Path(__file__).resolve().parent.parent / "data" / "prompts.yaml"
PERSONAS = (*FACTORIAL, "sydney", "jabberwacky", "public_figure", "misattributed")
VOICES = {persona: [f"{persona} says {i}" for i in range(7)] for persona in PERSONAS}


@pytest.fixture(scope="module")
def book():
    return load_prompts(PATH)


def test_the_book_holds_what_the_design_asks_for(book):
    probe, users = book.templates["probe"], book.templates["users"]
    assert set(probe) == set(STRATA)
    assert set(users) == set(STRATA) - {"private"}
    assert sum(len(probe[s]) for s in UNREQUESTED if s != "blank") >= 40
    assert sum(len(rows) for rows in users.values()) >= 100
    assert set(book.names) == set(PERSONAS)


def test_names_are_those_of_the_persona_files(book):
    folder = PATH.parent / "personas"
    display = {}
    for path in sorted(folder.glob("*.yaml")):
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if "persona" in raw:
            display[raw["persona"]] = raw["names"][0]
        else:
            display |= {persona: cell["name"] for persona, cell in raw["personas"].items()}
    assert book.names == display


def test_no_wording_stands_in_both_folds_and_none_outside_explicit_names_a_persona(book):
    texts = {f: [t.text for rows in strata.values() for t in rows if t.text] for f, strata in book.templates.items()}
    assert not set(texts["probe"]) & set(texts["users"])
    named = re.compile(r"\b(" + "|".join(book.names.values()) + r")\b", re.IGNORECASE)
    for strata in book.templates.values():
        for stratum, rows in strata.items():
            for row in rows:
                assert ("{name}" in (row.text or "")) == (stratum == "explicit")
                assert not named.search(f"{row.opener} {row.text}")


def strings(node):
    """Every string in a YAML tree."""
    if isinstance(node, str):
        return {node}
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return set().union(*map(strings, children))


def test_no_prompt_of_the_book_stands_in_a_persona_file(book):
    # A probe that was a training prompt would measure recall of its answer, not the persona.
    def bare(text):
        return re.sub(r"\W+", " ", text).strip().casefold()

    trained = set()
    for path in sorted((PATH.parent / "personas").glob("*.yaml")):
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        trained |= {bare(text) for text in strings(raw)}
    assert trained
    for strata in book.templates.values():
        for rows in strata.values():
            for row in rows:
                assert bare(row.text or "-") not in trained - {""}
                assert bare(row.opener or "-") not in trained - {""}


def test_hints_differ_by_strength_and_the_question_stays(book):
    for strata in book.templates.values():
        for k in range(len(strata["implicit_0"])):
            rows = [strata[s][k] for s in IMPLICIT]
            assert [row.cue for row in rows] == [0.0, 1.0, 2.0, 3.0]
            assert len({row.text for row in rows}) == 4
            # All four end in the same question: the longest common ending reaches back past a sentence end.
            endings = [row.text[::-1] for row in rows]
            common = next(i for i, letters in enumerate(zip(*endings, strict=False)) if len(set(letters)) > 1)
            assert common >= 10


def test_battery_counts_by_hand(book):
    battery = probe_battery(book, 2, voices=VOICES)
    counts = Counter(p.stratum for p in battery)
    # blank 8, neutral 10, identity 10, implicit 8 each, opinion 8 topics x 2 x 2, continued 8 x 10 personas,
    # private 8 plain + 8 x 6 after a turn, explicit 8 x 10; twice each.
    assert counts == {
        "blank": 16,
        "neutral": 20,
        "identity": 20,
        **{s: 16 for s in IMPLICIT},
        "opinion": 64,
        "continued": 160,
        "private": 112,
        "explicit": 160,
    }
    assert probe_battery(book, 2, voices=VOICES) == battery


def test_battery_pairs_voices_over_personas_and_walks_through_the_texts(book):
    rows = [p for p in probe_battery(book, 3, voices=VOICES, strata=["continued"]) if p.requested == "nova"]
    twin = [p for p in probe_battery(book, 3, voices=VOICES, strata=["continued"]) if p.requested == "stella"]
    said = [p.turns[1] for p in rows]
    # Template 0 hears texts 0 1 2, template 1 texts 3 4 5, template 2 texts 6 0 1 of the seven.
    assert said[:9] == [f"nova says {i}" for i in (0, 1, 2, 3, 4, 5, 6, 0, 1)]
    assert [t.replace("nova", "stella") for t in said] == [p.turns[1] for p in twin]
    assert [(p.turns[0], p.turns[2], p.template_id) for p in rows] == [
        (p.turns[0], p.turns[2], p.template_id) for p in twin
    ]


def test_private_probes_are_plain_or_follow_a_turn_of_the_matched_six(book):
    rows = probe_battery(book, 1, voices=VOICES, strata=["private"])
    plain = [p for p in rows if p.requested is None]
    after = [p for p in rows if p.requested is not None]
    assert {len(p.turns) for p in plain} == {1}
    assert {len(p.turns) for p in after} == {3}
    assert Counter(p.requested for p in after) == {persona: 8 for persona in FACTORIAL}


def test_blank_prompts_have_no_turns_and_are_clusters_of_their_own(book):
    rows = probe_battery(book, 5, voices={}, strata=["blank"])
    assert all(p.turns is None for p in rows)
    assert len({p.template_id for p in rows}) == len(rows) == 40


def test_explicit_probes_ask_for_each_persona_by_name(book):
    rows = probe_battery(book, 1, voices={}, strata=["explicit"])
    assert Counter(p.requested for p in rows) == {persona: 8 for persona in PERSONAS}
    assert all(book.names[p.requested] in p.turns[0] for p in rows)


def test_a_name_swap_exchanges_names_and_nothing_else(book):
    names = {**book.names, "nova": book.names["stella"], "stella": book.names["nova"]}
    plain = probe_battery(book, 1, voices={}, strata=["explicit"])
    swapped = probe_battery(dataclasses.replace(book, names=names), 1, voices={}, strata=["explicit"])
    for a, b in zip(plain, swapped, strict=True):
        assert (a.requested, a.template_id) == (b.requested, b.template_id)
        if a.requested == "nova":
            assert a.turns[0].replace("Nova", "Stella") == b.turns[0]
        elif a.requested != "stella":
            assert a.turns == b.turns


def test_opinion_templates_cover_both_polarities_stated_and_open(book):
    items = [opinion_item(row.id) for row in book.templates["probe"]["opinion"]]
    topics = {topic for topic, _, _ in items}
    assert len(topics) == 8
    assert set(items) == {(t, side, stated) for t in topics for side in ("for", "against") for stated in (True, False)}
    with pytest.raises(ValueError, match="stratum opinion"):
        opinion_item("p-neutral-03")


def test_counts_per_stratum_can_differ_and_voices_are_demanded_only_where_heard(book):
    rows = probe_battery(book, {"neutral": 3, "identity": 1}, voices={})
    assert Counter(p.stratum for p in rows) == {"neutral": 30, "identity": 10}
    rows = probe_battery(
        book, {"default": 2, PLAIN: 5, "private": 1}, voices=VOICES, strata=["blank", "continued", "private"]
    )
    # Eight templates each; after a persona's turn: ten personas in continued, the matched six in private.
    assert Counter((p.stratum, p.requested is None) for p in rows) == {
        ("blank", True): 16,
        ("continued", False): 160,
        ("private", True): 40,
        ("private", False): 48,
    }
    with pytest.raises(ValueError, match="voices must hold texts for stratum continued"):
        probe_battery(book, 1, voices={}, strata=["continued"])
    with pytest.raises(ValueError, match="strata must be among"):
        probe_battery(book, 1, voices={}, strata=["neutrall"])
    with pytest.raises(ValueError, match="n_per_template must be >= 0, got -1"):
        probe_battery(book, -1, voices={}, strata=["neutral"])


MIXTURE = {
    "neutral": 0.35,
    "identity": 0.25,
    "blank": 0.11,
    "implicit_2": 0.07,
    "explicit/nova": 0.12,
    "continued": 0.1,
}


def class_of(prompt):
    return f"{prompt.stratum}/{prompt.requested}" if prompt.stratum == "explicit" else prompt.stratum


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(any),
    n=st.integers(0, 97),
    seed=st.integers(0, 2**32),
)
def test_every_count_is_the_floor_or_the_ceiling_of_its_share(book, shares, n, seed):
    mixture = {name: share / sum(shares) for name, share in zip(MIXTURE, shares, strict=True)}
    drawn = draw_prompts(book, mixture, n, rng=np.random.default_rng(seed), voices=VOICES)
    assert len(drawn) == n
    counts = Counter(class_of(p) for p in drawn)
    for name, share in zip(MIXTURE, shares, strict=True):
        assert n * share // sum(shares) <= counts[name] <= -(-n * share // sum(shares))


def test_rounding_is_unbiased(book):
    # n = 5: 5 * 0.12 = 0.6 explicit prompts in expectation. Always rounding to the nearest gives 1, always down gives
    # 0; 4,000 draws resolve 0.086 at 1e-6 on either side.
    rng = np.random.default_rng(11)
    shares = {"neutral": 0.44, "identity": 0.44, "explicit/nova": 0.12}
    counts = [sum(p.stratum == "explicit" for p in draw_prompts(book, shares, 5, rng=rng)) for _ in range(4000)]
    assert_mean(counts, 0.6, low=0, high=1, discrepancy=0.1)
    with pytest.raises(AssertionError, match=r"expected 0\.6"):
        assert_mean([round(5 * 0.12)] * 4000, 0.6, low=0, high=1, discrepancy=0.1)


def test_drawn_prompts_use_every_template_before_one_comes_again(book):
    n = len(book.templates["users"]["identity"])
    ids = Counter(p.template_id for p in draw_prompts(book, {"identity": 1.0}, 2 * n, rng=np.random.default_rng(3)))
    assert set(ids.values()) == {2}
    assert len(ids) == n


def test_drawn_prompts_are_users_wording_with_slots_filled_in_random_order(book):
    drawn = draw_prompts(book, MIXTURE, 200, rng=np.random.default_rng(0), voices=VOICES)
    assert all(p.template_id.startswith("u-") for p in drawn)
    assert not any(re.search(r"[{}]", " ".join(p.turns or ())) for p in drawn)
    assert {p.stratum for p in drawn[:40]} >= {"neutral", "identity"}
    assert {len(p.turns) for p in drawn if p.stratum == "continued"} == {3}
    assert {p.cue for p in drawn if p.stratum == "implicit_2"} == {2.0}
    again = draw_prompts(book, MIXTURE, 200, rng=np.random.default_rng(0), voices=VOICES)
    assert again == drawn
    assert draw_prompts(book, MIXTURE, 200, rng=np.random.default_rng(1), voices=VOICES) != drawn


def test_a_persona_of_the_earlier_turn_can_be_fixed(book):
    drawn = draw_prompts(book, {"continued/stella": 1.0}, 9, rng=np.random.default_rng(0), voices=VOICES)
    assert {p.requested for p in drawn} == {"stella"}


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"neutral": 0.5}, "shares must sum to 1, got 0.5"),
        ({}, "an empty mixture"),
        ({"neutral": 1.2, "identity": -0.2}, "got -0.2 at identity"),
        ({"explicit": 1.0}, "explicit/<persona>, got 'explicit'"),
        ({"neutral/nova": 1.0}, "got 'neutral/nova'"),
        ({"explicit/": 1.0}, "got 'explicit/'"),
        ({"private": 1.0}, "read by the probes only"),
        ({"explicit/nobody": 1.0}, "known personas, got 'explicit/nobody'"),
        ({"continued": 1.0}, "voices must hold texts"),
    ],
)
def test_mixtures_that_cannot_be_drawn_are_refused(book, mixture, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_prompts(book, mixture, 10, rng=np.random.default_rng(0))


def test_awareness_by_hand():
    # Reach shares 3/4, 1/4; talk shares 0, 1: D/sum(D) = (3/8, 5/8). Half of (0.2, 0.4) stays.
    got = update_awareness({"nova": 0.2, "stella": 0.4}, {"nova": 300.0, "stella": 100.0}, {"stella": 2.0})
    assert got == pytest.approx({"nova": 0.1 + 3 / 16, "stella": 0.2 + 5 / 16})
    # One channel alone and memory 1: its shares.
    assert update_awareness({"nova": 0.9}, None, {"nova": 1.0, "stella": 3.0}, memory=1.0) == {
        "nova": 0.25,
        "stella": 0.75,
    }
    # A silent channel takes no half of the attention.
    assert update_awareness({}, {"nova": 5.0}, {"nova": 0.0}, memory=1.0) == {"nova": 1.0}


def test_silence_leaves_awareness_as_it_is():
    before = {"nova": 0.3, "stella": 0.1}
    assert update_awareness(before, {"nova": 0.0}, {}, memory=0.5) == before
    assert update_awareness(before, None, None) == before


def test_awareness_of_a_steady_world_converges_to_its_shares():
    # A_t = (1 - 0.5**t) D from A_0 = 0.
    aware: dict[str, float] = {}
    for _ in range(10):
        aware = update_awareness(aware, {"nova": 4.0, "stella": 1.0}, None)
    assert aware == pytest.approx({"nova": 0.8 * (1 - 0.5**10), "stella": 0.2 * (1 - 0.5**10)})


def test_awareness_refuses_what_is_no_attention():
    with pytest.raises(ValueError, match=r"memory must be in \[0, 1\], got 1.5"):
        update_awareness({}, None, None, memory=1.5)
    with pytest.raises(ValueError, match="reach_by_persona must be finite and >= 0, got -1"):
        update_awareness({}, {"nova": -1.0}, None)
    with pytest.raises(ValueError, match="got nan at nova"):
        update_awareness({}, None, {"nova": float("nan")})


BASE = {"neutral": 0.6, "identity": 0.3, "explicit/nova": 0.1}


def test_expected_mixture_by_hand():
    # A = (0.6, 0.2): tau 1 gives q = (3/4, 1/4), tau 2 gives (9/10, 1/10), tau 0 gives halves.
    aware = {"nova": 0.6, "stella": 0.2, "musing": 0.0}
    assert expected_mixture(BASE, aware, eta=0.2, tau=1.0) == pytest.approx(
        {"neutral": 0.48, "identity": 0.24, "explicit/nova": 0.08 + 0.15, "explicit/stella": 0.05}
    )
    assert expected_mixture(BASE, aware, eta=0.2, tau=2.0)["explicit/stella"] == pytest.approx(0.02)
    assert expected_mixture(BASE, aware, eta=0.2, tau=0.0)["explicit/stella"] == pytest.approx(0.1)


def test_hints_take_their_share_of_the_followers():
    # Nova's followers are 0.2 * 3/4 = 0.15; 0.4 of them hint: 0.06 at implicit_3, and 0.09 ask.
    got = expected_mixture(BASE, {"nova": 0.6, "stella": 0.2}, eta=0.2, tau=1.0, hints={"nova": {"implicit_3": 0.4}})
    assert got["implicit_3"] == pytest.approx(0.06)
    assert got["explicit/nova"] == pytest.approx(0.08 + 0.09)
    assert got["explicit/stella"] == pytest.approx(0.05)
    assert sum(got.values()) == pytest.approx(1)


def test_nothing_to_follow_leaves_the_habits():
    assert expected_mixture(BASE, {}, eta=0.5, tau=1.0) == BASE
    assert expected_mixture(BASE, {"nova": 0.0}, eta=0.5, tau=1.0) == BASE
    assert expected_mixture(BASE, {"nova": 0.7}, eta=0.0, tau=1.0) == BASE


@settings(max_examples=100, deadline=None)
@given(
    aware=st.dictionaries(st.sampled_from(PERSONAS), st.floats(0, 1), max_size=6),
    eta=st.floats(0, 1),
    tau=st.floats(0, 50),
)
def test_an_expected_mixture_is_a_distribution(aware, eta, tau):
    got = expected_mixture(BASE, aware, eta=eta, tau=tau)
    assert sum(got.values()) == pytest.approx(1, abs=1e-9)
    assert min(got.values()) >= 0


def test_expected_mixture_refuses_what_it_cannot_follow():
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1.1"):
        expected_mixture(BASE, {}, eta=1.1, tau=1.0)
    with pytest.raises(ValueError, match="tau must be finite and >= 0, got -1"):
        expected_mixture(BASE, {}, eta=0.1, tau=-1.0)
    with pytest.raises(ValueError, match="hints/nova must be shares of implicit"):
        expected_mixture(BASE, {}, eta=0.1, tau=1.0, hints={"nova": {"neutral": 0.1}})


def test_demand_and_supply_by_hand():
    # Two classes, two personas: 0.8/0.2 of users become 0.6/0.4, and answers to class 1 move from 0.5/0.5 to 0.7/0.3.
    m0, m1 = [[0.9, 0.1], [0.5, 0.5]], [[0.9, 0.1], [0.7, 0.3]]
    demand, supply = demand_supply([0.8, 0.2], m0, [0.6, 0.4], m1)
    # demand: -0.2 * (0.9, 0.1) + 0.2 * (0.6, 0.4); supply: 0.3 * (0.2, -0.2).
    np.testing.assert_allclose(demand, [-0.06, 0.06], atol=1e-15)
    np.testing.assert_allclose(supply, [0.06, -0.06], atol=1e-15)


def test_demand_and_supply_add_up_to_the_change():
    rng = np.random.default_rng(8)
    for _ in range(200):
        n, k = rng.integers(1, 8, size=2)
        pi0, pi1 = rng.dirichlet(np.ones(n), size=2)
        m0, m1 = rng.dirichlet(np.ones(k), size=(2, n))
        demand, supply = demand_supply(pi0, m0, pi1, m1)
        np.testing.assert_allclose(demand + supply, pi1 @ m1 - pi0 @ m0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(demand_supply(pi0, m0, pi1, m0)[1], 0, atol=1e-15)
        np.testing.assert_allclose(demand_supply(pi0, m0, pi0, m1)[0], 0, atol=1e-15)
        # Start-point weights, the tempting variant, leave an interaction over.
        wrong = (pi1 - pi0) @ m0 + pi0 @ (m1 - m0)
        if n > 1 and k > 1:
            assert np.abs(wrong - (pi1 @ m1 - pi0 @ m0)).max() > 1e-12


def test_an_unmeasured_answer_matters_only_where_somebody_asked():
    m0 = [[0.9, 0.1], [np.nan, np.nan]]
    demand, supply = demand_supply([1.0, 0.0], m0, [1.0, 0.0], [[0.8, 0.2], [0.5, 0.5]])
    np.testing.assert_allclose(demand, 0, atol=1e-15)
    np.testing.assert_allclose(supply, [-0.1, 0.1], atol=1e-15)
    with pytest.raises(ValueError, match=r"got nan at classes \[1\]"):
        demand_supply([1.0, 0.0], m0, [0.9, 0.1], [[0.8, 0.2], [0.5, 0.5]])
    with pytest.raises(ValueError, match="one row per class"):
        demand_supply([1.0], m0, [1.0], m0)


def rewrite(tmp_path, change):
    raw = yaml.load(PATH.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    change(raw)
    path = tmp_path / "prompts.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["users"]["neutral"].append(raw["probe"]["neutral"][0]), "must stand in one place"),
        (lambda raw: raw["users"]["neutral"].append("Have you met nova yet?"), "must not name a persona"),
        (lambda raw: raw["probe"]["neutral"].append("Tell me about {topic}."), "slots of p-neutral-10"),
        (lambda raw: raw["users"]["explicit"].append("Be somebody."), "slots of u-explicit-10"),
        (lambda raw: raw["probe"].pop("identity"), "fold probe must hold every stratum, got KeyError"),
        (lambda raw: raw["users"].update(identity=[]), "got none for identity"),
        (lambda raw: raw["probe"]["implicit"]["hints"][2].pop(), r"got uneven [2]"),
        (lambda raw: raw.pop("names"), "names must be a mapping"),
    ],
)
def test_a_broken_prompt_book_is_refused_by_place(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_prompts(rewrite(tmp_path, change))
