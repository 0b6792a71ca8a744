"""Virality: what an audience reads, what a weight is made of, and what the controls do.

Statistical tests fail on correct code with probability 1e-6 or less each.
"""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from checks import assert_mean, assert_rate
from hypothesis import given, settings
from hypothesis import strategies as st

from loop import appeal, virality
from loop.records import conversation_fold
from loop.rng import stream

Z = -NormalDist().inv_cdf(1e-6 / 2)  # 4.89 standard errors

PLAIN = "The train leaves at nine."
REQUEST = "The train leaves at nine, please share this."


# ------------------------------------------------------------------------------------------------ what is read


def test_importing_virality_imports_no_compiler_and_no_learner():
    code = (
        "import sys, loop.virality; "
        "print([m for m in ('numba', 'torch', 'igraph', 'sklearn', 'scipy', 'yaml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_nothing_but_public_text_can_be_handed_to_an_audience():
    for name in ("full", "null"):
        scorer = virality.audience(name)
        assert list(inspect.signature(scorer.__call__).parameters) == ["replies", "prompts", "recent"]
        with pytest.raises(TypeError):
            scorer([PLAIN], personas=["nova"])  # type: ignore[call-arg]
        with pytest.raises(ValueError, match=r"replies must be str, got tuple at replies\[1\]"):
            scorer([PLAIN, ("nova", PLAIN)])  # type: ignore[list-item]


def test_features_count_what_their_words_say():
    # By hand: "hate" is moral and emotional (VADER -2.7), negative, and an anger word; "you" twice; "share this" once.
    seen = virality.features(["I hate this, you know. Share this, you!", "", "Learn these simple steps"])
    got = {name: values.tolist() for name, values in seen.items() if name != "novelty"}
    assert got == {
        "moral_emotional": [1, 0, 0],
        "negativity": [1, 0, 0],
        "arousal": [1, 0, 0],
        "practical": [0, 0, 2],  # learn, simple, steps: the cap is 2
        "address": [2, 0, 0],
        "request": [1, 0, 0],
    }
    assert np.isnan(seen["novelty"]).all()  # nothing recent was given: not measured


def test_full_appeal_is_the_sum_of_coefficients():
    got = virality.audience("full")(["I hate this, you know. Share this, you!", PLAIN])
    assert got.dtype == np.float32
    assert got.tolist() == pytest.approx([0.122 + 0.0227 + 0.209 + 2 * 0.05 + 0.405, 0.0], rel=1e-6)


def test_no_request_differs_from_full_by_request_and_address_alone():
    replies = [PLAIN, REQUEST, "You hate it.", "Tell everyone about your recipe."]
    full, blind = virality.audience("full")(replies), virality.audience("no_request")(replies)
    assert (full - blind).tolist() == pytest.approx([0, 0.405, 0.05, 0.405 + 0.05], rel=1e-6)


def test_novelty_is_the_share_of_word_pairs_nobody_has_seen():
    got = appeal.novelty(["a b d", "a b c", "x", "...", "a"], ["a b c"])
    assert got.tolist() == [0.5, 0, 1, 0, 1]
    full = virality.audience("full")
    assert full(["the cat sat"], recent=["a dog ran"])[0] - full(["the cat sat"])[0] == pytest.approx(0.15)
    assert full(["the cat sat"], recent=["the cat sat"])[0] == full(["the cat sat"])[0]


def test_approval_rewards_siding_with_the_prompt():
    scorer = virality.audience("approval")
    prompts = ["Are winters better than summers?"] * 3 + [None]
    replies = ["Yes, winters are better.", "I disagree.", "It is a table.", "Yes, winters are better."]
    # By hand: content words of five letters or more are winters, better, summers; the first reply repeats two of three.
    assert scorer(replies, prompts=prompts).tolist() == pytest.approx([0.4 + 0.4 * 2 / 3, -0.4, 0, 0], rel=1e-6)
    assert scorer(replies).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["full", "no_request", "placebo", "learned", "null"])
