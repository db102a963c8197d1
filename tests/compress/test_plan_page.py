"""The page of a plan in a real browser: its numbers are roofline.py's, its controls obey keys.

That nothing is logged, and nothing outside asked for, the fixture `opened` sees to in each test.
"""

import itertools
from dataclasses import asdict, replace

import pytest

from compress.core.errors import InputError
from compress.devices import DEVICES
from compress.roofline import (
    Device,
    Efficiency,
    Mla,
    ModelShape,
    Precision,
    decode,
    expected_tokens,
    kv_bytes,
    kv_bytes_per_token,
    largest_batch,
    link_bytes,
    memory,
    parameters,
    precision,
    prefill,
    shard,
    speculative_speedup,
    time_of,
    weight_bytes,
)

# Both sides compute in double precision, in sums of some tens of terms in another order at most.
CLOSE = 1e-9

SHAPES = {
    "llama": ModelShape("Llama-2-7B", 4096, 11008, 32, 32, 128, 32, 32000),
    "tied, biases, norms on queries and keys": ModelShape(
        "tied", 896, 4864, 14, 2, 64, 24, 151936, tied=True, max_context=32768, qkv_bias=True,
        out_bias=True, mlp_bias=True, head_bias=True, norm_bias=True, qk_norm="head",
    ),
    "windows, four norms": ModelShape(
        "windows", 2304, 9216, 8, 4, 256, 26, 256000, tied=True, windows=(4096, None) * 13, norms=4,
        qk_norm="all",
    ),
    "latents": ModelShape(
        "latents", 2048, 10944, 16, 16, 128, 27, 102400, mla=Mla(512, 64, 128, 128, 1536),
        qkv_bias=True,
    ),
    "shared caches, a table of positions": ModelShape(
        "shared", 1024, 4096, 16, 1, 64, 21, 50000, gated=False, kv_share=4, positions=2048,
        windows=(512, None, 128) * 7,
    ),
}  # fmt: skip
OWN = Device(
    "own", 24 * 10**9, 0.9e12, {"bf16": 165e12},
    efficiency=Efficiency(bandwidth=0.8, matmul=0.6, overhead=2e-4), source="measured",
)  # fmt: skip
DEVICE_LIST = [OWN, *DEVICES.values()]


# Numbers


def with_method(shape, method, detail):
    if method == "mha":
        return replace(shape, mla=None, kv_heads=shape.heads)
    if method == "gqa":
        return replace(shape, mla=None, kv_heads=detail)
    if method == "mla":
        usual = Mla(detail, 64, shape.head_dim, shape.head_dim, None)
        return replace(shape, mla=replace(shape.mla, kv_rank=detail) if shape.mla else usual)
    if method == "window":
        windows = tuple(detail if w is None else min(w, detail) for w in shape.windows)
        return replace(shape, windows=windows)
    return replace(shape, kv_share=detail) if method == "shared" else shape


