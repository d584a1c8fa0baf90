"""Diff-QuickFix for concepts that come in parts, or are too many for one matrix of keys: sums first, then one solve."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence

from diffusers import DiffusionPipeline

from editing.assembly import closed_form_edit
from editing.associations import associate, parameter_name, projection, text_sites
from editing.clock import Clock
from editing.concepts import Prompt, Request, checked_templates
from editing.edit import Edit
from editing.ledger import Ledger
from editing.pairing import TokenPairs, pair_tokens
from editing.regularization import Relative
from editing.solvers import Statistics, check_regularization
from editing.updates import LowRank
from mediation import tensorfiles
from mediation.parameters import fingerprint, mismatch
from mediation.sites import Site

_FORMAT = "editing.Fitter/1"


class Fitter:
    """Accumulates what `quickfix` solves for, and yields the same edit at the end.

    Its memory does not grow with the number of concepts. Fitters can work on different machines, be saved, and merge.

    Args:
        pipe: as for `quickfix`; it must keep its weights until the last `update`.
        templates, tokens, site: as for `quickfix`, the same for all concepts; at most one site in each text encoder.

    Attributes:
        statistics: site name -> sums over all keys so far.
        request: the concepts so far; None before the first.

    Raises:
        KeyError, ValueError: as `quickfix` does, or if two sites are in one text encoder.

    Example:
        >>> import mediation
        >>> fitter = Fitter(mediation.load_pipeline())
        >>> for source in ("ink", "flat"):
        ...     fitter.update({source: "noto"}, preserve=[f"{source} on paper"])
        >>> fitter.fit()
        <Edit by quickfix: 1 parameter, rank 8>
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        templates: Iterable[str] | None = None,
        tokens: str = "last_subject",
        site: Site | str | Sequence[Site | str] | None = None,
    ):
        self._pipe, self._sites = pipe, text_sites(pipe, site)
        for one, other in itertools.combinations(self._sites, 2):
            if one.network == other.network:
                raise ValueError(
                    f"{other.name} receives what the edit at {one.name} changes, which is not known before the last"
                    " update: take one site of each text encoder, or quickfix"
                )
        self._templates, self._tokens = checked_templates(templates), tokens
        self._base = {site.name: fingerprint(pipe, parameter_name(pipe, site)) for site in self._sites}
        self.statistics: dict[str, Statistics] = {}
        self.request: Request | None = None
        self._ledgers: dict[str, Ledger] = {}
        self._clock = Clock()

    def update(
        self,
        pairs: Mapping[str, str],
        *,
        preserve: Iterable[str | Prompt] = (),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Adds concepts; arguments as for `quickfix`. What is preserved is to be named once, in one of all updates.

        Raises:
            TypeError, ValueError: as `quickfix` does, or if something contradicts an earlier update or is preserved
                again, or the pipeline's weights were changed since; nothing is added then.
        """
        self._clock.skip()
        request = Request.of(pairs, self._templates, preserve, weights)
        merged = self._merged(request)
        self._check_base(self._base)
        found = self._found(request)
        ledgers = self._entered({name: token_pairs.ledger for name, token_pairs in found.items()})
        self._clock.lap("tokens")
        known = [(site.name, associate(self._pipe, site, found[site.name])) for site in self._sites]
        self._clock.lap("keys")
        self._add({name: Statistics.of(k.keys, k.residuals, k.pairs.weights) for name, k in known})
        self._clock.lap("sums")
        self.request, self._ledgers = merged, ledgers

    def merge(self, other: "Fitter") -> None:
        """Adds all that another fitter was given, which must have the same options and base model.

        Raises:
            ValueError: if it has not, or if a concept of one contradicts one of the other.
        """
        if other.request is None:
            return
        for what in ("_sites", "_templates", "_tokens"):
            if (mine := getattr(self, what)) != (theirs := getattr(other, what)):
                raise ValueError(f"fitters of different {what.strip('_')} cannot be merged: {mine} and {theirs}")
        if self._base != other._base:
            raise ValueError("the fitters were given different base models")
        merged, ledgers = self._merged(other.request), self._entered(other._ledgers)
        self._add(other.statistics)
        self.request, self._ledgers = merged, ledgers

    def fit(self, *, regularization: float | Relative = 0.01) -> Edit:
        """The edit that `quickfix` makes of all concepts at once.

        Its report has no residuals of single concepts, but the misfit sum_i w_i ||D k_i - r_i||^2 over all edited and
        preserved keys, before and after. Its milliseconds are those of this fitter's updates and of this call; what
        was merged or loaded is not counted. "auto" is not to be had: single templates can no longer be told apart.

        Raises:
            TypeError, ValueError: as `quickfix` does, or if there was no `update` yet.
        """
        if self.request is None:
            raise ValueError("nothing to fit: call update with pairs first")
        if not isinstance(regularization, Relative):
            regularization = check_regularization(regularization)
        clock, updates, base, report = Clock(self._clock.milliseconds), {}, {}, {"misfit": {}, "regularization": {}}
        for site in self._sites:
            sums = self.statistics[site.name]
            value = regularization
            if isinstance(regularization, Relative):
                value = regularization.value(float(sums.gram.trace()), len(sums.gram))
            update = LowRank(*sums.solve(regularization=value))
            name = parameter_name(self._pipe, site)
            updates[name], base[name] = update, self._base[site.name]
            clock.lap("solve")
            report["regularization"][site.name] = {"lambda": value}
            report["misfit"][site.name] = {"before": sums.energy, "after": sums.objective(update.dense())}
            clock.lap("report")
        options = {"regularization": regularization, "tokens": self._tokens, "sites": list(self._base)}
        return closed_form_edit(self._pipe, self.request, updates, base, report, clock, method="quickfix", **options)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the sums and what they were made of to one safetensors file.

        Raises:
            ValueError: if `path` does not end in ".safetensors", or there was no `update` yet.
        """
        if self.request is None:
            raise ValueError("nothing to save: call update with pairs first")
        tensors = {
            f"{site}.{part}": getattr(sums, part)
            for site, sums in self.statistics.items()
            for part in ("gram", "cross")
        }
        sums = {site: {"energy": sums.energy, "n_edited": sums.n_edited} for site, sums in self.statistics.items()}
        header = {
            "request": self.request.describe(),
            "options": {"tokens": self._tokens},
            "base": self._base,
            "sums": sums,
        }
        tensorfiles.write(path, tensors, header, _FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike, pipe: DiffusionPipeline) -> "Fitter":
        """Reads what `save` wrote, to go on with a pipeline of the same weights.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no such file, or is damaged, or the pipeline has other weights.
        """
        tensors, header = tensorfiles.read(path, _FORMAT)
        stored = header["request"]
        prompts = [Prompt(text, weight) for text, weight in stored.pop("preserve_prompts").items()]
        request = Request.of(**stored | {"preserve": [*stored["preserve"], *prompts]})
        fitter = cls(pipe, templates=request.templates, site=list(header["base"]), **header["options"])
        fitter._check_base(header["base"])
        fitter.request = request
        fitter._ledgers = {name: token_pairs.ledger for name, token_pairs in fitter._found(request).items()}
        fitter._add(
            {
                site: Statistics(tensors[f"{site}.gram"], tensors[f"{site}.cross"], **sums)
                for site, sums in header["sums"].items()
            }
        )
        return fitter

    def _merged(self, request: Request) -> Request:
        return request if self.request is None else self.request + request

    def _found(self, request: Request) -> dict[str, TokenPairs]:
        return {site.name: pair_tokens(self._pipe, site.network, request, self._tokens) for site in self._sites}

    def _entered(self, ledgers: Mapping[str, Ledger]) -> dict[str, Ledger]:
        """What each site's encoder is asked for with these updates; earlier ones are not tokenized again."""
        return {name: self._ledgers[name] + ledger if self._ledgers else ledger for name, ledger in ledgers.items()}

    def _add(self, sums: Mapping[str, Statistics]) -> None:
        for site, more in sums.items():
            self.statistics[site] = self.statistics[site] + more if site in self.statistics else more

    def _check_base(self, base: Mapping[str, Mapping]) -> None:
        for site in self._sites:
            weight = projection(self._pipe, site)[1].weight
            if problem := mismatch(weight, base[site.name]):
                raise ValueError(f"the fitter was given another base model: at {site.name}, {problem}")
