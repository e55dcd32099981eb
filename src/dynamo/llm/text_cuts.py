"""Where may a text be cut so that the tokens of its parts, joined, are the tokens of the whole?"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cuts:
    """placeholder"""
