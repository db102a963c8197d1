"""bitsandbytes' int8 layout, against bitsandbytes."""

import pytest
import torch

from compress.quant.config import Grid, RoundedGrid
from compress.quant.formats import bitsandbytes as layout
from compress.quant.input_rounding import rounding_of
from compress.quant.llm_int8 import vectorwise
from compress.quant.weight import QuantizedWeight

bitsandbytes = pytest.importorskip("bitsandbytes")
CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}


def weight(rows=37, columns=48):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    values[5] = 0
    values[:, 7] *= 30
    return values.half()


def quantized(outliers=(7, 20)):
    values, index = weight(), torch.tensor(outliers, dtype=torch.int64)
    codes, scale = vectorwise(values)
    grid = RoundedGrid(inputs="int8", outlier_threshold=6.0)
    inputs = rounding_of(grid, index, values[:, index])
    return QuantizedWeight(codes, scale, None, 8, values.shape[1], inputs=inputs)


def test_codes_and_scales_are_bitsandbytes_own():
    """Bit for bit, but for rows of zeros, whose codes there are NaN's cast."""
    codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight())
    packed = layout.pack_weight(quantized())
    live = weight().abs().amax(dim=1) > 0
    assert torch.equal(packed["weight"][live], codes[live])
    assert not packed["weight"][~live].any()
    # 127 * (max / 127) in float32 may differ from max in the last bit
    torch.testing.assert_close(packed["SCB"], largest, rtol=2**-23, atol=0)


@pytest.mark.parametrize("outliers", [(7, 20), ()])
def test_there_and_back(outliers):
    start = quantized(outliers)
    again = layout.unpack_weight(layout.pack_weight(start), CONFIG, "a")
    assert torch.equal(again.codes, start.codes)
    torch.testing.assert_close(again.scale, start.scale, rtol=2**-22, atol=0)
    if outliers:
        assert torch.equal(again.inputs.outlier_index, start.inputs.outlier_index)
        assert torch.equal(again.inputs.outlier_weight, start.inputs.outlier_weight)
    else:
        assert again.inputs.outlier_index is again.inputs.outlier_weight is None
    assert (again.inputs.kind, again.inputs.largest, again.inputs.threshold) == ("int8", 127, 6.0)


def test_outlier_columns_are_exact_in_the_dense_weight():
    dense = quantized().dequantize()
    assert torch.equal(dense[:, [7, 20]], weight()[:, [7, 20]].float())
    assert not torch.equal(dense, weight().float())
    packed = layout.pack_weight(quantized())
    rebuilt = packed["weight"] * packed["SCB"].unsqueeze(1) / 127
    others = [i for i in range(48) if i not in (7, 20)]
    torch.testing.assert_close(dense[:, others], rebuilt[:, others], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(37, 48)}, "codes are torch.float32"),
        ({"outlier_index": torch.tensor([7, 48], dtype=torch.int32)}, "leaves 0 to 47"),
        ({"outlier_index": torch.tensor([7], dtype=torch.int32)}, "does not fit"),
    ],
)
def test_broken_tensors_are_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        layout.unpack_weight(layout.pack_weight(quantized()) | change, CONFIG, "a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"load_in_8bit": False, "load_in_4bit": True}, "4 bits"),
        ({"load_in_8bit": False}, "no int8"),
        ({"llm_int8_has_fp16_weight": True}, "float weights"),
    ],
)
def test_layouts_that_are_not_read(change, reason):
    found = layout.foreign(CONFIG | change)
    assert found == reason or (reason and found.startswith(reason))


def test_weights_alone_are_refused():
    reason = layout.refusal({"a": Grid(8, None)}, {"a": (3, 4)})
    assert reason.startswith("a: ")
    assert "llm-int8" in reason
    assert layout.refusal({"a": layout.grid_of(CONFIG, "a")}, {"a": (3, 4)}) is None


def test_a_checkpoint_without_a_threshold_has_transformers_default():
    from transformers import BitsAndBytesConfig

    default = BitsAndBytesConfig(load_in_8bit=True).llm_int8_threshold
    assert layout.grid_of({"load_in_8bit": True}, "a").outlier_threshold == default
