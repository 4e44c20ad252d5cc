"""Which file of GGUF is meant, and what is said where none can be read. tests/integration reads a real one."""

from __future__ import annotations

import pytest
from checkpoints import save_checkpoint
from tiny import tiny_llama

from specdec.drafters.folders import kind_of
from specdec.drafters.registry import parse
from specdec.errors import InputError
from specdec.files import gguf
from specdec.files.gguf import now_plain
from specdec.files.loading import find_checkpoint


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: name == "gguf")


def files(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return folder


def test_a_file_and_a_folder_with_one(tmp_path):
    folder = files(tmp_path / "one", "m.Q4_1.gguf", "mmproj-m.gguf", "README.md")
    assert find_checkpoint(str(folder / "m.Q4_1.gguf"), "target") == folder / "m.Q4_1.gguf"
    assert find_checkpoint(str(folder), "target") == folder / "m.Q4_1.gguf"
    (folder / "config.json").write_text("{}")  # some repositories have one beside
    assert find_checkpoint(str(folder), "target") == folder / "m.Q4_1.gguf"
    upper = files(tmp_path / "upper", "M.GGUF")
    assert find_checkpoint(str(upper), "target") == upper / "M.GGUF"


def test_weights_that_need_no_conversion_come_first(tmp_path):
    folder = files(save_checkpoint(tmp_path / "both", tiny_llama()), "m.gguf")
    assert find_checkpoint(str(folder), "target") == folder
    assert find_checkpoint(str(folder / "m.gguf"), "target") == folder / "m.gguf"


def test_as_a_drafter(tmp_path):
    folder = files(tmp_path / "one", "m.gguf")
    assert kind_of(folder) == kind_of(folder / "m.gguf") == "draft_model"
    for text in (folder, folder / "m.gguf"):
        (part,) = parse(str(text))
        assert part.folder == text and part.name == "draft_model"


def test_refusals(tmp_path, monkeypatch):
    several = files(tmp_path / "several", "b.Q8_0.gguf", "a.Q4_1.gguf")
    with pytest.raises(InputError, match=r"2 GGUF files: a.Q4_1.gguf, b.Q8_0.gguf; pass one, for example .*a\.Q4"):
        find_checkpoint(str(several), "target")
    part = files(tmp_path / "part", "m-00001-of-00003.gguf")
    with pytest.raises(InputError, match="is one of 3 parts; join them first"):
        find_checkpoint(str(part / "m-00001-of-00003.gguf"), "target")
    with pytest.raises(InputError, match=r"no config.json, and no .gguf file"):
        find_checkpoint(str(files(tmp_path / "none", "README.md")), "target")
    with pytest.raises(InputError, match=r"or a .gguf file"):
        find_checkpoint(str(files(tmp_path / "none", "m.bin") / "m.bin"), "target")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"draft '.*gguf' is read with the package gguf, which is missing; pip install"
    ):
        find_checkpoint(str(several / "a.Q4_1.gguf"), "draft")


def test_a_dequantised_model_can_be_saved(tmp_path):
    model = tiny_llama()
    model.is_quantized, model.hf_quantizer, model.config.quantization_config = True, object(), {"quant_method": "gguf"}
    assert now_plain(model) is model and not model.is_quantized
    assert not hasattr(model, "hf_quantizer") and "quantization_config" not in model.config.to_dict()
    assert now_plain(tiny_llama()).save_pretrained(tmp_path) is None
