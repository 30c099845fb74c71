"""A --datadir that is no scene: one line that says what it is and what to do about it."""

import shlex
import shutil

import pytest
from helpers import REPOSITORY, run_main

import run_nerf
from nerf import datasets
from nerf.datasets import wrong_folder
from nerf.flags import nerf as nerf_flags


def refusal(folder, *flags) -> str:
    """What loading ``folder`` is refused with."""
    words = ["--datadir", str(folder), *flags]
    with pytest.raises(ValueError) as refused:
        datasets.load_scene(run_nerf.build.data_settings(nerf_flags.parse(words)), lambda text: 0)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_close_names_are_named(tmp_path):
    (tmp_path / "my capture").mkdir()
    said = refusal(tmp_path / "my_captures")
    assert f"did you mean '{tmp_path}/my capture'?" in said
    assert "set --datadir to the folder of the scene" in refusal(tmp_path / "nothing_like_it")


def test_every_scene_that_is_offered_is_known_to_the_downloader():
    import download

    for name, folder in wrong_folder.DOWNLOADS.items():
        if name in download.SCENES:
            assert download.SCENES[name][1] == folder
        else:  # it says where to get it
            assert name in download.LLFF_SCENES and folder == f"nerf_llff_data/{name}"


@pytest.mark.parametrize("name", ["lego", "fern", "flower"])
def test_a_download_names_the_folder_that_it_makes(tmp_path, monkeypatch, name):
    """The hint, once it was followed, must not come again."""
    monkeypatch.setattr(wrong_folder, "DATA", tmp_path / "my data")
    target = tmp_path / "my data" / wrong_folder.DOWNLOADS[name]
    said = refusal(tmp_path / "llff" / name, "--dataset_type", "auto")
    assert f"fetch it with: python '{tmp_path}/my data/download.py' {name}, then give" in said
    assert shlex.split(said.partition("--datadir ")[2]) == [str(target)]
    assert refusal(target, "--dataset_type", "auto").endswith(f"download.py' {name}")  # no "then"
    target.mkdir(parents=True)
    assert "fetch" not in (said := refusal(tmp_path / "llff" / name, "--dataset_type", "auto"))
    assert f"give --datadir '{target}'" in said


def test_the_commands_work_in_the_folder_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    said = wrong_folder.about_missing(tmp_path / "fern")
    assert "python data/download.py fern" in said or (REPOSITORY / "data/nerf_llff_data").is_dir()
    monkeypatch.chdir(tmp_path)
    said = wrong_folder.from_photos(tmp_path / "walk.mp4")
    script = shlex.quote(str(REPOSITORY / "data/from_photos.py"))
    assert said == f"python {script} walk.mp4 --out data/mine"


def test_a_default_that_is_missing_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setattr(wrong_folder, "DATA", tmp_path)
    said = run_main(run_nerf.main, "--basedir", tmp_path / "logs", "--device", "cpu")
    line = said.stderr.strip().splitlines()[-1]
    assert said.returncode == 2
    assert "neither --datadir nor a --config that sets it is given, see configs/" in line
    assert f"then give --datadir {tmp_path}/nerf_llff_data/fern" in line
    config = tmp_path / "mine.txt"
    config.write_text("expname = mine\n")
    words = ["--config", config, "--basedir", tmp_path / "logs", "--device", "cpu"]
    assert "a --config that sets it" in run_main(run_nerf.main, *words).stderr
    assert "neither" not in refusal(tmp_path / "fern")


FILES = {
    "walk.mp4": "it is a video; make a scene of it with: python data/from_photos.py",
    "walk around.MOV": "it is a video",
    "scene.blend": "export pictures and camera poses",
    "chair.glb": "export pictures and camera poses",
    "points.ply": "export pictures and camera poses",
    "pictures.zip": "unpack it",
    "000300.tar": "a checkpoint is for --ft_path",
    "IMG_1.HEIC": "make a scene of its folder with: python data/from_photos.py",
    "lego.txt": "a config file is for --config",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_answered_by_its_kind(tmp_path, monkeypatch, name):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / name).write_bytes(b"x")
    said = refusal(tmp_path / name)
    assert FILES[name] in said and "give the folder" not in said.replace(
        "give the folder of the", ""
    )
    if "from_photos" in said:
        command = shlex.split(said.partition("with: ")[2])
        assert command[2] in (str(tmp_path), str(tmp_path / name))


def test_a_file_of_a_scene_leads_to_its_folder(demo_blender):
    said = refusal(demo_blender / "transforms_train.json")
    assert said.endswith(f"give the folder that it is in: --datadir {demo_blender}")
    picture = next((demo_blender / "train").glob("*.png"))
    assert refusal(picture).endswith(f"give the folder that it is in: --datadir {demo_blender}")


CONTENTS = {
    "walk.mp4": "holds a video, walk.mp4; make a scene of it with: python data/from_photos.py",
    "IMG_1.heic": "holds photos without poses; make them with: python data/from_photos.py",
    "scene.blend": "holds a 3D model, scene.blend, and no pictures; export",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_folder_of_something_else_is_answered_by_its_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(REPOSITORY)
    folder = tmp_path / "my capture"
    folder.mkdir()
    (folder / name).write_bytes(b"x")
    assert CONTENTS[name] in refusal(folder) and CONTENTS[name] in refusal(
        folder, "--dataset_type", "auto"
    )


def test_a_command_for_pictures_without_poses_can_be_pasted(demo_blender, tmp_path):
    folder = tmp_path / "mine \u00e9" / "images"
    shutil.copytree(demo_blender / "train", folder)
    for kind in ([], ["--dataset_type", "colmap"]):
        said = refusal(folder.parent, *kind)
        assert shlex.split(said.partition("with: ")[2])[2] == str(folder)


def test_what_from_photos_proposes_can_be_pasted(tmp_path):
    from photos import list_photos

    folder = tmp_path / "my capture"
    (folder / "day one").mkdir(parents=True)
    (folder / "day one" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no photo") as refused:
        list_photos(folder)
    assert str(refused.value).endswith(f"give one, '{folder}/day one'")
    (folder / "walk.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="for a video") as refused:
        list_photos(folder)
    assert str(refused.value).endswith(f"give its path: '{folder}/walk.mp4'")


def test_a_config_without_its_flag_can_be_pasted():
    said = run_main(run_nerf.main, "my configs/mine.txt").stderr
    assert "write --config 'my configs/mine.txt'" in said
