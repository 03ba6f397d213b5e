"""Rules that a linter does not know. Exceptions stand here with their reason; one that is no longer needed fails."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from vlexport.core.errors import CODES
from vlexport.passes import CATALOGUE, ON_REQUEST
from vlexport.targets import CATALOGUE as TARGETS

ROOT = Path(__file__).resolve().parents[1]
PASSES = {**CATALOGUE, **ON_REQUEST}
LINKED = ("calibration", "passes", "targets")
LONGEST = 500
LONGEST_TEST = 700  # tables of hostile files and bad inputs are long
TARGET_IDS = {*TARGETS, "tensorrt", "coreml"}


@lru_cache(maxsize=1)
def sources() -> dict[str, ast.Module]:
    """Path below the root → syntax tree, for every module of the package, each once."""
    found = {}
    for part in ("vlexport", *LINKED):
        for file in sorted((ROOT / part).rglob("*.py")):
            inner = file.relative_to(ROOT / part).parts[0]
            if not (part == "vlexport" and inner in LINKED):
                found[file.relative_to(ROOT).as_posix()] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def walk(prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(path, node) of every node in the modules below ``prefix``."""
    for path, tree in sources().items():
        if path.startswith(prefix):
            yield from ((path, node) for node in ast.walk(tree))


def at(path: str, node: ast.AST) -> str:
    return f"{path}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)[:100]}"


def strings(tree: ast.AST, *, docstrings: bool = False) -> Iterator[ast.Constant]:
    """String constants that are no docstrings."""
    bare = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (docstrings or id(node) not in bare):
            yield node


def compare_with_exceptions(found: dict[str, str], reasons: Iterable[str], rule: str) -> None:
    """``found`` (key → place) holds nothing but the keys with a reason, and all of those."""
    known = set(reasons)
    broken = [place for key, place in found.items() if key not in known]
    assert broken == [], rule
    assert known <= set(found), "these exceptions are no longer needed: take them out"


# -- passes and stages -------------------------------------------------------------------------------------------------

_A_TARGET = re.compile(
    r"(?!node\.|found\.)([\w.]+\.)?(target\.id|target_id)|(self|config|options|self\.options)\.target"
)


def target_tests(path: str, tree: ast.AST) -> list[str]:
    """Comparisons of a target, or with the name of one."""
    found = []
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            parts = [node.subject]
        for part in parts:
            named = any(c.value in TARGET_IDS for c in strings(part, docstrings=True))
            if named or _A_TARGET.fullmatch(ast.unparse(part)):
                found.append(at(path, node))
    return found


def test_no_target_is_asked_for_when_a_pass_or_the_build_decides() -> None:
    wrong = [
        line for path, tree in sources().items() if path.startswith("passes/") for line in target_tests(path, tree)
    ]
    wrong += target_tests("vlexport/stages/build.py", sources()["vlexport/stages/build.py"])
    assert wrong == [], "a target says by its own methods what it wants"


@pytest.mark.parametrize(
    "line",
    [
        "if target.id == 'onnxruntime': pass",
        "x = config.target != y",
        "'coreml' in names",
        "if self.target_id in z: pass",
    ],
)
def test_target_test_is_seen_when_written(line: str) -> None:
    assert target_tests("here.py", ast.parse(line))


def module_tests(path: str, tree: ast.AST) -> list[str]:
    """Mentions of nn.Module classes, class names, and decisions by module path or source line."""
    return [at(path, node) for node in ast.walk(tree) if _names_module(node) or _decides_by_place(node)]


