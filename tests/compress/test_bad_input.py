"""Each kind of bad input, by name: refused in one line that says what is wrong with what.

What the command line makes of such a refusal, and the commonest ones, are in test_cli.py.
"""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.cli.quantize import _settings_of
from compress.core.blocks import BlockModel
from compress.core.errors import LONGEST_MESSAGE, InputError
from compress.core.source import resolve_model
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.recipe_file import load_recipe

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def model(model_folder, tmp_path):
    """A copy of the tiny Llama that a test may break."""
    return shutil.copytree(model_folder(), tmp_path / "model")


def set_config(folder: Path, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def build_model(folder: Path) -> BlockModel:
    return BlockModel(resolve_model(str(folder)), torch.device("cpu"), torch.float32)


CONFIGS = [
    # a size of this many would be a list of 8 GB, or a loop of hours
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, with 20 tensors"),
    ({"num_hidden_layers": 1e18}, "num_hidden_layers = 1e+18"),
    ({"num_hidden_layers": 3}, "has no tensor model.layers.2.self_attn.q_proj.weight"),
    ({"num_hidden_layers": 19}, "calls for more than 140 tensors"),
    ({"num_hidden_layers": 0}, "has no list of blocks with linear layers"),
    ({"num_hidden_layers": -1}, "no list of blocks"),
    ({"num_hidden_layers": "two"}, "'num_hidden_layers'"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"num_labels": 10**9}, "num_labels = 1000000000"),
    ({"hidden_size": 6 * 10**12}, "calls for [128, 6000000000000]"),
    ({"hidden_size": -48}, "cannot be built"),
    ({"hidden_size": [48]}, "'hidden_size'"),
    ({"head_dim": 10**12}, "model.layers.0.self_attn.q_proj.weight"),
    ({"vocab_size": 10**12}, "model.embed_tokens.weight"),
    ({"vocab_size": 127}, "config.json calls for [127, 48]"),
    ({"num_attention_heads": 0}, "config.json"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": {}}}, "cannot be built"),
    ({"hidden_act": "no-such"}, "no-such"),
    ({"dtype": "int8"}, "int8"),
    ({"quantization_config": 3}, "already quantized (method unknown)"),
    ({"quantization_config": [{}]}, "already quantized (method unknown)"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": [3]}, "architectures"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "is a BertForMaskedLM"),
    ({"architectures": None, "model_type": "bert"}, "type bert, neither is_decoder"),
    ({"architectures": ["BertModel"], "model_type": "bert"}, "type bert, neither is_decoder"),
    ({"architectures": ["BartModel"], "model_type": "bart"}, "has an encoder"),
    ({"architectures": ["ViTForImageClassification"], "model_type": "vit"}, "of type vit"),
    ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "of type t5"),
    ({"model_type": 3}, "config.json"),
]


@pytest.mark.parametrize(("values", "message"), CONFIGS)
def test_config(values, message, model):
    set_config(model, **values)
    assert message in refusal(build_model, model)


@pytest.mark.parametrize("text", ["", "null", '"x"', "[" * 100_000, '{"a": ' * 60 + "1" + "}" * 60])
def test_config_that_is_no_object(text, model):
    (model / "config.json").write_text(text)
    assert "config.json" in refusal(build_model, model)


def test_config_in_another_encoding(model):
    (model / "config.json").write_bytes("{}".encode("utf-16"))
    assert "cannot read" in refusal(build_model, model)


def test_buffers_beyond_the_checkpoint(tmp_path):
    """GPT-J keeps a table [max_position_embeddings]; here it would take 149 GiB."""
    from transformers import AutoModelForCausalLM, GPTJConfig

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    AutoModelForCausalLM.from_config(GPTJConfig(**sizes)).save_pretrained(tmp_path)
    build_model(tmp_path)
    set_config(tmp_path, n_positions=10**10)
    message = refusal(build_model, tmp_path)
    assert "GiB of computed tables" in message
    assert "[10000000000, 4]" in message


def test_null_quantization_is_none(model):
    set_config(model, quantization_config=None)
    assert build_model(model).num_blocks == 2


def test_one_line_whatever_is_in_it():
    message = str(InputError("a\n b\x1b[31m\x00 \ud800 " + "x" * 5000 + " do this"))
    assert message.startswith("a b\\x1b[31m\\x00 \\ud800 xxx")
    assert message.endswith("do this")
    assert len(message) < LONGEST_MESSAGE + 10


# --- safetensors ------------------------------------------------------------------------------


def rewrite(folder: Path, **changes):
    """Replace tensors by name, with None to remove one."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def set_bytes(content: bytes):
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def set_dtype(dtype: torch.dtype):
    shape = (80, 48)
    return lambda folder: rewrite(folder, **{UP: torch.ones(shape).to(dtype)})


def as_folder(folder: Path):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


FILES = [
    (set_bytes(b""), "header too small"),
    (set_bytes(bytes(range(1, 256)) * 20), "truncated or corrupt"),
    (set_bytes(struct.pack("<Q", 2**63) + b"{}"), "header too large"),
    (set_bytes(struct.pack("<Q", 50_000) + b"[" * 50_000), "truncated or corrupt"),
    (set_bytes(struct.pack("<Q", 2) + b"{}"), "holds no tensors"),
    (as_folder, "cannot read"),
    (set_dtype(torch.int8), f"tensor {UP}"),
    (set_dtype(torch.int64), "is stored as I64; weights are F32, BF16, F16, F64"),
    (set_dtype(torch.bool), "is stored as BOOL"),
    (set_dtype(torch.float8_e4m3fn), "is stored as F8_E4M3"),
    (set_dtype(torch.complex64), "is stored as C64"),
    (lambda f: rewrite(f, **{NORM: torch.ones(48, dtype=torch.int32)}), f"tensor {NORM}"),
    (lambda f: rewrite(f, **{UP: torch.ones(80, 47)}), "[80, 47], config.json calls for [80, 48]"),
    (lambda f: rewrite(f, **{NORM: None}), f"has no tensor {NORM}"),
]


@pytest.mark.parametrize(("damage", "message"), FILES)
def test_safetensors(damage, message, model):
    damage(model)
    assert message in refusal(build_model, model)


def test_the_same_tensor_in_two_files(model):
    (model / "model.safetensors").rename(model / "b.safetensors")
    save_file({UP: torch.ones(80, 48)}, model / "a.safetensors")
    assert f"tensor {UP} is in a.safetensors and in b.safetensors" in refusal(build_model, model)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two shards and return the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(("a.safetensors", "b.safetensors")):
        inside = dict(sorted(tensors.items())[number::2])
        save_file(inside, folder / name)
        weight_map |= dict.fromkeys(inside, name)
    return weight_map


def write_index(folder: Path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


INDEXES = [
    (lambda m: m | {UP: "absent.safetensors"}, "names absent.safetensors, which is not there"),
    (lambda m: m | {UP: m[NORM]} | {NORM: m[UP]}, f"holds tensor {NORM}, which is in "),
    (lambda m: m | {"no.such": "a.safetensors"}, "tensor no.such, which is in none of its files"),
    (lambda m: m | {UP: "../model/a.safetensors"}, "'../model/a.safetensors', which is not the"),
    (lambda m: m | {UP: "/etc/passwd"}, "'/etc/passwd', which is not the name of a file beside it"),
    (lambda m: m | {UP: ".."}, "names .., which is not there"),
    (lambda m: m | {UP: "a\0.safetensors"}, "which is not there"),
    (lambda m: m | {UP: "config.json"}, "names config.json"),
    (lambda m: m | {UP: ""}, "which is not there"),
    (lambda m: m | {UP: 3}, f"places tensor {UP} in 3"),
    (lambda m: m | {UP: None}, f"places tensor {UP} in None"),
    (lambda m: {}, "has no 'weight_map'"),
    (lambda m: [m], "has no 'weight_map'"),
    (lambda m: None, "has no 'weight_map'"),
]


@pytest.mark.parametrize(("change", "message"), INDEXES)
def test_index(change, message, model):
    weight_map = shard(model)
    assert weight_map[UP] != weight_map[NORM]
    write_index(model, {"weight_map": weight_map})
    build_model(model)
    write_index(model, {"weight_map": change(weight_map)})
    assert message in refusal(build_model, model)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"weight": {}}'])
def test_index_that_is_none(text, model):
    shard(model)
    write_index(model, text)
    assert "model.safetensors.index.json" in refusal(build_model, model)


def test_a_single_file_counts_before_an_index(model):
    """As in transformers: an index left from before a merge is not read."""
    write_index(model, {"weight_map": {UP: "gone.safetensors"}})
    assert build_model(model).num_blocks == 2
    load_model(model)


# --- model references -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("", "is empty"),
        ("~no-such-user/model", "cannot be looked up"),
        ("x" * 5000, "cannot be looked up"),
        ("a\0b", "NUL"),
    ],
)
def test_model_references(ref, message, tmp_path):
    values = {"out": tmp_path / "out", "stages": [{"method": "rtn"}]}
    refusal(lambda: run_recipe(build_recipe({"model": ref, **values})))
    if "\0" not in ref:
        assert message in refusal(resolve_model, ref)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    assert "transformers cannot read" in refusal(resolve_model, str(tmp_path / "x.gguf"))


# --- tokenizers and calibration ---------------------------------------------------------------


def quantize(model: Path, source: Path | str, **settings):
    values = {
        "model": str(model),
        "out": model.parent / "out",
        "calibration": {"source": str(source), "samples": 2, "seq_len": 16, **settings},
        "stages": [{"method": "gptq", "group_size": 16}],
    }
    return run_recipe(build_recipe(values))


TOKENIZERS = ["", "{}", "null", "[1]", '{"version": 3}', '{"model": {"type": "BPE", "vocab": 3}}']


@pytest.mark.parametrize("text", TOKENIZERS)
def test_broken_tokenizers(text, model, text_file):
    (model / "tokenizer.json").write_text(text)
    assert "tokenizer" in refusal(quantize, model, text_file)


def test_tokens_outside_the_vocabulary(model, text_file):
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["Ġ"] = 4000
    path.write_text(json.dumps(content))
    message = refusal(quantize, model, text_file)
    assert "yields token 4000, but the model has only 128" in message


def ids(tensor: torch.Tensor):
    return lambda path: save_file({"input_ids": tensor}, path)


SOURCES = [
    ("x.txt", lambda p: p.write_text("w5 w7"), "has 5 tokens; 2 samples of 16 need 32"),
    ("x.txt", lambda p: p.write_text(" \n"), "x.txt"),
    ("x.txt", lambda p: p.write_bytes("w5".encode("utf-16")), "is not UTF-8"),
    ("x.txt", lambda p: p.mkdir(), "is a folder"),
    ("x.csv", lambda p: p.write_text("w5"), "ends in '.csv'; allowed: .txt"),
    ("x.jsonl", lambda p: p.write_text('{"text": "w5"}\n{"text": \n'), "line 2: Expecting value"),
    ("x.jsonl", lambda p: p.write_text('{"text": 3}'), "line 1 has no text field 'text'"),
    ("x.jsonl", lambda p: p.write_text("[1]"), "(found: list)"),
    ("x.jsonl", lambda p: p.write_text("[" * 100_000), "line 1"),
    ("x.jsonl", lambda p: p.write_text('{"text": "\\ud800"}'), "line 1 holds half a character"),
    ("x.jsonl", lambda p: p.write_bytes(b'{"text": "\xff"}'), "is not UTF-8"),
    ("x.parquet", lambda p: p.write_bytes(b""), "x.parquet"),
    ("x.parquet", lambda p: p.write_bytes(b"PAR1" + bytes(100) + b"PAR1"), "x.parquet"),
    ("x.safetensors", lambda p: p.write_bytes(b"{}"), "no readable tensor 'input_ids'"),
    ("x.safetensors", ids(torch.ones(2, 16)), "holds 'input_ids' in F32"),
    ("x.safetensors", ids(torch.ones(2, 16, dtype=torch.bool)), "holds 'input_ids' in BOOL"),
    ("x.safetensors", ids(torch.full((2, 16), -3)), "holds token -3"),
    ("x.safetensors", ids(torch.full((2, 16), 128)), "token 128, but the model has only 128"),
    ("x.safetensors", ids(torch.ones(32, dtype=torch.int64)), "holds token ids [32]"),
    ("x.safetensors", ids(torch.ones(2, 16, 1, dtype=torch.int64)), "holds token ids [2, 16, 1]"),
    ("x.safetensors", ids(torch.ones(0, 16, dtype=torch.int64)), "holds token ids [0, 16]"),
]


@pytest.mark.parametrize(("name", "make", "message"), SOURCES)
def test_calibration_sources(name, make, message, model, tmp_path):
    make(tmp_path / name)
    assert message in refusal(quantize, model, tmp_path / name)


def test_a_folder_as_calibration(model, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(quantize, model, tmp_path / "empty")
    assert str(tmp_path / "empty") in message


def test_ids_of_small_integers_are_taken(model, tmp_path):
    save_file({"input_ids": torch.full((2, 16), 5, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    assert quantize(model, tmp_path / "x.safetensors")["calibration_sha256"]


def test_line_separators_inside_json_text(model, tmp_path):
    """U+2028 may stand in a JSON string as it is, and does not end a line of JSONL."""
    text = "w5 w7 " * 20 + "\u2028" + "w8 " * 20
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(line + "\n", encoding="utf-8")
    assert quantize(model, tmp_path / "x.jsonl")["calibration_sha256"]


def test_text_of_one_long_line(model, tmp_path, monkeypatch):
    """Text is cut at a character, lines of JSON at a line."""
    from compress import calibration

    monkeypatch.setattr(calibration, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "x.txt").write_text("w5 é" * 1000, encoding="utf-8")
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "w5 " * 1000}))
    assert quantize(model, tmp_path / "x.txt")["calibration_sha256"]
    shutil.rmtree(model.parent / "out")
    assert "0 tokens" in refusal(quantize, model, tmp_path / "x.jsonl")


# --- recipes ----------------------------------------------------------------------------------

GOOD = "model: m\nout: o\nstages: [{method: gptq}]\n"
HEX = "0x" + "f" * 5000  # Python refuses to print it
TEXTS = [
    ("", "must hold keys and values, not NoneType"),
    ("- a", "not list"),
    ("3", "not int"),
    ("[" * 5000, "nested too deeply"),
    ("a: &x [1]\nb: *x", "aliases are not supported"),
    (GOOD + "model: n", "key 'model' is given twice"),
    (GOOD.replace("gptq", "gptq, bits: 4, bits: 8"), "key 'bits' is given twice"),
    (GOOD + "modle: n", "unknown key 'modle'"),
    (GOOD + "3: n", "unknown key 3 for recipe"),
    (GOOD + "null: n", "unknown key None"),
    (GOOD + "? [a]\n: b", "unhashable key"),
    (GOOD + "dtype: !!python/object:os.system x", "!python/object" + ":os.system"),
    (GOOD + "dtype: 2020-99-99", "is not readable YAML"),
    (GOOD + "dtype: !!timestamp x", "is not readable YAML"),
    (GOOD + "dtype: !!int x", "is not readable YAML"),
    (GOOD + "dtype: !!bool x", "is not readable YAML"),
    (GOOD + "dtype: " + "9" * 5000, "is not readable YAML"),
    (GOOD + "dtype: " + HEX, "dtype = (a int too large to print)"),
    (GOOD + "dtype: " + "x" * 5000, "dtype = 'xxx"),
    (GOOD + "dtype: null", "dtype = None"),
    (GOOD + "calibration: null", "'calibration' is None"),
    (GOOD + "calibration: {samples: 1.5}", "samples = 1.5"),
    (GOOD + "calibration: {samples: 1000000000000}", "samples = 1000000000000"),
    (GOOD + f"calibration: {{seed: {2**64}}}", "seed = 18446744073709551616"),
    (GOOD + "calibration: {source: ''}", "source = ''"),
    (GOOD + "calibration: {source: null}", "source = None"),
    (GOOD + 'calibration: {source: "\\ud800"}', "source = '\\ud800' is not valid Unicode"),
    (GOOD.replace("gptq", "[x]"), "unknown method ['x']"),
    (GOOD.replace("gptq", "null"), "unknown method None"),
    (GOOD.replace("gptq", "gtpq"), "did you mean 'gptq'?"),
    (GOOD.replace("[{method: gptq}]", "3"), "'stages' must list"),
    (GOOD.replace("{method: gptq}", "gptq"), "stage 'gptq' has no 'method'"),
    (GOOD.replace("gptq", "gptq, group_size: 0"), "group_size = 0"),
    (GOOD.replace("gptq", "gptq, group_size: -7"), "group_size = -7"),
    (GOOD.replace("gptq", "gptq, group_size: 1.5"), "group_size = 1.5"),
    (GOOD.replace("gptq", "gptq, damping: .nan"), "damping = nan"),
    (GOOD.replace("gptq", "gptq, sweeps: 1000000000"), "sweeps = 1000000000"),
    (GOOD.replace("gptq", "gptq, ignore: ['re:(']"), "not a regular expression"),
    (GOOD.replace("gptq", "gptq, overrides: {'re:[': {}}"), "not a regular expression"),
    (GOOD.replace("gptq", "gptq, overrides: [1]"), "overrides = [1]"),
    (GOOD.replace("model: m", "model: ''"), "model = ''"),
    (GOOD.replace("model: m", "model: 3"), "model = 3"),
    (GOOD.replace("out: o", "out: null"), "out = None"),
    (GOOD.replace("out: o", "out: ''"), "not a folder name"),
    (GOOD.replace("out: o", "out: a/.."), "not a folder name"),
    (GOOD.replace("out: o", 'out: "a\\0b"'), "holds a NUL character"),
    (GOOD.replace("out: o", "out: " + "x" * 300), "longer than 240 bytes a name"),
    (GOOD.replace("out: o", "out: " + "x/" * 3000), "4000 in all"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=range(len(TEXTS)))
def test_recipes(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    assert message in refusal(load_recipe, tmp_path / "recipe.yaml")


def test_recipe_files(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "absent.yaml", tmp_path / "recipe.yaml", Path("a\0b")):
        assert refusal(load_recipe, path).startswith("recipe '")


def test_an_override_of_an_ignored_linear_is_checked(model, text_file):
    """Nothing would read it, but the report repeats it: a date there broke the run at its end."""
    stage = {"method": "rtn", "ignore": ["down_proj"], "overrides": {"down_proj": {"bits": {1}}}}
    values = {"model": str(model), "out": model.parent / "out", "stages": [stage]}
    message = refusal(lambda: run_recipe(build_recipe(values)))
    assert "override for down_proj: bits = {1}" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bits=[", "--set bits is not readable YAML"),
        ("bits=2020-99-99", "--set bits is not readable YAML"),
        ("bits=*x", "aliases are not supported"),
        ("bits=", "--set 'bits=' is not [LINEAR:]KEY=VALUE"),
        ("=4", "--set '=4' is not"),
    ],
)
def test_settings_on_the_command_line(change, message):
    assert message in refusal(_settings_of, [change])
