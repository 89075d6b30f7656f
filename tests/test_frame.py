"""The house itself: sizes, what is in it, what importing it costs, and that its papers agree."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pydantic
import pytest
import yaml

import rlfseg
from rlfseg import config, errors

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(p for package in ("rlfseg", "jobs", "serve") for p in (ROOT / package).rglob("*.py"))
EVERYTHING = [*SOURCES, *sorted(p for folder in ("tests", "scripts") for p in (ROOT / folder).rglob("*.py"))]
MOST_LINES, MOST_LINES_A_FUNCTION = 400, 60

# Written so that neither pattern finds itself.
MACHINE_PATH = re.compile(r"(?<![\w.\-~])/(work|root)/[\w.]")
REGISTRY_HOST = re.compile(
    r"\b((pypi|pythonhosted|test\.pypi)\.org|files\.pythonhosted\.org|(registry\.npmjs|npmjs)\.(org|com)"
    r"|(deb|security)\.debian\.org|download\.pytorch\.org|proxy\.golang\.org|crates\.io)\b"
)


@cache
def tracked() -> dict[str, str]:
    """Text of every file that git has or would add, by its path; binary files and deleted ones are left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: no list of tracked files")
    raw = {name: (ROOT / name).read_bytes() for name in filter(None, listed.stdout.split("\0")) if _is_file(name)}
    return {name: data.decode(errors="replace") for name, data in raw.items() if b"\0" not in data[:8192]}


def _is_file(name: str) -> bool:
    return (ROOT / name).is_file() and not (ROOT / name).is_symlink()


def found(pattern: re.Pattern[str]) -> list[str]:
    """`file:line: text` of each line of a tracked file in which the pattern occurs."""
    lines = ((name, n, line) for name, text in tracked().items() for n, line in enumerate(text.splitlines(), 1))
    return [f"{name}:{n}: {line.strip()[:100]}" for name, n, line in lines if pattern.search(line)]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, methods and inner ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


# --- sizes and contents -------------------------------------------------------------------------------------------


def test_files_are_short():
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in EVERYTHING}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_functions_are_short():
    long = [
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}: {length} lines"
        for path in EVERYTHING
        for f in functions(path)
        if (length := (f.end_lineno or f.lineno) - f.lineno + 1) > MOST_LINES_A_FUNCTION
    ]
    assert long == []


def test_no_machine_path_is_tracked():
    assert found(MACHINE_PATH) == []


def test_no_registry_host_is_tracked():
    assert found(REGISTRY_HOST) == []


def test_constraints_are_exact_versions():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.\-]+==[\w.\-+!]+", line)] == []


def test_constraints_lie_within_the_ranges_and_name_every_dependency():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    project = PYPROJECT["project"]
    wanted = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    outside = [str(r) for r in wanted if not r.specifier.contains(exact.get(canonicalize_name(r.name), "0"))]
    assert outside == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST])
def test_the_search_finds_what_it_looks_for(pattern: re.Pattern[str]):
    path, host = "see /" + "work/x and /" + "root/.ssh", "https://" + "pypi" + ".org/simple"
    assert bool(pattern.search(path)) == (pattern is MACHINE_PATH)
    assert bool(pattern.search(host)) == (pattern is REGISTRY_HOST)
    assert not pattern.search("~/work/x, ../root/y, $HOME/work/z, pypi, Debian")


# --- what it says about itself ------------------------------------------------------------------------------------


def test_version_is_one():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest, "CHANGELOG.md: no heading such as '## 0.1.0'"
    assert {newest[1], PYPROJECT["project"]["version"], rlfseg.__version__} == {rlfseg.__version__}


def links() -> Iterator[tuple[str, str]]:
    """Each link of a tracked Markdown page that points to a file: (page, target)."""
    pages = {name: text for name, text in tracked().items() if name.endswith(".md")}
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target and not target.startswith("mailto:"):
                yield page, target


def test_links_between_pages_lead_somewhere():
    assert [(page, target) for page, target in links() if not (ROOT / page).parent.joinpath(target).exists()] == []


def test_index_of_docs_names_every_page():
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - {target for page, target in links() if page == "docs/README.md"} == set()


def test_readme_s_tree_names_every_file():
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    named = set(re.findall(r"\w+\.py", tree))
    sources = [p for p in SOURCES if p.name != "__init__.py" and p.parent.name != "jobs"]  # jobs: one a command
    assert [p.relative_to(ROOT).as_posix() for p in sources if p.name not in named] == []
    assert named - {p.name for p in (*SOURCES, *(ROOT / "scripts").glob("*.py"))} == {"NAME.py"}


def test_shipped_packages():
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["rlfseg", "jobs", "serve"]


# --- errors, settings, imports ------------------------------------------------------------------------------------


def test_errors_form_one_tree():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert all(issubclass(c, errors.RlfsegError) for c in classes)
    assert {c.__name__ for c in classes} >= {"ConfigError", "DataError", "BadSample", "ModelError", "ResourceError"}
    assert issubclass(errors.BadSample, errors.DataError)


def test_bad_sample_names_file_and_sample():
    assert str(errors.BadSample("no mask", file="a.h5", sample="7")) == "a.h5 [7]: no mask"


@pytest.mark.parametrize("module", ["rlfseg", "rlfseg.errors", "rlfseg.config"])
def test_import_is_light(module: str):
    heavy = {"torch", "ray", "mlflow", "diffusers", "transformers", "numpy", "pandas", "h5py"}
    loaded = run_python(f"import sys, {module}; print(*sys.modules)")
    assert heavy & set(loaded.split()) == set()


def shipped_settings() -> list[Path]:
    """Every YAML under jobs/configs. `train.yaml` and `train-pixel.yaml` are both for the command `train`."""
    return sorted((ROOT / "jobs" / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", shipped_settings(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_shipped_settings_parse(path: Path):
    command = path.stem.split("-")[0]
    wanted = getattr(config, f"{command.title().replace('_', '')}Config", None)
    assert wanted, f"no {command.title()}Config for {path.name}: is it named after its command?"
    # Where data lies and goes is given on the line, not in a shipped file.
    on_the_line = {
        f.name: "a path" for f in dataclasses.fields(wanted) if f.type in ("str", "OutFolder") and _required(f)
    }
    pydantic.TypeAdapter(wanted).validate_python(on_the_line | (yaml.safe_load(path.read_text()) or {}))


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
