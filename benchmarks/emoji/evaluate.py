"""Measures the bundled model: what the probe reads in images of held-out captions, against what they say.

Every caption belongs to an (object, style, background) triple that training never showed. A factor is judged where the
caption states it; the background also where it is unsaid, and therefore white.

Run: python -m benchmarks.emoji.evaluate --pipeline mediation/bundled/emoji/pipeline --output runs/evaluation
"""

import argparse
import json
import pathlib
import time

import numpy
import torch
from PIL import Image
from tqdm import tqdm

import mediation
from benchmarks.emoji import train_vae, world
from benchmarks.emoji.judging import hits, interval, on_renders
from mediation import bundled

# the one guidance scale that is used and reported
GUIDANCE_SCALE = 4.0
TARGETS = {"object": 0.90, "style": 0.85, "background": 0.97, "count": 0.90, "fact": 0.90}


def generate(pipe, prompts: list[str], *, seed: int, steps: int = 25, guidance_scale=GUIDANCE_SCALE, batch_size=50):
    """Images in [0, 1], one per prompt, with one seed per image."""
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="sampling", disable=None):
        chunk = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        output = pipe(
            chunk, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, output_type="pt"
        )
        images.append(output.images.float())
    return torch.cat(images)


def judged(caption: world.Caption, factor: str) -> bool:
    """Whether the caption says (or leaves at its default) what the probe is asked about."""
    if factor == "fact":
        return "fact" in caption.said
    return factor in caption.said or (factor == "background" and "background" not in caption.said)


def sheet(images: torch.Tensor, columns: int, scale: int = 2) -> Image.Image:
    """A contact sheet of images in [0, 1]."""
    rows = len(images) // columns
    grid = images[: rows * columns].unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    picture = Image.fromarray((grid * 255).round().byte().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


@torch.no_grad()
def main() -> None:
    """Generates, judges, prints a table and writes it with a contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=pathlib.Path, default=bundled.pipeline_folder())
    parser.add_argument("--unet", type=pathlib.Path, help="another denoiser, as a training run's")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/evaluation"))
    options = parser.parse_args()
    pipe = mediation.load_pipeline(options.pipeline)
    if options.unet:
        pipe.unet = type(pipe.unet).from_pretrained(options.unet).eval()
    pipe.set_progress_bar_config(disable=True)
    probe = bundled.load_probe()
    rng = numpy.random.default_rng(options.seed)
    captions = [world.sample(rng, "held_out") for _ in range(options.captions)]
    renders = world.render([caption.scene for caption in captions], rng)
    started = time.monotonic()
    images = generate(
        pipe, [c.text for c in captions], seed=options.seed, steps=options.steps, guidance_scale=options.guidance_scale
    )
    seconds = time.monotonic() - started
    right = hits(probe, images, [caption.scene for caption in captions])
    generated = {
        factor: interval(values[torch.tensor([judged(caption, factor) for caption in captions])])
        for factor, values in right.items()
    }
    by_style = {}
    for style in world.STYLES:
        named = [judged(caption, "style") and caption.scene.style == style for caption in captions]
        if any(named):
            by_style[style] = interval(right["style"][torch.tensor(named)])
    real = on_renders(probe)
    report = {
        "captions": options.captions,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "generated": generated,
        "generated_by_style": by_style,
        "probe_on_renders": real,
        "vae_psnr": train_vae.psnr(pipe.vae),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=1))
    sheet(images[:96], 12).save(options.output / "samples.png")
    sheet((renders[:96] + 1) / 2, 12).save(options.output / "renders.png")
    (options.output / "captions.txt").write_text("\n".join(caption.text for caption in captions[:96]) + "\n")
    settings = f"{options.steps} steps, guidance {options.guidance_scale}, seed {options.seed}"
    print(f"{options.captions} held-out captions, {settings}")
    for factor, values in generated.items():
        target = f"target {TARGETS[factor]:.0%}" if factor in TARGETS else ""
        print(
            f"{factor:>10} {values['accuracy']:6.1%} [{values['low']:.1%}, {values['high']:.1%}] n={values['n']:<4}"
            f" {target:<12} probe on renders {real[factor]['accuracy']:.1%}"
        )
    for style, values in by_style.items():
        print(f"{style:>10} {values['accuracy']:6.1%} [{values['low']:.1%}, {values['high']:.1%}] n={values['n']}")
    print(f"VAE PSNR on held-out renders {report['vae_psnr']:.2f} dB; {options.output / 'samples.png'}")


if __name__ == "__main__":
    main()
