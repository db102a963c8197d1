"""The registry of compression methods: a name for each configuration class."""

from collections.abc import Mapping

from compress.quant.awq import AwqConfig
from compress.quant.awq_gptq import AwqGptqConfig
from compress.quant.config import WeightOnlyConfig
from compress.quant.gptq import GptqConfig
from compress.quant.qat import QatConfig
from compress.quant.rtn import RtnConfig

METHODS: Mapping[str, type[WeightOnlyConfig]] = {
    "awq": AwqConfig,
    "awq+gptq": AwqGptqConfig,
    "gptq": GptqConfig,
    "qat": QatConfig,
    "rtn": RtnConfig,
}
