"""`pronghorn eval --harness`: EleutherAI's lm_eval (Gao et al. 2021) in this process, on our engine.

Texts are encoded, and windows of long ones cut, as lm_eval's own model of Hugging Face's transformers does it: with BOS
where the tokenizer adds it, and the oldest tokens left out of what the context does not hold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pronghorn._native import log_probabilities
from pronghorn.engine.sampling import SamplingParams, whole
from pronghorn.errors import ParameterError, PromptError, PronghornError
from pronghorn.llm import LLM

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError:
    raise PronghornError(
        "--harness needs lm_eval, which the extra `eval` brings: pip install 'pronghorn[eval]'"
    ) from None

PASSED_ON = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Adapter(TemplateLM):  # type: ignore[misc]
    """An LLM as what lm_eval asks: log-likelihoods, of texts whole or after others, and generation."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    @property
    def eot_token_id(self) -> int:
        eos_ids = self.llm.tokenizer.eos_ids
        if not eos_ids:
            raise PromptError(f"{self.llm.path.name}: the tokenizer has no token that ends a text, which tasks need")
        return eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos_id = self.llm.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self) -> str:
        """Under which lm_eval keeps requests."""
        return str(self.llm.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Special tokens as the tokenizer adds them, unless it is said, or the text brings BOS."""
        tokenizer = self.llm.tokenizer
        if add_special_tokens is None:
            bos_id = tokenizer.bos_id
            add_special_tokens = bos_id is None or not string.startswith(tokenizer.id_to_token(bos_id))
        return tokenizer.encode(string, add_special=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise ParameterError("tasks that need a chat template are not run")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **more: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether it is greedy) of the continuation, for each (_, context, continuation).

        All share the engine's batches; but what fills the context leaves no room for a token to generate, so that its
        logits are computed by themselves.
        """
        context = self.llm.context
        sequences = [(before + after)[-context - 1 :] for _, before, after in requests]
        if any(len(after) > context for _, _, after in requests):
            raise PromptError(f"a continuation is longer than the context of {context} tokens")
        params = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=1)
        together = [ids for ids in sequences if len(ids) < context]
        outputs = iter(self.llm.generate(together, params))
        found = []
        for ids, (_, _, after) in zip(sequences, requests, strict=True):
            if len(ids) < context:
                entries = (next(outputs).prompt_logprobs or [])[-len(after) :] if after else []
                pairs = [(e.logprob, e.token_id == e.top[0][0]) for e in entries if e]
            else:
                rows = self.llm.logits(ids[:-1])[-len(after) :]
                likely = [
                    log_probabilities(rows.data, i, rows.shape[1], token_id, 1) for i, token_id in enumerate(after)
                ]
                pairs = [(chosen[1], chosen[0] == best[0]) for chosen, best in likely]
            found.append((float(sum(value for value, _ in pairs)), all(greedy for _, greedy in pairs)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the context's length that do not overlap."""
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.llm.context, 1
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for one in windows for window in one]))
        return [sum(next(scores)[0] for _ in one) for one in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its stop texts."""
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        for request in requests:
            text, asked = request.args
            given: dict[str, Any] = dict(normalize_gen_kwargs(asked, 256))
            stop, n_tokens, sampled = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
            for name, value in given.items():
                if name not in PASSED_ON:
                    raise ParameterError(f"the task asks for {name}={value!r}, which is not implemented")
            if not sampled:
                given = {name: given[name] for name in ("repetition_penalty",) if name in given}
            if n_tokens >= self.llm.context:
                raise ParameterError(f"the task generates {n_tokens} tokens: the context holds {self.llm.context}")
            prompts.append(self.tok_encode(text)[n_tokens - self.llm.context :])
            params.append(SamplingParams(max_tokens=n_tokens, stop=[end for end in stop if end], seed=0, **given))
        return [out.text for out in self.llm.generate(prompts, params)]


def manager_of(tasks: Sequence[str], folder: str | None) -> TaskManager:
    """What knows the tasks. lm_eval's own are thousands of files, which are read where the folder does not suffice."""
    for defaults in [True] if folder is None else [False, True]:
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if not unknown:
            return manager
    raise ParameterError(f"--harness {unknown[0]}: lm_eval has no such task")


def harness(llm: LLM, tasks: Sequence[str], manager: TaskManager, fewshot: int | None, limit: int | None) -> Any:
    """lm_eval's results of these tasks: by task, by "metric,filter"."""
    return simple_evaluate(
        Adapter(llm), tasks=list(tasks), task_manager=manager, num_fewshot=fewshot, limit=limit, log_samples=False
    )["results"]


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error or None) of lm_eval's results."""
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = figures.get(f"{metric}_stderr,{kind}")
                yield task, metric, value, error if isinstance(error, float) else None


def run(
    args: argparse.Namespace, models: Sequence[str | Path | None], dtypes: Sequence[str], kv_dtypes: Sequence[str]
) -> None:
    """`pronghorn eval --harness TASKS`."""
    for name in ("plot", "check", "window", "stride", "protocol", "match", "reference"):
        if getattr(args, name) is not None:
            raise ParameterError(f"--{name} is for a FILE")
    for name, least in (("limit", 1), ("fewshot", 0)):
        if (value := getattr(args, name)) is not None:
            whole(name, value, least)
    tasks = [part.strip() for part in args.harness.split(",")]
    manager = manager_of(tasks, args.tasks)
    found: list[dict[str, Any]] = []
    print(f"{'dtype':6} {'KV':5} {'task':24} {'metric':16} {'value':>10}")
    for model in models:
        for dtype in dtypes:
            for kv_dtype in kv_dtypes:
                with LLM(model, dtype=dtype, kv_dtype=kv_dtype, threads=args.threads) as llm:
                    results = harness(llm, tasks, manager, args.fewshot, args.limit)
                    name = Path(llm.path).name if len(models) > 1 else ""
                    for task, metric, value, error in rows(results):
                        spread = "" if error is None else f" ± {error:.4f}"
                        line = f"{dtype:6} {llm.kv_dtype:5} {task:24} {metric:16} {value:10.4f}{spread}  {name}"
                        print(line.rstrip(), flush=True)
                    found.append({"model": str(llm.path), "dtype": dtype, "kv_dtype": llm.kv_dtype, "results": results})
    if args.json:
        print(json.dumps({"tasks": tasks, "formats": found}, ensure_ascii=False, default=str))
