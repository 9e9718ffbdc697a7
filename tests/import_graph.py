"""The package's imports by folder, on its twelve floors.

    python tests/import_graph.py

A file imports from its own folder, from its own floor as long as there is no cycle, and from the floors below. Imports for
types alone count like the others.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "zo_hf"

#: From top to bottom. A folder, or a file at the package's root.
FLOORS = (
    ("cli",),
    ("comparison", "tasks", "trl"),
    ("trainer", "rewards"),
    ("lr_finder", "trajectory", "serving"),
    ("stability", "checkpoint", "memory"),
    ("engine",),
    ("case", "compatibility", "settings"),
    ("rules", "evaluation", "heads"),
    ("subspaces",),
    ("parallel", "offload"),
    ("directions", "estimators", "privacy"),
    ("rng", "kernels", "quantization", "untrusted", "method_info", "reason", "version"),
)
FLOOR_OF = {part: number for number, floor in enumerate(FLOORS) for part in floor}


def modules() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def imports() -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import, which this script does not follow"
                module = node.module or ""
                targets |= {
                    f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names
                }
        found[name] = {target for target in targets if target in known and target != name}
    return found


def part_of(module: str) -> str:
    """The folder, or the file at the root, that a module belongs to; "" for the package's own `__init__`."""
    return module.partition(".")[2].partition(".")[0]


def by_part() -> dict[str, set[str]]:
    """The parts that each part imports from, itself left out."""
    edges: dict[str, set[str]] = {}
    for module, targets in imports().items():
        part = part_of(module)
        if part:
            edges.setdefault(part, set()).update({part_of(target) for target in targets} - {part, ""})
    return edges


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Every path of a depth-first search that comes back to where it has been."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for target in sorted(edges.get(node, ())):
                visit(target, [*path, node])
            done.add(node)

    for node in sorted(edges):
        visit(node, [])
    return found


def text() -> str:
    """One line for every part, floor after floor: the parts that it imports from."""
    edges = by_part()
    lines = []
    for number, floor in enumerate(FLOORS, start=1):
        present = [part for part in floor if part in edges]
        for i, part in enumerate(present):
            targets = sorted(edges[part], key=lambda target: (FLOOR_OF[target], target))
            lines.append(f"{number if i == 0 else '':>2}  {part:<14} {' '.join(targets)}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(text())
