"""Words in data loaders: columns that `Trainer` keeps, batches of images that differ in length, worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import default_data_collator
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.trainer_pt_utils import LengthGroupedSampler

from settings import SETTINGS, inter
from test_image_processing import write
from test_pipeline import PHOTOGRAPHS, image_processor_class
from tiny import answers, tiny_model
from vwt_hf import collate_images, compress, count_tokens, token_lengths
from vwt_hf.plans import PATCH_WORDS as NAME

setting = pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier and its image processor; nobody writes to it."""
    return write(tmp_path_factory.mktemp("classifier"))


def processed(folder: Path, setting) -> tuple[list[dict], object]:
    """What a loader gives for each photograph, and the same as a data set."""
    datasets = pytest.importorskip("datasets")
    processor = AutoImageProcessor.from_pretrained(folder, vwt=setting)
    made = processor(PHOTOGRAPHS, return_tensors="pt")
    rows = [
        {"pixel_values": pixels, NAME: words, "labels": number % 2}
        for number, (pixels, words) in enumerate(zip(made["pixel_values"], made[NAME], strict=True))
    ]
    dataset = datasets.Dataset.from_dict({"image": PHOTOGRAPHS, "labels": [row["labels"] for row in rows]})
    dataset = dataset.cast_column("image", datasets.Image())

    def process(batch):
        return processor([image.convert("RGB") for image in batch["image"]])

    return rows, dataset.map(process, batched=True).with_format("torch")


def arguments(folder: Path, **fields) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        folder, per_device_train_batch_size=2, per_device_eval_batch_size=5, report_to=[], use_cpu=True, **fields
    )


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@setting
def test_trainer_fine_tunes_by_words_of_the_loader_to_the_loss_of_plain_pytorch(adapted, setting, folder, tmp_path):
    rows, dataset = processed(folder, setting)

    def made() -> torch.nn.Module:
        model = compress(tiny_model("vit-classifier"), setting)
        if adapted:
            peft = pytest.importorskip("peft")
            torch.manual_seed(0)
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
            model = peft.get_peft_model(model, config)
        return model

    given: list[bool] = []
    fields = {"num_train_epochs": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    fields |= {"train_sampling_strategy": "sequential", "weight_decay": 0.0}
    trainer = transformers.Trainer(made(), arguments(tmp_path, **fields), train_dataset=dataset, eval_dataset=dataset)
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(NAME in kwargs), with_kwargs=True, prepend=True
    )
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    assert len(given) == 10 and all(given)

    model = made().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        for batch in torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=default_data_collator):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    with torch.no_grad():
        expected = model.eval()(**default_data_collator(rows)).loss.item()
        before = made()(**default_data_collator(rows)).loss.item()
    assert found == pytest.approx(expected, rel=1e-4) and expected != before


def test_images_of_one_size_need_no_collator_of_their_own(folder):
    rows, _ = processed(folder, inter())
    batch, expected = collate_images(rows), default_data_collator(rows)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


@setting
def test_images_with_different_numbers_of_padded_patches_make_a_batch(setting, tmp_path):
    write(tmp_path, "siglip2-vision")
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=setting)
    each = [processor(image, max_num_patches=40 + 4 * number) for number, image in enumerate(PHOTOGRAPHS)]
    batch = collate_images([{name: value[0] for name, value in made.items()} for made in each])
    assert batch["pixel_values"].shape[:2] == batch[NAME].shape == (5, 56)
    model = compress(tiny_model("siglip2-vision"), setting)
    with torch.no_grad():
        found = model(**batch).pooler_output
        alone = [model(**{k: torch.as_tensor(np.stack(v)) for k, v in made.items()}).pooler_output for made in each]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_images_with_different_numbers_of_tiles_make_the_batch_of_their_image_processor(tmp_path):
    size = {"crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 64], [64, 64]]}
    image_processor_class("llava_next")(size={"shortest_edge": 32}, **size).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt={"patch_size": 4, "dropped": "merge"})
    images = [image.resize((50 + 50 * (number % 2), 50)) for number, image in enumerate(PHOTOGRAPHS)]
    each = [{name: value[0] for name, value in processor(image).items()} for image in images]
    assert len({made["pixel_values"].shape for made in each}) == 2
    batch, expected = collate_images(each), processor(images, return_tensors="pt")
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


