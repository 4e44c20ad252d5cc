"""The grammar of drafters: what text, folders and lists mean, and how each mistake is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from tiny_xlnet import tiny_xlnet

from specdec.drafter import Drafter
from specdec.drafters import registry
from specdec.drafters.any_subset import AnySubsetDrafter
from specdec.drafters.candidates import Candidates
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.either import Either
from specdec.drafters.look_ahead import LookAhead, LookAheadEmbeddings
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.registry import DRAFTERS, FOLDER, OBJECTS, Entry, drafter_class, listed, only_one, parse, resolve
from specdec.errors import ConfigError, DrafterError, InputError
from specdec.options.speculation import speculative_config

TARGET, SIZES = tiny_llama(0), "prompt_lookup:max_ngram_size=4"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each kind, and some that are refused."""
    root = tmp_path_factory.mktemp("folders")
    tiny_llama(1).bfloat16().save_pretrained(root / "draft")
    tiny_xlnet(vocab_size=61).save_pretrained(root / "xlnet")
    made = LookAheadEmbeddings(3, TARGET.config.hidden_size)
    made.trained_for(TARGET, {}).save(root / "look_ahead")
    (root / "head").mkdir()
    (root / "head" / "acceptance_head.json").write_text("{}")
    (root / "empty").mkdir()
    (root / "other").mkdir()
    for index in range(7):
        (root / "other" / f"{index}.txt").touch()
    shutil.copytree(root / "draft", root / "both")
    (root / "both" / "look_ahead.json").write_text("{}")
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    return root


class Options(Drafter):
    """A drafter with a value of each kind."""

    name = "options"

    def __init__(
        self,
        number: int,
        share: float = 0.5,
        word: str = "x",
        is_on: bool = False,
        path: Path | None = None,
        most: int | None = None,
        anything: object = None,
    ):
        self.given = number, share, word, is_on, path, most

    def propose(self, rows, max_tokens):
        raise AssertionError


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setitem(registry.DRAFTERS, "options", Entry(__name__, "Options"))
    monkeypatch.setattr(registry, "import_module", lambda name: __import__("sys").modules[Options.__module__])


@pytest.mark.parametrize("name", sorted(DRAFTERS))
def test_every_line_of_the_table_has_what_it_promises(name):
    made = drafter_class(name)
    assert made.name == name
    assert hasattr(made, "load") == (DRAFTERS[name].needs == FOLDER)
    if DRAFTERS[name].is_complete:
        assert isinstance(resolve(name), made)


def test_options_reach_the_constructor():
    made = resolve("prompt_lookup:max_ngram_size=4,min_ngram_size=2")
    assert isinstance(made, PromptLookup) and (made.max_ngram_size, made.min_ngram_size) == (4, 2)
    spaced = resolve(" prompt_lookup: max_ngram_size = 5 ")
    assert (spaced.max_ngram_size, spaced.min_ngram_size) == (5, 1)


def test_values_are_converted_as_annotated(options):
    made = resolve("options:number=-3,share=1e-3,word=two words,is_on=true,path=~/x,most=7")
    assert made.given == (-3, 1e-3, "two words", True, Path("~/x").expanduser(), 7)
    assert resolve("options:number=0,is_on=false").given == (0, 0.5, "x", False, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "options:share=1",
            "'options' needs arguments: number; write options:number=VALUE, or in Python pass .*Options",
        ),
        ("options:number=1.5", "number=1.5 is not a whole number; its keys are number=int, share=float, word=str"),
        ("options:number=1,share=much", "share=much is not a number; its keys"),
        ("options:number=1,is_on=yes", "is_on=yes is not a bool; write true or false"),
        ("options:number=1,anything=1", "has no key 'anything'; its keys are .*path=Path, most=int$"),
        ("options:number=1,number=2", "gives number twice; give it once"),
        ("options:number=", "number has no value; write options:number=VALUE"),
        ("options:number", "number has no value; write options:number=VALUE"),
        ("options:", "nothing follows the colon; its keys are number=int"),
        ("options:number=1,", "has no key ''"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, text, message):
    with pytest.raises(DrafterError, match=message):
        resolve(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "unknown drafter 'magic'; known are draft_model, prompt_lookup.*and folders that exist"),
        ("magic:size=3", "unknown drafter 'magic'"),
        ("./missing", r"unknown drafter './missing'.*here is none of that name"),
        ("", "drafter '' has an empty part"),
        ("prompt_lookup+", r"'prompt_lookup\+' has an empty part; write a name, or two as 'a\+b'"),
        ("prompt_lookup+magic", "unknown drafter 'magic'"),
        (
            "prompt_lookup:ngram=3",
            "'prompt_lookup' has no key 'ngram'; its keys are max_ngram_size=int, min_ngram_size",
        ),
        ("prompt_lookup:max_ngram_size=many", "max_ngram_size=many is not a whole number"),
        ("draft_model", "'draft_model' needs arguments: folder; write draft_model:folder=PATH.*DraftModel"),
        ("draft_model:vocab_size=9", "'draft_model' needs arguments: folder"),
        ("draft_model:model=x", "has no key 'model'; its keys are folder=Path, vocab_size=int"),
        ("any_subset", "'any_subset' needs arguments: folder.*AnySubsetDrafter"),
        ("look_ahead", "'look_ahead' needs arguments: folder.*LookAhead"),
        ("look_ahead:folder=", "folder has no value"),
        ("synthetic", r"cannot be written as text; in Python pass specdec.drafters.synthetic.Synthetic\(...\)"),
        ("synthetic:acceptance_rate=0.5", "cannot be written as text"),
        ("draft_model:folder=missing", "no target is known here; pass the folder to generate"),
    ],
)
def test_wrong_text_is_refused(text, message):
    with pytest.raises(DrafterError, match=message):
        resolve(text)


