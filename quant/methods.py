"""The registry of compression methods: a name for each configuration class."""

from collections.abc import Mapping

from compress.quant.awq import AwqConfig
from compress.quant.awq_gptq import AwqGptqConfig
from compress.quant.config import QuantizationConfig
from compress.quant.fp8 import Fp8Config
from compress.quant.gptq import GptqConfig
from compress.quant.llm_int8 import LlmInt8Config
from compress.quant.qat import QatConfig
from compress.quant.rtn import RtnConfig
from compress.quant.smoothquant import SmoothQuantConfig

METHODS: Mapping[str, type[QuantizationConfig]] = {
    "awq": AwqConfig,
    "awq+gptq": AwqGptqConfig,
    "fp8": Fp8Config,
    "gptq": GptqConfig,
    "llm-int8": LlmInt8Config,
    "qat": QatConfig,
    "rtn": RtnConfig,
    "smoothquant": SmoothQuantConfig,
}
