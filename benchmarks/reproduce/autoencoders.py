"""Do concepts emerge, and can they be steered? Claims of Tinaz et al. (NeurIPS 2025, arXiv:2504.15473), tested.

Three blocks of Emoji Diffusion's U-Net × three stages of sampling × both branches have an autoencoder each. Measured
are what it explains, how much of the finished layout it shows, and, of the conditional branch, whether steering by its
latents puts objects into quadrants and changes styles and backgrounds, beside random latents, random directions and no
steering. Everything is saved as soon as it is ready, and found again when the command is called again.

Run: python -m benchmarks.reproduce.autoencoders --output runs/reproduce/autoencoders

Cost with the defaults, in row-evaluations of the U-Net: 80,000 for activations, 8,000 for dictionaries, 4,000 for
layouts and 139,000 for steering, 43 minutes on two cores that evaluate 90 rows per second. Then there is training, of
eighteen autoencoders on a million positions each.

A quarter of an hour on one core, 38,000 row-evaluations, with 32 pictures per quadrant success and 40 per style's:

    python -m benchmarks.reproduce.autoencoders --threads 1 --steps 6 --images 800 --positions 300000 --labelled 150
    --watched 100 --tuned 1 --objects 8 --experiments quadrant style
"""

import argparse
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Sequence

import matplotlib.pyplot
import torch

import mediation
from benchmarks.reproduce import maps, report
from benchmarks.reproduce.saes import preparing, trials, verdicts
from benchmarks.reproduce.saes.preparing import BLOCKS, Settings
from mediation import bundled

_SCOPE = (
    "These results are about Emoji Diffusion: a small U-Net, one small world of pictures, few steps, small"
    " autoencoders, judges that know this world alone: a rule that tells sprites from ground, and a probe."
    " The strength of steering is chosen on other pictures at one stage, early for quadrants and in the middle for"
    " styles and backgrounds, and is the same at all stages, so that what is said of a stage without effect is said of"
    " a strength that has one elsewhere."
    " Its sprites stand in the middle of the picture, so an object in a quadrant is something that it never saw; it"
    " counts as there if more than two fifths of it are. Of the claim that final stages change minor textures alone,"
    " only what they should not change was tested."
    " What is reproduced here is not peculiar to SD 1.4; what is not is not refuted for it."
)


def run(settings: Settings, blocks: Sequence[str], experiments: Sequence[str], folder: pathlib.Path) -> None:
    """Makes whatever is missing, and writes pages and figures."""
    pipe = mediation.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    model = maps.fingerprint(pipe, [bundled.load_probe()])
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{what} after {time.monotonic() - started:.0f} s", flush=True)

    saes = preparing.autoencoders(pipe, blocks, settings, folder, model)
    tell(f"{len(saes)} autoencoders")
    named = preparing.dictionaries(pipe, saes, settings, folder, model)
    tell("dictionaries")
    layouts = preparing.layouts(pipe, saes, named, settings)
    tell("layouts")
    studio, records = trials.Studio(pipe, settings), {}
    for experiment, block in itertools.product(experiments, blocks):
        found = trials.run(studio, saes, named, experiment, block, folder / "steering", model)
        records |= {(experiment, block, stage): record for stage, record in found.items()}
        tell(f"{experiment} by {block}")
    claims = verdicts.all_claims(layouts, records)
    told = {"pipeline": "Emoji Diffusion", "fingerprint": model[:12], **dataclasses.asdict(settings)}
    report.write(claims, folder, told, _SCOPE, title="Claims on concepts in diffusion models, tested")
    figure = mediation.plot_emergence(layouts).figure
    figure.savefig(folder / "emergence.png", dpi=200)
    matplotlib.pyplot.close(figure)
    random = preparing.explained_by_random(blocks, settings, folder)
    (folder / "tables.md").write_text(verdicts.tables(mediation.summarize_emergence(layouts), random, records))
    for claim in claims:
        print(f"{claim.name}: {claim.verdict}")


def main() -> None:
    """Reads options and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/reproduce/autoencoders"))
    for name, known in (("blocks", BLOCKS), ("experiments", trials.EXPERIMENTS)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(known), default=list(known), help="only these")
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help=f"default {field.default}")
    parser.add_argument("--threads", type=int, help="threads of torch; as torch chooses by default")
    options = vars(parser.parse_args())
    folder, threads = options.pop("output"), options.pop("threads")
    blocks, experiments = (list(dict.fromkeys(options.pop(name))) for name in ("blocks", "experiments"))
    if threads:
        torch.set_num_threads(threads)
    run(Settings(**options), blocks, experiments, folder)


if __name__ == "__main__":
    main()
