"""S²FT as a compiler: train a few dense slices of a transformer's coupled weights, get an ordinary model back."""

from pathlib import Path
from typing import TYPE_CHECKING

for _link in (Path(__file__).with_name(name) for name in ("passes", "kernels", "exporters")):
    if _link.is_file():  # what Git writes where it may not make a link
        how = "git config core.symlinks true && git checkout -f HEAD -- s2ft_compile"
        raise ImportError(f"{_link} was checked out as a file, and has to be a symbolic link: {how}")

from .lazy import attributes  # noqa: E402

if TYPE_CHECKING:
    from . import exporters
    from .adapters.bank import AdapterBank
    from .callback import S2FTCallback
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
    from .explanation import Explanation, explain
    from .exporters.patches import Patch, patches
    from .layers import compile_layers
    from .plan import Plan, Slice
    from .preparation import analyze, permute, prepare
    from .reselection import reselect
    from .slices.optimizers import optimizer
    from .slices.reference import Reference, base_values
    from .slices.state import disabled, is_prepared, parameters, release
    from .slices.units import load_trained_state, trained_state
    from .structure import Analysis, Coupling, Member, Refusal
    from .verification import Verification, verify

__version__ = "0.1.0"

__getattr__, __dir__ = attributes(
    __name__,
    {
        "AdapterBank": "adapters.bank",
        "S2FTCallback": "callback",
        "CompileOptions": "config",
        "S2FTConfig": "config",
        "AdapterError": "errors",
        "CaptureError": "errors",
        "CompileError": "errors",
        "ConfigError": "errors",
        "ExportError": "errors",
        "S2FTError": "errors",
        "StateError": "errors",
        "VerificationError": "errors",
        "Estimate": "estimation",
        "estimate": "estimation",
        "Explanation": "explanation",
        "explain": "explanation",
        "compile_layers": "layers",
        "optimizer": "slices.optimizers",
        "Patch": "exporters.patches",
        "patches": "exporters.patches",
        "Plan": "plan",
        "Slice": "plan",
        "analyze": "preparation",
        "permute": "preparation",
        "prepare": "preparation",
        "Reference": "slices.reference",
        "base_values": "slices.reference",
        "load_trained_state": "slices.units",
        "reselect": "reselection",
        "trained_state": "slices.units",
        "disabled": "slices.state",
        "is_prepared": "slices.state",
        "parameters": "slices.state",
        "release": "slices.state",
        "Analysis": "structure",
        "Coupling": "structure",
        "Member": "structure",
        "Refusal": "structure",
        "Verification": "verification",
        "verify": "verification",
    },
)

__all__ = [
    "compile_layers",
    "S2FTConfig",
    "CompileOptions",
    "Estimate",
    "estimate",
    "Explanation",
    "explain",
    "analyze",
    "verify",
    "permute",
    "prepare",
    "load_trained_state",
    "reselect",
    "S2FTCallback",
    "trained_state",
    "parameters",
    "optimizer",
    "release",
    "disabled",
    "Reference",
    "base_values",
    "is_prepared",
    "exporters",
    "AdapterBank",
    "Patch",
    "patches",
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
