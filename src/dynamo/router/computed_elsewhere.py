"""How is a decode worker chosen, and booked, for a prompt that another worker has computed? [G8]"""

import msgspec

from dynamo.router.types import RouteRequest, RouterOverride

COMPUTED_ELSEWHERE = RouterOverride(overlap_score_credit=0, assume_kv_reuse=False, track_prefill_tokens=False)
"""Nothing of the prompt is to be computed, and its blocks come over for this request alone."""


def computed_elsewhere(request: RouteRequest) -> None:
    """Let the request be placed by load. What its client said of the same settings holds, as does all else it said."""
    own = request.override
    if own is None:
        request.override = COMPUTED_ELSEWHERE
    else:
        said = {name: value for name in own.__struct_fields__ if (value := getattr(own, name)) is not None}
        request.override = msgspec.structs.replace(COMPUTED_ELSEWHERE, **said)
    request.computed = True
