"""Sites: the places in a pipeline where an activation can be restored."""

import collections
import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Iterator, Sequence

from diffusers import DiffusionPipeline
from torch import nn

from mediation.pipelines import family_of

_CONTAINERS = ("transformer", "block")  # sites that hold others


@dataclasses.dataclass(frozen=True)
class Site:
    """One module's output, or one attention head: its slice of what the attention's output projection reads.

    Attributes:
        name: unique in the pipeline, as "unet.down.0.0.cross_attention", "text_encoder.0.self_attention" or
            "unet.mid.0.self_attention.head.3".
        network: the pipeline's attribute that holds the network, as "unet" or "text_encoder".
        component: self_attention, cross_attention, feed_forward, resnet, transformer or block; in text encoders,
            self_attention, mlp or block.
        layer: counts the sites of this network and component in execution order, from 0; heads share their attention's.
        block: the part of the network, as "down.0", "mid", "up.2"; in text encoders, the layer.
        path: the module's dotted path in the network; of a head, the output projection's.
        head: index of the head, or None.
        n_heads: heads that share the projection's input; 1 if this is no head.
    """

    name: str
    network: str
    component: str
    layer: int
    block: str
    path: str
    head: int | None = None
    n_heads: int = 1

    def module(self, pipe: DiffusionPipeline) -> nn.Module:
        """The module of `pipe` whose output this is, or, of a head, whose input it is a slice of."""
        return getattr(pipe, self.network).get_submodule(self.path)

    def features(self, n_features: int) -> slice:
        """The part of an activation's last dimension, of this size, that the site is."""
        if self.head is None:
            return slice(None)
        width = n_features // self.n_heads
        return slice(self.head * width, (self.head + 1) * width)


def sites(
    pipe: DiffusionPipeline,
    *,
    network: str | None = None,
    component: str | None = None,
    layer: int | None = None,
    block: str | None = None,
    name: str | None = None,
    heads: bool = False,
) -> list[Site]:
    """Lists the sites of a pipeline in execution order, text encoders first.

    Transformers and whole blocks contain other sites, so they are listed only when asked for, by `component` or by a
    `name` that no other site has.

    Args:
        pipe: a diffusers pipeline of a supported family.
        network: keeps the sites of this network.
        component: keeps the sites of this kind.
        layer: keeps the sites with this index.
        block: keeps the sites of this block.
        name: keeps the sites whose name matches this glob, as "unet.up.*".
        heads: lists the single heads of attentions in place of modules.

    Raises:
        ValueError: if the pipeline's family is unknown, or nothing matches.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> mediation.sites(pipe, network="text_encoder", component="self_attention")[0].name
        'text_encoder.0.self_attention'
        >>> mediation.sites(pipe, component="cross_attention", block="mid", heads=True)[1].name
        'unet.mid.0.cross_attention.head.1'
    """
    hidden = () if component in _CONTAINERS else _CONTAINERS
    kind = "head" if heads else "site"
    wanted = {"network": network, "component": component, "layer": layer, "block": block}
    wanted = {field: value for field, value in wanted.items() if value is not None}
    every = _all_sites(pipe, network, heads=heads)
    matching = [site for site in every if all(getattr(site, field) == value for field, value in wanted.items())]
    chosen = [site for site in matching if site.component not in hidden]
    for field, value in wanted.items() if not chosen else ():
        every = (site for site in _all_sites(pipe, heads=heads) if site.component not in hidden)
        known = list(dict.fromkeys(getattr(site, field) for site in every))
        if value not in known:
            raise ValueError(f"no {kind} has {field}={value!r}; this pipeline has {', '.join(map(str, known))}")
    if name is not None:
        matching = [site for site in matching if fnmatch.fnmatchcase(site.name, name)]
        chosen = [site for site in matching if site.component not in hidden] or matching
    if not chosen:
        raise ValueError(f"no {kind} matches {wanted | ({'name': name} if name is not None else {})}")
    return chosen


