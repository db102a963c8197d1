"""Whether vLLM, SGLang or transformers takes a quantized checkpoint, and why not.

Rules are read from the loaders' sources, named beside each, and hold for NVIDIA GPUs of compute
capability 8.0 and later; what could not be verified is said to be not known.  vLLM and SGLang were
not run.  transformers 5.23 was, on a CPU, with compressed-tensors 0.20, bitsandbytes 0.50,
gptqmodel 7.7 and optimum 2.3.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from compress.core.errors import InputError, nearest
from compress.core.own_class import only_here
from compress.core.source import ModelSource, read_config
from compress.quant.config import Grid, RoundedGrid
from compress.quant.formats.gptq import FUSED
from compress.quant.packed import PackedFolder

MARLIN_GROUPS = (None, 32, 64, 128)  # vLLM and SGLang, marlin_utils.py: -1 is one scale a row


@dataclass(frozen=True)
class Contents:
    """What the rules look at: grids and (out, in) by linear, linears in float, floats' dtype."""

    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, int]]
    in_float: Sequence[str]
    scheme: Mapping[str, Any]
    dtype: str


@dataclass(frozen=True)
class Objection:
    """Why a loader does not take a checkpoint, or why it is not known whether it does."""

    kind: Literal["refused", "not known"]
    reason: str


Rule = Callable[[Contents], Iterator[Objection]]


def check_source(source: ModelSource, target: str) -> dict[str, Any]:
    """`check_target` of a model, which is none of quantization where its class is our own."""
    if target in TARGETS and (reason := only_here(read_config(source.folder))):
        return {"target": target, "loads": False, "reasons": [reason], "needs": []}
    return check_target(PackedFolder(source), target)


def check_target(packed: PackedFolder, target: str) -> dict[str, Any]:
    """Say whether a loader takes a checkpoint.

    Returns {target, loads, reasons, needs}: `loads` is None where it is not known, `reasons` says
    why not or what is not known, `needs` names packages to install.  Raises InputError for an
    unknown target.
    """
    if target not in TARGETS:
        raise InputError(
            f"target '{target}' is unknown; allowed are {', '.join(TARGETS)}"
            f"{nearest(target, TARGETS)}"
        )
    contents = Contents(
        {name: packed.grid(name) for name in packed.linears},
        {name: packed.shape(name) for name in packed.linears},
        packed.float_linears(),
        packed.scheme,
        str(packed.config.get("dtype") or packed.config.get("torch_dtype") or "not stated"),
    )
    needs, rules = TARGETS[target][packed.format_name]
    found = [objection for rule in rules for objection in rule(contents)]
    loads = None if found else True
    if any(objection.kind == "refused" for objection in found):
        loads = False
    reasons = [
        o.reason if o.kind == "refused" else f"not known: {o.reason}" for o in dict.fromkeys(found)
    ]
    return {"target": target, "loads": loads, "reasons": reasons, "needs": needs}


def weights_alone(rule: Rule) -> Rule:
    """A rule for linears whose inputs are not rounded: the others have kernels of their own.

    vLLM and SGLang: compressed_tensors.py, _is_dynamic_token_w8a8 and _is_fp8_w8a8 take 8 bits with
    one scale a row and a token; fp8 before compute capability 8.9 leaves inputs unrounded.
    """

    def narrowed(contents: Contents) -> Iterator[Objection]:
        kept = {n: grid for n, grid in contents.grids.items() if not isinstance(grid, RoundedGrid)}
        return rule(replace(contents, grids=kept))

    return narrowed


def never_tried(contents: Contents) -> Iterator[Objection]:
    """vLLM's and SGLang's bitsandbytes loaders are documented for 4 bits."""
    yield Objection("not known", "int8 checkpoints of bitsandbytes; those of 4 bits are documented")


def bits_in(kind: Literal["refused", "not known"], allowed: Sequence[int], who: str) -> Rule:
    """Only these widths."""

    def rule(contents: Contents) -> Iterator[Objection]:
        for bits in sorted({grid.bits for grid in contents.grids.values()} - set(allowed)):
            yield Objection(kind, f"{bits} bits; {who} takes {' and '.join(map(str, allowed))}")

    return rule


def one_scheme_in_fused(contents: Contents) -> Iterator[Objection]:
    """q, k, v and gate, up become one linear each, and must agree.

    vLLM: compressed_tensors/utils.py (should_ignore_layer), utils/gptq_utils.py
    (is_layer_gptq_quantized), utils/quant_utils.py (is_layer_skipped).  SGLang:
    compressed_tensors/utils.py.
    """
    for name in [*contents.grids, *contents.in_float]:
        parent, _, leaf = name.rpartition(".")
        for whole, parts in FUSED.items():
            members = [f"{parent}.{part}" for part in parts]
            if leaf == parts[0] and len({contents.grids.get(m) for m in members}) > 1:
                yield Objection(
                    "refused", f"{parent}: {', '.join(parts)} differ, but become one {whole}"
                )
                return


