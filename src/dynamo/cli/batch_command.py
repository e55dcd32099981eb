"""How is a batch shown in a terminal while it runs, and what is said at its end?"""

import asyncio
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dynamo.cli.batch import Settings, Summary, journal_path, output_path, run_batch
from dynamo.cli.children import Children

EXIT_DONE, EXIT_INTERRUPTED = 0, 130


def show_batch(source: Path, settings: Settings, children: Children, console: Console) -> int:
    """Answer `source` with a progress bar on `console`; prints the output's path and returns the exit status.

    Raises:
        BatchError: the journal belongs to other work, or is in use.
        ChildDied: a process ended meanwhile; what was done is kept.
        OSError: the disk is full.
    """
    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[rate]}")
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("lines", rate="", total=None)

        def step(done: int, lines: int, tokens: int) -> None:
            elapsed = progress.tasks[0].elapsed or 0
            rate = f"{tokens / elapsed:.0f} tokens/s" if elapsed else ""
            progress.update(task, completed=done, total=lines, rate=rate)

        async def answer_all() -> Summary:
            me, loop = asyncio.current_task(), asyncio.get_running_loop()
            assert me is not None

            def cancel() -> None:
                loop.call_soon_threadsafe(me.cancel)

            children.on_death(cancel)
            return await run_batch(source, settings, step)

        try:
            summary = asyncio.run(answer_all())
        except asyncio.CancelledError:
            children.check()  # the reason
            raise
        except KeyboardInterrupt:
            console.print(f"stopped; {journal_path(source)} has what is done: the same command goes on from there")
            return EXIT_INTERRUPTED
    new = summary.lines - summary.resumed
    console.print(
        f"{new} lines answered in {summary.seconds:.1f} s, {summary.resumed} were there before, "
        f"{summary.failed} failed; {summary.prompt_tokens} tokens in, {summary.completion_tokens} out, "
        f"{summary.tokens_per_s:.1f} tokens/s out",
        highlight=False,
    )
    print(output_path(source))
    return EXIT_DONE
