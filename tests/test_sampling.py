"""Sampling against an obvious twin in NumPy, and against statistics."""

from __future__ import annotations

import math
import pickle
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn import ParameterError, SamplingParams, _native
from pronghorn.engine.sampling import fresh_seed, sampler
from pronghorn.ops import Choice

INF = float("inf")


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, ...]:
    """Philox4x32-10, from the paper."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def gumbel(seed: int, position: int, token_id: int) -> float:
    """The noise of a token."""
    word = philox((token_id // 4, position, 0, 0), seed)[token_id % 4]
    return -math.log(-math.log((word + 0.5) / 2**32))


def twin(logits: np.ndarray, params: SamplingParams, history: list[int], n_prompt: int, ends: list[int]) -> int:
    """The pipeline of SamplingParams' docstring, with nothing clever."""
    row = logits.astype(np.float32)
    for token_id, bias in params.logit_bias.items():
        row[token_id] += np.float32(bias)
    output = history[n_prompt:]
    for token_id in sorted(set(history)):
        penalty = np.float32(params.repetition_penalty)
        row[token_id] = row[token_id] / penalty if row[token_id] > 0 else row[token_id] * penalty
        row[token_id] -= np.float32(params.frequency_penalty) * np.float32(output.count(token_id))
        if token_id in output:
            row[token_id] -= np.float32(params.presence_penalty)
    if len(output) < params.min_tokens:
        row[ends] = -np.inf
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if params.temperature == 0:
        return order[0]
    top, scale = row[order[0]], 1 / params.temperature
    kept = order[: params.top_k] if params.top_k else order
    mass = np.exp((row[kept] - top).astype(np.float64) * scale)
    if params.top_p < 1:
        enough = np.flatnonzero(np.cumsum(mass) >= params.top_p * mass.sum())
        kept = kept[: enough[0] + 1] if len(enough) else kept
    if params.min_p > 0:
        least = np.float32(float(top) + params.temperature * math.log(params.min_p))
        kept = [i for i in kept if row[i] >= min(least, top)]
    kept = sorted(i for i in kept if row[i] > -np.inf)
    assert params.seed is not None
    scores = [float(row[i]) * scale + gumbel(params.seed, len(history), i) for i in kept]
    return kept[int(np.argmax(scores))]


def choose(
    logits: np.ndarray, params: SamplingParams, history: Sequence[int] = (), n_prompt: int = 0, ends: Sequence[int] = ()
) -> int:
    assert params.seed is not None
    native = sampler(params, params.seed, ends)
    return native.choose(np.ascontiguousarray(logits, np.float32), 0, len(logits), array("i", history), n_prompt)


def test_philox_known_answers() -> None:
    """Random123's own vectors (kat_vectors, philox4x32 10)."""
    for counter, key, expected in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert _native.philox(*counter, key) == expected == philox(counter, key)


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.7, 100.0]),
        "top_k": st.sampled_from([0, 1, 2, 3, 40, 10**6]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-9]),
        "min_p": st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -1.0]),
        "seed": st.integers(0, 2**64 - 1),
        "min_tokens": st.sampled_from([0, 0, 5]),
    }
)


