"""Sites: the places in a pipeline where an activation can be restored."""

import dataclasses
import fnmatch
from collections.abc import Iterator

from diffusers import DiffusionPipeline
from torch import nn

from mediation.pipelines import family_of


@dataclasses.dataclass(frozen=True)
class Site:
    """One module's output.

    Attributes:
        name: unique in the pipeline, as "unet.down.0.0.cross_attention" or "text_encoder.0.self_attention".
        network: the pipeline's attribute that holds the network, as "unet" or "text_encoder".
        component: self_attention, cross_attention, feed_forward or resnet; in text encoders, self_attention or mlp.
        layer: counts the sites of this network and component in execution order, from 0.
        block: the part of the network, as "down.0", "mid", "up.2"; in text encoders, the layer.
        path: the module's dotted path in the network.
    """

    name: str
    network: str
    component: str
    layer: int
    block: str
    path: str

    def module(self, pipe: DiffusionPipeline) -> nn.Module:
        """The module of `pipe` whose output this is."""
        return getattr(pipe, self.network).get_submodule(self.path)


def sites(
    pipe: DiffusionPipeline,
    *,
    network: str | None = None,
    component: str | None = None,
    layer: int | None = None,
    block: str | None = None,
    name: str | None = None,
) -> list[Site]:
    """Lists the sites of a pipeline in execution order, text encoders first.

    Args:
        pipe: a diffusers pipeline of a supported family.
        network: keeps the sites of this network.
        component: keeps the sites of this kind.
        layer: keeps the sites with this index.
        block: keeps the sites of this block.
        name: keeps the sites whose name matches this glob, as "unet.up.*".

    Raises:
        ValueError: if the pipeline's family is unknown, or nothing matches.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> mediation.sites(pipe, network="text_encoder", component="self_attention")[0].name
        'text_encoder.0.self_attention'
    """
    every = list(_all_sites(pipe))
    wanted = {"network": network, "component": component, "layer": layer, "block": block}
    wanted = {field: value for field, value in wanted.items() if value is not None}
    for field, value in wanted.items():
        known = list(dict.fromkeys(getattr(site, field) for site in every))
        if value not in known:
            raise ValueError(f"no site has {field}={value!r}; this pipeline has {', '.join(map(str, known))}")
    chosen = [site for site in every if all(getattr(site, field) == value for field, value in wanted.items())]
    if name is not None:
        chosen = [site for site in chosen if fnmatch.fnmatchcase(site.name, name)]
    if not chosen:
        raise ValueError(f"no site matches {wanted | ({'name': name} if name is not None else {})}")
    return chosen


def _all_sites(pipe: DiffusionPipeline) -> Iterator[Site]:
    family = family_of(pipe)
    networks = [(encoder, family.text_spots) for encoder, _ in family.text_encoders]
    networks.append((family.denoiser, family.denoiser_spots))
    for network, spots in networks:
        n_seen: dict[str, int] = {}
        for spot in spots(getattr(pipe, network)):
            layer = n_seen.get(spot.component, 0)
            n_seen[spot.component] = layer + 1
            name = f"{network}.{spot.position}.{spot.component}"
            yield Site(name, network, spot.component, layer, spot.block, spot.path)


def resolve(pipe: DiffusionPipeline, chosen: list | None) -> list[tuple[Site, ...]]:
    """Turns what a user names into groups of sites that are restored together; None is every site, one by one.

    Args:
        pipe: the pipeline.
        chosen: sites or their names; a list or tuple of them is one group.

    Raises:
        KeyError: if a name is no site of this pipeline.
        TypeError: if an entry is neither a site nor a name.
    """
    every = {site.name: site for site in _all_sites(pipe)}

    def one(entry: Site | str) -> Site:
        if not isinstance(entry, Site | str):
            raise TypeError(f"sites are Site objects or names, got {type(entry).__name__}")
        name = entry.name if isinstance(entry, Site) else entry
        if name not in every:
            close = ", ".join(list(every)[:3])
            raise KeyError(f"no site {name!r} in this pipeline; names look like {close}: see mediation.sites(pipe)")
        return every[name]

    if chosen is None:
        return [(site,) for site in every.values()]
    if isinstance(chosen, Site | str):
        chosen = [chosen]
    groups = [tuple(map(one, entry)) if isinstance(entry, list | tuple) else (one(entry),) for entry in chosen]
    if not groups or not all(groups):
        raise ValueError("no sites were given: pass None for all, or a list of sites or names")
    return groups
