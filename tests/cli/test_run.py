"""Does `dynamo run` serve, answer, chat and work off a file, and leave nothing behind? With real processes."""

import codecs
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DYNAMO = [sys.executable, "-m", "dynamo.cli.main"]
MOCKER = ["out=mocker", "--max-tokens", "8", "--", "--speedup-ratio", "0"]


def descendants(pid: int) -> set[int]:
    """`pid`'s descendants that have not ended."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                parents[int(stat.parent.name)] = int(fields[1])
    found, grew = {pid}, True
    while grew:
        grew = not (new := {p for p, parent in parents.items() if parent in found} - found) <= set()
        found |= new
    return found - {pid}


def until(true: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{p}").exists() and "Z" not in Path(f"/proc/{p}/stat").read_text() for p in pids)


def run(*words: str, stdin: str = "", timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*DYNAMO, "run", *words], input=stdin, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture
def served(model_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    words = [str(model_dir), "in=http", "--http-port", "0", *MOCKER]
    process = subprocess.Popen(
        [*DYNAMO, "run", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    assert process.stdout is not None
    process.stdout.close()


def address(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://[\d.]+:\d+", line):
            return found.group()
    raise AssertionError("no address was printed")


def test_one_prompt_from_a_pipe_is_answered_on_stdout(model_dir: Path) -> None:
    done = run(str(model_dir), *MOCKER, stdin="Hello!")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "ready after" in done.stderr


def test_an_empty_pipe_is_refused(model_dir: Path) -> None:
    done = run(str(model_dir), *MOCKER)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing on standard input" in done.stderr


def test_a_missing_directory_is_refused_before_anything_starts() -> None:
    done = run("./nowhere", *MOCKER, stdin="x")
    assert done.returncode == 2
    assert "no such directory" in done.stderr


def test_a_worker_that_cannot_start_ends_it_with_its_last_words(tmp_path: Path) -> None:
    done = run(str(tmp_path), *MOCKER, stdin="x")
    assert done.returncode == 1
    assert "worker ended with exit status" in done.stderr
    assert "worker │" in done.stderr


def test_a_taken_port_is_said_at_once(model_dir: Path, served: "subprocess.Popen[str]") -> None:
    port = address(served).rsplit(":", 1)[1]
    done = run(str(model_dir), "in=http", "--http-port", port, "out=mocker")
    assert done.returncode == 2
    assert "--http-port" in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_ends_everything(served: "subprocess.Popen[str]", number: signal.Signals, status: int) -> None:
    base = address(served)
    assert json.load(urllib.request.urlopen(f"{base}/v1/models"))["data"]
    children = descendants(served.pid)
    assert len(children) >= 2
    served.send_signal(number)
    assert served.wait(15) == status
    until(lambda: gone(children), "all children are gone", 1)


def test_sigkill_leaves_nothing_running(served: "subprocess.Popen[str]") -> None:
    address(served)
    children = descendants(served.pid)
    served.kill()
    until(lambda: gone(children), "all children are gone", 15)


def test_a_killed_worker_ends_it_with_status_1(served: "subprocess.Popen[str]") -> None:
    address(served)
    children = descendants(served.pid)
    worker = next(p for p in children if b"dynamo.mocker" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    assert served.wait(15) == 1
    until(lambda: gone(children), "all children are gone", 1)


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [*DYNAMO, *words])
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def expect(self, pattern: str, timeout_s: float = 30.0) -> str:
        """Read until `pattern`; returns what came before it."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.text)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} did not come; there is {self.text[-2000:]!r}"
            if select.select([self.fd], [], [], left)[0]:
                self.text += self._decoder.decode(os.read(self.fd, 65536))
        before, self.text = self.text[: found.start()], self.text[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def press_until(self, key: str, pattern: str) -> None:
        """Press a key until it is noticed: a prompt that is shown may not be read yet."""
        for _ in range(30):
            self.type(key)
            with contextlib.suppress(AssertionError):
                self.expect(pattern, 1)
                return
        raise AssertionError(f"{pattern!r} did not come; there is {self.text[-2000:]!r}")

    def wait(self, timeout_s: float = 20.0) -> int:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if select.select([self.fd], [], [], 0.05)[0]:
                    os.read(self.fd, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it did not end")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def chat(model_dir: Path) -> Iterator[Terminal]:
    words = ["run", str(model_dir), "out=mocker", "--max-tokens", "1000"]
    terminal = Terminal(*words, "--", "--speedup-ratio", "8")
    terminal.expect("you ▸")
    yield terminal
    terminal.close()


def test_a_chat_answers_and_ends_with_ctrl_d(chat: Terminal) -> None:
    chat.type("/system be brief\n")
    chat.expect("system prompt: be brief")
    chat.type("Hello!\n")
    chat.expect(r"1000 tokens, first after \d+ ms, \d+ tokens/s", 60)
    chat.expect("you ▸")
    chat.type("\x04")
    assert chat.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat: Terminal) -> None:
    chat.type("Hello!\n")
    chat.expect("\n.*\\w{3}")  # the answer has begun
    chat.type("\x03")
    chat.expect("stopped")
    chat.expect("you ▸")
    chat.press_until("\x03", "Ctrl-D ends the chat")
    chat.type("/quit\n")
    assert chat.wait() == 0


def test_a_chat_ends_with_the_reason_when_its_worker_dies(chat: Terminal) -> None:
    worker = next(p for p in descendants(chat.pid) if b"dynamo.mocker" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    chat.expect("worker was ended by SIGKILL")
    assert chat.wait() == 1


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_is_answered_in_order_and_bad_lines_are_recorded(model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"text": "one"}\n'
        "\n"
        "not json\n"
        '{"custom_id": "b", "body": {"messages": [{"role": "user", "content": "two"}], "max_tokens": 3}}\n'
        '{"custom_id": "c", "body": {"messages": [], "max_tokens": 3}}\n'
        '{"text": "three", "mine": 7}\n'
    )
    done = run(str(model_dir), f"in=batch:{source}", *MOCKER)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    one, bad, two, refused, three = lines(tmp_path / "output.jsonl")
    assert (one["text"], one["tokens_out"], one["finish_reason"]) == ("one", 8, "length")
    assert bad["error"]
    assert two["custom_id"] == "b"
    assert two["response"]["body"]["usage"]["completion_tokens"] == 3  # type: ignore[index]
    assert refused["response"]["status_code"] == 400  # type: ignore[index]
    assert (three["text"], three["mine"]) == ("three", 7)
    assert not (tmp_path / "output.jsonl.journal").exists()
    again = run(str(model_dir), f"in=batch:{source}", *MOCKER)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_a_killed_batch_goes_on_and_does_nothing_twice(model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"text": "line {i}"}}\n' for i in range(200)))
    words = [str(model_dir), f"in=batch:{source}", "out=mocker", "--max-tokens", "8", "--concurrency", "4"]
    words += ["--", "--speedup-ratio", "10"]
    journal = tmp_path / "output.jsonl.journal"
    first = subprocess.Popen([*DYNAMO, "run", *words], stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 40, "some lines are done")
    first.kill()
    first.wait(10)
    kept = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")][1:]
    assert 40 <= len(kept) < 200
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert f"{200 - len(kept)} lines answered" in done.stderr
    assert f"{len(kept)} were there before" in done.stderr
    results = lines(tmp_path / "output.jsonl")
    assert [r["text"] for r in results] == [f"line {i}" for i in range(200)]
    for entry in map(json.loads, kept):
        assert results[entry["line"]] == entry["result"]  # the very same, elapsed_ms included
