"""The harness of the benchmarks; what it measures is in BENCHMARKS.md, which no test checks."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import pytest
import torch

from benchmarks import compiled, overhead, passes, savings
from benchmarks.__main__ import CHAPTERS, of_any_model, on_gpu
from benchmarks.models import ARCHITECTURES, full_size
from benchmarks.report import MISSING, Chapter, write
from benchmarks.timing import Effort, Ratio, interleaved
from guidancekit import APG, CFG, NASA, PAG, LinearAG

CPU = torch.device("cpu")
SD15, SD35 = "SD 1.5, 512 px", "SD 3.5 medium, 1024 px"


@functools.cache
def shrunk(name):
    return full_size(name, 1, CPU, tiny=True)


def column(table, i):
    return {cells[1].strip(): cells[i].strip() for cells in _cells(table)}


def _cells(table):
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    return rows[2:]


def test_a_table_is_replaced_and_others_stay(tmp_path):
    file = tmp_path / "page.md"
    chapters = [Chapter("One", "About.", {"a": "", "b / c": "C"}), Chapter("Two", "", {"d": ""})]
    write(file, {"a": "1"}, chapters)
    assert file.read_text().count(MISSING) == 2
    write(file, {"b / c": "2\n\n| 3 |"}, chapters)
    write(file, {"d": "4", "a": "5"}, chapters)
    found = re.findall(r"<!-- ((?!/)[^\n]+) -->\n(.*?)\n<!-- / -->", file.read_text(), re.DOTALL)
    assert found == [("a", "5"), ("b / c", "2\n\n| 3 |"), ("d", "4")]
    assert file.read_text().count("About.") == file.read_text().count("### C") == 1


def test_the_page_has_a_place_for_every_table():
    page = (Path(__file__).parent.parent / "BENCHMARKS.md").read_text(encoding="utf-8")
    keys = [key for chapter in CHAPTERS for key in chapter.tables]
    assert re.findall(r"<!-- ((?!/).+) -->", page) == keys
    measured = on_gpu(CPU, True, 1, list(ARCHITECTURES))
    assert [key for key in keys if " / " in key] == list(measured)


def test_rounds_end_when_time_is_up(monkeypatch):
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert list(Effort(5)) == [0, 1, 2, 3, 4]
    assert list(Effort(9, seconds=35.0)) == [0, 1, 2, 3, 4]
    assert list(Effort(9, seconds=5.0)) == [0, 1]
    assert list(Effort(1, seconds=5.0)) == [0]


def test_contestants_take_turns():
    calls = []
    contestants = {name: functools.partial(calls.append, name) for name in "ab"}
    times = interleaved(contestants, Effort(3), CPU)
    assert {len(each.rounds) for each in times.values()} == {3}
    order = [name for name, _ in itertools.groupby(calls)]
    assert order == list("ababab")  # to warm up a b, then a b, b a and a b
    assert isinstance(times["a"].over(times["b"]), Ratio)


def test_refusals_are_part_of_the_answer():
    subject = shrunk(SD35)
    methods = {"cfg": CFG(), "nasa": NASA(), "linear-ag": LinearAG(table=[[]])}
    for table in (
        overhead.section([subject], methods, 2, Effort(1)),
        compiled.section(subject, methods, 2),
    ):
        second = column(table, 2 if "graphs" in table else 3)
        assert re.match(r"[\d.]", second["cfg"])
        assert second["nasa"].startswith("refused: ")
        assert second["linear-ag"].startswith("refused: ")


def test_rows_are_counted_without_the_first_step():
    table = overhead.section([shrunk(SD15)], {"apg": APG(), "pag": CFG() + PAG()}, 3, Effort(1))
    assert column(table, 2) == {"none": "", "apg": "2.0", "pag": "3.0"}


def test_savings_are_what_rows_promise():
    table = savings.section(shrunk(SD15), 4, Effort(1), bundled=False)
    promised = column(table, 3)
    assert float(promised["CFG"]) == 1
    assert float(promised["scale 1"]) == 0.5
    assert float(promised["cut-off after half of the steps"]) == 0.75


def test_peak_memory_is_that_of_the_worst_moment():
    def three():
        a = torch.ones(2**20)
        b = a + 1
        del a
        return torch.cat([b, b])

    found = passes.peak(functools.partial(three), CPU)
    assert found == pytest.approx(3 * 4 * 2**20, rel=0.01)


def test_methods_of_any_model_are_of_any_model():
    assert set(of_any_model(heavy=True)) < set(of_any_model())