def expected(shape, numbers, device, batch, context, tokens, draft, acceptance, cost, devices=1):
    """What the page should say, by compress.roofline."""
    part = shard(shape, devices)

    def time(work, rows):
        return time_of(work, device, numbers, link_bytes(shape, rows, devices))

    def latency(at):
        step = time(decode(part, numbers, batch, at), batch).seconds
        if not draft:
            return step
        check = decode(part, numbers, batch, at + draft, draft + 1)
        check_time = time(check, batch * (draft + 1)).seconds
        return (check_time + draft * cost * step) / expected_tokens(acceptance, draft)

    works = {
        "prefill": prefill(part, numbers, batch, context),
        "decode": decode(part, numbers, batch, context),
    }
    steps = {
        "prefill": time(works["prefill"], batch * context),
        "decode": time(works["decode"], batch),
    }
    held = memory(part, numbers, batch, context + tokens)
    first = steps["prefill"].seconds
    return {
        "works": {n: {"flops": dict(w.flops), "bytes": dict(w.bytes)} for n, w in works.items()},
        "parts": {n: {p: t.seconds for p, t in s.parts.items()} for n, s in steps.items()},
        "limits": {n: {p: t.limit for p, t in s.parts.items()} for n, s in steps.items()},
        "limit": {name: step.limit for name, step in steps.items()},
        "latency": latency(context),
        "first": first,
        "throughput": batch / latency(context),
        "answer": first + tokens * latency(context + tokens // 2),
        "weights": held.weights,
        "kv": held.kv,
        "largest": largest_batch(part, numbers, device, context + tokens),
        "kvPerToken": kv_bytes_per_token(shape, numbers),
        "kvPerSequence": kv_bytes(shape, numbers, context + tokens),
        "parameters": parameters(shape).total,
        "weightBytes": weight_bytes(shape, numbers),
        "closed": speculative_speedup(acceptance, draft, cost),
    }


PAGE_SAYS = """
const [shape, cases] = arguments;
const only = (o, key) => Object.fromEntries(Object.entries(o).map(([n, v]) => [n, v[key]]));
return cases.map(([method, detail, precision, device, ...load]) => {
  const [batch, context, tokens, draft, acceptance, cost, devices] = load;
  const changed = plan.withMethod(shape, method, detail);
  if (!plan.divides(changed, devices)) return null;
  const setup = { shape: changed, precision, device, devices, batch, context, tokens };
  const all = plan.predict({ ...setup, draft, acceptance, cost, drafter: null });
  const { prefill, decode } = all.steps;
  return {
    works: all.works,
    parts: { prefill: only(prefill.parts, "seconds"), decode: only(decode.parts, "seconds") },
    limits: { prefill: only(prefill.parts, "limit"), decode: only(decode.parts, "limit") },
    limit: { prefill: prefill.limit, decode: decode.limit },
    latency: all.latency, first: all.first, throughput: all.throughput, answer: all.answer,
    weights: all.memory.weights, kv: all.memory.kv, largest: all.largest,
    kvPerToken: all.kvPerToken, kvPerSequence: all.kvPerSequence, parameters: all.parameters,
    weightBytes: plan.weightBytes(changed, precision),
    closed: plan.speculativeSpeedup(acceptance, draft, cost),
  };
});
"""


def flat(value, path=""):
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()
        }
    return {path: value}


