"""Edit files: what is read is what was written, or it is refused."""

import json
import pickle

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import editing
from mediation import tensorfiles


@pytest.fixture(scope="module")
def edit(tiny_pipe):
    return editing.quickfix(tiny_pipe, {"ink": "noto", "café": "cat"}, preserve=["dog"])


@pytest.fixture(scope="module")
def path(edit, tmp_path_factory):
    path = tmp_path_factory.mktemp("edits") / "ink.safetensors"
    edit.save(path)
    return path


def same(a, b):
    return (
        list(a.updates) == list(b.updates)
        and all(
            torch.equal(getattr(a.updates[name], factor), getattr(b.updates[name], factor))
            for name in a.updates
            for factor in ("up", "down")
        )
        and a.metadata == b.metadata
        and a.report == b.report
    )


def test_what_is_loaded_is_what_was_saved(edit, path):
    assert same(editing.load(path), edit)
    assert same(editing.load(str(path)), edit)


def test_a_loaded_edit_writes_the_same_bits(fresh_pipe, edit, path):
    states = []
    for one in (edit, editing.load(path)):
        with one.applied(fresh_pipe):
            states.append({name: value.clone() for name, value in fresh_pipe.text_encoder.state_dict().items()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_scaled_and_added_edits_are_saved_too(edit, tmp_path):
    both = edit.scaled(0.5) + edit.scaled(0.25)
    both.save(tmp_path / "both.safetensors")
    assert same(editing.load(tmp_path / "both.safetensors"), both)


def test_the_header_is_readable_json_with_the_names_of_checkpoints(path):
    with safetensors.safe_open(path, framework="pt") as file:
        names, header = list(file.keys()), file.metadata()
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj.weight"
    assert sorted(names) == [f"{layer}.down", f"{layer}.up"]
    assert header["format"] == "editing.Edit/1"
    metadata = json.loads(header["metadata"])
    assert metadata["pairs"] == {"ink": "noto", "café": "cat"}
    assert "café" in header["metadata"], "not escaped"
    assert list(metadata["base"]) == [layer]
    assert sorted(metadata["base"][layer]["sha256"]) == ["bfloat16", "float16", "float32"]


@given(st.data())
def test_a_truncated_file_is_refused(path, tmp_path_factory, data):
    content = path.read_bytes()
    cut = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="truncated, or no safetensors file"):
        editing.load(cut)


@given(st.data())
def test_a_changed_byte_is_noticed_wherever_it_is(edit, path, tmp_path_factory, data):
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 3000))
    content[position] ^= data.draw(st.integers(1, 255))
    changed = tmp_path_factory.mktemp("changed") / "changed.safetensors"
    changed.write_bytes(content)
    try:
        loaded = editing.load(changed)
    except ValueError as error:
        assert str(changed) in str(error)  # noqa: PT017 - the header has bytes without meaning: spaces at its end
    else:
        assert same(loaded, edit)


@pytest.mark.parametrize("change", ["factor", "metadata", "report"])
def test_a_file_made_up_from_another_is_refused(path, tmp_path, change):
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()
    if change == "factor":
        tensors[min(tensors)][0, 0] += 1
    else:
        header[change] = header[change].replace("noto", "bird")
    forged = tmp_path / "forged.safetensors"
    forged.write_bytes(safetensors.torch.save(tensors, metadata=header))
    with pytest.raises(ValueError, match="tampered with, or damaged"):
        editing.load(forged)


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_pickles_are_refused_and_never_run(edit, tmp_path):
    for name in ("edit.pt", "edit.bin", "edit.pkl", "edit"):
        (tmp_path / name).write_bytes(pickle.dumps(_Bomb()))
        with pytest.raises(ValueError, match=rf"end in .safetensors .*got '{name}'"):
            editing.load(tmp_path / name)
        with pytest.raises(ValueError, match=r"end in .safetensors"):
            edit.save(tmp_path / name)
    disguised = tmp_path / "edit.safetensors"
    disguised.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match="no safetensors file"):
        editing.load(disguised)


def test_other_safetensors_files_are_refused(tmp_path):
    lora = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"unet.lora_A.weight": torch.ones(1, 2)}, lora, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is no edit file.* names 'pt'"):
        editing.load(lora)
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors"):
        editing.load(tmp_path / "missing.safetensors")


def test_a_header_that_is_no_json_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        tensorfiles.write(tmp_path / "nan.safetensors", {"a": torch.ones(1)}, {"report": {"a": float("nan")}}, "x")
    assert not list(tmp_path.iterdir())
