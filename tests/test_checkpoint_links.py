"""Links in a store's folder: nothing outside the folder is deleted, written or changed, whatever
its names link to. Expected values are the bytes that the files outside had before; `keep`
determines the steps that remain.
"""

import os

import numpy as np
import pytest
from test_checkpoint import assert_same

from jaxnet.checkpoint import Checkpoints, load, places, save
from jaxnet.checkpoint import outside as names


def tree_of(step):
    return {"x": np.arange(5.0) * step, "step": step}


@pytest.fixture
def outside(tmp_path):
    """A folder with another run's checkpoint, a text, and a folder that is not empty."""
    folder = tmp_path / "outside"
    save(folder / "step_00000001.safetensors", tree_of(1))
    (folder / "text").write_text("mine")
    (folder / "inner").mkdir()
    (folder / "inner" / "text").write_text("mine")
    return folder


def contents(folder):
    """All files below a folder and their bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def saved(folder, *steps, **options):
    with Checkpoints(folder, **options) as store:
        for step in steps:
            store.save(step, tree_of(step), {"loss": step})
    return store


@pytest.mark.parametrize("beside", [False, True], ids=["foreground", "asynchronous"])
@pytest.mark.parametrize("target", ["step_00000001.safetensors", "text", "inner", "not there"])
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_rotation_deletes_nothing_behind_a_link(kind, target, beside, outside, tmp_path):
    run, before = tmp_path / "run", contents(outside)
    run.mkdir()
    if kind == "symbolic":
        (run / "step_00000001.safetensors").symlink_to(outside / target)
    elif (outside / target).is_file():
        os.link(outside / target, run / "step_00000001.safetensors")
    store = saved(run, 2, 3, 4, 5, keep=2, best_rule="max loss", asynchronous=beside)
    assert contents(outside) == before
    assert {4, 5} <= set(store.steps()) <= {1, 4, 5}
    for step in (4, 5):
        assert_same(store.load(step).tree, tree_of(step))


def test_a_link_does_not_count_among_those_that_are_kept(outside, tmp_path):
    run = saved(tmp_path / "run", 1, 2).folder
    os.symlink(outside / "step_00000001.safetensors", f"{run}/step_00000003.safetensors")
    store = saved(run, 4, keep=2)
    # Step 3 is a link and stays; 2 and 4 are the two newest steps.
    assert store.steps() == [2, 3, 4]
    assert contents(outside).keys() == {"step_00000001.safetensors", "text", "inner/text"}


@pytest.mark.parametrize("target", ["text", "new", "inner"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_step_is_saved_in_place_of_a_link_and_not_behind_it(
    when, target, outside, tmp_path, monkeypatch
):
    """The same holds if the link appears while the new file is written."""
    run, before, real = tmp_path / "run", contents(outside), os.fsync
    run.mkdir()
    link = run / "step_00000007.safetensors"

    def swap(fd):
        real(fd)
        if not os.path.lexists(link):
            link.symlink_to(outside / target)

    # A link to nothing does not count as a step.
    if when == "before" and target == "new":
        link.symlink_to(outside / target)
    elif when == "meanwhile":
        monkeypatch.setattr(os, "fsync", swap)
    saved(run, 7)
    assert contents(outside) == before and not link.is_symlink()
    assert_same(load(link), tree_of(7))


def test_links_for_parts_locks_and_temporary_files_are_left_alone(outside, tmp_path):
    """With such names, a save could delete the targets of the links, and lock, open or make files
    behind them.
    """
    run, before, number = tmp_path / "run", contents(outside), "0123456789abcdef"
    run.mkdir()
    path = str(run / "step_00000001.safetensors")
    links = {
        names.path_of(path, number, 0): "text",
        names.orbax_path(path, number): "inner",
        names.lock_path(path, number): "not there",
        names.path_of(path, number[::-1], 1): "step_00000001.safetensors",
        str(run / ".jaxnet-1-dead.tmp"): "text",
        names.orbax_path(path, number) + ".orbax-checkpoint-tmp-1": "inner",
    }
    for link, target in links.items():
        os.symlink(outside / target, link)
    saved(run, 1, 2, 3, keep=1)
    assert contents(outside) == before
    assert all(os.path.islink(link) for link in links)


def test_what_looks_like_parts_and_is_no_link_is_swept(tmp_path):
    """The test above would pass if nothing were swept at all."""
    path, number = str(tmp_path / "t"), "0123456789abcdef"
    os.makedirs(names.orbax_path(path, number) + "/d")
    (tmp_path / f"t.part-{number}-00000").write_bytes(b"")
    save(path, tree_of(1))
    assert os.listdir(tmp_path) == ["t"]


def test_links_inside_a_folder_of_orbax_are_not_followed(outside, tmp_path):
    before, folder = contents(outside), names.orbax_path(str(tmp_path / "t"), "0123456789abcdef")
    os.mkdir(folder)
    os.symlink(outside, f"{folder}/d")
    save(tmp_path / "t", tree_of(1))
    assert contents(outside) == before and sorted(os.listdir(tmp_path)) == ["outside", "t"]


def test_a_folder_that_is_a_link_is_that_folder(outside, tmp_path):
    (tmp_path / "run").symlink_to(outside / "inner")
    assert saved(tmp_path / "run", 1, 2, 3, keep=2).steps() == [2, 3]
    assert (tmp_path / "run").is_symlink() and (outside / "inner" / "text").read_text() == "mine"


def test_a_folder_is_not_deleted_in_place_of_a_file(tmp_path):
    (tmp_path / "step" / "inner").mkdir(parents=True)
    with pytest.raises(OSError):
        places.remove(str(tmp_path / "step"))
    assert (tmp_path / "step" / "inner").is_dir()


def test_a_hard_link_keeps_what_it_had(tmp_path):
    """Saving over one name of a file leaves the bytes under its other name, and their mode."""
    save(tmp_path / "a", tree_of(1))
    os.link(tmp_path / "a", tmp_path / "b")
    save(tmp_path / "a", tree_of(2))
    assert_same([load(tmp_path / name) for name in "ab"], [tree_of(2), tree_of(1)])