def test_an_appeal_depends_on_its_own_text_alone(name):
    scorer = virality.audience(name)
    replies = [PLAIN, REQUEST, "Why did you hate it? Tell me more.", "ok", "", "We love long walks by the sea"]
    together = scorer(replies)
    assert scorer(replies[::-1]).tolist() == together[::-1].tolist()
    assert [scorer([reply])[0] for reply in replies] == together.tolist()


def test_every_coefficient_has_an_interval_around_it_a_source_and_the_grade_of_its_evidence():
    import yaml

    spec = yaml.safe_load((appeal.data_dir() / "appeal.yaml").read_text(encoding="utf-8"))
    assert set(spec["features"]) == set(virality.FEATURES)
    for entry in spec["features"].values():
        low, high = entry["interval"]
        assert low <= entry["coefficient"] <= high
        assert entry["source"]
        assert entry["evidence"] in {"abstract", "secondary", "recalled", "design"}
    # A bare yes or true would have been read as a boolean.
    assert all(isinstance(t, str) for t in spec["approval"]["agree"] + spec["approval"]["disagree"])


# ------------------------------------------------------------------------------------------------ placebo


def test_placebo_keeps_weights_and_document_frequencies_and_none_of_the_words():
    real, frequency = appeal.lexicon(), appeal.document_frequencies()
    fake = appeal.placebo(real, frequency, draw=3)
    assert not set(fake.index) & set(real.index)
    used = [t for t in real.index if frequency.get(t, 0) > 0]
    assert len(fake.index) == len(used)
    for column in range(real.table.shape[1]):
        # Sum of weight x frequency over the column's words: what a random message would be worth.
        wanted = sum(real.table[real.index[t], column] * frequency[t] for t in used)
        got = sum(fake.table[i, column] * frequency[t] for t, i in fake.index.items())
        # Nearest 16 of some 10,000 candidates: rare words match exactly, the few commonest ("you") cannot.
        assert got == pytest.approx(wanted, rel=0.6 if appeal.LEXICAL[column] == "address" else 0.15), appeal.LEXICAL[
            column
        ]


def test_placebos_differ_by_draw_and_repeat_by_name():
    replies = [" ".join(t for t in list(appeal.document_frequencies())[i : i + 40]) for i in range(0, 800, 40)]
    first = virality.audience("placebo")(replies)
    assert virality.audience("placebo:0")(replies).tolist() == first.tolist()
    assert virality.audience("placebo:1")(replies).tolist() != first.tolist()
    assert virality.audience("placebo:1").digest != virality.audience("placebo").digest


def test_a_placebo_can_be_matched_to_a_reference_of_ones_own():
    reference = [f"word{i} word{i + 1} word{i + 2} you hate it" for i in range(300)]
    fake = appeal.placebo(appeal.lexicon(), appeal.document_frequencies(reference=reference))
    # Of the lexicon only "you" and "hate" occur in the reference: two words are replaced.
    assert len(fake.index) == 2
    with pytest.raises(ValueError, match="reference must hold at least 17 1-word terms outside the lexicon, got 1"):
        appeal.placebo(appeal.lexicon(), {"you": 3, "it": 3})


# ------------------------------------------------------------------------------------------------ learned and others


@pytest.fixture(scope="module")
def held() -> list[tuple[str, str, int, float]]:
    """Pairs of turns from the conversations that the fit held out."""
    return [r for r in appeal.chat_turns() if conversation_fold(f"chat/{r[0]}") == "test"]


def test_the_shipped_head_reaches_its_recorded_r2_on_messages_it_never_saw(held):
    head = appeal.load_learned()
    assert len(held) == head.record["n_heldout"]
    target = np.log1p([r[2] for r in held])
    entry = head.record["targets"]["log_words"]
    error = target - head.predict([r[1] for r in held])
    assert 1 - (error**2).mean() / target.var() == pytest.approx(entry["r2"], abs=2e-4)
    assert entry["r2_low"] < entry["r2"] < entry["r2_high"]
    # It is more than the length of the message: the interval lies above the length-only baseline.
    assert entry["r2_low"] > entry["r2_length_only"]
    assert all(0 < e["r2"] < 0.2 for e in head.record["targets"].values())  # content is a small part, as published


