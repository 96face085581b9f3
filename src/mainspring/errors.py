"""Every error that a user can cause. The message says what was wrong, with the value and the limit, and what to do."""

from __future__ import annotations


class MainspringError(Exception):
    """Base of all errors that Mainspring raises on purpose."""


class UnsupportedModelError(MainspringError):
    """The checkpoint's architecture (or a feature of it) is none that Mainspring knows."""


class CheckpointError(MainspringError):
    """A checkpoint file is missing, truncated, or contradicts its own index or configuration."""


class TokenizerError(MainspringError):
    """A tokenizer cannot be built from its files, or cannot encode what it was given."""


class ChatTemplateError(MainspringError):
    """A chat template is missing, fails, or exceeds its time or size limit."""


class BackendError(MainspringError):
    """No backend of an operation can serve a call: names the operation, the value and what is supported."""


class ConfigError(MainspringError):
    """A setting is unknown, out of range, or contradicts another."""


class RecipeError(ConfigError):
    """A training recipe has an unknown key or a wrong value."""


class InvalidRequestError(MainspringError):
    """A generation request is malformed. `param` names the offending field, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLongError(InvalidRequestError):
    """A request does not fit the model's context or the KV cache."""


class ModelNotFoundError(MainspringError):
    """No model of that name or at that path."""


class EngineDeadError(MainspringError):
    """The engine process has ended; nothing can be served until it is restarted."""


class LockstepError(MainspringError):
    """The engine's log-probability of a token is not the trainer's: names the token and the operation that differs."""


class RetrievalError(MainspringError):
    """Base of what goes wrong in indexing, searching and answering from documents."""


class DocumentError(RetrievalError):
    """A document cannot be read: corrupt, binary, too large, or of an unknown kind."""


class EmptyCorpusError(RetrievalError):
    """A folder holds no document, or an index no passage."""


class PassageTooLongError(RetrievalError):
    """A passage has more tokens than the model's window; nothing is ever cut silently."""


class StoreError(RetrievalError):
    """A vector store is damaged, unreachable, or refuses an operation."""


class StoreLockedError(StoreError):
    """Another process is writing to the index."""


class EmbeddingModelChangedError(StoreError):
    """An index was built with other embeddings than those asked for."""
