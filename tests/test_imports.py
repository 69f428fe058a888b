"""Dependencies point one way, and `arlon_ray` stays light: it must run where only torch and einops are installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL_CODE = [p for part in ("models", "diffusion", "generation") for p in (ROOT / "arlon_ray" / part).rglob("*.py")]
ALL = list((ROOT / "arlon_ray").rglob("*.py"))
HEAVY = (
    "ray",
    "deepspeed",
    "transformers",
    "diffusers",
    "mlflow",
    "av",
    "decord",
    "pyarrow",
    "vector_quantize_pytorch",
)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_arlon_ray_knows_nothing_above_it(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"ray", "deepspeed", "mlflow", "jobs", "serve", "data_pipeline"}


@pytest.mark.parametrize("path", MODEL_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_model_code_knows_no_engine_and_no_environment(path: Path) -> None:
    names = imported(path)
    assert not any(name.startswith("torch.distributed") for name in names)
    assert "os.environ" not in path.read_text() and "getenv" not in path.read_text()


def test_importing_arlon_ray_loads_nothing_heavy() -> None:
    code = (
        "import sys, arlon_ray, arlon_ray.generation, arlon_ray.bundle, arlon_ray.training.stages.dit, "
        "arlon_ray.training.stages.codec, arlon_ray.generation.video; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_no_job_shadows_a_module() -> None:
    """`python jobs/X.py` puts jobs/ first on the path: a file named as a standard module would be taken for it."""
    names = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)
    assert not names & {"torch", "ray", "numpy", "mlflow", "deepspeed", "transformers", "datasets"}
