"""What can an operator ask of a running vLLM engine beside requests?

Only what this engine, as it was built and started, really does: a route that cannot work is absent.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from dynamo.vllm.driver import Driver

Control = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def controls(driver: Driver, config: Any) -> dict[str, Control]:
    """Engine routes by name. Profiling needs `--profiler-config`, sleeping `--enable-sleep-mode` (CUDA only)."""
    routes: dict[str, Control] = {"control/reset_prefix_cache": _reset_prefix_cache(driver)}
    if config.profiler_config.profiler is not None:
        routes["control/start_profile"] = _profile(driver, start=True)
        routes["control/stop_profile"] = _profile(driver, start=False)
    if config.model_config.enable_sleep_mode:
        routes["control/sleep"] = _sleep(driver)
        routes["control/wake_up"] = _wake_up(driver)
    return routes


def _profile(driver: Driver, start: bool) -> Control:
    async def profile(body: dict[str, Any]) -> dict[str, Any]:
        await driver.control("profile", start)
        return {"status": "ok", "profiling": start}

    return profile


def _sleep(driver: Driver) -> Control:
    async def sleep(body: dict[str, Any]) -> dict[str, Any]:
        level = int(body.get("level", 1))
        await driver.control("sleep", level)
        return {"status": "ok", "level": level}

    return sleep


def _wake_up(driver: Driver) -> Control:
    async def wake_up(body: dict[str, Any]) -> dict[str, Any]:
        await driver.control("wake_up", body.get("tags"))
        return {"status": "ok"}

    return wake_up


def _reset_prefix_cache(driver: Driver) -> Control:
    async def reset(body: dict[str, Any]) -> dict[str, Any]:
        done = await driver.control("reset_prefix_cache")
        return {"status": "ok" if done else "busy", "reset": bool(done)}

    return reset
