"""Write the predicted-versus-measured table of README.md.

    python docs/fidelity.py            score the measured rows and write the table
    python docs/fidelity.py --check    write nothing; exit 1 if the table is out of date
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

from perfmodel.validation.compare import table

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- fidelity:begin[^>]*-->\n).*?(<!-- fidelity:end -->)", re.DOTALL)


def rendered() -> str:
    """The table: kind, devices, rows, median and mean absolute error, median signed error."""
    lines = [
        "| predicted | rows | median error | mean error | bias |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, s in table(ROOT / "tests" / "data" / "measured"):
            lines.append(f"| {kind}: {s.group} | {s.rows} | {s.median:.1%} | {s.mean:.1%} | {s.bias:+.1%} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """README text with the table of this code."""
    return _BLOCK.sub(lambda m: m.group(1) + rendered() + m.group(2), text)


def main(arguments: list[str]) -> int:
    """Write or check; the exit code."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = page(before)
    if "--check" in arguments:
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
