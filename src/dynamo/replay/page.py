"""What does a run look like? One HTML file with tables and plots that needs no network and no script."""

from collections.abc import Sequence
from html import escape
from typing import Any

from dynamo.replay.experiment import Outcome
from dynamo.replay.measures import Sample
from dynamo.replay.plots import STYLE, Axis, Series, plot
from dynamo.replay.table import COLUMNS, cell

_PAGE_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem}"
    "body{color:#222;background:#fff}"
    "h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}"
    "table{border-collapse:collapse}th,td{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}td.best{font-weight:600}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:1rem}"
    ".plots svg{width:100%;height:auto}dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}"
    "dt{color:#666}dd{margin:0}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}th,td{border-color:#444}dt{color:#999}}"
)


def page(outcomes: Sequence[Outcome], title: str = "Replay") -> str:
    """The report of one run, or of several on the same workload."""
    sections = [
        f"<h1>{escape(title)}</h1>",
        _table(outcomes),
        "<h2>Latency</h2>",
        _grid(_latencies(outcomes)),
        "<h2>Over time</h2>",
        _grid(_hit_rates(outcomes)),
    ]
    for outcome in outcomes:
        if len(outcomes) > 1:
            sections.append(f"<h2>Load of each worker: {escape(outcome.policy)}</h2>")
        sections.append(_grid(_loads(outcome)))
    sections += ["<h2>Settings</h2>", _settings(outcomes[0].settings)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_PAGE_STYLE}{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _grid(plots: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(plots)}</div>'


def _table(outcomes: Sequence[Outcome]) -> str:
    head = "".join(f"<th>{escape(column.title)}</th>" for column in COLUMNS)
    rows = []
    for outcome in outcomes:
        cells = [f"<td>{escape(outcome.policy)}</td>"]
        for column in COLUMNS[1:]:
            values = [other.summary.get(column.key) for other in outcomes]
            known = [value for value in values if value is not None]
            mine = outcome.summary.get(column.key)
            best = column.best(known) if column.best and len(outcomes) > 1 and known else None
            mark = ' class="best"' if best is not None and mine == best else ""
            cells.append(f"<td{mark}>{cell(column, mine)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _latencies(outcomes: Sequence[Outcome]) -> list[str]:
    titles = {
        "ttft": "Time to first token",
        "tpot": "Time per output token",
        "e2e": "Time to last token",
    }
    share = Axis("share of requests", low=0.0, high=1.0)
    return [
        plot(
            title,
            [Series(outcome.policy, outcome.curves[name]) for outcome in outcomes],
            Axis("milliseconds", log=True),
            share,
        )
        for name, title in titles.items()
    ]


def _hit_rates(outcomes: Sequence[Outcome]) -> list[str]:
    seconds = Axis("seconds", low=0.0)
    hits = [Series(outcome.policy, hit_rate(outcome.samples)) for outcome in outcomes]
    waiting = [
        Series(outcome.policy, [(sample.at_s, sum(sample.waiting)) for sample in outcome.samples])
        for outcome in outcomes
    ]
    return [
        plot("Prompt tokens found in the cache", hits, seconds, Axis("share", low=0.0, high=1.0)),
        plot("Requests waiting, all workers", waiting, seconds, Axis("requests", low=0.0)),
    ]


def hit_rate(samples: Sequence[Sample], window: int = 20) -> list[tuple[float, float]]:
    """(second, share of the prompt tokens of requests started in the last `window` samples that were cached)."""
    points = []
    for i, sample in enumerate(samples):
        recent = samples[max(0, i + 1 - window) : i + 1]
        tokens = sum(one.prompt_tokens for one in recent)
        if tokens:
            points.append((sample.at_s, sum(one.cached_tokens for one in recent) / tokens))
    return points


def _loads(outcome: Outcome) -> list[str]:
    seconds, samples = Axis("seconds", low=0.0), outcome.samples
    workers = range(len(samples[0].running)) if samples else range(0)

    def lines(of: Any) -> list[Series]:
        return [Series(f"worker {w}", [(sample.at_s, of(sample, w)) for sample in samples]) for w in workers]

    active = lines(lambda sample, w: sample.running[w] + sample.waiting[w])
    share = lines(lambda sample, w: sample.kv_share[w])
    return [
        plot("Requests at each worker", active, seconds, Axis("requests", low=0.0)),
        plot("KV cache in use at each worker", share, seconds, Axis("share", low=0.0, high=1.0)),
    ]


def _settings(settings: dict[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in settings.items())
    return f"<dl>{rows}</dl>"
