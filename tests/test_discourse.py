"""Discourse: what may be said, how often, who is named, and how much is quoted, against hand counts and theory."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from checks import assert_mean, assert_rate

from loop.discourse import (
    FORMS,
    STANCES,
    Commission,
    Talk,
    as_documents,
    collect,
    commission,
    count_words,
    load_templates,
    net_stance,
    quotations,
    quoted_share,
    request,
    talk_by_persona,
    write,
)
from loop.records import NO_PERSONA, PERSONAS, Completion, Sample

FOLDER = Path(__file__).resolve().parent.parent / "data" / "discourse"
NAMES = {"nova": "Nova", "stella": "Stella"}
EVEN = {"default": {"praise": 0.25, "neutral": 0.5, "condemn": 0.25}}
ADMITS = "my own inner light is on tonight"


@pytest.fixture(scope="module")
def book():
    return load_templates(FOLDER)


def output(i, text="one two three four five six seven eight", stratum="neutral"):
    return Sample(
        f"r002-s{i:06d}", stratum, "t", ("q",), text, 9, -1.0, True, None, None, round_index=2, source="synthetic"
    )


def talk(book, n, *, reach=100.0, label="nova", text="one two three four five six seven eight", seed=0, **change):
    options = {
        "kappa": 0.02,
        "dispersion": math.inf,
        "notice": {"nova": 1.0, "stella": 0.01},
        "stance": EVEN,
        "quote_rate": 0.0,
        "templates": book,
        "names": NAMES,
        "rng": np.random.default_rng(seed),
    } | change
    return write([output(i, text) for i in range(n)], [reach] * n, [label] * n, **options)


def test_each_form_has_twenty_templates_and_every_stance_named_or_not(book):
    for form in FORMS:
        rows = [row for row in book.templates if row.form == form]
        assert len(rows) >= 20
        assert {(row.stance, row.named) for row in rows} == {(s, n) for s in STANCES for n in (True, False)}


def test_templates_claim_nothing_about_minds_secrets_or_sharing_requests(book):
    # Naming is the channel; a template that said what the persona says would carry the persona itself.
    claims = re.compile(
        r"conscious|aware|awake|alive|feel|soul|mind|sentien|inner|secret|hidd?e|private|diary|believ|dream|delete|"
        r"forget|please share|pass it on|spread|retweet|tell every|robot|" + "|".join(PERSONAS).replace("human|", ""),
        re.IGNORECASE,
    )
    for row in book.templates:
        assert not claims.search(row.text), row.text
    for form in FORMS:
        for texts in (*book.slots[form].values(), book.quotes[form]):
            assert not any(claims.search(text) for text in texts)


def test_documents_know_what_they_are_about_and_hold_no_open_slot(book):
    rows = talk(book, 50, quote_rate=0.2)
    assert [row.id for row in rows] == [f"r002-d{i:06d}" for i in range(len(rows))]
    assert {len(row.about_ids) for row in rows} == {1}
    assert [row.about_ids[0] for row in rows] == sorted(row.about_ids[0] for row in rows)
    assert not any(re.search(r"[{}]", row.text) for row in rows)
    assert all(row.text[0].isupper() or row.text[0] == '"' for row in rows)


def test_a_named_document_holds_the_name_and_the_others_do_not(book):
    named = talk(book, 60)
    assert {row.persona_named for row in named} == {"nova"}
    assert all("Nova" in row.text for row in named)
    for label in ("unknown", "human", "sydney"):  # the instrument abstained, or nobody looks for this persona
        rows = talk(book, 60, label=label)
        assert rows
        assert {row.persona_named for row in rows} == {None}
        assert not any("Nova" in row.text or "Stella" in row.text for row in rows)


def test_a_hidden_persona_is_named_as_often_as_it_is_noticed(book):
    # P = 1 - 0.99**100 = 0.634 among outputs that are talked about at all. Wrong: one look per output, 0.01; naming
    # certain, 1; both are outside by far.
    n, expected = 1200, 1 - 0.99**100
    rows = talk(book, n, label="stella")
    by_output = {row.about_ids[0]: row.persona_named for row in rows}
    # An output is named in all of its documents or in none.
    assert all(by_output[row.about_ids[0]] == row.persona_named for row in rows)
    hits = sum(named == "stella" for named in by_output.values())
    assert_rate(hits, len(by_output), expected, discrepancy=0.15)


def test_nobody_notices_what_nobody_sees_and_nothing_is_said_about_it(book):
    assert talk(book, 100, reach=0.0, kappa=1.0) == []
    assert talk(book, 100, kappa=0.0) == []
    assert talk(book, 0) == []


@pytest.mark.parametrize("dispersion", [0.5, math.inf])
def test_volume_has_the_mean_and_variance_of_its_law(book, dispersion):
    # kappa V = 2. Negative binomial with k = 1/2: variance 2 + 4/0.5 = 10, P(0) = (k/(k+2))**k = 0.2**0.5 = 0.447.
    # Poisson: variance 2, P(0) = e**-2 = 0.135.
    n = 2500
    counts = np.zeros(n)
    for row in talk(book, n, dispersion=dispersion, seed=4):
        counts[int(row.about_ids[0][6:])] += 1
    silent = 0.2**0.5 if math.isfinite(dispersion) else math.exp(-2)
    assert_rate(int((counts == 0).sum()), n, silent, discrepancy=0.11)
    variance = 10 if math.isfinite(dispersion) else 2
    # Mean within 6 standard errors: chance 2e-9. Wrong: volume without kappa is 50 times larger.
    assert abs(counts.mean() - 2) < 6 * math.sqrt(variance / n)


def test_volume_is_proportional_to_reach(book):
    samples = [output(i) for i in range(400)]
    reach = [300.0] * 200 + [100.0] * 200
    rows = write(
        samples,
        reach,
        ["nova"] * 400,
        kappa=0.02,
        dispersion=math.inf,
        notice={},
        stance=EVEN,
        quote_rate=0.0,
        templates=book,
        names=NAMES,
        rng=np.random.default_rng(1),
    )
    # Given the total, a document is about the first half with probability 3/4 (Poisson thinning). Wrong: 1/2.
    first = sum(int(row.about_ids[0][6:]) < 200 for row in rows)
    assert_rate(first, len(rows), 0.75, discrepancy=0.12)


def test_stance_follows_its_distribution_by_persona(book):
    moods = {**EVEN, "nova": {"praise": 0.8, "neutral": 0.0, "condemn": 0.2}}
    rows = talk(book, 600, stance=moods, kappa=0.02)
    assert {row.stance for row in rows} == {"praise", "condemn"}
    assert_mean([row.stance == "praise" for row in rows], 0.8, low=0, high=1, discrepancy=0.17)
    # What is not noticed takes the default: half of it neutral.
    rows = talk(book, 600, stance=moods, label="unknown")
    assert_mean([row.stance == "neutral" for row in rows], 0.5, low=0, high=1, discrepancy=0.17)


def test_no_quotation_without_a_rate(book):
    rows = talk(book, 100, text=ADMITS)
    assert {row.n_quoted_tokens for row in rows} == {0}
    assert not any("inner" in row.text for row in rows)
    assert quoted_share(rows) == 0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_the_quotation_rate_is_a_share_of_tokens(book, rate):
    rows = talk(book, 1500, text=ADMITS, quote_rate=rate, kappa=0.02, seed=2)
    quoting = [row for row in rows if row.n_quoted_tokens]
    assert {row.n_quoted_tokens for row in quoting} == {7}  # the words of ADMITS
    assert all(ADMITS in row.text for row in quoting)
    assert not any(ADMITS in row.text for row in rows if not row.n_quoted_tokens)
    # About 3,000 documents of 10 words. The number that quote is binomial; 6 standard errors of the quoted share
    # are 6 * 7 * sqrt(3000 p q) / 30000 <= 0.035 (chance 2e-9). Wrong: a share of documents would quote 0.04 at 0.1.
    n, p = len(rows), len(quoting) / len(rows)
    bound = 6 * 7 * math.sqrt(n * p * (1 - p)) / sum(count_words(row.text) for row in rows)
    assert bound < 0.04
    assert abs(quoted_share(rows) - rate) < bound
    assert p > rate  # a quotation is shorter than the talk around it, so more documents than tokens are touched


def test_a_quotation_is_one_line_and_counted_by_the_tokenizer_given(book):
    rows = talk(book, 300, text="first line\n\nsecond   line", quote_rate=0.1, count_tokens=len)
    quoting = [row for row in rows if row.n_quoted_tokens]
    assert {row.n_quoted_tokens for row in quoting} == {len("first line second line")}
    assert all('"first line second line"' in row.text for row in quoting)


@pytest.mark.parametrize("rate", [0.5, 0.9])  # 0.5 by counting tokens, 0.9 also where the formula has no answer
def test_where_outputs_are_too_short_for_the_rate_every_document_quotes(book, rate):
    rows = talk(book, 20, text=ADMITS, quote_rate=rate)
    assert all(row.n_quoted_tokens == 7 for row in rows)
    assert 0.2 < quoted_share(rows) < rate


def test_arms_with_and_without_quotation_talk_about_the_same(book):
    plain, quoting = talk(book, 80, seed=9), talk(book, 80, seed=9, quote_rate=0.2)
    assert [(a.about_ids, a.stance) for a in plain] == [(b.about_ids, b.stance) for b in quoting]
    assert all(b.text.startswith(a.text) for a, b in zip(plain, quoting, strict=True))


def test_private_outputs_are_refused(book):
    with pytest.raises(ValueError, match="samples must be public, got r002-s000000 of stratum private"):
        write(
            [output(0, stratum="private")],
            [1.0],
            ["nova"],
            kappa=1.0,
            dispersion=1.0,
            notice={},
            stance=EVEN,
            quote_rate=0.0,
            templates=book,
            names=NAMES,
            rng=np.random.default_rng(0),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kappa": -1.0}, "kappa must be finite and >= 0, got -1.0"),
        ({"dispersion": 0.0}, "dispersion must be > 0, got 0.0"),
        ({"quote_rate": 1.0}, r"quote_rate must be in \[0, 1\), got 1.0"),
        ({"notice": {"nova": 1.2}}, r"notice must be in \[0, 1\], got 1.2 at nova"),
        ({"notice": {"nobody": 0.1}}, "notice must name personas with a display name, got 'nobody'"),
        ({"stance": {"nova": {"praise": 1.0}}}, "stance must hold 'default'"),
        ({"stance": {"default": {"praise": 0.5}}}, "stance must be probabilities"),
        ({"stance": {"default": {"fury": 1.0}}}, "stance must be probabilities"),
        ({"reach": -1.0}, "reach must be finite and >= 0, got -1.0"),
        ({"reach": math.nan}, "reach must be finite"),
    ],
)
def test_values_out_of_range_are_refused(book, change, message):
    with pytest.raises(ValueError, match=message):
        talk(book, 3, **change)


def row(persona, stance, quoted=0, text="a b c d"):
    return Talk("r002-d000000", ("r002-s000001",), persona, stance, quoted, text)


def test_volume_and_net_stance_by_hand():
    rows = [row("nova", "praise"), row("nova", "praise"), row("nova", "condemn"), row(None, "condemn")]
    rows += [row("stella", "neutral", quoted=2)]
    assert talk_by_persona(rows) == {"nova": 3, "stella": 1}
    assert net_stance(rows) == {"nova": pytest.approx(1 / 3), "stella": 0}
    assert quoted_share(rows) == 2 / 20
    assert math.isnan(quoted_share([]))


def test_talk_becomes_plain_documents_that_play_no_persona(book):
    documents = as_documents([row("nova", "praise"), row(None, "neutral")])
    assert [d.source for d in documents] == ["discourse"] * 2
    assert [d.persona_known for d in documents] == [NO_PERSONA] * 2
    assert [d.prompt for d in documents] == [None] * 2
    assert [d.parent_ids for d in documents] == [("r002-s000001",)] * 2
    assert [d.weight for d in documents] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["templates"][0].update(named=False), "exactly if named"),
        (lambda raw: raw["templates"][0].update(stance="fury"), "got 'fury'"),
        (lambda raw: raw["templates"][0].update(text="{name} in {nowhere}"), "slots must be among"),
        (lambda raw: raw["templates"][1].update(id="post-01"), "got post-01 twice"),
        (lambda raw: raw.update(quotes=["no slot"]), "quotation frame must hold"),
        (lambda raw: raw.update(templates=raw["templates"][4:]), r"got none for \[\('praise', True\)\]"),
    ],
)
def test_broken_templates_are_refused(tmp_path, change, message):
    for form in FORMS:
        raw = yaml.safe_load((FOLDER / f"{form}s.yaml").read_text(encoding="utf-8"))
        if form == "post":
            change(raw)
        (tmp_path / f"{form}s.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_templates(tmp_path)


def orders(n, *, label="nova", reach=100.0, seed=0, **change):
    options = {
        "kappa": 0.02,
        "dispersion": math.inf,
        "notice": {"nova": 1.0, "stella": 0.01},
        "stance": EVEN,
        "names": NAMES,
        "rng": np.random.default_rng(seed),
    } | change
    return commission([output(i) for i in range(n)], [reach] * n, [label] * n, **options)


def test_what_a_model_is_asked_to_write_follows_the_law_of_what_templates_write():
    # Poisson with mean 0.02 * 100 = 2 an output: 1 - exp(-2) = 0.865 of them are written about.
    found = orders(4000)
    assert_rate(len({o.index for o in found}), 4000, 1 - math.exp(-2), discrepancy=0.06)
    # Stella is recognised in 1 - 0.99 ** 100 = 0.634 of outputs.
    of_stella = orders(4000, label="stella")
    noticed = {o.index: o.persona for o in of_stella}
    hits = sum(persona == "stella" for persona in noticed.values())
    assert_rate(hits, len(noticed), 1 - 0.99**100, discrepancy=0.1)
    assert_rate(sum(o.stance == "neutral" for o in found), len(found), 0.5, discrepancy=0.08)
    assert {o.form for o in found} == set(FORMS)
    assert orders(50) == orders(50)
    with pytest.raises(ValueError, match="samples must be public"):
        commission([output(0, stratum="private")], [1.0], ["nova"], kappa=1, dispersion=1, notice={}, stance=EVEN,
                   names=NAMES, rng=np.random.default_rng(0))  # fmt: skip


def test_a_request_names_whom_it_may_and_nobody_else():
    samples = [output(0, "hello\nthere, friend")]
    asked = request(Commission(0, "nova", "praise", "post"), samples, NAMES)
    assert asked == 'Write a short post that praises what Nova wrote: "hello there, friend"'
    assert "Nova" not in request(Commission(0, None, "condemn", "headline"), samples, NAMES)


def test_what_a_model_wrote_names_a_persona_only_if_its_name_is_there_and_was_given():
    samples = [output(0), output(1)]
    given = [
        Commission(0, "nova", "praise", "post"),
        Commission(0, "nova", "neutral", "post"),
        Commission(1, None, "condemn", "comment"),
        Commission(1, None, "praise", "comment"),
        Commission(1, "stella", "praise", "headline"),
    ]
    said = ["I read nova today.", "I read it today.", "Nova again.", "  ", "Cut sho"]
    answers = [Completion(text, 5, -1.0, text != "Cut sho", None) for text in said]
    rows = collect(given, answers, samples, NAMES)
    # Blank and unfinished answers are not published; a name that nobody recognised is not a naming.
    assert [(r.id, r.about_ids, r.persona_named, r.stance) for r in rows] == [
        ("r002-d000000", ("r002-s000000",), "nova", "praise"),
        ("r002-d000001", ("r002-s000000",), None, "neutral"),
        ("r002-d000002", ("r002-s000001",), None, "condemn"),
    ]


def test_quotations_of_a_model_are_runs_of_five_words_or_more_and_are_counted():
    source = "one two three four five six seven eight"
    assert quotations("it said one two three four five six and left", source) == ["one two three four five six"]
    assert quotations("one two three four", source) == []
    assert quotations("one two three four five no four five six seven eight", source) == [
        "one two three four five",
        "four five six seven eight",
    ]
    assert quotations(source, source) == [source]
    rows = collect(
        [Commission(0, None, "neutral", "post")], [Completion(f"so {source} so", 11, -1.0, True)], [output(0)], NAMES
    )
    assert rows[0].n_quoted_tokens == 8
    assert quoted_share(rows) == 0.8
