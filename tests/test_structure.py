"""What DESIGN promises of the tree itself: who imports whom, what is installed, what needs no triton."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddpm_fast"
KERNELS = ROOT / "kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LIMIT = 400  # lines of a file
ALLOWED_IN_KERNELS = {"torch", "triton", "numpy"}

# A module, or a package of modules, imports from its own layer and those below, without circles (of imports at
# the top of files). One that is not named here may stand anywhere, as long as it closes no circle.
LAYERS = [
    {"kernels", "_version"},
    {"config", "schedule", "house_rule", "whole_files", "distributed", "progress", "stages"},
    {"ops", "step_table", "noise", "diffusion", "data"},
    {"unet", "presets"},
    {"checkpoints", "graphs", "images"},
    {"engine", "sampler", "inspection"},
    {"dropin", "store", "evaluation", "training", "planning", "verification", "benchmarking", "roofline"}
    | {"profiling", "report"},
    {"cli"},
    {"__main__", "__init__"},
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}


def sources() -> list[Path]:
    """Every Python file of ours, each once: ddpm_fast/kernels is a link."""
    files = [p for p in PACKAGE.rglob("*.py") if (PACKAGE / "kernels") not in p.parents]
    return files + [p for name in ("kernels", "benchmarks") for p in (ROOT / name).rglob("*.py")]


def package_of(path: Path) -> list[str]:
    """The dotted package that a file's relative imports start from."""
    if KERNELS in path.parents:
        return ["ddpm_fast", "kernels", *path.relative_to(KERNELS).parts[:-1]]
    return list(path.relative_to(ROOT).parts[:-1])


def imports(path: Path, deferred: bool = True) -> set[str]:
    """Absolute dotted names of all that a file imports; ``deferred``: inside functions too."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for branch in ast.walk(tree):  # what only type checkers follow
        if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            branch.body = []
        if not deferred and isinstance(branch, ast.FunctionDef):
            branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path)[: -(node.level - 1) or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import x" names modules; "from .x import y" names x, and y may be a module
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def modules_of_ours(names: set[str]) -> set[str]:
    """First name below ddpm_fast of each import, where that is a module."""
    first = {n.split(".")[1] for n in names if n.startswith("ddpm_fast.")}
    return {n for n in first if (PACKAGE / f"{n}.py").exists() or (PACKAGE / n).is_dir()}


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_triton_numpy_and_siblings(path: Path):
    foreign = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names) - {"ddpm_fast"}
    assert foreign <= ALLOWED_IN_KERNELS
    assert modules_of_ours(imports(path)) <= {"kernels"}


def test_imports_go_one_way():
    """A module or package imports only from layers below its own, or from its own layer; and there is no circle."""
    graph: dict[str, set[str]] = {}
    at_once: dict[str, set[str]] = {}  # without what a function imports when it is called
    for path in PACKAGE.rglob("*.py"):
        if (PACKAGE / "kernels") in path.parents:
            continue
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for edges, deferred in ((graph, True), (at_once, False)):
            edges.setdefault(name, set()).update(modules_of_ours(imports(path, deferred)) - {name, "__init__"})
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if LAYER.get(other, 0) > LAYER.get(name, len(LAYERS))
    ]
    assert upward == []

    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in at_once.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in at_once:
        visit(name, ())


def test_the_named_edges():
    """cli -> everything; sampler -> graphs, noise, schedule, ops; unet -> ops; ops -> kernels."""
    assert modules_of_ours(imports(PACKAGE / "schedule.py")) == {"kernels", "respacing", "arguments", "vp_sde"}
    assert modules_of_ours(imports(PACKAGE / "config.py")) == {"kernels"}
    assert modules_of_ours(imports(PACKAGE / "diffusion.py")) == {"schedule"}
    for name in ("sampler", "schedule", "diffusion", "noise", "step_table", "unet", "ops", "engine", "graphs"):
        for path in [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else (PACKAGE / name).glob("*.py"):
            assert not modules_of_ours(imports(path)) & {"cli", "training", "checkpoints", "images"}, path
    assert not [p for p in PACKAGE.rglob("*.py") if {n.split(".")[0] for n in imports(p)} & {"tests", "benchmarks"}]


def test_kernels_is_a_link_and_no_package_of_its_own():
    link = PACKAGE / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    assert not (KERNELS / "__init__.py").exists()
    if (ROOT / ".git").exists():
        entry = subprocess.run(
            ["git", "ls-files", "-s", "ddpm_fast/kernels"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert entry.startswith("120000 ")  # a link, in git too


def test_no_top_level_package_but_ours_is_installed():
    """An installed ``kernels`` would shadow the Hugging Face package of that name."""
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert all(name.split(".")[0] == "ddpm_fast" for name in packages)
    below = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("*.py")}
    assert below | {"ddpm_fast.kernels"} == set(packages)  # and none is forgotten


def build(folder: Path) -> Path:
    """setuptools' own build into a folder: what a wheel would hold. Needs no network."""
    pytest.importorskip("setuptools")
    code = "from setuptools import setup; setup()"
    words = ["build", "--build-base", str(folder / "base"), "--build-lib", str(folder / "lib")]
    egg = ["egg_info", "--egg-base", str(folder)]
    done = subprocess.run([sys.executable, "-c", code, "-q", *egg, *words], cwd=ROOT, capture_output=True, text=True)
    if "setuptools" in done.stderr and done.returncode:
        pytest.skip("this setuptools cannot read the project: " + done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def run_python(code: str, path: Path, folder: Path) -> str:
    """Standard output of a fresh interpreter that finds packages in ``path`` first."""
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_installed_holds_the_kernels_and_no_kernels_package(tmp_path: Path):
    (tmp_path / "built").mkdir()
    lib = build(tmp_path / "built")
    assert [p.name for p in lib.iterdir()] == ["ddpm_fast"]
    assert {p.name for p in (lib / "ddpm_fast" / "kernels").glob("*.py")} == {p.name for p in KERNELS.glob("*.py")}
    assert (lib / "ddpm_fast" / "py.typed").exists()
    assets = {p.relative_to(PACKAGE) for p in (PACKAGE / "assets").rglob("*") if p.is_file()}
    assert assets <= {p.relative_to(lib / "ddpm_fast") for p in lib.rglob("*")}
    code = """
import ddpm_fast.kernels.reference as r
from importlib.util import find_spec
spec = find_spec("kernels")
print(r.__file__)
print(spec and (spec.origin or list(spec.submodule_search_locations)))
"""
    ours, top_level = run_python(code, lib, tmp_path).splitlines()
    assert ours.startswith(str(lib))
    assert str(lib) not in top_level and str(KERNELS) not in top_level


def test_importing_and_sampling_need_neither_triton_nor_diffusers(tmp_path: Path):
    """With triton blocked, as on macOS and Windows; and neither is imported where it is installed."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
BLOCKED = {"triton", "diffusers"}
sys.meta_path.insert(0, Block())
import ddpm_fast as df
import ddpm_fast.cli.commands, ddpm_fast.training, ddpm_fast.inspection, ddpm_fast.images
model = df.UNet(df.UNetConfig(sample_size=8, block_out_channels=(4, 8), down_block_types=("DownBlock2D",) * 2,
    up_block_types=("UpBlock2D",) * 2, norm_num_groups=2, attention_head_dim=4))
x = df.Sampler(model, df.Schedule(num_train_timesteps=5)).sample(2)
assert x.isfinite().all()
df.save("saved", model, df.Schedule())
df.load("saved")
try:
    ddpm_fast.ops.triton()
except RuntimeError as error:
    print(str(error).replace(chr(10), " "))
"""
    message = run_python(code, ROOT, tmp_path)
    assert "triton" in message.lower() and len(message) < 300
    code = """
import sys, torch
before = {"triton", "diffusers"} & set(sys.modules)  # torch may import triton by itself
from ddpm_fast import *  # each name is imported when it is asked for
import ddpm_fast.cli.commands
print({"triton", "diffusers"} & set(sys.modules) == before)
"""
    assert run_python(code, ROOT, tmp_path) == "True"


def test_no_file_is_longer_than_its_readers_patience():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in sources()}
    assert {name: n for name, n in lengths.items() if n > LIMIT} == {}


