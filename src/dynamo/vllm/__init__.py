"""The vLLM worker: `python -m dynamo.vllm --model DIR_OR_HUB_ID`.

`engine` fulfils the engine contract over one of two drivers, `engine_core` (direct, fast) and `async_llm` (public).
"""
