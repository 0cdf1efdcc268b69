"""Figures go into a model card's `model-index`, and nothing else in the card changes."""

from __future__ import annotations

import dataclasses
import os
import warnings

import huggingface_hub
import pytest
import yaml

from vwt_hf.cli import main
from vwt_hf.cli.model_card import read_card, require_same_images, subject_of, warn_of_another, write_card
from vwt_hf.evaluate_model import Evaluation, Row
from vwt_hf.evaluation_tasks import Figure

CARD = """---
model-index:
- name: first
  results:
  - task: {type: image-classification}
    dataset: {type: own, name: own}
    metrics:
    - {type: f1, value: 0.9}
    - {type: accuracy, name: of the author, value: 0.8}
    - {type: accuracy, name: accuracy (uncompressed), value: 0.1}
---
# Mine
"""


def evaluation(model: str) -> Evaluation:
    row = Row("uncompressed", None, 17.0, 1.0, {"accuracy": Figure(0.5, None)})
    return Evaluation(model, "classification", "own", 10, [], [], [row], {})


def test_a_card_keeps_all_figures_but_those_of_the_same_name(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(CARD)
    write_card(card, evaluation("me/model"), None, None)
    data = huggingface_hub.ModelCard(card.read_text()).data
    found = {(one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    author = {("f1", None): 0.9, ("accuracy", "of the author"): 0.8}
    assert data.model_name == "first" and found == author | {("accuracy", "accuracy (uncompressed)"): 0.5}


def test_a_byte_order_mark_before_the_metadata_hides_no_figures(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("\ufeff" + CARD, encoding="utf-8")
    write_card(card, evaluation("me/model"), None, None)
    assert len(huggingface_hub.ModelCard(card.read_text(encoding="utf-8")).data.eval_results) == 3


def test_figures_of_another_number_of_images_are_known_and_unreadable_images_count(tmp_path):
    result = dataclasses.replace(evaluation("me/model"), unreadable=["a.png"])
    write_card(tmp_path / "README.md", result, None, None)
    card = read_card(tmp_path / "README.md", "me/model")
    subject = subject_of("image-classification", "own", None, None)
    for total, exact in ((11, True), (11, False), (200, False), (None, True)):
        require_same_images(card, subject, total, exact)
    for total, exact in ((10, True), (12, True), (10, False)):
        with pytest.raises(ValueError, match=f"the card has figures of 11 images of 'own', and there are {total} now"):
            require_same_images(card, subject, total, exact)


def test_a_model_in_the_folder_that_one_is_in_has_the_name_of_that(tmp_path, monkeypatch):
    (tmp_path / "mine" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "run")
    names = [read_card(tmp_path / "new.md", model).entry["name"] for model in (".", "..", "../run")]
    assert names == ["run", "mine", "run"]


def test_a_card_of_several_models_is_refused_before_anything_is_read(tmp_path, capsys):
    card = tmp_path / "README.md"
    card.write_text(CARD.replace("---\n# Mine", "- name: second\n  results: []\n---\n# Mine"))
    before = card.read_text()
    assert main(["evaluate", "nowhere/at-all", "--dataset", "nowhere", "--card", str(card)]) == 2
    assert "figures of 2 models in its model-index, ['first', 'second']; expected one" in capsys.readouterr().err
    assert card.read_text() == before


@pytest.mark.parametrize(
    ("model", "warned"),
    [("second", "'second'"), ("first", None), ("me/first", None), ("first/.", None), ("/tmp/", "'tmp'")],
)
def test_a_card_of_another_model_gives_a_warning_that_names_both(model, warned, tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    card = read_card(tmp_path / "README.md", model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_another(tmp_path / "README.md", card, model)
        warn_of_another(tmp_path / "new.md", read_card(tmp_path / "new.md", model), model)
    said = [str(one.message) for one in found]
    expected = f"README.md has a model-index of 'first', and what is measured is {warned}: its figures go in there, in"
    assert [expected in one for one in said] == ([] if warned is None else [True])


def test_the_card_of_a_folder_whose_name_is_no_text_has_escapes(tmp_path):
    write_card(tmp_path / "README.md", evaluation(f"models/{os.fsdecode(b'mod' + bytes([0xE9]) + b'l')}"), None, None)
    card = huggingface_hub.ModelCard((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert card.data.model_name == "mod\\udce9l" and "# mod\\udce9l" in card.text


OTHERS = """language: [no, en]  # Norwegian, which YAML 1.1 reads as False
paper: 2304.07190
version: 1.10
build: 0010
time: 12:30:45
widget:
  - src: a.jpg
    example_title: "A 'cat'"
"""
INDEX = """model-index:
- name: mine
  results:
  - task: {type: image-classification, name: Image Classification}
    dataset: {type: other, name: Other, version: first}
    metrics: [{type: accuracy, value: 0.5, mine: kept}]
    notes: kept
"""
ENDLESS = "".join(f"n{i}: &n{i} [{', '.join([f'*n{i - 1}'] * 9) if i else 'x'}]\n" for i in range(20))
"""Each list names the one before nine times: written out, 9 to the power of 19 letters."""
INDENTED = INDEX.replace("\n", "\n  ").rstrip(" ")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "metadata",
    [OTHERS + INDEX, INDEX + OTHERS, OTHERS, INDENTED + "# last\n" + OTHERS],
    ids=["last", "first", "none", "indented"],
)
def test_all_but_the_figures_stays_to_the_byte(metadata, line_end, tmp_path):
    card = tmp_path / "README.md"
    written = f"---\n{metadata}---\n# Mine\n\n---\nmodel-index: of the text\n"
    card.write_bytes(written.replace("\n", line_end).encode() + b"\xff\n")
    write_card(card, evaluation("me/model"), None, None)
    after = card.read_bytes()
    for kept in (OTHERS, "---\n# Mine\n\n---\nmodel-index: of the text\n"):
        assert after.count(kept.replace("\n", line_end).encode()) == 1
    assert after.endswith(b"\xff\n") and (b"# last" in metadata.encode()) == (b"# last" in after)
    if line_end == "\r\n":
        assert after.count(b"\n") == after.count(b"\r\n") + 1  # the one that was so
    ((entry,),) = [yaml.safe_load(after.split(b"---")[1])["model-index"]]
    theirs = yaml.safe_load(INDEX)["model-index"][0]["results"] if "model-index" in metadata else []
    assert entry["results"][:-1] == theirs and entry["results"][-1]["metrics"][0]["name"] == "accuracy (uncompressed)"
    again = card.read_bytes()
    write_card(card, evaluation("me/model"), None, None)
    assert card.read_bytes() == again


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("{license: mit, model-index: []}", "the model-index alone cannot be replaced; write one name a line"),
        ("  license: mit", "the model-index alone cannot be replaced; write one name a line"),
        (
            "model-index: []\nlicense: mit\nmodel-index:\n- {name: a, results: []}",
            "model-index alone cannot be replaced",
        ),
        ('"model\\x2dindex": []\nlicense: mit', "model-index alone cannot be replaced"),
        ("license: &mine mit\nmodel-index:\n- &it {name: a, results: []}\nmore: *it", "no model card"),
        ("model-index:\n- name: a\n  results: [{task: {type: t}}]", "no model card"),
        (
            "model-index:\n- name: a\n  results:\n  - task: {type: t}\n    dataset: {type: d, name: d}\n"
            "    metrics: [{type: m, value: 1, name: [1]}]",
            "no model card .*unhashable",
        ),
        ("model-index: 3", "no model card"),
        ("[a]", "its metadata is a list; expected names with values"),
        (ENDLESS, r"names a value by an alias, \*, .*write the value out"),
        (f"{ENDLESS}model-index: {{a: *n19}}", r"names a value by an alias, \*, .*write the value out"),
    ],
)
def test_a_card_in_which_the_figures_alone_cannot_be_replaced_is_refused(metadata, reason, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=reason):
        read_card(card, "me/model")
    assert card.read_text() == f"---\n{metadata}\n---\n"


IN_TABLE = "expected names with values, among them "
OF_A_RESULT = "task: {type: t}, dataset: {type: d, name: d}"


@pytest.mark.parametrize(
    ("index", "found"),
    [
        ("hello", "its model-index is 'hello'; expected a list"),
        ("{name: x}", "its model-index is {'name': 'x'}; expected a list"),
        ("[[a], [b]]", f"an entry of its model-index is ['a']; {IN_TABLE}name, results"),
        ("[5]", f"an entry of its model-index is 5; {IN_TABLE}name, results"),
        ("[{results: []}, {}]", f"an entry of its model-index is {{'results': []}}; {IN_TABLE}name, results"),
        ("[{name: m, results: 3}]", "'results' in its model-index is 3; expected a list"),
        ("[{name: m, results: [{}]}]", f"a result in its model-index is {{}}; {IN_TABLE}task, dataset, metrics"),
        (
            "[{name: m, results: [{task: t, dataset: d, metrics: []}]}]",
            f"a task in its model-index is 't'; {IN_TABLE}type",
        ),
        (
            "[{name: m, results: [{task: {type: t}, dataset: {type: d}, metrics: []}]}]",
            f"a dataset in its model-index is {{'type': 'd'}}; {IN_TABLE}type, name",
        ),
        (
            f"[{{name: m, results: [{{{OF_A_RESULT}, metrics: m}}]}}]",
            "'metrics' in its model-index is 'm'; expected a list",
        ),
        (
            f"[{{name: m, results: [{{{OF_A_RESULT}, metrics: [{{type: m}}]}}]}}]",
            f"a metric in its model-index is {{'type': 'm'}}; {IN_TABLE}type, value",
        ),
        (
            f"[{{name: m, results: [{{{OF_A_RESULT}, metrics: [], source: me}}]}}]",
            "a source in its model-index is 'me'; expected names with values",
        ),
    ],
)
def test_a_model_index_that_is_damaged_is_refused_by_what_is_wrong(index, found, tmp_path, capsys):
    card = tmp_path / "README.md"
    card.write_text(f"---\nmodel-index: {index}\n---\n")
    assert main(["evaluate", "nowhere/at-all", "--dataset", "nowhere", "--card", str(card)]) == 2
    error = capsys.readouterr().err
    assert f"{card} is no model card ({found}); mend what stands" in error and error.count("\n") == 1
    assert card.read_text() == f"---\nmodel-index: {index}\n---\n"


@pytest.mark.parametrize(
    "metadata", ["{}", "null", "text: |\n  a", "text: >-\n  a", "model-index: []", "# nothing yet"]
)
def test_metadata_that_ends_in_any_way_gets_figures(metadata, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"---\n{metadata}\n---\n# Mine\n")
    write_card(card, evaluation("me/model"), None, None)
    found = yaml.safe_load(card.read_text().split("---")[1])
    assert found.pop("model-index")[0]["results"][0]["metrics"] and found.get("text", "a").strip() == "a"
    assert card.read_text().endswith("\n---\n# Mine\n")


@pytest.mark.parametrize("name", ["rows.json", "a.png", "README"])
def test_a_file_that_is_no_card_gets_no_metadata(name, tmp_path):
    (tmp_path / name).write_bytes(b"mine\n")
    with pytest.raises(ValueError, match=f"{name} is no model card: it has no metadata .* does not end in .md. Name"):
        read_card(tmp_path / name, "me/model")
    (tmp_path / name).write_bytes(b"---\nlicense: mit\n---\n")
    assert read_card(tmp_path / name, "me/model").metadata == "license: mit"


def test_figures_of_another_source_stay_whatever_they_are_of(tmp_path):
    card = tmp_path / "README.md"
    theirs = """model-index:
- name: mine
  results:
  - task: {type: image-classification}
    dataset: {type: own, name: own}
    metrics: [{type: accuracy, name: accuracy (uncompressed), value: 0.1, args: {images: 3}}]
    source: {name: a, url: "https://a"}
  - task: {type: object-detection}
    dataset: {type: own, name: own}
    metrics: []
"""
    card.write_text(f"---\n{theirs}---\n")
    write_card(card, evaluation("me/model"), None, None)
    results = yaml.safe_load(card.read_text().split("---")[1])["model-index"][0]["results"]
    assert results[:2] == yaml.safe_load(theirs)["model-index"][0]["results"] and len(results) == 3


def test_a_text_without_metadata_gets_some_and_a_number_of_images_that_is_none_says_nothing(tmp_path):
    card = tmp_path / "README.md"
    card.write_bytes("\ufeff# Mine\n".encode())
    write_card(card, evaluation("me/model"), None, None)
    assert card.read_text(encoding="utf-8").startswith("---\nmodel-index:") and card.read_text().endswith("# Mine\n")
    card.write_text(card.read_text().replace("unreadable: 0", "unreadable: none").replace("images: 10", "images: ten"))
    write_card(card, evaluation("me/model"), None, None)
    (figure,) = yaml.safe_load(card.read_text().split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert figure["args"]["images"] == 10
