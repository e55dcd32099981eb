"""The options that all workers share."""

import json

import pytest

from dynamo.engine.worker_args import WorkerOptions, add_worker_options, dump_config, worker_options
from dynamo.runtime.options import OptionParser


def options(*argv: str) -> WorkerOptions:
    parser = OptionParser("prog", "d")
    add_worker_options(parser)
    return worker_options(parser.parse(argv))


def test_the_defaults_are_those_that_routers_look_for():
    assert options() == WorkerOptions()
    assert options().endpoint == "dynamo.backend.generate"
    assert options("--namespace", "blue").endpoint == "blue.backend.generate"
    assert options("--namespace", "blue", "--endpoint", "dyn://a.b.c").endpoint == "a.b.c"


def test_variables_count_and_flags_win(monkeypatch):
    monkeypatch.setenv("DYN_NAMESPACE", "blue")
    monkeypatch.setenv("DYN_ENGINE_REQUEST_LIMIT", "7")
    monkeypatch.setenv("DYN_ENDPOINT_TYPES", "completions")
    assert options().endpoint == "blue.backend.generate"
    assert options("--engine-request-limit", "8").engine_request_limit == 8
    assert options().endpoint_types == ("completions",)


def test_files_for_tls_with_nats_are_known_by_their_variables(monkeypatch):
    monkeypatch.setenv("NATS_TLS_CA_CERT_PATH", "/ca.pem")
    found = options("--nats-tls-cert-path", "/me.pem", "--nats-tls-key-path", "/me.key").nats_tls
    assert found == {
        "NATS_TLS_CA_CERT_PATH": "/ca.pem",
        "NATS_TLS_CERT_PATH": "/me.pem",
        "NATS_TLS_KEY_PATH": "/me.key",
    }


def test_flags_of_tls_between_processes_become_the_runtimes_variables():
    found = options("--tcp-tls-cert-path", "/me.pem", "--tcp-tls-key-path", "/me.key", "--tcp-tls-insecure").tcp_tls
    assert found == {
        "DYN_TCP_TLS_CERT_PATH": "/me.pem",
        "DYN_TCP_TLS_KEY_PATH": "/me.key",
        "DYN_TCP_TLS_INSECURE": "True",
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--fpm-trace"], "--fpm-trace: the forward pass trace is not in this version"),
        (["--dyn-tool-call-parser", "hermes"], "parsing tool calls is not in this version"),
        (["--engine-request-limit", "0"], "from 1"),
        (["--dynamo-request-queue-limit", "-1"], "from 0"),
        (["--endpoint-types", "chat,images"], "'images' is not one of chat, completions"),
        (["--output-modalities", "audio"], "invalid choice"),
        (["--health-check-payload", "{"], "neither JSON nor @FILE"),
        (["--engine-request-limt", "1"], "did you mean --engine-request-limit"),
    ],
)
def test_a_wrong_word_is_one_line_that_names_it(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        options(*argv)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--endpoint", "a.b"], "--endpoint: endpoint path 'a.b'"),
        (["--custom-jinja-template", "/nowhere/t.jinja"], "--custom-jinja-template: there is no file"),
    ],
)
def test_what_cannot_be_used_names_its_flag(argv, words):
    with pytest.raises(ValueError, match=words):
        options(*argv)


def test_a_health_check_payload_may_stand_in_a_file(tmp_path):
    file = tmp_path / "payload.json"
    file.write_text('{"token_ids": [1]}')
    assert options("--health-check-payload", f"@{file}").health_check_payload == {"token_ids": [1]}


def test_the_options_in_effect_can_be_written_down(tmp_path):
    dump_config(str(tmp_path / "c.json"), {"a": 1, "b": ("x",)})
    assert json.loads((tmp_path / "c.json").read_text()) == {"a": 1, "b": ["x"]}


def test_rare_options_are_only_mentioned_in_the_help_and_all_listed_when_asked_for(capsys):
    parser = OptionParser("prog", "d")
    parser.usage = "%(prog)s [option ...]"
    add_worker_options(parser)
    assert "--tcp-tls-cert-path" not in parser.format_help()
    assert "listed by --help-all: TLS with NATS (3), TLS between processes (9)" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse(["--help-all"])
    assert "--tcp-tls-cert-path" in capsys.readouterr().out
