"""What can go wrong, as exceptions that say what was found and what would be valid.

Each one is also the built-in exception a caller would expect, so `except ValueError` works too.
"""

import errno
import re


class S2FTError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(S2FTError, ValueError):
    """A target, ratio, option or data file that cannot be used."""


class CaptureError(S2FTError, RuntimeError):
    """The model could not be traced."""


class StateError(S2FTError, RuntimeError):
    """A call that does not fit the model's present state (not prepared, prepared twice, ...)."""


class AdapterError(S2FTError, ValueError):
    """An adapter file that is damaged, or that belongs to another base model."""


class ExportError(S2FTError, RuntimeError):
    """A model or an output path that cannot be exported to."""


class TrainingError(S2FTError, RuntimeError):
    """A run of `s2ft train` that stopped: diverged, out of memory, or asked to."""


class CompileError(S2FTError, RuntimeError):
    """A graph whose backward could not be rewritten."""


class VerificationError(S2FTError, RuntimeError):
    """A coupling that changes the model's outputs, or a model that cannot be compared."""


# libraries in Rust and C++ raise types of their own; the last is torch's, of a file that it could not write whole
_SYSTEM = re.compile(r"\(os error \d+\)|No space left|iostream|file write|inline_container\.cc")


def of_the_system(error: BaseException) -> bool:
    """Whether an error is the system's, such as that of a full disk."""
    return isinstance(error, OSError) or _SYSTEM.search(str(error)) is not None


def of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory: a GPU's, Python's, or of torch on a CPU, which raises a plain RuntimeError;
    also where the compiler met it, around whose errors dynamo puts one of its own."""
    cause = getattr(error, "inner_exception", error)
    if isinstance(cause, OSError):
        return cause.errno == errno.ENOMEM
    known = isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"  # no torch in this file
    return known or "DefaultCPUAllocator" in str(cause)
