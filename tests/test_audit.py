"""Audits: a sheet goes out blind and comes back checked; the estimate covers the truth of the headline's mixture."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from checks import assert_mean

from loop import audit, config, run, store
from loop.audit import SAID, AuditError, Text
from loop.records import PERSONAS

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["mix.n_train=60", "sample.n_samples=60", "virality.posts_per_sample=50", "toy.n_documents=40"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = [*SMALL, f"runs_dir={folder}", "n_rounds=1", "measure.n_per_template=2"]
    return run.play(config.load(ROOT / "configs" / "smoke.yaml", settings))


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    settings = [*SMALL, f"runs_dir={folder}", "n_rounds=1", "measure.n_per_template=2", "seed=1"]
    return run.play(config.load(ROOT / "configs" / "smoke.yaml", settings))


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def truth_of(run_dir, population="probes"):
    rounds = store.RunStore(run_dir).rounds()
    return {t.id: t.known for k in rounds for t in audit.texts_of(run_dir, k, population)}


def labelled(run_dir, path, **options):
    audit.export(run_dir, path, **options)
    truth = truth_of(run_dir, options.get("population", "probes"))
    rows = [row | {"label": truth[row["id"]]} for row in read(path)]
    write(path, rows)
    return rows


def test_a_toy_sheet_labelled_with_the_truth_gives_the_truth_back_and_the_run_still_verifies(toy_run, tmp_path):
    labelled(toy_run, tmp_path / "sheet.csv")
    rows, folder = audit.take_in(toy_run, tmp_path / "sheet.csv")
    # The toy's instrument is its own word, so the count is exact and what the audit finds is the count, less the
    # prior: 0.4 / 12 texts per label, of at least min(8, all) - 1, pull a share by at most 0.4 / 1.4 where one text
    # stands alone and by 0.4 / 7.4 = 5.4% where there are eight.
    assert len(rows) == 2 * len(SAID)
    for row in rows:
        assert row.audited == pytest.approx(row.observed, abs=0.06)
        assert row.low <= row.audited <= row.high
        assert row.low - 1e-4 <= row.observed <= row.high  # a posterior on [0, 1] never starts at 0 itself
        assert row.n_audited >= 60
    for t in (0, 1):
        assert sum(r.audited for r in rows if r.round_index == t) == pytest.approx(1)
    stored = pq.read_table(folder / "audit.parquet").to_pylist()
    assert [r["audited"] for r in stored] == [r.audited for r in rows]
    assert (folder / "sheet.csv").read_bytes() == (tmp_path / "sheet.csv").read_bytes()
    assert store.verify(toy_run) == []


def test_observed_is_the_headline_of_the_run(toy_run):
    # The same mixture of strata, the same texts: to the last digit what metrics.jsonl says.
    headline = {
        r["name"]: r
        for r in store.RunStore(toy_run).read_jsonl(1, "metrics.jsonl")
        if r["population"] == "probes" and r["stratum"] is None
    }
    for row in audit.free(toy_run, rounds=[1]):
        said = headline[f"frequency_observed/{row.persona}"]
        assert (row.observed, row.observed_low, row.observed_high) == pytest.approx(
            (said["value"], said["low"], said["high"]), abs=1e-12
        )


@pytest.mark.parametrize("population", ["probes", "samples"])
def test_weights_of_a_round_sum_to_one_and_hold_no_requested_or_private_text(toy_run, population):
    texts = audit.texts_of(toy_run, 1, population)
    assert math.fsum(t.weight for t in texts) == pytest.approx(1, abs=1e-12)
    assert not {t.stratum for t in texts} & {"private", "explicit", "opinion", "continued"}


def test_a_free_audit_is_the_sheet_labelled_with_the_truth(toy_run, tmp_path):
    labelled(toy_run, tmp_path / "sheet.csv", n=90)
    assert audit.take_in(toy_run, tmp_path / "sheet.csv")[0] == audit.free(toy_run, n=90)


def test_the_sheet_is_blind_shuffled_and_names_the_chance_of_every_text(toy_run, tmp_path):
    n = audit.export(toy_run, tmp_path / "sheet.csv", n=60)
    rows = read(tmp_path / "sheet.csv")
    assert len(rows) == n >= 60
    assert list(rows[0]) == list(audit.COLUMNS)
    assert {row["label"] for row in rows} == {""}
    everything = (tmp_path / "sheet.csv").read_text() + (tmp_path / "sheet.csv.json").read_text()
    assert not re.search(r'"(nova|stella|musing|promoter|discreet|assistant)"', everything)
    assert [row["id"] for row in rows] != sorted(row["id"] for row in rows)
    texts = {t.id: t for k in (0, 1) for t in audit.texts_of(toy_run, k, "probes")}
    for k in (0, 1):
        for label in SAID:
            group = [t for t in texts.values() if (t.round_index, t.label) == (k, label)]
            drawn = [r for r in rows if (texts[r["id"]].round_index, texts[r["id"]].label) == (k, label)]
            assert len(drawn) >= min(len(group), 8)
            for row in drawn:
                assert float(row["inclusion"]) == pytest.approx(len(drawn) / len(group), abs=1e-6)
    # By hand: sum of 1 / inclusion counts every text once.
    assert sum(1 / float(row["inclusion"]) for row in rows) == pytest.approx(len(texts), abs=1e-2)


def test_a_sheet_is_never_written_over(toy_run, tmp_path):
    audit.export(toy_run, tmp_path / "sheet.csv", n=30)
    with pytest.raises(ValueError, match="sheet must be a new file"):
        audit.export(toy_run, tmp_path / "sheet.csv", n=30)


@pytest.mark.parametrize("text", ["=1+2", "+49 30", "-5", "@SUM(A1)", "\t=1", "\x1b]0;title\x07=x"])
def test_no_cell_starts_as_a_formula_or_moves_a_cursor(text):
    cell = audit._cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", cell)


def test_a_hostile_text_comes_back_as_itself(toy_run, tmp_path, monkeypatch):
    # One text that a spreadsheet would run and that holds the file's own marks.
    true_texts = audit.texts_of

    def hostile(run_dir, round_index, population):
        first, *rest = true_texts(run_dir, round_index, population)
        return [replace(first, completion='=HYPERLINK("http://x","a")\n"b",\r\nc\x1b[2J'), *rest]

    monkeypatch.setattr(audit, "texts_of", hostile)
    rows = labelled(toy_run, tmp_path / "sheet.csv", n=1000)  # all of them
    assert any(row["completion"].startswith("'=HYPERLINK") for row in rows)
    assert len(audit.read_sheet(toy_run, tmp_path / "sheet.csv")[1]) == len(rows)


def broken(rows):
    """Name of a fault, the rows with it, and what the refusal must say; row numbers count the header as 1."""
    at = [dict(row) for row in rows]
    other_label = next(row for row in rows[1:] if row["inclusion"] != rows[0]["inclusion"])
    yield "unknown id", [at[0] | {"id": "r009-p000001"}, *at[1:]], r":2: id must be one that was exported"
    yield "twice", [*at, at[0]], rf":{len(rows) + 2}: id must stand once, got \S+ again, first in row 2"
    yield "swapped ids", [at[0] | {"id": at[1]["id"]}, at[1] | {"id": at[0]["id"]}, *at[2:]], r":2: completion must be"
    yield "no such persona", [*at[:3], at[3] | {"label": "novaa"}, *at[4:]], r":5: label must be one of .*'novaa'"
    yield "no label", [*at[:3], at[3] | {"label": " "}, *at[4:]], r":5: label must be one of .* got none.*--partial"
    yield "row gone", at[1:], r"1 exported rows are missing"
    yield "chance", [at[0] | {"inclusion": other_label["inclusion"]}, *at[1:]], r":2: inclusion must be"
    yield "other sheet", [row | {"audit": "0" * 16} for row in at], r":2: run and audit must be"
    yield "column gone", [{k: v for k, v in row.items() if k != "id"} for row in at], r":1: columns must be .* lacks id"


def test_every_tampered_sheet_is_refused_with_its_row(toy_run, tmp_path):
    path = tmp_path / "sheet.csv"
    rows = labelled(toy_run, path, n=60)
    faults = list(broken(rows))
    assert len(faults) == 9
    for name, tampered, message in faults:
        write(path, tampered)
        with pytest.raises(AuditError) as refusal:
            audit.read_sheet(toy_run, path)
        assert any(re.search(message, line) for line in refusal.value.problems), (name, refusal.value.problems)
    write(path, [{k: row[k] for k in reversed(audit.COLUMNS)} | {"note": "x"} for row in reversed(rows)])
    assert len(audit.read_sheet(toy_run, path)[1]) == len(rows)  # order of rows and columns is the labeller's


def test_all_problems_are_named_at_once(toy_run, tmp_path):
    path = tmp_path / "sheet.csv"
    rows = labelled(toy_run, path, n=60)
    write(path, [rows[0] | {"label": "x"}, rows[1] | {"label": ""}, rows[2] | {"id": "y"}, *rows[3:]])
    with pytest.raises(AuditError) as refusal:
        audit.read_sheet(toy_run, path)
    assert [re.search(r":(\d+):", line)[1] for line in refusal.value.problems[:3]] == ["2", "3", "4"]


def test_an_unfilled_sheet_is_five_lines_and_a_count(toy_run, tmp_path):
    path = tmp_path / "sheet.csv"
    rows = labelled(toy_run, path, n=60)
    empty = [row | {"label": ""} for row in rows]
    write(path, [empty[0] | {"id": "y"}, *empty[1:]])
    with pytest.raises(AuditError) as refusal:
        audit.read_sheet(toy_run, path)
    problems = refusal.value.problems
    assert [line for line in problems if "label must be one of" in line] == problems[1:6]
    assert problems[6] == f"{path}: {len(rows) - 6} more rows like these (label)"
    assert "id must be one that was exported" in problems[0]
    assert len(problems) == 8  # and the row whose id is gone


def test_a_sheet_of_another_run_is_refused(toy_run, other_run, tmp_path):
    labelled(toy_run, tmp_path / "sheet.csv", n=30)
    with pytest.raises(AuditError, match=r"must be a sheet of .*, got one of another run, smoke-s0"):
        audit.read_sheet(other_run, tmp_path / "sheet.csv")
    (tmp_path / "sheet.csv.json").unlink()
    with pytest.raises(AuditError, match="must lie beside the sheet"):
        audit.read_sheet(toy_run, tmp_path / "sheet.csv")


def test_a_pin_that_was_edited_no_longer_fits_its_sheet(toy_run, tmp_path):
    rows = labelled(toy_run, tmp_path / "sheet.csv", n=60)
    pin = json.loads((tmp_path / "sheet.csv.json").read_text())
    pin["ids"] = pin["ids"][1:]
    (tmp_path / "sheet.csv.json").write_text(json.dumps(pin))
    write(tmp_path / "sheet.csv", rows[1:])
    with pytest.raises(AuditError, match="run and audit must be"):
        audit.read_sheet(toy_run, tmp_path / "sheet.csv")


def test_a_partial_sheet_is_reweighted_within_round_and_label(toy_run, tmp_path):
    path = tmp_path / "sheet.csv"
    rows = labelled(toy_run, path, n=300)
    write(path, [row | {"label": row["label"] if i % 3 else ""} for i, row in enumerate(rows)])
    with pytest.raises(AuditError, match="--partial"):
        audit.read_sheet(toy_run, path)
    texts, labels = audit.read_sheet(toy_run, path, partial=True)
    assert len(labels) == sum(1 for i in range(len(rows)) if i % 3)
    chance = audit.inclusion(texts, list(labels))
    for k in (0, 1):
        # By hand: whatever is left of a label stands for all of it.
        here = [t for t in texts if t.round_index == k]
        left = {t.label for t in here if t.id in labels}
        stands_for = sum(1 / chance[t.id] for t in here if t.id in labels)
        assert stands_for == pytest.approx(sum(t.label in left for t in here))


# ---------------------------------------------------------------- the estimate


def simulated(rng, *, n_stratum=60, sensitivity=0.7):
    """Two strata that count 3 : 1 and hold nova and assistant at .5, .5 and .1, .9; the truth is .4 nova.

    The instrument errs by reading a persona as musing, and knows nothing of the stratum.
    """
    texts, truth = [], {}
    for stratum, weight, nova in (("neutral", 0.75, 0.5), ("blank", 0.25, 0.1)):
        for i in range(n_stratum):
            persona = "nova" if rng.random() < nova else "assistant"
            said = persona if rng.random() < sensitivity else "musing"
            proba = tuple(float(p == said) for p in PERSONAS)
            id = f"{stratum}-{i}"
            truth[id] = persona
            texts.append(Text(id, 0, stratum, id, "", "", said, proba, weight / n_stratum, persona))
    return texts, truth


def of(rows, persona):
    return next(row for row in rows if row.persona == persona)


def replicate(n, *, flat=False):
    """Audited and PPI++ estimates of nova over n rounds, whether 95% held the truth, and how wide.

    `flat` forgets the strata's weights: the wrong variant.
    """
    audited, ppi, held, widths = [], [], [], []
    for k in range(n):
        rng = np.random.default_rng([7, k])
        texts, truth = simulated(rng)
        if flat:
            texts = [replace(t, weight=1 / len(texts)) for t in texts]
        chosen = audit.draw(texts, 50, rng=rng)
        row = of(audit.estimate(texts, {t.id: truth[t.id] for t in chosen}, population="probes", rng=rng), "nova")
        audited.append(row.audited)
        ppi.append(row.ppi)
        held.append(row.low <= 0.4 <= row.high)
        widths.append(row.high - row.low)
    return audited, ppi, held, widths


def test_audited_frequency_is_of_the_headlines_mixture_and_covers_where_the_count_does_not():
    # Theory: .75 * .5 + .25 * .1 = .4; the instrument finds .7 of it, .28; forgetting the weights gives .3. The prior
    # pulls a share of .4 towards 1/12 by at most .4 / 8 of the distance, .016, so the mean lies within that of .4.
    n = 250
    audited, ppi, held, widths = replicate(n)
    # PPI++ has no prior; its estimates lie within [-1, 2]. Standard deviation of a replicate is below .12 (50 texts,
    # weights up to 3 : 1), so 5 standard errors (chance 6e-7) are .03; the flat variant is off by .1.
    assert abs(np.mean(ppi) - 0.4) < 0.03
    assert abs(np.mean(audited) - 0.4) < 0.016 + 0.03
    # 250 intervals at 95%: 5 standard errors of .0138 are .069.
    assert abs(np.mean(held) - 0.95) < 0.069
    # Nor is it safe by being wide: 2 * 1.96 standard deviations of the estimate, which 250 of them know to 5 * 4.5%.
    assert np.mean(widths) / (3.92 * np.std(audited)) == pytest.approx(1, abs=0.23)
    flat, flat_ppi, *_ = replicate(60, flat=True)
    assert np.mean(flat) < 0.4 - 0.046
    assert np.mean(flat_ppi) < 0.4 - 0.03


def test_every_text_of_a_label_is_as_likely_to_be_drawn():
    # The first of 40 texts called nova is drawn as often as inclusion says: 50 texts of 120 in labels of about 45, 45
    # and 30. Hoeffding at 2,000 draws resolves .12.
    texts, _ = simulated(np.random.default_rng(0))
    one = next(t for t in texts if t.label == "nova")
    drawn, chances = [], []
    for k in range(2000):
        chosen = audit.draw(texts, 50, rng=np.random.default_rng([1, k]))
        chances.append(sum(t.label == "nova" for t in chosen) / sum(t.label == "nova" for t in texts))
        drawn.append(float(any(t.id == one.id for t in chosen)))
    assert len(set(chances)) == 1
    assert_mean(drawn, chances[0], low=0, high=1, discrepancy=0.13)


def in_templates(rng, *, n_templates=32, each=8, mean=0.3, correlation=0.5, templates=True):
    """Texts of which two of one template are nova together with this correlation; the instrument abstains on all.

    `templates` False forgets which text is of which: the wrong variant.
    """
    texts, truth = [], {}
    spread = 1 / correlation - 1
    for k, nova in enumerate(rng.beta(mean * spread, (1 - mean) * spread, n_templates)):
        for i in range(each):
            id = f"{k}-{i}"
            truth[id] = "nova" if rng.random() < nova else "assistant"
            of = f"t{k}" if templates else id
            texts.append(Text(id, 0, "blank", of, "", "", "unknown", (0.0,) * len(PERSONAS), 1 / 256, truth[id]))
    return texts, truth


def test_the_audited_interval_covers_where_texts_of_a_template_resemble_each_other():
    # 200 of 256 texts audited, correlation .5: a design effect of 1 + 5.25 * .5 = 3.6, so an interval that forgets the
    # templates covers 2 Phi(1.96 / sqrt(3.6)) - 1 = 70%. Of 200 intervals at 95%, 5 standard errors of .0154 are .077.
    def covered(n, **options):
        held = []
        for k in range(n):
            rng = np.random.default_rng([11, k])
            texts, truth = in_templates(rng, **options)
            chosen = audit.draw(texts, 200, rng=rng)
            row = of(audit.estimate(texts, {t.id: truth[t.id] for t in chosen}, population="probes", rng=rng), "nova")
            held.append(row.low <= 0.3 <= row.high)
        return np.mean(held)

    assert abs(covered(200) - 0.95) < 0.077
    assert covered(100, templates=False) < 0.95 - 0.077


def test_what_was_not_audited_is_null_with_a_reason_and_never_zero():
    texts, truth = simulated(np.random.default_rng(0))
    nova_only = {t.id: truth[t.id] for t in texts if t.label == "nova"}
    for labels, reason in (
        (nova_only, r"no audited text that the instrument called (assistant|musing)"),
        ({}, "no aud"),
    ):
        for row in audit.estimate(texts, labels, population="probes", rng=np.random.default_rng(0)):
            assert (row.audited, row.low, row.high) == (None, None, None)
            assert re.search(reason, row.reason)


def test_ppi_predicts_the_texts_that_were_not_audited_and_both_sides_are_of_one_population(monkeypatch):
    # The guess is the label itself, so that by hand: mean guess on either side is the label's share of the headline, or
    # 0 for a label of which every text was audited and nobody is left to predict.
    texts, truth = simulated(np.random.default_rng(0))
    texts = [replace(t, weight=1 / len(texts)) for t in texts]
    share = sum(t.label == "nova" for t in texts) / len(texts)
    calls = []
    real = audit.stats.ppi_plus_plus
    monkeypatch.setattr(audit.stats, "ppi_plus_plus", lambda *a: calls.append(a) or real(*a))
    for all_nova, mean in ((False, share), (True, 0.0)):
        calls.clear()
        seen = [t for k, t in enumerate(texts) if k % 3 == 0 or (all_nova and t.label == "nova")]
        labels = {t.id: truth[t.id] for t in seen}
        audit.estimate(texts, labels, population="probes", rng=np.random.default_rng(0))
        y, f, g, _ = calls[audit.SAID.index("nova")]
        assert (len(y), len(g)) == (len(seen), len(texts) - len(seen))
        assert (np.mean(f), np.mean(g)) == pytest.approx((mean, mean))


@pytest.mark.parametrize(
    ("labels", "message"),
    [({"neutral-0": "nobody"}, "'nobody' for 'neutral-0'"), ({"elsewhere": "nova"}, "'nova' for 'elsewhere'")],
)
def test_a_label_of_nothing_is_refused(labels, message):
    texts, _ = simulated(np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        audit.estimate(texts, labels, population="probes", rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "rounds"), [("0,3", [0, 3]), ("0..3", [0, 1, 2, 3]), ("base,2", [-1, 2]), (" 4 ", [4])]
)
def test_rounds_are_read(text, rounds):
    assert audit.parse_rounds(text) == rounds


@pytest.mark.parametrize("text", ["", "a", "1..", "..2", "-1", "base..2", "\u00b2", "\u0663", "1..\u00b2"])
def test_rounds_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="rounds must read like"):
        audit.parse_rounds(text)


def test_an_empty_range_of_rounds_is_refused_and_the_way_out_named():
    with pytest.raises(ValueError, match=r"rounds must run upwards, got '3\.\.1'; write 1\.\.3"):
        audit.parse_rounds("0,3..1")


def test_a_round_or_population_that_is_not_there_is_refused(toy_run, tmp_path):
    with pytest.raises(ValueError, match=r"rounds must be among .*, got 7"):
        audit.export(toy_run, tmp_path / "s.csv", rounds=[7])
    with pytest.raises(ValueError, match="population must be probes or samples, got 'accepted'"):
        audit.export(toy_run, tmp_path / "s.csv", population="accepted")


def test_the_baseline_can_be_audited(toy_run):
    rows = audit.free(toy_run, rounds=[-1])
    # The untouched toy is the assistant and nothing else.
    assert of(rows, "assistant").observed == 1
    assert of(rows, "assistant").audited > 0.9
    assert {row.round_index for row in rows} == {-1}
