"""`vwt-hf evaluate`: what shortening changes in a model's answers, on any labelled or captioned images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..printable import printable
from ..terminal import do_all, json_file, markdown, options, vwt_option
from ..whole_saves import require_folder, require_writable, write_file
from .loading import add_device, add_dtype, features_class, load
from .sources import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluate_model import Evaluation
    from ..labelled_images import LabelledImages

HELP = "measure what shortening changes in a model's answers, on a data set or folder"
DESCRIPTION = """\
Shows every image to the model, uncompressed and under each setting. Prints a row for each setting, with 95 % intervals
  tokens          of an image, mean over images and layers
  top-1           share of right answers, if the images' labels have the model's names: in a folder of images, the names
                  of the folders they lie in; in a data set, the names of its classes
  worst group     the same within the group that has the lowest (classes, or what --groups or --group-column says;
                  groups of fewer than 5 images are left out)
  agree           share of images with the uncompressed model's first answer
  kl              mean divergence from its output
  max Δ logit     largest difference of a logit (without an interval; other tasks have columns of their own)
  seconds         that the answers took, reading left out

What is measured follows from the model, or --task: the labels of a classifier; labels by their names, for a model such
as CLIP (zero-shot); captions found for images and images for captions (retrieval); captions that a model such as BLIP
writes; for any other model, how alike its features are to the uncompressed model's. Images that cannot be read are
named and left out. Under `accelerate launch -m vwt_hf.cli evaluate ...` processes share the images; the figures are the
same."""
EXAMPLES = """\
examples:
  vwt-hf evaluate google/vit-base-patch16-224 --dataset validation/ --vwt true --vwt '{"keep_ratio": 0.5}'
  vwt-hf evaluate openai/clip-vit-base-patch16 --dataset ethz/food101 --split validation --streaming --limit 2000
  vwt-hf evaluate openai/clip-vit-base-patch16 --dataset nlphuji/flickr30k --task retrieval --caption-column caption
  accelerate launch --multi_gpu --num_processes 2 -m vwt_hf.cli evaluate my-model --dataset photographs/
  vwt-hf evaluate my-model --dataset imagenet/ --resume measured/       # the same again goes on where it was cut off"""
SPLITS = ("validation", "test", "val", "valid")
"""Which one is taken of a data set that has several."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a supported model")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="a folder of images, a data set saved to disk, or a Hub id",
    )
    parser.add_argument(
        "--vwt",
        action="append",
        type=vwt_option,
        metavar="JSON",
        help="a setting; may be given several times (default: the model's own or, if it has none, true)",
    )
    parser.add_argument(
        "--task",
        choices=("classification", "zero-shot", "retrieval", "captions", "features"),
        help="what to measure (default: what the model is for)",
    )
    parser.add_argument("--config", help="of a data set that has several")
    parser.add_argument("--split", help=f"of the data set (default: its only one, or the first of {', '.join(SPLITS)})")
    parser.add_argument("--streaming", action="store_true", help="read the data set without downloading it first")
    parser.add_argument("--image-column", help="of a data set (default: its first of images)")
    parser.add_argument("--label-column", help="of a data set (default: its first of classes, or label)")
    parser.add_argument(
        "--caption-column", help="of a data set: a text or a list of texts (default: caption, text, ...)"
    )
    parser.add_argument("--group-column", help="of a data set: in which group an image is (default: its label)")
    add_groups(parser)
    parser.add_argument("--prompt", default="a photo of a {}.", help="of zero-shot (default: 'a photo of a {}.')")
    parser.add_argument("--max-new-tokens", type=int, default=30, help="of a caption (default: 30)")
    parser.add_argument(
        "--limit", type=int, help="look at so many, spread evenly; of a stream the first (default: all)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images in one forward pass (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default: 0)")
    add_device(parser)
    add_dtype(parser)
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        help="keep here what was measured of each batch, and go on from it if it is there already",
    )
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write all that was measured here")
    parser.add_argument(
        "--dataset-name", help="what the figures call the data set (default: its Hub id, or its folder's name)"
    )
    parser.add_argument(
        "--card",
        metavar="FILE",
        help="write the figures into the `model-index` of this model card (README.md), made if need be; figures of "
        "another number of images are not replaced, and are an error",
    )


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--groups`, which `labelled_images.groups_of` reads."""
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help="JSON file with the group of each image of a folder: its path below the folder, and the group's name "
        "(default: folders)",
    )


