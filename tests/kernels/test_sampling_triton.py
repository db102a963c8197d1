"""The kernels against runtime.sampler, the host's truth: same tokens, whatever the batch.

Rows go to the kernels together, so that Triton's interpreter runs them in few launches.  The host
sums float32 exponentials of its own library in float64, and the kernels sum whole numbers of 2^-36;
`top_p` and `min_p` reach the kernels in float32.  Both move a boundary of the distribution
function, or of the nucleus, by less than NEAR, and only a uniform number that falls so near to one
may draw another token.
"""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from compress.kernels.sampling.triton import CHUNK, LIST, MOST_CHUNKS, draw, entries
from compress.kernels.workspace import Workspace
from compress.runtime import sampler
from compress.runtime.sampling_params import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = 3e-6  # float32 rounds exp(-16) by 16 * 2^-24 of itself, and the sums add up such errors
LAST = 1 - 2**-53
MARGIN = 64

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's on inf, interpreted


class Guarded(Workspace):
    """What it lends is poisoned, and has margins that no kernel may touch."""

    def __init__(self):
        super().__init__(torch.device(DEVICE))
        self.lent = []

    def _of(self, dtype, count):
        poison = {torch.float32: math.nan, torch.int64: -(10**15), torch.int32: 0}[dtype]
        guard = 77
        whole = torch.full((count + 2 * MARGIN,), guard, dtype=dtype, device=self.device)
        whole[MARGIN:-MARGIN] = poison
        self.lent.append((whole, guard))
        return whole[MARGIN:-MARGIN]

    def check(self):
        for whole, guard in self.lent:
            assert (whole[:MARGIN] == guard).all()
            assert (whole[-MARGIN:] == guard).all()
            if whole.dtype == torch.int32:
                assert not whole[MARGIN:-MARGIN].any(), "counters are zero again"


def settings_of(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def drawn(logits, uniform, params, filtered=True):
    """The kernels' tokens; logits float32 [R, V] or one row [V] for all."""
    logits = torch.as_tensor(logits).expand(len(params), -1)
    rows, columns = logits.shape
    room = torch.full((rows, columns + 15), 1e30)  # what is beyond a row would be the likeliest
    room[:, :columns] = logits
    room = room.to(DEVICE)

    def column(name, dtype):
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=DEVICE)

    workspace = Guarded()
    tokens = draw(
        room[:, :columns],
        torch.as_tensor(uniform, dtype=torch.float64).to(DEVICE),
        column("temperature", torch.float32),
        column("top_k", torch.int32),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
        filtered=filtered,
        workspace=workspace,
    )
    workspace.check()
    return tokens.tolist()


def by_host(row, uniform, params):
    return sampler.draw(np.asarray(row), params, float(uniform))


def assert_same(logits, uniform, params, filtered=True):
    """The host's tokens, but for those that a change of NEAR explains; return how many were not."""
    tokens = drawn(logits, uniform, params, filtered)
    logits = torch.as_tensor(logits).expand(len(params), -1).numpy()
    differing = 0
    for row, number, p, token in zip(logits, uniform, params, tokens, strict=True):
        if token == by_host(row, number, p):
            continue
        differing += 1
        near = {
            by_host(row, u, settings_of(p.temperature, p.top_k, min(max(q, 1e-9), 1), m))
            for u in (max(number - NEAR, 0), number, min(number + NEAR, LAST))
            for q in (p.top_p - NEAR, p.top_p, p.top_p + NEAR)
            for m in (p.min_p * (1 - NEAR), min(p.min_p * (1 + NEAR), 1))
        }
        assert token in near, (p, number)
    return differing


