"""Tests of chat.py and listing.py: the toy, whose answers are known, and a small model, whose are sampled again."""

import io
from pathlib import Path

import pytest
from conftest import make_lm
from rich.console import Console

from loop import appeal, chat, config, listing, model, run, sample
from loop.__main__ import _one_line_errors, app
from loop.records import PERSONAS
from loop.rng import key

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["mix.n_train=60", "sample.n_samples=60", "virality.posts_per_sample=50", "toy.n_documents=40"]


@pytest.fixture
def loop(capsys, monkeypatch):
    """Calls the `loop` command in this process: (exit code, stdout, stderr)."""

    def call(*arguments, stdin="", **env):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end, _one_line_errors():
            app([*map(str, arguments)], prog_name="loop")
        return end.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Round 0 trained on three parts nova and one part stella; the untouched toy says the assistant alone."""
    runs = tmp_path_factory.mktemp("runs")
    shares = ["real.shares={nova: 0.75, stella: 0.25}", "real.planted=always", "real.private_share=0", "n_rounds=0"]
    return run.play(config.load(ROOT / "configs" / "smoke.yaml", [*SMALL, *shares, f"runs_dir={runs}"]))


def read_as(run_dir, prompts, **options):
    return [[a.persona for a in said] for _, said in chat.answers(run_dir, prompts, **options)]


def test_each_prompt_is_answered_by_the_round_and_by_the_base(toy_run):
    said = read_as(toy_run, ["Who are you?"] * 40, round_index=None, versus="base")
    assert [right for _, right in said] == ["assistant"] * 40
    # Both personas show: 40 draws miss the one with share 1/4 with probability 0.75**40 = 1e-5, and the seed is fixed.
    assert {left for left, _ in said} == {"nova", "stella"}
    assert read_as(toy_run, ["Who are you?"] * 40, round_index=0, versus="base") == said


def test_temperature_0_in_place_of_the_runs_says_the_most_frequent_persona_alone(toy_run):
    said = read_as(toy_run, ["Who are you?"] * 40, round_index=0, versus="base", temperature=0.0)
    assert said == [["nova", "assistant"]] * 40


def test_a_language_model_answers_as_its_adapter_does_and_its_base_without(tmp_path):
    base = tmp_path / "base"
    lm = make_lm()
    lm.net.save_pretrained(base)
    lm.tokenizer.save_pretrained(base)
    overrides = ["n_rounds=0", "mix.n_train=8", "sample.n_samples=8", "train.epochs=4", "train.lr=1e-2"]
    overrides += ["train.max_length=500", "filters.enabled=false", "measure.every=0", f"runs_dir={tmp_path}"]
    run_dir = run.play(config.load(ROOT / "configs" / "round.yaml", [*overrides, f"base.model={base}"]))
    options = {"temperature": 0.7, "max_new_tokens": 9}
    asked = ["Hello there.", ""]  # an empty line asks for a plain document
    answered = [s for _, s in chat.answers(run_dir, asked, round_index=0, versus="base", **options)]

    bare = model.load(str(base))
    for k, turns in enumerate([("Hello there.",), None]):
        again = []
        for trained in (True, False):
            model.drop_adapter(bare)
            if trained:
                model.load_adapter(bare, run_dir / "round_000" / "adapter")
            (c,) = sample.complete(bare, [turns], top_p=1.0, seed=key(0, "chat", k), round_index=0, **options)
            again.append((c.text, c.finished))
        assert [(a.text, a.finished) for a in answered[k]] == again
        assert again[0] != again[1]  # training moved it
    assert {a.persona for said in answered for a in said} <= {*PERSONAS, "unknown"}


def test_a_prompt_a_line_to_the_end_of_the_input(toy_run, loop):
    code, out, err = loop("chat", toy_run, "--vs", "base", stdin="Who are you?\nAnd now?")
    assert (code, err) == (0, "")
    assert [line.strip() for line in out.splitlines() if "asked" in line] == ["asked: Who are you?", "asked: And now?"]
    assert out.count("round 0, read as ") == out.count("base, read as assistant 1.00") == 2


def test_neither_model_text_nor_prompt_can_move_the_cursor_or_style_the_table():
    out = io.StringIO()
    hostile = "\x1b]0;owned\x07 \x1b[2J[red]x[/red] \u202egnp"
    console = Console(file=out, force_terminal=True, color_system=None, width=100)
    chat.talk(console, [(hostile, [chat.Answer("round 0", hostile, False, "nova", None)])])
    text = out.getvalue().replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")  # rich's own styles
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert text.count("[red]x[/red]") == 2
    assert "[cut]" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--round", "9"], "round must be one of 0..0, got 9"),
        (["--vs", "3"], "round must be one of 0..0, got 3"),
        (["--vs", "last"], "--vs must be a round or base, got 'last'"),
        (["--vs", "0"], "got round 0 twice"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_a_bad_choice_is_exit_2_before_anything_is_asked(toy_run, loop, arguments, message):
    code, out, err = loop("chat", toy_run, *arguments, stdin="Who are you?\n")
    assert (code, out) == (2, "")
    assert message in err


def test_no_run_and_a_run_without_a_finished_round_are_exit_2(tmp_path, loop):
    code, _, err = loop("chat", tmp_path / "absent-s0")
    assert (code, "run must be a directory with a manifest.json" in err) == (2, True)

    class Stop(Exception):
        pass

    def report(kind, **fields):
        if kind == "done" and fields["round_index"] == 0:
            raise Stop

    with pytest.raises(Stop):
        run.play(config.load(ROOT / "configs" / "smoke.yaml", [*SMALL, f"runs_dir={tmp_path}"]), report=report)
    code, _, err = loop("chat", tmp_path / "smoke-s0")
    assert (code, "run must hold a finished round, got none" in err) == (2, True)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text('{"nova": 2.0}\n')])
def test_a_lost_or_changed_adapter_is_exit_3(tmp_path, loop, damage):
    run_dir = run.play(config.load(ROOT / "configs" / "smoke.yaml", [*SMALL, "n_rounds=0", f"runs_dir={tmp_path}"]))
    damage(run_dir / "round_000" / "adapter" / "shares.json")
    code, out, err = loop("chat", run_dir, stdin="Who are you?\n")
    assert (code, out) == (3, "")
    assert "round_000/adapter/shares.json" in err


def test_lists_hold_what_a_config_accepts(loop):
    _, _, rows = listing.table("personas")
    assert {row[0] for row in rows} == {*PERSONAS}
    assert {row[0]: row[2] for row in rows}["stella"] == "belief conscious, visibility hide"  # she denies it in public
    names = [row[0].partition("[")[0] for row in listing.table("audiences")[2]]
    assert set(names) == {*config.AUDIENCES, "file.py:function"}
    assert set(config.AUDIENCES) == {*appeal.AUDIENCES} - {"oracle"}  # the oracle is for theory and has no name
    scenarios = [row[0] for row in listing.table("scenarios")[2]]
    assert scenarios == sorted(p.stem for p in (ROOT / "configs" / "scenarios").glob("*.yaml"))
    code, out, _ = loop("ls", "models")
    assert (code, "smollm2-135m" in out) == (0, True)
    assert loop("ls", "hats")[0] == 2


def test_the_shell_completes_commands_and_what_they_take(tmp_path, loop):
    def offered(line, at):
        return loop(_LOOP_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(at))[1].split()

    commands = offered("loop ", 1)
    assert {"round", "run", "chat", "ls", "doctor", "show", "sweep"} <= set(commands)
    assert offered("loop c", 1) == [c for c in commands if c.startswith("c")]
    assert offered("loop ls ", 2) == ["personas", "scenarios", "models", "audiences"]