@settings(max_examples=400, deadline=None)
@given(
    PARAMS,
    st.sampled_from([3, 4, 5, 17, 255, 257, 1000]),
    st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    st.integers(0, 2**32 - 1),
)
def test_equals_twin(values: dict[str, Any], n: int, spread: float, source: int) -> None:
    rng = np.random.default_rng(source)
    logits = (rng.standard_normal(n) * spread).astype(np.float32)
    if source % 3 == 0:
        logits = np.round(logits)  # many ties
    if source % 5 == 0:
        logits[rng.integers(1, n, n // 3)] = -np.inf
    history = rng.integers(0, n, source % 12).tolist()
    bias = {int(i): float(rng.normal()) for i in rng.integers(0, n, source % 4)}
    params = SamplingParams(**values, logit_bias=bias, max_tokens=None)
    n_prompt = len(history) // 2
    ends = [1, 2][: n - 2]
    assert choose(logits, params, history, n_prompt, ends) == twin(logits, params, history, n_prompt, ends)


def test_equals_twin_on_a_large_vocabulary() -> None:
    """Where the bounds save nearly all of the work, and the nucleus is sought in rounds."""
    n = 50257
    words = np.array([philox((i, 9, 0, 0), 5) for i in range(n // 4 + 1)], np.float64).reshape(-1)[:n]
    noise = -np.log(-np.log((words + 0.5) / 2**32))
    rng = np.random.default_rng(0)
    for spread in (0.1, 1, 4, 12):
        logits = (rng.standard_normal(n) * spread).astype(np.float32)
        for temperature in (0.2, 1.0, 3.0):
            params = SamplingParams(temperature=temperature, seed=5)
            scores = logits.astype(np.float64) * (1 / temperature) + noise
            assert choose(logits, params, [0] * 9) == int(np.argmax(scores))
            order = np.lexsort((np.arange(n), -logits))
            mass = np.exp((logits[order] - logits.max()).astype(np.float64) / temperature)
            for top_p in (0.3, 0.95):
                last = int(np.flatnonzero(np.cumsum(mass) >= top_p * mass.sum())[0])
                kept = order[: last + 1]
                params = SamplingParams(temperature=temperature, seed=5, top_p=top_p)
                assert choose(logits, params, [0] * 9) == kept[np.argmax(scores[kept])]


@pytest.mark.parametrize(
    ("values", "keeps"),
    [
        ({}, range(8)),
        ({"temperature": 2.0}, range(8)),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.6}, [0, 1]),
        ({"min_p": 0.3}, [0, 1, 2]),
    ],
)
def test_distribution(values: dict[str, Any], keeps: Any) -> None:
    """Chi-square of 20,000 tokens, of as many seeds and positions, against the softmax of what remains."""
    p = np.array([0.4, 0.25, 0.15, 0.08, 0.05, 0.04, 0.02, 0.01])
    logits = np.log(p).astype(np.float32)
    params = SamplingParams(**{"temperature": 1.0, "seed": 1234, **values})
    history = array("i", [0] * 20000)
    counts = np.zeros(8)
    for draw in range(20000):  # half along the seeds, half along the positions
        native = sampler(params, draw if draw % 2 else 1234, [])
        counts[native.choose(logits, 0, 8, history[: 7 if draw % 2 else draw], 0)] += 1
    expected = np.zeros(8)
    expected[list(keeps)] = p[list(keeps)] ** (1 / params.temperature)
    expected *= 20000 / expected.sum()
    assert not counts[expected == 0].any()
    seen = expected > 0
    chi2 = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    assert chi2 < 26  # 7 degrees of freedom: exceeded with a probability of 0.0005, by a fixed draw


def test_ties_take_the_lowest_id() -> None:
    flat = np.zeros(10, np.float32)
    assert choose(flat, SamplingParams(seed=0)) == 0
    for seed in range(50):
        assert choose(flat, SamplingParams(temperature=1, top_k=3, seed=seed)) < 3
        assert choose(flat, SamplingParams(temperature=1, top_p=0.2, seed=seed)) < 2
    assert {choose(flat, SamplingParams(temperature=1, min_p=1, seed=seed)) for seed in range(200)} == set(range(10))


def test_one_token_left() -> None:
    logits = np.full(100, -np.inf, np.float32)
    logits[42] = -3
    for values in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}):
        assert choose(logits, SamplingParams(**{"temperature": 1.0, "seed": 3, **values})) == 42


def test_min_tokens_withholds_the_ends() -> None:
    logits = np.array([1, 5, 2], np.float32)
    params = SamplingParams(min_tokens=2, seed=0)
    assert [choose(logits, params, [0] * n, 1, [1]) for n in (1, 2, 3)] == [2, 2, 1]


def test_faults_are_errors() -> None:
    params = SamplingParams(seed=0)
    for bad in (np.nan, np.inf):
        for place in (0, 7, 16):
            logits = np.zeros(17, np.float32)
            logits[place] = bad
            with pytest.raises(ValueError, match="not finite"):
                choose(logits, params)
            with pytest.raises(ValueError, match="not finite"):
                _native.log_probabilities(logits, 0, 17, 0, 0)
    with pytest.raises(ValueError, match="no token is left"):
        choose(np.full(5, -np.inf), params)
    with pytest.raises(ValueError, match="no token is left"):
        choose(np.zeros(2), params.replace(logit_bias={0: -INF, 1: -INF}))
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        choose(np.zeros(3), params.replace(logit_bias={3: 1.0}))
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        choose(np.zeros(3), params.replace(presence_penalty=1.0), [5], 0)
    with pytest.raises(IndexError):
        sampler(params, 0, []).choose(np.zeros(3, np.float32), 1, 3, array("i"), 0)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_rows_side_by_side(threads: int | None) -> None:
    """Rows chosen together, each as alone; one that fails names its fault and no other minds."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (40, 1000)).astype(np.float32)
    logits[7, 3] = np.nan
    params = [
        SamplingParams(
            temperature=i % 3 * 0.7, top_k=i % 5 * 10, top_p=1 - i % 2 * 0.1, seed=i, presence_penalty=i % 7 / 7
        )
        for i in range(80)
    ]
    mask = np.full(32, 0xAAAAAAAA, np.uint32)
    choices = [
        Choice(
            sampler(p, i, []), i % 40, array("i", range(i)), i // 2, mask if i % 4 == 1 else None, [None, 0, 5][i % 3]
        )
        for i, p in enumerate(params)
    ]
    chosen = _native.choose_rows(logits, 1000, choices, threads and _native.Pool(threads))
    for (native, row, history, n_prompt, allowed, n_top), found in zip(choices, chosen, strict=True):
        if row == 7:
            assert found == "the model's logits are not finite"
            continue
        token_id = native.choose(logits, row, 1000, history, n_prompt, allowed)
        probabilities = [] if n_top is None else _native.log_probabilities(logits, row, 1000, token_id, n_top)
        assert found == (token_id, probabilities)
    with pytest.raises(IndexError):
        _native.choose_rows(logits, 1000, [choices[0]._replace(row=40)])


def test_log_probabilities() -> None:
    rng = np.random.default_rng(1)
    logits = np.round(rng.standard_normal((2, 5000)) * 20).astype(np.float32) / 4
    exact = logits[1] - np.log(np.exp(logits[1].astype(np.float64)).sum())
    (chosen, value), *top = _native.log_probabilities(logits, 1, 5000, 77, 30)
    assert chosen == 77
    assert value == pytest.approx(exact[77], abs=1e-6)
    order = np.lexsort((np.arange(5000), -logits[1]))[:30]
    assert [token_id for token_id, _ in top] == order.tolist()
    assert [value for _, value in top] == pytest.approx(exact[order].tolist(), abs=1e-6)
    assert len(_native.log_probabilities(logits[0, :3], 0, 3, 0, 100)) == 4


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", (0, -1, 1.5, "3", True)),
        ("temperature", (-1, 101, INF, math.nan, "1", None, 1e-7, True, np.ones(1), 10**400)),
        ("top_k", (-1, 2.0, None, np.True_, np.ones(2, int))),
        ("top_p", (0, 1.01, -0.5, math.nan)),
        ("min_p", (-0.1, 1.1)),
        ("repetition_penalty", (0, -1, math.nan)),
        ("presence_penalty", (2.5, -2.1)),
        ("frequency_penalty", (2.5, -INF)),
        ("logit_bias", ({0: 101}, {-1: 1}, {"a": 1}, {0: math.nan}, {0: INF}, [1], 5)),
        ("seed", (-1, 2**64, 0.5)),
        ("stop", ("", ["a", ""], [1], 5)),
        ("stop_token_ids", ([-1], ["a"], 5, "12")),
        ("ignore_eos", (1, None)),
        ("min_tokens", (-1, 1000)),
        ("logprobs", (-1, 101, True)),
        ("prompt_logprobs", (-1, 101, True, 1.5)),
        ("n", (0, 129, 1.5, None)),
        ("best_of", (0, 129, "2")),
    ],
)
def test_parameters_are_checked(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ParameterError, match=name) as error:
            SamplingParams(**{name: value})
        assert "\n" not in str(error.value)


def test_parameters_are_values() -> None:
    params = SamplingParams(max_tokens=5, seed=0, logprobs=0, stop="x", logit_bias={3: -INF})
    assert eval(repr(params), {"SamplingParams": SamplingParams, "inf": INF}) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert params.replace(stop=()) != params
    assert params.replace(seed=None) == SamplingParams(max_tokens=5, logprobs=0, stop="x", logit_bias={3: -INF})
    assert (params.seed, params.logprobs, params.stop) == (0, 0, ("x",))
    with pytest.raises(AttributeError, match="immutable"):
        params.seed = 1
    with pytest.raises(TypeError):
        params.logit_bias[3] = 1.0  # type: ignore[index]
    same = SamplingParams(max_tokens=5, seed=0, logprobs=0, stop=["x"], logit_bias={3: -INF})
    assert hash(params) == hash(same)
    assert {params: 1}[same] == 1
    assert hash(params) != hash(params.replace(seed=1))
    scalars = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(4), seed=np.uint64(3), logit_bias={np.int64(3): np.float32(-np.inf)}
    )
    assert scalars == SamplingParams(temperature=0.5, top_k=4, seed=3, logit_bias={3: -INF})
    assert repr(scalars) == "SamplingParams(temperature=0.5, top_k=4, logit_bias={3: -inf}, seed=3)"
    assert fresh_seed() != fresh_seed()
