"""docs/ecosystem.md names a test for every rule, and the tests exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "ecosystem.md").read_text()
RULES = [line for line in TABLE.splitlines() if re.match(r"\| (?!rule|--)", line)]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE)))


def test_every_rule_names_a_test():
    assert len(RULES) == 38
    for line in RULES:
        assert re.search(r"`[\w/]+\.py::test_\w+`", line), line


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda v: str(v))
def test_named_test_exists(file, name):
    assert f"\ndef {name}(" in (TESTS / file).read_text()
