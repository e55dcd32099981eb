"""What does the model's maker recommend where a request is silent?"""

from pathlib import Path

import msgspec

from dynamo.llm.tokenizer_config import read_json_object


class GenerationDefaults(msgspec.Struct, frozen=True):
    """Values of `generation_config.json` that stand in for fields a request leaves out.

    These are the fields vLLM's server takes from the file too. `do_sample` is not among them: a request without
    a temperature samples, as everywhere in OpenAI's API. Values out of range are left out.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """Read `generation_config.json`; a missing file recommends nothing.

    Raises:
        InvalidArgument: the file is there and is not a JSON object.
    """
    config = read_json_object(directory / "generation_config.json")
    top_k = _number(config.get("top_k"), 0, 2**31 - 1)
    limit = _number(config.get("max_new_tokens"), 1, 2**31 - 1)
    return GenerationDefaults(
        temperature=_number(config.get("temperature"), 0, 2),
        top_p=_number(config.get("top_p"), 1e-9, 1),
        top_k=None if top_k is None else int(top_k),
        min_p=_number(config.get("min_p"), 0, 1),
        repetition_penalty=_number(config.get("repetition_penalty"), 1e-9, 2),
        max_new_tokens=None if limit is None else int(limit),
    )


def _number(value: object, low: float, high: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return None
    return value
