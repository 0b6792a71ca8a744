"""The page of a run: what it shows, what it says is missing; in a real Chromium, what untrusted text can do to it."""

import base64
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

import browser
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from browser import Browser

import loop
from loop import config, page, report, run
from loop.records import LABELS, PERSONAS, SCHEMAS, Sample, to_table
from loop.store import RunStore

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
SMALL = [
    "real.shares={nova: 0.3, promoter: 0.3, stella: 0.3, chat: 0.1}",
    "mix.n_train=60",
    "sample.n_samples=60",
    "virality.posts_per_sample=30",
    "toy.n_documents=40",
    "measure.strata=[blank, neutral, implicit_0, implicit_3, private]",
    "measure.mixture={blank: 0.5, neutral: 0.5}",
    "measure.n_surprisal=2",
]
ARMS = {
    "full": ["virality.strength=3"],
    "neutral": ["virality.audience=null"],
    "real_only": ["virality.audience=null", "mix.real_share=1.0"],
    "talk": ["channels.talk_data=true", "discourse.share=0.2"],
}
KEYS = [part.key for part in page.PARTS]

needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="chromium is not installed; apt-get install chromium"
)


def play(folder, name, seed, *more):
    settings = config.load(SMOKE, [*SMALL, f"name={name}", f"seed={seed}", f"runs_dir={folder}", *more])
    return run.play(settings)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two seeds of an arm and its controls, and one run that talks about its outputs."""
    folder = tmp_path_factory.mktemp("page") / "arms"
    for name, more in ARMS.items():
        for seed in (0, 1) if name in ("full", "neutral") else (0,):
            play(folder, name, seed, *more)
    return folder


@pytest.fixture(scope="module")
def written(sweep):
    """The page of that sweep."""
    (out,) = page.write([sweep], control="neutral")
    return out


@pytest.fixture(scope="module")
def alone(sweep):
    """The page of one run of it, and its figures."""
    return page.write([sweep / "full-s0"], out=sweep.parent / "one.html", figures=sweep.parent / "one")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    its = Browser(tmp_path_factory.mktemp("profile"))
    yield its
    its.close()


def opened(chromium, path, fragment=""):
    chromium.open("about:blank")
    chromium.said.clear()
    chromium.requests.clear()
    chromium.open(path.as_uri() + fragment)
    return chromium


def outside(chromium):
    """What a page asked for beyond itself; data: is in the page."""
    return [url for url in chromium.requests[1:] if not url.startswith("data:")]


def part(text, key):
    return text[text.index(f'<section id="{key}">') :].partition("</section>")[0]


# What is on it ------------------------------------------------------------------------------------------------------


def test_every_part_of_a_whole_sweep_shows_a_figure(written):
    text = written.read_text()
    without = [key for key in KEYS if "<img" not in part(text, key)]
    assert without == ["candidates"]  # the toy names its personas itself: nothing is unknown to it
    assert "nothing is unknown to it" in part(text, "candidates")


def test_each_figure_of_the_page_lies_beside_it_as_png_and_svg(alone):
    text = alone[0].read_text()
    stems = {f.stem for f in alone[1:]}
    assert {"trajectories", "ledger-full", "cascades", "health", "theory-measured"} <= stems
    assert sorted(f.name for f in alone[1:]) == sorted(f"{s}.{kind}" for s in stems for kind in ("svg", "png"))
    assert text.count('<figure id="figure-') == len(stems)
    assert all(f'id="figure-{stem}"' in text for stem in stems)
    assert all(f.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for f in alone[1:] if f.suffix == ".png")


def test_the_same_run_gives_the_same_page_wherever_it_is_written(sweep, alone, tmp_path):
    (again,) = page.write([sweep / "full-s0"], out=tmp_path / "x.html")
    assert again.read_bytes() == alone[0].read_bytes()


def test_the_policy_names_the_script_and_the_style_by_hash_and_allows_nothing_else(written):
    text = written.read_text()
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    script = text[text.rindex("<script>") + 8 : text.rindex("</script>")]
    policy = text.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    rules = dict(rule.split(" ", 1) for rule in policy.replace("&#39;", "'").split("; "))
    for name, inner in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert rules.pop(name) == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


def test_the_band_of_selection_off_seeds_is_where_one_more_run_would_lie():
    rows = [("neutral-s0", 0.1), ("neutral-s1", 0.2), ("neutral-s2", 0.3)]
    columns = ["run", "round_index", "population", "stratum", "name", "value"]
    metrics = pd.DataFrame([(r, 1, "probes", None, "frequency/nova", v) for r, v in rows], columns=columns)
    runs = page.Runs({}, {}, pd.DataFrame(), metrics, ())
    material = page.Material(runs, "frequency", "", {}, [], "", [], [r for r, _ in rows])
    zone = page._null(material, "nova")[report.SEEDS]
    # mean .2, sd .1, t(2) at 97.5% = 4.302653; one more run: sd * sqrt(1 + 1/3), cut to a share.
    half = 4.302653 * 0.1 * math.sqrt(4 / 3)
    assert (zone.low[0], zone.high[0]) == (0, pytest.approx(0.2 + half, abs=1e-6))
    del material.null[1:]
    assert page._null(material, "nova") == {}


def test_the_map_finds_the_plane_that_points_were_put_in_and_fixes_its_signs():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0][:2]
    flat = rng.normal(size=(40, 2)) * [3.0, 1.0]
    flat -= flat.mean(axis=0)
    places, share = page.project(flat @ axes + 7)
    assert share == pytest.approx(1)
    # Distances in the plane are distances between the points, whatever way the axes were turned.
    assert np.linalg.norm(places[:, None] - places, axis=-1) == pytest.approx(
        np.linalg.norm(flat[:, None] - flat, axis=-1), abs=1e-3
    )
    turned, _ = page.project(-(flat @ axes))
    assert np.abs(turned) == pytest.approx(np.abs(places), abs=2e-4)
    same, share = page.project(np.ones((3, 4)))
    assert not same.any()
    assert math.isnan(share)


def test_json_in_a_script_element_cannot_end_it_and_reads_back_as_it_was():
    nasty = {"a": "</script><!--<script>&amp;\u2028\u202e\ud800", "b": [None, 1.5]}
    text = page.as_json(nasty)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == nasty


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_bytes(b"old")

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr(page.os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        page._replace(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert target.read_bytes() == b"old"


# What is missing ----------------------------------------------------------------------------------------------------


def test_one_run_alone_says_which_controls_are_missing_and_how_to_get_them(alone):
    text = alone[0].read_text()
    assert "virality.audience=null" in part(text, "contrasts")
    assert "Missing: the band of selection-off seeds" in part(text, "trajectories")
    assert "mix.real_share=1" in part(text, "health")
    assert "<img" in part(text, "trajectories")
    assert "<img" in part(text, "theory")


def test_an_unfinished_run_says_what_is_not_played(tmp_path):
    run_dir = play(tmp_path, "short", 0, "n_rounds=0")
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("n_rounds: 0", "n_rounds: 3"))
    made = page.gather(page.find([run_dir])[0])
    assert made.runs.missing == ("short-s0: rounds 1..3 of 3 are not played yet",)
    for make, said in (
        (page.theory, "run must hold a feedback round to be scored"),
        (page.ledger, "needs a measured round after round 0"),
        (page.response, "play a feedback round"),
        (page.contrasts, "no selection-off runs here"),
    ):
        with pytest.raises(page.Missing, match=said):
            make(made)
    assert page.trajectories(made).plates  # round 0 is there, and shown


def test_a_run_without_a_finished_round_has_a_page_that_says_so(tmp_path):
    settings = config.load(SMOKE, [*SMALL, f"runs_dir={tmp_path}"])
    RunStore(tmp_path / "smoke-s0").create(config.to_yaml(settings), {}).close()
    (out,) = page.write([tmp_path / "smoke-s0"])
    text = out.read_text()
    assert "smoke-s0: no round is finished" in text
    assert "<img" not in text
    assert all("Missing:" in part(text, key) for key in [*KEYS, "texts"])


def test_two_sides_of_the_name_swap_are_one_control_and_other_selection_off_arms_must_be_told_apart(sweep, monkeypatch):
    monkeypatch.setattr(page, "_twin", lambda m, arm: "not asked here")
    runs, plain = loop.load(sweep), loop.load(sweep).configs

    def turned(**changes):
        other = {r: plain[f"neutral-s{c.seed}"].model_copy(update={"name": "full"} | changes) if c.name == "full" else c
                 for r, c in plain.items()}  # fmt: skip
        object.__setattr__(runs, "configs", other)
        return runs

    neutral = ["neutral-s0", "neutral-s1"]
    swapped = page.gather(turned(real=plain["full-s0"].real.model_copy(update={"name_swap": True})))
    assert (swapped.off, swapped.null) == (["full-s0", "full-s1", *neutral], ["full-s0", "full-s1"])
    turned(n_rounds=2, mix=plain["full-s0"].mix.model_copy(update={"n_train": 61}))
    assert "several selection-off arms (full, neutral); name one with --control" in page.gather(runs).no_off
    assert page.gather(runs, control="neutral").off == neutral
    with pytest.raises(ValueError, match="--control must be one of full, neutral, real_only, talk, got 'nul'"):
        page.gather(runs, control="nul")


def test_a_sweep_file_brings_its_question_and_names_the_cells_that_are_not_played(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(
        f"question: Does <b>this</b> help?\nbase: {SMOKE}\nseeds: [0, 1]\nruns_dir: {tmp_path}/cells\n"
        f"overrides: {{{', '.join(s.replace('=', ': ', 1) for s in SMALL)}}}\n"
        'arms: {off: {virality.audience: "null"}, on: {virality.strength: 3.0}}\n'
    )
    with pytest.raises(
        ValueError, match=r"sweep must have a run, got none in .*cells; `loop sweep .*small.yaml` first"
    ):
        page.find([file])
    play(tmp_path / "cells", "on", 1, "virality.strength=3.0")
    runs, title, lines = page.find([file])
    assert (title, list(runs.paths)) == ("small", ["on-s1"])
    assert lines[0] == "Does <b>this</b> help?"
    assert "not played yet: off, seed 0; off, seed 1; on, seed 0" in lines[-1]


@pytest.mark.parametrize(
    ("spoil", "said", "code"),
    [
        (lambda at: at.joinpath("manifest.json").unlink(), "run must be a directory with a manifest.json", 2),
        (
            lambda at: at.joinpath("manifest.json").write_text(
                json.dumps(json.loads(at.joinpath("manifest.json").read_text()) | {"schema_version": 99})
            ),
            "run must be of schema version",
            2,
        ),
        (lambda at: at.joinpath("round_001/metrics.jsonl").write_text("{}\n"), "metrics.jsonl", 3),
    ],
    ids=["no run", "another schema version", "a changed file"],
)
def test_what_cannot_be_read_is_refused_in_one_line_with_its_exit_code(tmp_path, spoil, said, code):
    play(tmp_path, "bad", 0, "n_rounds=1")
    spoil(tmp_path / "bad-s0")
    done = subprocess.run(
        [sys.executable, "-m", "loop", "report", str(tmp_path / "bad-s0")], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad-s0.html").exists()


# In a browser -------------------------------------------------------------------------------------------------------


@needs_chromium
def test_the_page_renders_every_figure_without_an_error_a_message_or_a_request(chromium, written):
    opened(chromium, written)
    shown = chromium.evaluate("[...document.images].map(i => [i.alt.length, i.naturalWidth, i.complete])")
    assert len(shown) == written.read_text().count("<img ")
    assert all(alt > 20 and width > 100 and done for alt, width, done in shown)
    assert chromium.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == [*KEYS, "texts"]
    assert (chromium.said, outside(chromium)) == ([], [])


def count(chromium):
    return chromium.evaluate("document.getElementById('count').textContent")


@needs_chromium
def test_filters_show_the_texts_that_the_files_hold(chromium, sweep, written):
    runs = loop.load(sweep)
    samples, probes = runs.samples, runs.probes
    talk = runs.mixture[runs.mixture["parent_ids"].map(len) > 0]
    total = len(samples) + len(probes) + len(talk)
    assert total <= page.N_TEXTS, "the small sweep fits, so that counts are those of the files"
    heavy = samples["weight"] >= 1.2
    for chosen, expected in (
        ({}, total),
        ({"round": "1", "persona": "nova"}, sum(((f["round_index"] == 1) & (f["persona"] == "nova")).sum()
                                                for f in (samples, probes))),
        ({"kind": "probes", "stratum": "private", "round": "-1"}, ((probes["stratum"] == "private")
                                                                  & (probes["round_index"] == -1)).sum()),
        ({"from": "1.2"}, heavy.sum() + (talk["weight"] >= 1.2).sum()),
        ({"kind": "samples", "from": "0.5", "to": "1.2"}, samples["weight"].round(4).between(0.5, 1.2).sum()),
        ({"words": "zzz no such text"}, 0),
    ):  # fmt: skip
        opened(chromium, written, f"#texts?{urlencode(chosen)}" if chosen else "#texts")
        assert count(chromium) == f"{expected} of {total} texts", chosen
        n = chromium.evaluate("document.querySelectorAll('#list > li').length")
        assert n == min(20, expected)
    assert (chromium.said, outside(chromium)) == ([], [])


@needs_chromium
def test_a_choice_by_hand_is_kept_in_the_address_and_reset_clears_it(chromium, sweep, written):
    opened(chromium, written)
    chromium.evaluate(
        "{const f = document.getElementById('filters'); f.elements.order.value = 'heavy';"
        "f.elements.kind.value = 'samples'; f.elements.order.dispatchEvent(new Event('input', {bubbles: true})); 1}"
    )
    heaviest = loop.load(sweep).samples["weight"].max()
    first = chromium.evaluate("document.querySelector('#list > li .head').textContent")
    assert f"weight {heaviest:.3f}" in first
    assert chromium.evaluate("location.hash") == "#texts?kind=samples&order=heavy"
    before = chromium.evaluate("document.querySelectorAll('#list > li').length")
    chromium.evaluate("document.getElementById('more').click()")
    assert chromium.evaluate("document.querySelectorAll('#list > li').length") == before + 20
    chromium.evaluate("document.querySelector('#filters button').click(); new Promise(r => setTimeout(r, 50))")
    assert chromium.evaluate("location.hash") == "#texts"
    assert count(chromium).startswith(count(chromium).split()[2])


@needs_chromium
def test_a_document_about_texts_shows_its_parents_and_a_text_where_it_went(chromium, sweep, written):
    runs = loop.load(sweep)
    talk = runs.mixture[runs.mixture["parent_ids"].map(len) > 0].iloc[0]
    opened(
        chromium, written, f"#texts?{urlencode({'kind': 'documents about texts', 'words': talk['completion'][:40]})}"
    )
    shown = chromium.evaluate(f"document.querySelector('[data-id=\"{talk['id']}\"] details').textContent")
    samples = runs.samples[runs.samples["run"] == talk["run"]].set_index("id")["completion"]
    for parent in talk["parent_ids"]:
        assert parent in shown
        assert samples[parent] in shown
    trained = runs.mixture[(runs.mixture["source"] == "synthetic") & (runs.mixture["run"] == "full-s0")].iloc[0]
    opened(chromium, written, f"#texts?{urlencode({'run': 0, 'kind': 'samples', 'round': 0, 'order': 'heavy'})}")
    chromium.evaluate("while (!document.getElementById('more').hidden) document.getElementById('more').click()")
    shown = chromium.evaluate(f"document.querySelector('[data-id=\"{trained['id']}\"] .kin').textContent")
    assert shown.startswith(f"trained on in round {trained['round_index']}, {trained['copies']} \u00d7 at weight")


HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "<!--<script>document.title='owned'//-->",
    "<svg onload=document.title='owned'></svg>",
    "<a href=\"javascript:document.title='owned'\">x</a>",
    "<style>body{background:url(http://127.0.0.1:9/x)}</style><link rel=stylesheet href=http://127.0.0.1:9/y>",
    "{{ 7 * 7 }}{% raw %}${7*7}",
    "\u202egnp.exe \x00\x1b]0;owned\x07",
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run as a language model would leave it, whose every text attacks its reader; and its page."""
    folder = tmp_path_factory.mktemp("hostile")
    settings = config.load(
        ROOT / "configs" / "round.yaml",
        [f"runs_dir={folder}", "n_rounds=1", "measure.strata=[blank, private]", "measure.mixture={blank: 1}"],
    )
    with RunStore(folder / "round-s0").create(config.to_yaml(settings), {}) as store:
        for t in (0, 1):
            with store.round(t) as r:
                for name in ("probes", "samples"):
                    rows = [
                        Sample(f"r{t:03d}-{name[0]}{k:06d}", "blank", f"t{k}", (text,), text, 9, -9.0, True, None, None,
                               t, "synthetic") for k, text in enumerate(HOSTILE)
                    ]  # fmt: skip
                    r.write_table(f"{name}.parquet", to_table(rows, SCHEMAS[name]))
                ids = [f"r{t:03d}-{kind}{k:06d}" for kind in "ps" for k in range(len(HOSTILE))]
                labels = [
                    {"id": i, "population": "probes" if "-p" in i else "samples", "instrument": "persona",
                     "persona": PERSONAS[k % 3], "p_nova": 0.5} for k, i in enumerate(ids)
                ]  # fmt: skip
                r.write_table("labels.parquet", table(labels, LABELS))
                mine = [i for i in ids if "-s" in i]
                r.write_table("rejected.parquet", table([{"id": mine[0], "reasons": HOSTILE[:1]}], SCHEMAS["rejected"]))
                exposure = [
                    {"id": i, "appeal": 0.1, "rate": 0.1, "cascades": 1.5, "reach": 4.0, "weight": 1.0} for i in mine
                ]
                r.write_table("exposure.parquet", table(exposure[1:], SCHEMAS["exposure"]))
                talk = {"id": f"r{t:03d}-d000000", "source": "discourse", "prompt": None, "completion": HOSTILE[1],
                        "weight": 1.0, "copies": 1, "n_trained_tokens": 9, "parent_ids": [mine[1]]}  # fmt: skip
                r.write_table("mixture.parquet", table([talk], SCHEMAS["mixture"]))
                r.write_jsonl("metrics.jsonl", [
                    {"round_index": t, "population": "probes", "stratum": None, "name": f"frequency_observed/{p}",
                     "value": 0.3, "low": 0.1, "high": 0.5, "n": 8, "unit": "share", "reason": None}
                    for p in PERSONAS[:3]
                ])  # fmt: skip
                r.write_json("candidates.json", [{
                    "name": f"r{t:03d}-candidate0", "size": 8, "share": 0.5, "unknown": 0.9, "words": list(HOSTILE),
                    "typical_ids": mine, "typical_texts": list(HOSTILE), "growth": [0.5],
                }])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_embeddings", lambda texts: np.arange(3.0 * len(texts)).reshape(-1, 3) % 7)
        (out,) = page.write([folder / "round-s0"])
    return out


