"""Puts the top-level Hydra files into the wheel as ``moe_train/configs``.

Everything else about the package is declared in pyproject.toml.
"""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """``build_py`` that adds ``configs/``; an editable install reads the checkout's own."""

    def run(self) -> None:
        """Build the package, then copy the Hydra files beside it."""
        super().run()
        if not self.editable_mode:
            source = Path(__file__).resolve().parent / "configs"
            target = Path(self.build_lib) / "moe_train" / "configs"
            copytree(source, target, dirs_exist_ok=True, ignore=ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithConfigs})
