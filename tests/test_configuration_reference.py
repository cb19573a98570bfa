from __future__ import annotations

import os
import re

import msgspec

from hybridopt import config
from tests import docs_reference


def test_configuration_page_is_up_to_date() -> None:
    page = docs_reference.render()
    if os.environ.get("HYBRIDOPT_WRITE_DOCS"):
        docs_reference.PATH.parent.mkdir(exist_ok=True)
        docs_reference.PATH.write_text(page, encoding="utf-8")
    assert docs_reference.PATH.read_text(encoding="utf-8") == page, (
        "docs/configuration.md differs from hybridopt/config.py: run "
        "HYBRIDOPT_WRITE_DOCS=1 pytest tests/test_configuration_reference.py"
    )


def test_configuration_page_covers_every_struct() -> None:
    public = {
        value
        for name in config.__all__
        if issubclass(value := getattr(config, name), msgspec.Struct)
    }
    assert public == {struct for struct, _ in docs_reference.STRUCTS}


def test_configuration_page_gives_every_number_a_unit_and_no_other_field() -> None:
    numeric = {
        f"{struct.__name__}.{name}"
        for struct, name, hint in docs_reference.fields()
        if docs_reference.is_number(hint)
    }
    assert numeric == set(docs_reference.UNITS)


def test_configuration_page_explains_every_field() -> None:
    page = docs_reference.render()
    rows = [r for r in page.splitlines() if r.startswith("| `") and r.count("|") >= 7]
    assert len(rows) == len(docs_reference.fields())
    for row in rows:
        meaning = re.split(r"(?<!\\)\|", row)[6].strip()
        assert len(meaning) > 10, row
        assert meaning.endswith((".", ")")), row


def test_configuration_page_example_is_valid() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", docs_reference.HEAD, re.DOTALL)
    built = msgspec.toml.decode(example, type=config.HybridConfig)
    assert built.max_predict_steps == 8
    assert built.bandit == config.LinUCB(exploration=0.2)
