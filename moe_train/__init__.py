"""moe_train: Mixture-of-Experts training on Megatron-Core.

    import moe_train

    moe_train.plan(["experiment=moe_30b_8x64gb"], world=8)["fits"]
    moe_train.train_model(["experiment=single", "train.steps=20"], callbacks=[MyCallback()])

Names are imported when first used, so ``import moe_train`` and :func:`plan` stay free of torch.
``train_model`` is not called ``train``: that is the package of the training step and loop.

api: commands as Python functions. cli: the console script. errors: what a user can cause, exit
codes. files: JSON files, digests, locks. The packages are on the map of docs/architecture.md.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("moe-train")
except PackageNotFoundError:
    __version__ = "unknown (moe-train is not installed)"

_MODULES = {
    "Callback": "moe_train.train.callback",
    "evaluate": "moe_train.api",
    "export_hf": "moe_train.api",
    "generate": "moe_train.api",
    "import_hf": "moe_train.api",
    "load_config": "moe_train.api",
    "plan": "moe_train.api",
    "train_model": "moe_train.api",
    "tune": "moe_train.api",
    "verify_hf": "moe_train.api",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import a name of the API (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'moe_train' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
