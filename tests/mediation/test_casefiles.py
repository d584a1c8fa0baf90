"""Cases as files spell them are the cases that one would write."""

import json

import pytest

from mediation import Case, GaussianNoise, ReplaceSubject, ZeroSubject
from mediation.casefiles import collect_cases, pair_cases, parse_corruption, parse_tokens, parse_windows, read_cases

NOISE = GaussianNoise(2.0)
CASES = [Case("a cat, asleep", "cat", NOISE, 4), Case("a dog in ink style", "ink", NOISE, 7)]


def test_csv_and_json_say_the_same(tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text('prompt,subject,attribute,seed\n"a cat, asleep",cat,object,4\na dog in ink style,ink,style,\n')
    records = tmp_path / "cases.json"
    records.write_text(
        json.dumps(
            [
                {"prompt": "a cat, asleep", "subject": "cat", "attribute": "object", "seed": 4},
                {"prompt": "a dog in ink style", "subject": "ink", "attribute": "style"},
            ]
        )
    )
    for path in (table, records):
        assert read_cases(path, NOISE, seed=6) == (CASES, ["object", "style"])
        assert collect_cases(path, (), (), NOISE, 6) == (CASES, ["object", "style"])


def test_a_spreadsheets_csv_is_read_too(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes("\ufeffprompt,subject\r\nun café,café\r\n".encode())
    assert read_cases(path, NOISE) == ([Case("un café", "café", NOISE)], [""])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cases.txt", "", r"\.csv and \.json"),
        ("cases.csv", "prompt,subject\n", "no list of cases"),
        ("cases.json", '{"prompt": "a cat"}', "no list of cases"),
        ("cases.csv", "prompt,word\na cat,cat\n", r"case 1 of cases\.csv: its columns are \['prompt', 'word'\]"),
        ("cases.csv", "prompt,subject\na cat,cat\na cat,dog\n", r"case 2 of cases\.csv: the subject 'dog' is not in"),
        ("cases.csv", "prompt,subject,seed\na cat,cat,x\n", r"case 1 of cases\.csv: a seed is a whole number, got 'x'"),
        ("cases.json", '[{"prompt": "a cat", "subject": "cat", "seed": 1.7}]', "a seed is a whole number, got 1.7"),
        ("cases.json", '[{"prompt": "a cat", "subject": "cat", "seed": true}]', "a seed is a whole number, got True"),
        ("cases.json", '[{"prompt": "a cat", "subject": 5}]', r"case 1 of .*: the subject must be text, got 5"),
        ("cases.json", '[{"prompt": null, "subject": "cat"}]', r"case 1 of cases\.json: .* is not in the prompt ''"),
        ("cases.json", '["a cat"]', r"case 1 of cases\.json: its columns are str"),
    ],
)
def test_what_is_no_case_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cases(tmp_path / name, NOISE)


def test_prompts_share_a_subject_or_have_their_own():
    prompts = ["a cat", "the cat sleeps"]
    expected = [Case(prompt, "cat", NOISE, seed) for prompt, seed in zip(prompts, (3, 4), strict=True)]
    assert collect_cases(None, prompts, ["cat"], NOISE, 3) == (expected, ["", ""])
    assert collect_cases(None, prompts[:1], ["cat"], NOISE, 3)[0] == expected[:1]
    assert collect_cases(None, prompts, ["cat", "sleeps"], NOISE)[0][1].subject == "sleeps"
    for subjects in ([], ["cat"] * 3):
        with pytest.raises(ValueError, match=f"one for each of 2; got {len(subjects)}"):
            collect_cases(None, prompts, subjects, NOISE)


def test_a_text_file_holds_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\nthe cat sleeps \n", encoding="utf-8")
    expected = pair_cases(["a cat", "the cat sleeps"], ["cat"], NOISE, 3)
    assert collect_cases(path, (), ["cat"], NOISE, 3) == (expected, ["", ""])
    with pytest.raises(ValueError, match="one for each of 2; got 0"):
        collect_cases(path, (), (), NOISE)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"prompts\.txt holds no prompt"):
        collect_cases(path, (), ["cat"], NOISE)


def test_cases_come_from_one_place(tmp_path):
    with pytest.raises(ValueError, match="either prompts"):
        collect_cases(None, [], ["cat"], NOISE)
    with pytest.raises(ValueError, match="either prompts"):
        collect_cases(tmp_path, ["a cat"], ["cat"], NOISE)
    with pytest.raises(ValueError, match="its own subjects"):
        collect_cases(tmp_path, [], ["cat"], NOISE)


def test_corruptions_and_tokens():
    assert parse_corruption("noise") == GaussianNoise()
    assert parse_corruption("noise:1.5", 2) == GaussianNoise(1.5, 2)
    assert parse_corruption("noise", where="output") == GaussianNoise(where="output")
    assert (parse_corruption("zero"), parse_corruption("zero", 1, "output")) == (ZeroSubject(), ZeroSubject("output"))
    assert parse_corruption("replace:red: dog") == ReplaceSubject("red: dog")
    assert parse_tokens("subject,eos, 12") == ["subject", "eos", 12]
    assert (parse_tokens("each"), parse_tokens(None)) == ("each", None)
    assert parse_windows("0-0.25,0.25–1") == [(0, 0.25), (0.25, 1)]
    assert (parse_windows("each"), parse_windows(None)) == ("each", None)
    for wrong in ("early", "0-", "-0.5", ""):
        with pytest.raises(ValueError, match="windows are fractions of sampling"):
            parse_windows(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blur",), 'a corruption is "noise"'),
        (("noise:much",), "could not convert"),
        (("noise:-1",), "scale must be positive"),
        (("noise", 0), "draws must be"),
        (("replace:",), "is empty"),
        (("replace:dog", 2), "one draw"),
        (("zero", 2), "one draw"),
        (("zero:1",), 'a corruption is "noise"'),
        (("zero", 1, "middle"), 'where must be "input" or "output"'),
        (("noise", 1, "middle"), 'where must be "input" or "output"'),
        (("replace:dog", 1, "output"), "replaced in the prompt"),
    ],
)
def test_what_is_no_corruption_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_corruption(*arguments)
