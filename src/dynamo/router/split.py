"""Should a prompt be computed by a prefill worker, or by the decode worker itself? (conditional disaggregation, [G13])

A prefill worker keeps a long prompt away from requests that are being answered; its KV cache has to travel. Short
prompts, and those of which the decode worker holds most already (the next turn of a conversation, "append-prefill"),
are computed sooner where they are.

What decides is the effective length: the prompt's tokens less those that the best decode worker has cached.
"""

from collections.abc import Mapping
from typing import ClassVar, Protocol

import msgspec

from dynamo.router.config import KvRouterConfig

STALL = 3.5  # What a second of standing still costs each request in decode, in seconds of waiting for a first token, at
# a worker whose blocks are all held; less where fewer are. 0.7 everywhere lets nothing stay at low load, 0.15 too much
# at high load (benchmarks/replay_disagg.py).


class SplitView(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, and the two pools as they stand. Tokens and seconds; loads are shares of what a worker can take."""

    prompt_tokens: int
    decode_new_tokens: int
    """Tokens that the decode worker would have to compute: the effective length."""
    prefill_new_tokens: int
    """Tokens that the prefill worker would have to compute."""
    prefill_load: float
    """Queued prompt tokens of the prefill worker, in its largest batches."""
    decode_load: float
    """Share of the decode worker's KV blocks that active requests hold."""
    prefill_queued_tokens: int = 0
    decode_queued_tokens: int = 0
    decoding: int = 0
    """Requests past their first token at the decode worker, which a prompt there would hold up."""
    step_s: float = 0.0
    """Seconds that computing any prompt takes, however short."""
    token_s: float = 1e-4
    """Seconds to compute a prompt token, as learnt from the fleet."""
    transfer_s: float = 0.0
    """Seconds that the KV cache takes to travel."""


class Split(msgspec.Struct, frozen=True):
    """What was decided, and why: `cause` in a word, for counting; `reason` in a sentence with numbers."""

    remote: bool
    cause: str
    reason: str
    terms: Mapping[str, float] = {}


class SplitPolicy(Protocol):
    """Decides for one prompt. Has no state of its own, so that settings may be exchanged at any time."""

    name: ClassVar[str]

    def decide(self, view: SplitView) -> Split:
        """Whether a prefill worker is to compute the prompt."""
        ...


class Always:
    """Every prompt travels: what is done where nothing is asked for."""

    name: ClassVar[str] = "always"

    def __init__(self, config: KvRouterConfig) -> None:
        del config

    def decide(self, view: SplitView) -> Split:
        """See `SplitPolicy`."""
        del view
        return Split(True, "always", "every prompt is computed by a prefill worker")


class Bounding:
    """Local where little is to be computed, or little of the prompt."""

    name: ClassVar[str] = "isl_bounding"

    def __init__(self, config: KvRouterConfig) -> None:
        self.threshold = config.conditional_disagg_eff_isl_threshold
        self.ratio = config.conditional_disagg_eff_isl_ratio_threshold

    def decide(self, view: SplitView) -> Split:
        """See `SplitPolicy`."""
        new, ratio = view.decode_new_tokens, view.decode_new_tokens / max(view.prompt_tokens, 1)
        terms = {"effective_tokens": new, "effective_ratio": ratio}
        if new <= self.threshold:
            return Split(False, "short", f"{new} tokens to compute are at most {self.threshold}", terms)
        if ratio <= self.ratio:
            words = f"only {ratio:.2f} of the prompt is to be computed, at most {self.ratio:g}"
            return Split(False, "cached", words, terms)
        return Split(True, "long", f"{new} tokens to compute", terms)


class Load:
    """Local while the prefill pool is busy, unless the decode pool is too."""

    name: ClassVar[str] = "prefill_load"

    def __init__(self, config: KvRouterConfig) -> None:
        self.prefill_busy = config.conditional_disagg_prefill_busy_threshold
        self.decode_busy = config.conditional_disagg_decode_busy_threshold

    def decide(self, view: SplitView) -> Split:
        """See `SplitPolicy`."""
        terms = {"prefill_load": view.prefill_load, "decode_load": view.decode_load}
        queued = f"the prefill worker has {view.prefill_load:.2f} batches queued"
        if self.prefill_busy is None or view.prefill_load <= self.prefill_busy:
            return Split(True, "prefill_free", queued, terms)
        if self.is_decode_busy(view):
            words = f"prefill is busy, and decode too with {view.decode_load:.2f} of its blocks"
            return Split(True, "both_busy", words, terms)
        return Split(False, "prefill_busy", f"{queued}, which is busy", terms)

    def is_decode_busy(self, view: SplitView) -> bool:
        """Whether the decode worker must not be given prompts too."""
        return self.decode_busy is not None and view.decode_load > self.decode_busy


class BoundingOrLoad:
    """Local if either rule says so, unless the decode pool is busy."""

    name: ClassVar[str] = "isl_or_load"

    def __init__(self, config: KvRouterConfig) -> None:
        self._bounding, self._load = Bounding(config), Load(config)

    def decide(self, view: SplitView) -> Split:
        """See `SplitPolicy`."""
        if self._load.is_decode_busy(view):
            terms = {"decode_load": view.decode_load}
            return Split(True, "decode_busy", f"decode is busy with {view.decode_load:.2f} of its blocks", terms)
        by_length = self._bounding.decide(view)
        return by_length if not by_length.remote else self._load.decide(view)


class Predicted:
    """Where the prompt costs everybody less time: its own client's wait, and that of those it would hold up.

    The fuller a decode worker is, the longer its steps take and the less it can make up for standing still.
    """

    name: ClassVar[str] = "predicted"

    def __init__(self, config: KvRouterConfig) -> None:
        del config

    def decide(self, view: SplitView) -> Split:
        """See `SplitPolicy`."""
        here = view.step_s + view.decode_new_tokens * view.token_s
        stalled = STALL * view.decode_load * here * view.decoding
        local = view.decode_queued_tokens * view.token_s + here + stalled
        there = view.step_s + (view.prefill_queued_tokens + view.prefill_new_tokens) * view.token_s
        remote = there + view.transfer_s
        terms = {"local_s": local, "local_stall_s": stalled, "remote_s": remote, "transfer_s": view.transfer_s}
        words = f"{remote:.3f} s by a prefill worker, {local:.3f} s at the decode worker, of which {stalled:.3f} stalls"
        return Split(remote < local, "cheaper_remote" if remote < local else "cheaper_local", words, terms)


POLICIES: dict[str, type[Always | Bounding | Load | BoundingOrLoad | Predicted]] = {
    policy.name: policy for policy in (Always, Bounding, Load, BoundingOrLoad, Predicted)
}


def split_policy(config: KvRouterConfig) -> SplitPolicy:
    """The policy that the settings ask for."""
    return POLICIES[config.conditional_disagg_policy if config.conditional_disagg_enabled else Always.name](config)
