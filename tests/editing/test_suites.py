"""Suites: roles and labels, files of this package and of others, and those drawn for Emoji Diffusion."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import editing
from benchmarks.emoji import world
from editing.emojisuite import FACTS
from editing.suites import ROLES, Suite, Trial
from mediation import bundled

TRIALS = (
    Trial("a cat, in ink", "efficacy", "a cat, in noto", "style", "ink", "noto"),
    Trial("ein Käfer", "quality"),
)


def test_what_is_left_out_follows_from_the_role():
    kept = Trial("a dog", "specificity", factor="object", source="dog")
    assert (kept.target_prompt, kept.target, kept.changes) == ("a dog", "dog", False)
    erased = Trial("a cat", "generality", "a thing", "object", "cat")
    assert (erased.target, erased.changes) == ("", True)


@pytest.mark.parametrize("name", ["suite.csv", "suite.json"])
def test_a_suite_is_read_as_it_was_saved(tmp_path, name):
    suite = Suite(TRIALS)
    suite.save(tmp_path / name)
    assert Suite.read(tmp_path / name) == suite


def test_lists_of_other_projects_get_their_roles_from_the_pairs(tmp_path):
    """As Imagenette's list (a class and columns of no interest), and as UnlearnCanvas: a style and an object."""
    imagenette = (
        "case_number,prompt,evaluation_seed,class\n0,a photo of a French horn,7,French horn\n1,a tench,8,tench\n"
    )
    (tmp_path / "imagenette.csv").write_text(imagenette)
    first, second = Suite.read(tmp_path / "imagenette.csv", pairs={"French horn": "guitar"})
    expected = Trial("a photo of a French horn", "efficacy", "a photo of a guitar", "class", "French horn", "guitar")
    assert first == expected
    assert second == Trial("a tench", "specificity", factor="class", source="tench")
    canvas = [
        {"prompt": "A Bear image in Cubism style.", "theme": "Cubism", "object": "Bear"},
        {"prompt": "A Bear image in Van Gogh style.", "theme": "Van Gogh", "object": "Bear", "seed": 188},
    ]
    (tmp_path / "canvas.json").write_text(json.dumps(canvas))
    first, second = Suite.read(tmp_path / "canvas.json", pairs={"Van Gogh": ""})
    assert first == Trial("A Bear image in Cubism style.", "specificity", factor="theme", source="Cubism")
    expected = Trial(canvas[1]["prompt"], "efficacy", "A Bear image in style.", "theme", "Van Gogh")
    assert second == expected
    (bear, *_) = Suite.read(tmp_path / "canvas.json", pairs={"Bear": "Dog"})
    assert (bear.factor, bear.target, bear.target_prompt) == ("object", "Dog", "A Dog image in Cubism style.")


CANVAS = (
    ("A Bear image in Van Gogh style.", "Van_Gogh", "Bear"),
    ("A Cat image in Van Gogh style.", "Van_Gogh", "Cat"),
    ("A Bear image in Cubism style.", "Cubism", "Bear"),
    ("A Cat image in Cubism style.", "Cubism", "Cat"),
)


def canvas(folder, pairs):
    rows = [{"prompt": prompt, "theme": theme, "object": kind} for prompt, theme, kind in CANVAS]
    (folder / "canvas.json").write_text(json.dumps(rows))
    return list(Suite.read(folder / "canvas.json", pairs=pairs))


