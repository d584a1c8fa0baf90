"""Subjects are found by characters, and their tokens by offsets."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mediation import Case, GaussianNoise, LatentDistance, ReplaceSubject, ZeroSubject, trace
from mediation.cases import align, group_positions, segments
from mediation.sampling import Sampling, sample_rows


def tokens_of(tokenizer, prompt, positions):
    """What the tokenizer itself says stands at these positions, byte-pair marks removed."""
    ids = tokenizer(prompt).input_ids
    return "".join(tokenizer.convert_ids_to_tokens(ids[p]).replace("</w>", " ") for p in positions).strip()


def groups(tokenizer, case):
    return group_positions(segments(tokenizer, case.prompt, case.spans))


@pytest.mark.parametrize(
    ("prompt", "subject", "spans"),
    [
        ("a cat in the style of ink", "ink", ((22, 25),)),
        ("a pink cat in ink style", "ink", ((14, 17),)),
        ("A Cat and a cat", "cat", ((2, 5), (12, 15))),
        ("a soccer ball, close up", "soccer ball", ((2, 13),)),
        ("café (ink)", "ink", ((6, 9),)),
    ],
)
def test_a_subject_is_found_as_whole_words(prompt, subject, spans):
    assert Case(prompt, subject=subject).spans == spans


@pytest.mark.parametrize(
    ("prompt", "subject", "message"),
    [
        ("a cat in noto style", "ink", "is not in the prompt"),
        ("a pink cat", "ink", "only inside a longer word"),
        ("a cat", "  ", "the subject is empty"),
        ("", "cat", "is not in the prompt"),
    ],
)
def test_an_absent_subject_is_an_error(prompt, subject, message):
    with pytest.raises(ValueError, match=message):
        Case(prompt, subject=subject)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: GaussianNoise(scale=0),
        lambda: GaussianNoise(scale=float("nan")),
        lambda: GaussianNoise(scale=float("inf")),
        lambda: GaussianNoise(draws=0),
        lambda: GaussianNoise(draws=True),
        lambda: GaussianNoise(draws=1.5),
        lambda: GaussianNoise(where="middle"),
        lambda: ReplaceSubject(" "),
        lambda: ZeroSubject(where="middle"),
        lambda: Case("a cat", subject="cat", seed=-1),
        lambda: Case("a cat", subject="cat", seed=True),
        lambda: Case("a cat", subject="cat", seed=2**64 - 1),
    ],
)
def test_corruptions_that_cannot_be_are_errors(wrong):
    with pytest.raises(ValueError, match=r"must be|is empty"):
        wrong()


def test_numbers_of_other_libraries_are_taken_as_numbers(tiny_pipe):
    """A map's attributes hold them as JSON."""
    plain = Case("a cat", subject="cat", corruption=GaussianNoise(scale=3.0, draws=2), seed=3)
    for scale in (numpy.float32(3), torch.tensor(3.0), 3):
        noise = GaussianNoise(scale=scale, draws=numpy.int64(2))
        case = Case("a cat", subject="cat", corruption=noise, seed=numpy.int64(3))
        assert case == plain
        assert [type(value) for value in (noise.scale, noise.draws, case.seed)] == [float, int, int]
    options = {"sites": ["unet.mid.0.resnet"], "metric": LatentDistance(), "num_inference_steps": 1, "progress": False}
    assert trace(tiny_pipe, case, **options).identical(trace(tiny_pipe, plain, **options))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: GaussianNoise(scale="3"), "scale must be a number, got '3'"),
        (lambda: ReplaceSubject(5), "the text must be text, got 5"),
        (lambda: Case("a cat", subject=5), "the subject must be text, got 5"),
        (lambda: Case(None, subject="cat"), "the prompt must be text, got None"),
    ],
)
def test_what_is_of_another_type_is_named(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong()


def test_a_multi_token_subject_in_mid_sentence(tiny_pipe):
    case = Case("a photo of a strawberry in the style of ink", subject="strawberry")
    found = groups(tiny_pipe.tokenizer, case)
    assert len(found["subject"]) > 1
    assert tokens_of(tiny_pipe.tokenizer, case.prompt, found["subject"]) == "strawberry"
    assert found["last_subject"] == (found["subject"][-1],)
    assert tokens_of(tiny_pipe.tokenizer, case.prompt, found["before"]).startswith("a photo of a")
    assert tokens_of(tiny_pipe.tokenizer, case.prompt, found["after"]).endswith("ink")


def test_every_occurrence_of_a_repeated_subject_counts(tiny_pipe):
    case = Case("a cat beside a cat", subject="cat")
    found = groups(tiny_pipe.tokenizer, case)
    once = groups(tiny_pipe.tokenizer, Case("a cat beside a dog", subject="cat"))
    assert len(found["subject"]) == 2 * len(once["subject"])
    assert found["last_subject"][0] == found["eos"][0] - 1


@given(
    before=st.lists(st.sampled_from(["a", "photo", "of", "the", "old"]), max_size=5),
    subject=st.sampled_from(["cat", "soccer ball", "strawberry", "Van Gogh", "naïve ink"]),
    after=st.lists(st.sampled_from(["in", "noto", "style,", "upside", "down"]), max_size=5),
)
def test_groups_partition_the_window(tiny_pipe, before, subject, after):
    case = Case(" ".join([*before, subject, *after]), subject=subject)
    tokenizer = tiny_pipe.tokenizer
    found = groups(tokenizer, case)
    parts = [found[name] for name in ("bos", "before", "subject", "after", "eos", "padding")]
    assert sum(parts, ()) == found["all"] == tuple(range(tokenizer.model_max_length))
    ids = tokenizer(case.prompt).input_ids
    assert found["eos"] == (len(ids) - 1,)
    # The same words tokenize alone as they do in a sentence, since CLIP splits at white space.
    alone = tokenizer(subject).input_ids[1:-1]
    assert [ids[p] for p in found["subject"]] == alone


def test_a_truncated_subject_is_an_error_and_a_truncated_rest_is_not(tiny_pipe):
    filler = "cat " * 80
    with pytest.raises(ValueError, match="is truncated"):
        groups(tiny_pipe.tokenizer, Case(filler + "ink", subject="ink"))
    found = groups(tiny_pipe.tokenizer, Case("ink " + filler, subject="ink"))
    assert found["eos"] == (tiny_pipe.tokenizer.model_max_length - 1,)
    assert found["padding"] == ()


def test_replacement_keeps_the_rest_and_aligns_from_the_end(tiny_pipe):
    case = Case("a cat and a cat in ink", subject="cat", corruption=ReplaceSubject("strawberry"))
    assert case.corrupted_prompt == "a strawberry and a strawberry in ink"
    assert [case.corrupted_prompt[slice(*span)] for span in case.corrupted_spans] == ["strawberry"] * 2
    tokenizer = tiny_pipe.tokenizer
    clean = segments(tokenizer, case.prompt, case.spans)
    corrupted = segments(tokenizer, case.corrupted_prompt, case.corrupted_spans)
    partners = align(clean, corrupted)
    a, b = tokenizer(case.prompt).input_ids, tokenizer(case.corrupted_prompt).input_ids
    outside = [p for p in range(len(a)) if p not in group_positions(clean)["subject"]]
    assert [a[p] for p in outside] == [b[partners[p]] for p in outside]
    assert partners[group_positions(clean)["last_subject"][0]] == group_positions(corrupted)["last_subject"][0]


def test_the_largest_seed_is_one_that_sampling_can_have(tiny_pipe):
    sampled = [
        sample_rows(tiny_pipe, Case("a cat", subject="cat", seed=seed), 0, [], Sampling(1, 1.0))
        for seed in (2**64 - 2, 1)
    ]
    assert sampled[0].isfinite().all()
    assert not torch.equal(*sampled)


def test_noise_depends_on_seed_and_draw_alone():
    noise = GaussianNoise(draws=2)
    assert torch.equal(noise.noise((2, 8), 3, 1), noise.noise((2, 8), 3, 1))
    assert not torch.equal(noise.noise((2, 8), 3, 0), noise.noise((2, 8), 3, 1))
    assert not torch.equal(noise.noise((2, 8), 3, 0), noise.noise((2, 8), 4, 0))
