"""The house rules a machine can check: who imports whom, who may write to a model, what a method must say, what a wheel
holds."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vtoken
from vtoken import kernels, registry

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vtoken"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TRAINING = sorted((ROOT / "reference_models").glob("*.py"))
METHODS = [f for folder in registry.FOLDERS.values() for f in sorted((PACKAGE / folder).rglob("*.py"))]

# Layer -> the layers of vtoken it may import. Nothing points upwards.
LOWER = {"stages", "kernels", "hooks", "adapters", "config", "errors", "registry"}
MAY_IMPORT = {
    "__init__": {"drafts", "registry", "relevance", "saved", "session"},
    "errors": set(),
    "kernels": {"kernels"},
    "stages": {"stages", "kernels"},
    "pruners": {"stages", "kernels", "pruners"},
    "compressors": {"stages", "kernels", "compressors"},
    "hooks": {"stages", "kernels", "hooks", "errors"},
    "adapters": {"stages", "kernels", "hooks", "adapters", "errors"},
    "registry": {"errors", "stages", "adapters"},
    "config": {"stages", "config", "errors", "registry"},
    "compatibility": LOWER,
    "session": LOWER | {"compatibility"},
    "relevance": LOWER | {"session"},
    "drafters": LOWER | {"drafters", "compressors"},
    "drafts": LOWER | {"compatibility", "session", "drafters"},
    "saved": LOWER | {"session"},
    "evals": LOWER | {"session", "drafts", "evals", "compressors", "__init__"},
    "commands": LOWER | {"session", "evals", "compressors", "commands", "serving", "__init__"},
    "serving": LOWER | {"session", "serving", "__init__"},
    "cli": LOWER | {"session", "commands", "evals", "__init__"},
    "__main__": {"cli"},
}
# The same among the rooms of hooks.
STATE = {"state"}
ROOMS = {
    "state": STATE,
    "call": STATE | {"call"},
    "vision": STATE | {"call", "vision"},
    "decoder": STATE | {"decoder"},
    "attention": STATE | {"decoder", "attention"},
    "cache": STATE | {"decoder", "cache"},
    "decode": STATE | {"decoder", "attention", "decode"},
    "boundary": STATE | {"decoder", "attention", "cache", "decode", "boundary"},
}
# What a file imports from above, inside the function that needs it, and why.
UPWARDS = {
    ("hooks/state/trace.py", "vtoken.evals.pictures.traced"): "a notebook shows a trace with its pictures",
}
MAY_IMPORT_FROM_OTHERS = {
    "__init__": set(),
    "cli": set(),
    "errors": set(),
    "registry": set(),
    "kernels": {"torch", "triton", "numpy"},
    "stages": {"torch", "numpy", "pydantic", "pydantic_core"},
    "pruners": {"torch", "pydantic"},
    "compressors": {"torch", "pydantic", "safetensors"},
    "config": {"huggingface_hub", "pydantic", "yaml"},
}


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in the file, relative ones made absolute."""
    package = list(file.relative_to(ROOT).parts[:-1])
    tree = ast.parse(file.read_text(encoding="utf-8"))
    # What is imported for a type checker alone ties nothing together.
    checked = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    unseen = {id(each) for node in checked for each in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            yield from (f"{module}.{alias.name}" if module == "vtoken" else module for alias in node.names)


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_imports_go_down(file: Path) -> None:
    layer = layer_of(file)
    for name in imports(file):
        if (str(file.relative_to(PACKAGE)), name) in UPWARDS:
            assert f"\n        from {name}" in file.read_text(encoding="utf-8")
            continue
        top, _, rest = name.partition(".")
        assert top != "reference_models", "the package does not need the repository"
        if top == "vtoken":
            target = rest.partition(".")[0]
            target = target if target in MAY_IMPORT else "__init__"
            assert target in MAY_IMPORT[layer], f"{layer} must not import {name}"
        elif top not in sys.stdlib_module_names and layer in MAY_IMPORT_FROM_OTHERS:
            assert top in MAY_IMPORT_FROM_OTHERS[layer], f"{layer} must not import {name}"


@pytest.mark.parametrize("file", TRAINING, ids=relative)
def test_the_reference_models_use_evals_and_stages_alone(file: Path) -> None:
    found = [name for name in imports(file) if name.partition(".")[0] == "vtoken"]
    assert all(name.startswith(("vtoken.evals.", "vtoken.stages")) for name in found)


@pytest.mark.parametrize("file", [*SOURCES, *TRAINING, *sorted((ROOT / "benchmarks").glob("*.py"))], ids=relative)
def test_one_place_reads_yaml(file: Path) -> None:
    names = {name.partition(".")[0] for name in imports(file)}
    assert "yaml" not in names or file == PACKAGE / "config" / "yaml_source.py"


@pytest.mark.parametrize("file", [*SOURCES, *TRAINING, *sorted((ROOT / "benchmarks").glob("*.py"))], ids=relative)
def test_one_place_opens_pictures(file: Path) -> None:
    assert ("Image.open(" in file.read_text(encoding="utf-8")) == (file == PACKAGE / "evals" / "shared" / "media.py")


@pytest.mark.parametrize("file", sorted((PACKAGE / "hooks").glob("*/*.py")), ids=relative)
def test_rooms_of_the_hooks_go_down(file: Path) -> None:
    room = file.parent.name
    for name in imports(file):
        if name.startswith("vtoken.hooks."):
            assert name.split(".")[2] in ROOMS[room], f"{room} must not import {name}"


MODULES = re.compile(r"(model|module|layers?|block|lm|attn|attention|config|encoder|decoder|projector|outer|adapter)$")


def writes(file: Path) -> Iterator[tuple[int, str]]:
    """Hook registrations, setattr calls, and assignments to attributes of what is called like a part of a model."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if re.search(r"(^|\.)register_\w*hook\w*$", called) or called in (
                "setattr",
                "delattr",
                "object.__setattr__",
            ):
                yield node.lineno, called
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
        targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else targets
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, (ast.Store, ast.Del)):
                    if MODULES.search(ast.unparse(part.value)):
                        yield node.lineno, ast.unparse(part)


@pytest.mark.parametrize("file", [*SOURCES, *TRAINING], ids=relative)
def test_only_the_handle_writes_to_a_model(file: Path) -> None:
    found = list(writes(file))
    if file == PACKAGE / "hooks" / "state" / "handle.py":
        assert {what for _, what in found} >= {"setattr", "module.register_forward_hook"}
    else:
        assert not found


@pytest.mark.parametrize(
    "line", ["m.layer.x = 1", "a, model.y = 2, 3", "del lm.z", "setattr(a, 'b', 1)", "config.a += 1"]
)
def test_the_rule_about_writers_sees(line: str, tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(line)
    assert len(list(writes(file))) == 1


HOT = [f for f in SOURCES if f.relative_to(PACKAGE).parts[0] in {"stages", "kernels", "hooks", "adapters", "drafters"}]


@pytest.mark.parametrize("file", sorted({*HOT, *METHODS}), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_no_copy_to_a_device_makes_the_host_wait(file: Path) -> None:
    """`stages.uploaded` makes a tensor of numbers without that."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor"):
            assert not any(word.arg == "device" for word in node.keywords), f"line {node.lineno}: use uploaded"


