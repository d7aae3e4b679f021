"""Which settings the code reads, found in its source.

[Note: what counts as read]
A key counts when code reads the attribute of that name from something known to be its section: a parameter or field
annotated with the section's class, a section of one (or an item of an array of them), what a method of one returns by
its annotation, or a variable or attribute of `self` that any of these was assigned to. `settings.debug.seed` is no read
of `data.seed`. Code in a settings.py counts only as far as other code calls it, by name, directly or through each
other; `problems` never does: checking a value is not using it. Nor do train/report.py and check/: showing a value, or
proving one right, is not using it either. `getattr(section, key)` with a key that is no literal reads every string in
its function and in the constants of its module that the function names.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

ROOT_SECTION = "TrainSettings"
SHOWS_ONLY = ("train/report.py", "check/")

# class -> key -> class of that inner section, "Class[]" for an array of them, "" for a leaf; and class -> "method()" ->
# class of the section that it returns
Sections = dict[str, dict[str, str]]


@dataclass
class Unit:
    """What one function (or module) reads, as (section class, key), and every name in it, any of which it may call."""

    reads: set[tuple[str, str]] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


def leaves(sections: Sections, section: str = ROOT_SECTION, prefix: str = "") -> dict[str, tuple[str, str]]:
    """(section class, key) of every leaf below the root, by its path as users write it."""
    found = {}
    for key, inner in sections[section].items():
        if inner.endswith("[]"):
            found |= leaves(sections, inner.removesuffix("[]"), f"{prefix}{key}[].")
        if inner in sections and not key.endswith("()"):
            found |= leaves(sections, inner, f"{prefix}{key}.")
        elif not key.endswith("()"):
            found[f"{prefix}{key}"] = section, key
    return found


def find_sections(trees: dict[str, ast.Module]) -> Sections:
    """Every class with annotated fields in a settings.py."""
    classes = {
        node.name: node
        for path, tree in trees.items()
        if path.endswith("settings.py")
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    sections: Sections = {}
    for name, node in classes.items():
        fields = sections[name] = {}
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                annotation = ast.unparse(item.annotation)
                array = annotation.removeprefix("tuple[").removesuffix(", ...]")
                fields[item.target.id] = annotation if annotation in classes else ""
                if array != annotation and array in classes:
                    fields[item.target.id] = f"{array}[]"
            elif isinstance(item, ast.FunctionDef) and item.returns and ast.unparse(item.returns) in classes:
                fields[f"{item.name}()"] = ast.unparse(item.returns)
    return sections


def unread(package: Path) -> list[str]:
    """The paths of all keys that nothing in the package reads; see [Note: what counts as read]."""
    trees = {path.relative_to(package).as_posix(): ast.parse(path.read_text()) for path in package.rglob("*.py")}
    sections = find_sections(trees)
    reached, callable_units = Unit(), dict[str, list[Unit]]()
    for path, tree in trees.items():
        if path.endswith("settings.py"):
            for name, function, owner in _functions(tree):
                if name != "problems":
                    unit = _read(function, owner, tree, sections)
                    callable_units.setdefault(name, []).append(unit)
        elif not path.startswith(SHOWS_ONLY):
            _merge(reached, _read_module(tree, sections))
    while called := reached.names & callable_units.keys():
        for name in called:
            for unit in callable_units.pop(name):
                _merge(reached, unit)
    return [path for path, leaf in leaves(sections).items() if leaf not in reached.reads]


def _merge(into: Unit, other: Unit) -> None:
    into.reads |= other.reads
    into.names |= other.names


def _functions(tree: ast.Module) -> list[tuple[str, ast.AST, str]]:
    """(name, definition, class that it belongs to or "") of all functions and methods of a module."""
    found: list[tuple[str, ast.AST, str]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, node, ""))
        elif isinstance(node, ast.ClassDef):
            found += [(item.name, item, node.name) for item in node.body if isinstance(item, ast.FunctionDef)]
    return found


def _read_module(tree: ast.Module, sections: Sections) -> Unit:
    unit = Unit()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            attributes = _attributes(node, sections)
            for item in node.body:
                _merge(unit, _read(item, "", tree, sections, attributes))
        else:
            _merge(unit, _read(node, "", tree, sections))
    return unit


def _attributes(cls: ast.ClassDef, sections: Sections) -> dict[str, str]:
    """The sections that `self.x` holds, by x: annotated in the class, or assigned in a method."""
    found: dict[str, str] = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = ast.unparse(node.annotation)
    for method in cls.body:
        known = _variables(method, "", sections, {k: v for k, v in found.items() if v in sections})
        for node in ast.walk(method):
            for target, value in _assigned(node):
                section = _type(value, known, sections, found)
                if section and isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    found.setdefault(target.attr, section)
    return {name: section for name, section in found.items() if section in sections}


def _assigned(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) pairs of an assignment or a loop; tuples are taken apart. A loop's value is an item of it."""
    if isinstance(node, ast.For | ast.comprehension):
        target, values = node.target, node.iter
        if isinstance(values, ast.Call) and ast.unparse(values.func) == "enumerate" and isinstance(target, ast.Tuple):
            target, values = target.elts[1], values.args[0]
        return [(target, ast.Subscript(values, ast.Constant(0), ast.Load()))]
    if not isinstance(node, ast.Assign):
        return []
    pairs: list[tuple[ast.expr, ast.expr]] = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs += zip(target.elts, node.value.elts, strict=True)
        else:
            pairs.append((target, node.value))
    return pairs