def test_what_the_constructor_refuses_is_refused():
    with pytest.raises(ConfigError, match=r"n-gram sizes 3..2 are not usable"):
        resolve("prompt_lookup:max_ngram_size=2,min_ngram_size=3")


def test_a_plus_b_is_the_first_that_has_a_draft(folders):
    made = resolve(f"prompt_lookup:max_ngram_size=4,min_ngram_size=2+draft_model:folder={folders / 'draft'}", TARGET)
    assert isinstance(made, Either) and isinstance(made.first, PromptLookup) and isinstance(made.second, DraftModel)
    assert made.first.max_ngram_size == 4

    three = resolve(f"prompt_lookup:min_ngram_size=3+{folders / 'look_ahead'}+prompt_lookup", TARGET)
    assert isinstance(three.second, Either) and three.name == "prompt_lookup+look_ahead+prompt_lookup"
    assert isinstance(three.second.first, LookAhead)
    with pytest.raises(DrafterError, match="each have a network with a cache of its own"):
        resolve(f"{folders / 'draft'}+{folders / 'draft'}", TARGET)


def test_names_that_are_given_need_no_folder(folders):
    model = DraftModel(tiny_llama(1))
    made = resolve("prompt_lookup+draft_model", given={"draft_model": model})
    assert made.second is model
    assert [part.name for part in parse("prompt_lookup+draft_model", ["draft_model"])] == [
        "prompt_lookup", "draft_model",
    ]  # fmt: skip
    other = resolve(f"draft_model:folder={folders / 'draft'}", TARGET, given={"draft_model": model})
    assert other is not model


@pytest.mark.parametrize(
    ("folder", "kind"), [("draft", DraftModel), ("xlnet", AnySubsetDrafter), ("look_ahead", LookAhead)]
)
def test_a_folder_says_what_it_holds(folders, folder, kind):
    """As text, as a Path and by its name."""
    name = kind.name
    for drafter in (str(folders / folder), folders / folder, f"{name}:folder={folders / folder}"):
        made = resolve(drafter, TARGET)
        assert type(made) is kind
        made.check(TARGET, 40)


def test_a_draft_model_is_loaded_as_its_target_is(folders):
    """bfloat16 on disk; the target's dtype counts. It is loaded once, and again if its files have changed."""
    made = resolve(str(folders / "draft"), TARGET)
    assert made.model.dtype == torch.float32 and not made.model.training
    assert resolve(str(folders / "draft"), TARGET).model is made.model
    half = tiny_llama(0).bfloat16()
    assert resolve(str(folders / "draft"), half).model.dtype == torch.bfloat16
    (folders / "draft" / "README.md").write_text("changed")
    assert resolve(str(folders / "draft"), TARGET).model is not made.model
    small = resolve(f"draft_model:folder={folders / 'draft'},vocab_size=50", TARGET)
    assert small.vocab_size == 50


@pytest.mark.parametrize(
    ("folder", "error", "message"),
    [
        ("empty", DrafterError, "is not a drafter's: it holds nothing; a drafter's folder holds config.json"),
        ("other", DrafterError, r"it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ...; a drafter's folder"),
        ("head", DrafterError, "acceptance_head.json, a head that .* not a drafter.*length_policy='acceptance_head'"),
        ("both", DrafterError, "two drafters; write draft_model:folder=PATH or look_ahead:folder=PATH"),
        ("broken", InputError, "config.json' is not JSON"),
    ],
)
def test_a_folder_of_another_kind_is_refused(folders, folder, error, message):
    with pytest.raises(error, match=message):
        resolve(str(folders / folder), TARGET)


@pytest.mark.parametrize("folder", ["draft", "xlnet"])
def test_a_folder_without_a_target_is_refused(folders, folder):
    for target in ({}, {"target": None}):
        with pytest.raises(DrafterError, match="is loaded on its target's device, and no target is known here"):
            speculative_config(str(folders / folder), None, **target)
    assert speculative_config(str(folders / folder), None, target=TARGET).drafter.model is not None
    assert speculative_config(folders / "look_ahead", None).drafter.name == "look_ahead"


