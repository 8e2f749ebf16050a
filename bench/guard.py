"""A guard of the kernels' speed that does not depend on the clock: `make bench-guard`.

    python bench/guard.py --program build/native/guard --objects build/cp311-... [--renew]

It counts, and compares with bench/instructions.json:
- instructions that fixed work takes (tests/native/guard.cpp) with the generic and the AVX2 kernels, under callgrind;
- instructions of the innermost loops that multiply, in the disassembly of the AVX-512 and AMX kernels (which callgrind
  cannot run): for each function, over all of its instances, how many there are for a product, and how many vectors
  they move to and from the stack.

What takes over TOLERANCE more is an error; what takes less is said. Counts belong to a compiler: another one than the
table's is not compared. Where valgrind, objdump or the objects are missing, their part is skipped, and said so.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

TABLE = Path(__file__).with_name("instructions.json")
TOLERANCE = 0.02
COUNTED = ("generic", "avx2")
DISASSEMBLED = {  # what of each is told apart: the others' loops are those of the one before
    "avx512": r"vpdpbusd|vfn?madd\w+|vpmaddwd",
    "avx512bf16": r"vdpbf16ps",
    "amx": r"tdpb\w+",
}
Counts = dict[str, float]


def output(*command: str | Path) -> str:
    """What a program prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench-guard: {command[0]}: status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def executed(program: Path, isa: str) -> Counts:
    """Instructions of each case: callgrind writes a file after each call of guard_case."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--zero-before=guard_case", "--dump-after=guard_case", f"--callgrind-out-file={folder}/out"]
        names = output("valgrind", "--tool=callgrind", "-q", *options, program, isa).splitlines()
        totals = [
            int(re.search(r"^totals: (\d+)", Path(f"{folder}/out.{i + 1}").read_text(), re.MULTILINE)[1])  # type: ignore[index]
            for i in range(len(names))
        ]
    return {f"{isa}: {name}": total for name, total in zip(names, totals, strict=True)}


def loops(lines: Sequence[str]) -> Iterator[list[str]]:
    """The innermost loops of a function: from a jump's earlier target to the last such jump, and no loop within."""
    places = {int(line.split(":")[0], 16): i for i, line in enumerate(lines)}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        jump = re.search(r":\s+j\w+\s+([0-9a-f]+) <", line)
        begin = places.get(int(jump[1], 16), i + 1) if jump else i + 1
        if begin <= i:
            ends[begin] = i
    for begin, end in ends.items():
        if not any(begin < other <= end and last <= end for other, last in ends.items()):
            yield list(lines[begin : end + 1])


def disassembled(file: Path, isa: str) -> Counts:
    """For each function with products in its innermost loops: instructions, and vectors on the stack, a product."""
    found: dict[str, list[int]] = {}
    for part in output("objdump", "-dC", "--no-show-raw-insn", file).split("\n\n"):
        head, _, body = part.strip().partition("\n")
        if not (title := re.fullmatch(r"[0-9a-f]+ <(.*)>:", head)):
            continue
        while (shorter := re.sub(r"<[^<>]*>", "", title[1])) != title[1]:  # template arguments
            title = re.fullmatch(r"(.*)", shorter)
            assert title
        name = re.findall(r"(\w+)\(", title[1].replace("(anonymous namespace)", ""))[:1] or [title[1]]
        frame = r"\(%rsp|\(%rbp" if "mov    %rsp,%rbp" in body else r"\(%rsp"
        for loop in loops([line for line in body.splitlines() if re.match(r"\s*[0-9a-f]+:\s", line)]):
            products = sum(bool(re.search(rf"\s({DISASSEMBLED[isa]})\s", line)) for line in loop)
            if products:
                stack = sum(bool(re.search(frame, line)) and "mm" in line for line in loop)
                total = found.setdefault(name[0], [0, 0, 0])
                found[name[0]] = [a + b for a, b in zip(total, (len(loop), products, stack), strict=True)]
    counts: Counts = {}
    for name, (instructions, products, stack) in sorted(found.items()):
        counts[f"{isa}: {name}, instructions a product"] = round(instructions / products, 3)
        counts[f"{isa}: {name}, vectors on the stack a product"] = round(stack / products, 3)
    return counts


def compare(table: Counts, counts: Counts) -> tuple[list[str], list[str]]:
    """(what is worse, or in one of the two alone; what is better)."""
    worse, better = [], []
    for name in [*counts, *(name for name in table if name not in counts)]:
        if name not in table or name not in counts:
            worse.append(f"{name}: {'not in the table' if name in counts else 'in the table, but there no longer'}")
            continue
        was, now = table[name], counts[name]
        change = f"{name}: {was:g} -> {now:g}" + (f" ({100 * (now / was - 1):+.1f} %)" if was else "")
        if now > was * (1 + TOLERANCE):
            worse.append(change)
        elif now < was * (1 - TOLERANCE):
            better.append(change)
    return worse, better


def main() -> int:
    """Counts and compares."""
    parser = argparse.ArgumentParser(description="Instructions of the kernels against a table.")
    parser.add_argument("--program", type=Path, required=True, help="tests/native/guard.cpp, built")
    parser.add_argument("--objects", type=Path, help="the build's folder with the kernels' objects, its tiles real")
    parser.add_argument("--renew", action="store_true", help="write the table anew")
    args = parser.parse_args()
    compiler = output(args.program, "--compiler").strip()
    old = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    if not args.renew and old.get("compiler") != compiler:
        print(f"bench-guard: skipped: the table is of {old.get('compiler')}, this build of {compiler}")
        return 0
    counts: Counts = {}
    skipped = []
    if shutil.which("valgrind"):
        for isa in COUNTED:
            counts |= executed(args.program, isa)
    else:
        skipped.append(("valgrind is missing (apt-get install valgrind)", COUNTED))
    objects = {isa: Path(f"{args.objects}/CMakeFiles/kernels_{isa}.dir/native/kernels.cpp.o") for isa in DISASSEMBLED}
    if shutil.which("objdump") and all(file.exists() for file in objects.values()):
        for isa, file in objects.items():
            counts |= disassembled(file, isa)
    else:
        skipped.append((f"objdump is missing, or {next(iter(objects.values()))}", tuple(DISASSEMBLED)))
    if args.renew:
        if skipped:
            sys.exit(f"bench-guard: the table was not renewed: {skipped[0][0]}")
        text = json.dumps({"compiler": compiler, "counts": counts}, indent=1)
        TABLE.write_text(text + "\n", encoding="utf-8")
        print(f"bench-guard: wrote {len(counts)} counts of {compiler} to {TABLE}")
        return 0
    for reason, names in skipped:
        print(f"bench-guard: {', '.join(names)} skipped: {reason}")
    left_out = tuple(f"{name}:" for _, names in skipped for name in names)
    table = {name: count for name, count in old["counts"].items() if not name.startswith(left_out)}
    worse, better = compare(table, counts)
    for line in better:
        print(f"better: {line}")
    for line in worse:
        print(f"WORSE: {line}")
    if worse or better:
        print("bench-guard: if this is meant, `make bench-guard ARGS=--renew`, and commit bench/instructions.json")
    print(f"bench-guard: {len(counts)} counts, {len(worse)} worse by over {100 * TOLERANCE:g} % ({compiler})")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