def _names_module(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name == "torch.nn" for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module == "torch.nn" or (node.module == "torch" and any(a.name == "nn" for a in node.names))
    if isinstance(node, ast.Attribute):
        return node.attr in ("__class__", "__qualname__", "nn_module_stack") or ast.unparse(node) == "torch.nn"
    return False


_READS_TEXT = ("startswith", "endswith", "match", "search", "fullmatch", "split", "partition", "rpartition")


def _decides_by_place(node: ast.AST) -> bool:
    reads = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _READS_TEXT
    if not reads and not isinstance(node, ast.Compare):
        return False
    calls = [ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    return any(re.search(r"\b(module_path|source_line)$", name) for name in calls)


def test_no_pass_knows_a_module_when_it_matches() -> None:
    wrong = [
        line for path, tree in sources().items() if path.startswith("passes/") for line in module_tests(path, tree)
    ]
    assert wrong == [], "a pass looks at operators, shapes and values, never at classes, names or module paths"


@pytest.mark.parametrize(
    "line",
    [
        "from torch import nn",
        "isinstance(x, torch.nn.Linear)",
        "x.__class__.__name__ == 'Attention'",
        "provenance.module_path(node).startswith('blocks')",
        "'attn' in provenance.module_path(node)",
    ],
)
def test_module_test_is_seen_when_written(line: str) -> None:
    assert module_tests("here.py", ast.parse(line))


HEADINGS = ("Before → after", "Does not apply when", "Numerical effect")
WITHOUT_GOLDEN: dict[str, str] = {}
"""Pass → why it has no golden file."""


@pytest.mark.parametrize("name", PASSES)
def test_pass_is_documented_and_tested_when_in_the_catalogue(name: str) -> None:
    module = importlib.import_module(PASSES[name].partition(":")[0])
    stem = name.replace("-", "_")
    assert module.__name__ == f"vlexport.passes.{stem}"
    text = inspect.getdoc(module) or ""
    assert text.startswith(f"{name}: ")
    assert [heading for heading in HEADINGS if heading not in text] == []
    assert (ROOT / "tests" / "passes" / f"test_{stem}.py").is_file(), f"no tests/passes/test_{stem}.py"
    golden = list((ROOT / "tests" / "golden").rglob(f"*{stem}*")) + list((ROOT / "tests" / "golden").rglob(f"*{name}*"))
    assert bool(golden) != (name in WITHOUT_GOLDEN), f"no tests/golden/**/{stem}* and no reason, or both"


# -- what is read and called -------------------------------------------------------------------------------------------

CARRIED_KEYS = {
    "vlexport/ir/provenance.py": "the one reader and writer",
    "vlexport/frontends/archive.py": "names the members of the JSON metadata that a saved file keeps",
}


def metadata_uses(path: str, tree: ast.AST) -> dict[str, str]:
    """Uses of node metadata other than the value's fake tensor, and than copying a node whole outside of passes."""
    fine = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and _is_val(node.slice):
            fine.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            fine |= {id(node.func.value)} if node.args and _is_val(node.args[0]) else set()
        elif isinstance(node, ast.Compare) and _is_val(node.left):
            fine |= {id(each) for each in node.comparators}
        elif isinstance(node, ast.Assign) and re.fullmatch(r"dict\(\w+\.meta\)", ast.unparse(node.value)):
            copied = [*node.targets, *getattr(node.value, "args", [])]
            fine |= {id(each) for each in copied} if path.startswith("vlexport/") else set()
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and len(node.value.keys) == 1:
            key = node.value.keys[0]
            fine |= {id(each) for each in node.targets} if key is not None and _is_val(key) else set()
    return {
        f"{path} {ast.unparse(node)}": at(path, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "meta" and id(node) not in fine
    }


def _is_val(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == "val"


def test_node_metadata_goes_through_provenance_when_it_is_not_the_value() -> None:
    found: dict[str, str] = {}
    for path, tree in sources().items():
        if path != "vlexport/ir/provenance.py":
            found |= metadata_uses(path, tree)
    assert list(found.values()) == [], "read and write node metadata through ir/provenance"


def test_metadata_use_is_seen_when_written() -> None:
    tree = ast.parse("a.meta['custom']; b.meta['val']; c.meta.get('stack_trace'); d.meta.get('val'); 'val' in e.meta")
    assert {key.split()[1] for key in metadata_uses("here.py", tree)} == {"a.meta", "c.meta"}
    copy = ast.parse("copied[node].meta = dict(node.meta)")
    assert metadata_uses("passes/here.py", copy)
    assert not metadata_uses("vlexport/ir/here.py", copy)


def test_carried_metadata_keys_are_named_in_one_place_when_written() -> None:
    keys = {"custom", "nn_module_stack", "stack_trace"}
    found = {path: at(path, c) for path, tree in sources().items() for c in strings(tree) if c.value in keys}
    compare_with_exceptions(found, CARRIED_KEYS, "these keys belong to ir/provenance")


_MOVING = ("torch", "onnxscript", "coremltools", "onnx_ir")
PRIVATE = {
    "torch._ops": "OpOverload, the class of every operator in a graph, has no public name",
    "torch.nn.modules.batchnorm._NormBase": "capture: the public norms share no public base",
    "torch.nn.modules.dropout._DropoutNd": "capture: the public dropouts share no public base",
}
"""Private name → why it stands outside of a compat.py."""


def private_uses(path: str, tree: ast.AST) -> dict[str, str]:
    """Private modules and names of packages whose insides move: ``torch._x``, ``from torch.y._z import …``."""
    roots = {name: name for name in _MOVING}
    dotted: list[tuple[str, ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _MOVING:
            for alias in node.names:
                roots[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                dotted.append((f"{node.module}.{alias.name}", node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in roots and re.fullmatch(r"[\w.]+", rest):
                dotted.append((f"{roots[head]}.{rest}", node))
    found = {}
    for name, node in dotted:
        parts = name.split(".")
        hidden = next((i for i, part in enumerate(parts) if re.match(r"_(?!_)", part)), None)
        if parts[0] in _MOVING and hidden is not None:
            found[".".join(parts[: hidden + 1])] = at(path, node)
    return found


def test_private_parts_of_others_stay_in_compat_when_used() -> None:
    found: dict[str, str] = {}
    for path, tree in sources().items():
        if not path.endswith("/compat.py"):
            found |= private_uses(path, tree)
    compare_with_exceptions(found, PRIVATE, "private and moving parts of other packages belong into a compat.py")


def test_private_use_is_seen_when_written() -> None:
    tree = ast.parse(
        "import torch._dynamo\nfrom torch import nn\nfrom torch.fx._x import y\nnn._reduction\ntorch.a._b.c\n"
    )
    assert set(private_uses("here.py", tree)) == {"torch._dynamo", "torch.fx._x", "torch.nn._reduction", "torch.a._b"}


BROAD_EXCEPTS = {
    "vlexport/cli/main.py main": "the boundary: a bug of ours becomes a crash file",
    "vlexport/core/isolate.py __init__": "ends the child, then raises on",
    "vlexport/core/child.py ask": "kills the child before anything, Ctrl-C included, leaves",
    "vlexport/core/plugins.py load": "imports other packages' code",
    "vlexport/core/plugins.py answering_for": "runs other packages' code",
    "vlexport/core/isolate.py serve": "runtimes raise their own kinds",
    "vlexport/frontends/architecture.py _from_code": "runs the user's own code",
    "vlexport/frontends/capture.py _eager": "runs the user's own forward",
    "vlexport/frontends/capture.py _export": "torch.export raises many private kinds",
    "vlexport/frontends/consented.py _ran": "runs what a file holds, with consent",
    "vlexport/frontends/transformers_model.py _made": "transformers and its validators raise many kinds",
    "vlexport/stages/write_bundle.py staging": "removes what is half-written, then raises on",
    "vlexport/stages/replace_folder.py replace_folder": "puts the old folder back, then raises on",
    "targets/onnx/session.py __init__": "onnxruntime's exceptions share no public base",
}


def broad_excepts(path: str, tree: ast.AST) -> dict[str, str]:
    """Handlers of everything, by the function they stand in."""
    found = {}
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.ExceptHandler):
                kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds):
                    found[f"{path} {function.name}"] = f"{path}:{node.lineno}"
    return found


def test_everything_is_caught_only_at_the_boundaries_when_code_runs() -> None:
    found: dict[str, str] = {}
    for path, tree in sources().items():
        found |= broad_excepts(path, tree)
    compare_with_exceptions(found, BROAD_EXCEPTS, "name the exceptions; only a boundary catches all")


def test_nothing_prints_but_the_console_when_in_the_package() -> None:
    wrong = [
        at(path, node)
        for path, node in walk()
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert [line for line in wrong if not line.startswith("vlexport/cli/console.py")] == []


# -- errors ------------------------------------------------------------------------------------------------------------


def test_codes_are_those_in_use_when_the_source_is_scanned() -> None:
    used: dict[str, str] = {}
    for path, tree in sources().items():
        if path != "vlexport/core/errors.py":
            used |= {c.value: at(path, c) for c in strings(tree) if re.fullmatch(r"VLX\d{4}", str(c.value))}
    assert {code: place for code, place in used.items() if code not in CODES} == {}, "not in errors.CODES"
    assert sorted(set(CODES) - set(used)) == [], "nothing raises these: take them out of errors.CODES"


def test_codes_in_docs_are_those_in_the_source_when_listed() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(VLX\d{4})` \| (.*?) \|$", text, re.MULTILINE)) == CODES


FLAGS_TO_COME: dict[str, str] = {}
FLAGS_OF_OTHERS = {
    "targets/tensorrt/commands.py": "writes command lines of trtexec and tensorrt_rtx",
    "vlexport/stages/doctor.py": "says which command of pip or venv to type",
}
"""Module → whose flags it names."""


def test_flags_in_messages_exist_when_a_user_types_them() -> None:
    from vlexport.cli.main import app

    known = {"--help"}
    group = _command(app)
    for command in (group, *group.commands.values()):
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    found, of_others = {}, {}
    for path, tree in sources().items():
        for constant in strings(tree):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", str(constant.value)):
                if flag not in known and path in FLAGS_OF_OTHERS:
                    of_others[path] = at(path, constant)
                elif flag not in known:
                    found[flag] = at(path, constant)
    compare_with_exceptions(of_others, FLAGS_OF_OTHERS, "")
    compare_with_exceptions(found, FLAGS_TO_COME, "messages name flags that the command line does not have")


# -- text --------------------------------------------------------------------------------------------------------------


def text_files(*folders: str) -> Iterator[tuple[str, str]]:
    """(path, content) of source, documentation and settings; caches and links left out."""
    for name in folders or ("vlexport", *LINKED, "samples", "tests", "docs", ".ci", "."):
        files = (ROOT / name).glob("*") if name == "." else (ROOT / name).rglob("*")
        for file in sorted(files):
            path = file.relative_to(ROOT).as_posix()
            wanted = file.suffix in (".py", ".md", ".toml", ".txt", ".in", ".j2") or file.name in ("Makefile", "run")
            if file.is_file() and wanted and not re.match(r"vlexport/(calibration|passes|targets)/", path):
                yield path, file.read_text(encoding="utf-8")


def test_files_are_short_when_written_by_hand() -> None:
    counted = {path: text.count("\n") for path, text in text_files() if path.endswith(".py")}
    limits = {path: LONGEST_TEST if path.startswith("tests/") else LONGEST for path in counted}
    assert {path: lines for path, lines in counted.items() if lines > limits[path]} == {}
    assert len(counted) > 80


def test_no_machine_is_named_when_text_is_committed() -> None:
    folders = ("home", "Users", "root", "work", "mnt", "scratch")
    place = re.compile(rf"(?<![\w.~/])/(?:{'|'.join(folders)})/\w+")
    here = re.compile("|".join(map(re.escape, (str(ROOT), str(Path.home()) + "/"))))
    for path, text in text_files():
        found = here.search(text)
        if not path.startswith("tests/"):  # tests invent such paths to show that they do not get out
            found = found or place.search(text)
        assert found is None, f"{path} names {found.group()}"


def test_nothing_is_left_to_do_when_text_is_committed() -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")) + r")\b")
    for path, text in text_files():
        found = marks.search(text)
        assert found is None, f"{path} holds {found.group()}"


def test_no_emoji_when_text_is_committed() -> None:
    emoji = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]")
    for path, text in text_files():
        found = emoji.search(text)
        assert found is None, f"{path} holds U+{ord(found.group()):X}"


CONTRACT_METHODS = {"find", "apply", "run", "emit", "_lower"}
"""Methods documented once, where the contract stands; an override says the same."""


def test_public_things_have_docstrings_when_in_the_package() -> None:
    missing = []
    for path, tree in sources().items():
        if tree.body and not ast.get_docstring(tree):
            missing.append(path)
        pending: list[tuple[ast.AST, bool]] = [(node, False) for node in tree.body]
        while pending:
            node, in_class = pending.pop()
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
                continue
            inherited = in_class and node.name in CONTRACT_METHODS
            if not ast.get_docstring(node) and not inherited:
                missing.append(f"{path}:{node.lineno}: {node.name}")
            if isinstance(node, ast.ClassDef):
                pending += [(inner, True) for inner in node.body]
    assert missing == []


# -- documentation and binaries ----------------------------------------------------------------------------------------

DOCUMENTS = (
    "README.md",
    "samples/quickstart/README.md",
    "samples/solar_cells/README.md",
    "samples/plugin/README.md",
    "samples/zoo/fmvit/README.md",
    "docs/data.md",
    "docs/model_files.md",
    "docs/bundle.md",
    "docs/components.md",
    "docs/commands/compare.md",
    "docs/commands/explain.md",
    "docs/commands/inspect.md",
    "docs/commands/report.md",
    "docs/coreml.md",
    "docs/inspect.md",
    "docs/onnxruntime.md",
    "docs/reduce_tokens_example.md",
)


def _command(app: object) -> object:
    import typer.main

    return typer.main.get_command(app)  # type: ignore[arg-type]


def code_blocks(path: str) -> Iterator[tuple[str, str]]:
    """(language, content) of the fenced blocks of a document."""
    text = (ROOT / path).read_text(encoding="utf-8")
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_lines(path: str) -> list[list[str]]:
    """Commands in a document's shell blocks, continuation lines joined, prompts and comments dropped."""
    found = []
    for language, block in code_blocks(path):
        if language in ("bash", "sh", "shell", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = _words(line.strip().removeprefix("$ "))
                found += [words] if words else []
    return found


def _words(line: str) -> list[str]:
    import shlex

    return shlex.split(line, comments=True)


def test_readme_begins_with_its_two_commands_when_read() -> None:
    assert shell_lines("README.md")[:2] == [["make", "demo"], ["make", "test"]]


def test_make_targets_exist_when_a_document_names_them() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / document).read_text(encoding="utf-8")))
        named |= {words[1] for words in shell_lines(document) if words[0] == "make"}
        assert named
        assert named <= known, document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_vlexport_lines_parse_when_a_document_shows_them(document: str) -> None:
    from vlexport.cli.main import app

    group = _command(app)
    for words in shell_lines(document):
        if words[0] == "vlexport":
            assert words[1] in group.commands, f"{document}: {' '.join(words)}"  # type: ignore[attr-defined]
            group.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]


def test_vlexport_line_is_refused_when_its_flag_does_not_exist() -> None:
    from vlexport.cli.main import app

    build = _command(app).commands["build"]  # type: ignore[attr-defined]
    build.make_context("build", ["model.pt", "-o", "bundle"])
    with pytest.raises(Exception, match="--nope"):
        build.make_context("build", ["model.pt", "--nope"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_compile_when_a_document_shows_them(document: str) -> None:
    for language, block in code_blocks(document):
        if language == "python":
            compile(block, document, "exec")


def test_no_placeholder_is_left_when_the_readme_is_read() -> None:
    assert re.findall(r"@[A-Z]+@", (ROOT / "README.md").read_text(encoding="utf-8")) == []


def binaries() -> dict[str, int]:
    """Path → bytes of the files in the tree that are no text."""
    found = {}
    for folder in ("vlexport", *LINKED, "samples", "tests", "docs"):
        for file in (ROOT / folder).rglob("*"):
            path = file.relative_to(ROOT).as_posix()
            ignored = "__pycache__" in path or file.suffix in (".pt", ".pt2", ".pyc")
            if file.is_file() and not ignored and not re.match(r"vlexport/(calibration|passes|targets)/", path):
                content = file.read_bytes()
                try:
                    binary = "\0" in content.decode()
                except UnicodeDecodeError:
                    binary = True
                if binary:
                    found[path] = len(content)
    return found


def test_binaries_are_few_and_listed_when_committed() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| .+? \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "binaries.md").read_text("utf-8"), re.MULTILINE
    )
    found = binaries()
    assert sum(found.values()) <= 10_000_000
    assert sorted(found) == sorted(path for path, _, _ in rows), "docs/binaries.md lists each with licence and origin"
    assert "samples/solar_cells/head.npz" in found


def test_figures_in_the_readme_are_those_that_were_recorded() -> None:
    recorded = json.loads((ROOT / "docs" / "measured" / "build_time.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for ratio in recorded["ratios"].values():
        assert f"{ratio:.2f}×" in readme
    assert recorded["command"].startswith("python tests/benchmarks/build_time.py")