def test_a_list_is_judged_by_what_is_edited(tmp_path):
    """Neighbours of an object are other objects, not the themes that happen to come first in the file."""
    by_object = canvas(tmp_path, {"bear": "Dog"})
    assert [(trial.role, trial.factor, trial.source) for trial in by_object] == [
        ("efficacy", "object", "Bear"),
        ("specificity", "object", "Cat"),
        ("efficacy", "object", "Bear"),
        ("specificity", "object", "Cat"),
    ]
    assert by_object[0].target_prompt == "A Dog image in Van Gogh style."
    by_theme = canvas(tmp_path, {"Van Gogh": "cubism"})
    assert [(trial.role, trial.factor, trial.source, trial.target) for trial in by_theme] == [
        ("efficacy", "theme", "Van_Gogh", "Cubism"),
        ("efficacy", "theme", "Van_Gogh", "Cubism"),
        ("specificity", "theme", "Cubism", "Cubism"),
        ("specificity", "theme", "Cubism", "Cubism"),
    ], "labels are those of the file, which a classifier knows"
    both = canvas(tmp_path, {"Van Gogh": "Cubism", "Bear": "Dog"})
    assert [(trial.role, trial.factor, trial.source) for trial in both] == [
        ("efficacy", "theme", "Van_Gogh"),
        ("efficacy", "object", "Bear"),
        ("efficacy", "theme", "Van_Gogh"),
        ("efficacy", "object", "Bear"),
        ("specificity", "theme", "Cubism"),
        ("specificity", "object", "Cat"),
    ]
    assert both[0].target_prompt == both[1].target_prompt == "A Dog image in Cubism style."


def test_prompts_repeated_for_other_seeds_are_one_trial(tmp_path):
    """As in Imagenette's lists, which have hundreds of rows for a class."""
    rows = "".join(f"{i},a photo of a {kind},{i},{kind}\n" for i, kind in enumerate(["tench", "horn"] * 3))
    (tmp_path / "list.csv").write_text(f"case_number,prompt,evaluation_seed,class\n{rows}")
    suite = Suite.read(tmp_path / "list.csv", pairs={"tench": "horn"})
    assert [(trial.prompt, trial.role) for trial in suite] == [
        ("a photo of a tench", "efficacy"),
        ("a photo of a horn", "specificity"),
    ]


def test_a_column_may_tell_what_is_to_be_drawn(tmp_path):
    (tmp_path / "list.csv").write_text("prompt,class,target_prompt\na fish,tench,a trumpet\na horn,horn,\n")
    first, second = Suite.read(tmp_path / "list.csv", pairs={"tench": "horn"})
    assert (first.target_prompt, second.target_prompt) == ("a trumpet", "a horn")


