"""An OpenAI server that is running already as a worker: vLLM or SGLang, unmodified."""
