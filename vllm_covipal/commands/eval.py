"""``vllm-covipal eval``: right answers against visual tokens kept, method by method."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SERVED = "served"
KEEP_RATIOS = (0.5, 0.25, 0.1, 0.05)
DEFAULT_METHODS = "full,ppm,random,grid,divprune,cdpruner"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--model", metavar="PATH", help="LVLM, as transformers takes")
    parser.add_argument("--endpoint", metavar="URL", help="a served model instead of --model")
    parser.add_argument(
        "--add-special-tokens",
        action="store_true",
        help="with --endpoint: put the begin-of-text token in front, where the chat template "
        "leaves it out and the model was trained with it (LLaVA-1.5, models/shapes)",
    )
    parser.add_argument("--ppm", metavar="PATH", help="folder of a trained pruning module")
    parser.add_argument("--blind-ppm", metavar="PATH", help="one trained with max_text_tokens 0")
    parser.add_argument(
        "--data", metavar="FILE", help="samples in the LLaVA format; default: generated scenes"
    )
    parser.add_argument(
        "--scenes",
        choices=("shapes", "crowd"),
        default="shapes",
        help="whose generated scenes: models/shapes' or models/crowd's (default: shapes)",
    )
    parser.add_argument("--images", default=".", metavar="DIR", help="where its image paths start")
    parser.add_argument("--num-questions", type=int, default=400, metavar="N", help="default: 400")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the generated questions (held out from training)"
    )
    parser.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        metavar="A,B",
        help=f"rows of the table, or 'everything' (default: {DEFAULT_METHODS})",
    )
    parser.add_argument(
        "--keep-ratio", type=float, nargs="+", default=list(KEEP_RATIOS), metavar="R"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=4,
        metavar="N",
        help="of an answer, which counts as right word for word (default: 4)",
    )
    parser.add_argument("--dtype", default="auto", help="of the model's weights (default: auto)")
    parser.add_argument("--num-threads", type=int, metavar="N", help="torch's, on a CPU")
    parser.add_argument(
        "--rows-from",
        action="append",
        default=[],
        metavar="FILE",
        help="--json of another run over the same questions: its rows come first in the table, "
        "but for those measured again",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures, question by question")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    parser.add_argument("--plot", metavar="FILE", help="write a plot (needs matplotlib)")
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help="write pictures of what the methods that are selectors keep, a file for a question",
    )
    parser.add_argument(
        "--num-pictures", type=int, default=8, metavar="N", help="the first N questions (default 8)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure. Returns the exit code."""
    if (args.model is None) == (args.endpoint is None):
        raise ValueError("give either --model or --endpoint")
    for keep_ratio in args.keep_ratio:
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"--keep-ratio must be in (0, 1], got {keep_ratio}")
    if args.pictures and args.endpoint:
        raise ValueError("--pictures needs --model: a server does not say what it keeps")
    for name in ("num_questions", "max_new_tokens", "num_pictures"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, name)}")
    if args.pictures and not Path(args.pictures).is_dir():
        raise ValueError(f"--pictures: no folder {args.pictures}")
    for name in ("json", "markdown", "plot"):  # written last: not to fail after hours
        path = getattr(args, name)
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"--{name}: no folder {Path(path).parent}")
    # What follows loads for seconds: what is wrong above is said before.
    from vllm_covipal.bench.provenance import provenance
    from vllm_covipal.evaluation.questions import digest
    from vllm_covipal.evaluation.table import markdown, plot

    questions = _questions(args)
    earlier = [_read_rows(path, questions, args) for path in args.rows_from]
    results = _served(args, questions) if args.endpoint else _local(args, questions)
    every = [*(row for _, rows in earlier for row in rows), *results.rows]
    results.rows = list({(row.method, row.keep_ratio): row for row in every}.values())
    text = markdown(results)
    print(text, end="")
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")
    if args.json:
        made_by = provenance() | {"num_questions": len(questions), "seed": args.seed}
        made_by["scenes"] = args.scenes
        if args.data:
            made_by["data"] = digest(questions)
        made_by["command"] = " ".join(["vllm-covipal", *sys.argv[1:]])
        made_by["rows_from"] = [of_report for of_report, _ in earlier]
        document = {"provenance": made_by, "rows": results.as_json()}
        text = json.dumps(document, separators=(",", ":"))
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot)
    return 0


def _questions(args: argparse.Namespace) -> Any:
    from vllm_covipal.evaluation.questions import SEED, file_questions, shapes_questions
    from vllm_covipal.evaluation.scenes import WORLDS

    if args.data:
        return file_questions(args.data, args.images, args.num_questions)
    args.seed = SEED if args.seed is None else args.seed
    return shapes_questions(args.num_questions, seed=args.seed, world=WORLDS[args.scenes])


