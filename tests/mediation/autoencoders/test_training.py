"""Training keeps its constraints, finds what was planted, revives the dead, and can be interrupted."""

import collections
import types
import weakref

import diffusers
import hypothesis
import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import mediation
from mediation import Place, Recipe, SparseAutoencoder
from mediation.autoencoders import sources
from mediation.autoencoders.objective import losses
from mediation.autoencoders.sources import Stored, Streamed
from mediation.autoencoders.training import Trainer, train
from mediation.sampling import Sampling

D, N_TRUE = 16, 24


def planted(n=20_000, n_active=2):
    """Sums of two of 24 directions in 16 dimensions, and the directions."""
    random = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(N_TRUE, D, generator=random), dim=1)
    chosen = torch.rand(n, N_TRUE, generator=random).argsort(1)[:, :n_active]
    amounts = 0.5 + torch.rand(n, n_active, generator=random)
    return (amounts[..., None] * directions[chosen]).sum(1), directions


class Interrupted(Stored):
    """A source that fails once, at some window."""

    def __init__(self, array, *, buffer, at):
        super().__init__(array, buffer=buffer)
        self.at = at

    def window(self, number):
        if number == self.at:
            self.at = None
            raise KeyboardInterrupt
        return super().window(number)


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made inside, and the most that were there at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._holders = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr(), storage.nbytes()
                self.now += 0 if self._holders[key] else key[1]
                self._holders[key] += 1
                weakref.finalize(tensor, self._let_go, key)
        self.most = max(self.most, self.now)
        return made

    def _let_go(self, key):
        self._holders[key] -= 1
        self.now -= 0 if self._holders[key] else key[1]


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_planted_directions_are_found(activation):
    x, directions = planted()
    recipe = Recipe(n_positions=100_000, batch_size=500, learning_rate=3e-3, n_auxiliary=8, dead_after=10_000)
    sae = mediation.fit_sae(x, n_latents=48, k=2, activation=activation, recipe=recipe, buffer=20_000, progress=False)
    cosines = directions @ sae.decoder.T
    assert float(cosines.amax(1).mean()) > 0.9
    history = sae.metadata["training"]["history"]
    assert history[-1]["explained_variance"] > 0.9
    assert history[-1]["n_positions"] >= 100_000
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(48))
    active = (sae.encode(x) > 0).sum(1).float()
    assert float(active.mean()) == pytest.approx(2, abs=0.2)


def test_directions_keep_their_norm_and_gradients_lie_across_them(monkeypatch):
    x, _ = planted(n=600)
    trainer = Trainer(SparseAutoencoder(D, 40, 3), Recipe(n_positions=600, batch_size=200))
    trainer.prepare(x)
    seen = []
    step = trainer._optimizer.step

    def look():
        directions = trainer.sae.decoder
        along = (directions.grad * directions).sum(1)
        seen.append((float(along.abs().max()), float(directions.grad.abs().max())))
        return step()

    monkeypatch.setattr(trainer._optimizer, "step", look)
    for batch in x.split(200):
        trainer.step(batch)
        torch.testing.assert_close(trainer.sae.decoder.norm(dim=1), torch.ones(40))
    assert len(seen) == 3
    assert all(along < 1e-5 * size for along, size in seen)


def test_normalisation_is_in_the_file(tmp_path):
    """Activations a hundred times as large are explained alike by an autoencoder with a scale to match."""
    x, _ = planted(n=3000)
    recipe = Recipe(n_positions=9000, batch_size=300)
    found = []
    for factor in (1.0, 100.0):
        sae = mediation.fit_sae(factor * x, n_latents=32, k=2, recipe=recipe, buffer=3000, progress=False)
        sae.save_pretrained(tmp_path)
        again = SparseAutoencoder.from_pretrained(tmp_path)
        torch.testing.assert_close(again(factor * x) / factor, sae(factor * x) / factor)
        found.append(again)
    assert float(found[1].scale / found[0].scale) == pytest.approx(100, rel=1e-4)
    torch.testing.assert_close(found[1].decoder, found[0].decoder, rtol=1e-2, atol=1e-3)