def neighbours(layers: Sequence[Site], n: int) -> list[list[Site]]:
    """Sliding windows of neighbouring layers, to be changed together (Meng et al. 2022, arXiv:2202.05262).

    A layer alone may carry too little to be seen. All groups have n layers, so that their effects can be compared;
    those of ROME are cut short at both ends.

    Args:
        layers: consecutive ones of a network and component, as `mediation.sites` lists them.
        n: layers of each group.

    Returns:
        Groups in execution order, as `mediation.trace` takes them for `sites`; there are len(layers) − n + 1. Figures
        call a group by the layer in its middle.

    Raises:
        TypeError: if the layers are no sites.
        ValueError: if they are not neighbours, or fewer than n.

    Example:
        >>> import mediation
        >>> layers = mediation.sites(mediation.load_pipeline(), network="text_encoder", component="mlp")
        >>> [[site.layer for site in group] for group in neighbours(layers[:4], 3)]
        [[0, 1, 2], [1, 2, 3]]
    """
    layers = list(layers)
    for site in layers:
        if not isinstance(site, Site):
            raise TypeError(f"layers are Site objects, as mediation.sites lists them, got {type(site).__name__}")
        if site.head is not None:
            raise ValueError(f"neighbours are whole layers, and {site.name!r} is a single head")
    kinds = list(dict.fromkeys(f"{site.network} {site.component}" for site in layers))
    if len(kinds) > 1:
        raise ValueError(f"neighbours are of one network and component, got {', '.join(kinds)}")
    numbers = [site.layer for site in layers]
    if any(after != before + 1 for before, after in itertools.pairwise(numbers)):
        raise ValueError(f"neighbours follow one another, each given once and in execution order; got layers {numbers}")
    if not (isinstance(n, int) and 1 <= n <= len(layers)):
        raise ValueError(f"n must be an integer from 1 to the {len(layers)} layers that there are, got {n!r}")
    return [layers[first : first + n] for first in range(len(layers) - n + 1)]


def group_name(group: Site | str | Sequence[Site | str]) -> str:
    """How results call one site, or sites that are changed together."""
    if isinstance(group, Site | str):
        group = (group,)
    return "+".join(site.name if isinstance(site, Site) else site for site in group)


def _all_sites(
    pipe: DiffusionPipeline, only_network: str | None = None, *, heads: bool | None = None
) -> Iterator[Site]:
    """Every site, each attention followed by its heads, containers behind what is in them.

    Args:
        pipe: the pipeline.
        only_network: lists no other one; an edit of a text encoder need not wait for the denoiser's sites.
        heads: True lists heads alone, False everything but heads.
    """
    family = family_of(pipe)
    networks = [(encoder, family.text_spots) for encoder, _ in family.text_encoders]
    networks.append((family.denoiser, family.denoiser_spots))
    for network, spots in networks:
        if only_network not in (None, network):
            continue
        projections = family.output_projections[network]
        n_seen = collections.Counter()
        for spot in spots(getattr(pipe, network)):
            name = f"{network}.{spot.position}.{spot.component}"
            site = Site(name, network, spot.component, n_seen[spot.component], spot.block, spot.path)
            n_seen[spot.component] += 1
            if not heads:
                yield site
            for head in range(spot.n_heads if heads is not False else 0):
                path = f"{spot.path}.{projections[spot.component]}"
                yield dataclasses.replace(site, name=f"{name}.head.{head}", path=path, head=head, n_heads=spot.n_heads)


def resolve(pipe: DiffusionPipeline, chosen: list | None) -> list[tuple[Site, ...]]:
    """Turns what a user names into groups of sites that are restored together; None is what `sites` lists, one by one.

    Args:
        pipe: the pipeline.
        chosen: sites or their names; a list or tuple of them is one group.

    Raises:
        KeyError: if a name is no site of this pipeline.
        TypeError: if an entry is neither a site nor a name.
        ValueError: if there is none, or one is named twice in a group.
    """

    @functools.cache
    def listed(network: str, heads: bool) -> dict[str, Site]:
        return {site.name: site for site in _all_sites(pipe, network, heads=heads)}

    def one(entry: Site | str) -> Site:
        if not isinstance(entry, Site | str):
            raise TypeError(f"sites are Site objects or names, got {type(entry).__name__}")
        name = entry.name if isinstance(entry, Site) else entry
        found = listed(name.partition(".")[0], ".head." in name).get(name)
        if found is None:
            close = ", ".join(site.name for site in itertools.islice(_all_sites(pipe), 3))
            raise KeyError(f"no site {name!r} in this pipeline; names look like {close}: see mediation.sites(pipe)")
        return found

    if chosen is None:
        return [(site,) for site in sites(pipe)]
    if isinstance(chosen, Site | str):
        chosen = [chosen]
    groups = [tuple(map(one, entry)) if isinstance(entry, list | tuple) else (one(entry),) for entry in chosen]
    if not groups or not all(groups):
        raise ValueError("no sites were given: pass None for all, or a list of sites or names")
    for group in groups:
        if len(set(group)) < len(group):
            raise ValueError(f"sites that are changed together are each named once, got {group_name(group)!r}")
    return groups
