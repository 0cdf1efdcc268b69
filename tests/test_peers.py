"""Token Merging is what its description says, in batches as for single images; other peers are copies of the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tiny import COMMON, answers, sample_pixel_values, tiny_model
from vwt_hf.families import family_of, find_tower

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import peers

CLASSIFIERS = ["vit-classifier", "deit-classifier", "dinov2-classifier", "registers-classifier", "clip-classifier"]


def tokens_keys_and_sizes(tokens: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(3, tokens, 6, generator=generator)
    keys = torch.randn(3, tokens, 4, generator=generator)
    return hidden_states, keys, torch.randint(1, 5, (3, tokens), generator=generator).float()


def merged_by_loops(
    hidden_states: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor, prefix: int, r: int
) -> tuple[list[torch.Tensor], list[float]]:
    """One image's tokens after a merge, in order: (tokens, ...) each."""
    first = range(prefix, len(keys), 2)
    second = range(prefix + 1, len(keys), 2)
    best = {}
    for one in first:
        cosines = {other: torch.cosine_similarity(keys[one], keys[other], dim=0).item() for other in second}
        partner = max(cosines, key=cosines.get)
        best[one] = (cosines[partner], partner)
    goes = {one: best[one][1] for one in sorted(best, key=lambda one: -best[one][0])[:r]}
    tokens, totals = [], []
    for place in range(len(keys)):
        if place not in goes:
            members = [place, *(one for one, partner in goes.items() if partner == place)]
            total = sum(sizes[member].item() for member in members)
            tokens.append(sum(sizes[member] * hidden_states[member] for member in members) / total)
            totals.append(total)
    return tokens, totals


