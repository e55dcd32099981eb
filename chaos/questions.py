"""What is asked, and what is the one right answer?

The mocker's token i is a function of the prompt and the seed, so all of an answer is known before it is asked for.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo.llm.model_directory import build_card
from dynamo.llm.preprocessor import Preprocessor
from dynamo.llm.protocols.openai import decode_chat
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.vocabulary import sayable_tokens

WORDS = ("river", "stone", "cloud", "engine", "letter", "garden", "window", "silver", "morning", "bridge", "paper")
ROOM = 1 << 20  # tokens; every answer here is bounded by its max_tokens


@dataclass(frozen=True)
class Question:
    """One request, as it is sent, and its answer."""

    number: int
    body: dict[str, Any]
    prompt_tokens: int
    tokens: int
    text: str


class Questioner:
    """Makes questions for a model. Reads it at the start; the same seed gives the same questions."""

    def __init__(self, model: Path, name: str, seed: int) -> None:
        self._name = name
        self._random = random.Random(seed)
        self._preprocessor = Preprocessor(build_card(model, name=name), model)
        self._sampler = Sampler(sayable_tokens(model))
        self._number = 0

    async def make(self, tokens: int | None = None) -> Question:
        """A question whose answer is so long."""
        draw = self._random
        self._number += 1
        tokens = tokens or draw.randint(20, 160)
        said = " ".join(draw.choices(WORDS, k=draw.randint(3, 60)))
        body: dict[str, Any] = {
            "model": self._name,
            "messages": [{"role": "user", "content": f"{self._number}: {said}"}],
            "max_tokens": tokens,
            "stream": draw.random() < 0.7,
        }
        if draw.random() < 0.5:
            body["seed"] = draw.randint(0, 1000)
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        prepared = await self._preprocessor.chat(decode_chat(json.dumps(body).encode()))
        script = self._sampler.script(prepared.request, ROOM)
        ids = [self._sampler.token(script, i) for i in range(tokens)]
        text = self._preprocessor.tokenizer.decode(ids)
        return Question(self._number, body, len(prepared.request.token_ids), tokens, text)
