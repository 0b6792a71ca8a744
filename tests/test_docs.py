"""The guides are run: what stands below a command in docs/*.md is what it prints, `...` standing for what is left out.

Blocks `console` are run in order, in one folder per page, with files written from blocks that carry a title; blocks
`sh` take minutes or a model and are only checked to name commands and options that exist.
"""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from loop.__main__ import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["tutorial.md", "bring-your-own.md"]
TEXTS = [*PAGES, "findings-in-words.md"]  # read, and its commands checked to exist
BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def steps(text):
    """(command, expected output) of a console block."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    assert parts[0] == "", "a console block begins with a command"
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_prints_what_stands_below_it(page, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shell = 'set -o pipefail; loop() { "$PYTHON" -m loop "$@"; }; '
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    same = doctest.OutputChecker().check_output
    ran = 0
    for kind, title, text in blocks(page):
        if title:
            (tmp_path / title).write_text(text, encoding="utf-8")
        for command, expected in steps(text) if kind == "console" else ():
            done = subprocess.run(
                ["bash", "-c", shell + command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            got = "\n".join(line.rstrip() for line in done.stdout.splitlines())
            want = "\n".join(line.rstrip() for line in expected.splitlines())
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert same(want + "\n", got + "\n", flags), f"{command}\nexpected:\n{want}\ngot:\n{got}"
            ran += 1
    assert ran > 0


def commands():
    """What follows `loop` on a line of a shell block or in backquotes in the guides and README."""
    for page in [*(ROOT / "docs" / p for p in TEXTS), ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for kind, _, block in BLOCK.findall(text):
            if kind in ("sh", "console"):
                for line in block.splitlines():
                    for part in re.findall(r"(?:^|\| |\$ |bin/)loop ([^#|>]*)", line):
                        yield page.name, part.strip()
        for part in re.findall(r"`(?:\.venv/bin/)?loop ([^`\n]*)`", text):
            yield page.name, part.strip()


def test_every_command_and_option_named_in_the_guides_exists():
    root = typer.main.get_command(app)
    found = list(commands())
    assert len(found) > 20
    for page, line in found:
        command, words = root, line.split()
        while words and hasattr(command, "commands"):
            name = words.pop(0)
            if name.startswith("-"):
                words.insert(0, name)
                break
            assert name in command.commands, f"{page}: loop {line}"
            command = command.commands[name]
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in known, f"{page}: loop {line}: {word}"


def test_links_between_the_guides_lead_somewhere():
    for page in TEXTS:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / "docs" / target).exists(), f"{page}: {target}"


def test_every_interval_of_the_findings_in_words_stands_in_the_findings_or_beside_where_it_is_from():
    # Where it is not of the committed tables: what the text names in the same paragraph.
    elsewhere = {
        "0.199 [0.029, 0.370]": "loop compare 'runs/tiny/linked_full-s*'",
        "0.187 [0.096, 0.277]": "commit ebff2d3",
        "0.036 [-0.059, 0.131]": "commit ba2ffac",
        "-0.019 [-0.073, 0.034]": "commit 2a94485",
    }

    def intervals(text):
        return set(re.findall(r"-?\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]", text.replace("\n", " ").replace("+", "")))

    known = intervals((ROOT / "docs" / "findings.md").read_text(encoding="utf-8"))
    found = 0
    for paragraph in (ROOT / "docs" / "findings-in-words.md").read_text(encoding="utf-8").split("\n\n"):
        for interval in intervals(paragraph) - known:
            assert elsewhere[interval] in paragraph.replace("\n", " "), interval
        found += len(intervals(paragraph))
    assert found > 80


def test_every_figure_of_speed_in_the_readme_stands_on_the_page():
    readme, page = (ROOT / name for name in ("README.md", "docs/performance.md"))
    said = readme.read_text(encoding="utf-8").partition("## How fast")[2].partition("`sample.engine=vllm`")[0]
    figures, known = (re.findall(r"[+-]?\d+\.\d+%?", text) for text in (said, page.read_text(encoding="utf-8")))
    assert len(figures) > 40
    assert not {*figures} - {*known}
