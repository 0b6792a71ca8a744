"""The page of faults names tests that exist, and tells what failed, was skipped or did not run."""

import re
import xml.etree.ElementTree as ET

import reliability


def test_every_fault_has_a_row_and_every_test_it_names_exists():
    numbers = set()
    for fault in reliability.FAULTS:
        for first, last in re.findall(r"F(\d+)(?:-F(\d+))?", fault.id):
            numbers |= set(range(int(first), int(last or first) + 1))
        assert fault.tests
        for test in fault.tests:
            file, name = test.partition("[")[0].split("::")
            assert name in reliability.functions(file), test
    assert numbers == set(range(1, 35))


def case(parent, test, outcome=None, **properties):
    file, name = test.split("::")
    made = ET.SubElement(parent, "testcase", classname=f"tests.{file}", name=name, time="60")
    if outcome:
        ET.SubElement(made, outcome, message="x")
    said = ET.SubElement(made, "properties")
    for key, value in properties.items():
        ET.SubElement(said, "property", name=key, value=str(value))


def written(tmp_path, **first):
    """The page of results in which the first test of the first fault is as given and all others passed."""
    suite = ET.Element("testsuite")
    tests = [test + "]" if "[" in test else test for fault in reliability.FAULTS for test in fault.tests]
    case(suite, tests[0], **first)
    for test in tests[1:]:
        case(suite, test)
    ET.ElementTree(suite).write(tmp_path / "r.xml")
    code = reliability.main(["--from", str(tmp_path / "r.xml"), "--out", str(tmp_path / "page.md")])
    return code, (tmp_path / "page.md").read_text()


def test_the_page_counts_faults_and_says_what_happened(tmp_path):
    code, text = written(tmp_path, faults=568, happened="all | whole")
    assert code == 0
    n = sum(len(fault.tests) for fault in reliability.FAULTS)
    assert f"{568 + n - 1:,} faults in {len(reliability.FAULTS)} kinds, {n} test cases, all as expected" in text
    row = next(line for line in text.splitlines() if line.startswith("| F1 |"))
    assert row.endswith(f"| {568 + len(reliability.FAULTS[0].tests) - 1} | all \\| whole |")


def test_what_failed_or_was_skipped_is_on_the_page_and_in_the_exit_code(tmp_path):
    name = reliability.FAULTS[0].tests[0].split("::")[1]
    code, text = written(tmp_path, outcome="failure")
    assert (code, f"**failed: {name}**" in text, "**not all as expected**" in text) == (1, True, True)
    code, text = written(tmp_path, outcome="skipped")
    assert (code, "(1 skipped)" in text) == (0, True)


def test_a_test_that_did_not_run_is_on_the_page(tmp_path):
    suite = ET.Element("testsuite")
    ET.ElementTree(suite).write(tmp_path / "r.xml")
    assert reliability.main(["--from", str(tmp_path / "r.xml"), "--out", str(tmp_path / "page.md")]) == 1
    assert f"not run: {reliability.FAULTS[0].tests[0]}" in (tmp_path / "page.md").read_text()