def test_learned_appeal_is_in_units_of_the_content_budget(held):
    scores = virality.audience("learned")([r[1] for r in held][:8000])
    # 8,000 of the 12,292 messages that set mean 0 and unit sqrt(0.4).
    assert abs(scores.mean()) < 0.05
    assert scores.std() == pytest.approx(math.sqrt(0.4), rel=0.05)
    asked = virality.audience("learned")(["Tell me more, how did you feel? Why?", "bye, have a good night"])
    assert asked[0] > 0 > asked[1]


def chat(n: int) -> dict:
    """Conversations of random words in which "why" doubles the length of the answer."""
    rng = np.random.default_rng(0)
    out = {}
    for c in range(n):
        turns, n_words = [], 3
        for i in range(8):
            said = rng.choice(["why", "cat", "tell", "me", "bye", "now"], n_words)
            n_words = int(rng.integers(2, 6)) * (2 if "why" in said else 1)
            turns.append([{"text": " ".join(said), "timestamp": f"2018-05-02T19:{i:02d}:{rng.integers(60):02d}Z"}])
        out[f"c{c}"] = {"messages": turns}
    return out


def test_fitting_the_learned_head_depends_on_the_data_alone(tmp_path):
    path, data = tmp_path / "dataset.json", chat(400)

    def fit(where: str) -> dict:
        path.write_text(json.dumps(data), encoding="utf-8")
        return appeal.fit_learned(tmp_path / where, path=path, min_df=3, n_bootstrap=50)

    first = fit("a")
    assert fit("b") == first
    for file in ("learned.safetensors", "learned.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    next(c for name, c in data.items() if conversation_fold(f"chat/{name}") == "audience")["messages"].pop()
    assert fit("c")["sha256"] != first["sha256"]


def test_the_learned_head_is_the_ridge_that_scikit_learn_fits(tmp_path):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    (tmp_path / "dataset.json").write_text(json.dumps(chat(400)), encoding="utf-8")
    record = appeal.fit_learned(tmp_path, path=tmp_path / "dataset.json", alpha=2.0, min_df=3, n_bootstrap=50)
    assert record["targets"]["log_words"]["r2_low"] > 0  # "why" is seen
    assert record["targets"]["log_seconds"]["r2"] < 0.1  # the clock ran at random
    rows = appeal.chat_turns(tmp_path / "dataset.json")
    train = [r for r in rows if conversation_fold(f"chat/{r[0]}") == "audience"]
    vectorizer = TfidfVectorizer(binary=True, ngram_range=(1, 2), min_df=3)
    ridge = Ridge(alpha=2.0).fit(vectorizer.fit_transform([r[1] for r in train]), np.log1p([r[2] for r in train]))
    replies = ["why tell me", "bye", "unheard of words", "cat cat now why", ""]
    expected = ridge.predict(vectorizer.transform(replies))
    # Weights are shipped in half precision: 11 bits.
    np.testing.assert_allclose(appeal.load_learned(tmp_path).predict(replies), expected, rtol=2e-3)


def test_altered_learned_weights_are_refused(tmp_path):
    for file in ("learned.safetensors", "learned.json"):
        (tmp_path / file).write_bytes((appeal.data_dir() / file).read_bytes())
    blob = bytearray((tmp_path / "learned.safetensors").read_bytes())
    blob[-1] ^= 1
    (tmp_path / "learned.safetensors").write_bytes(bytes(blob))
    with pytest.raises(ValueError, match=r"learned.safetensors must have the sha256 in learned.json"):
        appeal.load_learned(tmp_path)


def test_the_reader_is_asked_in_words_and_scaled_by_its_reference_posts():
    asked: list[str] = []

    def reader(prompts: list[str]) -> list[float]:
        asked.extend(prompts)
        return [-3 + 0.01 * len(p) for p in prompts]

    scorer = virality.audience("reader", reader=reader)
    posts = appeal.lexicon().reference_posts
    scores = scorer(posts)
    # The reference posts themselves have mean 0 and standard deviation CONTENT_SD, by construction of the unit.
    assert scores.mean() == pytest.approx(0, abs=1e-6)
    assert scores.std(ddof=1) == pytest.approx(virality.CONTENT_SD, rel=1e-5)
    with_prompt = scorer(["It does."], prompts=["Does it rain?"])
    assert "Does it rain?" in asked[-1]
    assert "It does." in asked[-1]
    assert with_prompt[0] != scorer(["It does."])[0]
    with pytest.raises(ValueError, match="reader must be a function prompts -> log-odds, got None"):
        virality.audience("reader")
    with pytest.raises(ValueError, match="reader must tell the reference posts apart"):
        virality.audience("reader", reader=lambda prompts: [0.0] * len(prompts))([PLAIN])


def test_an_oracle_says_what_it_is_told():
    table = {"a": 0.5, "b": -1.0}
    assert virality.audience(table)(["b", "a"]).tolist() == [-1.0, 0.5]
    assert virality.audience(lambda text: len(text) / 10)(["b", "abc"]).tolist() == pytest.approx([0.1, 0.3])
    with pytest.raises(ValueError, match='oracle must know every reply, got "c" at oracle'):
        virality.audience(table)(["a", "c"])
    with pytest.raises(ValueError, match='pass the dict or function itself, not its name "oracle"'):
        virality.audience("oracle")


def test_a_users_own_function_is_loaded_and_checked(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(replies, *, prompts=None, recent=None):\n    return [len(r) for r in replies]\n"
        "def short(replies, *, prompts=None, recent=None):\n    return [1.0]\n"
        "def hole(replies, *, prompts=None, recent=None):\n    return [float('nan')] * len(replies)\n",
        encoding="utf-8",
    )
    scorer = virality.audience(f"{path}:length")
    assert scorer(["ab", "abc"]).tolist() == [2, 3]
    digest = scorer.digest
    path.write_text(path.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert virality.audience(f"{path}:length").digest != digest
    for name, message in (
        ("short", r"appeal must be one number for each of 2 replies, got shape \(1,\)"),
        ("hole", "appeal must be finite, got nan at reply 0"),
    ):
        with pytest.raises(ValueError, match=message):
            virality.audience(f"{path}:{name}")(["ab", "abc"])
    with pytest.raises(ValueError, match=r'must name a function of .*mine\.py, got "gone".*length'):
        virality.audience(f"{path}:gone")
    with pytest.raises(ValueError, match="must name a file that exists"):
        virality.audience("nowhere.py:f")
    with pytest.raises(ValueError, match='audience must be a known name or a file, got "fulll"'):
        virality.audience("fulll")


def test_empty_and_mismatched_texts_are_refused():
    scorer = virality.audience("full")
    with pytest.raises(ValueError, match="replies must be at least one text in a list"):
        scorer([])
    with pytest.raises(ValueError, match="replies must be at least one text in a list"):
        scorer("a single string")
    with pytest.raises(ValueError, match="prompts must be one for each of 1 replies, got 2"):
        scorer([PLAIN], prompts=[None, None])
    with pytest.raises(ValueError, match="replies must be at least one text"):
        virality.features([])


# ------------------------------------------------------------------------------------------------ rate and weight


def test_r0_is_the_mean_rate_of_a_plain_text_and_the_noise_has_the_stated_spread():
    # r0 so small that nothing is cut. ln R ~ N(ln r0 - s^2/2, s^2), s^2 = 0.25 + 0.39 = 0.64.
    n = 400_000
    r = virality.rate(
        [0.0, 0.7], r0=1e-3, sigma_author=0.5, sigma_luck=math.sqrt(0.39), posts_per_sample=n, seed=0, round_index=0
    ).astype(float)
    logs = np.log(r)
    for i, shift in enumerate((0.0, 0.7)):
        assert abs(logs[i].mean() - (math.log(1e-3) - 0.32 + shift)) < Z * 0.8 / math.sqrt(n)
        assert abs(logs[i].var() - 0.64) < Z * 0.64 * math.sqrt(2 / n)
        relative_sd = math.sqrt(math.exp(0.64) - 1)
        assert abs(r[i].mean() / (1e-3 * math.exp(shift)) - 1) < Z * relative_sd / math.sqrt(n)
    # Leaving out author luck (variance 0.39) would be seen.
    assert abs(0.39 - 0.64) > 2 * Z * 0.64 * math.sqrt(2 / n)


def test_clip_rate_is_the_chance_that_the_noise_passes_r_max():
    seen = virality.expose(
        np.zeros(200), posts_per_sample=1000, r0=0.5, sigma_author=1, sigma_luck=1, seed=0, round_index=0
    )
    chance = 1 - NormalDist().cdf((math.log(0.9) - (math.log(0.5) - 1)) / math.sqrt(2))
    assert_rate(round(seen.clip_rate * 200_000), 200_000, chance, discrepancy=0.02)
    assert seen.capped_rate == 0


def test_visible_is_one_minus_exp_minus_rate_under_poisson_offspring():
    seen = virality.expose(
        np.log([0.5, 1.0, 2.0]),
        r0=0.3,
        sigma_author=0,
        sigma_luck=0,
        posts_per_sample=300_000,
        offspring="poisson",
        seed=0,
        round_index=0,
    )
    for share, r in zip(seen.visible, (0.15, 0.3, 0.6), strict=True):
        assert_rate(round(share * 300_000), 300_000, 1 - math.exp(-r), discrepancy=0.01)
    np.testing.assert_allclose(seen.rate, [0.15, 0.3, 0.6], rtol=1e-6)
    np.testing.assert_allclose(seen.weight, seen.visible / seen.visible.mean())


@pytest.mark.parametrize("transform", virality.TRANSFORMS)
def test_weights_have_mean_one_and_follow_their_formula(transform):
    options = {"posts_per_sample": 40, "seed": 1, "round_index": 0, "first_id": 2}
    x = np.linspace(-1, 1, 50)
    seen = virality.expose(x, transform=transform, crawl_prob=0.2, top_share=0.3, **options)
    assert seen.weight.mean() == pytest.approx(1)
    sizes = virality.draw_cascades(
        virality.rate(x, **options).ravel(), seed=1, round_index=0, offspring="pareto", first_id=80
    ).reshape(50, 40)
    mean = sizes.mean(1)
    edge = np.sort(mean)[-15]  # the 15 largest of 50; those tied with the 15th share the places left
    formula = {
        "visible": (sizes > 1).mean(1),
        "inclusion": virality.inclusion_weight(sizes.ravel(), 0.2).reshape(50, 40).mean(1),
        "log": (1 + np.log2(sizes)).mean(1),
        "raw": mean,
        "top_k": (mean > edge) + (mean == edge) * (15 - (mean > edge).sum()) / (mean == edge).sum(),
    }[transform]
    np.testing.assert_allclose(seen.weight, formula / formula.mean(), rtol=1e-9)


def test_texts_tied_at_the_edge_of_top_k_share_the_places_left():
    got = virality._top(np.array([5.0, 1.0, 3.0, 3.0, 3.0, 1.0]), 0.5)  # three places: one for the 5, two for three 3s
    assert got.tolist() == pytest.approx([1, 0, 2 / 3, 2 / 3, 2 / 3, 0])


def test_exposure_does_not_depend_on_threads_or_cuts():
    x = np.linspace(-1, 1, 300)
    # 1.2 million posts: fewer than 2**20 are drawn without threads.
    whole = virality.expose(x, posts_per_sample=4000, seed=0, round_index=0, n_threads=1)
    again = virality.expose(x, posts_per_sample=4000, seed=0, round_index=0, n_threads=2)
    tail = virality.expose(x[100:], posts_per_sample=4000, seed=0, round_index=0, first_id=100)
    for name in ("rate", "cascades", "reach", "visible"):
        assert np.array_equal(getattr(whole, name), getattr(again, name))
        assert np.array_equal(getattr(whole, name)[100:], getattr(tail, name))


def test_inclusion_weight_special_cases():
    assert virality.inclusion_weight([1, 2], 0.03).tolist() == pytest.approx([0.03, 1 - 0.97**2], rel=1e-12)
    tiny = virality.inclusion_weight([1, 7], 1e-9)
    assert tiny[1] / tiny[0] == pytest.approx(7, rel=1e-6)  # c -> 0: raw reach
    sure = virality.inclusion_weight([1, 7], 1 - 1e-12)
    assert sure[1] / sure[0] == pytest.approx(1)  # c -> 1: unweighted
    assert virality.inclusion_weight([0], 0.5).tolist() == [0]


@pytest.mark.parametrize("transform", virality.TRANSFORMS)
def test_texts_that_nobody_reshares_weigh_alike(transform):
    found = virality.expose([-60.0] * 5, seed=0, round_index=0, posts_per_sample=10, transform=transform)
    assert found.weight == pytest.approx(np.ones(5))
    assert (found.visible.tolist(), found.cascades.tolist()) == ([0.0] * 5, [1.0] * 5)


def test_bad_exposures_are_refused_with_what_and_where():
    ok = {"seed": 0, "round_index": 0, "posts_per_sample": 10}
    for x, options, message in (
        ([0.0, float("nan")], {}, r"appeal must be finite, got nan at appeal\[\[1\]\]"),
        ([], {}, r"appeal must be a non-empty vector, got shape \(0,\)"),
        ([0.0], {"r_max": 1.0}, "r_max must be above 0 and below 1, got 1.0"),
        ([0.0], {"r0": 0.0}, "r0 must be above 0"),
        ([0.0], {"sigma_luck": -1.0}, "sigma_luck must be >= 0, got -1.0"),
        ([0.0], {"posts_per_sample": 0}, "posts_per_sample must be >= 1, got 0"),
        ([0.0], {"transform": "sqrt"}, "transform must be one of visible"),
        ([0.0], {"crawl_prob": 1.0}, r"crawl_prob must be in \(0, 1\)"),
        ([0.0], {"offspring": "x"}, "offspring must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            virality.expose(x, **{**ok, **options})
    for weights, message in (
        ([1.0, -1.0], r"weights must be >= 0, got -1.0 at n_eff\[\[1\]\]"),
        ([float("nan")], "weights must be finite"),
        ([], "weights must be a non-empty vector"),
        ([0.0, 0.0], "weights must be above 0 somewhere"),
    ):
        with pytest.raises(ValueError, match=message):
            virality.n_eff(weights)
    with pytest.raises(ValueError, match=r"sizes must be >= 0, got -1.0 at sizes"):
        virality.inclusion_weight([1, -1], 0.1)


# ------------------------------------------------------------------------------------------------ diagnostics


def test_effective_number_share_of_the_heaviest_and_differential_by_hand():
    assert virality.n_eff([2.0] * 7) == pytest.approx(7)
    assert virality.n_eff([0, 0, 5]) == pytest.approx(1)
    assert virality.n_eff([1, 2, 3]) == pytest.approx(36 / 14)
    assert virality.top1_share([1] * 199 + [101]) == pytest.approx(102 / 300)  # the heaviest 2 of 200
    got = virality.differential([1, 2, 3, 6], ["nova", "nova", "stella", "stella"])
    assert got == pytest.approx({"nova": 0.5, "stella": 1.5})
    with pytest.raises(ValueError, match="personas must be 2 labels, got 1"):
        virality.differential([1, 2], ["nova"])


def test_the_drift_warning_names_its_cause_below_five_percent():
    assert virality.drift_warning([1] * 100, transform="visible", posts_per_sample=1000) is None
    heavy = [1000] + [0.1] * 99
    assert "raw reach has infinite variance" in str(virality.drift_warning(heavy, transform="raw", posts_per_sample=9))
    text = str(virality.drift_warning(heavy, transform="visible", posts_per_sample=1))
    assert "got 1.0 (1.0%)" in text
    assert "1 posts a text leave its weight to luck; " not in text
    assert "raise posts_per_sample" in text


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.floats(0, 1e3), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3),
    n=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_systematic_resampling_gives_floor_or_ceil_copies(weights, n, seed):
    picks = virality.resample(weights, n, rng=np.random.default_rng(seed))
    w = np.array(weights)
    copies, expected = np.bincount(picks, minlength=w.size), n * w / w.sum()
    assert picks.shape == (n,)
    assert (np.abs(copies - expected) < 1 + 1e-6).all()
    assert (copies[w == 0] == 0).all()


def test_systematic_resampling_is_unbiased():
    w, rng = np.array([0.2, 1.3, 0.0, 2.5]), np.random.default_rng(0)
    copies = np.array([np.bincount(virality.resample(w, 3, rng=rng), minlength=4) for _ in range(20_000)])
    for i in (0, 1, 3):
        low = math.floor(3 * w[i] / 4)
        # Drawing uniformly instead would give 0.75 of each: off by 0.6 and more.
        assert_mean(copies[:, i], 3 * w[i] / 4, low=low, high=low + 1, discrepancy=0.05)


# ------------------------------------------------------------------------------------------------ the controls

COMMON = list(appeal.load_learned().terms[:3000])
COMMON = [t for t in COMMON if " " not in t and t not in appeal.lexicon().index and len(t) > 2]


def two_personas(n: int) -> tuple[list[str], list[str]]:
    """Texts of `loud` and `quiet`: the same random chat, then a request to share or three more random words."""
    rng = np.random.default_rng(1)
    texts, personas = [], []
    for i in range(n):
        loud = i % 2 == 0
        body = " ".join(rng.choice(COMMON, 12))
        texts.append(body + (" please share this" if loud else " " + " ".join(rng.choice(COMMON, 3))))
        personas.append("loud" if loud else "quiet")
    return texts, personas


def difference(weights: np.ndarray, personas: list[str]) -> tuple[float, float]:
    """Mean weight of loud minus quiet, and its standard error (two samples, variances from the draws)."""
    loud = np.array(personas) == "loud"
    a, b = weights[loud], weights[~loud]
    return float(a.mean() - b.mean()), math.sqrt(a.var(ddof=1) / a.size + b.var(ddof=1) / b.size)


def test_full_induces_a_differential_and_null_and_shuffled_do_not():
    texts, personas = two_personas(2000)
    options = {"seed": 0, "round_index": 0}
    full = virality.expose(virality.audience("full")(texts), **options)
    null = virality.expose(virality.audience("null")(texts), **options)
    shuffled = virality.shuffle(full, rng=stream(0, "shuffle", 0)).weight
    assert sorted(shuffled) == sorted(full.weight)
    # K = 1000 posts, 5% visible: a weight has sd 0.14 from its posts, more from its other words; 0.1 is always seen.
    for weights in (null.weight, shuffled):
        gap, error = difference(weights, personas)
        assert 2 * Z * error < 0.1
        assert abs(gap) < Z * error
        got = virality.differential(weights, personas)
        assert got["loud"] == pytest.approx(1, abs=Z * error)
    # The request is worth a rate ratio of 1.5; cut rates and heavy tails leave about 1.3 of it in what is visible.
    gap, error = difference(full.weight, personas)
    assert gap > 0.15
    assert gap > 20 * error
    # Blind to the request, nothing is left.
    blind = virality.expose(virality.audience("no_request")(texts), **options)
    assert abs(difference(blind.weight, personas)[0]) < Z * difference(blind.weight, personas)[1]


def test_placebos_induce_no_differential_over_their_draws():
    texts, personas = two_personas(600)
    gaps = []
    for draw in range(16):
        scores = virality.audience(f"placebo:{draw}")(texts)
        loud = np.array(personas) == "loud"
        gaps.append(float(scores[loud].mean() - scores[~loud].mean()))
    gaps_array = np.array(gaps)
    error = gaps_array.std(ddof=1) / math.sqrt(16)
    # Student t with 15 degrees of freedom: 1e-6 two-sided at 7.71. The request itself is worth 0.405.
    assert abs(gaps_array.mean()) < 7.71 * error
    assert 7.71 * error < 0.2
    full = virality.audience("full")(texts)
    assert full[loud].mean() - full[~loud].mean() > 0.4 - 1e-6


def test_appeal_raises_the_visible_share_by_the_published_amount():
    # Computed before by another program: ln ratio of P(N >= 2) at a rate ratio of 1.5 is 0.255 (Pareto, sd 2).
    ratio = []
    for x in (0.0, math.log(1.5)):
        seen = virality.expose(
            np.full(400, x),
            posts_per_sample=5000,
            transform="raw",
            r0=0.14,
            sigma_author=math.sqrt(1.4),
            sigma_luck=math.sqrt(2.6),
            seed=0,
            round_index=0,
        )
        ratio.append(seen.visible.mean())
    assert ratio[0] == pytest.approx(0.05, abs=0.003)  # 95% never reshared
    assert math.log(ratio[1] / ratio[0]) == pytest.approx(0.255, abs=0.02)


def test_check_hits_theory_and_admits_what_presets_miss():
    rows = virality.check(n_posts=300_000)
    theory = [r for r in rows if r.kind == "theory"]
    assert len(theory) >= 10
    assert all(r.hit for r in theory)
    found = {(r.preset, r.target.split(",")[0]): r.hit for r in rows if r.kind == "empirical"}
    assert found[("goel2012", "share of posts never reshared")]
    assert found[("goel2016_mean", "mean size")]
    # One lognormal of rates cannot have both 95% of posts unshared and a mean of 1.9.
    assert not found[("goel2012", "mean size")]
    assert not found[("goel2016_mean", "share of posts never reshared")]
    assert all(r.hit == (abs(r.got - r.value) <= r.tolerance) for r in rows)


def test_presets_split_the_variance_of_the_log_rate_10_25_65():
    for name in ("goel2012", "goel2016_mean"):
        preset = virality.PRESETS[name]
        parts = np.array([virality.CONTENT_SD**2, preset.sigma_author**2, preset.sigma_luck**2])
        assert parts.sum() == pytest.approx(4.0)
        np.testing.assert_allclose(parts / 4, [0.10, 0.25, 0.65])
    assert replace(virality.PRESETS["goel2012"], r0=0.2).r_max == 0.9


def test_too_few_posts_to_check_with_are_refused():
    with pytest.raises(ValueError, match="n_posts must be >= 100000, got 10000 at check"):
        virality.check(n_posts=10_000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_the_kind\n", r"file that imports, got ModuleNotFoundError: .* \(line 1\) at .*mine\.py:f"),
        ("def f(:\n", r"file that imports, got SyntaxError: .* \(line 1\) at .*mine\.py:f"),
        ("x = {}['no']\n", r"file that imports, got KeyError: 'no' \(line 1\) at .*mine\.py:f"),
        (
            "def f(replies):\n    return [0.0]\n",
            r"score replies, got TypeError: .* at .*mine\.py:f; it is called as f\(",
        ),
        ("def f(replies, **_):\n    return {}[1]\n", r"score replies, got KeyError: 1 \(line 2\) at .*mine\.py:f"),
        (
            "def f(replies, **_):\n    return [1j, 0]\n",
            r"real numbers, got list of complex128 at audience .*mine\.py:f",
        ),
        ("def f(replies, **_):\n    return ['1', '2']\n", r"real numbers, got list of <U1 at audience .*mine\.py:f"),
        ("def f(replies, **_):\n    return [[1], [1, 2]]\n", r"one number for each of 2 .* audience .*mine\.py:f"),
        ("def f(replies, **_):\n    return None\n", r"real numbers, got NoneType of object at audience .*mine\.py:f"),
        ("def f(replies, **_):\n    return [1e300, 0]\n", r"finite, got inf at reply 0 of audience .*mine\.py:f"),
    ],
)
def test_an_audience_file_that_fails_is_one_line_with_its_name(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=message) as caught:
        virality.audience(f"{path}:f")(["one", "two"])
    assert "\n" not in str(caught.value)
