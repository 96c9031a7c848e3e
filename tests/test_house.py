"""House rules that nobody can keep in mind: who may import whom, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

# A room and what it may import besides itself and the leaves. "model.config" is one module of a room.
ROOMS: dict[str, set[str]] = {
    "text": set(),
    "image": set(),
    "model": set(),
    "weights": {"model.config"},
    "engine": {"model", "weights", "text", "image"},
    "engine.vlm": {"model", "weights", "text", "image", "merge.unwritten"},
    "serve": {"engine", "text", "image", "model.config"},
    "data": {"text", "image"},
    "train": {"data", "model", "weights", "text", "image"},
    "merge": {"weights", "engine.kernels"},
    "merge.delta": {"weights", "model.config"},
    "merge.search": {"weights", "evals"},
    "evals": {"text", "image", "data"},
    "card": set(),
    "chat": set(),
    "doctor": {"engine"},
    "fit": {"engine", "model.config", "text", "weights", "doctor", "train.memory"},
    "trim": {"model.config", "text", "weights"},
}
LEAVES = {"errors", "manifest", "recipe", "carbon"}  # anybody may import these; they import no room
ANYTHING = {"cli", "build", "parity"}  # and these import anybody
NO_TORCH = {"card", "text", "recipe", "manifest", "errors", "carbon", "cli", "chat"}


def modules(root: Path) -> dict[str, Path]:
    """Module name below seavlm -> file; "" is the package itself."""
    source = root / "src" / "seavlm"
    found = {}
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Absolute names a file imports: `from a.b import c` counts as a.b.c, be c a module or a name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_only else ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def broken_rules(module: str, imported: set[str]) -> list[str]:
    """Which imports of a module the table does not allow."""
    room = module.split(".")[0]
    if room in ANYTHING or module == "":
        return []
    allowed = LEAVES | {room} if room not in LEAVES else LEAVES
    if room in ROOMS:
        allowed |= ROOMS.get(module, ROOMS[room])
    elif room not in LEAVES:
        return [f"{module} is in no room"]
    broken = []
    for name in imported:
        top, _, inner = name.partition(".")
        if top != "seavlm" or inner == "__version__":
            continue
        fits = any(inner == ok or inner.startswith(ok + ".") for ok in allowed)
        # `from seavlm import manifest, recipe` and `from seavlm.model import config` name modules as well
        if not fits:
            broken.append(f"{module} imports {name}")
    return broken


def test_rooms_import_only_what_the_table_allows(root: Path) -> None:
    broken = [line for module, path in modules(root).items() for line in broken_rules(module, imports(path))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "module, name",
    [
        ("model.gemma3", "seavlm.text.chat.encode_chat"),
        ("merge.methods", "seavlm.model.gemma3.Gemma3"),
        ("merge.stream", "seavlm.evals.run.evaluate"),
        ("weights.names", "seavlm.model.gemma3.Gemma3"),
        ("card.card", "seavlm.evals.scores.Results"),
        ("carbon", "seavlm.train.sft.run"),
        ("errors", "seavlm.text.language.LANGUAGES"),
        ("shed", "seavlm.errors.SeavlmError"),
    ],
)
def test_the_table_is_held_to(module: str, name: str) -> None:
    assert broken_rules(module, {name})


def test_some_rooms_know_no_torch(root: Path) -> None:
    """What the command line, the card and the tokenizer load must come at once."""
    for module, path in modules(root).items():
        if module.split(".")[0] in NO_TORCH or module == "model.config":
            loaded = {name.split(".")[0] for name in imports(path, top_only=True)}
            assert not loaded & {"torch", "transformers", "matplotlib"}, f"{module} imports torch when loaded"


def test_help_loads_no_torch() -> None:
    heavy = "{'torch', 'numpy', 'pyarrow'}"
    code = f"import sys, seavlm.cli, seavlm.recipe; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_unpickled(root: Path) -> None:
    """torch.load and pickle run code that a file brings along; safetensors and .npy do not."""
    for module, path in modules(root).items():
        found = imports(path) & {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
        assert not found, f"{module} imports {found}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in ("torch.load", "eval", "exec", "os.system"), f"{module} calls {called}"
                for key in ("allow_pickle", "trust_remote_code", "shell"):
                    assert keywords.get(key, "False") == "False", f"{module}: {called}({key}=...)"


# Built from pieces, so that this file holds none of them.
REGISTRY_HOSTS = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "registry.npm" + "js.org",
    "npm" + "js.com",
    "download.pytorch" + ".org",
    "registry." + "yarnpkg.com",
    "index-" + "url",
]
MACHINE_PATH = re.compile(r"(?<![\w./:~-])/(?:home|root|work|Users|mnt|opt|tmp)/[\w.-]+")


def committed_texts(root: Path) -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout
    texts = {}
    for name in listed.decode().split("\0"):
        path = root / name
        if name and path.is_file() and path.stat().st_size < 2**20:
            data = path.read_bytes()
            if b"\0" not in data:
                texts[name] = data.decode("utf-8", "replace")
    return texts


def test_no_file_names_a_registry_or_a_machine(root: Path) -> None:
    """Registries are reached by their clients, with whatever addresses the machine has set."""
    found = []
    for name, text in committed_texts(root).items():
        found += [f"{name}: {host}" for host in REGISTRY_HOSTS if host in text]
        if not name.startswith("src/seavlm/models/") or name.endswith((".py", ".md")):
            found += [f"{name}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert not found, "\n".join(found)


def test_every_module_says_what_it_is(root: Path) -> None:
    for module, path in modules(root).items():
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
    assert not [
        module for module in modules(root) if module.split(".")[-1] in ("utils", "helpers", "common", "misc")
    ]
