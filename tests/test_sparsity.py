"""Pruned checkpoints: they run as dense ones, and `pronghorn info --sparsity` says what is zero."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import variants
from pronghorn import LLM
from pronghorn.cli import main
from pronghorn.convert import convert
from pronghorn.quantize import quantize


def pruned(source: Path, target: Path, form: str) -> tuple[Path, float, int, int]:
    """A copy whose matrices have zeros -> it, the share of zeros, matrices in 2:4, and all of them.

    `form`: "random" is a quarter anywhere; "2:4" the two smallest of each four inputs, but in one matrix.
    """
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    arrays = load_file(source / "model.safetensors")
    chance = np.random.default_rng(0)
    matrices = sorted(name for name, array in arrays.items() if array.ndim == 2 and "wpe" not in name)
    for name in matrices:
        turned = "c_" in name  # GPT-2's own order, [in, out]
        array = np.ascontiguousarray(arrays[name].T if turned else arrays[name])
        if form == "random":
            array[chance.random(array.shape) < 0.25] = -0.0
        elif name != matrices[-1]:
            whole = array.shape[1] // 4 * 4
            fours = array[:, :whole].reshape(-1, 4)
            np.put_along_axis(fours, np.abs(fours).argsort(1)[:, :2], 0, 1)
            array[:, :whole] = fours.reshape(len(array), -1)
        arrays[name] = np.ascontiguousarray(array.T if turned else array)
    save_file(arrays, target / "model.safetensors")
    n_zeros = sum(int((arrays[name] == 0).sum()) for name in matrices)
    n_two_of_four = 0 if form == "random" else len(matrices) - 1
    return target, n_zeros / sum(arrays[name].size for name in matrices), n_two_of_four, len(matrices)


@pytest.mark.parametrize("form", ["random", "2:4"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_pruned_models(tmp_path: Path, name: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, zeros, n_two_of_four, n_matrices = pruned(variants.save(name, tmp_path), tmp_path / "pruned", form)
    ids = variants.prompt(name, 20)
    for dtype in ("f32", "bf16", "int8", "int4"):
        with LLM(path, dtype=dtype) as llm, LLM(path, dtype=dtype, device="reference") as slow:
            assert np.abs(llm.logits(ids) - slow.logits(ids)).max() < (1e-4 if dtype == "f32" else 0.1)
    with LLM(path, dtype="f32") as llm:
        assert np.abs(llm.logits(ids) - variants.logits(path, ids)).max() < 1e-4
    expected = {"zeros": zeros, "matrices": n_matrices, "two_of_four": n_two_of_four}
    for kind in ("f32", "bf16", "q8_0"):  # a block's zeros are codes of zero
        form_path = path
        if kind != "f32":
            form_path = tmp_path / f"m-{kind}{'.gguf' if kind == 'q8_0' else ''}"
            if kind == "q8_0" and name == "gpt2":
                continue  # rows of this shape are no whole blocks
            convert(path, form_path, kind)
        assert main(["info", "-m", str(form_path), "--sparsity", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["sparsity"]
        if kind == "q8_0":
            assert found["zeros"] >= zeros
            assert found["two_of_four"] >= n_two_of_four
        else:
            assert found == pytest.approx(expected)
    assert main(["info", "-m", str(path), "--sparsity"]) == 0
    said = f"{zeros:.1%} of the weights in matrices are zero; {n_two_of_four} of {n_matrices} matrices are 2:4"
    assert said in capsys.readouterr().out.splitlines()
    if name == "llama-tied":
        quantize(path, tmp_path / "quantized", "int8-g32")
        assert main(["info", "-m", str(tmp_path / "quantized"), "--sparsity"]) == 2
        assert "is int8-g32: zeros are counted before quantizing" in capsys.readouterr().err
    assert main(["info", "-m", str(path), "--json"]) == 0
    assert "sparsity" not in json.loads(capsys.readouterr().out)
