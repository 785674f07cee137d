"""Who imports whom: the contracts of pyproject.toml, and what a fresh process really loads."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "planish"
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))

# Packages behind an extra, by the name they are imported under: no room may load one just by being imported.
OPTIONAL = {
    *("accelerate", "compressed_tensors", "diffusers", "gguf", "matplotlib", "openmm", "opacus", "optuna", "peft"),
    *("ray", "scipy", "sklearn", "tokenizers", "torch_geometric", "transformers", "vllm"),
}


def loaded_by(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


def test_importing_planish_loads_no_torch():
    assert not {"torch", "numpy", *OPTIONAL} & loaded_by("import planish")


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_loads_no_optional_package(room):
    # what torch itself brings along is not the room's doing
    assert not (OPTIONAL & loaded_by(f"import planish.{room}")) - loaded_by("import torch")


def test_rooms_are_reached_as_attributes_and_nothing_else_is():
    code = "import planish; " + "; ".join(f"planish.{room}" for room in ROOMS)
    subprocess.run([sys.executable, "-c", code], check=True)
    import planish

    with pytest.raises(AttributeError, match="module 'planish' has no attribute 'qant'"):
        _ = planish.qant
    assert set(ROOMS) <= set(dir(planish))


def test_the_import_contracts_hold():
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    if not program.exists():
        pytest.skip("import-linter is not installed")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [program, "--no-logo", "--no-cache"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def _imports(path: Path) -> set[str]:
    """Read what a module imports as it loads; a function may still import a default when it is called."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_quantization_engine_knows_no_method():
    engine = [p for p in PACKAGE.glob("quant/*.py") if p.name != "__init__.py"]
    guilty = {p.name for p in engine if any(n.startswith("planish.quant.methods") for n in _imports(p))}
    assert not guilty
