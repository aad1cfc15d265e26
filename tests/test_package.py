"""Tests of the package as a whole: its dependencies, its wheel, and the rules that no linter checks."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHARED_FOLDERS = ("bench", "kernels", "train")
SHIPPED = "0123456789abcdef.json"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked() -> list[Path]:
    """Return the files that git tracks or would add, without symlinks and deleted files."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    return [path for path in (ROOT / name for name in listed if name) if path.is_file() and not path.is_symlink()]


def test_library_needs_only_torch_and_einops() -> None:
    """Without any other package, numpy included, a model can be created, run and trained."""
    run(
        sys.executable,
        "-W",
        "ignore:Failed to initialize NumPy",
        "-c",
        """
import sys

for name in ("PIL", "accelerate", "matplotlib", "numpy", "nvidia.dali", "rich", "safetensors", "scipy", "skimage",
             "sklearn", "tensorboard", "triton"):
    sys.modules[name] = None  # to import it raises ModuleNotFoundError

import sdnet, sdnet.kernels, torch
model = sdnet.create_model("sdnet18", num_classes=3, stem="cifar", image_size=16)
sdnet.attach(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
model(torch.randn(2, 3, 16, 16)).sum().backward()
optimizer.step()
""",
    )


def test_import_takes_less_than_a_third_of_a_second() -> None:
    """`import sdnet` adds less than 0.3 s of processor time to `import torch`, in the quickest of three processes."""
    program = "import time, torch; start = time.process_time(); import sdnet; print(time.process_time() - start)"
    assert min(float(run(sys.executable, "-c", program)) for _ in range(3)) < 0.3


LEVELS = {"kernels": 0, "sdnet": 1, "train": 2, "bench": 3}
"""A folder imports from its own level and from the levels below."""


def sdnet_imports(path: Path) -> Iterator[str]:
    """Yield the folders of the package that a file imports from, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "sdnet" else [node.module]
            )
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            modules = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        for parts in (str(module).split(".") for module in modules):
            if parts[0] == "sdnet":
                yield parts[1] if len(parts) > 1 and parts[1] in LEVELS else "sdnet"


@pytest.mark.parametrize("folder", LEVELS)
def test_imports_point_downwards(folder: str) -> None:
    upwards = []
    for path in sorted((ROOT / folder).glob("**/*.py")):
        if path.name == "__main__.py":  # a program, which nothing imports
            continue
        if folder == "sdnet" and path.relative_to(ROOT).parts[1] in SHARED_FOLDERS:
            continue
        upwards += [
            f"{path.relative_to(ROOT)} imports {other}"
            for other in sdnet_imports(path)
            if LEVELS[other] > LEVELS[folder]
        ]
    assert upwards == []


def test_an_import_of_a_higher_folder_is_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import torch\nfrom sdnet.kernels import csc_encode\n"
        "def late() -> None:\n    from sdnet import train\n    import sdnet.layers\n"
        "    import_module('sdnet.bench.ledger')\n"
    )
    assert set(sdnet_imports(file)) == {"kernels", "train", "bench", "sdnet"}


@pytest.mark.parametrize("name", SHARED_FOLDERS)
def test_folder_is_committed_as_symlink(name: str) -> None:
    assert (ROOT / "sdnet" / name).readlink() == Path("..") / name
    tracked()
    assert run("git", "ls-files", "--stage", f"sdnet/{name}").startswith("120000 ")


def test_no_file_in_train_shadows_a_standard_module() -> None:
    """`accelerate launch train/imagenet.py` puts train/ first on sys.path."""
    assert not {path.stem for path in (ROOT / "train").iterdir()} & sys.stdlib_module_names


def test_no_python_file_is_longer_than_400_lines() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in tracked() if path.suffix == ".py"}
    assert not {str(path): n for path, n in lengths.items() if n > 400}


def test_no_file_names_a_place_on_someones_machine() -> None:
    place = re.compile(r"(?<![\w.:/~-])/(?:home|root|work|opt|mnt|Users)/\w+")
    found = []
    for path in tracked():
        if path.suffix not in {".png", ".jpg", ".jpeg", ".pt", ".safetensors"}:
            found += [f"{path.relative_to(ROOT)}: {match}" for match in place.findall(path.read_text())]
    assert not found


def test_version_is_the_same_everywhere() -> None:
    import sdnet

    assert sdnet.__version__ == metadata.version("sdnet")
    assert f"\nversion: {sdnet.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_tested_set_satisfies_every_floor() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (Requirement(line) for group in groups for line in group):
        if requirement.name != PROJECT["name"]:
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} against {version}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist of a copy of the checkout and a table of verdicts, without network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    table = source / "kernels" / "qualify" / "tables" / SHIPPED
    table.parent.mkdir(exist_ok=True)
    table.write_text("{}")
    for name in SHARED_FOLDERS:
        (source / "sdnet" / name).symlink_to(Path("..") / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return next(out.glob("*.whl"))


def test_wheel_ships_every_module_but_the_benchmarks(wheel: Path) -> None:
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT) for path in tracked() if path.suffix == ".py"}
    expected = {str(path) for path in modules if path.parts[0] == "sdnet"}
    expected |= {
        str("sdnet" / path) for path in modules if path.parts[0] in SHARED_FOLDERS and path.parts[0] != "bench"
    }
    tables = {path.name for path in tracked() if path.parent.name == "tables"} | {SHIPPED}
    expected |= {f"sdnet/kernels/qualify/tables/{name}" for name in tables}
    assert shipped == expected | {"sdnet/py.typed"}


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    where = run(
        sys.executable, "-c", "import sdnet.kernels as k; print(k.__file__)", cwd=Path("/"), PYTHONPATH=str(tmp_path)
    )
    assert Path(where.strip()).is_relative_to(tmp_path)
    usage = run(sys.executable, "-m", "sdnet.train.imagenet", "--help", cwd=Path("/"), PYTHONPATH=str(tmp_path))
    assert "--recipe" in usage
