"""In which languages can a server be sent tokens? One file a language; a new one is a file and a line here."""

from collections.abc import Sequence

from dynamo.attach.dialects.completions import Completions
from dynamo.attach.dialects.dialect import Dialect, Reader
from dynamo.attach.dialects.sglang_generate import SglangGenerate
from dynamo.attach.dialects.vllm_generate import VllmGenerate

__all__ = ["Dialect", "Reader", "dialects_of"]


def dialects_of(engine: str, model: str, max_model_len: int | None) -> Sequence[Dialect]:
    """The languages to try with an engine, best first. `model` is what the server calls the model."""
    if engine == "sglang":
        return [SglangGenerate(model)]
    return [VllmGenerate(model), Completions(model, max_model_len)]
