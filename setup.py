"""Which packages to build; everything else is in pyproject.toml.

The folder patches/ is installed as vllm_spindle_patches; setuptools' discovery cannot rename.
"""

from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(
    include=["vllm_spindle", "vllm_spindle.*", "vllm_covipal", "vllm_covipal.*"]
)
if (Path(__file__).parent / "patches" / "__init__.py").is_file():
    below = [f"vllm_spindle_patches.{name}" for name in find_packages("patches")]
    packages += ["vllm_spindle_patches", *below]

setup(packages=packages)
