"""What does `dynamo replay` do? Run the experiments, show the table, write the reports."""

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo.replay.api import record_writer
from dynamo.replay.args import ReplayOptions, parse_options
from dynamo.replay.compare import PROGRESS_S, RunError, run_all
from dynamo.replay.experiment import Experiment, Outcome
from dynamo.replay.page import page
from dynamo.replay.progress import Bars, every
from dynamo.replay.table import table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m dynamo.replay`; returns the exit status."""
    options = parse_options(argv)
    experiments = options.experiments
    try:
        with Bars(
            [experiment.policy for experiment in experiments],
            experiments[0].expected_requests(),
            shown=not options.quiet,
        ) as bars:
            if len(experiments) == 1:
                outcomes = [_run_here(experiments[0], options.jsonl_path, bars)]
            else:
                outcomes = run_all(experiments, jobs=options.jobs, on_progress=bars.at)
    except (ValueError, RunError, OSError) as e:
        sys.stderr.write(f"dynamo replay: {e}\n")
        return 1
    sys.stdout.write(table(outcomes) + "\n")
    _write(options, outcomes)
    return 0


def _run_here(experiment: Experiment, jsonl_path: Path | None, bars: Bars) -> Outcome:
    progress = every(PROGRESS_S, lambda done, clock_s: bars.at(0, done, clock_s))
    if jsonl_path is None:
        return experiment.run(on_progress=progress)
    with jsonl_path.open("w", encoding="utf-8") as file:
        return experiment.run(on_progress=progress, on_record=record_writer(file))


def _write(options: ReplayOptions, outcomes: Sequence[Outcome]) -> None:
    if options.json_path is not None:
        options.json_path.write_bytes(msgspec.json.format(msgspec.json.encode(outcomes)) + b"\n")
    if options.html_path is not None:
        experiment = options.experiments[0]
        name = ", ".join(Path(path).name for path in experiment.trace_files) or "synthetic load"
        pools = experiment.pools
        fleet = f"{experiment.num_workers} workers"
        if pools is not None:
            fleet = f"{pools.prefill_workers} prefill and {pools.decode_workers} decode workers"
        title = f"Replay of {name} on {fleet}"
        options.html_path.write_text(page(outcomes, title), encoding="utf-8")
