"""What is set for a machine without a GPU, and which words of a command line are wrong?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo.vllm import args, cpu
from dynamo.vllm.engine import choose_driver
from dynamo.vllm.main import why

MODEL = "tiny"  # the name of `model_dir`'s directory
SMALL, LARGE = 13 * 2**20, 16 * 2**30


def settings(weights: int, cores: int, workers: int, **environ: str) -> dict[str, str]:
    return {s.name: s.value for s in cpu.environment(weights, cores, workers, environ)}


def test_a_small_model_gets_one_unpinned_thread() -> None:
    assert settings(SMALL, 64, 1) == {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(1, 1, "1"), (2, 1, "1"), (16, 1, "15"), (16, 4, "3"), (2, 4, "1")]
)
def test_a_large_model_shares_all_cores_but_one(cores: int, workers: int, threads: str) -> None:
    assert settings(LARGE, cores, workers)["OMP_NUM_THREADS"] == threads


def test_what_the_user_set_stays() -> None:
    assert settings(LARGE, 8, 1, VLLM_CPU_KVCACHE_SPACE="4", OMP_NUM_THREADS="2", VLLM_CPU_OMP_THREADS_BIND="0-3") == {}


def test_a_users_pinning_leaves_the_thread_count_to_vllm() -> None:
    assert "OMP_NUM_THREADS" not in settings(LARGE, 8, 1, VLLM_CPU_OMP_THREADS_BIND="0-3")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "float32"}, True),
        ({"dtype": "torch.float32"}, True),
        ({"text_config": {"dtype": "float32"}}, True),
        ({"torch_dtype": "bfloat16"}, False),
        ({}, False),
    ],
)
def test_float32_checkpoints_are_known(tmp_path: Path, config: dict[str, object], expected: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cpu.is_float32(tmp_path) is expected


def test_a_directory_without_config_is_not_taken_for_float32(tmp_path: Path) -> None:
    assert not cpu.is_float32(tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--model is required"),
        (["--model", "/no/such/place"], "--model: there is no directory /no/such/place"),
        (
            ["--model", "org/model", "--disaggregation-mode", "pd"],
            "--disaggregation-mode: invalid choice: 'pd'",
        ),
        (["--model", "org/model", "--connector", "nixl"], "--connector: KV connectors"),
    ],
)
def test_a_wrong_word_is_one_line_before_vllm_is_imported(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        args.parse_ours(words)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("word", ["adapter", "=dir", "adapter=", "adapter=/no/such/place"])
def test_a_wrong_adapter_names_the_flag(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = args.parse_ours(["--model", "org/model", "--lora-modules", word])
    with pytest.raises(SystemExit):
        args.lora_modules(words)
    assert "--lora-modules" in capsys.readouterr().err


def test_help_is_short_and_does_not_import_vllm() -> None:
    code = (
        "import sys\nfrom dynamo.vllm.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert not {'vllm', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) < 60


@pytest.mark.parametrize(
    ("version", "driver"), [("0.32.0", "core"), ("0.32.1+cu130", "core"), ("0.33.0", "async"), ("1.0", "async")]
)
def test_the_direct_driver_is_for_the_versions_it_knows(
    monkeypatch: pytest.MonkeyPatch, version: str, driver: str
) -> None:
    monkeypatch.delenv("DYN_VLLM_DRIVER", raising=False)
    monkeypatch.setattr("dynamo.vllm.engine.vllm_version", lambda: version)
    assert choose_driver()[0] == driver


@pytest.mark.parametrize("word", ["core", "async"])
def test_the_driver_can_be_forced(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("DYN_VLLM_DRIVER", word)
    assert choose_driver() == (word, f"DYN_VLLM_DRIVER={word}")


def test_a_driver_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_VLLM_DRIVER", "warp")
    with pytest.raises(ValueError, match="DYN_VLLM_DRIVER"):
        choose_driver()


@pytest.mark.vllm
class TestVllmsOwnFlags:
    """Parsed by vLLM's own parser, which is imported once for all of these."""

    @pytest.fixture(autouse=True)
    def in_the_models_directory(self, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model_dir.parent)

    def options(self, *words: str) -> args.VllmOptions:
        return args.engine_options(args.parse_ours(["--model", MODEL, *words]))

    def test_they_reach_the_engine(self) -> None:
        engine = self.options("--max_model_len", "4096", "--block-size=64", "--kv-events-config.topic", "x").engine_args
        assert (engine.model, engine.max_model_len, engine.block_size) == (MODEL, 4096, 64)
        assert engine.kv_events_config.topic == "x"

    def test_the_first_served_name_is_the_name_and_the_others_aliases(self) -> None:
        assert self.options("--served-model-name", "a", "b").served_model_names == ["a", "b"]
        assert self.options().served_model_names == [MODEL]

    @pytest.mark.parametrize(
        ("word", "near"), [("--max-modle-len", "--max-model-len"), ("--namespacee", "--namespace")]
    )
    def test_an_unknown_flag_names_the_nearest_of_both_parsers(
        self, word: str, near: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            self.options(word, "5")
        assert ended.value.code == 2
        assert f"unknown argument {word!r}; did you mean {near}?" in capsys.readouterr().err

    def test_a_value_that_vllm_refuses_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.options("--dtype", "int3")
        assert "--dtype" in capsys.readouterr().err.splitlines()[-1]

    def test_a_float32_model_stays_float32(self, model_dir: Path) -> None:
        options = self.options()
        args.settle(options, model_dir)
        assert options.engine_args.dtype == "float32"
        assert options.engine_args.enable_prefix_caching is True

    @pytest.mark.parametrize(("words", "length"), [((), -1), (("--max-model-len", "77"), 77)])
    def test_the_context_is_fitted_to_the_cache_unless_it_was_asked_for(
        self, words: tuple[str, ...], length: int, model_dir: Path
    ) -> None:
        options = self.options(*words)
        args.settle(options, model_dir)
        assert options.engine_args.max_model_len == length

    def test_a_dtype_that_was_asked_for_stays(self, model_dir: Path) -> None:
        options = self.options("--dtype", "bfloat16")
        args.settle(options, model_dir)
        assert options.engine_args.dtype == "bfloat16"

    def test_why_vllm_does_not_start_is_one_line_without_pydantics_frame(self) -> None:
        engine_args = self.options("--tensor-parallel-size", "0").engine_args
        with pytest.raises(ValueError) as refused:  # noqa: PT011 - pydantic's, whose text is what this is about
            engine_args.create_engine_config()
        assert "\n" in str(refused.value)
        line = why(refused.value)
        assert "\n" not in line
        assert "pydantic" not in line
