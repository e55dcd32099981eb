"""The command line of `python -m dynamo.mocker`."""

import json

import pytest

from dynamo.mocker.args import parse_args
from dynamo.mocker.main import stagger_s

BASE = ["--model-path", "somewhere"]


def test_the_defaults_are_those_that_users_know():
    options = parse_args(BASE)
    limits = options.scheduler(None)
    assert (limits.num_blocks, limits.block_size) == (16384, 64)
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (256, 8192)
    assert (limits.enable_prefix_caching, limits.enable_chunked_prefill) == (True, True)
    assert (limits.preemption_mode, options.num_workers, options.data_parallel_size) == ("lifo", 1, 1)
    assert (options.timing.speedup_ratio, options.timing.decode_speedup_ratio) == (1.0, 1.0)


@pytest.mark.parametrize(("engine", "size"), [("vllm", 64), ("sglang", 1), ("trtllm", 32)])
def test_each_engine_has_its_block_size(engine, size):
    assert parse_args([*BASE, "--engine-type", engine]).block_size == size
    assert parse_args([*BASE, "--engine-type", engine, "--block-size", "8"]).block_size == 8


def test_sglang_computes_prompts_first_in_its_own_chunks():
    options = parse_args([*BASE, "--engine-type", "sglang", "--sglang-chunked-prefill-size", "100"])
    limits = options.scheduler(None)
    assert (limits.mix_prefill_and_decode, limits.max_num_batched_tokens) == (False, 100)
    assert limits.schedule_policy == "fifo"
    assert parse_args([*BASE, "--engine-type", "sglang", "--sglang-schedule-policy", "lpm"]).scheduler(None)


def test_the_context_is_the_flags_else_the_models():
    assert parse_args(BASE).scheduler(4096).max_model_len == 4096
    assert parse_args([*BASE, "--max-model-len", "100"]).scheduler(4096).max_model_len == 100


def test_a_context_that_no_step_can_hold_is_refused_where_it_was_asked_for():
    options = parse_args([*BASE, "--no-enable-chunked-prefill", "--max-model-len", "10000"])
    with pytest.raises(ValueError, match="--max-model-len 10000: without chunked prefill"):
        options.scheduler(None)
    assert parse_args([*BASE, "--no-enable-chunked-prefill"]).scheduler(99999).context_length == 8192


def test_options_may_stand_in_a_file_and_flags_win(tmp_path):
    file = tmp_path / "args.json"
    reasoning = {"start_thinking_token_id": 1, "end_thinking_token_id": 2, "thinking_ratio": 0.5}
    values = {
        "num_gpu_blocks": 77,
        "dp_size": 2,
        "block_size": 8,
        "enable_prefix_caching": False,
        "speedup_ratio": 3,
        "watermark": 0.1,
        "reasoning": reasoning,
    }
    file.write_text(json.dumps(values))
    options = parse_args([*BASE, "--extra-engine-args", str(file), "--block-size", "16"])
    limits = options.scheduler(None)
    assert (limits.num_blocks, limits.block_size, limits.watermark) == (77, 16, 0.1)
    assert not limits.enable_prefix_caching
    assert (options.data_parallel_size, options.speedup_ratio) == (2, 3.0)
    assert options.reasoning.end_thinking_token_id == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"block_sise": 8}', "unknown key 'block_sise'; did you mean block_size?"),
        ('{"block_size": 0}', "block_size: 0 is not a whole number from 1"),
        ('{"enable_prefix_caching": "yes"}', "'yes' is not true or false"),
        ('{"preemption_mode": "random"}', "'random' is not one of lifo, fifo"),
        ('{"watermark": 2}', "watermark: 2 is not a share"),
        ("[]", "must hold a JSON object"),
        ("{", "cannot read"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(tmp_path, content, words, capsys):
    file = tmp_path / "args.json"
    file.write_text(content)
    with pytest.raises(SystemExit):
        parse_args([*BASE, "--extra-engine-args", str(file)])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model-path: is required"),
        ([*BASE, "--speedup-ration", "1"], "did you mean --speedup-ratio"),
        ([*BASE, "--speedup-ratio", "-1"], "not a number from 0"),
        ([*BASE, "--is-prefill-worker"], "--is-prefill-worker: is now --disaggregation-mode prefill"),
        ([*BASE, "--bootstrap-ports", "9001"], "--bootstrap-ports: are for --disaggregation-mode prefill"),
        ([*BASE, "--disaggregation-mode", "prefill", "--bootstrap-ports", "1,2"], "names 2 ports, but there are 1"),
        ([*BASE, "--disaggregation-mode", "prefill", "--bootstrap-ports", "99999"], "99999 is not a port"),
        ([*BASE, "--kv-transfer-bandwidth", "-1"], "--kv-transfer-bandwidth"),
        ([*BASE, "--planner-profile-data", "d"], "timing from profile data is not in this version"),
        ([*BASE, "--sglang-schedule-policy", "lpm"], "is for --engine-type sglang, not vllm"),
        ([*BASE, "--trtllm-capacity-scheduler-policy", "guaranteed_no_evict"], "is for --engine-type trtllm"),
        ([*BASE, "--reasoning", '{"thinking_ratio": 2}'], "--reasoning"),
        ([*BASE, "--num-workers", "0"], "from 1"),
    ],
)
def test_a_wrong_word_is_one_line_that_names_it(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(argv)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1


def test_help_is_short(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert len(capsys.readouterr().out.splitlines()) < 90


@pytest.mark.parametrize(("workers", "delay"), [("8", 0.0), ("100", 0.1), ("200", 0.2)])
def test_many_workers_start_one_after_the_other(workers, delay):
    assert stagger_s(parse_args([*BASE, "--num-workers", workers])) == delay
    assert stagger_s(parse_args([*BASE, "--num-workers", workers, "--stagger-delay", "0.5"])) == 0.5
