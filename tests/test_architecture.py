"""The rules of the house: rooms that fit, arrows that point one way, nothing heavy before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import distmerge
from distmerge.config.train import TrainConfig

PACKAGE = Path(distmerge.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {
    "distmerge." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES
}
"""Every module's file, by its dotted name; a package is its ``__init__``."""

FLOORS: dict[str, int] = {
    "__init__": 9, "__main__": 9,
    "cli": 8, "api": 8,
    "studies": 7,
    "trainer": 6,
    "experts": 5, "recovery": 5,
    "windows": 4, "merging": 4,
    "checkpoints": 4, "integrations": 4,
    "workers": 3, "engine": 3, "evaluate": 3, "judge": 3, "rundir": 3,
    "mesh": 2, "launch": 2, "model": 2, "data": 2, "files": 2,
    "theta": 1, "rules": 1, "config": 1, "schedule": 1,
    "finite": 0, "errors": 0, "quiet": 0, "plotting": 0, "version": 0,
}  # fmt: skip
"""A room may import rooms of its own floor and of those below."""


def room_of(module: str) -> str:
    """``distmerge.workers.diloco`` is of ``workers``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path) -> Iterator[str]:
    """Our own modules that a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "distmerge")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distmerge":
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            # ``from package import module`` imports the module, whatever the package's own file holds.
            yield from (module if module in NAMES else str(node.module) for module in inside)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = room_of("distmerge." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    assert own in FLOORS, f"{own} has no floor: give it one in tests/test_architecture.py"
    for imported in imports_of(path):
        other = room_of(imported)
        assert FLOORS[other] <= FLOORS[own], f"{own} (floor {FLOORS[own]}) imports {imported} (floor {FLOORS[other]})"


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, the first one named again at its end; [] where there is none."""
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next((circle for other in sorted(graph[name]) if (circle := visit(other, (*way, name)))), [])
        done.add(name)
        return found

    return next((circle for name in graph if (circle := visit(name, ()))), [])


def graph_of(names: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports of these modules."""
    return {name: {module for module in imports_of(path) if module in names} for name, path in names.items()}


def test_there_are_no_circles() -> None:
    assert circle_in(graph_of({name: path for name, path in NAMES.items() if name != "distmerge.__init__"})) == []


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    """``from package import module`` hid one: it was read as an import of the package."""
    verbs, sweep = "distmerge.cli.merging", "distmerge.merging.sweep"
    (tmp_path / "sweep.py").write_text("def go():\n    from distmerge.cli import merging\n")
    (tmp_path / "verbs.py").write_text("from distmerge.merging import sweep\n")
    planted = {verbs: tmp_path / "verbs.py", sweep: tmp_path / "sweep.py"}
    assert set(circle_in(graph_of(planted))) == {verbs, sweep}


def test_rules_are_pure() -> None:
    for path in sorted((PACKAGE / "rules").glob("*.py")):
        assert all(room_of(module) in ("rules", "errors") for module in imports_of(path)), path
        assert "distributed" not in path.read_text(), path


def test_process_groups_are_made_in_one_place() -> None:
    makers = ("new_group", "new_subgroups", "init_device_mesh", "init_process_group(")
    for path in MODULES:
        code = "\n".join(ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if path.name != "mesh.py":
            assert not [maker for maker in makers if maker in code and f"'{maker}" not in code and "call torch" not in code], (
                path
            )


def test_the_group_of_the_commits_is_the_stores_alone() -> None:
    """Its collectives are a thread's: one of the training on the same group would take the other's messages, and hang."""
    users = {path.name for path in MODULES if re.search(r"mesh\.files\b", path.read_text())}
    assert users == {"store.py"}


@pytest.mark.parametrize("folder", ["distmerge", "benchmarks", "tests"])
def test_rooms_fit(folder: str) -> None:
    lines = {str(path): path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > 300} == {}


def test_no_room_is_called_after_nothing() -> None:
    for path in PACKAGE.rglob("*"):
        assert not re.search(r"(^|_)(utils?|common|managers?|handlers?|registry|helpers?|misc)$", path.stem), path


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


# ---- what is imported when


def loaded_by(statement: str, *modules: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {modules!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[-1].split()


HEAVY = ("torch", "transformers", "datasets", "numpy", "tensorboard", "rich")


@pytest.mark.parametrize(
    "statement",
    [
        "import distmerge",
        "import distmerge.cli.main",
        "from distmerge.config import toml; toml.read('configs/quickstart.toml', ['--steps', '700'])",
        "import distmerge.rundir.layout",
    ],
)
def test_nothing_heavy_before_it_is_needed(statement: str) -> None:
    assert loaded_by(statement, *HEAVY) == []


def test_help_loads_nothing_heavy() -> None:
    helped = "from distmerge.cli import main as cli\ntry:\n    cli.run(['--help'])\nexcept SystemExit: pass"
    assert loaded_by(helped, *HEAVY, "pydantic", "tyro") == []
    assert loaded_by(helped.replace("'--help'", "'train', '--help'"), "torch", "transformers", "datasets") == []


def test_the_library_loads_no_trainer() -> None:
    assert loaded_by("import distmerge as dm; dm.DiLoCo", "transformers", "datasets", "tensorboard") == []


# ---- the configuration


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """(dotted key, section, field) of every field there is."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", model, name
        for inner in models_in(field.annotation):
            yield from sections(inner, f"{prefix}{name}.")


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from models_in(argument)


def test_every_key_is_described() -> None:
    missing = [
        key
        for key, section, name in sections(TrainConfig)
        if not section.model_fields[name].description
        and not list(models_in(section.model_fields[name].annotation))
        and name != "kind"
    ]
    assert missing == []
    assert len(list(sections(TrainConfig))) > 40


# ---- the README


def readme() -> str:
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("there is no README yet")
    return path.read_text()


def test_the_readme_names_only_what_exists() -> None:
    text = readme()
    keys = {key for key, _, _ in sections(TrainConfig)}
    for verb in re.findall(
        r"\bdistmerge ([a-z][a-z-]*)\b(?=[ \n`])", "\n".join(re.findall(r"```.*?```|`[^`]+`|^    .*$", text, re.S | re.M))
    ):
        assert verb in (
            "train",
            "eval",
            "merge",
            "diagnose",
            "sweep",
            "experts",
            "examples",
            "ptm",
            "window",
            "anneal",
            "recover",
            "verify",
            "import",
            "build-ops",
            "as",
        ), f"distmerge {verb}"
    for option in re.findall(r"--([a-z_-]+(?:\.[0-9a-z_-]+)+)", text):
        key = re.sub(r"\.\d+", "", option.replace("-", "_"))
        assert key in keys or key.startswith("model.config.") or key == "section.key", f"--{option}"
    for script in re.findall(r"\b((?:benchmarks|configs|launch)/[\w./-]+\.(?:py|toml|sh|md))", text):
        assert (ROOT / script).exists(), script


def test_the_readme_shows_the_two_commands_first() -> None:
    text = readme()
    assert 0 < text.index("make train") < text.index("make test") < text.index("```mermaid") if "mermaid" in text else True
