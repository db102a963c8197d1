"""Re-packing checkpoints: the same codes in every format, and back."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compress.cli import main
from compress.core.errors import InputError
from compress.core.source import ModelSource, resolve_model
from compress.export import export_model
from compress.inspection import inspect_folder
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.quant.packed import PackedFolder
from compress.recipe import build_recipe

TOKENS = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def quantize(folder, out, **settings):
    stage = {"method": "rtn", "group_size": 16, **settings}
    return run_recipe(build_recipe({"model": str(folder), "out": out, "stages": [stage]}))


def export(folder, out, format_name):
    export_model(str(folder), format_name, out)
    return out


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_tensors(one, two):
    one, two = tensors_of(one), tensors_of(two)
    assert set(one) == set(two)
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name


def packed(folder):
    return PackedFolder(ModelSource(str(folder), folder))


def logits(folder):
    with torch.no_grad():
        return load_model(folder, "float32", torch.device("cpu"))(TOKENS).logits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, "channel"])
def test_every_format_gives_the_same_logits_and_comes_back(
    symmetric, group_size, model_folder, tmp_path
):
    """bfloat16 scales: float16 holds them, and the way back restores them."""
    start = tmp_path / "compressed-tensors"
    folder = model_folder("qwen2", torch.bfloat16)
    quantize(folder, start, symmetric=symmetric, group_size=group_size)
    gptq = export(start, tmp_path / "gptq", "gptq")
    awq = export(gptq, tmp_path / "awq", "awq")
    expected = logits(start)
    assert expected.std() > 0.1
    for other in (gptq, awq):
        assert torch.equal(logits(other), expected)
        assert_same_tensors(export(other, tmp_path / f"{other.name}-back", start.name), start)
    assert_same_tensors(export(awq, tmp_path / "awq-gptq", "gptq"), gptq)
    one, two = (json.loads((f / "config.json").read_text()) for f in (gptq, tmp_path / "awq-gptq"))
    assert one == two
    assert one["dtype"] == "bfloat16"
    left = json.loads((awq / "config.json").read_text())["quantization_config"]
    assert left["modules_to_not_convert"] == ["lm_head"]
    assert (awq / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    found = json.loads((awq / "compress.json").read_text())
    assert found["scales"] == {"rounded": 0, "largest_relative_change": 0.0}
    assert (found["from"], found["made_by"]["from"]) == ("gptq", "compressed-tensors")
    assert (
        "AWQ (AutoAWQ `gemm`) format: the same codes and scales" in (awq / "README.md").read_text()
    )


@pytest.mark.parametrize("format_name", ["gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_writes_the_formats(format_name, symmetric, model_folder, text_file, tmp_path):
    """AWQ's negative scales included; the loaded weights are those that the walk went on with."""
    out = tmp_path / "out"
    values = {"source": str(text_file), "samples": 4, "seq_len": 64}
    stage = {"method": "awq", "group_size": 16, "symmetric": symmetric, "format": format_name}
    recipe = {"model": str(model_folder("llama")), "out": out, "stages": [stage]}
    run_recipe(build_recipe(recipe | {"calibration": values, "compute_dtype": "float32"}))
    checkpoint = packed(out)
    assert checkpoint.format_name == format_name
    assert len(checkpoint.linears) == 14
    state = load_model(out, "float32", torch.device("cpu")).state_dict()
    negative = 0
    for name in checkpoint.linears:
        weight = checkpoint.weight(name)
        assert weight.scale.dtype == torch.float16
        assert weight.symmetric == symmetric
        negative += int((weight.scale < 0).sum())
        scale = weight.scale.float().repeat_interleave(16, dim=1)
        zero = 0 if symmetric else weight.zero_point.float().repeat_interleave(16, dim=1)
        assert torch.equal(state[f"{name}.weight"], (weight.codes.float() - zero) * scale), name
    assert (negative > 0) == symmetric
    card = (out / "README.md").read_text()
    tags = dict.fromkeys((format_name, "awq", "4-bit"))
    assert f"tags: [{', '.join(tags)}]" in card
    assert "pip install gptqmodel" in card


