"""The map of the package, drawn from its imports: rooms, arrows, arrows upwards, longest files.

    python docs/imports.py            # prints them; exit code 1 if an arrow goes up, or a file is
                                      # over 400 lines, unlisted
    python docs/imports.py --write    # and renews the picture and the table in architecture.md

A room is a module or a subpackage at the top of ``gdprompt_fast``; an arrow goes from a room to one
that it imports, anywhere in a file. What is imported by its name at run time (an op's kernels, by
``backend.py``) is no arrow.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gdprompt_fast"
# Folders of the package's modules; the Triton kernels stand beside the package.
FOLDERS = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.kernels": ROOT / "kernels"}
PAGE = ROOT / "docs" / "architecture.md"
DOOR = "__init__"  # the room of the public names

# From the ground up. A room may import those of its own floor, in no circle, and of lower ones.
FLOORS = {
    "ground": (
        *("errors", "rows", "layout", "batch", "artifacts", "config", "presets", "distributed"),
    ),
    "models": ("models",),
    "ops": ("ops", "kernels"),
    "layers": ("update",),
    "engine": ("keep", "meta", "reference", "exactness"),
    "public names": (DOOR,),
    "data and models from files": ("data", "loading", "teacher"),
    "measuring": ("evaluation", "report", "plan"),
    "training": ("training", "trainer"),
    "experiments": ("experiments", "icl", "internalisation", "bundled"),
    "page": ("app",),
    "runs": ("runs",),
    "command line": ("cli", "__main__"),
    "tests and benchmarks": ("testing",),
}
# The arrows upwards that there are. A new one fails the tests, and so does one listed here in vain.
EXCEPTIONS: dict[tuple[str, str], str] = {}
MOST_LINES = 400
# The files that are longer, likewise, and why.
LONG: dict[str, str] = {}

Arrows = dict[tuple[str, str], list[str]]  # (from, to): the files that import


def modules() -> dict[str, Path]:
    """Every module of the package and its file, by name."""
    found: dict[str, Path] = {}
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [*name.split("."), *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    _, *inside = module.split(".")
    return inside[0] if inside else DOOR


def imported(module: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules of the package that a file imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            names = (f"{origin}.{alias.name}" for alias in node.names)
            found |= {name if name in known else origin for name in names}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def arrows() -> Arrows:
    known, found = modules(), Arrows()
    for module, path in known.items():
        for target in imported(module, path, known):
            arrow = room(module), room(target)
            if arrow[0] != arrow[1]:
                found.setdefault(arrow, []).append(str(path.relative_to(ROOT)))
    return dict(sorted(found.items()))


def floor_of() -> dict[str, int]:
    return {name: level for level, floor in enumerate(FLOORS.values()) for name in floor}


def faults(found: Arrows) -> list[str]:
    """What is not as FLOORS and EXCEPTIONS say, a line each."""
    rooms, floor = {room(module) for module in modules()}, floor_of()
    said = [f"{each} is a room without a floor" for each in sorted(rooms - floor.keys())]
    said += [f"{each} has a floor but is no room" for each in sorted(floor.keys() - rooms)]
    named = [each for floor_rooms in FLOORS.values() for each in floor_rooms]
    said += [f"{each} is on two floors" for each in sorted(floor) if named.count(each) > 1]
    up = {arrow for arrow in found if _goes_up(arrow)}
    said += [
        f"{a} imports {b}, which is on a higher floor ({', '.join(found[a, b])})"
        for a, b in sorted(up - EXCEPTIONS.keys())
    ]
    said += [f"{a} no longer imports {b}" for a, b in sorted(EXCEPTIONS.keys() - up)]
    lengths = {path: lines for lines, path in source_files()}
    long = {path for path, lines in lengths.items() if lines > MOST_LINES}
    said += [
        f"{path} has {lengths[path]} lines, more than {MOST_LINES}"
        for path in sorted(long - LONG.keys())
    ]
    said += [f"{path} is listed as too long and is not" for path in sorted(LONG.keys() - long)]
    try:
        _order(found)
    except graphlib.CycleError as error:
        said.append(f"rooms import each other in a circle: {' ← '.join(error.args[1])}")
    return said


def _goes_up(arrow: tuple[str, str]) -> bool:
    floor = floor_of()
    return floor.get(arrow[0], 0) < floor.get(arrow[1], 0)


def _order(found: Arrows) -> list[str]:
    """The rooms, each after those that it imports; arrows upwards are left out."""
    below: dict[str, set[str]] = {}
    for a, b in found:
        below.setdefault(a, set())
        if not _goes_up((a, b)):
            below[a].add(b)
    return list(graphlib.TopologicalSorter(below).static_order())


def drawn(found: Arrows) -> list[tuple[str, str]]:
    """The arrows that do not follow from others: a → c is left out where a → b → c is there."""
    reached: dict[str, set[str]] = {}
    kept: list[tuple[str, str]] = []
    for a in _order(found):
        below = [b for origin, b in found if origin == a and not _goes_up((a, b))]
        through = {c for b in below for c in reached[b]}
        reached[a] = through | set(below)
        kept += [(a, b) for b in below if b not in through]
    return sorted(kept)


def picture(found: Arrows) -> str:
    """The rooms by floors, in Mermaid; arrows upwards are dotted."""
    lines = ["```mermaid", "flowchart TD"]
    for level, (name, floor) in reversed(list(enumerate(FLOORS.items()))):
        lines.append(f'  subgraph floor{level}["{name}"]')
        lines += [f'    {_node(each)}["{_label(each)}"]' for each in floor]
        lines.append("  end")
    lines += [f"  {_node(a)} --> {_node(b)}" for a, b in drawn(found)]
    lines += [f"  {_node(a)} -.-> {_node(b)}" for a, b in found if _goes_up((a, b))]
    return "\n".join([*lines, "```"])


def _node(name: str) -> str:
    return f"room_{name.strip('_')}"


def _label(name: str) -> str:
    return PACKAGE if name == DOOR else name


def rooms_table() -> str:
    """Every room with the first sentence of its docstring, the highest floor first."""
    known = modules()
    lines = ["| floor | room | what it is |", "|---|---|---|"]
    for floor, rooms in reversed(FLOORS.items()):
        for each in rooms:
            module = PACKAGE if each == DOOR else f"{PACKAGE}.{each}"
            words = "the passes of the ops in Triton"  # kernels/ has no __init__.py
            if module in known:
                text = ast.get_docstring(ast.parse(known[module].read_text(encoding="utf-8"))) or ""
                words = " ".join(text.split("\n\n")[0].split()).replace("``", "`")
                words = words.replace("|", "\\|")
            name = _place(each, known.get(module))
            lines.append(f"| {floor} | `{name}` | {words} |")
    return "\n".join(lines)


def _place(name: str, path: Path | None) -> str:
    if path is None:
        return f"{name}/"
    where = path.relative_to(ROOT / PACKAGE)
    return f"{where.parent}/" if name != DOOR and where.name == "__init__.py" else str(where)


def page(text: str, found: Arrows) -> str:
    """The page of the map, with the picture and the table as they are now."""
    up = sum(map(_goes_up, found))
    rooms = len({room(module) for module in modules()})
    head = f"{rooms} rooms, {len(found)} arrows, {up} of them upwards."
    for mark, content in (("picture", f"{head}\n\n{picture(found)}"), ("rooms", rooms_table())):
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        text = re.sub(
            f"{begin}.*{end}", f"{begin}\n{content}\n{end}".replace("\\", r"\\"), text, flags=re.S
        )
    return text


def source_files() -> list[tuple[int, str]]:
    """Every source file of the repository with its number of lines, the longest first."""
    places = (PACKAGE, "kernels", "csrc", "benchmarks", "tests", "docs", "examples")
    files = [path for place in places for path in (ROOT / place).rglob("*")]
    lines = [
        (len(path.read_text(encoding="utf-8").splitlines()), path.relative_to(ROOT).as_posix())
        for path in files
        if path.suffix in (".py", ".cpp", ".h")
    ]
    return sorted(lines, reverse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE.relative_to(ROOT)}")
    parser.add_argument("--longest", type=int, default=10, help="so many longest files")
    args = parser.parse_args()
    found = arrows()
    up = [arrow for arrow in found if _goes_up(arrow)]
    print(f"{len({room(module) for module in modules()})} rooms")
    for floor, rooms in reversed(FLOORS.items()):
        print(f"  {floor}: {', '.join(map(_label, rooms))}")
    print(f"{len(found)} arrows")
    for each in sorted({a for a, _ in found}):
        print(f"  {_label(each)} → {', '.join(b for a, b in found if a == each)}")
    print(f"{len(up)} arrows upwards")
    for a, b in up:
        print(f"  {a} → {b} ({', '.join(found[a, b])}): {EXCEPTIONS.get((a, b), 'NOT LISTED')}")
    print("longest files")
    for lines, path in source_files()[: args.longest]:
        print(f"  {lines:5d} {path}")
    wrong = faults(found)
    for line in wrong:
        print(f"wrong: {line}")
    if args.write and not wrong:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
