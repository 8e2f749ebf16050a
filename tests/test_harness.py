"""`pronghorn eval --harness`: lm_eval's own figures of a model of ours are those of transformers under lm_eval.

The tasks have the forms of hellaswag (multiple choice), wikitext (rolling perplexity) and generation, on local data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra `eval`)")

from lm_eval.tasks import TaskManager

from pronghorn import LLM, ParameterError, SamplingParams
from pronghorn.cli import main
from pronghorn.harness import Adapter, harness, manager_of
from tiny import STORY, save_tiny
from variants import quiet

pytestmark = pytest.mark.filterwarnings("default")  # of what lm_eval imports

DOCUMENTS = [
    {
        "query": STORY[:n],
        "choices": [" was", " girl named", STORY[n:] or " Lily", " x"],
        "gold": n % 4,
        "text": STORY * n,
    }
    for n in (1, 9, 17, 30, 53)
]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{gold}}"
doc_to_choice: "choices"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "local_generation": """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: " Lily"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match}
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=100)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks above."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `datasets` makes of the data goes into a folder of its own, and nothing is asked of the Hub."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


class Request:
    """What a task asks of a model."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    """lm_eval's own model, of transformers."""
    pytest.importorskip("accelerate", reason="accelerate is not installed, which lm_eval's model of transformers needs")
    from lm_eval.models.huggingface import HFLM

    with quiet() as transformers:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(model / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
        )
        network = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
        # Its cache mistakes equal sequences for each other that are cut differently into context and continuation.
        return HFLM(
            pretrained=network, tokenizer=tokenizer, device="cpu", batch_size=3, max_length=100, logits_cache=False
        )


def test_log_likelihoods(model: Path, theirs: Any) -> None:
    """Continuations in and beyond the context, after empty and after long texts: sums and greediness."""
    requests = [Request(d["query"], choice) for d in DOCUMENTS for choice in d["choices"]]
    requests += [Request("", STORY), Request("Once ", "upon"), Request("<s>On", "ce")]
    lengths = [(k, 3) for k in range(92, 101)] + [(250, 1), (5, 94), (5, 95), (5, 99), (29, 100)]
    requests += [Request((STORY * 9)[:before], (STORY * 3)[:after]) for before, after in lengths]
    with LLM(model, dtype="f32") as llm:
        adapter = Adapter(llm)
        found = adapter.loglikelihood(requests, disable_tqdm=True)
        for n in (2, 97):  # generated greedily: within the engine's batches, and at the end of the context
            prompt = (list(STORY.encode()) * 2)[:n]
            first, *more = llm.generate(prompt, SamplingParams(max_tokens=3, ignore_eos=True)).token_ids
            for after in ([first, *more], [first, *more[:-1], (more[-1] + 1) % 256]):
                (pair,) = adapter._loglikelihood_tokens([(None, prompt, after)])
                assert pair[1] == (after == [first, *more])
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for request, ours, other in zip(requests, found, expected, strict=True):
        assert ours[0] == pytest.approx(other[0], rel=1e-4, abs=1e-4), request.args
        assert ours[1] == other[1], request.args


def test_rolling(model: Path, theirs: Any) -> None:
    """Texts of a part of a window, of one, and of several."""
    requests = [Request((STORY * 9)[:n]) for n in (1, 50, 98, 99, 100, 101, 199, 200, 201, 333)]
    with LLM(model, dtype="f32") as llm:
        found = Adapter(llm).loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-4)


def test_generation(model: Path, theirs: Any) -> None:
    asked = [{"until": ["e", "\n"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 20, "do_sample": False}]
    texts = ["Once", "Once upon", STORY * 3, "a"]
    requests = [Request(text, kwargs) for kwargs in asked for text in texts]
    with LLM(model, dtype="f32") as llm:
        adapter = Adapter(llm)
        assert adapter.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
        sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_p": 0.9}
        first, again = (adapter.generate_until([Request("Once", sampled)]) for _ in range(2))
        assert first == again != adapter.generate_until([Request("Once", {"until": [], "max_gen_toks": 8})])
        with pytest.raises(ParameterError, match="asks for num_beams=4, which is not implemented"):
            adapter.generate_until([Request("Once", {"until": [], "num_beams": 4})])
        with pytest.raises(ParameterError, match="generates 100 tokens: the context holds 100"):
            adapter.generate_until([Request("Once", {"until": [], "max_gen_toks": 100})])


def test_tasks(model: Path, tasks: Path, theirs: Any) -> None:
    """Whole tasks, through lm_eval: the same metrics as with transformers."""
    from lm_eval import simple_evaluate

    manager = manager_of(list(TASKS), str(tasks))
    expected = simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, log_samples=False)["results"]
    with LLM(model, dtype="f32") as llm:
        found = harness(llm, list(TASKS), manager, None, None)
    assert found.keys() == expected.keys() == TASKS.keys()
    for task, figures in expected.items():
        for key, value in figures.items():
            assert found[task][key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key


def test_command_line(
    model: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lm_eval's own tasks, whose files take long to read."""
    monkeypatch.setattr(
        "pronghorn.harness.TaskManager",
        lambda include_path, include_defaults: TaskManager(include_path=include_path, include_defaults=False),
    )
    command = ["eval", "-m", str(model), "--tasks", str(tasks), "--dtype", "f32,int8"]
    assert main([*command, "--harness", "local_choice,local_rolling", "--limit", "2", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [entry["dtype"] for entry in found["formats"]] == ["f32", "int8"]
    assert [line.split()[:4] for line in lines[1:6]] == [
        ["f32", "f32", "local_choice", "acc"],
        ["f32", "f32", "local_choice", "acc_norm"],
        ["f32", "f32", "local_rolling", "word_perplexity"],
        ["f32", "f32", "local_rolling", "byte_perplexity"],
        ["f32", "f32", "local_rolling", "bits_per_byte"],
    ]
    value = found["formats"][1]["results"]["local_rolling"]["bits_per_byte,none"]
    assert lines[10].split() == ["int8", "bf16", "local_rolling", "bits_per_byte", f"{value:.4f}"]
    for more, message in (
        (["--harness", "no_such_task"], "--harness no_such_task: lm_eval has no such task"),
        (["--harness", "local_choice", "--plot", "x.svg"], "--plot is for a FILE"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
