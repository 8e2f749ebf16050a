"""GPT-2 and Llama models at the speed of the memory, from a package that starts at once.

>>> from pronghorn import LLM, SamplingParams
>>> llm = LLM(path)
>>> llm.generate("Once upon a time", SamplingParams(max_tokens=8)).text
', there was a little girl'
"""

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncStream",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "Interrupted",
    "Logprob",
    "Output",
    "ParameterError",
    "PromptError",
    "PronghornError",
    "QueueFull",
    "SamplingParams",
    "ShuttingDown",
    "Stats",
    "Stream",
    "Timings",
    "__version__",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pronghorn.async_llm import AsyncLLM, AsyncStream
    from pronghorn.engine.engine import Stats
    from pronghorn.engine.sampling import SamplingParams
    from pronghorn.engine.scheduler import Logprob
    from pronghorn.errors import (
        CheckpointError,
        ConfigError,
        ParameterError,
        PromptError,
        PronghornError,
        QueueFull,
        ShuttingDown,
    )
    from pronghorn.generation import Chunk, Interrupted, Output, Stream, Timings
    from pronghorn.llm import LLM

_HOMES = {
    "async_llm": ("AsyncLLM", "AsyncStream"),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "ParameterError",
        "PromptError",
        "PronghornError",
        "QueueFull",
        "ShuttingDown",
    ),
    "engine.engine": ("Stats",),
    "engine.sampling": ("SamplingParams",),
    "engine.scheduler": ("Logprob",),
    "generation": ("Chunk", "Interrupted", "Output", "Stream", "Timings"),
    "llm": ("LLM",),
}


def __getattr__(name: str) -> object:
    """Imports what is asked for, when it is asked for: the package itself costs nothing."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
