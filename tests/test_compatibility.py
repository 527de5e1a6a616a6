"""The tables of what works with what: recorded, merged, and put in their place."""

from __future__ import annotations

import json
import sys

import compatibility
import pytest
from compatibility import insert, markdown, record, tables

PLACE = "before <!-- compatibility --> old <!-- /compatibility --> after"


def test_from_records_to_a_file(tmp_path, monkeypatch):
    records, readme = tmp_path / "records", tmp_path / "README.md"
    monkeypatch.setenv(compatibility.VARIABLE, str(records))
    for row, outcome in (("Euler", "yes"), ("Euler, Karras", "yes"), ("Euler, old", "–")):
        record("scheduler", row, "CFG")
        record("scheduler", row, "CFG++", outcome)
    record("scheduler", "Euler", "CFG")  # once more, under another law
    readme.write_text(PLACE)
    arguments = ["compatibility", "--records", str(records), "--write", str(readme)]
    monkeypatch.setattr(sys, "argv", arguments)
    compatibility.main()
    first = readme.read_text()
    *lines, legend, end = first.splitlines()
    assert "make compatibility" in legend and end == "<!-- /compatibility --> after"
    assert lines == [
        "before <!-- compatibility -->",
        "| scheduler | CFG | CFG++ |",
        "| --- | --- | --- |",
        "| Euler (also Karras) | yes | yes |",
        "| Euler, old | yes | – |",
        "",
    ]
    compatibility.main()
    assert readme.read_text() == first


def test_nothing_is_recorded_unless_asked(tmp_path, monkeypatch):
    monkeypatch.delenv(compatibility.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    record("scheduler", "Euler", "CFG")
    assert not list(tmp_path.iterdir())


def test_outcomes_that_disagree_are_both_shown():
    lines = [json.dumps(["family", "SD", "CFG", outcome]) for outcome in ("yes", "–")]
    assert "| SD | yes, – |" in markdown("family", tables(lines)["family"])


def test_a_file_without_a_place_says_what_to_add():
    with pytest.raises(SystemExit, match="<!-- compatibility -->"):
        insert("no place", "")
