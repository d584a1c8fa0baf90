"""Speed of training a sparse autoencoder, beside dictionary-learning and SAELens, on the same activations.

All train a TopK autoencoder of the same width and k, on the same batches in the same order, with the same learning
rate, which falls to 0 over the last fifth, and with gradients clipped at norm 1; in turns, in one run. Only steps are
timed, not the making of activations.
What counts is positions per second at equal explained variance, on activations that none of them saw. Beside it stands
the peak memory of streaming from the pipeline into training.

dictionary-learning and SAELens are no requirements of this project. Install them in an environment of their own; what
is not installed is left out, and the report says so. Versions are in the report.

Writes report.json and report.md.

Run: python -m benchmarks.speed.autoencoders --output runs/speed/autoencoders
"""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import torch

import mediation
from benchmarks.emoji.evaluate import GUIDANCE_SCALE
from benchmarks.emoji.train_sae import captions
from benchmarks.speed.measuring import in_words, machine, peak_memory, ratio, spread, time_in_turns
from mediation.autoencoders.objective import explained_variance
from mediation.autoencoders.sources import Streamed
from mediation.autoencoders.training import Trainer
from mediation.sampling import Sampling

_OTHERS = {"dictionary-learning": "dictionary_learning", "sae-lens": "sae_lens"}


def activations(site: str, n_positions: int, seed: int) -> torch.Tensor:
    """Activations (position, feature) of the first step, of pictures of the emoji world."""
    place, prompts = mediation.Place(site), captions(1000, seed=seed)
    source = Streamed(
        mediation.load_pipeline(), prompts, place, sampling=Sampling(10, GUIDANCE_SCALE), buffer=n_positions, seed=seed
    )
    return source.window(0)[:n_positions]


def ours(batches: Sequence[torch.Tensor], n_latents: int, k: int, rate: float) -> Callable[[], Callable]:
    """Training by this project; calling it trains, and returns what reconstructs."""
    recipe = mediation.Recipe(
        n_positions=sum(map(len, batches)), batch_size=len(batches[0]), learning_rate=rate, dead_after=10_000_000
    )

    def run() -> Callable:
        sae = mediation.SparseAutoencoder(batches[0].shape[1], n_latents, k)
        trainer = Trainer(sae, recipe)
        trainer.prepare(batches[0])
        for batch in batches:
            trainer.step(batch)
        return sae

    return run


def by_dictionary_learning(batches: Sequence[torch.Tensor], n_latents: int, k: int, rate: float) -> Callable:
    """The same by `TopKTrainer` of dictionary-learning, whose latents also die after ten million positions."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    def run() -> Callable:
        trainer = TopKTrainer(
            steps=len(batches),
            activation_dim=batches[0].shape[1],
            dict_size=n_latents,
            k=k,
            layer=0,
            lm_name="emoji",
            lr=rate,
            warmup_steps=1,
            decay_start=len(batches) * 4 // 5,
            seed=0,
            device="cpu",
        )
        for step, batch in enumerate(batches):
            trainer.update(step, batch)
        return trainer.ae

    return run


def by_saelens(batches: Sequence[torch.Tensor], n_latents: int, k: int, rate: float) -> Callable:
    """The same by `SAETrainer` of SAELens, with what its own toy training sets."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    size, n_positions = len(batches[0]), sum(map(len, batches))

    def run() -> Callable:
        config = SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=n_positions,
            device="cpu",
            autocast=False,
            lr=rate,
            lr_end=0.0,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=len(batches) // 5,
            n_restart_cycles=1,
            train_batch_size_samples=size,
            dead_feature_window=10_000_000 // size,
            feature_sampling_window=2000,
            logger=LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=2**31 - 1),
        )
        # its sparse activations have no gradient on the CPU, as of torch 2.13
        options = {"d_in": batches[0].shape[1], "d_sae": n_latents, "k": k, "use_sparse_activations": False}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**options))
        return SAETrainer(cfg=config, sae=sae, data_provider=iter(batches)).fit()

    return run


