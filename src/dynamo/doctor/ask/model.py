"""Can this machine get at a model: is it a directory with all that is needed, or may it be fetched from the hub?"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from dynamo.doctor.ask.web import get
from dynamo.doctor.facts import Model

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken")
_WEIGHTS = ("*.safetensors", "*.bin")
_ANSWERS = {200: "on the hub", 401: "refused", 403: "refused", 404: "refused"}  # 401 also for names that do not exist


def model(name: str, limit_s: float, environ: Mapping[str, str] = os.environ) -> Model:
    """What is known of a model by its directory or hub name. Raises OSError if the hub does not answer."""
    if not name:
        return Model("", "not asked")
    path = Path(name).expanduser()
    if path.is_dir():
        return _directory(name, path)
    if path.exists() or not _HUB_NAME.fullmatch(name) or ".." in name:
        return Model(name, "no model", "neither a directory nor a name of the hub")
    snapshot = _cached(name, environ)
    if snapshot is not None:
        return Model(name, "in the cache", str(snapshot))
    if environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Model(name, "not in the cache", "HF_HUB_OFFLINE is set, and the cache does not have it")
    endpoint = environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return _on_the_hub(name, endpoint, environ.get("HF_TOKEN", ""), limit_s)


def _directory(name: str, path: Path) -> Model:
    if any(path.glob("*.gguf")) and not (path / "config.json").exists():
        return Model(name, "no model", "GGUF is not served in this version")
    missing = [] if (path / "config.json").exists() else ["config.json"]
    if not any(_has(path, pattern) for pattern in _TOKENIZERS):
        missing.append("a tokenizer")
    if missing:
        return Model(name, "no model", "it lacks " + " and ".join(missing))
    if not any(_has(path, pattern) for pattern in _WEIGHTS):
        return Model(name, "without weights")
    return Model(name, "complete")


def _has(path: Path, pattern: str) -> bool:
    return any(path.glob(pattern))


def _cached(name: str, environ: Mapping[str, str]) -> Path | None:
    """The newest snapshot in the hub's cache that has a configuration."""
    home = Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    configs = cache.glob(f"models--{name.replace('/', '--')}/snapshots/*/config.json")
    return max((config.parent for config in configs), key=lambda p: p.stat().st_mtime, default=None)


def _on_the_hub(name: str, endpoint: str, token: str, limit_s: float) -> Model:
    url = f"{endpoint.rstrip('/')}/api/models/{quote(name)}"
    status, _ = get(url, limit_s, {"Authorization": f"Bearer {token}"} if token else {})
    return Model(name, _ANSWERS.get(status, "strange answer"), f"{endpoint} answers {status}")