@pytest.mark.parametrize("name", COMMON)
def test_merging_no_pair_is_the_plain_model(name):
    expected = answers(tiny_model(name), sample_pixel_values())
    assert torch.equal(answers(peers.tome(tiny_model(name), 0), sample_pixel_values()), expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_merging_equal_patches_changes_no_answer(name):
    # Only if sizes reach every attention and the mean of the patches; four colours, so each patch has equal ones.
    model = tiny_model(name, num_hidden_layers=3)
    embeddings = find_tower(model, family_of(model)).embeddings
    positions = getattr(embeddings, "position_embeddings", None)
    positions = embeddings.position_embedding if positions is None else positions
    with torch.no_grad():
        (positions.weight if isinstance(positions, nn.Embedding) else positions).zero_()
    colours = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    grid = torch.randint(0, 4, (2, 8, 8), generator=torch.Generator().manual_seed(4))
    images = colours[grid].permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    expected = answers(model, images)
    merged = peers.tome(model, 8)
    with peers.count_layer_tokens(merged) as count:
        torch.testing.assert_close(answers(merged, images), expected, atol=1e-5, rtol=1e-5)
    prefix = {"deit-classifier": 2, "registers-classifier": 4}.get(name, 1)
    assert count.mean == prefix + (64 + 56 + 48) / 3


def test_each_layer_merges_r_pairs_and_never_more_than_half_of_its_patches():
    model = peers.tome(tiny_model("vit", num_hidden_layers=4), 20)
    with peers.count_layer_tokens(model) as count:
        hidden_states = answers(model, sample_pixel_values())
    assert count.mean == (65 + 45 + 25 + 13) / 4
    assert hidden_states.shape[1] == 65
    assert all(len(image.unique(dim=0)) == 1 + 6 for image in hidden_states)


@pytest.mark.parametrize(("tokens", "prefix", "r"), [(13, 1, 3), (13, 1, 6), (13, 2, 5), (12, 4, 1), (3, 1, 1)])
def test_a_merge_is_what_loops_over_tokens_give(tokens, prefix, r):
    hidden_states, keys, sizes = tokens_keys_and_sizes(tokens)
    pairs = peers.match(keys, prefix, r)
    result, totals = peers.merge(hidden_states, sizes, pairs)
    for image in range(len(keys)):
        expected, expected_totals = merged_by_loops(hidden_states[image], keys[image], sizes[image], prefix, r)
        torch.testing.assert_close(result[image], torch.stack(expected))
        assert totals[image].tolist() == expected_totals


def test_a_merge_keeps_the_sum_of_size_times_token():
    hidden_states, keys, sizes = tokens_keys_and_sizes()
    result, totals = peers.merge(hidden_states, sizes, peers.match(keys, 1, 5))
    before, after = (sizes[..., None] * hidden_states).sum(1), (totals[..., None] * result).sum(1)
    torch.testing.assert_close(after, before)
    assert torch.equal(totals.sum(1), sizes.sum(1))


@pytest.mark.parametrize("prefix", [1, 4])
def test_prefix_tokens_stay_exactly_as_they_are_however_alike_their_keys(prefix):
    hidden_states, keys, sizes = tokens_keys_and_sizes()
    keys[:, : prefix + 3] = 1.0
    sizes[:, :prefix] = 1.0
    result, totals = peers.merge(hidden_states, sizes, peers.match(keys, prefix, (13 - prefix) // 2))
    assert torch.equal(result[:, :prefix], hidden_states[:, :prefix])
    assert torch.equal(totals[:, :prefix], sizes[:, :prefix])


@pytest.mark.parametrize(("name", "prefix"), [("vit", 1), ("deit", 2), ("dinov2", 1), ("registers", 4), ("clip", 1)])
def test_a_family_merges_behind_all_of_its_prefix_tokens(name, prefix, monkeypatch):
    asked, match = [], peers.match
    monkeypatch.setattr(peers, "match", lambda keys, *rest: asked.append(rest) or match(keys, *rest))
    answers(peers.tome(tiny_model(name), 3), sample_pixel_values())
    assert asked == [(prefix, 3)] * 2


def test_every_patch_is_led_to_the_token_that_holds_it():
    _, keys, sizes = tokens_keys_and_sizes()
    pairs = peers.match(keys, 1, 5)
    own = torch.eye(13).expand(3, -1, -1)
    result, _ = peers.merge(own, torch.ones_like(sizes), pairs)
    # A merge of unit vectors has a share of each member at its place.
    assert (peers.take(result, pairs.place).diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_batch_answers_as_its_images_do_alone(name):
    model, images = peers.tome(tiny_model(name), 8), sample_pixel_values()
    alone = torch.cat([answers(model, image[None]) for image in images])
    torch.testing.assert_close(answers(model, images), alone, atol=1e-5, rtol=1e-4)
    assert (alone - answers(tiny_model(name), images)).abs().max() > 1e-4


def test_a_layer_of_an_unknown_class_is_named(monkeypatch):
    monkeypatch.setattr(peers, "PARTS", {"SomeLayer": peers.VIT})
    with pytest.raises(peers.Unsupported, match=r"ViTModel has no layer .*SomeLayer.*Leave tome out"):
        peers.tome(tiny_model("vit"), 4)


def test_a_negative_number_of_pairs_is_refused():
    with pytest.raises(ValueError, match="r is -1; expected"):
        peers.tome(tiny_model("vit"), -1)


def test_int8_is_a_copy_whose_linear_layers_take_a_quarter():
    model, images = tiny_model("vit-classifier"), sample_pixel_values()
    expected = answers(model, images)
    quantised = peers.dynamic_int8(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    saved = peers.weight_bytes(model) - peers.weight_bytes(quantised)
    assert saved == sum(3 * module.weight.numel() for module in linear)
    assert 0 < (answers(quantised, images) - expected).abs().max() < 0.1
    assert torch.equal(answers(model, images), expected)


def test_int8_says_what_it_runs_on():
    with pytest.raises(peers.Unsupported, match=r"float32 models on a CPU; this one is torch.bfloat16 on cpu"):
        peers.dynamic_int8(tiny_model("vit").to(torch.bfloat16))


def test_bf16_is_a_copy():
    model = tiny_model("vit")
    assert peers.bfloat16(model).dtype == torch.bfloat16
    assert model.dtype == torch.float32
