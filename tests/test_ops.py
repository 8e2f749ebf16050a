"""Every operation, in every house, against float64: odd sizes, all formats.

Bounds: a float32 sum of n terms errs by at most n * EPS * (the sum of the terms' magnitudes), in any order.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import zlib
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from houses import HOUSES, Tiny, batch_of, dense, logits_of, runner_class
from pronghorn.errors import ParameterError, PronghornError
from pronghorn.ops import ACTIVATIONS, PAGE, Attention, Rope
from pronghorn.ops.reference import ReferenceRunner, to_array, to_bf16, to_int8
from pronghorn.weights.types import Int4, Int8, Matrix

EPS = 2.0**-24

DENSE = ("f32", "f16", "bf16")
PACKED = ("int8", "int8-32", "int4-32", "int8-64", "int4-64-symmetric", "int4-128")
FORMATS = DENSE + PACKED


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers, the same for the same test."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def pack(values: np.ndarray, name: str) -> Matrix:
    """A matrix [n_out, n_in] in one of FORMATS: `int4-64-symmetric` is 4 bits in groups of 64, no minima."""
    if name in DENSE:
        return dense(values, name)
    kind, group, symmetric = (*name.split("-"), "0", "")[:3]
    return pack_int8(values, int(group)) if kind == "int8" else pack_int4(values, int(group), bool(symmetric))


def pack_int8(values: np.ndarray, group: int) -> Int8:
    """As weights.types.Int8 says, one byte after the other."""
    n_out, n_in = values.shape
    packed = bytearray()
    for first in range(0, n_out, 16):
        outputs = [values[o] if o < n_out else np.zeros(n_in) for o in range(first, first + 16)]
        size = group or n_in
        scales = [
            [np.abs(o[g : g + size]).max() / 127 for o in outputs] for g in range(0, n_in, size)
        ]  # [n_groups][16]
        stored = np.array(scales, np.float16 if group else np.float32)
        packed += stored.tobytes() + bytes(-stored.nbytes % 64)
        for quad in range(0, n_in, 4):
            for lane, o in enumerate(outputs):
                for i in range(quad, quad + 4):
                    scale = float(stored[i // size][lane]) if i < n_in else 0.0
                    packed.append(128 + (round(min(127, max(-127, o[i] / scale))) if scale else 0))
    return Int8(memoryview(bytes(packed + bytes(1024))), n_out, n_in, group)


def pack_int4(values: np.ndarray, group: int, symmetric: bool) -> Int4:
    """As weights.types.Int4 says, one byte after the other."""
    n_out, n_in = values.shape
    packed = bytearray()
    for first in range(0, n_out, 16):
        outputs = [values[o] if o < n_out else np.zeros(n_in) for o in range(first, first + 16)]
        starts = range(0, n_in, group)
        lows = [[0.0 if symmetric else o[g : g + group].min() for o in outputs] for g in starts]
        top = np.abs if symmetric else np.positive
        highs = [[top(o[g : g + group]).max() for o in outputs] for g in starts]
        scales = (np.array(highs) - lows) / (7 if symmetric else 15)
        scales, minima = scales.astype(np.float16), np.array(lows, np.float16)
        for part in (scales,) if symmetric else (scales, minima):
            packed += part.tobytes() + bytes(-part.nbytes % 64)
        for index, start in enumerate(starts):
            end = min(start + group, n_in)

            quants = np.full((16, end + 8), 8 if symmetric else 0)
            for lane, i in itertools.product(range(16), range(start, end)):
                if scale := float(scales[index][lane]):
                    minimum = -8 * scale if symmetric else float(minima[index][lane])
                    quants[lane, i] = min(15, max(0, round((outputs[lane][i] - minimum) / scale)))
            for octet, lane, i in itertools.product(range(start, end, 8), range(16), range(4)):
                packed.append(quants[lane, octet + i] | quants[lane, octet + i + 4] << 4)
    return Int4(memoryview(bytes(packed + bytes(1024))), n_out, n_in, group, symmetric)


def check(
    house: str,
    function: Callable[[Any, Any], Any],
    weights: dict[str, Matrix],
    want: np.ndarray,
    bound: np.ndarray | float,
    **options: Any,
) -> None:
    """Runs `function` on tokens 0..n-1 at positions 0..n-1; `want [n, width]` may be missed by `bound`."""
    n, width = want.shape
    model = Tiny(function, weights, n, width)
    runner = runner_class(house)(model, model.weights, n_pages=4, **options)
    got = logits_of(runner.run, batch_of((range(n), 0, (2, 0))))[:, :width]
    worst = (np.abs(got - want) - bound).max()
    assert worst <= 0, f"beyond its bound by {worst}"


@pytest.mark.parametrize("name", [*FORMATS, "int8-6", "int4-20"])
def test_formats_hold_what_was_packed(name: str, rng: np.random.Generator) -> None:
    for n_out, n_in in ((1, 1), (3, 7), (16, 32), (37, 100), (20, 130)):
        values = rng.normal(size=(n_out, n_in))
        steps = {"f32": EPS, "f16": 2.0**-11, "bf16": 2.0**-7, "int8": 1 / 250, "int4": 1 / 13}
        step = steps[name.split("-")[0]] * 2 * np.abs(values).max()
        held = to_array(pack(values, name))
        assert held.shape == values.shape
        assert np.abs(held - values).max() <= step
        if n_in > 1:
            assert np.abs(to_array(pack(values[:, ::-1], name)) - values).max() > step  # the order counts


def test_transposed_matrices_are_read_as_n_out_n_in(rng: np.random.Generator) -> None:
    values = rng.normal(size=(5, 3)).astype(np.float32)
    weight = dense(values, transposed=True)
    assert (weight.shape, weight.n_out, weight.n_in) == ((3, 5), 5, 3)
    assert (to_array(weight) == values).all()


def test_rounding_of_inputs() -> None:
    bf16 = {1.0: 1.0, 1 + 2**-8: 1.0, 1 + 3 * 2**-8: 1 + 2**-6, 1 + 2**-8 + 2**-20: 1 + 2**-7, -3e38: -3.0e38}
    got = to_bf16(np.array(list(bf16)))
    assert np.allclose(got, list(bf16.values()), rtol=2**-8)
    assert (got[:4] == list(bf16.values())[:4]).all()  # ties go to the even neighbour
    assert np.isnan(to_bf16(np.array([np.nan])))

    x = np.array([[254.0, 1.0, 3.0, -5.0, 0.0, 0.0, 127.0]])
    assert to_int8(x, 0).tolist() == [[254.0, 0.0, 4.0, -4.0, 0.0, 0.0, 128.0]]  # steps of 2, ties to even
    assert to_int8(x, 2)[0, 4:6].tolist() == [0.0, 0.0]  # a group of zeros
    assert np.allclose(to_int8(x, 2), [[254.0, 0.0, 3.0, -5.0, 0.0, 0.0, 127.0]], atol=5 / 254)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("house", HOUSES)
def test_embed(house: str, name: str, rng: np.random.Generator) -> None:
    for n, width in ((1, 1), (5, 30), (7, 65)):
        table = pack(rng.normal(size=(max(n, width), width)), name)
        want = to_array(table)[:n]
        check(house, lambda ops, w: ops.embed(w.x), {"x": table}, want, 3 * EPS * np.abs(want).max())


@pytest.mark.parametrize("house", HOUSES)
def test_positions_add_and_split(house: str, rng: np.random.Generator) -> None:
    n, width = 40, 23
    x, table = rng.normal(size=(n, width)), rng.normal(size=(n + 3, width))
    weights: dict[str, Matrix] = {"x": dense(x), "t": dense(table)}
    x, table = to_array(weights["x"]), to_array(weights["t"])
    check(house, lambda ops, w: ops.positions(ops.embed(w.x), w.t), weights, x + table[:n], 8 * EPS)

    def crossed(ops: Any, w: Any) -> Any:
        _, b, c, _ = ops.split(ops.embed(w.x), (3, 8, 8, 4))
        return ops.add(b, c)

    check(house, crossed, weights, x[:, 3:11] + x[:, 11:19], 8 * EPS)


@pytest.mark.parametrize("house", HOUSES)
def test_norms(house: str, rng: np.random.Generator) -> None:
    eps = 0.1  # large, so that its place shows
    for n, width in ((1, 2), (3, 7), (4, 64), (2, 129)):
        x = dense(rng.normal(1, 2, size=(max(n, width), width)))
        weights = {
            "x": x,
            "norm.weight": dense(rng.normal(size=width)),
            "norm.bias": dense(rng.normal(size=width)),
            "bare.weight": dense(rng.normal(size=width)),
            "heads.weight": dense(rng.normal(size=1 if width % 2 else width // 2)),
        }
        rows = to_array(x)[:n]
        weight, bias, bare, heads = (to_array(weights[k]) for k in list(weights)[1:])
        centred = rows - rows.mean(axis=1, keepdims=True)
        normal = centred / np.sqrt(rows.var(axis=1, keepdims=True) + eps)
        runs = rows.reshape(n, -1, len(heads))
        root = np.sqrt((rows**2).mean(axis=1, keepdims=True) + eps)
        by_head = runs / np.sqrt((runs**2).mean(axis=2, keepdims=True) + eps) * heads
        # Mean and square each sum `width` terms; a row's largest value tells how much cancels.
        bound = 4 * (width + 8) * EPS * (np.abs(rows).max() / np.sqrt(eps) + 3)
        for function, want in (
            (lambda ops, w: ops.layer_norm(ops.embed(w.x), w.norm, eps), normal * weight + bias),
            (lambda ops, w: ops.layer_norm(ops.embed(w.x), w.bare, eps), normal * bare),
            (lambda ops, w: ops.rms_norm(ops.embed(w.x), w.norm, eps), rows / root * weight),
            (lambda ops, w: ops.rms_norm(ops.embed(w.x), w.heads, eps), by_head.reshape(n, width)),
        ):
            check(house, function, weights, want, bound)


def activated(x: np.ndarray, name: str | None) -> np.ndarray:
    """One of ACTIVATIONS, a number at a time."""
    functions: dict[str | None, Callable[[float], float]] = {
        None: lambda v: v,
        "gelu": lambda v: v / 2 * (1 + math.erf(v / math.sqrt(2))),
        "gelu_new": lambda v: v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "relu": lambda v: max(v, 0.0),
    }
    return np.vectorize(functions[name], otypes=[np.float64])(x)


@pytest.mark.parametrize("name", [*FORMATS, "f32-transposed", "f16-transposed", "bf16-transposed"])
@pytest.mark.parametrize("house", HOUSES)
def test_linear(house: str, name: str, rng: np.random.Generator) -> None:
    sizes = ((1, 1, 1), (3, 30, 5), (2, 37, 100), (5, 16, 64), (17, 3, 33))
    for (n, n_out, n_in), activation, plain in zip(
        sizes, itertools.cycle([None, *ACTIVATIONS]), itertools.cycle([False, True])
    ):
        values = rng.normal(size=(n_out, n_in)) / np.sqrt(n_in)
        matrix = dense(values, name.split("-")[0], transposed=True) if "transposed" in name else pack(values, name)
        x, residual = dense(rng.normal(size=(max(n, 40), n_in))), dense(rng.normal(size=(max(n, 40), n_out)))
        weights: dict[str, Matrix] = {"x": x, "r": residual, "l.weight": matrix}
        if not plain:
            weights["l.bias"] = dense(rng.normal(size=n_out))

        rows = to_array(x)[:n]
        packed = isinstance(matrix, Int8 | Int4)
        if packed and house != "torch":  # which widens them instead
            rows = to_int8(rows, matrix.group)
        if "bf16" in name:
            rows = to_bf16(rows)
        bias = 0.0 if plain else to_array(weights["l.bias"])
        added = 0.0 if plain else to_array(residual)[:n]
        want = activated(rows @ to_array(matrix).T + bias, activation) + added
        size = np.abs(rows) @ np.abs(to_array(matrix)).T + np.abs(bias) + np.abs(added) + 1
        if isinstance(matrix, Int4):  # scale * q + minimum: the parts are larger than the sum
            size += 16 * np.abs(rows).sum(axis=1, keepdims=True) * np.abs(to_array(matrix)).max()

        def function(ops: Any, w: Any, plain: bool = plain, activation: str | None = activation) -> Any:
            residual = None if plain else ops.embed(w.r)
            return ops.linear(ops.embed(w.x), w.l, activation=activation, residual=residual)

        check(house, function, weights, want, 1.2 * (n_in + 8) * EPS * size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("house", HOUSES)
def test_gate(house: str, activation: str, rng: np.random.Generator) -> None:
    gate = np.linspace(-30, 30, 41).reshape(1, -1) * np.array([[1.0], [0.01], [0.1]])
    weights: dict[str, Matrix] = {"x": dense(np.hstack([gate, rng.normal(size=gate.shape)]))}
    x = to_array(weights["x"])
    want = activated(x[:, :41], activation) * x[:, 41:]

    def function(ops: Any, w: Any) -> Any:
        return ops.gate(*ops.split(ops.embed(w.x), (41, 41)), activation)

    check(house, function, weights, want, 8 * EPS * (np.abs(want) + np.abs(x[:, 41:])))


@pytest.mark.parametrize("house", HOUSES)
def test_logits_are_those_of_the_rows_asked_for(house: str, rng: np.random.Generator) -> None:
    table = dense(rng.normal(size=(6, 6)))
    model = Tiny(lambda ops, w: ops.embed(w.x), {"x": table}, 6, 6)
    runner = runner_class(house)(model, model.weights, n_pages=1)
    ids = [3, 3, 1, 0, 5, 2]
    for rows in ([0], [1, 4], [], [5]):
        got = logits_of(runner.run, batch_of((ids, 0, (0,)), rows=rows))
        assert got.shape == (len(rows), 6)
        assert np.allclose(got, to_array(table)[[ids[r] for r in rows]], rtol=4 * EPS, atol=0)


def turned(x: np.ndarray, position: int, rope: Rope) -> np.ndarray:
    """A head [head_dim], pair by pair."""
    y, n = x.copy(), len(rope.frequencies)
    for i, frequency in enumerate(rope.frequencies):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + n)
        pair = (x[a] + 1j * x[b]) * np.exp(1j * position * frequency) * rope.magnitude
        y[a], y[b] = pair.real, pair.imag
    return y


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: Attention) -> np.ndarray:
    """One sequence from its start, a query and a head at a time, without any cache: [tokens, heads * dim]."""
    n, group = len(q), spec.n_heads // spec.n_kv_heads
    q, k, v = (x.reshape(n, -1, spec.head_dim) for x in (q, k, v))
    if spec.rope:
        q, k = (np.array([[turned(h, t, spec.rope) for h in row] for t, row in enumerate(x)]) for x in (q, k))
    y = np.zeros_like(q)
    for t, head in itertools.product(range(n), range(spec.n_heads)):
        keys = range(max(0, t + 1 - (spec.window or n)), t + 1)
        weights = np.exp([spec.scale * (q[t, head] @ k[j, head // group]) for j in keys])
        y[t, head] = sum(a * v[j, head // group] for a, j in zip(weights / weights.sum(), keys, strict=True))
    return y.reshape(n, -1)


def frequencies(n: int) -> tuple[float, ...]:
    """Some rotary frequencies."""
    return tuple(0.7 ** (i + 0.3) for i in range(n))


SPECS = {
    "plain": Attention(0, 3, 3, 10, 10**-0.5),
    "tiny-heads": Attention(0, 2, 1, 1, 0.5),
    "grouped-rope": Attention(0, 6, 2, 16, 0.3, Rope(frequencies(8))),
    "interleaved": Attention(0, 4, 4, 10, 0.3, Rope(frequencies(5), interleaved=True)),
    "partial-magnitude": Attention(0, 4, 1, 14, 0.2, Rope(frequencies(3), magnitude=1.2)),
    "partial-interleaved": Attention(0, 2, 2, 8, 0.2, Rope(frequencies(3), interleaved=True)),
    "window": Attention(0, 4, 2, 24, 0.2, Rope(frequencies(12)), window=5),
    "window-of-a-page": Attention(0, 1, 1, 33, 0.2, window=PAGE),
    "window-of-one": Attention(0, 2, 2, 4, 0.2, window=1),
    "wide-heads": Attention(0, 2, 1, 130, 0.09, Rope(frequencies(65)), window=PAGE + 1),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("house", HOUSES)
def test_attention(house: str, name: str, rng: np.random.Generator) -> None:
    """Three sequences in one cache, in two batches; the second one's rows lie between each other."""
    spec = SPECS[name]
    widths = tuple(heads * spec.head_dim for heads in (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads))
    lengths, split, pages = (70, 3, 33), (40, 1, 32), ((4, 1, 3), (0,), (5, 2))
    starts = (0, 70, 73, 106)
    table = dense(rng.normal(size=(max(106, widths[0]), sum(widths))))
    rows = to_array(table)

    def function(ops: Any, w: Any) -> Any:
        return ops.attention(*ops.split(ops.embed(w.x), widths), spec)

    model = Tiny(function, {"x": table}, len(rows), widths[0], spec)
    runner = runner_class(house)(model, model.weights, n_pages=6)
    got = np.full((106, widths[0]), np.nan)
    for first in (True, False):
        parts = [
            (range(start, start + cut), 0, own) if first else (range(start + cut, start + length), cut, own)
            for start, length, cut, own in zip(starts, lengths, split, pages, strict=False)
        ]
        batch = batch_of(*parts)
        if not first:  # deal the rows out: each sequence's in order, the three mixed
            order = sorted(range(len(batch.token_ids)), key=lambda r: (batch.positions[r] % 7, r))
            order.sort(key=lambda r: batch.positions[r] - split[batch.sequence[r]])
            for each in (batch.token_ids, batch.positions, batch.sequence):
                each[:] = array("i", [each[r] for r in order])
        got[list(batch.token_ids)] = logits_of(runner.run, batch)[:, : widths[0]]

    want = np.concatenate(
        [attended(*np.split(rows[a:b], np.cumsum(widths)[:-1], axis=1), spec) for a, b in itertools.pairwise(starts)]
    )
    magnitude = spec.rope.magnitude if spec.rope else 1.0
    score = spec.scale * magnitude**2 * spec.head_dim * np.abs(rows).max() ** 2  # at most
    assert np.abs(got - want).max() < (spec.head_dim + 70 + 16 * score) * EPS * np.abs(rows).max()


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("house", HOUSES)
def test_rounded_cache(house: str, kv_dtype: str, rng: np.random.Generator) -> None:
    spec = Attention(0, 4, 2, 12, 12**-0.5)
    widths = (48, 24, 24)
    values = rng.normal(size=(75, 96))
    values[3, 48:] = 0  # of scale 0
    table = dense(values)
    q, k, v = np.split(to_array(table), (48, 72), axis=1)
    model = Tiny(lambda ops, w: ops.attention(*ops.split(ops.embed(w.x), widths), spec), {"x": table}, 75, 48, spec)
    runner = runner_class(house)(model, model.weights, n_pages=3, kv_dtype=kv_dtype)
    got = logits_of(runner.run, batch_of((range(75), 0, (2, 0, 1))))[:, :48]

    def stored(x: np.ndarray) -> np.ndarray:
        return to_bf16(x) if kv_dtype == "bf16" else to_int8(x.reshape(-1, 12), 0).reshape(x.shape)

    want = attended(q, stored(k), stored(v), spec)
    # The native house multiplies 8-bit keys and values by queries and weights of 15 bits.
    assert np.abs(got - want).max() < (2.0**-11 if (house, kv_dtype) == ("cpu", "int8") else 500 * EPS)
    assert np.abs(attended(q, k, v, spec) - want).max() > 2**-10  # the rounding is there to be seen


