"""What can be wrong, each with one line that names the thing and the fault."""


class PronghornError(Exception):
    """A mistake in a file, a parameter or a prompt: the message is one line, meant for the user."""


class CheckpointError(PronghornError):
    """A model file that is missing, damaged, or not what it claims to be."""


class NoTokenizer(CheckpointError):
    """A model that comes without a tokenizer: ids in, ids out does without, and a damaged one is another thing."""


class ConfigError(PronghornError):
    """A model configuration that asks for what is not implemented, or that contradicts itself."""


class ParameterError(PronghornError, ValueError):
    """A parameter out of its range; the message names it and the range."""


class PromptError(PronghornError, ValueError):
    """A prompt that cannot be run: too long, or with token ids outside of the vocabulary."""


class PromptTooLong(PromptError):
    """A prompt that the context has no room for; the message has both numbers."""


class QueueFull(PronghornError):
    """More requests than may wait: the same one may be taken later."""


class ShuttingDown(PronghornError):
    """No more requests are taken."""
