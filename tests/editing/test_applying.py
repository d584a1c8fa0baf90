"""Where a change is read, and which edit it is of."""

import pytest
import torch

import editing
from tests import tiny


def picture(pipe):
    return pipe("a ink cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


def fuse(pipe):
    with torch.no_grad():
        pipe.fuse_qkv_projections()


@pytest.fixture(scope="module")
def crossed():
    """A change of what cross-attentions read of "ink", that is to be seen."""
    return editing.cross_attention_edit(tiny.stable_diffusion(), {"ink": "noto"}, regularization=1e-3)


def test_projections_that_were_fused_since_are_not_edited_in_vain(crossed, fresh_pipe):
    fuse(fresh_pipe)
    plain = picture(fresh_pipe)
    with pytest.raises(ValueError, match=r"nothing reads .*to_k.weight .* pipe.unfuse_qkv_projections"):
        crossed.apply(fresh_pipe)
    assert torch.equal(picture(fresh_pipe), plain)
    fresh_pipe.unfuse_qkv_projections()
    with crossed.applied(fresh_pipe):
        assert (picture(fresh_pipe) - plain).abs().max() > 0.02


def test_an_edit_that_was_fused_is_not_reverted_in_vain(crossed, fresh_pipe):
    plain = picture(fresh_pipe)
    crossed.apply(fresh_pipe)
    edited = picture(fresh_pipe)
    fuse(fresh_pipe)
    with pytest.raises(RuntimeError, match=r"to_k.weight was fused with others since the edit was applied"):
        crossed.revert(fresh_pipe)
    torch.testing.assert_close(picture(fresh_pipe), edited, rtol=0, atol=1e-5)
    fresh_pipe.unfuse_qkv_projections()
    crossed.revert(fresh_pipe)
    assert torch.equal(picture(fresh_pipe), plain)


def test_fused_projections_are_edited_as_long_as_they_are_read(fresh_pipe):
    fuse(fresh_pipe)
    plain = picture(fresh_pipe)
    edit = editing.cross_attention_edit(fresh_pipe, {"ink": "noto"}, regularization=1e-3)
    with edit.applied(fresh_pipe):
        assert (picture(fresh_pipe) - plain).abs().max() > 0.02
        fresh_pipe.unfuse_qkv_projections()  # the edit is gone, and can be taken back all the same
        torch.testing.assert_close(picture(fresh_pipe), plain, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"nothing reads .*to_kv.weight .* pipe.fuse_qkv_projections"):
        edit.apply(fresh_pipe)


def test_what_fused_attentions_still_read_can_be_edited(fresh_pipe):
    text = editing.quickfix(fresh_pipe, {"ink": "noto"})
    fuse(fresh_pipe)
    plain = picture(fresh_pipe)
    with text.applied(fresh_pipe):
        assert not torch.equal(picture(fresh_pipe), plain)
    assert torch.equal(picture(fresh_pipe), plain)


def test_copies_of_an_edit_are_the_same_edit(crossed, fresh_pipe, tmp_path):
    crossed.save(tmp_path / "edit.safetensors")
    one, two = (editing.load(tmp_path / "edit.safetensors") for _ in range(2))
    before = {name: value.clone() for name, value in fresh_pipe.unet.state_dict().items()}
    one.apply(fresh_pipe)
    edited = {name: value.clone() for name, value in fresh_pipe.unet.state_dict().items()}
    for copy in (two, crossed):
        with pytest.raises(RuntimeError, match="already applied"):
            copy.apply(fresh_pipe)
        assert all(torch.equal(value, edited[name]) for name, value in fresh_pipe.unet.state_dict().items())
    with pytest.raises(RuntimeError, match="not applied to"):
        one.scaled(2).revert(fresh_pipe)
    two.revert(fresh_pipe)
    assert all(torch.equal(value, before[name]) for name, value in fresh_pipe.unet.state_dict().items())
    with pytest.raises(RuntimeError, match="not applied to"):
        one.revert(fresh_pipe)
