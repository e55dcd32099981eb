"""Are the right processes planned for what was typed?"""

from pathlib import Path

import pytest

from dynamo.cli import plan


def request(**changes: object) -> plan.Request:
    fields: dict[str, object] = {
        "model": plan.Model("/m", "m"),
        "engine": "vllm",
        "workers": 2,
        "host": "127.0.0.1",
        "port": 8000,
        "router_mode": "round-robin",
        "cores": 2,
    }
    return plan.Request(**(fields | changes))  # type: ignore[arg-type]


def words(spec: object) -> str:
    return " ".join(spec.argv)  # type: ignore[attr-defined]


def test_one_frontend_and_one_process_for_each_vllm_worker() -> None:
    specs = plan.processes(request(), {}, Path("/d"))
    assert [s.name for s in specs] == ["frontend", "worker-1", "worker-2"]
    assert "-m dynamo.vllm --model /m --served-model-name m" in words(specs[1])


def test_a_frontend_may_be_several_processes() -> None:
    assert "--http-workers" not in words(plan.processes(request(), {}, Path("/d"))[0])
    assert "--http-workers 3" in words(plan.processes(request(http_workers=3), {}, Path("/d"))[0])


def test_mock_workers_share_one_process() -> None:
    specs = plan.processes(request(engine="mocker", workers=8), {}, Path("/d"))
    assert len(specs) == 2
    assert "--num-workers 8" in words(specs[1])


def test_workers_find_each_other_in_a_private_directory() -> None:
    for spec in plan.processes(request(), {}, Path("/d")):
        assert spec.env["DYN_FILE_KV"] == "/d"
        assert spec.env["DYN_DISCOVERY_BACKEND"] == "file"


@pytest.mark.parametrize("name", ["DYN_DISCOVERY_BACKEND", "DYN_FILE_KV", "ETCD_ENDPOINTS"])
def test_a_discovery_that_was_chosen_is_kept(name: str) -> None:
    for spec in plan.processes(request(), {name: "file"}, Path("/d")):
        assert "DYN_FILE_KV" not in spec.env


def test_memory_discovery_is_refused() -> None:
    with pytest.raises(plan.PlanError, match="one process"):
        plan.processes(request(), {"DYN_DISCOVERY_BACKEND": "mem"}, Path("/d"))


def test_engine_flags_go_to_the_workers_last() -> None:
    specs = plan.processes(request(engine_flags=["--max-num-seqs", "7"]), {}, Path("/d"))
    assert words(specs[1]).endswith("--max-num-seqs 7")
    assert "--max-num-seqs" not in words(specs[0])


def test_cpu_workers_split_the_cores() -> None:
    for spec in plan.processes(request(cores=9), {}, Path("/d"))[1:]:
        assert spec.env["OMP_NUM_THREADS"] == "4"
        assert spec.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_threads_that_were_chosen_are_kept() -> None:
    specs = plan.processes(request(), {"OMP_NUM_THREADS": "3", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}, Path("/d"))
    assert not specs[1].env.keys() & {"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"}


def test_each_worker_gets_its_own_gpus() -> None:
    specs = plan.processes(request(gpus=["0", "1", "2", "3"], tensor_parallel=2), {}, Path("/d"))
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in specs[1:]] == ["0,1", "2,3"]
    assert "--gpu-memory-utilization" not in words(specs[1])


def test_workers_on_one_gpu_split_its_memory() -> None:
    specs = plan.processes(request(gpus=["0"]), {}, Path("/d"))
    assert [s.env["CUDA_VISIBLE_DEVICES"] for s in specs[1:]] == ["0", "0"]
    assert "--gpu-memory-utilization 0.450" in words(specs[1])


def test_hidden_gpus_are_not_used(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"0000:0{i}:00.0").mkdir()
    assert plan.visible_gpus({}, tmp_path) == ["0", "1", "2", "3"]
    assert plan.visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}, tmp_path) == ["2", "3"]
    assert plan.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert plan.visible_gpus({}, tmp_path / "absent") == []


def test_workers_of_one_machine_get_system_ports_in_a_row() -> None:
    specs = plan.processes(request(), {"DYN_SYSTEM_PORT": "9090"}, Path("/d"))
    assert [s.env["DYN_SYSTEM_PORT"] for s in specs] == ["-1", "9090", "9091"]


def test_a_directory_is_named_after_itself(tmp_path: Path) -> None:
    (tmp_path / "Qwen").mkdir()
    assert plan.find_model(str(tmp_path / "Qwen"), None, tmp_path) == plan.Model(str(tmp_path / "Qwen"), "Qwen")


def test_a_hub_id_is_left_to_the_worker() -> None:
    assert plan.find_model("Qwen/Qwen3-0.6B", None, Path("/c")).path == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("word", ["./nowhere", "/nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_said_at_once(word: str) -> None:
    with pytest.raises(plan.PlanError, match="no such directory"):
        plan.find_model(word, None, Path("/c"))


def test_without_a_model_it_is_the_demo(tmp_path: Path) -> None:
    assert plan.find_model(None, None, tmp_path) == plan.Model(str(tmp_path / "demo-model"), "demo", is_demo=True)


def test_missing_vllm_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(plan.PlanError, match="install_vllm"):
        plan.choose_engine(None)
    assert plan.choose_engine("mocker") == "mocker"


def test_prefill_workers_come_beside_the_others_which_then_decode() -> None:
    specs = plan.processes(request(prefill_workers=1), {}, Path("/d"))
    assert [s.name for s in specs] == ["frontend", "prefill-1", "decode-2", "decode-3"]
    assert [words(s).rpartition(" ")[2] for s in specs[1:]] == ["prefill", "decode", "decode"]
    assert all("--disaggregation-mode" in words(s) for s in specs[1:])
    simulated = plan.processes(request(engine="mocker", workers=3, prefill_workers=2), {}, Path("/d"))
    assert [s.name for s in simulated] == ["frontend", "prefill", "decode"]
    assert "--num-workers 2" in words(simulated[1])
    assert "--num-workers 3" in words(simulated[2])


def test_prefill_workers_of_an_engine_that_has_none_are_refused() -> None:
    with pytest.raises(plan.PlanError, match="--prefill-workers"):
        plan.processes(request(engine="echo", prefill_workers=1), {}, Path("/d"))
