#!/usr/bin/env python3
"""What is supported? Writes docs/reference/support_matrix.md from src/dynamo/doctor/matrix.toml.

usage: scripts/support_matrix.py [--check | --doctor | --wheels]

--doctor also puts what `dynamo doctor` says of this machine into the page, --wheels what scripts/check_wheels.py says
(ten minutes, asks the package index). With --check nothing is written; the exit status is 1 if the page is not up to
date. What was put into the page earlier stays.
"""

import argparse
import subprocess
import sys
from itertools import groupby
from pathlib import Path

from dynamo.doctor.main import examine
from dynamo.doctor.matrix import Matrix, Package, Row, read_matrix
from dynamo.doctor.report import as_markdown
from dynamo.doctor.sources import Wanted

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "support_matrix.md"
HEAD = """\
# Support matrix

Written by `make docs` from `src/dynamo/doctor/matrix.toml`, by which `dynamo doctor` judges too; do not edit.
*Supported*: the tests run there. *Experimental*: it should work, and nobody has shown it. *Unsupported*: it does not.
The last column is what ai-dynamo 0.1.0 published.

`dynamo doctor` says which rows are this machine's, and what to do about them:
[how to read it](../how-to/install.md#will-it-run-here).
"""
PACKAGES = """\
## Dependencies

All tests run with the newest of the day. All at their lowest, 2,353 tests of runtime, llm, router and frontend ran, and
passed (the rest of the frontend's, the engine's and the mocker's were not reached).
"""
WHEELS = """\
## Wheels of the dependencies

What `scripts/check_wheels.py` said: packages, with all that they need in turn, that have a wheel for glibc 2.28.
"""
NOT_YET = "Not put in yet: `python scripts/support_matrix.py --wheels`.\n"
DOCTOR = """\
## The machine that this was written on

What `dynamo doctor` said there (`make doctor`).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--doctor", action="store_true")
    parser.add_argument("--wheels", action="store_true")
    args = parser.parse_args()
    old = PAGE.read_text() if PAGE.exists() else ""
    pasted = {name: between(old, name) for name in ("wheels", "doctor")}
    if args.doctor:
        pasted["doctor"] = as_markdown(examine(Wanted(), timeout_s=60))  # patient: the page is kept
    if args.wheels:
        script = [sys.executable, str(ROOT / "scripts" / "check_wheels.py"), "--markdown"]
        pasted["wheels"] = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True).stdout
    text = page(read_matrix(), pasted)
    if not args.check:
        PAGE.write_text(text)
        return 0
    if old == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)} is not up to date: run make docs")
    return 1


def page(matrix: Matrix, pasted: dict[str, str]) -> str:
    """The whole page; `pasted` is what other programs said, by the name of its marker."""
    parts = [HEAD]
    for group, rules in groupby(matrix.rules().items(), lambda item: item[1].group):
        parts.append(f"## {group.capitalize()}\n\n{HEADS}")
        for _, rule in rules:
            for i, row in enumerate(rule.rows):
                what = f"{rule.title}: {name_of(row, rule.unit)}"
                parts[-1] += line(what, row.status, row.why, rule.upstream if i == 0 else "")
    items = "".join(line(item.what, item.status, item.why, item.upstream) for item in matrix.items)
    parts.append(f"## Distribution\n\n{HEADS}{items}")
    parts.append(PACKAGES + "\n" + packages(matrix.packages))
    parts.append(WHEELS + "\n" + marked("wheels", pasted["wheels"] or NOT_YET))
    parts.append(DOCTOR + "\n" + marked("doctor", pasted["doctor"]))
    return "\n".join(parts)


HEADS = "| what | status | why | ai-dynamo 0.1.0 |\n|---|---|---|---|\n"


def line(what: str, status: str, why: str, upstream: str) -> str:
    return f"| {what} | {status} | {why} | {upstream} |\n"


def name_of(row: Row, unit: str) -> str:
    """What a row is for, in words."""
    if not row.at_least:
        return row.what or ("any other" if row.name == "*" else row.name)
    amount = f"{row.at_least} {unit}".strip()
    span = f"from {amount} on" if row.at_least != "0" else "less"
    return row.what.format(span=span) if row.what else span


def packages(known: tuple[Package, ...]) -> str:
    """The table of ranges, and of the versions that were run."""
    text = "| package | for | range | lowest run | highest run |\n|---|---|---|---|---|\n"
    for p in known:
        span = f"from {p.at_least} on" + (f", below {p.below}" if p.below else "")
        text += (
            f"| {p.name} | {f'`[{p.extra}]`' if p.extra else 'core'} | {span} | {p.lowest_run} | {p.highest_run} |\n"
        )
    return text


def marked(name: str, text: str) -> str:
    return f"<!-- {name}: begin -->\n{text}<!-- {name}: end -->\n"


def between(text: str, name: str) -> str:
    """What stands between a name's markers; empty where there are none."""
    _, _, rest = text.partition(f"<!-- {name}: begin -->\n")
    inner, end, _ = rest.partition(f"<!-- {name}: end -->")
    return inner if end else ""


if __name__ == "__main__":
    raise SystemExit(main())
