"""Peers that merge tokens do what their descriptions say, in batches as for single images; others are copies."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from names import COMMON
from tiny import answers, sample_pixel_values, tiny_model
from vwt_hf.families import family_of, find_layers, find_tower

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import peers

pytestmark = pytest.mark.newest

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
@pytest.mark.parametrize("alike", [False, True])
def test_merging_equal_patches_changes_no_answer(name, alike):
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
    merged = peers.tome_alike(model, 8, images) if alike else peers.tome(model, 8)
    with peers.count_layer_tokens(merged) as count:
        torch.testing.assert_close(answers(merged, images), expected, atol=1e-5, rtol=1e-5)
    prefix = {"deit-classifier": 2, "registers-classifier": 4}.get(name, 1)
    by_layer = [tokens / 2 - prefix for tokens in count.by_layer]
    assert (by_layer[2] < by_layer[1] <= 56) if alike else by_layer == [64, 56, 48]


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


MERGING = {
    "tome": lambda model: peers.tome(model, 8),
    "tome-decreasing": lambda model: peers.tome_decreasing(model, 8),
    "tome-alike": lambda model: peers.tome_alike(model, 8, sample_pixel_values().flip(3)),
    "pitome": lambda model: peers.pitome(model, 8),
    "ppt": lambda model: peers.ppt(model, 8, sample_pixel_values().flip(3)),
    "tps": lambda model: peers.tps(model, 0.7),
}


@pytest.mark.parametrize("merging", MERGING)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_batch_answers_as_its_images_do_alone(name, merging):
    model, images = MERGING[merging](tiny_model(name, num_hidden_layers=3)), sample_pixel_values()
    images[1] = images[1, :, :1, :1]  # one image is flat, so images differ in how many of their patches are alike
    with peers.count_layer_tokens(model) as single:
        alone = torch.cat([answers(model, image[None]) for image in images])
    with peers.count_layer_tokens(model) as count:
        torch.testing.assert_close(answers(model, images), alone, atol=1e-5, rtol=1e-4)
    assert count.by_layer == single.by_layer and count.images == 3
    assert (alone - answers(tiny_model(name, num_hidden_layers=3), images)).abs().max() > 1e-4


def test_a_decreasing_schedule_merges_twice_the_mean_at_first_and_nothing_at_last():
    model = peers.tome_decreasing(tiny_model("vit", num_hidden_layers=5), 4)
    with peers.count_layer_tokens(model) as count:
        answers(model, sample_pixel_values())
    assert [tokens // 3 for tokens in count.by_layer] == [65, 57, 51, 47, 45]
    assert torch.equal(
        answers(model, sample_pixel_values()),
        answers(peers.tome(tiny_model("vit", num_hidden_layers=5), [8, 6, 4, 2, 0]), sample_pixel_values()),
    )


@pytest.mark.parametrize(("prefix", "least"), [(1, 0.5), (2, 0.0), (4, 0.7), (1, -1.0)])
def test_alike_patches_are_merged_as_loops_over_tokens_do_it(prefix, least):
    hidden_states, keys, sizes = tokens_keys_and_sizes()
    real = [13, 11, 8]
    for image, tokens in enumerate(real):
        sizes[image, tokens:] = 0  # padding, whose keys are as good as any
    pairs = peers.match_alike(keys, prefix, least, sizes)
    result, totals = peers.merge(hidden_states, sizes, pairs)
    longest = 0
    for image, tokens in enumerate(real):
        states, own = hidden_states[image, :tokens], keys[image, :tokens]
        first, second = range(prefix, tokens, 2), range(prefix + 1, tokens, 2)
        alike = sum(
            max(torch.cosine_similarity(own[one], own[other], dim=0) for other in second) >= least for one in first
        )
        expected, expected_totals = merged_by_loops(states, own, sizes[image], prefix, int(alike))
        torch.testing.assert_close(result[image, : len(expected)], torch.stack(expected))
        assert totals[image].tolist() == expected_totals + [0] * (totals.shape[1] - len(expected))
        longest = max(longest, len(expected))
        for token in range(prefix, tokens):  # each is led to one that has a share of it
            assert totals[image, pairs.place[image, token]] >= sizes[image, token]
    assert result.shape[1] == longest


def test_patches_that_are_not_alike_enough_stay():
    _, keys, sizes = tokens_keys_and_sizes()
    assert peers.match_alike(keys, 1, 1.5, sizes) is None


def test_how_alike_patches_must_be_is_learned_so_that_r_of_an_image_are_merged_in_each_layer():
    images = torch.cat((sample_pixel_values(), torch.full((1, 3, 32, 32), 0.3)))
    model = peers.tome_alike(tiny_model("vit", num_hidden_layers=3), 8, images)
    with peers.count_layer_tokens(model) as count:
        answers(model, images)
    assert [tokens / 4 for tokens in count.by_layer] == [65, 57, 49]
    with peers.count_layer_tokens(model) as flat:
        answers(model, images[3:])
    assert flat.by_layer[1] < 57
    none = peers.tome_alike(tiny_model("vit"), 0, images)
    assert torch.equal(answers(none, images), answers(tiny_model("vit"), images))


@pytest.mark.parametrize(("tokens", "prefix", "r", "margin"), [(13, 1, 3, 0.9), (13, 1, 6, 0.3), (12, 4, 2, 0.0)])
def test_patches_are_paired_in_the_order_of_their_energy(tokens, prefix, r, margin):
    _, keys, _ = tokens_keys_and_sizes(tokens)
    pairs = peers.match_by_energy(keys, prefix, r, margin)
    for image, own in enumerate(keys):
        cosines = torch.cosine_similarity(own[:, None], own[None], dim=-1).tolist()
        energy = {}
        for one in range(prefix, tokens):
            others = [cosines[one][other] for other in range(prefix, tokens) if other != one]
            energy[one] = sum(value if value >= margin else math.exp(value - margin) - 1 for value in others)
        order = sorted(energy, key=lambda one: -energy[one])[: 2 * r]
        goes = {one: max(order[1::2], key=lambda other: cosines[one][other]) for one in order[0::2]}
        stays = [token for token in range(tokens) if token not in goes]
        assert pairs.kept[image].tolist() == stays
        assert pairs.place[image].tolist() == [stays.index(goes.get(token, token)) for token in range(tokens)]


def test_the_margin_of_the_energy_falls_from_nine_tenths(monkeypatch):
    asked, match = [], peers.match_by_energy
    monkeypatch.setattr(peers, "match_by_energy", lambda keys, *rest: asked.append(rest) or match(keys, *rest))
    answers(peers.pitome(tiny_model("deit", num_hidden_layers=3), 4), sample_pixel_values())
    assert asked == [(2, 4, pytest.approx(margin)) for margin in (0.9, 0.6, 0.3)]


def test_pruned_patches_are_squeezed_into_the_kept_one_that_is_most_like_them():
    hidden_states, _, _ = tokens_keys_and_sizes()
    scores = torch.rand(3, 11, generator=torch.Generator().manual_seed(5))
    pairs = peers.match_pruned(hidden_states, scores, 2, 4)
    result, _ = peers.merge(hidden_states, pairs.weights, pairs)
    for image, own in enumerate(hidden_states):
        kept = sorted(sorted(range(2, 13), key=lambda token: -scores[image, token - 2])[:4])
        parts = {token: [(math.e, own[token])] for token in (0, 1, *kept)}
        for token in {*range(2, 13)} - {*kept}:
            cosine, host = max((torch.cosine_similarity(own[token], own[other], dim=0).item(), other) for other in kept)
            parts[host].append((math.exp(cosine), own[token]))
        means = [sum(w * part for w, part in of) / sum(w for w, _ in of) for of in parts.values()]
        torch.testing.assert_close(result[image], torch.stack(means))
    assert torch.equal(result[:, :2], hidden_states[:, :2])


def test_the_score_is_the_attention_of_cls_that_the_model_itself_computes(monkeypatch):
    scored, score = [], peers.cls_attentions
    monkeypatch.setattr(peers, "cls_attentions", lambda merging: scored.append(score(merging)) or scored[-1])
    model = peers.tps(tiny_model("dinov2", num_hidden_layers=3), 0.5)  # prunes in the first two
    with peers.count_layer_tokens(model) as count:
        answers(model, sample_pixel_values())
    assert [tokens // 3 for tokens in count.by_layer] == [65, 33, 17] and len(scored) == 2
    plain = tiny_model("dinov2", num_hidden_layers=3)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = plain(sample_pixel_values(), output_attentions=True).attentions
    torch.testing.assert_close(scored[0], attentions[0][:, :, 0])


def test_patches_are_dropped_from_some_images_and_merged_in_others():
    hidden_states, keys, sizes = tokens_keys_and_sizes()
    scores = torch.rand(3, 11, generator=torch.Generator().manual_seed(5))
    drops = torch.tensor([True, False, True])
    pairs = peers.match_or_drop(keys, scores, drops, 2, 4)
    result, left = peers.merge(hidden_states, sizes, pairs)
    merged, summed = peers.merge(hidden_states, sizes, peers.match(keys, 2, 4))
    torch.testing.assert_close(result[1], merged[1])
    torch.testing.assert_close(left[1], summed[1])
    for image in (0, 2):
        gone = sorted(range(2, 13), key=lambda token: scores[image, token - 2])[:4]
        kept = [token for token in range(13) if token not in gone]
        assert torch.equal(result[image], hidden_states[image, kept]) and torch.equal(left[image], sizes[image, kept])
        for token in gone:  # where a head that reads every patch finds it
            alike = [torch.cosine_similarity(keys[image, token], keys[image, other], dim=0) for other in kept[2:]]
            assert pairs.place[image, token] == 2 + max(range(7), key=alike.__getitem__)


def test_ppt_drops_where_scores_vary_by_more_than_in_half_of_what_it_is_fitted_to(monkeypatch):
    images, asked, choose = sample_pixel_values(), [], peers.match_or_drop
    model = peers.ppt(tiny_model("vit", num_hidden_layers=3), 4, images)
    monkeypatch.setattr(peers, "match_or_drop", lambda *given: asked.append(given) or choose(*given))
    answers(model, images)
    plain, values = tiny_model("vit", num_hidden_layers=3), []
    plain.set_attn_implementation("eager")
    modules = find_layers(plain)[0].attention.named_modules()
    project = next(part for name, part in modules if name.endswith(("value", "v_proj")))
    project.register_forward_hook(lambda module, args, output: values.append(output))
    with torch.no_grad():
        attention = plain(images, output_attentions=True).attentions[0]
    lengths = values[0].unflatten(-1, (attention.shape[1], -1)).norm(dim=-1).transpose(1, 2)
    score = (attention[:, :, 0] * lengths).mean(dim=1)[:, 1:]
    torch.testing.assert_close(asked[0][1], score / score.sum(dim=-1, keepdim=True))
    # After the first merge tokens of several patches draw as much attention as these would.
    of_sizes = peers.Merging(1, lambda *_: None)
    of_sizes.query = of_sizes.key = torch.zeros(1, 1, 3, 2)
    of_sizes.sizes = torch.tensor([[1.0, 1.0, 2.0]])
    torch.testing.assert_close(peers.cls_attentions(of_sizes), torch.tensor([[[0.25, 0.25, 0.5]]]))
    variances = torch.cat([scores.var(dim=-1) for _, scores, *_ in asked])
    drops = torch.cat([drops for _, _, drops, *_ in asked])
    assert drops.any() and not drops.all() and variances[drops].min() > variances[~drops].max()
    with pytest.raises(peers.Unsupported, match=r"SiglipVisionModel has no CLS token.*Leave ppt out"):
        peers.ppt(tiny_model("siglip-vision"), 4, images)


def test_tps_prunes_at_the_fourth_seventh_and_tenth_of_twelve_layers_and_says_what_it_needs():
    model = peers.tps(tiny_model("vit", num_hidden_layers=12), 0.5)
    with peers.count_layer_tokens(model) as count:
        answers(model, sample_pixel_values())
    assert [tokens // 3 for tokens in count.by_layer] == [65] * 4 + [33] * 3 + [17] * 3 + [9] * 2
    images = sample_pixel_values()
    assert torch.equal(answers(peers.tps(tiny_model("vit"), 1.0), images), answers(tiny_model("vit"), images))
    with pytest.raises(ValueError, match=r"keep is 0; expected"):
        peers.tps(tiny_model("vit"), 0)
    with pytest.raises(peers.Unsupported, match="SiglipVisionModel has no CLS token"):
        peers.tps(tiny_model("siglip-vision"), 0.5)


def test_a_layer_of_an_unknown_class_is_named(monkeypatch):
    monkeypatch.setattr(peers, "PARTS", {"SomeLayer": peers.VIT})
    with pytest.raises(peers.Unsupported, match=r"ViTModel has no layer .*SomeLayer.*Leave tome, .* and tps out"):
        peers.tome(tiny_model("vit"), 4)


@pytest.mark.parametrize(
    "make",
    [
        peers.tome,
        peers.tome_decreasing,
        peers.pitome,
        lambda model, r: peers.tome_alike(model, r, sample_pixel_values()),
        lambda model, r: peers.ppt(model, r, sample_pixel_values()),
    ],
)
def test_a_negative_number_of_pairs_is_refused(make):
    with pytest.raises(ValueError, match=r"r is .*-[12]\b.*; expected how many"):
        make(tiny_model("vit"), -1)


def test_a_schedule_of_another_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="r has numbers for 3 layers; expected 2"):
        peers.tome(tiny_model("vit"), [3, 2, 1])


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