@pytest.mark.parametrize("bits", [2, 8])
def test_gptq_of_other_widths(bits, model_folder, tmp_path):
    start = tmp_path / "start"
    quantize(model_folder("llama", torch.float16), start, bits=bits)
    gptq = export(start, tmp_path / "gptq", "gptq")
    assert torch.equal(logits(gptq), logits(start))
    assert_same_tensors(export(gptq, tmp_path / "back", "compressed-tensors"), start)
    with pytest.raises(InputError, match=f"format awq cannot hold .*: AWQ has 4 bits, not {bits}"):
        export(gptq, tmp_path / "awq", "awq")


def test_mixed_grids_and_linears_left_in_float(model_folder, tmp_path):
    start = tmp_path / "start"
    quantize(
        model_folder("qwen2", torch.float16),
        start,
        ignore=["re:.*layers.1.mlp.up_proj"],
        overrides={"down_proj": {"bits": 8}},
    )
    gptq = export(start, tmp_path / "gptq", "gptq")
    assert torch.equal(logits(gptq), logits(start))
    scheme = json.loads((gptq / "config.json").read_text())["quantization_config"]
    assert len(scheme["dynamic"]) == 3
    assert packed(gptq).grid("model.layers.1.mlp.down_proj").bits == 8
    assert packed(gptq).grid("model.layers.1.mlp.gate_proj").bits == 4
    assert_same_tensors(export(gptq, tmp_path / "back", "compressed-tensors"), start)
    with pytest.raises(InputError, match="AWQ has 4 bits"):
        export(gptq, tmp_path / "awq", "awq")


def test_scales_that_change_are_said(model_folder, tmp_path, capsys):
    start = tmp_path / "start"
    quantize(model_folder("llama"), start)  # float32 scales
    gptq = export(start, tmp_path / "gptq", "gptq")
    said = capsys.readouterr().err
    report = json.loads((gptq / "compress.json").read_text())["scales"]
    before, after = packed(start), packed(gptq)
    changed, worst = 0, 0.0
    for name in before.linears:
        one, two = before.weight(name), after.weight(name)
        assert torch.equal(one.codes, two.codes)
        change = ((two.scale.double() - one.scale.double()) / one.scale.double()).abs()
        changed += int(change.count_nonzero())
        worst = max(worst, change.max().item())
    assert report == {"rounded": changed, "largest_relative_change": worst}
    assert 0 < worst < 2**-10  # half a unit in the last of float16's 11 places, if not subnormal
    assert f"{changed:,} scales change in float16, by {worst:.1e} of their value at most" in said
    # The float16 values go back into float32 unchanged, and from there again.
    again = export(gptq, tmp_path / "again", "compressed-tensors")
    assert_same_tensors(export(again, tmp_path / "gptq-again", "gptq"), gptq)


def test_scales_out_of_range_are_refused(model_folder, tmp_path):
    start = tmp_path / "start"
    quantize(model_folder("llama"), start)
    tensors = tensors_of(start)
    name = "model.layers.1.mlp.up_proj"
    for value, message in ((1e5, "up to 1e\\+05"), (1e-9, "down to 1e-09")):
        tensors[f"{name}.weight_scale"][3, 1] = value
        save_file(tensors, start / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=f"gptq cannot hold {name}: its scales.*{message}"):
            export(start, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_codes_that_are_not_packed_are_read(model_folder, tmp_path):
    """compressed-tensors' `int-quantized`, made by hand: the same weights in other formats."""
    start = tmp_path / "start"
    quantize(model_folder("llama", torch.float16), start, bits=8, symmetric=False)
    whole, tensors = packed(start), tensors_of(start)
    for name in whole.linears:
        weight = whole.weight(name)
        del tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"]
        tensors[f"{name}.weight"] = weight.codes
        tensors[f"{name}.weight_zero_point"] = weight.zero_point
    plain = tmp_path / "plain"
    shutil.copytree(start, plain)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = (start / "config.json").read_text().replace("pack-quantized", "int-quantized")
    (plain / "config.json").write_text(config)
    assert_same_tensors(export(plain, tmp_path / "back", "compressed-tensors"), start)
    facts = inspect_folder(plain)["quantization"]
    assert (facts["quantized_linears"], facts["format"]) == (14, "int-quantized")
    config = json.loads(config)
    config["quantization_config"]["transform_config"] = {"config_groups": {"R1": {}}}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"rotated weights \(transform_config\), a layout"):
        packed(plain)


