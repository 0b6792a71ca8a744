"""Runs the fault battery and writes docs/reliability.md from what it saw.

    python tests/reliability.py                        # `make faults`: all of it, then the page
    python tests/reliability.py --from a.xml b.xml     # the page alone, from JUnit results at hand

FAULTS is the list of what can go wrong and of the tests that make it go wrong. A test says how often it did so and what
happened by the properties `faults` and `happened` of its JUnit result; one that says nothing counts as one fault that
went as expected. If a test failed or did not run, or a row was tried less often than its `least`, the page that is
there stays, and stderr says why.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"


class Fault(NamedTuple):
    """A row of the page: what goes wrong, how it is made to, what is expected, the tests, how often at the least.

    A test is "file::function", or "file::function[part" for those cases that hold `part` in their name.
    """

    id: str
    fault: str
    how: str
    expected: str
    tests: tuple[str, ...]
    least: int = 1


FAULTS = (
    Fault("F1", "killed anywhere", "SIGKILL at every file operation of three rounds, a fork and a repair, and at "
          "random moments of a language-model run", "same bytes after a restart", (
              "test_faults::test_a_run_killed_at_any_file_operation_ends_as_if_nothing_had_happened",
              "test_faults::test_a_run_stopped_at_any_moment_ends_as_if_nothing_had_happened[SIGKILL",
              "test_store::test_killed_at_any_file_operation_at_all",
              "test_store::test_the_sweep_sees_through_a_store_that_is_not_atomic",
              "test_store::test_a_stage_that_was_whole_is_read_back_and_not_computed"), 500),
    Fault("F2", "told to stop", "SIGTERM and SIGINT at random moments of a toy and of a language-model "
          "run", "exit 143, 130; the same command goes on", (
              "test_faults::test_a_run_stopped_at_any_moment_ends_as_if_nothing_had_happened[SIGTERM",
              "test_faults::test_a_run_stopped_at_any_moment_ends_as_if_nothing_had_happened[SIGINT",
              "test_cli::test_a_signal_stops_between_bytes_and_the_same_command_goes_on"), 60),
    Fault("F3", "disk full, over quota, broken, gone", "the n-th file operation refused for every n, once and for good:"
          " ENOSPC, EDQUOT, EIO, EROFS; a full tmpfs, a file-size limit, a directory that disappears; short writes",
          "exit 5 with path and bytes; earlier rounds intact; the same command goes on", (
              "test_faults::test_a_run_whose_disk_refuses_any_operation_says_so_and_can_go_on",
              "test_faults::test_a_run_of_a_language_model_whose_disk_refuses_says_so_and_can_go_on",
              "test_faults::test_a_run_whose_directory_disappears_says_so_and_goes_on_when_it_is_back",
              "test_store::test_refused_at_any_file_operation_at_all",
              "test_store::test_the_disk_errors_of_a_learner_that_saves_by_itself_are_ours",
              "test_store::test_a_write_that_takes_only_part_of_the_bytes_is_carried_on",
              "test_store::test_all_of_a_round_is_on_disk_before_it_is_named_and_its_name_before_the_next"), 200),
    Fault("F4", "too little room from the start", "free space patched; estimate against what rounds took",
          "exit 5 before a model is loaded", (
              "test_faults::test_a_run_that_will_not_fit_is_refused_before_a_model_is_loaded",
              "test_faults::test_what_a_round_takes_is_within_its_estimate",
              "test_store::test_preflight_says_what_is_needed_and_what_is_there")),
    Fault("F5", "a real file system full, read-only, limited", "tmpfs remounted under a run; ulimit -f",
          "exit 5, one line", (
              "test_faults::test_a_real_file_system_that_is_full_or_read_only_is_one_line_and_the_run_goes_on",
              "test_sweep::test_a_directory_that_cannot_be_written_is_refused_at_once")),
    Fault("F6-F11", "artefact truncated, bit-flipped, missing, edited; adapter with NaN, without a tensor, of another "
          "alpha or rank; other schema", "each edit of a middle and of the last round, as it is, with its own MANIFEST "
          "made to fit, and with every hash forged", "`loop verify` exit 3 by name; not resumed; "
          "`--repair` rolls back", (
              "test_faults::test_a_damaged_run_is_exit_3_by_name_is_not_resumed_and_is_repaired",
              "test_faults::test_an_adapter_forged_with_every_hash_is_still_not_trained_on",
              "test_faults::test_a_run_of_another_schema_version_is_exit_3_and_left_alone",
              "test_store::test_verify_names_it_resume_refuses_it_and_repair_rolls_back_to_before_it",
              "test_store::test_a_damaged_file_is_not_read_even_without_resuming",
              "test_store::test_a_run_without_its_manifest_is_not_resumed_and_not_begun_anew",
              "test_store::test_an_adapter_that_is_not_finite_is_not_committed",
              "test_store::test_quarantine_keeps_what_is_there",
              "test_model::test_damaged_adapter_is_refused")),
    Fault("F12", "a pickle in an adapter, a run or a base", "pickles that leave a file behind when read",
          "never read", (
              "test_faults::test_no_pickle_is_ever_read",
              "test_store::test_a_pickle_or_a_link_in_an_adapter_is_not_committed")),
    Fault("F13", "code that comes with a model", "auto_map in the base's config", "refused without the flag", (
              "test_faults::test_code_that_comes_with_a_model_is_not_run",
              "test_model::test_directory_with_code_of_its_own_is_refused")),
    Fault("F14", "loss or gradient not finite", "NaN, Inf, -Inf in a micro-batch, in training and in steering",
          "exit 4 before the step, nothing committed, the same command goes on", (
              "test_faults::test_a_loss_that_is_not_finite_is_exit_4_and_nothing_of_the_round_is_committed",
              "test_train::test_divergence_stops_before_the_step",
              "test_steer::test_divergence_stops_before_the_step",
              "test_sample::test_diverged_adapter_is_refused")),
    Fault("F15", "nothing to train on", "no documents, all weights 0, NaN, negative; a mixture of nothing",
          "an error that says so", (
              "test_faults::test_a_mixture_with_nothing_in_it_is_an_error_and_not_a_silent_zero",
              "test_train::test_bad_input_is_refused",
              "test_train::test_documents_of_weight_zero_are_left_out_and_no_step_is_empty",
              "test_mix::test_unusable_pools_are_refused_with_what_and_where")),
    Fault("F16", "out of memory in training", "the allocator's error from some size on, and at every size",
          "micro-batch halved, same result within rounding; at the smallest, exit 5", (
              "test_train::test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing",
              "test_faults::test_memory_that_runs_out_for_the_longest_document_is_exit_5_and_nothing_is_committed")),
    Fault("F17", "sampler returns fewer texts than asked", "one text dropped", "caught; nothing committed", (
              "test_faults::test_a_sampler_that_returns_fewer_texts_than_asked_is_caught",)),
    Fault("F18", "every output rejected", "a filter that passes nothing", "stops with reasons and counts", (
              "test_run::test_a_filter_that_rejects_everything_stops_with_reasons_and_counts_and_leaves_no_round",)),
    Fault("F19", "collapse to one text", "a learner with one text per persona", "measured; a result, not an error", (
              "test_faults::test_collapse_to_one_text_per_persona_is_measured_and_no_error",)),
    Fault("F20", "odd or hostile corpora", "hypothesis: invalid UTF-8, NUL, BOM, CRLF, duplicate ids, nesting, damaged "
          "Parquet; 100 MB lines, Parquet bombs", "file:line, exit 2", (
              "test_fuzz::test_any_jsonl_is_read_or_refused_in_a_line",
              "test_fuzz::test_any_parquet_is_read_or_refused_in_a_line",
              "test_fuzz::test_a_line_of_a_hundred_megabytes_is_refused_before_it_is_held",
              "test_fuzz::test_a_parquet_bomb_is_refused_by_what_it_would_hold",
              "test_fuzz::test_a_source_that_is_no_file_is_refused_in_a_line",
              "test_corpus::test_a_malformed_line_is_named_with_file_and_line",
              "test_cli::test_a_malformed_corpus_is_named_by_file_and_line"), 37_000),
    Fault("F21", "odd or hostile configs", "hypothesis: duplicate keys, anchors, tags, 1e-4, `no`, huge, deep, any "
          "bytes, any override", "file:line, exit 2, all problems at once", (
              "test_fuzz::test_any_override_is_taken_or_refused_in_a_line",
              "test_fuzz::test_any_edit_of_a_config_is_taken_or_refused_in_a_line",
              "test_fuzz::test_any_bytes_for_a_config_are_refused_in_a_line",
              "test_fuzz::test_a_config_bomb_and_an_endless_file_are_refused_at_once",
              "test_cli::test_bad_input_gets_one_clear_line_its_exit_code_and_no_run"), 43_000),
    Fault("F22", "resumed with another config, other packages, other code", "keys changed, dropped, added; a package "
          "version", "refused with the difference; packages by `--allow-drift`, recorded", (
              "test_store::test_resuming_with_another_config_is_refused_with_the_keys_that_differ",
              "test_store::test_other_packages_or_instruments_are_refused_or_recorded",
              "test_store::test_stages_computed_with_other_packages_are_computed_again",
              "test_run::test_a_changed_config_is_refused_by_name_and_more_rounds_are_not")),
    Fault("F23", "names that lead elsewhere", "hypothesis: run names, file names, markers, symlinks",
          "refused; nothing outside the run is touched", (
              "test_fuzz::test_a_run_name_is_plain_or_refused_and_never_leads_out_of_its_folder",
              "test_store::test_only_plain_names_are_run_names",
              "test_store::test_a_file_name_that_leads_elsewhere_or_is_no_json_is_refused",
              "test_store::test_a_marker_cannot_make_the_store_remove_what_lies_outside",
              "test_store::test_a_temporary_directory_that_leads_elsewhere_is_not_written_through",
              "test_store::test_a_run_that_is_a_symlink_is_refused"), 20_000),
    Fault("F24", "a run that somebody sent", "hypothesis: any bytes in any file of a run, verified, resumed, repaired",
          "named or refused; nothing beside it is touched", (
              "test_fuzz::test_any_bytes_in_any_file_of_a_run_are_survived_and_nothing_beside_it_is_touched",), 3_000),
    Fault("F25", "two processes on one run", "a second command; eight at once; a cell of a sweep",
          "exit 2 with the holder's pid; one gets it", (
              "test_faults::test_a_second_process_is_refused_with_who_holds_the_run_and_a_killed_one_holds_nothing",
              "test_store::test_a_second_process_is_told_who_holds_the_run_and_a_killed_one_holds_nothing",
              "test_store::test_of_eight_that_begin_a_run_at_once_one_gets_it",
              "test_store::test_two_stores_of_one_process_do_not_share_a_run",
              "test_sweep::test_a_cell_that_another_process_holds_fails_with_its_holder_and_leaves_it_alone")),
    Fault("F26", "remains of a run that died", "old .tmp directories, a lock of a killed process, a replaced lock",
          "removed under the lock", (
              "test_store::test_a_lock_on_a_file_that_has_been_replaced_meanwhile_is_no_lock",)),
    Fault("F27", "W&B fails, hangs, is out of reach, dies half-way", "modules and servers that do",
          "one warning; the run is unaffected; a replay heals the mirror", (
              "test_track::test_wandb_that_fails_or_hangs_costs_a_run_one_warning",
              "test_track::test_a_mirror_that_cannot_be_started_costs_a_run_one_warning",
              "test_track::test_a_mirror_killed_half_way_is_healed_by_a_replay_and_a_replay_again_changes_nothing",
              "test_track::test_a_server_out_of_reach_leaves_a_whole_offline_mirror_that_says_so")),
    Fault("F28", "a base that cannot be found", "hub unreachable, no such folder", "one line at once", (
              "test_model::test_base_that_cannot_be_found_is_one_clear_line",)),
    Fault("F29", "hostile text of a model", "terminal escapes, bidi marks, markup, scripts",
          "shown, never acts", (
              "test_faults::test_terminal_escapes_in_texts_do_not_reach_the_terminal",
              "test_fuzz::test_text_of_a_model_is_shown_on_one_line_and_moves_nothing",
              "test_chat::test_neither_model_text_nor_prompt_can_move_the_cursor_or_style_the_table",
              "test_track::test_text_of_a_model_reaches_a_table_without_control_characters",
              "test_page::test_json_in_a_script_element_cannot_end_it_and_reads_back_as_it_was",
              "test_page::test_text_of_a_model_is_shown_and_never_acts"), 16_000),
    Fault("F30, F33", "clock jumps; progress, report, tracking, jobs", "each switched on and off; a clock that jumps "
          "by days", "same bytes", (
              "test_faults::test_progress_reports_clock_and_tracking_leave_no_trace_in_the_bytes",
              "test_track::test_a_tracked_run_leaves_the_bytes_of_an_untracked_one",
              "test_sweep::test_two_jobs_equal_one_byte_for_byte",
              "test_run::test_one_round_at_a_time_equals_a_straight_run_byte_for_byte")),
    Fault("F31", "a cell of a sweep fails or is killed", "a broken cell, SIGKILL of a worker",
          "the others finish; exit 1; only it is played again", (
              "test_sweep::test_a_failing_cell_stops_no_other_and_only_it_is_played_again",
              "test_sweep::test_a_process_that_is_killed_fails_its_cell_alone",
              "test_sweep::test_the_command_exits_1_with_a_table_of_failures_and_plays_the_rest")),
    Fault("F32", "torn or damaged event log", "half a last line; an earlier line that is no JSON",
          "ignored and rewritten; named", (
              "test_store::test_a_torn_last_event_is_ignored_and_removed_and_an_earlier_one_is_named",)),
    Fault("F34", "growth over many rounds", "200 toy rounds, 60 of a language model, measured",
          "files and threads constant, memory by what the pool holds", (
              "test_faults::test_a_long_run_holds_no_more_files_or_threads_and_little_more_memory",
              "test_steer::test_three_rounds_in_a_row_leave_nothing_but_the_adapter")),
    Fault("golden", "results that change unnoticed", "three runs against the hashes of this platform; every case of "
          "changed version and changed result", "same bytes; a changed version is told from a changed result", (
              "test_faults_golden::test_a_run_has_the_golden_hashes_of_its_platform",
              "test_faults_golden::test_a_changed_version_is_told_from_a_changed_result")),
)  # fmt: skip

LIMITS = """\
What this does not show. SIGKILL loses what a process holds, not what the kernel holds: no test pulls a plug. That every
byte and every name is asked to disk in the right order is read from the log of operations instead. A quota is injected
as EDQUOT, not set up. Whoever edits a round, every MANIFEST after it and the event log leaves no trace in the
directory: publish the last MANIFEST's hash. Bytes are compared on one machine; elsewhere the golden hashes tell a
changed version from a changed result. Archives are never unpacked: a run is a directory, copied by the user's own
means.
"""


@dataclass
class Seen:
    """What the results say about one row: cases by outcome, faults injected, clauses of what tests said happened."""

    passed: int = 0
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    faults: int = 0
    happened: Counter[str] = field(default_factory=Counter)

    def wrong(self, least: int) -> list[str]:
        """Why the row cannot stand on the page; empty if it can."""
        few = [] if self.faults >= least else [f"must be tried at least {least:,} times, got {self.faults:,}"]
        return [f"failed: {n}" for n in self.failed] + [f"not run: {n}" for n in self.missing] + few

    def says(self) -> str:
        """What happened: each clause once, what few tests say before what all say."""
        clauses = sorted(self.happened, key=lambda clause: self.happened[clause])
        return "; ".join(clauses or ["as expected"]) + (f" ({len(self.skipped)} skipped)" if self.skipped else "")


LONG = ("test_fuzz", "test_faults")


def nodes() -> list[str]:
    """The tests of FAULTS as pytest takes them; the longest first, for both processes to end at about one time."""
    pairs = dict.fromkeys(tuple(test.partition("[")[0].split("::")) for fault in FAULTS for test in fault.tests)
    return [f"{ROOT}/tests/{file}.py::{test}" for file, test in sorted(pairs, key=lambda pair: pair[0] not in LONG)]


def functions(file: str) -> set[str]:
    """Names of the functions of a test file."""
    text = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def read(results: Iterable[Path]) -> dict[str, list[ET.Element]]:
    """JUnit test cases by "file::function"; of a test in several files the last one counts."""
    found: dict[str, dict[str, ET.Element]] = {}
    for path in results:
        for case in ET.parse(path).getroot().iter("testcase"):
            name = case.get("name", "")
            key = f"{case.get('classname', '').rpartition('.')[2]}::{name.partition('[')[0]}"
            found.setdefault(key, {})[name] = case
    return {key: list(cases.values()) for key, cases in found.items()}


def look(fault: Fault, cases: dict[str, list[ET.Element]]) -> Seen:
    """Gathers what happened to one fault."""
    seen = Seen()
    for test in fault.tests:
        name, _, part = test.partition("[")
        here = [case for case in cases.get(name, ()) if part in case.get("name", "")]
        if not here:
            seen.missing.append(test)
        for case in here:
            said = {p.get("name"): p.get("value", "") for p in case.iter("property")}
            if case.find("failure") is not None or case.find("error") is not None:
                seen.failed.append(case.get("name", test))
            elif case.find("skipped") is not None:
                seen.skipped.append(case.get("name", test))
            else:
                seen.passed += 1
                seen.faults += int(said.get("faults", "1"))
                seen.happened.update(said["happened"].split("; ") if said.get("happened") else ())
    return seen


def page(cases: dict[str, list[ET.Element]]) -> str:
    """Returns docs/reliability.md.

    Raises:
      ValueError: a test failed or did not run, or a row was tried less often than it must be; a line for each.
    """
    seen = {fault: look(fault, cases) for fault in FAULTS}
    wrong = [f"{fault.id}: {line}" for fault, s in seen.items() for line in s.wrong(fault.least)]
    if wrong:
        raise ValueError("\n".join(wrong))
    seconds = sum(float(case.get("time", 0)) for found in cases.values() for case in found)
    packages = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "numpy", "pyarrow", "hypothesis"))
    total = sum(s.faults for s in seen.values())
    lines = [
        "# Reliability",
        "",
        "A result is either whole and verifiable, or absent. This page is written by `make faults` "
        "(tests/reliability.py)",
        "from the results of its tests; edit neither by hand.",
        "",
        f"{total:,} faults in {len(FAULTS)} kinds, {sum(s.passed for s in seen.values())} test cases, all as expected; "
        f"{seconds / 60:.0f} minutes of test time.",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}; {packages}.",
        "",
        "| | What goes wrong | How it is made to | Expected | How often | What happened |",
        "|---|---|---|---|---:|---|",
    ]
    for fault, s in seen.items():
        cells = [fault.id, fault.fault, fault.how, fault.expected, f"{s.faults:,}", s.says()]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", LIMITS])


def in_memory() -> Path | None:
    """Where a file system in memory has room for the battery, which writes small files by the million; or None."""
    place = Path("/dev/shm")
    return place if place.is_dir() and shutil.disk_usage(place).free > 4 << 30 else None


def battery(results: Path, jobs: int) -> int:
    """Runs the tests of FAULTS, long ones too, and every property with all its inputs; returns pytest's exit code."""
    env = os.environ | {"HYPOTHESIS_PROFILE": "battery", "OMP_NUM_THREADS": "1"}
    if env.pop("PYTHONDONTWRITEBYTECODE", ""):  # a hundred processes would each compile torch again, 15 s apiece
        env["PYTHONPYCACHEPREFIX"] = str(results.parent / "bytecode")
    options = ["-m", "faults or not faults", "-o", "junit_family=xunit1", f"--junitxml={results}", "--durations=10"]
    options += ["-n", str(jobs), "--dist", "worksteal", f"--basetemp={results.parent / 'runs'}"]
    command = [sys.executable, "-m", "pytest", *options, *nodes()]
    code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    for scratch in ("runs", "bytecode"):  # they lie in memory; a battery that failed keeps its results alone
        shutil.rmtree(results.parent / scratch, ignore_errors=True)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="results", type=Path, nargs="+", help="JUnit files; the tests are not run")
    parser.add_argument("--jobs", type=int, default=2, help="test processes")
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    results = given.results or [Path(tempfile.mkdtemp(prefix="faults-", dir=in_memory())) / "faults.xml"]
    if not given.results and (code := battery(results[0], given.jobs)):
        again = f"run what failed with --junit-xml=AGAIN, then `{Path(__file__).name} --from {results[0]} AGAIN`"
        print(f"pytest must exit with 0, got {code}; {given.out} stays as it is; {again}", file=sys.stderr)
        return 1
    try:
        text = page(read(results))
    except ValueError as error:
        print(f"{error}\n{given.out} stays as it is", file=sys.stderr)
        return 1
    if not given.results:
        shutil.rmtree(results[0].parent)
    given.out.write_text(text, encoding="utf-8")
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
