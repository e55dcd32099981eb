"""What does somebody see who has not installed NIXL?"""

import subprocess
import sys

HIDDEN = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("nixl") else find(name, *rest)
try:
    import dynamo.nixl_connect
except ImportError as e:
    print(type(e).__name__, e)
"""

LIGHT = """
import sys, dynamo.nixl_connect
print([name for name in ("torch", "vllm", "cupy") if name in sys.modules])
"""


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60).stdout


def test_without_nixl_the_import_error_names_the_extra() -> None:
    assert run(HIDDEN).startswith("NixlMissing dynamo.nixl_connect needs NIXL: pip install 'ai-dynamo[nixl]'")


def test_the_import_loads_no_tensor_library() -> None:
    assert run(LIGHT) == "[]\n"
