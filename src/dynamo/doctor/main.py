"""What does `dynamo doctor` do? It looks at this machine, or with --workers at those that serve."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dynamo.doctor.gather import gather
from dynamo.doctor.judge.checks import judge
from dynamo.doctor.judge.verdict import Check
from dynamo.doctor.matrix import FILE, read_matrix
from dynamo.doctor.sources import Wanted, sources
from dynamo.runtime.options import OptionParser

TIMEOUT_S = 10.0
WIDTH = 160  # of a table that goes into a file or a pipe

DESCRIPTION = (
    "Will this machine run Dynamo, and with what? Exit status: 0 it will, 1 something is unsupported, "
    "2 it could not be told."
)


def examine(wanted: Wanted, timeout_s: float = TIMEOUT_S, matrix_file: Path = FILE) -> list[Check]:
    """All checks of this machine, within `timeout_s`."""
    matrix = read_matrix(matrix_file)
    return judge(gather(sources(matrix, wanted), timeout_s), matrix)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    args = parser.parse(argv)
    if not args.timeout > 0:
        parser.error("--timeout must be more than 0 seconds")
    if args.workers:
        if args.json:
            parser.error("--json is for the machine's table, not for --workers")
        from dynamo.doctor.workers import show

        return show(args.discovery_backend, parser)
    return _machine(Wanted(args.discovery_backend, args.model, args.offline), args.timeout, args.json)


def _parser() -> OptionParser:
    parser = OptionParser("dynamo doctor", DESCRIPTION)
    what = parser.add_argument_group("what is asked")
    parser.option(
        what, "--workers", type=bool, default=False,
        help="only who is there, which model each serves, and whether it answers; exit status 1 if one does not",
    )  # fmt: skip
    parser.option(what, "--model", metavar="MODEL", default="", help="can this model be had: a directory or hub name")
    parser.option(what, "--offline", type=bool, default=False, help="ask nothing but this machine")
    parser.option(
        what, "--discovery-backend", env="DYN_DISCOVERY_BACKEND", metavar="NAME",
        help="which discovery to look into for workers: file or etcd",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    parser.option(how, "--json", type=bool, default=False, help="for programs: one JSON object")
    parser.option(how, "--timeout", type=float, default=TIMEOUT_S, metavar="S", help="seconds for all checks together")
    return parser


def _machine(wanted: Wanted, timeout_s: float, json: bool) -> int:
    checks = examine(wanted, timeout_s)
    from dynamo.doctor import report  # draws in rich, which loads while nothing waits for it

    if json:
        print(report.as_json(checks))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        report.show(checks, console)
    return report.exit_status(checks)
