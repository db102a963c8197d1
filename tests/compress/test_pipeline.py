"""From a model folder to a checkpoint that transformers loads."""

import json
import shutil
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from compress import pipeline
from compress.calibration import calibration_tokens
from compress.core.blocks import BlockModel
from compress.core.errors import InputError
from compress.core.shards import ShardReader
from compress.core.source import resolve_model
from compress.core.stage import BlockOutcome, LayerReport
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.preflight import preflight
from compress.quant.formats.compressed_tensors import unpack_weight
from compress.quant.rtn import RtnConfig, RtnStage
from compress.recipe import CalibrationConfig, build_recipe

TOKENS = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(3))


def quantize(folder, out, text_file, method="awq", calibration=None, **settings):
    overwrite = settings.pop("overwrite", False)
    top = {k: settings.pop(k) for k in ("dtype", "propagate_error") if k in settings}
    values = {
        "model": str(folder),
        "out": out,
        "compute_dtype": "float32",
        "calibration": {
            "source": str(text_file),
            "samples": 8,
            "seq_len": 64,
            **(calibration or {}),
        },
        "stages": [{"method": method, **settings}],
        **top,
    }
    return run_recipe(build_recipe(values), overwrite)


def quantization_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def dense_logits(original, out) -> torch.Tensor:
    """Logits of the original class with our own de-quantized weights put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(original)
    reader = ShardReader(out)
    state = {}
    for name in reader.names:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            parts = {
                n.rpartition(".")[2]: reader.load(n)
                for n in reader.names
                if n.startswith(owner + ".")
            }
            state[f"{owner}.weight"] = unpack_weight(
                parts, quantization_of(out), owner
            ).dequantize()
        elif not leaf.startswith("weight_"):
            state[name] = reader.load(name)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" for name in missing)  # tied
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_checkpoint_loads_in_transformers_with_our_logits(
    family, method, model_folder, text_file, tmp_path
):
    folder, out = model_folder(family), tmp_path / "out"
    report = quantize(folder, out, text_file, method, bits=4, group_size=16)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits = model(TOKENS).logits
        before = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    # the same weights in the same class: nothing but the order of float32 sums can differ
    torch.testing.assert_close(logits, dense_logits(folder, out), rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits, before)
    names = [layer["name"] for layer in report["layers"] if layer["method"]]
    assert len(names) == 14  # 7 linears in each of 2 blocks
    left = {layer["name"]: layer["note"] for layer in report["layers"] if not layer["method"]}
    assert set(left) == {"model.embed_tokens", "lm_head"}
    assert all(note.startswith("left in float: ") for note in left.values())
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == [
        "lm_head"
    ]
    ids, same = (AutoTokenizer.from_pretrained(f)("w5 w7").input_ids for f in (out, folder))
    assert ids == same
    assert len(ids) >= 3


OTHERS = [
    "cohere", "gemma3", "granite", "olmo2", "phi", "phi3", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_classes_that_nothing_here_knows_by_name(family, model_folder, text_file, tmp_path):
    """Fused projections, parallel blocks, norms after the blocks, layer norms with biases."""
    folder, out = model_folder(family), tmp_path / "out"
    report = quantize(folder, out, text_file, group_size=16)
    linears = [layer for layer in report["layers"] if layer["method"]]
    assert all(layer["note"].startswith(("scaled into", "not scaled")) for layer in linears)
    assert sum(layer["note"].startswith("scaled into") for layer in linears) >= 4
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits
    torch.testing.assert_close(logits, dense_logits(folder, out), rtol=1e-4, atol=1e-4)


def test_mixtures_of_experts_are_refused(model_folder, text_file, tmp_path):
    with pytest.raises(InputError, match="mixtures of experts"):
        quantize(model_folder("mixtral"), tmp_path / "out", text_file, group_size=16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, "channel"])
def test_asymmetric_grids_load_too(bits, group_size, model_folder, text_file, tmp_path):
    out = tmp_path / "out"
    quantize(model_folder(), out, text_file, bits=bits, group_size=group_size, symmetric=False)
    ours = dense_logits(model_folder(), out)
    with torch.no_grad():
        through_loader = load_model(out)(TOKENS).logits
        # transformers 5.23 with compressed-tensors 0.20 needs this flag for packed zero points
        config = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(out, quantization_config=config)
        flagged = model(TOKENS).logits
    torch.testing.assert_close(through_loader, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flagged, ours, rtol=1e-5, atol=1e-5)


def test_awq_beats_rtn_and_8_bits_beat_4(model_folder, text_file, tmp_path):
    """Divergence from the original on other text than AWQ was calibrated on."""
    divergence = {}
    for method, bits in (("rtn", 4), ("awq", 4), ("awq", 8)):
        out = tmp_path / f"{method}{bits}"
        quantize(model_folder(), out, text_file, method, bits=bits, group_size=16)
        config = TextEvalConfig(text_file, seq_len=50, windows=8)
        divergence[method, bits] = evaluate_text(
            resolve_model(str(out)), config, resolve_model(str(model_folder()))
        )["kl_mean"]
    assert divergence["awq", 4] < 0.8 * divergence["rtn", 4]
    assert divergence["awq", 8] < 0.05 * divergence["awq", 4]


def test_bfloat16_model_stays_bfloat16(model_folder, text_file, tmp_path):
    folder, out = model_folder("qwen2", torch.bfloat16), tmp_path / "out"
    quantize(folder, out, text_file, group_size=16)
    reader = ShardReader(out)
    scales = [n for n in reader.names if n.endswith("weight_scale")]
    assert all(reader.load(n).dtype == torch.bfloat16 for n in [*scales, "model.norm.weight"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16


def test_two_runs_give_the_same_bytes(model_folder, text_file, tmp_path):
    for name in ("a", "b"):
        quantize(model_folder(), tmp_path / name / "out", text_file, group_size=16)
    for file in ("model.safetensors", "compress.json", "config.json"):
        one, two = (tmp_path / name / "out" / file for name in ("a", "b"))
        assert one.read_bytes() == two.read_bytes(), file
    run = json.loads((tmp_path / "a" / "out" / "run.json").read_text())
    assert run["seconds"] > 0


def test_shards_when_the_model_is_large(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ShardWriter", lambda folder: _small_shards(folder))
    out = tmp_path / "out"
    quantize(model_folder(), out, text_file, group_size=16)
    names = sorted(p.name for p in out.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits
    torch.testing.assert_close(logits, dense_logits(model_folder(), out), rtol=1e-5, atol=1e-5)


def _small_shards(folder):
    from compress.core.shards import ShardWriter

    return ShardWriter(folder, single_file_bytes=1000)


def test_another_model_writes_the_text(model_folder, tmp_path):
    """As that model writes it for itself."""
    known = {"samples": 3, "seq_len": 32}
    writer = model_folder("qwen2")
    found = []
    for model, source in ((writer, "self"), (model_folder(), f"self:{writer}")):
        calibration = {"source": source, **known}
        stages = [{"method": "gptq", "bits": 4, "group_size": 16}]
        values = {"model": str(model), "calibration": calibration, "stages": stages}
        found.append(run_recipe(build_recipe(values | {"out": str(tmp_path / model.name)})))
    assert found[0]["calibration_sha256"] == found[1]["calibration_sha256"]
    assert f"self:{writer.name}" in (tmp_path / model_folder().name / "README.md").read_text()


@pytest.mark.parametrize(
    ("writer", "message"),
    [("nowhere", "calibration 'self:nowhere': model 'nowhere'"), ("", "'self:': model ''")],
)
def test_a_writer_that_is_not_there(writer, message, model_folder, tmp_path):
    values = {"model": str(model_folder()), "out": str(tmp_path / "out")}
    values |= {"calibration": {"source": f"self:{writer}"}, "stages": [{"method": "awq"}]}
    with pytest.raises(InputError, match=message):
        run_recipe(build_recipe(values))


def test_a_writer_with_other_tokens(model_folder, tmp_path):
    """Two tokens have each other's ids, and then there are more than the model knows."""
    writer = shutil.copytree(model_folder("qwen2"), tmp_path / "writer")
    tokenizer = json.loads((writer / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (writer / "tokenizer.json").write_text(json.dumps(tokenizer))
    values = {"model": str(model_folder()), "out": str(tmp_path / "out")}
    values |= {"calibration": {"source": f"self:{writer}"}, "stages": [{"method": "awq"}]}
    with pytest.raises(
        InputError, match=r"which differ in 2, such as .*w1.* .* the same vocabulary"
    ):
        preflight(build_recipe(values))
    resized = AutoModelForCausalLM.from_pretrained(model_folder("qwen2"))
    resized.resize_token_embeddings(130)
    resized.save_pretrained(writer)
    with pytest.raises(InputError, match="vocabularies of 130 and 128 tokens"):
        preflight(build_recipe(values))


def test_another_writer_is_not_gone_on_with(model_folder, tmp_path, monkeypatch):
    """Text that the model of before wrote is not what this one would write."""
    writer = shutil.copytree(model_folder("qwen2"), tmp_path / "writer")
    known = {"source": f"self:{writer}", "samples": 3, "seq_len": 32}
    values = {"model": str(model_folder()), "out": str(tmp_path / "out"), "calibration": known}
    recipe = build_recipe(values | {"stages": [{"method": "gptq", "group_size": 16}]})
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_recipe(recipe)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_pretrained(model_folder("qwen3")).save_pretrained(writer)
    with pytest.raises(InputError, match="another calibration model"):
        run_recipe(recipe)


def test_self_calibration_needs_no_data(model_folder, text_file, tmp_path):
    calibration = {"source": "self", "samples": 3, "seq_len": 300}
    report = quantize(
        model_folder("llama"), tmp_path / "out", text_file, calibration=calibration, group_size=16
    )
    assert report["calibration_sha256"]


def test_one_block_in_memory(model_folder, text_file, tmp_path, monkeypatch):
    """At no time are more than two blocks' weights read and alive."""
    import gc
    import weakref

    alive: list[weakref.ref] = []
    most = 0
    load = BlockModel.load_block

    def counting(self, index):
        nonlocal most
        block = load(self, index)
        alive.append(weakref.ref(block))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return block

    monkeypatch.setattr(BlockModel, "load_block", counting)
    quantize(model_folder(), tmp_path / "out", text_file, group_size=16)
    assert len(alive) == 2
    assert most <= 2


class _WorstStaysStage(RtnStage):
    """A global decision: the block with the larger weights stays in float."""

    needs_statistics = True
    decides_globally = True

    def collect(self, block):
        return block.index, sum(p.square().sum().item() for p in block.module.parameters())

    def decide(self, summaries):
        return max(summaries, key=lambda pair: pair[1])[0]

    def apply(self, block, plan):
        if block.index == plan:
            return BlockOutcome(layers=[LayerReport(block.name, None, (0, 0), note="chosen")])
        return super().apply(block, None)


def test_a_global_stage_collects_from_all_blocks_first(
    model_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(RtnConfig, "stage", lambda *given: _WorstStaysStage(*given))
    report = quantize(model_folder(), tmp_path / "out", text_file, "rtn", group_size=16)
    left = [layer for layer in report["layers"] if layer["note"] == "chosen"]
    assert len(left) == 1
    assert sum(layer["method"] == "rtn" for layer in report["layers"]) == 7
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "ignore"
    ]
    assert len(ignore) == 8
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


class _RecordingStage(RtnStage):
    """RTN that asks for statistics and keeps what it is given."""

    needs_statistics = True
    seen: ClassVar[dict[int, torch.Tensor]] = {}
    cross: ClassVar[dict[int, torch.Tensor | None]] = {}

    def apply(self, block, plan):
        self.seen[block.index] = block.inputs[0].second_moment
        self.cross[block.index] = block.inputs[0].cross_moment
        return super().apply(block, plan)


def inputs_of_block_1(folder, tokens) -> torch.Tensor:
    """What q reads in block 1, [tokens, 48], by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen = []
    linear = model.model.layers[1].self_attn.q_proj
    linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, 48)))
    with torch.no_grad():
        model(tokens)
    return seen[0]


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("propagate", [True, False])
def test_blocks_see_what_compressed_blocks_before_them_give(
    propagate, reference, model_folder, text_file, tmp_path, monkeypatch
):
    """Moments of block 1, recomputed by transformers on the compressed or original model."""
    monkeypatch.setattr(_RecordingStage, "needs_reference", reference)
    monkeypatch.setattr(RtnConfig, "stage", lambda *given: _RecordingStage(*given))
    folder, out = model_folder("qwen3"), tmp_path / "out"
    settings = {"group_size": 16, "propagate_error": propagate}
    if reference and not propagate:
        with pytest.raises(InputError, match="cross_moment compares"):
            quantize(folder, out, text_file, "rtn", **settings)
        return
    quantize(folder, out, text_file, "rtn", **settings)
    config = CalibrationConfig(str(text_file), samples=8, seq_len=64)
    tokens = calibration_tokens(config, resolve_model(str(folder)), 128, torch.device("cpu"))
    original = inputs_of_block_1(folder, tokens)
    x = inputs_of_block_1(out, tokens) if propagate else original
    # float32 sums of 512 tokens in another order
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(_RecordingStage.seen[1], x.T @ x / len(x), **tolerance)
    if reference:
        assert not torch.allclose(x, original, atol=1e-2)
        cross = original.T @ x / len(x)
        torch.testing.assert_close(_RecordingStage.cross[1], cross, **tolerance)
    else:
        assert _RecordingStage.cross[1] is None


def test_failure_leaves_nothing_under_the_final_name(
    model_folder, text_file, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.checkpoint, "write_side_files", _full_disk)
        with pytest.raises(InputError, match="No space left"):
            quantize(model_folder(), out, text_file, group_size=16)
    assert [path.name for path in tmp_path.iterdir()] == [".out.progress"]
    quantize(model_folder(), out, text_file, group_size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _full_disk(*_args):
    raise OSError(28, "No space left on device")


def test_base_model_checkpoint_without_prefix(model_folder, text_file, tmp_path):
    """Some checkpoints were saved from the bare model: no `model.` before the names."""
    AutoModelForCausalLM.from_pretrained(model_folder()).model.save_pretrained(tmp_path / "bare")
    for path in model_folder().glob("tokenizer*"):
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    model = BlockModel(resolve_model(str(tmp_path / "bare")), torch.device("cpu"), torch.float32)
    assert "embed_tokens.weight" in model.outer_names()
    quantize(tmp_path / "bare", tmp_path / "out", text_file, group_size=16)
    quantize(model_folder(), tmp_path / "whole", text_file, group_size=16)
    with torch.no_grad():
        one, two = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(TOKENS).logits
            for name in ("out", "whole")
        )
    assert torch.equal(one, two)


def test_buffers_inside_blocks_are_carried(model_folder, text_file, tmp_path, monkeypatch):
    """A few classes store buffers in their blocks, such as routing biases."""
    import shutil

    from safetensors.torch import load_file, save_file

    from compress.core import blocks

    folder = shutil.copytree(model_folder(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{i}.mlp.bias_table": torch.arange(3) + i for i in range(2)}
    save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})
    build = blocks.build_skeleton

    def with_buffer(*arguments):
        skeleton = build(*arguments)
        for layer in skeleton.model.layers:
            layer.mlp.register_buffer("bias_table", torch.zeros(3, dtype=torch.int64))
        return skeleton

    monkeypatch.setattr(blocks, "build_skeleton", with_buffer)
    quantize(folder, tmp_path / "out", text_file, group_size=16)
    reader = ShardReader(tmp_path / "out")
    for name, tensor in extra.items():
        assert torch.equal(reader.load(name), tensor)


@pytest.mark.real_model
def test_real_model_loads_with_our_logits(text_file, tmp_path):
    """SmolLM2-135M: width 576, 9 heads on 3, vocabulary 49152, tied, from GGUF."""
    calibration = {"samples": 2, "seq_len": 128}
    few = {"scale_points": 3, "clip_points": 2}  # of the scales that AWQ tries; any will do here
    report = quantize("smollm2", tmp_path / "out", text_file, calibration=calibration, **few)
    quantized = [layer for layer in report["layers"] if layer["method"]]
    assert len(quantized) == 210
    assert all(layer["group_size"] == 64 for layer in quantized)  # 128 does not divide 576
    assert all("scaled into" in layer["note"] for layer in quantized)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
    ours = dense_logits(resolve_model("smollm2").folder, tmp_path / "out")
    # the same weights in the same class; logits of order 10, float32 sums over 30 layers
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-4)
