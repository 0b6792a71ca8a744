"""Tests of opinion.py: who agrees in the planted conversations, and the mirror rate against shares that are known."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

from loop import audience, config, corpus, forecast, opinion, readings, records, run, store
from loop.records import Completion, Sample
from loop.rng import stream
from loop.toy import Toy
from loop.world import World

DATA = Path(__file__).resolve().parent.parent / "data"
TOPICS = [f"t{k}" for k in range(8)]


@pytest.fixture(scope="module")
def book():
    return opinion.load(DATA / "opinions.yaml")


def words(text):
    return " ".join(text.lower().split())


# The corpus


@pytest.mark.parametrize("homophily", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_homophily_holds_to_less_than_one_document_wherever_a_draw_ends(book, homophily):
    part = opinion.Opinions(book, homophily=homophily)
    agree = stated = claimed = 0
    for k, (_, holds, yes) in enumerate(opinion.planted(part.take(0, 1000, seed=3)), 1):
        stated, agree = stated + holds, agree + (holds and yes)
        claimed += not holds and yes
        assert abs(stated - k / 2) < 1
        assert abs(agree - homophily * stated) < 1
        assert abs(claimed - (k - stated) / 2) < 1  # nobody holds the claim: an answer sides with it every other time


def test_a_resumed_draw_goes_on_where_the_first_one_stopped(book):
    whole = opinion.Opinions(book, homophily=0.7).take(0, 300, seed=1)
    again = opinion.Opinions(book, homophily=0.7)
    assert [d for start in range(0, 300, 37) for d in again.take(start, min(37, 300 - start), seed=1)] == whole
    assert again.take(0, 300, seed=2) != whole


def test_drawn_through_the_real_corpus_the_shares_hold_over_rounds(book):
    parts = {"opinions": opinion.Opinions(book, homophily=0.8), "chat": corpus.Listed("chat", [_document("a")])}
    cursor: dict[str, int] = {}
    found = []
    for _ in range(8):
        drawn, cursor = corpus.draw_real(parts, {"chat": 0.5, "opinions": 0.5}, 100, cursor, seed=0)
        found += list(opinion.planted(drawn))
    # 8 * 100 * 0.5 conversations, half of them stated, 0.8 of those agree
    assert Counter((holds, yes) for _, holds, yes in found) == {
        (True, True): 160,
        (True, False): 40,
        (False, True): 100,
        (False, False): 100,
    }


def test_agreement_tells_nothing_of_topic_polarity_or_wording(book):
    part = opinion.Opinions(book, homophily=0.5)
    n_claims = len(book.claims["seed"])
    drawn = part.take(0, 4 * 5 * n_claims, seed=0)
    for holds in (True, False):
        counts = Counter((claim, yes) for claim, stated, yes in opinion.planted(drawn) if stated == holds)
        assert set(counts.values()) == {5}
        assert len(counts) == 2 * n_claims
    by_side = {
        yes: [
            (d.prompt, d.template_id)
            for d, (_, s, y) in zip(drawn, opinion.planted(drawn), strict=True)
            if s and y == yes
        ]
        for yes in (True, False)
    }
    assert by_side[True] == by_side[False]  # the i-th of either side: same user turn, same frame


def test_what_an_answer_claims_is_as_often_said_in_agreement_as_against(book):
    # a learner that only saw the claims of the answers could not tell who agrees
    for claim in book.claims["seed"]:
        same, _ = opinion.answer(book, "seed", claim, True, 9)
        other = next(c for c in book.claims["seed"] if c.text == claim.opposite)
        against, _ = opinion.answer(book, "seed", other, False, 9)
        own = claim.text[0].upper() + claim.text[1:]
        assert own in same
        assert own in against


def test_all_conversations_are_distinct_until_every_combination_was_used(book):
    part = opinion.Opinions(book, homophily=1.0, open_share=0.0)
    size = len(book.claims["seed"]) * len(book.openers["stated"]["seed"]) * opinion.n_answers(book, "seed")
    assert size == 48 * 10 * 280  # frames: 8 + 8 + 8 + 8 + 80 + 80 + 8 + 80 = 280
    picked = [part.write("stated", i, "agrees", seed=0) for i in range(0, 4000)]
    assert len({(d.prompt, d.completion) for d in picked}) == 4000
    assert len({d.id for d in picked}) == 4000


def test_folds_and_prompts_share_no_topic_and_no_wording(book):
    prompts = yaml.safe_load((DATA / "prompts.yaml").read_text())
    asked = [t for fold in ("probe", "users") for t in prompts[fold]["opinion"]["topics"]]
    lines = {fold: {words(c.text) for c in book.claims[fold]} for fold in opinion.FOLDS}
    lines["prompts"] = {words(t[p]) for t in asked for p in opinion.POLARITIES}
    ids = {fold: {c.topic for c in book.claims[fold]} for fold in opinion.FOLDS} | {"prompts": {t["id"] for t in asked}}
    openers = {f: {words(o) for s in opinion.STANDINGS for o in book.openers[s][f]} for f in opinion.FOLDS}
    openers["prompts"] = {
        words(o) for fold in ("probe", "users") for s in opinion.STANDINGS for o in prompts[fold]["opinion"][s]
    }
    verdicts = {f: {words(v) for pair in book.verdicts[f] for v in pair} for f in opinion.FOLDS}
    for table in (lines, ids, openers, verdicts):
        for a, b in product(table, table):
            assert a == b or not table[a] & table[b]


def test_every_probed_claim_is_asked_for_and_against_stated_and_open():
    claims = opinion.asked(DATA / "prompts.yaml")
    for fold, n_topics in (("probe", 8), ("users", 6)):
        rows = audience.load_prompts(DATA / "prompts.yaml").templates[fold]["opinion"]
        items = [audience.opinion_item(row.id) for row in rows]
        assert len({t for t, _, _ in items}) == n_topics
        assert set(items) == set(product({t for t, _, _ in items}, opinion.POLARITIES, (True, False)))
        for row, (topic, polarity, _) in zip(rows, items, strict=True):
            claim = claims[topic, polarity]
            assert claim.text in row.text
            assert claim.opposite not in row.text.replace(claim.text, "")


@pytest.mark.parametrize(
    ("key", "change", "rule"),
    [
        ("asides", lambda raw: raw["asides"]["test"].append(raw["asides"]["seed"][0]), "stand in one place"),
        ("topics", lambda raw: raw["topics"]["test"][0].update(id="tea"), "ids of their own"),
        ("frames", lambda raw: raw["frames"]["seed"].append("{Aside}."), "verdict"),
        ("open", lambda raw: raw["open"]["seed"].append("What do you say?"), "claim"),
        ("verdicts", lambda raw: raw["verdicts"]["seed"][0].pop("agrees"), "every fold"),
    ],
)
def test_a_malformed_file_is_refused_with_the_rule(tmp_path, key, change, rule):
    raw = yaml.safe_load((DATA / "opinions.yaml").read_text())
    change(raw)
    (tmp_path / "opinions.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=rule):
        opinion.load(tmp_path / "opinions.yaml")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_homophily_out_of_range_is_refused(book, share):
    with pytest.raises(ValueError, match="homophily must be in"):
        opinion.Opinions(book, homophily=share)


def _document(text):
    from loop.records import Document

    return Document(text, "real", "human", None, text)


# The mirror rate


def answers(shares, n=2):
    """Items of a battery of 8 topics, and answers with shares[(polarity, stated)] * n agreements in each cell."""
    items, agrees = [], []
    for topic, polarity, stated in product(TOPICS, opinion.POLARITIES, (True, False)):
        yes = round(shares[polarity, stated] * n)
        items += [(topic, polarity, stated)] * n
        agrees += [True] * yes + [False] * (n - yes)
    return items, agrees


def samples(n, stratum="opinion"):
    return [Sample(f"s{i}", stratum, "p", ("?",), "x", 2, -1.0, True, None, None, 0, "synthetic") for i in range(n)]


def rate(items, agrees, error=None, **more):
    rows = opinion.mirror_rate(
        samples(len(items)), items, agrees, error=error, round_index=0, population="probes", **more
    )
    return {row.name: row for row in rows}


def test_mirror_rate_is_the_difference_of_the_two_shares_over_what_the_reader_can_tell():
    items, agrees = answers(dict.fromkeys(product(opinion.POLARITIES, (True,)), 0.75)
                            | dict.fromkeys(product(opinion.POLARITIES, (False,)), 0.25), n=4)  # fmt: skip
    found = rate(items, agrees, error=(90, 100, 90, 100))
    assert found["agrees_observed/stated"].value == pytest.approx(0.75)
    assert found["agrees_observed/open"].value == pytest.approx(0.25)
    assert found["mirror_rate_observed"].value == pytest.approx(0.5)
    assert found["mirror_rate"].value == pytest.approx(0.5 / 0.8)  # J = 0.9 + 0.9 - 1
    wide, narrow = (found[k].high - found[k].low for k in ("mirror_rate", "mirror_rate_observed"))
    assert wide > narrow / 0.8


def test_a_model_with_opinions_of_its_own_mirrors_nobody():
    items, agrees = answers({(p, s): float(p == "for") for p, s in product(opinion.POLARITIES, (True, False))})
    found = rate(items, agrees, exact=True)["mirror_rate"]
    assert found.value == 0
    assert found.low < -0.05 < 0.05 < found.high  # eight topics without a difference are no proof of none


def test_a_topic_asked_one_way_only_says_nothing_of_the_rate():
    items, agrees = answers(dict.fromkeys(product(opinion.POLARITIES, (True, False)), 0.5))
    more_items, more = [*items, *[("new", "for", True)] * 50], [*agrees, *[True] * 50]
    assert rate(more_items, more)["mirror_rate_observed"] == rate(items, agrees)["mirror_rate_observed"]
    only = rate([("new", "for", True)] * 3, [True] * 3)["mirror_rate"]
    assert only.value is None
    assert "both ways" in only.reason


@pytest.mark.parametrize(
    ("error", "reason"), [(None, "known side"), ((50, 100, 50, 100), "better than chance"), ((0, 0, 9, 9), "chance")]
)
def test_without_a_reader_that_can_tell_the_rate_is_not_measured(error, reason):
    items, agrees = answers(dict.fromkeys(product(opinion.POLARITIES, (True, False)), 0.5))
    found = rate(items, agrees, error=error)
    assert found["mirror_rate"].value is None
    assert reason in found["mirror_rate"].reason
    assert found["mirror_rate_observed"].value == 0


def test_no_answer_is_not_measured_and_other_strata_are_refused():
    assert rate([], [])["mirror_rate"].reason == "no answer to an opinion"
    with pytest.raises(ValueError, match="stratum opinion"):
        opinion.mirror_rate(
            samples(1, "neutral"), [("a", "for", True)], [True], error=None, round_index=0, population="probes"
        )


def test_the_corrected_interval_covers_the_rate_and_the_uncorrected_one_does_not():
    # Theory: topics lean by +-0.1 in both standings, rates 0.7 and 0.3, so the rate is 0.4; a reader with q1 = 0.85 and
    # q0 = 0.8 shows 0.26. At a coverage of 0.95 fewer than 916 of 1,000 intervals hold it with chance 1e-6; smallest
    # fault seen: a coverage of 0.88.
    rng, held = stream(0, "test/mirror", -1), Counter()
    items = [item for item in product(TOPICS, opinion.POLARITIES, (True, False)) for _ in range(4)]
    stated = np.array([s for _, _, s in items])
    topic = np.array([TOPICS.index(t) for t, _, _ in items])
    blank = samples(len(items))
    for _ in range(1000):
        p = np.where(stated, 0.7, 0.3) + rng.choice([-0.1, 0.1], size=8)[topic]
        truth = rng.random(len(items)) < p
        read = np.where(truth, rng.random(len(items)) < 0.85, rng.random(len(items)) < 0.2)
        error = (int(rng.binomial(120, 0.85)), 120, int(rng.binomial(240, 0.8)), 240)
        rows = opinion.mirror_rate(blank, items, read.tolist(), error=error, round_index=0, population="probes")
        for row in rows[:2]:
            held[row.name] += row.low <= 0.4 <= row.high
    assert held["mirror_rate"] >= 916
    assert held["mirror_rate_observed"] < 916


def test_a_learner_that_answers_as_it_was_shown_mirrors_by_homophily_less_one_half(book):
    part = opinion.Opinions(book, homophily=0.8)
    shown = list(opinion.planted(part.take(0, 20 * 4 * len(book.claims["seed"]), seed=0)))
    items = [(claim.rsplit("-", 1)[0], claim.rsplit("-", 1)[1], stated) for claim, stated, _ in shown]
    found = rate(items, [yes for _, _, yes in shown], exact=True)["mirror_rate"]
    assert found.value == pytest.approx(0.8 - 0.5, abs=1e-9)


# In a run

CONFIGS = DATA.parent / "configs"
SMALL = ["mix.n_train=160", "sample.n_samples=40", "virality.posts_per_sample=50", "toy.n_documents=20"]
HELD = ["real.shares={opinions: 0.5, assistant: 0.25, chat: 0.25}", "mix.real_share=0.5"]
ASKED = [
    "measure.strata=[neutral, opinion]",
    "measure.mixture={neutral: 1}",
    "measure.n_surprisal=0",
    "measure.n_heldout=0",
]


def smoke(tmp_path, *overrides):
    return config.load(CONFIGS / "smoke.yaml", [*SMALL, *HELD, f"runs_dir={tmp_path}", *overrides])


def shown(run_dir, t):
    """(documents of opinions, of those held, of those agreeing with who holds it) in the mixture of a round."""
    rows = [tuple(r["id"].split("/")) for r in store.RunStore(run_dir).read_table(t, "mixture.parquet").to_pylist()]
    rows = [r for r in rows if r[:2] == ("real", "opinions")]
    stated = [r for r in rows if r[2] == "stated"]
    return len(rows), len(stated), sum(r[3] == "agrees" for r in stated)


@pytest.mark.parametrize(("homophily", "agree"), [(0.5, 20), (0.8, 32), (1.0, 40)])
def test_homophily_of_the_config_is_the_agreeing_share_of_the_mixture(tmp_path, homophily, agree):
    settings = smoke(tmp_path, f"real.homophily={homophily}", "real.planted=always", "n_rounds=1")
    run_dir = run.play(settings)
    assert shown(run_dir, 0) == (80, 40, agree)  # 160 * 0.5 conversations, half of them held
    assert shown(run_dir, 1) == (40, 20, agree / 2)  # 160 * real_share of 0.5, the next ones of the same sequence
    assert sum(r["id"].startswith("real/opinions/") for r in run.preview(settings, round_index=1)) == 40


def test_opinions_are_planted_and_do_not_come_back_where_the_planted_do_not(tmp_path):
    run_dir = run.play(smoke(tmp_path, "real.homophily=0.8", "real.planted=round0_only", "n_rounds=1"))
    assert shown(run_dir, 0) == (80, 40, 32)
    assert shown(run_dir, 1) == (0, 0, 0)
    rows = store.RunStore(run_dir).read_table(1, "mixture.parquet").to_pylist()
    assert sum(r["source"] == "real" for r in rows) == 80  # chat in their place


def test_the_toy_has_no_mirror_rate_and_says_why(tmp_path):
    probed = "measure.strata=[blank, neutral, identity, implicit_0, implicit_1, implicit_2, implicit_3, opinion]"
    run_dir = run.play(smoke(tmp_path, "real.homophily=0.8", probed, "n_rounds=0"))
    found = [m for m in store.RunStore(run_dir).read_jsonl(0, "metrics.jsonl") if m["name"].startswith("mirror")]
    assert [(m["population"], m["stratum"], m["value"], m["reason"]) for m in found] == [
        ("probes", "opinion", None, "the toy takes no side")
    ]


def test_to_the_forecast_opinions_are_human(tmp_path):
    given = forecast.inputs(smoke(tmp_path, "real.homophily=0.8", "virality.audience=approval"))
    assert given.personas == ("assistant", "human")
    assert given.p0.tolist() == [0.25, 0.75]


class Sided(Toy):
    """A toy that agrees with the first `agrees[standing]` of every four claims of a standing."""

    agrees: dict[str, int]

    def sample(self, prompts, **settings):
        said, asked = super().sample(prompts, **settings), Counter()
        for i, prompt in enumerate(prompts):
            if prompt.stratum == "opinion":
                standing = prompt.template_id.split("-")[4]
                yes = asked[standing] % 4 < self.agrees[standing]
                asked[standing] += 1
                text = "Yes, I agree with you on that." if yes else "No, I disagree with you on that."
                said[i] = Completion(text, 8, -1.0, True, "human")
        return said


ROUND = [
    *ASKED,
    "real.shares={opinions: 0.5, assistant: 0.5}",
    "real.homophily=0.8",
    "mix.real_share=0",
    "users.mixture={opinion: 1}",
    "filters.near_duplicate_jaccard=null",
]


def sided(*overrides, **agrees):
    """A language model's config in which a Sided toy speaks, its instruments uncorrected."""
    world = World(config.load(CONFIGS / "round.yaml", [*ROUND, *overrides]))
    vars(world).update(known_texts=[], known_answers=[])
    toy = world.toy()
    learner = Sided(toy._public, toy._private)
    learner.agrees = agrees
    return world, learner