def activation_ordered(folder, out, format_name="gptq"):
    """A GPTQ checkpoint whose columns are grouped in a random order, made by hand."""
    quantize(folder, out, format=format_name)
    tensors, generator = tensors_of(out), torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(".g_idx")]:
        order = torch.randperm(len(tensors[name]), generator=generator)
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_activation_order_is_kept(model_folder, tmp_path):
    start = activation_ordered(model_folder("llama", torch.float16), tmp_path / "start")
    name = "model.layers.0.mlp.gate_proj"
    weight = packed(start).weight(name)
    state = load_model(start, "float32", torch.device("cpu")).state_dict()
    scale = weight.scale.float()[:, tensors_of(start)[f"{name}.g_idx"].long()]
    assert torch.equal(state[f"{name}.weight"], weight.codes.float() * scale)
    again = export(start, tmp_path / "again", "gptq")
    assert_same_tensors(again, start)
    scheme = json.loads((again / "config.json").read_text())["quantization_config"]
    assert scheme["desc_act"] is True
    for other in ("awq", "compressed-tensors"):
        with pytest.raises(InputError, match="its columns are grouped in activation order"):
            export(start, tmp_path / "other", other)


def test_awq_linears_that_look_symmetric(model_folder, tmp_path):
    """Zero points of 8 everywhere in one linear do not make a checkpoint of two kinds."""
    start = tmp_path / "start"
    quantize(model_folder("llama", torch.float16), start, format="awq", symmetric=False)
    tensors = tensors_of(start)
    tensors["model.layers.1.mlp.up_proj.qzeros"].fill_(0x88888888 - (1 << 32))
    save_file(tensors, start / "model.safetensors", {"format": "pt"})
    for name in ("gptq", "compressed-tensors"):
        other = export(start, tmp_path / name, name)
        assert not any(
            layer["symmetric"]
            for layer in json.loads((other / "compress.json").read_text())["layers"]
        )
        assert torch.equal(logits(other), logits(start))
        assert_same_tensors(export(other, tmp_path / f"{name}-back", "awq"), start)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def change_scheme(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def drop(suffix):
    def damage(folder):
        tensors = tensors_of(folder)
        del tensors[f"model.layers.1.mlp.up_proj.{suffix}"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


REFUSED = [
    (lambda f: None, "ggml", "format 'ggml' is unknown; allowed are compressed-tensors, gptq, awq"),
    (drop("scales"), "awq", "model.layers.1.mlp.up_proj in .* does not fit its config.json"),
    (lambda f: change_scheme(f, bits=8), "awq", "does not fit its config.json|calls for"),
    (lambda f: change_scheme(f, bits=None), "awq", "quantization_config for .*: bits = None"),
    (lambda f: change_scheme(f, group_size=32), "awq", "scales are .* the checkpoint is broken"),
    (lambda f: change_scheme(f, quant_method="hqq"), "awq", "is quantized by hqq; read are"),
    (lambda f: change_scheme(f, checkpoint_format="marlin"), "awq", "checkpoint_format marlin"),
]


@pytest.mark.parametrize(("damage", "target", "message"), REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(damage, target, message, model_folder, tmp_path):
    start = tmp_path / "start"
    quantize(model_folder("llama", torch.float16), start, format="gptq")
    damage(start)
    done = run("export", start, "--format", target, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_unquantized_models_are_refused(model_folder, tmp_path):
    done = run("export", model_folder(), "--format", "gptq", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "is not quantized; run: compress quantize" in done.stderr


def test_command_line(model_folder, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    quantize(model_folder("llama", torch.float16), start)
    done = run("export", start, "--format", "awq", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    made = json.loads((start / "compress.json").read_text())["sizes"]
    for key in ("parameters", "quantized_weights"):
        assert report["sizes"][key] == made[key]
    assert (report["from"], report["format"]) == ("compressed-tensors", "awq")
    assert len(report["layers"]) == 14
    assert run("export", start, "--format", "awq", "--out", out).exit_code == 2  # exists
    done = run("export", start, "--format", "gptq", "--out", out, "--overwrite")
    assert "gptq, from compressed-tensors" in done.stdout
    said = json.loads(run("generate", out, "--prompt", "w5 w7", "--max-tokens", 3, "--json").stdout)
    assert 1 <= said["tokens"] <= 3


def test_missing_and_unused_tensors_of_a_packed_model(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    quantize(model_folder("llama", torch.float16), out, format="gptq")
    tensors = tensors_of(out)
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(80).half()  # AutoGPTQ writes such
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    load_model(out)
    assert (
        "1 tensors are not used, such as model.layers.0.mlp.up_proj.bias" in capsys.readouterr().err
    )
    del tensors["model.norm.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors .*model\.norm\.weight"):
        load_model(out)


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
def test_inspection_counts_bits(format_name, model_folder, tmp_path):
    out = tmp_path / "out"
    quantize(model_folder("llama", torch.float16), out, format=format_name, symmetric=False)
    found = inspect_folder(out)
    scheme = found["quantization"]
    assert scheme["quantized_linears"] == 14
    weights = sum(p.codes.numel() for p in map(packed(out).weight, packed(out).linears))
    assert scheme["quantized_weights"] == weights
    # 4 bits, and 16 + 4 for each 16 weights; shapes or g_idx on top
    assert scheme["bits_per_weight"] == pytest.approx(5.25, abs=1.3)
    assert scheme["bits_per_weight"] >= 5.25
    assert found["bytes_by_part"]["quantized linears"] / found["bytes"] > 0.3
    assert scheme["ignore"] == ["lm_head"]
    (group,) = scheme["groups"].values()
    assert (group["num_bits"], group["group_size"], group["symmetric"]) == (4, 16, False)


# GGUF

HEADS, KV_HEADS = 4, 2  # of the model that write_gguf writes


def in_hugging_faces_order(weight, heads):
    """Undo what llama.cpp's converter does to q and k: pairs of rows to halves of a head."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for row in range(size):
            half, place = row % 2, row // 2
            out[head * size + half * (size // 2) + place] = weight[head * size + row]
    return out


def all_of(kind):
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return dict.fromkeys(names, kind)


@pytest.mark.parametrize(
    ("kind", "format_name"),
    [("Q4_0", "compressed-tensors"), ("Q4_0", "gptq"), ("Q4_0", "awq"), ("Q8_0", "gptq")],
)
def test_gguf_is_repacked_without_loss(kind, format_name, tmp_path, write_gguf):
    path = tmp_path / "tiny.gguf"
    dense = write_gguf(path, all_of(kind))
    report = export_model(str(path), format_name, tmp_path / "out")
    assert report["scales"]["rounded"] == 0
    assert report["left_in_float"] == []
    state = load_model(tmp_path / "out", "float32", torch.device("cpu")).state_dict()
    block = "model.layers.0"
    expected = {
        f"{block}.self_attn.q_proj": in_hugging_faces_order(dense["blk.0.attn_q"], HEADS),
        f"{block}.self_attn.k_proj": in_hugging_faces_order(dense["blk.0.attn_k"], KV_HEADS),
        f"{block}.self_attn.v_proj": dense["blk.0.attn_v"],
        f"{block}.self_attn.o_proj": dense["blk.0.attn_output"],
        f"{block}.mlp.gate_proj": dense["blk.0.ffn_gate"],
        f"{block}.mlp.down_proj": dense["blk.0.ffn_down"],
        "lm_head": dense["output"],
        "model.embed_tokens": dense["token_embd"],
    }
    for name, weight in expected.items():
        assert np.array_equal(state[f"{name}.weight"].numpy(), weight), name
    assert len(packed(tmp_path / "out").linears) == 7
    whole = logits(resolve_model(str(path)).folder)
    assert torch.equal(logits(tmp_path / "out"), whole)


def test_gguf_of_mixed_types(tmp_path, capsys, write_gguf):
    path = tmp_path / "mixed.gguf"
    write_gguf(path, all_of("Q4_0") | {"ffn_down": "F16", "attn_v": "Q5_0", "output": "Q8_0"})
    report = export_model(str(path), "gptq", tmp_path / "out")
    left = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"]
    assert report["left_in_float"] == left
    assert f"Left in float, 2 linears in blocks: {', '.join(left)}" in capsys.readouterr().err
    assert torch.equal(logits(tmp_path / "out"), logits(resolve_model(str(path)).folder))


def test_offsets_and_files_without_linears_are_refused(tmp_path, write_gguf):
    path = tmp_path / "offsets.gguf"
    write_gguf(path, all_of("Q4_1"))
    done = run("export", path, "--format", "compressed-tensors", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "q_proj: Q4_1 has a float offset for each group; run: compress quantize" in done.stderr
    path = tmp_path / "float.gguf"
    write_gguf(path, {})
    done = run("export", path, "--format", "gptq", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "has no linear of a type that can be re-packed" in done.stderr
    assert not (tmp_path / "out").exists()
