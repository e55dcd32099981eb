"""Distributed serving for large language models.

The way of a request: `frontend` -> `llm` -> `router` -> `runtime` -> an engine, and back.
"""

__version__ = "0.1.0"
