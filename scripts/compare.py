#!/usr/bin/env python3
r"""What compression changes in a classifier's answers: `vwt-hf evaluate` of a folder of images, as bare numbers.

Prints what `vwt-hf evaluate` prints, by default of the settings in DEFAULT_SETTINGS. --json holds a row of bare
numbers for each setting, named as the columns of the table, without intervals.

    python scripts/compare.py --model google/vit-base-patch16-224 --images photographs/
    python scripts/compare.py --model my-model --images validation/ --vwt '{"keep_ratio": 0.6, "criterion": "grid"}'
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vwt_hf.cli import main as run_cli
from vwt_hf.cli.evaluate import add_groups
from vwt_hf.cli.loading import DTYPES
from vwt_hf.evaluate_model import SHOWN
from vwt_hf.terminal import json_file, run_command, vwt_option
from vwt_hf.whole_saves import require_writable, write_file

RATIOS = (0.75, 0.5, 0.25)
DEFAULT_SETTINGS: list[Any] = [
    True,
    {"method": "local"},
    *(
        {"criterion": criterion, "keep_ratio": ratio}
        for criterion in ("variance", "random", "grid")
        for ratio in RATIOS
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of an image classifier")
    parser.add_argument("--images", required=True, help="folder of images, searched through all levels")
    parser.add_argument("--vwt", action="append", type=vwt_option, help="a setting as JSON; may be given several times")
    add_groups(parser)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", help="torch device; default: a GPU if there is one")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="use so many images, spread evenly over the folder")
    parser.add_argument("--json", type=json_file, help="also write the rows here")
    options = parser.parse_args(arguments)
    require_writable(options.json)
    command = ["evaluate", options.model, "--dataset", options.images, "--task", "classification"]
    for setting in options.vwt or DEFAULT_SETTINGS:
        command += ["--vwt", json.dumps(setting)]
    for name in ("groups", "dtype", "device", "batch_size", "limit"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        status = run_cli([*command, "--json", str(file)])
        if options.json is not None and file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            result = {"model": found["model"], "dtype": options.dtype, "rows": [bare(row) for row in found["rows"]]}
            write_file(options.json, json.dumps(result, indent=1))
    if status:
        raise SystemExit(status)


def bare(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `vwt-hf evaluate --json` as a row of the table, its figures as numbers."""
    figures = {
        title: round(scale * row["figures"][name]["value"], decimals)
        for name, (title, scale, decimals) in SHOWN.items()
        if name in row["figures"]
    }
    return {"setting": row["setting"], "vwt": row["vwt"], "tokens": row["tokens"], **figures, "seconds": row["seconds"]}


if __name__ == "__main__":
    sys.exit(run_command("compare.py", main))
