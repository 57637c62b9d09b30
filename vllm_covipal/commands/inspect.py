"""``vllm-covipal inspect``: which patches of an image each selector keeps for a question."""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_covipal.pictures import read_picture
from vllm_covipal.selectors import SELECTOR_NAMES, build_selector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("--question", required=True, metavar="TEXT", help="what is asked about it")
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="LVLM, as transformers takes"
    )
    parser.add_argument(
        "--selector",
        nargs="+",
        choices=SELECTOR_NAMES,
        metavar="NAME",
        help=f"of {', '.join(SELECTOR_NAMES)}; default: all (ppm if --ppm is given)",
    )
    parser.add_argument("--ppm", metavar="PATH", help="folder of a trained pruning module")
    parser.add_argument(
        "--keep-ratio",
        nargs="+",
        type=float,
        default=[0.25],
        metavar="R",
        help="shares of visual tokens to keep, a line of pictures each (default: 0.25)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random (default: 0)")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write (.png)")


def run(args: argparse.Namespace) -> int:
    """Write the picture. Returns the exit code."""
    image = read_picture(args.image)
    _check_out(args.out)
    names = args.selector or [n for n in SELECTOR_NAMES if n != "ppm" or args.ppm]
    # transformers loads for seconds: what is wrong above is said before.
    from vllm_covipal.commands.kept_sheet import kept_sheet
    from vllm_covipal.training.lvlm import load_lvlm

    model, processor = load_lvlm(args.model, "auto")
    module = _load_ppm(args.ppm, model, args.model) if "ppm" in names else None
    selectors = [build_selector(n, pruning_module=module, seed=args.seed) for n in names]
    sheet = kept_sheet(model, processor, image, args.question, selectors, args.keep_ratio)
    sheet.save(args.out)
    print(f"{args.out}: {', '.join(names)} at {', '.join(f'{r:g}' for r in args.keep_ratio)}")
    return 0


def _check_out(path: str) -> None:
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out must be a picture file such as kept.png, got {path!r}")
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--out: no folder {Path(path).resolve().parent}")


def _load_ppm(path: str | None, model: Any, model_name: str) -> Any:
    from vllm_covipal.core.fingerprint import fingerprint
    from vllm_covipal.core.pruner_files import load_pruning_module

    if path is None:
        raise ValueError("selector 'ppm' needs --ppm, the folder of a pruning module")
    return load_pruning_module(path, fingerprint=fingerprint(model.config), model_name=model_name)