@pytest.mark.parametrize("file", METHODS, ids=relative)
def test_methods_know_no_model(file: Path) -> None:
    assert not re.search(r"model_type|ForConditionalGeneration|ForCausalLM", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", registry.stages())
def test_every_stage_says_where_it_comes_from(name: str) -> None:
    cls = registry.stage(name)
    doc = cls.__doc__ or ""
    if cls.paper == "no paper":
        assert "No paper" in doc
    else:
        assert re.fullmatch(r"https://\S+", cls.paper) and f"Paper: {cls.paper}" in doc
    module_doc = sys.modules[cls.__module__].__doc__ or ""
    assert module_doc.strip().split("\n")[0].endswith("."), "the module's first line is its summary in `vtoken list`"


def test_every_op_is_used() -> None:
    """An op that no stage and no hook calls is measured for nothing."""
    called = set()
    for file in SOURCES:
        if file.relative_to(PACKAGE).parts[0] not in ("kernels", "evals", "commands"):
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "vtoken.kernels"]
            called |= {alias.name for node in froms for alias in node.names} & {
                node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
    assert set(kernels.ops()) <= called


def test_no_two_stages_share_a_file_name() -> None:
    names = [f.stem for f in METHODS if not f.stem.startswith("_")]
    assert len(names) == len(set(names)) == len(registry.stages())


def test_no_file_is_long() -> None:
    files = [
        f for folder in ("vtoken", "tests", "benchmarks", "reference_models") for f in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 20
    long = {relative(f): n for f in files if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_importing_vtoken_imports_nothing_else() -> None:
    code = (
        "import sys, vtoken; dir(vtoken); assert not {'torch', 'pydantic', 'transformers', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_names() -> None:
    assert dir(vtoken) == sorted(vtoken.__all__)
    assert all(callable(getattr(vtoken, name)) for name in vtoken.__all__)
    with pytest.raises(AttributeError, match="'vtoken' has no attribute 'warp'"):
        vtoken.warp  # noqa: B018


def named(tree: ast.AST) -> Iterator[str]:
    """Every name that a file gives or uses."""
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_words_with_several_meanings_are_no_names(file: Path) -> None:
    """CONTRIBUTING.md has the words to use instead. `probe_sums` is a public op."""
    gone = {"held", "told", "untold", "probe", "probed"}
    names = set(named(ast.parse(file.read_text(encoding="utf-8")))) - {"probe_sums"}
    assert not {name for name in names if gone & {*name.strip("_").split("_")}}


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["plot"], *extras["dev"]]
    for name, lines in {"constraints.txt": [*needed, *extras["docs"]], "constraints-oldest.txt": needed}.items():
        direct = [re.match(r"[\w-]+", line)[0] for line in lines]
        pins = re.findall(r"^([\w-]+)==", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        pinned = {pin.lower().replace("_", "-") for pin in pins}
        assert {d.lower().replace("_", "-") for d in direct} <= pinned


def test_a_wheel_holds_vtoken_whole_and_nothing_else(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("vtoken", "tests", "reference_models"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project, capture_output=True)
    (wheel,) = tmp_path.glob("vtoken-*.whl")
    assert wheel.stat().st_size <= 10e6
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"vtoken", f"vtoken-{vtoken.__version__}.dist-info"}
    expected = {str(f.relative_to(project)) for f in (project / "vtoken").rglob("*") if f.is_file()}
    assert expected == {name for name in names if name.startswith("vtoken/")}
    assert {"vtoken/py.typed", "vtoken/presets/none.yaml"} <= expected