def _variables(node: ast.AST, owner: str, sections: Sections, attributes: dict[str, str]) -> dict[str, str]:
    """The section that each name in a definition holds: annotated parameters, and what is assigned from them."""
    known = {"self": owner} if owner else {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg) and inner.annotation is not None:
            annotation = ast.unparse(inner.annotation)
            if annotation in sections:
                known[inner.arg] = annotation
        for target, value in _assigned(inner):
            section = _type(value, known, sections, attributes)
            if isinstance(target, ast.Name) and section:
                known[target.id] = section
    return known


def _type(value: ast.expr, known: dict[str, str], sections: Sections, attributes: dict[str, str]) -> str:
    """The section class of an expression, "Class[]" for an array of them, "" for anything else."""
    if isinstance(value, ast.Name):
        return known.get(value.id, "")
    if isinstance(value, ast.Subscript):
        array = _type(value.value, known, sections, attributes)
        return array.removesuffix("[]") if array.endswith("[]") else ""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        section = _type(value.func.value, known, sections, attributes)
        return sections.get(section, {}).get(f"{value.func.attr}()", "")
    if isinstance(value, ast.Attribute):
        if isinstance(value.value, ast.Name) and value.value.id == "self" and value.attr in attributes:
            return attributes[value.attr]
        return sections.get(_type(value.value, known, sections, attributes), {}).get(value.attr, "")
    return ""


def _read(
    node: ast.AST, owner: str, module: ast.Module, sections: Sections, attributes: dict[str, str] | None = None
) -> Unit:
    attributes = attributes or {}
    known, unit = _variables(node, owner, sections, attributes), Unit()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute):
            unit.names.add(inner.attr)
            if isinstance(inner.ctx, ast.Load):
                unit.reads.add((_type(inner.value, known, sections, attributes), inner.attr))
        elif isinstance(inner, ast.Name):
            unit.names.add(inner.id)
        elif isinstance(inner, ast.Call) and ast.unparse(inner.func) == "getattr":
            section = _type(inner.args[0], known, sections, attributes)
            unit.reads |= {(section, text) for text in _strings(node, module)} if section else set()
    return unit


def _strings(node: ast.AST, module: ast.Module) -> set[str]:
    """Every string in a definition and in the constants of its module that it names, directly or through each other."""
    constants = {
        target.id: value
        for statement in module.body
        for target, value in _assigned(statement)
        if isinstance(target, ast.Name)
    }
    texts, names, visited = set[str](), [node], set[str]()
    while names:
        for inner in ast.walk(names.pop()):
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                texts.add(inner.value)
            elif isinstance(inner, ast.Name) and inner.id in constants and inner.id not in visited:
                visited.add(inner.id)
                names.append(constants[inner.id])
    return texts