def marlin_groups(contents: Contents) -> Iterator[Objection]:
    """vLLM: auto_gptq.py calls verify_marlin_supported, whatever kernel runs later."""
    for size in sorted({g.group_size or 0 for g in contents.grids.values()}):
        if (size or None) not in MARLIN_GROUPS:
            yield Objection(
                "refused", f"group size {size}; GPTQ takes one scale a row, 32, 64, 128"
            )


def vllm_kernel(contents: Contents) -> Iterator[Objection]:
    """A kernel for each linear: Marlin, or Exllama where the activations are float16.

    Marlin (kernels/linear/mixed_precision/marlin.py, utils/marlin_utils.py): 4 and 8 bits
    symmetric, 4 bits asymmetric, MARLIN_GROUPS, and outputs in 64s and inputs in 128s, before vLLM
    padded them.  Exllama (exllama.py): symmetric, float16, groups.  Machete needs Hopper, Conch a
    package.
    """
    for name, grid in contents.grids.items():
        outputs, inputs = _fused_shape(contents, name)
        exllama = grid.symmetric and grid.group_size and contents.dtype == "float16"
        if exllama:
            continue
        if grid.group_size not in MARLIN_GROUPS:
            remedy = " without --dtype float16" if grid.symmetric else " for asymmetric weights"
            kind = "refused" if grid.symmetric else "not known"
            yield Objection(kind, f"no kernel was found for group size {grid.group_size}{remedy}")
        elif not grid.symmetric and grid.bits != 4:
            yield Objection(
                "not known", f"asymmetric {grid.bits} bits run on Machete (Hopper) or Conch alone"
            )
        elif outputs % 64 or inputs % 128:
            yield Objection(
                "not known",
                f"{inputs} inputs and {outputs} outputs fit Marlin's tiles (128, 64) only in "
                "versions that pad them",
            )


def vllm_gptq_grids(contents: Contents) -> Iterator[Objection]:
    """vLLM: auto_gptq.py, TYPE_MAP, which lists other widths in some versions.

    The gptq.py before it took 2, 3, 4 and 8 bits, and asymmetric, in float16.  utils/gptq_utils.py
    (override_config) applies `dynamic`; whether it sets the type of the weights, versions differ.
    """
    grids = set(contents.grids.values())
    if not all(grid.symmetric for grid in grids):
        yield Objection("refused", "asymmetric GPTQ, since auto_gptq.py took the place of gptq.py")
    for bits in sorted({grid.bits for grid in grids} - {4, 8}):
        yield Objection("not known", f"GPTQ at {bits} bits; every version takes 4 and 8")
    if len(grids) > 1:
        yield Objection("not known", "GPTQ with grids that differ between linears (dynamic)")


def awq_groups(contents: Contents) -> Iterator[Objection]:
    """vLLM auto_awq.py and SGLang awq.py: Marlin for these sizes, else an older kernel."""
    for size in sorted({g.group_size or 0 for g in contents.grids.values()}):
        if (size or None) not in MARLIN_GROUPS:
            yield Objection("not known", f"the fallback kernel with group size {size}")


def sglang_marlin(contents: Contents) -> Iterator[Objection]:
    """SGLang: compressed_tensors_wNa16.py and gptq_marlin repack for Marlin without padding."""
    for name, grid in contents.grids.items():
        outputs, inputs = _fused_shape(contents, name)
        if grid.group_size not in MARLIN_GROUPS:
            yield Objection("not known", f"Marlin takes no group size {grid.group_size}")
        elif outputs % 64 or inputs % 128:
            yield Objection(
                "not known",
                f"{inputs} inputs and {outputs} outputs do not fit Marlin's tiles (128, 64)",
            )


def sglang_symmetric(contents: Contents) -> Iterator[Objection]:
    """SGLang: compressed_tensors.py, _is_wNa16_group_channel; versions differ."""
    if not all(grid.symmetric for grid in contents.grids.values()):
        yield Objection("not known", "asymmetric weights; some versions take symmetric ones alone")


