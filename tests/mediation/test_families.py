"""What a family states about an architecture is checked against the running model, for every family alike."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

import mediation
from mediation import Case, GaussianNoise, LatentDistance, ReplaceSubject, ZeroSubject
from mediation.encoding import clean_groups, encode_rows
from mediation.hooks import hooked
from mediation.pipelines import family_of, tokenizers_of
from mediation.rows import CLEAN, CORRUPTED, Intervention
from mediation.sampling import Sampling, sample_rows
from tests import runs, tiny
from tests.runs import CASE, doors, hooks_of, rms

SAMPLING = Sampling(num_inference_steps=2, guidance_scale=4.0)
alone = functools.partial(runs.alone, num_inference_steps=2)
CONTAINERS = ("transformer", "block")
CORRUPTIONS = [
    GaussianNoise(),
    GaussianNoise(where="output"),
    ReplaceSubject("strawberry"),
    ZeroSubject(),
    ZeroSubject(where="output"),
]
pytestmark = pytest.mark.no_cover  # what runs here is covered elsewhere, and slow to measure


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def deep(request):
    """A tiny random pipeline of each family, shared: leave it as it was."""
    return tiny.FAMILIES[request.param]()


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pipe(request):
    """As `deep` with two levels, for what is the same at all depths."""
    return tiny.shallow(request.param)


def test_every_path_resolves_once(deep):
    modules = [site for component in (None, *CONTAINERS) for site in mediation.sites(deep, component=component)]
    heads = mediation.sites(deep, heads=True)
    assert len({(site.network, site.path) for site in modules}) == len({site.name for site in modules}) == len(modules)
    assert len({(site.network, site.path, site.head) for site in heads}) == len({head.name for head in heads})
    for site in modules + heads:
        assert site.module(deep) is getattr(deep, site.network).get_submodule(site.path)


def test_the_declared_order_is_the_execution_order(deep):
    found = {component: mediation.sites(deep, component=component) for component in (None, *CONTAINERS)}
    ran, handles = {component: [] for component in found}, []
    for component, sites in found.items():
        for site in sites:
            see = lambda *_, of=ran[component], name=site.name: of.append(name)  # noqa: E731
            handles.append(site.module(deep).register_forward_hook(see))
    try:
        alone(deep, "a cat", num_inference_steps=1, guidance_scale=1.0)
    finally:
        for handle in handles:
            handle.remove()
    for component, sites in found.items():
        assert ran[component] == [site.name for site in sites]


def test_every_door_of_text_is_known(deep):
    """The denoiser no longer depends on the prompt when the known doors are shut."""

    def outputs():
        return [alone(deep, prompt, num_inference_steps=1) for prompt in ("a cat", "a red dog in the style of ink")]

    assert not torch.allclose(*outputs())
    shut = [
        site.module(deep).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        for site in doors(deep)
    ]
    try:
        assert torch.equal(*outputs())
    finally:
        for handle in shut:
            handle.remove()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_restoring_every_text_door_is_the_clean_run_and_knocking_them_out_the_corrupted_one(pipe, corruption):
    case = Case(CASE.prompt, subject=CASE.subject, corruption=corruption)
    rows = [Intervention(sites, mode=mode) for mode in ("restore", "knock_out") for sites in (doors(pipe), ())]
    latents = sample_rows(pipe, case, 0, rows, SAMPLING)
    damage = rms(latents[CORRUPTED], latents[CLEAN])
    assert damage > 1e-3  # there is something to restore
    for row, expected in enumerate((CLEAN, CORRUPTED, CORRUPTED, CLEAN), start=2):
        assert rms(latents[row], latents[expected]) < 1e-4 * damage


def test_the_clean_row_is_what_the_pipeline_does_alone(pipe):
    expected = alone(pipe, CASE.prompt)
    assert rms(sample_rows(pipe, CASE, 0, [], SAMPLING)[CLEAN], expected[0]) < 1e-4 * expected.std().item()


def test_replacing_the_subject_is_what_the_pipeline_does_with_the_other_prompt(pipe):
    case = Case(CASE.prompt, subject="cat", corruption=ReplaceSubject("strawberry"), seed=CASE.seed)
    expected = alone(pipe, "a photo of a strawberry in ink style")
    assert rms(sample_rows(pipe, case, 0, [], SAMPLING)[CORRUPTED], expected[0]) < 1e-4 * expected.std().item()


def test_images_are_those_of_the_pipeline(pipe):
    images = family_of(pipe).decode(pipe, alone(pipe, CASE.prompt))
    torch.testing.assert_close(images, alone(pipe, CASE.prompt, output_type="pt"))


def test_restoring_the_layer_that_is_read_restores_the_text(pipe):
    # Twice, since transformers leaves hooks behind when it first records hidden states.
    for _ in range(2):
        read = -2 if "pooled_prompt_embeds" in family_of(pipe).encode(pipe, ["a cat"]) else -1
        layers = tuple(
            mediation.sites(pipe, network=encoder, component="block")[read] for encoder in tokenizers_of(pipe)
        )
        states = encode_rows(pipe, CASE, 0, [Intervention(layers)])["prompt_embeds"]
        assert rms(states[CORRUPTED], states[CLEAN]) > 1e-3
        torch.testing.assert_close(states[2], states[CLEAN])


def test_of_a_text_encoder_the_layers_that_are_read_change_the_text_and_the_others_nothing(pipe):
    family = family_of(pipe)
    plain = family.encode(pipe, ["a cat"])
    for encoder in tokenizers_of(pipe):
        layers = mediation.sites(pipe, network=encoder, component="block")
        for layer in layers:
            with hooked([(layer.module(pipe), lambda states: states + torch.linspace(-1, 1, states.shape[-1]))]):
                changed = family.encode(pipe, ["a cat"])
            moved = any(not torch.equal(changed[name], plain[name]) for name in plain)
            assert moved == (layer.layer < len(layers) - family.n_unread_layers.get(encoder, 0)), layer.name


def test_restoring_the_blocks_after_the_last_skip_is_the_clean_run(pipe):
    *_, last = mediation.sites(pipe, network="unet", component="block")
    latents = sample_rows(pipe, CASE, 0, [Intervention((last,))], Sampling(2, 4.0, branch="both"))
    damage = rms(latents[CORRUPTED], latents[CLEAN])
    assert rms(latents[2], latents[CLEAN]) < 1e-4 * damage


def test_restoring_a_down_block_restores_its_skip_connections(pipe):
    """With all down blocks and the middle restored, what is left of the corruption enters in the up blocks."""
    *down, middle = [site for site in mediation.sites(pipe, network="unet", component="block") if "up" not in site.name]
    inputs = []
    handle = pipe.unet.up_blocks[-1].register_forward_pre_hook(
        lambda module, args, options: inputs.append(options["res_hidden_states_tuple"]), with_kwargs=True
    )
    try:
        sample_rows(pipe, CASE, 0, [Intervention((*down, middle))], Sampling(1, 1.0))
    finally:
        handle.remove()
    for skip in inputs[0]:
        torch.testing.assert_close(skip[2], skip[CLEAN])


@pytest.mark.parametrize("mode", ["restore", "knock_out"])
def test_all_heads_together_are_the_whole_attention(pipe, mode):
    attentions = [
        mediation.sites(pipe, network="unet", component="self_attention")[1],
        mediation.sites(pipe, network="unet", component="cross_attention")[-1],
        *(mediation.sites(pipe, network=encoder, component="self_attention")[0] for encoder in tokenizers_of(pipe)),
    ]
    heads = [mediation.sites(pipe, name=f"{site.name}.head.*", heads=True) for site in attentions]
    assert all(len(of_one) > 1 for of_one in heads)
    # one row with all attentions, one with all their heads, and two that split the heads between them
    groups = [
        attentions,
        itertools.chain(*heads),
        (one[0] for one in heads),
        itertools.chain(*(one[1:] for one in heads)),
    ]
    rows = [Intervention(tuple(group), mode=mode) for group in groups]
    latents = sample_rows(pipe, CASE, 0, rows, SAMPLING)
    effects = [rms(row, latents[rows[0].sham]) for row in latents[2:]]
    assert rms(latents[2], latents[3]) < 1e-2 * min(effects)


@pytest.mark.parametrize("where", ["input", "output"])
@pytest.mark.parametrize(
    ("prompt", "subject", "n_tokens"), [(CASE.prompt, "cat", 1), ("an owl and a red owl in ink", "owl", 6)]
)
def test_noise_is_in_standard_deviations_at_the_subject_alone_and_differs_by_encoder(
    pipe, where, prompt, subject, n_tokens
):
    case = Case(prompt, subject=subject, corruption=GaussianNoise(scale=2.0, where=where), seed=3)
    seen, handles = {}, []
    for encoder in tokenizers_of(pipe):
        table = getattr(pipe, encoder).get_input_embeddings()
        handles.append(
            table.register_forward_hook(lambda module, args, output, encoder=encoder: seen.update({encoder: output}))
        )
    try:
        conditioning = encode_rows(pipe, case, 1, [])
    finally:
        for handle in handles:
            handle.remove()
    parts = []  # rows, what the noise is measured in, positions
    tokens = {encoder: clean_groups(tokenizer, case)["subject"] for encoder, tokenizer in tokenizers_of(pipe).items()}
    assert {len(positions) for positions in tokens.values()} == {n_tokens}
    if where == "input":
        for encoder, positions in tokens.items():
            parts.append((seen[encoder], getattr(pipe, encoder).get_input_embeddings().weight, positions))
    else:
        for keyword, encoder, features in family_of(pipe).text_outputs(pipe):
            rows = conditioning[keyword][..., features]
            rows = rows if encoder else rows[:, None]
            parts.append((rows, rows[CLEAN], tokens[encoder] if encoder else (0,)))
    noises = []
    for stream, (rows, reference, positions) in enumerate(parts):
        difference = rows[CORRUPTED] - rows[CLEAN]
        others = [position for position in range(len(difference)) if position not in positions]
        assert torch.count_nonzero(difference[others]) == 0
        noise = GaussianNoise().noise((len(positions), rows.shape[-1]), 3, 1, stream)
        torch.testing.assert_close(difference[list(positions)], 2.0 * reference.std() * noise, atol=1e-5, rtol=1e-4)
        noises.append(noise.flatten()[:16])
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(noises, 2))


def test_zeros_are_what_the_encoders_make_of_an_empty_row_in_their_tables(pipe):
    """The oracle runs the encoders with tables in which the subject's tokens are zero, and the denoiser on that."""
    case = Case(CASE.prompt, subject="cat", corruption=ZeroSubject())
    found = encode_rows(pipe, case, 0, [])
    blanked = copy.deepcopy(pipe)
    for encoder, tokenizer in tokenizers_of(pipe).items():
        subject = clean_groups(tokenizer, case)["subject"]
        ids = tokenizer(case.prompt).input_ids
        assert sum(token in [ids[p] for p in subject] for token in ids) == len(subject)  # it occurs nowhere else
        with torch.no_grad():
            getattr(blanked, encoder).get_input_embeddings().weight[[ids[p] for p in subject]] = 0
    for keyword, expected in family_of(pipe).encode(blanked, [case.prompt]).items():
        torch.testing.assert_close(found[keyword][CORRUPTED], expected[0])
        assert rms(found[keyword][CORRUPTED], found[keyword][CLEAN]) > 1e-3