def _served(args: argparse.Namespace, questions: Any) -> Any:
    from vllm_covipal.evaluation.accuracy import Results, row_of
    from vllm_covipal.evaluation.endpoint import Endpoint

    endpoint = Endpoint(
        args.endpoint,
        max_new_tokens=args.max_new_tokens,
        add_special_tokens=args.add_special_tokens,
    )
    results = Results(questions)
    for keep_ratio in (1.0, *args.keep_ratio):
        said = endpoint.answer(questions, keep_ratio)
        results.rows.append(row_of(SERVED, keep_ratio, questions, [said]))
    return results


def _read_rows(
    path: str, questions: Any, args: argparse.Namespace
) -> tuple[dict[str, Any], list[Any]]:
    """What made a report of ``--json``, and its rows.

    Raises:
        ValueError: if it is none, or over other questions.
    """
    from vllm_covipal.evaluation.accuracy import Row
    from vllm_covipal.evaluation.questions import digest

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        made_by = document["provenance"]
        rows = [
            Row(
                row["method"],
                row["keep_ratio"],
                tuple(row["rights"]),
                row["visual_tokens_per_layer"],
            )
            for row in document["rows"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--rows-from {path}: not a report of --json ({error!r})") from None
    theirs = (made_by["num_questions"], made_by["seed"], made_by.get("scenes", "shapes"))
    ours = (len(questions), args.seed, args.scenes)
    of_file = digest(questions) if args.data else None
    if made_by.get("data") != of_file:
        raise ValueError(f"--rows-from {path}: of another file of questions than --data")
    if theirs != ours:
        raise ValueError(
            f"--rows-from {path}: scenes of {theirs[2]}, {theirs[0]} questions of seed "
            f"{theirs[1]}, here {ours[0]} of seed {ours[1]}, scenes of {ours[2]}"
        )
    return made_by, rows


def _local(args: argparse.Namespace, questions: Any) -> Any:
    import torch

    from vllm_covipal.evaluation.accuracy import measure
    from vllm_covipal.evaluation.methods import METHODS, Evaluator, encode_questions
    from vllm_covipal.training.lvlm import load_lvlm

    methods = _methods(args, METHODS)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model, processor = load_lvlm(args.model, args.dtype)
    _check_answers(args, questions, processor.tokenizer)
    evaluator = Evaluator(
        model,
        processor,
        ppm=_module(args.ppm, model, args.model),
        blind_ppm=_module(args.blind_ppm, model, args.model),
        max_new_tokens=args.max_new_tokens,
    )
    if args.pictures:
        _draw(args, model, processor, methods, questions)
    asked = encode_questions(model, processor, questions)
    return measure(evaluator, asked, methods, args.keep_ratio)


def _check_answers(args: argparse.Namespace, questions: Any, tokenizer: Any) -> None:
    """See that a right answer can be said.

    Raises:
        ValueError: if ``--max-new-tokens`` cuts it off, so that every method would be wrong.
    """

    def num_tokens(answer: str) -> int:
        return len(tokenizer(answer, add_special_tokens=False)["input_ids"])

    longest = max((question.answer for question in questions), key=num_tokens)
    if num_tokens(longest) > args.max_new_tokens:
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens}: the answer {longest!r} has "
            f"{num_tokens(longest)} tokens; give at least as many"
        )


def _draw(
    args: argparse.Namespace, model: Any, processor: Any, methods: list[str], questions: Any
) -> None:
    """Pictures of the first questions, and under them those methods that are selectors."""
    from vllm_covipal.commands.kept_sheet import kept_sheet
    from vllm_covipal.selectors import SELECTOR_NAMES, build_selector

    module = _module(args.ppm, model, args.model)
    names = [name for name in methods if name in SELECTOR_NAMES]
    selectors = [build_selector(name, pruning_module=module, seed=0) for name in names]
    for number, question in enumerate(questions[: args.num_pictures]):
        sheet = kept_sheet(
            model, processor, question.load(), question.text, selectors, args.keep_ratio
        )
        sheet.save(Path(args.pictures) / f"{number:03}-{question.type}.png")


def _methods(args: argparse.Namespace, known: tuple[str, ...]) -> list[str]:
    """The rows asked for, without those that lack a module where the user did not name them."""
    from vllm_covipal.evaluation.methods import BLIND

    def has_module(name: str) -> bool:
        if name == BLIND:
            return args.blind_ppm is not None
        return args.ppm is not None or not name.startswith("ppm")

    if args.methods == "everything":
        return [name for name in known if has_module(name)]
    # Names with a comma of their own come first.
    left, chosen = args.methods, []
    while left:
        name = next(
            (n for n in sorted(known, key=len, reverse=True) if f"{left},".startswith(f"{n},")),
            None,
        )
        if name is None:
            raise ValueError(f"--methods: {left!r} is none of: {'; '.join(known)}")
        chosen.append(name)
        left = left[len(name) + 1 :]
    if args.methods == DEFAULT_METHODS:
        chosen = [name for name in chosen if has_module(name)]
    return chosen


def _module(path: str | None, model: Any, model_name: str) -> Any:
    from vllm_covipal.core.fingerprint import fingerprint
    from vllm_covipal.core.pruner_files import load_pruning_module

    if path is None:
        return None
    return load_pruning_module(path, fingerprint=fingerprint(model.config), model_name=model_name)
