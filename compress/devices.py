"""Devices that a plan is made for: by name, from a file, or this machine's processor.

Numbers are data sheets', in decimal units and dense: NVIDIA prints rates with sparsity, twice as
high, where a footnote says so.  A link's bytes/s are those of one direction, half of what is
printed for NVLink.  A device file is YAML or JSON with the fields of `Device`:

    name: my card
    memory: 48GB
    bandwidth: 864.0e+9
    rates: {bf16: 362.0e+12, fp8: 733.0e+12}
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from compress.core.config import build
from compress.core.errors import InputError, nearest, reason_of, shown
from compress.core.resources import parse_size

COMPUTE = ("bf16", "fp8", "int8")

# What one core of a processor gives where nobody has measured: reading memory, and bf16 matrix
# products with instructions for them and without.  Measured on one EPYC 9005 core with others busy:
# 20 GB/s, 200 GFLOP/s, and 50 GFLOP/s in float32.  `compress plan --calibrate` measures.
CORE_BANDWIDTH = 20e9
CORE_RATE_BF16, CORE_RATE = 200e9, 50e9
SOCKET_BANDWIDTH = 300e9  # eight channels of DDR5-4800


@dataclass(frozen=True)
class Efficiency:
    """What of a device's numbers is reached: shares of its bandwidth and of its rates, and the
    seconds that a step takes on top.
    """

    bandwidth: float = 1.0
    matmul: float = 1.0
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for key, value in (("bandwidth", self.bandwidth), ("matmul", self.matmul)):
            _check(value, f"efficiency's {key}")
        if not (math.isfinite(self.overhead) and self.overhead >= 0):
            raise InputError(f"overhead = {shown(self.overhead)} s is not possible; give 0 or more")


@dataclass(frozen=True)
class Device:
    """memory in bytes, bandwidth and link in bytes/s, rates in FLOP/s of bf16 and more."""

    name: str
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    link: float | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)
    source: str = ""

    def __post_init__(self) -> None:
        _check(self.memory, "memory")
        _check(self.bandwidth, "bandwidth")
        for compute, rate in self.rates.items():
            if compute not in COMPUTE:
                raise InputError(
                    f"rates of device {shown(self.name)} have {shown(compute)}; allowed are "
                    + ", ".join(COMPUTE)
                )
            _check(rate, f"rate of {compute}")
        if "bf16" not in self.rates:
            raise InputError(f"rates of device {shown(self.name)} need one for bf16")
        if self.link is not None:
            _check(self.link, "link")

    def rate(self, compute: str) -> float:
        """FLOP/s of a kind; that of bf16 where the device has no units for it."""
        return self.rates.get(compute, self.rates["bf16"])


def _check(value: float, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{what} = {shown(value)} is not possible; give a number above 0")


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="h100",
            memory=80_000_000_000,
            bandwidth=3.35e12,
            rates={"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
            link=450e9,
            source="NVIDIA H100 Tensor Core GPU data sheet, SXM5 80 GB, NVLink 900 GB/s",
        ),
        Device(
            name="h200",
            memory=141_000_000_000,
            bandwidth=4.8e12,
            rates={"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
            link=450e9,
            source="NVIDIA H200 Tensor Core GPU data sheet, SXM5 141 GB, NVLink 900 GB/s",
        ),
        Device(
            name="a100",
            memory=80_000_000_000,
            bandwidth=2.039e12,
            rates={"bf16": 312e12, "int8": 624e12},
            link=300e9,
            source="NVIDIA A100 Tensor Core GPU data sheet, SXM4 80 GB, NVLink 600 GB/s",
        ),
        Device(
            name="l4",
            memory=24_000_000_000,
            bandwidth=300e9,
            rates={"bf16": 121e12, "fp8": 242.5e12, "int8": 242.5e12},
            link=32e9,
            source="NVIDIA L4 Tensor Core GPU data sheet (halved: 242, 485, 485), PCIe 4.0 x16",
        ),
        Device(
            name="4090",
            memory=24_000_000_000,
            bandwidth=1008e9,
            rates={"bf16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12},
            link=32e9,
            source="NVIDIA Ada architecture paper, GeForce RTX 4090, sums in FP32; PCIe 4.0 x16",
        ),
    )
}


def find_device(ref: str) -> Device:
    """The device of a name, `cpu` (this machine's processor), or a device file.

    Raises InputError when there is none, or the file is not right.
    """
    if ref in DEVICES:
        return DEVICES[ref]
    if ref == "cpu":
        return this_cpu()
    path = Path(ref).expanduser()
    if path.suffix in (".yaml", ".yml", ".json"):
        return read_device(path)
    names = [*DEVICES, "cpu"]
    raise InputError(
        f"device {shown(ref)} is unknown; give one of {', '.join(names)}, or a .yaml or .json file "
        f"with name, memory, bandwidth and rates{nearest(ref, names)}"
    )


def read_device(path: Path) -> Device:
    """A device file.  Raises InputError for one that cannot be read, or has wrong entries."""
    from compress.strict_yaml import parse_yaml

    where = f"device file '{path}'"
    try:
        text = path.read_text(encoding="utf-8")
        values: Any = json.loads(text) if path.suffix == ".json" else parse_yaml(text, where)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {where}: {reason_of(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} holds a {type(values).__name__}; give keys and values")
    values = {"name": path.stem, "source": str(path), **values}
    missing = [key for key in ("memory", "bandwidth", "rates") if key not in values]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; give bytes, bytes/s and FLOP/s")
    if isinstance(values["memory"], str):
        values["memory"] = parse_size(values["memory"])
    return build(Device, values, where)


def this_cpu(cores: int | None = None) -> Device:
    """This machine's processor, on as many cores as PyTorch has threads: a guess by the core."""
    import torch

    from compress.core.device import native_bfloat16

    cores = cores or torch.get_num_threads()
    rate = CORE_RATE_BF16 if native_bfloat16(torch.device("cpu")) else CORE_RATE
    return Device(
        name="cpu",
        memory=psutil.virtual_memory().total,
        bandwidth=min(cores * CORE_BANDWIDTH, SOCKET_BANDWIDTH),
        rates={"bf16": cores * rate},
        source=f"a guess for {cores} cores; --calibrate measures",
    )