def test_zeros_behind_the_encoders_are_read_in_place_of_the_subject(pipe):
    case = Case("an owl and a red owl in ink", subject="owl", corruption=ZeroSubject(where="output"))
    conditioning = encode_rows(pipe, case, 0, [Intervention()])
    for keyword, encoder, features in family_of(pipe).text_outputs(pipe):
        clean, corrupted, sham = (conditioning[keyword][row][..., features] for row in range(3))
        assert torch.equal(sham, corrupted)
        if encoder is None:
            assert not corrupted.any()
            continue
        subject = list(clean_groups(getattr(pipe, dict(family_of(pipe).text_encoders)[encoder]), case)["subject"])
        others = [position for position in range(len(clean)) if position not in subject]
        assert len(subject) > 1
        assert not corrupted[subject].any()
        assert torch.equal(corrupted[others], clean[others])


@pytest.mark.parametrize("failing", ["unet", "text_encoder", "metric"])
def test_nothing_is_left_behind_after_an_error(pipe, failing):
    alone(pipe, "a cat", num_inference_steps=1)  # transformers leaves its own hooks behind
    before, progress_before = hooks_of(pipe), getattr(pipe, "_progress_bar_config", None)

    def fail(*args):
        raise RuntimeError("on purpose")

    handle, metric = None, fail
    if failing != "metric":
        metric = LatentDistance()
        handle = mediation.sites(pipe, network=failing)[-1].module(pipe).register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            mediation.trace(
                pipe,
                CASE,
                sites=[mediation.sites(pipe), *mediation.sites(pipe, heads=True)[-2:]],
                metric=metric,
                num_inference_steps=1,
                progress=False,
            )
    finally:
        if handle:
            handle.remove()
    assert hooks_of(pipe) == before
    assert getattr(pipe, "_progress_bar_config", None) == progress_before


