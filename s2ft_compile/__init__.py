"""S²FT as a compiler: train a few dense slices of a transformer's coupled weights, get an ordinary model back."""

from s2ft_compile.adapters.bank import AdapterBank

from . import exporters
from .config import CompileOptions, S2FTConfig
from .errors import (
    AdapterError,
    CaptureError,
    CompileError,
    ConfigError,
    ExportError,
    S2FTError,
    StateError,
    VerificationError,
)
from .estimation import Estimate, estimate
from .plan import Plan, Slice
from .preparation import analyze, permute, prepare
from .state import disabled, is_prepared, parameters, release
from .structure import Analysis, Coupling, Member, Refusal
from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "S2FTConfig",
    "CompileOptions",
    "Estimate",
    "estimate",
    "analyze",
    "verify",
    "permute",
    "prepare",
    "parameters",
    "release",
    "disabled",
    "is_prepared",
    "exporters",
    "AdapterBank",
    "Plan",
    "Slice",
    "Analysis",
    "Coupling",
    "Member",
    "Refusal",
    "Verification",
    "S2FTError",
    "ConfigError",
    "CaptureError",
    "StateError",
    "AdapterError",
    "ExportError",
    "CompileError",
    "VerificationError",
]
