#!/usr/bin/env python3
"""Compares clusterings of the same patches: scikit-learn's MiniBatchKMeans, faiss where it is installed, and vwt_hf's.

They run in turn. scikit-learn and faiss get all patches in memory, vwt_hf a stream of batches of 32 images. Inertia is
the mean squared distance, in raw RGB, of all patches to the nearest word found.

    python scripts/compare_clustering.py --images photographs/ --processor google/vit-base-patch16-224
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence

import torch
from sklearn.cluster import MiniBatchKMeans as ScikitLearn

from vwt_hf.image_source import open_images
from vwt_hf.processed_images import patch_batches
from vwt_hf.processors import load_processor
from vwt_hf.terminal import json_file, markdown, require_alone, require_whole_options, run_command
from vwt_hf.vocabulary.kmeans import MiniBatchKMeans, statistics
from vwt_hf.whole_saves import require_writable, write_file


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--processor", required=True, help="Hub id or folder of a model, whose image processor is used")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=2, help="each method runs this often, in turn, with other seeds")
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--json", type=json_file, help="also write the rows here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    require_alone()
    require_writable(options.json)
    require_whole_options(options, "sizes", "patch_size", "rounds", "max_images")
    source = open_images(options.images).part(max_images=options.max_images)
    processor = load_processor(options.processor)
    batches = [batch.patches for batch in patch_batches(source.items, processor, options.patch_size, 32)]
    patches = torch.cat(batches)
    print(f"{len(patches)} patches of {options.patch_size}×{options.patch_size}, {torch.get_num_threads()} threads")

    def scikit_learn(size: int, seed: int) -> torch.Tensor:
        return torch.from_numpy(ScikitLearn(size, random_state=seed).fit(patches.numpy()).cluster_centers_)

    def faiss(size: int, seed: int) -> torch.Tensor:
        import faiss

        kmeans = faiss.Kmeans(patches.shape[1], size, seed=seed + 1)
        kmeans.train(patches.numpy())
        return torch.from_numpy(kmeans.centroids)

    def vwt_hf(size: int, seed: int) -> torch.Tensor:
        kmeans = MiniBatchKMeans(size, patches.shape[1], seed=seed)
        for batch in batches:
            kmeans.update(batch)
        return kmeans.finish()[0]

    methods = [scikit_learn, faiss, vwt_hf] if importlib.util.find_spec("faiss") else [scikit_learn, vwt_hf]
    rows = []
    for size in options.sizes:
        for seed in range(options.rounds):
            for method in methods:
                start = time.perf_counter()
                words = method(size, seed)
                seconds = time.perf_counter() - start
                inertia = sum(statistics(part, words).inertia.item() for part in patches.split(16384)) / len(patches)
                rows.append(
                    {
                        "words": size,
                        "seed": seed,
                        "method": method.__name__,
                        "seconds": round(seconds, 1),
                        "inertia": round(inertia, 3),
                    }
                )
                if options.json:
                    write_file(options.json, json.dumps(rows, indent=1))
    print(markdown(rows), end="")


if __name__ == "__main__":
    sys.exit(run_command("compare_clustering.py", main))