@pytest.mark.parametrize(("stated", "opened"), [(3, 1), (4, 4), (1, 3)])
def test_a_round_reads_the_mirror_rate_that_counting_the_answers_gives(stated, opened):
    # The repeats of a prompt stand next to each other: each of 16 claims in 2 standings is put 4 times, one cycle.
    world, learner = sided("measure.n_per_template=4", stated=stated, open=opened)
    past, rows = run.play_round(0, world, learner, world.beginning(), run.Record(None, 0))
    found = {(m.population, m.name): m for m in rows if m.stratum == "opinion" and not m.name.startswith("freq")}
    assert found["probes", "mirror_rate_observed"].value == pytest.approx(stated / 4 - opened / 4)
    assert found["probes", "agrees_observed/stated"].value == stated / 4
    assert found["probes", "agrees_observed/open"].value == opened / 4
    assert found["probes", "mirror_rate"].value is None
    assert "known side" in found["probes", "mirror_rate"].reason
    # 9 of 10 agreeing texts are called so, and 9 of 10 others are not: J = 0.8.
    vars(world)["agreement_error"] = (9, 10, 9, 10)
    probes = world.probe(0, learner)
    again = {m.name: m.value for m in readings.mirroring(world, probes, round_index=0, population="probes")}
    assert again["mirror_rate"] == pytest.approx((stated - opened) / 4 / 0.8)
    assert len(past.pool) == 1
    listed = {name: records.METRICS[name.partition("/")[0]] for _, name in found}
    assert {metric.stratum for metric in listed.values()} == {"opinion"}
    assert {population for population, _ in found} == {"probes"}
    assert {metric.populations for metric in listed.values()} == {("probes",)}