def sglang_gptq(contents: Contents) -> Iterator[Objection]:
    """SGLang: gptq.py, GPTQMarlinConfig for 4 and 8 bits symmetric, else GPTQConfig in float16."""
    marlin = {
        name: grid
        for name, grid in contents.grids.items()
        if grid.symmetric and grid.bits in (4, 8) and grid.group_size in MARLIN_GROUPS
    }
    if len(marlin) == len(contents.grids):
        yield from sglang_marlin(contents)
    elif contents.dtype != "float16":
        yield Objection(
            "refused", "without Marlin GPTQ runs in float16 alone; pass --dtype float16"
        )


def not_packed(contents: Contents) -> Iterator[Objection]:
    """compressed-tensors' `int-quantized` with weights alone, which no tool writes by default."""
    groups = contents.scheme.get("config_groups", {}).values()
    if not contents.grids:  # of weights alone
        return
    if "int-quantized" in {contents.scheme.get("format"), *(g.get("format") for g in groups)}:
        yield Objection("not known", "int-quantized weights without quantized activations")


def vllm_cache(contents: Contents) -> Iterator[Objection]:
    """vLLM: compressed_tensors.py (validate_kv_cache_scheme) is for fp8, and lets int8 through."""
    cache = contents.scheme.get("kv_cache_scheme")
    if cache and cache.get("type") != "float":
        yield Objection("not known", "scales of an int8 cache; vLLM's own is fp8 (--kv-cache fp8)")


def sglang_cache(contents: Contents) -> Iterator[Objection]:
    """How SGLang takes `kv_cache_scheme` was not looked up."""
    if contents.scheme.get("kv_cache_scheme"):
        yield Objection("not known", "scales of keys and values (kv_cache_scheme)")


def transformers_zero_points(contents: Contents) -> Iterator[Objection]:
    """Run: compressed-tensors 0.18 to 0.20 makes room for zero points that are not packed."""
    if not all(grid.symmetric for grid in contents.grids.values()):
        yield Objection(
            "refused",
            "asymmetric weights load only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)",
        )


def transformers_dynamic(contents: Contents) -> Iterator[Objection]:
    """Run: optimum 2.3 takes one grid for all linears in the blocks, and none in float."""
    if contents.scheme.get("dynamic"):
        yield Objection(
            "refused",
            "linears with other grids or in float (dynamic), which optimum does not read; "
            "gptqmodel loads them by itself",
        )


def _fused_shape(contents: Contents, name: str) -> tuple[int, int]:
    """(out, in) of the linear that this one becomes a part of."""
    parent, _, leaf = name.rpartition(".")
    outputs, inputs = contents.shapes[name]
    for parts in FUSED.values():
        members = [f"{parent}.{part}" for part in parts]
        if leaf in parts and all(member in contents.shapes for member in members):
            outputs = sum(contents.shapes[member][0] for member in members)
    return outputs, inputs


# target -> format -> (packages that it needs besides, rules)
TARGETS: Mapping[str, Mapping[str, tuple[list[str], list[Rule]]]] = {
    "vllm": {
        # compressed_tensors_wNa16.py: 4 and 8 bits; later versions list 2 to 8
        "compressed-tensors": (
            [],
            [
                bits_in("not known", (4, 8), "every version"),
                one_scheme_in_fused,
                weights_alone(vllm_kernel),
                vllm_cache,
                weights_alone(not_packed),
            ],
        ),
        "gptq": ([], [vllm_gptq_grids, marlin_groups, one_scheme_in_fused, vllm_kernel]),
        "awq": ([], [one_scheme_in_fused, awq_groups]),
        "bitsandbytes": (["bitsandbytes"], [never_tried]),
    },
    "sglang": {
        # compressed_tensors_wNa16.py, WNA16_SUPPORTED_TYPES_MAP
        "compressed-tensors": (
            [],
            [
                bits_in("refused", (4, 8), "SGLang"),
                one_scheme_in_fused,
                sglang_symmetric,
                weights_alone(sglang_marlin),
                sglang_cache,
                weights_alone(not_packed),
            ],
        ),
        "gptq": ([], [sglang_gptq, one_scheme_in_fused]),
        "awq": ([], [one_scheme_in_fused, awq_groups]),
        "bitsandbytes": (["bitsandbytes"], [never_tried]),
    },
    "transformers": {
        "compressed-tensors": (
            ["compressed-tensors"],
            [transformers_zero_points, weights_alone(not_packed)],
        ),
        # quantizers/quantizer_gptq.py and quantizer_awq.py
        "gptq": (["gptqmodel", "optimum"], [transformers_dynamic]),
        "awq": (["gptqmodel"], []),
        "bitsandbytes": (["bitsandbytes"], []),  # run: bitsandbytes 0.50
    },
}
