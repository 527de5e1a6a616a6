"""What works with what, recorded by the tests that show it, as tables for the README.

    python -m tests.compatibility --write README.md

runs the tests that call `record`, and writes their tables between `<!-- compatibility -->` and
`<!-- /compatibility -->`. Nothing is written if a test fails. With `--methods` it is the table of
methods instead, between `<!-- methods -->` and `<!-- /methods -->`, and no test is run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from guidancekit import describe

VARIABLE = "GUIDANCEKIT_COMPATIBILITY"  # the file that a test run records to; unset: none
YES, REFUSED = "yes", "–"

Table = dict[str, dict[str, list[str]]]
"""The outcomes of each row in each column."""


def record(table: str, row: str, column: str, outcome: str = YES) -> None:
    """Note an outcome that the calling test has just shown; call it as its last line."""
    if path := os.environ.get(VARIABLE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([table, row, column, outcome]) + "\n")


def run_tests(records: Path) -> None:
    """Run the tests that record, into a file with one JSON list per line."""
    tests = Path(__file__).parent
    recording = [
        str(path)
        for path in sorted(tests.glob("test_*.py"))
        if re.search(r"^from compatibility import", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    command = [sys.executable, "-m", "pytest", "-q", *recording]
    subprocess.run(command, env={**os.environ, VARIABLE: str(records)}, check=True)


def tables(lines: Iterable[str]) -> dict[str, Table]:
    """Records by table, row and column, in the order in which they appeared."""
    found: dict[str, Table] = {}
    for line in lines:
        table, row, column, outcome = json.loads(line)
        outcomes = found.setdefault(table, {}).setdefault(row, {}).setdefault(column, [])
        if outcome not in outcomes:
            outcomes.append(outcome)
    return found


def markdown(name: str, table: Table) -> str:
    """A table in Markdown; a cell that holds several outcomes shows them all.

    A row "A, variant" that says the same as row "A" is only named there.
    """
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    variants: dict[str, list[str]] = {row: [] for row in table}
    for row in table:
        base, _, variant = row.partition(", ")
        if variant and table.get(base) == table[row]:
            variants[base].append(variant)
            del variants[row]
    lines = [[name, *columns], ["---"] * (len(columns) + 1)]
    for row, alike in variants.items():
        label = f"{row} (also {', '.join(alike)})" if alike else row
        lines.append([label, *(", ".join(table[row].get(column, [])) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(found: dict[str, Table]) -> str:
    """All tables, and what their cells mean."""
    legend = (
        f"`{YES}`: shown by a test. `{REFUSED}`: refused before the network is evaluated, with an "
        "error that says what to use instead. Written by `make compatibility` from a test run."
    )
    return "\n\n".join((*(markdown(name, table) for name, table in found.items()), legend))


def insert(text: str, content: str, place: str = "compatibility") -> str:
    """`text` with `content` between the markers of a place."""
    opening, closing = f"<!-- {place} -->", f"<!-- /{place} -->"
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (start and end):
        raise SystemExit(f"there is no place for the tables: add {opening} and {closing}")
    return f"{before}{opening}\n{content}\n{closing}{after}"


def recorded(records: Path | None) -> str:
    """The tables of a file of records; None: of a test run, now."""
    with tempfile.TemporaryDirectory() as folder:
        if records is None:
            records = Path(folder, "records.jsonl")
            run_tests(records)
        return section(tables(records.read_text(encoding="utf-8").splitlines()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of what works with what.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="default: print the tables")
    parser.add_argument("--records", type=Path, help="use these records and run no tests")
    parser.add_argument("--methods", action="store_true", help="the table of methods instead")
    options = parser.parse_args()
    place = "methods" if options.methods else "compatibility"
    content = describe.markdown() if options.methods else recorded(options.records)
    if options.write is None:
        print(content)
        return
    text = options.write.read_text(encoding="utf-8")
    options.write.write_text(insert(text, content, place), encoding="utf-8")


if __name__ == "__main__":
    main()