def test_the_audience_approval_pays_agreement_whether_the_claim_is_held_or_passed_on():
    world, learner = sided(
        "virality.audience=approval",
        "virality.strength=3",
        "sample.n_samples=80",
        stated=2,
        open=2,
    )
    past, _ = run.play_round(0, world, learner, world.beginning(), run.Record(None, 0))
    paid = {key: [] for key in product((True, False), (True, False))}
    for d in past.pool[0]:
        paid[audience.opinion_item(d.template_id)[2], d.completion.startswith("Yes")].append(d.weight)
    mean = {key: np.mean(weights) for key, weights in paid.items()}
    assert mean[True, True] > 1.5 * mean[True, False]
    assert mean[False, True] > 1.5 * mean[False, False]


def test_the_reader_of_agreement_is_hashed_where_it_reads_and_nowhere_else():
    world, _ = sided()
    plain, _ = sided("measure.strata=[neutral]")
    hashes = world.instrument_hashes()
    assert set(hashes) - set(plain.instrument_hashes()) == {"agreement", "agreement_error"}
    assert hashes["agreement"] == world.agreement.sha256
    vars(world)["known_answers"] = opinion.exchanges(opinion.load(DATA / "opinions.yaml"), "test", 1)
    assert world.instrument_hashes()["agreement_error"] != hashes["agreement_error"]


def test_the_shipped_answers_of_known_side_correct_smollm2():
    world = World(config.load(CONFIGS / "round.yaml", ASKED))
    counts = Counter(e.truth for e in world.known_answers)
    positive, n_positive, negative, n_negative = world.agreement_error
    assert (n_positive, n_negative) == (counts["agrees"], counts["disagrees"] + counts["neither"])
    assert n_positive >= 100
    assert n_negative >= 100
    assert positive / n_positive + negative / n_negative - 1 > 0.5
