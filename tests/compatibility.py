"""What works with what, recorded by the tests that show it, as tables for the README.

    python -m tests.compatibility --write README.md

runs the tests that call `record`, and writes each table between its markers, which are
`<!-- compatibility: NAME -->` and `<!-- /compatibility: NAME -->`. Nothing is written if one fails.
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
    """A table in Markdown; a cell that holds several outcomes shows them all."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [[name, *columns], ["---"] * (len(columns) + 1)]
    for row, cells in table.items():
        lines.append([row, *(", ".join(cells.get(column, [])) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def insert(text: str, name: str, table: str) -> str:
    """`text` with `table` between the markers of that name."""
    opening, closing = f"<!-- compatibility: {name} -->", f"<!-- /compatibility: {name} -->"
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (start and end):
        raise SystemExit(f"there is no place for this table: add {opening} and {closing}")
    return f"{before}{opening}\n{table}\n{closing}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of what works with what.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="default: print the tables")
    parser.add_argument("--records", type=Path, help="use these records and run no tests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records = options.records or Path(folder, "records.jsonl")
        if options.records is None:
            run_tests(records)
        found = tables(records.read_text(encoding="utf-8").splitlines())
    written = {name: markdown(name, table) for name, table in found.items()}
    if options.write is None:
        print("\n\n".join(written.values()))
        return
    text = options.write.read_text(encoding="utf-8")
    for name, table in written.items():
        text = insert(text, name, table)
    options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