def test_the_auxiliary_loss_revives_dead_latents():
    """As many latents as directions, but half of them never win: the auxiliary loss alone gives them a gradient."""
    x, _ = planted(n=4000)
    alive = {}
    for n_auxiliary in (0, 4):
        sae = SparseAutoencoder(D, N_TRUE, 2)
        with torch.no_grad():
            sae.encoder[N_TRUE // 2 :] *= 1e-3
        options = {"learning_rate": 3e-3, "n_auxiliary": n_auxiliary, "dead_after": 1000}
        train(sae, Stored(x, buffer=4000), Recipe(n_positions=100_000, batch_size=500, **options), progress=False)
        alive[n_auxiliary] = float((sae.encode(x) > 0).any(0)[N_TRUE // 2 :].float().mean())
    assert alive[0] < 0.2
    assert alive[4] > 0.8


def test_going_on_equals_never_having_stopped(tmp_path):
    x, _ = planted(n=2100)
    recipe = Recipe(n_positions=6000, batch_size=150, learning_rate=1e-3, dead_after=500, n_auxiliary=4)
    options = {"seed": 5, "progress": False}
    whole = train(SparseAutoencoder(D, 40, 2, activation="batch_topk"), Stored(x, buffer=700), recipe, **options)
    source, path = Interrupted(x, buffer=700, at=4), tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(SparseAutoencoder(D, 40, 2, activation="batch_topk"), source, recipe, checkpoint=path, **options)
    assert path.exists()
    again = train(SparseAutoencoder(D, 40, 2, activation="batch_topk"), source, recipe, checkpoint=path, **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert whole.metadata == again.metadata
    assert len(whole.metadata["training"]["history"]) > 5
    with pytest.raises(ValueError, match="another training"):
        train(SparseAutoencoder(D, 41, 2), source, recipe, checkpoint=path, **options)


def test_training_does_not_go_on_with_other_activations(tmp_path):
    """Of the same shape; and it goes on with the same ones, of whatever kind the array is."""
    x = planted(n=1000)[0]
    options = {"n_latents": 32, "k": 2, "buffer": 500, "checkpoint": tmp_path / "training.safetensors"}
    options |= {"recipe": Recipe(n_positions=900, batch_size=100), "progress": False}
    sae = mediation.fit_sae(x, **options)
    assert torch.equal(mediation.fit_sae(x.numpy(), **options).decoder, sae.decoder)
    for other in (x + 5, x.flip(0)):
        with pytest.raises(ValueError, match=r"another training \(source differ\)"):
            mediation.fit_sae(other, **options)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_streamed_training_that_goes_on_equals_never_having_stopped(tiny_pipe, tmp_path, monkeypatch, activation):
    options = {"site": "unet.down.0.0", "n_latents": 16, "k": 2, "activation": activation, "seed": 3, "progress": False}
    recipe = Recipe(n_positions=300, batch_size=50, learning_rate=1e-3, dead_after=100, n_auxiliary=4)
    options |= {"recipe": recipe, "buffer": 100, "num_inference_steps": 2, "guidance_scale": 4.0}
    whole = mediation.train_sae(tiny_pipe, ["a cat", "a dog"], **options)
    options["checkpoint"] = tmp_path / "training.safetensors"
    window, at = Streamed.window, [2]

    def interrupted(self, number):
        if number in at:
            at.remove(number)
            raise KeyboardInterrupt
        return window(self, number)

    monkeypatch.setattr(Streamed, "window", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mediation.train_sae(tiny_pipe, ["a cat", "a dog"], **options)
    again = mediation.train_sae(tiny_pipe, ["a cat", "a dog"], **options)
    assert again.fingerprint == whole.fingerprint
    assert again.config == whole.config
    assert len(whole.metadata["training"]["history"]) == 3


def test_dead_latents_are_counted():
    """Five of twelve can never be active; they are dead when as many positions have gone by, and not before."""
    x, _ = planted(n=2000)
    sae = SparseAutoencoder(D, 12, 2)
    sae.latent_bias[[0, 3, 4, 7, 11]] = -1e6
    recipe = Recipe(n_positions=1900, batch_size=95, n_auxiliary=0, dead_after=900)
    train(sae, Stored(x, buffer=475), recipe, progress=False)
    history = sae.metadata["training"]["history"]
    assert [(entry["n_positions"], entry["n_dead"]) for entry in history] == [(475, 0), (950, 5), (1425, 5), (1900, 5)]
    assert torch.equal((sae.encode(x) > 0).any(0).logical_not().nonzero()[:, 0], torch.tensor([0, 3, 4, 7, 11]))


@hypothesis.given(n=strategies.integers(2, 400), buffer=strategies.integers(1, 400))
def test_windows_are_about_equally_large_and_hold_each_position_once(n, buffer):
    source = Stored(numpy.arange(float(n))[:, None], buffer=buffer)
    kept = n - len(source.held_out())
    windows = [source.window(number) for number in range(-(-kept // buffer))]
    assert torch.cat(windows)[:, 0].tolist() == list(range(kept))
    sizes = {len(window) for window in windows}
    assert max(sizes) <= buffer
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(source.window(len(windows)), windows[0]), "they begin anew"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_are_read_in_any_precision_and_with_or_without_gradients(dtype):
    x = planted(n=400)[0].to(dtype)
    found = Stored(x.clone().requires_grad_(), buffer=400).window(0)
    assert torch.equal(found, x[:380].float())
    assert not found.requires_grad
    recipe = Recipe(n_positions=800, batch_size=100)
    options = {"n_latents": 32, "k": 2, "recipe": recipe, "progress": False}
    sae = mediation.fit_sae(x.clone().requires_grad_(), **options)
    assert torch.equal(sae.decoder, mediation.fit_sae(x.float(), **options).decoder)


def test_steps_take_as_many_positions_as_the_recipe_says(tiny_pipe, monkeypatch):
    seen, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, x: seen.append(len(x)) or step(self, x))
    x, options = planted(n=2000)[0], {"n_latents": 32, "k": 2, "progress": False}
    with pytest.raises(ValueError, match="a step takes batch_size=951 positions, and a window holds 950"):
        mediation.fit_sae(x, buffer=1000, recipe=Recipe(n_positions=5000, batch_size=951), **options)
    # a window is of three pictures with 64 positions each
    streamed = {"site": "unet.down.0.0", "buffer": 150, "num_inference_steps": 2, **options}
    with pytest.raises(ValueError, match="a step takes batch_size=193 positions, and a window holds 192"):
        mediation.train_sae(tiny_pipe, ["a cat"], recipe=Recipe(n_positions=384, batch_size=193), **streamed)
    assert not seen
    for recipe, buffer, size in [
        (Recipe(n_positions=1900, batch_size=950), 1000, 950),
        (Recipe(n_positions=1900), 1000, 950),
        (Recipe(n_positions=600), 1000, 600),
        (Recipe(n_positions=1900, batch_size=500), 1000, 500),
    ]:
        sae = mediation.fit_sae(x, buffer=buffer, recipe=recipe, **options)
        assert set(seen) == {size}
        assert sae.metadata["training"]["recipe"]["batch_size"] == size
        seen.clear()
    mediation.train_sae(tiny_pipe, ["a cat"], recipe=Recipe(n_positions=384, batch_size=192), **streamed)
    assert seen == [192, 192]


def test_thresholds_count_the_steps_that_were_taken():
    """The first hundred steps' smallest latents count alike, whatever the steps' sizes."""
    x, _ = planted(n=1000)
    trainer = Trainer(SparseAutoencoder(D, 40, 2, activation="batch_topk"), Recipe(n_positions=10_000, batch_size=500))
    trainer.prepare(x)
    smallest = []
    for batch in x.split(100):
        smallest.append(float(losses(trainer.sae, batch, trainer.dead, 0).smallest))
        trainer.step(batch)
        assert float(trainer.sae.threshold) == pytest.approx(sum(smallest) / len(smallest), rel=1e-5)


def test_training_stops_when_nothing_more_is_learned():
    x = torch.randn(2000, D, generator=torch.Generator().manual_seed(0))  # nothing sparse about it
    recipe = Recipe(n_positions=1_000_000, batch_size=200, patience=2, learning_rate=1e-9)
    sae = mediation.fit_sae(x, n_latents=32, k=2, recipe=recipe, buffer=500, progress=False)
    assert len(sae.metadata["training"]["history"]) == 3


def test_streaming_is_training_on_what_the_pipeline_computes(tiny_pipe):
    place, prompts = Place("unet.down.0.0", (1.0, 0.0)), ["a cat", "a dog", "a red bird"]
    source = Streamed(tiny_pipe, prompts, place, sampling=Sampling(2, 4.0), buffer=300, seed=3)
    windows = [source.window(number) for number in (0, 1)]
    assert [window.shape for window in windows] == [(384, 8)] * 2, "three pictures of two steps of 8×8"
    assert torch.equal(source.window(1), windows[1])
    pools = [{tuple(row) for row in rows.tolist()} for rows in (*windows, source.held_out())]
    assert not pools[0] & pools[1]
    assert not pools[2] & (pools[0] | pools[1])
    recipe, options = Recipe(n_positions=600, batch_size=100), {"num_inference_steps": 2, "guidance_scale": 4.0}
    options |= {"n_latents": 16, "k": 2, "recipe": recipe, "buffer": 300, "seed": 3, "progress": False}
    sae = mediation.train_sae(tiny_pipe, prompts, site="unet.down.0.0", steps=(1.0, 0.0), **options)
    expected = train(SparseAutoencoder(8, 16, 2, place=place, seed=3), source, recipe, seed=3, progress=False)
    assert torch.equal(sae.decoder, expected.decoder)
    assert sae.place == place
    assert sae.metadata["training"]["source"]["n_prompts"] == 3
    assert sae.metadata["training"]["history"][-1]["n_positions"] == 600


# diffusers' solver makes arrays of tensors in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("changed", ["weights", "scheduler"])
def test_streamed_training_goes_on_with_the_model_it_began_with(fresh_pipe, tmp_path, changed):
    options = {"site": "unet.mid.0", "n_latents": 16, "k": 2, "recipe": Recipe(n_positions=8, batch_size=4)}
    options |= {"num_inference_steps": 2, "checkpoint": tmp_path / "training.safetensors", "progress": False}
    # this one's settings are infinite in part, and kept nevertheless
    fresh_pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(fresh_pipe.scheduler.config)
    mediation.train_sae(fresh_pipe, ["a cat"], **options)
    mediation.train_sae(fresh_pipe, ["a cat"], **options)
    if changed == "weights":
        with torch.no_grad():
            fresh_pipe.unet.conv_in.bias[0] += 0.1
    else:
        fresh_pipe.scheduler = diffusers.DDIMScheduler.from_config(fresh_pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"another training \(source differ\)"):
        mediation.train_sae(fresh_pipe, ["a cat"], **options)


def test_one_window_is_in_memory_at_a_time(tiny_pipe, monkeypatch):
    """One window, an eighth of that for its order, an eighth to find the bias from, and a little; never a second."""

    def draw(pipe, prompts, seeds, places, *, sampling, batch_size=None):
        for start in range(0, len(prompts), 32):
            rows = prompts[start : start + 32]
            yield types.SimpleNamespace(activations={places[0]: torch.randn(len(rows), 1, 8, 8, D)})

    monkeypatch.setattr(sources, "observe", draw)
    buffer = 131_072
    recipe = Recipe(n_positions=2 * buffer, batch_size=2048)
    options = {"site": "unet.down.0.0", "n_latents": 16, "k": 2, "recipe": recipe, "buffer": buffer, "progress": False}
    with Memory() as memory:
        sae = mediation.train_sae(tiny_pipe, ["a cat"], **options)
    assert len(sae.metadata["training"]["history"]) == 2
    window = buffer * D * 4
    assert window < memory.most < 1.5 * window


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_positions": 0}, "n_positions must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 101, "n_positions": 100}, "a step of batch_size=101 is more than n_positions=100"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"n_auxiliary": -1}, "at least 0"),
        ({"patience": 0}, "at least 1"),
    ],
)
def test_recipes_that_cannot_be_followed_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**wrong)


@pytest.mark.parametrize("value", [numpy.inf, numpy.nan])
def test_activations_that_are_not_finite_are_noticed_wherever_they_are(tmp_path, value):
    """In the third window, training ends there, and goes on from the second when they are mended."""
    x = planted(n=1000)[0].numpy()
    options = {"n_latents": 32, "k": 2, "buffer": 320, "checkpoint": tmp_path / "training.safetensors"}
    options |= {"recipe": Recipe(n_positions=900, batch_size=100), "progress": False}
    whole = mediation.fit_sae(x, **options | {"checkpoint": None})
    broken = x.copy()
    broken[800, 3] = value
    with pytest.raises(ValueError, match=r"the loss is (inf|nan) after (6|7|8)00 positions"):
        mediation.fit_sae(broken, **options)
    assert torch.equal(mediation.fit_sae(x, **options).decoder, whole.decoder)
    broken = x.copy()
    broken[-1, 3] = value
    with pytest.raises(ValueError, match="the 50 activations that are held out must be finite"):
        mediation.fit_sae(broken, **options | {"checkpoint": None})
    with pytest.raises(ValueError, match="the 1 activations that are held out"):
        mediation.fit_sae(x[:30], n_latents=32, k=2, progress=False)


def test_activations_without_anything_to_learn_are_errors():
    for wrong in (numpy.ones((50, 4)), numpy.full((50, 4), numpy.nan)):
        with pytest.raises(ValueError, match="finite, and not all alike"):
            mediation.fit_sae(wrong, progress=False)
    flat = numpy.r_[numpy.ones((950, 4)), numpy.arange(200.0).reshape(50, 4)]
    with pytest.raises(ValueError, match="nothing to learn"):
        mediation.fit_sae(flat, progress=False)
    with pytest.raises(ValueError, match="at least two"):
        mediation.fit_sae(numpy.ones((1, 4)), progress=False)
    with pytest.raises(ValueError, match="16 features"):
        train(SparseAutoencoder(4, 8, 2), Stored(planted(n=100)[0], buffer=50), Recipe())


@pytest.mark.parametrize(("limit", "clips"), [(1.0, True), (0.5, True), (1e6, False), (None, False)])
def test_gradients_are_no_longer_than_said(monkeypatch, limit, clips):
    """All together, and along their own direction; what is shortened, others explain by the same length."""
    x = planted(n=1000)[0]
    seen = {}
    for name, norm in (("limited", limit), ("free", None)):
        sae = SparseAutoencoder(x.shape[1], 12, 2)
        trainer = Trainer(sae, Recipe(n_positions=1000, batch_size=1000, max_gradient_norm=norm))
        trainer.prepare(x)
        monkeypatch.setattr(trainer._optimizer, "step", lambda: None)
        trainer.step(x)
        seen[name] = torch.cat([parameter.grad.flatten() for parameter in sae.parameters()])
    lengths = {name: float(gradient.norm()) for name, gradient in seen.items()}
    assert lengths["free"] > 1
    assert lengths["limited"] == pytest.approx(limit if clips else lengths["free"], rel=1e-4)
    torch.testing.assert_close(seen["limited"] / lengths["limited"], seen["free"] / lengths["free"])
