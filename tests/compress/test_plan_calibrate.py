"""`compress plan --calibrate`: what it measures and compares, never how fast this machine is."""

import json

import pytest
import torch
from click.testing import CliRunner

from compress.bench.latency import Run
from compress.cli import main
from compress.devices import Device, find_device
from compress.kernels.lowbit_matmul import LinearWeight
from compress.planning import calibrate, stand_in
from compress.planning.case import Case, Load
from compress.planning.stand_in import Reached, StandIn
from compress.roofline import Precision
from compress.shapes import find_shape

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """The same measurements on little data."""
    for name, value in {
        "SMALL": (64, 64), "LARGE": (128, 256), "FEW_LAYERS": 1, "MANY_LAYERS": 3,
        "PROMPT": 4, "STEPS": 8, "PREFILL": 16,
    }.items():  # fmt: skip
        monkeypatch.setattr(stand_in, name, value)
    monkeypatch.setattr(calibrate, "PRODUCT", 64)
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    monkeypatch.setattr(calibrate, "copy_bandwidth", lambda device: 4e9)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def plan(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_machine_is_measured_on_random_models(bits, quick):
    machine = StandIn(bits, 32, torch.float32, CPU, 2)
    machine.run()
    found = machine.reached()
    assert found.bandwidth > 0
    assert found.matmul > 0
    assert 0 <= found.overhead(2) <= found.overhead(30) < 1


def test_the_random_models_are_of_the_grid_that_is_asked_for():
    weights = stand_in.random_decoder((128, 256), 2, 4, 64, torch.float32)
    assert len(weights.layers) == 2
    down = weights.layers[0].down
    assert (down.bits, down.group_size, down.shape) == (4, 64, (128, 256))
    assert down.codes is not None
    assert (down.codes.min(), down.codes.max()) == (-8, 7)


def test_the_whole_of_it(quick, model_folder, tmp_path):
    saved = tmp_path / "here.json"
    flags = ["--calibrate", "--context", 20, "--new-tokens", 6, "--batch", 2, "--threads", 1]
    done = plan(model_folder(), *flags, "--save-device", saved, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["threads"], found["batch"], found["context"]) == (1, 2, 20)
    for name in ("decode step", "prefill"):
        row = found["compared"][name]
        for which in ("uncalibrated", "calibrated"):
            ratio = row[f"{which}_s"] / row["measured_s"]
            assert row[f"{which}_error"] == pytest.approx(ratio - 1, abs=1e-4)
    device = find_device(str(saved))
    assert device.bandwidth == 4e9
    assert device.efficiency.overhead > 0
    done = plan(model_folder(), "--device", saved)
    assert done.exit_code == 0, done.output
    assert "reached here" in done.stdout
    assert "overhead" in done.stdout
    done = plan(model_folder(), *flags)
    assert done.exit_code == 0, done.output
    assert "uncalibrated" in done.stdout
    assert "before calibration: cpu, a guess" in done.stdout


def test_the_share_of_the_bandwidth_gives_the_measured_times():
    """The layers' linears at one speed, head and cache at another, and the overhead on top."""
    shape = find_shape("llama-2-7b")
    bits = Precision(weights=4.25)
    guess = Case(shape, bits, find_device("h100"), Load(1, 1000))
    linears, head = Reached(1e10, 2e11, 1e-4, 1e-5), Reached(2e10, 3e11, 1e-4, 2e-5)
    device = calibrate._device(guess, CPU, 4e10, 4e11, [linears, head])
    known = Case(shape, bits, device, Load(1, 1000))
    in_layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 4.25 / 8
    rest = guess.decode_work.total_bytes - in_layers
    expected = 1e-4 + 32 * 1e-5 + in_layers / 1e10 + rest / 2e10
    assert known.decode_time.seconds == pytest.approx(expected, rel=1e-4)  # of 6 digits
    assert device.efficiency.matmul == 0.5


def test_medians_are_compared_at_the_mean_context():
    shape = find_shape("llama-2-7b")
    device = Device("slow", 10**11, 1e9, {"bf16": 1e15})
    case = Case(shape, Precision(), device, Load(1, 100, 50))
    steps = {9.0: [20.0, 21.0], 10.0: [14.0], 8.0: [1.0]}  # of a run, by its prefill
    runs = [Run([first], first, after, 1 + len(after)) for first, after in steps.items()]
    found = calibrate.compared(runs, case, case)
    assert found["prefill"]["measured_s"] == 9
    assert found["decode step"]["measured_s"] == 17  # the median of four
    weights = 2 * (6_738_415_616 - 32000 * 4096 + 4096)  # of the table one row is read
    expected = (weights + 125 * 2 * 32 * 4096 * 2) / 1e9
    assert found["decode step"]["calibrated_s"] == pytest.approx(expected, rel=1e-5)
    assert found["decode step"]["calibrated_error"] == pytest.approx(expected / 17 - 1, abs=1e-4)


def test_a_busy_machine_is_told():
    quiet = [Run([1.0], 1.0, [1.0] * 9 + [9.0], 10)]  # one step in ten does not count
    assert calibrate.spread(quiet) == 1
    assert calibrate.spread([Run([1.0], 1.0, [1.0, 1.0, 3.0, 3.0], 5)]) == 3


def test_the_precision_is_that_of_the_weights():
    codes, scale = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 2)
    grid = LinearWeight(None, codes, scale, None, 32, 4)
    shifted = LinearWeight(None, codes, scale, scale, 32, 4)
    weights = stand_in.random_decoder((128, 256), 1, None, 0, torch.bfloat16)
    for down, bits in ((grid, 4.5), (shifted, 5.0), (LinearWeight.of_dense(scale), 16.0)):
        layer = weights.layers[0].__class__(**vars(weights.layers[0]) | {"down": down})
        changed = weights.__class__(**vars(weights) | {"layers": [layer]})
        found = calibrate._precision(changed, torch.bfloat16)
        assert (found.weights, found.head, found.kv) == (bits, 16, 16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "int4"], "--weights does not go with --calibrate"),
        (["--draft", "0.1"], "--draft does not go with --calibrate"),
        (["--kv", "int8"], "do not go with --calibrate"),
        (["--head", "int4"], "--head as stored"),
        (["--save-device", "no/such/folder/a.json"], "folder that exists"),
        (["--save-device", "a.yaml"], ".json"),
        (["--fit", "1GB"], "two questions"),
        (["--sweep", "batch=1"], "--sweep does not go with --calibrate"),
        (["--context", "1000"], "more than the model's context of 128"),
    ],
)
def test_bad_flags_give_one_line(flags, message, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = plan(model_folder(), "--calibrate", *flags)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert list(tmp_path.iterdir()) == []
