"""``vllm-covipal inspect``: which patches of an image each selector keeps for a question."""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vllm_covipal.commands.inspect_picture import Panel, View, draw_sheet, light
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
    image = _read_image(args.image)
    _check_out(args.out)
    names = args.selector or [n for n in SELECTOR_NAMES if n != "ppm" or args.ppm]
    # transformers loads for seconds: what is wrong above is said before.
    from vllm_covipal import hf

    model, processor = _load_model(args.model)
    module = _load_ppm(args.ppm, model, args.model) if "ppm" in names else None
    selectors = [build_selector(n, pruning_module=module, seed=args.seed) for n in names]
    prompt = _prompt(processor, args.question)
    encoded = hf.encode_prompt(model, processor, prompt, images=[image])
    views = _views(image, encoded, processor.image_processor)
    lines = []
    for keep_ratio in args.keep_ratio:
        (item,) = hf.visual_items(model, encoded, keep_ratio)
        total = item.num_candidates
        panels = [Panel(f"all {total} tokens", light(views, set(range(total))))]
        place = {row: i for i, row in enumerate(item.candidate_rows().tolist())}
        for selector in selectors:
            rows = selector.select([item])[0].tolist()
            kept = {place[row] for row in rows if row in place}
            label = f"{selector.name}  {keep_ratio:g}: {len(kept)} of {total}"
            panels.append(Panel(label, light(views, kept)))
        lines.append(panels)
    draw_sheet(args.question, lines).save(args.out)
    print(f"{args.out}: {', '.join(names)} at {', '.join(f'{r:g}' for r in args.keep_ratio)}")
    return 0


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"cannot read the image {path} ({error})") from None


def _check_out(path: str) -> None:
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out must be a picture file such as kept.png, got {path!r}")
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--out: no folder {Path(path).resolve().parent}")


def _load_model(path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto")
    except OSError as error:
        raise ValueError(f"cannot load the model {path}: {error}") from None
    return model.eval(), processor


def _load_ppm(path: str | None, model: Any, model_name: str) -> Any:
    from vllm_covipal.core.fingerprint import fingerprint
    from vllm_covipal.core.pruner_files import load_pruning_module

    if path is None:
        raise ValueError("selector 'ppm' needs --ppm, the folder of a pruning module")
    return load_pruning_module(path, fingerprint=fingerprint(model.config), model_name=model_name)


def _prompt(processor: Any, question: str) -> str:
    """The question about one image, through the chat template if there is one."""
    if not processor.chat_template:
        return f"{processor.image_token}\n{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


def _views(image: Image.Image, encoded: Any, image_processor: Any) -> list[View]:
    """A picture for each grid of the item: what its patches show.

    LLaVA's towers see a crop first, which may leave a margin of the image out; every other grid
    covers the whole image.
    """
    (item,) = encoded.items
    if not item.grids:
        raise ValueError("where this model's visual tokens lie in the picture is not known")
    pixels = encoded.inputs["pixel_values"]
    views = [View(image, grid) for grid in item.grids]
    if pixels.dim() >= 4:  # pictures [..., 3, H, W]; Qwen's come as flattened patches
        crop = pixels.reshape(-1, *pixels.shape[-3:])[0]
        views[0] = View(_denormalised(crop, image_processor), item.grids[0])
    return views


def _denormalised(pixels: Any, image_processor: Any) -> Image.Image:
    """The picture that an image processor made [3, H, W] of."""
    shown = pixels.float().cpu().permute(1, 2, 0)
    if image_processor.do_normalize:
        mean, std = image_processor.image_mean, image_processor.image_std
        shown = shown * shown.new_tensor(std) + shown.new_tensor(mean)
    if image_processor.do_rescale:
        shown = shown / image_processor.rescale_factor
    return Image.fromarray(shown.round().clamp(0, 255).byte().numpy())
