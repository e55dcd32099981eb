"""What does the command `dynamo` offer? One word a program; each is loaded only when it is asked for."""

import difflib
import runpy
import sys

HELP = """\
usage: dynamo COMMAND ...

  run          serve a model by one command and use it: HTTP, terminal chat, stdin, or a batch file
  doctor       will this machine run it, and with what? (--workers: who is there, and does each answer?)
  demo-model   make a small model that speaks nonsense, to try things with
  event-keys   make keys that events over ZeroMQ are sealed with
  replay       simulate workers and routing on a trace, without any (python -m dynamo.replay)

  frontend     the HTTP service                      (python -m dynamo.frontend)
  vllm         a worker of the engine vLLM           (python -m dynamo.vllm)
  mocker       simulated workers                     (python -m dynamo.mocker)
  echo         workers that answer with the prompt   (python -m dynamo.echo)
  attach       a running vLLM or SGLang server as a worker  (python -m dynamo.attach URL)

  router          routes for callers on the request plane    (python -m dynamo.router)
  indexer         who holds what of a prompt, over HTTP      (python -m dynamo.indexer)
  select-service  which worker should get it, over HTTP      (python -m dynamo.select_service)
  slot-tracker    how busy each worker is, over HTTP         (python -m dynamo.slot_tracker)

`dynamo COMMAND --help` lists a command's options, `dynamo --version` tells the version."""
PROGRAMS = (
    "frontend",
    "vllm",
    "mocker",
    "echo",
    "attach",
    "router",
    "indexer",
    "select-service",
    "slot-tracker",
)


def main() -> int:
    """Entry point of the `dynamo` command; returns its exit status."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if len(sys.argv) > 1 else 2
    word, rest = sys.argv[1].replace("_", "-"), sys.argv[2:]
    if word in ("--version", "-V", "version"):
        from dynamo import __version__

        print(f"dynamo {__version__}")
        return 0
    if word in PROGRAMS:
        sys.argv = [f"dynamo {word}", *rest]
        runpy.run_module(f"dynamo.{word.replace('-', '_')}", run_name="__main__", alter_sys=True)
        return 0
    if word == "run":
        from dynamo.cli.run import main as run

        return run(rest)
    if word == "doctor":
        from dynamo.doctor.main import main as doctor

        return doctor(rest)
    if word == "demo-model":
        from dynamo.cli.demo_model import main as demo_model

        return demo_model(rest)
    if word == "event-keys":
        from dynamo.cli.event_keys import main as event_keys

        return event_keys(rest)
    if word == "replay":
        from dynamo.replay.main import main as replay

        return replay(rest)
    near = difflib.get_close_matches(word, ["run", "doctor", "demo-model", "event-keys", "replay", *PROGRAMS], n=1)
    sys.stderr.write(f"dynamo: unknown command {word!r}" + (f"; did you mean {near[0]}?\n" if near else "\n"))
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