def test_hooks_of_others_stay_and_take_part(pipe):
    """A user's hook that steers an attention changes the clean run and is still there afterwards."""
    first, _, last = (mediation.sites(pipe, network="unet", component="self_attention")[i] for i in (0, 1, -1))
    handle = first.module(pipe).register_forward_hook(lambda module, args, output: output + 1.0)
    try:
        before = hooks_of(pipe)
        latents = sample_rows(pipe, CASE, 0, [Intervention(doors(pipe)), Intervention((first, last))], SAMPLING)
        steered = alone(pipe, CASE.prompt)
        assert hooks_of(pipe) == before
    finally:
        handle.remove()
    assert rms(latents[CLEAN], steered[0]) < 1e-4 * steered.std().item()
    assert rms(latents[2], latents[CLEAN]) < 1e-4 * rms(latents[CORRUPTED], latents[CLEAN])
    assert rms(alone(pipe, CASE.prompt)[0], steered[0]) > 1e-3


class Adapter(nn.Module):
    """What a LoRA leaves in place of a linear layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 1, bias=False)
        self.lora_B = nn.Linear(1, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_sites_are_the_same_with_adapters_and_fused_projections(pipe):
    changed = copy.deepcopy(pipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for site in mediation.sites(pipe, heads=True):
            if site.head == 0:
                owner, _, name = site.path.rpartition(".")
                parent = getattr(changed, site.network).get_submodule(owner)
                setattr(parent, name, Adapter(parent.get_submodule(name)))
    changed.unet.fuse_qkv_projections()
    attentions, heads = (
        mediation.sites(changed, network="unet", component="self_attention", heads=heads) for heads in (False, True)
    )
    assert mediation.sites(changed) == mediation.sites(pipe)
    assert mediation.sites(changed, heads=True) == mediation.sites(pipe, heads=True)
    rows = [Intervention(tuple(found)) for found in (doors(changed), attentions, heads)]
    latents = sample_rows(changed, CASE, 0, rows, SAMPLING)
    damage = rms(latents[CORRUPTED], latents[CLEAN])
    assert damage > 1e-3
    assert rms(latents[2], latents[CLEAN]) < 1e-4 * damage
    assert rms(latents[3], latents[4]) < 1e-2 * rms(latents[3], latents[CORRUPTED])


def test_fusing_projections_does_not_change_a_map_and_can_be_undone(pipe):
    options = {"metric": LatentDistance(), "num_inference_steps": 2, "progress": False}
    found = [mediation.sites(pipe, heads=True)[-1], mediation.sites(pipe, component="cross_attention")[0]]
    before = mediation.trace(pipe, CASE, sites=found, **options)
    fused = copy.deepcopy(pipe)
    fused.unet.fuse_qkv_projections()
    after = mediation.trace(fused, CASE, sites=found, **options)
    assert abs(after.restored - before.restored).max() < 1e-4 * mediation.total_effect(before).max()
    assert doors(fused) != doors(pipe)
    fused.unet.unfuse_qkv_projections()
    assert doors(fused) == doors(pipe)
