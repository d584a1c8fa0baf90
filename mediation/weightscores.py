"""Scores of single weights, as a value: kept in files, and summed to a map."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy
import torch
import xarray

from mediation import tensorfiles
from mediation.parameters import canonical, native
from mediation.sites import Site

_SIGNS = ("both", "positive", "negative")
_FORMAT = "mediation.Attribution/1"


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """What each of some weights w_i contributes to an objective J: w_i · dJ/dw_i ≈ J(w) − J(w with w_i = 0).

    Attributes:
        scores: parameter name -> w · dJ/dw, in the parameter's shape, float32 on the CPU.
        weights: the same names -> w itself, in the pipeline's dtype, on the CPU.
        sites: the same names -> the site that the parameter is part of.
        base: the same names -> fingerprint of the weight, which tells one model from another.
        metadata: objective, its value J, and what is needed to compute it again, as plain JSON.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> found = mediation.attribute(pipe, "ink", parameters="unet.mid.0.feed_forward", num_inference_steps=2)
        >>> found
        <Attribution of erase 'ink': 442,368 weights of 2 parameters>
    """

    scores: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    sites: Mapping[str, Site]
    base: Mapping[str, Mapping]
    metadata: Mapping

    def __post_init__(self):
        shapes = {name: score.shape for name, score in self.scores.items()}
        if {name: weight.shape for name, weight in self.weights.items()} != shapes:
            raise ValueError("scores and weights are of different parameters, or differ in shape")
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, MappingProxyType(dict(getattr(self, field.name))))

    def __reduce__(self):
        return Attribution, tuple(dict(getattr(self, field.name)) for field in dataclasses.fields(self))

    def __repr__(self) -> str:
        n = sum(score.numel() for score in self.scores.values())
        plural = "" if len(self.scores) == 1 else "s"
        what = f"{self.metadata['objective']} {self.metadata['concept']!r}"
        return f"<Attribution of {what}: {n:,} weights of {len(self.scores)} parameter{plural}>"

    def to_dataset(self, *, sign: str = "both") -> xarray.Dataset:
        """Sums the scores of each site: a causal map, estimated to first order, of setting a site's weights to 0.

        It is a map of knocked-out runs with one case: `clean` is J, `restored` J without the site's weights, so that
        the indirect effect is the sum of their scores; `corrupted` is J without all the weights that were scored.

        Args:
            sign: sums "both" signs, only "positive" or only "negative" scores in the map.

        Returns:
            A Dataset that `mediation.compare`, `plot_effects` and the like take, with coordinates on site as of
            `mediation.trace`; and, by site, the variables positive and negative, the sums of either sign, and
            n_weights. What is in no site is listed by module, with component "other" and layer -1.

        Raises:
            ValueError: if `sign` is none of the three.

        Example:
            >>> import mediation
            >>> pipe = mediation.load_pipeline()
            >>> found = mediation.attribute(pipe, "ink", parameters="unet.mid.*", num_inference_steps=2)
            >>> effects = found.to_dataset()
            >>> ax = mediation.plot_effects(effects)
            >>> float(effects.positive.min()) >= 0
            True
        """
        if sign not in _SIGNS:
            raise ValueError(f"sign must be one of {', '.join(_SIGNS)}; got {sign!r}")
        places = list(dict.fromkeys(self.sites[name] for name in self.scores))
        sums = {name: numpy.zeros(len(places)) for name in ("positive", "negative", "n_weights")}
        for name, score in self.scores.items():
            place = places.index(self.sites[name])
            sums["positive"][place] += float(score.double().clamp(min=0).sum())
            sums["negative"][place] += float(score.double().clamp(max=0).sum())
            sums["n_weights"][place] += score.numel()
        chosen = sums["positive"] + sums["negative"] if sign == "both" else sums[sign]
        value = self.metadata["value"]
        alone, whole = ("case", "draw", "site"), ("case", "draw")
        return xarray.Dataset(
            {
                "clean": (whole, [[value]]),
                "corrupted": (whole, [[value - chosen.sum()]]),
                "sham": (alone, numpy.full((1, 1, len(places)), value)),
                "restored": (alone, (value - chosen)[None, None]),
                "positive": ("site", sums["positive"]),
                "negative": ("site", sums["negative"]),
                "n_weights": ("site", sums["n_weights"].astype(int)),
            },
            coords={
                "case": [0],
                "draw": [0],
                "site": [site.name for site in places],
                **{
                    field: ("site", [getattr(site, field) for site in places])
                    for field in ("network", "component", "layer", "block", "path")
                },
            },
            attrs={
                "backend": "components",
                "estimate": "first order in the weights",
                "sign": sign,
                "metric": f"the {self.metadata['objective']} objective",
                "intervention": "knock_out",
                "attribution": json.dumps(dict(self.metadata), ensure_ascii=False),
            },
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes scores and weights to one safetensors file, and everything else as JSON in its header.

        Args:
            path: ends in ".safetensors".

        Raises:
            ValueError: if `path` ends otherwise.

        Example:
            >>> import mediation, tempfile
            >>> pipe = mediation.load_pipeline()
            >>> found = mediation.attribute(pipe, "ink", parameters="unet.mid.0.feed_forward", num_inference_steps=1)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     found.save(f"{folder}/ink.safetensors")
            ...     mediation.Attribution.load(f"{folder}/ink.safetensors").metadata["concept"]
            'ink'
        """
        tensors, records = {}, {}
        for name in self.scores:
            stored = canonical(name)
            tensors |= {f"{stored}.score": self.scores[name], f"{stored}.weight": self.weights[name]}
            records[stored] = {
                "base": self.base[name],
                "site": dataclasses.asdict(_renamed(self.sites[name], canonical)),
            }
        tensorfiles.write(path, tensors, {"metadata": dict(self.metadata), "parameters": records}, _FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Attribution":
        """Reads what `save` wrote; parameter names are in the layout of the installed transformers.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no attribution file, or is truncated, or was changed since it was written.
        """
        tensors, header = tensorfiles.read(path, _FORMAT)
        records = header["parameters"]
        names = {stored: native(stored, record["base"]["network"]) for stored, record in records.items()}
        return cls(
            scores={name: tensors[f"{stored}.score"] for stored, name in names.items()},
            weights={name: tensors[f"{stored}.weight"] for stored, name in names.items()},
            sites={name: _restored(records[stored]) for stored, name in names.items()},
            base={name: records[stored]["base"] for stored, name in names.items()},
            metadata=header["metadata"],
        )


def _renamed(site: Site, rename: Callable[[str], str]) -> Site:
    """The site with its path in another layout of parameters' names."""
    path = rename(f"{site.network}.{site.path}.").partition(".")[2]  # a parameter's name goes on behind the path
    return dataclasses.replace(site, path=path.removesuffix("."))


def _restored(record: Mapping[str, Mapping]) -> Site:
    """The site of a stored parameter, in the layout of the installed transformers."""
    return _renamed(Site(**record["site"]), functools.partial(native, network_class=record["base"]["network"]))
