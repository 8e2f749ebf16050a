"""GPT-2 124M in its full size: random weights against transformers, and the real ones where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from variants import quiet

from pronghorn import LLM, SamplingParams

TURING = "Alan Turing theorized that computers would one day become very powerful, but even he could not imagine"
TURING_GOES_ON = [703, 484, 561, 307, 1498, 284, 466, 523, 13, 198, 198, 1, 40, 892, 326, 262, 749, 1593, 1517, 318]
TURING_IDS = [
    36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716, 845, 3665, 11, 475, 772, 339, 714, 407, 5967,
]  # fmt: skip


@pytest.mark.slow
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    import torch

    with quiet() as transformers, torch.no_grad():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.GPT2Config(), attn_implementation="eager"
        ).eval()
        for parameter in model.parameters():  # the usual start is so even that attention hardly matters
            if parameter.ndim == 2:
                parameter.mul_(3)
        model.save_pretrained(tmp_path)
        ids = list(TURING_IDS)
        margins, expected = [], []
        for _ in range(20):
            row = model(torch.tensor([ids])).logits[0, -1]
            first, second = row.topk(2).values
            margins.append(float((first - second) / row.std()))
            ids.append(int(row.argmax()))
        expected = model(torch.tensor([ids])).logits[0].numpy()

    with LLM(tmp_path) as llm:
        logits = llm.logits(ids)
        assert abs(logits - expected).max() < 1e-4 * expected.std()
        out = llm.generate(TURING_IDS, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    for token, wanted, margin in zip(out.token_ids, ids[len(TURING_IDS) :], margins, strict=True):
        if margin < 1e-4:
            break  # a tie, within what float32 can tell: what follows may differ
        assert token == wanted
    assert np.isfinite(logits).all()


@pytest.mark.skipif(
    "PRONGHORN_GPT2_124M" not in os.environ,
    reason="PRONGHORN_GPT2_124M is not set (a folder with GPT-2 124M's real weights)",
)
def test_the_real_weights_go_on_as_known() -> None:
    with LLM(os.environ["PRONGHORN_GPT2_124M"]) as llm:
        greedy = SamplingParams(max_tokens=20, temperature=0.0)
        assert llm.generate(TURING, greedy).token_ids == TURING_GOES_ON
        assert llm.generate("My name is", greedy).text.startswith(" John. I'm a man of God. I")
