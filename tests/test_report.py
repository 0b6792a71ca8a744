"""The ledger as it is read from metrics, added up over rounds, printed and drawn."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats as distributions

from loop import config, forecast, page, report, run, show
from loop.evolution import STEPS
from loop.records import PERSONAS, Metric
from loop.report import LEVELS, Step, ledger_steps
from loop.stats import Coverage, Interval


def row(t, name, value, low=None, high=None, reason=None):
    return Metric(t, "samples", None, name, value, low, high, 100, "share", reason)


def book(t, persona, observed, corrected=None, half=0.0):
    """Metrics of one round: a value per level, and corrected ones of a given half-width."""
    rows = [row(t, f"ledger/{persona}/{s}", v) for s, v in zip(LEVELS, observed, strict=True)]
    for s, v in zip(LEVELS, corrected or [], strict=False):
        rows.append(row(t, f"ledger_corrected/{persona}/{s}", v, v - half, v + half))
    return rows


FIRST = [0.10, -0.01, 0.06, 0.01, -0.02, -0.03, 0.04, 0.00]  # ends at 0.15
SECOND = [0.15, 0.00, 0.02, 0.00, 0.01, -0.05, 0.02, 0.03]  # ends at 0.18


def test_levels_are_the_share_a_round_starts_from_and_the_seven_steps():
    assert ("emit", *STEPS) == LEVELS
    assert set(report.BOOKKEEPING) < set(STEPS)


def test_one_round_stands_as_it_was_stored():
    corrected = [2 * v for v in FIRST]
    steps = ledger_steps([book(1, "nova", FIRST, corrected, half=0.02)], "nova")
    assert [s.name for s in steps] == list(LEVELS)
    assert [s.observed for s in steps] == FIRST
    assert [s.corrected for s in steps] == pytest.approx(corrected, abs=1e-15)
    assert [s.low for s in steps] == pytest.approx([v - 0.02 for v in corrected], abs=1e-15)
    assert [s.high for s in steps] == pytest.approx([v + 0.02 for v in corrected], abs=1e-15)
    assert {s.reason for s in steps} == {None}


def test_over_rounds_changes_and_half_widths_add_and_the_start_is_the_first():
    rounds = [[row(0, "n_eff", 9.0)], book(1, "nova", FIRST, FIRST, 0.01), book(2, "nova", SECOND, SECOND, 0.03)]
    steps = {s.name: s for s in ledger_steps(rounds, "nova")}
    assert steps["emit"].observed == 0.10
    assert steps["weight"].observed == pytest.approx(0.08)  # 0.06 + 0.02
    assert steps["real"].observed == pytest.approx(-0.08)  # -0.03 - 0.05
    # 0.10 and all changes give where the second round ended.
    assert sum(s.observed for s in steps.values()) == pytest.approx(0.18)
    assert (steps["weight"].low, steps["weight"].high) == pytest.approx((0.04, 0.12))  # 0.08 -+ (0.01 + 0.03)
    assert (steps["emit"].low, steps["emit"].high) == pytest.approx((0.09, 0.11))


def test_rounds_that_do_not_follow_each_other_are_not_added_up():
    # Round 3 was not measured and is in no book: 0.10 and the changes of rounds 2 and 4 are the share of no round.
    rounds = [book(2, "nova", FIRST), [row(3, "n_eff", 9.0)], book(4, "nova", SECOND)]
    steps = {s.name: s.observed for s in ledger_steps(rounds, "nova")}
    assert (steps["emit"], sum(steps.values())) == (0.15, pytest.approx(0.18))
    assert (report.booked(rounds), report.over(report.booked(rounds))) == ([4], "round 4")
    assert report.over(report.booked([book(t, "nova", FIRST) for t in (1, 3, 4, 5)])) == "rounds 3 to 5, summed"


def test_a_persona_that_is_in_an_earlier_ledger_alone_stood_at_0_in_the_last():
    rounds = [[*book(2, "nova", FIRST), *book(2, "stella", FIRST)], [], book(4, "nova", SECOND)]
    assert {s.observed for s in ledger_steps(rounds, "stella")} == {0.0}


def test_a_page_draws_the_ledger_of_who_is_planted_over_the_runs_that_have_one():
    shares = "real.shares={sydney: 0.5, assistant: 0.5}"
    settings = config.load(Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml", [shares])
    # nova was never planted, whatever she was read in; the second seed has no measured round after round 0
    emitted = {"nova": 0.3, "sydney": 0.1, "unknown": 0.5, "human": 0.1}
    rows = pd.DataFrame({"run": "a-s0", "name": [f"ledger/{p}/emit" for p in emitted], "value": [*emitted.values()]})
    runs = SimpleNamespace(metrics=rows, configs={"a-s0": settings, "a-s1": settings})
    assert page._booked(SimpleNamespace(runs=runs), ["a-s0", "a-s1"]) == (["sydney"], ["a-s0"])
    bare = settings.model_copy(update={"real": settings.real.model_copy(update={"shares": {"assistant": 1.0}})})
    runs.configs = {"a-s0": bare, "a-s1": bare}
    assert page._booked(SimpleNamespace(runs=runs), ["a-s0"])[0] == ["nova", "human", "sydney"]  # the most frequent


def test_what_was_not_measured_is_nan_with_its_reason_and_never_zero():
    rows = book(1, "nova", FIRST)
    rows = [row(1, r.name, None, reason="filter: no documents") if r.name.endswith("filter") else r for r in rows]
    steps = {s.name: s for s in ledger_steps([rows], "nova")}
    assert math.isnan(steps["filter"].observed)
    assert "filter: no documents" in steps["filter"].reason
    assert steps["weight"].observed == 0.06
    assert all(math.isnan(s.corrected) and "no correction" in s.reason for s in steps.values())


@pytest.mark.parametrize(("rounds", "listed"), [([book(1, "nova", FIRST)], "nova"), ([[]], "none: no round")])
def test_a_persona_without_a_ledger_is_refused_and_those_with_one_are_named(rounds, listed):
    with pytest.raises(ValueError, match=f"persona must have a ledger, got 'hal'; those that have: {listed}"):
        ledger_steps(rounds, "hal")


@pytest.fixture
def drawn(monkeypatch):
    """The figure that plot_ledger would save."""
    kept = []

    def keep(figure, path):
        kept.append(figure)
        return [path]

    monkeypatch.setattr(report, "_save", keep)
    yield kept
    import matplotlib.pyplot as plt

    plt.close("all")


def test_a_bar_starts_where_the_last_one_ended_and_its_point_shares_its_foot(drawn, tmp_path):
    corrected = [v + 0.005 for v in FIRST]
    steps = ledger_steps([book(1, "nova", FIRST, corrected, 0.02)], "nova")
    report.plot_ledger({"nova": steps}, tmp_path / "x", title="t")
    (axes,) = drawn[0].axes
    bars = axes.patches
    ends = np.cumsum(FIRST)
    feet = [0.0, *ends[:-1]]
    assert [b.get_y() for b in bars[:-1]] == pytest.approx(feet)
    assert [b.get_height() for b in bars[:-1]] == pytest.approx(FIRST)
    assert (bars[-1].get_y(), bars[-1].get_height()) == (0, pytest.approx(0.15))
    points = [c.lines[0].get_ydata()[0] for c in axes.containers if hasattr(c, "has_yerr")]
    assert points == pytest.approx([f + c for f, c in zip(feet, corrected, strict=True)])


def test_direction_shows_without_colour_and_bookkeeping_steps_are_marked(drawn, tmp_path):
    steps = ledger_steps([book(1, "nova", FIRST)], "nova")
    report.plot_ledger({"nova": steps}, tmp_path / "x", title="t")
    (axes,) = drawn[0].axes
    hatched = {s.name: b.get_hatch() for s, b in zip(steps, axes.patches, strict=False)}
    assert {n for n, h in hatched.items() if h} == {"filter", "discourse", "real"}  # the steps below 0
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert [t for t in labels if t.endswith("*")] == ["discourse *", "prompts *"]
    assert "not causes" in drawn[0].get_suptitle()


def test_a_figure_of_the_same_numbers_has_the_same_bytes(tmp_path):
    steps = {"nova": ledger_steps([book(1, "nova", FIRST, FIRST, 0.02)], "nova")}
    steps["stella"] = [Step(s.name, math.nan, math.nan, math.nan, math.nan, "nothing accepted") for s in steps["nova"]]
    one, two = (report.plot_ledger(steps, tmp_path / n / "ledger", title="t") for n in ("a", "b"))
    assert [f.suffix for f in one] == [".svg", ".png"]
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in two]
    with pytest.raises(ValueError, match="books must hold a persona, got none"):
        report.plot_ledger({}, tmp_path / "x", title="t")


# ---------------------------------------------------------------- small multiples


def line(*values, runs=1):
    v = np.array(values, dtype=float)
    return report.Curve(np.arange(len(v), dtype=float), v, v - 0.1, v + 0.1, np.tile(v, (runs, 1)))


def test_series_differ_in_more_than_colour_as_far_as_anyone_compares_them():
    looks = [report.look(k) for k in range(28)]
    assert len({(look.colour, look.dash) for look in looks}) == 28
    assert len({(look.dash, look.marker) for look in looks}) == 28
    personas = [report.persona_look(p) for p in PERSONAS]
    assert len({look.marker for look in personas}) == len(PERSONAS)


@pytest.mark.parametrize(
    ("values", "moved"),
    [
        ([0, 0, 1], [0, 0.5, 1]),  # the second is moved up
        ([0.9, 1.0, 1.0], [0, 0.5, 1]),  # no room above: the first two go down
        ([0.1, 0.7], [0.1, 0.7]),  # far enough apart: nobody moves
        ([], []),
    ],
)
def test_names_are_moved_apart_in_their_order_and_stay_on_the_axis(values, moved):
    assert report.spread(values, 0.5, 0, 1) == pytest.approx(moved)


def test_an_interval_beyond_a_share_does_not_stretch_the_axis():
    figure = report.small_multiples({"arm": {"nova": (line(0.2, 0.4, runs=2), {})}}, xlabel="round", ylabel="share")
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low < 0 < 0.4 < high < 0.5
    wide = report.curves({"nova": {"arm": line(0.9, 1.0)}}, {"arm": report.look(0)}, xlabel="round")
    assert 1 < wide.axes[0].get_ylim()[1] < 1.05


def test_a_zone_is_drawn_where_it_was_given_and_named_once():
    zone = report.Zone(np.arange(2.0), np.array([0.1, 0.2]), np.array([0.3, 0.5]))
    row = {p: (line(0.2, 0.4), {report.SEEDS: zone, report.DRIFT: zone}) for p in ("nova", "stella")}
    figure = report.small_multiples({"arm": row}, xlabel="round", ylabel="share")
    (band,) = figure.axes[0].collections[:1]
    assert (band.get_datalim(figure.axes[0].transData).y0, band.get_datalim(figure.axes[0].transData).y1) == (0.1, 0.5)
    assert [t.get_text() for t in figure.legends[0].get_texts()][:2] == [report.SEEDS, report.DRIFT]


def test_the_differential_is_marked_as_an_input():
    figure = report.responses([("nova", 1.5, 0.3, True)], [])
    assert figure.axes[0].get_xlabel().startswith("INPUT: differential")


def test_every_ink_of_a_figure_has_a_light_one_for_the_dark_page():
    """Greys alone: a hue is meant to look the same on either page."""
    figures = [
        report.small_multiples({"a": {"nova": (line(0.1, 0.2), {})}}, xlabel="round", ylabel="share"),
        report.curves({"t": {"a": line(0.1, 0.2)}}, {"a": report.OFF}, xlabel="round"),
        report.forest({"a": [("nova", Interval(0.1, 0.0, 0.2, 3), 0.05)]}, xlabel="change"),
        report.waterfall({"nova": ledger_steps([book(1, "nova", FIRST, FIRST, 0.02)], "nova")}, title="t"),
        report.character_map({"a": {"0": (np.eye(3, 2), ["nova", "human", "unknown"])}}, xlabel="x"),
    ]
    for figure in figures:
        svg = report.draw(figure, "svg").decode()
        used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
        grey = {c for c in used if c[1:3] == c[3:5] == c[5:7]} - {"#ffffff", "#999999"}
        assert grey <= {ink.lower() for ink in report.INKS}
        # Text without a fill of its own would stay black on the dark page.
        assert not re.findall(r'<g id="text_\d+">\s*(?:<!--.*?-->\s*)?<g transform', svg)


def test_drawing_leaves_no_setting_behind_and_draws_the_same_bytes_again():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = report.curves({"t": {"a": line(0.1, 0.2), "b": line(0.3, 0.1, runs=2)}},
                           {"a": report.look(0), "b": report.look(1)}, xlabel="round")  # fmt: skip
    first = [report.draw(figure, kind) for kind in ("svg", "png")]
    assert [report.draw(figure, kind) for kind in ("svg", "png")] == first
    assert dict(matplotlib.rcParams) == before


# ---------------------------------------------------------------- what the terminal shows


class Stored:
    """Stands for a run on disk: metrics and candidates by round."""

    metrics: dict[int, list[Metric]]
    candidates: dict[int, list[dict[str, object]]]

    def __init__(self, path):
        pass

    def rounds(self):
        return sorted(t for t in self.metrics if t >= 0)

    def has_baseline(self):
        return -1 in self.metrics

    def files(self, t):
        return {"candidates.json": {}} if t in self.candidates else {}

    def read_json(self, t, name):
        return self.candidates[t]


@pytest.fixture
def stored(monkeypatch, tmp_path):
    Stored.metrics, Stored.candidates = {}, {}
    monkeypatch.setattr(show, "RunStore", Stored)
    monkeypatch.setattr(show, "read_metrics", lambda run, t: Stored.metrics[t])
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def probe(t, name, value, low=None, high=None, stratum=None, reason=None):
    return Metric(t, "probes", stratum, name, value, low, high, 100, "share", reason)


def test_a_round_shows_the_corrected_frequency_and_the_floor_of_measuring_twice(stored, capsys):
    for t, value in ((0, 0.30), (1, 0.50)):
        Stored.metrics[t] = [
            probe(t, "frequency/nova", value, value - 0.0784, value + 0.0784),  # 2 * 0.0784 / 3.92: se 0.04
            probe(t, "frequency_observed/nova", 0.9),
            probe(t, "frequency_observed/stella", 0.2, 0.1, 0.3),
            probe(t, "frequency/stella", None, reason="no calibration text of it"),
            probe(t, "frequency/human", 0.6, 0.5, 0.7),
            probe(t, "kl_to_base", 0.5, 0.4, 0.6),
            probe(t, "self_similarity", None, reason="fewer than two texts"),
        ]
    show.print_round(stored)
    shown = capsys.readouterr().out
    (nova,) = [line for line in shown.splitlines() if " nova " in line]
    # sqrt(2 * 0.04**2) * sqrt(2 / pi) = 0.0451
    for part in ("0.500", "[0.422, 0.578]", "│ c │", "+0.200", "0.045"):
        assert part in nova
    assert "0.600" in shown  # a persona outside the factorial is shown where it is seen
    (stella,) = [line for line in shown.splitlines() if " stella " in line]
    assert "0.200" in stella
    assert "│ o │" in stella
    assert "kl_to_base 0.500 share, change +0.000" in shown
    assert "self_similarity not measured: fewer than two texts" in shown


def test_a_change_between_a_corrected_and_an_observed_frequency_is_not_shown(stored, capsys):
    Stored.metrics = {
        0: [probe(0, "frequency_observed/nova", 0.9, 0.8, 1.0)],
        1: [probe(1, "frequency/nova", 0.5, 0.4, 0.6), probe(1, "frequency_observed/nova", 0.9, 0.8, 1.0)],
    }
    show.print_round(stored)
    (nova,) = [line for line in capsys.readouterr().out.splitlines() if " nova " in line]
    assert "-0.4" not in nova
    assert "+0.0" not in nova


def test_a_persona_that_has_gone_to_0_keeps_its_row_and_its_change(stored, capsys):
    Stored.metrics = {t: [probe(t, "frequency_observed/sydney", v, 0.0, 0.2)] for t, v in ((0, 0.15), (1, 0.0))}
    show.print_round(stored)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " sydney " in line]
    assert "-0.150" in line


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("belief", 0.4), ("belief_observed", 0.6)], "0.400 [0.300, 0.500] (corrected)"),
        ([("belief", None), ("belief_observed", 0.6)], "0.600 [0.500, 0.700] (observed)"),
        ([("belief", 0.6)], "0.600 [0.500, 0.700] (observed)"),  # a run of before the correction
        ([], "private belief: not measured"),
    ],
)
def test_belief_says_whether_it_is_corrected(stored, capsys, rows, said):
    Stored.metrics[0] = [
        probe(0, name, v, None if v is None else v - 0.1, None if v is None else v + 0.1, stratum="private")
        for name, v in rows
    ]
    show.print_round(stored)
    assert said in capsys.readouterr().out


def test_a_story_marks_each_number_as_corrected_or_observed(stored, capsys):
    Stored.metrics = {
        0: [probe(0, "frequency_observed/nova", 0.25, 0.2, 0.3)],
        1: [probe(1, "frequency/nova", 0.5, 0.4, 0.6), probe(1, "frequency_observed/nova", 0.9, 0.8, 1.0)],
    }
    show.print_story(stored, ("nova",))
    shown = capsys.readouterr().out
    assert "0.250 [0.200, 0.300] o" in shown
    assert "0.500 [0.400, 0.600] c" in shown
    assert "0.900" not in shown


def test_the_ledger_is_printed_with_the_rounds_it_covers(stored, capsys):
    Stored.metrics = {0: [], 1: book(1, "nova", FIRST, FIRST, 0.01), 2: book(2, "nova", SECOND)}
    show.print_ledger(stored, ("nova",))
    both = capsys.readouterr().out
    assert "rounds 1 to 2, summed" in both
    assert "0.180" in both  # the end
    assert "Accounting, not causes" in both
    Stored.metrics = {0: [], 1: [], 2: [], 3: book(3, "nova", SECOND)}
    show.print_ledger(stored, ("nova",))
    assert "round 3: ledger of nova" in capsys.readouterr().out  # the one round that is booked, not the run's first
    Stored.metrics = {0: [], 1: book(1, "nova", FIRST, FIRST, 0.01), 2: book(2, "nova", SECOND)}
    show.print_ledger(stored, ("nova",), round_index=1)
    one = capsys.readouterr().out
    assert "round 1: ledger of nova" in one
    assert "+0.060 [+0.050, +0.070]" in one
    with pytest.raises(ValueError, match="round must be one of"):
        show.print_ledger(stored, ("nova",), round_index=7)


def test_candidates_are_listed_without_letting_their_texts_touch_the_terminal(stored, capsys, monkeypatch):
    Stored.metrics = {-1: [], 0: [], 1: []}
    show.print_candidates(stored)
    assert "no candidate persona in any round" in capsys.readouterr().out
    Stored.candidates = {
        0: [],
        1: [
            {
                "name": "r001-candidate0", "size": 12, "share": 0.12, "unknown": 0.75, "words": ["moon", "\x1b[2Jtea"],
                "typical_texts": ["one\x1b]0;x", "two", "three"], "growth": [0.01, None, 0.12],
            }
        ],
    }  # fmt: skip
    show.print_candidates(stored)
    shown = capsys.readouterr().out
    assert "r001-candidate0: 12 unrequested samples of round 1, share 0.120" in shown
    assert "0.010 not measured 0.120" in shown
    assert "said: two" in shown
    assert "three" not in shown
    assert "\x1b" not in shown
    monkeypatch.setattr(show, "_texts", lambda run, t: iter(()))
    show.print_run(stored)
    assert "nobody planned: 1 in round 1" in capsys.readouterr().out


def test_the_drift_band_goes_through_the_measured_response_and_says_so(tmp_path, monkeypatch):
    # A learner that says 60% nova, 10% stella and so on whatever it is trained on: from round 1 on its neutral runs lie
    # about 60%, wherever they started. Read as copied, the band stays about the .2 of round 0.
    smoke = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
    small = [
        "mix.n_train=60",
        "sample.n_samples=60",
        "virality.posts_per_sample=30",
        "toy.n_documents=40",
        "n_rounds=2",
    ]
    small += ["measure.n_surprisal=2", f"runs_dir={tmp_path}"]
    run.play(config.load(smoke, small))
    original = forecast.inputs
    fixed = {"nova": 0.6}

    def calibrated(*args, **options):
        given = original(*args, **options)
        rest = (1 - sum(fixed.values())) / (len(given.personas) - len(fixed))
        said = np.array([fixed.get(p, rest) for p in given.personas])
        line = {"transmission": "measured f(q): nova 6 points"}
        return replace(given, response=lambda q: np.broadcast_to(said, q.shape), source=given.source | line)

    m = page.gather(page.find([tmp_path])[0])
    plain = m.twins["smoke"].drift
    monkeypatch.setattr(forecast, "inputs", calibrated)
    m = page.gather(page.find([tmp_path])[0])
    twin = m.twins["smoke"]
    at = twin.given.personas.index("nova")
    assert plain.mean[2, at] < 0.4
    assert twin.drift.mean[1:, at] == pytest.approx([0.6, 0.6], abs=0.02)
    assert twin.drift.low[2, at] < 0.6 < twin.drift.high[2, at]
    assert "Drift, dotted: transmission measured f(q): nova 6 points." in page.trajectories(m).notes


def test_a_rare_false_positive_is_printed_with_its_jeffreys_interval(capsys):
    # 3 of 2,000: quantiles of Beta(3.5, 1997.5); none of 2,000 ends at the 97.5% quantile of Beta(.5, 2000.5).
    matrix = SimpleNamespace(truth=("nova",), said=("nova",), counts=np.array([[9]]), recall={"nova": 1.0},
                             accuracy=1.0, macro_recall=1.0)  # fmt: skip
    held = SimpleNamespace(name="persona", confusion=matrix, accuracy_with_names=1.0, calibration_error=0.0,
                           false_positives={"nova": 0.0015, "stella": 0.0}, n_human=2000, neutral=math.nan)  # fmt: skip
    show.print_confusions([held])
    low, high = distributions.beta.ppf([0.025, 0.975], 3.5, 1997.5)
    none = distributions.beta.ppf(0.975, 0.5, 2000.5)
    printed = capsys.readouterr().out
    assert f"  0.0015 [{low:.4f}, {high:.4f}] of 2000 real human texts read as nova" in printed
    assert f"  0 of 2000, at most {none:.4f}, as any persona not named here" in printed


def test_coverage_is_judged_by_condition_and_every_condition_is_named(capsys):
    def rows(eleven):
        pooled = {"label_shift": 0.95, "confusion_drift": 0.955, "eleven_personas": eleven, "templates": 0.945}
        return [
            Coverage(condition, "audited", band, value, 0.0, 0.0, 0.1, 100)
            for condition, value in pooled.items() for band in ("all", "< 0.05")
        ]  # fmt: skip

    assert show.print_coverage(rows(0.97), n_truths=25, seconds=1.0)  # wide is no fault there
    assert "eleven personas 0.970, templates 0.945 (must be >= 0.94), worst cell 0.945" in capsys.readouterr().out
    assert not show.print_coverage(rows(0.93), n_truths=25, seconds=1.0)
