"""What does one serve when there is no model at hand? A small one, made here in seconds, that speaks nonsense.

A Llama of about five million random weights in Hugging Face layout. The tokenizer is a real byte-level BPE,
trained on the Python standard library's sources; the weights are noise, so the words that come back are noise
too, but everything around them (template, tokenizer, sampling, KV cache, streaming) is the real thing.

The head is untied and the initialisation wide (0.12), in float32: greedy output then depends on every token of
the prompt, so that a lost or mixed-up KV block shows as another answer. With tied weights and the usual 0.02 the
model would repeat the last token of the prompt whatever came before it.

Needs neither torch nor numpy. The same Python and `tokenizers` versions give the same bytes.
"""

import json
import math
import random
import statistics
import struct
import sysconfig
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from dynamo.runtime.options import OptionParser

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
BOS_ID, EOS_ID, IM_END_ID = 0, 1, 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_FILES = 150  # of the standard library, by name: 4 MB of text, about a second of training
INIT_STD = 0.12  # wide enough that every prompt token reaches the output; see above
MARK = "demo_model.json"  # written last, so that a directory that has it is whole


class DemoShape(msgspec.Struct, frozen=True):
    """How big the model is. `vocab` and `context` are in tokens, `hidden` in float32 values."""

    layers: int = 4
    hidden: int = 256
    vocab: int = 4096
    context: int = 32768
    seed: int = 0

    @property
    def intermediate(self) -> int:
        return self.hidden * 11 // 4

    @property
    def heads(self) -> int:
        return max(1, self.hidden // 32)

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 2)


def make_demo_model(directory: Path, shape: DemoShape | None = None, *, weights: bool = True) -> Path:
    """Write the model into `directory` unless it is there already; returns `directory`.

    The directory appears whole or not at all: it is written beside its place and renamed.

    Raises:
        FileExistsError: `directory` exists and is not a demo model of this shape.
        OSError: the disk is full or the place is not writable.
    """
    shape = shape or DemoShape()
    mark = json.dumps(msgspec.to_builtins(shape) | {"weights": weights}, sort_keys=True)
    if directory.exists():
        if _read(directory / MARK) == mark:
            return directory
        if any(directory.iterdir()):
            raise FileExistsError(f"{directory} exists and is not this demo model; remove it or name another place")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".demo-model-") as work:
        model = Path(work) / "model"
        model.mkdir()
        _write_tokenizer(model, shape)
        _write_config(model, shape)
        if weights:
            _write_weights(model / "model.safetensors", shape)
        (model / MARK).write_text(mark)
        try:
            model.rename(directory)
        except OSError:  # another process was faster; what it made is the same
            if _read(directory / MARK) != mark:
                raise
    return directory


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None


def _write_tokenizer(directory: Path, shape: DemoShape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:TRAINING_FILES]
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(s) for s in sources], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[BOS_ID],
            "eos_token": SPECIAL_TOKENS[EOS_ID],
            "model_max_length": shape.context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_config(directory: Path, shape: DemoShape) -> None:
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.hidden // shape.heads,
            "max_position_embeddings": shape.context,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": INIT_STD,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "torch_dtype": "float32",
            "use_cache": True,
        },
    )
    _write_json(directory / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, IM_END_ID]})


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def _tensors(shape: DemoShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as `transformers` stores a Llama. Vectors are the norms' gains (ones), matrices noise."""
    head_dim = shape.hidden // shape.heads
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (shape.hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (shape.heads * head_dim, shape.hidden)
        yield f"{layer}.self_attn.k_proj.weight", (shape.kv_heads * head_dim, shape.hidden)
        yield f"{layer}.self_attn.v_proj.weight", (shape.kv_heads * head_dim, shape.hidden)
        yield f"{layer}.self_attn.o_proj.weight", (shape.hidden, shape.heads * head_dim)
        yield f"{layer}.post_attention_layernorm.weight", (shape.hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{layer}.mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{layer}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocab, shape.hidden)


def _write_weights(file: Path, shape: DemoShape) -> None:
    """The safetensors format: u64le header length, JSON header padded to 8 bytes, then little-endian data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in _tensors(shape):
        end = offset + 4 * math.prod(dims)
        header[name] = {"dtype": "F32", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # One table look-up a weight: the 65536 quantiles of the normal distribution, drawn by 16 random bits each.
    normal = statistics.NormalDist(0.0, INIT_STD)
    quantiles = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    rng = random.Random(shape.seed)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, dims in _tensors(shape):
            count = math.prod(dims)
            if len(dims) == 1:
                values = array("f", [1.0]) * count
            else:
                values = array("f", map(quantiles.__getitem__, array("H", rng.randbytes(2 * count))))
            f.write(values.tobytes())


def main(argv: Sequence[str]) -> int:
    """`dynamo demo-model DIRECTORY`; returns the exit status."""
    parser = OptionParser("dynamo demo-model", "Write a small model with random weights, which speaks nonsense.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="a new directory for it")
    parser.add_argument("--no-weights", action="store_true", help="tokenizer, template and configs only")
    args = parser.parse(argv)
    try:
        print(make_demo_model(args.directory, weights=not args.no_weights))
    except OSError as e:
        parser.error(str(e))
    return 0
