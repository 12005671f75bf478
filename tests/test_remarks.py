"""What was wrong with files: a count of each kind in the log, and all of them in the run directory."""

import numpy as np
import pytest
from PIL import Image

import fastgan
from fastgan.data.pairs import load_unpaired
from fastgan.data.remarks import KINDS, tell
from fastgan.training.rundir import RunDirectory


def test_a_line_counts_each_kind_and_names_its_first_file(caplog):
    remarks = [
        ("a/1.wav", "it has 40 of 1,024 samples"),
        ("c.wav", "it is silent"),
        ("b 2.wav", "it has 7 of 1,024 samples"),
    ]
    remarks += [("c.wav", "1 silent part left out"), ("d.wav", "2 silent parts left out")]
    tell("birds", remarks)
    assert caplog.messages == [
        "load: 4 files of birds are not as they should be: a/1.wav: it has 40 of 1,024 samples (2 such); c.wav: 1 "
        "silent part left out (2 such); c.wav: it is silent; a run has all of them in its skipped.txt"
    ]
    caplog.clear()
    tell("birds", [])
    tell("birds", [(f"{c}.png", "is " + c) for c in "abcdefghijk"], "skipped")
    assert len(caplog.messages) == 1 and f"; {11 - KINDS} of other kinds; " in caplog.text


def test_a_run_lists_every_file(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("one red fox\n" * 20)
    for k in range(12):
        (folder / f"bad{k}.txt").write_bytes(b"\0\0")
    recipe = fastgan.recipes()["chargan"].replace(
        model_options={"width": 8, "blocks": 1},
        **dict(data=str(folder), batch_size=4, steps=1, eval_every=0, sample_count=4, watch_every=0),
    )
    run = fastgan.Trainer(recipe, out=tmp_path / "run", device="cpu")
    run.fit()
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert listed == [f"{name}: {why}" for name, why in run.images.skipped] and len(listed) == 12
    assert (
        f"12 files of the data are not as they should be: {tmp_path / 'run' / 'skipped.txt'}" in capsys.readouterr().out
    )
    for path in folder.glob("bad*"):
        path.unlink()
    fastgan.Trainer(recipe, out=tmp_path / "run", overwrite=True, device="cpu", quiet=True).fit()
    assert not (tmp_path / "run" / "skipped.txt").exists()


def test_names_that_are_no_text_or_hold_line_ends(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.name_files([("\udcff\n.png", "empty\nfile")]).startswith("1 file of the data")
    assert (tmp_path / "skipped.txt").read_text() == "\\udcff .png: empty file\n"
    assert directory.name_files([]) == "" and not (tmp_path / "skipped.txt").exists()


@pytest.mark.parametrize("made", ["no", "negative"])
def test_files_of_formats_that_nothing_reads_are_named_on_both_sides(tmp_path, made):
    for side in "ab":
        (tmp_path / side).mkdir()
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / side / "1.png")
        (tmp_path / side / "2.heic").write_bytes(b"x")
        (tmp_path / side / "3.png").write_bytes(b"x")
    sides = load_unpaired(tmp_path, image_size=8, made=made)
    assert [name for name, _ in sides.skipped] == ["a/2.heic", "a/3.png", "b/2.heic", "b/3.png"]
