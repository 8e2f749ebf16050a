"""What drafts gain: decoding with and without, side by side in turns, so that the machine's drift meets both.

    python bench/speculation.py [-m MODEL] [--dtype f32,bf16] [--draft self-int4,ngram] [--kind NAME] [--tokens 160]

A slice of one stream, then a slice of the other: each pair gives a ratio of tokens a second, and the median of all is
shown, with the middle half. The tokens of both are compared. Kinds of text:

- prose: ordinary English is continued, greedily;
- sampled: the same with temperature 1, which hardly ever repeats itself;
- edit: an instruction to repeat a text with a change, in the model's chat template.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator

from pronghorn import LLM, SamplingParams
from pronghorn.generation import Stream

PROSE = (
    "The lighthouse had stood at the end of the stone pier for more than a century. Every evening the keeper climbed",
    "Photosynthesis is the process by which green plants turn sunlight into chemical energy. It takes place in",
    "When the city council met on Tuesday to discuss the new library, most of the residents who came to speak",
)
TEXT = (
    "Dear Mr. Harding, thank you for your letter of the third of May. We are sorry to hear that the kitchen table, "
    "which you ordered in March, arrived with two broken legs and without the screws. Our driver told us that the "
    "parcel was in good order when it left the warehouse in Leeds, but we have no reason to doubt your word. We "
    "will send you a new table on Monday, free of charge, and collect the old one at the same time. Please leave "
    "it in its box, if you still have it. With kind regards, Anna Whitfield, customer service."
)
EDIT = (
    f"Repeat this letter word for word, but write Wednesday where it says Monday:\n\n{TEXT}",
    f"Correct the spelling mistakes in this letter and leave everything else as it is:\n\n{TEXT}",
    f"Copy this letter exactly:\n\n{TEXT}",
)
SLICE = 12  # tokens


def slices(stream: Stream) -> Iterator[tuple[int, float]]:
    """(tokens, seconds) of one piece after another; the prompt and the first piece are left out."""
    for number in range(1 << 30):
        started, n_tokens = time.perf_counter(), 0
        for chunk in stream:
            n_tokens += len(chunk.token_ids)
            if n_tokens >= SLICE:
                break
        if n_tokens < SLICE:
            return
        if number:
            yield n_tokens, time.perf_counter() - started


def measure(plain: LLM, drafting: LLM, kind: str, n_tokens: int) -> dict[str, object]:
    """One row."""
    ratios: list[float] = []
    spent = [[0, 0.0], [0, 0.0]]
    drafted = accepted = steps = 0
    for seed, text in enumerate(EDIT if kind == "edit" else PROSE):
        params = SamplingParams(
            max_tokens=n_tokens, temperature=float(kind == "sampled"), seed=seed, ignore_eos=kind != "edit"
        )
        prompt = plain.chat_prompt([{"role": "user", "content": text}]) if kind == "edit" else text
        streams = [llm.stream(prompt, params) for llm in (plain, drafting)]
        for pair in zip(*map(slices, streams), strict=False):
            ratios.append(pair[0][1] / pair[0][0] * pair[1][0] / pair[1][1])
            for sums, (tokens, seconds) in zip(spent, pair, strict=True):
                sums[0] += tokens
                sums[1] += seconds
        for stream in streams:
            for _ in stream:
                pass
        outputs = [stream.output() for stream in streams]
        assert outputs[0].token_ids == outputs[1].token_ids
        drafted += outputs[1].timings.drafted_tokens
        accepted += outputs[1].timings.accepted_tokens
        steps += len(outputs[1].token_ids) - outputs[1].timings.accepted_tokens
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "kind": kind,
        "ratio": round(statistics.median(ratios), 2),
        "half": [round(quarters[0], 2), round(quarters[2], 2)],
        "whole": round(spent[1][0] / spent[1][1] * spent[0][1] / spent[0][0], 2),
        "tok_s": [round(n / seconds, 1) for n, seconds in spent],
        "accepted": round(accepted / max(drafted, 1), 3),
        "drafted_a_step": round(drafted / steps, 2),
        "tokens_a_step": round((accepted + steps) / steps, 2),
    }


def main() -> None:
    """Prints a row for each dtype, draft and kind of text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("-m", "--model")
    options.add_argument("--dtype", default="f32,bf16")
    options.add_argument("--draft", default="self-int4,ngram")
    options.add_argument("--kind", default="prose,sampled,edit")
    options.add_argument("--threads", type=int)
    options.add_argument("--tokens", type=int, default=160)
    args = options.parse_args()
    for dtype in args.dtype.split(","):
        plain = LLM(args.model, dtype=dtype, threads=args.threads)
        for draft in args.draft.split(","):
            drafting = LLM(args.model, dtype=dtype, threads=args.threads, draft=draft)
            for kind in args.kind.split(","):
                row = measure(plain, drafting, kind, args.tokens)
                load = round(os.getloadavg()[0], 1)
                print(json.dumps({"dtype": dtype, "draft": draft, **row, "load": load}), flush=True)
            drafting.close()
        plain.close()


if __name__ == "__main__":
    main()
