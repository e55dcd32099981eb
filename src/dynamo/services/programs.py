"""How does a Python program become one of the services? It gives the arguments of the command line."""

from collections.abc import Callable, Sequence


def run_kv_indexer(args: Sequence[str]) -> None:
    """Be `python -m dynamo.indexer` until a signal. Raises RuntimeError if it cannot serve, SystemExit for --help."""
    from dynamo.services.indexer.main import main

    _run("the indexer", main, args)


def run_slot_tracker(args: Sequence[str]) -> None:
    """Be `python -m dynamo.slot_tracker` until a signal. Raises as `run_kv_indexer`."""
    from dynamo.services.slots.main import main

    _run("the slot tracker", main, args)


def run_select_service(args: Sequence[str]) -> None:
    """Be `python -m dynamo.select_service` until a signal. Raises as `run_kv_indexer`."""
    from dynamo.services.selection.main import main

    _run("the selection service", main, args)


def _run(name: str, main: Callable[[Sequence[str]], int], args: Sequence[str]) -> None:
    status = main(list(args))
    if status:
        raise RuntimeError(f"{name} could not serve: see the line on stderr")
