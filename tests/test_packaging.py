"""The distribution: every sub-package is in the wheel, imports point one way, no path of a machine is in the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
# The design's table: what each folder may import of ours, besides itself.
MAY_IMPORT = {
    "kernels": set(),
    "heads": {"kernels"},
    "engine": {"heads", "kernels"},
    "train": {"engine", "heads", "kernels"},
    "bench": {"engine", "train", "heads", "kernels"},
    "src/skipstone": {"engine", "train", "heads", "kernels", "bench"},
}


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def tracked_files() -> list[Path]:
    """What a clone holds; without git (an unpacked sdist) everything but hidden and built folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    skipped = {"build", "dist", "__pycache__"}
    files = (p for p in ROOT.rglob("*") if p.is_file())
    return [p for p in files if not any(s.startswith(".") or s in skipped for s in p.relative_to(ROOT).parts)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files, so that no build folder is left in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in tracked_files():
        relative = file.relative_to(ROOT)
        if relative.parts[0] in {"tests", "docs", "examples"}:
            continue
        target = source / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_every_folder_with_code_is_a_listed_package() -> None:
    """Planted bug: a new sub-folder such as engine/sparsity that pyproject.toml does not list is not shipped."""
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(PACKAGES)
    folders = {p.parent.relative_to(ROOT).as_posix() for p in python_files(*MAY_IMPORT)}
    assert folders == set(PACKAGES.values())
    for name, folder in PACKAGES.items():
        assert (ROOT / folder / "__init__.py").is_file(), f"{name}: {folder} has no __init__.py"


def test_wheel_holds_all_modules_and_heads_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = {p.relative_to(ROOT).as_posix() for p in tracked_files()}
    for package, folder in PACKAGES.items():
        for file in (ROOT / folder).glob("*.py"):
            if file.relative_to(ROOT).as_posix() in tracked:
                assert f"{package.replace('.', '/')}/{file.name}" in names
    for name in sorted(tracked):
        if name.startswith(("heads/pretrained/", "engine/sparsity/pretrained/")):
            assert f"skipstone/{name}" in names
    outside = {n for n in names if not n.startswith(("skipstone/", f"skipstone-{PROJECT['project']['version']}"))}
    assert not outside and not [n for n in names if n.split("/")[-1].startswith("test_")]


def test_every_package_imports_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """In a process of its own that sees the wheel first and neither the tree nor its editable install."""
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import importlib, sys\n"
        "target = sys.argv[1]\n"
        "sys.path.insert(0, target)\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '').lower()\n"
        "                    and 'editable' not in getattr(f, '__name__', '').lower()]\n"
        "for name in sys.argv[2:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(target), (name, module.__file__)\n"
        "print('imported', len(sys.argv) - 2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target), *PACKAGES], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["imported", str(len(PACKAGES))]


def imported_folders(file: Path) -> set[str]:
    """Top folders of ours that a module imports, through relative or absolute names, inside functions too."""
    folder = file.parent.relative_to(ROOT).as_posix()
    package = next(name for name, place in PACKAGES.items() if place == folder)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "skipstone":
                inside = len(parts) > 1 and f"skipstone.{parts[1]}" in PACKAGES
                found.add(parts[1] if inside else "src/skipstone")
    return found


@pytest.mark.parametrize("top", MAY_IMPORT)
def test_imports_point_one_way(top: str) -> None:
    """Planted bug: `from ..engine import x` in kernels/ or heads/, also hidden in a function."""
    for file in python_files(top):
        allowed = MAY_IMPORT[top] | {top}
        wrong = imported_folders(file) - allowed
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}; {top}/ may import {sorted(allowed)}"


def test_the_import_reader_sees_every_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check above is only as good as this reader."""
    forms = {
        "from ..engine import model": {"engine"},
        "from ..engine.model import Decoder": {"engine"},
        "from .. import engine": {"engine"},
        "import skipstone.train.trainer as t": {"train"},
        "def f():\n    from skipstone.bench import table": {"bench"},
        "from skipstone import load": {"src/skipstone"},
        "from . import adapter": {"heads"},
        "from .adapter import Adapter": {"heads"},
        "import torch, kernels": set(),
    }
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "heads").mkdir()
    for code, expected in forms.items():
        file = tmp_path / "heads" / "x.py"
        file.write_text(code)
        assert imported_folders(file) == expected, code


def test_no_module_is_called_utils_or_common() -> None:
    assert not [p for p in python_files(*MAY_IMPORT, "tests") if p.stem in {"utils", "common", "helpers", "misc"}]


def test_public_package_holds_init_and_cli_only() -> None:
    assert {p.name for p in python_files("src/skipstone")} <= {"__init__.py", "cli.py"}


def test_every_public_name_exists() -> None:
    import skipstone

    names = getattr(skipstone, "__all__", [])
    assert len(names) == len(set(names))
    assert not [name for name in names if not hasattr(skipstone, name)]


def test_no_path_of_a_machine_is_in_the_tree() -> None:
    """Home folders, this clone's own place, and editor backups; in text files of any kind."""
    home = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt|opt)/\w|[A-Z]:\\\\?Users\\")
    wrong = []
    for file in tracked_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if file == Path(__file__).resolve():
            continue
        hits = [m[0] for m in home.finditer(text)]
        if hits or (len(ROOT.parts) > 2 and str(ROOT) + "/" in text):
            wrong.append(f"{file.relative_to(ROOT)}: {hits[:3]}")
    assert not wrong


def test_constraints_pin_exact_versions_and_no_addresses() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
            assert match, f"constraints.txt: {line!r} is not name==version (no URL, no local label such as +cpu)"
            pins[match[1].lower().replace("_", "-")] = match[2]
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["plot"], *extras["train"]]
    unpinned = {re.split(r"[^A-Za-z0-9._-]", w)[0].lower() for w in wanted} - pins.keys()
    assert not unpinned


def test_every_hash_of_the_demo_weights_is_pinned() -> None:
    from skipstone.engine.pretrained import PACKAGED

    text = (ROOT / "requirements-demo.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert {line.split()[0] for line in lines} == {f"{m.distribution}=={m.version}" for m in PACKAGED.values()}
