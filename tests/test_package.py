"""The package's promises: what each room exports, and that the light rooms need no torch."""

import importlib
import subprocess
import sys

import pytest

ROOMS = ("chat", "sandbox", "agent", "model", "kernels", "engine", "rl")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_what_it_says(room):
    """That the lists are sorted is ruff's to check (RUF022)."""
    module = importlib.import_module(f"rorqual.{room}")
    assert len(set(module.__all__)) == len(module.__all__) > 0
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize(
    "module", ["rorqual.chat", "rorqual.sandbox", "rorqual.agent", "rorqual.cli", "rorqual.model.cost"]
)
def test_the_base_install_is_enough_for(module):
    """A subprocess in which every package of the extras is hidden."""
    hidden = ("torch", "safetensors", "tokenizers", "numpy", "matplotlib", "transformers", "renderers")
    script = f"import sys\nfor name in {hidden!r}: sys.modules[name] = None\nimport {module}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_names_its_command():
    script = "import sys\nsys.modules['torch'] = None\nfrom rorqual.model import Model"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'rorqual[model]'" in done.stderr
