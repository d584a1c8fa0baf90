"""How exact the solve of an edit is: against float64 least squares by another route, beside the released numerics."""

import itertools

import torch
from diffusers import DiffusionPipeline
from scipy import linalg

import mediation
from benchmarks.released import released_solution
from benchmarks.speed import clip
from editing.associations import Associations, associate, projection
from editing.concepts import Request
from editing.pairing import pair_tokens
from editing.solvers import ridge
from editing.updates import LowRank

LAMBDAS = (0.5, 0.01, 1e-4)
# "from_subject" is what the release edits: nearly the same key at every position of the padding.
TOKENS = ("last_subject", "from_subject")
# One has fewer keys than the layer is wide, whatever the tokens, and is solved for by the keys' products.
N_CONCEPTS = (1, 5)


def solve_accuracy(pipe: DiffusionPipeline) -> list[dict]:
    """Relative errors of changes and of edited weights, in Frobenius norms, by tokens, concepts and lambda.

    The truth is the least-squares solution of [K; sqrt(lambda) I] D^T = [R; 0] by orthogonal factors, which never
    squares the condition of K as normal equations do. It is computed by QR; `truth` is its distance from the one that
    singular values give. The release gets the same keys and values, so that its error is that of its arithmetic alone.
    """
    (site, *_) = mediation.sites(pipe, network="text_encoder", component="self_attention")
    weight = projection(pipe, site)[1].weight.detach().double()
    rows = []
    for tokens, n in itertools.product(TOKENS, N_CONCEPTS):
        request = Request.of(clip.concepts(n, 0)[0], None, (), None)
        known = associate(pipe, site, pair_tokens(pipe, site.network, request, tokens))
        for regularization in LAMBDAS:
            of = {"tokens": tokens, "n_concepts": n, "lambda": regularization}
            rows.append(of | _errors(weight, known, regularization))
    return rows


def _errors(weight: torch.Tensor, known: Associations, regularization: float) -> dict[str, float]:
    truth, other = (least_squares(known.keys, known.residuals, regularization, route) for route in ("qr", "svd"))
    up, down = ridge(known.keys, known.residuals, regularization=regularization)
    changes = {
        "solved": up @ down,
        "stored": LowRank(up, down).dense(),
        "released": released_solution(weight, known.keys, known.values, regularization).double() - weight,
    }
    norm = torch.linalg.matrix_norm
    found = {"n_keys": len(known.keys), "truth": float(norm(other - truth) / norm(truth))}
    for name, change in changes.items():
        error = norm(change - truth)
        found |= {name: float(error / norm(truth)), f"{name} weight": float(error / norm(weight + truth))}
    return found


def least_squares(keys: torch.Tensor, residuals: torch.Tensor, regularization: float, route: str) -> torch.Tensor:
    """The change, (d_out, d_in), that minimises ||D K^T - R^T||^2 + lambda ||D||^2, by "qr" or "svd", in float64."""
    width = keys.shape[1]
    system = torch.cat([keys, regularization**0.5 * torch.eye(width, dtype=keys.dtype)])
    wanted = torch.cat([residuals, residuals.new_zeros(width, residuals.shape[1])])
    if route == "svd":
        return torch.from_numpy(linalg.lstsq(system.numpy(), wanted.numpy(), lapack_driver="gelsd")[0]).T
    rotation, triangle = linalg.qr(system.numpy(), mode="economic")
    return torch.from_numpy(linalg.solve_triangular(triangle, rotation.T @ wanted.numpy())).T