def random_logits(rows, columns, spread=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * spread


def uniforms(count, seed=0):
    return np.random.default_rng(seed).random(count)


@pytest.mark.parametrize("columns", [97, CHUNK, 2 * CHUNK + 1, 49152])
def test_without_filters(columns):
    temperatures = [0, 0.3, 1.0, 1.7]
    rows = 16
    params = [settings_of(temperatures[n % 4]) for n in range(rows)]
    logits = random_logits(rows, columns) * torch.linspace(0.1, 2, rows)[:, None]
    assert assert_same(logits, uniforms(rows), params, filtered=False) <= 1


FILTERS = [
    {},
    {"temperature": 0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize(("columns", "spread"), [(97, 1.0), (3000, 0.3), (2 * CHUNK + 1, 4.0)])
def test_with_filters(columns, spread):
    params = [settings_of(**settings) for settings in FILTERS]
    logits = random_logits(len(params), columns, spread, seed=columns)
    assert assert_same(logits, uniforms(len(params), 1), params) <= 1


def test_a_long_list_is_searched_too():
    """All within 1/4 of the likeliest: two rounds of pivots leave more than LIST open."""
    logits = random_logits(1, 2 * CHUNK, 0.01)[0]
    settings = [{"top_k": 5000}, {"top_p": 0.4}, {"top_k": 3 * LIST, "top_p": 0.5}]
    params = [settings_of(**each) for each in settings]
    assert assert_same(logits, [0.99999, 0.9999, 0.5], params) == 0


def test_exactly_the_nucleus_is_kept():
    """uniform just below 1 draws the last kept token, whichever place it has."""
    logits = random_logits(6, 500, 2.0, seed=5).sort(-1, descending=True).values
    settings = [{"top_k": k} for k in (1, 7, 499)] + [{"top_p": p} for p in (0.2, 0.9, 0.99)]
    params = [settings_of(**each) for each in settings]
    tokens = drawn(logits, [LAST] * 6, params)
    assert tokens[:3] == [0, 6, 498]
    held = logits[3:].double().softmax(-1).cumsum(-1)
    expected = [
        int((row < p.top_p).sum()) for row, p in zip(held, params[3:], strict=True)
    ]  # the first that reaches top_p
    assert tokens[3:] == expected


def test_tokens_that_tie_with_the_last_one_stay():
    logits = torch.full((300,), -3.0)
    logits[[5, 100, 200, 299]] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    params = [settings_of(top_k=2), settings_of(top_p=0.01 + math.exp(1) / 9), settings_of(top_k=5)]
    assert drawn(logits, [LAST] * 3, params)[0] == 299
    assert assert_same(logits.expand(3, -1), [LAST, 0.999, LAST], params) == 0
    equal = torch.zeros(50)
    params = [settings_of(top_k=3), settings_of(top_p=0.1), settings_of(min_p=1.0)]
    assert drawn(equal, [LAST, 0.5, 0], params) == [49, 25, 0]


def test_uniform_at_both_ends():
    """0 draws the first token of any weight; 1 - 2^-53, which float32 rounds to 1, the last."""
    logits = random_logits(1, CHUNK + 100, 3.0, seed=9)[0]
    logits[:7] = -math.inf
    logits[-9:] = -200.0
    params = [settings_of(), settings_of(top_p=0.9)] * 2
    ends = [0, 0, LAST, LAST]
    tokens = drawn(logits, ends, params)
    assert tokens[0] == 7
    assert tokens[2] == CHUNK + 90
    assert tokens[1:4:2] == [by_host(logits, u, settings_of(top_p=0.9)) for u in (0, LAST)]


def test_temperatures_from_tiny_to_huge():
    logits = random_logits(4, 700, 5.0, seed=3)
    params = [settings_of(temperature) for temperature in (1e-4, 2e-5, 1e6, 1e30)]
    assert assert_same(logits, uniforms(4, 7), params) <= 1
    logits[1] = logits[0]
    params = [settings_of(t, top_k=9, top_p=0.9) for t in (1e-4, 1e30, 1e6, 0.01)]
    assert assert_same(logits, uniforms(4, 8), params) <= 1


def test_masked_tokens_are_not_drawn():
    """-inf in whole chunks and in parts of one, also where fewer are left than top_k allows."""
    logits = torch.full((2 * CHUNK + 50,), -math.inf)
    logits[CHUNK - 3 : CHUNK] = torch.tensor([0.1, 0.2, 0.3])
    logits[-2:] = torch.tensor([0.4, -60.0])
    params = [settings_of(**each) for each in ({}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 2})]
    for uniform in (0.6, LAST):
        assert assert_same(logits, [uniform] * 4, params) == 0


def test_rows_that_cannot_be_drawn_from():
    logits = random_logits(6, 200)
    logits[:3, 150] = math.nan
    logits[3] = -math.inf
    logits[4, 3] = math.inf
    logits[5] = -math.inf
    kinds = [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {}, {"temperature": 0}]
    params = [settings_of(**kind) for kind in kinds]
    assert drawn(logits, [0.5] * 6, params) == [-1, -1, -1, -1, -1, 0]
    assert drawn(logits[:2], [0.5] * 2, params[:2], filtered=False) == [-1, -1]


def test_of_equals_the_likeliest_is_the_first():
    logits = torch.zeros(3, 2 * CHUNK + 5)
    logits[1, [CHUNK - 1, CHUNK, 2 * CHUNK]] = 5
    logits[2, [2 * CHUNK + 4]] = 1
    assert drawn(logits, [0.9] * 3, [settings_of(0)] * 3, filtered=False) == [
        0,
        CHUNK - 1,
        2 * CHUNK + 4,
    ]


def test_a_row_is_the_same_alone_and_in_any_batch():
    """Also with the launches for filters and without, and in another place."""
    params = [settings_of(**FILTERS[n]) for n in (0, 1, 11, 5, 8)]
    logits, numbers = random_logits(5, CHUNK + 10, seed=4), uniforms(5, 4)
    together = drawn(logits, numbers, params)
    for n in range(5):
        alone = drawn(logits[n : n + 1], numbers[n : n + 1], params[n : n + 1], filtered=n > 1)
        assert alone == together[n : n + 1]
    turned = drawn(logits.flip(0), numbers[::-1].copy(), params[::-1])
    assert turned[::-1] == together


@pytest.mark.parametrize("settings", [{}, {"top_k": 6, "top_p": 0.9}], ids=str)
def test_frequencies_on_an_even_grid(settings):
    """Of n uniform numbers (i + 1/2) / n each token gets n times its probability, to within one.

    That is more than a chi-square test could ask, and nothing in it is random.
    """
    logits = random_logits(1, 12, 1.0, seed=8)[0]
    count = 16 if settings else 200
    least = sorted(logits.tolist())[-settings.get("top_k", 12)]
    weights = torch.where(logits >= least, logits.double().exp(), 0)
    order = weights.argsort(descending=True)
    before = weights[order].cumsum(0) - weights[order]
    weights[order[before >= settings.get("top_p", 1.0) * weights.sum()]] = 0
    grid = (np.arange(count) + 0.5) / count
    tokens = drawn(logits, grid, [settings_of(**settings)] * count, bool(settings))
    found = np.bincount(tokens, minlength=12)
    assert abs(found - count * (weights / weights.sum()).numpy()).max() < 1
    assert tokens == sorted(tokens), "in the vocabulary's order"


def test_frequencies_of_random_numbers():
    """Chi-square; a true sampler fails 1 in 10,000 (Wilson and Hilferty, 3.72 deviations)."""
    logits, count = random_logits(1, 30, 1.0, seed=6)[0], 300
    tokens = drawn(logits, uniforms(count, 12), [settings_of(0.8)] * count, filtered=False)
    expected = count * (logits.double() / 0.8).softmax(-1).numpy()
    few = expected < 5
    observed = np.bincount(tokens, minlength=30)
    observed = np.append(observed[~few], observed[few].sum())
    expected = np.append(expected[~few], expected[few].sum())
    term = 2 / (9 * (len(expected) - 1))
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < (len(expected) - 1) * (1 - term + 3.72 * math.sqrt(term)) ** 3


def test_the_workspace_is_reused():
    workspace = Workspace(torch.device(DEVICE))
    logits = random_logits(3, 300).to(DEVICE)
    uniform = torch.tensor(uniforms(3), device=DEVICE)
    on = [torch.full((3,), value, device=DEVICE) for value in (0.7, 0.9, 0.01)]
    top_k = torch.full((3,), 40, dtype=torch.int32, device=DEVICE)
    rows = [(logits, uniform, on[0], top_k, *on[1:])] * 2
    rows.append(tuple(each[:2] for each in rows[0]))
    first, again, fewer = (draw(*row, filtered=True, workspace=workspace) for row in rows)
    assert torch.equal(first, again)
    assert torch.equal(first[:2], fewer)
    assert not workspace.counters(1).any()


def test_what_it_refuses():
    setting = torch.ones(1)
    rest = (setting, setting.int(), setting, setting)
    workspace = Workspace(torch.device("cpu"))
    for columns, dtype, message in (
        (MOST_CHUNKS * CHUNK + 1, torch.float64, "at most"),
        (9, torch.float32, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(
                torch.zeros(1, columns),
                torch.zeros(1, dtype=dtype),
                *rest,
                filtered=False,
                workspace=workspace,
            )
    none = torch.zeros(0)
    empty = (torch.zeros(0, 9), none.double(), none, none.int(), none, none)
    assert draw(*empty, filtered=True, workspace=workspace).shape == (0,)


def test_entries_name_every_argument():
    for entry in entries(90):
        names = getattr(entry.kernel, "arg_names", None)
        assert set(entry.types) | set(entry.constants) == set(names)
        assert entry.aligned <= set(entry.types)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_in_a_cuda_graph():
    params = [settings_of(**settings) for settings in FILTERS]
    tensors = [
        torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=DEVICE)
        for name, dtype in (
            ("temperature", torch.float32),
            ("top_k", torch.int32),
            ("top_p", torch.float32),
            ("min_p", torch.float32),
        )
    ]
    workspace = Workspace(torch.device(DEVICE))
    logits = random_logits(len(params), 128256, 3.0).to(DEVICE)
    uniform = torch.tensor(uniforms(len(params)), device=DEVICE)
    draw(logits, uniform, *tensors, filtered=True, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = draw(logits, uniform, *tensors, filtered=True, workspace=workspace)
    for seed in range(3):
        logits.copy_(random_logits(len(params), 128256, 3.0, seed))
        uniform.copy_(torch.tensor(uniforms(len(params), seed)))
        tokens.fill_(-2)
        graph.replay()
        eager = draw(logits, uniform, *tensors, filtered=True, workspace=workspace)
        assert torch.equal(tokens, eager)
