"""The page of faults names tests that exist, and is not written if one failed, did not run or tried too little."""

import re
import xml.etree.ElementTree as ET

import pytest
import reliability

FAULTS = reliability.FAULTS
FIRST = FAULTS[0].tests[0]


def test_every_fault_has_a_row_and_every_test_it_names_exists():
    numbers = set()
    for fault in FAULTS:
        for first, last in re.findall(r"F(\d+)(?:-F(\d+))?", fault.id):
            numbers |= set(range(int(first), int(last or first) + 1))
        assert fault.tests
        for test in fault.tests:
            file, name = test.partition("[")[0].split("::")
            assert name in reliability.functions(file), test
    assert numbers == set(range(1, 35))


def test_configs_and_corpora_are_tried_a_hundred_thousand_times():
    least = {fault.id: fault.least for fault in FAULTS}
    assert least["F20"] + least["F21"] + least["F23"] >= 100_000


def case(parent, test, outcome=None, **properties):
    file, name = test.split("::")
    made = ET.SubElement(parent, "testcase", classname=f"tests.{file}", name=name, time="60")
    if outcome:
        ET.SubElement(made, outcome, message="x")
    said = ET.SubElement(made, "properties")
    for key, value in properties.items():
        ET.SubElement(said, "property", name=key, value=str(value))


def written(tmp_path, changed):
    """Exit code and page, "" where none was written; every test passed as often as its row asks, but for `changed`."""
    suite = ET.Element("testsuite")
    for fault in FAULTS:
        for test in fault.tests:
            said = changed.get(test, {"faults": fault.least})
            if said is not None:
                case(suite, test + "]" if "[" in test else test, **said)
    ET.ElementTree(suite).write(tmp_path / "r.xml")
    page = tmp_path / "page.md"
    page.unlink(missing_ok=True)
    code = reliability.main(["--from", str(tmp_path / "r.xml"), "--out", str(page)])
    return code, page.read_text() if page.exists() else ""


def row(text, fault):
    return next(line for line in text.splitlines() if line.startswith(f"| {fault} |"))


def test_the_page_counts_faults_and_says_what_happened(tmp_path):
    code, text = written(tmp_path, {FIRST: {"faults": 568, "happened": "all | whole"}})
    assert code == 0
    n = sum(len(fault.tests) for fault in FAULTS)
    total = 568 - FAULTS[0].least + sum(fault.least * len(fault.tests) for fault in FAULTS)
    assert f"{total:,} faults in {len(FAULTS)} kinds, {n} test cases, all as expected; {n} minutes of test time" in text
    here = 568 + FAULTS[0].least * (len(FAULTS[0].tests) - 1)
    assert row(text, "F1").endswith(f"| {here:,} | all \\| whole |")


def test_what_several_tests_say_stands_once_after_what_one_says(tmp_path):
    one, two, *_ = FAULTS[1].tests
    said = {one: {"faults": 60, "happened": "exit 143; whole; same bytes"}}
    said[two] = {"faults": 60, "happened": "exit 130; whole; same bytes"}
    _, text = written(tmp_path, said)
    assert row(text, "F2").endswith("| exit 143; exit 130; whole; same bytes |")


def test_what_was_skipped_is_on_the_page(tmp_path):
    code, text = written(tmp_path, {FIRST: {"outcome": "skipped"}})
    assert (code, "as expected (1 skipped) |" in row(text, "F1")) == (0, True)


FEW = next(fault for fault in FAULTS if fault.least > 1000)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({FIRST: {"outcome": "failure"}}, f"F1: failed: {FIRST.split('::')[1]}"),
        ({FIRST: {"outcome": "error"}}, f"F1: failed: {FIRST.split('::')[1]}"),
        ({FIRST: None}, f"F1: not run: {FIRST}"),
        (
            {test: {"faults": 1} for test in FEW.tests},
            f"{FEW.id}: must be tried at least {FEW.least:,} times, got {len(FEW.tests)}",
        ),
    ],
)
def test_no_page_is_written_of_a_battery_that_failed_or_fell_short(tmp_path, capsys, changed, says):
    assert written(tmp_path, changed) == (1, "")
    assert says in capsys.readouterr().err


def test_a_battery_that_ends_early_leaves_the_page_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reliability, "battery", lambda results, jobs: 2)
    (tmp_path / "page.md").write_text("old")
    assert reliability.main(["--out", str(tmp_path / "page.md")]) == 1
    assert (tmp_path / "page.md").read_text() == "old"
    assert "pytest must exit with 0, got 2" in capsys.readouterr().err
