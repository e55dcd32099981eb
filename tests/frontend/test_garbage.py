"""A request leaves nothing for the garbage collector: cycles cost a tenth of a short request's time."""

import gc

import pytest

from tests.frontend.front_door import CHAT, Served, Wire, chat


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_leaves_no_cycle(served: Served, stream: bool) -> None:
    service, worker = served
    worker.auto = "some words"
    wire = await Wire.open(service.port)
    for _ in range(3):
        wire.post(CHAT, chat(stream=stream))
        await wire.read()
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            wire.post(CHAT, chat(stream=stream))
            await wire.read()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours = ("dynamo.frontend", "dynamo.llm", "aiohttp", "jinja2")  # the scripted worker has cycles of its own
        left = [item for item in gc.garbage if type(item).__module__.startswith(ours)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []
    wire.close()
