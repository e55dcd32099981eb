"""What do vLLM's own offline interface, and for LoRA the merged weights, answer to the cases?

usage: python -m tests.vllm.vllm_reference MODEL LORA_DIR FLAGS_JSON OUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.vllm.vllm_cases import CASES, LORA_PROMPT, LORA_TOKENS


def main() -> None:
    model, lora, flags, out = sys.argv[1:]
    answers = {"lora": merged_answer(Path(model), Path(lora))} | vllm_answers(model, json.loads(flags))
    Path(out).write_text(json.dumps(answers))


def vllm_answers(model: str, flags: dict[str, Any]) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    from vllm import LLM, SamplingParams, TokensPrompt

    outputs = LLM(model, **flags).generate(
        [TokensPrompt(prompt_token_ids=case.token_ids) for case in CASES],
        [
            SamplingParams(
                **case.vllm, structured_outputs=StructuredOutputsParams(**case.structured) if case.structured else None
            )
            for case in CASES
        ],
        use_tqdm=False,
    )
    return {case.name: answer(output) for case, output in zip(CASES, outputs, strict=True)}


def answer(output: Any) -> dict[str, Any]:
    """The parts of vLLM's answer that ours must equal."""
    choice = output.outputs[0]
    return {
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "text": choice.text,
        "logprobs": choice.logprobs and [by_token(position) for position in choice.logprobs],
        "prompt_logprobs": output.prompt_logprobs
        and [position and by_token(position) for position in output.prompt_logprobs],
    }


def by_token(position: Any) -> dict[int, list[float]]:
    return {token_id: [entry.logprob, entry.rank] for token_id, entry in position.items()}


def merged_answer(model: Path, lora: Path) -> list[int]:
    """Greedy tokens of the model with the adapter's product added to its weights, by transformers."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = json.loads((lora / "adapter_config.json").read_bytes())
    adapter = load_file(lora / "adapter_model.safetensors")
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = dict(llama.named_parameters())
    with torch.no_grad():
        for name in [key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")]:
            product = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
            weights[name.removeprefix("base_model.model.") + ".weight"] += product * config["lora_alpha"] / config["r"]
        ids = torch.tensor([LORA_PROMPT])
        made = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LORA_TOKENS, do_sample=False)
    return [int(token_id) for token_id in made[0, len(LORA_PROMPT) :]]


if __name__ == "__main__":
    main()
