"""How does atheris run one target? usage: python -m fuzz.under_atheris TARGET [libFuzzer's arguments]"""

import importlib
import logging
import sys

import atheris


def main() -> None:
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["dynamo", "fuzz"]):
        target = importlib.import_module(f"fuzz.{name}")
        harness = importlib.import_module("fuzz.harness")
    logging.lastResort = None
    atheris.Setup(sys.argv, lambda data: harness.run(target.one, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
