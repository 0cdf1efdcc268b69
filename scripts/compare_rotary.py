#!/usr/bin/env python3
"""Compares two rotations for a token that is a mean of patches, under rotary positions: that of the mean of their
coordinates, and that of their medoid, the patch nearest to it.

    python scripts/compare_rotary.py --teacher MODEL --train FOLDER --images PHOTOGRAPHS --vocabulary my-words

Trained weights with rotary positions are made here: a DINOv3 of the teacher's size, which starts from the weights of
the teacher, a DINOv2 classifier, and learns its features from unlabelled images. Its answers, read by the teacher's
head, with words and without are then compared.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForImageClassification, DINOv3ViTConfig, DINOv3ViTModel

from vwt_hf import VisualVocabulary, VWTConfig, compress, count_tokens, restore
from vwt_hf.figures import agreement, divergence
from vwt_hf.image_source import open_images
from vwt_hf.layout import pool
from vwt_hf.plans import Grouped
from vwt_hf.processed_images import pixel_batches
from vwt_hf.processors import load_processor, whole_images
from vwt_hf.terminal import json_file, markdown, require_alone, run_command
from vwt_hf.whole_saves import require_writable, write_file
from vwt_hf.words import patch_places

RENAMED = (
    ("encoder.layer.", "model.layer."),
    ("patch_embeddings.projection", "patch_embeddings"),
    ("mlp.fc1", "mlp.up_proj"),
    ("mlp.fc2", "mlp.down_proj"),
    ("layernorm", "norm"),
)


def main() -> None:
    args = parse()
    require_alone()
    require_writable(args.weights, args.json)
    teacher = AutoModelForImageClassification.from_pretrained(
        args.teacher, dtype=torch.float32, trust_remote_code=False
    ).eval()
    processor = load_processor(args.teacher)
    student = student_of(teacher, processor, args).eval()  # in training positions are jittered
    vocabulary = VisualVocabulary.from_pretrained(args.vocabulary)
    batches = list(pixel_batches(sample(args.images, args.limit), processor, 20))

    def answer(name: str, plain: torch.Tensor | None = None) -> torch.Tensor:
        with count_tokens(student) as count, tqdm(batches, leave=False) as shown:
            found = torch.cat([read(teacher, student(**made).last_hidden_state) for made in shown])
        expected = found if plain is None else plain
        agree = round(100 * agreement(found, expected), 2)
        kl = round(divergence(found, expected), 4)
        rows.append({"setting": name, "tokens": round(count.mean, 1), "agree %": agree, "kl": kl})
        if args.json:
            write_file(args.json, json.dumps(rows, indent=1))
        return found

    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        answer("uncompressed, against its teacher", torch.cat([teacher(**made).logits for made in batches]))
    plain = answer("uncompressed")
    medoid = Grouped.rotate
    for threshold in args.thresholds:
        fields = {"image_mean": processor.image_mean, "image_std": processor.image_std, "threshold": threshold}
        compress(student, VWTConfig(method="inter", vocabulary=vocabulary, **fields))
        for name, rotate in (("medoid", medoid), ("mean", by_mean(student))):
            Grouped.rotate = rotate
            answer(f"threshold {threshold}, {name}", plain)
        Grouped.rotate = medoid
        restore(student)
    print(markdown(rows), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a DINOv2 classifier: its folder or Hub id")
    parser.add_argument("--train", required=True, help="folder of unlabelled images to learn the features from")
    parser.add_argument("--images", required=True, help="folder of other images to compare on")
    parser.add_argument("--vocabulary", required=True, help="words of the teacher's patch size")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--steps", type=int, default=400, help="of learning")
    parser.add_argument("--batch-size", type=int, default=8, help="images of a step")
    parser.add_argument("--limit", type=int, default=300, help="images to compare on")
    parser.add_argument("--weights", type=Path, help="file that keeps the weights learned")
    parser.add_argument("--json", type=json_file, help="also write the rows here")
    return parser.parse_args()


def student_of(teacher: Any, processor: Any, args: argparse.Namespace) -> DINOv3ViTModel:
    """A model with rotary positions that gives nearly what the teacher does: learned, or read from `--weights`."""
    student = as_rotary(teacher)
    if args.weights and args.weights.exists():
        student.load_state_dict(torch.load(args.weights, weights_only=True))
        return student
    learn(student, teacher, processor, args)
    if args.weights:
        weights = io.BytesIO()
        torch.save(student.state_dict(), weights)
        write_file(args.weights, weights.getvalue())
    return student


def as_rotary(teacher: Any) -> DINOv3ViTModel:
    """A model with rotary positions, and of all else the teacher's weights."""
    of = teacher.config
    torch.manual_seed(0)
    student = DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=of.hidden_size,
            num_hidden_layers=of.num_hidden_layers,
            num_attention_heads=of.num_attention_heads,
            intermediate_size=of.hidden_size * of.mlp_ratio,
            patch_size=of.patch_size,
            image_size=224,
            num_register_tokens=0,
            key_bias=True,
        )
    )
    weights = {}
    for name, value in teacher.base_model.state_dict().items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        weights[name] = value
    weights["embeddings.mask_token"] = weights["embeddings.mask_token"].view(1, 1, -1)
    weights.pop("embeddings.position_embeddings")
    missing, unexpected = student.load_state_dict(weights, strict=False)
    assert not unexpected and all("register_tokens" in name for name in missing), (missing, unexpected)
    return student