def work(args: argparse.Namespace) -> None:
    require_writable(args.json, args.card)
    if args.resume is not None:
        require_folder(args.resume)
    if args.dataset_name == "":
        raise ValueError("--dataset-name is an empty text; expected a name, or leave it out.")
    if args.card is not None:
        from .model_card import read_card, require_same_images, subject_of, warn_of_another, write_card

        card = read_card(Path(args.card), args.model)  # refused before hours are spent on what goes in

    from ..evaluate_model import evaluate_model, require_options
    from ..evaluation_tasks import TASKS
    from ..processes import everywhere, joined, place

    require_options(args.vwt, args.batch_size, args.max_new_tokens, args.prompt, args.seed)

    with joined(args.device):
        (model, images, split, task, processor), _ = everywhere(lambda: prepare(args))
        is_here = Path(args.dataset).exists()
        name = args.dataset_name or (Path(args.dataset).resolve().name if is_here else args.dataset)
        if args.card is not None:
            subject = subject_of(TASKS[task].hub_name, printable(name), split, args.config)
            require_same_images(card, subject, images.total, exact=hasattr(images.data, "__len__"))
            if place()[0] == 0:
                warn_of_another(Path(args.card), card, args.model)
        result = evaluate_model(
            model,
            images,
            task=task,
            image_processor=processor,
            **options(args, "vwt", "batch_size", "prompt", "max_new_tokens", "seed", "resume"),
        )
        result.dataset = name
        if place()[0] == 0:
            outputs: list[Callable[[], object]] = []
            if args.json is not None:  # before what is printed, which nobody may read to its end
                outputs.append(lambda: write_file(args.json, json.dumps(result.to_dict(), indent=1)))
            outputs.append(lambda: report(result))
            if args.card is not None:
                outputs.append(lambda: write_card(Path(args.card), result, split, args.config))
            do_all(*outputs)


def prepare(args: argparse.Namespace) -> tuple[PreTrainedModel, LabelledImages, str | None, str, Any]:
    """The model, the images, the name of their split, the name of the task, and the image processor."""
    from transformers import AutoConfig, AutoModel

    from ..evaluation_tasks import TASKS, task_for
    from ..labelled_images import open_labelled
    from ..model_configs import plain_class
    from ..processes import usable_device
    from ..processors import load_processor, require_checkpoint

    require_checkpoint(args.model)
    device = usable_device(args.device)
    data, split = open_source(
        args.dataset, config=args.config, split=args.split, usual=SPLITS, streaming=args.streaming, described=True
    )
    columns = options(args, "image_column", "label_column", "caption_column", "group_column")
    images = open_labelled(data, **columns, groups=args.groups, limit=args.limit)
    images.source = args.dataset
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    task = args.task or task_for(config.architectures or [], config.model_type, images)
    processor = load_processor(args.model)
    auto = TASKS[task].auto
    if auto is AutoModel:
        auto = features_class(config)
    elif plain_class(type(config)) not in auto._model_mapping:  # else the error is a list of all that may
        raise ValueError(
            f"{args.model} is a model of type {config.model_type}, and the task {task} needs one that {auto.__name__} "
            f"loads; {'leave --task out for what the model is for' if args.task else 'name another by --task'}."
        )
    return load(args.model, device, auto=auto, dtype=args.dtype, vwt=None), images, split, task, processor


def report(result: Evaluation) -> None:
    """Prints what was measured."""
    of = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    print(f"{printable(result.model)}, {result.task}, {result.images} images of {printable(result.dataset)}, {of}")
    for sentence in result.said:
        print(printable(sentence))
    if result.unreadable:
        print(f"{len(result.unreadable)} images could not be read and are left out:")
        for name in result.unreadable:
            print(f"  {printable(name)}")
    print(f"\n{markdown(result.table())}", end="")