def test_a_name_goes_before_a_folder_of_that_name(folders, monkeypatch, tmp_path):
    (tmp_path / "prompt_lookup").mkdir()
    monkeypatch.chdir(tmp_path)
    assert isinstance(resolve("prompt_lookup"), PromptLookup)


def test_a_path_may_hold_what_separates_drafters(folders, tmp_path):
    """As the whole text; within a+b it may not."""
    strange = tmp_path / "a+b,c"
    shutil.copytree(folders / "look_ahead", strange)
    assert isinstance(resolve(str(strange)), LookAhead)
    assert listed("--drafter", str(strange)) == [str(strange)]


def test_a_list_of_one_is_that_one():
    assert isinstance(resolve(["prompt_lookup"]), PromptLookup)
    made = PromptLookup()
    assert resolve([made]) is made and only_one((made,)) is made and only_one(None) is None
    config = speculative_config(["prompt_lookup"], None, max_ngram(), frozenset({"max_matching_ngram_size"}))
    assert config.drafter.max_ngram_size == 5


def max_ngram():
    from transformers import GenerationConfig

    return GenerationConfig(max_matching_ngram_size=5)


def test_a_list_holds_candidates():
    draft = tiny_llama(1)
    for given in (["prompt_lookup:max_ngram_size=4", draft, None], ("prompt_lookup", draft, "none")):
        made = resolve(given)
        assert isinstance(made, Candidates) and made.name == "prompt_lookup, draft_model, none"
        assert [type(part) for part in made.candidates] == [PromptLookup, DraftModel]
        assert made.kv_model is draft and made.needs_choice
    text = resolve("prompt_lookup:max_ngram_size=4,min_ngram_size=2,prompt_lookup+prompt_lookup:max_ngram_size=2")
    assert [part.name for part in text.candidates] == ["prompt_lookup", "prompt_lookup+prompt_lookup"]
    assert [part.name for part in resolve("prompt_lookup,none").candidates] == ["prompt_lookup"]


def test_what_is_no_list_of_candidates_is_named():
    with pytest.raises(DrafterError, match="'draft_model' and 'draft_model' each have a network with a cache"):
        resolve([DraftModel(tiny_llama(1)), tiny_llama(1)])
    with pytest.raises(DrafterError, match="unknown drafter 'magic'"):
        resolve(["prompt_lookup", "magic"])
    with pytest.raises(DrafterError, match="names no candidate"):
        resolve([])
    with pytest.raises(DrafterError, match="names no drafter; pass None"):
        resolve([None, "none"])
    with pytest.raises(DrafterError, match="a list within a list"):
        resolve(["prompt_lookup", ["prompt_lookup"]])
    one = PromptLookup()
    with pytest.raises(DrafterError, match="uses one instance twice"):
        resolve([one, one])
    made = LookAheadEmbeddings(3, TARGET.config.hidden_size).trained_for(TARGET, {})
    with pytest.raises(DrafterError, match="'look_ahead' has to draft in every step"):
        resolve(["prompt_lookup", LookAhead(made)])


@pytest.mark.parametrize("policy", ["fixed", "heuristic", "confidence", None])
def test_only_the_cost_model_takes_a_list(policy):
    config = speculative_config(["prompt_lookup", tiny_llama(1)], None, length_policy=policy)
    with pytest.raises(DrafterError, match="does not choose among drafters, and the list names prompt_lookup, draft_m"):
        config.check(TARGET, 10)
    speculative_config(["prompt_lookup", tiny_llama(1)], None, length_policy="cost_model").check(TARGET, 10)


def test_what_is_no_drafter_is_named():
    with pytest.raises(DrafterError, match="drafter is the class PromptLookup; pass a Drafter instance"):
        resolve(PromptLookup)
    with pytest.raises(DrafterError, match="drafter is a int"):
        resolve(3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none, prompt_lookup", ["none", "prompt_lookup"]),
        ("prompt_lookup:max_ngram_size=4,min_ngram_size=2,none", [f"{SIZES},min_ngram_size=2", "none"]),
        (f"{SIZES}+draft_model,prompt_lookup", [f"{SIZES}+draft_model", "prompt_lookup"]),
        ("none,none", ["none"]),
    ],
)
def test_lists_of_the_command_line(text, expected):
    assert listed("--drafter", text) == expected


def test_an_empty_entry_of_a_list_is_refused():
    with pytest.raises(DrafterError, match="--drafter 'prompt_lookup,' has an empty entry"):
        listed("--drafter", "prompt_lookup,")


def test_only_drafters_of_objects_are_not_written():
    assert [name for name, entry in DRAFTERS.items() if entry.needs == OBJECTS] == ["synthetic"]
