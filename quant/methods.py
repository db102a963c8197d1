"""The registry of compression methods: a name for each configuration class."""

from collections.abc import Mapping

from compress.quant.awq import AwqConfig
from compress.quant.config import WeightOnlyConfig
from compress.quant.rtn import RtnConfig

METHODS: Mapping[str, type[WeightOnlyConfig]] = {
    "awq": AwqConfig,
    "rtn": RtnConfig,
}
