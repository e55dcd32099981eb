"""How long would KV take from one simulated worker to another?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_BANDWIDTH_GB_S = 64.0  # of a fast network between nodes; what the mocker of ai-dynamo assumes
DEFAULT_BYTES_PER_TOKEN = 131_072  # an 8-billion-parameter model with grouped queries, in 16 bit

_DTYPE_BYTES = {
    "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1,
}  # fmt: skip
DTYPES = ("auto", *_DTYPE_BYTES)


@dataclass(frozen=True, slots=True)
class TransferTiming:
    """`bandwidth_gb_s` 0 means that a transfer takes no time. `speedup_ratio` divides it as it does all times."""

    bytes_per_token: int = DEFAULT_BYTES_PER_TOKEN
    bandwidth_gb_s: float = DEFAULT_BANDWIDTH_GB_S
    speedup_ratio: float = 1.0

    def seconds(self, tokens: int) -> float:
        """For the KV of so many tokens."""
        if not self.bandwidth_gb_s or not self.speedup_ratio:
            return 0.0
        return tokens * self.bytes_per_token / (self.bandwidth_gb_s * 1e9) / self.speedup_ratio


def kv_bytes_per_token(directory: Path, dtype: str) -> int:
    """layers * 2 * KV heads * head size * bytes a number, by the model's config.json; DEFAULT_BYTES_PER_TOKEN where
    that does not say."""
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return DEFAULT_BYTES_PER_TOKEN
    config = config.get("text_config") or config
    try:
        heads = int(config["num_attention_heads"])
        head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        layers = int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return DEFAULT_BYTES_PER_TOKEN
    own = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    return layers * 2 * kv_heads * head_size * _DTYPE_BYTES.get(own if dtype == "auto" else dtype, 2)
