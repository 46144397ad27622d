import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fxquant
from fxquant.cli import compiling, main
from fxquant.cli.app import COMMANDS
from fxquant.frontend.models import load_model
from fxquant.measure import peers
from fxquant.measure.studies import FUSION, STUDIES
from fxquant.recipe import GRAMMAR, METHODS

NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.layer1 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.layer1(x) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
"""
MODEL = "network_of_test_cli:Net"
PIXELS = ("--preprocessing", "none", "--quiet")
CALIBRATION = ("--calibration", "images", "--images", "8", *PIXELS)
COMPILE = ("compile", MODEL, *CALIBRATION)
LEARN = (*COMPILE, "--recipe", "w4a4_brecq", "--set", "reconstruction.iterations=4")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a network, its weights, and twelve labelled images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "network_of_test_cli", raising=False)
    (tmp_path / "network_of_test_cli.py").write_text(NETWORK)
    (tmp_path / "images").mkdir()
    random = numpy.random.RandomState(0)
    rows = ["file,label"]
    for index in range(12):
        pixels = random.randint(0, 256, (12, 12, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:02}.png")
        rows.append(f"{index:02}.png,{index % 4}")
    (tmp_path / "images" / "labels.csv").write_text("\n".join(rows))
    state = load_model(MODEL).state_dict()
    save_file(dict(state), tmp_path / "w.safetensors")
    state.pop("fc.bias")
    save_file(dict(state), tmp_path / "no_bias.safetensors")
    return tmp_path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# -- what commands do ----------------------------------------------------------------------------


def test_compile_reports_evaluates_and_saves(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(
        capsys, *COMPILE, "--weights", "w.safetensors", "--evaluate", "images", "--save", "m.fxq"
    )
    assert data["evaluation"]["images"] == 12
    assert data["evaluation"]["reference"]["top1"] is not None
    assert data["evaluation"]["sqnr_db"] > 20
    assert data["saved"]["bytes"] == Path("m.fxq").stat().st_size


def test_compile_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPILE, "--evaluate", "images"]) == 0
    printed = capsys.readouterr().out
    assert "agreement" in printed
    assert "quantized" in printed


@pytest.mark.parametrize("recipe", [("w8a32", "--set", "bias_correction=false"), ("dynamic_w8a8",)])
def test_recipes_that_observe_nothing_need_no_images(
    capsys: pytest.CaptureFixture[str], recipe: tuple[str, ...]
) -> None:
    data = run_json(capsys, "compile", MODEL, "--recipe", *recipe, "--input-shape", "3,12,12")
    assert data["recipe"] == recipe[0]


def test_a_recipe_brings_its_own_calibration(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "mine.toml").write_text(
        '[calibration]\nsource = "images"\nimages = 3\npreset = "none"'
    )
    assert run_json(capsys, "compile", MODEL, "--recipe", "mine.toml")["recipe"] == "mine"


def test_diffs_leave_stdout_to_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert "report" in run_json(capsys, *COMPILE, "--diff", "--dump", "stages")
    assert list(Path("stages").iterdir())


def test_diff_prints_what_passes_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPILE, "--diff"]) == 0
    assert "\n-" in capsys.readouterr().out


def test_a_file_knows_how_it_was_calibrated(capsys: pytest.CaptureFixture[str]) -> None:
    command = (*COMPILE, "--crop", "10", "--save", "m.fxq")
    run_json(capsys, *command)
    known = run_json(capsys, "inspect", "m.fxq")["provenance"]
    assert known["images"] == 8
    assert known["preprocessing"]["crop"] == 10
    assert known["command"].startswith(f"fxquant {' '.join(COMPILE)}")
    assert main(["inspect", "m.fxq"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("m.fxq: a compiled Net, recipe w8a8")
    assert "takes x: float32[any, 3, 10, 10]\ncalibrated on 8 samples of 3x10x10" in printed


def test_evaluate_prepares_images_as_the_calibration_did(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_json(capsys, *COMPILE, "--crop", "10", "--save", "m.fxq")
    assert run_json(capsys, "evaluate", "m.fxq", "images")["notes"] == []
    notes = run_json(capsys, "evaluate", "m.fxq", "images", "--crop", "12")["notes"]
    assert "images are 3 x 12 x 12, those of the calibration were 3 x 10 x 10" in notes[0]
    assert "preprocessing was resize=None, crop=10" in notes[1]


def test_compile_raises_layers_for_an_accuracy_target(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "w2a8", "--target", "reference", "--max-drop", "100")
    data = run_json(capsys, *COMPILE, *options)
    assert len(data["report"]["accuracy"]["steps"]) == 1
    assert data["report"]["accuracy"]["most"] == 100


def test_saved_file_is_evaluated_and_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    compiled = run_json(capsys, *COMPILE, "--evaluate", "images", "--save", "m.fxq")
    against = ("--reference", MODEL, *PIXELS)
    evaluated = run_json(capsys, "evaluate", "m.fxq", "images", *against)
    assert evaluated["sqnr_db"] == pytest.approx(compiled["evaluation"]["sqnr_db"])
    inspected = run_json(capsys, "inspect", "m.fxq", "--stage", "integer")
    assert inspected["recipe"] == "w8a8"
    assert any("fxquant.conv" in line for line in inspected["graph"])


def test_saved_file_is_exported(native: None, capsys: pytest.CaptureFixture[str]) -> None:
    run_json(capsys, *COMPILE, "--target", "reference", "--save", "m.fxq")
    written = run_json(capsys, "export", "m.fxq", "--cpp", "folder", "--name", "net")
    assert written["bytes"] == sum(path.stat().st_size for path in Path("folder").rglob("*"))
    assert "net_context* net_create(" in Path("folder/model.h").read_text()
    assert main(("export", "m.fxq", "--cpp", "folder")) == 2
    assert "folder is not empty" in capsys.readouterr().err
    assert main(("export", "m.fxq", "--cpp", "folder", "--overwrite", "--quiet")) == 0


def test_saved_file_becomes_an_onnx_file(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    run_json(capsys, *COMPILE, "--target", "reference", "--save", "m.fxq")
    written = run_json(capsys, "export", "m.fxq", "--onnx", "m.onnx", "--exact")
    assert written["bytes"] == Path("m.onnx").stat().st_size
    assert [check["differing"] for check in written["checks"] if check["allowed"] == 0] == [0, 0]
    against = ("--onnx", "m2.onnx", "--form", "qoperator", "--for", "openvino")
    assert main(("export", "m.fxq", *against)) == 2
    assert "wrong axis" in capsys.readouterr().err
    assert not Path("m2.onnx").exists()


def test_onnx_files_are_evaluated_and_timed_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    run_json(capsys, *COMPILE, "--target", "reference", "--save", "m.fxq")
    run_json(capsys, "export", "m.fxq", "--onnx", "m.onnx", "--exact")
    against = ("images", "--reference", MODEL, *PIXELS)
    theirs = run_json(capsys, "evaluate", "m.onnx", *against)
    ours = run_json(capsys, "evaluate", "m.fxq", *against, "--target", "reference")
    assert theirs["sqnr_db"] == ours["sqnr_db"]
    size = ("--input-shape", "3,12,12", "--rounds", "1", "--calls", "1", "--quiet")
    data = run_json(capsys, "bench", "m.fxq", "--onnx", "m.onnx", *size)
    assert [timing["name"] for timing in data["timings"]] == ["m.fxq", "m.onnx"]
    Path("bad.onnx").write_bytes(Path("m.onnx").read_bytes()[:500])
    assert main(("evaluate", "bad.onnx", *against)) == 2
    assert "bad.onnx: ONNX Runtime cannot load it" in capsys.readouterr().err


def test_bench_puts_accuracy_beside_latency(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--input-shape", "3,12,12", "--rounds", "1", "--calls", "1")
    images = ("--evaluate", "images", *CALIBRATION)
    recipes = ("--recipe", "w8a8", "--recipe", "bf16", "--target", "reference")
    data = run_json(capsys, "bench", MODEL, *recipes, *quick, *images)
    assert list(data["accuracy"]) == [t["name"] for t in data["timings"]]
    assert data["accuracy"]["float"]["agreement"] == 1
    assert data["accuracy"]["w8a8"]["sqnr_db"] > 20
    assert main(["bench", MODEL, *quick, "--evaluate", "images"]) == 2
    assert "add --calibration DIR" in capsys.readouterr().err


def test_evaluate_needs_no_reference(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "evaluate", MODEL, "images", "--images", "4", *PIXELS)
    assert data["images"] == 4
    assert data["agreement"] is None


def test_settings_change_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "recipes", "w8a8", "--set", "weights.bits=4", "--set", "start_at=fc")
    assert "bits = 4" in data["toml"]
    assert 'start_at = "fc"' in data["toml"]


def test_recipes_can_be_files(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    toml = run_json(capsys, "recipes", "w4a8")["toml"]
    (folder / "mine.toml").write_text(toml)
    assert run_json(capsys, "recipes", "mine.toml")["toml"] == toml


def test_models_lists_names_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "models", "torchvision:mobilenet_v3*")["models"]
    assert found == ["torchvision:mobilenet_v3_large", "torchvision:mobilenet_v3_small"]
    assert "torchvision:wide_resnet50_2" in run_json(capsys, "models", "resnet50")["models"]


def test_recipes_lists_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"w8a8", "w8a8_x86", "w4a8", "dynamic_w8a8"} <= set(run_json(capsys, "recipes"))


def test_recipes_lists_how_further_names_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert GRAMMAR in printed
    assert all(method in printed for method in METHODS)


def test_an_interrupted_compile_goes_on_from_its_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    learned = (*LEARN, "--target", "reference", "--checkpoint", "c.safetensors")
    whole = run_json(capsys, *learned, "--save", "whole.fxq")
    resumed = run_json(capsys, *learned, "--resume", "--save", "resumed.fxq")
    assert any("reconstruction of" in note for note in whole["report"]["notes"])
    assert resumed["report"]["notes"] == whole["report"]["notes"]
    loaded = [fxquant.load(f"{name}.fxq", target="reference") for name in ("whole", "resumed")]
    assert torch.equal(*(model(torch.ones(1, 3, 12, 12)) for model in loaded))


def test_progress_is_for_eyes_unless_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    learn = [argument for argument in LEARN if argument != "--quiet"]
    assert main(learn) == 0
    assert capsys.readouterr().err == ""
    assert main([*learn, "--progress"]) == 0
    assert "it/s" in capsys.readouterr().err


def test_only_the_first_process_prints_and_saves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "joined", lambda device: nullcontext(False))
    assert main([*COMPILE, "--save", "m.fxq", "--evaluate", "images", "--json"]) == 0
    assert capsys.readouterr().out == ""
    assert not Path("m.fxq").exists()


def test_sensitivity_measures_layers_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "sensitivity", MODEL, *CALIBRATION, "--bits", "2", "8", "--activations")
    assert {(row["path"], row["bits"]) for row in data["rows"] if row["what"] == "weight"} == {
        (path, bits) for path in ("conv", "layer1", "fc") for bits in (2, 8)
    }
    assert any(row["what"] == "activation" for row in data["rows"])
    assert data["images"] == 8
    assert data["float_loss"] is not None


def test_sensitivity_learns_no_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("sensitivity", MODEL, *CALIBRATION, "--bits", "4")
    named = [run_json(capsys, *arguments, "--recipe", f"w4a8{end}") for end in ("", "_pdquant")]
    assert named[0]["rows"] == named[1]["rows"]


def test_blocks_are_a_tree(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--input-shape", "3,8,8")
    assert main(["blocks", MODEL, *shape]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["conv", "layer1", "fc"]
    assert lines[0].split()[1:3] == ["1", "layer"]
    data = run_json(capsys, "blocks", MODEL, *shape, "--set", "reconstruction.granularity=model")
    assert [child["name"] for child in data["blocks"][0]["children"]] == ["conv..layer1", "fc"]


def test_bench_times_peers_beside_ours_and_says_which_are_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers.PEERS, "openvino", lambda model, batches, threads: model)

    def missing(*arguments: object) -> None:
        raise ImportError("No module named 'onnxruntime'")

    monkeypatch.setitem(peers.PEERS, "onnxruntime", missing)
    arguments = ("bench", MODEL, "--input-shape", "3,8,8", "--rounds", "1", "--calls", "1")
    data = run_json(capsys, *arguments, "--peers", "openvino,onnxruntime", "--quiet")
    assert [row["name"] for row in data["timings"]] == ["float", "w8a8", "openvino"]
    assert "pip install 'fxquant[peers]'" in data["refused"]["onnxruntime"]


def test_bench_times_half_the_bits_beside_int8(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", MODEL, "--input-shape", "3,8,8", "--rounds", "1", "--calls", "1")
    data = run_json(capsys, *arguments, "--convert", "bfloat16", "--convert", "float16", "--quiet")
    names = [row["name"] for row in data["timings"]]
    assert names == ["float", "w8a8", "bfloat16", "float16"]


def test_a_peer_of_another_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", MODEL, "--peers", "openvinno"])
    assert "did you mean 'openvino'?" in capsys.readouterr().err


def test_html_pages_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ("--evaluate", "images")
    pages = {
        "compile": ("Network", "Layers", "Latency", "Accuracy", "Passes"),
        "compare": ("Network", "Comparison"),
        "sensitivity": ("One weight at a time",),
    }
    for command, titles in pages.items():
        more = images if command == "compile" else ()
        arguments = (command, MODEL, *CALIBRATION, *more, "--html", f"{command}.html")
        assert run_json(capsys, *arguments)["html"] == f"{command}.html"
        page = (folder / f"{command}.html").read_text()
        assert [title for title in titles if f"<h2>{title}</h2>" not in page] == []
    arguments = ("sweep", "fusion", MODEL, *CALIBRATION, *images, "--limit", "1")
    run_json(capsys, *arguments, "--html", "sweep.html")
    assert "accuracy against latency" in (folder / "sweep.html").read_text()


def test_sensitivity_plots(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    data = run_json(capsys, "sensitivity", MODEL, *CALIBRATION, "--plot", "s.png")
    assert Path(data["plot"]).stat().st_size


def test_recipes_auto_prints_a_recipe_within_the_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["recipes", "auto", MODEL, *CALIBRATION, "--size-budget", "0.6kB"]) == 0
    Path("mine.toml").write_text(capsys.readouterr().out)
    recipe = fxquant.Recipe.from_toml(Path("mine.toml"))
    widths = [dict(override.weights)["bits"] for override in recipe.overrides]
    assert len(widths) == 3
    assert min(widths) <= 4 < max(widths)
    assert main(["compile", MODEL, *CALIBRATION, "--recipe", "mine.toml"]) == 0


def test_recipes_auto_takes_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", MODEL, *CALIBRATION, "--json"]) == 0
    Path("s.json").write_text(capsys.readouterr().out)
    auto = ("recipes", "auto", "--measured", "s.json", "--ratio", "7", "--fix", "fc=8")
    data = run_json(capsys, *auto, "--base", "w4a4_head_stem8_brecq")
    assert data["bits"]["fc"] == 8
    assert data["weight_bytes"] * 7 <= data["float_bytes"] == 4 * (216 + 576 + 32)
    assert 'method = "brecq"' in data["toml"]


def test_bench_times_float_and_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--input-shape", "3,12,12", "--rounds", "1", "--calls", "1", "--quiet")
    data = run_json(capsys, "bench", MODEL, *size, "--threads", "1")
    assert [timing["name"] for timing in data["timings"]] == ["float", "w8a8"]
    assert data["machine"]["threads"] == 1


@pytest.mark.usefixtures("native")
def test_bench_profiles_the_layers_of_native(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--input-shape", "3,12,12", "--rounds", "1", "--calls", "1", "--quiet", "--profile")
    data = run_json(capsys, "bench", MODEL, *size, "--target", "native")
    assert sum(layer["share"] for layer in data["profiles"]["w8a8"]["layers"]) == pytest.approx(1)
    assert main(["bench", MODEL, *size, "--target", "reference"]) == 2
    assert "only target native is profiled" in capsys.readouterr().err


def test_compare_shows_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", MODEL, *CALIBRATION]) == 0
    assert "layer1" in capsys.readouterr().out


def test_compare_ops_replaces_operations(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--worst", "2", "--value-images", "3")
    data = run_json(capsys, "compare", MODEL, *CALIBRATION, "--ops", "--evaluate", "images", *few)
    assert (data["images"], data["value_images"]) == (12, 3)
    assert [row["group"] for row in data["rows"]].count("value") == 2


def test_sweep_prints_float_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDIES, "fusion", lambda model: FUSION[2:])
    data = run_json(capsys, "sweep", "fusion", MODEL, *CALIBRATION, "--evaluate", "images")
    assert [row["name"] for row in data["rows"]] == ["float", "all"]


def test_sweep_trains_where_the_study_does(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--rows", "W4A32, BN folded, abs-max*", "--limit", "1", "--epochs", "1")
    data = run_json(
        capsys, "sweep", "qat", MODEL, *CALIBRATION, "--evaluate", "images", *rows,
        "--training", "images",
    )  # fmt: skip
    assert [row["name"] for row in data["rows"]][1:] == ["W4A32, BN folded, abs-max, lr 0.001"]
    assert not data["rows"][1]["error"]


# -- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("check", "code"), [(("--min-sqnr", "5"), 0), (("--min-sqnr", "300"), 1)])
def test_a_failed_check_exits_with_1(
    capsys: pytest.CaptureFixture[str], check: tuple[str, ...], code: int
) -> None:
    assert main([*COMPILE, "--evaluate", "images", *check]) == code
    assert ("check failed: SQNR is" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "torchvision:mobilenetv2"), "did you mean 'mobilenet_v2'"),
        (("compile", MODEL), "calibration"),
        (("models", "no_such_network"), "`fxquant models` lists all"),
        ((*COMPILE, "--recipe", "w8a9"), "did you mean"),
        ((*COMPILE, "--set", "weights.bit=4"), "did you mean"),
        ((*COMPILE, "--set", "weights.bits"), "is no KEY=VALUE"),
        ((*COMPILE, "--set", "start_at=layer2"), "layer1"),
        ((*COMPILE, "--target", "x68"), "x86"),
        ((*COMPILE, "--weights", "no_bias.safetensors"), "1 of 10 keys missing (fc.bias)"),
        ((*COMPILE, "--save", "nowhere/m.fxq"), "there is no folder"),
        ((*COMPILE, "--min-agreement", "0.9"), "add --evaluate DIR"),
        ((*COMPILE, "--classes", "2", "--evaluate", "images"), "label 2 is out of range"),
        (("compile", MODEL, "--calibration", "nowhere"), "no such folder"),
        (("compile", MODEL, "--calibration", "."), "network_of_test_cli.py: a file beside"),
        (("evaluate", MODEL, "images", "--crop", "13", *PIXELS), "smaller than the crop of 13"),
        (("evaluate", "nowhere.fxq", "images"), "there is no such file"),
        (("evaluate", "w.safetensors", "images", *PIXELS), "w.safetensors"),
        (("inspect", "images/00.png"), "00.png"),
        (("sweep", "fusion", MODEL, "--evaluate", "images"), "add --calibration DIR"),
        (
            ("sweep", "brecq", MODEL, *CALIBRATION, "--evaluate", "images", "--rows", "W9*"),
            "'W9*' matches no row",
        ),
        ((*COMPILE, "--recipe", "w4a8_adarond"), "did you mean 'w4a8_adaround'"),
        ((*COMPILE, "--set", "reconstruction.iteration=4"), "reconstruction.iterations"),
        ((*COMPILE, "--resume"), "w8a8 learns nothing"),
        ((*COMPILE, "--recipe", "w4a8_adaround", "--resume"), "name it by checkpoint"),
        ((*COMPILE, "--checkpoint", "c"), "w8a8 learns nothing"),
        ((*COMPILE, "--device", "cuda:99"), "CUDA devices"),
        ((*COMPILE, "--device", "gpu"), "give cpu, cuda or cuda:N"),
        (("compile", MODEL, "--recipe", "w4a32_gptq"), "calibration"),
        (("sensitivity", MODEL), "add --calibration DIR"),
        (("sensitivity", MODEL, *CALIBRATION, "--bits", "1"), "between 2 and 8"),
        (("sensitivity", MODEL, *CALIBRATION, "--plot", "nowhere/s.png"), "there is no folder"),
        ((*COMPILE, "--html", "nowhere/r.html"), "--html nowhere/r.html: there is no folder"),
        (("compare", MODEL, *CALIBRATION, "--ops", "--html", "r.html"), "leave out --ops"),
        (("recipes", "w4a8", MODEL), "belongs to `fxquant recipes auto MODEL`"),
        (("recipes", "w4a8", "--ratio", "4"), "--ratio belongs to"),
        (("recipes", "auto", MODEL), "give --size-budget BYTES or --ratio R"),
        (("recipes", "auto", "--ratio", "4"), "needs a model"),
        (("recipes", "auto", MODEL, "--ratio", "4"), "add --calibration DIR"),
        (("recipes", "auto", MODEL, *CALIBRATION, "--ratio", "17"), "too small"),
        (("recipes", "auto", MODEL, "--ratio", "4", "--fix", "fc"), "is no LAYER=BITS"),
        (("recipes", "auto", "--ratio", "4", "--measured", "w.safetensors"), "is not what"),
        (("compare", MODEL, "--ops", "--evaluate", "images", *PIXELS), "add --calibration DIR"),
    ],
)
def test_wrong_use_is_one_line_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("fxquant: error: ")
    assert message in line
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--diff-pass", "fold_batchnorm"), "did you mean 'fold_batch_norm'"),
        (("--diff-pass", "pad_channels", "--target", "reference"), "no pass 'pad_channels' runs"),
        (("--device", "gpu"), "give cpu, cuda or cuda:N"),
        (("--checkpoint", "c"), "w8a8 learns nothing"),
    ],
)
def test_wrong_use_shows_before_the_model_is_made(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["compile", "nowhere:Net", *CALIBRATION, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_image_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("images/05.png").write_text("text")
    assert main([*COMPILE, "--images", "12"]) == 2
    assert "05.png: cannot be read as an image" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["compil"], ["compile"], ["sweep", "fusio", MODEL]])
def test_wrong_words_exit_with_2_too(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "command",
    list(COMMANDS),
)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_threads_hold_only_for_the_command() -> None:
    before = torch.get_num_threads()
    assert main(["recipes", "--threads", "1"]) == 0
    assert torch.get_num_threads() == before