def assert_same(found, wanted):
    found, wanted = flat(found), flat(wanted)
    assert found.keys() == wanted.keys()
    words = {key for key, value in wanted.items() if isinstance(value, str)}
    assert {key: found[key] for key in words} == {key: wanted[key] for key in words}
    numbers = wanted.keys() - words
    assert {k: found[k] for k in numbers} == pytest.approx(
        {k: wanted[k] for k in numbers}, rel=CLOSE
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_formulas_are_those_of_roofline(opened, name):
    shape = SHAPES[name]
    methods = [
        ("model", None), ("mha", None), ("gqa", 1), ("gqa", 2), ("mla", 512), ("mla", 192),
        ("window", 100), ("window", 3000), ("shared", 2), ("shared", 5),
    ]  # fmt: skip
    loads = [(1, 1024, 0), (64, 1000, 257), (2, 3, 5), (2000, 64, 1), (7, 131072, 4096)]
    drafts = [(0, 0.7, 0.1), (4, 0.8, 0.11), (16, 1.0, 0.0), (3, 0.0, 1.5)]
    precisions = [
        precision("bf16"),
        precision("fp8", "int8"),
        precision("w8a8", "fp8", head="int8"),
        precision("int4-g64", "int4", embeddings="int8", head="bf16"),
        Precision(weights=2.7, embeddings=5.1, head=3.3, kv=2.25),
    ]
    cases, wanted = [], []
    for number, ((method, detail), load, draft) in enumerate(
        itertools.product(methods, loads, drafts)
    ):
        for device in DEVICE_LIST[number % 2 :: 2]:
            numbers = precisions[len(cases) % len(precisions)]
            many = (1, 2, 8)[number % 3] if device.link else 1
            cases.append([method, detail, asdict(numbers), asdict(device), *load, *draft, many])
            try:
                changed = with_method(shape, method, detail)
                wanted.append(expected(changed, numbers, device, *load, *draft, many))
            except InputError:  # does not divide
                wanted.append(None)
    found = opened(shape).run(PAGE_SAYS, asdict(shape), cases)
    assert len(found) == len(wanted) >= 160
    assert [one is None for one in found] == [one is None for one in wanted]
    found, wanted = ([one for one in all_ if one] for all_ in (found, wanted))
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
    assert any("link" in one["parts"]["decode"] for one in wanted)
    for step in ("prefill", "decode"):  # the grid lies on both sides of the roof's corner
        assert {w["limit"][step] for w in wanted} >= {"compute", "memory"}


FACTS = ("latency", "throughput", "first", "answer", "largest")


def assert_shows(page, shape, numbers, device, *load):
    wanted = expected(shape, numbers, device, *load)
    assert {f: page.number(f) for f in FACTS} == pytest.approx(
        {f: wanted[f] for f in FACTS}, rel=CLOSE
    )
    assert page.number("bar-weights") == pytest.approx(wanted["weights"], rel=CLOSE)
    assert page.number("bar-kv") == pytest.approx(wanted["kv"], rel=CLOSE)
    free = device.memory - wanted["weights"] - wanted["kv"]
    assert page.number("bar-free") == pytest.approx(free, rel=CLOSE, abs=1)  # a difference
    assert page["limit"].get_property("value") == wanted["limit"]["decode"]


def test_it_begins_with_what_was_given(opened, llama):
    numbers = precision("int4-g64", "int8", embeddings="int8")
    more = {"draft_length": 5, "acceptance": 0.83, "draft_cost": 0.07}
    page = opened(numbers=numbers, device=OWN, batch=37, context=1500, new_tokens=77, **more)
    assert_shows(page, llama, numbers, OWN, 37, 1500, 77, 5, 0.83, 0.07)
    assert page["devices-output"].text == "1 device"
    assert page.number("batch-number") == 37
    assert page.number("context-number") == 1500
    assert "4.25 bits" in page["weights-output"].text
    assert page["kv-output"].text.startswith("int8")
    assert "own" in page["device"].text
    assert "measured" in page["device-source"].text


# Controls


def test_the_sliders_move_by_keyboard(opened, llama):
    from selenium.webdriver.common.keys import Keys

    h100 = DEVICES["h100"]
    page = opened()
    page.press("batch", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # 8, 12, 16
    assert_shows(page, llama, precision(), h100, 16, 1024, 256, 0, 0.7, 0.1)
    page.press("context", Keys.END)
    page.press("tokens", Keys.HOME)
    assert_shows(page, llama, precision(), h100, 16, 131072, 0, 0, 0.7, 0.1)
    page.press("context", Keys.ARROW_LEFT)
    assert_shows(page, llama, precision(), h100, 16, 98304, 0, 0, 0.7, 0.1)
    page.press("weights", Keys.END)  # int2
    page.press("kv", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # bf16, int8 of 8.125 bits, fp8
    numbers = precision("int2", "fp8")
    assert_shows(page, llama, numbers, h100, 16, 98304, 0, 0, 0.7, 0.1)
    assert not page["acceptance"].is_enabled()
    page.press("draft", *[Keys.ARROW_RIGHT] * 5)
    page.press("acceptance", Keys.ARROW_RIGHT)
    page.press("cost", Keys.ARROW_LEFT)
    assert_shows(page, llama, numbers, h100, 16, 98304, 0, 5, 0.75, 0.05)
    said = [page[n].get_attribute("aria-valuetext") for n in ("context", "kv", "draft")]
    assert said == ["98,304 tokens", "fp8, 8 bits", "5 tokens"]
    page.press("method", "GQA", Keys.TAB, Keys.ARROW_LEFT)
    page.press("detail", Keys.HOME)  # one KV head
    one = replace(llama, kv_heads=1)
    assert_shows(page, one, numbers, h100, 16, 98304, 0, 5, 0.75, 0.05)
    page.press("device", "a100")
    page.press("devices", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page["devices"].get_attribute("aria-valuetext") == "4 devices"
    assert_shows(page, one, numbers, DEVICES["a100"], 16, 98304, 0, 5, 0.75, 0.05, 4)
    page.press("device", "cpu")  # has no link
    assert page["devices"].get_attribute("aria-valuetext") == "1 device"
    assert not page["devices"].is_enabled()
    page.all("button[type=reset]")[0].send_keys(Keys.ENTER)
    assert_shows(page, llama, precision(), h100, 8, 1024, 256, 0, 0.7, 0.1)


def test_numbers_can_be_typed_and_wrong_ones_do_not_count(opened, llama):
    from selenium.webdriver.common.keys import Keys

    h100 = DEVICES["h100"]
    page = opened()
    everything = (Keys.CONTROL, "a", Keys.NULL)
    page.press("batch-number", *everything, "37")
    assert_shows(page, llama, precision(), h100, 37, 1024, 256, 0, 0.7, 0.1)
    assert page["batch"].get_attribute("aria-valuetext") == "37 sequences"
    for wrong in ("0", "-5", "2.5", "99999999999"):
        page.press("batch-number", *everything, Keys.BACKSPACE, wrong)
        assert page["batch-number"].get_attribute("aria-invalid") == "true"
    before = page.number("latency")
    page.press("batch-number", Keys.TAB)
    assert page["batch-number"].get_attribute("aria-invalid") is None
    kept = page["batch-number"].get_property("value")
    assert (kept, before) == ("999999", page.number("latency"))  # on the way to the last: allowed


def test_each_method_and_a_device_of_ones_own(opened, llama):
    page = opened()
    for method, detail in (("mha", 32), ("gqa", 4), ("mla", 512), ("window", 1024), ("shared", 2)):
        page.put("method", method)
        changed = with_method(llama, method, detail)
        assert_shows(page, changed, precision(), DEVICES["h100"], 8, 1024, 256, 0, 0.7, 0.1)
    page.put("method", "model")
    assert not page["custom-memory"].is_displayed()
    choices = [o.text for o in page["device"].find_elements("tag name", "option")]
    assert choices == ["h100", *(name for name in DEVICES if name != "h100"), "cpu", "custom"]
    page.put("device", choices.index("custom"))
    assert_shows(page, llama, precision(), DEVICES["h100"], 8, 1024, 256, 0, 0.7, 0.1)
    for name, value in (("memory", 48), ("bandwidth", 864), ("bf16", 362.5), ("fp8", 733)):
        page.put(f"custom-{name}", value)
    page.put("devices", 1)
    page.put("custom-link", 25)
    own = Device("custom", 48 * 10**9, 864e9, {"bf16": 362.5e12, "fp8": 733e12}, 25e9)
    page.put("weights", 2)
    assert page["weights-output"].text == "fp8, 8 bits"
    assert_shows(page, llama, precision("fp8"), own, 8, 1024, 256, 0, 0.7, 0.1, 2)


def test_it_says_what_does_not_fit_and_what_is_too_long(opened):
    page = opened(batch=256, context=8192)
    page.wait()
    page.wait(500)  # words follow once a slider rests
    said = page["said"].text
    assert "It does not fit" in said
    assert "more than the model was made for (4,096)" in said
    assert "too much for 80 GB" in page["bar-free"].text
    assert page.number("largest") < 256


def test_a_draft_model_takes_its_place(opened, llama):
    draft = ModelShape("draft", 1024, 2816, 16, 4, 64, 12, 32000, tied=True)
    numbers, held = precision("int8"), precision("int4", "fp8")
    page = opened(numbers=numbers, draft_length=4, draft_model=(draft, held), batch=40)
    beside = memory(draft, held, 40, 1280).total
    own = memory(llama, numbers, 40, 1280).total
    assert page.number("bar-draft") == pytest.approx(beside, rel=CLOSE)
    assert page.number("bar-free") == pytest.approx(80e9 - own - beside, rel=CLOSE)

    def total(batch):
        return memory(llama, numbers, batch, 1280).total + memory(draft, held, batch, 1280).total

    largest = int(page.number("largest"))
    assert total(largest) <= 80e9 < total(largest + 1)
    assert page["bar-draft"].is_displayed()
    page.put("draft-number", 0)
    assert not page["bar-draft"].is_displayed()
    assert page.number("bar-free") == pytest.approx(80e9 - own, rel=CLOSE)


def test_a_device_of_ones_own_takes_over_nothing_that_its_fields_do_not_show(opened, llama):
    page = opened(device=OWN)
    page.put("device", len(page["device"].find_elements("tag name", "option")) - 1)
    sheet = replace(OWN, efficiency=Efficiency())
    assert_shows(page, llama, precision(), sheet, 8, 1024, 256, 0, 0.7, 0.1)