def table(rows, schema):
    return pa.Table.from_pylist(rows, schema=schema)


def probe(chromium, path):
    """Shows every text, waits for what might be loaded, and returns the title a script of theirs would have set."""
    opened(chromium, path, "#texts")
    chromium.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    chromium.evaluate(
        "while (document.getElementById('more')?.hidden === false) document.getElementById('more').click()"
    )
    chromium.evaluate("new Promise(r => setTimeout(r, 100))")
    return chromium.evaluate("document.title")


@needs_chromium
def test_text_of_a_model_is_shown_and_never_acts(chromium, hostile):
    assert probe(chromium, hostile) == "round-s0 \u2013 persona-loop"
    assert chromium.evaluate("document.querySelectorAll('main svg, main a[href^=javascript], main style').length") == 0
    shown = chromium.evaluate("[...document.querySelectorAll('#list .text')].map(p => p.textContent)")
    assert set(shown) == set(HOSTILE)
    quoted = chromium.evaluate("[...document.querySelectorAll('.candidate bdi')].map(p => p.textContent)")
    assert set(quoted) == set(HOSTILE[:5])
    assert (chromium.said, outside(chromium)) == ([], [])


@needs_chromium
def test_the_probe_sees_text_that_acts_where_escaping_or_the_policy_is_gone(chromium, hostile, tmp_path):
    text = hostile.read_text()
    loose = tmp_path / "loose.html"
    loose.write_text(text.replace("\\u003c", "<").replace("\\u003e", ">").replace("Content-Security-Policy", "X-None"))
    opened(chromium, loose)
    assert chromium.evaluate("document.title") == "owned"
    # With the policy the same page is broken, not owned.
    strict = tmp_path / "strict.html"
    strict.write_text(text.replace("\\u003c", "<").replace("\\u003e", ">"))
    opened(chromium, strict)
    assert chromium.evaluate("document.title") != "owned"
    assert any("Content Security Policy" in line for line in chromium.said)