def test_reference_without_rounding_is_pure(rng: np.random.Generator) -> None:
    for name in ("bf16", *PACKED):
        weights: dict[str, Matrix] = {
            "x": dense(rng.normal(size=(40, 30))),
            "l.weight": pack(rng.normal(size=(9, 30)), name),
        }
        model = Tiny(lambda ops, w: ops.linear(ops.embed(w.x), w.l), weights, 40, 9)
        runner = ReferenceRunner(model, model.weights, n_pages=2, round_inputs=False)
        got = logits_of(runner.logits, batch_of((range(40), 0, (0, 1))))[:, :9]
        want = to_array(weights["x"]) @ to_array(weights["l.weight"]).T
        assert np.abs(got - want).max() < 1e-13


def test_reading_a_slot_that_was_never_written_shows() -> None:
    spec = Attention(0, 1, 1, 2, 1.0)
    x = dense(np.ones((2, 6)))
    model = Tiny(lambda ops, w: ops.attention(*ops.split(ops.embed(w.x), (2, 2, 2)), spec), {"x": x}, 2, 2, spec)
    runner = ReferenceRunner(model, model.weights, n_pages=1)
    assert np.isnan(runner.logits(batch_of(([0], 5, (0,))))).all()


@pytest.mark.parametrize("house", HOUSES)
def test_wrong_options_are_refused(house: str) -> None:
    model = Tiny(lambda ops, w: ops.embed(w.x), {"x": dense(np.ones((2, 2)))}, 2, 2)
    with pytest.raises(ParameterError, match="kv_dtype"):
        runner_class(house)(model, model.weights, n_pages=1, kv_dtype="f8")


def test_unknown_devices_are_refused() -> None:
    model = Tiny(lambda ops, w: ops.embed(w.x), {"x": dense(np.ones((2, 2)))}, 2, 2)
    for device in ("abacus", "cuda:99"):
        with pytest.raises(ParameterError, match=f"^device {device}: "):
            runner_class("torch")(model, model.weights, n_pages=1, device=device)


def test_missing_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "pronghorn.ops.gpu", raising=False)
    with pytest.raises(PronghornError, match=r"pip install 'pronghorn\[gpu\]'"):
        importlib.import_module("pronghorn.ops.gpu")
