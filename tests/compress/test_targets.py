"""What loaders take, case by case, from what their sources say (see compress.targets)."""

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from compress.cli import main
from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.quant.config import Grid
from compress.quant.packed import PackedFolder
from compress.recipe import build_recipe
from compress.targets import TARGETS, Contents, check_target

TOKENS = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(3))
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def contents(grid=Grid(4, 128), shape=(128, 256), dtype="bfloat16", **changes):  # noqa: B008
    grids = {f"model.layers.0.self_attn.{name}": grid for name in NAMES}
    grids |= {f"model.layers.0.self_attn.{name}": g for name, g in changes.items()}
    in_float = [name for name, g in grids.items() if g is None]
    grids = {name: g for name, g in grids.items() if g is not None}
    return Contents(grids, dict.fromkeys(grids, shape), in_float, {}, dtype)


CASES = [
    ("vllm", "compressed-tensors", contents(), True, ""),
    ("vllm", "compressed-tensors", contents(Grid(8, None)), True, ""),
    ("vllm", "compressed-tensors", contents(Grid(4, 32, False)), True, ""),
    ("vllm", "compressed-tensors", contents(Grid(8, 32, False)), None, "asymmetric 8 bits"),
    ("vllm", "compressed-tensors", contents(Grid(3, 32)), None, "3 bits; every version takes 4"),
    ("vllm", "compressed-tensors", contents(Grid(4, 16)), False, "group size 16 without --dtype"),
    ("vllm", "compressed-tensors", contents(Grid(4, 16), dtype="float16"), True, ""),
    ("vllm", "compressed-tensors", contents(shape=(128, 576)), None, "576 inputs and 384 outputs"),
    ("vllm", "compressed-tensors", contents(k_proj=Grid(8, 128)), False, "become one qkv_proj"),
    ("vllm", "compressed-tensors", contents(v_proj=None), False, "q_proj, k_proj, v_proj differ"),
    ("vllm", "compressed-tensors", contents(o_proj=Grid(8, 32)), True, ""),
    ("vllm", "compressed-tensors", contents(o_proj=None), True, ""),
    ("vllm", "gptq", contents(), True, ""),
    ("vllm", "gptq", contents(Grid(4, 128, False)), False, "asymmetric GPTQ"),
    ("vllm", "gptq", contents(Grid(3, 128), dtype="float16"), None, "GPTQ at 3 bits"),
    ("vllm", "gptq", contents(o_proj=Grid(8, 128)), None, "grids that differ"),
    ("vllm", "gptq", contents(Grid(4, 16), dtype="float16"), False, "group size 16"),
    ("vllm", "awq", contents(Grid(4, 64, False)), True, ""),
    ("vllm", "awq", contents(Grid(4, 16, False)), None, "group size 16"),
    ("sglang", "compressed-tensors", contents(), True, ""),
    ("sglang", "compressed-tensors", contents(Grid(3, 128)), False, "3 bits; SGLang takes 4 and 8"),
    ("sglang", "compressed-tensors", contents(Grid(4, 128, False)), None, "asymmetric"),
    ("sglang", "gptq", contents(), True, ""),
    ("sglang", "gptq", contents(Grid(3, 128)), False, "pass --dtype float16"),
    ("sglang", "gptq", contents(Grid(3, 128), dtype="float16"), True, ""),
    ("sglang", "awq", contents(Grid(4, 64, False), v_proj=None), False, "become one qkv_proj"),
    ("transformers", "compressed-tensors", contents(Grid(3, 16)), True, ""),
    ("transformers", "compressed-tensors", contents(Grid(4, 16, False)), False, "dequantize=True"),
    ("transformers", "gptq", contents(Grid(3, 32, False)), True, ""),
    ("transformers", "awq", contents(Grid(4, 32, False)), True, ""),
]


class Stub:
    """A checkpoint of which only the contents matter."""

    def __init__(self, format_name, facts):
        self.format_name, self.facts = format_name, facts
        self.linears, self.scheme = list(facts.grids), facts.scheme
        self.config = {"dtype": facts.dtype}
        self.grid, self.shape = facts.grids.get, facts.shapes.get

    def float_linears(self):
        return self.facts.in_float


@pytest.mark.parametrize(("target", "format_name", "facts", "loads", "reason"), CASES)
def test_rules(target, format_name, facts, loads, reason):
    verdict = check_target(Stub(format_name, facts), target)
    assert verdict["loads"] is loads, verdict
    assert bool(verdict["reasons"]) == (loads is not True)
    assert reason in " ".join(verdict["reasons"])
    if loads is None:
        assert all(why.startswith("not known: ") for why in verdict["reasons"])


def test_every_target_knows_every_format():
    from compress.quant.formats import FORMATS

    for formats in TARGETS.values():
        assert set(formats) == set(FORMATS)


def quantize(model, out, **settings):
    stage = {"method": "rtn", "group_size": 16, **settings}
    run_recipe(build_recipe({"model": str(model), "out": out, "stages": [stage]}))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_does_what_is_said(bits, symmetric, model_folder, tmp_path):
    out = tmp_path / "out"
    quantize(model_folder("llama", torch.float16), out, bits=bits, symmetric=symmetric)
    verdict = check_target(PackedFolder(ModelSource("out", out)), "transformers")
    assert verdict["needs"] == ["compressed-tensors"]
    assert verdict["loads"] == symmetric
    if not symmetric:
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(out)
        return
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(TOKENS).logits
        ours = load_model(out, "float32", torch.device("cpu"))(TOKENS).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)  # float32 sums


def test_codes_that_are_not_packed_are_not_known():
    for formats in TARGETS.values():
        _, rules = formats["compressed-tensors"]
        scheme = {"format": "int-quantized", "config_groups": {"group_0": {}}}
        grids = {"model.layers.0.mlp.down_proj": Grid(8, None, True)}
        whole = Contents(grids, dict.fromkeys(grids, (128, 256)), [], scheme, "bfloat16")
        objections = [objection.kind for rule in rules for objection in rule(whole)]
        assert objections == ["not known"]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_command_line(model_folder, tmp_path):
    out = tmp_path / "out"
    quantize(
        model_folder("llama", torch.float16), out, format="gptq", ignore=["re:.*1.mlp.up_proj"]
    )
    done = run("inspect", out, "--target", "transformers", "--json")
    assert done.exit_code == 1
    verdict = json.loads(done.stdout)
    assert set(verdict) == {"target", "loads", "reasons", "needs"}
    assert verdict["loads"] is False
    assert "dynamic" in verdict["reasons"][0]
    done = run("inspect", out, "--target", "vllm")
    assert done.exit_code == 1
    assert "gate_proj, up_proj differ" in " ".join(done.stdout.split())
    quantize(model_folder("llama", torch.float16), tmp_path / "two")
    done = run("inspect", tmp_path / "two", "--target", "transformers")
    assert done.exit_code == 0
    assert "yes" in done.stdout
    assert run("inspect", out, "--target", "vlm").exit_code == 2
    done = run("inspect", model_folder(), "--target", "vllm")
    assert done.exit_code == 2
    assert "is not quantized" in done.stderr


def test_unknown_target():
    with pytest.raises(InputError, match=r"target 'vlm' is unknown.*did you mean 'vllm'"):
        check_target(Stub("awq", contents()), "vlm")