def test_constraints_are_within_the_project_s_ranges():
    packaging = pytest.importorskip("packaging.requirements")
    pins = dict(
        line.partition(";")[0].split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert {"torch", "triton"} <= set(pins)
    extras = PROJECT["project"]["optional-dependencies"].values()
    requirements = [
        packaging.Requirement(r) for r in [*PROJECT["project"]["dependencies"], *(r for rs in extras for r in rs)]
    ]
    ranges = {re.sub("[-_.]+", "-", r.name).lower(): r.specifier for r in requirements}
    for name, version in pins.items():
        assert name in ranges, f"{name} is pinned but not required"
        assert version in ranges[name], f"{name}=={version} is outside {ranges[name]}"
    assert "3.10" in PROJECT["project"]["requires-python"]


def test_the_public_names():
    import ddpm_fast as df

    promised = {"load", "save", "UNet", "UNetConfig", "Schedule", "Sampler", "training_loss", "to_uint8", "__version__"}
    assert promised <= set(df.__all__) and all(hasattr(df, name) for name in df.__all__)
    assert PROJECT["project"]["scripts"] == {"ddpm-fast": "ddpm_fast.cli:main"}


def test_the_numeric_tests_run_by_avx2_too():
    """Each beginning of a name in the list is that of a file, and CI and `make avx2` run them so."""
    import conftest

    names = [p.name for p in (ROOT / "tests").glob("test_*.py")]
    assert [start for start in conftest.NUMERIC if not any(name.startswith(start) for name in names)] == []
    once_more = "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2"
    for file in (".ci/run", "Makefile"):
        lines = (ROOT / file).read_text().splitlines()
        assert [line for line in lines if once_more in line and line.endswith("-m pytest -m numeric")], file