def compare(found: torch.Tensor, n_latents: int, k: int, batch_size: int, repeats: int) -> dict:
    """Trains by all that is installed, in turns, on all but a twentieth of the activations."""
    found = found / found.square().mean().sqrt()  # clipped gradients of others suppose activations of this size
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    n_held = len(found) // 20
    held_out, rest = found[order[:n_held]], found[order[n_held:]]
    batches = [batch for batch in rest.split(batch_size) if len(batch) == batch_size]
    # the law by which dictionary-learning and this project set it
    rate = 2e-4 * (2**14 / n_latents) ** 0.5
    runs = {"this project": ours(batches, n_latents, k, rate)}
    makers = {"dictionary-learning": by_dictionary_learning, "sae-lens": by_saelens}
    for name, module in _OTHERS.items():
        if importlib.util.find_spec(module):
            runs[name] = makers[name](batches, n_latents, k, rate)
    n = sum(map(len, batches))
    trained: dict[str, list[Callable]] = {name: [] for name in runs}
    keeping = {name: lambda name=name: trained[name].append(runs[name]()) for name in runs}
    speeds = {name: [n / one for one in seconds] for name, seconds in time_in_turns(keeping, repeats).items()}
    # the first of each was not timed
    explained = {
        name: [explained_variance(model, held_out) for model in models[1:]] for name, models in trained.items()
    }
    return {
        "n_positions": n,
        "n_features": found.shape[1],
        "n_latents": n_latents,
        "k": k,
        "batch_size": batch_size,
        "learning_rate": rate,
        "missing": [name for name in _OTHERS if name not in runs],
        "versions": {name: importlib.metadata.version(name) for name in runs if name in _OTHERS},
        "positions_per_second": {name: spread(values) for name, values in speeds.items()},
        "explained_variance": {name: spread(values) for name, values in explained.items()},
        "speedup": {name: ratio(speeds["this project"], values) for name, values in speeds.items() if name in _OTHERS},
    }


def prepare_streaming(site: str, buffer: int, n_positions: int) -> Callable[[], object]:
    """Training straight from the pipeline, warmed up by one window."""
    pipe, prompts = mediation.load_pipeline(), captions(100, seed=0)

    def train(n: int, size: int) -> object:
        options = {"num_inference_steps": 10, "guidance_scale": GUIDANCE_SCALE, "progress": False}
        recipe = mediation.Recipe(n_positions=n, batch_size=min(4096, size))
        return mediation.train_sae(pipe, prompts, site=site, recipe=recipe, buffer=size, **options)

    train(512, 512)
    return lambda: train(n_positions, buffer)


def memory_by_buffer(site: str, buffers: Sequence[int]) -> dict[int, float]:
    """Peak memory in MiB above the loaded pipeline's, of training on three windows of each size."""
    return {buffer: peak_memory(prepare_streaming, site, buffer, 3 * buffer) for buffer in buffers}


def markdown(report: Mapping) -> str:
    """The report as a page."""
    ran, found = report["machine"], report["training"]
    lines = [
        "# Speed of training sparse autoencoders",
        "",
        f"{ran['processor']}, {ran['cores']} cores, {ran['threads']} threads, load {ran['load']:.1f}.",
        f"{found['n_positions']:,} positions of {found['n_features']} features, {found['n_latents']} latents,"
        f" k={found['k']}, batches of {found['batch_size']}. Medians and ranges of turns.",
        "",
        "| by | positions per second | explained variance | this project is |",
        "|---|---|---|---|",
    ]
    for name, speed in found["positions_per_second"].items():
        times = f"{in_words(found['speedup'][name], 'x')} as fast" if name in found["speedup"] else ""
        explained = found["explained_variance"][name]
        shares = f"{explained['median']:.1%} [{explained['low']:.1%}, {explained['high']:.1%}]"
        lines.append(f"| {name} | {in_words(speed)} | {shares} | {times} |")
    if found["missing"]:
        lines += ["", f"Not installed, and not compared: {', '.join(found['missing'])}."]
    lines += ["", "The aim: at least as fast as either, and explained variance at most a point below theirs.", ""]
    lines += ["## Memory", "", "Streaming three windows from the pipeline into training.", ""]
    lines += ["| positions in a window | MiB of activations | peak MiB |", "|---|---|---|"]
    for buffer, peak in report["memory"].items():
        lines.append(f"| {int(buffer):,} | {int(buffer) * found['n_features'] * 4 / 2**20:.0f} | {peak:.0f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures, and writes results as JSON and as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/speed/autoencoders"))
    parser.add_argument("--site", default="unet.up.1.0")
    parser.add_argument("--positions", type=int, default=500_000)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = activations(options.site, options.positions, seed=0)
    report = {
        "machine": machine(),
        "site": options.site,
        "training": compare(found, options.latents, options.k, options.batch_size, options.repeats),
        "memory": memory_by_buffer(options.site, (4096, 16_384, 65_536)),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "report.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