def test_whole_images_of_different_sizes_are_refused():
    rows = [{"pixel_values": torch.zeros(3, 32, side)} for side in (32, 64)]
    with pytest.raises(ValueError, match=r"\(3, 32, 32\) and \(3, 32, 64\); expected images or tiles of one size"):
        collate_images(rows)


@setting
def test_lengths_are_the_tokens_that_the_model_runs_on(setting, folder):
    rows, dataset = processed(folder, setting)
    words = torch.stack([row[NAME] for row in rows])
    model = compress(tiny_model("vit-classifier"), setting)
    lengths = token_lengths(words)
    for row, length in zip(rows, lengths, strict=True):
        with count_tokens(model) as count:
            answers(model, row["pixel_values"][None])
        assert count.tokens == length + 1  # CLS
    assert token_lengths(words.numpy()) == token_lengths(words.tolist()) == token_lengths(dataset[:][NAME]) == lengths
    for form in (None, "numpy", "torch"):
        assert token_lengths(dataset.with_format(form)[NAME]) == lengths
    assert token_lengths(words.unsqueeze(1).repeat(1, 3, 1)) == [3 * length for length in lengths]


def padding(lengths: list[int], order: list[int], batch_size: int) -> int:
    batches = [[lengths[place] for place in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


def test_lengths_of_images_that_have_different_numbers_of_patches_or_tiles():
    tiles = [torch.arange(12).view(3, 4), torch.zeros(5, 4, dtype=torch.int64)]
    assert token_lengths(tiles) == [12, 5] == token_lengths([one.tolist() for one in tiles])
    assert token_lengths([[7, 7, 8], [1], [-1, -1]]) == [2, 1, 0]
    assert token_lengths([]) == []


def test_tensors_are_collated_and_counted_as_they_are():
    pixels = torch.rand(2, 3, 8, 8).to(torch.bfloat16).requires_grad_()
    words = torch.arange(256, dtype=torch.uint8)
    batch = collate_images(
        [{"pixel_values": one, "patch_words": words[:some]} for one, some in zip(pixels, (256, 9), strict=True)]
    )
    assert torch.equal(batch["pixel_values"], pixels) and batch["pixel_values"].requires_grad
    assert batch["patch_words"].dtype == torch.int64 and token_lengths(batch["patch_words"]) == [256, 9]
    assert token_lengths(words[None]) == [256]


def test_numbers_of_a_row_that_a_data_set_gives_as_lists_are_single_precision():
    rows = [{"pixel_values": torch.rand(3, 4, 4).tolist(), "patch_words": [1] * 16, "label": 0} for _ in range(2)]
    found = collate_images(rows)
    assert found["pixel_values"].dtype == torch.float32 and found["pixel_values"].shape == (2, 3, 4, 4)
    for exact in (np.ones((3, 4, 4)), [np.ones((4, 4))] * 3, [torch.ones(4, 4, dtype=torch.float64)] * 3):
        assert collate_images([{"pixel_values": exact}])["pixel_values"].dtype == torch.float64


def test_a_batch_of_no_images_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        collate_images([])


def test_images_that_no_image_processor_was_given_are_refused():
    for rows in ([PHOTOGRAPHS[0]], PHOTOGRAPHS, torch.zeros(2, 3, 4, 4)):
        with pytest.raises(TypeError, match=r"features holds a .*; expected dicts, as processor\(image\) makes"):
            collate_images(rows)
    rows = ({"pixel_values": torch.zeros(3, 4, 4), "label": number, "name": "cat"} for number in (1, 2))
    assert collate_images(rows)["labels"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "words",
    [[5, 5, 5, 9], (1,), np.array([5, 9]), np.array(5), torch.tensor([5, 9]), [torch.tensor(5)], torch.empty(0)],
)
def test_words_of_one_image_alone_have_no_lengths(words):
    with pytest.raises(ValueError, match=r"of one image alone; expected \(batch, patches\)"):
        token_lengths(words)
    assert token_lengths([]) == [] and token_lengths([[], [1, 2]]) == [0, 2] and token_lengths(torch.empty(0, 4)) == []


@pytest.mark.parametrize("words", [None, 5, {"patch_words": [[1, 2]]}, torch.rand(2, 3), np.ones((2, 3)), [[0.5, 1.0]]])
def test_what_are_no_words_of_images_has_no_lengths(words):
    with pytest.raises(TypeError, match=r"patch_words .*; expected integers \(batch, patches\)"):
        token_lengths(words)


def test_what_was_made_of_images_together_is_no_list_of_them():
    with pytest.raises(TypeError, match="features is a BatchFeature; expected a list"):
        collate_images(transformers.BatchFeature({"pixel_values": torch.rand(2, 3, 8, 8)}))


def test_images_grouped_by_their_lengths_have_less_padding(folder):
    lengths = torch.randint(1, 64, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    words = [[min(place, length - 1) for place in range(64)] for length in lengths]
    assert token_lengths(words) == lengths
    grouped = list(LengthGroupedSampler(8, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    assert sorted(grouped) == list(range(400))
    assert padding(lengths, grouped, 8) < padding(lengths, list(range(400)), 8) / 5


def test_trainer_groups_images_by_the_column_of_their_lengths(folder, tmp_path):
    _, dataset = processed(folder, inter())
    dataset = dataset.map(lambda batch: {"length": token_lengths(batch[NAME])}, batched=True, remove_columns="image")
    model = compress(tiny_model("vit-classifier"), inter())
    fields = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False, "max_steps": 1}
    trainer = transformers.Trainer(model, arguments(tmp_path, **fields), train_dataset=dataset)
    sampler = trainer.get_train_dataloader().base_dataloader.batch_sampler.sampler
    assert isinstance(sampler, LengthGroupedSampler) and list(sampler.lengths) == token_lengths(dataset[:][NAME])
    assert trainer.train().training_loss > 0


class Threads(torch.utils.data.Dataset):
    def __init__(self, processor) -> None:
        self.processor = processor

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int):
        self.processor(PHOTOGRAPHS[place])
        return torch.get_num_threads()


@pytest.mark.newest
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_of_a_data_loader_computes_in_one_thread(method, folder):
    processor = AutoImageProcessor.from_pretrained(folder, vwt=inter())
    loader = torch.utils.data.DataLoader(Threads(processor), num_workers=1, multiprocessing_context=method)
    assert [int(threads) for threads in loader] == [1] * 4


FORKED = """
import sys, torch
torch.set_num_threads(4)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
import datasets, vwt_hf
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from test_pipeline import PHOTOGRAPHS
processor = AutoImageProcessor.from_pretrained(sys.argv[1], vwt={"dropped": "merge"})
expected = processor(PHOTOGRAPHS, return_tensors="pt")["patch_words"]
dataset = datasets.Dataset.from_dict({"image": PHOTOGRAPHS}).cast_column("image", datasets.Image())
process = lambda batch: processor([image.convert("RGB") for image in batch["image"]])
found = dataset.map(process, batched=True, num_proc=2).with_format("torch")[:]["patch_words"]
print(torch.equal(found, expected), torch.get_num_threads())
"""


KEPT_THREADS = """
import os, sys, torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor
import vwt_hf
from test_pipeline import PHOTOGRAPHS
processor = AutoImageProcessor.from_pretrained(sys.argv[1], vwt={"dropped": "merge"})
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
torch.set_num_threads(3)
processor(PHOTOGRAPHS, return_tensors="pt")
os._exit(torch.get_num_threads() != 3)
"""


@pytest.mark.newest
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_forked_process_has_as_many_threads_as_it_set(folder):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    run = [sys.executable, "-c", KEPT_THREADS, str(folder)]
    assert subprocess.run(run, timeout=120, env=env).returncode == 0


@pytest.mark.newest
def test_a_data_set_is_mapped_by_processes_that_are_forked_from_one_with_threads(folder):
    pytest.importorskip("datasets")
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    run = [sys.executable, "-c", FORKED, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.split() == ["True", "4"], done.stderr
