"""How are checks shown: to people, to machines, in a document?"""

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dynamo import __version__
from dynamo.doctor.judge.verdict import Check

FIT, UNFIT, UNSURE = 0, 1, 2
_COLOURS = {"supported": "green", "experimental": "yellow", "unsupported": "red", "unknown": "magenta"}
_SAID = {
    FIT: "This machine will run Dynamo.",
    UNFIT: "This machine will not run all of Dynamo as it is.",
    UNSURE: "Whether this machine will run Dynamo could not be told.",
}


class Report(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    version: str
    exit_status: int
    checks: list[Check]


def exit_status(checks: Sequence[Check]) -> int:
    """1 if something that counts is unsupported; else 2 if something that counts is unknown; else 0."""
    counting = {check.verdict for check in checks if not check.optional}
    return UNFIT if "unsupported" in counting else UNSURE if "unknown" in counting else FIT


def as_json(checks: Sequence[Check]) -> str:
    """One JSON object, indented."""
    report = Report(__version__, exit_status(checks), list(checks))
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def show(checks: Sequence[Check], console: Console) -> None:
    """A table, and below it what to do."""
    table = Table("", "here", "", "why", box=None, header_style="bold", pad_edge=False)
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            table.add_row(f"[bold]{escape(group)}[/bold]", "", "", "")
        colour = _COLOURS[check.verdict]
        table.add_row(
            f"  {escape(check.title)}", escape(check.value), f"[{colour}]{check.verdict}[/]", escape(check.why)
        )
    console.print(table)
    for check in checks:
        if check.fix:
            console.print(f"[bold]{escape(check.title)}[/bold]: {escape(check.fix)}", highlight=False, soft_wrap=True)
    console.print(_SAID[exit_status(checks)], highlight=False)


def as_markdown(checks: Sequence[Check]) -> str:
    """The table for a document."""
    lines = ["| what | here | verdict | why | what to do |", "|---|---|---|---|---|"]
    for c in checks:
        cells = (c.title, c.value, c.verdict, c.why, f"`{c.fix}`" if c.fix else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
