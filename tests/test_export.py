"""An export is plain files that give the model back."""

import json
import shutil
from pathlib import Path

import program
import pytest
import torch
from safetensors.torch import load_file

from lightning_base.export import ExportError, export, load, main
from lightning_base.module import LanguageModel


@pytest.fixture(scope="module")
def run(small_sweep: Path) -> Path:
    """A finished run of BASE, whose router remembers something."""
    return next(path for path in sorted(small_sweep.iterdir()) if path.is_dir() and "router=base" in path.name)


def test_the_exported_model_gives_the_logits_of_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--output", str(tmp_path / "out")]) == 0
    assert f"exported: {tmp_path}/out/model.safetensors" in capsys.readouterr().out
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["step"] == 4
    assert described["batch_fingerprint"] == program.read(run / "manifest.json")["batch_fingerprint"]
    # Lightning's own way, on the file that was trained.
    trained = LanguageModel.load_from_checkpoint(
        run / "checkpoints" / "step_4.ckpt" / "state.pt", weights_only=True, map_location="cpu"
    ).eval()
    ids = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool)}
    with torch.no_grad():
        expected, _ = trained(batch)
        found, plans = load(tmp_path / "out")(batch)
    assert torch.equal(found, expected)
    assert len(plans) == 1
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in trained.state_dict().items()
    }


def test_an_older_checkpoint_can_be_named(run: Path, tmp_path: Path) -> None:
    export(run, run / "checkpoints" / "step_2.ckpt", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model.json").read_text())["step"] == 2


def test_reading_an_export_imports_no_package_that_it_names(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_plugin.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = export(run, target=tmp_path / "out")
    described = json.loads((folder / "model.json").read_text())
    described["config"]["plugins"] = ["hostile_plugin"]
    (folder / "model.json").write_text(json.dumps(described))
    load(folder)
    assert not (tmp_path / "it_ran").exists()


def test_what_cannot_be_exported_or_read_back_is_said_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert main([str(run), "--checkpoint", str(tmp_path / "none.ckpt")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path} is not a run: it has no .hydra/config.yaml",
        f"error: the checkpoint {tmp_path}/none.ckpt does not exist",
    ]
    copy = export(run, target=tmp_path / "out")
    shutil.copytree(copy, tmp_path / "hostile")
    described = (tmp_path / "hostile" / "model.json").read_text()
    hostile = described.replace("lightning_base.routing.balanced.BASE", "os.mkdir")
    (tmp_path / "hostile" / "model.json").write_text(hostile)
    with pytest.raises(ExportError, match=r"model.json cannot be used by this version: router\._target_=os\.mkdir"):
        load(tmp_path / "hostile")
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"?!")
    with pytest.raises(ExportError, match="is not what was written"):
        load(copy)
