"""`python -m dynamo.vllm`. The guard matters: vLLM's processes import this file anew when they are spawned."""

import sys

from dynamo.vllm.main import main

if __name__ == "__main__":
    sys.exit(main())
