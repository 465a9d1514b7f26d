"""The order of the rooms, read from every import of the package: also those inside functions and for types."""

import ast
from pathlib import Path

import sbv2_jax

ROOT = Path(sbv2_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
}  # fmt: skip
# Each may import those before it. The ground is the modules at the root.
GROUND = ("errors", "tree", "fields", "cli")
ORDER = (
    "diffusion", "models", "devices", "distill", "checkpoint", "convert", "data", "generate", "evaluate", "run", "demo",
    "plan", "openmoji",
)  # fmt: skip
FORBIDDEN = ("torch", "tensorflow")


def room_of(module: str) -> str:
    """The name of a module's room; that of a module at the root is its own."""
    return (module.split(".") + [""])[1]


def height(room: str) -> int:
    return -1 if room in GROUND else ORDER.index(room)


def imports(path: Path) -> list[tuple[int, str]]:
    """Every module that a file imports, with the line; `from package import module` is that module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole == "sbv2_jax.__version__":  # a word, not what the public names lead to
                    continue
                found.append((node.lineno, whole if whole in MODULES else node.module))
    return found


IMPORTS = {module: imports(path) for module, path in MODULES.items()}
OURS = {
    module: [(line, name) for line, name in found if name in MODULES] for module, found in IMPORTS.items()
}


def test_every_folder_is_a_room_of_the_order():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ORDER)
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", *GROUND}


def test_no_room_imports_one_above_it():
    wrong = [
        f"{module}:{line} imports {name}"
        for module, found in OURS.items()
        if module != "sbv2_jax"  # the public names, which are imported when they are asked for
        for line, name in found
        if name == "sbv2_jax" or height(room_of(name)) > height(room_of(module))
    ]
    assert wrong == []


def test_the_modules_of_the_package_have_no_circle():
    done: dict[str, bool] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a circle: " + " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for _, name in OURS[module]:
                if name != module:
                    visit(name, (*path, module))
            done[module] = True

    for module in MODULES:
        if module != "sbv2_jax":
            visit(module, ())


def test_neither_torch_nor_tensorflow_is_imported():
    wrong = [
        f"{module}:{line} imports {name}"
        for module, found in IMPORTS.items()
        for line, name in found
        if name.split(".")[0] in FORBIDDEN
    ]
    assert wrong == []


def test_no_file_is_longer_than_400_lines():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > 400} == {}


def test_tests_import_nothing_from_one_another():
    wrong = [
        f"{path.name}:{line} imports {name}"
        for path in sorted(Path(__file__).parent.rglob("*.py"))
        for line, name in imports(path)
        if name.split(".")[0].startswith("test_")
    ]
    assert wrong == []
