"""The registry of conversions of the attention: a name for each configuration class."""

from collections.abc import Mapping

from compress.prune.cla import ClaConfig
from compress.prune.conversion_stage import ConversionConfig
from compress.prune.gqa import GqaConfig
from compress.prune.mla import MlaConfig
from compress.prune.windows import WindowsConfig

CONVERSIONS: Mapping[str, type[ConversionConfig]] = {
    "gqa": GqaConfig,
    "mla": MlaConfig,
    "windows": WindowsConfig,
    "cla": ClaConfig,
}
