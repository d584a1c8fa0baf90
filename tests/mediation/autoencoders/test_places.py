"""What is read of a running pipeline is what its modules compute, at the steps and in the half that were asked for."""

import pytest
import torch

from mediation import Place
from mediation.autoencoders.observing import observe
from mediation.autoencoders.places import Moment, find_site, in_stage, nearest_step, visiting
from mediation.pipelines import family_of
from mediation.sampling import Sampling
from tests.runs import SAMPLING, alone, hooks_of

PROMPTS, SEEDS = ["a photo of a cat", "a red dog"], [3, 4]


def recorded(module, run):
    """Inputs and outputs of a module in a run, (call)."""
    calls = []
    handle = module.register_forward_hook(
        lambda _module, given, output: calls.append((given[0], output[0] if isinstance(output, tuple) else output))
    )
    try:
        return calls, run()
    finally:
        handle.remove()


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_of_a_transformer_the_update_is_read(tiny_pipe, branch):
    place = Place("unet.down.0.0", steps=(1.0, 0.0), branch=branch)
    module = tiny_pipe.unet.down_blocks[0].attentions[0]
    calls, (found,) = recorded(module, lambda: list(observe(tiny_pipe, PROMPTS, SEEDS, [place], sampling=SAMPLING)))
    assert len(calls) == SAMPLING.num_inference_steps
    half = ["uncond", "cond"].index(branch)
    updates = [(output - given).chunk(2)[half].permute(0, 2, 3, 1) for given, output in (calls[0], calls[-1])]
    assert torch.equal(found.activations[place], torch.stack(updates, dim=1))


def test_of_other_sites_and_on_request_of_transformers_the_output_is_read(tiny_pipe):
    places = [
        Place("unet.down.0.0.cross_attention"),
        Place("unet.down.0.0", reads="output"),
        Place("unet.mid.0.resnet"),
    ]
    modules = [find_site(tiny_pipe, place.site).module(tiny_pipe) for place in places]
    for place, module in zip(places, modules, strict=True):
        calls, (found,) = recorded(
            module, lambda place=place: list(observe(tiny_pipe, PROMPTS, SEEDS, [place], sampling=SAMPLING))
        )
        output = calls[0][1].chunk(2)[1]
        seen = found.activations[place][:, 0]
        if output.ndim == 3:  # tokens, row by row
            assert torch.equal(seen.flatten(1, 2), output)
        else:
            assert torch.equal(seen, output.permute(0, 2, 3, 1))


def test_sampling_ends_with_the_last_step_that_is_read(tiny_pipe):
    for steps, n_expected in (((1.0,), 1), ((1.0, 0.5), 2), ((0.0,), 3)):
        calls, _ = recorded(
            tiny_pipe.unet,
            lambda steps=steps: list(
                observe(tiny_pipe, PROMPTS, SEEDS, [Place("unet.mid.0", steps)], sampling=SAMPLING)
            ),
        )
        assert len(calls) == n_expected
    assert torch.equal(alone(tiny_pipe, "a cat"), alone(tiny_pipe, "a cat")), "the next call samples to the end"


def test_each_picture_is_that_of_its_prompt_and_seed(tiny_pipe):
    hooks = hooks_of(tiny_pipe)
    options = {"sampling": SAMPLING, "with_images": True}
    together = next(observe(tiny_pipe, PROMPTS, SEEDS, [], **options)).images
    one_by_one = [found.images for found in observe(tiny_pipe, PROMPTS, SEEDS, [], batch_size=1, **options)]
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)
    noise = torch.randn(1, *family_of(tiny_pipe).latent_shape(tiny_pipe), generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
    expected = tiny_pipe(PROMPTS[0], latents=noise, **options).images
    torch.testing.assert_close(one_by_one[0], expected, rtol=1e-4, atol=1e-5)
    assert hooks_of(tiny_pipe) == hooks


def test_stages_divide_the_steps():
    stages = [(0.6, 1.0), (0.2, 0.6), (0.0, 0.2)]
    for n_steps in (1, 2, 6, 11, 26):
        moments = [Moment(i, n_steps, ("cond",)).t for i in range(n_steps)]
        assert all(sum(in_stage(stage, t) for stage in stages) == 1 for t in moments)
        assert [nearest_step(t, n_steps) for t in moments] == list(range(n_steps))


def test_what_is_added_is_added(tiny_pipe):
    """In the half and at the moment that a function chooses, and nowhere else."""
    place = Place("unet.down.0.0")
    module = tiny_pipe.unet.down_blocks[0].attentions[0]

    def run():
        return alone(tiny_pipe, "a cat", num_inference_steps=1)

    (_, before), *_ = recorded(module, run)[0]

    def visit(moment, activations):
        added = torch.zeros_like(activations)
        added[moment.halves.index("cond"), :, 0, 1] = 2.0
        return added

    def changed():
        with visiting(tiny_pipe, [(place, visit)]):
            return run()

    (_, after), *_ = recorded(module, changed)[0]
    difference = after - before
    assert torch.equal(after[0], before[0]), "the unconditional half is untouched"
    torch.testing.assert_close(difference[1, :, 0, 1], torch.full((8,), 2.0), rtol=0, atol=1e-5)
    difference[1, :, 0, 1] = 0
    assert not difference.any()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"site": "unet.mid.7"}, KeyError, "no site whose activations can be read"),
        ({"site": "text_encoder.0.mlp"}, KeyError, "the transformers are unet.down.0.0"),
        ({"steps": (1.5,)}, ValueError, "from 1"),
        ({"steps": ()}, ValueError, "from 1"),
        ({"branch": "both"}, ValueError, "'cond' or 'uncond'"),
        ({"reads": "input"}, ValueError, "'update' or 'output'"),
    ],
)
def test_places_that_are_not_there_are_errors(tiny_pipe, wrong, error, message):
    with pytest.raises(error, match=message):
        observe(tiny_pipe, PROMPTS, SEEDS, [Place(**{"site": "unet.mid.0"} | wrong)], sampling=SAMPLING)


def test_without_guidance_there_is_no_unconditional_branch(tiny_pipe):
    with pytest.raises(ValueError, match="no unconditional branch"):
        observe(tiny_pipe, PROMPTS, SEEDS, [Place("unet.mid.0", branch="uncond")], sampling=Sampling(2, 1.0))
    for prompts, message in (("a cat", "list of strings"), ([], "at least one")):
        with pytest.raises((TypeError, ValueError), match=message):
            observe(tiny_pipe, prompts, [], [], sampling=SAMPLING)