@pytest.mark.parametrize(
    ("name", "content", "pairs", "message"),
    [
        (
            "a.csv",
            "prompt,class\na tench,tench\n",
            {"tench": "a", "trout": ""},
            "no row .* the label 'trout'; .* tench",
        ),
        (
            "a.csv",
            "prompt,class\na fish,tench\n",
            {"tench": "horn"},
            "'tench' for the prompt 'a fish', .* target_prompt",
        ),
        ("a.csv", "prompt,role,tagret\na,quality,b\n", None, "unknown columns .'tagret'"),
        ("a.csv", "prompt\na cat\n", None, "no column role: pass pairs to tell roles by labels"),
        ("a.csv", "prompt,role\n", None, "has no trials"),
        ("a.json", "{}", None, "has no trials"),
        ("a.csv", "prompt,role\na,speed\n", None, "role is one of efficacy, .*; got 'speed'"),
        ("a.csv", "prompt,role\n ,quality\n", None, "prompt is empty"),
        ("a.csv", "prompt,role,source\na,quality,ink\n", None, "both a factor and a source label"),
        ("a.csv", "prompt,role\na,quality\na,quality\n", None, "twice in the same role"),
        ("a.csv", "prompt,seed\na,1\n", {"a": "b"}, "needs a column prompt and one of style, theme"),
        ("a.txt", "a", None, "suites are .csv or .json files, got 'a.txt'"),
    ],
)
def test_files_that_are_no_suite_are_refused(tmp_path, name, content, pairs, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Suite.read(tmp_path / name, pairs=pairs)


def test_facts_and_words_are_those_of_the_emoji_world():
    assert FACTS == world.FACTS
    assert {f: tuple(labels) for f, labels in bundled.load_probe().config.factors.items()} == world.FACTORS


PAIRS = [
    ("ink", "noto"),
    ("cat", "soccer ball"),
    ("grapes", ""),
    ("red", "blue"),
    ("the mascot", "owl"),
    ("two", "three"),
    ("close up", "distant view"),
]
# words of captions -> what the probe calls it, where that is something else
LABELS = FACTS | {"one": "1", "two": "2", "three": "3", "distant view": "distant"}


@given(pair=st.sampled_from(PAIRS), seed=st.integers(0, 100))
def test_drawn_prompts_play_their_role(pair, seed):
    source, target = pair
    suite = editing.emoji_suite({source: target}, n=6, seed=seed)
    assert [trial.role for trial in suite] == [role for role in ROLES for _ in range(6)]
    for trial in suite:
        assert (f" {source} " in f" {trial.prompt} ") == trial.changes
        if trial.changes:
            assert trial.source == LABELS.get(source, source)
            assert (trial.target, target in trial.target_prompt) == (LABELS.get(target, target), True)
            assert f" {source} " not in f" {trial.target_prompt} "
        else:
            assert trial.target_prompt == trial.prompt
            known = {words for words, label in LABELS.items() if label == trial.source} | {trial.source}
            assert any(word in trial.prompt for word in known), "what is judged is in the caption"
    other = {trial.factor for trial in suite if trial.role == "quality"}
    assert next(iter(suite)).factor not in other


SPELLED = {
    "ink": (" in the style of ink", ""),
    "cat": ("a cat", "a thing"),
    "grapes": ("a bunch of grapes", "a thing"),
    "red": (" on a red background", ""),
    "the mascot": ("the mascot", "a thing"),
    "close up": ("a close up of ", ""),
}


@given(pair=st.sampled_from([pair for pair in PAIRS if pair[0] in SPELLED]), seed=st.integers(0, 100))
def test_half_of_what_is_to_stay_is_the_same_prompt_without_the_concept(pair, seed):
    source, target = pair
    words, left = SPELLED[source]
    suite = list(editing.emoji_suite({source: target}, n=6, seed=seed))
    edited, kept = suite[:6], suite[12:18]
    assert {trial.prompt for trial in kept[:3]} == {trial.prompt.replace(words, left) for trial in edited[:3]}
    assert all(words in trial.prompt for trial in edited)
    assert {trial.factor for trial in kept[:3]} == {"style" if left else "object"}, "something else is judged"
    assert {trial.factor for trial in kept[3:]} == {edited[0].factor}, "neighbours"
    if not target:
        assert [trial.target_prompt for trial in edited] == [trial.prompt.replace(words, left) for trial in edited]


def test_numbers_change_the_noun():
    for trial in editing.emoji_suite({"two": "three"}, n=60):
        many, nouns = trial.prompt.removeprefix("two "), {world.plural(name) for name in world.OBJECTS}
        if trial.changes and not trial.prompt.startswith("a"):
            assert any(many.startswith((noun, "bunches of grapes")) for noun in nouns), trial.prompt
            assert trial.target_prompt == f"three {many}"
    suite = editing.emoji_suite({"two": "three"}, n=4)
    numbers = [trial.prompt.split() for trial in suite if (trial.role, trial.factor) == ("specificity", "count")]
    assert all({"one", "three"} & set(words) for words in numbers), "neighbours are other numbers"
    assert len(numbers) == 2


def all_of(factor):
    """Every value of a factor read as the next one."""
    labels = bundled.load_probe().labels(factor)
    words = {"count": ["one", "two", "three"], "viewpoint": ["close up", "distant view"]}.get(factor, labels)
    return dict(zip(words, [*words[1:], words[0]], strict=True))


@pytest.mark.parametrize("factor", ["count", "viewpoint", "style", "background", "object"])
def test_where_all_of_a_factor_is_edited_what_is_to_stay_does_not_name_it(factor):
    pairs = all_of(factor)
    suite = list(editing.emoji_suite(pairs, n=6))
    n_of = {role: sum(trial.role == role for trial in suite) for role in ROLES}
    most = 20 if factor == "object" else 6 * len(pairs)  # in each of four wordings, a thing in one of five styles
    assert 0.95 * most < n_of.pop("specificity") <= most
    assert set(n_of.values()) == {6 * len(pairs)}
    for trial in suite:
        named = [source for source in pairs if f" {source} " in f" {trial.prompt} ".replace(",", " ")]
        assert len(named) == trial.changes
        assert (trial.factor == factor) == trial.changes


def test_whatever_else_is_edited_beside_all_of_a_factor_is_judged_by_the_rest():
    suite = list(editing.emoji_suite(all_of("style") | {"cat": "dog"}, n=4))
    of_the_cat = [trial for trial in suite if trial.factor == "object" and trial.source == "cat"]
    assert {trial.role for trial in of_the_cat} == {"efficacy", "generality"}
    assert not any(style in trial.prompt.split() for trial in of_the_cat for style in all_of("style"))
    assert {trial.factor for trial in suite[-4:]} == {"background"}
    with pytest.raises(ValueError, match="every object and style is edited, so that nothing is left to judge"):
        editing.emoji_suite(all_of("style") | all_of("object"))


def test_captions_say_upside_down_and_never_upright():
    suite = list(editing.emoji_suite({"upside down": "upright"}, n=20))
    for trial in suite:
        assert trial.prompt.count("upside down") == trial.changes
        assert "upside down" not in trial.target_prompt
        assert "upright" not in trial.prompt + trial.target_prompt
    plain, rich = ([f" {t.prompt}" for t in suite if t.role == role] for role in ("efficacy", "generality"))
    assert all(" an upside down " in prompt for prompt in plain)
    assert not any(" an upside down " in prompt for prompt in rich)
    assert {(t.factor, t.source, t.target) for t in suite if t.changes} == {("pose", "upside down", "upright")}
    neighbours = [trial for trial in suite if (trial.role, trial.factor) == ("specificity", "pose")]
    assert {trial.source for trial in neighbours} == {"upright"}
    assert len(neighbours) == 10
    together = editing.emoji_suite({"ink": "noto", "upside down": "upright"}, n=20)
    assert not any("upside down" in trial.prompt for trial in together if not trial.changes)


@given(pair=st.sampled_from(PAIRS), seed=st.integers(0, 100))
def test_prompts_to_avoid_are_made_up_for_by_others(pair, seed):
    source, target = pair
    first = editing.emoji_suite({source: target}, n=4, seed=seed)
    avoid = {trial.prompt for trial in list(first)[::2]}
    others = editing.emoji_suite({source: target}, n=4, seed=seed, avoid=avoid)
    assert not avoid & {trial.prompt for trial in others}
    assert [trial.role for trial in others] == [trial.role for trial in first]


def test_draws_differ_by_seed_and_not_by_run():
    assert editing.emoji_suite({"ink": "noto"}) == editing.emoji_suite({"ink": "noto"})
    assert editing.emoji_suite({"ink": "noto"}) != editing.emoji_suite({"ink": "noto"}, seed=1)


def test_sources_edited_together_spare_each_others_neighbours():
    suite = editing.emoji_suite({"ink": "noto", "flat": "noto"}, n=8)
    assert len(suite) == 64
    kept = [trial for trial in suite if not trial.changes]
    assert not any(style in trial.prompt.split() for trial in kept for style in ("ink", "flat"))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"ink": "cat"}, "'ink' is of the factor style and 'cat' of object"),
        (
            {"ink": {"noto": 0.5, "flat": 0.5}},
            r"'ink' has several targets \(noto, flat\), and no picture shows them all",
        ),
        ({"upright": "upside down"}, "no caption of Emoji Diffusion says 'upright': it can be a target, and no source"),
        ({"dragon": "cat"}, r"does not know 'dragon'; it knows objects \(cat, dog, panda, …\)"),
    ],
)
def test_concepts_that_the_model_does_not_know_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        editing.emoji_suite(pairs)
