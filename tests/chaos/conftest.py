"""What do these tests share with those across processes?"""

from tests.integration.conftest import deployment

__all__ = ["deployment"]
