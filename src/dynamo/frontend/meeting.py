"""Where do a prefill and a decode worker meet that are asked at the same time? (bootstrap handoff, facts G9)

SGLang's engines hand KV over so: the decode worker connects to the prefill worker's bootstrap port, names a *room*, and
takes the KV as it is computed. Whoever sends the prompt to both makes the number up.
"""

import random
from typing import Any

from dynamo.llm.model_card import ModelRuntimeConfig

MAX_ROOM = 2**63  # what SGLang draws from: it counts rooms in 64 bits with a sign


def new_room(config: ModelRuntimeConfig, dp_rank: int | None) -> dict[str, Any] | None:
    """`bootstrap_info` for one prompt, by the prefill worker's card; None if it names no port.

    SGLang's decode worker looks for the KV at rank `room % ranks`, so that is the rank that computes the prompt.
    """
    if config.bootstrap_host is None or config.bootstrap_port is None:
        return None
    room = random.randrange(MAX_ROOM)
    if dp_rank is not None and (ranks := config.data_parallel_size) > 1:
        room = random.randrange(MAX_ROOM // ranks) * ranks + dp_rank % ranks
    return {"bootstrap_host": config.bootstrap_host, "bootstrap_port": config.bootstrap_port, "bootstrap_room": room}
