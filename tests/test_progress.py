"""The terminal. Time left of a run: sums by hand, nothing before there is anything to sum, and nothing of it in a run's
bytes; and what stands in its tables.
"""

import re
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from loop import config, run, show
from loop.records import PERSONAS, Metric
from loop.store import RunStore

ROOT = Path(__file__).resolve().parent.parent


def play(clock, round_index, seconds):
    for stage, s in seconds.items():
        clock.tell("stage", round_index=round_index, stage=stage)
        yield clock.seconds()
        clock.tell("done", round_index=round_index, stage=stage, seconds=s, cached=False)


def test_time_left_is_what_each_stage_took_last_for_the_stages_and_rounds_left():
    clock = show.Clock()
    clock.tell("plan", rounds=4)
    assert list(play(clock, -1, {"probe": 3.0})) == [None]  # the baseline is no round
    assert list(play(clock, 0, {"mix": 1.0, "train": 10.0, "measure": 4.0})) == [None] * 3
    # 15 s a round and two rounds to come after this one: 45 = 15 + 2 * 15; then 44; then 20 s of training make it
    # 4 + 2 * (1 + 20 + 4) = 54.
    assert list(play(clock, 1, {"mix": 1.0, "train": 20.0, "measure": 4.0})) == [45.0, 44.0, 54.0]
    assert next(play(clock, 2, {"mix": 1.0})) == 50.0  # 25 + 25
    assert clock.left() == "about 50 s left"
    assert next(play(clock, 3, {"mix": 1.0})) == 25.0


def test_a_run_says_how_many_rounds_it_will_play_now(tmp_path):
    small = ["mix.n_train=20", "sample.n_samples=20", "virality.posts_per_sample=20", "toy.n_documents=20"]
    settings = config.load(ROOT / "configs" / "smoke.yaml", [*small, "measure.every=0", f"runs_dir={tmp_path}"])
    plans = []

    def report(kind, **fields):
        if kind == "plan":
            plans.append(fields["rounds"])

    run.play(settings, rounds=1, report=report)  # rounds 0 and 1
    run.play(settings, report=report)  # round 2 of 2
    run.play(settings, report=report)  # all are played: nothing is planned
    assert plans == [2, 1]


def test_an_own_persona_has_its_line_in_the_table_of_a_round():
    names = ("frequency_observed/pirate", "frequency_observed/nova", "belief")
    rows = {("probes", name): Metric(0, "probes", None, name, 0.1, None, None, 9, "share") for name in names}
    assert show._named(rows) == (*PERSONAS, "pirate", "unknown")


def test_texts_are_shown_as_the_headline_instrument_reads_them(tmp_path, capsys, monkeypatch):
    small = ["mix.n_train=20", "sample.n_samples=20", "virality.posts_per_sample=20", "toy.n_documents=20"]
    run_dir = run.play(config.load(ROOT / "configs" / "smoke.yaml", [*small, "n_rounds=0", f"runs_dir={tmp_path}"]))
    frame = RunStore(run_dir).read_table(0, "labels.parquet").to_pandas()
    mine = frame[(frame["instrument"] == "persona") & (frame["population"] == "samples")]
    read_table = RunStore.read_table

    def with_second(self, t, name):  # the toy has no second instrument; a language model's run has one
        table = read_table(self, t, name)
        if name != "labels.parquet":
            return table
        other = mine.assign(instrument="second", persona="sydney")
        return pa.concat_tables([table, pa.Table.from_pandas(other, schema=table.schema, preserve_index=False)])

    monkeypatch.setattr(RunStore, "read_table", with_second)
    show.print_run(run_dir, texts=20)
    said = re.findall(r"^(\S+) \S+ read as (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert dict(said) == dict(zip(mine["id"], mine["persona"], strict=True))
    assert len(said) == 20


def test_belief_that_is_not_corrected_is_shown_as_it_was_read(tmp_path, monkeypatch, capsys):
    def belief(name, value, reason=None):
        return Metric(0, "probes", "private", name, value, None, None, 8, "share", reason=reason)

    rows = [belief("belief", None, "no text of known persona"), belief("belief_observed", 0.625)]
    monkeypatch.setattr(show, "read_metrics", lambda run_dir, t: rows)
    Console().print(show._trajectory(tmp_path, [0]))
    assert capsys.readouterr().out.count("0.625o") == 2  # base and round 0
