import torch

from benchmarks.emoji.muon import Muon, orthogonalised


def test_directions_stay_and_singular_values_come_near_one():
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(12, 6))
    right, _ = torch.linalg.qr(torch.randn(6, 6))
    matrix = left * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]) @ right.T
    for given in (matrix, matrix.T):
        values = (left.T @ (orthogonalised(given) if given is matrix else orthogonalised(given).T) @ right).float()
        assert (values.diag() - 1).abs().max() < 0.35
        assert (values - values.diag().diag()).abs().max() < 0.02


def test_a_kernel_moves_as_its_matrix_does_in_torch():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    ours = Muon([kernel], lr=0.1, weight_decay=0.05)
    reference = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    start = matrix.detach().clone()
    for _ in range(3):
        gradient = torch.randn(8, 36)
        kernel.grad, matrix.grad = gradient.view_as(kernel), gradient
        ours.step()
        reference.step()
    moved = (matrix - start).detach()
    # torch orthogonalises in bfloat16, which has three significant digits
    torch.testing.assert_close(
        (kernel.detach().flatten(1) - start), moved, rtol=0, atol=0.03 * moved.abs().max().item()
    )
