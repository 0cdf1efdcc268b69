"""Whatever the model, the images and the setting: a batch answers as its images, and restoring as never compressing.

On the newest transformers alone: test_families.py goes through every family and a setting of each kind on both ends.

The short form tries the same 700 cases at each run. VWT_LONG=1 tries 10,000 by a seed that failing tests print;
VWT_SEED gives that seed.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given

import fuzzing
from fuzzing import Case, alone, cases, inputs, new_model, outputs, plain_model, setting_of
from vwt_hf import compress, restore

pytestmark = pytest.mark.newest
LONG = os.environ.get("VWT_LONG") == "1"
TIMES = 15
"""How many times as many cases the long form tries."""
SEED = int(os.environ.get("VWT_SEED", random.randrange(2**32) if LONG else 0))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads, most of all beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if LONG:
        print(f"VWT_SEED={SEED}")
    yield
    torch.set_num_threads(threads)


def trying(examples: int, drawing: fuzzing.Drawing) -> Callable[[Callable[[Case], None]], Callable[[str], None]]:
    """Makes a claim about a case a test of every model, on so many cases each with settings as `drawing` draws."""

    def tested(claim: Callable[[Case], None]) -> Callable[[str], None]:
        def test(name: str) -> None:
            @hypothesis.seed(zlib.crc32(f"{name} {claim.__name__} {SEED}".encode()))
            @hypothesis.settings(
                max_examples=examples * TIMES if LONG else examples,
                deadline=None,
                database=None,
                print_blob=True,
                # Without explaining, which takes minutes.
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            )
            @given(cases(name, drawing))
            def check(case: Case) -> None:
                claim(case)

            check()

        test.__name__, test.__doc__ = claim.__name__, claim.__doc__
        return pytest.mark.parametrize("name", fuzzing.every_model())(test)

    return tested


@trying(3, fuzzing.draw_any)
def test_a_batch_answers_as_its_images_do_alone(case: Case) -> None:
    with plain_model(case) as model:
        compress(model, setting_of(case))
        batch = inputs(case, model)
        hypothesis.assume(not fuzzing.tossed_up(case, model, batch))
        found = outputs(model, batch, case)
        for image in range(len(case.images)):
            expected = fuzzing.of_image(outputs(model, alone(batch, image), case), 0)
            fuzzing.require_close(fuzzing.of_image(found, image), expected)


@trying(3, fuzzing.draw_ragged)
def test_packed_images_answer_as_padded_ones(case: Case) -> None:
    with plain_model(case) as model:
        batch = inputs(case, model)
        packed, padded = (
            outputs(compress(model, setting_of(case, layout=layout)), batch, case) for layout in ("packed", "padded")
        )
        fuzzing.require_close(packed, padded)


@trying(2, fuzzing.draw_plain)
def test_keeping_everything_answers_as_the_plain_model(case: Case) -> None:
    with plain_model(case) as model:
        batch = inputs(case, model)
        plain = fuzzing.real_alone(outputs(model, batch, case), batch)
        found = fuzzing.real_alone(outputs(compress(model, setting_of(case)), batch, case), batch)
        fuzzing.require_close(found, plain)


@trying(2, fuzzing.draw_any)
def test_as_many_tokens_come_out_as_the_setting_says_and_all_are_finite(case: Case) -> None:
    with plain_model(case) as model:
        batch = inputs(case, model)
        plain = outputs(model, batch, case)
        setting = setting_of(case)
        found = outputs(compress(model, setting), batch, case)
        assert found.keys() == plain.keys()
        dropped = 0 if setting.restores else case.patches - setting.patches_kept(case.patches)
        for name, value in fuzzing.of_images(found).items():
            shape = list(plain[name].shape)
            if "last_hidden_state" in name or "hidden_states" in name:
                shape[1] -= dropped
            assert list(value.shape) == shape, name
            assert value.isfinite().all() or not plain[name].isfinite().all(), name


@trying(2, fuzzing.draw_any)
def test_restore_gives_the_exact_plain_model_back(case: Case) -> None:
    model = new_model(case)
    batch = inputs(case, model)
    plain = outputs(model, batch, case)
    before = traces(model)
    outputs(compress(model, case.earlier), batch, case)
    outputs(compress(model, setting_of(case)), batch, case)
    restore(model)
    assert traces(model) == before
    fuzzing.require_equal(outputs(model, batch, case), plain)
    assert traces(model) == before


def traces(model: torch.nn.Module) -> dict[str, Any]:
    """What a model's modules hold: attributes, hooks and configs."""
    found: dict[str, Any] = {"config": model.config.to_dict(), "json": model.config.to_json_string()}
    for name, module in model.named_modules():
        held = {key: len(value) for key, value in vars(module).items() if "_hooks" in key and hasattr(value, "__len__")}
        own = module.__dict__.get("config")
        found[name] = (sorted(vars(module)), held, own and own.to_dict(), own and own._attn_implementation)
    return found


@trying(2, fuzzing.draw_any)
def test_copies_and_pickles_answer_as_their_model(case: Case) -> None:
    model = compress(new_model(case), setting_of(case))
    # Transformers' own record of hidden states, which a first call may leave in a model, cannot be pickled.
    again = pickle.loads(pickle.dumps(model))
    batch = inputs(case, model)
    expected = outputs(model, batch, case)
    copied = copy.deepcopy(model)
    plain = outputs(restore(model), batch, case)
    for other in (again, copied):
        assert other.config.vwt == setting_of(case).to_dict()
        fuzzing.require_close(outputs(other, batch, case), expected)
        fuzzing.require_equal(outputs(restore(other), batch, case), plain)


@trying(2, fuzzing.draw_any)
def test_half_precision_answers_with_finite_numbers(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = new_model(case).to(dtype)
        batch = inputs(case, model)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        # oneDNN reads beyond bfloat16 images that are no whole number of patches, in plain models, too.
        with torch.backends.mkldnn.flags(enabled=False):
            plain = outputs(model, batch, case)
            found = outputs(compress(model, setting_of(case)), batch, case)
        for name, value in found.items():
            assert value.dtype == plain[name].dtype, name
            assert value.isfinite().all() or not plain[name].isfinite().all(), name
