"""Who may import whom, held by importing in a child process where the forbidden is absent."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMBERS = ["vllm_spindle.core.bands", "vllm_spindle.core.budget"]
NUMBERS += [f"vllm_covipal.core.{name}" for name in ("budget", "fingerprint", "text_context")]
DECISIONS = ["vllm_spindle.config", "vllm_spindle.policy"]

IMPORT_WITHOUT = """
import importlib, json, pkgutil, sys
forbidden, modules, packages = json.loads(sys.argv[1])
for name in forbidden:
    sys.modules[name] = None
for name in packages:
    package = importlib.import_module(name)
    modules.append(name)
    modules += [m.name for m in pkgutil.walk_packages(package.__path__, name + ".")]
for name in modules:
    importlib.import_module(name)
print(json.dumps([modules, [name for name in sys.modules if sys.modules[name]]]))
"""


def _import_without(
    forbidden: list[str], modules: list[str], packages: list[str]
) -> tuple[set[str], set[str]]:
    """Names imported on request, and all that came with them, in a fresh interpreter."""
    argument = json.dumps([forbidden, modules, packages])
    child = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    asked, loaded = json.loads(child.stdout)
    return set(asked), set(loaded)


@pytest.mark.parametrize("package", ["vllm_spindle", "vllm_covipal"])
def test_core_and_decisions_import_without_vllm_or_transformers(package: str) -> None:
    """Every module of core, and config and policy, import where vLLM and transformers do not."""
    if not (ROOT / package / "core").is_dir():
        pytest.skip(f"{package}/core does not exist yet")
    decisions = [
        f"{package}.{name}"
        for name in ("config", "policy")
        if (ROOT / package / f"{name}.py").exists()
    ]
    asked, _ = _import_without(["vllm", "transformers"], decisions, [f"{package}.core"])
    files = (ROOT / package / "core").glob("*.py")
    expected = {f"{package}.core.{file.stem}" for file in files if file.stem != "__init__"}
    assert expected <= asked


def test_selectors_import_without_vllm_or_transformers() -> None:
    """A way to choose visual tokens needs torch alone."""
    asked, _ = _import_without(["vllm", "transformers"], [], ["vllm_covipal.selectors"])
    assert "vllm_covipal.selectors.divprune" in asked


def test_baselines_import_without_vllm_or_transformers() -> None:
    """A method needs torch and the core; only the cache that holds its work knows transformers."""
    asked, loaded = _import_without(["vllm", "transformers"], [], ["vllm_spindle.baselines"])
    assert "vllm_spindle.baselines.paper" in asked
    assert "numba" not in loaded  # compiling is for those who merge


def test_the_transformers_side_imports_without_vllm() -> None:
    """Caches, answers and profiles run where there is no vLLM."""
    modules = ["vllm_spindle.hf", "vllm_spindle.evaluation.answers"]
    asked, _ = _import_without(["vllm"], [*modules, "vllm_spindle.calibration.profile"], [])
    assert set(modules) <= asked


@pytest.mark.parametrize("module", NUMBERS + DECISIONS)
def test_numbers_and_decisions_import_without_torch(module: str) -> None:
    """The scheduler side counts where torch is absent."""
    asked, loaded = _import_without(["torch", "vllm", "transformers"], [module], [])
    assert module in asked & loaded


@pytest.mark.parametrize("package", ["vllm_spindle", "vllm_covipal"])
def test_importing_the_package_loads_nothing_heavy(package: str) -> None:
    """`import PACKAGE` loads no third-party module and none of its own parts."""
    _, loaded = _import_without([], [package], [])
    heavy = {"torch", "vllm", "transformers", "numpy", "pydantic", "yaml"}
    assert all(importlib.util.find_spec(name) for name in heavy - {"vllm", "transformers"})
    assert loaded & heavy == set()
    assert {name for name in loaded if name.startswith(package)} == {package}
