"""Puts `recipes/` into the wheel as `align_cli/recipes`; everything else is in pyproject.toml."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            copytree(Path("recipes"), Path(self.build_lib) / "align_cli" / "recipes", dirs_exist_ok=True)


setup(cmdclass={"build_py": WithRecipes})
