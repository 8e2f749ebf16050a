"""GPT-2 and Llama models at the speed of the memory, from a package that starts at once.

>>> from pronghorn import LLM, SamplingParams
>>> llm = LLM(path)
>>> llm.generate("Once upon a time", SamplingParams(max_tokens=8)).text
', there was a little girl'
"""

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "Output",
    "ParameterError",
    "PromptError",
    "PronghornError",
    "SamplingParams",
    "Stream",
    "Timings",
    "__version__",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pronghorn.engine.sampling import SamplingParams
    from pronghorn.errors import CheckpointError, ConfigError, ParameterError, PromptError, PronghornError
    from pronghorn.generation import Chunk, Output, Stream, Timings
    from pronghorn.llm import LLM

_HOMES = {
    "errors": ("CheckpointError", "ConfigError", "ParameterError", "PromptError", "PronghornError"),
    "engine.sampling": ("SamplingParams",),
    "generation": ("Chunk", "Output", "Stream", "Timings"),
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
