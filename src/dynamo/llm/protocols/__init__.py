"""The shapes that requests and answers have: OpenAI's outside, the engine's inside."""
