"""Is the demo model a model that others can load, and always the same one?"""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dynamo.cli.demo_model import DemoShape, make_demo_model

SMALL = DemoShape(layers=1, hidden=64, vocab=512, context=128)


def digest(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir())}


def test_the_same_shape_gives_the_same_bytes(tmp_path: Path) -> None:
    assert digest(make_demo_model(tmp_path / "a", SMALL)) == digest(make_demo_model(tmp_path / "b", SMALL))


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    made = make_demo_model(tmp_path / "a", SMALL)
    before = (made / "config.json").stat().st_mtime_ns
    make_demo_model(tmp_path / "a", SMALL)
    assert (made / "config.json").stat().st_mtime_ns == before


def test_a_foreign_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="name another place"):
        make_demo_model(tmp_path, SMALL)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_making_it_at_once_both_get_a_whole_model(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: make_demo_model(tmp_path / "m", SMALL), range(3)))
    assert made == [tmp_path / "m"] * 3
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_the_weights_file_is_well_formed_safetensors(tmp_path: Path) -> None:
    raw = (make_demo_model(tmp_path / "m", SMALL) / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__")
    assert max(t["data_offsets"][1] for t in header.values()) == len(raw) - 8 - size
    assert header["lm_head.weight"]["shape"] == [SMALL.vocab, SMALL.hidden]


def test_transformers_computes_with_it_and_early_tokens_reach_the_output(weights_dir: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(weights_dir, dtype=torch.float32)
    prompt = list(range(100, 164))
    other = [200, *prompt[1:]]

    def greedy(ids: list[int]) -> list[int]:
        made: list[int] = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
        return made[len(ids) :]

    assert greedy(prompt) == greedy(prompt)
    assert greedy(prompt) != greedy(other)


def test_transformers_renders_the_chat_template(model_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode("naïve 🙂 def f():")) == "naïve 🙂 def f():"