def learn(student: Any, teacher: Any, processor: Any, args: argparse.Namespace) -> None:
    """Has the student give the teacher's last hidden states, on images of 8 to 16 patches a side."""
    paths = sample(args.train, None)
    optimizer = torch.optim.AdamW(student.train().parameters(), lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, total_steps=args.steps)
    student.config.pos_embed_rescale = None  # no augmentation of places
    with tqdm(range(args.steps), desc="learning") as bar:
        for _step in bar:
            (made,) = pixel_batches(random.sample(paths, args.batch_size), processor, args.batch_size)
            batch = whole_images(made)
            batch = batch.flip(3) if random.random() < 0.5 else batch
            side = 14 * random.choice((8, 10, 12, 16))
            batch = torch.nn.functional.interpolate(batch, size=(side, side), mode="bilinear", antialias=True)
            with torch.no_grad():
                wanted = teacher.base_model(batch).last_hidden_state
            found = student(batch).last_hidden_state
            loss = (found - wanted).square().mean() + (found[:, 0] - wanted[:, 0]).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", share=f"{loss.item() / wanted.var().item():.3f}")


def by_mean(student: Any) -> Any:
    """What rotates tokens by the mean of their patches' coordinates; stands in for vwt_hf's own."""
    frequencies = next(module.inv_freq for module in student.modules() if hasattr(module, "inv_freq"))

    def rotate(plan: Grouped, rotations: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        layout = plan.layout
        places = patch_places(plan.grid, rotations[0].device).expand(len(layout.rows), -1, -1)
        places = pool(places, layout)
        centres = (places + 0.5) / torch.tensor(plan.grid) * 2 - 1
        angles = (2 * math.pi * centres[..., None] * frequencies).flatten(2).tile(2)
        # Tokens without a place are left as they are.
        none = torch.ones_like(layout.sizes, dtype=torch.bool)
        none.view(-1)[layout.rows[:, layout.prefix :].flatten()] = False
        angles = angles.masked_fill(none[..., None], 0.0)
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    return rotate


def read(teacher: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return teacher.classifier(torch.cat((hidden_states[:, 0], hidden_states[:, 1:].mean(1)), dim=1))


def sample(folder: str, limit: int | None) -> list[Any]:
    items = [item for _name, item in open_images(folder).part().items]
    random.seed(0)
    random.shuffle(items)
    return items[:limit]


if __name__ == "__main__":
    sys.exit(run_command("compare_rotary.py", main))
