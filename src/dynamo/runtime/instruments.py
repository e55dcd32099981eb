"""How is something counted in tens of nanoseconds?

`prometheus_client` takes a lock for each increment and walks a histogram's buckets one by one: about 0.4 µs and
1.5 µs, paid for every token. Here a counter is an attribute and a histogram a bisect; the exposition format is
made when somebody scrapes. The calls are those of `prometheus_client` (`labels`, `inc`, `set`, `observe`).

An instrument belongs to one thread, normally that of the event loop: increments from several may get lost.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from prometheus_client import Metric

LabelPairs = tuple[tuple[str, str], ...]
"""Label names and values in the order in which they are shown."""

Kind = Literal["counter", "gauge", "histogram"]

_METRIC_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME: Final = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")  # names with two underscores are Prometheus' own


class Counter:
    """Goes up. In hot code `counter.value += n` is allowed and saves the call."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Add `amount`, which must not be negative."""
        self.value += amount


class Gauge:
    """Goes up and down. `value` may be set directly."""

    __slots__ = ("_function", "value")

    def __init__(self) -> None:
        self.value: float = 0
        self._function: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        self.value = value

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        self.value -= amount

    def set_function(self, function: Callable[[], float]) -> None:
        """Ask `function` at each scrape instead of keeping a value."""
        self._function = function

    def read(self) -> float:
        """The value now."""
        return self.value if self._function is None else self._function()


class Histogram:
    """Counts observations by bucket. `bounds` are the buckets' upper ends, ascending, without +Inf."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum: float = 0.0

    def observe(self, value: float) -> None:
        """Count `value` in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: Sequence[float]) -> None:
        """`observe` each of them, for less."""
        counts, bounds = self.counts, self.bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.sum += sum(values)

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self.counts)


Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)


class Family(Generic[Instrument]):
    """All series of one metric name. Get a series once with `labels`, keep it, and count on it."""

    def __init__(
        self,
        name: str,
        help: str,  # noqa: A002 - Prometheus' word
        kind: Kind,
        make: Callable[[], Instrument],
        label_names: Sequence[str] = (),
        base: LabelPairs = (),
    ) -> None:
        if not _METRIC_NAME.fullmatch(name):
            raise ValueError(f"metric name {name!r} must match {_METRIC_NAME.pattern}")
        for label in (*(k for k, _ in base), *label_names):
            if not _LABEL_NAME.fullmatch(label):
                raise ValueError(f"label name {label!r} of metric {name!r} must match {_LABEL_NAME.pattern}")
        self.name = name
        self.help = help
        self.kind: Kind = kind
        self.label_names = tuple(label_names)
        self.base = base
        self.make: Callable[[], Instrument] = make
        self._series: dict[LabelPairs, Instrument] = {}

    def labels(self, *values: object, **named: object) -> Instrument:
        """The series with these label values, made if new. Values by position or by name, one for each label.

        Raises ValueError naming the metric and its labels when they do not fit.
        """
        if named and not values and len(named) == len(self.label_names) and all(k in named for k in self.label_names):
            values = tuple(named[k] for k in self.label_names)
        elif named or len(values) != len(self.label_names):
            raise ValueError(f"metric {self.name!r} takes the labels {list(self.label_names)}")
        return self.series((*self.base, *((k, str(v)) for k, v in zip(self.label_names, values, strict=True))))

    def series(self, pairs: LabelPairs) -> Instrument:
        """The series with exactly these labels: those of one family may have further ones of their own."""
        found = self._series.get(pairs)
        if found is None:
            found = self._series[pairs] = self.make()
        return found

    def adopt(self, pairs: LabelPairs, instrument: Instrument) -> None:
        """Show an instrument that its owner counts on, under these labels, until they are dropped."""
        self._series[pairs] = instrument

    def share(self, other: "Family[Instrument]") -> None:
        """Keep series where `other` keeps them: two views of one name, with different base labels."""
        self._series = other._series

    @property
    def has_series(self) -> bool:
        """Whether there is anything to show."""
        return bool(self._series)

    def drop(self, pairs: LabelPairs) -> None:
        """Forget a series: its subject is gone."""
        self._series.pop(pairs, None)

    def clear(self) -> None:
        """Forget all series."""
        self._series.clear()

    def collect(self) -> "Metric":
        """This family as `prometheus_client` exposes it, with the values of now."""
        from prometheus_client import Metric

        name = self.name.removesuffix("_total") if self.kind == "counter" else self.name
        metric = Metric(name, self.help, self.kind)
        for pairs, instrument in list(self._series.items()):
            labels = dict(pairs)
            if isinstance(instrument, Histogram):
                for suffix, extra, value in _histogram_samples(instrument):
                    metric.add_sample(f"{self.name}{suffix}", {**labels, **extra}, value)
            elif isinstance(instrument, Gauge):
                metric.add_sample(self.name, labels, instrument.read())
            else:
                metric.add_sample(self.name, labels, instrument.value)
        return metric


def _histogram_samples(histogram: Histogram) -> Iterator[tuple[str, Mapping[str, str], float]]:
    below = 0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        below += count
        yield "_bucket", {"le": f"{bound:.12g}"}, below
    total = below + histogram.counts[-1]
    yield "_bucket", {"le": "+Inf"}, total
    yield "_count", {}, total
    yield "_sum", {}, histogram.sum


def label_pairs(pairs: Iterable[tuple[str, object]] | Mapping[str, object] | None) -> LabelPairs:
    """User-given labels, checked. Raises ValueError for a name that Prometheus does not take."""
    items = pairs.items() if isinstance(pairs, Mapping) else (pairs or ())
    checked = tuple((str(k), str(v)) for k, v in items)
    for name, _ in checked:
        if not _LABEL_NAME.fullmatch(name):
            raise ValueError(f"metrics_labels: label name {name!r} must match {_LABEL_NAME.pattern}")
    return checked
